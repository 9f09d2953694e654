"""The proof about labels: exactly the replies are supervised, each with the token that ends it."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from vlm.assembly.family_trial.conversations import (
    OTHER_QUESTION,
    QUESTION,
    REPLIES,
    SYSTEM,
    Builder,
    Conversation,
    describe,
    draw_image,
    one_turn,
    read_natively,
    two_turns,
)
from vlm.assembly.family_trial.subject import Subject
from vlm.assembly.family_trial.verdicts import DisprovedError, NotProvableError
from vlm.data.encoding.labels import IGNORE_INDEX, Encoded, encode
from vlm.data.encoding.markers import THINKING_END
from vlm.data.sample import BadSample, Sample
from vlm.families.processing import FamilyProcessor

THOUGHT = f"<think>\nRed fur and a long tail.\n{THINKING_END}\n\n"
"""What a reply of a thinking model begins with."""


def prove_labels(subject: Subject) -> None:
    """Ids are those of the family's own processor, and supervised are the replies with the token that ends each."""
    processor = subject.processor
    refusals = []
    for conversation in make_conversations():
        try:
            native = read_natively(processor, conversation)["input_ids"][0].tolist()
        except NotProvableError as error:
            refusals.append((conversation, error))
            continue
        encoded = encode_or_fail(processor, conversation)
        if encoded.input_ids != native:
            raise DisprovedError(f"in {describe(conversation)}, {describe_ids(processor, encoded.input_ids, native)}")
        check_supervised(processor, conversation, encoded, conversation.replies)
    if refusals and refusals[0][0].media and len(refusals[0][0].turns) == 2:  # one question about one image
        raise refusals[0][1]
    check_spelled(processor)
    check_thinking(processor)


def describe_ids(processor: FamilyProcessor, ids: Sequence[int], native: Sequence[int]) -> str:
    """Return where ids differ from those of the family's own processor, and how the texts continue there."""
    place = next((i for i, pair in enumerate(zip(native, ids, strict=False)) if pair[0] != pair[1]), len(native))
    ours, theirs = (decode(processor, part[place : place + 8]) for part in (ids, native))
    return f"ids differ from the family's own from place {place} on: {ours!r} for {theirs!r}"


def make_conversations() -> Iterator[Conversation]:
    """Yield conversations of each form; a template may refuse all but the first."""
    image = draw_image(1)
    yield one_turn(image)
    yield two_turns([image])
    yield two_turns([], [image])
    yield Builder().system(SYSTEM).ask(QUESTION, image).reply(REPLIES[0]).done()
    yield one_turn()
    yield Builder().system(SYSTEM).ask(QUESTION).reply(REPLIES[0]).ask(OTHER_QUESTION).reply(REPLIES[1]).done()


def encode_or_fail(processor: FamilyProcessor, conversation: Conversation) -> Encoded:
    """Return ids and labels of a conversation that the family's own processor takes.

    Raises:
        DisprovedError: it is refused here.
    """
    try:
        return encode(processor, Sample("trial", conversation.turns), conversation.sizes)
    except ValueError as error:
        reason = error.reason if isinstance(error, BadSample) else str(error)
        raise DisprovedError(f"{describe(conversation)}, which the family's own processor takes: {reason}") from error


def check_supervised(
    processor: FamilyProcessor, conversation: Conversation, encoded: Encoded, replies: Sequence[str]
) -> None:
    """Check that the supervised runs of ids are these replies, each with a special token or white space after it.

    Raises:
        DisprovedError: they are not.
    """
    place = describe(conversation)
    for given, label in zip(encoded.input_ids, encoded.labels, strict=True):
        if label not in (given, IGNORE_INDEX):
            raise DisprovedError(f"in {place}, a label is {decode(processor, [label])!r} where the id is another")
    runs = list(supervised_runs(encoded))
    texts = [decode(processor, encoded.labels[start:end]) for start, end in runs]
    if len(runs) != len(replies):
        raise DisprovedError(f"in {place}, {len(replies)} replies make {len(runs)} supervised runs: {texts}")
    for (_, end), text, reply in zip(runs, texts, replies, strict=True):
        spoken, tail = text.lstrip(" "), ""
        if spoken.startswith(reply):
            tail = spoken.removeprefix(reply)
        if not tail:
            raise DisprovedError(f"in {place}, {text!r} is supervised for the reply {reply!r} and what ends it")
        last = encoded.labels[end - 1]
        ending = tail.strip()
        if ending and ending != decode(processor, [last]).strip():
            raise DisprovedError(f"in {place}, {tail!r} is supervised behind the reply {reply!r}: more than one token")
        if ending and not is_special(processor, last):
            raise DisprovedError(f"in {place}, {tail!r} ends the reply {reply!r}, which is no special token")
        following = encoded.input_ids[end : end + 1]
        if not ending and following and is_special(processor, following[0]) and following[0] in stop_ids(processor):
            raise DisprovedError(f"in {place}, {decode(processor, following)!r} ends the reply, and is not supervised")


def supervised_runs(encoded: Encoded) -> Iterator[tuple[int, int]]:
    """Yield where each run of supervised ids begins and ends."""
    position = 0
    for supervised, group in groupby(encoded.labels, key=lambda label: label != IGNORE_INDEX):
        length = len(list(group))
        if supervised:
            yield position, position + length
        position += length


def check_spelled(processor: FamilyProcessor) -> None:
    """Check that tokens of images and ends which a user spells are plain text.

    Raises:
        DisprovedError: the ids have more special tokens than the same conversation without them.
    """
    spelled = " and ".join(filter(None, [processor.image_token, str(processor.tokenizer.eos_token)]))
    questions = (f"Is it {words} here?" for words in (spelled, "red"))
    encoded, plain = (encode_or_fail(processor, one_turn(draw_image(1), question=question)) for question in questions)
    special = processor.tokenizer.all_special_ids
    for token_id in {*special, processor.image_token_id}:
        if encoded.input_ids.count(token_id) != plain.input_ids.count(token_id):
            raise DisprovedError(f"a user who writes {decode(processor, [token_id])!r} makes it a special token")
    check_supervised(processor, one_turn(draw_image(1)), encoded, [REPLIES[0]])


def check_thinking(processor: FamilyProcessor) -> None:
    """Check, for a template that knows of thinking, that the answer after it is supervised, whatever is kept of it.

    Raises:
        DisprovedError: the answer is not supervised whole, or something next to the reply is.
    """
    if THINKING_END not in str(processor.chat_template):
        return
    conversation = one_turn(draw_image(1), reply=THOUGHT + REPLIES[0])
    try:
        native = decode(processor, read_natively(processor, conversation)["input_ids"][0].tolist())
    except NotProvableError:
        return
    encoded = encode_or_fail(processor, conversation)
    texts = [decode(processor, encoded.labels[start:end]) for start, end in supervised_runs(encoded)]
    if len(texts) != 1 or texts[0] not in native or REPLIES[0] not in texts[0] or QUESTION in texts[0]:
        raise DisprovedError(f"of a reply with thinking, {texts} is supervised")
    answer = texts[0][texts[0].index(REPLIES[0]) :]
    if answer == REPLIES[0]:
        raise DisprovedError("of a reply with thinking, the token that ends it is not supervised")


def stop_ids(processor: FamilyProcessor) -> set[int]:
    """Return the ids at which generation stops by the tokenizer's own settings."""
    eos = processor.tokenizer.eos_token_id
    return {eos} if isinstance(eos, int) else set()


def is_special(processor: FamilyProcessor, token_id: int) -> bool:
    """Return whether an id is a special or added token."""
    tokenizer = processor.tokenizer
    return token_id in tokenizer.all_special_ids or token_id in tokenizer.added_tokens_decoder


def decode(processor: FamilyProcessor, ids: Sequence[int]) -> str:
    """Return ids as text, special tokens included."""
    return str(processor.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
