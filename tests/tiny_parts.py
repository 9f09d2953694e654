"""Tiny parts of models, built on the spot: encoders, language models and tokenizers, saved as folders.

Nothing here has trained weights or comes from a hub. `ENCODERS`, `LANGUAGE_MODELS` and `CHAT_TEMPLATES` are the tables
that the contract tests loop over.
"""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLImageProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Siglip2Config,
    Siglip2ImageProcessor,
    Siglip2Model,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    TimmWrapperConfig,
    TimmWrapperModel,
)

from vlm.assembly.compose import build_model, compose
from vlm.config.model_schema import (
    ConnectorConfig,
    EncoderConfig,
    LanguageModelConfig,
    ModelConfig,
    VisualEncoderConfig,
)
from vlm.config.named import permit_names
from vlm.data.encoding.labels import read_template
from vlm.models import VLMForConditionalGeneration, VLMProcessor

IGNORE_INDEX = -100
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]

WIDTH = 32
"""Hidden size of every part, so that the identity connector fits."""

SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|begin_of_text|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|system|>", "<|user|>", "<|assistant|>",
    "<|end|>",
]  # fmt: skip
"""What the packaged templates and the templates below write."""

PROSE = [
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions.",
    "USER: what is in this picture? ASSISTANT: a red circle and a blue square",
    "system\nuser\nassistant\nthe cat sat on the mat. 1 2 3 4 5 6 7 8 9 0, there are 12 of them",
]  # fmt: skip


# Visual encoders


def save_clip(folder: Path) -> None:
    """CLIP: a CLS token and 9 patches, 3 layers."""
    config = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=24, patch_size=8
    )
    CLIPVisionModel(config).save_pretrained(folder)
    _clip_processor(24).save_pretrained(folder)


def save_siglip(folder: Path) -> None:
    """SigLIP: 9 patches, no CLS token, 3 layers."""
    config = SiglipVisionConfig(
        hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=24, patch_size=8
    )
    SiglipVisionModel(config).save_pretrained(folder)
    SiglipImageProcessor(size={"height": 24, "width": 24}).save_pretrained(folder)


def save_dinov2(folder: Path) -> None:
    """DINOv2: a CLS token and 4 patches, 3 layers."""
    config = Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=2, mlp_ratio=1, image_size=32, patch_size=8
    )
    Dinov2Model(config).save_pretrained(folder)
    _clip_processor(16).save_pretrained(folder)


def save_dinov2_with_registers(folder: Path) -> None:
    """DINOv2 with a CLS token, 2 registers and 4 patches, 3 layers."""
    config = Dinov2WithRegistersConfig(
        hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=2, mlp_ratio=1, image_size=32, patch_size=8,
        num_register_tokens=2,
    )  # fmt: skip
    Dinov2WithRegistersModel(config).save_pretrained(folder)
    _clip_processor(16).save_pretrained(folder)


def save_timm_vit(folder: Path) -> None:
    """A timm transformer: a CLS token and 4 patches, 3 layers."""
    sizes = {"img_size": 32, "embed_dim": WIDTH, "depth": 3, "num_heads": 2, "mlp_ratio": 1}
    _save_timm(folder, "test_vit", sizes)


def save_timm_convnet(folder: Path) -> None:
    """A timm convolutional network with batch norm: a feature map of 1 x 1, in 5 stages."""
    _save_timm(folder, "test_efficientnet", {})


def _save_timm(folder: Path, architecture: str, sizes: dict[str, Any]) -> None:
    """A timm model as the Hub holds it: its image processing is part of `config.json`."""
    config = TimmWrapperConfig(architecture=architecture, do_pooling=False, model_args=sizes)
    TimmWrapperModel(config).save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    values["label_names"] = []
    values["pretrained_cfg"] = {
        "input_size": [3, 32, 32], "interpolation": "bicubic", "crop_pct": 1.0,
        "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values))


def _clip_processor(side: int) -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


ENCODERS: dict[str, Callable[[Path], None]] = {
    "clip": save_clip,
    "siglip": save_siglip,
    "dinov2": save_dinov2,
    "dinov2_with_registers": save_dinov2_with_registers,
    "timm_vit": save_timm_vit,
    "timm_convnet": save_timm_convnet,
}


def save_siglip2_naflex(folder: Path) -> None:
    """SigLIP 2 with NaFlex, as the Hub has it: a model with a text tower, 3 layers."""
    shape = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = Siglip2Config(
        text_config={**shape, "vocab_size": 64, "max_position_embeddings": 16},
        vision_config={**shape, "patch_size": 8, "num_patches": 16},
    )
    Siglip2Model(config).save_pretrained(folder)
    Siglip2ImageProcessor(patch_size=8, max_num_patches=64).save_pretrained(folder)


def save_qwen2_5_vl(folder: Path) -> None:
    """A Qwen2.5-VL, of which the vision tower is read: 3 layers, two of them with windows of 4 x 4 patches."""
    text = {**SHAPE, "vocab_size": 64, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
    vision = {
        "depth": 3, "hidden_size": WIDTH, "intermediate_size": 48, "num_heads": 2, "patch_size": 8, "window_size": 32,
        "fullatt_block_indexes": [1], "out_hidden_size": WIDTH,
    }  # fmt: skip
    Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    Qwen2VLImageProcessor(patch_size=8).save_pretrained(folder)


def save_qwen3_vl(folder: Path) -> None:
    """A Qwen3-VL, of which the vision tower is read: 3 layers, interpolated positions, a deepstack merger."""
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    text = {**SHAPE, "vocab_size": 64, "head_dim": 16, "rope_parameters": rope}
    vision = {
        "depth": 3, "hidden_size": WIDTH, "intermediate_size": 48, "num_heads": 2, "patch_size": 8,
        "out_hidden_size": WIDTH, "num_position_embeddings": 16, "deepstack_visual_indexes": [1],
    }  # fmt: skip
    Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    Qwen2VLImageProcessor(patch_size=8).save_pretrained(folder)


def save_dinov3(folder: Path) -> None:
    """DINOv3: a CLS token, 2 registers, positions that are rotated, 3 layers."""
    config = DINOv3ViTConfig(
        hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=32,
        patch_size=8, num_register_tokens=2,
    )  # fmt: skip
    DINOv3ViTModel(config).save_pretrained(folder)
    _clip_processor(16).save_pretrained(folder)


NATIVE_ENCODERS: dict[str, Callable[[Path], None]] = {
    "siglip2_naflex": save_siglip2_naflex,
    "qwen2_5_vl": save_qwen2_5_vl,
    "qwen3_vl": save_qwen3_vl,
    "dinov2": save_dinov2,
    "dinov3": save_dinov3,
    "siglip": save_siglip,
}
"""Encoders that read images at native resolution; patches are 8 pixels wide."""

PREFIX_TOKENS = {"clip": 1, "siglip": 0, "dinov2": 1, "dinov2_with_registers": 3, "timm_vit": 1, "timm_convnet": 0}
"""CLS and register tokens of each encoder, known from its architecture."""

PATCHES = {"clip": 9, "siglip": 9, "dinov2": 4, "dinov2_with_registers": 4, "timm_vit": 4, "timm_convnet": 1}


# Language models

SHAPE: dict[str, Any] = {
    "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip


def save_llama(folder: Path) -> None:
    """A Llama whose embeddings are not tied."""
    _save_language_model(folder, LlamaForCausalLM, LlamaConfig, tie_word_embeddings=False)


def save_tied_llama(folder: Path) -> None:
    """A Llama with tied embeddings (SmolLM2)."""
    _save_language_model(folder, LlamaForCausalLM, LlamaConfig, tie_word_embeddings=True)


def save_qwen2(folder: Path) -> None:
    """A Qwen2 with tied embeddings."""
    _save_language_model(folder, Qwen2ForCausalLM, Qwen2Config, tie_word_embeddings=True)


def save_qwen3(folder: Path) -> None:
    """A Qwen3 whose embeddings are not tied."""
    _save_language_model(folder, Qwen3ForCausalLM, Qwen3Config, head_dim=16)


def save_gemma2(folder: Path) -> None:
    """A Gemma 2, which scales its inputs and caps its logits."""
    _save_language_model(folder, Gemma2ForCausalLM, Gemma2Config, head_dim=16, sliding_window=16)


def save_gemma3(folder: Path) -> None:
    """A Gemma 3, which scales its embeddings."""
    _save_language_model(folder, Gemma3ForCausalLM, Gemma3TextConfig, head_dim=16, sliding_window=16)


def save_mistral(folder: Path) -> None:
    """A Mistral."""
    _save_language_model(folder, MistralForCausalLM, MistralConfig, sliding_window=None)


def save_phi3(folder: Path) -> None:
    """A Phi-3."""
    _save_language_model(folder, Phi3ForCausalLM, Phi3Config)


def save_phi(folder: Path) -> None:
    """A Phi-2, whose vocabulary head has a bias."""
    _save_language_model(folder, PhiForCausalLM, PhiConfig)


def _save_language_model(folder: Path, model: Any, config: Any, **options: Any) -> None:
    tokenizer = byte_tokenizer("chatml")
    tokenizer.save_pretrained(folder)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    model(config(vocab_size=len(tokenizer), **SHAPE, **ids, **options)).save_pretrained(folder)


LANGUAGE_MODELS: dict[str, Callable[[Path], None]] = {
    "llama": save_llama,
    "tied_llama": save_tied_llama,
    "qwen2": save_qwen2,
    "qwen3": save_qwen3,
    "gemma2": save_gemma2,
    "gemma3": save_gemma3,
    "mistral": save_mistral,
    "phi3": save_phi3,
    "phi": save_phi,
}


# Tokenizers


def byte_tokenizer(template: str | None = None, *, bos: str | None = "<s>", eos: str = "<|im_end|>",
                   pad: str | None = "<|endoftext|>") -> PreTrainedTokenizerFast:  # fmt: skip
    """A byte-level BPE tokenizer that knows all special tokens of the packaged templates.

    Args:
        template: the name of a packaged template, which becomes its own; or the text of one.
        bos: its BOS token; None: it has none.
        eos: its EOS token.
        pad: its padding token.
    """
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL_TOKENS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    model.train_from_iterator(PROSE * 5, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, bos_token=bos, eos_token=eos, pad_token=pad)
    if template is not None:
        tokenizer.chat_template = template if "{" in template else read_template(template)
    return tokenizer


def save_sentencepiece(folder: Path) -> None:
    """A tokenizer as Vicuna's folder holds it: `tokenizer.model`, its settings, and nothing else.

    Llama's training settings: BPE, byte fallback, digits apart, no normalisation, white space kept, ids 0 to 2 for
    `<unk>`, `<s>` and `</s>`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROSE * 20), model_writer=model, model_type="bpe", vocab_size=480, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        allow_whitespace_only_pieces=True, add_dummy_prefix=True, hard_vocab_limit=False, minloglevel=2, num_threads=1,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    marks = {name: _added(token) for name, token in (("bos", "<s>"), ("eos", "</s>"), ("unk", "<unk>"))}
    settings = {
        "tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, "add_eos_token": False,
        "model_max_length": 2048, "padding_side": "right", "clean_up_tokenization_spaces": False,
        **{f"{name}_token": mark for name, mark in marks.items()},
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _added(content: str) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {"__type": AddedToken.__name__, "content": content, **flags}


def save_vicuna(folder: Path) -> None:
    """A Llama with a SentencePiece tokenizer and no chat template."""
    save_sentencepiece(folder)
    LlamaForCausalLM(LlamaConfig(vocab_size=480, bos_token_id=1, eos_token_id=2, **SHAPE)).save_pretrained(folder)


# Chat templates that tokenizers bring

QWEN25 = """
{%- if messages[0]['role'] == 'system' -%}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' -}}
{%- else -%}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) or message.role == 'assistant' -%}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

GEMMA2 = """
{{- bos_token -}}
{%- if messages[0]['role'] == 'system' -%}{{- raise_exception('System role not supported') -}}{%- endif -%}
{%- for message in messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
    {%- endif -%}
    {%- if message['role'] == 'assistant' -%}{%- set role = 'model' -%}
    {%- else -%}{%- set role = message['role'] -%}{%- endif -%}
    {{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""

LLAMA32 = """
{{- bos_token -}}
{%- if not date_string is defined -%}{%- set date_string = strftime_now('%d %b %Y') -%}{%- endif -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- set system_message = messages[0]['content'] | trim -%}{%- set messages = messages[1:] -%}
{%- else -%}{%- set system_message = '' -%}{%- endif -%}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\nToday Date: ' -}}
{{- date_string + '\\n\\n' + system_message + '<|eot_id|>' -}}
{%- for message in messages -%}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim -}}
    {{- '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
"""

QWEN3 = """
{%- if messages[0].role == 'system' -%}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' -}}
{%- endif -%}
{%- set ns = namespace(last_query=messages | length - 1) -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}{%- set ns.last_query = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
    {%- set content = message.content -%}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) -%}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' -}}
    {%- elif message.role == 'assistant' -%}
        {%- set reasoning = '' -%}
        {%- if '</think>' in content -%}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
        {%- endif -%}
        {%- if loop.index0 > ns.last_query -%}
            {%- if loop.last or reasoning -%}
                {{- '<|im_start|>assistant\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' -}}
                {{- content.lstrip('\\n') -}}
            {%- else -%}
                {{- '<|im_start|>assistant\\n' + content -}}
            {%- endif -%}
        {%- else -%}
            {{- '<|im_start|>assistant\\n' + content -}}
        {%- endif -%}
        {{- '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
    {%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}
"""


@dataclass(frozen=True)
class ChatTemplate:
    """A template, and what is known of it without reading our code.

    Attributes:
        text: its Jinja text.
        bos: the tokenizer's BOS token.
        end: what follows a reply.
        system: whether it takes a system turn.
        lead: what stands between the words that ask for a reply and the reply.
        trims: whether it cuts blanks off the ends of what people say.
    """

    text: str
    end: str
    bos: str = "<s>"
    system: bool = True
    lead: str = ""
    trims: bool = False


CHAT_TEMPLATES = {
    "chatml": ChatTemplate(read_template("chatml"), "<|im_end|>"),
    "gemma": ChatTemplate(read_template("gemma"), "<end_of_turn>"),
    "llama3": ChatTemplate(read_template("llama3"), "<|eot_id|>", "<|begin_of_text|>"),
    "mistral": ChatTemplate(read_template("mistral"), "</s>", lead=" "),
    "phi": ChatTemplate(read_template("phi"), "<|end|>"),
    "plain": ChatTemplate(read_template("plain"), "\n"),
    "v1": ChatTemplate(read_template("v1"), "</s>", lead=" "),
    "own-qwen2.5": ChatTemplate(QWEN25, "<|im_end|>"),
    "own-gemma2": ChatTemplate(GEMMA2, "<end_of_turn>", system=False, trims=True),
    "own-llama3.2": ChatTemplate(LLAMA32, "<|eot_id|>", "<|begin_of_text|>", trims=True),
    "own-qwen3": ChatTemplate(QWEN3, "<|im_end|>"),
}
"""Every packaged template by its name, and those that tokenizers bring."""


# What tests do with them


class Parts:
    """Folders of tiny parts, each made when it is first asked for."""

    def __init__(self, root: Path):
        self.root = root

    def encoder(self, name: str) -> Path:
        """The folder of a row of `ENCODERS` or `NATIVE_ENCODERS`."""
        return self._folder("encoder", name, {**NATIVE_ENCODERS, **ENCODERS}[name])

    def language_model(self, name: str) -> Path:
        """The folder of a row of `LANGUAGE_MODELS`, or of `vicuna`."""
        return self._folder("language_model", name, {**LANGUAGE_MODELS, "vicuna": save_vicuna}[name])

    def _folder(self, kind: str, name: str, save: Callable[[Path], None]) -> Path:
        folder = self.root / kind / name
        if not folder.exists():
            with torch.random.fork_rng():
                torch.manual_seed(0)
                save(folder)
        return folder

    def recipe(
        self, encoder: str = "clip", language_model: str = "llama", *, connector: str = "mlp",
        options: dict[str, Any] | None = None, layer: int | list[int] | None = None, strategy: str = "patch",
        start: str | None = None, end: str | None = None, image_size: int | None = None,
        extra_encoders: dict[str, dict[str, Any]] | None = None,
    ) -> ModelConfig:  # fmt: skip
        """The `model` section of a run on these parts; `extra_encoders` is encoder -> its other keys."""
        permit_names([connector])
        further = [EncoderConfig(str(self.encoder(name)), **keys) for name, keys in (extra_encoders or {}).items()]
        return ModelConfig(
            visual_encoder=VisualEncoderConfig(
                str(self.encoder(encoder)),
                feature_layer=layer,
                feature_strategy=strategy,
                image_size=image_size,
                extra_encoders=further,
            ),
            connector=ConnectorConfig(connector, options or {}),
            language_model=LanguageModelConfig(str(self.language_model(language_model))),
            image_start_token=start,
            image_end_token=end,
        )

    def processor(self, *names: str, template: str | None = None, image_mode: str | None = None,
                  **recipe: Any) -> VLMProcessor:  # fmt: skip
        """The processor of a composition, see `recipe`."""
        return compose(self.recipe(*names, **recipe), template, image_mode)[1]

    def model(self, *names: str, template: str | None = None, image_mode: str | None = None, seed: int = 0,
              **recipe: Any) -> tuple[VLMForConditionalGeneration, VLMProcessor]:  # fmt: skip
        """A model with its processor, in float32, see `recipe`."""
        wanted = self.recipe(*names, **recipe)
        config, processor = compose(wanted, template, image_mode)
        return build_model(wanted, config, processor, torch.float32, seed), processor


def picture(seed: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A picture of noise, `(width, height)` large."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def runs(labels: list[int]) -> list[list[int]]:
    """The stretches of supervised ids."""
    found: list[list[int]] = [[]]
    for label in labels:
        if label != IGNORE_INDEX:
            found[-1].append(label)
        elif found[-1]:
            found.append([])
    return [run for run in found if run]
