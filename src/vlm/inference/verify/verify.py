"""One comparison from the beginning to its certificate."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from tqdm import tqdm

from vlm.assembly.model_kinds import is_composed_model
from vlm.hub.certificates import Certificate, ComparedStage, fingerprint_files
from vlm.inference.generate import VisionLanguageModel
from vlm.inference.verify.cases import Case
from vlm.inference.verify.comparison import (
    STAGES,
    TIES,
    TOLERANCES,
    Difference,
    StageResult,
    compare_stage,
    first_differing_layer,
)
from vlm.inference.verify.engines import LOGITS, NUM_IDS, Engine, Observation, Request, State
from vlm.inference.verify.reference import Reference

NUM_CASES = 20
"""How many questions have their pixels, ids and logits compared; all of them are answered."""


@dataclass(frozen=True)
class Settings:
    """What is asked, and of what.

    Attributes:
        max_new_tokens: the largest number of tokens of an answer.
        export: see `Request`.
        url: see `Request`.
        trust_remote_code: see `Request`.
    """

    max_new_tokens: int = 16
    export: Path | None = None
    url: str | None = None
    trust_remote_code: bool = False


def verify(
    checkpoint: Path, model: VisionLanguageModel, engine: Engine, questions: Sequence[Case], settings: Settings
) -> Certificate:
    """Ask both training's path and an engine, and compare.

    Args:
        checkpoint: the folder of the checkpoint.
        model: the same, loaded.
        engine: the other engine.
        questions: what is asked; of the first `NUM_CASES`, pixels, ids and logits are compared.
        settings: further settings.

    Raises:
        ValueError: training could read none of the questions, or the engine cannot be asked.
    """
    reference = Reference(model)
    if not is_composed_model(model.model):
        questions = [replace(case, writes_line_breaks=True) for case in questions]
    usable, reasons = reference.usable(questions, settings.max_new_tokens)
    if not usable:
        raise ValueError(
            f"none of {len(questions)} questions can be asked: {reasons[0] if reasons else 'there are none'}"
        )
    notes = [f"{len(reasons)} of {len(questions)} questions were left out: {reasons[0]}"] if reasons else []
    cases = usable[:NUM_CASES]
    with TemporaryDirectory(prefix="vlm-verify-") as scratch:
        request = Request(
            checkpoint,
            cases,
            usable,
            {case.name: reference.inputs(case) for case in cases},
            Path(scratch),
            settings.max_new_tokens,
            settings.export,
            settings.url,
            str(model.model.device),
            str(model.model.dtype).removeprefix("torch."),
            settings.trust_remote_code,
        )
        observation = engine.observe(request)
        comparison = _Comparison(reference, engine, request, observation)
        return comparison.certificate([*notes, *observation.notes])


class _Comparison:
    """What training's path gives, beside what an engine gave."""

    def __init__(self, reference: Reference, engine: Engine, request: Request, observation: Observation):
        self.reference, self.engine, self.request, self.observation = reference, engine, request, observation
        self.equal = self.tied = self.answers = 0

    def certificate(self, notes: Sequence[str]) -> Certificate:
        """Compare, and return the certificate."""
        observation, given = self.observation, self.observation.outputs
        asked = [case for case in self.request.questions if given.get(case.name)]
        ours = {
            case.name: self.reference.outputs(case, ids_only=given[case.name].keys() == {NUM_IDS})
            for case in tqdm(asked, "training's path", unit="question", disable=None)
        }
        results = list(self._stages(ours))
        difference = next((result.difference for result in results if result.difference), None)
        if difference is not None and difference.stage == LOGITS:
            difference = self._name_layer(difference)
        difference = difference or self._first_failure() or self._compare_ends()
        different_answer = self._compare_answers()
        if observation.is_run and not results and not self.answers:
            raise ValueError(f"{observation.version} gave nothing that could be compared")
        difference = difference or different_answer
        sentence = None if difference is None else f"{difference.sentence} (question {difference.case})"
        stage = None if difference is None else difference.stage
        if observation.problems and difference is None:
            sentence, stage = "; ".join(observation.problems), "settings"
        stages = [
            ComparedStage(result.stage, result.cases, min(result.largest, sys.float_info.max), result.allowed)
            for result in results  # JSON has no infinite numbers
        ]
        return Certificate(
            observation.version, observation.is_run, sentence, stage, stages, self.answers, self.equal, self.tied,
            self.request.dtype, datetime.now(UTC).date().isoformat(), version("small-vlm"),
            fingerprint_files(self.request.checkpoint), notes,
        )  # fmt: skip

    def _stages(self, ours: Mapping[str, State]) -> Iterator[StageResult]:
        for stage in STAGES:
            processor = self.reference.model.processor
            result = compare_stage(stage, ours, self.observation.outputs, processor, self.request.dtype)
            if result is not None:
                yield result

    def _name_layer(self, difference: Difference) -> Difference:
        """Return a difference of logits as that of the first layer that differs, where the engine shows layers."""
        case = self._case(difference.case)
        theirs = self.engine.trace(self.request, case)
        found = first_differing_layer(self.reference.trace(case), theirs, self.request.dtype) if theirs else None
        if found is None:
            return difference
        layer, size = found
        how = (
            "have another shape, or are no numbers," if size == float("inf") else f"differ by {size:.2g} of their size"
        )
        allowed = f"(allowed: {TOLERANCES[self.request.dtype]:g})"
        return Difference(
            layer, case.name, f"the outputs of {layer} are the first that {how} {allowed}; {difference.sentence}"
        )

    def _first_failure(self) -> Difference | None:
        """Return a case of which the engine gave no logits."""
        for case, reason in self.observation.failures.items():
            return Difference(LOGITS, case, f"the model fails at inputs that are those of training: {reason}")
        return None

    def _compare_ends(self) -> Difference | None:
        """Return a difference where an answer that training's path ends goes on, or the reverse."""
        ours, theirs = set(self.reference.ends()), self.observation.ends
        if theirs is None or not ours:
            return None
        settings: object = self.reference.model.model.generation_config
        base = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
        if ours <= set(theirs) <= ours.union(base):
            return None
        return Difference(
            "settings", "any", f"an answer ends at the ids {sorted(set(theirs))[:8]} instead of {sorted(ours)[:8]}"
        )

    def _compare_answers(self) -> Difference | None:
        """Count equal answers; return the first that differs by more than a tie."""
        given = self.observation.answers
        first = None
        self.answers = len(given)
        asked = [case for case in self.request.questions if case.name in given]
        for case in tqdm(asked, "answers", unit="question", disable=None):
            ours, theirs = self.reference.answer(case, self.request.max_new_tokens), given[case.name]
            if ours == theirs:
                self.equal += 1
            elif self.reference.margin(case, ours, theirs) <= TIES[self.request.dtype]:
                self.tied += 1
            elif first is None:
                first = Difference("answers", case.name, f"the answer is {theirs[:60]!r} instead of {ours[:60]!r}")
        different = self.answers - self.equal - self.tied
        if first is not None:
            first = first._replace(sentence=f"{different} of {self.answers} answers differ: {first.sentence}")
        return first

    def _case(self, name: str) -> Case:
        return next(case for case in self.request.questions if case.name == name)
