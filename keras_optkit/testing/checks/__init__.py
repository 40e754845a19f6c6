"""The checks, one module a kind of thing. Importing this package registers them."""

from keras_optkit.testing.checks import callbacks, initializers, layers, optimizers, regularizers, schedules, transforms

__all__ = ["callbacks", "initializers", "layers", "optimizers", "regularizers", "schedules", "transforms"]
