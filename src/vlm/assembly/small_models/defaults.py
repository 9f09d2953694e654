"""Default configurations of all types, with what the defaults of some classes lack."""

from transformers import AutoConfig, PreTrainedConfig

from vlm.assembly.small_models.fields import Fields, get_fields, get_head_width, is_list, walk
from vlm.assembly.small_models.image_codes import NUM_CODES

OPTIONS: dict[str, Fields] = {
    # encoders whose default patches are not those that the type's processor and connector are made for
    "aria": {"vision_config": {"model_type": "idefics3_vision", "image_size": 490, "patch_size": 14}},
    "aya_vision": {"vision_config": {"model_type": "siglip_vision_model", "image_size": 364, "patch_size": 14}},
    "gemma3": {"vision_config": {"model_type": "siglip_vision_model", "image_size": 224, "patch_size": 14},
               "mm_tokens_per_image": 64},
    "llama4": {"vision_config": {"hidden_size": 1408, "vision_output_dim": 4096}},
    "idefics3": {"vision_config": {"image_size": 364, "patch_size": 14}},
    "smolvlm": {"vision_config": {"image_size": 364, "patch_size": 14}},
    # encoders that the class leaves out
    "gemma4": {"vision_config": {}},
    "gemma4_unified": {"vision_config": {}},
    "perception_lm": {"vision_config": {
        "model_type": "timm_wrapper", "architecture": "vit_pe_core_large_patch14_336",
        "model_args": {"embed_dim": 1024, "depth": 23, "num_heads": 16, "global_pool": "", "img_size": [448, 448],
                       "init_values": 0.1, "ref_feat_shape": [32, 32],
                       "use_post_transformer_norm": False}},
        "projector_pooling_ratio": 2},
    # fewer codes of images, each of which is a token
    "chameleon": {"vq_config": {"num_embeddings": NUM_CODES}, "vocabulary_map": {}},
    "emu3": {"vq_config": {"codebook_size": NUM_CODES}, "vocabulary_map": {}},
    # fields without a default
    "deepseek_ocr2": {"text_config": {"num_experts_per_tok": 6}},
    "glm4v_moe": {"text_config": {"head_dim": 128}},
    "granite4_vision": {"vision_config": {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14},
                        "downsample_rate": "4/8", "deepstack_layer_map": [[-2, 0]]},
    "hunyuan_vl": {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0,
                                                       "mrope_section": [16, 16, 16, 16]}}},
    "paddleocr_vl": {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0,
                                                         "mrope_section": [16, 24, 24]}}},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 151652},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 151652},
    "qwen4_exp": {"text_config": {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256,
                                  "indexer_budget": 64, "indexer_compress_ratio": 16}},
    "step3p7": {"text_config": {"sliding_window": 512}},
}  # fmt: skip
"""A type -> options that its default configuration lacks; those of a processor follow them."""


UNSUPPORTED = {
    "blip": "its processor has no token for an image: the text decoder sees images through cross-attention alone",
    "blip-2": "its processor places the image before any text itself",
    "diffusion_gemma": "it denoises blocks of tokens: there is no next token to predict",
    "evolla": "it reads proteins, no images",
    "florence2": "an encoder-decoder, whose processor places the image before any text itself",
    "fuyu": "its processor places the image before any text itself, and lays batches out with its own padding",
    "git": "its processor has no token for an image: its features precede every text",
    "idefics": "its processor takes images between texts, and has no token for them in a text",
    "instructblip": "its processor places the image before any text itself",
    "instructblipvideo": "it reads videos, no images",
    "kosmos-2": "transformers maps no processor to it; its own marks images by a mask of positions",
    "kosmos-2.5": "transformers maps no processor to it; its own marks images by a mask of positions",
    "mistral4": "it reads text alone",
    "pi0": "it predicts movements of a robot, no text",
    "pix2struct": "an encoder-decoder, whose questions are drawn into the image",
    "pp_formulanet": "an encoder-decoder without a prompt",
    "shieldgemma2": "a classifier of images, without text to predict",
    "t5gemma2": "an encoder-decoder",
    "udop": "an encoder-decoder, whose processor needs a program for optical character recognition",
    "vision-encoder-decoder": "an encoder-decoder without a prompt",
}
"""Types of `AutoModelForImageTextToText` that cannot be trained on conversations about images -> the cause."""


def make_default(model_type: str) -> PreTrainedConfig:
    """Return the default configuration of a type, completed where its class leaves out what a checkpoint has."""
    config = AutoConfig.for_model(model_type, **OPTIONS.get(model_type, {}))
    for part in walk(config):
        _complete(part)
    return config


def _complete(config: PreTrainedConfig) -> None:
    """Set what checkpoints of any type have where their configuration has such a field at all."""
    fields = get_fields(config)
    head = get_head_width(fields)
    if "head_dim" in fields and fields["head_dim"] is None and head:
        config.head_dim = head
    kinds = fields.get("layer_types")
    if fields.get("mlp_layer_types", "") is None:
        config.mlp_layer_types = ["dense"] + ["sparse"] * (config.num_hidden_layers - 1)
    rope = fields.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    if not rope and is_list(kinds):
        config.rope_parameters = {str(kind): _add_sections(config, {**PLAIN_ROPE}, head) for kind in kinds}
    else:
        config.rope_parameters = _add_sections(config, rope, head)


PLAIN_ROPE: Fields = {"rope_type": "default", "rope_theta": 10_000.0}


def _add_sections(config: PreTrainedConfig, rope: Fields, head: int | None) -> Fields:
    """Return rotary parameters with a section for time, height and width, where a type's positions have three axes."""
    ignored = getattr(config, "ignore_keys_at_rope_validation", None) or ()
    if "mrope_section" not in ignored or "mrope_section" in rope or not head:
        return rope
    share = rope.get("partial_rotary_factor", 1.0)
    half = int(head * (share if isinstance(share, float) else 1.0)) // 2
    part = 5 * half // 16
    return {**rope, "mrope_section": [half - 2 * part, part, part]}
