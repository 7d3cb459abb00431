"""The encoder `lavis` against LAVIS's own calls on the same weights. Runs in .venv-lavis: bash run_tests.sh --lavis"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pipeline.encoders import Item, lavis, lavis_models
from pipeline.encoders.lavis import Params
from pipeline.support.errors import UserError
from tests.lavis import tiny

pytestmark = pytest.mark.skipif(find_spec("lavis") is None,
                                reason="needs salesforce-lavis: bash run_tests.sh --lavis runs this in .venv-lavis")
KINDS = {"blip": lavis_models.BLIP, "albef": lavis_models.ALBEF, "blip2": lavis_models.BLIP2,
         "blip2_clip": lavis_models.BLIP2}
NAMES = tuple(KINDS)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def classes(module: str) -> Any:
    return import_module(f"lavis.{module}")


def reference_model(name: str, architecture: dict[str, Any], vocabulary: Path,
                    monkeypatch: pytest.MonkeyPatch) -> Any:
    """LAVIS's model by its own constructors and tokenizer, with what it would fetch put in its way."""
    from transformers import BertConfig, BertTokenizer

    by_name = BertTokenizer(str(vocabulary))
    monkeypatch.setattr(BertTokenizer, "from_pretrained", lambda *_, **__: by_name)
    vision, text = dict(architecture["vision"]), dict(architecture["text"])
    if name in ("blip", "albef"):
        tower = classes("models.vit").VisionTransformerEncoder(**vision)
        tower.vision_width = vision["embed_dim"]
        config = BertConfig(**{**text, "encoder_width": 48})
        if name == "blip":
            made = classes("models.blip_models.blip_feature_extractor").BlipFeatureExtractor
            return made(tower, classes("models.med").XBertEncoder(config, add_pooling_layer=False), 24).eval()
        made = classes("models.albef_models.albef_feature_extractor").AlbefFeatureExtractor
        return made(tower, classes("models.med").BertForMaskedLM(config), 24).eval()
    kind = vision.pop("kind")
    if kind == "eva_vit":
        from functools import partial
        norm = partial(torch.nn.LayerNorm, eps=vision.pop("layer_norm_eps"))
        with torch.no_grad():
            tower = classes("models.eva_vit").VisionTransformer(**vision, use_mean_pooling=False, norm_layer=norm)
    else:
        tower = classes("models.clip_vit").VisionTransformer(**vision, use_grad_checkpointing=False)
    blip2 = classes("models.blip2_models.blip2")
    qformer = classes("models.blip2_models.Qformer")
    words = text["vocab_size"] - 1  # [DEC] is added by the constructor, as to BERT's own weights
    config = BertConfig(**{**text, "vocab_size": words})
    monkeypatch.setattr(qformer.BertConfig, "from_pretrained", lambda *_, **__: config)
    monkeypatch.setattr(qformer.BertLMHeadModel, "from_pretrained",
                        lambda *_, config, **__: qformer.BertLMHeadModel(config))
    base = blip2.Blip2Base
    monkeypatch.setattr(base, "init_vision_encoder", lambda *_: (tower, blip2.LayerNorm(tower.num_features)))
    return classes("models.blip2_models.blip2_qformer").Blip2Qformer(num_query_token=5, embed_dim=24).eval()


class Case:
    """A tiny checkpoint of one kind, LAVIS's model and our encoder with its weights."""

    def __init__(self, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.name, self.folder = name, folder
        self.architecture = tiny.write_architecture(folder, name)
        with contextlib.redirect_stderr(None):
            self.model = reference_model(name, json.loads(Path(self.architecture).read_text()),
                                         folder / "vocab.txt", monkeypatch)
        self.model.load_state_dict(tiny.perturbed(self.model.state_dict()))
        self.state = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}  # tied ones are equal
        torch.save({"model": {**self.state, **training_parts(self.state)}, "epoch": 3}, folder / "published.pth")

    def params(self, **changes: Any) -> Params:
        given: dict[str, Any] = {"kind": KINDS[self.name], "architecture": self.architecture,
                                 "weights": str(self.folder / "published.pth"), "tokenizer": str(self.folder)}
        return Params(**{**given, **changes})

    def build(self, **changes: Any) -> Any:
        return lavis.build(self.params(**changes), "cpu", "fp32")

    def expected(self, item: Item, joined: str = "sum") -> np.ndarray:
        """LAVIS's own processors, tokenizer and extract_features for one item."""
        processors = classes("processors.blip_processors")
        caption = [processors.BlipCaptionProcessor()(item.text or "")]
        image = None if item.image is None else processors.BlipImageEvalProcessor(32)(item.image)[None]
        samples = {"image": image, "text_input": caption}
        if joined == "multimodal":
            return self.model.extract_features(samples).multimodal_embeds[0, 0].numpy()
        total = torch.zeros(24)
        if item.text or image is None:
            total = total + self.model.extract_features(samples, mode="text").text_embeds_proj[0, 0]
        if image is not None:
            tokens = self.model.extract_features(samples, mode="image").image_embeds_proj[0]
            mean = tokens.mean(0)
            total = total + (mean / mean.norm() if self.name.startswith("blip2") else tokens[0])
        return total.numpy()


def training_parts(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What published checkpoints hold beside: momentum twins, queues, heads, BLIP's decoder."""
    twins = {".".join([part + "_m", *rest]): tensor for name, tensor in state.items()
             for part, *rest in [name.split(".")] if rest}
    others = ("image_queue", "text_queue", "queue_ptr", "idx_queue", "new_ptr_queue", "text_decoder.bert.x.weight",
              "itm_head.weight")
    return {**twins, **{name: torch.ones(2, 2) for name in others if name not in state}}


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    return Case(request.param, tmp_path, monkeypatch)


def case_of(name: str) -> Callable[..., Any]:
    return pytest.mark.parametrize("case", [name], indirect=True)


def encode(encoder: Any, items: list[Item]) -> np.ndarray:
    return encoder.encode([encoder.prepare(item) for item in items])


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max())


def test_vectors_are_what_lavis_extracts(case: Case) -> None:
    encoder = case.build()
    expected = np.stack([case.expected(item) for item in tiny.items()])
    alone = np.concatenate([encode(encoder, [item]) for item in tiny.items()])
    together = encode(encoder, tiny.items())
    assert together.dtype == np.float32 and together.shape == (len(tiny.items()), encoder.dimension) == expected.shape
    assert np.linalg.norm(expected, axis=1).min() > 0.5
    np.testing.assert_allclose(alone, expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(together, expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(encode(encoder, tiny.items()[::-1])[::-1], expected, rtol=0, atol=1e-6)
    singles = [number for number, item in enumerate(tiny.items()) if item.text != ""]
    distances = np.abs(expected[singles, None] - expected[None, singles]).max(-1)
    assert distances[~np.eye(len(singles), dtype=bool)].min() > 1e-3  # no two of them could be mixed up unseen


def test_both_together_is_the_first_multimodal_token(case: Case) -> None:
    encoder = case.build(joined="multimodal")
    both = [item for item in tiny.items() if item.text and item.image]
    expected = np.stack([case.expected(item, "multimodal") for item in both])
    assert encoder.modalities == {"image,text"} and encoder.dimension == expected.shape[1] == 32
    alone = np.concatenate([encode(encoder, [item]) for item in both])
    np.testing.assert_allclose(alone, expected, rtol=0, atol=1e-6)
    largest = np.abs(expected).max()  # about 3, and a batch is added up in another order than one item
    np.testing.assert_allclose(encode(encoder, both), expected, rtol=0, atol=1e-5 * largest)
    assert np.isfinite(encode(encoder, [Item("a dog", None), Item(None, tiny.images()[0]), Item(None, None)])).all()


@case_of("blip")
def test_beside_an_image_blip_reads_its_own_first_token(case: Case) -> None:
    encoder = case.build(joined="multimodal")
    item = Item("a red circle", tiny.images()[0])
    encoder.model.tokenizer.enc_token_id = 2  # [CLS], as for a text alone
    assert np.abs(encode(encoder, [item])[0] - case.expected(item, "multimodal")).max() > 1e-3


def test_one_tower_is_run_for_one_modality(case: Case) -> None:
    encoder = case.build()
    text = encoder.model.Qformer.bert.embeddings.word_embeddings if case.name.startswith("blip2") else \
        encoder.model.text_encoder
    called: list[str] = []
    encoder.model.visual_encoder.register_forward_hook(lambda *_: called.append("image"))
    encode(encoder, [Item("a dog", None)])
    assert called == []
    text.register_forward_hook(lambda *_: called.append("text"))
    encode(encoder, [Item("", tiny.images()[0])])
    assert "text" not in called


def test_empty_items_are_the_empty_text(case: Case) -> None:
    vectors = encode(case.build(), [Item(None, None), Item("", None)])
    assert np.array_equal(vectors[0], vectors[1]) and np.linalg.norm(vectors[0]) == pytest.approx(1)


def test_long_texts_are_cut(case: Case) -> None:
    encoder = case.build(text_processor="none")
    assert distance(*encode(encoder, [Item("dog " * 500, None), Item("dog " * 38, None)])) < 1e-6  # [CLS], [SEP]
    texts = [Item("a red dog and a cat", None), Item("a red dog", None)]
    assert distance(*encode(case.build(text_length=5), texts)) < 1e-6 < 1e-3 < distance(*encode(encoder, texts))
    with pytest.raises(UserError, match="text_length 41 is not between 2 and 40"):
        case.build(text_length=41)


@case_of("blip")
def test_captions_are_processed_only_as_asked(case: Case) -> None:
    texts = [Item("A #red: dog!", None), Item("a red dog", None)]
    assert distance(*encode(case.build(), texts)) < 1e-6
    assert distance(*encode(case.build(text_processor="none"), texts)) > 1e-3
    texts = [Item("a red dog", None), Item("a red cat", None)]
    assert distance(*encode(case.build(max_words=2), texts)) < 1e-6 < 1e-3 < distance(*encode(case.build(), texts))


@pytest.mark.parametrize("change, message", [
    ({"vision_proj.weight": None}, "'vision_proj.weight' is missing"),
    ({"visual_encoder.pos_embed": torch.ones(1, 17, 50)}, r"'visual_encoder.pos_embed' has shape \(1, 17, 50\)"),
    ({"t5_layers.q": torch.ones(2)}, "'t5_layers.q' is not part"),
])
@case_of("blip")
def test_a_checkpoint_of_another_model_is_named(case: Case, change: dict[str, Any], message: str) -> None:
    changed = {name: tensor for name, tensor in {**case.state, **change}.items() if tensor is not None}
    torch.save({"model": changed}, case.folder / "other.pth")
    with pytest.raises(UserError, match=message):
        case.build(weights=str(case.folder / "other.pth"))


@pytest.mark.parametrize("case", ["blip", "albef"], indirect=True)
def test_positions_of_another_image_size_are_interpolated_as_lavis_does(case: Case) -> None:
    larger = {**case.state, "visual_encoder.pos_embed": torch.randn(1, 1 + 6 * 6, 48)}
    torch.save({"model": larger}, case.folder / "larger.pth")
    if case.name == "albef":
        case.model.load_from_pretrained(str(case.folder / "larger.pth"), rename_text_keys=False)
    else:
        case.model.load_from_pretrained(str(case.folder / "larger.pth"))
    encoder, item = case.build(weights=str(case.folder / "larger.pth")), Item(None, tiny.images()[0])
    np.testing.assert_allclose(encode(encoder, [item])[0], case.expected(item), rtol=0, atol=1e-6)


@case_of("blip2")
def test_blip2_whose_image_tower_is_a_file_of_its_own(case: Case) -> None:
    prefix = "visual_encoder."
    tower = {name.removeprefix(prefix): tensor for name, tensor in case.state.items() if name.startswith(prefix)}
    torch.save({**tower, "head.weight": torch.ones(2, 2)}, case.folder / "tower.pth")
    rest = {name: tensor for name, tensor in case.state.items() if not name.startswith(prefix)}
    torch.save({"model": rest}, case.folder / "rest.pth")
    files = {"weights": str(case.folder / "rest.pth"), "vision_weights": str(case.folder / "tower.pth")}
    assert np.array_equal(encode(case.build(), tiny.items()), encode(case.build(**files), tiny.items()))
    with pytest.raises(UserError, match="'visual_encoder.cls_token' is missing"):
        case.build(weights=files["weights"])


def test_seeds_draw_weights(case: Case) -> None:
    vectors = [encode(case.build(weights=None, seed=seed), tiny.items()) for seed in (1, 1, 2)]
    assert np.array_equal(vectors[0], vectors[1]) and not np.allclose(vectors[0], vectors[2], atol=1e-2)


def test_a_vocabulary_of_another_model_is_named(case: Case) -> None:
    path = case.folder / "vocab.txt"
    path.write_text(path.read_text() + "more\n")
    with pytest.raises(UserError, match="the vocabulary has .* entries"):
        case.build()


def test_half_precision_is_close(case: Case) -> None:
    exact = encode(case.build(), tiny.items())
    half = encode(lavis.build(case.params(), "cpu", "bf16"), tiny.items())
    assert half.dtype == np.float32
    assert 1e-6 < np.abs(half - exact).max() < 0.2


@case_of("blip")
def test_identity_is_that_of_the_main_environment(case: Case) -> None:
    assert lavis.identity(case.params())["kind"] == KINDS["blip"]
    assert lavis.identity(case.params(weights=None, seed=1)) == {
        **{key: value for key, value in lavis.identity(case.params()).items() if key != "weights"},
        "seed": 1, "lavis": "1.0.2"}


CLIP = {"embed_dim": 24, "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}}


def test_clip_is_open_clip_of_the_same_weights(tmp_path: Path) -> None:
    from pipeline.encoders import uniir_clip

    (tmp_path / "clip.json").write_text(json.dumps(CLIP))
    state = tiny.perturbed(classes("models.clip_models.model").CLIP(**CLIP).state_dict())
    save_file(state, tmp_path / "clip.safetensors")
    encoder = lavis.build(Params(lavis_models.CLIP, str(tmp_path / "clip.json"), str(tmp_path / "clip.safetensors")),
                          "cpu", "fp32")
    other = uniir_clip.build(uniir_clip.Params(str(tmp_path / "clip.json"), str(tmp_path / "clip.safetensors")),
                             "cpu", "fp32")
    singles = [item for item in tiny.items() if not (item.text and item.image)]
    expected = encode(other, singles)
    np.testing.assert_allclose(encode(encoder, singles), expected / np.linalg.norm(expected, axis=1, keepdims=True),
                               rtol=0, atol=1e-6)
    both = Item("a red circle", tiny.images()[0])
    text, image, summed = encode(encoder, [Item(both.text, None), Item(None, both.image), both])
    np.testing.assert_allclose(summed, text + image, rtol=0, atol=1e-6)


def test_blip_base_is_lavis_own_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from omegaconf import OmegaConf
    from transformers import BertTokenizer

    words = tiny.vocabulary(tmp_path).read_text().split()
    (tmp_path / "vocab.txt").write_text("\n".join([*words, *(f"more{n}" for n in range(30522 - len(words)))]) + "\n")
    by_name = BertTokenizer(str(tmp_path / "vocab.txt"))
    monkeypatch.setattr(BertTokenizer, "from_pretrained", lambda *_, **__: by_name)
    made = classes("models.blip_models.blip_feature_extractor").BlipFeatureExtractor
    path = Path(classes("common.utils").get_abs_path("configs/models/blip_feature_extractor_base.yaml"))
    config: Any = OmegaConf.load(path)
    config.model.pretrained = None
    model = made.from_config(config.model).eval()
    params = Params(lavis_models.BLIP, "encoders/architectures/lavis_blip_base.json", seed=0, tokenizer=str(tmp_path))
    encoder = lavis.build(params, "cpu", "fp32")
    assert sum(tensor.numel() for tensor in model.parameters()) == 223_450_881
    assert distance(encode(encoder, [Item("a dog", None)]), np.zeros(256)) > 0.05
    encoder.model.load_state_dict(model.state_dict())
    caption = classes("processors.blip_processors").BlipCaptionProcessor()("a red circle")
    pixels = classes("processors.blip_processors").BlipImageEvalProcessor(224)(tiny.images()[0])[None]
    samples = {"image": pixels, "text_input": [caption]}
    expected = np.stack([model.extract_features(samples, mode="text").text_embeds_proj[0, 0],
                         model.extract_features(samples, mode="image").image_embeds_proj[0, 0]])
    found = encode(encoder, [Item("a red circle", None), Item(None, tiny.images()[0])])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_the_other_architectures_are_lavis_own(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(__file__).parents[2] / "configs" / "encoders" / "architectures"
    files = {path.stem: json.loads(path.read_text()) for path in folder.glob("lavis_*.json")}
    albef = json.loads(Path(classes("common.utils").get_abs_path("configs/models/med_config_albef.json")).read_text())
    assert {key: albef[key] for key in files["lavis_albef_base"]["text"]} == files["lavis_albef_base"]["text"]
    for name, module, make in (("lavis_blip2_vitg", "models.eva_vit", "create_eva_vit_g"),
                               ("lavis_blip2_vitl", "models.clip_vit", "create_clip_vit_L")):
        given = constructor_arguments(module, make, monkeypatch)
        vision = {**files[name]["vision"]}
        del vision["kind"]
        eps = vision.pop("layer_norm_eps", None)
        assert vision == {key: given[key] for key in vision}
        assert eps is None or given["norm_layer"](4).eps == eps


def constructor_arguments(module: str, make: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What LAVIS's own function builds its tower with, before it would fetch weights."""
    class Seen(Exception):
        pass

    def record(**given: Any) -> None:
        raise Seen(given)

    monkeypatch.setattr(classes(module), "VisionTransformer", record)
    with pytest.raises(Seen) as seen:
        getattr(classes(module), make)(224, precision="fp32")
    return dict(seen.value.args[0])
