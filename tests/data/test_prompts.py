"""The prompts against the paper's Appendix C.3 and Qwen's own chat template."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jinja2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from catmllm.data.prompts import (
    CIF_ANSWER,
    DESIGN_ANSWER,
    END,
    ENERGY,
    GRAPH,
    PROPERTY_ANSWER,
    Sample,
    Words,
    chat,
    cif_prompt,
    cif_sample,
    design_prompt,
    design_sample,
    draw_words,
    jitter,
    phrasings,
    property_prompt,
    property_sample,
    read_energy,
)
from catmllm.structure.cif import read_cif, write_cif
from catmllm.structure.system import System
from catmllm.structure.text import three_part_text

# Appendix C.3 of arXiv 2605.17254v4, as printed.
IDENTITY = "CHCH2OH</s>Ca8Ga16 (1 0 0)"
PAPER_CIF = (
    "CHCH2OH</s>Ca8Ga16 (1 0 0) is the basic identification and chemical formula of a crystal material. "
    "Please generate the corresponding CIF (Crystallographic Information File) according to this information."
)
PAPER_CIF_ANSWER = "Ok, the CIF file I generated is as follows:\ndata_CHCH2OH</s>Ca8Ga16 (1 0 0)\nloop_\n"
PAPER_TEXT = "CHCH2OH</s>CaGa2 (1 0 0)</s>[O Ca Ca bridge [Ca O] [Ca O]]"
PAPER_PROPERTY = (
    "<image>\nThat\u2019s some information about the molecule:\n"
    "CHCH2OH</s>CaGa2 (1 0 0)</s>[O Ca Ca bridge [Ca O] [Ca O]].\nPlease predict its relaxed energy."
)
PAPER_DESIGN = (
    "Design a CIF file for the catalytic adsorption system CHCH2OH</s>Ca8Ga16 (1 0 0) with a target relaxed "
    "energy of -3.88 eV."
)
PAPER_DESIGN_ANSWER = (
    "Ok, the designed CIF file that meets the energy requirement is:\n"
    "data_CHCH2OH</s>Ca8Ga16 (1 0 0)\nloop_\n"
)
PAPER_ENERGY = "The relaxed energy of this molecule is -3.88494148 eV."

# The core of the chat template of Qwen's tokenizer_config.json, for messages that are plain text.
QWEN_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% "
    "endif %}"
)


def qwen(user: str) -> str:
    return jinja2.Template(QWEN_TEMPLATE, keep_trailing_newline=True).render(
        messages=[{"role": "user", "content": user}], add_generation_prompt=True
    )


def test_the_literals_here_are_the_papers(shared: Path) -> None:
    paper = (shared / "paper.txt").read_text(encoding="utf-8")
    for text in (
        PAPER_CIF,
        PAPER_CIF_ANSWER,
        PAPER_PROPERTY,
        PAPER_DESIGN,
        PAPER_DESIGN_ANSWER,
        PAPER_ENERGY,
    ):
        assert text in paper


def test_prompts_are_the_papers_word_for_word_in_qwens_frame() -> None:
    assert cif_prompt(IDENTITY) == qwen(PAPER_CIF)
    assert design_prompt(IDENTITY, -3.88494148) == qwen(PAPER_DESIGN)
    assert design_prompt(IDENTITY, -3.88494148, exemplar=True) == qwen(f"{GRAPH}\n{PAPER_DESIGN}")
    with_graph = PAPER_PROPERTY.replace("<image>", GRAPH)
    assert property_prompt(PAPER_TEXT, graph=True) == qwen(with_graph) + ENERGY
    without = PAPER_PROPERTY.removeprefix("<image>\n")
    assert property_prompt(PAPER_TEXT, graph=False) == qwen(without) + ENERGY


def test_answers_are_the_papers() -> None:
    assert CIF_ANSWER.format(cif=f"data_{IDENTITY}\nloop_\n") == PAPER_CIF_ANSWER
    assert DESIGN_ANSWER.format(cif=f"data_{IDENTITY}\nloop_\n") == PAPER_DESIGN_ANSWER
    stem = PROPERTY_ANSWER.format(energy=-3.88494148)
    assert stem == PAPER_ENERGY.replace("-3.88494148", "-3.885")  # three decimals, as in a CIF


def test_graph_alone_says_nothing_of_the_system(train_systems: list[System]) -> None:
    sample = property_sample(train_systems[0], "graph")
    assert sample.prompt == qwen(f"{GRAPH}\nPlease predict its relaxed energy.") + ENERGY
    with pytest.raises(ValueError, match="text, the graph or both"):
        property_prompt(None, graph=False)


def test_samples_of_every_task(train_systems: list[System]) -> None:
    system = train_systems[7]
    other = train_systems[8]
    for mode, graphs in (("both", 1), ("graph", 1), ("text", 0)):
        sample = property_sample(system, mode)  # type: ignore[arg-type]
        assert sample.prompt.count(GRAPH) == graphs == (sample.graph is not None)
        assert sample.prompt.endswith(ENERGY) and sample.prompt.count(ENERGY) == 1
        assert (f"{system.adsorbate}</s>{system.bulk} " in sample.prompt) == (mode != "graph")
        assert sample.energy == system.energy
        assert sample.answer == f"The relaxed energy of this molecule is {system.energy:.3f} eV.{END}"
    assert property_sample(system, "both", other).graph is other
    assert property_sample(replace(system, energy=None)).answer == ""

    cif = write_cif(system).rstrip("\n")
    sample = cif_sample(system)
    assert (sample.graph, sample.prompt) == (None, cif_prompt(system.identity))
    assert sample.answer == f"Ok, the CIF file I generated is as follows:\n{cif}{END}"
    for exemplar in (None, other):
        sample = design_sample(system, exemplar)
        assert sample.graph is exemplar and sample.prompt.count(GRAPH) == (exemplar is not None)
        assert sample.answer.endswith(f"energy requirement is:\n{cif}{END}")
        assert sample.prompt == design_prompt(system.identity, system.known_energy, exemplar is not None)
    with pytest.raises(ValueError, match="energy"):
        design_sample(replace(system, energy=None), None)
    unknown = replace(system, miller=None)
    assert cif_sample(unknown).prompt == cif_prompt(system.identity.partition(" (")[0])


def test_the_cif_of_an_answer_is_the_system(train_systems: list[System]) -> None:
    system = train_systems[3]
    answer = design_sample(system, None).answer.removesuffix(END)
    read = read_cif(answer[answer.index("data_") :])
    assert read.identity == system.identity
    difference = (read.frac - system.frac + 0.5) % 1.0 - 0.5
    assert np.abs(difference).max() <= 0.5e-3 + 1e-9


@given(
    energy=st.floats(-50, 50).map(lambda e: round(e, 3)),
    prose=st.text(st.characters(exclude_categories=["Nd"])),
)
def test_the_energy_of_an_answer_is_read_back(energy: float, prose: str) -> None:
    answer = PROPERTY_ANSWER.format(energy=energy)
    assert read_energy(answer) == energy
    assert read_energy(prose + answer) == energy
    assert read_energy(prose) is None


@pytest.mark.parametrize(
    ("answer", "energy"),
    [
        (PAPER_ENERGY, -3.88494148),
        ("-1.5eV", -1.5),
        ("between -2 eV and -1.25 eV", -1.25),
        ("about 3", None),
        ("", None),
        ("The relaxed energy of this molecule is -. eV.", None),
    ],
)
def test_energies_that_models_write(answer: str, energy: float | None) -> None:
    assert read_energy(answer) == energy


def test_noise_is_gaussian_in_angstrom_and_leaves_the_rest(train_systems: list[System]) -> None:
    system, rng = train_systems[5], np.random.default_rng(0)
    moved = [jitter(system, 0.1, rng) for _ in range(400)]
    steps = np.array([m.positions - system.positions for m in moved])
    assert steps.std() == pytest.approx(0.1, rel=0.03)  # 16,800 draws: 6 standard errors
    assert abs(steps.mean()) < 0.005
    per_axis = steps.reshape(-1, 3).std(0)
    np.testing.assert_allclose(per_axis, 0.1, rtol=0.06)  # Cartesian, whatever the cell's shape
    assert moved[0].energy == system.energy and moved[0].tags is system.tags
    assert jitter(system, 0.0, rng) is system


def test_chat_puts_the_tail_after_the_frame() -> None:
    assert chat("hello", "Sure") == qwen("hello") + "Sure"


def test_the_papers_words_are_the_default_and_the_first() -> None:
    assert {name: some[0] for name, some in phrasings().items()} == vars(Words())
    assert draw_words(np.random.default_rng(0), "paper") == Words()
    assert all(len(set(some)) == len(some) >= 4 for some in phrasings().values())


def test_every_phrasing_says_all_that_the_papers_says(train_systems: list[System]) -> None:
    system = train_systems[0]
    for name, some in phrasings().items():
        for phrasing in some:
            words = replace(Words(), **{name: phrasing})
            samples = {
                "cif": cif_sample(system, words=words),
                "property": property_sample(system, words=words),
                "property_graph": property_sample(system, "graph", words=words),
                "design_by_energy": design_sample(system, None, words=words),
            }
            prompt = samples[name].prompt
            assert prompt != paper_samples(system)[name].prompt or phrasing == some[0]
            if name in ("cif", "design_by_energy"):
                assert system.identity in prompt
            if name == "property":
                assert three_part_text(system) in prompt
            if name == "property_graph":
                assert GRAPH in prompt and system.bulk not in prompt
            if name == "design_by_energy":
                assert f"{system.energy:.2f} eV" in prompt
            assert "{" not in prompt and prompt.startswith("<|im_start|>user\n")
            for other in samples:
                assert samples[other].answer == paper_samples(system)[other].answer


def paper_samples(system: System) -> dict[str, Sample]:
    return {
        "cif": cif_sample(system),
        "property": property_sample(system),
        "property_graph": property_sample(system, "graph"),
        "design_by_energy": design_sample(system, None),
    }


def test_words_are_drawn_by_the_seed_and_all_of_them() -> None:
    drawn = [draw_words(np.random.default_rng(k)) for k in range(200)]
    assert drawn == [draw_words(np.random.default_rng(k)) for k in range(200)]
    for name, some in phrasings().items():
        assert {getattr(words, name) for words in drawn} == set(some)
