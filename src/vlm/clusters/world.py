"""Rank and number of ranks as schedulers state them. Imports the standard library only."""

import os
import re
from collections.abc import Mapping, MutableMapping

MPI_VARIABLES = (("OMPI_COMM_WORLD_SIZE", "mpirun"), ("PMI_SIZE", "mpiexec"), ("MV2_COMM_WORLD_SIZE", "mpirun"))
"""Variables that state a number of processes, and who sets them."""

FIRST_PORT, NUM_PORTS = 20_000, 10_000


def take_world_from_scheduler(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set `RANK`, `WORLD_SIZE` and the like from Slurm's variables where `srun` started several processes.

    A launcher that has set them before is left alone.

    Raises:
        SystemExit: this is one of several processes and cannot know the others.
    """
    if "RANK" in environment or "LOCAL_RANK" in environment:
        return
    for name, starter in MPI_VARIABLES:
        if int(environment.get(name, "1")) > 1:
            raise SystemExit(
                f"vlm: {starter} started {environment[name]} processes ({name}), which do not know each other; start "
                "one process a machine and let it start the ranks: vlm launch --nproc GPUS -- -cn RUN …"
            )
    number = int(environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS", "1"))
    if "SLURM_PROCID" not in environment or number == 1:
        return
    if "SLURM_STEP_ID" not in environment and "SLURM_STEPID" not in environment:
        raise SystemExit(
            f"vlm: this job has {number} tasks (SLURM_NTASKS), and its script runs once; start one process a task with "
            "srun python -m vlm …, or one a node with srun --ntasks-per-node=1 vlm launch --nproc GPUS -- -cn RUN …"
        )
    environment.update(slurm_world(environment, number))


def slurm_world(environment: Mapping[str, str], number: int) -> dict[str, str]:
    """Return the variables of torch's process groups for a task of a Slurm step with so many tasks."""
    has_own_device = environment.get("CUDA_VISIBLE_DEVICES", "").isdigit()  # by --gpus-per-task, which hides the others
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(number),
        "LOCAL_RANK": "0" if has_own_device else environment.get("SLURM_LOCALID", "0"),
        **slurm_rendezvous(environment),
    }


def slurm_rendezvous(environment: Mapping[str, str]) -> dict[str, str]:
    """Return where the ranks of a Slurm step meet: its first node and a port of the job, or as the environment says."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "127.0.0.1")
    step = f"{environment.get('SLURM_JOB_ID', '0')}{environment.get('SLURM_STEP_ID', '0')}"
    port = FIRST_PORT + int(re.sub(r"\D", "", step) or 0) % NUM_PORTS
    return {
        "MASTER_ADDR": environment.get("MASTER_ADDR", first_host(nodes)),
        "MASTER_PORT": environment.get("MASTER_PORT", str(port)),
    }


def first_host(nodes: str) -> str:
    """Return the first host of Slurm's compact list: `node[03-07,9],login` is `node03`."""
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,\[]*))?", nodes)
    if match is None:
        raise SystemExit(f"vlm: SLURM_JOB_NODELIST={nodes}: no host in it; set MASTER_ADDR to the first node")
    return "".join(part or "" for part in match.groups())
