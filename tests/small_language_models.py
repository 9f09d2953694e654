"""Small configurations of every causal language model of transformers, from the defaults of their classes."""

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "word_embed_proj_dim", "embedding_size", "lru_width"), 32),
    **dict.fromkeys(
        (
            "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "moe_intermediate_size",
            "intermediate_size_mlp",
            "shared_expert_intermediate_size", "expert_ffn_hidden_size", "moe_shared_expert_intermediate_size",
            "shared_intermediate_size", "block_ff_dim", "dense_intermediate_size", "d_ff",
        ),
        48,
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_key_heads", "index_n_heads"), 2),
    **dict.fromkeys(("head_dim", "linear_key_head_dim", "linear_value_head_dim", "mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "top_k", "moe_k", "moe_topk", "num_experts_per_token", "moe_top_k"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "n_group", "topk_group"), 1),
    **dict.fromkeys(("first_k_dense_replace", "n_groups", "mamba_n_groups", "n_mamba_heads", "mamba_ngroups"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_head_dim", "chunk_size", "index_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "index_topk", "rotary_dim"), 8),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size", "time_step_rank", "mamba_dt_rank"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 512),
    "mamba_chunk_size": 16, "sliding_window": 16, "o_lora_rank": 8, "o_groups": 2, "num_dense_layers": 1,
    "zero_expert_num": 2,
}  # fmt: skip

PER_LAYER: dict[str, Any] = {
    "hidden_size_per_layer_input": 8, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16,
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "num_kv_shared_layers": 0,
}  # fmt: skip

OWN: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 64},
    "zamba2": {
        "mamba_headdim": 8, "n_mamba_heads": 8, "hybrid_layer_ids": [1], "attention_hidden_size": 64,
        "attention_head_dim": 32, "kv_channels": 16,
    },
    "bamba": {"attn_layer_indices": [1]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "nemotron_h": {"layers_block_type": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "ministral": {"head_dim": 16},
    "xlnet": {"d_head": 16},
    "zaya": {"num_experts_per_tok": 1},
    "nemotron": {"num_key_value_heads": 2},
    "codegen": {"n_head": 4, "rotary_dim": 4},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "bailing_hybrid": {"num_expert_group": 2, "linear_head_dim": 8, "linear_num_heads": 2},
}  # fmt: skip
"""Model type -> what its sizes need beside or in place of `SIZES`."""

TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def small_config(kind: str, **ids: int) -> PreTrainedConfig:
    """Return a small configuration of a language model; whatever transformers raises where its sizes do not fit.

    Args:
        kind: the model type.
        ids: `vocab_size`, and ids of special tokens.
    """
    if kind in ("gemma3n_text", "gemma4_text"):
        own = {"laurel_rank": 8, "activation_sparsity_pattern": [0.0, 0.0]} if kind == "gemma3n_text" else {}
        return CONFIG_MAPPING[kind](**PER_LAYER, **own, **ids, vocab_size_per_layer_input=ids["vocab_size"])
    config: Any = CONFIG_MAPPING[kind]().get_text_config(decoder=True)
    num_layers = getattr(config, "num_hidden_layers", None)
    changes: dict[str, Any] = {}
    for name, value in vars(config).items():
        if name in SIZES and isinstance(value, int | list) and not isinstance(value, bool):
            changes[name] = SIZES[name]
        elif isinstance(value, list) and num_layers and num_layers > 2 and len(value) == num_layers:
            kinds = list({str(each): each for each in value}.values())  # one of each kind
            changes[name] = (kinds * 2)[:2]
    if hasattr(config, "qk_rope_head_dim") and "head_dim" in changes and kind != "deepseek_v4":
        changes["head_dim"] = SIZES["qk_rope_head_dim"]
    for name, value in {**changes, **ids, **OWN.get(config.model_type, {})}.items():
        setattr(config, name, value)
    return type(config).from_dict(config.to_dict())
