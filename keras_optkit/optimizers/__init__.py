"""Optimizers: drop-in subclasses of `keras.optimizers.Optimizer`, each one update rule on a common engine."""

from keras_optkit.optimizers.adam import Adam, AdamW
from keras_optkit.optimizers.adaptive import Adagrad, RMSprop
from keras_optkit.optimizers.engine.nonfinite import Nonfinite
from keras_optkit.optimizers.explain import Explanation
from keras_optkit.optimizers.groups import Group
from keras_optkit.optimizers.loss_scale import LossScale
from keras_optkit.optimizers.optimizer import Optimizer
from keras_optkit.optimizers.rule import Hyper, Rule, flag, number
from keras_optkit.optimizers.sgd import SGD
from keras_optkit.optimizers.wrappers import Lookahead, ScheduleFree, ScheduleFreeAdamW, ScheduleFreeSGD

__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "Explanation",
    "Group",
    "Hyper",
    "Lookahead",
    "LossScale",
    "Nonfinite",
    "Optimizer",
    "RMSprop",
    "Rule",
    "ScheduleFree",
    "ScheduleFreeAdamW",
    "ScheduleFreeSGD",
    "flag",
    "number",
]
