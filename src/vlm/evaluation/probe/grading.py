"""Whether an answer to a question of the probe is right: 1 or 0, by rules that need no model.

To add a rule, write a function of the answer and what the question's `Check` expects, and add it to `RULES`.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from vlm.data.encoding.thinking import without_thinking

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
FENCE = re.compile(r"^```\w*\s*(.*?)\s*```$", re.DOTALL)
"""A block of code around a whole answer."""


@dataclass(frozen=True)
class Check:
    """What makes an answer right.

    Attributes:
        rule: a name of `RULES`.
        right: what the rule expects.
        choices: the answers that the question leaves open, `right` among them; of rules that need them.
    """

    rule: str
    right: str
    choices: tuple[str, ...] = ()

    def as_record(self) -> dict[str, object]:
        """Return the check as JSON holds it."""
        return {"rule": self.rule, "right": self.right, "choices": list(self.choices)}

    @classmethod
    def from_record(cls, record: object) -> "Check":
        """Return the check of a record of the probe; raise ValueError where it has another form."""
        match record:
            case {"rule": str(rule), "right": str(right), "choices": list(choices)} if rule in RULES:
                return cls(rule, right, tuple(map(str, choices)))
        raise ValueError(f"check={record!r:.80}: a rule ({', '.join(RULES)}), right and choices are needed")


def grade(answer: str, check: Check) -> float:
    """Return 1 for a right answer, else 0; thinking before it does not count."""
    return float(RULES[check.rule](without_thinking(answer).strip(), check))


def mentions(text: str, word: str) -> bool:
    """Return whether a text has a word, or several in this order, whatever their case."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def is_right_choice(answer: str, check: Check) -> bool:
    """Return whether the right one of the choices is mentioned, and no other."""
    return [choice for choice in check.choices if mentions(answer, choice)] == [check.right]


def is_right_word(answer: str, check: Check) -> bool:
    """Return whether the expected word is mentioned."""
    return mentions(answer, check.right)


def is_right_number(answer: str, check: Check) -> bool:
    """Return whether the first number of an answer, in digits or as a word up to ten, is the expected one."""
    found = re.search(rf"\d+|\b(?:{'|'.join(NUMBER_WORDS)})\b", answer.lower())
    if found is None:
        return False
    text = found[0]
    return (text if text.isdigit() else str(NUMBER_WORDS.index(text))).lstrip("0") == check.right.lstrip("0")


def is_json_list(answer: str, check: Check) -> bool:
    """Return whether an answer is a JSON list of as many texts as expected."""
    value = _parse_json(answer)
    return isinstance(value, list) and len(value) == int(check.right) and all(isinstance(item, str) for item in value)


def is_json_object(answer: str, check: Check) -> bool:
    """Return whether an answer is a JSON object whose only key is the expected one."""
    value = _parse_json(answer)
    return isinstance(value, dict) and list(value) == [check.right]


def has_num_words(answer: str, check: Check) -> bool:
    """Return whether an answer has as many words as expected."""
    return len(re.findall(r"\w+(?:['’-]\w+)*", answer)) == int(check.right)


def is_upper_case(answer: str, check: Check) -> bool:
    """Return whether an answer has letters, all of them capital."""
    return answer.isupper()


def ends_with(answer: str, check: Check) -> bool:
    """Return whether an answer has more than the expected end, and that end but for a full stop."""
    text = answer.rstrip(".! \n")
    return text.endswith(check.right) and len(text) > len(check.right)


def is_comma_list(answer: str, check: Check) -> bool:
    """Return whether an answer is as many items as expected, of at most three words each, with commas between them."""
    items = [item.split() for item in answer.rstrip(".").split(",")]
    return len(items) == int(check.right) and all(1 <= len(words) <= 3 for words in items)


def _parse_json(answer: str) -> object:
    """Return the value of an answer that is JSON, perhaps in a block of code; None for any other answer."""
    fenced = FENCE.match(answer)
    try:
        return json.loads(fenced[1] if fenced else answer)
    except (ValueError, RecursionError):
        return None


RULES: dict[str, Callable[[str, Check], bool]] = {
    "choice": is_right_choice,
    "word": is_right_word,
    "number": is_right_number,
    "json_list": is_json_list,
    "json_object": is_json_object,
    "num_words": has_num_words,
    "upper_case": is_upper_case,
    "ends_with": ends_with,
    "comma_list": is_comma_list,
}
