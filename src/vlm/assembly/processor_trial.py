"""Checks that a checkpoint's processor works: its chat template and tokenizer terminate, and it can prepare an image.

Foreign templates and regular expressions are first tried in a separate process with limited processor time and memory
(`trial_process`), each once per process. Packaged templates are not tried.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import TypeVar, cast

import torch
from PIL import Image
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from vlm.assembly import trial_process
from vlm.assembly.encoders import EARLY_EXIT_TYPES, image_size
from vlm.assembly.opening import opening, shorten
from vlm.checks.checkpoint_files import MEGABYTE, read_object, shown
from vlm.data.processor import Processor
from vlm.models.connectors import CONNECTORS, count_tokens
from vlm.models.processing_messages import FIXED_CLOCK, FIXED_DATE
from vlm.models.processing_vlm import VLMProcessor

P = TypeVar("P", bound=Processor)

MAX_SECONDS = 2
"""Maximum processor time for a template to render, or a tokenizer to split, a few short texts, in seconds."""
MAX_MEMORY = 1024 * MEGABYTE
HANG = 600
"""Seconds after which the process counts as blocked."""
TRIED_STEPS = ("normalizer", "pre_tokenizer", "decoder")
"""Parts of a tokenizer that replace texts, or split them by regular expressions."""
TRIAL_SIDE = 32
"""Height and width in pixels of the trial image."""
MAX_PIXEL_VALUES = 10**8
"""Maximum number of values for one small image: those of 160 tiles of 448 x 448 pixels."""


def try_template(template: str, image_token: str, name: str) -> None:
    """Raise ValueError if a chat template does not terminate, or writes too much; it may refuse a conversation.

    Args:
        template: the text of the template.
        image_token: the placeholder of an image.
        name: the checkpoint, for messages.
    """
    if template not in _packaged_templates() and (problem := _try_template_once(template, image_token)):
        raise ValueError(f"{name}: its chat template (chat_template.jinja, or in tokenizer_config.json) {problem}")


@lru_cache(1)
def _packaged_templates() -> frozenset[str]:
    files = resources.files("vlm.data").joinpath("templates").iterdir()
    return frozenset(file.read_text(encoding="utf-8") for file in files if file.name.endswith(".jinja"))


@lru_cache(256)
def _try_template_once(template: str, image_token: str) -> str:
    template = FIXED_CLOCK + template if "strftime_now" in template else template
    request = {
        "kind": "template",
        "template": template,
        "conversations": list(_conversations(image_token)),
        "variables": _variables(image_token),
    }
    return _ask(request, "renders a conversation of a few words")


def _variables(image_token: str) -> dict[str, object]:
    """Return the variables of templates, as processors and transformers give them."""
    return {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "image_token": image_token,
        "date_string": FIXED_DATE,
        "enable_thinking": False,
        "tools": None,
        "documents": None,
    }


def _conversations(image_token: str) -> Iterator[list[dict[str, object]]]:
    """Yield short conversations of each form that models are asked in."""
    image, text = {"type": "image"}, {"type": "text", "text": "What is this?"}
    for content in (f"{image_token}\nWhat is this?", [image, text]):
        answer: object = "A cat." if isinstance(content, str) else [{"type": "text", "text": "A cat."}]
        system: object = "Be brief." if isinstance(content, str) else [{"type": "text", "text": "Be brief."}]
        question, reply = {"role": "user", "content": content}, {"role": "assistant", "content": answer}
        yield [question]
        yield [question, reply]
        yield [{"role": "system", "content": system}, question, reply, question]
        yield [question, reply] * 12


def _ask(request: dict[str, object], does: str) -> str:
    """Return the problem that the separate process finds, or an empty text."""
    request |= {"bytes": MAX_MEMORY, "seconds": MAX_SECONDS}
    command = [sys.executable, "-P", str(Path(trial_process.__file__))]
    ended = subprocess.run(
        command,
        input=json.dumps(request).encode(),
        capture_output=True,
        check=False,
        timeout=HANG,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
    )
    if ended.returncode == 0:
        return shorten(json.loads(ended.stdout))
    said = ended.stderr.decode(errors="replace").strip().splitlines()
    if ended.returncode > 0 and said and "memory" not in said[-1].lower():
        return f"does not work: {shorten(said[-1])}"
    return f"takes more than {MAX_SECONDS} s of processor time, or {MAX_MEMORY // MEGABYTE:,} MB, when it {does}"


def try_tokenizer_file(name: str, revision: str | None = None) -> None:
    """Raise ValueError if a checkpoint's `tokenizer.json` does not terminate on a short text, or makes it grow."""
    folder = Path(name)
    found = (
        folder / "tokenizer.json"
        if folder.is_dir()
        else cached_file(
            name,
            "tokenizer.json",
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    )
    if found is None or not Path(found).is_file():
        return
    settings = read_object(Path(found))
    kept = {key: settings.get(key) for key in TRIED_STEPS}
    has_patterns = any(_patterns(kept))
    if has_patterns and (problem := _try_tokenizer_once(json.dumps(kept))):
        raise ValueError(f"{found} {problem}")


@lru_cache(64)
def _try_tokenizer_once(settings: str) -> str:
    content = json.loads(settings)
    request = {"kind": "tokenizer", "settings": content, "expressions": list(_patterns(content))}
    return _ask(request, "splits a text of a few words")


def _patterns(value: object) -> Iterator[str]:
    """Yield the expressions in a tokenizer's settings, and the texts that it replaces."""
    if isinstance(value, dict):
        yield from (pattern for key in ("Regex", "String") if isinstance(pattern := value.get(key), str) and pattern)
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _patterns(item)


def load_tried(load: Callable[..., P], name: str, revision: str | None) -> P:
    """Return a checkpoint's processor, which has been tried.

    Args:
        load: loads the processor of a name at a `revision`.
        name: a folder, or a name on the Hub.
        revision: branch, tag or commit on the Hub.

    Raises:
        ValueError: it does not load, or does not work; see the top of this file.
    """
    with opening(name, "its processor"):
        try_tokenizer_file(name, revision)
        processor = load(name, revision=revision)
        try_processor(processor, name)
    return processor


def try_processor(processor: Processor, name: str) -> None:
    """Refuse a processor that cannot prepare a conversation with a small image.

    Raises:
        ValueError: its template does not terminate, it has no padding token, or the image cannot be prepared.
    """
    for template in {processor.chat_template, processor.own_template} - {None}:
        try_template(str(template), processor.image_token, name)
    tokenizer = processor.tokenizer
    if tokenizer.pad_token_id is None:
        raise ValueError(f"{name}: its tokenizer has no padding token; name one as pad_token in tokenizer_config.json")
    image = Image.new("RGB", (TRIAL_SIDE, TRIAL_SIDE), "grey")
    inputs = processor.image_inputs([image], [(TRIAL_SIDE, TRIAL_SIDE)])
    tensors = [value for value in inputs.values() if isinstance(value, torch.Tensor)]
    number = sum(tensor.numel() for tensor in tensors)
    if not 0 < number <= MAX_PIXEL_VALUES:
        raise ValueError(
            f"{name}: its image processor turns an image of 32 x 32 pixels into {number:,} numbers; allowed are "
            f"1 to {MAX_PIXEL_VALUES:,}"
        )
    if "pixel_values" in inputs:
        tensors.append(processor.normalise(inputs["pixel_values"]))
    if not all(torch.isfinite(tensor).all() for tensor in tensors if tensor.is_floating_point()):
        raise ValueError(f"{name}: its image processor turns an image into NaN or infinity; check image_std")


def check_composed_processor(processor: VLMProcessor, config: PreTrainedConfig, name: str) -> None:
    """Refuse the processor of a composed model that is not the model's: another placeholder, or another number of them.

    Args:
        processor: the processor.
        config: the `VLMConfig` of the model.
        name: the checkpoint, for messages.

    Raises:
        ValueError: it does not fit the model.
    """
    with opening(name, "its processor"):
        _check_fit(processor, config, name)


def _check_fit(processor: VLMProcessor, config: PreTrainedConfig, name: str) -> None:
    settings: object = config
    if processor.image_token_id != settings.image_token_id:
        raise ValueError(
            f"{name}: config.json has image_token_id={settings.image_token_id}, but its tokenizer reads "
            f"{shown(processor.image_token)} as {processor.image_token_id}"
        )
    if (processor.anyres or None) != (settings.anyres or None):
        raise ValueError(f"{name}: anyres differs between config.json and processor_config.json")
    if (processor.native or None) != (settings.native or None):
        raise ValueError(f"{name}: native differs between config.json and processor_config.json")
    if settings.vision_config.model_type in EARLY_EXIT_TYPES and settings.native is None:
        given, side = image_size(processor.image_processor), settings.vision_config.image_size
        if given != (side, side):
            raise ValueError(
                f"{name}: its image processor gives images of {given[0]} x {given[1]} pixels; its visual encoder reads "
                f"{side} x {side}"
            )
    connector = settings.connector
    if (
        settings.native is not None or connector["type"] not in CONNECTORS
    ):  # a class of the user's own, which is not imported from here
        return
    needed = count_tokens(connector["type"], settings.num_features, connector["options"])
    if processor.tokens_per_image != needed:
        raise ValueError(
            f"{name}: processor_config.json has tokens_per_image={shown(processor.tokens_per_image)}, but the model "
            f"makes {needed} per image"
        )


def check_vocabulary(processor: Processor, model: PreTrainedModel, name: str) -> None:
    """Raise ValueError if a tokenizer knows tokens that a model has no embedding for."""
    embeddings = cast(nn.Embedding, model.get_input_embeddings())  # declared as a module of any kind
    token, token_id = max(processor.tokenizer.get_vocab().items(), key=lambda item: item[1])
    if token_id >= embeddings.num_embeddings:
        raise ValueError(
            f"{name}: its tokenizer reads {shown(token)} as {token_id}, but the model has embeddings for "
            f"{embeddings.num_embeddings:,} tokens"
        )
