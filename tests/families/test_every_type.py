"""Every type of transformers that builds small: it trains with each part frozen, answers, is saved and loads again."""

import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from tests.families.small_runs import TYPES, SmallRun
from vlm.config.schema import PARTS
from vlm.families.meta_model import get_auto_class
from vlm.families.row_by_row import keep_apart
from vlm.inference.generate import VisionLanguageModel

QUICK = {
    "gemma4", "glm4v", "glm_ocr", "kimi_k25", "lfm2_vl", "llama4", "minicpmv4_6", "mistral3", "molmo2", "ovis2",
    "paddleocr_vl", "perception_lm", "qwen3_5", "qwen3_vl_moe",
}  # fmt: skip
"""Those that every run of the tests tries."""
UNASKED = {"minimax_m3_vl": "`model_kwargs` are not used by the model: .'mm_token_type_ids'"}
"""Types that do not answer, whose proof of answers says so too: what their own code says."""


@pytest.mark.parametrize(
    "model_type", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in TYPES]
)
def test_a_small_model_trains_answers_and_loads_again(model_type: str, tmp_path: Path):
    run = SmallRun.of(model_type)
    assert run.empty_parts <= {"visual_encoder", "connector"}
    for frozen in [part for part in PARTS if {*PARTS} - run.empty_parts - {part}]:
        losses, changed = run.train(frozen)
        assert all(map(math.isfinite, losses)), losses
        assert not changed[frozen], (frozen, sorted(changed[frozen])[:3])
        for part in set(PARTS) - {frozen} - run.empty_parts:
            assert changed[part], f"with {frozen} frozen, nothing of {part} trains"
    loss = run.evaluate()
    assert math.isfinite(loss)
    ours = VisionLanguageModel(run.model, run.processor)
    question = ("what is it?", [Image.new("RGB", (48, 32))])
    if model_type in UNASKED:
        with pytest.raises(ValueError, match=UNASKED[model_type]):
            ours.generate(*question, max_new_tokens=2)
    else:
        ours.generate(*question, max_new_tokens=2)
    run.save(tmp_path)
    again = get_auto_class(run.model.config).from_pretrained(tmp_path, dtype=torch.float32).eval()
    keep_apart(again)  # the batch has two samples, which the code of some types mixes
    inputs = {name: value for name, value in run.batch.items() if name != "labels"}
    with torch.no_grad():
        assert torch.equal(run.model(**inputs).logits, again(**inputs).logits)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is type(run.processor.native)
