"""The same as `keras_optkit.space`, whose name this was."""

from keras_optkit.space import Bool, Choice, Float, Int, Parameter, Points, Space, Values

__all__ = ["Bool", "Choice", "Float", "Int", "Parameter", "Points", "Space", "Values"]
