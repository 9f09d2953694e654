"""SGLang."""

from vlm.inference.verify.paper import SGLANG_NOTES, SGLANG_VERSION, check_for_sglang
from vlm.inference.verify.server_engines import ServerEngine

ENGINE = ServerEngine(
    "SGLang",
    "sglang",
    "llava-original",
    SGLANG_VERSION,
    check_for_sglang,
    lambda export, dtype: ("sglang.launch_server", "--model-path", str(export), "--dtype", dtype),
    SGLANG_NOTES,
)
