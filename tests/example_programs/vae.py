"""A variational autoencoder without `call`, with a layer that samples."""

import keras
import numpy as np
import tensorflow as tf
from keras import ops

import keras_optkit as ok

SOURCE = "keras-io examples/generative/vae.py"


class Sampling(keras.layers.Layer):
    def __init__(self):
        super().__init__()
        self.seeds = keras.random.SeedGenerator(5)

    def call(self, inputs):
        mean, log_var = inputs
        return mean + ops.exp(0.5 * log_var) * keras.random.normal(ops.shape(mean), seed=self.seeds)


class VAE(keras.Model):
    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.means = [keras.metrics.Mean(name=name) for name in ("loss", "reconstruction", "kl")]

    @property
    def metrics(self):
        return self.means

    def train_step(self, data):
        x = data[0] if isinstance(data, tuple) else data
        with tf.GradientTape() as tape:
            mean, log_var, z = self.encoder(x)
            reconstruction = ops.mean(ops.sum(ops.square(x - self.decoder(z)), 1))
            kl = ops.mean(ops.sum(-0.5 * (1 + log_var - ops.square(mean) - ops.exp(log_var)), 1))
            loss = reconstruction + kl
        gradients = tape.gradient(loss, self.trainable_weights)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_weights, strict=True))
        for metric, value in zip(self.means, (loss, reconstruction, kl), strict=True):
            metric.update_state(value)
        return {metric.name: metric.result() for metric in self.means}


def train(tools):
    x = keras.Input((12,))
    hidden = keras.layers.Dense(16, "relu")(x)
    mean, log_var = keras.layers.Dense(2, name="mean")(hidden), keras.layers.Dense(2, name="log_var")(hidden)
    encoder = keras.Model(x, [mean, log_var, Sampling()([mean, log_var])])
    decoder = keras.Sequential([keras.Input((2,)), keras.layers.Dense(16, "relu"), keras.layers.Dense(12)])
    vae = VAE(encoder, decoder)
    vae.compile(optimizer=tools.adam(1e-3))
    rows = np.random.default_rng(0).normal(size=(96, 12)).astype("float32")
    vae.fit(ok.data.Shuffled(rows, batch_size=16, seed=2), epochs=3, callbacks=tools.callbacks(), verbose=0)
    return vae
