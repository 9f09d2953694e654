"""Models at native resolution are refused by every export, with the key."""

from tests.tiny_parts import Parts
from vlm.assembly.compose import compose
from vlm.hub.gguf.mmproj import find_incompatibilities as gguf
from vlm.hub.onnx.exporting import find_incompatibilities as onnx
from vlm.hub.targets import EXPORT_FORMATS


def test_native_resolution_is_refused(parts: Parts):
    config, processor = compose(parts.recipe("siglip"), "chatml", "native")
    for find in (gguf, onnx, *(each.incompatibilities for each in EXPORT_FORMATS.values())):
        assert any(reason.startswith("dataset.image_mode=native") for reason in find(config, processor))
