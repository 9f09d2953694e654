"""Every convention: what it writes is read again as it was, but for its rounding."""

import random

import pytest

from vlm.config.choices import COORDINATES
from vlm.data.coordinates.convention import Convention, Place
from vlm.data.coordinates.table import AUTO, BY_MODEL_TYPE, CONVENTIONS, get_convention, token_pattern
from vlm.data.objects import BOX, POINT, SPAN

SEEN_SIZES = [(1, 1), (3, 2000), (640, 480), (1344, 28), (20000, 17)]
NAMES = list(CONVENTIONS)

BROKEN = (
    "", "no", "[", "[[]]", "{}", '{"bbox_2d": "x"}', '{"bbox_2d": [1, 2, 3]}', "[1,2,3,4,5,6]", "(1,2", "<loc",
    '<point x="a">', "[9e999, 1]", '{"bbox_2d": [5, 5, 1, 1]}', '{"label": 3}', "<loc0001>",
)  # fmt: skip


class Corners(Convention):
    """A convention of the user's own: two corners in hundredths."""

    name, source, steps = "corners", "here", 100

    def write_place(self, place):
        return f"<{' '.join(self.numbers(place))}>"

    def write_list(self, places):
        return " and ".join(map(self.write_place, places))

    def read_places(self, text, seen_size):
        for piece in text.split(" and "):
            yield self.make_place(piece.strip("<>").split(), seen_size)


def kinds_of(name: str) -> list[str]:
    return [POINT] if name.startswith("molmo") else [BOX, POINT]


def draw_place(chance: random.Random, kind: str, label: str | None, size: tuple[float, float]) -> Place:
    x, y = sorted(chance.random() for _ in range(2)), sorted(chance.random() for _ in range(2))
    edge = chance.choice([0.0, 1.0, None])  # the edges of the image are the places where rounding goes wrong
    x[1] = 1.0 if edge == 1.0 else x[1]
    y[0] = 0.0 if edge == 0.0 else y[0]
    return Place(kind, (x[0], y[0], x[1], y[1]) if kind == BOX else (x[1], y[0]), label, size)


def assert_close(read: Place, written: Place, convention: Convention) -> None:
    assert read.kind == written.kind
    steps = convention.resolution(written.seen_size)
    for index, (a, b) in enumerate(zip(read.values, written.values, strict=True)):
        # the last bin of a side stands for its end, too
        assert abs(a - b) <= steps[index % 2] * (1 + 1e-6), (read, written)


@pytest.mark.parametrize("size", SEEN_SIZES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_lists_are_read_as_they_were_written(name: str, size: tuple[float, float]):
    convention, chance = get_convention(name), random.Random(f"{name}{size}")
    for _ in range(40):
        labels = [chance.choice(["a cat", "dog", "Straßenbahn 4"]) for _ in range(chance.randint(1, 4))]
        places = [draw_place(chance, chance.choice(kinds_of(name)), label, size) for label in labels]
        read = convention.read(convention.write_all(places), size)
        assert len(read) == len(places)
        for a, b in zip(read, places, strict=True):
            assert a.label == b.label
            assert_close(a, b, convention)


@pytest.mark.parametrize("name", NAMES)
def test_single_places_are_read_within_sentences(name: str):
    convention, chance = get_convention(name), random.Random(name)
    for kind in kinds_of(name) * 20:
        place = draw_place(chance, kind, None, (640, 480))
        (read,) = convention.read(f"It is at {convention.write(place)}, I think.", (640, 480))
        assert_close(read, place, convention)


@pytest.mark.parametrize("name", NAMES)
def test_spans_are_written_alike(name: str):
    convention = get_convention(name)
    spans = [Place(SPAN, (1.5, 3.0), "a jump"), Place(SPAN, (0.0, 120.4))]
    text = convention.write_all(spans)
    assert text == "a jump: 1.5 - 3.0 seconds\n0.0 - 120.4 seconds"
    assert [(place.values, place.label) for place in convention.read(text, (1, 1))] == [
        ((1.5, 3.0), "a jump"), ((0.0, 120.4), None)
    ]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_answers_of_any_kind_are_no_error(name: str):
    convention, chance = get_convention(name), random.Random(name)
    good = convention.write_all([draw_place(chance, kinds_of(name)[0], "cat", (640, 480)) for _ in range(3)])
    for end in range(0, len(good), 7):
        assert len(convention.read(good[:end], (640, 480))) <= 3  # cut off by max_new_tokens
    for text in BROKEN:
        assert convention.read(text, (640, 480)) == []


EXPECTED = {
    "llava": ("cat: [0.25, 0.10, 0.50, 1.00]", "[0.25, 0.10, 0.50, 1.00]"),
    "pixels": ("cat: [160, 48, 320, 480]", "[160, 48, 320, 480]"),
    "qwen2-vl": (
        "<|object_ref_start|>cat<|object_ref_end|><|box_start|>(250,100),(500,999)<|box_end|>",
        "<|box_start|>(250,100),(500,999)<|box_end|>",
    ),
    "qwen2.5-vl": ('```json\n[\n\t{"bbox_2d": [160, 48, 320, 480], "label": "cat"}\n]\n```', "[160, 48, 320, 480]"),
    "qwen3-vl": ('```json\n[\n\t{"bbox_2d": [250, 100, 500, 1000], "label": "cat"}\n]\n```', "[250, 100, 500, 1000]"),
    "paligemma": ("<loc0102><loc0256><loc1023><loc0512> cat", "<loc0102><loc0256><loc1023><loc0512>"),
    "internvl": ("<ref>cat</ref><box>[[250, 100, 500, 1000]]</box>", "<box>[[250, 100, 500, 1000]]</box>"),
    "gemini": ('```json\n[\n  {"box_2d": [100, 250, 1000, 500], "label": "cat"}\n]\n```', "[100, 250, 1000, 500]"),
    "glm": (
        '<|begin_of_box|>[{"label": "cat", "bbox_2d": [250, 100, 500, 1000]}]<|end_of_box|>',
        "<|begin_of_box|>[[250, 100, 500, 1000]]<|end_of_box|>",
    ),
    "florence-2": ("cat<loc_250><loc_100><loc_500><loc_999>", "<loc_250><loc_100><loc_500><loc_999>"),
    "deepseek-vl2": (
        "<|ref|>cat<|/ref|><|det|>[[250, 100, 500, 999]]<|/det|>", "<|det|>[[250, 100, 500, 999]]<|/det|>"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("molmo")])
def test_boxes_are_written_as_the_family_writes_them(name: str):
    place = Place(BOX, (0.25, 0.1, 0.5, 1.0), "cat", (640, 480))
    convention = get_convention(name)
    assert (convention.write_all([place]), convention.write(place)) == EXPECTED[name]


def test_molmo_writes_points_alone():
    molmo = get_convention("molmo")
    points = [Place(POINT, (0.635, 0.445), "a <cat>"), Place(POINT, (0.1, 0.2), "a <cat>")]
    assert molmo.write_all(points[:1]) == '<point x="63.5" y="44.5" alt="a &lt;cat&gt;">a &lt;cat&gt;</point>'
    assert molmo.write_all(points).startswith('<points x1="63.5" y1="44.5" x2="10.0" y2="20.0" alt=')
    assert [place.label for place in molmo.read(molmo.write_all(points), (1, 1))] == ["a <cat>"] * 2
    with pytest.raises(ValueError, match="points, not boxes"):
        molmo.write_all([Place(BOX, (0, 0, 1, 1))])


def test_molmo_2_tells_the_image_of_each_point():
    molmo = get_convention("molmo2")
    points = [Place(POINT, (0.308, 0.05), "cat", medium=0), Place(POINT, (1, 0.377), "cat", medium=1)]
    assert molmo.write_all(points) == '<points coords="1 1 308 050;2 2 1000 377">cat</points>'
    assert [place.medium for place in molmo.read(molmo.write_all(points), (1, 1))] == [0, 1]
    # as the model itself writes: https://huggingface.co/allenai/Molmo2-4B
    text = 'Counting the <points coords="1 1 073 160 2 173 600" alt="boats">the boats</points> shows 2.'
    assert [(place.values, place.label) for place in molmo.read(text, (1, 1))] == [
        ((0.073, 0.16), "the boats"), ((0.173, 0.6), "the boats")
    ]  # fmt: skip
    text = '<points coords="1 1 555 169\t2 3 649 154 4 709 162"/>'
    assert [place.medium for place in molmo.read(text, (1, 1))] == [0, 1, 1]


def test_boxes_of_a_label_follow_each_other_in_florence_2():
    florence, boxes = get_convention("florence-2"), [(0, 0, 0.1, 0.1), (0, 0, 0.2, 0.2), (0, 0, 0.5, 0.5)]
    labels = ["wheel", "wheel", "car"]
    text = florence.write_all([Place(BOX, box, label) for box, label in zip(boxes, labels, strict=True)])
    assert text == (
        "wheel<loc_0><loc_0><loc_100><loc_100><loc_0><loc_0><loc_200><loc_200>car<loc_0><loc_0><loc_500><loc_500>"
    )
    assert [place.label for place in florence.read(text, (1, 1))] == labels


def test_paligemma_counts_to_1023_as_it_was_trained():
    for share, token in ((0.0, 0), (0.25, 256), (0.7, 716), (1.0, 1023)):  # round(share * 1023)
        place = Place(POINT, (share, 0.0))
        assert get_convention("paligemma").write(place) == f"<loc0000><loc{token:04d}>"


def test_several_boxes_of_a_label_share_a_list_in_internvl():
    places = [Place(BOX, (0, 0, 0.1, 0.1), "cat"), Place(BOX, (0, 0, 0.2, 0.2), "cat"), Place(BOX, (0, 0, 1, 1), "dog")]
    text = get_convention("internvl").write_all(places)
    assert text == (
        "<ref>cat</ref><box>[[0, 0, 100, 100], [0, 0, 200, 200]]</box>\n<ref>dog</ref><box>[[0, 0, 1000, 1000]]</box>"
    )


def test_answers_are_read_without_special_tokens():
    (place,) = get_convention("qwen2-vl").read("cat(10,20),(30,40)", (640, 480))
    assert place.values == (0.01, 0.02, 0.03, 0.04)
    (place,) = get_convention("glm").read("[[10, 20, 30, 40]]", (640, 480))
    assert place.values == (0.01, 0.02, 0.03, 0.04)


def test_the_lists_of_names_agree():
    assert (AUTO, *CONVENTIONS) == COORDINATES
    assert set(BY_MODEL_TYPE.values()) <= set(CONVENTIONS)
    assert all(kind.source for kind in CONVENTIONS.values())


def test_a_convention_of_the_users_own():
    from vlm.config.named import permit_names

    name = f"{__name__}:Corners"
    with pytest.raises(ValueError, match="importing runs code"):
        get_convention(name)
    assert token_pattern(name) is None
    permit_names([name])
    convention = get_convention(name)
    (read,) = convention.read(convention.write(Place(BOX, (0.1, 0.2, 0.3, 0.4))), (1, 1))
    assert read.values == (0.1, 0.2, 0.3, 0.4)
    permit_names([f"{__name__}:draw_place"])
    with pytest.raises(ValueError, match="is not a subclass"):
        get_convention(f"{__name__}:draw_place")
    with pytest.raises(ValueError, match="allowed are auto, llava"):
        get_convention("yolo")
