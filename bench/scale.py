"""What the trainer does at the paper's size, simulated: how long ranks wait for each other, and what the
evaluation takes beside training, before and after.

`scale_balance`: 30 real OC20 structures, drawn with repetition (`$CATMLLM_SHARED/data/oc20`), become samples
of every stage as configs/a100x8/7b.yaml has them. Ranks meet in every pass, so a step takes the sum over its
passes of the slowest rank's cost; the ratio to the mean is what is printed, 1 being the best. A pass costs
its tokens, and an atom of a structure as many as `atom_tokens` says. The dealing is the trainer's own code.
`scale_evaluation`: seconds of a card's data sheet, for training and for the energies measured after each
stage. `scale_baselines`: seconds of the text regression, measured, by both of its forms. `scale_decoding`:
operators that a GPU is given a token, and waits of the host for it, counted. `scale_weights`, `scale_memory`:
what samplers' new weights move and hold.
`scale_tasks`: what GA-GRPO's tasks take, by those under way and by those that have left.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import numpy as np
import torch

from bench import record  # first: it decides whose packages are measured
from catmllm.config import Config, SamplingConfig, load_config
from catmllm.data.open import open_data
from catmllm.data.prompts import Sample, jitter
from catmllm.design import search
from catmllm.models.build import new_model
from catmllm.models.lora import LINEARS
from catmllm.plan.balance import Costs, waiting
from catmllm.plan.cards import CARDS
from catmllm.plan.decoding import NARROW, TOKENS, per_token
from catmllm.plan.evaluation import energies, reading, refit
from catmllm.plan.ledger import Ledger, backend_forced
from catmllm.plan.made_up import synthetic_systems
from catmllm.plan.trace import planned_model
from catmllm.sample.answers import Rollout
from catmllm.sample.vllm_weights import Weights
from catmllm.sample.wire import sampled_with
from catmllm.stages.ga_grpo import GAGRPO
from catmllm.stages.supervised import VISUAL
from catmllm.structure.cif import write_cif
from catmllm.structure.system import ADSORBATE, System, make_system
from catmllm.train.stage import Context
from catmllm.world import World, start

RANKS = (8, 32, 64)
PARAMETERS = {"3b": 2.77e9, "7b": 6.53e9}  # of the LLM's blocks: 2 FLOPs each and token
HEAD = {"3b": 0.31e9, "7b": 0.55e9}
ENCODER = {"3b": 1.69e9, "7b": 9.41e9}  # FLOPs an atom forward, 20 neighbours, by torch's counter
LORA_R = 64
IDENTITY = re.compile(r"\w+</s>\w+ \([-\d ]+\)")  # line of a system
SYSTEMS = {"train": 295_000, "test": 37_000}  # of 369,247


def oc20() -> list[System]:
    """The relaxed frame of each real structure; adsorbate and facet only name it."""
    from ase.io import read

    path = Path(os.environ.get("CATMLLM_SHARED", "../shared")) / "data/oc20/oc20_30_init_relaxed.extxyz.gz"
    if not path.is_file():
        record.skip(f"no {path}; set CATMLLM_SHARED")
    found: list[System] = []
    for atoms in read(str(path), "1::2"):  # type: ignore[union-attr]
        tags = np.where(np.isin(atoms.numbers, (1, 6, 7, 8)), ADSORBATE, atoms.get_tags())
        name = "".join(a.symbol for a, t in zip(atoms, tags) if t == ADSORBATE)[:8] or "H"
        found.append(make_system(atoms.cell[:], atoms.positions, atoms.numbers, tags, name, (1, 0, 0), -1.0))
    return found


def balance(costs: Costs, configs: dict[str, Config], turns: int) -> dict[str, Any]:
    cases: dict[str, dict[str, list[float]]] = {}
    for stage in configs:
        c = {"dealt": configs[stage], "each its own": _each_its_own(configs[stage], stage)}
        for ranks in RANKS:
            cases[f"{stage}, {ranks} ranks"] = {
                way: [waiting(costs, config, stage, ranks, seed) for seed in range(turns)]
                for way, config in c.items()
            }
    says = "simulated: the slowest rank's cost over the mean, summed over passes"
    return record.claim(
        "scale_balance", says, "1", cases, {"structures": "30 of OC20", "config": "a100x8/7b"}
    )


def _each_its_own(config: Config, stage: str) -> Config:
    """The stage as it was before passes were dealt."""
    o: Any = getattr(config, stage)
    before = {"grpo": {"batch_tokens": None, "micro_batch": 16}, "ga_grpo": {"batch_tokens": None}}
    return replace(config, **{stage: replace(o, **before.get(stage, {"dealt": False}))})


def evaluation(costs: Costs, configs: dict[str, Config]) -> dict[str, Any]:
    """Seconds of eight A100s at their data sheet's rates."""
    card, ranks = CARDS["A100"], 8
    cases: dict[str, dict[str, list[float]]] = {}
    for size in ("3b", "7b"):
        config = {stage: load_config([f"a100x8/{size}.yaml", f"a100x8/{stage}.yaml"]) for stage in configs}
        token, atoms = 2 * PARAMETERS[size], float(costs.atoms.mean())
        structure = ENCODER[size] * atoms
        train = 0.0
        for stage in ("align", "joint", "instruct"):
            o: Any = getattr(config[stage], stage)
            n = o.steps * o.batch_size * ranks
            text = costs.supervised(stage, config[stage], 10_000, np.random.default_rng(0)).mean()
            shown = 1.0 if stage == "align" else o.property_share
            passes = {"align": (1, 3), "joint": (3, 3), "instruct": (3, 1)}[stage]
            words = text - o.atom_tokens * atoms * shown
            train += n * (passes[0] * words * token + passes[1] * shown * structure)
        o = config["grpo"].grpo
        answer = float(costs.answer.mean())
        train += o.steps * ranks * o.batch_size * o.group_size * answer * (4 + 1) * (token + 2 * HEAD[size])
        with Ledger(cuda=True) as ledger, backend_forced("triton"):
            model, collate = planned_model(config["align"], costs.systems)
            each = reading(model.eval(), collate, costs.systems[:8], ledger)
        flops = sum(energies(each, config[stage], stage) for stage in configs)
        shares = sum(refit(each, config[stage], stage) for stage in configs)
        after = (flops + shares) / (ranks * card.half)
        before = flops * SYSTEMS["test"] / config["align"].evaluate.property_systems / (ranks * card.wide)
        whole = train / (ranks * card.half)
        cases[f"{size}, seconds"] = {"now": [after], "float32, all test systems": [before]}
        cases[f"{size}, share of training"] = {
            "now": [after / whole],
            "float32, all test systems": [before / whole],
        }
    says = "energies, shares and calibration after five stages, at the data sheet's rates of 8 A100s"
    return record.claim("scale_evaluation", says, "s, or 1", cases, {"test systems": SYSTEMS["test"]})


def regression(n: int, turns: int) -> dict[str, Any]:
    """What takes the time of the text regression, at OC20's ratio of words to texts."""
    rng = np.random.default_rng(0)
    x = rng.poisson(0.05, (n, 3 * n)).astype(float)
    x -= x.mean(0)
    samples = record.in_turn(
        {"systems": lambda: np.linalg.eigh(x @ x.T), "words": lambda: np.linalg.eigh(x.T @ x)}, turns
    )
    says = "the text regression's decomposition: of the systems' matrix, and of the words'"
    return record.claim("scale_baselines", says, "s", {f"{n} systems": samples}, {"words": 3 * n})


def weights() -> list[dict[str, Any]]:
    """GB that an update of the samplers' weights moves, and that a node's memory holds for it.

    vLLM: what trains, by every rank to its own vLLM, a decoder layer at a time; where few weights train the
    others sleep in the host's memory (level 1). Service: what trains, sent once by the main rank, and kept to
    be sent again. Folder: what vLLM took before, the whole text tower of every rank in shared memory (a copy,
    the file, and the one before).
    """
    ranks = 8
    moved: dict[str, dict[str, list[float]]] = {}
    held: dict[str, dict[str, list[float]]] = {}
    for size in ("3b", "7b"):
        config = load_config([f"a100x8/{size}.yaml", "a100x8/grpo.yaml"])
        with Ledger(cuda=False), backend_forced("triton"):
            model, _ = planned_model(config, synthetic_systems(80))
            sizes = Weights(model, torch.bfloat16, 1.0).sizes(trained=False)
            sent = {
                name: p
                for name, p in model.named_parameters()
                if sampled_with(name) and name.startswith("llm.") and not name.startswith(VISUAL)
            }
            adapters = sum(
                2 * LORA_R * sum(p.shape)
                for name, p in sent.items()
                if p.dim() == 2 and name.split(".")[-2] in LINEARS
            )
            head = 2 * model.llm.lm_head.weight.numel()
            trained = 2 * sum(p.numel() for p in sent.values())
        llm = sum(map(sum, sizes))
        folder = {"vLLM's folder": [ranks * llm / 1e9]}, {"vLLM's folder": [3 * ranks * llm / 1e9]}
        # of the adapters a copy, the bytes of their file, and the file
        ways = {
            "all": (llm, ranks * max(map(sum, sizes)), trained),
            f"LoRA, r = {LORA_R}": (adapters, ranks * (llm + 3 * adapters), adapters),
            "GA-GRPO": (head, ranks * (llm + head), None),
        }
        for way, (one, kept, by_service) in ways.items():
            served = {} if by_service is None else {"service": [by_service / 1e9]}
            moved[f"{size}, {way}"] = {"vLLM": [ranks * one / 1e9], **served, **folder[0]}
            held[f"{size}, {way}"] = {"vLLM": [kept / 1e9], **served, **folder[1]}
    conditions = {"node": f"{ranks} ranks", "config": "a100x8, grpo", "precision": "two bytes a weight"}
    says = "moved when samplers get new weights"
    return [
        record.claim("scale_weights", says, "GB", moved, conditions),
        record.claim(
            "scale_memory", "of a node's memory for new weights of samplers", "GB", held, conditions
        ),
    ]


def decoding(quick: bool) -> list[dict[str, Any]]:
    """In a steady batch, and as the loop is on a CPU."""
    operators: dict[str, dict[str, list[float]]] = {}
    waits: dict[str, dict[str, list[float]]] = {}
    tokens = 33 if quick else TOKENS
    for kind, grammar in (("free", False), ("under the grammar", True)):
        for way, steady in (("steady", True), ("as on a CPU", False)):
            found = per_token(grammar, steady, tokens)
            for depth in (28, 36):
                operators.setdefault(f"{kind}, {depth} layers", {})[way] = [found.operators(depth)]
            waits.setdefault(kind, {})[way] = [found.waits]
    conditions = {"tokens": tokens, "answers": 16}
    says = (
        "operators that a GPU is given a token of each answer; recorded ones are started by two calls a pass"
    )
    return [
        record.claim("scale_decoding", says, "1", operators, conditions),
        record.claim("scale_waits", "waits of the host for the device, a token", "1", waits, conditions),
    ]


class Echo:
    """In the place of the engine: answers with the structure of the system that is asked for, shaken, and
    takes no time for it. A hidden state per token, as the stage's update wants."""

    def __init__(self, systems: Sequence[System], width: int = 8) -> None:
        self.seconds = {"prefill": 0.0, "decode": 0.0}
        self.systems = {s.identity: s for s in systems}
        self.width, self.rng = width, np.random.default_rng(0)

    def generate(
        self, samples: Sequence[Sample], params: SamplingConfig, seed: Sequence[int], group_size: int = 1,
        **_: Any,
    ) -> list[Rollout]:  # fmt: skip
        began = time.perf_counter()
        found = [self._answer(k, s) for k, s in enumerate(samples) for _ in range(group_size)]
        self.seconds["decode"] += time.perf_counter() - began
        return found

    def _answer(self, prompt: int, sample: Sample) -> Rollout:
        system = self.systems[IDENTITY.search(sample.prompt)[0]]  # type: ignore[index]
        ids = torch.zeros(4, dtype=torch.int64)
        text = write_cif(jitter(system, 0.02, self.rng))
        return Rollout(prompt, ids, torch.zeros(4), torch.zeros(4, self.width), True, text)


def tasks(quick: bool) -> dict[str, Any]:
    """GA-GRPO's own work: what a step takes beside sampling, reward, prediction and update; what a checkpoint
    has of the tasks, and what it takes to write that and to go on from it on two ranks."""
    world = start(load_config(None, ["data.slabs=all"]))
    systems = list(open_data(load_config(None, ["data.slabs=all"]).data)["train"])
    plain, search.energies_and_errors = search.energies_and_errors, _any_energies
    found: dict[str, dict[str, list[float]]] = {}
    try:
        for through in (100, 300) if quick else (100, 1_000, 10_000):
            for under_way in (64, through):
                case = f"{under_way:,} under way, {through:,} have left" if under_way == 64 else (
                    f"{under_way:,} under way"
                )  # fmt: skip
                steps = -(-through // 64) * 2 + 1 if under_way == 64 else 2
                with tempfile.TemporaryDirectory() as folder:
                    told = _searched(systems, under_way, steps, world, Path(folder))
                found |= {f"{case}: {what}": {"now": [value]} for what, value in told.items()}
    finally:
        search.energies_and_errors = plain
        torch.distributed.destroy_process_group()
    says = "tasks of GA-GRPO: what they take beside sampling, reward, prediction and update"
    return record.claim("scale_tasks", says, "as named", found, {"candidates of a task": 1 + 2 * 2})


class _NoGraphs:
    """A collator that any structure is right for."""

    def graphs(self, systems: Sequence[System]) -> None:
        return None


def _any_energies(model: Any, collate: Any, questions: Sequence[Any], **_: Any) -> tuple[Any, Any]:
    return np.linspace(-1, 1, len(questions)), np.zeros(len(questions))


def _searched(
    systems: list[System], under_way: int, steps: int, world: World, folder: Path
) -> dict[str, float]:
    """A stage of so many steps, two of which are the life of a task."""
    words = [f"ga_grpo.batch_size={under_way}", "ga_grpo.initial=1", "ga_grpo.group_size=2"]
    words += ["ga_grpo.iterations=2", "ga_grpo.sampling.max_new_tokens=null", "data.slabs=all"]
    config = load_config(None, [*NARROW, *words])
    model, collate = new_model(config, systems[:40])
    context = Context(config, model, collate, {"train": systems, "val": [], "test": []}, world, folder)
    stage, engine = GAGRPO(context), Echo(systems)
    stage._engine = lambda: engine  # type: ignore[method-assign,assignment,return-value]
    stage.add_policy = lambda *_: None  # type: ignore[method-assign]
    stage.loop.predictor = model, _NoGraphs()  # type: ignore[assignment]
    seconds = []
    for k in range(steps):
        spent = [*stage.loop.seconds.values(), *engine.seconds.values()]
        began = time.perf_counter()
        stage.step(k)
        took = time.perf_counter() - began
        now = [*stage.loop.seconds.values(), *engine.seconds.values()]
        seconds.append(took - sum(now) + sum(spent))
        if stage.running:  # none has left after this step
            state, remembered = stage.state(), len(stage.loop._known)
    path = folder / "extra-0.json"
    began = time.perf_counter()
    path.write_text(json.dumps(state))
    written = time.perf_counter() - began
    resumed = []
    for rank in range(2):
        context.world = World(rank, 2, world.device)
        other = GAGRPO(context)
        began = time.perf_counter()
        other.load_state(json.loads(path.read_text()))
        resumed.append(time.perf_counter() - began)
    return {
        "ms a step": 1e3 * statistics.median(seconds[-6:]),
        "structures remembered": remembered,
        "KiB of a checkpoint": path.stat().st_size / 1024,
        "ms to write it": 1e3 * written,
        "ms to go on from it": 1e3 * max(resumed),
    }


def main() -> None:
    parser = record.arguments(__doc__)
    parts = ("balance", "evaluation", "baselines", "decoding", "weights", "tasks")
    parser.add_argument("--part", choices=parts, help="one of the claims")
    args = parser.parse_args()
    stages = ("align", "joint", "instruct", "grpo", "ga_grpo")
    configs = {stage: load_config(["a100x8/7b.yaml", f"a100x8/{stage}.yaml"]) for stage in stages}
    claims = []
    if args.part in (None, "balance", "evaluation"):
        costs = Costs(oc20(), configs["align"])
        if args.part != "evaluation":
            claims.append(balance(costs, configs, 3 if args.quick else 10))
        if args.part != "balance":
            claims.append(evaluation(costs, configs))
    if args.part in (None, "baselines"):
        claims.append(regression(300 if args.quick else 800, 2 if args.quick else 3))
    if args.part in (None, "decoding"):
        claims += decoding(args.quick)
    if args.part in (None, "weights"):
        claims += weights()
    if args.part in (None, "tasks"):
        claims.append(tasks(args.quick))
    record.finish(args, claims)


if __name__ == "__main__":
    main()
