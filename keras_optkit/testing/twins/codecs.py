"""What state is after it was stored in fewer bits, in plain NumPy; see `keras_optkit.optimizers.engine.codecs`."""

from __future__ import annotations

import itertools

import numpy as np


def code_book(*, signed: bool) -> np.ndarray:
    """The figures of arXiv 2110.02861, section 2.2, as bitsandbytes makes them.

    A leading 1 after n zeros stands for the exponent -n of 10, and the bits behind it for one of equal parts of
    [0.1, 1]; the middle of the part is meant. Two codes are 0 and 1.
    """
    found = [0.0, 1.0]
    for zeros in range(7):
        ends = np.linspace(0.1, 1, 2 ** (6 - zeros + (not signed)) + 1)
        middles = [10.0**-zeros * (a + b) / 2 for a, b in itertools.pairwise(ends)]
        found += [*middles, *([-m for m in middles] if signed else [])]
    return np.array(sorted(found))


def quantised(x: np.ndarray, *, signed: bool) -> np.ndarray:
    """A parameter's slot in 8 bits: blocks of 256 elements, relative to that of the largest magnitude."""
    figures, flat = code_book(signed=signed), np.ravel(x).astype("float32")
    if not signed:
        flat = np.maximum(flat, 0)
    parts = []
    for block in (flat[start : start + 256] for start in range(0, len(flat), 256)):
        scale = block.min() if -block.min() > block.max() else block.max()
        if not np.all(np.isfinite(block)):
            parts.append(np.full_like(block, np.nan))
            continue
        y = block / scale if scale else np.zeros_like(block)
        code = np.argmin(np.abs(y[:, None] - figures), axis=1)
        if not signed:
            code = np.where(y > 0, np.maximum(code, 1), code)
        parts.append(scale * figures[code])
    return np.reshape(np.concatenate([np.zeros(0), *parts]), np.shape(x)).astype("float32")


def corrected(x: np.ndarray) -> np.ndarray:
    """A float32 to 16 bits of precision instead of 24."""
    return _to_bits(x, 16)


def bfloat16(x: np.ndarray) -> np.ndarray:
    """A float32 to 8 bits of precision."""
    return _to_bits(x, 8)


def _to_bits(x: np.ndarray, bits: int) -> np.ndarray:
    x = np.asarray(x, "float32").astype("float64")
    _, exponent = np.frexp(x)
    step = np.exp2(np.maximum(exponent, -125) - float(bits))  # below the exponent -125 numbers are subnormal
    with np.errstate(over="ignore", invalid="ignore"):
        return np.where(np.isfinite(x), np.rint(x / step) * step, x).astype("float32")
