"""A pipeline of parts that are known by formula: stages take turns, batches change nothing, no option is ignored."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vgjax.data import text
from vgjax.errors import Diverged, UserError
from vgjax.flow.sampling import Settings
from vgjax.flow.schedule import Schedule
from vgjax.nn.codec import LatentStats
from vgjax.pipeline.codec import Codec
from vgjax.pipeline.pipeline import Pipeline, Prompts, Stage
from vgjax.typing import Conditioner, Context, Known


class Numbers:
    """A prompt is a number that its video becomes."""

    frozen = False

    def __call__(self, captions):
        return Context({}, np.array([[float(caption or 0)] for caption in captions], np.float32))

    def abstract(self, count):
        return Context({}, jax.ShapeDtypeStruct((count, 1), np.float32))

    def placed(self, where):
        return self

    def cut(self, captions):
        return []


class Bytes(Codec):
    """A number a pixel."""

    def __init__(self):
        super().__init__(None, contextlib.nullcontext, LatentStats(jnp.zeros(1), jnp.ones(1)), str)

    def latent_shape(self, frames, size):
        if frames % 2 == 0:
            raise UserError(f"frames={frames} must be odd")
        return (frames, *size, 1)

    def decode(self, z, batch, tile=0):
        videos = np.clip(np.round(np.nan_to_num(z)), 0, 255).astype(np.uint8).repeat(3, axis=-1)
        return videos, np.isfinite(z).all(axis=(1, 2, 3, 4))


def first_frame(image, frames, size):
    """An image is the first frame, which stays as it is."""
    if image is None:
        return Context({})
    mask = (np.arange(frames) == 0).astype(np.float32).reshape(1, frames, 1, 1, 1)
    return Context({}, known=Known(np.full((1, frames, *size, 1), image.mean(), np.float32), mask))


@dataclasses.dataclass(frozen=True)
class Towards:
    """The velocity that brings `x` to the number of its text at t = 1, times a variable."""

    def __call__(self, variables, context):
        def v(x, t, memory):
            target = context.vec[:, :, None, None, None]
            if "guidance" in context.scalars:
                target = target + context.scalars["guidance"][:, None, None, None, None]
            return variables * (target - x) / jnp.maximum(1.0 - t, 1e-3), memory

        return v


WHOLE = (np.linspace(0, 1, 9),)


def pipeline(closed=None, times=WHOLE, variable=1.0, tells=False):
    closed = [] if closed is None else closed

    @contextlib.contextmanager
    def opened(number):
        yield Towards(), np.float32(variable)
        closed.append(number)

    def stages(use, shape):
        given = enumerate(zip(times, use.cfg * len(times), strict=False))
        return [Stage(lambda i=i: opened(i), Schedule(np.float32(t), None), scale) for i, (t, scale) in given]

    defaults = Settings(steps=8, cfg=1.0, batch=2, frames=3, size=(2, 2))
    change = lambda **changed: dataclasses.replace(defaults, **changed)  # noqa: E731
    return Pipeline("numbers", None, Prompts(Numbers(), "", first_frame, tells), stages, Bytes(), change)


def test_the_parts_are_what_the_protocols_say():
    assert isinstance(Numbers(), Conditioner) and isinstance(text.Learned(text.Bytes(4)), Conditioner)


def test_videos_become_what_their_prompts_say_in_batches_of_any_size():
    prompts = [str(10 * i) for i in range(5)]
    whole = pipeline().sampled(prompts, seed=1, batch=5)
    assert whole.shape == (5, 3, 2, 2, 1)
    for batch in (1, 2, 32):
        np.testing.assert_allclose(pipeline().sampled(prompts, seed=1, batch=batch), whole, atol=1e-5)
    videos = pipeline()(prompts, seed=1)
    assert videos.dtype == np.uint8 and [int(video.mean()) for video in videos] == [0, 10, 20, 30, 40]


def test_a_sample_depends_on_the_seed_and_its_number_alone():
    early = dict(times=(np.linspace(0, 0.5, 5),))
    both = pipeline(**early).sampled(["1", "2"], seed=3)
    np.testing.assert_array_equal(pipeline(**early).sampled(["2"], seed=3, first=1)[0], both[1])
    assert (pipeline(**early).sampled(["1", "2"], seed=4) != both).all(axis=(1, 2, 3, 4)).all()


def test_stages_take_turns_and_each_is_let_go_before_the_next():
    halves, closed = (np.linspace(0, 0.5, 5), np.linspace(0.5, 1, 5)), []
    two = pipeline(closed, halves).sampled(["7"], seed=1)
    np.testing.assert_allclose(two, pipeline().sampled(["7"], seed=1), atol=1e-5)
    assert closed == [0, 1]
    none = pipeline(closed := [], (np.linspace(0, 1, 9), np.ones(1)))
    none.sampled(["7"])
    assert closed == [0]  # one that serves no time is not opened


def test_guidance_leads_away_from_the_negative_prompt_and_is_asked_for_by_its_scale():
    base = pipeline().sampled(["10"], cfg=3.0)
    away = pipeline().sampled(["10"], cfg=3.0, negative="4")
    assert base.mean() > away.mean() + 1  # 0 + 3 (10 - 0) and 4 + 3 (10 - 4)
    with pytest.raises(UserError, match="--negative has no effect at --cfg 1"):
        pipeline()(["10"], negative="4")


def test_known_frames_are_those_of_the_image_and_the_rest_is_made():
    image = np.full((2, 2, 3), 50, np.uint8)
    video = pipeline()(["20"], seed=1, image=image)[0]
    assert [int(frame.mean()) for frame in video] == [50, 20, 20]


def test_a_model_that_knows_the_scale_is_told_it_and_no_other():
    told = pipeline(tells=True).sampled(["10"], guidance=4.0)
    np.testing.assert_allclose(told, 14.0, atol=1e-3)
    np.testing.assert_allclose(pipeline().sampled(["10"], guidance=4.0), 10.0, atol=1e-3)


def test_what_is_not_finite_is_named():
    with pytest.raises(Diverged, match="2 of 2 samples .*'1', '2'"):
        pipeline(variable=np.nan)(["1", "2"])


@pytest.mark.parametrize(
    "changed, words",
    [
        (dict(frames=4), "must be odd"),
        (dict(batch=0), "batch=0"),
        (dict(fps=0.0), "fps=0.0"),
        (dict(size=(0, 2)), "size="),
        (dict(cfg=float("nan")), "cfg=nan must be finite"),
    ],
)
def test_settings_that_cannot_be_are_refused(changed, words):
    with pytest.raises(UserError, match=words):
        pipeline()(["1"], **changed)


def test_no_prompts_are_refused():
    with pytest.raises(UserError, match="no prompts"):
        pipeline()([])
