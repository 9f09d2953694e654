"""The model card of a published checkpoint: its parts, its training, its results, and how to load it.

Everything in the card comes from the checkpoint and its run; unknown facts are left out, paths of a machine too.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from huggingface_hub import ModelCard, ModelCardData

from vlm.config.recorded import upgrade_recipe
from vlm.hub.certificates import TABLE_TITLES, Certificate
from vlm.hub.cleaning import find_hub_name, last_path_component
from vlm.hub.folders import JsonObject
from vlm.hub.run_facts import RunSummary
from vlm.models.configuration_vlm import MIN_TRANSFORMERS_VERSION
from vlm.models.head_tasks import CLASSIFICATION_TASKS

FAMILIES_SINCE = (5, 23)
"""The transformers in which families are trained and saved; they are its own models, in its own code."""

ENCODE_CHAT = """\
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)"""

CHAT = """\
messages = [
    {"role": "user", "content": [
        {"type": "image", "path": "image.png"},
        {"type": "text", "text": "What is in this image?"},
    ]}
]
"""


def model_card(
    cleaned: JsonObject,
    config: JsonObject,
    run: RunSummary,
    counts: dict[str, int],
    *,
    repo: str | None,
    licence: str | None,
    certificates: Sequence[Certificate] = (),
) -> str:
    """Return the text of `README.md`, with its front matter.

    Args:
        cleaned: `config.json` as it is published.
        config: `config.json` of the checkpoint.
        run: the facts of the run that trained it.
        counts: parameters of each part, see `publishing.parameters`.
        repo: the name on the Hub.
        licence: its identifier on the Hub.
        certificates: of comparisons with other engines, which are not stale.
    """
    heads, body = cleaned.get("heads", []), cleaned.get("body_config", cleaned)
    composed = body["model_type"] == "vlm"
    name = repo or "OWNER/NAME"
    sources = _sources(config, run)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=_pipeline_tag(heads),
        base_model=list(dict.fromkeys(name for _, name, on_hub in sources if on_hub)) or None,
        datasets=run.hub_datasets() or None,
        license=licence,
        tags=["small-vlm", "vision-language-model", *(["prediction-head"] if heads else [])],
    )
    origin = "composed of a visual encoder, a connector and a language model" if composed else "of a known family"
    does = " that makes predictions from images and text" if heads else ""
    known_licence = f"`{licence}`. The licences of the parts and of the data apply too."
    no_licence = "The publisher named none; the licences of the parts and of the data apply."
    sections = {
        "Use": _usage_section(name, cleaned, composed),
        "Parts": _format_table(("part", "what", "parameters"), _parts(body, heads, sources, counts)),
        "Training": _format_table(("", ""), run.recipe()),
        "Data": _format_table(("role", "source", "samples", "images"), map(_format_counts, run.sources())),
        "Results": _results(run),
        "Served as trained": _format_table(TABLE_TITLES, [certificate.row() for certificate in certificates]),
        "Licence": known_licence if licence else no_licence,
    }
    title = f"# {last_path_component(name)}"
    introduction = f"A vision-language model{does}, {origin}, trained with small-vlm."
    chapters = [f"## {title}\n\n{content}" for title, content in sections.items() if content]
    text = "\n\n".join([title, introduction, *chapters])
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n"))


def _sources(config: JsonObject, run: RunSummary) -> list[tuple[str, str, bool]]:
    """Return the origin of parts: part, a name on the Hub or the end of a path, whether it is on the Hub."""
    recipe = upgrade_recipe(config.get("body_config", config).get("recipe") or {})
    encoder = recipe.get("visual_encoder") or {}
    named = [("visual_encoder", source) for source in (encoder, *(encoder.get("extra_encoders") or []))]
    named.append(("language_model", recipe.get("language_model") or {}))
    if not any(source.get("hf_name") for _, source in named):  # a family's model, which its run names
        named = [("model", run.config.get("model") or {})]
    names = [(part, source["hf_name"]) for part, source in named if source.get("hf_name")]
    on_hub = [(part, name, find_hub_name(name, run.checkpoint)) for part, name in names]
    return [(part, hub or last_path_component(name), hub is not None) for part, name, hub in on_hub]


def _pipeline_tag(heads: Sequence[JsonObject]) -> str | None:
    """Return the Hub's name of the task; it has none for numbers and rankings of images."""
    if not heads:
        return "image-text-to-text"
    return "image-classification" if heads[0]["task"] in CLASSIFICATION_TASKS else None


# Parts


def _parts(
    body: JsonObject, heads: Sequence[JsonObject], sources: Sequence[tuple[str, str, bool]], counts: dict[str, int]
) -> list[tuple[str, ...]]:
    """Return the rows of the table of parts."""
    rows = []
    origins = defaultdict[str, list[str]](list)
    for part, name, on_hub in sources:
        origins[part].append(f"[{name}](https://huggingface.co/{name})" if on_hub else f"`{name}`")
    if body["model_type"] == "vlm":
        encoders = [body["vision_config"], *(body[f"vision_config_{n}"] for n in range(2, 2 + len(body["beside"])))]
        kinds = {
            "visual_encoder": ", ".join(encoder["model_type"] for encoder in encoders),
            "connector": f"`{body['connector']['type']}`",
            "language_model": body["text_config"]["model_type"],
        }
        for part, kind in kinds.items():
            source = f"{', '.join(origins[part])} ({kind})" if part in origins else kind
            rows.append((part, source, f"{counts.get(part, 0):,}"))
    else:
        rows.append(("model", f"{', '.join(origins['model'])} ({body['model_type']})".strip(), ""))
    for head in heads:
        labels = f": {', '.join(map(str, head['labels'][:20]))}" if head["labels"] else ""
        rows.append((f"head `{head['name']}`", f"{head['task']}{labels}{' …' if len(head['labels']) > 20 else ''}", ""))
    if heads and "head" in counts:
        rows[-1] = (*rows[-1][:2], f"{counts['head']:,}" + (" (all heads)" if len(heads) > 1 else ""))
    return [*rows, ("total", "", f"{counts['total']:,}")]


# Results


def _results(run: RunSummary) -> str:
    blocks = []
    if run.plot is not None:
        blocks.append("![Loss](loss.png)")
    if last_losses := run.last_losses():
        blocks.append(_format_table(("loss", "value"), [(title, f"{value:.4g}") for title, value in last_losses]))
    for records, heads in run.scores.items():
        for head, scores in heads.items():
            note = f" ({scores['note']})" if scores.get("note") else ""
            columns = [key for key in ("scores", "baseline", "blank_pictures") if scores.get(key)]
            rows = [
                (measure, *(_format_interval(scores[key].get(measure)) for key in columns))
                for measure in scores["scores"]
            ]
            title = f"Head `{head}`, {records}, {scores['records']:,} records{note}; 95 % intervals in brackets:"
            titles = ("measure", *(key.replace("_", " ") for key in columns))
            blocks.append(f"{title}\n\n{_format_table(titles, rows)}")
    for name, results in run.evaluations.items():
        rows = [(metric, _format_interval(value)) for metric, value in results.get("metrics", {}).items()]
        if rows := [*rows, *map(_benchmark_row, results.get("results", []))]:
            number = f", {results['records']:,} records" if "records" in results else ""
            blocks.append(f"Evaluation `{name}`{number}:\n\n{_format_table(('measure', 'value'), rows)}")
    return "\n\n".join(blocks)


def _format_interval(interval: object) -> str:
    if not isinstance(interval, dict) or interval.get("value") is None:
        return "–"
    ends = f" [{interval['low']:.3f}, {interval['high']:.3f}]" if interval.get("low") is not None else ""
    return f"{interval['value']:.3f}{ends}"


def _benchmark_row(score: JsonObject) -> tuple[str, str]:
    """Return a score of `vlm eval --tasks`, with its standard error where lmms-eval computes one."""
    error = "" if score.get("error") is None else f" ± {score['error']:.3g}"
    value = "to be scored elsewhere" if score["value"] is None else f"{score['value']:.4g}{error}"
    return f"{score['task']} · {score['metric']}", value


# Use


def _usage_section(name: str, config: JsonObject, composed: bool) -> str:
    heads = config.get("heads", [])
    oldest = ".".join(map(str, MIN_TRANSFORMERS_VERSION if composed else FAMILIES_SINCE))
    trust = ", trust_remote_code=True" if composed or heads else ""
    why = " The repository brings its own code, hence `trust_remote_code=True`." if trust else ""
    auto = "AutoModelForSequenceClassification" if heads else "AutoModelForImageTextToText"
    processor_trust = ", trust_remote_code=True" if composed else ""
    opening = (
        f"from transformers import {auto}, AutoProcessor\n\n"
        f'processor = AutoProcessor.from_pretrained("{name}"{processor_trust})\n'
        f'model = {auto}.from_pretrained("{name}"{trust}, dtype="auto").eval()\n{CHAT}'
    )
    blocks = [f"Needs transformers {oldest} or newer, in a version that supports its parts.{why}"]
    if heads:
        return "\n\n".join([*blocks, _python(opening + _heads_example(config))])
    answer = (
        f"{ENCODE_CHAT}.to(model.device, model.dtype)\n"
        "answer = model.generate(**inputs, max_new_tokens=128, do_sample=False)\n"
        'print(processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))\n'
    )
    pipe = (
        "from transformers import pipeline\n\n"
        f'pipe = pipeline("image-text-to-text", model="{name}"{trust})\n{CHAT}'
        'print(pipe(text=messages, max_new_tokens=128, return_full_text=False)[0]["generated_text"])\n'
    )
    return "\n\n".join([*blocks, _python(opening + answer), "Or:", _python(pipe)])


def _heads_example(config: JsonObject) -> str:
    """Return code that asks a model with heads; tokens that heads read at follow the prompt."""
    if not config.get("suffix"):
        return f"{ENCODE_CHAT}.to(model.device)\nprint(model.predict(**inputs))\n"
    return (
        "from PIL import Image\n\n"
        "text = processor.apply_chat_template(messages, add_generation_prompt=True) + model.config.suffix\n"
        'inputs = processor(images=[Image.open("image.png")], text=[text], return_tensors="pt").to(model.device)\n'
        "print(model.predict(**inputs))\n"
    )


def _python(code: str) -> str:
    return f"```python\n{code}```"


def _format_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; an empty text where it has no rows."""
    rows = list(rows)
    if not rows:
        return ""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _format_counts(row: Sequence[str | int | None]) -> list[str]:
    return ["streamed" if cell is None else f"{cell:,}" if isinstance(cell, int) else cell for cell in row]
