"""Embeddings of texts: computed once, kept beside the models, computed again where what was kept is no good."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from vgjax.open import texts
from vgjax.open.store import Store


@pytest.fixture
def family():
    """Two letters a token, and how often each text was computed."""
    seen = []

    def compute(store, prompts):
        seen.extend(prompts)
        mask = np.array([[i < len(text) for i in range(6)] for text in prompts])
        c = np.array([[[ord(text[i]) if i < len(text) else 99.0] * 2 for i in range(6)] for text in prompts])
        return c.astype(np.float32), mask, np.array([[len(text)] for text in prompts], np.float32)

    return SimpleNamespace(clean=str.strip, texts=compute, LENGTH=6, seen=seen)


@pytest.fixture
def store(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "vocab.json").write_text("{}")
    return Store(tmp_path)


def test_a_text_is_computed_once_and_comes_back_as_it_was(store, family):
    first = texts.embed(store, family, [" cat", "dog", "cat ", ""])
    assert family.seen == ["cat", "dog", ""]
    again = texts.embed(store, family, ["cat", "dog", "cat", ""])
    assert family.seen == ["cat", "dog", ""]
    jax.tree.map(np.testing.assert_array_equal, first, again)
    c, mask, vec = again
    assert c.shape == (4, 6, 2) and c[0, 0, 0] == ord("c") and not c[~mask].any()
    np.testing.assert_array_equal(vec[:, 0], [3, 3, 3, 0])


def test_one_new_text_among_known_ones_is_computed_alone(store, family):
    texts.embed(store, family, ["cat"])
    c, *_ = texts.embed(store, family, ["dog", "cat"])
    assert family.seen == ["cat", "dog"] and c[:, 0, 0].tolist() == [ord("d"), ord("c")]


def test_another_tokenizer_or_type_computes_anew(store, family):
    texts.embed(store, family, ["cat"])
    texts.embed(dataclasses.replace(store, dtype=np.float16), family, ["cat"])
    (store.folder / "tokenizer" / "vocab.json").write_text("{ }")
    texts.embed(store, family, ["cat"])
    assert family.seen == ["cat"] * 3


@pytest.mark.parametrize("name, value", [("LENGTH", 7), ("CROP", 3), ("TEMPLATE", "Say: {}")])
def test_another_reading_of_the_same_encoders_computes_anew(store, family, name, value):
    texts.embed(store, family, ["cat"])
    setattr(family, name, value)
    texts.embed(store, family, ["cat"])
    assert family.seen == ["cat"] * 2


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-30], lambda data: b"PK" + data[9:]])
def test_a_kept_text_that_is_damaged_is_computed_again(store, family, damage):
    want = texts.embed(store, family, ["cat"])
    (file,) = (store.folder / texts.FOLDER).iterdir()
    file.write_bytes(damage(file.read_bytes()))
    jax.tree.map(np.testing.assert_array_equal, texts.embed(store, family, ["cat"]), want)
    assert family.seen == ["cat"] * 2


def test_a_folder_that_cannot_be_written_only_keeps_nothing(store, family):
    (store.folder / texts.FOLDER).write_text("in the way")
    c, *_ = texts.embed(store, family, ["cat"])
    assert c.shape == (1, 6, 2)


def test_rows_are_computed_in_one_compiled_size_and_come_back_in_order():
    class Double:
        shapes = []

        def apply(self, variables, ids):
            self.shapes.append(ids.shape)
            return variables["params"] * ids

    rows = np.arange(19, dtype=np.float32)[:, None]
    np.testing.assert_array_equal(texts.apply(Double(), np.float32(2), rows), 2 * rows)
    assert Double.shapes == [(texts.ROWS, 1)]
