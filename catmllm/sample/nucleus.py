"""Drawing tokens: top-p sampling that sorts nothing, and noise that is a function of what it is drawn for."""

from __future__ import annotations

import torch

TRIES = 8  # draws of `steady_nucleus`
BLOCK = 64  # tokens whose masses are summed at once before the search looks inside


def sample_nucleus(mass: torch.Tensor, top_p: float, noise: torch.Tensor) -> torch.Tensor:
    """Draw one token a row from the smallest set of most likely tokens whose share of the mass reaches top_p.

    mass [B, V] float32, not negative and not all zero: probabilities up to a factor a row. noise [B, A]
    uniform in [0, 1). A draw from the whole distribution is kept if the tokens above it hold less than top_p,
    for then it lies in the set; with A - 1 tries, a row keeps none with probability under (1 - top_p)^(A -
    1), and is sorted. A vocabulary that is flat, as at the start of training, costs no more than a peaked one
    (128 rows of 3,229 tokens on one core: 2.6 ms, a sort 21 ms).
    """
    if top_p >= 1.0:
        return _invert(mass, noise[:, 0])
    out = torch.full((len(mass),), -1, dtype=torch.int64, device=mass.device)
    rest = torch.arange(len(mass), device=mass.device)
    part, limit = mass, top_p * mass.sum(1)
    # Where most draws would be thrown away, sort at once.
    for attempt in range(noise.shape[1] - 1 if top_p >= 0.5 else 0):
        token = _invert(part, noise[rest, attempt])
        above = (part * (part > part.gather(1, token[:, None]))).sum(1)
        kept = above < limit[rest]
        out[rest[kept]] = token[kept]
        rest = rest[~kept]
        if not len(rest):
            return out
        part = mass[rest]
    out[rest] = _sorted(part, top_p, noise[rest, -1])
    return out


def steady_nucleus(mass: torch.Tensor, top_p: float, noise: torch.Tensor) -> torch.Tensor:
    """The same for a GPU, without a look at what was drawn; noise [B, TRIES].

    The first four tries are those of `sample_nucleus`, and nearly always one of them is kept. The others draw
    among the tokens that are likelier than all that were thrown away: these hold the set, and every further
    throw halves what they have outside of it. That none of `TRIES` is kept has a probability under 2^-22, at
    0.95 under 2^-45; the most likely token is then taken.
    """
    if top_p >= 1.0:
        return _invert(mass, noise[:, 0])
    if top_p < 0.5:  # most draws would be thrown away
        top, token = mass.sort(1, descending=True)
        return _cut(top / mass.sum(1, keepdim=True), token, top_p, noise[:, 4])
    limit, low = top_p * mass.sum(1), torch.zeros_like(mass[:, 0])
    out, kept = mass.argmax(1), torch.zeros_like(low, dtype=torch.bool)
    for attempt in range(TRIES):
        part = mass if attempt < 4 else mass * (mass > low[:, None])
        token = _invert(part, noise[:, attempt])
        one = mass.gather(1, token[:, None])
        fits = (mass * (mass > one)).sum(1) < limit
        out = torch.where(fits & ~kept, token, out)
        low = torch.where(fits, low, torch.maximum(low, one[:, 0]))
        kept |= fits
    return out


def _invert(mass: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Tokens [B] at which the cumulative mass [B, V] passes the share `noise` [B] of the whole."""
    b, v = mass.shape
    blocks = torch.nn.functional.pad(mass, (0, -v % BLOCK)).view(b, -1, BLOCK)
    before = blocks.sum(2).cumsum(1)
    # Never the whole: the last token with any mass is then found, whatever the rounding.
    wanted = noise[:, None] * before[:, -1:]
    block = torch.searchsorted(before, wanted, right=True).clamp_max(before.shape[1] - 1)
    inside = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK))[:, 0]
    begin = before.gather(1, (block - 1).clamp_min(0)) * (block > 0)
    cumulative = inside.cumsum(1)
    at = torch.searchsorted(cumulative, wanted - begin, right=True)
    last = BLOCK - 1 - (inside.flip(1) > 0).float().argmax(1, keepdim=True)
    return (block * BLOCK + torch.minimum(at, last)).squeeze(1)


def _sorted(mass: torch.Tensor, top_p: float, noise: torch.Tensor, shortlist: int = 128) -> torch.Tensor:
    """The same draw by sorting: the `shortlist` most likely tokens where they hold the set, else all."""
    total = mass.sum(1, keepdim=True)
    top, token = mass.topk(min(shortlist, mass.shape[1]), dim=1)
    out = _cut(top / total, token, top_p, noise)
    short = (top.sum(1) < top_p * total[:, 0]).nonzero()[:, 0]
    if len(short) and top.shape[1] < mass.shape[1]:
        top, token = mass[short].sort(1, descending=True)
        out[short] = _cut(top / total[short], token, top_p, noise[short])
    return out


def _cut(share: torch.Tensor, token: torch.Tensor, top_p: float, noise: torch.Tensor) -> torch.Tensor:
    """Tokens [B] of descending shares [B, K], cut to the smallest set that reaches top_p, at `noise`."""
    kept = share * (share.cumsum(1) - share < top_p)
    cumulative = kept.cumsum(1)
    at = torch.searchsorted(cumulative, noise[:, None] * cumulative[:, -1:], right=True)
    last = (kept > 0).sum(1, keepdim=True) - 1
    return token.gather(1, torch.minimum(at, last)).squeeze(1)


def uniforms(key: int, row: torch.Tensor, step: torch.Tensor, count: int) -> torch.Tensor:
    """Noise [R, count] float32 in [0, 1) for token `step` [R] of answer `row` [R] under a key.

    A counter-based generator (splitmix64's mixing of row, step and number), so that a draw does not depend on
    which other rows are in the batch nor on the order in which they were drawn.
    """
    x = row * _ODD[0] + step * _ODD[1]
    x = _mix(x + key)[:, None] + torch.arange(1, count + 1, device=row.device) * _ODD[2]
    return ((_mix(x) >> 40) & 0xFFFFFF).float() * 2.0**-24


# Odd 64-bit constants (of splitmix64 and of the golden ratio), as int64.
_ODD = (-7046029254386353131, -4658895280553007687, -7723592293110705685)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """splitmix64's finaliser on int64 bits; its shifts are logical, torch's arithmetic."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _ODD[1]
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _ODD[2]
    return x ^ ((x >> 31) & (2**33 - 1))
