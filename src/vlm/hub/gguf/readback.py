"""GGUF files, read back: every tensor, the tokenizer's ids, and the language model's logits.

The package `gguf` reads tensors and settings; transformers' own reader of GGUF builds the language model again, where
it has the architecture.
"""

import gc
from collections.abc import Iterator, Sequence
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

from vlm.assembly.round_trip import quiet_loading
from vlm.hub.gguf.language_models import ARCHITECTURES
from vlm.hub.gguf.tensors import PlannedTensor, StoredType, decode, encode
from vlm.hub.gguf.tokenizer import TEXTS, merge_by_score, rebuild_tokenizer
from vlm.models import VLMProcessor

CONFIG_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "rms_norm_eps",
)
"""Settings that transformers reads out of any of these files."""

LARGEST_LOGIT_DIFFERENCE = {
    StoredType.F32: 1e-4,
    StoredType.F16: 2e-2,
    StoredType.BF16: 2e-2,
    StoredType.Q8_0: 1e-1,
}
"""How matrices are stored -> the largest `|ours - theirs| / |ours|` (Euclidean norms) that counts as rounding."""


class TensorCheck:
    """Compares the tensors of a file with the checkpoint's, one at a time."""

    def __init__(self, file: Path, plan: Sequence[PlannedTensor]):
        self.stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
        self.file = file
        self.by_source = {planned.source: planned for planned in plan if planned.source is not None}
        names = {planned.name for planned in plan}
        if names != self.stored.keys():
            raise ValueError(f"{file.name} has unexpected tensors: {sorted(names ^ self.stored.keys())[:3]}")

    def compare(self, source: str, tensor: Tensor) -> None:
        """Raise ValueError where the file has another value for a weight of the checkpoint."""
        if (planned := self.by_source.get(source)) is None:
            return
        found, original = decode(self.stored[planned.name], planned), tensor.float()
        written = gguf.dequantize(encode(tensor, planned), planned.stored).reshape(planned.shape)
        expected = planned.change.undo(torch.from_numpy(written.astype(np.float32)))
        is_rounded = planned.stored != StoredType.F32 or torch.allclose(found, original, rtol=1e-6, atol=1e-6)
        if found.shape != original.shape or not torch.equal(found, expected) or not is_rounded:
            raise ValueError(f"{self.file.name} has a {planned.name} that differs from {source} of the checkpoint")


def find_tokenizer_problems(file: Path, processor: VLMProcessor) -> Iterator[str]:
    """Yield where a tokenizer that works as llama.cpp's on the file's vocabulary gives other ids than the processor."""
    reader = gguf.GGUFReader(file)
    model = reader.get_field(gguf.Keys.Tokenizer.MODEL)
    assert model is not None
    if model.contents() == "gpt2":
        theirs = rebuild_tokenizer(reader)
        question = {"role": "user", "content": TEXTS[0]}
        texts = [*TEXTS, processor.apply_chat_template([question], add_generation_prompt=True)]
        found = {text: theirs.encode(text, add_special_tokens=False).ids for text in texts}
    else:
        found = {text: merge_by_score(reader, text) for text in TEXTS}
    for text, ids in found.items():
        if ids != processor.tokenize(text)[0]:
            yield f"a tokenizer that gives other ids for {text[:40]!r}"


def reads_architecture(model_type: str) -> bool:
    """Return whether transformers builds a language model of this kind out of a GGUF file."""
    return gguf.MODEL_ARCH_NAMES[ARCHITECTURES[model_type].arch] in GGUF_SUPPORTED_ARCHITECTURES


@torch.no_grad()
def read_logits(file: Path, text_config: PreTrainedConfig, ids: Tensor) -> Tensor:
    """Return the logits of a question without an image, `(1, T, vocabulary)`, by transformers' reader of GGUF.

    Raises:
        ValueError: the file's settings are not those of the language model.
    """
    with quiet_loading():
        read: PreTrainedConfig = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        for name in CONFIG_FIELDS:
            ours, theirs = getattr(text_config, name, None), getattr(read, name, None)
            if ours is not None and theirs is not None and abs(ours - theirs) > 1e-6 * abs(ours):
                raise ValueError(f"{file.name} says {name}={theirs} instead of {ours}")
        if text_config.model_type == "mistral":  # a Llama to llama.cpp, whose tensors transformers finds by that name
            text_config = LlamaConfig.from_dict(text_config.to_dict() | {"model_type": "llama"})
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, config=text_config, dtype=torch.float32
        )
    logits = model.eval()(input_ids=ids).logits
    del model
    gc.collect()
    return logits
