"""The table of families: each trains, is saved as its own kind of checkpoint, and loads again in plain transformers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoProcessor

from tests.families.tiny_families import TINY, save_family
from tests.fixtures import compose_config
from tests.logits import supervised_losses
from tests.tiny_parts import picture, runs
from vlm.assembly.family import get_auto_class, load_family_config, load_family_model
from vlm.assembly.resolve import resolve_model
from vlm.cli.main import main
from vlm.config.packaged import packaged_names
from vlm.config.schema import PARTS
from vlm.data.batching.collator import Collator
from vlm.data.blank_images import dummy_image
from vlm.data.dataset import model_inputs
from vlm.data.encoding.labels import encode, encode_prompt
from vlm.data.sample import ImageRef, Sample, Turn
from vlm.evaluation.loss import row_losses
from vlm.families.parts import get_part_names
from vlm.families.processing import FamilyProcessor, load_family_processor
from vlm.families.table import FAMILIES
from vlm.inference.generate import VisionLanguageModel
from vlm.models.connectors import CONNECTORS

TINY_TYPES = {made.model_type for made in TINY.values()}
SIZES = [(30, 40), (64, 20), (16, 16)]
"""Heights and widths of images that have different numbers of tokens where a family knows tiles."""

SPELLED = "what is <image> <|end|>?"
"""What somebody may write without meaning a token."""


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a row of `TINY`, made when it is first asked for."""
    root = tmp_path_factory.mktemp("families")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            save_family(name, root / name)
        return root / name

    return folder


@pytest.fixture(params=TINY)
def name(request: pytest.FixtureRequest) -> str:
    """Each row of `TINY`."""
    return request.param


@pytest.fixture
def processor(name: str, folders: Callable[[str], Path]) -> FamilyProcessor:
    """Its processor."""
    return load_family_processor(str(folders(name)), FAMILIES[TINY[name].model_type])


def load(folder: Path) -> nn.Module:
    """The model in a folder, in float32, ready to be compared."""
    config = load_family_config(str(folder), "model.hf_name")
    return load_family_model(str(folder), config, dtype=torch.float32, attention="eager").eval()


def make_sample(number: int, *replies: str, asked: str = "what is it?") -> Sample:
    """A conversation about images, which come first."""
    turns = [Turn("user", (*(ImageRef(Path()) for _ in range(number)), asked))]
    for place, reply in enumerate(replies):
        turns += [Turn("user", ("and?",))] if place else []
        turns.append(Turn("assistant", (reply,)))
    return Sample("x", tuple(turns))


def make_images(number: int) -> list[Image.Image]:
    """Images of different sizes."""
    return [picture(seed, size[::-1]) for seed, size in enumerate(SIZES[:number])]


def test_every_family_is_tested():
    assert FAMILIES.keys() >= TINY_TYPES


def test_the_parts_share_no_parameter_and_leave_none(name: str, folders: Callable[[str], Path]):
    model = load(folders(name))
    names = get_part_names(model.config)
    found = {parameter: names.part_of(parameter) for parameter, _ in model.named_parameters()}
    assert set(found.values()) == set(PARTS)
    vocabulary = [id(embedding.weight) for embedding in (model.get_input_embeddings(), model.get_output_embeddings())]
    for parameter, weight in model.named_parameters():
        if id(weight) in vocabulary:
            assert found[parameter] == "language_model"


def test_a_parameter_of_no_part_is_an_error():
    with pytest.raises(ValueError, match="matches no part"):
        get_part_names(load_config("llava")).part_of("model.something.weight")


def load_config(model_type: str):
    """A configuration by its family alone."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type]()


@pytest.mark.parametrize("number", [1, 2])
def test_a_prompt_has_the_ids_of_the_familys_own_processor(processor: FamilyProcessor, number: int):
    if processor.native.chat_template is None:
        pytest.skip("it brings no chat template")
    shown = make_images(number)
    asked = [*({"type": "image", "image": one} for one in shown), {"type": "text", "text": "what is it?"}]
    conversation = [{"role": "user", "content": asked}]
    if not processor.family_template.takes_lists:
        conversation = [{"role": "user", "content": processor.image_token * number + "what is it?"}]
    options = {} if processor.family_template.takes_lists else {"processor_kwargs": {"images": shown}}
    theirs = processor.native.apply_chat_template(
        conversation, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt", **options
    )
    turns = make_sample(number, "").turns[:1]
    ids = encode_prompt(processor, turns, SIZES[:number])
    assert ids == theirs["input_ids"][0].tolist()
    inputs = processor.image_inputs(shown)
    inputs |= processor.text_inputs(ids, [-100] * len(ids), inputs)
    for key in theirs.keys() - {"input_ids", "attention_mask"}:
        mine = inputs[key] if key not in processor.per_token_inputs else inputs[key][None]
        assert torch.equal(torch.as_tensor(mine), torch.as_tensor(theirs[key])), key


def test_paligemma_lays_out_prefix_and_suffix_as_its_processor_does(folders: Callable[[str], Path]):
    processor = load_family_processor(str(folders("paligemma")), FAMILIES["paligemma"])
    shown = make_images(1)
    theirs = processor.native(images=[shown], text=["<image>what is it?"], suffix=["a cat"], return_tensors="pt")
    sample = make_sample(1, "a cat")
    encoded = encode(processor, sample, SIZES[:1])
    assert encoded.input_ids == theirs["input_ids"][0].tolist()
    assert encoded.labels == theirs["labels"][0].tolist()
    mine = model_inputs(processor, encoded, shown)
    assert mine["token_type_ids"].tolist() == theirs["token_type_ids"][0].tolist()


def test_exactly_the_replies_are_supervised(name: str, processor: FamilyProcessor):
    replies = ["a cat"] if name == "paligemma" else ["a cat <|end|>", "two of them"]
    encoded = encode(processor, make_sample(1, *replies, asked=SPELLED), SIZES[:1])
    end = processor.tokenizer.eos_token
    found = [processor.tokenizer.decode(run) for run in runs(encoded.labels)]
    assert found == [f"{reply}{end}" for reply in replies]


def test_a_batch_gives_each_row_what_it_would_get_alone(name: str, folders: Callable[[str], Path]):
    """Rows with one image, another with a larger one, with two, and with none.

    In Llama 3.2 Vision as transformers has it, tokens that no picture precedes attend evenly to whatever pictures the
    batch has: a row without one is not compared.
    """
    model = load(folders(name))
    processor = load_family_processor(str(folders(name)), FAMILIES[TINY[name].model_type])
    shown = [make_images(1), [], make_images(3)[1:2], make_images(2)]
    rows = []
    for index, images in enumerate(shown):
        sizes = [image.size[::-1] for image in images]
        rows.append(
            model_inputs(processor, encode(processor, make_sample(len(images), "yes" * (index + 1)), sizes), images)
        )
    collate = Collator.of(processor, dummy_image(processor))

    def losses(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            return row_losses(supervised_losses(model, batch), batch["labels"])[0]

    together = losses(collate(rows))
    alone = torch.cat([losses(collate([row])) for row in rows])
    compared = [index for index, images in enumerate(shown) if images or name != "mllama"]
    assert torch.allclose(together[compared], alone[compared], atol=1e-4), (together, alone)


def test_training_leaves_a_checkpoint_of_the_family(
    name: str, folders: Callable[[str], Path], train_whole: Callable[..., Path], tmp_path: Path
):
    """Every parameter that is read changes; plain transformers loads the result; it answers."""
    folder = folders(name)
    run = train_whole(
        "finetune-llava-onevision", folder, tmp_path / "run", "trainer.deepspeed=null", "trainer.max_steps=2",
        "trainer.bf16=false", "trainer.tf32=null", "trainer.activation_checkpointing=false", "dataset.max_length=512",
        "trainer.learning_rate.connector_learning_rate=1e-2", "trainer.learning_rate.visual_encoder_learning_rate=1e-2",
        "trainer.learning_rate.language_model_learning_rate=1e-2", "trainer.per_device_train_batch_size=4",
        "trainer.gradient_accumulation_steps=1", "model.attn_implementation=eager",
        "trainer.train_sampling_strategy=random", "trainer.warmup_steps=0",
    )  # fmt: skip
    before, trained = load(folder), load(run / "final")
    names = get_part_names(before.config)
    for key, weight in trained.named_parameters():
        changed = not torch.equal(weight, before.get_parameter(key))
        assert changed != names.is_unused(key), key
    kind = type(AutoProcessor.from_pretrained(run / "final"))
    assert kind is type(TINY[name].processor())
    config = load_family_config(str(run / "final"), "x")
    assert get_auto_class(config).from_pretrained(run / "final").config.model_type == TINY[name].model_type
    ours = VisionLanguageModel.load(run / "final", device="cpu")
    said = ours.generate("what is it?", make_images(1), max_new_tokens=3)
    assert ours.generate("what is it?", make_images(1), max_new_tokens=3, cache_implementation="static") == said


def test_a_model_that_reads_no_images_at_its_tokens_is_refused(folders: Callable[[str], Path], tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "git"}')
    with pytest.raises(ValueError, match=r"model\.hf_name=.*model_type=git: it has no visual encoder"):
        load_family_config(str(tmp_path), "model.hf_name")
    with pytest.raises(ValueError, match="no model configuration there"):
        load_family_config(str(tmp_path / "nowhere"), "model.hf_name")


def test_every_packaged_model_belongs_to_one_family():
    shipped = [name for name in packaged_names("vlm.config", "model", ".yaml") if name != "composed"]
    assert sorted(name for family in FAMILIES.values() for name in family.choices) == shipped


def test_the_listing_names_every_part_and_family(capsys: pytest.CaptureFixture[str]):
    main(["models", "--details"])
    said = capsys.readouterr().out
    for name in (*CONNECTORS, *TINY_TYPES, *packaged_names("vlm.config", "model/visual_encoder", ".yaml")):
        assert name in said
    row = next(line for line in said.splitlines() if " qwen2_vl " in line)
    assert "eager, sdpa, flash_attention_2" in row
    assert "flex" not in row


def test_what_a_family_decides_is_refused_before_anything_is_fetched():
    """Nothing lies under that name: the mistake is told, not that."""
    base = ["dataset.path=x", "model.hf_name=nobody/nothing"]
    config = compose_config("pretrain-smol", [*base, "dataset.image_mode=pad"])
    with pytest.raises(ValueError, match="image_mode=pad: nobody/nothing prepares images itself"):
        resolve_model(config)
    config = compose_config("finetune-llava-onevision", [*base, "model/connector=linear"])
    with pytest.raises(ValueError, match=r"is a whole model: its parts are fixed. You asked for model\.connector"):
        resolve_model(config, ["model.hf_name", "model.connector"])


def test_a_run_begins_with_a_checkpoint_or_with_a_model(folders: Callable[[str], Path]):
    folder = folders("qwen2-vl")
    config = compose_config("finetune-llava-onevision", ["dataset.path=x", f"trainer.from_pretrained={folder}"])
    for key in ("model", "model.hf_name"):
        with pytest.raises(ValueError, match=r"trainer\.from_pretrained=.* and model\.hf_name=.*: .* choose one"):
            resolve_model(config, [key])
    assert resolve_model(config)[0].model_type == "qwen2_vl"
    assert config.model.hf_name == str(folder)
