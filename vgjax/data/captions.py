"""The language of the closed world: a request in words, with synonyms, and back.

    caption(Request((Thing("red", "circle", "left"),), "black"), rng)  -> "on black, a red disc slides to the left"
    grammar.parse("a red circle moves left")                -> Request((Thing("red", "circle", "left"),), None)

A caption may leave the background unsaid: then any background answers it.
"""

import hashlib
import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vgjax.errors import UserError

# The first word of each row is the plain one: `plain` uses it alone.
SHAPES = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle", "wedge"),
    "diamond": ("diamond", "rhombus"),
    "cross": ("cross", "plus"),
}
MOTIONS = {
    "left": ("moves left", "moves to the left", "slides left", "slides to the left", "drifts left"),
    "right": ("moves right", "moves to the right", "slides right", "slides to the right", "drifts right"),
    "up": ("moves up", "slides up", "drifts up", "moves upwards", "rises"),
    "down": ("moves down", "slides down", "drifts down", "moves downwards", "sinks"),
    "stays": ("stays", "stays still", "does not move", "rests"),
    "grows": ("grows", "expands", "gets bigger", "becomes larger"),
    "shrinks": ("shrinks", "contracts", "gets smaller", "becomes smaller"),
}
BEFORE = ("on {}, ", "on a {} background, ", "against {}, ")
AFTER = (" on a {} background", " on {}", " against a {} background")
JOINS = (" and ", " while ")
UNSAID = 0.5  # the share of captions that leave the background open
RESERVED = 10  # one caption in so many is kept for validation


class Thing(NamedTuple):
    """One object that a caption asks for, by canonical names."""

    color: str
    shape: str
    motion: str


@dataclass(frozen=True)
class Request:
    """What a caption asks for; `background` is None where it is unsaid."""

    things: tuple[Thing, ...]
    background: str | None = None


def caption(request: Request, rng: np.random.Generator) -> str:
    """Words for a request: random order, synonyms and template; half of the captions leave the background unsaid."""
    order = rng.permutation(len(request.things))
    clauses = [_clause(request.things[i], rng) for i in order]
    text = str(rng.choice(JOINS)).join(clauses)
    if request.background is None or rng.random() < UNSAID:
        return text
    if rng.random() < 0.5:
        return str(rng.choice(BEFORE)).format(request.background) + text
    return text + str(rng.choice(AFTER)).format(request.background)


def plain(request: Request) -> str:
    """The shortest caption of a request, without synonyms: `a red circle moves left and a blue square stays`."""
    text = " and ".join(f"a {c} {SHAPES[s][0]} {MOTIONS[m][0]}" for c, s, m in request.things)
    return text if request.background is None else text + AFTER[0].format(request.background)


def split(text: str) -> str:
    """`val` for about one caption in ten, `train` for the others; the same on every machine, for ever."""
    digest = hashlib.blake2b(" ".join(text.lower().split()).encode(), digest_size=8).digest()
    return "val" if int.from_bytes(digest, "big") % RESERVED == 0 else "train"


@dataclass(frozen=True)
class Grammar:
    """The captions that can be read: canonical names of what may be asked for, each with all its synonyms."""

    colors: tuple[str, ...]
    shapes: tuple[str, ...]
    motions: tuple[str, ...]
    backgrounds: tuple[str, ...]

    def parse(self, text: str) -> Request:
        """What a caption asks for; UserError names the part that can't be read and the known words."""
        words = re.sub(r"[.!]+$", "", " ".join(text.lower().replace("grey", "gray").split()))
        ground = rf"(?:on|against) (?:an? |the )?({'|'.join(self.backgrounds)})(?: background)?"
        found = re.match(ground + r",? ", words) or re.search(" " + ground + "$", words)
        if found:
            words = words.replace(found[0], "", 1)
        things = tuple(self._thing(clause, text) for clause in re.split(r",? and |,? while ", words))
        return Request(things, found[1] if found else None)

    def _thing(self, clause: str, text: str) -> Thing:
        shapes = {word: name for name in self.shapes for word in SHAPES[name]}
        motions = {word: name for name in self.motions for word in MOTIONS[name]}
        color, shape, motion = ("|".join(words) for words in (self.colors, shapes, motions))
        found = re.fullmatch(rf"(?:an? |the )?({color}) ({shape}) ({motion})", clause)
        if not found:
            raise UserError(
                f"cannot read {clause!r} in the caption {text!r}: say `a COLOR SHAPE MOTION [on BACKGROUND]`, objects "
                f"joined by `and`. Colours: {', '.join(self.colors)}. Shapes: {', '.join(shapes)}. "
                f"Motions: {', '.join(motions)}. Backgrounds: {', '.join(self.backgrounds)}."
            )
        return Thing(found[1], shapes[found[2]], motions[found[3]])


def _clause(thing: Thing, rng: np.random.Generator) -> str:
    return f"a {thing.color} {rng.choice(SHAPES[thing.shape])} {rng.choice(MOTIONS[thing.motion])}"
