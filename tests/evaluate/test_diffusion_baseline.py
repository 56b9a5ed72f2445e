"""The diffusion model of others: how tasks are asked of it and its structures written; with chemeleon-dng in
CHEMELEON_PYTHON (`make generators` makes such an environment) its training and sampling."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from hypothesis import given
from hypothesis import strategies as st

from catmllm.evaluate import BENCHMARK
from catmllm.evaluate.benchmark import read_candidates, read_tasks
from catmllm.evaluate.diffusion_baseline import atoms_of, cif_of, under_the_gap, written
from catmllm.structure.elements import SYMBOLS
from catmllm.structure.system import System
from rewards_fast import parse_cif

HEIGHTS = st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=12).map(np.array)


@given(HEIGHTS)
def test_the_widest_gap_is_above(heights: np.ndarray) -> None:
    """Half of it, the other half below; and all heights have moved by the same."""
    found = under_the_gap(heights)
    moved = (found - heights) % 1.0
    assert np.allclose(np.cos(2 * np.pi * (moved - moved[0])), 1.0)
    order = np.sort(heights)
    widest = np.diff(np.append(order, order[0] + 1.0)).max()
    assert found.min() == pytest.approx(widest / 2) and found.max() == pytest.approx(1 - widest / 2)


def as_atoms(system: System, shift: float = 0.0) -> Atoms:
    frac = (system.frac + [0.0, 0.0, shift]) % 1.0
    return Atoms(system.numbers, scaled_positions=frac, cell=system.lattice, pbc=True)


@pytest.mark.parametrize("shift", [0.0, 0.3, 0.77])
def test_a_slab_over_the_cells_end_is_the_slab(train_systems: list[System], shift: float) -> None:
    """What is read back has the same heights, wherever along c the tool put it."""
    for system in train_systems[::500]:
        read = parse_cif(cif_of(as_atoms(system, shift)))
        assert sorted(read.numbers) == sorted(system.numbers)
        found, expected = (np.sort(frac[:, 2] * system.lattice[2, 2]) for frac in (read.frac, system.frac))
        np.testing.assert_allclose(found - found[0], expected - expected[0], atol=2e-3)


class Echo:
    """Returns atoms of the asked kinds, and keeps what was asked."""

    def __init__(self) -> None:
        self.asked: list[Counter[str]] = []

    def sample(self, task: str, num_atoms: Sequence[int], atom_types: Sequence[int], verbose: bool) -> Any:
        assert task == "csp" and sum(num_atoms) == len(atom_types)
        ends = np.cumsum(num_atoms)
        made = [atom_types[end - n : end] for end, n in zip(ends, num_atoms)]
        self.asked += [Counter(SYMBOLS[z] for z in numbers) for numbers in made]
        rng = np.random.default_rng(0)
        return [Atoms(z, scaled_positions=rng.random((len(z), 3)), cell=[5, 5, 24], pbc=True) for z in made]


def test_each_task_is_asked_what_it_allows() -> None:
    tasks = [t for t in read_tasks(BENCHMARK) if t.name in ("fixed-000", "fixed-003", "free-000", "free-005")]
    tool = Echo()
    texts = written(tool, tasks, 40, seed=0)
    assert {name: len(mine) for name, mine in texts.items()} == {t.name: 40 for t in tasks}
    for k, task in enumerate(tasks):
        asked = tool.asked[40 * k : 40 * (k + 1)]
        own = Counter(SYMBOLS[z] for z in atoms_of(task.task.identity))
        if task.kind == "fixed":
            assert all(one == own for one in asked)
        else:
            assert len({tuple(sorted(one.items())) for one in asked}) > 10
        for one, text in zip(asked, texts[task.name]):
            # of a slab that the task does not allow the task itself would be asked
            assert Counter(SYMBOLS[z] for z in atoms_of(task.asked(text).identity)) == one
    assert written(Echo(), tasks, 2, seed=0) != written(Echo(), tasks, 2, seed=1)


@pytest.mark.slow
def test_chemeleon_learns_slabs(tmp_path: Path) -> None:
    """Noise has cells of any volume; after some training those of slabs, of 12 metal atoms and a vacuum."""
    if not (python := os.environ.get("CHEMELEON_PYTHON")):
        pytest.skip("no CHEMELEON_PYTHON: `make generators` makes .generators")
    lines = BENCHMARK.read_text().splitlines()
    few = tmp_path / "tasks.csv"
    few.write_text("\n".join([lines[0], lines[1], lines[-1]]) + "\n")
    command = [python, "-m", "catmllm.evaluate.diffusion_baseline", str(tmp_path / "row"), "--steps", "300"]
    options = ["--timesteps", "50", "--n", "8", "--tasks", str(few)]
    subprocess.run([*command, *options], check=True, timeout=900, env={**os.environ, "OMP_NUM_THREADS": "1"})
    texts, relaxed, _ = read_candidates(tmp_path / "row", read_tasks(few), 96)
    assert [len(mine) for mine in texts.values()] == [8, 8] and all(map(all, relaxed.values()))
    volumes = [abs(np.linalg.det(parse_cif(text).lattice)) for mine in texts.values() for text in mine]
    assert 200 < np.median(volumes) < 800, volumes
