"""Conditions that every point of a space has to meet, as strings: they are data, like the space."""

from __future__ import annotations

import ast
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import CodeType
from typing import Any

from keras_optkit import arguments

_ALLOWED = (
    ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.UAdd, ast.BinOp, ast.Add, ast.Sub,
    ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Compare, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.In,
    ast.NotIn, ast.Name, ast.Load, ast.Constant, ast.List, ast.Tuple,
)  # fmt: skip
_WANTED = "parameters, constants, + - * / // %, comparisons, in, and, or, not"


@dataclass(frozen=True)
class Constraint:
    """An expression over parameters, e.g. `"second_units <= first_units"`, that is to be true.

    It says nothing about points at which a parameter that it names is inactive.
    """

    text: str
    names: frozenset[str]
    code: CodeType

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Whether the point meets it.

        Raises:
            ValueError: If it cannot be computed there, e.g. since a string is compared with a number.
        """
        if not self.names <= values.keys():
            return True
        try:
            return bool(eval(self.code, {"__builtins__": {}}, {name: values[name] for name in self.names}))
        except Exception as error:
            shown = ", ".join(f"{name}={values[name]!r}" for name in sorted(self.names))
            raise ValueError(
                f"The constraint {self.text!r} cannot be computed at {shown}: {type(error).__name__}: {error}."
            ) from None


def parsed(constraints: Any, parameters: Collection[str]) -> tuple[Constraint, ...]:
    """Checks the argument `constraints` of a space.

    Raises:
        TypeError: If it is not a list of strings.
        ValueError: If one is not an expression over the parameters.
    """
    if not isinstance(constraints, list | tuple):
        raise TypeError(f"constraints must be a list of expressions such as 'a <= b', got {constraints!r}.")
    return tuple(_parsed(f"constraints[{i}]", text, parameters) for i, text in enumerate(constraints))


def _parsed(name: str, text: Any, parameters: Collection[str]) -> Constraint:
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a string such as 'a <= b', which a space can save, got {text!r}.")
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError as error:
        raise ValueError(f"{name} must be an expression over the parameters, got {text!r}: {error.msg}.") from None
    for node in ast.walk(tree):
        if not isinstance(node, _ALLOWED):
            raise ValueError(f"{name} must be made of {_WANTED}, got {text!r} with {type(node).__name__}.")
    names = frozenset(node.id for node in ast.walk(tree) if isinstance(node, ast.Name))
    if not names:
        raise ValueError(f"{name} must name a parameter, got {text!r}.")
    for used in names:
        arguments.choice(f"A name in {name}, {text!r},", used, parameters)
    return Constraint(text, names, compile(tree, f"<{name}>", "eval"))
