"""A model's answers to a file of records, as a table: each prompt is a record up to its last reply."""

from dataclasses import asdict, replace
from functools import partial
from itertools import dropwhile
from pathlib import Path

from vlm.config.dataset_schema import SourceConfig
from vlm.config.schema import InferenceConfig
from vlm.data.cache import json_digest
from vlm.data.coordinates.answers import parse_answer_to_sample, true_objects_of_reply
from vlm.data.encoding.prompts import prompt_turns
from vlm.data.encoding.thinking import without_thinking
from vlm.data.processor import Processor
from vlm.data.sample import PLACEHOLDER, VIDEO_PLACEHOLDER, BadSample, Sample, ToolCallTurn, Turn
from vlm.inference.batch import Row, fill_table, format_media_paths, prompt_source
from vlm.inference.generate import VisionLanguageModel
from vlm.inference.resumable_table import ResumableTable, check_output

COLUMNS = ("source", "image_path", "prompt", "answer", "reference", "error")
"""The record's id, its media, its last question, the model's answer, the record's last reply (if any), and the reason
why it could not be answered (empty where it was)."""


def generate_file(
    model: VisionLanguageModel, config: SourceConfig, output: Path, settings: InferenceConfig, *, cache: Path,
    fingerprint: str, batch_size: int = 16, num_workers: int = 2, max_frames: int, seed: int | None = None,
    overwrite: bool = False, is_blank: bool = False,
) -> list[Row]:  # fmt: skip
    """Generate an answer for every record of a file.

    Args:
        model: the model that answers.
        config: where the records are and how to read them.
        output: a `.csv` or `.jsonl` file.
        settings: generation settings.
        cache: the folder of record indices.
        fingerprint: of the checkpoint, and of how it is loaded.
        batch_size: number of records in a batch.
        num_workers: number of processes that read and decode images.
        max_frames: the largest number of frames read from a video.
        seed: makes sampling repeatable, across interruptions too; None: not seeded.
        overwrite: whether to replace an output that exists or was begun.
        is_blank: whether the model sees blank images in place of all images.

    Returns:
        All rows, with the keys `COLUMNS`.

    Raises:
        ValueError: the output exists, or was begun with other records, options or another checkpoint.
    """
    check_output(output, overwrite=overwrite)
    source = prompt_source(
        model.model, model.processor, config, cache=cache, max_frames=max_frames, answer_tokens=settings.max_new_tokens
    )
    sampling = (seed, batch_size) if settings.temperature > 0 else ()  # greedy answers depend on neither
    label = "answering about blank images" if is_blank else "answering"
    blank = [label] if is_blank else []
    digest = json_digest(fingerprint, source.fingerprint, asdict(settings), sampling, *blank)
    return fill_table(
        ResumableTable(output, COLUMNS, digest),
        source,
        model.model.device,
        lambda inputs: model.answers(inputs, settings),
        partial(make_row, model.processor),
        progress_label=label,
        batch_size=batch_size,
        num_workers=num_workers,
        left=True,
        seed=seed,
        overwrite=overwrite,
        is_blank=is_blank,
    )


def make_row(processor: Processor, sample: Sample, answer: str | None, problem: BadSample | None) -> Row:
    """Return a record's row.

    JSON lines also have its `references`, the `objects` whose places the answer tells, in pixels of the stored images,
    and the `true_objects`.
    """
    objects, true = [], []
    if answer is not None and problem is None:
        objects = parse_answer_to_sample(answer, processor, sample)
        true = true_objects_of_reply(sample, processor)
    prompt = prompt_turns(sample) if sample.turns else ()
    question = next((turn for turn in reversed(prompt) if turn.role == "user"), None)
    last = sample.turns[-1] if len(prompt) < len(sample.turns) else None
    is_compared = last is not None and not isinstance(last, ToolCallTurn)  # templates write calls in many forms
    reply = _turn_text(last) if last is not None and is_compared and (last.supervised or last.is_blank) else None
    return {
        "source": sample.id,
        "image_path": format_media_paths(sample, problem),
        "prompt": "" if question is None else question_text(question),
        "answer": answer,
        "reference": reply,
        "references": list(sample.references) or ([] if reply is None else [without_thinking(reply)]),
        "objects": [marked.as_record() for marked in objects],
        "true_objects": [marked.as_record() for marked in true],
        "error": "" if problem is None else problem.reason,
    }


def question_text(turn: Turn) -> str:
    """Return the text of a question without leading media; media within it are `<image>` and `<video>`."""
    parts = tuple(dropwhile(lambda part: not isinstance(part, str) or not part.strip(), turn.content))
    return _turn_text(replace(turn, content=parts)).strip()


def _turn_text(turn: Turn) -> str:
    return turn.as_message(PLACEHOLDER, VIDEO_PLACEHOLDER)["content"]
