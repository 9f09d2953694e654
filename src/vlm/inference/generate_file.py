"""A model's answers to a file of records, as a table: each record is asked up to its last reply."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlm.config.schema import InferenceConfig, SourceConfig
from vlm.data.cache import json_digest
from vlm.data.encoding.prompts import prompt_turns
from vlm.data.sample import PLACEHOLDER, VIDEO_PLACEHOLDER, BadSample, Sample, Turn
from vlm.inference.batch import fill_table, format_media_paths, prompt_source
from vlm.inference.generate import VisionLanguageModel
from vlm.inference.resumable_table import ResumableTable, check_output

COLUMNS = ("source", "image_path", "prompt", "answer", "reference", "error")
"""What a record calls itself, its images, its last question, what the model answers, the record's last reply (none
where it has none), and why it could not be asked (empty where it was)."""


def generate_file(
    model: VisionLanguageModel, config: SourceConfig, output: Path, settings: InferenceConfig, *, cache: Path,
    fingerprint: str, batch_size: int = 16, num_workers: int = 2, max_frames: int, seed: int | None = None,
    overwrite: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """Ask about every record of a file.

    Args:
        model: the model that is asked.
        config: the records and how they are read.
        output: a `.csv` or `.jsonl` file.
        settings: how answers are drawn.
        cache: where indices of records are kept.
        fingerprint: of the checkpoint, and of the form in which it is loaded.
        batch_size: records at a time.
        num_workers: processes that read and decode images.
        max_frames: of a video.
        seed: makes sampling repeatable, wherever it is stopped and gone on with; None: it is not.
        overwrite: whether what is there, or was begun, is replaced.

    Returns:
        All rows, with the keys `COLUMNS`.

    Raises:
        ValueError: the output is there already, or was begun with something else.
    """
    check_output(output, overwrite=overwrite)
    source = prompt_source(
        model.model, model.processor, config, cache=cache, max_frames=max_frames, answer_tokens=settings.max_new_tokens
    )
    drawn = (seed, batch_size) if settings.temperature > 0 else ()  # what greedy answers do not depend on
    return fill_table(
        ResumableTable(output, COLUMNS, json_digest(fingerprint, source.fingerprint, asdict(settings), drawn)), source,
        model.processor, model.model.device, lambda inputs: model.answers(inputs, settings), make_row, progress_label="answering",
        batch_size=batch_size, num_workers=num_workers, left=True, seed=seed, overwrite=overwrite,
    )  # fmt: skip


def make_row(sample: Sample, answer: str | None, problem: BadSample | None) -> dict[str, Any]:
    """A record's row; in JSON lines with the `references` that an answer is held against beside."""
    asked = prompt_turns(sample) if sample.turns else ()
    question = next((turn for turn in reversed(asked) if turn.role == "user"), None)
    reply = _turn_text(sample.turns[-1]) if len(asked) < len(sample.turns) else None
    return {
        "source": sample.id,
        "image_path": format_media_paths(sample, problem),
        "prompt": "" if question is None else question_text(question),
        "answer": answer,
        "reference": reply,
        "references": list(sample.references) or ([] if reply is None else [reply]),
        "error": "" if problem is None else problem.reason,
    }


def question_text(turn: Turn) -> str:
    """What is asked, without the images before it; those within it are `<image>` and `<video>`."""
    return LEADING_PLACEHOLDERS.sub("", _turn_text(turn)).strip()


def _turn_text(turn: Turn) -> str:
    return turn.as_message(PLACEHOLDER, VIDEO_PLACEHOLDER)["content"]


LEADING_PLACEHOLDERS = re.compile(rf"^(?:\s|{PLACEHOLDER}|{VIDEO_PLACEHOLDER})+")
