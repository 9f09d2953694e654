"""The forms of a checkpoint that engines load, made in a scratch folder where the user names none."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from vlm.assembly.family import read_config
from vlm.assembly.model_kinds import is_composed_config
from vlm.hub.exporting import export_checkpoint
from vlm.hub.folders import read_json
from vlm.hub.publishing import get_custom_classes, prepare_upload
from vlm.hub.run_facts import RunSummary
from vlm.hub.shards import read_meta_tensors, weight_files
from vlm.inference.verify.engines import Request


def published_form(request: Request) -> tuple[Path, bool]:
    """Return the folder that plain transformers loads, and whether it brings code of its own.

    That is the export that the user names; else what `vlm push-to-hub` publishes, whose code is this package's; a
    family's model as it is.

    Raises:
        ValueError: code would run that did not come with this package, and the request does not trust it.
    """
    if request.export is not None:
        has_code = "auto_map" in read_json(request.export / "config.json")
        _require_trust(request, request.export, has_code)
        return request.export, has_code
    if not is_composed_config(read_config(str(request.checkpoint), str(request.checkpoint))):
        return request.checkpoint, False
    _require_trust(request, request.checkpoint, bool(get_custom_classes(read_json(request.checkpoint / "config.json"))))
    folder = request.scratch / "published"
    folder.mkdir()
    prepare_upload(request.checkpoint, folder, RunSummary(request.checkpoint), allow_links=True)
    return folder, True


def _require_trust(request: Request, folder: Path, has_code: bool) -> None:
    if has_code and not request.trust_remote_code:
        raise ValueError(f"{folder} contains its own code, which only runs with --trust-remote-code")


FILES = {
    "llava": "config.json",
    "llava-original": "config.json",
    "gguf": "model.gguf",
    "onnx": "vision_encoder.onnx",
}
"""Format of an export -> a file that each of them has."""

SETTING_FILES = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "tokenizer.json",
    "chat_template.jinja",
)
"""Files of an export to LLaVA that decide what is served."""


def differences_from_fresh(request: Request, format_name: str) -> Iterator[str]:
    """Yield where the export that the user names is another one than the checkpoint makes now; nothing of a family's.

    Settings are compared field by field, weights number by number.
    """
    if request.export is None:
        return
    if not is_composed_config(read_config(str(request.checkpoint), str(request.checkpoint))):
        return
    fresh = request.scratch / f"fresh-{format_name}"
    tower = read_json(request.export / "config.json").get("mm_vision_tower")  # the user may have chosen the name
    export_checkpoint(str(request.checkpoint), fresh, format_name, vision_tower=tower)
    for name in SETTING_FILES:
        files = [folder / name for folder in (request.export, fresh)]
        given, expected = [
            dict(_fields(read_json(file)))
            if file.suffix == ".json"
            else {"text": file.read_text(encoding="utf-8") if file.is_file() else None}
            for file in files
        ]
        for key in [key for key in expected | given if given.get(key) != expected.get(key)][:1]:
            values = [repr(fields.get(key))[:40] for fields in (given, expected)]
            yield f"{name}: {key} is {values[0]}, expected {values[1]}"
    given, expected = (
        {name: file for file in weight_files(folder) for name in read_meta_tensors(file)}
        for folder in (request.export, fresh)
    )
    changed = sorted(
        name
        for name in given | expected
        if name not in given or name not in expected or not _is_same(name, given[name], expected[name])
    )
    if changed:
        yield f"{len(changed)} weights are not the checkpoint's, such as {changed[0]}"


def _fields(values: object, key: str = "") -> Iterator[tuple[str, object]]:
    """Yield the fields of nested objects by their dotted names, without the version that wrote them."""
    if isinstance(values, dict):
        for name, value in values.items():
            if name != "transformers_version":
                yield from _fields(value, f"{key}.{name}" if key else str(name))
    else:
        yield key, values


def _is_same(name: str, first: Path, second: Path) -> bool:
    """Return whether a weight has the same precision and numbers in two files."""
    with safe_open(first, "pt") as given, safe_open(second, "pt") as expected:
        tensors = given.get_tensor(name), expected.get_tensor(name)
    return tensors[0].dtype == tensors[1].dtype and torch.equal(*tensors)


def exported_form(request: Request, format_name: str) -> tuple[Path, list[str]]:
    """Return the export that the user names, else one that is made now, and what is said of it.

    A family's model is loaded as it is.
    """
    if request.export is not None:
        if not (request.export / FILES[format_name]).is_file():
            raise ValueError(
                f"--export {request.export}: it contains no {FILES[format_name]}; create it with "
                f"vlm export CHECKPOINT FOLDER --format {format_name}"
            )
        return request.export, []
    if not is_composed_config(read_config(str(request.checkpoint), str(request.checkpoint))):
        return request.checkpoint, []
    folder = request.scratch / format_name
    return folder, export_checkpoint(str(request.checkpoint), folder, format_name)
