"""Markers: put around texts, taken out again, whatever the template did to the texts."""

from vlm.data.encoding.markers import add_markers, break_media_tokens, end_of_blanks, strip_markers


def test_markers_give_the_spans_of_texts():
    marked = f"<a>{add_markers(' cat ', 0, ('<image>', None))}</a>{add_markers('dog', 1, (None,))}"
    text, spans = strip_markers(marked)
    assert text == "<a> cat </a>dog"
    assert {number: text[start:end] for number, (start, end) in spans.items()} == {0: "cat", 1: "dog"}


def test_a_text_whose_thinking_is_dropped_keeps_its_rest():
    marked = add_markers("<think>a</think>\n\nb", 0, (None,))
    text, spans = strip_markers(marked.split("</think>")[-1].lstrip("\n"))
    assert (text, spans) == ("b", {0: (0, 1)})
    whole, spans = strip_markers(marked)
    assert spans == {0: (0, len(whole))}


def test_a_dropped_text_has_no_span():
    assert strip_markers("only this") == ("only this", {})
    assert strip_markers(add_markers("cut", 0, (None,))[:4])[1] == {}


def test_spelled_media_tokens_are_broken_until_markers_are_taken_out():
    broken = break_media_tokens("an <image> tag", ("<image>", None))
    assert "<image>" not in broken
    assert strip_markers(broken)[0] == "an <image> tag"


def test_blanks_end():
    assert end_of_blanks("a \n\tb", 1) == 4
    assert end_of_blanks("ab", 1) == 1
