"""Writers of files of records; the kind of a file follows from its name.

A file is written under a temporary name and renamed when it is complete. To add a kind of file, derive from
`RecordWriter` and name it in `make_writer`.
"""

import base64
import json
import re
import shutil
import tarfile
from abc import ABC, abstractmethod
from datetime import date, datetime, time
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Self

import pyarrow as pa
import pyarrow.parquet as pq

from vlm.data.records.media import first_present, image_refs_from_value
from vlm.data.records.tar import IMAGE_EXTENSIONS
from vlm.data.sample import BadSample, ImageRef, Record
from vlm.data.tools.forms import image_cell_value
from vlm.data.vision.images import IMAGE_ERRORS, open_lazily

OUTPUT_NAMES = "NAME.jsonl, NAME.json, NAME.parquet, FOLDER/ or FOLDER/%06d.tar (tar shards), NAME.tar (one of them)"
SHARD_NAME = "shard-%06d.tar"
SHARD_SIZE = 1000
"""Number of samples in a tar shard."""
ROWS_PER_GROUP = 1000
BYTES_PER_GROUP = 64 << 20
"""The most records, and about the most bytes of images, of a row group of a Parquet file."""
JSON_DELIMITERS = {".jsonl": (b"", b"\n", b"\n"), ".json": (b"[\n", b",\n", b"\n]\n")}
"""Suffix -> what is written before the first record, between records, and after the last."""
MESSAGE_ITEM_TYPE = pa.struct([("type", pa.string()), ("text", pa.string())])
KNOWN_COLUMN_TYPES = {
    "id": pa.string(),
    "videos": pa.list_(pa.string()),
    "conversations": pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())])),
    "messages": pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(MESSAGE_ITEM_TYPE))])),
}
"""Types of the columns that are known before any record is written."""
EMBEDDED_IMAGES_TYPE = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


class RecordWriter(ABC):
    """Writes records within a `with` statement; the file appears at its end, unless an error was raised.

    A record lists images as `image` or `images`, as `records.media.image_refs_from_value` takes them.

    Args:
        path: the file to write.
        image_folder: the folder that paths of images are relative to.
        force: replaces an existing file.

    Attributes:
        number: number of records written.

    Raises:
        ValueError: the file exists, and `force` is not given.
    """

    def __init__(self, path: Path, image_folder: Path, *, force: bool):
        self.path = path
        self.image_folder = image_folder
        self.number = 0
        self.partial = path.with_name(f"{path.name.replace('%', '')}.partial")
        if not force and (existing := self.existing_files()):
            raise ValueError(f"{existing[0]} exists; choose another output, or replace it with --force")
        if path.is_dir():
            raise ValueError(f"{path} is a folder; for tar shards in it, write {path}/")
        path.parent.mkdir(parents=True, exist_ok=True)

    def existing_files(self) -> list[Path]:
        """Return the files that the output would replace."""
        return [self.path] if self.path.exists() else []

    def __enter__(self) -> Self:
        """Open the file."""
        self.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Close the file, and give it its name if no error was raised."""
        try:
            self.close(complete=kind is None)
            if kind is None:
                if not self.number:
                    raise ValueError(f"{self.path}: there are no records to write")
                self.finish()
        finally:
            self.discard()

    def write(self, record: Record) -> None:
        """Write a record.

        Raises:
            BadSample: the record cannot be written. Nothing of it was written, and other records can follow.
            ValueError: the record does not fit those before it.
        """
        self.add(record)
        self.number += 1

    @abstractmethod
    def open(self) -> None:
        """Open the partial file, or prepare to open it."""

    @abstractmethod
    def add(self, record: Record) -> None:
        """Write a record; errors as in `write`."""

    @abstractmethod
    def close(self, *, complete: bool) -> None:
        """Close the partial file; one that is not complete will be removed."""

    def finish(self) -> None:
        """Rename the partial file."""
        self.partial.replace(self.path)

    def discard(self) -> None:
        """Remove the partial file, if it still exists."""
        self.partial.unlink(missing_ok=True)

    def images(self, record: Record) -> list[ImageRef]:
        """Return the images that a record lists."""
        listed = first_present(record, "image", "images")
        return image_refs_from_value(listed, self.image_folder, str(record.get("id", "?")))


class JsonWriter(RecordWriter):
    """Writes one record per line, or as items of a list. The bytes of images become `data:` URLs."""

    def open(self) -> None:
        """Open the partial file."""
        self._file = self.partial.open("wb")
        self._start, self._separator, self._end = JSON_DELIMITERS[self.path.suffix]

    def add(self, record: Record) -> None:
        """Write a line."""
        line = as_json(record)
        self._file.write((self._separator if self.number else self._start) + line)

    def close(self, *, complete: bool) -> None:
        """End the last line or the list."""
        self._file.write(self._end)
        self._file.close()


class ParquetWriter(RecordWriter):
    """Writes rows, with images under `images`: as paths, or embedded as `{bytes, path}`.

    Columns are `images` and those of the first `ROWS_PER_GROUP` records; later ones of other names or types are an
    error.
    """

    def __init__(self, path: Path, image_folder: Path, *, force: bool, embed_images: bool):
        super().__init__(path, image_folder, force=force)
        self._embed = embed_images

    def open(self) -> None:
        """Begin without a file, whose columns are not known yet."""
        self._rows: list[Record] = []
        self._pending_bytes = 0
        self._file: pq.ParquetWriter | None = None

    def add(self, record: Record) -> None:
        """Write a row, once a row group is full."""
        row = {key: value for key, value in record.items() if key not in ("image", "images", "video")}
        if isinstance(video := record.get("video"), (str, list)) and video:
            row["videos"] = [video] if isinstance(video, str) else video
        if images := self.images(record):
            row["images"] = [self._image_cell(image_ref, str(record.get("id", "?"))) for image_ref in images]
        if not self._rows:
            self._first_pending = self.number + 1
        self._rows.append(row)
        if len(self._rows) >= ROWS_PER_GROUP or self._pending_bytes >= BYTES_PER_GROUP:
            self._flush()

    def _image_cell(self, image_ref: ImageRef, sample_id: str) -> str | Record:
        if not self._embed and image_ref.content is not None:
            raise BadSample(sample_id, "its images are bytes, not files; --embed-images stores them in the output")
        name = image_cell_value(image_ref, self.image_folder, sample_id)
        if not self._embed:
            return name
        content = read_image_bytes(image_ref, sample_id)
        self._pending_bytes += len(content)
        return {"bytes": content, "path": name["path"] if isinstance(name, dict) else name}

    def _flush(self) -> None:
        try:
            inferred = pa.schema(list(pa.array(self._rows).type))
            if self._file is None:
                known = pa.schema([(name, kind) for name, kind in KNOWN_COLUMN_TYPES.items() if name in inferred.names])
                images = pa.schema([("images", EMBEDDED_IMAGES_TYPE if self._embed else pa.list_(pa.string()))])
                schema = pa.unify_schemas([known, inferred, images], promote_options="permissive")
                self._file = pq.ParquetWriter(self.partial, schema, compression="zstd")
            schema = self._file.schema
            if not (same := pa.unify_schemas([schema, inferred], promote_options="permissive")).equals(schema):
                differ = [field.name for field in same if field not in schema]
                raise pa.ArrowInvalid(f"{', '.join(differ)}: columns or types that the records before do not have")
            self._file.write_table(pa.Table.from_pylist(self._rows, schema))
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise ValueError(
                f"{self.path}: one of the {len(self._rows)} records from {self._first_pending} on does not fit into a "
                f"table with the others ({error}); a .jsonl file can have records with any keys"
            ) from error
        self._rows, self._pending_bytes = [], 0

    def close(self, *, complete: bool) -> None:
        """Write the pending rows."""
        try:
            if complete and self._rows:
                self._flush()
        finally:
            if self._file is not None:
                self._file.close()


class TarWriter(RecordWriter):
    """Writes tar shards of WebDataset: `000000012.json` with `000000012.jpg`, or `.000.jpg`, `.001.jpg` …

    The same records give the same bytes, since members have no time and no owner. The path has `%06d` or the like for
    the shard's number; without, there is only one shard, of any size.
    """

    def __init__(self, path: Path, image_folder: Path, *, force: bool, shard_size: int | None):
        before, number, after = re.fullmatch(r"(.*?)((?:%\d*d)?)([^%]*)", path.name).groups()
        self._shard_name_pattern = re.compile(re.escape(before) + (r"\d+" if number else "") + re.escape(after))
        self._shard_size = shard_size
        self._shard: tarfile.TarFile | None = None
        super().__init__(path, image_folder, force=force)

    def existing_files(self) -> list[Path]:
        """Return the shards of such names."""
        files = self.path.parent.iterdir() if self.path.parent.is_dir() else ()
        return sorted(file for file in files if self._shard_name_pattern.fullmatch(file.name))

    def open(self) -> None:
        """Create a folder for shards until all are complete."""
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir()

    def add(self, record: Record) -> None:
        """Write the files of a sample."""
        sample_id = str(record.get("id", "?"))
        images = [(read_image_bytes(image_ref, sample_id), image_ref) for image_ref in self.images(record)]
        kinds = [image_file_extension(image_ref, content, sample_id) for content, image_ref in images]
        digits = max(3, len(str(len(kinds))))  # readers take members in the order of their names
        endings = kinds if len(kinds) == 1 else [f"{place:0{digits}d}.{kind}" for place, kind in enumerate(kinds)]
        members = [("json", as_json({key: value for key, value in record.items() if key not in ("image", "images")}))]
        members += zip(endings, (content for content, _ in images), strict=True)
        if self._shard is None or (self._shard_size and self.number % self._shard_size == 0):
            self.close(complete=True)
            name = self.path.name % (self.number // self._shard_size) if self._shard_size else self.path.name
            self._shard = tarfile.open(self.partial / name, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115, more follow
        for ending, content in members:
            member = tarfile.TarInfo(f"{self.number:09d}.{ending}")
            member.size = len(content)
            self._shard.addfile(member, BytesIO(content))

    def close(self, *, complete: bool) -> None:
        """Close the last shard."""
        if self._shard is not None:
            self._shard.close()

    def finish(self) -> None:
        """Replace existing shards by the new ones."""
        for file in self.existing_files():
            file.unlink()
        for file in sorted(self.partial.iterdir()):
            file.rename(self.path.parent / file.name)

    def discard(self) -> None:
        """Remove the folder of incomplete shards."""
        shutil.rmtree(self.partial, ignore_errors=True)


def as_json(record: Record) -> bytes:
    """Format a record as one line of JSON, with the bytes of images as `data:` URLs and dates as ISO 8601."""
    sample_id = str(record.get("id", "?"))
    inlined = {key: _inline_images(record[key], sample_id) for key in ("image", "images") if key in record}
    try:
        return json.dumps({**record, **inlined}, ensure_ascii=False, allow_nan=False, default=_json_default).encode()
    except UnicodeEncodeError:
        raise BadSample(sample_id, "its text is not UTF-8, or has half of a surrogate pair") from None
    except (TypeError, ValueError) as error:
        raise BadSample(sample_id, f"JSON cannot hold it: {error}") from None


def _inline_images(value: object, sample_id: str) -> object:
    if isinstance(value, list):
        return [_inline_images(item, sample_id) for item in value]
    if isinstance(value, dict) and isinstance(content := value.get("bytes"), bytes):
        return f"data:image/{detect_image_format(content, sample_id)};base64,{base64.b64encode(content).decode()}"
    return value


def _json_default(value: object) -> str:
    if isinstance(value, (date, datetime, time)):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} {value!r:.40}")


def read_image_bytes(image_ref: ImageRef, sample_id: str) -> bytes:
    """Read the bytes of an image's file."""
    if image_ref.content is not None:
        return image_ref.content
    if image_ref.path is None or image_ref.frame is not None:
        raise BadSample(sample_id, f"image {image_ref} is not a file of its own")
    try:
        return image_ref.path.read_bytes()
    except OSError as error:
        raise BadSample(sample_id, f"image {image_ref} does not open: {error}", str(image_ref.path)) from error


def image_file_extension(image_ref: ImageRef, content: bytes, sample_id: str) -> str:
    """Return the extension of an image in a tar shard: that of its file where readers know it, else its format."""
    extension = image_ref.path.suffix.lower().removeprefix(".") if image_ref.path else ""
    return extension if extension in IMAGE_EXTENSIONS else detect_image_format(content, sample_id)


def detect_image_format(content: bytes, sample_id: str) -> str:
    """Return the format of an image, one of `IMAGE_EXTENSIONS`."""
    try:
        with open_lazily(BytesIO(content)) as image:
            kind = str(image.format).lower().replace("mpo", "jpeg")  # an MPO is a JPEG followed by another
    except IMAGE_ERRORS as error:
        raise BadSample(sample_id, f"one of its images does not open: {error}") from error
    if kind not in IMAGE_EXTENSIONS:
        raise BadSample(sample_id, f"one of its images is {kind}; allowed are {', '.join(IMAGE_EXTENSIONS)}")
    return kind


def make_writer(
    output: str, image_folder: Path, *, embed_images: bool = False, shard_size: int | None = None, force: bool = False
) -> RecordWriter:
    """Make the writer for a file, by its name.

    Args:
        output: a name as in `OUTPUT_NAMES`.
        image_folder: the folder that paths of images are relative to.
        embed_images: whether a `.parquet` file holds the images themselves, as tar shards always do.
        shard_size: number of samples in a tar shard; defaults to `SHARD_SIZE`.
        force: replaces existing files.

    Raises:
        ValueError: there is no such kind, it has no such option, or the output exists.
    """
    path = Path(output, SHARD_NAME) if output.endswith("/") else Path(output)
    is_sharded = path.suffix == ".tar" and "%" in path.name
    if embed_images and path.suffix != ".parquet":
        raise ValueError(
            f"--embed-images: it is for .parquet only (tar shards always contain the images), got {output}"
        )
    if shard_size is not None and not is_sharded:
        raise ValueError(f"--shard-size: only FOLDER/ and FOLDER/%06d.tar are split into shards, got {output}")
    if shard_size is not None and shard_size < 1:
        raise ValueError(f"--shard-size={shard_size}: it must be at least 1")
    match path.suffix:
        case ".tar":
            if "%" in str(path) and not re.fullmatch(r"[^%]*%\d*d[^%]*", path.name):
                raise ValueError(
                    f"{output}: the only % must be the number of the shard in the file's name, such as %06d"
                )
            size = (shard_size or SHARD_SIZE) if is_sharded else None
            return TarWriter(path, image_folder, force=force, shard_size=size)
        case ".parquet":
            return ParquetWriter(path, image_folder, force=force, embed_images=embed_images)
        case ".json" | ".jsonl":
            return JsonWriter(path, image_folder, force=force)
        case _:
            raise ValueError(f"{output}: allowed are {OUTPUT_NAMES}")
