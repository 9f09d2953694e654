"""The model card of a published checkpoint: its parts, its training, its results, and how to load it.

Everything in the card comes from the checkpoint and its run; unknown facts are left out, paths of a machine too.
"""

from collections.abc import Iterator, Sequence

from huggingface_hub import ModelCard, ModelCardData

from vlm.config.recorded import upgrade_recipe
from vlm.hub.cleaning import find_hub_name, last_path_component
from vlm.hub.folders import JsonObject
from vlm.hub.run_facts import RunSummary
from vlm.models.configuration_vlm import MIN_TRANSFORMERS_VERSION
from vlm.models.head_tasks import CLASSIFICATION_TASKS

FAMILIES_SINCE = (5, 23)
"""The transformers in which families are trained and saved; they are its own models, in its own code."""

CHAT = """\
messages = [
    {"role": "user", "content": [
        {"type": "image", "path": "picture.png"},
        {"type": "text", "text": "What is in this picture?"},
    ]}
]
"""


def model_card(
    cleaned: JsonObject, config: JsonObject, run: RunSummary, counts: dict[str, int], *, repo: str | None,
    licence: str | None,
) -> str:  # fmt: skip
    """Return the text of `README.md`, with its front matter.

    Args:
        cleaned: `config.json` as it is published.
        config: `config.json` of the checkpoint.
        run: the facts of the run that trained it.
        counts: parameters of each part, see `publishing.parameters`.
        repo: the name on the Hub.
        licence: its identifier on the Hub.
    """
    heads = cleaned.get("heads", [])
    body = cleaned.get("body_config", cleaned)
    composed = body["model_type"] == "vlm"
    sources = _sources(config, run)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=_pipeline_tag(heads),
        base_model=list(dict.fromkeys(name for _, name, on_hub in sources if on_hub)) or None,
        datasets=run.hub_datasets() or None,
        license=licence,
        tags=["small-vlm", "vision-language-model", *(["prediction-head"] if heads else [])],
    )
    name = repo or "OWNER/NAME"
    sections = [
        ("", _introduction(name, heads, composed)),
        ("Use", _usage_section(name, cleaned, composed)),
        ("Parts", _format_table(("part", "what", "parameters"), _parts(body, heads, group_sources(sources), counts))),
        ("Training", _format_table(("", ""), run.recipe())),
        (
            "Data",
            _format_table(
                ("role", "source", "samples", "images"), [tuple(map(_format_count, row)) for row in run.sources()]
            ),
        ),
        ("Results", _results(run)),
        ("Licence", _licence(licence)),
    ]
    text = "\n\n".join(f"## {title}\n\n{content}" if title else content for title, content in sections if content)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n"))


def group_sources(sources: Sequence[tuple[str, str, bool]]) -> dict[str, str]:
    """Return part -> the names that it came from."""
    grouped: dict[str, str] = {}
    for part, name, on_hub in sources:
        shown = f"[{name}](https://huggingface.co/{name})" if on_hub else f"`{name}`"
        grouped[part] = f"{grouped[part]}, {shown}" if part in grouped else shown
    return grouped


def _sources(config: JsonObject, run: RunSummary) -> list[tuple[str, str, bool]]:
    """Return the origin of parts: part, a name on the Hub or the end of a path, whether it is on the Hub."""
    body = config.get("body_config", config)
    recipe = upgrade_recipe(body.get("recipe") or {})
    encoders = (recipe.get("visual_encoder"), *_extra_encoders(recipe))
    named = [("visual_encoder", encoder) for encoder in encoders if encoder]
    named += [("language_model", recipe["language_model"])] if recipe.get("language_model") else []
    names = [(part, source["hf_name"]) for part, source in named if source.get("hf_name")]
    if not names:  # a family's model, which its run names
        model = run.config.get("model") or {}
        names = [("model", model["hf_name"])] if model.get("hf_name") else []
    on_hub = [(part, name, find_hub_name(name, run.checkpoint)) for part, name in names]
    return [(part, hub or last_path_component(name), hub is not None) for part, name, hub in on_hub]


def _extra_encoders(recipe: JsonObject) -> list[JsonObject]:
    return (recipe.get("visual_encoder") or {}).get("extra_encoders") or []


def _pipeline_tag(heads: Sequence[JsonObject]) -> str | None:
    """Return the Hub's name of the task; it has none for numbers and rankings of images."""
    if not heads:
        return "image-text-to-text"
    return "image-classification" if heads[0]["task"] in CLASSIFICATION_TASKS else None


def _introduction(name: str, heads: Sequence[JsonObject], composed: bool) -> str:
    subject = "A vision-language model" + (" that predicts from images and text" if heads else "")
    origin = "composed of a visual encoder, a connector and a language model" if composed else "of a known family"
    return f"# {last_path_component(name)}\n\n{subject}, {origin}, trained with small-vlm."


# Parts


def _parts(
    body: JsonObject, heads: Sequence[JsonObject], sources: dict[str, str], counts: dict[str, int]
) -> list[tuple[str, ...]]:  # fmt: skip
    """Return the rows of the table of parts."""
    rows = []
    if body["model_type"] == "vlm":
        encoders = [body["vision_config"], *(body[f"vision_config_{n}"] for n in range(2, 2 + len(body["beside"])))]
        kinds = {
            "visual_encoder": ", ".join(encoder["model_type"] for encoder in encoders),
            "connector": f"`{body['connector']['type']}`",
            "language_model": body["text_config"]["model_type"],
        }
        for part, kind in kinds.items():
            source = f"{sources[part]} ({kind})" if part in sources else kind
            rows.append((part, source, f"{counts.get(part, 0):,}"))
    else:
        rows.append(("model", f"{sources.get('model', '')} ({body['model_type']})".strip(), ""))
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
        if rows := [*_metric_rows(results.get("metrics", {})), *_benchmark_rows(results.get("results", []))]:
            number = f", {results['records']:,} records" if "records" in results else ""
            blocks.append(f"Evaluation `{name}`{number}:\n\n{_format_table(('measure', 'value'), rows)}")
    return "\n\n".join(block for block in blocks if block)


def _format_interval(interval: object) -> str:
    if not isinstance(interval, dict) or interval.get("value") is None:
        return "–"
    ends = f" [{interval['low']:.3f}, {interval['high']:.3f}]" if interval.get("low") is not None else ""
    return f"{interval['value']:.3f}{ends}"


def _metric_rows(metrics: JsonObject) -> Iterator[tuple[str, str]]:
    """Yield the metrics of `vlm eval --data`."""
    yield from ((name, _format_interval(value)) for name, value in metrics.items())


def _benchmark_rows(scores: Sequence[JsonObject]) -> Iterator[tuple[str, str]]:
    """Yield the scores of `vlm eval --tasks`, with standard errors where lmms-eval computes them."""
    for score in scores:
        error = "" if score.get("error") is None else f" ± {score['error']:.3g}"
        value = "to be scored elsewhere" if score["value"] is None else f"{score['value']:.4g}{error}"
        yield f"{score['task']} · {score['metric']}", value


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
    blocks = [f"Needs transformers {oldest} or newer, and one that knows its parts.{why}"]
    if heads:
        return "\n\n".join([*blocks, _python(opening + _heads_example(config, composed))])
    answer = (
        "inputs = processor.apply_chat_template(\n"
        '    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"\n'
        ").to(model.device, model.dtype)\n"
        "answer = model.generate(**inputs, max_new_tokens=128, do_sample=False)\n"
        'print(processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))\n'
    )
    pipe = (
        "from transformers import pipeline\n\n"
        f'pipe = pipeline("image-text-to-text", model="{name}"{trust})\n{CHAT}'
        'print(pipe(text=messages, max_new_tokens=128, return_full_text=False)[0]["generated_text"])\n'
    )
    return "\n\n".join([*blocks, _python(opening + answer), "Or:", _python(pipe)])


def _heads_example(config: JsonObject, composed: bool) -> str:
    """Return code that asks a model with heads; tokens that heads read at follow the prompt."""
    if not config.get("suffix"):
        return (
            "inputs = processor.apply_chat_template(\n"
            '    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"\n'
            ").to(model.device)\n"
            "print(model.predict(**inputs))\n"
        )
    return (
        "from PIL import Image\n\n"
        "text = processor.apply_chat_template(messages, add_generation_prompt=True) + model.config.suffix\n"
        'inputs = processor(images=[Image.open("picture.png")], text=[text], return_tensors="pt").to(model.device)\n'
        "print(model.predict(**inputs))\n"
    )


def _python(code: str) -> str:
    return f"```python\n{code}```"


def _licence(licence: str | None) -> str:
    if licence:
        return f"`{licence}`. The licences of the parts and of the data apply too."
    return "None was named by who published it; those of the parts and of the data apply."


def _format_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; an empty text where it has no rows."""
    if not rows:
        return ""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _format_count(cell: str | int | None) -> str:
    return "streamed" if cell is None else f"{cell:,}" if isinstance(cell, int) else cell
