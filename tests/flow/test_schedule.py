"""The published schedules, level by level, as diffusers computes them."""

import diffusers
import numpy as np
import pytest

from vgjax.errors import UserError
from vgjax.flow import schedule


@pytest.mark.parametrize("shift", [1.0, 3.0, 7.0, 12.0])
@pytest.mark.parametrize("steps", [1, 8, 50])
@pytest.mark.parametrize("whole", [True, False])
def test_euler_has_the_levels_of_its_scheduler(shift, steps, whole):
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(steps, **(dict(sigmas=np.linspace(1.0, 0.0, steps + 1)[:-1]) if whole else {}))
    ours = schedule.published({"_class_name": type(theirs).__name__, **theirs.config}, steps, whole=whole)
    assert ours.told is ours.times
    ours = ours.times
    np.testing.assert_allclose(1.0 - ours, theirs.sigmas.numpy(), atol=2e-7)
    assert ours[-1] == 1.0 and (np.diff(ours) > 0).all()


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("steps", [1, 20, 50])
def test_unipc_has_the_levels_and_whole_timesteps_of_its_scheduler(shift, steps):
    theirs = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, num_train_timesteps=1000
    )
    theirs.set_timesteps(steps)
    ours = schedule.published({"_class_name": type(theirs).__name__, **theirs.config}, steps)
    np.testing.assert_allclose(1.0 - ours.times, theirs.sigmas.numpy(), atol=1e-7)
    np.testing.assert_allclose(1.0 - ours.told[:-1], theirs.timesteps.numpy() / 1000, atol=1e-7)


@pytest.mark.parametrize(
    "key,value", [("use_dynamic_shifting", True), ("shift_terminal", 0.1), ("use_karras_sigmas", True)]
)
def test_a_schedule_that_is_not_written_is_refused(key, value):
    with pytest.raises(UserError, match=f"scheduler: {key}={value} is not supported"):
        schedule.euler({key: value}, 8, whole=True)


@pytest.mark.parametrize(
    "change,said",
    [
        (dict(_class_name="DDIMScheduler"), "DDIMScheduler is not supported; known are FlowMatchEuler"),
        (dict(use_karras_sigmas=True), "use_karras_sigmas=True is not supported"),
        (dict(disable_corrector=[0]), r"disable_corrector=\[0\] is not supported"),
        (dict(solver_order=3), "solver_order=3 is not supported, only 2 is"),
        (dict(solver_type="bh1"), "solver_type='bh1' is not supported, only 'bh2' is"),
        (dict(prediction_type="epsilon"), "prediction_type='epsilon' is not supported"),
        (dict(use_flow_sigmas=False), "supported for flows"),
        (dict(final_sigmas_type="sigma_min"), "that end at zero"),
    ],
)
def test_a_method_that_is_not_written_is_refused(change, said):
    config = {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    with pytest.raises(UserError, match=said):
        schedule.published(config | change, 8)


def test_a_shift_replaces_the_one_published():
    base = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0, "shift": 3.0}
    for name, own in (("UniPCMultistepScheduler", "flow_shift"), ("FlowMatchEulerDiscreteScheduler", "shift")):
        changed = schedule.published({**base, "_class_name": name}, 8, 5.0).times
        np.testing.assert_array_equal(changed, schedule.published({**base, "_class_name": name, own: 5.0}, 8).times)
        assert (changed != schedule.published({**base, "_class_name": name}, 8).times).any()
