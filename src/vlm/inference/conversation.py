"""A conversation with a model, in which each question comes with the earlier turns; used by `vlm chat` and the page."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import chain

from PIL import Image
from torch import Tensor

from vlm.config.dataset_schema import DatasetConfig
from vlm.config.schema import InferenceConfig
from vlm.data.coordinates.answers import parse_answer_to_images
from vlm.data.coordinates.drawing import draw_objects, objects_of_image
from vlm.data.sample import Turn
from vlm.data.vision.images import Medium, upright_size
from vlm.inference.generate import VisionLanguageModel
from vlm.inference.prompts import ImageInput, VideoInput, errors_without_record


@dataclass(frozen=True)
class Exchange:
    """A question with its images and videos, opened, and the model's answer."""

    question: Turn
    media: tuple[Medium, ...]
    answer: str


class Conversation:
    """Questions and answers, in order. It changes only when an answer is complete.

    Args:
        model: the model that answers.
        settings: generation settings; None: the defaults of `InferenceConfig`.
        system_prompt: the system turn; None: what the model's template writes by itself, if anything.
        max_frames: the largest number of frames read from a video.

    Attributes:
        exchanges: the finished exchanges.
        settings: generation settings of the next answer; may be changed between questions.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        settings: InferenceConfig | None = None,
        *,
        system_prompt: str | None = None,
        max_frames: int = DatasetConfig.max_frames,
    ):
        self.model, self.settings, self.max_frames = model, settings or InferenceConfig(), max_frames
        self.system = () if system_prompt is None else (Turn("system", (system_prompt,)),)
        self.exchanges: tuple[Exchange, ...] = ()
        self._revision = 0

    @property
    def turns(self) -> tuple[Turn, ...]:
        """All turns so far, the system prompt first."""
        turns = ((exchange.question, Turn("assistant", (exchange.answer,))) for exchange in self.exchanges)
        return (*self.system, *chain.from_iterable(turns))

    @property
    def media(self) -> list[Medium]:
        """The images and videos of all questions, opened, in order."""
        return [media for exchange in self.exchanges for media in exchange.media]

    def ask(
        self,
        text: str,
        images: Sequence[ImageInput] = (),
        videos: Sequence[VideoInput] = (),
        *,
        every_mark: bool = False,
    ) -> Generator[str]:
        """Ask the next question; a bad question is refused here, before anything is generated.

        Args:
            text: the question; `<image>` and `<video>` mark the places of its images and videos, which come first
                where there is no mark. The mark of a single image or video is a word if it stands within a sentence.
            images: its images, as paths or Pillow images.
            videos: its videos, as paths.
            every_mark: whether a mark within a sentence stands for the single image or video too.

        Returns:
            The answer piece by piece, or in one piece with beam search. The exchange joins the conversation once the
            last piece has been taken; nothing is kept of an answer that fails, that is closed early, or that was
            begun before the conversation changed.

        Raises:
            ValueError: there is no question, an image does not open, `<image>` and images do not match, the model's
                template refuses such turns, or the conversation has become too long for the model.
        """
        if not text.strip() and not images and not videos:
            raise ValueError("there is no question")
        question, media = self.model.open_question(text, images, videos, self.max_frames, every_mark=every_mark)
        with errors_without_record():
            turns, opened = [*self.turns, question], [*self.media, *media]
            inputs = self.model.inputs([turns], [opened], thinking=self.settings.thinking)
        self.model.check_length(inputs, self.settings, "conversation")
        return self._generate_answer(inputs, question, tuple(media), self._revision)

    def _generate_answer(
        self, inputs: dict[str, Tensor], question: Turn, media: tuple[Medium, ...], revision: int
    ) -> Generator[str]:
        generate = self.model.answers if self.settings.num_beams > 1 else self.model.stream_batch
        answer = ""
        for piece in generate(inputs, self.settings):
            answer += piece
            yield piece
        if revision == self._revision:
            self._set_exchanges((*self.exchanges, Exchange(question, media, answer.strip())))

    def draw_last_answer(self) -> Image.Image | None:
        """Return the newest image with the objects that the last answer tells drawn onto it; None without any.

        It is the first image of the newest question with images.
        """
        if not self.exchanges:
            return None
        shown = [[media for media in one.media if isinstance(media, Image.Image)] for one in self.exchanges]
        newest = max((number for number, images in enumerate(shown) if images), default=None)
        if newest is None:
            return None
        place, images = sum(map(len, shown[:newest])), list(chain.from_iterable(shown))
        sizes = [upright_size(image) for image in images]
        found = parse_answer_to_images(self.exchanges[-1].answer, self.model.processor, sizes, place)
        objects = objects_of_image(found, place)
        return draw_objects(images[place], answered=objects) if objects else None

    def undo(self) -> None:
        """Forget the last exchange, if there is one."""
        self._set_exchanges(self.exchanges[:-1])

    def reset(self) -> None:
        """Forget all but the system prompt."""
        self._set_exchanges(())

    def _set_exchanges(self, exchanges: tuple[Exchange, ...]) -> None:
        self.exchanges = exchanges
        self._revision += 1
