"""Rules about a run while it trains, as pure functions of what it has measured so far.

Where a run measures what `inspect` does, the rules are the same ones; the others here are about many updates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from statistics import median

from keras_optkit.advice import data, layers, updates
from keras_optkit.advice.data import BINARY, CATEGORICAL, SPARSE
from keras_optkit.advice.history import CLIP_RATE, GRADIENT, LOSS, RATE, RATIO, TOTAL_GRADIENT, History
from keras_optkit.advice.measured import Finding, LayerReport, ModelReport
from keras_optkit.advice.ranges import merged, named, runs
from keras_optkit.advice.reading import CAN_DIE

#: So many writes, up to so many updates, say something about layers; twice as many and so many updates, about the loss.
ENOUGH, ENOUGH_UPDATES = 8, 100
#: A layer whose weights change by less of their norm in an update stands still.
STILL = 1e-5
#: The loss has not moved if it has fallen by less than this share of itself.
UNMOVED = 0.02
#: A rate below this share of the largest one is meant to end the run.
DECAYED = 0.1
#: How many times the gradient may become larger.
EXPLOSION = 100.0
#: How many times the first loss may be that of a guess, and how many times of one that usual kernels make.
FAR_FROM_GUESS, NEAR_GUESS = 10.0, 2.0
#: The share of updates in which clipping is the rule, and the number of writes that say so.
CLIPPED, CLIP_WRITES = 0.9, 20
#: In so many writes, and this share of the run, a rate of 0 is not the end of a schedule.
ZERO_WRITES, ZERO_SHARE = 3, 0.1
#: Below this, the loss has nothing left to gain.
SOLVED = 1e-6


def findings_of(run: History) -> list[Finding]:
    """What all rules find in a run, causes first; adjacent layers with the same finding are one."""
    found = [*_of_numbers(run), *_of_rates(run), *_of_clipping(run), *_without_updates(run)]
    if run.count:
        # what makes a loss infinite shows in few writes
        if run.count >= ENOUGH or run.bad_since is not None:
            found += [*_of_large_updates(run), *_of_explosion(run)]
        found += [*_of_beginning(run), *_of_first_loss(run)]
    if run.count >= ENOUGH and run.bad_since is None:
        found += [*_of_layers(run), *_of_small_updates(run), *_of_loss(run)]
    order = [layer.path for layer in run.model.layers if layer.kernels] or run.layers(RATIO)
    dead = [layer.path for layer in _measured(run).layers if layer.dead is not None or layer.saturated is not None]
    inside = [each for each in found if each.rule in ("dead_units", "saturation")]
    rest = merged([each for each in found if each not in inside], order)
    return sorted([*rest, *merged(inside, dead)], key=lambda each: each.severity)


# -- the rules of `inspect` -------------------------------------------------------------------------------------------


def _of_numbers(run: History) -> Iterator[Finding]:
    """Whether loss and gradients are numbers."""
    if run.bad_since is None:
        return
    yield from data.loss_value(ModelReport(loss_value=run.bad_loss))
    known = [LayerReport(path, "", gradient_norm=math.nan, has_gradient=True) for path in run.bad_layers]
    yield from updates.missing_gradient(ModelReport(tuple(known)))


def _of_beginning(run: History) -> Iterator[Finding]:
    """What was wrong before the first update; kernels are a hint if the run began and goes well all the same."""
    first, guess = (run.first[0][1].get(LOSS) if run.first else None), _guess(run)
    began_well = first is None or guess is None or first < NEAR_GUESS * guess
    for rule in (layers.identical_layers, layers.kernel_scale, updates.l2_and_adaptive):
        for found in rule(run.model):
            is_hint = found.rule == "kernel_scale" and began_well and _goes_well(run)
            yield replace(found, is_hint=is_hint or found.is_hint)


def _of_layers(run: History) -> Iterator[Finding]:
    """Gradients that are lost, and what was measured of activations, which is a hint if the run goes well."""
    model = _measured(run)
    loss = run.level(LOSS)
    rules = [layers.dead_units, layers.saturation, layers.growth, layers.vanishing]
    if loss is None or abs(loss) > SOLVED:
        yield from updates.missing_gradient(model)
        rules.append(updates.vanishing_gradient)
    for rule in rules:
        yield from (replace(found, is_hint=_goes_well(run)) for found in rule(model))


def _measured(run: History) -> ModelReport:
    """The last writes as measurements of layers."""
    known = {layer.path: layer for layer in run.model.layers}
    last = run.recent[-1][1] if run.recent else {}
    paths = [layer.path for layer in run.model.layers]
    paths += [tag.partition("/")[2] for tag in last if tag.startswith((GRADIENT, "activation_"))]
    found = []
    for path in dict.fromkeys(paths):
        layer = known.get(path, LayerReport(path, ""))
        gradients = [v[GRADIENT + path] for _, v in run.recent if GRADIENT + path in v]
        changes: dict[str, object] = {}
        if gradients:
            changes |= {
                "gradient_norm": median(gradients),
                "has_gradient": True,
                "has_zero_gradient": not any(gradients),
            }
        if not layer.is_output:  # which may grow to the size of the labels
            changes |= {name: run.level(f"activation_{name}/{path}") for name in ("mean", "std", "saturated")}
        changes |= _dead(run, path, layer)
        found.append(replace(layer, **changes))  # type: ignore[arg-type]
    return ModelReport(tuple(found))


def _dead(run: History, path: str, layer: LayerReport) -> dict[str, float | None]:
    """The share of dead units, of an activation that can have some, and of units that are never 0.

    The latter is not written; if those that are not dead hardly ever are 0, it is that of all others.
    """
    dead, zeros = run.level(f"activation_dead/{path}"), run.level(f"activation_zeros/{path}")
    if dead is None or zeros is None or (layer.kind and layer.activation not in CAN_DIE):
        return {}
    return {"dead": dead, "always_active": 1 - dead if zeros - dead < 0.05 * (1 - dead) else 0.0}


# -- rules about many updates -----------------------------------------------------------------------------------------


def _guess(run: History) -> float | None:
    """The cross-entropy of predicting all classes alike; None for other losses and several outputs."""
    if len(run.model.outputs) != 1:
        return None
    output = run.model.outputs[0]
    if output.loss in BINARY:
        return math.log(2)
    units = output.units or 0
    return math.log(units) if output.loss in (*CATEGORICAL, *SPARSE) and units > 1 else None


def _goes_well(run: History) -> bool:
    """Whether the loss has fallen to half of what it was, and of a guess where that is known."""
    start, now, guess = run.start(LOSS), run.level(LOSS), _guess(run)
    fallen = start is not None and now is not None and now < 0.5 * start
    return run.bad_since is None and fallen and (guess is None or (now or 0.0) < 0.5 * guess)


def _is_decayed(run: History) -> bool:
    """Whether the learning rate is far below the largest one of the run."""
    tags = run.tags(RATE)
    return bool(tags) and (run.rate or 0.0) < DECAYED * run.peaks.get(tags[0], 0.0)


def _is_rising(run: History) -> bool:
    """Whether the learning rate is still warming up."""
    tags = run.tags(RATE)
    known = [values[tags[0]] for _, values in run.recent if tags and tags[0] in values]
    return len(known) > 1 and known[-1] > 1.05 * known[len(known) // 2]


def _has_moved(run: History) -> bool | None:
    """Whether the loss has fallen; None while that cannot be told, as early, in a warm-up, or of a GAN."""
    start, now = run.start(LOSS), run.level(LOSS)
    early = run.count < 2 * ENOUGH or run.step < ENOUGH_UPDATES
    if start is None or now is None or early or _is_rising(run):
        return None
    return now < start - UNMOVED * abs(start) or now <= SOLVED


def _has_learned_nothing(run: History) -> bool:
    """Whether the loss has not fallen, or to that of a guess only."""
    moved, now, guess = _has_moved(run), run.level(LOSS), _guess(run)
    return moved is False or (moved is True and now is not None and guess is not None and now > 0.9 * guess)


def _ratios(run: History) -> dict[str, float]:
    """The median of the update-to-weight ratio of each layer with a kernel, in the order of the model."""
    kernels = {layer.path for layer in run.model.layers if layer.kernels}
    found = {path: run.level(RATIO + path) for path in run.layers(RATIO) if not kernels or path in kernels}
    return {path: ratio for path, ratio in found.items() if ratio is not None}


def _names(run: History) -> tuple[str, ...]:
    return () if run.model.update is None else run.model.update.optimizer


def _of_large_updates(run: History) -> Iterator[Finding]:
    """Whether updates replace the weights rather than change them."""
    ratios = _ratios(run)
    most = updates.LARGEST_SIGN if updates.is_sign(_names(run)) else updates.LARGEST_UPDATE
    if not ratios:
        return
    first = median(run.start(RATIO + path) or 0.0 for path in ratios)
    if median(ratios.values()) > most:
        yield updates.too_large(median(ratios.values()), run.rate)
    elif first > most and _has_learned_nothing(run):  # and has ended in dead units, for example
        yield updates.too_large(first, run.rate, ", at first")


def _has_never_moved(run: History, ratios: dict[str, float]) -> bool:
    """Whether all layers have stood still from the first update, which is told from no loss: batches differ by more."""
    ever = [*ratios.values(), *(run.start(RATIO + path) or 0.0 for path in ratios)]
    return max(ever) < STILL and not _is_rising(run)


def _of_small_updates(run: History) -> Iterator[Finding]:
    """Whether weights stand still although the rate has not been lowered: all of them, or those of some layers."""
    ratios, rate = _ratios(run), run.rate
    if not ratios or rate == 0 or _is_decayed(run) or (run.level(LOSS) or 1.0) <= SOLVED:
        return
    small = {each.where for each in layers.kernel_scale(run.model) if "smaller" in each.reason}
    # what has no gradient has a finding of its own, which it is a consequence of
    ratios = {path: ratio for path, ratio in ratios.items() if path in small or run.level(GRADIENT + path) != 0}
    if not ratios:
        return
    still = [path for path, ratio in ratios.items() if ratio < STILL]
    least = updates.SMALLEST_UPDATE if updates.is_adaptive(_names(run)) else updates.SMALLEST_PROPORTIONAL
    middle = median(ratios.values())
    slow = (len(still) == len(ratios) or middle < least) and _has_moved(run) is False
    if (slow or _has_never_moved(run, ratios)) and not small:
        yield updates.too_small(middle, rate)
    if len(still) == len(ratios) and not small:
        return
    if _goes_well(run):  # and has little left to learn, which layers that have moved before are no worse for
        still = [path for path in still if (run.start(RATIO + path) or 0.0) < STILL]
    for paths in runs(still, list(ratios)):
        begin = "They stand" if len(paths) > 1 else "It stands"
        largest = max(ratios[path] for path in paths)
        cause, fix = "", "Look at their gradients, and at groups, layer_decay and master_weights."
        if set(paths) <= small:
            its = "their" if len(paths) > 1 else "its"
            cause, fix = f": {its} initialisation is too small", layers.KERNEL_FIX
        reason = f"{begin} still{cause}. An update changes the weights by {largest:.1g} of their norm at most."
        yield Finding("stands_still", 62, named(paths), reason, fix, is_hint=_goes_well(run))


def _of_explosion(run: History) -> Iterator[Finding]:
    """Whether the gradient has become far larger, without the loss falling."""
    start, now = run.start(TOTAL_GRADIENT), run.now(TOTAL_GRADIENT)
    if run.bad_since is not None and run.recent:
        now = run.recent[-1][1].get(TOTAL_GRADIENT)
    before, loss = run.start(LOSS), run.now(LOSS)
    if start and now and now > EXPLOSION * start and (before is None or loss is None or loss >= before):
        reason = f"The norm of the gradient was {start:.2g} at first, and is {now:.2g} now."
        fix = "Lower the learning rate, warm it up, or clip: global_clipnorm of a few times the usual norm."
        yield Finding("exploding_gradient", 47, "optimizer", reason, fix)


def _of_first_loss(run: History) -> Iterator[Finding]:
    """Whether predictions begin far worse than a guess."""
    first, guess = (run.first[0][1].get(LOSS) if run.first else None), _guess(run)
    if first is not None and guess is not None and first > FAR_FROM_GUESS * guess:
        reason = f"The first loss was {first:.3g}; predicting all classes alike has {guess:.3g}."
        fix = "Scale the inputs to a variance of 1, and use usual initializers; `inspect` looks for the cause."
        yield Finding("loss_at_start", 41, "loss", reason, fix, is_hint=_goes_well(run))


def _of_loss(run: History) -> Iterator[Finding]:
    """Whether the loss has moved, and in the right direction."""
    start, now = run.start(LOSS), run.now(LOSS)
    moved = _has_moved(run)
    if moved is None or start is None or now is None:
        return
    if start > 0 and now > updates.RISE * start:
        reason = f"The loss was {start:.3g} at first, and is {now:.3g} now."
        yield Finding("loss_rises", 48, "loss", reason, updates.LOWER_RATE)
    elif not moved:
        reason = f"The loss has not moved: it was {start:.3g} at first, and is {now:.3g} after {run.step} updates."
        fix = "Look at the other findings; try to fit a single batch, and look at the labels."
        yield Finding("loss_does_not_move", 63, "loss", reason, fix)


def _of_rates(run: History) -> Iterator[Finding]:
    """Whether a learning rate stays 0, and not only in the last updates."""
    for tag, (since, writes) in run.zero_since.items():
        if writes >= ZERO_WRITES and run.step - since >= ZERO_SHARE * run.step:
            of = "".join(f" of {name}" for name in [tag.removeprefix(RATE).lstrip("/")] if name)
            reason = f"The learning rate{of} has been 0 since update {since}, in the last {run.step - since} updates."
            fix = "Give the schedule as many steps as there are updates, or end training earlier."
            yield Finding("rate_is_zero", 44, "optimizer", reason, fix)


def _of_clipping(run: History) -> Iterator[Finding]:
    """Whether clipping changes nearly all gradients."""
    for tag in run.tags(CLIP_RATE):
        share = run.recent[-1][1][tag]
        if run.count >= CLIP_WRITES and share >= CLIPPED:
            usual = run.level(TOTAL_GRADIENT)
            norm = "" if usual is None else f"; their norm is {usual:.2g}"
            reason = f"Clipping changes {share:.0%} of the gradients{norm}."
            fix = "Set the threshold to a few times the usual norm, if clipping is meant for outliers."
            yield Finding("clipping", 86, "optimizer", reason, fix, is_hint=True)


def _without_updates(run: History) -> Iterator[Finding]:
    """Whether epochs end without an update."""
    if run.epochs and not run.count:
        ended = "An epoch has" if run.epochs == 1 else f"{run.epochs} epochs have"
        reason = f"{ended} ended, but the optimizer has made no update."
        fix = "Look at skipped updates: gradients that are not finite, and the scale of the loss."
        yield Finding("no_update", 46, "optimizer", reason, fix)
