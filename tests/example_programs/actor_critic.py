"""An actor and a critic, whose optimizers are in a dict of the model, trained on recorded transitions."""

import keras
import numpy as np
import tensorflow as tf
from keras import ops

import keras_optkit as ok

SOURCE = "keras-io examples/rl/actor_critic_cartpole.py and ddpg_pendulum.py"


class ActorCritic(keras.Model):
    """Each is built by its first step."""

    def __init__(self):
        super().__init__()
        self.actor = keras.Sequential([keras.layers.Dense(16, "relu"), keras.layers.Dense(2, "softmax")])
        self.critic = keras.Sequential([keras.layers.Dense(16, "relu"), keras.layers.Dense(1)])
        self.huber = keras.losses.Huber()

    def compile(self, actor, critic):
        super().compile(optimizer=None)
        self.optimizers = {"actor": actor, "critic": critic}

    def train_step(self, data):
        states, (actions, returns) = data
        with tf.GradientTape(persistent=True) as tape:
            values = self.critic(states)
            advantages = ops.stop_gradient(returns - values)[:, 0]
            chosen = ops.sum(self.actor(states) * ops.one_hot(actions, 2), axis=-1)
            losses = {
                "actor": -ops.mean(ops.log(chosen) * advantages),
                "critic": self.huber(returns, values),
            }
        for name, loss in losses.items():
            weights = getattr(self, name).trainable_variables
            self.optimizers[name].apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        return {f"{name}_loss": loss for name, loss in losses.items()}


def train(tools):
    rng = np.random.default_rng(0)
    states = rng.normal(size=(80, 4)).astype("float32")
    actions, returns = rng.integers(0, 2, 80), states.sum(1, keepdims=True)
    model = ActorCritic()
    model.compile(tools.adam(0.01), tools.sgd(0.01, momentum=0.9))
    data = ok.data.Shuffled(states, (actions, returns), batch_size=16, seed=4)
    model.fit(data, epochs=3, callbacks=tools.callbacks(), verbose=0)
    return model
