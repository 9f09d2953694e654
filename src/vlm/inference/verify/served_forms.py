"""The forms of a checkpoint that engines load, made in a scratch folder where the user names none."""

from pathlib import Path

from vlm.assembly.checkpoint import is_composed_config
from vlm.assembly.family import read_config
from vlm.hub.exporting import export_checkpoint
from vlm.hub.folders import read_json
from vlm.hub.publishing import get_custom_classes, prepare_upload
from vlm.hub.run_facts import RunSummary
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
        raise ValueError(f"{folder} brings code of its own, which runs with --trust-remote-code alone")


def exported_form(request: Request, format_name: str) -> tuple[Path, list[str]]:
    """Return the export that the user names, else one that is made now, and what is said of it.

    A family's model is loaded as it is.
    """
    if request.export is not None:
        return request.export, []
    if not is_composed_config(read_config(str(request.checkpoint), str(request.checkpoint))):
        return request.checkpoint, []
    folder = request.scratch / format_name
    return folder, export_checkpoint(str(request.checkpoint), folder, format_name)
