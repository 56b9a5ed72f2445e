"""Finds the CIF inside a model's answer: chat markup, `<think>` passages, code fences and prose around it go.

What stands inside the CIF is never repaired: a row with a missing number stays as it was written.
"""

from __future__ import annotations

import re

_CHAT_TURN = re.compile(
    r"<\|im_start\|>\s*assistant\b|<\|start_header_id\|>\s*assistant\s*<\|end_header_id\|>"
)
_CHAT_END = re.compile(r"<\|im_end\|>|<\|endoftext\|>|<\|eot_id\|>|<\|end_of_text\|>|</s>\s*\Z")
_THINK = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL | re.IGNORECASE)
_FENCE = re.compile(r"^[ \t]{0,3}(```+|~~~+)[^\n]*$", re.MULTILINE)
_BLOCK = re.compile(r"^[^\S\n]*data_", re.MULTILINE)
_INLINE_BLOCK = re.compile(r"(?<=[\s:])data_")
_KEY = re.compile(r"^[^\S\n]*(?:_|loop_|data_|;)", re.MULTILINE)
_WORD = re.compile(r"[(*\"']*[A-Za-z]?[a-z]+(?:['’][a-z]+)?[.,:;!?)*\"']*\Z")
_WORDS_OF_PROSE = 3


def extract_cif(answer: str) -> str:
    """The CIF in a model's answer; the answer without its chat markup where no `data_` block is seen.

    1. Only the last assistant turn counts; `<think>` passages are dropped, an unclosed one to the end.
    2. Of code fences that hold a `data_` line the last one is taken (an open fence runs to the end).
    3. Prose before the first `data_` line goes, and so does prose behind the last row: from the first line after
       the last key (`_name`, `loop_`) that has three or more plain words.
    """
    if "<" in answer:
        answer = _without_markup(answer)
    if "```" in answer or "~~~" in answer:
        answer = _fenced(answer)
    block = _BLOCK.search(answer)
    if block is None:
        block = _INLINE_BLOCK.search(answer)
        if block is None:
            return answer
    start = block.start()
    return _without_epilogue(answer[start:] if start else answer)


def _without_markup(answer: str) -> str:
    turns = [turn.end() for turn in _CHAT_TURN.finditer(answer)]
    if turns:
        answer = answer[turns[-1] :]
    if (
        "</think>" in answer.lower() and "<think>" not in answer.lower()
    ):  # the template opened it in the prompt
        answer = answer[answer.lower().rindex("</think>") + len("</think>") :]
    answer = _THINK.sub("", answer)
    end = _CHAT_END.search(answer)
    return answer if end is None else answer[: end.start()]


def _fenced(answer: str) -> str:
    """The last fenced passage with a `data_` line; the answer itself when no fence has one."""
    found = None
    opened: tuple[str, int] | None = None
    for fence in _FENCE.finditer(answer):
        marker = fence.group(1)
        if opened is None:
            opened = (marker, fence.end() + 1)
        elif marker[0] == opened[0][0] and len(marker) >= len(opened[0]):
            passage = answer[opened[1] : fence.start()]
            found = passage if _BLOCK.search(passage) else found
            opened = None
    if opened is not None:
        passage = answer[opened[1] :]
        found = passage if _BLOCK.search(passage) else found
    return answer if found is None else found


def _is_prose(line: str) -> bool:
    words = 0
    for token in line.split():
        words += len(token) > 1 and _WORD.match(token) is not None
        if words == _WORDS_OF_PROSE:
            return True
    return False


def _without_epilogue(cif: str) -> str:
    """Cuts prose behind the last row. A text whose last line is a row of numbers has none: that costs nothing."""
    last = cif[-400:].rstrip().rpartition("\n")[2]
    if any(c.isdigit() for c in last) and not _is_prose(last):
        return cif
    tail = 0
    for key in _KEY.finditer(cif):
        tail = key.start()
    position = cif.find("\n", tail) + 1
    while 0 < position < len(cif):
        end = cif.find("\n", position)
        end = len(cif) if end < 0 else end
        line = cif[position:end]
        if "'" not in line[:1] and '"' not in line[:1] and _is_prose(line):
            return cif[:position]
        position = end + 1
    return cif
