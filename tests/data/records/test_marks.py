"""Marks of images and videos: found by the media that there are and by where they stand; all others are words."""

from typing import Any

import pytest

from vlm.data.records.marks import MarkError, Slot, find_marks, find_other_mark, move_image_first, split_at_marks

IMAGE, VIDEO = "<image>", "<video>"
IMG, V = Slot(IMAGE, IMAGE), Slot(VIDEO, VIDEO)
AS_VIDEO = Slot(VIDEO, IMAGE)

STANDING = {
    "<image>": (True, True),
    " <image> ": (True, True),
    "<image>\nwhat?": (True, True),
    "what?\n<image>": (True, True),
    "<image> what?": (True, False),
    "<image>what?": (True, False),
    "what?\n <image> \nsay": (True, False),
    "what? <image>": (True, False),
    "Look: <image>": (True, False),
    "see <image>": (False, False),
    "the tag <image> is": (False, False),
    "what is <image>?": (False, False),
    "a\n<image> b": (False, False),
}
"""Text -> whether its mark stands alone, and whether it fills its first or last line."""


@pytest.mark.parametrize("text", STANDING)
def test_a_mark_stands_alone_or_within_a_sentence(text: str):
    (mark,) = find_marks([text])
    assert (mark.alone, mark.outer) == STANDING[text]
    assert text[mark.start : mark.end] == mark.spelling == IMAGE


def test_marks_side_by_side_stand_as_one():
    marks = find_marks(["<image><image> <video>\n<image>\nIs <image> <image> it?"])
    assert [mark.alone for mark in marks] == [True, True, True, True, False, False]
    assert [mark.spelling for mark in marks][2] == VIDEO


def pieces(*texts: str, images: int = 0, videos: int = 0, **options: Any) -> list[list[str | Slot]]:
    return split_at_marks(texts, {IMAGE: images, VIDEO: videos}, **options)[0]


WORDS = [
    "Is it <video>?",
    "What does <image> do?",
    "<image> is a tag",
    "a:\n<image>\n<url/>\n</image>",
    "<video><image>?",
]


@pytest.mark.parametrize("text", WORDS)
@pytest.mark.parametrize("lead", [False, True])
def test_without_media_marks_are_words(text: str, lead: bool):
    assert pieces(text, lead=lead) == [[text]]


@pytest.mark.parametrize("text", ["<image>", "<image>\nwhat?", "what?\n<image>\n", "<video>\n<image>\nwhat?"])
@pytest.mark.parametrize("lead", [False, True])
def test_a_line_that_waits_for_media_is_refused_without_any(text: str, lead: bool):
    with pytest.raises(MarkError, match=r"1 <(\w+)>, but the record has no \1s: name the \1 in the record"):
        pieces(text, lead=lead)


SPLIT: dict[str, tuple[tuple[str, ...], int, int, list[list[str | Slot]]]] = {
    "as many": (("is <image> like <image>?", "and <image>"), 3, 0, [["is ", IMG, " like ", IMG, "?"], ["and ", IMG]]),
    "a word besides": (("<image>\nWhat does <image> do?",), 1, 0, [[IMG, "\nWhat does <image> do?"]]),
    "words in another turn": (
        ("<image>\na", "the tag <image>, or <image>?"),
        1,
        0,
        [[IMG, "\na"], ["the tag <image>, or <image>?"]],
    ),
    "a word of the other kind": (("<image>\nWhat does <video> do?",), 1, 0, [[IMG, "\nWhat does <video> do?"]]),
    "each of its kind": (("<video>a<image>b",), 1, 1, [[V, "a", IMG, "b"]]),
    "a video marked <image>": (
        ("<image>\nwhat?", "which <image>?"),
        0,
        2,
        [[AS_VIDEO, "\nwhat?"], ["which ", AS_VIDEO, "?"]],
    ),
    "a video and a word": (("<image>\nWhat does <image> do?",), 0, 1, [[AS_VIDEO, "\nWhat does <image> do?"]]),
    "a marked video and a word": (("<video>\nWhat does <image> do?",), 0, 1, [[V, "\nWhat does <image> do?"]]),
}


@pytest.mark.parametrize("name", SPLIT)
def test_texts_are_split_at_the_marks_that_stand_for_media(name: str):
    texts, images, videos, expected = SPLIT[name]
    assert pieces(*texts, images=images, videos=videos) == expected


MISFIT = {
    "too few": ("<image>", 2, 0, "its text has 1 <image>, but the record has 2 images: write one <image> for each"),
    "none": ("what?", 1, 0, "its text has no <image>, but the record has 1 image"),
    "too many": ("<image>\n<image>\nwhat?", 1, 0, "its text has 2 <image>, but the record has 1 image"),
    "words only": ("is <image> or <image> a tag?", 1, 0, "its text has 2 <image>, but the record has 1 image"),
    "one for both": ("<image>\n<image>\nwhat?", 1, 1, "its text has 2 <image>, but the record has 1 image"),
    "another kind": ("<video>\nwhat?", 1, 0, "its text has no <image>"),
}


@pytest.mark.parametrize("name", MISFIT)
def test_what_does_not_fit_is_told_with_both_numbers(name: str):
    text, images, videos, said = MISFIT[name]
    with pytest.raises(MarkError) as caught:
        pieces(text, images=images, videos=videos)
    assert said in str(caught.value)


LED: dict[str, tuple[str, int, int, list[str | Slot], list[str]]] = {
    "no mark": ("what?", 2, 0, ["what?"], [IMAGE]),
    "a word": ("What does the tag <image> do?", 1, 0, ["What does the tag <image> do?"], [IMAGE]),
    "words": ("Is it <image> or <image>?", 1, 0, ["Is it <image> or <image>?"], [IMAGE]),
    "a mark": ("<image>\nwhat?", 1, 0, [IMG, "\nwhat?"], []),
    "a mark behind": ("what? <image>", 1, 0, ["what? ", IMG], []),
    "a mark and a word": ("<image> is it <image>?", 1, 0, [IMG, " is it <image>?"], []),
    "two": ("is <image> like <image>?", 2, 0, ["is ", IMG, " like ", IMG, "?"], []),
    "one of each kind": ("is <image> in <video>?", 1, 1, ["is ", IMG, " in ", V, "?"], []),
    "the other kind": ("what <image>?", 1, 1, ["what ", IMG, "?"], [VIDEO]),
    "a video's word": ("Which tag is <video>?", 0, 1, ["Which tag is <video>?"], [VIDEO]),
    "an image's word beside a video": ("What does <image> do?", 0, 1, ["What does <image> do?"], [VIDEO]),
}


@pytest.mark.parametrize("name", LED)
def test_where_media_may_come_first_the_only_mark_within_a_sentence_is_a_word(name: str):
    text, images, videos, expected, leading = LED[name]
    numbers = {IMAGE: images, VIDEO: videos}
    assert split_at_marks([text], numbers, lead=True) == ([expected], leading)


def test_a_program_may_say_that_every_mark_stands_for_an_image():
    assert pieces("what is <image>?", images=1, lead=True, every_mark=True) == [["what is ", IMG, "?"]]


@pytest.mark.parametrize(
    ("given", "moved"),
    [
        (["what is ", IMG, " this? "], [IMG, "\nwhat is  this?"]),
        ([IMG], [IMG]),
        ([V, "a", IMG, "b"], [IMG, "\n", V, "ab"]),
        (["one ", IMG, " two ", IMG], ["one ", IMG, " two ", IMG]),
        (["a <image> ", AS_VIDEO], [AS_VIDEO, "\na <image>"]),
    ],
)
def test_a_lone_mark_is_moved_and_words_stay(given: list[str | Slot], moved: list[str | Slot]):
    assert move_image_first(given) == moved


OTHERS = {
    "a file": ("Picture 1: <img>a.png</img>\nwhat?", True, True),
    "Qwen's token": ("<|vision_start|><|image_pad|><|vision_end|>what?", True, True),
    "InternLM's": ("<ImageHere>what?", True, True),
    "within a sentence": ("What does <|image_pad|> do?", False, True),
    "HTML": ("<img src='a.png'> and <img> and </img>", False, False),
    "numbered": ("see <image 1> and tell", False, True),
}
"""Text -> whether it has a mark of another tool without media, and beside media that no mark of ours places."""


@pytest.mark.parametrize("name", OTHERS)
def test_marks_of_other_tools_are_told_from_words(name: str):
    text, alone, beside = OTHERS[name]
    assert (find_other_mark(text, has_media=False) is not None) == alone
    assert (find_other_mark(text, has_media=True) is not None) == beside


@pytest.mark.parametrize("text", ["<img>" + "./" * 500_000, "<img>a." * 200_000, "<img>" * 200_000])
def test_long_texts_take_no_longer_than_their_length(text: str):
    """Marks that are never closed; in quadratic time each would take hours."""
    assert find_other_mark(text, has_media=True) is None
    assert find_other_mark(f"{text}</img> <img>a.png</img>", has_media=True)
