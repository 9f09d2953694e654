"""Fingerprints of all that features depend on: records and their images, weights, and the code that computes them."""

import hashlib
import importlib.metadata
import inspect
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vlm.data.cache import json_digest
from vlm.data.dataset import SampleDataset
from vlm.data.processes import num_cores
from vlm.data.vision import images, jpeg, video
from vlm.models import VLMForPrediction

LIBRARIES = ("transformers", "torch", "torchvision", "timm", "pillow", "simplejpeg", "av")
"""The libraries that compute pixels and hidden states."""


def records_digest(samples: SampleDataset, first: np.ndarray) -> str:
    """Return a fingerprint of the records whose first samples are given.

    It covers how they become tokens, and their image files as they are now.
    """
    files = hashlib.sha256()
    for index in first.tolist():
        for medium in samples.sample(index).media:
            if medium.path is not None and medium.path.is_file():
                status = medium.path.stat()
                files.update(f"{medium.path} {status.st_size} {status.st_mtime_ns}\n".encode())
    sources = [source.fingerprint for source in samples.sources]
    places = hashlib.sha256(samples.places[first].tobytes()).hexdigest()
    return json_digest(sources, places, files.hexdigest(), samples.processor.to_dict())


def body_digest(model: VLMForPrediction) -> str:
    """Return a fingerprint of the weights of a model's body, whatever device they are on, and of its configuration."""
    config = {name: value for name, value in model.config.body_config.to_diff_dict().items() if name != "recipe"}
    return json_digest(weights_digests(model.body), config)


def weights_digests(module: nn.Module) -> list[str]:
    """Return a fingerprint of each tensor of a module, whatever device it is on."""
    return tensors_digests(module.state_dict())


def tensors_digests(state: Mapping[str, Tensor]) -> list[str]:
    """Return a fingerprint of each tensor by its name, whatever device it is on."""

    def digest(name: str) -> str:
        """Return a tensor's name, shape, type and hash."""
        tensor = state[name].detach().cpu().contiguous()
        content = tensor.view(-1).view(torch.uint8).numpy().data if tensor.numel() else b""
        return f"{name} {tuple(tensor.shape)} {tensor.dtype} {hashlib.blake2b(content).hexdigest()}"

    with ThreadPoolExecutor(num_cores()) as pool:
        return list(pool.map(digest, sorted(state)))


def code_digest(computation_class: type) -> str:
    """Return a fingerprint of the code that computes features, and of the versions of the libraries it uses.

    The code is that which opens images, the models', and the module of a class.
    """
    models = sorted(Path(inspect.getfile(VLMForPrediction)).parent.glob("*.py"))
    files = [*models, *(Path(inspect.getfile(module)) for module in (images, jpeg, video, computation_class))]
    code = hashlib.sha256(b"".join(file.read_bytes() for file in files))
    return json_digest(code.hexdigest(), {name: installed_version(name) for name in LIBRARIES})


def installed_version(name: str) -> str | None:
    """Return the version of a library; None: it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
