"""`vlm data pope`: questions about objects that are in an image and objects that are not (Li et al. 2023,
arXiv:2305.10355), from labelled objects of your own. `vlm eval --metrics pope` measures answers.

For each image it asks about objects that are there and about as many that are not, chosen in three ways: at random, the
most frequent ones of the data (popular), and those that most often occur together with the image's own objects
(adversarial).
"""

import argparse
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

from vlm.config.shown import PresentableParser, presentable
from vlm.data.cache import resolve_cache_folder
from vlm.data.sample import Record
from vlm.data.tools.exports import make_llava_record
from vlm.data.tools.labelled_images import (
    LabelledImage,
    label_of_synonym,
    read_labelled_images,
    read_synonyms,
    write_records,
)

QUESTION = "Is there {object} in the image? Answer with yes or no."
OBJECT_FIELD = "{object}"
NUM_OBJECTS, MAX_IMAGES = 3, 500
"""As in the paper: three objects of each kind, about 500 images."""


@dataclass(frozen=True)
class ObjectCounts:
    """How often objects occur.

    Attributes:
        images: label -> number of images that show it.
        together: (label, other label) -> number of images that show both.
    """

    images: Counter[str]
    together: Counter[tuple[str, str]]

    @classmethod
    def of(cls, images: Sequence[LabelledImage]) -> "ObjectCounts":
        """Count the objects of images."""
        return cls(
            Counter(label for image in images for label in image.labels),
            Counter(pair for image in images for pair in permutations(image.labels, 2)),
        )


def choose_random(image: LabelledImage, absent: Sequence[str], counts: ObjectCounts, rng: random.Random) -> list[str]:
    """Return absent objects in any order."""
    return rng.sample(absent, len(absent))


def choose_popular(image: LabelledImage, absent: Sequence[str], counts: ObjectCounts, rng: random.Random) -> list[str]:
    """Return absent objects, those that most images show first."""
    return sorted(absent, key=lambda label: (-counts.images[label], label))


def choose_adversarial(
    image: LabelledImage, absent: Sequence[str], counts: ObjectCounts, rng: random.Random
) -> list[str]:
    """Return absent objects, those first that occur together with the image's own objects in most images."""
    beside = {label: sum(counts.together[own, label] for own in image.labels) for label in absent}
    return sorted(absent, key=lambda label: (-beside[label], -counts.images[label], label))


STRATEGIES: dict[str, Callable[[LabelledImage, Sequence[str], ObjectCounts, random.Random], list[str]]] = {
    "random": choose_random,
    "popular": choose_popular,
    "adversarial": choose_adversarial,
}
"""Name of a way to choose absent objects -> what orders them."""


def make_questions(
    images: Sequence[LabelledImage],
    strategy: str,
    *,
    num_objects: int = NUM_OBJECTS,
    max_images: int = MAX_IMAGES,
    question: str = QUESTION,
    seed: int = 0,
) -> list[Record]:
    """Return records of yes/no questions, half of them about objects that are there.

    Args:
        images: all images; how often objects occur is counted over all of them.
        strategy: a name of `STRATEGIES`.
        num_objects: the most objects of each kind that an image is asked about.
        max_images: the most images, drawn at random; the same ones for every strategy.
        question: the text, in which `{object}` stands for the object with its article.
        seed: draws images and objects.
    """
    rng, counts = random.Random(seed), ObjectCounts.of(images)
    shown = [image for image in images if 0 < len(image.labels) < len(counts.images)]
    records = []
    for image in rng.sample(shown, min(max_images, len(shown))):
        absent = sorted(counts.images.keys() - set(image.labels))
        number = min(num_objects, len(image.labels), len(absent))
        present = random.Random(f"{seed} {image.image}").sample(image.labels, number)
        missing = STRATEGIES[strategy](image, absent, counts, random.Random(f"{seed} {image.image} absent"))[:number]
        for label, answer in (
            (label, answer)
            for pair in zip(present, missing, strict=True)
            for label, answer in zip(pair, ("yes", "no"), strict=True)
        ):
            text = question.replace(OBJECT_FIELD, with_article(label))
            record = make_llava_record(f"{image.image}:{label}", image.image, [(text, answer)])
            records.append(record | {"object": label, "kind": "present" if answer == "yes" else strategy})
    return records


EXAMPLE = "vlm data pope labelled.jsonl questions --max-images 500"


def with_article(label: str) -> str:
    """Return a label after `a` or `an`, depending on its first letter."""
    return f"{'an' if label[0] in 'aeiou' else 'a'} {label}"


def main(words: Sequence[str]) -> None:
    """`vlm data pope RECORDS FOLDER`."""
    purpose = "Write yes/no questions about objects that are, and are not, in an image (POPE), from labelled objects."
    parser = PresentableParser("vlm data pope", description=purpose, examples=(EXAMPLE,))
    parser.add_argument("records", help="records with an image and its labelled objects")
    folder = f"where {', '.join(f'{name}.jsonl' for name in STRATEGIES)} go"
    parser.add_argument("folder", type=Path, help=folder)
    add_object_options(parser)
    number = "most objects of each kind per image (default: %(default)s)"
    parser.add_argument("--num-objects", type=int, default=NUM_OBJECTS, metavar="N", help=number)
    parser.add_argument(
        "--question",
        default=QUESTION,
        help="text of the question; {object} stands for the object (default: %(default)s)",
    )
    args = parser.parse_args(words)
    try:
        if OBJECT_FIELD not in args.question:
            raise ValueError(f"--question {args.question!r}: {OBJECT_FIELD} must occur in it")
        check_counts(args, ("num_objects", "max_images"))
        synonyms = label_of_synonym(read_synonyms(args.synonyms))
        images = read_labelled_images(args.records, resolve_cache_folder(None), key=args.objects_key, synonyms=synonyms)
        for strategy in STRATEGIES:
            questions = make_questions(
                images,
                strategy,
                num_objects=args.num_objects,
                max_images=args.max_images,
                question=args.question,
                seed=args.seed,
            )
            path = args.folder / f"{strategy}.jsonl"
            print(f"{write_records(path, questions, force=args.force):,} questions: {path}")
    except (ValueError, OSError) as error:
        sys.exit(f"vlm data pope: {presentable(error)}")


def add_object_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of how labelled objects are read, and which images are used."""
    key = "key of a record's objects: labels, or mappings with a label (default: %(default)s)"
    parser.add_argument("--objects-key", default="objects", metavar="KEY", help=key)
    synonyms = "a file with an object and its synonyms on each line: dog, puppy, hound"
    parser.add_argument("--synonyms", type=Path, metavar="FILE", help=synonyms)
    images = "most images, chosen at random (default: %(default)s)"
    parser.add_argument("--max-images", type=int, default=MAX_IMAGES, metavar="N", help=images)
    parser.add_argument(
        "--seed", type=int, default=0, help="seed that images and objects are chosen with (default: %(default)s)"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing output")


def check_counts(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Raise ValueError if a number is below 1."""
    for name in names:
        if (number := getattr(args, name)) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {number}: at least 1 is needed")
