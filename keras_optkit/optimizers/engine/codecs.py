"""Slots that are stored in fewer bits than they are computed in: a *codec* is the tensors that hold a slot.

A codec is a tuple of stored tensors, so that what walks through the state, reads, assigns, places or compares it needs
to know nothing of it. Only where slots are made, widened for an update, narrowed after it, and written to files, they
are encoded and decoded. Files hold decoded values: encoding them again gives the same bits, which the engine relies on
for exact continuation and for parameters without a gradient, too.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_optkit.optimizers.engine.packing import Bucket

Tensor = Any

#: So many elements, one after the other in a parameter, have one scale.
BLOCK = 256

#: Parameters with fewer elements than this are not quantised.
QUANTISED_FROM = 4096

#: The exponents of 10 of a code book: figures of the smallest have 0 bits of fraction (1 if unsigned), and so on.
_DECADES = range(-6, 1)

#: Scales beyond this or below its inverse have no inverse in float32, by which XLA multiplies instead of dividing.
_LARGEST = 2.0**126

#: Into how many parts the distance of two figures of a code book is divided for rounding at random. A value that was
#: decoded is off by up to 1e-5 of it, and has to stay what it is.
_PARTS = 2**14


class Corrected(NamedTuple):
    """A float32 rounded to 24 bits: a bfloat16, and what is missing in units of 1/256 of its last bit.

    It has the exponent of float32 and a precision of 16 bits instead of 24; bfloat16 has 8. All arithmetic is on the
    bits, so that it is exact.
    """

    upper: Tensor
    lower: Tensor

    @staticmethod
    def dtypes() -> tuple[str, str]:
        """Those of the two parts."""
        return "bfloat16", "int8"

    @staticmethod
    def bytes_of(size: int) -> int:
        """The bytes of a slot of so many elements."""
        return 3 * size

    @classmethod
    def encode(cls, bucket: Bucket, x: Tensor, noise: Tensor | None = None) -> Corrected:
        """The stored form of a slot.

        Args:
            bucket: Where it is.
            x: It, in the form of the one tensor.
            noise: Random bits of the same shape, to round at random; None to round to the nearest.
        """
        x = ops.cast(x, "float32")
        bits = ops.where(ops.isnan(x), 0x7FC00000, ops.view(x, "int32"))
        even = 0x7F + ops.bitwise_and(ops.right_shift(bits, 8), 1)
        kept = ops.right_shift(bits + (even if noise is None else ops.bitwise_and(noise, 0xFF)), 8)
        upper = ops.right_shift(kept + 0x80, 8)
        lower = ops.cast(kept - ops.left_shift(upper, 8), "int8")
        return cls(bucket.stored(ops.view(ops.cast(upper, "int16"), "bfloat16")), bucket.stored(lower))

    def decode(self, bucket: Bucket) -> Tensor:
        """The slot in float32, in the form of the one tensor."""
        upper, lower = (bucket.view(ops.cast(part, dtype)) for part, dtype in zip(self, self.dtypes(), strict=True))
        kept = ops.left_shift(ops.cast(ops.view(upper, "int16"), "int32"), 8) + ops.cast(lower, "int32")
        return ops.view(ops.left_shift(kept, 8), "float32")


class Signed(NamedTuple):
    """Blocks of 256 elements as 8-bit figures of a code book times the block's element of the largest magnitude.

    Dettmers, Lewis, Shleifer and Zettlemoyer, "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861, with
    their dynamic tree quantisation. The code book is that of bitsandbytes. Different are:

    - The scale has the sign of the largest element, which is then exact. In the book there is a 1 and no -1, so that
      with an unsigned scale a negative one would shrink by 0.7 % whenever it is encoded, and the block with it.
    - Of slots that are not negative (`Unsigned`) an element above 0 never becomes 0, as a moment that is divided by.

    Blocks are those of one parameter: no scale depends on how parameters are packed.
    """

    codes: Tensor
    scales: Tensor

    @staticmethod
    def dtypes() -> tuple[str, str]:
        """Those of the two parts."""
        return "uint8", "float32"

    @staticmethod
    def is_signed() -> bool:
        """Whether elements may be negative."""
        return True

    @staticmethod
    def bytes_of(size: int) -> int:
        """The bytes of a slot of so many elements."""
        return size + 4 * math.ceil(size / BLOCK)

    @classmethod
    def encode(cls, bucket: Bucket, x: Tensor, noise: Tensor | None = None) -> Any:
        """As `Corrected.encode`. A block with a value that is not finite, or beyond 2^126, is NaN as a whole."""
        shape, x = tuple(x.shape), ops.cast(x, "float32")
        blocks = _in_blocks(x, len(bucket.shapes))
        high, low = ops.max(blocks, axis=-1, initial=0.0), ops.min(blocks, axis=-1, initial=0.0)
        scales = ops.where(-low > high, low, high) if cls.is_signed() else high
        divides = ops.abs(scales) >= 1 / _LARGEST
        scales = ops.where(divides, scales, 0.0)
        known = ops.all(ops.abs(blocks) <= _LARGEST, axis=-1)
        scales = ops.where(known, scales, float("nan"))
        divides = ops.expand_dims(ops.logical_and(known, divides), -1)
        y = blocks / ops.where(divides, ops.expand_dims(scales, -1), 1.0)
        if not cls.is_signed():  # the quotient of a number above 0 may underflow
            y = ops.where(blocks > 0, ops.maximum(y, 1 / _LARGEST), 0.0)
        y = _unblocked(ops.where(divides, y, 0.0), shape, len(bucket.shapes))
        codes = nearest(y, signed=cls.is_signed())
        if noise is not None:
            codes = _at_random(y, codes, noise, signed=cls.is_signed())
        stored = bucket.stacked_shape(tuple(scales.shape[1:]))
        return cls(bucket.stored(ops.cast(codes, "uint8")), ops.reshape(scales, stored))

    def decode(self, bucket: Bucket) -> Tensor:
        """The slot in float32, in the form of the one tensor."""
        codes = bucket.view(ops.convert_to_tensor(self.codes))
        count = len(bucket.shapes)
        blocks = _in_blocks(ops.take(book(signed=self.is_signed()), ops.cast(codes, "int32")), count)
        scales = ops.reshape(self.scales, (count, blocks.shape[1], 1))
        return _unblocked(blocks * scales, tuple(codes.shape), count)


class Unsigned(Signed):
    """The same for a slot that is never negative, with a book of figures that are not; what is below 0 becomes 0."""

    @staticmethod
    def is_signed() -> bool:
        return False


Codec = Corrected | Signed

#: By name, as the description of a state tree has them.
CODECS: dict[str, type[Codec]] = {codec.__name__: codec for codec in (Corrected, Signed, Unsigned)}


def _in_blocks(x: Tensor, count: int) -> Tensor:
    """`count` parameters as `(count, blocks, BLOCK)`, with zeros behind the last element of each."""
    size = math.prod(x.shape) // count
    x = ops.reshape(x, (count, size))
    if size % BLOCK:
        x = ops.pad(x, [(0, 0), (0, -size % BLOCK)])
    return ops.reshape(x, (count, math.ceil(size / BLOCK), BLOCK))


def _unblocked(blocks: Tensor, shape: tuple[int, ...], count: int) -> Tensor:
    """The inverse of `_in_blocks`."""
    size = math.prod(shape) // count
    x = ops.reshape(blocks, (count, math.prod(blocks.shape[1:])))
    return ops.reshape(x if size == x.shape[1] else x[:, :size], shape)


@functools.cache
def _figures(signed: bool) -> tuple[tuple[float, ...], ...]:
    """The figures above 0 and below 1 of each decade: the middles of equal parts of [0.1, 1], times a power of 10."""
    counts = [2 ** (i if signed else i + 1) for i in range(len(_DECADES))]
    return tuple(
        tuple(10.0**decade * (0.1 + 0.9 * (k + 0.5) / n) for k in range(n))
        for decade, n in zip(_DECADES, counts, strict=True)
    )


@functools.cache
def book(*, signed: bool) -> np.ndarray:
    """The 256 figures in increasing order."""
    above = [figure for decade in _figures(signed) for figure in decade]
    below = [-figure for figure in reversed(above)] if signed else []
    return np.array([*below, 0.0, *above, 1.0], "float32")


def nearest(y: Tensor, *, signed: bool) -> Tensor:
    """The places in the book of the figures that are nearest to `y` in [-1, 1], as float32.

    Computed for each decade from its equal parts, and from where the decades meet: looking elements up takes longer.
    """
    size = ops.abs(y) if signed else y
    code, first, before = ops.zeros_like(y), 1, 0.0
    for decade, figures in zip(_DECADES, _figures(signed), strict=True):
        n = len(figures)
        part = ops.floor((size * 10.0**-decade - 0.1) * (n / 0.9))
        # a moment is divided by: above 0 it does not become 0
        begin = 0.0 if before == 0 and not signed else (before + figures[0]) / 2
        code = ops.where(size > begin, first + ops.clip(part, 0, n - 1), code)
        first, before = first + n, figures[-1]
    code = ops.where(size > (before + 1) / 2, float(first), code)
    zero = 2 ** len(_DECADES) - 1
    return ops.where(y < 0, zero - ops.minimum(code, zero), zero + code) if signed else code


def _at_random(y: Tensor, codes: Tensor, noise: Tensor, *, signed: bool) -> Tensor:
    """Instead of the nearest figures sometimes those on the other side of `y`, so that they are `y` on average."""
    figures, at = book(signed=signed), ops.cast(codes, "int32")
    other = ops.clip(at + ops.where(y > ops.take(figures, at), 1, -1), 0, len(figures) - 1)
    here, there = ops.take(figures, at), ops.take(figures, other)
    share = ops.divide_no_nan(y - here, there - here)
    moves = ops.bitwise_and(noise, _PARTS - 1) < ops.cast(ops.round(share * _PARTS), "int32")
    found = ops.where(moves, ops.cast(other, codes.dtype), codes)
    return found if signed else ops.where(y > 0, ops.maximum(found, 1.0), found)
