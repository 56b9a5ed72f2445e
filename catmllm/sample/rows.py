"""The answers being decoded: a row each, with its keys and values, in groups that share a prompt's.

Each prompt is read once for all its samples and its keys and values are never copied: the samples of a group
attend to them in one matrix product. Rows that have ended leave, and waiting prompts enter in their place.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from catmllm.sample.tower import Tower

CACHE_STEP = 64  # slots by which the caches of sampled tokens grow


class Rows:
    """The rows being decoded, and the groups of rows that share a prompt.

    Rows of a group are adjacent. Per layer, `prompt` holds keys and values [G, kv, P, dim] a group and `own`
    those [R, kv, slots, dim] of sampled tokens a row; `bias` [R, P + slots] is 0 where a row may look and
    -inf elsewhere.
    """

    def __init__(self, tower: Tower, prompt_slots: int) -> None:
        weight, kv, dim = tower.embedding, tower.kv_heads, tower.dim
        self.tower, self.prompt_slots = tower, prompt_slots
        index = torch.zeros(0, dtype=torch.int64, device=weight.device)
        self.row, self.group, self.steps = index, index, index  # id, group, tokens
        self.begun = index  # tokens of the answer that were read with the prompt
        self.begin = index  # position of the token behind these: the prompt's length, but for pictures
        self.hidden = weight.new_zeros(0, weight.shape[1])
        self.ended = index.bool()
        self.prompt = [(weight.new_zeros(0, kv, prompt_slots, dim),) * 2 for _ in tower.layers]
        self.own = [(weight.new_zeros(0, kv, CACHE_STEP, dim),) * 2 for _ in tower.layers]
        self.bias = weight.new_zeros(0, prompt_slots + CACHE_STEP)

    def admit(
        self,
        first: int,
        x: torch.Tensor,
        length: torch.Tensor,
        mrope: torch.Tensor | None,
        group_size: int,
        begun: torch.Tensor,
    ) -> None:
        """Read prompts x [B, T, H] of these lengths [B], with positions mrope [3, B, T] where some show
        pictures; their rows get the ids first, first + 1, … The last `begun` [B] tokens of a prompt are the
        first of its answers."""
        b, t, _ = x.shape
        device, slots = x.device, self.own[0][0].shape[2]
        hidden, cache = self.tower.prefill(x, mrope)
        hidden = hidden[torch.arange(b, device=device), length - 1]
        grow = (0, 0, 0, self.prompt_slots - t)
        self.prompt = [
            (torch.cat([a, F.pad(k, grow)]), torch.cat([c, F.pad(v, grow)]))
            for (a, c), (k, v) in zip(self.prompt, cache)
        ]
        n = b * group_size
        empty = x.new_zeros(n, self.tower.kv_heads, slots, self.tower.dim)
        self.own = [(torch.cat([k, empty]), torch.cat([v, empty])) for k, v in self.own]
        groups = len(self.prompt[0][0]) - b + torch.arange(b, device=device)
        new = torch.arange(n, device=device)
        bias = x.new_full((b, self.bias.shape[1]), -torch.inf)
        bias[:, : self.prompt_slots].masked_fill_(
            torch.arange(self.prompt_slots, device=device) < length[:, None], 0.0
        )
        self.row = torch.cat([self.row, first + new])
        self.group = torch.cat([self.group, groups.repeat_interleave(group_size)])
        begun = begun.repeat_interleave(group_size)
        self.steps, self.begun = torch.cat([self.steps, begun]), torch.cat([self.begun, begun])
        # No token has a higher position than the last of a prompt, which is text.
        begin = length if mrope is None else mrope[0, torch.arange(b, device=device), length - 1] + 1
        self.begin = torch.cat([self.begin, begin.repeat_interleave(group_size)])
        self.hidden = torch.cat([self.hidden, hidden.repeat_interleave(group_size, 0)])
        self.ended = torch.cat([self.ended, torch.zeros_like(new, dtype=torch.bool)])
        self.bias = torch.cat([self.bias, bias.repeat_interleave(group_size, 0)])
        self._seats()

    def leave(self) -> torch.Tensor:
        """Drop the rows that have ended, and the prompts that no row needs any more;
        the places [R] that stay."""
        keep = (~self.ended).nonzero()[:, 0]
        self.row, self.steps, self.begin = self.row[keep], self.steps[keep], self.begin[keep]
        self.begun = self.begun[keep]
        self.hidden, self.ended, self.bias = self.hidden[keep], self.ended[keep], self.bias[keep]
        self.own = [(k[keep], v[keep]) for k, v in self.own]
        groups, self.group = self.group[keep].unique(return_inverse=True)
        if len(groups) < len(self.prompt[0][0]):
            self.prompt = [(k[groups], v[groups]) for k, v in self.prompt]
        self._seats()
        return keep

    def _seats(self) -> None:
        """Each row's place among [G, widest group] places, where the rows of a group meet their prompt."""
        n = torch.bincount(self.group, minlength=1)
        self.places = int(n.max())
        begin = n.cumsum(0) - n
        place = torch.arange(len(self.group), device=self.group.device) - begin[self.group]
        self.seat = self.group * self.places + place

    def advance(self, token: torch.Tensor, count: torch.Tensor) -> None:
        """Append `count` [R] tokens to every row, token [N] row by row, and compute the final hidden state of
        its last one."""
        tower, device = self.tower, token.device
        # Rows that ended and have not left yet go on in place: what they write is never read.
        first = torch.where(self.ended, 0, self.steps - self.begun)
        rows = torch.arange(len(count), device=device).repeat_interleave(count)
        end = count.cumsum(0)
        place = torch.arange(len(token), device=device) - (end - count)[rows]  # in the row's run
        at = first[rows] + place
        used, longest = int(at.max()) + 1, int(count.max())
        while used > self.own[0][0].shape[2]:
            self.own = [
                (F.pad(k, (0, 0, 0, CACHE_STEP)), F.pad(v, (0, 0, 0, CACHE_STEP))) for k, v in self.own
            ]
            self.bias = F.pad(self.bias, (0, CACHE_STEP), value=-torch.inf)
        self.bias[rows, self.prompt_slots + at] = 0.0
        bias = self.bias[:, None, : self.prompt_slots + used]
        seat = None
        if longest > 1:  # a token sees none behind it; queries are padded to the longest run
            seat = rows * longest + place
            last = first[:, None] + torch.arange(longest, device=device)
            behind = torch.arange(used, device=device) > last[..., None]
            bias = bias.repeat(1, longest, 1)
            bias[..., self.prompt_slots :].masked_fill_(behind, -torch.inf)
        cos, sin = tower.rotary((self.begin[rows] + at)[:, None])
        x = F.embedding(token, tower.embedding)
        together = longest == 1 and bool((at == used - 1).all())
        for layer, prompt, (keys, values) in zip(tower.layers, self.prompt, self.own):
            q, k, v = tower.qkv(layer, x, cos, sin)
            if together:
                keys[:, :, used - 1], values[:, :, used - 1] = k, v
            else:
                keys[rows, :, at], values[rows, :, at] = k, v
            attended = self._attend(q, prompt, keys[:, :, :used], values[:, :, :used], bias, seat)
            x = tower.rest(layer, x, attended)
        self.hidden = tower.normed(x[end - 1] if longest > 1 else x, tower.norm)
        self.steps = self.steps + count

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
        r, kv, g, n = x.shape
        groups = len(self.prompt[0][0])
        if r != groups * self.places:
            x = x.new_zeros(groups * self.places, kv, g, n).index_copy_(0, self.seat, x)
        return x.view(groups, self.places, kv, g, n).transpose(1, 2).reshape(groups, kv, -1, n)

    def _from_groups(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse: [G, kv, places·g, n] -> [R, kv, g, n]."""
        groups, kv, _, n = x.shape
        x = x.view(groups, kv, self.places, -1, n).transpose(1, 2).reshape(groups * self.places, kv, -1, n)
        return x if len(x) == len(self.seat) else x[self.seat]
