"""Wrappers that train the kernels of a layer in another form, and fold them into plain ones for inference."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import keras
from keras import ops

from keras_optkit import arguments, backend
from keras_optkit.kernels import (
    KERNEL,
    TABLE,
    KernelAxes,
    as_matrices,
    by_shape,
    from_matrices,
    is_state,
    matrix_shape,
    role,
)
from keras_optkit.precision import at_least_float32, mean
from keras_optkit.private import sublayers, without_autocast
from keras_optkit.registry import register
from keras_optkit.saving import FromSignature
from keras_optkit.space import Int

__all__ = ["SpectralNormalization", "WeightNormalization", "WeightStandardization"]

#: What the conformance suite wraps. Its name takes none of those that Keras counts up, and its kernel, of no special
#: form, is the same in every precision.
_KERNEL = [[1.0, 2.0, 0.0, -1.0], [0.0, 1.0, 0.5, 3.0], [1.0, -1.0, 2.0, 0.25], [0.0, 0.5, 1.0, 1.0]]
INNER: dict[str, Any] = {"name": "inner", "kernel_initializer": keras.initializers.Constant(_KERNEL)}

#: Of an embedding each row is a unit.
_ROWS = KernelAxes((1,), (0,))


@dataclass
class _Part:
    """A kernel, its axes, the dtype it is computed in, and the variables that belong to it."""

    kernel: Any
    axes: KernelAxes
    dtype: str
    extra: tuple[Any, ...] = ()


class _Scope(keras.StatelessScope):
    """A scope in which some variables have other values, and that keeps what is assigned to others.

    Variables that are not given, such as the states of a recurrent layer, have the values that they have outside of it.
    (The values are not given to Keras's constructor, which casts them to the dtype of autocasting.)
    """

    def __init__(self, given: list[tuple[Any, Any]]) -> None:
        super().__init__(collect_losses=True, initialize_variables=False)
        self.given = {id(variable) for variable, _ in given}
        self.updates: dict[int, tuple[Any, Any]] = {}
        for update in given:
            super().add_update(update)

    def add_update(self, update: tuple[Any, Any]) -> None:
        """Keeps the new value of a variable."""
        variable, _ = update
        if id(variable) in self.given:
            raise ValueError(f"layer must not assign its kernels in its call, but it did so with {variable.path!r}.")
        self.updates[id(variable)] = update
        super().add_update(update)

    def get_current_value(self, variable: Any) -> Any:
        """The value in here, or that of the scope around."""
        value = super().get_current_value(variable)
        outer = self.original_scope
        return outer.get_current_value(variable) if value is None and outer is not None else value


class KernelWrapper(FromSignature, keras.layers.Wrapper):
    """A layer that is called with kernels that are functions of its kernel variables.

    The wrapped layer is called in a scope in which its kernels have other values.
    """

    #: Whether the rows of embeddings are brought into the form, too.
    _tables = True

    def __init__(self, layer: Any, **kwargs: Any) -> None:
        if not isinstance(layer, keras.Layer):
            raise TypeError(f"layer must be a keras.Layer with kernels, got {layer!r} of type {type(layer).__name__}.")
        if isinstance(layer, keras.Model):
            raise TypeError(f"layer must not be a model, got {layer!r}; wrap its layers.")
        if isinstance(layer, KernelWrapper):
            raise TypeError(f"layer must not be wrapped in this way already, got {layer!r}.")
        kwargs.setdefault("dtype", layer.dtype_policy)
        super().__init__(layer, **kwargs)
        if self.dtype_policy.name != layer.dtype_policy.name:
            raise ValueError(
                f"dtype must be that of the layer, {layer.dtype_policy.name!r}, which is the default, "
                f"got {self.dtype_policy.name!r}."
            )
        self.supports_masking = layer.supports_masking
        self._parts: list[_Part] = []

    def build(self, input_shape: Any = None) -> None:
        """Builds the layer, finds its kernels, and makes what else is trained."""
        needed = inspect.signature(self.layer.build).parameters.values()
        if not self.layer.built and sum(each.default is each.empty for each in needed) > 1:
            raise ValueError(f"layer must be built if it has several inputs, got {self.layer!r}; call it first.")
        super().build(input_shape)
        self._parts = []
        for inside in (self.layer, *sublayers(self.layer)):
            if getattr(inside, "lora_enabled", False):
                raise ValueError(f"layer must not have LoRA enabled, got {inside!r}.")
            self._parts += self._found(inside)
        if not self._parts:
            raise ValueError(f"layer must have kernels{' or embeddings' * self._tables}, got {self.layer!r}.")
        for index, part in enumerate(self._parts):
            part.extra = self._extra(part, f"_{index}" if index else "")
            if part.kernel.regularizer is not None:
                part.kernel.regularizer = _OfForm(self, part, part.kernel.regularizer)

    def _found(self, layer: Any) -> list[_Part]:
        """The kernels of a layer itself."""
        below = {id(variable) for child in sublayers(layer) for variable in child.variables}
        found = []
        for variable in layer.weights:
            kind, axes = role(variable, layer)
            wanted = kind == KERNEL or (kind == TABLE and self._tables)
            if id(variable) in below or not wanted or is_state(variable, layer):
                continue
            if variable.constraint is not None:
                raise ValueError(
                    f"layer must have no constraint on its kernels, which would act on the variable that is trained "
                    f"and not on the kernel that is used, got {variable.constraint!r} on {variable.path!r}."
                )
            axes = _ROWS if kind == TABLE else axes or by_shape(len(variable.shape))
            # (the dtype of the variable itself is that of an outer layer's autocasting, where there is any)
            found.append(_Part(variable, axes, at_least_float32(layer.variable_dtype)))
        return found

    def compute_output_spec(self, inputs: Any, *args: Any, training: bool = False, **kwargs: Any) -> Any:  # noqa: ARG002
        """That of the layer, which may have several inputs."""
        return self.layer.compute_output_spec(inputs, *args, **kwargs)

    def compute_output_shape(self, *args: Any, **kwargs: Any) -> Any:
        """That of the layer."""
        return self.layer.compute_output_shape(*args, **kwargs)

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> Any:
        """That of the layer."""
        return self.layer.compute_mask(inputs, previous_mask)

    def call(self, inputs: Any, *args: Any, training: bool = False, **kwargs: Any) -> Any:
        """Calls the layer with the kernels in the other form."""
        known = {id(variable) for variable in self.layer.variables}
        if not all(id(part.kernel) in known for part in self._parts):
            raise ValueError(f"The kernels of {self.layer!r} have been replaced, by `quantize` perhaps; fold() first.")
        # in float32 whatever the layer computes in, and with state that moves only once there is a batch
        with without_autocast(), backend.after(keras.tree.flatten(inputs)[0]):
            kernels = [(part.kernel, self._plain(part, part.kernel.value, bool(training))) for part in self._parts]
        with _Scope(kernels) as scope:
            outputs = self.layer(inputs, *args, **kwargs)
        for variable, value in scope.updates.values():
            variable.assign(value)
        for loss in scope.losses:  # those of activities; the penalties of weights Keras reads off the variables
            if scope.original_scope is None:
                self.add_loss(loss)
            elif scope.original_scope.collect_losses:  # the layers know their losses in there by identity
                scope.original_scope.add_loss(loss)
        return outputs

    def fold(self) -> Any:
        """The layer with plain kernels, for inference: a new one of the wrapped layer's class, config and name.

        Returns:
            A built layer with the outputs of this one at inference, which does not depend on this one.

        Raises:
            ValueError: The layer is not built yet.
        """
        if not self.built:
            raise ValueError("fold() needs a layer that is built: call it on data, or build it, first.")
        plain = type(self.layer).from_config(self.layer.get_config())
        plain.build_from_config(self.layer.get_build_config() or self.get_build_config())
        formed = {id(part.kernel): self._plain(part, part.kernel.value, False) for part in self._parts}
        for new, old in zip(_all_variables(plain), _all_variables(self.layer), strict=True):
            new.assign(formed.get(id(old), old.value))
        return plain

    def _plain(self, part: _Part, kernel: Any, training: bool) -> Any:
        """The form of the value of a kernel variable, in its dtype."""
        return ops.cast(self._formed(part, ops.cast(kernel, part.dtype), training), kernel.dtype)

    def _extra(self, part: _Part, suffix: str) -> tuple[Any, ...]:  # noqa: ARG002  (for subclasses)
        """Makes the variables that belong to a kernel."""
        return ()

    def _per_unit(self, part: _Part, name: str, initializer: Any) -> Any:
        """A variable with an element for each unit of a kernel, or each channel of a depthwise one."""
        shape = tuple(1 if axis in part.axes.inputs else size for axis, size in enumerate(part.kernel.shape))
        return self.add_weight(name=name, shape=shape, initializer=initializer)

    def _formed(self, part: _Part, v: Any, training: bool) -> Any:
        """The form of a kernel variable's value `v`, which is in float32 at least."""
        raise NotImplementedError


def _all_variables(layer: Any) -> list[Any]:
    """The variables of a layer, and the states of those that are recurrent, which Keras does not count among them."""
    states = [getattr(inside, "states", None) for inside in (layer, *sublayers(layer))]
    return [*layer.variables, *(state for state in keras.tree.flatten(states) if isinstance(state, keras.Variable))]


class _OfForm(keras.regularizers.Regularizer):
    """A regularizer of a kernel variable that penalises the kernel which is used instead."""

    def __init__(self, wrapper: KernelWrapper, part: _Part, regularizer: Any) -> None:
        self.wrapper, self.part, self.regularizer = wrapper, part, regularizer

    def __call__(self, x: Any) -> Any:
        with without_autocast():
            value = x.value if isinstance(x, keras.Variable) else ops.convert_to_tensor(x)
            return self.regularizer(self.wrapper._plain(self.part, value, False))


def _cases(*more: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    return tuple({"layer": keras.layers.Dense(4, **INNER), **case} for case in more)


@register(
    "layer", paper="1602.07868", parity="torch.nn.utils.parametrizations.weight_norm", tags=("folds",), cases=_cases({})
)
class WeightNormalization(KernelWrapper):
    """Trains the direction and the length of each unit's weights separately.

    w = g v / ‖v‖, with one length g for each unit (each output, channel of a depthwise kernel, row of an embedding),
    and the norm of v over the unit's inputs. v is the wrapped layer's kernel variable, g a new variable that starts at
    ‖v‖, so that the layer starts as it was initialised. All kernels inside the layer are normalised, those of gates and
    attention, too. A unit whose v is zero stays zero. The norm is computed in float32 at least.

    Shapes: those of the layer.

    When not to use it: with batch normalisation, which makes g redundant; on large embeddings, all rows of which are
    normalised in each step.

    Args:
        layer: Any layer with kernels: dense, convolution, recurrent, attention, embedding. Its `kernel` becomes v. A
            regularizer of the kernel penalises w.
        **kwargs: `name` and so on, as for every Keras layer. The dtype policy is that of the layer.

    Raises:
        TypeError: `layer` is not a layer, or is a model or wrapped in this way already.
        ValueError: `layer` has no kernels, or has a constraint or LoRA on one; `dtype` is not that of the layer.

    Source: Salimans and Kingma 2016, arXiv 1602.07868, equation 2.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    layer = ok.layers.WeightNormalization(keras.layers.Dense(3))
    x = keras.ops.ones((2, 4))
    y = layer(x)
    assert float(keras.ops.max(keras.ops.abs(layer.fold()(x) - y))) == 0.0
    ```
    """

    def _extra(self, part: _Part, suffix: str) -> tuple[Any, ...]:
        def start(shape: Any, dtype: Any) -> Any:
            with without_autocast():
                lengths = _norm(ops.cast(part.kernel.value, part.dtype), part.axes)
            return ops.cast(ops.reshape(lengths, shape), dtype)

        return (self._per_unit(part, f"gamma{suffix}", start),)

    def _formed(self, part: _Part, v: Any, training: bool) -> Any:  # noqa: ARG002
        (g,) = part.extra
        return ops.cast(g.value, part.dtype) * (v / _norm(v, part.axes))


def _norm(v: Any, axes: KernelAxes) -> Any:
    """The length of each unit's weights; 1 where all are zero, which then stay zero and get a finite gradient."""
    squares = ops.sum(ops.square(v), axes.inputs, keepdims=True)
    return ops.sqrt(ops.where(squares > 0, squares, ops.ones_like(squares)))


@register(
    "layer",
    paper="1903.10520; 2101.08692",
    parity="torch.nn.functional.batch_norm of the weights, as in timm.layers.StdConv2d and ScaledStdConv2d",
    tags=("folds",),
    cases=_cases({}, {"scaled": True, "gain": 1.7}),
)
class WeightStandardization(KernelWrapper):
    """Standardises the weights of each unit to mean 0 and variance 1, or 1 / fan-in.

    w = (v - μ) / sqrt(σ² + ε), with the mean and the (biased) variance of v over the unit's inputs. With `scaled` it is
    for networks without normalisation: w = g γ (v - μ) / sqrt(N (σ² + ε)), with the fan-in N, a learned g for each unit
    that starts at 1, and the `gain` γ of the activation. v is the wrapped layer's kernel variable. It is computed in
    float32 at least.

    Shapes: those of the layer.

    When not to use it: unscaled, without a normalisation after the layer (group normalisation, say), which divides by
    the scale of sqrt(N) that it adds; on the last layer.

    Args:
        layer: Any layer with kernels: dense, convolution, recurrent, attention. Its `kernel` becomes v. A regularizer
            of the kernel penalises w.
        scaled: Whether to divide by sqrt(N) and to learn g.
        gain: γ, above 0, with `scaled` only: 1 for a linear unit, sqrt(2 / (1 - 1 / π)) = 1.7128 for ReLU.
        epsilon: ε, above 0.
        **kwargs: `name` and so on, as for every Keras layer. The dtype policy is that of the layer.

    Raises:
        TypeError: `layer` is not a layer, or is a model or wrapped in this way already; an argument is of another type.
        ValueError: `layer` has no kernels, one with a single input for each unit, or a constraint or LoRA on one;
            `gain` or `epsilon` is not above 0, or there is a gain without `scaled`; `dtype` is not that of the layer.

    Source: Qiao et al. 2019, arXiv 1903.10520; scaled: Brock, De and Smith 2021, arXiv 2101.08692. ε is under the root,
    as in timm.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    layer = ok.layers.WeightStandardization(keras.layers.Conv2D(8, 3), scaled=True, gain=1.7128)
    y = layer(keras.ops.ones((2, 5, 5, 3)))
    assert layer.fold()(keras.ops.ones((2, 5, 5, 3))).shape == (2, 3, 3, 8)
    ```
    """

    _tables = False

    def __init__(
        self, layer: Any, scaled: bool = False, gain: float = 1.0, epsilon: float = 1e-6, **kwargs: Any
    ) -> None:
        super().__init__(layer, **kwargs)
        self.scaled = arguments.boolean("scaled", scaled)
        self.gain = arguments.real("gain", gain, 0, closed="neither")
        self.epsilon = arguments.real("epsilon", epsilon, 0, closed="neither")
        if not scaled and gain != 1:
            raise ValueError(f"gain must be 1 unless scaled=True, got {gain!r}.")

    def _fan_in(self, part: _Part) -> int:
        return part.axes.fans(tuple(part.kernel.shape))[0]

    def _extra(self, part: _Part, suffix: str) -> tuple[Any, ...]:
        if self._fan_in(part) < 2:
            raise ValueError(
                f"layer must have kernels with more than one input for each unit, since standardised ones are zero "
                f"otherwise, got {part.kernel.path!r} of shape {tuple(part.kernel.shape)}."
            )
        return (self._per_unit(part, f"gamma{suffix}", "ones"),) if self.scaled else ()

    def _formed(self, part: _Part, v: Any, training: bool) -> Any:  # noqa: ARG002
        axes = part.axes.inputs
        centred = v - mean(v, axes, keepdims=True)
        formed = centred / ops.sqrt(mean(ops.square(centred), axes, keepdims=True) + self.epsilon)
        if not self.scaled:
            return formed
        (g,) = part.extra
        return formed * ops.cast(g.value, part.dtype) * (self.gain * self._fan_in(part) ** -0.5)


@register(
    "layer",
    paper="1802.05957",
    parity="torch.nn.utils.parametrizations.spectral_norm",
    tags=("folds",),
    cases=_cases({"seed": 1}, {"seed": 1, "power_iterations": 2}),
    space={"power_iterations": Int(1, 3)},
)
class SpectralNormalization(KernelWrapper):
    """Divides each kernel by its largest singular value, so that the layer is 1-Lipschitz or close to it.

    With W the transposed kernel as a matrix (outputs by inputs, with the window), each call in training does, n times,
    b ← Wᵀ a / ‖Wᵀ a‖ and a ← W b / ‖W b‖, and uses W / σ with σ = aᵀ W b. Gradients pass through σ, and not through a
    and b (equation 12). Inference uses σ with the a and b of the last call in training; they start random, with 15
    iterations. Each map of a grouped or depthwise kernel, each gate of a recurrent one, is a matrix of its own. A
    kernel of zeros is left as it is. It is computed in float32 at least. (a and b are the paper's ũ and ṽ.)

    The wrapped layer's kernel variable holds W and is trained as it is, whereas `keras.layers.SpectralNormalization`
    overwrites it in each step with W / σ, so that it is not W that the optimizer trains.

    Shapes: those of the layer.

    When not to use it: where the layer must be able to amplify, as most layers before a softmax; for an exact bound,
    since σ is an estimate, and the norm of a convolution may be larger than that of its kernel as a matrix.

    Args:
        layer: Any layer with kernels: dense, convolution, recurrent, attention, embedding. A regularizer of the kernel
            penalises W / σ.
        power_iterations: The number n of iterations in each call in training, at least 1. With several calls in a
            training step, each does so.
        seed: An int makes the first a repeatable.
        **kwargs: `name` and so on, as for every Keras layer. The dtype policy is that of the layer.

    Raises:
        TypeError: `layer` is not a layer, or is a model or wrapped in this way already; an argument is of another type.
        ValueError: `layer` has no kernels, or has a constraint or LoRA on one; `power_iterations` is below 1; `dtype`
            is not that of the layer.

    Source: Miyato et al. 2018, arXiv 1802.05957, algorithm 1.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    layer = ok.layers.SpectralNormalization(keras.layers.Dense(3), power_iterations=30, seed=1)
    layer(keras.ops.ones((2, 4)), training=True)
    norm = keras.ops.linalg.norm(layer.fold().kernel, ord=2)
    assert abs(float(norm) - 1.0) < 1e-3
    ```
    """

    def __init__(self, layer: Any, power_iterations: int = 1, seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(layer, **kwargs)
        self.power_iterations = arguments.integer("power_iterations", power_iterations, 1)
        self.seed = arguments.seed("seed", seed)

    def _extra(self, part: _Part, suffix: str) -> tuple[Any, ...]:
        count, rows, columns = matrix_shape(tuple(part.kernel.shape), part.axes)

        def matrices() -> Any:
            return _matrices(ops.cast(part.kernel.value, part.dtype), part.axes)

        def first(shape: Any, dtype: Any) -> Any:
            """A after 15 iterations from a random vector."""
            with without_autocast():
                a = keras.random.normal(shape, dtype=part.dtype, seed=self.seed)
                a, _ = _iterate(matrices(), a, ops.zeros((count, rows, 1), part.dtype), 15)
                return ops.cast(a, dtype)

        def second(shape: Any, dtype: Any) -> Any:
            """The b that belongs to a."""
            with without_autocast():
                b = _unit(ops.matmul(matrices(), ops.cast(outputs.value, part.dtype)), ops.zeros(shape, part.dtype))
                return ops.cast(b, dtype)

        kept: dict[str, Any] = {"trainable": False, "aggregation": "only_first_replica"}
        outputs = self.add_weight(name=f"outputs{suffix}", shape=(count, columns, 1), initializer=first, **kept)
        inputs = self.add_weight(name=f"inputs{suffix}", shape=(count, rows, 1), initializer=second, **kept)
        return outputs, inputs

    def _formed(self, part: _Part, v: Any, training: bool) -> Any:
        matrices = _matrices(v, part.axes)
        a, b = (ops.cast(vector.value, part.dtype) for vector in part.extra)
        if training and self.trainable:
            a, b = _iterate(ops.stop_gradient(matrices), a, b, self.power_iterations)
            for variable, value in zip(part.extra, (a, b), strict=True):
                variable.assign(value)
        sigma = ops.sum(b * ops.matmul(matrices, a), (1, 2), keepdims=True)
        normed = matrices / ops.where(sigma == 0, ops.ones_like(sigma), sigma)
        return from_matrices(normed, (1, *v.shape), part.axes)[0]


def _matrices(kernel: Any, axes: KernelAxes) -> Any:
    return as_matrices(ops.expand_dims(kernel, 0), axes)


def _iterate(matrices: Any, a: Any, b: Any, count: int) -> tuple[Any, Any]:
    """Power iterations with matrices from inputs to outputs, which are the paper's Wᵀ."""
    for _ in range(count):
        b = _unit(ops.matmul(matrices, a), b)
        a = _unit(ops.matmul(ops.transpose(matrices, (0, 2, 1)), b), a)
    return ops.stop_gradient(a), ops.stop_gradient(b)


def _unit(x: Any, otherwise: Any) -> Any:
    """Vectors divided by their lengths; those of length zero as they were, since from zero no iteration comes back."""
    squares = ops.sum(ops.square(x), 1, keepdims=True)
    return ops.where(squares > 0, x / ops.sqrt(ops.where(squares > 0, squares, ops.ones_like(squares))), otherwise)
