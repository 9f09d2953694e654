"""The process that reads a checkpoint as others do: what it is given, and what it says where it fails."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.inference.verify.conftest import Served
from vlm.inference.verify.cases import make_cases
from vlm.inference.verify.comparison import first_differing_layer
from vlm.inference.verify.engines import Request
from vlm.inference.verify.plain_reader import HiddenPackages, layers_of
from vlm.inference.verify.reading_job import ReadingJob, messages_with_paths
from vlm.inference.verify.reference import Reference
from vlm.inference.verify.served_forms import exported_form, published_form


def make_request(served: Served, scratch: Path, **fields: Any) -> Request:
    cases = make_cases(2)
    inputs = {case.name: Reference(served.model).inputs(case) for case in cases}
    return Request(served.final, cases, cases, inputs, scratch, 3, **fields)


def test_images_are_written_as_the_files_that_they_are(tmp_path: Path):
    case = make_cases(7)[6]
    content = messages_with_paths(case, tmp_path)[0]["content"]
    assert [Path(item["path"]).read_bytes() for item in content if item["type"] == "image"] == case.images


def test_a_process_that_fails_says_why(served: Served, tmp_path: Path):
    (tmp_path / "python").write_text("#!/bin/sh\necho first >&2\necho 'OSError: no such model' >&2\nexit 1\n")
    (tmp_path / "python").chmod(0o700)
    job = ReadingJob(served.export, False, tmp_path / "python")
    with pytest.raises(ValueError, match=r"transformers \(.*python\) cannot load .*export: OSError: no such model"):
        job.observe(make_request(served, tmp_path))
    written = json.loads((tmp_path / "read" / "job.json").read_text())
    assert written["hidden_packages"] == ["vlm"]
    assert written["trust_remote_code"] is False


def test_hidden_packages_are_not_found():
    hidden = HiddenPackages(["vlm"])
    with pytest.raises(ImportError, match="is hidden, because a published checkpoint"):
        hidden.find_spec("vlm.models")
    assert hidden.find_spec("vlmx") is None


def test_layers_are_found_in_models_of_others(served: Served):
    assert len(layers_of(served.model.model.visual_encoder)) == 2
    assert len(layers_of(served.model.model.language_model)) == 2
    assert layers_of(served.model.model.connector) == []


def test_what_is_loaded_where_no_export_is_named(served: Served, tmp_path: Path):
    folder, has_code = published_form(make_request(served, tmp_path))
    assert has_code
    assert (folder / "modeling_vlm.py").is_file()
    assert published_form(make_request(served, tmp_path, export=served.export)) == (served.export, False)
    export, notes = exported_form(make_request(served, tmp_path), "llava")
    assert json.loads((export / "config.json").read_text())["model_type"] == "llava"
    assert notes == []
    assert exported_form(make_request(served, tmp_path, export=served.export), "llava") == (served.export, [])


def test_code_that_came_with_a_checkpoint_needs_trust(served: Served, tmp_path: Path):
    folder, _ = published_form(make_request(served, tmp_path))
    with pytest.raises(ValueError, match="contains its own code, which only runs with --trust-remote-code"):
        published_form(make_request(served, tmp_path, export=folder))
    assert published_form(make_request(served, tmp_path, export=folder, trust_remote_code=True)) == (folder, True)
    final = tmp_path / "final"
    final.mkdir()
    values = json.loads((served.final / "config.json").read_text())
    values["auto_map"] = {"Connector": "user_connector.Mine"}
    (final / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="final contains its own code"):
        published_form(replace(make_request(served, tmp_path), checkpoint=final))


@pytest.mark.slow
@pytest.mark.parametrize("export", [False, True], ids=["published", "export"])
def test_a_process_without_this_package_gives_what_training_gives(served: Served, tmp_path: Path, export: bool):
    request = make_request(served, tmp_path, export=served.export if export else None)
    folder, has_code = published_form(request)
    job = ReadingJob(folder, has_code, Path(sys.executable))
    observation = job.observe(request)
    reference = Reference(served.model)
    for case in request.cases:
        ours, theirs = reference.outputs(case), observation.outputs[case.name]
        assert theirs["ids"].tolist() == ours["ids"].tolist()
        assert (theirs["logits"] - ours["logits"]).abs().max() < 1e-4
        assert observation.answers[case.name] == reference.answer(case, 3)
    theirs = job.trace(request, request.cases[0])
    assert first_differing_layer(reference.trace(request.cases[0]), theirs, "float32") is None
    assert theirs.keys() - {"logits"} == reference.trace(request.cases[0]).keys()
