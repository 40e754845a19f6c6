"""Small programs in the form of public examples. Each has `SOURCE`, what it is modelled on, and `train(tools)`.

`tools` makes what is compared (see `tests/programs.py`): `adam` and `sgd` are Keras's optimizers, or those of this
package with the same formula, and `callbacks(fit)` gives the callbacks of the fit of that name. `train` returns the
model.
"""
