"""Parts found in the model itself: they agree with what was written by hand, share nothing and leave nothing."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from vlm.config.schema import PARTS
from vlm.families.derive_parts import derive_parts
from vlm.families.installed import image_text_types
from vlm.families.meta_model import NotAFamilyError, build_meta_model
from vlm.families.parts import get_part_names
from vlm.models.vocabulary import find_vocabulary_head

LLAVA = {
    "visual_encoder": ("model.vision_tower.",),
    "connector": ("model.multi_modal_projector.", "model.image_newline", "model.vision_resampler."),
    "language_model": ("model.language_model.", "lm_head."),
}
QWEN = {
    "visual_encoder": ("model.visual.",),
    "connector": ("model.visual.merger.", "model.visual.deepstack_merger_list."),
    "language_model": ("model.language_model.", "lm_head."),
}
IDEFICS = {
    "visual_encoder": ("model.vision_model.",),
    "connector": ("model.connector.",),
    "language_model": ("model.text_model.", "lm_head."),
}
MLLAMA = {
    "visual_encoder": ("model.vision_model.",),
    "connector": (
        "model.multi_modal_projector.", *(f"model.language_model.layers.{i}." for i in (3, 8, 13, 18, 23, 28, 33, 38))
    ),
    "language_model": ("model.language_model.", "lm_head."),
}  # fmt: skip
IMAGES = "model.embed_tokens_extend.image_embed."
PHI4 = {
    "visual_encoder": ("model.embed_tokens_extend.",),
    "connector": (
        f"{IMAGES}img_projection_", f"{IMAGES}global_img_feature_extensor", f"{IMAGES}sub_img_feature_extensor",
    ),
    "language_model": ("model.", "lm_head."),
}  # fmt: skip
SELECTED = ("model.vision_tower.encoder.layers.23.", "model.vision_tower.post_layernorm.")
"""What CLIP's last but one hidden state does not depend on."""
BY_HAND: dict[str, tuple[dict[str, tuple[str, ...]], tuple[str, ...]]] = {
    "llava": (LLAVA, SELECTED),
    "llava_next": (LLAVA, SELECTED),
    "llava_next_video": (LLAVA, SELECTED),
    "llava_onevision": (LLAVA, ("model.vision_tower.post_layernorm.",)),
    "qwen2_vl": (QWEN, ()),
    "qwen2_5_vl": (QWEN, ()),
    "qwen3_vl": (QWEN, ()),
    "idefics3": (IDEFICS, ()),
    "smolvlm": (IDEFICS, ()),
    "internvl": (LLAVA, ()),
    "paligemma": (LLAVA, ()),
    "gemma3": (LLAVA, ("model.vision_tower.head.",)),
    "mllama": (MLLAMA, ()),
    "phi4_multimodal": (
        PHI4,
        ("model.embed_tokens_extend.audio_embed.", f"{IMAGES}img_processor.encoder.layers.26.",
         f"{IMAGES}img_processor.post_layernorm.", f"{IMAGES}img_processor.head."),
    ),
}  # fmt: skip
"""The parts of each family as people wrote them down, and what no answer about an image depends on."""

OF_EVERY_KIND = (
    "qwen3_5_moe", "gemma3n", "glm4v", "mistral3", "llama4", "lfm2_vl", "minicpmv4_6", "ovis2", "kimi_k25",
    "granite_docling", "fuyu", "janus",
)  # fmt: skip
OTHERS = [kind for kind in image_text_types() if kind not in (*OF_EVERY_KIND, *BY_HAND)]
REFUSED: dict[str, str] = {
    "blip": "names a vocabulary head",
    "florence2": "encoder-decoder",
    "gemma4": "no visual encoder and no connector",
    "gemma4_unified": "no visual encoder and no connector",
    "git": "no visual encoder",
    "idefics": "lies within its decoder",
    "mistral4": "no visual encoder",
    "pi0": "cannot generate text",
    "pix2struct": "encoder-decoder",
    "pp_formulanet": "encoder-decoder",
    "t5gemma2": "encoder-decoder",
    "udop": "encoder-decoder",
    "vision-encoder-decoder": "encoder-decoder",
    "evolla": "no model of this type",
}
"""Types that are no family, as their default configurations say, and what the reason is."""


def tensors(model: nn.Module) -> Iterator[str]:
    """The full names of parameters and buffers."""
    for named in (model.named_parameters(), model.named_buffers()):
        yield from (name for name, _ in named)


def longest(prefixes: Sequence[str], name: str) -> str | None:
    """The longest prefix of a name."""
    return max((prefix for prefix in prefixes if name.startswith(prefix)), key=len, default=None)


@pytest.mark.parametrize("kind", BY_HAND)
def test_derived_parts_are_those_that_were_written_by_hand(kind: str):
    config = CONFIG_MAPPING[kind]()
    names, (parts, unused) = get_part_names(config), BY_HAND[kind]
    by_prefix = {prefix: part for part, prefixes in parts.items() for prefix in prefixes}
    for name, _ in build_meta_model(config).named_parameters():
        assert names.part_of(name) == by_prefix[longest(list(by_prefix), name) or ""], name
        assert names.is_unused(name) == name.startswith(unused), name


def check_parts(kind: str) -> None:
    """Each tensor has one part, parts share no module, and embeddings and head are the language model's."""
    try:
        model = build_meta_model(CONFIG_MAPPING[kind]())
    except NotAFamilyError as error:
        pytest.skip(f"its default configuration builds no model: {error}")
    names = get_part_names(model.config)
    found = {name: names.part_of(name) for name in tensors(model)}
    assert set(found.values()) <= set(PARTS)
    assert found
    vocabulary = [model.get_input_embeddings(), find_vocabulary_head(model)]
    weights = {id(parameter) for layer in vocabulary for parameter in layer.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) in weights:
            assert found[name] == "language_model", name
    used = [name for name, _ in model.named_parameters() if not names.is_unused(name)]
    assert {"language_model"} < {found[name] for name in used}
    assert all(not names.is_unused(name) for name, part in found.items() if part == "language_model")


@pytest.mark.parametrize("kind", OF_EVERY_KIND)
def test_parts_are_disjoint_and_complete(kind: str):
    check_parts(kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", OTHERS)
def test_parts_of_every_installed_type_are_disjoint_and_complete(kind: str):
    if kind in REFUSED:
        with pytest.raises(NotAFamilyError, match=REFUSED[kind]):
            get_part_names(CONFIG_MAPPING[kind]())
    else:
        check_parts(kind)


@pytest.mark.parametrize("kind", ["git", "pix2struct", "mistral4", "pi0", "evolla"])
def test_what_is_no_decoder_only_vision_language_model_is_refused_with_the_reason(kind: str):
    with pytest.raises(NotAFamilyError, match=f"model_type={kind}: .*{REFUSED[kind]}"):
        get_part_names(CONFIG_MAPPING[kind]())


def test_a_model_without_images_is_refused():
    with pytest.raises(NotAFamilyError, match="model_type=llama: it has no visual encoder"):
        get_part_names(CONFIG_MAPPING["llama"]())
    config = CONFIG_MAPPING["gemma4"]()
    config.vision_config = None
    with pytest.raises(NotAFamilyError, match="has no visual encoder and no connector"):
        get_part_names(config)


def test_what_hears_is_frozen():
    names = get_part_names(CONFIG_MAPPING["gemma3n"]())
    assert names.part_of("model.audio_tower.x") == "visual_encoder"
    assert names.part_of("model.embed_audio.x") == "connector"
    assert names.is_unused("model.audio_tower.x")
    assert names.is_unused("model.embed_audio.x")
    assert not names.is_unused("model.embed_vision.x")


def test_a_merger_between_layers_of_the_encoder_stays_in_it():
    names = get_part_names(CONFIG_MAPPING["minicpmv4_6"]())
    assert names.part_of("model.vision_tower.vit_merger.linear_1.weight") == "visual_encoder"
    assert names.part_of("model.merger.x") == "connector"


class Body(PreTrainedModel):
    """A model with two parts whose encoder lies in its decoder."""

    config_class = PreTrainedConfig

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.language_model = nn.Module()
        self.tower = nn.Linear(2, 2)
        self.language_model.vision_tower = self.tower
        self.embed = nn.Embedding(3, 2)

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """The linear layer."""
        return self.tower

    def can_generate(self) -> bool:
        """Yes."""
        return True

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.embed

    get_output_embeddings = get_input_embeddings


def test_an_encoder_within_the_decoder_is_refused_but_by_exception():
    with torch.device("meta"):
        model = Body(PreTrainedConfig())
    with pytest.raises(NotAFamilyError, match="lies within its decoder"):
        derive_parts(model)
    parts = derive_parts(model, ["language_model.vision_tower.x"])
    assert parts.prefixes["language_model.vision_tower."] == "visual_encoder"
