"""The tab *Data*: records as a run would train on them, supervised tokens marked, one after the other."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr

from vlm.config.packaged import packaged_names, run_names
from vlm.config.schema import DatasetConfig
from vlm.train.objectives.table import make_objective
from vlm.web.html import error_html, note_html
from vlm.web.plan import Plan, choices
from vlm.web.runs import checkpoints

EMPTY_TEXT = "Records appear here, with supervised tokens marked."
DEFAULT_RUN = "finetune-smol"
"""The run that is chosen at first."""


@dataclass
class OpenRecords:
    """The records of a run's sources, open.

    Attributes:
        config: the sources.
        encoder: what makes ids and labels of a sample.
        sizes: source -> how many records it has.
    """

    config: DatasetConfig
    encoder: Any
    sizes: dict[str, int]

    def __len__(self) -> int:
        return sum(self.sizes.values())

    def html(self, number: int) -> str:
        """A record, counted through all sources from 0."""
        from vlm.data.tools.show import as_html, load_shown_records

        config = self.config
        for name, size in self.sizes.items():
            if number < size:
                if config.sources:
                    config = replace(config, sources={name: config.sources[name]})
                return as_html(next(iter(load_shown_records(config, self.encoder, number=1, records=[number]))))
            number -= size
        raise ValueError(f"there are {len(self)} records")


def open_records(plan: Plan) -> OpenRecords:
    """The records of a plan's run, as it would read them.

    Raises:
        ValueError: what the checks of the run refuse, a stream, or sources that do not open.
    """
    config = plan.compose_config()
    if config.dataset.streaming:
        raise ValueError(
            "dataset.streaming=true: a stream has no numbers to go by; vlm data show shows its first records"
        )
    from vlm.assembly.resolve import resolve_model
    from vlm.data.sources import make_sources

    encoder = make_objective(config).make_encoder(*resolve_model(config, plan.overridden_keys()))
    sizes = {source.name: len(source) for source in make_sources(config.dataset, encoder)}
    return OpenRecords(config.dataset, encoder, sizes)


def build(outputs: Path) -> gr.Dropdown:
    """Lay the tab out; returns the choice of checkpoints."""
    records = gr.State(None)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            path = gr.Textbox(label="Records", placeholder="records.json", elem_id="data-path")
            images = gr.Textbox(
                label="Folder of images", info="Beside the records where empty", elem_id="data-images"
            )
            run = gr.Dropdown(run_names(), value=DEFAULT_RUN, label="As this run reads them", elem_id="data-run")
            checkpoint = gr.Dropdown(
                checkpoints(outputs), value=None, allow_custom_value=True, label="Checkpoint",
                elem_id="data-checkpoint", info="Whose tokenizer and template they are for; empty: the run's parts",
            )  # fmt: skip
            with gr.Accordion("More", open=False, elem_id="data-more"):
                template = gr.Dropdown(
                    [("as the run", ""), "tokenizer", *packaged_names("vlm.data", "templates", ".jinja")], value="",
                    label="Template", elem_id="data-template",
                )  # fmt: skip
                language_model = gr.Dropdown(
                    [("as the run", ""), *choices("language_model")], value="", allow_custom_value=True,
                    label="Language model (tokenizer)", elem_id="data-language-model",
                )  # fmt: skip
                lines = gr.Textbox(
                    label="Overrides, one a line", lines=3, placeholder="dataset.format=llava", elem_id="data-lines"
                )
            button = gr.Button("Open", variant="primary", elem_id="data-open")
        with gr.Column(scale=3, min_width=300):
            with gr.Row(elem_classes="vlm-pager"):
                previous = gr.Button("Previous", elem_id="data-previous", min_width=80, interactive=False)
                number = gr.Number(
                    0, label="Record", precision=0, minimum=0, elem_id="data-number", min_width=80, interactive=False
                )
                following = gr.Button("Next", elem_id="data-next", min_width=80, interactive=False)
            count = gr.HTML("", elem_id="data-count", elem_classes="vlm-line")
            shown = gr.HTML(note_html(EMPTY_TEXT), elem_id="data-shown", elem_classes="vlm-record")

    fields = [run, path, images, checkpoint, template, language_model, lines]
    view = [number, count, shown]
    options: dict[str, Any] = {"api_visibility": "private"}
    button.click(open_first, fields, [records, *view, previous, following], **options)
    previous.click(lambda found, at: show(found, (at or 0) - 1), [records, number], view, **options)
    following.click(lambda found, at: show(found, (at or 0) + 1), [records, number], view, **options)
    number.submit(show, [records, number], view, **options)
    return checkpoint


def open_first(*values: Any) -> tuple[Any, ...]:
    """The records of the fields, the first of them, and whether there is something to page through."""
    try:
        found = open_records(_make_plan(*values))
        first = show(found, 0)
    except (ValueError, OSError) as error:
        return None, 0, "", error_html(str(error)), *[gr.update(interactive=False)] * 2
    return found, gr.update(value=first[0], interactive=True), *first[1:], *[gr.update(interactive=True)] * 2


def show(found: OpenRecords | None, requested: float | None) -> tuple[Any, str, str]:
    """A record: its number, where it is, and itself; of numbers beyond the ends, the nearest."""
    if found is None:
        return 0, "", note_html(EMPTY_TEXT)
    at = max(min(int(requested or 0), len(found) - 1), 0)
    where = note_html(f"Record {at} of {len(found):,}, numbered from 0")
    try:
        return at, where, found.html(at)
    except (ValueError, OSError) as error:
        return at, where, error_html(str(error))


def _make_plan(
    run: str, path: str | None, images: str | None, checkpoint: str | None, template: str | None,
    language_model: str | None, lines: str | None,
) -> Plan:  # fmt: skip
    """The fields as a plan; those that a browser has not shown yet are None."""
    keys = {
        "dataset.path": path, "dataset.image_folder": images, "dataset.template": template,
        "trainer.from_pretrained": checkpoint,
    }  # fmt: skip
    return Plan(run, {"language_model": language_model}, keys, lines)
