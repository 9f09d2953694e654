"""Answers: batched as alone, streamed as whole, and errors for what cannot be asked."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import DynamicCache, StaticCache

from tests.data.vision.test_video import write_video
from tests.tiny_parts import CHAT_TEMPLATES, Parts, byte_tokenizer, picture
from vlm.config.schema import InferenceConfig
from vlm.data.encoding.labels import encode_prompt
from vlm.data.sample import ImageRef, Turn, VideoRef
from vlm.data.vision.frames import sample_frame_refs
from vlm.data.vision.video import read_frames
from vlm.inference.generate import VisionLanguageModel
from vlm.inference.prompts import load_images, user_turn
from vlm.models import VLMProcessor
from vlm.models.connectors import CONNECTORS

GREEDY = InferenceConfig(max_new_tokens=12)

ASKED: list[tuple[str, list[Image.Image]]] = [
    ("what?", [picture(0)]),
    ("a much longer question, about this: <image> and about that: <image>, which is it?", [picture(1), picture(2)]),
    ("no picture here", []),
    ("<image>\n", [picture(3)]),
]
"""Prompts of different lengths and numbers of images; one of text only."""


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma3"])
def ours(request, parts: Parts) -> VisionLanguageModel:
    """Three language models; the weights are chance, made livelier so that the answers differ."""
    return make_random_model(parts, request.param)


def make_random_model(parts: Parts, language_model: str, **recipe: Any) -> VisionLanguageModel:
    model, processor = parts.model("clip", language_model, **recipe)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and not name.startswith("visual"):
                parameter.mul_(8)
    return VisionLanguageModel(model.eval(), processor)


def generate_ids_alone(ours: VisionLanguageModel, text: str, images: Sequence[Image.Image], steps: int) -> list[int]:
    """Greedy decoding by hand: whole passes without cache, padding or `generate`."""
    processor, model = ours.processor, ours.model
    ids = encode_prompt(processor, [user_turn(text, len(images))])
    pixels = processor.pixel_values(images) if images else None
    ends = ours.generation_options(GREEDY)["eos_token_id"]
    found: list[int] = []
    with torch.no_grad():
        for _ in range(steps):
            logits = model(input_ids=torch.tensor([ids + found]), pixel_values=pixels).logits[0, -1]
            found.append(int(logits.argmax()))
            if found[-1] in ends:
                break
    return found


def batch_inputs(ours: VisionLanguageModel) -> dict[str, torch.Tensor]:
    turns = [[user_turn(text, len(images))] for text, images in ASKED]
    return ours.inputs(turns, [images for _, images in ASKED])


# Batches


def test_a_batch_answers_token_by_token_as_each_alone(ours: VisionLanguageModel):
    inputs = batch_inputs(ours)
    width = inputs["input_ids"].shape[1]
    output = ours.model.generate(**inputs, **ours.generation_options(GREEDY))
    assert torch.equal(output[:, :width], inputs["input_ids"])
    answers = []
    for row, (text, images) in enumerate(ASKED):
        expected = generate_ids_alone(ours, text, images, GREEDY.max_new_tokens)
        assert output[row, width : width + len(expected)].tolist() == expected
        rest = output[row, width + len(expected) :]
        assert set(rest.tolist()) <= {ours.processor.tokenizer.pad_token_id}
        answers.append(expected)
    assert len({tuple(answer) for answer in answers}) > 1  # or the test would prove little


def test_prompts_are_padded_on_the_left(ours: VisionLanguageModel):
    inputs = batch_inputs(ours)
    for row, (text, images) in enumerate(ASKED):
        mask = inputs["attention_mask"][row].bool()
        assert inputs["input_ids"][row][mask].tolist() == encode_prompt(ours.processor, [user_turn(text, len(images))])
        assert mask.tolist() == sorted(mask.tolist())
    assert inputs["pixel_values"].shape[0] == 4


def test_generate_answers_a_list_as_it_answers_each(ours: VisionLanguageModel):
    answers = ours.generate([text for text, _ in ASKED], [images for _, images in ASKED], max_new_tokens=8)
    assert answers == [ours.generate(text, images, max_new_tokens=8) for text, images in ASKED]


def test_texts_alone(ours: VisionLanguageModel):
    answers = ours.generate(["one", "two words"], max_new_tokens=4)
    assert answers == [ours.generate("one", max_new_tokens=4), ours.generate("two words", max_new_tokens=4)]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("beams", [1, 2])
def test_answers_do_not_depend_on_the_cache(ours: VisionLanguageModel, beams: int, cache: str):
    inputs = batch_inputs(ours)
    plain, other = (InferenceConfig(num_beams=beams, max_new_tokens=8, cache_implementation=c) for c in (None, cache))
    assert ours.answers(inputs, other) == ours.answers(inputs, plain)
    output = ours.model.generate(**inputs, **ours.generation_options(other), return_dict_in_generate=True)
    assert isinstance(output.past_key_values, {"dynamic": DynamicCache, "static": StaticCache}[cache])
    text, images = ASKED[0]
    said = ours.generate(text, images, max_new_tokens=3, cache_implementation=cache)
    assert said == ours.generate(text, images, max_new_tokens=3)


def test_a_cache_that_leaves_a_gpu_needs_one(ours: VisionLanguageModel):
    with pytest.raises(ValueError, match="cache_implementation=offloaded: it moves keys and values off the GPU"):
        ours.answers(batch_inputs(ours), InferenceConfig(cache_implementation="offloaded"))


@pytest.mark.parametrize("beams", [2, 3])
def test_beams_in_a_batch_are_those_alone(ours: VisionLanguageModel, beams: int):
    """Each beam carries its own row's images."""
    together = ours.generate([t for t, _ in ASKED], [i for _, i in ASKED], num_beams=beams, max_new_tokens=6)
    assert together == [ours.generate(text, images, num_beams=beams, max_new_tokens=6) for text, images in ASKED]


def test_the_image_is_seen(ours: VisionLanguageModel):
    """Another image gives other logits behind the same words."""
    prompt = [user_turn("what?", 1)]
    first, second = (ours.model(**ours.inputs([prompt], [[picture(n)]])).logits[0, -1] for n in (0, 1))
    assert not torch.allclose(first, second, atol=1e-4)


def test_images_are_encoded_once(ours: VisionLanguageModel):
    calls: list[int] = []
    handle = ours.model.connector.register_forward_hook(lambda *_: calls.append(1))
    ours.generate("what?", [picture(0)], max_new_tokens=5, eos_token_id=-1)
    handle.remove()
    assert len(calls) == 1


# Settings


def test_sampling_follows_its_seed(ours: VisionLanguageModel):
    def draw(seed: int, **settings: Any) -> str:
        torch.manual_seed(seed)
        return ours.generate("what?", [picture(0)], max_new_tokens=12, **settings)

    assert draw(0, temperature=5.0) == draw(0, temperature=5.0)
    assert len({draw(seed, temperature=5.0) for seed in range(4)}) > 1
    assert draw(0, temperature=5.0, top_p=1e-9) == draw(1) == draw(2)


def test_greedy_leaves_sampling_settings_out(ours: VisionLanguageModel):
    """transformers warns of a temperature that it does not use."""
    options = ours.generation_options(GREEDY)
    assert options["do_sample"] is False
    assert not {"temperature", "top_p"} & options.keys()
    sampled = ours.generation_options(InferenceConfig(temperature=0.5, top_p=0.9, num_beams=1, max_new_tokens=3))
    assert (sampled["do_sample"], sampled["temperature"], sampled["top_p"]) == (True, 0.5, 0.9)
    assert sampled["max_new_tokens"] == 3


def test_further_options_reach_transformers(ours: VisionLanguageModel):
    """They may be those that are set already."""
    answers = set()
    for seed in range(4):
        torch.manual_seed(seed)
        answers.add(ours.generate("what?", [picture(0)], max_new_tokens=8, do_sample=True, temperature=5.0))
    assert len(answers) > 1


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_generation_ends_where_the_template_ends_a_reply(parts: Parts, name: str):
    """At its special token and at EOS; at a line break where the template ends replies with one."""
    template = CHAT_TEMPLATES[name]
    model, processor = parts.model()
    tokenizer = byte_tokenizer(template.text, bos=template.bos, eos="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    other = VLMProcessor(processor.image_processor, tokenizer, chat_template=template.text, tokens_per_image=9)
    ours = VisionLanguageModel(model, other)
    assert ours.reply_ending() == template.end
    options = ours.generation_options(GREEDY)
    if template.end == "\n":
        assert options["stop_strings"] == ["\n"]
    else:
        ends = {tokenizer.convert_tokens_to_ids(template.end), tokenizer.eos_token_id}
        assert set(options["eos_token_id"]) == ends


def test_an_answer_stops_at_its_end(parts: Parts):
    """What the model is made to say is cut behind the end token; special tokens are not shown."""
    ours = make_random_model(parts, "llama")
    tokenizer = ours.processor.tokenizer
    said = tokenizer.convert_tokens_to_ids(["c", "a", "t", "<|im_end|>", "x"])
    answers = force_reply(ours, said)
    assert answers == "cat"


def test_a_caption_stops_at_its_line_break(parts: Parts):
    ours = make_random_model(parts, "llama", template="plain")
    said = ours.processor.tokenizer.convert_tokens_to_ids(["c", "a", "t", "Ċ", "x"])
    assert force_reply(ours, said) == "cat"


def force_reply(ours: VisionLanguageModel, said: list[int]) -> str:
    """The answer of a model that can only say these ids, one after the other."""
    start = len(encode_prompt(ours.processor, [user_turn("what?", 1)]))
    return ours.generate(
        "what?",
        [picture(0)],
        max_new_tokens=len(said),
        prefix_allowed_tokens_fn=lambda _, ids: [said[len(ids) - start]],
    )


# Streaming


@pytest.mark.parametrize(
    "settings", [GREEDY, InferenceConfig(temperature=3.0, max_new_tokens=12)], ids=["greedy", "sampled"]
)
def test_a_stream_adds_up_to_the_answer(ours: VisionLanguageModel, settings: InferenceConfig):
    for text, images in ASKED:
        turns = [user_turn(text, len(images))]
        torch.manual_seed(0)
        expected = ours.answer([turns], [images], settings)[0]
        torch.manual_seed(0)
        pieces = list(ours.stream(turns, images, settings))
        assert "".join(pieces).strip() == expected


def test_an_error_while_streaming_reaches_the_caller(ours: VisionLanguageModel):
    turns = [user_turn("what?", 1)]
    with pytest.raises(ValueError, match="beam"):
        list(ours.stream(turns, [picture(0)], InferenceConfig(num_beams=2)))


# Conversations


def test_a_conversation_goes_on(ours: VisionLanguageModel):
    """Earlier turns and their images stand before the question."""
    talk = [user_turn("what?", 1), Turn("assistant", ("a cat",)), user_turn("and <image>?", 1)]
    inputs = ours.inputs([talk], [[picture(0), picture(1)]])
    text = ours.processor.tokenizer.decode(inputs["input_ids"][0])
    assert text.index("a cat") < text.index("and <image>?")
    assert inputs["pixel_values"].shape[0] == 2
    assert isinstance(ours.answer([talk], [[picture(0), picture(1)]], GREEDY)[0], str)


def test_images_stand_where_the_prompt_says():
    one = ImageRef(Path())
    assert user_turn("what?", 2) == Turn("user", (one, one, "\nwhat?"))
    assert user_turn("a <image> b <image>", 2) == Turn("user", ("a ", one, " b ", one))
    assert user_turn("<image>", 1) == Turn("user", (one,))
    assert user_turn("what?", 0) == Turn("user", ("what?",))


def test_a_mark_within_a_sentence_is_a_word_without_images_and_beside_one(ours: VisionLanguageModel):
    """The image then comes first, and the words are read as they are written."""
    asked, one = "What does the HTML tag <image> do?", ImageRef(Path())
    assert user_turn(asked, 0) == Turn("user", (asked,))
    assert user_turn(asked, 1) == Turn("user", (one, f"\n{asked}"))
    assert user_turn("which <image>?", 1, every_mark=True) == Turn("user", ("which ", one, "?"))
    assert user_turn("what?", 1, [("frame",)]) == Turn("user", ("frame", ImageRef(Path()), "\nwhat?"))
    assert user_turn("Which tag is <video>?", 0, [("frame",)]) == Turn("user", ("frame\nWhich tag is <video>?",))
    for images in ([], [picture()]):
        turn, media = ours.open_question(asked, images)
        ids = ours.inputs([[turn]], [media])["input_ids"][0]
        assert int((ids == ours.processor.image_token_id).sum()) == 9 * len(images)
        assert asked in ours.processor.tokenizer.decode(ids)
        assert isinstance(ours.generate(asked, images, max_new_tokens=2), str)


# Errors


@pytest.mark.parametrize(
    ("prompt", "images", "slots"), [("<image> <image>", 1, 2), ("<image>", 2, 1), ("<image>", 0, 1)]
)
def test_a_prompt_with_more_or_fewer_slots_than_images_is_an_error(
    ours: VisionLanguageModel, prompt: str, images: int, slots: int
):
    with pytest.raises(ValueError, match=f"the prompt has {slots} <image>, but {images} images were given"):
        ours.generate(prompt, [picture()] * images)


@pytest.mark.parametrize("given", [[], [[picture()]]])
def test_several_prompts_need_as_many_lists_of_images(ours: VisionLanguageModel, given: list[Any]):
    if not given:
        assert len(ours.generate(["a", "b", "c"], given, max_new_tokens=1)) == 3
        return
    with pytest.raises(ValueError, match="3 prompts need as many lists of images, got 1"):
        ours.generate(["a", "b", "c"], given)


def test_an_image_that_does_not_open_is_an_error(ours: VisionLanguageModel, tmp_path: Path):
    (tmp_path / "a.png").write_text("no image")
    for name in ("a.png", "missing.png"):
        with pytest.raises(ValueError, match=rf"{name} does not open"):
            ours.generate("what?", [tmp_path / name])


def test_images_are_given_as_paths_or_opened(tmp_path: Path):
    picture().save(tmp_path / "a.png")
    first, second, third = load_images([picture(), tmp_path / "a.png", str(tmp_path / "a.png")])
    assert first.tobytes() == second.tobytes() == third.tobytes()


# Loading


def test_a_saved_model_answers_as_before(ours: VisionLanguageModel, tmp_path: Path):
    ours.model.save_pretrained(tmp_path)
    ours.processor.save_pretrained(tmp_path)
    loaded = VisionLanguageModel.load(tmp_path, device="cpu")
    assert not loaded.model.training
    for text, images in ASKED:
        assert loaded.generate(text, images, max_new_tokens=6) == ours.generate(text, images, max_new_tokens=6)
    assert VisionLanguageModel.load(str(tmp_path), device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16


def test_a_run_directory_is_no_checkpoint(tmp_path: Path):
    with pytest.raises(ValueError, match=r"has no config.json; the complete model of a run is in its folder `final`"):
        VisionLanguageModel.load(tmp_path)


@pytest.mark.parametrize(("name", "said"), [("/no/such/folder", "no such folder"), ("final", "no such folder"),
                                            ("./a/b", "no such folder")])  # fmt: skip
def test_a_folder_that_is_not_there_is_no_name_on_the_hub(name: str, said: str):
    with pytest.raises(ValueError, match=said):
        VisionLanguageModel.load(name)


def test_another_kind_of_checkpoint_is_refused(parts: Parts):
    with pytest.raises(ValueError, match="model_type=llama: it has no visual encoder"):
        VisionLanguageModel.load(parts.language_model("llama"))


def test_a_connector_that_travels_with_a_checkpoint_is_loaded_where_it_is_trusted(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "their_connector.py").write_text(
        "from torch import nn\n\n\nclass Theirs(nn.Linear):\n    def __init__(self, vision_dim, text_dim):\n"
        "        super().__init__(vision_dim, text_dim)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model, processor = parts.model(connector="their_connector:Theirs")
    made = VisionLanguageModel(model.eval(), processor)
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    monkeypatch.delitem(CONNECTORS, "their_connector:Theirs")
    monkeypatch.delitem(sys.modules, "their_connector")
    with pytest.raises(ValueError, match=r"model.connector.type=their_connector:Theirs: allowed are"):
        VisionLanguageModel.load(tmp_path / "saved", device="cpu")
    loaded = VisionLanguageModel.load(tmp_path / "saved", device="cpu", trust_remote_code=True)
    assert loaded.generate("what?", [picture()]) == made.generate("what?", [picture()])
    monkeypatch.delitem(CONNECTORS, "their_connector:Theirs")


def test_a_prompt_of_which_the_template_leaves_nothing_is_an_error(parts: Parts):
    """`plain` keeps images alone; a tokenizer without BOS then has no token to begin with."""
    processor = parts.processor()
    tokenizer = byte_tokenizer("plain", bos=None)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    bare = VLMProcessor(processor.image_processor, tokenizer, chat_template=tokenizer.chat_template)
    with pytest.raises(ValueError, match="leaves nothing of this prompt"):
        VisionLanguageModel(parts.model()[0], bare).generate("what?")


def test_training_switched_the_cache_off(ours: VisionLanguageModel):
    """Gradient checkpointing leaves `use_cache=False` in the configuration; answers use the cache all the same.

    With images transformers insists on it; here there is none.
    """
    before = ours.generate("what?", max_new_tokens=6)
    for settings in (ours.model.config, ours.model.language_model.config, ours.model.generation_config):
        settings.use_cache = False
    lengths: list[int] = []
    handle = ours.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    assert ours.generate("what?", max_new_tokens=6) == before
    handle.remove()
    assert set(lengths[1:]) <= {1}


def test_a_video_is_frames_to_a_model_that_knows_images(parts: Parts, tmp_path: Path):
    """Where `<video>` stands, beside images, for one prompt of several."""
    ours = make_random_model(parts, "llama")
    video = write_video(tmp_path / "a.mp4", 20)
    turn, media = ours.open_question("<image> and <video>?", [picture(0)], [video], 2)
    assert turn.content == (ImageRef(Path()), " and ", *sample_frame_refs(VideoRef(video), 2, "x"), "?")
    frames = read_frames(video, [5, 15], "x")
    assert [image.size for image in media] == [picture(0).size, *(frame.size for frame in frames)]
    alone = ours.generate("<image> and <image><image>?", [picture(0), *frames], max_new_tokens=8)
    asked = ["<image> and <video>?", "no <video> here"]
    answers = ours.generate(asked, [[picture(0)], []], [[video], []], max_frames=2, max_new_tokens=8)
    assert answers[0] == alone
    turn, _ = ours.open_question("what <image>?", [picture(0)], [video], 1)
    assert turn.content == (*sample_frame_refs(VideoRef(video), 1, "x"), "\nwhat ", ImageRef(Path()), "?")
    with pytest.raises(ValueError, match="max_frames=0: at least 1 is needed"):
        ours.generate("what?", videos=[video], max_frames=0)
    with pytest.raises(ValueError, match=r"b\.mp4 does not open"):
        ours.generate("what?", videos=[tmp_path / "b.mp4"])
