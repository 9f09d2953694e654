"""Trackers of a run (`trainer.report_to`): what they get besides metrics, and how their run ends.

transformers has a callback for each tracker, which sends metrics, the arguments of its `Trainer` and the configuration
of the model. Here they get the run's own settings and the answers to samples too, through what each tracker itself
offers for settings, texts and images. To add that for another one, add a subclass of `Tracker` to `TRACKERS`.
"""

import textwrap
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import ClassVar, Protocol

import numpy as np
from PIL import Image
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import MLflowCallback, TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.trainer_callback import CallbackHandler

from vlm.data.pages import thumbnail
from vlm.runs.status_line import DONE, FAILED, STOPPED
from vlm.train.monitor.plots import AnsweredSample
from vlm.train.monitor.recording import is_stop

IMAGE_SIZE = 224
"""Pixels of the longer side of an image that a tracker gets; images with objects on them are not made smaller."""
MAX_PARAMETERS, MAX_LENGTH = 100, 500
"""What MLflow takes at once, and of one value."""

Settings = Mapping[str, object]
"""Dotted key -> value, of a configuration without secrets."""
Images = Sequence[Image.Image | None]
"""The image of each sample that is to be sent, in RGB."""


class Tracker(ABC):
    """What a tracker gets besides metrics.

    Attributes:
        kind: the callback of transformers that begins its run.
    """

    kind: ClassVar[type[TrainerCallback]]

    def __init__(self, callback: TrainerCallback):
        self.callback = callback

    @abstractmethod
    def send_settings(self, settings: Settings) -> None:
        """Send the settings of a run that begins."""

    @abstractmethod
    def send_samples(self, step: int, samples: Sequence[AnsweredSample], images: Images) -> None:
        """Send what the model answered at a step."""

    def end(self, state: str) -> None:  # noqa: B027 - the callbacks of most do
        """End the tracker's run where its callback leaves it open, so that the next run of a sweep is another one.

        `state` is how the run ended, one of `ENDED_STATES`.
        """


class TensorBoard(Tracker):
    """Texts and images of `torch.utils.tensorboard`."""

    kind = TensorBoardCallback
    callback: TensorBoardCallback

    def send_settings(self, settings: Settings) -> None:
        """Add them as a text."""
        lines = "\n".join(f"{key}: {value}" for key, value in settings.items())
        self._writer.add_text("settings", textwrap.indent(lines, "    "))

    def send_samples(self, step: int, samples: Sequence[AnsweredSample], images: Images) -> None:
        """Add a text and an image for each."""
        for number, (sample, image) in enumerate(zip(samples, images, strict=True)):
            self._writer.add_text(f"samples/{number}", as_markdown(sample), step)
            if image is not None:
                self._writer.add_image(f"samples/{number}", np.asarray(image), step, dataformats="HWC")
        self._writer.flush()

    @property
    def _writer(self):
        assert self.callback.tb_writer is not None, "trackers come last, see `add_trackers`"
        return self.callback.tb_writer


class Wandb(Tracker):
    """A table of texts, and images."""

    kind = WandbCallback

    def send_settings(self, settings: Settings) -> None:
        """Add them to the configuration of the run."""
        import wandb  # pyright: ignore[reportMissingImports] - in an extra

        wandb.config.update(dict(settings))

    def send_samples(self, step: int, samples: Sequence[AnsweredSample], images: Images) -> None:
        """Log a table of all, and each image."""
        import wandb  # pyright: ignore[reportMissingImports] - in an extra

        rows = [[number, one.question, one.reference, one.answer] for number, one in enumerate(samples)]
        sent: dict[str, object] = {"samples": wandb.Table(["sample", "question", "reference", "answer"], rows)}
        for number, image in enumerate(images):
            if image is not None:
                sent[f"samples/{number}"] = wandb.Image(image, caption=samples[number].question)
        wandb.log({**sent, "train/global_step": step})

    def end(self, state: str) -> None:
        """Finish the run, which the callback never does; wandb knows only whether it succeeded."""
        import wandb  # pyright: ignore[reportMissingImports] - in an extra

        wandb.finish(exit_code=int(state != DONE))


class MLflow(Tracker):
    """Parameters, and artifacts in the folder `samples`."""

    kind = MLflowCallback

    def send_settings(self, settings: Settings) -> None:
        """Add them to the parameters of the run."""
        import mlflow  # pyright: ignore[reportMissingImports] - in an extra

        values = [(key, str(value)[:MAX_LENGTH]) for key, value in settings.items()]
        for start in range(0, len(values), MAX_PARAMETERS):
            mlflow.log_params(dict(values[start : start + MAX_PARAMETERS]))

    def send_samples(self, step: int, samples: Sequence[AnsweredSample], images: Images) -> None:
        """Log a Markdown file of the step, and each image."""
        import mlflow  # pyright: ignore[reportMissingImports] - in an extra

        texts = [f"## Sample {number}\n\n{as_markdown(sample)}\n" for number, sample in enumerate(samples)]
        mlflow.log_text("\n".join(texts), f"samples/step-{step:07}.md")
        for number, image in enumerate(images):
            if image is not None:
                name = f"{number}.png" if samples[number].drawn is None else f"step-{step:07}-{number}.png"
                mlflow.log_image(image, f"samples/{name}")

    def end(self, state: str) -> None:
        """End a run that failed or was stopped, which the callback leaves open."""
        import mlflow  # pyright: ignore[reportMissingImports] - in an extra

        if mlflow.active_run() is not None:
            mlflow.end_run({DONE: "FINISHED", STOPPED: "KILLED"}.get(state, "FAILED"))


class Trackio(Tracker):
    """Markdown and images."""

    kind = TrackioCallback

    def send_settings(self, settings: Settings) -> None:
        """Add them to the configuration of the run."""
        import trackio  # pyright: ignore[reportMissingImports] - in an extra

        trackio.config.update(dict(settings), allow_val_change=True)

    def send_samples(self, step: int, samples: Sequence[AnsweredSample], images: Images) -> None:
        """Log a text and an image for each."""
        import trackio  # pyright: ignore[reportMissingImports] - in an extra

        sent: dict[str, object] = {}
        for number, (sample, image) in enumerate(zip(samples, images, strict=True)):
            sent[f"samples/{number}"] = trackio.Markdown(as_markdown(sample))
            if image is not None:
                sent[f"samples/{number}/image"] = trackio.Image(image, caption=sample.question)
        trackio.log({**sent, "train/global_step": step})


TRACKERS: tuple[type[Tracker], ...] = (TensorBoard, Wandb, MLflow, Trackio)


def as_markdown(sample: AnsweredSample) -> str:
    """Return a sample as Markdown that shows its texts as they are."""
    texts = {"question": sample.question, "reference": sample.reference, "answer": sample.answer}
    return "\n\n".join(
        f"**{name}**\n\n{textwrap.indent(text, '    ', lambda line: True)}" for name, text in texts.items()
    )


class TrackedTrainer(Protocol):
    """What is asked of the run's `VLMTrainer`."""

    callback_handler: CallbackHandler


def find_trackers(handler: CallbackHandler) -> list[Tracker]:
    """Return the trackers of a run."""
    return [kind(callback) for callback in handler.callbacks for kind in TRACKERS if isinstance(callback, kind.kind)]


class SampleSender:
    """Sends the answers of a model to the trackers of a run; an image without objects is sent once.

    Args:
        trainer: the run's trainer.
    """

    def __init__(self, trainer: TrackedTrainer):
        self.trainer = trainer
        self._sent: set[int] = set()

    def __call__(self, step: int, samples: Sequence[AnsweredSample]) -> None:
        """Send what the model answered at a step; called on the rank that writes."""
        images = [self._choose_image(number, sample) for number, sample in enumerate(samples)]
        samples = [replace(one, question=one.question.strip(), answer=one.answer.strip()) for one in samples]
        for tracker in find_trackers(self.trainer.callback_handler):
            tracker.send_samples(step, samples, images)

    def _choose_image(self, number: int, sample: AnsweredSample) -> Image.Image | None:
        if sample.drawn is not None or sample.image is None:
            return None if sample.drawn is None else sample.drawn.convert("RGB")
        if number in self._sent:
            return None
        self._sent.add(number)
        return thumbnail(sample.image, IMAGE_SIZE)


class SettingsSender(TrainerCallback):
    """Sends the settings of a run to its trackers when it begins.

    Args:
        settings: the configuration without secrets.
        trainer: the run's trainer.
    """

    def __init__(self, settings: Settings, trainer: TrackedTrainer):
        self.settings, self.trainer = settings, trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object):
        """Send them; the callbacks of the trackers have begun their runs."""
        if state.is_world_process_zero:
            for tracker in find_trackers(self.trainer.callback_handler):
                tracker.send_settings(self.settings)


def add_trackers(trainer: TrackedTrainer, settings: Settings) -> None:
    """Let the trackers of a run get its settings; put them behind all other callbacks.

    Their run ends with training, before which the last answers are sent.
    """
    kinds = tuple(kind.kind for kind in TRACKERS)
    callbacks = trainer.callback_handler.callbacks
    callbacks.sort(key=lambda callback: isinstance(callback, kinds))
    callbacks.append(SettingsSender(settings, trainer))


@contextmanager
def tracked_run(handler: CallbackHandler, *, is_writer: bool) -> Iterator[None]:
    """Within, a run trains; afterwards its trackers have ended it, also where it failed or was stopped."""
    state = FAILED
    try:
        yield
        state = DONE
    except BaseException as error:
        state = STOPPED if is_stop(error) else FAILED
        raise
    finally:
        for tracker in find_trackers(handler) if is_writer else ():
            tracker.end(state)
