"""The folder that is published: what is in it, what its card says, and that no path of a machine is."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.command_line import refusal
from tests.families.tiny_families import save_family
from tests.fixtures import compose_config
from tests.models.test_checkpoints import OWN_CONNECTOR
from tests.tiny_parts import Parts
from vlm.cli.main import main
from vlm.data.encoding.labels import read_template
from vlm.hub.cleaning import find_hub_name, without_paths
from vlm.hub.publishing import list_code_files, prepare_upload
from vlm.hub.run_facts import RunSummary, read_run
from vlm.models import VLMProcessor
from vlm.models.configuration_vlm import AUTO_MAP
from vlm.train.run import run

HUB_FILES = {
    "anyres.py", "configuration_vlm.py", "connector_parts.py", "connectors.py", "encoders.py", "grid_connectors.py",
    "image_inputs.py", "language_inputs.py", "modeling_vlm.py", "native.py", "native_encoders.py", "pixels.py",
    "processing_messages.py", "processing_vlm.py", "query_connectors.py", "text_loss.py", "text_pieces.py",
    "text_processing.py", "vocabulary.py", "wrapper.py",
}  # fmt: skip


@pytest.fixture(scope="module")
def dry(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a dry run of the short run's model leaves; the folder has things that are not for others."""
    final = run_folder / "final"
    (run_folder / "command.txt").write_text("python -m vlm -cn pretrain-smol dataset.path=records.json\n")
    (final / "optimizer.pt").write_bytes(b"x")
    (final / "notes.txt").write_text("mine")
    (final / "modeling_vlm.py").write_text("what an older version wrote")
    out = tmp_path_factory.mktemp("dry") / "out"
    main(["push-to-hub", str(final), "--repo", "ann/tiny", "--license", "mit", "--dry-run", "--output", str(out)])
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_models_files_are_published_and_no_other(dry: Path, run_folder: Path):
    names = set(contents(dry))
    assert {name for name in names if name.endswith(".py")} == HUB_FILES
    assert names - HUB_FILES == {
        "README.md", "config.json", "generation_config.json", "loss.png", "model.safetensors", "processor_config.json",
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    final = run_folder / "final"
    for name in ("model.safetensors", "tokenizer.json", "chat_template.jinja"):
        assert (dry / name).read_bytes() == (final / name).read_bytes()
    config = json.loads((dry / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP
    processor = json.loads((dry / "processor_config.json").read_text())
    assert processor["auto_map"] == {"AutoProcessor": AUTO_MAP["AutoProcessor"]}


def test_what_ends_a_reply_is_published(run_folder: Path, tmp_path: Path):
    """Also of a checkpoint that was saved without it."""
    shutil.copytree(run_folder / "final", tmp_path / "final")
    processor = VLMProcessor.from_pretrained(tmp_path / "final")
    (tmp_path / "final" / "chat_template.jinja").write_text(read_template("chatml"))
    (tmp_path / "final" / "generation_config.json").write_text('{"eos_token_id": 0}')
    main(["push-to-hub", str(tmp_path / "final"), "--dry-run", "--output", str(tmp_path / "out")])
    ends = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    assert ends == sorted({0, processor.tokenizer.convert_tokens_to_ids("<|im_end|>")})


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_are_published_under_the_models_own_names(run_folder: Path, tmp_path: Path, *, sharded: bool):
    """An earlier version saved others after ZeRO-3."""
    final, out = tmp_path / "final", tmp_path / "out"
    shutil.copytree(run_folder / "final", final)
    own = load_file(final / "model.safetensors")
    former = {name.replace("visual_encoder.", "visual_encoder.vision_model."): tensor for name, tensor in own.items()}
    assert former.keys() != own.keys()
    (final / "model.safetensors").unlink()
    if sharded:
        names = sorted(former)
        parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
        for file, held in parts.items():
            save_file({name: former[name] for name in held}, final / file, {"format": "pt"})
        index = {"metadata": {}, "weight_map": {name: file for file, held in parts.items() for name in held}}
        (final / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(former, final / "model.safetensors", {"format": "pt"})
    out.mkdir()
    prepared = prepare_upload(final, out, read_run(run_folder / "final"))
    files = [name for name in prepared.files if name.endswith(".safetensors")]
    published = {name: tensor for file in files for name, tensor in load_file(out / file).items()}
    assert published.keys() == own.keys()
    assert all(torch.equal(tensor, own[name]) for name, tensor in published.items())
    if sharded:
        assert json.loads((out / "model.safetensors.index.json").read_text())["weight_map"].keys() == own.keys()
    assert {name for name in load_file(next(final.glob("*.safetensors"))) if "vision_model" in name}  # as it was


def test_the_code_is_the_installed_packages(dry: Path):
    import vlm.models.modeling_vlm as source

    assert (dry / "modeling_vlm.py").read_text() == Path(source.__file__).read_text()


def test_the_checkpoint_stays_as_it_is(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    before = contents(run_folder / "final")
    main(["push-to-hub", "--checkpoint", str(run_folder / "final"), "--dry-run"])
    said = capsys.readouterr().out
    assert contents(run_folder / "final") == before
    assert "model.safetensors" in said
    assert said.splitlines()[-1] == "Nothing was uploaded."


def test_what_is_left_out_is_said(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    final = tmp_path / "final"
    shutil.copytree(run_folder / "final", final)
    for name in ("events.log", "training_args.bin", "README.md"):
        (final / name).write_text("x")
    main(["push-to-hub", str(final), "--dry-run"])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Left out: "))
    assert {"events.log", "training_args.bin", "README.md"} <= set(line.removeprefix("Left out: ").split(", "))


def test_no_path_of_this_machine_is_published(dry: Path, run_folder: Path, world: Path):
    texts = {file.name: file.read_text() for file in dry.iterdir() if file.suffix in (".json", ".md", ".jinja", ".py")}
    for place in (str(run_folder), str(world), str(run_folder.parents[1]), str(Path.home()) + "/"):
        assert [name for name, text in texts.items() if place in text] == []
    config = json.loads(texts["config.json"])
    assert config["recipe"]["language_model"]["hf_name"] == "language_model"
    assert "_name_or_path" not in config["text_config"]


def test_the_published_folder_loads_and_trains_on(dry: Path, brief: list[str], tmp_path: Path):
    """Names that went from its recipe are not needed."""
    words = [*brief, "trainer.max_steps=1", "trainer.num_samples=0", f"trainer.from_pretrained={dry}"]
    words.append(f"trainer.output_dir={tmp_path / 'on'}")
    folder = run(compose_config("pretrain-smol", words), "pretrain-smol", [word.split("=")[0] for word in words])
    assert (folder / "final" / "model.safetensors").is_file()


def test_the_card_says_what_is_known(dry: Path):
    card = ModelCard.load(dry / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "image-text-to-text"
    assert card.data.license == "mit"
    assert card.data.base_model is None  # its parts are folders of this machine
    text = card.text
    assert text.strip().startswith("# tiny\n")
    for part in ("visual_encoder", "connector", "language_model"):
        assert f"\n| {part} | " in text
    assert "| stage | pretrain-smol |" in text
    assert "| learning rate of connector | 0.001 |" in text
    assert "| learning rate of language_model | frozen |" in text
    assert "| train | records.json | 24 | 18 |" in text
    assert "| samples a step | 8 |" in text
    assert "training loss, last logged" in text
    assert "![Loss](loss.png)" in text
    assert 'from_pretrained("ann/tiny", trust_remote_code=True' in text


def test_counts_of_parameters_are_the_models(dry: Path):
    model: Any = AutoModelForImageTextToText.from_pretrained(dry)
    total = sum(parameter.numel() for parameter in model.parameters())
    connector = sum(parameter.numel() for parameter in model.connector.parameters())
    text = (dry / "README.md").read_text()
    assert f"| total |  | {total:,} |" in text
    row = next(line for line in text.splitlines() if line.startswith("| connector |"))
    assert row.endswith(f" {connector:,} |")


def test_hub_names_become_base_models_and_data_sets(parts: Parts, tmp_path: Path):
    model, processor = parts.model()
    model.config.recipe["visual_encoder"]["hf_name"] = "openai/clip-vit-large-patch14-336"
    model.config.recipe["language_model"]["hf_name"] = "Qwen/Qwen2.5-0.5B"
    model.config.text_config._name_or_path = "Qwen/Qwen2.5-0.5B"
    model.save_pretrained(tmp_path / "final")
    processor.save_pretrained(tmp_path / "final")
    (tmp_path / "out").mkdir()
    data = {"train": {"samples": 9, "images": 9, "sources": [
        {"source": "hf://lab/pictures", "path": "hf://lab/pictures", "samples": 9, "images": 9}]}}  # fmt: skip
    score = {"value": 0.5, "low": 0.4, "high": 0.6}
    tasks = [
        {"task": "gqa", "metric": "exact_match", "value": 0.62, "error": 0.0043},
        {"task": "vqav2_test", "metric": "submission", "value": None, "error": None},
    ]
    evaluations = {"vqa": {"records": 7, "metrics": {"accuracy": score}}, "gqa": {"limit": None, "results": tasks}}
    facts = RunSummary(tmp_path / "final", data=data, evaluations=evaluations)
    prepare_upload(tmp_path / "final", tmp_path / "out", facts)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == ["openai/clip-vit-large-patch14-336", "Qwen/Qwen2.5-0.5B"]
    assert card.data.datasets == ["lab/pictures"]
    assert "license" not in card.data.to_dict()
    assert "Evaluation `vqa`, 7 records:" in card.text
    assert "| accuracy | 0.500 [0.400, 0.600] |" in card.text
    assert "| gqa · exact_match | 0.62 ± 0.0043 |" in card.text
    assert "| vqav2_test · submission | to be scored elsewhere |" in card.text
    assert "[Qwen/Qwen2.5-0.5B](https://huggingface.co/Qwen/Qwen2.5-0.5B) (llama)" in card.text
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_config"]["_name_or_path"] == "Qwen/Qwen2.5-0.5B"


def test_comparisons_of_models_and_evaluations_of_replaced_weights_are_not_in_the_card(tmp_path: Path):
    for name in ("config.yaml", "metrics.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "final").mkdir()
    accuracy = {"metrics": {"accuracy": {"value": 0.5}}}
    replaced = accuracy | {"weights": {"folder": "final", "fingerprint": "of earlier weights"}}
    found = {"val": accuracy, "replaced": replaced, "gqa": {"results": []}, "compare": {"metrics": ["loss"]}}
    for name, results in found.items():
        (tmp_path / "eval" / name).mkdir(parents=True)
        (tmp_path / "eval" / name / "results.json").write_text(json.dumps(results))
    assert set(read_run(tmp_path / "final").evaluations) == {"val", "gqa"}


def test_heads_bring_their_measures_and_their_code(train_head: Callable[..., Path], tmp_path: Path):
    folder = train_head("head-classification", "colour", tmp_path / "head")
    (tmp_path / "out").mkdir()
    prepared = prepare_upload(folder / "final", tmp_path / "out", read_run(folder / "final"), repo="ann/colours")
    assert {"modeling_prediction.py", "configuration_prediction.py", "heads.py", "head_losses.py", "poolings.py",
            "head_tasks.py"} | HUB_FILES <= set(prepared.files)  # fmt: skip
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.pipeline_tag == "image-classification"
    assert "AutoModelForSequenceClassification" in card.text
    accuracy = next(line for line in card.text.splitlines() if line.startswith("| accuracy | "))
    found = json.loads((folder / "scores.json").read_text())["evaluation"]
    value = next(iter(found.values()))["scores"]["accuracy"]["value"]
    assert accuracy.startswith(f"| accuracy | {value:.3f} [")
    assert "| learning rate of head | 0.02 |" in card.text


def test_a_familys_model_needs_no_code(tmp_path: Path):
    folder = tmp_path / "final"
    save_family("llava-onevision", folder)
    (tmp_path / "out").mkdir()
    prepared = prepare_upload(folder, tmp_path / "out", RunSummary(folder), repo="ann/onevision")
    assert [name for name in prepared.files if name.endswith(".py")] == []
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    text = (tmp_path / "out" / "README.md").read_text()
    assert "trust_remote_code" not in text
    AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    AutoProcessor.from_pretrained(tmp_path / "out")


def test_a_class_of_the_users_own_has_to_be_there(tmp_path: Path):
    config = {
        "model_type": "vlm", "connector": {"type": "mine:Connector"}, "auto_map": {"Connector": "user_connector.Mine"}
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"user_connector\.py, which has user_connector\.Mine, is missing"):
        list(list_code_files(tmp_path, config))
    (tmp_path / "user_connector.py").write_text(OWN_CONNECTOR)
    assert (tmp_path / "user_connector.py") in list(list_code_files(tmp_path, config))
    with pytest.raises(ValueError, match="mine:Connector is a class whose file is not there"):
        list(list_code_files(tmp_path, {**config, "auto_map": {}}))


# Refusals


def test_a_run_directory_is_no_checkpoint(run_folder: Path):
    assert refusal("push-to-hub", str(run_folder), "--dry-run").endswith(
        f"it is a run directory, and its model is {run_folder / 'final'}"
    )


def test_a_state_on_the_way_is_no_checkpoint(run_folder: Path, tmp_path: Path):
    state = tmp_path / "checkpoint-2"
    shutil.copytree(run_folder / "final", state)
    (state / "trainer_state.json").write_text("{}")
    assert f"the same command with trainer.output_dir={state.parent}" in refusal("push-to-hub", str(state), "--dry-run")


@pytest.mark.parametrize("name", ["model.safetensors", "processor_config.json", "tokenizer_config.json", "config.json"])
def test_a_checkpoint_that_lacks_a_file_is_refused(run_folder: Path, tmp_path: Path, name: str):
    shutil.copytree(run_folder / "final", tmp_path / "final")
    (tmp_path / "final" / name).unlink()
    assert name in refusal("push-to-hub", str(tmp_path / "final"), "--dry-run", "--output", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_torn_weights_are_refused(run_folder: Path, tmp_path: Path):
    shutil.copytree(run_folder / "final", tmp_path / "final")
    weights = tmp_path / "final" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert "model.safetensors is not a complete safetensors file" in refusal(
        "push-to-hub", str(tmp_path / "final"), "--dry-run"
    )


def test_a_path_in_a_users_class_is_said(run_folder: Path, tmp_path: Path):
    shutil.copytree(run_folder / "final", tmp_path / "final")
    (tmp_path / "final" / "chat_template.jinja").write_text(f"{{# from {tmp_path}/x #}}{{{{ messages[0].content }}}}")
    said = refusal("push-to-hub", str(tmp_path / "final"), "--dry-run")
    assert f"chat_template.jinja mentions {tmp_path}" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--merge"], "--merge: .* is a complete model, without a base"),
        (["--base", "x"], "--base: .* is a complete model, without a base"),
        (["--repo", "a/b/c"], "'a/b/c' is not a repository name"),
    ],
)
def test_options_that_fit_nothing_are_refused(run_folder: Path, words: list[str], said: str):
    import re

    assert re.search(said, refusal("push-to-hub", str(run_folder / "final"), "--dry-run", *words))


# Names and paths


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("openai/clip-vit-base-patch16", "openai/clip-vit-base-patch16"),
        ("hf://lab/pictures", "lab/pictures"),
        ("/data/models/llama", None),
        ("../models/llama", None),
        ("runs/gone", None),  # `runs` is a folder above the checkpoint
        ("models/a/b", None),
        ("gpt2", None),
        (None, None),
    ],
)
def test_names_on_the_hub_are_told_from_folders(name: str | None, wanted: str | None, tmp_path: Path):
    (tmp_path / "runs").mkdir()
    assert find_hub_name(name, tmp_path / "somewhere" / "final") == wanted


def test_paths_go_and_tokens_stay(tmp_path: Path):
    values = {
        "a": {"_name_or_path": "/home/me/model", "hf_name": "/home/me/model", "kept": ["</s>", "/", "a/b c"]},
        "tokenizer_file": "/home/me/tokenizer.json",
        "name_or_path": "openai/clip",
    }
    assert without_paths(values, tmp_path / "final") == {
        "a": {"hf_name": "model", "kept": ["</s>", "/", "a/b c"]},
        "tokenizer_file": "tokenizer.json",
        "name_or_path": "openai/clip",
    }
