"""Sampling CIFs: a lean KV-cache loop over the weights of Qwen's text tower.

Each prompt is read once for all its samples and its keys and values are never copied: the samples of a group
attend to them in one matrix product. Rows that have ended leave the batch, waiting prompts enter in their
place, and per token only what decoding needs is computed: no position bookkeeping, one product for q, k and
v, one for the two halves of the MLP. Of text Qwen2.5-VL's three rotary sections coincide, so plain rotary
embedding is exact; only a prompt with a picture has three positions a token. A test holds the loop equal to
transformers' own forward.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from catmllm.config import SamplingConfig
from catmllm.data.batches import Collator, Encoded
from catmllm.data.prompts import Sample
from catmllm.data.tokenizer import decode
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.models.half_precision import MLP_SCALE
from catmllm.models.lora import effective_weight
from catmllm.sample.grammar import Grammar, Pattern, grammar_of
from catmllm.sample.nucleus import sample_nucleus, uniforms
from catmllm.seeds import hash_seed
from catmllm_kernels.dense import product

Linear = Callable[..., torch.Tensor]  # x, weight, bias
CACHE_STEP = 64  # slots by which the caches of sampled tokens grow


@dataclass(frozen=True)
class Rollout:
    """One sampled answer.

    `prompt` indexes the prompts given; ids [T] are the sampled tokens, the end token included where it came;
    logprob [T] float32 are their log-probabilities under logits / T, before the top-p cut, the ban on markers
    and the grammar; hidden [T, H] the final hidden states that they were sampled from (None unless asked
    for); `finished` says whether the end token or a stop string came.
    """

    prompt: int
    ids: torch.Tensor
    logprob: torch.Tensor
    hidden: torch.Tensor | None
    finished: bool
    text: str


@dataclass
class _Layer:
    norm1: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor
    out: torch.Tensor
    norm2: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


class _Tower:
    """The text tower's weights in the layout of decoding; a snapshot, taken while they are whole."""

    def __init__(self, model: CatalyticMLLM, dtype: torch.dtype) -> None:
        def cast(*tensors: torch.Tensor) -> torch.Tensor:
            return torch.cat([t.detach() for t in tensors]).to(dtype)

        text = model.text
        c = text.config
        self.eps, self.heads, self.kv_heads = c.rms_norm_eps, c.num_attention_heads, c.num_key_value_heads
        self.dim = c.hidden_size // self.heads
        self.dtype = dtype
        # float16 cannot hold the residual stream (see models.half_precision)
        self.wide = torch.float32 if dtype == torch.float16 else dtype
        self.embedding = cast(text.embed_tokens.weight)
        self.norm, self.lm_head = cast(text.norm.weight), cast(model.llm.lm_head.weight)
        self.inv_freq = text.rotary_emb.inv_freq.detach().float()
        # which of frame, row and column turns a frequency
        sections = torch.tensor(text.rotary_emb.mrope_section)
        self.axis = torch.arange(3).repeat_interleave(sections).to(self.inv_freq.device)
        self.layers = [
            _Layer(
                cast(l.input_layernorm.weight),
                cast(*map(effective_weight, (l.self_attn.q_proj, l.self_attn.k_proj, l.self_attn.v_proj))),
                cast(l.self_attn.q_proj.bias, l.self_attn.k_proj.bias, l.self_attn.v_proj.bias),
                cast(effective_weight(l.self_attn.o_proj)),
                cast(l.post_attention_layernorm.weight),
                cast(effective_weight(l.mlp.gate_proj), effective_weight(l.mlp.up_proj)),
                cast(effective_weight(l.mlp.down_proj)),
            )
            for l in text.layers
        ]

    def rotary(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [..., dim] of positions [..., 1], or [...,
        dim/2] where frequencies have positions of their own."""
        angle = positions.float() * self.inv_freq
        angle = torch.cat([angle, angle], -1)
        return angle.cos().to(self.dtype), angle.sin().to(self.dtype)

    def qkv(
        self, layer: _Layer, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, linear: Linear = F.linear
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotated queries and keys, and values, of x [..., H]: [..., heads, dim] each."""
        h = self.normed(x, layer.norm1)
        parts = linear(h, layer.qkv, layer.qkv_bias).unflatten(-1, (-1, self.dim))
        turned, v = parts.split([self.heads + self.kv_heads, self.kv_heads], -2)
        first, second = turned.chunk(2, -1)
        turned = turned * cos[..., None, :] + torch.cat([-second, first], -1) * sin[..., None, :]
        q, k = turned.split([self.heads, self.kv_heads], -2)
        return q, k, v

    def rest(
        self, layer: _Layer, x: torch.Tensor, attended: torch.Tensor, linear: Linear = F.linear
    ) -> torch.Tensor:
        """What follows attention in a layer: output projection and MLP, with their residuals."""
        x = x.to(self.wide) + linear(attended, layer.out)
        gate, up = linear(self.normed(x, layer.norm2), layer.gate_up).chunk(2, -1)
        if self.wide == self.dtype:
            return x + linear(F.silu(gate) * up, layer.down)
        return x + linear(F.silu(gate) * (up * MLP_SCALE), layer.down).float() / MLP_SCALE

    def normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMS norm of the residual stream, rounded to the dtype of the products."""
        return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), self.eps).to(self.dtype)

    def prefill(
        self, x: torch.Tensor, mrope: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """Right-padded prompts x [B, T, H], positions mrope [3, B, T] where some show pictures: final hidden
        states [B, T, H], keys and values [B, kv, T, dim] a layer."""
        b, t, width = x.shape
        text = torch.arange(t, device=x.device)[:, None]
        cos, sin = self.rotary(text if mrope is None else mrope.movedim(0, -1)[..., self.axis])
        cache = []
        for layer in self.layers:
            q, k, v = (p.transpose(1, 2) for p in self.qkv(layer, x, cos, sin, product))
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = self.rest(layer, x, attended.transpose(1, 2).reshape(b, t, width), product)
            cache.append((k, v))
        return self.normed(x, self.norm), cache


class _Batch:
    """The rows being decoded, and the groups of rows that share a prompt.

    Rows of a group are adjacent. Per layer, `prompt` holds keys and values [G, kv, P, dim] a group and `own`
    those [R, kv, slots, dim] of sampled tokens a row; `bias` [R, P + slots] is 0 where a row may look and
    -inf elsewhere.
    """

    def __init__(self, tower: _Tower, prompt_slots: int) -> None:
        weight, kv, dim = tower.embedding, tower.kv_heads, tower.dim
        self.tower, self.prompt_slots = tower, prompt_slots
        index = torch.zeros(0, dtype=torch.int64, device=weight.device)
        self.row, self.group, self.steps = index, index, index  # id, group, tokens
        self.begin = index  # position of a row's first token: the prompt's length, but for pictures
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
    ) -> None:
        """Read prompts x [B, T, H] of these lengths [B], with positions mrope [3, B, T] where some show
        pictures; their rows get the ids first, first + 1, …"""
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
        self.steps = torch.cat([self.steps, torch.zeros_like(new)])
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

    def advance(self, token: torch.Tensor) -> None:
        """Append a token [R] to every row and compute its final hidden state."""
        tower, rows = self.tower, torch.arange(len(token), device=token.device)
        # Rows that ended and have not left yet go on in place: what they write is never read.
        at = torch.where(self.ended, 0, self.steps)
        used = int(at.max()) + 1
        if used > self.own[0][0].shape[2]:
            self.own = [
                (F.pad(k, (0, 0, 0, CACHE_STEP)), F.pad(v, (0, 0, 0, CACHE_STEP))) for k, v in self.own
            ]
            self.bias = F.pad(self.bias, (0, CACHE_STEP), value=-torch.inf)
        self.bias[rows, self.prompt_slots + at] = 0.0
        bias = self.bias[:, None, None, : self.prompt_slots + used]
        cos, sin = tower.rotary((self.begin + at)[:, None])
        x = F.embedding(token, tower.embedding)
        together = len(self.steps) > 0 and bool((at == used - 1).all())
        for layer, prompt, (keys, values) in zip(tower.layers, self.prompt, self.own):
            q, k, v = tower.qkv(layer, x, cos, sin)
            if together:
                keys[:, :, used - 1], values[:, :, used - 1] = k, v
            else:
                keys[rows, :, at], values[rows, :, at] = k, v
            attended = self._attend(q, prompt, keys[:, :, :used], values[:, :, :used], bias)
            x = tower.rest(layer, x, attended)
        self.hidden = tower.normed(x, tower.norm)
        self.steps = self.steps + 1

    def _attend(
        self,
        q: torch.Tensor,
        prompt: tuple[torch.Tensor, torch.Tensor],
        keys: torch.Tensor,
        values: torch.Tensor,
        bias: torch.Tensor,
    ) -> torch.Tensor:
        """Grouped-query attention of q [R, heads, dim] to the prompt
        of its group and to the row's own tokens.

        The query heads that share a key head, and the rows that share a prompt, become rows of one product.
        """
        kv, d, r = self.tower.kv_heads, self.tower.dim, len(q)
        q = q.reshape(r, kv, -1, d) * d**-0.5
        to_prompt = self._from_groups(self._by_group(q) @ prompt[0].transpose(2, 3))
        scores = torch.cat([to_prompt, q @ keys.transpose(2, 3)], -1) + bias
        weights = scores.float().softmax(-1).to(q.dtype)
        of_prompt, of_own = weights.split([self.prompt_slots, keys.shape[2]], -1)
        out = self._from_groups(self._by_group(of_prompt) @ prompt[1]) + of_own @ values
        return out.reshape(r, -1)

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


class RolloutEngine:
    """Samples answers with a snapshot of a model's weights.

    Make it where the parameters are whole (an unsharded model, or inside `train.sharding.unsharded`); a later
    change of the model does not reach it. At most `rows` answers are decoded at a time.
    """

    def __init__(
        self, model: CatalyticMLLM, collate: Collator, dtype: torch.dtype = torch.float32, rows: int = 256
    ) -> None:
        self.tower, self.collate, self.model, self.rows = _Tower(model, dtype), collate, model, rows
        self.seconds = {"prefill": 0.0, "decode": 0.0}  # spent so far

    @torch.no_grad()
    def generate(
        self,
        samples: Sequence[Sample],
        params: SamplingConfig,
        seed: Sequence[int],
        group_size: int = 1,
        keep_hidden: bool = False,
        patterns: Sequence[Pattern] | None = None,
        on_answer: Callable[[int, Rollout], None] | None = None,
    ) -> list[Rollout]:
        """`group_size` answers to each prompt, in order;
        a graph marker takes the vectors of its sample's structure.

        Every draw is a function of `seed`, the answer's number and the token's, so that equal arguments give
        equal answers whatever else is in the batch. `on_answer(i, rollout)` is called as soon as answer i has
        ended, while the others go on. With `patterns`, one a prompt, only tokens are drawn by which the
        answer can still fit its pattern.
        """
        prompts = [self.collate.prompt_ids(s) for s in samples]
        batch = _Batch(self.tower, max(map(len, prompts), default=0))
        answers = _Answers(self, len(samples) * group_size, group_size, params, keep_hidden, on_answer)
        mask = None
        if patterns is not None:
            grammar = grammar_of(self.collate.tokenizer, self.collate.end_id)
            mask = _Mask(grammar, [p for p in patterns for _ in range(group_size)])
        key, waiting = hash_seed(seed), 0  # `waiting`: the first prompt that has not entered
        while waiting < len(samples) or len(batch.row):
            began = time.perf_counter()
            room = (self.rows - len(batch.row)) // group_size
            # A quarter of the places at a time: reading a prompt alone would stop all the others for it.
            if waiting < len(samples) and (
                not len(batch.row) or room >= max(1, self.rows // group_size // 4)
            ):
                part = slice(waiting, min(len(samples), waiting + max(1, room)))
                batch.admit(waiting * group_size, *self._embed(prompts[part], samples[part]), group_size)
                waiting = part.stop
                self.seconds["prefill"] -= began - (began := time.perf_counter())
            token, logprob = self._draw(batch, params, key, mask)
            batch.ended |= answers.take(batch, token, logprob)
            if int(batch.ended.sum()) * 8 >= len(batch.row):  # moving the caches costs, idle rows cost too
                token = token[batch.leave()]
            if len(token):
                batch.advance(token)
            self.seconds["decode"] += time.perf_counter() - began
        return answers.done()

    def _draw(
        self, batch: _Batch, params: SamplingConfig, key: int, mask: _Mask | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The next token [R] of every row and its log-probability [R] under logits / T."""
        logits = F.linear(batch.hidden, self.tower.lm_head).float()
        if params.temperature != 1.0:
            logits /= params.temperature
        # Markers are places for vectors, not text: a sampled one would ask for a structure that is not there.
        markers = [self.collate.graph_id, self.collate.energy_id]
        if mask is None:
            banned = logits[:, markers].logsumexp(1)
            logits[:, markers] = -torch.inf
        else:
            whole = logits.logsumexp(1)
            logits = mask.apply(logits, batch)
        peak = logits.amax(1, keepdim=True)
        mass = (logits - peak).exp_()
        if mask is None:
            whole = torch.logaddexp(mass.sum(1).log() + peak[:, 0], banned)
        token = sample_nucleus(mass, params.top_p, uniforms(key, batch.row, batch.steps, 5))
        if mask is not None:
            mask.take(batch, token)
        return token, logits.gather(1, token[:, None])[:, 0] - whole

    def _embed(
        self, prompts: list[list[int]], samples: Sequence[Sample]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Right-padded prompt embeddings [B, T, H] with structures and pictures in place, the prompts'
        lengths [B], and their positions [3, B, T] if there are pictures. Padding holds what follows: nobody
        looks there."""
        batch = self.collate.join([Encoded(p, [], None, s.graph) for p, s in zip(prompts, samples)])
        batch = batch.to(self.tower.embedding.device)
        x = self.model.insert(F.embedding(batch.input_ids, self.tower.embedding), batch)
        column = torch.arange(batch.max_length, device=x.device)
        place = (batch.cu_seqlens[:-1, None] + column).clamp_max(len(x) - 1)
        mrope = None if batch.mrope is None else batch.mrope[:, place]
        return x[place], batch.cu_seqlens.diff().long(), mrope


class _Mask:
    """Where each answer stands in its pattern."""

    def __init__(self, grammar: Grammar, patterns: Sequence[Pattern]) -> None:
        self.grammar, self.patterns = grammar, patterns
        self.places = [p.start for p in patterns]

    def apply(self, logits: torch.Tensor, batch: _Batch) -> torch.Tensor:
        """Logits [R, V] with -inf at what would break a row's pattern."""
        rows = batch.row.tolist()
        allowed = [self.grammar.allowed(self.patterns[i], self.places[i]) for i in rows]
        columns = torch.cat(allowed).to(logits.device)
        lines = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(a) for a in allowed]))
        lines = lines.to(logits.device)
        return torch.full_like(logits, -torch.inf).index_put_((lines, columns), logits[lines, columns])

    def take(self, batch: _Batch, token: torch.Tensor) -> None:
        for i, ended, t in zip(batch.row.tolist(), batch.ended.tolist(), token.tolist()):
            if not ended and t != self.grammar.end_id:
                self.places[i] = self.grammar.after(self.patterns[i], self.places[i], t)


class _Answers:
    """What has been sampled so far, by answer; turns each into a `Rollout` when it ends."""

    def __init__(
        self,
        engine: RolloutEngine,
        n: int,
        group_size: int,
        params: SamplingConfig,
        keep_hidden: bool,
        on_answer: Callable[[int, Rollout], None] | None,
    ) -> None:
        self.collate, self.group_size, self.params, self.on_answer = (
            engine.collate,
            group_size,
            params,
            on_answer,
        )
        weight = engine.tower.embedding
        shape, device = (n, params.max_new_tokens), weight.device
        self.ids = torch.full(shape, -1, dtype=torch.int64, device=device)
        self.logprob = torch.zeros(shape, device=device)
        self.hidden = weight.new_zeros(*shape, weight.shape[1]) if keep_hidden else None
        self.rollouts: list[Rollout | None] = [None] * n

    def take(self, batch: _Batch, token: torch.Tensor, logprob: torch.Tensor) -> torch.Tensor:
        """Keep the tokens of the rows that go on; says which rows [R] end with them."""
        on = ~batch.ended
        row, at = batch.row[on], batch.steps[on]
        self.ids[row, at], self.logprob[row, at] = token[on], logprob[on]
        if self.hidden is not None:
            self.hidden[row, at] = batch.hidden[on]
        said_end = (token == self.collate.end_id) & on
        ends = said_end | ((batch.steps + 1 >= self.params.max_new_tokens) & on)
        if self.params.stop:
            ends |= self._stopped(batch, on)
        for i in batch.row[ends].tolist():
            self.rollouts[i] = rollout = self._rollout(i)
            if self.on_answer is not None:
                self.on_answer(i, rollout)
        return ends

    def _stopped(self, batch: _Batch, on: torch.Tensor) -> torch.Tensor:
        """Rows whose text has come to hold a stop string."""
        reach = max(map(len, self.params.stop))  # a token is at least a byte
        found = torch.zeros_like(on)
        for place in on.nonzero()[:, 0].tolist():
            row, end = int(batch.row[place]), int(batch.steps[place]) + 1
            tail = decode(self.collate.tokenizer, self.ids[row, max(0, end - 4 * reach) : end].tolist())
            found[place] = any(s in tail for s in self.params.stop)
        return found

    def _rollout(self, i: int) -> Rollout:
        length = int((self.ids[i] >= 0).sum())
        hidden = None if self.hidden is None else self.hidden[i, :length].clone()
        ids, logprob = self.ids[i, :length].cpu(), self.logprob[i, :length].cpu()
        return ended(self.collate, i // self.group_size, ids, logprob, hidden, self.params.stop)

    def done(self) -> list[Rollout]:
        return [r for r in self.rollouts if r is not None]


def ended(
    collate: Collator,
    prompt: int,
    ids: torch.Tensor,
    logprob: torch.Tensor,
    hidden: torch.Tensor | None,
    stop: Sequence[str],
) -> Rollout:
    """The answer of tokens ids [T] to the prompt of that number;
    its text ends before the first of the `stop` strings."""
    text = decode(collate.tokenizer, ids.tolist())
    stopped = [at for s in stop if (at := text.find(s)) >= 0]
    finished = bool(stopped) or bool(ids[-1] == collate.end_id)
    return Rollout(prompt, ids, logprob, hidden, finished, text[: min(stopped)] if stopped else text)
