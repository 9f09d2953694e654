"""What Hydra and OmegaConf refuse, said in the user's terms."""

from pathlib import Path

import pytest

from tests.command_line import refusal
from vlm.config.packaged import run_names

DATA = "dataset.path=records.json"
UNFREEZE = "train_vision_model, train_connector, train_language_model"
MLP = "num_layers, activation, hidden_dim, bias, input_norm"
REFUSALS = {
    "trainer.num_train_epoch=2": "trainer.num_train_epoch: no such key. Did you mean trainer.num_train_epochs?",
    "trainer.warmup_ratio=0.03": "trainer.warmup_ratio: no such key. Did you mean trainer.warmup_steps?",
    "trainer.nothing_like_it=1": "trainer.nothing_like_it: no such key. vlm -cn RUN --cfg job shows all.",
    "+trainer.adam_beta3=1": "trainer.adam_beta3: no such key. Did you mean trainer.adam_beta2?",
    "++trainer.unfreeze.train_vision=1": "trainer.unfreeze.train_vision: no such key. Did you mean "
    f"trainer.unfreeze.train_vision_model? Allowed are {UNFREEZE}.",
    "+stage=1": "stage: no such key. Did you mean trainer.objective? Allowed are generation, distillation, ",
    "+phase=1": "phase: no such key. Allowed are model, trainer, dataset, inference.",
    "trainr.max_steps=1": "trainr: no such key. Did you mean trainer? Allowed are model, trainer, dataset, inference.",
    "model.connector.options.num_layer=2": "model.connector.options.num_layer: no such key. Did you mean "
    f"model.connector.options.num_layers? Allowed are {MLP}. An option of a connector class of your own: "
    "+model.connector.options.num_layer=…",
    "model/connector=mlq": "model/connector=mlq: no such choice. Did you mean mlp? Allowed are c_abstractor, ",
    "model/conector=mlp": "model/conector: no such group. Did you mean model/connector? Allowed are model, ",
    "model.head.extra_heads.quality.poling=mean": "model.head.extra_heads.quality.poling: no such key. Did you mean "
    "model.head.extra_heads.quality.pooling?",
    "model.head.beside.price.task=regression": "model.head.beside: it is called model.head.extra_heads now",
    "++model.head.beside.price.task=regression": "model.head.beside: it is called model.head.extra_heads now",
    "model.visual_encoder.beside=[{hf_name: a}]": "model.visual_encoder.beside: it is called "
    "model.visual_encoder.extra_encoders now",
    "model.visual_encoder.beside.0.hf_name=a": "model.visual_encoder.beside: it is called "
    "model.visual_encoder.extra_encoders now",
    "trainer.num_train_epochs=two": "trainer.num_train_epochs=two: a number is needed",
    "dataset.max_length=1.5": "dataset.max_length=1.5: a whole number is needed",
    "trainer.unfreeze.train_connector=maybe": "trainer.unfreeze.train_connector=maybe: true or false is needed",
    "model.language_model.hf_name=null": "model.language_model.hf_name=null: a value is needed",
    "trainer.unfreeze=all": f"trainer.unfreeze: it is a section; set one of its keys ({UNFREEZE}). "
    "A packaged choice of it is trainer/unfreeze=NAME: all, connector, connector-language-model, head, language-model.",
    "trainer.learning_rate=1e-3": "trainer.learning_rate: it is a section, with a rate for each part; of "
    "pretrain-smol's parts that train: trainer.learning_rate.connector_learning_rate=1e-3",
    "trainer=fast": "trainer: it is a section; set one of its keys (objective, output_dir, ",
    "~trainer.adam_beta2": "~trainer.adam_beta2: a key cannot be removed; give it another value",
    "trainer.output_dir=${nothing}": "trainer.output_dir: Interpolation key 'nothing' not found",
    "trainer.max_steps": "trainer.max_steps: key=value is needed; vlm --help has examples",
    "mine/train.json": "mine/train.json: key=value is needed: dataset.path=mine/train.json",
    "dataset.image_folder=~/images": "dataset.image_folder=~/images: ~ is not expanded here; write "
    "dataset.image_folder=$HOME/images",
    "dataset.image_folder=a=b": "dataset.image_folder=a=b: some of its characters have a special meaning; quote the "
    "value: 'dataset.image_folder=\"a=b\"'",
    "dataset.image_folder=a,b": "dataset.image_folder=a,b: one value is needed, not several; a list is "
    "'dataset.image_folder=[a,b]', a text is quoted: 'dataset.image_folder=\"a,b\"'",
    "trainer.seed=choice(1,2)": "trainer.seed=choice(1,2): one value is needed, not several",
    "model/head=binary,ordinal": "model/head=binary,ordinal: one choice is needed, not several",
    "trainer=-inf": "trainer=-inf: it is a section; set one of its keys (objective, output_dir, ",
    "model=5": "model=5: it is a section; set one of its keys (hf_name, ",
    "+trainer=[1]": "+trainer=[1]: it is a section; set one of its keys (objective, output_dir, ",
    "dataset=null": "dataset=null: a value is needed",
    "dataset=${model}": "dataset: it is a section; set one of its keys (path, format, ",
    "trainer.lora=${trainer.unfreeze}": "trainer.lora: it is a section; set one of its keys (visual_encoder, ",
    "~trainer": "trainer: it is a section; set one of its keys (objective, output_dir, ",
    "=1": "=1: key=value is needed; vlm --help has examples",
    "=": "=: key=value is needed; vlm --help has examples",
    "model/head@model.connector=binary": "model/head@model.connector: groups cannot be moved; choose with ",
    "model.visual_encoder.extra_encoders.x=1": "model.visual_encoder.extra_encoders.x=1: the configuration cannot be ",
    f"trainer.deepspeed={'[' * 500}{']' * 500}": "trainer.deepspeed=[[[[[",
    f"dataset.image_folder={'A' * 33_000}": "dataset.path=records.json: no such file",
    f"dataset.path={'A' * 33_000}": f"dataset.path={'A' * 67}…[33,014 characters]…{'A' * 29}: File name too long",
    f"dataset.{'A' * 33_000}=1": f"dataset.{'A' * 72}…[33,011 characters]…",
    'trainer.run_name="a\0b"': "trainer.run_name='a\\x00b': a text without zero bytes and bytes that are not UTF-8",
    'trainer.run_name="\ud83d"': "trainer.run_name='\\ud83d': a text without zero bytes and bytes that are not UTF-8",
}
"""Override -> how the message begins."""

RUNS = {
    "defaults: [pretrain-smol, _self_]\ntrainer: {num_epochs: 7}": "trainer.num_epochs: no such key. Did you mean "
    "trainer.num_train_epochs?",
    "defaults: [pretrain-smol, _self_]\ntrainer: {max_steps: many}": "trainer.max_steps=many: a whole number is needed",
    "defaults: [pretrain-smol, override model/connector: deep, _self_]": "model/connector=deep: no such choice.",
    "defaults: [pretrain-smol, _self_]\nmodel: {visual_encoder: {beside: []}}": "model.visual_encoder.beside: it is "
    "called model.visual_encoder.extra_encoders now",
    "defaults: [head-binary, _self_]\nmodel: {head: {beside: {price: {task: regression}}}}": "model.head.beside: "
    "it is called model.head.extra_heads now",
    "trainer: {max_steps: 7}": "the run's YAML has no base: begin it with `defaults: [base, _self_]`",
    "defaults:\n  - base\n - _self_": "not YAML: ",
}
"""A run's YAML -> how the message begins."""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra leaves files behind for a YAML that does not build on ours."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("override", "message"), REFUSALS.items(), ids=REFUSALS)
def test_an_override_is_refused_in_the_users_terms(override: str, message: str):
    assert refusal("-cn", "pretrain-smol", DATA, override).startswith(f"vlm: {message}")


@pytest.mark.parametrize(("yaml", "message"), RUNS.items())
def test_a_yaml_of_the_users_own_is_refused_alike(tmp_path: Path, yaml: str, message: str):
    (tmp_path / "mine.yaml").write_text(yaml)
    said = refusal("--config-dir", str(tmp_path), "-cn", "mine")
    assert said.startswith(f"vlm: {message}")


def test_a_refusal_leaves_nothing_behind(tmp_path: Path):
    refusal("-cn", "pretrain-smol", DATA)
    assert list(tmp_path.iterdir()) == []


def test_a_mistyped_run_is_refused_with_the_nearest():
    said = refusal("-cn", "pretrain-smool")
    assert said.startswith("vlm: -cn pretrain-smool: no such run. Did you mean pretrain-smol? vlm --help lists all. A ")


def test_choosing_no_run_lists_them():
    said = refusal(DATA)
    assert said == refusal("-cn", "base")
    assert said.startswith("vlm: choose a run: -cn RUN, or ")
    assert max(map(len, said.splitlines())) <= 100
    assert all(name in said for name in run_names())


def test_a_missing_value_is_named():
    assert (
        refusal("-cn", "pretrain-smol")
        == "vlm: dataset.path: a value is needed: the file of your records, such as train.json (docs/data.md)"
    )


def test_quoting_as_the_message_says_works():
    assert refusal("-cn", "pretrain-smol", 'dataset.path="a=b"').startswith("vlm: dataset.path=a=b: no such file")
