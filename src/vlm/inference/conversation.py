"""Several questions to a model, each with all that was said before: what `vlm chat` and the page are made of."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

from vlm.config.schema import DatasetConfig, InferenceConfig
from vlm.data.sample import BadSample, Turn
from vlm.inference.generate import VisionLanguageModel


@dataclass(frozen=True)
class Exchange:
    """A question and its answer.

    Attributes:
        question: what was asked.
        media: its images and videos, opened.
        answer: what the model said.
    """

    question: Turn
    media: tuple[Any, ...]
    answer: str

    @property
    def turns(self) -> tuple[Turn, Turn]:
        """Both sides."""
        return self.question, Turn("assistant", (self.answer,))


class Conversation:
    """Questions and answers, in order. It changes when an answer is complete, and not before.

    Args:
        model: the model that is asked.
        settings: how answers are drawn; None: as `InferenceConfig` has it.
        system_prompt: said first; None: what the model's template says by itself, if anything.
        max_frames: most frames of a video that are seen.

    Attributes:
        exchanges: what was said.
        settings: how the next answer is drawn; may be changed between questions.
    """

    def __init__(
        self, model: VisionLanguageModel, settings: InferenceConfig | None = None, *, system_prompt: str | None = None,
        max_frames: int = DatasetConfig.max_frames,
    ):  # fmt: skip
        self.model, self.settings, self.max_frames = model, settings or InferenceConfig(), max_frames
        self.system = () if system_prompt is None else (Turn("system", (system_prompt,)),)
        self.exchanges: tuple[Exchange, ...] = ()
        self._revision = 0

    @property
    def turns(self) -> tuple[Turn, ...]:
        """All that was said, a system prompt first."""
        return (*self.system, *(turn for one in self.exchanges for turn in one.turns))

    @property
    def media(self) -> list[Any]:
        """The images and videos of all questions, opened, in order."""
        return [media for one in self.exchanges for media in one.media]

    def ask(self, text: str, images: Sequence[Any] = (), videos: Sequence[Any] = ()) -> Generator[str]:
        """Ask what comes next; all that can be wrong with the question is raised here, before anything is generated.

        Args:
            text: the question; `<image>` and `<video>` in it say where one stands, else they come first.
            images: its images, as paths or Pillow images.
            videos: its videos, as paths.

        Returns:
            The answer, piece by piece; with beams, which settle on it at the end, in one piece. Question and answer
            belong to the conversation once the last piece has been taken. Of an answer that fails, or that nobody
            takes to its end (`close()`), nothing is kept, nor of one that was begun before the conversation changed.

        Raises:
            ValueError: there is no question, an image does not open, `<image>` and images do not match, the model's
                template refuses such turns, or the conversation has become too long for the model.
        """
        if not text.strip() and not images and not videos:
            raise ValueError("there is no question")
        question, media = self.model.asked(text, images, videos, self.max_frames)
        try:
            inputs = self.model.inputs([[*self.turns, question]], [[*self.media, *media]])
        except BadSample as error:
            raise ValueError(error.reason) from error
        self.model.check_length(inputs, self.settings, "conversation")
        return self._generate_answer(inputs, question, tuple(media), self._revision)

    def _generate_answer(
        self, inputs: dict[str, Any], question: Turn, media: tuple[Any, ...], revision: int
    ) -> Generator[str]:
        if self.settings.num_beams > 1:
            pieces = self.model.answers(inputs, self.settings)
            yield pieces[0]
        else:
            pieces = []
            for piece in self.model.streamed(inputs, self.settings):
                pieces.append(piece)
                yield piece
        if revision == self._revision:
            self._set_exchanges((*self.exchanges, Exchange(question, media, "".join(pieces).strip())))

    def undo(self) -> None:
        """Forget the last question and its answer; nothing where there is none."""
        self._set_exchanges(self.exchanges[:-1])

    def reset(self) -> None:
        """Forget all but the system prompt."""
        self._set_exchanges(())

    def _set_exchanges(self, exchanges: tuple[Exchange, ...]) -> None:
        self.exchanges = exchanges
        self._revision += 1
