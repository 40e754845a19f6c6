"""Train in two processes that talk over gRPC: `MultiWorkerMirroredStrategy`, in a custom loop and in `fit`.

Starts the two workers on this machine by itself, trains the same network in one process on the same global batches, and
shows that the weights agree. On machines of your own, set `TF_CONFIG` on each and run what `work` does.

    python examples/two_processes.py
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import keras_optkit as ok

BATCH, EPOCHS = 16, 3


# -- what every worker does -------------------------------------------------------------------------------------------


class MultiWorkerModel(keras.Model):
    """A model for `fit` on several workers.

    Keras 3.15 averages what a step returns over the workers along axis 0, which the scalars of the logs do not have.
    """

    def train_step(self, data: Any) -> Any:
        """Keras's step; the logs have an axis to be averaged along."""
        return _with_an_axis(super().train_step(data))

    def test_step(self, data: Any) -> Any:
        """Likewise for `evaluate` and validation."""
        return _with_an_axis(super().test_step(data))


def _with_an_axis(logs: Any) -> Any:
    if tf.distribute.get_strategy().num_replicas_in_sync == 1:
        return logs
    return keras.tree.map_structure(lambda value: tf.reshape(value, (1,)), logs)


def problem() -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(0).normal(size=(64, 4))
    return x, np.sin(x.sum(axis=1, keepdims=True))


def network() -> tuple[keras.KerasTensor, keras.KerasTensor]:
    """Input and output; the variables are made here, so call it in the strategy's scope."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    return inputs, keras.layers.Dense(1)(keras.layers.Dense(8, "tanh")(inputs))


def optimizer() -> ok.optimizers.Optimizer:
    return ok.optimizers.AdamW(0.05, global_clipnorm=0.1, gradient_accumulation_steps=2, use_ema=True)


def in_a_loop(strategy: tf.distribute.Strategy) -> list[np.ndarray]:
    with strategy.scope():
        model = keras.Model(*network())
        adam = optimizer()
        adam.build(model.trainable_variables)

    def on_replica(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            # gradients are summed over the replicas: divide by the size of the global batch, not of this part of it
            loss = tf.reduce_sum(tf.square(model(x, training=True) - y)) / BATCH
        adam.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        return loss

    def step(batch: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
        return strategy.reduce("SUM", strategy.run(on_replica, args=batch), axis=None)

    compiled = tf.function(step)
    # each worker gets its part of every global batch
    batches = strategy.experimental_distribute_dataset(tf.data.Dataset.from_tensor_slices(problem()).batch(BATCH))
    for _ in range(EPOCHS):
        for batch in batches:
            compiled(batch)
    adam.swap_weights(evaluating=True)  # `fit` does it by itself
    return model.get_weights()


def in_fit(strategy: tf.distribute.Strategy) -> list[np.ndarray]:
    with strategy.scope():
        inputs, outputs = network()
    # not in the scope: a model made there takes a mean of the first batch before training, which fails (Keras 3.15)
    model = MultiWorkerModel(inputs, outputs)
    x, y = problem()
    with strategy.scope():
        # on GPUs Keras would choose XLA, as it does not know that this model is distributed
        model.compile(optimizer(), loss="mse", jit_compile=False)
        model.fit(x, y, batch_size=BATCH, epochs=EPOCHS, shuffle=False, verbose=0, validation_data=(x[:8], y[:8]))
    return model.get_weights()


WAYS = {"loop": in_a_loop, "fit": in_fit}


def work(directory: Path) -> None:
    """One worker: which one, and where the others are, is in TF_CONFIG."""
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    worker = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
    for way, train in WAYS.items():
        np.savez(directory / f"{way}-{worker}.npz", *train(strategy))


# -- what starts and compares them ------------------------------------------------------------------------------------


def free_addresses(count: int) -> list[str]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    addresses = [f"127.0.0.1:{s.getsockname()[1]}" for s in sockets]
    for s in sockets:
        s.close()
    return addresses


def run_workers(command: Sequence[str], count: int = 2, timeout: float = 300) -> list[str]:
    """Runs a command in `count` processes, each with its TF_CONFIG, to their end.

    Returns:
        What each of them printed.

    Raises:
        RuntimeError: If one fails or takes too long, with its output; the others are killed.
    """
    cluster = {"worker": free_addresses(count)}
    processes: list[subprocess.Popen[str]] = []

    def finish(process: subprocess.Popen[str]) -> str:
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            output = f"{process.communicate()[0]}\nkilled after {timeout} s"
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{output}")
        return output

    with ThreadPoolExecutor(count) as pool:
        try:
            for index in range(count):
                config = json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}})
                environment = os.environ | {"TF_CONFIG": config, "CUDA_VISIBLE_DEVICES": "-1"}  # no two share a GPU
                processes.append(
                    subprocess.Popen(
                        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
                    )
                )
            futures = [pool.submit(finish, process) for process in processes]
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
            return [future.result() for future in futures]
        finally:
            for process in processes:
                process.kill()  # one has failed, and the others may wait for it forever


def largest_difference(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(first, second, strict=True))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Training in two processes equals training in one.")
    parser.add_argument("--worker", type=Path, metavar="DIRECTORY", help="be one of the workers, and write there")
    arguments = parser.parse_args(argv)
    keras.config.set_floatx("float64")  # to see that the two agree, rounding apart
    if arguments.worker:
        work(arguments.worker)
        return
    with tempfile.TemporaryDirectory() as directory:
        run_workers([sys.executable, __file__, "--worker", directory])
        for way, train in WAYS.items():
            one = train(tf.distribute.get_strategy())
            first, second = ([*np.load(Path(directory, f"{way}-{worker}.npz")).values()] for worker in (0, 1))
            between, from_one = largest_difference(first, second), largest_difference(first, one)
            print(f"{way:5} largest difference between the workers {between:.1e}, from one process {from_one:.1e}")


if __name__ == "__main__":
    main()
