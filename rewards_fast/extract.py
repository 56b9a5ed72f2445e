"""Finds the CIF inside a model's answer: chat markup, `<think>` passages, code fences and prose around it go.

What stands inside the CIF is never repaired: a row with a missing number stays as it was written.
"""

from __future__ import annotations


def extract_cif(answer: str) -> str:
    """The CIF in a model's answer; the answer without its chat markup where no `data_` block is seen.

    1. Only the last assistant turn counts; `<think>` passages are dropped, an unclosed one to the end.
    2. Of code fences that hold a `data_` line the last one is taken (an open fence runs to the end).
    3. Prose before the first `data_` line goes, and so does prose behind the last row: from the first line
       after the last key (`_name`, `loop_`) that has three or more plain words.

    `PVCP.score` does the same in its threads (csrc/pvcp/extract.cpp).
    """
    from rewards_fast import _core

    return _core.extract_cif(answer)
