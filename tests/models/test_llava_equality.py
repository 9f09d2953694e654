"""The composed model computes what transformers' LLaVA computes with the same weights."""

from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionModel, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from vlm.assembly.compose import build_model, compose
from vlm.config.model_schema import ConnectorConfig, LanguageModelConfig, ModelConfig, VisualEncoderConfig
from vlm.models import VLMForConditionalGeneration

NAMES = {
    "connector.layers.0": "model.multi_modal_projector.linear_1",
    "connector.layers.2": "model.multi_modal_projector.linear_2",
}


@pytest.fixture(scope="module")
def ours(world: Path) -> VLMForConditionalGeneration:
    """CLIP read at layer -2, a two-layer connector, Llama."""
    return composed(world, -2)


@pytest.fixture(scope="module")
def theirs(ours: VLMForConditionalGeneration, world: Path) -> LlavaForConditionalGeneration:
    """transformers' model with all encoder layers and the same weights."""
    return make_llava(ours, world, -2)


def composed(world: Path, layer: int | list[int]) -> VLMForConditionalGeneration:
    """A composed model that reads CLIP at a layer or at several."""
    model = ModelConfig(
        visual_encoder=VisualEncoderConfig(str(world / "visual_encoder"), feature_layer=layer),
        connector=ConnectorConfig("mlp", {}),
        language_model=LanguageModelConfig(str(world / "language_model")),
    )
    config, processor = compose(model, None, None)
    return build_model(model, config, processor, torch.float32, seed=0)


def make_llava(ours: VLMForConditionalGeneration, world: Path, layer: int | list[int]) -> LlavaForConditionalGeneration:
    """transformers' model with all encoder layers and the weights of ours."""
    config = LlavaConfig(
        vision_config=CLIPVisionModel.from_pretrained(world / "visual_encoder").config,
        text_config=ours.config.text_config,
        image_token_index=ours.config.image_token_id,
        vision_feature_layer=layer,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(CLIPVisionModel.from_pretrained(world / "visual_encoder").state_dict())
    model.model.language_model.load_state_dict(ours.language_model.model.state_dict())
    model.lm_head.load_state_dict(ours.language_model.lm_head.state_dict())
    for mine, other in NAMES.items():
        model.get_submodule(other).load_state_dict(ours.get_submodule(mine).state_dict())
    return model


def batch(model: VLMForConditionalGeneration) -> dict[str, torch.Tensor]:
    """Two rows: two images and text; one image, then padding."""
    image = [model.config.image_token_id] * 9
    rows = [[5, *image, 6, 7, *image, 8, 9, 10, 11], [4, *image, 20, 21, 22]]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    labels = torch.full_like(ids, -100)
    labels[0, -3:] = ids[0, -3:]
    labels[1, 11:13] = ids[1, 11:13]
    pixels = torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels}


def test_loss_and_gradients_equal_transformers_llava(ours, theirs):
    inputs = batch(ours)
    for model in (ours, theirs):
        model.zero_grad()
        model.eval()
    mine, other = ours(**inputs), theirs(**inputs)
    assert torch.allclose(mine.loss, other.loss, atol=1e-5)
    mine.loss.backward()
    other.loss.backward()
    pairs = [(ours.get_submodule(a), theirs.get_submodule(b)) for a, b in NAMES.items()]
    pairs.append((ours.language_model.model, theirs.model.language_model))
    pairs.append((ours.visual_encoder, theirs.model.vision_tower))
    compared = 0
    for left, right in pairs:
        expected = dict(right.named_parameters())
        for name, parameter in left.named_parameters():
            if parameter.grad is not None:
                assert torch.allclose(parameter.grad, expected[name].grad, atol=1e-5), name
                compared += 1
    assert compared > 30


@pytest.mark.parametrize("layers", [[-2, -3], [3, 1, 2]])
def test_logits_over_several_feature_layers_equal_transformers_llava(world: Path, layers: list[int]):
    """A list of layers: their features side by side, in the order of the list."""
    mine = composed(world, layers).eval()
    other = make_llava(mine, world, layers).eval()
    inputs = {name: value for name, value in batch(mine).items() if name != "labels"}
    with torch.no_grad():
        assert torch.allclose(mine(**inputs).logits, other(**inputs).logits, atol=1e-5)
    reversed_ = composed(world, layers[::-1]).eval()
    with torch.no_grad():
        assert not torch.allclose(reversed_(**inputs).logits, mine(**inputs).logits, atol=1e-5)


def test_loss_over_a_steps_items_equals_transformers_llava(ours, theirs):
    """`num_items_in_batch` is what Trainer counts over the whole accumulated batch."""
    inputs = batch(ours)
    mine, other = (model.eval()(**inputs, num_items_in_batch=torch.tensor(17)).loss for model in (ours, theirs))
    assert torch.allclose(mine, other, atol=1e-5)


def test_logits_are_computed_at_supervised_positions_alone(ours):
    inputs = batch(ours)
    assert len(ours(**inputs).logits) == int((inputs["labels"] != -100).sum())


def test_loss_over_a_given_number_of_items(ours):
    inputs = batch(ours)
    supervised = int((inputs["labels"] != -100).sum())
    mean, summed = ours(**inputs).loss, ours(**inputs, num_items_in_batch=supervised * 2).loss
    assert torch.allclose(summed * 2, mean)


def test_nothing_supervised_is_a_loss_of_zero_with_a_graph(ours):
    inputs = batch(ours)
    inputs["labels"][:] = -100
    loss = ours(**inputs).loss
    assert loss.item() == 0
    loss.backward()


def test_too_few_placeholders_name_the_rows(ours):
    inputs = batch(ours)
    inputs["input_ids"][1, 1] = 3
    with pytest.raises(ValueError, match=r"need 27 placeholders.*\{0: 18, 1: 8\}"):
        ours(**inputs)


def test_a_frozen_encoder_builds_no_graph_and_stays_in_evaluation_mode(ours):
    ours.visual_encoder.requires_grad_(False)
    ours.train()
    assert not ours.visual_encoder.training
    assert ours.language_model.training
    seen = []
    handle = ours.connector.register_forward_pre_hook(lambda _, args: seen.append(args[0].requires_grad))
    ours(**batch(ours)).loss.backward()
    handle.remove()
    ours.visual_encoder.requires_grad_(True)
    assert seen == [False]


def test_gradient_checkpointing_gives_the_same_gradients(ours):
    ours.visual_encoder.requires_grad_(False)
    ours.language_model.requires_grad_(False)
    ours.train()
    gradients = []
    for checkpointing in (False, True):
        ours.zero_grad()
        if checkpointing:
            ours.activation_checkpointing_enable()
        ours(**batch(ours)).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in ours.connector.parameters()])
    ours.activation_checkpointing_disable()
    ours.requires_grad_(True)
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.allclose(plain, recomputed, atol=1e-7)


def test_layers_past_the_selected_one_are_not_built(ours, world: Path):
    whole = LlamaForCausalLM.from_pretrained(world / "language_model").config.num_hidden_layers
    assert len(ours.language_model.model.layers) == whole
    assert ours.visual_encoder.config.num_hidden_layers == 2
    assert CLIPVisionModel.from_pretrained(world / "visual_encoder").config.num_hidden_layers == 3
