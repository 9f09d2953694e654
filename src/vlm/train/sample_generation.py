"""Replies of a model while it trains: to a few samples for people to look at, and to evaluation records for metrics.

All ranks answer the same records in the same batches, since under ZeRO-3 every rank takes part in every call.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch.distributed as dist
from PIL import Image
from transformers import PreTrainedModel, TrainingArguments

from vlm.config.schema import InferenceConfig, RunConfig
from vlm.data.coordinates.answers import parse_answer_to_sample, true_objects_of_reply
from vlm.data.coordinates.drawing import draw_objects, objects_of_image
from vlm.data.dataset import SampleDataset
from vlm.data.encoding.labels import encode_prompt, render
from vlm.data.encoding.prompts import prompt_turns
from vlm.data.encoding.thinking import without_thinking
from vlm.data.objects import MarkedObject
from vlm.data.processor import Processor
from vlm.data.progress import show_progress
from vlm.data.records.positions import value_or_bad_sample
from vlm.data.sample import BadSample, ImageRef, Sample, ToolCallTurn, Turn
from vlm.data.vision.images import media_sizes_from_opened, open_media, upright_size
from vlm.data.vision.video import DecodedVideo
from vlm.evaluation.loss import last_reply_text
from vlm.evaluation.object_metrics import OBJECT_METRICS, ObjectAnswer, check_measurable
from vlm.evaluation.text_metrics import compute_answer_metrics
from vlm.inference.generate import VisionLanguageModel, decode_answer, prompt_inputs
from vlm.train.monitor.plots import AnsweredSample, append_sample_generations
from vlm.train.monitor.trackers import SampleSender
from vlm.train.objectives.base import ObjectiveTrainer
from vlm.train.step.compile import force_eager

log = logging.getLogger(__name__)


def make_answer_metrics(
    names: Sequence[str], config: RunConfig, data: SampleDataset, processor: Processor, args: TrainingArguments
) -> Callable[[PreTrainedModel, Callable[[], None]], dict[str, float]]:
    """Return what computes these of `trainer.eval_metrics` of a model's answers to evaluation records.

    It is called with the model, and with what is to be called after each batch of answers.

    Raises:
        ValueError: no evaluation record can be answered, or none tells a place that a metric measures.
    """
    settings = config.inference
    samples = _answerable_samples(data, processor, config.trainer.eval_metrics_samples, settings.max_new_tokens)
    prompts = [replace(sample, turns=prompt_turns(sample)) for sample in samples]
    references = [list(sample.references) or [without_thinking(last_reply_text(sample))] for sample in samples]
    of_objects = [name for name in names if name in OBJECT_METRICS]
    true_places = [true_objects_of_reply(sample, processor) if of_objects else [] for sample in samples]
    check_measurable(of_objects, true_places)
    size = args.per_device_eval_batch_size

    def compute(model: PreTrainedModel, on_batch: Callable[[], None]) -> dict[str, float]:
        """Return the metrics of the model's answers to the prompts."""
        generator = VisionLanguageModel(model, processor)
        answers: list[str] = []
        found: list[list[MarkedObject]] = []
        silent = args.disable_tqdm or not args.should_save
        for start in show_progress(range(0, len(prompts), size), "answering", silent=silent):
            batch = prompts[start : start + size]
            turns, media = [prompt.turns for prompt in batch], [open_media(prompt) for prompt in batch]
            tools = [prompt.tools for prompt in batch]
            new = generator.answer(turns, media, settings, tools=tools, synced_gpus=dist.is_initialized())
            asked = zip(new, samples[start : start + size], media, strict=True)
            found += [
                parse_answer_to_sample(answer, processor, sample, _image_sizes(sample, opened))
                for answer, sample, opened in asked
            ]
            answers += new
            on_batch()
        answers = list(map(without_thinking, answers))
        objects = list(map(ObjectAnswer, found, true_places))
        scores = compute_answer_metrics(names, answers, references, objects, intervals=False)
        return {name: score.value for name, score in scores.items() if score.value is not None}

    return compute


def _answerable_samples(
    data: SampleDataset, processor: Processor, max_samples: int, max_new_tokens: int
) -> list[Sample]:
    """Return the first samples that end with a reply, and whose prompt leaves room for an answer."""
    longest = data.sources[0].encoder.longest

    def leaves_room(sample: Sample) -> bool:
        """Return whether a sample has a reply to compare with, and room for an answer of full length."""
        prompt = replace(sample, turns=prompt_turns(sample))
        if sample.turns[-1].role != "assistant" or not prompt.turns:
            return False
        last = sample.turns[-1]
        has_text = last.supervised and not isinstance(last, ToolCallTurn)  # templates write calls in many forms
        if not (has_text or sample.references):  # no reply to hold an answer against
            return False
        needs_sizes = processor.needs_image_sizes
        sizes = media_sizes_from_opened(prompt.media, open_media(prompt), processor) if needs_sizes else []
        ids = encode_prompt(processor, prompt.turns, sizes, tools=prompt.tools)
        return bool(ids) and len(ids) + max_new_tokens <= longest

    answerable = filter(leaves_room, map(data.sample, range(len(data))))
    selected = list(islice(answerable, max_samples))
    if not selected:
        raise ValueError(
            "trainer.eval_metrics: no evaluation record ends with a reply and leaves room for inference.max_new_tokens="
            f"{max_new_tokens} of {longest} tokens; lower it, or give other records"
        )
    log.info("trainer.eval_metrics are measured on answers to %d of %d evaluation records", len(selected), len(data))
    return selected


@dataclass(frozen=True)
class OpenedPrompt:
    """What a model answers of a sample: the turns before the last reply, and their opened images and videos."""

    sample: Sample
    turns: list[Turn]
    media: Sequence[Image.Image | DecodedVideo]
    reference: str


def open_prompts(processor: Processor, samples: Sequence[Sample]) -> list[OpenedPrompt]:
    """Return the prompts of samples.

    Samples of which a template leaves no prompt (`plain`, text only), whose images do not open, or which the processor
    refuses, are passed over.
    """
    prompts = []
    for sample in samples:
        replies = [index for index, turn in enumerate(sample.turns) if turn.role == "assistant"]
        turns = list(sample.turns[: replies[-1] if replies else 0])
        media = value_or_bad_sample(partial(_open_prompt, processor, turns), sample) if turns else None
        if media is not None and not isinstance(media, BadSample):
            prompts.append(OpenedPrompt(sample, turns, media, _join_text([sample.turns[replies[-1]]])))
    return prompts


def generate_answers(
    trainer: ObjectiveTrainer,
    processor: Processor,
    prompts: Sequence[OpenedPrompt],
    settings: InferenceConfig,
    **options: object,
) -> list[list[int]]:
    """Return the ids of a training model's answers, with ends and padding; all ranks call it together.

    Further `options` are transformers' own of generation.
    """
    training = trainer.model.training
    trainer.model.eval()
    generator = VisionLanguageModel(trainer.model, processor)
    inputs = generator.inputs(
        [prompt.turns for prompt in prompts],
        [prompt.media for prompt in prompts],
        tools_of=[prompt.sample.tools for prompt in prompts],
    )
    with trainer.compute_loss_context_manager(), force_eager():
        answers = generator.answer_ids(inputs, settings, synced_gpus=dist.is_initialized(), **options)
    trainer.model.train(training)
    return answers


def make_sample_generator(
    settings: InferenceConfig, trainer: ObjectiveTrainer, processor: Processor, samples: Sequence[Sample], folder: Path
) -> Callable[[int], None]:
    """Return what answers a few samples at a step, adds the answers to `samples.md` and sends them to trackers.

    All ranks generate, since ZeRO-3 needs them; rank 0 writes. See `open_prompts` for the samples that are passed over.
    """
    send, prompts = SampleSender(trainer), open_prompts(processor, samples)

    def generate(step: int) -> None:
        """Let the model answer the prompts, and write its answers down."""
        if not prompts:
            return
        ids = generate_answers(trainer, processor, prompts, settings)
        if trainer.args.process_index == 0:
            generated = []
            for prompt, answer in zip(prompts, (decode_answer(processor, row) for row in ids), strict=True):
                drawn = _draw(processor, prompt.sample, answer, prompt.media)
                question, shown = _join_text(prompt.turns[-1:]), _preview(prompt.media)
                generated.append(AnsweredSample(question, prompt.reference, answer, shown, drawn))
            append_sample_generations(step, generated, folder)
            send(step, generated)

    return generate


def _open_prompt(
    processor: Processor, turns: Sequence[Turn], sample: Sample
) -> Sequence[Image.Image | DecodedVideo] | None:
    """Return the opened images and videos of a prompt, the first ones of a sample; None if nothing is left of it.

    Raises:
        BadSample: one does not open, or the template or the processor refuses the prompt.
    """
    if not sample.tools and not render(processor, turns, sample.id, prompt=True).text:
        return None
    media = open_media(sample)[: len(Sample(sample.id, tuple(turns)).media)]
    prompt_inputs(processor, turns, media, tools=sample.tools)
    return media


def _preview(opened: Sequence[object]) -> Any:
    """Return the first image of a sample, or of its first video; None if it has neither."""
    first = next(iter(opened), None)
    return first.frames[0] if isinstance(first, DecodedVideo) else first


def _draw(
    processor: Processor, sample: Sample, answer: str, opened: Sequence[Image.Image | DecodedVideo]
) -> Image.Image | None:
    """Return the first image of a sample with its true objects and those of an answer; None if it has neither."""
    first = next(iter(opened), None)
    if not isinstance(first, Image.Image) or sample.images[0].frame is not None:
        return None
    sizes = _image_sizes(sample, opened)
    true = objects_of_image(true_objects_of_reply(sample, processor, sizes), 0)
    found = objects_of_image(parse_answer_to_sample(answer, processor, sample, sizes), 0)
    return draw_objects(first, true, found) if true or found else None


def _image_sizes(sample: Sample, opened: Sequence[Image.Image | DecodedVideo]) -> list[tuple[int, int]]:
    """Return the upright heights and widths of a sample's opened images, frames of videos left out."""
    pairs = zip(sample.media, opened, strict=False)  # a prompt shows the first ones of its sample
    shown = [(ref, medium) for ref, medium in pairs if isinstance(ref, ImageRef) and ref.frame is None]
    return [upright_size(medium) for _, medium in shown if isinstance(medium, Image.Image)]


def _join_text(turns: Sequence[Turn]) -> str:
    return "".join(part for turn in turns for part in turn.content if isinstance(part, str))
