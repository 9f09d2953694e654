"""Conventions that write lists of objects as JSON: Qwen2.5-VL, Qwen3-VL, Gemini and GLM-V."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import ClassVar

from vlm.data.coordinates.convention import NUMBER, Convention, Place, label_before
from vlm.data.objects import BOX

JSON_OBJECT = re.compile(r"\{[^{}]*\}")
BARE_LIST = re.compile(rf"\[\s*{NUMBER}(?:\s*,\s*{NUMBER})*\s*\]")
FENCE = "```json\n[\n{}\n]\n```"


class JsonConvention(Convention):
    """Objects as JSON, `{"bbox_2d": […], "label": …}`; one place within a sentence as a bare list of numbers."""

    box_key: ClassVar[str] = "bbox_2d"
    point_key: ClassVar[str] = "point_2d"
    indent: ClassVar[str] = "\t"

    def write_place(self, place: Place) -> str:
        """Return `[x1, y1, x2, y2]`, or `[x, y]`."""
        return f"[{', '.join(self.numbers(place))}]"

    def write_list(self, places: Sequence[Place]) -> str:
        """Return a block of JSON with an object on each line, as these models write it."""
        return FENCE.format(",\n".join(f"{self.indent}{self._write_object(place)}" for place in places))

    def _write_object(self, place: Place) -> str:
        key = self.box_key if place.kind == BOX else self.point_key
        label = "" if place.label is None else f', "label": {json.dumps(place.label, ensure_ascii=False)}'
        return f'{{"{key}": {self.write_place(place)}{label}}}'

    def read_places(self, text: str, seen_size: tuple[float, float]) -> Iterator[Place]:
        """Yield the objects of the JSON in an answer, or else its bare lists of numbers; see `Convention`."""
        objects = list(_json_objects(text))
        for members in objects:
            values = members.get(self.box_key, members.get(self.point_key))
            label = members.get("label")
            if isinstance(values, list) and all(isinstance(value, int | float) for value in values):
                place = self.make_place(values, seen_size, label if isinstance(label, str) else None)
                if place is not None:
                    yield place
        if objects:
            return
        for match in BARE_LIST.finditer(text):
            place = self.make_place(json.loads(match[0]), seen_size, label_before(text, match.start()))
            if place is not None:
                yield place


def _json_objects(text: str) -> Iterator[dict[str, object]]:
    """Yield the JSON objects of a text; incomplete or broken objects are skipped."""
    for match in JSON_OBJECT.finditer(text):
        try:
            value = json.loads(match[0])
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


class Qwen25VL(JsonConvention):
    """Pixels of the image after its resize: `{"bbox_2d": [x1, y1, x2, y2], "label": …}`, `{"point_2d": [x, y], …}`."""

    name = "qwen2.5-vl"
    source = (
        "Bai et al. 2025, arXiv:2502.13923, section 2.2.2; cookbooks/spatial_understanding.ipynb of QwenLM/Qwen2.5-VL"
    )
    steps = None


class Qwen3VL(JsonConvention):
    """The JSON of Qwen2.5-VL with thousandths of the image's sides."""

    name = "qwen3-vl"
    source = "cookbooks/2d_grounding.ipynb of QwenLM/Qwen3-VL: relative coordinates from 0 to 1000"


class Gemini(JsonConvention):
    """`{"box_2d": [y1, x1, y2, x2], "label": …}` and `{"point": [y, x], "label": …}` in thousandths of the sides."""

    name = "gemini"
    source = "ai.google.dev/gemini-api/docs/image-understanding; the cards of Gemma 3 name no form of their own"
    is_y_first = True
    box_key = "box_2d"
    point_key = "point"
    indent = "  "


class Glm(JsonConvention):
    """Thousandths: `<|begin_of_box|>[[x1, y1, x2, y2]]<|end_of_box|>`, or JSON with `bbox_2d` between these tokens."""

    name = "glm"
    source = "GLM-V Team 2025, arXiv:2507.01006, and the skill glmv-grounding of zai-org/GLM-V: round(x / width * 1000)"
    token_pattern = re.compile(r"<\|(?:begin|end)_of_box\|>")
    required_tokens = ("<|begin_of_box|>", "<|end_of_box|>")

    def write_place(self, place: Place) -> str:
        """Return `<|begin_of_box|>[[x1, y1, x2, y2]]<|end_of_box|>`."""
        return f"<|begin_of_box|>[[{', '.join(self.numbers(place))}]]<|end_of_box|>"

    def write_list(self, places: Sequence[Place]) -> str:
        """Return JSON on one line between the tokens."""
        return f"<|begin_of_box|>[{', '.join(map(self._write_object, places))}]<|end_of_box|>"

    def _write_object(self, place: Place) -> str:
        key = self.box_key if place.kind == BOX else self.point_key
        label = "" if place.label is None else f'"label": {json.dumps(place.label, ensure_ascii=False)}, '
        return f'{{{label}"{key}": [{", ".join(self.numbers(place))}]}}'
