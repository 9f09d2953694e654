"""What a model answers while it trains: to a few samples for the eye, and to evaluation records for metrics.

All ranks answer the same records in the same batches, since under ZeRO-3 every rank takes part in every call.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tqdm import tqdm
from transformers import TrainingArguments

from vlm.config.schema import RunConfig
from vlm.data.dataset import SampleDataset
from vlm.data.encoding.labels import encode_prompt, render
from vlm.data.encoding.prompts import prompt_turns
from vlm.data.records.open import value_or_bad_sample
from vlm.data.sample import BadSample, Sample, Turn
from vlm.data.vision.images import media_sizes_from_opened, open_media
from vlm.data.vision.video import DecodedVideo
from vlm.evaluation.loss import last_reply_text
from vlm.evaluation.text_metrics import compute_text_metrics
from vlm.inference.generate import VisionLanguageModel
from vlm.train.monitor.plots import append_sample_generations
from vlm.train.step.compile import force_eager
from vlm.train.trainer import VLMTrainer

log = logging.getLogger(__name__)


def generation_metrics(
    config: RunConfig, data: SampleDataset | None, processor: Any, args: TrainingArguments
) -> Callable[[Any], dict[str, float]] | None:
    """What gives `trainer.eval_metrics` of a model; None where none are wanted.

    Raises:
        ValueError: no evaluation record can be answered.
    """
    names = config.trainer.eval_metrics
    if not names or data is None:
        return None
    samples = select_answerable_samples(
        data, processor, config.trainer.eval_metrics_samples, config.inference.max_new_tokens
    )
    references = [list(sample.references) or [last_reply_text(sample)] for sample in samples]
    size = args.per_device_eval_batch_size

    def found(model: Any) -> dict[str, float]:
        generator = VisionLanguageModel(model, processor)
        answers: list[str] = []
        silent = args.disable_tqdm or not args.should_save
        for start in tqdm(range(0, len(samples), size), "answering", leave=False, disable=silent):
            prompts = [replace(sample, turns=prompt_turns(sample)) for sample in samples[start : start + size]]
            answers += generator.answer(
                [one.turns for one in prompts], [open_media(one) for one in prompts], config.inference,
                synced_gpus=dist.is_initialized(),
            )  # fmt: skip
        scores = compute_text_metrics(names, answers, references, intervals=False)
        return {name: score.value for name, score in scores.items() if score.value is not None}

    return found


def select_answerable_samples(data: SampleDataset, processor: Any, max_samples: int, answer_room: int) -> list[Sample]:
    """The first samples that end with a reply, and whose prompt leaves room for one.

    Args:
        data: the evaluation records.
        processor: the model's.
        max_samples: how many are wanted.
        answer_room: tokens that an answer may have.

    Raises:
        ValueError: there are none.
    """
    found = []
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
        if ids and len(ids) + answer_room <= longest:
            found.append(sample)
        if len(found) == max_samples:
            break
    if not found:
        raise ValueError(
            "trainer.eval_metrics: no evaluation record ends with a reply and leaves inference.max_new_tokens="
            f"{answer_room} tokens of {longest} for an answer"
        )
    log.info("trainer.eval_metrics: %d of %d evaluation records are answered", len(found), len(data))
    return found


def make_sample_generator(
    config: RunConfig, trainer: VLMTrainer, processor: Any, samples: list[Sample], folder: Path
) -> Any:
    """What answers a few samples into `samples.md`. All ranks generate, since ZeRO-3 needs them; rank 0 writes.

    Samples of which a template leaves no prompt (`plain`, text only), or whose pictures are torn, are passed over.
    """
    samples = [sample for sample in samples if any(turn.role == "assistant" for turn in sample.turns)]
    samples = [
        sample for sample in samples if render(processor, turns_before_last_reply(sample.turns), prompt=True).text
    ]
    opened = [(sample, value_or_bad_sample(open_media, sample)) for sample in samples]
    samples = [sample for sample, found in opened if not isinstance(found, BadSample)]
    pictures = [found for _, found in opened if not isinstance(found, BadSample)]
    prompts = [turns_before_last_reply(sample.turns) for sample in samples]
    # A prompt that ends before the last reply may not show the last pictures.
    prompt_images = [found[: sum(not isinstance(part, str) for turn in turns for part in turn.content)]
             for found, turns in zip(pictures, prompts, strict=True)]  # fmt: skip

    def answer(step: int) -> None:
        if not samples:
            return
        training = trainer.model.training
        trainer.model.eval()
        generator = VisionLanguageModel(trainer.model, processor)
        with trainer.compute_loss_context_manager(), force_eager():
            answers = generator.answer(prompts, prompt_images, config.inference, synced_gpus=dist.is_initialized())
        trainer.model.train(training)
        if trainer.is_world_process_zero():
            rows = [
                (
                    _join_text(turns[-1:]),
                    _join_text(sample.turns[len(turns) : len(turns) + 1]),
                    generated,
                    _preview_image(found),
                )
                for turns, sample, generated, found in zip(prompts, samples, answers, prompt_images, strict=True)
            ]
            append_sample_generations(step, rows, folder)

    return answer


def turns_before_last_reply(turns: Sequence[Turn]) -> list[Turn]:
    """The conversation up to its last reply, which is left for the model to give."""
    last = max(index for index, turn in enumerate(turns) if turn.role == "assistant")
    return list(turns[:last])


def _preview_image(opened: Sequence[Any]) -> Any:
    """The first picture of a sample, or of its first video; None where it has neither."""
    first = next(iter(opened), None)
    return first.frames[0] if isinstance(first, DecodedVideo) else first


def _join_text(turns: Sequence[Turn]) -> str:
    return "".join(part for turn in turns for part in turn.content if isinstance(part, str))
