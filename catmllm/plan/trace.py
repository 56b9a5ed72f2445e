"""What a configuration needs, before any GPU is asked for it: memory of a rank, FLOPs, bytes sent,
and what would fit.

`trace` runs one training step of a stage by the trainer's own code on fake tensors, as rank 0 of a fake
process group (see `ledger`). Sampling is not traced but added up: its weights, caches and logits have sizes
that are plain products.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from catmllm.config import Config, SamplingConfig
from catmllm.data.batches import Collator
from catmllm.data.open import texts_only
from catmllm.data.prompts import Sample, design_prompt
from catmllm.evaluate.baselines import evenly_spaced
from catmllm.models.build import new_model, outline_model
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.models.state import described_model, stage_folder
from catmllm.plan.balance import Costs, waiting
from catmllm.plan.cards import CARDS, PUBLISHED, Card
from catmllm.plan.decoding import per_token
from catmllm.plan.evaluation import energies, reading, refit
from catmllm.plan.ledger import Ledger, Peak, backend_forced
from catmllm.plan.made_up import is_made_up, of_oc20s_sizes, planned_systems, qwen_like_tokenizer
from catmllm.report.summary import GENERATING
from catmllm.sample.answers import Rollout, answer_limits
from catmllm.sample.engine import ROWS
from catmllm.sample.grammar import Walk, answer_pattern, grammar_of
from catmllm.sample.rows import bucket, slots_of
from catmllm.sample.vllm_weights import Weights
from catmllm.sample.wire import sampled_with
from catmllm.stages import STAGES
from catmllm.stages.ga_grpo import GAGRPO
from catmllm.stages.grpo import GRPO
from catmllm.structure.system import System
from catmllm.train.setup import Ready, clip, prepare, update
from catmllm.train.sharding import unsharded
from catmllm.train.stage import Context, Stage, Step
from catmllm.world import DTYPES, World, encoder_dtype, settled

GIB = 2**30
SIMULATED = 256  # systems of a training set whose sizes stand for all
TURNS = 4
SAMPLING = ("grpo", "ga_grpo")  # stages that sample answers


@dataclass
class Plan:
    """One stage of one configuration on `ranks` ranks. Memory in GiB a rank,
    the rest of one optimizer step and rank."""

    stage: str
    card: str
    ranks: int
    micro_batch: int  # samples (RL: sequences) of a pass
    passes: int
    tokens: int  # of all passes
    peak: float
    parts: dict[str, float]  # of the peak of the training step
    phases: dict[str, float]  # the peak of each phase: load, sampling, training step
    flops: dict[str, float]
    wide_flops: float  # of them in float32
    sent: dict[str, float]  # bytes, by collective
    moved: float  # bytes read and written by operators, each alone
    launches: int  # kernels that the host starts, at least: one of each operator, those of our ops counted
    seconds: dict[str, float]  # least time on the card by what bounds it; not timed
    mfu_bound: float
    # of the products of forward and backward passes, how much a model needs: the rest is made again
    useful: dict[str, float] = field(default_factory=dict)
    # seconds of a step by part: the update at the highest and the lowest MFU that others have published; of
    # sampling what the weights and caches take to be read
    step: dict[str, float] = field(default_factory=dict)
    # bytes of all ranks that new weights of another process, which samples, move and hold
    sampler: dict[str, float] = field(default_factory=dict)
    layers: int = 0  # of the text tower
    steps: int = 0  # of the stage
    # time of the slowest rank's passes over the mean rank's, simulated
    balance: float = 1.0
    # seconds of what is measured after the stage, at least, and its share of the stage's steps
    evaluation: dict[str, float] = field(default_factory=dict)
    evaluation_share: float = 0.0
    # of our own decoding: operators that a GPU is given, and waits of the host for it, a token
    decoding: dict[str, float] = field(default_factory=dict)

    @property
    def launch_bound(self) -> float:
        """Seconds of the host a launch, above which it and not the GPU sets the pace of the step."""
        return max(self.seconds["compute"], self.seconds["NVLink"]) / max(1, self.launches)

    def fits(self, limit: float) -> bool:
        return self.peak <= limit


def trace(
    config: Config,
    stage: str,
    ranks: int = 8,
    *,
    card: str = "A100",
    cuda: bool = True,
    data: Mapping[str, Sequence[System]] | None = None,
    atoms: int = 80,
    steps: int = 16,
) -> Plan:
    """The plan of one stage on a `card` of `CARDS`. `cuda`: with the workspaces that the ops take on a GPU;
    False: those on a CPU.

    `data`: systems by split; None: those that `data.path` names where they exist, or synthetic ones of
    `atoms` atoms where the LLM is a pretrained one, or the shipped ones. The step planned is that of the
    first `steps` which has most tokens. Leaves no process group behind; raises RuntimeError inside of one,
    ConfigError for a pretrained LLM whose sizes are unknown.
    """
    if dist.is_initialized():
        raise RuntimeError("a plan makes a process group of its own; this process has one already")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    various = of_oc20s_sizes(atoms) if data is None and is_made_up(config) else None
    data = planned_systems(config, atoms) if data is None else data
    by = sampled_by(config, stage)
    precision = settled(config, "cuda" if cuda else "cpu").encoder_precision
    # What neither takes memory nor changes a step's work, and what cannot run here.
    config = replace(
        config,
        encoder_precision=precision,
        compile=False,
        tensorboard=False,
        optimizer="torch",
        data=replace(config.data, workers=0),
        grpo=replace(config.grpo, vllm=None, rollout="colocated", staleness=0),
        ga_grpo=replace(config.ga_grpo, vllm=None),
    )
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        world = World(0, ranks, torch.device("cpu"))
        plan = _trace(config, stage, world, CARDS[card], cuda, data, steps, by)
    finally:
        dist.destroy_process_group()
    if not texts_only(data["train"]):  # of which every sample is short
        costs = Costs(various or evenly_spaced(data["train"], SIMULATED), config)
        plan.balance = float(np.mean([waiting(costs, config, stage, ranks, seed) for seed in range(TURNS)]))
    if cuda and stage in SAMPLING and by != "vllm":
        count = per_token(getattr(config, stage).sampling.grammar)
        plan.decoding = {"operators": count.operators(plan.layers), "waits": count.waits}
    return plan


def _trace(
    config: Config,
    name: str,
    world: World,
    card: Card,
    cuda: bool,
    data: Mapping[str, Sequence[System]],
    steps: int,
    by: str | None,
) -> Plan:
    # `linear_logprob` keeps few logits on a CPU alone.
    with Ledger(cuda) as ledger, backend_forced("triton") if cuda else nullcontext():
        ledger.phase("load")
        model, collate = planned_model(config, data["train"])
        if not config.data.images and hasattr(model.llm.model, "visual"):
            model.llm.model.visual = torch.nn.Module()  # the trainer leaves the image tower on the CPU
        context = Context(config, model, collate, data, world, Path())
        stage = STAGES[name](context)
        ready = prepare(stage, context)
        stage.begin()
        if isinstance(stage, GRPO) and stage.reference is not None:
            ledger.mark([*stage.reference.parameters(), *stage.reference.buffers()], "reference model")
        if isinstance(stage, GAGRPO):
            ledger.mark([stage.reference_head], "reference head")
        ledger.mark([*model.parameters(), *model.buffers()], "parameters")
        ledger.phase("other")
        _first_update(ready, ledger)
        if name in SAMPLING:
            with unsharded(model):  # as sampling does: frozen parts then stay whole
                pass
        _watch(model, ledger)
        model.train()
        with ledger.making("batch"):
            works = (_step(stage, context, k) for k in range(1 if name in SAMPLING else steps))
            work = max(works, key=lambda w: sum(p.tokens for p in w.passes))
        ledger.phase("training step")
        ledger.launches = 0
        _passes(work, ready, ledger, stage.config.sync_every_pass)
        ledger.mark([p.grad for p in ready.trained], "gradients")
        with ledger.optimizing():
            clip(ready, stage.config.grad_clip)
            update(ready)
    # Shards in the host's memory; the step that updates them runs there too.
    host = ("parameters", "gradients", "optimizer states") if config.cpu_offload and cuda else ()
    peaks = ledger.peaks(elsewhere=host)
    if name in SAMPLING:
        _add_sampling(peaks, stage, context, by, card, cuda)
    phases = {k: p.total / GIB for k, p in peaks.items() if k != "other"}
    tf32 = config.encoder_precision == "tf32"
    own: dict[str, Any] = {name: stage.config}
    passed = micro_batch_of(replace(config, **own), name)
    plan = _plan(name, context, work, passed, peaks["training step"], phases, ledger, card, tf32)
    if name in SAMPLING:
        plan.step["sampling, at least"] = sampling_seconds(stage, context, card, cuda)
        plan.sampler = new_weights(context, by)
    plan.layers, plan.steps = model.text.config.num_hidden_layers, stage.config.steps
    _evaluate(plan, context, ledger, card)
    return plan


def _evaluate(plan: Plan, context: Context, ledger: Ledger, card: Card) -> None:
    """What is measured after the stage, and its share of all steps at their own least time."""
    config, ranks, name = context.config, context.world.size, plan.stage
    ledger.phase("other")
    with ledger, backend_forced("triton") if ledger.cuda else nullcontext():
        each = reading(context.model, context.collate, list(context.data["train"][:4]), ledger)
    rate = ranks * (card.half if DTYPES[config.precision].itemsize == 2 else card.wide)
    plan.evaluation = {
        "energies": energies(each, config, name) / rate,
        "shares and calibration": refit(each, config, name) / rate,
    }
    if name in GENERATING:
        e = config.evaluate
        twice = 1 + e.sampling.grammar  # the free policy is measured beside
        answers, read = -(-e.generation_samples // ranks), decoder_bytes(context)
        plan.evaluation["sampled CIFs"] = twice * decoding_seconds(context, e.sampling, answers, read, card)
    step = max(plan.seconds["compute"], plan.seconds["NVLink"]) + plan.step.get("sampling, at least", 0.0)
    plan.evaluation_share = sum(plan.evaluation.values()) / (plan.steps * step)


def _plan(
    name: str,
    context: Context,
    work: Step,
    passed: int,
    peak: Peak,
    phases: dict[str, float],
    ledger: Ledger,
    card: Card,
    tf32: bool,
) -> Plan:
    """What the ledger counted, and the least seconds that it takes on a card. `passed`: samples of a pass."""
    flops, sent = {k: float(v) for k, v in ledger.flops.items() if v}, dict(ledger.sent)
    half, wide = sum(flops.values()) - ledger.wide_flops, float(ledger.wide_flops)
    seconds = {
        "compute": half / card.half + wide / (card.tf32 if tf32 else card.wide),
        "NVLink": sum(sent.values()) / card.nvlink,
        "HBM, every operator alone": ledger.moved / card.hbm,
        # The count has both halves of every sample's scores; a kernel leaves out those of later tokens.
        **{k: ledger.attention_flops / 2 / (share * card.half) for k, share in card.attention.items()},
    }
    useful, again = flops["forward"] + flops["backward"], flops.get("recomputed", 0.0)
    low, high = PUBLISHED["rl" if name in SAMPLING else "supervised"]
    return Plan(
        stage=name,
        card=card.name,
        ranks=context.world.size,
        micro_batch=passed,
        passes=len(work.passes),
        tokens=sum(p.tokens for p in work.passes),
        peak=max(phases.values()),
        parts={k: v / GIB for k, v in sorted(peak.parts.items(), key=lambda kv: -kv[1])},
        phases=phases,
        flops=flops,
        wide_flops=wide,
        sent=sent,
        moved=float(ledger.moved),
        launches=ledger.launches,
        seconds=seconds,
        mfu_bound=useful / card.half / max(seconds["compute"], seconds["NVLink"]),
        useful={"forward": 1.0, "backward": flops["backward"] / max(1.0, flops["backward"] + again)},
        step={f"update at MFU {mfu:.1%}": useful / card.half / mfu for mfu in (high, low)},
    )


def planned_model(config: Config, systems: Sequence[System]) -> tuple[CatalyticMLLM, Collator]:
    """The model by its configuration, without any file: a pretrained LLM by its published sizes,
    its head untied."""
    if config.model.llm.pretrained is not None:
        return outline_model(config, qwen_like_tokenizer(systems, config.data.decimals))
    encoder = replace(config.model.encoder, checkpoint=None)
    return new_model(replace(config, model=replace(config.model, encoder=encoder)), systems)


def _first_update(ready: Ready, ledger: Ledger) -> None:
    """An update with zero gradients, so that the optimizer's states exist; what it cost is forgotten."""
    with ledger.optimizing():
        for p in ready.trained:
            p.grad = torch.zeros_like(p)
        ready.optimizer.step()
        ready.optimizer.zero_grad(set_to_none=True)
    ledger.mark([list(s.values()) for s in ready.optimizer.state.values()], "optimizer states")
    ledger.flops.clear()
    ledger.sent.clear()
    ledger.moved = ledger.wide_flops = ledger.attention_flops = 0


def _watch(model: CatalyticMLLM, ledger: Ledger) -> None:
    """Tell the encoder's activations from the LLM's."""
    ledger.role = "activations"

    def enter(*_: Any) -> None:
        ledger.role = "encoder activations"

    def leave(*_: Any) -> None:
        ledger.role = "activations"

    for module in (model.encoder, model.projector):
        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)


def _passes(work: Step, ready: Ready, ledger: Ledger, sync_every_pass: bool) -> None:
    """The first and the last pass of a step, as the trainer runs them; those between count as the first."""
    n = len(work.passes)
    for i in sorted({0, n - 1}):
        ready.model.set_requires_gradient_sync(sync_every_pass or i == n - 1)
        ready.scaler.scale(work.passes[i].loss()).backward()
        if i == 0 and n > 2:
            ledger.flops.update({k: v * (n - 1) for k, v in ledger.flops.items()})
            ledger.sent.update({k: v * (n - 1) for k, v in ledger.sent.items()})
            ledger.moved *= n - 1
            ledger.wide_flops *= n - 1
            ledger.attention_flops *= n - 1
            ledger.launches *= n - 1


def _step(stage: Stage, context: Context, step: int) -> Step:
    """The passes of a step. Of an RL stage those over made-up answers, each as long as answers may be."""
    if not isinstance(stage, GRPO | GAGRPO):
        return stage.step(step)
    o = stage.config
    n, length = o.batch_size * o.group_size, longest_answer(context, o.sampling)
    if o.batch_tokens is not None:  # of answers that are all this long, as many as a pass holds
        o = replace(o, micro_batch=max(1, o.batch_tokens // length), batch_tokens=None)
        stage.config = o  # the stage's alone: how ranks wait is told by what was given
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, 60, (n, length)))
    hidden: Sequence[torch.Tensor | None] = [None] * n
    if isinstance(stage, GAGRPO):
        width = context.model.text.config.hidden_size
        hidden = list(torch.zeros(n, length, width, dtype=DTYPES[context.config.precision]))
    rollouts = [
        Rollout(i // o.group_size, ids[i], torch.zeros(length), hidden[i], True, "", limit=length)
        for i in range(n)
    ]
    work = Step([], defaultdict(float))
    advantages, informative = np.resize([1.0, -1.0], n), np.ones(n, dtype=bool)
    if isinstance(stage, GAGRPO):
        stage.add_policy(work, rollouts, advantages, informative)
        return work
    rng = np.random.default_rng(0)
    prompts = [stage.prompt(i, i, rng)[0] for i in range(o.batch_size)]
    stage.add_policy(work, prompts, rollouts, advantages, informative)
    stage.add_replay(work, 0)
    return work


def _add_sampling(
    peaks: dict[str, Peak], stage: Stage, context: Context, by: str | None, card: Card, cuda: bool
) -> None:
    """The phase of sampling among the others, and in the training step what stays of it."""
    held = ("parameters", "optimizer states", "reference model", "reference head")
    step, stays = peaks["training step"], staying_bytes(stage, context, by, cuda)
    parts = {k: step.parts[k] for k in held if k in step.parts}
    parts |= stays | sampling_bytes(stage, context, by, card, cuda)
    peaks["training step"] = Peak(step.total + sum(stays.values()), step.parts | stays)
    peaks["sampling"] = Peak(sum(parts.values()), parts)


def sampling_bytes(
    stage: Stage, context: Context, by: str | None, card: Card, steady: bool
) -> dict[str, int]:
    """What a rank holds while answers are sampled, beside its shards and what stays of it in training:
    nothing where a service samples; where vLLM does, weights gathered while its share of the card wakes."""
    if by == "service":
        return {}
    if by == "vllm":
        share = getattr(context.config, stage.name).vllm_memory * card.memory * GIB
        return {"gathered weights": gathered_bytes(context), "vLLM": int(share)}
    return {"gathered weights": gathered_bytes(context), **decoding_bytes(stage, context, steady)}


def staying_bytes(stage: Stage, context: Context, by: str | None, cuda: bool) -> dict[str, int]:
    """What GA-GRPO holds in all its steps and no trace sees: the weights that our own decoding has laid out,
    of which a step renews the head alone, and the model of `predictor`."""
    if stage.name != "ga_grpo":
        return {}
    own = {} if by else {"weights laid out for decoding": decoder_bytes(context)}
    other = context.config.ga_grpo.predictor
    return own if other is None else own | {"predictor": predictor_bytes(context, cuda)}


def predictor_bytes(context: Context, cuda: bool) -> int:
    """Of the weights of `ga_grpo.predictor`, whole; where they are not there yet, of a model like the one
    that trains."""
    model, config = context.model, context.config
    with suppress(FileNotFoundError):
        model, _, trained = described_model(stage_folder(str(config.ga_grpo.predictor)))
        config = settled(trained, "cuda" if cuda else "cpu")
    parts = (model.encoder, model.projector, model.energy_head)
    graph = sum(p.numel() for part in parts for p in part.parameters())
    llm = sum(p.numel() for p in model.llm.parameters())
    return graph * encoder_dtype(config).itemsize + llm * DTYPES[config.precision].itemsize


def gathered_bytes(context: Context) -> int:
    """Of the weights that sampling has whole."""
    graph = sum(p.numel() for m in (context.model.encoder, context.model.projector) for p in m.parameters())
    return decoder_bytes(context) + graph * encoder_dtype(context.config).itemsize


def decoding_bytes(stage: Stage, context: Context, steady: bool) -> dict[str, int]:
    """What our own decoding takes (`sample.rows`, `sample.answers`), in the call that takes most: weights
    laid out, caches for answers as long as may be, logits, and hidden states, kept and handed over."""
    o: Any = stage.config
    text, size = context.model.text.config, DTYPES[context.config.precision].itemsize
    head = context.model.text.layers[0].self_attn.head_dim
    slot = 2 * text.num_hidden_layers * text.num_key_value_heads * head * size
    new, width = longest_answer(context, o.sampling), widest_prompt(context, o.sampling)

    def call(group: int, keeps: bool) -> dict[str, int]:
        n = o.batch_size * group
        places = min(n, max(ROWS, group))
        rows, prompts = bucket(places, steady), min(o.batch_size, places) + steady
        return {
            "KV caches": (prompts * width + rows * slots_of(new)) * slot,
            "logits": 3 * 4 * rows * text.vocab_size,
            "hidden states kept": (2 * n + 1) * new * text.hidden_size * size if keeps else 0,
        }

    searches = stage.name == "ga_grpo"
    calls = [call(o.group_size, searches), *([call(o.initial, False)] if searches else [])]
    most = max(calls, key=lambda parts: sum(parts.values()))
    return {"weights laid out for decoding": decoder_bytes(context), **most}


def widest_prompt(context: Context, sampling: SamplingConfig) -> int:
    """Tokens of the longest design prompt for some training systems, with what a grammar forces behind it."""
    collate, data, some = context.collate, context.config.data, context.data["train"][:8]
    asked = [Sample(design_prompt(s.identity, -0.5, exemplar=True), "", s) for s in some]
    lengths = [len(collate.prompt_ids(s)) for s in asked]
    if sampling.grammar:
        patterns = [answer_pattern(s.identity, s.target, True, data, collate.templates) for s in some]
        grammar = grammar_of(collate.tokenizer, collate.end_id)
        begun = Walk(grammar, patterns, longest_answer(context, sampling)).begun
        lengths = [n + len(b) for n, b in zip(lengths, begun)]
    return max(lengths)


def sampled_by(config: Config, stage: str) -> str | None:
    """Which other process samples for a stage: `vllm`, `service` or none."""
    o: Any = getattr(config, stage)
    if getattr(o, "vllm", None) is not None:
        return "vllm"
    return "service" if getattr(o, "rollout", "colocated") == "service" else None


def new_weights(context: Context, by: str | None) -> dict[str, float]:
    """Bytes that an update of the sampler's weights moves, and that are held for it, of all ranks together.

    A service gets what trains once, from the main rank, which keeps it. Every rank sends what trains to a
    vLLM of its own, by a buffer as long as a decoder layer where all of it trains; else vLLM's other weights
    sleep in the host's memory, beside what is sent (of adapters two more copies, of which one is a file).
    """
    if by is None:
        return {}
    model, ranks, dtype = context.model, context.world.size, DTYPES[context.config.precision]
    trained = {
        name: p.numel()
        for name, p in model.named_parameters()
        if p.requires_grad and name.startswith("llm.") and sampled_with(name)
    }
    sent = float(sum(trained.values()) * dtype.itemsize)
    if by == "service":
        return {"moved": sent, "held": sent}
    weights = Weights(model, dtype, 1.0)
    layers = [sum(part) for part in weights.sizes(trained=False)]
    weights.close()
    adapters = any(".lora_" in name for name in trained)
    held = max(layers) if weights.all_train() else sum(layers) + (3 if adapters else 1) * sent
    return {"moved": ranks * sent, "held": float(ranks * held)}


def sampling_seconds(stage: Stage, context: Context, card: Card, steady: bool) -> float:
    """Least seconds of a step's answers on a card, each as long as it may be: for every token the weights
    and, half full, the caches are read."""
    o: Any = stage.config
    parts = decoding_bytes(stage, context, steady)
    read = parts["weights laid out for decoding"] + parts["KV caches"] / 2
    return decoding_seconds(context, o.sampling, o.batch_size * o.group_size, read, card)


def decoding_seconds(
    context: Context, sampling: SamplingConfig, answers: int, read: float, card: Card
) -> float:
    """Least seconds of a rank's answers, `ROWS` at a time, each as long as it may be: for every token `read`
    bytes of the card's memory."""
    return -(-answers // ROWS) * longest_answer(context, sampling) * read / card.hbm


def decoder_bytes(context: Context) -> int:
    """Of the text tower and the LM head, laid out for decoding."""
    model = context.model
    weights = (*model.text.parameters(), model.llm.lm_head.weight)
    return sum(p.numel() for p in weights) * DTYPES[context.config.precision].itemsize


def longest_answer(context: Context, sampling: SamplingConfig) -> int:
    """Tokens of the longest answer that some training systems allow."""
    some = [(s.identity, s.target) for s in context.data["train"][:64]]
    return max(answer_limits(context.collate, sampling, some))


def micro_batch_of(config: Config, stage: str) -> int:
    """Samples (RL: sequences) of one forward pass."""
    o: Any = getattr(config, stage)
    return o.micro_batch if hasattr(o, "micro_batch") else -(-o.batch_size // getattr(o, "accumulate", 1))
