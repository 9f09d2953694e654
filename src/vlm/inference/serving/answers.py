"""Answers in OpenAI's form: whole, or as chunks of a stream."""

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypedDict, Unpack

from vlm.inference.engine.options import TokenAlternative, TokenLogprob
from vlm.inference.serving.tools import Call

DONE = b"data: [DONE]\n\n"
"""The last event of a stream that ended well."""


def make_id(prefix: str) -> str:
    """Return an id that no other answer has."""
    return f"{prefix}-{secrets.token_hex(12)}"


class ChunkFields(TypedDict, total=False):
    """What an event of a stream may have beside a piece of an answer."""

    logprobs: dict[str, object] | None
    usage: None


def to_event(value: dict[str, object]) -> bytes:
    """Return a value as an event of a stream."""
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


def make_usage(num_prompt_tokens: int, num_answer_tokens: int) -> dict[str, int]:
    """Return how many tokens a request took."""
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_answer_tokens,
        "total_tokens": num_prompt_tokens + num_answer_tokens,
    }


def dump_logprobs(logprobs: Sequence[TokenLogprob] | None) -> dict[str, object] | None:
    """Return log probabilities of tokens; None where none are wanted."""
    if logprobs is None:
        return None
    content = [
        {**_dump_token(token), "top_logprobs": [_dump_token(alternative) for alternative in token.top]}
        for token in logprobs
    ]
    return {"content": content, "refusal": None}


def _dump_token(token: TokenAlternative) -> dict[str, object]:
    logprob = max(token.logprob, -9999.0)  # JSON has no infinity; OpenAI writes this number too
    return {"token": token.token, "logprob": logprob, "bytes": list(token.bytes)}


@dataclass
class Answer:
    """One answer to a request, as far as it has been written.

    Attributes:
        text: its text, without calls of tools once it is complete.
        logprobs: of its tokens; None where they are not wanted.
        num_tokens: the number of tokens that were generated.
        finish_reason: why it ended.
        calls: the calls of tools in it.
    """

    text: str = ""
    logprobs: list[TokenLogprob] | None = None
    num_tokens: int = 0
    finish_reason: str | None = None
    calls: list[Call] = field(default_factory=list)

    def to_choice(self, index: int) -> dict[str, object]:
        """Return the answer as one of a completion's choices."""
        message: dict[str, object] = {"role": "assistant", "content": self.text, "refusal": None}
        if self.calls:
            message |= {"content": self.text or None, "tool_calls": [call.to_dict() for call in self.calls]}
        return {
            "index": index,
            "message": message,
            "logprobs": dump_logprobs(self.logprobs),
            "finish_reason": self.finish_reason,
        }


@dataclass(frozen=True)
class Completion:
    """What all parts of the reply to one request have in common.

    Attributes:
        model: the model's name.
        fingerprint: of the model and the software, which changes when answers may.
        id: the reply's id.
        created: when it was begun, in seconds since 1970.
    """

    model: str
    fingerprint: str
    id: str = field(default_factory=lambda: make_id("chatcmpl"))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answers: Sequence[Answer], num_prompt_tokens: int) -> dict[str, object]:
        """Return the reply as one object."""
        usage = make_usage(num_prompt_tokens, sum(answer.num_tokens for answer in answers))
        choices = [answer.to_choice(index) for index, answer in enumerate(answers)]
        return self._wrap("chat.completion", choices, usage=usage)

    def chunk(
        self, index: int, delta: dict[str, object], finish_reason: str | None = None, **fields: Unpack[ChunkFields]
    ) -> bytes:
        """Return an event with a piece of an answer."""
        logprobs = fields.pop("logprobs", None)
        choice: dict[str, object] = {
            "index": index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        return to_event(self._wrap("chat.completion.chunk", [choice], **fields))

    def usage_chunk(self, usage: dict[str, int]) -> bytes:
        """Return the event with the number of tokens, which belongs to no answer."""
        return to_event(self._wrap("chat.completion.chunk", [], usage=usage))

    def _wrap(self, kind: str, choices: list[dict[str, object]], **fields: object) -> dict[str, object]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
            **fields,
        }
