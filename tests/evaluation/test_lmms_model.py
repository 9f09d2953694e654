"""The model that lmms-eval asks: what its requests become, beside a slow test through lmms-eval itself."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from tests.evaluation.lmms_task import ANSWERED, COMPARED, write_tasks
from tests.inference.test_generate import make_random_model
from tests.tiny_parts import Parts, picture
from vlm import VisionLanguageModel
from vlm.cli.main import main
from vlm.data.encoding.labels import IGNORE_INDEX, encode
from vlm.data.sample import Sample, Turn
from vlm.evaluation.lmms_run import REPOSITORY, VENV_PYTHON
from vlm.inference.prompts import STAND_IN_IMAGE

DOCUMENTS: list[dict[str, Any]] = [
    {"shown": [picture(0)]}, {"shown": [picture(1), picture(2)]}, {"shown": []}, {"shown": None},
    {"shown": [picture(3)]},
]  # fmt: skip
CONTEXTS = ["what?", "is <image> a longer question than <image>?", "no picture here", "none", "one of <image> <image>?"]


@pytest.fixture(scope="module")
def adapter() -> Iterator[ModuleType]:
    """`vlm.evaluation.lmms_model`, on what it takes from lmms-eval, which cannot be installed beside Hydra."""
    names = ("lmms_eval", "lmms_eval.api", "lmms_eval.api.instance", "lmms_eval.api.model")
    given = {name: ModuleType(name) for name in names}

    @dataclass
    class GenerationResult:
        text: Any

    class Base:
        def __init__(self) -> None:
            self._rank, self._world_size = 0, 1
            self.task_dict: dict[str, Any] = {}

        @staticmethod
        def _resolve_system_prompt(value: str) -> str:
            return value

        @property
        def rank(self) -> int:
            return self._rank

    vars(given["lmms_eval.api.instance"])["GenerationResult"] = GenerationResult
    vars(given["lmms_eval.api.model"])["lmms"] = Base
    patch = pytest.MonkeyPatch()
    for name, module in given.items():
        patch.setitem(sys.modules, name, module)
    patch.delitem(sys.modules, "vlm.evaluation.lmms_model", raising=False)
    from vlm.evaluation import lmms_model as lmms

    yield lmms
    patch.undo()
    sys.modules.pop("vlm.evaluation.lmms_model", None)


@pytest.fixture(scope="module")
def checkpoint(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "final"
    ready = make_random_model(parts, "llama")
    ready.model.save_pretrained(folder)
    ready.processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(adapter: ModuleType, checkpoint: Path) -> Any:
    """The model on the documents above, three at a time."""
    found = adapter.LmmsModel(str(checkpoint), device="cpu", batch_size=3)
    found.task_dict = {"mine": {"test": DOCUMENTS}}
    return found


@dataclass
class Request:
    args: tuple[Any, ...]


def request(place: int, second: Any) -> Request:
    return Request((CONTEXTS[place], second, lambda document: document["shown"], place, "mine", "test"))


def test_a_batch_is_answered_as_each_alone(model: Any, checkpoint: Path):
    """With one image, several and none; in the order of the requests, whatever their lengths."""
    answers = model.generate_until([request(place, {"max_new_tokens": 8}) for place in range(5)])
    alone = VisionLanguageModel.load(checkpoint, device="cpu")
    plain = [*CONTEXTS[:4], "one of  ?"]  # marks that no images go with are taken out
    expected = [
        alone.generate(text, document["shown"] or [], max_new_tokens=8)
        for text, document in zip(plain, DOCUMENTS, strict=True)
    ]
    assert answers == expected
    assert len(set(answers)) > 1


def test_requests_that_want_different_things_are_not_one_batch(model: Any):
    short, long = {"max_new_tokens": 2}, {"max_new_tokens": 8, "until": None}
    given = [short, long, short, long, long]
    mixed = model.generate_until([request(place, one) for place, one in enumerate(given)])
    apart = [model.generate_until([request(place, one)])[0] for place, one in enumerate(given)]
    assert mixed == apart


@pytest.mark.parametrize(("given", "settings", "further", "until"), [
    ({}, (0.0, 1.0, 1, 1024), {}, []),
    ({"do_sample": False, "temperature": 0.7, "top_p": None, "num_beams": 3}, (0.0, 1.0, 3, 1024), {}, []),
    ({"do_sample": True, "max_new_tokens": 5, "until": "\n"}, (1.0, 1.0, 1, 5), {}, ["\n"]),
    ({"temperature": 0.2, "top_p": 0.9, "top_k": 7, "until": ["a"]}, (0.2, 0.9, 1, 1024), {"top_k": 7}, ["a"]),
    ({"temperature": 0, "top_p": 0, "image_aspect_ratio": "original"}, (0.0, 1.0, 1, 1024), {}, []),
])  # fmt: skip
def test_what_a_task_asks_for(
    adapter: ModuleType, given: dict[str, Any], settings: tuple[Any, ...], further: dict[str, Any], until: list[str]
):
    drawn, rest, ends = adapter.parse_generation_kwargs(given)
    assert (drawn.temperature, drawn.top_p, drawn.num_beams, drawn.max_new_tokens) == settings
    assert (rest, ends) == (further, until)


def test_an_option_that_no_model_takes_is_told(adapter: ModuleType, caplog: pytest.LogCaptureFixture):
    assert adapter.parse_generation_kwargs({"max_gen_toks": 3})[1] == {}
    assert "not supported: max_gen_toks" in caplog.text


def test_answers_end_where_a_task_says(adapter: ModuleType, model: Any):
    assert adapter.truncate_at_stop("a cat\nUSER: b", ["USER", "\n"]) == "a cat"
    assert adapter.truncate_at_stop(" a cat ", [""]) == "a cat"
    whole = model.generate_until([request(0, {"max_new_tokens": 8})])[0]
    middle = whole[len(whole) // 2]
    found = model.generate_until([request(0, {"max_new_tokens": 8, "until": [middle]})])[0]
    assert found == whole.split(middle)[0].strip()


def test_choices_have_the_loss_of_the_reply(model: Any):
    """The mean over the tokens that training would supervise, in batches as alone; and whether it is the greedy one."""
    said = model.generate_until([request(0, {"max_new_tokens": 40})])[0]
    choices = [(0, "a cat"), (0, " two words"), (1, "x"), (2, "a much longer reply than that"), (0, said)]
    found = [one.text for one in model.loglikelihood([request(place, choice) for place, choice in choices])]
    for (place, choice), (loss, greedy) in zip(choices, found, strict=True):
        assert loss == pytest.approx(compute_loss(model.vlm, place, choice), rel=1e-4)
        assert isinstance(greedy, bool)
    assert not any(greedy for _, greedy in found[:4])
    by_function = model.loglikelihood([request(0, lambda document: "a cat")])[0].text
    assert by_function[0] == pytest.approx(found[0][0], rel=1e-4)


def compute_loss(ready: VisionLanguageModel, place: int, reply: str) -> float:
    """The model's own loss of a reply to one of the questions."""
    images = DOCUMENTS[place]["shown"]
    turn, opened = ready.open_question(CONTEXTS[place], images)
    sample = Sample("one", (Turn("user", turn.content), Turn("assistant", (reply.strip(),))))
    assert sum(part == STAND_IN_IMAGE for part in turn.content) == len(images)
    encoded = encode(ready.processor, sample)
    pixels = {"pixel_values": ready.processor.pixel_values(opened)} if images else {}
    ids, labels = (torch.tensor([one]) for one in (encoded.input_ids, encoded.labels))
    assert (labels != IGNORE_INDEX).any()
    with torch.no_grad():
        return ready.model(input_ids=ids, labels=labels, **pixels).loss.item()


def test_what_cannot_be_asked_is_refused(adapter: ModuleType, model: Any, checkpoint: Path):
    with pytest.raises(NotImplementedError, match="several rounds"):
        model.generate_until_multi_round([])
    with pytest.raises(ValueError, match="acc_mutual_info"):
        model.loglikelihood([Request(("", "a cat"))])
    sound = Request(("what?", {}, lambda document: [{"array": 1}], 0, "mine", "test"))
    with pytest.raises(ValueError, match="task mine: it shows dict; only images and videos"):
        model.generate_until([sound])
    missing = Request(("what?", {}, lambda document: ["clip.mp4"], 0, "mine", "test"))
    with pytest.raises(ValueError, match=r"task mine, document 0: .*clip\.mp4"):
        model.generate_until([missing])
    with pytest.raises(ValueError, match="batch_size=auto: at least 1 is needed"):
        adapter.LmmsModel(str(checkpoint), batch_size="auto")


def test_a_system_prompt_is_said_first(adapter: ModuleType, model: Any, checkpoint: Path):
    told = adapter.LmmsModel(str(checkpoint), device="cpu", system_prompt="Answer in one word.")
    told.task_dict = model.task_dict
    (turns,), _ = told._make_conversations([request(0, {}).args])
    assert [turn.role for turn in turns] == ["system", "user"]
    assert turns[0].content == ("Answer in one word.",)


def test_it_needs_nothing_that_lmms_eval_cannot_live_with():
    """Hydra's omegaconf needs another antlr4 than lmms-eval pins; DeepSpeed is not in its environment either."""
    code = (
        "import sys\n"
        "for name in ('hydra', 'omegaconf', 'deepspeed', 'antlr4'): sys.modules[name] = None\n"
        "import vlm.inference.generate, vlm.evaluation.loss\n"
        "from vlm.config.recorded import read_recipe\n"
        "assert read_recipe({'visual_encoder': {'hf_name': 'a'}}).visual_encoder.hf_name == 'a'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


# Through lmms-eval itself


def make_images(folder: Path, checkpoint: Path) -> Path:
    """LLaVA records on plain colours, half of which have the reply that the model gives."""
    ready = VisionLanguageModel.load(checkpoint, device="cpu")
    found = []
    for number in range(12):
        Image.new("RGB", (24, 24), ["red", "green", "blue"][number % 3]).save(folder / f"{number}.png")
        question = f"what{' really' * (number % 5)}?"
        said = ready.generate(question, [folder / f"{number}.png"], max_new_tokens=16) if number % 2 else "nothing"
        found.append({
            "id": str(number), "image": f"{number}.png", "kind": "any",
            "conversations": [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": said}],
        })  # fmt: skip
    (folder / "records.json").write_text(json.dumps(found))
    return folder / "records.json"


@pytest.mark.slow
def test_lmms_eval_finds_what_vlm_eval_finds(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A task on the same records, through lmms-eval in its own environment, and `vlm eval --data`."""
    python = next((place for place in (VENV_PYTHON, REPOSITORY / VENV_PYTHON) if place.is_file()), None)
    if python is None:
        pytest.skip(f"there is no {VENV_PYTHON}; make install-eval makes it")
    monkeypatch.setenv("HF_HOME", os.environ["HF_HOME"])
    records = make_images(tmp_path, checkpoint)
    write_tasks(records, tmp_path, tmp_path / "tasks", 12)
    tasks, answers = tmp_path / "by_tasks", tmp_path / "by_records"
    common = ["eval", str(checkpoint), "--device", "cpu", "--batch-size", "4"]
    main([*common, "--tasks", f"{ANSWERED},{COMPARED}", "--include-path", str(tmp_path / "tasks"), "--output",
          str(tasks), "--lmms-eval-python", str(python)])  # fmt: skip
    main([*common, "--data", str(records), "--metrics", "exact_match", "--output", str(answers), "--max-new-tokens",
          "16", "--num-workers", "0"])  # fmt: skip
    found = {one["task"]: one["value"] for one in json.loads((tasks / "results.json").read_text())["results"]}
    value = json.loads((answers / "results.json").read_text())["metrics"]["exact_match"]["value"]
    assert found[ANSWERED] == pytest.approx(value)
    assert value >= 0.5
    assert 0 <= found[COMPARED] <= 1
