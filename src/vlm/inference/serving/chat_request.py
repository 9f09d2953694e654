"""A request for a chat completion, field by field as OpenAI's API has them; every other field is refused.

`chat_template_kwargs` is none of OpenAI's: vLLM and SGLang have it.

A field that would have no effect on the answer is refused with its name (`UNSERVED_FIELDS`), unless OpenAI documents
that it never has one (`FieldsWithoutEffect`). To serve another, add it to `ChatRequest` and read it in `chat`.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from vlm.inference.engine.options import LEAST_TEMPERATURE

MAX_TOP_LOGPROBS = 20
NAME_PATTERN = r"^[a-zA-Z0-9_-]{1,64}$"
"""Names of functions and schemas."""

UNSERVED_FIELDS = {
    "audio": "answers are text",
    "function_call": "use tool_choice",
    "functions": "use tools",
    "prediction": "speculative predictions are not supported",
    "reasoning_effort": "the model has no such setting",
    "verbosity": "the model has no such setting",
    "web_search_options": "nothing is searched",
}
"""Field of OpenAI's API that is not served -> why; null leaves it unused."""


class StrictModel(BaseModel):
    """An object that has no other fields than its own, whose values are not converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


# Content parts


class TextPart(StrictModel):
    """A text in the content of a message."""

    type: Literal["text"]
    text: str


class RefusalPart(StrictModel):
    """A refusal in the content of an assistant's message."""

    type: Literal["refusal"]
    refusal: str


class ImageUrl(StrictModel):
    """An image as a `data:` address."""

    url: str
    detail: Literal["auto"] | None = None
    """Models have one resolution: `low` and `high` are refused."""


class ImagePart(StrictModel):
    """An image in the content of a user's message."""

    type: Literal["image_url"]
    image_url: ImageUrl


def _tag_content(value: object) -> str:
    return "(text)" if isinstance(value, str) else "(parts)"


Parts = Annotated[list[Annotated[TextPart | ImagePart, Discriminator("type")]], Field(min_length=1)]
TextContent = Annotated[
    Annotated[str, Tag("(text)")] | Annotated[Annotated[list[TextPart], Field(min_length=1)], Tag("(parts)")],
    Discriminator(_tag_content),
]
UserContent = Annotated[Annotated[str, Tag("(text)")] | Annotated[Parts, Tag("(parts)")], Discriminator(_tag_content)]
AssistantContent = Annotated[
    Annotated[str, Tag("(text)")]
    | Annotated[
        Annotated[list[Annotated[TextPart | RefusalPart, Discriminator("type")]], Field(min_length=1)], Tag("(parts)")
    ],
    Discriminator(_tag_content),
]


# Messages


class SystemMessage(StrictModel):
    """What the model is told beforehand; `developer` is what newer clients call the system."""

    role: Literal["system", "developer"]
    content: TextContent


class UserMessage(StrictModel):
    """A question, with its images."""

    role: Literal["user"]
    content: UserContent


CallId = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:-]{1,128}$")]


class FunctionCall(StrictModel):
    """A function that the model called, and its arguments as JSON."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    arguments: str


class ToolCall(StrictModel):
    """A call of a tool."""

    id: CallId
    type: Literal["function"]
    function: FunctionCall


class AssistantMessage(StrictModel):
    """An earlier answer, as a client got it."""

    role: Literal["assistant"]
    content: AssistantContent | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[object], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and not self.tool_calls and self.refusal is None:
            raise ValueError("content is needed where there are no tool_calls")
        return self


class ToolMessage(StrictModel):
    """The result of a tool's call."""

    role: Literal["tool"]
    content: TextContent
    tool_call_id: CallId


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Discriminator("role")]


# Tools and forms of answers


class Function(StrictModel):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    description: str | None = None
    parameters: dict[str, object] | None = None
    strict: bool | None = None


class Tool(StrictModel):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


class FunctionName(StrictModel):
    """The name of a function."""

    name: str


class NamedToolChoice(StrictModel):
    """The tool that the model has to call."""

    type: Literal["function"]
    function: FunctionName


class SchemaFormat(StrictModel):
    """A JSON schema with its name."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    description: str | None = None
    schema_: Annotated[dict[str, object] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextFormat(StrictModel):
    """Answers are text."""

    type: Literal["text"]


class JsonObjectFormat(StrictModel):
    """Answers are a JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(StrictModel):
    """Answers are JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: SchemaFormat


class StreamOptions(StrictModel):
    """What a stream has besides the answer."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class TemplateOptions(StrictModel):
    """What the chat template is told, as vLLM and SGLang take it."""

    enable_thinking: bool | None = None
    """Whether the model is to think before it answers."""


def _tag_choice(value: object) -> str:
    return "(name)" if isinstance(value, str) else "(tool)"


def _tag_stop(value: object) -> str:
    return "(text)" if isinstance(value, str) else "(texts)"


Text = Annotated[str, Field(min_length=1)]
Stop = Annotated[Annotated[Text, Tag("(text)")] | Annotated[list[Text], Tag("(texts)")], Discriminator(_tag_stop)]
ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("(name)")] | Annotated[NamedToolChoice, Tag("(tool)")],
    Discriminator(_tag_choice),
]
Number = Annotated[float, Field(allow_inf_nan=False)]
Penalty = Annotated[Number, Field(ge=-2, le=2)]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]


class FieldsWithoutEffect(StrictModel):
    """Fields that OpenAI documents not to change an answer: checked, and otherwise unused."""

    user: str | None = None
    safety_identifier: str | None = None
    metadata: Metadata | None = None
    store: bool | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    service_tier: Literal["auto", "default"] | None = None


class ChatRequest(FieldsWithoutEffect):
    """A request for a chat completion."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: (
        dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[Number, Field(ge=-100, le=100)]] | None
    ) = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Discriminator("type")] | None = None
    tools: Annotated[list[Tool], Field(min_length=1)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None
    chat_template_kwargs: TemplateOptions | None = None

    @property
    def thinking(self) -> bool | None:
        """Whether the model is to think before it answers; None: as it is set."""
        return self.chat_template_kwargs.enable_thinking if self.chat_template_kwargs else None

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.temperature is not None and 0 < self.temperature < LEAST_TEMPERATURE:
            raise ValueError(f"temperature: 0 or at least {LEAST_TEMPERATURE} is needed, got {self.temperature}")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens: give this or max_completion_tokens, not both")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs=true")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: needs stream=true")
        if self.tools is None and self.tool_choice not in (None, "none"):
            raise ValueError("tool_choice: needs tools")
        if self.tools is None and self.parallel_tool_calls is not None:
            raise ValueError("parallel_tool_calls: needs tools")
        names = [tool.function.name for tool in self.tools or ()]
        if len({*names}) < len(names):
            raise ValueError("tools: two functions have the same name")
        if isinstance(self.tool_choice, NamedToolChoice) and self.tool_choice.function.name not in names:
            raise ValueError("tool_choice: names a function that is not among tools")
        if self.modalities == []:
            raise ValueError('modalities: ["text"] is needed')
        return self

    def without_contents(self) -> Self:
        """Return the request without its messages, and without the fields that have no effect."""
        return self.model_copy(update={"messages": [], **dict.fromkeys(FieldsWithoutEffect.model_fields)})
