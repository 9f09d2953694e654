"""Retrieval: how often an image's own text (a caption, an answer) has the lowest loss among texts of other images.

What an image is asked about, up to the reply, is its prompt. The model reads each prompt once, image included, and then
the candidates in batches, from the cache of keys and values that the prompt left.

Shapes: N candidates of a prompt, the own text first; T tokens.
"""

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from vlm.data.batching.collator import SKIPPED_KEY, Collator
from vlm.data.dataset import SampleDataset
from vlm.data.encoding.labels import IGNORE_INDEX, Encoded, get_media_token_ids, limit_length
from vlm.data.processor import Processor, SampleInputs
from vlm.data.sample import BadSample, ImageRef, Sample, VideoRef
from vlm.data.skipped import Skipped
from vlm.data.vision.images import read_media_sizes
from vlm.evaluation.loss import last_reply_text, replace_reply, row_losses
from vlm.evaluation.text_metrics import normalize_answer
from vlm.families.grid_positions import count_axes, has_grid_positions
from vlm.models.text_loss import SupervisedScores

log = logging.getLogger(__name__)

SEED = 0
"""Seeds the drawing of candidates, which are the same in every run, on every number of ranks."""

TIE_TOLERANCE = 1e-6
"""Losses that differ by less, as a share of the own text's, are equal: their sums are rounded to float32."""

Batch = dict[str, Tensor]
"""Inputs of a model by name, with labels."""

Row = dict[str, object]
"""A line of a table in a file: column -> value."""


@dataclass(frozen=True)
class Trial:
    """A sample and the texts that it is compared with.

    Attributes:
        index: the sample's in its data set.
        texts: the candidates: its own reply, then those of others.
    """

    index: int
    texts: tuple[str, ...]


@dataclass(frozen=True)
class _Reply:
    """A reply.

    Attributes:
        index: the sample's in its data set.
        text: the reply.
        right: all texts that are correct for the sample, normalised.
        media: keys of the images and videos that it is about.
    """

    index: int
    text: str
    right: frozenset[str]
    media: frozenset[object]


def choose_trials(dataset: SampleDataset, num_candidates: int, max_samples: int | None, advice: str) -> list[Trial]:
    """Return the first samples that end with a supervised text about images or videos, each with its candidates.

    Samples whose last reply is cut off whole are left out. Candidates are drawn from the distinct texts of all such
    samples. None is a text that is correct for the sample's image: its own reply or one of its references, or the reply
    of another sample with the same image. Texts that differ only in case, white space at their ends or a full stop are
    the same.

    Args:
        dataset: the samples.
        num_candidates: N.
        max_samples: the largest number of samples; None: all.
        advice: what a user who cannot have this metric should change.

    Raises:
        ValueError: no sample has such a reply, all are cut off, or there are too few different texts.
    """
    replies = [reply for index in range(len(dataset)) if (reply := _read_reply(index, dataset.sample(index)))]
    if not replies:
        raise ValueError(
            f"retrieval: none of the {len(dataset):,} records shows an image or a video and ends with a supervised "
            f"reply of text, which is what this metric compares; {advice}"
        )
    first_texts = {normalize_answer(reply.text): reply.text for reply in reversed(replies)}
    pool = list(first_texts.items())
    right_by_medium: dict[object, set[str]] = {}
    for reply in replies:
        for medium in reply.media:
            right_by_medium.setdefault(medium, set()).update(reply.right)
    trials: list[Trial] = []
    num_cut = 0
    for reply in replies:
        if len(trials) == max_samples:
            break
        if _is_cut_off(dataset, reply.index):
            num_cut += 1
            continue
        right = reply.right.union(*(right_by_medium[medium] for medium in reply.media))
        others = _draw_others(reply.index, pool, right, num_candidates - 1)
        if len(others) < num_candidates - 1:
            raise ValueError(
                f"retrieval: {num_candidates} different texts are needed, and for record "
                f"{dataset.sample(reply.index).id!r} there are {len(others) + 1} (its own, and replies about other "
                f"images of the {len(replies):,} records with images); {advice}"
            )
        trials.append(Trial(reply.index, (reply.text, *others)))
    if num_cut and not trials:
        raise ValueError(
            f"retrieval: the last replies of all {num_cut:,} records with images are cut off whole "
            f"(dataset.over_length=truncate), so there is no text to compare; raise dataset.max_length, or {advice}"
        )
    if num_cut:
        log.info("retrieval: %d records are left out, whose last reply is cut off whole (dataset.max_length)", num_cut)
    return trials


def _is_cut_off(dataset: SampleDataset, index: int) -> bool:
    """Return whether nothing of a sample's last reply is left of it, since it is too long."""
    encoder = dataset.encoder_of(index)
    if not encoder.truncate:
        return False
    sample = dataset.sample(index)
    return (
        _last_supervised_run(encoder.encode(sample, read_media_sizes(sample, dataset.processor)).labels)
        >= encoder.longest
    )


def _read_reply(index: int, sample: Sample) -> _Reply | None:
    """Return the last reply of a sample; None where it is not supervised, is no text, or is about no image or video."""
    text, last = last_reply_text(sample), sample.turns[-1]
    shown = [part for turn in sample.turns[:-1] for part in turn.content if not isinstance(part, str)]
    if last.role != "assistant" or not last.supervised or not normalize_answer(text):
        return None
    if not shown or len(shown) < len(sample.media):
        return None
    right = frozenset(map(normalize_answer, (text, *sample.references)))
    return _Reply(index, text, right, frozenset(map(_medium_key, shown)))


def _medium_key(medium: ImageRef | VideoRef) -> object:
    """Return a key that is equal for equal images and for equal videos."""
    content = medium.content if isinstance(medium, ImageRef) else None
    return medium if content is None else blake2b(content, digest_size=16).digest()


def _draw_others(index: int, pool: Sequence[tuple[str, str]], right: frozenset[str], number: int) -> list[str]:
    """Return texts at random, none of them right; fewer than `number` only where there are no more.

    `pool` has different texts, each behind its normalised form, by which `right` names those that are right.
    """
    size = min(number + len(right), len(pool))
    drawn = np.random.default_rng((SEED, index)).choice(len(pool), size, replace=False)
    return [text for key, text in (pool[place] for place in drawn.tolist()) if key not in right][:number]


class CandidateDataset(Dataset[list[SampleInputs] | Skipped]):
    """For each trial the inputs of its prompt, with the image, and of the N candidates that may follow it.

    A candidate that does not fit behind its prompt is cut. Only the candidates are supervised, no earlier replies.
    """

    def __init__(self, dataset: SampleDataset, trials: Sequence[Trial]):
        self.dataset, self.trials = dataset, trials

    def __len__(self) -> int:
        """Return the number of trials."""
        return len(self.trials)

    def __getitem__(self, number: int) -> list[SampleInputs] | Skipped:
        """Return the prompt of a trial and its candidates, encoded, or why its record cannot be used."""
        trial = self.trials[number]
        source, record = self.dataset.places[trial.index].tolist()
        try:
            return self._encode(trial)
        except BadSample as error:
            return Skipped.from_error(error, self.dataset.sources[source], record)

    def _encode(self, trial: Trial) -> list[SampleInputs]:
        processor, encoder = self.dataset.processor, self.dataset.encoder_of(trial.index)
        sample = self.dataset.sample(trial.index)
        sizes, media = self.dataset.media_inputs(sample)
        media_ids = get_media_token_ids(processor)
        rows = []
        for text in trial.texts:
            whole = encoder.encode(replace_reply(sample, text), sizes)
            rows.append(limit_length(whole, encoder.longest, media_ids, sample.id, truncate=True))
        starts = [_last_supervised_run(row.labels) for row in rows]
        prompt = min(_num_shared_tokens(rows), *starts)
        items: list[SampleInputs] = []
        for row, start in zip(rows, starts, strict=True):
            labels = [*[IGNORE_INDEX] * start, *row.labels[start:]]
            tokens = {"input_ids": row.input_ids, "labels": labels}
            tokens |= processor.text_inputs(row.input_ids, row.labels, media)
            if not items:
                items.append({name: values[:prompt] for name, values in tokens.items()} | media)
            items.append({name: values[prompt:] for name, values in tokens.items()})
        return items


def _last_supervised_run(labels: Sequence[int]) -> int:
    """Return where the last stretch of supervised tokens begins."""
    place = len(labels)
    while labels[place - 1] == IGNORE_INDEX:
        place -= 1
    while place and labels[place - 1] != IGNORE_INDEX:
        place -= 1
    return place


def _num_shared_tokens(rows: Sequence[Encoded]) -> int:
    """Return the number of tokens with which all rows begin."""
    columns = list(zip(*(row.input_ids for row in rows), strict=False))
    return next((place for place, ids in enumerate(columns) if len(set(ids)) > 1), len(columns))


def make_candidate_collator(processor: Processor) -> Callable[[Sequence[list[SampleInputs] | Skipped]], SampleInputs]:
    """Return what makes the batches `prompt`, of one row, and `replies`, of N rows, from the item of one trial."""
    collate = Collator.of(processor)

    def collate_trial(items: Sequence[list[SampleInputs] | Skipped]) -> SampleInputs:
        """Collate the prompt and the candidates of the one trial in a batch."""
        (item,) = items
        if isinstance(item, Skipped):
            return {SKIPPED_KEY: [item]}
        return {"prompt": dict(collate(item[:1])), "replies": dict(collate(item[1:]))}

    return collate_trial


class CandidateLosses:
    """Computes losses of candidates: `CandidateLosses(compute_losses, rows, gather)(prompt, replies)`, `(N,)`.

    The first call also reads the own text without the cache, to find out whether the model continues from it rightly.
    All ranks decide that together.

    Args:
        compute_losses: computes losses of the model, which is in evaluation mode.
        max_rows: the largest number of candidates that the model reads at once.
        gather: gathers the rows of a tensor from all ranks.
    """

    def __init__(self, compute_losses: SupervisedScores, max_rows: int, gather: Callable[[Tensor], Tensor]):
        self.compute_losses, self.max_rows, self.gather = compute_losses, max_rows, gather
        self.model, self.is_checked = compute_losses.model, False

    @torch.no_grad()
    def __call__(self, prompt: Batch, replies: Batch) -> Tensor:
        """Return the mean loss per token of each candidate in float64, `(N,)`.

        Raises:
            ValueError: the model has no cache of keys and values, or does not continue from it.
        """
        inputs = {name: value for name, value in prompt.items() if name != "labels"}
        output = self.model(**inputs, use_cache=True, logits_to_keep=1)
        if getattr(output, "past_key_values", None) is None:
            raise ValueError(
                f"retrieval: {self._model_name} returns no cache of keys and values, which candidates are read "
                "behind; leave this metric out"
            )
        if self.compute_losses.in_head is None:
            self.compute_losses.prove(prompt)  # with the cache, it would be changed
        losses = []
        for rows in torch.arange(len(replies["labels"])).split(self.max_rows):
            cache = copy.deepcopy(output.past_key_values)
            cache.batch_repeat_interleave(len(rows))
            part = {name: value[rows.to(value.device)] for name, value in replies.items()}
            losses.append(self._continue(cache, output.logits[:, -1], prompt["attention_mask"], part))
        means = torch.cat(losses)
        if not self.is_checked:
            self._check(prompt, replies, float(means[0]), is_float32=output.logits.dtype == torch.float32)
            self.is_checked = True
        return means

    def _continue(self, cache: Any, logits: Tensor, prompt_mask: Tensor, replies: Batch) -> Tensor:
        """Return the mean losses of some candidates, `(N,)`; `logits`, `(1, vocabulary)`, are the prompt's last."""
        labels, mask = replies["labels"], replies["attention_mask"]
        inputs = replies | {"attention_mask": torch.cat([prompt_mask.expand(len(mask), -1), mask], dim=1)}
        positions = self._positions(prompt_mask.shape[1], *labels.shape)
        losses = self.compute_losses({**inputs, **positions, "past_key_values": cache, "use_cache": True})[0]
        sums, counts = row_losses(losses, labels)
        first = labels[:, 0]
        sums = sums.double() + F.cross_entropy(
            logits.float().expand(len(first), -1), first, reduction="none", ignore_index=IGNORE_INDEX
        )
        return sums / (counts + (first != IGNORE_INDEX))

    def _positions(self, start: int, rows: int, length: int) -> dict[str, Tensor]:
        """Return positions behind a prompt where a family's tokens have several, `(axes, N, T)`; others count on."""
        if not has_grid_positions(self.model):
            return {}
        offset = self.model.model.rope_deltas  # (1, 1), from the prompt
        positions = torch.arange(start, start + length, device=offset.device) + offset
        return {"position_ids": positions.expand(count_axes(self.model), rows, length)}

    def _check(self, prompt: Batch, replies: Batch, loss: float, *, is_float32: bool) -> None:
        """Refuse a model that gives a text of any rank another loss behind a cached prompt than in one pass."""
        own = {name: value[:1] for name, value in replies.items()}
        whole = prompt | {name: torch.cat([prompt[name], value], dim=1) for name, value in own.items()}
        sums, counts = row_losses(self.compute_losses(whole)[0], whole["labels"])
        pairs = self.gather(torch.stack([sums.new_tensor([loss]), sums / counts], dim=1)).tolist()  # one row a rank
        tolerance = 1e-2 if is_float32 else 5e-2  # TF32 rounds as well
        wrong = [pair for pair in pairs if not abs(pair[0] - pair[1]) <= tolerance * max(pair[1], 1)]
        if wrong:
            loss, expected = wrong[0]
            raise ValueError(
                f"retrieval: behind a cached prompt {self._model_name} gives a text the loss {loss:.5g}, in one pass "
                f"{expected:.5g}; another model.attn_implementation may be right, else leave this metric out"
            )

    @property
    def _model_name(self) -> str:
        return self.model.config.get_text_config().model_type


def score_own(losses: Tensor) -> np.ndarray:
    """Return for each trial whether the own text has the lowest loss: `(trials, N) -> (trials,)`, from 0 to 1.

    Where k other texts have the same lowest loss, the own text is found with a chance of 1 / (k + 1).
    """
    own = losses[:, :1]
    tolerance = TIE_TOLERANCE * own.abs()
    is_lowest = (losses[:, 1:] >= own - tolerance).all(dim=1)
    ties = ((losses[:, 1:] - own).abs() <= tolerance).sum(dim=1)
    return (is_lowest.double() / (ties + 1)).numpy()


def make_rows(dataset: SampleDataset, trials: Sequence[Trial], losses: Tensor, found: np.ndarray) -> list[Row]:
    """Return a row for each trial: its record, whether its own text was found, and all texts by their losses.

    `losses` are `(trials, N)`, and `found` is what `score_own` makes of them.
    """
    return [
        {
            "source": dataset.sample(trial.index).id,
            "text": trial.texts[0],
            "found": float(share),
            "texts": [{"loss": loss, "text": text} for loss, text in sorted(zip(row, trial.texts, strict=True))],
        }
        for trial, row, share in zip(trials, losses.tolist(), found, strict=True)
    ]
