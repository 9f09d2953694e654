"""Guesses the form of records from their keys, and what reads it, for messages about records that do not fit.

Imports `sample`, its sibling `keys` and the standard library only. To recognise another form, add a function to
`FORMS`, before those that are less particular.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import PurePath
from types import MappingProxyType

from vlm.data.records.keys import names_image
from vlm.data.sample import BadSample, KeyNeeded, OptionNeeded

IMAGE_KEYS = (
    "image",
    "images",
    "image_path",
    "img",
    "img_path",
    "image_file",
    "file_name",
    "filename",
    "photo",
    "picture",
)
FILE_KEYS = ("file", "filepath", "file_path", "path")
"""Keys of files of any kind, which are images unless their names have the extension of something else."""
CAPTION_KEYS = ("caption", "captions", "text", "description", "alt_text", "alt", "title", "sentence")
LABEL_KEYS = ("label", "labels", "class", "target", "score")
QUESTION_AND_ANSWER_KEYS = (
    ("question", "answer"),
    ("question", "answers"),
    ("question", "multiple_choice_answer"),
    ("question", "response"),
    ("query", "response"),
    ("query", "answer"),
    ("prompt", "response"),
    ("prompt", "completion"),
    ("prompt", "answer"),
    ("problem", "solution"),
    ("problem", "answer"),
    ("input", "output"),
)
PROMPT_KEYS = ("prompt", "question", "query")
BOX_KEYS = ("bbox", "bboxes", "boxes", "box", "objects", "segmentation", "annotations")
NEEDS_READER = "no format has these keys; write a reader of your own (docs/extending.md)"

NEEDS_TEXT = "each needs one in its record, such as a caption (docs/data.md)"
IMAGE_PATTERN = "'COCO_train2014_{{image_id:012d}}.jpg'"
"""The names of VQAv2's images, with braces doubled for `str.format`."""
CONVERT_FIRST = "convert them first: vlm data convert {path} OUT.jsonl"
NEEDS_CONVERSION = "write its boxes as `objects` of records (docs/coordinates.md); vlm data convert does it for COCO's"


OPTION_FLAGS = {
    "run": ("dataset.format=", "dataset.options."),
    "clean": ("--format ", "--option "),
    "convert": ("--from ", "--option "),
}
"""How a command takes the format of records, and one of the format's options."""
EMPTY_TEXT = "'\"\"'"
"""How an empty text is written on the command line, as a value of an option."""


@dataclass(frozen=True)
class Guess:
    """What a record seems to be.

    Attributes:
        what: the form, in words.
        format: the name of `formats.FORMATS` that reads it; None if none does.
        options: of that format.
        advice: what to do where no format reads it.
        alternatives: where its keys do not tell the form: what the record may be -> the guess for that.
    """

    what: str
    format: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    advice: str = NEEDS_READER
    alternatives: "Mapping[str, Guess]" = field(default_factory=dict)

    def hint(self, tool: str = "run", format_name: str = "", given: Mapping[str, object] = MappingProxyType({})) -> str:
        """Return what reads such records, as options of a command; without the format and options that are given."""
        if (chosen := self._alternative(format_name)) is not None:
            return f"it looks like {self.what}: add {chosen.words(tool, format_name, given)}"
        if self.alternatives and self.advice == NEEDS_READER:
            ways = [f"{other.words(tool)} {condition}" for condition, other in self.alternatives.items()]
            return f"it looks like {self.what}: add {', or '.join(ways)}"
        if self.format is None:
            return f"it looks like {self.what}: {self.advice}"
        return f"it looks like {self.what}: add {self.words(tool, format_name, given)}"

    def words(self, tool: str, format_name: str = "", given: Mapping[str, object] = MappingProxyType({})) -> str:
        """Return the options of a command that read such records and are not given yet."""
        flag, option = OPTION_FLAGS[tool]
        needed = {name: value for name, value in self.options.items() if given.get(name) != value}
        words = [] if self.format == format_name else [f"{flag}{self.format}"]
        return " ".join([*words, *(f"{option}{name}={value or EMPTY_TEXT}" for name, value in needed.items())])

    def is_given(self, format_name: str, given: Mapping[str, object]) -> bool:
        """Return whether the format and its options are those of the guess."""
        guess = self._alternative(format_name) or self
        return guess.format == format_name and {name: given.get(name) for name in guess.options} == guess.options

    def _alternative(self, format_name: str) -> "Guess | None":
        return next((guess for guess in self.alternatives.values() if guess.format == format_name), None)


def _has_items(value: object, *keys: str) -> bool:
    """Return whether a value is a list whose first item is a mapping with some keys."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and set(keys) <= value[0].keys()


def _image_key(record: Mapping[str, object]) -> str | None:
    """Return the key of a record's image: a usual one, else one whose value is the name of an image file."""
    known = (key for key in IMAGE_KEYS if record.get(key) is not None)
    named = (key for key, value in record.items() if names_image(value) and "://" not in str(value))
    files = {key: name for key in FILE_KEYS if isinstance(name := record.get(key), str) and name}
    without_extension = (key for key, name in files.items() if not PurePath(name).suffix)
    return next(chain(known, named, without_extension), None)


def _image_options(record: Mapping[str, object]) -> dict[str, str]:
    """Return the option that names the key of a record's image, where it is not one that readers know."""
    image = _image_key(record)
    return {} if image in (None, "image", "images") else {"image_key": image}


def _conversation(record: Mapping[str, object]) -> Guess | None:
    for key, value in record.items():
        if _has_items(value, "role", "content"):
            if isinstance(record.get("image"), dict) and not {"bytes", "path"} & set(record["image"]):  # pyright: ignore[reportArgumentType] - checked
                return Guess("MiniCPM-V's records", "minicpm")
            return Guess("chat messages", "messages", {} if key == "messages" else {"key": key})
        if _has_items(value, "from", "value"):
            options = {} if key == "conversations" else {"key": key}
            return Guess("LLaVA's form (ShareGPT's roles)", "llava", options)
    texts = record.get("conversations")
    if isinstance(texts, list) and len(texts) == 2 and all(isinstance(text, str) for text in texts):
        return Guess("a prompt and an answer", "head")
    return None


def _cauldron(record: Mapping[str, object]) -> Guess | None:
    return (
        Guess("the Cauldron's questions", "cauldron") if _has_items(record.get("texts"), "user", "assistant") else None
    )


def _alpaca(record: Mapping[str, object]) -> Guess | None:
    return Guess("Alpaca's instructions", "alpaca") if {"instruction", "output"} <= record.keys() else None


def _preference(record: Mapping[str, object]) -> Guess | None:
    keys = record.keys()
    is_swift = "messages" in keys and ("rejected_response" in keys or "rejected_messages" in keys)
    if {"chosen", "rejected"} <= keys or is_swift or {"output_1", "output_2", "preference"} <= keys:
        return Guess("pairs of a chosen and a rejected reply", "preference")
    if "completion" in keys and isinstance(record.get("label"), bool):
        return Guess("replies that are wanted or not", "preference")
    return None


def _question(record: Mapping[str, object]) -> Guess | None:
    for question, answer in QUESTION_AND_ANSWER_KEYS:
        if isinstance(record.get(question), str) and record.get(answer) is not None:
            options = _image_options(record) | ({} if question == "question" else {"question_key": question})
            return Guess(
                "questions with answers",
                "question",
                options if answer in ("answer", "answers") else {**options, "answer_key": answer},
            )
    return None


def _boxes(record: Mapping[str, object]) -> Guess | None:
    boxes = [key for key in BOX_KEYS if isinstance(record.get(key), (list, dict))]
    has_text = any(isinstance(record.get(key), str) for key in CAPTION_KEYS)
    if not boxes or has_text:
        return None
    if isinstance(record.get("annotations"), list) and isinstance(record.get("data"), dict):
        return Guess("Label Studio's tasks", advice="vlm data convert reads them: label-studio, label-studio-boxes")
    return Guess(f"a detection export (`{boxes[0]}`)", advice=NEEDS_CONVERSION)


def _caption(record: Mapping[str, object]) -> Guess | None:
    caption = next((key for key in CAPTION_KEYS if record.get(key) is not None), None)
    image = _image_key(record)
    if caption is None:
        return None
    if image is None:
        address = next((key for key in ("url", "image_url", "URL") if record.get(key) is not None), None)
        advice = "fetch the images first, from a .csv, .tsv or .parquet: vlm data download TABLE FOLDER"
        return None if address is None else Guess("addresses of images with captions", advice=advice)
    options = _image_options(record)
    return Guess(
        "images with captions", "caption", options if caption == "caption" else {**options, "caption_key": caption}
    )


def _labelled(record: Mapping[str, object]) -> Guess | None:
    label = next((key for key in LABEL_KEYS if record.get(key) is not None), None)
    if label is None or _image_key(record) is None:
        return None
    return _guess_labelled(record, label)


def _guess_labelled(record: Mapping[str, object], label: str) -> Guess:
    """Return the guess for images with labels; without a prompt in the record, the image alone is read."""
    options = _image_options(record) | ({} if label == "label" else {"label_key": label})
    prompt = next((key for key in PROMPT_KEYS if isinstance(record.get(key), str)), None)
    if prompt is None:
        what = "images with labels but no prompts (`prompt` may also be a question about all images)"
        return Guess(what, "labelled", {**options, "prompt": ""})
    return Guess("images with labels", "labelled", options | ({} if prompt == "prompt" else {"prompt_key": prompt}))


def _prompt_alone(record: Mapping[str, object]) -> Guess | None:
    key = next((key for key in PROMPT_KEYS if isinstance(record.get(key), str)), None)
    if key is None:
        return None
    options = ({} if key == "prompt" else {"prompt_key": key}) | _image_options(record)
    labelled = Guess("", "labelled", options)
    words = labelled.words("clean")
    advice = f"vlm generate and vlm predict read them with {words}; training needs an answer in each record"
    return Guess("questions without answers", advice=advice, alternatives={"to predict": labelled})


def _media_alone(record: Mapping[str, object]) -> Guess | None:
    media = {"images": _image_key(record), "videos": "video" if record.get("video") is not None else None}
    kind = next((kind for kind, key in media.items() if key is not None and set(record) <= {key, "id"}), None)
    return None if kind is None else Guess(f"{kind} without texts", advice=NEEDS_TEXT)


def _image_and_value(record: Mapping[str, object]) -> Guess | None:
    """Recognise an image beside a text or number whose key does not tell whether it is a caption or a label."""
    image = _image_key(record)
    values = [key for key, value in record.items() if key not in (image, "id") and isinstance(value, str | int | float)]
    if image is None or not values or any(isinstance(value, list | dict) for value in record.values()):
        return None
    key = next((key for key in values if isinstance(record[key], str)), values[0])
    caption = Guess("", "caption", {**_image_options(record), "caption_key": key})
    ways = {"if that is a caption": caption, "if it is a label": _guess_labelled(record, key)}
    return Guess(f"an image (`{image}`) with `{key}`", alternatives=ways)


FORMS: tuple[Callable[[Mapping[str, object]], Guess | None], ...] = (
    _preference,
    _conversation,
    _cauldron,
    _alpaca,
    _question,
    _boxes,
    _caption,
    _labelled,
    _prompt_alone,
    _media_alone,
    _image_and_value,
)
"""Functions that recognise a form; the first that does counts."""


def guess_form(record: object) -> Guess | None:
    """Return what a record seems to be; None if nothing is recognised."""
    if not isinstance(record, dict):
        return None
    return next((guess for recognise in FORMS if (guess := recognise(record)) is not None), None)


def with_hint(
    error: BadSample, record: object, format_name: str, options: Mapping[str, object], tool: str = "run"
) -> BadSample:
    """Add a hint to a reader's error: the option that would read the record, or the form that it seems to have.

    Errors about files, and errors of a user's own reader, are returned unchanged.
    """
    if isinstance(error, OptionNeeded):
        name, value = error.option
        flag, use = OPTION_FLAGS[tool][1], "train on" if tool == "run" else "read"
        reason = f"{error.reason}: add {flag}{name}={value}, or {flag}ignore_keys=[{value}] to {use} the text alone"
        return BadSample(error.sample_id, reason)
    guess = None if error.file is not None or ":" in format_name else guess_form(record)
    if guess is not None and not guess.is_given(format_name, options):
        return BadSample(error.sample_id, f"{error.reason}; {guess.hint(tool, format_name, options)}")
    if isinstance(error, KeyNeeded):
        return BadSample(error.sample_id, f"{error.reason}; {_name_option(error.option, OPTION_FLAGS[tool][1])}")
    if guess is None and error.reason.startswith("it has no `") and ":" not in format_name:
        return BadSample(error.sample_id, f"{error.reason}; {NEEDS_READER}")
    return error


def _name_option(option: str, flag: str) -> str:
    """Return the sentence about the option that names the key of what a record lacks."""
    advice = f"name the key of its {option.removesuffix('_key')} with {flag}{option}=KEY"
    return f"{advice}, or give all records one with {flag}prompt=TEXT" if option == "prompt_key" else advice


def describe_collection(first_items: Mapping[str, Mapping[str, object]]) -> str | None:
    """Describe a file that is a mapping with lists, by the first item of each list; None if it is not known.

    `{path}` in the description stands for the file.
    """
    images, annotations = first_items.get("images"), first_items.get("annotations")
    if annotations is not None and images is not None:
        if "caption" in annotations:
            return f"it holds COCO's captions; {CONVERT_FIRST} --from coco-captions"
        if set(BOX_KEYS) & annotations.keys():
            return f"it holds COCO's detections; {CONVERT_FIRST} --from coco-detections"
    if "question_id" in first_items.get("questions", {}):
        return (
            "it holds VQAv2's questions; convert them with their answers first: vlm data convert {path} OUT.jsonl "
            f"--from vqa --annotations ANSWERS.json --image-pattern {IMAGE_PATTERN}"
        )
    if annotations is not None and "question_id" in annotations and "question" not in annotations:
        return (
            "it holds VQAv2's answers; convert their questions: vlm data convert QUESTIONS.json OUT.jsonl --from vqa "
            f"--annotations {{path}} --image-pattern {IMAGE_PATTERN}"
        )
    return None
