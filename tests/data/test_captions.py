import numpy as np
import pytest

from vgjax.data import captions
from vgjax.data.captions import Grammar, Request, Thing
from vgjax.data.shapes import WORLDS
from vgjax.errors import UserError

GRAMMAR = Grammar(("red", "blue"), ("circle", "square"), ("left", "stays", "grows"), ("black", "gray"))
RED = Thing("red", "circle", "left")
BLUE = Thing("blue", "square", "stays")


@pytest.mark.parametrize("name", WORLDS)
def test_every_caption_is_read_as_it_was_meant(name):
    rng = np.random.default_rng(0)
    world = WORLDS[name]
    said = set()
    for _ in range(400):
        scene, text = world.sample(rng)
        request = world.parse(text)
        assert sorted(request.things) == sorted(scene.request.things)
        assert request.background in (None, scene.background)
        said.add(request.background)
    assert said == {None, *world.backgrounds}


@pytest.mark.parametrize(
    ("text", "request_"),
    [
        ("a red circle moves left", Request((RED,))),
        ("A red disc slides to the left.", Request((RED,))),
        ("on black, a red circle moves left", Request((RED,), "black")),
        ("red circle moves left against a grey background", Request((RED,), "gray")),
        ("a red circle moves left and a blue square stays on gray", Request((RED, BLUE), "gray")),
        ("a blue box does not move while the red disc drifts left", Request((BLUE, RED))),
    ],
)
def test_phrases(text, request_):
    assert GRAMMAR.parse(text) == request_


@pytest.mark.parametrize(
    "text",
    ["", "a purple circle moves left", "a red circle", "a red circle moves left on pink", "a red circle grows and"],
)
def test_an_unreadable_caption_is_refused_with_the_known_words(text):
    with pytest.raises(UserError, match=r"cannot read .*red, blue.*circle, disc.*moves left.*black, gray"):
        GRAMMAR.parse(text)


def test_the_plain_caption_needs_no_background():
    assert captions.plain(Request((RED, BLUE))) == "a red circle moves left and a blue square stays"
    assert captions.plain(Request((RED,), "black")) == "a red circle moves left on a black background"


def test_plain_captions_are_among_the_drawn_ones():
    rng = np.random.default_rng(0)
    request = Request((RED,), "black")
    assert captions.plain(Request((RED,))) in {captions.caption(request, rng) for _ in range(300)}


def test_a_tenth_of_the_captions_is_reserved():
    rng = np.random.default_rng(0)
    texts = {captions.caption(Request((Thing(c, s, m),), "black"), rng) for c in GRAMMAR.colors
             for s in GRAMMAR.shapes for m in captions.MOTIONS for _ in range(60)}  # fmt: skip
    share = np.mean([captions.split(text) == "val" for text in texts])
    assert 0.07 < share < 0.13


def test_the_reserved_captions_never_change():
    texts = [f"a red circle {words}" for words in captions.MOTIONS["left"]]
    assert [captions.split(text) for text in texts] == ["train", "train", "train", "train", "train"]
    assert captions.split("  A red CIRCLE moves left ") == captions.split("a red circle moves left")
