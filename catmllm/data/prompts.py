"""The three instruction tasks in the words of the paper's Appendix C.3, and the chat frame around them.

A sample is plain text with two markers: `<graph>` stands where the vectors of a structure go in, `<energy>`
is the query token whose final hidden state the energy head reads. Word-for-word templates; only the graph
marker stands where the paper writes its image marker. Further ways to ask are in phrasings.json; answers are
always the paper's.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from catmllm.structure.cif import write_cif
from catmllm.structure.formula import SEPARATOR
from catmllm.structure.system import System
from catmllm.structure.text import three_part_text

GRAPH, ENERGY = "<graph>", "<energy>"
START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"

CIF_PROMPT = (
    "{identity} is the basic identification and chemical formula of a crystal material. Please generate the "
    "corresponding CIF (Crystallographic Information File) according to this information."
)
CIF_ANSWER = "Ok, the CIF file I generated is as follows:\n{cif}"
PROPERTY_PROMPT = "That’s some information about the molecule:\n{text}.\nPlease predict its relaxed energy."
PROPERTY_GRAPH_ONLY = "Please predict its relaxed energy."
PROPERTY_ANSWER = "The relaxed energy of this molecule is {energy:.3f} eV."
DESIGN_PROMPT = (
    "Design a CIF file for the catalytic adsorption system {identity} with a target relaxed energy of "
    "{energy:.2f} eV."
)
DESIGN_ANSWER = "Ok, the designed CIF file that meets the energy requirement is:\n{cif}"


@dataclass(frozen=True)
class Words:
    """How the questions of the three tasks are asked; the default is the paper's way."""

    cif: str = CIF_PROMPT
    property: str = PROPERTY_PROMPT
    property_graph: str = PROPERTY_GRAPH_ONLY  # without the text of the system
    design_by_energy: str = DESIGN_PROMPT


PAPER = Words()


@functools.cache
def phrasings() -> dict[str, tuple[str, ...]]:
    """Every way to ask by the fields of `Words`, the paper's first."""
    further = json.loads(Path(__file__).with_name("phrasings.json").read_text(encoding="utf-8"))
    return {name: (paper, *further[name]) for name, paper in vars(PAPER).items()}


def draw_words(rng: np.random.Generator, choice: str = "varied") -> Words:
    """One way to ask each question: of `varied` ones all equally likely, else the `paper`'s,
    which takes no draw."""
    if choice == "paper":
        return PAPER
    return Words(**{name: some[rng.integers(len(some))] for name, some in phrasings().items()})


@dataclass(frozen=True)
class Sample:
    """One training or inference example; `answer` is empty where the model is to write it."""

    prompt: str
    answer: str = ""
    graph: System | None = None
    energy: float | None = None  # eV, the label of h_reg
    told: System | None = None  # what the text is of, where no structure is shown


def chat(user: str, tail: str = "") -> str:
    """Qwen's chat frame around one question, ready for the answer; `tail` stands at the end of the prompt."""
    return f"{START}user\n{user}{END}\n{START}assistant\n{tail}"


def property_prompt(text: str | None, graph: bool, words: Words = PAPER) -> str:
    """The energy question; `text` is the three-part text or None, `graph` says whether vectors go in."""
    if text is None and not graph:
        raise ValueError("a property prompt needs the text, the graph or both")
    body = words.property_graph if text is None else words.property.format(text=text)
    return chat(f"{GRAPH}\n{body}" if graph else body, ENERGY)


def cif_prompt(identity: str, words: Words = PAPER) -> str:
    return chat(words.cif.format(identity=identity))


def design_prompt(identity: str, energy: float, exemplar: bool = False, words: Words = PAPER) -> str:
    body = words.design_by_energy.format(identity=identity, energy=round(energy, 2) + 0.0)  # no -0.00
    return chat(f"{GRAPH}\n{body}" if exemplar else body)


def property_sample(
    system: System,
    mode: Literal["both", "graph", "text"] = "both",
    graph: System | None = None,
    words: Words = PAPER,
) -> Sample:
    """Energy question with its answer; `graph` replaces the structure shown (a noised copy, say). Of a system
    without a structure only its text can be shown."""
    text = None if mode == "graph" else three_part_text(system)
    shown = None if mode == "text" or system.text is not None else (graph or system)
    answer = "" if system.energy is None else PROPERTY_ANSWER.format(energy=system.energy) + END
    of = system if shown is None else None
    return Sample(property_prompt(text, shown is not None, words), answer, shown, system.energy, of)


def cif_sample(system: System, decimals: int = 3, words: Words = PAPER) -> Sample:
    return Sample(
        cif_prompt(system.identity, words),
        CIF_ANSWER.format(cif=write_cif(system, decimals)).rstrip("\n") + END,
    )


def design_sample(system: System, exemplar: System | None, decimals: int = 3, words: Words = PAPER) -> Sample:
    """Design question for the system's own energy; the exemplar's graph goes in where one is given."""
    if system.energy is None:
        raise ValueError(f"{system.identity}: a design sample needs the system's energy")
    prompt = design_prompt(system.identity, system.energy, exemplar is not None, words)
    answer = DESIGN_ANSWER.format(cif=write_cif(system, decimals)).rstrip("\n") + END
    return Sample(prompt, answer, exemplar)


def without_structure(sample: Sample) -> Sample:
    """The same for a model that reads texts alone. Raises ValueError where the text says nothing of the
    system whose energy is asked for."""
    if sample.graph is None:
        return sample
    if ENERGY in sample.prompt and SEPARATOR not in sample.prompt:
        raise ValueError(
            "a model of `model.encoder.kind: none` sees no structure; ask for energies with the text"
        )
    told = sample.graph if ENERGY in sample.prompt else None
    return replace(sample, prompt=sample.prompt.replace(f"{GRAPH}\n", ""), graph=None, told=told)


def jitter(system: System, sigma: float, rng: np.random.Generator) -> System:
    """A copy with Gaussian noise of `sigma` Å on every atom; the label stays that of the original."""
    if sigma == 0:
        return system
    noise = rng.normal(0.0, sigma, (len(system.frac), 3)) @ np.linalg.inv(system.lattice)
    return replace(system, frac=system.frac + noise)


def read_energy(answer: str) -> float | None:
    """The energy that an answer names, or None; the last number before `eV` counts."""
    found = re.findall(r"(-?\d+(?:\.\d+)?)\s*eV", answer)
    return float(found[-1]) if found else None
