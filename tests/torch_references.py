"""What torch, and packages that build on it, compute, in a process of their own.

torch's CUDA build, imported after TensorFlow, is a segmentation fault. So no test imports torch: it asks `in_torch`
to run one of the functions of this file, which import it, in another process, and gets NumPy arrays back.
"""

from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import Any

import numpy as np

Arrays = list[np.ndarray]


def in_torch(function: Any, *args: Any, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)`, computed in the process that may import torch."""
    from keras_optkit.testing.parity.process import elsewhere  # which that process does not have

    return elsewhere(function, *args, **kwargs)


@dataclass(frozen=True)
class Made:
    """An object by the name of its class and its arguments, so that this process can speak of it.

    Attributes:
        name: "module:Class".
        arguments: Keyword arguments.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def __call__(self, parameters: Any) -> Any:
        """The object."""
        return resolve_name(self.name)(parameters, **self.arguments)


def defaults_of(made: Made) -> dict[str, Any]:
    """The defaults of an optimizer."""
    import torch

    return dict(made([torch.nn.Parameter(torch.zeros(2))]).defaults)


def optimizer_run(made: Made, start: Arrays, grads: list[Arrays], rates: dict[int, float]) -> list[Arrays]:
    """The weights after each step in float64, where the parameters at some places have rates of their own."""
    import torch

    parameters = [torch.nn.Parameter(torch.tensor(p)) for p in start]
    groups = [{"params": [parameters[i]], "lr": rate} for i, rate in rates.items()]
    optimizer = made([*groups, {"params": [p for i, p in enumerate(parameters) if i not in rates]}])
    optimizer.train()
    weights = []
    for arrays in grads:
        for p, g in zip(parameters, arrays, strict=True):
            p.grad = torch.tensor(g)
        optimizer.step()
        weights.append([p.detach().numpy().copy() for p in parameters])
    return weights


def corrected_decay_run(start: Arrays, grads: list[Arrays], rates: list[float], decay: float) -> list[Arrays]:
    """The weights after each step of AdamC in float64, all of them as if a normalisation followed."""
    import torch
    from pytorch_optimizer import AdamC

    parameters = [torch.nn.Parameter(torch.tensor(p)) for p in start]
    group = {"params": parameters, "normalized": True}
    optimizer = AdamC([group], lr=max(rates), weight_decay=decay, eps=1e-16)
    weights = []
    for rate, arrays in zip(rates, grads, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        for p, g in zip(parameters, arrays, strict=True):
            p.grad = torch.tensor(g)
        optimizer.step()
        weights.append([p.detach().numpy().copy() for p in parameters])
    return weights


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


def schedule_runs(runs: dict[str, tuple[Made, int]], rate: float = 0.1) -> dict[str, dict[str, np.ndarray]]:
    """What `schedule_run` finds for each of several schedulers, by name."""
    return {name: schedule_run(made, steps=steps, rate=rate) for name, (made, steps) in runs.items()}


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


def optax_chain_run(
    parts: list[tuple[str, dict[str, Any]]], start: Arrays, grads: list[Arrays], dtype: str
) -> list[Arrays]:
    """The weights after each step of several of optax's transformations, one after the other."""
    import jax
    import optax

    jax.config.update("jax_enable_x64", True)
    optimizer = optax.chain(*(resolve_name(f"optax:{name}")(**arguments) for name, arguments in parts))
    parameters = [jax.numpy.asarray(p, dtype) for p in start]
    state, weights = optimizer.init(parameters), []
    for arrays in grads:
        updates, state = optimizer.update([jax.numpy.asarray(g, dtype) for g in arrays], state, parameters)
        parameters = optax.apply_updates(parameters, updates)
        weights.append([np.asarray(p) for p in parameters])
    return weights


def initialized(name: str, shape: tuple[int, ...], *args: Any) -> np.ndarray:
    """A float64 tensor of this shape that one of the functions of `torch.nn.init` has filled."""
    import torch

    torch.manual_seed(0)
    tensor = torch.empty(shape, dtype=torch.float64)
    return getattr(torch.nn.init, name)(tensor, *args).numpy()


def gains(arguments: list[tuple[Any, ...]]) -> list[float]:
    """`torch.nn.init.calculate_gain` for each of several arguments."""
    import torch

    return [torch.nn.init.calculate_gain(*each) for each in arguments]


def biases(made: dict[str, tuple[str, dict[str, Any], str]]) -> dict[str, np.ndarray]:
    """The biases of new layers: for each name a class of `torch.nn`, its arguments and the bias's attribute."""
    import torch

    torch.manual_seed(0)
    return {
        name: getattr(getattr(torch.nn, cls)(**arguments), bias).detach().numpy()
        for name, (cls, arguments, bias) in made.items()
    }


def parametrized_run(
    name: str, arguments: dict[str, Any], start: dict[str, np.ndarray], inputs: Arrays, targets: Arrays, rate: float
) -> list[dict[str, np.ndarray]]:
    """Linear or Conv2d layers with a parametrization: parameters and buffers after each step of SGD on the squares.

    `start` has the weight, in torch's layout, and buffers of the parametrization; all is in float64. The last entry has
    the outputs on the first inputs, of inference.
    """
    import torch

    weight = torch.tensor(start["weight"])
    shape = tuple(weight.shape)
    layer = (
        torch.nn.Linear(shape[1], shape[0], bias=False, dtype=torch.float64)
        if len(shape) == 2
        else torch.nn.Conv2d(shape[1], shape[0], shape[2:], bias=False, dtype=torch.float64)
    )
    layer.weight.data.copy_(weight)
    layer = getattr(torch.nn.utils.parametrizations, name)(layer, **arguments)
    buffers = dict(layer.named_buffers())
    for key, value in buffers.items():
        value.copy_(torch.tensor(start[key.rpartition(".")[2]]))
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate)
    found = []
    for x, y in zip(inputs, targets, strict=True):
        optimizer.zero_grad()
        torch.mean((layer(torch.tensor(x)) - torch.tensor(y)) ** 2).backward()
        optimizer.step()
        state = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
        found.append({key.rpartition(".")[2]: value.detach().numpy().copy() for key, value in state.items()})
    layer.eval()
    return [*found, {"outputs": layer(torch.tensor(inputs[0])).detach().numpy()}]
