"""A model with a head that embeds, as sentence-transformers loads it, with `trust_remote_code=True`.

Hub code: imports torch and transformers only. sentence-transformers asks a module for these methods and attributes, and
needs no base class.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoProcessor, PreTrainedTokenizerBase

from .processing_messages import Message

Features = dict[str, Any]
"""What one module of sentence-transformers gives to the next."""


class SentenceEmbedding(nn.Module):
    """Renders inputs as training did, and reads their vectors.

    Args:
        model: a `VLMForPrediction` with a head that embeds.
        processor: the processor that was saved with it.
    """

    def __init__(self, model: Any, processor: Any):
        super().__init__()
        self.model, self.processor = model, processor

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        *,
        token: str | bool | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        model_kwargs: Mapping[str, object] | None = None,
        processor_kwargs: Mapping[str, object] | None = None,
        **kwargs: object,
    ) -> "SentenceEmbedding":
        """Load a checkpoint; arguments as of sentence-transformers' `Module.load`."""
        place = {
            "token": token,
            "cache_dir": cache_folder,
            "revision": revision,
            "local_files_only": local_files_only,
            "trust_remote_code": trust_remote_code,
        }
        model = AutoModel.from_pretrained(model_name_or_path, **{**place, **(model_kwargs or {})})
        processor = AutoProcessor.from_pretrained(model_name_or_path, **{**place, **(processor_kwargs or {})})
        return cls(model.eval(), processor)

    def save(self, output_path: str, *args: object, **kwargs: object) -> None:
        """Write the checkpoint again."""
        self.model.save_pretrained(output_path)
        self.processor.save_pretrained(output_path)

    @property
    def modalities(self) -> list[object]:
        """What an input may be."""
        return ["text", "image", ("text", "image"), ("image", "text"), "message"]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The language model's tokenizer."""
        return self.processor.tokenizer

    @property
    def max_seq_length(self) -> int | None:
        """The most tokens of an input; longer ones are not cut."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def get_sentence_embedding_dimension(self) -> int:
        """Return how many numbers a vector has."""
        return self.model.config.heads[0]["dim"] or self.model.config.get_text_config().hidden_size

    get_embedding_dimension = get_sentence_embedding_dimension

    def preprocess(self, inputs: Sequence[object], prompt: str | None = None, **kwargs: object) -> Features:
        """Return the model's inputs for texts, images, mappings of both, or conversations.

        Args:
            inputs: each a text, an image (Pillow, or in a mapping a path or URL too), a mapping with `text` and
                `image` (one or a list), or a list of messages.
            prompt: the system turn; a conversation that has one keeps it.
            kwargs: not used.
        """
        conversations = [add_system(as_messages(item), prompt) for item in inputs]
        groups: dict[bool, list[int]] = {}
        for number, conversation in enumerate(conversations):
            groups.setdefault(bool(images_of(conversation)), []).append(number)
        batches = [
            (numbers, self._process([conversations[number] for number in numbers])) for numbers in groups.values()
        ]
        return {"batches": batches, "modality": "message"}

    def _process(self, conversations: list[list[Message]]) -> Mapping[str, Tensor]:
        """Return the inputs of conversations that all have images, or all have none."""
        texts = [
            self.processor.apply_chat_template(without_images(conversation), add_generation_prompt=True, tokenize=False)
            + self.model.config.suffix
            for conversation in conversations
        ]
        images = [images_of(conversation) for conversation in conversations]
        bos = self.tokenizer.bos_token
        return self.processor(
            images=images if images[0] else None,
            text=texts,
            padding=True,
            padding_side="right",
            return_tensors="pt",
            add_special_tokens=bos is None or not texts[0].startswith(bos),
        )

    def forward(self, features: Features, **kwargs: object) -> Features:
        """Add `sentence_embedding` to the features: `(inputs, D)`, vectors of length 1."""
        device = next(self.model.parameters()).device
        numbers, vectors = [], []
        for places, inputs in features["batches"]:
            numbers += places
            vectors.append(self.model(**{name: value.to(device) for name, value in inputs.items()}).logits)
        order = torch.tensor(numbers, device=device).argsort()
        return {**features, "sentence_embedding": torch.cat(vectors)[order]}


def as_messages(item: object) -> list[Message]:
    """Return an input as a conversation, whose texts and images are items, as records of training are read."""
    if isinstance(item, list):
        return item
    if isinstance(item, Mapping) and "role" in item:
        return [dict(item)]
    if isinstance(item, Mapping):
        images, text = item.get("image", item.get("images")), item.get("text")
    else:
        images, text = (None, item) if isinstance(item, str) else (item, None)
    listed = [] if images is None else images if isinstance(images, list | tuple) else [images]
    content: list[Message] = [{"type": "image", "image": image} for image in listed]
    if text:
        content.append({"type": "text", "text": f"\n{text}" if listed else text})
    return [{"role": "user", "content": content}]


def add_system(conversation: list[Message], prompt: str | None) -> list[Message]:
    """Return a conversation behind a system turn, unless there is none or the conversation has one."""
    if not prompt or conversation[0]["role"] == "system":
        return conversation
    return [{"role": "system", "content": [{"type": "text", "text": prompt}]}, *conversation]


def images_of(conversation: Sequence[Message]) -> list[object]:
    """Return the images of a conversation, in order."""
    items = [item for turn in conversation if not isinstance(turn["content"], str) for item in turn["content"]]
    return [
        next(item[key] for key in ("image", "path", "url") if key in item) for item in items if item["type"] == "image"
    ]


def without_images(conversation: Sequence[Message]) -> list[Message]:
    """Return a conversation whose items of images name no file, as templates read it."""
    return [
        {
            **turn,
            "content": turn["content"]
            if isinstance(turn["content"], str)
            else [{"type": "image"} if item["type"] == "image" else item for item in turn["content"]],
        }
        for turn in conversation
    ]


def write_sentence_transformers_files(prompts: Mapping[str, str], folder: str | Path) -> None:
    """Write what sentence-transformers looks for in a checkpoint: the modules, the system turns, and this file.

    `encode_query` and `encode_document` then take the system turns of their sides; `encode` takes that of documents.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    own = Path(__file__)
    if not (place / own.name).exists() or not own.samefile(place / own.name):
        shutil.copyfile(own, place / own.name)
    modules = [{"idx": 0, "name": "0", "path": "", "type": f"{own.stem}.{SentenceEmbedding.__name__}"}]
    config = {
        "model_type": "SentenceTransformer",
        "prompts": dict(prompts),
        "default_prompt_name": "document" if prompts.get("document") else None,
        "similarity_fn_name": "cosine",
    }
    for name, content in (("modules.json", modules), ("config_sentence_transformers.json", config)):
        (place / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
