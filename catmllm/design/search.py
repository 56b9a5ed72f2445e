"""The closed loop of design and refinement (paper Algorithm 3), for training,
evaluation and `catmllm design` alike.

All tasks advance together: one sampling pass, one scoring pass and one prediction pass an iteration, whatever
their number. Training makes a policy update of what each iteration returns; evaluation and design only
search.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, islice
from typing import Any

import numpy as np

from catmllm.config import GAGRPOConfig
from catmllm.data.batches import Collator
from catmllm.data.prompts import Sample, design_prompt
from catmllm.design.analogues import analogues
from catmllm.design.constraints import adsorbate_faults, hard_constraints, read_systems
from catmllm.design.exemplar_pool import Candidate, ExemplarPool
from catmllm.design.predict import Predictor, energies_and_errors, question
from catmllm.design.reward import design_reward, distances
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.sample.answers import Rollout, answer_limits
from catmllm.sample.engine import Sampler
from catmllm.sample.grammar import Pattern, answer_pattern
from catmllm.seeds import generator
from catmllm.structure.adsorbed import Fault
from catmllm.structure.cif import read_cif, write_cif
from catmllm.structure.elements import NUMBER
from catmllm.structure.formula import cell_counts, format_identity, parse_identity
from catmllm.structure.system import System
from catmllm.structure.text import configuration, three_part_text
from rewards_fast import CIFError, Crystal, Scores, extract_cif

# The iterations of structures that were not sampled: given, and training slabs with other elements.
GIVEN, ANALOGUE = -1, -2


@dataclass(frozen=True)
class Task:
    """What is wanted: a system named by its identity line, the counts of its whole cell, an energy in eV,
    and on which sites the adsorbate may bind (atop, bridge, hollow; empty: on any). said: the energy in eV
    that prompts say in its place (see `told`)."""

    identity: str
    target: dict[str, int]
    energy: float
    sites: tuple[str, ...] = ()
    said: float | None = None

    @property
    def adsorbate(self) -> str:
        return parse_identity(self.identity).adsorbate

    @property
    def prompted(self) -> float:
        return self.energy if self.said is None else self.said


def make_task(identity: str, energy: float) -> Task:
    """The task of an identity line: its target is slab and adsorbate together.
    Raises ValueError for what is no such line, and for an energy that is not finite."""
    if not np.isfinite(energy):
        raise ValueError(f"the energy {energy} is no number; give one in eV")
    parsed = parse_identity(identity)
    return Task(format_identity(*parsed), cell_counts(parsed), energy)


def free_composition(task: Task, metals: Sequence[str]) -> list[Task]:
    """The same task on each composition of its slab's atoms: each metal alone, and each two at 1:3, 1:1 and
    3:1 where that is whole atoms. Raises ValueError for a metal that is no element or twice there."""
    asked = parse_identity(task.identity)
    n = sum(asked.slab.values())
    if wrong := [m for m in metals if m not in NUMBER]:
        raise ValueError(f"--metals: {wrong[0]!r} is no element; write Pt,Cu,Ni")
    if len(set(metals)) != len(metals):
        raise ValueError(f"--metals: a metal is there twice in {','.join(metals)}")
    slabs = [{metal: n} for metal in metals]
    for a, b in combinations(metals, 2):
        slabs += [{a: n * k // 4, b: n - n * k // 4} for k in (3, 2, 1) if n * k % 4 == 0]
    return [make_task(format_identity(asked.adsorbate, slab, asked.miller), task.energy) for slab in slabs]


def told(tasks: Sequence[Task], config: GAGRPOConfig, known: Sequence[System]) -> list[Task]:
    """The tasks with the energies that their prompts say: the wanted ones or, as a control, each that of the
    `known` system of the adsorbate (where there is none, of all) which is farthest from it.
    Raises ValueError for the control without such systems."""
    if config.prompts == "wanted":
        return list(tasks)
    energies: dict[str, list[float]] = {}
    for s in known:
        energies.setdefault(s.adsorbate, []).append(s.known_energy)
    if not energies:
        raise ValueError("`ga_grpo.prompts: other` says energies of training systems, and none are given")
    of_all = [e for some in energies.values() for e in some]
    return [
        replace(t, said=max(energies.get(t.adsorbate, of_all), key=lambda e: abs(e - t.energy)))
        for t in tasks
    ]


@dataclass
class TaskState:
    """A task's pool, the trace of its search (per iteration the best |E_pred - E*| and reward so far, and the
    energies of its candidates, None where one has none), and all candidates in the order in which they came,
    of which checkpoints know nothing."""

    task: Task
    pool: ExemplarPool
    trace: list[dict[str, Any]] = field(default_factory=list)
    tried: list[Candidate] = field(default_factory=list)

    def best_of(self, n: int) -> Candidate | None:
        """What the pool's best would be after the first n candidates."""
        pool = ExemplarPool(1)
        pool.add([c for c in self.tried[:n] if not np.isnan(c.predicted)])
        return pool.best


def summary(state: TaskState) -> dict[str, Any]:
    """What is kept of a finished task: what was wanted, the best structure, and the trace towards it."""
    best = state.pool.best
    return {
        "identity": state.task.identity,
        "energy": state.task.energy,
        "feasible": state.pool.feasible,
        "best": None if best is None else best.to_json(),
        "trace": state.trace,
    }


class ClosedLoop:
    """Scores and predicts candidates for tasks, and runs the iterations.

    `model` must be whole on this rank (unsharded); only this rank's tasks are worked on,
    without any collective. `predictor` says the energies, or the model itself where there is none.
    """

    def __init__(
        self,
        model: CatalyticMLLM,
        collate: Collator,
        config: GAGRPOConfig,
        predictor: Predictor | None = None,
    ) -> None:
        self.collate, self.config = collate, config
        self.predictor = predictor or (model, collate)
        self.pvcp = config.reward.scorer()
        self.seconds = {"reward": 0.0, "predict": 0.0}  # spent so far
        # by identity line and structure key: energy, its expected error, fault and the site of the first bond
        # to the slab
        self._known: dict[str, tuple[float, float, Fault | None, str]] = {}

    def judge(
        self,
        task: Sequence[Task],
        texts: Sequence[str],
        iteration: int,
        relaxed: bool | Sequence[bool] = False,
    ) -> tuple[list[Candidate], Scores]:
        """Candidates from texts, text i for task[i]. relaxed: whether their atoms stand as relaxed ones do,
        which the predictor is told."""
        began = time.perf_counter()
        scores = self.pvcp.score(texts, [t.target for t in task])
        scored = time.perf_counter()
        predicted, errors, faults, sites, keys = self._predict(task, scores, relaxed)
        self.seconds["reward"] += scored - began
        self.seconds["predict"] += time.perf_counter() - scored
        target = np.array([t.energy for t in task])
        distance = distances(predicted, target, errors, self.config)
        rewards = design_reward(scores.total, faults, distance, self.config)
        feasible = hard_constraints(scores, faults) & ~np.isnan(predicted)
        feasible &= np.array([not t.sites or site in t.sites for t, site in zip(task, sites)], dtype=bool)
        return [
            Candidate(text, float(r), float(e), float(p), fault, bool(f), key, iteration, float(off))
            for text, r, e, p, fault, f, key, off in zip(
                texts, rewards, predicted, scores.total, faults, feasible, keys, errors
            )
        ], scores

    def start(
        self,
        tasks: Sequence[Task],
        engine: Sampler,
        seed: Sequence[int],
        given: Sequence[System | None] | None = None,
        known: Sequence[System] = (),
    ) -> list[TaskState]:
        """N0 candidates a task, and the pools made of them. The first are analogues among `known` systems,
        the others are sampled: conditioned on the text alone, or where a structure is given on its graph too;
        that one is the first exemplar, of iteration `GIVEN`."""
        shown = given or [None] * len(tasks)
        begun = self.analogues(tasks, [[t.identity] for t in tasks], known)
        samples = [
            Sample(design_prompt(t.identity, t.prompted, s is not None), "", s) for t, s in zip(tasks, shown)
        ]
        n = self.config.initial - min(map(len, begun), default=0)
        rollouts = engine.generate(
            samples,
            self.config.sampling,
            [*seed, 0],
            n,
            patterns=self.patterns(tasks),
            limits=self.limits(tasks),
        )
        states = [TaskState(t, ExemplarPool(self.config.pool)) for t in tasks]
        for state, system in zip(states, shown):
            if system is not None:
                text = write_cif(system, self.collate.data.decimals)
                read, _ = self.judge([state.task], [text], GIVEN)
                state.pool.add([c for c in read if not np.isnan(c.predicted)])
        places = [self.config.initial - len(some) for some in begun]  # fewer analogues, more samples
        rollouts = [r for i, r in enumerate(rollouts) if i % n < places[r.prompt]]
        self.absorb(states, rollouts, begun=begun)
        return states

    def analogues(
        self, tasks: Sequence[Task], slabs: Sequence[Sequence[str]], known: Sequence[System]
    ) -> list[list[Candidate]]:
        """Of each task the first candidates, of iteration `ANALOGUE`: the nearest `known` systems as one of
        its slabs (identity lines)."""
        found = analogues(slabs, [t.energy for t in tasks], known, self.config.analogues)
        if not any(found):
            return [[] for _ in tasks]
        asked = [
            replace(make_task(s.identity, t.energy), sites=t.sites)
            for t, some in zip(tasks, found)
            for s in some
        ]
        texts = [write_cif(s, self.collate.data.decimals) for some in found for s in some]
        judged = iter(self.judge(asked, texts, ANALOGUE, relaxed=True)[0])
        return [list(islice(judged, len(some))) for some in found]

    def refine(
        self,
        states: Sequence[TaskState],
        engine: Sampler,
        iteration: int,
        seed: Sequence[int],
        keep: bool,
    ) -> tuple[list[Rollout], np.ndarray, dict[str, float]]:
        """One iteration over all tasks, which need not be equally old: draw an exemplar each, sample G,
        score, update the pools. `iteration` is a part of the seed.

        Returns the rollouts (task-major, with hidden states if `keep`),
        their rewards [tasks, G] and what to log.
        """
        samples = []
        for k, state in enumerate(states):
            exemplar = state.pool.draw(generator((*seed, iteration, k)))
            shown = None if exemplar is None else self.exemplar(state.task, exemplar)
            prompt = design_prompt(state.task.identity, state.task.prompted, shown is not None)
            samples.append(Sample(prompt, "", shown))
        rollouts = engine.generate(
            samples,
            self.config.sampling,
            [*seed, iteration],
            self.config.group_size,
            keep_hidden=keep,
            patterns=self.patterns([s.task for s in states]),
            limits=self.limits([s.task for s in states]),
        )
        candidates, metrics = self.absorb(states, rollouts)
        rewards = np.array([c.reward for c in candidates]).reshape(len(states), self.config.group_size)
        return rollouts, rewards, metrics

    def patterns(self, tasks: Sequence[Task]) -> list[Pattern] | None:
        """What answers to each task must fit; None without a grammar."""
        if not self.config.sampling.grammar:
            return None
        data, templates = self.collate.data, self.collate.templates
        return [answer_pattern(t.identity, t.target, True, data, templates) for t in tasks]

    def limits(self, tasks: Sequence[Task]) -> list[int]:
        """The most tokens of an answer to each task."""
        return answer_limits(self.collate, self.config.sampling, [(t.identity, t.target) for t in tasks])

    def absorb(
        self,
        states: Sequence[TaskState],
        rollouts: Sequence[Rollout],
        asked: Sequence[tuple[int, Task]] | None = None,
        begun: Sequence[Sequence[Candidate]] | None = None,
    ) -> tuple[list[Candidate], dict[str, float]]:
        """Judge rollouts, put them into the pools behind the candidates that each has `begun` with, extend
        the traces. Their `prompt` indexes `states`, or `asked`: the place of a state, and what was asked for
        its sake."""
        asked = asked or [(k, state.task) for k, state in enumerate(states)]
        places = [asked[r.prompt][0] for r in rollouts]
        tasks = [asked[r.prompt][1] for r in rollouts]
        judged, scores = self.judge(tasks, [r.text for r in rollouts], 0)
        candidates = [replace(c, iteration=len(states[k].trace)) for k, c in zip(places, judged)]
        found = [list(some) for some in begun or [()] * len(states)]
        for k, c in zip(places, candidates):
            found[k].append(c)
        for state, mine in zip(states, found):
            parsed = [c for c in mine if not np.isnan(c.predicted)]
            state.tried += mine
            state.pool.add(parsed)
            best = state.pool.best
            errors = [abs(c.predicted - state.task.energy) for c in parsed if c.feasible]
            state.trace.append(
                {
                    "iteration": len(state.trace),
                    "best_reward": None if best is None else best.reward,
                    "best_predicted": None if best is None else best.predicted,
                    "feasible": state.pool.feasible,
                    "mean_error": float(np.mean(errors)) if errors else None,
                    "mean_reward": float(np.mean([c.reward for c in mine])),
                    "energies": [None if np.isnan(c.predicted) else round(c.predicted, 4) for c in mine],
                }
            )
        energy = [abs(c.predicted - t.energy) for c, t in zip(candidates, tasks) if not np.isnan(c.predicted)]
        return candidates, {
            "reward": float(np.mean([c.reward for c in candidates])),
            "pvcp": float(np.mean(scores.total)),
            "energy_error": float(np.mean(energy)) if energy else float("inf"),
            "feasible": float(np.mean([c.feasible for c in candidates])),
            "adsorbates": float(np.mean([c.fault is None for c in candidates])),
        }

    def _predict(
        self, task: Sequence[Task], scores: Scores, relaxed: bool | Sequence[bool]
    ) -> tuple[np.ndarray, np.ndarray, list[Fault | None], list[str], list[str]]:
        """Energies (NaN where no adsorption system can be read), their expected errors, what is wrong with
        the adsorbates, their sites, and structure keys of scored texts."""
        identities = [parse_identity(t.identity) for t in task]
        systems = read_systems(scores, [(i.adsorbate, i.miller) for i in identities])
        told = [relaxed] * len(systems) if isinstance(relaxed, bool) else relaxed
        systems = [None if s is None else replace(s, relaxed=r) for s, r in zip(systems, told)]
        keys = [
            "" if s is None else f"{t.identity}|{s.relaxed:d}|{structure_key(s)}"
            for t, s in zip(task, systems)
        ]
        new: dict[str, System] = {}
        for key, system in zip(keys, systems):
            if system is None or key in self._known or key in new:
                continue
            try:
                # A cell that has no graph or no text (too small, or of unknown elements) has no energy.
                self.predictor[1].graphs([system])
                three_part_text(system)
            except ValueError:
                self._known[key] = np.nan, np.nan, adsorbate_faults([system])[0], ""
            else:
                new[key] = system
        questions = [question(system) for system in new.values()]
        said = energies_and_errors(*self.predictor, questions, batch_size=128)
        sites = [site_of(system) for system in new.values()]
        faults = adsorbate_faults(list(new.values()))
        self._known |= zip(new, zip(*(numbers.tolist() for numbers in said), faults, sites))
        known = [self._known.get(key, (np.nan, np.nan, "no_adsorbate", "")) for key in keys]
        return (
            np.array([energy for energy, _, _, _ in known]),
            np.array([error for _, error, _, _ in known]),
            [fault for _, _, fault, _ in known],
            [site for _, _, _, site in known],
            keys,
        )

    def keep(self, tasks: Sequence[Task]) -> None:
        """Forget the energies of all structures but these tasks': those of tasks that have left are not asked
        for again, and thousands of tasks would add up."""
        kept = {task.identity for task in tasks}
        self._known = {key: said for key, said in self._known.items() if key.partition("|")[0] in kept}

    def exemplar(self, task: Task, candidate: Candidate) -> System | None:
        """The structure of a candidate, or None where there is none to be read."""
        identity = parse_identity(task.identity)
        try:
            return read_cif(extract_cif(candidate.text), identity.adsorbate, identity.miller)
        except (CIFError, ValueError):
            return None


def site_of(system: System) -> str:
    """Where the adsorbate binds, by its first bundle in the three-part text: `atop`, `bridge`, `hollow`, or
    empty where it has no bond."""
    found = re.search(r" (atop|bridge|hollow) \[", configuration(system))
    return found[1] if found else ""


def structure_key(crystal: Crystal) -> str:
    """A hash that is equal for equal structures at CIF precision, whatever the order of their sites.

    Coordinates count to 1e-3 of the cell and lattice vectors to 1e-3 Å.
    """
    frac = np.round(crystal.frac % 1.0, 3) % 1.0
    rows = np.column_stack([crystal.numbers, frac])
    rows = rows[np.lexsort(rows.T[::-1])]
    lattice = np.round(crystal.lattice @ crystal.lattice.T, 2) + 0.0  # of -0.0 and 0.0 the latter
    atoms = sorted((symbol, round(n, 3)) for symbol, n in crystal.composition.items())  # occupancies counted
    return hashlib.sha1(rows.tobytes() + lattice.tobytes() + repr(atoms).encode()).hexdigest()[:16]
