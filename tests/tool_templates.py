"""Chat templates with tools and thinking, of the forms that models bring, and processors with them."""

from typing import Any

from tests.tiny_parts import byte_tokenizer
from vlm.models import VLMProcessor

QWEN3 = """
{%- if tools -%}
    {{- '<|im_start|>system\\n' -}}
    {%- if messages[0].role == 'system' -%}{{- messages[0].content + '\\n\\n' -}}{%- endif -%}
    {{- '# Tools\\n\\n<tools>' -}}
    {%- for tool in tools -%}{{- '\\n' -}}{{- tool | tojson -}}{%- endfor -%}
    {{- '\\n</tools><|im_end|>\\n' -}}
{%- elif messages[0].role == 'system' -%}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' -}}
{%- endif -%}
{%- set ns = namespace(last=messages | length - 1) -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
    {%- set content = message.content if message.content is string else '' -%}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) -%}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' -}}
    {%- elif message.role == 'assistant' -%}
        {%- set reasoning = '' -%}
        {%- if message.reasoning_content is string -%}
            {%- set reasoning = message.reasoning_content -%}
        {%- elif '</think>' in content -%}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
        {%- endif -%}
        {%- if loop.index0 > ns.last and (loop.last or reasoning) -%}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' -}}
            {{- content.lstrip('\\n') -}}
        {%- else -%}
            {{- '<|im_start|>assistant\\n' + content -}}
        {%- endif -%}
        {%- for tool_call in message.tool_calls or [] -%}
            {%- if (loop.first and content) or not loop.first -%}{{- '\\n' -}}{%- endif -%}
            {%- if tool_call.function -%}{%- set tool_call = tool_call.function -%}{%- endif -%}
            {{- '<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' -}}
            {%- if tool_call.arguments is string -%}{{- tool_call.arguments -}}
            {%- else -%}{{- tool_call.arguments | tojson -}}{%- endif -%}
            {{- '}\\n</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>\\n' -}}
    {%- elif message.role == 'tool' -%}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' -}}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
    {%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}
"""
"""As Qwen3's: earlier thinking is dropped, and a prompt without thinking has an empty block."""

LLAMA3 = """
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}
    {%- set system = messages[0].content | trim -%}{%- set messages = messages[1:] -%}
{%- else -%}{%- set system = '' -%}{%- endif -%}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' -}}
{%- if tools is not none and tools is defined -%}
    {{- 'Environment: ipython\\n' -}}
{%- endif -%}
{{- system + '<|eot_id|>' -}}
{%- if tools -%}
    {%- set first = messages[0].content | trim -%}{%- set messages = messages[1:] -%}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\nGiven these functions:\\n\\n' -}}
    {%- for t in tools -%}{{- t | tojson(indent=4) -}}{{- '\\n\\n' -}}{%- endfor -%}
    {{- first + '<|eot_id|>' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'tool' or message.role == 'ipython' -%}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + message.content + '<|eot_id|>' -}}
    {%- elif 'tool_calls' in message -%}
        {%- if not message.tool_calls | length == 1 -%}
            {{- raise_exception('This model only supports single tool-calls at once!') -}}
        {%- endif -%}
        {%- set tool_call = message.tool_calls[0].function -%}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' -}}
        {{- tool_call.arguments | tojson -}}
        {{- '}<|eot_id|>' -}}
    {%- else -%}
        {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
"""
"""As Llama 3.1's: tools stand in the first question, and a call is all of a reply."""

MISTRAL = """
{{- bos_token -}}
{%- set ns = namespace(last=-1) -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {%- if tools and loop.index0 == ns.last -%}
            {{- '[AVAILABLE_TOOLS]' -}}{{- tools | tojson -}}{{- '[/AVAILABLE_TOOLS]' -}}
        {%- endif -%}
        {{- '[INST] ' + message.content + '[/INST]' -}}
    {%- elif message.tool_calls is defined and message.tool_calls -%}
        {{- '[TOOL_CALLS][' -}}
        {%- for call in message.tool_calls -%}
            {%- if call.id is undefined or call.id | length != 9 -%}
                {{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') -}}
            {%- endif -%}
            {%- set out = call.function | tojson -%}
            {{- out[:-1] + ', "id": "' + call.id + '"}' + (']' if loop.last else ', ') -}}
        {%- endfor -%}
        {{- eos_token -}}
    {%- elif message.role == 'assistant' -%}
        {{- ' ' + message.content | trim + eos_token -}}
    {%- elif message.role == 'tool' -%}
        {{- '[TOOL_RESULTS]{"content": ' + message.content + ', "call_id": "' + message.tool_call_id -}}
        {{- '"}[/TOOL_RESULTS]' -}}
    {%- else -%}{{- raise_exception('Only user, tool and assistant roles are supported') -}}
    {%- endif -%}
{%- endfor -%}
"""
"""As Mistral's: no text stands before a reply, and the token before calls is the model's to write."""

HERMES = """
{%- if tools -%}
    {{- '<|im_start|>system\\nYou may call functions within <tools></tools>: <tools> ' -}}
    {%- for tool in tools -%}{{- tool.function | tojson + ' ' -}}{%- endfor -%}
    {{- '</tools><|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role in ['user', 'system'] or (message.role == 'assistant' and message.tool_calls is not defined) -%}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
    {%- elif message.role == 'assistant' -%}
        {{- '<|im_start|>assistant' -}}
        {%- if message.content -%}{{- '\\n' + message.content -}}{%- endif -%}
        {%- for tool_call in message.tool_calls -%}
            {{- '\\n<tool_call>\\n' -}}{{- tool_call.function | tojson -}}{{- '\\n</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>\\n' -}}
    {%- elif message.role == 'tool' -%}
        {{- '<|im_start|>tool\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
"""As Hermes': calls are dumped whole."""

TEMPLATES = {"qwen3": QWEN3, "llama3": LLAMA3, "mistral": MISTRAL, "hermes": HERMES}
ENDS = {"qwen3": "<|im_end|>", "llama3": "<|eot_id|>", "mistral": "</s>", "hermes": "<|im_end|>"}
MISTRAL_TOKENS = [
    "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
]  # fmt: skip
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def make_processor(image_processor: Any, template: str, eos: str = "<|im_end|>") -> VLMProcessor:
    """A processor with a template; 3 tokens an image."""
    tokenizer = byte_tokenizer(template, bos="<s>", eos=eos)
    tokens = ["<image>", *(MISTRAL_TOKENS if "[INST]" in template else [])]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    return VLMProcessor(image_processor, tokenizer, chat_template=template, tokens_per_image=3)


def make_processors(image_processor: Any) -> dict[str, VLMProcessor]:
    """A processor for each of `TEMPLATES`."""
    return {name: make_processor(image_processor, text, ENDS[name]) for name, text in TEMPLATES.items()}
