"""Tokenizers: any text in any script, stable ids, one begin token, padding that says so."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vgjax.data.text import Bytes, Words, split
from vgjax.errors import UserError

TOKENIZERS = [Bytes(24), Words(8), Words(8, buckets=16), Bytes(1), Words(1)]
IDS = [f"{type(tok).__name__}-{tok.length}-{tok.vocab}" for tok in TOKENIZERS]


@pytest.mark.parametrize("tok", TOKENIZERS, ids=IDS)
@given(caption=st.text(max_size=60))
def test_any_text_gives_a_begin_token_then_ids_in_the_vocabulary_then_padding(tok, caption):
    ids, mask = tok(caption)
    assert ids.shape == (tok.length, tok.hashes) and ids.dtype == np.int32 and mask.shape == (tok.length,)
    assert mask[0] and (ids[0] == 1).all()
    assert (np.diff(mask.astype(int)) <= 0).all()
    assert (ids[~mask] == 0).all() and (ids[mask] > 0).all() and (ids < tok.vocab).all()
    assert (ids[1:][mask[1:]] > 1).all(), "begin comes once"


@pytest.mark.parametrize("tok", TOKENIZERS, ids=IDS)
def test_a_dropped_caption_is_the_begin_token_alone(tok):
    _, mask = tok("")
    assert mask.sum() == 1


def test_bytes_spell_the_text():
    ids, mask = Bytes(16)("añ")
    assert (ids[mask][1:, 0] - 2).astype(np.uint8).tobytes().decode() == "añ"


@pytest.mark.parametrize("tok", [Bytes(5), Words(5)], ids=["bytes", "words"])
def test_long_captions_keep_their_beginning(tok):
    ids, mask = tok("a b c d e f g")
    assert mask.all() and np.array_equal(ids, type(tok)(9)("a b c d e f g")[0][:5])


def test_ids_of_words_never_change_between_runs_and_machines():
    """Checkpoints depend on these numbers."""
    assert Words(4)("A red circle")[0].tolist() == [[1, 1], [1897, 1123], [922, 1864], [995, 1214]]


def test_case_width_and_punctuation_do_not_matter():
    assert np.array_equal(Words(8)("A red,  CIRCLE!")[0], Words(8)("a ｒｅｄ circle")[0])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("moves-left 12 frames", ["moves", "left", "12", "frames"]),
        ("日本語の円", ["日", "本", "語", "の", "円"]),
        ("a 赤い circle", ["a", "赤", "い", "circle"]),
        ("สวัสดี", ["ส", "วั", "ส", "ดี"]),
        ("हिन्दी शब्द", ["हिन्दी", "शब्द"]),
        ("한국어 원", ["한국어", "원"]),
        ("Ёлка ÉTÉ e\u0301te\u0301", ["ёлка", "été", "été"]),
        ("🙂 \u0301 ...", []),
    ],
)
def test_words_are_what_readers_of_the_script_would_say(text, words):
    assert split(text) == words


def test_two_hashes_keep_apart_what_one_confuses():
    words = [f"word{i}" for i in range(1500)]
    ids = np.stack([Words(2)(word)[0][1] for word in words])
    assert len(np.unique(ids[:, 0])) < len(words) * 0.8
    assert len(np.unique(ids, axis=0)) == len(words)
    assert abs(np.corrcoef(ids[:, 0], ids[:, 1])[0, 1]) < 0.1


@pytest.mark.parametrize(
    ("make", "said"), [(lambda: Bytes(0), "at least 1"), (lambda: Words(4, buckets=2), "more than 2")]
)
def test_useless_sizes_are_refused(make, said):
    with pytest.raises(UserError, match=said):
        make()
