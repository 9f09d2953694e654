"""Which records of LLaVA's form list images or videos: a look at a few keys, without reading the rest of a record.

A record that can be used shows each image and video that it lists (`MediaPlacer.check_all_placed`), and no others.
Imports siblings, msgspec and NumPy.
"""

from contextlib import suppress

import msgspec
import numpy as np

from vlm.config.dataset_schema import SourceConfig
from vlm.data.records.fields import is_empty
from vlm.data.records.index import IndexedRecords, parse_record
from vlm.data.sample import BadSample


class _Listed(msgspec.Struct):
    """The keys of a record that list images and videos."""

    image: object = None
    images: object = None
    video: object = None
    videos: object = None


_DECODER = msgspec.json.Decoder(_Listed)


def can_look_for_media(config: SourceConfig) -> bool:
    """Return whether `find_listed_media` is right about the records of a source: options may rename or ignore keys."""
    return config.format == "llava" and all(value is None for value in config.options.values())


def find_listed_media(records: IndexedRecords) -> np.ndarray:
    """Return whether each record lists an image or a video: `(records,)`; anything for one that cannot be used."""
    return np.fromiter(map(_lists_media, records.iter_bytes()), dtype=bool, count=len(records))


def _lists_media(content: memoryview) -> bool:
    listed: object = None
    try:
        listed = _DECODER.decode(content)
    except (ValueError, RecursionError):  # what only Python's parser reads
        with suppress(BadSample):
            listed = parse_record(bytes(content))
    if isinstance(listed, _Listed):
        values = (listed.image, listed.images, listed.video, listed.videos)
    elif isinstance(listed, dict):
        values = tuple(listed.get(key) for key in _Listed.__struct_fields__)
    else:
        return False
    return not all(map(is_empty, values))
