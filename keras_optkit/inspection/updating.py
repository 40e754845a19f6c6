"""One update of the weights by a copy of the optimizer, which is undone."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
from keras import ops
from keras.optimizers.schedules import LearningRateSchedule

from keras_optkit import backend
from keras_optkit.advice import UpdateReport
from keras_optkit.advice.reading import optimizer_names
from keras_optkit.inspection.passes import Passed, Passes, array
from keras_optkit.kernels import VECTOR, role
from keras_optkit.optimizers import Optimizer
from keras_optkit.optimizers.layer_paths import LayerTree
from keras_optkit.optimizers.of_model import innermost, ours, unscaled
from keras_optkit.private import is_decayed, schedule_of

#: The updates ahead at which a schedule is looked at.
_AHEAD = (0, *(round(10 ** (place / 4)) for place in range(21)))


class UnmeasuredError(Exception):
    """Why there is no update."""


def updated(
    passes: Passes, found: Passed, paths: LayerTree, unmeasured: list[str]
) -> tuple[UpdateReport | None, dict[int, tuple[float, float]]]:
    """One update, and by the id of a kernel or table, the squared norms of its change and of itself.

    Args:
        passes: Of the model.
        found: What they have found.
        paths: The layers of the model.
        unmeasured: What cannot be measured is added here.
    """
    model = passes.model
    optimizer = getattr(model, "optimizer", None)
    if found.value is None or optimizer is None:
        without = "without labels" if passes.y is None else "without a loss" if found.value is None else ""
        without = without or "since the model is not compiled with an optimizer"
        unmeasured.append(f"Updates: there are none {without}.")
        return None, {}
    variables = list(model.trainable_variables)
    report = _described(optimizer, model, paths)
    try:
        if not variables or all(found.gradients.get(id(v)) is None for v in variables):
            raise UnmeasuredError("no weight has a gradient")
        if not all(g is None or np.all(np.isfinite(array(g))) for g in found.gradients.values()):
            raise UnmeasuredError("the gradients are not finite")
        return _measured(passes, found, optimizer, variables, report, paths)
    except UnmeasuredError as reason:
        unmeasured.append(f"Updates: {reason}.")
        return UpdateReport(**report), {}


def _described(optimizer: Any, model: Any, paths: LayerTree) -> dict[str, Any]:
    """What is known of an optimizer without an update."""
    inner = innermost(optimizer)
    report: dict[str, Any] = {"optimizer": optimizer_names(optimizer)}
    report["decayed_vectors"] = tuple(_decayed_vectors(inner, model, paths))
    if len(inner) == 1:
        report |= _rate(inner[0])
        momentum = getattr(inner[0], "momentum", None)
        if isinstance(momentum, float) and type(inner[0]).__name__ == "SGD":
            report["momentum"] = momentum
        if isinstance(inner[0], Optimizer):
            rows = inner[0].explain(model).rows if model.trainable_variables else ()
            report["finds_rate"] = any(row.estimate is not None for row in rows)
    return report


def _rate(optimizer: Any) -> dict[str, float]:
    """The rate, and how much higher the schedule makes it later."""
    try:
        rate = float(array(ops.convert_to_tensor(optimizer.learning_rate)))
    except AttributeError:  # of a MultiOptimizer that is not built
        return {}
    schedule = optimizer._schedule if isinstance(optimizer, Optimizer) else schedule_of(optimizer)
    if not isinstance(schedule, LearningRateSchedule):
        return {"rate": rate}
    step = int(ops.convert_to_numpy(optimizer.iterations))
    rates = [float(array(ops.convert_to_tensor(schedule(step + ahead)))) for ahead in _AHEAD]
    return {"rate": rate, "rate_ahead": max(rates) / rates[0] if rates[0] > 0 else math.inf}


def _decayed_vectors(inner: list[Any], model: Any, paths: LayerTree) -> list[str]:
    """The paths of biases and scales that weight decay applies to."""
    if len(inner) != 1 or getattr(inner[0], "weight_decay", None) is None or not model.trainable_variables:
        return []
    vectors = {backend.key(v): v for v in model.trainable_variables if _is_vector(v, paths)}
    if isinstance(inner[0], Optimizer):
        rows = inner[0].explain(model).rows
        known = zip(model.trainable_variables, rows, strict=True)
        return [row.path for v, row in known if backend.key(v) in vectors and row.weight_decay > 0]
    decayed = [v for v in vectors.values() if is_decayed(inner[0], v)] if inner[0].weight_decay else []
    return [next(iter(paths.paths_of(v)), v.path) for v in decayed]


def _is_vector(variable: Any, paths: LayerTree) -> bool:
    node = paths.layer_of(variable)
    return role(variable, None if node is None else node.layer)[0] == VECTOR


def _measured(
    passes: Passes, found: Passed, optimizer: Any, variables: list[Any], report: dict[str, Any], paths: LayerTree
) -> tuple[UpdateReport, dict[int, tuple[float, float]]]:
    model = passes.model
    if any(each.needs_hessian_vector for each in ours(optimizer)):
        raise UnmeasuredError(f"{type(optimizer).__name__} needs products with the Hessian, which only `fit` computes")
    if report.get("rate") == 0:
        raise UnmeasuredError("the learning rate is 0 in this step")
    held = [(v, ops.copy(backend.tensor(v))) for v in variables]
    try:
        copy = _copied(optimizer, model, variables)
        for each in ours(copy):
            each.swap_weights(False)
        weights = {id(v): array(v) for v in variables}
        _apply(copy, passes, found, variables)
        after = {id(v): array(v) for v in variables}
        report["loss_after"] = passes.loss_now()
    except UnmeasuredError:
        raise
    except Exception as error:
        raise UnmeasuredError(
            f"{type(optimizer).__name__} cannot be copied and run: {type(error).__name__}: "
            f"{str(error).partition(chr(10))[0].rstrip('.')}"
        ) from error
    finally:
        for variable, value in held:
            variable.assign(value)
    if all(np.array_equal(after[key], weight) for key, weight in weights.items()):
        raise UnmeasuredError("the optimizer has changed no weight in one update, for example since it skips it")
    norms = {
        id(v): (float(((after[id(v)] - weights[id(v)]) ** 2).sum()), float((weights[id(v)] ** 2).sum()))
        for v in variables
        if not _is_vector(v, paths)
    }
    changed = [math.sqrt(norms[id(v)][0] / math.prod(v.shape)) for v in variables if norms.get(id(v), (0.0,))[0] > 0]
    if report.get("rate") and changed:
        first, report["size"], third = (float(q) / report["rate"] for q in np.quantile(changed, (0.25, 0.5, 0.75)))
        report["spread"] = third / first
    return UpdateReport(**report), norms


def _copied(optimizer: Any, model: Any, variables: list[Any]) -> Any:
    """An equal optimizer with equal state."""
    copy = type(optimizer).from_config(optimizer.get_config())
    for each in ours(copy):
        each.set_model(model)
    copy.build(variables)
    if optimizer.built:
        pairs = list(zip(copy.variables, optimizer.variables, strict=True))
        for new, old in pairs:
            new.assign(backend.tensor(old))
    return copy


def _apply(copy: Any, passes: Passes, found: Passed, variables: list[Any]) -> None:
    """As many calls of `apply` as an update takes; the mean of equal gradients is each of them."""
    gradients = [found.gradients[id(v)] for v in variables]
    second = next((each for each in ours(copy) if each.needs_second_gradient), None)
    if second is not None and unscaled(copy) is not second:
        raise UnmeasuredError(f"{type(second).__name__} inside another optimizer needs a step of `fit`")
    calls = max([getattr(each, "gradient_accumulation_steps", None) or 1 for each in innermost(copy)])
    before = [array(v) for v in variables]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Gradients do not exist")  # which a rule reports
        for _ in range(calls):
            given = gradients
            if second is not None:
                with second.perturbed(_cast(gradients, variables), variables):
                    moved = passes.gradients([backend.tensor(v) for v in variables], found.scale)
                given = [moved[id(v)] for v in variables]
            _call(copy, [None if g is None else copy.scale_loss(g) for g in _cast(given, variables)], variables)
            if any(not np.array_equal(array(v), value) for v, value in zip(variables, before, strict=True)):
                return


def _call(optimizer: Any, gradients: list[Any], variables: list[Any]) -> None:
    if backend.TENSORFLOW or unscaled(optimizer) is optimizer:
        optimizer.apply(gradients, variables)
        return
    # on JAX, the condition of loss scaling works without side effects only
    state = [backend.tensor(v) for v in optimizer.variables]
    weights, state = optimizer.stateless_apply(state, gradients, [backend.tensor(v) for v in variables])
    for variable, value in zip([*variables, *optimizer.variables], [*weights, *state], strict=True):
        variable.assign(value)


def _cast(gradients: list[Any], variables: list[Any]) -> list[Any]:
    return [None if g is None else ops.cast(g, v.dtype) for g, v in zip(gradients, variables, strict=True)]
