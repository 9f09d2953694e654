"""Asking a model by the names that LLaVA's users know: `eval_model(args)` and `load_pretrained_model(path)`.

They are thin: `VisionLanguageModel` does the work, and is what new code should use.
"""

from collections.abc import Sequence
from typing import Any

import torch

from vlm.checks.dataset import check_template
from vlm.checks.fields import check_fields
from vlm.config.schema import InferenceConfig
from vlm.data.encoding.labels import read_template
from vlm.data.sample import PLACEHOLDER
from vlm.inference.conversation import Conversation
from vlm.inference.generate import VisionLanguageModel, load_images, user_turn

LLAVA_PLACEHOLDER = "<image-placeholder>"
"""What LLaVA's users write in a query where an image stands; `<image>` is taken too."""


def eval_model(args: Any) -> str:
    """Ask one question, print the answer and return it.

    Args:
        args: any object with these attributes, of which all but the first two may be missing or None:
            model_path: a run's folder `final`, or a name on the Hub.
            query: the question.
            image_file: its images: a path, or several joined by `sep`.
            sep: what joins them; a comma.
            model_base: where an adapter's base lies now, if it was moved, see `load_pretrained_model`.
            model_name: what LLaVA told architectures by; the checkpoint says it itself.
            conv_mode: another template than the checkpoint's own: a packaged one (`v1`, `chatml` …), `tokenizer` for
                the tokenizer's own, or a `.jinja` file.
            temperature, top_p, num_beams, max_new_tokens: how the answer is drawn, see `InferenceConfig`.
            load_8bit, load_4bit: whether the language model is held in so many bits.

    Raises:
        ValueError: a value is out of bounds, an image does not open, or the model cannot be asked so.
    """
    given: dict[str, Any] = {name: getattr(args, name, None) for name in ARGUMENT_FIELDS}
    for name in ("model_path", "query"):
        if not given[name]:
            raise ValueError(f"args.{name}: a value is needed")
    settings = InferenceConfig(**{name: given[name] for name in GENERATION_FIELDS if given[name] is not None})
    check_fields(settings, prefix="args.")
    check_template(given["conv_mode"], "args.conv_mode")
    images = load_images(split_image_paths(given["image_file"] or "", given["sep"] or ","))
    query = given["query"].replace(LLAVA_PLACEHOLDER, PLACEHOLDER)
    user_turn(query, len(images))  # what is wrong is said before a model loads
    model = _load_model(given["model_path"], given["model_base"], given["load_8bit"], given["load_4bit"])
    if (template := given["conv_mode"]) is not None:
        own = model.processor.own_template
        if template == "tokenizer" and own is None:
            raise ValueError("args.conv_mode=tokenizer: the language model's tokenizer has no template")
        model.processor.chat_template = own if template == "tokenizer" else read_template(template)
    answer = "".join(Conversation(model, settings).ask(query, images)).strip()
    print(answer)
    return answer


GENERATION_FIELDS = ("temperature", "top_p", "num_beams", "max_new_tokens")
ARGUMENT_FIELDS = (
    "model_path",
    "model_base",
    "query",
    "image_file",
    "sep",
    "conv_mode",
    *GENERATION_FIELDS,
    "load_8bit",
    "load_4bit",
)


def split_image_paths(paths: str, separator: str = ",") -> list[str]:
    """The paths of images that are joined by a separator.

    Raises:
        ValueError: one is an address.
    """
    files = [file.strip() for file in paths.split(separator) if file.strip()]
    for file in files:
        if file.lower().startswith(("http://", "https://")):
            raise ValueError(f"{file}: nothing is fetched; download the image and give its path")
    return files


def load_pretrained_model(
    model_path: str,
    model_base: str | Sequence[str] | None = None,
    model_name: str | None = None,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: str | dict[str, Any] = "auto",
    device: str | None = None,
    **kwargs: Any,
) -> tuple[Any, Any, Any, int]:
    """A model in LLaVA's pieces.

    Args:
        model_path: a run's folder `final`, or a name on the Hub.
        model_base: where an adapter's base lies now, if it was moved: a folder, or `part=folder` for each part.
        model_name: what LLaVA told architectures by; the checkpoint says it itself.
        load_8bit: whether the language model is held in 8 bits.
        load_4bit: whether it is held in 4 bits.
        device_map: `auto` is a GPU where there is one; the model lies on one device: `cuda:1`, or `{"": "cuda:1"}`.
        device: the same in another word.
        kwargs: `dtype` (or `torch_dtype`) and `trust_remote_code`, see `VisionLanguageModel.load`.

    Returns:
        The tokenizer, the model, the image processor, and how many tokens the model can read.

    Raises:
        ValueError: there is no such checkpoint, or it cannot be loaded so.
    """
    given = dict(kwargs)
    dtype = given.pop("dtype", None) or given.pop("torch_dtype", None) or "auto"
    trusted = given.pop("trust_remote_code", False)
    if given:
        raise ValueError(f"{', '.join(given)}: not taken; besides its own names dtype and trust_remote_code are")
    model = _load_model(
        model_path, model_base, load_8bit, load_4bit, device=device or _parse_device_map(device_map),
        dtype=str(dtype).removeprefix("torch."), trust_remote_code=trusted,
    )  # fmt: skip
    return model.processor.tokenizer, model.model, model.processor.image_processor, model.positions


def _parse_device_map(device_map: str | dict[str, Any]) -> str | None:
    """The device that a map with one place names.

    Raises:
        ValueError: it names several, or a way to spread a model.
    """
    if device_map == "auto":
        return None
    places = {str(place) for place in device_map.values()} if isinstance(device_map, dict) else {device_map}
    if len(places) == 1:
        place = f"cuda:{next(iter(places))}" if next(iter(places)).isdigit() else next(iter(places))
        try:
            return str(torch.device(place))
        except RuntimeError:
            pass
    raise ValueError(f"device_map={device_map}: a model lies on one device: auto, cuda, cuda:1, cpu …")


def _load_model(
    model_path: str, model_base: str | Sequence[str] | None, load_8bit: Any, load_4bit: Any, **options: Any
) -> VisionLanguageModel:
    if load_8bit and load_4bit:
        raise ValueError("load_8bit and load_4bit: choose one")
    base = [model_base] if isinstance(model_base, str) else list(model_base or ())
    kind = "8bit" if load_8bit else "4bit" if load_4bit else None
    return VisionLanguageModel.load(model_path, base=base, quantization=kind, **options)
