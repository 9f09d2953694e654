"""`vlm data show`: records as a run would train on them, supervised tokens marked, in the terminal and on a page."""

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from itertools import count, islice
from pathlib import Path

from PIL import Image

from vlm.config.dataset_schema import DatasetConfig
from vlm.config.shown import presentable
from vlm.data.coordinates.drawing import describe_objects, draw_objects, objects_of_image
from vlm.data.dataset import draw_records
from vlm.data.encoding.labels import IGNORE_INDEX, Encoded
from vlm.data.encoding.preference import SIDE_NAMES, PreferenceEncoder
from vlm.data.encoding.sample_encoder import SampleEncoder
from vlm.data.encoding.thinking import find_thinking
from vlm.data.objects import MarkedObject
from vlm.data.pages import render_page, thumbnail, tokens_as_html, tokens_as_text
from vlm.data.sample import BadSample, ImageRef, MediaSize, Sample, ToolCallTurn
from vlm.data.skipped import explain_folder
from vlm.data.sources import Source, make_sources
from vlm.data.tools.views import describe_views
from vlm.data.usable import check_reply
from vlm.data.vision.images import media_sizes_from_opened, open_media, upright_size
from vlm.data.vision.video import DecodedVideo


@dataclass(frozen=True)
class ShownRecord:
    """A record with its ids, labels, images and videos, or the reason why it cannot be used.

    `sides` are its ids and labels under an empty name, of a preference those of both conversations; () where it cannot
    be used. `notes` tell what of the record is not learned: replies, and keys that are not read. `views` tell what the
    model sees of each image and video. `objects` are drawn onto the images, which come in the order of the text, frames
    of videos that are read as images with them (`is_frame`). `raw` is the record itself where it cannot be used.
    """

    source: Source
    record: int | None
    id: str
    sides: Sequence[tuple[str, Encoded]]
    images: Sequence[Image.Image | DecodedVideo]
    problem: str | None = None
    label: object = None
    notes: Sequence[str] = ()
    views: Sequence[str] = ()
    objects: Sequence[MarkedObject] = ()
    is_frame: Sequence[bool] = ()
    raw: object = None

    def title(self) -> str:
        """Return the record's source, name and counts."""
        place = self.source.name if self.record is None else f"{self.source.name}, record {self.record}"
        if self.id not in ("", "?"):  # a record without an id
            place += f", id {self.id}"
        if not self.sides:
            return place
        counts = "; ".join(self._describe_counts(name, encoded) for name, encoded in self.sides)
        sizes = ", ".join(map(_describe_size, self.images, self.views)) or "no image"
        return f"{place}: {counts}; {sizes}"

    def texts(self) -> tuple[str, str]:
        """Return the text before the first supervised token and the text from it on, without special tokens.

        Of a preference, those of its first side.
        """
        decode = self.source.encoder.processor.tokenizer.decode
        encoded = self.sides[0][1]
        supervised = (place for place, label in enumerate(encoded.labels) if label != IGNORE_INDEX)
        first = next(supervised, len(encoded.input_ids))
        parts = (encoded.input_ids[:first], encoded.input_ids[first:])
        before, reply = (str(decode(part, skip_special_tokens=True)) for part in parts)
        return before, reply

    def _describe_counts(self, name: str, encoded: Encoded) -> str:
        supervised = sum(label != IGNORE_INDEX for label in encoded.labels)
        target = f"{supervised} supervised" if supervised else f"label {self.label!r}"
        return f"{name} {len(encoded.input_ids)} tokens, {target}".lstrip()


def load_shown_records(
    config: DatasetConfig,
    encoder: SampleEncoder,
    *,
    number: int,
    records: Sequence[int] = (),
    seed: int | None = None,
    with_views: bool = True,
) -> Iterable[ShownRecord]:
    """Load records of each source of a run: those at the indices `records`, or else `number` of them.

    These are selected at random by `seed`; without one they are the first, as of streams always. Without `with_views`,
    images are not processed, which is faster, and `views` are empty.

    Raises:
        ValueError: a source does not open, or has no record at one of the indices.
    """
    for source in make_sources(config, encoder):
        if config.streaming:
            for record in islice(source.stream(0, 1, None), number):
                yield _load_shown_record(source, None, record, with_views=with_views)
            continue
        total = len(source)
        if missing := [index for index in records if not 0 <= index < total]:
            raise ValueError(f"--records {missing[0]}: {source.path} has {total} records, numbered from 0")
        selected = range(min(number, total)) if seed is None else draw_records(total, number, seed).tolist()
        for index in records or selected:
            try:
                yield _load_shown_record(source, index, source.records[index], with_views=with_views)
            except BadSample as error:
                yield ShownRecord(source, index, error.sample_id, [], [], error.reason)


def _describe_size(shown: Image.Image | DecodedVideo, view: str) -> str:
    """Return the size of an image or video as text, and what the model sees of it."""
    if isinstance(shown, DecodedVideo):
        return f"video of {len(shown.frames)} frames {shown.clip.width}×{shown.clip.height} (seen as {view})"
    height, width = upright_size(shown)
    return f"{width}×{height} (seen as {view})"


def _load_shown_record(source: Source, number: int | None, record: object, *, with_views: bool) -> ShownRecord:
    images: list[Image.Image | DecodedVideo] = []
    notes = describe_unread(source.unread_keys(record))
    try:
        sample = source.read(record)
        check_reply(sample, needed=source.encoder.needs_reply)
        images = open_media(sample)
        sizes = media_sizes_from_opened(sample.media, images, source.encoder.processor)
        sides = _encode_sides(source.encoder, sample, sizes)
        views = describe_views(source.encoder.processor, images, sizes) if with_views else []
        if number_unlearned := count_unlearned_replies(sample):
            notes.append(f"replies that are not trained on: {number_unlearned}")
        if features := describe_features(sample):
            notes.append(f"with {', '.join(features)}")
        if weights := sorted({turn.weight for turn in sample.replies} - {1.0}):
            notes.append(f"weights of replies other than 1: {', '.join(f'{weight:g}' for weight in weights)}")
        if isinstance(source.encoder, PreferenceEncoder) and source.encoder.rejects_image and sample.media:
            notes.append("the rejected side sees other images than these (trainer.preference.rejected_image)")
        if sample.objects:
            shown = "; ".join(describe_objects(sample.objects))
            notes.append(f"objects, written as {source.encoder.processor.coordinates}: {shown}")
        frames = [isinstance(ref, ImageRef) and ref.frame is not None for ref in sample.media]
        return ShownRecord(
            source, number, sample.id, sides, images, None, sample.label, notes, views, sample.objects, frames
        )
    except BadSample as error:
        is_missing = error.file is not None and error.reason.endswith("does not exist")
        notes = [explain_folder(source), *notes] if is_missing else notes
        return ShownRecord(source, number, error.sample_id, [], images, error.reason, notes=notes, raw=record)


def _encode_sides(encoder: SampleEncoder, sample: Sample, sizes: Sequence[MediaSize]) -> list[tuple[str, Encoded]]:
    """Return the ids and labels of a sample, or those of each side of a preference under its name."""
    if isinstance(encoder, PreferenceEncoder):
        return [(SIDE_NAMES[role], encoded) for role, encoded in encoder.encode_sides(sample, sizes)]
    return [("", encoder(sample, sizes))]


def describe_unread(keys: Sequence[str]) -> list[str]:
    """Return a note on keys that are not read; none without any."""
    return [f"keys that are not read: {', '.join(keys)}"] if keys else []


def count_unlearned_replies(sample: Sample) -> int:
    """Return the number of replies that are blank, or that `weight` or `loss` leaves out."""
    return sum(turn.role == "assistant" and not turn.supervised for turn in sample.turns)


def describe_features(sample: Sample) -> list[str]:
    """Name what a sample has besides texts and images: tools, calls, thinking, weights, references, frame lists."""
    features = {
        "tools": bool(sample.tools),
        "calls of tools": any(isinstance(turn, ToolCallTurn) for turn in sample.turns),
        "results of tools": any(turn.role == "tool" for turn in sample.turns),
        "thinking": any(map(find_thinking, sample.turns)),
        "weights of replies": any(turn.weight != 1 for turn in sample.replies),
        "several references": len(sample.references) > 1,
        "videos of extracted frames": any(video.frames for video in sample.videos),
    }
    return [name for name, is_there in features.items() if is_there]


def as_text(shown: ShownRecord, *, colours: bool) -> str:
    """Format a record for the terminal."""
    notes = "".join(f"   {presentable(note)}\n" for note in shown.notes)
    title = presentable(shown.title())
    if not shown.sides:
        return f"── {title}\n   cannot be used: {presentable(shown.problem)}\n{notes}"
    processor = shown.source.encoder.processor
    texts = []
    for name, encoded in shown.sides:
        ids, labels, weights = encoded.input_ids, encoded.labels, encoded.weights
        tokens = tokens_as_text(ids, labels, processor, weights, colours=colours)
        texts.append(f"   {name}:\n{tokens}\n" if name else f"{tokens}\n")
    return f"── {title}\n{notes}{''.join(texts)}"


def as_html(shown: ShownRecord) -> str:
    """Format a record as a section of a page, with its images."""
    problem = "" if shown.sides else f'<p class="bad">cannot be used: {escape(shown.problem or "")}</p>'
    head = f"<h2>{escape(shown.title())}</h2>{problem}" + "".join(f"<p>{escape(note)}</p>" for note in shown.notes)
    numbers = count()
    for place, image in enumerate(shown.images):
        is_image = not isinstance(image, DecodedVideo) and not (shown.is_frame and shown.is_frame[place])
        objects = objects_of_image(shown.objects, next(numbers)) if is_image else []
        for frame in image.frames if isinstance(image, DecodedVideo) else [image]:
            head += _image_as_html(frame, objects)
    if not shown.sides:
        return head
    processor = shown.source.encoder.processor
    for name, encoded in shown.sides:
        mask = [1] * len(encoded.input_ids)
        tokens = tokens_as_html(encoded.input_ids, encoded.labels, mask, processor, encoded.weights)
        head += (f"<h3>{name}</h3>" if name else "") + f"<p>{tokens}</p>"
    return head


def _image_as_html(image: Image.Image, objects: Sequence[MarkedObject]) -> str:
    """Return a thumbnail of an image; where it has objects, a larger copy with these."""
    buffer = BytesIO()
    (draw_objects(image, objects) if objects else thumbnail(image)).save(buffer, "JPEG", quality=85)
    style = ' style="height:auto;max-width:100%"' if objects else ""
    return f'<img{style} src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}" alt="">'


def write_page(records: Sequence[ShownRecord], path: Path, processor: str = "") -> None:
    """Write all records to one HTML page that needs no other file; `processor` tells how images are prepared."""
    intro = "As a run would train on them. <mark>Marked</mark> tokens are supervised."
    intro += f"</p><p>{escape(processor)}" if processor else ""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render_page("Records", intro, [as_html(record) for record in records]), encoding="utf-8")
