"""Groups, rows, and gradients that are not finite."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from keras import ops

from keras_optkit.optimizers.groups import Group, Places
from keras_optkit.optimizers.inner import shared
from keras_optkit.optimizers.optimizer import Optimizer
from keras_optkit.optimizers.rule import Weight, contributes, name_of, rule_for, slots_of
from keras_optkit.optimizers.rules.sgd import SGD
from keras_optkit.optimizers.slots import FromWeights
from keras_optkit.registry import Card
from keras_optkit.testing import problems
from keras_optkit.testing.checks.optimizers.common import assert_close, assert_equal, made
from keras_optkit.testing.conformance import check, traits
from keras_optkit.testing.tools import float64


@check("optimizer", engine=True)
@float64()
def check_groups(card: Card) -> None:
    """Groups equal separate optimizers on the parts; a frozen group keeps its values and has no state.

    With a rule that has sums over the model the parts are not separate, and only the second is checked.
    """
    separate = not contributes(made(card).rule)
    grads, values = problems.gradients(4), problems.start()
    decay = 0.2 if "weight_decay" in card.make(weight_decay=0.1).get_config() else None
    groups = [
        Group("weight_0", lr_scale=0.5, weight_decay=decay),
        Group("weight_[12]", lr_scale=0.1),
        Group("weight_3", trainable=False),
        Group("weight_[0-3]", lr_scale=7.0),  # the first one that matches counts
    ]
    got = problems.train(made(card, groups=groups, weight_decay=0.1), grads)
    rate = float(made(card).learning_rate)
    parts: list[tuple[list[int], float, float | None]] = [
        ([0], 0.5, decay),
        ([1, 2], 0.1, 0.1),
        ([4, 5, 6, 7], 1.0, 0.1),
    ]
    for places, scale, own in parts if separate else []:
        optimizer = made(card, learning_rate=rate * scale, weight_decay=own)
        alone = problems.train(optimizer, [[g[i] for i in places] for g in grads], values=[values[i] for i in places])
        assert_close([got[-1][i] for i in places], alone[-1], rtol=1e-12, what=f"group of {places}")
    assert_equal([got[-1][3]], [values[3]], what="frozen")
    rest = [i for i in range(len(values)) if i != 3]
    clipped = problems.train(made(card, groups=groups[2:3], global_clipnorm=0.5), grads)
    alone = problems.train(
        made(card, global_clipnorm=0.5), [[g[i] for i in rest] for g in grads], values=[values[i] for i in rest]
    )
    if separate:
        assert_close([clipped[-1][i] for i in rest], alone[-1], rtol=1e-12, what="clipped without the frozen one,")
    optimizer = made(card, groups=groups)
    optimizer.build(problems.variables(values))
    assert not [name for name in problems.state_of(optimizer) if name.startswith("slot.") and name.endswith(".3")]
    rows = optimizer.explain(problems.variables(values)).rows
    assert [row.rule == "frozen" for row in rows] == [i == 3 for i in range(len(values))]


@check("optimizer", engine=True)
@float64()
def check_group_rules(card: Card) -> None:
    """A group with another rule equals a separate optimizer, whichever of the two is the guest, and can be saved."""
    grads, values = problems.gradients(4), problems.start()
    own = {name: value for name, value in card.cases[-1].items() if name not in shared()}

    def mine(**more: Any) -> Optimizer:
        return card.make(**own, **more)

    def other(**more: Any) -> Optimizer:
        return SGD(momentum=0.5, **more)

    common: dict[str, Any] = {"learning_rate": 0.02, "weight_decay": 0.1}
    for host, guest in ((mine, other), (other, mine)):
        if guest is mine and "averages" in traits(card):  # which a guest may not
            continue
        group = Group("weight_[036]", lr_scale=0.5, weight_decay=0.2, rule=guest())
        optimizer, weights = host(groups=[group], **common), problems.variables(values)
        for step, arrays in enumerate(grads):
            if step == 2:
                state = problems.state_of(optimizer)
                optimizer = type(optimizer).from_config(json.loads(json.dumps(optimizer.get_config())))
                optimizer.build(weights)
                optimizer.load_own_variables(state)
            optimizer.apply([ops.convert_to_tensor(g) for g in arrays], weights)
        separate = (
            ([0, 3, 6], guest(learning_rate=0.01, weight_decay=0.2)),
            ([1, 2, 4, 5, 7], host(**common)),
        )
        for places, alone in separate:
            parts = [[g[i] for i in places] for g in grads]
            expected = problems.train(alone, parts, values=[values[i] for i in places])[-1]
            assert_close([ops.convert_to_numpy(weights[i]) for i in places], expected, rtol=1e-12, what=str(places))
        rows, known = optimizer.explain(weights).rows, Places(weights, None).weights(weights)
        expected_rules = [rule_for(alone.rule, known[i]) for i, (_, alone) in enumerate(separate)]
        assert [rows[i].rule for i in (0, 1)] == [name_of(rule) for rule in expected_rules]
        without = host(**common)
        without.build(weights)
        try:
            without.load_own_variables(problems.state_of(optimizer))
        except ValueError as error:
            assert "rules" in str(error), error
        else:
            raise AssertionError("state for a group with a rule of its own was taken by an optimizer without it")


@check("optimizer", engine=True)
@float64()
def check_skip_nonfinite(card: Card) -> None:
    """An update with a non-finite gradient changes nothing bitwise, is counted and named; the k-th in a row raises."""
    finite = problems.gradients(3)
    for mode, bad in (("eager", np.nan), ("eager", np.inf), ("graph", np.nan), ("xla", np.inf)):
        broken = [g.copy() for g in finite[0]]
        broken[3][1, 0, 2] = bad
        optimizer = made(card, skip_nonfinite=2, global_clipnorm=1.0, use_ema="averages" not in traits(card))
        weights = problems.variables(problems.start())
        step = problems.stepper(optimizer, weights, mode)

        def call(arrays: list[np.ndarray], step: Any = step) -> None:
            step([ops.convert_to_tensor(g) for g in arrays])

        call(finite[0])
        before = [ops.convert_to_numpy(w).copy() for w in weights], problems.state_of(optimizer)
        call(broken)
        after = [ops.convert_to_numpy(w) for w in weights], problems.state_of(optimizer)
        assert_equal(after[0], before[0], what=f"{mode} {bad}")
        for name, value in before[1].items():
            if not name.startswith("nonfinite."):
                np.testing.assert_array_equal(after[1][name], value, err_msg=f"{mode} {bad} {name}")
        assert optimizer.nonfinite[:2] == (1, 1), optimizer.nonfinite
        assert (optimizer.nonfinite.variable or "").endswith("weight_3"), optimizer.nonfinite
        call(finite[1])
        assert optimizer.nonfinite[:2] == (1, 0), f"after a finite gradient: {optimizer.nonfinite}"
        call(broken)
        try:
            call(broken)
            optimizer.finalize_variable_values(weights)  # where a compiled step cannot raise
        except Exception as error:  # the backend's own, from inside a graph
            assert "non-finite" in str(error)
        else:
            raise AssertionError(f"{mode}: two non-finite gradients in a row with skip_nonfinite=2 did not raise")


@check(
    "optimizer",
    requires=("rows",),
    only_on="tensorflow",
    because="tf.IndexedSlices; elsewhere the gradients of embeddings are dense",
    engine=True,
)
def check_rows(card: Card) -> None:
    """A sparse gradient updates its rows as a dense one would, repeated rows summed, and leaves the others bitwise."""
    import tensorflow as tf

    rng = np.random.default_rng(0)
    table, other = rng.normal(size=(7, 3)), rng.normal(size=(4,))
    indices = [[5, 0, 5], [2, 2, 2], [0, 5, 3]]
    values = [rng.normal(size=(3, 3)) for _ in indices]
    seen: set[int] = set()
    decay, clip, clip_all = {"weight_decay": 0.1}, {"clipnorm": 0.5}, {"global_clipnorm": 0.5}
    settings = [*itertools.product((2**16, 0), ("graph", "xla"), (decay,))]
    settings += itertools.product((2**16, 0), ("eager",), (decay, clip, clip_all))
    for below, mode, common in settings:
        optimizer, weights = made(card, **common), problems.variables([table, other])
        optimizer.pack_below = below
        step = problems.stepper(optimizer, weights, mode)
        seen = set()
        for rows, value in zip(indices, values, strict=True):
            before = ops.convert_to_numpy(weights[0]).copy()
            sparse = tf.IndexedSlices(tf.constant(value), tf.constant(rows, tf.int64), tf.constant([7, 3], tf.int64))
            step([sparse, tf.constant(np.ones(4))])
            seen |= set(rows)
            untouched = [i for i in range(7) if i not in rows]
            after = ops.convert_to_numpy(weights[0])[untouched]
            np.testing.assert_array_equal(after, before[untouched], err_msg="rows of an embedding without a gradient")
        # each row has been through the updates that it was in, with the step count of the whole
        for row in range(7):
            if row not in seen:
                np.testing.assert_array_equal(ops.convert_to_numpy(weights[0])[row], table[row])
        expected = _lazy_by_hand(card, common, table, other, indices, values)
        np.testing.assert_allclose(
            ops.convert_to_numpy(weights[0]), expected, rtol=1e-10, atol=1e-12, err_msg=f"{mode} {below} {common}"
        )


def _lazy_by_hand(
    card: Card, common: Mapping[str, Any], table: Any, other: Any, indices: list[list[int]], values: list[Any]
) -> np.ndarray:
    """Updates of all rows with dense gradients, after each of which the rows without one are set back."""
    optimizer, weights = made(card, **common), problems.variables([table, other])
    optimizer.pack_below = 0
    for rows, value in zip(indices, values, strict=True):
        dense = np.zeros_like(table)
        np.add.at(dense, rows, value)
        before, state = ops.convert_to_numpy(weights[0]).copy(), {}
        if optimizer.built:
            state = {n: ops.convert_to_numpy(v).copy() for n, v in optimizer._held.state.slots[0].items()}
        optimizer.apply([ops.convert_to_tensor(dense), ops.convert_to_tensor(np.ones(4))], weights)
        untouched = [i for i in range(len(table)) if i not in rows]
        after = ops.convert_to_numpy(weights[0]).copy()
        after[untouched] = before[untouched]
        weights[0].assign(after)
        for name, variable in optimizer._held.state.slots[0].items():
            slot = ops.convert_to_numpy(variable).copy()
            initial = slots_of(optimizer.rule, Weight(table.shape))[name]
            fresh = table if isinstance(initial, FromWeights) else np.full_like(table, initial.value)
            slot[untouched] = state.get(name, fresh)[untouched]
            variable.assign(slot)
    return ops.convert_to_numpy(weights[0])
