"""Templates and tokenizers of strangers are tried in a process of their own; processors with one small image."""

import json
from pathlib import Path

import pytest

from tests.tiny_parts import CHAT_TEMPLATES, Parts
from vlm.assembly import processor_trial
from vlm.assembly.processor_trial import check_composed_processor, try_processor, try_template, try_tokenizer_file
from vlm.assembly.trial_process import encode, render


@pytest.fixture(autouse=True)
def one_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """What loops is ended sooner."""
    monkeypatch.setattr(processor_trial, "MAX_SECONDS", 1)


def rendered(template: str) -> str:
    conversations = list(processor_trial._conversations("<image>"))
    return render(template, conversations, processor_trial._variables("<image>"))


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_templates_of_models_pass(name: str):
    assert rendered(CHAT_TEMPLATES[name].text) == ""


def test_what_templates_of_transformers_use_is_there():
    assert (
        rendered("{% generation %}{{ messages | tojson(indent=2) }}{% endgeneration %}{{ strftime_now('%Y') }}") == ""
    )
    assert rendered("{% if messages | length > 2 %}{{ raise_exception('too long') }}{% endif %}x") == ""
    assert rendered("{{ raise_exception('no') }}") == "does not render a conversation: TemplateError: no"


def test_a_template_that_writes_without_end_or_is_none_is_refused():
    text = "{% for i in range(9999) %}{{ 'x' * 99999 }}{% endfor %}"
    assert rendered(text).startswith("writes more than 4,194,304 characters")
    assert rendered("{% for %}").startswith("is not a template: TemplateSyntaxError")


@pytest.mark.parametrize(
    "template",
    ["{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "{{ 'x' * 10 ** 10 }}"],
)
def test_a_template_that_takes_for_ever_ends_its_own_process(template: str):
    with pytest.raises(ValueError, match=r"^name: its chat template \(chat_template.jinja, .*(takes|needs) more than "):
        try_template(template, "<image>", "name")


def test_expressions_that_backtrack_without_end_are_refused(tmp_path: Path):
    split = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"pre_tokenizer": split}))
    try:
        try_tokenizer_file(str(tmp_path))
    except ValueError as error:  # some engines give up by themselves
        assert str(error).startswith(f"{tmp_path}/tokenizer.json ")  # noqa: PT017
    split["pattern"] = {"Regex": "((("}
    assert encode({"pre_tokenizer": split}, ["((("]).startswith("is not a tokenizer: ")
    split["pattern"] = {"Regex": r"\p{L}+|\s+"}
    assert encode({"pre_tokenizer": split, "normalizer": None}, [r"\p{L}+|\s+"]) == ""


@pytest.mark.parametrize("step", ["normalizer", "decoder"])
def test_replacements_that_grow_without_end_are_refused(tmp_path: Path, step: str):
    replace = {"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaaaa"}
    steps = {"type": "Sequence", f"{step}s": [replace] * 30}
    (tmp_path / "tokenizer.json").write_text(json.dumps({step: steps}))
    with pytest.raises(ValueError, match=rf"^{tmp_path}/tokenizer.json takes more than 1 s of processor time, or"):
        try_tokenizer_file(str(tmp_path))


def test_a_processor_of_a_model_passes_and_one_of_another_does_not(parts: Parts):
    model, processor = parts.model(template="chatml")
    try_processor(processor, "name")
    check_composed_processor(processor, model.config, "name")
    processor.tokens_per_image += 1
    with pytest.raises(ValueError, match=r"^name: processor_config.json has tokens_per_image=\d+, but the model makes"):
        check_composed_processor(processor, model.config, "name")
    processor.image_processor.image_std = [0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="turns an image into NaN or infinity; check image_std"):
        try_processor(processor, "name")
    processor.tokenizer.pad_token = None
    with pytest.raises(ValueError, match="its tokenizer has no padding token; name one as pad_token"):
        try_processor(processor, "name")
