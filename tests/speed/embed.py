"""Items per second of embedding: beside the forward pass alone, beside UniIR's way, and with equal items shared.

From files (JPEG, 640 x 480) or members of a tar archive through our loaders to vectors; weights are random. The forward
pass alone runs the same tower over the same images, decoded and normalised in memory, in the same batches; it is
itself compared with open_clip's own. UniIR's way runs both towers for every item, a blank image or an empty text (77
tokens) standing in for what an item lacks and multiplied by 0, in fp32, fed by PIL and torchvision in a torch
DataLoader. `loader_only` is what the loaders make when nothing is encoded: on few cores they and the towers take turns.
Starting the loaders is not timed.
"""

# Shapes: B items of a batch, D dimensions.

from __future__ import annotations

import io
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, List

import numpy as np

from pipeline.embeddings import write_table
from pipeline.encoders import clip_towers, open_clip
from pipeline.encoders.precision import arithmetic
from pipeline.encoding import Encoding
from pipeline.images import ImageStore
from pipeline.loading import EXACT, Source, batches, num_loaders
from pipeline.support.loaders import let_waiting_threads_sleep, one_thread
from pipeline.tables import CANDIDATES, Candidate, table_of
from tests.speed.comparison import Row, at_least_one, by_turns

_WORDS = "a red small wooden boat man street two dogs running near old church under blue evening sky".split()


@dataclass(frozen=True)
class Options:
    architectures: List[str] = field(default_factory=lambda: ["ViT-B-32", "ViT-L-14"])
    precisions: List[str] = field(default_factory=lambda: ["fp32", "bf16"])
    items: int = 384
    large_items: int = 32  # of ViT-L/14, one of which takes as long as ten of ViT-B/32
    batch_size: int = 32
    words: int = 20  # of the longest text; the shortest has 5
    loaders: int = -1
    repetitions: int = 5
    device: str = "cpu"

    def __post_init__(self) -> None:
        at_least_one(self, "items", "large_items", "batch_size", "words", "repetitions")


def rows(options: Options) -> Iterator[Row]:
    let_waiting_threads_sleep()
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder), options)
        for architecture in options.architectures:
            for precision in options.precisions:
                encoder = world.encoder(architecture, precision)
                yield bare(world, encoder, f"{architecture} {precision}")
                for kind in ("files", "tar"):
                    yield fed(world, encoder, f"{architecture} {precision}", kind)
        for precision in options.precisions:
            yield mixed(world, world.encoder("ViT-B-32", precision), precision)
        yield shared(world, world.encoder("ViT-B-32", "fp32"))


class World:
    """Images and tables of one benchmark, and what embeds them."""

    def __init__(self, root: Path, options: Options):
        self.root, self.options = root, options
        for number in range(options.items):
            (root / name_of(number)).write_bytes(jpeg(number))
        with tarfile.open(root / "images.tar", "w") as archive:
            for number in range(options.items):
                archive.add(root / name_of(number), f"inside/{name_of(number)}")
        self.images = ImageStore(root, cache_dir=root)
        self.images.size(f"images.tar!inside/{name_of(0)}")

    def encoder(self, architecture: str, precision: str) -> clip_towers.ClipEncoder:
        return open_clip.build(open_clip.Params(architecture, seed=0), self.options.device, precision)

    def source(self, name: str, items: Sequence[tuple[str | None, str | None]]) -> Source:
        """A table of these texts and images."""
        path = self.root / f"{name}.parquet"
        if not path.exists():
            found = [Candidate(str(number), text, image, "image,text") for number, (text, image) in enumerate(items)]
            write_table(path, table_of(found, CANDIDATES), "0" * 12)
        return Source(path, "0" * 12, self.images, "", EXACT, self.root / "never")

    def count_for(self, work: str) -> int:
        return self.options.items if "ViT-B" in work else min(self.options.large_items, self.options.items)

    def ready(self, encoder: Any, source: Source) -> list[Any]:
        """float32 [B, 3, height, width] of each batch, on the device."""
        import torch
        return [encoder.images.normalised(torch.from_numpy(np.stack([each.pixels for each in batch.prepared])))
                for batch in batches([source], encoder, self.options.batch_size, 0, "none")]

    def num_loaders(self) -> int:
        return num_loaders(self.options.loaders, 1000)

    def embed(self, encoder: Any, source: Source, share: str) -> tuple[float, np.ndarray, int]:
        """Seconds, vectors in the order of the rows, and how many items were encoded."""
        encoding = Encoding(encoder, "bench", self.options.batch_size)
        rows_of = source.items(0, share)
        vectors_ND = np.zeros((sum(map(len, rows_of.values())), encoder.dimension), np.float32)
        arriving = batches([source], encoder, self.options.batch_size, self.num_loaders(), share)
        started = 0.0
        for batch in arriving:
            started = started or time.perf_counter()
            vectors_BD = encoding.vectors(batch.prepared, batch.digests)
            for key, vector_D in zip(batch.keys, vectors_BD):
                vectors_ND[rows_of[key]] = vector_D
        return time.perf_counter() - started, vectors_ND, encoding.num_encoded

    def prepare_only(self, encoder: Any, source: Source) -> float:
        """Items per second of the loaders alone, after the first batch."""
        arriving = batches([source], encoder, min(8, self.options.batch_size), self.num_loaders(), "none")
        next(arriving)
        started, count = time.perf_counter(), sum(len(batch.keys) for batch in arriving)
        return count / (time.perf_counter() - started)


def name_of(number: int) -> str:
    return f"{number:05}.jpg"


def jpeg(seed: int) -> bytes:
    """640 x 480, as heavy to decode as a photograph of quality 85."""
    from PIL import Image
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (30, 40, 3), np.uint8))
    smooth = coarse.resize((640, 480), Image.Resampling.BICUBIC)
    noisy = np.asarray(smooth) + random.normal(0, 12, (480, 640, 3))
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    return file.getvalue()


def text_of(number: int, longest: int) -> str:
    random = np.random.default_rng(number)
    return " ".join(random.choice(_WORDS, random.integers(5, longest + 1)))


def timed(flows: dict[str, Any], repetitions: int) -> dict[str, list[tuple[Any, ...]]]:
    """By turns like `by_turns`; each flow returns its own seconds first."""
    results: dict[str, list[tuple[Any, ...]]] = {name: [] for name in flows}
    by_turns({name: lambda name=name, flow=flow: results[name].append(flow())  # type: ignore[misc]
              for name, flow in flows.items()}, repetitions)
    return {name: found[1:] for name, found in results.items()}


def row_of(name: str, work: str, amount: int, turns: dict[str, list[tuple[Any, ...]]], baseline_name: str,
           tolerance: float, **facts: Any) -> Row:
    """`equal`: no number differs by more than `tolerance` times the norm of its vector."""
    ours_ND, theirs_ND = turns["ours"][-1][1], turns["baseline"][-1][1]
    differences_N = np.abs(ours_ND - theirs_ND).max(axis=1) / np.linalg.norm(theirs_ND, axis=1)
    seconds = {flow: [turn[0] for turn in found] for flow, found in turns.items()}
    return Row.of(name, work, amount, "items/s", seconds["ours"], seconds["baseline"], baseline_name,
                  bool(differences_N.max() <= tolerance), largest_difference=float(f"{differences_N.max():.2g}"),
                  tolerance=tolerance, **facts)


# the loader beside the bare forward pass

def fed(world: World, encoder: Any, work: str, kind: str) -> Row:
    """The loader beside what it feeds."""
    count = world.count_for(work)
    folder = "" if kind == "files" else "images.tar!inside/"
    source = world.source(f"{kind}{count}", [(None, folder + name_of(number)) for number in range(count)])
    ready = world.ready(encoder, source)
    turns = timed({"ours": lambda: world.embed(encoder, source, "none"),
                   "baseline": lambda: forward(encoder, ready, is_ours=True)}, world.options.repetitions)
    return row_of("embed", f"{work}, images from {kind}, batches of {world.options.batch_size}", count, turns,
                  "its forward pass on ready tensors", 0.0,
                  loader_only=round(world.prepare_only(encoder, source), 1), loaders=world.num_loaders())


def bare(world: World, encoder: Any, work: str) -> Row:
    """The forward pass beside open_clip's."""
    count = world.count_for(work)
    ready = world.ready(encoder, world.source(f"files{count}", [(None, name_of(number)) for number in range(count)]))
    turns = timed({"ours": lambda: forward(encoder, ready, is_ours=True),
                   "baseline": lambda: forward(encoder, ready, is_ours=False)}, world.options.repetitions)
    return row_of("embed", f"{work}, forward pass, batches of {world.options.batch_size}", count, turns, "open_clip's",
                  1e-5 if encoder.precision == "fp32" else 2e-2)


def forward(encoder: Any, ready: Sequence[Any], is_ours: bool) -> tuple[float, np.ndarray]:
    """Seconds and vectors of the image tower over normalised pixels, by the encoder's blocks or by open_clip's own."""
    import torch

    def tower(pixels: Any) -> Any:
        if is_ours and encoder._image_blocks is not None:
            return clip_towers._image_vectors(encoder.model.visual, pixels, encoder._image_blocks)
        return encoder.model.encode_image(pixels)
    started = time.perf_counter()
    with torch.inference_mode(), arithmetic(encoder.device, encoder.precision):
        found = [encoder._in_parts(tower, pixels, encoder._image_length, 4 * encoder._widths[1]).float().cpu().numpy()
                 for pixels in ready]
    return time.perf_counter() - started, np.concatenate(found)


# a mixed pool beside UniIR's way

def mixed(world: World, encoder: Any, precision: str) -> Row:
    """A third texts, a third images, a third both."""
    options = world.options
    items = [(text_of(number, options.words) if number % 3 != 1 else None, name_of(number) if number % 3 else None)
             for number in range(options.items)]
    source, plain = world.source("mixed", items), world.encoder("ViT-B-32", "fp32")
    turns = timed({"ours": lambda: world.embed(encoder, source, "shard"),
                   "baseline": lambda: uniirs_way(world, plain, items)}, options.repetitions)
    work = f"ViT-B-32 {precision}, mixed pool, texts of 5 to {options.words} words, batches of {options.batch_size}"
    return row_of("embed", work, options.items, turns, "UniIR's way, fp32", 1e-5 if precision == "fp32" else 2e-2)


class _Everything:
    """A text of 77 tokens, an image, and which of them are there, for every item."""

    def __init__(self, world: World, encoder: Any, items: Sequence[tuple[str | None, str | None]]):
        self.world, self.encoder, self.items = world, encoder, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> tuple[Any, ...]:
        import torch
        from PIL import Image
        text, image = self.items[number]
        tokens = self.encoder.tokenizer([text or ""])[0]
        if image is None:
            return tokens, torch.zeros(3, *self.encoder.image_size), float(text is not None), 0.0
        pixels = self.encoder.images.transform(Image.open(self.world.root / image).convert("RGB"))
        return tokens, pixels, float(text is not None), 1.0


def uniirs_way(world: World, encoder: Any, items: Sequence[tuple[str | None, str | None]]) -> tuple[float, np.ndarray]:
    import torch
    count = world.num_loaders()
    loader: Any = torch.utils.data.DataLoader(
        _Everything(world, encoder, items), batch_size=world.options.batch_size, num_workers=count,  # type: ignore
        worker_init_fn=one_thread if count else None)
    found, started, device = [], 0.0, encoder.device
    for tokens_BL, pixels, has_text_B, has_image_B in loader:
        started = started or time.perf_counter()
        with torch.no_grad():
            texts_BD = encoder.model.encode_text(tokens_BL.to(device)) * has_text_B.float().to(device)[:, None]
            images_BD = encoder.model.encode_image(pixels.to(device)) * has_image_B.float().to(device)[:, None]
        found.append((texts_BD + images_BD).cpu().numpy())
    return time.perf_counter() - started, np.concatenate(found)


# equal items shared

def shared(world: World, encoder: Any) -> Row:
    """Of ten items three are copies: images under other names, which only their bytes give away."""
    count = world.options.items
    originals = max(1, round(count * 0.7))
    for number in range(originals, count):
        (world.root / f"copy{number}.jpg").write_bytes((world.root / name_of(number - originals)).read_bytes())
    names = [name_of(number) if number < originals else f"copy{number}.jpg" for number in range(count)]
    source = world.source("shared", [(None, name) for name in names])
    turns = timed({"ours": lambda: world.embed(encoder, source, "shard"),
                   "baseline": lambda: world.embed(encoder, source, "none")}, world.options.repetitions)
    return row_of("embed", f"ViT-B-32 fp32, {count - originals} of {count} images are copies", count, turns,
                  "every item encoded (share=none)", 1e-5, encoded=turns["ours"][-1][2])
