"""Whether a checkpoint fits a format, before anything is written."""

from vlm.config.choices import ADAPTER_FORMAT_DESCRIPTIONS
from vlm.hub.exporting import find_exporter
from vlm.hub.opening import open_for_export, refuse_incompatible
from vlm.hub.targets import EXPORT_FORMATS
from vlm.hub.vllm_lora import open_adapter


def check_export(name: str, format_name: str) -> None:
    """Refuse a checkpoint that does not fit a format, from its configuration and processor.

    What only its weights tell is found by the export itself.

    Args:
        name: a run's folder `final`, or a name on the Hub.
        format_name: a format of `vlm export`.

    Raises:
        ValueError: the format has no place for a part of the model, where every reason is listed.
    """
    if format_name in ADAPTER_FORMAT_DESCRIPTIONS:
        open_adapter(name)
        return
    opened = open_for_export(name)
    if format_name in EXPORT_FORMATS:
        find_incompatibilities = EXPORT_FORMATS[format_name].incompatibilities
    else:
        find_incompatibilities = find_exporter(format_name).find_incompatibilities
    refuse_incompatible(name, format_name, find_incompatibilities(opened.config, opened.processor))
