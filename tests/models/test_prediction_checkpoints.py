"""Models with prediction heads, loaded where `vlm` cannot be imported."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoModelForSequenceClassification, AutoProcessor

from tests import waiting
from tests.families.tiny_families import save_family
from tests.models.test_checkpoints import OWN_CONNECTOR
from tests.tiny_parts import Parts, picture
from vlm.assembly.heads import register_head_class
from vlm.config.named import permit_names
from vlm.models import VLMForPrediction, VLMPredictionConfig
from vlm.models.connectors import CONNECTORS
from vlm.models.heads import HEADS

OWN_HEAD = '''
"""A head of the user's own: the product of two linear maps."""

from torch import nn


class Product(nn.Module):
    def __init__(self, width, num_outputs, *, factor: float = 1.0):
        super().__init__()
        self.left = nn.Linear(width, num_outputs)
        self.right = nn.Linear(width, num_outputs)
        self.factor = factor

    def forward(self, features):
        return self.factor * self.left(features) * self.right(features)
'''

ELSEWHERE = """
import json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("vlm", "my_head", "my_connector"):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Refuse())
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForSequenceClassification, AutoProcessor

found = {}
for folder in sys.argv[1:]:
    image = Image.open(folder + "/picture.png")
    expected = torch.load(folder + "/expected.pt")
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    asked = [{"type": "image", "image": image}, {"type": "text", "text": "is it a cat?"}]
    conversation = [{"role": "user", "content": asked}]
    inputs = processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )
    text = processor.apply_chat_template(conversation, add_generation_prompt=True)
    again = processor(images=[image], text=[text], return_tensors="pt")
    assert torch.equal(again["input_ids"], inputs["input_ids"])
    for auto in (AutoModel, AutoModelForSequenceClassification):
        model = auto.from_pretrained(folder, trust_remote_code=True)
        with torch.no_grad():
            outputs = model(**inputs).outputs
            same = torch.equal(model(**inputs).logits, next(iter(outputs.values())))
        difference = max((outputs[name] - one).abs().max().item() for name, one in expected.items())
        predictions = {name: one["predictions"] for name, one in model.predict(**again).items()}
        found[folder + " " + auto.__name__] = [type(model).__name__, difference, predictions, same]
    model.save_pretrained(folder + "/again")
    processor.save_pretrained(folder + "/again")
    loaded = AutoModel.from_pretrained(folder + "/again", trust_remote_code=True)
    with torch.no_grad():
        assert torch.allclose(loaded(**inputs).logits, model(**inputs).logits, atol=1e-6)
assert "vlm" not in sys.modules
print("FOUND " + json.dumps(found))
"""

YES = {"name": "yes", "task": "binary", "labels": ["no", "yes"], "loss": "bce", "threshold": 0.4, "temperature": 1.5}
KIND = {"name": "kind", "task": "multiclass", "labels": ["a", "b", "c"], "loss": "ce", "pooling": "attention",
        "type": "mlp", "layer": 1}  # fmt: skip
GRADE = {"name": "grade", "task": "ordinal", "labels": [1, 2, 3], "loss": "ordinal", "pooling": "image"}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Classes of the user's own in files on the path: the `type` of a head, and that of a connector."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "my_head.py").write_text(OWN_HEAD)
    (folder / "my_connector.py").write_text(OWN_CONNECTOR)
    sys.path.insert(0, str(folder))
    permit_names(["my_head:Product"])
    register_head_class("my_head:Product")
    yield "my_head:Product", "my_connector:MyConnector"
    sys.path.remove(str(folder))
    HEADS.pop("my_head:Product", None)
    CONNECTORS.pop("my_connector:MyConnector", None)
    for name in ("my_head", "my_connector"):
        sys.modules.pop(name, None)


def save(folder: Path, body: Any, processor: Any, *heads: dict[str, Any]) -> VLMForPrediction:
    """A checkpoint with its processor, an image, and what the heads say of it."""
    config = VLMPredictionConfig(body_config=body.config, heads=heads, media_token_ids=[processor.image_token_id])
    model = VLMForPrediction(config, body).eval()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    picture().save(folder / "picture.png")
    asked = [{"type": "image", "image": picture()}, {"type": "text", "text": "is it a cat?"}]
    text = processor.apply_chat_template([{"role": "user", "content": asked}], add_generation_prompt=True)
    inputs = processor(images=[picture()], text=[text], return_tensors="pt")
    with torch.no_grad():
        torch.save(dict(model(**inputs).outputs), folder / "expected.pt")
    (folder / "predictions.json").write_text(
        json.dumps({name: one["predictions"] for name, one in model.predict(**inputs).items()})
    )
    return model


def family(name: str, folder: Path) -> tuple[Any, Any]:
    """A tiny model of a family, with its own processor, as transformers opens them."""
    save_family(name, folder)
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def test_a_head_of_the_users_own_trains_and_comes_back(parts: Parts, own: tuple[str, str], tmp_path: Path):
    head = {**YES, "type": own[0], "options": {"factor": 2.0}}
    model = save(tmp_path, *parts.model(template="chatml"), head)
    assert (tmp_path / "user_head_0.py").read_text() == OWN_HEAD
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"]["Head.yes"] == "user_head_0.Product"
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    features = {"yes": torch.randn(8, 32)}
    assert torch.equal(loaded(features=features).logits, model(features=features).logits)
    optimizer = torch.optim.SGD(model.heads.parameters(), lr=0.1)
    labels = torch.tensor([0.0, 1.0] * 4)
    before = model(features=features, labels=labels).loss
    before.backward()
    optimizer.step()
    assert model(features=features, labels=labels).loss < before


def test_a_class_named_by_a_checkpoint_alone_is_not_imported(
    parts: Parts, own: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):  # fmt: skip
    """A checkpoint cannot make this process run code: the user names the class, or trusts the checkpoint."""
    save(tmp_path, *parts.model(template="chatml"), {**YES, "type": own[0]})
    monkeypatch.delitem(HEADS, own[0])
    with pytest.raises(ValueError, match=r"model\.head\.type=my_head:Product: allowed .* with trust_remote_code"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_checkpoints_load_where_this_package_is_not_installed(parts: Parts, own: tuple[str, str], tmp_path: Path):
    """With their own code: both auto classes and the processor, equal numbers, equal labels, saved once more."""
    head, connector = own
    save(tmp_path / "composed", *parts.model("clip", "tied_llama", layer=-2, template="chatml"), YES, KIND, GRADE)
    mine = {**KIND, "name": "mine", "type": head, "options": {"factor": 0.5}}
    save(tmp_path / "own", *parts.model("siglip", connector=connector, template="chatml"), YES, mine)
    for name in ("llava-onevision", "qwen2-vl"):
        save(tmp_path / name, *family(name, tmp_path / "bodies" / name), YES, {**mine, "name": "other"}, GRADE)
    folders = [str(tmp_path / name) for name in ("composed", "own", "llava-onevision", "qwen2-vl")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": ""}
    done = waiting.run([sys.executable, "-c", ELSEWHERE, *folders], env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("FOUND "))[6:])
    for folder in folders:
        for auto in ("AutoModel", "AutoModelForSequenceClassification"):
            made_of, difference, predictions, same = found[f"{folder} {auto}"]
            assert made_of == "VLMForPrediction"
            assert difference < 1e-5  # matrices that lie elsewhere in memory may round in another way
            assert predictions == json.loads(Path(folder, "predictions.json").read_text())
            assert same
        files = {path.name for path in Path(folder, "again").glob("*.py")}
        assert {"configuration_prediction.py", "modeling_prediction.py", "heads.py", "head_tasks.py"} <= files
        assert {"head_losses.py", "poolings.py", "modeling_vlm.py", "configuration_vlm.py"} <= files
        assert ("user_head_1.py" in files) == (folder != folders[0])
        assert ("user_connector.py" in files) == (folder == folders[1])
        assert ("processing_vlm.py" in files) == (folder in folders[:2])
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "composed" / "again")
    first = AutoModelForSequenceClassification.from_pretrained(tmp_path / "composed")
    for name, weight in first.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
