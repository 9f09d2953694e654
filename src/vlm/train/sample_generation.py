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
from vlm.data.records.open import attempt
from vlm.data.sample import BadSample, Sample, Turn
from vlm.data.vision.images import open_pictures, seen_sizes
from vlm.data.vision.video import OpenVideo
from vlm.evaluation.loss import reply_text
from vlm.evaluation.text_metrics import measure
from vlm.inference.generate import VisionLanguageModel
from vlm.train.monitor.plots import write_answers
from vlm.train.step.compile import uncompiled
from vlm.train.trainer import VLMTrainer

log = logging.getLogger(__name__)


def answer_metrics(
    config: RunConfig, data: SampleDataset | None, processor: Any, args: TrainingArguments
) -> Callable[[Any], dict[str, float]] | None:
    """What gives `trainer.eval_metrics` of a model; None where none are wanted.

    Raises:
        ValueError: no evaluation record can be answered.
    """
    names = config.trainer.eval_metrics
    if not names or data is None:
        return None
    samples = answerable(data, processor, config.trainer.eval_metrics_samples, config.inference.max_new_tokens)
    references = [list(sample.references) or [reply_text(sample)] for sample in samples]
    size = args.per_device_eval_batch_size

    def found(model: Any) -> dict[str, float]:
        ready = VisionLanguageModel(model, processor)
        answers: list[str] = []
        silent = args.disable_tqdm or not args.should_save
        for start in tqdm(range(0, len(samples), size), "answering", leave=False, disable=silent):
            prompts = [replace(sample, turns=prompt_turns(sample)) for sample in samples[start : start + size]]
            answers += ready.answer(
                [one.turns for one in prompts], [open_pictures(one) for one in prompts], config.inference,
                synced_gpus=dist.is_initialized(),
            )  # fmt: skip
        scores = measure(names, answers, references, intervals=False)
        return {name: score.value for name, score in scores.items() if score.value is not None}

    return found


def answerable(data: SampleDataset, processor: Any, most: int, room: int) -> list[Sample]:
    """The first samples that end with a reply, and whose prompt leaves room for one.

    Args:
        data: the evaluation records.
        processor: the model's.
        most: how many are wanted.
        room: tokens that an answer may have.

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
        sizes = seen_sizes(prompt.media, open_pictures(prompt), processor) if processor.needs_sizes else []
        ids = encode_prompt(processor, prompt.turns, sizes)
        if ids and len(ids) + room <= longest:
            found.append(sample)
        if len(found) == most:
            break
    if not found:
        raise ValueError(
            "trainer.eval_metrics: no evaluation record ends with a reply and leaves inference.max_new_tokens="
            f"{room} tokens of {longest} for an answer"
        )
    log.info("trainer.eval_metrics: %d of %d evaluation records are answered", len(found), len(data))
    return found


def answerer(config: RunConfig, trainer: VLMTrainer, processor: Any, samples: list[Sample], folder: Path) -> Any:
    """What answers a few samples into `samples.md`. All ranks generate, since ZeRO-3 needs them; rank 0 writes.

    Samples of which a template leaves no prompt (`plain`, text only), or whose pictures are torn, are passed over.
    """
    samples = [sample for sample in samples if any(turn.role == "assistant" for turn in sample.turns)]
    samples = [sample for sample in samples if render(processor, until_last_reply(sample.turns), prompt=True).text]
    opened = [(sample, attempt(open_pictures, sample)) for sample in samples]
    samples = [sample for sample, found in opened if not isinstance(found, BadSample)]
    pictures = [found for _, found in opened if not isinstance(found, BadSample)]
    prompts = [until_last_reply(sample.turns) for sample in samples]
    # A prompt that ends before the last reply may not show the last pictures.
    shown = [found[: sum(not isinstance(part, str) for turn in turns for part in turn.content)]
             for found, turns in zip(pictures, prompts, strict=True)]  # fmt: skip

    def answer(step: int) -> None:
        if not samples:
            return
        training = trainer.model.training
        trainer.model.eval()
        ready = VisionLanguageModel(trainer.model, processor)
        with trainer.compute_loss_context_manager(), uncompiled():
            answers = ready.answer(prompts, shown, config.inference, synced_gpus=dist.is_initialized())
        trainer.model.train(training)
        if trainer.is_world_process_zero():
            rows = [
                (
                    _spoken(turns[-1:]),
                    _spoken(sample.turns[len(turns) : len(turns) + 1]),
                    said,
                    _to_show(found),
                )
                for turns, sample, said, found in zip(prompts, samples, answers, shown, strict=True)
            ]
            write_answers(step, rows, folder)

    return answer


def until_last_reply(turns: Sequence[Turn]) -> list[Turn]:
    """The conversation up to its last reply, which is left for the model to give."""
    last = max(index for index, turn in enumerate(turns) if turn.role == "assistant")
    return list(turns[:last])


def _to_show(opened: Sequence[Any]) -> Any:
    """The first picture of a sample, or of its first video; None where it has neither."""
    first = next(iter(opened), None)
    return first.frames[0] if isinstance(first, OpenVideo) else first


def _spoken(turns: Sequence[Turn]) -> str:
    return "".join(part for turn in turns for part in turn.content if isinstance(part, str))
