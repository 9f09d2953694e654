"""The tab *Data*: records as a run trains on them, supervised tokens marked, one at a time."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import gradio as gr

from vlm.config.dataset_schema import DatasetConfig
from vlm.config.packaged import packaged_names, run_names
from vlm.train.objectives.table import make_objective
from vlm.web.components import PRIVATE, heading
from vlm.web.html import error_html, note_html
from vlm.web.plan import Plan, choices

if TYPE_CHECKING:
    from vlm.data.encoding.sample_encoder import SampleEncoder

EMPTY_TEXT = "Records appear here."
DEFAULT_RUN = "finetune-smol"
"""The run that is chosen at first."""


@dataclass
class OpenRecords:
    """The open records of a run's sources; `sizes` is source -> its number of records."""

    config: DatasetConfig
    encoder: "SampleEncoder"
    sizes: dict[str, int]

    def __len__(self) -> int:
        """Return the number of records of all files."""
        return sum(self.sizes.values())

    def html(self, number: int) -> str:
        """Return a record as HTML; records are numbered from 0 through all sources."""
        from vlm.data.tools.show import as_html, load_shown_records

        config = self.config
        for name, size in self.sizes.items():
            if number < size:
                if config.sources:
                    config = replace(config, sources={name: config.sources[name]})
                return as_html(next(iter(load_shown_records(config, self.encoder, number=1, records=[number]))))
            number -= size
        raise ValueError(f"there are only {len(self)} records")


def open_records(plan: Plan) -> OpenRecords:
    """Open the records of a plan's run as the run reads them; ValueError if its checks or its data forbid it."""
    config = plan.compose_config()
    if config.dataset.streaming:
        reason = "the records of a stream have no numbers; use vlm data show to see the first ones"
        raise ValueError(f"dataset.streaming=true: {reason}")
    from vlm.assembly.resolve import resolve_model
    from vlm.data.sources import make_sources

    encoder = make_objective(config).make_encoder(*resolve_model(config, plan.overridden_keys()))
    sizes = {source.name: len(source) for source in make_sources(config.dataset, encoder)}
    return OpenRecords(config.dataset, encoder, sizes)


def build(checkpoints: list[str]) -> gr.Dropdown:
    """Build the tab; return the field of checkpoints."""
    heading("Data", "See each record as a run trains on it, with the supervised tokens marked.")
    records = gr.State(None)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            path = gr.Textbox(label="Records", placeholder="records.json", elem_id="data-path")
            info = "Leave empty if the images are next to the records"
            images = gr.Textbox(label="Image folder", info=info, elem_id="data-images")
            run = gr.Dropdown(run_names(), value=DEFAULT_RUN, label="Run that reads them", elem_id="data-run")
            checkpoint = gr.Dropdown(
                checkpoints,
                value=None,
                allow_custom_value=True,
                label="Checkpoint",
                elem_id="data-checkpoint",
                info="Its tokenizer and template are used. Leave empty to use those of the run's parts",
            )
            with gr.Accordion("More", open=False, elem_id="data-more"):
                templates = [("from the run", ""), "tokenizer", *packaged_names("vlm.data", "templates", ".jinja")]
                template = gr.Dropdown(templates, value="", label="Template", elem_id="data-template")
                language_model = gr.Dropdown(
                    [("from the run", ""), *choices("language_model")],
                    value="",
                    allow_custom_value=True,
                    label="Language model (tokenizer)",
                    elem_id="data-language-model",
                )
                label, example = "Overrides, one per line", "dataset.format=llava"
                lines = gr.Textbox(label=label, lines=3, placeholder=example, elem_id="data-lines")
            button = gr.Button("Open", variant="primary", elem_id="data-open")
        with gr.Column(scale=3, min_width=300):
            with gr.Row(elem_classes="vlm-pager"):
                off = {"interactive": False, "min_width": 80}
                previous = gr.Button("Previous", elem_id="data-previous", **off)
                number = gr.Number(0, label="Record", precision=0, minimum=0, elem_id="data-number", **off)
                following = gr.Button("Next", elem_id="data-next", **off)
            count = gr.HTML("", elem_id="data-count", elem_classes="vlm-line")
            record = gr.HTML(note_html(EMPTY_TEXT), elem_id="data-shown", elem_classes="vlm-record")

    fields = [run, path, images, checkpoint, template, language_model, lines]
    view = [number, count, record]
    button.click(open_first, fields, [records, *view, previous, following], **PRIVATE)
    previous.click(lambda opened, at: show(opened, (at or 0) - 1), [records, number], view, **PRIVATE)
    following.click(lambda opened, at: show(opened, (at or 0) + 1), [records, number], view, **PRIVATE)
    number.submit(show, [records, number], view, **PRIVATE)
    return checkpoint


def open_first(
    run: str,
    path: str | None,
    images: str | None,
    checkpoint: str | None,
    template: str | None,
    language_model: str | None,
    lines: str | None,
) -> tuple[object, ...]:
    """Return the opened records, the first record's view, and whether its number and the buttons can be used.

    The arguments are the values of the fields; None if the browser has not shown a field yet.
    """
    keys = {"dataset.path": path, "dataset.image_folder": images, "dataset.template": template}
    plan = Plan(run, {"language_model": language_model}, {**keys, "trainer.from_pretrained": checkpoint}, lines)
    try:
        records = open_records(plan)
        number, count, record = show(records, 0)
    except (ValueError, OSError) as error:
        return None, 0, "", error_html(str(error)), *[gr.update(interactive=False)] * 2
    return records, gr.update(value=number, interactive=True), count, record, *[gr.update(interactive=True)] * 2


def show(records: OpenRecords | None, number: float | None) -> tuple[int, str, str]:
    """Return the number, count and HTML of a record; numbers beyond the ends are clamped."""
    if records is None:
        return 0, "", note_html(EMPTY_TEXT)
    index = max(min(int(number or 0), len(records) - 1), 0)
    count = note_html(f"Record {index} of {len(records):,}, counted from 0")
    try:
        return index, count, records.html(index)
    except (ValueError, OSError) as error:
        return index, count, error_html(str(error))
