"""Embeddings of texts: computed once, kept beside the models, computed again where what was kept is no good."""

import dataclasses

import jax
import numpy as np
import pytest

from vgjax.errors import UserError
from vgjax.open import texts
from vgjax.open.store import Store
from vgjax.typing import Tokens

SEEN = []  # which text was computed, how often


@dataclasses.dataclass(frozen=True)
class Letters(texts.Encoder):
    """A letter a token."""

    def encoded(self, store, asked):
        SEEN.extend(asked)
        mask = np.array([[i < len(text) for i in range(6)] for text in asked])
        c = np.array([[[ord(text[i]) if i < len(text) else 0.0] * 2 for i in range(6)] for text in asked])
        return Tokens(c.astype(np.float32), mask), np.array([[len(text)] for text in asked], np.float32)


@pytest.fixture
def letters():
    SEEN.clear()
    return Letters("text_encoder", 6)


@pytest.fixture
def store(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "vocab.json").write_text("{}")
    return Store(tmp_path)


def test_a_text_is_computed_once_and_comes_back_as_it_was(store, letters):
    frozen = texts.Frozen({"text": (store, letters)}, str.strip)
    first = frozen([" cat", "dog", "cat ", ""])
    assert SEEN == ["cat", "dog", ""]
    again = frozen(["cat", "dog", "cat", ""])
    assert SEEN == ["cat", "dog", ""]
    jax.tree.map(np.testing.assert_array_equal, first, again)
    c, mask = again.text["text"]
    assert c.shape == (4, 6, 2) and c[0, 0, 0] == ord("c") and not c[~mask].any()
    np.testing.assert_array_equal(again.vec[:, 0], [3, 3, 3, 0])


def test_one_new_text_among_known_ones_is_computed_alone(store, letters):
    texts.embed(store, letters, ["cat"])
    rows = texts.embed(store, letters, ["dog", "cat"])
    assert SEEN == ["cat", "dog"] and rows.text["text_encoder"].c[:, 0, 0].tolist() == [ord("d"), ord("c")]


def test_another_tokenizer_or_type_computes_anew(store, letters):
    texts.embed(store, letters, ["cat"])
    texts.embed(dataclasses.replace(store, dtype=np.float16), letters, ["cat"])
    (store.folder / "tokenizer" / "vocab.json").write_text("{ }")
    texts.embed(store, letters, ["cat"])
    assert SEEN == ["cat"] * 3


@pytest.mark.parametrize("name, value", [("length", 7), ("crop", 3), ("template", "Say: {}"), ("skipped", 1)])
def test_another_reading_of_the_same_encoder_computes_anew(store, letters, name, value):
    other = dataclasses.replace(letters, **{name: value})
    texts.embed(store, letters, ["cat"])
    texts.embed(store, other, ["cat"])
    assert SEEN == ["cat"] * 2
    frozen = texts.Frozen({"text": (store, letters)})
    assert frozen.identity() != texts.Frozen({"text": (store, other)}).identity()
    assert (
        frozen.identity() == texts.Frozen({"text": (dataclasses.replace(store, dtype=np.float16), letters)}).identity()
    )


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-30], lambda data: b"PK" + data[9:]])
def test_a_kept_text_that_is_damaged_is_computed_again(store, letters, damage):
    want = texts.embed(store, letters, ["cat"])
    (file,) = (store.folder / texts.FOLDER).iterdir()
    file.write_bytes(damage(file.read_bytes()))
    jax.tree.map(np.testing.assert_array_equal, texts.embed(store, letters, ["cat"]), want)
    assert SEEN == ["cat"] * 2


def test_a_folder_that_cannot_be_written_only_keeps_nothing(store, letters):
    (store.folder / texts.FOLDER).write_text("in the way")
    assert texts.embed(store, letters, ["cat"]).text["text_encoder"].c.shape == (1, 6, 2)


def test_streams_stand_by_name_and_pooled_vectors_side_by_side_and_what_is_read_twice_is_remembered(store, letters):
    frozen = texts.Frozen(
        {"a": (store, letters), "b": (store, dataclasses.replace(letters, component="text_encoder_2"))}
    )
    remembered = texts.Remembered(frozen)
    rows = remembered(["cat", "dog"])
    assert list(rows.text) == ["a", "b"] and rows.vec.tolist() == [[3, 3], [3, 3]]
    again = remembered(["dog", "cat", "dog"])
    assert SEEN == ["cat", "dog"] * 2
    np.testing.assert_array_equal(again.text["b"].c[0], rows.text["b"].c[1])


@pytest.mark.parametrize("options", [dict(gives="all"), dict(length=0), dict(crop=-1), dict(template="no place")])
def test_an_encoder_that_cannot_be_asked_so_is_refused(options):
    with pytest.raises(UserError, match="the text encoder text_encoder: gives="):
        texts.Encoder(**{"component": "text_encoder", "length": 6, **options})


def test_rows_are_computed_in_one_compiled_size_and_come_back_in_order():
    class Double:
        shapes = []

        def init(self, *inputs):
            return {}

        def apply(self, variables, ids):
            self.shapes.append(ids.shape)
            return variables["params"] * ids

    rows = np.arange(19, dtype=np.float32)[:, None]
    np.testing.assert_array_equal(texts.apply(Double(), np.float32(2), rows), 2 * rows)
    assert Double.shapes == [(texts.ROWS, 1)]
