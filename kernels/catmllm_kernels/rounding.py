"""How far a result in lower precision may be from float64: the condition of a calculation,
found by disturbing it.

A sum that cancels errs by the size of its terms, not of its result, so a bound relative to the result must
know both. Here a float64 calculation is run again with an error in every operation, drawn at random within
one unit roundoff: of each element, and of a sum's or product's terms where there are several (Σ|aᵢ|·u,
Σ|aᵢbᵢ|·u, which is also what a float32 sum over terms of random sign errs by, whatever their number and
order). The result is off by what an implementation that rounds everywhere is off by. (Vignes' stochastic
arithmetic, by torch's operators.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten
# They move numbers and round none.
EXACT = {
    aten._to_copy, aten._unsafe_view, aten.amax, aten.aminmax, aten.arange, aten.cat, aten.clone, aten.copy_,
    aten.detach, aten.embedding, aten.empty_like, aten.fill_, aten.full, aten.full_like, aten.gather,
    aten.index, aten.index_select, aten.lift_fresh, aten.masked_fill, aten.max, aten.neg, aten.new_empty,
    aten.new_full, aten.new_zeros, aten.ones_like, aten.scatter, aten.scatter_, aten.scatter_reduce,
    aten.slice_backward, aten.sort, aten.stack, aten.where, aten.zero_, aten.zeros, aten.zeros_like,
}  # fmt: skip
# Sums: their errors are those of their terms, which the same operator on absolute values adds up.
SUMS = {
    aten.addmm, aten.baddbmm, aten.bmm, aten.cumsum, aten.embedding_dense_backward, aten.index_add,
    aten.index_add_, aten.index_put, aten.index_put_, aten.mean, aten.mm, aten.sum,
}  # fmt: skip
RUNS = 8
# An implementation is one more draw of the same errors, in operations of its own. Beside fairchem's float64
# (20 runs of 28 tensors) its largest error was 1.4 times the largest of the eight draws.
MARGIN = 4


class Disturbed(TorchDispatchMode):
    """Every operator's floating results are off by up to `unit` of their terms,
    by random numbers of `seed`."""

    def __init__(self, unit: float, seed: int) -> None:
        super().__init__()
        self.unit, self.generator = unit, torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if func.namespace == "catmllm":  # an op of ours rounds in each of its own operators
            with self.again():
                return OPDEFS[func._name.partition(".")[0]]._init_fn(*args, **kwargs)
        if func.is_view or packet in EXACT:
            return func(*args, **kwargs)
        terms = None
        if packet in SUMS:
            plus = tree_map_only(Tensor, lambda t: t.abs() if t.is_floating_point() else t, (args, kwargs))
            terms = func(*plus[0], **plus[1])
        return tree_map_only(Tensor, lambda t: self.off(t, terms), func(*args, **kwargs))

    def off(self, t: Tensor, terms: Tensor | None) -> Tensor:
        if not t.is_floating_point():
            return t
        noise = torch.rand(t.shape, generator=self.generator, dtype=t.dtype).mul_(2).sub_(1).to(t.device)
        # a mask's infinities stay what they are
        return t.add_(noise.mul_(self.unit).mul_(t if terms is None else terms).nan_to_num_(0.0, 0.0, 0.0))

    def again(self) -> Disturbed:
        """The same once more, for use within itself."""
        inner = Disturbed(self.unit, 0)
        inner.generator = self.generator
        return inner


def error_bounds(calculate: Callable[[], Sequence[Tensor]], unit: float, runs: int = RUNS) -> list[float]:
    """For each of the float64 tensors of `calculate()`,
    what max |a - b| / max |b| may be at this unit roundoff.

    unit: half the gap above one, 2⁻²⁴ in float32. `calculate` must run torch's operators (the definitions of
    our ops, CATMLLM_KERNELS=reference) and make the same every time. Of tensors of thousands of elements one
    of the `runs` says as much as eight.

    >>> x = torch.tensor([1.0, -1.0, 1e-3], dtype=torch.float64)
    >>> (bound,) = error_bounds(lambda: [x.sum()], 2.0**-24)
    >>> 1e3 < bound / 2.0**-24 < 1e4  # the sum is 1e-3, its terms are 2
    True
    """
    exact = calculate()
    worst = [0.0] * len(exact)
    for seed in range(runs):
        with Disturbed(unit, seed):
            found = calculate()
        for i, (a, b) in enumerate(zip(found, exact, strict=True)):
            if b.numel():
                worst[i] = max(worst[i], float((a - b).abs().max() / b.abs().max().clamp_min(1e-300)))
    return [MARGIN * error for error in worst]
