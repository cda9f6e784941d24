"""Wan, published, converted and sampled: one expert, two, an image, a time for each frame; as in diffusers."""

import dataclasses

import jax
import numpy as np
import open_models
import parity
import pytest
import torch
from conftest import program
from PIL import Image

from vgjax import convert, sample
from vgjax.data.decode import read_clip
from vgjax.errors import USER, UserError
from vgjax.open import wan
from vgjax.open.store import Store
from vgjax.parallel import layouts
from vgjax.pipeline.published import pipeline

PROMPTS = ["A cat  walks on the &amp; grass,\n realistic", "a red dog runs slowly over snow."]
KINDS = {
    "text": dict(),
    "text, Euler": dict(euler=True),
    "two experts": dict(experts=2),
    "image": dict(image=True),
    "image, two experts": dict(image=True, experts=2),
    "image, a time for each frame": dict(image=True, each=True),
    "text, a time for each frame": dict(each=True),
}
SIZE = (32, 64)  # height, width


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    made = {}

    def get(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp("wan")
            pipe = open_models.wan(folder / "published", **KINDS[kind])
            convert.convert(folder / "published", folder / "converted", None, None)
            made[kind] = pipe, pipeline(Store(folder / "converted"))
        return made[kind]

    return get


@pytest.fixture(scope="module")
def picture():
    return np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)


def test_prompts_become_the_published_embeddings(pairs):
    pipe, sampler = pairs("text")
    with torch.no_grad():
        c, other = pipe.encode_prompt(PROMPTS, "bad, blurry", max_sequence_length=512)
    ours, negative = sampler.condition(PROMPTS, wan.settings(sampler.source), "bad, blurry")
    parity.near(ours.text["text"].c, c, 1e-4, 1e-4)
    parity.near(negative.text["text"].c, other, 1e-4, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_eight_steps_give_the_latents_and_frames_of_the_reference(pairs, picture, kind):
    pipe, sampler = pairs(kind)
    store = sampler.source
    cfg = (4.0, 2.0) if "two" in kind else (5.0,)
    use = wan.settings(store, steps=8, frames=5, size=SIZE, cfg=cfg)
    noise = jax.random.normal(jax.random.key(3), (2, *sampler.codec.latent_shape(use.frames, use.size)))
    image = picture if "image" in kind else None
    context = sampler.condition(PROMPTS, use, "bad, blurry", image)
    asked = dict(prompt=PROMPTS, negative_prompt=["bad, blurry"] * 2, num_inference_steps=8, num_frames=5)
    asked |= dict(height=SIZE[0], width=SIZE[1], latents=parity.to_torch(noise), guidance_scale=cfg[0])
    asked |= dict(guidance_scale_2=cfg[1]) if len(cfg) > 1 else {}
    asked |= dict(image=Image.fromarray(picture)) if image is not None else {}
    ours = sampler.latents(context, use, starts=noise)
    parity.near(ours, parity.of_torch(pipe(output_type="latent", **asked).frames), 1e-3, 1e-3)
    frames = pipe(output_type="np", **asked).frames
    parity.near(np.clip(sampler.codec.frames(ours) / 2 + 0.5, 0, 1), frames, 1e-3, 1e-3)


@pytest.fixture(scope="module")
def alone(pairs):
    """(the folder of two experts, all that a sampling takes, the latents of one device)."""
    _, sampler = pairs("two experts")
    use = wan.settings(sampler.source, steps=4, frames=5, size=SIZE)
    noise = jax.random.normal(jax.random.key(3), (1, *sampler.codec.latent_shape(use.frames, use.size)))
    asked = sampler.condition(PROMPTS[:1], use), use
    return sampler.source.folder, asked, noise, sampler.latents(*asked, starts=noise)


@pytest.mark.parametrize("kind", layouts.LAYOUTS)
def test_every_layout_samples_the_latents_of_one_device(alone, kind):
    folder, asked, noise, latents = alone
    spread = pipeline(Store(folder, where=layouts.find(kind, 8)))
    np.testing.assert_allclose(spread.latents(*asked, starts=noise), latents, atol=1e-4)


def test_the_scheduler_names_the_stepper_and_another_one_may_be_asked_for(pairs):
    sampler = pairs("two experts")[1]
    assert wan.settings(pairs("text, Euler")[1].source).stepper == "euler"
    use = wan.settings(sampler.source, steps=4, frames=5, size=SIZE)
    assert use.stepper == "unipc"
    noise = jax.random.normal(jax.random.key(3), (2, *sampler.codec.latent_shape(use.frames, use.size)))
    context = sampler.condition(PROMPTS, use)
    base = sampler.latents(context, use, starts=noise)
    for change in (dict(stepper="euler"), dict(stepper="churn"), dict(rescale=0.7), dict(interval=(0.0, 0.3))):
        assert (sampler.latents(context, dataclasses.replace(use, **change), starts=noise) != base).any(), change
    churn = dataclasses.replace(use, stepper="churn")
    one, other = (sampler.latents(context, churn, seed, starts=noise) for seed in (0, 1))
    assert (one != other).any()
    with pytest.raises(UserError, match="'rk9' is unknown: use one of euler"):
        wan.settings(sampler.source, stepper="rk9")


def test_defaults_are_those_published(pairs):
    of = {kind: wan.settings(pairs(kind)[1].source) for kind in ("text", "two experts", "text, a time for each frame")}
    assert (of["text"].steps, of["text"].cfg, of["text"].frames) == (50, (5.0,), 81)
    assert (of["two experts"].steps, of["two experts"].cfg) == (40, (4.0, 3.0))
    assert (of["text, a time for each frame"].frames, of["text, a time for each frame"].fps) == (121, 24.0)


def test_experts_meet_at_the_boundary(pairs):
    store = pairs("two experts")[1].source
    high, low = wan.stages(store, wan.settings(store))
    assert (high.name, low.name) == ("transformer", "transformer_2")
    assert high.schedule.times[-1] == low.schedule.times[0] and low.schedule.times[-1] == 1.0
    assert 1 - high.schedule.told[-2] >= 0.875 > 1 - low.schedule.told[0]


def test_an_image_is_asked_for_where_it_is_needed_and_refused_where_it_is_not(pairs, picture):
    with pytest.raises(UserError, match="starts from an image: give --image"):
        wan.condition(pairs("image")[1].source, None, 5, SIZE)
    with pytest.raises(UserError, match="takes no image: leave --image out"):
        wan.condition(pairs("text")[1].source, picture, 5, SIZE)


def test_a_size_that_does_not_fit_is_said_in_pixels(pairs):
    sampler = pairs("text")[1]
    for size, near in (((1080, 1920), "1088x1920"), ((32, 60), "32x64"), ((8, 64), "16x64")):
        with pytest.raises(UserError, match=f"patches of 16x16 pixels; the nearest that does is {near}"):
            sampler.codec.latent_shape(5, size)


def test_what_would_have_no_effect_is_refused(pairs):
    sampler, options = pairs("text")[1], dict(frames=5, size=SIZE, steps=1)
    with pytest.raises(UserError, match="--guidance .* no Wan is one: give --cfg"):
        sampler(PROMPTS[:1], guidance=6.0, **options)
    with pytest.raises(UserError, match="--negative has no effect at --cfg 1"):
        sampler(PROMPTS[:1], negative="blurry", cfg=(1.0,), **options)


def test_the_command_line_makes_a_video_of_an_image(pairs, picture, tmp_path, capsys):
    folder = pairs("image")[1].source.folder
    Image.fromarray(picture).save(tmp_path / "first.png")
    asked = ["--checkpoint", folder, "--prompt", "a cat walks", "--image", tmp_path / "first.png", "--steps", "2"]
    asked += ["--frames", "5", "--size", "32x64", "--out", tmp_path / "out"]
    ran = program("sample", *asked)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "peak memory: host" in ran.stdout and "WanImageToVideoPipeline" in ran.stdout
    assert read_clip(tmp_path / "out" / "000.mp4", 5, SIZE, fps=16).shape == (5, *SIZE, 3)
    missing = [*asked[:5], tmp_path / "none.png", *asked[6:]]
    for wrong, said in (
        ([*asked, "--weights", "ema"], "--weights is for runs trained here"),
        (missing, "none.png cannot be read as a picture"),
    ):
        with pytest.raises(SystemExit) as stopped:
            sample.main(["sample", *map(str, wrong)])
        assert stopped.value.code == USER and said in capsys.readouterr().err
