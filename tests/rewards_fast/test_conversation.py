"""Which words of an agent loop are scored: those of the last assistant message,
whatever form the turns come in."""

import random
import time
from types import SimpleNamespace
from typing import Any

import pytest

from rewards_fast import PVCP, _core, conversation
from rewards_fast.conversation import answer_text, last_user_message
from tests.rewards_fast.cif_texts import SLAB, TARGET

OTHER = SLAB.replace("Cu", "Ni")  # what somebody else wrote
CALL = '<tool_call>\n{"name": "relax", "arguments": {"cif": "data_x"}}\n</tool_call>'


def say(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


CALLING = say("assistant", None, tool_calls=[{"function": {"name": "relax", "arguments": {"cif": SLAB}}}])

# name: (conversation, last assistant message, last one in which a `data_` stands)
THOUGHT = f"<think>a <tool_call> may help</think>{SLAB}"
PROSE = f"Dear user,\n\nhere is what the assistant made:\n{SLAB}"
ASSISTANT = "<|im_end|>\n<|im_start|>assistant\n"
FINAL = "<|start|>assistant<|channel|>final<|message|>"
RELAX = f'<|channel|>commentary to=functions.relax <|constrain|>json<|message|>{{"cif": "{SLAB}"}}<|call|>'
RELAXED = f"<|start|>functions.relax to=assistant<|channel|>commentary<|message|>{SLAB}<|end|>"
OUTPUTS = "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>", "<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
CALLS = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>relax\n```json\n",
    "\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
)
MUSED = f"[THINK]Not [TOOL_CALLS] or <|python_tag|>.[/THINK]{SLAB}"
CONVERSATIONS: dict[str, tuple[Any, str, str]] = {
    "plain": (SLAB, SLAB, SLAB),
    "one message": ([say("assistant", SLAB)], SLAB, SLAB),
    "parts": ([say("assistant", [{"type": "reasoning", "text": OTHER}, {"type": "text", "text": SLAB}])],
              SLAB, SLAB),
    "an object": ([SimpleNamespace(role="assistant", content=SLAB, tool_calls=None)], SLAB, SLAB),
    "no role": ([{"content": SLAB}], SLAB, SLAB),
    "a tool's structure": (
        [say("assistant", "I ask."), say("tool", SLAB), say("assistant", "No idea.")], "No idea.", "No idea.",
    ),
    "a tool has the last word": ([say("assistant", OTHER), say("tool", SLAB)], OTHER, OTHER),
    "a call has the last word": ([say("assistant", SLAB), say("tool", "ok"), CALLING], "", SLAB),
    "a remark has the last "
    "word": ([say("assistant", SLAB), say("tool", "ok"), say("assistant", "Done.")], "Done.", SLAB),
    "mended after criticism": ([say("assistant", OTHER), say("user", "Wrong metal."), say("assistant", SLAB)],
                               SLAB, SLAB),
    "only tools": ([say("tool", SLAB)], "", ""),
    "nothing": ([], "", ""),
    "chatml": (f"I ask.<|im_end|>\n<|im_start|>tool\n{SLAB}{ASSISTANT}No idea.", "No idea.", "No idea."),
    "chatml, a remark at the end": (
        f"{SLAB}<|im_end|>\n<|im_start|>user\n<tool_response>\n"
        f"ok</tool_response>{ASSISTANT}Done.", "Done.", f"{SLAB}<|im_end|>\n",
    ),
    "chatml, tokens skipped": (
        f"I ask.\n{CALL}\nuser\n<tool_response>\n{SLAB}\n</tool_response>\nassistant\nNo "
        "idea.", "No idea.", "No idea.",
    ),
    "ends with a tool": (f"{OTHER}\nuser\n<tool_response>\n{SLAB}\n"
        "</tool_response>\n", OTHER + "\n", OTHER + "\n"),
    "llama": (
        "I ask.<|eot_id|><|start_header_id|>ipython<|end_header_id|>\n\n"
        f"{SLAB}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nNo idea.",
        "\n\nNo idea.", "\n\nNo idea.",
    ),
    "llama, tokens skipped": ('{"name": "relax"}ipython\n'
        '\n"{' + SLAB + '}"assistant\n\nNo idea.', "No idea.", "No idea."),
    "gemma": (
        f"I ask.<end_of_turn>\n<start_of_turn>user\n{SLAB}<end_of_turn>\n<start_of_turn>model\nNo "
        "idea.", "\nNo idea.", "\nNo idea.",
    ),
    "glm": (f"I ask.<|observation|>\n{SLAB}<|assistant|>\nNo idea.", "\nNo idea.", "\nNo idea."),
    "mistral": (f"I ask.[TOOL_RESULTS]{SLAB}[/TOOL_RESULTS]No idea.", "No idea.", "No idea."),
    "tags of a search": (f"{OTHER}<information>{SLAB}</information>No idea.", "No idea.", OTHER),
    "tags of an interpreter": (f"I run.<interpreter>\n{SLAB}</interpreter>\nNo "
        "idea.", "\nNo idea.", "\nNo idea."),
    "a result without an end": (f"{OTHER}<tool_response>\n{SLAB}", OTHER, OTHER),
    "a call without an end": (f'I call.<tool_call>{{"cif": "{SLAB}', "I call.", "I call."),
    "a tag in a thought": (THOUGHT, THOUGHT, THOUGHT),
    "prose": (PROSE, PROSE, PROSE),
    "harmony": (f"<|channel|>analysis<|message|>{OTHER}<|end|>{FINAL}{SLAB}<|return|>", SLAB + "<|return|>",
                SLAB + "<|return|>"),
    "harmony, a tool has the last word": (f"<|channel|>analysis<|message|>hm<|end|><|start|>assistant{RELAX}"
        f"{RELAXED}", "", ""),
    "harmony, a tool's structure": (f"{RELAX}{RELAXED}{FINAL}No idea.", "No idea.", "No idea."),
    "harmony, the tool named first": (
        f' to=functions.relax<|channel|>commentary <|constrain|>json<|message|>{{"cif": "{SLAB}"}}<|call|>',
        "", "",
    ),
    "harmony, another tool": (f"{FINAL}{OTHER}<|end|><|start|>python to=assistant<|channel|>commentary"
        f"<|message|>{SLAB}<|end|>", OTHER + "<|end|>", OTHER + "<|end|>"),
    "harmony, a channel in what a tool says": (
        f"{FINAL}{OTHER}<|end|><|start|>functions.read to=assistant<|channel|>commentary<|message|>"
        f"<|channel|>final<|message|>{SLAB}", OTHER + "<|end|>", OTHER + "<|end|>",
    ),
    "harmony, unfinished reasoning": (f"<|channel|>analysis<|message|>{SLAB}", "", ""),
    "harmony, a remark before a call": (
        f"<|channel|>commentary<|message|>{SLAB}<|end|><|start|>assistant{RELAX}",
        "", SLAB + "<|end|>"),
    "deepseek": (f"I ask.{CALLS[0]}{SLAB}{CALLS[1]}{OUTPUTS[0]}{SLAB}{OUTPUTS[1]}No idea.", "No idea.",
                 "No idea."),
    "deepseek, a tool has the last word": (f"{OTHER}{OUTPUTS[0]}{SLAB}", OTHER, OTHER),
    "deepseek, single outputs": (f"I ask.<｜tool▁output▁begin｜>{SLAB}<｜tool▁output▁end｜>No idea.",
                                 "No idea.", "No idea."),
    "mistral, a call": (f'I ask.[TOOL_CALLS][{{"name": "relax", "arguments": {{"cif": "{SLAB}"}}}}]</s>',
                        "I ask.", "I ask."),
    "mistral, a call in messages": ([say("assistant", f"I ask.[TOOL_CALLS]relax[ARGS]{SLAB}")],
                                    "I ask.", "I ask."),
    "mistral, a call in a thought": (MUSED, MUSED, MUSED),
    "llama, a call": (f'<|python_tag|>relax.call(cif="{SLAB}")<|eom_id|>', "", ""),
}  # fmt: skip


@pytest.mark.parametrize("case", CONVERSATIONS)
def test_whose_words(case: str) -> None:
    conversation, last, anywhere = CONVERSATIONS[case]
    assert answer_text(conversation) == last
    assert answer_text(conversation, "any") == anywhere


@pytest.mark.parametrize("case", CONVERSATIONS)
def test_the_score_is_that_of_the_assistants_words(case: str) -> None:
    """A structure that a tool or a user wrote never earns a reward;
    one that the assistant wrote always does."""
    conversation, last, _ = CONVERSATIONS[case]
    total = PVCP().score([answer_text(conversation)], TARGET).total[0]
    wrong_metal = PVCP().score([OTHER], TARGET).total[0]
    assert total == pytest.approx(10 if SLAB in last else wrong_metal if OTHER in last else -15)


def test_strict_mode_leaves_a_text_as_it_stands() -> None:
    text = f"{SLAB}<information>x</information>"
    assert answer_text(text, extract=False) == text
    assert answer_text([say("assistant", text), say("tool", SLAB)], extract=False) == text


PIECES = (
    "<|im_start|>", "<|im_end|>", "assistant", "model", "user", "tool", "ipython", "system",
    "<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>", "<|", "|>", "<|start|>",
    "<|channel|>final", "<｜User｜>", "<｜", "[INST]", "[/INST]", "[TOOL_RESULTS]", "[", "<tool_call>",
    "<function_response>", "<information>", "<interpreter>", "<observation>", "<|observation|>", "\n",
    "\n\n", " ", "data_x", "é", "中", "😀", ".", "<think>", "</s>", "<|channel|>", "<|message|>",
    "analysis", " to=functions.relax", "functions.relax", "<|python_tag|>", "[TOOL_CALLS]",
    "<｜tool▁outputs▁begin｜>", "<｜tool▁call▁begin｜>",
)  # fmt: skip


def test_no_turn_is_overlooked() -> None:
    """The engine's quick look passes over a text only where the patterns find nothing in it either."""
    r = random.Random(1)
    passed = 0
    for _ in range(30_000):
        text = "".join(r.choice(PIECES) for _ in range(r.randint(1, 6)))
        if not _core.may_hold_turns(text):
            passed += 1
            assert not conversation._marks(text) and conversation._OPENED.search(text) is None, text
    assert passed > 5000
    assert not _core.may_hold_turns(SLAB) and not _core.may_hold_turns(
        PROSE.replace("assistant", "model") + "é中"
    )


def test_hostile_texts_take_linear_time() -> None:
    for piece, end in (("<tool_call>", "</think>"), ("<tool_response>", ""), ("<|im_start|>user", ""),
                       ("assistant\n", ""), ("<information></information>", ""), ("<|channel|>a", ""),
                       ("<|start|>" + "a" * 150, ""), ("<|start|>assistant" + " " * 150, ""),
                       ("<｜tool▁call▁begin｜>", "</think>"), ("[TOOL_CALLS]", "</think>")):  # fmt: skip
        begin = time.process_time()
        answer_text(piece * (1_000_000 // len(piece)) + end)
        assert time.process_time() - begin < 3.0, piece


def test_last_user_message() -> None:
    assert last_user_message("no turns") == "no turns"
    assert (
        last_user_message([say("user", "a"), say("assistant", "b"), say("user", ["c", {"text": "d"}])])
        == "cd"
    )
    assert last_user_message([say("system", "a")]) == ""
