"""Models with prediction heads, on composed bodies and on every family: what is read, learned, saved and said."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from tests.families.tiny_families import TINY, save_family
from tests.tiny_parts import Parts, picture
from vlm.assembly.family import load_family_config, load_family_model
from vlm.data.batching.collator import Collator
from vlm.data.blank_images import dummy_image
from vlm.data.dataset import model_inputs
from vlm.data.encoding.labels import Encoded, encode, encode_prompt, get_media_token_ids
from vlm.data.heads.dataset import prompt_mask
from vlm.data.sample import ImageRef, Sample, Turn
from vlm.families.processing import load_family_processor
from vlm.families.table import FAMILIES
from vlm.models import VLMForPrediction, VLMPredictionConfig
from vlm.models.head_losses import head_loss

COMPOSED = {"tied": ("clip", "tied_llama"), "untied": ("dinov2", "gemma3")}
BODIES = [*COMPOSED, *TINY]

BINARY = {"name": "answer", "task": "binary", "labels": ["no", "yes"], "loss": "bce"}
EVERY = {"name": "every", "task": "multiclass", "labels": ["a", "b", "c"], "loss": "ce", "pooling": "alltoken"}
HEADS = [
    BINARY,
    EVERY,
    {"name": "below", "task": "pairwise", "loss": "margin", "pooling": "attention", "layer": 1},
]
"""The last state of the last token, the last state of every token, and an earlier one of every token."""


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory, parts: Parts) -> Callable[[str], tuple[Any, Any]]:
    """A fresh body of `BODIES` in float32 with the processor that training has for it."""
    root = tmp_path_factory.mktemp("bodies")

    def load(name: str) -> tuple[Any, Any]:
        if name in COMPOSED:
            return parts.model(*COMPOSED[name], template="chatml")
        if not (root / name).exists():
            save_family(name, root / name)
        config = load_family_config(str(root / name))
        body = load_family_model(str(root / name), config, dtype=torch.float32, attention="eager")
        return body, load_family_processor(str(root / name), FAMILIES[TINY[name].model_type])

    return load


@pytest.fixture(params=BODIES)
def name(request: pytest.FixtureRequest) -> str:
    """Each body."""
    return request.param


def make_predictor(body: Any, processor: Any, *heads: dict[str, Any], **more: Any) -> VLMForPrediction:
    """A model with these heads, which does not train."""
    config = VLMPredictionConfig(
        body_config=body.config, heads=heads or [BINARY], media_token_ids=get_media_token_ids(processor), **more
    )
    return VLMForPrediction(config, body).eval()


def make_batch(
    processor: Any, *numbers: int, only: int | None = None, left: bool = False, reply: str = "a cat"
) -> dict[str, Tensor]:  # fmt: skip
    """Rows that show so many images, of different lengths, each with a reply that is supervised.

    Args:
        processor: the body's.
        numbers: pictures of each row.
        only: the row to lay out by itself.
        left: whether padding stands on the left.
        reply: what is supervised; nothing: prompts wait for it.
    """
    rows = []
    for row, number in enumerate(numbers):
        images = [picture(seed, (40 - 8 * seed, 30)) for seed in range(number)]
        asked = (*(ImageRef(Path()) for _ in images), "what is it?" * (row + 1))
        turns = [Turn("user", asked), Turn("assistant", (reply,))]
        sizes = [(image.height, image.width) for image in images]
        if reply:
            encoded = encode(processor, Sample("x", tuple(turns)), sizes)
        else:
            ids = encode_prompt(processor, turns[:1], sizes)
            encoded = Encoded(ids, [-100] * len(ids))
        rows.append(model_inputs(processor, encoded, images))
    rows = rows if only is None else rows[only : only + 1]
    batch = Collator.of(processor, dummy_image(processor), left=left)(rows)
    if "pixel_values" in batch:
        batch["pixel_values"] = processor.normalise(batch["pixel_values"])
    return batch


def saved_names(folder: Path) -> list[str]:
    names: list[str] = []
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            names += list(weights.keys())
    return names


def refuse(*_: Any) -> None:
    raise AssertionError("the vocabulary head was asked")


# Every body


def test_heads_read_the_hidden_states_of_the_body(name: str, opened: Callable[[str], tuple[Any, Any]]):
    """Exactly, of the last layer and of another one; the vocabulary head is not asked."""
    body, processor = opened(name)
    batch = make_batch(processor, 1, 2, 0)
    del batch["labels"]
    before = {key: value.clone() for key, value in body.state_dict().items()}
    model = make_predictor(body, processor, *HEADS, {**EVERY, "name": "first", "layer": 0})
    assert all(torch.equal(value, before[key]) for key, value in body.state_dict().items())
    with torch.no_grad():
        states = body(**batch, output_hidden_states=True).hidden_states
        body.get_output_embeddings().register_forward_hook(refuse)
        found = model.features(**batch)
        outputs = model(**batch).outputs
    real = batch["attention_mask"].bool()
    for head, layer in (("every", -1), ("below", 1), ("first", 0)):
        assert torch.equal(found[head][real], states[layer][real]), head
    last = [int(row.nonzero().max()) for row in real]
    assert torch.equal(found["answer"], states[-1][range(3), last])
    assert {head: tuple(one.shape) for head, one in outputs.items()} == {
        "answer": (3, 1), "every": (3, 3), "below": (3, 1), "first": (3, 3)
    }  # fmt: skip


def test_a_model_comes_back_as_it_was(name: str, opened: Callable[[str], tuple[Any, Any]], tmp_path: Path):
    """Equal outputs through both auto classes; weights that are tied stay so, and are saved once."""
    body, processor = opened(name)
    batch = make_batch(processor, 1, 2)
    del batch["labels"]
    model = make_predictor(body, processor, *HEADS)
    tied = body.get_output_embeddings().weight is body.get_input_embeddings().weight
    with torch.no_grad():
        for weight in model.get_input_embeddings().parameters():
            weight.add_(0.01)  # as training would
        wanted = model(**batch)
    model.save_pretrained(tmp_path)
    assert any("lm_head" in key for key in saved_names(tmp_path)) == (not tied)
    for auto in (AutoModel, AutoModelForSequenceClassification):
        loaded, info = auto.from_pretrained(tmp_path, attn_implementation="eager", output_loading_info=True)
        assert isinstance(loaded, VLMForPrediction)
        assert not any(info.values())
        assert loaded.body.config.get_text_config()._attn_implementation == "eager"
        found = loaded(**batch)
        assert torch.allclose(found.logits, wanted.logits, atol=1e-5)
        for head, one in wanted.outputs.items():
            assert torch.allclose(found.outputs[head], one, atol=1e-5)
        assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
        assert loaded.predict(**batch)["answer"]["predictions"] == model.predict(**batch)["answer"]["predictions"]


def test_replies_are_learned_beside_and_not_read(name: str, opened: Callable[[str], tuple[Any, Any]]):
    """The loss is the heads' and a share of the body's own; another reply leaves what heads say as it was."""
    body, processor = opened(name)
    batch = make_batch(processor, 1, 2)
    text = batch.pop("labels")
    model = make_predictor(body, processor, *HEADS, generation_weight=0.3)
    prompt = prompt_mask(text, batch["attention_mask"])
    labels = {"answer": torch.tensor([0.0, 1.0]), "every": torch.tensor([2, 0])}
    with torch.no_grad():
        joint = model(**batch, labels=labels, text_labels=text, prompt_mask=prompt)
        alone = model(**batch, labels=labels, prompt_mask=prompt)
        own = body(**batch, labels=text).loss
        other = {**batch, "input_ids": batch["input_ids"].where(text == -100, processor.tokenizer.eos_token_id)}
        foreseen = model(**other, prompt_mask=prompt)
    assert torch.allclose(joint.loss, alone.loss + 0.3 * own, atol=1e-5)
    for head, one in joint.outputs.items():
        assert torch.allclose(alone.outputs[head], one, atol=1e-5)
        assert torch.allclose(foreseen.outputs[head], one, atol=1e-5)


def test_a_batch_gives_each_row_what_it_would_get_alone(name: str, opened: Callable[[str], tuple[Any, Any]]):
    """With one image, two and none.

    In Llama 3.2 Vision as transformers has it, tokens that no picture precedes attend to those of other rows: a row
    without one is left out, and heads that read such tokens.
    """
    body, processor = opened(name)
    model = make_predictor(body, processor, *HEADS)
    compared = ["answer"] if name == "mllama" else [head["name"] for head in HEADS]
    numbers = (1, 2, 1) if name == "mllama" else (1, 2, 0)

    def said(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        text = batch.pop("labels")
        with torch.no_grad():
            return model(**batch, prompt_mask=prompt_mask(text, batch["attention_mask"])).outputs

    together = said(make_batch(processor, *numbers))
    for row in range(3):
        alone = said(make_batch(processor, *numbers, only=row))
        for head in compared:
            assert torch.allclose(together[head][row], alone[head][0], atol=1e-4), (row, head)


# Composed bodies


@pytest.fixture(params=COMPOSED)
def composed(request: pytest.FixtureRequest, opened: Callable[[str], tuple[Any, Any]]) -> tuple[Any, Any]:
    """A body of one's own with its processor."""
    return opened(request.param)


POOLED = [
    {**EVERY, "name": pooling, "pooling": pooling}
    for pooling in ("last", "mean", "image", "text", "first", "attention", "alltoken")
]


def test_padding_may_stand_on_either_side(composed: tuple[Any, Any]):
    model = make_predictor(*composed, *POOLED)
    with torch.no_grad():
        right, left = (make_batch(composed[1], 1, 2, 1, left=left, reply="") for left in (False, True))
        assert not torch.equal(left["attention_mask"], right["attention_mask"])
        for batch in (left, right):
            del batch["labels"]
        found, wanted = model(**left).outputs, model(**right).outputs
        by_processor = model(**{**left, "attention_mask": left["attention_mask"].bool()}).outputs
    for head, one in wanted.items():
        assert torch.allclose(found[head], one, atol=1e-4), head
        assert torch.equal(found[head], by_processor[head]), head


def test_a_prompt_with_a_reply_behind_it_is_read_as_without(composed: tuple[Any, Any]):
    model = make_predictor(*composed, *POOLED)
    answered, waiting = make_batch(composed[1], 1, 2), make_batch(composed[1], 1, 2, reply="")
    mask = prompt_mask(answered.pop("labels"), answered["attention_mask"])
    del waiting["labels"]
    with torch.no_grad():
        found, wanted = model(**answered, prompt_mask=mask).outputs, model(**waiting).outputs
    for head, one in wanted.items():
        assert torch.allclose(found[head], one, atol=1e-5), head


def test_features_say_what_inputs_do(composed: tuple[Any, Any]):
    """Computed once, they are all that heads need; of those that read every token, with the mask."""
    model = make_predictor(*composed, *POOLED)
    batch = make_batch(composed[1], 1, 2, reply="")
    del batch["labels"]
    labels = {head["name"]: torch.tensor([0, 2]) for head in POOLED}
    with torch.no_grad():
        wanted = model(**batch, labels=labels)
        features = model.features(**batch)
    model.body = nn.Identity()  # is not asked
    found = model(features=features, attention_mask=batch["attention_mask"], labels=labels)
    assert torch.equal(found.loss, wanted.loss)
    for head, one in wanted.outputs.items():
        assert torch.equal(found.outputs[head], one), head
    with pytest.raises(ValueError, match="pooling=attention reads every token: give attention_mask with features"):
        model(features=features)


def test_a_head_reads_at_a_token(composed: tuple[Any, Any]):
    """Of its own behind the prompt, or one that stands in it; a row without any is an error that names it."""
    batch = make_batch(composed[1], 1, 1, reply="", left=True)
    del batch["labels"]
    start, query = [one for one in range(256) if one not in batch["input_ids"]][:2]
    ids, real = batch["input_ids"], batch["attention_mask"].bool()
    firsts = [int(row.nonzero()[0]) for row in real]
    ids[range(2), firsts] = start
    suffixed = torch.cat([ids, torch.full((2, 1), query)], dim=1)
    inputs = {**batch, "input_ids": suffixed, "attention_mask": F.pad(batch["attention_mask"], (0, 1), value=1)}
    at = [
        {**EVERY, "name": "own", "pooling": "query", "token_id": query},
        {**EVERY, "name": "start", "pooling": "token", "token_id": start},
        {**EVERY, "name": "all"},
    ]
    model = make_predictor(*composed, *at, suffix_ids=[query])
    with torch.no_grad():
        found = model.features(**inputs)
        assert torch.equal(found["own"], found["all"][:, -1])
        assert torch.equal(found["start"], found["all"][range(2), firsts])
        with pytest.raises(ValueError, match=r"pooling=query: row 0 has no token to read: .*config\.suffix"):
            model(**batch)


def test_a_row_without_an_image_has_none_to_read(composed: tuple[Any, Any]):
    batch = make_batch(composed[1], 1, 0, 1, reply="")
    del batch["labels"]
    with pytest.raises(ValueError, match="pooling=image: row 1 has no token to read: it has no image"):
        make_predictor(*composed, {**BINARY, "pooling": "image"})(**batch)


def test_several_heads_with_labels_for_some_rows(composed: tuple[Any, Any]):
    """The weighted sum of their losses; one without any label adds nothing, and has a gradient all the same."""
    age = {"name": "age", "task": "regression", "loss": "mse", "weight": 0.5, "shift": 40.0, "scale": 10.0}
    model = make_predictor(*composed, BINARY, {**EVERY, "weight": 2.0, "label_smoothing": 0.1}, age)
    batch = make_batch(composed[1], 1, 2, 1, reply="")
    del batch["labels"]
    nan = torch.nan
    labels = {"answer": torch.tensor([1.0, nan, 0.0]), "every": torch.tensor([[2.0], [0.0], [nan]]),
              "age": torch.tensor([nan, 55.0, nan])}  # fmt: skip
    found = model(**batch, labels=labels)
    answer, every, years = found.outputs.values()
    standard = (years - 40) / 10
    wanted = (
        head_loss("binary", "bce", answer[[0, 2]], torch.tensor([1.0, 0.0]))
        + 2 * head_loss("multiclass", "ce", every[:2], torch.tensor([2, 0]), smoothing=0.1)
        + 0.5 * (standard[1, 0] - 1.5) ** 2
    )
    assert torch.allclose(found.loss, wanted, atol=1e-5)
    assert torch.equal(found.logits, answer)
    some = model(**batch, labels={"answer": labels["answer"]})
    assert torch.equal(model(**batch, labels=labels["answer"]).loss, some.loss)
    nothing = {head: torch.full_like(one, nan) for head, one in labels.items()}
    loss = model(**batch, labels=nothing).loss
    loss.backward()
    assert loss.item() == 0
    assert all(one.grad is not None and (one.grad == 0).all() for one in model.heads.parameters())


def test_pairs_are_compared_within_groups(composed: tuple[Any, Any]):
    model = make_predictor(
        *composed, {"name": "rank", "task": "pairwise", "loss": "margin", "loss_options": {"margin": 2}}
    )
    batch = make_batch(composed[1], 1, 2, 1, reply="")
    del batch["labels"]
    found = model(**batch, labels=torch.tensor([1.0, 3.0, 2.0]), groups=torch.tensor([0, 1, 0]))
    assert torch.allclose(found.loss, torch.relu(2 - (found.logits[2, 0] - found.logits[0, 0])), atol=1e-6)


def test_a_body_that_does_not_train_stays_as_in_evaluation(composed: tuple[Any, Any]):
    """It builds no graph, and its modules stay in evaluation mode; where a part of it trains, all is as usual."""
    model = make_predictor(*composed, {**EVERY, "options": {"dropout": 0.5}})
    batch = make_batch(composed[1], 1, 2, reply="")
    del batch["labels"]
    model.body.requires_grad_(False)
    model.train()
    assert not any(module.training for module in model.body.modules())
    assert all(module.training for module in model.heads.modules())
    assert not model.features(**batch)["every"].requires_grad
    model(**batch, labels=torch.tensor([0, 1])).loss.backward()
    assert all(one.grad is not None for one in model.heads.parameters())
    model.body.connector.requires_grad_(True)
    model.train()
    assert model.body.connector.training
    assert not model.body.visual_encoder.training
    model(**batch, labels=torch.tensor([0, 1])).loss.backward()
    assert all(one.grad is not None and one.grad.any() for one in model.body.connector.parameters())


EXPECTED_PREDICTIONS = [
    (BINARY, ["no", "yes"]),
    ({**EVERY, "labels": [1, 2, 3]}, [1, 2, 3]),
    ({"name": "several", "task": "multilabel", "labels": ["a", "b"], "threshold": [0.0, 1.1]}, [["a"]]),
    ({"name": "grade", "task": "ordinal", "labels": ["low", "middle", "high"], "temperature": 2.0},
     ["low", "middle", "high"]),
    ({"name": "age", "task": "regression"}, None),
    ({"name": "rank", "task": "pairwise"}, None),
]  # fmt: skip
"""A head, and what it may predict."""


def test_what_is_predicted(composed: tuple[Any, Any]):
    model = make_predictor(*composed, *(head for head, _ in EXPECTED_PREDICTIONS))
    batch = make_batch(composed[1], 1, 2, 1, reply="")
    del batch["labels"]
    found, outputs = model.predict(**batch), model(**batch).outputs
    for head, allowed in EXPECTED_PREDICTIONS:
        one = found[head["name"]]
        assert len(one["predictions"]) == 3
        assert not one["scores"].requires_grad
        if allowed is None:
            assert torch.equal(one["scores"], outputs[head["name"]][:, 0])
            assert one["predictions"] == one["scores"].tolist()
            continue
        assert one["scores"].shape == (3, len(head["labels"]))
        assert all(label in allowed for label in one["predictions"])
    middle = (outputs["grade"] / 2).sigmoid()
    assert torch.allclose(found["grade"]["scores"][:, 1], middle[:, 0] - middle[:, 1], atol=1e-6)


@pytest.mark.parametrize(("threshold", "label"), [(0.0, "yes"), (1.1, "no")])
def test_a_threshold_decides(composed: tuple[Any, Any], threshold: float, label: str):
    batch = make_batch(composed[1], 1, 2, reply="")
    del batch["labels"]
    assert make_predictor(*composed, {**BINARY, "threshold": threshold}).predict(**batch)["answer"]["predictions"] == [
        label, label
    ]  # fmt: skip


def test_arguments_that_do_not_fit(composed: tuple[Any, Any]):
    model = make_predictor(*composed)
    batch = make_batch(composed[1], 1)
    text = batch.pop("labels")
    with pytest.raises(ValueError, match="give input_ids, or features"):
        model()
    with pytest.raises(ValueError, match="give prompt_mask with text_labels"):
        model(**batch, text_labels=text)
    with pytest.raises(ValueError, match="labels of other: the heads are answer"):
        model(**batch, labels={"other": torch.zeros(1)})
    with pytest.raises(ValueError, match="labels of no head: the heads are answer"):
        model(**batch, labels={})


# Checkpoints and configurations


def test_heads_stay_in_single_precision(composed: tuple[Any, Any], tmp_path: Path):
    """Temperatures and thresholds were chosen for their numbers: a body in half precision does not round them."""
    grade = {"name": "grade", "task": "ordinal", "labels": [1, 2, 3]}
    model = make_predictor(composed[0].bfloat16(), composed[1], *POOLED, grade)
    model.save_pretrained(tmp_path)
    for options in ({}, {"dtype": torch.bfloat16}):
        loaded = AutoModel.from_pretrained(tmp_path, **options)
        assert {one.dtype for one in loaded.body.parameters()} == {torch.bfloat16}
        for name, one in loaded.named_parameters():
            assert torch.equal(one, model.get_parameter(name)), name
    assert {one.dtype for one in AutoModel.from_pretrained(tmp_path, dtype=torch.float32).parameters()} == {
        torch.float32
    }


def test_a_configuration_comes_back_as_it_was(composed: tuple[Any, Any], tmp_path: Path):
    model = make_predictor(*composed, {**BINARY, "threshold": 0.4}, EVERY, suffix="<|every|>", suffix_ids=[5])
    model.config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, VLMPredictionConfig)
    assert loaded.settings == model.config.settings
    assert loaded.id2label == {0: "no", 1: "yes"}
    left, right = model.config.to_dict(), loaded.to_dict()
    for values in (left, right, left["body_config"], right["body_config"]):
        for key in ("transformers_version", "_name_or_path", "dtype", "architectures"):
            values.pop(key, None)
    assert left == right
    assert loaded.get_text_config().hidden_size == 32


def test_an_empty_model_can_be_made_of_its_configuration(composed: tuple[Any, Any]):
    grade = {"name": "grade", "task": "ordinal", "labels": [1, 2, 3]}
    config = make_predictor(*composed, grade).config
    model = AutoModel.from_config(config)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert torch.allclose(-model.heads["grade"].cuts(torch.zeros(1)), torch.tensor([-0.5, 0.5]))


def test_a_reloaded_model_still_resizes_rightly(composed: tuple[Any, Any], tmp_path: Path):
    make_predictor(*composed).save_pretrained(tmp_path / "a")
    model = AutoModel.from_pretrained(tmp_path / "a")
    model.resize_token_embeddings(400)
    model.save_pretrained(tmp_path / "b")
    again = AutoModel.from_pretrained(tmp_path / "b")
    assert again.get_input_embeddings().weight.shape == again.get_output_embeddings().weight.shape == (400, 32)
    assert again.config.get_text_config().vocab_size == 400
    assert torch.equal(again.get_output_embeddings().weight, model.get_output_embeddings().weight)


def test_a_body_that_grew_keeps_its_rows(composed: tuple[Any, Any]):
    """Heads are put on it afterwards, which initialises nothing again."""
    body, processor = composed
    body.resize_token_embeddings(400)
    before = {key: value.clone() for key, value in body.state_dict().items()}
    make_predictor(body, processor)
    assert all(torch.equal(value, before[key]) for key, value in body.state_dict().items())
