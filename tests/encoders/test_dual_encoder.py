"""Dual encoders of transformers: their towers, the sum, texts cut and padded, what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (AutoTokenizer, BlipForImageTextRetrieval, CLIPConfig, CLIPModel, CLIPTextModelWithProjection,
                          CLIPVisionModelWithProjection, ChineseCLIPModel, SiglipTextModel, SiglipVisionModel)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.chinese_clip.image_processing_pil_chinese_clip import ChineseCLIPImageProcessorPil
from transformers.models.clip.image_processing_clip import CLIPImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from pipeline.config import load
from pipeline.encoders import Item, dual_encoder
from pipeline.encoders.dual_encoder import Params
from pipeline.pieces import load_encoder_choice
from pipeline.plan import make_plan
from pipeline.run import run_experiment
from pipeline.support.errors import UserError
from tests.encoders import tiny_models
from tests.encoders.tiny_models import bring_code, cut_weights_short, encoded, picture, with_biases, write_weights

TEXTS = ("a red circle", "the blue square above a star, at night", "x")
FAMILIES = ("clip", "siglip", "chinese_clip", "blip_retrieval")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dual")
    for family in FAMILIES:
        getattr(tiny_models, family)(folder / family)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def encoder_of(directory: Path, precision: str = "fp32", **options: Any) -> Any:
    return dual_encoder.build(Params(str(directory), **options), "cpu", precision)


def mixed_items() -> list[Item]:
    pictures = [None, picture(1), picture(2, 33, 64)]
    return [Item(text, image) for text in (None, *TEXTS) for image in pictures if text or image]


def pixels(kind: Any, directory: Path, image: Any) -> torch.Tensor:
    return torch.as_tensor(loaded(kind, directory)(image, return_tensors="pt")["pixel_values"])


@lru_cache
def loaded(kind: Any, directory: Path) -> Any:
    return kind.from_pretrained(directory)


def clip_text(directory: Path, text: str) -> torch.Tensor:
    tokens = loaded(AutoTokenizer, directory)(text, return_tensors="pt", truncation=True)
    return loaded(CLIPTextModelWithProjection, directory)(**tokens).text_embeds


def clip_image(directory: Path, image: Any) -> torch.Tensor:
    found = loaded(CLIPVisionModelWithProjection, directory)
    return found(pixels(CLIPImageProcessorPil, directory, image)).image_embeds


def siglip_text(directory: Path, text: str) -> torch.Tensor:
    tokens = loaded(AutoTokenizer, directory)(text.lower(), return_tensors="pt", truncation=True,
                                              padding="max_length", max_length=16)
    return loaded(SiglipTextModel, directory)(tokens["input_ids"]).pooler_output


def siglip_image(directory: Path, image: Any) -> torch.Tensor:
    found = loaded(SiglipVisionModel, directory)
    return found(pixels(SiglipImageProcessorPil, directory, image)).pooler_output


def chinese_text(directory: Path, text: str) -> torch.Tensor:
    model = loaded(ChineseCLIPModel, directory)
    tokens = loaded(AutoTokenizer, directory)(text, return_tensors="pt", truncation=True, max_length=52)
    return model.text_model(**tokens).last_hidden_state[:, 0] @ model.text_projection.weight.T


def chinese_image(directory: Path, image: Any) -> torch.Tensor:
    model = loaded(ChineseCLIPModel, directory)
    states = model.vision_model(pixels(ChineseCLIPImageProcessorPil, directory, image)).last_hidden_state
    return model.vision_model.post_layernorm(states[:, 0]) @ model.visual_projection.weight.T


def blip_text(directory: Path, text: str) -> torch.Tensor:
    model = loaded(BlipForImageTextRetrieval, directory)
    tokens = loaded(AutoTokenizer, directory)(text, return_tensors="pt", truncation=True, max_length=40)
    inputs = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    return model.text_proj(model.text_encoder(**inputs).last_hidden_state[:, 0])


def blip_image(directory: Path, image: Any) -> torch.Tensor:
    model = loaded(BlipForImageTextRetrieval, directory)
    return model.vision_proj(model.vision_model(pixels(BlipImageProcessorPil, directory, image))[0][:, 0])


ORACLES: dict[str, tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]] = {
    "clip": (clip_text, clip_image), "siglip": (siglip_text, siglip_image),
    "chinese_clip": (chinese_text, chinese_image), "blip_retrieval": (blip_text, blip_image)}


def expected(directory: Path, items: list[Item], is_normalised: bool = False) -> np.ndarray:
    """One item at a time, by the towers' own classes."""
    text_oracle, image_oracle = ORACLES[directory.name]
    rows = []
    with torch.no_grad():
        for item in items:
            parts = [text_oracle(directory, item.text)] if item.text else []
            parts += [image_oracle(directory, item.image)] if item.image is not None else []
            parts = [torch.nn.functional.normalize(part) for part in parts] if is_normalised else parts
            rows.append(torch.stack(parts).sum(dim=0))
    return torch.cat(rows).numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_are_those_of_the_towers_own_classes(folder: Path, family: str) -> None:
    items = mixed_items()
    wanted = expected(folder / family, items)
    tolerance = 1e-6 * np.abs(wanted).max()
    encoder = encoder_of(folder / family)
    assert np.abs(wanted).max() > 1 and np.abs(encoded(encoder, items) - wanted).max() <= tolerance
    alone = np.concatenate([encoded(encoder, [item]) for item in items])
    backwards = encoded(encoder, items[::-1])[::-1]
    assert max(np.abs(alone - wanted).max(), np.abs(backwards - wanted).max()) <= tolerance


@pytest.mark.parametrize("family", FAMILIES)
def test_normalised_before_the_sum_is_another_model(folder: Path, family: str) -> None:
    items = [item for item in mixed_items() if item.text and item.image]
    wanted = expected(folder / family, items, is_normalised=True)
    found = encoded(encoder_of(folder / family, fusion="normalised_sum"), items)
    assert np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted).max()
    plain = encoded(encoder_of(folder / family), items)
    directions = [vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in (plain, wanted)]
    assert np.abs(directions[0] - directions[1]).max(axis=1).min() > 1e-3


def test_other_ways_of_resizing_padding_and_pooling_would_be_noticed(folder: Path) -> None:
    clip, siglip = folder / "clip", folder / "siglip"
    noise = np.random.RandomState(0).randint(0, 256, (90, 110, 3)).astype(np.uint8)
    item = Item(None, Image.fromarray(noise))
    right = encoded(encoder_of(clip), [item])
    with torch.no_grad():
        vision = CLIPVisionModelWithProjection.from_pretrained(clip)
        other = vision(pixels(CLIPImageProcessor, clip, item.image)).image_embeds.numpy()
        tokens = AutoTokenizer.from_pretrained(siglip)("x", return_tensors="pt")
        unpadded = SiglipTextModel.from_pretrained(siglip)(tokens["input_ids"]).pooler_output.numpy()
        tokens = AutoTokenizer.from_pretrained(clip)(["x", TEXTS[0]], padding=True, return_tensors="pt")
        text_tower = CLIPTextModelWithProjection.from_pretrained(clip)
        last = (text_tower(**tokens).last_hidden_state[:1, -1] @ text_tower.text_projection.weight.T).numpy()
    assert np.abs(other - right).max() > 1e-4  # torchvision's resize instead of PIL's
    assert np.abs(unpadded - encoded(encoder_of(siglip), [Item("x", None)])).max() > 1e-2
    assert np.abs(last - encoded(encoder_of(clip), [Item("x", None)])).max() > 1e-2


def test_the_end_of_text_is_found_by_its_number_or_as_the_highest(tmp_path: Path) -> None:
    tokenizer = tiny_models.clip_tokenizer()
    by_number, highest = tmp_path / "number", tmp_path / "highest"
    tiny_models.clip(by_number, eos_token_id=tokenizer.eos_token_id)
    tiny_models.clip(highest, eos_token_id=2)
    items = [Item(text, None) for text in TEXTS]
    first, second = (encoded(encoder_of(path), items) for path in (by_number, highest))
    assert np.abs(first - second).max() < 1e-5 and np.abs(first[0] - first[1]).max() > 0.1


def test_siglip_reads_lower_case_unless_its_tokenizer_says_otherwise(folder: Path, tmp_path: Path) -> None:
    """This tokenizer tells cases apart, as Gemma's does, which SigLIP 2 is published with."""
    texts = [Item("A Red Circle", None), Item("a red circle", None)]
    found = encoded(encoder_of(folder / "siglip"), texts)
    shutil.copytree(folder / "siglip", tmp_path / "siglip")
    path = tmp_path / "siglip/tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "do_lower_case": False}))
    cased = encoded(encoder_of(tmp_path / "siglip"), texts)
    assert np.abs(found[0] - found[1]).max() < 1e-5 and np.abs(cased[0] - cased[1]).max() > 1e-2


def test_no_text_beside_an_image_and_nothing_at_all(folder: Path) -> None:
    encoder = encoder_of(folder / "clip")
    image = picture(3)
    found = encoded(encoder, [Item("", image), Item(None, image), Item("", None), Item(None, None)])
    assert np.abs(found[[0, 2]] - found[[1, 3]]).max() < 1e-6 * np.abs(found).max()
    assert np.abs(found[2] - expected_empty(folder / "clip")).max() <= 1e-6 * np.abs(found[2]).max()
    assert encoder.encode([]).shape == (0, encoder.dimension)


def expected_empty(directory: Path) -> np.ndarray:
    with torch.no_grad():
        return clip_text(directory, "").numpy()


@pytest.mark.parametrize("text", ["\u00fc \U0001f600 \u56fe\u7247 \u0627\u0644\u0639", "\ud800 lone", "\x00\n\t",
                                  " " * 9, "<|endoftext|> in between <|startoftext|>", "[CLS] [SEP] </s>"])
@pytest.mark.parametrize("family", FAMILIES)
def test_strange_texts_have_vectors(folder: Path, family: str, text: str) -> None:
    encoder = encoder_of(folder / family)
    found = encoded(encoder, [Item(text, None), Item(text, picture(1)), Item("a", None)])
    assert np.isfinite(found).all() and np.abs(found).max(axis=1).min() > 0


@pytest.mark.parametrize("family, length", [("clip", 20), ("siglip", 16), ("chinese_clip", 52),
                                            ("blip_retrieval", 40)])
def test_long_texts_are_cut_as_their_authors_do(folder: Path, family: str, length: int) -> None:
    encoder = encoder_of(folder / family)
    text = " ".join("abcdefgh" * 20)
    tokens = encoder.prepare(Item(text, None)).tokens
    whole = AutoTokenizer.from_pretrained(folder / family)(text)["input_ids"]
    assert len(tokens) == length < len(whole)
    assert tokens[-1] == whole[-1] and list(tokens[:-1]) == whole[:length - 1]  # the end of a text stays
    items = [Item(text, None), Item(text + " and more", None)]
    found = encoded(encoder, items)
    assert np.abs(found[0] - found[1]).max() < 1e-5
    assert np.abs(found[:1] - expected(folder / family, items[:1])).max() <= 1e-6 * np.abs(found).max()


def test_texts_beside_an_image_have_a_limit_of_their_own(folder: Path) -> None:
    encoder = encoder_of(folder / "clip", max_text_tokens=12, max_text_tokens_with_image=10)
    text = "one two three four five"
    assert len(encoder.prepare(Item(text, None)).tokens) == 12
    assert len(encoder.prepare(Item(text, picture(1))).tokens) == 10
    same = encoder_of(folder / "clip", max_text_tokens=12)
    assert len(same.prepare(Item(text, picture(1))).tokens) == 12


@pytest.mark.parametrize("options", [{"max_text_tokens": 21}, {"max_text_tokens_with_image": 2}])
def test_a_limit_the_model_has_no_positions_for_is_refused(folder: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(options))}=.* takes 3 to 20"):
        encoder_of(folder / "clip", **options)


def test_only_the_towers_that_are_needed_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder_of(folder / "clip")
    text, image = encoder.prepare(Item("a", None)), encoder.prepare(Item(None, picture(1)))
    monkeypatch.setattr(encoder.model.vision_model, "forward", None)
    encoder.encode([text, text])
    monkeypatch.undo()
    monkeypatch.setattr(encoder.model.text_model, "forward", None)
    encoder.encode([image])


def test_lower_precision_is_near(folder: Path) -> None:
    items = mixed_items()
    exact = encoded(encoder_of(folder / "clip"), items)
    near = encoded(encoder_of(folder / "clip", "bf16"), items)
    assert 0 < np.abs(near - exact).max() < 0.05 * np.abs(exact).max()
    assert next(encoder_of(folder / "clip", "bf16").model.parameters()).dtype == torch.float32


def test_weights_in_half_precision_are_computed_in_single(folder: Path, tmp_path: Path) -> None:
    """BGE-VL's files are fp16, and transformers would then compute in fp16."""
    shutil.copytree(folder / "clip", tmp_path / "half")
    CLIPModel.from_pretrained(folder / "clip").half().save_pretrained(tmp_path / "half")
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "float16"
    encoder = encoder_of(tmp_path / "half")
    assert encoder.model.dtype == torch.float32
    found, exact = encoded(encoder, mixed_items()), encoded(encoder_of(folder / "clip"), mixed_items())
    assert 0 < np.abs(found - exact).max() < 0.02 * np.abs(exact).max()


def test_remote_code_named_by_a_config_is_not_run(folder: Path, tmp_path: Path) -> None:
    """As in BGE-VL's repositories: the stock classes read the same weights."""
    directory = tmp_path / "clip"
    shutil.copytree(folder / "clip", directory)
    bring_code(directory, "modeling_MMRet_CLIP",
               auto_map={"AutoModel": "modeling_MMRet_CLIP.CLIPModel", "AutoConfig": "modeling_MMRet_CLIP.Config"})
    assert np.array_equal(encoded(encoder_of(directory), mixed_items()),
                          encoded(encoder_of(folder / "clip"), mixed_items()))


def test_nothing_is_said_that_does_not_matter(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    encoder_of(folder / "clip")
    out, err = capfd.readouterr()
    assert out == "" and "Loading weights" not in err


@pytest.mark.parametrize("change, message", [
    ({"text_projection.weight": None}, "'text_projection.weight' is missing"),
    ({"extra.weight": torch.ones(2)}, "'extra.weight' is not part of the model"),
    ({"visual_projection.weight": torch.ones(3, 3)}, r"'visual_projection.weight' has shape \(3, 3\), not \(24, 48\)"),
])
def test_weights_that_do_not_fit_are_refused_by_name(folder: Path, tmp_path: Path, change: dict[str, Any],
                                                     message: str) -> None:
    directory = changed(folder / "clip", tmp_path / "clip", change)
    with pytest.raises(UserError, match=message):
        encoder_of(directory)


def changed(source: Path, target: Path, change: dict[str, Any]) -> Path:
    """A copy of a model's directory whose weights lack what is None, and have what is not."""
    shutil.copytree(source, target)
    write_weights(target, {**load_file(target / "model.safetensors"), **change})
    return target


def test_what_only_training_reads_may_be_absent(folder: Path, tmp_path: Path) -> None:
    positions = torch.arange(20)[None]  # in files that older releases wrote
    directory = changed(folder / "clip", tmp_path / "clip", {
        "logit_scale": None, "text_model.embeddings.position_ids": positions})
    assert np.array_equal(encoded(encoder_of(directory), mixed_items()),
                          encoded(encoder_of(folder / "clip"), mixed_items()))


def test_a_file_cut_short_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "clip", tmp_path / "clip")
    cut_weights_short(tmp_path / "clip")
    with pytest.raises(UserError, match="cannot load the weights"):
        encoder_of(tmp_path / "clip")


@pytest.mark.parametrize("missing, message", [
    ("config.json", "config.json is missing"), ("model.safetensors", "cannot load the weights"),
    ("tokenizer.json", "holds no tokenizer"), ("preprocessor_config.json", "how images are prepared")])
def test_a_directory_that_lacks_a_part_is_refused(folder: Path, tmp_path: Path, missing: str, message: str) -> None:
    shutil.copytree(folder / "clip", tmp_path / "clip")
    (tmp_path / "clip" / missing).unlink()
    with pytest.raises(UserError, match=message):
        encoder_of(tmp_path / "clip")


@pytest.mark.parametrize("config, message", [
    ({"model_type": "bert"}, "'bert' is no dual encoder"),
    ({"model_type": "nobody_knows"}, "cannot read this config .*'nobody_knows'"),
    ({}, "cannot read this config")])
def test_models_of_another_kind_are_refused(folder: Path, tmp_path: Path, config: dict[str, str],
                                            message: str) -> None:
    shutil.copytree(folder / "clip", tmp_path / "other")
    (tmp_path / "other/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        encoder_of(tmp_path / "other")


def test_an_image_processor_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "clip", tmp_path / "clip")
    path = tmp_path / "clip/preprocessor_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}}))
    with pytest.raises(UserError, match="Input image size"):
        encoder_of(tmp_path / "clip")


def test_pixels_travel_as_bytes(folder: Path) -> None:
    encoder = encoder_of(folder / "clip")
    assert encoder.image_size == (32, 32)
    prepared = encoder.prepare(Item(None, picture(1)))
    assert prepared.pixels["pixel_values"].dtype == np.uint8 and prepared.tokens is None


def test_unknown_options_are_refused(folder: Path) -> None:
    params = Params(str(folder / "clip"), fusion="product")
    for refuse in (dual_encoder.identity, lambda params: dual_encoder.build(params, "cpu", "fp32")):
        with pytest.raises(UserError, match="fusion 'product' is not known"):
            refuse(params)
    with pytest.raises(UserError, match="precision 'int8'"):
        encoder_of(folder / "clip", "int8")


def test_identity_follows_content(folder: Path, tmp_path: Path) -> None:
    source = folder / "clip"
    shutil.copytree(source, tmp_path / "copy")
    other = changed(source, tmp_path / "other", {"logit_scale": torch.tensor(1.0)})
    shutil.copytree(source, tmp_path / "config")
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config/config.json").write_text(json.dumps({**config, "projection_dim": 23}))
    params = [Params(str(path)) for path in (source, tmp_path / "copy", other, tmp_path / "config")]
    params += [replace(params[0], fusion="normalised_sum"), replace(params[0], max_text_tokens=9),
               replace(params[0], max_text_tokens_with_image=9)]
    found = [json.dumps(dual_encoder.identity(each)) for each in params]
    assert found[0] == found[1] and len(set(found)) == len(found) - 1
    pinned = dual_encoder.identity(Params("BAAI/BGE-VL-base", "0" * 40))
    assert pinned["revision"] == "0" * 40
    with pytest.raises(UserError, match="needs `revision`"):
        dual_encoder.identity(Params("BAAI/BGE-VL-base"))


def test_identity_does_not_import_torch(folder: Path) -> None:
    code = ("import sys; from pipeline.encoders import dual_encoder, bge_vl_mllm;"
            f"dual_encoder.identity(dual_encoder.Params({str(folder / 'clip')!r}));"
            "print([name for name in ('torch', 'transformers', 'PIL') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def clip_shapes(vision: tuple[int, int, int, int], text: tuple[int, int], D: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of BGE-VL-base and -large, written down from their published layout."""
    (V, vision_layers, patch, image), (W, text_layers) = vision, text
    shapes: dict[str, tuple[int, ...]] = {
        "logit_scale": (), "text_projection.weight": (D, W), "visual_projection.weight": (D, V),
        "text_model.embeddings.token_embedding.weight": (49408, W),
        "text_model.embeddings.position_embedding.weight": (77, W),
        "vision_model.embeddings.class_embedding": (V,),
        "vision_model.embeddings.patch_embedding.weight": (V, 3, patch, patch),
        "vision_model.embeddings.position_embedding.weight": ((image // patch) ** 2 + 1, V)}
    linears: dict[str, tuple[int, int]] = {}
    norms = {"text_model.final_layer_norm": W, "vision_model.pre_layrnorm": V, "vision_model.post_layernorm": V}
    for tower, width, layers in (("text_model", W, text_layers), ("vision_model", V, vision_layers)):
        for layer in (f"{tower}.encoder.layers.{number}" for number in range(layers)):
            norms |= {f"{layer}.layer_norm1": width, f"{layer}.layer_norm2": width}
            linears |= {f"{layer}.self_attn.{name}_proj": (width, width) for name in ("q", "k", "v", "out")}
            linears |= {f"{layer}.mlp.fc1": (4 * width, width), f"{layer}.mlp.fc2": (width, 4 * width)}
    return shapes | with_biases(linears, norms)


@pytest.mark.parametrize("vision, text, D, parameters", [
    ((768, 12, 16, 224), (512, 12), 512, 149_620_737), ((1024, 24, 14, 224), (768, 12), 768, 427_616_513)])
def test_the_published_sizes_have_the_published_names_and_shapes(
        vision: tuple[int, int, int, int], text: tuple[int, int], D: int, parameters: int) -> None:
    config = CLIPConfig(
        vision_config={"hidden_size": vision[0], "intermediate_size": 4 * vision[0], "num_hidden_layers": vision[1],
                       "num_attention_heads": vision[0] // 64, "patch_size": vision[2], "image_size": vision[3]},
        text_config={"hidden_size": text[0], "intermediate_size": 4 * text[0], "num_hidden_layers": text[1],
                     "num_attention_heads": text[0] // 64}, projection_dim=D)
    with torch.device("meta"):  # names and shapes without the memory
        model = CLIPModel(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == clip_shapes(vision, text, D)
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == parameters


def test_a_file_with_the_published_names_loads(folder: Path, tmp_path: Path) -> None:
    """The tiny directory's file has the layout of the published ones, so what reads it reads those."""
    names = set(load_file(folder / "clip/model.safetensors"))
    assert names == set(clip_shapes((48, 2, 16, 32), (32, 2), 24))


@pytest.mark.parametrize("name", ["bge_vl_base", "bge_vl_large", "siglip_base", "siglip2_base", "siglip2_so400m",
                                  "align_base", "metaclip2_b32_mt5", "blip_itm_base_coco", "blip_itm_large_coco"])
def test_the_published_models_have_configurations(name: str) -> None:
    choice = load_encoder_choice(name)
    assert choice.module == "dual_encoder" and len(choice.identity()["revision"]) == 40
    if name.startswith("bge"):
        assert (choice.params.max_text_tokens, choice.params.max_text_tokens_with_image) == (77, 75)


def test_mini_mbeir_runs_from_end_to_end(folder: Path, small_arguments: list[str], tmp_path: Path) -> None:
    """All eight task kinds, with loader processes."""
    (tmp_path / "tiny_dual.yaml").write_text(f"encoder: dual_encoder\nmodel: {folder / 'clip'}\n")
    experiment = load("quickstart", [f"work_dir={tmp_path}", *small_arguments, "embed.loaders=2",
                                     f"encoders=[{tmp_path / 'tiny_dual.yaml'}]"])
    run_experiment(experiment, [], say=lambda *_: None)
    scored = make_plan(experiment).scored
    assert len(scored) == 24 and all(cell.job.artifact.is_complete() for cell in scored)
