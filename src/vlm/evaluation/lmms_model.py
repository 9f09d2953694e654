"""Checkpoints of this framework as a model of lmms-eval: `lmms_eval --model vlm --model_args pretrained=FOLDER`.

Runs in lmms-eval's own environment, so nothing that this imports may need Hydra, omegaconf or DeepSpeed.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult  # pyright: ignore[reportMissingImports]: of `.venv-eval`
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]: of `.venv-eval`
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig

from vlm.config.schema import DatasetConfig, InferenceConfig
from vlm.data.batching.collator import Collator
from vlm.data.dataset import model_inputs
from vlm.data.encoding.labels import encode
from vlm.data.sample import PLACEHOLDER, BadSample, Sample, Turn
from vlm.data.vision.images import media_sizes_from_opened
from vlm.evaluation.loss import row_losses, supervised_logits
from vlm.inference.generate import VisionLanguageModel, check_length, on_device

log = logging.getLogger(__name__)

MAX_NEW_TOKENS = 1024
"""Where a task does not say how long an answer may be; as lmms-eval's own models have it."""

IGNORED_KWARGS = {"image_aspect_ratio"}
"""What tasks tell LLaVA's own code; here the checkpoint's processor decides it."""


class LmmsModel(lmms):
    """A checkpoint that answers lmms-eval's requests.

    Args:
        pretrained: a run's `final` folder, or a name on the Hub.
        base: where an adapter's base lies now, if it was moved: a folder, or `part=folder;part=folder`.
        device: `cuda`, `cpu` …; None: a GPU where there is one, of several processes one each.
        dtype: `auto` (as saved), `float32`, `bfloat16` or `float16`.
        quantization: `8bit` or `4bit` for the language model.
        batch_size: requests at a time.
        max_batch_size: not looked at; lmms-eval passes it.
        max_frames: of a video.
        system_prompt: said first.
        trust_remote_code: let code out of the checkpoint run.

    Raises:
        ValueError: it is no checkpoint of this framework, or one with prediction heads.
    """

    is_simple = True

    def __init__(
        self, pretrained: str, *, base: str = "", device: str | None = None, dtype: str = "auto",
        quantization: str | None = None, batch_size: int | str = 1, max_batch_size: int | None = None,
        max_frames: int = DatasetConfig.max_frames, system_prompt: str = "", trust_remote_code: bool = False,
    ):  # fmt: skip
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size={batch_size}: a number from 1 on is needed")
        self.batch_size, self.max_frames = int(batch_size), max_frames
        self.system_prompt = self._resolve_system_prompt(system_prompt)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        place = str(self.accelerator.device) if self._world_size > 1 else device
        self.asked = VisionLanguageModel.load(
            str(pretrained), device=place, dtype=dtype, quantization=quantization,
            base=[one for one in str(base).split(";") if one], trust_remote_code=trust_remote_code,
        )  # fmt: skip

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.asked.model.device

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """An answer for each request, generated in batches of requests that want the same."""
        answers: list[str] = [""] * len(requests)

        def get_request_key(place: int) -> str:
            return json.dumps(requests[place].args[1], sort_keys=True, default=str)

        order = sorted(range(len(requests)), key=lambda place: (get_request_key(place), -len(requests[place].args[0])))
        with tqdm(total=len(order), desc="answering", unit="request", disable=self.rank != 0) as bar:
            for _, group in groupby(order, get_request_key):
                for places in _chunks(group, self.batch_size):
                    for place, answer in zip(places, self._generate_batch([requests[p] for p in places]), strict=True):
                        answers[place] = answer
                    bar.update(len(places))
        return answers

    def _generate_batch(self, requests: Sequence[Any]) -> list[str]:
        """Answers to one batch."""
        conversations, media = self._make_conversations([one.args for one in requests])
        inputs = self.asked.inputs(conversations, media)
        settings, extra_options, until = parse_generation_kwargs(requests[0].args[1])
        length = int(inputs["attention_mask"].sum(dim=1).max())
        check_length(length, self.asked.positions, 1)
        settings.max_new_tokens = min(settings.max_new_tokens, self.asked.positions - length)
        return [truncate_at_stop(answer, until) for answer in self.asked.answers(inputs, settings, **extra_options)]

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """The loss of each continuation as the model's reply, and whether the model would give just that, greedily.

        It is the mean over the reply's tokens, its ending included. lmms-eval's tasks want a loss, the lower the
        better, whatever the method is called (`pred = argmin`). It makes a string of any result that is neither one
        nor a `GenerationResult`, so that is what each pair stands in.
        """
        found: list[tuple[float, bool]] = []
        with tqdm(total=len(requests), desc="comparing", unit="request", disable=self.rank != 0) as bar:
            for places in _chunks(range(len(requests)), self.batch_size):
                found += self._score_batch([requests[place].args for place in places])
                bar.update(len(places))
        return [GenerationResult(pair) for pair in found]

    @torch.no_grad()
    def _score_batch(self, arguments: Sequence[Any]) -> list[tuple[float, bool]]:
        """The losses of one batch."""
        for one in arguments:
            if len(one) != 6:
                raise ValueError("acc_mutual_info: continuations without a prompt cannot be compared; use acc")
        conversations, media = self._make_conversations([(one[0], {}, *one[2:]) for one in arguments])
        rows = []
        for turns, opened, one in zip(conversations, media, arguments, strict=True):
            reply = one[1] if isinstance(one[1], str) else str(one[1](self._get_document(one)))
            sample = Sample(f"{one[4]} {one[3]}", (*turns, Turn("assistant", (reply.strip(),))))
            sizes = media_sizes_from_opened(sample.media, opened, self.asked.processor)
            encoded = encode(self.asked.processor, sample, sizes)
            check_length(len(encoded.input_ids), self.asked.positions, 0)
            rows.append(model_inputs(self.asked.processor, encoded, opened, sizes))
        batch = Collator.of(self.asked.processor)(rows)
        labels = batch["labels"].to(self.device)
        inputs = self.asked.use_cached_features(on_device(batch, self.asked.processor, self.device))
        output, targets = supervised_logits(self.asked.model, {**inputs, "labels": labels})
        sums, counts = row_losses(output.logits, labels)
        correct = _all_correct(output.logits.argmax(dim=-1) == targets, counts)
        return list(zip((sums / counts).tolist(), correct, strict=True))

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refused.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("model vlm does not answer tasks of several rounds (generate_until_multi_round)")

    def _get_document(self, arguments: Sequence[Any]) -> Any:
        """What a request is about: `(context, …, document, task, split)`."""
        number, task, split = arguments[-3:]
        return self.task_dict[task][split][number]

    def _make_conversations(self, arguments: Sequence[Any]) -> tuple[list[list[Turn]], list[list[Any]]]:
        """Requests as conversations that wait for a reply, and what each of them shows, opened."""
        conversations, media = [], []
        for one in arguments:
            shown = list(one[2](self._get_document(one)) or [])
            images = [part for part in shown if isinstance(part, Image.Image)]
            videos = [part for part in shown if isinstance(part, str)]
            if len(images) + len(videos) < len(shown):
                kinds = sorted({type(part).__name__ for part in shown if not isinstance(part, Image.Image | str)})
                raise ValueError(f"task {one[4]}: it shows {', '.join(kinds)}; only images and videos can be shown")
            try:
                turn, opened = self.asked.open_question(
                    match_placeholders(one[0], len(images)), images, videos, self.max_frames
                )
            except (ValueError, BadSample) as error:
                raise ValueError(f"task {one[4]}, document {one[3]}: {error}") from error
            system = [Turn("system", (self.system_prompt,))] if self.system_prompt else []
            conversations.append([*system, turn])
            media.append(opened)
        return conversations, media


def match_placeholders(context: str, num_images: int) -> str:
    """A question whose `<image>` are as many as its images; otherwise they go, and the images stand before it."""
    if context.count(PLACEHOLDER) in (0, num_images):
        return context
    return context.replace(PLACEHOLDER, "").strip()


def parse_generation_kwargs(given: dict[str, Any]) -> tuple[InferenceConfig, dict[str, Any], list[str]]:
    """What a task's `generation_kwargs` ask for: our settings, transformers' further options, and what ends an answer.

    Without `do_sample: true` or a temperature above 0, answers are greedy.
    """
    given = {name: value for name, value in given.items() if value is not None}
    until = given.pop("until", [])
    samples = given.pop("do_sample", None)
    temperature = float(given.pop("temperature", 1.0 if samples else 0.0))
    settings = InferenceConfig(
        0.0 if samples is False else temperature, float(given.pop("top_p", InferenceConfig.top_p)),
        int(given.pop("num_beams", InferenceConfig.num_beams)), int(given.pop("max_new_tokens", MAX_NEW_TOKENS)),
    )  # fmt: skip
    if settings.top_p <= 0:  # how some tasks write greedy
        settings.top_p = InferenceConfig.top_p
    known = GenerationConfig().to_dict()
    if unknown := sorted(given.keys() - known.keys() - IGNORED_KWARGS):
        log.warning("generation_kwargs that no model here takes are left out: %s", ", ".join(unknown))
    extra_options = {name: value for name, value in given.items() if name in known}
    return settings, extra_options, [until] if isinstance(until, str) else list(until)


def truncate_at_stop(answer: str, until: Sequence[str]) -> str:
    """An answer up to the first of what ends it."""
    for end in until:
        answer = answer.split(end, 1)[0] if end else answer
    return answer.strip()


def _chunks(places: Iterable[int], size: int) -> Iterator[list[int]]:
    given = list(places)
    return (given[start : start + size] for start in range(0, len(given), size))


def _all_correct(correct: Tensor, counts: Tensor) -> list[bool]:
    """Whether all of each row's supervised tokens are right: `(S,), (B,) -> B values`."""
    return [bool(one.all()) for one in correct.split(counts.long().tolist())]
