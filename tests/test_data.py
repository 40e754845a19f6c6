"""Data whose order is a function of the seed and the epoch."""

import keras
import numpy as np
import pytest

import keras_optkit as ok

X = np.arange(20, dtype="float32").reshape(10, 2)
Y = np.arange(10)


def rows(data):
    """The targets of an epoch, batch by batch."""
    return [data[i][1].tolist() for i in range(data.num_batches)]


class Seen(keras.callbacks.Callback):
    """The targets that a model was trained on, epoch by epoch; they are its loss, one batch being one row."""

    def __init__(self):
        super().__init__()
        self.epochs = []

    def on_epoch_begin(self, epoch, logs=None):
        self.epochs.append([])

    def on_train_batch_end(self, batch, logs=None):
        total = sum(self.epochs[-1])
        self.epochs[-1].append(round(logs["loss"] * (batch + 1) - total))


def counting_model():
    """Its loss is the target: the mean over one row of |0 * x - y|."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, kernel_initializer="zeros")])
    model.compile(optimizer=keras.optimizers.SGD(0.0), loss="mae")
    return model


def test_the_order_is_that_of_numpy_s_generator_for_seed_and_epoch():
    data = ok.data.Shuffled(X, Y, batch_size=4, seed=3)
    for epoch in (0, 1, 5):
        data.epoch = epoch
        order = np.random.default_rng((3, epoch)).permutation(10)
        assert rows(data) == [order[:4].tolist(), order[4:8].tolist(), order[8:].tolist()]
        np.testing.assert_array_equal(data[1][0], X[order[4:8]])
    data.epoch = 1
    assert rows(data) != rows(ok.data.Shuffled(X, Y, batch_size=4, seed=3))
    assert rows(ok.data.Shuffled(X, Y, batch_size=4, seed=4)) != rows(ok.data.Shuffled(X, Y, batch_size=4, seed=3))


def test_without_shuffling_the_rows_come_in_order():
    data = ok.data.Shuffled(X, Y, batch_size=4, shuffle=False)
    assert rows(data) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    data.epoch = 7
    assert rows(data) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_a_remainder_can_be_dropped():
    data = ok.data.Shuffled(X, Y, batch_size=4, shuffle=False, drop_remainder=True)
    assert rows(data) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_nested_arrays_and_sample_weights_stay_together():
    x = {"a": X, "b": (X[:, 0].astype("float64"), [Y.astype("int32")])}
    data = ok.data.Shuffled(x, Y, sample_weight=Y / 10, batch_size=3, seed=1)
    given, y, weight = data[2]
    np.testing.assert_array_equal(given["a"], X[y])
    np.testing.assert_array_equal(given["b"][0], X[y, 0])
    assert given["b"][0].dtype == weight.dtype == np.float32
    assert given["b"][1][0].dtype == np.int32
    np.testing.assert_allclose(weight, y / 10, rtol=1e-6)
    (alone,) = ok.data.Shuffled(X, batch_size=3)[0]
    assert alone.shape == (3, 2)


def two_of_each():
    keras.utils.set_random_seed(0)
    inputs = [keras.Input((2,)), keras.Input((1,))]
    joined = keras.layers.concatenate(inputs)
    model = keras.Model(inputs, [keras.layers.Dense(1)(joined), keras.layers.Dense(1)(joined)])
    model.compile("sgd", loss=["mse", "mse"])
    return model


OF_EACH = {
    "lists": ([X, X[:, :1]], [Y, Y], [Y / 10, Y / 5]),
    "tuples": ((X, X[:, :1]), (Y, Y), (Y / 10, Y / 5)),
    "one_weight_for_all": ([X, X[:, :1]], [Y, Y], Y / 10),
    "one_without_weights": ([X, X[:, :1]], [Y, Y], [Y / 10, None]),
    "tensors": ([keras.ops.convert_to_tensor(X), X[:, :1]], [keras.ops.convert_to_tensor(Y), Y], None),
}


@pytest.mark.once
@pytest.mark.few(1)
@pytest.mark.parametrize("form", OF_EACH)
def test_several_inputs_and_outputs_train_as_in_fit(form):
    x, y, weight = OF_EACH[form]
    model, stock = two_of_each(), two_of_each()
    data = ok.data.Shuffled(x, y, weight, batch_size=4, shuffle=False)
    model.fit(data, epochs=2, verbose=0)
    if form == "one_without_weights" and keras.config.backend() == "jax":  # where Keras fails on None
        weight = [Y / 10, np.ones(10)]
    stock.fit(x, y, sample_weight=weight, batch_size=4, epochs=2, shuffle=False, verbose=0)
    for mine, theirs in zip(model.get_weights(), stock.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, theirs)


class Pairs(ok.data.EpochDataset):
    """Batches with lists in them, two levels deep."""

    def __len__(self):
        return 2

    def batch(self, index):
        return [{"inputs": [X[5 * index :][:5], X[5 * index :][:5, :1]]}, Y[5 * index :][:5]]


def test_lists_in_batches_of_one_s_own_become_tuples():
    batch = Pairs()[1]
    assert isinstance(batch, tuple)
    assert isinstance(batch[0]["inputs"], tuple)
    inputs = {"inputs": [keras.Input((2,)), keras.Input((1,))]}
    model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.concatenate(inputs["inputs"])))
    model.compile("sgd", loss="mse")
    assert np.isfinite(model.fit(Pairs(), verbose=0).history["loss"][0])


class ArrayLike:
    """As `fit` takes it, too."""

    def __array__(self, dtype=None, copy=None):
        return X.astype(dtype)


def test_arrays_of_other_kinds():
    (x,) = ok.data.Shuffled(ArrayLike(), shuffle=False)[0]
    np.testing.assert_array_equal(x, X)
    (half,) = ok.data.Shuffled(keras.ops.cast(X, "bfloat16"), shuffle=False)[0]
    assert half.dtype == np.float32
    data = ok.data.Shuffled(X, Y)
    assert data.rows == 10
    np.testing.assert_array_equal(data.arrays[1], Y)


@pytest.mark.only_on("tensorflow", because="the others have no tensors of strings")
def test_strings():
    import tensorflow as tf

    words = ["a", "b", "c"]
    for given in (np.array(words), np.array(words, object), tf.constant(words)):
        data = ok.data.Shuffled(given, shuffle=False, batch_size=2)
        assert [part.numpy().tolist() for (part,) in (data[0], data[1])] == [[b"a", b"b"], [b"c"]]
    assert data.fingerprint() == ok.data.Shuffled(tf.constant(words), shuffle=False, batch_size=2).fingerprint()


def test_fit_counts_the_epochs_on_and_trains_on_each_row_once():
    model, data, seen = counting_model(), ok.data.Shuffled(X, Y, batch_size=1, seed=2), Seen()
    model.fit(data, epochs=2, callbacks=[seen], verbose=0)
    model.fit(data, epochs=1, callbacks=[seen], verbose=0)
    assert data.epoch == 3
    assert seen.epochs == [np.random.default_rng((2, epoch)).permutation(10).tolist() for epoch in range(3)]
    before = rows(data)
    model.evaluate(data, verbose=0)
    assert rows(data) == before
    assert data.epoch == 3


def test_fit_does_not_shuffle_the_batches_of_data_in_order():
    model, seen = counting_model(), Seen()
    model.fit(ok.data.Shuffled(X, Y, batch_size=1, shuffle=False), epochs=2, callbacks=[seen], verbose=0, shuffle=True)
    assert seen.epochs == [list(range(10))] * 2


def test_a_list_of_callbacks_made_by_the_user_is_told_as_well():
    model, data = counting_model(), ok.data.Shuffled(X, Y, batch_size=5)
    made = keras.callbacks.CallbackList([], add_history=True, model=model, epochs=1, steps=2, verbose=0)
    model.fit(data, epochs=1, callbacks=made, verbose=0)
    assert data.epoch == 1


@pytest.mark.only_on("tensorflow", because="Keras on JAX begins with the second batch, and it is refused")
def test_several_threads_give_the_same_batches():
    data, seen = ok.data.Shuffled(X, Y, batch_size=1, seed=2, workers=3), Seen()
    counting_model().fit(data, epochs=2, callbacks=[seen], verbose=0)
    assert seen.epochs == [np.random.default_rng((2, epoch)).permutation(10).tolist() for epoch in range(2)]


def test_several_threads_are_refused_where_keras_would_lose_a_batch():
    data = ok.data.Shuffled(X, Y, batch_size=1, workers=3)
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile(optimizer="sgd", loss="mae")
    with pytest.raises(ValueError, match="workers must be 1 on JAX, and with a model that is not built, got 3"):
        model.fit(data, verbose=0)


def test_training_is_that_on_arrays_in_the_same_order():
    def weights(*data, **arguments):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, "tanh"), keras.layers.Dense(1)])
        model.compile(optimizer="adam", loss="mse")
        model.fit(*data, epochs=2, verbose=0, shuffle=False, **arguments)
        return model.get_weights()

    data = ok.data.Shuffled(X.astype("float64"), Y, batch_size=4, shuffle=False)
    for mine, theirs in zip(weights(data), weights(X, Y, batch_size=4), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("begin", [0, 1, 2])
def test_an_epoch_can_begin_inside(begin):
    data = ok.data.Shuffled(X, Y, batch_size=4, seed=3)
    whole = rows(data)
    data.begin_epoch_at(begin)
    assert rows(data) == whole[begin:]
    data.end_epoch()
    assert data.epoch == 1
    assert rows(data)[0] == np.random.default_rng((3, 1)).permutation(10)[:4].tolist()


@pytest.mark.parametrize("batch", [-1, 3])
def test_an_epoch_cannot_begin_outside(batch):
    with pytest.raises(ValueError, match=r"batch must be an integer at least 0 and at most 2"):
        ok.data.Shuffled(X, Y, batch_size=4).begin_epoch_at(batch)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"y": Y[:9]}, ValueError, "same number of rows, got \\[9, 10\\]"),
        ({"x": X[:0], "y": Y[:0]}, ValueError, "at least one row, got 0"),
        ({"batch_size": 11, "drop_remainder": True}, ValueError, "at least 11 rows, for one batch, got 10"),
        ({"batch_size": 0}, ValueError, "batch_size must be an integer at least 1, got 0"),
        ({"seed": -1}, ValueError, "seed must be an integer at least 0, got -1"),
        ({"seed": 1.5}, TypeError, "seed must be an integer"),
        ({"shuffle": "yes"}, TypeError, "shuffle must be True or False"),
        ({"y": None, "sample_weight": Y}, ValueError, "sample_weight must be None without y"),
        ({"x": np.array([None] * 10)}, TypeError, "x must be an array"),
        (
            {"x": {"a": 1.0}},
            TypeError,
            "x must be an array, or arrays in lists, tuples and dicts .*; got 1.0 of type float",
        ),
        ({"x": X.tolist()}, TypeError, r"np.array makes one of a list of numbers\); got 0.0"),
        ({"y": [1, 2]}, TypeError, r"y must be an array, .*; got 1 of type int"),
        ({"x": []}, TypeError, r"x must be an array, .*; got \[\], without any"),
        ({"x": [X, None]}, TypeError, "x must be an array, .*; got None"),
        ({"x": object()}, TypeError, "x must be an array, .*; got <object"),
        ({"x": np.zeros(10, "datetime64[s]")}, TypeError, "x must be an array"),
        ({"sample_weight": [Y, "x"]}, TypeError, "sample_weight must be an array, .*; got 'x'"),
        ({"workers": "x"}, TypeError, "workers must be an integer at least 0, got 'x'"),
        ({"workers": -1}, ValueError, "workers must be an integer at least 0, got -1"),
        ({"max_queue_size": float("nan")}, TypeError, "max_queue_size must be an integer at least 1, got nan"),
        ({"max_queue_size": 0}, ValueError, "max_queue_size must be an integer at least 1, got 0"),
        ({"use_multiprocessing": "no"}, TypeError, "use_multiprocessing must be True or False"),
    ],
)
def test_bad_arguments_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        ok.data.Shuffled(**({"x": X, "y": Y} | change))


def test_epochs_of_another_length_are_refused():
    data = ok.data.Shuffled(X, Y, batch_size=5)
    with pytest.raises(ValueError, match="steps_per_epoch must be None or 2, the length of Shuffled"):
        counting_model().fit(data, epochs=3, steps_per_epoch=1, verbose=0)
    counting_model().fit(data, epochs=1, steps_per_epoch=1, verbose=0)  # one may be shorter


def test_other_data_have_another_fingerprint():
    def fingerprint(**change):
        return ok.data.Shuffled(**({"x": X, "y": Y, "batch_size": 5, "seed": 1} | change)).fingerprint()

    assert fingerprint() == fingerprint()
    changed = X.copy()
    changed[9, 1] += 1
    for change in ({"x": changed}, {"y": Y[::-1].copy()}, {"batch_size": 4}, {"seed": 2}, {"shuffle": False}):
        assert fingerprint(**change) != fingerprint(), change


@pytest.mark.only_on("tensorflow", because="tf.data")
class TestPerEpoch:
    @staticmethod
    def made(epoch):
        import tensorflow as tf

        return tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(10, seed=epoch + 1).batch(4)

    def test_each_epoch_has_its_own_dataset(self):
        data = ok.data.PerEpoch(self.made)
        assert len(data) == 3
        for epoch in (0, 2):
            data.epoch = epoch
            assert rows(data) == [y.tolist() for _, y in self.made(epoch).as_numpy_iterator()]

    @pytest.mark.parametrize("begin", [1, 2])
    def test_an_epoch_can_begin_inside(self, begin):
        data = ok.data.PerEpoch(self.made)
        data.begin_epoch_at(begin)
        assert rows(data) == [y.tolist() for _, y in self.made(0).skip(begin).as_numpy_iterator()]

    def test_fit_trains_on_one_after_the_other(self):
        data, seen = ok.data.PerEpoch(lambda epoch: self.made(epoch).unbatch().batch(1), steps=10), Seen()
        counting_model().fit(data, epochs=2, callbacks=[seen], verbose=0)
        assert seen.epochs == [[int(y) for _, y in self.made(e).unbatch().as_numpy_iterator()] for e in range(2)]

    def test_a_length_that_is_not_known_must_be_given(self):
        with pytest.raises(
            ValueError, match="steps must be given, since the length of make_dataset\\(0\\) is infinite"
        ):
            ok.data.PerEpoch(lambda epoch: self.made(epoch).repeat())
        with pytest.raises(ValueError, match="is not known"):
            ok.data.PerEpoch(lambda epoch: self.made(epoch).filter(lambda *_: True))
        assert len(ok.data.PerEpoch(lambda epoch: self.made(epoch).repeat(), steps=5)) == 5

    def test_a_dataset_that_is_too_short_is_refused(self):
        data = ok.data.PerEpoch(self.made, steps=4)
        data[2]
        with pytest.raises(ValueError, match="make_dataset\\(0\\) must give 4 batches, got 3"):
            data[3]

    def test_what_is_no_dataset_is_refused(self):
        with pytest.raises(TypeError, match="make_dataset must be a function of the epoch, got 3"):
            ok.data.PerEpoch(3)
        with pytest.raises(TypeError, match=r"must return a tf\.data\.Dataset, got \[0\] for epoch 0"):
            ok.data.PerEpoch(lambda epoch: [epoch])
