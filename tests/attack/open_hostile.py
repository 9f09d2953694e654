"""A process that opens hostile checkpoints one after the other, and writes what each answered or was refused with.

`python -m tests.attack.open_hostile FOLDERS RESULTS KIND …` opens those of these kinds. A case may take `SECONDS` of
processor time, `HANG` seconds in all, and `MEMORY` beyond what the process has at its start; else the process ends, and
the last line of RESULTS tells in which case.
"""

import json
import os
import resource
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from PIL import Image

from tests.attack.hostile import CASES
from tests.waiting import HANG
from vlm.inference.generate import VisionLanguageModel
from vlm.inference.predict import Predictor

SECONDS = 60
MEMORY = 3 << 30


def ask(kind: str, folder: Path) -> Any:
    """Load a checkpoint as `vlm generate` and `vlm predict` do, and ask it about an image."""
    image = Image.new("RGB", (40, 30), "red")
    if kind == "prediction":
        return Predictor.load(folder, device="cpu").predict("<image> What is this?", [image])
    return VisionLanguageModel.load(folder, device="cpu").generate("<image> What is this?", [image], max_new_tokens=2)


def outcome(kind: str, folder: Path) -> dict[str, str]:
    """Return how a checkpoint was taken: `answered`, `refused` with a sentence, or `raised` with a traceback."""
    try:
        ask(kind, folder)
    except (ValueError, OSError) as error:
        return {"how": "refused", "text": str(error)}
    except BaseException:
        return {"how": "raised", "text": traceback.format_exc()}
    return {"how": "answered", "text": ""}


def main() -> None:
    """Open all hostile checkpoints of the kinds that were asked for."""
    folders, results, kinds = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (has + MEMORY, has + MEMORY))
    with results.open("a") as file:
        for kind, name in CASES:
            folder = folders / kind / name
            if kind not in kinds or not folder.is_dir():
                continue
            print(json.dumps({"case": [kind, name], "how": "hung", "text": ""}), file=file, flush=True)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            signal.alarm(int(HANG))
            os.chdir(folder)
            print(json.dumps({"case": [kind, name], **outcome(kind, folder)}), file=file, flush=True)


if __name__ == "__main__":
    main()
