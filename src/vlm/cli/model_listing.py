"""The lists of `vlm models`: what is shown at once, read from tables and files without importing torch."""

from collections.abc import Iterator, Sequence
from importlib import resources
from textwrap import indent

from omegaconf import OmegaConf
from tabulate import tabulate

from vlm.config.packaged import packaged_names
from vlm.families.installed import image_text_types, transformers_version
from vlm.families.proved import read_proved
from vlm.families.table import FAMILIES, get_family

Section = tuple[str, Sequence[tuple[str, ...]]]
"""A title, and the rows of a table."""


def list_models(name: str | None = None) -> None:
    """Print the parts that are packaged by name, and all types of models that may be trained as a whole.

    With `name`, those rows alone that contain it.

    Raises:
        ValueError: there is no such row.
    """
    sections = [*part_sections(), family_section()]
    if name is not None:
        sections = [found for section in sections if len((found := _rows_with(section, name))[1]) > 1]
        if not sections:
            raise ValueError(f"{name}: no part and no model of that name; vlm models lists all")
    print_sections(sections)
    print("\nvlm models --details adds connectors, heads, attention, quantization and what is installed here.")


def _rows_with(section: Section, name: str) -> Section:
    """Return a section with its header and the rows that contain a name."""
    title, (header, *rows) = section
    return title, [header, *(row for row in rows if any(name.lower() in cell.lower() for cell in row))]


def print_sections(sections: Sequence[Section]) -> None:
    """Print tables below their titles."""
    tables = [(title, tabulate(rows, tablefmt="plain", disable_numparse=True)) for title, rows in sections]
    print("\n\n".join(f"{title}\n{indent(table, '  ')}" for title, table in tables))


def part_sections() -> Iterator[Section]:
    """Yield the tables of packaged visual encoders and language models."""
    for part, title, models in (
        ("visual_encoder", "Visual encoders", "CLIP, SigLIP, DINOv2 or timm model"),
        ("language_model", "Language models", "AutoModelForCausalLM"),
    ):
        rows = [("name", "hf_name"), *part_rows(part)]
        yield f"{title}: model/{part}=…, or model.{part}.hf_name=… for any {models}", rows


def part_rows(part: str) -> Iterator[tuple[str, str]]:
    """Yield the packaged choices of a part, and the models that they load."""
    folder = resources.files("vlm.config").joinpath("model", part)
    for name in packaged_names("vlm.config", f"model/{part}", ".yaml"):
        values = OmegaConf.create(folder.joinpath(f"{name}.yaml").read_text(encoding="utf-8"))
        names = [values.hf_name] if "hf_name" in values else []
        names += [encoder.hf_name for encoder in values.extra_encoders] if "extra_encoders" in values else []
        yield name, " and ".join(filter(None, names)) or ("any, by its hf_name" if names else "")


def family_section() -> Section:
    """Return the table of all types: the usual name, packaged choices, and what was proved with which transformers."""
    proved = read_proved()
    made = f"; proved with transformers {proved.transformers} on {proved.date}" if proved.transformers else ""
    types_of = f"for any of these types of transformers {transformers_version()}"
    title = f"Whole models: model=…, or model.hf_name=… {types_of}{made}"
    types = sorted({*image_text_types(), *FAMILIES})
    rows = []
    for model_type in types:
        family = get_family(model_type)
        name = "" if family.name == model_type else family.name
        rows.append((model_type, name, ", ".join(family.choices), proved.summarise(model_type)))
    return title, [("model_type", "family", "model=", "proved"), *rows]
