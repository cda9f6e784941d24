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
    ours = schedule.euler(dict(theirs.config), steps, whole)
    np.testing.assert_allclose(1.0 - ours, theirs.sigmas.numpy(), atol=2e-7)
    assert ours[-1] == 1.0 and (np.diff(ours) > 0).all()


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_unipc_has_the_levels_of_its_scheduler(shift):
    theirs = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, num_train_timesteps=1000
    )
    theirs.set_timesteps(20)
    np.testing.assert_allclose(1.0 - schedule.unipc(dict(theirs.config), 20), theirs.sigmas.numpy(), atol=2e-6)


@pytest.mark.parametrize(
    "key,value", [("use_dynamic_shifting", True), ("shift_terminal", 0.1), ("use_karras_sigmas", True)]
)
def test_a_schedule_that_is_not_written_is_refused(key, value):
    with pytest.raises(UserError, match=f"scheduler: {key}={value} is not supported"):
        schedule.euler({key: value}, 8, whole=True)
