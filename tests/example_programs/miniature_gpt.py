"""A language model with causal attention and two outputs, one of them without a loss."""

import keras
import numpy as np
from keras import layers, ops

import keras_optkit as ok

SOURCE = "keras-core examples/keras_io/generative/text_generation_with_miniature_gpt.py"

WORDS, LENGTH, WIDTH = 30, 12, 8


class Tokens(layers.Layer):
    def __init__(self):
        super().__init__()
        self.words, self.places = layers.Embedding(WORDS, WIDTH), layers.Embedding(LENGTH, WIDTH)

    def call(self, x):
        return self.words(x) + self.places(ops.arange(0, ops.shape(x)[-1], 1))


def train(tools):
    inputs = keras.Input((LENGTH,), dtype="int32")
    x = Tokens()(inputs)
    attended = layers.Dropout(0.1)(layers.MultiHeadAttention(2, WIDTH)(x, x, use_causal_mask=True))
    x = layers.LayerNormalization(epsilon=1e-6)(x + attended)
    x = layers.LayerNormalization(epsilon=1e-6)(x + layers.Dense(WIDTH)(layers.Dense(16, "relu")(x)))
    model = keras.Model(inputs, [layers.Dense(WORDS)(x), x])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(tools.adam(1e-3), loss=[loss, None])
    text = np.random.default_rng(0).integers(0, WORDS, (64, LENGTH + 1))
    data = ok.data.Shuffled(text[:, :-1], text[:, 1:], batch_size=16, seed=10)
    model.fit(data, epochs=3, callbacks=tools.callbacks(), verbose=0)
    return model
