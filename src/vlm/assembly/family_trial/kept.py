"""Verdicts that are kept in the cache, so that a run that is repeated starts at once, and what they refuse."""

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedConfig

from vlm.assembly.family_trial.table import OPTIONAL, try_family
from vlm.assembly.family_trial.verdicts import State, Verdict, Verdicts
from vlm.data.cache import create_once, json_digest
from vlm.data.encoding.sample_encoder import processor_digest
from vlm.families.processing import FamilyProcessor

LIBRARIES = ("transformers", "torch", "safetensors")
"""What a trial calls, besides what the digest of the processor names."""
CODE = (
    "assembly/family_trial/*.py",
    "assembly/small_models/*.py",
    "assembly/*.py",
    "families/*.py",
    "data/batching/*.py",
)
"""The files of this package that verdicts depend on, besides those that the digest of the processor names."""
LOCATION_KEYS = ("_name_or_path", "name_or_path")
"""Keys of configurations that say where they came from."""


def recall_or_try(
    config: PreTrainedConfig,
    processor: FamilyProcessor,
    cache: Path,
    *,
    trust_remote_code: bool = False,
    attention: str | None = None,
) -> tuple[dict[str, Verdict], bool]:
    """Return the verdicts of a family's trial, and whether they were known from an earlier one.

    Kept are those of trials whose proofs could all be made: what prevented one may be gone the next time.

    Args:
        config: the model's configuration.
        processor: the model's processor.
        cache: the folder of the cache.
        trust_remote_code: whether code of the checkpoint's repository may run.
        attention: attention implementation; None: as transformers chooses.
    """
    file = cache / "family_trials" / f"{digest_trial(config, processor, attention)}.json"
    if file.is_file():
        kept = json.loads(file.read_text(encoding="utf-8"))
        return {name: Verdict.parse(text) for name, text in kept.items()}, True
    verdicts = try_family(config, processor, trust_remote_code=trust_remote_code, attention=attention)
    if all(verdict.state is not State.NOT_MADE for verdict in verdicts.values()):
        text = json.dumps({name: str(verdict) for name, verdict in verdicts.items()}, indent=1)

        def write(partial: Path) -> None:
            """Write the verdicts."""
            partial.write_text(text, encoding="utf-8")

        create_once(file, write)
    return verdicts, False


def digest_trial(config: PreTrainedConfig, processor: FamilyProcessor, attention: str | None = None) -> str:
    """Return a digest of all that a trial depends on: configuration, processor, libraries and this package's code."""
    package = Path(__file__).parents[2]
    code = hashlib.sha256()
    for file in (file for pattern in CODE for file in sorted(package.glob(pattern))):
        code.update(file.read_bytes())
    versions = [importlib.metadata.version(name) for name in LIBRARIES]
    settings = _without_location(json.loads(config.to_json_string(use_diff=False)))
    return json_digest(settings, processor_digest(processor), attention, versions, code.hexdigest())


def _without_location(value: object) -> object:
    """Return nested values without the keys that say where a configuration came from."""
    if isinstance(value, Mapping):
        return {key: _without_location(inner) for key, inner in value.items() if key not in LOCATION_KEYS}
    return [_without_location(inner) for inner in value] if isinstance(value, list) else value


def check_verdicts(verdicts: Verdicts, label: str, *, unproved: bool, packing: Sequence[str] = ()) -> None:
    """Refuse a run whose family failed a proof, or for which one could not be made.

    Args:
        verdicts: those of the trial.
        label: the key and the name of the model, and its type.
        unproved: whether proofs that could not be made are done without (`model.unproved`).
        packing: the proofs that a run needs because it packs rows (`trainer.packing`); other runs do not. That of
            videos is left to `check_video_verdict`, once the records are known.

    Raises:
        ValueError: which proof failed, or could not be made, and what to do.
    """
    needed = {name: verdict for name, verdict in verdicts.items() if name not in OPTIONAL}
    needed |= {name: verdicts[name] for name in packing}
    failed = {name: verdict.reason for name, verdict in needed.items() if verdict.state is State.FAILED}
    if failed and failed.keys() <= {*OPTIONAL}:
        raise ValueError(
            f"{label}: {_list_reasons(failed)}. trainer.packing=false pads batches instead, and "
            "trainer.train_sampling_strategy=group_by_modality_blocks pads them least"
        )
    if failed:
        raise ValueError(
            f"{label} failed its trial on a small model of the same configuration, so it would train wrongly: "
            f"{_list_reasons(failed)}. `vlm models --check` repeats the trial; choose another checkpoint, another "
            "version of transformers, or fix the processor's template or settings"
        )
    missing = {name: verdict.reason for name, verdict in needed.items() if verdict.state is State.NOT_MADE}
    if missing and not unproved:
        raise ValueError(
            f"{label}: not everything that training relies on could be proved on a small model of the same "
            f"configuration: {_list_reasons(missing)}. Check the supervised tokens with `vlm data show`, and set "
            "model.unproved=true to train without these proofs"
        )


def check_video_verdict(verdicts: Verdicts, label: str, records: str, *, unproved: bool) -> None:
    """Refuse a run whose records have videos where those are not proved.

    Args:
        verdicts: those of the trial.
        label: the key and the name of the model, and its type.
        records: what may have videos, as a subject with its verb.
        unproved: whether a proof that could not be made is done without (`model.unproved`).

    Raises:
        ValueError: what was found of videos, and what to do.
    """
    verdict = verdicts.get("videos", Verdict(State.PROVED))
    if verdict.state is State.PROVED or (unproved and verdict.state is State.NOT_MADE):
        return
    go_on = "; model.unproved=true trains without the proof" if verdict.state is State.NOT_MADE else ""
    raise ValueError(
        f"{label}: {records}, but videos could not be proved on a small model of the same configuration: {verdict}. "
        f"Give their frames as images, which are proved: a list under `images` instead of `videos`{go_on}"
    )


def _list_reasons(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{name} ({reason})" for name, reason in reasons.items())
