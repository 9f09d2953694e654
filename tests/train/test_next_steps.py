"""The commands that a run ends with."""

import shlex
from pathlib import Path

import pytest

from tests.fixtures import compose_config
from vlm.train.example_question import ExampleQuestion
from vlm.train.next_steps import describe_next_steps, override
from vlm.train.objectives.table import make_objective


def commands(
    name: str, *words: str, final: Path = Path("outputs/run/final"), example: ExampleQuestion | None = None
) -> dict[str, list[str]]:
    """Purpose -> words of the command, of a run."""
    config = compose_config(name, ["dataset.path=a.json", *words])
    found = make_objective(config).next_commands(final, example or ExampleQuestion())
    text = describe_next_steps(found, config, name, final)
    lines = (line.strip().split("  ", 1) for line in text.splitlines())
    return {purpose: shlex.split(command) for purpose, command in lines}


def test_after_a_first_stage_the_second_comes():
    found = commands("pretrain-smol", "dataset.image_folder=images")
    assert list(found) == ["look at it", "finetune it", "see its answers", "publish it"]
    assert found["see its answers"] == ["outputs/run/samples.md"]
    assert found["look at it"] == ["outputs/run/report.html"]
    assert found["finetune it"] == [
        "vlm", "-cn", "finetune-smol", "trainer.from_pretrained=outputs/run/final", "dataset.path=RECORDS",
        "dataset.image_folder=images",
    ]  # fmt: skip


def test_a_model_that_was_trained_without_prompts_is_not_asked():
    assert "ask it" not in commands("pretrain-smol", example=ExampleQuestion("a.png", "Is it red?"))
    assert "see its answers" not in commands("pretrain-smol", "trainer.num_samples=0")
    assert "ask it" in commands("pretrain-smol", "dataset.template=tokenizer")


def test_the_second_stage_stays_on_the_cpu():
    assert commands("pretrain-smol", "trainer.use_cpu=true")["finetune it"][-1] == "trainer.use_cpu=true"


def test_after_finetuning_the_model_is_measured_where_there_are_records():
    found = commands("finetune-smol", "dataset.eval_path=val.json", "dataset.image_folder=my images")
    assert found["measure it"] == [
        "vlm", "eval", "outputs/run/final", "--data", "val.json", "--image-folder", "my images"
    ]  # fmt: skip
    assert found["publish it"] == ["vlm", "push-to-hub", "outputs/run/final", "--repo", "OWNER/NAME"]
    assert "measure it" not in commands("preference-smol", "dataset.eval_path=val.json")


def test_a_head_predicts():
    assert commands("head-binary")["ask it"][:3] == ["vlm", "predict", "outputs/run/final"]


def test_paths_with_blanks_and_signs_can_be_copied():
    final = Path("outputs/it's a run, x=1/final")
    found = commands("pretrain-smol", final=final)
    assert found["publish it"][2] == str(final)
    config = compose_config("finetune-smol", ["dataset.path=a.json", found["finetune it"][3]])
    assert config.trainer.from_pretrained == str(final)


@pytest.mark.parametrize("value", ["a/b.c:d+e", "a b", "a=b,c", "it's", "\\'", "ünï"])
def test_an_override_gives_the_text_itself(value: str):
    assert compose_config("finetune-smol", [override("dataset.path", value)]).dataset.path == value


@pytest.mark.parametrize("name", ["finetune-smol", "head-binary"])
def test_the_question_is_one_of_the_records(name: str):
    example = ExampleQuestion("my images/1.png", "What's on this stamp?")
    asked = commands(name, example=example)["ask it"]
    assert asked[3:] == ["--image", "my images/1.png", "--prompt", "What's on this stamp?"]


def test_without_such_a_question_any_image_can_be_asked_about():
    assert commands("finetune-smol")["ask it"][3:] == ["--image", "FILE", "--prompt", "What is in this image?"]
    assert commands("head-binary")["ask it"][3:] == ["--image", "FILE", "--prompt", "PROMPT"]
