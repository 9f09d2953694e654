"""Short names of settings, for lists and for the folders of sweeps."""

from vlm.config.short_names import MAX_NAME_LENGTH, describe_values, folder_name, short_keys


def test_keys_are_told_by_their_last_words():
    keys = ["trainer.seed", "model.visual_encoder.hf_name", "model.language_model.hf_name", "trainer/deepspeed"]
    assert list(short_keys(keys).values()) == ["seed", "visual_encoder.hf_name", "language_model.hf_name", "deepspeed"]
    assert list(short_keys(["a.b.path", "c.b.path"]).values()) == ["a.b.path", "c.b.path"]


def test_equal_rates_of_parts_are_one():
    rates = {f"trainer.learning_rate.{part}_learning_rate": 1e-3 for part in ("connector", "language_model")}
    assert describe_values({**rates, "trainer.seed": None}) == "learning_rate=0.001 seed=null"
    assert describe_values({"dataset.path": "/a/long/folder/of/records/train.json"}).startswith("dataset.path=…")


def test_names_of_folders_need_no_quotation_marks():
    name = folder_name({"trainer.seed": "1", "model/language_model": "qwen2.5-0.5b", "trainer.max_steps": "-1"})
    assert name == "seed-1--language_model-qwen2.5-0.5b--max_steps--1"
    assert folder_name({}) == "."


def test_names_of_folders_tell_values_apart():
    texts = ["a b", "a,b", "'a b'", "[a,b]", "a/b", "../../a", "", "ü" * 100, "x" * 500, "x" * 501, "$(reboot)"]
    names = [folder_name({"dataset.template": text}) for text in texts]
    assert len(set(names)) == len(names)
    assert all(len(name) <= MAX_NAME_LENGTH and "/" not in name and not name.startswith(".") for name in names)
