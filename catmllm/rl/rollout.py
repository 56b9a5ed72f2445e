"""Sampling CIFs: a lean KV-cache loop over the weights of Qwen's text tower.

Each prompt is read once for all its samples, rows that have ended leave the batch, and per token only what decoding
needs is computed: no masks rebuilt, no position bookkeeping, one matrix product for q, k and v and one for the two
halves of the MLP. With text-only positions Qwen2.5-VL's three rotary sections coincide, so plain rotary embedding is
exact; a test holds the loop equal to transformers' own forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from catmllm.config import SamplingConfig
from catmllm.data.batches import Collator
from catmllm.data.prompts import Sample
from catmllm.data.tokenizer import decode
from catmllm.models.catalytic_mllm import CatalyticMLLM


@dataclass(frozen=True)
class Rollout:
    """One sampled answer.

    `prompt` indexes the prompts given; ids [T] are the sampled tokens, the end token included where it came;
    logprob [T] float32 are their log-probabilities under logits / T, before the top-p cut and the ban on markers; hidden [T, H] the final
    hidden states that they were sampled from (None unless asked for); `finished` says whether the end token came.
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
        self.embedding = cast(text.embed_tokens.weight)
        self.norm, self.lm_head = cast(text.norm.weight), cast(model.llm.lm_head.weight)
        self.inv_freq = text.rotary_emb.inv_freq.detach().float()
        self.layers = [
            _Layer(
                cast(l.input_layernorm.weight),
                cast(l.self_attn.q_proj.weight, l.self_attn.k_proj.weight, l.self_attn.v_proj.weight),
                cast(l.self_attn.q_proj.bias, l.self_attn.k_proj.bias, l.self_attn.v_proj.bias),
                cast(l.self_attn.o_proj.weight),
                cast(l.post_attention_layernorm.weight),
                cast(l.mlp.gate_proj.weight, l.mlp.up_proj.weight),
                cast(l.mlp.down_proj.weight),
            )
            for l in text.layers
        ]

    def rotary(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [..., dim] of positions [...]."""
        angle = positions[..., None].float() * self.inv_freq
        angle = torch.cat([angle, angle], -1)
        return angle.cos().to(self.dtype), angle.sin().to(self.dtype)

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        cache: list[tuple[torch.Tensor, torch.Tensor]],
        at: int,
        bias: torch.Tensor,
    ) -> torch.Tensor:
        """Run x [B, S, H] at slots at..at+S of the caches [B, kv, slots, dim]; bias [B, 1, S, at+S] is added to scores.

        Returns the final normed hidden states [B, S, H].
        """
        b, s, _ = x.shape
        q_size, kv_size = self.heads * self.dim, self.kv_heads * self.dim
        cos, sin = cos[:, None], sin[:, None]
        for layer, (keys, values) in zip(self.layers, cache):
            h = F.rms_norm(x, x.shape[-1:], layer.norm1, self.eps)
            q, k, v = F.linear(h, layer.qkv, layer.qkv_bias).split([q_size, kv_size, kv_size], -1)
            q = _rotate(q.view(b, s, self.heads, self.dim).transpose(1, 2), cos, sin)
            k = _rotate(k.view(b, s, self.kv_heads, self.dim).transpose(1, 2), cos, sin)
            keys[:, :, at : at + s] = k
            values[:, :, at : at + s] = v.view(b, s, self.kv_heads, self.dim).transpose(1, 2)
            attended = self._attend(q, keys[:, :, : at + s], values[:, :, : at + s], bias)
            x = x + F.linear(attended, layer.out)
            h = F.rms_norm(x, x.shape[-1:], layer.norm2, self.eps)
            gate, up = F.linear(h, layer.gate_up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, layer.down)
        return F.rms_norm(x, x.shape[-1:], self.norm, self.eps)

    def _attend(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        """Grouped-query attention; the query heads that share a key head become rows of one product."""
        b, _, s, d = q.shape
        group = self.heads // self.kv_heads
        q = q.reshape(b, self.kv_heads, group * s, d)
        scores = (q @ keys.transpose(2, 3)) * d**-0.5
        scores = scores.view(b, self.kv_heads, group, s, -1) + bias[:, :, None]
        weights = scores.float().softmax(-1).to(self.dtype).view(b, self.kv_heads, group * s, -1)
        out = (weights @ values).view(b, self.heads, s, d)
        return out.transpose(1, 2).reshape(b, s, self.heads * d)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class RolloutEngine:
    """Samples answers with a snapshot of a model's weights.

    Make it where the parameters are whole (an unsharded model, or inside `trainer.distributed.unsharded`); a later
    change of the model does not reach it.
    """

    def __init__(
        self, model: CatalyticMLLM, collate: Collator, dtype: torch.dtype = torch.float32, rows: int = 256
    ) -> None:
        self.tower, self.collate, self.model, self.rows = _Tower(model, dtype), collate, model, rows

    @torch.no_grad()
    def generate(
        self,
        samples: Sequence[Sample],
        params: SamplingConfig,
        seed: Sequence[int],
        group_size: int = 1,
        keep_hidden: bool = False,
    ) -> list[Rollout]:
        """`group_size` answers to each prompt, in order; a graph marker takes the vectors of its sample's structure.

        Every draw comes from generators seeded by `seed`, so that equal arguments give equal answers.
        """
        if not samples:
            return []
        per_pass = max(1, self.rows // group_size)
        out: list[Rollout] = []
        for start in range(0, len(samples), per_pass):
            generator = torch.Generator(self.tower.embedding.device)
            generator.manual_seed(hash_seed([*seed, start]))
            part = samples[start : start + per_pass]
            out += self._pass(part, start, params, generator, group_size, keep_hidden)
        return out

    def _pass(
        self,
        samples: Sequence[Sample],
        first: int,
        params: SamplingConfig,
        generator: torch.Generator,
        group_size: int,
        keep_hidden: bool,
    ) -> list[Rollout]:
        tower = self.tower
        prompts = [self.collate.prompt_ids(s) for s in samples]
        x, pad = self._embed(prompts, samples)
        n, width, _ = x.shape
        slots = width + params.max_new_tokens
        device = x.device
        real = torch.arange(width, device=device) >= pad[:, None]
        positions = torch.arange(width, device=device) - pad[:, None]
        causal = torch.ones(width, width, dtype=torch.bool, device=device).tril()
        # A padding query sees itself alone, so that its softmax is defined.
        visible = (causal & real[:, None, :]) | torch.eye(width, dtype=torch.bool, device=device)
        bias = torch.zeros(n, 1, width, width, dtype=tower.dtype, device=device)
        bias.masked_fill_(~visible[:, None], -torch.inf)
        shape = (n, tower.kv_heads, width, tower.dim)
        prompt_cache = [(x.new_zeros(shape), x.new_zeros(shape)) for _ in tower.layers]
        hidden = tower.forward(x, *tower.rotary(positions.clamp_min(0)), prompt_cache, 0, bias)[:, -1]

        rows = torch.arange(n, device=device).repeat_interleave(group_size)
        cache = []
        for keys, values in prompt_cache:
            pair = []
            for prompt_part in (keys, values):
                wide = prompt_part.new_zeros(len(rows), tower.kv_heads, slots, tower.dim)
                wide[:, :, :width] = prompt_part[rows]
                pair.append(wide)
            cache.append((pair[0], pair[1]))
        row_bias = torch.zeros(len(rows), 1, 1, slots, dtype=tower.dtype, device=device)
        row_bias[..., :width].masked_fill_(~real[rows][:, None, None], -torch.inf)
        hidden, length = hidden[rows], (width - pad)[rows]
        alive = torch.arange(len(rows), device=device)  # the original row of each row still running
        ids = torch.full((len(rows), params.max_new_tokens), -1, dtype=torch.int64, device=device)
        logprob = torch.zeros(len(rows), params.max_new_tokens, device=device)
        states = (
            torch.zeros(len(rows), params.max_new_tokens, hidden.shape[1], dtype=tower.dtype, device=device)
            if keep_hidden
            else None
        )
        markers = torch.tensor([self.collate.graph_id, self.collate.energy_id], device=device)
        for t in range(params.max_new_tokens):
            logits = F.linear(hidden, tower.lm_head).float() / params.temperature
            # The draw is made for all original rows, so that a row's tokens do not depend on when others ended.
            noise = torch.rand(len(rows), generator=generator, device=device)[alive]
            # Markers are places for vectors, not text: a sampled one would ask for a structure that is not there.
            allowed = logits.index_fill(1, markers, -torch.inf)
            token = sample_top_p(allowed, params.top_p, noise)
            ids[alive, t] = token
            logprob[alive, t] = logits.gather(1, token[:, None]).squeeze(1) - logits.logsumexp(1)
            if states is not None:
                states[alive, t] = hidden
            running = token != self.collate.end_id
            if t + 1 == params.max_new_tokens or not bool(running.any()):
                break
            if int(running.sum()) < len(alive):
                keep = running.nonzero()[:, 0]
                alive, token = alive[keep], token[keep]
                row_bias, length = row_bias[keep], length[keep]
                cache = [(k[keep], v[keep]) for k, v in cache]
            cos, sin = tower.rotary((length + t)[:, None])
            x = F.embedding(token, tower.embedding)[:, None]
            at = width + t
            hidden = tower.forward(x, cos, sin, cache, at, row_bias[..., : at + 1])[:, 0]
        return self._collect(rows + first, ids, logprob, states)

    def _embed(
        self, prompts: list[list[int]], samples: Sequence[Sample]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Left-padded prompt embeddings [B, T, H] with structures in place, and the padding [B]."""
        device = self.tower.embedding.device
        width = max(len(p) for p in prompts)
        ids = torch.full((len(prompts), width), self.collate.pad_id, device=device)
        for row, p in enumerate(prompts):
            ids[row, width - len(p) :] = torch.tensor(p, device=device)
        x = F.embedding(ids, self.tower.embedding)
        graph = self.collate.graphs([s.graph for s in samples if s.graph is not None])
        x = self.model.insert_graphs(x, ids, None if graph is None else graph.to(device))
        return x, torch.tensor([width - len(p) for p in prompts], device=device)

    def _collect(
        self, prompt: torch.Tensor, ids: torch.Tensor, logprob: torch.Tensor, states: torch.Tensor | None
    ) -> list[Rollout]:
        out = []
        for row, length in enumerate((ids >= 0).sum(1).tolist()):
            tokens = ids[row, :length].cpu()
            finished = bool(tokens[-1] == self.collate.end_id)
            text = decode(self.collate.tokenizer, tokens.tolist())
            kept = None if states is None else states[row, :length].clone()
            out.append(Rollout(int(prompt[row]), tokens, logprob[row, :length].cpu(), kept, finished, text))
        return out


def sample_top_p(
    logits: torch.Tensor, top_p: float, noise: torch.Tensor, shortlist: int = 128
) -> torch.Tensor:
    """Draw one token a row from the smallest set of most likely tokens whose probability reaches top_p.

    logits [B, V] float32, noise [B] uniform in [0, 1): the draw is the inverse of the cumulative distribution at it.
    The `shortlist` most likely tokens mostly hold the set; where they do not, that row is sorted whole.
    """
    if top_p >= 1.0:
        cumulative = logits.softmax(-1).cumsum(-1)
        at = torch.searchsorted(cumulative, (noise[:, None] * cumulative[:, -1:]), right=True)
        return at.squeeze(1).clamp_max(logits.shape[1] - 1)
    total = logits.logsumexp(1, keepdim=True)
    top, token = logits.topk(min(shortlist, logits.shape[1]), dim=1)
    mass = (top - total).exp()
    out = _invert(mass, token, top_p, noise)
    short = (mass.sum(1) < top_p).nonzero()[:, 0]
    if len(short) and top.shape[1] < logits.shape[1]:
        top, token = logits[short].sort(1, descending=True)
        out[short] = _invert((top - total[short]).exp(), token, top_p, noise[short])
    return out


def _invert(mass: torch.Tensor, token: torch.Tensor, top_p: float, noise: torch.Tensor) -> torch.Tensor:
    """Tokens [B] of descending probabilities `mass` [B, K], cut to the smallest set that reaches top_p, at `noise`."""
    kept = mass * (mass.cumsum(1) - mass < top_p)
    cumulative = kept.cumsum(1)
    at = torch.searchsorted(cumulative, noise[:, None] * cumulative[:, -1:], right=True)
    last = (kept > 0).sum(1, keepdim=True) - 1
    return token.gather(1, torch.minimum(at, last)).squeeze(1)


def hash_seed(parts: Sequence[int]) -> int:
    """One 63-bit seed from several integers, well mixed."""
    import numpy as np

    # With their number in front: to NumPy [3] and [3, 0] are one seed.
    entropy = [len(parts), *(p & 0xFFFFFFFF for p in parts)]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)
