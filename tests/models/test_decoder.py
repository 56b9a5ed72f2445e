"""The fused text tower against transformers' untouched one: states, gradients, packing,
pictures' positions, a cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from catmllm.models import decoder
from catmllm.models.attention import by_part, no_mask

LENGTHS = [5, 1, 12, 9]


def towers(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """(fused with packed attention, transformers' own with sdpa) of equal random weights."""
    torch.manual_seed(0)
    text = {
        "vocab_size": 50,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 70,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]},
        "tie_word_embeddings": False,
        "pad_token_id": 0,
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 1, "out_hidden_size": 48}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    own: Any = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="sdpa").to(dtype)
    for name, p in own.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(p, 1.0 if "norm" in name else 0.0, 0.3)
    ours: Any = Qwen2_5_VLForConditionalGeneration._from_config(
        copy.deepcopy(config), attn_implementation=by_part("varlen")
    ).to(dtype)
    ours.load_state_dict(own.state_dict())
    decoder.fuse(ours.model.language_model)
    return ours, own


def packed(model: Any, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    text = model.model.language_model
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    longest = dict.fromkeys(("max_length_q", "max_length_k"), max(LENGTHS))
    return text(
        inputs_embeds=text.embed_tokens(ids)[None],
        attention_mask=no_mask(text),
        position_ids=positions[:, None],
        use_cache=False,
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        **longest,
    ).last_hidden_state[0]


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids of the samples end to end, M-RoPE positions [4, T] whose three axes differ,
    a gradient of the states."""
    torch.manual_seed(1)
    total = sum(LENGTHS)
    own = torch.cat([torch.arange(n) for n in LENGTHS])
    positions = torch.stack([own, own + 3, own // 2, own % 4])
    return torch.randint(1, 50, (total,)), positions, torch.randn(total, 48)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.bfloat16, 0.06)])
def test_states_and_gradients_are_transformers_own_in_float64(dtype: torch.dtype, bound: float) -> None:
    ours, own = towers(dtype)
    own = own.double()
    ids, positions, grad = problem()
    states = packed(ours, ids, positions)
    states.backward(grad.to(dtype))
    expected, at = [], 0
    for n in LENGTHS:
        text = own.model.language_model
        x = text.embed_tokens(ids[at : at + n])[None]
        out = text(inputs_embeds=x, position_ids=positions[1:, None, at : at + n], use_cache=False)
        expected.append(out.last_hidden_state[0])
        at += n
    exact = torch.cat(expected)
    exact.backward(grad.to(dtype).double())
    assert (states - exact).abs().max() <= bound * exact.detach().abs().max()
    compared = 0
    for (name, a), b in zip(
        ours.model.language_model.named_parameters(), own.model.language_model.parameters()
    ):
        assert (a.grad - b.grad).abs().max() <= bound * b.grad.abs().max() + 1e-6, name
        compared += 1
    assert compared == 2 * 12 + 2


def test_the_fused_passes_are_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    for name in ("rms_norm", "rotate", "swiglu"):
        plain = getattr(decoder, name)
        monkeypatch.setattr(decoder, name, lambda *a, n=name, f=plain: ran.append(n) or f(*a))
    ours, _ = towers()
    ids, positions, _ = problem()
    states = packed(ours, ids, positions)
    assert sorted(ran) == ["rms_norm"] * 5 + ["rotate"] * 2 + ["swiglu"] * 2
    monkeypatch.setenv("CATMLLM_KERNELS", "reference")
    ran.clear()
    torch.testing.assert_close(packed(ours, ids, positions), states, rtol=1e-4, atol=1e-4)
    assert not ran


def test_padded_rows_and_decoding_with_a_cache_are_transformers_own() -> None:
    ours, own = towers()
    ids = torch.randint(1, 50, (3, 11), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(
            ours(input_ids=ids).logits, own(input_ids=ids).logits, rtol=1e-4, atol=1e-4
        )
        mask = torch.ones_like(ids)
        mask[0, :4] = 0
        a, b = (m(input_ids=ids, attention_mask=mask).logits[mask.bool()] for m in (ours, own))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        sampled = [
            m.generate(ids[:1], max_new_tokens=6, do_sample=False, min_new_tokens=6) for m in (ours, own)
        ]
    assert sampled[0].tolist() == sampled[1].tolist()


def test_what_keeps_float16_in_range_keeps_running() -> None:
    """Hooks sit on the modules' own results: float16 takes transformers' operators."""
    ours, _ = towers()
    layer = ours.model.language_model.layers[0]
    seen: list[torch.dtype] = []
    layer.mlp.up_proj.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    layer.input_layernorm.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    ours.half()
    packed(ours, *problem()[:2])
    assert seen == [torch.float16, torch.float16]
