"""Training throughput of the text part against Hugging Face's Trainer and TRL's SFTTrainer, in one process.

Same sizes of the LLM, same samples (the three tasks as text alone, prompts masked), AdamW, bf16 products with
float32 weights, same samples a step. The peers at their settings: Trainer with group_by_length and dynamic
padding; SFTTrainer with packing and with padding; both with the fused AdamW, and with sdpa and eager
attention; Trainer's fastest also with torch_compile, whose first steps, which compile, are not counted. Ours:
packed with the fused loss, padded, and padded with every logit in memory. Runs take turns; tokens are counted
without padding; the first steps of a run are not. `--part` compares ours, packed, with only these; parts may
be given again. `compiled` is only run when asked for: it takes minutes.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench import record
from catmllm.config import Config, LLMConfig, OptimConfig, load_config
from catmllm.data.batches import Collator
from catmllm.data.open import open_data
from catmllm.data.prompts import Sample, cif_sample, design_sample, property_sample
from catmllm.models import catalytic_mllm
from catmllm.models.build import new_model
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.train.loop import train
from catmllm.train.stage import Context, MicroBatch, Plain, Step
from catmllm.world import start
from catmllm_kernels.linear_logprob.op import LogProbs
from catmllm_kernels.linear_logprob.reference import linear_logprob as all_logits

WARM = 2  # steps of a run that are not counted
OURS = "ours, packed"  # what each part is compared with
PARTS = {
    "ours": ("ours, padded", "ours, padded, all logits"),
    "trl-packed": ("TRL SFTTrainer, packed", "TRL SFTTrainer, packed, eager"),
    "trl-padded": ("TRL SFTTrainer, padded", "TRL SFTTrainer, padded, eager"),
    "trainer": ("HF Trainer, by length", "HF Trainer, by length, eager"),
    "compiled": ("HF Trainer, by length, eager, compiled",),
}
COMPILING = 30  # steps of a compiled run that are not counted: lengths differ, and some compile again


class Timed:
    """Seconds and tokens of each step, by its end."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.tokens: list[int] = []

    def rate(self, warm: int) -> float:
        """Tokens a second over the steps after the first `warm`."""
        return sum(self.tokens[warm:]) / (self.ends[-1] - self.ends[warm - 1])


def samples(count: int) -> list[Sample]:
    """Text alone: properties, CIFs and designs in turn."""
    out = []
    for i, s in enumerate(open_data()["train"][:count]):
        out.append((property_sample(s, "text"), cif_sample(s, 3), design_sample(s, None, 3))[i % 3])
    return out


def ours(config: Config, texts: list[Sample], batch: int, steps: int, world: Any) -> Timed:
    timed = Timed()
    model, collate = new_model(config, open_data()["train"])
    rows = [collate.encoded(t) for t in texts]  # the peers, too, are given tokens

    class Text(Plain):
        """Mean cross-entropy of the answers' tokens."""

        name = "instruct"

        def __init__(self, context: Context) -> None:
            self.context = context
            self.config: OptimConfig = replace(
                context.config.instruct, steps=steps + 1, batch_size=batch, log_every=10**6, validate_every=0
            )

        def trains(self, parameter: str) -> bool:
            return parameter.startswith("llm.")

        def step(self, step: int) -> Step:
            if step:
                timed.ends.append(time.perf_counter())
            if step == steps:
                raise StopIteration
            made = self.context.collate.join([rows[(step * batch + k) % len(rows)] for k in range(batch)])
            timed.tokens.append(made.tokens)
            return Step(
                [
                    MicroBatch(
                        lambda: -self.context.model(CatalyticMLLM.answer, made).logprob.mean(), made.tokens
                    )
                ]
            )

    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(StopIteration):
        train(
            Text, Context(config, model, collate, {"train": [], "val": [], "test": []}, world, Path(folder))
        )
    return timed


def peer_rows(kind: str, collate: Collator, texts: list[Sample], count: int) -> list[dict[str, Any]]:
    """`count` samples as the peer's data set has them."""
    rows = []
    for i in range(count):
        row = collate.encoded(texts[i % len(texts)])
        ids = [*row.prompt, *row.answer]
        rows.append({"input_ids": ids, "labels": [-100] * len(row.prompt) + list(row.answer)})
        if kind == "trainer":
            rows[-1]["attention_mask"] = [1] * len(ids)
    return rows


def peer_model(tokenizer: Any, c: LLMConfig, attention: str) -> Any:
    """A Qwen2 of random weights and of our LLM's sizes."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM._from_config(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=c.hidden_size,
            num_hidden_layers=c.num_hidden_layers,
            num_attention_heads=c.num_attention_heads,
            num_key_value_heads=c.num_key_value_heads,
            intermediate_size=c.intermediate_size,
            max_position_embeddings=c.max_position_embeddings,
            tie_word_embeddings=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        ),
        attn_implementation=attention,
    )


def peer_options(folder: str, batch: int, steps: int, compiled: bool) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "per_device_train_batch_size": batch,
        "max_steps": steps,
        "bf16": True,
        "use_cpu": True,
        "optim": "adamw_torch_fused",
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "torch_compile": compiled,
    }


def peer(
    kind: str,
    attention: str,
    config: Config,
    texts: list[Sample],
    batch: int,
    steps: int,
    compiled: bool = False,
) -> Timed:
    """`kind`: trainer, packed or padded (SFTTrainer's)."""
    from datasets import Dataset
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments
    from trl import SFTConfig, SFTTrainer

    timed = Timed()
    _, collate = new_model(config, open_data()["train"])
    rows = peer_rows(kind, collate, texts, batch * steps)
    model = peer_model(collate.tokenizer, config.model.llm, attention)

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **options: Any) -> None:
            timed.ends.append(time.perf_counter())

    mean = sum(len(row["input_ids"]) for row in rows) / len(rows)
    with tempfile.TemporaryDirectory() as folder:
        common = peer_options(folder, batch, steps, compiled)
        if kind == "trainer":
            common |= {"train_sampling_strategy": "group_by_length"}
            made: Any = Trainer(
                model,
                TrainingArguments(**common),
                DataCollatorForSeq2Seq(collate.tokenizer, padding=True),
                Dataset.from_list(rows),
                callbacks=[Clock()],
            )
        else:
            packed = kind == "packed"
            # As many tokens a step as the others: a pack holds as many samples as a batch does on average.
            common |= {"per_device_train_batch_size": 1} if packed else {}
            arguments = SFTConfig(
                **common, max_length=round(mean * batch), packing=packed, completion_only_loss=False
            )
            made = SFTTrainer(
                model,
                arguments,
                train_dataset=Dataset.from_list(rows),
                processing_class=collate.tokenizer,
                callbacks=[Clock()],
            )
        collator = made.data_collator

        def counting(features: Any) -> Any:
            timed.tokens.append(sum(len(f["input_ids"]) for f in features))
            return collator(features)

        made.data_collator = counting
        made.train()
    del timed.tokens[len(timed.ends) :]
    return timed


@contextlib.contextmanager
def logits_in_memory() -> Any:
    """Our model with the loss that makes every logit."""

    def whole(
        hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float, entropy: bool
    ) -> LogProbs:
        return LogProbs(*all_logits(hidden, weight, targets, temperature), None)

    plain = catalytic_mllm.linear_logprobs
    catalytic_mllm.linear_logprobs = whole  # type: ignore[assignment]
    try:
        yield
    finally:
        catalytic_mllm.linear_logprobs = plain


def main() -> None:
    parser = record.arguments(__doc__)
    parser.add_argument(
        "--part", action="append", choices=PARTS, help="compare only with these; may be given again"
    )
    parser.add_argument("--batch", type=int, default=16, help="samples a step (default: 16)")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    steps, rounds = (5, 1) if args.quick else (8, 3)
    config = load_config(None, ["tensorboard=false"])
    padded = replace(config, data=replace(config.data, packed=False))
    world = start(config)
    texts = samples(600)
    runs: dict[str, Callable[[], Timed]] = {
        OURS: lambda: ours(config, texts, args.batch, steps, world),
        "ours, padded": lambda: ours(padded, texts, args.batch, steps, world),
        "ours, padded, all logits": lambda: _plain(padded, texts, args.batch, steps, world),
        "TRL SFTTrainer, packed": lambda: peer("packed", "sdpa", config, texts, args.batch, steps),
        "TRL SFTTrainer, padded": lambda: peer("padded", "sdpa", config, texts, args.batch, steps),
        "TRL SFTTrainer, packed, eager": lambda: peer("packed", "eager", config, texts, args.batch, steps),
        "TRL SFTTrainer, padded, eager": lambda: peer("padded", "eager", config, texts, args.batch, steps),
        "HF Trainer, by length": lambda: peer("trainer", "sdpa", config, texts, args.batch, steps),
        "HF Trainer, by length, eager": lambda: peer("trainer", "eager", config, texts, args.batch, steps),
        "HF Trainer, by length, eager, compiled": lambda: peer(
            "trainer", "eager", config, texts, args.batch, COMPILING + steps, compiled=True
        ),
    }
    asked = args.part or [p for p in PARTS if p != "compiled"]
    wanted = {OURS, *(name for part in asked for name in PARTS[part])}
    rates, peaks = timed_in_turn({name: run for name, run in runs.items() if name in wanted}, rounds)
    conditions = {"precision": "bf16", "samples a step": args.batch, "steps": steps, "turns": rounds}
    conditions["threads"] = torch.get_num_threads()
    name = "training" if args.part is None else "training_" + "_".join(args.part).replace("-", "_")
    record.finish(
        args,
        [
            record.claim(
                name,
                "supervised training of the tiny LLM, samples end to end, "
                "compared with HF Trainer and TRL's SFTTrainer",
                "tokens per second, padding not counted",
                {OURS: rates},
                conditions,
                less_is_better=False,
            ),
            record.claim(
                f"{name}_memory",
                "peak of the process in the same runs",
                "MiB",
                {OURS: {run: [float(x)] for run, x in peaks.items()}},
                conditions,
            ),
        ],
    )
    torch.distributed.destroy_process_group()


def timed_in_turn(
    runs: dict[str, Callable[[], Timed]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Of every run the rate of each round, and the process' peak of memory in MiB."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    peaks: dict[str, int] = {}
    for _ in range(rounds):
        for name, run in runs.items():
            with contextlib.ExitStack() as silent:
                nowhere = silent.enter_context(open(os.devnull, "w"))
                silent.enter_context(contextlib.redirect_stderr(nowhere))
                silent.enter_context(contextlib.redirect_stdout(nowhere))
                gc.collect()
                Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew (Linux)
                rates[name].append(run().rate(COMPILING if name.endswith("compiled") else WARM))
            peaks[name] = max(peaks.get(name, 0), peak_mib())
    return rates, peaks


def peak_mib() -> int:
    """The most memory that the process held since its last reset."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) // 1024


def _plain(*arguments: Any) -> Timed:
    with logits_in_memory():
        return ours(*arguments)


if __name__ == "__main__":
    main()
