"""A search space as plain data: what may vary, within which range, and under which condition."""

from keras_optkit.space.parameters import Bool, Choice, Float, Int, Parameter, Points, Values
from keras_optkit.space.space import Space

__all__ = ["Bool", "Choice", "Float", "Int", "Parameter", "Points", "Space", "Values"]
