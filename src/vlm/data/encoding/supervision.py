"""Which tokens of a conversation are supervised: `dataset.supervise`."""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

from vlm.data.encoding.labels import (
    IGNORE_INDEX,
    Labeller,
    get_media_token_ids,
    label_replies,
)
from vlm.data.encoding.markers import Rendered, Span
from vlm.data.processor import Processor

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"


def label_llava_onevision(
    processor: Processor, rendered: Rendered, ids: Sequence[int], spans: Sequence[Span]
) -> list[int]:
    """Return the labels of ChatML that LLaVA-OneVision trained with.

    As `preprocess_qwen` in `llava/train/train.py` of LLaVA-NeXT's code: the id in the whole turn of an assistant, from
    `<|im_start|>` and the role on to the line break after `<|im_end|>`; in the turns of others, the id at these two
    tokens and at every line break that is a token of its own; -100 elsewhere, and at images.

    Raises:
        ValueError: the tokenizer does not know ChatML's tokens.
    """
    turn_start, turn_end, line_break = _find_chatml_ids(processor)
    everywhere, media = {turn_start, turn_end, line_break}, set(get_media_token_ids(processor))
    labels = [token if token in everywhere else IGNORE_INDEX for token in ids]
    replies = [start for start, _ in rendered.replies]
    turns = [position for position, token in enumerate(ids) if token == turn_start]
    for first, following in pairwise([*turns, len(ids)]):
        end = spans[following][0] if following < len(ids) else len(rendered.text) + 1
        reply = bisect_left(replies, spans[first][0])
        if reply < len(replies) and replies[reply] < end:
            labels[first:following] = [IGNORE_INDEX if token in media else token for token in ids[first:following]]
    return labels


def _find_chatml_ids(processor: Processor) -> tuple[int, int, int]:
    """Return the ids of the start of a turn, its end, and a line break."""
    known = processor.tokenizer.added_tokens_encoder
    line_break = processor.tokenizer.encode("\n", add_special_tokens=False)
    missing = [token for token in (TURN_START, TURN_END) if token not in known]
    if missing or len(line_break) != 1:
        absent = ", ".join(missing) or "a token for line breaks"
        raise ValueError(
            f"dataset.supervise=llava-onevision: the tokenizer has no {absent}; it is for models that are trained with "
            "ChatML, such as Qwen2. dataset.supervise=replies is for all"
        )
    return known[TURN_START], known[TURN_END], line_break[0]


SUPERVISIONS: dict[str, Labeller] = {"replies": label_replies, "llava-onevision": label_llava_onevision}
"""Value of `dataset.supervise` -> what makes the labels."""
