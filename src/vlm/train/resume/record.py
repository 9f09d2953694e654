"""The record of a run: its configuration, data, code, versions and ranks, saved in each checkpoint and in `final`.

`run.json` is this record, with a fingerprint of each part and the progress of the run. For the data, it covers the
content of the record files, but not the images; for a stream, only the names and sizes of the files.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml

import vlm
from vlm.config.named import is_custom_name
from vlm.config.schema import RunConfig
from vlm.config.secrets import mask, mask_settings
from vlm.data.cache import json_digest
from vlm.data.dataset import SampleDataset
from vlm.data.records.open import expand_shards
from vlm.data.records.paths import is_tar_path
from vlm.data.stream import SampleStream
from vlm.train.arguments import deepspeed_config
from vlm.train.run_directory import CONFIG_FILE, VERSIONS_FILE, versions, write_json

RECORD_FILE = "run.json"
"""The file of a checkpoint, and of `final`, with the record of its run."""

Facts = dict[str, Any]
"""JSON values by name; they may be nested."""


@dataclass(frozen=True)
class RunRecord:
    """The record of a run.

    Attributes:
        config: the resolved configuration.
        data: the records by role: numbers of samples and tokens, and a fingerprint of each source.
        code: fingerprints of this package's code and of the user's own modules, and the git revision.
        versions: of Python and the packages, the devices, the number of threads.
        world_size: the number of ranks.
    """

    config: Facts
    data: Facts = field(default_factory=dict)
    code: Facts = field(default_factory=dict)
    versions: Facts = field(default_factory=dict)
    world_size: int = 1

    def fingerprints(self) -> dict[str, str]:
        """Return a digest of each part."""
        parts = {"config": self.config, "data": self.data, "code": self.code, "versions": self.versions}
        return {name: json_digest(part) for name, part in parts.items()}


@dataclass(frozen=True)
class Progress:
    """How far a run had come.

    Attributes:
        step: the number of its last step.
        max_steps: the number of steps after which it ends.
        epoch: the number of epochs, with a fraction.
        epoch_ended: whether the evaluation and the log after an epoch's last step were done. Within an epoch it has no
            meaning.
    """

    step: int
    max_steps: int
    epoch: float
    epoch_ended: bool = True


def make_record(config: RunConfig, world_size: int) -> RunRecord:
    """Return the record of a run, as far as it is known before its data are read.

    Templates and DeepSpeed settings that the configuration names by file are recorded by their content.
    """
    known = versions()
    code = {"vlm": package_digest(), **dict(user_modules(asdict(config)))}
    code |= {name: known.pop(name) for name in ("git", "git_changes")}
    known.pop("world_size")
    known["threads"] = torch.get_num_threads()
    settings = mask_settings(_as_json(asdict(config)))
    settings["trainer"].pop("hub_token")  # `final` is for others to have
    settings["trainer"]["deepspeed"] = deepspeed_config(config.trainer.deepspeed)
    for section in (settings["dataset"], *settings["dataset"]["sources"].values()):
        if (file := Path(section.get("template") or "")).suffix == ".jinja" and file.is_file():
            section["template"] = f"{file.name} {_digest_files([file], file.parent)}"
    return RunRecord(settings, {}, _as_json(code), _as_json(known), world_size)


def with_data(record: RunRecord, records: Mapping[str, SampleDataset | SampleStream]) -> RunRecord:
    """Return the record with the data of each role."""
    return replace(record, data=_as_json({role: _describe_data(dataset) for role, dataset in records.items()}))


def write_record(folder: Path, record: RunRecord, progress: Progress) -> None:
    """Write `run.json` into a checkpoint or `final`."""
    content = {"fingerprints": record.fingerprints(), "progress": asdict(progress), **asdict(record)}
    write_json(folder / RECORD_FILE, content)


def read_record(folder: Path) -> tuple[RunRecord, Progress | None]:
    """Return the record and the progress of the run of a checkpoint or of `final`.

    Checkpoints of earlier versions have no `run.json`: the files of their run directory are used instead, and
    `Progress` is None if it is unknown.

    Raises:
        ValueError: `run.json` does not parse.
    """
    file = folder / RECORD_FILE
    if not file.is_file():
        return _read_run_directory(folder.parent), _read_trainer_state(folder)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        progress = Progress(**content["progress"])
        names = ("config", "data", "code", "versions", "world_size")
        record = RunRecord(**{name: content[name] for name in names})
        return replace(record, config=mask_settings(record.config)), progress  # as `make_record` does it today
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: it is damaged ({type(error).__name__}: {error}); remove {folder}") from error


def _read_run_directory(folder: Path) -> RunRecord:
    """Return the record of a run from the files of its directory; unknown parts are empty."""
    file = folder / CONFIG_FILE
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    try:
        config: Facts = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: it is damaged ({error}); remove it to resume without comparing settings") from error
    known: Facts = {}
    if (folder / VERSIONS_FILE).is_file():
        known = json.loads((folder / VERSIONS_FILE).read_text(encoding="utf-8"))
    code = {name: known.pop(name) for name in ("git", "git_changes") if name in known}
    world_size = known.pop("world_size", 1)
    return RunRecord(mask_settings(config), {}, code, known, world_size)


def _read_trainer_state(checkpoint: Path) -> Progress | None:
    file = checkpoint / "trainer_state.json"
    if not file.is_file():
        return None
    state = json.loads(file.read_text(encoding="utf-8"))
    return Progress(state["global_step"], state["max_steps"], state["epoch"])


def _as_json(facts: Mapping[str, object]) -> Facts:
    """Return values as they are after a round trip through JSON."""
    return json.loads(json.dumps(facts, default=str))


@cache
def package_digest() -> str:
    """Return a digest of the source files of this package."""
    folder = Path(vlm.__file__).parent
    return _digest_files(sorted([*folder.rglob("*.py"), *folder.rglob("*.jinja")]), folder)


def _digest_files(files: list[Path], folder: Path) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(folder)}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:32]


def user_modules(node: object) -> Iterator[tuple[str, str]]:
    """Yield module -> digest of its file, for each `package.module:name` in a configuration."""
    if isinstance(node, Mapping):
        for value in node.values():
            yield from user_modules(value)
    elif isinstance(node, list):
        for value in node:
            yield from user_modules(value)
    elif isinstance(node, str) and is_custom_name(node):
        module = node.partition(":")[0]
        try:
            spec = find_spec(module)
        except (ImportError, ValueError):  # some other text of this form
            return
        if spec is not None and spec.origin is not None and Path(spec.origin).is_file():
            yield module, _digest_files([Path(spec.origin)], Path(spec.origin).parent)


def _describe_data(dataset: SampleDataset | SampleStream) -> Facts:
    if isinstance(dataset, SampleStream):
        return {"sources": {source.name: digest_stream(source.path) for source in dataset.sources}}
    facts = {"samples": len(dataset), "tokens": int(dataset.lengths.sum()), "images": int(dataset.num_images.sum())}
    return {**facts, "sources": {source.source: source.fingerprint for source in dataset.contributions}}


def digest_stream(path: str) -> str:
    """Return a digest of the names and sizes of a stream's files; of the path, if it names no files."""
    if is_tar_path(path) and not path.startswith("pipe:"):
        files = list(map(Path, expand_shards(path, follow_links=True)))
    else:
        files = sorted(Path(path).rglob("*")) if Path(path).is_dir() else [Path(path)]
    known = [(file.name, file.stat().st_size) for file in files if file.is_file()]
    return json_digest(known or mask(path))
