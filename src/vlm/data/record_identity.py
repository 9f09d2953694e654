"""Which records a data set holds: what says that two runs were evaluated on the same ones."""

import hashlib

from vlm.data.cache import json_digest
from vlm.data.dataset import SampleDataset


def identify_records(dataset: SampleDataset) -> str:
    """Return a digest of the files, and of which records of them stand in which order.

    Unlike the fingerprint of a source, it depends on no processor: two models that are evaluated on the same records
    have the same digest.
    """
    files = [source.records.fingerprint for source in dataset.sources]
    places = [dataset.places[dataset.places[:, 0] == number, 1] for number in range(len(files))]
    return json_digest(
        [
            (file, hashlib.sha256(numbers.astype("int64").tobytes()).hexdigest())
            for file, numbers in zip(files, places, strict=True)
        ]
    )
