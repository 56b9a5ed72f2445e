"""What the closed loop answers without a flag, judged by pymatgen: exact composition, no overlap,
a sane volume."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable

import numpy as np
import pytest

from catmllm.config import GAGRPOConfig, SamplingConfig
from catmllm.data.batches import Collator
from catmllm.design.search import ClosedLoop, Task
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.sample.answers import Rollout
from catmllm.structure.cif import write_cif
from catmllm.structure.system import System
from rewards_fast import extract_cif
from tests.oracles.cif_mutants import mutants

VARIANTS = 8


def obeys(text: str, system: System) -> bool:
    """SPEC's hard constraints by pymatgen's own parser, composition, distances and volume."""
    from pymatgen.core import Composition, Structure

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            structure = Structure.from_str(extract_cif(text), fmt="cif")
        except Exception:  # pymatgen fails in many ways on what models write
            return False
    images = structure.lattice.get_all_distances(structure.frac_coords, structure.frac_coords)
    # an atom and its own image, in a cell that is reduced or long
    np.fill_diagonal(images, min(structure.lattice.abc))
    per_atom = structure.volume / len(structure)
    return bool(
        structure.composition == Composition(system.target)
        and images.min() >= 0.7 - 1e-6
        and 3 - 1e-6 <= per_atom <= 150 + 1e-6
    )


def _rows(text: str) -> tuple[list[str], list[int]]:
    lines = text.splitlines()
    start = max(i for i, line in enumerate(lines) if line.startswith("_atom_site_")) + 1
    return lines, [i for i in range(start, len(lines)) if len(lines[i].split()) == 7]


def crowd(text: str, r: random.Random) -> str:
    """One atom 0.6 to 0.8 Å from another, often across the border of the cell."""
    lines, rows = _rows(text)
    one, other = r.sample(rows, 2)
    a = float(next(line.split()[1] for line in lines if line.startswith("_cell_length_a")))
    words, place = lines[one].split(), lines[other].split()[3:6]
    x = float(place[0]) + r.uniform(0.6, 0.8) / a - r.choice([0, 0, 1])
    lines[one] = " ".join([*words[:3], f"{x:.5f}", *place[1:], words[6]])
    return "\n".join(lines)


def swap(text: str, r: random.Random) -> str:
    """Another element at one site."""
    lines, rows = _rows(text)
    row = r.choice(rows)
    words = lines[row].split()
    lines[row] = " ".join([r.choice(["Pt", "O", "H", "Cu"]), *words[1:]])
    return "\n".join(lines)


def drop(text: str, r: random.Random) -> str:
    """A site less, or one twice."""
    lines, rows = _rows(text)
    row = r.choice(rows)
    return "\n".join([*lines[:row], *r.choice([[], [lines[row]] * 2]), *lines[row + 1 :]])


def resize(text: str, r: random.Random) -> str:
    """A cell from much too small to much too large."""
    factor = r.choice([0.3, 0.45, 0.6, 1.5, 2.2, 3.0])
    lines = text.splitlines()
    return "\n".join(
        f"{line.split()[0]} {factor * float(line.split()[1]):.3f}"
        if line.startswith("_cell_length")
        else line
        for line in lines
    )


def thin(text: str, r: random.Random) -> str:
    """Less than one atom at a site."""
    lines, rows = _rows(text)
    row = r.choice(rows)
    lines[row] = lines[row][: lines[row].rindex(" ")] + r.choice([" 0.5", " 0.99", " 0"])
    return "\n".join(lines)


CHANGES: list[Callable[[str, random.Random], str]] = [crowd, swap, drop, resize, thin]


class Mutator:
    """An engine that answers with broken and whole copies of each system's own CIF."""

    def __init__(self, systems: list[System], seed: int) -> None:
        self.systems, self.random = systems, random.Random(seed)

    def generate(self, samples: list[object], *args: object, **kwargs: object) -> list[Rollout]:
        import torch

        nothing = torch.zeros(0)
        count = VARIANTS * len(self.systems) // len(samples)
        out = []
        for i in range(len(samples) * count):
            system = self.systems[i // count * len(self.systems) // len(samples)]
            text = write_cif(system)
            kind = self.random.random()
            if kind < 0.6:
                text = self.random.choice(CHANGES)(text, self.random)
            elif kind < 0.8:
                text = next(mutants([text], 1, self.random.randrange(1 << 30)))
            out.append(Rollout(i // count, nothing, nothing, None, True, text))
        return out


@pytest.mark.parametrize("seed", [0, 1])
def test_no_unflagged_answer_breaks_a_hard_constraint(
    small_model: tuple[CatalyticMLLM, Collator], train_systems: list[System], seed: int
) -> None:
    systems = train_systems[seed * 17 :: 60]
    config = GAGRPOConfig(
        initial=VARIANTS, group_size=VARIANTS, pool=4, sampling=SamplingConfig(max_new_tokens=4)
    )
    loop = ClosedLoop(*small_model, config)
    tasks = [Task(s.identity, s.target, s.known_energy) for s in systems]
    engine = Mutator(systems, seed)
    states = loop.start(tasks, engine, [seed])  # type: ignore[arg-type]
    for iteration in (1, 2):
        loop.refine(states, engine, iteration, [seed], keep=False)  # type: ignore[arg-type]
    judged = [(m, obeys(m.text, s)) for state, s in zip(states, systems) for m in state.pool.members]
    assert len(judged) > len(systems)
    assert [m.text for m, fine in judged if m.feasible and not fine] == []
    # and the flag is not simply always there, nor never
    broken = [CHANGES[i % len(CHANGES)](write_cif(s), random.Random(i)) for i, s in enumerate(systems)]
    candidates, _ = loop.judge(tasks, broken, 0)
    verdicts = [obeys(text, s) for text, s in zip(broken, systems)]
    sound = [c.fault is None for c in candidates]
    assert [c.feasible for c in candidates] == [fine and s for fine, s in zip(verdicts, sound)]
    assert {True, False} == set(verdicts) == set(sound)
