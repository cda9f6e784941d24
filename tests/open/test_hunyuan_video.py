"""HunyuanVideo, published, converted and sampled: the embeddings, latents and frames of the diffusers pipeline."""

import dataclasses
import shutil

import jax
import numpy as np
import open_models
import parity
import pytest
import torch

from vgjax import convert
from vgjax.data.storage import seal
from vgjax.errors import UserError
from vgjax.open import hunyuan_video
from vgjax.open.store import Store
from vgjax.parallel import layouts
from vgjax.pipeline.published import pipeline

PROMPTS = ["A cat walks on the grass, realistic", "a red dog runs slowly over snow."]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(their pipeline, our sampler of the same weights)."""
    folder = tmp_path_factory.mktemp("hunyuan_video")
    pipe = open_models.hunyuan_video(folder / "published")
    convert.convert(folder / "published", folder / "converted", None, None)
    return pipe, pipeline(Store(folder / "converted"))


@pytest.fixture(scope="module")
def settings(pair):
    return hunyuan_video.settings(pair[1].source, steps=8, frames=21, size=(32, 48))  # decoded in two clips


@pytest.fixture(scope="module")
def noise(pair, settings):
    return jax.random.normal(jax.random.key(3), (2, *pair[1].codec.latent_shape(settings.frames, settings.size)))


@pytest.fixture(scope="module")
def texts(pair, settings):
    return pair[1].condition(PROMPTS, settings)


@pytest.fixture(scope="module")
def latents(pair, settings, texts, noise):
    return pair[1].latents(texts, settings, starts=noise)


def test_prompts_become_the_published_embeddings(pair, texts):
    pipe, _ = pair
    with torch.no_grad():
        c, vec, mask = pipe.encode_prompt(PROMPTS)
    context, negative = texts
    ours, ours_mask = context.text["text"]
    assert negative is None and 8 < mask.sum(dim=1).min() < 256
    np.testing.assert_array_equal(ours_mask, mask.bool())
    parity.near(np.asarray(ours)[np.asarray(ours_mask)], c[mask.bool()], 1e-4, 1e-4)
    parity.near(context.vec, vec, 1e-4, 1e-4)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_eight_steps_give_the_latents_and_frames_of_the_reference(pair, settings, noise, cfg):
    pipe, sampler = pair
    use = dataclasses.replace(settings, cfg=(cfg,))
    given = sampler.condition(PROMPTS, use, "bad, blurry" if cfg > 1 else None)
    asked = dict(num_inference_steps=8, height=32, width=48, num_frames=21, true_cfg_scale=cfg)
    asked |= dict(negative_prompt=["bad, blurry"] * 2, latents=parity.to_torch(noise))
    theirs = pipe(PROMPTS, output_type="latent", **asked).frames
    ours = sampler.latents(given, use, starts=noise)
    parity.near(ours, parity.of_torch(theirs), 1e-3, 1e-3)
    frames = pipe(PROMPTS, output_type="np", **asked).frames
    parity.near(np.clip(sampler.codec.frames(ours) / 2 + 0.5, 0, 1), frames, 1e-3, 1e-3)


@pytest.mark.parametrize("kind", layouts.LAYOUTS)
def test_every_layout_samples_the_latents_of_one_device(pair, settings, texts, noise, latents, kind):
    spread = pipeline(Store(pair[1].source.folder, where=layouts.find(kind, 8)))
    np.testing.assert_allclose(spread.latents(texts, settings, starts=noise), latents, atol=1e-4)


def test_models_are_gone_when_they_have_done_their_part(pair, settings):
    store = pair[1].source
    hunyuan_video.conditioner(store)(PROMPTS[:1], keep=False)
    before = {id(leaf) for leaf in jax.live_arrays()}
    with store.model("transformer") as (_, params, _):
        assert len(jax.live_arrays()) > len(before)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_a_scale_is_told_to_a_distilled_model_alone(pair, tmp_path):
    shutil.copytree(pair[1].source.folder, tmp_path / "plain")
    assert hunyuan_video.settings(pair[1].source, guidance=4.0).guidance == 4.0
    for meta in (tmp_path / "plain" / "transformer").rglob("meta.json"):
        meta.write_text(meta.read_text().replace('"guidance_embeds": true', '"guidance_embeds": false'))
        meta.with_name("manifest.json").unlink()
        seal(meta.parent)
    with pytest.raises(UserError, match="not guidance-distilled; give --cfg instead"):
        hunyuan_video.settings(Store(tmp_path / "plain"), guidance=4.0)


def test_what_the_model_cannot_do_is_said(pair):
    store = pair[1].source
    with pytest.raises(UserError, match="videos of text alone: leave --image out"):
        hunyuan_video.condition(store, np.zeros((8, 8, 3), np.uint8), 5, (32, 48))
    with pytest.raises(UserError, match="--negative has no effect at --cfg 1.*give --cfg above 1"):
        pair[1](PROMPTS, negative="blurry", frames=5, size=(32, 48))
    with pytest.raises(UserError, match="nearest number of frames that works is 5"):
        pair[1](PROMPTS, frames=6, size=(32, 48))
    with pytest.raises(UserError, match="does not divide into patches"):
        pair[1](PROMPTS, frames=5, size=(40, 48))
