"""Programs in the form of public ones, with everything dropped in; `tests/programs.py` runs and kills all of them."""

import keras
import programs
import pytest
from small import boom

import keras_optkit as ok


@pytest.mark.few(1)
@pytest.mark.only_on("tensorflow", because="their train_step uses a gradient tape")
@pytest.mark.parametrize("name", ["actor_critic", "vae"])
def test_a_program_that_is_interrupted_and_run_again(name, tmp_path):
    def run(directory, *more):
        resume = ok.callbacks.Resume(directory / "resume", every=2)
        monitor = ok.callbacks.TrainingMonitor(directory / "monitor", every=1)
        last = ok.callbacks.Checkpoint(directory / "last", monitor=None, top_k=0, save="weights")
        guard = ok.callbacks.NonFiniteGuard(spike=None)
        tools = programs.Tools(directory, lambda _: [monitor, guard, last, *more, resume])
        keras.utils.set_random_seed(1)
        state = programs.state(programs.program(name).train(tools), tools)
        return dict(enumerate(state.values())), resume.resumed_from  # Keras numbers names through in a process

    whole, _ = run(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="boom"):
        run(tmp_path / "broken", programs.Count(8, boom))
    again, place = run(tmp_path / "broken")
    assert place[0] == 1  # the second epoch
    assert len(whole) > 10
    assert programs.unequal(again, whole) == []
