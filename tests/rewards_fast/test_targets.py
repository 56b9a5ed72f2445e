"""Formulas as pymatgen reads them, the target of a prompt, targets kept as JSON, and answers without any."""

import logging
import pickle
import time
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.core import Composition, DummySpecies

from rewards_fast import PVCP, parse_target
from rewards_fast.targets import MissingTargets, is_empty, prompt_target
from tests.rewards_fast.cif_texts import SLAB, TARGET

PT3CU = {"Pt": 3, "Cu": 1}


def pymatgen_counts(formula: str) -> dict[str, float] | None:
    """Counts by pymatgen, None where it refuses or names what is not an element."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = Composition(formula)
    except Exception:
        return None
    if any(isinstance(species, DummySpecies) for species in found):
        return None
    return {k: v for k, v in found.get_el_amt_dict().items() if v > 1e-3}


FORMULAS = [
    "Pt3Cu", "Pt3 Cu", "Pt 3 Cu 1", "Pt3CuCO", "Pt0.5Cu1.5", "Pt.5", "Pt3.", "Pt1e2", "Pt(OH)2", "[Pt(OH)2]3",
    "{Pt3}2", "Pt@C", "D2O", "T2O", "CO", "Co", "NaN", "CuSO4.5H2O", "Pt 3 4", "Pt3 4", "P t3", "P T3",
    "Pt3Cu*2", "Pt3**Cu", "Pt-3", "Pt3-Cu", "Pt1.5.2", "pt3cu", "Qq", "Pt3Cu4X", "Vac2Pt", "Fe3+", "Pt+",
    "Pt\u2083Cu", "CoO2\u00b7H2O", "Li(3)", "()Pt", "(Pt3", "Pt3)", "Pt:3", "composition", "Pt3Cu (1 1 1)",
    "Pt(OH", "a Pt3Cu", "Pt3Cu alloy", "1", "*", " Pt3Cu ", "Pt1e", "Pt,Cu", "Pt3Cu.", "Pt/Cu", "Pt3Cu1;",
    "Pt\n3", "Ac2Lr", "C60H0",
]  # fmt: skip


@pytest.mark.parametrize("formula", FORMULAS)
def test_a_formula_is_what_pymatgen_reads(formula: str) -> None:
    expected = pymatgen_counts(formula)
    if expected is None:
        with pytest.raises(ValueError):
            parse_target(formula)
    else:
        assert parse_target(formula) == pytest.approx(expected)


PIECES = ["Pt", "Cu", "C", "O", "H", "N", "D", "Co", "2", "12", "0.5", ".5", "e1", "(", ")", "[", "]", " ",
          "*", "-", "x", "@", "1.5.2", "X"]  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=9))
def test_no_formula_is_read_otherwise_than_by_pymatgen(pieces: list[str]) -> None:
    """Whatever we accept has pymatgen's counts; nothing that it refuses is accepted."""
    formula = "".join(pieces)
    try:
        found = parse_target(formula)
    except ValueError:
        return
    expected = pymatgen_counts(formula)
    assert found == pytest.approx(expected or {}), formula
    assert expected is not None or not formula.strip()


@pytest.mark.parametrize("formula", ["PT3CU", "PT", "PD3", "CD4", "CO</s>PT9CU3 (1 1 1)"])
def test_capitals_that_spell_another_element_are_refused(formula: str) -> None:
    """pymatgen itself takes `PT3CU` for P, tritium, C and U; whoever writes it means platinum."""
    with pytest.raises(ValueError, match=r"capitals|cannot read the prompt"):
        parse_target(formula)
    assert parse_target("D2O") == {"H": 2, "O": 1} and parse_target({"P": 1, "T": 3}) == {"P": 1, "H": 3}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"Pt": 3, "Cu": 1}', PT3CU),
        (' {"Pt": 3, "Cu": 1, "Ni": null} ', PT3CU),
        ('"Pt3Cu"', PT3CU),
        ('"CO</s>Pt3Cu (1 1 1)"', {"C": 1, "O": 1, **PT3CU}),
        ("null", {}),
        ("{}", {}),
        ('""', {}),
        ("{Pt3}2", {"Pt": 6}),
    ],
)
def test_targets_kept_as_json(text: str, expected: dict[str, float]) -> None:
    assert parse_target(text) == expected


@pytest.mark.parametrize("text", ['{"Pt": "3"}', '{"Pt": [3]}', '{"Qq": 1}', '{"Pt": 3', "[1]", '["Pt"]',
                                  '"pt"', '{"Pt": NaN}', '{"Pt": true}x'])  # fmt: skip
def test_json_that_is_not_a_target_is_an_error(text: str) -> None:
    with pytest.raises((ValueError, TypeError)):
        parse_target(text)


def chatml(*turns: tuple[str, str]) -> str:
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)


SYSTEM = "You write CIFs. Example: OH</s>Ni9 (1 0 0) has nine Ni."
PROMPTS = {
    "text": f"{TARGET} Please generate the CIF.",
    "chat": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": TARGET}],
    "few shots": [
        {"role": "user", "content": "NH</s>Fe4 (1 1 0)"},
        {"role": "assistant", "content": "NO</s>Co4 (1 1 0)"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": TARGET}]},
    ],
    "example first": f"As NH</s>Fe4 (1 1 0) was done, now do {TARGET}.",
    "chatml": chatml(("system", SYSTEM), ("user", TARGET)) + "<|im_start|>assistant\n",
    "chatml, tokens skipped": f"system\n{SYSTEM}\nuser\n{TARGET}\nassistant\n",
    "llama": "<|start_header_id|>system<|end_header_id|>\n\n"
        f"{SYSTEM}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        f"{TARGET}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "gemma": "<start_of_turn>user\nNH</s>Fe4 (1 1 0)<end_of_turn>\n<start_of_turn>model\nno<end_of_turn>\n"
        f"<start_of_turn>user\n{TARGET}<end_of_turn>\n<start_of_turn>model\n",
    "mistral": f"<s>[INST] OH</s>Ni9 (1 0 0) [/INST] Hello</s>[INST] {TARGET} Please [/INST]",
    "glm": f"<|system|>\n{SYSTEM}<|user|>\n{TARGET}<|assistant|>\n",
    "deepseek": f"{SYSTEM}<｜User｜>{TARGET}<｜Assistant｜>",
}  # fmt: skip


@pytest.mark.parametrize("case", PROMPTS)
def test_the_target_of_a_prompt_is_the_last_that_the_user_names(case: str) -> None:
    assert prompt_target(PROMPTS[case]) == TARGET  # type: ignore[arg-type]
    if isinstance(PROMPTS[case], str):
        assert parse_target(PROMPTS[case]) == parse_target(TARGET)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "prompt",
    [
        "Please make a slab of platinum and copper.",
        [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "A slab of Pt3Cu, please."}],
        [{"role": "user", "content": TARGET}, {"role": "assistant", "content": SLAB},
         {"role": "user", "content": "Again."}],
        chatml(("system", SYSTEM), ("user", "A slab, please.")),
        [{"role": "assistant", "content": TARGET}],
        [],
        "CO</s>PT3CU (1 1 1)",
    ],
)  # fmt: skip
def test_what_others_say_is_not_the_target(prompt: object) -> None:
    assert prompt_target(prompt) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("gap", ["1", "1 1"])
def test_a_long_gap_in_a_prompt_takes_linear_time(gap: str) -> None:
    begin = time.process_time()
    assert prompt_target(f"CO</s>A({gap}" + " " * 32_000 + "x") is None
    assert time.process_time() - begin < 1.0
    assert prompt_target("say CO</s>Pt9Cu3 ( 1 ,-1,  0 )") == "CO</s>Pt9Cu3 ( 1 ,-1,  0 )"


def test_a_wrong_target_names_its_row() -> None:
    with pytest.raises(ValueError, match=r"row 2: .*pt3cu"):
        PVCP().score([SLAB] * 3, ["Pt", None, "pt3cu"])


def test_missing_targets_are_counted_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    watch = MissingTargets("here")
    assert watch.count(["Pt", TARGET]) == [False, False] and not caplog.records
    assert watch.count([None, "", {}, {"Pt": None}, " ", "null", "Pt"], hint="Look.") == [True] * 6 + [False]
    as_json = ["{ }", '{"Pt": null}', ' {"Pt": 0, "Cu": 0.0}', '" "', '{"Pt": 0, "Cu": 1}', "{Pt3}2", '"Pt"']
    assert [is_empty(target) for target in as_json] == [True] * 4 + [False] * 3
    watch.count([None])
    assert (watch.seen, watch.missing) == (10, 7)
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "here: 6 of 7 answers" in caplog.text and "Look." in caplog.text
    with pytest.raises(ValueError, match="here: row 1 has no target"):
        watch.count(["Pt", None], "error")
    caplog.clear()
    MissingTargets("there").count([None], "ignore")
    assert not caplog.records
    sent = pickle.loads(pickle.dumps(watch))  # Ray sends a function with what it uses
    assert (sent.where, sent.seen, sent.missing) == ("here", 0, 0) and sent.count([None], "ignore") == [True]
