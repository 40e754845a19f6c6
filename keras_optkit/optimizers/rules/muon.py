"""Muon: momentum whose matrices are orthogonalized."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keras import ops
from keras.optimizers.schedules import LearningRateSchedule as Schedule

from keras_optkit.kernels import KERNEL, TABLE, as_matrices, from_matrices
from keras_optkit.optimizers.keywords import checked_patterns
from keras_optkit.optimizers.optimizer import Optimizer
from keras_optkit.optimizers.rule import (
    Hyper,
    Routed,
    Rule,
    Slots,
    Tensor,
    Value,
    Weight,
    choice,
    count,
    flag,
    number,
)
from keras_optkit.optimizers.rules.adam import AdamRule
from keras_optkit.optimizers.slots import Initial, moment
from keras_optkit.registry import register
from keras_optkit.space import Choice, Float

Polynomial = tuple[float, float, float]

#: Keller Jordan's, in every iteration.
KELLER_JORDAN: Polynomial = (3.4445, -4.7750, 2.0315)

#: Those of Polar Express (arXiv 2505.16932), one for each iteration; the last is repeated.
POLAR_EXPRESS: tuple[Polynomial, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)

#: By how much Polar Express divides all but its last polynomial, so that rounding does not make it diverge.
SAFETY = 1.01


def polynomials(name: str, steps: int) -> tuple[Polynomial, ...]:
    """The polynomials of so many iterations: "keller_jordan" or "polar_express"."""
    if name == "keller_jordan":
        return (KELLER_JORDAN,) * steps
    safe = [(a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in POLAR_EXPRESS[:-1]]
    return tuple([*safe, *[POLAR_EXPRESS[-1]] * steps][:steps])


def orthogonalized(x: Tensor, coefficients: Sequence[Polynomial], epsilon: Any, margin: float = 1.0) -> Tensor:
    """Matrices `(n, rows, columns)` with their singular values brought near 1, by Newton-Schulz iterations.

    `x ← x / ‖x‖`, and then `x ← a x + b (x xᵀ) x + c (x xᵀ)² x`, in the orientation in which `x xᵀ` is the smaller one.
    """
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = ops.transpose(x, (0, 2, 1))
    x = x / ops.maximum(margin * ops.sqrt(ops.sum(x * x, axis=(1, 2), keepdims=True)), epsilon)
    for block in _blocks(coefficients, x.shape[2] / max(x.shape[1], 1)):
        x = _iterated(x, block)
    return ops.transpose(x, (0, 2, 1)) if tall else x


def _blocks(coefficients: Sequence[Polynomial], ratio: float) -> list[Sequence[Polynomial]]:
    """The iterations in blocks that take the fewest products, for matrices with so many columns to a row.

    With n rows and r n columns, a block of k iterations takes 4 r + 8 k - 6 products of n x n matrices (see
    `_iterated`), so that blocks of two or three are cheaper than single iterations where r > 3/2. Since rounding errors
    of `x xᵀ` grow within a block, it is computed again after the second iteration, which has amplified the small
    singular values most, and from there after every third.
    """
    if ratio <= 1.5:
        return [[each] for each in coefficients]
    starts = [0, *range(2, len(coefficients), 3)]
    return [coefficients[i:j] for i, j in zip(starts, [*starts[1:], len(coefficients)], strict=True)]


def _iterated(x: Tensor, block: Sequence[Polynomial]) -> Tensor:
    """Iterations that multiply `x` once, at the end (Gram Newton-Schulz, Dao AI Lab 2026).

    With `g = x xᵀ`, an iteration is `x ← p x`, where `p = a I + b g + c g²` commutes with g: so the next g is `p g p`.
    """
    gram = ops.matmul(x, ops.transpose(x, (0, 2, 1)))
    if len(block) == 1:
        ((a, b, c),) = block
        return a * x + ops.matmul(b * gram + c * ops.matmul(gram, gram), x)
    identity = ops.eye(x.shape[1], dtype=x.dtype)
    product = None
    for place, (a, b, c) in enumerate(block, 1):
        p = a * identity + b * gram + c * ops.matmul(gram, gram)
        product = p if product is None else ops.matmul(p, product)
        if place < len(block):
            gram = ops.matmul(ops.matmul(p, gram), p)
    return ops.matmul(product, x)


def warn_of_unknown_output(rule: Rule, treated: str, option: str) -> None:
    """Warns that the kernel of the last layer is not treated in the way that an option of the rule asks for."""
    name = type(rule).__name__.removesuffix("Rule")
    warnings.warn(
        f"{name} does not know the model, and so neither its last layer, whose kernel {treated} ({option}=True), nor "
        "what kernels are for their layers. Call optimizer.build(model) before the first step, or give "
        f"{option}=False.",
        stacklevel=3,
    )


def patterns(default: tuple[str, ...] | None = None) -> Any:
    """Declares a field of regular expressions of paths."""

    def check(name: str, value: Any) -> tuple[str, ...] | None:
        found = checked_patterns(name, value)
        return None if found is None else tuple(found)

    return dataclasses.field(default=default, metadata={"check": check})


@dataclass(frozen=True)
class MuonRule(Rule):
    """`m ← γ m + (1 - γ) g; θ ← θ - η s orthogonalized(γ m + (1 - γ) g)`, with s by the shape of θ."""

    layout = "whole"
    momentum: Value = number(0.95, 0, 1, closed="left")
    nesterov: bool = flag(True)
    scaling: str = choice("moonlight", ("moonlight", "keller_jordan"))
    coefficients: str = choice("keller_jordan", ("keller_jordan", "polar_express"))
    ns_steps: int = count(5)
    epsilon: Value = number(1e-7)
    adam_lr_ratio: float = number(1.0, fixed=True)
    adam_beta_1: Value = number(0.9, 0, 1, closed="left")
    adam_beta_2: Value = number(0.95, 0, 1, closed="left")
    adam_epsilon: Value = number(1e-8)
    exclude_layers: tuple[str, ...] | None = patterns()
    exclude_embeddings: bool = flag(True)
    exclude_output: bool = flag(True)

    def routes(self) -> Mapping[str, Routed]:
        return {"adam": Routed(AdamRule(self.adam_beta_1, self.adam_beta_2, self.adam_epsilon), self.adam_lr_ratio)}

    def route(self, w: Weight) -> str:
        named = any(re.search(pattern, path) for pattern in self.exclude_layers or () for path in w.paths)
        if w.role == KERNEL and w.output is None and self.exclude_output:
            warn_of_unknown_output(self, "is to be trained by AdamW", "exclude_output")
        table = w.role == TABLE and not self.exclude_embeddings
        matrix = table or (w.role == KERNEL and not (w.output and self.exclude_output))
        return "" if matrix and not named else "adam"

    def slots(self, w: Weight) -> Mapping[str, Initial]:
        return {"m": moment()}

    def looked_ahead(self, u: Tensor, slots: Slots, h: Hyper) -> tuple[Tensor, Tensor]:
        """The momentum to orthogonalize, and the one to keep."""
        gamma = h(self.momentum)
        m = gamma * slots["m"] + (1 - gamma) * u
        return (gamma * m + (1 - gamma) * u if self.nesterov else m), m

    def orthogonal(self, x: Tensor, h: Hyper) -> Tensor:
        """X as orthogonalized matrices."""
        margin = SAFETY if self.coefficients == "polar_express" else 1.0
        steps = polynomials(self.coefficients, self.ns_steps)
        return orthogonalized(as_matrices(x, h.kernel), steps, h(self.epsilon), margin)

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        x, m = self.looked_ahead(u, slots, h)
        done = self.orthogonal(x, h)
        _, rows, columns = done.shape
        scale = 0.2 * max(rows, columns) ** 0.5 if self.scaling == "moonlight" else widening(rows, columns)
        return h.learning_rate * scale * from_matrices(done, x.shape, h.kernel), {"m": m}


def widening(rows: int, columns: int) -> float:
    """Keller Jordan's factor for the shape of a matrix from inputs to outputs: √max(1, outputs / inputs)."""
    return max(1, columns / max(rows, 1)) ** 0.5


@register(
    "optimizer",
    paper="Jordan et al. 2024 (the blog post that names it); Liu et al., arXiv 2502.16982 (scaling by 0.2 √max); "
    "Amsel et al., arXiv 2505.16932 (Polar Express)",
    parity="torch.optim.Muon, without its rounding to bfloat16",
    cases=(
        {"learning_rate": 0.01, "exclude_output": False},
        {
            "learning_rate": 0.02,
            "scaling": "keller_jordan",
            "nesterov": False,
            "momentum": 0.9,
            "adam_lr_ratio": 0.5,
            "exclude_output": False,
        },
        {"learning_rate": 0.01, "coefficients": "polar_express", "ns_steps": 9, "exclude_output": False},
    ),
    space={
        "learning_rate": Float(1e-4, 1e-1, log=True),
        "momentum": Choice([0.9, 0.95, 0.98]),
        "weight_decay": Float(1e-3, 1.0, log=True),
    },
)
class Muon(Optimizer):
    """Muon: momentum whose matrices are orthogonalized; AdamW for all parameters that are not matrices.

    ```text
    m ← γ m + (1 - γ) g
    X = γ m + (1 - γ) g  (nesterov), or m
    O = orthogonalized X: of X = U S Vᵀ about U Vᵀ
    θ ← θ - η s O             s = 0.2 √max(rows, columns)  ("moonlight")
                              s = √max(1, columns / rows)  ("keller_jordan")
    ```

    O is computed by a few iterations of `X ← a X + b (X Xᵀ) X + c (X Xᵀ)² X`, after X has been divided by its norm;
    long or wide matrices go through the same iterations on `X Xᵀ`, which take fewer products. m has the shape of θ and
    starts at 0: half of the state of Adam.

    **Which parameters.** Kernels are orthogonalized as the matrices from inputs to outputs that they are for their
    layers: those of convolutions with the window in the rows, those of attention with all heads in one axis, and
    depthwise, grouped and recurrent ones each map by itself. Vectors (biases, those of attention among them, and the
    scales of normalisations), embeddings and the kernel of the last layer are trained by AdamW, with the rate
    `η adam_lr_ratio` and the same weight decay. `optimizer.explain(model)` shows it. In your own loop, call
    `optimizer.build(model)`: without the model only shapes and names are known, and a warning says so. A group's `rule`
    takes its parameters out altogether: `ok.Group("head", rule="AdamW")`.

    **Which rate.** With "moonlight" steps have the root mean square of those of AdamW, so the rate and decay of a tuned
    AdamW are right. With "keller_jordan" rates are about 0.02, and those of AdamW far smaller (`adam_lr_ratio`).

    When to use it: for transformers and other models that are mostly large kernels, trained from scratch.

    When not to use it: for models of few or small matrices, or to fine-tune weights that Adam has trained.

    Args:
        learning_rate: η >= 0, or a schedule of the update count.
        momentum: γ in [0, 1), or a schedule.
        nesterov: Whether to look one step ahead.
        scaling: `"moonlight"` or `"keller_jordan"`, s above.
        coefficients: a, b and c: `"keller_jordan"`, the same in every iteration, which leaves singular values between
            about 0.7 and 1.2; or `"polar_express"`, others in each iteration, which bring them to 1.
        ns_steps: How many iterations, at least 1.
        epsilon: The least norm that X is divided by.
        adam_lr_ratio: Factor >= 0 on the learning rate of AdamW.
        adam_beta_1: β₁ of AdamW in [0, 1), or a schedule.
        adam_beta_2: β₂ of AdamW in [0, 1), or a schedule.
        adam_epsilon: ε of AdamW >= 0, or a schedule.
        exclude_layers: Regular expressions; kernels whose path matches one are trained by AdamW.
        exclude_embeddings: Whether embeddings are trained by AdamW.
        exclude_output: Whether the kernel of the last layer is trained by AdamW. In a custom model that holds several,
            such as a GAN, it is the last layer of the part that this optimizer trains.
        weight_decay: λ >= 0, a schedule, or None.
        **common: The keywords of every optimizer; see `keras_optkit.optimizers.Optimizer`.

    Raises:
        TypeError: For an unknown keyword or a value of a wrong type.
        ValueError: For a value out of range.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(16, "relu"), keras.layers.Dense(1)])
    optimizer = ok.optimizers.Muon(1e-3)
    model.compile(optimizer=optimizer, loss="mse")
    print(optimizer.explain(model))
    ```
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 0.001,
        momentum: float | Schedule = 0.95,
        nesterov: bool = True,
        scaling: str = "moonlight",
        coefficients: str = "keller_jordan",
        ns_steps: int = 5,
        epsilon: float | Schedule = 1e-7,
        adam_lr_ratio: float = 1.0,
        adam_beta_1: float | Schedule = 0.9,
        adam_beta_2: float | Schedule = 0.95,
        adam_epsilon: float | Schedule = 1e-8,
        exclude_layers: Sequence[str] | None = None,
        exclude_embeddings: bool = True,
        exclude_output: bool = True,
        weight_decay: float | Schedule | None = 0.1,
        **common: Any,
    ):
        rule = MuonRule(
            momentum,
            nesterov,
            scaling,
            coefficients,
            ns_steps,
            epsilon,
            adam_lr_ratio,
            adam_beta_1,
            adam_beta_2,
            adam_epsilon,
            exclude_layers,  # type: ignore[arg-type]
            exclude_embeddings,
            exclude_output,
        )
        super().__init__(learning_rate, rule, weight_decay=weight_decay, **common)
