"""What `TrainingMonitor` computes, inside the training steps that it looks at."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops, tree

from keras_optkit import backend
from keras_optkit.advice.reading import FLAT, activation_of
from keras_optkit.callbacks.callback import number
from keras_optkit.callbacks.monitor import estimates, norms, on_tensorflow
from keras_optkit.fit.hooks import Hook, around
from keras_optkit.fit.instrument import Instrument
from keras_optkit.optimizers import Optimizer
from keras_optkit.optimizers.layer_paths import LayerTree
from keras_optkit.optimizers.of_model import innermost, optimizers_of, ours_of, unscaled
from keras_optkit.private import accumulated_gradients, in_stateless_scope, known_variables, sublayers

Tensor = Any

#: Values that a step sets once, and how the replicas of a strategy make one of theirs.
_SCALARS = {"loss": "sum", "examples": "sum", "half_examples": "sum", "half_squares": "only_first_replica"}

_LIMITS = ("clipnorm", "clipvalue", "global_clipnorm")

#: The rows of what is computed by layer; the first three are sums of squares.
GRADIENT, WEIGHT, CHANGE, NONFINITE = range(4)

#: The rows of "activations".
ACTIVATION = ("mean", "std", "zeros", "dead", "saturated")


def clips(optimizer: Any) -> bool:
    """Whether an optimizer clips."""
    inner = unscaled(optimizer)
    return any(getattr(inner, name, None) is not None for name in _LIMITS)


def _accumulated(optimizer: Any) -> norms.Sums | None:
    """What is to be clipped together with the gradient of this micro-batch; None without accumulation or clipping."""
    inner = unscaled(optimizer)
    if not (clips(optimizer) and inner.built and getattr(inner, "gradient_accumulation_steps", None)):
        return None
    if isinstance(inner, Optimizer):
        return inner.accumulated_gradients()
    found, known = accumulated_gradients(inner), known_variables(inner)
    if found is None or known is None:
        return None
    return dict(zip(map(backend.key, known), found[0], strict=True)), found[1]


def layer_names(model: Any) -> dict[int, str]:
    """For each weight that is trained, by its key, the path of its layer in the model."""
    tree = LayerTree.of(model)
    found = {backend.key(v): tree.layer_of(v) for v in model.trainable_variables}
    return {key: node.path if node is not None and node.path else model.name for key, node in found.items()}


class Update(NamedTuple):
    """An update as the step was traced with it.

    Attributes:
        optimizer: The optimizer that makes it.
        name: Name of the value that holds what is computed in it.
        scalars: Names of the scalars at its beginning, before the rows by layer.
        layers: The layers that it changes, and which of their weights, by their keys.
    """

    optimizer: Any
    name: str
    scalars: tuple[str, ...]
    layers: dict[str, frozenset[int]]


@dataclass
class Reading:
    """What a step has computed.

    Attributes:
        layers: Layer to its column of the rows `GRADIENT` to `NONFINITE`, in the model's order.
        updates: Each optimizer that has made an update, and its scalars by name.
        scalars: Those that there is one of.
        activations: Kind to layer to value.
    """

    layers: dict[str, np.ndarray] = field(default_factory=dict)
    updates: list[tuple[Any, dict[str, float]]] = field(default_factory=list)
    scalars: dict[str, float] = field(default_factory=dict)
    activations: dict[str, dict[str, float]] = field(default_factory=dict)


class Probe(Instrument):
    """Computes in the steps that are wanted, and hands the results to the host.

    A step may make several updates, also under conditions. Each has a value of its own, which begins with the number of
    the execution that it was computed in; by that the host knows which updates were made in the last one.

    Attributes:
        fresh: Whether a step has computed since the last reading.
        ended: Whether the step that was begun last is none, since the data had ended.
    """

    def __init__(self, model: Any, activations: str | None, noise_scale: bool):
        super().__init__(model, {"execution": "only_first_replica"})
        self._pattern, self._noise_scale = activations, noise_scale
        self._execution = 0
        self._updates: dict[Any, Update] = {}
        self._held: set[str] = set()  # names of values that steps have set
        self._order: list[str] = []  # all layers with weights that are trained
        self._watched: list[str] = []
        self._saturates: dict[str, bool] = {}
        self._flushed: dict[str, np.ndarray] = {}
        self._flushes: list[Callable[[], None]] = []
        self.fresh = self.ended = False
        self._before: tuple[Any, ...] = ()

    def begin_fit(self) -> None:
        """Has the updates seen that end an epoch, outside any step."""
        self.wanted, self.fresh, self.ended, self._flushed = False, False, False, {}
        self._flushes = [around(optimizer, "flush", self._see_flush(optimizer)) for optimizer in ours_of(self.model)]

    def release(self) -> None:
        """Leaves the optimizers alone."""
        for detach in self._flushes:
            detach()
        self._flushes = []

    def prepare(self) -> None:
        """Makes the variables for replicas, where they cannot be made inside the step; `fit` has built the model."""
        strategy = getattr(self.model, "distribute_strategy", None)
        if strategy is None or strategy.num_replicas_in_sync == 1:
            return
        names = layer_names(self.model)
        for optimizer in optimizers_of(self.model):
            head = [*_rates(optimizer), *estimates.names(optimizer)]
            head += [*(["loss_scale"] * _scales(optimizer)), *(["clipped"] * clips(optimizer))]
            head += ["penalty"] * any(map(norms.regularizer_of, self.model.trainable_variables))
            update = self._update(optimizer, self.model.trainable_variables, names, head)
            self.set(update.name, np.zeros(_size(update), "float32"))
            self.set(f"loss/{id(optimizer)}", 0.0, "sum")
        for name, aggregation in _SCALARS.items():
            self.set(name, 0.0, aggregation)
        if self._pattern is not None:
            found = matching_layers(self.model, self._pattern)
            self.set("activations", np.zeros((len(ACTIVATION), len(found)), "float32"))

    def hooks(self) -> list[Callable[[], None]]:
        """Around what the step that begins may call."""
        model = self.model
        hooks = [around(metric, "update_state", self._see_metric) for metric in model.metrics if metric.name == "loss"]
        if self._pattern is not None:  # which of the layers match, is known when all are built
            hooks += [around(layer, "call", self._see_call(layer)) for layer in sublayers(model)]
        for optimizer in optimizers_of(model):
            if keras.config.backend() == "tensorflow":
                hooks.append(around(optimizer, "scale_loss", self._see_loss(optimizer)))
                hooks.append(around(optimizer, "apply", self._see_apply(optimizer)))
            else:
                # On JAX `scale_loss` is called inside what is differentiated and `apply`, with loss scaling, inside
                # of a condition. No value can come out of either; it can from around them.
                hooks.append(around(optimizer, "stateless_apply", self._see_stateless_apply(optimizer)))
        return hooks

    # -- for the host -------------------------------------------------------------------------------------------------

    def want(self, wanted: bool) -> None:
        """Says whether the steps that begin from now on compute."""
        self._before = self.wanted, self.fresh, self._flushed, self._execution
        self.wanted, self._flushed = wanted, {}
        self.fresh, self.ended = self.fresh or wanted, False
        if wanted:
            self._execution += 1
            self["execution"] = self._execution

    def data_ended(self) -> None:
        """Goes back to the step before, which may yet have an update: that of the micro-batches that are left."""
        self.wanted, self.fresh, self._flushed, self._execution = self._before
        self.ended = True

    def read(self) -> Reading:
        """What the last step that was wanted has computed; waits for it."""
        self.fresh = False
        read = Reading(scalars={name: float(self._on_host(name)) for name in _SCALARS if name in self._held})
        found: dict[str, dict[frozenset[int], np.ndarray]] = {}
        for update in self._updates.values():
            values = self._on_host(update.name) if update.name in self._held else np.zeros(1)
            if values[0] != self._execution:
                continue
            scalars = dict(zip(update.scalars, map(float, values[1:]), strict=False))
            if (loss := f"loss/{id(update.optimizer)}") in self._held:
                scalars["loss"] = float(self._on_host(loss))
            read.updates.append((update.optimizer, scalars))
            columns = values[1 + len(update.scalars) :].reshape(4, -1).T
            for (layer, weights), column in zip(update.layers.items(), columns, strict=True):
                # of the same weights it is a later update; of other weights of the layer, a part of the same
                others = {w: c for w, c in found.get(layer, {}).items() if not w & weights}
                found[layer] = others | {weights: column}
        for layer in self._order:
            if layer in found:
                read.layers[layer] = np.sum(list(found[layer].values()), axis=0)
                if layer in self._flushed:
                    read.layers[layer][[WEIGHT, CHANGE]] = self._flushed[layer]
        if "activations" in self._held:
            rows = self._on_host("activations")
            read.activations = {
                kind: {
                    layer: float(value)
                    for layer, value in zip(self._watched, row, strict=True)
                    if kind != "saturated" or self._saturates[layer]
                }
                for kind, row in zip(ACTIVATION, rows, strict=True)
            }
        return read

    def _on_host(self, name: str) -> np.ndarray:
        return np.array(ops.convert_to_numpy(self[name]), "float64")

    # -- inside the step ----------------------------------------------------------------------------------------------

    def begin(self, data: Any, *_: Any) -> None:
        """On request, computes the gradient of half of the batch first."""
        self._thread.calls = {}
        if self._noise_scale:
            (optimizer,) = optimizers_of(self.model)
            self._thread.aside = True
            try:
                self._thread.half, examples = on_tensorflow.half_gradient(self.model, _scaled_by(optimizer), data)
            finally:
                self._thread.aside = False
            self._hold("half_examples", ops.cast(examples, "float32"))

    @property
    def _looking(self) -> bool:
        return self.in_step and not getattr(self._thread, "aside", False)

    def _hold(self, name: str, value: Tensor) -> None:
        self.set(name, value, "sum" if name.startswith("loss/") else _SCALARS.get(name, "only_first_replica"))
        self._held.add(name)

    def _see_loss(self, optimizer: Any) -> Hook:
        @contextlib.contextmanager
        def see_loss(loss: Tensor, *_: Any, **__: Any) -> Iterator[None]:
            if self._looking:  # each replica has its part of the global batch's mean
                self._hold(f"loss/{id(optimizer)}", ops.cast(loss, "float32"))
            yield

        return see_loss

    @contextlib.contextmanager
    def _see_metric(self, loss: Tensor, sample_weight: Any = None) -> Iterator[None]:
        """Keras's own "loss" is told of the batch's loss, and of its size as the weight."""
        if self._looking:
            if keras.config.backend() == "jax":
                self._hold("loss", loss)
            if sample_weight is not None:
                self._hold("examples", ops.cast(sample_weight, "float32"))
        yield

    def _see_apply(self, optimizer: Any) -> Hook:
        @contextlib.contextmanager
        def see_apply(
            grads: Sequence[Tensor | None], trainable_variables: Sequence[Any] | None = None
        ) -> Iterator[None]:
            if not self._looking:
                yield
                return
            variables = self._variables(optimizer, trainable_variables)
            if not optimizer.built:
                with backend.outside_graph():
                    optimizer.build(variables)
            before, sums = [ops.copy(v) for v in variables], _accumulated(optimizer)
            scalars, scale = self._scalars(optimizer)
            estimated = estimates.watched(optimizer)
            yield
            scalars |= estimated()
            after = [ops.convert_to_tensor(v) for v in variables]
            self._see_update(optimizer, grads, variables, before, after, scalars, scale, sums)

        return see_apply

    def _see_stateless_apply(self, optimizer: Any) -> Hook:
        @contextlib.contextmanager
        def see_stateless_apply(
            state: Sequence[Tensor], grads: Sequence[Tensor | None], weights: Sequence[Tensor]
        ) -> Iterator[Callable[[Any], None] | None]:
            if not self._looking:
                yield None
                return

            def holding(values: Sequence[Tensor]) -> Any:
                return keras.StatelessScope(list(zip(optimizer.variables, values, strict=True)))

            def see_result(result: tuple[Sequence[Tensor], Sequence[Tensor]]) -> None:
                after, new_state = result
                with holding(new_state):  # ScheduleHyperparameters sets rates that are variables in there
                    for name, rate in _rates(optimizer).items():
                        if isinstance(rate, keras.Variable):
                            scalars[name] = ops.convert_to_tensor(rate)
                    scalars.update(estimated())
                self._see_update(optimizer, grads, self._variables(optimizer), weights, after, scalars, scale, sums)

            with holding(state):
                scalars, scale = self._scalars(optimizer)
                sums, estimated = _accumulated(optimizer), estimates.watched(optimizer)
            yield see_result

        return see_stateless_apply

    def _variables(self, optimizer: Any, given: Sequence[Any] | None = None) -> list[Any]:
        """The variables that an optimizer updates: those given, or those it was built for."""
        return list(given or known_variables(optimizer) or self.model.trainable_variables)

    def _scalars(self, optimizer: Any) -> tuple[dict[str, Tensor], Tensor]:
        """What the optimizer is about to use, and the scale of the loss."""
        scale = _scaled_by(optimizer)(ops.ones((), "float32"))
        scalars = {name: ops.convert_to_tensor(rate) for name, rate in _rates(optimizer).items()}
        if _scales(optimizer):
            scalars["loss_scale"] = scale
        return scalars, scale

    def _update(
        self, optimizer: Any, variables: Sequence[Any], names: Mapping[int, str], scalars: Iterable[str]
    ) -> Update:
        """What is known of this update, now or from an earlier trace."""
        key = id(optimizer), tuple(map(backend.key, variables))
        layers: dict[str, frozenset[int]] = {}
        for variable in variables:
            if (weight := backend.key(variable)) in names:  # and not of a model that is trained beside this one
                layers[names[weight]] = layers.get(names[weight], frozenset()) | {weight}
        name = self._updates[key].name if key in self._updates else f"update/{len(self._updates)}"
        self._updates[key] = Update(optimizer, name, tuple(scalars), layers)
        return self._updates[key]

    def _see_update(
        self,
        optimizer: Any,
        grads: Sequence[Any],
        variables: Sequence[Any],
        before: Sequence[Tensor],
        after: Sequence[Tensor],
        scalars: dict[str, Tensor],
        scale: Tensor,
        sums: norms.Sums | None,
    ) -> None:
        names = layer_names(self.model)
        self._order = list(dict.fromkeys(names.values()))
        own = norms.dense(grads, variables)
        whole = backend.sum_over_replicas(own)
        squares = [norms.squares(g) / ops.square(scale) for g in whole]
        rows = [
            squares,
            [norms.squares(w) for w in before],
            [norms.squares(ops.subtract(norms.wide(a), norms.wide(b))) for a, b in zip(after, before, strict=True)],
            [norms.nonfinite(g) for g in whole],
        ]
        if clips(optimizer):
            inner = unscaled(optimizer)
            seen = whole if isinstance(inner, Optimizer) else own  # Keras's clip in each replica, before the sum
            scalars["clipped"] = self._clipped(inner, norms.to_clip(inner, seen, variables, scale, sums))
        if any(map(norms.regularizer_of, variables)):
            scalars["penalty"] = norms.penalty(variables, before)
        update = self._update(optimizer, variables, names, scalars)
        head = [self["execution"], *scalars.values()]
        by_layer = [value for row in rows for value in norms.by_layer(row, variables, names, update.layers)]
        self._hold(update.name, ops.stack([ops.cast(value, "float32") for value in [*head, *by_layer]]))
        half = getattr(self._thread, "half", None)
        if half is not None:
            self._thread.half = None
            half = backend.sum_over_replicas(norms.dense(half, self.model.trainable_variables))
            self._hold("half_squares", sum(norms.squares(g) for g in half) / ops.square(scale))

    @staticmethod
    def _clipped(inner: Any, grads: Sequence[Tensor | None]) -> Tensor:
        """Whether clipping changes the gradient, in any replica."""
        squares = [norms.squares(g) for g in grads]
        if inner.global_clipnorm is not None:
            size, limit = ops.sqrt(sum(squares)), inner.global_clipnorm
        elif inner.clipnorm is not None:
            size, limit = ops.sqrt(ops.max(ops.stack(squares))), inner.clipnorm
        else:
            largest = [ops.cast(ops.max(ops.abs(g)), "float32") for g in grads if g is not None]
            size, limit = ops.max(ops.stack(largest)), inner.clipvalue
        unchanged = backend.in_all_replicas(ops.less_equal(size, ops.cast(limit, "float32")))
        return ops.cast(ops.logical_not(unchanged), "float32")

    def _see_flush(self, optimizer: Any) -> Hook:
        @contextlib.contextmanager
        def see_flush() -> Iterator[Callable[[Any], None]]:
            """An update at the end of an epoch from the micro-batches that are left."""
            begun_at = number(optimizer.iterations)
            names = layer_names(self.model) if self.wanted else {}
            variables = [v for v in self._variables(optimizer) if backend.key(v) in names]
            before = [ops.copy(v) for v in variables]

            def see_result(_: Any) -> None:
                if not variables or number(optimizer.iterations) == begun_at:
                    return
                layers = dict.fromkeys(names[backend.key(v)] for v in variables)
                changes = [
                    norms.squares(ops.subtract(norms.wide(v), norms.wide(b)))
                    for v, b in zip(variables, before, strict=True)
                ]
                rows = [
                    norms.by_layer(row, variables, names, layers)
                    for row in ([norms.squares(b) for b in before], changes)
                ]
                self._flushed |= dict(zip(layers, np.array(ops.convert_to_numpy(ops.stack(rows))).T, strict=True))

            yield see_result

        return see_flush

    # -- on request, on TensorFlow ------------------------------------------------------------------------------------

    def _see_call(self, layer: Any) -> Hook:
        @contextlib.contextmanager
        def see_call(*args: Any, **kwargs: Any) -> Iterator[Callable[[Any], None]]:
            def see_result(outputs: Any) -> None:
                if self._looking and not in_stateless_scope():  # when a layer around is built
                    call = on_tensorflow.Call(tree.flatten(outputs)[0], tree.flatten((args, kwargs)))
                    self._thread.calls.setdefault(id(layer), []).append(call)

            yield see_result

        return see_call

    def end(self) -> None:
        """On request, measures what the layers have returned."""
        if self._pattern is None:
            return
        calls, self._thread.calls = self._thread.calls, {}
        found = matching_layers(self.model, self._pattern)
        columns = []
        for name, layer in found.items():
            seen = calls.get(id(layer), [])
            if not seen or not all(backend.is_here(call.output) for call in seen):
                raise ValueError(
                    f"activations: the layer {name!r} is not called in the training step itself, but "
                    f"{'inside a loop or a function in it' if seen else 'nowhere'}. Choose other layers."
                )
            flat = FLAT.get(activation_of(layer) or "")
            columns.append(on_tensorflow.moments(seen, layer.weights, _unit_axis(layer), flat))
            self._saturates[name] = flat is not None
        self._watched = list(found)
        self._hold("activations", ops.transpose(ops.stack(columns)))


def _size(update: Update) -> int:
    return 1 + len(update.scalars) + 4 * len(update.layers)


def _scaled_by(optimizer: Any) -> Callable[[Tensor], Tensor]:
    return lambda loss: type(optimizer).scale_loss(optimizer, loss)  # the class's own, which nobody watches


def _scales(optimizer: Any) -> bool:
    return isinstance(optimizer, keras.optimizers.LossScaleOptimizer)


def _rates(optimizer: Any) -> dict[str, Any]:
    """The learning rate; of an optimizer of several, which has none, those of the ones inside, by their place."""
    if hasattr(optimizer, "learning_rate"):
        return {"learning_rate": optimizer.learning_rate}
    inside = enumerate(innermost(optimizer))
    return {f"learning_rate/{i}": part.learning_rate for i, part in inside if hasattr(part, "learning_rate")}


def _unit_axis(layer: Any) -> int:
    """The axis of a layer's output along which its units or channels lie."""
    return 1 if getattr(layer, "data_format", None) == "channels_first" else -1


def matching_layers(model: Any, pattern: str) -> dict[str, Any]:
    """The layers, at any depth, whose path matches, by that path.

    Raises:
        ValueError: If there are none.
    """
    layers = LayerTree.of(model)
    found = {node.path: node.layer for node in layers.matching(pattern)}
    if not found:
        paths = ", ".join(node.path for node in layers.nodes)
        raise ValueError(f"activations must match the path of a layer, got {pattern!r}. The layers are {paths}.")
    return found
