"""The answers being decoded: a row each, with its keys and values, in groups that share a prompt's.

Each prompt is read once for all its samples and its keys and values are never copied: the samples of a group
attend to them in one matrix product. Rows that have ended leave, and waiting prompts enter in their place.

All memory is taken at the start, and what a pass changes it changes in place: the caches are as long as the
longest answer may be, so that they never move as answers grow. The host keeps lengths and groups itself, so
that nothing of a pass has to be asked of the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from catmllm.sample.graphs import Graphs
from catmllm.sample.tower import Tower
from catmllm_kernels.varlen_attention.cached import cached_attention, fits

CACHE_STEP = 64  # slots of the caches that come into use at once
BUCKETS = (8, 16, 32, 64, 96, 128, 192, 256)  # rows of a steady batch, and then every 128


def bucket(n: int, steady: bool) -> int:
    """Rows of a pass for n answers; in a steady batch one of them at least is idle."""
    if not steady:
        return n
    return next((b for b in BUCKETS if b > n), -(-(n + 1) // 128) * 128)


def slots_of(longest: int) -> int:
    """Slots of a row's cache for answers of at most so many tokens."""
    return -(-max(longest, 1) // CACHE_STEP) * CACHE_STEP


Cache = tuple[torch.Tensor, torch.Tensor]  # keys and values of a layer
Attend = Callable[[torch.Tensor, Cache, Cache], torch.Tensor]  # queries, the prompts' cache, the rows' own


class Runs(NamedTuple):
    """Tokens that rows gain in one pass, row by row: token [N], the row [N] of each and its place [N] in that
    row's run; how many each row gains [R] and where its last one is [R]; how many any row gains at most."""

    token: torch.Tensor
    row: torch.Tensor
    place: torch.Tensor
    gains: torch.Tensor
    last: torch.Tensor
    longest: int


class Rows:
    """The rows being decoded, and the groups of rows that share a prompt.

    Rows of a group are adjacent. Per layer, `prompt` holds keys and values [groups, kv, P, dim] and `own`
    those [rows, kv, slots, dim] of sampled tokens; `bias` [rows, P + slots] is 0 where a row may look and
    -inf elsewhere. The first `n` rows hold answers. A pass computes the first `size`: the same ones, or in a
    `steady` batch as many as the next of `BUCKETS` has, of which the last is always idle: an ended row of
    nobody's. Tensors by name are views of these rows. Where a CPU's own kernel attends (`plain`), keys and
    values are float32, and nothing is masked or padded.

    `answer`, `length`, `gone` [n] are the host's: number of the answer, tokens of it in `own`, and whether it
    is known to have ended.
    """

    row: torch.Tensor  # number of the answer
    steps: torch.Tensor  # its tokens
    begun: torch.Tensor  # those of them that were read with the prompt
    begin: torch.Tensor  # position of the token behind these: the prompt's length, but for pictures
    ended: torch.Tensor
    token: torch.Tensor  # the next one
    hidden: torch.Tensor
    bias: torch.Tensor
    seat: torch.Tensor

    def __init__(
        self, tower: Tower, rows: int, groups: int, prompt_slots: int, longest: int, nobody: int, steady: bool
    ) -> None:
        """Room for `rows` rows of `groups` prompts of `prompt_slots` tokens, and answers of `longest`;
        `nobody`: the number that idle rows have."""
        weight, kv, dim = tower.embedding, tower.kv_heads, tower.dim
        self.tower, self.prompt_slots, self.steady, self.nobody = tower, prompt_slots, steady, nobody
        self.plain = not steady and fits(weight)
        self.slots = slots_of(longest)
        self.n = self.groups = self.opened = 0
        self.answer, self.group = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        self.length, self.begun_tokens = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        self.gone, self.prompt_length = np.zeros(0, dtype=bool), np.zeros(0, dtype=np.int64)
        self.gains: np.ndarray | int = 1  # tokens that each row gains in the next pass
        most = bucket(rows, steady)

        def caches(n: int, slots: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
            x = weight.new_empty(0, dtype=torch.float32 if self.plain else None)
            shape = (n, kv, slots, dim)
            return [(x.new_empty(shape), x.new_empty(shape)) for _ in tower.layers]

        self.prompt, self.own = caches(groups + steady, prompt_slots), caches(most, self.slots)
        if steady:  # nobody looks at what is masked, but it must be a number
            for cache in (cache for pair in self.prompt for cache in pair):
                cache.zero_()
        index = torch.zeros(most, dtype=torch.int64, device=weight.device)
        self._state = {name: index.clone() for name in ("row", "steps", "begun", "begin", "token", "seat")}
        self._state["ended"] = index.bool()
        self._state["hidden"] = weight.new_zeros(most, weight.shape[1])
        self._state["bias"] = weight.new_full((most, prompt_slots + self.slots), -torch.inf)
        self._numbers = torch.arange(most, device=weight.device)
        self._given: dict[tuple[int, int], torch.Tensor] = {}
        self._graphs = Graphs(weight.device, steady)
        self._arrange()

    def admit(
        self,
        first: int,
        x: torch.Tensor,
        length: torch.Tensor,
        mrope: torch.Tensor | None,
        group_size: int,
        begun: Sequence[int],
    ) -> None:
        """Read prompts x [B, T, H] of these lengths [B], with positions mrope [3, B, T] where some show
        pictures; their rows get the numbers first, first + 1, … The last `begun` [B] tokens of a prompt are
        the first of its answers."""
        b, t, _ = x.shape
        n, device = b * group_size, x.device
        hidden, cache = self.tower.prefill(x, mrope)
        at = torch.arange(b, device=device)
        for pair, read in zip(self.prompt, cache):
            for whole, part in zip(pair, read):
                whole[self.groups : self.groups + b, :, :t] = part
                whole[self.groups : self.groups + b, :, t:] = 0
        # No token has a higher position than the last of a prompt, which is text.
        begin = length if mrope is None else mrope[0, at, length - 1] + 1
        known = torch.tensor(begun, device=device)
        visible = torch.arange(self.prompt_slots, device=device) < length[:, None]
        mask = torch.zeros_like(visible, dtype=x.dtype).masked_fill_(~visible, -torch.inf)
        new = {
            "row": first + torch.arange(n, device=device),
            "steps": known.repeat_interleave(group_size, output_size=n),
            "begun": known.repeat_interleave(group_size, output_size=n),
            "begin": begin.repeat_interleave(group_size, output_size=n),
            "hidden": hidden[at, length - 1].repeat_interleave(group_size, 0, output_size=n),
        }
        place = slice(self.n, self.n + n)
        for name, value in new.items():
            self._state[name][place] = value
        self._state["ended"][place] = False
        self._state["bias"][place] = -torch.inf
        self._state["bias"][place, : self.prompt_slots] = mask.repeat_interleave(group_size, 0, output_size=n)
        self.answer = np.append(self.answer, first + np.arange(n))
        self.group = np.append(self.group, self.groups + np.arange(n) // group_size)
        self.length, self.gone = np.append(self.length, np.zeros(n, int)), np.append(self.gone, [False] * n)
        self.begun_tokens = np.append(self.begun_tokens, np.repeat(begun, group_size))
        if self.plain:
            self.prompt_length = np.append(self.prompt_length, length.numpy())
        self.n, self.groups = self.n + n, self.groups + b
        self._arrange()

    @property
    def crowded(self) -> bool:
        """Whether rows that have ended should leave: to move caches costs more than a few idle rows."""
        gone = int(self.gone.sum())
        if self.steady:
            return gone == self.n or bucket(self.n - gone, True) < self.size
        return gone * 8 >= self.n

    def leave(self) -> None:
        """Drop the rows that have ended, and the prompts that no row needs any more."""
        keep = np.flatnonzero(~self.gone)
        self.answer, self.length = self.answer[keep], self.length[keep]
        self.begun_tokens, self.gone = self.begun_tokens[keep], self.gone[keep]
        groups, self.group = np.unique(self.group[keep], return_inverse=True)
        self._move(keep, [t for name, t in self._state.items() if name != "seat"])
        used = int(self.length.max(initial=0))
        self._move(keep, [t[:, :, :used] for pair in self.own for t in pair])
        self._move(groups, [t for pair in self.prompt for t in pair])
        self.prompt_length = self.prompt_length[groups] if self.plain else self.prompt_length
        self.n, self.groups = len(keep), len(groups)
        self._arrange()

    def _move(self, kept: np.ndarray, tensors: list[torch.Tensor]) -> None:
        """The rows of some numbers to the front; those that are there already stay."""
        still = int((kept == np.arange(len(kept))).sum())  # ascending: the first ones
        if still < len(kept):
            index = torch.from_numpy(kept[still:]).to(self._numbers.device, non_blocking=True)
            for t in tensors:
                t[still : len(kept)] = t[index]

    def _arrange(self) -> None:
        """Idle rows, and each row's place among [groups, widest group] places, where the rows of a group meet
        their prompt; idle ones sit in a group of nobody's."""
        n, self.size = self.n, bucket(self.n, self.steady)
        widths = np.bincount(self.group, minlength=1)
        self.places = int(widths.max())
        seat = self.group * self.places + np.arange(n) - (widths.cumsum() - widths)[self.group]
        if self.steady:
            self.places = max(1, self.places)
            seat = np.append(seat, self.groups * self.places + np.arange(self.size - n) % self.places)
            idle = {"row": self.nobody, "ended": True, "bias": -torch.inf} | dict.fromkeys(
                ("steps", "begun", "begin", "token"), 0
            )
            for name, value in idle.items():
                self._state[name][n : self.size] = value
        self._state["seat"][: self.size].copy_(torch.from_numpy(seat), non_blocking=True)
        self.shown = self.groups + self.steady  # groups of a pass
        self._in_order = np.array_equal(seat, np.arange(self.shown * self.places))
        for name, whole in self._state.items():
            setattr(self, name, whole[: self.size])

    def runs(self, tokens: Sequence[Sequence[int]]) -> Runs | None:
        """Tokens that the host knows, a run a row, for the next pass; None where they are one each: these are
        then `token`."""
        count = np.array([len(t) for t in tokens] + [0] * (self.size - self.n))
        self.gains = count[: self.n]
        n, longest = int(count.sum()), int(count.max(initial=0))
        flat = np.fromiter(chain.from_iterable(tokens), np.int64, n)
        if longest == 1:
            self.token[: self.n].copy_(torch.from_numpy(flat), non_blocking=True)
            return None
        end = count.cumsum()
        row = np.repeat(np.arange(self.size), count)
        place = np.arange(n) - (end - count)[row]
        if self.steady:  # what fills the pass up is the last row's, which is idle
            more = -n % self.size
            flat, place = np.append(flat, [0] * more), np.append(place, [0] * more)
            row = np.append(row, [self.size - 1] * more)
            longest = 1 << (longest - 1).bit_length()
        packed = np.concatenate([flat, row, place, count, np.maximum(end - 1, 0)])
        held = self._given.setdefault((len(flat), self.size), self._numbers.new_empty(len(packed)))
        held.copy_(torch.from_numpy(packed), non_blocking=True)
        token, row_, place_, gains, last = held.split([len(flat)] * 3 + [self.size] * 2)
        return Runs(token, row_, place_, gains, last, longest)

    def advance(self, runs: Runs | None) -> None:
        """Append `token`, or runs of tokens, and compute the final hidden state of each row's last one."""
        count = self.gains
        # Rows that ended and have not left yet go on in place: what they write is never read.
        first = np.where(self.gone, 0, self.length)
        used = min(self.slots, int((first + count).max()))
        together = runs is None and not self.steady and bool((first == used - 1).all())
        while self.opened < used:
            for cache in (cache for pair in self.own for cache in pair):
                cache[:, :, self.opened : self.opened + CACHE_STEP].zero_()
            self.opened += CACHE_STEP
        self.length = first + count
        used = self.opened if self.steady else used
        key = (self.size, self.shown, self.places, self._in_order, used)
        more = () if runs is None else (len(runs.token), runs.longest)
        self._graphs.run((*key, *more), lambda: self._pass(runs, used, together))

    def _pass(self, runs: Runs | None, used: int, together: bool) -> None:
        """The tower over the tokens that rows gain, which see the first `used` slots of their own;
        `together`: each row writes the last of these."""
        tower, row, token = self.tower, self._numbers[: self.size], self.token
        at = first = torch.where(self.ended, 0, self.steps - self.begun)
        if runs is not None:
            row, token = runs.row, runs.token
            at = (first[row] + runs.place).clamp_max(self.slots - 1)
        attend = self._by_caches() if self.plain else self._by_masks(runs, row, at, first, used)
        cos, sin = tower.rotary((self.begin[row] + at)[:, None])
        x = F.embedding(token, tower.embedding)
        for layer, prompt, (keys, values) in zip(tower.layers, self.prompt, self.own):
            q, k, v = tower.qkv(layer, x, cos, sin)
            if together:
                keys[: self.size, :, used - 1], values[: self.size, :, used - 1] = k, v
            else:
                keys[row, :, at], values[row, :, at] = k.to(keys.dtype), v.to(values.dtype)
            x = tower.rest(layer, x, attend(q, prompt, (keys, values)))
        self.hidden.copy_(tower.normed(x if runs is None else x[runs.last], tower.norm))
        self.steps.add_(1 if runs is None else runs.gains)

    def _by_caches(self) -> Attend:
        """Attention of a pass by the kernel for CPUs, which neither pads nor masks."""
        bounds = np.append(0, np.broadcast_to(self.gains, self.n).cumsum())
        group = np.searchsorted(self.group, np.arange(self.groups + 1))
        before = np.minimum(self.length, self.slots) - self.gains

        def attend(q: torch.Tensor, prompt: Cache, own: Cache) -> torch.Tensor:
            out = cached_attention(q, prompt, own, group, self.prompt_length, bounds, before)
            return out.flatten(1).to(q.dtype)

        return attend

    def _by_masks(
        self, runs: Runs | None, row: torch.Tensor, at: torch.Tensor, first: torch.Tensor, used: int
    ) -> Attend:
        """Attention of a pass by torch's products: a token sees none behind it, and queries are padded to the
        longest run. row, at: of each token its row and its place among that one's own; first: the place of
        each row's first."""
        self.bias[row, self.prompt_slots + at] = 0.0
        bias, seat = self.bias[:, None, : self.prompt_slots + used], None
        if runs is not None:
            seat = row * runs.longest + runs.place
            last = first[:, None] + torch.arange(runs.longest, device=at.device)
            behind = torch.arange(used, device=at.device) > last[..., None]
            bias = bias.repeat(1, runs.longest, 1)
            bias[..., self.prompt_slots :].masked_fill_(behind, -torch.inf)

        def attend(q: torch.Tensor, prompt: Cache, own: Cache) -> torch.Tensor:
            shared = prompt[0][: self.shown], prompt[1][: self.shown]
            keys, values = (x[: self.size, :, :used] for x in own)
            return self._attend(q, shared, keys, values, bias, seat)

        return attend

    def _attend(
        self,
        q: torch.Tensor,
        prompt: tuple[torch.Tensor, torch.Tensor],
        keys: torch.Tensor,
        values: torch.Tensor,
        bias: torch.Tensor,
        seat: torch.Tensor | None,
    ) -> torch.Tensor:
        """Grouped-query attention of q [N, heads, dim] to the prompt of its row's group and to the row's own
        tokens; bias [R, L, slots], seat [N] the place of each query in R rows of L (None: one a row).

        The query heads that share a key head, a row's queries, and the rows that share a prompt, become rows
        of one product.
        """
        kv, d, (r, longest, slots) = self.tower.kv_heads, self.tower.dim, bias.shape
        q = q.reshape(len(q), kv, -1, d) * d**-0.5
        heads = q.shape[2]  # that share a key head
        if seat is not None:
            q = q.new_zeros(r * longest, kv, heads, d).index_copy_(0, seat, q)
            q = q.view(r, longest, kv, heads, d).transpose(1, 2).reshape(r, kv, longest * heads, d)
        to_prompt = self._from_groups(self._by_group(q) @ prompt[0].transpose(2, 3))
        scores = torch.cat([to_prompt, q @ keys.transpose(2, 3)], -1)
        scores = (scores.view(r, kv, longest, heads, slots) + bias[:, None, :, None]).view(scores.shape)
        weights = scores.float().softmax(-1).to(q.dtype)
        of_prompt, of_own = weights.split([self.prompt_slots, keys.shape[2]], -1)
        out = self._from_groups(self._by_group(of_prompt) @ prompt[1]) + of_own @ values
        if seat is None:
            return out.reshape(r, -1)
        return out.view(r, kv, longest, heads * d).transpose(1, 2).reshape(r * longest, -1)[seat]

    def _by_group(self, x: torch.Tensor) -> torch.Tensor:
        """Rows x [R, kv, g, n] at their groups' places: [G, kv, places·g, n], zeros where no row sits."""
        _, kv, g, n = x.shape
        if not self._in_order:
            x = x.new_zeros(self.shown * self.places, kv, g, n).index_copy_(0, self.seat, x)
        return x.view(self.shown, self.places, kv, g, n).transpose(1, 2).reshape(self.shown, kv, -1, n)

    def _from_groups(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse: [G, kv, places·g, n] -> [R, kv, g, n]."""
        groups, kv, _, n = x.shape
        x = x.view(groups, kv, self.places, -1, n).transpose(1, 2).reshape(groups * self.places, kv, -1, n)
        return x if self._in_order else x[self.seat]
