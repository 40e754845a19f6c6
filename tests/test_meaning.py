"""What functions and values mean: the same after a comment or a move, another after a change."""

import functools
import importlib
import sys
import textwrap

import keras
import numpy as np
import pytest

from keras_optkit.meaning import checksum, meaning


@pytest.fixture
def module(tmp_path):
    """Makes a module of a text, each in a directory of its own."""
    made = []

    def make(text):
        directory = tmp_path / str(len(made))
        directory.mkdir()
        (directory / "module_of_a_test.py").write_text(textwrap.dedent(text))
        sys.path.insert(0, str(directory))
        sys.modules.pop("module_of_a_test", None)
        importlib.invalidate_caches()
        made.append(importlib.import_module("module_of_a_test"))
        sys.path.pop(0)
        return made[-1]

    yield make
    sys.modules.pop("module_of_a_test", None)


LOSS = """
    import numpy as np

    SCALE = 2.0
    SETTINGS = {"power": 2}

    class Config:
        epochs, temperature = 3, 1.5

    config = Config()

    def helper(x):
        return x * SCALE

    def loss(y, p, weight=1.0):
        return helper(y - p) ** SETTINGS["power"] * weight * config.temperature

    def outer(k):
        return lambda x: x * k

    scaled = outer(3)
"""


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("def loss(y, p, weight=1.0):", "# a comment\n\n\n    def loss(y, p, weight=1.0):"),
        ("def loss(y, p, weight=1.0):\n", 'def loss(y, p, weight=1.0):\n        """A docstring."""\n'),
        ("def loss(y, p, weight=1.0):", "def loss(y: float, p: float, weight: float = 1.0) -> float:"),
        ("helper(y - p) **", "(\n            helper(y - p)  # of the difference\n        ) **"),
        ("return x * SCALE", "'''What it is.'''\n        return x * SCALE"),
        ("epochs, temperature = 3, 1.5", "epochs, temperature = 9, 1.5"),
        ("import numpy as np", "import numpy as np\n    UNUSED = 1"),
    ],
)
def test_what_makes_no_difference(module, before, after):
    assert before in LOSS
    one, other = module(LOSS), module(LOSS.replace(before, after))
    assert meaning(one.loss) == meaning(other.loss)
    assert meaning(one.scaled) == meaning(other.scaled)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("helper(y - p)", "helper(p - y)"),
        ("weight=1.0", "weight=2.0"),
        ("weight=1.0", "weight=1.0, *, more=1"),
        ("return x * SCALE", "return x + SCALE"),
        ("SCALE = 2.0", "SCALE = 3.0"),
        ("SCALE = 2.0", "SCALE = np.float32(2.5)"),
        ('{"power": 2}', '{"power": 3}'),
        ("epochs, temperature = 3, 1.5", "epochs, temperature = 3, 1.0"),
        (" * weight * config.temperature", " * (lambda: weight)()"),
    ],
)
def test_what_makes_a_difference(module, before, after):
    assert before in LOSS
    one, other = module(LOSS), module(LOSS.replace(before, after))
    assert meaning(one.loss) != meaning(other.loss)


def test_enclosed_values_and_arguments_of_functions_count(module):
    one = module(LOSS)
    assert meaning(one.outer(3)) == meaning(one.scaled)
    assert meaning(one.outer(4)) != meaning(one.scaled)
    assert meaning(one.outer(np.ones(3))) != meaning(one.outer(np.zeros(3)))
    partials = [functools.partial(one.loss, weight=w) for w in (1, 1, 2)]
    assert meaning(partials[0]) == meaning(partials[1]) != meaning(partials[2])


CLASS = """
    import keras

    class Base(keras.layers.Layer):
        def call(self, x):
            return x + 1

    class Layer(Base):
        rate = 0.5

        @property
        def twice(self):
            return 2 * self.rate

        @staticmethod
        def other(x):
            return [x for _ in range(3)]

        def itself(self):
            return Layer, super().call(1)
"""


def test_classes_are_told_by_what_they_do(module):
    same = meaning(module(CLASS).Layer)
    assert meaning(module(CLASS.replace("class Base", "# moved\n\n    class Base")).Layer) == same
    for before, after in (
        ("rate = 0.5", "rate = 0.4"),
        ("2 * self.rate", "3 * self.rate"),
        ("range(3)", "range(4)"),
        ("x + 1", "x + 2"),
        ("super().call(1)", "super().call(2)"),
    ):
        assert meaning(module(CLASS.replace(before, after)).Layer) != same, before


def test_code_without_source():
    def made(text):
        names = {"__name__": "__main__"}
        exec(text, names)
        return names["f"]

    assert meaning(made("def f(x): return x in {'a', 'b', 'c'}")) == meaning(
        made("\n\ndef f(x):\n return x in {'a', 'b', 'c'}")
    )
    assert meaning(made("f = lambda x: x")) != meaning(made("f = lambda x: -x"))


def test_decorators_count():
    def times(k):
        def around(function):
            @functools.wraps(function)
            def inside(x):
                return k * function(x)

            return inside

        return around

    made = [times(k)(lambda x: x) for k in (2, 2, 3)]
    assert meaning(made[0]) == meaning(made[1]) != meaning(made[2])


def test_things_of_keras_are_told_by_their_config():
    def focal(y, p):
        return y * p

    same = [meaning(keras.losses.MeanSquaredError()) for _ in range(2)]
    assert same[0] == same[1] != meaning(keras.losses.MeanSquaredError(reduction="sum"))
    own = meaning(keras.losses.MeanSquaredError(name="focal")), meaning(keras.metrics.MeanMetricWrapper(focal))
    assert own[0] != own[1]
    assert meaning(keras.losses.mean_squared_error) == "keras.src.losses.losses.mean_squared_error"


def test_all_rows_of_an_array_count(monkeypatch):
    monkeypatch.setattr("keras_optkit.meaning._CHUNK", 64)  # a few rows at a time
    array = np.arange(300.0).reshape(100, 3)
    assert checksum(array) == checksum(np.asfortranarray(array)) == checksum(np.arange(300.0).reshape(100, 3))
    for row in (0, 50, 99):
        other = array.copy()
        other[row, 1] += 1e-9
        assert checksum(other) != checksum(array)
    different = [array[:50], array.astype("float32"), array.reshape(50, 6), np.array(3.0), np.array(["a", "b"])]
    assert len({checksum(each) for each in [array, *different, np.array(["a", None], object), array[:0]]}) == 8
