"""sentence-transformers: vectors are those of the same parts put together by hand; texts, prompts and code are safe."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (BertConfig, BertModel, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor,
                          CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaModel, LlavaProcessor, PreTrainedTokenizer,
                          PreTrainedTokenizerFast)

from pipeline.encoders import Item, sentence_transformers
from pipeline.encoders.sentence_transformers import Params
from pipeline.support.errors import UserError

WORDS = ("<pad> <unk> <s> </s> <image> [INST] [/INST] <instruct> <query> a b c red circle blue star find it the "
         "query: document: photo.png at night").split()
TEMPLATE = ("[INST] {% for m in messages %}{% if m.role == 'system' %}<instruct> {% for c in m.content %}{{ c.text }}"
            "{% endfor %} <query> {% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'user' %}"
            "{% for c in m.content %}{% if c.type == 'text' %} {{ c.text }}{% else %} <image>{% endif %}{% endfor %}"
            "{% endif %}{% endfor %} [/INST]")
D = 24


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def tokenizer(is_framed: bool = False, **options: Any) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if is_framed:
        words.post_processor = processors.TemplateProcessing(single="<s> $A </s>",
                                                             special_tokens=[("<s>", 2), ("</s>", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", bos_token="<s>",
                                   eos_token="</s>", **options)


def perturbed(model: Any) -> Any:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.2)
    return model.eval()


def image_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})


def vision() -> dict[str, Any]:
    return {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 16, "patch_size": 8}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text model with prompts, mean pooling, and weights stored in bf16."""
    folder = tmp_path_factory.mktemp("bert")
    config = BertConfig(vocab_size=len(WORDS), hidden_size=D, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=32, max_position_embeddings=16)
    perturbed(BertModel(config)).to(torch.bfloat16).save_pretrained(folder / "plain")
    tokenizer(model_max_length=16).save_pretrained(folder / "plain")
    parts = [Transformer(str(folder / "plain")), Pooling(D, "mean")]
    prompts = {"query": "query: ", "document": "document: "}
    SentenceTransformer(modules=parts, prompts=prompts, device="cpu").save(str(folder / "model"))
    return folder / "model"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP: texts and images, but nothing for both at once."""
    folder = tmp_path_factory.mktemp("clip")
    text = {"vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 12, "eos_token_id": 3, "pad_token_id": 0}
    perturbed(CLIPModel(CLIPConfig(text_config=text, vision_config=vision(), projection_dim=D))).save_pretrained(folder)
    CLIPProcessor(image_processor(), tokenizer(True, model_max_length=12)).save_pretrained(folder)
    SentenceTransformer(modules=[Transformer(str(folder))], device="cpu").save(str(folder / "model"))
    return folder / "model"


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vision-language model with a chat template, the vector of its last token, normalised."""
    folder = tmp_path_factory.mktemp("llava")
    text = LlamaConfig(vocab_size=len(WORDS), hidden_size=D, intermediate_size=32, num_hidden_layers=2,
                       num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64)
    config = LlavaConfig(vision_config=CLIPVisionConfig(**vision()), text_config=text, image_token_index=4,
                         vision_feature_layer=-1, image_seq_length=4)
    perturbed(LlavaModel(config)).save_pretrained(folder)
    processor = LlavaProcessor(image_processor=image_processor(), chat_template=TEMPLATE, patch_size=8,
                               vision_feature_select_strategy="default", num_additional_image_tokens=1,
                               tokenizer=tokenizer(model_max_length=24, additional_special_tokens=["<image>"]))
    processor.save_pretrained(folder)
    parts = [Transformer(str(folder)), Pooling(D, "lasttoken"), Normalize()]
    SentenceTransformer(modules=parts, device="cpu").save(str(folder / "model"))
    return folder / "model"


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 30 + seed, 3), dtype=np.uint8))


def vectors(encoder: Any, items: list[Item]) -> np.ndarray:
    found = encoder.encode([encoder.prepare(item) for item in items])
    assert found.dtype == np.float32 and found.shape == (len(items), encoder.dimension)
    return np.asarray(found)


def farthest(found: np.ndarray, expected: Any) -> float:
    """The greatest difference of two components, relative to the greatest component where that is above 1."""
    return float(np.abs(found - expected).max() / max(1.0, np.abs(expected).max()))


def bert_vector(folder: Path, text: str) -> np.ndarray:
    """Tokens, the transformer in fp32, the mean over tokens: nothing of the library."""
    words = PreTrainedTokenizerFast.from_pretrained(folder)
    model = BertModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = words(text, truncation=True, max_length=16, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return np.asarray(model(tokens).last_hidden_state[0].mean(0).numpy())


def clip_vector(folder: Path, text: str | None, image: Image.Image | None) -> np.ndarray:
    model, total = CLIPModel.from_pretrained(folder).eval(), torch.zeros(D)
    words: PreTrainedTokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    with torch.no_grad():
        if text is not None:
            inner = model.text_model(words(text, truncation=True, max_length=12, return_tensors="pt")["input_ids"])
            total = total + model.text_projection(inner.pooler_output)[0]
        if image is not None:
            pixels = image_processor()(image, return_tensors="pt")["pixel_values"]
            total = total + model.visual_projection(model.vision_model(pixels).pooler_output)[0]
    return total.numpy()


def llava_vector(folder: Path, rendered: str, image: Image.Image | None) -> np.ndarray:
    """Of a prompt as written here, with <image> once for each of the image's four patches."""
    words = PreTrainedTokenizerFast.from_pretrained(folder)
    model = LlavaModel.from_pretrained(folder).eval()
    given: dict[str, Any] = {"input_ids": words(rendered.replace("<image>", "<image> " * 4),
                                                return_tensors="pt")["input_ids"]}
    if image is not None:
        given["pixel_values"] = image_processor()(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        last = model(**given).last_hidden_state[0, -1]
    return torch.nn.functional.normalize(last, dim=0).numpy()


def test_a_text_model_with_its_own_prompts(bert: Path) -> None:
    encoder = sentence_transformers.build(Params(str(bert)), "cpu", "fp32")
    assert encoder.modalities == {"text"} and encoder.dimension == D
    found = vectors(encoder, [Item("red circle at night", None), Item("red", None, role="query"), Item("", None)])
    expected = [bert_vector(bert, text) for text in ("document: red circle at night", "query: red", "document:")]
    assert np.abs(found - expected).max() <= 1e-6 < 1e-3 < np.abs(expected).max()
    assert np.abs(found[1] - bert_vector(bert, "document: red")).max() > 1e-3
    assert np.abs(found[1] - bert_vector(bert, "red")).max() > 1e-3


def test_prompts_may_be_chosen_or_left_out(bert: Path) -> None:
    params = Params(str(bert), query_prompt="find ", candidate_prompt="")
    encoder = sentence_transformers.build(params, "cpu", "fp32")
    found = vectors(encoder, [Item("red circle", None, role="query"), Item("red circle", None)])
    assert np.abs(found - [bert_vector(bert, "find red circle"), bert_vector(bert, "red circle")]).max() <= 1e-6


def test_an_instruction_may_become_the_prompt(bert: Path) -> None:
    item = Item("find it red circle", None, "find it", "red circle", "query")
    as_text = sentence_transformers.build(Params(str(bert)), "cpu", "fp32")
    assert np.abs(vectors(as_text, [item]) - bert_vector(bert, "query: find it red circle")).max() <= 1e-6
    params = Params(str(bert), instruction_as="prompt", instruction_template="the {instruction} query: ")
    encoder = sentence_transformers.build(params, "cpu", "fp32")
    found = vectors(encoder, [item, replace(item, instruction=None, bare_text=None, text="red circle")])
    assert np.abs(found - [bert_vector(bert, "the find it query: red circle"),
                           bert_vector(bert, "query: red circle")]).max() <= 1e-6


def test_clip_takes_texts_and_images_and_sums_them_if_asked(clip: Path) -> None:
    native = sentence_transformers.build(Params(str(clip)), "cpu", "fp32")
    assert native.modalities == {"text", "image"}
    items = [Item("red circle", None), Item(None, picture(1)), Item("the blue star", None)]
    expected = [clip_vector(clip, item.text, item.image) for item in items]
    assert farthest(vectors(native, items), expected) <= 1e-6
    summing = sentence_transformers.build(Params(str(clip), fusion="sum"), "cpu", "fp32")
    assert summing.modalities == {"text", "image", "image,text"}
    both = [*items, Item("red circle", picture(1)), Item("", picture(1))]
    sums = [*expected, expected[0] + expected[1], expected[1]]
    assert farthest(vectors(summing, both), sums) <= 1e-6 < 1e-2 < farthest(expected[0], expected[2])


def test_a_text_is_a_text_even_if_it_names_a_picture(clip: Path, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    picture(1).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    encoder = sentence_transformers.build(Params(str(clip)), "cpu", "fp32")
    for text in ("photo.png", "https://example.org/photo.png", "data:image/png;base64,AAAA"):
        assert farthest(vectors(encoder, [Item(text, None)])[0], clip_vector(clip, text, None)) <= 1e-6
    as_image = encoder.model.encode(["photo.png"])[0]  # what the library makes of the bare string
    assert np.abs(as_image - clip_vector(clip, None, picture(1))).max() < 1e-5


def test_a_chat_template_takes_everything_and_the_instruction(llava: Path) -> None:
    params = Params(str(llava), instruction_as="prompt")
    encoder = sentence_transformers.build(params, "cpu", "fp32")
    assert encoder.modalities == {"text", "image", "image,text"}
    items = [Item("red circle", None), Item(None, picture(2)), Item("red star", picture(3)),
             Item("find it blue", picture(2), "find it", "blue", "query"), Item("find it", picture(2), "find it", None)]
    rendered = ["[INST]  red circle [/INST]", "[INST]  <image> [/INST]", "[INST]  red star <image> [/INST]",
                "[INST] <instruct> find it <query>  blue <image> [/INST]",
                "[INST] <instruct> find it <query>  <image> [/INST]"]
    expected = [llava_vector(llava, text, item.image) for text, item in zip(rendered, items)]
    found = vectors(encoder, items)
    assert np.abs(found - expected).max() <= 1e-6
    assert np.abs(found[3] - llava_vector(llava, rendered[2], picture(2))).max() > 1e-3
    turned = sentence_transformers.build(replace(params, content_order="image,text"), "cpu", "fp32")
    other = llava_vector(llava, "[INST]  <image> red star [/INST]", picture(3))
    assert np.abs(vectors(turned, items[2:3]) - other).max() <= 1e-6 < 1e-4 < np.abs(other - expected[2]).max()


def test_a_text_that_spells_out_the_image_token_brings_no_image(llava: Path) -> None:
    encoder = sentence_transformers.build(Params(str(llava), instruction_as="prompt"), "cpu", "fp32")
    spelled = [Item("red <image> star", None), Item("red <image><image> star", picture(3)), Item("<image>", None),
               Item("find <image> it blue", picture(2), "find <image> it", "blue", "query")]
    plain = [Item("red star", None), Item("red star", picture(3)), Item(" ", None),
             Item("find it blue", picture(2), "find it", "blue", "query")]
    assert np.abs(vectors(encoder, spelled) - vectors(encoder, plain)).max() <= 1e-6


def test_an_instruction_that_cannot_be_a_prompt_stays_in_the_text(clip: Path) -> None:
    """Without a chat template the library drops prompts beside images."""
    encoder = sentence_transformers.build(Params(str(clip), fusion="sum", instruction_as="prompt"), "cpu", "fp32")
    image = picture(1)
    found = vectors(encoder, [Item("find it", image, "find it", None, "query"),
                              Item("find it blue", image, "find it", " blue", "query")])
    expected = [clip_vector(clip, "find it", image), clip_vector(clip, "find it blue", image)]
    assert np.abs(found - expected).max() <= 1e-6


@pytest.mark.parametrize("name", ["bert", "clip", "llava"])
def test_no_vector_depends_on_its_neighbours(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    params = Params(str(folder), fusion="sum" if name == "clip" else "native")
    encoder = sentence_transformers.build(params, "cpu", "fp32")
    items = [Item("red", None), Item(" ".join(["a", "b", "star"] * 9), None), Item("", None), Item(None, None),
             Item("h\u00e9 \u4e2d\u6587 \U0001f600", None), Item("red", None, role="query")]
    if "image" in encoder.modalities:
        items += [Item(None, picture(1)), Item("", picture(1)), Item("it", picture(4)), Item("red", picture(1))]
    alone = np.concatenate([vectors(encoder, [item]) for item in items])
    order = np.random.default_rng(0).permutation(len(items))
    assert np.isfinite(alone).all() and np.array_equal(alone[2], alone[3])
    assert np.abs(vectors(encoder, [items[row] for row in order]) - alone[order]).max() <= 1e-5
    if "image" in encoder.modalities:
        assert np.array_equal(alone[6], alone[7])


def test_texts_are_cut_never_refused(bert: Path, clip: Path, llava: Path) -> None:
    long = " ".join(["red", "star"] * 400)
    for folder, image in ((bert, None), (clip, None), (llava, None), (llava, picture(1))):
        encoder = sentence_transformers.build(Params(str(folder)), "cpu", "fp32")
        found = vectors(encoder, [Item(long, image), Item(f"{long} blue", image), Item("red", image)])
        assert np.abs(found[0] - found[1]).max() <= 1e-6 < 1e-4 < np.abs(found[0] - found[2]).max()
    # beside an image: as much of the text as there is room for, 24 tokens less four of the image, [INST] and [/INST]
    kept = " ".join(["red", "star"] * 9)
    assert np.abs(found[0] - llava_vector(llava, f"[INST]  {kept} <image> [/INST]", picture(1))).max() <= 1e-6
    shorter = sentence_transformers.build(Params(str(bert), candidate_prompt="", max_length=4), "cpu", "fp32")
    assert np.abs(vectors(shorter, [Item(long, None)]) - bert_vector(bert, "red star red star")).max() <= 1e-6


def test_a_text_of_no_tokens_is_zero(bert: Path) -> None:
    encoder = sentence_transformers.build(Params(str(bert), candidate_prompt=""), "cpu", "fp32")
    found = vectors(encoder, [Item("", None), Item("red", None), Item(None, None)])
    assert not found[[0, 2]].any() and np.abs(found[1] - bert_vector(bert, "red")).max() <= 1e-6


def test_truncated_dimensions_are_the_first_ones(bert: Path) -> None:
    full = sentence_transformers.build(Params(str(bert)), "cpu", "fp32")
    short = sentence_transformers.build(Params(str(bert), truncate_dim=5), "cpu", "fp32")
    assert short.dimension == 5
    assert np.array_equal(vectors(short, [Item("red", None)]), vectors(full, [Item("red", None)])[:, :5])


def test_bf16_is_near_fp32_and_not_it(clip: Path) -> None:
    exact, quick = (sentence_transformers.build(Params(str(clip)), "cpu", precision) for precision in ("fp32", "bf16"))
    items = [Item("red circle", None), Item(None, picture(1))]
    difference = np.abs(vectors(exact, items) - vectors(quick, items)).max()
    assert 1e-5 < difference < 0.1


def changed(folder: Path, target: Path, **tensors: torch.Tensor | None) -> Path:
    """A copy of a model whose weights are replaced, or removed where None is given."""
    shutil.copytree(folder, target)
    state = load_file(target / "model.safetensors")
    for name, tensor in tensors.items():
        name = name.replace("__", ".")
        state.pop(name) if tensor is None else state.update({name: tensor})
    save_file(state, target / "model.safetensors", {"format": "pt"})
    return target


def refused(folder: Path, **options: Any) -> str:
    with pytest.raises(UserError) as found:
        sentence_transformers.build(Params(str(folder), **options), "cpu", "fp32")
    return str(found.value)


def test_a_model_that_is_not_whole_is_refused(bert: Path, tmp_path: Path) -> None:
    name = "encoder__layer__1__attention__self__query__weight"
    lacking = refused(changed(bert, tmp_path / "a", **{name: None}))
    assert "1 weights are missing, the first: encoder.layer.1.attention.self.query.weight" in lacking
    unfit = refused(changed(bert, tmp_path / "b", **{name: torch.zeros(3, 3)}))
    assert "'encoder.layer.1.attention.self.query.weight' has another shape" in unfit
    cut = changed(bert, tmp_path / "c")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:999])
    assert "cannot load this model" in refused(cut)
    (cut / "modules.json").unlink()
    assert "modules.json is missing" in refused(cut)


def test_what_is_missing_and_never_used_is_no_mistake(bert: Path, tmp_path: Path) -> None:
    folder = changed(bert, tmp_path / "a", pooler__dense__weight=None, pooler__dense__bias=None)
    encoder = sentence_transformers.build(Params(str(folder)), "cpu", "fp32")
    assert np.abs(vectors(encoder, [Item("red", None)]) - bert_vector(bert, "document: red")).max() <= 1e-6


def test_code_of_a_model_runs_only_if_that_is_asked(bert: Path, tmp_path: Path) -> None:
    folder = changed(bert, tmp_path / "a")
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"idx": 2, "name": "2", "path": "2_Own", "type": "own_module.Doubling"})
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "2_Own").mkdir()
    (folder / "2_Own" / "config.json").write_text("{}")
    (folder / "own_module.py").write_text(
        "from pathlib import Path\n"
        "from sentence_transformers.base.modules import Module\n"
        f"Path({str(tmp_path)!r}, 'ran').touch()\n"
        "class Doubling(Module):\n"
        "    def forward(self, features, **options):\n"
        "        features['sentence_embedding'] = 2 * features['sentence_embedding']\n"
        "        return features\n"
        "    def save(self, *arguments, **options):\n"
        "        pass\n")
    assert "own_module.Doubling" in refused(folder) and not (tmp_path / "ran").exists()
    trusted = Params(str(folder), trust_remote_code=True)
    before = sentence_transformers.identity(trusted)
    encoder = sentence_transformers.build(trusted, "cpu", "fp32")
    assert (tmp_path / "ran").exists()
    assert np.abs(vectors(encoder, [Item("red", None)]) / 2 - bert_vector(bert, "document: red")).max() <= 1e-6
    (folder / "own_module.py").write_text((folder / "own_module.py").read_text().replace("2 *", "3 *"))
    assert sentence_transformers.identity(trusted) != before


def test_the_fingerprint_sees_content_and_options_not_paths(bert: Path, tmp_path: Path) -> None:
    base = sentence_transformers.identity(Params(str(bert)))
    copy = changed(bert, tmp_path / "copy")
    shutil.copyfile(bert / "model.safetensors", copy / "model.safetensors")
    assert sentence_transformers.identity(Params(str(copy))) == base
    other = changed(bert, tmp_path / "other", pooler__dense__bias=torch.zeros(D))
    assert sentence_transformers.identity(Params(str(other))) != base
    pooling = copy / "1_Pooling" / "config.json"
    pooling.write_text(pooling.read_text().replace('"mean"', '"cls"'))
    assert sentence_transformers.identity(Params(str(copy))) != base
    options = ({"query_prompt": ""}, {"instruction_as": "prompt"}, {"fusion": "sum"}, {"truncate_dim": 3},
               {"content_order": "image,text"}, {"max_length": 4}, {"candidate_prompt": "a"},
               {"instruction_template": "{instruction}\n"})
    for option in options:
        assert sentence_transformers.identity(replace(Params(str(bert)), **option)) != base, option
    pinned = Params("owner/name", "0" * 40)
    assert sentence_transformers.identity(pinned)["revision"] == "0" * 40


def test_mistakes_are_told(bert: Path, clip: Path, tmp_path: Path) -> None:
    assert "nothing to sum" in refused(bert, fusion="sum")
    assert "fusion 'add' is not known" in refused(bert, fusion="add")
    assert "{instruction}" in refused(bert, instruction_template="find")
    assert "needs `revision`" in refused(Path("owner/name"))
    with pytest.raises(UserError, match="precision"):
        sentence_transformers.build(Params(str(bert)), "cpu", "fp8")
    sparse = changed(bert, tmp_path / "sparse")
    config = json.loads((sparse / "config_sentence_transformers.json").read_text())
    (sparse / "config_sentence_transformers.json").write_text(json.dumps({**config, "model_type": "SparseEncoder"}))
    assert "this is a SparseEncoder" in refused(sparse)


def test_without_the_library_one_sentence_says_what_to_do(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
    assert "pip install 'plumbline[sentence-transformers]'" in refused(bert)
