"""Models that are broken on purpose, and healthy ones: `python tests/inspect_cases.py` counts what is told apart.

Of a broken model the first warning must be the one for what was done to it; a healthy one must have no warning. Each
fault is planted in several ways: `main` counts the first way of each, all others, and those of `HELD_OUT`, which were
written after the rules and did not change them. With the argument "broken", "healthy" or "held out", it counts these.
"""

import sys
import time

import keras
import numpy as np
from keras import initializers, layers, optimizers, regularizers

import keras_optkit as ok
from keras_optkit.inspection import inspect

CLASSES = 4
PLACES = range(1, 5)
KINDS = ("mlp", "cnn", "transformer")

#: What is done to a model, and the rules that may name it first.
BROKEN = {
    "wrong init": ("kernel_scale",),
    "dead ReLUs": ("dead_units",),
    "missing gradient": ("missing_gradient",),
    "exploding depth": ("growth", "kernel_scale"),
    "saturated tanh": ("saturation", "kernel_scale"),
    "frozen by mistake": ("frozen",),
    "identical layers": ("identical_layers",),
    "L2 and Adam": ("l2_and_adaptive",),
    "wrong output bias": ("output_bias",),
    "rate 100 times off": ("update_size",),
    "unscaled inputs": ("unscaled_inputs",),
    "softmax as logits": ("output_and_loss",),
}


def large(seed):
    """Twenty-two times the variance of Glorot's for equal fans."""
    return initializers.VarianceScaling(100.0, "fan_in", seed=seed)


def normal(deviation):
    return lambda seed: initializers.RandomNormal(stddev=deviation, seed=seed)


def times(factor):
    """He's deviation, so many times."""
    return lambda seed: initializers.VarianceScaling(2.0 * factor**2, "fan_in", seed=seed)


def pixels(rng, shape, dtype):
    return rng.integers(0, 256, shape).astype(dtype)


#: How each fault is planted, the first way first. Those that begin with "attention" are for transformers only.
WAYS = {
    "wrong init": [
        {"kernel": large, "at": (2,)},
        {"kernel": normal(1e-3), "at": (3,)},
        {"kernel": normal(1.0), "at": (2,)},
        {"kernel": times(0.01), "at": PLACES},
        {"attention_kernel": normal(2.0), "at": (2,)},
        {"attention_kernel": normal(1e-3), "at": (1,)},
    ],
    "dead ReLUs": [
        {"bias": -50.0, "at": (2,)},
        {"bias": -10.0, "at": (3,)},
        {"bias": -50.0, "at": (1, 4), "activation": "gelu"},
    ],
    "missing gradient": [
        {"cut": keras.ops.stop_gradient, "at": (2,)},
        {"cut": keras.ops.stop_gradient, "at": (1,), "task": "categorical"},
        {"cut": keras.ops.stop_gradient, "at": (3,), "penalty": 1e-4, "optimizer": lambda: optimizers.SGD(0.01)},
        {"attention_cut": keras.ops.stop_gradient, "at": (2,)},
    ],
    "exploding depth": [
        {"kernel": large, "at": PLACES},
        {"kernel": times(2.0), "at": range(1, 17), "depth": 16, "unnormalized": True},
    ],
    "saturated tanh": [
        {"kernel": large, "at": PLACES, "activation": "tanh"},
        {"bias": 5.0, "at": (2,), "activation": "tanh"},
        {"kernel": normal(1.0), "at": (3,), "activation": "tanh", "task": "binary"},
    ],
    "frozen by mistake": [
        {"frozen": True, "at": (2,)},
        {"frozen": True, "at": (3, 4)},
        {"attention_frozen": True, "at": (2,)},
    ],
    "identical layers": [
        {"seeds": lambda _: 0},
        {"seeds": lambda place: place // 2, "task": "binary"},
        {"attention_seeds": lambda _: 3},
    ],
    "L2 and Adam": [
        {"penalty": 1e-3},
        {"penalty": 1e-4, "optimizer": lambda: ok.optimizers.NAdam(1e-3)},
        {"penalty": 1e-4, "optimizer": lambda: optimizers.RMSprop(1e-3), "task": "categorical"},
    ],
    "wrong output bias": [
        {"output_bias": [20.0, 0.0, 0.0, 0.0]},
        {"output_bias": [0.0, 0.0, -6.0, -6.0], "task": "categorical"},
        {"output_bias": [-6.0], "task": "binary"},
        {"labels": [0.91, 0.03, 0.03, 0.03]},
    ],
    "rate 100 times off": [
        {"optimizer": lambda: optimizers.Adam(0.1)},
        {"optimizer": lambda: optimizers.Adam(1e-5)},
        {"optimizer": lambda: ok.optimizers.AdamW(1e-5), "task": "binary"},
        {"optimizer": lambda: optimizers.SGD(1e-5), "task": "categorical"},
        {"optimizer": lambda: optimizers.SGD(10.0)},
        {"optimizer": lambda: ok.optimizers.Lion(1e-2)},
    ],
    "unscaled inputs": [
        {"inputs": lambda rng, shape: 255.0 * rng.normal(size=shape)},
        {"inputs": lambda rng, shape: pixels(rng, shape, "uint8")},
        {"inputs": lambda rng, shape: pixels(rng, shape, "float32"), "task": "binary"},
        {"inputs": lambda rng, shape: pixels(rng, shape, "int64"), "activation": "tanh"},
        {"inputs": lambda rng, shape: 1000 + 10 * rng.normal(size=shape)},
    ],
    "softmax as logits": [
        {"softmax": True},
        {"softmax": True, "task": "categorical"},
        {"softmax": True, "task": "binary"},
        {"from_logits": False},
        {"from_logits": False, "task": "binary"},
    ],
}


def orthogonal(gain):
    return lambda seed: initializers.Orthogonal(gain, seed=seed)


#: Written after the rules, which made 96 of 106 right; `vanishing` and `update_size` were changed after that count.
OTHERS = {
    "wrong init": [
        {"kernel": orthogonal(6.0), "at": (1,), "task": "categorical"},
        {"kernel": lambda _: initializers.Constant(0.3), "at": (2,)},
        {"kernel": lambda seed: initializers.RandomUniform(-2.0, 2.0, seed=seed), "at": (4,), "task": "binary"},
        {"kernel": times(1 / 50), "at": (2, 3), "activation": "gelu"},
        {"attention_kernel": lambda _: initializers.TruncatedNormal(stddev=1.5), "at": (3,)},
    ],
    "dead ReLUs": [
        {"bias": -30.0, "at": (3,), "activation": "relu6", "task": "binary"},
        {"bias": -40.0, "at": (2,), "activation": "silu"},
    ],
    "missing gradient": [
        {"cut": keras.ops.floor, "at": (2,), "task": "binary"},
        {"cut": lambda x: keras.ops.cast(x > 0, x.dtype), "at": (4,)},
        {
            "attention_cut": keras.ops.stop_gradient,
            "at": (4,),
            "penalty": 1e-3,
            "optimizer": lambda: optimizers.SGD(0.01),
        },
    ],
    "exploding depth": [
        {"kernel": orthogonal(3.0), "at": range(1, 13), "depth": 12, "unnormalized": True},
        {"kernel": normal(1.5), "at": PLACES, "task": "categorical"},
    ],
    "saturated tanh": [
        {"bias": -8.0, "at": (3,), "activation": "tanh", "task": "categorical"},
        {"kernel": normal(2.0), "at": (1, 2), "activation": "tanh"},
        {"bias": 10.0, "at": PLACES, "activation": "sigmoid"},
    ],
    "frozen by mistake": [
        {"frozen": True, "at": (4,), "task": "binary"},
        {"frozen": True, "at": (2, 3, 4), "optimizer": lambda: ok.optimizers.AdamW(1e-3)},
        {"attention_frozen": True, "at": (3, 4)},
    ],
    "identical layers": [
        {"seeds": lambda place: place % 2, "optimizer": lambda: optimizers.RMSprop(1e-3)},
        {"attention_seeds": lambda place: place},
    ],
    "L2 and Adam": [
        {"penalty": 1e-5, "optimizer": lambda: optimizers.Nadam(1e-3), "task": "binary"},
        {"penalty": 1e-2, "optimizer": lambda: ok.optimizers.Lookahead(ok.optimizers.Adam(1e-3))},
    ],
    "wrong output bias": [
        {"output_bias": [0.0, -15.0, 0.0, 0.0]},
        {"output_bias": [8.0], "task": "binary"},
        {"labels": [0.03, 0.91, 0.03, 0.03], "task": "categorical"},
    ],
    "rate 100 times off": [
        {"optimizer": lambda: optimizers.Nadam(0.2), "task": "categorical"},
        {"optimizer": lambda: optimizers.RMSprop(1e-5)},
        {"optimizer": lambda: ok.optimizers.RAdam(3e-6), "task": "binary"},
        {"optimizer": lambda: optimizers.SGD(1e-4)},
        {"optimizer": lambda: optimizers.SGD(5.0, momentum=0.9), "task": "categorical"},
        {"optimizer": lambda: ok.optimizers.Muon(2.0)},
    ],
    "unscaled inputs": [
        {"inputs": lambda rng, shape: rng.integers(0, 4096, shape).astype("uint16"), "task": "categorical"},
        {"inputs": lambda rng, shape: rng.normal(-300.0, 1.0, shape), "activation": "gelu"},
        {"inputs": lambda rng, shape: 1e-5 * rng.normal(size=shape)},
        {"inputs": lambda rng, shape: rng.integers(0, 17, shape).astype("int32")},
    ],
    "softmax as logits": [
        {"softmax": True, "task": "categorical", "optimizer": lambda: optimizers.SGD(0.1)},
        {"from_logits": False, "task": "categorical"},
        {"softmax": True, "task": "binary", "activation": "tanh"},
    ],
}


#: Written when the rules were final, and counted with another seed.
HELD_OUT = {
    "wrong init": [
        {"kernel": normal(3.0), "at": (3,), "activation": "silu"},
        {"kernel": normal(5e-4), "at": PLACES, "task": "binary"},
    ],
    "dead ReLUs": [
        {"bias": -60.0, "at": (1,), "task": "categorical"},
        {"bias": -25.0, "at": (4,), "activation": "gelu"},
    ],
    "missing gradient": [{"cut": keras.ops.sign, "at": (3,), "optimizer": lambda: optimizers.RMSprop(1e-3)}],
    "exploding depth": [{"kernel": orthogonal(2.8), "at": range(1, 21), "depth": 20, "unnormalized": True}],
    "saturated tanh": [
        {"bias": -6.0, "at": (1, 2), "activation": "tanh", "task": "binary"},
        {"kernel": times(8.0), "at": (4,), "activation": "tanh"},
    ],
    "frozen by mistake": [{"frozen": True, "at": (2, 4), "activation": "gelu"}],
    "identical layers": [{"seeds": lambda place: min(place, 3), "task": "categorical"}],
    "L2 and Adam": [{"penalty": 3e-4, "optimizer": lambda: ok.optimizers.SAM("Adam", learning_rate=1e-3)}],
    "wrong output bias": [
        {"output_bias": [5.0, -5.0, 0.0, 5.0]},
        {"output_bias": [-7.0], "task": "binary", "optimizer": lambda: optimizers.SGD(0.01)},
    ],
    "rate 100 times off": [
        {"optimizer": lambda: ok.optimizers.AdamW(0.1), "task": "categorical"},
        {"optimizer": lambda: optimizers.RMSprop(1e-5), "activation": "gelu"},
        {"optimizer": lambda: optimizers.SGD(2e-6, momentum=0.9)},
    ],
    "unscaled inputs": [
        {"inputs": lambda rng, shape: pixels(rng, shape, "int16"), "activation": "silu"},
        {"inputs": lambda rng, shape: rng.exponential(40.0, shape), "task": "categorical"},
    ],
    "softmax as logits": [{"softmax": True, "activation": "gelu"}, {"softmax": True, "task": "binary"}],
}


class Cut(layers.Layer):
    """Lets no gradient through."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def call(self, x):
        return self.function(x)


def hidden(how, place):
    """Arguments of a hidden layer."""
    here = place in how.get("at", ())
    seed = how.get("seeds", lambda place: place)(place)
    kernel = how["kernel"] if here and "kernel" in how else initializers.HeNormal
    return {
        "activation": how.get("activation", "relu"),
        "kernel_initializer": kernel(seed=seed) if kernel is initializers.HeNormal else kernel(seed),
        "bias_initializer": initializers.Constant(how["bias"] if here and "bias" in how else 0.0),
        "kernel_regularizer": regularizers.L2(how["penalty"]) if "penalty" in how else None,
        "trainable": not (here and how.get("frozen", False)),
    }


def attention(how, place, x):
    """An attention of a tensor to itself."""
    here = place in how.get("at", ())
    given = {}
    if here and "attention_kernel" in how:
        given["kernel_initializer"] = how["attention_kernel"](None)  # with a seed, all of its kernels would be equal
    if "attention_seeds" in how:
        given["kernel_initializer"] = initializers.GlorotUniform(seed=how["attention_seeds"](place))
    layer = layers.MultiHeadAttention(2, 8, **given)
    attended = layer(x, x)
    layer.trainable = not (here and how.get("attention_frozen", False))  # its kernels exist only now
    return attended


def cut(x, how, place, name="cut"):
    return Cut(how[name])(x) if name in how and place in how["at"] else x


def body(kind, how):
    """The input, and features of it."""
    places = range(1, 1 + how.get("depth", 4))
    if kind == "cnn":
        x = inputs = keras.Input((8, 8, 3))
        for place in places:
            x = cut(layers.Conv2D(16, 3, padding="same", **hidden(how, place))(x), how, place)
        return inputs, layers.GlobalAveragePooling2D()(x)
    if kind == "mlp":
        x = inputs = keras.Input((20,))
        for place in places:
            x = cut(layers.Dense(64, **hidden(how, place))(x), how, place)
        return inputs, x
    inputs = keras.Input((6, 16))
    x = layers.Dense(16, kernel_initializer=initializers.GlorotUniform(seed=9))(inputs)
    normalized = layers.Identity if how.get("unnormalized") else layers.LayerNormalization
    for place in places:
        normal = normalized()(x)
        x = x + cut(attention(how, place, normal), how, place, "attention_cut")
        inner = layers.Dense(64, **hidden(how, place))(normalized()(x))
        x = x + layers.Dense(16)(cut(inner, how, place))
    return inputs, layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))


def build(kind, how=None, seed=0):
    """A compiled model, a batch and its labels."""
    how = how or {}
    keras.utils.set_random_seed(seed)
    rng = np.random.default_rng(seed)
    task = how.get("task", "sparse")
    units = 1 if task == "binary" else CLASSES
    inputs, x = body(kind, how)
    activation = ("sigmoid" if task == "binary" else "softmax") if how.get("softmax") else None
    head = layers.Dense(units, activation)
    model = keras.Model(inputs, head(x))
    if "output_bias" in how:
        head.bias.assign(how["output_bias"])
    losses = {
        "sparse": keras.losses.SparseCategoricalCrossentropy,
        "categorical": keras.losses.CategoricalCrossentropy,
        "binary": keras.losses.BinaryCrossentropy,
    }
    optimizer = how.get("optimizer", lambda: optimizers.Adam(1e-3))()
    model.compile(optimizer, losses[task](from_logits=how.get("from_logits", True)))
    shape = (32, *inputs.shape[1:])
    batch = how["inputs"](rng, shape) if "inputs" in how else rng.normal(size=shape)
    if batch.dtype == "float64":
        batch = batch.astype("float32")
    y = rng.choice(max(units, 2), 32, p=how.get("labels"))
    if task == "categorical":
        y = np.eye(CLASSES, dtype="float32")[y]
    if task == "binary":
        y = y.astype("float32")[:, None]
    return model, batch, y


def first(kind, how=None, seed=0):
    """The rule that warns first, or None, and all warnings."""
    report = inspect(*build(kind, how, seed))
    return (report.warnings[0].rule if report.warnings else None), report


def applies(kind, way):
    return kind == "transformer" or not any(name.startswith("attention") for name in way)


# -- healthy models ---------------------------------------------------------------------------------------------------


def _images(rng, size=8, side=32, classes=10):
    return rng.normal(size=(size, side, side, 3)).astype("float32"), rng.integers(0, classes, size)


def _compiled(model, optimizer=None, loss="sparse_categorical_crossentropy"):
    model.compile(optimizer or optimizers.Adam(1e-3), loss)
    return model


def stock(name, optimizer=None, **given):
    """A model of keras.applications without trained weights."""

    def make(rng):
        make = getattr(keras.applications, name)
        return _compiled(make(weights=None, input_shape=(32, 32, 3), classes=10, **given), optimizer), *_images(rng)

    return make


def lstm(rng):
    units = [layers.LSTM(32, return_sequences=True), layers.Bidirectional(layers.LSTM(16)), layers.Dense(1, "sigmoid")]
    model = keras.Sequential([keras.Input((12,)), layers.Embedding(100, 16), *units])
    x = rng.integers(0, 100, (16, 12))
    return _compiled(model, loss="binary_crossentropy"), x, (x[:, 0] > 50).astype("float32")


def gru_of_series(rng):
    model = keras.Sequential([keras.Input((20, 5)), layers.GRU(32), layers.Dropout(0.3), layers.Dense(1)])
    return _compiled(model, loss="mse"), rng.normal(size=(16, 20, 5)).astype("float32"), rng.normal(size=(16, 1))


def residual(rng):
    """Residual blocks whose ends begin as zero."""
    x = inputs = keras.Input((16, 16, 3))
    x = layers.Conv2D(16, 3, padding="same", kernel_initializer="he_normal")(x)
    for _ in range(6):
        inner = layers.Conv2D(16, 3, padding="same", activation="relu", kernel_initializer="he_normal")(x)
        x = layers.Add()([x, layers.Conv2D(16, 3, padding="same", kernel_initializer="zeros")(inner)])
    model = keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(layers.ReLU()(x))))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return _compiled(model, optimizers.SGD(0.05, momentum=0.9), loss), *_images(rng, 16, 16)


def warmup_transformer(rng):
    """A transformer with small kernels, GELU, a learned start and a rate that begins at 0."""
    inputs = keras.Input((10,), dtype="int32")

    def small():  # a new one for each layer: one that is shared draws the same numbers each time
        return initializers.TruncatedNormal(stddev=0.02)

    x = layers.Embedding(50, 64, embeddings_initializer=small())(inputs)
    for _ in range(2):
        inner = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(4, 16, kernel_initializer=small())(inner, inner)
        inner = layers.Dense(256, "gelu", kernel_initializer=small())(layers.LayerNormalization()(x))
        x = x + layers.Dropout(0.1)(layers.Dense(64, kernel_initializer=small())(inner))
    model = keras.Model(inputs, layers.Dense(50, "softmax", kernel_initializer=small())(layers.LayerNormalization()(x)))
    rate = ok.schedules.Warmup(ok.schedules.Cosine(1e-3, 1000), steps=100)
    x = rng.integers(0, 50, (8, 10))
    return _compiled(model, ok.optimizers.AdamW(rate, weight_decay=0.1)), x, np.roll(x, -1, 1)


def fine_tuned(rng):
    """A frozen backbone, and a head."""
    convolutions = [layers.Conv2D(32, 3, 2, activation="relu", kernel_initializer="he_normal") for _ in range(3)]
    backbone = keras.Sequential([keras.Input((32, 32, 3)), *convolutions, layers.GlobalAveragePooling2D()])
    backbone.trainable = False
    parts = [layers.Rescaling(1 / 127.5, -1), backbone, layers.Dense(10, "softmax")]
    model = keras.Sequential([keras.Input((32, 32, 3)), *parts])
    return _compiled(model), pixels(rng, (8, 32, 32, 3), "uint8"), rng.integers(0, 10, 8)


def two_inputs(rng):
    numbers, words = keras.Input((6,), name="numbers"), keras.Input((4,), name="words")
    x = layers.Dense(32, "relu")(layers.BatchNormalization()(numbers))
    y = layers.Flatten()(layers.Embedding(1000, 8)(words))
    x = layers.Dense(32, "relu")(layers.Concatenate()([x, y]))
    model = keras.Model(
        [numbers, words], {"kind": layers.Dense(3, "softmax", name="kind")(x), "size": layers.Dense(1, name="size")(x)}
    )
    model.compile(
        "adam", {"kind": "sparse_categorical_crossentropy", "size": "mse"}, loss_weights={"kind": 1.0, "size": 0.1}
    )
    x = {"numbers": rng.normal(50, 20, (32, 6)).astype("float32"), "words": rng.integers(0, 1000, (32, 4))}
    return model, x, {"kind": rng.integers(0, 3, 32), "size": rng.normal(size=(32, 1)).astype("float32")}


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.inner = [layers.Dense(32, "silu") for _ in range(3)]
        self.end = layers.Dense(1)

    def call(self, x, training=False):
        for layer in self.inner:
            x = layer(x)
        self.add_loss(1e-3 * keras.ops.mean(keras.ops.square(x)))
        return self.end(x)


def subclassed(rng):
    model = _compiled(Subclassed(), ok.optimizers.Lion(3e-4), "mse")
    x = rng.normal(size=(32, 7)).astype("float32")
    model(x)
    return model, x, x.sum(1)


def usual(kind, **how):
    def make(rng):
        return build(kind, how, int(rng.integers(1000)))

    return make


def tanh_net(rng):
    model = keras.Sequential(
        [keras.Input((10,)), *[layers.Dense(50, "tanh") for _ in range(5)], layers.Dense(3, "softmax")]
    )
    return _compiled(model, optimizers.SGD(0.01)), rng.normal(size=(16, 10)).astype("float32"), rng.integers(0, 3, 16)


def deep_with_norm(rng):
    model = keras.Sequential([keras.Input((10,))])
    for _ in range(20):
        model.add(layers.Dense(32, use_bias=False))
        model.add(layers.BatchNormalization())
        model.add(layers.Activation("relu"))
    model.add(layers.Dense(2, "softmax"))
    return _compiled(model), rng.normal(size=(64, 10)).astype("float32"), rng.integers(0, 2, 64)


#: Twenty runs with nothing wrong, each of which may have another seed.
HEALTHY = {
    "mlp": usual("mlp"),
    "mlp, binary, SGD with momentum": usual("mlp", task="binary", optimizer=lambda: optimizers.SGD(0.01, momentum=0.9)),
    "cnn": usual("cnn"),
    "cnn, categorical, RMSprop": usual("cnn", task="categorical", optimizer=lambda: optimizers.RMSprop(1e-3)),
    "transformer": usual("transformer"),
    "transformer, gelu, Adam 3e-4": usual("transformer", activation="gelu", optimizer=lambda: optimizers.Adam(3e-4)),
    "LSTM": lstm,
    "GRU": gru_of_series,
    "residual net": residual,
    "transformer with warm-up": warmup_transformer,
    "frozen backbone": fine_tuned,
    "two inputs": two_inputs,
    "subclassed": subclassed,
    "tanh": tanh_net,
    "deep, normalized": deep_with_norm,
    "ResNet50": stock("ResNet50"),
    "MobileNetV2": stock("MobileNetV2", optimizers.SGD(0.1, momentum=0.9)),
    "DenseNet121": stock("DenseNet121"),
    "EfficientNetB0": stock("EfficientNetB0"),
    "VGG16": stock("VGG16", optimizers.Adam(1e-4)),
}


def count(ways, seed=0):
    """Prints what is found first for each way to plant each fault, and how often that is right."""
    right = total = 0
    for how, each in ways.items():
        for place, way in enumerate(each):
            for kind in KINDS:
                if not applies(kind, way):
                    continue
                found, _ = first(kind, way, seed)
                total += 1
                right += found in BROKEN[how]
                mark = "right" if found in BROKEN[how] else "WRONG"
                print(f"{how:20} {place} {kind:12} {found!s:24} {mark}", flush=True)
    return right, total


def healthy(seeds):
    """Prints what is found in healthy models, and returns how many alarms there are, of how many."""
    alarms = total = 0
    for name, make in HEALTHY.items():
        for seed in seeds:
            keras.utils.set_random_seed(seed)
            begun = time.perf_counter()
            if len(sys.argv) > 2 and name not in sys.argv:
                continue
            report = inspect(*make(np.random.default_rng(seed)))
            alarms, total = alarms + bool(report.warnings), total + 1
            print(
                f"{name:32} seed {seed} {time.perf_counter() - begun:6.1f} s  {[str(e) for e in report.warnings]}",
                flush=True,
            )
            keras.backend.clear_session()
    return alarms, total


def main():
    """Prints what is found in each case, and the counts."""
    if "held out" in sys.argv:
        held_out = count(HELD_OUT, seed=2)
        print(f"held out: {held_out[0]} of {held_out[1]}")
        return 0
    if "healthy" not in sys.argv:
        firsts = count({how: ways[:1] for how, ways in WAYS.items()})
        others = count({how: ways[1:] + OTHERS[how] for how, ways in WAYS.items()}, seed=1)
        held_out = count(HELD_OUT, seed=2)
        print(f"named first with the right cause: {firsts[0]} of {firsts[1]}")
        print(f"planted in other ways: {others[0]} of {others[1]}")
        print(f"held out: {held_out[0]} of {held_out[1]}")
    if "broken" not in sys.argv:
        alarms = healthy([0])
        print(f"false alarms: {alarms[0]} of {alarms[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
