"""A folder in which the commands of a page find the files that they name: records, images, checkpoints, code."""

import re
from collections.abc import Iterable
from pathlib import Path

from tests.pages.blocks import read_files

RECORD_KEYS = re.compile(r"dataset\.(?:(?:eval_|test_)?path|sources\.\w+\.path)|trainer\.before_after_probe")
FOLDER_KEYS = re.compile(r"dataset\.(?:(?:eval_|test_)?image_folder|sources\.\w+\.image_folder)")
CHECKPOINT_KEYS = re.compile(r"trainer\.(?:from_pretrained|distillation\.teacher)")
SETTINGS = re.compile(r"(folder|path|from_pretrained): *([\w./-]+)")
PART_KEYS = re.compile(r"model\.(?:visual_encoder|language_model)\.hf_name")


class Place:
    """A folder with what commands name; each file is empty, each checkpoint a link to `checkpoint`."""

    def __init__(self, folder: Path, checkpoint: Path):
        self.folder = folder
        self.checkpoint = checkpoint

    def write_files(self, page: str) -> None:
        """Write the files that a page shows whole."""
        for name, text in read_files(page).items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            self.provide_named(text)

    def provide_named(self, settings: str) -> None:
        """Make the records, images and checkpoints that a YAML file names."""
        for key, value in SETTINGS.findall(settings):
            known = {"folder": "dataset.image_folder", "from_pretrained": "trainer.from_pretrained"}
            self.provide([f"{known.get(key, 'dataset.path')}={value}"])

    def provide(self, words: Iterable[str]) -> list[str]:
        """Return the words of a run as they are typed here, after making what they name.

        `…`, which stands for the rest of a command, becomes records; absolute paths become paths within this folder.
        """
        return [self._provide_word(word) for word in words]

    def _provide_word(self, word: str) -> str:
        if word == "…":
            word = "dataset.path=train.json"
        key, equals, value = word.partition("=")
        if not equals or "://" in value or value.startswith(("pipe:", "{")):
            return word
        value = value.strip("/") if value.startswith("/") else value
        path = self.folder / value
        if RECORD_KEYS.fullmatch(key):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        elif FOLDER_KEYS.fullmatch(key):
            path.mkdir(parents=True, exist_ok=True)
        elif CHECKPOINT_KEYS.fullmatch(key) or (
            PART_KEYS.fullmatch(key) and len(path.parts) - len(self.folder.parts) > 2
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                path.symlink_to(self.checkpoint)
        else:
            return word
        return f"{key}={value}"
