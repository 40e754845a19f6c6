"""Draws all schedules into one picture, that of the guide.

python examples/schedules.py --picture docs/guide/schedules.png
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
from keras import ops

from keras_optkit.schedules import (
    REX,
    Cosine,
    CosineRestarts,
    Cyclic,
    Exponential,
    InverseSquareRoot,
    Linear,
    OneCycle,
    Piecewise,
    Polynomial,
    Scale,
    Schedule,
    Sequence,
    Step,
    Warmup,
    WarmupStableDecay,
)

STEPS = 1000

#: In the order of the guide's table.
ALL: list[Schedule] = [
    Cosine(1.0, STEPS),
    Linear(1.0, STEPS),
    Polynomial(1.0, STEPS),
    REX(1.0, STEPS),
    WarmupStableDecay(1.0, STEPS, warmup_steps=100, decay_steps=200),
    OneCycle(1.0, STEPS),
    InverseSquareRoot(1.0, 100),
    Exponential(1.0, 250, decay_rate=0.5),
    Step(1.0, 250, decay_rate=0.5),
    Piecewise([500, 750], [1.0, 0.3, 0.1]),
    CosineRestarts(1.0, 142, m_mul=0.8),
    Cyclic(0.1, 1.0, 125, mode="triangular2"),
    Warmup(Cosine(1.0, STEPS - 100), 100),
    Sequence([Cosine(1.0, 500), Linear(0.6, 500)], [500]),
    Scale(Cosine(1.0, STEPS), 0.5, offset=0.2),
]


def main(argv: list[str] | None = None) -> None:
    """Draws one chart for each schedule."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--picture", type=Path, default=Path("runs/schedules.png"), help="(default: %(default)s)")
    picture = parser.parse_args(argv).picture
    figure, axes = plt.subplots(3, 5, figsize=(12, 6), sharex=True, sharey=True, layout="constrained")
    steps = ops.arange(STEPS + 1)
    for ax, schedule in zip(axes.flat, ALL, strict=True):
        ax.plot(ops.convert_to_numpy(steps), ops.convert_to_numpy(schedule(steps)))
        ax.set_title(type(schedule).__name__, fontsize=10)
    figure.supxlabel("optimizer updates")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=80)
    print(f"{len(ALL)} schedules in {picture}")


if __name__ == "__main__":
    main()
