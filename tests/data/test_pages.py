"""Pages and terminals show which tokens are supervised, and with which weight."""

from types import SimpleNamespace
from typing import cast

from vlm.data.pages import tokens_as_html, tokens_as_text
from vlm.data.processor import Processor


class Letters:
    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


PROCESSOR = cast(Processor, SimpleNamespace(tokenizer=Letters(), image_token_id=1, video_token_id=None))
IDS = [1, 1, *map(ord, "?abcd")]
LABELS = [-100, -100, -100, *IDS[3:]]
WEIGHTS = [0.5, 1, 9, 1, 1, 0.5, 2]


def test_weights_of_supervised_tokens_are_shown():
    text = tokens_as_text(IDS, LABELS, PROCESSOR, WEIGHTS, colours=False)
    assert text == "[2 × image token]?【ab】【c】×0.5【d】×2"
    html = tokens_as_html(IDS, LABELS, [1] * 7, PROCESSOR, WEIGHTS)
    assert html.startswith('<span class="image">[2 × image token]</span>?<mark>ab</mark><mark style="opacity:0.5"')
    assert html.endswith('title="weight 2">d</mark><sup>×2</sup>')


def test_without_weights_runs_are_whole():
    assert tokens_as_text(IDS, LABELS, PROCESSOR, colours=False) == "[2 × image token]?【abcd】"
    assert tokens_as_html(IDS, LABELS, [0, *[1] * 6], PROCESSOR).endswith("?<mark>abcd</mark>")
