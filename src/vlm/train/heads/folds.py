"""Cross-validation of heads: their outputs for records that they were not trained on."""

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from torch.utils.data import Dataset

from vlm.assembly.model_kinds import is_prediction_model
from vlm.data.heads.dataset import HeadDataset
from vlm.train.heads.model import reset_heads
from vlm.train.heads.outputs import HeadOutputs, collect_outputs, concatenate_outputs
from vlm.train.make_trainer import make_trainer
from vlm.train.model import prepare
from vlm.train.objectives.base import Objective, PreparedRun, RunData

log = logging.getLogger(__name__)


def predict_out_of_fold(
    objective: Objective,
    run: PreparedRun,
    folds: Sequence[tuple[HeadDataset, HeadDataset]],
    read: Callable[[HeadDataset], Dataset[object]],
) -> dict[str, HeadOutputs]:
    """Train fresh heads on each fold and return their outputs for its held-out records: head -> all records.

    Afterwards the heads of `run.model` are fresh again, and `run.parts` holds them. A fold is what trains and what is
    held out; `read` makes a trainer's data set of samples, see `feature_cache.heads.make_feature_reader`.
    """
    model = run.model
    assert is_prediction_model(model)
    rebuild_parts = partial(prepare, model, objective.config, run.args, run.processor)
    initial_state = copy.deepcopy(model.heads.state_dict())
    head_outputs: list[dict[str, HeadOutputs]] = []
    for number, (rest, held_out) in enumerate(folds):
        log.info("Fold %d of %d", number + 1, len(folds))
        folder = run.folder / "folds" / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        args = copy.copy(run.args)
        args.output_dir, args.report_to = str(folder), []
        args.eval_strategy = args.save_strategy = "no"  # a fold is neither saved nor evaluated while it trains
        reset_heads(model, initial_state)
        data = RunData(read(rest), None, {"train": rest.dataset})
        trainer = make_trainer(objective, replace(run, args=args, parts=rebuild_parts(), data=data))
        run.args.deepspeed_plugin = None  # accelerate keeps that of the first trainer, and refuses it to all others
        trainer.train()
        head_outputs.append(collect_outputs(trainer, read(held_out)))
    reset_heads(model, initial_state)
    run.parts = rebuild_parts()
    return {
        head.name: concatenate_outputs([fold[head.name] for fold in head_outputs]) for head in model.config.settings
    }
