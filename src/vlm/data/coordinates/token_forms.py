"""Conventions that write places with tokens of their own: Qwen2-VL, PaliGemma, Florence-2, InternVL, DeepSeek-VL2."""

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from math import floor
from typing import ClassVar

from vlm.data.coordinates.convention import NUMBER, Convention, Place
from vlm.data.objects import BOX


class Qwen2VL(Convention):
    """`<|object_ref_start|>cat<|object_ref_end|><|box_start|>(x1,y1),(x2,y2)<|box_end|>` in thousandths of the sides.

    Answers are read with these tokens or without them.
    """

    name = "qwen2-vl"
    source = "Wang et al. 2024, arXiv:2409.12191, section 2.2: [0, 1000)"
    highest = 999
    token_pattern = re.compile(r"<\|(?:box|object_ref)_(?:start|end)\|>")
    required_tokens = ("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>")
    _point = rf"\(\s*({NUMBER})\s*,\s*({NUMBER})\s*\)"
    _answer = re.compile(rf"<\|object_ref_start\|>(.*?)<\|object_ref_end\|>|{_point}(?:\s*,\s*{_point})?", re.DOTALL)

    def write_place(self, place: Place) -> str:
        """Return `<|box_start|>(x1,y1),(x2,y2)<|box_end|>`, of a point `<|box_start|>(x,y)<|box_end|>`."""
        numbers = self.numbers(place)
        points = (f"({x},{y})" for x, y in zip(numbers[::2], numbers[1::2], strict=True))
        return f"<|box_start|>{','.join(points)}<|box_end|>"

    def write_label(self, label: str) -> str:
        """Return `<|object_ref_start|>cat<|object_ref_end|>`."""
        return f"<|object_ref_start|>{label}<|object_ref_end|>"

    def write_list(self, places: Sequence[Place]) -> str:
        """Return each place after its label."""
        labels = ("" if place.label is None else self.write_label(place.label) for place in places)
        return "".join(label + self.write_place(place) for label, place in zip(labels, places, strict=True))

    def read_places(self, text: str, seen_size: tuple[float, float]) -> Iterator[Place]:
        """Yield the boxes and points of an answer, each with the last label before it; see `Convention`."""
        label = None
        for match in self._answer.finditer(text):
            if match[1] is not None:
                label = match[1]
            elif (place := self.make_place(filter(None, match.groups()[1:]), seen_size, label)) is not None:
                yield place


class PaliGemma(Convention):
    """`<loc y1><loc x1><loc y2><loc x2> cat ; …`, with tokens from 0 to 1023 for shares of a side from 0 to 1."""

    name = "paligemma"
    source = (
        "Beyer et al. 2024, arXiv:2407.07726, section 3.2.5; round(share * 1023) as in get_refcoco_mask2str of "
        "big_vision/pp/proj/paligemma/segmentation.py"
    )
    steps = 1023
    is_y_first = True
    token_pattern = re.compile(r"<loc\d{4}>")
    required_tokens = ("<loc0000>", "<loc0512>", "<loc1023>")
    _answer = re.compile(r"((?:<loc\d{4}>){2,4})([^;<\n]*)")

    def write_place(self, place: Place) -> str:
        """Return the tokens of a box (four) or a point (two)."""
        return "".join(f"<loc{int(number):04d}>" for number in self.numbers(place))

    def write_list(self, places: Sequence[Place]) -> str:
        """Return each place before its label, separated by semicolons."""
        return " ; ".join(f"{self.write_place(place)} {place.label or ''}".rstrip() for place in places)

    def read_places(self, text: str, seen_size: tuple[float, float]) -> Iterator[Place]:
        """Yield the boxes and points of an answer; see `Convention`."""
        for match in self._answer.finditer(text):
            place = self.make_place(re.findall(r"\d{4}", match[1]), seen_size, match[2])
            if place is not None:
                yield place


class Florence2(Convention):
    """`cat<loc_x1><loc_y1><loc_x2><loc_y2>`, with a token for each of 1000 bins of a side.

    Further boxes of the same label follow without it.
    """

    name = "florence-2"
    source = "Xiao et al. 2023, arXiv:2311.06242, section 4.1; transformers' models/florence2/processing_florence2.py"
    highest = 999
    token_pattern = re.compile(r"<loc_\d{1,3}>")
    required_tokens = ("<loc_0>", "<loc_500>", "<loc_999>")
    _answer = re.compile(r"([^<>]*)((?:<loc_\d{1,3}>){2,4})")

    def write_place(self, place: Place) -> str:
        """Return the tokens of a box (four) or a point (two)."""
        return "".join(f"<loc_{number}>" for number in self.numbers(place))

    def write_list(self, places: Sequence[Place]) -> str:
        """Return each label, and after it the boxes of a run that have it; each point after its label."""
        texts, before = [], None
        for place in places:
            is_same = before is not None and place.kind == before.kind == BOX and place.label == before.label
            texts.append(f"{'' if is_same else place.label or ''}{self.write_place(place)}")
            before = place
        return "".join(texts)

    def read_places(self, text: str, seen_size: tuple[float, float]) -> Iterator[Place]:
        """Yield the boxes and points of an answer, each at the middle of its bins; see `Convention`."""
        label, end = "", 0
        for match in self._answer.finditer(text):
            label = match[1] if match[1] or match.start() > end else label
            end = match.end()
            numbers = [int(number) + 0.5 for number in re.findall(r"\d+", match[2])]
            place = self.make_place(numbers, seen_size, label)
            if place is not None:
                yield place

    def _round(self, number: float) -> float:
        return floor(number)


class TaggedLists(Convention):
    """Places as lists of lists between tokens, after their label between others."""

    label_tokens: ClassVar[tuple[str, str]]
    box_tokens: ClassVar[tuple[str, str]]
    _list = re.compile(rf"\[\s*{NUMBER}(?:\s*,\s*{NUMBER})*\s*\]")

    def write_label(self, label: str) -> str:
        """Return a label between its tokens."""
        return label.join(self.label_tokens)

    def write_place(self, place: Place) -> str:
        """Return a list with one box or point between the tokens of boxes."""
        return self._write_places([place])

    def _write_places(self, places: Sequence[Place]) -> str:
        return ", ".join(f"[{', '.join(self.numbers(place))}]" for place in places).join(
            (f"{self.box_tokens[0]}[", f"]{self.box_tokens[1]}")
        )

    def write_list(self, places: Sequence[Place]) -> str:
        """Return a line for each run of places of one label: the label, and a list with all of them."""
        runs = ((label, list(run)) for label, run in groupby(places, lambda place: place.label))
        return "\n".join(
            f"{'' if label is None else self.write_label(label)}{self._write_places(run)}" for label, run in runs
        )

    def read_places(self, text: str, seen_size: tuple[float, float]) -> Iterator[Place]:
        """Yield the boxes and points of an answer, with its tokens or without them; see `Convention`."""
        opened, closed = map(re.escape, self.label_tokens)
        answer = re.compile(rf"{opened}(.*?){closed}|({self._list.pattern})", re.DOTALL)
        label, end = None, 0
        for match in answer.finditer(text):
            if match[1] is not None:
                label, end = match[1], match.end()
                continue
            if "\n" in text[end : match.start()]:
                label = None
            end = match.end()
            place = self.make_place(re.findall(NUMBER, match[2]), seen_size, label)
            if place is not None:
                yield place


class InternVL(TaggedLists):
    """`<ref>cat</ref><box>[[x1, y1, x2, y2]]</box>` in thousandths of the sides."""

    name = "internvl"
    source = "internvl.readthedocs.io, Chat Data Format, Grounding / Detection Data"
    label_tokens = ("<ref>", "</ref>")
    box_tokens = ("<box>", "</box>")
    token_pattern = re.compile(r"</?(?:ref|box)>")
    required_tokens = (*label_tokens, *box_tokens)


class DeepSeekVL2(TaggedLists):
    """`<|ref|>cat<|/ref|><|det|>[[x1, y1, x2, y2]]<|/det|>` in 999ths of the sides."""

    name = "deepseek-vl2"
    source = "Wu et al. 2024, arXiv:2412.10302; parse_ref_bbox of deepseek-ai/DeepSeek-VL2: box / 999 * side"
    steps = 999
    label_tokens = ("<|ref|>", "<|/ref|>")
    box_tokens = ("<|det|>", "<|/det|>")
    token_pattern = re.compile(r"<\|/?(?:ref|det)\|>")
    required_tokens = (*label_tokens, *box_tokens)
