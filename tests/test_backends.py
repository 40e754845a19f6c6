"""What works, and what is checked, on which backend of Keras."""

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

import keras_optkit as ok
from keras_optkit.testing import check, checks_for, not_on, tools
from keras_optkit.testing.conformance import BACKENDS

ROOT = Path(__file__).parent.parent

#: The checks that JAX does not have, and why.
NOT_ON_JAX = {
    "optimizer-fused": "elsewhere a step is compiled as a whole or not at all",
    "optimizer-replicas": "tf.distribute; on JAX one step sees the arrays of all devices whole",
    "optimizer-rows": "tf.IndexedSlices; elsewhere the gradients of embeddings are dense",
    "transform-rows": "elsewhere the gradients of embeddings are dense",
}
XLA = "the other backends of Keras do not compile with XLA"


def on_jax(code):
    """Runs `code` in a fresh interpreter on JAX, in which TensorFlow is nowhere, and returns the JSON printed last."""
    code = "import sys; sys.modules['tensorflow'] = None\n" + code
    environment = os.environ | {"KERAS_BACKEND": "jax", "PYTHONWARNINGS": "error::UserWarning"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_checks_that_jax_does_not_have():
    assert not_on("jax") == NOT_ON_JAX
    assert not_on("tensorflow") == {}


def test_a_check_is_left_out_where_it_does_not_exist():
    elsewhere = not_on("torch", "schedule") | not_on("torch", "layer")
    assert elsewhere == {"schedule-compiled_is_eager": XLA, "layer-compiled_is_eager": XLA}
    (card, *_) = ok.cards("layer")
    names = {backend: {c.name for c in checks_for(card, backend)} for backend in BACKENDS}
    assert names["jax"] == names["tensorflow"] == names["torch"] | {"compiled_is_eager"}
    assert {c.name for c in checks_for(card)} == names[keras.config.backend()]


def test_the_guide_names_every_check_that_a_backend_does_not_have():
    guide = (ROOT / "docs" / "guide" / "conformance.md").read_text(encoding="utf-8")
    for name in {name.partition("-")[2] for backend in BACKENDS for name in not_on(backend)}:
        assert f"`{name}`" in guide, name


def test_a_known_failure_may_name_a_check_of_another_backend():
    (card, *_) = ok.cards("layer")
    known = ok.Card(name="Known", kind="layer", make=card.make, known_failures={"compiled_is_eager": "reason"})
    assert "compiled_is_eager" not in {c.name for c in checks_for(known, "torch")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"only_on": "tensorflow"}, "only_on and because must be given together"),
        ({"because": "it is so"}, "only_on and because must be given together"),
        ({"only_on": ("jax", "tensorflo"), "because": "it is so"}, "only_on.*'tensorflo'.*mean 'tensorflow'"),
    ],
)
def test_a_backend_needs_a_reason_and_a_right_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        check("layer", **arguments)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"backend must be one of.*'jaxx'.*mean 'jax'"):
        not_on("jaxx")
    with pytest.raises(ValueError, match=r"backend must be one of.*'jaxx'"):
        checks_for(ok.cards("layer")[0], "jaxx")
    with pytest.raises(ValueError, match=r"kind must be one of.*'layers'"):
        not_on("jax", "layers")


@pytest.mark.once
def test_float64_is_there_inside_only():
    with tools.float64():
        assert keras.ops.ones((), "float64").dtype == "float64"
    assert on_jax(
        "import json, numpy as np\n"
        "from jax.numpy import asarray\n"
        "from keras_optkit.testing.tools import float64\n"
        "seen = [str(asarray(np.ones(1)).dtype)]\n"
        "with float64():\n"
        "    seen.append(str(asarray(np.ones(1)).dtype))\n"
        "print(json.dumps([*seen, str(asarray(np.ones(1)).dtype)]))"
    ) == ["float32", "float64", "float32"]
