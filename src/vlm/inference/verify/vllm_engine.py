"""vLLM."""

from vlm.inference.verify.paper import VLLM_VERSION, check_for_vllm
from vlm.inference.verify.server_engines import ServerEngine

ENGINE = ServerEngine(
    "vLLM",
    "vllm",
    "llava",
    VLLM_VERSION,
    check_for_vllm,
    lambda export, dtype: ("vllm.entrypoints.openai.api_server", "--model", str(export), "--dtype", dtype),
)
