"""Records of preferences as a data set, each item with all sides of a record."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TypedDict, cast

from torch import Tensor
from torch.utils.data import Dataset

from vlm.data.dataset import SampleDataset, SampleRef, join_inputs
from vlm.data.encoding.preference import MISMATCHED, REJECTED, PreferenceEncoder, has_own_media, split_media
from vlm.data.encoding.processor_errors import processor_errors
from vlm.data.preference.images import SAME, perturb_media
from vlm.data.processor import Processor, SampleInputs
from vlm.data.sample import BadSample, ImageRef, MediaSize, Sample, Turn, VideoRef
from vlm.data.skipped import Skipped
from vlm.data.sources import Source
from vlm.data.vision.images import Medium, media_sizes_from_opened
from vlm.data.vision.jpeg import decode_sample_images

MediaRef = ImageRef | VideoRef


class PreferenceItem(TypedDict):
    """A record as `PreferenceDataset` gives it.

    Attributes:
        sides: the inputs of each of its conversations: of a pair the chosen one, then the rejected one.
        roles: what each of them is: `CHOSEN`, `REJECTED` or `MISMATCHED`.
        index: the index of the record in the data set.
        ref: names the record.
    """

    sides: list[SampleInputs]
    roles: list[int]
    index: int
    ref: SampleRef


class PreferenceDataset(Dataset[PreferenceItem | Skipped]):
    """Records with their sides.

    Attributes:
        dataset: the records.
        rejected_image: the images of the rejected side, `trainer.preference.rejected_image`.
        mismatches: whether each record has a row with its own prompt and the reply of the record before it.
        lengths: `(records,)`: tokens of the longest side of each.
        num_images: `(records,)`: images and videos of its sides, those that both have counted once.

    Raises:
        TypeError: the records are not encoded by a `PreferenceEncoder`.
    """

    def __init__(self, dataset: SampleDataset, *, rejected_image: str = SAME, mismatches: bool = False):
        self.dataset, self.lengths, self.num_images = dataset, dataset.lengths, dataset.num_images
        self.rejected_image, self.mismatches = rejected_image, mismatches
        for source in dataset.sources:
            if not isinstance(source.encoder, PreferenceEncoder):
                raise TypeError(f"{type(source.encoder).__name__} encodes no preferences")

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> PreferenceItem | Skipped:
        """Return a record's sides, encoded, or `Skipped` for a record that turns out to be unusable."""
        number, record = self.dataset.places[index].tolist()
        source = self.dataset.sources[number]
        try:
            sample = source.sample(record)
            reply = self.dataset.sample(index - 1 if index else len(self) - 1).replies[-1] if self.mismatches else None
            sides = encode_sides(source, sample, self.rejected_image, reply)
        except BadSample as error:
            return Skipped.from_error(error, source, record)
        ref = SampleRef(source.shown_path, record, sample.id)
        roles = [role for role, _ in sides]
        return {"sides": [inputs for _, inputs in sides], "roles": roles, "index": index, "ref": ref}


def encode_sides(
    source: Source, sample: Sample, rejected_image: str = SAME, reply: Turn | None = None
) -> list[tuple[int, SampleInputs]]:
    """Return the inputs of each side of a record with its role; images that several sides have are prepared once.

    Args:
        source: where the record comes from; its encoder is a `PreferenceEncoder`.
        sample: the record.
        rejected_image: the images of the rejected side, `trainer.preference.rejected_image`.
        reply: a reply of another record, of which a mismatched side is made; None: of none.

    Raises:
        BadSample: a side is missing or too long, or an image does not open.
    """
    encoder = cast(PreferenceEncoder, source.encoder)
    processor = encoder.processor
    media = decode_sample_images(sample, processor)
    sizes = media_sizes_from_opened(sample.media, media, processor)
    encoded = encoder.encode_sides(sample, sizes)
    if reply is not None:
        mixed = replace_reply(sample.chosen, reply)
        encoded.append((MISMATCHED, encoder.encode_side(mixed, split_media(sample, MISMATCHED, sizes))))
    prepared: dict[bool, dict[str, Tensor]] = {}
    sides = []
    for role, ids in encoded:
        has_others = role == REJECTED and (rejected_image != SAME or has_own_media(sample))
        if has_others not in prepared:
            own, own_sizes = split_media(sample, role, media), split_media(sample, role, sizes)
            if has_others and rejected_image != SAME:
                own = perturb_media(own, rejected_image, processor, _describe(sample))
            refs = split_media(sample, role, sample.media)
            prepared[has_others] = _prepare(processor, own, own_sizes, sample.id, refs)
        sides.append((role, join_inputs(processor, ids, prepared[has_others])))
    return sides


def replace_reply(sample: Sample, reply: Turn) -> Sample:
    """Return a conversation with another last reply, which alone is trained on.

    Raises:
        BadSample: it does not end with a reply.
    """
    *before, last = sample.turns
    if last.role != "assistant":
        raise BadSample(sample.id, f"it ends with the {last.role}'s turn, so there is no last reply to compare")
    turns = [replace(turn, supervised=False) if turn.role == "assistant" else turn for turn in before]
    return replace(sample, turns=(*turns, reply), label=None)


def _prepare(
    processor: Processor, media: Sequence[Medium], sizes: Sequence[MediaSize], sample_id: str, refs: Sequence[MediaRef]
) -> dict[str, Tensor]:
    """Return the model's inputs for the images of a side."""

    def process_one(index: int) -> object:
        """Process one medium alone, to find out which of them the processor refuses."""
        return processor.image_inputs(media[index : index + 1], sizes[index : index + 1])

    with processor_errors("the processor", sample_id, refs, process_one):
        return processor.image_inputs(media, sizes)


def _describe(sample: Sample) -> str:
    """Return the name and the texts of a record."""
    texts = [part for turn in sample.turns for part in turn.content if isinstance(part, str)]
    return "\n".join([sample.id, *texts])
