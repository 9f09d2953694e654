"""Asking a model about images: `VisionLanguageModel.load(checkpoint).generate("What is this?", ["cat.png"])`."""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from threading import Thread
from typing import Any, Self, cast

import torch
from transformers import PreTrainedModel, StoppingCriteria, TextIteratorStreamer

from vlm.assembly.checkpoint import open_checkpoint
from vlm.assembly.language_models import max_positions
from vlm.config.dataset_schema import DatasetConfig
from vlm.config.schema import InferenceConfig
from vlm.data.batching.collator import Collator
from vlm.data.coordinates.answers import decode_answer
from vlm.data.dataset import model_inputs
from vlm.data.encoding.labels import IGNORE_INDEX, Encoded, Tool, encode_prompt, reply_ending
from vlm.data.processor import Processor, SampleInputs
from vlm.data.sample import (
    BadSample,
    Sample,
    Turn,
    VideoRef,
)
from vlm.data.sources import parts_for_video
from vlm.data.vision.images import Medium, media_sizes_from_opened, open_media
from vlm.inference.feature_cache import ImageFeatureCache
from vlm.inference.prompts import (
    STAND_IN_IMAGE,
    ImageInput,
    VideoInput,
    check_videos,
    errors_without_record,
    load_images,
    media_per_prompt,
    user_turn,
)


class VisionLanguageModel:
    """A model with its processor, ready to generate answers.

    Args:
        model: the model, composed or of a family.
        processor: the model's processor.
        feature_cache: keeps features of recent images; None where the visual encoder's weights may change.
    """

    def __init__(self, model: PreTrainedModel, processor: Processor, feature_cache: ImageFeatureCache | None = None):
        self.model, self.processor, self.feature_cache = model, processor, feature_cache

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        *,
        device: str | None = None,
        dtype: str = "auto",
        quantization: str | None = None,
        base: Sequence[str] = (),
        trust_remote_code: bool = False,
        max_image_tokens: int | None = None,
    ) -> Self:
        """Load a checkpoint of this framework, from a folder or the Hub, for inference.

        Features of recent images are kept: set `feature_cache` to None before you change the model's weights.

        Args:
            checkpoint: a run's `final` folder, or a Hub name.
            device: `cuda`, `cpu` …; None: a GPU where there is one.
            dtype: `auto` (as saved), `float32`, `bfloat16` or `float16`.
            quantization: `8bit` or `4bit` for the language model; bitsandbytes then chooses the device.
            base: the new place of an adapter's base, if it was moved: a folder, or `part=folder` for each part.
            trust_remote_code: whether code in the checkpoint may run; needed only where a part is a custom class.
            max_image_tokens: the most tokens of an image, see `DatasetConfig`; None: as the processor was saved.

        Raises:
            ValueError: the folder or name is no checkpoint of this framework.
        """
        opened = open_checkpoint(checkpoint, trust_remote_code=trust_remote_code)
        opened.check_heads(expected=False)
        model, processor = opened.load_for_inference(
            device=device, dtype=dtype, quantization=quantization, base=base, max_image_tokens=max_image_tokens
        )
        return cls(model, processor, ImageFeatureCache())

    def generate(
        self,
        prompt: str | Sequence[str],
        images: Sequence[ImageInput] | Sequence[Sequence[ImageInput]] = (),
        videos: Sequence[VideoInput] | Sequence[Sequence[VideoInput]] = (),
        *,
        max_frames: int = DatasetConfig.max_frames,
        temperature: float = InferenceConfig.temperature,
        top_p: float = InferenceConfig.top_p,
        num_beams: int = InferenceConfig.num_beams,
        max_new_tokens: int = InferenceConfig.max_new_tokens,
        **kwargs: object,
    ) -> str | list[str]:
        """Generate the answer to one prompt, or to several at once.

        Args:
            prompt: the question, or a list of questions. `<image>` marks the place of an image; without a mark, images
                come first. The mark of a single image is a word if it stands within a sentence.
            images: the images (paths or Pillow images) of the prompt; for several prompts, a list for each.
            videos: the videos (paths), likewise; `<video>` marks the place of a video.
            max_frames: the largest number of frames read from a video, evenly spread.
            temperature: 0 is greedy.
            top_p: nucleus sampling.
            num_beams: beam search where above 1.
            max_new_tokens: the largest number of tokens in an answer.
            kwargs: passed on to transformers' `generate`.

        Returns:
            The answer, or the answers in order.

        Raises:
            ValueError: a prompt has more or fewer marks than images or videos, a file does not open, or prompt and
                answer may exceed the model's positions.
        """
        turns, media = self.conversations(prompt, images, videos, max_frames)
        settings = InferenceConfig(temperature, top_p, num_beams, max_new_tokens)
        inputs = self.inputs(turns, media)
        self.check_length(inputs, settings)
        answers = self.answers(inputs, settings, **kwargs)
        return answers[0] if isinstance(prompt, str) else answers

    def conversations(
        self, prompt: str | Sequence[str], images: Sequence[object], videos: Sequence[object], max_frames: int
    ) -> tuple[list[list[Turn]], list[list[Medium]]]:
        """Return each prompt as a conversation that waits for a reply, and its opened images and videos.

        Raises:
            ValueError: as `generate`.
        """
        if isinstance(prompt, str):
            prompt, images, videos = [prompt], [images], [videos]
        images_per_prompt = media_per_prompt(images, len(prompt), "images")
        videos_per_prompt = media_per_prompt(videos, len(prompt), "videos")
        questions = [
            self.open_question(text, its_images, its_videos, max_frames)
            for text, its_images, its_videos in zip(prompt, images_per_prompt, videos_per_prompt, strict=True)
        ]
        return [[turn] for turn, _ in questions], [media for _, media in questions]

    def open_question(
        self,
        prompt: str,
        images: Sequence[ImageInput],
        videos: Sequence[VideoInput] = (),
        max_frames: int = DatasetConfig.max_frames,
        *,
        every_mark: bool = False,
    ) -> tuple[Turn, list[Medium]]:
        """Return a question as a turn, and its opened images and videos in the order of their places in it.

        `every_mark` is that of `user_turn`.

        Raises:
            ValueError: as `generate`.
        """
        check_videos(videos, max_frames)
        with errors_without_record():
            refs = [(VideoRef(Path(path)), str(path)) for path in videos]
            video_parts = [parts_for_video(ref, max_frames, self.processor, name) for ref, name in refs]
            turn = user_turn(prompt, len(images), video_parts, every_mark=every_mark)
            shown = Turn("user", tuple(chain.from_iterable(video_parts)))
            frames = iter(open_media(Sample("prompt", (shown,))))
        opened_images = iter(load_images(images))
        media = [part for part in turn.content if not isinstance(part, str)]
        return turn, [next(opened_images if part == STAND_IN_IMAGE else frames) for part in media]

    def answer(
        self,
        conversations: Sequence[Sequence[Turn]],
        images: Sequence[Sequence[Medium]],
        settings: InferenceConfig,
        *,
        tools: Sequence[Sequence[Tool]] = (),
        **kwargs: object,
    ) -> list[str]:
        """Return the next reply of each conversation, which may have tools; each is what it would get by itself."""
        return self.answers(self.inputs(conversations, images, tools_of=tools), settings, **kwargs)

    def answers(self, inputs: dict[str, torch.Tensor], settings: InferenceConfig, **kwargs: object) -> list[str]:
        """Return the model's answer to each row of a batch."""
        return [decode_answer(self.processor, ids) for ids in self.answer_ids(inputs, settings, **kwargs)]

    def answer_ids(
        self, inputs: dict[str, torch.Tensor], settings: InferenceConfig, **kwargs: object
    ) -> list[list[int]]:
        """Return the ids of the model's answer to each row of a batch, with ends and padding."""
        options = {**self.generation_options(settings), **kwargs}
        output = self._generate_ids(**self.use_cached_features(inputs), **options)
        return output[:, inputs["input_ids"].shape[1] :].tolist()

    def use_cached_features(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return a batch in which cached features replace pixels, see `ImageFeatureCache`."""
        return inputs if self.feature_cache is None else self.feature_cache.replace_pixels(self.model, inputs)

    def stream(
        self, conversation: Sequence[Turn], images: Sequence[Medium], settings: InferenceConfig
    ) -> Generator[str]:
        """Yield the next reply piece by piece as it is generated; see `stream_batch`."""
        return self.stream_batch(self.inputs([conversation], [images]), settings)

    def stream_batch(self, inputs: dict[str, torch.Tensor], settings: InferenceConfig) -> Generator[str]:
        """Yield the answer to the only row of a batch piece by piece; closing the generator stops the model."""
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        cancel = CancelCriteria()
        options = {**self.use_cached_features(inputs), **self.generation_options(settings)}
        failure: list[BaseException] = []

        def work() -> None:
            """Generate; keep an error, to be raised in the thread that reads the stream."""
            try:
                self._generate_ids(**options, streamer=streamer, stopping_criteria=[cancel])
            except BaseException as error:
                failure.append(error)
                streamer.end()

        thread = Thread(target=work, daemon=True)
        thread.start()
        try:
            yield from filter(None, streamer)
        finally:
            cancel.cancelled = True
            thread.join()
        if failure:
            raise failure[0]

    def inputs(
        self,
        conversations: Sequence[Sequence[Turn]],
        images: Sequence[Sequence[Medium]],
        *,
        suffix: Sequence[int] = (),
        left: bool = True,
        device: torch.device | None = None,
        tools: Sequence[Tool] = (),
        tools_of: Sequence[Sequence[Tool]] = (),
        thinking: bool | None = None,
    ) -> dict[str, torch.Tensor]:
        """Return the model's inputs for conversations that wait for a reply.

        Args:
            conversations: the turns of each conversation.
            images: the images and videos of each as `open_media` returns them, in order.
            suffix: ids to append to each prompt.
            left: whether to pad on the left, as generation needs.
            device: where the inputs go; None: to the model's device.
            tools: those that the model may call, for templates that list them.
            tools_of: those of each conversation, where they are not the same for all.
            thinking: whether the model is to think before, for templates that ask; None: as the processor is set.

        Returns:
            `input_ids` and `attention_mask` `(rows, tokens)`, and the inputs of images.

        Raises:
            ValueError: the model's template or processor refuses a conversation, or leaves nothing of it.
        """
        prompts = zip(conversations, images, tools_of or [tools] * len(conversations), strict=True)
        with errors_without_record():
            rows = [
                prompt_inputs(self.processor, turns, opened, suffix, own, thinking) for turns, opened, own in prompts
            ]
        return on_device(Collator.of(self.processor, left=left)(rows), self.processor, device or self.model.device)

    @property
    def positions(self) -> int:
        """The largest number of tokens that a prompt and its answer may have together."""
        return max_positions(self.model.config)

    def check_length(self, inputs: dict[str, torch.Tensor], settings: InferenceConfig, subject: str = "prompt") -> None:
        """Raise ValueError where a prompt of a batch and its answer may exceed the model's positions."""
        check_length(int(inputs["attention_mask"].sum(dim=1).max()), self.positions, settings.max_new_tokens, subject)

    def generation_options(self, settings: InferenceConfig) -> dict[str, Any]:
        """Return transformers' generation options; generation ends where the chat template ends a reply.

        Raises:
            ValueError: the cache is to be offloaded, and the model is on no GPU.
        """
        tokenizer = self.processor.tokenizer
        options = {
            **{name: value for name, value in asdict(settings).items() if name != "thinking"},  # the prompt's
            "use_cache": True,  # training switches it off in the configuration
            "do_sample": settings.temperature > 0,
            "pad_token_id": tokenizer.pad_token_id,
        }
        if settings.temperature == 0:
            del options["temperature"], options["top_p"]
        if settings.cache_implementation is None:
            del options["cache_implementation"]
        elif settings.cache_implementation == "offloaded" and self.model.device.type == "cpu":
            raise ValueError(
                "cache_implementation=offloaded: it moves keys and values off the GPU, but there is no GPU"
            )
        end = self.reply_ending()
        if self.processor.special_tokens.fullmatch(end):
            ends = [tokenizer.convert_tokens_to_ids(end), tokenizer.eos_token_id]
            options["eos_token_id"] = sorted({token_id for token_id in ends if isinstance(token_id, int)})
        else:
            options |= {"stop_strings": [end], "tokenizer": tokenizer}
        return options

    def reply_ending(self) -> str:
        """Return what the chat template writes after a reply: a special token or white space."""
        return reply_ending(self.processor)

    def _generate_ids(self, **options: object) -> torch.Tensor:
        """Return what the model's `generate` returns: `(rows, tokens)`, the prompt first."""
        return cast(Any, self.model).generate(**options)  # from a mixin, which PreTrainedModel does not declare


def prompt_inputs(
    processor: Processor,
    turns: Sequence[Turn],
    opened: Sequence[Medium],
    suffix: Sequence[int] = (),
    tools: Sequence[Tool] = (),
    thinking: bool | None = None,
) -> SampleInputs:
    """Return the inputs of one conversation that waits for a reply, see `VisionLanguageModel.inputs`.

    Raises:
        BadSample: the processor's template or the processor refuses it, or the template leaves nothing of it.
    """
    sample = Sample("prompt", tuple(turns))
    sizes = media_sizes_from_opened(sample.media, opened, processor)
    ids = encode_prompt(processor, turns, sizes, tools=tools, thinking=thinking)
    if not ids:
        raise BadSample(sample.id, "the model's template leaves nothing of this prompt (plain keeps images only)")
    ids = [*ids, *suffix]
    return model_inputs(processor, Encoded(ids, [IGNORE_INDEX] * len(ids)), opened, sizes, sample)


class CancelCriteria(StoppingCriteria):
    """Ends a generation between two tokens once `cancelled` is set."""

    def __init__(self):
        self.cancelled = False

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        """Return whether each row ends: `(rows,)`."""
        return torch.full((len(input_ids),), self.cancelled, dtype=torch.bool, device=input_ids.device)


def on_device(batch: Mapping[str, object], processor: Processor, device: torch.device) -> dict[str, torch.Tensor]:
    """Return a batch without labels on a device, its pixels normalised."""
    inputs = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor) and name != "labels"}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = processor.normalise(inputs["pixel_values"])
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def check_length(length: int, positions: int, answer_tokens: int, subject: str = "prompt") -> None:
    """Raise ValueError where a prompt of so many tokens, those of images included, leaves too few for its answer."""
    if length + answer_tokens > positions:
        answer = f" and its answer may have {answer_tokens:,} (max_new_tokens)" if answer_tokens else ""
        raise ValueError(f"the {subject} has {length:,} tokens{answer}, but the model reads at most {positions:,}")
