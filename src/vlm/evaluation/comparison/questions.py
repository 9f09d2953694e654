"""The kind of a question by its English words, where records do not name it."""

import re

KINDS = (
    ("count", r"how many|what (?:is the )?number of|count\b"),
    ("colour", r"(?:what|which) colou?rs?\b|colou?r of\b"),
    ("text", r"what does .* (?:say|read)|what is written|(?:which|what) (?:word|text|number)s?\b|\bread\b|transcribe"),
    ("place", r"where\b|which (?:side|corner|part)\b|\bto the (?:left|right)\b|above or below"),
    ("choice", r".*\n\s*\(?[A-D][).:] "),
    ("yes/no", r"(?:is|are|was|were|does|do|did|has|have|can|could|will|would|should)\b"),
    ("description", r"describe|caption|what is (?:shown|happening)|(?:tell|provide|write) .*(?:about|caption)"),
    ("reason", r"why\b|how (?:come|do|does|can|would)\b|explain"),
    ("what", r"what\b|which\b|who\b|name\b"),
)
"""Kind -> what its questions begin with; the first that fits counts. Of `choice`, options are listed anywhere."""
OTHER = "other"
NO_QUESTION = "no text"
PATTERNS = [(kind, re.compile(pattern, re.IGNORECASE | re.DOTALL)) for kind, pattern in KINDS]


def question_kind(text: str) -> str:
    """Return the kind of a question, a name of `KINDS`, else `other`; of a prompt without a text, `no text`."""
    text = text.strip()
    if not text:
        return NO_QUESTION
    return next((kind for kind, pattern in PATTERNS if pattern.match(text)), OTHER)
