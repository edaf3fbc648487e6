"""Python values as models write them: literals, and the argument list of a call.

Literals are read by `ast.literal_eval` and never evaluated. Argument lists are checked here and evaluated in the sandbox only.
"""

from __future__ import annotations

import ast
import re
import warnings
from dataclasses import dataclass

from megatron_plasticity.evaluation.answers import unwrapped

LONGEST_SOURCE = 4000
"""Characters; answers of the benchmarks have at most 130, and Python's parser can be brought down by very long ones."""
CONSTRUCTORS = ("bool", "bytes", "dict", "float", "frozenset", "int", "list", "range", "set", "str", "tuple")
"""The only names that an argument may use; besides them it may have parameters of its own lambdas."""

_LATEX_ESCAPE = re.compile(r"\\([{}_%#&$])")
_READING_ERRORS = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)
_METHODS = frozenset(
    name for kind in (str, bytes, list, tuple, dict, set, range) for name in dir(kind) if not name.startswith("_")
)
_EXPRESSIONS = (
    ast.Constant, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.UnaryOp, ast.unaryop, ast.BinOp, ast.operator, ast.Compare,
    ast.cmpop, ast.BoolOp, ast.boolop, ast.IfExp, ast.Subscript, ast.Slice, ast.Lambda, ast.arguments, ast.arg, ast.Call,
    ast.keyword, ast.Attribute, ast.Name, ast.expr_context,
)  # fmt: skip


@dataclass(frozen=True)
class Value:
    """A Python value; what a reader returns that may also find none, since None is a value."""

    value: object


def read_literal(text: str) -> Value | None:
    r"""The value of a Python literal, or None if the text is none.

    Markdown and LaTeX around it, and LaTeX's escapes in it (`\{1, 2\}`), are taken off where the text as it stands is no literal.
    """
    for source in _readings(text):
        value = _literal(source)
        if value is not None:
            return value
    return None


def equal_values(a: object, b: object) -> bool:
    """Python's `==`, as in the `assert f(input) == output` of CRUXEval (2401.03065): 1 == 1.0 == True, but [1] != (1,)."""
    try:
        return bool(a == b)
    except RecursionError:
        return False


def read_arguments(text: str) -> str | None:
    """Source of an argument list, given as such (`1, x=[2]`) or as the call `f(1, x=[2])`; None if it may not be evaluated.

    Allowed are literals and what computes values from them: operators, lambdas, methods of the built-in types, `CONSTRUCTORS`.
    """
    for source in _readings(text):
        call = _call(source)
        arguments = None if call is None else _source_of_arguments(call)
        if arguments is not None:
            return arguments
    return None


def same_arguments(a: str, b: str) -> bool:
    """Whether two texts give the same argument list: equal values for literals, the same expression for others."""
    first, second = read_arguments(a), read_arguments(b)
    if first is None or second is None:
        return first is second and a == b
    if first == second:
        return True
    values = _argument_values(first), _argument_values(second)
    return None not in values and equal_values(*values)


def literal_of_paper(text: str) -> object:
    r"""The value that the paper's harness compares: out of `\text{}`, then of single quotes, as a literal or else as the text."""
    text = text.strip()
    if text.startswith(r"\text{") and text.endswith("}"):
        text = text[len(r"\text{") : -1]
    if text.startswith("'") and text.endswith("'"):
        text = text[1:-1]
    value = _literal(text) if len(text) <= LONGEST_SOURCE else None
    return text if value is None else value.value


def _readings(text: str) -> list[str]:
    """The text as it stands, out of its wrappers, and without LaTeX's escapes; short ones only."""
    text = text.strip()
    bare = unwrapped(text)
    return [source for source in dict.fromkeys((text, bare, _LATEX_ESCAPE.sub(r"\1", bare))) if len(source) <= LONGEST_SOURCE]


def _literal(source: str) -> Value | None:
    try:
        with warnings.catch_warnings(action="ignore"):
            return Value(ast.literal_eval(source))
    except _READING_ERRORS:
        return None


def _call(source: str) -> ast.Call | None:
    call = _parsed_call(f"f({source}\n)")
    if call is None or not _allowed([*call.args, *(keyword.value for keyword in call.keywords)]):
        inner = _parsed_call(source)
        return inner if inner is not None and _allowed([*inner.args, *(keyword.value for keyword in inner.keywords)]) else None
    return call


def _parsed_call(source: str) -> ast.Call | None:
    """`f(…)` if that is what the source is; a call with `**` has a keyword without a name and is none."""
    try:
        with warnings.catch_warnings(action="ignore"):
            node = ast.parse(source, mode="eval").body
    except _READING_ERRORS:
        return None
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.func.id != "f":
        return None
    return None if any(keyword.arg is None for keyword in node.keywords) else node


def _allowed(expressions: list[ast.expr]) -> bool:
    nodes = [node for expression in expressions for node in ast.walk(expression)]
    names = {*CONSTRUCTORS, *(node.arg for node in nodes if isinstance(node, ast.arg))}
    for node in nodes:
        if not isinstance(node, _EXPRESSIONS):
            return False
        if isinstance(node, ast.Name) and node.id not in names:
            return False
        if isinstance(node, ast.Attribute) and node.attr not in _METHODS:
            return False
    return True


def _source_of_arguments(call: ast.Call) -> str | None:
    """None for expressions that are nested too deeply, such as `not not not …`: what can be parsed cannot always be written."""
    try:
        return ", ".join(
            [*map(ast.unparse, call.args), *(f"{keyword.arg}={ast.unparse(keyword.value)}" for keyword in call.keywords)]
        )
    except _READING_ERRORS:
        return None


def _argument_values(source: str) -> list[object] | None:
    call = _parsed_call(f"f({source})")
    if call is None:
        return None
    named = sorted((keyword.arg or "", keyword.value) for keyword in call.keywords)
    try:
        return [
            (name, _literal(text) or text)
            for name, node in [*(("", node) for node in call.args), *named]
            if (text := ast.unparse(node))
        ]
    except _READING_ERRORS:
        return None
