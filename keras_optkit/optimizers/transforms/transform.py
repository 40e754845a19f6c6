"""The contract of a transform: a frozen dataclass of hyperparameters with one method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from keras_optkit import arguments
from keras_optkit.kernels import KERNEL, TABLE
from keras_optkit.optimizers.rule import LAYOUTS, Fields, Hyper, Rule, Tensor
from keras_optkit.saving import FromSignature

#: What a transform may change: the gradient before the rule sees it, or the step that the rule returns.
CHANGES = ("gradient", "step")


@dataclass(frozen=True)
class Transform(FromSignature, Fields):
    """Base class of transforms, which are passed to any optimizer as `transforms=[...]`.

    A subclass is a frozen dataclass whose fields are made with `number`, `count`, `choice` and `flag`, like those of a
    rule, with one method, `change`. Register it with `keras.saving.register_keras_serializable`, so that a saved
    optimizer can find it. Transforms of gradients are applied in list order to gradients that are unscaled, summed over
    replicas and accumulated; then comes the rule, then the transforms of steps in list order, then the decay.

    When not to use it: to keep state for each parameter, or to turn gradients into steps; write a `Rule` for that.

    Attributes:
        changes: "gradient" or "step".
        layout: As for a rule: which tensors `change` is given, and whether it may call `h.sum` and `h.mean`. With
            "whole" there is a leading axis, `(k, *shape)`, and `h.role` and `h.kernel` describe the parameters.
        rows: Whether `change` gives the same result for some rows of an embedding as for all of them, where the others
            have gradients of zero. If not, `sparse="lazy"` becomes `"dense"`, as it does with transforms of steps
            that are not element-wise.
        handles_decay: For a transform of steps, whether it subtracts the decoupled decay `η λ θ` itself.

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
        """Returns terms, by name, whose sums over all parameters with a gradient `change` finds in `h.totals`.

        For transforms of gradients only. The terms are in the shape of `u`, not summed. The sums are in the dtype for
        scalars; cast them with `ops.cast(h.totals[name], u.dtype)`.
        """
        return {}

    def change(self, u: Tensor, p: Tensor, h: Hyper) -> Tensor:
        """Returns the replacement for `u`.

        Args:
            u: Gradients; or steps, including the learning rate, which are subtracted from the parameters.
            p: The parameters before the step.
            h: The same as for a rule, with `totals`, `role` and (for steps) the `gradient` that the rule was given.

        Returns:
            A tensor in the shape and dtype of `u`.
        """
        raise NotImplementedError

    def changed(self, u: Tensor, p: Tensor, h: Hyper) -> Tensor:
        """Returns the result of `change`, and raises if it is not a tensor in the shape of `u`."""
        found = self.change(u, p, h)
        if found is None or tuple(found.shape) != tuple(u.shape):
            got = None if found is None else f"the shape {tuple(found.shape)}"
            raise ValueError(f"{type(self).__name__}.change must return the shape {tuple(u.shape)} of u, got {got}.")
        return found


def unit_axes(h: Hyper, rank: int) -> tuple[int, ...]:
    """The axes of one unit's weights in a tensor of the layout "whole".

    A unit is an output of a kernel with all its inputs and window, a row of an embedding, or else a whole parameter.
    """
    if h.role == KERNEL and h.kernel is not None:
        return tuple(axis + 1 for axis in h.kernel.inputs)
    return tuple(range(2 if h.role == TABLE else 1, rank))


def checked_transforms(transforms: Any) -> tuple[Transform, ...] | None:
    """Returns the argument `transforms` as a tuple, and raises if it is not a list of Transforms.

    Raises:
        TypeError: If it is not a list of Transforms.
        ValueError: If a transform that handles the decay is not the last one of steps; if one of steps contributes.
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
            raise ValueError(f"transforms: {transform!r} sets handles_decay, which requires changes = 'step'.")
        if transform.changes == "step" and type(transform).contribute is not Transform.contribute:
            raise ValueError(f"transforms: {transform!r} changes steps; `contribute` is for transforms of gradients.")
    steps = [t for t in transforms if t.changes == "step"]
    for transform in steps[:-1]:
        if transform.handles_decay:
            raise ValueError(
                f"transforms: {transform!r} subtracts the decay and must be the last transform of steps, got {steps!r}."
            )
    return tuple(transforms)


def refuse_unless_for(transforms: Sequence[Transform], rule: Rule) -> None:
    """Raises if the steps of a rule cannot be changed.

    Raises:
        ValueError: If the rule averages, so that its state determines where a step leads, or if rule and transform
            both subtract the decay.
    """
    for transform in transforms:
        if transform.changes == "step" and rule.averages:
            raise ValueError(
                f"transforms: {transform!r} changes steps, but {type(rule).__name__} averages weights, and its state "
                "determines where a step leads."
            )
        if transform.handles_decay and rule.handles_decay:
            raise ValueError(
                f"transforms: {transform!r} subtracts the decay, but {type(rule).__name__} does so itself."
            )
