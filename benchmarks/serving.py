"""Throughput of the engine of `vlm serve`: several clients at once against the same requests one by one.

    python -m benchmarks.serving [--gpu] [--clients N] [--requests N] [--repeats N]

The model has random weights, scaled so that answers depend on questions and images. Answers have unequal lengths. Each
client asks its next question when it has its answer, so that rows join and leave the batch throughout. One by one,
transformers' `generate` answers each request by itself. Both have to give the same tokens. About a minute on two cores.
"""

import asyncio
import random
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks import generation
from benchmarks.generation import NUM_COMPARED_TOKENS, WORDS
from benchmarks.report import Row, compared, report
from benchmarks.sizes import make_parser, make_size
from benchmarks.variants import silence_libraries
from vlm.config.schema import InferenceConfig
from vlm.inference.engine.engine import Engine
from vlm.inference.engine.options import SamplingOptions
from vlm.inference.generate import VisionLanguageModel
from vlm.inference.prompts import user_turn


@dataclass(frozen=True)
class Size:
    """The size of the measurement.

    Attributes:
        shape: the model's shape, a name of `SHAPES`.
        scale: factor of the matrices of connector and language model, see `generation.save`.
        clients: number of clients at once, and of rows that the engine takes.
        requests: number of requests.
        repeats: how often the variants take turns.
        tokens: the least and the greatest length of an answer.
        bf16: whether the model is loaded in bfloat16.
    """

    shape: str = "small"
    scale: float = 3.0
    clients: int = 8
    requests: int = 48
    repeats: int = 2
    tokens: tuple[int, int] = (32, 96)
    bf16: bool = False


GPU = Size("smol", scale=2.0, requests=64, bf16=True)
"""The size for one large GPU."""


@dataclass(frozen=True)
class Request:
    """A question about an image, and how many tokens its answer may have."""

    question: str
    image: Image.Image
    tokens: int


def make_requests(size: Size) -> list[Request]:
    """Draw the requests, the same ones each time."""
    draw = random.Random(0)
    generator = torch.Generator().manual_seed(0)
    requests = []
    for _ in range(size.requests):
        pixels = torch.randint(0, 256, (60, 80, 3), generator=generator, dtype=torch.uint8)
        question = " ".join(draw.choices(WORDS, k=draw.randint(5, 30)))
        requests.append(Request(question, Image.fromarray(pixels.numpy()), draw.randint(*size.tokens)))
    return requests


def answer_one_by_one(model: VisionLanguageModel, requests: Sequence[Request]) -> list[list[int]]:
    """Return the tokens of each answer, by `generate`."""
    answers = []
    for request in requests:
        inputs = model.inputs([[user_turn(request.question, 1)]], [[request.image]])
        options = model.generation_options(InferenceConfig(max_new_tokens=request.tokens))
        network: Any = model.model
        ids = network.generate(**model.use_cached_features(inputs), **options)
        answers.append(ids[0, inputs["input_ids"].shape[1] :].tolist())
    return answers


def answer_together(model: VisionLanguageModel, requests: Sequence[Request], clients: int) -> list[list[int]]:
    """Return the tokens of each answer, by clients that ask the engine one question after the other."""
    answers: dict[int, list[int]] = {}
    numbered = iter(enumerate(requests))

    async def ask_on(engine: Engine) -> None:
        for number, request in numbered:
            prompt = [user_turn(request.question, 1)], [request.image]
            prepared = await asyncio.to_thread(engine.prepare, *prompt)
            pieces = engine.generate(prepared, SamplingOptions(request.tokens))
            answers[number] = [token async for piece in pieces for token in piece.token_ids]

    async def ask_all(engine: Engine) -> None:
        await asyncio.gather(*(ask_on(engine) for _ in range(clients)))

    with closing(Engine(model, clients)) as engine:
        asyncio.run(ask_all(engine))
    return [answers[number] for number in range(len(requests))]


def check_answers(alone: Sequence[Sequence[int]], together: Sequence[Sequence[int]]) -> None:
    """Raise SystemExit where answers differ, or where all are the same, as that would prove nothing."""
    starts = [[tuple(answer[:NUM_COMPARED_TOKENS]) for answer in answers] for answers in (alone, together)]
    if other := [number for number, (one, two) in enumerate(zip(*starts, strict=True)) if one != two]:
        raise SystemExit(f"answers of the engine are not those one by one: requests {other}")
    if len(set(starts[0])) < len(alone):
        raise SystemExit("different questions have the same answer, so comparing them proves nothing")


def measure(size: Size, folder: Path) -> tuple[list[Row], dict[str, Any]]:
    """Measure both variants in turns; both use a model whose features of images are not kept yet."""
    generation.save(folder, generation.Size(size.shape, size.scale))
    requests = make_requests(size)
    model = VisionLanguageModel.load(
        folder / "model", device="cuda" if torch.cuda.is_available() else "cpu",
        dtype="bfloat16" if size.bf16 else "float32",
    )  # fmt: skip
    model.feature_cache = None
    answer_together(model, requests[: size.clients], size.clients)  # a warm-up
    speeds: dict[str, list[float]] = {"together": [], "one by one": []}
    answers: dict[str, list[list[int]]] = {}
    for _ in range(size.repeats):
        for name, rates in speeds.items():
            start = time.perf_counter()
            answers[name] = (
                answer_together(model, requests, size.clients) if name == "together"
                else answer_one_by_one(model, requests)
            )  # fmt: skip
            rates.append(sum(map(len, answers[name])) / (time.perf_counter() - start))
    if not size.bf16:  # in half precision, ids are often equally likely
        check_answers(answers["one by one"], answers["together"])
    same = sum(one == two for one, two in zip(*answers.values(), strict=True))
    row = compared(
        f"{size.clients} clients, answers of {size.tokens[0]} to {size.tokens[1]} tokens",
        speeds["together"], speeds["one by one"], ("together", "one by one"), "tokens/s", 3.0,
    )  # fmt: skip
    return [row], {"answers": size.requests, "of them the same to the last token": same}


def main() -> None:
    """Measure and report."""
    args = make_parser(__doc__, ("clients", "requests", "repeats")).parse_args()
    size = make_size(args, Size(), GPU)
    silence_libraries()
    with tempfile.TemporaryDirectory() as name:
        report("serving-gpu" if args.gpu else "serving", *measure(size, Path(name)))


if __name__ == "__main__":
    main()
