"""onnxruntime, on the graphs of an export; it has no processor, so it is given what training's path gives the model."""

from importlib.metadata import version

import torch

from vlm.inference.verify.cases import Case
from vlm.inference.verify.engines import LOGITS, NUM_LOGITS, Observation, Request, State
from vlm.inference.verify.served_forms import exported_form

GIVEN = "graphs have no processor: pixels and ids were those of training's path"


class OnnxEngine:
    """Compares logits, and the answers to those questions whose inputs are given."""

    def observe(self, request: Request) -> Observation:
        """Return logits and answers, see `Engine.observe`."""
        folder, notes = exported_form(request, "onnx")
        try:
            from vlm.hub.onnx.session import OnnxModel
        except ModuleNotFoundError as error:
            raise ValueError(f"{error.name} is not installed: pip install 'small-vlm[export]'") from error
        from tokenizers import Tokenizer

        from vlm.hub.folders import read_json

        graphs = OnnxModel(folder, read_json(folder / "config.json")["image_token_index"])
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        ends = read_json(folder / "generation_config.json")["eos_token_id"]
        outputs, answers = {}, {}
        for name, state in request.inputs.items():
            ids, mask = state["input_ids"].cpu().numpy(), state["attention_mask"].cpu().numpy()
            pixels = state["pixel_values"].float().cpu().numpy() if "pixel_values" in state else None
            logits, _ = graphs.decode(graphs.embed(ids, pixels), mask)
            outputs[name] = {LOGITS: torch.from_numpy(logits[0, -NUM_LOGITS:])}
            tokens = graphs.generate(ids, mask, pixels, request.max_new_tokens, tuple(ends))
            answers[name] = tokenizer.decode(tokens[0].tolist()).strip()
        name = f"onnxruntime {version('onnxruntime')}"
        return Observation(name, outputs, answers, notes=[*notes, GIVEN], ends=ends)

    def trace(self, request: Request, case: Case) -> State:
        """Return nothing: graphs show no layers."""
        return {}


ENGINE = OnnxEngine()
