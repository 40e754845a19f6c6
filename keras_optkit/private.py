"""The only file that touches private names of Keras, KerasTuner, TensorFlow or JAX, each with its public fall-back.

`tests/test_private.py` holds a canary for every name.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable, Iterator
from typing import Any

import keras


@contextlib.contextmanager
def op_determinism() -> Iterator[None]:
    """TensorFlow's op determinism, inside the block only.

    The public API can switch it on but not off, and Keras refuses XLA while it is on; without the private switch it
    stays on. Does nothing on other backends.
    """
    if keras.config.backend() != "tensorflow":
        yield
        return
    import tensorflow as tf
    from tensorflow.python.framework import config

    was_on = config.is_op_determinism_enabled()
    tf.config.experimental.enable_op_determinism()
    try:
        yield
    finally:
        switch_off = getattr(config, "disable_op_determinism", None)
        if switch_off is not None and not was_on:
            switch_off()


def current_layer() -> Any:
    """The layer (or other object) that is making or using a variable at this moment, or None.

    Keras hands an initializer nothing but a shape, and by its shape a depthwise kernel looks like any other. The layer
    is on Keras's stack of name scopes. Fall-back: None, and every kernel is read as (*window, in, out).
    """
    scopes = _global_attribute("name_scope_stack")
    return scopes[-1].caller if scopes else None


def in_stateless_scope() -> bool:
    """Whether layers are called for the shapes of their outputs, while a model is built.

    Fall-back: False.
    """
    return _global_attribute("stateless_scope") is not None


def without_autocast() -> contextlib.AbstractContextManager[Any]:
    """A scope in which the `value` of a variable is in its own dtype, though a layer computes in another.

    (Its `dtype` is `keras.config.floatx()` in there, whatever it is.) Fall-back: none, and a kernel is rounded to half
    precision before it is brought into another form.
    """
    try:
        from keras.src.backend.common.variables import AutocastScope
    except ImportError:
        return contextlib.nullcontext()
    return AutocastScope(None)


def variable_to_initialize() -> Any:
    """The variable that is given its first value after the layers of a model were called for shapes, or None.

    Keras has a list of these variables and gives them their values in its order, when no layer is at work any more.
    Fall-back: None, and every kernel of such a model is read as (*window, in, out).
    """
    waiting = () if in_stateless_scope() else _global_attribute("uninitialized_variables") or ()
    return next((variable for variable in waiting if getattr(variable, "_value", variable) is None), None)


def sublayers(layer: Any, *, direct: bool = False) -> list[Any]:
    """All layers inside a layer or model, at any depth, or only those directly inside it.

    Keras lists only those that a model was put together from. Fall-back: the lists of all models in the lists.
    """
    flatten = getattr(layer, "_flatten_layers", None)
    if flatten is not None:
        return list(flatten(include_self=False, recursive=not direct))
    found = list(getattr(layer, "layers", ()))
    return found if direct else found + [below for child in found for below in sublayers(child)]


def known_variables(optimizer: Any) -> list[Any] | None:
    """The variables that one of Keras's optimizers was built for, the only ones that it can train.

    Fall-back: None, and Keras raises in the first step that trains another one.
    """
    return getattr(optimizer, "_trainable_variables", None)


def accumulated_gradients(optimizer: Any) -> tuple[list[Any], Any] | None:
    """Of one of Keras's optimizers, the sums of the gradients of the micro-batches since the last update, and how many.

    The sums are in the order of `known_variables`. Fall-back: None, and nothing is known of the mean of the gradients.
    """
    sums, calls = getattr(optimizer, "_accumulated_gradients", None), getattr(optimizer, "_iterations", None)
    if sums is None or calls is None:
        return None
    return [keras.ops.copy(v) for v in sums], calls % optimizer.gradient_accumulation_steps


def compile_arguments(model: Any) -> dict[str, Any]:
    """What a model was compiled with, the functions and objects themselves.

    Fall-back: the public config, which has no more of a function than its name.
    """
    held = getattr(getattr(model, "_compile_config", None), "config", None)
    return dict(model.get_compile_config() or {}) if held is None else dict(held)


def compiled_metrics(model: Any) -> Any:
    """The metrics that a model was compiled with, as one, which makes theirs when it sees labels and outputs first.

    Fall-back: None, and the first step is traced twice, as Keras has it.
    """
    return getattr(model, "_compile_metrics", None)


def forget_trace(function: Callable[..., Any]) -> None:
    """Makes `jax.jit(function)` trace again the next time that it is called.

    jax.jit keeps its traces by function, and the bound methods of one object are all one to it. As long as something
    holds the old compiled step, the traceback of a failed `fit` for example, a new one would continue with its trace,
    and so with the hyperparameters of then. Of a plain function that lives on, set as an attribute of a model, it keeps
    more, which the public `jax.clear_caches` alone forgets, with every other function. It is the fall-back, too.
    """
    import jax

    if inspect.ismethod(function):
        getattr(jax.jit(function), "clear_cache", jax.clear_caches)()
    else:
        jax.clear_caches()


def schedule_of(optimizer: Any) -> Any:
    """The schedule, or function, that one of Keras's optimizers was given as its learning rate.

    The public attribute is its present value. Fall-back: one made from the config, which is equal but another object.
    """
    held = getattr(optimizer, "_learning_rate", None)
    return keras.saving.deserialize_keras_object(optimizer.get_config()["learning_rate"]) if held is None else held


#: Keras's global attribute with the generator that it draws from where neither a seed nor a generator was given.
_SEED = "global_seed_generator"


def global_seed() -> Any:
    """The state of the generator that Keras draws from where no seed was given; None before it is used.

    Fall-back: None, and unseeded draws (`keras.random.normal(shape)`) are not repeated.
    """
    generator = _global_attribute(_SEED)
    return None if generator is None else keras.ops.convert_to_numpy(generator.state)


def set_global_seed(state: Any) -> None:
    """Sets what `global_seed` returns; None: the next unseeded draw makes a generator, from Python's.

    Fall-back: does nothing.
    """
    try:
        from keras.src.backend.common import global_state
    except ImportError:
        return
    if state is None:
        global_state.set_global_attribute(_SEED, None)
        return
    if global_state.get_global_attribute(_SEED) is None:
        keras.random.uniform(())  # makes one
    global_state.get_global_attribute(_SEED).state.assign(state)


def _global_attribute(name: str) -> Any:
    try:
        from keras.src.backend.common import global_state
    except ImportError:
        return None
    return global_state.get_global_attribute(name)


#: The attributes of Keras's callbacks in which they keep what they know from one epoch, or batch, to the next. Some are
#: private. Fall-back: one that does not exist is left out, and the callback begins with what it begins with.
CALLBACK_STATE = {
    keras.callbacks.CSVLogger: ("keys",),
    keras.callbacks.EarlyStopping: ("wait", "stopped_epoch", "best", "best_weights", "best_epoch"),
    keras.callbacks.History: ("epoch", "history"),
    keras.callbacks.ModelCheckpoint: ("best", "_batches_seen_since_last_saving", "_last_batch_seen"),
    keras.callbacks.ReduceLROnPlateau: ("wait", "best", "cooldown_counter"),
    keras.callbacks.SwapEMAWeights: ("_ema_weights_in_model",),
    keras.callbacks.TensorBoard: ("_global_train_batch", "_global_test_batch"),
}


#: Keras's global attributes in which settings of the user are, and no state of models.
_SETTINGS = (
    "dtype_policy",
    "distribution",
    "custom_objects_scope_dict",
    "safe_mode_saving",
    "flash_attention",
    "interactive_logging",
    "traceback_filtering",
)


def clear_session() -> None:
    """`keras.backend.clear_session`, which frees models and restarts names, with the user's settings kept.

    Keras forgets these, too: a dtype policy of "mixed_bfloat16" would be float32 afterwards. Fall-back: as Keras.
    """
    kept = {name: _global_attribute(name) for name in _SETTINGS}
    keras.backend.clear_session()
    for name, value in kept.items():
        if value is not None:
            from keras.src.backend.common import global_state

            global_state.set_global_attribute(name, value)


def directory_of(oracle: Any) -> str:
    """Where an oracle of KerasTuner keeps its files; its public attributes for that stay None.

    Fall-back: "", and an error about the directory does not name it.
    """
    directory, name = getattr(oracle, "_directory", None), getattr(oracle, "_project_name", None)
    return os.path.join(directory, name) if directory and name else ""  # noqa: PTH118  (as KerasTuner has it)


def with_trials_saved_by(oracle: Any, save: Callable[[str, Any], Any]) -> None:
    """Has an oracle of KerasTuner save its trials with `save(path, trial)`.

    Fall-back: it saves them itself, over the old file, half of which is left where the process ends meanwhile.
    """

    def save_trial(trial: Any) -> None:
        save(f"{oracle._get_trial_dir(trial.trial_id)}/trial.json", trial)

    if hasattr(oracle, "_save_trial") and hasattr(oracle, "_get_trial_dir"):
        oracle._save_trial = save_trial


def compiled_loss(loss: Any, loss_weights: Any = None, output_names: Any = None) -> Callable[[Any, Any], Any]:
    """A function of labels and outputs that computes a loss as a model would that is compiled with it.

    The one of a model has metrics that count what it computes. Fall-back: the loss of a single output.
    """
    try:
        from keras.src.trainers.compile_utils import CompileLoss
    except ImportError:
        return lambda y, outputs: keras.ops.mean(keras.losses.get(loss)(y, outputs))
    return CompileLoss(loss, loss_weights, output_names=output_names)


def losses_inside(compiled: Any) -> list[tuple[tuple[Any, ...], Any, str]]:
    """Of a `compiled_loss` that was called, where the output of each loss is, the loss itself, and its name.

    Fall-back: none, and `inspect` says nothing of labels.
    """
    return [(path, loss, name) for path, loss, _, name in getattr(compiled, "_flat_losses", None) or ()]


def is_decayed(optimizer: Any, variable: Any) -> bool:
    """Whether one of Keras's optimizers with `weight_decay` applies it to a variable.

    Fall-back: True, as without `exclude_from_weight_decay`.
    """
    asked = getattr(optimizer, "_use_weight_decay", None)
    return True if asked is None else bool(asked(variable))
