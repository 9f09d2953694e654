"""A small model that ranks share in every way there is, and hand from one way to the other.

`python -m tests.train.checkpoints.rank_programs FOLDER`, on any number of ranks. Each way trains two steps, saves,
and trains two more. From each checkpoint in the folder, those of other numbers of ranks too, each way goes on for two
steps, and has to come to the same weights.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from vlm.train.checkpoints.deepspeed_shards import put_into_engine
from vlm.train.checkpoints.reshard import open_parameters, put_parameters
from vlm.train.checkpoints.sharded import FOLDER, load_sharded, save_sharded
from vlm.train.checkpoints.trained import TRAINED_WEIGHTS
from vlm.train.sharding import gather_state, reshard

WAYS = ("zero0", "zero1", "zero2", "zero3", "fsdp2", "alone")


def make_model() -> nn.Sequential:
    """Layers of odd sizes, two of them frozen, and buffers of both kinds; gradients are the same on all ranks."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 5), nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 1), nn.BatchNorm1d(1)
    )  # fmt: skip
    model[1].requires_grad_(False)
    model[4].requires_grad_(False)
    model.eval()
    return model


def groups(model: nn.Module) -> list[dict[str, Any]]:
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    biases = [parameter for name, parameter in trained if "bias" in name]
    return [
        {"params": [parameter for name, parameter in trained if "bias" not in name], "lr": 1e-2, "weight_decay": 0.1},
        {"params": biases, "lr": 3e-2, "weight_decay": 0.0},
    ]


class Shared:
    """The model, trained in one of `WAYS`."""

    def __init__(self, way: str):
        self.way, self.model = way, make_model()
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        self.names = [names[id(parameter)] for group in groups(self.model) for parameter in group["params"]]
        self.engine: Any = None
        if way == "fsdp2":
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            fully_shard(self.model[3], mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        self.optimizer: Any = torch.optim.AdamW(groups(self.model))
        if way.startswith("zero"):
            settings = {
                "train_micro_batch_size_per_gpu": 4, "zero_allow_untested_optimizer": True, "gradient_clipping": 0.0,
                "zero_optimization": {"stage": int(way[-1]), "stage3_param_persistence_threshold": 4},
            }  # fmt: skip
            self.engine, *_ = deepspeed.initialize(model=self.model, optimizer=self.optimizer, config=settings)

    def step(self, number: int) -> None:
        inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(number))
        model = self.model if self.engine is None else self.engine
        loss = model(inputs).square().mean()
        if self.engine is not None:
            self.engine.backward(loss)
            self.engine.step()
            return
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def tensors(self) -> dict[str, Tensor]:
        reshard(self.model)
        trained = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        return {**trained, **{f"2.{name}": buffer for name, buffer in self.model[2].named_buffers()}}

    def save(self, folder: Path) -> None:
        if dist.get_rank() == 0:
            folder.mkdir()
            (folder / "trainer_state.json").write_text(json.dumps({"global_step": 2}))
        dist.barrier()
        if self.engine is not None:
            self.engine.save_checkpoint(str(folder), exclude_frozen_parameters=True)
        elif self.way == "fsdp2":
            save_sharded(folder, self.tensors(), self.optimizer)
        elif dist.get_rank() == 0:
            save_file(self.tensors(), folder / TRAINED_WEIGHTS)
            torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")
        dist.barrier()

    def load(self, folder: Path) -> None:
        saved = open_parameters(folder, self.names, self.tensors())
        assert saved.keys() == self.tensors().keys()
        if self.way in ("zero1", "zero2", "zero3"):
            put_into_engine(self.engine, saved, folder)
        elif self.way == "fsdp2" and (folder / FOLDER).is_dir():
            load_sharded(folder, self.tensors(), self.optimizer)
        else:
            put_parameters(self.tensors(), self.optimizer, saved)

    def weights(self) -> Mapping[str, Tensor]:
        if self.way == "fsdp2":
            return gather_state(self.model)
        if self.way == "zero3":
            with deepspeed.zero.GatheredParameters(list(self.model.parameters())):
                return {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        return {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}


def main(folder: Path) -> None:
    """Write the largest difference of weights for each pair of a checkpoint and a way to go on into `differences`."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    ranks, rank = dist.get_world_size(), dist.get_rank()
    ways = [way for way in WAYS if ranks > 1 or way != "fsdp2"]
    unsaved = [way for way in ways if not (folder / f"{ranks}-{way}").exists()]
    dist.barrier()  # every rank has looked
    expected: Mapping[str, Tensor] = {}
    for way in ways:
        run = Shared(way)
        run.step(0)
        dict(run.model[2].named_buffers())["running_mean"].fill_(0.5)  # as a part that trains may leave a buffer
        run.step(1)
        if way in unsaved:
            run.save(folder / f"{ranks}-{way}")
        run.step(2)
        run.step(3)
        expected = run.weights() or expected
    differences: dict[str, float] = {}
    for source in sorted(folder.glob("*-*")):
        for way in ways:
            run = Shared(way)
            run.load(source)
            run.step(2)
            run.step(3)
            worst = [(tensor - expected[name]).abs().max().item() for name, tensor in run.weights().items()]
            differences[f"{source.name} {ranks}-{way}"] = max(worst, default=0.0)  # FSDP2 gathers on rank 0 alone
    if rank == 0:
        (folder / f"differences{ranks}").write_text(json.dumps(differences))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
