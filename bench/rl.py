"""The RL stages compared with TRL and Hugging Face: one process, same tiny model, prompts, K,
lengths and reward.

    python bench/rl.py [--part step …] [--precision fp32] [--plot FILE.png] [--quick] [--json] [--base COMMIT]

Six parts, each in turn with its peer, on one thread and in processor time (steps:
each trainer's own clock), in float32 unless it says otherwise:
- step: a GRPO step (sampling, reward, update) compared with TRL's GRPOTrainer, and the reward's share of it;
- rollout: tokens per second compared with `generate`, for single samples and for 16 per prompt,
  with short and with long prompts;
- update: the third stage's update of the head, from hidden states kept or recomputed,
  compared with a full-model update;
- grammar: answers per second of the model in the package, under the grammar and without it;
- scaling: seconds and peak memory of an update against answer length and group size;
- overlap: a GRPO step whose answers a service samples on a core of its own, beside the update
  (`staleness: 1`) and before it, compared with the longer of both and with one process on both cores.
But for `grammar`, every answer has exactly the given length (the end token is disabled on both sides). The
peers run with eager attention and with SDPA, and the faster one counts.
"""

from __future__ import annotations

import copy
import logging
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench import record  # first: it decides whose packages are measured
from catmllm.cli.trained import load_to_read
from catmllm.config import Config, SamplingConfig
from catmllm.data.open import open_data
from catmllm.data.prompts import Sample, cif_prompt
from catmllm.models import SHIPPED
from catmllm.models.build import new_model
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.sample.answers import Rollout, answer_limits
from catmllm.sample.engine import RolloutEngine
from catmllm.sample.grammar import answer_pattern, grammar_of
from catmllm.sample.packed import rollout_batch
from catmllm.sample.wire import Client
from catmllm.stages.advantages import policy_loss
from catmllm.stages.grpo import GRPO
from catmllm.structure.text import three_part_text
from catmllm.train.loop import train
from catmllm.train.metrics import read_log
from catmllm.train.stage import Context
from catmllm.world import DTYPES, start
from catmllm_kernels.linear_logprob import linear_logprobs
from rewards_fast import PVCP

PARTS = ("step", "rollout", "update", "grammar", "scaling", "overlap")
ATTENTIONS = ("eager", "sdpa")  # of the peers


def main() -> None:
    parser = record.arguments(__doc__)
    parser.add_argument(
        "--part", action="append", choices=PARTS, help="only this part; may be given again (default: all)"
    )
    parser.add_argument(
        "--precision",
        action="append",
        choices=("fp32", "bf16"),
        help="of the part `step`; may be given again (default: both)",
    )
    parser.add_argument("--plot", type=Path, help="draw the scaling part here")
    args = parser.parse_args()
    parts = args.part or list(PARTS)
    if args.plot and "scaling" not in parts:
        parser.error("--plot draws the part `scaling`: leave --part out, or add it")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    size = Size(*((4, 4, 32, 2) if args.quick else (8, 8, 128, 3)))
    config = bench_config(size)
    systems = open_data()["train"]
    model, collate = new_model(config, systems)
    collate.end_id = -7  # never sampled: every answer has the full length
    claims: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        world = start(config)
        if "step" in parts:
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
                claims += steps(
                    args.precision or ["fp32", "bf16"],
                    config,
                    model,
                    collate,
                    systems,
                    size,
                    world,
                    Path(folder),
                )
        if "rollout" in parts:
            claims += rollout(model, collate, systems, size)
        if "update" in parts:
            claims += update(model, collate, systems, size)
        if "grammar" in parts:
            claims += grammar(size)
        if "scaling" in parts:
            rows = scaling(model, collate, systems, size)
            claims += rows
            if args.plot:
                draw(rows, args.plot)
        if "overlap" in parts and len(os.sched_getaffinity(0)) > 1:
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
                claims += overlap(config, model, collate, systems, size, world, Path(folder))
        torch.distributed.destroy_process_group()
    record.finish(args, claims)


class Size:
    """Prompts per step, samples per prompt, tokens per answer, repeats."""

    def __init__(self, prompts: int, group: int, tokens: int, repeats: int) -> None:
        self.prompts, self.group, self.tokens, self.repeats = prompts, group, tokens, repeats

    def conditions(self) -> dict[str, Any]:
        return {
            "prompts": self.prompts,
            "samples per prompt": self.group,
            "tokens per answer": self.tokens,
            "turns": self.repeats,
            "threads": 1,
        }


def bench_config(size: Size) -> Config:
    config = Config(precision="fp32", tensorboard=False)
    o = config.grpo
    o.batch_size, o.group_size, o.micro_batch = size.prompts, size.group, size.prompts * size.group
    o.steps, o.warmup, o.property_share, o.checkpoint_every = size.repeats + 1, 1, 0.0, 1000
    o.beta, o.lr, o.validate_every = 0.02, 1e-6, 0
    o.sampling = SamplingConfig(temperature=1.0, top_p=0.95, max_new_tokens=size.tokens, grammar=False)
    return config


def steps(
    precisions: list[str],
    config: Config,
    model: Any,
    collate: Any,
    systems: list,
    size: Size,
    world: Any,
    folder: Path,
) -> list[dict[str, Any]]:
    cases, parts = {}, {}
    for precision in precisions:
        cases[precision], parts[precision] = step(
            replace(config, precision=precision), model, collate, systems, size, world, folder / precision
        )
    says = "a GRPO step (sampling, reward, update) compared with TRL's GRPOTrainer"
    return [record.claim("grpo_step", says, "s", cases, size.conditions() | {"ours, in parts": parts})]


def step(
    config: Config, model: Any, collate: Any, systems: list, size: Size, world: Any, folder: Path
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of each whole GRPO step, ours and TRL's, by each one's own clock, the first left out;
    ours in parts."""
    rows = our_steps(config, model, collate, systems, size, world, folder)[1:]
    samples = {"ours": [r["seconds"] for r in rows]}
    for a in ATTENTIONS:
        samples[f"TRL, {a}"] = trl_steps(model, collate, systems, config, size, folder / a, a)
    ours = statistics.median(samples["ours"])
    of = {
        name: statistics.median(r[f"seconds_{name}"] for r in rows)
        for name in ("prefill", "decode", "reward")
    }
    of["update"] = statistics.median(r["seconds"] - r["prepare_seconds"] for r in rows)
    return samples, of | {"reward, % of the step": 100 * of["reward"] / ours}


def our_steps(
    config: Config, model: Any, collate: Any, systems: list, size: Size, world: Any, folder: Path
) -> list[dict[str, Any]]:
    """The log of all steps of a run of ours."""
    folder.mkdir()
    data = {"train": systems[: 8 * size.prompts]}
    context = Context(config, copy.deepcopy(model), collate, data, world, folder)

    def make(c: Context) -> GRPO:
        stage = GRPO(c)
        stage.reward = lambda texts, asked: reward_of_noise(texts, [s.target for s in asked])
        stage.prompt = lambda i, k, rng: Sample(  # type: ignore[method-assign]
            cif_prompt(stage.systems[i].identity)
        )
        return stage

    train(make, context)
    return read_log(folder / "log.jsonl")


def overlap(
    config: Config, model: Any, collate: Any, systems: list, size: Size, world: Any, folder: Path
) -> list[dict[str, Any]]:
    """Seconds of a step with its sampling on a second core: beside the update, before it, and by one process
    with two threads. Of each run the first two steps are left out: they are sampled by the first weights."""
    first, second, *_ = sorted(os.sched_getaffinity(0))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "catmllm.cli", "rollouts", "--port", str(port)]
    service = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.sched_setaffinity(service.pid, {second})
    rows: dict[str, list[dict[str, Any]]] = {}
    try:
        o = replace(config.grpo, steps=size.repeats + 4)
        Client(f"http://127.0.0.1:{port}", 120.0).wait()
        ways: dict[str, dict[str, Any]] = {"two threads": {}}
        ways |= {f"staleness {k}": {"rollout": "service", "staleness": k} for k in (0, 1)}
        for name, options in ways.items():
            os.sched_setaffinity(0, {first} if options else {first, second})
            torch.set_num_threads(1 if options else 2)
            grpo = replace(o, service=f"http://127.0.0.1:{port}", **options)
            way = replace(config, grpo=grpo)
            rows[name] = our_steps(way, model, collate, systems, size, world, folder / name)[2:]
    finally:
        os.sched_setaffinity(0, {first, second})
        torch.set_num_threads(1)
        service.kill()
        service.wait()
    parts = [(r["seconds_rollouts"], r["seconds"] - r["seconds_rollouts"]) for r in rows["staleness 0"]]
    samples = {
        "staleness 1": [r["seconds"] for r in rows["staleness 1"]],
        "staleness 0": [r["seconds"] for r in rows["staleness 0"]],
        "the longer of sampling and update": [max(p) for p in parts],
        "one process, two threads": [r["seconds"] for r in rows["two threads"]],
    }
    of = {
        "sampling": statistics.median(p[0] for p in parts),
        "update": statistics.median(p[1] for p in parts),
    }
    of |= {
        name: statistics.median(r[name] for r in rows["staleness 1"])
        for name in ("seconds_rollouts", "seconds_sync")
    }
    says = "a GRPO step whose answers a service samples on a second core, beside the update"
    conditions = size.conditions() | {"turns": len(parts), "staleness 0, in parts": of}
    return [record.claim("grpo_overlap", says, "s", {"fp32": samples}, conditions)]


def reward_of_noise(texts: list[str], targets: list) -> list[float]:
    """PVCP plus a trifle for every `e`: random weights write nothing that parses, and a group of equal
    rewards would cost ours no update at all."""
    total = PVCP(threads=1).score(texts, targets).total
    return [float(r) + 1e-3 * t.count("e") for r, t in zip(total, texts)]


def trl_reward(completions: list[str], target: list[str], **_: Any) -> list[float]:
    return reward_of_noise(completions, target)


def trl_steps(
    model: Any, collate: Any, systems: list, config: Config, size: Size, folder: Path, attention: str
) -> list[float]:
    """Seconds of each optimizer step of TRL's GRPOTrainer, the first left out."""
    import datasets
    import trl
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.times.append(time.perf_counter() - self.began)

    o = config.grpo
    policy = text_model(model, attention)
    policy.save_pretrained(folder / "reference")
    policy.config._name_or_path = str(folder / "reference")
    arguments = trl.GRPOConfig(
        output_dir=str(folder / "trl"), max_steps=size.repeats + 1, learning_rate=o.lr, beta=o.beta,
        per_device_train_batch_size=size.prompts * size.group, num_generations=size.group, loss_type="grpo",
        max_completion_length=size.tokens, temperature=1.0, top_p=o.sampling.top_p, top_k=0,
        generation_kwargs={"min_new_tokens": size.tokens}, use_cpu=True, bf16=config.precision == "bf16",
        fp16=False, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
        use_bias_correction_kl=False, activation_checkpointing=False,
    )  # fmt: skip
    rows = [{"prompt": cif_prompt(s.identity), "target": dict(s.target)} for s in systems[: 8 * size.prompts]]
    for row in rows:
        row["target"] = " ".join(f"{k}{n}" for k, n in row["target"].items())  # one column type
    clock = Clock()
    trainer = trl.GRPOTrainer(
        model=policy,
        reward_funcs=trl_reward,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=collate.tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    return clock.times[1:]


def text_model(model: Any, attention: str) -> Any:
    """The LLM's text tower and head as the text-only class of transformers, which TRL trains."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    c = model.text.config
    qwen = Qwen2Config(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads, rms_norm_eps=c.rms_norm_eps, tie_word_embeddings=False,
        max_position_embeddings=c.max_position_embeddings, bos_token_id=None, eos_token_id=c.eos_token_id,
        pad_token_id=c.pad_token_id,
    )  # fmt: skip
    out = Qwen2ForCausalLM._from_config(qwen, attn_implementation=attention)
    out.load_state_dict(
        {
            f"model.{k.removeprefix('model.language_model.')}" if k.startswith("model.") else k: v
            for k, v in model.llm.state_dict().items()
            if not k.startswith("model.visual.")
        },
        strict=True,
    )
    return out


def rollout(model: Any, collate: Any, systems: list, size: Size) -> list[dict[str, Any]]:
    """Tokens per second compared with `generate`;
    long prompts carry their configuration text many times over."""
    short = [Sample(cif_prompt(s.identity)) for s in systems[: size.prompts]]
    long = []
    for s in systems[: size.prompts]:
        text = three_part_text(s)
        while len(collate.encode(cif_prompt(s.identity) + text)) < 512:
            text += " " + three_part_text(s)
        long.append(Sample(text + cif_prompt(s.identity)))
    cases, attention = {}, {}
    params = SamplingConfig(temperature=1.0, top_p=0.95, max_new_tokens=size.tokens)
    engine = RolloutEngine(model, collate)
    for prompts in (short, long):
        for group in (1, 16):
            peers = {
                a: partial(hugging_face, text_model(model, a), collate, prompts, params, group)
                for a in ATTENTIONS
            }
            fastest = min(ATTENTIONS, key=lambda a: seconds(peers[a]))  # also its warm-up
            # `generate` on 16 long prompts takes a minute
            repeats = size.repeats if group == 1 or prompts is short else 2
            found = record.in_turn(
                {"ours": partial(engine.generate, prompts, params, [0], group), "generate": peers[fastest]},
                repeats,
            )
            tokens = len(prompts) * group * size.tokens
            name = f"prompt of {max(len(collate.prompt_ids(p)) for p in prompts)} tokens, {group} per prompt"
            cases[name] = {who: [tokens / t for t in times] for who, times in found.items()}
            attention[name] = fastest
    return [
        record.claim(
            "rollout",
            "sampling compared with transformers' generate",
            "tokens per second of processor time",
            cases,
            {**size.conditions(), "samples per prompt": "in the names", "attention of generate": attention},
            less_is_better=False,
        )
    ]


@torch.no_grad()
def hugging_face(llm: Any, collate: Any, prompts: list[Sample], params: SamplingConfig, group: int) -> None:
    """transformers' own sampling on the same left-padded prompts."""
    rows = [collate.prompt_ids(p) for p in prompts for _ in range(group)]
    width = max(map(len, rows))
    ids = torch.tensor([[collate.pad_id] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    llm.generate(
        input_ids=ids, attention_mask=mask, do_sample=True, temperature=params.temperature,
        top_p=params.top_p, top_k=0, min_new_tokens=params.max_new_tokens,
        max_new_tokens=params.max_new_tokens, pad_token_id=collate.pad_id,
    )  # fmt: skip


class Updates:
    """One set of rollouts, and the three ways to make an update of them."""

    def __init__(
        self, model: Any, collate: Any, systems: list, prompts: int, group: int, tokens: int
    ) -> None:
        self.model, self.collate = copy.deepcopy(model), collate
        self.reference = copy.deepcopy(model).requires_grad_(False)
        self.prompts = [Sample(cif_prompt(s.identity)) for s in systems[:prompts]]
        params = SamplingConfig(temperature=1.0, top_p=0.95, max_new_tokens=tokens)
        engine = RolloutEngine(model, collate)
        self.rollouts = engine.generate(self.prompts, params, [0], group, keep_hidden=True)
        self.batch = rollout_batch(collate, self.prompts, self.rollouts)
        self.advantage = torch.linspace(-1, 1, len(self.rollouts))
        self.row = self.batch.answer_sample
        self.targets = torch.cat([r.ids for r in self.rollouts])
        self.head = self.model.llm.lm_head.weight
        self.frozen = self.head.detach().clone()
        self.full_optimizer = torch.optim.AdamW(self.model.llm.parameters(), lr=1e-6, fused=True)
        self.head_optimizer = torch.optim.AdamW([self.head], lr=1e-6, fused=True)

    def full(self) -> None:
        """Policy and reference through the whole model."""
        logprob = self.model(CatalyticMLLM.answer, self.batch).logprob
        with torch.no_grad():
            reference = self.reference(CatalyticMLLM.answer, self.batch).logprob
        self._finish(logprob, reference, self.full_optimizer)

    def kept(self) -> None:
        """The head alone, from the hidden states of decoding."""
        self._head(torch.cat([kept_hidden(r) for r in self.rollouts]))

    def recomputed(self) -> None:
        """The head alone, from one pass of the frozen backbone."""
        with torch.no_grad():
            hidden = self.model.hidden(self.batch)[self.batch.answer_at]
        self._head(hidden)

    def _head(self, hidden: torch.Tensor) -> None:
        found = linear_logprobs(hidden, self.head, self.targets, reference=self.frozen)
        assert found.reference is not None
        self._finish(found.logprob, found.reference, self.head_optimizer)

    def _finish(
        self, logprob: torch.Tensor, reference: torch.Tensor, optimizer: torch.optim.Optimizer
    ) -> None:
        loss, _ = policy_loss(
            logprob,
            logprob.detach(),
            reference,
            self.advantage,
            self.row,
            len(self.rollouts),
            0.02,
            "k3",
            0.2,
        )
        loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def kept_hidden(rollout: Rollout) -> torch.Tensor:
    assert rollout.hidden is not None
    return rollout.hidden


def update(model: Any, collate: Any, systems: list, size: Size) -> list[dict[str, Any]]:
    """The head's update compared with the full model's, on the same rollouts."""
    u = Updates(model, collate, systems, size.prompts, size.group, size.tokens)
    cases = {
        f"hidden states {how}": record.in_turn(
            {"head": run, "whole model": u.full}, size.repeats, time.process_time
        )
        for how, run in (("kept", u.kept), ("made again", u.recomputed))
    }
    says = "update of the head compared with one of the whole model"
    return [record.claim("head_update", says, "s of processor time", cases, size.conditions())]


def grammar(size: Size) -> list[dict[str, Any]]:
    """Whole answers of the model in the package to prompts of test systems, with the grammar and without. The
    grammar builds its tables at first and finds them later."""
    model, collate, config = load_to_read(SHIPPED)
    asked = open_data(config.data)["test"][:: 4 if size.prompts > 4 else 64]
    prompts = [Sample(cif_prompt(s.identity)) for s in asked]
    patterns = [answer_pattern(s.identity, s.target, False, collate.data, collate.templates) for s in asked]
    limits = answer_limits(collate, config.evaluate.sampling, [(s.identity, s.target) for s in asked])
    engine = RolloutEngine(model, collate, DTYPES[config.precision])
    group, tokens = 8, dict[str, list[float]]()

    def rate(who: str, made: Any, seed: int) -> float:
        began = time.process_time()
        rollouts = engine.generate(
            prompts, config.evaluate.sampling, [seed], group, patterns=made, limits=limits
        )
        took = time.process_time() - began
        tokens.setdefault(who, []).append(statistics.mean(len(r.ids) for r in rollouts))
        return len(rollouts) / took

    grammar_of.cache_clear()
    rate("free", None, 0)
    first = rate("grammar", patterns, 0)
    turns = range(1, size.repeats + 1)
    free, masked = zip(*((rate("free", None, k), rate("grammar", patterns, k)) for k in turns))
    cases = {"first call": {"grammar": [first], "free": free}, "later": {"grammar": masked, "free": free}}
    o = config.evaluate.sampling
    about = {
        "model": "that of the package",
        "precision": config.precision,
        "prompts": len(prompts),
        "samples per prompt": group,
        "temperature, top-p": [o.temperature, o.top_p],
        "tokens per answer": {who: statistics.mean(n) for who, n in tokens.items()},
        "turns": size.repeats,
        "threads": 1,
    }
    says = "sampling under the grammar compared with free sampling"
    return [record.claim("grammar", says, "answers per CPU-second", cases, about, less_is_better=False)]


def scaling(model: Any, collate: Any, systems: list, size: Size) -> list[dict[str, Any]]:
    """Seconds and peak tensor memory of a head's and of a full update, by answer length and group size."""
    times, memory = {}, {}
    for tokens in (size.tokens // 2, size.tokens, 2 * size.tokens):
        for group in (4, 16):
            u = Updates(model, collate, systems, 2, group, tokens)
            name = f"{tokens} tokens, K = {group}"
            runs = {"head": u.kept, "whole model": u.full}
            times[name] = record.in_turn(runs, max(2, size.repeats // 2), time.process_time)
            memory[name] = {who: [peak_bytes(run) / 2**20] for who, run in runs.items()}
    conditions = {"prompts": 2, "turns": max(2, size.repeats // 2), "threads": 1}
    says = "an update against tokens per answer and K answers per prompt"
    return [
        record.claim("rl_scaling", says, "s of processor time", times, conditions),
        record.claim("rl_scaling_memory", f"{says}: peak of live tensors", "MiB", memory, conditions),
    ]


def peak_bytes(run: Callable[[], None]) -> int:
    """The most bytes of tensors that a call has alive beyond those that it found,
    from the profiler's records."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        run()
    alive = peak = 0
    for event in p.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def draw(claims: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, one in zip(axes, claims):
        lengths = sorted({int(case.split()[0]) for case in one["value"]})
        values = {"head": one["value"], "whole model": {c: p["whole model"] for c, p in one["peer"].items()}}
        for name, colour in (("whole model", "tab:red"), ("head", "tab:blue")):
            for group, style in ((4, "--"), (16, "-")):
                axis.plot(
                    lengths,
                    [values[name][f"{n} tokens, K = {group}"] for n in lengths],
                    style,
                    color=colour,
                    marker="o",
                    label=f"{name}, K = {group}",
                )
        unit = "seconds" if one["unit"].startswith("s") else "peak MiB"
        axis.set(xlabel="tokens per answer", ylabel=unit, yscale="log")
        axis.set_xticks(lengths)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
