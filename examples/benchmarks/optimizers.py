"""Which optimizer? Updates and seconds until a loss is reached, each tuned with the same number of trials.

    python examples/benchmarks/optimizers.py record --minutes 60     # resumes where it was stopped
    python examples/benchmarks/optimizers.py record --backwards      # a second process, from the other end
    python examples/benchmarks/optimizers.py time                    # seconds per update, on a quiet machine
    python examples/benchmarks/optimizers.py report --picture optimizers.png

Method:

- Tasks. A convolutional network on Fashion-MNIST, a character transformer on the source of Python's standard library,
  and a perceptron on the prices of 53,940 diamonds; see `tasks.py`. A run ends when the loss on unseen rows, which is
  measured every 20 updates, reaches the target, or after a fixed number of updates, or when it cannot be reached any
  more: the loss is not finite, or not even half-way in half of the updates.
- Rate. Warm-up over the first 30 updates, then constant: what is compared is how fast a loss is reached, and a schedule
  that falls towards the end of the run would decide about that. Schedule-Free warms up by itself, and rules that need
  no rate get 1.
- Trials. Each optimizer has `--trials` settings, random points of the search space that is on its card, but with the
  rates spread evenly over their range on the logarithmic scale. The same settings are tried on all tasks, with one
  seed.
- The best setting of each task is trained with five fresh seeds. So is one setting for all tasks: the one with the
  smallest geometric mean, over the tasks, of its updates relative to the best trial of AdamW.
- Reported are medians over the five seeds and the smallest and largest number of updates. A run that does not reach the
  target counts as infinite. Seconds are the updates times the seconds per update, which `time` measures in turns: the
  trials run side by side with anything else, which does not change the number of updates.

Each finished run is one line of a JSON Lines file, written at once, so that the recording can be stopped at any time.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from rich.console import Console
from rich.progress import Progress
from tasks import TASKS, Data, Task

import keras_optkit as ok

WARMUP = 30
SEEDS = (101, 102, 103, 104, 105)
#: Whose best trial is the yardstick.
YARDSTICK = "AdamW"
OPTIMIZERS = (
    "AdamW",
    "NAdam",
    "SGD",
    "Lion",
    "AdEMAMix",
    "Adan",
    "MARS",
    "ScheduleFreeAdamW",
    "Prodigy",
    "Muon",
    "NorMuon",
    "SOAP",
)
Setting = dict[str, Any]
Run = dict[str, Any]
Runs = dict[str, Run]


def drawn(name: str, trials: int) -> list[Setting]:
    """Points of the space on the card of an optimizer, with rates that are spread evenly over its logarithm."""
    (card,) = (card for card in ok.cards("optimizer") if card.name == name)
    space = ok.tuning.Space(card.space)
    generator = np.random.default_rng([trials, *name.encode()])
    points = [dict(space.sample(generator)) for _ in range(trials)]
    if "learning_rate" in space:
        rates = space["learning_rate"]
        places = (generator.permutation(trials) + 0.5) / trials
        for point, place in zip(points, places, strict=True):
            point["learning_rate"] = rates.low * (rates.high / rates.low) ** place
    ranges = {key for key, parameter in space.items() if isinstance(parameter, ok.tuning.Float)}
    return [{key: float(f"{x:.3g}") if key in ranges else x for key, x in p.items()} for p in points]


def settings(runs: Runs, name: str, trials: int) -> list[Setting]:
    """The settings to try: those that the recorded trials had, and of others new points."""
    points = dict(enumerate(drawn(name, trials)))
    points |= {run["trial"]: run["setting"] for run in runs.values() if run["optimizer"] == name and "trial" in run}
    return [points[number] for number in range(trials)]


def made(name: str, setting: Setting) -> keras.optimizers.Optimizer:
    """An optimizer with its warm-up."""
    given = dict(setting)
    if name.startswith("ScheduleFree"):
        given["warmup_steps"] = WARMUP
    elif "learning_rate" in given:
        given["learning_rate"] = ok.schedules.Warmup(given["learning_rate"], WARMUP, given["learning_rate"] / WARMUP)
    return getattr(ok.optimizers, name)(**given)


class Reached(keras.callbacks.Callback):
    """Ends a run at the target, or where it cannot be reached any more."""

    def __init__(self, task: Task):
        super().__init__()
        self.task = task
        self.losses: list[float] = []
        self.updates = math.inf

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002, D102
        assert logs is not None
        self.losses.append(float(logs["val_loss"]))
        if self.losses[-1] <= self.task.target:
            self.updates = len(self.losses) * self.task.every
        half_way = (self.losses[0] + self.task.target) / 2
        late = 2 * len(self.losses) * self.task.every >= self.task.steps and self.losses[-1] > half_way
        self.model.stop_training = self.updates < math.inf or late or not math.isfinite(self.losses[-1])


def train(task: Task, data: Data, name: str, setting: Setting, seed: int) -> Run:
    """One run: its losses of validation, and after how many updates it reached the target."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    model = task.build()
    model.compile(made(name, setting), task.loss, steps_per_execution=task.every, jit_compile=False)
    reached = Reached(task)
    model.fit(
        task.batches(data, seed),
        steps_per_epoch=task.every,
        epochs=task.steps // task.every,
        validation_data=(data.x_val, data.y_val),
        validation_batch_size=1000,
        callbacks=[reached],
        shuffle=False,
        verbose=0,
    )
    losses = [float(f"{loss:.5g}") if math.isfinite(loss) else None for loss in reached.losses]
    return {"updates": reached.updates if reached.updates < math.inf else None, "losses": losses}


def read(path: Path) -> Runs:
    """The runs of a file by their key; a last line that was not finished is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    runs = [json.loads(line) for line in lines if line.endswith("\n")]
    return {key_of(run): run for run in runs}


def key_of(run: Run) -> str:
    """What identifies a run."""
    return key(run["task"], run["optimizer"], run["setting"], run["seed"])


def key(task: str, optimizer: str, setting: Setting, seed: int) -> str:
    """What identifies a run, from its parts."""
    return json.dumps([task, optimizer, setting, seed], sort_keys=True)


def append(path: Path, run: Run) -> None:
    """Adds one run to a file, also behind a line that was not finished."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                end = path.read_bytes().rfind(b"\n") + 1
                file.truncate(end)
        file.write((json.dumps(run) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def updates_of(run: Run | None) -> float:
    """After how many updates a run reached the target; infinite if it did not."""
    return math.inf if run is None or run["updates"] is None else run["updates"]


def last_loss(run: Run | None) -> float:
    """The smallest loss of a run, for the order of runs that do not reach the target."""
    finite = [loss for loss in ([] if run is None else run["losses"]) if loss is not None]
    return min(finite, default=math.inf)


def chosen(runs: Runs, name: str, trials: int) -> dict[str, Setting]:
    """The best setting for each task, and under "shared" the best for all tasks; of trials that are all done."""
    points = settings(runs, name, trials)
    yardstick = {
        task: min(updates_of(runs.get(key(task, YARDSTICK, point, 0))) for point in settings(runs, YARDSTICK, trials))
        for task in TASKS
    }

    def order(task: str, point: Setting) -> tuple[float, float]:
        run = runs.get(key(task, name, point, 0))
        return updates_of(run), last_loss(run)

    best = {task: min(points, key=lambda point: order(task, point)) for task in TASKS}

    def mean(point: Setting) -> tuple[float, float, float]:
        orders = {task: order(task, point) for task in TASKS}
        updates = {task: n for task, (n, _) in orders.items()}
        ratios = [n / yardstick[task] for task, n in updates.items() if max(n, yardstick[task]) < math.inf]
        missed = sum(map(math.isinf, updates.values()))
        return missed, statistics.geometric_mean(ratios or [math.inf]), sum(loss for _, loss in orders.values())

    return {**best, "shared": min(points, key=mean)}


def pending(runs: Runs, given: argparse.Namespace) -> list[Run]:
    """The runs that are still to be made: the trials, and then the fresh seeds."""
    points = {name: settings(runs, name, given.trials) for name in given.optimizers}
    trials = [
        {"task": task, "optimizer": name, "setting": points[name][number], "seed": 0, "trial": number}
        for task in given.tasks
        for number in range(given.trials)
        for name in given.optimizers
    ]
    missing = [run for run in trials if key_of(run) not in runs]
    if missing:
        return missing
    fresh: Runs = {}
    for task in given.tasks:
        for name in given.optimizers:
            best = chosen(runs, name, given.trials)
            for point in (best[task], best["shared"]):
                for seed in SEEDS:
                    run = {"task": task, "optimizer": name, "setting": point, "seed": seed}
                    fresh[key_of(run)] = run
    return [run for name, run in fresh.items() if name not in runs]


def record(given: argparse.Namespace, console: Console) -> None:
    """Makes the runs that are not in the file yet."""
    start = time.monotonic()
    data = {task: TASKS[task].load() for task in given.tasks}
    with Progress(console=console) as progress:
        bar = progress.add_task("runs", total=None)
        while time.monotonic() - start < 60 * given.minutes:
            left = pending(read(given.runs), given)
            progress.update(bar, total=len(left) + progress.tasks[0].completed)
            if not left:
                break
            run = left[-1 if given.backwards else 0]
            named = run["task"], run["optimizer"], run["setting"]
            progress.update(bar, description=" ".join(map(str, named)))
            began = time.perf_counter()
            done = train(TASKS[run["task"]], data[run["task"]], *named[1:], run["seed"])
            append(given.runs, {**run, **done, "seconds": round(time.perf_counter() - began, 2)})
            progress.advance(bar)
    console.print(f"{len(pending(read(given.runs), given))} runs are left.")


def seconds_per_update(given: argparse.Namespace) -> dict[tuple[str, str], float]:
    """Medians of rounds in which all optimizers are timed in turns, in `fit` without validation."""
    found: dict[tuple[str, str], list[float]] = {}
    for task_name in given.tasks:
        task, fits = TASKS[task_name], {}
        data = task.load()
        for name in given.optimizers:
            model = task.build()
            model.compile(made(name, {}), task.loss, steps_per_execution=task.every, jit_compile=False)
            fits[name] = functools.partial(model.fit, task.batches(data, 0), shuffle=False, verbose=0)
            fits[name](steps_per_epoch=2 * task.every)
        for _ in range(given.rounds):
            for name, fit in fits.items():
                began = time.perf_counter()
                fit(steps_per_epoch=5 * task.every)
                each = (time.perf_counter() - began) / (5 * task.every)
                found.setdefault((task_name, name), []).append(each)
    return {pair: statistics.median(times) for pair, times in found.items()}


def relative(runs: Runs, given: argparse.Namespace, *, shared: bool) -> dict[str, dict[str, list[float]]]:
    """For each optimizer and task, the updates of the five fresh seeds."""
    found: dict[str, dict[str, list[float]]] = {}
    for name in given.optimizers:
        best = chosen(runs, name, given.trials)
        for task in given.tasks:
            point = best["shared" if shared else task]
            of_seeds = [runs.get(key(task, name, point, seed)) for seed in SEEDS]
            if None in of_seeds:
                raise ValueError(f"{given.runs} is not complete: record first. {task}, {name}, {point} is missing.")
            found.setdefault(name, {})[task] = [updates_of(run) for run in of_seeds]
    return found


def shown(updates: Sequence[float]) -> str:
    """The median of some runs, their range, and how many did not reach the target."""
    reached = sorted(filter(math.isfinite, updates))
    median, missed = statistics.median(updates), len(updates) - len(reached)
    if not reached:
        return "missed"
    shown = [f"{median:.0f}" if math.isfinite(median) else "-", f"({reached[0]} to {reached[-1]}"]
    return " ".join(shown) + (f", {missed} of {len(updates)} missed)" if missed else ")")


def ratios(of_all: dict[str, dict[str, list[float]]], yardstick: dict[str, list[float]]) -> dict[str, float]:
    """The geometric means, over the tasks, of medians relative to those of the yardstick, from best to worst."""

    def mean(of_tasks: dict[str, list[float]]) -> float:
        each = [statistics.median(of_tasks[task]) / statistics.median(yardstick[task]) for task in of_tasks]
        return statistics.geometric_mean(each) if all(map(math.isfinite, each)) else math.inf

    return dict(sorted(((name, mean(of_tasks)) for name, of_tasks in of_all.items()), key=lambda pair: pair[1]))


def report(given: argparse.Namespace, console: Console) -> None:
    """Prints the tables, and draws the picture."""
    runs = read(given.runs)
    times = json.loads(given.times.read_text(encoding="utf-8")) if given.times.exists() else {}
    own, shared = (relative(runs, given, shared=which) for which in (False, True))
    yardstick = own[YARDSTICK]
    for title, of_all in (("the best setting of each task", own), ("one setting for all tasks", shared)):
        print(f"\nUpdates with {title}:\n")
        print(f"| optimizer | {' | '.join(given.tasks)} | updates, relative | seconds, relative |")
        print(f"|---|{'---|' * len(given.tasks)}---|---|")
        for name, ratio in ratios(of_all, yardstick).items():
            cells = [shown(of_all[name][task]) for task in given.tasks]
            cost = [
                times.get(task, {}).get(name, math.nan) / times.get(task, {}).get(YARDSTICK, 1) for task in given.tasks
            ]
            cells += [f"{ratio:.2f}", f"{ratio * statistics.geometric_mean(cost):.2f}"]
            print(f"| `{name}` | {' | '.join('-' if cell in ('inf', 'nan') else cell for cell in cells)} |")
    print("\nSettings:\n\n| optimizer | task | setting |\n|---|---|---|")
    for name in given.optimizers:
        for task, point in chosen(runs, name, given.trials).items():
            print(f"| `{name}` | {task} | {', '.join(f'{key}={value:.3g}' for key, value in point.items())} |")
    if given.picture is not None:
        draw(own, shared, yardstick, given.picture)
        console.print(f"{given.picture} is drawn.")


def draw(own: Any, shared: Any, yardstick: Any, path: Path) -> None:
    """Draws, for each optimizer, its updates relative to AdamW: a dot for each task, a line for the mean."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    names = list(ratios(own, yardstick))[::-1]
    figure, axes = plt.subplots(figsize=(7.5, 0.4 * len(names) + 1.2), layout="constrained")
    for offset, of_all, label in ((0.12, own, "tuned for each task"), (-0.12, shared, "one setting for all tasks")):
        means = ratios(of_all, yardstick)
        finite = [(i, means[name]) for i, name in enumerate(names) if math.isfinite(means[name])]
        axes.plot([x for _, x in finite], [i + offset for i, _ in finite], "D", label=f"geometric mean, {label}")
    for place, task in enumerate(TASKS):
        each = [statistics.median(own[name][task]) / statistics.median(yardstick[task]) for name in names]
        dots = [(i, x) for i, x in enumerate(each) if math.isfinite(x)]
        axes.plot([x for _, x in dots], [i + 0.12 for i, _ in dots], "os^"[place], alpha=0.45, label=task, zorder=1)
    axes.axvline(1, color="grey", linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("updates to the target, relative to AdamW tuned for each task")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Which optimizer?")
    parser.add_argument("what", choices=("record", "time", "report"))
    parser.add_argument("--runs", type=Path, default=Path(__file__).with_name("optimizers.jsonl"), metavar="FILE")
    parser.add_argument("--times", type=Path, default=Path(__file__).with_name("optimizers_times.json"), metavar="FILE")
    parser.add_argument("--tasks", type=lambda text: text.split(","), default=list(TASKS))
    parser.add_argument("--optimizers", type=lambda text: text.split(","), default=list(OPTIMIZERS))
    parser.add_argument("--trials", type=int, default=10, help="settings of each optimizer (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop recording after so many minutes")
    parser.add_argument("--backwards", action="store_true", help="record from the last run on, beside another process")
    parser.add_argument("--rounds", type=int, default=5, help="of `time` (default: %(default)s)")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="where `report` draws")
    given = parser.parse_args(argv)
    console = Console(stderr=True)
    if given.what == "record":
        record(given, console)
    elif given.what == "time":
        found = seconds_per_update(given)
        of_tasks = {task: {name: found[task, name] for name in given.optimizers} for task in given.tasks}
        given.times.write_text(json.dumps(of_tasks, indent=1) + "\n", encoding="utf-8")
    else:
        report(given, console)


if __name__ == "__main__":
    main()
