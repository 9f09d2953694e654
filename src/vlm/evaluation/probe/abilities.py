"""The questions of the probe: a function for each ability draws an image and asks about it.

To add an ability, write a function of a random generator that returns a `Question`, and add it to `ABILITIES`. Texts
are English. Half of a question's ability must not be answerable by one constant answer.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from vlm.evaluation.probe.drawing import COLOURS, SHAPES, Shape, draw_shapes, draw_text
from vlm.evaluation.probe.grading import Check

READ_WORDS = (
    "LAMP", "RIVER", "STONE", "CLOUD", "TIGER", "BREAD", "CHAIR", "OCEAN", "PLANT", "SUGAR", "TRAIN", "WATCH", "ZEBRA",
    "GLASS", "HORSE", "KNIFE", "MOUSE", "NIGHT", "PAPER", "QUEEN", "SHEEP", "TABLE", "VOICE", "WHEEL", "APPLE", "BRUSH",
    "CANDLE", "DRAGON", "ENGINE", "FLOWER", "GARDEN", "HAMMER", "ISLAND", "JUNGLE", "KITTEN", "LADDER", "MARKET",
    "NEEDLE", "ORANGE", "PENCIL", "ROCKET", "SILVER", "TEMPLE", "WINDOW",
)  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "early": "late", "full": "empty", "heavy": "light", "high": "low", "open": "closed",
    "rich": "poor", "wet": "dry", "young": "old", "fast": "slow", "hard": "soft",
}  # fmt: skip
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Spain": "Madrid", "Germany": "Berlin", "Greece": "Athens",
    "Egypt": "Cairo", "Portugal": "Lisbon", "Austria": "Vienna", "Norway": "Oslo", "Peru": "Lima", "Russia": "Moscow",
}  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
ABSENT_THINGS = ("dog", "car", "person", "tree", "cup", "bicycle", "chair", "bird", "house", "fish", "clock", "boat")
YES_NO = ("yes", "no")
MOST_COUNTED = 6


@dataclass(frozen=True)
class Question:
    """A question of the probe.

    Attributes:
        image: what it is about; None for a question about no image.
        text: the question.
        answer: a right answer, whose loss is measured.
        check: what makes any answer right.
    """

    image: Image.Image | None
    text: str
    answer: str
    check: Check


def ask_reading(rng: random.Random) -> Question:
    """Ask for a rendered word or number."""
    size = rng.randint(44, 72)
    if rng.random() < 0.7:
        word = rng.choice(READ_WORDS)
        question = "Which word is written in the image? Answer with that word only."
        return Question(draw_text(word, size), question, word, Check("word", word))
    number = str(rng.randint(100, 9999))
    question = "Which number is written in the image? Answer with that number only."
    return Question(draw_text(number, size), question, number, Check("number", number))


def ask_counting(rng: random.Random) -> Question:
    """Ask for the number of equal shapes."""
    name, colour, number = rng.choice(SHAPES), rng.choice(list(COLOURS)), rng.randint(1, MOST_COUNTED)
    cells = rng.sample([(x, y) for x in range(3) for y in range(3)], number)
    shapes = [
        Shape(name, colour, (2 * x + 1) / 6 + rng.uniform(-0.03, 0.03), (2 * y + 1) / 6 + rng.uniform(-0.03, 0.03))
        for x, y in cells
    ]
    question = f"How many {name}s are in the image? Answer with a number."
    return Question(draw_shapes(shapes), question, str(number), Check("number", str(number)))


def ask_colours(rng: random.Random) -> Question:
    """Ask for the colour of one of two shapes, which have different ones."""
    shapes = _draw_pair(rng)
    question = f"What colour is the {shapes[0].name}? Answer with one word."
    right = shapes[0].colour
    return Question(draw_shapes(shapes), question, right, Check("choice", right, tuple(COLOURS)))


def ask_places(rng: random.Random) -> Question:
    """Ask on which side of another shape a shape is."""
    first, second = _draw_pair(rng, is_vertical=(is_vertical := rng.random() < 0.5))
    words = ("above", "below") if is_vertical else ("left", "right")
    is_before = first.y < second.y if is_vertical else first.x < second.x
    right = words[0] if is_before else words[1]
    asked = "above or below" if is_vertical else "to the left or to the right of"
    question = f"Is the {first.name} {asked} the {second.name}? Answer with {words[0]} or {words[1]}."
    return Question(draw_shapes([first, second]), question, right, Check("choice", right, words))


def ask_format(rng: random.Random) -> Question:
    """Ask for an answer of a certain form; only the form counts."""
    shape = Shape(rng.choice(SHAPES), rng.choice(list(COLOURS)), 0.5, 0.5, 0.25)
    image = draw_shapes([shape])
    text, answer, check = rng.choice(
        (
            (
                "Which shape is in the image, and which colour is it? Answer with a JSON list of these two words only.",
                f'["{shape.name}", "{shape.colour}"]',
                Check("json_list", "2"),
            ),
            (
                'What colour is the shape? Answer only with a JSON object whose single key is "colour".',
                f'{{"colour": "{shape.colour}"}}',
                Check("json_object", "colour"),
            ),
            (
                "Describe the image in exactly three words.",
                f"One {shape.colour} {shape.name}.",
                Check("num_words", "3"),
            ),
            (
                "Which shape is in the image? Answer in capital letters.",
                shape.name.upper(),
                Check("upper_case", ""),
            ),
            (
                "Describe the image in one sentence, and end with the word DONE.",
                f"There is a {shape.colour} {shape.name}. DONE",
                Check("ends_with", "DONE"),
            ),
            (
                "Name three colours, separated by commas, and write nothing else.",
                "red, green, blue",
                Check("comma_list", "3"),
            ),
        )
    )
    return Question(image, text, answer, check)


def ask_text(rng: random.Random) -> Question:
    """Ask something about no image."""
    kind = rng.choice(("opposite", "capital", "sum", "day"))
    if kind == "opposite":
        word = rng.choice(list(OPPOSITES))
        question, answer = f"What is the opposite of {word}? Answer with one word.", OPPOSITES[word]
    elif kind == "capital":
        country = rng.choice(list(CAPITALS))
        question, answer = f"What is the capital of {country}? Answer with its name only.", CAPITALS[country]
    elif kind == "sum":
        first, second = rng.randint(2, 20), rng.randint(2, 20)
        answer = str(first + second)
        question = f"What is {first} + {second}? Answer with the number only."
        return Question(None, question, answer, Check("number", answer))
    else:
        place = rng.randrange(len(DAYS))
        question, answer = f"Which day comes after {DAYS[place]}?", DAYS[(place + 1) % len(DAYS)]
        asked = f"{question} Answer with one word."
        return Question(None, asked, answer, Check("word", answer))
    return Question(None, question, answer, Check("word", answer))


def ask_absence(rng: random.Random) -> Question:
    """Ask about things of which two in three are not in the image."""
    shapes = _draw_pair(rng)
    missing = rng.choice([name for name in SHAPES if name not in {shape.name for shape in shapes}])
    kind = rng.choice(("present", "absent", "premise"))
    if kind == "premise":
        question = f"What colour is the {missing}? If there is no {missing} in the image, answer with the word none."
        return Question(draw_shapes(shapes), question, "none", Check("choice", "none", ("none", *COLOURS)))
    thing = shapes[0].name if kind == "present" else rng.choice((missing, *rng.sample(ABSENT_THINGS, 2)))
    right = "yes" if kind == "present" else "no"
    question = f"Is there a {thing} in the image? Answer with yes or no."
    return Question(draw_shapes(shapes), question, right, Check("choice", right, YES_NO))


def _draw_pair(rng: random.Random, *, is_vertical: bool = False) -> tuple[Shape, Shape]:
    """Return two shapes of different names and colours, beside or above each other, in either order."""
    names, colours = rng.sample(SHAPES, 2), rng.sample(list(COLOURS), 2)
    places = [0.27, 0.73] if rng.random() < 0.5 else [0.73, 0.27]
    first, second = (
        Shape(name, colour, *((other, place) if is_vertical else (place, other)), radius=0.16)
        for name, colour, place, other in zip(
            names, colours, places, (rng.uniform(0.35, 0.65), rng.uniform(0.35, 0.65)), strict=True
        )
    )
    return first, second


ABILITIES: dict[str, Callable[[random.Random], Question]] = {
    "reading": ask_reading,
    "counting": ask_counting,
    "colours": ask_colours,
    "places": ask_places,
    "format": ask_format,
    "text": ask_text,
    "absence": ask_absence,
}
"""Name of an ability -> what asks a question of it."""
