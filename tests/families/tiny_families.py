"""One tiny model with its processor for each family of the table, made on the spot: no network, no trained weights.

Templates are of each family's form, written for the tests.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
)
from transformers.models.gemma3 import Gemma3ImageProcessor, Gemma3Processor
from transformers.models.got_ocr2 import GotOcr2ImageProcessor
from transformers.models.idefics3 import Idefics3ImageProcessor, Idefics3Processor
from transformers.models.internvl import InternVLProcessor, InternVLVideoProcessor
from transformers.models.llava import LlavaProcessor
from transformers.models.llava_next import LlavaNextImageProcessor, LlavaNextProcessor
from transformers.models.llava_next_video import LlavaNextVideoProcessor, LlavaNextVideoVideoProcessor
from transformers.models.llava_onevision import (
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
)
from transformers.models.mllama import MllamaImageProcessor, MllamaProcessor
from transformers.models.paligemma import PaliGemmaProcessor
from transformers.models.phi4_multimodal import (
    Phi4MultimodalFeatureExtractor,
    Phi4MultimodalImageProcessor,
    Phi4MultimodalProcessor,
)
from transformers.models.qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor
from transformers.models.qwen3_vl import Qwen3VLProcessor, Qwen3VLVideoProcessor
from transformers.models.smolvlm import SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMVideoProcessor

LISTS = (
    "{{% for m in messages %}}<|{0}|>{{{{ m['role'] }}}}\n{{% for c in m['content'] %}}"
    "{{% if c['type'] == 'image' %}}{1}{{% elif c['type'] == 'video' %}}{3}{{% else %}}{{{{ c['text'] }}}}{{% endif %}}"
    "{{% endfor %}}{2}\n{{% endfor %}}"
    "{{% if add_generation_prompt %}}<|{0}|>assistant\n{{% endif %}}"
)
"""A template over lists of text, images and videos: (what begins a turn, an image, what ends a turn, a video)."""

IMAGES_FIRST = (
    "{% for m in messages %}<|turn|>{{ m['role'] }}\n"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'video') %}<video>\n{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] }}{% endfor %}<|end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
"""As LLaVA's: the images of a turn come first, its videos behind them."""

STRINGS = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""As Phi-4's: contents are strings with image tokens in them."""

TURN = LISTS.format("turn", "<image>", "<|end|>", "<video>")
SIDE = 16
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
          "image_size": SIDE, "patch_size": 4}  # fmt: skip
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 2048}  # fmt: skip


def tokenizer(template: str | None, *tokens: str, bos: str | None = None, **named: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with special tokens.

    Args:
        template: its chat template.
        tokens: special tokens beside those of the templates.
        bos: a token that it puts before every text.
        named: special tokens that it knows by name, such as `image_token`.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|turn|>", "<|user|>", "<|assistant|>", *tokens, *named.values()]
    model.add_special_tokens(list(dict.fromkeys([*special, *([bos] if bos else [])])))
    if bos:
        start = model.token_to_id(bos)
        model.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, start)]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token="<|end|>", pad_token="<|pad|>", bos_token=bos, extra_special_tokens=named,
        model_max_length=10_000,
    )  # fmt: skip
    made.chat_template = template
    return made


@dataclass(frozen=True)
class Tiny:
    """How one family is made.

    Attributes:
        model_type: its row of the table.
        processor: makes its processor.
        config: makes its configuration's keyword arguments, given the processor.
    """

    model_type: str
    processor: Callable[[], Any]
    config: Callable[[Any], dict[str, Any]]


def vocabulary(processor: Any) -> dict[str, Any]:
    """What a language model's configuration takes from the tokenizer."""
    words = processor.tokenizer
    return {"vocab_size": len(words), "pad_token_id": words.pad_token_id, "eos_token_id": words.eos_token_id,
            "bos_token_id": words.bos_token_id}  # fmt: skip


def llava_config(processor: Any, text: str = "llama", **more: Any) -> dict[str, Any]:
    """CLIP and a language model, as LLaVA-1.5 and 1.6 join them."""
    return {
        "vision_config": {"model_type": "clip_vision_model", "projection_dim": 16, **VISION},
        "text_config": {"model_type": text, **TEXT, **vocabulary(processor)},
        "image_token_index": processor.image_token_id, "image_seq_length": 16, "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default", **more,
    }  # fmt: skip


def siglip_config(processor: Any, text: str, **more: Any) -> dict[str, Any]:
    """SigLIP, all of whose tokens are patches, and a language model."""
    return {
        "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False, **VISION},
        "text_config": {"model_type": text, **TEXT, **vocabulary(processor)}, **more,
    }  # fmt: skip


def clip_processor() -> CLIPImageProcessor:
    """CLIP's, for small images."""
    return CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


PINPOINTS = [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]]


def llava_next_images() -> LlavaNextImageProcessor:
    """LLaVA-NeXT's, for small images."""
    return LlavaNextImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS
    )


def llava() -> LlavaProcessor:
    """LLaVA-1.5: a BOS token from the tokenizer, images first."""
    words = tokenizer(IMAGES_FIRST, bos="<s>", image_token="<image>")
    return LlavaProcessor(
        clip_processor(), words, patch_size=4, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=IMAGES_FIRST,
    )  # fmt: skip


def llava_next(kind: Any = LlavaNextProcessor, **more: Any) -> Any:
    """LLaVA-NeXT, and the one for videos."""
    words = tokenizer(IMAGES_FIRST, bos="<s>", image_token="<image>", video_token="<video>")
    return kind(
        image_processor=llava_next_images(), tokenizer=words, patch_size=4, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=IMAGES_FIRST, **more,
    )  # fmt: skip


def llava_next_video() -> LlavaNextVideoProcessor:
    """LLaVA-NeXT-Video."""
    sizes = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    return llava_next(LlavaNextVideoProcessor, video_processor=LlavaNextVideoVideoProcessor(**sizes))


def llava_onevision() -> LlavaOnevisionProcessor:
    """LLaVA-OneVision."""
    size = {"height": SIDE, "width": SIDE}
    return LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=PINPOINTS), tokenizer(TURN, "<image>", "<video>"),
        LlavaOnevisionVideoProcessor(size=size), num_image_tokens=16, vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_4", chat_template=TURN,
    )  # fmt: skip


QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QWEN = LISTS.format(
    "turn", "<|vision_start|><|image_pad|><|vision_end|>", "<|end|>", "<|vision_start|><|video_pad|><|vision_end|>"
)


def qwen(kind: Any, video: Any = Qwen2VLVideoProcessor, patch: int = 4) -> Any:
    """Qwen2-VL and those after it: images of any size."""
    sizes = {"patch_size": patch, "temporal_patch_size": 2, "merge_size": 2,
             "size": {"shortest_edge": 8 * 8, "longest_edge": 32 * 32}}  # fmt: skip
    return kind(Qwen2VLImageProcessor(**sizes), tokenizer(QWEN, *QWEN_TOKENS), video(**sizes), chat_template=QWEN)


def qwen_ids(processor: Any) -> dict[str, int]:
    """The ids that a Qwen-VL configuration names."""
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    return dict(zip(names, processor.tokenizer.convert_tokens_to_ids(list(QWEN_TOKENS)), strict=True))


def rope(*sections: int, **more: Any) -> dict[str, Any]:
    """Positions over time, height and width."""
    return {"rope_parameters": {"rope_type": "default", "mrope_section": list(sections), "rope_theta": 1e4, **more}}


SPLIT = ("<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>",
         *(f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)))  # fmt: skip
IDEFICS_SIZES: dict[str, Any] = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": SIDE}}


def idefics3() -> Idefics3Processor:
    """Idefics3: images in rows and columns."""
    words = tokenizer(TURN, *SPLIT)
    return Idefics3Processor(Idefics3ImageProcessor(**IDEFICS_SIZES), words, image_seq_len=4, chat_template=TURN)


def smolvlm() -> SmolVLMProcessor:
    """SmolVLM, made as Idefics3 is."""
    sizes = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": SIDE}}
    video = SmolVLMVideoProcessor(size={"longest_edge": SIDE}, max_image_size={"longest_edge": SIDE})
    words = tokenizer(TURN, *SPLIT, "<video>")
    return SmolVLMProcessor(SmolVLMImageProcessor(**sizes), words, video, image_seq_len=4, chat_template=TURN)


def idefics_config(processor: Any, vision: str) -> dict[str, Any]:
    """Idefics3 and SmolVLM."""
    return {
        "vision_config": {"model_type": vision, **VISION}, "scale_factor": 2,
        "text_config": {"model_type": "llama", **TEXT, **vocabulary(processor)},
        "image_token_id": processor.image_token_id, "pad_token_id": processor.tokenizer.pad_token_id,
    }  # fmt: skip


INTERNVL = LISTS.format("turn", "<IMG_CONTEXT>\n", "<|end|>", "<video>\n")


def internvl() -> InternVLProcessor:
    """InternVL: tiles, a thumbnail last."""
    size = {"height": SIDE, "width": SIDE}
    words = tokenizer(
        INTERNVL, start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )  # fmt: skip
    images = GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=4)
    video = InternVLVideoProcessor(size=size)
    return InternVLProcessor(images, words, video, image_seq_length=4, chat_template=INTERNVL)


def paligemma() -> PaliGemmaProcessor:
    """PaliGemma, which brings no chat template."""
    images = SiglipImageProcessor(size={"height": SIDE, "width": SIDE})
    images.image_seq_length = 16
    return PaliGemmaProcessor(images, tokenizer(None, bos="<bos>", image_token="<image>"))


GEMMA3 = "{{ bos_token }}" + LISTS.format("turn", "<start_of_image>", "<|end|>", "")


def gemma3() -> Gemma3Processor:
    """Gemma 3: a fixed number of tokens between marks."""
    words = tokenizer(
        GEMMA3, bos="<bos>", boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>"
    )
    images = Gemma3ImageProcessor(size={"height": SIDE, "width": SIDE})
    return Gemma3Processor(images, words, image_seq_length=4, chat_template=GEMMA3)


MLLAMA = "{{ bos_token }}" + LISTS.format("turn", "<|image|>", "<|end|>", "")


def mllama() -> MllamaProcessor:
    """Llama 3.2 Vision: images beside the text, seen through cross-attention."""
    words = tokenizer(MLLAMA, "<|image|>", "<|python_tag|>", bos="<|begin|>")
    images = MllamaImageProcessor(size={"height": SIDE, "width": SIDE}, max_image_tiles=4)
    return MllamaProcessor(images, words, chat_template=MLLAMA)


def mllama_config(processor: Any) -> dict[str, Any]:
    """One layer of two attends to images."""
    return {
        "vision_config": {
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_global_layers": 1,
            "attention_heads": 2, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 4, "max_num_tiles": 4,
            "intermediate_layers_indices": [0, 1], "vision_output_dim": 48,
            "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
        },
        "text_config": {
            **TEXT, **vocabulary(processor), "vocab_size": processor.image_token_id, "cross_attention_layers": [1],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        "image_token_index": processor.image_token_id,
    }  # fmt: skip


def phi4() -> Phi4MultimodalProcessor:
    """Phi-4-multimodal: crops of a fixed size, contents as strings."""
    words = tokenizer(STRINGS, image_token="<|endoftext10|>", audio_token="<|endoftext11|>")
    images = Phi4MultimodalImageProcessor(size={"height": 448, "width": 448}, patch_size=14, dynamic_hd=2)
    return Phi4MultimodalProcessor(images, Phi4MultimodalFeatureExtractor(), words, chat_template=STRINGS)


def phi4_config(processor: Any) -> dict[str, Any]:
    """Its parts have no model types of their own."""
    return {
        **TEXT, **vocabulary(processor),
        "vision_config": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                          "image_size": 448, "crop_size": 448, "patch_size": 14, "feature_layer": -1,
                          "image_token_id": processor.image_token_id},
        "audio_config": {"hidden_size": 16, "intermediate_size": 16, "num_blocks": 1, "num_attention_heads": 2,
                         "ext_pw_out_channel": 16, "nemo_conv_channels": 16, "depthwise_separable_out_channel": 16,
                         "audio_token_id": processor.audio_token_id},
    }  # fmt: skip


def interleave() -> LlavaProcessor:
    """LLaVA-Interleave: LLaVA on SigLIP and Qwen2."""
    images = SiglipImageProcessor(size={"height": SIDE, "width": SIDE})
    return LlavaProcessor(
        images, tokenizer(TURN, "<image>"), patch_size=4, vision_feature_select_strategy="full",
        num_additional_image_tokens=0, chat_template=TURN,
    )  # fmt: skip


TINY: dict[str, Tiny] = {
    "llava-1.5": Tiny("llava", llava, llava_config),
    "llava-interleave": Tiny(
        "llava", interleave,
        lambda p: siglip_config(p, "qwen2", image_token_index=p.image_token_id, image_seq_length=16,
                                vision_feature_layer=-1, vision_feature_select_strategy="full"),
    ),
    "llava-next": Tiny("llava_next", llava_next, lambda p: llava_config(p, image_grid_pinpoints=PINPOINTS)),
    "llava-next-video": Tiny(
        "llava_next_video", llava_next_video,
        lambda p: llava_config(
            p, image_grid_pinpoints=PINPOINTS, video_token_index=p.tokenizer.convert_tokens_to_ids("<video>")
        ),
    ),
    "llava-onevision": Tiny(
        "llava_onevision", llava_onevision,
        lambda p: siglip_config(
            p, "qwen2", image_token_index=p.image_token_id, video_token_index=p.video_token_id,
            image_grid_pinpoints=PINPOINTS, vision_feature_layer=-1, vision_feature_select_strategy="full",
            vision_aspect_ratio="anyres_max_4",
        ),
    ),
    "qwen2-vl": Tiny(
        "qwen2_vl", lambda: qwen(Qwen2VLProcessor),
        lambda p: {
            "text_config": {**TEXT, **vocabulary(p), **rope(2, 1, 1)}, **qwen_ids(p),
            "vision_config": {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2,
                              "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2},
        },
    ),
    "qwen2.5-vl": Tiny(
        "qwen2_5_vl", lambda: qwen(Qwen2_5_VLProcessor),
        lambda p: {
            "text_config": {**TEXT, **vocabulary(p), **rope(2, 1, 1)}, **qwen_ids(p),
            "vision_config": {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2,
                              "out_hidden_size": 32, "patch_size": 4, "spatial_merge_size": 2,
                              "temporal_patch_size": 2, "window_size": 16, "fullatt_block_indexes": [1]},
        },
    ),
    "qwen3-vl": Tiny(
        "qwen3_vl", lambda: qwen(Qwen3VLProcessor, Qwen3VLVideoProcessor),
        lambda p: {
            "text_config": {**TEXT, **vocabulary(p), "head_dim": 8, **rope(2, 1, 1, mrope_interleaved=True)},
            **qwen_ids(p),
            "vision_config": {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2,
                              "out_hidden_size": 32, "patch_size": 4, "spatial_merge_size": 2,
                              "temporal_patch_size": 2, "num_position_embeddings": 16,
                              "deepstack_visual_indexes": [0]},
        },
    ),
    "idefics3": Tiny("idefics3", idefics3, lambda p: idefics_config(p, "idefics3_vision")),
    "smolvlm": Tiny("smolvlm", smolvlm, lambda p: idefics_config(p, "smolvlm_vision")),
    "internvl": Tiny(
        "internvl", internvl,
        lambda p: {
            "text_config": {"model_type": "qwen2", **TEXT, **vocabulary(p)},
            "vision_config": {**VISION, "image_size": [SIDE, SIDE], "patch_size": [4, 4]},
            "image_token_id": p.image_token_id, "image_seq_length": 4, "downsample_ratio": 0.5,
        },
    ),
    "paligemma": Tiny(
        "paligemma", paligemma,
        lambda p: siglip_config(p, "gemma", image_token_index=p.image_token_id, projection_dim=32, hidden_size=32),
    ),
    "gemma3": Tiny(
        "gemma3", gemma3,
        lambda p: {
            "text_config": {**TEXT, **vocabulary(p), "head_dim": 8, "sliding_window": 64,
                            "layer_types": ["sliding_attention", "full_attention"]},
            "vision_config": {"model_type": "siglip_vision_model", **VISION},
            "mm_tokens_per_image": 4, "image_token_index": p.tokenizer.image_token_id,
            "boi_token_index": p.tokenizer.boi_token_id, "eoi_token_index": p.tokenizer.eoi_token_id,
        },
    ),
    "mllama": Tiny("mllama", mllama, mllama_config),
    "phi4-multimodal": Tiny("phi4_multimodal", phi4, phi4_config),
}  # fmt: skip
"""Every family, and each kind of parts that one comes with."""
UNPACKED = ("paligemma", "gemma3", "mllama")
"""Those whose masks keep no samples of a packed row apart: PaliGemma sees prefixes whole, Gemma 3 images, by types of
tokens; Llama 3.2 Vision says for whole rows which token attends to which image."""


def save_family(name: str, folder: Path) -> None:
    """A tiny model with its processor, as its authors would have published it."""
    made = TINY[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        processor = made.processor()
        config = CONFIG_MAPPING[made.model_type](**made.config(processor))
        kinds = AutoModelForImageTextToText, AutoModelForCausalLM
        auto: Any = next(kind for kind in kinds if type(config) in kind._model_mapping)
        model = auto.from_config(config)
        for key, weight in model.named_parameters():
            if key.endswith("gate"):  # they begin closed, and what lies behind a closed one gets no gradient
                torch.nn.init.constant_(weight, 0.5)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
