"""`vlm data chair`: requests for captions of images whose objects are labelled; `vlm eval --metrics chair` measures how
many objects of the captions are not there (Rohrbach et al. 2018, arXiv:1809.02156).

A record's `answers` are the objects of its image, each with its synonyms after `|`: `dog|puppy|hound`.
"""

import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from vlm.config.shown import PresentableParser, presentable
from vlm.data.cache import resolve_cache_folder
from vlm.data.sample import PLACEHOLDER, Record
from vlm.data.tools.labelled_images import (
    LabelledImage,
    label_of_synonym,
    read_labelled_images,
    read_synonyms,
    write_records,
)
from vlm.data.tools.pope import add_object_options, check_counts

QUESTION = "Describe this image in detail."
SYNONYM_SEPARATOR = "|"


def make_requests(
    images: Sequence[LabelledImage],
    synonyms: Mapping[str, Sequence[str]],
    *,
    max_images: int,
    question: str = QUESTION,
    seed: int = 0,
) -> list[Record]:
    """Return a record for each image that has labels, without a reply: it asks for a caption.

    Args:
        images: all images.
        synonyms: label -> its synonyms.
        max_images: the most images, drawn at random.
        question: the text of the request.
        seed: draws the images.
    """
    shown = [image for image in images if image.labels]
    return [
        {
            "id": image.image,
            "image": image.image,
            "conversations": [{"from": "human", "value": f"{PLACEHOLDER}\n{question}"}],
            "answers": [SYNONYM_SEPARATOR.join((label, *synonyms.get(label, ()))) for label in image.labels],
        }
        for image in random.Random(seed).sample(shown, min(max_images, len(shown)))
    ]


EXAMPLE = "vlm data chair labelled.jsonl requests.jsonl --max-images 500"


def main(words: Sequence[str]) -> None:
    """`vlm data chair RECORDS OUTPUT`."""
    purpose = "Write caption requests for images with labelled objects, to count objects that a model makes up (CHAIR)."
    parser = PresentableParser("vlm data chair", description=purpose, examples=(EXAMPLE,))
    parser.add_argument("records", help="records with an image and its labelled objects")
    parser.add_argument("output", type=Path, help="the file to write: NAME.jsonl")
    add_object_options(parser)
    parser.add_argument("--question", default=QUESTION, help="text of the request (default: %(default)s)")
    args = parser.parse_args(words)
    try:
        if args.output.suffix != ".jsonl":
            raise ValueError(f"OUTPUT {args.output}: the name must end in .jsonl, since one record is written per line")
        check_counts(args, ("max_images",))
        synonyms = read_synonyms(args.synonyms)
        images = read_labelled_images(
            args.records, resolve_cache_folder(None), key=args.objects_key, synonyms=label_of_synonym(synonyms)
        )
        requests = make_requests(images, synonyms, max_images=args.max_images, question=args.question, seed=args.seed)
        print(f"{write_records(args.output, requests, force=args.force):,} requests: {args.output}")
    except (ValueError, OSError) as error:
        sys.exit(f"vlm data chair: {presentable(error)}")
