"""Proofs about images: they fail where placeholders are miscounted, or an image is not seen or not at its place."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.assembly.family_trial.subjects import check_fails, check_proved, make_subject
from vlm.assembly.family_trial.subject import Subject
from vlm.assembly.family_trial.table import PROOFS, make_proof
from vlm.assembly.family_trial.verdicts import State, Verdict
from vlm.assembly.small_models.make import make_small
from vlm.families.processing import FamilyProcessor
from vlm.families.table import get_family


@pytest.mark.parametrize("name", ["llava-next", "qwen2-vl", "internvl", "mllama"])
def test_placeholders_and_sight_of_each_form_are_proved(name: str):
    subject = make_subject(name)
    check_proved("placeholders", subject)
    check_proved("sight", subject)


@pytest.mark.parametrize("name", ["llava-next", "qwen2-vl", "idefics3"])
def test_a_token_too_few_is_found(name: str):
    subject = make_subject(name)
    real, token = subject.processor._compute_expansions, subject.processor.image_token
    subject.processor._cached_expansions = lambda sizes: tuple(text.replace(token, "", 1) for text in real(sizes))
    check_fails("placeholders", subject, "by the family's own processor")


def test_other_pixels_are_found(monkeypatch: pytest.MonkeyPatch):
    subject = make_subject()
    real = subject.processor.image_inputs
    monkeypatch.setattr(
        subject.processor, "image_inputs", lambda *args: {name: value + 1 for name, value in real(*args).items()}
    )
    check_fails("placeholders", subject, "pixel_values is not what the family's own processor makes")


def test_an_image_that_is_refused_here_alone_is_found(monkeypatch: pytest.MonkeyPatch):
    subject = make_subject()

    def refuse(*args: Any) -> Any:
        raise ValueError("too small")

    monkeypatch.setattr(subject.processor, "image_inputs", refuse)
    check_fails("placeholders", subject, "which the family's own processor takes: too small")


def test_a_model_that_does_not_notice_a_wrong_number_is_found():
    subject = make_subject()
    image_id = subject.config.image_token_id

    def mask_without_check(ids: torch.Tensor, inputs_embeds: torch.Tensor, **features: torch.Tensor) -> torch.Tensor:
        return (ids == image_id)[..., None].expand_as(inputs_embeds)

    subject.model.model.get_placeholder_mask = mask_without_check
    check_fails("placeholders", subject, "takes one placeholder too few")


def test_another_id_of_images_is_found():
    subject = make_subject()
    subject.config.image_token_id = 3
    check_fails("placeholders", subject, "places features of images at id 3, and images are counted by id")


def test_a_model_that_sees_no_image_is_found():
    subject = make_subject()
    subject.model.model.multi_modal_projector.register_forward_hook(lambda module, inputs, output: output * 0)
    check_fails("sight", subject, "another image changes the logits of the reply by 0")


@pytest.mark.parametrize("name", ["llava-interleave", "internvl"])
def test_images_in_the_wrong_order_are_found(name: str):
    subject = make_subject(name)
    subject.model.model.multi_modal_projector.register_forward_hook(lambda module, inputs, output: output.flip(0))
    check_fails("sight", subject, "reply does")


def test_a_model_that_returns_other_logits_than_those_asked_for_is_found():
    subject = make_subject()
    forward = subject.model.forward

    def leave_out_the_last(logits_to_keep: object, **inputs: object) -> Any:
        outputs = forward(**inputs)
        return replace(outputs, logits=outputs.logits[:, :-1])

    subject.model.forward = leave_out_the_last
    check_fails("sight", subject, "positions (logits_to_keep), by which training computes the loss")


def test_images_of_one_question_that_are_mixed_up_are_found():
    check_proved("sight", make_subject("paligemma"))
    subject = make_subject("paligemma")
    subject.model.model.multi_modal_projector.register_forward_hook(
        lambda module, inputs, output: output.mean(0, keepdim=True).expand_as(output)
    )
    check_fails("sight", subject, "swapping two images changes the logits")


def test_images_that_see_later_ones_are_found_unless_training_leaves_such_conversations_out(
    monkeypatch: pytest.MonkeyPatch,
):
    processor = FamilyProcessor(make_small("molmo2").processor, get_family("molmo2"))
    subject = Subject(make_small("molmo2").config, processor)
    check_proved("sight", subject)
    monkeypatch.setattr("vlm.data.sample.Sample.learns_between_media", False)
    check_fails("sight", subject, "a reply between images is trained on")
    processor.sees_media_together = False
    check_fails("sight", subject, "depends on the second of two images, which comes later")


def test_indices_that_are_not_counted_anew_are_found():
    processor = FamilyProcessor(make_small("molmo2").processor, get_family("molmo2"))
    subject = Subject(make_small("molmo2").config, processor)
    check_proved("batch", subject)
    subject.collate.indices = {}
    check_fails("batch", subject, "in a padded batch")


@pytest.mark.parametrize("name", ["llava-interleave", "qwen2-vl", "smolvlm"])
def test_videos_are_proved_and_so_are_frames_as_images(name: str):
    check_proved("videos", make_subject(name))


@pytest.mark.parametrize("name", ["qwen2-vl", "smolvlm"])
def test_a_token_of_a_video_too_few_is_found(name: str):
    subject = make_subject(name)
    videos, real = subject.processor.videos, subject.processor.videos.expansion
    token = subject.processor.tokenizer.convert_ids_to_tokens(subject.processor.video_token_id)
    videos.expansion = lambda clip: real(clip).replace(token, "", 1)
    check_fails("videos", subject, "by the family's own processor")
    check_proved("placeholders", subject)


def test_other_frames_are_found(monkeypatch: pytest.MonkeyPatch):
    subject = make_subject("qwen2-vl")
    real = subject.processor.image_inputs
    monkeypatch.setattr(
        subject.processor, "image_inputs", lambda *args: {name: value + 1 for name, value in real(*args).items()}
    )
    check_fails("videos", subject, "is not what the family's own processor makes")


def test_a_model_that_cannot_read_a_video_proves_nothing_of_it():
    subject = make_subject("qwen2-vl")

    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("split sizes")

    subject.model.model.get_video_features = fail
    verdict = make_proof(PROOFS["videos"], subject)
    assert verdict == Verdict(State.NOT_MADE, "the model's code fails on a video: RuntimeError: split sizes")
    check_proved("placeholders", subject)


def test_a_blank_video_that_changes_logits_is_found(monkeypatch: pytest.MonkeyPatch):
    subject = make_subject("qwen2-vl")
    real = subject.reply_logits
    numbers = iter(range(100))

    def shift_with_both(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        both = "pixel_values" in batch and "pixel_values_videos" in batch
        return real(batch) + (next(numbers) + 1) * both

    monkeypatch.setattr(subject, "reply_logits", shift_with_both)
    check_fails("videos", subject, "a blank video that completes a batch changes logits")


def test_a_model_that_reads_no_image_beside_a_video_proves_nothing_of_videos(monkeypatch: pytest.MonkeyPatch):
    subject = make_subject("qwen2-vl")
    real = subject.reply_logits

    def refuse_both(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if "pixel_values" in batch and "pixel_values_videos" in batch:
            raise ValueError("tokens do not match")
        return real(batch)

    monkeypatch.setattr(subject, "reply_logits", refuse_both)
    assert make_proof(PROOFS["videos"], subject).reason.startswith("the model's code fails on a batch of an image and")
