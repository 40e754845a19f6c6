"""Which backend Keras uses."""

from __future__ import annotations

import keras

TENSORFLOW = keras.config.backend() == "tensorflow"
