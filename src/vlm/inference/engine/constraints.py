"""What an answer must be: JSON, JSON of a schema, or text of a grammar."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Constraint:
    """A grammar that an answer keeps to, compiled once and used by any number of answers.

    Args:
        grammar: the grammar, in llguidance's own JSON.
    """

    grammar: str


class ConstraintCompiler:
    """Compiles constraints for one tokenizer. CPU work: call it in a worker thread. Thread-safe."""

    def json_object(self) -> Constraint:
        """Return the constraint that an answer is a JSON object."""
        raise NotImplementedError

    def json_schema(self, schema: Mapping[str, Any] | bool) -> Constraint:
        """Return the constraint that an answer is JSON of a schema.

        Raises:
            ValueError: the schema is malformed, not supported, or too large; says why.
        """
        raise NotImplementedError

    def lark(self, grammar: str) -> Constraint:
        """Return the constraint that an answer is text of a grammar in Lark's form.

        Raises:
            ValueError: the grammar is malformed or too large; says why.
        """
        raise NotImplementedError
