"""Optimizers: drop-in subclasses of `keras.optimizers.Optimizer`, each one update rule on a common engine."""

from keras_optkit.optimizers import transforms
from keras_optkit.optimizers.engine.nonfinite import Nonfinite
from keras_optkit.optimizers.explain import Explanation
from keras_optkit.optimizers.groups import Group
from keras_optkit.optimizers.loss_scale import LossScale
from keras_optkit.optimizers.optimizer import Optimizer
from keras_optkit.optimizers.rule import Hyper, Routed, Rule, Weight, Wrapper, choice, count, flag, number
from keras_optkit.optimizers.rules.adam import Adam, AdamW
from keras_optkit.optimizers.rules.adam_family import AdaBelief, Adan, NAdam, RAdam
from keras_optkit.optimizers.rules.adaptive import Adagrad, RMSprop
from keras_optkit.optimizers.rules.betting import COCOB
from keras_optkit.optimizers.rules.compact import CAME, SM3, AdamMini
from keras_optkit.optimizers.rules.distance import DoG, DoWG
from keras_optkit.optimizers.rules.layerwise import LAMB, LARS, NovoGrad
from keras_optkit.optimizers.rules.lookahead import Lookahead
from keras_optkit.optimizers.rules.low_rank import APOLLO
from keras_optkit.optimizers.rules.lr_free import Prodigy
from keras_optkit.optimizers.rules.memory import Adafactor
from keras_optkit.optimizers.rules.muon import Muon
from keras_optkit.optimizers.rules.sam import SAM
from keras_optkit.optimizers.rules.schedule_free import ScheduleFree, ScheduleFreeAdamW, ScheduleFreeSGD
from keras_optkit.optimizers.rules.schedule_free_radam import ScheduleFreeRAdam
from keras_optkit.optimizers.rules.sgd import SGD
from keras_optkit.optimizers.rules.sign import Lion
from keras_optkit.optimizers.rules.soap import SOAP
from keras_optkit.optimizers.slots import shaped, weights_copy

__all__ = [
    "APOLLO",
    "CAME",
    "COCOB",
    "LAMB",
    "LARS",
    "SAM",
    "SGD",
    "SM3",
    "SOAP",
    "AdaBelief",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamMini",
    "AdamW",
    "Adan",
    "DoG",
    "DoWG",
    "Explanation",
    "Group",
    "Hyper",
    "Lion",
    "Lookahead",
    "LossScale",
    "Muon",
    "NAdam",
    "Nonfinite",
    "NovoGrad",
    "Optimizer",
    "Prodigy",
    "RAdam",
    "RMSprop",
    "Routed",
    "Rule",
    "ScheduleFree",
    "ScheduleFreeAdamW",
    "ScheduleFreeRAdam",
    "ScheduleFreeSGD",
    "Weight",
    "Wrapper",
    "choice",
    "count",
    "flag",
    "number",
    "shaped",
    "transforms",
    "weights_copy",
]
