"""The pooling op against torch's segment_reduce and scatter, e3nn's rotations, and its own float64 derivative."""

from __future__ import annotations

import pytest
import torch
from e3nn import o3
from hypothesis import given
from hypothesis import strategies as st

from catmllm_kernels.so3_pool_project import so3_pool
from catmllm_kernels.so3_pool_project.reference import degree_norms


def embeddings(
    counts: list[int], lmax: int = 2, channels: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(counts), (lmax + 1) ** 2, channels, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))


def wigner(lmax: int, seed: int = 0) -> torch.Tensor:
    """The rotation [S, S] of all degrees, rows of a degree l at l^2 .. (l+1)^2, float64."""
    torch.manual_seed(seed)
    rotation = o3.rand_matrix().double()
    return torch.block_diag(*(o3.Irrep(l, 1).D_from_matrix(rotation).double() for l in range(lmax + 1)))


@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    seed=st.integers(0, 99),
    lmax=st.integers(0, 3),
)
def test_max_equals_torchs_own_reductions(counts: list[int], seed: int, lmax: int) -> None:
    x, batch = embeddings(counts, lmax, seed=seed)
    x.requires_grad_()
    ours = so3_pool(x, batch, len(counts), "max")
    theirs = torch.segment_reduce(x.flatten(1), "max", lengths=torch.tensor(counts))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    index = batch[:, None].expand(-1, x[0].numel())
    scattered = torch.zeros_like(ours).scatter_reduce(0, index, x.flatten(1), "amax", include_self=False)
    torch.testing.assert_close(ours, scattered, rtol=0, atol=0)
    weight = torch.randn_like(ours)
    (a,) = torch.autograd.grad((ours * weight).sum(), x, retain_graph=True)
    (b,) = torch.autograd.grad((theirs * weight).sum(), x)
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("lmax", [0, 1, 2, 4])
def test_norms_per_degree_do_not_turn(lmax: int) -> None:
    x, batch = embeddings([4, 1, 3], lmax)
    turned = torch.einsum("ij,njc->nic", wigner(lmax), x)
    a, b = (so3_pool(v, batch, 3, "invariant") for v in (x, turned))
    assert a.shape == (3, (lmax + 1) * 3)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # e3nn's Wigner matrices are float32 inside
    torch.testing.assert_close(
        so3_pool(x, batch, 3, "atoms"), so3_pool(turned, batch, 3, "atoms"), rtol=1e-6, atol=1e-6
    )


def test_max_turns_for_l_above_zero_alone() -> None:
    x, batch = embeddings([4, 1, 3])
    turned = torch.einsum("ij,njc->nic", wigner(2), x)
    a, b = (so3_pool(v, batch, 3, "max").view(3, 9, 3) for v in (x, turned))
    torch.testing.assert_close(a[:, 0], b[:, 0], rtol=1e-6, atol=1e-6)
    assert (a[:, 1:] - b[:, 1:]).abs().max() > 0.1


def test_norms_are_root_mean_squares_of_a_degree() -> None:
    x, _ = embeddings([5], lmax=3)
    norms = degree_norms(x)
    assert norms.shape == (5, 4, 3)
    torch.testing.assert_close(norms[:, 0], x[:, 0], rtol=0, atol=0)
    for l in range(1, 4):
        expected = torch.linalg.vector_norm(x[:, l * l : (l + 1) ** 2], dim=1) / (2 * l + 1) ** 0.5
        torch.testing.assert_close(norms[:, l], expected, rtol=1e-9, atol=1e-9)
    zero = torch.zeros(2, 16, 3, dtype=torch.float64, requires_grad=True)
    degree_norms(zero).sum().backward()
    assert zero.grad is not None and zero.grad.isfinite().all()  # a plain norm would give NaN at zero


def test_atoms_keeps_every_atom() -> None:
    x, batch = embeddings([2, 3])
    torch.testing.assert_close(so3_pool(x, batch, 2, "atoms"), x[:, 0], rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["max", "invariant", "atoms"])
def test_gradcheck(mode: str) -> None:
    x, batch = embeddings([3, 1, 2])
    assert torch.autograd.gradcheck(lambda v: so3_pool(v, batch, 3, mode), x.requires_grad_())


def test_of_equal_maxima_the_first_atom_gets_the_gradient() -> None:
    x = torch.tensor([1.0, 5.0, 5.0, 5.0, 2.0, 2.0]).view(6, 1, 1).requires_grad_()
    batch = torch.tensor([0, 0, 0, 0, 1, 1])
    so3_pool(x, batch, 2, "max").sum().backward()
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [0, 1, 0, 0, 1, 0]


@given(seed=st.integers(0, 200))
def test_ties_give_the_same_gradient_every_time(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 3, (12, 4, 2), generator=generator).float()
    batch = torch.tensor([0] * 5 + [1] * 7)

    def gradient() -> torch.Tensor:
        v = x.clone().requires_grad_()
        so3_pool(v, batch, 2, "max").sum().backward()
        assert v.grad is not None
        return v.grad

    once = gradient()
    torch.testing.assert_close(gradient(), once, rtol=0, atol=0)
    assert (once.flatten(1)[:5].sum(0) == 1).all() and (once.flatten(1)[5:].sum(0) == 1).all()
    for column in range(8):
        first = int(x.flatten(1)[:5, column].argmax())  # torch's argmax on a CPU: the first
        assert once.flatten(1)[first, column] == 1


@pytest.mark.parametrize("mode", ["max", "invariant"])
def test_a_nan_stays_in_its_system(mode: str) -> None:
    """A broken structure must be seen as such, and must not borrow the numbers of its neighbour in the batch."""
    x, batch = embeddings([3, 2, 2])
    x[1, 0, 1] = torch.nan
    out = so3_pool(x, batch, 3, mode)
    assert out[0].isnan().sum() == 1 and out[0].isnan()[1]
    assert not out[1:].isnan().any()
    whole, _ = embeddings([3, 2, 2])
    torch.testing.assert_close(out[1:], so3_pool(whole, batch, 3, mode)[1:], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", ["max", "invariant"])
def test_half_precision(dtype: torch.dtype, mode: str) -> None:
    x, batch = embeddings([3, 2])
    out = so3_pool(x.to(dtype), batch, 2, mode)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), so3_pool(x, batch, 2, mode), rtol=2e-2, atol=2e-2)


def test_bad_input_is_an_error() -> None:
    x, batch = embeddings([3, 2])
    with pytest.raises(ValueError, match="max, invariant or atoms"):
        so3_pool(x, batch, 2, "mean")
    with pytest.raises(ValueError, match="without atoms"):
        so3_pool(x, batch, 3, "max")
