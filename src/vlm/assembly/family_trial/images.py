"""Proofs about images: as many placeholders as the family's own processor writes, and replies that depend on them."""

from collections.abc import Iterator

import torch

from vlm.assembly.family_trial.conversations import (
    OTHER_QUESTION,
    QUESTION,
    REPLIES,
    SIZES,
    Builder,
    Conversation,
    describe,
    draw_image,
    draw_video,
    one_turn,
    read_natively,
    two_turns,
)
from vlm.assembly.family_trial.subject import Subject, relative_difference
from vlm.assembly.family_trial.verdicts import DisprovedError, NotProvableError
from vlm.data.batching.collator import Collator
from vlm.data.blank_images import dummy_image, dummy_video
from vlm.data.encoding.labels import IGNORE_INDEX, encode_prompt
from vlm.data.processor import SampleInputs
from vlm.data.sample import BadSample

SEEN = 1e-4
"""The least change of logits, over their norm, that counts as seeing another image."""
SAME_WITH_DUMMY = 1e-3
"""The largest change of logits, over their norm, by what completes a batch: rounding."""
UNSEEN = 1e-5
"""The largest change of logits, over their norm, where nothing that they depend on has changed."""


def prove_placeholders(subject: Subject) -> None:
    """Ids and pixels are those of the family's own processor, and the model notices a wrong number of placeholders."""
    if subject.image_token_id != subject.processor.image_token_id:
        raise DisprovedError(
            f"the model places features of images at id {subject.image_token_id}, and images are counted by id "
            f"{subject.processor.image_token_id}"
        )
    refusals = []
    for conversation in make_prompts(subject):
        try:
            check_prompt(subject, conversation)
        except NotProvableError as error:
            refusals.append(error)
    if len(refusals) == len(list(make_prompts(subject))):
        raise refusals[0]
    check_count(subject, one_turn(draw_image(1)))


def prove_videos(subject: Subject) -> None:
    """Ids and pixels of a video are those of the family's own processor, and the model notices a wrong number.

    A blank video that completes a batch, where ranks have to make the same calls, changes no logits.

    Where a family reads no videos, their frames are images, and nothing is left to prove.
    """
    if subject.processor.videos is None:
        return
    video = draw_video(1, subject.processor)
    check_prompt(subject, Builder().ask(QUESTION, video).done())
    checks = {
        "a video": lambda: check_count(subject, one_turn(video)),
        "a batch of an image and a video": lambda: check_dummy_video(subject),
    }
    for read, check in checks.items():
        try:
            check()
        except (TypeError, LookupError, RuntimeError, ValueError) as error:  # of the model's code
            reason = f"the model's code fails on {read}: {type(error).__name__}: {error}"
            raise NotProvableError(reason) from error


@torch.no_grad()
def check_dummy_video(subject: Subject) -> None:
    """Check that a blank video that completes a batch changes nothing.

    Raises:
        DisprovedError: it changes logits.
    """
    processor, image = subject.processor, one_turn(draw_image(1))
    if not processor.encodes_videos_separately:
        return
    collate = Collator.of(processor, dummy_image(processor), video_dummy=dummy_video(processor))
    completed = subject.reply_logits(dict(collate([subject.make_row(image)])))
    if not (change := relative_difference(subject.alone_logits(image), completed)) <= SAME_WITH_DUMMY:
        raise DisprovedError(f"a blank video that completes a batch changes logits by {change:.2g} of their norm")


def make_prompts(subject: Subject) -> Iterator[Conversation]:
    """Yield questions about images of several sizes, one and several, in the first and in a later turn."""
    images = [draw_image(seed, size) for seed, size in enumerate(SIZES)]
    yield from (Builder().ask(QUESTION, image).done() for image in images)
    yield Builder().ask(QUESTION, *images).done()
    yield Builder().ask(QUESTION, images[0]).reply(REPLIES[0]).ask(OTHER_QUESTION, images[1]).done()


def check_prompt(subject: Subject, conversation: Conversation) -> None:
    """Check the ids and the inputs of a prompt.

    Raises:
        NotProvableError: the family's own processor refuses it.
        DisprovedError: they are not those of the family's own processor.
    """
    processor = subject.processor
    theirs = read_natively(processor, conversation, prompt=True)
    expected = theirs["input_ids"][0].tolist()
    try:
        ids = encode_prompt(processor, conversation.turns, conversation.sizes)
        inputs = processor.image_inputs(conversation.media, conversation.sizes)
        inputs |= processor.text_inputs(ids, [IGNORE_INDEX] * len(ids), inputs)
    except ValueError as error:
        reason = error.reason if isinstance(error, BadSample) else str(error)
        raise DisprovedError(f"{describe(conversation)}, which the family's own processor takes: {reason}") from error
    if ids != expected:
        numbers = [given.count(processor.image_token_id) for given in (ids, expected)]
        raise DisprovedError(
            f"{describe(conversation)} has {len(ids)} ids, {numbers[0]} of them at images, and {len(expected)}, "
            f"{numbers[1]} of them at images, by the family's own processor"
        )
    for name in theirs.keys() - {"input_ids", "attention_mask", "labels"}:
        value = theirs[name]
        if not isinstance(value, torch.Tensor):
            continue
        own = inputs.get(name)
        if own is None or not torch.equal(own.flatten(), value.flatten()):
            raise DisprovedError(f"{describe(conversation)}: {name} is not what the family's own processor makes")


@torch.no_grad()
def check_count(subject: Subject, conversation: Conversation) -> None:
    """Check that the model takes the placeholders of a conversation, and refuses one too many and one too few.

    Raises:
        DisprovedError: it computes logits with a wrong number of them without a word.
    """
    row = subject.make_row(conversation)
    subject.reply_logits(subject.collate([dict(row)]))
    if subject.attends_across:  # features are not placed at tokens
        return
    ids = {subject.image_token_id, subject.processor.video_token_id}
    places = [place for place, token_id in enumerate(row["input_ids"]) if token_id in ids]
    for change, label in ((0, "too few"), (2, "too many")):
        try:
            subject.reply_logits(subject.collate([repeat_token(subject, row, places[-1], change)]))
        except Exception:  # as the model's code notices it
            continue
        raise DisprovedError(f"the model takes one placeholder {label} in {describe(conversation)} without an error")


def repeat_token(subject: Subject, row: SampleInputs, place: int, times: int) -> SampleInputs:
    """Return a row with a token repeated so many times; 0 leaves it out."""
    changed = dict(row)
    for name in ("input_ids", "labels"):
        values = list(row[name])
        changed[name] = [*values[:place], *[values[place]] * times, *values[place + 1 :]]
    for name in subject.processor.per_token_inputs:
        if name in row:
            value = row[name]
            changed[name] = torch.cat([value[:place], *[value[place : place + 1]] * times, value[place + 1 :]])
    return changed


@torch.no_grad()
def prove_sight(subject: Subject) -> None:
    """Logits of a reply change with its image; of two images, a reply depends on those before it only."""
    one, other = draw_image(1), draw_image(2)
    if not (change := compare(subject, one_turn(one), one_turn(other))) >= SEEN:
        raise DisprovedError(f"another image changes the logits of the reply by {change:.2g} of their norm")
    try:
        read_natively(subject.processor, two_turns([one], [other]))
    except NotProvableError:
        return check_order_in_turn(subject)
    if subject.processor.sees_media_together:
        check_refused(subject, two_turns([one], [other]))
        return check_order_in_turn(subject)
    third = draw_image(3)
    changes = {
        name: compare_turns(subject, two_turns([one], [other]), changed)
        for name, changed in (("first", two_turns([third], [other])), ("second", two_turns([one], [third])))
    }
    if not changes["first"][0] >= SEEN:
        raise DisprovedError(f"the first reply does not depend on the first of two images: {changes['first'][0]:.2g}")
    if not changes["second"][1] >= SEEN:
        raise DisprovedError(f"the second reply does not depend on the second image: {changes['second'][1]:.2g}")
    if not changes["second"][0] <= UNSEEN:
        raise DisprovedError(
            f"the first reply depends on the second of two images, which comes later: {changes['second'][0]:.2g}"
        )
    return None


def check_refused(subject: Subject, conversation: Conversation) -> None:
    """Check that training leaves out a conversation whose first reply would depend on a later image.

    Raises:
        DisprovedError: it would be trained on.
    """
    try:
        subject.make_row(conversation)
    except BadSample:
        return
    raise DisprovedError("a reply between images is trained on, although earlier images attend to later ones")


def check_order_in_turn(subject: Subject) -> None:
    """Check, where images are in one question only, that two of them are told apart.

    Raises:
        DisprovedError: the logits are the same when they change places.
    """
    one, other = draw_image(1), draw_image(2)
    try:
        read_natively(subject.processor, one_turn(one, other))
    except NotProvableError:
        return
    change = compare(subject, one_turn(one, other), one_turn(other, one))
    if not change >= SEEN:
        raise DisprovedError(f"swapping two images changes the logits by {change:.2g} of their norm")


def compare(subject: Subject, one: Conversation, other: Conversation) -> float:
    """Return how the logits of the replies of two conversations differ, over the norm of the first's."""
    return relative_difference(*map(subject.alone_logits, (one, other)))


def compare_turns(subject: Subject, one: Conversation, other: Conversation) -> tuple[float, float]:
    """Return the same for the first and for the second reply of conversations of two turns."""
    logits = list(map(subject.alone_logits, (one, other)))
    supervised = (torch.tensor(subject.make_row(one)["labels"]) != IGNORE_INDEX).long()
    starts = (supervised.diff() == 1).nonzero().flatten() + 1
    first = int(supervised[: int(starts[1])].sum())
    return (
        relative_difference(logits[0][:first], logits[1][:first]),
        relative_difference(logits[0][first:], logits[1][first:]),
    )
