"""Sampling CIFs: a lean KV-cache loop over the weights of Qwen's text tower.

Per token only what decoding needs is computed: no position bookkeeping, no copies of a prompt's keys and
values (see `rows`), few products (see `tower`). A test holds the loop equal to transformers' own forward.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F

from catmllm.config import SamplingConfig
from catmllm.data.batches import Collator, Encoded
from catmllm.data.prompts import Sample
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.sample.answers import Answers, Rollout, limits_of
from catmllm.sample.grammar import Pattern, Walk, grammar_of
from catmllm.sample.graphs import Graphs
from catmllm.sample.nucleus import TRIES, sample_nucleus, steady_nucleus, uniforms
from catmllm.sample.rows import Rows, Runs
from catmllm.sample.tower import Tower
from catmllm.seeds import hash_seed
from catmllm_kernels.linear_logprob import Allowed, masked_logits

ROWS = 256  # answers that are decoded at a time, at most
LOOK = 16  # passes of a steady batch between two looks at which answers have ended


class Sampler(Protocol):
    """What samples answers: our own decoding, or vLLM. Arguments as `RolloutEngine.generate` has them."""

    seconds: dict[str, float]

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
    ) -> list[Rollout]: ...


class RolloutEngine:
    """Samples answers with a snapshot of a model's weights.

    Make it where the parameters are whole (an unsharded model, or inside `train.sharding.unsharded`); a later
    change of the model does not reach it. At most `rows` answers are decoded at a time.
    """

    def __init__(
        self,
        model: CatalyticMLLM,
        collate: Collator,
        dtype: torch.dtype = torch.float32,
        rows: int = ROWS,
        steady: bool | None = None,
    ) -> None:
        """`steady` (None: on a GPU): batches of few sizes, whose passes a GPU records and runs again, and one
        look in `LOOK` tokens at which answers have ended."""
        self.tower, self.collate, self.model, self.rows = Tower(model, dtype), collate, model, rows
        self.steady = self.tower.embedding.is_cuda if steady is None else steady
        # Markers are places for vectors, not text: a sampled one would ask for a structure that is not there.
        markers = [collate.graph_id, collate.energy_id]
        self.markers = torch.tensor(markers, device=self.tower.embedding.device)
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
        samples = [self.collate.shown(s) for s in samples]
        prompts = [self.collate.prompt_ids(s) for s in samples]
        n, weight = len(samples) * group_size, self.tower.embedding
        most = limits_of(params, len(samples), limits)
        each = [limit for limit in most for _ in range(group_size)]
        answers = Answers(self.collate, weight, n, group_size, params, each, keep_hidden, on_answer)
        begun, walk, longest = [0] * len(samples), None, max(most, default=1)
        if patterns is not None:
            grammar = grammar_of(self.collate.tokenizer, self.collate.end_id)
            walk = Walk(grammar, [p for p in patterns for _ in range(group_size)], longest)
            answers.begin(walk.begun)
            first = walk.begun[::group_size]
            prompts = [p + f for p, f in zip(prompts, first)]
            begun = [len(f) for f in first]
        places, widest = min(n, max(self.rows, group_size)), max(map(len, prompts), default=0)
        rows = Rows(self.tower, places, min(len(samples), places), widest, longest, n, self.steady)
        graphs = Graphs(weight.device, self.steady)
        key, waiting, passes = hash_seed(seed), 0, 0  # `waiting`: the first prompt that has not entered
        while waiting < len(samples) or rows.n:
            began = time.perf_counter()
            room = (self.rows - rows.n) // group_size
            # A quarter of the places at a time: reading a prompt alone would stop all the others for it.
            if waiting < len(samples) and (not rows.n or room >= max(1, self.rows // group_size // 4)):
                part = slice(waiting, min(len(samples), waiting + max(1, room)))
                x = self._embed(prompts[part], samples[part])
                rows.admit(waiting * group_size, *x, group_size, begun[part])
                waiting = part.stop
                self.seconds["prefill"] -= began - (began := time.perf_counter())
            passes += 1
            runs: Runs | None = None
            tokens: list[list[int]] = []
            if walk is None:
                graphs.run(rows.size, lambda: self._draw(rows, answers, params, key))
                if answers.due(rows, passes % LOOK == 0 if self.steady else True):
                    answers.look(rows)
            else:
                tokens, runs = self._choose(rows, answers, params, key, walk)
            if rows.crowded:
                stay = ~rows.gone
                rows.leave()
                if tokens and rows.n:
                    runs = rows.runs([t for t, stays in zip(tokens, stay.tolist()) if stays])
            if rows.n:
                rows.advance(runs)
            self.seconds["decode"] += time.perf_counter() - began
        return answers.done()

    def _draw(self, rows: Rows, answers: Answers, params: SamplingConfig, key: int) -> None:
        """The next token of every row, drawn and kept with its log-probability under logits / T."""
        logits = F.linear(rows.hidden, self.tower.lm_head).float()
        if params.temperature != 1.0:
            logits /= params.temperature
        banned = logits.index_select(1, self.markers).logsumexp(1)
        logits.index_fill_(1, self.markers, -torch.inf)
        peak = logits.amax(1, keepdim=True)
        mass = (logits - peak).exp_()
        whole = torch.logaddexp(mass.sum(1).log() + peak[:, 0], banned)
        rows.token.copy_(self._sample(mass, params, key, rows))
        logprob = logits.gather(1, rows.token[:, None])[:, 0] - whole
        answers.take(rows, None, logprob)

    def _choose(
        self, rows: Rows, answers: Answers, params: SamplingConfig, key: int, walk: Walk
    ) -> tuple[list[list[int]], Runs | None]:
        """Under a grammar: the next tokens of every answer, one that is drawn, with its log-probability among
        the tokens of its set, and what it forces. The one wait of a pass is for the tokens that are drawn:
        the next sets follow from them."""
        device = rows.hidden.device
        sets = [walk.allowed(i) for i in rows.answer.tolist()]
        idle = [walk.grammar.end] * (rows.size - rows.n)
        joined = Allowed.join(sets + idle)
        allowed = Allowed(*(x.to(device, non_blocking=True) for x in joined))
        logprob = masked_logits(rows.hidden, self.tower.lm_head, allowed, params.temperature).log_softmax(1)
        drawn = self._sample(logprob.exp(), params, key, rows)
        tokens = [
            [t] if over else walk.take(i, t)
            for i, t, over in zip(rows.answer.tolist(), allowed.columns[drawn].tolist(), rows.gone.tolist())
        ]
        answers.choose(rows, sets)
        runs = rows.runs(tokens)
        answers.take(rows, runs, logprob.gather(1, drawn[:, None])[:, 0])
        answers.end(rows, tokens)
        return tokens, runs

    def _sample(self, mass: torch.Tensor, params: SamplingConfig, key: int, rows: Rows) -> torch.Tensor:
        if self.steady:
            return steady_nucleus(mass, params.top_p, uniforms(key, rows.row, rows.steps, TRIES))
        return sample_nucleus(mass, params.top_p, uniforms(key, rows.row, rows.steps, 5))

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
