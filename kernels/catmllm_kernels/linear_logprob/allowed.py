"""The op where a grammar allows few words: log-softmax over each token's own set of them.

Only columns that some token of the call may take are multiplied, and what a token may not take is masked
before the softmax. A token without a choice has log-probability 0 and is not given to this function at all.
The logits are few, so that keeping their gradient costs less than making them twice. On a CPU csrc/rows makes
one pass over them, elsewhere and in other dtypes torch's operators several.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from catmllm_kernels import rows
from catmllm_kernels.dense import product
from catmllm_kernels.linear_logprob.cpu import of_kept
from catmllm_kernels.linear_logprob.op import LogProbs

_NEVER = -1e30  # the logit of a word that may not come


class Allowed(NamedTuple):
    """Sets of words, one a token: columns [U] int64, the words of all sets, ascending; sets [G, U] bool,
    which of them each of the different sets holds; of [T] int64, the set of each token."""

    columns: Tensor
    sets: Tensor
    of: Tensor

    def to(self, device: torch.device) -> Allowed:
        return Allowed(*(x.to(device) for x in self))

    @classmethod
    def join(cls, sets: Sequence[Tensor]) -> Allowed:
        """Of a set of words [n] int64 for each token; sets that are the same object are kept once."""
        number: dict[int, int] = {}
        different: list[Tensor] = []
        of = []
        for s in sets:
            k = number.setdefault(id(s), len(different))
            if k == len(different):
                different.append(s)
            of.append(k)
        words = torch.cat(different) if different else torch.zeros(0, dtype=torch.int64)
        # by marks and not by `unique`: sets of a thousand words, one a row, would be sorted for 20 ms a token
        there = torch.zeros(int(words.max()) + 1 if len(words) else 0, dtype=torch.bool, device=words.device)
        columns = there.index_fill_(0, words, True).nonzero().squeeze(1)
        place = there.cumsum(0)[words] - 1
        lengths = torch.tensor([len(s) for s in different], dtype=torch.int64)
        line = torch.arange(len(different)).repeat_interleave(lengths)
        table = torch.zeros(len(different), len(columns), dtype=torch.bool, device=words.device)
        table[line.to(table.device), place] = True
        return cls(columns, table, torch.tensor(of, dtype=torch.int64))


def masked_logits(hidden: Tensor, weight: Tensor, allowed: Allowed, temperature: float = 1.0) -> Tensor:
    """hidden [T, H] @ weight [V, H].T / temperature at the columns of `allowed`: [T, U] in float32 or wider,
    -inf where a token may not take the word.

    >>> allowed = Allowed.join([torch.tensor([1, 2]), torch.tensor([2])])
    >>> masked_logits(torch.ones(2, 3), torch.ones(3, 3), allowed)
    tensor([[3., 3.],
            [-inf, 3.]])
    """
    logits = F.linear(hidden, weight.index_select(0, allowed.columns))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature != 1.0:
        logits = logits / temperature
    return logits.masked_fill(~allowed.sets[allowed.of], -torch.inf)


def allowed_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    allowed: Allowed,
    temperature: float = 1.0,
    entropy: bool = False,
    reference: Tensor | None = None,
) -> LogProbs:
    """As `linear_logprobs`, with each distribution normalised over the words that its token may take.

    hidden [T, H] and weight [V, H] in one floating dtype, targets [T] int64, each in its token's set. The
    log-probabilities are differentiable in hidden and weight, entropy and the reference's are not. Raises
    ValueError where sizes do not fit, and on a CPU for a target that is not allowed; on CUDA such a target's
    log-probability is -inf.

    Three words of equal score, of which the token may take the last two:

    >>> allowed = Allowed.join([torch.tensor([1, 2])])
    >>> allowed_logprobs(torch.ones(1, 3), torch.ones(3, 3), torch.tensor([2]), allowed).logprob.exp()
    tensor([0.5000])
    """
    if not len(hidden) == len(targets) == len(allowed.of):
        raise ValueError(
            f"need a target and a set for each of the {len(hidden)} tokens, not {len(targets)} and "
            f"{len(allowed.of)}"
        )
    place = torch.searchsorted(allowed.columns, targets).clamp_max(max(0, len(allowed.columns) - 1))
    inside = allowed.sets[allowed.of, place] & (allowed.columns[place] == targets)
    if not hidden.is_cuda and not bool(inside.all()):
        wrong = int((~inside).nonzero()[0])
        raise ValueError(f"target {int(targets[wrong])} of token {wrong} is none of the words allowed there")

    fast = bool(len(hidden)) and not rows.unfit(hidden)

    def at_targets(head: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
        if fast:
            own, spread = _OnePass.apply(
                hidden, head.index_select(0, allowed.columns), place, allowed.sets, allowed.of, temperature
            )
            return own, spread if entropy else None
        logprob = masked_logits(hidden, head, allowed, temperature).log_softmax(1)
        own = logprob.gather(1, place[:, None]).squeeze(1).where(inside, -torch.inf)
        if not entropy:
            return own, None
        known = logprob.detach()
        return own, -(known.exp() * known.masked_fill(~allowed.sets[allowed.of], 0.0)).sum(1)

    own, spread = at_targets(weight, entropy)
    other = None
    if reference is not None:
        with torch.no_grad():
            other = at_targets(reference, False)[0]
    return LogProbs(own, spread, other)


class _OnePass(torch.autograd.Function):
    """Log-probabilities [T] at the places [T] among the columns' weights [U, H], and entropies [T] without
    gradient, by csrc/rows: of the logits there is one copy, in whose place their gradient is kept."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, place: Tensor, sets: Tensor, of: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        z = product(hidden, weight)
        # finite, so that its share of the entropy is 0 and not NaN
        never = ~sets.index_select(0, of)
        z.masked_fill_(never, _NEVER)
        own = hidden.new_empty(len(z), dtype=torch.float32)
        total, spread = torch.empty_like(own), torch.empty_like(own)
        keep = any(ctx.needs_input_grad[:2])
        scale, target = 1 / temperature, place.contiguous()
        rows.call("log_softmax", z.dtype, *z.shape, scale, target, z, int(keep), own, total, spread)
        if keep:
            # it is about 1e-38, with which float32's products take 20 times as long
            z.masked_fill_(never, 0.0)
            ctx.temperature = temperature
            ctx.save_for_backward(hidden, weight, z)
        ctx.mark_non_differentiable(spread)
        return own, spread

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
        hidden, weight, kept = ctx.saved_tensors
        need = ctx.needs_input_grad
        return *of_kept(grad / ctx.temperature, hidden, weight, kept, need[0], need[1]), *(None,) * 4
