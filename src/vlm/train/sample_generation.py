"""Replies of a model while it trains: to a few samples for people to look at, and to evaluation records for metrics.

All ranks answer the same records in the same batches, since under ZeRO-3 every rank takes part in every call.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tqdm import tqdm
from transformers import PreTrainedModel, TrainingArguments

from vlm.config.schema import InferenceConfig, RunConfig
from vlm.data.dataset import SampleDataset
from vlm.data.encoding.labels import encode_prompt, render
from vlm.data.encoding.prompts import prompt_turns
from vlm.data.processor import Processor
from vlm.data.records.open import value_or_bad_sample
from vlm.data.sample import BadSample, Sample, Turn
from vlm.data.vision.images import media_sizes_from_opened, open_media
from vlm.data.vision.video import DecodedVideo
from vlm.evaluation.loss import last_reply_text
from vlm.evaluation.text_metrics import compute_text_metrics
from vlm.inference.generate import VisionLanguageModel
from vlm.train.monitor.plots import append_sample_generations
from vlm.train.objectives.base import ObjectiveTrainer
from vlm.train.step.compile import force_eager

log = logging.getLogger(__name__)


def make_answer_metrics(
    config: RunConfig, data: SampleDataset, processor: Processor, args: TrainingArguments
) -> Callable[[PreTrainedModel], dict[str, float]]:
    """Return what computes `trainer.eval_metrics` of a model's answers to evaluation records.

    Raises:
        ValueError: no evaluation record can be answered.
    """
    names, settings = config.trainer.eval_metrics, config.inference
    samples = select_answerable_samples(data, processor, config.trainer.eval_metrics_samples, settings.max_new_tokens)
    references = [list(sample.references) or [last_reply_text(sample)] for sample in samples]
    size = args.per_device_eval_batch_size

    def compute(model: PreTrainedModel) -> dict[str, float]:
        generator = VisionLanguageModel(model, processor)
        answers: list[str] = []
        silent = args.disable_tqdm or not args.should_save
        for start in tqdm(range(0, len(samples), size), "answering", leave=False, disable=silent):
            prompts = [replace(sample, turns=prompt_turns(sample)) for sample in samples[start : start + size]]
            turns, media = [prompt.turns for prompt in prompts], [open_media(prompt) for prompt in prompts]
            answers += generator.answer(turns, media, settings, synced_gpus=dist.is_initialized())
        scores = compute_text_metrics(names, answers, references, intervals=False)
        return {name: score.value for name, score in scores.items() if score.value is not None}

    return compute


def select_answerable_samples(
    data: SampleDataset, processor: Processor, max_samples: int, max_new_tokens: int
) -> list[Sample]:
    """Return the first samples that end with a reply, and whose prompt leaves room for an answer.

    Args:
        data: the evaluation records.
        processor: the model's processor.
        max_samples: most samples that are returned.
        max_new_tokens: tokens that an answer may have.

    Raises:
        ValueError: there are none.
    """
    selected = []
    longest = data.sources[0].encoder.longest
    for index in range(len(data)):
        sample = data.sample(index)
        prompt = replace(sample, turns=prompt_turns(sample))
        if sample.turns[-1].role != "assistant" or not prompt.turns:
            continue
        sizes = (
            media_sizes_from_opened(prompt.media, open_media(prompt), processor) if processor.needs_image_sizes else []
        )
        ids = encode_prompt(processor, prompt.turns, sizes)
        if ids and len(ids) + max_new_tokens <= longest:
            selected.append(sample)
        if len(selected) == max_samples:
            break
    if not selected:
        raise ValueError(
            "trainer.eval_metrics: no evaluation record ends with a reply and leaves inference.max_new_tokens="
            f"{max_new_tokens} tokens of {longest} for an answer"
        )
    log.info("trainer.eval_metrics: %d of %d evaluation records are answered", len(selected), len(data))
    return selected


def make_sample_generator(
    settings: InferenceConfig, trainer: ObjectiveTrainer, processor: Processor, samples: Sequence[Sample], folder: Path
) -> Callable[[int], None]:
    """Return what answers a few samples at a step, and adds the answers to `samples.md`.

    All ranks generate, since ZeRO-3 needs them; rank 0 writes. Samples of which a template leaves no prompt (`plain`,
    text only), or whose images do not open, are passed over.
    """
    opened = [(sample, value_or_bad_sample(open_media, sample)) for sample in samples if _has_prompt(sample, processor)]
    usable = [(sample, media) for sample, media in opened if not isinstance(media, BadSample)]
    prompts = [turns_before_last_reply(sample.turns) for sample, _ in usable]
    # A prompt that ends before the last reply may not show the last images.
    prompt_media = [
        media[: sum(not isinstance(part, str) for turn in turns for part in turn.content)]
        for (_, media), turns in zip(usable, prompts, strict=True)
    ]

    def generate(step: int) -> None:
        if not usable:
            return
        training = trainer.model.training
        trainer.model.eval()
        generator = VisionLanguageModel(trainer.model, processor)
        with trainer.compute_loss_context_manager(), force_eager():
            answers = generator.answer(prompts, prompt_media, settings, synced_gpus=dist.is_initialized())
        trainer.model.train(training)
        if trainer.args.process_index == 0:
            rows = [
                (_join_text(turns[-1:]), _join_text(sample.turns[len(turns) : len(turns) + 1]), answer, _preview(media))
                for (sample, _), turns, answer, media in zip(usable, prompts, answers, prompt_media, strict=True)
            ]
            append_sample_generations(step, rows, folder)

    return generate


def _has_prompt(sample: Sample, processor: Processor) -> bool:
    """Return whether a sample has a reply, and its template leaves something before the last one."""
    if not any(turn.role == "assistant" for turn in sample.turns):
        return False
    return bool(render(processor, turns_before_last_reply(sample.turns), prompt=True).text)


def turns_before_last_reply(turns: Sequence[Turn]) -> list[Turn]:
    """Return the conversation up to its last reply, which is left for the model to give."""
    last = max(index for index, turn in enumerate(turns) if turn.role == "assistant")
    return list(turns[:last])


def _preview(opened: Sequence[object]) -> Any:
    """Return the first image of a sample, or of its first video; None where it has neither."""
    first = next(iter(opened), None)
    return first.frames[0] if isinstance(first, DecodedVideo) else first


def _join_text(turns: Sequence[Turn]) -> str:
    return "".join(part for turn in turns for part in turn.content if isinstance(part, str))
