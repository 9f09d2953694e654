"""From JSON to a checked request: forms by pydantic, numbers by the limits; every refusal names the field."""

from collections.abc import Sequence
from typing import TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from vlm.config.serving_schema import ServingConfig
from vlm.inference.serving.chat_request import (
    UNSERVED_FIELDS,
    AssistantMessage,
    ChatRequest,
    ImagePart,
    Message,
    StrictModel,
)
from vlm.inference.serving.errors import RequestError, show
from vlm.inference.serving.messages import read_text

Request = TypeVar("Request", bound=StrictModel)

CODES = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}
"""Kind of pydantic's error -> OpenAI's code; others are `invalid_type` or `invalid_value`."""
MAX_NAME_LENGTH = 60


def parse_request(kind: type[Request], body: dict[str, object], config: ServingConfig) -> Request:
    """Return a request of a kind out of its JSON.

    Raises:
        RequestError: a field is unknown, not served, malformed or beyond a limit; names it.
    """
    for name, reason in UNSERVED_FIELDS.items():
        if body.get(name) is not None:
            raise RequestError(f"{name}: not served here, {reason}", param=name, code="unsupported_parameter")
    check_counts(body, config)
    try:
        return kind.model_validate({name: value for name, value in body.items() if name not in UNSERVED_FIELDS})
    except ValidationError as error:
        raise describe_validation_error(error.errors(include_url=False)[0], body) from None


def check_counts(body: dict[str, object], config: ServingConfig) -> None:
    """Refuse lists that are longer than a limit, before their items are looked at."""
    limits = {
        "messages": ("max_messages", config.max_messages),
        "tools": ("max_tools", config.max_tools),
        "stop": ("max_stops", config.max_stops),
        "logit_bias": ("max_logit_bias", config.max_logit_bias),
    }
    for name, (key, limit) in limits.items():
        value = body.get(name)
        if isinstance(value, list | dict) and len(value) > limit:
            refuse_beyond(name, f"{len(value):,}", key, limit)
    messages = body.get("messages")
    check_part_count(messages if isinstance(messages, list) else [], "messages", config)
    if isinstance(n := body.get("n"), int) and n > config.max_choices:
        refuse_beyond("n", show(n), "max_choices", config.max_choices)
    for name in ("max_tokens", "max_completion_tokens"):
        if isinstance(value := body.get(name), int) and value > config.max_tokens:
            refuse_beyond(name, show(value), "max_tokens", config.max_tokens)


def check_part_count(messages: Sequence[object], param: str, config: ServingConfig) -> None:
    """Refuse messages that have too many content parts together."""
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    number = sum(len(content) for content in contents if isinstance(content, list))
    if number > config.max_parts:
        refuse_beyond(param, f"{number:,} content parts", "max_parts", config.max_parts)


def refuse_beyond(param: str, given: str, key: str, limit: int) -> None:
    """Raise the refusal of a value beyond a limit."""
    raise RequestError(
        f"{param}: {given} given, at most {limit:,} are taken (serving.{key})", param=param, code="limit_exceeded"
    )


def refuse_characters(param: str, limit: int) -> None:
    """Raise the refusal of more characters than a request may have."""
    keys = "serving.max_characters, serving.max_characters_per_position"
    message = f"{param}: more than {limit:,} characters, the most that are taken ({keys})"
    raise RequestError(message, param=param, code="context_length_exceeded")


def describe_validation_error(error: ErrorDetails, body: object) -> RequestError:
    """Return pydantic's error as a refusal that names the field as the client wrote it."""
    kind = error["type"]
    param = format_location(error["loc"], body, is_missing=kind == "missing")
    if kind == "extra_forbidden":
        return RequestError(f"{param}: unknown field", param=param, code=CODES[kind])
    if kind == "missing":
        return RequestError(f"{param}: is missing", param=param, code=CODES[kind])
    if kind == "value_error":  # of our own validators, which name the field
        message = str(error.get("ctx", {}).get("error", error["msg"]))
        param, _, reason = message.partition(": ") if not param else (param, "", message)
        return RequestError(f"{param}: {reason}", param=param, code="invalid_value")
    needed = error["msg"].replace("Input should be ", "").replace("'", '"')
    code = "invalid_type" if kind.endswith("_type") else "invalid_value"
    if kind.startswith("union_tag"):
        tag = error.get("ctx", {}).get("discriminator", "").strip("'\"")
        allowed = error.get("ctx", {}).get("expected_tags", "").replace("'", '"')
        item = error["input"]
        given = show(item.get(tag)) if isinstance(item, dict) else show(item)
        param = f"{param}.{tag}"
        return RequestError(f"{param}: {allowed or 'a value'} is needed, got {given}", param=param, code=code)
    return RequestError(f"{param}: {needed}, got {show(error['input'])}", param=param, code=code)


def format_location(location: Sequence[str | int], body: object, *, is_missing: bool = False) -> str:
    """Return a location of pydantic's as a path into the request, without the names of alternatives.

    Args:
        location: the steps; the alternative that a `type` or a `role` chose is one too.
        body: the request.
        is_missing: whether the last step is a field that the request lacks.
    """
    path, node = "", body
    for place, step in enumerate(location):
        following = location[place + 1] if place + 1 < len(location) else None
        if isinstance(step, int) and isinstance(node, list):
            path += f"[{step}]"
            node = node[step] if step < len(node) else None
        elif isinstance(node, dict):
            is_alternative = step in (node.get("type"), node.get("role")) and following in node
            is_field = step in node or (is_missing and following is None)
            if is_field and not is_alternative:
                name = str(step)
                shown = name if len(name) <= MAX_NAME_LENGTH else f"{name[:MAX_NAME_LENGTH]}…"
                path += f".{shown}" if path else shown
                node = node.get(step)
    return path


def check_texts(request: ChatRequest, config: ServingConfig) -> None:
    """Refuse a chat request whose texts, images and stops are beyond the limits."""
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    for stop in stops:
        if len(stop) > config.max_stop_characters:
            refuse_beyond("stop", f"{len(stop):,} characters", "max_stop_characters", config.max_stop_characters)
    check_messages(request.messages, config)
    schemas: list[object] = [tool.model_dump() for tool in request.tools or ()]
    if request.response_format is not None:
        schemas.append(request.response_format.model_dump())
    if sum(map(count_characters, schemas)) > config.max_characters:
        refuse_characters("tools", config.max_characters)


def check_messages(messages: Sequence[Message], config: ServingConfig) -> None:
    """Refuse a conversation with more characters or images than allowed."""
    characters = images = 0
    for message in messages:
        for part in [message.content] if isinstance(message.content, str) else message.content or []:
            if isinstance(part, ImagePart):
                images += 1
            else:
                characters += len(read_text(part))
        if isinstance(message, AssistantMessage):
            characters += len(message.refusal or "")
            characters += sum(len(call.function.arguments) for call in message.tool_calls or ())
    if characters > config.max_characters:
        refuse_characters("messages", config.max_characters)
    if images > config.max_images:
        refuse_beyond("messages", f"{images} images", "max_images", config.max_images)


def count_characters(value: object) -> int:
    """Return the number of characters of all texts and keys within a value of JSON; each other value counts as one."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return 1 + sum(count_characters(key) + count_characters(inner) for key, inner in value.items())
    return 1 + (sum(map(count_characters, value)) if isinstance(value, list) else 0)
