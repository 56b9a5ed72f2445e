"""What a configuration needs, before any GPU is asked for it: memory of a rank, FLOPs, bytes sent, and what would fit.

`trace` runs one training step of a stage by the trainer's own code on fake tensors, as rank 0 of a fake process group
(see `ledger`). Sampling is not traced but added up: its weights, caches and logits have sizes that are plain products.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from catmllm.config import Config, ConfigError, LLMConfig
from catmllm.data.batches import Collator
from catmllm.data.images import IMAGE_PAD, VISION_END, VISION_START
from catmllm.data.prompts import ENERGY, GRAPH, cif_sample, design_prompt, design_sample, property_sample
from catmllm.data.slabs import load_slabs, split
from catmllm.data.tokenizer import tiny_tokenizer
from catmllm.models.attention import by_part
from catmllm.models.build import new_model
from catmllm.models.catalytic_mllm import CatalyticMLLM, build_encoder, collator
from catmllm.models.lora import add_lora
from catmllm.models.projector import Projector
from catmllm.plan.ledger import Ledger, backend_forced
from catmllm.sample.engine import CACHE_STEP, Rollout
from catmllm.stages import STAGES
from catmllm.structure.system import ADSORBATE, SURFACE, System, make_system
from catmllm.train.activations import prepare_blocks
from catmllm.train.loop import ADAPTED, Context, Step, _freeze, _optimizer, _update
from catmllm.train.sharding import shard, unsharded
from catmllm.world import DTYPES, World

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GIB = 2**30
SAMPLING = ("grpo", "ga_grpo")  # stages that sample answers
LIMIT = (
    76.0  # GiB: of an A100's 80 GB (79.2 GiB), less the CUDA context, NCCL's buffers and some fragmentation
)

# A100-SXM4-80GB, by its data sheet: FLOP/s of tensor cores in half precision and of float32, bytes/s of HBM, bytes/s that
# NVLink 3 carries in one direction.
HALF_FLOPS, WIDE_FLOPS, HBM, NVLINK = 312e12, 19.5e12, 2.0e12, 300e9

# The published text towers, so that a plan needs neither the hub nor the weights.
QWEN = {
    "3B": {
        "hidden_size": 2048,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "intermediate_size": 11008,
        "vocab_size": 151936,
    },
    "7B": {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
    },
}


QWEN_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "window_size": 112,
}


@dataclass
class Plan:
    """One stage of one configuration on `ranks` ranks. Memory in GiB a rank, the rest of one optimizer step and rank."""

    stage: str
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
    seconds: dict[str, float] = field(
        default_factory=dict
    )  # least time on an A100 by what bounds it; not timed
    mfu_bound: float = 0.0

    def fits(self, limit: float) -> bool:
        return self.peak <= limit


def trace(
    config: Config,
    stage: str,
    ranks: int = 8,
    *,
    cuda: bool = True,
    data: dict[str, list[System]] | None = None,
    atoms: int = 80,
    steps: int = 16,
) -> Plan:
    """The plan of one stage. `cuda`: with the workspaces that the ops take on a GPU; False: those on a CPU.

    `data`: systems by split; None: those that `data.path` names where they exist, or synthetic ones of `atoms` atoms
    where the LLM is a pretrained one, or the shipped ones. The step planned is that of the first `steps` which has most
    tokens. Leaves no process group behind; raises RuntimeError inside
    of one, ConfigError for a pretrained LLM whose sizes are unknown.
    """
    if dist.is_initialized():
        raise RuntimeError("a plan makes a process group of its own; this process has one already")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    data = _systems(config, atoms) if data is None else data
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        return _trace(config, stage, World(0, ranks, torch.device("cpu")), cuda, data, steps)
    finally:
        dist.destroy_process_group()


def _trace(
    config: Config, name: str, world: World, cuda: bool, data: dict[str, list[System]], steps: int
) -> Plan:
    config = replace(config, compile=False, tensorboard=False)
    # `linear_logprob` keeps few logits on a CPU alone.
    with Ledger(cuda) as ledger, backend_forced("triton") if cuda else nullcontext():
        ledger.phase("load")
        model, collate = _model(config, data["train"])
        if not config.data.images:
            model.llm.model.visual = torch.nn.Module()  # the trainer leaves the image tower on the CPU
        context = Context(config, model, collate, data, world, Path())
        stage: Any = STAGES[name](context)
        adapters = config.lora.r > 0 and stage.trains(ADAPTED)
        if adapters:
            add_lora(model, config.lora, config.seed)
        _freeze(model, stage, adapters)
        prepare_blocks(model, config)
        shard(model, config, world, stage.config.reshard)
        stage.begin()
        if isinstance(reference := getattr(stage, "reference", None), torch.nn.Module):
            ledger.mark([*reference.parameters(), *reference.buffers()], "reference model")
        optimizer = _optimizer(model, stage.config)
        scaler = torch.amp.GradScaler(
            "cpu", enabled="fp16" in (config.precision, config.encoder_precision), init_scale=1.0
        )
        trained = [p for p in model.parameters() if p.requires_grad]
        ledger.mark([*model.parameters(), *model.buffers()], "parameters")
        ledger.phase("other")
        with ledger.optimizing():  # a first step, so that its states exist
            for p in trained:
                p.grad = torch.zeros_like(p)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        ledger.mark([list(s.values()) for s in optimizer.state.values()], "optimizer states")
        for counts in (ledger.flops, ledger.sent):
            counts.clear()
        ledger.moved = ledger.wide_flops = 0
        if name in SAMPLING:
            with unsharded(model):  # as sampling does: frozen parts then stay whole
                pass
        _watch(model, ledger)
        model.train()
        with ledger.making("batch"):
            works = (_step(stage, context, k) for k in range(1 if name in SAMPLING else steps))
            work = max(works, key=lambda w: sum(p.tokens for p in w.passes))
        ledger.phase("training step")
        _passes(work, model, scaler, ledger, stage.config.sync_every_pass)
        ledger.mark([p.grad for p in trained], "gradients")
        with ledger.optimizing():
            _update(optimizer, scaler, trained, stage.config.grad_clip)
    # Shards in the host's memory; the step that updates them runs there too.
    host = ("parameters", "gradients", "optimizer states") if config.cpu_offload and cuda else ()
    peaks = ledger.peaks(elsewhere=host)
    phases = {k: p.total / GIB for k, p in peaks.items() if k != "other"}
    held = ("parameters", "optimizer states", "reference model")
    persistent = sum(peaks["training step"].parts.get(k, 0) for k in held)
    if name in SAMPLING:
        prompt = max(
            len(collate.encode(design_prompt(s.identity, -0.5, exemplar=True))) for s in data["train"][:8]
        )
        parts = sampling_bytes(config, stage.config, model, name, prompt)
        phases["sampling"] = (persistent + sum(parts.values())) / GIB
    plan = Plan(
        name,
        world.size,
        micro_batch_of(config, name),
        len(work.passes),
        sum(p.tokens for p in work.passes),
        max(phases.values()),
        {k: v / GIB for k, v in sorted(peaks["training step"].parts.items(), key=lambda kv: -kv[1])},
        phases,
        {k: float(v) for k, v in ledger.flops.items() if v},
        float(ledger.wide_flops),
        dict(ledger.sent),
        float(ledger.moved),
    )
    half = sum(plan.flops.values()) - plan.wide_flops
    plan.seconds = {
        "compute": half / HALF_FLOPS + plan.wide_flops / WIDE_FLOPS,
        "NVLink": sum(plan.sent.values()) / NVLINK,
        "HBM, every operator alone": plan.moved / HBM,
    }
    useful = plan.flops["forward"] + plan.flops["backward"]
    plan.mfu_bound = useful / HALF_FLOPS / max(plan.seconds["compute"], plan.seconds["NVLink"])
    return plan


def _model(config: Config, systems: list[System]) -> tuple[CatalyticMLLM, Collator]:
    """The model by its configuration, without any file: a pretrained LLM by its published sizes, its head untied."""
    llm, encoder = config.model.llm, replace(config.model.encoder, checkpoint=None)
    if llm.pretrained is None:
        return new_model(replace(config, model=replace(config.model, encoder=encoder)), systems)
    from transformers import Qwen2_5_VLForConditionalGeneration

    tokenizer = _tokenizer(systems, config.data.decimals)
    if config.data.images:
        tokenizer.add_tokens([VISION_START, IMAGE_PAD, VISION_END])
    qwen = qwen_config(llm, tokenizer, config.data.images)
    # flash-attn cannot be imported here; torch's fused attention keeps the same: the output and a row of sums.
    attention = "sdpa" if llm.attention == "flash_attention_2" else llm.attention
    tower = Qwen2_5_VLForConditionalGeneration._from_config(qwen, attn_implementation=by_part(attention))
    tower.model.visual.to(torch.bfloat16)  # as published
    graph = build_encoder(encoder, config.data.cutoff)
    e, words = graph.config, tokenizer.get_vocab()
    projector = Projector(
        config.model.projector, e.lmax, e.sphere_channels, qwen.get_text_config().hidden_size
    )
    model = CatalyticMLLM(tower, graph, projector, words[GRAPH], words[ENERGY])
    return model, collator(model, tokenizer, config)


def qwen_config(llm: LLMConfig, tokenizer: PreTrainedTokenizerBase, images: bool) -> Any:
    """transformers' configuration of a pretrained LLM: of a local folder, or by the size in a published name.

    Without `images` the image tower is as small as it can be: the trainer leaves the real one on the CPU.
    """
    from transformers import Qwen2_5_VLConfig

    name = str(llm.pretrained)
    if (Path(name) / "config.json").is_file():
        read: Any = Qwen2_5_VLConfig.from_pretrained(name, local_files_only=True)
        text, vision = read.get_text_config().to_dict(), read.vision_config.to_dict()
    elif found := re.search(r"Qwen2\.5-VL-(3B|7B)", name):
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
        text = QWEN[found[1]] | {
            "rope_parameters": rope,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
        }
        vision = QWEN_VISION | {"out_hidden_size": text["hidden_size"]}
    else:
        raise ConfigError(
            f"`model.llm.pretrained: {name}` is no folder here, and its sizes are not known; a plan knows "
            f"Qwen2.5-VL-{' and Qwen2.5-VL-'.join(QWEN)}, or reads the config.json of a downloaded model"
        )
    ids = {
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if not images:
        vision = {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 1,
            "fullatt_block_indexes": [0],
            "out_hidden_size": text["hidden_size"],
        }
    return Qwen2_5_VLConfig(
        text_config=text | ids | {"tie_word_embeddings": False},
        vision_config=vision,
        tie_word_embeddings=False,
    )


def _tokenizer(systems: list[System], decimals: int) -> PreTrainedTokenizerBase:
    """One that cuts CIFs as the extended Qwen tokenizer does: a token for the decimals of a number, fixed lines whole."""
    texts = (
        sample.prompt + sample.answer
        for s in systems[:40]
        for sample in (
            property_sample(s),
            property_sample(s, "graph"),
            cif_sample(s, decimals),
            design_sample(s, s),
        )
    )
    # No merges: 591 tokens for a CIF of 80 atoms, where the extended Qwen tokenizer makes 558.
    return tiny_tokenizer(texts, merges=0, decimals=decimals)


def _systems(config: Config, atoms: int) -> dict[str, list[System]]:
    path = config.data.path
    if (path is not None and not Path(path).exists()) or (
        path is None and config.model.llm.pretrained is not None
    ):
        systems = synthetic_systems(atoms)
    else:
        return {str(k): v for k, v in split(load_slabs(path), config.data.split_seed).items()}
    return {"train": systems, "val": systems[:8], "test": systems[:8]}


def synthetic_systems(atoms: int, count: int = 512) -> list[System]:
    """CO on fcc slabs of Pt and Ni with `atoms` atoms each (OC20's mean is 78): shapes for plans, not chemistry."""
    rng = np.random.default_rng(0)
    slab = atoms - 2
    side = max(1, round((slab / 4) ** 0.5))
    lattice = np.diag([2.8 * side, 2.8 * side, 2.0 * (slab // side**2 + 1) + 16.0])
    grid = np.array([(i % side, i // side % side, i // side**2) for i in range(slab)], dtype=float)
    positions = grid * [2.8, 2.8, 2.0] + (grid[:, 2:] % 2) * [1.4, 1.4, 0.0]
    top = positions[:, 2].max()
    positions = np.vstack([positions, [[0.0, 0.0, top + 1.9], [0.0, 0.0, top + 3.05]]])
    tags = np.full(atoms, SURFACE)
    tags[-2:] = ADSORBATE
    out = []
    for i in range(count):
        numbers = np.append(rng.permutation([78] * (slab // 2) + [28] * (slab - slab // 2)), [6, 8])
        shaken = positions + rng.normal(0, 0.05, positions.shape)
        out.append(
            make_system(
                lattice, shaken, numbers, tags, "CO", (1, 0, 0), float(rng.normal()), f"synthetic-{i}"
            )
        )
    return out


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


def _passes(
    work: Step, model: Any, scaler: torch.amp.GradScaler, ledger: Ledger, sync_every_pass: bool
) -> None:
    """The first and the last pass of a step, as the trainer runs them; those between count as the first."""
    n = len(work.passes)
    for i in sorted({0, n - 1}):
        model.set_requires_gradient_sync(sync_every_pass or i == n - 1)
        scaler.scale(work.passes[i].loss()).backward()
        if i == 0 and n > 2:
            ledger.flops.update({k: v * (n - 1) for k, v in ledger.flops.items()})
            ledger.sent.update({k: v * (n - 1) for k, v in ledger.sent.items()})
            ledger.moved *= n - 1
            ledger.wide_flops *= n - 1


def _step(stage: Any, context: Context, step: int) -> Step:
    """The passes of a step. Of an RL stage those over made-up answers, each as long as answers may be."""
    if stage.name not in SAMPLING:
        return stage.step(step)
    o = stage.config
    work = Step([], defaultdict(float))
    n = o.batch_size * o.group_size
    length = o.sampling.max_new_tokens
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, 60, (n, length)))
    hidden = None
    if stage.name == "ga_grpo":
        width = context.model.text.config.hidden_size
        hidden = torch.zeros(n, length, width, dtype=DTYPES[context.config.precision])
    rollouts = [
        Rollout(
            i // o.group_size, ids[i], torch.zeros(length), None if hidden is None else hidden[i], True, ""
        )
        for i in range(n)
    ]
    advantages, informative = np.resize([1.0, -1.0], n), np.ones(n, dtype=bool)
    if stage.name == "ga_grpo":
        stage._add_policy(work, rollouts, advantages, informative)
        return work
    rng = np.random.default_rng(0)
    prompts = [stage._prompt(i, i, rng) for i in range(o.batch_size)]
    stage._add_policy(work, prompts, rollouts, advantages, informative)
    stage._add_replay(work, 0)
    return work


def sampling_bytes(
    config: Config, optim: Any, model: CatalyticMLLM, name: str, prompt_tokens: int
) -> dict[str, int]:
    """What a rank holds while it samples, beside its shards: weights gathered and laid out for decoding, KV caches."""
    size = DTYPES[config.precision].itemsize
    text = model.text.config
    llm = sum(p.numel() for p in (*model.text.parameters(), model.llm.lm_head.weight))
    graph = sum(p.numel() for m in (model.encoder, model.projector) for p in m.parameters())
    rows = min(
        256,
        optim.batch_size * (max(optim.group_size, optim.initial) if name == "ga_grpo" else optim.group_size),
    )
    prompts = min(rows, optim.batch_size)
    head = text.hidden_size // text.num_attention_heads
    slot = 2 * text.num_hidden_layers * text.num_key_value_heads * head * size
    new = optim.sampling.max_new_tokens
    kept = rows * new * text.hidden_size * size if name == "ga_grpo" else 0
    return {
        "gathered weights": llm * size + graph * DTYPES[config.encoder_precision].itemsize,
        "weights laid out for decoding": llm * size,
        "KV caches": (prompts * prompt_tokens + rows * (new + CACHE_STEP)) * slot,
        "logits": 3 * 4 * rows * text.vocab_size,
        "hidden states kept": kept,
    }


def micro_batch_of(config: Config, stage: str) -> int:
    """Samples (RL: sequences) of one forward pass."""
    o: Any = getattr(config, stage)
    return o.micro_batch if hasattr(o, "micro_batch") else -(-o.batch_size // getattr(o, "accumulate", 1))


def with_micro_batch(config: Config, stage: str, size: int) -> Config:
    """The same configuration with passes of another size; a supervised stage then makes one pass a step."""
    o: Any = getattr(config, stage)
    changes = {"micro_batch": size} if hasattr(o, "micro_batch") else {"batch_size": size, "accumulate": 1}
    return replace(config, **{stage: replace(o, **changes)})


def largest_micro_batch(
    plan: Plan, of: Callable[[int], Plan], limit: float, highest: int = 4096
) -> tuple[int, float]:
    """(micro-batch, its peak): the largest that fits, from a plan and a function that plans another size; (0, peak of 1)
    if none does. Memory is close to a straight line in it, so a few plans do."""
    known = {plan.micro_batch: plan.peak}
    while len(known) < 7:
        good = max((b for b, p in known.items() if p <= limit), default=0)
        bad = min((b for b, p in known.items() if p > limit), default=highest + 1)
        if bad - good <= max(1, good // 32):
            break
        if len(known) == 1:
            guess = 2 * good if good else bad // 2
        else:
            (b0, p0), (b1, p1) = sorted(known.items(), key=lambda kv: abs(kv[1] - limit))[:2]
            slope = (p1 - p0) / (b1 - b0)
            guess = int(b0 + (limit - p0) / slope) if slope > 1e-9 else 2 * good
        guess = min(max(guess, good + 1), bad - 1)
        known[guess] = of(guess).peak
    best = max((b for b, p in known.items() if p <= limit), default=0)
    return best, known[best or min(known)]


# What saves memory, by rising price; each is tried on top of those before.
SWITCHES = (
    ("checkpointing", "selective"),
    ("{stage}.sync_every_pass", True),
    ("checkpointing", "full"),
    ("{stage}.reshard", "all"),
    ("cpu_offload", True),
)


def _turned_on(config: Config, stage: str, key: str, value: Any) -> Config | None:
    """The configuration with a switch turned on, or None where it is on already."""
    name = key.rpartition(".")[2]
    node: Any = getattr(config, stage) if "." in key else config
    now = getattr(node, name)
    if now == value or (name == "checkpointing" and now == "full"):
        return None
    changed = replace(node, **{name: value})
    return changed if node is config else replace(config, **{stage: changed})


@dataclass
class Advice:
    """What `advise` found: the plan, the largest micro-batch that fits with it, and what to turn on where none does."""

    plan: Plan
    largest: int = 0
    largest_peak: float = 0.0
    turn_on: list[str] = field(default_factory=list)


def advise(
    config: Config,
    stage: str,
    ranks: int,
    limit: float = LIMIT,
    *,
    search: bool = True,
    say: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> Advice:
    """Plan a stage; with `search` also find the largest micro-batch that fits in `limit` GiB, turning on what saves
    memory, one switch after the other, only where not even one sample fits. `options` go to `trace`."""

    def plan(c: Config) -> Plan:
        say(f"{stage}: tracing {micro_batch_of(c, stage)} a pass")
        return trace(c, stage, ranks, **options)

    advice = Advice(plan(config))
    if not search:
        return advice
    advice.largest, advice.largest_peak = largest_micro_batch(
        advice.plan, partial(_again, plan, config, stage), limit
    )
    for key, value in SWITCHES:
        if advice.largest:
            break
        changed = _turned_on(config, stage, key, value)
        if changed is None:
            continue
        config = changed
        advice.turn_on.append(f"{key.format(stage=stage)}={str(value).lower()}")
        one = plan(with_micro_batch(config, stage, 1))
        if one.fits(limit):
            again = partial(_again, plan, config, stage)
            advice.largest, advice.largest_peak = largest_micro_batch(one, again, limit)
    return advice


def _again(plan: Callable[[Config], Plan], config: Config, stage: str, size: int) -> Plan:
    return plan(with_micro_batch(config, stage, size))


def table(advice: Advice, limit: float) -> str:
    """The plan for a terminal."""
    p = advice.plan
    verdict = "fits" if p.fits(limit) else "DOES NOT FIT"
    lines = [
        f"{p.stage} on {p.ranks} ranks: {p.peak:.1f} GiB a rank, {verdict} in {limit:g} GiB "
        f"(micro-batch {p.micro_batch}, {p.passes} passes, {p.tokens} tokens a step and rank)",
        *(f"  {'peak of ' + k:34s}{v:9.2f} GiB" for k, v in p.phases.items()),
        "  the training step's peak:",
        *(f"    {k:32s}{v:9.2f} GiB" for k, v in p.parts.items() if v >= 0.005),
        f"  FLOPs a step and rank{sum(p.flops.values()) / 1e12:23.1f} T  ("
        + ", ".join(f"{k} {v / 1e12:.1f}" for k, v in p.flops.items())
        + f"; in float32 {p.wide_flops / 1e12:.2f})",
        f"  sent a step and rank{sum(p.sent.values()) / GIB:24.2f} GiB  ("
        + ", ".join(f"{k} {v / GIB:.2f}" for k, v in p.sent.items())
        + ")",
        "  least seconds on an A100, not timed  " + ", ".join(f"{k} {v:.3f}" for k, v in p.seconds.items()),
        f"  MFU at most{p.mfu_bound:34.0%}  (communication hidden, no operator waits)",
    ]
    if advice.turn_on:
        lines.append(f"  turn on: {' '.join(advice.turn_on)}")
    if advice.largest:
        lines.append(f"  largest micro-batch that fits: {advice.largest} ({advice.largest_peak:.1f} GiB)")
    elif advice.turn_on:
        lines.append("  nothing fits even so: take more ranks or a smaller model")
    return "\n".join(lines)


def main(
    config: Config, stages: list[str], ranks: int, limit: float, atoms: int, search: bool, as_json: bool
) -> int:
    """`catmllm plan`: 0 if every stage fits, else 1."""
    import json

    say = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    found = []
    for stage in stages:
        advice = advise(config, stage, ranks, limit, search=search, say=say, atoms=atoms)
        found.append(advice)
        if not as_json:
            print(table(advice, limit), flush=True)
    if as_json:
        print(json.dumps([asdict(a) | {"limit": limit, "fits": a.plan.fits(limit)} for a in found], indent=1))
    return int(not all(a.plan.fits(limit) for a in found))
