"""The contract of a transform: a frozen dataclass of hyperparameters with one method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from keras_optkit import arguments
from keras_optkit.kernels import KERNEL, TABLE
from keras_optkit.optimizers.rule import LAYOUTS, Fields, Hyper, Rule, Tensor
from keras_optkit.saving import FromSignature

#: What a transform may change: the gradient before the rule sees it, or the step that the rule makes of it.
CHANGES = ("gradient", "step")


@dataclass(frozen=True)
class Transform(FromSignature, Fields):
    """Base of the transforms, which any optimizer is given as `transforms=[...]`.

    A subclass is a frozen dataclass whose fields are made with `number`, `count`, `choice` and `flag`, as those of a
    rule are, and has one method, `change`. It is registered with `keras.saving.register_keras_serializable`, so that a
    saved optimizer finds it again. Those of gradients are applied one after the other to gradients that are unscaled,
    summed over replicas and accumulated; then comes the rule, then those of steps in their order, then the decay.

    When not to use it: for what keeps state for each parameter or turns gradients into steps, which is a `Rule`.

    Attributes:
        changes: "gradient" or "step".
        layout: As that of a rule: what `change` is handed, and whether it may ask for `h.sum` and `h.mean`. With
            "whole" there is a leading axis, `(k, *shape)`, and `h.role` and `h.kernel` say what the parameters are.
        rows: Whether `change` of some rows of an embedding is what it is for all of them, the others having gradients
            of zeros. If not, `sparse="lazy"` is as `"dense"`, and so it is with those of steps that are not
            element-wise.
        handles_decay: Of one that changes steps, whether it subtracts the decoupled decay `η λ θ` itself.

    Example:
    ```python
    from dataclasses import dataclass

    import keras
    import keras_optkit as ok


    @keras.saving.register_keras_serializable("mine")
    @dataclass(frozen=True)
    class Scale(ok.optimizers.transforms.Transform):
        factor: float = ok.optimizers.number(1.0)

        def change(self, u, p, h):
            return h(self.factor) * u


    optimizer = ok.optimizers.SGD(0.1, transforms=[Scale(0.5)])
    ```
    """

    changes: ClassVar[str] = "gradient"
    layout: ClassVar[str] = "elementwise"
    rows: ClassVar[bool] = True
    handles_decay: ClassVar[bool] = False

    def contribute(self, u: Tensor, p: Tensor, h: Hyper) -> dict[str, Tensor]:
        """The terms, by name, whose sums over all parameters with a gradient `change` finds in `h.totals`.

        For transforms of gradients. Tensors in the shape of `u`, not summed yet. The sums are in the dtype for scalars;
        cast them with `ops.cast(h.totals[name], u.dtype)`.
        """
        return {}

    def change(self, u: Tensor, p: Tensor, h: Hyper) -> Tensor:
        """Returns the replacement for `u`.

        Args:
            u: Gradients; or steps, with the learning rate in them, which are subtracted from the parameters.
            p: The parameters before the step.
            h: What a rule is told, and also `totals`, `role` and (for steps) the `gradient` that the rule was given.

        Returns:
            A tensor in the shape and dtype of `u`.
        """
        raise NotImplementedError

    def changed(self, u: Tensor, p: Tensor, h: Hyper) -> Tensor:
        """What `change` returns, and raises if it is not a tensor in the shape of `u`."""
        found = self.change(u, p, h)
        if found is None or tuple(found.shape) != tuple(u.shape):
            got = None if found is None else f"the shape {tuple(found.shape)}"
            raise ValueError(f"{type(self).__name__}.change must return the shape {tuple(u.shape)} of u, got {got}.")
        return found


def unit_axes(h: Hyper, rank: int) -> tuple[int, ...]:
    """The axes of one unit's weights in a tensor in the layout "whole".

    A unit is an output of a kernel, with all its inputs and window, a row of an embedding, or else a whole parameter.
    """
    if h.role == KERNEL and h.kernel is not None:
        return tuple(axis + 1 for axis in h.kernel.inputs)
    return tuple(range(2 if h.role == TABLE else 1, rank))


def checked_transforms(transforms: Any) -> tuple[Transform, ...] | None:
    """Returns the argument `transforms` as a tuple, and raises if it is not a list of Transforms.

    Raises:
        TypeError: If it is not a list, or has something else in it.
        ValueError: If one that handles the decay is not of steps, or not the last of them; if one of steps contributes.
    """
    if transforms is None:
        return None
    if not isinstance(transforms, Sequence) or not all(isinstance(t, Transform) for t in transforms):
        raise TypeError(
            "transforms must be a list of instances of keras_optkit.optimizers.transforms.Transform or None, got "
            f"{transforms!r}."
        )
    for transform in transforms:
        name = type(transform).__name__
        arguments.choice(f"layout of {name}", transform.layout, LAYOUTS)
        arguments.choice(f"changes of {name}", transform.changes, CHANGES)
        if transform.handles_decay and transform.changes != "step":
            raise ValueError(f"transforms: {transform!r} says handles_decay, which is for those with changes = 'step'.")
        if transform.changes == "step" and type(transform).contribute is not Transform.contribute:
            raise ValueError(f"transforms: {transform!r} changes steps; `contribute` is for those of gradients.")
    steps = [t for t in transforms if t.changes == "step"]
    for transform in steps[:-1]:
        if transform.handles_decay:
            raise ValueError(
                f"transforms: {transform!r} subtracts the decay and must be the last one of steps, got {steps!r}."
            )
    return tuple(transforms)


def refuse_unless_for(transforms: Sequence[Transform], rule: Rule) -> None:
    """Raises if the steps of a rule cannot be changed.

    Raises:
        ValueError: If the rule averages, so that its state says where a step leads, or if rule and transform both
            subtract the decay.
    """
    for transform in transforms:
        if transform.changes == "step" and rule.averages:
            raise ValueError(
                f"transforms: {transform!r} changes steps, and those of {type(rule).__name__}, which averages by "
                "itself, must lead to the weights that its state says."
            )
        if transform.handles_decay and rule.handles_decay:
            raise ValueError(
                f"transforms: {transform!r} subtracts the decay, and {type(rule).__name__} does so itself."
            )
