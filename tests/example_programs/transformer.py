"""A subclassed transformer for short texts, whose layers are made in `__init__` and built by the first step."""

import keras
import numpy as np
from keras import layers, ops

import keras_optkit as ok

SOURCE = "keras-core examples/keras_io/tensorflow/nlp/text_classification_with_transformer.py"


class Embedded(layers.Layer):
    def __init__(self, length, words, width):
        super().__init__()
        self.tokens, self.places = layers.Embedding(words, width), layers.Embedding(length, width)

    def call(self, x):
        return self.tokens(x) + self.places(ops.arange(ops.shape(x)[-1]))


class Block(layers.Layer):
    def __init__(self, width, heads, inner, rate=0.1):
        super().__init__()
        self.attention = layers.MultiHeadAttention(heads, width)
        self.inner = keras.Sequential([layers.Dense(inner, "relu"), layers.Dense(width)])
        self.normals = [layers.LayerNormalization(epsilon=1e-6) for _ in range(2)]
        self.dropouts = [layers.Dropout(rate) for _ in range(2)]

    def call(self, x, training=False):
        x = self.normals[0](x + self.dropouts[0](self.attention(x, x), training=training))
        return self.normals[1](x + self.dropouts[1](self.inner(x), training=training))


class Classifier(keras.Model):
    def __init__(self):
        super().__init__()
        self.embedded, self.block = Embedded(10, 50, 8), Block(8, 2, 16)
        self.pool, self.out = layers.GlobalAveragePooling1D(), layers.Dense(2, "softmax")

    def call(self, x, training=False):
        return self.out(self.pool(self.block(self.embedded(x), training=training)))


def train(tools):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 50, (80, 10)), rng.integers(0, 2, 80)
    model = Classifier()
    model.compile(tools.adam(1e-3), loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    data = ok.data.Shuffled(x, y, batch_size=16, seed=5)
    model.fit(data, epochs=3, validation_data=(x[:16], y[:16]), callbacks=tools.callbacks(), verbose=0)
    return model
