"""What a model saw before: images are encoded once, and it answers as if they were encoded each time."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from tests.inference.test_generate import make_random_model
from tests.tiny_parts import Parts, picture
from vlm.config.schema import InferenceConfig
from vlm.inference.conversation import Conversation
from vlm.inference.feature_cache import ImageFeatureCache
from vlm.inference.generate import VisionLanguageModel
from vlm.inference.prompts import user_turn

GREEDY = InferenceConfig(max_new_tokens=6)


@pytest.fixture(scope="module")
def plain(parts: Parts) -> VisionLanguageModel:
    return make_random_model(parts, "llama")


@pytest.fixture
def ours(plain: VisionLanguageModel) -> VisionLanguageModel:
    return VisionLanguageModel(plain.model, plain.processor, ImageFeatureCache())


@pytest.fixture
def encoded(plain: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each call of the encoder got."""
    calls: list[int] = []
    before: Callable[..., Any] = plain.model.encode_images

    def encode_images(pixel_values: torch.Tensor) -> torch.Tensor:
        calls.append(len(pixel_values))
        return before(pixel_values)

    monkeypatch.setattr(plain.model, "encode_images", encode_images)
    return calls


def generate_answers(model: VisionLanguageModel, shown: Sequence[Sequence[int]]) -> list[str]:
    """What is said of images of these numbers, each row's question a word longer than the last."""
    prompts = [[user_turn(f"which{' of' * row}?", len(seeds))] for row, seeds in enumerate(shown)]
    return model.answer(prompts, [[picture(seed) for seed in seeds] for seeds in shown], GREEDY)


def test_an_image_is_encoded_once_within_a_batch_and_across(
    plain: VisionLanguageModel, ours: VisionLanguageModel, encoded: list[int]
):
    shown = [[1], [2, 1], [], [1]]
    expected = generate_answers(plain, shown)
    assert len(set(expected)) > 2  # or this would prove little
    encoded.clear()
    assert generate_answers(ours, shown) == expected
    assert encoded == [2]
    assert generate_answers(ours, shown) == expected
    assert encoded == [2]
    generate_answers(ours, [[3], [1]])
    assert encoded == [2, 1]


def test_turns_of_a_conversation_encode_an_image_once(
    plain: VisionLanguageModel, ours: VisionLanguageModel, encoded: list[int]
):
    said = []
    for model in (plain, ours):
        encoded.clear()
        asked = Conversation(model, GREEDY)
        said.append(["".join(asked.ask("what?", [picture(1)])), "".join(asked.ask("and now?"))])
    assert said[0] == said[1]
    assert encoded == [1]


def test_text_alone_is_left_as_it_is(plain: VisionLanguageModel, ours: VisionLanguageModel, encoded: list[int]):
    assert generate_answers(ours, [[]]) == generate_answers(plain, [[]])
    assert encoded == []


def test_what_was_not_shown_for_longest_is_forgotten_first(plain: VisionLanguageModel, encoded: list[int]):
    one = plain.model.encode_images(torch.zeros(1, 3, 24, 24)).nbytes
    ours = VisionLanguageModel(plain.model, plain.processor, ImageFeatureCache(2 * one))
    encoded.clear()
    for seed in (1, 2, 1, 3):  # 2 goes
        generate_answers(ours, [[seed]])
    assert (encoded, len(ours.feature_cache or ())) == ([1, 1, 1], 2)
    generate_answers(ours, [[1], [3]])
    assert len(encoded) == 3
    generate_answers(ours, [[2]])
    assert len(encoded) == 4


def test_more_than_fits_is_answered_all_the_same(plain: VisionLanguageModel):
    ours = VisionLanguageModel(plain.model, plain.processor, ImageFeatureCache(0))
    shown = [[1], [2, 1]]
    assert generate_answers(ours, shown) == generate_answers(plain, shown)
    assert len(ours.feature_cache or ()) == 0


def test_a_loaded_model_remembers(plain: VisionLanguageModel, tmp_path: Any):
    plain.model.save_pretrained(tmp_path)
    plain.processor.save_pretrained(tmp_path)
    loaded = VisionLanguageModel.load(tmp_path, device="cpu")
    assert generate_answers(loaded, [[1], [1, 2]]) == generate_answers(plain, [[1], [1, 2]])
    assert loaded.feature_cache is not None
    assert len(loaded.feature_cache) == 2


def test_one_that_may_still_train_does_not(plain: VisionLanguageModel):
    assert plain.feature_cache is None


def test_what_changes_is_not_remembered(parts: Parts):
    """Other weights once it has been in training, and another precision."""
    ours = make_random_model(parts, "llama")
    ours.feature_cache = feature_cache = ImageFeatureCache()
    generate_answers(ours, [[1]])
    ours.model.train()
    generate_answers(ours, [[1]])
    assert len(feature_cache) == 0
    ours.model.eval()
    generate_answers(ours, [[1]])
    torch.nn.Module.to(ours.model, torch.float64)
    inputs = ours.inputs([[user_turn("what?", 1)]], [[picture(1)]])
    assert feature_cache.replace_pixels(ours.model, inputs)["image_features"].dtype == torch.float64


def test_several_threads_may_ask(plain: VisionLanguageModel):
    one = plain.model.encode_images(torch.zeros(1, 3, 24, 24)).nbytes
    feature_cache = ImageFeatureCache(3 * one)
    shown = [plain.inputs([[user_turn("what?", 1)]], [[picture(seed)]]) for seed in range(6)]
    expected = [plain.model.encode_images(one["pixel_values"]) for one in shown]

    def ask(turn: int) -> None:
        found = feature_cache.replace_pixels(plain.model, shown[turn % 6])
        torch.testing.assert_close(found["image_features"], expected[turn % 6])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(60)))
    assert len(feature_cache) == 3
    assert feature_cache._bytes == 3 * one
