"""Adapters: exactly what a stage names changes, gradients reach the encoder,
and merging changes no answer."""

import copy
import json
import re

import pytest
import torch

from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.models.lora import LINEARS, add_lora, effective_weight, without_lora
from catmllm.stages import STAGES
from catmllm.stages.grpo import GRPO
from catmllm.stages.joint import Joint
from catmllm.train.loop import train
from catmllm.train.setup import prepare
from catmllm.train.stage import Context
from tests.contexts import MakeContext, small
from tests.stages.test_rl_stages import TokenReward, token_rewarded

ADAPTED = re.compile(rf"llm\.model\.language_model\.layers\.\d+\.\w+\.({'|'.join(LINEARS)})\.weight")


def config_of(stage: str, **changes):
    config = small()
    config.lora.r, config.lora.dropout = 4, 0.1
    getattr(config, stage).lr = 1e-2
    return config


def names(state, before) -> set[str]:
    assert state.keys() == before.keys(), "an export knows nothing of adapters"
    return {k for k in state if not torch.equal(state[k], before[k])}


@pytest.mark.parametrize("stage", ["joint", "instruct", "grpo"])
def test_exactly_the_adapters_and_what_the_stage_names_change(make_context: MakeContext, stage: str) -> None:
    config = config_of(stage)
    if stage == "grpo":
        config.grpo.property_share = 0.5
    context = make_context(config)
    context.data["val"] = []  # read-outs keep what they learn, helpful or not
    before = {k: v.clone() for k, v in context.model.state_dict().items()}

    def make(c: Context):
        made = STAGES[stage](c)
        if isinstance(made, GRPO):
            made.reward = TokenReward().score
        return made

    state, _ = train(make, context)
    moved = names(state, before)
    linears = {k for k in state if ADAPTED.fullmatch(k)}
    assert len(linears) == 7 * 2 and linears <= moved
    rest = {k.split(".")[0] for k in moved - linears}
    expected = {"energy_head"}
    if stage != "grpo":  # the first stage that learns energies takes their scale, and the closed forms
        expected |= {"energy_mean", "energy_std", "prior", "text_prior"}
    if stage == "joint":  # through the adapted LLM the loss reaches the encoder's first block
        expected |= {"encoder", "projector"}
        assert any(k.startswith("encoder.blocks.0.ga.") for k in moved)
    assert rest == expected


def test_answers_are_those_of_the_adapters_that_learn_from_them(make_context: MakeContext) -> None:
    """They are sampled without dropout, so without it the update has their probabilities; the adapters of
    other stages have theirs."""
    config = config_of("grpo")
    config.lora.dropout, config.grpo.steps, config.grpo.lr = 0.5, 3, 5e-2
    context = make_context(config)

    train(token_rewarded, context)
    log = [json.loads(line) for line in (context.folder / "log.jsonl").read_text().splitlines()]
    assert max(row["mismatch"] for row in log) < 1e-4 and log[-1]["kl"] > 1e-4
    assert not [m for m in context.model.modules() if isinstance(m, torch.nn.Dropout) and m.p]
    supervised = make_context(config)
    prepare(Joint(supervised), supervised)
    assert {m.p for m in supervised.model.modules() if isinstance(m, torch.nn.Dropout)} == {0.5}


@pytest.mark.parametrize("stage", ["align", "ga_grpo"])
def test_stages_that_leave_the_llm_alone_get_no_adapters(make_context: MakeContext, stage: str) -> None:
    context = make_context(config_of(stage))
    before = {k: v.clone() for k, v in context.model.state_dict().items()}
    state, _ = train(STAGES[stage], context)
    assert all(k.startswith(("encoder.", "projector.", "llm.lm_head.")) for k in names(state, before))
    assert not any("lora" in n for n, _ in context.model.named_parameters())


def test_merged_weights_answer_as_the_adapters_do(make_context: MakeContext) -> None:
    """The trained, sharded model against one without adapters that loads its export;
    also against peft's own merge."""
    from catmllm.data.prompts import property_sample

    context = make_context(config_of("joint"))
    plain = copy.deepcopy(context.model)
    batch = context.collate([property_sample(s) for s in context.data["train"][:4]])
    with torch.no_grad():
        base = plain.eval()(CatalyticMLLM.answer, batch)
    state, _ = train(STAGES["joint"], context)
    with torch.no_grad():
        adapted = context.model.eval()(CatalyticMLLM.answer, batch)
        frozen = context.model.encoder.state_dict(), context.model.projector.state_dict()
        plain.load_state_dict(state)
        found = plain.eval()(CatalyticMLLM.answer, batch)
    assert frozen
    assert (adapted.logprob - base.logprob).abs().max() > 0.01
    torch.testing.assert_close(found.logprob, adapted.logprob, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(found.energy, adapted.energy, atol=2e-4, rtol=1e-4)


def test_switched_off_adapters_leave_the_start_and_merge_like_peft(small_model) -> None:
    from catmllm.config import LoRAConfig

    model = copy.deepcopy(small_model[0])
    ids = torch.tensor([small_model[1].encode("CO</s>Pt9 (1 1 1)")])

    def hidden(m):
        with torch.no_grad():
            return m.text(inputs_embeds=m.text.embed_tokens(ids), use_cache=False).last_hidden_state

    start = hidden(model)
    add_lora(model, LoRAConfig(r=4, alpha=8.0, dropout=0.5), 0)
    model.eval()
    assert torch.equal(hidden(model), start)  # B is zero
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(generator=torch.Generator().manual_seed(len(name)), std=0.1)
    changed = hidden(model)
    assert (changed - start).abs().max() > 0.1
    with without_lora(model):
        assert torch.equal(hidden(model), start)
    assert torch.equal(hidden(model), changed)
    linear = model.text.layers[0].mlp.down_proj
    ours = effective_weight(linear)
    linear.merge()  # peft's
    torch.testing.assert_close(ours, linear.base_layer.weight)
