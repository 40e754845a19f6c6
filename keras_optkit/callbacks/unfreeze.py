"""Training the last layers first, and more and more of the others, in one `fit`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras

from keras_optkit import arguments
from keras_optkit.callbacks.callback import Callback, number
from keras_optkit.fit.optimizers import build_optimizer, make_room
from keras_optkit.fit.run import Run
from keras_optkit.fit.steps import compile_anew
from keras_optkit.optimizers.groups import near_misses
from keras_optkit.optimizers.layer_paths import LayerTree
from keras_optkit.optimizers.of_model import innermost, optimizers_of, ours, update_counter
from keras_optkit.private import known_variables
from keras_optkit.registry import register

Stages = Mapping[int, str | Sequence[str]] | Sequence[tuple[int, str | Sequence[str]]]


@register(
    "callback",
    paper="Howard and Ruder, arXiv 1801.06146, section 3.3 (gradual unfreezing)",
    parity="a fit for each stage, with the flags set by hand",
    cases=({"stages": [[0, [".*"]], [1, [".*"]]]}, {"stages": [[0, [".*"]], [3, [".*"]]], "unit": "update"}),
)
class Unfreeze(Callback):
    """Trains some layers first and unfreezes others later, stage by stage, while the optimizer keeps its state.

    ```python
    import keras_optkit as ok

    unfreeze = ok.callbacks.Unfreeze({0: "head", 3: "block5/", 6: ".*"})
    ```

    trains the layers whose path contains "head" from the beginning, those of block 5 as well from epoch 3 on, counted
    from 0, and all from epoch 6 on. Everything that no stage has reached is frozen.

    A pattern is looked for (`re.search`) in the path of each layer that has weights, with and without a slash at its
    end: the names of the layers that contain it and its own, as in "encoder/block5/conv" or "head". A layer that
    matches is unfrozen with all that is inside it. A layer that is in several places is found under each of its paths,
    and of two layers with one name in one place the second has the path "name_1". These are the paths of
    `keras_optkit.Group`, too, where the name of the variable follows.

    - The state that the optimizer has stays as it is, bitwise, and the learning rate's schedule continues. With the
      optimizers of this package the new weights begin as in an optimizer of their own: with fresh state and, in Adam's
      bias correction, a count of their own. For learning rates that differ between layers give the optimizer `groups`.
    - Keras's optimizers can only train variables that they were built for. They are therefore built for those of all
      stages when `fit` begins, which takes memory from the start, and count the updates of before in their bias
      correction: Adam's first steps for new weights are larger by up to sqrt(1 - beta_2) / (1 - beta_1), about 3. On
      JAX they cannot leave variables out, and `keras.optimizers.MultiOptimizer` nowhere: stages are refused.
    - A model may train with several optimizers in a `train_step` of its own. Those of this package add state for their
      parts of the new variables; those of Keras have to be built for all stages before `fit`.
    - Frozen layers are frozen as Keras does it, by `layer.trainable`: no gradients are computed for them, and
      BatchNormalization uses its moving statistics, and does not update them.
    - The training step is compiled again at each stage.

    The flags are set when `fit` begins and stay as the last stage has set them, also when an exception ends it: they
    are what the optimizer's state belongs to, and what is saved with the model. Another `fit` begins with the stage
    of its `initial_epoch`, and so freezes layers again that have been trained; with `unit="update"` it continues.

    When not to use it: to train all layers from the beginning at different rates; use `groups` for that.

    Args:
        stages: When to pattern, or to a list of patterns, as a dict or a list of pairs. One stage must begin at 0.
        unit: What stages are counted in: `"epoch"`, or `"update"` of the weights, which may be more or fewer than
            batches; of several optimizers those of the one with most updates count. It is checked before each batch, so
            that `fit` waits for each step until the last stage has begun. With `steps_per_execution=k` a stage begins
            with the first k batches before which its number of updates is reached.
        verbose: 1 prints when a stage begins, 0 is silent.

    Attributes:
        stage: The number of the present stage, from 0 on; None before the first `fit`.

    Raises:
        TypeError: For a value of a wrong type.
        ValueError: For a value out of range; when `fit` begins, for a model that is not built, a pattern that matches
            no layer, with those that come near it, an optimizer that cannot train the stages, or with
            `unit="update"` a model without an optimizer.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    x = keras.random.normal((64, 4), seed=0)
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(8, name="body"), keras.layers.Dense(1, name="head")]
    )
    body = ok.Group("body/", lr_scale=0.1)  # which is frozen in the first stage
    model.compile(ok.optimizers.AdamW(1e-2, groups=[body]), loss="mse")
    unfreeze = ok.callbacks.Unfreeze({0: "head", 2: ".*"}, verbose=1)
    model.fit(x, x[:, :1], epochs=4, callbacks=[unfreeze], verbose=0)
    ```
    """

    def __init__(self, stages: Stages, unit: str = "epoch", verbose: int = 0):
        super().__init__()
        self.stages = _checked_stages(stages)
        self.unit = arguments.choice("unit", unit, ("epoch", "update"))
        self.verbose = arguments.choice("verbose", verbose, (0, 1))
        self.stage: int | None = None
        self._layers: _Layers | None = None

    def prepare_fit(self, run: Run) -> None:
        """Called when `fit` begins, before the optimizer is built: sets the flags of the first stage."""
        model = run.model
        if not getattr(model, "compiled", False):
            return  # let Keras report it
        if not model.built:
            raise ValueError(
                f"Unfreeze needs a model that is built, got {model.name!r}. Give it an Input, or call it on a batch."
            )
        optimizers = optimizers_of(model)
        if self.unit == "update" and not optimizers:
            raise ValueError(f"unit must be 'epoch' for {model.name!r}, which has no optimizer that counts updates.")
        layers = _Layers(model)
        for pattern in self._patterns(len(self.stages)):
            layers.refuse_unless_matched(pattern)
        self._layers = layers
        begun = any(optimizer.built for optimizer in optimizers)
        for optimizer in optimizers:
            self._make_room(model, optimizer)
        # a new optimizer begins with the variables of the first stage, also where Resume is to restore a later one
        self.stage = self._stage_at(self._now(run) if begun else 0)
        layers.train_only(self._patterns(self.stage))

    def _make_room(self, model: Any, optimizer: Any) -> None:
        """Builds an optimizer that cannot take more variables later for those of all stages, or refuses it."""
        assert self._layers is not None
        multi, jax = isinstance(optimizer, keras.optimizers.MultiOptimizer), keras.config.backend() == "jax"
        around = innermost(optimizer) != [optimizer]
        if ours(optimizer) == innermost(optimizer) and not (around and (multi or jax)):
            return
        self._layers.train_only(self._patterns(0))
        first = len(model.trainable_variables)
        self._layers.train_only(self._patterns(len(self.stages)))
        variables, why = model.trainable_variables, None
        if (multi or jax) and first < len(variables):
            why = f"updates all of its variables at once{' on JAX' if jax else ''}"
        if optimizer is not getattr(model, "optimizer", None):  # it is for a part, and only its owner knows which
            if not optimizer.built:
                why = "has to be built, for the variables of all stages, before `fit`"
        else:
            build_optimizer(model)
            known = [known_variables(inner) for inner in innermost(optimizer)]
            theirs = {id(v) for each in known for v in each or ()}
            if len(optimizers_of(model)) == 1 and None not in known and {id(v) for v in variables} - theirs:
                why = "was built for fewer variables"
        if why is not None:
            raise ValueError(
                f"stages cannot be trained by this {type(optimizer).__name__}, which {why}. Compile the model with one "
                "of keras_optkit.optimizers; on JAX without loss scaling."
            )

    def _now(self, run: Run) -> int:
        """Where training stands when `fit` begins, in the unit of the stages."""
        return number(update_counter(run.model)) if self.unit == "update" else run.arguments.get("initial_epoch", 0)

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002, D102
        if self._layers is None:
            raise RuntimeError(
                "Unfreeze works in the `fit` of keras.Model alone, before which it sets its first stage."
            )
        compile_anew(self.model)  # the step of an earlier fit trains what was trained then

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002, D102
        if self.unit == "epoch":
            self._enter(self._stage_at(epoch))

    def on_train_batch_begin(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002, D102
        # a batch may make no update, or several, so that the count is looked at before each until the last stage
        if self.unit == "update" and self.stage != len(self.stages) - 1:
            self._enter(self._stage_at(self._updates()))

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002, D102
        self._layers = None

    def on_train_failure(self, error: BaseException) -> None:  # noqa: ARG002, D102
        self._layers = None

    def _stage_at(self, now: int) -> int:
        return sum(when <= now for when in self.stages) - 1

    def _patterns(self, stage: int) -> list[str]:
        """Those of all stages up to this one."""
        return [pattern for patterns in list(self.stages.values())[: stage + 1] for pattern in patterns]

    def _enter(self, stage: int) -> None:
        if stage == self.stage:
            return
        assert self._layers is not None
        model = self.model  # asked for it, Keras on JAX fills the variables
        self.stage = stage
        self._layers.train_only(self._patterns(stage))
        make_room(model)
        compile_anew(model)
        if self.verbose:
            print(f"{type(self).__name__}: stage {stage}, {len(model.trainable_variables)} variables are trained.")

    def _config_value(self, name: str) -> Any:
        if name == "stages":  # pairs, since keys of JSON are strings
            return [[when, list(patterns)] for when, patterns in self.stages.items()]
        return getattr(self, name)

    def state_dict(self) -> dict[str, Any]:
        """The present stage."""
        return {"stage": self.stage}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Sets the flags of that stage, and makes room for its variables in the optimizer.

        Args:
            state: What `state_dict` returned.
        """
        self._enter(state["stage"])


class _Layers:
    """The layers of a model that have weights, at any depth."""

    def __init__(self, model: Any):
        self._model = model
        self._tree = LayerTree.of(model)
        nodes = [node for node in self._tree.nodes if node.layer.weights]
        self._inside = {id(node): [n for n in node.all_inside().values() if n.layer.weights] for node in nodes}
        # outer ones first, also of layers that are in several places: a layer's flag decides about all inside it
        self._nodes = sorted(nodes, key=lambda node: -len(self._inside[id(node)]))
        self._own = [v for v in model.weights if self._tree.layer_of(v) is self._tree.root]

    def refuse_unless_matched(self, pattern: str) -> None:
        """Raises if a pattern matches nothing."""
        if not self._matching(pattern) and not any(self._matches_own(pattern, v) for v in self._own):
            paths = [path for node in self._nodes for path in node.paths]
            raise ValueError(
                f"stages: the pattern {pattern!r} matches none of the {len(self._nodes)} layers with weights. "
                f"Nearest: {', '.join(map(repr, near_misses(pattern, paths)))}."
            )

    def _matching(self, pattern: str) -> list[Any]:
        return [node for node in self._tree.matching(pattern) if id(node) in self._inside]

    def _matches_own(self, pattern: str, variable: Any) -> bool:
        """Whether a pattern matches a weight of the model that is in none of its layers."""
        return any(re.search(pattern, path) for path in self._tree.paths_of(variable))

    def train_only(self, patterns: Iterable[str]) -> None:
        """Makes the layers that match trainable, with all inside them, and no others."""
        patterns = list(patterns)
        matching = [node for pattern in patterns for node in self._matching(pattern)]
        chosen = {id(each) for node in matching for each in [node, *self._inside[id(node)]]}
        _set_trainable(self._model, True)
        for variable in self._own:
            if variable.trainable:
                variable.trainable = any(self._matches_own(pattern, variable) for pattern in patterns)
        for node in self._nodes:
            inside, layer = self._inside[id(node)], node.layer
            trainable = id(node) in chosen or any(id(inner) in chosen for inner in inside)
            _set_trainable(layer, trainable)
            if trainable and id(node) not in chosen:  # only because of a layer inside
                theirs = {id(v) for inner in inside for v in inner.layer.weights}
                for variable in layer.trainable_variables:
                    variable.trainable = id(variable) in theirs


def _set_trainable(layer: Any, trainable: bool) -> None:
    # the other one first: on TensorFlow, a flag that is set to what it is does not reach the weights
    layer.trainable = not trainable
    layer.trainable = trainable


def _checked_stages(stages: Any) -> dict[int, list[str]]:
    try:
        pairs = list(stages.items() if isinstance(stages, Mapping) else ((when, which) for when, which in stages))
    except (TypeError, ValueError):
        raise TypeError(f"stages must be a dict of when to pattern, or a list of such pairs, got {stages!r}.") from None
    found: dict[int, list[str]] = {}
    for when, which in pairs:
        arguments.integer("stages: when", when, 0)
        if when in found:
            raise ValueError(f"stages must begin at different times, got {when} twice.")
        given = which if isinstance(which, list | tuple) else [which]
        found[int(when)] = [arguments.pattern(f"stages[{when}]", pattern) for pattern in given]
        if not given:
            raise ValueError(f"stages[{when}] must have a pattern, got {which!r}.")
    if 0 not in found:
        raise ValueError(f"stages must have one that begins at 0, got {sorted(found) or 'none'}.")
    return dict(sorted(found.items()))
