"""Runs optimizers against their references: `python -m keras_optkit.testing.parity [NAME...] [--markdown FILE]`."""

from __future__ import annotations

import argparse
import datetime
import sys
import time
import warnings
from pathlib import Path

import keras

from keras_optkit import files, tables
from keras_optkit.testing.parity.compare import STEPS, comparisons, installed
from keras_optkit.testing.parity.everything import REFERENCES
from keras_optkit.testing.parity.reference import Reference

PAGE = """# Parity

`python -m keras_optkit.testing.parity --markdown docs/parity.md` wrote this page, on {date}, with Keras {keras} on
{backend}, on the CPU.

Each optimizer and its reference are given the same weights and the same {steps} gradients: of a vector, of matrices
of both orientations, of the kernels of a 3x3 convolution, of attention and of an embedding, and of biases in one and
two axes. The scale of the gradients differs between parameters by up to three orders of magnitude. Halfway, the state
of our optimizer is saved and loaded into a new one. *Runs* counts the settings: each set of arguments, without and
with a weight decay of 0.1 where the reference decays as the paper does, in float32 and float64. The columns show the
largest difference between the weights after any step, relative to the largest element of the parameter, in all these
runs. It has to be below 1e-5 in float32 and 1e-9 in float64; the last column says where
it is not.

The references run in a process of their own, without TensorFlow. `keras_optkit/testing/parity/` has an entry for
each, which says how its arguments are translated. The test suite runs a share: the last setting of most of them in
float64, for 30 steps; not of `AdamMini`, `APOLLO`, `KLSOAP` and `Kron`, whose references the extra `parity` installs.
Three optimizers have no entry: of `ConditionalGradient`, TensorFlow Addons had the only other implementation, and those
of the authors of `Shampoo` and `EMANesterov` are in no package index. They were compared once: the NumPy twin of
`Shampoo`, and `EMANesterov` around AdamW with the loop that its authors' code makes (3e-15 after 100 steps in float64).

{table}"""
HEAD = ("optimizer", "reference", "steps", "runs", "float32", "float64", "deviations")


def line(reference: Reference, worst: dict[str, float], runs: int) -> tuple[str, ...]:
    """The cells of a reference's line."""
    errors = [f"{worst[dtype]:.1e}" if dtype in worst else "-" for dtype in ("float32", "float64")]
    notes = "; ".join(filter(None, (reference.only and f"only those of `{reference.only}`", reference.deviations)))
    return (reference.optimizer, installed(reference), str(STEPS), str(runs), *errors, notes)


def main() -> int:
    """Prints a line for each reference, and returns 1 if an error is above its tolerance."""
    parser = argparse.ArgumentParser(prog="python -m keras_optkit.testing.parity", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="names of optimizers; all when left out")
    parser.add_argument("--markdown", metavar="FILE", help="writes a page with the table to this file, too")
    chosen = parser.parse_args()
    unknown = set(chosen.names) - {reference.optimizer for reference in REFERENCES}
    if unknown:
        allowed = ", ".join(sorted({reference.optimizer for reference in REFERENCES}))
        parser.error(f"unknown names {sorted(unknown)}; allowed: {allowed}")
    found = [reference for reference in REFERENCES if not chosen.names or reference.optimizer in chosen.names]
    lines, failed = [], 0
    for i, reference in enumerate(found, 1):
        begun, worst, above = time.perf_counter(), dict[str, float](), []
        each = list(comparisons(reference))
        for comparison in each:
            error = comparison.error()
            worst[comparison.dtype] = max(error, worst.get(comparison.dtype, 0.0))
            if not error <= comparison.tolerance:
                above.append(f"  {comparison}: {error:.1e} > {comparison.tolerance:g}")
        lines.append(line(reference, worst, len(each)))
        failed += bool(above)
        took = time.perf_counter() - begun
        print(f"{i}/{len(found)} {'  '.join(lines[-1][:6])} ({took:.1f} s)", *above, sep="\n", flush=True)
    print(*tables.table([HEAD[:6], *(cells[:6] for cells in lines)], left=(0, 1), rule=True), sep="\n")
    if chosen.markdown:
        rows = [HEAD, ("---",) * len(HEAD), *lines]
        page = PAGE.format(
            date=datetime.date.today().isoformat(),
            keras=keras.__version__,
            backend={"tensorflow": "TensorFlow", "jax": "JAX"}[keras.config.backend()],
            steps=STEPS,
            table="".join(f"| {' | '.join(cells)} |\n" for cells in rows),
        )
        with files.atomic_write(Path(chosen.markdown)) as file:
            file.write(page.encode())
    print(f"{len(found) - failed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", "__array__ implementation doesn't accept a copy keyword", DeprecationWarning)
    sys.exit(main())
