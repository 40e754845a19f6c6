"""State: files, variables that join, state of others."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_optkit.optimizers.rule import contributes
from keras_optkit.private import op_determinism
from keras_optkit.registry import Card
from keras_optkit.testing import problems
from keras_optkit.testing.checks.optimizers.common import assert_close, assert_equal, flat, made, with_ema
from keras_optkit.testing.conformance import check, traits
from keras_optkit.testing.tools import float64


@check("optimizer", engine=True)
def check_save_load_continue(card: Card) -> None:
    """A run that is saved, loaded and continued equals the uninterrupted one bitwise: `.keras` and `.weights.h5`."""
    x, y = problems.regression()

    def go_on(model: keras.Model, epochs: int = 2) -> keras.Model:
        model.fit(x, y, batch_size=16, epochs=epochs, shuffle=False, verbose=0)
        model.train_on_batch(x[:16], y[:16])  # one micro-batch waits for others
        return model

    def compiled(**more: Any) -> keras.Model:
        model = problems.network()
        model.compile(made(card, card.cases[-1], gradient_accumulation_steps=3, **more), loss="mse")
        return model

    with tempfile.TemporaryDirectory() as folder, op_determinism():
        model = go_on(compiled())
        model.optimizer.learning_rate = 0.5 * float(model.optimizer.learning_rate)  # a set rate is state, too
        model.save(Path(folder) / "model.keras")
        model.save_weights(Path(folder) / "model.weights.h5")
        expected = flat(go_on(model).get_weights())
        loaded = keras.models.load_model(Path(folder) / "model.keras")
        np.testing.assert_array_equal(flat(go_on(loaded).get_weights()), expected)
        for built in (False, True):  # state loaded before the optimizer is built waits for it
            other = compiled()
            other.optimizer.pack_below = 0  # a file does not depend on the packing
            if built:
                other.optimizer.build(other.trainable_variables)
            other.load_weights(Path(folder) / "model.weights.h5")
            np.testing.assert_allclose(flat(go_on(other).get_weights()), expected, rtol=1e-6, atol=1e-7)


@check("optimizer", engine=True)
@float64()
def check_more_variables(card: Card) -> None:
    """Variables that join later begin as in an optimizer of their own, and those before keep their state.

    With a rule that has sums over the model they change each other, and only files are checked.
    """
    grads, values = problems.gradients(5), problems.start()
    separate = not contributes(made(card).rule)
    for place in (0, 3):  # what joins in the third step
        rest = [i for i in range(len(values)) if i != place]
        optimizer, weights = made(card, **with_ema(card)), problems.variables(values)
        alone = made(card, **with_ema(card))
        expected = problems.train(alone, [[g[i] for i in rest] for g in grads], values=[values[i] for i in rest])[-1]
        for step, arrays in enumerate(grads):
            mine = rest if step < 2 else list(range(len(values)))
            if step == 2:
                optimizer.build(weights)
            optimizer.apply([ops.convert_to_tensor(arrays[i]) for i in mine], [weights[i] for i in mine])
        if separate:
            assert_close([ops.convert_to_numpy(weights[i]) for i in rest], expected, rtol=1e-12)
        own = made(card, **with_ema(card))
        late = problems.train(own, [[g[place]] for g in grads[2:]], values=[values[place]])[-1]
        if "averages" not in traits(card) and separate:  # whose shares are those of the whole model
            assert_close([ops.convert_to_numpy(weights[place])], late, rtol=1e-12, what="the one that joined,")
        assert np.abs(ops.convert_to_numpy(weights[place]) - values[place]).max() > 0
        assert int(optimizer.iterations) == 5
        state, before = problems.state_of(optimizer), problems.state_of(alone)
        for name in before:
            part, _, index = name.rpartition(".")
            if index.isdecimal() and separate:
                np.testing.assert_allclose(state[f"{part}.{rest[int(index)]}"], before[name], rtol=1e-10, err_msg=name)
        fresh, copies = made(card, **with_ema(card)), problems.variables([ops.convert_to_numpy(w) for w in weights])
        fresh.build(copies)
        fresh.load_own_variables(state)  # a file has the order of the model, whoever came first
        for each, values_of in ((optimizer, weights), (fresh, copies)):
            each.apply([ops.convert_to_tensor(g) for g in grads[0]], values_of)
        assert_close([ops.convert_to_numpy(w) for w in copies], [ops.convert_to_numpy(w) for w in weights], rtol=1e-12)
    try:
        optimizer.build(problems.variables(values))
    except ValueError as error:
        assert "Unknown variables" in str(error)
    else:
        raise AssertionError("the variables of another model were accepted")


@check("optimizer", engine=True)
@float64()
def check_paths(card: Card) -> None:
    """No two variables have one path, and their values alone, all that an `.h5` file holds, are enough to continue."""
    settings = {"gradient_accumulation_steps": 2, "skip_nonfinite": 2, **with_ema(card)}
    grads = [[ops.convert_to_tensor(g) for g in arrays] for arrays in problems.gradients(6)]
    optimizer, weights = made(card, **settings), problems.variables(problems.start())
    for arrays in grads[:3]:
        optimizer.apply(arrays, weights)
    paths = [variable.path for variable in optimizer.variables]
    assert len(set(paths)) == len(paths), f"some paths occur twice: {sorted(paths)}"
    values = [ops.convert_to_numpy(w) for w in weights]
    other, copies = made(card, **settings), problems.variables(values)
    other.build([])  # as Keras does, which does not know the weights then
    other.set_weights([ops.convert_to_numpy(variable) for variable in optimizer.variables])
    for arrays in grads[3:]:
        optimizer.apply(arrays, weights)
        other.apply(arrays, copies)
    assert_equal(
        [ops.convert_to_numpy(w) for w in copies], [ops.convert_to_numpy(w) for w in weights], what="continued"
    )


@check("optimizer", engine=True)
@float64()
def check_foreign_state(card: Card) -> None:
    """State of another optimizer, of another model or of Keras is refused with the difference, and nothing changes."""
    weights = problems.variables(problems.start())
    optimizer = made(card)
    optimizer.apply([ops.convert_to_tensor(g) for g in problems.gradients(1)[0]], weights)
    mine = problems.state_of(optimizer)

    other_model = made(card)
    other_model.build(problems.variables([np.ones((2, 2)), np.ones(3)]))
    renamed = dict(mine)
    schema = json.loads(mine["schema"].tobytes())
    renamed["schema"] = np.frombuffer(json.dumps(schema | {"optimizer": "elsewhere>Other"}).encode(), np.uint8)
    stock = keras.optimizers.SGD(0.1, momentum=0.9)
    stock.build(problems.variables(problems.start()))
    stock_state: dict[str, np.ndarray] = {}
    stock.save_own_variables(stock_state)
    for state, hint in (
        (problems.state_of(other_model), "(2, 2)"),
        (renamed, "elsewhere>Other"),
        (stock_state, "keras_optkit"),
    ):
        try:
            optimizer.load_own_variables(state)
        except ValueError as error:
            assert hint in str(error), f"the message does not show the difference: {error}"
        else:
            raise AssertionError(f"foreign state was accepted ({hint})")
        assert_equal(problems.state_of(optimizer).values(), mine.values())
