"""One update of AdamW: Keras's optimizer, ours, and torch's fused one, in alternating runs in one process, on the CPU.

    python examples/benchmarks/optimizer_step.py                    # time of an update, equality, tracing; all sets
    python examples/benchmarks/optimizer_step.py --sets mlp,large --repeats 5
    python examples/benchmarks/optimizer_step.py --memory --fit     # these two instead of the above

Method:

- What is updated. A set is a list of shapes of weights, all float32: `mlp` (784-512-512-10 with biases), `small` (1,000
  vectors of 1,000 numbers), `mobilenetv2` and `resnet50` (the trainable weights of `keras.applications`; nothing is
  downloaded), `bert` (BERT-base, 109,482,240 numbers) and `large` (one matrix of 5000 x 5000). Weights are normal with
  standard deviation 0.05, gradients uniform in [-0.1, 0.1). All alternatives of a set are in memory at once: 11 GiB for
  `bert`.
- Equal work. Learning rate 1e-3, weight decay 0.01 on every weight, betas 0.9 and 0.999, epsilon 1e-8. Ours adds
  epsilon before the bias correction (`epsilon_hat=True`), as Keras does, so that the two formulas coincide. Torch adds
  it after the correction, which is about as much work.
- "Graph" and "XLA" say whether the function that the optimizer is called in has `jit_compile=True`. What an optimizer
  compiles by itself in a graph belongs to "graph"; ours does so with its default `fuse="auto"`.
- Equality. From equal weights, fresh instances of both make 10 updates in a graph with equal sequences of random
  gradients. The figure is the largest |ours - keras| in a variable, divided by its largest |weight|, for the worst
  variable of the set; it has to be below 1e-6. Keras computes the bias correction as 1 - beta**t in float32, which
  loses digits. So that nobody has to guess whose rounding a difference is, both are also compared with a float64
  computation in NumPy. The last column divides by the variable's largest change in the 10 updates instead, which is
  the harder measure: a float32 weight far larger than its change cannot hold the change to more than a few digits.
- Time. The TensorFlow alternatives are `optimizer.apply` in a `tf.function` without AutoGraph, as `fit` traces it,
  called as a concrete function. The gradients are arguments of the function, so that nothing is copied. To pass a
  thousand tensors takes TensorFlow's Python layer milliseconds, which a training step, whose gradients arise inside of
  the function, does not spend: in each round an empty function with the same arguments is timed too, and its time is
  subtracted from that of the TensorFlow alternatives ("net"; "gross" is before). Not subtracted are the node that an
  argument is in the graph, XLA's own handling of it, and the passing of the optimizer's variables, which a training
  step has as well. Torch's `step()` is a plain Python call, whose gross and net are the same.
- Statistics. After a warm-up, the number of calls is chosen such that a sample lasts `--sample-seconds`. In every round
  each alternative is timed once, in turn, with the garbage collector off. Given are the median over the rounds, and the
  median of the ratios to `keras, graph` in the same round with the quartiles in brackets. The ratios of all sets are
  summarised by their geometric mean. Progress is plain lines on stderr: a live bar would take time from what is timed.
- Tracing. For each alternative a fresh optimizer is built, traced (`get_concrete_function`) and called once, after each
  kind was traced once on a small set. XLA compiles in that first call. The times come with every run; `--trace`
  measures these alone, with fresh objects in every round.
- Memory (`--memory`). In a fresh process the set's weights, the built optimizer and the gradients are made, the
  kernel's high-water mark is reset (Linux; where that is not permitted, the peak is that of the whole process), and the
  function is traced and called 10 times. "Before" is the resident memory before the tracing, "peak" the largest from
  then on. Both include the interpreter and TensorFlow.
- `fit` (`--fit`). An epoch of an MLP 784-512-512-10 with ReLU on 12,800 random rows in batches of 32, with
  `keras.optimizers.Adam` and with ours, both as they are by default, after an epoch of warm-up, alternating.
- Threads. TensorFlow's default, which is all that the process may use, and for torch the number of the machine's
  (`os.cpu_count()`). The first line printed says how many. Between and in its parallel loops torch's OpenMP waits
  actively for all of its threads, which on a machine with other work multiplies its times; there, set
  `OMP_WAIT_POLICY=passive` in the environment. It is not set here, so that torch runs as it does by default.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import timeit
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported

import keras
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.table import Table

import keras_optkit as ok

Shape = tuple[int, ...]

LEARNING_RATE, WEIGHT_DECAY, BETA_1, BETA_2, EPSILON = 1e-3, 0.01, 0.9, 0.999, 1e-8
UPDATES = 10  # before weights are compared, and in which memory is watched
LIMIT = 1e-6  # of the difference between ours and Keras's
BASE = "keras-graph"
ALTERNATIVES = {
    BASE: "keras, graph",
    "keras-xla": "keras, XLA",
    "ours-graph": "ours, graph",
    "ours-xla": "ours, XLA",
    "torch": "torch, fused",
}


# -- sets of weights --------------------------------------------------------------------------------------------------


def dense(inputs: int, outputs: int) -> list[Shape]:
    """A matrix and its bias."""
    return [(inputs, outputs), (outputs,)]


def bert() -> list[Shape]:
    """BERT-base: embeddings, 12 layers of attention and two dense layers, and the pooler."""
    normalisation: list[Shape] = [(768,), (768,)]
    layer = 4 * dense(768, 768) + normalisation + dense(768, 3072) + dense(3072, 768) + normalisation
    return [(30522, 768), (512, 768), (2, 768), *normalisation, *(12 * layer), *dense(768, 768)]


def trainable(model: keras.Model) -> list[Shape]:
    """The shapes of a model's weights."""
    return [tuple(variable.shape) for variable in model.trainable_variables]


SETS: dict[str, Callable[[], list[Shape]]] = {
    "mlp": lambda: dense(784, 512) + dense(512, 512) + dense(512, 10),
    "small": lambda: [(1000,)] * 1000,
    "mobilenetv2": lambda: trainable(keras.applications.MobileNetV2(weights=None)),
    "resnet50": lambda: trainable(keras.applications.ResNet50(weights=None)),
    "bert": bert,
    "large": lambda: [(5000, 5000)],
}


def weights(shapes: Sequence[Shape]) -> Iterator[np.ndarray]:
    """The weights that every alternative starts from, one at a time."""
    for place, shape in enumerate(shapes):
        numbers = np.random.default_rng(place).standard_normal(shape, dtype=np.float32)
        numbers *= np.float32(0.05)
        yield numbers


def gradient(shape: Shape, place: int, update: int) -> np.ndarray:
    """The gradient of one weight, given by its place in the set, in one update, which counts from 1."""
    numbers = np.random.default_rng((place, update)).random(shape, dtype=np.float32)
    numbers -= np.float32(0.5)
    numbers *= np.float32(0.2)
    return numbers


def gradients(shapes: Sequence[Shape], update: int = 1) -> Iterator[np.ndarray]:
    """The gradients of one update, one at a time."""
    return (gradient(shape, place, update) for place, shape in enumerate(shapes))


# -- the alternatives -------------------------------------------------------------------------------------------------


def new_optimizer(kind: str) -> keras.optimizers.Optimizer:
    """AdamW of `"keras"` or of `"ours"`, with one formula."""
    common: dict[str, Any] = {"weight_decay": WEIGHT_DECAY, "beta_1": BETA_1, "beta_2": BETA_2, "epsilon": EPSILON}
    if kind == "keras":
        return keras.optimizers.AdamW(LEARNING_RATE, **common)
    return ok.optimizers.AdamW(LEARNING_RATE, decay_mask="all", epsilon_hat=True, **common)


def trace(function: Callable[[list[tf.Tensor]], None], shapes: Sequence[Shape], jit: bool = False) -> Any:
    """The concrete function of one gradient for each shape."""
    traced = tf.function(function, autograph=False, jit_compile=jit)
    return traced.get_concrete_function([tf.TensorSpec(shape, tf.float32) for shape in shapes])


def trace_update(optimizer: keras.optimizers.Optimizer, variables: list[keras.Variable], jit: bool = False) -> Any:
    """The concrete function that updates the variables."""

    def update(grads: list[tf.Tensor]) -> None:
        optimizer.apply(grads, variables)

    return trace(update, [tuple(variable.shape) for variable in variables], jit)


class Cost(NamedTuple):
    """Seconds until an optimizer has made its first update."""

    build: float
    trace: float
    first_call: float


class Update(NamedTuple):
    """An alternative that is ready to be timed."""

    call: Callable[[], Any]
    cost: Cost


def prepare(name: str, shapes: Sequence[Shape], grads: list[tf.Tensor]) -> Update:
    """Builds an alternative of TensorFlow with fresh weights, traces it, and makes the first update."""
    kind, _, way = name.partition("-")
    variables = [keras.Variable(value) for value in weights(shapes)]
    optimizer = new_optimizer(kind)
    times = [time.perf_counter()]
    optimizer.build(variables)
    times.append(time.perf_counter())
    function = trace_update(optimizer, variables, jit=way == "xla")
    times.append(time.perf_counter())
    function(grads)
    times.append(time.perf_counter())
    return Update(lambda: function(grads), Cost(*(b - a for a, b in itertools.pairwise(times))))


def prepare_torch(shapes: Sequence[Shape]) -> Callable[[], Any]:
    """Torch's fused AdamW with fresh weights."""
    import torch

    torch.set_num_threads(os.cpu_count())
    parameters = [torch.nn.Parameter(torch.from_numpy(value)) for value in weights(shapes)]
    for parameter, value in zip(parameters, gradients(shapes), strict=True):
        parameter.grad = torch.from_numpy(value)
    optimizer = torch.optim.AdamW(
        parameters, lr=LEARNING_RATE, betas=(BETA_1, BETA_2), weight_decay=WEIGHT_DECAY, eps=EPSILON, fused=True
    )
    return lambda: optimizer.step()


def tensors(shapes: Sequence[Shape], update: int = 1) -> list[tf.Tensor]:
    """Gradients for the TensorFlow alternatives."""
    return [tf.constant(value) for value in gradients(shapes, update)]


def warm_up(alternatives: Iterable[str]) -> None:
    """Traces every alternative once, so that no later tracing pays for what happens once in a process."""
    shapes = dense(3, 2)
    for name in alternatives:
        prepare(name, shapes, tensors(shapes))


# -- time of an update ------------------------------------------------------------------------------------------------


class Timing(NamedTuple):
    """An alternative on a set: medians over the rounds."""

    gross: float
    net: float
    ratios: list[float]  # to BASE in the same round; empty where that was not measured


def calls_for(call: Callable[[], Any], seconds: float) -> int:
    """How many calls last so long, after some that do not count."""
    timeit.timeit(call, number=2)
    return max(1, math.ceil(seconds / min(timeit.repeat(call, number=1, repeat=3))))


def time_set(
    name: str, shapes: Sequence[Shape], alternatives: Sequence[str], repeats: int, seconds: float
) -> tuple[dict[str, Timing], dict[str, Cost]]:
    """Times all alternatives on one set in turn; returns the timings, and what tracing took."""
    grads = tensors(shapes)
    calls: dict[str, Callable[[], Any]] = {}
    costs = {}
    for alternative in alternatives:
        say(f"{name}: preparing {ALTERNATIVES[alternative]}")
        if alternative == "torch":
            calls[alternative] = prepare_torch(shapes)
        else:
            calls[alternative], costs[alternative] = prepare(alternative, shapes, grads)
    empty = trace(lambda grads: None, shapes)  # noqa: ARG005
    calls["empty"] = lambda: empty(grads)
    counts = {alternative: calls_for(call, seconds) for alternative, call in calls.items()}
    gross: dict[str, list[float]] = {alternative: [] for alternative in calls}
    for done in range(repeats):
        say(f"{name}: round {done + 1} of {repeats}")
        for alternative, call in calls.items():
            number = counts[alternative]
            gross[alternative].append(timeit.timeit(call, number=number) / number)

    passing = gross["empty"]
    net = {a: gross[a] if a == "torch" else [g - p for g, p in zip(gross[a], passing, strict=True)] for a in calls}
    base = net.get(BASE, [])
    timings = {
        a: Timing(
            statistics.median(gross[a]), statistics.median(net[a]), [n / b for n, b in zip(net[a], base, strict=False)]
        )
        for a in calls
    }
    return timings, costs


def time_rows(name: str, timings: dict[str, Timing]) -> list[list[str]]:
    """The table's rows of one set."""
    rows = [
        [name, ALTERNATIVES[a], number(1e3 * t.net), number(1e3 * t.gross), spread(t.ratios)]
        for a, t in timings.items()
        if a != "empty"
    ]
    return [*rows, [name, "(empty function)", "-", number(1e3 * timings["empty"].gross), "-"]]


def geometric_mean(ratios: Sequence[float]) -> str:
    """A dash where it has no meaning: without a ratio, or with one that noise has brought down to zero."""
    return f"{statistics.geometric_mean(ratios):.2f}" if ratios and min(ratios) > 0 else "-"


# -- tracing ----------------------------------------------------------------------------------------------------------


def trace_set(name: str, shapes: Sequence[Shape], alternatives: Sequence[str], repeats: int) -> dict[str, list[Cost]]:
    """Builds, traces and first calls of fresh optimizers, in turn."""
    grads = tensors(shapes)
    costs: dict[str, list[Cost]] = {alternative: [] for alternative in alternatives}
    for done in range(repeats):
        for alternative in alternatives:
            say(f"{name}: tracing {ALTERNATIVES[alternative]}, {done + 1} of {repeats}")
            costs[alternative].append(prepare(alternative, shapes, grads).cost)
            gc.collect()  # functions and their optimizers refer to each other
    return costs


def trace_rows(name: str, costs: dict[str, list[Cost]]) -> list[list[str]]:
    """The table's rows of one set."""
    rows = []
    for alternative, found in costs.items():
        ratios = [sum(c) / sum(b) for c, b in zip(found, costs.get(BASE, []), strict=False)]
        medians = [number(statistics.median(seconds)) for seconds in zip(*found, strict=True)]
        rows.append([name, ALTERNATIVES[alternative], *medians, f"{statistics.median(ratios):.2f}" if ratios else "-"])
    return rows


# -- equality ---------------------------------------------------------------------------------------------------------


def updated(kind: str, shapes: Sequence[Shape]) -> list[np.ndarray]:
    """The weights after some updates in a graph, each with gradients of its own."""
    variables = [keras.Variable(value) for value in weights(shapes)]
    optimizer = new_optimizer(kind)
    optimizer.build(variables)
    function = trace_update(optimizer, variables)
    for update in range(1, UPDATES + 1):
        function(tensors(shapes, update))
    return [variable.numpy() for variable in variables]


def reference(start: np.ndarray, place: int) -> np.ndarray:
    """One variable after the same updates, in float64."""
    weight = start.astype(np.float64)
    m, v = np.zeros_like(weight), np.zeros_like(weight)
    for t in range(1, UPDATES + 1):
        g = gradient(start.shape, place, t).astype(np.float64)
        m += (1 - BETA_1) * (g - m)
        v += (1 - BETA_2) * (g**2 - v)
        rate = LEARNING_RATE * math.sqrt(-math.expm1(t * math.log(BETA_2))) / -math.expm1(t * math.log(BETA_1))
        weight -= LEARNING_RATE * WEIGHT_DECAY * weight + rate * m / (np.sqrt(v) + EPSILON)
    return weight


class Difference(NamedTuple):
    """The largest difference of a variable, by two measures."""

    of_weight: float  # divided by the largest weight
    of_change: float  # divided by the largest change in all updates


def differences(shapes: Sequence[Shape]) -> dict[str, Difference]:
    """How far ours, Keras's and a float64 computation are apart, each for the worst variable."""
    ours, theirs = updated("ours", shapes), updated("keras", shapes)
    worst: dict[str, Difference] = {}
    for place, (start, a, b) in enumerate(zip(weights(shapes), ours, theirs, strict=True)):
        exact = reference(start, place)
        change = np.max(np.abs(exact - start))
        pairs = {"ours - keras": (a, b), "ours - float64": (a, exact), "keras - float64": (b, exact)}
        for pair, (one, other) in pairs.items():
            difference = np.max(np.abs(one.astype(np.float64) - other))
            before = worst.get(pair, Difference(0, 0))
            found = (float(difference / np.max(np.abs(other))), float(difference / change))
            worst[pair] = Difference(*np.fmax(before, found).tolist()) if np.all(np.isfinite(found)) else before
    return worst


# -- memory -----------------------------------------------------------------------------------------------------------


def peak(kind: str, shapes: Sequence[Shape]) -> dict[str, float]:
    """Resident MiB before and at the most during some updates, in this process, which has to be a fresh one."""
    variables = [keras.Variable(value) for value in weights(shapes)]
    optimizer = new_optimizer(kind)
    optimizer.build(variables)
    grads = tensors(shapes)
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
        reset = True
    except OSError:
        reset = False
    before = resident("VmRSS")
    function = trace_update(optimizer, variables)
    for _ in range(UPDATES):
        function(grads)
    most = resident("VmHWM") if reset else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {"before": before, "peak": most}


def resident(field: str) -> float:
    """MiB, from the kernel's account of this process."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{field}:")) / 2**10


def memory_rows(name: str, repeats: int) -> list[list[str]]:
    """Runs fresh processes in turn; the table's rows of one set."""
    found: dict[str, list[dict[str, float]]] = {"keras": [], "ours": []}
    for done in range(repeats):
        for kind, runs in found.items():
            say(f"{name}: memory of {kind}, {done + 1} of {repeats}")
            command = [sys.executable, str(Path(__file__).resolve()), "--peak-of", kind, "--sets", name]
            process = subprocess.run(command, check=True, capture_output=True, text=True)
            runs.append(json.loads(process.stdout.splitlines()[-1]))
    rows = []
    for kind, runs in found.items():
        before, most = (statistics.median(run[key] for run in runs) for key in ("before", "peak"))
        ratios = [a["peak"] / b["peak"] for a, b in zip(runs, found["keras"], strict=True)]
        rows.append([name, f"{kind}, graph", f"{before:,.0f}", f"{most:,.0f}", spread(ratios)])
    return rows


# -- fit --------------------------------------------------------------------------------------------------------------


def fit_rows(repeats: int) -> tuple[list[list[str]], bool]:
    """Times epochs of `fit` with Keras's Adam and with ours; the table's rows, and Keras's choice of `jit_compile`."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((12_800, 784), dtype=np.float32), rng.integers(0, 10, 12_800)
    models = {}
    for kind, optimizer in {"keras": keras.optimizers.Adam(), "ours": ok.optimizers.Adam()}.items():
        keras.utils.set_random_seed(0)
        layers = [keras.layers.Dense(units, activation="relu") for units in (512, 512)]
        models[kind] = keras.Sequential([keras.Input((784,)), *layers, keras.layers.Dense(10)])
        models[kind].compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))

    def epoch(kind: str) -> float:
        start = time.perf_counter()
        models[kind].fit(x, y, batch_size=32, epochs=1, verbose=0)
        return time.perf_counter() - start

    seconds: dict[str, list[float]] = {kind: [] for kind in models}
    for done in range(repeats + 1):
        say(f"fit: epoch {done} of {repeats}" if done else "fit: warm-up")
        for kind, times in seconds.items():
            times.append(epoch(kind))
    seconds = {kind: times[1:] for kind, times in seconds.items()}
    rows = []
    for kind, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds["keras"], strict=True)]
        rows.append([f"{kind}, Adam", number(statistics.median(times)), spread(ratios)])
    return rows, bool(models["ours"].jit_compile)


# -- what is printed --------------------------------------------------------------------------------------------------


def say(line: str) -> None:
    """One line of progress."""
    print(line, file=sys.stderr, flush=True)


def number(value: float) -> str:
    """Three digits that count."""
    digits = 2 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def spread(ratios: Sequence[float]) -> str:
    """The median and the quartiles; a dash for nothing."""
    if len(ratios) < 2:
        return f"{ratios[0]:.2f}" if ratios else "-"
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def show(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], texts: int, markdown: bool) -> None:
    """Prints a table whose first `texts` columns are text and whose others are numbers."""
    if markdown:
        rules = ["---" if i < texts else "---:" for i in range(len(headings))]
        lines = [f"| {' | '.join(cells)} |" for cells in (headings, rules, *rows)]
        print("\n".join(["", f"{title}:", "", *lines]))
        return
    table = Table(title=title, title_justify="left")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i < texts else "right", no_wrap=True)
    for i, row in enumerate(rows):
        last = i + 1 == len(rows) or rows[i + 1][0] != row[0]
        table.add_row(*row, end_section=last and texts > 1)
    console = Console()
    console.width = max(console.width, 100)  # where the output is a file, it would be cut off after 80 characters
    console.print("", table)


# -- the command line -------------------------------------------------------------------------------------------------


def names(allowed: Iterable[str]) -> Callable[[str], list[str]]:
    """Reads names with commas between them, each once."""

    def read(text: str) -> list[str]:
        found = list(dict.fromkeys(text.split(",")))
        wrong = [name for name in found if name not in allowed]
        if wrong:
            raise argparse.ArgumentTypeError(f"unknown {', '.join(map(repr, wrong))}; allowed: {', '.join(allowed)}")
        return found

    return read


def positive(text: str) -> int:
    """A number of rounds on a command line."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    """The length of a sample on a command line."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Times one update of AdamW: Keras's, ours, and torch's fused one.",
        epilog="With --memory, --fit or --trace only these are measured, and not the time of an update.",
    )
    parser.add_argument(
        "--sets", type=names(SETS), help=f"of {', '.join(SETS)} (default: all; with --memory: resnet50, bert, large)"
    )
    parser.add_argument(
        "--alternatives", type=names(ALTERNATIVES), help=f"of {', '.join(ALTERNATIVES)} (default: all that can be run)"
    )
    parser.add_argument(
        "--repeats", type=positive, help="rounds (default: 15; with --fit 7, with --memory and --trace 3)"
    )
    parser.add_argument(
        "--sample-seconds", type=seconds, default=0.2, help="how long a sample lasts (default: %(default)s)"
    )
    parser.add_argument("--memory", action="store_true", help="peak resident memory of updates")
    parser.add_argument("--fit", action="store_true", help="time of an epoch of fit with a small network")
    parser.add_argument("--trace", action="store_true", help="time of building, tracing and the first call")
    parser.add_argument("--markdown", action="store_true", help="prints the tables as Markdown")
    parser.add_argument("--peak-of", choices=("keras", "ours"), help=argparse.SUPPRESS)  # in a process of --memory
    arguments = parser.parse_args(argv)
    if tf.config.list_physical_devices("GPU"):
        parser.error("this measures CPUs, and TensorFlow sees a GPU; set CUDA_VISIBLE_DEVICES=-1")
    explicit = arguments.alternatives is not None
    arguments.alternatives = arguments.alternatives or list(ALTERNATIVES)
    if "torch" in arguments.alternatives and not arguments.peak_of:
        try:
            import torch  # noqa: F401
        except ImportError as error:
            if explicit:
                parser.error(f"torch cannot be imported: {error}")
            say(f"without torch, which cannot be imported: {error}")
            arguments.alternatives.remove("torch")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    if arguments.peak_of:
        print(json.dumps(peak(arguments.peak_of, SETS[arguments.sets[0]]())))
        return
    with_torch = ""
    if "torch" in arguments.alternatives:
        policy = os.environ.get("OMP_WAIT_POLICY", "not set")
        with_torch = f", torch {sys.modules['torch'].__version__} (OMP_WAIT_POLICY {policy})"
    print(
        f"{os.cpu_count()} CPU threads ({platform.machine()}), Python {platform.python_version()}, "
        f"Keras {keras.__version__}, TensorFlow {tf.__version__}{with_torch}",
        flush=True,
    )
    if arguments.memory:
        rows = [
            row
            for name in arguments.sets or ["resnet50", "bert", "large"]
            for row in memory_rows(name, arguments.repeats or 3)
        ]
        headings = ["set", "alternative", "before, MiB", "peak, MiB", "ratio [quartiles]"]
        show(f"Resident memory in {UPDATES} updates", headings, rows, 2, arguments.markdown)
    if arguments.fit:
        rows, jit = fit_rows(arguments.repeats or 7)
        title = f"An epoch of fit, 400 steps, jit_compile={jit}, which is Keras's choice"
        show(title, ("optimizer", "seconds", "ratio [quartiles]"), rows, 1, arguments.markdown)
    if arguments.trace or not (arguments.memory or arguments.fit):
        updates(arguments)


def updates(arguments: argparse.Namespace) -> None:
    """Measures and prints the times of updates, the equality, and the tracing; the last alone with `--trace`."""
    traced = [name for name in arguments.alternatives if name != "torch"]
    warm_up(traced)
    times: list[list[str]] = []
    traces: list[list[str]] = []
    equality: list[list[str]] = []
    ratios: dict[str, list[float]] = {name: [] for name in arguments.alternatives}
    worst = 0.0
    for name in arguments.sets or SETS:
        shapes = SETS[name]()
        if arguments.trace:
            traces += trace_rows(name, trace_set(name, shapes, traced, arguments.repeats or 3))
            continue
        say(f"{name}: comparing the weights")
        found = differences(shapes)
        worst = max(worst, found["ours - keras"].of_weight)
        equality += [[name, pair, f"{d.of_weight:.1e}", f"{d.of_change:.1e}"] for pair, d in found.items()]
        gc.collect()
        timings, costs = time_set(
            name, shapes, arguments.alternatives, arguments.repeats or 15, arguments.sample_seconds
        )
        times += time_rows(name, timings)
        traces += trace_rows(name, {alternative: [cost] for alternative, cost in costs.items()})
        for alternative, of_sets in ratios.items():
            if timings[alternative].ratios:
                of_sets.append(statistics.median(timings[alternative].ratios))
        gc.collect()

    if not arguments.trace:
        headings = ["set", "alternative", "net, ms", "gross, ms", "ratio [quartiles]"]
        show("One update of AdamW", headings, times, 2, arguments.markdown)
        rows = [[ALTERNATIVES[name], geometric_mean(of_sets)] for name, of_sets in ratios.items()]
        show("Geometric mean of the ratios over the sets", ("alternative", "ratio"), rows, 1, arguments.markdown)
        headings = ["set", "difference", "of largest weight", "of largest change"]
        show(f"Weights after {UPDATES} updates", headings, equality, 2, arguments.markdown)
        verdict = "below" if worst < LIMIT else "NOT below"
        print(f"\nLargest difference between ours and Keras's: {worst:.1e} of the weights, {verdict} {LIMIT:.0e}.")
    if traces:
        headings = ["set", "alternative", "build, s", "trace, s", "first call, s", "ratio of sums"]
        show("Until the first update is made", headings, traces, 2, arguments.markdown)


if __name__ == "__main__":
    main()
