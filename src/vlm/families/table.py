"""The table of families: usual names, packaged choices, and what cannot be found in a model or its processor.

Imports the standard library only. Every image-text model of transformers is a family, with or without a row: its parts
are derived in `derive_parts`, its inputs in `derive_inputs`. A row says what no rule finds, with the reason beside it.
Prefixes are those of `named_parameters()`; the longest match wins.
"""

from dataclasses import dataclass

CROSS_ATTENTION_LAYERS = "{cross_attention_layers}"
"""In a prefix: stands for each layer that the language model's configuration lists under that name."""

UNUSED_LAYERS = "{past_selected}"
"""In a prefix: stands for each of the visual encoder's layers past the selected one."""


@dataclass(frozen=True)
class Family:
    """One family of vision-language models; what is None is derived.

    Attributes:
        name: its usual name.
        choices: the packaged names of `model=…`.
        parts: part -> prefixes of its parameters, where `get_encoder` and `get_decoder` do not name its parts.
        connectors: prefixes of what belongs to the connector within another part.
        unused_prefixes: prefixes of parameters that no answer about an image depends on, besides derived ones.
        rows: inputs with one row for each sample, whatever its number of images; the others have one for each image,
            or for each of its patches.
        tokens: inputs with one value for each token, besides ids and mask.
        videos: whether it has a token for videos.
        joined: whether images and videos share inputs, in the order of the text.
        equal_num_frames: whether all videos of a batch must have the same number of frames.
        min_frames: the fewest frames of a video.
        video_template: the chat template of conversations with videos, where its own does not support them.
        template: the chat template where its processor has none.
        sees_media_together: whether each image and video of a conversation sees all others, later ones too.
        computes_all_logits: whether its code takes no mask `logits_to_keep`: logits of all positions are computed.
    """

    name: str
    choices: tuple[str, ...] = ()
    parts: dict[str, tuple[str, ...]] | None = None
    connectors: tuple[str, ...] = ()
    unused_prefixes: tuple[str, ...] = ()
    rows: tuple[str, ...] | None = None
    tokens: tuple[str, ...] | None = None
    videos: bool | None = None
    joined: bool | None = None
    equal_num_frames: bool | None = None
    min_frames: int | None = None
    video_template: str | None = None
    template: str | None = None
    sees_media_together: bool = False
    computes_all_logits: bool = False


COMPOSED_PARTS = {
    "visual_encoder": ("visual_encoder.",),
    "connector": ("connector.", "image_newline"),
    "language_model": ("language_model.",),
}
"""The parts of a composed model, in the same terms."""
COMPOSED_UNUSED_FORMS = tuple(
    f"language_model.model.{name}"
    for name in (
        "layers.*.self_attn.indexer.",  # chooses tokens for sparse attention, and a choice has no gradient
        "layers.*.mlp.expert_bias",  # shift the choice of experts, and are set otherwise
        "layers.*.mlp.gate.e_score_correction_bias",
        "layers.*.mlp.gate.moe_statics.",
        "z_L_init",  # a first state (HRM-Text)
    )
)
"""What the forms of a composed model's parameters begin with that get no gradient of a reply."""


PALIGEMMA_TEMPLATE = """\
{%- if messages | length > 2 -%}
    {{- raise_exception('PaliGemma knows one question and one answer') -}}
{%- endif -%}
{%- for item in messages[0]['content'] if item['type'] == 'image' -%}{{- '<image>' -}}{%- endfor -%}
{{- bos_token -}}
{%- for item in messages[0]['content'] if item['type'] == 'text' -%}{{- item['text'] | trim -}}{%- endfor -%}
{{- '\\n' -}}
{%- for message in messages[1:] -%}
    {%- for item in message['content'] -%}{{- item['text'] -}}{%- endfor -%}
    {{- eos_token -}}
{%- endfor -%}
"""
"""PaliGemma's own layout (Beyer et al. 2024, arXiv:2407.07726, section 3.2): images, prefix, line break, suffix."""

SMOLVLM_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% elif line['type'] == 'video' %}{{ '<video>' }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""The template with which SmolVLM's processor renders conversations with videos, whatever its own template."""

PHI4_IMAGES = "model.embed_tokens_extend.image_embed."
PHI4_PARTS = {
    "visual_encoder": ("model.embed_tokens_extend.",),
    "connector": tuple(
        PHI4_IMAGES + name for name in ("img_projection_", "global_img_feature_extensor", "sub_img_feature_extensor")
    ),
    "language_model": ("model.", "lm_head."),
}
"""Its encoders and projections are modules of its language model, which `get_decoder` names as a whole."""

FAMILIES: dict[str, Family] = {
    "llava": Family("LLaVA-1.5, LLaVA-Interleave", ("llava-1.5-7b", "llava-1.5-13b", "llava-interleave-0.5b")),
    "llava_next": Family("LLaVA-NeXT (1.6)", ("llava-next-7b", "llava-next-mistral-7b")),
    "llava_next_video": Family("LLaVA-NeXT-Video", ("llava-next-video-7b",)),
    "llava_onevision": Family("LLaVA-OneVision", ("llava-onevision-0.5b", "llava-onevision-7b")),
    "qwen2_vl": Family("Qwen2-VL", ("qwen2-vl-2b", "qwen2-vl-7b")),
    "qwen2_5_vl": Family("Qwen2.5-VL", ("qwen2.5-vl-3b", "qwen2.5-vl-7b")),
    "qwen3_vl": Family("Qwen3-VL", ("qwen3-vl-2b", "qwen3-vl-4b", "qwen3-vl-8b")),
    "idefics3": Family("Idefics3", ("idefics3-8b",)),
    "smolvlm": Family(
        "SmolVLM",
        ("smolvlm-256m", "smolvlm-500m", "smolvlm2-2.2b"),
        video_template=SMOLVLM_TEMPLATE,  # its processor takes this one, whatever its own is, where there are videos
    ),
    "internvl": Family(
        "InternVL",
        ("internvl3-1b", "internvl3-2b", "internvl3.5-1b", "internvl3.5-2b", "internvl3.5-4b", "internvl3.5-8b"),
    ),
    "paligemma": Family(
        "PaliGemma",
        ("paligemma-3b", "paligemma2-3b"),
        template=PALIGEMMA_TEMPLATE,  # its processor brings none
        tokens=("token_type_ids",),  # they tell its prefix from its reply, which its own call knows as a suffix
    ),
    "gemma3": Family("Gemma 3", ("gemma3-4b",)),
    "mllama": Family(
        "Llama 3.2 Vision",
        ("llama-3.2-11b-vision",),
        # Layers of the language model that attend to images: their module names do not tell them from the others.
        connectors=(f"model.language_model.layers.{CROSS_ATTENTION_LAYERS}.",),
    ),
    "phi4_multimodal": Family(
        "Phi-4-multimodal",
        ("phi4-multimodal",),
        parts=PHI4_PARTS,
        unused_prefixes=(
            "model.embed_tokens_extend.audio_embed.",
            f"{PHI4_IMAGES}img_processor.encoder.layers.{UNUSED_LAYERS}.",  # its key of the layer is its own
            f"{PHI4_IMAGES}img_processor.post_layernorm.",
            f"{PHI4_IMAGES}img_processor.head.",
        ),
    ),
    "janus": Family(
        "Janus",
        # What draws images is no part of an answer in text.
        unused_prefixes=("model.generation_embeddings.", "model.generation_aligner.", "model.generation_head."),
    ),
    "molmo2": Family(
        "Molmo2",
        ("molmo2-4b", "molmo2-8b"),
        sees_media_together=True,  # its mask puts all images of a row into one block
    ),
    "chameleon": Family(
        "Chameleon",
        computes_all_logits=True,  # it takes the logits of image codes away in tensors of three dimensions alone
    ),
    "nemotron_h_omni": Family(
        "Nemotron Nano Omni",
        videos=False,  # its processor reads the frames per second of all videos from one object, and refuses a list
        unused_prefixes=("vision_model.embeddings.video_patch_projection.",),  # what reads frames of videos
    ),
    # Names and packaged choices alone: nothing of these is an exception.
    "qwen3_vl_moe": Family("Qwen3-VL, mixture of experts", ("qwen3-vl-30b-a3b",)),
    "qwen3_5": Family("Qwen3.5", ("qwen3.5-4b", "qwen3.5-9b", "qwen3.5-27b")),
    "qwen3_5_moe": Family("Qwen3.5, mixture of experts", ("qwen3.5-35b-a3b",)),
    "gemma3n": Family("Gemma 3n", ("gemma3n-e2b", "gemma3n-e4b")),
    "gemma4": Family("Gemma 4", ("gemma4-e2b", "gemma4-e4b")),
    "gemma4_unified": Family("Gemma 4, without an encoder", ("gemma4-12b",)),
    "glm4v": Family("GLM-4.1V, GLM-4.6V-Flash", ("glm-4.1v-9b", "glm-4.6v-flash")),
    "glm4v_moe": Family("GLM-4.5V, GLM-4.6V", ("glm-4.5v", "glm-4.6v")),
    "glm_ocr": Family("GLM-OCR", ("glm-ocr",)),
    "mistral3": Family("Mistral Small 3, Ministral 3", ("mistral-small-3.1-24b", "ministral-3-3b", "ministral-3-8b")),
    "llama4": Family("Llama 4", ("llama-4-scout",)),
    "lfm2_vl": Family("LFM2-VL", ("lfm2-vl-450m", "lfm2-vl-1.6b")),
    "minicpmv4_6": Family("MiniCPM-V 4.6", ("minicpm-v-4.6",)),
    "ovis2": Family("Ovis2", ("ovis2-1b",)),
    "perception_lm": Family("PerceptionLM", ("perception-lm-1b", "perception-lm-3b")),
    "deepseek_ocr2": Family("DeepSeek-OCR 2", ("deepseek-ocr-2",)),
    "paddleocr_vl": Family("PaddleOCR-VL", ("paddleocr-vl",)),
    "lighton_ocr": Family("LightOnOCR", ("lighton-ocr-1b",)),
    "got_ocr2": Family("GOT-OCR2", ("got-ocr2",)),
    "hunyuan_vl": Family("HunyuanOCR", ("hunyuan-ocr",)),
    "emu3": Family("Emu3"),
}
"""`model_type` of `config.json` -> names and exceptions."""


def get_family(model_type: str) -> Family:
    """Return the row of a model type; a type without one has no exceptions, and its type is its name."""
    return FAMILIES.get(model_type, Family(model_type))
