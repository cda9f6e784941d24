"""Latents are those of the clips as they are: what has changed since is encoded anew, and nothing else."""

import contextlib
import json
import os

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from vgjax import encode
from vgjax.data.sources import Folder, Latents
from vgjax.errors import UserError
from vgjax.nn.codec import LatentStats
from vgjax.pipeline.codec import Codec


class Means(Codec):
    """Its latents are means of pixels; counts what it encodes."""

    def __init__(self, vae="a"):
        super().__init__(None, contextlib.nullcontext, LatentStats(jnp.zeros(1), jnp.ones(1)), lambda: vae)
        object.__setattr__(self, "seen", [])

    def latent_shape(self, frames, size):
        return frames, *size, 1

    def encoder(self, frames, size):
        def means(clips):
            self.seen.append(len(clips))
            return clips.astype(np.float32).mean(axis=-1, keepdims=True)

        return contextlib.nullcontext((2, means))


DATA = ConfigDict(dict(frames=1, size=(4, 4), fps=None))


def write(folder, levels: dict[str, int]):
    for name, level in levels.items():
        Image.fromarray(np.full((4, 4, 3), level, np.uint8)).save(folder / f"{name}.png")


def captioned(folder, captions: dict[str, str]):
    lines = (json.dumps({"video": f"{name}.png", "caption": text}) for name, text in captions.items())
    (folder / "captions.jsonl").write_text("\n".join(lines))


def ensured(folder, by):
    encode.ensure(
        Folder(folder),
        DATA,
        by if isinstance(by, encode.By) else encode.By(by),
        folder.parent / "latents",
        folder.parent / "bad.jsonl",
    )
    there = Latents(folder.parent / "latents")
    return [(float(latent.mean()), caption) for latent, caption in map(there.load, range(len(there)))]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "clips").mkdir()
    write(tmp_path / "clips", {"a": 10, "b": 20, "c": 30})
    captioned(tmp_path / "clips", {"a": "one", "b": "two", "c": "three"})
    return tmp_path / "clips"


def test_what_changed_is_encoded_anew_in_the_order_of_the_source_and_nothing_else(folder):
    by = Means()
    assert ensured(folder, by) == [(10, "one"), (20, "two"), (30, "three")] and by.seen == [2, 1]
    again = Means()
    assert ensured(folder, again) and not again.seen  # as it was
    write(folder, {"b": 25, "d": 5})
    captioned(folder, {"d": "zero", "a": "other words", "b": "two", "c": "three"})
    changed = Means()
    assert ensured(folder, changed) == [(5, "zero"), (10, "other words"), (25, "two"), (30, "three")]
    assert changed.seen == [2]
    os.utime(folder / "a.png")
    touched = Means()
    assert len(ensured(folder, touched)) == 4 and not touched.seen
    assert [path.name for path in folder.parent.iterdir() if "latents" in path.name] == ["latents"]


def test_a_write_that_fails_leaves_the_latents_that_were_there(folder):
    before = ensured(folder, Means())
    write(folder, {"b": 25})

    class Broken(encode.By):
        def read(self, captions, writer):
            raise RuntimeError("stop")

    codec = Means()
    with pytest.raises(RuntimeError, match="stop"):
        ensured(folder, Broken(codec))
    assert not codec.seen  # an encoder that fails is noticed before any clip is encoded
    there = Latents(folder.parent / "latents")
    assert [float(there.load(i)[0].mean()) for i in range(3)] == [value for value, _ in before]


def test_latents_of_another_vae_are_refused(folder):
    ensured(folder, Means())
    with pytest.raises(UserError, match="another vae"):
        ensured(folder, Means("b"))


def test_videos_without_captions_train_what_needs_none(tmp_path):
    write(tmp_path, {"a": 10, "b": 20})
    with pytest.raises(UserError, match="no caption"):
        Folder(tmp_path)
    source = Folder(tmp_path, captioned=False)
    assert [caption for _, caption in source.records] == ["", ""] and not source.skipped
