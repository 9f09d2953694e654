"""The functions that LLaVA's users know: `eval_model(args)` and `load_pretrained_model(path)`.

Both are thin: `VisionLanguageModel` does the work, and new code should use it.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vlm.checks.dataset import check_template
from vlm.checks.fields import check_fields
from vlm.config.schema import InferenceConfig
from vlm.config.shown import printable
from vlm.data.encoding.labels import read_template
from vlm.data.sample import PLACEHOLDER
from vlm.inference.conversation import Conversation
from vlm.inference.generate import VisionLanguageModel
from vlm.inference.prompts import load_images, user_turn
from vlm.models.pixels import ImageProcessor

LLAVA_PLACEHOLDER = "<image-placeholder>"
"""LLaVA's mark for an image in a query; `<image>` is accepted too."""


def eval_model(args: object) -> str:
    """Ask one question, print the answer and return it.

    Args:
        args: any object with these attributes, of which all but the first two may be missing or None:
            model_path: a run's folder `final`, or a name on the Hub.
            query: the question.
            image_file: its images: a path, or several joined by `sep`.
            sep: the separator of paths; a comma by default.
            model_base: the new place of an adapter's base, if it was moved, see `load_pretrained_model`.
            model_name: ignored; LLaVA chose architectures by it.
            conv_mode: another template than the checkpoint's own: a packaged one (`v1`, `chatml` …), `tokenizer` for
                the tokenizer's own, or a `.jinja` file.
            temperature, top_p, num_beams, max_new_tokens: generation settings, see `InferenceConfig`.
            load_8bit, load_4bit: whether to load the language model in 8 or 4 bits.

    Raises:
        ValueError: a value is missing or out of bounds, an image does not open, or the model refuses the question.
    """
    values: dict[str, Any] = {name: getattr(args, name, None) for name in ARGUMENT_FIELDS}
    for name in ("model_path", "query"):
        if not values[name]:
            raise ValueError(f"args.{name}: a value is needed")
    settings = InferenceConfig(**{name: values[name] for name in GENERATION_FIELDS if values[name] is not None})
    check_fields(settings, prefix="args.")
    check_template(values["conv_mode"], "args.conv_mode")
    images = load_images(split_image_paths(values["image_file"] or "", values["sep"] or ","))
    query = values["query"].replace(LLAVA_PLACEHOLDER, PLACEHOLDER)
    every_mark = LLAVA_PLACEHOLDER in values["query"]  # LLaVA's own mark is never a word
    user_turn(query, len(images), every_mark=every_mark)  # refuse a bad question before the model loads
    model = _load_model(values["model_path"], values["model_base"], values["load_8bit"], values["load_4bit"])
    if (template := values["conv_mode"]) is not None:
        own_template = model.processor.own_template
        if template == "tokenizer" and own_template is None:
            raise ValueError("args.conv_mode=tokenizer: the language model's tokenizer has no template")
        model.processor.chat_template = own_template if template == "tokenizer" else read_template(template)
    answer = "".join(Conversation(model, settings).ask(query, images, every_mark=every_mark)).strip()
    print(printable(answer))
    return answer


GENERATION_FIELDS = ("temperature", "top_p", "num_beams", "max_new_tokens")
LOADING_FIELDS = ("model_path", "model_base", "load_8bit", "load_4bit")
ARGUMENT_FIELDS = (*LOADING_FIELDS, "query", "image_file", "sep", "conv_mode", *GENERATION_FIELDS)


def split_image_paths(paths: str, separator: str = ",") -> list[str]:
    """Return the paths of images in a string; raise ValueError for a web address."""
    files = [file.strip() for file in paths.split(separator) if file.strip()]
    for file in files:
        if file.lower().startswith(("http://", "https://")):
            raise ValueError(f"{file}: addresses are not fetched; download the image and give its path")
    return files


def load_pretrained_model(
    model_path: str,
    model_base: str | Sequence[str] | None = None,
    model_name: str | None = None,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: str | dict[str, object] = "auto",
    device: str | None = None,
    **kwargs: object,
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel, ImageProcessor, int]:
    """Load a checkpoint as LLaVA's function of this name does.

    Args:
        model_path: a run's folder `final`, or a name on the Hub.
        model_base: the new place of an adapter's base, if it was moved: a folder, or `part=folder` for each part.
        model_name: ignored; LLaVA chose architectures by it.
        load_8bit: whether to load the language model in 8 bits.
        load_4bit: whether to load it in 4 bits.
        device_map: one device, such as `cuda:1` or `{"": "cuda:1"}`; `auto` is a GPU where there is one.
        device: takes precedence over `device_map`.
        kwargs: `dtype` (or `torch_dtype`) and `trust_remote_code`, see `VisionLanguageModel.load`.

    Returns:
        The tokenizer, the model, the image processor, and the largest number of tokens that the model reads.

    Raises:
        ValueError: there is no such checkpoint, or it does not load with these options.
    """
    dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None) or "auto"
    options = {"dtype": str(dtype).removeprefix("torch."), "trust_remote_code": kwargs.pop("trust_remote_code", False)}
    if kwargs:
        raise ValueError(f"{', '.join(kwargs)}: not taken; besides its own names dtype and trust_remote_code are")
    device = device or _parse_device_map(device_map)
    model = _load_model(model_path, model_base, load_8bit, load_4bit, device=device, **options)
    return model.processor.tokenizer, model.model, model.processor.image_processor, model.positions


def _parse_device_map(device_map: str | dict[str, object]) -> str | None:
    """Return the device that a map with one device names; None for `auto`. Any other map raises ValueError."""
    if device_map == "auto":
        return None
    devices = {str(device) for device in device_map.values()} if isinstance(device_map, dict) else {device_map}
    if len(devices) == 1:
        device = devices.pop()
        with suppress(RuntimeError):
            return str(torch.device(f"cuda:{device}" if device.isdigit() else device))
    raise ValueError(f"device_map={device_map}: a model runs on one device; allowed are auto, cuda, cuda:1, cpu …")


def _load_model(
    model_path: str, model_base: str | Sequence[str] | None, load_8bit: bool, load_4bit: bool, **options: Any
) -> VisionLanguageModel:
    if load_8bit and load_4bit:
        raise ValueError("load_8bit and load_4bit: choose one")
    base = [model_base] if isinstance(model_base, str) else list(model_base or ())
    quantization = "8bit" if load_8bit else "4bit" if load_4bit else None
    return VisionLanguageModel.load(model_path, base=base, quantization=quantization, **options)
