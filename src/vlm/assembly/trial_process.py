"""A separate process that tries foreign chat templates and the regular expressions of tokenizers.

`processor_trial` starts this file as a program. It imports only Jinja and tokenizers, so that it starts at once. Its
memory and processor time are limited: endless loops or growth end this process, and nothing else. The sandbox is the
same as in transformers. The request is read as JSON, and the answer is empty if nothing was wrong.
"""

import json
import resource
import sys
from typing import Any

MEGABYTE = 1 << 20
MAX_OUTPUT = 4 * MEGABYTE
"""Maximum number of characters of a rendered conversation of a few words."""
REPEATS = 60
"""How often each character of an expression occurs in the texts on which it is tried."""


def render(template: str, conversations: list[list[dict[str, object]]], variables: dict[str, object]) -> str:
    """Render conversations, with and without the start of a reply; return the problem in words.

    A template may refuse some conversations, but not all of them, and it must terminate and not write too much.
    """
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The block in which transformers' templates mark replies."""

        tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

        def parse(self, parser: Any) -> Any:
            """Return the content of the block."""
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> None:
        """End the template with an error, as transformers' function of this name does."""
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        """Write a value as JSON without escaping HTML, as transformers' filter of this name does."""
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": lambda form: form}
    try:
        compiled = environment.from_string(template)
    except (TemplateError, SyntaxError, RecursionError) as error:
        return f"is not a template: {type(error).__name__}: {error}"
    refusal, rendered = "", False
    for messages in conversations:
        for opened in (False, True):
            length = 0
            try:
                for piece in compiled.generate(messages=messages, add_generation_prompt=opened, **variables):
                    length += len(piece)
                    if length > MAX_OUTPUT:
                        return f"writes more than {MAX_OUTPUT:,} characters for a conversation of a few words"
                rendered = True
            except MemoryError:
                raise
            except Exception as error:  # it refuses this conversation, which a template may
                refusal = refusal or f"does not render a conversation: {type(error).__name__}: {error}"
    return "" if rendered else refusal


def encode(settings: dict[str, object], expressions: list[str]) -> str:
    """Run a tokenizer's steps, without its vocabulary, on texts that may be slow; return the problem in words."""
    from tokenizers import Tokenizer

    kept = {key: settings.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")}
    empty = {"type": "BPE", "vocab": {}, "merges": [], "dropout": None, "unk_token": None, "fuse_unk": False,
             "continuing_subword_prefix": None, "end_of_word_suffix": None, "byte_fallback": False}  # fmt: skip
    plain = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "post_processor": None,
        "model": empty,
    }
    try:
        tokenizer = Tokenizer.from_str(json.dumps(plain | kept))
    except MemoryError:
        raise
    except BaseException as error:  # a panic derives from BaseException
        return f"is not a tokenizer: {error}"
    letters = sorted(set("a 0.\n" + "".join(expressions)))
    for letter in letters:
        tokenizer.encode(letter * REPEATS + "\0")
    tokenizer.encode("".join(letters) * 4)
    if tokenizer.decoder is not None:
        tokenizer.decoder.decode(letters * 4)
    return ""


def main() -> None:
    """Answer the request on standard input."""
    request = json.loads(sys.stdin.buffer.read())
    for kind, most in ((resource.RLIMIT_AS, request["bytes"]), (resource.RLIMIT_CPU, request["seconds"])):
        resource.setrlimit(kind, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        if request["kind"] == "template":
            answer = render(request["template"], request["conversations"], request["variables"])
        else:
            answer = encode(request["settings"], request["expressions"])
    except MemoryError:
        answer = f"needs more than {request['bytes'] // MEGABYTE:,} MB of memory"
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
