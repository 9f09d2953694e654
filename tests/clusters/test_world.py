"""Ranks from what schedulers say of them."""

import pytest

from vlm.clusters.world import first_host, take_world_from_scheduler

TASK = {
    "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_NTASKS": "16", "SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "gpu[08-09]",
}  # fmt: skip


def test_a_task_of_srun_is_a_rank():
    environment = dict(TASK)
    take_world_from_scheduler(environment)
    ranks = {name: value for name, value in environment.items() if not name.startswith("SLURM")}
    assert ranks == {
        "RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu08", "MASTER_PORT": "27110",
    }  # fmt: skip


@pytest.mark.parametrize(("visible", "local"), [("3", "0"), ("0,1,2,3", "1")])
def test_a_task_that_sees_one_device_takes_it(visible: str, local: str):
    environment = {**TASK, "CUDA_VISIBLE_DEVICES": visible}
    take_world_from_scheduler(environment)
    assert environment["LOCAL_RANK"] == local


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {**TASK, "SLURM_STEP_NUM_TASKS": "1"},
        {**TASK, "RANK": "0", "WORLD_SIZE": "2"},
        {"SLURM_NTASKS": "4"},
        {"OMPI_COMM_WORLD_SIZE": "1"},
    ],
)
def test_other_processes_are_left_alone(environment: dict[str, str]):
    before = dict(environment)
    take_world_from_scheduler(environment)
    assert environment == before


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, "srun python -m vlm"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, "vlm launch --nproc GPUS"),
        ({"PMI_SIZE": "2"}, "vlm launch --nproc GPUS"),
        ({**TASK, "SLURM_JOB_NODELIST": "["}, "set MASTER_ADDR"),
    ],
)
def test_processes_that_cannot_know_each_other_are_refused(environment: dict[str, str], named: str):
    with pytest.raises(SystemExit, match=named):
        take_world_from_scheduler(environment)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("node1", "node1"), ("a,b", "a"), ("gpu[03-07,9],login", "gpu03"), ("n[2,4]-ib,x", "n2-ib"), ("n[12]", "n12")],
)
def test_the_first_host_of_a_list(nodes: str, host: str):
    assert first_host(nodes) == host
