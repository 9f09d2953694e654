"""The frame of HTML pages."""

from html.parser import HTMLParser

from vlm.config.html_page import html_page


class Parsed(HTMLParser):
    """Elements and texts of a document."""

    def __init__(self, document: str):
        super().__init__()
        self.elements: list[str] = []
        self.texts: list[str] = []
        self.feed(document)

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        assert not {"src", "href"} & {name for name, _ in attrs}

    def handle_data(self, data):
        self.texts.append(data)


def test_the_title_is_escaped_and_shown_twice():
    page = Parsed(html_page("<script>a & b", "<p>text</p>", style=".x{}"))
    assert "script" not in page.elements
    assert page.texts.count("<script>a & b") == 2
    assert page.elements[-2:] == ["h1", "p"]


def test_colours_follow_the_readers_scheme_and_nothing_is_fetched():
    page = html_page("title", "")
    assert "color-scheme:light dark" in page
    assert "prefers-color-scheme:dark" in page
    assert not any(word in page for word in ("http:", "https:", "@import", "url("))
