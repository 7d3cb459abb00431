"""Two CLIP towers made from an open_clip model config, and the encoder that runs them.

A text is encode_text, an image is encode_image, both together are the plain sum of the two: nothing is
normalised. Only the towers an item needs are run. Texts are cut behind the last end marker of their batch
where the tower is causal and reads its result at that marker, so that what follows cannot matter; elsewhere
they keep their full length.

Precision: fp32 is exact (no TF32); bf16 and fp16 are autocast over fp32 weights, as these models were trained
and as UniIR evaluates. The trade: weights stay fp32 in memory, so that norms and the text tower's sums lose
no digits.
"""

# Shapes: B items, L tokens, W width of the text tower, D dimensions of a vector.

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from pipeline.encoders import Item
from pipeline.encoders.checkpoints import find_file
from pipeline.support.errors import UserError, nearest

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

PRECISIONS = ("fp32", "bf16", "fp16")


class Prepared(NamedTuple):
    """One item, ready for the towers: tokens int64 [context length], pixels float32 [3, height, width]."""

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


def new_tokenizer(architecture: Mapping[str, Any]) -> Any:
    """The architecture's tokenizer: a list of texts in, int64 [texts, context length] out."""
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    config = architecture["text_cfg"]
    options = {"context_length": config.get("context_length", 77), **(config.get("tokenizer_kwargs") or {})}
    name, mode = config.get("hf_tokenizer_name"), config.get("tokenizer_mode")
    if name:
        try:
            return HFTokenizer(name, tokenizer_mode=mode, **options)
        except OSError as error:
            raise UserError(f"tokenizer '{name}' cannot be fetched", str(error),
                            "run once with network access") from error
    tokenizer = SimpleTokenizer(**options)
    if config.get("vocab_size", tokenizer.vocab_size) < tokenizer.vocab_size:
        _cut_vocabulary(tokenizer, config["vocab_size"])
    return tokenizer


def _cut_vocabulary(tokenizer: Any, size: int) -> None:
    """CLIP's own vocabulary, only smaller: 512 byte tokens, the first merges, the start and the end marker.

    Byte pair merges apply in order, so the first ones alone are a complete tokenizer; rarer words take more
    tokens. The end marker stays the largest number, which is where CLIP reads its result.
    """
    merges = size - 512 - 2
    if merges < 0:
        raise UserError(f"vocab_size {size} cannot hold CLIP's byte tokens", None, "vocab_size: 514 or more")
    words = list(tokenizer.encoder)  # in the order of their numbers
    tokenizer.encoder = {word: number for number, word in enumerate(words[:512 + merges] + words[-2:])}
    tokenizer.decoder = {number: word for word, number in tokenizer.encoder.items()}
    tokenizer.bpe_ranks = {pair: rank for pair, rank in tokenizer.bpe_ranks.items() if rank < merges}
    tokenizer.all_special_ids = [size - 2, size - 1]
    tokenizer.sot_token_id, tokenizer.eot_token_id = tokenizer.all_special_ids
    tokenizer.vocab_size = size


class ClipEncoder:
    """Texts, images, and both (their un-normalised sum) as float32 vectors of one space."""

    modalities = frozenset({"text", "image", "image,text"})

    def __init__(self, architecture: Mapping[str, Any], model: Any, device: str, precision: str,
                 preprocess: Mapping[str, Any] | None = None):
        """`preprocess`: what differs from open_clip's default image transform (mean, std, ...)."""
        from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict

        if precision not in PRECISIONS:
            raise UserError(f"precision '{precision}' is not known", None, f"one of: {', '.join(PRECISIONS)}")
        self.dimension: int = architecture["embed_dim"]
        self.device, self.precision = device, precision
        self.model = model.to(device).eval()
        self.tokenizer = new_tokenizer(architecture)
        sized = {**(preprocess or {}), "size": model.visual.image_size}
        self.transform = image_transform_v2(PreprocessCfg(**merge_preprocess_dict({}, sized)), is_train=False)

    def prepare(self, item: Item) -> Prepared:
        """Tokenise and transform. A text of "" beside an image is no text, as in UniIR.

        With no image either, the empty text is encoded (UniIR: zeros), since a zero vector has no direction.
        """
        has_text = bool(item.text) or item.image is None
        tokens = self.tokenizer([item.text or ""])[0].numpy() if has_text else None
        return Prepared(tokens, None if item.image is None else self.transform(item.image).numpy())

    def encode(self, batch: Sequence[Prepared]) -> np.ndarray:
        """float32 [B, D], not normalised, one row per prepared item in order."""
        import torch

        with torch.inference_mode():
            return self.embed(batch).cpu().numpy()

    def embed(self, batch: Sequence[Prepared]) -> Tensor:
        """float32 [B, D] on the device, with gradients where the caller's mode allows them (for training)."""
        import numpy as np
        import torch

        vectors_BD = torch.zeros(len(batch), self.dimension, device=self.device)
        with self._arithmetic():
            for field, tower in enumerate((self._encode_texts, self._encode_images)):
                rows = [row for row, prepared in enumerate(batch) if prepared[field] is not None]
                if rows:
                    inputs = torch.from_numpy(np.stack([cast("np.ndarray", batch[row][field]) for row in rows]))
                    outputs = tower(inputs).float()
                    vectors_BD = vectors_BD.index_add(0, torch.tensor(rows, device=self.device), outputs)
        return vectors_BD

    def _arithmetic(self) -> AbstractContextManager[Any]:
        import torch

        kind = torch.device(self.device).type
        if self.precision != "fp32":
            return torch.autocast(kind, dtype=torch.bfloat16 if self.precision == "bf16" else torch.float16)
        if kind == "cuda":  # cuDNN would run the patch convolution in TF32, three digits short of fp32
            return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        return nullcontext()

    def _encode_images(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels.to(self.device, non_blocking=True), normalize=False)

    def _encode_texts(self, tokens_BL: Tensor) -> Tensor:
        length = needed_length(self.model, tokens_BL)
        is_short = length < tokens_BL.shape[1]
        tokens_BL = tokens_BL[:, :length].to(self.device, non_blocking=True)
        if is_short:
            return _encode_short_texts(self.model, tokens_BL)
        return self.model.encode_text(tokens_BL, normalize=False)


def needed_length(model: Any, tokens_BL: Tensor) -> int:
    """How many leading tokens of the batch decide its vectors: all, unless what follows provably cannot.

    It cannot in a causal tower that is read at the end marker (the first largest number, or `eos_id`).
    """
    tower, pool, end_of_text = _text_tower(model)
    is_causal = getattr(tower, "attn_mask", None) is not None and getattr(tower, "cls_emb", None) is None
    if not is_causal or pool not in ("argmax", "eos"):
        return tokens_BL.shape[1]
    marked_BL = tokens_BL if pool == "argmax" else tokens_BL.eq(end_of_text or 0).int()
    return int(marked_BL.argmax(dim=-1).max()) + 1


def _text_tower(model: Any) -> tuple[Any, str | None, int | None]:
    """The module that holds the text tower, how its result is read, and the end marker it may be read at."""
    if hasattr(model, "text"):
        return model.text, getattr(model.text, "pool_type", None), getattr(model.text, "eos_id", None)
    return model, model.text_pool_type, model.text_eos_id


def text_positions(model: Any, tokens_BL: Tensor) -> Tensor:
    """The text tower's state at every position, after its last norm: [B, L, W]. Causal towers only, any L it holds."""
    tower, length = _text_tower(model)[0], tokens_BL.shape[1]
    hidden_BLW = tower.token_embedding(tokens_BL) + tower.positional_embedding[:length]
    return tower.ln_final(tower.transformer(hidden_BLW, attn_mask=tower.attn_mask[:length, :length]))


def _encode_short_texts(model: Any, tokens_BL: Tensor) -> Tensor:
    """open_clip's encode_text for fewer tokens than its causal mask, which that method insists on."""
    from open_clip.transformer import text_global_pool

    tower, pool, end_of_text = _text_tower(model)
    ends_BW = text_global_pool(text_positions(model, tokens_BL), tokens_BL, pool, end_of_text)
    projection = tower.text_projection
    if projection is None:
        return ends_BW
    return projection(ends_BW) if callable(projection) else ends_BW @ projection
