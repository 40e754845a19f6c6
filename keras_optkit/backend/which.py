"""Which backend there is."""

from __future__ import annotations

import keras

TENSORFLOW = keras.config.backend() == "tensorflow"
