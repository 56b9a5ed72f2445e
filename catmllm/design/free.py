"""Designs whose metals are free: first which slab, then where its atoms stand.

What an adsorption energy tells is mostly the metals. So the model reads the two-part text of every slab that
is allowed, which takes no structure, and the slabs that are nearest to the wanted energy are tried first. Of
each the language model then writes CIFs, as of any slab that is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice

import numpy as np

from catmllm.config import Config
from catmllm.data.batches import Collator
from catmllm.data.prompts import Sample, design_prompt
from catmllm.design.exemplar_pool import ExemplarPool
from catmllm.design.predict import Predictor, predict_energies, question
from catmllm.design.search import ClosedLoop, Task, TaskState, make_task, told
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.sample.engine import RolloutEngine
from catmllm.seeds import generator
from catmllm.structure.system import System, text_system
from catmllm.structure.text import two_part_text
from catmllm.world import DTYPES


def text_energies(predictor: Predictor, lines: Sequence[str]) -> dict[str, float]:
    """Energies (eV) of the two-part texts of identity lines, each read once."""
    lines = list(dict.fromkeys(lines))
    texts = [text_system(two_part_text(text_system(line))) for line in lines]
    said = predict_energies(*predictor, [question(s) for s in texts], batch_size=256)
    return dict(zip(lines, said.tolist()))


def nearest_slabs(
    predictor: Predictor, tasks: Sequence[Task], slabs: Sequence[Sequence[str]]
) -> list[list[str]]:
    """Of each task the identity lines of its slabs, in the order of how far the energies of their two-part
    texts are from the wanted one."""
    said = text_energies(predictor, [line for some in slabs for line in some])
    return [sorted(some, key=lambda line: abs(said[line] - t.energy)) for t, some in zip(tasks, slabs)]


def search_free(
    model: CatalyticMLLM,
    collate: Collator,
    config: Config,
    tasks: Sequence[Task],
    slabs: Sequence[Sequence[str]],
    seed: Sequence[int],
    progress: bool = False,
    predictor: Predictor | None = None,
    known: Sequence[System] = (),
) -> list[TaskState]:
    """The closed loop over all slabs of a task, by identity lines, with as many predictions as over one. The
    first N0 candidates are analogues among `known` systems, then answers of one slab each, the nearest first;
    of a refinement half are of further slabs, and half show an exemplar of the pool and stay with its slab.
    A task without slabs has no candidates."""
    from tqdm import tqdm

    o, predictor = config.ga_grpo, predictor or (model, collate)
    every = [TaskState(task, ExemplarPool(o.pool)) for task in told(tasks, o, known)]
    open_to = [k for k, lines in enumerate(slabs) if lines]
    if not open_to:
        return every
    states, tasks, slabs = (
        [every[k] for k in open_to],
        [tasks[k] for k in open_to],
        [slabs[k] for k in open_to],
    )
    engine = RolloutEngine(model, collate, DTYPES[config.precision])
    order = nearest_slabs(predictor, tasks, slabs)
    loop = ClosedLoop(model, collate, o, predictor)
    queues = [cycle(lines) for lines in order]
    begun = loop.analogues(tasks, slabs, known)
    for iteration in tqdm(range(o.iterations + 1), desc="free     ", disable=not progress, unit="iteration"):
        n = o.group_size if iteration else o.initial
        asked: list[tuple[int, Task]] = []
        samples: list[Sample] = []
        for k, state in enumerate(states):
            shown = _exemplars(loop, state, n // 2, (*seed, iteration, k)) if iteration else []
            lines = list(islice(queues[k], n - len(shown) - (0 if iteration else len(begun[k]))))
            for line, system in [*((line, None) for line in lines), *((s.identity, s) for s in shown)]:
                asked.append((k, make_task(line, state.task.energy)))
                prompt = design_prompt(line, state.task.prompted, system is not None)
                samples.append(Sample(prompt, "", system))
        named = [task for _, task in asked]
        rollouts = engine.generate(
            samples,
            o.sampling,
            [*seed, iteration],
            patterns=loop.patterns(named),
            limits=loop.limits(named),
        )
        loop.absorb(states, rollouts, asked, None if iteration else begun)
    return every


def _exemplars(loop: ClosedLoop, state: TaskState, n: int, key: Sequence[int]) -> list[System]:
    """n structures drawn from the pool; none where nothing of it can be read."""
    rng: np.random.Generator = generator(key)
    drawn = [c for _ in range(n) if (c := state.pool.draw(rng)) is not None]
    return [s for c in drawn if (s := loop.exemplar(state.task, c)) is not None]
