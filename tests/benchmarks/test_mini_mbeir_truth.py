"""Which candidates of mini M-BEIR are correct, against oracles that share no code with its generator.

What a text says is read back with regular expressions, and what a picture shows from its pixels; then every
query is held against every candidate of the union pool by brute force.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from pipeline.benchmarks import mini_mbeir
from pipeline.benchmarks.mini_mbeir_world import drawing, spaces, wording

Row = dict[str, Any]
Words = dict[str, str]
COLOURS = {(215, 30, 30): "red", (30, 150, 50): "green", (40, 70, 215): "blue",
           (245, 215, 30): "yellow", (245, 130, 20): "orange", (120, 40, 160): "purple",
           (250, 130, 190): "pink", (120, 70, 30): "brown"}
TONES = {(255, 255, 255): "white", (222, 222, 222): "white", (150, 150, 150): "grey", (122, 122, 122): "grey",
         (15, 15, 15): "black", (60, 60, 60): "black", (240, 225, 190): "beige", (216, 198, 155): "beige"}
WALLS = {(205, 45, 40): "red", (240, 205, 50): "yellow", (50, 90, 210): "blue", (245, 245, 240): "white",
         (60, 160, 80): "green", (240, 140, 180): "pink"}
SKIES = {(150, 205, 250): "day", (25, 30, 80): "night", (250, 160, 90): "sunset"}
LEAVES, ROOF = (20, 95, 35), (75, 45, 35)
SHAPES = "circle square triangle diamond cross ring star heart moon bar".split()
OPPOSITE = {"right of": "left of", "below": "above"}
SIDES = {"left": ("left of", "first"), "right": ("left of", "second"),
         "top": ("above", "first"), "bottom": ("above", "second")}
THING = r"(?:small|large) \w+ \w+"
RELATION = r"(?P<relation>left of|right of|above|below)"
CITY = r"(?P<city>\w+)"
SKY = r"by day|at night|at sunset"
TREE = r"no tree|a tree on the \w+"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mini") / "mini_mbeir"
    mini_mbeir.generate(directory, 0.1, seed=3)
    return directory


def rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def found_in(pattern: str, text: str | None) -> Words:
    """The named groups of a whole match in lower case; empty if there is none."""
    found = re.fullmatch(pattern, text or "", re.IGNORECASE)
    return {key: value.lower() for key, value in found.groupdict().items() if value} if found else {}


def forwards(said: Words) -> Words:
    """`a right of b` as `b left of a`."""
    first, second = ("b", "a") if said["relation"] in OPPOSITE else ("a", "b")
    relation = OPPOSITE.get(said["relation"], said["relation"])
    return {"first": said[first], "relation": relation, "second": said[second]}


def read_caption(text: str | None) -> Words:
    if said := found_in(rf"A (?P<a>{THING}) {RELATION} a (?P<b>{THING}) on a (?P<ground>.+)\.", text):
        return forwards(said) | {"background": said["ground"]}
    said = found_in(rf"(?P<ground>\w+ \w+ background) with a (?P<first>{THING}) (?:on|at) the "
                    rf"(?P<side>left|top) and a (?P<second>{THING}) (?:on|at) the (?:right|bottom)\.", text)
    return {"first": said["first"], "relation": SIDES[said["side"]][0], "second": said["second"],
            "background": said["ground"]} if said else {}


def read_fact(text: str | None) -> Words:
    said = found_in(rf"In {CITY}, a (?P<a>{THING}) is {RELATION} a (?P<b>{THING})\.", text)
    return forwards(said) | {"city": said["city"]} if said else {}


def read_street(text: str | None) -> Words:
    """What a caption says of a street; what it does not say is absent."""
    said = found_in(rf"(?:A street (?P<sky>{SKY}) with (?P<tree>{TREE}) and )?"
                    rf"(?P<count>two|three|four) houses(?: in a row)?"
                    rf"(?: (?P<sky_2>{SKY}))?(?: and (?P<tree_2>{TREE}))?: (?P<houses>.+)\.", text)
    if not said:
        return {}
    houses = re.split(r", | and ", said["houses"])
    assert len(houses) == {"two": 2, "three": 3, "four": 4}[said["count"]]
    told = {"walls": ", ".join(house.split()[0] for house in houses)}
    if "roof" in said["houses"]:
        told["houses"] = ", ".join(f"{house.split()[0]} {house.split()[3]}" for house in houses)
    for key in ("sky", "tree"):
        if value := said.get(key) or said.get(f"{key}_2"):
            told[key] = "none" if value == "no tree" else value.split()[-1]
    return told


def pixels(root: Path, path: str) -> np.ndarray:
    with Image.open(root / path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def blobs(image: np.ndarray) -> list[tuple[str, str, float, float]]:
    """(colour, size, x, y) of every connected patch of a thing's colour."""
    patches = []
    for colour, name in COLOURS.items():
        labels, _ = ndimage.label((image == colour).all(axis=2), structure=np.ones((3, 3)))
        for rows_slice, columns_slice in ndimage.find_objects(labels):
            extents = (rows_slice.stop - rows_slice.start, columns_slice.stop - columns_slice.start)
            centre = [(piece.start + piece.stop) / 2 for piece in (columns_slice, rows_slice)]
            patches.append((name, "large" if max(extents) > 18 else "small", centre[0], centre[1]))
    return patches


def background(image: np.ndarray) -> str:
    """Ground and pattern from the picture's corners and edges, where no thing reaches."""
    edge = np.concatenate([image[:2].reshape(-1, 3), image[:, :2].reshape(-1, 3)])
    tones = {tuple(pixel) for pixel in edge.tolist()}
    ground = {TONES[tone] for tone in tones}
    assert len(ground) == 1
    if len(tones) == 1 and len({tuple(pixel) for pixel in image.reshape(-1, 3).tolist()} & set(TONES)) == 1:
        return f"plain {ground.pop()} background"
    return f"{'striped' if len(tones) == 2 else 'dotted'} {ground.pop()} background"


def seen_scene(image: np.ndarray) -> Words:
    """Everything but shapes, which the caller compares by name."""
    a, b = blobs(image)
    relation, axis = ("left of", 2) if abs(a[2] - b[2]) > abs(a[3] - b[3]) else ("above", 3)
    first, second = sorted((a, b), key=lambda patch: patch[axis])
    return {"first": f"{first[1]} {first[0]}", "relation": relation, "second": f"{second[1]} {second[0]}",
            "background": background(image)}


def seen_street(image: np.ndarray) -> Words:
    """Walls from the row above the doors, roofs from the width of their top, sky and tree from the sides."""
    starts, houses = [], []
    previous = None
    for x in range(10, 54):
        wall = WALLS.get(tuple(image[46, x]))
        if wall and previous is None:
            starts.append(x)
            houses.append(wall)
        previous = wall
    flat = []
    for start, end in zip(starts, [*starts[1:], 55]):
        roof = (image[:, start:end - 1] == ROOF).all(axis=2)
        top = np.flatnonzero(roof.any(axis=1))[0]
        flat.append("flat" if roof[top].sum() > 3 else "pointed")
    leaves = [(image[:, side] == LEAVES).all(axis=2).any() for side in (slice(0, 10), slice(54, 64))]
    tree = "left" if leaves[0] else "right" if leaves[1] else "none"
    return {"walls": ", ".join(houses), "houses": ", ".join(f"{a} {b}" for a, b in zip(houses, flat)),
            "sky": SKIES[tuple(image[0, 0])], "tree": tree}


def without_shapes(words: Words) -> Words:
    """`large red circle` as `large red` in every value that names a thing."""
    return {key: re.sub(rf"\b((?:small|large) \w+) (?:{'|'.join(SHAPES)})$", r"\1", value)
            for key, value in words.items()}


def candidate_words(root: Path, row: Row) -> Words:
    """What a candidate says and shows; of pictures the words, which another test holds against the pixels."""
    if row["did"].startswith("1:"):
        return read_street(row["txt"]) if row["txt"] else seen_street(pixels(root, row["img_path"]))
    if row["modality"] == "text":
        number = found_in(r"The number (?P<number>\d+)\.", row["txt"])
        answer = found_in(rf"(?:On|At) the (?P<side>\w+) of a (?P<background>.+) "
                          rf"there is a (?P<thing>{THING})\.", row["txt"])
        return read_caption(row["txt"]) or read_fact(row["txt"]) or number or answer
    words = {key: value.lower() for key, value in json.loads(row["src_content"]).items()}
    if row["txt"]:
        note = found_in(rf"A photo from {CITY}\.", row["txt"]) or found_in(
            rf"A (?P<size>\w+) (?P<shape>\w+) (?:kept in {CITY}|made of \w+)\.", row["txt"])
        words.pop("city", None)
        words |= {"city": note["city"]} if "city" in note else {}
        if "thing" in words:
            assert [words["thing"].split()[place] for place in (0, 2)] == [note["size"], note["shape"]]
    return words


def changed(scene: Words, text: str) -> Words:
    """The scene after an edit, by rewriting its words."""
    scene = dict(scene)
    if said := found_in(r"Make the background (?P<word>\w+)\.", text):
        pattern, ground, _ = scene["background"].split()
        is_pattern = said["word"] in ("plain", "striped", "dotted")
        scene["background"] = f"{said['word']} {ground}" if is_pattern else f"{pattern} {said['word']}"
        scene["background"] += " background"
        return scene
    if found_in(r"Swap the (?P<a>\w+) and the (?P<b>\w+)\.", text):
        return scene | {"first": scene["second"], "second": scene["first"]}
    if said := found_in(rf"Put the (?P<a>\w+) {RELATION} the (?P<b>\w+)\.", text):
        assert scene["first"].endswith(said["a"]) and scene["second"].endswith(said["b"])
        return scene | {"relation": said["relation"]}
    said = found_in(r"(?:Make|Turn) the (?P<shape>\w+) (?:into a (?P<new>\w+)|(?P<word>\w+))\.", text)
    (key,) = [key for key in ("first", "second") if scene[key].endswith(f" {said['shape']}")]
    size, colour, _ = scene[key].split()
    if said.get("word") in ("bigger", "smaller"):
        size = {"bigger": "large", "smaller": "small"}[said["word"]]
    else:
        colour = said.get("word", colour)
    scene[key] = f"{size} {colour} {said.get('new', said['shape'])}"
    return scene


def is_part(wanted: Words, words: Words) -> bool:
    return bool(wanted) and all(words.get(key) == value for key, value in wanted.items())


def is_correct(query: Row, task: str, words: Words) -> bool:
    """Whether a candidate of the right modality answers the query, by what both of them say and show."""
    text = query["query_txt"]
    asked = {key: value.lower() for key, value in json.loads(query["query_src_content"]).items()}
    if task in ("scenes_task0", "scenes_task3"):
        return {**words, "city": ""} == {**(read_caption(text) if text else asked), "city": ""}
    if task == "edits_task7":
        return words == changed(asked, text)
    if task == "streets_task0":
        return "walls" in words and is_part(read_street(text), words)
    if task == "streets_task3":
        walls = ", ".join(house.split()[0] for house in asked["houses"].split(", "))
        return is_part(words, asked | {"walls": walls})
    if task == "facts_task1":
        said = found_in(rf"What is {RELATION} a (?P<b>{THING}) in {CITY}\?", text) or found_in(
            rf"In {CITY}, which thing is {RELATION} a (?P<b>{THING})\?", text)
        known = {key: value for key, value in forwards(said | {"a": "?"}).items() if value != "?"}
        return is_part(known | {"city": said["city"]}, words)
    if task == "headlines_task2":
        return "first" in words and headline_key(text) == (
            words["first"].split()[1:], words["relation"], words["second"].split()[1:], words["city"])
    if task.startswith("digits"):
        return words == {"number": asked["number"]}
    return answers_question(task, text, asked, words)


def headline_key(text: str) -> tuple[list[str], str, list[str], str]:
    said = found_in(rf"(?P<a>\w+ \w+) {RELATION} (?P<b>\w+ \w+) in {CITY}\.", text) or found_in(
        rf"{CITY}: (?P<a>\w+ \w+) seen {RELATION} (?P<b>\w+ \w+)\.", text)
    scene = forwards(said)
    return scene["first"].split(), scene["relation"], scene["second"].split(), said["city"]


def answers_question(task: str, text: str, asked: Words, words: Words) -> bool:
    said = found_in(r".*\b(?:on|at) the (?P<side>left|right|top|bottom)(?: of the picture)?"
                    r"(?: kept in (?P<city>\w+))?\?", text)
    city = found_in(r"Which piece in (?P<city>\w+) is .*", text).get("city") or said.get("city")
    relation, place = SIDES[said["side"]]
    assert asked["relation"] == relation
    if task == "quiz_task6":
        return words == {"side": said["side"], "thing": asked[place], "background": asked["background"]}
    return words.get("thing") == asked[place] and (city is None or words.get("city") == city)


TARGET = {"0": "image", "1": "text", "2": "image,text", "3": "text", "4": "image", "6": "text", "7": "image",
          "8": "image,text"}


@pytest.mark.parametrize("split", ["test", "val"])
def test_positives_are_exactly_the_correct_candidates_of_the_union(root: Path, split: str) -> None:
    pool = rows(root / "cand_pool" / "global" / f"mbeir_union_{split}_cand_pool.jsonl")
    words = {row["did"]: candidate_words(root, row) for row in pool}
    assert all(words.values())
    checked = 0
    for path in sorted((root / "query" / split).glob("*.jsonl")):
        task = path.name.removeprefix("mbeir_").removesuffix(f"_{split}.jsonl")
        for query in rows(path):
            correct = {row["did"] for row in pool
                       if row["modality"] == TARGET[task[-1]] and is_correct(query, task, words[row["did"]])}
            assert correct == set(query["pos_cand_list"]), (task, query)
            checked += 1
    assert checked >= 70


def test_train_positives_are_exactly_the_correct_candidates_of_the_train_pool(root: Path) -> None:
    pool = rows(root / "cand_pool" / "global" / "mbeir_union_train_cand_pool.jsonl")
    words = {row["did"]: candidate_words(root, row) for row in pool}
    for path in sorted((root / "query" / "train").glob("*.jsonl")):
        dataset = path.name.removeprefix("mbeir_").removesuffix("_train.jsonl")
        for query in rows(path)[::12]:
            task = f"{dataset}_task{query['task_id']}"
            correct = {row["did"] for row in pool
                       if row["modality"] == TARGET[task[-1]] and is_correct(query, task, words[row["did"]])}
            assert correct == set(query["pos_cand_list"]), (task, query)


def test_pictures_show_what_their_words_say(root: Path) -> None:
    described: dict[str, Words] = {}
    for path in sorted([*root.glob("query/*/*.jsonl"), *root.glob("cand_pool/local/*.jsonl")]):
        for row in rows(path):
            image = row.get("img_path") or row.get("query_img_path")
            if image and (content := row.get("src_content") or row.get("query_src_content")):
                described[image] = json.loads(content)
    kinds = set()
    for image, words in sorted(described.items())[::4]:
        kinds.add(image.split("/")[1])
        if "first" in words:
            scene = {key: words[key] for key in ("first", "relation", "second", "background")}
            assert seen_scene(pixels(root, image)) == without_shapes(scene), image
        elif "thing" in words:
            (patch,) = blobs(pixels(root, image))
            assert words["thing"].startswith(f"{patch[1]} {patch[0]} "), image
            assert background(pixels(root, image)) == words["background"], image
        elif "houses" in words:
            assert is_part(words, seen_street(pixels(root, image))), image
    assert kinds == {f"{name}_images" for name in ("scenes", "edits", "streets", "digits", "museum", "quiz")}


def test_shapes_cannot_be_taken_for_one_another() -> None:
    """Masks of two shapes of one size overlap by less than nine tenths of their union."""
    for radius in drawing.RADIUS:
        dy, dx = np.mgrid[-radius:radius + 1, -radius:radius + 1]
        masks = [mask(dx, dy, radius) for mask in drawing.MASKS]
        assert len(masks) == len(SHAPES)
        for position, mask in enumerate(masks):
            assert mask.any()
            for other in masks[:position]:
                assert (mask & other).sum() < 0.9 * (mask | other).sum()


def test_different_scenes_are_different_pictures(root: Path) -> None:
    for folder in ("scenes", "edits", "streets", "museum", "quiz"):
        pictures = [path.read_bytes() for path in (root / "mbeir_images" / f"{folder}_images").rglob("*.png")]
        assert len(pictures) == len(set(pictures)) > 50


sound_scenes = st.integers(0, 614_399).map(spaces.EDITS.at).filter(spaces.EDITS.is_sound)


@given(sound_scenes, st.randoms(use_true_random=False))
def test_an_edit_in_words_gives_the_edited_scene(scene: Any, choice: Any) -> None:
    neighbours = [row for row in spaces.EDITS.neighbours(scene) if spaces.EDITS.is_sound(row)]
    after = choice.choice(neighbours)
    assert changed(wording.described(scene), wording.edit(scene, after)) == wording.described(after)


@given(sound_scenes, st.integers(0, 2))
def test_every_wording_of_a_caption_says_the_whole_scene(scene: Any, kind: int) -> None:
    assert read_caption(wording.caption(scene, kind)) == wording.described(scene)


SPACES: list[Callable[[], spaces.Space[Any]]] = [
    lambda: spaces.SCENES, lambda: spaces.FACTS, lambda: spaces.STREETS, lambda: spaces.NUMBERS]


@pytest.mark.parametrize("space", SPACES)
@given(number=st.integers(0, 7999))
def test_rows_and_their_numbers_are_one_to_one(space: Callable[[], spaces.Space[Any]], number: int) -> None:
    assert space().number(space().at(number)) == number


def test_a_shorter_album_begins_a_longer_one_and_the_walk_ends() -> None:
    long, short = spaces.QUIZ.album("val", 400, 5), spaces.QUIZ.album("val", 37, 5)
    assert long[:37] == short and len(set(long)) == 400
    everything = spaces.QUIZ.album("val", 10**9, 5)
    rows_of_val = {row for row in map(spaces.QUIZ.at, range(160 * 12 * 12)) if spaces.QUIZ.holds(row, "val")}
    assert len(everything) == len(rows_of_val) and set(everything) == rows_of_val
