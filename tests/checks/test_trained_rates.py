"""A single learning rate is refused with the rates of the parts that the run trains."""

import pytest

from tests.command_line import refusal

RATE = "trainer.learning_rate"


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("pretrain-smol",), ["connector"]),
        (("finetune-smol",), ["connector", "language_model"]),
        (("pretrain-smol", "trainer.unfreeze.train_vision_model=true"), ["visual_encoder", "connector"]),
        (("head-binary",), ["head"]),
    ],
)
def test_the_rates_of_the_parts_that_train_are_named(words: tuple[str, ...], parts: list[str]):
    told = refusal("-cn", *words, "dataset.path=a.json", f"{RATE}=1e-3")
    rates = ", ".join(f"{RATE}.{part}_learning_rate=1e-3" for part in parts)
    assert told == f"vlm: {RATE}: it is a section, with a rate for each part; of {words[0]}'s parts that train: {rates}"
