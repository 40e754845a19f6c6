"""NumPy twins of Shampoo and its relatives."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from keras_optkit.testing.twins.structured import soap

TWINS: dict[str, Callable[..., Iterator[Any]]] = {"KLSOAP": functools.partial(soap, kl=True)}
