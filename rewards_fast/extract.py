"""Finds the CIF inside a model's answer: chat markup, reasoning, tags, code fences,
JSON and prose around it go.

What stands inside the CIF is never repaired: a row with a missing number stays as it was written.
"""

from __future__ import annotations


def extract_cif(answer: str) -> str:
    """The CIF of a model's answer: the last whole one outside of reasoning,
    up to what cannot belong to it by CIF's grammar.

    "Whole" is what `extract=False` accepts; where none is, the last one is returned, and the text of the last
    turn where there is no `data_` at all. The rules are in docs/rewards_fast.md, "Which CIF is the answer's".
    `PVCP.score` does the same in its threads (csrc/pvcp/extract.cpp).
    """
    from rewards_fast import _core

    return _core.extract_cif(answer)
