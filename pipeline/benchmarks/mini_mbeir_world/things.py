"""What exists in the world of mini M-BEIR: rows of small integers, each an index into the words below.

Everything that a text can say or a picture can show is such a row, so whether a candidate is a correct answer
is a comparison of integers.
"""

from __future__ import annotations

from typing import NamedTuple

COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "pink", "brown")
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring", "star", "heart", "moon", "bar")
SIZES = ("small", "large")
GROUNDS = ("white", "grey", "black", "beige")
PATTERNS = ("plain", "striped", "dotted")
CITIES = ("Paris", "London", "Rome", "Berlin", "Madrid", "Vienna", "Oslo", "Athens", "Cairo", "Tokyo",
          "Delhi", "Lima", "Boston", "Chicago", "Sydney", "Moscow", "Dublin", "Prague", "Warsaw", "Lisbon",
          "Geneva", "Munich", "Milan", "Toronto")
MATERIALS = ("wood", "glass", "stone", "paper", "metal", "clay", "wool", "silk", "gold", "silver", "plastic",
             "rubber")
SIDES = ("left", "right", "top", "bottom")
WALLS = ("red", "yellow", "blue", "white", "green", "pink")
ROOFS = ("pointed", "flat")
SKIES = ("day", "night", "sunset")
TREES = ("none", "left", "right")
RENDITIONS = 8


class Thing(NamedTuple):
    size: int
    colour: int
    shape: int


class Scene(NamedTuple):
    """Two things: the first is left of the second (relation 0) or above it (relation 1)."""

    first_size: int
    first_colour: int
    first_shape: int
    second_size: int
    second_colour: int
    second_shape: int
    relation: int
    ground: int
    pattern: int

    @property
    def things(self) -> tuple[Thing, Thing]:
        return Thing(*self[:3]), Thing(*self[3:6])


class Fact(NamedTuple):
    """As a scene, but told of a city and never drawn."""

    first_size: int
    first_colour: int
    first_shape: int
    second_size: int
    second_colour: int
    second_shape: int
    relation: int
    city: int

    @property
    def things(self) -> tuple[Thing, Thing]:
        return Thing(*self[:3]), Thing(*self[3:6])


class Statement(NamedTuple):
    """Which thing is on one side of a background: an answer to a question about a picture."""

    side: int
    size: int
    colour: int
    shape: int
    ground: int
    pattern: int

    @property
    def thing(self) -> Thing:
        return Thing(*self[1:4])


class Entry(NamedTuple):
    """An illustrated entry on one thing; the note is a city (museum) or a material (quiz)."""

    size: int
    colour: int
    shape: int
    note: int
    ground: int
    pattern: int

    @property
    def thing(self) -> Thing:
        return Thing(*self[:3])


class Street(NamedTuple):
    """Two to four houses in a row. A house is 2 * wall + roof; in the last two places 12 means none."""

    house_1: int
    house_2: int
    house_3: int
    house_4: int
    sky: int
    tree: int

    @property
    def houses(self) -> tuple[int, ...]:
        return tuple(house for house in self[:4] if house < 12)

    @property
    def walls(self) -> tuple[int, ...]:
        return tuple(house // 2 for house in self.houses)


class Number(NamedTuple):
    """A handwritten number of three digits; renditions differ in the hands that wrote it."""

    hundreds: int
    tens: int
    ones: int
    rendition: int

    @property
    def digits(self) -> tuple[int, int, int]:
        return self[:3]

    @property
    def in_print(self) -> str:
        return f"{self.hundreds}{self.tens}{self.ones}"
