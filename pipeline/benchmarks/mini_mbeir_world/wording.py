"""How the world of mini M-BEIR is said in short, ordinary English.

Every sentence starts with a capital and ends with a full stop or a question mark, as M-BEIR's published
texts do, so M-BEIR's text cleaning leaves it as it is. What a sentence leaves out (a headline gives no
sizes) is left out of the key it is matched by as well: see asking.py.
"""

from __future__ import annotations

from typing import Sequence

from pipeline.benchmarks.mini_mbeir_world.spaces import Dice
from pipeline.benchmarks.mini_mbeir_world.things import (
    CITIES, COLOURS, GROUNDS, MATERIALS, PATTERNS, ROOFS, SHAPES, SIDES, SIZES, SKIES, TREES, WALLS,
    Entry, Fact, Number, Scene, Statement, Street, Thing,
)

RELATIONS = (("left of", "right of"), ("above", "below"))
PLACES = ("on the left", "on the right", "at the top", "at the bottom")
COUNTS = ("no", "one", "two", "three", "four")
SKY_PHRASES = ("by day", "at night", "at sunset")
TREE_PHRASES = ("no tree", "a tree on the left", "a tree on the right")
STREET_CAPTIONS = 5


def sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def listed(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return ", ".join(words[:-1]) + " and " + words[-1]


def name(thing: Thing) -> str:
    return f"{SIZES[thing.size]} {COLOURS[thing.colour]} {SHAPES[thing.shape]}"


def ground(row: Scene | Statement | Entry) -> str:
    return f"{PATTERNS[row.pattern]} {GROUNDS[row.ground]} background"


def caption(scene: Scene, wording: int) -> str:
    """One of three full descriptions: no two scenes share any of them."""
    first, second = (name(thing) for thing in scene.things)
    forth, back = RELATIONS[scene.relation]
    if wording == 0:
        return sentence(f"a {first} {forth} a {second} on a {ground(scene)}.")
    if wording == 1:
        return sentence(f"a {second} {back} a {first} on a {ground(scene)}.")
    here, there = PLACES[2 * scene.relation], PLACES[2 * scene.relation + 1]
    return sentence(f"{ground(scene)} with a {first} {here} and a {second} {there}.")


def fact(row: Fact, wording: int) -> str:
    first, second = (name(thing) for thing in row.things)
    forth, back = RELATIONS[row.relation]
    city = CITIES[row.city]
    return (f"In {city}, a {first} is {forth} a {second}.",
            f"In {city}, a {second} is {back} a {first}.")[wording]


def fact_question(row: Fact, hidden: int, dice: Dice) -> str:
    """Asks for the first (hidden 0) or the second (hidden 1) thing of a fact by naming the other one."""
    known = name(row.things[1 - hidden])
    relation, city = RELATIONS[row.relation][hidden], CITIES[row.city]
    return dice.choose((f"What is {relation} a {known} in {city}?",
                        f"In {city}, which thing is {relation} a {known}?"))


def headline(scene: Scene, city: int, dice: Dice) -> str:
    """Says colours, shapes, relation and city; sizes and background are left to the picture."""
    first, second = (f"{COLOURS[thing.colour]} {SHAPES[thing.shape]}" for thing in scene.things)
    forth, back = RELATIONS[scene.relation]
    place = CITIES[city]
    return dice.choose((f"{sentence(first)} {forth} {second} in {place}.",
                        f"{place}: {second} seen {back} {first}."))


def photo_note(city: int) -> str:
    return f"A photo from {CITIES[city]}."


def question(side: int, dice: Dice) -> str:
    return dice.choose((f"What is {PLACES[side]}?", f"Which thing is {PLACES[side]} of the picture?"))


def answer(row: Statement) -> str:
    return sentence(f"{PLACES[row.side]} of a {ground(row)} there is a {name(row.thing)}.")


def museum_question(side: int, city: int, dice: Dice) -> str:
    return dice.choose((f"Which piece in {CITIES[city]} is the thing {PLACES[side]}?",
                        f"Is the thing {PLACES[side]} kept in {CITIES[city]}?"))


def museum_note(entry: Entry) -> str:
    """Leaves the colour to the picture: neither half of the entry is enough."""
    return f"A {SIZES[entry.size]} {SHAPES[entry.shape]} kept in {CITIES[entry.note]}."


def quiz_note(entry: Entry) -> str:
    return f"A {SIZES[entry.size]} {SHAPES[entry.shape]} made of {MATERIALS[entry.note]}."


def number(row: Number) -> str:
    return f"The number {row.in_print}."


def street_caption(street: Street, kind: int) -> str:
    """One of five captions; each says how many houses and their colours, and some say more."""
    count = f"{COUNTS[len(street.houses)]} houses"
    colours = listed([WALLS[wall] for wall in street.walls])
    roofed = listed([f"{WALLS[house // 2]} with a {ROOFS[house % 2]} roof" for house in street.houses])
    sky, tree = SKY_PHRASES[street.sky], TREE_PHRASES[street.tree]
    return sentence((f"{count} in a row: {colours}.",
                     f"{count} {sky}: {colours}.",
                     f"{count} and {tree}: {colours}.",
                     f"{count}: {roofed}.",
                     f"a street {sky} with {tree} and {count}: {roofed}.")[kind])


def edit(before: Scene, after: Scene) -> str:
    """The instruction that turns one scene into another that is its neighbour."""
    first, second = (SHAPES[thing.shape] for thing in before.things)
    for old, new, shape in zip(before.things, after.things, (first, second)):
        if after[6:] == before[6:] and sum(a != b for a, b in zip(before, after)) == 1 and old != new:
            return _changed_thing(old, new, shape)
    if before.relation != after.relation:
        return f"Put the {first} {RELATIONS[after.relation][0]} the {second}."
    if before.ground != after.ground:
        return f"Make the background {GROUNDS[after.ground]}."
    if before.pattern != after.pattern:
        return f"Make the background {PATTERNS[after.pattern]}."
    return f"Swap the {first} and the {second}."


def _changed_thing(old: Thing, new: Thing, shape: str) -> str:
    if old.size != new.size:
        return f"Make the {shape} {('smaller', 'bigger')[new.size]}."
    if old.colour != new.colour:
        return f"Make the {shape} {COLOURS[new.colour]}."
    return f"Turn the {shape} into a {SHAPES[new.shape]}."


def described(row: Scene | Fact | Statement | Entry | Street | Number) -> dict[str, str]:
    """The attributes in words, for people who look at a query or candidate and for checks."""
    if isinstance(row, Scene):
        return {"first": name(row.things[0]), "relation": RELATIONS[row.relation][0],
                "second": name(row.things[1]), "background": ground(row)}
    if isinstance(row, Fact):
        return {"first": name(row.things[0]), "relation": RELATIONS[row.relation][0],
                "second": name(row.things[1]), "city": CITIES[row.city]}
    if isinstance(row, Statement):
        return {"side": SIDES[row.side], "thing": name(row.thing), "background": ground(row)}
    if isinstance(row, Entry):
        return {"thing": name(row.thing), "background": ground(row)}
    if isinstance(row, Number):
        return {"number": row.in_print}
    houses = [f"{WALLS[house // 2]} {ROOFS[house % 2]}" for house in row.houses]
    return {"houses": ", ".join(houses), "sky": SKIES[row.sky], "tree": TREES[row.tree]}
