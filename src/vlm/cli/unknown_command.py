"""What is said where the first word of a command line is no command. Imports the standard library and `config`."""

import re
from collections.abc import Sequence
from difflib import get_close_matches

from vlm.config.packaged import run_names

TRAIN_WORDS = ("train", "run", "fit", "finetune", "fine-tune", "pretrain", "sft", "dpo", "pt", "rlhf")
"""Words by which other programs start a training run."""

SYNONYMS = {
    "ask": "generate", "infer": "generate", "inference": "generate", "answer": "generate", "cli": "chat",
    "talk": "chat", "evaluate": "eval", "test": "eval", "benchmark": "eval", "bench": "eval", "deploy": "serve",
    "api": "serve", "app": "web", "ui": "web", "webui": "web", "web-ui": "web", "convert": "export",
    "merge": "merge-lora", "push": "push-to-hub", "upload": "push-to-hub", "publish": "push-to-hub",
    "hub": "push-to-hub", "env": "doctor", "info": "doctor", "version": "doctor", "list": "models", "ls": "models",
    "dataset": "data", "classify": "predict", "embed": "predict", "slurm": "submit", "torchrun": "launch",
}  # fmt: skip
"""Word of other programs -> our command."""


def describe_unknown_command(words: Sequence[str], commands: Sequence[str]) -> str | None:
    """Return the message for a command line that begins with a word which is no command; None: it is a run's.

    Args:
        words: the command line.
        commands: the names of the commands.
    """
    word = words[0]
    if not re.fullmatch(r"[A-Za-z][\w-]*", word):
        return None  # an option, key=value, or a path, which a run refuses by itself
    rest = " ".join(words[1:])
    if word in run_names():
        return f"`{word}` is a run, not a command: vlm -cn {word} {rest or 'dataset.path=RECORDS'}"
    if word.lower() in TRAIN_WORDS:
        how = rest if "-cn" in words else f"-cn RUN {rest or 'dataset.path=RECORDS'}"
        return f"`{word}` is not a command; to train, name a run: vlm {how}\nvlm --help lists the runs."
    near = [name for name in commands if name.startswith(word.lower())][:3]
    near = near or [SYNONYMS[word.lower()]] if word.lower() in SYNONYMS else near
    near = near or get_close_matches(word.lower(), commands, n=1)
    if near:
        return f"`{word}` is not a command: did you mean {' or '.join(f'`vlm {name}`' for name in near)}?"
    return f"`{word}` is not a command. vlm --help lists the commands; to train, name a run: vlm -cn RUN …"
