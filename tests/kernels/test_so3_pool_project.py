"""The pooling op against torch's segment_reduce and scatter, e3nn's rotations,
and its own float64 derivative."""

from __future__ import annotations

import pytest
import torch
from e3nn import o3
from hypothesis import given
from hypothesis import strategies as st

from catmllm_kernels.so3_pool_project import op, so3_pool, so3_pool_project
from catmllm_kernels.so3_pool_project.reference import degree_norms, degrees


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
    """A broken structure must be seen as such, and must not borrow
    the numbers of its neighbour in the batch."""
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


# ------------------------------------------------------------------------------------------ norm,
# pooling and linear layer


def learned(
    lmax: int, channels: int, features: int, joint: bool, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor, bool]]:
    """weight [5, features], bias [5] and the norm of the encoder."""
    generator = torch.Generator().manual_seed(7)
    shapes = ((5, features), (5,), (lmax + 1, channels), (channels,))
    weight, bias, scale, shift = (
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes
    )
    return weight, bias, (scale, shift, joint)


def of_norm(
    module: torch.nn.Module, norm: tuple[torch.Tensor, torch.Tensor, bool]
) -> dict[str, torch.Tensor]:
    """The parameters of an encoder's norm."""
    if norm[2]:
        return {"affine_weight": norm[0], "affine_bias": norm[1]}
    return {"norm_l0.weight": norm[0][0], "norm_l0.bias": norm[1], "affine_weight": norm[0][1:]}


def plain(
    x: torch.Tensor, counts: list[int], mode: str, weight: torch.Tensor, bias: torch.Tensor,
    norm: tuple[torch.Tensor, torch.Tensor, bool],
) -> torch.Tensor:  # fmt: skip
    """The same, written down once more from the encoder's own module and torch's segment_reduce."""
    from catmllm.models.spherical_layers import SphericalLayerNorm, SphericalRMSNorm

    lmax = int(x.shape[1] ** 0.5) - 1
    module = (SphericalRMSNorm if norm[2] else SphericalLayerNorm)(lmax, x.shape[2]).double()
    y = torch.func.functional_call(module, of_norm(module, norm), (x, degrees(lmax, x.device)))
    if mode == "atoms":
        features = y[:, 0]
    else:
        parts = [y[:, l * l : (l + 1) ** 2] for l in range(lmax + 1)]
        if mode == "invariant":
            parts = [parts[0], *((p.square().mean(1, keepdim=True) + 1e-12).sqrt() for p in parts[1:])]
        flat = torch.cat(parts, 1).flatten(1)
        features = torch.segment_reduce(flat, "max", lengths=torch.tensor(counts))
    return features @ weight.T + bias


WIDTHS = {"max": 27, "invariant": 9, "atoms": 3}
COUNTS = [4, 1, 3]


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("mode", WIDTHS)
def test_project_is_norm_pooling_and_linear_layer(mode: str, joint: bool) -> None:
    x, batch = embeddings(COUNTS)
    x.requires_grad_()
    weight, bias, norm = learned(2, 3, WIDTHS[mode], joint)
    ours = so3_pool_project(x, batch, 3, mode, weight, bias, norm)
    theirs = plain(x, COUNTS, mode, weight, bias, norm)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    leaves = [x, weight, bias, norm[0], norm[1]]
    cotangent = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad(t, leaves, cotangent) for t in (ours, theirs))):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", WIDTHS)
def test_project_gradcheck(mode: str) -> None:
    x, batch = embeddings([3, 1, 2])
    weight, bias, (scale, shift, _) = learned(2, 3, WIDTHS[mode], False)
    leaves = (x.requires_grad_(), weight, bias, scale, shift)

    def function(*t: torch.Tensor) -> torch.Tensor:
        return so3_pool_project(t[0], batch, 3, mode, t[1], t[2], (t[3], t[4], False))

    assert torch.autograd.gradcheck(function, leaves)


def test_project_gives_a_shared_maximum_to_the_first_atom() -> None:
    x = torch.ones(5, 4, 2).requires_grad_()
    batch = torch.tensor([0, 0, 0, 1, 1])
    so3_pool_project(x, batch, 2, "max", torch.ones(1, 8)).sum().backward()
    assert x.grad is not None
    assert x.grad.flatten(1).sum(1).tolist() == [8, 0, 0, 8, 0]


def test_project_takes_the_dtype_of_its_weights() -> None:
    x, batch = embeddings([3, 2], dtype=torch.float32)
    weight, bias, norm = learned(2, 3, 27, False, torch.float32)
    out = so3_pool_project(x, batch, 2, "max", weight.bfloat16(), bias.bfloat16(), norm)
    assert out.dtype == torch.bfloat16
    exact = so3_pool_project(x, batch, 2, "max", weight, bias, norm)
    assert (out - exact).abs().max() < 4 * 2.0**-8 * exact.abs().max()


@pytest.mark.parametrize("mode", WIDTHS)
def test_opcheck(mode: str) -> None:
    x, batch = embeddings(COUNTS)
    _, _, (scale, shift, joint) = learned(2, 3, WIDTHS[mode], False)
    arguments = (x.requires_grad_(), batch, [scale, shift], 3, mode, joint)
    torch.library.opcheck(torch.ops.catmllm.so3_pool.default, arguments)
    with torch.no_grad():
        features, arg, stats = op._pool(*arguments)
    back = (torch.randn_like(features), features, arg, stats, x.detach(), batch,
            [scale.detach(), shift.detach()], 3, mode, joint)  # fmt: skip
    torch.library.opcheck(torch.ops.catmllm.so3_pool_backward.default, back)


@pytest.mark.parametrize("mode", WIDTHS)
def test_compile_sees_one_graph(mode: str) -> None:
    x, batch = embeddings(COUNTS)
    weight, bias, norm = learned(2, 3, WIDTHS[mode], False)

    def function(x: torch.Tensor) -> torch.Tensor:
        return so3_pool_project(2 * x, batch, 3, mode, weight, bias, norm).square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    leaves = [x.requires_grad_(), weight, bias, norm[1]]
    for a, b in zip(*(torch.autograd.grad(f(x), leaves) for f in (function, compiled))):
        torch.testing.assert_close(a, b)
