"""The model `vlm` of lmms-eval: `lmms_eval --model vlm --model_args pretrained=FOLDER`.

Runs in lmms-eval's own environment, so no import of this module may need Hydra, omegaconf or DeepSpeed.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from typing import Any, Protocol, TypeVar

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult  # pyright: ignore[reportMissingImports]: of `.venv-eval`
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]: of `.venv-eval`
from PIL import Image
from tqdm import tqdm
from transformers import GenerationConfig

from vlm.config.dataset_schema import DatasetConfig
from vlm.config.schema import InferenceConfig
from vlm.data.batching.collator import Collator
from vlm.data.dataset import model_inputs
from vlm.data.encoding.labels import encode
from vlm.data.records.marks import find_marks
from vlm.data.sample import PLACEHOLDER, BadSample, Sample, Turn
from vlm.data.vision.images import media_sizes_from_opened
from vlm.evaluation.loss import row_losses
from vlm.inference.generate import VisionLanguageModel, check_length, on_device
from vlm.models.text_loss import SupervisedScores, token_losses

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Arguments = tuple[Any, ...]
"""Arguments of a request: context, options or continuation, function of the media, document number, task and split."""


class Request(Protocol):
    """A request of lmms-eval."""

    args: Arguments


MAX_NEW_TOKENS = 1024
"""The limit where a task sets none; the same as that of lmms-eval's own models."""

IGNORED_KWARGS = {"image_aspect_ratio"}
"""Options for LLaVA's own code; here the checkpoint's processor decides them."""


class LmmsModel(lmms):
    """A checkpoint that answers lmms-eval's requests.

    Args:
        pretrained: a run's `final` folder, or a name on the Hub.
        base: the new place of an adapter's base, if it was moved: a folder, or `part=folder;part=folder`.
        device: `cuda`, `cpu` …; None: a GPU where there is one; with several processes, one GPU each.
        dtype: `auto` (as saved), `float32`, `bfloat16` or `float16`.
        quantization: `8bit` or `4bit` for the language model.
        batch_size: number of requests in a batch.
        max_batch_size: ignored; lmms-eval passes it.
        max_frames: the largest number of frames read from a video.
        system_prompt: the system turn; empty: none.
        trust_remote_code: whether code in the checkpoint may run.
        max_image_tokens: the most tokens of an image; None: as the processor was saved.

    Raises:
        ValueError: it is no checkpoint of this framework, or has prediction heads.
    """

    is_simple = True

    def __init__(
        self, pretrained: str, *, base: str = "", device: str | None = None, dtype: str = "auto",
        quantization: str | None = None, batch_size: int | str = 1, max_batch_size: int | None = None,
        max_frames: int = DatasetConfig.max_frames, system_prompt: str = "", trust_remote_code: bool = False,
        max_image_tokens: int | None = None,
    ):  # fmt: skip
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size={batch_size}: at least 1 is needed")
        self.batch_size, self.max_frames = int(batch_size), max_frames
        self.system_prompt = self._resolve_system_prompt(system_prompt)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        device = str(self.accelerator.device) if self._world_size > 1 else device
        bases = [folder for folder in str(base).split(";") if folder]
        self.vlm = VisionLanguageModel.load(
            str(pretrained),
            device=device,
            dtype=dtype,
            quantization=quantization,
            base=bases,
            trust_remote_code=trust_remote_code,
            max_image_tokens=max_image_tokens,
        )
        self.compute_scores = SupervisedScores(self.vlm.model, score_tokens)

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.vlm.model.device

    def generate_until(self, requests: Sequence[Request]) -> list[str]:
        """Return an answer for each request, generated in batches of requests with equal options."""
        answers: dict[int, str] = {}

        def options_key(index: int) -> str:
            """Return a request's generation options as a string: one batch has the same ones."""
            return json.dumps(requests[index].args[1], sort_keys=True, default=str)

        order = sorted(range(len(requests)), key=lambda index: (options_key(index), -len(requests[index].args[0])))
        with tqdm(total=len(order), desc="answering", unit="request", disable=self.rank != 0) as bar:
            for _, group in groupby(order, options_key):
                for indices in _chunks(group, self.batch_size):
                    batch = self._generate_batch([requests[index] for index in indices])
                    answers |= zip(indices, batch, strict=True)
                    bar.update(len(indices))
        return [answers[index] for index in range(len(requests))]

    def _generate_batch(self, requests: Sequence[Request]) -> list[str]:
        conversations, media = self._make_conversations([request.args for request in requests])
        inputs = self.vlm.inputs(conversations, media)
        settings, extra_options, until = parse_generation_kwargs(requests[0].args[1])
        length = int(inputs["attention_mask"].sum(dim=1).max())
        check_length(length, self.vlm.positions, 1)
        settings.max_new_tokens = min(settings.max_new_tokens, self.vlm.positions - length)
        return [truncate_at_stop(answer, until) for answer in self.vlm.answers(inputs, settings, **extra_options)]

    def loglikelihood(self, requests: Sequence[Request]) -> list[GenerationResult]:
        """Return the loss of each continuation as the model's reply, and whether greedy decoding gives that reply.

        The loss is the mean over the reply's tokens, its ending included. lmms-eval's tasks expect a loss, despite the
        method's name (`pred = argmin`). lmms-eval turns any other result than a string or a `GenerationResult` into a
        string, so each pair is wrapped in one.
        """
        pairs: list[tuple[float, bool]] = []
        with tqdm(total=len(requests), desc="comparing", unit="request", disable=self.rank != 0) as bar:
            for batch in _chunks(requests, self.batch_size):
                pairs += self._score_batch([request.args for request in batch])
                bar.update(len(batch))
        return [GenerationResult(pair) for pair in pairs]

    @torch.no_grad()
    def _score_batch(self, arguments: Sequence[Arguments]) -> list[tuple[float, bool]]:
        if any(len(args) != 6 for args in arguments):
            raise ValueError("acc_mutual_info: continuations without a prompt cannot be compared; use acc")
        conversations, media = self._make_conversations(arguments)
        rows = []
        for turns, opened, args in zip(conversations, media, arguments, strict=True):
            number, task, split = args[-3:]
            reply = args[1] if isinstance(args[1], str) else str(args[1](self.task_dict[task][split][number]))
            sample = Sample(f"{task} {number}", (*turns, Turn("assistant", (reply.strip(),))))
            sizes = media_sizes_from_opened(sample.media, opened, self.vlm.processor)
            encoded = encode(self.vlm.processor, sample, sizes)
            check_length(len(encoded.input_ids), self.vlm.positions, 0)
            rows.append(model_inputs(self.vlm.processor, encoded, opened, sizes))
        batch = Collator.of(self.vlm.processor)(rows)
        labels = batch["labels"].to(self.device)
        inputs = self.vlm.use_cached_features(on_device(batch, self.vlm.processor, self.device))
        losses, misses = self.compute_scores({**inputs, "labels": labels})[0].unbind(dim=-1)
        sums, counts = row_losses(losses, labels)
        num_misses, _ = row_losses(misses, labels)
        return list(zip((sums / counts).tolist(), (num_misses == 0).tolist(), strict=True))

    def generate_until_multi_round(self, requests: Sequence[Request]) -> list[str]:
        """Refuse tasks of several rounds."""
        raise NotImplementedError("model vlm does not answer tasks of several rounds (generate_until_multi_round)")

    def _make_conversations(self, arguments: Sequence[Arguments]) -> tuple[list[list[Turn]], list[list[Any]]]:
        """Return requests as conversations that wait for a reply, and the opened images and videos of each."""
        conversations, media = [], []
        for context, _, get_media, number, task, split in arguments:
            parts = list(get_media(self.task_dict[task][split][number]) or [])
            images = [part for part in parts if isinstance(part, Image.Image)]
            videos = [part for part in parts if isinstance(part, str)]
            if kinds := sorted({type(part).__name__ for part in parts if not isinstance(part, Image.Image | str)}):
                raise ValueError(f"task {task}: it shows {', '.join(kinds)}; only images and videos can be shown")
            try:
                marks = [mark for mark in find_marks([context]) if mark.spelling == PLACEHOLDER]
                misplaced = len(marks) not in (0, len(images)) if images else any(mark.outer for mark in marks)
                if misplaced:
                    context = context.replace(PLACEHOLDER, "").strip()  # images then come first
                turn, opened = self.vlm.open_question(context, images, videos, self.max_frames, every_mark=True)
            except (ValueError, BadSample) as error:
                raise ValueError(f"task {task}, document {number}: {error}") from error
            system = [Turn("system", (self.system_prompt,))] if self.system_prompt else []
            conversations.append([*system, turn])
            media.append(opened)
        return conversations, media


def score_tokens(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return each token's loss, and 1 where another token is likelier, else 0: `(S, vocabulary), (S,) -> (S, 2)`."""
    misses = (logits.argmax(dim=-1) != targets).float()
    return torch.stack([token_losses(logits, targets), misses], dim=-1)


def parse_generation_kwargs(kwargs: dict[str, Any]) -> tuple[InferenceConfig, dict[str, object], list[str]]:
    """Return the settings, further options of transformers, and stop strings of a task's `generation_kwargs`.

    Without `do_sample: true` or a temperature above 0, answers are greedy.
    """
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    until = kwargs.pop("until", [])
    samples = kwargs.pop("do_sample", None)
    temperature = float(kwargs.pop("temperature", 1.0 if samples else 0.0))
    top_p = float(kwargs.pop("top_p", 0.0))
    settings = InferenceConfig(
        temperature=0.0 if samples is False else temperature,
        top_p=top_p if top_p > 0 else InferenceConfig.top_p,  # some tasks write 0 and mean greedy decoding
        num_beams=int(kwargs.pop("num_beams", InferenceConfig.num_beams)),
        max_new_tokens=int(kwargs.pop("max_new_tokens", MAX_NEW_TOKENS)),
    )
    known = GenerationConfig().to_dict()
    if unknown := sorted(kwargs.keys() - known.keys() - IGNORED_KWARGS):
        log.warning("ignoring generation_kwargs that are not supported: %s", ", ".join(unknown))
    extra_options = {name: value for name, value in kwargs.items() if name in known}
    return settings, extra_options, [until] if isinstance(until, str) else list(until)


def truncate_at_stop(answer: str, until: Sequence[str]) -> str:
    """Return an answer up to its first stop string."""
    for end in until:
        answer = answer.split(end, 1)[0] if end else answer
    return answer.strip()


def _chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    remaining = iter(items)
    return iter(lambda: list(islice(remaining, size)), [])
