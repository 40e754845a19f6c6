"""Transfer learning in two fits: a new head on a frozen backbone, then all of it with a small rate."""

import keras
import numpy as np

import keras_optkit as ok

SOURCE = "keras guides/transfer_learning.py"


def backbone():
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(4, 3, name="conv"),
            layers.BatchNormalization(name="normal"),
            layers.ReLU(),
            layers.GlobalAveragePooling2D(),
        ],
        name="backbone",
    )


def train(tools):
    rng = np.random.default_rng(0)
    x, y = rng.uniform(size=(64, 8, 8, 3)).astype("float32"), rng.integers(0, 2, (64, 1)).astype("float32")
    base = backbone()
    base.trainable = False
    inputs = keras.Input((8, 8, 3))
    hidden = keras.layers.Dropout(0.2)(base(keras.layers.RandomFlip("horizontal")(inputs), training=False))
    model = keras.Model(inputs, keras.layers.Dense(1, name="head")(hidden))
    loss = keras.losses.BinaryCrossentropy(from_logits=True)

    model.compile(tools.adam(1e-2), loss=loss, metrics=["accuracy"])
    head = ok.data.Shuffled(x, y, batch_size=16, seed=6)
    model.fit(head, epochs=2, callbacks=tools.callbacks("head"), verbose=0)
    base.trainable = True
    model.compile(tools.adam(1e-4), loss=loss, metrics=["accuracy"])
    fine = ok.data.Shuffled(x, y, batch_size=16, seed=7)
    model.fit(fine, epochs=2, callbacks=tools.callbacks("fine"), verbose=0)
    return model
