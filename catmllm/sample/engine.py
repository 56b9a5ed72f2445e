"""Sampling CIFs: a lean KV-cache loop over the weights of Qwen's text tower.

Per token only what decoding needs is computed: no position bookkeeping, no copies of a prompt's keys and
values (see `rows`), few products (see `tower`). A test holds the loop equal to transformers' own forward.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import chain

import torch
import torch.nn.functional as F

from catmllm.config import SamplingConfig
from catmllm.data.batches import Collator, Encoded
from catmllm.data.prompts import Sample
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.sample.answers import Answers, Rollout, limits_of
from catmllm.sample.grammar import Pattern, Walk, grammar_of
from catmllm.sample.nucleus import sample_nucleus, uniforms
from catmllm.sample.rows import Rows
from catmllm.sample.tower import Tower
from catmllm.seeds import hash_seed
from catmllm_kernels.linear_logprob import Allowed, masked_logits


class RolloutEngine:
    """Samples answers with a snapshot of a model's weights.

    Make it where the parameters are whole (an unsharded model, or inside `train.sharding.unsharded`); a later
    change of the model does not reach it. At most `rows` answers are decoded at a time.
    """

    def __init__(
        self, model: CatalyticMLLM, collate: Collator, dtype: torch.dtype = torch.float32, rows: int = 256
    ) -> None:
        self.tower, self.collate, self.model, self.rows = Tower(model, dtype), collate, model, rows
        self.seconds = {"prefill": 0.0, "decode": 0.0}  # spent so far

    def renew_head(self) -> None:
        """Read the model's LM head anew: where it alone trains, all else of the snapshot is as it was."""
        self.tower.lm_head = self.model.llm.lm_head.weight.detach().to(self.tower.dtype, copy=True)

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
        limits: Sequence[int] | None = None,
    ) -> list[Rollout]:
        """`group_size` answers to each prompt, in order, of at most `limits` tokens, one a prompt (None:
        `max_new_tokens`); a graph marker takes the vectors of its sample's structure.

        Every draw is a function of `seed`, the answer's number and the token's, so that equal arguments give
        equal answers whatever else is decoded with them. `on_answer(i, rollout)` is called as soon as answer
        i has ended, while the others go on. With `patterns`, one a prompt, a token
        is drawn among those by which the answer can still fit its pattern, and what it forces follows in the
        same pass.
        """
        prompts = [self.collate.prompt_ids(s) for s in samples]
        n, weight = len(samples) * group_size, self.tower.embedding
        most = limits_of(params, len(samples), limits)
        each = [limit for limit in most for _ in range(group_size)]
        answers = Answers(self.collate, weight, n, group_size, params, each, keep_hidden, on_answer)
        begun, walk = [0] * len(samples), None
        if patterns is not None:
            grammar = grammar_of(self.collate.tokenizer, self.collate.end_id)
            longest = max(most, default=1)
            walk = Walk(grammar, [p for p in patterns for _ in range(group_size)], longest)
            answers.begin(walk.begun)
            first = walk.begun[::group_size]
            prompts = [p + f for p, f in zip(prompts, first)]
            begun = [len(f) for f in first]
        rows = Rows(self.tower, max(map(len, prompts), default=0))
        key, waiting = hash_seed(seed), 0  # `waiting`: the first prompt that has not entered
        while waiting < len(samples) or len(rows.row):
            began = time.perf_counter()
            room = (self.rows - len(rows.row)) // group_size
            # A quarter of the places at a time: reading a prompt alone would stop all the others for it.
            if waiting < len(samples) and (not len(rows.row) or room >= max(1, self.rows // group_size // 4)):
                part = slice(waiting, min(len(samples), waiting + max(1, room)))
                known = torch.tensor(begun[part], device=weight.device)
                x = self._embed(prompts[part], samples[part])
                rows.admit(waiting * group_size, *x, group_size, known)
                waiting = part.stop
                self.seconds["prefill"] -= began - (began := time.perf_counter())
            if walk is None:
                token, logprob = self._draw(rows, params, key)
                count, sets = torch.ones_like(token), None
            else:
                token, count, logprob, sets = self._choose(rows, params, key, walk)
            rows.ended |= answers.take(rows, token, count, logprob, sets)
            if int(rows.ended.sum()) * 8 >= len(rows.row):  # moving the caches costs, idle rows cost too
                stays = (~rows.ended).repeat_interleave(count)
                token, count = token[stays], count[rows.leave()]
            if len(token):
                rows.advance(token, count)
            self.seconds["decode"] += time.perf_counter() - began
        return answers.done()

    def _draw(self, rows: Rows, params: SamplingConfig, key: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The next token [R] of every row and its log-probability [R] under logits / T."""
        logits = F.linear(rows.hidden, self.tower.lm_head).float()
        if params.temperature != 1.0:
            logits /= params.temperature
        # Markers are places for vectors, not text: a sampled one would ask for a structure that is not there.
        markers = [self.collate.graph_id, self.collate.energy_id]
        banned = logits[:, markers].logsumexp(1)
        logits[:, markers] = -torch.inf
        peak = logits.amax(1, keepdim=True)
        mass = (logits - peak).exp_()
        whole = torch.logaddexp(mass.sum(1).log() + peak[:, 0], banned)
        token = sample_nucleus(mass, params.top_p, uniforms(key, rows.row, rows.steps, 5))
        return token, logits.gather(1, token[:, None])[:, 0] - whole

    def _choose(
        self, rows: Rows, params: SamplingConfig, key: int, walk: Walk
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Under a grammar: the next tokens [N] of every row, `count` [R] of each: one that is drawn, with its
        log-probability [R] among the tokens of its set, and what it forces. The sets [R]."""
        row = rows.row.tolist()
        sets = [walk.allowed(i) for i in row]
        allowed = Allowed.join(sets).to(rows.hidden.device)
        logprob = masked_logits(rows.hidden, self.tower.lm_head, allowed, params.temperature).log_softmax(1)
        drawn = sample_nucleus(logprob.exp(), params.top_p, uniforms(key, rows.row, rows.steps, 5))
        runs = [
            [t] if over else walk.take(i, t)
            for i, t, over in zip(row, allowed.columns[drawn].tolist(), rows.ended.tolist())
        ]
        device = rows.hidden.device
        token = torch.tensor(list(chain.from_iterable(runs)), device=device)
        count = torch.tensor([len(run) for run in runs], device=device)
        return token, count, logprob.gather(1, drawn[:, None])[:, 0], sets

    def _embed(
        self, prompts: list[list[int]], samples: Sequence[Sample]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Right-padded prompt embeddings [B, T, H] with structures and pictures in place, the prompts'
        lengths [B], and their positions [3, B, T] if there are pictures. Padding holds what follows: nobody
        looks there."""
        batch = self.collate.join([Encoded(p, [], None, s.graph) for p, s in zip(prompts, samples)])
        batch = batch.to(self.tower.embedding.device)
        x = self.model.insert(
            F.embedding(batch.input_ids, self.tower.embedding), batch, self.model.vectors(batch)
        )
        column = torch.arange(batch.max_length, device=x.device)
        place = (batch.cu_seqlens[:-1, None] + column).clamp_max(len(x) - 1)
        mrope = None if batch.mrope is None else batch.mrope[:, place]
        return x[place], batch.cu_seqlens.diff().long(), mrope
