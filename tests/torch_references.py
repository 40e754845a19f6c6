"""What torch, and packages that build on it, compute, in a process of their own.

torch's CUDA build, imported after TensorFlow, is a segmentation fault. So no test imports torch: it asks `in_torch`
to run one of the functions of this file, which import it, in another process, and gets NumPy arrays back.
"""

import atexit
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pkgutil import resolve_name
from typing import Any

import numpy as np

Arrays = list[np.ndarray]


@cache
def _process() -> ProcessPoolExecutor:
    process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    atexit.register(process.shutdown)
    return process


def in_torch(function: Any, *args: Any, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)`, computed in the process that may import torch."""
    return _process().submit(function, *args, **kwargs).result()


@dataclass(frozen=True)
class Made:
    """An object by the name of its class and its arguments, so that this process can speak of it.

    Attributes:
        name: "module:Class".
        arguments: Keyword arguments.
        around: What the class wraps, made of the parameters in its turn; None: the class gets the parameters.
        stepped: Whether it takes a step with gradients of zero before it is used, which makes its state.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    around: "Made | None" = None
    stepped: bool = False

    def __call__(self, parameters: Any) -> Any:
        """The object."""
        given = parameters if self.around is None else self.around(parameters)
        made = resolve_name(self.name)(given, **self.arguments)
        if self.stepped:
            import torch

            for p in parameters:
                p.grad = torch.zeros_like(p)
            made.step()
        return made


def optim(name: str, *, stepped: bool = False, **arguments: Any) -> Made:
    """One of `torch.optim`."""
    return Made(f"torch.optim:{name}", arguments, stepped=stepped)


def defaults_of(made: Made) -> dict[str, Any]:
    """The defaults of an optimizer."""
    import torch

    return dict(made([torch.nn.Parameter(torch.zeros(2))]).defaults)


def optimizer_run(
    made: Made, start: Arrays, grads: list[Arrays], dtype: str, evaluated: str | None = None, grouped: Any = None
) -> tuple[list[Arrays], list[Arrays]]:
    """The weights after each step, and what the optimizer's state holds under `evaluated`.

    Args:
        made: The optimizer.
        start: The weights to start from.
        grads: For each step the gradient of each parameter.
        dtype: The dtype to compute in.
        evaluated: Name of a part of the state that has the weights to evaluate at; None for none.
        grouped: For parameters with a rate of their own, {place: rate}.
    """
    import torch

    kind = getattr(torch, dtype)
    parameters = [torch.nn.Parameter(torch.tensor(p, dtype=kind)) for p in start]
    rates = grouped or {}
    groups = [{"params": [parameters[i]], "lr": rate} for i, rate in rates.items()]
    rest = [p for i, p in enumerate(parameters) if i not in rates]
    optimizer = made([*groups, {"params": rest}] if groups else parameters)
    if hasattr(optimizer, "train"):  # of Schedule-Free
        optimizer.train()
    weights: list[Arrays] = []
    evaluated_at: list[Arrays] = []
    for arrays in grads:
        for p, g in zip(parameters, arrays, strict=True):
            p.grad = torch.tensor(g, dtype=kind)  # a new one: some references add the decay to it
        optimizer.step()
        weights.append([p.detach().numpy().copy() for p in parameters])
        if evaluated is not None:
            evaluated_at.append([optimizer.state[p][evaluated].numpy().copy() for p in parameters])
    return weights, evaluated_at


def schedule_run(*schedules: Made, steps: int, milestones: Any = (), rate: float = 0.1) -> dict[str, np.ndarray]:
    """The learning rate and the momentum before each step, of one scheduler or of several in sequence."""
    import torch

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate, momentum=0.5)
    made = [schedule(optimizer) for schedule in schedules]
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, made, list(milestones)) if milestones else made[0]
    found: dict[str, list[float]] = {"lr": [], "momentum": []}
    for _ in range(steps):
        for name, values in found.items():
            values.append(optimizer.param_groups[0][name])
        optimizer.step()
        scheduler.step()
    return {name: np.array(values) for name, values in found.items()}


def plateau_run(curve: Any, arguments: tuple[Any, ...], **more: Any) -> list[float]:
    """The learning rate after each value of a curve, from a rate of 1."""
    import torch

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, *arguments, **more)
    rates = []
    for value in curve:
        scheduler.step(value)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def _two_norms(weights: Arrays) -> Any:
    """BatchNorm(4), Dense(4 to 3), tanh, BatchNorm(3) and Dense(3 to 1), with weights in Keras's layout."""
    import torch

    first, second = (torch.nn.BatchNorm1d(n, eps=1e-3) for n in (4, 3))
    model = torch.nn.Sequential(first, torch.nn.Linear(4, 3), torch.nn.Tanh(), second, torch.nn.Linear(3, 1))
    _set(model, weights)
    return model


def _set(model: Any, weights: Arrays) -> None:
    import torch

    with torch.no_grad():
        for parameter, value in zip(model.parameters(), weights, strict=True):
            parameter.copy_(torch.tensor(value.T))


def _recalibrated(model: Any, x: np.ndarray, n: int) -> Arrays:
    """Means and biased variances that `update_bn` leaves with batches of n; torch's variances are n/(n-1) of them."""
    import torch

    torch.optim.swa_utils.update_bn([torch.tensor(x[i : i + n]) for i in range(0, len(x), n)], model)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm1d)]
    return [part for m in norms for part in (m.running_mean.numpy(), m.running_var.numpy() * (n - 1) / n)]


def recalibrated(weights: Arrays, x: np.ndarray, n: int) -> Arrays:
    """The statistics of both normalisations after a pass over the data, whose length n must divide."""
    return _recalibrated(_two_norms(weights), x, n)


def averaged_run(points: list[Arrays], x: np.ndarray, n: int) -> list[tuple[Arrays, Arrays]]:
    """For each point, which is all weights, the mean of those so far (`AveragedModel`) and its statistics."""
    import torch

    model = _two_norms(points[0])
    averaged = torch.optim.swa_utils.AveragedModel(model)
    found = []
    for weights in points:
        _set(model, weights)
        averaged.update_parameters(model)
        mean = [p.detach().numpy().T.copy() for p in averaged.module.parameters()]
        found.append((mean, [np.copy(part) for part in _recalibrated(averaged, x, n)]))
    return found


def muon_run(arguments: dict[str, Any], start: Arrays, grads: list[Arrays], dtype: str) -> list[Arrays]:
    """`torch.optim.Muon` on matrices, without its rounding to bfloat16."""
    import torch

    rounded = torch.Tensor.bfloat16
    torch.Tensor.bfloat16 = lambda self: self.clone()  # it is changed in place
    try:
        return optimizer_run(optim("Muon", **arguments), start, grads, dtype)[0]
    finally:
        torch.Tensor.bfloat16 = rounded


def soap_run(arguments: dict[str, Any], start: Arrays, grads: list[Arrays], dtype: str) -> tuple[list[Arrays], Any]:
    """`pytorch_optimizer.SOAP`, with QR in the dtype of the rest; and its first bases, by parameter and axis."""
    import inspect
    import textwrap

    import torch
    from pytorch_optimizer.optimizer import soap

    source = textwrap.dedent(inspect.getsource(soap.SOAP.get_orthogonal_matrix_qr))
    assert source.count("torch.float32") == 1
    exact: dict[str, Any] = {}
    exec(source.replace("torch.float32", "power_iter.dtype"), vars(soap), exact)
    kind = type("SOAP", (soap.SOAP,), exact)
    parameters = [torch.nn.Parameter(torch.tensor(p, dtype=getattr(torch, dtype))) for p in start]
    optimizer, weights, bases = kind(parameters, **arguments), [], None
    for arrays in grads:
        for p, g in zip(parameters, arrays, strict=True):
            p.grad = torch.tensor(g, dtype=p.dtype)
        optimizer.step()
        if bases is None:
            bases = [[np.array(q) if len(q) else None for q in optimizer.state[p]["Q"]] for p in parameters]
        weights.append([p.detach().numpy().copy() for p in parameters])
    return weights, bases


def optax_run(name: str, arguments: dict[str, Any], start: Arrays, grads: list[Arrays], dtype: str) -> list[Arrays]:
    """The weights after each step of one of optax's optimizers."""
    import jax

    jax.config.update("jax_enable_x64", True)
    import optax

    optimizer = resolve_name(f"optax:{name}")(**arguments)
    parameters = [jax.numpy.asarray(p, dtype) for p in start]
    state, weights = optimizer.init(parameters), []
    for arrays in grads:
        updates, state = optimizer.update([jax.numpy.asarray(g, dtype) for g in arrays], state, parameters)
        parameters = optax.apply_updates(parameters, updates)
        weights.append([np.asarray(p) for p in parameters])
    return weights


def optax_chain_run(
    parts: list[tuple[str, dict[str, Any]]], start: Arrays, grads: list[Arrays], dtype: str
) -> list[Arrays]:
    """The weights after each step of several of optax's transformations, one after the other."""
    import optax

    def chain(**_: Any) -> Any:
        return optax.chain(*(resolve_name(f"optax:{name}")(**arguments) for name, arguments in parts))

    optax.chained = chain
    return optax_run("chained", {}, start, grads, dtype)


def sam_run(
    arguments: dict[str, Any], inner: Made, start: Arrays, coefficients: list[tuple[Arrays, Arrays]], dtype: str
) -> list[Arrays]:
    """The weights after each step of `pytorch_optimizer.SAM` on `sum(a sin(b θ))`, with a and b for each step."""
    import pytorch_optimizer
    import torch
    from pytorch_optimizer.optimizer import sam

    def exact_norm(groups: Any, *_: Any, **__: Any) -> Any:
        squares = [
            torch.sum(torch.square(p.grad * p.abs() if group["adaptive"] else p.grad))
            for group in groups
            for p in group["params"]
        ]
        return torch.sum(torch.stack(squares)).reshape(1)

    if dtype == "float64":  # the reference rounds it to float32
        sam.get_global_gradient_norm = exact_norm
    parameters = [torch.nn.Parameter(torch.tensor(value, dtype=getattr(torch, dtype))) for value in start]
    optimizer = pytorch_optimizer.SAM(parameters, resolve_name(inner.name), **arguments, **inner.arguments)
    trajectory = []
    for a, b in coefficients:
        terms = [
            (torch.tensor(x, dtype=p.dtype), torch.tensor(y, dtype=p.dtype))
            for p, x, y in zip(parameters, a, b, strict=True)
        ]

        def closure(terms: Any = terms) -> Any:
            optimizer.zero_grad()
            loss = sum(torch.sum(x * torch.sin(y * p)) for p, (x, y) in zip(parameters, terms, strict=True))
            loss.backward()
            return loss

        closure()
        optimizer.step(closure)
        trajectory.append([p.detach().numpy().copy() for p in parameters])
    return trajectory
