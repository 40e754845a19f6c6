"""A small student that learns from a trained teacher, by a `compute_loss` of its own."""

import keras
import numpy as np
from keras import ops

import keras_optkit as ok

SOURCE = "keras-io examples/vision/knowledge_distillation.py"


class Distiller(keras.Model):
    def __init__(self, student, teacher):
        super().__init__()
        self.student, self.teacher = student, teacher
        teacher.trainable = False

    def compile(self, optimizer, metrics, student_loss, distillation_loss, alpha=0.1, temperature=10.0):
        super().compile(optimizer=optimizer, metrics=metrics)
        self.student_loss, self.distillation_loss = student_loss, distillation_loss
        self.alpha, self.temperature = alpha, temperature

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, allow_empty=False):
        taught = ops.softmax(self.teacher(x, training=False) / self.temperature)
        distilled = self.distillation_loss(taught, ops.softmax(y_pred / self.temperature)) * self.temperature**2
        return self.alpha * self.student_loss(y, y_pred) + (1 - self.alpha) * distilled

    def call(self, x):
        return self.student(x)


def network(width):
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(width, 3, strides=2, padding="same"),
            keras.layers.LeakyReLU(negative_slope=0.2),
            keras.layers.MaxPooling2D(2, 1, "same"),
            keras.layers.Flatten(),
            keras.layers.Dense(4),
        ]
    )


def train(tools):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(64, 8, 8, 1)).astype("float32"), rng.integers(0, 4, 64)
    crossentropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    teacher = network(16)
    teacher.compile("adam", loss=crossentropy)
    teacher.fit(ok.data.Shuffled(x, y, batch_size=16), verbose=0)
    distiller = Distiller(network(4), teacher)
    distiller.compile(tools.adam(1e-3), ["accuracy"], crossentropy, keras.losses.KLDivergence())
    data = ok.data.Shuffled(x, y, batch_size=16, seed=3)
    distiller.fit(data, epochs=3, callbacks=tools.callbacks(), verbose=0)
    return distiller
