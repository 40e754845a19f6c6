"""`inspect`: a look at a model on one batch."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops, tree

from keras_optkit.advice import LayerReport, ModelReport, findings
from keras_optkit.advice.reading import ACTIVATION_LAYERS, activation_of, has_l2, is_normalization, own_weights
from keras_optkit.advice.scales import kernel_reports
from keras_optkit.inspection.outputs import output_reports
from keras_optkit.inspection.passes import Passed, Passes, array, as_before, as_tensors
from keras_optkit.inspection.report import Report
from keras_optkit.inspection.updating import updated
from keras_optkit.inspection.watching import Seen, Watch, has_kernel
from keras_optkit.kernels import VECTOR, role
from keras_optkit.optimizers.layer_paths import LayerTree, Node

#: How far trained weights are moved to see what depends on them, in their root mean squares.
_MOVED = 0.1


def inspect(model: keras.Model, batch: Any, y: Any = None, loss: Any = None) -> Report:
    """Looks at a model on one batch, and reports what is likely to be wrong with it, before it is trained.

    One forward and one backward pass in training mode, and one update by a copy of the compiled optimizer, which is
    undone. Of each layer it measures

    ```text
    kernel std     σ(W), next to gain / sqrt(fan_in), which the activation asks for (gain: see `calculate_gain`)
    mean, std      of the output, over the batch and all units
    saturated      share of outputs where the activation is flat: |tanh| > 0.99, sigmoid < 0.01 or > 0.99
    dead           share of units of a ReLU, GELU or SiLU with outputs from -1e-5 to 0 on the whole batch
    gradient       |∂L/∂θ|, over the weights of the layer; L is the mean loss of the batch with all penalties
    update         |ΔW| / |W| in one update, over its kernels and embeddings
    ```

    and tells what does not fit: losses and outputs, labels, unscaled inputs, identical or frozen layers, kernels of a
    wrong size, a learning rate far too low or high, dead and saturated units, exploding outputs, missing gradients, an
    output bias far from the frequencies of the classes, L2 penalties with an adaptive optimizer. `warnings` has causes
    before their consequences, each with a reason and a fix; `hints` has what is of no use, but does little harm.

    Sequential, functional, nested and subclassed models, several inputs and outputs and mixed precision are looked at
    alike. Weights, statistics, optimizer, metrics and the random states of Keras, Python and NumPy are afterwards
    exactly as before, also if something fails.

    Beside the passes it takes a forward pass for the loss after the update, another one if kernels are frozen, and on
    JAX, where nothing can be read inside the gradient, one more. An optimizer with several calls of `apply` for an
    update is given the same gradient several times. `SAM` computes its second gradient. A copy of the optimizer is held
    meanwhile.

    When not to use it: as a proof that a model is healthy, since it sees one batch and one update; on a batch of fewer
    than about eight examples, in which many units are 0 by chance.

    Args:
        model: A built model, compiled or not.
        batch: One batch of inputs, as the model is called with, preprocessed as for training: an array, or a list or
            dict of arrays.
        y: The labels of the batch, as for `fit`. None: only the forward pass, without loss, gradients and update.
        loss: A Keras loss, its name, or a function of labels and outputs, instead of the compiled loss. None: the
            compiled one.

    Returns:
        A `Report`, which prints as a table with the warnings below; `report.warnings`, `report.hints`,
        `report.unmeasured` (what could not be measured, and why), `report.to_dict()`, `report.plot()` and
        `report.to_tensorboard(log_dir)`.

    Raises:
        TypeError: `model` is not a Keras model.
        ValueError: The model is not built, the batch is empty, or `y` is given and there is no loss.

    Sources: He et al. 2015, arXiv 1502.01852, and Glorot and Bengio 2010 (kernels); LeCun et al. 1998, Efficient
    BackProp, 4.3 (inputs); Loshchilov and Hutter 2019, arXiv 1711.05101 (L2).

    Example:
    ```python
    import keras
    import numpy as np

    import keras_optkit as ok

    x = np.random.default_rng(0).integers(0, 256, (32, 20))  # not scaled
    y = np.arange(32) % 3
    model = keras.Sequential([keras.Input((20,)), keras.layers.Dense(32, "relu"), keras.layers.Dense(3)])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    report = ok.inspect(model, x, y)
    print(report)
    assert report.warnings[0].rule == "unscaled_inputs"
    ```
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"model must be a keras.Model, got {model!r} of type {type(model).__name__}.")
    if not model.built:
        raise ValueError(f"model must be built, got {model.name!r}, which is not. Call it on a batch, or build(shape).")
    compiled = getattr(model, "compiled", False)
    custom = type(model).compute_loss is not keras.Model.compute_loss
    if y is not None and loss is None and not custom and not (compiled and getattr(model, "loss", None) is not None):
        raise ValueError(f"loss must be given for a model that is not compiled with one, got None for {model.name!r}.")
    if any(not np.size(part) for part in tree.flatten(batch)):
        raise ValueError(f"batch must hold at least one example, got arrays of {_shapes(batch)}.")
    x, labels = as_tensors(batch), None if y is None else as_tensors(y)
    with as_before(model):
        return _Look(model, x, labels, loss).report()


def _shapes(data: Any) -> str:
    return ", ".join(str(np.shape(part)) for part in tree.flatten(data))


class _Look:
    """A model, a batch, and what was seen."""

    def __init__(self, model: Any, x: Any, y: Any, loss: Any):
        self.model, self.x, self.y = model, x, y
        self.given_loss = loss if loss is not None else getattr(model, "loss", None)
        self.tree, self.watch = LayerTree.of(model), Watch(model)
        self._by_id = {id(node.layer): node.layer for node in self.tree.nodes}
        self._trained = {id(v) for v in model.trainable_variables}
        self.unmeasured: list[str] = []
        self.passes = Passes(model, x, y, loss)

    def report(self) -> Report:
        """The report."""
        optimizer = getattr(self.model, "optimizer", None)
        scale = 1.0 if optimizer is None else float(array(optimizer.scale_loss(ops.ones((), "float32"))))
        found = self.passes.run(self.watch, scale)
        self._say_what_was_not_seen(found)
        update, norms = updated(self.passes, found, self.tree, self.unmeasured)
        outputs = self._output_layers(found)
        reports = () if self.y is None else self._outputs(found, outputs)
        self.watch.release()
        behind = self._behind_trained()
        layers = self._layers(found, norms, {layer for _, layer in outputs.values()}, behind)
        measured = ModelReport(
            layers=layers,
            outputs=reports,
            examples=self._examples(),
            input_rms=max((rms for rms, _ in self._inputs()), default=None),
            loss_value=found.value,
            problem=found.problem,
            update=update,
            penalized=tuple(self._path(v) for v in self.model.trainable_variables if has_l2(v)),
            zero_factors=tuple(self._zero_factors(found)),
        )
        warned = findings(measured)
        return Report(
            measured,
            tuple(each for each in warned if not each.is_hint),
            tuple(each for each in warned if each.is_hint),
            tuple(self.unmeasured),
        )

    # -- the model ----------------------------------------------------------------------------------------------------

    def _path(self, variable: Any) -> str:
        return next(iter(self.tree.paths_of(variable)), variable.path)

    def _examples(self) -> int | None:
        first = next(iter(tree.flatten(self.x)), None)
        return int(first.shape[0]) if first is not None and len(first.shape) else None

    def _inputs(self) -> list[tuple[float, int]]:
        """The root mean square and the size of each input of numbers."""
        found = []
        for part in tree.flatten(self.x):
            if any(kind in keras.backend.standardize_dtype(part.dtype) for kind in ("float", "int")):
                values = np.asarray(ops.convert_to_numpy(ops.cast(part, "float32"))).astype("float64")
                found.append((float(np.sqrt(np.mean(values**2))), values.size))
        return found

    def _say_what_was_not_seen(self, found: Passed) -> None:
        if self.y is None:
            self.unmeasured.append("Loss and gradients: there are no labels (y).")
        elif found.problem is not None:
            self.unmeasured.append(f"Gradients: the loss cannot be computed, {found.problem.rstrip('.')}.")
        hidden = [node.path for key, node in self.watch.nodes.items() if self._is_hidden(key)]
        if hidden:
            self.unmeasured.append(
                f"Activations: {', '.join(hidden)} are called in a loop or a compiled function, where nothing can be "
                "read."
            )

    def _is_hidden(self, key: int) -> bool:
        seen = self.watch.seen.get(key)
        return seen is not None and seen.unreadable

    def _is_trained(self, node: Node) -> bool:
        """Whether weights of a layer are trained; one inside a frozen layer does not know that they are not."""
        return any(id(v) in self._trained for v in own_weights(node))

    # -- outputs ------------------------------------------------------------------------------------------------------

    def _output_layers(self, found: Passed) -> dict[int, tuple[Any, int]]:
        """By the id of an output, the activation that it has been through, and the layer that has made it, by its id.

        That is the layer before an activation layer.
        """
        result: dict[int, tuple[Any, int]] = {}
        for output in tree.flatten(found.outputs):
            key = self.watch.made.get(id(output))
            if key is None:
                continue
            activation, layer = None, self._layer(key)
            while isinstance(layer, ACTIVATION_LAYERS) or not layer.weights:
                activation = activation if activation not in (None, "linear") else activation_of(layer)
                before = self.watch.seen[key].source
                if before is None:
                    break
                key = before
                layer = self._layer(key)
            if activation in (None, "linear"):
                activation = activation_of(layer) or activation
            result[id(output)] = (activation, key)
        return result

    def _layer(self, key: int) -> Any:
        return self._by_id[key]

    def _outputs(self, found: Passed, layers: dict[int, tuple[Any, int]]) -> Any:
        known = {}
        for output, (activation, key) in layers.items():
            bias = getattr(self._layer(key), "bias", None)
            known[output] = activation, None if bias is None else array(bias)
        names = getattr(self.model, "output_names", None)
        return output_reports(found, self.y, names, known, self.given_loss)

    # -- layers -------------------------------------------------------------------------------------------------------

    def _behind_trained(self) -> dict[int, bool]:
        """Of frozen layers with a kernel, whether their inputs change with the weights that are trained."""
        frozen = [
            key
            for key, node in self.watch.nodes.items()
            if not self._is_trained(node) and has_kernel(node.layer) and key in self.watch.seen
        ]
        if not frozen or not self.model.trainable_variables:
            return {}
        rng, moved = np.random.default_rng(0), []
        for variable in self.model.trainable_variables:
            value = array(variable)
            step = _MOVED * (np.sqrt(np.mean(value**2)) or 1.0) * rng.normal(size=value.shape)
            moved.append(ops.convert_to_tensor((value + step).astype("float32")))
        values = [ops.cast(value, v.dtype) for value, v in zip(moved, self.model.trainable_variables, strict=True)]
        again = Watch(self.model)
        with again.on():
            self.passes.forward(values)
        again.release()
        found = {}
        for key in frozen:
            before, after = self.watch.seen[key].input, again.seen[key].input
            if before and after:
                rounding = 1e-5 * before["rms"] * before["size"] ** 0.5
                found[key] = abs(before["mark"] - after["mark"]) > rounding
        return found

    def _layers(
        self, found: Passed, norms: dict[int, tuple[float, float]], outputs: set[int], behind: dict[int, bool]
    ) -> tuple[LayerReport, ...]:
        nodes, inputs = self.watch.nodes, self._inputs()
        called = [key for key in self.watch.seen if key in nodes]
        first = next((key for key in called if has_kernel(nodes[key].layer)), None)
        result = []
        absent = [key for key, node in nodes.items() if key not in self.watch.seen and node.layer.weights]
        for key in [*called, *absent]:
            seen = self.watch.seen.get(key)
            fed = seen is not None and any(
                bool(seen.input) and seen.input["size"] == size and np.isclose(seen.input["rms"], rms, rtol=1e-5)
                for rms, size in inputs
            )
            more: dict[str, Any] = {"sees_input": key == first or fed, "is_output": key in outputs}
            if key in behind:
                more["behind_trained"] = behind[key]
            if seen is not None:
                more |= self._of_call(seen)
            more |= _of_gradients(nodes[key], found) | _of_update(nodes[key], norms)
            result.append(self._layer_report(nodes[key], seen, more))
        return tuple(result)

    def _of_call(self, seen: Seen) -> dict[str, Any]:
        feeds = None if seen.feeds is None else self._layer(seen.feeds)
        found: dict[str, Any] = dict(seen.output)
        found |= {f"input_{name}": seen.input[name] for name in ("rms", "mean", "differs") if name in seen.input}
        if feeds is not None:
            found["feeds_norm"] = is_normalization(feeds)
            found["feeds_batch_norm"] = isinstance(feeds, keras.layers.BatchNormalization)
        return found

    def _layer_report(self, node: Node, seen: Seen | None, more: dict[str, Any]) -> LayerReport:
        layer = node.layer
        activation = activation_of(layer)
        if activation == "linear" and seen is not None and seen.feeds is not None:
            behind = self._layer(seen.feeds)
            if isinstance(behind, ACTIVATION_LAYERS):
                activation = activation_of(behind)
        cells = getattr(layer, "cell", None) if isinstance(layer, keras.layers.RNN) else None
        return LayerReport(
            path=node.path,
            kind=type(layer).__name__,
            activation=activation,
            trainable=self._is_trained(node) or not layer.weights,
            was_called=seen is not None,
            has_bias=getattr(cells or layer, "bias", None) is not None,
            kernels=kernel_reports(layer, own_weights(node), activation, array),
            **more,
        )

    def _zero_factors(self, found: Passed) -> list[str]:
        """Kernels and scales that are all 0, behind which nothing has a gradient until they are trained."""
        zeros = []
        for variable in self.model.trainable_variables:
            node = self.tree.layer_of(variable)
            gradient = found.gradients.get(id(variable))
            is_bias = role(variable, None if node is None else node.layer)[0] == VECTOR and _names_a_shift(variable)
            if not is_bias and gradient is not None and not np.any(array(variable)) and np.any(array(gradient)):
                zeros.append(self._path(variable))
        return zeros


def _names_a_shift(variable: Any) -> bool:
    name = str(variable.name).rsplit("/", 1)[-1]
    return "bias" in name or name.startswith("beta")


def _of_gradients(node: Node, found: Passed) -> dict[str, Any]:
    trained = [v for v in own_weights(node) if id(v) in found.gradients]
    if not trained:
        return {}
    total, has, zero = 0.0, True, True
    for variable in trained:
        gradient = found.gradients[id(variable)]
        if gradient is None:
            has = False
            continue
        value = array(gradient)
        total += float((value**2).sum())
        penalty = found.penalties.get(id(variable))
        rest = value if penalty is None else value - penalty
        size = 0.0 if penalty is None else float(np.abs(penalty).max(initial=0.0))
        if penalty is not None and np.abs(rest).max(initial=0.0) <= 1e-5 * size:
            rest = np.zeros(())
        zero = zero and not np.any(rest)
    return {"gradient_norm": float(np.sqrt(total)), "has_gradient": has, "has_zero_gradient": zero}


def _of_update(node: Node, norms: dict[int, tuple[float, float]]) -> dict[str, Any]:
    changed = [norms[id(v)] for v in own_weights(node) if id(v) in norms]
    size = sum(weight for _, weight in changed)
    return {"update_ratio": float(np.sqrt(sum(change for change, _ in changed) / size))} if size > 0 else {}
