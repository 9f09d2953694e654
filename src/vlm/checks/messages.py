"""Translates errors of Hydra and OmegaConf into the user's terms: the key, the given value, what is allowed.

Imports neither torch nor a model. A message of our own is a `ConfigError`, raised where the value is checked.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import is_dataclass

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
)
from yaml import YAMLError

from vlm.checks.fields import ConfigError, format_value
from vlm.config.aliases import find_alias
from vlm.config.keys import dotted_keys
from vlm.config.packaged import group_names, packaged_names, run_names
from vlm.config.recorded import current_key
from vlm.config.schema import key_names
from vlm.config.suggestions import MAX_SUGGESTED_NAMES, list_alternatives, nearest_names, suggest_names
from vlm.data.records.paths import names_records

EXPECTED_VALUES = {
    "converted to Float": "a number is needed",
    "converted to Integer": "a whole number is needed",
    "not a valid bool": "true or false is needed",
    "is not Optional": "a value is needed",
    "does not support deletion": "a key cannot be removed; give it another value",
}
"""A phrase of OmegaConf's message about a value -> the phrase of ours."""

SEVERAL_VALUES = re.compile(r"(?:Ambiguous value for argument|Sweep parameters) '(.*?)'(?:$| requires)", re.M | re.S)
"""The beginning of Hydra's message about an override with several values."""

NO_BASE_MESSAGE = (
    "the run's YAML has no base: begin it with `defaults: [base, _self_]`, or name a packaged run instead of base"
)


NOT_COMPOSED = "the configuration cannot be composed with these overrides; leave some out to find the wrong one"
KEY_VALUE_NEEDED = "key=value is needed; vlm --help has examples"
ALL_KEYS_HINT = "vlm -cn RUN --cfg job shows all."


RESOLVER_REFUSED = f"{ConfigError.__name__} raised while resolving interpolation: "
"""What OmegaConf puts before the message of an error that a resolver of this package raised; it keeps no cause."""


def explain(error: BaseException) -> str:
    """Return the message for an error of Hydra or OmegaConf during composition."""
    if isinstance(error, ConfigError):
        return str(error)
    if isinstance(error, InterpolationResolutionError) and RESOLVER_REFUSED in str(error):
        return str(error).partition(RESOLVER_REFUSED)[2].splitlines()[0]
    link: BaseException | None = error
    while link is not None:
        match link:
            case MissingConfigException():
                return _describe_missing_file(link)
            case OverrideParseException():
                return _describe_malformed_override(link.override)
            case ConfigAttributeError() | ConfigKeyError() if link.full_key:
                return _describe_unknown_key(link)
            case OmegaConfBaseException() if link.full_key:
                return _describe_wrong_value(link)
        link = link.__cause__ or link.__context__
    text = str(error)
    if given := SEVERAL_VALUES.match(text):
        return _describe_sweep(given[1])
    if isinstance(error, YAMLError):
        return f"not YAML: {text}"
    if section := re.match(r"Could not (?:override|delete) '([\w/.]*)'\. No match in the defaults list", text):
        if not section[1]:
            return f"=: {KEY_VALUE_NEEDED}"
        return describe_scalar_section(section[1].replace("/", "."))
    if group := re.match(r"Could not override '([\w/]+)@(.*?)'", text):
        return f"{group[1]}@{group[2]}: groups cannot be moved; choose with {group[1]}=…"
    return text.partition("\nTo append to your default list")[0].strip() or NOT_COMPOSED


def explain_composition(error: Exception, words: Sequence[str]) -> str:
    """Return the message for an unexpected error within Hydra while it composed overrides."""
    overrides = [word for word in words if "=" in word and not word.startswith("-")]
    keys = {word: word.lstrip("+~").partition("=")[0] for word in overrides}
    if nameless := next((word for word in overrides if not keys[word]), None):
        return f"{nameless}: {KEY_VALUE_NEEDED}"
    text = str(error).partition("\n")[0]
    for word in overrides:
        section = keys[word].replace("/", ".")
        is_section = key_names(section) or "Config group override must be" in text
        if is_section and not re.search(r"[.@]", keys[word]) and not _is_choice(word.partition("=")[2]):
            return f"{word}: {describe_scalar_section(section).partition(': ')[2]}"
    if isinstance(error, RecursionError):
        text = "values are nested too deeply"
    elif isinstance(error, OSError) and error.strerror:
        text = error.strerror.lower()
    named = (word for word in overrides if len(keys[word]) > 3 and keys[word] in str(error))
    guilty = next(named, max(overrides, key=len, default="the run's YAML"))
    return f"{guilty}: the configuration cannot be composed with it ({text or type(error).__name__})"


def _is_choice(value: str) -> bool:
    """Return whether a value of the command line is the name of a choice, not a number, list or null."""
    return re.fullmatch(r"(?!(?:null|true|false|nan|inf)$)[A-Za-z_][\w.-]*", value, re.IGNORECASE) is not None


def _describe_sweep(override: str) -> str:
    """Return the message for an override with several values, or a function that makes several."""
    key, _, value = override.partition("=")
    if "/" in key or key_names(key):
        return f"{override}: one choice is needed, not several"
    several = f"; a list is '{key}=[{value}]', a text is quoted: '{key}=\"{value}\"'" if "(" not in value else ""
    return f"{override}: one value is needed, not several{several}"


def describe_unknown_key(key: str, allowed: Iterable[str]) -> str:
    """Return the message for a key that the schema does not have."""
    if (new_key := current_key(key)) != key:
        return f"{key}: it is called {new_key} now"
    parent, _, name = key.rpartition(".")
    names, prefix = list(allowed), f"{parent}." if parent else ""
    own = f" An option of a connector class of your own: +{key}=…" if parent == "model.connector.options" else ""
    elsewhere = [known for known in dotted_keys() if known.rpartition(".")[2] == name]
    if not own and (alias := find_alias(name)) is not None and not alias.use.startswith(key):
        return f"{key}: no such key. {alias}"
    if not own and elsewhere:
        return f"{key}: no such key. Did you mean {list_alternatives(elsewhere[:MAX_SUGGESTED_NAMES])}?"
    return f"{key}: no such key.{suggest_names(name, names, prefix, more=ALL_KEYS_HINT)}{own}"


def describe_scalar_section(key: str) -> str:
    """Return the message for a section that was given a single value."""
    group = key.replace(".", "/")
    if (alias := find_alias(key)) is not None and not key_names(alias.use.removesuffix("=…")) and "." in key:
        return f"{key}: it is a section. {alias}"
    packaged = ", ".join(packaged_names("vlm.config", group, ".yaml")) if group in group_names() else ""
    choose = f" A packaged choice of it is {group}=NAME: {packaged}." if len(packaged) > 0 else ""
    names = key_names(key)
    listing = f" ({', '.join(names if len(names) <= 12 else [*names[:12], '…'])})" if names else ""
    return f"{key}: it is a section; set one of its keys{listing}.{choose}"


def describe_unknown_option(option: str) -> str:
    """Return the message for a word with dashes that a training run does not take."""
    name, _, value = option.partition("=")
    if (alias := find_alias(name)) is not None:
        return f"{name}: no such option; keys are set without dashes. {alias}"
    word = name.lstrip("-").replace("-", "_")
    exact = [key for key in dotted_keys() if word in (key, key.rpartition(".")[2])]
    near = [f"{key}={value or '…'}" for key in exact or nearest_names(word, dotted_keys())]
    hint = f" Did you mean {list_alternatives(near)}?" if near else ""
    return f"{name}: no such option; keys are set without dashes, as key=value.{hint or ' vlm --help has examples.'}"


def _describe_missing_file(error: MissingConfigException) -> str:
    """Return the message for a run or an option of a group that does not exist."""
    path = str(error.missing_cfg_file)
    group, _, name = path.rpartition("/")
    if error.options is not None:
        more = "vlm models lists all." if group.startswith("model") else "vlm --help lists all."
        return f"{group}={name}: no such choice.{suggest_names(name, list(error.options), place=group, more=more)}"
    if "primary config" in str(error):
        hint = suggest_names(path, run_names(), more="vlm --help lists all.")
        return f"-cn {path}: no such run.{hint} A YAML of your own needs --config-dir FOLDER too."
    return str(error).split("Config search path")[0].strip()


def _describe_malformed_override(override: str) -> str:
    """Return the message for a word of the command line that is not of the form `key=value`."""
    key, equals, value = override.partition("=")
    if not equals and names_records(override):
        return f"{override}: key=value is needed: dataset.path={override}"
    if not equals:
        return f"{override}: {KEY_VALUE_NEEDED}"
    if value.startswith("~"):
        return f"{override}: ~ is not expanded here; write {key}=$HOME{value[1:]}"
    return f"{override}: some of its characters have a special meaning; quote the value: '{key}=\"{value}\"'"


def _describe_unknown_key(error: OmegaConfBaseException) -> str:
    """Return the message for a key that the schema does not have, or a group that does not exist."""
    key = str(error.full_key)
    if "/" in key:
        return f"{key}: no such group.{suggest_names(key, group_names())}"
    parent = error.parent_node
    if "." not in key and isinstance(parent, DictConfig) and not is_dataclass(OmegaConf.get_type(parent)):
        return NO_BASE_MESSAGE
    allowed = [str(name) for name in parent] if isinstance(parent, DictConfig) else key_names(key.rpartition(".")[0])
    return describe_unknown_key(key, [name for name in allowed if name != "hydra"])


def _describe_wrong_value(error: OmegaConfBaseException) -> str:
    """Return the message for a value of the wrong type."""
    key, text = str(error.full_key), str(error.msg or error).splitlines()[0]
    if "is not a subclass of" in text:
        return describe_scalar_section(key)
    needed = next((ours for theirs, ours in EXPECTED_VALUES.items() if theirs in text), text)
    if "deletion" in text:
        return f"~{key}: {needed}"
    if needed == text:
        return f"{key}: {text}"
    quoted = re.search(r"[Vv]alue '(.*?)'", text)
    return f"{key}={quoted[1] if quoted else format_value(error.value)}: {needed}"
