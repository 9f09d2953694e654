"""Masks tokens, keys and passwords wherever a run, a page or a message writes them.

Imports the standard library only. A secret is recognised by the name of its key, by its form, or because an environment
variable with such a name has this value. Each secret becomes `MASK`. A resumed run compares masks, so a renewed token
does not count as a change.
"""

import os
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

MASK = "***"
"""The text that replaces a secret."""

_SECRET_NAME = (
    r"(?:(?:hub|hf|auth|access|api|refresh|session|security|bearer|secret|private|user|id|github|gitlab|wandb|comet|"
    r"hugging_?face|swanlab|neptune|tracking|clearml|trackio|ngrok)[_-]?token|"
    r"pass(?:word|wd|phrase)|secret|credentials?|api[_-]?key|access[_-]?key(?:[_-]?id)?|secret[_-]?key|private[_-]?key|"
    r"account[_-]?key|authorization|cookie)"
)
"""Endings of names of secrets, as keys or variables. `token` is missing, since it also names words of a tokenizer."""

_KEY = re.compile(rf"(?:.*[^A-Za-z0-9])?{_SECRET_NAME}|token|pwd", re.IGNORECASE)
_ENVIRONMENT_NAME = re.compile(
    r"TOKEN(?!S|IZ)|PASSWORD|PASSWD|SECRET|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY", re.IGNORECASE
)
MIN_SECRET_LENGTH = 8
"""The shortest value of such a variable that is masked in texts; shorter values are words or numbers."""

MIN_PIECE_LENGTH = 4
"""The shortest piece of a command line's secret that is masked everywhere."""

_VALUE = (  # behind a quotation mark up to the next, else a word; but nothing that is masked or no secret
    r"(?!\*\*\*|null\b|none\b|\$\{|(?:bearer|basic|token)\s)(?:(?<=\")[^\"\n]+|(?<=')[^'\n]+|(?<![\"'])[^\s\"',}]+)"
)
_PROSE = r"[ ]{1,3}[a-z]+[ ]+[a-z]"
"""A word with another behind it: `trainer.hub_token: a value is needed` is a sentence about a key."""

_FORMS = tuple(
    re.compile(form, re.IGNORECASE)
    for form in (
        r"(?P<keep>(?<![a-z0-9])[a-z][a-z0-9+-]{0,15}://)[^\s/\"'<>]+(?=@)",  # https://user:password@host
        r"(?P<keep>[?&;](?:x-(?:amz|goog|ms)-[\w-]+|[\w.-]*token|[\w.-]*signature|sig|apikey|"  # ?token=…
        r"(?:[\w.-]*[_.-])?key(?:-pair-id|id)?|auth|policy|credential|[\w.-]*password|pwd|pass|[\w.-]*secret|jwt|googleaccessid)=)[^\s&;#\"'<>]+",
        rf"(?P<keep>(?<![a-z0-9])authorization[\"']?\s{{0,3}}[:=]\s{{0,3}}[\"']?(?:(?:bearer|basic|token)\s)?){_VALUE}",
        r"(?P<keep>(?<![a-z0-9])bearer\s)(?!\*\*\*)[\w.~+/=-]{8,}",
        rf"(?P<keep>--(?:[\w-]+-)?(?:token|password|api-key|secret)(?:\s|=)[\"']?){_VALUE}",  # --token …
        rf"(?P<keep>(?<![a-z0-9/\\]){_SECRET_NAME}[\"']?\s{{0,3}}(?:=|:(?!{_PROSE}))\s{{0,3}}[\"']?)"  # hub_token: …
        rf"{_VALUE}",
    )
)
"""Secrets by their place in a text; `keep` matches the text before one. Each pattern takes linear time."""

_TOKEN = re.compile(
    r"(?<![A-Za-z0-9_-])(?:"
    r"hf_(?:[A-Za-z0-9]{16,}|(?:oauth|jwt)_[\w.-]{16,})"  # Hugging Face
    r"|api_org_[A-Za-z0-9]{16,}"
    r"|sk-(?=[A-Za-z_-]*\d)[A-Za-z0-9_-]{12,}"  # OpenAI, Anthropic
    r"|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}"
    r"|xox[abeprs]-[\w-]{10,}"  # Slack
    r"|(?:AKIA|ASIA)[0-9A-Z]{16}|AIza[\w-]{30,}|ya29\.[\w-]{16,}"  # Amazon, Google
    r"|wandb_v\d_\w{16,}"
    r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"  # a JSON Web Token
    r")"
)
"""Secrets by their form."""


def mask(text: str) -> str:
    """Return a text with all tokens, keys and passwords masked."""
    return _mask(text, _environment_secrets())


def _mask(text: str, secrets: Sequence[str]) -> str:
    for value in secrets:
        text = text.replace(value, MASK)
    for form in _FORMS:
        text = form.sub(rf"\g<keep>{MASK}", text)
    return _TOKEN.sub(MASK, text)


def is_secret_key(path: str) -> bool:
    """Return whether a dotted key names a secret: `trainer.hub_token`. `model.head.token` is a token of a tokenizer."""
    section, _, name = path.rpartition(".")
    if section.split(".")[0] == "model" and name == "token":
        return False
    if section == "trainer" and name.endswith("token"):
        return True
    return _KEY.fullmatch(name) is not None


def mask_settings(settings: Mapping[str, object]) -> dict[str, Any]:
    """Return nested settings with the values of keys that name secrets masked, and secrets within other texts."""
    return _mask_mapping(settings, "", _environment_secrets())


def _mask_mapping(settings: Mapping[str, object], path: str, secrets: Sequence[str]) -> dict[str, object]:
    return {
        name: _mask_value(value, f"{path}.{name}" if path else str(name), secrets) for name, value in settings.items()
    }


def _mask_value(value: object, path: str, secrets: Sequence[str]) -> object:
    if isinstance(value, Mapping):
        return _mask_mapping(value, path, secrets)
    if isinstance(value, list | tuple):
        return [_mask_value(item, path, secrets) for item in value]
    if value is not None and not isinstance(value, bool) and value != "" and is_secret_key(path):
        return MASK
    return _mask(value, secrets) if isinstance(value, str) else value


def mask_words(words: Sequence[str]) -> list[str]:
    """Return the words of a command line with secrets masked: `key=value`, `--token value`, and within texts."""
    masked, hides_next = [], False
    for word in words:
        key, equals, value = word.partition("=")
        name = key.lstrip("+~")
        if hides_next:
            masked.append(MASK)
        elif equals and is_secret_key(name.lstrip("-").replace("-", "_")) and value not in ("", "null"):
            masked.append(f"{key}={MASK}")
        else:
            masked.append(mask(word))
        hides_next = not equals and word.startswith("--") and is_secret_key(word.lstrip("-").replace("-", "_"))
    return masked


def mask_values(text: str, words: Sequence[str]) -> str:
    """Return a text with the secrets that a command line sets masked, whole and in pieces.

    A message may repeat a value as it was parsed, for example as a list, or only up to the wrong character.
    """
    secrets = [word.partition("=")[2] for word in words if is_secret_key(word.partition("=")[0].lstrip("+~"))]
    pieces = {piece for secret in secrets for piece in (secret, *re.findall(r"[^\s,'\"\[\]{}()=:$]+", secret))}
    for piece in sorted(pieces, key=len, reverse=True):
        if len(piece) >= MIN_PIECE_LENGTH and piece not in ("null", "None"):
            text = text.replace(piece, MASK)
    return text


def _environment_secrets() -> list[str]:
    """Return the values of environment variables with names of secrets, the longest first."""
    values = {os.environ[name] for name in _secret_names(tuple(os.environ))}
    return sorted((v for v in values if len(v) >= MIN_SECRET_LENGTH and not v.startswith("/")), key=len, reverse=True)


@lru_cache(maxsize=1)  # for each text of a run's settings
def _secret_names(names: tuple[str, ...]) -> list[str]:
    """Return the names of environment variables that are names of secrets."""
    return [name for name in names if _ENVIRONMENT_NAME.search(name)]
