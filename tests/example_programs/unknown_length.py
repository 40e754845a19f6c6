"""Rows of a table from a `tf.data` pipeline of unknown length, with adapted normalization and inputs by name."""

import keras
import numpy as np
import tensorflow as tf

SOURCE = "keras-io examples/structured_data/structured_data_classification_from_scratch.py"

BY_EPOCH = True  # such data cannot be resumed inside an epoch


def train(tools):
    rng = np.random.default_rng(0)
    table = {"age": rng.normal(50, 10, (90, 1)).astype("float32"), "kind": rng.integers(0, 5, (90, 1))}
    target = (table["age"] > 50).astype("float32")
    rows = tf.data.Dataset.from_tensor_slices((table, target))
    data = rows.filter(lambda row, _: row["kind"][0] < 4).batch(12)

    inputs = {"age": keras.Input((1,)), "kind": keras.Input((1,), dtype="int32")}
    normalization = keras.layers.Normalization()
    normalization.adapt(table["age"])
    kind = keras.layers.CategoryEncoding(num_tokens=5, output_mode="one_hot")(inputs["kind"])
    x = keras.layers.concatenate([normalization(inputs["age"]), kind])
    x = keras.layers.Dropout(0.5)(keras.layers.Dense(16, "relu")(x))
    model = keras.Model(inputs, keras.layers.Dense(1, "sigmoid")(x))
    model.compile(tools.adam(1e-3), loss="binary_crossentropy", metrics=["accuracy"])
    model.fit(data, epochs=4, validation_data=data, callbacks=tools.callbacks(), verbose=0)
    return model
