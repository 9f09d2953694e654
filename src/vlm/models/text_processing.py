"""Tokenising text, and what a tokenizer does with it. Hub code: imports transformers only."""

import json
import re
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from itertools import accumulate
from types import FrameType
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

LONG_TEXT = 20_000
"""Characters of a text that is encoded as a batch of one: other threads, such as those of a server, go on meanwhile."""

Ids = list[int]
Spans = list[tuple[int, int]]
"""The characters that each id comes from."""


def encode_text(
    tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool = False
) -> tuple[Ids, Spans]:
    """Return the ids of a text and the characters that each comes from, as a call of a fast tokenizer does.

    For a short text, what transformers does around the tokenizer takes several times as long as the tokenizer. The
    tokenizer is asked directly where nothing would change its ids: no class overrides the call, and no earlier call
    left it cutting, padding or splitting special tokens.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if (
        backend is not None
        and calls_backend(type(tokenizer))
        and backend.truncation is None
        and backend.padding is None
        and backend.encode_special_tokens == tokenizer.split_special_tokens
    ):
        with suppress(TypeError):  # half of a surrogate pair, which the call below refuses as transformers does
            if len(text) > LONG_TEXT:
                (encoding,) = backend.encode_batch([text], add_special_tokens=add_special_tokens)
            else:
                encoding = backend.encode(text, add_special_tokens=add_special_tokens)
            return encoding.ids, encoding.offsets
    encoded = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
    return encoded["input_ids"], encoded["offset_mapping"]


@cache
def calls_backend(kind: type) -> bool:
    """Return whether a call of a tokenizer of this class is that of every fast tokenizer."""
    if not issubclass(kind, PreTrainedTokenizerFast):
        return False
    own = kind.__mro__[: kind.__mro__.index(PreTrainedTokenizerFast)]
    return not any({"__call__", "_encode_plus", "_batch_encode_plus"} & vars(parent).keys() for parent in own)


def span_finder(spans: Sequence[tuple[int, int]]) -> Callable[[int, int], bool]:
    """Return what tells whether a piece of a text, by its start and end, lies in one of some spans.

    A question takes a time that hardly depends on the number of spans.
    """
    ordered = sorted(spans)
    begins = [begin for begin, _ in ordered]
    furthest_ends = list(accumulate((end for _, end in ordered), max))  # of all spans up to each

    def lies_within(start: int, end: int) -> bool:
        """Return whether one of the spans holds the whole of `start:end`."""
        place = bisect_right(begins, start) - 1
        return place >= 0 and end <= furthest_ends[place]

    return lies_within


def special_token_pattern(tokenizer: PreTrainedTokenizerBase, *media_tokens: str) -> re.Pattern[str]:
    """Return a pattern that matches the special tokens of a tokenizer and those of images and videos."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return re.compile("|".join(map(re.escape, sorted(special.union(media_tokens), key=len, reverse=True))))


def read_prepend_scheme(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return where a tokenizer starts a word by itself: `first` (in front of a text), `always`, or `never`.

    `always` is also behind every special token, as in SentencePiece tokenizers with `legacy: true`. Those that do it in
    their normalizer count as `never`: they do it before blanks too.
    """
    backend: Any = tokenizer.backend_tokenizer
    if backend.pre_tokenizer is None:
        return "never"
    settings: dict[str, Any] = json.loads(backend.pre_tokenizer.__getstate__())
    parts: list[dict[str, str]] = settings.get("pretokenizers", [settings])
    return next((part["prepend_scheme"] for part in parts if part["type"] == "Metaspace"), "never")


MAX_TEMPLATE_SECONDS = 5.0
"""Processor time of its thread in which a chat template has rendered a conversation."""
LINES_BETWEEN_CHECKS = 64
TEMPLATE_FILE = "<template>"
"""The file name that Jinja gives to the code of a template."""


@contextmanager
def bounded_template() -> Iterator[None]:
    """End a chat template that loops: templates come with checkpoints, and may loop on some conversations alone.

    The lines of a template are traced, as a debugger does; where a debugger runs, nothing is bounded.

    Raises:
        ValueError: it takes longer than `MAX_TEMPLATE_SECONDS`.
    """
    if sys.gettrace() is not None:
        yield
        return
    end, lines = time.thread_time() + MAX_TEMPLATE_SECONDS, 0

    def count_lines(frame: FrameType, event: str, value: object) -> object:
        """Count a line of the template; raise if the time is over."""
        nonlocal lines
        lines += 1
        if lines % LINES_BETWEEN_CHECKS == 0 and time.thread_time() > end:
            raise ValueError(
                f"the chat template takes more than {MAX_TEMPLATE_SECONDS:g} s of processor time for a conversation"
            )
        return count_lines

    def enter(frame: FrameType, event: str, value: object) -> Any:
        """Trace the lines of templates, and of nothing else."""
        return count_lines if frame.f_code.co_filename == TEMPLATE_FILE else None

    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(None)
