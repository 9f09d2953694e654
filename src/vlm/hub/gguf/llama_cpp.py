"""llama.cpp on an export: its server, in this process, by the package `xllamacpp`, asked over loopback."""

import base64
import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlm.hub.gguf.exporting import LANGUAGE_MODEL_FILE, MMPROJ_FILE

Reply = dict[str, Any]
"""What the server replies, as JSON."""


class Answer(NamedTuple):
    """What llama.cpp answered.

    Attributes:
        text: the answer.
        tokens: its ids.
        num_prompt_tokens: how many tokens the prompt took, those of images included.
    """

    text: str
    tokens: list[int]
    num_prompt_tokens: int


class LlamaCpp:
    """A server of llama.cpp with a language model and its `mmproj`; `media_mark` stands for an image in a prompt.

    Args:
        folder: an export.
        max_positions: the longest prompt with its answer, in tokens.

    Raises:
        ValueError: the package `xllamacpp` is not installed, or llama.cpp does not load the files.
    """

    def __init__(self, folder: Path, max_positions: int = 4096):
        try:
            import xllamacpp  # pyright: ignore[reportMissingImports] - in no extra
        except ModuleNotFoundError as error:
            raise ValueError("llama.cpp answers through the package xllamacpp: pip install xllamacpp") from error
        library: Any = xllamacpp  # declares nothing
        settings = library.CommonParams()
        settings.model.path = str(folder / LANGUAGE_MODEL_FILE)
        settings.mmproj.path = str(folder / MMPROJ_FILE)
        settings.n_ctx, settings.n_parallel = max_positions, 1
        settings.warmup = settings.fit_params = False
        settings.verbosity = 0
        settings.flash_attn_type = library.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        settings.cache_type_k = settings.cache_type_v = library.ggml_type.GGML_TYPE_F32
        try:
            self.server = library.Server(settings)
        except Exception as error:  # whatever the binding raises
            raise ValueError(f"llama.cpp does not load {folder}: {error}") from error
        self.address: str = self.server.listening_address
        self.media_mark: str = self._open("/props")["media_marker"]
        self.version = f"llama.cpp of xllamacpp {xllamacpp.__version__}"

    def answer(self, prompt: str, images: Sequence[bytes], max_new_tokens: int, *, ignore_end: bool = False) -> Answer:
        """Return the greedy answer to a rendered prompt, in which `media_mark` stands for each image file."""
        options = {"n_predict": max_new_tokens, "return_tokens": True, "ignore_eos": ignore_end}
        reply = self._complete(prompt, images, options)
        return Answer(reply["content"], reply["tokens"], reply["tokens_evaluated"])

    def first_logprobs(self, prompt: str, images: Sequence[bytes]) -> dict[int, float]:
        """Return the likeliest first tokens of an answer, with the natural logarithms of their probabilities.

        llama.cpp tells none of a token that is part of a character, so a letter is made to follow: the probabilities
        are those from before.
        """
        letter = self.tokenize("a")[-1]
        options = {"n_predict": 1, "n_probs": 10, "post_sampling_probs": False, "logit_bias": [[letter, 1000.0]]}
        (first,) = self._complete(prompt, images, options)["completion_probabilities"]
        return {token["id"]: token["logprob"] for token in first["top_logprobs"]}

    def _complete(self, prompt: str, images: Sequence[bytes], options: dict[str, object]) -> Reply:
        data = [base64.b64encode(image).decode() for image in images]
        question = {"prompt_string": prompt, "multimodal_data": data} if images else prompt
        return self._post("/completion", {"prompt": question, "temperature": 0, "cache_prompt": False, **options})

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a text; special tokens that it spells are read as such."""
        return self._post("/tokenize", {"content": text, "parse_special": True})["tokens"]

    def render(self, messages: Sequence[dict[str, object]]) -> str:
        """Return a conversation as llama.cpp renders it by the file's chat template."""
        return self._post("/apply-template", {"messages": list(messages)})["prompt"]

    def _post(self, path: str, body: dict[str, object]) -> Reply:
        return self._open(path, json.dumps(body).encode())

    def _open(self, path: str, body: bytes | None = None) -> Reply:
        address, headers = self.address + path, {"Content-Type": "application/json"}
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is on this machine
        try:
            with opener.open(urllib.request.Request(address, body, headers)) as reply:
                return json.loads(reply.read())
        except urllib.error.HTTPError as error:
            raise ValueError(f"llama.cpp refuses {path}: {error.read().decode()[:300]}") from error
