"""What the pools of mini M-BEIR hold, how a candidate is shown, and what is asked about it.

Every item of a pool has keys under which it is a correct answer; every query says which keys it wants
(`Asked.wants`). What a query leaves open is left out of the key as well, so two candidates that a query
cannot tell apart are both correct, and one that differs in an attribute that it names is not.

Legend: 3 digits of a number; G the side of a glyph as scanned (8 px).
"""

from __future__ import annotations

from typing import Any, Callable

import numpy as np

from pipeline.benchmarks.mini_mbeir_world import drawing, wording
from pipeline.benchmarks.mini_mbeir_world.spaces import (
    EDITS, MUSEUM, NUMBERS, QUIZ, SCENES, STREETS, Dice, Space, mix, scene_with,
)
from pipeline.benchmarks.mini_mbeir_world.terms import Asked, Key, Picture, Pool, Shown, World
from pipeline.benchmarks.mini_mbeir_world.things import (
    CITIES, GROUNDS, MATERIALS, PATTERNS, RENDITIONS, SIDES,
    Entry, Fact, Number, Scene, Statement, Street,
)

Photo = tuple[Scene, int]           # a scene and the number of a city
StreetCaption = tuple[int, Street]  # the kind of caption and a street it is true of


def _picture(space: Space[Any], row: Any, draw: Callable[[Any], bytes]) -> Picture:
    number = space.number(row)
    path = f"mbeir_images/{space.name}_images/{number % 100:02d}/{number}.png"
    return Picture(path, lambda: draw(row))


def show_scene(world: World, split: str, scene: Scene) -> Shown:
    return Shown(None, _picture(SCENES, scene, drawing.draw_scene), wording.described(scene))


def ask_scene(world: World, split: str, scene: Scene, dice: Dice, pool: Pool) -> Asked:
    return Asked(show_scene(world, split, scene), (scene,))


def show_caption(world: World, split: str, scene: Scene) -> Shown:
    return Shown(wording.caption(scene, mix(world.seed, *scene) % 3), None, wording.described(scene))


def ask_caption(world: World, split: str, scene: Scene, dice: Dice, pool: Pool) -> Asked:
    return Asked(Shown(wording.caption(scene, dice.below(3)), None, wording.described(scene)), (scene,))


def street_key(street: Street, kind: int) -> Key:
    """What a kind of caption tells of a street: it is true of exactly the streets with an equal key."""
    told = (street.walls, (street.walls, street.sky), (street.walls, street.tree), street.houses, street)
    return kind, told[kind]


def street_keys(street: Street) -> tuple[Key, ...]:
    return tuple(street_key(street, kind) for kind in range(wording.STREET_CAPTIONS))


def show_street(world: World, split: str, street: Street) -> Shown:
    return Shown(None, _picture(STREETS, street, drawing.draw_street), wording.described(street))


def ask_street_caption(world: World, split: str, street: Street, dice: Dice, pool: Pool) -> Asked:
    kind = dice.below(wording.STREET_CAPTIONS)
    return Asked(show_street_caption(world, split, (kind, street)), (street_key(street, kind),))


def street_captions(world: World, split: str, size: int) -> list[StreetCaption]:
    """Captions of two kinds for each street; one that is true of several streets enters the pool once."""
    captions: dict[Key, StreetCaption] = {}
    for street in STREETS.album(split, size, world.seed):
        dice = Dice(world.seed, *street)
        first = dice.below(wording.STREET_CAPTIONS)
        second = (first + 1 + dice.below(wording.STREET_CAPTIONS - 1)) % wording.STREET_CAPTIONS
        for kind in (first, second):
            captions.setdefault(street_key(street, kind), (kind, street))
    return list(captions.values())[:size]


def show_street_caption(world: World, split: str, item: StreetCaption) -> Shown:
    kind, street = item
    return Shown(wording.street_caption(street, kind), None, wording.described(street))


def ask_street(world: World, split: str, item: StreetCaption, dice: Dice, pool: Pool) -> Asked:
    return Asked(show_street(world, split, item[1]), street_keys(item[1]))


def show_fact(world: World, split: str, fact: Fact) -> Shown:
    return Shown(wording.fact(fact, mix(world.seed, *fact) % 2), None, wording.described(fact))


def fact_keys(fact: Fact) -> tuple[Key, ...]:
    """What is left of a fact when its first, or its second, thing is hidden."""
    return ("first", *fact[3:]), ("second", *fact[:3], *fact[6:])


def ask_fact(world: World, split: str, fact: Fact, dice: Dice, pool: Pool) -> Asked:
    hidden = dice.below(2)
    shown = Shown(wording.fact_question(fact, hidden, dice), None, wording.described(fact))
    return Asked(shown, (fact_keys(fact)[hidden],))


def photos(world: World, split: str, size: int) -> list[Photo]:
    """Each scene in a city that it shares with its neighbours, and in another one."""
    found: list[Photo] = []
    for position, scene in enumerate(SCENES.album(split, (size + 1) // 2, world.seed)):
        shared = mix(world.seed, position // 4) % len(CITIES)
        other = (shared + 1 + mix(world.seed, *scene) % (len(CITIES) - 1)) % len(CITIES)
        found += [(scene, shared), (scene, other)]
    return found[:size]


def show_photo(world: World, split: str, photo: Photo) -> Shown:
    scene, city = photo
    picture = _picture(SCENES, scene, drawing.draw_scene)
    return Shown(wording.photo_note(city), picture, wording.described(scene) | {"city": CITIES[city]})


def headline_keys(photo: Photo) -> tuple[Key, ...]:
    """Colours, shapes, relation and city: all that a headline says."""
    scene, city = photo
    return ((*scene.things[0][1:], *scene.things[1][1:], scene.relation, city),)


def ask_headline(world: World, split: str, photo: Photo, dice: Dice, pool: Pool) -> Asked:
    words = show_photo(world, split, photo).words
    return Asked(Shown(wording.headline(*photo, dice), None, words), headline_keys(photo))


def _number_picture(world: World, split: str, row: Number, is_query: bool) -> Picture:
    """Queries and candidates of one split are written by different people."""
    def png() -> bytes:
        dice = Dice(world.seed, is_query, *row)
        scans = world.hands[split][is_query]
        glyphs_3GG = np.stack([scans[digit][dice.below(len(scans[digit]))] for digit in row.digits])
        return drawing.draw_number(glyphs_3GG, dice)

    writer = "query" if is_query else "candidate"
    return Picture(f"mbeir_images/digits_images/{split}_{writer}/{row.in_print}_{row.rendition}.png", png)


def show_handwriting(world: World, split: str, row: Number) -> Shown:
    return Shown(None, _number_picture(world, split, row, is_query=False), wording.described(row))


def show_number(world: World, split: str, row: Number) -> Shown:
    return Shown(wording.number(row), None, wording.described(row))


def ask_handwriting(world: World, split: str, row: Number, dice: Dice, pool: Pool) -> Asked:
    other = row._replace(rendition=dice.below(RENDITIONS))
    picture = _number_picture(world, split, other, is_query=True)
    return Asked(Shown(None, picture, wording.described(row)), (row.digits,))


def numbers(world: World, split: str, size: int) -> list[Number]:
    rows = NUMBERS.album(split, size * RENDITIONS, world.seed)
    return [Number(*digits, 0) for digits in dict.fromkeys(row.digits for row in rows)][:size]


def show_museum_entry(world: World, split: str, entry: Entry) -> Shown:
    picture = _picture(MUSEUM, entry, drawing.draw_entry)
    words = wording.described(entry) | {"city": CITIES[entry.note]}
    return Shown(wording.museum_note(entry), picture, words)


def quiz_entries(world: World, split: str, size: int) -> list[Entry]:
    """Entries on the things of the museum, so that a query of the quiz is answered by the museum too."""
    found: dict[Entry, None] = {}
    for entry in MUSEUM.album(split, 2 * size, world.seed):
        for step in range(len(MATERIALS)):
            other = entry._replace(note=(entry.note + step) % len(MATERIALS))
            if QUIZ.holds(other, split):
                found[other] = None
                break
    return list(found)[:size]


def show_quiz_entry(world: World, split: str, entry: Entry) -> Shown:
    picture = _picture(QUIZ, entry, drawing.draw_entry)
    return Shown(wording.quiz_note(entry), picture, wording.described(entry))


def ask_museum(world: World, split: str, entry: Entry, dice: Dice, pool: Pool) -> Asked:
    """Which museum entry is the thing on one side, of a given city: both halves of both sides are needed."""
    statement = _statement_on(entry, dice)
    question = wording.museum_question(statement.side, entry.note, dice)
    shown = _shown_question(split, statement, dice, question)
    return Asked(shown._replace(words=shown.words | {"city": CITIES[entry.note]}), (entry[:4],))


def ask_quiz_entry(world: World, split: str, entry: Entry, dice: Dice, pool: Pool) -> Asked:
    statement = _statement_on(entry, dice)
    question = wording.question(statement.side, dice)
    return Asked(_shown_question(split, statement, dice, question), (entry.thing,))


def show_statement(world: World, split: str, statement: Statement) -> Shown:
    return Shown(wording.answer(statement), None, wording.described(statement))


def ask_statement(world: World, split: str, statement: Statement, dice: Dice, pool: Pool) -> Asked:
    question = wording.question(statement.side, dice)
    return Asked(_shown_question(split, statement, dice, question), (statement,))


def _statement_on(entry: Entry, dice: Dice) -> Statement:
    side, ground, pattern = dice.below(len(SIDES)), dice.below(len(GROUNDS)), dice.below(len(PATTERNS))
    return Statement(side, *entry.thing, ground, pattern)


def _shown_question(split: str, statement: Statement, dice: Dice, question: str) -> Shown:
    """The question beside a picture of which the statement is true."""
    scene = scene_with(statement, split, dice)
    words = wording.described(scene) | {"side": SIDES[statement.side]}
    return Shown(question, _picture(SCENES, scene, drawing.draw_scene), words)


def ask_edit(world: World, split: str, after: Scene, dice: Dice, pool: Pool) -> Asked | None:
    """A scene one change away, if possible of the pool: the unchanged picture is the hardest distractor."""
    neighbours = list(EDITS.neighbours(after))
    near = [scene for scene in neighbours if scene in pool and EDITS.holds(scene, split)]
    near = near or [scene for scene in neighbours if EDITS.holds(scene, split)]
    if not near:
        return None
    before = dice.choose(near)
    picture = _picture(EDITS, before, drawing.draw_scene)
    return Asked(Shown(wording.edit(before, after), picture, wording.described(before)), (after,))
