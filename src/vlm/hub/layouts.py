"""Names of weights: ours, those of the original LLaVA, and those of transformers' LLaVA.

Imports nothing. Ours are the model's own: `visual_encoder.…`, `connector.…`, `image_newline.weight`,
`language_model.…`. Tables are read from the top; the first prefix that fits decides.
"""

PrefixPairs = tuple[tuple[str, str], ...]
"""Pairs of a foreign prefix and ours."""

FORMER_PREFIXES: PrefixPairs = (("visual_encoder.vision_model.", "visual_encoder."),)
"""Prefixes in checkpoints of ours that an earlier version saved after ZeRO-3."""

ORIGINAL_LLAVA_PREFIXES: PrefixPairs = (
    ("model.vision_tower.vision_tower.vision_model.", "visual_encoder."),
    ("model.vision_tower.vision_tower.", "visual_encoder."),
    ("model.mm_projector.", "connector."),
    ("model.image_newline", "image_newline.weight"),
    ("model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
"""The original LLaVA's, and of any language model in it."""

TRANSFORMERS_LLAVA_PREFIXES: PrefixPairs = (
    ("vision_tower.vision_model.", "visual_encoder."),
    ("vision_tower.", "visual_encoder."),
    ("model.vision_tower.vision_model.", "visual_encoder."),
    ("model.vision_tower.", "visual_encoder."),
    ("image_newline", "image_newline.weight"),
    ("model.image_newline", "image_newline.weight"),
    ("multi_modal_projector.linear_1.", "connector.layers.0."),
    ("multi_modal_projector.linear_2.", "connector.layers.2."),
    ("model.multi_modal_projector.linear_1.", "connector.layers.0."),
    ("model.multi_modal_projector.linear_2.", "connector.layers.2."),
    ("language_model.model.", "language_model.model."),
    ("language_model.lm_head.", "language_model.lm_head."),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
"""transformers' LLaVA's, also with tiles: on disk up to 4.51 and as we write it, and in memory since."""

CONNECTOR_PREFIXES = {"linear": "connector.linear.", "mlp": "connector.layers.", "identity": "connector."}
"""Connector type -> our prefix for `model.mm_projector.`."""

COMPUTED_BUFFER_SUFFIXES = (".inv_freq", ".position_ids")
"""Ends of names of buffers that older versions saved and that are computed now."""


def make_original_prefixes(connector: str) -> PrefixPairs:
    """Return the original LLaVA's prefixes, for a connector of one type."""
    return tuple(
        (theirs, CONNECTOR_PREFIXES[connector] if ours == "connector." else ours)
        for theirs, ours in ORIGINAL_LLAVA_PREFIXES
    )


def rename_to_ours(name: str, table: PrefixPairs) -> str | None:
    """Return our name for a foreign one; None where there is none."""
    return next((to + name.removeprefix(prefix) for prefix, to in table if name.startswith(prefix)), None)


def rename_to_foreign(name: str, table: PrefixPairs) -> str | None:
    """Return the foreign name for one of ours; None where there is none."""
    return next((prefix + name.removeprefix(to) for prefix, to in table if name.startswith(to)), None)
