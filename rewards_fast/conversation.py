"""Whose words a reward may read: the last assistant message of an answer, the last user message of a prompt.

An agent loop hands over messages (`{"role": ..., "content": ...}`, mappings or objects) or one text with the
turns in it, the special tokens kept or skipped. What a tool or a user says is never the model's answer, and
neither is a call of a tool.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from rewards_fast._core import may_hold_turns

Answer = Literal["last", "any"]
Conversation = str | Sequence[Any]

ASSISTANT = frozenset({"assistant", "model", "ai", "gpt"})
USER = frozenset({"user", "human"})

_ROLE = "assistant|model|user|human|system|developer|tool|function|ipython|observation|environment"
# Where a turn begins, by the templates of ChatML (Qwen), Llama 3, Gemma, GLM and Phi, Harmony, DeepSeek; and
# Mistral's brackets. Each pattern begins with one character, which `re` looks for as fast as `str.find`.
_TOKEN = re.compile(
    rf"<(?:\|im_start\|>\s*(?P<a>{_ROLE})\b[^\n<]*\n?"
    rf"|\|start_header_id\|>\s*(?P<b>{_ROLE})\s*<\|end_header_id\|>"
    rf"|start_of_turn>\s*(?P<c>{_ROLE})\b"
    rf"|\|(?P<d>{_ROLE})\|>"
    rf"|\|start\|>(?P<e>{_ROLE})\b(?:<\|channel\|>\w+)?(?:<\|message\|>)?"
    r"|｜(?P<f>User|Assistant)｜>)"
)
_BRACKET = re.compile(r"\[(/?INST|/?TOOL_RESULTS)\]")
_BRACKETS = {"INST": "user", "/INST": "assistant", "TOOL_RESULTS": "tool", "/TOOL_RESULTS": "assistant"}
# What is left of ChatML's marks and of Llama's where the special tokens were skipped: the role alone on a
# line, or glued to what is not a word and followed by a blank line, which alone is looked for here.
_LINE = re.compile(r"\n(?:(assistant|user|tool|ipython|system)(?=\n)|(?=\n))")
_FIRST = re.compile(r"(assistant|user|tool|ipython|system)\n")
_GLUED = ("assistant", "user", "ipython")
# Passages inside a turn that are a tool's, by the tags that environments put around them, and calls of a
# tool.
_RESULTS = (
    "tool_response", "tool_result", "tool_results", "tool_output", "function_results", "function_response",
    "observation", "information", "interpreter",
)  # fmt: skip
_CALLS = ("tool_call", "tool_calls", "function_call", "function_calls")
_OPENED = re.compile(rf"<({'|'.join((*_RESULTS, *_CALLS))})>")


def _of(message: Any, name: str) -> Any:
    return message.get(name) if isinstance(message, Mapping) else getattr(message, name, None)


def message_text(message: Any) -> str:
    """The text of one message: its content, or the text parts of it; pictures, calls and reasoning have
    none."""
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


def _marks(text: str) -> list[tuple[int, int, str]]:
    """Start and end of each mark of a turn in a text, and whose turn it begins."""
    found = []
    if "<" in text:
        for mark in _TOKEN.finditer(text):
            found.append((mark.start(), mark.end(), mark.group(mark.lastgroup or 0).lower()))
    if "[" in text:
        for mark in _BRACKET.finditer(text):
            found.append((mark.start(), mark.end(), _BRACKETS[mark.group(1)]))
    if first := _FIRST.match(text):
        found.append((0, first.end(), first.group(1)))
    for line in _LINE.finditer(text):
        end = line.end()
        if line.group(1):
            found.append((line.start() + 1, end + 1, line.group(1)))
            continue
        for role in _GLUED:
            start = line.start() - len(role)
            if text.startswith(role, start) and start > 0 and not _is_word(text[start - 1]):
                found.append((start, end + 1, role))
    return sorted(found)


def _is_word(letter: str) -> bool:
    return letter.isalnum() or letter in " \t_<|/"


def _turns(text: str, marks: list[tuple[int, int, str]], first: str) -> Iterator[tuple[str, str]]:
    """Role and words of each turn of a text; what stands before the first mark is `first`'s."""
    role, start = first, 0
    for begin, end, name in marks:
        if begin < start:  # inside another mark
            continue
        if begin > start or start:
            yield role, text[start:begin]
        role, start = name, end
    yield role, text[start:]


def _messages(text: str) -> list[str]:
    """What the assistant says in one turn: its messages are parted by results of tools, calls of tools are
    dropped."""
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
    """The words of a completion that are scored: those of the last assistant message (`last`), or of the
    last one in which a `data_` stands (`any`).

    completion: a text, or the messages of a conversation (mappings or objects; those without a role are the
    assistant's). A conversation in which the assistant never speaks gives "". extract: False leaves a text
    as it stands.
    """
    if isinstance(completion, str):
        if not extract or not may_hold_turns(completion):
            return completion
        turns = _turns(completion, _marks(completion), "assistant")
        said = [message for role, text in turns if role in ASSISTANT for message in _messages(text)]
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
        said = [text for role, text in _turns(prompt, _marks(prompt), "user") if role in USER]
    else:
        said = [message_text(m) for m in prompt if (_of(m, "role") or "user") in USER]
    return said[-1] if said else ""
