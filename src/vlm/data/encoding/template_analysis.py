"""Which chat templates only copy the texts of messages, so that one rendering serves all conversations of a structure.

`copied_unless` reads a template's syntax tree, without running it. The template's texts have markers around them
(`labels`): no constant of the template can equal, begin or end such a text, and stripping stops at a marker. So
comparing, stripping, joining and printing texts depends on no character between the markers. Searching for a constant
does depend on them, unless the constant does not occur in the text. With everything else that a template may do with a
text (its length, a part of it, another form of it, JSON), it does not only copy.
"""

from functools import lru_cache

import jinja2
from jinja2 import nodes

PLAIN, TEXT, PIECES, MESSAGE, MESSAGES = "plain", "text", "pieces", "message", "messages"
"""Kinds of values: independent of texts, a text, a list of pieces of a text, a message, a list of messages."""
STRIPPING = ("strip", "lstrip", "rstrip")
TEXT_TESTS = ("defined", "undefined", "none", "string", "mapping", "iterable", "sequence", "number", "boolean", "true")
"""Jinja tests whose result is the same for all texts."""
UNKNOWN_NAMES = ("self", "super", "varargs", "kwargs", "caller", "lipsum")
UNKNOWN_FILTERS = ("random", "attr")
"""Filters whose result differs from call to call, or is any attribute, such as a message next to this one."""
NEIGHBOURS = ("previtem", "nextitem")
"""Attributes of `loop` that hold messages."""
MEDIA_TOKEN = "image_token"
"""The variable for the token of an image, which does not occur in copied texts."""
MAX_PASSES = 8


class _NotOnlyCopiedError(Exception):
    """A template does more with a text than copying, or something unknown."""


@lru_cache(256)
def copied_unless(template: str) -> frozenset[str] | None:
    """Return the strings that texts must not contain for a template only to copy them; None if it does more."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    try:
        return _Analysis(environment.parse(template)).conditions
    except (_NotOnlyCopiedError, jinja2.TemplateSyntaxError, RecursionError):
        return None


class _Analysis:
    """Follows the kinds of values through a template, through all branches of its conditions."""

    def __init__(self, tree: nodes.Template):
        self.kinds: dict[str, str] = {"messages": MESSAGES}
        self._conditions: set[str] = set()
        for _ in range(MAX_PASSES):
            before = dict(self.kinds)
            self.run(tree.body)
            if self.kinds == before:
                self.conditions = frozenset(self._conditions)
                return
        raise _NotOnlyCopiedError

    # --- statements -------------------------------------------------------------------------------------------------

    def run(self, statements: list[nodes.Node]) -> None:
        """Follow statements."""
        for statement in statements:
            self.run_one(statement)

    def run_one(self, node: nodes.Node) -> None:
        """Follow a statement."""
        match node:
            case nodes.Output():
                for child in node.nodes:
                    if not isinstance(child, nodes.TemplateData):
                        self.require(child, PLAIN, TEXT)
            case nodes.If():
                self.kind(node.test)
                self.run([*node.body, *node.elif_, *node.else_])
            case nodes.For(recursive=False):
                iterated = self.require(node.iter, PLAIN, MESSAGES)
                self.assign(node.target, MESSAGE if iterated == MESSAGES else PLAIN)
                if node.test is not None:
                    self.kind(node.test)
                self.run([*node.body, *node.else_])
            case nodes.Assign():
                self.assign(node.target, self.kind(node.node))
            case nodes.Continue() | nodes.Break():
                pass
            case _:
                raise _NotOnlyCopiedError

    def assign(self, target: nodes.Node, kind: str) -> None:
        """Give a name a kind, in addition to the one that it has."""
        match target:
            case nodes.Name():
                name = target.name
            case nodes.NSRef():
                name = f"{target.name}.{target.attr}"
            case nodes.Tuple() if kind == PLAIN:
                for item in target.items:
                    self.assign(item, kind)
                return
            case _:
                raise _NotOnlyCopiedError
        if name == MEDIA_TOKEN or kind == PIECES:
            raise _NotOnlyCopiedError
        self.kinds[name] = _either(self.kinds.get(name, kind), kind)

    # --- expressions ------------------------------------------------------------------------------------------------

    def require(self, node: nodes.Node, *kinds: str) -> str:
        """Return the kind of an expression, which must be one of the given kinds."""
        if (kind := self.kind(node)) not in kinds:
            raise _NotOnlyCopiedError
        return kind

    def require_plain(self, *parts: nodes.Node | None) -> str:
        """Return `PLAIN`, which all parts of an expression must be."""
        for part in parts:
            if part is not None:
                self.require(part, PLAIN)
        return PLAIN

    def kind(self, node: nodes.Node) -> str:
        """Return the kind of an expression."""
        match node:
            case nodes.Const():
                return PLAIN
            case nodes.Name():
                return self.name_kind(node.name)
            case nodes.Getattr():
                return self.member_kind(node.node, node.attr)
            case nodes.Getitem():
                return self.item_kind(node)
            case nodes.Call():
                return self.call_kind(node)
            case nodes.Filter(node=nodes.Node() as value):
                return self.filter_kind(node, value)
            case nodes.Add():
                return _joined(self.kind(node.left), self.kind(node.right))
            case nodes.Concat():
                return _joined(*map(self.kind, node.nodes))
            case nodes.And():
                left, right = self.kind(node.left), self.kind(node.right)
                return right if left in (MESSAGE, MESSAGES) else _either(left, right)
            case nodes.Or():
                return _either(self.kind(node.left), self.kind(node.right))
            case nodes.Not():
                self.kind(node.node)
                return PLAIN
            case nodes.CondExpr():
                self.kind(node.test)
                other = PLAIN if node.expr2 is None else self.kind(node.expr2)
                return _either(self.kind(node.expr1), other)
            case nodes.Compare():
                return self.compare_kind(node)
            case nodes.Test():
                return self.test_kind(node)
            case nodes.BinExpr() | nodes.UnaryExpr() | nodes.Tuple() | nodes.List() | nodes.Dict() | nodes.Pair():
                return self.require_plain(*node.iter_child_nodes())
            case _:
                raise _NotOnlyCopiedError

    def name_kind(self, name: str) -> str:
        """Return the kind of a variable; a namespace that holds texts is read by its members only."""
        own = any(key.startswith(f"{name}.") and kind != PLAIN for key, kind in self.kinds.items())
        if own or name in UNKNOWN_NAMES:
            raise _NotOnlyCopiedError
        return self.kinds.get(name, PLAIN)

    def member_kind(self, owner: nodes.Node, key: str) -> str:
        """Return the kind of an attribute or of the value of a key."""
        if isinstance(owner, nodes.Name) and f"{owner.name}.{key}" in self.kinds:
            return self.kinds[f"{owner.name}.{key}"]
        kind = self.kind(owner)
        if kind == MESSAGE and not hasattr(dict, key):
            return TEXT if key == "content" else PLAIN
        if kind == PLAIN and key not in NEIGHBOURS:
            return PLAIN
        raise _NotOnlyCopiedError

    def item_kind(self, node: nodes.Getitem) -> str:
        """Return the kind of an item, or of a slice."""
        if isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str):
            return self.member_kind(node.node, node.arg.value)
        owner = self.kind(node.node)
        if isinstance(node.arg, nodes.Slice):
            self.require_plain(node.arg.start, node.arg.stop, node.arg.step)
            return owner if owner == MESSAGES else self.require_plain(node.node)
        self.require_plain(node.arg)
        kinds = {PLAIN: PLAIN, MESSAGES: MESSAGE, PIECES: TEXT}
        if owner not in kinds:
            raise _NotOnlyCopiedError
        return kinds[owner]

    def call_kind(self, node: nodes.Call) -> str:
        """Return the kind of what a call returns."""
        arguments = [*node.args, *(keyword.value for keyword in node.kwargs), node.dyn_args, node.dyn_kwargs]
        self.require_plain(*arguments)
        if isinstance(method := node.node, nodes.Getattr):
            owner = self.kind(method.node) if not isinstance(method.node, nodes.Name) else self.owner_kind(method)
            if owner == TEXT:
                return self.method_kind(method.attr, node)
            if owner == MESSAGE and method.attr == "get" and node.args and isinstance(node.args[0], nodes.Const):
                return self.member_kind(method.node, str(node.args[0].value))
        return self.require(node.node, PLAIN)

    def owner_kind(self, method: nodes.Getattr) -> str:
        """Return the kind of the variable on which a method is called; PLAIN for a namespace's member."""
        assert isinstance(method.node, nodes.Name)
        return PLAIN if f"{method.node.name}.{method.attr}" in self.kinds else self.name_kind(method.node.name)

    def method_kind(self, name: str, call: nodes.Call) -> str:
        """Return the kind of what a method of a text returns."""
        if name in STRIPPING:
            return TEXT
        if name in ("startswith", "endswith"):
            return PLAIN
        if name == "split" and len(call.args) == 1:
            self.look_for(call.args[0])
            return PIECES
        if name == "replace" and len(call.args) == 2:
            self.look_for(call.args[0])
            return TEXT
        raise _NotOnlyCopiedError

    def look_for(self, sought: nodes.Expr) -> None:
        """Note that texts must not contain a constant for which a template searches."""
        if isinstance(sought, nodes.Const) and isinstance(sought.value, str) and sought.value:
            self._conditions.add(sought.value)
        elif not (isinstance(sought, nodes.Name) and sought.name == MEDIA_TOKEN):
            raise _NotOnlyCopiedError

    def filter_kind(self, node: nodes.Filter, value: nodes.Node) -> str:
        """Return the kind of what a filter returns."""
        arguments = [*node.args, *(keyword.value for keyword in node.kwargs), node.dyn_args, node.dyn_kwargs]
        self.require_plain(*arguments)
        kind = self.kind(value)
        if kind == TEXT and node.name in ("trim", "string"):
            return TEXT
        if kind in (MESSAGES, PIECES) and node.name in ("length", "count"):
            return PLAIN
        if kind in (MESSAGES, PIECES) and node.name in ("first", "last"):
            return MESSAGE if kind == MESSAGES else TEXT
        if kind == PLAIN and node.name not in UNKNOWN_FILTERS:
            return PLAIN
        raise _NotOnlyCopiedError

    def compare_kind(self, node: nodes.Compare) -> str:
        """Return `PLAIN`, the kind of a comparison."""
        first, operands = node.expr, node.ops
        if len(operands) == 1 and operands[0].op in ("in", "notin"):
            self.require_plain(first)
            kind = self.require(operands[0].expr, PLAIN, TEXT, MESSAGE)
            if kind == TEXT:
                self.look_for(first)
            return PLAIN
        if len(operands) == 1 and operands[0].op in ("eq", "ne"):
            pair = first, operands[0].expr
            if any(isinstance(side, nodes.Const) for side in pair):
                for side in pair:
                    self.require(side, PLAIN, TEXT)
                return PLAIN
        return self.require_plain(first, *(operand.expr for operand in operands))

    def test_kind(self, node: nodes.Test) -> str:
        """Return `PLAIN`, the kind of a test."""
        self.require_plain(*node.args, *(keyword.value for keyword in node.kwargs), node.dyn_args, node.dyn_kwargs)
        if self.kind(node.node) != PLAIN and node.name not in TEXT_TESTS:
            raise _NotOnlyCopiedError
        return PLAIN


def _either(first: str, second: str) -> str:
    """Return the kind of a value that has one of two kinds."""
    if first == second:
        return first
    return _joined(first, second)


def _joined(*kinds: str) -> str:
    """Return the kind of joined values, none of which is more than a text."""
    if not {PLAIN, TEXT}.issuperset(kinds):
        raise _NotOnlyCopiedError
    return TEXT if TEXT in kinds else PLAIN
