"""Figures of a search. They belong to no window: `figure.savefig(path)` writes one, and a notebook shows it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_optkit import arguments
from keras_optkit.space import Bool, Choice
from keras_optkit.tuning.export import needed
from keras_optkit.tuning.importance import importance, objective_of

if TYPE_CHECKING:
    from keras_optkit.tuning.result import Result
    from keras_optkit.tuning.trials import Trial

BEST, OTHERS, FAILED, PRUNED = "tab:orange", "tab:blue", "tab:red", "tab:grey"
_COLUMNS = 3
_WIDE = 1000  # scores are on a logarithmic axis if the largest is so many times the smallest
_LEGIBLE = 10  # names on an axis; of more categories, some
_INACTIVE = -0.12  # where an inactive hyperparameter is on an axis from 0 to 1


def _axes(user: str, number: int, width: float = 3.4, height: float = 2.9) -> tuple[Any, list[Any]]:
    """A figure with so many axes, in rows."""
    needed("matplotlib", f"result.{user}")
    from matplotlib.figure import Figure

    columns = min(number, _COLUMNS)
    rows = -(-number // columns)
    figure = Figure(figsize=(max(width * columns, 5), height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for unused in axes[number:]:
        unused.remove()
    return figure, list(axes[:number])


def short(text: Any, length: int = 18) -> str:
    """A text that does not run into its neighbour, and in which nothing is mathematics."""
    text = str(text)
    text = text if len(text) <= length else f"{text[: length - 3]}..."
    return text.replace("\\", r"\\").replace("$", r"\$") if "$" in text else text


def _completed(result: Result) -> list[Trial]:
    """The trials whose scores can be compared; those that were pruned, if there are no others."""
    completed = [trial for trial in result.trials if trial.status == "completed"]
    return completed or [trial for trial in result.trials if trial.score is not None]


def _score(trial: Trial, name: str) -> float:
    """One objective of a trial that has it."""
    return trial.metrics.get(name, math.nan if trial.score is None else trial.score)


def _objectives(result: Result, objective: Any) -> list[str]:
    return list(result.objectives) if objective is None else [objective_of(result, objective)]


def _best(result: Result, trials: Sequence[Trial], name: str) -> Trial:
    sign = -1 if result.objectives[name] == "max" else 1
    return min(trials, key=lambda trial: (sign * _score(trial, name), trial.number))


def _scale(values: Sequence[float]) -> str:
    """The scale on which all values can be seen."""
    finite = [value for value in values if math.isfinite(value)]
    return "log" if finite and min(finite) > 0 and max(finite) / min(finite) >= _WIDE else "linear"


def _is_categorical(parameter: Any) -> bool:
    return isinstance(parameter, Choice | Bool)


def _some(number: int) -> range:
    """Of so many categories those whose names there is room for."""
    return range(0, number, -(-number // _LEGIBLE))


def history(result: Result, objective: Any = None) -> Any:
    """See `Result.plot_history`."""
    names = _objectives(result, objective)
    figure, axes = _axes("plot_history", len(names), 5.5, 3.2)
    trials = _completed(result)
    failed = [trial.number for trial in result.trials if trial.status == "failed"]
    pruned = [trial for trial in result.trials if trial.status == "pruned" and trial.score is not None]
    pruned = [trial for trial in pruned if trial not in trials]
    for axis, name in zip(axes, names, strict=True):
        numbers, scores = [trial.number for trial in trials], [_score(trial, name) for trial in trials]
        better = np.maximum if result.objectives[name] == "max" else np.minimum
        axis.plot(numbers, scores, "o", color=OTHERS, markersize=5, label="completed")
        axis.step(numbers, better.accumulate(scores), where="post", color=BEST, label="best so far")
        if failed:
            axis.plot(
                failed, [0.03] * len(failed), "x", color=FAILED, transform=axis.get_xaxis_transform(), label="failed"
            )
        if pruned:
            places = [trial.number for trial in pruned], [_score(trial, name) for trial in pruned]
            axis.plot(*places, "v", color=PRUNED, markersize=4, label="pruned")
        axis.set(xlabel="trial", ylabel=short(name, 30), yscale=_scale(scores))
        axis.margins(y=0.1)
        axis.xaxis.get_major_locator().set_params(integer=True)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize="small", frameon=False)
    return figure


def importances(result: Result, objective: Any = None) -> Any:
    """See `Result.plot_importance`."""
    names = _objectives(result, objective)
    found = {name: importance(result, name) for name in names}
    figure, axes = _axes("plot_importance", len(names), 5.5, 0.9 + 0.32 * len(result.space))
    for axis, (name, parts) in zip(axes, found.items(), strict=True):
        order = list(reversed(parts))
        bars = axis.barh(range(len(order)), [parts[each] for each in order], color=OTHERS)
        axis.bar_label(bars, fmt="%.2f", padding=3, fontsize="small")
        axis.set_yticks(range(len(order)), [short(each, 28) for each in order])
        axis.set(xlabel=f"part of the variance of {short(name, 30)}", xlim=(0, 1.15 * max(0.1, *parts.values())))
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def slices(result: Result, names: Any = None, objective: Any = None) -> Any:
    """See `Result.plot_slice`."""
    chosen = list(result.space) if names is None else names
    if not isinstance(chosen, list | tuple) or not chosen:
        raise TypeError(f"names must be a list of hyperparameters or None, got {names!r}.")
    for each in chosen:
        arguments.choice("names", each, tuple(result.space))
    metrics = _objectives(result, objective)
    figure, axes = _axes("plot_slice", len(chosen) * len(metrics))
    trials = _completed(result)
    last = max(trial.number for trial in result.trials)
    for axis, (metric, name) in zip(axes, itertools.product(metrics, chosen), strict=True):
        parameter = result.space[name]
        active = [trial for trial in trials if name in trial.values]
        values = [_place(parameter, trial.values[name]) for trial in active]
        scores, numbers = [_score(trial, metric) for trial in active], [trial.number for trial in active]
        points = axis.scatter(values, scores, c=numbers, cmap="viridis_r", vmin=0, vmax=max(last, 1), s=22)
        top = _best(result, trials, metric)
        if name in top.values:
            place = _place(parameter, top.values[name])
            axis.scatter([place], [_score(top, metric)], s=110, facecolors="none", edgecolors=BEST, linewidths=2)
        axis.set_xlabel(short(name, 30))
        if len(metrics) > 1 or axis.get_subplotspec().is_first_col():
            axis.set_ylabel(short(metric, 26))
        axis.set_yscale(_scale([_score(trial, metric) for trial in trials]))
        _label_x(axis, parameter)
    bar = figure.colorbar(points, ax=axes, label="trial", aspect=40 if len(axes) > _COLUMNS else 20)
    bar.locator.set_params(integer=True)
    return figure


def _place(parameter: Any, value: Any) -> float:
    """Where a value is on the axis of its hyperparameter: categories are in the order of the space."""
    return float(list(parameter.grid()).index(value)) if _is_categorical(parameter) else value


def _label_x(axis: Any, parameter: Any) -> None:
    if _is_categorical(parameter):
        values = parameter.grid()
        labels = {i: short(values[i], 14) for i in _some(len(values))}
        tilted = (
            {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if sum(map(len, labels.values())) > 20 else {}
        )
        axis.set_xticks(list(labels), list(labels.values()), **tilted)
        axis.set_xlim(-0.5, len(values) - 0.5)
    elif parameter.log is True:
        axis.set_xscale("log")
        if parameter.high / parameter.low < 100:  # otherwise powers of ten, of which there may be one or none
            ticks = np.geomspace(parameter.low, parameter.high, 4).tolist()
            ticks = sorted({round(tick) for tick in ticks}) if isinstance(parameter.low, int) else ticks
            axis.set_xticks(ticks, [_number(tick, parameter.high - parameter.low) for tick in ticks])
            axis.minorticks_off()
    elif isinstance(parameter.low, int):
        axis.xaxis.get_major_locator().set_params(integer=True)


def parallel(result: Result, objective: Any = None) -> Any:
    """See `Result.plot_parallel_coordinates`."""
    from_space = list(result.space)
    if objective is None and len(result.objectives) > 1:
        names, shade = list(result.objectives), next(iter(result.objectives))
    else:
        names = [shade := objective_of(result, objective)]
    trials = _completed(result)
    figure, (axis,) = _axes("plot_parallel_coordinates", 1, 1.5 * (len(from_space) + len(names)) + 0.5, 4.2)
    from matplotlib import colormaps

    # Better trials are darker and in front.
    sign = -1 if result.objectives[shade] == "max" else 1
    order = sorted(trials, key=lambda trial: (-sign * _score(trial, shade), -trial.number))
    scales = {name: _scale([_score(trial, name) for trial in trials]) for name in names}
    ends = {name: _ends([_score(trial, name) for trial in trials]) for name in names}

    def height(trial: Trial, name: str) -> float:
        return _share(_score(trial, name), *ends[name], scales[name] == "log")

    for trial in (trial for trial in result.trials if trial.status == "failed"):
        axis.plot([_height(result.space[each], trial.values.get(each)) for each in from_space], ":", color=FAILED, lw=1)
    for i, trial in enumerate(order):
        points = [_height(result.space[each], trial.values.get(each)) for each in from_space]
        color = colormaps["Blues"](0.25 + 0.6 * i / max(len(order) - 1, 1))
        is_best = i == len(order) - 1
        style = {"color": BEST, "lw": 2.5} if is_best else {"color": color, "lw": 1.2}
        axis.plot([*points, *(height(trial, name) for name in names)], **style)
    for x, each in enumerate(from_space):
        _draw_scale(axis, x, _ticks(result.space[each]))
        if result.space[each].when:
            axis.text(x, _INACTIVE, "inactive ", ha="right", va="center", fontsize=7, color="grey", style="italic")
            axis.plot([x, x], [_INACTIVE, 0], ":", color="black", lw=0.8)
    for x, name in enumerate(names, len(from_space)):
        low, high = ends[name]
        middle = math.sqrt(low * high) if scales[name] == "log" else (low + high) / 2
        _draw_scale(axis, x, {0.0: f"{low:.3g}", 0.5: f"{middle:.3g}", 1.0: f"{high:.3g}"})
    labels = [short(each, 22) for each in (*from_space, *names)]
    tilted = {"rotation": 20, "ha": "right", "rotation_mode": "anchor"} if max(map(len, labels)) > 14 else {}
    axis.set_xticks(range(len(labels)), labels, **tilted)
    axis.set_yticks([])
    axis.set(xlim=(-0.7, len(labels) - 0.7), ylim=(-0.18, 1.06))
    axis.tick_params(axis="x", length=0)
    axis.spines[:].set_visible(False)
    return figure


def _ends(scores: Sequence[float]) -> tuple[float, float]:
    return min(scores), max(scores)


def _share(value: float, low: float, high: float, log: bool) -> float:
    """How far a value is between two ends, from 0 to 1."""
    if low == high:
        return 0.5
    if log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return (value - low) / (high - low)


def _height(parameter: Any, value: Any) -> float:
    """Where a value is on an upright axis, on which it is as even as it is searched."""
    if value is None:
        return _INACTIVE
    if _is_categorical(parameter):
        return _share(_place(parameter, value), 0, len(parameter.grid()) - 1, False)
    if parameter.log == "reverse":
        return 1 - _share(parameter.mirrored(value), parameter.low, parameter.high, True)
    return _share(value, parameter.low, parameter.high, bool(parameter.log))


def _ticks(parameter: Any) -> dict[float, str]:
    """Some values of a hyperparameter by where they are on an upright axis."""
    if _is_categorical(parameter):
        values = parameter.grid()
        return {_height(parameter, values[i]): short(values[i], 12) for i in _some(len(values))}
    low, high = parameter.low, parameter.high
    middle = math.sqrt(low * high) if parameter.log is True else (low + high) / 2
    middle = round(middle) if isinstance(low, int) else middle
    return {_height(parameter, value): _number(value, high - low) for value in (low, middle, high)}


def _number(value: float, span: float) -> str:
    """A number with as many figures as tell it from others in a range."""
    if isinstance(value, int):
        return str(value)
    figures = 2 + math.ceil(math.log10(abs(value) / span)) if value and span else 3
    return f"{value:.{min(max(figures, 3), 15)}g}"


def _draw_scale(axis: Any, x: int, ticks: dict[float, str]) -> None:
    axis.plot([x, x], [0, 1], color="black", lw=0.8)
    halo = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.6}
    for y, label in ticks.items():
        axis.plot([x - 0.03, x + 0.03], [y, y], color="black", lw=0.8)
        axis.text(x - 0.05, y, label, ha="right", va="center", fontsize=8, bbox=halo, zorder=5)


def pareto_front(result: Result) -> Any:
    """See `Result.plot_pareto_front`."""
    if len(result.objectives) < 2:
        raise ValueError(f"plot_pareto_front needs a search with several objectives, got {list(result.objectives)!r}.")
    pairs = list(itertools.combinations(result.objectives, 2))
    figure, axes = _axes("plot_pareto_front", len(pairs), 4.6, 3.6)
    trials, front = _completed(result), result.pareto
    for axis, (x, y) in zip(axes, pairs, strict=True):
        others = [trial for trial in trials if trial not in front]
        axis.plot(
            [_score(trial, x) for trial in others], [_score(trial, y) for trial in others], "o", color=OTHERS, alpha=0.5
        )
        line = sorted(front, key=lambda trial: (_score(trial, x), _score(trial, y)))
        style = "o-" if len(pairs) == 1 else "o"  # between more than two objectives it is a surface
        axis.plot([_score(t, x) for t in line], [_score(t, y) for t in line], style, color=BEST, label="Pareto front")
        for name, label, scale in ((x, axis.set_xlabel, axis.set_xscale), (y, axis.set_ylabel, axis.set_yscale)):
            label(f"{short(name, 30)} ({result.objectives[name]})")
            scale(_scale([_score(trial, name) for trial in trials]))
        axis.margins(0.08)
        for trial in line:
            axis.annotate(
                str(trial.number), (_score(trial, x), _score(trial, y)), (4, 4), textcoords="offset points", fontsize=8
            )
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", fontsize="small", frameon=False)
    return figure


def learning_curves(result: Result, metric: Any = None) -> Any:
    """See `Result.plot_learning_curves`."""
    known = tuple(dict.fromkeys(name for trial in result.trials for run in trial.history for name in run["metrics"]))
    if not known:
        raise ValueError(
            "plot_learning_curves needs the epochs of the trials, which this search has not kept: its trials were run "
            "by a version before that."
        )
    names = [name for name in result.objectives if name in known] or list(known[:1])
    if metric is not None:
        names = [arguments.choice("metric", metric, known)]
    figure, axes = _axes("plot_learning_curves", len(names), 5.5, 3.4)
    best = result.best_trial
    for axis, name in zip(axes, names, strict=True):
        everything: list[float] = []
        for trial in sorted(result.trials, key=lambda trial: trial is best):
            for run in trial.history:
                pairs = zip(run["epochs"], run["metrics"].get(name, [None] * len(run["epochs"])), strict=True)
                points = [(epoch, value) for epoch, value in pairs if value is not None and math.isfinite(value)]
                if not points:
                    continue
                everything += [value for _, value in points]
                look: dict[str, Any] = {"color": OTHERS, "alpha": 0.45, "lw": 1, "zorder": 2, "label": "completed"}
                if trial is best:
                    look = {"color": BEST, "lw": 2.2, "zorder": 3, "label": f"best, trial {trial.number}"}
                elif trial.status == "pruned":
                    look |= {"color": PRUNED, "label": "pruned"}
                elif trial.status == "failed":
                    look |= {"color": FAILED, "ls": ":", "label": "failed"}
                marker = {"marker": "o", "markersize": 3} if len(points) <= 30 else {}
                axis.plot(*zip(*points, strict=True), **look, **marker)
        axis.set(xlabel="epoch", ylabel=short(name, 30), yscale=_scale(everything))
        axis.xaxis.get_major_locator().set_params(integer=True)
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=3, fontsize="small", frameon=False)
    return figure
