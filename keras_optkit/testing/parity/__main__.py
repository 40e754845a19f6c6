"""Runs optimizers against their references: `python -m keras_optkit.testing.parity [NAME...] [--markdown FILE]`."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path

from keras_optkit import files, tables
from keras_optkit.testing.parity.compare import STEPS, comparisons, installed
from keras_optkit.testing.parity.everything import REFERENCES
from keras_optkit.testing.parity.reference import Reference

HEAD = ("optimizer", "reference", "steps", "runs", "float32", "float64", "deviations")


def line(reference: Reference, worst: dict[str, float], runs: int) -> tuple[str, ...]:
    """The cells of a reference's line."""
    errors = [f"{worst[dtype]:.1e}" if dtype in worst else "-" for dtype in ("float32", "float64")]
    return (reference.optimizer, installed(reference), str(STEPS), str(runs), *errors, reference.deviations)


def main() -> int:
    """Prints a line for each reference, and returns 1 if an error is above its tolerance."""
    parser = argparse.ArgumentParser(prog="python -m keras_optkit.testing.parity", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="names of optimizers; all when left out")
    parser.add_argument("--markdown", metavar="FILE", help="writes the table to this file, too")
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
        with files.atomic_write(Path(chosen.markdown)) as file:
            file.write("".join(f"| {' | '.join(cells)} |\n" for cells in rows).encode())
    print(f"{len(found) - failed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", "__array__ implementation doesn't accept a copy keyword", DeprecationWarning)
    sys.exit(main())
