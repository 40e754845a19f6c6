"""Checks for initializers.

A card of kind "initializer" builds a `keras.initializers.Initializer` with a `seed` argument. Its tags are its claims:

- "variance": `twin(fan_in, fan_out, **case)` is the standard deviation of its values in a kernel with those fans;
- "orthogonal": the kernel's matrix has orthogonal rows or columns of length `twin(**case)`;
- "centered": the kernel is zero but in the middle of its window, and what is claimed of a matrix is claimed of that;
- "exact": that matrix, for each map, is `twin(inputs, outputs, **case)`;
- "sparse": `twin(fan_in, **case)` is how many weights of a unit are not zero, and their standard deviation;

or say what it is: "deterministic", without a `seed`; "wraps", another initializer in its argument `initializer`, which
has the seed; "bias", for vectors; "constant", which may give the same value everywhere.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import layers, ops

from keras_optkit.registry import Card
from keras_optkit.testing import roundtrip
from keras_optkit.testing.conformance import check
from keras_optkit.testing.tools import float64, numbers, refuses


class Kernel(NamedTuple):
    """A real layer's kernel: how it is made, its fans, counted by hand, and the matrices it holds."""

    layer: Callable[[Any], Any]
    shapes: tuple[tuple[int | None, ...], ...]
    fan_in: int
    fan_out: int
    matrices: Callable[[np.ndarray], np.ndarray]
    variable: Callable[[Any], Any] = lambda layer: layer.kernel
    window: tuple[int, ...] = ()
    outputs_first: bool = False

    def values(self, initializer: Any) -> np.ndarray:
        """The kernel of a new layer with this initializer, in float64."""
        layer = self.layer(initializer)
        layer.build(*self.shapes)
        return np.asarray(ops.convert_to_numpy(self.variable(layer)), "float64")

    def units(self, kernel: np.ndarray) -> np.ndarray:
        """Its maps as matrices from a unit's inputs to units: (maps, window * in, out)."""
        return np.swapaxes(kernel, -1, -2).reshape(1, self.fan_in, -1) if self.outputs_first else self.matrices(kernel)

    def middle(self, kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The matrices in the middle of the window, (maps, in, out), and everything else."""
        units = self.units(kernel)
        windows = units.reshape(len(units), *self.window, -1, units.shape[-1])
        place: tuple[Any, ...] = (slice(None), *((size - 1) // 2 for size in self.window))
        middle, rest = windows[place].copy(), windows.copy()
        rest[place] = 0
        return middle, rest


def _flat(rows: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda k: k.reshape(1, rows, -1)


def _by_channel(k: np.ndarray) -> np.ndarray:
    """(*window, channels, multiplier) -> (channels, window, multiplier)."""
    channels = np.moveaxis(k, -2, 0)
    return channels.reshape(len(channels), -1, k.shape[-1])


def _by_gate(gates: int) -> Callable[[np.ndarray], np.ndarray]:
    """(*window, in, gates * units) -> (gates, window * in, units)."""
    return lambda k: np.moveaxis(k.reshape(math.prod(k.shape[:-1]), gates, -1), 1, 0)


# One unit of a depthwise layer sees one channel's window; an input of a grouped one feeds only its group's outputs.
KERNELS: dict[str, Kernel] = {
    "Dense": Kernel(lambda i: layers.Dense(200, kernel_initializer=i), ((None, 300),), 300, 200, _flat(300)),
    "Conv1D": Kernel(
        lambda i: layers.Conv1D(128, 5, kernel_initializer=i), ((None, 9, 64),), 320, 640, _flat(320), window=(5,)
    ),
    "Conv2D": Kernel(
        lambda i: layers.Conv2D(96, 3, kernel_initializer=i), ((None, 9, 9, 48),), 432, 864, _flat(432), window=(3, 3)
    ),
    "Conv3D": Kernel(
        lambda i: layers.Conv3D(64, 3, kernel_initializer=i),
        ((None, 9, 9, 9, 24),),
        648,
        1728,
        _flat(648),
        window=(3, 3, 3),
    ),
    "Conv2D, 4 groups": Kernel(
        lambda i: layers.Conv2D(192, 3, groups=4, kernel_initializer=i),
        ((None, 9, 9, 96),),
        9 * 24,
        9 * 48,
        lambda k: np.moveaxis(k.reshape(9 * 24, 4, 48), 1, 0),
        window=(3, 3),
    ),
    "Conv1DTranspose": Kernel(
        lambda i: layers.Conv1DTranspose(128, 5, kernel_initializer=i),
        ((None, 9, 64),),
        320,
        640,
        _flat(640),
        window=(5,),
        outputs_first=True,
    ),
    "Conv2DTranspose": Kernel(
        lambda i: layers.Conv2DTranspose(96, 3, kernel_initializer=i),
        ((None, 9, 9, 48),),
        432,
        864,
        _flat(864),
        window=(3, 3),
        outputs_first=True,
    ),
    "DepthwiseConv1D": Kernel(
        lambda i: layers.DepthwiseConv1D(9, depth_multiplier=4, depthwise_initializer=i),
        ((None, 9, 1200),),
        9,
        36,
        _by_channel,
        window=(9,),
    ),
    "DepthwiseConv2D": Kernel(
        lambda i: layers.DepthwiseConv2D(3, depth_multiplier=4, depthwise_initializer=i),
        ((None, 9, 9, 1200),),
        9,
        36,
        _by_channel,
        window=(3, 3),
    ),
    "SeparableConv2D, depthwise": Kernel(
        lambda i: layers.SeparableConv2D(8, 3, depth_multiplier=4, depthwise_initializer=i),
        ((None, 9, 9, 1200),),
        9,
        36,
        _by_channel,
        lambda layer: layer.depthwise_kernel,
        window=(3, 3),
    ),
    "SeparableConv2D, pointwise": Kernel(
        lambda i: layers.SeparableConv2D(128, 3, depth_multiplier=4, pointwise_initializer=i),
        ((None, 9, 9, 100),),
        400,
        128,
        _flat(400),
        lambda layer: layer.pointwise_kernel,
    ),
    "LSTM, kernel": Kernel(
        lambda i: layers.LSTM(60, kernel_initializer=i),
        ((None, 9, 150),),
        150,
        60,
        _by_gate(4),
        lambda layer: layer.cell.kernel,
    ),
    "GRU, recurrent kernel": Kernel(
        lambda i: layers.GRU(100, recurrent_initializer=i),
        ((None, 9, 7),),
        100,
        100,
        _by_gate(3),
        lambda layer: layer.cell.recurrent_kernel,
    ),
    "ConvLSTM2D, recurrent kernel": Kernel(
        lambda i: layers.ConvLSTM2D(32, 3, recurrent_initializer=i),
        ((None, 5, 9, 9, 2),),
        9 * 32,
        9 * 32,
        _by_gate(4),
        lambda layer: layer.cell.recurrent_kernel,
        window=(3, 3),
    ),
    "Embedding": Kernel(
        lambda i: layers.Embedding(500, 100, embeddings_initializer=i),
        ((None, 9),),
        500,
        100,
        _flat(500),
        lambda layer: layer.embeddings,
    ),
    "EinsumDense, (out, in)": Kernel(
        lambda i: layers.EinsumDense("abc,dc->abd", output_shape=(None, 200), kernel_initializer=i),
        ((None, 9, 300),),
        300,
        200,
        _flat(200),
        outputs_first=True,
    ),
    "MultiHeadAttention, query": Kernel(
        lambda i: layers.MultiHeadAttention(8, 32, kernel_initializer=i),
        ((None, 9, 192),) * 2,
        192,
        8 * 32,
        _flat(192),
        lambda layer: layer.query_dense.kernel,
    ),
    "MultiHeadAttention, output": Kernel(
        lambda i: layers.MultiHeadAttention(8, 32, kernel_initializer=i),
        ((None, 9, 192),) * 2,
        8 * 32,
        192,
        _flat(256),
        lambda layer: layer.output_dense.kernel,
    ),
    "GroupQueryAttention, key": Kernel(
        lambda i: layers.GroupQueryAttention(32, 8, 2, kernel_initializer=i),
        ((None, 9, 600),) * 2,
        600,
        2 * 32,
        _flat(600),
        lambda layer: next(v for v in layer.variables if "/key/kernel" in v.path),
    ),
}


def _kernels() -> dict[str, Kernel]:
    """The kernels to draw. Their fans are the same on all backends, and JAX compiles each draw for its shape."""
    few = ("Dense", "Conv2D", "DepthwiseConv2D")
    return {name: KERNELS[name] for name in (KERNELS if keras.config.backend() == "tensorflow" else few)}


_DTYPES = ("float64", "float32", "bfloat16", "float16")


def _built(card: Card) -> Iterator[tuple[Mapping[str, Any], Any]]:
    return ((case, card.make(**case)) for case in card.cases)


def _seeded(card: Card, case: Mapping[str, Any], seed: int | None) -> Any:
    """The initializer of a case with a seed, its own or that of the one inside."""
    if "wraps" not in card.tags:
        return card.make(**{**case, "seed": seed})
    inner = case["initializer"]
    again = type(inner).from_config({**inner.get_config(), "seed": seed})
    return card.make(**{**case, "initializer": again})


def _shape(card: Card) -> tuple[int, ...]:
    return (5,) if "bias" in card.tags else (6, 5)


def _dense(card: Card, initializer: Any) -> Any:
    return layers.Dense(5, **{"bias_initializer" if "bias" in card.tags else "kernel_initializer": initializer})


def _held(card: Card, layer: Any) -> Any:
    return layer.bias_initializer if "bias" in card.tags else layer.kernel_initializer


@check("initializer")
@float64()
def check_dtype(card: Card) -> None:
    """It answers in the shape and dtype asked for, with finite values that are not all the same."""
    for case, initializer in _built(card):
        for dtype in _DTYPES:
            value = initializer(_shape(card), dtype=dtype)
            assert tuple(value.shape) == _shape(card)
            assert keras.backend.standardize_dtype(value.dtype) == dtype, f"{case}: {value.dtype} instead of {dtype}"
            assert np.isfinite(numbers(value)).all()
            assert np.ptp(numbers(value)) > 0 or "constant" in card.tags


@check("initializer", unless=["deterministic"])
def check_seed(card: Card) -> None:
    """An int seed repeats its values, in every call and instance; another seed, and no seed, gives others."""
    shape = _shape(card)
    for case in card.cases:
        seeded = _seeded(card, case, 3)
        values = numbers(seeded(shape))
        np.testing.assert_array_equal(numbers(seeded(shape)), values)
        np.testing.assert_array_equal(numbers(_seeded(card, case, 3)(shape)), values)
        assert (numbers(_seeded(card, case, 4)(shape)) != values).any(), "the seed makes no difference"


@check("initializer", unless=["deterministic"])
def check_fresh_without_seed(card: Card) -> None:
    """One instance without a seed gives two layers different weights."""
    for case in card.cases:
        shared = _seeded(card, case, None)
        one, two = (_dense(card, shared) for _ in range(2))
        one.build((None, 6))
        two.build((None, 6))
        differ = [(numbers(a) != numbers(b)).any() for a, b in zip(one.weights, two.weights, strict=True)]
        assert differ["bias" in card.tags], f"{case}: identical layers"


@check("initializer", requires=["deterministic"])
def check_deterministic(card: Card) -> None:
    """It gives the same values in every call and instance, and leaves Python's random numbers alone."""
    for case, initializer in _built(card):
        before = random.getstate()
        values = numbers(initializer(_shape(card)))
        assert random.getstate() == before, f"{case}: a random number was drawn"
        np.testing.assert_array_equal(numbers(initializer(_shape(card))), values, err_msg=str(case))
        np.testing.assert_array_equal(numbers(card.make(**case)(_shape(card))), values, err_msg=str(case))


@check("initializer")
def check_config_round_trip(card: Card) -> None:
    """Its config is JSON and rebuilds it, and its registered name builds it with the defaults."""
    for case, initializer in _built(card):
        roundtrip.through_json(initializer, case)
        roundtrip.assert_same(initializer.clone(), initializer)
    name = keras.saving.get_registered_name(type(initializer))
    assert type(_held(card, _dense(card, name))) is type(initializer)


@check("initializer")
def check_saving(card: Card) -> None:
    """A model that uses it is saved and loaded with it."""
    for case, initializer in _built(card):
        model = keras.Sequential([keras.Input((6,)), _dense(card, initializer)])
        again = roundtrip.through_file(model)
        roundtrip.assert_same(_held(card, again.layers[0]), initializer)
        for before, after in zip(model.get_weights(), again.get_weights(), strict=True):
            np.testing.assert_array_equal(after, before, err_msg=str(case))


@check("initializer")
def check_scalar_is_refused(card: Card) -> None:
    """A scalar has no distribution to claim: a shape of rank 0 is a ValueError that shows it."""
    for _, initializer in _built(card):
        refuses(initializer, "shape", (), "rank 1 or more")


@check("initializer", requires=["variance"])
def check_variance(card: Card) -> None:
    """In every real layer's kernel the variance is the one claimed for its true fans, within 5 standard errors.

    Every one on TensorFlow, and a few elsewhere.
    """
    assert card.twin is not None, 'the tag "variance" needs a twin'
    for case, initializer in _built(card):
        for name, kernel in _kernels().items():
            values = kernel.values(initializer)
            claimed = card.twin(kernel.fan_in, kernel.fan_out, **case) ** 2
            error = math.sqrt(2 / values.size)  # of a normal variance; a uniform or truncated one has less
            ratio = values.var() / claimed
            assert abs(ratio - 1) < 5 * error, f"{card.name}({case}) in {name}: {ratio:.3f} of the claimed variance"


@check("initializer", requires=["orthogonal"])
def check_orthogonal(card: Card) -> None:
    """Every real layer's kernel has orthogonal rows or columns, whichever are fewer, of the claimed length.

    Every one on TensorFlow, and a few elsewhere.
    """
    assert card.twin is not None, 'the tag "orthogonal" needs a twin'
    for case, initializer in _built(card):
        for name, kernel in _kernels().items():
            values = kernel.values(initializer)
            matrices = kernel.middle(values)[0] if "centered" in card.tags else kernel.matrices(values)
            if matrices.shape[1] > matrices.shape[2]:
                matrices = np.swapaxes(matrices, 1, 2)
            products = matrices @ np.swapaxes(matrices, 1, 2) / card.twin(**case) ** 2
            np.testing.assert_allclose(
                products,
                np.broadcast_to(np.eye(products.shape[1]), products.shape),
                atol=1e-5,
                err_msg=f"{card.name}({case}) in {name}",
            )


@check("initializer", requires=["centered"])
def check_centered(card: Card) -> None:
    """Every real layer's kernel is zero but in the middle of its window, where each map has a matrix that is not."""
    for case, initializer in _built(card):
        for name, kernel in _kernels().items():
            middle, rest = kernel.middle(kernel.values(initializer))
            assert not rest.any(), f"{card.name}({case}) in {name}: values outside of the middle"
            assert middle.any(axis=(1, 2)).all(), f"{card.name}({case}) in {name}: a map is zero"


@check("initializer", requires=["exact"])
def check_exact(card: Card) -> None:
    """In every real layer's kernel each map has the claimed matrix."""
    assert card.twin is not None, 'the tag "exact" needs a twin'
    for case, initializer in _built(card):
        for name, kernel in _kernels().items():
            middle, _ = kernel.middle(kernel.values(initializer))
            expected = np.broadcast_to(card.twin(*middle.shape[1:], **case), middle.shape)
            np.testing.assert_allclose(middle, expected, rtol=1e-6, err_msg=f"{card.name}({case}) in {name}")


@check("initializer", requires=["sparse"])
def check_sparse(card: Card) -> None:
    """In every real layer's kernel each unit has the claimed number of weights, of the claimed standard deviation."""
    assert card.twin is not None, 'the tag "sparse" needs a twin'
    for case, initializer in _built(card):
        for name, kernel in _kernels().items():
            units = kernel.units(kernel.values(initializer))
            count, stddev = card.twin(kernel.fan_in, **case)
            where = f"{card.name}({case}) in {name}"
            np.testing.assert_array_equal((units != 0).sum(axis=1), count, err_msg=where)
            weights = units[units != 0]
            ratio = float(np.mean(weights**2)) / stddev**2
            assert abs(ratio - 1) < 5 * math.sqrt(2 / weights.size), f"{where}: {ratio:.3f} of the claimed variance"
            chosen = (units != 0).sum(axis=(0, 2))  # how often each input is
            expected = weights.size / kernel.fan_in
            assert abs(chosen - expected).max() < 6 * math.sqrt(expected) + 10, f"{where}: some inputs are preferred"
