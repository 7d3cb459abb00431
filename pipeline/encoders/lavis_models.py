"""The models behind the encoder `lavis`: made by LAVIS's classes from an architecture file, loaded from a checkpoint.

LAVIS's own constructors ask a hub for vocabularies, configs and start weights, and unpickle what they get. Here the
same classes are put together from a file, and their tokenizer is replaced by one that pads what loader processes have
tokenised. Promises: nothing is fetched, a checkpoint fits name by name or is refused. The trade: a published
checkpoint's parts for training (momentum twins, queues, decoder, matching and language heads) are passed over.
"""

# Shapes: B items, L tokens.

from __future__ import annotations

import contextlib
import importlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.encoders.checkpoints import load_state, load_strictly
from pipeline.support.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

BLIP, ALBEF, BLIP2, CLIP = KINDS = (
    "blip_feature_extractor", "albef_feature_extractor", "blip2_feature_extractor", "clip_feature_extractor")

# what LAVIS adds to BERT's vocabulary: the last tokens of its BLIP checkpoints' embeddings
_MARKS: dict[str, dict[str, Any]] = {
    BLIP: {"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]}, BLIP2: {"bos_token": "[DEC]"}, ALBEF: {}}
_VISION = "visual_encoder."
_POSITIONS = f"{_VISION}pos_embed"
_TRAINING = ("text_decoder", "itm_head", "idx_queue")


def lavis(module: str) -> Any:
    """`lavis.<module>`; UserError where it cannot be imported, with the command that makes a place where it can."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old code says so once per import and per decorated function
            return importlib.import_module(f"lavis.{module}")
    except ImportError as error:
        raise UserError(f"salesforce-lavis cannot be imported by this Python: {error}", sys.executable,
                        "bash environment.sh lavis   makes .venv-lavis, whose Python the encoder's file names:\n"
                        "python: .venv-lavis/bin/python") from error


class BertTexts:
    """BERT's tokenizer in two halves: `tokens` in loader processes; called, as LAVIS calls a tokenizer, it pads."""

    def __init__(self, kind: str, vocabulary: Path, length: int):
        from transformers import BertTokenizer

        self.length = length
        self.tokenizer = BertTokenizer(vocab_file=str(vocabulary), do_lower_case=True)
        for mark, token in _MARKS[kind].items():
            self.tokenizer.add_special_tokens({mark: token})
        self.enc_token_id = self.tokenizer.convert_tokens_to_ids("[ENC]")  # BLIP's first token beside an image

    def __len__(self) -> int:
        return len(self.tokenizer)

    def tokens(self, text: str) -> np.ndarray:
        """int64 [L]: [CLS], the text's first tokens, [SEP]."""
        import numpy as np

        return np.asarray(self.tokenizer(text, truncation=True, max_length=self.length)["input_ids"])

    def __call__(self, lists: Sequence[np.ndarray], **_: Any) -> Any:
        """Token ids and mask, [B, longest]."""
        return self.tokenizer.pad({"input_ids": [each.tolist() for each in lists]}, return_tensors="pt")


class ClipTexts:
    """LAVIS's CLIP tokenizer. A text of more than 77 tokens loses its end token, as in LAVIS."""

    def __init__(self) -> None:
        self._tokenize = lavis("models.clip_models.tokenizer").tokenize

    def tokens(self, text: str) -> np.ndarray:
        """int64 [77]."""
        import numpy as np

        return np.asarray(self._tokenize(text)[0])

    def __call__(self, lists: Sequence[np.ndarray]) -> Tensor:
        """Token ids [B, 77]."""
        import numpy as np
        import torch

        return torch.from_numpy(np.stack(lists))


def new_texts(kind: str, architecture: Mapping[str, Any], vocabulary: Path | None, length: int | None) -> Any:
    """What tokenises for this kind; UserError if the vocabulary is not the architecture's."""
    if vocabulary is None:
        return ClipTexts()
    positions = architecture["text"]["max_position_embeddings"]
    if length is not None and not 2 <= length <= positions:
        raise UserError(f"text_length {length} is not between 2 and {positions}")
    texts = BertTexts(kind, vocabulary, length or positions)
    if len(texts) != architecture["text"]["vocab_size"]:
        marks = len(_MARKS[kind])
        raise UserError(f"the vocabulary has {len(texts) - marks} entries and {marks} marks, "
                        f"the architecture {architecture['text']['vocab_size']}", str(vocabulary),
                        "take the vocab.txt of bert-base-uncased (30,522 lines)")
    return texts


def new_extractor(kind: str, architecture: Mapping[str, Any], texts: Any, seed: int | None) -> Any:
    """LAVIS's extractor in eval mode, its weights random. On the CPU: a seed means the same everywhere."""
    import torch

    makes: dict[str, Callable[..., Any]] = {BLIP: _blip, ALBEF: _albef, BLIP2: _blip2, CLIP: _clip}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed or 0)
        try:
            model = makes[kind](architecture, texts)
        except (TypeError, KeyError) as error:
            raise UserError(f"LAVIS does not accept this architecture: {error}") from error
    model.tokenizer = texts
    return model.eval()


def _blip(architecture: Mapping[str, Any], texts: BertTexts) -> Any:
    extractor = lavis("models.blip_models.blip_feature_extractor").BlipFeatureExtractor
    vision, config = _vision_and_config(architecture)
    text = lavis("models.med").XBertEncoder(config, add_pooling_layer=False)
    return _with_tokenizer(extractor, texts)(vision, text, architecture["embed_dim"])


def _albef(architecture: Mapping[str, Any], texts: BertTexts) -> Any:
    import torch

    extractor = lavis("models.albef_models.albef_feature_extractor").AlbefFeatureExtractor
    vision, config = _vision_and_config(architecture)
    text = lavis("models.med").BertForMaskedLM(config)
    text.cls = torch.nn.Identity()  # predicts words
    return _with_tokenizer(extractor, texts)(vision, text, architecture["embed_dim"])


def _vision_and_config(architecture: Mapping[str, Any]) -> tuple[Any, Any]:
    from transformers import BertConfig

    vision = lavis("models.vit").VisionTransformerEncoder(**architecture["vision"])
    vision.vision_width = vision.embed_dim
    return vision, BertConfig(**{**architecture["text"], "encoder_width": vision.embed_dim})


def _with_tokenizer(extractor: Any, texts: Any, **others: Any) -> Any:
    """The class, its methods of these names returning what is given instead of fetching it."""
    given = {"init_tokenizer": texts, **others}
    return type(extractor.__name__, (extractor,), {name: _returning(value) for name, value in given.items()})


def _returning(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


def _blip2(architecture: Mapping[str, Any], texts: BertTexts) -> Any:
    import torch
    from transformers import BertConfig

    blip2 = lavis("models.blip2_models.blip2")
    vision = _blip2_vision(dict(architecture["vision"]))
    config: Any = BertConfig(**{**architecture["text"], "encoder_width": vision.num_features,
                                "add_cross_attention": True})
    qformer = lavis("models.blip2_models.Qformer").BertLMHeadModel(config)
    queries = torch.nn.Parameter(torch.randn(1, config.query_length, config.hidden_size) * config.initializer_range)
    extractor = lavis("models.blip2_models.blip2_qformer").Blip2Qformer
    made = _with_tokenizer(extractor, texts, init_vision_encoder=(vision, blip2.LayerNorm(vision.num_features)),
                           init_Qformer=(qformer, queries), maybe_autocast=contextlib.nullcontext())
    model = made(num_query_token=config.query_length, embed_dim=architecture["embed_dim"])
    model.Qformer.cls, model.itm_head = torch.nn.Identity(), torch.nn.Identity()  # predict words, and matches
    return model


def _blip2_vision(given: dict[str, Any]) -> Any:
    import torch

    if given.pop("kind") == "clip_vit":
        return lavis("models.clip_vit").VisionTransformer(**given, use_grad_checkpointing=False)
    eps = given.pop("layer_norm_eps")
    with torch.no_grad():  # LAVIS scales weights in place
        return lavis("models.eva_vit").VisionTransformer(
            **given, use_mean_pooling=False, norm_layer=lambda width: torch.nn.LayerNorm(width, eps=eps))


def _clip(architecture: Mapping[str, Any], _: ClipTexts) -> Any:
    return lavis("models.clip_models.model").CLIP(**architecture)


def load_weights(model: Any, path: Path, vision_path: Path | None) -> None:
    """Copy a checkpoint into the model; UserError naming the first name or shape in which the two differ.

    As LAVIS does, positions of images of another size are interpolated, and a separate file of an image tower may
    hold more than the tower.
    """
    wanted = model.state_dict()
    state = {name: tensor for name, tensor in wanted.items() if name.endswith("embeddings.position_ids")}  # 0, 1, ...
    if vision_path is not None:
        tower = {_VISION + name: tensor for name, tensor in load_state(vision_path).items()}
        state |= {name: tensor for name, tensor in tower.items() if name in wanted}
    state |= {name: tensor for name, tensor in load_state(path).items() if name in wanted or not _is_for_training(name)}
    if _POSITIONS in state and _is_of_another_size(state[_POSITIONS], wanted[_POSITIONS]):
        with contextlib.redirect_stdout(sys.stderr):  # LAVIS prints
            state[_POSITIONS] = lavis("models.vit").interpolate_pos_embed(state[_POSITIONS], model.visual_encoder)
    load_strictly(model, state, path)


def _is_for_training(name: str) -> bool:
    part = name.partition(".")[0]
    return (part.endswith(("_m", "_queue", "queue_ptr", "_ptr_queue")) or part in _TRAINING
            or name.startswith(("Qformer.cls.", "text_encoder.cls.")))


def _is_of_another_size(found: Tensor, wanted: Tensor) -> bool:
    """Both are [1, 1 + squares, width], of different numbers of squares."""
    side = round((found.shape[1] - 1) ** 0.5) if found.dim() == 3 else 0
    return (side > 0 and found.shape[1] == side ** 2 + 1 != wanted.shape[1]
            and found.shape[::2] == wanted.shape[::2])
