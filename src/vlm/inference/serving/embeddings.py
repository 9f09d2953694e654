"""`/v1/embeddings` in OpenAI's form: vectors of a head that embeds, or hidden states; images come in `messages`.

Of a model that writes, an embedding is the last layer's hidden state, behind its norm, at the prompt's last token: the
state from which the answer's first token is drawn. It is scaled to length 1. The model was trained to write and not to
compare, so the answer says what it is (`pooling`).
"""

import base64
import struct
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlm.data.processor import Processor, SampleInputs
from vlm.inference.embed import Embedder
from vlm.inference.generate import VisionLanguageModel
from vlm.inference.serving.batcher import Batcher
from vlm.inference.serving.chat import translate_engine_error
from vlm.inference.serving.errors import RequestError
from vlm.inference.serving.pooling_request import EmbeddingsRequest, count_tokens, parse_inputs, prepare_inputs
from vlm.inference.serving.service import Call, Service
from vlm.models.configuration_prediction import is_composed
from vlm.models.contrastive import shorten_vectors

POOLING = "last hidden layer, last token of the prompt, length 1; not trained for comparisons"


@dataclass(frozen=True)
class StateSource:
    """Hidden states of a model that writes; a `VectorSource`.

    Attributes:
        vlm: the model.
    """

    vlm: VisionLanguageModel
    pooling: str = POOLING
    suffix: tuple[int, ...] = ()

    @property
    def model(self) -> Any:
        """The model."""
        return self.vlm.model

    @property
    def processor(self) -> Processor:
        """The model's processor."""
        return self.vlm.processor

    def system_prompt(self, side: str | None) -> str:
        """Return no system turn.

        Raises:
            RequestError: a side is asked for.
        """
        if side is not None:
            raise RequestError(
                "input_type: this model has no head that embeds, so queries are no other than documents; leave it out",
                param="input_type",
            )
        return ""

    def check_width(self, width: int | None) -> None:
        """Refuse every width: embeddings of a model that was not trained for it cannot be shortened."""
        if width is not None:
            raise RequestError("dimensions: embeddings of this model cannot be shortened", param="dimensions")

    def embed(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        """Return the vector of each row of a batch."""
        states = read_last_states(self.vlm.model, self.vlm.use_cached_features(inputs))
        return list(torch.nn.functional.normalize(states.float(), dim=1).cpu())


class HeadSource:
    """Vectors of a head that embeds; a `VectorSource`.

    Args:
        embedder: the model.
    """

    def __init__(self, embedder: Embedder):
        self.embedder, self.model, self.processor = embedder, embedder.model, embedder.processor
        self.pooling = (
            f"{embedder.head.pooling} of the hidden states, through a head that was trained to embed, length 1"
        )
        self.suffix = tuple(embedder.model.config.suffix_ids)

    def system_prompt(self, side: str | None) -> str:
        """Return the system turn of a side; None is the side of documents."""
        return self.embedder.head.prompts.get(side or "document", "")

    def check_width(self, width: int | None) -> None:
        """Refuse a width that vectors do not have."""
        try:
            self.embedder.check_width(width)
        except ValueError as error:
            raise RequestError(f"dimensions: {error}", param="dimensions") from None

    def embed(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        """Return the vector of each row of a batch."""
        return self.embedder.of(inputs)


VectorSource = StateSource | HeadSource
"""What embeddings are made by."""


class EmbeddingsEndpoint:
    """Answers requests for embeddings.

    Args:
        service: what all paths share.
        source: makes the vectors.
    """

    def __init__(self, service: Service, source: VectorSource):
        self.service, self.source = service, source
        self.batcher = Batcher(source.processor, source.model.device, source.embed, service.config.max_batch)

    async def respond(self, call: Call) -> dict[str, object]:
        """Return the embeddings for a request.

        Raises:
            RequestError: the request is refused.
        """
        rows, write = await self.service.threads.run(self._prepare, call)
        call.release()
        with ExitStack() as places:
            places.enter_context(self.service.admission.places(len(rows) - 1))
            try:
                embeddings = await self.batcher.run(rows)
            except Exception as error:
                raise translate_engine_error(error) from error
        number = count_tokens(rows)
        self.service.metrics.prompt_tokens.inc(number)
        data = [
            {"object": "embedding", "index": index, "embedding": write(embedding)}
            for index, embedding in enumerate(embeddings)
        ]
        usage = {"prompt_tokens": number, "total_tokens": number}
        return {
            "object": "list",
            "data": data,
            "model": self.service.name,
            "usage": usage,
            "pooling": self.source.pooling,
        }

    def _prepare(self, call: Call) -> tuple[list[SampleInputs], Callable[[Tensor], object]]:
        """Return the inputs of a request, and what writes its embeddings."""
        request, source = parse_inputs(EmbeddingsRequest, call), self.source
        source.check_width(request.dimensions)
        rows = prepare_inputs(
            request,
            source.processor,
            source.model.config,
            self.service.config,
            source.suffix,
            source.system_prompt(request.input_type),
        )
        encode = encode_base64 if request.encoding_format == "base64" else list

        def write(vector: Tensor) -> object:
            """Write one embedding."""
            shortened = vector if request.dimensions is None else shorten_vectors(vector, request.dimensions)
            return encode(shortened.tolist())

        return rows, write

    def close(self) -> None:
        """End the model's thread."""
        self.batcher.close()


def encode_base64(embedding: list[float]) -> str:
    """Return an embedding as OpenAI's clients read it: little-endian float32 in base64."""
    return base64.b64encode(struct.pack(f"<{len(embedding)}f", *embedding)).decode()


def read_last_states(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Return the hidden state of each prompt's last token: `(rows, text_dim)`; prompts are padded on the right."""
    mask = inputs["attention_mask"]
    arguments: dict[str, object] = {**inputs, "use_cache": False}
    composed = is_composed(model.config)
    if composed:
        arguments["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
    decode = cast(nn.Module, model.decode if composed else model.base_model)
    states = decode(**arguments).last_hidden_state
    last = mask.sum(dim=1) - 1
    return states[torch.arange(len(states), device=states.device), last]
