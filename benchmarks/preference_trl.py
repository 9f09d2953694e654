"""Losses and gradients of preferences beside those of TRL's trainers, on one tiny model and the same batches of ids.

TRL is no dependency. In an environment that has this package and TRL beside it:

    uv pip install --target FOLDER --no-deps trl==1.16.0
    PYTHONPATH=FOLDER:src:. .venv/bin/python -m benchmarks.preference_trl

For each loss that TRL's `DPOTrainer` and `KTOTrainer` have, it prints both losses, and the largest difference of a
gradient over the largest gradient. `docs/preference.md` has the figures.
"""

import copy
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from tabulate import tabulate
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.families.tiny_families import save_family
from vlm.config.preference_schema import PreferenceOptions
from vlm.data.encoding.preference import CHOSEN, MISMATCHED, REJECTED
from vlm.models.text_loss import SupervisedScores
from vlm.train.preference.losses import estimate_divergence, record_losses
from vlm.train.preference.scores import score_batch

PAIRS = 4
FAMILY = "llava-onevision"
DPO_LOSSES: dict[str, dict[str, Any]] = {
    "dpo": {"loss_type": "sigmoid"},
    "ipo": {"loss_type": "ipo"},
    "hinge": {"loss_type": "hinge"},
    "robust": {"loss_type": "robust", "label_smoothing": 0.2},
    "apo_zero": {"loss_type": "apo_zero"},
}
"""Our loss -> the arguments of TRL's `DPOConfig` for the same."""


def make_models(folder: Path) -> tuple[Any, Any, Any]:
    """Return a tiny model, another one of the same shape as its reference, and their processor."""
    save_family(FAMILY, folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    reference = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model, reference, AutoProcessor.from_pretrained(folder)


def make_records() -> list[dict[str, Any]]:
    """Return pairs about images of one colour."""
    colours = ("red", "blue", "green", "white")
    return [
        {
            "images": [Image.new("RGB", (40 + 4 * number, 36), colour)],
            "prompt": [{"role": "user", "content": f"what is it? {number}"}],
            "chosen": [{"role": "assistant", "content": f"a {colour} square" * (1 + number % 2)}],
            "rejected": [{"role": "assistant", "content": "nothing" * (1 + number)}],
        }
        for number, colour in enumerate(colours)
    ]


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    """Return the gradient of each parameter."""
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def as_inputs(batch: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return ids, mask and labels of a batch of TRL's."""
    ids, mask = batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"]
    labels = ids.masked_fill(batch[f"{prefix}completion_mask"] == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def our_loss(model: Any, reference: Any, inputs: dict[str, Any], options: PreferenceOptions) -> Tensor:
    """Return our loss of a batch, whose rows have roles and records."""
    sides, _, _ = score_batch(SupervisedScores(model), inputs)
    with torch.no_grad():
        known = score_batch(SupervisedScores(reference), inputs)[0].log_probs
    sides = replace(sides, reference=known)
    divergence = None
    if options.loss == "kto":
        total, number = estimate_divergence(sides)
        divergence = total / number
    return record_losses(sides, options, divergence).mean()


def compare(name: str, model: Any, theirs: Tensor, ours: Tensor) -> tuple[str, float, float, float]:
    """Return both losses, and the largest difference of a gradient over the largest gradient."""
    expected, found = gradients(model, theirs), gradients(model, ours)
    assert expected.keys() == found.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    difference = max(float((expected[key] - found[key]).abs().max()) for key in expected)
    return name, float(theirs.detach()), float(ours.detach()), difference / largest


def main() -> None:
    """Print the table."""
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer  # pyright: ignore[reportMissingImports] - see above

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model, reference, processor = make_models(Path(folder) / "model")
        common: dict[str, Any] = {
            "output_dir": folder, "per_device_train_batch_size": PAIRS, "use_cpu": True, "report_to": [], "beta": 0.3,
            "gradient_checkpointing": False, "bf16": False, "max_length": None, "disable_dropout": True,
        }  # fmt: skip
        for name, arguments in DPO_LOSSES.items():
            trainer = DPOTrainer(
                model, ref_model=reference, args=DPOConfig(**common, **arguments),
                train_dataset=Dataset.from_list(make_records()), processing_class=processor,
            )  # fmt: skip
            batch = next(iter(trainer.get_train_dataloader()))
            theirs = trainer.compute_loss(model, dict(batch))
            images = {key: value for key, value in batch.items() if key in ("pixel_values", "image_sizes")}
            inputs = as_inputs(batch) | images | {
                "roles": torch.tensor([CHOSEN] * PAIRS + [REJECTED] * PAIRS),
                "records": torch.arange(PAIRS).repeat(2), "record_index": torch.arange(PAIRS),
            }  # fmt: skip
            options = PreferenceOptions(loss=name, beta=0.3, label_smoothing=arguments.get("label_smoothing", 0.0))
            rows.append(compare(name, model, theirs, our_loss(model, reference, inputs, options)))
        records = [
            {"images": one["images"], "prompt": one["prompt"], "completion": one[("chosen", "rejected")[number % 2]],
             "label": number % 2 == 0}
            for number, one in enumerate(make_records())
        ]  # fmt: skip
        trainer = KTOTrainer(
            model, ref_model=reference, args=KTOConfig(**common, desirable_weight=1.5),
            train_dataset=Dataset.from_list(records), processing_class=processor,
        )  # fmt: skip
        batch = next(iter(trainer.get_train_dataloader()))
        theirs = trainer.compute_loss(model, dict(batch))
        rows.append(compare("kto", model, theirs, kto_loss(model, reference, batch)))
    print(tabulate(rows, ("loss", "TRL", "ours", "gradients")))


def kto_loss(model: Any, reference: Any, batch: dict[str, Any]) -> Tensor:
    """Return our loss of a batch of single replies, whose mismatched rows are behind them."""
    own, mismatched = as_inputs(batch), as_inputs(batch, "KL_")
    width = max(own["input_ids"].shape[1], mismatched["input_ids"].shape[1])
    fills = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    inputs: dict[str, Any] = {
        key: torch.cat([
            pad(rows[key], (0, width - rows[key].shape[1]), value=fill) for rows in (own, mismatched)
        ])
        for key, fill in fills.items()
    }  # fmt: skip
    for key in ("pixel_values", "image_sizes"):
        inputs[key] = torch.cat([batch[key]] * 2)
    number = len(batch["label"])
    roles = [CHOSEN if label else REJECTED for label in batch["label"]] + [MISMATCHED] * number
    inputs |= {
        "roles": torch.tensor(roles), "records": torch.arange(number).repeat(2), "record_index": torch.arange(number),
    }  # fmt: skip
    return our_loss(model, reference, inputs, PreferenceOptions(loss="kto", beta=0.3, desirable_weight=1.5))


if __name__ == "__main__":
    main()
