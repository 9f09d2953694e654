"""Asking a model about pictures: `VisionLanguageModel.load(checkpoint).generate("What is this?", ["cat.png"])`."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, TextIteratorStreamer
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from vlm.config.schema import InferenceConfig
from vlm.data.collate import Collator
from vlm.data.dataset import model_inputs
from vlm.data.encode import IGNORED, Encoded, encode_prompt, render, reply_end
from vlm.data.pictures import open_picture, size_of
from vlm.data.sample import PLACEHOLDER, BadSample, Picture, Turn
from vlm.models import VLMConfig, VLMForConditionalGeneration, VLMProcessor
from vlm.models.connectors import CONNECTORS


class VisionLanguageModel:
    """A model with its processor, ready to answer.

    Args:
        model: the model.
        processor: its processor.
    """

    def __init__(self, model: VLMForConditionalGeneration, processor: VLMProcessor):
        self.model = model
        self.processor = processor

    @classmethod
    def load(
        cls, checkpoint: str | Path, *, device: str | None = None, dtype: str = "auto", trust_remote_code: bool = False
    ) -> "VisionLanguageModel":
        """Load a checkpoint of this framework, from a folder or the Hub.

        Args:
            checkpoint: a run's `final` folder, or a Hub name.
            device: `cuda`, `cpu` …; None: a GPU where there is one.
            dtype: `auto` (as saved), `float32`, `bfloat16` or `float16`.
            trust_remote_code: let code out of the checkpoint run; only needed where a part is a class of its author's.

        Raises:
            ValueError: it is no checkpoint of this framework.
        """
        config = checkpoint_config(checkpoint)
        if trust_remote_code:
            add_travelled_connector(config, str(checkpoint))
        model: Any = AutoModelForImageTextToText.from_pretrained(
            checkpoint, dtype=dtype, trust_remote_code=trust_remote_code
        )
        processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(model.to(place).eval(), processor)

    def generate(
        self,
        prompt: str | Sequence[str],
        images: Sequence[Any] = (),
        *,
        temperature: float = InferenceConfig.temperature,
        top_p: float = InferenceConfig.top_p,
        num_beams: int = InferenceConfig.num_beams,
        max_new_tokens: int = InferenceConfig.max_new_tokens,
        **kwargs: Any,
    ) -> Any:
        """Answer one prompt, or several at once.

        Args:
            prompt: the question, or a list of them. `<image>` in it says where a picture stands; where there is none,
                the pictures come first.
            images: the pictures (paths or Pillow images) of the prompt; for several prompts, a list for each.
            temperature: 0 is greedy.
            top_p: nucleus sampling.
            num_beams: beam search where above 1.
            max_new_tokens: longest answer.
            kwargs: as transformers' `generate`.

        Returns:
            The answer, or the answers in order.

        Raises:
            ValueError: a prompt has more or fewer `<image>` than pictures, or a picture does not open.
        """
        many = not isinstance(prompt, str)
        prompts: list[str] = list(prompt) if many else [str(prompt)]
        pictures = list(images) if many else [images]
        if many and not pictures:
            pictures = [()] * len(prompts)
        if len(pictures) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts need as many lists of images, got {len(pictures)}")
        turns = [[user_turn(text, len(found))] for text, found in zip(prompts, pictures, strict=True)]
        settings = InferenceConfig(temperature, top_p, num_beams, max_new_tokens)
        answers = self.answer(turns, [opened(found) for found in pictures], settings, **kwargs)
        return answers if many else answers[0]

    def answer(
        self, conversations: Sequence[Sequence[Turn]], images: Sequence[Sequence[Image.Image]],
        settings: InferenceConfig, **kwargs: Any,
    ) -> list[str]:  # fmt: skip
        """The next reply of each conversation; rows are padded on the left, so each gets what it would get alone."""
        inputs = self.inputs(conversations, images)
        output = self.model.generate(**inputs, **{**self.generation_options(settings), **kwargs})
        return [self._text(row) for row in output[:, inputs["input_ids"].shape[1] :]]

    def stream(
        self, conversation: Sequence[Turn], images: Sequence[Image.Image], settings: InferenceConfig
    ) -> Iterator[str]:
        """The next reply, piece by piece as it is generated."""
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        options = {**self.inputs([conversation], [images]), **self.generation_options(settings), "streamer": streamer}
        failure: list[BaseException] = []

        def work() -> None:
            try:
                self.model.generate(**options)
            except BaseException as error:
                failure.append(error)
                streamer.end()

        thread = Thread(target=work, daemon=True)
        thread.start()
        yield from streamer
        thread.join()
        if failure:
            raise failure[0]

    def inputs(
        self, conversations: Sequence[Sequence[Turn]], images: Sequence[Sequence[Image.Image]]
    ) -> dict[str, torch.Tensor]:
        """Model inputs of conversations that wait for a reply, padded on the left."""
        rows = []
        for turns, pictures in zip(conversations, images, strict=True):
            ids = encode_prompt(self.processor, turns, [size_of(picture) for picture in pictures])
            if not ids:
                raise ValueError("the model's template leaves nothing of this prompt (plain keeps pictures only)")
            rows.append(model_inputs(self.processor, Encoded(ids, [IGNORED] * len(ids)), pictures))
        inputs = Collator.of(self.processor, left=True)(rows)
        del inputs["labels"]
        if "pixel_values" in inputs:
            inputs["pixel_values"] = self.processor.normalise(inputs["pixel_values"])
        return {name: value.to(self.model.device) for name, value in inputs.items()}

    def generation_options(self, settings: InferenceConfig) -> dict[str, Any]:
        """Transformers' options for our settings; generation ends where the template ends a reply."""
        options: dict[str, Any] = asdict(settings)
        options["use_cache"] = True  # training switches it off in the configuration
        options["do_sample"] = settings.temperature > 0
        if settings.temperature == 0:
            del options["temperature"], options["top_p"]
        options["pad_token_id"] = self.processor.tokenizer.pad_token_id
        end = self.reply_ending()
        ids = self.processor.tokenizer.convert_tokens_to_ids([end])
        if self.processor.special_tokens.fullmatch(end):
            options["eos_token_id"] = sorted({*ids, self.processor.tokenizer.eos_token_id} - {None})
        else:
            options |= {"stop_strings": [end], "tokenizer": self.processor.tokenizer}
        return options

    def reply_ending(self) -> str:
        """What the template writes behind a reply: a special token, or white space (`plain`: a line break)."""
        rendered = render(self.processor, [Turn("user", ("?",)), Turn("assistant", ("!",))])
        end = rendered.replies[-1][1]
        return rendered.text[end : reply_end(self.processor, rendered.text, end)].lstrip(" ")

    def _text(self, ids: torch.Tensor) -> str:
        return self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


def checkpoint_config(checkpoint: str | Path) -> VLMConfig:
    """The configuration of a checkpoint of this framework.

    Raises:
        ValueError: it is none, or there is no such folder.
    """
    folder = Path(checkpoint)
    if not folder.joinpath("config.json").is_file():
        if folder.exists():
            raise ValueError(f"{checkpoint} holds no config.json; a run's complete model is its folder `final`")
        if len(folder.parts) != 2 or str(checkpoint).startswith((".", "/", "~")):
            raise ValueError(f"{checkpoint}: no such folder (seen from {Path.cwd()}), nor a name on the Hub")
    config = AutoConfig.from_pretrained(checkpoint)
    if not isinstance(config, VLMConfig):
        raise ValueError(f"{checkpoint} is a {config.model_type} checkpoint, not one of this framework")
    return config


def add_travelled_connector(config: VLMConfig, checkpoint: str) -> None:
    """Put the connector class that travels with a checkpoint, if one does, in the table under its own name.

    This package's model class takes the place of the checkpoint's own code, which would have done it.
    """
    kind = config.connector["type"]
    if kind not in CONNECTORS and "Connector" in config.auto_map:
        CONNECTORS[kind] = get_class_from_dynamic_module(config.auto_map["Connector"], checkpoint)


def user_turn(prompt: str, num_images: int) -> Turn:
    """A question with its pictures: where `<image>` stands, else before the text.

    Raises:
        ValueError: the prompt has some `<image>`, but not as many as there are pictures.
    """
    slots = prompt.count(PLACEHOLDER)
    if slots == 0 and num_images:
        prompt = PLACEHOLDER * num_images + f"\n{prompt}"
    elif slots != num_images:
        raise ValueError(f"the prompt has {slots} {PLACEHOLDER}, but {num_images} images were given")
    first, *rest = prompt.split(PLACEHOLDER)
    content: list[str | Picture] = [first]
    for text in rest:
        content += [Picture(Path()), text]
    return Turn("user", tuple(part for part in content if part != ""))


def opened(images: Sequence[Any]) -> list[Image.Image]:
    """Pictures, opened where they are paths.

    Raises:
        ValueError: one does not open.
    """
    try:
        return [
            image if isinstance(image, Image.Image) else open_picture(Picture(Path(image)), str(image))
            for image in images
        ]
    except BadSample as error:
        raise ValueError(error.reason) from error
