"""Answers that keep to a schema or a grammar, and schemas that are refused with their reason."""

import json
from typing import Any

import pytest
import torch

from tests.families.tiny_families import tokenizer as family_tokenizer
from vlm.inference.engine.constraints import MAX_GRAMMAR_CHARACTERS, Constraint, ConstraintCompiler, ConstraintProcessor

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 3}, "age": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer():
    """One token for each byte."""
    return family_tokenizer(None)


@pytest.fixture(scope="module")
def compiler(tokenizer) -> ConstraintCompiler:
    return ConstraintCompiler(tokenizer, [tokenizer.eos_token_id])


def draw(compiler: ConstraintCompiler, constraint: Constraint, seed: int) -> str:
    """An answer of random tokens that the constraint allows; the logits have rows beyond the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    processor = ConstraintProcessor(constraint)
    size = len(compiler.tokenizer) + 7
    ids: list[int] = []
    for _ in range(200):
        scores = processor(torch.tensor([ids]), torch.zeros(1, size))
        token = int(torch.multinomial(scores.softmax(-1), 1, generator=generator))
        if token in compiler.ends:
            break
        ids.append(token)
        if processor.accept(token):
            break
    return str(compiler.tokenizer.decode(ids))


def test_whatever_is_drawn_is_json_of_the_schema(compiler: ConstraintCompiler):
    constraint = compiler.json_schema(PERSON)
    for seed in range(3):
        answer = json.loads(draw(compiler, constraint, seed))
        assert set(answer) == {"name", "age"}
        assert isinstance(answer["name"], str)
        assert answer["age"] in range(10)


def test_an_answer_of_a_grammar(compiler: ConstraintCompiler):
    constraint = compiler.lark('start: "yes" | "no"')
    assert {draw(compiler, constraint, seed) for seed in range(8)} == {"yes", "no"}


def test_white_space_in_json_is_bounded(compiler: ConstraintCompiler):
    processor = ConstraintProcessor(compiler.json_object())
    brace, space = (compiler.tokenizer.convert_tokens_to_ids(letter) for letter in ("{", "Ġ"))
    processor.accept(brace)
    spaces = 0
    while processor(torch.zeros(1, 0), torch.zeros(1, 300))[0, space].isfinite():
        processor.accept(space)
        spaces += 1
    assert 0 < spaces <= 40


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(("schema", "words"), [
    ({"type": "strng"}, "Invalid type: strng"),
    ({"not": {"type": "string"}}, "not"),
    ({"type": "object", "not": {}, "x-guidance": {"lenient": True}}, "not"),
    (False, "refused"),
    (nested(300), "recursion limit"),
    (nested(20_000), "too deep"),
    ({"enum": ["x" * MAX_GRAMMAR_CHARACTERS]}, "at most 65,536"),
    ({"$ref": "http://127.0.0.1:9/schema"}, "does not fetch"),
    ({"type": "string", "pattern": "(?=x)"}, "look-around"),
    ({"allOf": [{"oneOf": [{"properties": {f"{kind}{place}": {"type": kind}}} for kind in ("integer", "string")]}
                for place in range(24)]}, "too large"),
    ({"type": "number", "minimum": float("nan")}, "refused"),
    ({"const": {1, 2}}, "not valid JSON"),
])  # fmt: skip
def test_a_schema_that_cannot_be_kept_to_is_refused_with_its_reason(
    compiler: ConstraintCompiler, schema: Any, words: str
):
    with pytest.raises(ValueError, match=r"the JSON schema .*") as refused:
        compiler.json_schema(schema)
    message = str(refused.value)
    assert words in message
    assert len(message) < 400
    assert "\n" not in message


def test_a_grammar_that_is_none_is_refused(compiler: ConstraintCompiler):
    for grammar in ("start: x", "start: /(/", "(" * 30_000, "x" * (MAX_GRAMMAR_CHARACTERS + 1)):
        with pytest.raises(ValueError, match="the grammar"):
            compiler.lark(grammar)


def test_a_token_that_is_not_allowed_is_an_error(compiler: ConstraintCompiler):
    processor = ConstraintProcessor(compiler.lark('start: "yes"'))
    with pytest.raises(ValueError, match="cannot keep to its schema or grammar"):
        processor.accept(compiler.tokenizer.convert_tokens_to_ids("n"))


def test_bytes_of_tokens(compiler: ConstraintCompiler):
    ids = compiler.tokenizer("é", add_special_tokens=False)["input_ids"]
    assert [compiler.token_bytes(token) for token in ids] == [b"\xc3", b"\xa9"]
    assert compiler.token_bytes(compiler.ends[0]) == b"<|end|>"
    assert compiler.token_bytes(10_000) == b""
