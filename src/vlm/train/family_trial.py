"""The trial of a run's family, before its weights load: rank 0 makes the proofs, all ranks hear of them."""

import logging
import time
from collections.abc import Iterable, Sequence

from transformers import PreTrainedConfig

from vlm.assembly.family_trial.kept import check_verdicts, check_video_verdict, recall_or_try
from vlm.assembly.family_trial.verdicts import State, Verdict, Verdicts
from vlm.assembly.logit_proofs import model_label
from vlm.config.schema import RunConfig
from vlm.data.cache import resolve_cache_folder
from vlm.data.dataset import SampleDataset
from vlm.data.processor import Processor
from vlm.data.stream import SampleStream
from vlm.families.processing import FamilyProcessor
from vlm.train.distributed import on_rank0

log = logging.getLogger(__name__)


def check_family(
    config: RunConfig, model_config: PreTrainedConfig, processor: Processor, packing: Sequence[str] = ("packing",)
) -> Verdicts:
    """Refuse a run whose model is of a family that fails its trial; every rank calls it. Composed models pass.

    Returns:
        The verdicts, of which `check_videos` takes one, and `read_unused` what no reply depends on; none of a composed
        model.

    Args:
        config: the run's configuration.
        model_config: the configuration of its model, without prediction heads.
        processor: the run's processor.
        packing: the proofs that packed rows need.

    Raises:
        ValueError: see `check_verdicts`.
    """
    if not isinstance(processor, FamilyProcessor):
        return {}

    def try_it() -> dict[str, Verdict]:
        """Make the proofs, or recall them, and log what came of them."""
        started = time.monotonic()
        verdicts, known = recall_or_try(
            model_config,
            processor,
            resolve_cache_folder(config.dataset.cache_dir),
            trust_remote_code=config.model.trust_remote_code,
            attention="eager" if config.model.attn_implementation == "eager" else None,
        )
        proved = [name for name, verdict in verdicts.items() if verdict.state is State.PROVED]
        effort = "known from an earlier trial" if known else f"in {time.monotonic() - started:.1f} s"
        log.info("Proved for %s, on a small model (%s): %s", model_config.model_type, effort, ", ".join(proved) or "-")
        for name, verdict in verdicts.items():
            if verdict.state is not State.PROVED or verdict.reason:
                log.info("  %s: %s", name, verdict)
        return verdicts

    verdicts = on_rank0(try_it)
    label = _make_label(config, model_config)
    check_verdicts(verdicts, label, unproved=config.model.unproved, packing=packing if config.trainer.packing else ())
    return verdicts


def check_videos(
    config: RunConfig,
    model_config: PreTrainedConfig,
    verdicts: Verdicts,
    records: Iterable[SampleDataset | SampleStream],
) -> None:
    """Refuse a run whose records have videos where the family's trial did not prove those; every rank calls it.

    Args:
        config: the run's configuration.
        model_config: the configuration of its model.
        verdicts: those of `check_family`.
        records: the run's records.

    Raises:
        ValueError: see `check_video_verdict`.
    """
    with_videos = [dataset for dataset in records if dataset.has_videos]
    if not with_videos:
        return
    streams = all(isinstance(dataset, SampleStream) for dataset in with_videos)
    told = (
        "records of a stream may have videos (dataset.streaming=false finds out)" if streams else "records have videos"
    )
    check_video_verdict(verdicts, _make_label(config, model_config), told, unproved=config.model.unproved)


def _make_label(config: RunConfig, model_config: PreTrainedConfig) -> str:
    return f"{model_label(config)} (model_type={model_config.model_type})"
