"""The RL stages beside TRL and Hugging Face: one process, same tiny model, prompts, K, lengths and reward.

    python bench/rl.py [--quick] [--json] [--part step --part rollout …] [--plot FILE.png]

Five parts, each in turn with its peer and as medians over repeats, on one thread, in float32 unless it says otherwise:
- step: a GRPO step (sampling, reward, update) beside TRL's GRPOTrainer, and the reward's share of it;
- rollout: tokens per second beside `generate`, for single samples and for 16 a prompt, with short and with long prompts;
- update: the third stage's update of the head, from hidden states kept or recomputed, beside a full-model update;
- grammar: tokens per second with and without the CIF-aware mask;
- scaling: seconds and peak memory of an update against answer length and group size.
Every answer has exactly the given length (the end token is disabled on both sides); under the grammar, at most. The peers
run with eager attention and with SDPA, and the faster one counts.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import platform
import statistics
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

from catmllm.config import Config, SamplingConfig
from catmllm.data.prompts import Sample, cif_prompt
from catmllm.data.slabs import load_slabs, split
from catmllm.models.build import new_model
from catmllm.sample.engine import Rollout, RolloutEngine
from catmllm.sample.grammar import answer_pattern, grammar_of
from catmllm.stages.advantages import policy_loss
from catmllm.stages.grpo import GRPO, rollout_batch
from catmllm.structure.text import three_part_text
from catmllm.train.loop import Context, train
from catmllm.train.metrics import read_log
from catmllm.world import start
from catmllm_kernels.linear_logprob import linear_logprobs
from rewards_fast import PVCP

PARTS = ("step", "rollout", "update", "grammar", "scaling")
ATTENTIONS = ("eager", "sdpa")  # of the peers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="shorter answers, fewer repeats")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
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
    systems = split(load_slabs())["train"]
    model, collate = new_model(config, systems)
    end, collate.end_id = collate.end_id, -7  # never sampled: every answer has the full length
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        world = start(config)
        if "step" in parts:
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
                found["step"] = [
                    step(replace(config, precision=p), model, collate, systems, size, world, Path(folder) / p)
                    for p in args.precision or ("fp32", "bf16")
                ]
        if "rollout" in parts:
            found["rollout"] = rollout(model, collate, systems, size)
        if "update" in parts:
            found["update"] = update(model, collate, systems, size)
        if "grammar" in parts:
            found["grammar"] = grammar(model, collate, systems, size, end)
        if "scaling" in parts:
            found["scaling"] = scaling(model, collate, systems, size)
        torch.distributed.destroy_process_group()
    if args.plot:
        draw(found["scaling"], args.plot)
    head = {"torch": torch.__version__, "machine": platform.processor() or platform.machine(), "threads": 1}
    if args.json:
        print(json.dumps(head | vars(size) | found))
        return
    print(f"torch {torch.__version__}, {head['machine']}, 1 thread; {size}")
    for part, rows in found.items():
        for row in rows:
            print(f"{part:8s} " + ", ".join(f"{k} {v}" for k, v in row.items()))


class Size:
    """Prompts a step, samples a prompt, tokens an answer, repeats."""

    def __init__(self, prompts: int, group: int, tokens: int, repeats: int) -> None:
        self.prompts, self.group, self.tokens, self.repeats = prompts, group, tokens, repeats

    def __str__(self) -> str:
        return f"{self.prompts} prompts x {self.group} samples x {self.tokens} tokens, {self.repeats} repeats"


def bench_config(size: Size) -> Config:
    config = Config(precision="fp32", tensorboard=False)
    o = config.grpo
    o.batch_size, o.group_size, o.micro_batch = size.prompts, size.group, size.prompts * size.group
    o.steps, o.warmup, o.property_share, o.checkpoint_every = size.repeats + 1, 1, 0.0, 1000
    o.beta, o.lr = 0.02, 1e-6
    o.sampling = SamplingConfig(temperature=1.0, top_p=0.95, max_new_tokens=size.tokens)
    return config


def step(
    config: Config, model: Any, collate: Any, systems: list, size: Size, world: Any, folder: Path
) -> dict[str, Any]:
    """A whole GRPO step, ours and TRL's, by each one's own clock around its steps; the first is left out."""
    folder.mkdir()
    data = {"train": systems[: 8 * size.prompts]}
    context = Context(config, copy.deepcopy(model), collate, data, world, folder)

    def make(c: Context) -> GRPO:
        stage = GRPO(c)
        stage.reward = reward_of_noise
        stage._prompt = lambda i, k, rng: Sample(cif_prompt(stage.systems[i].identity))  # type: ignore[method-assign]
        return stage

    train(make, context)
    rows = read_log(folder / "log.jsonl")[1:]
    ours = statistics.median(r["seconds"] for r in rows)
    reward = statistics.median(r["seconds_reward"] for r in rows)
    times = {
        a: statistics.median(trl_steps(model, collate, systems, config, size, folder / a, a))
        for a in ATTENTIONS
    }
    theirs = min(times.values())
    return {
        "precision": config.precision,
        "ours_s": round(ours, 3),
        **{f"trl_{a}_s": round(t, 3) for a, t in times.items()},
        "ratio": round(theirs / ours, 2),
        "reward_share": f"{reward / ours:.3%}",
        "prefill_s": round(statistics.median(r["seconds_prefill"] for r in rows), 3),
        "decode_s": round(statistics.median(r["seconds_decode"] for r in rows), 3),
        "update_s": round(statistics.median(r["seconds"] - r["prepare_seconds"] for r in rows), 3),
    }


def reward_of_noise(texts: list[str], targets: list) -> list[float]:
    """PVCP plus a trifle for every `e`: random weights write nothing that parses, and a group of equal rewards would
    cost ours no update at all."""
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
        generation_kwargs={"min_new_tokens": size.tokens}, use_cpu=True, bf16=config.precision == "bf16", fp16=False, report_to=[],
        save_strategy="no", logging_strategy="no", disable_tqdm=True, use_bias_correction_kl=False,
        activation_checkpointing=False,
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


def rollout(model: Any, collate: Any, systems: list, size: Size) -> list:
    """Tokens per second beside `generate`; long prompts carry their configuration text many times over."""
    short = [Sample(cif_prompt(s.identity)) for s in systems[: size.prompts]]
    long = []
    for s in systems[: size.prompts]:
        text = three_part_text(s)
        while len(collate.encode(cif_prompt(s.identity) + text)) < 512:
            text += " " + three_part_text(s)
        long.append(Sample(text + cif_prompt(s.identity)))
    out = []
    params = SamplingConfig(temperature=1.0, top_p=0.95, max_new_tokens=size.tokens)
    engine = RolloutEngine(model, collate)
    for name, prompts in (("short", short), ("long", long)):
        for group in (1, 16):
            peers = {
                a: partial(hugging_face, text_model(model, a), collate, prompts, params, group)
                for a in ATTENTIONS
            }
            fastest = min(ATTENTIONS, key=lambda a: seconds(peers[a]))  # also its warm-up
            # `generate` on 16 long prompts takes a minute
            repeats = size.repeats if group == 1 or name == "short" else 2
            ours, theirs = in_turn(
                partial(engine.generate, prompts, params, [0], group), peers[fastest], repeats
            )
            tokens = len(prompts) * group * size.tokens
            out.append(
                {
                    "prompt": f"{name} ({max(len(collate.prompt_ids(p)) for p in prompts)} tokens)",
                    "K": group,
                    "ours_tokens_per_s": round(tokens / ours),
                    "generate_tokens_per_s": round(tokens / theirs),
                    "generate_attention": fastest,
                    "ratio": round(theirs / ours, 2),
                }
            )
    return out


@torch.no_grad()
def hugging_face(llm: Any, collate: Any, prompts: list[Sample], params: SamplingConfig, group: int) -> None:
    """transformers' own sampling on the same left-padded prompts."""
    rows = [collate.prompt_ids(p) for p in prompts for _ in range(group)]
    width = max(map(len, rows))
    ids = torch.tensor([[collate.pad_id] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    llm.generate(
        input_ids=ids, attention_mask=mask, do_sample=True, temperature=params.temperature, top_p=params.top_p, top_k=0,
        min_new_tokens=params.max_new_tokens, max_new_tokens=params.max_new_tokens, pad_token_id=collate.pad_id,
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
        logprob = self.model("answer", self.batch)["logprob"]
        with torch.no_grad():
            reference = self.reference("answer", self.batch)["logprob"]
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


def update(model: Any, collate: Any, systems: list, size: Size) -> list:
    """The head's update beside the full model's, on the same rollouts."""
    u = Updates(model, collate, systems, size.prompts, size.group, size.tokens)
    full, kept = in_turn(u.full, u.kept, size.repeats)
    again, recomputed = in_turn(u.full, u.recomputed, size.repeats)
    return [
        {
            "hidden": "kept",
            "full_s": round(full, 3),
            "head_s": round(kept, 3),
            "ratio": round(full / kept, 2),
        },
        {
            "hidden": "recomputed",
            "full_s": round(again, 3),
            "head_s": round(recomputed, 3),
            "ratio": round(again / recomputed, 2),
        },
    ]


def grammar(model: Any, collate: Any, systems: list, size: Size, end: int) -> list:
    """Sampling speed without and with the mask, which builds its tables at first and finds them later.

    The mask needs the end token, so that an answer may be shorter than the rest of this bench's; rates count what was
    sampled.
    """
    asked = systems[: size.prompts]
    prompts = [Sample(cif_prompt(s.identity)) for s in asked]
    patterns = [answer_pattern(s.identity, s.target, False, collate.data.decimals) for s in asked]
    params = SamplingConfig(temperature=1.0, top_p=0.95, max_new_tokens=size.tokens)
    plain = collate.end_id
    collate.end_id = end
    grammar_of.cache_clear()
    engine = RolloutEngine(model, collate)
    out = []

    def rate(made: Any, seed: int) -> float:
        began = time.perf_counter()
        rollouts = engine.generate(prompts, params, [seed], 16, patterns=made)
        return sum(len(r.ids) for r in rollouts) / (time.perf_counter() - began)

    rate(None, 0)
    first = rate(patterns, 0)
    free, masked = zip(*((rate(None, k), rate(patterns, k)) for k in range(1, size.repeats + 1)))
    without, collected = statistics.median(free), statistics.median(masked)
    for name, value in (("off", without), ("on, first call", first), ("on, later", collected)):
        out.append({"mask": name, "tokens_per_s": round(value), "of_free": round(value / without, 2)})
    collate.end_id = plain
    return out


def scaling(model: Any, collate: Any, systems: list, size: Size) -> list:
    """Seconds and peak tensor memory of a full and of a head update, by answer length and group size."""
    out = []
    for tokens in (size.tokens // 2, size.tokens, 2 * size.tokens):
        for group in (4, 16):
            u = Updates(model, collate, systems, 2, group, tokens)
            row: dict[str, Any] = {"tokens": tokens, "K": group, "rows": 2 * group}
            for name, run in (("full", u.full), ("head", u.kept)):
                run()
                row[f"{name}_s"] = round(min(seconds(run) for _ in range(max(2, size.repeats // 2))), 3)
                row[f"{name}_MiB"] = round(peak_bytes(run) / 2**20, 1)
            out.append(row)
    return out


def peak_bytes(run: Callable[[], None]) -> int:
    """The most bytes of tensors that a call has alive beyond those that it found, from the profiler's records."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        run()
    alive = peak = 0
    for event in p.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak


def in_turn(ours: Callable[[], object], theirs: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median seconds of two calls made in turn, the first of each left out."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 1):
        for run, mine in zip((ours, theirs), times):
            mine.append(seconds(run))
    return statistics.median(times[0][1:]), statistics.median(times[1][1:])


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, unit in zip(axes, ("s", "MiB")):
        for name, colour in (("full", "tab:red"), ("head", "tab:blue")):
            for group, style in ((4, "--"), (16, "-")):
                part = [r for r in rows if r["K"] == group]
                axis.plot(
                    [r["tokens"] for r in part],
                    [r[f"{name}_{unit}"] for r in part],
                    style,
                    color=colour,
                    marker="o",
                    label=f"{name} update, K = {group}",
                )
        axis.set(xlabel="tokens an answer", ylabel="seconds" if unit == "s" else "peak MiB", yscale="log")
        axis.set_xticks(sorted({r["tokens"] for r in rows}))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
