"""Runs of the references. This file is loaded in a process without TensorFlow and without this package."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import sys
import textwrap
import types
from collections.abc import Iterator
from pkgutil import resolve_name
from typing import Any

import numpy as np

Arrays = list[np.ndarray]


def usual(
    implementation: str,
    arguments: dict[str, Any],
    start: Arrays,
    grads: list[Arrays],
    dtype: str,
    evaluated: str | None = None,
) -> tuple[list[Arrays], Any]:
    """The weights after each step of an optimizer of torch or optax; and nothing, or its weights to evaluate at."""
    if implementation.startswith("optax"):
        return optax(implementation, arguments, start, grads, dtype), None
    return torch(resolve_name(implementation), arguments, start, grads, dtype, evaluated)


def torch(
    kind: Any, arguments: dict[str, Any], start: Arrays, grads: list[Arrays], dtype: str, evaluated: str | None = None
) -> tuple[list[Arrays], Any]:
    """The same for a class of torch's."""
    import torch

    parameters = [torch.nn.Parameter(torch.tensor(p, dtype=getattr(torch, dtype))) for p in start]
    optimizer = kind(parameters, **arguments)
    if hasattr(optimizer, "train"):  # of Schedule-Free
        optimizer.train()
    weights, evaluated_at = [], []
    for arrays in grads:
        for p, g in zip(parameters, arrays, strict=True):
            p.grad = torch.tensor(g, dtype=p.dtype)  # a new one: some references add the decay to it
        optimizer.step()
        weights.append([np.array(p.detach()) for p in parameters])
        if evaluated is not None:
            evaluated_at.append([np.array(optimizer.state[p][evaluated]) for p in parameters])
    return weights, evaluated_at or None


def optax(
    implementation: str, arguments: dict[str, Any], start: Arrays, grads: list[Arrays], dtype: str
) -> list[Arrays]:
    """The same for a function of optax's."""
    import jax
    import optax

    jax.config.update("jax_enable_x64", True)
    optimizer = resolve_name(implementation)(**arguments)
    parameters = [jax.numpy.asarray(p, dtype) for p in start]
    state, weights = optimizer.init(parameters), []
    step = jax.jit(optimizer.update)
    for arrays in grads:
        updates, state = step([jax.numpy.asarray(g, dtype) for g in arrays], state, parameters)
        parameters = optax.apply_updates(parameters, updates)
        weights.append([np.asarray(p) for p in parameters])
    return weights


@contextlib.contextmanager
def without_bfloat16() -> Iterator[None]:
    """Lets `tensor.bfloat16()` leave the dtype as it is."""
    import torch

    rounded = torch.Tensor.bfloat16
    torch.Tensor.bfloat16 = lambda self: self.clone()  # it is changed in place
    try:
        yield
    finally:
        torch.Tensor.bfloat16 = rounded


def exact_muon(implementation: str, *args: Any) -> tuple[list[Arrays], Any]:
    """Muon without its rounding to bfloat16."""
    with without_bfloat16():
        return usual(implementation, *args)


def patched(kind: Any, method: str, old: str, new: str) -> Any:
    """A subclass whose method has another word in its source, which has to be there once."""
    source = textwrap.dedent(inspect.getsource(getattr(kind, method)))
    assert source.count(old) == 1, (kind, method, old, source.count(old))
    found: dict[str, Any] = {}
    exec(source.replace(old, new), inspect.unwrap(getattr(kind, method)).__globals__, found)
    return type(kind.__name__, (kind,), found)


def named(
    implementation: str, arguments: dict[str, Any], start: Arrays, grads: list[Arrays], dtype: str, *_: Any
) -> tuple[list[Arrays], Any]:
    """An optimizer that is given the parameters with `names`, from its arguments; embeddings have rows as in Keras."""
    names, made = arguments.pop("names"), resolve_name(implementation)

    def turned(arrays: Arrays) -> Arrays:
        return [np.ascontiguousarray(x.T if name == "embed" else x) for name, x in zip(names, arrays, strict=True)]

    def with_names(parameters: Any, **rest: Any) -> Any:
        return made([(f"{name}.{i}", p) for i, (name, p) in enumerate(zip(names, parameters, strict=True))], **rest)

    weights, _ = torch(with_names, arguments, turned(start), [turned(each) for each in grads], dtype)
    return [turned(each) for each in weights], None


def apollo(
    implementation: str, arguments: dict[str, Any], start: Arrays, grads: list[Arrays], dtype: str, *_: Any
) -> tuple[list[Arrays], Any]:
    """APOLLO with given projections, which all matrices have but the `table`, and with the decay before the step."""
    import torch as library

    projections, table, decay = (arguments.pop(name) for name in ("projections", "table", "weight_decay"))
    rank = arguments["rank"]
    low = {name: arguments.pop(name) for name in ("rank", "scale", "scale_type", "update_proj_gap")}
    low |= {"proj": "random", "proj_type": "std"}
    _stub("apollo_torch", "transformers.utils.versions", require_version=lambda *_: None)
    made = resolve_name(implementation)

    def drawn(self: Any, grad: Any, proj_type: str) -> None:
        self.drawn = getattr(self, "drawn", -1) + 1
        found = library.tensor(projections[min(grad.shape), self.drawn], dtype=grad.dtype)
        self.ortho_matrix = found if proj_type == "right" else found.T

    resolve_name("apollo_torch.random_projector:GradientProjector").update_ortho_matrix = drawn

    def grouped(parameters: Any, **rest: Any) -> Any:
        projected = [p for i, p in enumerate(parameters) if p.ndim > 1 and i != table and min(p.shape) > rank]
        others = [p for p in parameters if not any(p is q for q in projected)]

        class Decayed(made):  # type: ignore[misc, valid-type]
            def step(self, closure: Any = None) -> Any:
                for p in parameters:
                    p.data.mul_(1 - rest["lr"] * decay)
                return super().step(closure)

        return Decayed([{"params": projected, **low}, {"params": others}], **rest)

    return torch(grouped, arguments, start, grads, dtype)


def evaluated_radam(
    implementation: str, arguments: dict[str, Any], start: Arrays, grads: list[Arrays], dtype: str, *_: Any
) -> tuple[list[Arrays], Any]:
    """Schedule-Free without x in its state: the weights that it evaluates at are those of its `eval` mode."""
    found: list[Arrays] = []

    class Noted(resolve_name(implementation)):  # type: ignore[misc]
        def step(self, closure: Any = None) -> Any:
            done = super().step(closure)
            self.eval()
            found.append([np.array(p.detach()) for p in self.param_groups[0]["params"]])
            self.train()
            return done

    return torch(Noted, arguments, start, grads, dtype)[0], found


def _stub(package: str, missing: str = "", **names: Any) -> None:
    """Lets the modules of a package be imported without its `__init__`, and without a module that may be missing."""
    if package not in sys.modules:
        spec = importlib.util.find_spec(package)
        assert spec is not None, f"{package} is not installed"
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = list(spec.submodule_search_locations or ())
    if not missing:
        return
    parts = missing.split(".")
    if missing not in sys.modules and importlib.util.find_spec(parts[0]) is None:
        for i in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:i]), types.ModuleType(parts[i - 1]))
        vars(sys.modules[missing]).update(names)


def exact_soap(
    implementation: str, arguments: dict[str, Any], start: Arrays, grads: list[Arrays], dtype: str, *_: Any
) -> tuple[list[Arrays], Any]:
    """SOAP with QR in the dtype of the rest; and its first bases, by parameter and axis."""
    kind = patched(resolve_name(implementation), "get_orthogonal_matrix_qr", "torch.float32", "power_iter.dtype")
    bases: list[Any] = []

    def step(self: Any, closure: Any = None) -> Any:
        done = kind.step(self, closure)
        if not bases:
            parameters = self.param_groups[0]["params"]
            bases.extend([np.array(q) if len(q) else None for q in self.state[p]["Q"]] for p in parameters)
        return done

    noted = type(kind.__name__, (kind,), {"step": step})
    return torch(noted, arguments, start, grads, dtype)[0], bases


def around(
    implementation: str, arguments: dict[str, Any], start: Arrays, grads: list[Arrays], dtype: str, evaluated: str
) -> tuple[list[Arrays], Any]:
    """A class around the optimizer that the argument `inner` names, with its arguments."""
    import torch as library

    name, inner = arguments.pop("inner")

    def made(parameters: Any, **rest: Any) -> Any:
        optimizer = resolve_name(name)(parameters, **inner)
        for p in parameters:  # makes the state; or the wrapper's part of it would be taken for all of it
            p.grad = library.zeros_like(p)
        if name.endswith("RMSprop"):
            optimizer.step()
        return resolve_name(implementation)(optimizer, **rest)

    return torch(made, arguments, start, grads, dtype, evaluated)


def corrected_mars(implementation: str, *args: Any) -> tuple[list[Arrays], Any]:
    """MARS whose first correction is 0, with ε added after the bias correction."""
    before, after = (f"state['last_grad'] = {value}" for value in ("torch.zeros_like(p)", "grad.clone()"))
    kind = patched(resolve_name(implementation), "init_group", before, after)
    root = "exp_avg_sq.sqrt().div_(bias_correction2_sq).add_(eps)"
    old = "de_nom.div_(bias_correction2_sq).mul_(bias_correction1)"
    return torch(patched(kind, "optimize_mixed", old, f"de_nom = {root}.mul_(bias_correction1)"), *args)


def corrected_laprop(implementation: str, *args: Any) -> tuple[list[Arrays], Any]:
    """LaProp with ε added after the bias correction."""
    root = "second_moment.sqrt().div_(bias_correction2_sq).add_(group['eps'])"
    kind = patched(resolve_name(implementation), "step", "de_nom.div_(bias_correction2_sq)", f"de_nom = {root}")
    return torch(kind, *args)


def corrected_adamp(implementation: str, *args: Any) -> tuple[list[Arrays], Any]:
    """AdamP with ε added after the bias correction."""
    old = "exp_avg_sq.sqrt().add_(group['eps']).reciprocal_().mul_(bias_correction2_sq)"
    new = "exp_avg_sq.sqrt().div_(bias_correction2_sq).add_(group['eps']).reciprocal_()"
    return torch(patched(resolve_name(implementation), "step", old, new), *args)


def yogi_from_zero(implementation: str, *args: Any) -> tuple[list[Arrays], Any]:
    """Yogi whose first moment starts at 0."""
    old = "state['exp_avg'] = torch.full_like(grad, fill_value=group['initial_accumulator'])"
    kind = patched(resolve_name(implementation), "init_group", old, "state['exp_avg'] = torch.zeros_like(grad)")
    return torch(kind, *args)


def exact_orthogonal(
    implementation: str, arguments: dict[str, Any], start: Arrays, grads: list[Arrays], dtype: str, *_: Any
) -> tuple[list[Arrays], Any]:
    """NorMuon, AdaMuon or SCION of pytorch_optimizer without their rounding to bfloat16.

    Besides the reference's arguments, `sign` orthogonalizes signs, and `factors` are SCION's radii by shape.
    """
    import torch as library

    scion: Any = importlib.import_module("pytorch_optimizer.optimizer.scion")
    from pytorch_optimizer.optimizer.utils import matrix

    kind, rounded = resolve_name(implementation), matrix.zero_power_via_newton_schulz_5
    sign, factors = arguments.pop("sign", False), arguments.pop("factors", {})
    steps, epsilon = arguments.pop("ns_steps", 5), arguments.pop("rms_epsilon", 1e-8)

    def exact(x: Any, *_: Any, **__: Any) -> Any:
        return rounded(library.sign(x) if sign else x, steps, dtype=x.dtype)

    def made(parameters: Any, **rest: Any) -> Any:
        if implementation.endswith("SCION"):
            scale = rest.pop("scale")
            groups = [{"params": [p], "scale": scale * factors.get(tuple(p.shape), 1.0)} for p in parameters]
            return kind(groups, foreach=False, **rest)
        return kind([{"params": parameters, "use_muon": True}], foreach=False, **rest)

    module: Any = inspect.getmodule(kind)
    bias = scion.BiasRMS.lmo
    module.zero_power_via_newton_schulz_5 = exact
    scion.BiasRMS.lmo = lambda self, grad: bias(self, grad, epsilon)
    try:
        return torch(made, arguments, start, grads, dtype)[0], None
    finally:
        module.zero_power_via_newton_schulz_5 = rounded
        scion.BiasRMS.lmo = bias


def kl_soap(
    implementation: str, arguments: dict[str, Any], start: Arrays, grads: list[Arrays], dtype: str, *_: Any
) -> tuple[list[Arrays], Any]:
    """Heavyball's KL-SOAP from the axes as first bases, without the shift of its QR, and with the decay at the end.

    For kernels with more than two axes the means are those of the paper, which it takes for matrices only.
    """
    import torch as library
    from heavyball import utils

    def plain(function: Any, old: str, new: str) -> Any:
        source = textwrap.dedent(inspect.getsource(function.__wrapped__))
        assert source.count(old) == 1, (function, old)
        found: dict[str, Any] = {}
        exec(source[source.index("def ") :].replace(old, new), vars(utils), found)
        return found[function.__name__]

    def identities(matrices: Any, *_: Any) -> Any:
        return [
            None if m is None else library.eye(m.shape[-1], dtype=m.dtype).expand(m.shape).clone() for m in matrices
        ]

    def means(grad: Any, grams: Any, bases: Any, most: Any, vectors: Any, beta: Any, epsilon: Any, **_: Any) -> Any:
        if grad.dim() <= 3:
            matrices(grad, grams, bases, most, vectors, beta, epsilon)
            return
        weights = {}
        for i, (gram, basis) in enumerate(zip(grams, bases, strict=True)):
            if gram is not None:
                values = library.einsum("...ji,...jk,...ki->...i", basis, gram, basis).clamp_min(epsilon)
                weights[i] = basis / (values * gram.shape[-1]).sqrt().unsqueeze(-2)
        outer = {}
        for i in weights:
            x = grad
            for j, weight in weights.items():
                if j != i:
                    x = library.einsum("n...a,nab->n...b", x.movedim(j + 1, -1), weight).movedim(-1, j + 1)
            rows = x.movedim(i + 1, 1).flatten(2)
            outer[i] = rows @ rows.mT
        for i, product in outer.items():
            grams[i].lerp_(product, 1 - beta)

    def corrected(beta: Any, step: Any) -> float:
        weight = 1 - float(beta)
        return 1 - weight / (1 - float(beta) ** int(step))

    matrices = utils.update_ggt_kl
    changed = {
        "beta_debias": corrected,  # of a float and a counter it makes a float32
        "compile_mode": None,
        "compile_mode_recommended_to_none": None,
        "get_orthogonal_matrix": identities,
        "get_orthogonal_matrix_QR": plain(
            utils.get_orthogonal_matrix_QR, "gram_basis + (lift * magnitude).unsqueeze(-1) * q_old", "gram_basis"
        ),
        "update_ggt_kl": means,
    }
    before = {name: getattr(utils, name) for name in [*changed, "psgd_should_update"]}
    decay, every = arguments.pop("weight_decay"), arguments["precondition_frequency"]
    each: list[list[Any]] = []
    try:
        for name, value in changed.items():
            setattr(utils, name, value)
        for i, first in enumerate(start):
            p = library.nn.Parameter(library.tensor(first, dtype=getattr(library, dtype)))
            optimizer = resolve_name(implementation)([p], weight_decay=0.0, storage_dtype=dtype, **arguments)
            weights = []
            for t, arrays in enumerate(grads):
                utils.psgd_should_update = lambda *_, due=t > 0 and t % every == 0, **__: due
                p.grad = library.tensor(arrays[i], dtype=p.dtype)
                optimizer.step()
                if t:  # the first gradient moves nothing
                    p.data.mul_(1 - arguments["lr"] * decay)
                weights.append(np.array(p.detach()))
            each.append(weights)
    finally:
        for name, value in before.items():
            setattr(utils, name, value)
    return [list(step) for step in zip(*each, strict=True)], None


def kron(
    implementation: str, arguments: dict[str, Any], start: Arrays, grads: list[Arrays], dtype: str, *_: Any
) -> tuple[list[Arrays], Any]:
    """Timm's Kron with the mean over its noise, balanced after each 100 updates.

    timm needs torchvision, but the file of this optimizer does not.
    """
    import torch as library

    for package in ("timm", "timm.optim"):
        _stub(package)
    library_name, kind = implementation.split(":")
    kron = importlib.import_module(f"{library_name}.{kind.lower()}")
    at: list[int] = []

    class Drawn:
        """Balances in the updates that are due."""

        def random(self) -> float:
            return 0.0 if at[0] % 100 == 0 else 1.0

    def terms(_: Any, a: Any, factors: Any) -> list[tuple[Any, Any]]:
        inverses = [library.linalg.inv(q) if q.dim() == 2 else 1 / q for q in factors]
        found = []
        for i, (q, inverse) in enumerate(zip(factors, inverses, strict=True)):
            rows = a.movedim(i, 0).flatten(1) if a.dim() > 1 else a[:, None]
            others = [r.square().sum() for j, r in enumerate(inverses) if j != i]
            scale = library.stack(others).prod() if others else 1.0
            if q.dim() == 2:
                found.append((rows @ rows.T, scale * inverse.T @ inverse))
            else:
                found.append((rows.square().sum(1), scale * inverse.square()))
        return found

    def made(parameters: Any, **rest: Any) -> Any:
        optimizer = kron.Kron(parameters, decoupled_decay=True, precond_dtype=getattr(library, dtype), **rest)
        optimizer.rng, optimizer._tiny = Drawn(), 1.2e-38
        optimizer._calc_A_and_conjB = lambda e, g, q, _: (library.einsum(e, *q, g), q)
        optimizer._q_terms, optimizer._precond_grad = terms, kron._precond_grad
        optimizer._balance_Q = kron._balance_Q
        step = optimizer.step

        def counted() -> None:
            at[:] = [at[0] + 1 if at else 1]
            step()

        optimizer.step = counted
        return optimizer

    return torch(made, arguments, start, grads, dtype)[0], None
