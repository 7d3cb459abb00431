"""The spaces that the rows of mini M-BEIR are drawn from, and how they are divided into splits.

To which split a row belongs is a property of the row alone, not of the seed or the scale: whatever was
trained on the train split of one mini M-BEIR has never seen a test scene of any other. Choices come from a
mixing function of integers, not from a library's generator, whose stream may change with its version.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd, prod
from typing import Any, Callable, Generic, Iterator, Sequence, TypeVar
from zlib import crc32

from pipeline.benchmarks.mini_mbeir_world.things import (
    CITIES, COLOURS, GROUNDS, MATERIALS, PATTERNS, RENDITIONS, SHAPES, SIDES, SIZES, SKIES, TREES,
    Entry, Fact, Number, Scene, Statement, Street, Thing,
)

SPLITS = ("train", "val", "test")

# Of ten shares five are train, two val and three test.
SPLIT_OF_SHARE = ("train",) * 5 + ("val",) * 2 + ("test",) * 3
# Rows that differ in one attribute and follow a base row in its pool: the hard distractors.
NEIGHBOURS_KEPT = 3
_MASK = (1 << 64) - 1

Row = TypeVar("Row", bound="tuple[Any, ...]")
Element = TypeVar("Element")


def mix(*numbers: int) -> int:
    """64 well-mixed bits of some non-negative integers (the finaliser of SplitMix64, Steele et al. 2014)."""
    state = 0
    for number in numbers:
        state = ((state ^ number) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


class Dice:
    """A stream of choices that depends on the given integers and on nothing else."""

    def __init__(self, *numbers: int) -> None:
        self._state = mix(*numbers)

    def below(self, bound: int) -> int:
        self._state = mix(self._state, bound)
        return self._state % bound

    def choose(self, elements: Sequence[Element]) -> Element:
        return elements[self.below(len(elements))]


def mirrored(row: Scene | Fact) -> Scene | Fact:
    """The same two things, places exchanged."""
    return type(row)(*row[3:6], *row[:3], *row[6:])


@dataclass(frozen=True)
class Space(Generic[Row]):
    """All rows of one kind, numbered from 0. `split_key` is the part of a row that decides its split."""

    name: str
    kind: str
    make: Callable[..., Row]
    sizes: tuple[int, ...]
    is_sound: Callable[[Row], bool] = lambda row: True
    split_key: Callable[[Row], tuple[int, ...]] = lambda row: row
    room: int | None = None

    def at(self, number: int) -> Row:
        digits = []
        for size in reversed(self.sizes):
            number, digit = divmod(number, size)
            digits.append(digit)
        return self.make(*reversed(digits))

    def number(self, row: Row) -> int:
        number = 0
        for size, digit in zip(self.sizes, row):
            number = number * size + digit
        return number

    def holds(self, row: Row, split: str) -> bool:
        """Whether the row exists, belongs to the split and, where spaces share rows, is of this room."""
        if not self.is_sound(row):
            return False
        packed = 0
        for digit in self.split_key(row):
            packed = packed * 32 + digit
        share = mix(crc32(self.kind.encode()), packed)
        if self.room is not None and share // 10 % 2 != self.room:
            return False
        return SPLIT_OF_SHARE[share % 10] == split

    def neighbours(self, row: Row) -> Iterator[Row]:
        """All rows that differ in exactly one attribute, and the mirrored one."""
        if isinstance(row, (Scene, Fact)):
            yield mirrored(row)  # type: ignore[misc]
        for position, size in enumerate(self.sizes):
            for digit in range(size):
                if digit != row[position]:
                    yield self.make(*row[:position], digit, *row[position + 1:])

    def album(self, split: str, size: int, seed: int) -> list[Row]:
        """Up to `size` distinct rows of the split: bases from all over the space, each before its neighbours.

        A shorter album is a prefix of a longer one. It is shorter than asked for only where the space ends.
        """
        found: dict[Row, None] = {}
        for base in self._walk(seed):
            if len(found) >= size:
                break
            if base not in found and self.holds(base, split):
                found[base] = None
                near = [row for row in self.neighbours(base) if self.holds(row, split)]
                near.sort(key=lambda row: mix(seed, self.number(row)))
                found.update(dict.fromkeys(near[:NEIGHBOURS_KEPT]))
        return list(found)[:size]

    def _walk(self, seed: int) -> Iterator[Row]:
        """Every row once: steps of a length that shares no divisor with the number of rows."""
        count = prod(self.sizes)
        dice = Dice(seed, crc32(self.name.encode()))
        start, stride = dice.below(count), count // 3 + dice.below(count // 3)
        while gcd(stride, count) != 1:
            stride += 1
        return (self.at((start + step * stride) % count) for step in range(count))


def _shapes_differ(row: Scene | Fact) -> bool:
    return row.first_shape != row.second_shape


def _is_street(row: Street) -> bool:
    """Houses stand without gaps. Streets of four would crowd out the others: only a quarter of them exist."""
    if row.house_3 == 12:
        return row.house_4 == 12
    return row.house_4 == 12 or mix(*row) % 4 == 0


_THING = (len(SIZES), len(COLOURS), len(SHAPES))
_BACKGROUND = (len(GROUNDS), len(PATTERNS))

# Two rooms: pictures to be found by caption never answer an edit, so the union pool holds no unlisted answer.
SCENES = Space("scenes", "scene", Scene, (*_THING, *_THING, 2, *_BACKGROUND), _shapes_differ, room=0)
EDITS = Space("edits", "scene", Scene, (*_THING, *_THING, 2, *_BACKGROUND), _shapes_differ, room=1)
FACTS = Space("facts", "fact", Fact, (*_THING, *_THING, 2, len(CITIES)), _shapes_differ)
STATEMENTS = Space("statements", "statement", Statement, (len(SIDES), *_THING, *_BACKGROUND))
# All captions of a street name its walls, so walls decide the split and no caption is true in two splits.
STREETS = Space("streets", "street", Street, (12, 12, 13, 13, len(SKIES), len(TREES)),
                _is_street, split_key=lambda row: row.walls)
MUSEUM = Space("museum", "entry", Entry, (*_THING, len(CITIES), *_BACKGROUND), split_key=lambda row: row[:4])
QUIZ = Space("quiz", "entry", Entry, (*_THING, len(MATERIALS), *_BACKGROUND), split_key=lambda row: row[:4])
NUMBERS = Space("digits", "number", Number, (10, 10, 10, RENDITIONS),
                is_sound=lambda row: row.hundreds > 0, split_key=lambda row: row.digits)


def scene_with(statement: Statement, split: str, dice: Dice) -> Scene:
    """A scene of the split of which the statement is true; the other thing is chosen by the dice."""
    for _ in range(10_000):
        other = Thing(*(dice.below(size) for size in _THING))
        first, second = (statement.thing, other) if statement.side % 2 == 0 else (other, statement.thing)
        scene = Scene(*first, *second, statement.side // 2, statement.ground, statement.pattern)
        if SCENES.holds(scene, split):
            return scene
    raise AssertionError("no scene of a split shows a thing")
