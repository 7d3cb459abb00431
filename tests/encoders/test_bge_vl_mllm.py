"""BGE-VL-MLLM: its prompts to the last blank, its last token, its image tokens, files of the published layout."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from pipeline.config import load
from pipeline.encoders import Item, bge_vl_mllm
from pipeline.encoders.bge_vl_mllm import Params
from pipeline.encoders.bge_vl_prompts import prompt
from pipeline.pieces import load_encoder_choice
from pipeline.plan import make_plan
from pipeline.run import run_experiment
from pipeline.support.errors import UserError
from tests.encoders import tiny_models
from tests.encoders.tiny_models import bring_code, cut_weights_short, encoded, picture, with_biases, write_weights

I, T = "Find what is asked: ", "a red circle"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.llava(tmp_path_factory.mktemp("mllm") / "llava")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def encoder(directory: Path) -> Any:
    return encoder_of(directory)


def encoder_of(directory: Path, precision: str = "fp32", **options: Any) -> Any:
    return bge_vl_mllm.build(Params(str(directory), **options), "cpu", precision)


def query(text: str | None, image: Any, instruction: str | None = I) -> Item:
    """As the loaders make it: `text` is the whole, its instruction included."""
    whole = f"{instruction} {text or ''}".strip() if instruction else text
    return Item(whole, image, instruction, text, "query")


def prompted_items() -> list[tuple[Item, str]]:
    """Every kind of item with the prompt that the models' published code makes of it, spelled out."""
    P, Q = picture(1), picture(2, 90, 30)
    return [
        (query(T, P), f"[INST] \n <instruct> {I} <query>  {T} \n <image> [/INST]"),
        (query(T, None), f"[INST] \n <instruct> {I} <query>  {T} \n [/INST]"),
        (query(None, Q), f"[INST] \n <instruct> {I} <query>  <image> [/INST]"),
        (query(T, Q, None), f"[INST] \n <instruct>  <query> {T} \n <image> [/INST]"),
        (query(T, None, None), f"[INST] \n <instruct>  <query> {T} \n [/INST]"),
        (query(None, P, None), "[INST] \n <instruct>  <query> <image> [/INST]"),
        (Item(T, P), f"[INST]  {T} \n <image> [/INST]"),
        (Item(T, None), f"[INST]  {T} \n [/INST]"),
        (Item(None, Q), "[INST]  <image> [/INST]"),
        (Item("", P), "[INST]  <image> [/INST]"),
        (Item(None, None), "[INST]   \n [/INST]"),
        (Item("", None), "[INST]   \n [/INST]"),
        (Item(T, None, None, T, "candidate"), f"[INST]  {T} \n [/INST]"),
    ]


def test_prompts_are_those_of_the_published_code() -> None:
    assert [prompt(item) for item, _ in prompted_items()] == [wanted for _, wanted in prompted_items()]
    assert "Find what is asked:  <query>  a red" in prompt(query(T, None))  # two blanks: the instruction ends in one


def test_an_instruction_is_for_queries() -> None:
    assert prompt(Item(T, None, I, T, "candidate")) == f"[INST]  {T} \n [/INST]"
    assert prompt(query("", picture(1))) == f"[INST] \n <instruct> {I} <query>  <image> [/INST]"


class Oracle:
    """transformers' own processor and whole model, one item at a time."""

    def __init__(self, directory: Path):
        self.processor = LlavaNextProcessor(
            LlavaNextImageProcessorPil.from_pretrained(directory), tiny_models.llava_tokenizer(), patch_size=14,
            vision_feature_select_strategy="default", num_additional_image_tokens=1)
        self.model: Any = LlavaNextForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()

    def state(self, text: str, image: Any, side: int | None = 512, position: int = -1) -> np.ndarray:
        stretched = image.resize((side, side)) if image is not None and side is not None else image
        images = {} if image is None else {"images": stretched}
        inputs = self.processor(text=text, **images, return_tensors="pt")
        with torch.no_grad():
            states = self.model(**inputs, output_hidden_states=True).hidden_states[-1][:, position]
        return (states / states.norm(dim=-1, keepdim=True)).numpy()[0]

    def vectors(self, **options: Any) -> np.ndarray:
        return np.stack([self.state(text, item.image, **options) for item, text in prompted_items()])


@pytest.fixture(scope="module")
def oracle(directory: Path) -> Oracle:
    return Oracle(directory)


def test_vectors_are_the_last_tokens_states(encoder: Any, oracle: Oracle) -> None:
    items = [item for item, _ in prompted_items()]
    wanted = oracle.vectors()
    mixed, alone = encoded(encoder, items), np.concatenate([encoded(encoder, [item]) for item in items])
    backwards = encoded(encoder, items[::-1])[::-1]
    for found in (mixed, alone, backwards):
        assert np.abs(found - wanted).max() <= 1e-6
    assert np.abs(wanted[0] - wanted[1:8]).max(axis=1).min() > 1e-3  # the kinds of items are told apart
    np.testing.assert_allclose(np.linalg.norm(mixed, axis=1), 1, atol=1e-6)


def test_other_tokens_sizes_and_padding_would_be_noticed(encoder: Any, oracle: Oracle,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    items, wanted = [item for item, _ in prompted_items()], oracle.vectors()
    with_image = [row for row, item in enumerate(items) if item.image is not None]
    assert np.abs(oracle.vectors(position=-2) - wanted).max(axis=1).min() > 1e-2
    assert np.abs(oracle.vectors(side=None) - wanted)[with_image].max(axis=1).min() > 1e-3
    monkeypatch.setattr(encoder, "_padded", padded_right)
    assert np.abs(encoded(encoder, items) - wanted).max() > 1e-2


def padded_right(prompts: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(len(tokens) for tokens in prompts)
    tokens = np.stack([np.pad(each, (0, length - len(each))) for each in prompts])
    mask = np.stack([np.pad(np.ones_like(each), (0, length - len(each))) for each in prompts])
    return torch.from_numpy(tokens), torch.from_numpy(mask)


def test_tokens_and_pixels_are_the_processors(encoder: Any, oracle: Oracle) -> None:
    """The image's tokens stand where, and as often as, the processor puts them; the pixels are its pixels."""
    item, text = prompted_items()[0]
    assert item.image is not None
    inputs = oracle.processor(text=text, images=item.image.resize((512, 512)), return_tensors="np")
    prepared = encoder.prepare(item)
    assert encoder._expanded(prepared.tokens).tolist() == inputs["input_ids"][0].tolist()
    assert prepared.pixels["pixel_values"].dtype == np.uint8 and encoder.image_size == (512, 512)
    assert np.array_equal(encoder.images.ready([prepared.pixels])["pixel_values"], inputs["pixel_values"])


def test_the_side_that_the_directory_pads_does_not_matter(directory: Path, encoder: Any, tmp_path: Path) -> None:
    shutil.copytree(directory, tmp_path / "llava")
    tiny_models.llava_tokenizer("right").save_pretrained(tmp_path / "llava")
    items = [item for item, _ in prompted_items()]
    assert np.abs(encoded(encoder_of(tmp_path / "llava"), items) - encoded(encoder, items)).max() <= 1e-6


@pytest.mark.parametrize("text", ["\u00fc \U0001f600 \u56fe\u7247", "\ud800 lone", "\x00\n\t", "<image> not one",
                                  "<s></s>", "<ima<image>ge>", "[INST] [/INST]"])
def test_strange_texts_have_vectors(encoder: Any, text: str) -> None:
    items = [Item(text, None), Item(text, picture(1)), query(text, picture(1)), query("a", picture(1), text)]
    found = encoded(encoder, items)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


def test_long_texts_are_cut_within_their_prompt(directory: Path, oracle: Oracle) -> None:
    encoder = encoder_of(directory, max_text_tokens=100)
    words = "abcdefghij" * 30
    for item in (query(words, picture(1)), query(words, None), Item(words, None), Item(words, picture(1)),
                 query(words, None, None)):
        tokens = encoder.prepare(item).tokens
        kept = words[:100 - (len(encoder.tokenizer(prompt(item))["input_ids"]) - 300)]
        short = prompt(replace(item, text=kept, bare_text=kept))
        assert len(tokens) == 100 and tokens.tolist() == encoder.tokenizer(short)["input_ids"]
        wanted = oracle.state(short, item.image)
        assert np.abs(encoded(encoder, [item])[0] - wanted).max() <= 1e-6


def test_an_instruction_that_is_too_long_keeps_the_end_of_the_prompt(directory: Path) -> None:
    encoder = encoder_of(directory, max_text_tokens=64)
    found = encoder.prepare(query("a", picture(1), "abc" * 100)).tokens
    assert len(found) == 64 and (found == encoder.image_token).sum() == 1
    assert encoder.tokenizer.decode(found).replace(" ", "").endswith("[/INST]")
    assert np.isfinite(encoded(encoder, [query("a", picture(1), "abc" * 100)])).all()


def test_without_a_limit_the_positions_are_one(directory: Path, encoder: Any) -> None:
    """600 positions, of which an image takes 4 of the whole, 4 x 4 of its tiles and 4 for the ends of their rows."""
    assert encoder.image_tokens == 24 and encoder.limit == 576
    tokens = encoder.prepare(Item("x" * 2000, picture(1))).tokens
    assert len(encoder._expanded(tokens)) == 576 + 23
    for asked in (63, 577):
        with pytest.raises(UserError, match=f"max_text_tokens={asked} .* 64 to 576"):
            encoder_of(directory, max_text_tokens=asked)


def test_the_published_models_have_2928_tokens_for_an_image() -> None:
    """336-pixel tiles of 24 x 24 patches: 576 of the whole, 48 x 48 of four tiles, 48 ends of rows."""
    tokenizer = tiny_models.llava_tokenizer()
    processor = LlavaNextProcessor(
        LlavaNextImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}), tokenizer,
        patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    assert bge_vl_mllm._count_image_tokens(processor) == 2928 == 576 + 48 * 48 + 48


@pytest.mark.parametrize("precision, tolerance", [("bf16", 0.05), ("fp16", 0.01)])
def test_lower_precision_holds_the_weights(directory: Path, encoder: Any, precision: str, tolerance: float) -> None:
    items = [item for item, _ in prompted_items()]
    lower = encoder_of(directory, precision)
    assert lower.model.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    found = encoded(lower, items)
    assert 0 < np.abs(found - encoded(encoder, items)).max() < tolerance
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


def test_texts_do_not_run_the_image_tower(encoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = encoder.prepare(Item(T, None))
    monkeypatch.setattr(encoder.model.vision_tower, "forward", None)
    encoder.encode([prepared])
    assert encoder.encode([]).shape == (0, encoder.dimension)


def published_name(name: str) -> str:
    """What transformers 5 calls `name`, as the published files call it."""
    for new, old in (("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head."),
                     ("model.vision_tower.", "vision_tower.vision_model."),
                     ("model.multi_modal_projector.", "multi_modal_projector."),
                     ("model.image_newline", "image_newline")):
        if name.startswith(new):
            return old + name.removeprefix(new)
    raise AssertionError(name)


def as_published(source: Path, target: Path, change: dict[str, Any] | None = None) -> Path:
    """The directory as BAAI's: names of old releases, remote code in the config, no patch_size for the processor."""
    shutil.copytree(source, target)
    model = LlavaNextForConditionalGeneration.from_pretrained(source)
    state = {published_name(name): tensor for name, tensor in model.state_dict().items()}
    write_weights(target, {**state, **(change or {})})
    text_config = json.loads((target / "config.json").read_text())["text_config"]
    text_config["rope_theta"] = text_config.pop("rope_parameters")["rope_theta"]
    assert text_config["rope_theta"] == 1e6  # not the default, which a name not understood would leave
    bring_code(target, "modeling_llavanext_for_embedding", architectures=["LLaVANextForEmbedding"],
               text_config=text_config,
               auto_map={"AutoModel": "modeling_llavanext_for_embedding.LLaVANextForEmbedding"})
    (target / "processor_config.json").write_text(json.dumps({"processor_class": "LlavaNextProcessor"}))
    return target


def test_a_directory_of_the_published_layout_loads(directory: Path, encoder: Any, tmp_path: Path) -> None:
    published = as_published(directory, tmp_path / "published")
    names = set(load_file(published / "model.safetensors"))
    tiny = dict(vision=(48, 3, 64), text=(32, 2, 48, 16), vocabulary=len(tiny_models.llava_tokenizer()))
    assert names == set(published_shapes(**tiny))  # type: ignore[arg-type]
    items = [item for item, _ in prompted_items()]
    assert np.array_equal(encoded(encoder_of(published), items), encoded(encoder, items))


def published_shapes(vision: tuple[int, int, int], text: tuple[int, int, int, int],
                     vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of LLaVA-v1.6-mistral's files, written down from their published layout (14-pixel patches)."""
    (V, vision_layers, vision_inner), (W, layers, inner, key_width) = vision, text
    patches = (28 if V < 1024 else 336) // 14
    tower = "vision_tower.vision_model"
    shapes: dict[str, tuple[int, ...]] = {
        "image_newline": (W,), "language_model.model.embed_tokens.weight": (vocabulary, W),
        "language_model.model.norm.weight": (W,), "language_model.lm_head.weight": (vocabulary, W),
        f"{tower}.embeddings.class_embedding": (V,), f"{tower}.embeddings.patch_embedding.weight": (V, 3, 14, 14),
        f"{tower}.embeddings.position_embedding.weight": (patches ** 2 + 1, V)}
    linears = {"multi_modal_projector.linear_1": (W, V), "multi_modal_projector.linear_2": (W, W)}
    norms = [f"{tower}.pre_layrnorm", f"{tower}.post_layernorm"]
    for layer in (f"{tower}.encoder.layers.{number}" for number in range(vision_layers)):
        linears |= {f"{layer}.self_attn.{name}_proj": (V, V) for name in ("q", "k", "v", "out")}
        linears |= {f"{layer}.mlp.fc1": (vision_inner, V), f"{layer}.mlp.fc2": (V, vision_inner)}
        norms += [f"{layer}.layer_norm1", f"{layer}.layer_norm2"]
    for layer in (f"language_model.model.layers.{number}" for number in range(layers)):
        shapes |= {f"{layer}.{name}.weight": shape for name, shape in {
            "self_attn.q_proj": (W, W), "self_attn.k_proj": (key_width, W), "self_attn.v_proj": (key_width, W),
            "self_attn.o_proj": (W, W), "mlp.gate_proj": (inner, W), "mlp.up_proj": (inner, W),
            "mlp.down_proj": (W, inner), "input_layernorm": (W,), "post_attention_layernorm": (W,)}.items()}
    return shapes | with_biases(linears, dict.fromkeys(norms, V))


@pytest.mark.parametrize("vocabulary, parameters", [(32005, 7_566_264_320), (32064, 7_566_747_648)])
def test_the_published_sizes_have_the_published_names_and_shapes(vocabulary: int, parameters: int) -> None:
    """BGE-VL-MLLM-S1 and -S2, and v1.5, whose vocabulary has more rows."""
    text = {"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": vocabulary}
    with torch.device("meta"):  # names and shapes without the memory
        model = LlavaNextForConditionalGeneration(LlavaNextConfig(text_config=text))
    shapes = {published_name(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == published_shapes((1024, 24, 4096), (4096, 32, 14336, 1024), vocabulary)
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == parameters


@pytest.mark.parametrize("change, message", [
    ({"image_newline": None}, "'image_newline' is missing"),
    ({"language_model.model.norm.weight": None}, "'language_model.norm.weight' is missing"),
    ({"vision_tower.extra.weight": torch.ones(2)}, "'vision_tower.extra.weight' is not part of the model"),
    ({"multi_modal_projector.linear_1.bias": torch.ones(3)}, r"linear_1.bias' has shape \(3,\), not \(32,\)"),
])
def test_weights_that_do_not_fit_are_refused_by_name(directory: Path, tmp_path: Path, change: dict[str, Any],
                                                     message: str) -> None:
    with pytest.raises(UserError, match=message):
        encoder_of(as_published(directory, tmp_path / "published", change))


def test_a_file_cut_short_is_refused(directory: Path, tmp_path: Path) -> None:
    published = as_published(directory, tmp_path / "published")
    cut_weights_short(published)
    with pytest.raises(UserError, match="cannot load the weights"):
        encoder_of(published)


def test_a_model_of_another_kind_is_refused(directory: Path, tmp_path: Path) -> None:
    tiny_models.clip(tmp_path / "clip")
    with pytest.raises(UserError, match="(?s)'clip' is not 'llava_next'.*dual_encoder"):
        encoder_of(tmp_path / "clip")


def test_a_tokenizer_of_another_model_is_refused(directory: Path, tmp_path: Path) -> None:
    for name, tokenizer, message in (
            ("image", tiny_models.letter_tokenizer(("<s>", "</s>"), "<s>", None, bos_token="<s>", eos_token="</s>"),
             "token .*, the config's image token is"),
            ("begin", tiny_models.letter_tokenizer(("<s>", "</s>"), None, None, bos_token="<s>", eos_token="</s>"),
             "must put <s> before")):
        shutil.copytree(directory, tmp_path / name)
        if name == "begin":
            tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        tokenizer.save_pretrained(tmp_path / name)
        with pytest.raises(UserError, match=message):
            encoder_of(tmp_path / name)


def test_identity_follows_content(directory: Path, tmp_path: Path) -> None:
    shutil.copytree(directory, tmp_path / "copy")
    other = tiny_models.llava(tmp_path / "other", seed=1)
    shutil.copytree(directory, tmp_path / "prompt")
    (tmp_path / "prompt/chat_template.jinja").write_text("{{ messages }}")
    params = [Params(str(path)) for path in (directory, tmp_path / "copy", other, tmp_path / "prompt")]
    params += [replace(params[0], max_text_tokens=100)]
    found = [json.dumps(bge_vl_mllm.identity(each)) for each in params]
    assert found[0] == found[1] and len(set(found)) == len(found) - 1


@pytest.mark.parametrize("name", ["bge_vl_mllm_s1", "bge_vl_mllm_s2", "bge_vl_v15_zs", "bge_vl_v15_mmeb"])
def test_the_published_models_have_configurations(name: str) -> None:
    choice = load_encoder_choice(name)
    assert choice.module == "bge_vl_mllm" and len(choice.identity()["revision"]) == 40


def test_mini_mbeir_runs_from_end_to_end(directory: Path, small_arguments: list[str], tmp_path: Path) -> None:
    """Composed retrieval and text to image, with loader processes."""
    (tmp_path / "tiny_mllm.yaml").write_text(f"encoder: bge_vl_mllm\nmodel: {directory}\n")
    experiment = load("quickstart", [f"work_dir={tmp_path}", *small_arguments, "embed.loaders=2", "pools=[local]",
                                     "tasks=[scenes_task0,edits_task7]",
                                     f"encoders=[{tmp_path / 'tiny_mllm.yaml'}]"])
    run_experiment(experiment, [], say=lambda *_: None)
    scored = make_plan(experiment).scored
    assert len(scored) == 2 and all(cell.job.artifact.is_complete() for cell in scored)
