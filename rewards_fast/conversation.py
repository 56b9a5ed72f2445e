"""Whose words a reward may read: the last assistant message of an answer, the last user message of a prompt.

An agent loop hands over messages (`{"role": ..., "content": ...}`, mappings or objects) or one text with the
turns in it, the special tokens kept or skipped. What a tool or a user says is never the model's answer, and
neither is a call of a tool or a message of reasoning.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from rewards_fast._core import may_hold_turns

Answer = Literal["last", "any"]
Conversation = str | Sequence[Any]

ASSISTANT = frozenset({"assistant", "model", "ai", "gpt"})
USER = frozenset({"user", "human"})

# Who speaks where a message of Harmony is reasoning or calls a tool: the assistant, with empty words.
SILENT = "silent"

_ROLE = "assistant|model|user|human|system|developer|tool|function|ipython|observation|environment"
# Behind the name in Harmony: `<|channel|>commentary to=functions.relax <|constrain|>json<|message|>`. Bounded
# and without backtracking, so that what only looks like it takes no time.
_HEADER = r"[^<\n]{0,200}+(?:<\|(?:channel|constrain)\|>[^<\n]{0,200}+){0,3}+<\|message\|>"
_TOOL = r"[\w.-]{1,200}+"
# Where a turn begins, by the templates of ChatML (Qwen), Llama 3, Gemma, GLM and Phi, Harmony, DeepSeek; and
# Mistral's brackets. Each pattern begins with one character, which `re` looks for as fast as `str.find`.
_TOKEN = re.compile(
    rf"<(?:\|im_start\|>\s*(?P<a>{_ROLE})\b[^\n<]*\n?"
    rf"|\|start_header_id\|>\s*(?P<b>{_ROLE})\s*<\|end_header_id\|>"
    rf"|start_of_turn>\s*(?P<c>{_ROLE})\b"
    rf"|\|(?P<d>{_ROLE})\|>"
    rf"|\|start\|>(?P<e>(?:{_ROLE})\b(?:{_HEADER}|(?:<\|channel\|>\w+)?)|{_TOOL}{_HEADER})"
    rf"|\|channel\|>(?P<g>\w+(?:{_HEADER})?)"
    r"|｜(?P<f>User|Assistant)｜>)"
)
_BRACKET = re.compile(r"\[(/?INST|/?TOOL_RESULTS)\]")
_BRACKETS = {"INST": "user", "/INST": "assistant", "TOOL_RESULTS": "tool", "/TOOL_RESULTS": "assistant"}
# What is left of ChatML's marks and of Llama's where the special tokens were skipped: the role alone on a
# line, or glued to what is not a word and followed by a blank line, which alone is looked for here.
_LINE = re.compile(r"\n(?:(assistant|user|tool|ipython|system)(?=\n)|(?=\n))")
_FIRST = re.compile(r"(assistant|user|tool|ipython|system)\n")
_GLUED = ("assistant", "user", "ipython")
_NAME = re.compile(_ROLE)
_SPEAKER = re.compile(rf"(?:{_ROLE})\b|{_TOOL}")
_TO = re.compile(r"(?:^|\s)to=\S")
# Passages inside a turn that are a tool's, by the tags that environments put around them, and calls of a
# tool. Those of Mistral and Llama take the rest of the turn.
_RESULTS = (
    "tool_response", "tool_result", "tool_results", "tool_output", "function_results", "function_response",
    "observation", "information", "interpreter",
)  # fmt: skip
_CALLS = ("tool_call", "tool_calls", "function_call", "function_calls")
_OPENED = re.compile(
    rf"<(?:(?P<tag>{'|'.join((*_RESULTS, *_CALLS))})>|｜tool▁(?P<deepseek>outputs?|calls?)▁begin｜>"
    r"|\|python_tag\|>)"
)
_BRACKET_CALL = "[TOOL_CALLS]"
_OPENED_OR_BRACKET = re.compile(rf"{_OPENED.pattern}|{re.escape(_BRACKET_CALL)}")  # slower


class Mark(NamedTuple):
    """Start and end of a mark of a turn in a text, and whose turn it begins: only if the one before is the
    assistant's, where it `goes_on`."""

    begin: int
    end: int
    role: str
    goes_on: bool = False


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


def _harmony(name: str, header: str) -> str:
    """Whose message of Harmony it is: a name that is no role is a tool's."""
    if name not in ASSISTANT:
        return name if _NAME.fullmatch(name) else "tool"
    reasoning = header.partition("<|channel|>")[2].startswith("analysis")
    return SILENT if reasoning or _TO.search(header) else name


def _token_mark(text: str, mark: re.Match[str]) -> Mark:
    begin, end = mark.span()
    if name := mark.group("e"):
        role = _SPEAKER.match(name)
        return Mark(begin, end, _harmony(role.group().lower() if role else "", name))
    if mark.group("g"):  # the name stands in the prompt
        line = text[max(0, begin - 200) : begin].rpartition("\n")[2].rpartition(">")[2]
        return Mark(begin, end, _harmony("assistant", line + mark.group()), goes_on=True)
    return Mark(begin, end, mark.group(mark.lastgroup or 0).lower())


def _marks(text: str) -> list[Mark]:
    """The marks of turns in a text."""
    found = []
    if "<" in text:
        found += [_token_mark(text, mark) for mark in _TOKEN.finditer(text)]
    if "[" in text:
        for mark in _BRACKET.finditer(text):
            found.append(Mark(mark.start(), mark.end(), _BRACKETS[mark.group(1)]))
    if first := _FIRST.match(text):
        found.append(Mark(0, first.end(), first.group(1)))
    for line in _LINE.finditer(text):
        end = line.end()
        if line.group(1):
            found.append(Mark(line.start() + 1, end + 1, line.group(1)))
            continue
        for role in _GLUED:
            start = line.start() - len(role)
            if text.startswith(role, start) and start > 0 and not _is_word(text[start - 1]):
                found.append(Mark(start, end + 1, role))
    return sorted(found)


def _is_word(letter: str) -> bool:
    return letter.isalnum() or letter in " \t_<|/"


def _turns(text: str, marks: list[Mark], first: str) -> Iterator[tuple[str, str]]:
    """Role and words of each turn of a text; what stands before the first mark is `first`'s."""
    role, start = first, 0
    for begin, end, name, goes_on in marks:
        if begin < start:  # inside another mark
            continue
        if goes_on and role not in ASSISTANT and role != SILENT:
            continue
        if begin > start or start:
            yield role, text[start:begin]
        role, start = name, end
    yield role, text[start:]


def _messages(text: str) -> list[str]:
    """What the assistant says in one turn: its messages are parted by results of tools, calls of tools are
    dropped."""
    opened = _OPENED_OR_BRACKET if _BRACKET_CALL in text else _OPENED
    if opened is _OPENED and ("<" not in text or _OPENED.search(text) is None):
        return [text]
    messages, said, start = [], "", 0
    last_thought = max(text.rfind("</think>"), text.rfind("[/THINK]"))
    never_closed: set[str] = set()
    position = 0
    while found := opened.search(text, position):
        tag, deepseek = found.group("tag", "deepseek")
        end = f"</{tag}>" if tag else f"<｜tool▁{deepseek}▁end｜>" if deepseek else ""
        close = -1 if not end or end in never_closed else text.find(end, found.end())
        position = found.end()
        if close < 0:
            never_closed.add(end)
            if found.start() < last_thought:  # only spoken of
                continue
            close = len(text)
        said += text[start : found.start()]
        if tag in _RESULTS or (deepseek or "").startswith("out"):
            messages.append(said)
            said = ""
        start = position = min(len(text), close + len(end))
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
        said = []
        for role, text in _turns(completion, _marks(completion), "assistant"):
            said += _messages(text) if role in ASSISTANT else [""] if role == SILENT else []
    else:
        own = [m for m in completion if (_of(m, "role") or "assistant") in ASSISTANT]
        said = [message_text(m) for m in own]
        if extract:
            said = [m for text in said for m in _messages(text)]
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
