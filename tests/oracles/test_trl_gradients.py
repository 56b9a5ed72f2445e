"""The policy losses against TRL's GRPOTrainer: the same samples and advantages give the same loss and
gradients, for every loss that can be chosen and with the sampler's log-probabilities.

TRL gets the text tower as a Qwen2ForCausalLM (the very weights under other names), since it trains text
models. Its weighting of the KL by the probability ratio, on by default since 1.16, is off: the paper's Eq. 51
has none.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from catmllm.config import GRPOConfig, SamplingConfig
from catmllm.data.batches import Collator
from catmllm.data.prompts import Sample, cif_prompt, design_prompt
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.sample.answers import Rollout
from catmllm.sample.engine import RolloutEngine
from catmllm.sample.packed import rollout_batch
from catmllm.stages.advantages import overlong, policy_loss, recipe
from catmllm.stages.policy import Correction, Pass, Read, add_policy
from catmllm.structure.system import System
from catmllm.train.stage import Step
from catmllm.world import World

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

Model = tuple[CatalyticMLLM, Collator]
TEMPERATURE, BETA, CLIP = 0.8, 0.07, 0.2
CAP = 1.2  # of importance weights


def text_model(model: CatalyticMLLM) -> Qwen2ForCausalLM:
    """The LLM's text tower and head as the text-only class of transformers."""
    c = model.text.config
    config = Qwen2Config(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads, rms_norm_eps=c.rms_norm_eps, tie_word_embeddings=False,
        max_position_embeddings=c.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, bos_token_id=None,
        eos_token_id=c.eos_token_id, pad_token_id=c.pad_token_id,
    )  # fmt: skip
    out = Qwen2ForCausalLM._from_config(config, attn_implementation="eager")
    state = {
        f"model.{k.removeprefix('model.language_model.')}" if k.startswith("model.") else k: v
        for k, v in model.llm.state_dict().items()
        if not k.startswith("model.visual.")
    }
    out.load_state_dict(state, strict=True)
    return out


@pytest.fixture(scope="module")
def policy(small_model: Model) -> CatalyticMLLM:
    """Weights of the usual size: the fixture's large ones make a softmax of one token."""
    model = copy.deepcopy(small_model[0])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and name.startswith("llm."):
                parameter.mul_(5 / 25 if "lm_head" in name else 2 / 5)
    return model


@pytest.fixture(scope="module")
def reference(policy: CatalyticMLLM) -> CatalyticMLLM:
    """Another model near by, so that the KL is none of zero."""
    model = copy.deepcopy(policy)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.llm.parameters():
            p.add_(0.02 * p.std().nan_to_num(0.0) * torch.randn(p.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def sampled(policy: CatalyticMLLM, small_model: Model, train_systems: list[System]) -> tuple[Any, ...]:
    """Answers of unequal length to prompts of unequal length, and advantages."""
    collate = small_model[1]
    prompts = [
        Sample(cif_prompt(train_systems[0].identity)),
        Sample(design_prompt("CO</s>Pt9Cu3 (1 1 1)", 0.5)),
    ]
    params = SamplingConfig(temperature=TEMPERATURE, top_p=0.95, max_new_tokens=20)
    rollouts = RolloutEngine(policy, collate).generate(prompts, params, [1], group_size=3)
    cut = [20, 7, 1, 13, 20, 4]
    rollouts = [Rollout(r.prompt, r.ids[:n], r.logprob[:n], None, True, "") for r, n in zip(rollouts, cut)]
    return prompts, rollouts, torch.tensor([1.3, -0.4, -0.9, 0.2, 0.0, -0.7])


def trainer_of(
    policy: CatalyticMLLM,
    reference: CatalyticMLLM,
    collate: Collator,
    folder: Path,
    loss_type: str,
    beta: float = BETA,
    **options: Any,
) -> Any:
    """A trainer of the policy; TRL reads its reference from where it believes the policy to come from."""
    text_model(reference).save_pretrained(folder / "reference")
    model = text_model(policy)
    model.config._name_or_path = str(folder / "reference")
    arguments = trl.GRPOConfig(
        output_dir=str(folder), per_device_train_batch_size=2, num_generations=2, max_completion_length=20,
        beta=beta, temperature=TEMPERATURE, loss_type=loss_type, report_to=[], use_cpu=True,
        bf16=False, fp16=False, save_strategy="no", disable_tqdm=True, use_bias_correction_kl=False,
        **({"epsilon": CLIP} | options),
    )  # fmt: skip
    return trl.GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=datasets.Dataset.from_list([{"prompt": "x"}] * 4),
        processing_class=collate.tokenizer,
    )


def as_trl(collate: Collator, prompts: list[Sample], rollouts: list[Rollout]) -> dict[str, torch.Tensor]:
    """Prompts padded on the left, completions on the right."""
    heads = [collate.prompt_ids(prompts[r.prompt]) for r in rollouts]
    left, right = max(map(len, heads)), max(len(r.ids) for r in rollouts)
    out = {
        f"{part}_{kind}": torch.zeros(len(rollouts), width, dtype=torch.int64)
        for part, width in (("prompt", left), ("completion", right))
        for kind in ("ids", "mask")
    }
    for row, (head, r) in enumerate(zip(heads, rollouts)):
        out["prompt_ids"][row, left - len(head) :] = torch.tensor(head)
        out["prompt_mask"][row, left - len(head) :] = 1
        out["completion_ids"][row, : len(r.ids)] = r.ids
        out["completion_mask"][row, : len(r.ids)] = 1
    return out


def same_gradients(ours: CatalyticMLLM, theirs: Any) -> None:
    """Every parameter of the text tower has TRL's."""
    found = {
        f"model.{k.removeprefix('model.language_model.')}" if k.startswith("model.") else k: p.grad
        for k, p in ours.llm.named_parameters()
        if not k.startswith("model.visual.")
    }
    wanted = dict(theirs.named_parameters())
    assert wanted.keys() == found.keys() and len(found) > 20
    for name, p in wanted.items():
        mine = found[name]
        assert p.grad is not None and mine is not None, name
        scale = float(p.grad.norm())
        assert scale > 0
        assert float((mine - p.grad).norm()) <= 1e-5 * scale, name


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("drift", [0.0, 0.3])
@pytest.mark.parametrize(("loss_type", "normalise"), [("grpo", "sample"), ("bnpo", "token")])
def test_loss_and_gradients_are_trls(
    policy: CatalyticMLLM,
    reference: CatalyticMLLM,
    sampled: tuple[Any, ...],
    small_model: Model,
    tmp_path: Path,
    drift: float,
    loss_type: str,
    normalise: str,
    shared: bool,
) -> None:
    """`drift` moves the sampling policy's log-probabilities away, as after several updates: the clip then
    acts. `shared`: each prompt is there once for all its answers, as in training."""
    collate = small_model[1]
    prompts, rollouts, advantage = sampled
    noise = [drift * torch.randn(len(r.ids), generator=torch.Generator().manual_seed(9)) for r in rollouts]

    trainer = trainer_of(policy, reference, collate, tmp_path, loss_type)
    theirs, inputs = trainer.model, as_trl(collate, prompts, rollouts)
    trainer.current_gradient_accumulation_steps = 1
    theirs.train()

    def log_probabilities(model: Any) -> torch.Tensor:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        keep = inputs["completion_ids"].shape[1]
        return trainer._get_per_token_logps_and_entropies(model, ids, mask, keep)[0]

    with torch.no_grad():
        inputs["ref_per_token_logps"] = log_probabilities(trainer.ref_model)
        if drift:
            old = log_probabilities(theirs)
            for row, n in enumerate(noise):
                old[row, : len(n)] += n
            inputs["old_per_token_logps"] = old
    inputs["advantages"] = advantage
    inputs["num_items_in_batch"] = inputs["completion_mask"].sum()
    their_loss = trainer._compute_loss(theirs, inputs)
    their_loss.backward()

    ours = copy.deepcopy(policy).train()
    batch = rollout_batch(collate, prompts, rollouts, shared)
    logprob = ours(CatalyticMLLM.answer, batch, temperature=TEMPERATURE).logprob
    with torch.no_grad():
        ref = reference(CatalyticMLLM.answer, batch, temperature=TEMPERATURE).logprob
    row = batch.answer_sample
    old = logprob.detach() + torch.cat(noise)
    loss, _ = policy_loss(logprob, old, ref, advantage, row, len(rollouts), BETA, "k3", CLIP, normalise)
    our_loss = loss.sum() / (len(rollouts) if normalise == "sample" else len(logprob))
    our_loss.backward()

    assert abs(float(our_loss.detach()) - float(their_loss.detach())) < 1e-5 * max(
        1.0, abs(float(their_loss.detach()))
    )
    same_gradients(ours, theirs)


def test_soft_punishment_of_long_answers_is_trls() -> None:
    from trl.rewards import get_soft_overlong_punishment

    lengths, limit, soft = np.array([1, 60, 80, 81, 90, 99, 100]), 100, 20
    theirs = get_soft_overlong_punishment(limit, soft)([[0] * n for n in lengths])
    np.testing.assert_allclose(overlong(lengths, np.full(7, limit), soft), theirs, rtol=1e-12)
    assert overlong(np.array([100, 100]), np.array([100, 300]), soft).tolist() == [-1.0, 0.0]


class Alone(World):
    """One rank without a process group."""

    def mean(self, values: Any) -> dict[str, float]:
        return {k: float(v) for k, v in values.items()}

    def maximum(self, value: int) -> int:
        return value


# TRL's options for each loss: its cap of `cispo` is the ratio itself, its `gspo` is `grpo` by sequences.
CHOSEN = {
    "dapo": {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28},
    "dr_grpo": {"loss_type": "dr_grpo", "epsilon": 0.2},
    "gspo": {
        "loss_type": "grpo",
        "epsilon": 3e-4,
        "epsilon_high": 4e-4,
        "importance_sampling_level": "sequence",
    },
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
}


def trls(
    trainer: Any,
    inputs: dict[str, torch.Tensor],
    sampler: torch.Tensor,
    correction: Literal["token", "sequence"] | None,
) -> tuple[float, Any]:
    """TRL's loss and its model with gradients; `sampler` [answers, T] told log-probabilities of its own."""
    trainer.current_gradient_accumulation_steps = 1
    if correction is not None:
        # What TRL does where it samples, in `_generate_and_score_completions`, which needs vLLM.
        trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
        d = (inputs["old_per_token_logps"] - sampler) * inputs["completion_mask"]
        d = d.sum(1, keepdim=True) if correction == "sequence" else d
        inputs["importance_sampling_ratio"] = d.exp().clamp(max=CAP)
    theirs = trainer.model.train()
    loss = trainer._compute_loss(theirs, inputs)
    loss.backward()
    return float(loss.detach()), theirs


def ours(
    model: CatalyticMLLM,
    reference: CatalyticMLLM,
    collate: Collator,
    config: GRPOConfig,
    asked: tuple[list[Sample], list[Rollout], torch.Tensor],
    before: torch.Tensor,
    correction: Literal["token", "sequence"] | None,
) -> tuple[float, Step]:
    """Our loss, by the stage's own passes, two of them; the model has the gradients."""
    prompts, rollouts, advantage = asked
    lengths = [len(r.ids) for r in rollouts]
    work = Step([], defaultdict(float))

    def prepare(some: list[Rollout], asked: Sequence[Sample]) -> Pass:
        batch = rollout_batch(collate, asked, some)

        def read() -> Read:
            found = model(CatalyticMLLM.answer, batch, temperature=TEMPERATURE).logprob
            with torch.no_grad():
                far = reference(CatalyticMLLM.answer, batch, temperature=TEMPERATURE).logprob
            return Read(found, far if config.beta else None)

        return Pass(read, batch.tokens)

    parts = np.array_split(np.arange(len(rollouts)), 2)
    add_policy(
        work,
        Alone(0, 1, torch.device("cpu")),
        config,
        rollouts,
        advantage.numpy(),
        np.ones(len(rollouts), dtype=bool),
        prepare,
        prompts,
        loss_of=recipe(config),
        old={k: torch.cat([before.split(lengths)[i] for i in part]) for k, part in enumerate(parts)},
        correction=None if correction is None else Correction(correction, CAP),
    )
    total = 0.0
    for one in work.passes:
        value = one.loss()
        value.backward()  # type: ignore[no-untyped-call]
        total += float(value.detach())
    return total, work


@pytest.mark.parametrize(
    ("loss", "correction"),
    [(loss, None) for loss in CHOSEN] + [("grpo", "token"), ("grpo", "sequence"), ("cispo", "token")],
)
def test_every_loss_is_trls(
    policy: CatalyticMLLM,
    reference: CatalyticMLLM,
    sampled: tuple[Any, ...],
    small_model: Model,
    tmp_path: Path,
    loss: str,
    correction: Literal["token", "sequence"] | None,
) -> None:
    """Through the stage's own `add_policy`, at a second update: the policy has drifted from the one before
    the first, and that one from the sampler's; the clips act, and so do the truncated weights."""
    collate = small_model[1]
    prompts, rollouts, advantage = sampled
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        batch = rollout_batch(collate, prompts, rollouts)
        now = policy(CatalyticMLLM.answer, batch, temperature=TEMPERATURE).logprob
        ref = reference(CatalyticMLLM.answer, batch, temperature=TEMPERATURE).logprob
    lengths = [len(r.ids) for r in rollouts]
    moved = 1.2e-3 if loss == "gspo" else 0.4  # whose clips are so narrow
    drift, away = (size * torch.randn(len(now), generator=generator) for size in (moved, 0.4))
    before = now + drift
    rollouts = [replace(r, logprob=s, limit=20) for r, s in zip(rollouts, (before + away).split(lengths))]

    def wide(values: torch.Tensor) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(values.split(lengths)), batch_first=True)

    options: dict[str, Any] = dict(CHOSEN.get(loss, {"loss_type": "grpo"}))
    beta = 0.0 if loss == "dapo" else BETA  # without reference
    trainer = trainer_of(policy, reference, collate, tmp_path, options.pop("loss_type"), beta, **options)
    inputs = as_trl(collate, prompts, rollouts) | {"advantages": advantage}
    inputs |= {"ref_per_token_logps": wide(ref), "old_per_token_logps": wide(before)}
    inputs["num_items_in_batch"] = inputs["completion_mask"].sum()
    their_loss, theirs = trls(trainer, inputs, wide(before + away), correction)

    config = GRPOConfig(loss=loss, beta=beta, micro_batch=4)  # type: ignore[arg-type]
    model = copy.deepcopy(policy).train()
    asked = (prompts, rollouts, advantage)
    our_loss, work = ours(model, reference, collate, config, asked, before, correction)
    assert our_loss == pytest.approx(their_loss, rel=1e-5, abs=1e-5)
    if loss != "cispo":
        assert 0 < float(work.metrics["clipped"]) < 1
    if correction is not None:
        assert float(work.metrics["importance"]) < CAP
    assert float(work.metrics["mismatch"]) > 0.1
    same_gradients(model, theirs)
