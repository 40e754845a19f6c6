"""A training loop by hand, with `tf.train.Checkpoint` for what would be lost."""

import keras
import numpy as np
import tensorflow as tf

SOURCE = "keras guides/writing_a_custom_training_loop_in_tensorflow.py"

LOOP = True  # without `fit`, so of the callbacks only those of the harness take part


def train(tools):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(64, 10)).astype("float32"), rng.integers(0, 3, 64)
    model = keras.Sequential([keras.Input((10,)), keras.layers.Dense(16, "relu"), keras.layers.Dense(3)])
    optimizer = tools.adam(1e-3)
    optimizer.build(model.trainable_weights)
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    accuracy = keras.metrics.SparseCategoricalAccuracy()

    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            logits = model(x, training=True)
            loss = loss_of(y, logits)
        weights = model.trainable_weights
        optimizer.apply(tape.gradient(loss, weights), weights)
        accuracy.update_state(y, logits)
        return loss

    done = tf.Variable(0, dtype="int64")
    checkpoint = tf.train.Checkpoint(model=model, optimizer=optimizer, done=done)
    manager = tf.train.CheckpointManager(checkpoint, str(tools.directory / "loop"), max_to_keep=2)
    tools.resumed(checkpoint.restore(manager.latest_checkpoint) and int(done))
    hooks = keras.callbacks.CallbackList(tools.callbacks(), model=model)
    for epoch in range(int(done), 4):
        order = np.random.default_rng(epoch).permutation(64)
        for batch in range(4):
            rows = order[16 * batch : 16 * batch + 16]
            hooks.on_train_batch_begin(batch)
            hooks.on_train_batch_end(batch, {"loss": step(tf.constant(x[rows]), tf.constant(y[rows]))})
        accuracy.reset_state()
        done.assign(epoch + 1)
        manager.save()
    model.optimizer = optimizer
    return model
