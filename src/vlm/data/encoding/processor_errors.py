"""The boundary to processors, tokenizers and chat templates: their errors on a sample's data become a `BadSample`.

They can raise anything: ValueError for an image of an extreme shape, ZeroDivisionError for one smaller than a patch,
TypeError for half of a surrogate pair, any error of a template on an unexpected turn. `processor_errors` surrounds each
call of a processor with a sample's data, and nothing else. Errors by mistake of our own code pass through, so that they
do not count as bad data.
"""

import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import jinja2

from vlm.data.sample import BadSample, ImageRef, VideoRef

PACKAGE = __name__.partition(".")[0]
MAX_REASON_LENGTH = 300


class ProcessorRefusalError(ValueError):
    """The error of this package's processors on an image that they do not accept."""


@contextmanager
def processor_errors(
    subject: str,
    sample_id: str,
    media: Sequence[ImageRef | VideoRef] = (),
    process_one: Callable[[int], object] | None = None,
) -> Iterator[None]:
    """Turn a processor's error on a sample's data into `BadSample`, with the original error as its cause.

    Args:
        subject: the part that may refuse the data, for the message, such as `its template`.
        sample_id: the name of the record.
        media: the sample's images and videos, in order.
        process_one: processes the medium at an index alone, to find the faulty one; None if no medium can be at fault.
    """
    try:
        yield
    except BadSample:
        raise
    except Exception as error:
        if not is_refusal(error):
            raise
        medium = None if process_one is None else _first_refused(media, process_one)
        kind = "video" if isinstance(medium, VideoRef) else "image"
        shown = "it" if medium is None else f"{kind} {medium}"
        file = None if medium is None or medium.path is None else str(medium.path)
        raise BadSample(sample_id, f"{subject} refuses {shown}: {describe_error(error)}", file) from error


def is_refusal(error: Exception) -> bool:
    """Return whether an error is about the data: a library raised it, or our processors with their own classes.

    A library raised it if the innermost frame outside the standard library is not in this package. A missing library is
    not an error of the data.
    """
    from vlm.models.processing_messages import (
        MediaMismatchError,  # torch comes with it, and is there with any processor
    )

    if isinstance(error, (MediaMismatchError, ProcessorRefusalError)):
        return True
    if isinstance(error, ImportError):
        return False
    modules = [str(frame.f_globals.get("__name__", "")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    packages = (module.partition(".")[0] for module in reversed(modules))
    innermost = next((package for package in packages if package not in sys.stdlib_module_names), PACKAGE)
    return innermost != PACKAGE


def describe_error(error: Exception) -> str:
    """Return the first line of an error's message, with its class if that adds information."""
    lines = str(error).strip().splitlines()
    message = lines[0][:MAX_REASON_LENGTH] if lines else ""
    if message and isinstance(error, (ValueError, jinja2.TemplateError)):
        return message
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _first_refused(
    media: Sequence[ImageRef | VideoRef], process_one: Callable[[int], object]
) -> ImageRef | VideoRef | None:
    """Return the first image or video that is refused on its own, or None if the text is at fault."""
    for index, medium in enumerate(media):
        try:
            process_one(index)
        except Exception:
            return medium
    return None
