"""Proves on a few tokens, before the first step, properties of a model that training relies on.

A token must attend only to itself and earlier tokens; otherwise the model could copy the token that it should predict.
And a sample in a padded batch must have the same logits as alone. Both checks need loaded weights;
`assembly/language_models.py` refuses earlier what the configuration already shows. A loss that is computed in chunks,
within the call of the vocabulary head, must equal that of the model's logits; otherwise the loss is computed from all
logits. Every rank makes the same calls, because ZeRO-3 needs this.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from vlm.assembly.model_interface import TrainableModel
from vlm.assembly.numbers import bound_infinite
from vlm.config.schema import RunConfig
from vlm.data.batching.collator import Collator
from vlm.data.dataset import model_inputs
from vlm.data.encoding.labels import IGNORE_INDEX, Encoded
from vlm.data.encoding.processor_errors import is_refusal
from vlm.data.processor import Processor
from vlm.models.text_loss import SupervisedScores

log = logging.getLogger(__name__)

PREFIX, SUFFIX = 5, 4
"""Number of tokens of a row that stay the same, and number of changed tokens after them."""

WORDS = "one red dog runs over the green hill while two small birds sing in a tall blue tree"

CAUSAL_TOLERANCE = 1e-5, 2e-3
"""In float32 and in half precision: the largest change of logits before changed tokens, over the change at these."""
NOISE_FACTOR = 10
"""How many times the change of logits in an unchanged row is allowed in addition, because experts compute tokens in
groups, and rounding differs if the groups change."""
PADDING_TOLERANCE = 1e-2, 0.15
"""The largest relative difference of a padded row's logits from those of the row alone."""
LOSS_TOLERANCE = 1e-4, 2e-2
"""The largest relative difference of losses computed within the head's call from those of whole logits."""


def model_label(config: RunConfig) -> str:
    """Return the key and the name of the source of a run's language model."""
    if config.trainer.from_pretrained:
        return f"trainer.from_pretrained={config.trainer.from_pretrained}"
    if config.model.hf_name is not None:
        return f"model.hf_name={config.model.hf_name}"
    return f"model.language_model.hf_name={config.model.language_model.hf_name}"


@torch.no_grad()
def check_causal(model: TrainableModel, processor: Processor, label: str) -> None:
    """Check that changed tokens change no logits before them.

    There is no prefix, to which models such as PaliGemma attend as a whole by design: all tokens except the first are
    supervised.

    Args:
        model: the model as it trains, without prediction heads.
        processor: the run's processor.
        label: the key and the name of the model, for the message.

    Raises:
        ValueError: changed tokens change logits before them.
    """
    ids = choose_tokens(processor, PREFIX + 2 * SUFFIX)
    prefix, suffix, other = ids[:PREFIX], ids[PREFIX : PREFIX + SUFFIX], ids[PREFIX + SUFFIX :]
    with dropout_off(model):
        before = compute_logits(model, processor, [prefix + suffix, prefix + suffix], label)
        after = compute_logits(model, processor, [prefix + other, prefix + suffix], label)
    change = (after - before).abs()
    early, later, unchanged = (float(part.max()) for part in (change[0, :PREFIX], change[0, PREFIX:], change[1]))
    if early <= CAUSAL_TOLERANCE[is_half(model)] * later + NOISE_FACTOR * unchanged:
        return
    text = model.config.get_text_config()
    raise ValueError(
        f"{label}: its tokens attend to later tokens (model_type={text.model_type}, attention "
        f"{text._attn_implementation}): changing the last {SUFFIX} of {PREFIX + SUFFIX} tokens changes earlier logits "
        f"by {early:.2g}, and their own by {later:.2g}. Such a model, for example an encoder, would see each token "
        "that it should predict. Choose a causal language model, or another model.attn_implementation"
    )


@torch.no_grad()
def check_padding(model: TrainableModel, processor: Processor, label: str) -> None:
    """Check that a row has the same logits in a padded batch as alone; arguments as in `check_causal`.

    Raises:
        ValueError: its logits differ.
    """
    ids = choose_tokens(processor, PREFIX + 2 * SUFFIX)
    short, long = ids[:SUFFIX], ids[SUFFIX:]
    with dropout_off(model):
        padded = compute_logits(model, processor, [long, short], label)[1, :SUFFIX]
        alone = compute_logits(model, processor, [short], label)[0]
    difference = float((padded - alone).norm() / alone.norm())
    if difference <= PADDING_TOLERANCE[is_half(model)]:
        return
    text = model.config.get_text_config()
    raise ValueError(
        f"{label}: the logits of a sample in a padded batch differ by {difference:.2g} of their norm from those "
        f"without padding (model_type={text.model_type}, attention {text._attn_implementation}). Try another "
        "model.attn_implementation, or train with trainer.per_device_train_batch_size=1"
    )


@torch.no_grad()
def prove_scores(scores: SupervisedScores, processor: Processor, label: str) -> None:
    """Find out whether losses can be computed in chunks, within the head's call; log it if they cannot.

    Args:
        scores: computes the losses; `scores.in_head` is set.
        processor: the run's processor.
        label: the key and the name of the model, for the message.
    """
    model, ids = scores.model, choose_tokens(processor, PREFIX + 2 * SUFFIX)
    batch = make_batch(model, processor, [ids[:PREFIX], ids[PREFIX:]])
    supervised = batch["labels"][:, 1:] != IGNORE_INDEX
    with dropout_off(model):
        if scores.prove(batch):
            losses, targets, _ = scores(batch)
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            whole = scores.score(model(**inputs, use_cache=False).logits[:, :-1][supervised], targets)
            scores.in_head = float((losses - whole).norm()) <= LOSS_TOLERANCE[is_half(model)] * float(whole.norm())
    if not scores.in_head:
        log.info(
            "%s (model_type=%s) changes its logits after its vocabulary head, so the logits at all supervised "
            "positions of a batch are in memory at once",
            *(label, model.config.get_text_config().model_type),
        )


def is_half(model: TrainableModel) -> bool:
    """Return whether matrix products of a model are in half precision, whatever precision its logits are in."""
    autocast = torch.is_autocast_enabled(model.device.type)
    return autocast or any(parameter.dtype != torch.float32 for parameter in model.parameters())


def compute_logits(model: TrainableModel, processor: Processor, rows: Sequence[list[int]], label: str) -> Tensor:
    """Return the logits of rows without images in a training batch: `(B, T, vocabulary)`, float64.

    All tokens of a row except the first are supervised, because some processors read the labels. Infinite logits, such
    as those that are too large for half precision, are replaced by the largest number of their precision.

    Raises:
        ValueError: the library's code fails on the rows, for example because it needs token ids, or logits are NaN.
    """
    inputs = make_batch(model, processor, rows)
    del inputs["labels"]
    try:
        logits = model(**inputs, use_cache=False).logits
    except (AttributeError, TypeError, LookupError, ValueError, NotImplementedError) as error:
        if not is_refusal(error):
            raise
        problem = f"its code fails on a batch of a few tokens, {type(error).__name__}: {error}"
        raise ValueError(f"{label}: {problem}. Choose another model, or another model.attn_implementation") from error
    if logits[inputs["attention_mask"].bool()].isnan().any():
        precision = str(logits.dtype).removeprefix("torch.")
        raise ValueError(
            f"{label}: logits of a few tokens are not numbers (NaN) in {precision}: its weights are damaged, or too "
            "large for this precision. Choose another checkpoint, or a precision with a wider range (trainer.bf16=true "
            "or float32)"
        )
    return bound_infinite(logits)


def make_batch(model: TrainableModel, processor: Processor, rows: Sequence[list[int]]) -> dict[str, Tensor]:
    """Return rows without images as a batch of training; all but the first token of a row are supervised."""
    items = [model_inputs(processor, Encoded(ids, [IGNORE_INDEX, *ids[1:]]), []) for ids in rows]
    return dict(send_to_device(Collator.of(processor)(items), model.device))


def choose_tokens(processor: Processor, number: int) -> list[int]:
    """Return distinct ids of words, and of other tokens where a tokenizer knows too few of the words."""
    tokenizer = processor.tokenizer
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    words = tokenizer(WORDS, add_special_tokens=False).input_ids
    ids = [token_id for token_id in dict.fromkeys([*words, *range(len(tokenizer))]) if token_id not in special]
    return ids[:number]


@contextmanager
def dropout_off(model: TrainableModel) -> Iterator[None]:
    """Context in which a model is in evaluation mode; the previous modes of modules are restored afterwards.

    Quantised matrices stay in training mode, since evaluation mode would change their layout on a CPU.
    """
    modes: list[tuple[nn.Module, bool]] = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = type(module).__module__.startswith("bitsandbytes.")
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
