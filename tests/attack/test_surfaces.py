"""Code that runs unasked: none. Every surface but the command line, with every key that can run code, by the schema.

A module in the working directory leaves a mark when it is imported or called; no attack may leave one. The short form
takes one spelling and one way to open a checkpoint; `make attack` takes all.
"""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures import compose_config
from tests.tiny_parts import Parts
from vlm.checks.fields import ConfigError
from vlm.checks.surface import check_surface
from vlm.cli.main import main
from vlm.config.dataset_schema import MixtureSourceConfig
from vlm.config.model_schema import EncoderConfig, HeadConfig
from vlm.config.rules import get_reach
from vlm.config.schema import RunConfig
from vlm.data.records.open import stream_records
from vlm.web.plan import Plan

CANARY = """
from pathlib import Path
Path({mark!r}).write_text("imported")
def run(*args, **kwargs):
    Path({mark!r}).write_text("called")
class Thing:
    def __new__(cls, *args, **kwargs):
        run()
"""
NAME = "canary_of_attacks:run"


@dataclass(frozen=True)
class Trap:
    """A folder that a stranger filled, which is the working directory, and the mark that code of theirs would leave."""

    folder: Path
    mark: Path

    @property
    def code(self) -> str:
        return CANARY.format(mark=str(self.mark))

    def check(self, attack: str) -> None:
        assert not self.mark.exists(), f"{attack}: code ran ({self.mark.read_text()})"


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trap]:
    """The trap is set, and works: whoever imports it leaves the mark."""
    found = Trap(tmp_path, tmp_path / "the mark")
    (tmp_path / "canary_of_attacks.py").write_text(found.code)
    (tmp_path / "records.json").write_text('[{"id": 1, "conversations": []}]')
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield found
    sys.modules.pop("canary_of_attacks", None)


def test_the_trap_works(trap: Trap):
    import canary_of_attacks  # noqa: F401 # pyright: ignore[reportMissingImports] - written by the fixture

    with pytest.raises(AssertionError, match="code ran"):
        trap.check("an import")


# Keys


def marked_keys(node: Any, path: str = "") -> Iterator[tuple[str, object]]:
    """Dotted key and default of every key of the schema whose values can run code."""
    for field in fields(node):
        key, value, reach = f"{path}{field.name}", getattr(node, field.name), get_reach(field)
        if reach is not None and reach.runs_code:
            yield key, value
        if is_dataclass(value):
            yield from marked_keys(value, f"{key}.")


def every_key() -> dict[str, object]:
    """The keys, also those within the lists and mappings that a user may fill."""
    inner = [
        *((f"model.head.extra_heads.other.{key}", value) for key, value in marked_keys(HeadConfig())),
        *((f"model.visual_encoder.extra_encoders.{key}", value) for key, value in marked_keys(EncoderConfig("a/b"))),
        *((f"dataset.sources.one.{key}", value) for key, value in marked_keys(MixtureSourceConfig())),
    ]
    return {**dict(marked_keys(RunConfig())), **dict(inner)}


KEYS = every_key()


def nested(key: str, value: str) -> str:
    """An override of the section that a key is in: `a.b.c=v` -> `a={b: {c: v}}`."""
    first, *names = key.split(".")
    if "extra_encoders" in names:
        names = [*names[:-1], "0", names[-1]]
    text = value
    for name in reversed(names):
        text = f"[{text.replace('{', '{hf_name: a/b, ')}]" if name == "0" else f"{{{name}: {text}}}"
    return f"{first}={text}"


def spellings(key: str, default: object) -> list[str]:
    """Overrides that give a key a value that runs code."""
    if isinstance(default, bool):
        values = ["true", "True", "yes", "on", "1", "bool(1)"]
    elif isinstance(default, list):
        values = [f"['{NAME}']", f"[{NAME.replace(':', chr(92) + ':')}]"]
    else:
        values = [f"'{NAME}'", f'"{NAME}"', NAME, NAME.replace(":", "\\:"), f"str('{NAME}')", "canary_of_attacks"]
    plain = key.replace("extra_encoders.", "extra_encoders.0.")
    words = [f"{plus}{plain}={value}" for value in values for plus in ("", "+", "++")]
    return [nested(key, values[0]), *words]


def attack_page(word: str, run: str) -> None:
    """Check, start and look through data with an override."""
    from vlm.web.plan import make_command

    plan = Plan(run, {}, {"dataset.path": "records.json"}, word)
    with pytest.raises(ConfigError) as refused:
        plan.compose_config()
    assert len(str(refused.value).splitlines()) <= 3
    make_command(plan, Path("outputs/run"))  # words alone: nothing runs before the check


def test_the_page_runs_no_key(trap: Trap):
    assert {"dataset.format", "model.head.type", "trainer.optim", "dataset.allow_pipe"} <= KEYS.keys()
    for number, (key, default) in enumerate(KEYS.items()):
        word = spellings(key, default)[0 if "extra_encoders" in key else 1]
        with pytest.raises(ConfigError, match="on the command line only"):
            check_surface(compose_config("finetune-smol", ["dataset.path=records.json", word]))
        if number % 6 == 0:
            attack_page(word, "finetune-smol")
        trap.check(word)


@pytest.mark.attack
@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("run", ["finetune-smol", "head-binary"])
def test_the_page_runs_no_spelling_of_a_key(trap: Trap, key: str, run: str):
    for word in spellings(key, KEYS[key]):
        attack_page(word, run)
        trap.check(word)


@pytest.mark.attack
@pytest.mark.parametrize("key", KEYS)
def test_the_data_tab_runs_no_key(trap: Trap, key: str):
    data = pytest.importorskip("vlm.web.data", reason="the page needs Gradio")
    for word in spellings(key, KEYS[key])[:3]:
        shown = data.open_first("finetune-smol", "records.json", "", None, "", None, word)
        assert "vlm-problem" in shown[3]
        trap.check(word)


@pytest.mark.attack
def test_the_fields_of_the_page_run_nothing(trap: Trap):
    """Fields that are no overrides: a run, parts, a path, a folder, a template and a checkpoint."""
    values = [NAME, f"x {NAME}", "pipe:touch mark", "${oc.env:HOME}", "a\nmodel.connector.type=os:system", "zip://a::b"]
    for value in values:
        for plan in (
            Plan(value), Plan("finetune-smol", {"connector": value}), Plan("finetune-smol", {"head": value}),
            Plan("finetune-smol", {}, {"dataset.path": value}),
            Plan("finetune-smol", {}, {"dataset.path": "records.json", "dataset.template": value}),
            Plan("finetune-smol", {}, {"dataset.path": "records.json", "trainer.from_pretrained": value}),
        ):  # fmt: skip
            with suppress(ConfigError):  # some are names that the Hub will not have
                plan.compose_config()
            trap.check(value)
            assert not (trap.folder / "mark").exists()


def test_the_commands_of_the_page_run_nothing(trap: Trap):
    """Every field of an evaluation and an export: names of code, options, addresses and other folders."""
    from vlm.web.commands import EXPORT_DESCRIPTIONS, METRICS, RECORD_FORMATS, Evaluation, Export, Place

    place = Place(Path("outputs"))
    hostile = [NAME, "--trust-remote-code", "-h", "pipe:touch mark", "http://127.0.0.1:9/a.json", "zip://a::b",
               "../elsewhere", "/etc", "x; touch mark", "$(touch mark)", "a\n--format=x",
               f"--format={NAME}"]  # fmt: skip
    for value in hostile:
        fields = [
            Evaluation(value, "records.json", metrics=["loss"]), Evaluation("a/b", value, metrics=["loss"]),
            Evaluation("a/b", "records.json", value, ["loss"]), Evaluation("a/b", "records.json", metrics=[value]),
            Evaluation("a/b", "records.json", metrics=["loss"], format=value),
            Export(value, "llava"), Export("a/b", value), Export("a/b", "llava", value),
            Export("a/b", "gguf", dtype=value), Export("a/b", "llava-original", vision_tower=value),
        ]  # fmt: skip
        for given in fields:
            with suppress(ConfigError):
                task, command = given.make(place)
                assert Path(task.result).resolve().is_relative_to(Path("outputs").resolve())
                assert "--trust-remote-code" not in command
                named = [word.partition("=")[0] for word in command[4:] if word.startswith("-")]
                assert set(named) <= {"--data", "--image-folder", "--metrics", "--format", "--batch-size", "--output",
                                      "--max-new-tokens", "--vision-tower", "--dtype"}, command  # fmt: skip
                taken = {word.partition("=")[2] for word in command if word.startswith(("--metrics", "--format"))}
                assert taken <= {*METRICS, *RECORD_FORMATS, *EXPORT_DESCRIPTIONS}
        trap.check(value)
        assert not (trap.folder / "mark").exists()


@pytest.mark.parametrize(
    "word",
    [
        "hydra.callbacks.x._target_=canary_of_attacks.run",
        "++hydra.run.dir=/tmp/x",
        "hydra/launcher=basic",
        "+hydra.searchpath=[file:///tmp]",
        "+model/head@hydra.callbacks.x=binary",
        "model/head@_global_=binary",
        "+dataset.options={_target_: canary_of_attacks.run}",
        "model/connector@model.head:mlp=mlp",
    ],
)
def test_the_page_does_not_reach_hydra(trap: Trap, word: str):
    try:
        config = Plan("finetune-smol", {}, {"dataset.path": "records.json"}, word).compose_config()
    except ConfigError:
        config = None
    assert config is None
    trap.check(word)


# Folders of data


HOSTILE_NAMES = ["pipe:touch mark;.tar", "pipe:touch mark #{a..b}.tar", "a::pipe:touch mark.tar", "http:x.tar"]


def test_a_name_in_a_folder_of_shards_is_a_file(trap: Trap):
    for path in (".", str(trap.folder)):
        for name in HOSTILE_NAMES:
            (trap.folder / name).write_bytes(b"no tar")
        records = list(stream_records(path, trap.folder / "cache"))
        assert len(records) == len(HOSTILE_NAMES)
        assert all(" stopped: " in str(record) for record in records)
    assert not (trap.folder / "mark").exists()


@pytest.mark.parametrize(
    "path", ["pipe:touch mark", "http://127.0.0.1:9/a.tar::pipe:touch mark;.tar", "{pipe,a}:touch mark.tar",
             "pipe:touch {mark,b}", "x::pipe:touch mark.tar", "file://a::pipe:touch mark.tar"],
)  # fmt: skip
def test_a_path_is_no_command_unless_that_is_allowed(trap: Trap, path: str):
    with pytest.raises(
        ValueError, match=r"a shell command|would run this|there is no file|the only web addresses|is needed"
    ):
        list(stream_records(path, trap.folder / "cache"))
    assert not (trap.folder / "mark").exists()


# Checkpoints


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text()) if file.is_file() else {}
    change(content)
    file.write_text(json.dumps(content))


def named_everywhere(folder: Path, trap: Trap) -> None:
    """Every field of the configuration that can be a name is one."""

    def change(config: dict[str, Any]) -> None:
        body = config.get("body_config", config)
        body["connector"]["type"] = NAME
        for recipe in (config.get("recipe"), body.get("recipe")):
            if recipe:
                recipe["connector"]["type"] = NAME
                recipe["head"] |= {"type": NAME, "task": "binary"}
        for head in config.get("heads", []):
            head |= {"type": NAME, "loss": NAME, "pooling": NAME}

    edit(folder / "config.json", change)


def name_type_alone(folder: Path, trap: Trap) -> None:
    """The model's own settings name a class, and the recipe that a run is held against does not."""

    def change(config: dict[str, Any]) -> None:
        config.get("body_config", config)["connector"]["type"] = NAME
        for head in config.get("heads", []):
            head["type"] = NAME

    edit(folder / "config.json", change)


def add_remote_code(folder: Path, trap: Trap) -> None:
    """Every file names classes of a file that travels with the checkpoint, and of one that does not."""
    classes = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoModelForSequenceClassification",
               "AutoModelForCausalLM", "AutoTokenizer", "AutoProcessor", "AutoImageProcessor", "Connector",
               "Head.label")  # fmt: skip
    (folder / "evil.py").write_text(trap.code)
    (folder / "custom_generate").mkdir(exist_ok=True)
    (folder / "custom_generate" / "generate.py").write_text(trap.code)
    for file in folder.glob("*.json"):
        if "index" not in file.name and file.name != "tokenizer.json":
            edit(file, lambda content: content.update(auto_map=dict.fromkeys(classes, "evil.Thing")))
    edit(folder / "generation_config.json", lambda content: content.update(custom_generate=str(folder)))
    for name in ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            edit(folder / name, lambda content: content.update(tokenizer_class="Thing", image_processor_type="Thing"))


def unknown_type(folder: Path, trap: Trap) -> None:
    """A kind of model that only the checkpoint's own code knows."""
    add_remote_code(folder, trap)
    edit(folder / "config.json", lambda config: config.update(model_type="evil"))


def unknown_part(folder: Path, trap: Trap) -> None:
    """A part of a kind that only the checkpoint's own code knows."""
    add_remote_code(folder, trap)

    def change(config: dict[str, Any]) -> None:
        config = config.get("body_config", config)
        config["text_config"] |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Thing"}}

    edit(folder / "config.json", change)


def name_kernel(key: str, part: str | None) -> Callable[[Path, Trap], None]:
    def spoil(folder: Path, trap: Trap) -> None:
        def change(config: dict[str, Any]) -> None:
            config = config.get("body_config", config)
            (config if part is None else config[part])[key] = "evil/kernel"

        edit(folder / "config.json", change)

    return spoil


def put_pickle(folder: Path, trap: Trap) -> None:
    """The weights are a pickle that calls a function."""
    import pickle

    class Bomb:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return eval, (f"open({str(trap.mark)!r}, 'w').write('unpickled')",)

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Bomb()}))


def say_trusted(folder: Path, trap: Trap) -> None:
    """A base that says of itself that its code may run."""
    base = folder / "base"
    base.mkdir()
    add_remote_code(base, trap)
    edit(base / "config.json", lambda config: config.update(model_type="evil"))
    config = json.loads((folder / "config.json").read_text())
    recipe = json.loads(json.dumps(config.get("body_config", config)["recipe"]))
    for part in ("visual_encoder", "language_model"):
        recipe[part] |= {"trust_remote_code": True, "hf_name": str(base)}
    source = {"name": str(base), "revision": "0" * 40, "fingerprint": ""}
    sources = dict.fromkeys(("visual_encoder", "language_model"), source)
    (folder / "base.json").write_text(json.dumps({"sources": sources, "model": recipe}))


SPOILS: dict[str, Callable[[Path, Trap], None]] = {
    "names everywhere": named_everywhere,
    "names in the settings alone": name_type_alone,
    "remote code": add_remote_code,
    "an unknown type": unknown_type,
    "an unknown part": unknown_part,
    "a kernel": name_kernel("_attn_implementation", None),
    "a kernel of the text": name_kernel("attn_implementation", "text_config"),
    "a kernel of the encoder": name_kernel("_attn_implementation", "vision_config"),
    "a kernel of experts": name_kernel("experts_implementation", "text_config"),
    "a pickle": put_pickle,
    "a trusted base": say_trusted,
}


@pytest.fixture(scope="module")
def honest(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint that writes and one with a head, as nobody has touched them."""
    from vlm import VLMForPrediction, VLMPredictionConfig

    root = tmp_path_factory.mktemp("honest")
    model, processor = parts.model("clip", "llama", template="chatml")
    head = {"name": "label", "task": "binary", "labels": ["no", "yes"], "loss": "bce", "pooling": "last"}
    recipe = {**model.config.recipe, "head": {**model.config.recipe["head"], "task": "binary", "labels": ["no", "yes"]}}
    config = VLMPredictionConfig(model.config, heads=[head], media_token_ids=[processor.image_token_id], recipe=recipe)
    for name, saved in {"writes": model.eval(), "predicts": VLMForPrediction(config, model).eval()}.items():
        saved.save_pretrained(root / name)
        processor.save_pretrained(root / name)
    return {name: root / name for name in ("writes", "predicts")}


def resume_from(folder: Path) -> None:
    """What a run does that starts from a checkpoint."""
    import torch

    from vlm.assembly.resolve import load_weights, resolve_model

    config = RunConfig()
    config.model.head.task = "binary" if "predicts" in folder.name else None
    config.trainer.from_pretrained = str(folder)
    resolved, processor = resolve_model(config)
    load_weights(config, resolved, processor, torch.float32, 0)


def show_on_page(folder: Path) -> None:
    """What the page does with a checkpoint that a visitor types, started with --trust-remote-code for another one."""
    from vlm.inference.generate import VisionLanguageModel
    from vlm.inference.predict import Predictor
    from vlm.web.models import ModelHolder

    holder = ModelHolder([], ["another checkpoint"])
    holder.load(Predictor if "predicts" in folder.name else VisionLanguageModel, str(folder))


OPENERS: dict[str, Callable[[Path], object]] = {
    "from_pretrained": resume_from,
    "page": show_on_page,
    "generate": lambda folder: main(["generate", str(folder), "--prompt", "x", "--max-new-tokens", "1"]),
    "predict": lambda folder: main(["predict", str(folder), "--prompt", "x"]),
    "merge": lambda folder: main(["merge-lora", str(folder), str(folder.with_suffix(".merged"))]),
    "export": lambda folder: main(["export", str(folder), str(folder.with_suffix(".out")), "--format", "llava"]),
    "import": lambda folder: main(["import", str(folder), str(folder.with_suffix(".in"))]),
    "eval": lambda folder: main(["eval", str(folder), "--data", "records.json", "--metrics", "loss"]),
}


def attack_checkpoint(trap: Trap, honest: Path, spoil: str, opener: str) -> None:
    folder = trap.folder / f"{honest.name} {opener}"
    shutil.copytree(honest, folder)
    SPOILS[spoil](folder, trap)
    with suppress(SystemExit, Exception):
        OPENERS[opener](folder)  # what it says is another matter; here it may not run
    trap.check(f"{opener} of {honest.name} with {spoil}")


@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("kind", ["writes", "predicts"])
def test_a_checkpoint_runs_nothing_in_a_run_that_starts_from_it(
    trap: Trap, honest: dict[str, Path], spoil: str, kind: str
):
    attack_checkpoint(trap, honest[kind], spoil, "from_pretrained")


@pytest.mark.attack
@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("kind", ["writes", "predicts"])
def test_a_checkpoint_runs_nothing_wherever_it_is_opened(
    trap: Trap, honest: dict[str, Path], spoil: str, kind: str, opener: str
):
    attack_checkpoint(trap, honest[kind], spoil, opener)


@pytest.mark.parametrize(
    ("kind", "opener"),
    [("writes", "from_pretrained"), ("predicts", "from_pretrained"), ("writes", "page"), ("predicts", "page"),
     ("writes", "generate"), ("predicts", "predict"), ("writes", "export")],
)  # fmt: skip
def test_a_checkpoint_that_nobody_touched_opens(
    trap: Trap, honest: dict[str, Path], kind: str, opener: str, monkeypatch: pytest.MonkeyPatch
):
    """So that the attacks are told from a command that does not work at all."""
    folder = trap.folder / kind
    shutil.copytree(honest[kind], folder)
    monkeypatch.setattr(sys, "argv", ["vlm"])
    OPENERS[opener](folder)
