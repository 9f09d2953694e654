"""Exporting to ONNX: encoder with connector, embeddings and language model as graphs, checked with onnxruntime."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime  # noqa: F401  # the export is refused before anything is written where it is missing
import onnxscript  # noqa: F401
import torch

from vlm.assembly.checkpoint import open_checkpoint
from vlm.assembly.model_kinds import is_composed_model
from vlm.assembly.round_trip import quiet_loading
from vlm.assembly.saving import reply_end_settings
from vlm.hub.folders import JsonObject, create_folder, read_json, write_json
from vlm.hub.onnx.graphs import write_graphs
from vlm.hub.onnx.session import OnnxModel
from vlm.hub.opening import OpenedCheckpoint, name_weights, refuse_incompatible
from vlm.hub.readback import Probe, State, find_differences, find_memory_shortage, make_probe
from vlm.models import VLMConfig, VLMForConditionalGeneration, VLMProcessor

NUM_TOKENS = 16
"""Length of the answers that are compared."""

STATE_FIELDS = ("state_size", "ssm_state_size", "mamba_d_state", "conv_L_cache", "linear_key_head_dim")
"""Settings of language models that keep something else than keys and values."""

PLAIN_KINDS = {"full_attention", "sliding_attention"}
"""Kinds of layers whose cache is keys and values."""


def export_onnx(opened: OpenedCheckpoint, out: Path, dtype: str | None = None) -> list[str]:
    """Write a checkpoint as three ONNX graphs in float32, with tokenizer and settings, and answer with them.

    Args:
        opened: the checkpoint.
        out: a new folder.
        dtype: None or `float32`.

    Returns:
        What differs from the checkpoint, as sentences.

    Raises:
        ValueError: a part has no graph, or the graphs give something else than the checkpoint.
    """
    if dtype not in (None, "float32"):
        raise ValueError(f"--dtype={dtype}: --format onnx is float32; onnxruntime's tools convert the graphs")
    name, checkpoint, config, processor = opened
    refuse_incompatible(name, "onnx", find_incompatibilities(config, processor))
    name_weights(name, checkpoint, config, (("", ""),))  # refuses weights that are not the model's
    if shortage := find_memory_shortage(checkpoint):
        raise ValueError(f"{name} cannot be traced here: {shortage}")
    with create_folder(out) as folder:
        with quiet_loading():
            model = open_checkpoint(checkpoint).load_model()
        assert is_composed_model(model)
        model = model.float().eval()
        model.set_attn_implementation("eager")
        probe = make_probe(processor)
        write_graphs(model, folder, tuple(probe.inputs["pixel_values"].shape[1:]))
        expected = _own_outputs(model, probe)
        del model
        gc.collect()
        _write_settings(opened, folder)
        graphs = OnnxModel(folder, config.image_token_id)
        if problems := list(find_differences(expected, _graph_outputs(graphs, probe))):
            raise ValueError(f"{name} was not exported: the graphs have {'; '.join(problems)}")
    return []


def find_incompatibilities(config: VLMConfig, processor: VLMProcessor) -> Iterator[str]:
    """Yield why a model cannot be exported."""
    if processor.anyres is not None:
        yield "model.anyres: joining tiles depends on image sizes, which a graph for one image cannot express"
    if processor.native is not None:
        yield "dataset.image_mode=native: images have different numbers of patches, and the graph of an image has one"
    if config.positions != "plain":
        yield f"model.language_model.positions={config.positions}: the graphs count positions in one dimension"
    if getattr(config.text_config, "hidden_size_per_layer_input", None):
        yield f"a language model of model_type={config.text_config.model_type}: it looks tokens up in each layer"
    text = config.text_config.to_dict()
    kinds = set(text.get("layer_types") or ()) - PLAIN_KINDS
    if kinds or any(text.get(field) for field in STATE_FIELDS):
        yield f"a language model of model_type={config.text_config.model_type}: its cache is not keys and values alone"
    parts = [getattr(config, name) for name in config.encoder_names] + [config.text_config]
    if any(part.to_dict().get("quantization_config") for part in parts):
        yield "quantised weights: export the checkpoint before they were quantised"
    if ":" in config.connector["type"]:
        yield f"model.connector.type={config.connector['type']}: exports do not load classes of your own"


@torch.no_grad()
def _own_outputs(model: VLMForConditionalGeneration, probe: Probe) -> State:
    pixels = probe.inputs["pixel_values"]
    logits = model(input_ids=probe.ids, **probe.inputs).logits
    text_logits = model(input_ids=probe.text_ids).logits
    assert logits is not None
    assert text_logits is not None
    settings: Any = {"max_new_tokens": NUM_TOKENS, "do_sample": False, "eos_token_id": None, "num_beams": 1}
    tokens = model.generate(
        input_ids=probe.ids, attention_mask=torch.ones_like(probe.ids), **probe.inputs, **settings, pad_token_id=0
    )
    answer = tokens[:, -NUM_TOKENS:]
    return {
        "image features": model.get_image_features(pixels),
        "logits": logits,
        "logits without an image": text_logits,
        "greedy answers": answer.float(),
    }


def _graph_outputs(graphs: OnnxModel, probe: Probe) -> State:
    ids, text_ids, pixels = probe.ids.numpy(), probe.text_ids.numpy(), probe.inputs["pixel_values"].float().numpy()
    logits, _ = graphs.decode(graphs.embed(ids, pixels), torch.ones_like(probe.ids).numpy())
    text_logits, _ = graphs.decode(graphs.embed(text_ids), torch.ones_like(probe.text_ids).numpy())
    answer = graphs.generate(ids, torch.ones_like(probe.ids).numpy(), pixels, NUM_TOKENS)
    outputs = {
        "image features": graphs.image_features(pixels),
        "logits": logits,
        "logits without an image": text_logits,
        "greedy answers": answer,
    }
    return {name: torch.from_numpy(values).float() for name, values in outputs.items()}


def _write_settings(opened: OpenedCheckpoint, folder: Path) -> None:
    """Write what a program needs besides the graphs; no code and no class of ours is named."""
    config, processor = opened.config, opened.processor
    values: JsonObject = config.to_dict()
    for key in ("auto_map", "recipe", "architectures", "_name_or_path"):
        values.pop(key, None)
    values |= {"image_token_index": config.image_token_id, "image_seq_length": processor.tokens_per_image}
    write_json(folder / "config.json", values)
    settings = read_json(opened.folder / "generation_config.json")
    ends = reply_end_settings(settings.get("eos_token_id"), settings.get("pad_token_id"), processor)
    write_json(folder / "generation_config.json", settings | ends)
    processor.tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(str(processor.chat_template), encoding="utf-8")
    steps = [image_processor.to_dict() for image_processor in processor.image_processors]
    own = {"image_mode": processor.image_mode, "alpha_background": processor.alpha_background}
    further = {"beside": steps[1:]} if len(steps) > 1 else {}
    write_json(folder / "preprocessor_config.json", {**steps[0], **own, **further})
