"""Vectors for a file of records, beside the names of the records."""

from functools import partial
from pathlib import Path

from torch import Tensor

from vlm.assembly.language_models import max_positions
from vlm.config.dataset_schema import SourceConfig
from vlm.data.cache import json_digest
from vlm.data.sample import BadSample, Sample
from vlm.evaluation.predict_file import hash_heads
from vlm.inference.batch import FullPromptEncoder, Row, fill_table, format_media_paths
from vlm.inference.embed import Embedder, MemberSource, check_side
from vlm.inference.resumable_table import check_output
from vlm.inference.vector_table import VECTOR, VECTOR_SUFFIXES, VectorTable, pack_vector


def embed_file(
    embedder: Embedder, config: SourceConfig, output: Path, *, cache: Path, fingerprint: str, side: str,
    width: int | None = None, batch_size: int = 16, num_workers: int = 2, max_frames: int, overwrite: bool = False,
) -> list[Row]:  # fmt: skip
    """Write the vector of every record of a file, and return the rows without them.

    Of a pair, the query is embedded, or the positive, as `side` says; of another record with a reply, what stands
    before it, or the reply; of any other record, all of it.

    Args:
        embedder: the model.
        config: where the records are and how to read them.
        output: a `.jsonl` or `.npy` file, see `vector_table`.
        cache: the folder of record indices.
        fingerprint: of the checkpoint.
        side: `query` or `document`.
        width: how many numbers each vector keeps; None: all.
        batch_size: number of records in a batch.
        num_workers: number of processes that read and decode images.
        max_frames: the largest number of frames read from a video.
        overwrite: whether to replace an output that exists or was begun.

    Raises:
        ValueError: the output exists, or was begun with other records, options or another checkpoint.
    """
    check_output(output, overwrite=overwrite, suffixes=VECTOR_SUFFIXES)
    check_side(side)
    embedder.check_width(width)
    model = embedder.model
    suffix = tuple(model.config.suffix_ids)
    encoder = FullPromptEncoder(embedder.processor, max_positions(model.config), truncate=False, suffix=suffix)
    prompt = embedder.head.prompts.get(side, "")
    name = Path(str(config.path)).name
    source = MemberSource(name, config, cache, encoder, max_frames, side=side, prompt=prompt)
    digest = json_digest(fingerprint, hash_heads(embedder), source.fingerprint, side, prompt, width)
    table = VectorTable(output, embedder.width if width is None else width, digest)
    return fill_table(
        table,
        source,
        model.device,
        partial(embedder.of, width=width),
        make_row,
        progress_label="embedding",
        batch_size=batch_size,
        num_workers=num_workers,
        overwrite=overwrite,
    )


def make_row(sample: Sample, vector: Tensor | None, problem: BadSample | None) -> Row:
    """Return a record's row."""
    return {
        "source": sample.id,
        "image_path": format_media_paths(sample, problem),
        "error": "" if problem is None else problem.reason,
        VECTOR: None if vector is None else pack_vector(vector.numpy()),
    }
