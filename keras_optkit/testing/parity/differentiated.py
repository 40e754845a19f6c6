"""Runs of the references that differentiate a function. Loaded like `runs.py`, without TensorFlow and this package."""

from __future__ import annotations

import importlib
import types
from pkgutil import resolve_name
from typing import Any

import numpy as np

Arrays = list[np.ndarray]


def two_gradients(
    implementation: str,
    arguments: dict[str, Any],
    start: Arrays,
    problem: list[tuple[Arrays, Arrays]],
    dtype: str,
    *_: Any,
) -> tuple[list[Arrays], Any]:
    """The weights after each step on `sum(a sin(b θ))`, with a and b for each step.

    With the argument `vectors_plain`, an adaptive SAM is not adaptive for vectors. GSAM's `rho` is the present radius.
    """
    import torch

    sam: Any = importlib.import_module("pytorch_optimizer.optimizer.sam")

    def exact_norm(groups: Any, *_: Any, weight_adaptive: bool = False, **__: Any) -> Any:
        adaptive = weight_adaptive
        squares = [
            torch.sum(torch.square(p.grad * p.abs() if adaptive and group["adaptive"] else p.grad))
            for group in groups
            for p in group["params"]
        ]
        return torch.sum(torch.stack(squares)).reshape(1)

    rounded = sam.get_global_gradient_norm
    if dtype == "float64":
        sam.get_global_gradient_norm = exact_norm
    try:
        name, inner = arguments.pop("inner")
        parameters = [torch.nn.Parameter(torch.tensor(value, dtype=getattr(torch, dtype))) for value in start]
        kind, plain = resolve_name(implementation), arguments.pop("vectors_plain", False)
        if implementation.endswith("GSAM"):
            base = resolve_name(name)(parameters, **inner)
            rho = arguments.pop("rho")
            radius = types.SimpleNamespace(step=lambda: rho)
            optimizer = kind(parameters, base, torch.nn.Module(), radius, **arguments)
            for group in optimizer.param_groups:  # which it makes of the inner optimizer's
                group["adaptive"] = arguments["adaptive"]
        else:
            groups: Any = parameters
            if plain:
                groups = [{"params": [p], "adaptive": p.dim() > 1} for p in parameters]
            optimizer = kind(groups, resolve_name(name), **arguments, **inner)
        weights = []
        for each in problem:
            terms = [[torch.tensor(x, dtype=getattr(torch, dtype)) for x in arrays] for arrays in each]

            def closure(terms: Any = terms) -> Any:
                optimizer.zero_grad()
                loss = sum(torch.sum(a * torch.sin(b * p)) for p, a, b in zip(parameters, *terms, strict=True))
                loss.backward()
                return loss

            if implementation.endswith("GSAM"):  # which calls it twice
                optimizer.step(torch.enable_grad()(lambda closure=closure: (None, closure())))
            else:
                closure()
                optimizer.step(closure)
            weights.append([np.array(p.detach()) for p in parameters])
        return weights, None
    finally:
        sam.get_global_gradient_norm = rounded


def curved(
    implementation: str,
    arguments: dict[str, Any],
    start: Arrays,
    problem: list[tuple[Arrays, Arrays, Arrays]],
    dtype: str,
    *_: Any,
) -> tuple[list[Arrays], Any]:
    """The weights after each step on `sum(a sin(b θ)) + (sum c θ)²`, c = b / 10, and with these random vectors."""
    import torch

    parameters = [torch.nn.Parameter(torch.tensor(value, dtype=getattr(torch, dtype))) for value in start]
    optimizer = resolve_name(implementation)(parameters, **arguments)
    weights, drawn = [], {name: getattr(torch, name) for name in ("randn_like", "randint_like")}
    try:
        for each in problem:
            a, b, v = ([torch.tensor(x, dtype=getattr(torch, dtype)) for x in arrays] for arrays in each)
            given = iter(v)
            torch.randn_like = lambda _, given=given: next(given)
            torch.randint_like = lambda *_, given=given: (next(given) + 1) / 2
            optimizer.zero_grad()
            terms = [torch.sum(x * torch.sin(y * p)) for p, x, y in zip(parameters, a, b, strict=True)]
            along = sum(torch.sum(0.1 * y * p) for p, y in zip(parameters, b, strict=True))
            loss = sum(terms) + along * along
            for p, grad in zip(parameters, torch.autograd.grad(loss, parameters, create_graph=True), strict=True):
                p.grad = grad
            optimizer.step()
            weights.append([np.array(p.detach()) for p in parameters])
    finally:
        for name, function in drawn.items():
            setattr(torch, name, function)
    return weights, None
