"""An OpenAI-compatible endpoint for any checkpoint that generates: `transformers serve`'s handler with our prompts.

The handler of transformers serves only model classes that it knows, and lets requests name web addresses and files.
Here one checkpoint is served, prompts become tokens as in `vlm generate`, and requests carry their images (`data:`).
"""

import base64
import binascii
import copy
import uuid
from collections.abc import Sequence
from typing import Any, cast

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from PIL import Image
from starlette.middleware.trustedhost import TrustedHostMiddleware
from torch import Tensor
from transformers import BatchEncoding, BatchFeature, GenerationConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerationState, Modality

from vlm.assembly.private_names import check_private_names
from vlm.config.schema import InferenceConfig
from vlm.data.sample import BadSample, ContentPart, ImageRef, Turn
from vlm.data.vision.images import open_image
from vlm.inference.generate import VisionLanguageModel

Message = dict[str, Any]
"""A JSON object of a request, before its form is checked."""

ROLES = ("system", "user", "assistant")
FIELD_BOUNDS = {"temperature": (0, 2), "top_p": (0, 1), "max_tokens": (1, 2**20), "max_completion_tokens": (1, 2**20)}
"""Field of a request -> its least and its greatest value."""
IGNORED_FIELDS = {"user", "metadata", "store", "stream_options", "service_tier", "parallel_tool_calls"}
"""Fields that do not change the answer."""
NEUTRAL_VALUES = (None, 1, 0, False, [], {}, "", "none", "auto", {"type": "text"})
"""Values that leave an unsupported field unused: one answer, no tools, no log probabilities …"""


class PromptProcessor:
    """The processor that the handler uses: our code turns messages into inputs; all else is the tokenizer's."""

    def __init__(self, model: VisionLanguageModel):
        self.vlm, self.tokenizer = model, model.processor.tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> BatchEncoding:
        """Tokenize texts: the handler does that for stop strings."""
        return self.tokenizer(*args, **kwargs)

    def apply_chat_template(self, conversation: Sequence[Message], **options: object) -> BatchFeature:
        """Return the inputs of a conversation that waits for a reply; the handler's `options` do not change them."""
        turns, images = parse_messages(conversation)
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
        """Return the messages unchanged: `PromptProcessor` reads them."""
        return messages

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
        refused = {*self._unused_fields, "tools", "generation_config", "logit_bias"} - IGNORED_FIELDS
        used = [name for name in sorted(refused & {*body}) if body[name] not in NEUTRAL_VALUES]
        if unsupported := [f"{name}={body[name]!r:.40}" for name in used]:
            raise HTTPException(400, f"not served here: {', '.join(unsupported)}")
        if not isinstance(body.get("messages"), list) or not body["messages"]:
            raise HTTPException(400, "messages: a list of at least one message is needed")
        for field, (least, most) in FIELD_BOUNDS.items():
            value = body.get(field)
            if value is not None and not (isinstance(value, int | float) and least <= value <= most):
                raise HTTPException(400, f"{field}={value}: a number from {least} to {most} is needed")


def parse_messages(messages: Sequence[Message]) -> tuple[list[Turn], list[Image.Image]]:
    """Return a request's messages as a conversation, and its opened images.

    Raises:
        HTTPException: a message is malformed, or an image is a web address or does not open.
    """
    turns, images = [], []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise HTTPException(400, f"{where}: role must be one of {', '.join(ROLES)}")
        content = message.get("content")
        items = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(items, list) or not items:
            raise HTTPException(400, f"{where}: content must be a text, or a list of texts and images")
        parts: list[ContentPart] = []
        for place, item in enumerate(items):
            kind = item.get("type") if isinstance(item, dict) else None
            if kind == "text" and isinstance(item.get("text"), str):
                follows_image = bool(parts) and not any(isinstance(part, str) for part in parts)
                needs_line = follows_image and not item["text"].startswith("\n")  # as in `vlm generate`
                parts.append(f"\n{item['text']}" if needs_line else item["text"])
            elif kind == "image_url":
                images.append(_decode_image(item["image_url"], f"{where}.content[{place}]"))
                parts.append(ImageRef())
            else:
                raise HTTPException(400, f"{where}.content[{place}]: type must be text or image_url")
        turns.append(Turn(message["role"], tuple(parts)))
    return turns, images


def _decode_image(item: object, where: str) -> Image.Image:
    """Return the image of a `data:` address; `where` is its place in the request."""
    address = item.get("url") if isinstance(item, dict) else item
    head, comma, content = address.partition(",") if isinstance(address, str) else ("", "", "")
    if not (head.startswith("data:image/") and head.endswith(";base64") and comma):
        hint = "the image itself is needed, as data:image/png;base64,…; addresses are not fetched"
        raise HTTPException(400, f"{where}: {hint}")
    try:
        return open_image(ImageRef(content=base64.b64decode(content, validate=True)), where)
    except binascii.Error as error:
        raise HTTPException(400, f"{where}: its base64 does not decode: {error}") from error
    except BadSample as error:
        raise HTTPException(400, f"{where}: {error.reason}") from error


def make_app(model: VisionLanguageModel, name: str, hosts: Sequence[str]) -> FastAPI:
    """Return the endpoints of a model, under its name in requests.

    The server answers under the given host names, so that no other site's page reaches it under its own; `*`: any.
    """
    check_private_names()
    handler = ChatHandler(SingleModelManager(name, model), GenerationState())
    app = FastAPI(title=f"vlm serve {name}")
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))

    @app.exception_handler(HTTPException)
    async def refuse(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": {"message": error.detail, "type": "invalid_request_error"}}, error.status_code)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: Message) -> Response:
        return await handler.handle_request(body, request.headers.get("x-request-id") or uuid.uuid4().hex)

    @app.get("/v1/models")
    def models() -> dict[str, object]:
        return {"object": "list", "data": [{"id": name, "object": "model", "owned_by": "vlm"}]}

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    return app
