"""Vectors per second of a tiny model of every family of encoders, in batches beside one at a time.

The models have random weights and a few layers (tests/encoders/tiny_families.py), so that these are the figures of
what surrounds a model: padding, grouping, libraries. What a published model takes is another matter; `doctor` measures
it. Items are prepared before the clock starts. `equal`: no vector is farther than 1e-5 of its length from the one that
its item has alone. `joined` is what the family makes of a text and an image together.
"""

# Shapes: B items of a batch, D dimensions.

from __future__ import annotations

import gc
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, List

import numpy as np

from pipeline.encoders import Item, load_encoder
from pipeline.support.errors import UserError
from pipeline.support.loaders import let_waiting_threads_sleep
from tests.speed.comparison import Row, at_least_one, by_turns, one_of
from tests.speed.embed import text_of

KINDS = ("text", "image", "image,text")
TOLERANCE = 1e-5
_TURNS = 5
_WORDS = 20  # of the longest text; the shortest has 5
_UNIT, _BASELINE = "vectors/s", "batches of one"


@dataclass(frozen=True)
class Options:
    families: List[str] = field(default_factory=lambda: ["all"])
    batch: int = 64
    seconds: float = 1.0  # for a row, warming not counted; more if five turns of one batch each take longer
    device: str = "cpu"
    precision: str = "fp32"

    def __post_init__(self) -> None:
        at_least_one(self, "batch")
        if self.seconds < 0:
            raise UserError(f"seconds is {self.seconds}; it must not be negative", "command line")


def rows(options: Options) -> Iterator[Row]:
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported: some of mteb's models draw a bar a batch
    let_waiting_threads_sleep()
    from tests.encoders.tiny_families import ELSEWHERE, FAMILIES

    logging.getLogger("transformers").setLevel(logging.ERROR)  # tiny vocabularies are not what it expects
    names = [*FAMILIES, *ELSEWHERE] if options.families == ["all"] else options.families
    for name in names:
        one_of("families", name, [*FAMILIES, *ELSEWHERE])
    try:
        for name in names:
            if name in ELSEWHERE:
                yield Row.skipped("encoders", name, _UNIT, _BASELINE, ELSEWHERE[name])
                continue
            with tempfile.TemporaryDirectory() as folder:
                yield from _family(name, Path(folder), options)
    finally:
        gc.unfreeze()  # or the end of the process complains of leaks


def _family(name: str, folder: Path, options: Options) -> Iterator[Row]:
    from tests.encoders.tiny_families import FAMILIES, choice

    try:
        chosen = choice(name, folder)
        encoder = load_encoder(chosen.module).build(chosen.params, options.device, options.precision)
    except UserError as error:  # a library that is not installed
        yield Row.skipped("encoders", name, _UNIT, _BASELINE, error.what)
        return
    gc.unfreeze()
    gc.collect()
    gc.freeze()  # before each turn the garbage is collected: among the million objects of these libraries, slowly
    for kind in KINDS:
        if kind in encoder.modalities:
            facts = {"joined": FAMILIES[name].joined} if kind == "image,text" else {}
            yield _row(f"{name}: {kind}", encoder, kind, options, facts)


def _row(work: str, encoder: Any, kind: str, options: Options, facts: Mapping[str, Any]) -> Row:
    prepared = [encoder.prepare(item) for item in _items(kind, options.batch)]

    def one_by_one() -> np.ndarray:
        return np.concatenate([encoder.encode([each]) for each in prepared])

    together = partial(encoder.encode, prepared)
    ours_BD, alone_BD = together(), one_by_one()
    difference = float((np.linalg.norm(ours_BD - alone_BD, axis=1) / np.linalg.norm(alone_BD, axis=1)).max())
    flows: dict[str, Callable[[], Any]] = {"ours": together, "baseline": one_by_one}
    times = {name: _times(flow, options.seconds / _TURNS / len(flows)) for name, flow in flows.items()}
    turns = by_turns({name: partial(_repeat, flow, times[name]) for name, flow in flows.items()}, _TURNS)
    seconds = {name: [turn / times[name] for turn in found] for name, found in turns.items()}
    return Row.of("encoders", f"{work}, batches of {options.batch}", options.batch, _UNIT, seconds["ours"],
                  seconds["baseline"], _BASELINE, difference <= TOLERANCE, dimension=encoder.dimension,
                  largest_difference=float(f"{difference:.2g}"), **facts)


def _times(flow: Callable[[], Any], seconds: float) -> int:
    """How often it runs in this time, at least once."""
    started = time.perf_counter()
    flow()
    return max(1, int(seconds / (time.perf_counter() - started)))


def _repeat(flow: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        flow()


def _items(kind: str, count: int) -> list[Item]:
    """Texts of 5 to 20 words, pictures of 50 x 40 pixels, or both."""
    from tests.encoders.tiny_models import picture

    texts = [text_of(number, _WORDS) if "text" in kind else None for number in range(count)]
    return [Item(text, picture(number) if "image" in kind else None, bare_text=text)
            for number, text in enumerate(texts)]
