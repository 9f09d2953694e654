"""`vlm launch --nproc 8 -- -cn RUN …`: one rank for each GPU of this machine, of one machine or several.

Signals to this process reach every rank, it returns their exit code, and nothing that it started outlives it. Neither
torchrun nor DeepSpeed's launcher does all three: the first returns 1 whatever a rank returned, both kill ranks that
take more than 30 seconds to save, and DeepSpeed's leaves them running when the process that the user sees is ended.
"""

import argparse
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence

from vlm.clusters.processes import GRACE_SECONDS, ProcessGroup
from vlm.clusters.world import slurm_rendezvous
from vlm.config.shown import PresentableParser

EPILOG = """\
On several machines, run it on each with the same --rendezvous and its own --node-rank. Under Slurm (srun
--ntasks-per-node=1 vlm launch …) the nodes, node rank and rendezvous come from Slurm; vlm submit writes such jobs.

Exit codes: 0 finished; 1 an error; 75 a signal ended the run after saving, and the same command resumes it; 130 or 143
a second SIGINT or SIGTERM ended it at once; 128 + N signal N killed a rank. docs/resuming.md lists them all.
"""


def main(argv: Sequence[str]) -> None:
    """Start the ranks, wait for their end, and exit as they did."""
    own, run = split_at_dashes(argv)
    parser = make_parser()
    args, unknown = parser.parse_known_args(own)
    if not run:
        parser.error("the run is missing: put it after --, as in -- -cn pretrain-smol dataset.path=captions.json")
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    number = args.nproc or count_devices()
    nodes, node_rank = read_nodes(args, parser)
    environments = make_environments(number, nodes, node_rank, find_rendezvous(args.rendezvous, nodes, parser))
    code = ProcessGroup(args.grace).run([sys.executable, "-u", "-m", "vlm", *run], environments)
    if code:
        print(f"vlm launch: the ranks ended with exit code {code}", file=sys.stderr)
    sys.exit(code)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of what is before `--`."""
    parser = PresentableParser(
        "vlm launch",
        "vlm launch [options] -- -cn RUN [key=value …]",
        "Train on several GPUs: start one process per GPU, and stop them together.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        examples=(
            "vlm launch --nproc 8 -- -cn finetune-llava dataset.path=train.json dataset.image_folder=images",
            "vlm launch --nodes 2 --node-rank 0 --rendezvous node01:29500 -- -cn pretrain-smol dataset.path=a.json",
        ),
    )
    parser.add_argument("--nproc", type=positive, metavar="N", help="processes on this machine (default: one per GPU)")
    parser.add_argument("--nodes", type=positive, metavar="N", help="number of machines (default: 1, or Slurm's)")
    parser.add_argument("--node-rank", type=int, metavar="N", help="number of this machine, counted from 0")
    parser.add_argument("--rendezvous", metavar="HOST:PORT", help="the first machine and a free port on it")
    parser.add_argument(
        "--grace",
        type=float,
        default=GRACE_SECONDS,
        metavar="SECONDS",
        help="how long processes may take to stop once one has failed or a third signal has come (%(default)g)",
    )
    return parser


def split_at_dashes(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words before the first `--` and those after it."""
    words = list(argv)
    cut = words.index("--") if "--" in words else len(words)
    return words[:cut], words[cut + 1 :]


def positive(text: str) -> int:
    """Return a whole number from 1 on, for argparse."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def count_devices() -> int:
    """Return the number of GPUs that ranks would see; 1 if there is none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return max(len([device for device in visible.split(",") if device.strip() not in ("", "-1")]), 1)
    code = "import torch; print(torch.accelerator.device_count())"  # in another process: this one stays small
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return max(int(done.stdout.strip() or 1), 1) if done.returncode == 0 else 1


def read_nodes(args: argparse.Namespace, parser: argparse.ArgumentParser) -> tuple[int, int]:
    """Return the number of machines and this one's, from the command line or from the Slurm step."""
    if args.nodes is None and "SLURM_STEP_ID" in os.environ:
        nodes, rank = int(os.environ.get("SLURM_STEP_NUM_NODES", "1")), int(os.environ.get("SLURM_NODEID", "0"))
        if (tasks := int(os.environ.get("SLURM_STEP_NUM_TASKS", nodes))) != nodes:
            parser.error(f"srun started {tasks} tasks on {nodes} nodes; start one a node: srun --ntasks-per-node=1 …")
        return nodes, rank
    nodes, rank = args.nodes or 1, args.node_rank
    if rank is None and nodes > 1:
        parser.error(f"--nodes {nodes}: --node-rank is needed, 0 to {nodes - 1}, another one on each machine")
    if rank is not None and not 0 <= rank < nodes:
        parser.error(f"--node-rank {rank}: with --nodes {nodes} it is 0 to {nodes - 1}")
    return nodes, rank or 0


def find_rendezvous(text: str | None, nodes: int, parser: argparse.ArgumentParser) -> Mapping[str, str]:
    """Return the variables that say where the ranks meet."""
    if text is not None:
        host, colon, port = text.rpartition(":")
        if not colon or not host or not port.isdigit():
            parser.error(f"--rendezvous {text}: HOST:PORT is needed, as in node01:29500")
        return {"MASTER_ADDR": host, "MASTER_PORT": port}
    if nodes > 1:
        if "SLURM_STEP_ID" not in os.environ:
            parser.error(f"--nodes {nodes}: --rendezvous HOST:PORT is needed, the first machine and a free port of it")
        return slurm_rendezvous(os.environ)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}


def make_environments(number: int, nodes: int, node_rank: int, rendezvous: Mapping[str, str]) -> list[dict[str, str]]:
    """Return the environment of each rank of this machine."""
    common = {**os.environ, **rendezvous, "WORLD_SIZE": str(number * nodes), "LOCAL_WORLD_SIZE": str(number)}
    common.setdefault("OMP_NUM_THREADS", str(max(len(os.sched_getaffinity(0)) // number, 1)))
    return [common | {"RANK": str(node_rank * number + local), "LOCAL_RANK": str(local)} for local in range(number)]
