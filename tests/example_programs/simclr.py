"""Contrastive pretraining with a linear probe: an optimizer for each, and batches of unlabelled and labelled images."""

import keras
import numpy as np
import tensorflow as tf
from keras import ops

import keras_optkit as ok

SOURCE = "keras-core examples/keras_io/tensorflow/vision/semisupervised_simclr.py"


class Contrastive(keras.Model):
    def __init__(self, width=8):
        super().__init__()
        layers = keras.layers
        self.augmenter = keras.Sequential([keras.Input((8, 8, 1)), layers.RandomFlip("horizontal")])
        self.encoder = keras.Sequential([keras.Input((8, 8, 1)), layers.Flatten(), layers.Dense(width, "relu")])
        self.head = keras.Sequential([keras.Input((width,)), layers.Dense(width)])
        self.probe = keras.Sequential([keras.Input((width,)), layers.Dense(3)])

    def compile(self, contrastive_optimizer, probe_optimizer):
        super().compile()
        self.contrastive_optimizer, self.probe_optimizer = contrastive_optimizer, probe_optimizer
        self.probe_loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.means = [keras.metrics.Mean(name="c_loss"), keras.metrics.Mean(name="p_loss")]

    @property
    def metrics(self):
        return self.means

    def train_step(self, data):
        unlabelled, (labelled, labels) = data
        images = ops.concatenate([unlabelled, labelled], 0)
        with tf.GradientTape() as tape:
            views = [ops.normalize(self.head(self.encoder(self.augmenter(images, training=True)))) for _ in range(2)]
            similar = views[0] @ ops.transpose(views[1]) / 0.1
            c_loss = self.probe_loss(ops.arange(ops.shape(images)[0]), similar)
        weights = self.encoder.trainable_weights + self.head.trainable_weights
        self.contrastive_optimizer.apply(tape.gradient(c_loss, weights), weights)
        with tf.GradientTape() as tape:
            features = self.encoder(self.augmenter(labelled, training=True), training=False)
            p_loss = self.probe_loss(labels, self.probe(features))
        weights = self.probe.trainable_weights
        self.probe_optimizer.apply(tape.gradient(p_loss, weights), weights)
        for mean, loss in zip(self.means, (c_loss, p_loss), strict=True):
            mean.update_state(loss)
        return {mean.name: mean.result() for mean in self.means}


class Images(ok.data.EpochDataset):
    """More unlabelled images than labelled ones in every batch."""

    def __init__(self):
        super().__init__()
        rng = np.random.default_rng(0)
        self.images = rng.normal(size=(60, 8, 8, 1)).astype("float32")
        self.labels = rng.integers(0, 3, 60)

    def __len__(self):
        return 4

    def batch(self, index):
        rows = np.random.default_rng((1, self.epoch)).permutation(60)[15 * index : 15 * index + 15]
        return self.images[rows[:10]], (self.images[rows[10:]], self.labels[rows[10:]])


def train(tools):
    model = Contrastive()
    model.compile(tools.adam(1e-3), tools.adam(2e-3))
    model.fit(Images(), epochs=3, callbacks=tools.callbacks(), verbose=0)
    return model
