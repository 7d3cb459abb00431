"""How the world of mini M-BEIR is drawn: 64 x 64 pictures of 16 colours, as PNG bytes.

All arithmetic is on integers and there are no fonts and no soft edges; the PNG is written here,
uncompressed (2.3 kB), because compressors give other bytes in other versions and a picture must be the same
file everywhere.

Legend: H height, W width in pixels; G the side of a glyph as scanned (8 px), E its side as drawn (20 px).
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Callable
from zlib import adler32, crc32

import numpy as np
from numpy.typing import NDArray

from pipeline.benchmarks.mini_mbeir_world.spaces import Dice
from pipeline.benchmarks.mini_mbeir_world.things import Entry, Scene, Street, Thing

Pixels = NDArray[np.int32]
Mask = NDArray[np.bool_]
Colour = tuple[int, int, int]

SIDE = 64
GLYPH = 20
RADIUS = (7, 13)  # small, large: two large things side by side still leave a gap

_ROWS_HW, _COLUMNS_HW = np.mgrid[0:SIDE, 0:SIDE].astype(np.int32)

# Indices 0-7 are COLOURS; 8 + 2 * ground is a background, the next index its pattern's tone.
SCENE_PALETTE: tuple[Colour, ...] = (
    (215, 30, 30), (30, 150, 50), (40, 70, 215), (245, 215, 30),
    (245, 130, 20), (120, 40, 160), (250, 130, 190), (120, 70, 30),
    (255, 255, 255), (222, 222, 222), (150, 150, 150), (122, 122, 122),
    (15, 15, 15), (60, 60, 60), (240, 225, 190), (216, 198, 155))
# 0-5 are WALLS, 6-8 SKIES.
STREET_PALETTE: tuple[Colour, ...] = (
    (205, 45, 40), (240, 205, 50), (50, 90, 210), (245, 245, 240),
    (60, 160, 80), (240, 140, 180), (150, 205, 250), (25, 30, 80),
    (250, 160, 90), (255, 235, 90), (225, 225, 235), (120, 120, 115),
    (75, 45, 35), (35, 25, 25), (110, 75, 40), (20, 95, 35))
SUN, MOON, ROAD, ROOF, DOOR, TRUNK, LEAVES = range(9, 16)
# Paper and ink of handwriting.
INKS: tuple[tuple[Colour, Colour], ...] = (
    ((255, 255, 255), (10, 10, 10)), ((255, 255, 255), (20, 40, 170)), ((20, 40, 30), (240, 240, 240)),
    ((240, 225, 190), (130, 20, 20)))


def _star(dx: Pixels, dy: Pixels, radius: int) -> Mask:
    """A point lies in a five-pointed star if it is inside of at least four of the star's five lines."""
    tips = ((0, -1000), (951, -309), (588, 809), (-588, 809), (-951, -309))
    inside = np.zeros(dx.shape, np.int32)
    for (x, y), (to_x, to_y) in zip(tips, tips[2:] + tips[:2]):
        cross = (to_x - x) * (1000 * dy - y * radius) - (to_y - y) * (1000 * dx - x * radius)
        inside += cross >= 0
    return np.asarray(inside >= 4)


def _heart(dx: Pixels, dy: Pixels, radius: int) -> Mask:
    lobe = (2 * abs(dx) - radius) ** 2 + (2 * dy + radius) ** 2 <= (21 * radius // 20) ** 2
    tip = (dy >= -radius // 2) & (7 * abs(dx) <= 6 * (radius - dy))
    return np.asarray(lobe | (tip & (abs(dx) <= radius)))


def _moon(dx: Pixels, dy: Pixels, radius: int) -> Mask:
    return np.asarray(_circle(dx, dy, radius) & ((2 * dx - radius) ** 2 + 4 * dy**2 > 3 * radius**2))


def _circle(dx: Pixels, dy: Pixels, radius: int) -> Mask:
    return np.asarray(dx**2 + dy**2 <= radius * (radius + 1))  # radius**2 alone gives small circles spikes


# In the order of SHAPES; dx and dy are the distances from the centre, in pixels.
MASKS: tuple[Callable[[Pixels, Pixels, int], Mask], ...] = (
    _circle,
    lambda dx, dy, radius: np.maximum(abs(dx), abs(dy)) <= radius * 7 // 8,
    lambda dx, dy, radius: (2 * abs(dx) <= dy + radius) & (dy <= radius * 7 // 8),
    lambda dx, dy, radius: 4 * abs(dx) + 3 * abs(dy) <= 3 * radius,
    lambda dx, dy, radius: ((np.minimum(abs(dx), abs(dy)) <= radius // 4)
                            & (np.maximum(abs(dx), abs(dy)) <= radius)),
    lambda dx, dy, radius: _circle(dx, dy, radius) & (3 * (dx**2 + dy**2) >= radius**2),
    _star,
    _heart,
    _moon,
    lambda dx, dy, radius: (abs(dx) <= radius) & (abs(dy) <= radius // 3),
)


def png(pixels_HW: Pixels, palette: tuple[Colour, ...]) -> bytes:
    """A 4-bit palette PNG of indices below 16, in a stored block of Deflate: no compressor is involved."""
    packed = (pixels_HW[:, ::2] << 4 | pixels_HW[:, 1::2]).astype(np.uint8)
    lines = np.zeros((SIDE, SIDE // 2 + 1), np.uint8)
    lines[:, 1:] = packed
    data = lines.tobytes()
    stored = b"\x78\x01\x01" + struct.pack("<HH", len(data), len(data) ^ 0xFFFF) + data
    image = _chunk(b"IDAT", stored + struct.pack(">I", adler32(data)))
    return _png_head(palette) + image + _chunk(b"IEND", b"")


@lru_cache(maxsize=None)
def _png_head(palette: tuple[Colour, ...]) -> bytes:
    header = struct.pack(">IIBBBBB", SIDE, SIDE, 4, 3, 0, 0, 0)
    colours = bytes(channel for colour in palette for channel in colour)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"PLTE", colours)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc32(kind + data))


@lru_cache(maxsize=None)
def _background(ground: int, pattern: int) -> Pixels:
    plain = np.zeros((SIDE, SIDE), np.int32)
    striped = (_ROWS_HW + _COLUMNS_HW) // 5 % 2
    dotted = (_ROWS_HW % 9 - 4) ** 2 + (_COLUMNS_HW % 9 - 4) ** 2 <= 5
    pixels_HW = 8 + 2 * ground + (plain, striped, dotted)[pattern]
    return np.asarray(pixels_HW, np.int32)


@lru_cache(maxsize=None)
def _stamp(shape: int, size: int) -> Mask:
    """A shape in the smallest square that holds it; pictures only move it."""
    radius = RADIUS[size]
    dy, dx = np.mgrid[-radius:radius + 1, -radius:radius + 1].astype(np.int32)
    return MASKS[shape](dx, dy, radius)


def _put(pixels_HW: Pixels, thing: Thing, x: int, y: int) -> None:
    radius = RADIUS[thing.size]
    window = pixels_HW[y - radius:y + radius + 1, x - radius:x + radius + 1]
    window[_stamp(thing.shape, thing.size)] = thing.colour


def draw_scene(scene: Scene) -> bytes:
    """Both things in their halves of the picture; where exactly depends on the scene alone."""
    dice = Dice(*scene)
    pixels_HW = _background(scene.ground, scene.pattern).copy()
    middle = 24 + dice.below(17)
    for half, thing in enumerate(scene.things):
        along, across = 15 + 31 * half + dice.below(4), middle - 4 + dice.below(9)
        x, y = (along, across) if scene.relation == 0 else (across, along)
        _put(pixels_HW, thing, x, y)
    return png(pixels_HW, SCENE_PALETTE)


def draw_entry(entry: Entry) -> bytes:
    """The thing alone, anywhere in the picture."""
    dice = Dice(*entry)
    pixels_HW = _background(entry.ground, entry.pattern).copy()
    _put(pixels_HW, entry.thing, 20 + dice.below(25), 20 + dice.below(25))
    return png(pixels_HW, SCENE_PALETTE)


def draw_street(street: Street) -> bytes:
    """Houses from left to right between two strips that are kept for the tree."""
    dice = Dice(*street)
    pixels_HW = np.full((SIDE, SIDE), 6 + street.sky, np.int32)
    sun_x, sun_y = 12 + dice.below(40), 7 + dice.below(4)
    light = (_COLUMNS_HW - sun_x) ** 2 + (_ROWS_HW - sun_y) ** 2 <= 25
    pixels_HW[light] = MOON if street.sky == 1 else SUN
    pixels_HW[56:] = ROAD
    width = 44 // len(street.houses)
    for place, house in enumerate(street.houses):
        _put_house(pixels_HW, house, 10 + place * width, width - 1, 32 + dice.below(5))
    if street.tree:
        _put_tree(pixels_HW, 5 if street.tree == 1 else 58)
    return png(pixels_HW, STREET_PALETTE)


def _put_house(pixels_HW: Pixels, house: int, left: int, width: int, top: int) -> None:
    pixels_HW[top:56, left:left + width] = house // 2
    pixels_HW[49:56, left + width // 2 - 1:left + width // 2 + 2] = DOOR
    if house % 2:
        pixels_HW[top - 3:top, left:left + width] = ROOF
        return
    for step in range((width + 1) // 2):
        height = step * 10 // ((width + 1) // 2) + 1
        for column in (left + step, left + width - 1 - step):
            pixels_HW[top - height:top, column] = ROOF


def _put_tree(pixels_HW: Pixels, x: int) -> None:
    pixels_HW[46:56, x - 1:x + 1] = TRUNK
    crown = (_COLUMNS_HW - x) ** 2 * 4 + (_ROWS_HW - 38) ** 2 <= 100
    pixels_HW[crown] = LEAVES


@lru_cache(maxsize=None)
def _enlarging() -> NDArray[np.int64]:
    """[E, G] integer weights of linear interpolation; every row sums to 2 * GLYPH."""
    weights_EG = np.zeros((GLYPH, 8), np.int64)
    for row in range(GLYPH):
        position = max(0, min(7 * 2 * GLYPH, (2 * row + 1) * 8 - GLYPH))
        left, part = divmod(position, 2 * GLYPH)
        weights_EG[row, left] += 2 * GLYPH - part
        weights_EG[row, min(left + 1, 7)] += part
    return weights_EG


@lru_cache(maxsize=None)
def _ink_palette(ink: int) -> tuple[Colour, ...]:
    paper, pen = INKS[ink]
    red, green, blue = ([(start * (15 - step) + end * step) // 15 for step in range(16)]
                        for start, end in zip(paper, pen))
    return tuple(zip(red, green, blue))


def draw_number(glyphs_3GG: NDArray[np.int64], dice: Dice) -> bytes:
    """Three scanned digits (ink 0-16) side by side; pen, paper and height are the dice's."""
    pixels_HW = np.zeros((SIDE, SIDE), np.int32)
    top = 8 + dice.below(28)
    weights_EG = _enlarging()
    for place, glyph_GG in enumerate(glyphs_3GG):
        ink_EE = weights_EG @ glyph_GG @ weights_EG.T // (2 * GLYPH) ** 2
        left, down = 2 + 20 * place, top + dice.below(5) - 2
        pixels_HW[down:down + GLYPH, left:left + GLYPH] = np.minimum(ink_EE, 15)
    return png(pixels_HW, _ink_palette(dice.below(len(INKS))))
