"""Where a record's images and videos are: paths that stay within the image folder, or bytes in the record itself.

Imports the in-memory form, its siblings and the standard library only, since configurations are checked with it.
"""

import base64
import binascii
import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

from vlm.data.records import extracted_frames
from vlm.data.records.embedded import decode_base64, is_base64_image
from vlm.data.records.fields import first_present, is_empty
from vlm.data.records.links import is_within
from vlm.data.records.marks import (
    BOX_MARKS,
    MEDIA_NAMES,
    MarkError,
    Slot,
    find_other_mark,
    join_texts,
    move_image_first,
    split_at_marks,
)
from vlm.data.sample import PLACEHOLDER, VIDEO_PLACEHOLDER, BadSample, ContentPart, ImageRef, Record, Turn, VideoRef

FILE_KEYS = ("path", "url", "image", "video", "file")
"""Keys under which an item of a message names its file, besides its own type."""


def image_refs_from_value(value: object, folder: Path, sample_id: str, key: str = "image") -> list[ImageRef]:
    """Read the images that a record names: none, one or a list.

    Each is a path within `folder`, a `data:` URL, the bytes of an image or their base64, or a mapping with `bytes` or
    `path`, as in Hugging Face data sets.

    Raises:
        BadSample: a value is none of these, or its file does not exist or is outside the folder.
    """
    return [image_ref_from_value(item, folder, sample_id, key) for item in _as_list(value, sample_id, key)]


def image_ref_from_value(value: object, folder: Path, sample_id: str, key: str = "image") -> ImageRef:
    """Read one image, see `image_refs_from_value`."""
    if isinstance(value, dict):
        content, value = value.get("bytes"), value.get("path")
        if isinstance(content, str):
            content = _decode_image_text(content, sample_id)
        if isinstance(content, bytes):
            return ImageRef(Path(value) if isinstance(value, str) else None, content)
    if isinstance(value, bytes):
        return ImageRef(None, value)
    if not isinstance(value, str):
        needed = f"`{key}` must be a path, a list of paths, or hold the bytes of an image"
        raise BadSample(sample_id, f"{needed}, got {value!r:.60}")
    if value.startswith("data:"):
        return ImageRef(None, _decode_data_url(value, sample_id))
    if is_base64_image(value) and not os.path.isfile(folder / value):
        return ImageRef(None, _decode_image_text(value, sample_id))
    return ImageRef(resolve_media_file(value, folder, sample_id))


def video_ref_from_value(value: object, folder: Path, sample_id: str, key: str = "video") -> VideoRef:
    """Read one video: a path within `folder`, or frames that were extracted before, see `extracted_frames`.

    Raises:
        BadSample: the value is neither, or a file does not exist or is outside the folder.
    """
    if isinstance(value, list) or (isinstance(value, dict) and value.get("frames") is not None):
        return read_extracted_frames(value, folder, sample_id)
    if isinstance(value, dict):
        value = value.get("path")
    if not isinstance(value, str):
        raise BadSample(sample_id, f"`{key}` must be a path or a list of paths, got {value!r:.60}")
    return VideoRef(resolve_media_file(value, folder, sample_id, "video"))


def read_extracted_frames(value: object, folder: Path, sample_id: str) -> VideoRef:
    """Read a video as its frames: a list of images, or a mapping of such `frames` with their `fps` or `times`."""
    given = extracted_frames.read_frame_list(value, sample_id)
    frames = [image_ref_from_value(frame, folder, sample_id, "frames") for frame in given.frames]
    refs = tuple(replace(frame, is_extracted=True) for frame in frames)
    return VideoRef(
        refs[0].path or Path("frames in the record itself"), frames=refs, times=given.times, rate=given.rate
    )


def resolve_media_file(name: str, folder: Path, sample_id: str, kind: str = "image") -> Path:
    """Return the path of a file within a folder; `kind` is what messages call it, `image` or `video`.

    Raises:
        BadSample: the name is a URL, or the file does not exist or is outside the folder.
    """
    if "://" in name:
        raise BadSample(sample_id, f"{name}: addresses are not fetched in training; download the {kind} first", name)
    path = folder / name
    if not os.path.isfile(path):  # unlike pathlib's, false for names that no file can have, such as base64
        raise BadSample(sample_id, f"{kind} file {path} does not exist", name)
    if _may_lead_up(name) and not is_within(os.path.abspath(path), os.path.abspath(folder)):  # links are the user's own
        raise BadSample(sample_id, f"{name} leaves the image folder {folder}", name)
    return path


def _may_lead_up(name: str) -> bool:
    """Return whether a name may be that of a file outside the folder that it is looked for in, as far as it tells."""
    return ".." in name or os.path.isabs(name) or ":" in name or "\\" in name


def _as_list(value: object, sample_id: str, key: str) -> list[object]:
    """Return a record's value as a list: a list itself, a string or mapping as its only item, None as empty."""
    if value is None or isinstance(value, list):
        return value or []
    if isinstance(value, (str, dict, bytes)):
        return [value]
    raise BadSample(sample_id, f"`{key}` must be a path or a list of paths, got {value!r:.60}")


def _decode_image_text(text: str, sample_id: str) -> bytes:
    """Decode an image that a text holds in base64."""
    try:
        return decode_base64(text)
    except ValueError as error:
        raise BadSample(sample_id, f"an image in base64 cannot be decoded: {error}") from None


def _decode_data_url(address: str, sample_id: str) -> bytes:
    """Decode a `data:…;base64,…` URL, whatever kind of file it says it holds."""
    head, _, body = address.partition(",")
    try:
        if not head.endswith(";base64"):
            raise binascii.Error("only base64 is read")
        return base64.b64decode(body, validate=True)
    except ValueError as error:  # binascii.Error is one; letters beyond ASCII raise a plain one
        raise BadSample(sample_id, f"an image in a data: address cannot be decoded: {error}") from None


class MediaPlacer:
    """Replaces the marks in a record's texts with its images and videos, in order.

    They are listed as `image` or `images`, `video` or `videos`.
    """

    def __init__(self, record: Record, folder: Path, sample_id: str):
        self.folder, self.sample_id = folder, sample_id
        images = image_refs_from_value(_listed(record, "image", sample_id), folder, sample_id)
        listed = extracted_frames.group_frames(record, _listed(record, "video", sample_id), sample_id)
        listed = _as_list(listed, sample_id, "video")
        videos = [video_ref_from_value(item, folder, sample_id) for item in listed]
        self.media: dict[str, list[ImageRef] | list[VideoRef]] = {PLACEHOLDER: images, VIDEO_PLACEHOLDER: videos}
        self.has_media = bool(images or videos)
        self.has_objects = not is_empty(record.get("objects"))
        self._placed = {PLACEHOLDER: 0, VIDEO_PLACEHOLDER: 0}
        self._indexed: dict[str, set[int]] = {PLACEHOLDER: set(), VIDEO_PLACEHOLDER: set()}

    def next(self, kind: str) -> ImageRef | VideoRef:
        """Return the next image (`<image>`) or video.

        Raises:
            BadSample: none is left, or others are named by their index.
        """
        media, number, name = self.media[kind], self._placed[kind], MEDIA_NAMES[kind]
        if self._indexed[kind]:
            raise BadSample(
                self.sample_id, f"some of its {name}s have an `index` and some do not; give each of them one"
            )
        if number == len(media):
            raise BadSample(self.sample_id, f"it shows more {name}s than the {number} that it lists; list each of them")
        self._placed[kind] += 1
        return media[number]

    def at(self, index: object, kind: str) -> ImageRef | VideoRef:
        """Return the image or video with an index, counted from 0; each may be used several times.

        Raises:
            BadSample: there is none of this index, or some were taken without an index.
        """
        media, name = self.media[kind], MEDIA_NAMES[kind]
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(media):
            allowed = f"the record lists {len(media)}, counted from 0"
            raise BadSample(self.sample_id, f"index={index!r:.20} of an {name} item: {allowed}")
        if self._placed[kind]:
            raise BadSample(
                self.sample_id, f"some of its {name}s have an `index` and some do not; give each of them one"
            )
        self._indexed[kind].add(index)
        return media[index]

    def read_item(self, item: Record) -> ImageRef | VideoRef | None:
        """Return the image or video of a message's item; None for items of other types.

        The item names its file, or has the `index` of one that the record lists, or takes the next of these. A value
        of None means absent, since rows of a table hold None for missing keys.
        """
        item_type = item.get("type")
        if not isinstance(item_type, str) or item_type not in ITEM_KINDS:
            return None
        kind = ITEM_KINDS[item_type]
        if item_type in ("image_url", "video_url"):
            file = _read_address(item.get(item_type))
        elif item.get("source") is not None:
            file = _read_source(item["source"], self.sample_id)
        else:
            file = first_present(item, *FILE_KEYS)
            if file is None:  # Qwen's programs name the image of an item of type image as `image_url` too
                file = _read_address(item.get(f"{item_type}_url"))
            if file is None:
                index = item.get("index")
                return self.next(kind) if index is None else self.at(index, kind)
        file = extracted_frames.with_item_times(item, file, self.sample_id)
        if item.get("index") is not None and self.media[kind]:
            raise BadSample(self.sample_id, "an item has both an `index` and a file; leave one of them out")
        read = video_ref_from_value if kind == VIDEO_PLACEHOLDER else image_ref_from_value
        return read(file, self.folder, self.sample_id, item_type)

    def rest(self) -> tuple[ImageRef | VideoRef, ...]:
        """Place all images and videos that are not placed yet, and return them: videos first, as they are longer."""
        return (*self._take_all(VIDEO_PLACEHOLDER), *self._take_all(PLACEHOLDER))

    def _take_all(self, kind: str) -> list[ImageRef | VideoRef]:
        return [self.next(kind) for _ in range(len(self.media[kind]) - self._placed[kind])]

    def split(self, texts: Sequence[str], items: Sequence[Record] = ()) -> list[list[str | Slot]]:
        """Split the texts that users wrote at the marks that stand for media.

        Args:
            texts: all such texts of the record, in order.
            items: the items of its messages, some of which take media too.

        Raises:
            BadSample: marks and media do not fit.
        """
        numbers = {kind: len(media) for kind, media in self.media.items()}
        for kind, media in self.media.items() if items else ():
            own = [item for item in items if ITEM_KINDS.get(str(item.get("type"))) == kind and not _names_file(item)]
            indexed = any(item.get("index") is not None for item in own)
            numbers[kind] = 0 if indexed else max(0, len(media) - len(own))
        return self._split(texts, numbers)[0] if texts else []

    def place_or_prepend(self, text: str) -> tuple[ContentPart, ...]:
        """Return a question with its media in the places of their marks; without marks, media come first."""
        numbers = {kind: len(media) for kind, media in self.media.items()}
        (pieces,), leading = self._split([text], numbers, lead=True)
        first = [
            medium for kind in (VIDEO_PLACEHOLDER, PLACEHOLDER) if kind in leading for medium in self._take_all(kind)
        ]
        if not first:
            return self.fill(move_image_first(pieces))
        return (*first, *join_texts(["\n", *self.fill(pieces)]))

    def _split(
        self, texts: Sequence[str], numbers: dict[str, int], *, lead: bool = False
    ) -> tuple[list[list[str | Slot]], list[str]]:
        if not self.has_media and not any("<" in text for text in texts):  # no mark of any tool
            return [[text] if text else [] for text in texts], []
        try:
            pieces, leading = split_at_marks(texts, numbers, lead=lead)
        except MarkError as error:
            other = next(filter(None, (find_other_mark(text, has_media=self.has_media) for text in texts)), None)
            hint = f" ({other} is a mark of another tool)" if other and not error.found else ""
            raise BadSample(self.sample_id, f"{error}{hint}") from None
        if not any(isinstance(piece, Slot) for piece in chain(*pieces)):
            for text in texts:
                if mark := find_other_mark(text, has_media=self.has_media):
                    advice = f"name the file in the record, and write {PLACEHOLDER} or {VIDEO_PLACEHOLDER} instead"
                    raise BadSample(self.sample_id, f"its text has {mark}, a mark of another tool; {advice}")
        return pieces, leading

    def fill(self, pieces: Sequence[str | Slot]) -> tuple[ContentPart, ...]:
        """Return the pieces of a text with the next images and videos in their slots."""
        return tuple(join_texts([self.next(piece.kind) if isinstance(piece, Slot) else piece for piece in pieces]))

    def check_all_placed(self, turns: Sequence[Turn]) -> None:
        """Check that every image and video is placed, and that no text has marks of boxes next to them.

        Raises:
            BadSample: an image or video is not placed, or a text has such marks.
        """
        for kind, name in MEDIA_NAMES.items() if self.has_media else ():
            number, indexed = len(self.media[kind]), self._indexed[kind]
            if unused := number - len(indexed) if indexed else number - self._placed[kind]:
                raise BadSample(
                    self.sample_id, f"{unused} of the {number} {name}s that it lists do not occur in its text"
                )
        parts = [part for turn in turns for part in turn.content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) < len(parts) and not self.has_objects:
            for text in [*texts, *(turn.thinking for turn in turns if turn.thinking)]:
                if match := BOX_MARKS.search(text):
                    advice = "the record has no `objects`; list its boxes there, or write them as text"
                    raise BadSample(self.sample_id, f"its text has {match[0]}, but {advice}")


ITEM_KINDS = {
    "image": PLACEHOLDER,
    "image_url": PLACEHOLDER,
    "video": VIDEO_PLACEHOLDER,
    "video_url": VIDEO_PLACEHOLDER,
}
"""Types of items that show an image or a video."""


def _names_file(item: Record) -> bool:
    """Return whether an item of a message names its image or video by itself."""
    return first_present(item, "source", *FILE_KEYS, *ITEM_KINDS) is not None


def _listed(record: Record, key: str, sample_id: str) -> object:
    """Return what a record lists as `key` or its plural; raise BadSample if both are there and differ."""
    value, values = record.get(key), record.get(f"{key}s")
    if values is None or is_empty(values) or values in (value, [value]):
        return values if value is None else value
    if is_empty(value):
        return values
    raise BadSample(sample_id, f"it has both `{key}` and `{key}s`, which differ; leave one of them out")


def _read_address(value: object) -> object:
    """Return the address of an item's `image_url` or `video_url`, which may be a mapping with `url`."""
    return value.get("url") if isinstance(value, dict) else value


def _read_source(source: object, sample_id: str) -> object:
    """Return the image of an Anthropic item's `source` as a `data:` address."""
    if isinstance(source, dict) and source.get("type") == "base64":
        return f"data:{source.get('media_type')};base64,{source.get('data')}"
    if isinstance(source, dict) and source.get("type") == "url":
        return source.get("url")
    raise BadSample(sample_id, f"`source` of an item must have type base64 and data, got {source!r:.60}")
