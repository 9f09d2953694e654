"""Sections of a run's report on the model and its start, on the course of the run, and on how to repeat it.

Each function returns HTML, empty if a run has nothing to say.
"""

import re
from collections.abc import Iterator, Mapping

import yaml

from vlm.config.schema import HEAD, PARTS, TRAIN_FLAGS
from vlm.config.short_names import show_value
from vlm.config.shown import printable
from vlm.runs.charts import Curve, draw_figure
from vlm.runs.files import JsonObject, as_number, get, list_at, mapping_at, number_at, text_at
from vlm.runs.html import ImageBudget, details, table, text
from vlm.runs.listing import format_number
from vlm.runs.read import UNFINISHED, RunDirectory
from vlm.runs.status_line import ACTIVE_STATES, FAILED, INTERVAL_SUFFIX, REFUSED, STOPPED

LOSSES = {"loss": "training", "eval_loss": "evaluation", "eval_blank_loss": "evaluation, blank images"}
FINGERPRINT_LENGTH = 12
MAX_FIGURES = 12
"""Maximum number of figures of further metrics of evaluations."""
OF_NO_FIGURE = ("loss", "blank_loss", "runtime", "samples_per_second", "steps_per_second")
"""Logged values of an evaluation that are no metrics, or are in another figure; without `eval_`."""
SPEED_LABELS = {
    "device": "device",
    "ranks": "ranks",
    "tokens_per_second": "tokens a second, all ranks",
    "supervised_tokens_per_second": "supervised tokens a second",
    "samples_per_second": "samples a second",
    "seconds_per_step": "seconds a step",
    "padding_share": "padding, share of positions",
    "data_wait_share": "waiting for data, share of time",
    "tflops_per_second": "model TFLOP/s, each device",
    "mfu": "model FLOPs utilisation",
    "peak_memory_gib": "peak memory of a device, on a CPU of the process, GiB",
}
SHARES = ("padding_share", "data_wait_share", "mfu")


def warnings(run: RunDirectory, images: ImageBudget) -> str:
    """Return what a reader should know first: how the run ended, steps that a guard found, damaged files."""
    found, hints = list(_find_warnings(run)), list(_find_hints(run))
    found += [f"{name} is damaged and was left out: {why}" for name, why in list(run.files.damaged.items())[:20]]
    if images.num_left_out:
        found.append(f"{images.num_left_out:,} images were left out, so that the page stays small")
    return "".join(
        f'<p class="{kind}">{text(one)}</p>' for kind, lines in (("warning", found), ("hint", hints)) for one in lines
    )


def _find_warnings(run: RunDirectory) -> Iterator[str]:
    if run.state == FAILED:
        message = text_at(run.status, "message")
        if not message and run.status.get("state") in ACTIVE_STATES:
            message = "its process ended without a word; run.log has its last lines"
        yield f"The run failed at step {run.step:,}" + (f": {message}" if message else ".")
    elif run.state == REFUSED:
        yield f"The run was refused: {text_at(run.status, 'message')}"
    elif run.state in (STOPPED, UNFINISHED):
        saved = f"; its newest checkpoint is of step {run.checkpoints[-1]:,}" if run.checkpoints else ""
        yield f"The run did not finish: it was at step {run.step:,}{saved}."
    for name in ("loss", "grad_norm"):
        if (column := run.metrics.get(name)) is not None and column.num_undefined:
            yield f"{name} was infinite or undefined {column.num_undefined:,} times."
    if run.guard:
        steps = ", ".join(f"{int(number_at(line, 'step') or 0):,}" for line in run.guard[:5])
        yield f"A guard found something at {len(run.guard):,} steps (first: {steps}); guard.jsonl lists their samples."
    for role in run.data:
        samples, lost = number_at(run.data, role, "samples"), number_at(run.data, role, "skipped")
        if samples is not None and lost and lost > 0.05 * (samples + lost):
            yield f"{lost:,} of {samples + lost:,} {role} records were left out."


def _find_hints(run: RunDirectory) -> Iterator[str]:
    if run.state != FAILED and run.step and "eval_loss" not in run.metrics:
        yield (
            "Nothing was evaluated during training; dataset.eval_split=0.05 trainer.eval_strategy=epoch would change "
            "that."
        )
    if run.versions.get("git_changes"):
        yield "The code had uncommitted changes, so its commit alone does not reproduce the run."


# What was trained from what


def model(run: RunDirectory) -> str:
    """Return the parts of the model, what it started from, and what trained at which learning rate."""
    settings = run.settings
    if not settings:
        return ""
    start = settings.get("trainer.from_pretrained")
    facts = {
        "run": run.recipe,
        "starts from": start or "the parts below, with a new connector",
        "objective": settings.get("trainer.objective"),
        "chat template": _template(settings),
        "connector": settings.get("model.connector.type"),
        "precision": next((key for key in ("bf16", "fp16") if settings.get(f"trainer.{key}")), "float32"),
        "samples a step": _samples_a_step(run),
        "schedule": _schedule(settings),
        "optimiser": settings.get("trainer.optim"),
        "seed": settings.get("trainer.seed"),
        "finished model": "" if run.final is None else str(run.final),
    }
    rows = [(name, show_value(value)) for name, value in facts.items() if value not in (None, "")]
    parts = _parts_table(run)
    return table(("", ""), rows) + (f"<h3>Parts</h3>{parts}" if parts else "")


def _template(settings: Mapping[str, object]) -> object:
    name = settings.get("dataset.template")
    return "the tokenizer's own" if name == "tokenizer" else name


def _schedule(settings: Mapping[str, object]) -> str:
    """Return the schedule of the learning rates in words, such as `cosine, warm-up over 3% of the steps`."""
    kind, warmup = settings.get("trainer.lr_scheduler_type"), as_number(settings.get("trainer.warmup_steps"))
    if kind is None:
        return ""
    if not warmup:
        return str(kind)
    return f"{kind}, warm-up over {f'{warmup:.0%} of the steps' if warmup < 1 else f'{warmup:,.0f} steps'}"


def _samples_a_step(run: RunDirectory) -> str:
    size = as_number(run.settings.get("trainer.per_device_train_batch_size"))
    times = as_number(run.settings.get("trainer.gradient_accumulation_steps")) or 1
    ranks = number_at(run.versions, "world_size") or 1
    if size is None:
        return ""
    named = ((ranks, "ranks"), (size, "samples"), (times, "batches"))
    factors = [f"{number:g} {name}" for number, name in named if number > 1 or name == "samples"]
    return f"{size * times * ranks:,.0f}" + (f" ({' × '.join(factors)})" if len(factors) > 1 else "")


def _parts_table(run: RunDirectory) -> str:
    if run.parts:
        header = ("part", "from", "parameters", "trained", "learning rate", "weight decay")
        rows = [
            (
                text_at(part, "name"),
                text_at(part, "source"),
                _count(part, "parameters"),
                _trained(part),
                _rate(part, "learning_rate"),
                _rate(part, "weight_decay"),
            )
            for part in run.parts
        ]
        total, trained = (sum(number_at(part, name) or 0 for part in run.parts) for name in ("parameters", "trained"))
        rows.append(("total", "", f"{total:,.0f}", f"{trained:,.0f}", "", ""))
        return table(header, rows, numeric=(2, 3, 4, 5))
    rows = list(_configured_parts(run))
    return table(("part", "from", "learning rate", ""), rows, numeric=(2,)) if rows else ""


def _configured_parts(run: RunDirectory) -> Iterator[tuple[str, object, str, str]]:
    """Yield the parts of a run of an earlier version as its configuration names them."""
    for part in (*PARTS, *([HEAD] if run.heads else [])):
        flag, rank = TRAIN_FLAGS.get(part), as_number(run.settings.get(f"trainer.lora.{part}.r"))
        trains = flag is None or run.settings.get(f"trainer.unfreeze.{flag}") is True or rank is not None
        rate = as_number(run.settings.get(f"trainer.learning_rate.{part}_learning_rate"))
        source = run.settings.get(f"model.{part}.hf_name") or run.settings.get(f"model.{part}.type")
        if source is not None:
            how = "frozen" if not trains else "" if rank is None else f"LoRA r={rank:g}"
            yield part, source, "" if rate is None or not trains else f"{rate:g}", how


def _count(part: JsonObject, name: str) -> str:
    number = number_at(part, name)
    return "" if number is None else f"{number:,.0f}"


def _trained(part: JsonObject) -> str:
    how = text_at(part, "how")
    return f"{how}: {_count(part, 'trained')}" if how else _count(part, "trained")


def _rate(part: JsonObject, name: str) -> str:
    number = number_at(part, name)
    return "" if number is None or not number_at(part, "trained") else f"{number:g}"


def data(run: RunDirectory) -> str:
    """Return the records of each role: counts, sources, and the beginnings of their fingerprints."""
    rows = []
    for role in run.data:
        facts = mapping_at(run.data, role)
        for source in list_at(facts, "sources"):
            rows.append(
                (
                    role,
                    text_at(source, "source"),
                    *(
                        _count(mapping_at(source), name)
                        for name in ("records", "samples", "images", "tokens", "skipped", "truncated")
                    ),
                    text_at(source, "fingerprint")[:FINGERPRINT_LENGTH],
                )
            )
        rows += [(role, text_at(stream, "source"), "streamed", *[""] * 6) for stream in list_at(facts, "streamed")]
        if not rows or rows[-1][0] != role:
            rows.append(
                (
                    role,
                    "split off",
                    "",
                    *(_count(facts, name) for name in ("samples", "images", "tokens", "skipped")),
                    "",
                    "",
                )
            )
    header = ("for", "source", "records", "samples", "images", "tokens", "left out", "cut", "fingerprint")
    return table(header, rows, numeric=range(2, 8)) if rows else ""


# How it went


def curves(run: RunDirectory) -> str:
    """Return figures of losses, rates, gradients, evaluations and throughput."""
    metrics = run.metrics
    figures = [
        draw_figure(
            "Loss",
            [
                Curve(name, metrics[key].points(), key != "loss", metrics.half_widths(key))
                for key, name in LOSSES.items()
                if key in metrics
            ],
        )
    ]
    groups = {
        "Loss by source": ("loss/", "eval_loss/"),
        "Learning rate": ("learning_rate/",),
        "Gradient norm": ("grad_norm/",),
        "Update norm": ("update_norm/",),
    }
    for title, prefixes in groups.items():
        named = {name: column for prefix in prefixes for name, column in metrics.starting_with(prefix).items()}
        lines = [Curve(name, column.points()) for name, column in named.items() if not name.endswith(INTERVAL_SUFFIX)]
        if title == "Gradient norm" and "grad_norm" in metrics:
            lines = [Curve("whole model", metrics["grad_norm"].points()), *lines]
        figures.append(draw_figure(title, lines, from_zero=title == "Learning rate"))
    figures += list(_evaluation_figures(run))
    figures.append(_throughput(run))
    return "".join(figures)


def _evaluation_figures(run: RunDirectory) -> Iterator[str]:
    named = {
        name: column
        for name, column in run.metrics.starting_with("eval_").items()
        if name not in OF_NO_FIGURE and not name.endswith(INTERVAL_SUFFIX) and "/" not in name
    }
    for name, column in list(named.items())[:MAX_FIGURES]:
        if len(column.values) > 1:
            widths = run.metrics.half_widths(f"eval_{name}")
            yield draw_figure(f"Evaluation: {name}", [Curve(name, column.points(), True, widths)])


def _throughput(run: RunDirectory) -> str:
    labels = {"tokens_per_second": "tokens", "supervised_tokens_per_second": "supervised tokens"}
    lines = [Curve(name, run.metrics[key].points()) for key, name in labels.items() if key in run.metrics]
    if not lines and "samples_per_second" in run.metrics:
        lines = [Curve("samples", run.metrics["samples_per_second"].points())]
    shares = {"padding_share": "padding", "data_wait_share": "waiting for data", "mfu": "MFU"}
    below = [Curve(name, run.metrics[key].points()) for key, name in shares.items() if key in run.metrics]
    return draw_figure("Throughput per second", lines, from_zero=True, log_scale=False) + draw_figure(
        "Shares of padding and waiting, and MFU", below, from_zero=True, log_scale=False
    )


def speed(run: RunDirectory) -> str:
    """Return the table of the last call's speed."""
    rows = []
    for name, label in SPEED_LABELS.items():
        number = number_at(run.speed, name)
        shown = (
            text_at(run.speed, name)
            if number is None
            else (f"{number:.1%}" if name in SHARES else format_number(number))
        )
        if shown:
            rows.append((label, shown))
    if not rows:
        return ""
    peak = text_at(run.speed, "peak", "source")
    note = f"<small>MFU is a share of {number_at(run.speed, 'peak', 'tflops') or 0:.3g} TFLOP/s, {text(peak)}.</small>"
    return table(("", ""), rows, numeric=(1,)) + (note if peak else "")


def resumes(run: RunDirectory) -> str:
    """Return what changed at later starts."""
    rows = [
        (f"{change.step:,}", change.time.replace("T", " "), key, show_value(before), show_value(now))
        for change in run.changes
        for key, (before, now) in change.values.items()
    ]
    number = len(run.commands) - 1
    if not rows:
        times = "once" if number == 1 else f"{number:,} times"
        return f"<p>It was resumed {times}, with the same settings.</p>" if number > 0 else ""
    return table(("from step", "time", "key", "before", "from then on"), rows, numeric=(0,))


# How to repeat it


def versions(run: RunDirectory) -> str:
    """Return versions of packages, the devices and the revision of the source."""
    if not run.versions:
        return ""
    facts = {
        "Python": get(run.versions, "python"),
        "platform": get(run.versions, "platform"),
        "devices": ", ".join(map(str, list_at(run.versions, "devices"))),
        "ranks": get(run.versions, "world_size"),
        "git": get(run.versions, "git"),
        **{name: found for name, found in mapping_at(run.versions, "packages").items() if found is not None},
    }
    return table(("", ""), [(name, value) for name, value in facts.items() if value not in (None, "")])


def repeat(run: RunDirectory) -> str:
    """Return the commands, the revision and the configuration."""
    if not run.commands and not run.config:
        return ""
    git = text_at(run.versions, "git")
    lines = [f"git checkout {git}"] if git else []
    commands = list(map(_shorten_command, run.commands))
    lines += commands[:1]
    parts = [f"<pre>{text(chr(10).join(lines), 20_000)}</pre>"]
    if later := commands[1:]:
        title = f"{len(later):,} later start{'s' if len(later) > 1 else ''}, which resumed it"
        parts.append(details(title, f"<pre>{text(chr(10).join(later), 20_000)}</pre>"))
    config = _present_config(run)
    shown = yaml.safe_dump(config, sort_keys=False, allow_unicode=True) if config else ""
    title = "Configuration" + (" of the last start; config.yaml has that of the first" if run.changes else "")
    parts.append(details(title, f"<pre>{text(printable(shown), 200_000)}</pre>") if shown else "")
    return "".join(parts)


def _shorten_command(command: str) -> str:
    """Return a command that begins with this machine's Python and `vlm` as `vlm …`; other commands as they are."""
    return re.sub(r"^\S*\bpython[\d.]*(?: -u)? (?:-m vlm|(?:\S*/)?vlm)(?= |$)", "vlm", command)


def _present_config(run: RunDirectory) -> JsonObject:
    """Return the configuration with the values of the last start."""
    changed = {key for change in run.changes for key in change.values}
    return _with_values(run.config, {key: run.settings[key] for key in changed & run.settings.keys()})


def _with_values(node: JsonObject, values: Mapping[str, object], prefix: str = "") -> JsonObject:
    """Return a nested mapping with other values, given by dotted keys."""
    return {
        name: _with_values(mapping_at(item), values, f"{prefix}{name}.")
        if isinstance(item, Mapping)
        else values.get(f"{prefix}{name}", item)
        for name, item in node.items()
    }
