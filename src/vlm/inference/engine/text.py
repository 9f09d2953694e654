"""The text of an answer while its tokens come in: whole characters, ended at stop strings."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What decoding puts in place of bytes that are no character, or not yet one."""
LONGEST_CHARACTER = 4
"""Bytes of the longest character in UTF-8, hence the most tokens that one takes."""
WINDOW = 64
"""Tokens that are decoded together at most. A token's text may depend on the one before it, not on those far back."""


class TokenDecoder:
    """Turns tokens into text as they come; the pieces joined are what decoding all tokens at once returns.

    Special tokens have no text. A character whose bytes are several tokens comes with the last of them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._ids: list[int] = []  # the last tokens
        self._num_returned = 0  # characters of their text that were returned
        self._num_held = 0  # tokens since their text last ended in a whole character

    def push(self, token_id: int) -> str:
        """Return the text that a further token completes; may be empty."""
        self._ids.append(token_id)
        text = self._decode()
        stable = len(text)
        if text.endswith(REPLACEMENT):
            self._num_held += 1
            # Bytes that are no character after this many tokens never become one; the last may begin one.
            stable = stable - 1 if self._num_held > LONGEST_CHARACTER else self._num_returned
        else:
            self._num_held = 0
        new = text[self._num_returned : stable]
        self._num_returned = max(self._num_returned, stable)
        if len(self._ids) > WINDOW:
            self._forget()
        return new

    def flush(self) -> str:
        """Return the text that was held back, as no further token comes."""
        return self._decode()[self._num_returned :]

    def _decode(self) -> str:
        return str(self.tokenizer.decode(self._ids, skip_special_tokens=True))

    def _forget(self) -> None:
        """Drop the earliest tokens; text that was not returned yet stays."""
        num_open = len(self._decode()) - self._num_returned
        del self._ids[: -2 * LONGEST_CHARACTER]
        self._num_returned = max(0, len(self._decode()) - num_open)


class AnswerText:
    """The text of one answer: ended at a stop string, without white space around it, as `vlm generate` has it.

    Args:
        tokenizer: the model's tokenizer.
        stops: texts that end the answer and are not part of it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]):
        self.stops = [stop for stop in stops if stop]
        self.is_stopped = False
        self._decoder = TokenDecoder(tokenizer)
        self._pending = ""  # not returned yet: may begin a stop string, or is white space that may be the last
        self._is_started = False

    def push(self, token_id: int) -> str:
        """Return the text that a further token makes certain; sets `is_stopped` at a stop string."""
        self._append(self._decoder.push(token_id))
        return self._release(0 if self.is_stopped else self._length_of_possible_stop())

    def flush(self) -> str:
        """Return the remaining text, as no further token comes."""
        if not self.is_stopped:
            self._append(self._decoder.flush())
        return self._release(0)

    def _append(self, text: str) -> None:
        self._pending += text
        places = [place for stop in self.stops if (place := self._pending.find(stop)) >= 0]
        if places:
            self.is_stopped = True
            self._pending = self._pending[: min(places)]

    def _length_of_possible_stop(self) -> int:
        """Return how many of the last characters may begin a stop string."""
        text, longest = self._pending, 0
        for stop in self.stops:
            place = text.find(stop[0], max(0, len(text) - len(stop) + 1))
            while place >= 0 and len(text) - place > longest:
                if stop.startswith(text[place:]):
                    longest = len(text) - place
                place = text.find(stop[0], place + 1)
        return longest

    def _release(self, num_held: int) -> str:
        """Return the pending text but so many last characters, and but white space at the answer's ends."""
        text = self._pending[: len(self._pending) - num_held].rstrip()
        self._pending = self._pending[len(text) :]
        if not self._is_started:
            text = text.lstrip()
            self._is_started = bool(text)
        return text
