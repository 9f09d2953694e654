"""Two tasks of lmms-eval on records of this machine: one that is answered, and one whose choices are compared."""

import json
from pathlib import Path

ANSWERED, COMPARED = "vlm_local_answered", "vlm_local_compared"

COMMON = """\
dataset_path: json
dataset_kwargs:
  data_files:
    test: {records}
test_split: test
doc_to_visual: !function utils.doc_to_visual
doc_to_text: question
"""

TASKS = {
    ANSWERED: """\
output_type: generate_until
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 16
  temperature: 0
  do_sample: false
  until: ["\\n"]
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
    ignore_punctuation: true
""",
    COMPARED: """\
output_type: multiple_choice
doc_to_target: gold
doc_to_choice: choices
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
""",
}

UTILS = """\
from PIL import Image


def doc_to_visual(doc):
    return [Image.open(path).convert("RGB") for path in doc["images"]]
"""


def write_tasks(source: Path, images: Path, folder: Path, number: int) -> None:
    """The tasks, of the first records of a LLaVA file with one image and one question each.

    The choices are all replies that records of the same kind have.
    """
    folder.mkdir(parents=True)
    records = json.loads(source.read_text())
    replies: dict[str, set[str]] = {}
    for one in records:
        replies.setdefault(one["kind"], set()).add(one["conversations"][1]["value"])
    lines = []
    for one in records[:number]:
        question, answer = (turn["value"] for turn in one["conversations"])
        choices = sorted(replies[one["kind"]])
        lines.append({
            "images": [str((images / one["image"]).resolve())], "question": question.replace("<image>\n", ""),
            "answer": answer, "choices": choices, "gold": choices.index(answer),
        })  # fmt: skip
    path = folder / "records.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (folder / "utils.py").write_text(UTILS)
    for name, rest in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{COMMON.format(records=path.resolve())}{rest}")
