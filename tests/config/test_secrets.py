"""Tokens, keys and passwords are masked in whatever is written, and nothing else is."""

import json
import time

import pytest

from vlm.config.secrets import MASK, is_secret_key, mask, mask_settings, mask_values, mask_words

SECRET = "5ecretValue0123"
TEXTS = [
    f"https://user:{SECRET}@host.org/shards/000.tar",
    f"s3://{SECRET}:more@bucket",
    f"https://host/a.tar?token={SECRET}&part=1",
    f"https://host/a.tar?X-Amz-Credential={SECRET}&X-Amz-Date=20250101&X-Amz-Signature={SECRET}",
    f"https://host/a.tar?sv=1&sig={SECRET}",
    f"https://host/a?Expires=1&Signature={SECRET}&Key-Pair-Id={SECRET}",
    f"Authorization: Bearer {SECRET}",
    f'{{"authorization": "Basic {SECRET}"}}',
    f"bearer {SECRET}",
    f"trainer.hub_token={SECRET}",
    f"+trainer.push_to_hub_token='{SECRET}'",
    f"hub_token: {SECRET}",
    f'"password": "{SECRET} with blanks {SECRET}", "x": 1',
    f"WANDB_API_KEY={SECRET} vlm -cn run",
    f"HF_TOKEN={SECRET}",
    f"AWS_SECRET_ACCESS_KEY={SECRET}",
    f"--api-key {SECRET}",
    f"--token={SECRET}",
    f"https://user:{SECRET}@{SECRET}@host.org/a.tar",
    f"hub_token: {SECRET}\nseed: 3",
]
TOKENS = [
    "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH",
    "hf_oauth_eyJhbGciOiJI.eyJzdWIi",
    "sk-proj-abcDEF123456",
    "sk-ant-api03-abcdef",
    "ghp_abcdefghijklmnop1234",
    "github_pat_11ABCDEFG_abcdefghijklmn",
    "AKIAABCDEFGHIJKLMNOP",
    "eyJhbGciOiJI.eyJzdWIiOiIx.c2lnbmF0dXJl",
]
HARMLESS = [
    "model.language_model.hf_name=Qwen/Qwen3-0.6B",
    "trainer.max_tokens_per_batch=4096",
    "model.head.token=<score>",
    "pad_token=<pad>",
    "hf_processor and hf_tokenizer",
    "a task-1234567890123456 of sk-learn",
    "https://host.org/a.tar?part=1&size=3",
    "git@github.com:owner/name, mail@host.org",
    "trainer.hub_token=null",
    "hub_token: null",
    "keyboard=3; tokens: 12; the secret of good data",
    "5f4dcc3b5aa765d61d8327deb882cf99",
    "outputs/hf_llava157b/final, sk-learn-something-long",
    "/data/secret: no such file; /data/secret=1/a.parquet",
    "trainer.hub_token: a value is needed; dataset.options.api_key: llava does not take it",
    "https://host.org/a.png?monkey=1&turkey=2",
    "num_tokens=5 max_new_tokens: 16 image_token=<image> tokenizer: x tokens_per_second=3.5",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_secret_is_masked_by_its_place(text: str):
    masked = mask(text)
    assert SECRET not in masked
    assert MASK in masked
    assert mask(masked) == masked


@pytest.mark.parametrize("token", TOKENS)
def test_a_secret_is_masked_by_its_form(token: str):
    assert mask(f"got {token}, which") == f"got {MASK}, which"


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_no_secret_stays(text: str):
    assert mask(text) == text


def test_json_stays_json():
    text = json.dumps({"trainer": {"hub_token": SECRET, "password": "a b", "x": [f"https://u:{SECRET}@h/"]}, "n": 1})
    assert json.loads(mask(text)) == {
        "trainer": {"hub_token": MASK, "password": MASK, "x": [f"https://{MASK}@h/"]},
        "n": 1,
    }


def test_the_value_of_a_secret_variable_is_masked_wherever_it_stands(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OUR_DATABASE_PASSWORD", "plain-words-as-password")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "sometimes-false")
    assert mask("a plain-words-as-password b, sometimes-false") == f"a {MASK} b, sometimes-false"


def test_keys_of_settings():
    assert all(map(is_secret_key, ("trainer.hub_token", "trainer.any_token", "dataset.options.api_key", "password")))
    assert not any(map(is_secret_key, ("model.head.token", "model.head.extra_heads.a.token", "trainer.max_tokens")))


def test_settings_are_masked_by_key_and_by_text():
    settings = {
        "trainer": {"hub_token": SECRET, "push_to_hub_token": None, "seed": 3},
        "dataset": {"path": f"https://u:{SECRET}@h/x", "sources": {"a": {"options": {"token": SECRET, "n": [1]}}}},
        "model": {"head": {"token": "<s>"}},
    }
    assert mask_settings(settings) == {
        "trainer": {"hub_token": MASK, "push_to_hub_token": None, "seed": 3},
        "dataset": {"path": f"https://{MASK}@h/x", "sources": {"a": {"options": {"token": MASK, "n": [1]}}}},
        "model": {"head": {"token": "<s>"}},
    }
    assert mask_settings(mask_settings(settings)) == mask_settings(settings)


def test_words_of_a_command():
    words = ["vlm", "-cn", "run", f"trainer.hub_token={SECRET}", "--token", SECRET, f"--api-key={SECRET}", "x=1"]
    assert mask_words(words) == [
        "vlm", "-cn", "run", f"trainer.hub_token={MASK}", "--token", MASK, f"--api-key={MASK}", "x=1",
    ]  # fmt: skip


def test_values_of_secrets_on_the_command_line_are_masked_in_pieces_too():
    words = ["trainer.hub_token=[first-part,'second part']", "+dataset.options.password=a{bcdef", "trainer.seed=1234"]
    text = "hub_token: cannot convert ['first-part', 'second part'] to text; {bcdef; seed 1234; null"
    assert (
        mask_values(text, words)
        == f"hub_token: cannot convert ['{MASK}', '{MASK} {MASK}'] to text; {{{MASK}; seed 1234; null"
    )
    assert mask_values("null", ["trainer.hub_token=null"]) == "null"


LONG = ["password: a " * 9_000, "password: " + "a" * 100_000, "https://" + "a@" * 50_000,
        "a_" * 50_000, "a.a-" * 25_000, "&" + "a" * 100_000, "x://" * 25_000, "password" * 12_000,
        "password" + " " * 90_000, "--" + "a-" * 50_000, "sk-" * 30_000, "authorization " * 8_000, "?a" * 50_000,
        "eyJ" + "a" * 50_000 + "." + "b" * 50_000]  # fmt: skip


@pytest.mark.parametrize("text", LONG, ids=[text[:8] for text in LONG])
def test_masking_takes_time_linear_in_the_text(text: str):
    """A quadratic pattern takes minutes for these; each takes milliseconds."""
    started = time.process_time()
    mask(text)
    assert time.process_time() - started < 5
