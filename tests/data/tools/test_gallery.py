"""The gallery of `vlm data show --html`: what is on it, that nothing of a record runs, and that it stays small."""

import base64
import hashlib
import json
import re
from pathlib import Path

import pytest

from tests.tiny_parts import picture
from vlm.cli.main import main
from vlm.data.tools import gallery
from vlm.data.tools.gallery import reason_without_names

EVIL = '</script><script>alert(1)</script><img src=x onerror=alert(1)> " onclick="alert(1)'


@pytest.fixture
def page(common: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> str:
    """A gallery of two records that are used, and three that are left out."""
    monkeypatch.chdir(tmp_path)
    picture().save(tmp_path / "a.png")

    def record(name: str, image: str | None, asked: str, reply: str) -> dict[str, object]:
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": reply}]
        return {"id": name, **({"image": image} if image else {}), "conversations": turns}

    rows = [
        record("good", "a.png", "<image>\nwhat?", "a red square"),
        record(EVIL, None, EVIL, EVIL),
        record("lost 1", "b.png", "<image>\nwhat?", "that"),
        record("lost 2", "c.png", "<image>\nwhat?", "that"),
        record("long", None, "what?", "long " * 400),
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    words = [*common, "dataset.path=rows.json", "dataset.image_folder=."]
    main(["data", "show", "--html", "pages/gallery.html", "-cn", "finetune-smol", *words])
    told = capsys.readouterr().out
    assert "5 records: 2 used, 3 left out; 0." in told
    assert "Open pages/gallery.html in a browser." in told
    assert not (tmp_path / "records.html").exists()
    return (tmp_path / "pages" / "gallery.html").read_text()


def test_each_record_has_a_card_with_its_verdict_and_marked_tokens(page: str):
    assert page.count("<details ") == 5
    assert page.count('data-verdict="used"') == 2
    assert page.count('data-verdict="left out"') == 3
    assert page.count('src="data:image/webp;base64,') == 1
    assert "<mark>a red square&lt;|im_end|&gt;</mark>" in page
    assert re.search(r'<p class="text">[^<]*what\? [^<]*<mark>a red square</mark></p>', page)  # the closed card
    assert "not shown" not in page
    assert "<option" in page.partition('<select id="verdict">')[2]
    assert "2 × image file … does not exist" in page
    assert page.count('data-reason="image file … does not exist"') == 2
    assert "tokens, at most" in page


def test_nothing_of_a_record_is_markup_or_script(page: str):
    assert page.count("<script>") == page.count("</script>") == 1
    assert "<img src=x" not in page
    assert not re.search(r"<[^>]* onclick=", page)
    script = page.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page
    assert "default-src 'none'" in page
    assert "innerHTML" not in script
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page


def test_images_beyond_the_bytes_of_a_page_are_counted(monkeypatch: pytest.MonkeyPatch):
    images = [picture(number) for number in range(6)]
    assert gallery.Thumbnails().as_html(images).count("<img") == gallery.MAX_THUMBNAILS
    monkeypatch.setattr(gallery, "THUMBNAIL_BYTES", 10)
    thumbnails = gallery.Thumbnails()
    assert "+6 images" in thumbnails.as_html(images)
    assert thumbnails.num_left_out == 6


def test_equal_reasons_are_one():
    told = {reason_without_names(f"image file images/{name}.png does not exist") for name in ("a", "b")}
    assert told == {"image file … does not exist"}
