"""The twelve tasks of mini M-BEIR, in the order in which they are written.

They cover the eight kinds of M-BEIR. The same scene is found as a picture, as a caption and as an illustrated
entry: on the union pool it is the instruction that says which of them is wanted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable

from pipeline.benchmarks.mini_mbeir_world import asking
from pipeline.benchmarks.mini_mbeir_world.spaces import (
    EDITS, FACTS, MUSEUM, NUMBERS, SCENES, STATEMENTS, STREETS, Dice, Space,
)
from pipeline.benchmarks.mini_mbeir_world.terms import Asked, Key, Pool, Shown, World

Item = Any  # a row of things.py, or a small tuple around one


@dataclass(frozen=True)
class MiniTask:
    """`ask` returns None where an item cannot be asked for; pools of `also` hold further positives."""

    dataset: str
    dataset_id: int
    task_id: int
    items: Callable[[World, str, int], list[Item]]
    show: Callable[[World, str, Item], Shown]
    keys: Callable[[Item], tuple[Key, ...]]
    ask: Callable[[World, str, Item, Dice, Pool], Asked | None]
    prompts: tuple[str, str, str, str]
    hard_negatives: int = 0
    has_split_pools: bool = False
    also: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.dataset}_task{self.task_id}"


def _album(space: Space[Any]) -> Callable[[World, str, int], list[Item]]:
    return lambda world, split, size: space.album(split, size, world.seed)


def _itself(item: Item) -> tuple[Key, ...]:
    return (item,)


TASKS: tuple[MiniTask, ...] = (
    MiniTask(
        "scenes", 0, 0, _album(SCENES), asking.show_scene, _itself, asking.ask_caption,
        ("Find the picture that this caption describes.", "Which picture shows what is written here?",
         "Match the description with its picture.", "Show me the picture of this.")),
    MiniTask(
        "scenes", 0, 3, _album(SCENES), asking.show_caption, _itself, asking.ask_scene,
        ("Find the caption of this picture.", "Which sentence describes what is drawn here?",
         "Match the picture with its description in words.", "Say what can be seen in this picture.")),
    MiniTask(
        "streets", 1, 0, _album(STREETS), asking.show_street, asking.street_keys, asking.ask_street_caption,
        ("Find a picture of a street like this.", "Which street is described here? Show its picture.",
         "Pick the picture of the houses in this sentence.", "Show me this row of houses."),
        has_split_pools=True),
    MiniTask(
        "streets", 1, 3, asking.street_captions, asking.show_street_caption,
        lambda item: (asking.street_key(item[1], item[0]),), asking.ask_street,
        ("Find a sentence about this street.", "Which words are true of these houses?",
         "Describe this row of houses.", "Pick the sentence that fits the street in the picture."),
        has_split_pools=True),
    MiniTask(
        "facts", 2, 1, _album(FACTS), asking.show_fact, asking.fact_keys, asking.ask_fact,
        ("Find the fact that answers this question.", "Which statement answers the question?",
         "Look up the sentence with the answer.", "Pick a fact to answer this."),
        hard_negatives=2),
    MiniTask(
        "headlines", 3, 2, asking.photos, asking.show_photo, asking.headline_keys, asking.ask_headline,
        ("Find the photo with a note on this headline.", "Which noted photo belongs to the headline?",
         "Match the headline with a photo and its place.", "Pick the entry with a photo for this news."),
        hard_negatives=1),
    MiniTask(
        "digits", 4, 3, asking.numbers, asking.show_number, lambda row: (row.digits,),
        asking.ask_handwriting,
        ("Read the handwritten number.", "Which number is written here? Find it in print.",
         "Find the text of this handwriting.", "Say the number in this picture.")),
    MiniTask(
        "digits", 4, 4, _album(NUMBERS), asking.show_handwriting, lambda row: (row.digits,),
        asking.ask_handwriting,
        ("Find the same number in another handwriting.", "Who else wrote this number? Show the picture.",
         "Match the number with a picture of the same digits.", "Show this number in other handwriting.")),
    MiniTask(
        "museum", 5, 8, _album(MUSEUM), asking.show_museum_entry, lambda entry: (entry[:4], entry.thing),
        asking.ask_museum,
        ("Find the museum entry that the question is about.", "Which museum piece is the same thing?",
         "Look up the museum piece, with its picture.", "Pick the entry for the thing in the right city.")),
    MiniTask(
        "quiz", 6, 6, _album(STATEMENTS), asking.show_statement, _itself, asking.ask_statement,
        ("Answer the question about the picture with a sentence.", "Which sentence answers this question?",
         "Find the written answer to the question.", "Look at the picture and pick the right statement.")),
    MiniTask(
        "quiz", 6, 8, asking.quiz_entries, asking.show_quiz_entry, lambda entry: (entry.thing,),
        asking.ask_quiz_entry,
        ("Find an illustrated entry on the thing asked for.", "Which picture and note answer the question?",
         "Look up the thing in an illustrated book.", "Pick an entry with a picture as the answer."),
        also=("museum_task8",)),
    MiniTask(
        "edits", 7, 7, _album(EDITS), asking.show_scene, _itself, asking.ask_edit,
        ("Find the picture after this change.", "Which picture shows the scene changed as told?",
         "Change the picture as written and find the result.", "Show the same picture but edited."),
        hard_negatives=2),
)
