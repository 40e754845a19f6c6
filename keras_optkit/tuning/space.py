"""The same as `keras_optkit.space`, whose name this was."""

from keras_optkit.space import Choice, Float, Int, Parameter, Points, Space, Values

__all__ = ["Choice", "Float", "Int", "Parameter", "Points", "Space", "Values"]
