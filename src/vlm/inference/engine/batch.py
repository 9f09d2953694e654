"""Rows that are generated together: a prompt makes a batch of one row, batches are joined, rows leave.

The prompt runs through transformers' own `generate`, which prepares the inputs of every kind of model, up to the place
where tokens are chosen. Each further token is a step as `generate` makes it, of all rows of a batch at once.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.cache_utils import Cache
from transformers.generation.utils import ALL_CACHE_NAMES, MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL
from transformers.utils import ModelOutput

from vlm.inference.engine.cache import cut_cache, is_filled, is_joinable, join_caches
from vlm.inference.engine.row import Row
from vlm.inference.generate import VisionLanguageModel

UNJOINABLE_INPUTS = ("cross_attention_mask", "encoder_outputs", "decoder_attention_mask")
"""Inputs of models whose every token attends to the images, or to an encoded prompt: their rows have own steps."""
PROMPT_INPUTS = {*MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL, "inputs_embeds"}
"""Inputs that the passes after the prompt's do not take; kept, they would only fill the memory."""

Inputs = dict[str, Any]
"""What a model takes besides ids: tensors, its cache and flags."""


class DecodingBatch:
    """Rows whose next tokens are computed together.

    Args:
        model: transformers' model, which has `generate`.
        rows: the rows.
        ids: `(rows, tokens)`: prompts and answers so far, padded on the left; one more than the cache has seen.
        inputs: what the model's next pass takes besides ids, as `generate` keeps it between passes.
    """

    def __init__(self, model: Any, rows: Sequence[Row], ids: Tensor, inputs: Inputs):
        self.model, self.rows, self.ids, self.inputs = model, list(rows), ids, inputs

    @property
    def is_joinable(self) -> bool:
        """Whether the rows can go on together with those of another batch of the model."""
        mask, cache = self.inputs.get("attention_mask"), self._cache
        return (
            (mask is None or (mask.ndim == 2 and mask.shape[1] == self.ids.shape[1]))  # None: nothing is padding
            and all(self.inputs.get(name) is None for name in UNJOINABLE_INPUTS)
            and cache is not None
            and is_joinable(cache, self.ids.shape[1] - 1)
        )

    @property
    def has_own_state(self) -> bool:
        """Whether what the rows have seen lies in the inputs, and not in the model's modules, as RecurrentGemma's."""
        states = [self.inputs.get(name) for name in ALL_CACHE_NAMES]
        return any(is_filled(state) if isinstance(state, Cache) else state is not None for state in states)

    @property
    def _cache_name(self) -> str | None:
        return next((name for name, value in self.inputs.items() if isinstance(value, Cache)), None)

    @property
    def _cache(self) -> Cache | None:
        return self.inputs.get(self._cache_name or "")

    def step(self) -> None:
        """Compute and choose the next token of each row, and let rows go that end with it.

        Raises:
            Exception: the pass failed; the batch cannot go on, and no row has a new token.
        """
        passed = self.model.prepare_inputs_for_generation(self.ids, next_sequence_length=1, **self.inputs)
        outputs = self.model(**passed, return_dict=True)
        self.inputs = _update_inputs(self.model, outputs, self.inputs)
        self.advance(outputs.logits[:, -1].to(torch.float32, copy=True))

    def advance(self, logits: Tensor) -> None:
        """Choose the next token of each row by logits `(rows, vocabulary)`, and let rows go that end with it."""
        likeliest = logits.argmax(dim=-1).tolist()
        for index, row in enumerate(self.rows):
            ids = self.ids[index : index + 1, self.ids.shape[1] - row.length :]
            row.advance(ids, logits[index : index + 1], likeliest[index] if row.sampler.is_argmax else None)
        tokens = [row.answer[-1] if row.answer else 0 for row in self.rows]  # 0: a row that failed before its first
        self.ids = torch.cat([self.ids, self.ids.new_tensor(tokens).unsqueeze(1)], dim=1)
        self.remove_finished()

    def remove_finished(self) -> None:
        """Let rows go that ended or were cancelled."""
        kept = [index for index, row in enumerate(self.rows) if not (row.is_finished or row.is_cancelled)]
        if len(kept) == len(self.rows):
            return
        self.rows = [self.rows[index] for index in kept]
        if self.rows:
            self._select(torch.tensor(kept, device=self.ids.device))

    def _select(self, kept: Tensor) -> None:
        """Keep some rows, and the columns that are not padding in all of these."""
        length = max(row.length for row in self.rows)
        self.ids = self.ids[kept][:, self.ids.shape[1] - length :]
        cache: Any = self._cache
        if cache is None:
            return
        cache.reorder_cache(kept)
        cut_cache(cache, length - 1)
        self.inputs["attention_mask"] = self._make_mask()
        if (positions := self.inputs.get("position_ids")) is not None:
            self.inputs["position_ids"] = positions.index_select(-2, kept)

    def _make_mask(self) -> Tensor:
        """Return `(rows, tokens)`: 0 at padding."""
        lengths = self.ids.new_tensor([row.length for row in self.rows])
        width = self.ids.shape[1]
        return (torch.arange(width, device=self.ids.device) >= width - lengths.unsqueeze(1)).long()

    @classmethod
    def join(cls, first: Self, second: Self) -> Self:
        """Return a batch of the rows of two, both joinable."""
        batches = (first, second)
        name = first._cache_name
        assert name is not None
        lengths = [batch.ids.shape[1] for batch in batches]
        caches = [batch.inputs[name] for batch in batches]
        inputs: Inputs = {
            key: value for key, value in first.inputs.items() if value is None or isinstance(value, bool | int)
        }
        inputs[name] = join_caches(caches, [length - 1 for length in lengths])
        if first.inputs.get("position_ids") is not None:
            last = [batch.inputs["position_ids"][..., -1:] for batch in batches]
            inputs["position_ids"] = torch.cat(last, dim=-2)  # (rows, 1), or (kinds, rows, 1)
        ids = torch.cat([F.pad(batch.ids, (max(lengths) - batch.ids.shape[1], 0)) for batch in batches])
        joined = cls(first.model, [*first.rows, *second.rows], ids, inputs)
        joined.inputs["attention_mask"] = joined._make_mask()
        return joined


def start_batch(model: VisionLanguageModel, row: Row, options: Mapping[str, object]) -> DecodingBatch:
    """Run a row's prompt, with its answer so far, and choose its next token.

    Args:
        model: the model with its processor.
        row: the row.
        options: transformers' generation options that all answers share.

    Raises:
        Exception: the pass failed; the row has no new token.
    """
    is_new = not row.answer
    started: list[DecodingBatch] = []

    def start(
        network: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: object,
        generation_config: object,
        **inputs: Any,
    ) -> Tensor:
        """Run the prompt through the network and keep the batch; `generate` calls this as its decoding method."""
        passed = network.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **inputs)
        outputs = network(**passed, return_dict=True)
        if is_new:
            row.sampler.processors = logits_processor
        kept = {name: value for name, value in inputs.items() if name not in PROMPT_INPUTS}
        batch = DecodingBatch(network, [row], input_ids, _update_inputs(network, outputs, kept))
        batch.advance(outputs.logits[:, -1].to(torch.float32, copy=True))
        started.append(batch)
        return batch.ids

    prompt = {name: tensor.to(model.model.device) for name, tensor in row.prepared.inputs_with(row.answer).items()}
    chosen = row.sampler.generation_options() if is_new else {"max_new_tokens": row.options.max_new_tokens}
    network: Any = model.model  # `generate` is from a mixin, which PreTrainedModel does not declare
    network.generate(**model.use_cached_features(prompt), **options, **chosen, custom_generate=start)
    return started[0]


def _update_inputs(network: Any, outputs: ModelOutput, inputs: Inputs) -> Inputs:
    """Return the inputs that `generate` keeps for the next pass."""
    is_encoder_decoder = bool(network.config.is_encoder_decoder)
    return network._update_model_kwargs_for_generation(outputs, inputs, is_encoder_decoder=is_encoder_decoder)
