"""Proofs about rows: causal, the same in a batch, apart in a packed row, and generated as they are trained."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor
from transformers import GenerationConfig

from vlm.assembly.family_trial.conversations import SIZES, Conversation, draw_image, one_turn, read_natively, two_turns
from vlm.assembly.family_trial.subject import Subject, relative_difference
from vlm.assembly.family_trial.verdicts import DisprovedError, NotProvableError
from vlm.assembly.logit_proofs import check_causal, check_padding
from vlm.assembly.packed_attention import use_packed_attention
from vlm.assembly.packed_rows import add_grid_positions
from vlm.data.batching.packing import PackingCollator
from vlm.data.batching.shared_prompt import BranchMerger
from vlm.data.dataset import model_inputs
from vlm.data.encoding.labels import IGNORE_INDEX, Encoded
from vlm.data.processor import SampleInputs
from vlm.data.skipped import Skipped

SAME = 1e-3
"""The largest difference of logits that are the same but for arithmetic in another order, over their norm."""
REJECTED = "No"
NUM_GENERATED = 4
TIE = 1e-3
"""How far below the highest logit that of a generated token may be, over the highest's size."""


def prove_causal(subject: Subject) -> None:
    """Changed tokens change no logits before them."""
    try:
        check_causal(subject.trainable, subject.processor, "the small model")
    except ValueError as error:
        raise DisprovedError(str(error)) from error


@torch.no_grad()
def prove_batch(subject: Subject) -> None:
    """Rows with one image, two and none have the same logits in a padded batch as alone."""
    try:
        check_padding(subject.trainable, subject.processor, "the small model")
    except ValueError as error:
        raise DisprovedError(str(error)) from error
    conversations = make_rows(subject, with_text=not subject.attends_across)
    alone = list(map(subject.alone_logits, conversations))
    together = subject.reply_logits(subject.make_batch(*conversations))
    compare_rows(alone, together, "in a padded batch")


@torch.no_grad()
def prove_packing(subject: Subject) -> None:
    """Samples of a packed row have the logits that they have alone."""
    model, conversations = subject.model, make_rows(subject, with_text=True)
    alone = list(map(subject.alone_logits, conversations))
    batch = add_grid_positions(model, {**PackingCollator(subject.collate)(list(map(subject.make_row, conversations)))})
    try:
        with use_packed_attention(model.config.get_text_config()):
            packed = subject.reply_logits(batch)
    except ValueError as error:
        raise DisprovedError(str(error)) from error
    compare_rows(alone, packed, "in a packed row")


@torch.no_grad()
def prove_pairs(subject: Subject) -> None:
    """Replies after one prompt in a packed row have the logits that each has after a prompt of its own."""
    model, merger = subject.model, BranchMerger.of(subject.processor)
    items: list[SampleInputs | Skipped] = []
    alone, num_images = [], 0
    for conversation in make_rows(subject, with_text=True):
        pair = conversation, answer_otherwise(conversation)
        merged = merger.merge(list(map(subject.make_row, pair)))
        if merged is not None:
            items.append(merged)
            alone += map(subject.alone_logits, pair)
            num_images += len(conversation.media)
    if not num_images:
        raise NotProvableError("two replies to a question about an image share no prompt")
    batch = add_grid_positions(model, {**PackingCollator(subject.collate)(items)})
    try:
        with use_packed_attention(model.config.get_text_config(), shares_prompts=True):
            packed = subject.reply_logits(batch)
    except ValueError as error:
        raise DisprovedError(str(error)) from error
    compare_rows(alone, packed, "behind a shared prompt")


def answer_otherwise(conversation: Conversation) -> Conversation:
    """Return a conversation with other replies, shorter ones."""
    turns = (replace(turn, content=(REJECTED,)) if turn.role == "assistant" else turn for turn in conversation.turns)
    return replace(conversation, turns=tuple(turns))


def make_rows(subject: Subject, *, with_text: bool) -> list[Conversation]:
    """Return conversations with one image, with none, with another and with two, as far as the family takes them."""
    first, second, third = (draw_image(seed, size) for seed, size in enumerate(SIZES, start=1))
    rows = [one_turn(first), one_turn(second, reply="A brown bear in the woods")]
    if with_text:
        rows.insert(1, one_turn())
    apart, together = two_turns([first], [third]), one_turn(first, third, reply="Two")
    for several in (together,) if subject.processor.sees_media_together else (apart, together):
        try:
            read_natively(subject.processor, several)
        except NotProvableError:
            continue
        return [*rows, several]
    return rows


def compare_rows(alone: Sequence[Tensor], together: Tensor, place: str) -> None:
    """Compare logits `(S, vocabulary)` of rows with those of all of them together.

    Raises:
        DisprovedError: a row's differ, and by how much.
    """
    if sum(map(len, alone)) != len(together):
        raise DisprovedError(f"{place}, {len(together)} positions are supervised, and {sum(map(len, alone))} alone")
    for number, (own, shared) in enumerate(zip(alone, together.split([len(row) for row in alone]), strict=True)):
        difference = relative_difference(own, shared)
        if not difference <= SAME:
            raise DisprovedError(
                f"{place}, the logits of sample {number + 1} differ by {difference:.2g} of their norm from those that "
                "it has alone"
            )


@torch.no_grad()
def prove_generation(subject: Subject) -> None:
    """`generate` with its cache writes the tokens that are likeliest by one pass over prompt and reply."""
    processor, model = subject.processor, subject.model
    conversation = one_turn(draw_image(1))
    row = subject.make_row(conversation)
    length = next(place for place, label in enumerate(row["labels"]) if label != IGNORE_INDEX)
    prompt = row["input_ids"][:length]
    batch = make_forced(subject, conversation, prompt, [])
    del batch["labels"]
    special = sorted({*processor.tokenizer.all_special_ids, *processor.tokenizer.added_tokens_decoder})
    settings = GenerationConfig(
        max_new_tokens=NUM_GENERATED,
        do_sample=False,
        pad_token_id=processor.tokenizer.pad_token_id,
        suppress_tokens=special,
    )
    generated = cast(Callable[..., Tensor], model.generate)(**batch, generation_config=settings)
    written = generated[0, -NUM_GENERATED:].tolist()
    forced = subject.reply_logits(make_forced(subject, conversation, prompt, written))
    forced[:, [token_id for token_id in special if token_id < forced.shape[1]]] = -torch.inf
    for place, (token_id, logits) in enumerate(zip(written, forced, strict=True)):
        highest = logits.max()
        if not float(highest - logits[token_id]) <= TIE * float(highest.abs().clamp(min=1)):
            raise DisprovedError(
                f"token {place + 1} that generate writes is not the likeliest by one pass over the whole row: its "
                f"logit is {float(logits[token_id]):.4g}, the highest {float(highest):.4g}"
            )


def make_forced(
    subject: Subject, conversation: Conversation, prompt: Sequence[int], written: Sequence[int]
) -> SampleInputs:
    """Return a batch of a prompt with what was written after it, which is supervised."""
    labels = [IGNORE_INDEX] * len(prompt) + list(written)
    encoded = Encoded([*prompt, *written], labels)
    sizes = conversation.sizes
    row = model_inputs(subject.processor, encoded, conversation.media, sizes)
    return dict(subject.collate([row]))
