"""llama.cpp, on an export to GGUF: its server runs in this process, by the package `xllamacpp`."""

import importlib.util

from vlm.inference.verify.cases import Case
from vlm.inference.verify.endpoint import Endpoint
from vlm.inference.verify.engines import Observation, Request, State
from vlm.inference.verify.served_forms import exported_form

READ_BACK = (
    "xllamacpp is not installed: an export reads its files back, tensor by tensor and with logits, but llama.cpp has "
    "answered nothing"
)
TOLD = "llama.cpp tells prompt tokens and answers alone: pixels, ids, logits and layers were not compared"


class LlamaCppEngine:
    """Asks llama.cpp as a client of its server does: messages and image files go in, answers come out."""

    def observe(self, request: Request) -> Observation:
        """Return numbers of prompt tokens and answers, see `Engine.observe`."""
        if request.url is not None:
            outputs, answers = Endpoint(request.url).observe(request.questions, request.max_new_tokens)
            return Observation("llama.cpp, asked over HTTP", outputs, answers, notes=[TOLD])
        folder, notes = exported_form(request, "gguf")
        if importlib.util.find_spec("xllamacpp") is None:
            return Observation("llama.cpp", is_run=False, notes=[*notes, READ_BACK])
        from vlm.hub.gguf.llama_cpp import LlamaCpp

        llama_cpp = LlamaCpp(folder)
        outputs, answers = Endpoint(llama_cpp.address).observe(request.questions, request.max_new_tokens)
        return Observation(llama_cpp.version, outputs, answers, notes=[*notes, TOLD])

    def trace(self, request: Request, case: Case) -> State:
        """Return nothing: llama.cpp shows no layers."""
        return {}


ENGINE = LlamaCppEngine()
