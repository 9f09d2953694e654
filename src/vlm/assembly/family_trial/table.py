"""The table of proofs, and the trial that makes all of them. To add a proof, add a function to `PROOFS`."""

import time
from collections.abc import Callable, Iterator

from transformers import PreTrainedConfig

from vlm.assembly.family_trial.conversations import draw_image, one_turn
from vlm.assembly.family_trial.gradients import prove_gradients
from vlm.assembly.family_trial.images import prove_placeholders, prove_sight, prove_videos
from vlm.assembly.family_trial.rows import (
    prove_batch,
    prove_causal,
    prove_generation,
    prove_packing,
    prove_pairs,
)
from vlm.assembly.family_trial.structure import prove_parts, prove_saving
from vlm.assembly.family_trial.subject import Subject
from vlm.assembly.family_trial.texts import prove_labels
from vlm.assembly.family_trial.verdicts import (
    DisprovedError,
    NotProvableError,
    State,
    Verdict,
    shorten_reason,
)
from vlm.assembly.opening import quiet_loading
from vlm.assembly.small_models.shrink import shrink
from vlm.families.meta_model import without_zero3
from vlm.families.processing import FamilyProcessor

Proof = Callable[[Subject], str | None]
"""Makes a proof, and returns what else it found; raises `DisprovedError` where the property does not hold,
`NotProvableError` where nothing can be found out. Whatever else is raised says that the proof could not be made."""

MAX_SECONDS = 300.0
"""Seconds after which no further proof of a trial is begun."""


def try_family(
    config: PreTrainedConfig,
    processor: FamilyProcessor,
    *,
    trust_remote_code: bool = False,
    attention: str | None = None,
    max_seconds: float = MAX_SECONDS,
) -> dict[str, Verdict]:
    """Return the verdict of each proof of `PROOFS` for a family, made on a small model of the same configuration.

    Args:
        config: the model's configuration.
        processor: the model's processor.
        trust_remote_code: whether code of the checkpoint's repository may run.
        attention: attention implementation; None: as transformers chooses.
        max_seconds: seconds after which no further proof is begun.
    """
    deadline = time.monotonic() + max_seconds
    with quiet_loading(), without_zero3():  # this rank alone tries: nothing may wait for the others
        try:
            subject = make_subject(config, processor, trust_remote_code, attention)
        except Exception as error:  # whatever a model does with a configuration
            reason = f"no small model of it could be made: {type(error).__name__}: {error}"
            return dict.fromkeys(PROOFS, Verdict(State.NOT_MADE, shorten_reason(reason)))
        return dict(make_proofs(subject, deadline))


def make_subject(
    config: PreTrainedConfig, processor: FamilyProcessor, trust_remote_code: bool, attention: str | None = None
) -> Subject:
    """Return a small model that reads a question about an image; where none does, one that is built.

    Raises:
        ValueError: no small model can be built.
    """
    made: list[Subject] = []

    def read_image(small: PreTrainedConfig) -> None:
        """Read a question about an image, which shows whether sizes fit together."""
        subject = Subject(small, processor, trust_remote_code, attention)
        made.append(subject)
        subject.alone_logits(one_turn(draw_image(1)))

    try:
        shrink(config, read_image)
    except ValueError:
        made = [Subject(shrink(config), processor, trust_remote_code, attention)]
    return made[-1]


def make_proofs(subject: Subject, deadline: float) -> Iterator[tuple[str, Verdict]]:
    """Yield the verdict of each proof; those that would begin after a deadline of `time.monotonic` are not made."""
    for name, prove in PROOFS.items():
        if time.monotonic() > deadline:
            yield name, Verdict(State.NOT_MADE, "the trial took too long; the proofs before it used up its time")
        else:
            yield name, make_proof(prove, subject)


def make_proof(prove: Proof, subject: Subject) -> Verdict:
    """Return the verdict of a proof."""
    try:
        found = prove(subject)
    except DisprovedError as error:
        return Verdict(State.FAILED, shorten_reason(str(error)))
    except NotProvableError as error:
        return Verdict(State.NOT_MADE, shorten_reason(str(error)))
    except Exception as error:  # a model's code may do anything
        return Verdict(State.NOT_MADE, shorten_reason(f"{type(error).__name__}: {error}"))
    return Verdict(State.PROVED, found or "")


PROOFS: dict[str, Proof] = {
    "parts": prove_parts,
    "gradients": prove_gradients,
    "labels": prove_labels,
    "placeholders": prove_placeholders,
    "sight": prove_sight,
    "videos": prove_videos,
    "causal": prove_causal,
    "batch": prove_batch,
    "packing": prove_packing,
    "pairs": prove_pairs,
    "saving": prove_saving,
    "generation": prove_generation,
}
"""Name -> proof, in the order in which they are made."""

OPTIONAL = ("packing", "pairs", "videos")
"""Proofs that only some runs need: those with `trainer.packing=true`, those of preferences with it, and those whose
records have videos."""
