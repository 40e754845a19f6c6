"""A small convolutional network with dropout and batch normalization, on JAX."""

import keras
import numpy as np

import keras_optkit as ok

SOURCE = "keras-io examples/vision/mnist_convnet.py, on JAX"


def train(tools):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(64, 8, 8, 1)).astype("float32"), keras.utils.to_categorical(rng.integers(0, 4, 64), 4)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(8, 3, activation="relu"),
            layers.BatchNormalization(),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dropout(0.5),
            layers.Dense(4, activation="softmax"),
        ]
    )
    model.compile(tools.adam(1e-3), loss="categorical_crossentropy", metrics=["accuracy"])
    data = ok.data.Shuffled(x, y, batch_size=16, seed=8)
    model.fit(data, epochs=3, validation_data=(x, y), callbacks=tools.callbacks(), verbose=0)
    return model
