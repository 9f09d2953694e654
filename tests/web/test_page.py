"""The page in a real browser: what people see and press; nothing of it leaves this machine."""

import itertools
import json
import shutil
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import waiting
from tests.tiny_parts import Parts, picture
from tests.web.test_results import row, write_results
from tests.web.test_runs import write_run
from vlm import VisionLanguageModel, VLMForPrediction, VLMPredictionConfig
from vlm.config.choices import FORMAT_DESCRIPTIONS
from vlm.config.schema import InferenceConfig
from vlm.config.shown import printable
from vlm.inference.conversation import Conversation
from vlm.web import jobs, tasks
from vlm.web.models import ModelHolder
from vlm.web.runs import find_run

task_view: Any = pytest.importorskip("vlm.web.task_view", reason="the page needs Gradio")
playwright = pytest.importorskip("playwright.sync_api", reason="the browser is driven with Playwright")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.skipif(find_spec("gradio") is None, reason="the page needs Gradio"),
    pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed"),
]

DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
QUESTION, SECOND_QUESTION = "what is in this picture?", "and what else?"
LONGEST = 24
LIMIT = 200_000
"""Bytes that may be uploaded at once."""


@dataclass(frozen=True)
class Served:
    """A page that is being served, and what it shows."""

    address: str
    token: str
    outputs: Path
    chat: Path
    head: Path
    image: Path
    routes: list[Any]


@pytest.fixture(scope="module")
def served(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The page over two tiny checkpoints and a folder of runs, served from this process."""
    from vlm.web.page import PageSettings, build, serve

    root = tmp_path_factory.mktemp("page")
    body, processor = parts.model("clip", "llama")
    with torch.no_grad():
        for name, parameter in body.named_parameters():
            if parameter.ndim > 1 and not name.startswith("visual"):
                parameter.mul_(8)  # chance, made livelier, so that it says something
    save(root / "chat", body, processor)
    heads = [{"name": "kind", "loss": "", "task": "multiclass", "labels": ["red", "green", "blue"]},
             {"name": "size", "loss": "", "task": "regression", "shift": 3.0, "scale": 2.0}]  # fmt: skip
    config = VLMPredictionConfig(body.config, heads=[{"pooling": "last", **head} for head in heads],
                                 media_token_ids=[processor.image_token_id])  # fmt: skip
    save(root / "head", VLMForPrediction(config, body), processor)
    picture(3).save(root / "image.png")
    write_run(root / "outputs" / "earlier", {"step": 7, "loss": 1.25, "epoch": 1.0})
    (root / "outputs" / "earlier" / "samples.md").write_text("## Step 7\n\n- **question**: what?\n- **answer**: red\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = PageSettings(
        [str(root / "chat"), str(root / "head")], port=port, outputs=root / "outputs", max_upload="200kb"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(root / "uploads"))
        page = build(settings)
        address, token = serve(page, settings).split("?token=")
        yield Served(
            address, token, root / "outputs", root / "chat", root / "head", root / "image.png", page.app.routes
        )
        page.close()


def save(folder: Path, model: Any, processor: Any) -> None:
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(served: Served, browser: Any) -> Iterator[Callable[..., Any]]:
    """`visit("Train")`: the page in a new window, with a tab open. No request left, and no error was logged."""
    asked: list[str] = []
    errors: list[str] = []
    contexts = []

    def go(tab: str = "Chat", viewport: dict[str, int] = DESKTOP, scheme: str = "light") -> Any:
        contexts.append(browser.new_context(viewport=viewport, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.set_default_timeout(1000 * waiting.HANG)
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        with page.expect_request(lambda request: is_load_event(request)):  # what is shown takes input from then on
            page.goto(f"{served.address}?token={served.token}")
        assert page.url == served.address, "the token leaves the address"
        page.wait_for_selector("#chat-question textarea")
        open_tab(page, tab)
        return page

    yield go
    for context in contexts:
        context.close()
    local = (served.address, served.address.replace("http", "ws", 1), "data:", "blob:")
    assert not [url for url in asked if not url.startswith(local)]
    assert not errors


def open_tab(page: Any, name: str) -> None:
    """Open a tab; on a narrow page it may be in the menu of those that have no room."""
    tab = page.get_by_role("tab", name=name, exact=True)
    if not tab.first.is_visible():
        page.locator(".overflow-menu button").first.click()
        tab = page.locator(".overflow-dropdown").get_by_text(name, exact=True)
    tab.first.click()


def is_load_event(request: Any) -> bool:
    """Whether a request is an event of the whole page, which Gradio sends once all that is shown is connected."""
    return "/queue/join" in request.url and request.post_data_json["trigger_id"] == 0


def record_questions(page: Any) -> list[Any]:
    """The values of all fields that the page posts with each question from now on."""
    posted: list[Any] = []

    def record(sent: Any) -> None:
        values = sent.post_data_json["data"] if "/queue/join" in sent.url else []
        if values and isinstance(values[0], dict) and "text" in values[0]:
            posted.append(values)

    page.on("request", record)
    return posted


def fill(page: Any, field: str, text: str) -> None:
    box = page.locator(f"#{field} textarea, #{field} input").first
    box.fill(text)
    box.press("Tab")  # Gradio takes a number for good when its field is left


def choose(page: Any, field: str, value: str) -> None:
    """Type a value into a drop-down field."""
    box = page.locator(f"#{field} input")
    box.fill(value)
    box.press("Enter")
    box.press("Tab")


def wait_for_choice(page: Any, field: str, value: str) -> Any:
    """Open a list until it offers a choice, and return that: it may have been opened before the page had it."""
    box, choice = page.locator(f"#{field} input").first, page.get_by_role("option", name=value, exact=True).first

    def is_offered() -> bool:
        box.blur()
        box.click()
        page.wait_for_timeout(300)
        return choice.is_visible()

    wait_until(is_offered, page)
    return choice


def send(page: Any, text: str) -> None:
    """Ask a question once. Gradio passes over Enter while the answer before is ending: it is pressed until the page
    posts the question. On a busy machine an answer may be complete before it is looked for: pressed again then, Enter
    would ask the question a second time, after its own answer.
    """
    box, posted, polls = page.locator("#chat-question textarea"), record_questions(page), count(1)
    shown = page.locator("#chat-shown .user, .toast-body")
    before = shown.count()
    box.fill(text)

    def is_asked() -> bool:
        if posted:
            return shown.count() > before
        if box.input_value() == text:
            box.press("Enter")
        elif next(polls) % 100 == 0:  # the field was cleared, and nothing was asked
            box.fill(text)
        return False

    wait_until(is_asked, page)


def wait_for_answer(page: Any, number: int) -> str:
    """Return the last answer as a browser shows it, once there are so many and it has ended."""
    stop = page.locator("#chat-question .stop-button")
    wait_until(lambda: len(read_answers(page)) >= number and not stop.is_visible(), page)
    return tidy(read_answers(page)[-1])


def read_answers(page: Any) -> list[str]:
    return [answer.strip() for answer in page.locator("#chat-shown .bot .message-content").all_inner_texts()]


def wait_until(condition: Callable[[], object], page: Any) -> None:
    """Wait as `tests.waiting` does, while the browser goes on."""
    waiting.wait_until(condition, pause=lambda: page.wait_for_timeout(100))


# Chat


def test_chat_streams_what_the_model_says(served: Served, visit: Callable[..., Any]):
    said = Conversation(VisionLanguageModel.load(served.chat), InferenceConfig(max_new_tokens=LONGEST))
    first = "".join(said.ask(QUESTION, [served.image])).strip()
    second = "".join(said.ask(SECOND_QUESTION)).strip()
    assert first
    assert second

    page = visit("Chat")
    posted = record_questions(page)
    fill(page, "chat-longest", str(LONGEST))
    page.evaluate("""() => { window.seen = []; new MutationObserver(() => {
        const found = [...document.querySelectorAll('#chat-shown .bot .message-content')].pop();
        if (found) window.seen.push(found.innerText.trim());
    }).observe(document.querySelector('#chat-shown'), {subtree: true, childList: true, characterData: true}); }""")
    page.locator("#chat-question input[type=file]").set_input_files(served.image)
    page.wait_for_selector("#chat-question img")
    send(page, QUESTION)
    assert wait_for_answer(page, 1) == tidy(printable(first)), posted
    assert [values[-4:] for values in posted] == [[0, 1, LONGEST, ""]], "temperature, top-p, longest answer, seed"
    steps = {text for text in page.evaluate("window.seen") if text}
    assert len(steps) > 1, "the answer came in pieces"
    assert page.locator("#chat-shown .user img").count() == 1
    page.get_by_role("tab", name="Predict", exact=True).click()  # and what was said is still known
    page.get_by_role("tab", name="Chat", exact=True).click()
    send(page, SECOND_QUESTION)
    assert wait_for_answer(page, 2) == tidy(printable(second)), posted
    page.locator("#chat-clear").click()
    wait_until(lambda: not read_answers(page), page)
    send(page, SECOND_QUESTION)
    anew = Conversation(said.model, said.settings)
    alone = "".join(anew.ask(SECOND_QUESTION)).strip()
    assert wait_for_answer(page, 1) == tidy(printable(alone)), posted


def tidy(text: str) -> str:
    """As a browser shows it: white space in runs."""
    return " ".join(text.split())


def test_chat_stops_and_says_that_it_did(visit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    whole = VisionLanguageModel.stream_batch

    def endless(*given: Any) -> Iterator[str]:
        for piece in itertools.chain(whole(*given), itertools.repeat(" more")):
            time.sleep(0.2)
            yield piece

    monkeypatch.setattr(VisionLanguageModel, "stream_batch", endless)
    page = visit("Chat")
    send(page, QUESTION)
    wait_until(lambda: read_answers(page), page)
    page.locator("#chat-question .stop-button").click()
    wait_until(lambda: "stopped" in read_answers(page)[-1], page)


def test_chat_shows_texts_as_text(visit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    """Forms, links and images of a stranger do not come alive, neither in a question nor in an answer."""
    hostile = '<form action="/x"><button>Go</button></form><a href="http://evil.test">b</a>![](x.png) $$x^2$$'
    monkeypatch.setattr(VisionLanguageModel, "stream_batch", lambda *given: iter([hostile]))
    page = visit("Chat")
    send(page, hostile)
    wait_until(lambda: read_answers(page) == [hostile], page)
    assert page.locator("#chat-shown .user .message-content").inner_text().strip() == hostile
    assert page.locator(".message-content").locator("form, a, img, .katex").count() == 0


def test_chat_shows_what_is_wrong_and_keeps_the_question(visit: Callable[..., Any], tmp_path: Path):
    (tmp_path / "torn.png").write_bytes(b"no image")
    page = visit("Chat")
    page.locator("#chat-question input[type=file]").set_input_files(tmp_path / "torn.png")
    page.wait_for_selector("#chat-question .thumbnail-item")
    send(page, QUESTION)
    page.locator(".toast-body").wait_for()
    assert "torn.png" in page.locator(".toast-body").inner_text()
    wait_until(lambda: page.locator("#chat-question textarea").input_value() == QUESTION, page)
    assert not read_answers(page)


# Predict


def test_predict_shows_bars_for_every_head(served: Served, visit: Callable[..., Any]):
    page = visit("Predict")
    page.locator("#predict-images input[type=file]").first.set_input_files(served.image)
    page.wait_for_selector("#predict-images img")
    fill(page, "predict-prompt", QUESTION)
    page.locator("#predict-go").click()
    page.wait_for_selector("#predict-result .vlm-head")
    assert page.locator("#predict-result h3").all_inner_texts() == ["kind", "size"]
    bars = page.locator("#predict-result .vlm-bar")
    assert sorted(bars.locator("span").all_inner_texts()) == ["blue", "green", "red"]
    shares = [float(text.rstrip("%")) for text in bars.locator("b").all_inner_texts()]
    assert shares == sorted(shares, reverse=True)
    assert abs(sum(shares) - 100) < 0.3


def test_predict_says_what_is_wrong(served: Served, visit: Callable[..., Any]):
    page = visit("Predict")
    choose(page, "predict-checkpoint", str(served.chat))
    fill(page, "predict-prompt", QUESTION)
    page.locator("#predict-go").click()
    assert "has no prediction heads" in page.locator("#predict-result .vlm-problem").inner_text()


# Train


def train_form(page: Any, world: Path, lines: str) -> None:
    """Fill the form with the tiny world."""
    choose(page, "train-visual_encoder", str(world / "visual_encoder"))
    choose(page, "train-language_model", str(world / "language_model"))
    fill(page, "train-path", str(world / "records.json"))
    fill(page, "train-images", str(world / "images"))
    fill(page, "train-lines", lines)


def test_train_checks_before_it_starts(served: Served, world: Path, visit: Callable[..., Any]):
    before = set(served.outputs.iterdir())
    page = visit("Train")
    train_form(page, world, "trainer.num_train_epoch=1")
    for button in ("check", "start"):
        page.locator(f"#train-{button}").click()
        wait_until(lambda: "num_train_epochs" in page.locator("#train-message").inner_text(), page)
        assert set(served.outputs.iterdir()) == before
    fill(page, "train-lines", "trainer.num_train_epochs=1")
    page.locator("#train-check").click()
    page.locator("#train-command").wait_for()
    command = page.locator("#train-command .cm-content").inner_text()
    assert "-m vlm -cn pretrain-smol" in command
    assert f"dataset.path={world / 'records.json'}" in command
    assert "trainer.num_train_epochs=1" in command
    assert set(served.outputs.iterdir()) == before


@pytest.mark.slow
def test_train_runs_shows_and_stops(served: Served, world: Path, brief: list[str], visit: Callable[..., Any]):
    page = visit("Train")
    own = [line for line in brief if line.startswith(("trainer", "inference")) and "tqdm" not in line]
    train_form(page, world, "\n".join([*own, "trainer.max_steps=5000", "trainer.save_strategy=no"]))
    page.locator("#train-start").click()
    page.locator("#run-status .vlm-running").wait_for()
    name = page.locator("#run-status h3").inner_text().split()[0]
    wait_until(lambda: "step" in page.locator("#run-status p").first.inner_text().lower()
          and "loss" in page.locator("#run-status p").first.inner_text(), page)  # fmt: skip
    page.locator("#run-plot canvas, #run-plot svg").first.wait_for()
    wait_until(lambda: page.locator("#run-status [role=progressbar]").get_attribute("aria-valuenow") is not None, page)
    assert "Run directory" in page.locator("#run-log").inner_text()
    job = jobs.read_job(served.outputs / name)
    assert job is not None
    assert job.is_alive()

    again = visit("Train")  # whoever opens the page finds it
    again.get_by_role("tab", name="Runs").click()
    again.locator("#run-status .vlm-running").wait_for()

    page.locator("#run-stop").click()
    page.locator("#run-status .vlm-stopped").wait_for()
    assert not job.is_alive()
    assert find_run(served.outputs, name).step > 0
    row = page.locator(f"#runs-table [data-run='{name}']")
    assert "stopped" in row.inner_text()


def test_earlier_runs_are_listed_and_shown(visit: Callable[..., Any]):
    page = visit("Train")
    page.get_by_role("tab", name="Runs").click()
    page.locator("#runs-table [data-run=earlier] button").click()
    page.locator("#run-status h3").wait_for()
    assert "step 7 · loss 1.25" in page.locator("#run-status").inner_text()
    page.get_by_role("tab", name="Samples").click()
    assert "red" in page.locator("#run-samples").inner_text()
    page.get_by_role("tab", name="Configuration").click()
    page.get_by_text("num_train_epochs").first.wait_for()


# Data


def test_data_marks_what_is_supervised(served: Served, world: Path, visit: Callable[..., Any], tmp_path: Path):
    records = json.loads((world / "records.json").read_text())[:3]
    records[2]["image"] = "nowhere.png"
    (tmp_path / "records.json").write_text(json.dumps(records))
    page = visit("Data")
    fill(page, "data-path", str(tmp_path / "nothing.json"))
    page.locator("#data-open").click()
    page.locator("#data-shown .vlm-problem").wait_for()
    fill(page, "data-path", str(tmp_path / "records.json"))
    fill(page, "data-images", str(world / "images"))
    choose(page, "data-checkpoint", str(served.chat))
    page.locator("#data-open").click()
    page.locator("#data-shown mark").first.wait_for()
    assert "red square" in page.locator("#data-shown mark").first.inner_text()
    assert "Record 0 of 3" in page.locator("#data-count").inner_text()
    page.locator("#data-next").click()
    wait_until(lambda: "blue square" in page.locator("#data-shown").inner_text(), page)
    page.locator("#data-number input").fill("2")
    page.locator("#data-number input").press("Enter")
    wait_until(lambda: "cannot be used" in page.locator("#data-shown").inner_text(), page)
    assert "nowhere.png" in page.locator("#data-shown").inner_text()
    page.locator("#data-previous").click()
    wait_until(lambda: "blue square" in page.locator("#data-shown").inner_text(), page)


def test_a_run_that_has_ended_can_be_asked(served: Served, visit: Callable[..., Any]):
    page = visit("Chat")
    run = write_run(served.outputs / "later")
    shutil.copytree(served.chat, run / "final")
    page.get_by_role("tab", name="Predict", exact=True).click()
    page.get_by_role("tab", name="Chat", exact=True).click()
    wait_for_choice(page, "chat-checkpoint", str(run / "final"))


# Compare, Evaluate, Export


def test_runs_stand_side_by_side(served: Served, visit: Callable[..., Any]):
    for number, name in enumerate(("left", "right")):
        write_run(served.outputs / name, {"step": 1, "loss": 2.0 + number}, {"step": 2, "loss": 1.5 + number})
    page = visit("Compare")
    for name in ("left", "right"):
        wait_for_choice(page, "compare-runs", name).click()
    page.locator("#compare-shown svg.chart").first.wait_for()
    shown = page.locator("#compare-shown").inner_text()
    assert "1.5" in shown
    assert "2.5" in shown
    assert "The runs have the same settings" in shown


def test_an_evaluation_is_checked_started_and_shown(
    served: Served, world: Path, visit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """The process is another one, which writes what an evaluation writes."""
    commands = []

    def start(outputs: Path, task: tasks.Task, command: list[str]) -> object:
        commands.append(command)
        written = write_results(tmp_path / "written", row("a cat", "a dog"))
        copy = f"import shutil; shutil.copytree({str(written)!r}, {task.result!r})"
        return tasks.start_task(outputs, task, [sys.executable, "-c", copy])

    monkeypatch.setattr(task_view, "start_task", start)
    page = visit("Evaluate")
    page.locator("#evaluate-start").click()
    page.locator("#evaluation-message .vlm-problem").wait_for()
    assert "Name the records" in page.locator("#evaluation-message").inner_text()
    fill(page, "evaluate-data", str(world / "records.json"))
    page.locator("#evaluate-check").click()
    wait_until(lambda: "Ready to start" in page.locator("#evaluation-message").inner_text(), page)
    assert f"vlm eval {served.chat}" in page.locator("#evaluation-command .cm-content").inner_text()
    assert not commands
    page.locator("#evaluate-start").click()
    page.locator("#evaluation-status .vlm-finished").wait_for()
    page.locator("#evaluate-results .vlm-sample").wait_for()
    shown = page.locator("#evaluate-results").inner_text()
    assert "0.25 to 0.75" in shown
    assert "a cat" in shown
    assert f"--data={world / 'records.json'}" in commands[0]
    assert "--metrics=exact_match,loss" in commands[0]


def test_an_export_stays_below_the_outputs(served: Served, visit: Callable[..., Any]):
    page = visit("Export")
    fill(page, "export-name", "../elsewhere")
    page.locator("#export-start").click()
    page.locator("#export-message .vlm-problem").wait_for()
    assert "the page writes below" in page.locator("#export-message").inner_text()
    fill(page, "export-name", "exported")
    page.locator("#export-check").click()
    wait_until(lambda: "Ready to start" in page.locator("#export-message").inner_text(), page)
    assert "--format=llava" in page.locator("#export-command .cm-content").inner_text()
    assert not (served.outputs / "exported").exists()
    choose(page, "export-format", f"gguf: {FORMAT_DESCRIPTIONS['gguf']}")
    page.locator("#export-check").click()
    page.locator("#export-message .vlm-problem").wait_for()
    assert "does not fit --format gguf" in page.locator("#export-message").inner_text()


@pytest.mark.slow
def test_an_export_is_written_and_read_back(served: Served, visit: Callable[..., Any]):
    page = visit("Export")
    choose(page, "export-checkpoint", str(served.chat))
    fill(page, "export-name", "as-llava")
    page.locator("#export-start").click()
    page.locator("#export-status .vlm-state").wait_for()
    wait_until(lambda: "running" not in page.locator("#export-status h3").inner_text(), page)
    assert "finished" in page.locator("#export-status h3").inner_text(), page.locator("#export-log").inner_text()
    assert f"written to {served.outputs / 'as-llava'}" in page.locator("#export-status").inner_text()
    assert (served.outputs / "as-llava" / "model.safetensors").is_file()


def test_the_chat_says_that_weights_are_loading(visit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    loaded = threading.Event()
    whole = ModelHolder.load

    def slow(*given: Any) -> Any:
        loaded.wait(waiting.HANG)
        return whole(*given)

    monkeypatch.setattr(ModelHolder, "load", slow)
    monkeypatch.setattr(VisionLanguageModel, "stream_batch", lambda *given: iter(["done"]))
    page = visit("Chat")
    send(page, QUESTION)
    wait_until(lambda: any("Loading" in answer for answer in read_answers(page)), page)
    loaded.set()
    wait_until(lambda: read_answers(page) == ["done"], page)


# What every tab has to hold


TABS = ["Chat", "Predict", "Train", "Compare", "Evaluate", "Export", "Data"]


UNNAMED = """names => [...document.querySelectorAll('input, textarea, button, [role=tab]')]
    .filter(element => element.checkVisibility() && element.type !== 'file' && !element.ariaLabel && !element.title
        && !element.innerText.trim() && !element.closest('label')?.innerText.trim() && !(element.labels || []).length)
    .map(element => element.outerHTML.slice(0, 200))"""
"""Elements that one can use, and that a screen reader has no name for."""
FOCUSED = """() => { const element = document.activeElement; const style = getComputedStyle(element);
    const box = element.closest('.focus-within, .wrap, .block') || element;
    return [element.id || element.closest('[id]')?.id, element.matches(':focus-visible'),
        style.outlineStyle !== 'none' || style.boxShadow !== 'none' || getComputedStyle(box).boxShadow !== 'none']; }"""
"""The id of what has the focus or is around it, and whether that can be seen."""


def test_nothing_scrolls_sideways(visit: Callable[..., Any]):
    page = visit("Chat", PHONE, "dark")
    for tab in TABS:
        open_tab(page, tab)
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), tab
        assert page.evaluate(UNNAMED) == [], tab


def test_the_keyboard_reaches_everything(visit: Callable[..., Any]):
    """Each field and button of a tab, in the order in which they stand; where the focus is can be seen."""
    expected = {
        "Chat": ["chat-checkpoint", "chat-question", "chat-longest", "chat-seed", "chat-clear"],
        "Evaluate": ["evaluate-checkpoint", "evaluate-data", "evaluate-images", "evaluate-metrics", "evaluate-start"],
        "Export": ["export-checkpoint", "export-format", "export-name", "export-check", "export-start"],
    }
    page = visit("Chat")
    for tab, ids in expected.items():
        open_tab(page, tab)
        page.wait_for_selector(f"#{ids[-1]}")
        page.get_by_role("tab", name=tab, exact=True).focus()
        reached = []
        for _ in range(40):
            page.keyboard.press("Tab")
            name, has_focus, is_seen = page.evaluate(FOCUSED)
            assert has_focus
            assert is_seen, (tab, name)
            reached.append(name)
            if page.evaluate("id => document.getElementById(id).contains(document.activeElement)", ids[-1]):
                break
        wait_until(lambda: page.locator("[role=listbox]:visible").count() == 0, page)  # lists close behind the focus
        places = [next((at for at, name in enumerate(reached) if is_within(page, id_, name)), None) for id_ in ids]
        assert None not in places, (tab, ids, reached)
        assert places == sorted(places), (tab, reached)


def is_within(page: Any, outer: str, inner: str | None) -> bool:
    """Whether an element is another one, or within it."""
    script = "([outer, inner]) => !!document.getElementById(outer)?.contains(document.getElementById(inner))"
    return inner is not None and page.evaluate(script, [outer, inner])


def get_status(served: Served, path: str, body: bytes | None = None, *, secret: bool = True, **headers: str) -> int:
    """The status of a request that carries the token, unless it has no `secret`."""
    own = {"Authorization": f"Bearer {served.token}"} if secret else {}
    request = urllib.request.Request(f"{served.address}{path}", body, {**own, **headers})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status
    except urllib.error.HTTPError as refused:
        return refused.code


def test_no_other_file_is_served(served: Served):
    for path in ("/etc/passwd", str(served.chat / "config.json"), str(served.image), str(Path.cwd() / "README.md")):
        assert get_status(served, f"gradio_api/file={path}") in (403, 404), path


def upload(served: Served, size: int, **headers: str) -> int:
    edge = "edge"
    body = (
        f'--{edge}\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n'
        "Content-Type: image/png\r\n\r\n"
    ).encode() + bytes(size) + f"\r\n--{edge}--\r\n".encode()  # fmt: skip
    return get_status(
        served, "gradio_api/upload", body, **{"Content-Type": f"multipart/form-data; boundary={edge}", **headers}
    )


def test_uploads_have_a_limit(served: Served):
    assert upload(served, LIMIT // 2) == 200
    assert upload(served, 2 * LIMIT) == 413


def test_other_sites_and_names_are_refused(served: Served):
    assert upload(served, 10, Origin="http://elsewhere.example") == 403
    assert get_status(served, "", Host="elsewhere.example") == 403
    with urllib.request.urlopen(f"{served.address}gradio_api/startup-events") as answer:
        assert "default-src 'self'" in answer.headers["Content-Security-Policy"]


def test_nothing_is_answered_without_the_secret(served: Served):
    """The routes that the application's own table names, those of Gradio that matter, and one that is not there."""
    known = "/ /config /theme.css /nowhere /gradio_api/info /gradio_api/upload /gradio_api/queue/join"
    paths = {getattr(route, "path", "/") for route in served.routes} | {*known.split(), "/gradio_api/queue/data"}
    for path in paths - {"/gradio_api/startup-events"}:
        assert get_status(served, path.lstrip("/"), secret=False) == 401, path
        assert get_status(served, path.lstrip("/"), b"{}", secret=False) == 401, path
