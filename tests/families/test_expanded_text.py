"""Texts with expansions, and what their characters come from."""

from vlm.families.expanded_text import expand_text

TEXT = "a <i> b <v> c"
EXPANDED = expand_text(TEXT, [(2, 5), (8, 11)], ["<i><i>", "v"], [1, 6, 12])


def test_expansions_take_the_place_of_tokens():
    assert EXPANDED.text == "a <i><i> b v c"
    assert [EXPANDED.text[cut] for cut in EXPANDED.cuts] == [TEXT[cut] for cut in (1, 6, 12)]


def test_what_lies_in_an_expansion_comes_from_its_token():
    words = ["a", " ", "<i>", "<i>", " ", "b", " ", "v", " ", "c"]
    starts = [sum(map(len, words[:place])) for place in range(len(words))]
    spans = EXPANDED.map_to_rendered([(start, start + len(word)) for start, word in zip(starts, words, strict=True)])
    assert [TEXT[a:b] for a, b in spans] == ["a", " ", "<i>", "<i>", " ", "b", " ", "<v>", " ", "c"]
    assert spans[2] == spans[3] == (2, 5)


def test_a_text_without_tokens_is_as_it_was():
    assert expand_text("plain", [], [], [3]).map_to_rendered([(1, 4)]) == [(1, 4)]
