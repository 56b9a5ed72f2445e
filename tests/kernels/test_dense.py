"""float32 products by oneDNN against float64 and torch's own layer, and when they are left to torch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from catmllm_kernels import dense


def layers(
    bias: bool, rows: int = 700
) -> tuple[torch.nn.Linear, torch.nn.Linear, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    ours = torch.nn.Linear(65, 130, bias=bias)
    exact = copy.deepcopy(ours).double()
    ours.__class__ = dense.Linear
    return ours, exact, torch.randn(2, rows, 65), torch.randn(2, rows, 130)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [3, 700])
def test_output_and_gradients_are_float64s(bias: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    plain = dense._onednn
    monkeypatch.setattr(dense, "_onednn", lambda *a: calls.append(1) or plain(*a))
    ours, exact, x, grad = layers(bias, rows)
    a, b = x.clone().requires_grad_(), x.double().requires_grad_()
    found, expected = ours(a), exact(b)
    found.backward(grad)
    expected.backward(grad.double())
    assert len(calls) == (3 if rows == 700 else 0)
    pairs = [(found, expected), (a.grad, b.grad), (ours.weight.grad, exact.weight.grad)]
    for one, other in pairs + ([(ours.bias.grad, exact.bias.grad)] if bias else []):
        torch.testing.assert_close(
            one, other.float(), rtol=1e-5, atol=1e-5 * float(other.detach().abs().max())
        )


def test_what_is_frozen_gets_no_gradient() -> None:
    ours, _, x, grad = layers(True)
    ours.requires_grad_(False)
    x.requires_grad_()
    ours(x).backward(grad)
    assert ours.weight.grad is None and ours.bias.grad is None and x.grad is not None


def test_what_counts_and_plans_sees_it_and_lower_precision_is_torchs_own() -> None:
    ours, _, x, _ = layers(True)
    x.requires_grad_()
    with FlopCounterMode(display=False) as counted:
        ours(x).sum().backward()
    assert counted.get_total_flops() == 3 * 2 * 1400 * 65 * 130
    x = x.detach()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        assert ours(fake.from_tensor(x)).shape == (2, 700, 130)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16
    assert ours.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_sums_of_outer_products() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(900, 70), torch.randn(900, 33)
    out = torch.full((140, 33), torch.nan)
    dense.summed_outer(a, b, out[:70])
    dense.summed_outer(a.double(), b.double(), wide := torch.empty(70, 33, dtype=torch.float64))
    torch.testing.assert_close(out[:70], wide.float(), rtol=1e-5, atol=1e-4)
    assert out[70:].isnan().all()
