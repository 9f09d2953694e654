"""An OpenAI-compatible endpoint for any checkpoint that answers: `transformers serve`'s handler, our prompts.

What transformers ships takes models that it knows by their class and lets requests name addresses and files. Here one
checkpoint is served, prompts become tokens as in `vlm generate`, and images come in the request itself (`data:`).
"""

import base64
import binascii
import copy
import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware
from transformers import BatchFeature, GenerationConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerationState, Modality

from vlm.assembly.private_names import check_private_names
from vlm.config.schema import InferenceConfig
from vlm.data.sample import BadSample, ContentPart, ImageRef, Turn
from vlm.data.vision.images import open_image
from vlm.inference.generate import VisionLanguageModel

ROLES = ("system", "user", "assistant")
FIELD_BOUNDS = {"temperature": (0, 2), "top_p": (0, 1), "max_tokens": (1, 2**20), "max_completion_tokens": (1, 2**20)}
"""Field of a request -> least and most."""
IGNORED_FIELDS = {"user", "metadata", "store", "stream_options", "service_tier", "parallel_tool_calls"}
"""Fields that change nothing of an answer."""
NEUTRAL_VALUES = (None, 1, 0, False, [], {}, "", "none", "auto", {"type": "text"})
"""Values that ask for nothing: one answer, no tools, no log probabilities …"""


class PromptProcessor:
    """What the handler takes for a processor: messages to inputs by our own code; all else is the tokenizer's.

    Args:
        model: the model and its processor.
    """

    def __init__(self, model: VisionLanguageModel):
        self.vlm, self.tokenizer = model, model.processor.tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Texts to ids, for strings at which an answer stops."""
        return self.tokenizer(*args, **kwargs)

    def apply_chat_template(self, conversation: Sequence[dict[str, Any]], **options: Any) -> BatchFeature:
        """Inputs of a conversation that waits for a reply; `options` are transformers' own, which are settled here."""
        turns, images = parse_messages(conversation)
        try:
            inputs = self.vlm.inputs([turns], [images])
        except ValueError as error:  # the template refuses it, or leaves nothing of it
            raise HTTPException(400, str(error)) from error
        longest = self.vlm.model.config.get_text_config().max_position_embeddings
        if inputs["input_ids"].shape[1] >= longest:
            number = inputs["input_ids"].shape[1]
            raise HTTPException(400, f"the conversation has {number} tokens; the model takes fewer than {longest}")
        return BatchFeature(inputs)


class CachingModel:
    """A model as the handler takes it; it looks for images that it was shown before where it generates.

    That is on a thread of its own: requests are read on another, which must not wait for the visual encoder.

    Args:
        model: the model and its processor.
    """

    def __init__(self, model: VisionLanguageModel):
        self.vlm = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.vlm.model, name)

    def generate(self, **inputs: Any) -> Any:
        """As the model's."""
        return self.vlm.model.generate(**self.vlm.use_cached_features(inputs))


class SingleModelManager(ModelManager):
    """The one model that is served, under one name.

    Args:
        name: what requests call it.
        model: the model and its processor.
    """

    def __init__(self, name: str, model: VisionLanguageModel):
        self.force_model, self.prompts, self.model = name, PromptProcessor(model), CachingModel(model)

    def load_model_and_processor(self, *args: Any, **kwargs: Any) -> Any:
        """The model, whatever is asked for: names are checked by the handler."""
        return self.model, self.prompts

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """Names stay as they are, without a revision."""
        return model_id

    @staticmethod
    def get_model_modality(*args: Any, **kwargs: Any) -> Modality:
        """It takes text and images."""
        return Modality.VLM


class ChatHandler(ChatCompletionHandler):
    """`/v1/chat/completions`."""

    model_manager: SingleModelManager

    def get_processor_inputs_from_messages(self, messages: Any, modality: Modality) -> list[dict[str, Any]]:
        """Messages as they came: `Prompts` reads them."""
        return messages

    def _build_generation_config(
        self, body: dict[str, Any], model_generation_config: GenerationConfig, use_cb: bool = False
    ) -> GenerationConfig:
        """What a request asks for: greedy without a temperature; an answer ends where the template ends it."""
        prompts = self.model_manager.prompts
        ours = prompts.vlm.generation_options(InferenceConfig())
        ends = ours.get("stop_strings", [])
        own = copy.deepcopy(model_generation_config)
        own.update(**{name: value for name, value in ours.items() if name not in ("tokenizer", "max_new_tokens")})
        found = super()._build_generation_config(body, own, use_cb=use_cb)
        found.do_sample = bool(body.get("temperature"))
        asked = body.get("stop") or []
        found.stop_strings = [*ends, *([asked] if isinstance(asked, str) else asked)] or None
        return found

    def _validate_request(self, body: dict[str, Any]) -> None:
        """Refuse what is no chat request, or asks for what would be passed over."""
        super()._validate_request(body)
        refused = {*self._unused_fields, "tools", "generation_config", "logit_bias"} - IGNORED_FIELDS
        if unsupported := [
            f"{name}={body[name]!r:.40}" for name in sorted(refused & {*body}) if body[name] not in NEUTRAL_VALUES
        ]:
            raise HTTPException(400, f"not served here: {', '.join(unsupported)}")
        if not isinstance(body.get("messages"), list) or not body["messages"]:
            raise HTTPException(400, "messages: a list of at least one message is needed")
        for field, (least, most) in FIELD_BOUNDS.items():
            value = body.get(field)
            if value is not None and not (isinstance(value, int | float) and least <= value <= most):
                raise HTTPException(400, f"{field}={value}: a number from {least} to {most} is needed")


def parse_messages(messages: Sequence[dict[str, Any]]) -> tuple[list[Turn], list[Any]]:
    """A request's messages as a conversation, and its images, opened.

    Raises:
        HTTPException: a message has another form, or an image is an address or does not open.
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
                leads = bool(parts) and not any(isinstance(part, str) for part in parts)
                # images before a text stand on a line of their own, as `vlm generate` puts them
                parts.append("\n" + item["text"] if leads and not item["text"].startswith("\n") else item["text"])
            elif kind == "image_url":
                images.append(_decode_image(item["image_url"], f"{where}.content[{place}]"))
                parts.append(ImageRef())
            else:
                raise HTTPException(400, f"{where}.content[{place}]: type must be text or image_url")
        turns.append(Turn(message["role"], tuple(parts)))
    return turns, images


def _decode_image(given: Any, where: str) -> Any:
    """The image of a `data:` address."""
    address = given.get("url") if isinstance(given, dict) else given
    head, comma, content = address.partition(",") if isinstance(address, str) else ("", "", "")
    if not (head.startswith("data:image/") and head.endswith(";base64") and comma):
        raise HTTPException(
            400, f"{where}: the image itself is needed, as data:image/png;base64,…; addresses are not fetched"
        )
    try:
        return open_image(ImageRef(content=base64.b64decode(content, validate=True)), where)
    except binascii.Error as error:
        raise HTTPException(400, f"{where}: its base64 does not decode: {error}") from error
    except BadSample as error:
        raise HTTPException(400, f"{where}: {error.reason}") from error


def make_app(model: VisionLanguageModel, name: str, hosts: Sequence[str]) -> FastAPI:
    """The endpoints of a model.

    Args:
        model: the model and its processor.
        name: what requests call it.
        hosts: by which names the server may be addressed, so that no page of another site reaches it by a name of its
            own; `*`: any.
    """
    check_private_names()
    handler = ChatHandler(SingleModelManager(name, model), GenerationState())
    app = FastAPI(title=f"vlm serve {name}")
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": {"message": error.detail, "type": "invalid_request_error"}}, error.status_code)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: dict[str, Any]) -> Any:
        return await handler.handle_request(body, request.headers.get("x-request-id") or uuid.uuid4().hex)

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "owned_by": "vlm"}]}

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    return app
