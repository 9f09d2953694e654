"""The table of families: `model_type -> part -> parameter prefixes`, and the other properties of each.

Imports the standard library only. To add a family, add a row to `FAMILIES`: the contract tests then train it, save it
and load it again. Prefixes are those of `named_parameters()`; the longest match wins.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CROSS_ATTENTION_LAYERS = "{cross_attention_layers}"
"""In a prefix: stands for each layer that the language model's configuration lists under that name."""

UNUSED_LAYERS = "{past_selected}"
"""In a prefix: stands for each of the visual encoder's layers past the selected one."""


@dataclass(frozen=True)
class Family:
    """One family of vision-language models.

    Attributes:
        name: its usual name.
        parts: part -> prefixes of its parameters.
        choices: the packaged names of `model=…`.
        unused_prefixes: prefixes of parameters that no answer about an image depends on.
        rows: inputs with one row for each sample, whatever its number of images; the others have one for each image,
            or for each of its patches.
        tokens: inputs with one value for each token, besides ids and mask.
        videos: whether it has a token for videos.
        joined: whether images and videos share inputs, in the order of the text.
        equal_num_frames: whether all videos of a batch must have the same number of frames.
        min_frames: the fewest frames of a video.
        video_template: the chat template of conversations with videos, where its own does not support them.
        template: the chat template where its processor has none.
        supports_packing: whether it keeps the samples of a packed row apart (`trainer.packing`).
        grid_positions: whether tokens of images and videos have three positions, in time, height and width.
    """

    name: str
    parts: dict[str, tuple[str, ...]]
    choices: tuple[str, ...] = ()
    unused_prefixes: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    videos: bool = False
    joined: bool = False
    equal_num_frames: bool = False
    min_frames: int = 1
    video_template: str | None = None
    template: str | None = None
    supports_packing: bool = False
    grid_positions: bool = False


COMPOSED_FAMILY = Family(
    "composed",
    {
        "visual_encoder": ("visual_encoder.",),
        "connector": ("connector.", "image_newline"),
        "language_model": ("language_model.",),
    },
)
"""A composed model, in the same terms."""


def make_parts(
    visual_encoder: str, *connector: str, language_model: str = "model.language_model."
) -> dict[str, tuple[str, ...]]:
    """Return part -> prefixes, for a family whose vocabulary head is `lm_head`."""
    return {"visual_encoder": (visual_encoder,), "connector": connector, "language_model": (language_model, "lm_head.")}


LLAVA_PARTS = make_parts("model.vision_tower.", "model.multi_modal_projector.", "model.image_newline")
IDEFICS_PARTS = make_parts("model.vision_model.", "model.connector.", language_model="model.text_model.")
QWEN_PARTS = make_parts("model.visual.", "model.visual.merger.", "model.visual.deepstack_merger_list.")
CROSS_ATTENTION = f"model.language_model.layers.{CROSS_ATTENTION_LAYERS}."
PHI4_IMAGES = "model.embed_tokens_extend.image_embed."
PHI4_CONNECTOR = ("img_projection_", "global_img_feature_extensor", "sub_img_feature_extensor")

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

LLAVA_UNUSED_PREFIXES = (f"model.vision_tower.encoder.layers.{UNUSED_LAYERS}.", "model.vision_tower.post_layernorm.")

LLAVA = Family(
    "LLaVA-1.5, LLaVA-Interleave", LLAVA_PARTS, ("llava-1.5-7b", "llava-1.5-13b", "llava-interleave-0.5b"),
    unused_prefixes=LLAVA_UNUSED_PREFIXES, supports_packing=True,
)  # fmt: skip
LLAVA_VIDEO = replace(LLAVA, videos=True, equal_num_frames=True)
QWEN = Family(
    "Qwen2-VL", QWEN_PARTS, ("qwen2-vl-2b", "qwen2-vl-7b"), tokens=("mm_token_type_ids",), videos=True,
    supports_packing=True, grid_positions=True,
)  # fmt: skip
IDEFICS = Family(
    "Idefics3", IDEFICS_PARTS, ("idefics3-8b",), rows=("pixel_values", "pixel_attention_mask"), supports_packing=True
)
SMOLVLM = replace(IDEFICS, videos=True, joined=True, video_template=SMOLVLM_TEMPLATE)
GEMMA = Family("Gemma", LLAVA_PARTS, tokens=("token_type_ids",))

FAMILIES: dict[str, Family] = {
    "llava": LLAVA,
    "llava_next": replace(LLAVA, name="LLaVA-NeXT (1.6)", choices=("llava-next-7b", "llava-next-mistral-7b")),
    "llava_next_video": replace(LLAVA_VIDEO, name="LLaVA-NeXT-Video", choices=("llava-next-video-7b",)),
    "llava_onevision": replace(
        LLAVA_VIDEO, name="LLaVA-OneVision", choices=("llava-onevision-0.5b", "llava-onevision-7b")
    ),
    "qwen2_vl": QWEN,
    "qwen2_5_vl": replace(QWEN, name="Qwen2.5-VL", choices=("qwen2.5-vl-3b", "qwen2.5-vl-7b")),
    "qwen3_vl": replace(QWEN, name="Qwen3-VL", choices=("qwen3-vl-2b", "qwen3-vl-4b"), min_frames=2),
    "idefics3": IDEFICS,
    "smolvlm": replace(SMOLVLM, name="SmolVLM", choices=("smolvlm-256m", "smolvlm-500m", "smolvlm2-2.2b")),
    "internvl": Family(
        "InternVL", LLAVA_PARTS, ("internvl3-1b", "internvl3-2b"), videos=True, joined=True, supports_packing=True
    ),
    "paligemma": replace(
        GEMMA, name="PaliGemma", choices=("paligemma-3b", "paligemma2-3b"), template=PALIGEMMA_TEMPLATE
    ),
    "gemma3": replace(GEMMA, name="Gemma 3", choices=("gemma3-4b",), unused_prefixes=("model.vision_tower.head.",)),
    "mllama": Family(
        "Llama 3.2 Vision",
        make_parts("model.vision_model.", "model.multi_modal_projector.", CROSS_ATTENTION),
        ("llama-3.2-11b-vision",),
        rows=("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"),
        tokens=("cross_attention_mask",),
    ),
    "phi4_multimodal": Family(
        "Phi-4-multimodal",
        make_parts(
            "model.embed_tokens_extend.", *(PHI4_IMAGES + name for name in PHI4_CONNECTOR), language_model="model."
        ),
        ("phi4-multimodal",),
        unused_prefixes=(
            "model.embed_tokens_extend.audio_embed.",
            f"{PHI4_IMAGES}img_processor.encoder.layers.{UNUSED_LAYERS}.",
            f"{PHI4_IMAGES}img_processor.post_layernorm.",
            f"{PHI4_IMAGES}img_processor.head.",
        ),
        supports_packing=True,
    ),
}
"""`model_type` of `config.json` -> family."""


@dataclass(frozen=True)
class PartNames:
    """The parts of one model, by prefixes of its parameters (prefix -> part), and of those that get no gradient."""

    prefixes: dict[str, str]
    unused_prefixes: tuple[str, ...] = ()

    def part_of(self, name: str) -> str:
        """Return the part of a parameter or buffer, by its full name; the longest matching prefix wins.

        Raises:
            ValueError: no prefix matches.
        """
        matching = [prefix for prefix in self.prefixes if name.startswith(prefix)]
        if not matching:
            raise ValueError(f"{name}: begins with no prefix of a part; the table of families lacks it")
        return self.prefixes[max(matching, key=len)]

    def is_unused(self, name: str) -> bool:
        """Return whether no answer depends on a parameter."""
        return name.startswith(self.unused_prefixes)


def get_part_names(config: "PreTrainedConfig") -> PartNames:
    """Return the parts of a model, by its configuration; raise ValueError where its family is not in the table."""
    if config.model_type == "vlm_prediction":
        body = get_part_names(config.body_config)
        prefixes = {f"body.{prefix}": part for prefix, part in body.prefixes.items()}
        return PartNames({**prefixes, "heads.": "head"}, tuple(f"body.{prefix}" for prefix in body.unused_prefixes))
    if config.model_type == "vlm":
        family = COMPOSED_FAMILY
        unused = [f"visual_encoder.{name}" for name in config.unread_parameters]
    else:
        family = get_family(config.model_type)
        unused = _expand_prefixes(family.unused_prefixes, config)
    parts = {part: _expand_prefixes(prefixes, config) for part, prefixes in family.parts.items()}
    return PartNames({prefix: part for part, prefixes in parts.items() for prefix in prefixes}, tuple(unused))


def get_family(model_type: str) -> Family:
    """Return the family of a model type; raise ValueError where the table has none."""
    if model_type not in FAMILIES:
        raise ValueError(f"model_type={model_type} is no family of this framework; there are {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def _expand_prefixes(prefixes: Sequence[str], config: "PreTrainedConfig") -> Iterator[str]:
    for prefix in prefixes:
        if CROSS_ATTENTION_LAYERS in prefix:
            layers = config.get_text_config().cross_attention_layers
            yield from (prefix.replace(CROSS_ATTENTION_LAYERS, str(layer)) for layer in layers)
        elif UNUSED_LAYERS in prefix:
            yield from (prefix.replace(UNUSED_LAYERS, str(layer)) for layer in _unused_layers(config))
        else:
            yield prefix


def _unused_layers(config: "PreTrainedConfig") -> range:
    """Return the indices of the visual encoder's layers past the selected hidden state; state 0 precedes layer 0."""
    count = config.vision_config.num_hidden_layers
    phi = config.model_type == "phi4_multimodal"
    selected = config.vision_config.feature_layer if phi else config.vision_feature_layer
    highest = max(state % (count + 1) for state in ([selected] if isinstance(selected, int) else selected))
    return range(highest, count)
