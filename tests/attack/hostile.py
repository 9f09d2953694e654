"""Checkpoints as a stranger may write them: whole ones of each kind, and what is done to a copy of each.

None of the results may answer, but those that are marked harmless: each is refused by name. To attack a checkpoint in
another way, add a row to `hostile_files`, or to `hostile_settings.jsonl`.
"""

import shutil
from pathlib import Path

from peft import LoraConfig

from tests.attack import hostile_files, hostile_settings  # noqa: F401 - they fill the table
from tests.attack.mutations import MUTATIONS
from tests.families.tiny_families import save_family
from tests.tiny_parts import Parts
from vlm.assembly import adapter_folder
from vlm.assembly.adapter_base import WHOLE_CHECKPOINT, Base, make_source
from vlm.models import VLMForPrediction, VLMPredictionConfig

CASES = [(kind, name) for name, mutation in MUTATIONS.items() for kind in mutation.kinds]
"""Every hostile checkpoint: a kind, and the name of what is done to it."""


def save_whole(kind: str, folder: Path, parts: Parts) -> None:
    """Write a whole checkpoint of a kind; an adapter's base is beside it."""
    if kind == "family":
        save_family("llava-1.5", folder)
        return
    model, processor = parts.model(template="chatml")
    if kind == "prediction":
        head = {"name": "label", "task": "binary", "labels": ["no", "yes"], "loss": "bce"}
        model = VLMForPrediction(VLMPredictionConfig(body_config=model.config, heads=[head]), model)
    if kind == "adapter":
        base = folder.with_name("base")
        model.save_pretrained(base)
        processor.save_pretrained(base)
        layer = "language_model.model.layers.0.self_attn.q_proj"
        model.requires_grad_(False).add_adapter(LoraConfig(r=2, target_modules=[layer]))
        adapter_folder.save(model, folder, Base({WHOLE_CHECKPOINT: make_source(str(base), None)}))
    else:
        model.save_pretrained(folder)
    processor.save_pretrained(folder)


def save_hostile(kind: str, name: str, whole: Path, folder: Path) -> None:
    """Write a hostile checkpoint: a copy of a whole one of that kind, and what is done to it."""
    shutil.copytree(whole, folder)
    MUTATIONS[name].change(folder)
