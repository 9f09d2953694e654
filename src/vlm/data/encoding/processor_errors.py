"""The boundary to processors, tokenizers and chat templates: what they raise on a sample's data becomes a `BadSample`.

They raise anything: ValueError for an image of an extreme shape, ZeroDivisionError for one smaller than a patch,
TypeError for half of a surrogate pair, whatever a template does with a turn that it does not expect. `processor_errors`
is put around each call of a processor that gets a sample's data, and nothing else. An error that our own code raises
by mistake passes, so that it is not taken for bad data.
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
    """What a processor of this package raises on an image that it does not take."""


@contextmanager
def processor_errors(
    subject: str,
    sample_id: str,
    media: Sequence[ImageRef | VideoRef] = (),
    process_one: Callable[[int], object] | None = None,
) -> Iterator[None]:
    """Turn what a processor raises on a sample's data into `BadSample`, with the original as its cause.

    Args:
        subject: what may refuse the data, for the reason, such as `its template`.
        sample_id: the name of the record.
        media: the sample's images and videos, in order.
        process_one: processes the medium at an index alone, to find the one at fault; None: it cannot be one of them.
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
    """Return whether an error is about the data: a library raised it, or our processors in their own classes.

    A library raised it if the innermost frame outside the standard library is not in this package. A missing library
    says nothing about the data.
    """
    from vlm.models.processing_vlm import MediaMismatchError  # torch comes with it, and is there with any processor

    if isinstance(error, (MediaMismatchError, ProcessorRefusalError)):
        return True
    if isinstance(error, ImportError):
        return False
    modules = [str(frame.f_globals.get("__name__", "")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    packages = (module.partition(".")[0] for module in reversed(modules))
    innermost = next((package for package in packages if package not in sys.stdlib_module_names), PACKAGE)
    return innermost != PACKAGE


def describe_error(error: Exception) -> str:
    """Return the first line of an error's message; with its class, unless its class says no more than the message."""
    lines = str(error).strip().splitlines()
    message = lines[0][:MAX_REASON_LENGTH] if lines else ""
    if message and isinstance(error, (ValueError, jinja2.TemplateError)):
        return message
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _first_refused(
    media: Sequence[ImageRef | VideoRef], process_one: Callable[[int], object]
) -> ImageRef | VideoRef | None:
    """Return the first image or video that is refused by itself; None if each is taken, so that it is the text."""
    for index, medium in enumerate(media):
        try:
            process_one(index)
        except Exception:
            return medium
    return None
