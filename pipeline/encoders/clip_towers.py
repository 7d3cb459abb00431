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
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from pipeline.encoders import Item
from pipeline.encoders.checkpoints import find_file
from pipeline.encoders.clip_blocks import Blocks, fits, projected
from pipeline.encoders.clip_images import ImageInput
from pipeline.encoders.clip_texts import encode_texts, needed_length, new_tokenizer, text_transformer
from pipeline.encoders.precision import arithmetic, check_precision, weights_dtype
from pipeline.support.errors import UserError, nearest

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

log = logging.getLogger("pipeline")

# On a CPU no intermediate result is larger: beyond, glibc gives each its own mapping, and every page costs a fault.
_MOST_BYTES = 13 * 2**20
_MOST_TEXTS = 16  # on a CPU at once: sorted by length as they arrive, few are then padded by much


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
        self._image_blocks, self._text_blocks = self._blocks()

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

        with torch.inference_mode():
            return self.embed(batch).cpu().numpy()

    def compile(self) -> None:
        """Let torch compile open_clip's blocks of both transformers, which then differ by rounding only.

        On a CPU what `clip_blocks` runs is faster than that, and stays.
        """
        import torch
        from open_clip.transformer import Transformer

        if torch.device(self.device).type == "cpu" and (self._image_blocks or self._text_blocks):
            log.info("embed.compile: on a CPU this encoder is faster as it is")
            return
        self._image_blocks = self._text_blocks = None
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

    def _blocks(self) -> tuple[Blocks | None, Blocks | None]:
        """Of the image and the text tower: what runs them in `encode`; None for towers that open_clip's code runs."""
        from open_clip.transformer import VisionTransformer

        half = None if self.precision == "fp32" else weights_dtype(self.precision)
        visual = self.model.visual
        towers = visual.transformer if type(visual) is VisionTransformer else None, text_transformer(self.model)
        images, texts = (Blocks(tower, half) if fits(tower) else None for tower in towers)
        return images, texts

    def _encode_images(self, pixels_BHWC: Tensor) -> Tensor:
        def run(part: Tensor) -> Tensor:
            pixels_BCHW, blocks = self.images.normalised(part), without_gradients(self._image_blocks)
            if blocks is None:
                return self.model.encode_image(pixels_BCHW, normalize=False)
            return _image_vectors(self.model.visual, pixels_BCHW, blocks)
        return self._in_parts(run, pixels_BHWC, self._image_length, 4 * self._widths[1])

    def _encode_texts(self, tokens_BL: Tensor) -> Tensor:
        def run(part: Tensor) -> Tensor:
            length, blocks = needed_length(self.model, part), without_gradients(self._text_blocks)
            on_device = part[:, :length].to(self.device, non_blocking=True)
            if blocks is None and length == part.shape[1]:
                return self.model.encode_text(on_device, normalize=False)
            return encode_texts(self.model, on_device, blocks)
        length = needed_length(self.model, tokens_BL)
        return self._in_parts(run, tokens_BL, length, 4 * self._widths[0], _MOST_TEXTS)

    def _in_parts(self, run: Callable[[Tensor], Tensor], inputs: Tensor, length: int, width: int,
                  most: int | None = None) -> Tensor:
        """`run` over items of `length` positions, each at its widest `width` numbers; on a CPU `encode` runs parts."""
        import torch

        if not torch.is_inference_mode_enabled() or torch.device(self.device).type != "cpu":
            return run(inputs)
        parts = inputs.split(min(most or len(inputs), max(1, _MOST_BYTES // (4 * length * width))))
        return run(inputs) if len(parts) == 1 else torch.cat([run(part) for part in parts])


def without_gradients(blocks: Blocks | None) -> Blocks | None:
    """`blocks` while `encode` runs; None in training, which uses open_clip's modules."""
    import torch

    return blocks if torch.is_inference_mode_enabled() else None


def _image_vectors(visual: Any, pixels_BCHW: Tensor, blocks: Blocks) -> Tensor:
    """open_clip's VisionTransformer, its transformer run by `blocks`: [B, D]."""
    import torch

    hidden_BLW, read_at_B = visual._embeds(pixels_BCHW), None
    if visual.attn_pool is None and visual.pool_type == "tok":
        read_at_B = hidden_BLW.new_zeros(len(hidden_BLW), dtype=torch.long)
    pooled_BW = visual._pool(blocks(hidden_BLW, read_at_B=read_at_B))[0]
    return pooled_BW if visual.proj is None else projected(pooled_BW, visual.proj)


def _image_length(visual: Any) -> int:
    """Positions of one image in its tower; of towers other than open_clip's transformer an estimate."""
    positions = getattr(visual, "positional_embedding", None)
    return len(positions) if positions is not None else 256
