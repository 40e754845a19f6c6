"""Two images to one distance: a shared tower, a list of inputs, a contrastive loss."""

import keras
import numpy as np
from keras import ops

import keras_optkit as ok

SOURCE = "keras-io examples/vision/siamese_contrastive.py"


def distance(pair):
    x, y = pair
    return ops.sqrt(ops.maximum(ops.sum(ops.square(x - y), axis=1, keepdims=True), keras.config.epsilon()))


def contrastive(y_true, y_pred):
    return ops.mean((1 - y_true) * ops.square(y_pred) + y_true * ops.square(ops.maximum(1 - y_pred, 0)))


def train(tools):
    layers = keras.layers
    tower = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.BatchNormalization(),
            layers.Conv2D(4, 3, activation="tanh"),
            layers.AveragePooling2D(2),
            layers.Flatten(),
            layers.Dense(6, activation="tanh"),
        ]
    )
    inputs = [keras.Input((8, 8, 1)), keras.Input((8, 8, 1))]
    merged = layers.Lambda(distance, output_shape=(1,))([tower(x) for x in inputs])
    model = keras.Model(inputs, layers.Dense(1, "sigmoid")(layers.BatchNormalization()(merged)))
    model.compile(tools.adam(1e-3), loss=contrastive, metrics=["accuracy"])
    rng = np.random.default_rng(0)
    left, right = (rng.normal(size=(64, 8, 8, 1)).astype("float32") for _ in range(2))
    y = rng.integers(0, 2, (64, 1)).astype("float32")
    data = ok.data.Shuffled([left, right], y, batch_size=16, seed=9)
    model.fit(data, epochs=3, validation_data=([left, right], y), callbacks=tools.callbacks(), verbose=0)
    return model
