"""Chat templates of other code bases, and ours as they take them.

Imports nothing of `vlm`. transformers' processors hand a template the messages as they came, contents as lists of text
and image items; ours hand it strings with an image token for each image. An exported template is ours behind lines that
make those strings, so that every server renders what `vlm generate` renders; importing takes the lines off again.
"""

from transformers.utils.chat_template_utils import render_jinja_template

TEMPLATE_HEADER = """\
{#- vlm: contents as strings, an image token for each image, the pictures of a turn on a line before its text. -#}
{%- set image_token = %IMAGE% -%}
{%- set enable_thinking = %THINKS% -%}
{%- set strings = namespace(messages=[]) -%}
{%- for message in messages -%}
  {%- if message['content'] is string -%}
    {%- set strings.messages = strings.messages + [message] -%}
  {%- else -%}
    {%- set turn = namespace(text='', lead=true) -%}
    {%- for item in message['content'] -%}
      {%- if item['type'] == 'text' -%}
        {%- if turn.lead and turn.text and not item['text'].startswith('\\n') -%}
          {%- set turn.text = turn.text + '\\n' -%}
        {%- endif -%}
        {%- set turn.text = turn.text + item['text'] -%}
        {%- set turn.lead = false -%}
      {%- else -%}
        {%- set turn.text = turn.text + image_token -%}
      {%- endif -%}
    {%- endfor -%}
    {%- set strings.messages = strings.messages + [{'role': message['role'], 'content': turn.text}] -%}
  {%- endif -%}
{%- endfor -%}
{%- set messages = strings.messages -%}
"""
"""The beginning of an exported template, before ours. Imports compare it, so its text never changes."""

CAPTURE_START = "{%- set rendered -%}\n"
CAPTURE_END = """
{%- endset -%}
{%- for piece in rendered.split(image_token) -%}
  {{- '' if loop.first else image_token -}}
  {%- if loop.first and bos_token and piece.startswith(bos_token) -%}
    {{- bos_token + ' ' + piece[bos_token | length:] -}}
  {%- elif loop.first or not piece or piece.startswith(' ') -%}
    {{- piece -}}
  {%- else -%}
    {{- ' ' + piece -}}
  {%- endif -%}
{%- endfor -%}
"""
"""Around a template whose tokenizer begins a word only at the start of a text: ours cuts the text at images and behind
BOS and reads each piece on its own, so the blank that a piece's first word begins with is written out."""

DEFAULT_TEMPLATES = {
    "llama": "v1",
    "mistral": "mistral",
    "qwen2": "chatml",
    "qwen3": "chatml",
    "gemma": "gemma",
    "gemma2": "gemma",
    "phi3": "phi",
}
"""The packaged template for a language model that brings none which works here."""

TEMPLATE_MARKERS = {
    "<|im_start|>": "chatml",
    "<|start_header_id|>": "llama3",
    "[INST]": "mistral",
    "<start_of_turn>": "gemma",
}
"""Markers that templates write around turns -> the packaged template that writes them too."""


def make_header(image_token: str, *, thinks: bool) -> str:
    """Return what stands before our template in an export; `thinks`: whether the model thinks before its replies."""
    return TEMPLATE_HEADER.replace("%IMAGE%", repr(image_token)).replace("%THINKS%", str(thinks).lower())


def export_template(template: str, image_token: str, *, space_after_image: bool, thinks: bool) -> str:
    """Return our template as transformers' processors take it.

    `space_after_image`: see `CAPTURE_END`; `thinks`: see `processing_messages.thinks`.
    """
    head = make_header(image_token, thinks=thinks)
    return head + (CAPTURE_START + template + CAPTURE_END if space_after_image else template)


def recover_template(template: str, image_token: str) -> str | None:
    """Return our template out of one that `export_template` made; None for others."""
    heads = [make_header(image_token, thinks=thinks) for thinks in (False, True)]
    if (head := next(filter(template.startswith, heads), None)) is None:
        return None
    return template.removeprefix(head).removeprefix(CAPTURE_START).removesuffix(CAPTURE_END)


def accepts_string_contents(template: str) -> bool:
    """Return whether a template renders contents that are strings."""
    content = "\ufdd0"
    try:
        rendered, _ = render_jinja_template(
            [[{"role": "user", "content": content}]], chat_template=template, bos_token="", eos_token=""
        )
    except Exception:  # whatever a foreign template does with a string
        return False
    return content in rendered[0]


def find_working_template(texts: list[str], image_token: str) -> str | None:
    """Return the first of a folder's templates that works here; None where none does."""
    for text in texts:
        if (ours := recover_template(text, image_token)) is not None:
            return ours
        if accepts_string_contents(text):
            return text
    return None


def default_template(text_type: str, texts: list[str]) -> str:
    """Return the name of a packaged template for a folder whose own ones, the `texts`, do not work here.

    It is the one that writes turns as one of the texts does, else the one for the language model's `model_type`.
    """
    for text in texts:
        for mark, name in TEMPLATE_MARKERS.items():
            if mark in text:
                return name
    if text_type not in DEFAULT_TEMPLATES:
        raise ValueError(
            f"the source has no usable chat template, and there is no default for model_type={text_type}: name "
            "one with --template (plain, v1, chatml, llama3, mistral, gemma, phi or a .jinja file)"
        )
    return DEFAULT_TEMPLATES[text_type]
