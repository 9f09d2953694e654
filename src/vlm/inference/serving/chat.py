"""`/v1/chat/completions`: a request becomes a prompt and settings, the engine's pieces become an answer or a stream."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import ExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, replace

import torch

from vlm.inference.engine.constraints import Constraint
from vlm.inference.engine.engine import CLOSED, Engine
from vlm.inference.engine.options import Piece, SamplingOptions
from vlm.inference.engine.row import Prepared
from vlm.inference.serving.answers import DONE, Answer, ChunkFields, Completion, dump_logprobs, make_usage
from vlm.inference.serving.chat_request import ChatRequest, JsonSchemaFormat
from vlm.inference.serving.errors import RequestError
from vlm.inference.serving.images import ImageReader
from vlm.inference.serving.messages import read_messages
from vlm.inference.serving.service import Call, Service
from vlm.inference.serving.tools import Toolbox, ToolStream, check_earlier_calls, find_tool_format
from vlm.inference.serving.validation import check_texts, parse_request
from vlm.models.processing_messages import knows_thinking

MAX_PIECES_HELD = 16
"""Pieces of a stream that wait here for a client that reads slowly. The model goes on writing, so that others do not
wait: at most `max_tokens` tokens of each answer are held."""


@dataclass(frozen=True)
class Job:
    """A request that is ready to be answered.

    Attributes:
        request: the request without its messages.
        toolbox: its tools.
        prepared: its prompt as the model's inputs.
        options: the settings of each of its answers.
    """

    request: ChatRequest
    toolbox: Toolbox
    prepared: Prepared
    options: tuple[SamplingOptions, ...]


class ChatEndpoint:
    """Answers requests for chat completions.

    Args:
        service: what all paths share.
        engine: writes answers.
        fingerprint: of the model and the software.
    """

    def __init__(self, service: Service, engine: Engine, fingerprint: str):
        self.service, self.engine, self.fingerprint = service, engine, fingerprint
        self.model = engine.model
        self.tool_format = find_tool_format(self.model.processor)
        self.vocabulary = self.model.model.config.get_text_config().vocab_size

    async def respond(self, call: Call) -> dict[str, object] | AsyncGenerator[bytes]:
        """Return the answer to a request, or the events of one.

        Raises:
            RequestError: the request is refused.
        """
        places = ExitStack()
        try:
            job = await self.service.threads.run(self._prepare, call)
            call.release()
            places.enter_context(self.service.admission.places(len(job.options) - 1))
            size = sum(tensor.nbytes for tensor in job.prepared.inputs.values())
            places.enter_context(self.service.admission.memory(size))
            self.service.metrics.prompt_tokens.inc(job.prepared.num_prompt_tokens)
            completion = Completion(self.service.name, self.fingerprint)
            if job.request.stream:
                return self._stream(job, completion, call, places.pop_all())
            return completion.whole(await self._answer(job, call), job.prepared.num_prompt_tokens)
        finally:
            places.close()

    # --- in a worker thread -----------------------------------------------------------------------------------------

    def _parse(self, body: dict[str, object]) -> ChatRequest:
        request = parse_request(ChatRequest, body, self.service.config)
        self.service.check_model(request.model)
        check_texts(request, self.service.config)
        return request

    def _prepare(self, call: Call) -> Job:
        """Return the job of a request; without its messages, which may be large and are of no more use."""
        request = self._parse(call.parse())
        processor = self.model.processor
        self._check_thinking(request)
        toolbox = Toolbox(request, self.tool_format, processor)
        check_earlier_calls(request.messages, processor)
        constraint = self._compile_constraint(request, toolbox)
        reader = ImageReader(processor, self.service.config)
        turns, images = read_messages(request.messages, reader.read)
        try:
            prepared = self.engine.prepare(turns, images, toolbox.to_template(), request.thinking)
        except ValueError as error:
            code = "context_length_exceeded" if "reads at most" in str(error) else "invalid_prompt"
            raise RequestError(f"messages: {error}", param="messages", code=code) from None
        options = self._make_options(request, toolbox, prepared, constraint)
        return Job(request.without_contents(), toolbox, prepared, options)

    def _check_thinking(self, request: ChatRequest) -> None:
        """Refuse to let a model think whose chat template has no setting for it."""
        if request.thinking and not knows_thinking(self.model.processor.chat_template):
            param = "chat_template_kwargs.enable_thinking"
            message = "true given, but the chat template of this model has no such setting; leave it out"
            raise RequestError(f"{param}: {message}", param=param, code="unsupported_parameter")

    def _compile_constraint(self, request: ChatRequest, toolbox: Toolbox) -> Constraint | None:
        form = request.response_format
        if toolbox.is_used and form is not None and form.type != "text":
            message = "response_format: not served together with tools; tool_choice=none leaves these unused"
            raise RequestError(message, param="response_format", code="unsupported_parameter")
        param = "tools" if toolbox.must_call else "response_format"
        try:
            if toolbox.must_call:
                return self.engine.constraints.lark(toolbox.grammar())
            if isinstance(form, JsonSchemaFormat):
                return self.engine.constraints.json_schema(form.json_schema.schema_ or {})
            if form is not None and form.type == "json_object":
                return self.engine.constraints.json_object()
        except ValueError as error:
            raise RequestError(f"{param}: {error}", param=param, code="invalid_schema") from None
        return None

    def _make_options(
        self, request: ChatRequest, toolbox: Toolbox, prepared: Prepared, constraint: Constraint | None
    ) -> tuple[SamplingOptions, ...]:
        """Return the settings of each answer; those of several differ in their seeds."""
        bias = {int(token): value for token, value in (request.logit_bias or {}).items()}
        if beyond := [token for token in bias if token >= self.vocabulary]:
            message = f"logit_bias: {beyond[0]} is no token; the model has {self.vocabulary:,}"
            raise RequestError(message, param="logit_bias", code="invalid_value")
        stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
        if toolbox.is_used and toolbox.is_single and toolbox.format.end:
            stop = [*stop, toolbox.format.end.strip()]
        options = SamplingOptions(
            max_new_tokens=self._count_answer_tokens(request, prepared.num_prompt_tokens),
            temperature=request.temperature or 0.0,
            top_p=1.0 if request.top_p is None else request.top_p,
            frequency_penalty=request.frequency_penalty or 0.0,
            presence_penalty=request.presence_penalty or 0.0,
            seed=request.seed,
            stop=tuple(stop),
            top_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
            logit_bias=bias,
            constraint=constraint,
        )
        if request.seed is None:
            return (options,) * (request.n or 1)
        seeds = ((request.seed + index + 2**63) % 2**64 - 2**63 for index in range(request.n or 1))
        return tuple(replace(options, seed=seed) for seed in seeds)

    def _count_answer_tokens(self, request: ChatRequest, num_prompt_tokens: int) -> int:
        """Return the largest number of tokens of an answer; refuse one beyond the model's positions."""
        param = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
        asked, positions = request.max_completion_tokens or request.max_tokens, self.model.positions
        remaining = positions - num_prompt_tokens
        if remaining < 1 or (asked or 0) > remaining:
            wanted = f" and its answer may have {asked:,} ({param})" if asked else ""
            message = f"the prompt has {num_prompt_tokens:,} tokens{wanted}, but the model has {positions:,} positions"
            raise RequestError(message, param=param if asked else "messages", code="context_length_exceeded")
        return asked or min(remaining, self.service.config.max_tokens)

    # --- on the event loop ------------------------------------------------------------------------------------------

    async def _answer(self, job: Job, call: Call) -> list[Answer]:
        """Return all answers to a request."""
        answers = [Answer(logprobs=[] if job.request.logprobs else None) for _ in job.options]
        async with self._generate(job, call) as pieces:
            async for index, piece in pieces:
                self._add(answers[index], piece)
        for answer in answers:
            answer.text, answer.calls = job.toolbox.read(answer.text)
            answer.finish_reason = "tool_calls" if answer.calls else answer.finish_reason
        return answers

    async def _stream(self, job: Job, completion: Completion, call: Call, places: ExitStack) -> AsyncGenerator[bytes]:
        """Yield the events of the answers to a request."""
        options = job.request.stream_options
        usage: ChunkFields = {"usage": None} if options and options.include_usage else {}
        answers = [Answer() for _ in job.options]
        splitters = [ToolStream(job.toolbox) for _ in job.options]
        begun: set[int] = set()
        with places:
            async with self._generate(job, call) as pieces:
                async for index, piece in pieces:
                    if index not in begun:
                        begun.add(index)
                        yield completion.chunk(index, {"role": "assistant", "content": "", "refusal": None}, **usage)
                    self._add(answers[index], piece)
                    text, calls = splitters[index].push(piece.text), []
                    if piece.finish_reason:
                        rest, calls = splitters[index].finish()
                        text += rest
                    fields: ChunkFields = {
                        "logprobs": dump_logprobs(piece.logprobs if job.request.logprobs else None),
                        **usage,
                    }
                    if text or piece.logprobs:
                        yield completion.chunk(index, {"content": text}, **fields)
                    if calls:
                        dumped = [{"index": place, **call.to_dict()} for place, call in enumerate(calls)]
                        yield completion.chunk(index, {"tool_calls": dumped}, **usage)
                    if piece.finish_reason:
                        reason = "tool_calls" if calls else piece.finish_reason
                        yield completion.chunk(index, {}, reason, **usage)
            if usage:
                total = sum(answer.num_tokens for answer in answers)
                yield completion.usage_chunk(make_usage(job.prepared.num_prompt_tokens, total))
            yield DONE

    def _add(self, answer: Answer, piece: Piece) -> None:
        """Add a piece to an answer."""
        answer.text += piece.text
        answer.num_tokens += len(piece.token_ids)
        if answer.logprobs is not None:
            answer.logprobs += piece.logprobs
        answer.finish_reason = piece.finish_reason
        self.service.metrics.answer_tokens.inc(len(piece.token_ids))

    @asynccontextmanager
    async def _generate(self, job: Job, call: Call) -> AsyncIterator[AsyncIterator[tuple[int, Piece]]]:
        """Give the pieces of all answers with the number of each, as they come; the answers end with the context."""
        pieces: asyncio.Queue[tuple[int, Piece | Exception | None]] = asyncio.Queue(MAX_PIECES_HELD)

        async def write(index: int, options: SamplingOptions) -> None:
            """Write one answer: put its pieces into the queue, and at the end its error or None."""
            end = None
            try:
                async with aclosing(self.engine.generate(job.prepared, options)) as answer:
                    async for piece in answer:
                        await pieces.put((index, piece))
            except Exception as error:
                end = error
            await pieces.put((index, end))

        tasks = [asyncio.create_task(write(index, options)) for index, options in enumerate(job.options)]
        try:
            yield self._take_pieces(pieces, len(tasks), call)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _take_pieces(
        self, pieces: asyncio.Queue[tuple[int, Piece | Exception | None]], num_answers: int, call: Call
    ) -> AsyncIterator[tuple[int, Piece]]:
        """Yield pieces until all answers are complete, or one fails."""
        is_first = True
        while num_answers:
            index, piece = await pieces.get()
            if isinstance(piece, Exception):
                raise translate_engine_error(piece) from piece
            if piece is None:
                num_answers -= 1
                continue
            if is_first:
                self.service.metrics.first_token_seconds.observe(time.monotonic() - call.begun)
                is_first = False
            yield index, piece


def translate_engine_error(error: Exception) -> Exception:
    """Return what a client is told of an error of the engine; an error that is none of the client's stays as it is."""
    if isinstance(error, torch.OutOfMemoryError):
        message = "the server has not enough memory for this request; send a shorter one, or fewer images"
        return RequestError(message, status=503, code="out_of_memory")
    if isinstance(error, ValueError):
        return RequestError(str(error), code="invalid_value")
    if isinstance(error, RuntimeError) and str(error) == CLOSED:
        return RequestError("the server is shutting down; try again later", status=503, code="unavailable")
    return error
