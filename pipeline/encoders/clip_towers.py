"""Two CLIP towers made from an open_clip model config, and the encoder that runs them.

A text is encode_text, an image is encode_image, both together are the plain sum of the two: nothing is
normalised. Only the towers an item needs are run, and texts are cut where that is exact.

The trade: weights stay fp32 in memory under every precision, so that norms and the text tower's sums lose no digits.
"""

# Shapes: B items, L tokens, D dimensions of a vector.

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from pipeline.encoders import Item
from pipeline.encoders.checkpoints import find_file
from pipeline.encoders.clip_images import ImageInput
from pipeline.encoders.clip_texts import encode_short_texts, needed_length, new_tokenizer
from pipeline.encoders.precision import arithmetic, check_precision
from pipeline.support.errors import UserError, nearest

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

# On a CPU no intermediate result is larger: beyond, glibc gives each its own mapping, and every page costs a fault.
_MOST_BYTES = 13 * 2**20


class Prepared(NamedTuple):
    """One item, ready for the towers: tokens int64 [context length], pixels uint8 [height, width, 3]."""

    tokens: np.ndarray | None
    pixels: np.ndarray | None


def read_architecture(name: str, quick_gelu: bool | None = None) -> dict[str, Any]:
    """The open_clip model config of that name or JSON file, its activation made explicit. No torch."""
    path = find_file(name, "architecture") if name.endswith(".json") else _stock_architecture(name)
    try:
        architecture = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"architecture is not JSON: {error}", str(path)) from error
    keys = architecture if isinstance(architecture, dict) else {}
    missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in keys]
    if missing:
        raise UserError(f"architecture lacks {', '.join(missing)}", str(path),
                        "write it like open_clip's model configs")
    own = architecture.get("quick_gelu", False)
    return {**architecture, "quick_gelu": own if quick_gelu is None else quick_gelu}


def _stock_architecture(name: str) -> Path:
    package = importlib.util.find_spec("open_clip")  # found, not imported: importing it would import torch
    if package is None or not package.submodule_search_locations:
        raise UserError("open_clip is not installed", None, "pip install open_clip_torch")
    folder = Path(package.submodule_search_locations[0], "model_configs")
    known = {path.stem: path for path in folder.glob("*.json")}
    if name not in known:
        raise UserError(f"architecture '{name}' is not in open_clip", None, nearest(name, known) or None)
    return known[name]


def architecture_hash(architecture: Mapping[str, Any]) -> str:
    """sha256 of the config's canonical JSON: neither its name nor its layout on disk matters."""
    return "sha256:" + hashlib.sha256(json.dumps(architecture, sort_keys=True).encode()).hexdigest()


def new_model(architecture: Mapping[str, Any], seed: int | None = None, plain: Any = None) -> Any:
    """An open_clip model in eval mode, its weights random. On the CPU: a seed means the same everywhere.

    `plain`: a subclass of open_clip.CLIP to make, instead of open_clip.CLIP itself.
    """
    import open_clip
    import torch

    config = json.loads(json.dumps(architecture))
    foreign = config["text_cfg"].get("hf_model_name") or config["text_cfg"].get("hf_tokenizer_name")
    if foreign and importlib.util.find_spec("transformers") is None:
        raise UserError(f"this architecture reads text with {foreign}", None, "pip install transformers")
    for tower, kind in (("vision_cfg", "timm_model"), ("text_cfg", "hf_model")):
        if f"{kind}_name" in config[tower]:
            config[tower][f"{kind}_pretrained"] = False  # never fetch weights that are about to be replaced
    custom_text = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
    custom = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed or 0)
        try:
            return (custom if custom_text else plain or open_clip.CLIP)(**config).eval()
        except TypeError as error:
            raise UserError(f"open_clip does not accept this architecture: {error}") from error
        except OSError as error:  # a text tower whose config lies on the Hugging Face Hub
            raise UserError("the text tower's config cannot be fetched", str(error),
                            "run once with network access") from error


class ClipEncoder:
    """Texts, images, and both (their un-normalised sum) as float32 vectors of one space."""

    modalities = frozenset({"text", "image", "image,text"})

    def __init__(self, architecture: Mapping[str, Any], model: Any, device: str, precision: str,
                 preprocess: Mapping[str, Any] | None = None):
        """`preprocess`: what differs from open_clip's default image transform (mean, std, ...)."""
        check_precision(precision)
        self.dimension: int = architecture["embed_dim"]
        self.device, self.precision = device, precision
        self.model = model.to(device).eval()
        self.tokenizer = new_tokenizer(architecture)
        self.images = ImageInput(model.visual.image_size, preprocess, device)
        self._widths = [architecture[part].get("width", usual) for part, usual in (("text_cfg", 512),
                                                                                   ("vision_cfg", 768))]
        self._image_length = _image_length(model.visual)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of what the image tower sees: decoders need not give much more."""
        return self.images.size

    def prepare(self, item: Item) -> Prepared:
        """Tokenise, resize and crop. A text of "" beside an image is no text, as in UniIR.

        With no image either, the empty text is encoded (UniIR: zeros), since a zero vector has no direction.
        """
        has_text = bool(item.text) or item.image is None
        tokens = self.tokenizer([item.text or ""])[0].numpy() if has_text else None
        return Prepared(tokens, None if item.image is None else self.images.cut(item.image))

    def encode(self, batch: Sequence[Prepared]) -> np.ndarray:
        """float32 [B, D], not normalised, one row per prepared item in order."""
        import torch

        needs_order = self.precision != "fp32" and torch.device(self.device).type == "cpu"
        with torch.inference_mode(), _positions_first(self.model) if needs_order else nullcontext():
            return self.embed(batch).cpu().numpy()

    def compile(self) -> None:
        """Let torch compile the blocks of both transformers, which then differ by rounding only."""
        from open_clip.transformer import Transformer

        for tower in self.model.modules():
            if isinstance(tower, Transformer):
                for block in tower.resblocks:
                    block.compile(dynamic=True)  # each alone: they share one graph, which is ready in seconds

    def embed(self, batch: Sequence[Prepared]) -> Tensor:
        """float32 [B, D] on the device, with gradients where the caller's mode allows them (for training)."""
        import numpy as np
        import torch

        vectors_BD = torch.zeros(len(batch), self.dimension, device=self.device)
        with arithmetic(self.device, self.precision):
            for field, tower in enumerate((self._encode_texts, self._encode_images)):
                rows = [row for row, prepared in enumerate(batch) if prepared[field] is not None]
                if rows:
                    inputs = torch.from_numpy(np.stack([cast("np.ndarray", batch[row][field]) for row in rows]))
                    outputs = tower(inputs).float()
                    vectors_BD = vectors_BD.index_add(0, torch.tensor(rows, device=self.device), outputs)
        return vectors_BD

    def _encode_images(self, pixels_BHWC: Tensor) -> Tensor:
        def run(part: Tensor) -> Tensor:
            return self.model.encode_image(self.images.normalised(part), normalize=False)
        return self._in_parts(run, pixels_BHWC, self._image_length, 4 * self._widths[1])

    def _encode_texts(self, tokens_BL: Tensor) -> Tensor:
        length = needed_length(self.model, tokens_BL)
        is_short = length < tokens_BL.shape[1]

        def run(part: Tensor) -> Tensor:
            if is_short:
                return encode_short_texts(self.model, part.to(self.device, non_blocking=True))
            return self.model.encode_text(part.to(self.device, non_blocking=True), normalize=False)
        return self._in_parts(run, tokens_BL[:, :length], length, 4 * self._widths[0])

    def _in_parts(self, run: Callable[[Tensor], Tensor], inputs: Tensor, length: int, width: int) -> Tensor:
        """`run` over items of `length` positions, each at its widest `width` numbers; on a CPU `encode` runs parts."""
        import torch

        if not torch.is_inference_mode_enabled() or torch.device(self.device).type != "cpu":
            return run(inputs)
        parts = inputs.split(max(1, _MOST_BYTES // (4 * length * width)))
        return run(inputs) if len(parts) == 1 else torch.cat([run(part) for part in parts])


def _image_length(visual: Any) -> int:
    """Positions of one image in its tower; of towers other than open_clip's transformer an estimate."""
    positions = getattr(visual, "positional_embedding", None)
    return len(positions) if positions is not None else 256


@contextmanager
def _positions_first(model: Any) -> Iterator[None]:
    """open_clip's transformers work on [positions, items] instead of [items, positions]; the results are the same.

    Batch first, torch's attention transposes its input, and its product with bfloat16 weights then copies them once
    per position: three quarters of the time of a tower on a CPU.
    """
    from open_clip.transformer import ResidualAttentionBlock, Transformer

    turned = [module for tower in model.modules()
              if isinstance(tower, Transformer) and tower.batch_first
              and all(type(block) is ResidualAttentionBlock for block in tower.resblocks)
              for module in (tower, *(block.attn for block in tower.resblocks))]
    for module in turned:
        module.batch_first = False
    try:
        yield
    finally:
        for module in turned:
            module.batch_first = True
