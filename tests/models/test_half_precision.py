"""float16 against float64 where magnitudes pass what float16 holds: LLM and encoder, forward and backward."""

import copy

import pytest
import torch

from catmllm.data.prompts import property_sample
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.models.half_precision import keep_large_values, rounded
from catmllm.stages.supervised import standardise
from catmllm.train.sharding import shard
from catmllm.world import DTYPES
from tests.contexts import MakeContext, small

HALF = torch.float16


def cast_blocks(model):
    """The text tower in float16, as the sharded model computes."""
    model.text.to(HALF)
    model.text.rotary_emb.float()
    return model


def test_a_residual_stream_beyond_float16_is_kept(small_model) -> None:
    """Token embeddings of 3e5 and an MLP product of 2e5: Qwen2.5's massive activations, exaggerated."""
    model, collate = copy.deepcopy(small_model[0]), small_model[1]
    with torch.no_grad():
        first = model.text.layers[0].mlp
        first.gate_proj.weight.mul_(30)
        first.up_proj.weight.mul_(60)
        first.down_proj.weight.mul_(60)
    ids = torch.tensor([collate.encode("CO</s>Pt9 (1 1 1)")])
    positions = torch.arange(ids.shape[1]).expand(3, 1, -1)

    def run(m):
        seen = {}
        handle = m.text.layers[1].register_forward_pre_hook(
            lambda module, args, kwargs: seen.update(x=args[0].detach()), with_kwargs=True
        )
        out = m.text(inputs_embeds=m.text.embed_tokens(ids), position_ids=positions, use_cache=False)
        handle.remove()
        return out.last_hidden_state, seen["x"]

    expected, stream = run(copy.deepcopy(model).double())
    assert stream.abs().max() > 7e4, "no test of anything: the stream fits float16"
    plain, _ = run(cast_blocks(copy.deepcopy(model)))
    assert not torch.isfinite(plain).all(), "no test of anything: float16 alone would do"
    guarded = cast_blocks(copy.deepcopy(model))
    keep_large_values(guarded, HALF, torch.float32)
    found, _ = run(guarded)
    assert found.dtype == HALF
    torch.testing.assert_close(found.double(), expected, atol=0.02, rtol=0.02)
    found.float().square().mean().backward()
    grads = [p.grad for p in guarded.text.layers.parameters()]
    assert all(g is not None and torch.isfinite(g).all() for g in grads)


def test_large_key_biases_do_not_overflow_the_scores(small_model) -> None:
    model, collate = copy.deepcopy(small_model[0]), small_model[1]
    with torch.no_grad():
        for layer in model.text.layers:  # q·k of 16 · 90 · 90, before its scale above 65504
            layer.self_attn.q_proj.bias.fill_(90)
            layer.self_attn.k_proj.bias.fill_(90)
    model.text.config._attn_implementation = "eager"
    ids = torch.tensor([collate.encode("CO</s>Pt9 (1 1 1)")])
    run = lambda m: m.text(inputs_embeds=m.text.embed_tokens(ids), use_cache=False).last_hidden_state  # noqa: E731
    assert not torch.isfinite(run(cast_blocks(copy.deepcopy(model)))).all()
    guarded = cast_blocks(copy.deepcopy(model))
    keep_large_values(guarded, HALF, torch.float32)
    expected = run(copy.deepcopy(model).double())
    torch.testing.assert_close(run(guarded).double(), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("size", [0.0, 5e4])
def test_the_encoder_survives_large_node_embeddings(small_model, train_systems, size: float) -> None:
    """Every term of a node's sum fits float16, the sum does not."""
    model, collate = copy.deepcopy(small_model[0]), small_model[1]
    graph = collate([property_sample(s) for s in train_systems[:3]]).graph
    with torch.no_grad():
        weight, bias = model.encoder.sphere_embedding.weight, model.encoder.blocks[0].ffn.so3_linear_2.bias
        generator = torch.Generator().manual_seed(0)
        sign = torch.randn(len(bias), generator=generator).sign()
        if size:
            weight.copy_(size * sign * (0.6 + 0.4 * torch.rand(weight.shape, generator=generator)))
        bias.add_(size * sign)

    def run(encoder):
        return encoder(graph.numbers, graph.edge_index, graph.edge_vec, graph.batch, graph.n_systems)

    expected = run(copy.deepcopy(model.encoder).double())
    guarded = copy.deepcopy(model)
    guarded.encoder.to(HALF)
    keep_large_values(guarded, torch.float32, HALF)
    found = run(guarded.encoder)
    assert torch.isfinite(found).all()
    if size:
        assert not torch.isfinite(run(copy.deepcopy(model.encoder).to(HALF))).all(), "float16 alone would do"
    scale = expected.square().mean().sqrt()
    assert (found.double() - expected).square().mean().sqrt() < 0.02 * scale
    found.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in guarded.encoder.parameters() if p.grad is not None)


def test_ordinary_magnitudes_lose_nothing(small_model, train_systems) -> None:
    """Scales and casts are no worse than float16 without them."""
    model, collate = small_model
    batch = collate([property_sample(s) for s in train_systems[:4]])
    exact = copy.deepcopy(model).text.double()
    x = model.text.embed_tokens(batch.input_ids[None]).detach()
    expected = exact(inputs_embeds=x.double(), use_cache=False).last_hidden_state
    errors = []
    for guard in (False, True):
        m = cast_blocks(copy.deepcopy(model))
        if guard:
            keep_large_values(m, HALF, torch.float32)
        hidden = m.text(inputs_embeds=m.text.embed_tokens(batch.input_ids[None]), use_cache=False)
        errors.append(float((hidden.last_hidden_state.detach().double() - expected).square().mean().sqrt()))
    assert errors[1] < 1.2 * errors[0]


def test_sampling_keeps_a_stream_beyond_float16(small_model) -> None:
    """The decoding loop has its own forward pass: prompts read in
    float16 give the hidden states of float64."""
    from catmllm.sample.tower import Tower

    model, collate = copy.deepcopy(small_model[0]), small_model[1]
    with torch.no_grad():
        first = model.text.layers[0].mlp
        for linear, factor in ((first.gate_proj, 30), (first.up_proj, 60), (first.down_proj, 60)):
            linear.weight.mul_(factor)
    ids = torch.tensor([collate.encode("CO</s>Pt9 (1 1 1)")])
    exact = copy.deepcopy(model).text.double()
    with torch.no_grad():
        x = exact.embed_tokens(ids)
        expected = exact(inputs_embeds=x, use_cache=False).last_hidden_state
        found, _ = Tower(model, HALF).prefill(x.to(HALF))
    assert found.dtype == HALF
    torch.testing.assert_close(found.double(), expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize(("precision", "encoder"), [("bf16", "fp32"), ("fp16", "fp16"), ("bf16", "bf16")])
def test_a_rounded_model_reads_as_training_does(
    make_context: MakeContext, precision: str, encoder: str
) -> None:
    """Energies of a pass of the sharded model under mixed precision, to the last bit."""
    config = small()
    config.precision, config.encoder_precision = precision, encoder  # type: ignore[assignment]
    context = make_context(config)
    context.config.encoder_precision = encoder  # type: ignore[assignment]
    batch = context.collate([property_sample(s) for s in context.data["train"][:6]])
    standardise(context)  # centres that are many deviations away from zero
    head = context.model.energy_head
    with torch.no_grad():  # zero in a new model, and then nothing would hang on the LLM
        head.correction.weight.uniform_(-0.1, 0.1)
        head.graph[-1].weight.uniform_(-0.1, 0.1)
    whole = copy.deepcopy(context.model).eval()
    exact = whole.predict(batch).detach()
    read = rounded(whole, DTYPES[precision], DTYPES[encoder])
    with torch.no_grad():
        found = read.predict(batch)
        sharded = shard(context.model, context.config, context.world).eval()
        energy = sharded(CatalyticMLLM.answer, batch).energy
    expected = energy * context.model.energy_std + context.model.energy_mean
    assert torch.equal(found, expected)
    assert 0 < (found - exact).abs().max() < 0.05
