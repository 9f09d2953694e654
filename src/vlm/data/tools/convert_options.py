"""Options of `vlm data convert` that belong to particular kinds of annotations, with their help.

Imports its siblings `corpora` and `detections`.
"""

from vlm.data.tools.corpora import SHORT_ANSWER
from vlm.data.tools.detections import DETECTION_PROMPT, REFERRING_PROMPT

OPTIONS = {
    "split": ("NAME", "split to read, of a data set that has several (default: train)"),
    "subset": ("NAME", "subset to read, of a data set on the Hub that has several"),
    "prompt": ("TEXT", f"what is asked about every image ({DETECTION_PROMPT}; refcoco: {REFERRING_PROMPT})"),
    "instances": ("FILE", "refcoco: the file of boxes, instances.json"),
    "annotations": ("FILE", "vqa: the file of answers"),
    "image_pattern": ("NAME", "vqa: name of an image, such as COCO_train2014_{image_id:012d}.jpg"),
    "instruction": ("TEXT", f"a line after questions; vqa: after the first of a record ({SHORT_ANSWER})"),
    "url_column": ("NAME", "conceptual-captions: the column of URLs; its number, from 1, where there is no header"),
    "caption_column": ("NAME", "conceptual-captions: the column of captions, likewise"),
    "question_label": ("LABEL", "ubiai: what questions are marked as (QUESTION)"),
    "answer_label": ("LABEL", "ubiai: what answers are marked as (ANSWER)"),
    "image_field": ("FIELD", "label-studio: the field of a task's data that has the image (image)"),
    "question_field": ("FIELD", "label-studio: the field of a task's data that has the question"),
    "from_name": ("CONTROL", "label-studio: the control that has the answer (the only one)"),
}
"""Options of conversions that have a flag -> its metavar and help."""


def option_flag(name: str) -> str:
    """Return the flag of an option on the command line."""
    return f"--{name.replace('_', '-')}" if name in OPTIONS else f"--option {name}=VALUE"
