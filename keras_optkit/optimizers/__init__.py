"""Optimizers: drop-in subclasses of `keras.optimizers.Optimizer`, each one update rule on a common engine."""

from keras_optkit.optimizers import transforms
from keras_optkit.optimizers.engine.nonfinite import Nonfinite
from keras_optkit.optimizers.explain import Explanation
from keras_optkit.optimizers.groups import Group
from keras_optkit.optimizers.loss_scale import LossScale
from keras_optkit.optimizers.optimizer import Optimizer
from keras_optkit.optimizers.random_numbers import RandomVector
from keras_optkit.optimizers.rule import Hyper, Routed, Rule, Weight, Wrapper, choice, count, flag, number
from keras_optkit.optimizers.rules.adam import Adam, AdamW
from keras_optkit.optimizers.rules.adam_family import AdaBelief, Adan, NAdam, RAdam
from keras_optkit.optimizers.rules.adaptive import Adagrad, RMSprop
from keras_optkit.optimizers.rules.betting import COCOB
from keras_optkit.optimizers.rules.classic import Adadelta, Adamax, Ftrl, Rprop
from keras_optkit.optimizers.rules.compact import CAME, SM3, AdamMini
from keras_optkit.optimizers.rules.curvature import AdaHessian, SophiaH
from keras_optkit.optimizers.rules.distance import DoG, DoWG
from keras_optkit.optimizers.rules.dual_averaging import MADGRAD
from keras_optkit.optimizers.rules.ema_nesterov import EMANesterov
from keras_optkit.optimizers.rules.kron import Kron
from keras_optkit.optimizers.rules.layerwise import LAMB, LARS, NovoGrad
from keras_optkit.optimizers.rules.lookahead import Lookahead
from keras_optkit.optimizers.rules.low_rank import APOLLO
from keras_optkit.optimizers.rules.lr_free import Prodigy
from keras_optkit.optimizers.rules.memory import Adafactor
from keras_optkit.optimizers.rules.mixed_momentum import MARS, AdEMAMix
from keras_optkit.optimizers.rules.muon import Muon
from keras_optkit.optimizers.rules.muon_family import AdaMuon, NorMuon, Scion
from keras_optkit.optimizers.rules.projected import SGDP, AdamP
from keras_optkit.optimizers.rules.proximal import ConditionalGradient, ProximalAdagrad
from keras_optkit.optimizers.rules.sam import ASAM, GSAM, SAM
from keras_optkit.optimizers.rules.schedule_free import ScheduleFree, ScheduleFreeAdamW, ScheduleFreeSGD
from keras_optkit.optimizers.rules.schedule_free_radam import ScheduleFreeRAdam
from keras_optkit.optimizers.rules.second_moment import ADOPT, LaProp, StableAdamW, Yogi
from keras_optkit.optimizers.rules.sgd import SGD
from keras_optkit.optimizers.rules.shampoo import Shampoo
from keras_optkit.optimizers.rules.sign import Lion, Signum
from keras_optkit.optimizers.rules.soap import KLSOAP, SOAP
from keras_optkit.optimizers.slots import moment, shaped, weights_copy

__all__ = [
    "ADOPT",
    "APOLLO",
    "ASAM",
    "CAME",
    "COCOB",
    "GSAM",
    "KLSOAP",
    "LAMB",
    "LARS",
    "MADGRAD",
    "MARS",
    "SAM",
    "SGD",
    "SGDP",
    "SM3",
    "SOAP",
    "AdEMAMix",
    "AdaBelief",
    "AdaHessian",
    "AdaMuon",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamMini",
    "AdamP",
    "AdamW",
    "Adamax",
    "Adan",
    "ConditionalGradient",
    "DoG",
    "DoWG",
    "EMANesterov",
    "Explanation",
    "Ftrl",
    "Group",
    "Hyper",
    "Kron",
    "LaProp",
    "Lion",
    "Lookahead",
    "LossScale",
    "Muon",
    "NAdam",
    "Nonfinite",
    "NorMuon",
    "NovoGrad",
    "Optimizer",
    "Prodigy",
    "ProximalAdagrad",
    "RAdam",
    "RMSprop",
    "RandomVector",
    "Routed",
    "Rprop",
    "Rule",
    "ScheduleFree",
    "ScheduleFreeAdamW",
    "ScheduleFreeRAdam",
    "ScheduleFreeSGD",
    "Scion",
    "Shampoo",
    "Signum",
    "SophiaH",
    "StableAdamW",
    "Weight",
    "Wrapper",
    "Yogi",
    "choice",
    "count",
    "flag",
    "moment",
    "number",
    "shaped",
    "transforms",
    "weights_copy",
]
