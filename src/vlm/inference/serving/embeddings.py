"""`/v1/embeddings`: hidden states of a model that writes, in OpenAI's form; images come in `messages`.

An embedding is the last layer's hidden state, behind its norm, at the prompt's last token: the state from which the
answer's first token is drawn. It is scaled to length 1. The model was trained to write and not to compare, so the
answer says what it is (`pooling`).
"""

import base64
import struct
from collections.abc import Callable
from contextlib import ExitStack
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlm.data.processor import SampleInputs
from vlm.inference.engine.engine import Engine
from vlm.inference.serving.batcher import Batcher
from vlm.inference.serving.chat import translate_engine_error
from vlm.inference.serving.pooling_request import EmbeddingsRequest, count_tokens, parse_inputs, prepare_inputs
from vlm.inference.serving.service import Call, Service
from vlm.models.configuration_prediction import is_composed

POOLING = "last hidden layer, last token of the prompt, length 1; not trained for comparisons"


class EmbeddingsEndpoint:
    """Answers requests for embeddings.

    Args:
        service: what all paths share.
        engine: of the model.
    """

    def __init__(self, service: Service, engine: Engine):
        self.service, self.vlm = service, engine.model
        model, processor = self.vlm.model, self.vlm.processor
        self.batcher = Batcher(processor, model.device, self._embed, service.config.max_batch)

    def _embed(self, inputs: dict[str, Tensor]) -> list[list[float]]:
        states = read_last_states(self.vlm.model, self.vlm.use_cached_features(inputs))
        return torch.nn.functional.normalize(states.float(), dim=1).cpu().tolist()

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
        return {"object": "list", "data": data, "model": self.service.name, "usage": usage, "pooling": POOLING}

    def _prepare(self, call: Call) -> tuple[list[SampleInputs], Callable[[list[float]], object]]:
        """Return the inputs of a request, and what writes its embeddings."""
        request = parse_inputs(EmbeddingsRequest, call)
        rows = prepare_inputs(request, self.vlm.processor, self.vlm.model.config, self.service.config)
        return rows, encode_base64 if request.encoding_format == "base64" else list

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
