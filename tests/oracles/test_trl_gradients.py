"""The GRPO step against TRL's GRPOTrainer: the same samples and advantages give the same loss and gradients.

TRL gets the text tower as a Qwen2ForCausalLM (the very weights under other names), since it trains text
models. Its weighting of the KL by the probability ratio, on by default since 1.16, is off: the paper's Eq. 51
has none.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from catmllm.config import SamplingConfig
from catmllm.data.batches import Collator
from catmllm.data.prompts import Sample, cif_prompt, design_prompt
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.sample.answers import Rollout
from catmllm.sample.engine import RolloutEngine
from catmllm.stages.advantages import policy_loss
from catmllm.stages.grpo import rollout_batch
from catmllm.structure.system import System

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

Model = tuple[CatalyticMLLM, Collator]
TEMPERATURE, BETA, CLIP = 0.8, 0.07, 0.2


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
    policy: CatalyticMLLM, reference: CatalyticMLLM, collate: Collator, folder: Path, loss_type: str
) -> Any:
    """A trainer of the policy; TRL reads its reference from where it believes the policy to come from."""
    text_model(reference).save_pretrained(folder / "reference")
    model = text_model(policy)
    model.config._name_or_path = str(folder / "reference")
    arguments = trl.GRPOConfig(
        output_dir=str(folder), per_device_train_batch_size=2, num_generations=2, max_completion_length=20,
        beta=BETA, epsilon=CLIP, temperature=TEMPERATURE, loss_type=loss_type, report_to=[], use_cpu=True,
        bf16=False, fp16=False, save_strategy="no", disable_tqdm=True, use_bias_correction_kl=False,
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
