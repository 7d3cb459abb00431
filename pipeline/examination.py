"""Examine an encoder: does it keep the contract of pipeline/encoders, and how does it behave where that is silent?

Its own items are drawn here, so that nothing but the encoder is needed. What fails would make embeddings wrong, or end
a run; what is only noted (where texts are cut, that the role matters, how fast it is) is for the user to know.
The trade: a batch mate is found to change a vector only if one of these few items shows it.
"""

# Shapes: B items, D dimensions.

from __future__ import annotations

import json
import pickle
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.encoders import Encoder, Item, load_encoder
from pipeline.support.errors import UserError
from pipeline.support.findings import Finding, failed, guarded, offline

if TYPE_CHECKING:
    from PIL.Image import Image

# largest relative difference of a vector from what the encoder gives for the item alone
TOLERANCE = {"fp32": 1e-5, "bf16": 5e-2, "fp16": 1e-2}
UNUSUAL_TEXTS = ("\U0001f98a\U0001f468\u200d\U0001f469\u200d\U0001f467", "\u4e2d\u6587\u6a21\u578b",
                 "\u0634\u0645\u0633", "e\u0301\u0327" * 20, "a\x00b\x1f\ufffd", " \t\n ",
                 "<|endoftext|> [CLS] </s> <image>", "x" * 3000)
UNUSUAL_SIZES = ((1, 1), (1, 700), (2000, 3), (224, 224), (640, 480))
_MOST_WORDS = 1000
_BATCH = 16
_SECONDS = 1.0  # for each speed


def examine(module: str, params: Any, device: str, precision: str, is_offline: bool = False) -> Iterator[Finding]:
    """Every finding in turn; after one that leaves nothing to examine, no more. `is_offline`: without network."""
    findings = guarded(_findings(module, params, device, precision), "mend the encoder; --debug shows where")
    return offline(findings) if is_offline else findings


def _findings(module: str, params: Any, device: str, precision: str) -> Iterator[Finding]:
    try:
        yield _identity(load_encoder(module), params)
        started = time.perf_counter()
        encoder = load_encoder(module).build(params, device, precision)
        seconds = time.perf_counter() - started
        yield Finding("ok", "build", f"{encoder.dimension} dimensions, {', '.join(sorted(encoder.modalities))}; "
                                     f"{seconds:.1f} s on {device} in {precision}", "", encoder.dimension)
    except UserError as error:
        yield failed("build", error)
        return
    if getattr(encoder, "needs_ids", False):
        yield Finding("note", "items", "it has vectors for ids, not for contents: there is no more to examine")
        return
    yield from _Examined(encoder, precision).findings()


def _identity(module: Any, params: Any) -> Finding:
    started = time.perf_counter()
    found = [json.dumps(module.identity(params), sort_keys=True) for _ in range(2)]
    if found[0] != found[1]:
        return Finding("FAIL", "identity", "differs from call to call", "let it depend on contents only")
    return Finding("ok", "identity", f"stable, {time.perf_counter() - started:.1f} s for two")


class _Examined:
    """An encoder under examination."""

    def __init__(self, encoder: Encoder, precision: str):
        self.encoder, self.tolerance = encoder, TOLERANCE[precision]
        self.takes_text, self.takes_image = ("text" in encoder.modalities), ("image" in encoder.modalities)
        self.takes_both = "image,text" in encoder.modalities

    def findings(self) -> Iterator[Finding]:
        items = self._items()
        alone_BD = np.concatenate([self._vectors([item]) for item in items])
        yield self._shape(items, alone_BD)
        yield self._tells_apart(items, alone_BD)
        yield self._repeats(items)
        yield self._mates(items, alone_BD)
        yield self._pickles(items[0])
        yield from self._unusual()
        yield from self._habits()
        yield from self._speeds()

    def _items(self) -> list[Item]:
        texts = ["a red circle", "two", "the quick brown fox jumps over the lazy dog and runs into the dark wood"]
        images = [_picture(seed, size) for seed, size in enumerate([(96, 64), (64, 96), (300, 200)])]
        found: list[Item] = []
        if self.takes_text:
            found += [_text(text) for text in texts]
        if self.takes_image:
            found += [Item(None, image) for image in images]
        if self.takes_both:
            found += [Item(text, image, bare_text=text) for text, image in zip(texts, images)]
        return found

    def _vectors(self, items: Sequence[Item]) -> np.ndarray:
        return self.encoder.encode([self.encoder.prepare(item) for item in items])

    def _shape(self, items: Sequence[Item], vectors_BD: np.ndarray) -> Finding:
        wanted = (len(items), self.encoder.dimension)
        if vectors_BD.shape != wanted or vectors_BD.dtype != np.float32:
            return Finding("FAIL", "shape", f"{vectors_BD.dtype} {vectors_BD.shape}, not float32 {wanted}",
                           "encode returns float32 [B, D]")
        if not np.isfinite(vectors_BD).all() or not vectors_BD.any(axis=1).all():
            return Finding("FAIL", "shape", "a vector is zero, or holds NaN or infinity", "check weights and precision")
        return Finding("ok", "shape", f"float32 {wanted}, finite, none zero")

    def _tells_apart(self, items: Sequence[Item], vectors_BD: np.ndarray) -> Finding:
        same = [(left, right) for left in range(len(items)) for right in range(left)
                if _difference(vectors_BD[left], vectors_BD[right]) <= 1e-6]
        if same:
            return Finding("FAIL", "different items", f"{len(same)} pairs of different items have one vector",
                           "check the weights, and what prepare makes of texts and images")
        return Finding("ok", "different items", f"{len(items)} items, as many vectors")

    def _repeats(self, items: Sequence[Item]) -> Finding:
        first, again = (self._vectors(items) for _ in range(2))
        if np.array_equal(first, again):
            return Finding("ok", "repetition", "the same bits")
        return self._compared("repetition", _difference(first, again), "is it in eval mode?")

    def _mates(self, items: Sequence[Item], alone_BD: np.ndarray) -> Finding:
        orders = [list(range(len(items))), list(range(len(items)))[::-1], [*range(0, len(items), 2)] * 3, [0, -1]]
        worst = max(_difference(self._vectors([items[number] for number in order]), alone_BD[order])
                    for order in orders)
        return self._compared("batch mates and order", worst, "is padding masked?")

    def _compared(self, name: str, difference: float, do: str) -> Finding:
        is_small = difference <= self.tolerance
        return Finding("ok" if is_small else "FAIL", name,
                       f"vectors differ by {difference:.1e}, {self.tolerance:.0e} is tolerated", "" if is_small else do)

    def _pickles(self, item: Item) -> Finding:
        prepared = pickle.loads(pickle.dumps(self.encoder.prepare(item)))
        difference = _difference(self.encoder.encode([prepared]), self._vectors([item]))
        return self._compared("through a loader process", difference, "prepare must return what can be pickled")

    def _unusual(self) -> Iterator[Finding]:
        texts = [_text(text) for text in UNUSUAL_TEXTS] if self.takes_text else []
        images = [Item(None, _picture(1, size)) for size in UNUSUAL_SIZES] if self.takes_image else []
        for name, items in (("unusual texts", texts), ("unusual images", images)):
            broken = [number for number, item in enumerate(items) if not np.isfinite(self._vectors([item])).all()]
            if broken:
                yield Finding("FAIL", name, f"number {broken[0]} has a vector that is not finite", "check `prepare`")
            elif items:
                yield Finding("ok", name, f"{len(items)}, all finite")

    def _habits(self) -> Iterator[Finding]:
        """What the contract leaves open."""
        if self.takes_text:
            yield self._of_nothing()
            yield Finding("note", "long texts", self._cut_at())
            found, asked = self._vectors([_text("a red circle"), replace(_text("a red circle"), role="query")])
            yield Finding("note", "a query and a candidate of one text", self._same_or_not(found, asked))
        if self.takes_both:
            image = _picture(2, (80, 80))
            empty, none = self._vectors([Item("", image), Item(None, image)])
            yield Finding("note", "an empty text and none beside an image", self._same_or_not(empty, none))

    def _of_nothing(self) -> Finding:
        if np.isfinite(self._vectors([Item("", None), Item(None, None)])).all():
            return Finding("ok", "empty text", "has a vector")
        return Finding("FAIL", "empty text", "its vector is not finite", "give the empty text's vector")

    def _same_or_not(self, left_D: np.ndarray, right_D: np.ndarray) -> str:
        difference = _difference(left_D, right_D)
        return "same vector" if difference <= self.tolerance else f"vectors differ by {difference:.1e}"

    def _cut_at(self) -> str:
        """How many words decide the vector of a long text, by bisection: once cut, more of them change nothing."""
        words = [f"word{number}" for number in range(_MOST_WORDS)]
        whole_D = self._vectors([_text(" ".join(words))])

        def is_whole(count: int) -> bool:
            return _difference(self._vectors([_text(" ".join(words[:count]))]), whole_D) <= self.tolerance
        count = bisect_left(range(_MOST_WORDS), True, key=is_whole)
        if count >= _MOST_WORDS - 1:
            return f"{_MOST_WORDS:,} words are all read"
        return f"cut after about {count:,} words such as '{words[count - 1]}'"

    def _speeds(self) -> Iterator[Finding]:
        for name, takes, item in (
                ("text", self.takes_text, _text("a photo of a small dog that runs along the beach")),
                ("image", self.takes_image, Item(None, _picture(3, (640, 480)))),
                ("image,text", self.takes_both, Item("a small dog", _picture(3, (640, 480)), bare_text="a small dog"))):
            if takes:
                yield from self._speed(name, item)

    def _speed(self, name: str, item: Item) -> Iterator[Finding]:
        prepared = [self.encoder.prepare(item)] * _BATCH
        rate = _rate(partial(self.encoder.encode, prepared), _BATCH, _SECONDS)
        yield Finding("note", f"speed of {name}", f"{rate:,.0f} vectors/s in batches of {_BATCH}, ready in memory", "",
                      rate)
        rate = _rate(partial(self.encoder.prepare, item), 1, _SECONDS / 4)
        yield Finding("note", f"preparing {name}", f"{rate:,.0f} items/s in one process, decoded already", "", rate)


def _rate(work: Callable[[], Any], items: int, seconds: float) -> float:
    """Items per second, for at least so many seconds, after one call of so many items that is not counted."""
    work()
    started, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - started) < seconds:
        work()
        count += items
    return count / passed


def _text(text: str) -> Item:
    return Item(text, None, bare_text=text)


def _picture(seed: int, size: tuple[int, int]) -> Image:
    """Smooth colours with some noise, of this width and height."""
    from PIL import Image

    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    noise_HWC = random.integers(-20, 21, (size[1], size[0], 3))
    return Image.fromarray(np.clip(np.asarray(coarse) + noise_HWC, 0, 255).astype(np.uint8))


def _difference(found_BD: np.ndarray, expected_BD: np.ndarray) -> float:
    """The largest Euclidean distance of two rows, relative to the longer of both."""
    found_BD, expected_BD = (np.atleast_2d(each).astype(np.float64) for each in (found_BD, expected_BD))
    lengths_B = np.maximum(np.linalg.norm(found_BD, axis=1), np.linalg.norm(expected_BD, axis=1))
    distances_B = np.linalg.norm(found_BD - expected_BD, axis=1)
    return float((distances_B / np.where(lengths_B > 0, lengths_B, 1)).max())
