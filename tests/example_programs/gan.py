"""A GAN whose two optimizers are passed to `compile` and used in a `train_step` of its own."""

import keras
import numpy as np
import tensorflow as tf
from keras import ops

import keras_optkit as ok

SOURCE = "keras-io examples/generative/dcgan_overriding_train_step.py"


class GAN(keras.Model):
    def __init__(self, discriminator, generator, latent):
        super().__init__()
        self.discriminator, self.generator, self.latent = discriminator, generator, latent
        self.seeds = keras.random.SeedGenerator(11)
        self.d_mean, self.g_mean = keras.metrics.Mean(name="d_loss"), keras.metrics.Mean(name="g_loss")

    def compile(self, d_optimizer, g_optimizer, loss):
        super().compile()
        self.d_optimizer, self.g_optimizer, self.adversarial = d_optimizer, g_optimizer, loss

    @property
    def metrics(self):
        return [self.d_mean, self.g_mean]

    def train_step(self, real):
        real = real[0] if isinstance(real, tuple) else real
        n = ops.shape(real)[0]
        both = ops.concatenate([self.generator(self.noise(n)), real], 0)
        labels = ops.concatenate([ops.ones((n, 1)), ops.zeros((n, 1))], 0)
        with tf.GradientTape() as tape:
            d_loss = self.adversarial(labels, self.discriminator(both, training=True))
        weights = self.discriminator.trainable_weights
        self.d_optimizer.apply(tape.gradient(d_loss, weights), weights)
        with tf.GradientTape() as tape:
            fooled = self.discriminator(self.generator(self.noise(n), training=True))
            g_loss = self.adversarial(ops.zeros((n, 1)), fooled)
        weights = self.generator.trainable_weights
        self.g_optimizer.apply(tape.gradient(g_loss, weights), weights)
        self.d_mean.update_state(d_loss)
        self.g_mean.update_state(g_loss)
        return {m.name: m.result() for m in self.metrics}

    def noise(self, n):
        return keras.random.normal((n, self.latent), seed=self.seeds)


def train(tools):
    layers = keras.layers
    discriminator = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(8, 4, strides=2, padding="same"),
            layers.LeakyReLU(negative_slope=0.2),
            layers.Flatten(),
            layers.Dropout(0.2),
            layers.Dense(1, "sigmoid"),
        ]
    )
    generator = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(4 * 4 * 4),
            layers.Reshape((4, 4, 4)),
            layers.Conv2DTranspose(8, 4, strides=2, padding="same"),
            layers.LeakyReLU(negative_slope=0.2),
            layers.Conv2D(1, 3, padding="same", activation="sigmoid"),
        ]
    )
    gan = GAN(discriminator, generator, 6)
    gan.compile(tools.adam(1e-3), tools.adam(2e-3), keras.losses.BinaryCrossentropy())
    x = np.random.default_rng(0).uniform(size=(64, 8, 8, 1)).astype("float32")
    gan.fit(ok.data.Shuffled(x, batch_size=16, seed=1), epochs=3, callbacks=tools.callbacks(), verbose=0)
    return gan
