"""GGUF: names, settings, every tensor and the tokenizer, read back; and llama.cpp's own answers, where it is there."""

import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

from tests.command_line import refusal
from tests.hub.test_exporting import saved
from tests.tiny_parts import ENCODERS, Parts, picture
from vlm.cli.main import main
from vlm.data.sample import ImageRef, Turn
from vlm.hub.exporting import export_checkpoint
from vlm.inference.generate import VisionLanguageModel
from vlm.inference.verify.cases import Case
from vlm.inference.verify.engines import NUM_IDS, Request, load_engine
from vlm.inference.verify.reference import Reference

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed (extra export)")

from vlm.assembly.checkpoint import open_checkpoint  # noqa: E402
from vlm.hub.gguf import exporting, language_models, tokenizer  # noqa: E402 - they import gguf
from vlm.hub.gguf.llama_cpp import Answer, LlamaCpp  # noqa: E402

CASES: dict[str, tuple[tuple[str, str], dict[str, Any]]] = {
    "siglip-llama": (("siglip", "llama"), {"layer": -2, "template": "chatml"}),
    "own-output-qwen3": (("siglip", "qwen3"), {"template": "chatml", "options": {"bias": False}}),
    "qwen2": (("siglip", "qwen2"), {"layer": -1, "template": "chatml"}),
    "two-layers-mistral": (("siglip", "mistral"), {"layer": [1, 2], "template": "mistral"}),
    "phi": (("siglip", "phi"), {"layer": -1, "template": "chatml"}),
    "phi3": (("siglip", "phi3"), {"layer": -1, "template": "phi"}),
    "gemma3": (("siglip", "gemma3"), {"layer": -1, "template": "gemma"}),
    "sentencepiece": (("siglip", "vicuna"), {"layer": -2, "template": "v1"}),
    "ldp-v2": (("wide_siglip", "llama"), {"layer": -1, "template": "chatml", "connector": "ldp_v2"}),
}


def save_wide_siglip(folder: Path) -> None:
    """SigLIP with a grid of 24 x 24 patches."""
    config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=48, patch_size=2
    )
    SiglipVisionModel(config).save_pretrained(folder)
    SiglipImageProcessor(size={"height": 48, "width": 48}).save_pretrained(folder)


@pytest.fixture(autouse=True)
def wide_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """One encoder more, for these tests."""
    monkeypatch.setitem(ENCODERS, "wide_siglip", save_wide_siglip)


def checkpoint(parts: Parts, folder: Path, case: str, **changes: Any) -> tuple[Any, Any]:
    """A checkpoint of random weights that pads images; Gemma's queries are scaled by the width of a head."""
    names, options = CASES[case]
    model, processor = saved(parts, folder, *names, image_mode="pad", **options)
    text = json.loads((folder / "config.json").read_text())
    if "query_pre_attn_scalar" in text["text_config"]:
        changes = {"query_pre_attn_scalar": 16, **changes}
    text["text_config"] |= changes
    (folder / "config.json").write_text(json.dumps(text))
    return model, processor


def read(file: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Settings and tensors of a file."""
    reader = gguf.GGUFReader(file)
    tensors = {
        tensor.name: torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).astype("float32"))
        for tensor in reader.tensors
    }
    return {name: field.contents() for name, field in reader.fields.items()}, tensors


@pytest.fixture(scope="module")
def llama(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SigLIP with a Llama and its export: `ours` and `gguf`."""
    root = tmp_path_factory.mktemp("llama")
    checkpoint(parts, root / "ours", "siglip-llama")
    main(["export", str(root / "ours"), str(root / "gguf"), "--format", "gguf"])
    return root


def test_llama_cpps_names(llama: Path):
    layer = ["attn_q", "attn_k", "attn_v", "attn_output", "attn_norm", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down"]
    _, text = read(llama / "gguf" / "model.gguf")
    assert text.keys() == {
        "token_embd.weight", "output_norm.weight", "output.weight",
        *(f"blk.{number}.{name}.weight" for number in (0, 1) for name in layer),
    }  # fmt: skip
    layer = ["attn_q", "attn_k", "attn_v", "attn_out", "ln1", "ln2", "ffn_up", "ffn_down"]
    _, vision = read(llama / "gguf" / "mmproj.gguf")
    kinds = ("weight", "bias")
    assert vision.keys() == {
        "v.patch_embd.weight", "v.patch_embd.bias", "v.position_embd.weight",
        *(f"v.blk.{number}.{name}.{kind}" for number in (0, 1) for name in layer for kind in kinds),
        *(f"mm.{number}.{kind}" for number in (0, 2) for kind in kinds),
    }  # fmt: skip


def test_llama_cpps_settings(llama: Path):
    values, _ = read(llama / "gguf" / "model.gguf")
    expected = {
        "general.architecture": "llama", "general.file_type": 0, "llama.block_count": 2, "llama.embedding_length": 32,
        "llama.context_length": 512, "llama.attention.head_count": 2, "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 16, "llama.vocab_size": 384, "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
    }  # fmt: skip
    assert {name: values[name] for name in expected} == expected
    pieces, types = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    assert (len(pieces), pieces[2], types[2], pieces[320], types[320]) == (384, "<|im_end|>", 3, "<image>", 3)
    assert set(types[321:]) == {gguf.TokenType.UNUSED}
    assert values["tokenizer.ggml.merges"][0] == "Ġ a"
    assert "<|im_start|>" in values["tokenizer.chat_template"]
    values, _ = read(llama / "gguf" / "mmproj.gguf")
    expected = {
        "general.architecture": "clip", "clip.has_vision_encoder": True, "clip.projector_type": "mlp",
        "clip.use_gelu": True, "clip.vision.image_size": 24, "clip.vision.patch_size": 8, "clip.vision.block_count": 2,
        "clip.vision.feature_layer": [2], "clip.vision.projection_dim": 32, "clip.vision.embedding_length": 32,
        "clip.vision.image_mean": [0.5] * 3,
    }  # fmt: skip
    assert {name: values[name] for name in expected} == expected


def test_a_tuned_encoders_weights_and_interleaved_queries(llama: Path):
    ours = load_file(llama / "ours" / "model.safetensors")
    _, vision = read(llama / "gguf" / "mmproj.gguf")
    _, text = read(llama / "gguf" / "model.gguf")
    weight = ours["visual_encoder.encoder.layers.1.self_attn.out_proj.weight"]
    assert torch.equal(vision["v.blk.1.attn_out.weight"], weight)
    assert torch.equal(vision["mm.2.weight"], ours["connector.layers.2.weight"])
    query = ours["language_model.model.layers.0.self_attn.q_proj.weight"]  # 2 heads of 16: first halves beside second
    order = [head * 16 + half * 8 + place for head in (0, 1) for place in range(8) for half in (0, 1)]
    assert torch.equal(text["blk.0.attn_q.weight"], query[order])
    assert torch.equal(text["blk.0.attn_v.weight"], ours["language_model.model.layers.0.self_attn.v_proj.weight"])


@pytest.mark.parametrize("case", [name for name in CASES if name != "siglip-llama"])
def test_each_language_model_is_read_back(parts: Parts, tmp_path: Path, case: str):
    """The export itself compares every tensor, and logits where transformers has a reader."""
    checkpoint(parts, tmp_path / "ours", case)
    said = export_checkpoint(str(tmp_path / "ours"), tmp_path / "gguf", "gguf")
    assert [note for note in said if "were not" in note] == (
        ["tensors were compared, logits were not: transformers reads no GGUF of a phi"] if case == "phi" else []
    )


@pytest.mark.parametrize(("dtype", "stored"), [("float16", "F16"), ("bfloat16", "BF16"), ("q8_0", "Q8_0")])
def test_precisions(llama: Path, tmp_path: Path, dtype: str, stored: str):
    export_checkpoint(str(llama / "ours"), tmp_path / "gguf", "gguf", dtype=dtype)
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "gguf" / "model.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == stored
    assert kinds["output_norm.weight"] == "F32"
    assert kinds["blk.0.ffn_down.weight"] == ("F16" if stored == "Q8_0" else stored)  # rows of 48: no blocks of 32


INCOMPATIBLE = [
    (("dinov2", "llama"), {}, ["model_type=dinov2: possible is siglip_vision_model"]),
    (("clip", "llama"), {"layer": -2}, ["model_type=clip_vision_model: llama.cpp's LLaVA drops the first patch"]),
    (("siglip", "llama"), {"connector": "resampler"}, ["model.connector.type=resampler: possible are mlp, ldp_v2"]),
    (
        ("siglip", "gemma2"),
        {"options": {"num_layers": 3, "activation": "silu", "input_norm": True}, "start": "<a>", "strategy": "patch"},
        ["num_layers=3", "activation=silu", "input_norm=true", "image_start_token=<a>", "query_pre_attn_scalar=256"],
    ),
    (
        ("siglip", "llama"),
        {"connector": "ldp_v2", "options": {"output_side": 2}},
        ["on a grid of 3 x 3: llama.cpp has 24 x 24"],
    ),
]


@pytest.mark.parametrize(("names", "options", "reasons"), INCOMPATIBLE, ids=str)
def test_what_llama_cpp_has_no_place_for(parts: Parts, tmp_path: Path, names: tuple, options: dict, reasons: list):
    saved(parts, tmp_path / "ours", *names, template="chatml", **options)
    words = ("export", str(tmp_path / "ours"), str(tmp_path / "out"), "--format", "gguf")
    said = refusal(*words)
    assert "does not fit --format gguf:\n  - " in said
    assert refusal(*words, "--check") == said
    assert [reason for reason in reasons if reason not in said] == []
    assert [file.name for file in tmp_path.iterdir()] == ["ours"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type=dynamic: possible",
        ),
        ({"hidden_act": "gelu"}, "a llama with hidden_act=gelu: llama.cpp has silu"),
    ],
)
def test_settings_of_a_language_model_that_llama_cpp_lacks(parts: Parts, tmp_path: Path, changes: dict, reason: str):
    checkpoint(parts, tmp_path / "ours", "siglip-llama", **changes)
    assert reason in refusal("export", str(tmp_path / "ours"), str(tmp_path / "out"), "--format", "gguf")


def test_positions_that_llama_3_scales(parts: Parts, tmp_path: Path):
    rope = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64, "rope_theta": 1e4,
    }  # fmt: skip
    checkpoint(parts, tmp_path / "ours", "siglip-llama", rope_parameters=rope)
    export_checkpoint(str(tmp_path / "ours"), tmp_path / "gguf", "gguf")
    _, tensors = read(tmp_path / "gguf" / "model.gguf")
    factors = tensors["rope_freqs.weight"]
    assert factors.shape == (8,)
    assert (factors[0], factors[-1]) == (pytest.approx(1.0), pytest.approx(8.0))


def test_a_value_too_large_for_float16_is_refused(llama: Path, tmp_path: Path):
    folder = tmp_path / "ours"
    folder.mkdir()
    for file in (llama / "ours").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    state = load_file(folder / "model.safetensors")
    state["language_model.model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="values that float16 cannot hold: choose --dtype bfloat16 or float32"):
        export_checkpoint(str(folder), tmp_path / "gguf", "gguf", dtype="float16")
    assert [file.name for file in tmp_path.iterdir()] == ["ours"]


@pytest.mark.parametrize("fault", ["tensor", "order", "merges"])
def test_a_wrong_file_is_refused(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str):
    """Nothing is left of it."""
    if fault == "tensor":
        encode = exporting.TensorFile.add
        monkeypatch.setattr(exporting.TensorFile, "add", lambda self, name, tensor: encode(self, name, tensor * 1.001))
    elif fault == "order":
        same = language_models.ARCHITECTURES["llama"]._replace(make_change=language_models._unchanged)
        monkeypatch.setitem(language_models.ARCHITECTURES, "llama", same)
    else:
        monkeypatch.setattr(exporting.tokenizer, "read_merges", lambda settings: settings["model"]["merges"][::-1])
    with pytest.raises(ValueError, match=r"that differs from|logits in GGUF differ|a tokenizer that gives other ids"):
        export_checkpoint(str(llama / "ours"), tmp_path / "gguf", "gguf")
    assert list(tmp_path.iterdir()) == []


needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None,
    reason="llama.cpp answers through the package xllamacpp, which is not installed",
)


def ask(folder: Path, processor: Any, image: Any) -> tuple[LlamaCpp, Answer, dict[int, float], Any]:
    """llama.cpp, its greedy answer to a question about an image, its first probabilities, and our inputs."""
    content = f"{processor.image_token}\nWhat is this?"
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    llama_cpp, file = LlamaCpp(folder, max_positions=256), io.BytesIO()
    image.save(file, "PNG")
    question = prompt.replace(processor.image_token, llama_cpp.media_mark)
    answer = llama_cpp.answer(question, [file.getvalue()], 8, ignore_end=True)
    first = llama_cpp.first_logprobs(question, [file.getvalue()])
    return llama_cpp, answer, first, processor(images=[image], text=prompt)


def largest_difference(model: Any, inputs: Any, first: dict[int, float]) -> float:
    """Between the logarithms of the likeliest first tokens' probabilities."""
    with torch.no_grad():
        expected = model(**inputs).logits[0, -1].log_softmax(dim=-1)
    return max(abs(logprob - float(expected[token])) for token, logprob in first.items())


@needs_llama_cpp
@pytest.mark.parametrize("case", ["siglip-llama", "own-output-qwen3", "sentencepiece", "gemma3", "ldp-v2"])
def test_llama_cpp_answers_the_same(parts: Parts, tmp_path: Path, case: str):
    """An image of the encoder's size, which nobody resizes: prompt, likeliest first tokens, and the greedy answer."""
    _, processor = checkpoint(parts, tmp_path / "ours", case)
    model = open_checkpoint(tmp_path / "ours").load_model()  # with the changed settings
    export_checkpoint(str(tmp_path / "ours"), tmp_path / "gguf", "gguf")
    side = model.config.vision_config.image_size
    llama_cpp, answer, first, inputs = ask(tmp_path / "gguf", processor, picture(size=(side, side)))
    assert answer.num_prompt_tokens == inputs["input_ids"].shape[1]
    assert largest_difference(model, inputs, first) < 2e-3
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert answer.tokens == tokens[0, -8:].tolist()
    for text in ("What is this?", " two  blanks", "It's 1234567 o'clock.\n\n你好"):
        assert llama_cpp.tokenize(text) == processor.tokenize(text)[0]


@needs_llama_cpp
def test_the_verifier_asks_llama_cpp(llama: Path, tmp_path: Path):
    """About an image of the encoder's size, and without one."""
    opened = open_checkpoint(llama / "ours")
    reference = Reference(VisionLanguageModel(opened.load_model().eval(), opened.load_composed_processor()))
    file = io.BytesIO()
    picture(size=(24, 24)).save(file, "PNG")
    cases = [
        Case("image", (Turn("user", (ImageRef(content=file.getvalue()), "\nWhat is this?")),)),
        Case("text", (Turn("user", ("Say so.",)),)),
    ]
    request = Request(llama / "ours", cases, cases, {}, tmp_path, max_new_tokens=1, export=llama / "gguf")
    observed = load_engine("gguf").observe(request)
    assert observed.is_run
    for case in cases:
        ids = reference.inputs(case)["input_ids"]
        assert int(observed.outputs[case.name][NUM_IDS]) == ids.shape[1]
    assert observed.answers["text"] == reference.answer(cases[1], 1)


@needs_llama_cpp
def test_llama_cpp_renders_what_training_rendered(llama: Path):
    """Images before the text stand on a line of their own, though a client writes no line break."""
    llama_cpp = LlamaCpp(llama / "gguf", max_positions=256)
    pixel = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    rendered = llama_cpp.render([{"role": "user", "content": [pixel, {"type": "text", "text": "What?"}]}])
    processor = open_checkpoint(llama / "ours").load_composed_processor()
    expected = processor.apply_chat_template(
        [{"role": "user", "content": "<image>\nWhat?"}], add_generation_prompt=True
    )
    assert rendered.replace(llama_cpp.media_mark, "<image>") == expected


def pre_tokenizer(steps: tuple[object, ...]) -> dict[str, Any]:
    """The part of `tokenizer.json` that a key of `PATTERN_NAMES` describes."""
    has_pattern = str(steps[0]).startswith("(")
    parts: dict[object, dict[str, Any]] = {
        "digits": {"type": "Digits", "individual_digits": True},
        "bytes": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": not has_pattern},
    }
    pattern = {"type": "Split", "pattern": {"Regex": steps[0]}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [parts.get(step, pattern) for step in steps[:-1]]}


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("steps", tokenizer.PATTERN_NAMES, ids=list(tokenizer.PATTERN_NAMES.values()))
def test_llama_cpp_cuts_texts_as_the_tokenizer_does(llama: Path, tmp_path: Path, steps: tuple[object, ...]):
    (tmp_path / "ours").mkdir()
    for file in (llama / "ours").iterdir():
        (tmp_path / "ours" / file.name).write_bytes(file.read_bytes())
    values = json.loads((tmp_path / "ours" / "tokenizer.json").read_text())
    values["pre_tokenizer"], values["model"]["ignore_merges"] = pre_tokenizer(steps), steps[-1]
    (tmp_path / "ours" / "tokenizer.json").write_text(json.dumps(values))
    export_checkpoint(str(tmp_path / "ours"), tmp_path / "gguf", "gguf")
    settings, _ = read(tmp_path / "gguf" / "model.gguf")
    assert settings["tokenizer.ggml.pre"] == tokenizer.PATTERN_NAMES[steps]
    llama_cpp = LlamaCpp(tmp_path / "gguf", max_positions=256)
    processor = open_checkpoint(tmp_path / "ours").load_composed_processor()
    for text in tokenizer.TEXTS:
        assert llama_cpp.tokenize(text) == processor.tokenize(text)[0], text


@needs_llama_cpp
def test_llama_cpp_still_misreads_clip(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """If this fails, llama.cpp has put the class token in its place: CLIP no longer needs to be refused."""
    model, processor = saved(parts, tmp_path / "ours", "clip", "llama", layer=-2, template="chatml", image_mode="pad")
    monkeypatch.setattr(exporting, "find_incompatibilities", lambda config, processor: [])
    export_checkpoint(str(tmp_path / "ours"), tmp_path / "gguf", "gguf")
    _, _, first, inputs = ask(tmp_path / "gguf", processor, picture(size=(24, 24)))
    assert largest_difference(model, inputs, first) > 1e-2

    def put_class_last(module: Any, given: Any, tokens: torch.Tensor) -> torch.Tensor:
        bare, positions = tokens - module.position_embedding.weight, module.position_embedding.weight
        return torch.cat([bare[:, 1:], bare[:, :1]], dim=1) + positions

    model.visual_encoder.embeddings.register_forward_hook(put_class_last)  # rows behind the first are read as before
    assert largest_difference(model, inputs, first) < 2e-3
