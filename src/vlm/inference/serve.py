"""An OpenAI-compatible endpoint for any checkpoint that generates: `transformers serve`'s handler with our prompts.

The handler of transformers serves only model classes that it knows, and lets requests name web addresses and files.
Here one checkpoint is served, prompts become tokens as in `vlm generate`, and requests carry their images (`data:`).
"""

import copy
import uuid
from collections.abc import Sequence
from typing import Any, cast

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware
from torch import Tensor
from transformers import BatchEncoding, BatchFeature, GenerationConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerationState, Modality

from vlm.assembly.private_names import check_private_names
from vlm.config.schema import InferenceConfig
from vlm.inference.chat_request import Message, check_fields, parse_messages
from vlm.inference.generate import VisionLanguageModel

IGNORED_FIELDS = {"user", "metadata", "store", "stream_options", "service_tier", "parallel_tool_calls"}
"""Fields that do not change the answer."""
UNSERVED_FIELDS = {"tools", "generation_config", "logit_bias", "chat_template_kwargs"}
"""Fields that are not served, besides those that the handler leaves unused."""


class PromptProcessor:
    """The processor that the handler uses: our code turns messages into inputs; all else is the tokenizer's."""

    def __init__(self, model: VisionLanguageModel):
        self.vlm, self.tokenizer = model, model.processor.tokenizer

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the tokenizer."""
        return getattr(self.tokenizer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> BatchEncoding:
        """Tokenize texts: the handler does that for stop strings."""
        return self.tokenizer(*args, **kwargs)

    def apply_chat_template(self, conversation: Sequence[Message], **options: object) -> BatchFeature:
        """Return the inputs of a conversation that waits for a reply; the handler's `options` do not change them."""
        (parsed,) = conversation
        turns, images = parsed["turns"], parsed["images"]
        try:
            inputs = self.vlm.inputs([turns], [images])
        except ValueError as error:  # the template refuses the conversation, or renders nothing
            raise HTTPException(400, str(error)) from error
        length, positions = inputs["input_ids"].shape[1], self.vlm.positions
        if length >= positions:
            raise HTTPException(400, f"the conversation has {length} tokens; the model takes fewer than {positions}")
        return BatchFeature(inputs)


class CachingModel:
    """The model that the handler uses; `generate` replaces the pixels of recent images by their cached features.

    The handler calls `generate` on another thread: the one that reads requests must not wait for the visual encoder.
    """

    def __init__(self, model: VisionLanguageModel):
        self.vlm = model

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the model."""
        return getattr(self.vlm.model, name)

    def generate(self, **inputs: Any) -> Tensor:
        """Return what the model's `generate` returns."""
        return cast(Any, self.vlm.model).generate(**self.vlm.use_cached_features(inputs))


class SingleModelManager(ModelManager):
    """Manages the one model that is served."""

    def __init__(self, name: str, model: VisionLanguageModel):
        self.force_model, self.prompts, self.model = name, PromptProcessor(model), CachingModel(model)

    def load_model_and_processor(self, *args: object, **kwargs: object) -> tuple[CachingModel, PromptProcessor]:
        """Return the served model for any name: the handler checks names."""
        return self.model, self.prompts

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """Return the name unchanged: it has no revision."""
        return model_id

    @staticmethod
    def get_model_modality(*args: object, **kwargs: object) -> Modality:
        """Return that the model reads text and images."""
        return Modality.VLM


class ChatHandler(ChatCompletionHandler):
    """`/v1/chat/completions`."""

    model_manager: SingleModelManager

    def get_processor_inputs_from_messages(self, messages: list[Message], modality: Modality) -> list[Message]:
        """Return the checked conversation, as `PromptProcessor` reads it; the handler looks for videos in it."""
        turns, images = parse_messages(messages)
        return [{"turns": turns, "images": images}]

    def _build_generation_config(
        self, body: Message, model_generation_config: GenerationConfig, use_cb: bool = False
    ) -> GenerationConfig:
        """Return a request's settings: greedy without a temperature; the template's ending ends an answer."""
        options = self.model_manager.prompts.vlm.generation_options(InferenceConfig())
        template_stops = options.get("stop_strings", [])
        defaults = copy.deepcopy(model_generation_config)
        defaults.update(**{name: options[name] for name in options.keys() - {"tokenizer", "max_new_tokens"}})
        config = super()._build_generation_config(body, defaults, use_cb=use_cb)
        config.do_sample = bool(body.get("temperature"))
        stops = body.get("stop") or []
        config.stop_strings = [*template_stops, *([stops] if isinstance(stops, str) else stops)] or None
        return config

    def _validate_request(self, body: Message) -> None:
        """Refuse a request that is malformed, or that has fields which would be ignored."""
        super()._validate_request(body)
        check_fields(body, (self._unused_fields | UNSERVED_FIELDS) - IGNORED_FIELDS)


def make_app(model: VisionLanguageModel, name: str, hosts: Sequence[str]) -> FastAPI:
    """Return the endpoints of a model, under its name in requests.

    The server answers under the given host names, so that no other site's page reaches it under its own; `*`: any.
    """
    check_private_names()
    handler = ChatHandler(SingleModelManager(name, model), GenerationState())
    app = FastAPI(title=f"vlm serve {name}")
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))

    def refuse(message: str, status: int) -> JSONResponse:
        """Return an error as OpenAI's endpoint words it."""
        text = message.encode(errors="backslashreplace").decode()  # half of a surrogate pair, from the request
        return JSONResponse({"error": {"message": text, "type": "invalid_request_error"}}, status)

    @app.exception_handler(HTTPException)
    async def refuse_request(request: Request, error: HTTPException) -> JSONResponse:
        """Refuse a request that a handler found fault with."""
        return refuse(error.detail, 400 if error.status_code == 422 else error.status_code)

    @app.exception_handler(RequestValidationError)
    async def refuse_body(request: Request, error: RequestValidationError) -> JSONResponse:
        """Refuse a request whose body is no JSON object."""
        return refuse(f"the body must be a JSON object: {error.errors()[0]['msg']}", 400)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: Message) -> Response:
        """Answer a chat, as a whole or as a stream of events."""
        return await handler.handle_request(body, request.headers.get("x-request-id") or uuid.uuid4().hex)

    @app.get("/v1/models")
    def models() -> dict[str, object]:
        """List the one model that is served."""
        return {"object": "list", "data": [{"id": name, "object": "model", "owned_by": "vlm"}]}

    @app.get("/health")
    def health() -> dict[str, str]:
        """Tell that the server listens."""
        return {"status": "ok"}

    return app
