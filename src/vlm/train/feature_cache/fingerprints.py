"""Names for what hidden states depend on: records and their pictures, a body's weights, the code that computes them."""

import hashlib
import importlib.metadata
import inspect
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import nn

from vlm.data.cache import json_digest
from vlm.data.dataset import SampleDataset
from vlm.data.processes import num_cores
from vlm.data.vision import images as pictures
from vlm.data.vision import jpeg as pixels
from vlm.data.vision import video
from vlm.models import VLMForPrediction

LIBRARIES = ("transformers", "torch", "torchvision", "timm", "pillow", "simplejpeg", "av")
"""What computes pixels and hidden states."""


def records_digest(samples: SampleDataset, first: np.ndarray) -> str:
    """A name for the records at these places, how they become tokens, and their picture files as they are now."""
    files = hashlib.sha256()
    for index in first.tolist():
        for one in samples.sample(index).media:
            if one.path is not None and one.path.is_file():
                facts = one.path.stat()
                files.update(f"{one.path} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    sources = [source.fingerprint for source in samples.sources]
    processor = samples.processor
    return json_digest(
        sources, hashlib.sha256(samples.places[first].tobytes()).hexdigest(), files.hexdigest(), processor.to_dict()
    )


def body_digest(model: VLMForPrediction) -> str:
    """A name for every number of a model's body, whatever device they are on, and how it computes with them."""
    config = {name: value for name, value in model.config.body_config.to_diff_dict().items() if name != "recipe"}
    return json_digest(weights_digests(model.body), config)


def weights_digests(module: nn.Module) -> list[str]:
    """A name for every tensor of a module and the numbers in it, whatever device they are on."""
    state = module.state_dict()

    def digest(name: str) -> str:
        tensor = state[name].detach().cpu().contiguous()
        content = tensor.view(-1).view(torch.uint8).numpy() if tensor.numel() else b""
        return f"{name} {tuple(tensor.shape)} {tensor.dtype} {hashlib.blake2b(content).hexdigest()}"

    with ThreadPoolExecutor(num_cores()) as pool:
        return list(pool.map(digest, sorted(state)))


def code_digest(computation_class: type) -> str:
    """A name for the code that computes hidden states: opens pictures, the models', and a class with its module.

    With the versions of the libraries that decode, resize and encode.
    """
    models = sorted(Path(inspect.getfile(VLMForPrediction)).parent.glob("*.py"))
    files = [*models, *(Path(inspect.getfile(one)) for one in (pictures, pixels, video, computation_class))]
    code = hashlib.sha256(b"".join(file.read_bytes() for file in files))
    return json_digest(code.hexdigest(), {name: installed_version(name) for name in LIBRARIES})


def installed_version(name: str) -> str | None:
    """The version of an installed library; None: it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
