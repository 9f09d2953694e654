"""What was pushed, loaded by its name where `vlm` cannot be imported and nothing but the Hub is reachable."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from tests import waiting
from tests.hub.conftest import TOKEN
from tests.hub.server import LocalHub
from tests.models.test_checkpoints import OWN_CONNECTOR
from tests.models.test_prediction_checkpoints import KIND, YES
from tests.tiny_parts import Parts, picture
from vlm.cli.main import main
from vlm.inference.generate import VisionLanguageModel
from vlm.inference.prompts import user_turn
from vlm.models import VLMForPrediction, VLMPredictionConfig
from vlm.models.connectors import CONNECTORS

ELSEWHERE = '''
import contextlib, io, json, re, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("vlm", "my_connector"):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Refuse())
import torch
import transformers
from huggingface_hub import hf_hub_download
from PIL import Image
from transformers import AutoConfig, AutoProcessor, pipeline

CHAT = json.load(open("chat.json"))


def inputs_of(name):
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
    return processor, processor.apply_chat_template(
        CHAT, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )


def of_the_card(name):
    """What the examples in the card print, in order."""
    text = open(hf_hub_download(name, "README.md")).read()
    printed = []
    for code in re.findall(r"```python\\n(.*?)```", text, re.DOTALL):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(code.replace("max_new_tokens=128", "max_new_tokens=4"), {})
        printed.append(out.getvalue())
    return printed


def composed(name):
    found = {"config": AutoConfig.from_pretrained(name, trust_remote_code=True).model_type}
    processor, inputs = inputs_of(name)
    found["ids"] = inputs["input_ids"].tolist()
    found["default ids"] = processor.apply_chat_template(
        CHAT, tokenize=True, return_dict=True, add_generation_prompt=True
    )["input_ids"].tolist()
    expected = torch.load(f"{name.replace('/', '-')}.pt")
    for auto in ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
        model = getattr(transformers, auto).from_pretrained(name, trust_remote_code=True).eval()
        with torch.no_grad():
            found[auto] = (model(**inputs).logits - expected).abs().max().item()
    found["greedy"] = model.generate(**inputs, max_new_tokens=6, do_sample=False).tolist()
    pipe = pipeline("image-text-to-text", model=name, trust_remote_code=True)
    asked = dict(max_new_tokens=6, do_sample=False, return_full_text=False)
    found["pipeline"] = pipe(text=CHAT, **asked)[0]["generated_text"]
    found["pipeline of two"] = [one[0]["generated_text"] for one in pipe(text=[CHAT, CHAT], batch_size=2, **asked)]
    for dtype, place in ((torch.bfloat16, "auto"), (torch.float16, "cpu")):
        light = transformers.AutoModelForImageTextToText.from_pretrained(
            name, trust_remote_code=True, dtype=dtype, device_map=place
        ).eval()
        with torch.no_grad():
            logits = light(**inputs.to(light.device, dtype)).logits.float().cpu()
        found[f"{dtype}"] = [str({p.dtype for p in light.parameters()}), (logits - expected).abs().max().item()]
    model.save_pretrained("again")
    processor.save_pretrained("again")
    model = transformers.AutoModelForImageTextToText.from_pretrained("again", trust_remote_code=True).eval()
    with torch.no_grad():
        found["again"] = (model(**inputs_of("again")[1]).logits - expected).abs().max().item()
    found["scale"] = expected.abs().max().item()
    found["card"] = of_the_card(name)
    return found


def heads(name):
    _, inputs = inputs_of(name)
    expected = torch.load(f"{name.replace('/', '-')}.pt")
    found = {}
    for auto in ("AutoModel", "AutoModelForSequenceClassification"):
        model = getattr(transformers, auto).from_pretrained(name, trust_remote_code=True).eval()
        with torch.no_grad():
            outputs = model(**inputs).outputs
        found[auto] = max((outputs[head] - one).abs().max().item() for head, one in expected.items())
    found["predictions"] = {head: one["predictions"] for head, one in model.predict(**inputs).items()}
    found["card"] = of_the_card(name)
    return found


names = sys.argv[1:]
found = {name: (heads if "heads" in name else composed)(name) for name in names}
assert "vlm" not in sys.modules
print("FOUND " + json.dumps(found))
'''

QUESTION = "what is in this picture?"


@contextmanager
def talking_to(hub: LocalHub) -> Iterator[None]:
    """This process's client asks that Hub."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "ENDPOINT", hub.address)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setenv("HF_TOKEN", TOKEN)
        yield


def chat(folder: Path) -> list[dict[str, Any]]:
    """A question about the picture that lies in a folder."""
    image = {"type": "image", "path": str(folder / "image.png")}
    return [{"role": "user", "content": [image, {"type": "text", "text": QUESTION}]}]


def publish(hub: LocalHub, folder: Path, name: str, model: Any, processor: Any) -> Any:
    """Push a model; returns what it reads of the question, as `vlm generate` prepares it."""
    final = folder / name.replace("/", "-")
    model.eval().save_pretrained(final)
    processor.save_pretrained(final)
    with talking_to(hub):
        main(["push-to-hub", str(final), "--repo", name, "--yes"])
    ready = VisionLanguageModel(model, processor)
    return ready.inputs([[user_turn(QUESTION, 1)]], [[picture()]])


@pytest.fixture(scope="module")
def loaded(hub: LocalHub, parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the other process found, under `found`, and what is right, under `expected`; each by the repository."""
    folder = tmp_path_factory.mktemp("pushed")
    picture().save(folder / "image.png")
    (folder / "my_connector.py").write_text(OWN_CONNECTOR)
    sys.path.insert(0, str(folder))
    try:
        own = parts.model("siglip", "llama", template="chatml", connector="my_connector:MyConnector")
    finally:
        sys.path.remove(str(folder))
    made = {"ann/tied": parts.model("clip", "tied_llama", layer=-2, template="chatml"), "ann/own": own}
    expected: dict[str, Any] = {}
    for name, (model, processor) in made.items():
        inputs = publish(hub, folder, name, model, processor)
        with torch.no_grad():
            torch.save(model(**inputs).logits, folder / f"{name.replace('/', '-')}.pt")
        greedy = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        said = processor.tokenizer.decode(greedy[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        expected[name] = {"ids": inputs["input_ids"].tolist(), "greedy": greedy.tolist(), "said": said}
    body, processor = made["ann/tied"]
    config = VLMPredictionConfig(body_config=body.config, heads=[YES, KIND], media_token_ids=[processor.image_token_id])
    model = VLMForPrediction(config, body).eval()
    inputs = publish(hub, folder, "ann/heads", model, processor)
    with torch.no_grad():
        torch.save(dict(model(**inputs).outputs), folder / "ann-heads.pt")
    predictions = {head: one["predictions"] for head, one in model.predict(**inputs).items()}
    expected["ann/heads"] = {"predictions": predictions}
    (folder / "chat.json").write_text(json.dumps(chat(folder)))
    hub.asked.clear()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | {
        "HF_ENDPOINT": hub.address, "HF_HOME": str(folder / "home"), "HF_TOKEN": TOKEN, "PYTHONPATH": "",
        "HF_HUB_DISABLE_XET": "1", "no_proxy": "127.0.0.1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    done = waiting.run([sys.executable, "-c", ELSEWHERE, *expected], env=environment, cwd=folder)
    CONNECTORS.pop("my_connector:MyConnector", None)
    sys.modules.pop("my_connector", None)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("FOUND "))[6:])
    return {"found": found, "expected": expected, "folder": folder}


@pytest.mark.parametrize("name", ["ann/tied", "ann/own"])
def test_every_auto_class_gives_the_same_model(loaded: dict[str, Any], name: str):
    """With a class of the user's own too."""
    found, expected = loaded["found"][name], loaded["expected"][name]
    assert found["config"] == "vlm"
    for auto in ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
        assert found[auto] < 1e-5  # matrices that lie elsewhere in memory may round in another way
    assert found["greedy"] == expected["greedy"]


@pytest.mark.parametrize("name", ["ann/tied", "ann/own"])
def test_conversations_become_the_same_ids(loaded: dict[str, Any], name: str):
    assert loaded["found"][name]["ids"] == loaded["found"][name]["default ids"] == loaded["expected"][name]["ids"]


@pytest.mark.parametrize("name", ["ann/tied", "ann/own"])
def test_pipelines_answer_alike(loaded: dict[str, Any], name: str):
    said = loaded["expected"][name]["said"]
    assert loaded["found"][name]["pipeline"] == said
    assert loaded["found"][name]["pipeline of two"] == [said, said]


@pytest.mark.parametrize("name", ["ann/tied", "ann/own"])
@pytest.mark.parametrize("dtype", ["torch.bfloat16", "torch.float16"])
def test_other_precisions_and_places(loaded: dict[str, Any], name: str, dtype: str):
    """`device_map` is `auto` with the one, `cpu` with the other."""
    found = loaded["found"][name]
    precision, difference = found[dtype]
    assert precision == f"{{{dtype}}}"
    assert difference < 0.05 * found["scale"]


@pytest.mark.parametrize("name", ["ann/tied", "ann/own"])
def test_saved_once_more_it_is_the_same(loaded: dict[str, Any], name: str):
    """The code travels on; the last one saved lies there still."""
    assert loaded["found"][name]["again"] < 1e-5
    assert (loaded["folder"] / "again" / "modeling_vlm.py").is_file()
    assert (loaded["folder"] / "again" / "user_connector.py").read_text() == OWN_CONNECTOR


@pytest.mark.parametrize("name", ["ann/tied", "ann/own"])
def test_the_cards_examples_work(loaded: dict[str, Any], name: str):
    """They ask another question for longer: both print the same answer."""
    first, second = loaded["found"][name]["card"]
    assert first == second != ""


def test_heads_predict_the_same(loaded: dict[str, Any]):
    found = loaded["found"]["ann/heads"]
    assert max(found["AutoModel"], found["AutoModelForSequenceClassification"]) < 1e-5
    assert found["predictions"] == loaded["expected"]["ann/heads"]["predictions"]
    (said,) = found["card"]
    assert "'yes': {'scores': tensor(" in said
    assert "'kind': {'scores': tensor(" in said


def test_nothing_but_the_repositories_was_asked(hub: LocalHub, loaded: dict[str, Any]):
    names = [line.split("/resolve/")[0].split(" /")[1] for line in hub.asked if "/resolve/" in line]
    assert set(names) == set(loaded["found"])
