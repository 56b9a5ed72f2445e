"""Whose words a reward may read: the last assistant message of an answer, the last user message of a prompt.

An agent loop hands over messages (`{"role": ..., "content": ...}`, mappings or objects) or one text with the
turns in it, the special tokens kept or skipped. What a tool or a user says is never the model's answer, and
neither is a call of a tool.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

Answer = Literal["last", "any"]
Conversation = str | Sequence[Any]

ASSISTANT = frozenset({"assistant", "model", "ai", "gpt"})
USER = frozenset({"user", "human"})

_ROLE = r"assistant|model|user|human|system|developer|tool|function|ipython|observation|environment"
# Where a turn begins, by the templates of ChatML (Qwen), Llama 3, Gemma, GLM and Phi, Harmony, DeepSeek,
# Mistral; and what is left of ChatML's and of Llama's where the special tokens were skipped: the role alone
# on a line, or glued to a bracket.
_TURN = re.compile(
    rf"<\|im_start\|>\s*(?P<a>{_ROLE})\b[^\n<]*\n?"
    rf"|<\|start_header_id\|>\s*(?P<b>{_ROLE})\s*<\|end_header_id\|>"
    rf"|<start_of_turn>\s*(?P<c>{_ROLE})\b"
    rf"|<\|(?P<d>{_ROLE})\|>"
    rf"|<\|start\|>(?P<e>{_ROLE})\b(?:<\|channel\|>\w+)?(?:<\|message\|>)?"
    r"|<｜(?P<f>User|Assistant)｜>"
    r"|(?P<inst>\[INST\])|(?P<inst_end>\[/INST\])|(?P<result>\[TOOL_RESULTS\])|(?P<result_end>\[/TOOL_RESULTS\])"
    r"|^(?P<g>assistant|user|system|tool|ipython)[ \t]*\n"
    r"|(?<=[^\s\w<|/])(?P<h>assistant|user|ipython)\n\n",
    re.MULTILINE,
)
_MARKS = {"inst": "user", "inst_end": "assistant", "result": "tool", "result_end": "assistant"}
# Passages inside a turn that are a tool's, by the tags that environments put around them,
# and calls of a tool.
_RESULTS = (
    "tool_response", "tool_result", "tool_results", "tool_output", "function_results", "function_response",
    "observation", "information", "interpreter",
)  # fmt: skip
_CALLS = ("tool_call", "tool_calls", "function_call", "function_calls")
_OPENED = re.compile(rf"<({'|'.join((*_RESULTS, *_CALLS))})>")
# A text without any of these has one turn: finding that out costs a microsecond, the patterns above twenty.
_SIGNS = (
    "ssistant", "user", "human", "model", "tool", "TOOL_", "INST]", "｜", "ipython", "observation", "information>",
    "interpreter>", "function", "system", "developer", "environment",
)  # fmt: skip


def _of(message: Any, name: str) -> Any:
    return message.get(name) if isinstance(message, Mapping) else getattr(message, name, None)


def message_text(message: Any) -> str:
    """The text of one message: its content, or the text parts of it; pictures,
    calls and reasoning have none."""
    content = _of(message, "content")
    if content is None or isinstance(content, str):
        return content or ""
    parts = [part if isinstance(part, str) else _text_part(part) for part in content]
    return "".join(parts)


def _text_part(part: Any) -> str:
    if _of(part, "type") not in (None, "text", "output_text", "input_text"):
        return ""
    text = _of(part, "text")
    return text if isinstance(text, str) else ""


def _turns(text: str, first: str) -> Iterator[tuple[str, str]]:
    """Role and words of each turn of a text; what stands before the first mark is `first`'s."""
    role, start = first, 0
    for mark in _TURN.finditer(text):
        if mark.start() > start or start:
            yield role, text[start : mark.start()]
        name = mark.lastgroup or ""
        role, start = _MARKS.get(name) or mark.group(name).lower(), mark.end()
    yield role, text[start:]


def _messages(text: str) -> list[str]:
    """What the assistant says in one turn: its messages are parted by results of tools,
    calls of tools are dropped."""
    if _OPENED.search(text) is None:
        return [text]
    messages, said, start = [], "", 0
    last_thought = text.rfind("</think>")
    never_closed: set[str] = set()
    position = 0
    while found := _OPENED.search(text, position):
        tag = found.group(1)
        close = -1 if tag in never_closed else text.find(f"</{tag}>", found.end())
        position = found.end()
        if close < 0:
            never_closed.add(tag)
            if found.start() < last_thought:  # only spoken of
                continue
            close = len(text)
        said += text[start : found.start()]
        if tag in _RESULTS:
            messages.append(said)
            said = ""
        start = position = min(len(text), close + len(tag) + 3)
    rest = said + text[start:]
    if start < len(text) or said:
        messages.append(rest)
    return messages or [""]


def answer_text(completion: Conversation, answer: Answer = "last", extract: bool = True) -> str:
    """The words of a completion that are scored: those of the last assistant message (`last`),
    or of the last one in which a `data_` stands (`any`).

    completion: a text, or the messages of a conversation (mappings or objects; those without a role are the
    assistant's). A conversation in which the assistant never speaks gives "". extract: False leaves a text as
    it stands.
    """
    if isinstance(completion, str):
        if not extract or not any(sign in completion for sign in _SIGNS):
            return completion
        said = [
            m for role, text in _turns(completion, "assistant") if role in ASSISTANT for m in _messages(text)
        ]
    else:
        own = [m for m in completion if (_of(m, "role") or "assistant") in ASSISTANT]
        said = [message_text(m) for m in own]
        if extract:
            said = [m for text in said for m in (_messages(text) if "<" in text else [text])]
    if answer == "any":
        said = [text for text in said if "data_" in text] or said
    return said[-1] if said else ""


def last_user_message(prompt: Conversation) -> str:
    """What the user said last in a prompt; all of a text without turns; "" where the user never speaks."""
    if isinstance(prompt, str):
        said = [text for role, text in _turns(prompt, "user") if role in USER]
    else:
        said = [message_text(m) for m in prompt if (_of(m, "role") or "user") in USER]
    return said[-1] if said else ""
