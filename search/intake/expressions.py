"""Symbolic sizes in an uploaded file: read as a syntax tree, written anew from what is allowed.

torch hands these strings to ``sympy.sympify``, which evaluates Python: a call runs, ``10**10**10`` never ends. Only
integers, symbols, sums, products and a few named functions survive; powers, attributes and any other call are refused.
"""

import ast
import re

from search.errors import Refused

__all__ = ["clean_expression", "is_symbol"]

_SYMBOL = re.compile(r"(s\d{1,6}|u\d{1,4})\Z")
"""Unbacked symbols (``u``) are counted one by one by the loader: their number must stay small."""
_FUNCTIONS = frozenset(
    [
        "Add",
        "Mul",
        "Max",
        "Min",
        "FloorDiv",
        "CleanDiv",
        "CeilDiv",
        "Mod",
        "PythonMod",
        "ModularIndexing",
        "GreaterThan",
        "LessThan",
        "StrictGreaterThan",
        "StrictLessThan",
        "Equality",
        "Unequality",
        "Ge",
        "Le",
        "Gt",
        "Lt",
        "Eq",
        "Ne",
        "And",
        "Or",
        "Not",
    ]
)
_LONGEST = 2_000
_DEEPEST = 24
_LARGEST = 2**62


def is_symbol(name: str) -> bool:
    return _SYMBOL.match(name) is not None


def clean_expression(text: object) -> str:
    """The same expression, rebuilt. Raises ``Refused`` (``symbolic_expression``)."""
    if not isinstance(text, str) or len(text) > _LONGEST:
        raise _refused(text)
    try:
        tree = ast.parse(text, mode="eval")
        return _rebuild(tree.body, text, 0)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise _refused(text) from None


def _rebuild(node: ast.expr, text: str, depth: int) -> str:
    if depth > _DEEPEST:
        raise _refused(text)
    match node:
        case ast.Constant(value=bool() as value):
            return str(value)
        case ast.Constant(value=int() as value) if value < _LARGEST:
            return str(value)
        case ast.Name(id=name) if is_symbol(name):
            return name
        case ast.Name(id="true" | "false" as name):
            return name
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return f"(-{_rebuild(operand, text, depth + 1)})"
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() | ast.Mult() as op, right=right):
            sign = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*"}[type(op)]
            return f"({_rebuild(left, text, depth + 1)} {sign} {_rebuild(right, text, depth + 1)})"
        case ast.Call(func=ast.Name(id="Integer"), args=[argument], keywords=[]):
            return f"Integer({_integer(argument, text)})"
        case ast.Call(func=ast.Name(id="Symbol"), args=[ast.Constant(value=str() as name)], keywords=keywords) if (
            is_symbol(name)
        ):
            return f"Symbol({name!r}{_assumptions(keywords, text)})"
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS and 0 < len(args) <= 8:
            return f"{name}({', '.join(_rebuild(a, text, depth + 1) for a in args)})"
    raise _refused(text)


def _integer(node: ast.expr, text: str) -> int:
    match node:
        case ast.Constant(value=int() as value) if value < _LARGEST and not isinstance(value, bool):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() as value)) if value < _LARGEST:
            return -value
    raise _refused(text)


def _assumptions(keywords: list[ast.keyword], text: str) -> str:
    parts = []
    for k in keywords:
        if k.arg not in ("positive", "integer", "nonnegative") or not isinstance(k.value, ast.Constant):
            raise _refused(text)
        if k.value.value is not True:
            raise _refused(text)
        parts.append(f", {k.arg}=True")
    return "".join(parts)


def _refused(text: object) -> Refused:
    return Refused(
        "symbolic_expression",
        f"the size expression {str(text)[:80]!r} is not a sum or product of integers and symbols: "
        "write the file with tenfold.export, which keeps only the batch size symbolic",
    )
