"""The ways in which models wrap a CIF: reasoning, tags, chat templates, fences, JSON, prose before and after.

`FORMATS` maps a name to a function from a CIF to an answer whose CIF it is. `DRAFT` is another whole CIF, of
another composition: a format that lets it win is seen by its score.
"""

import json
from collections.abc import Callable

from tests.rewards_fast.cif_texts import SLAB

DRAFT = SLAB.replace("Cu Cu1", "Ni Ni1").replace("data_CO", "data_draft")
HALF = SLAB[: SLAB.index("_atom_site_fract_x")]  # a draft that was given up

Format = Callable[[str], str]


def _around(before: str, after: str = "") -> Format:
    return lambda cif: before + cif + after


def _lines(cif: str, prefix: str) -> str:
    return "".join(prefix + line for line in cif.splitlines(keepends=True))


def _quoted(cif: str) -> str:
    return _lines(cif, "> ")


NOTED = DRAFT.replace("_cell_length_a", "_x\n;\nprose of many words\n;\n_cell_length_a")

CHATML = "<|im_start|>system\nYou write CIFs.<|im_end|>\n<|im_start|>user\nCO on Pt, like\n"
LLAMA = (
    "<|start_header_id|>user<|end_header_id|>\n\n"
    "please<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
)

FORMATS: dict[str, Format] = {
    # reasoning
    "think, answer": _around("<think>\nLet me see.\n</think>\n<answer>\n", "</answer>"),
    "think, answer, one line": _around("<think>hm</think><answer>", "</answer>"),
    "think with a draft": _around(f"<think>First try:\n{DRAFT}\nwrong.</think>\n"),
    "think with a fenced draft": _around(f"<think>\n```cif\n{DRAFT}```\nno</think>\n```cif\n", "```"),
    "think with half a draft": _around(f"<think>{HALF}</think>\n"),
    "think opened in the prompt": _around(f"First try:\n{DRAFT}</think>\n\n"),
    "think opened in the prompt, half a draft": _around(f"{HALF}\n</think>\n"),
    "thinking": _around(f"<thinking>\n{DRAFT}\n</thinking>\n"),
    "reasoning": _around(f"<reasoning>\n{DRAFT}\n</reasoning>\n<answer>\n", "\n</answer>\n"),
    "reasoning, upper case": _around(f"<REASONING>{DRAFT}</REASONING>\n<ANSWER>", "</ANSWER>"),
    "thought": _around(f"<thought>{DRAFT}</thought>\n"),
    "reflection": _around(f"<reflection>{DRAFT}</reflection>\n<output>\n", "</output>"),
    "scratchpad": _around(f"<scratchpad>\n{DRAFT}\n</scratchpad>\n"),
    "square think": _around(f"[THINK]{DRAFT}[/THINK]"),
    "begin of thought": _around(
        f"<|begin_of_thought|>\n{DRAFT}<|end_of_thought|>\n<|begin_of_solution|>\n", "<|end_of_solution|>"
    ),
    "two thoughts": _around(f"<think>{DRAFT}</think>\nWait.\n<think>{DRAFT}</think>\n"),
    "thought behind the answer": _around("", f"<think>Was that right? {DRAFT}</think>\n"),
    "unfinished thought behind the answer": _around("", f"<think>Once more:\n{DRAFT}"),
    "think with attributes": _around(f'<think time="3s">{DRAFT}</think>\n'),
    "harmony": _around(
        f"<|channel|>analysis<|message|>{DRAFT}<|end|><|start|>assistant<|channel|>final<|message|>",
        "<|return|>",
    ),
    "harmony, a tool's words behind": _around(
        "<|start|>assistant<|channel|>final<|message|>",
        f"<|call|><|start|>functions.relax to=assistant<|channel|>commentary<|message|>{DRAFT}<|end|>",
    ),
    "harmony, thought behind a remark": _around(
        f"<|start|>assistant<|channel|>commentary<|message|>Hm.<|channel|>analysis<|message|>{DRAFT}<|end|>"
    ),
    # tags
    "answer": _around("<answer>", "</answer>"),
    "answer on its lines": _around("<answer>\n", "\n</answer>\n"),
    "cif tag": _around("<cif>\n", "</cif>"),
    "CIF tag, closed behind the number": lambda cif: f"<CIF>{cif.rstrip()}</CIF>",
    "square CIF": _around("[CIF]\n", "[/CIF]"),
    "square CIF, closed behind the number": lambda cif: f"[CIF]{cif.rstrip()}[/CIF]",
    "square answer": _around("[ANSWER]\n", "\n[/ANSWER]\n"),
    "pre": _around("<pre>\n", "</pre>"),
    "pre, code": _around("<pre><code>\n", "</code></pre>\n"),
    "code with a class": _around('<code class="language-cif">\n', "</code>"),
    "xml": _around('<?xml version="1.0"?>\n<structure format="cif">\n', "\n</structure>\n"),
    "response": _around("<response>\n", "</response>"),
    "result": _around("Sure.\n<result>", "</result> Done."),
    "file tag": _around('<file name="slab.cif">\n', "</file>"),
    "details": _around("<details>\n<summary>CIF</summary>\n\n", "\n</details>\n"),
    "artifact": _around('<antArtifact identifier="x" type="text/plain">\n', "</antArtifact>"),
    "answer inside a fence": _around("```\n<answer>\n", "</answer>\n```"),
    "fence inside an answer": _around("<answer>\n```cif\n", "```\n</answer>"),
    "answer, draft before": _around(f"Draft:\n{DRAFT}\nFinal:\n<answer>\n", "</answer>"),
    # fences
    "fence": _around("```cif\n", "```"),
    "fence without a language": _around("```\n", "```\n"),
    "fence with spaces": _around("``` cif \n", "``` \n"),
    "fence behind prose": _around("Here it is: ```cif\n", "```"),
    "fence behind prose, closed behind the number": lambda cif: f"Here it is: ```cif\n{cif.rstrip()}```",
    "fence behind a bullet": _around("- CIF: ```\n", "```\n"),
    "indented fence": lambda cif: f"1. The CIF:\n\n    ```cif\n{_lines(cif, '    ')}    ```\n",
    "fence indented by a tab": lambda cif: f"1. The CIF:\n\t```cif\n{_lines(cif, chr(9))}\t```\n",
    "indented marks": lambda cif: f"    ```cif\n{cif}    ```\n",
    "open fence": _around("```cif\n"),
    "four ticks": _around("````cif\n", "````\n"),
    "tildes": _around("~~~cif\n", "~~~\n"),
    "tildes behind prose": _around("This:\n~~~~\n", "~~~~\nDone."),
    "braces": _around("```{.cif .numberLines}\n", "```\n"),
    "another fence before": _around("```python\nprint('data_')\n```\n```cif\n", "```"),
    "another fence behind": _around("```cif\n", "```\nRead it with\n```python\nread('a.cif')\n```\n"),
    "draft in a fence": _around(f"```cif\n{DRAFT}```\nThat has Ni. Corrected:\n```cif\n", "```"),
    "half a draft in a fence": _around(f"```cif\n{HALF}```\nAgain:\n```cif\n", "```\n"),
    "bare draft, then a fence": _around(f"{DRAFT}\nCorrected:\n```cif\n", "```\n"),
    "quotation": lambda cif: f"You asked for:\n\n{_lines(cif, '> ')}\nDone.",
    "indented": lambda cif: f"The CIF:\n\n{_lines(cif, '    ')}",
    "quotation, draft quoted before": lambda cif: f"{_quoted(DRAFT)}\nBetter:\n{_quoted(cif)}",
    "quotation of a draft": _around(f"{_quoted(DRAFT)}\nMine is:\n"),
    "quotation with a draft in it": lambda cif: _quoted(f"{DRAFT}Better:\n{cif}"),
    "quotation in a fence, half a draft behind": lambda cif: (
        f"```\n{_quoted(cif)}```\nthen\n```\n{_quoted(HALF)}```\n"
    ),
    "indented draft with a text field": _around(f"{_lines(NOTED, '    ')}\nMine is:\n"),
    # JSON
    "json": lambda cif: json.dumps({"cif": cif}),
    "json, indented": lambda cif: json.dumps({"formula": "CO", "cif": cif, "energy": -1.2}, indent=2),
    "json in a fence": lambda cif: f"```json\n{json.dumps({'answer': cif})}\n```\n",
    "json behind prose": lambda cif: f"The answer: {json.dumps({'answer': cif})} as asked.",
    "json behind reasoning": lambda cif: f"<think>hm</think>\n{json.dumps({'cif': cif})}",
    "json with a fence in it": lambda cif: json.dumps({"content": f"Here:\n```cif\n{cif}```\n"}),
    "json list": lambda cif: json.dumps([cif]),
    "json, draft in a fence before": lambda cif: f"```\n{DRAFT}```\n{json.dumps({'cif': cif})}",
    "json, half a draft behind": lambda cif: f"{json.dumps({'cif': cif})}\n{json.dumps({'cif': HALF})}",
    "json, half a draft on its line": lambda cif: json.dumps([DRAFT, cif, HALF]),
    "json of a quotation": lambda cif: json.dumps({"cif": _quoted(cif)}),
    "tool call": lambda cif: (
        f"<tool_call>\n{json.dumps({'name': 'submit', 'arguments': {'cif': cif}})}\n</tool_call>"
    ),
    "python": lambda cif: f"cif = {cif!r}\n",
    # chat templates
    "chatml": _around(CHATML + DRAFT + "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
    "chatml, another turn": _around(
        CHATML + "<|im_end|>\n<|im_start|>assistant\n",
        f"<|im_end|>\n<|im_start|>user\nIs it\n{DRAFT}<|im_end|>\n",
    ),
    "chatml, two answers": _around(
        f"{CHATML}<|im_end|>\n<|im_start|>assistant\n{DRAFT}<|im_end|>\n<|im_start|>user\nNo Ni.<|im_end|>\n"
        "<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "llama 3": _around(LLAMA, "<|eot_id|>"),
    "mistral": _around("<s>[INST] please [/INST]", "</s>"),
    "gemma": _around("<start_of_turn>user\nplease<end_of_turn>\n<start_of_turn>model\n", "<end_of_turn>\n"),
    "phi": _around("<|user|>\nplease<|end|>\n<|assistant|>\n", "<|end|>"),
    "deepseek": _around(
        "<\uff5cUser\uff5c>please<\uff5cAssistant\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"
    ),
    "end of text": _around("", "<|endoftext|>"),
    "end of text behind the number": lambda cif: cif.rstrip() + "<|endoftext|>",
    "padding": _around("", "<|im_end|>" + "<|endoftext|>" * 40),
    "padding before": _around("<|endoftext|>" * 40),
    "pad tokens": _around("", "</s>" + "<pad>" * 40),
    "pad tokens behind the number": lambda cif: cif.rstrip() + "[PAD]" * 40,
    "eos": lambda cif: cif.rstrip() + "<eos>",
    "unk": _around("", "<unk><unk>"),
    "end of sequence": _around("", "</s>"),
    # behind the CIF
    "Done.": _around("", "Done."),
    "END": _around("", "\nEND\n"),
    "rule": _around("", "\n---\n"),
    "rule, prose": _around("", "\n---\n\n**Notes**\n"),
    "stars": _around("", "***\n"),
    "bullets": _around("", "\n- Pt: 3 atoms\n- Cu: 1\n- CO on top\n"),
    "stars as bullets": _around("", "\n* Pt 3\n* Cu 1\n"),
    "numbered": _around("", "\n1. three Pt\n2. one Cu\n"),
    "bold": _around("", "\n**Composition** Pt3Cu\n"),
    "emphasis": _around("", "\n_Note_: relaxed by hand.\n"),
    "heading": _around("", "\n## What it is\nA slab.\n"),
    "Chinese": _around("以下是结构文件：\n", "\n该结构包含三个铂原子和一个铜原子。\n"),
    "Russian": _around("Вот файл CIF:\n", "\nЭто поверхность сплава с молекулой CO.\n"),
    "Japanese": _around("CIFファイルです。\n", "\n以上です。\n"),
    "digits in prose": _around("", "\nThe cell has 6 atoms, 5.5 by 5.5 by 15.0\n"),
    "short lines with digits": _around("", "\n6 atoms\n392.954 A^3\n"),
    "prose, as many words as columns": _around("", "\nI hope that it helps you now\n"),
    "question": _around("", "\nOK?\n"),
    "emoji": _around("Sure! \U0001f600\n", "\n\U0001f600\U0001f600\n"),
    "apostrophes": _around("Here's what you'd asked for:\n", "\nIt's 'good', isn't it?\n"),
    "a key in prose": _around("", "\nI set _cell_length_c to 15 for the vacuum.\n"),
    "data_ in prose": _around(
        "The data_ line names it; _cell keys follow.\n", "\nA data_ block is all you need.\n"
    ),
    "table": _around("", "\n| atom | x |\n|---|---|\n| Pt | 0.5 |\n"),
    "LaTeX": _around("\\boxed{\n", "}\n"),
    "signature": _around("", "\n-- \nYour assistant\n"),
    # before the CIF
    "prose": _around("Ok, the CIF file I generated is as follows:\n"),
    "same line": _around("The answer is: "),
    "colon": _around("CIF:"),
    "heading before": _around("### Response:\n\n"),
    "comment": _around("# generated by a model\n"),
    "windows lines": lambda cif: "Here:\r\n" + cif.replace("\n", "\r\n") + "\r\nDone.\r\n",
    "bare": _around(""),
    "blank lines": _around("\n\n\n", "\n\n\n"),
}
