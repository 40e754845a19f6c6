"""What `fit` does for optimizers when Keras calls none of them, or only one.

`fit` leaves a model with the evaluation weights. The next update restores the training weights, but by then the first
gradient has been computed, at the wrong weights. At the end of an epoch, there may be fewer micro-batches left than an
update needs. Outside of TensorFlow, state for more variables has to be created before a step. And if a model holds
several optimizers, Keras only finalises the one that it was compiled with. With other optimizers these do nothing.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import keras

from keras_optkit.backend import TENSORFLOW
from keras_optkit.fit.basis import frozen
from keras_optkit.fit.run import Run
from keras_optkit.fit.steps import renew
from keras_optkit.optimizers.engine.files import opening
from keras_optkit.optimizers.of_model import innermost, optimizers_of, ours, ours_of


@contextlib.contextmanager
def told_of_training(run: Run) -> Iterator[None]:
    """The optimizers of ours are told that training begins, and in a `fit` that it ends."""
    model, fits = run.model, run.method == "fit"
    compiled: Any = getattr(model, "optimizer", None)
    # Keras may learn only in `build` which optimizers there are
    several = isinstance(compiled, keras.optimizers.MultiOptimizer)
    if model.built and (several or ours(compiled)):
        build_optimizer(model)  # there may be loaded state that says which weights the model holds
    found = ours_of(model)
    for optimizer in found:
        _begin_training(model, optimizer)
    if fits and (found or several):
        unknown = several and not getattr(compiled, "built", True)  # some of them may accumulate
        flush = unknown or any(optimizer.gradient_accumulation_steps for optimizer in found)
        run.replace(Finalize, Flush() if flush else Finalize())
    with contextlib.ExitStack() as stack:
        for optimizer in found if fits and not model.run_eagerly else ():
            stack.enter_context(optimizer.in_compiled_fit())
        yield


def _begin_training(model: Any, optimizer: Any) -> None:
    """Tells an optimizer of ours which weights it is to train, if it is the only one that trains the model."""
    outer: Any = getattr(model, "optimizer", None)
    if ours(outer) != [optimizer] or isinstance(outer, keras.optimizers.MultiOptimizer):
        optimizer.begin_training(None)
        return
    optimizer.begin_training(model.trainable_variables, inside=outer is not optimizer)


@contextlib.contextmanager
def shown_the_model(run: Run) -> Iterator[None]:
    """The model is shown to optimizers of ours, which know the paths of layers from it.

    Where layers were frozen or unfrozen since, the optimizer makes room for them before `Resume` restores its state,
    and a step is compiled again, since the old one trains what was trained then. So it is where a keyword, a
    hyperparameter or the schedule of an optimizer was set.
    """
    model, compiles = run.model, run.method == "compile"
    built = not compiles and model.built
    if not compiles and _show(model, again=run.method == "fit"):
        if getattr(model, "train_function", None) is not None:
            renew(model)
        if TENSORFLOW:  # elsewhere `begin_training` does, or refuses
            make_room(model)
    yield
    if not built:
        _show(model)


@dataclass(frozen=True)
class _Shown:
    """What a compiled step of a model has in it, as it was when the model was shown last; a copy of the model has none.

    Attributes:
        optimizers: Those of ours.
        trained: The trained variables, by id.
        settings: What the optimizers' keywords and hyperparameters were.
    """

    optimizers: list[weakref.ref[Any]]
    trained: frozenset[int]
    settings: list[Any]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


#: Where a model holds what it was shown as, past Keras's and TensorFlow's tracking of attributes. A table of all models
#: would keep one for ever whose schedule refers to it.
_HELD_AS = "_keras_optkit_shown"


def _show(model: Any, *, again: bool = True) -> bool:
    """Shows the model to all optimizers of ours; returns whether a step that is compiled is not the right one any more.

    Finding them takes milliseconds in a model of hundreds of layers, so `train_on_batch` does it once.
    """
    before = vars(model).get(_HELD_AS)
    if again or before is None:
        found = ours_of(model)
        for optimizer in found:
            optimizer.set_model(model)
        if not (found and model.built):
            return False
    else:
        found = [held for held in (reference() for reference in before.optimizers) if held is not None]
    now = _Shown(
        [weakref.ref(optimizer) for optimizer in found],
        frozenset(id(v) for v in model.trainable_variables),
        [frozen(optimizer.compiled_in()) for optimizer in found],
    )
    vars(model)[_HELD_AS] = now
    return before is not None and (before.trained, before.settings) != (now.trained, now.settings)


def make_room(model: Any) -> None:
    """Has the optimizer of ours that trains all of a model take the variables that it was not built for.

    Several optimizers make room for their parts in their next steps.
    """
    found = [inner for optimizer in optimizers_of(model) for inner in innermost(optimizer)]
    if len(found) == 1 and ours(found[0]) and found[0].built:
        strategy = getattr(model, "distribute_strategy", None)  # on TensorFlow
        with strategy.scope() if strategy else contextlib.nullcontext():
            found[0].build(model.trainable_variables)


@contextlib.contextmanager
def refusing_stock_averages(run: Run) -> Iterator[None]:
    """`SwapEMAWeights` is refused, with what to use instead, where an optimizer of ours averages."""
    averaging = [optimizer for optimizer in ours_of(run.model) if optimizer.use_ema or optimizer.rule.averages]
    if averaging and any(isinstance(callback, keras.callbacks.SwapEMAWeights) for callback in run.listed()):
        raise ValueError(
            "callbacks must not hold keras.callbacks.SwapEMAWeights, which works with Keras's own optimizers "
            f"only, since the model is trained by {averaging[0].name}, a {type(averaging[0]).__name__} of "
            "keras_optkit. Use keras_optkit.callbacks.AveragedWeights() instead."
        )
    yield


@contextlib.contextmanager
def told_of_files(run: Run) -> Iterator[None]:  # noqa: ARG001
    """Optimizers are told that they come with the file of a model."""
    with opening():
        yield


class Finalize(keras.callbacks.Callback):
    """Ends training for those optimizers of a model that it was not compiled with, as Keras does for that one.

    That is before all other callbacks see the end of training.
    """

    stateless = True
    sees_training_weights = True  # AveragedWeights leaves them in the model for it

    def on_train_end(self, logs: Any = None) -> None:  # noqa: ARG002
        """Gives the model the evaluation weights."""
        if not (self.params or {}).get("epochs", 1):
            return
        model = self.model
        done = ours(model.optimizer)
        for optimizer in ours_of(model):
            if not any(optimizer is other for other in done):
                optimizer.finalize_variable_values(())


class Flush(Finalize):
    """Ends every epoch with an update if micro-batches are left; before all other callbacks see its end.

    With data of unknown length that is after the validation of the first epoch.
    """

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002
        """After the last batch, if Keras knows how many there are."""
        steps = (self.params or {}).get("steps")
        if steps is not None and batch + 1 >= steps:
            self._flush()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        """If the length was not known."""
        self._flush()

    def _flush(self) -> None:
        for optimizer in ours_of(self.model):
            optimizer.flush()


def build_optimizer(model: Any) -> None:
    """Builds the optimizer that a built model was compiled with, if any, as `fit` would."""
    if model.optimizer is not None and not model.optimizer.built:
        strategy = getattr(model, "distribute_strategy", None)  # on TensorFlow
        with strategy.scope() if strategy else contextlib.nullcontext():
            model.optimizer.build(model.trainable_variables)
