"""The base of an adapter: a checkpoint, or the parts of a composed model, identified by fingerprints.

`base.json` records it. To let a run start from another kind of base, add it to `make_base`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from transformers.utils import cached_file

from vlm.assembly.encoders import encoder_sources
from vlm.assembly.quantization import quantized_parts
from vlm.checks.checkpoint_files import MAX_SHOWN, read_object, shown
from vlm.checks.weights import fingerprint
from vlm.config.derived import BASE_FILE
from vlm.config.model_schema import EncoderConfig, LanguageModelConfig, ModelConfig
from vlm.config.recorded import Recipe, current_key, read_recipe
from vlm.config.schema import PARTS, RunConfig

WHOLE_CHECKPOINT = "checkpoint"
"""The name of the only source of a base that is one checkpoint."""


@dataclass(frozen=True)
class Source:
    """Where weights come from: a folder or a name on the Hub, the commit there, and the `fingerprint` of the files."""

    name: str
    revision: str | None
    fingerprint: str


@dataclass(frozen=True)
class Base:
    """The model that an adapter was trained on.

    `sources` are those of `checkpoint`, or of each part with its own weights; `model` is the `model` section of the run
    if the base was composed of parts.
    """

    sources: dict[str, Source]
    model: Recipe | None = None

    def write(self, folder: Path) -> None:
        """Write `base.json`."""
        (folder / BASE_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def make_base(config: RunConfig) -> Base | None:
    """Return the base of a run's result, or None if the result is a complete model."""
    model, start_checkpoint = config.model, config.trainer.from_pretrained
    if all(getattr(config.trainer.lora, part).r is None for part in PARTS) and not quantized_parts(model):
        return None
    if name := start_checkpoint or model.hf_name:
        return Base({WHOLE_CHECKPOINT: make_source(name, None if start_checkpoint else model.revision)})
    sources = {name: make_source(part.hf_name, part.revision) for name, part in _parts_with_weights(model).items()}
    return Base(sources, without_quantization(asdict(model)))


def without_quantization(recipe: Mapping[str, object]) -> Recipe:
    """Return a `model` section whose parts are stored in full, as adapters are merged into them."""
    return {
        key: {**value, "quantization": None} if isinstance(value, dict) and "quantization" in value else value
        for key, value in recipe.items()
    }


def make_source(name: str, revision: str | None) -> Source:
    """Return a source in its present state; a folder by its full path, so that it can be found from anywhere."""
    if Path(name).is_dir():
        return Source(str(Path(name).resolve()), None, fingerprint(Path(name)))
    config_file = cached_file(name, "config.json", revision=revision)
    assert config_file is not None
    folder = Path(config_file).parent
    return Source(name, folder.name if folder.parent.name == "snapshots" else revision, fingerprint(folder))


def read_base(folder: Path, base_paths: Sequence[str] = ()) -> Base:
    """Return the base of a checkpoint, at its present location.

    Args:
        folder: the checkpoint's folder.
        base_paths: present locations: `PATH` for a base that is one checkpoint, `PART=PATH` for a part.

    Raises:
        ValueError: a source is missing or has changed, or `base_paths` names none of the sources.
    """
    sources, recipe = _read_sources(folder / BASE_FILE)
    for word in base_paths:
        part, equals, path = word.partition("=")
        if not equals or Path(word).exists():
            part, path = WHOLE_CHECKPOINT, word
        if part not in sources:
            needed = "PATH" if WHOLE_CHECKPOINT in sources else " and ".join(f"{name}=PATH" for name in sources)
            names = " and ".join(source.name for source in sources.values())
            raise ValueError(f"--base {word}: {folder} was trained on {names}; give {needed}")
        if not Path(path).is_dir():
            raise ValueError(f"--base {word}: no such folder (seen from {Path.cwd()})")
        sources[part] = replace(sources[part], name=path, revision=None)
    for part, source in sources.items():
        _check_same_weights(folder, part, source)
    return Base(sources, recipe)


def _read_sources(file: Path) -> tuple[dict[str, Source], Recipe | None]:
    """Return the sources that a `base.json` names, and the recipe of a base of parts.

    Raises:
        ValueError: `Base.write` did not write it.
    """
    content = read_object(file)
    sources, recipe = content.get("sources"), content.get("model")
    if not isinstance(sources, dict) or not sources or not isinstance(recipe, dict | None):
        raise ValueError(
            f"{file} does not say what the adapter was trained on: sources (an object) and model are needed"
        )
    named = {}
    for part, values in sources.items():
        if not isinstance(values, dict) or set(values) != {field.name for field in fields(Source)}:
            raise ValueError(f"{file}: sources.{shown(part)} needs name, revision and fingerprint, and no more")
        is_text = [isinstance(values[key], str) for key in ("name", "fingerprint")]
        if not all(is_text) or not values["name"] or not isinstance(values["revision"], str | None):
            raise ValueError(f"{file}: sources.{shown(part)}: name, revision and fingerprint are texts")
        named[current_key(f"model.{part}").removeprefix("model.")] = Source(**values)
    if recipe is None and set(named) != {WHOLE_CHECKPOINT}:
        raise ValueError(f"{file}: sources.{WHOLE_CHECKPOINT} alone is allowed where model is null")
    if recipe is not None:
        try:
            parts = set(_parts_with_weights(read_recipe(recipe)))
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"{file}: model is no section `model` of a run: {str(error)[:MAX_SHOWN]}") from error
        if set(named) != parts:
            raise ValueError(
                f"{file}: sources names {', '.join(map(shown, named))}; {', '.join(sorted(parts))} are needed"
            )
    return named, recipe


def _check_same_weights(folder: Path, part: str, source: Source) -> None:
    """Raise ValueError if a source that is a folder is missing or has other weights."""
    option = "--base " + ("PATH" if part == WHOLE_CHECKPOINT else f"{part}=PATH")
    if not Path(source.name).is_dir():
        if source.revision is None:  # a folder then: commits of names on the Hub are known
            raise ValueError(
                f"{folder} is an adapter on {source.name}, which is not on this machine, or has moved. "
                f"Give its new path, to vlm generate or vlm merge-lora: {option}"
            )
        return  # a commit does not change
    actual = fingerprint(Path(source.name))
    if actual != source.fingerprint:
        raise ValueError(
            f"{source.name} is not what {folder} was trained on: its weights differ (fingerprint {actual}, needed is "
            f"{source.fingerprint}). Give the right one: {option}"
        )


def base_recipe(base: Base, *, trust_remote_code: bool) -> ModelConfig:
    """Return the `model` section from which a base is composed; code runs only if recipe and caller both trust it."""
    assert base.model is not None
    model = read_recipe(base.model)
    for name, part in _parts_with_weights(model).items():
        part.hf_name, part.revision = base.sources[name].name, base.sources[name].revision
        part.trust_remote_code = part.trust_remote_code and trust_remote_code
    return model


def _parts_with_weights(model: ModelConfig) -> dict[str, EncoderConfig | LanguageModelConfig]:
    """Return the parts with weights of their own, by their keys in `model`; each of several visual encoders."""
    return {**encoder_sources(model.visual_encoder), "language_model": model.language_model}
