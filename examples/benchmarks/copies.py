"""What XLA copies in one update of each element-wise optimizer, and which old values must be handed over to avoid it.

    python examples/benchmarks/copies.py
    python examples/benchmarks/copies.py Lion Adan

XLA updates a variable in place. If anything but its new value is computed from the old one afterwards, it copies the
old one first, with one core. A slot in `Rule.reuses` is read before the compiled update and assigned after it, which
needs no copy, but a new array in each step: with all slots handed over, AdamW is 1.8 times slower.

For each optimizer: the copies of a vector of two million elements in the compiled program (TensorFlow, CPU), with no
slot handed over and with those that its rule declares; where they are not the same or copies are left, the smallest set
with the fewest copies that leaving out one at a time from all of them finds.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from collections.abc import Collection
from pathlib import Path
from unittest import mock

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["XLA_FLAGS"] = " ".join(
    [
        f"--xla_dump_to={tempfile.mkdtemp(prefix='copies-')}",
        "--xla_dump_hlo_as_text --xla_dump_hlo_module_re=.*compute.*",
    ]
)

import keras
from keras import layers
from structured_optimizers import elementwise, make, updater

from keras_optkit.optimizers.rule import Weight, slots_of

SIZE = 2_000_000
DUMPED = Path(os.environ["XLA_FLAGS"].split()[0].partition("=")[2])


def copies(name: str, handed: Collection[str]) -> int:
    """How many copies there are in an update that is handed these slots."""
    for file in DUMPED.iterdir():
        file.unlink()
    scale = layers.LayerNormalization(center=False)
    scale.build((None, SIZE))
    optimizer = make(name)
    with mock.patch.object(type(optimizer.rule), "reuses", frozenset(handed)):
        updater(optimizer, keras.Sequential([scale]), 0)
    (program,) = DUMPED.glob("*cpu_after_optimizations.txt")
    entry = program.read_text().split("\nENTRY")[1]
    return len(re.findall(rf"= \w+\[(?:1,)?{SIZE}\]\S* copy\(", entry))


def smallest(name: str, names: Collection[str]) -> frozenset[str]:
    """Of all that could be handed over, what is left when each that makes no difference is left out."""
    needed = frozenset(names)
    fewest = copies(name, needed)
    for candidate in sorted(names):
        if copies(name, needed - {candidate}) <= fewest:
            needed -= {candidate}
    return needed


def main() -> None:
    """Prints a line for each optimizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="optimizers (default: all element-wise ones)")
    for name in parser.parse_args().names or elementwise():
        rule = make(name).rule
        before = copies(name, ())
        after = copies(name, rule.reuses) if rule.reuses else before
        line = f"{name}: {before} copies, {after} with {sorted(rule.reuses)}"
        if after:
            best = smallest(name, [*slots_of(rule, Weight((SIZE,))), "weights"])
            line += f"; {copies(name, best)} with {sorted(best)}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
