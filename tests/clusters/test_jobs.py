"""Job files: what schedulers read in them, and what is refused."""

import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from vlm.clusters.jobs import TARGETS, read_job, render

RUN = ["-cn", "finetune-llava", "dataset.path=my records.json", "dataset.system_prompt='it $IS `so`'"]


def rendered(target: str, *words: str) -> str:
    job, run = read_job([*RUN, "nodes=4", "name=llava", *words], target)
    assert run == RUN
    return render(job, target, run, Path(f"llava{TARGETS[target].suffix}"), "vlm submit …")


@pytest.mark.parametrize("target", ["slurm", "torchrun"])
def test_scripts_are_valid_bash(target: str):
    subprocess.run(["bash", "-n"], input=rendered(target), text=True, check=True)


def test_a_slurm_job_asks_for_notice_and_is_queued_again_on_the_exit_code():
    script = rendered(
        "slurm", "gpus=2", "time=24:00:00", "partition=a100", "memory=64G", "cpus=16", "setup=module load x"
    )
    options = [line.split(maxsplit=1)[1] for line in script.splitlines() if line.startswith("#SBATCH")]
    assert {"--nodes=4", "--ntasks-per-node=1", "--gpus-per-node=2", "--signal=USR1@120", "--requeue"} <= {*options}
    assert {"--time=24:00:00", "--partition=a100", "--mem=64G", "--cpus-per-task=16"} <= {*options}
    assert script.index("module load x") < script.index("srun")
    assert "srun --ntasks-per-node=1 --cpus-per-task=16 " in script  # it does not take that from sbatch


@pytest.mark.parametrize(("code", "requeued"), [(75, True), (0, False), (1, False), (76, False)])
def test_a_slurm_job_runs_the_launcher_and_ends_as_it_did(tmp_path: Path, code: int, requeued: bool):
    """With stand-ins for Slurm's commands."""
    for name, text in {"srun": f'printf "%s\\n" "$@" > words; exit {code}', "scontrol": 'echo "$@" > requeued'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    done = subprocess.run(
        ["bash"], input=rendered("slurm"), text=True, cwd=tmp_path, env=environment, check=False
    ).returncode
    assert done == code
    assert (tmp_path / "requeued").exists() is requeued
    words = (tmp_path / "words").read_text().splitlines()
    assert words[words.index("launch") :] == ["launch", "--nproc", "8", "--", *RUN]


def test_a_skypilot_job_recovers_on_the_exit_code():
    task = yaml.safe_load(rendered("skypilot", "accelerator=A100", "gpus=4"))
    assert task["num_nodes"] == 4
    assert task["resources"]["accelerators"] == "A100:4"
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    subprocess.run(["bash", "-n"], input=task["run"], text=True, check=True)
    assert shlex.split(task["run"], comments=True)[-len(RUN) :] == RUN


@pytest.mark.parametrize("target", ["kubernetes", "skypilot"])
def test_commands_that_run_first_may_be_several_lines(target: str):
    *_, job = yaml.safe_load_all(rendered(target, "setup=export A=1\nexport B=2"))
    is_task = target == "skypilot"
    script = job["run"] if is_task else job["spec"]["template"]["spec"]["containers"][0]["command"][2]
    assert script.startswith("export A=1\nexport B=2\n")


def test_a_kubernetes_job_has_a_pod_a_node_that_knows_the_first():
    service, job = yaml.safe_load_all(rendered("kubernetes", "image=registry/vlm:1", "notice=60"))
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert (spec["completions"], spec["parallelism"], spec["completionMode"]) == (4, 4, "Indexed")
    assert service["metadata"]["name"] == pod["subdomain"] == "llava"
    assert spec["podFailurePolicy"]["rules"][0] == {
        "action": "Ignore", "onExitCodes": {"operator": "In", "values": [75]},
    }  # fmt: skip
    (container,) = pod["containers"]
    assert (container["image"], pod["terminationGracePeriodSeconds"]) == ("registry/vlm:1", 60)
    command = container["command"][2]
    assert "--rendezvous llava-0.llava:29500" in command
    assert shlex.split(command, comments=True)[-len(RUN) :] == RUN


@pytest.mark.parametrize(
    ("target", "word", "named"),
    [
        ("slurm", "nodes=0", "nodes=0: a whole number from 1 on"),
        ("slurm", "gpus=many", "gpus=many"),
        ("slurm", "image=x", "--target slurm does not support it; allowed are name, nodes"),
        ("torchrun", "partition=x", "--target torchrun does not support it"),
        ("slurm", "name=My_Run", "lower-case letters"),
    ],
)
def test_keys_and_values_of_a_job_are_checked(target: str, word: str, named: str):
    with pytest.raises(ValueError, match=named):
        read_job([word], target)
