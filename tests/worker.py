"""One of several processes that tests/test_distribution.py starts; it is no test by itself.

python tests/worker.py DIRECTORY CASE...: trains under MultiWorkerMirroredStrategy and writes weights and states there.
python tests/worker.py parameter-server: builds an optimizer under ParameterServerStrategy and prints what is raised.
"""

import faulthandler
import json
import os
import sys
import warnings
from pathlib import Path

warnings.simplefilter("error")
warnings.filterwarnings("ignore", "__array__ implementation doesn't accept a copy keyword", DeprecationWarning)

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
from test_distribution import CASES, dataset, looped  # noqa: E402
from two_processes import free_addresses  # noqa: E402

import keras_optkit as ok  # noqa: E402
from keras_optkit.testing import problems  # noqa: E402


def train(directory, cases):
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    assert strategy.num_replicas_in_sync == 2
    worker = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
    for case in cases:
        model, optimizer, _ = looped(strategy, CASES[case], dataset(nan=CASES[case]().skip_nonfinite is not None))
        weights = {f"weight {i}": value for i, value in enumerate(model.get_weights())}
        np.savez(directory / f"{case}-{worker}.npz", **weights, **problems.state_of(optimizer))


def parameter_server():
    jobs = ("worker", "worker", "ps")
    addresses = free_addresses(len(jobs))
    places = {job: [a for j, a in zip(jobs, addresses, strict=True) if j == job] for job in jobs}
    cluster = tf.train.ClusterSpec(places)
    servers = [tf.distribute.Server(cluster, job, i) for job, at in places.items() for i in range(len(at))]
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(cluster, rpc_layer="grpc")
    with tf.distribute.ParameterServerStrategy(resolver).scope():
        try:
            ok.optimizers.AdamW().build([keras.Variable(np.ones(3))])
        except ValueError as error:
            print(error)
    return servers


if __name__ == "__main__":
    faulthandler.dump_traceback_later(100, exit=True)  # instead of a timeout that does not say where
    keras.config.set_floatx("float64")
    if sys.argv[1] == "parameter-server":
        parameter_server()
    else:
        train(Path(sys.argv[1]), sys.argv[2:])
