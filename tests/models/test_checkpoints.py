"""Saved and loaded again: here, and where `vlm` cannot be imported."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from tests import waiting
from tests.tiny_parts import ENCODERS, LANGUAGE_MODELS, Parts, picture
from vlm.assembly.compose import register_connector_class
from vlm.config.named import permit_names
from vlm.models import VLMConfig, VLMForConditionalGeneration, VLMProcessor
from vlm.models.configuration_vlm import AUTO_MAP
from vlm.models.connectors import CONNECTORS

TEXT = "what is in <image> and <image>? two cats"

OWN_CONNECTOR = '''
"""A connector of the user's own: it pools `factor` features into one token."""

import torch
from torch import nn


class MyConnector(nn.Module):
    def __init__(self, vision_dim, text_dim, *, factor: int = 3):
        super().__init__()
        self.factor = factor
        self.scale = nn.Parameter(torch.ones(vision_dim))
        self.linear = nn.Linear(vision_dim * factor, text_dim)

    @classmethod
    def num_tokens(cls, num_features, *, factor):
        return num_features // factor

    def forward(self, features):
        images, count, width = features.shape
        return self.linear((features * self.scale).reshape(images, count // self.factor, width * self.factor))
'''

ELSEWHERE = """
import json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("vlm", "my_connector"):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Refuse())
import torch
from PIL import Image
from transformers import (
    AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor
)

found = {}
for folder in sys.argv[1:]:
    image = Image.open(folder + "/picture.png")
    text = open(folder + "/text.txt").read()
    expected = torch.load(folder + "/logits.pt")
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(images=[image, image.rotate(90)], text=text)
    for auto in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        model = auto.from_pretrained(folder, trust_remote_code=True).eval()
        with torch.no_grad():
            difference = (model(**inputs).logits - expected).abs().max().item()
        found[folder + " " + auto.__name__] = [type(model).__name__, difference]
    answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    found[folder + " generate"] = answer.shape[1] - inputs["input_ids"].shape[1]
    model.save_pretrained(folder + "/again")
    processor.save_pretrained(folder + "/again")
assert "vlm" not in sys.modules
print("FOUND " + json.dumps(found))
"""


def logits(model: VLMForConditionalGeneration, processor: VLMProcessor) -> torch.Tensor:
    """All logits of a text with two images."""
    one = picture()
    with torch.no_grad():
        return model.eval()(**processor(images=[one, one.rotate(90)], text=TEXT)).logits


def saved_names(folder: Path) -> set[str]:
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            names |= set(weights.keys())
    return names


@pytest.mark.parametrize("language_model", LANGUAGE_MODELS)
def test_tied_and_untied_models_come_back_as_they_were(parts: Parts, language_model: str, tmp_path: Path):
    """Equal logits; the vocabulary head is saved once, or not at all where it is the embeddings."""
    model, processor = parts.model("clip", language_model, layer=-2)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.01)  # as training would
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert isinstance(loaded, VLMForConditionalGeneration)
    assert torch.equal(logits(loaded, processor), logits(model, processor))
    tied = model.language_model.config.tie_word_embeddings
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    assert ("language_model.lm_head.weight" in saved_names(tmp_path)) == (not tied)


@pytest.mark.parametrize("language_model", ["llama", "tied_llama"])
def test_a_reloaded_model_still_resizes_rightly(parts: Parts, language_model: str, tmp_path: Path):
    parts.model("clip", language_model)[0].save_pretrained(tmp_path / "a")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "a")
    model.resize_token_embeddings(400)
    assert model.get_input_embeddings().weight.shape == model.get_output_embeddings().weight.shape == (400, 32)
    model.save_pretrained(tmp_path / "b")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "b")
    tied = model.language_model.config.tie_word_embeddings
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == tied
    assert torch.equal(again.get_output_embeddings().weight, model.get_output_embeddings().weight)
    assert again.config.text_config.vocab_size == 400


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_encoder_comes_back_as_it_was(parts: Parts, encoder: str, tmp_path: Path):
    """Its buffers (batch statistics) and its image processor too."""
    model, processor = parts.model(encoder, layer=-2)
    for name, value in model.visual_encoder.named_buffers():
        if "running" in name:
            value.add_(0.1)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, again = VLMForConditionalGeneration.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, again), logits(model, processor))


def test_a_configuration_comes_back_as_it_was(parts: Parts, tmp_path: Path):
    config = parts.model("dinov2", connector="linear", strategy="full", layer=-2)[0].config
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, VLMConfig)
    left, right = config.to_dict(), loaded.to_dict()
    for values in (left, right):
        values.pop("transformers_version", None)
        values.pop("_name_or_path", None)
    assert left == right
    assert loaded.num_features == config.num_features == 5


def test_every_auto_class_knows_the_model_type(parts: Parts, tmp_path: Path):
    model, processor = parts.model()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for auto in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        assert isinstance(auto.from_pretrained(tmp_path), VLMForConditionalGeneration)
        assert auto.__name__ in AUTO_MAP
    assert isinstance(AutoProcessor.from_pretrained(tmp_path), VLMProcessor)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_an_empty_model_can_be_made_of_its_configuration(parts: Parts):
    """`from_config` needs no folder; every weight is initialised."""
    config = parts.model("clip", "tied_llama")[0].config
    model = AutoModelForImageTextToText.from_config(config)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.fixture(scope="module")
def own_connector(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A class of the user's own in a file on the path; its `model.connector.type`."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "my_connector.py").write_text(OWN_CONNECTOR)
    sys.path.insert(0, str(folder))
    yield "my_connector:MyConnector"
    sys.path.remove(str(folder))
    sys.modules.pop("my_connector", None)
    CONNECTORS.pop("my_connector:MyConnector", None)


def test_a_connector_of_the_users_own_trains_and_comes_back(parts: Parts, own_connector: str, tmp_path: Path):
    """It says how many tokens an image takes, trains, and its file travels with the checkpoint."""
    model, processor = parts.model(connector=own_connector, options={"factor": 3})
    assert processor.tokens_per_image == 3
    one = picture()
    inputs = processor(images=[one, one.rotate(90)], text=TEXT)
    optimizer = torch.optim.SGD(model.connector.parameters(), lr=0.1)
    before = model(**inputs, labels=inputs["input_ids"]).loss
    before.backward()
    optimizer.step()
    assert model(**inputs, labels=inputs["input_ids"]).loss < before
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "user_connector.py").read_text() == OWN_CONNECTOR
    permit_names([own_connector])
    register_connector_class(own_connector)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, AutoProcessor.from_pretrained(tmp_path)), logits(model, processor))


def test_a_class_named_by_a_checkpoint_alone_is_not_imported(parts: Parts, own_connector: str, tmp_path: Path):
    """A checkpoint cannot make this process run code: the user names the class, or trusts the checkpoint."""
    parts.model(connector=own_connector)[0].save_pretrained(tmp_path)
    del CONNECTORS[own_connector]
    with pytest.raises(ValueError, match=r"model.connector.type=my_connector:MyConnector: allowed .* with trust_"):
        AutoModelForImageTextToText.from_pretrained(tmp_path)


def test_checkpoints_load_where_this_package_is_not_installed(parts: Parts, own_connector: str, tmp_path: Path):
    """With their own code: every auto class, equal logits, generation, saved once more; offline."""
    made = {
        "tied": parts.model("timm_convnet", "tied_llama", layer=-1),
        "own": parts.model("siglip", "llama", connector=own_connector, start="<im_start>", image_mode="pad"),
        "vicuna": parts.model(
            "clip", "vicuna", template="v1", layer=-2, connector="qformer",
            options={"num_queries": 2, "num_layers": 2, "hidden_dim": 8, "num_heads": 2},
        ),
        "grid": parts.model(
            "clip", "llama", connector="c_abstractor",
            options={"num_queries": 4, "num_blocks": 1, "hidden_dim": 8, "position_side": 3},
        ),
        "native": parts.model("qwen2_5_vl", "llama", connector="pixel_shuffle"),
        "several encoders": parts.model(
            "dinov2", "llama", layer=[-2, -3], image_size=24, extra_encoders={"siglip": {"feature_layer": -2}}
        ),
    }  # fmt: skip
    for name, (model, processor) in made.items():
        folder = tmp_path / name
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        picture().save(folder / "picture.png")
        (folder / "text.txt").write_text(TEXT)
        torch.save(logits(model, processor), folder / "logits.pt")
    folders = [str(tmp_path / name) for name in made]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": ""}
    done = waiting.run([sys.executable, "-c", ELSEWHERE, *folders], env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("FOUND "))[6:])
    for folder in folders:
        for auto in AUTO_MAP.keys() - {"AutoConfig", "AutoProcessor"}:
            made_of, difference = found[f"{folder} {auto}"]
            assert made_of == "VLMForConditionalGeneration"
            assert difference < 1e-6  # matrices that lie elsewhere in memory may round in another way
        assert 1 <= found[f"{folder} generate"] <= 3
    again = VLMForConditionalGeneration.from_pretrained(tmp_path / "tied" / "again")
    assert torch.equal(logits(again, made["tied"][1]), torch.load(tmp_path / "tied" / "logits.pt"))
    assert (tmp_path / "own" / "again" / "user_connector.py").read_text() == OWN_CONNECTOR
    for folder in folders:
        names = {path.name for path in Path(folder, "again").glob("*.py")}
        assert {"configuration_vlm.py", "connectors.py", "modeling_vlm.py", "processing_vlm.py"} <= names
        assert {"connector_parts.py", "grid_connectors.py", "query_connectors.py"} <= names
        assert ("user_connector.py" in names) == (folder == folders[1])
