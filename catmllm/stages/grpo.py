"""Stage 2, GRPO on the PVCP reward and a real adsorbate (paper §6.4-6.6): the LLM learns to write CIFs that
hold together.

Each step samples K answers to every prompt, scores them, and takes the policy gradient of the group-relative
advantages with a KL term to the stage's starting point. A tenth of each batch replays property samples, so
that the energy head keeps up with the backbone that moves under it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from catmllm.data.batches import Batch
from catmllm.data.exchange import exchanged, other_metals
from catmllm.data.prompts import Sample, cif_prompt, design_prompt
from catmllm.data.splits import held_out
from catmllm.data.subsets import of_generation, of_property
from catmllm.design.reward import AnswerReward
from catmllm.models.attention import shares_prompts
from catmllm.models.catalytic_mllm import CatalyticMLLM, Chosen
from catmllm.models.lora import without_lora
from catmllm.sample.answers import Choices, Rollout, answer_limits
from catmllm.sample.engine import RolloutEngine
from catmllm.sample.grammar import answer_pattern
from catmllm.sample.packed import rollout_batch
from catmllm.sample.vllm_engine import VLLMEngine
from catmllm.sample.wire import prompts_of
from catmllm.seeds import Stream
from catmllm.stages.advantages import group_advantages, overlong, recipe
from catmllm.stages.own_reward import START, OwnReward
from catmllm.stages.policy import Correction, Pass, Read, add_policy, on_device, validation, vllm_of
from catmllm.stages.remote import Asked, Remote
from catmllm.stages.scoring import BATCH, Reward, Scored, Scoring, joined
from catmllm.stages.supervised import (
    VISUAL,
    as_written,
    chosen,
    closed_form,
    evenly,
    property_with_dropout,
    relatives,
    sample_losses,
    validation_systems,
    weigh_llm,
)
from catmllm.structure.system import System
from catmllm.train.setup import READS_GRAPHS
from catmllm.train.sharding import shard, unsharded
from catmllm.train.stage import Context, Metrics, MicroBatch, Plain, Step, Validation
from catmllm.train.stop import TrainingError
from catmllm.world import DTYPES

# prompts, their rollouts, per rollout its advantage and whether it carries a signal; what to log
Rolled = tuple[list[Sample], list[Rollout], np.ndarray, np.ndarray, Metrics]
# a prompt's place in the sequence of all, the system that it is about, and what it draws from
Pick = tuple[int, int, np.random.Generator]
# prompts, their answers and rewards, seconds of sampling by part
Round = tuple[list[Sample], list[Rollout], Scored, dict[str, float]]


class GRPO(Plain):
    """Prompts of the CIF and the design task in turn; encoder and projector stay frozen."""

    name = "grpo"
    samples = True

    def __init__(self, context: Context) -> None:
        self.context, self.config = context, context.config.grpo
        train, data = context.data["train"], context.config.data
        self.systems, self.known = of_generation(train, data), of_property(train, data)
        o = self.config
        self.reward: Reward = AnswerReward(o.reward, o.adsorbate_weight)
        self.own: OwnReward | None = None
        if o.reward_function:
            own = OwnReward(o.reward_function, o.reward_processes, o.reward_timeout, o.reward_memory)
            self.own, self.reward = own, lambda texts, asked: own(texts, [s.target for s in asked])
        if o.batch_tokens and not (shares_prompts(context.model.text) and context.config.data.packed):
            raise TrainingError(
                "`grpo.batch_tokens` counts a prompt once for all its answers, which needs "
                "`model.llm.attention: varlen` and `data.packed: true`"
            )
        self.loss_of = recipe(o)
        dapo = o.loss == "dapo"
        self.refill = o.refill if o.refill is not None else 2 * dapo
        self.overlong = o.overlong or ("soft" if dapo else "keep")
        kind = o.importance or ("token" if o.vllm is not None or o.staleness else "none")
        self.correction = None if kind == "none" else Correction(kind, o.importance_cap)
        # The stage's starting point, without its weights until `begin`; nobody asks it where beta is 0.
        # With adapters it is the model without them.
        alone = context.config.lora.r or not o.beta
        self.reference = None if alone else frozen_outline(context.model)
        self.kin = relatives(self.systems)
        self.held_out = held_out(context.data, context.config.data) if o.exchange else frozenset()
        self.energy_of = closed_form(context.model) if o.exchange else None
        self.skipped = self.unrewarded = 0
        self.rolled: Rolled | None = None
        self.shown: list[dict[str, Any]] = []  # of the newest answers, where the step is one to be shown
        self.vllm: VLLMEngine | None = None
        self.remote: Remote | None = None
        self.ahead: Asked | None = None  # answers for a later step
        self.updates = 0  # that made the weights of this moment
        self.behind = 0  # updates between the weights of this step and those that sampled its answers
        self.old: dict[int, torch.Tensor] = {}  # log-probabilities of the sampling policy, by pass

    def begin(self) -> None:
        if self.reference is not None:
            c = self.context
            shard(self.reference, c.config, c.world, self.config.reshard, like=c.model)
        self.vllm = vllm_of(self.context, self.config)
        if self.config.rollout == "service":
            self.remote = Remote(self.context, self.config)

    def end(self) -> None:
        if self.remote is not None:
            self.remote.close()
        if self.vllm is not None:
            self.vllm.close()
        if self.own is not None:
            self.own.close()

    def trains(self, parameter: str) -> bool:
        return parameter.startswith(("llm.", "energy_head.")) and not parameter.startswith(
            (VISUAL, *READS_GRAPHS)
        )

    def step(self, step: int) -> Step:
        """New rollouts every `updates_per_rollout` steps; the steps between go over the same ones again."""
        self.shown = []
        self.updates = step
        if self.whole(step) or self.rolled is None:
            self.rolled = self._roll(step)
        prompts, rollouts, advantages, informative, metrics = self.rolled
        logged = ("clipped", "entropy", "energy_mae", "mismatch", "mismatch_kl", "importance")
        work = Step([], metrics | dict.fromkeys((*logged, *(["kl"] if self.config.beta else [])), 0.0))
        self.add_policy(work, prompts, rollouts, advantages, informative)
        self.add_replay(work, step)
        work.table = self.shown
        self.updates = step + 1
        return work

    def _chosen(
        self, order: Stream, samples: Stream, count: int, step: int, n: int | None = None
    ) -> list[tuple[int, np.random.Generator]]:
        """This rank's systems of a step, of those asked for or of n, by two streams; see `chosen`."""
        world, seed = self.context.world, self.context.config.seed
        keys = order.key(seed), samples.key(seed)
        return chosen(n or len(self.systems), count, *keys, step, world.rank, world.size)

    def _roll(self, step: int) -> Rolled:
        c, o = self.context, self.config
        prompts, rollouts, scored, seconds = self._first_round(step)
        advantages, informative = self._advantages(rollouts, scored)
        for k in range(self.refill):
            missing = o.batch_size - int(informative.any(1).sum())
            if not c.world.maximum(missing):
                break
            if self.remote is not None:
                self.remote.publish(step)
            more = self._round(*self._further_picks(step, k, missing))
            rollouts += [replace(r, prompt=r.prompt + len(prompts)) for r in more[1]]
            prompts += more[0]
            scored = joined(scored, more[2])
            seconds = {name: value + more[3].get(name, 0.0) for name, value in seconds.items()}
            advantages, informative = self._advantages(rollouts, scored)
        self.skipped += int((~informative.any(1)).sum())
        self.old.clear()
        behind: Metrics = {}
        if self.remote is not None:
            self._ask_ahead(self.remote, step)
            seconds, behind = seconds | self.remote.seconds, {"staleness": float(self.behind)}
        metrics: Metrics = {f"reward_{k}": float(np.nanmean(v)) for k, v in scored.terms.items()}
        metrics |= {
            "reward": float(np.nanmean(scored.total)) if np.isfinite(scored.total).any() else float("nan"),
            "unrewarded": float(np.isnan(scored.total).mean()),
            "parse_failures": float(np.mean([r is not None for r in scored.reason])),
            "skipped_groups": float((~informative.any(1)).mean()),
            "tokens_per_answer": float(np.mean([len(r.ids) for r in rollouts])),
            "unfinished": float(np.mean([not r.finished for r in rollouts])),
            **{f"seconds_{k}": v for k, v in seconds.items()},
            "seconds_reward": scored.busy,  # beside decoding
            "seconds_wait": scored.waited,  # for the last rewards, after it
            **behind,
        }
        if "comp" in scored.terms:
            metrics["exact_composition"] = float(np.mean(scored.terms["comp"] >= 10.0))
        if "adsorbate" in scored.terms:
            metrics["adsorbates"] = float(np.mean(scored.terms["adsorbate"] > 0))
        self._report(step, prompts, rollouts, scored)
        if o.show_every and step % o.show_every == 0:
            self.shown = answer_table(prompts, rollouts, scored, advantages.reshape(-1))
        return prompts, rollouts, advantages.reshape(-1), informative.reshape(-1), metrics

    def _first_round(self, step: int) -> Round:
        """Prompts of a step with their answers: those that were asked for a rollout before, where there are
        any, else by the weights of this moment."""
        ahead, self.ahead = self.ahead, None
        if self.remote is None:
            return self._round(*self._picks(step))
        self.remote.seconds = dict.fromkeys(self.remote.seconds, 0.0)
        if ahead is None or ahead.step != step:
            self.remote.publish(step)
            self.behind = 0
            return self._round(*self._picks(step))
        self.behind = step - ahead.ask.version
        return ahead.samples, *self.remote.collect(ahead)

    def _ask_ahead(self, remote: Remote, step: int) -> None:
        """Have the next rollout sampled by the weights of this moment, while they are updated."""
        every = self.config.updates_per_rollout
        following = step - step % every + every
        if self.config.staleness and following < self.config.steps:
            remote.publish(step)
            self.ahead = remote.begin(self._asked(remote, following, *self._picks(following)))

    def _asked(self, remote: Remote, step: int, picks: list[Pick], seed: Sequence[int]) -> Asked:
        """The answers of a step's first round, which are yet to be asked for."""
        prompts, asked, designs = self._prompts(picks)
        group = self.config.group_size
        wanted = prompts_of(prompts, asked, designs, self._limits(asked))
        return remote.asked(step, prompts, wanted, seed, group, self._scoring(asked, group))

    def _picks(self, step: int) -> tuple[list[Pick], Sequence[int]]:
        """This rank's prompts of a step, in one sequence with those of all ranks and rollouts, and the seed
        of the answers."""
        c, o = self.context, self.config
        found = self._chosen(Stream.GRPO_ORDER, Stream.GRPO_PROMPTS, o.batch_size, step)
        first = (step // o.updates_per_rollout * c.world.size + c.world.rank) * o.batch_size
        seed = Stream.GRPO_ANSWERS.key(c.config.seed, step, c.world.rank)
        return [(first + k, i, rng) for k, (i, rng) in enumerate(found)], seed

    def _further_picks(self, step: int, k: int, count: int) -> tuple[list[Pick], Sequence[int]]:
        """The same of `count` prompts of a step's k-th further round."""
        c, o = self.context, self.config
        # Each round of each step has a part of the stream of its own, whatever it took before.
        at = step * self.refill + k
        found = self._chosen(Stream.GRPO_REFILL_ORDER, Stream.GRPO_REFILL_PROMPTS, o.batch_size, at)
        # One later in each rollout: however few are missing, over rollouts there are as many of each kind.
        first = step // o.updates_per_rollout + c.world.rank + k
        seed = Stream.GRPO_REFILL_ANSWERS.key(c.config.seed, step, c.world.rank, k)
        return [(first + j, i, rng) for j, (i, rng) in enumerate(found[:count])], seed

    def _prompts(self, picks: list[Pick]) -> tuple[list[Sample], list[System], list[bool]]:
        """Prompts, the systems that they are about, and which of them ask for designs."""
        made = [self.prompt(i, place, rng) for place, i, rng in picks]
        return [p for p, _ in made], [s for _, s in made], [for_design(place) for place, *_ in picks]

    def _round(self, picks: list[Pick], seed: Sequence[int]) -> Round:
        """Prompts for some systems, their answers with rewards, and the seconds of sampling by part."""
        prompts, asked, designs = self._prompts(picks)
        return prompts, *self._answers(prompts, asked, designs, seed, self.config.group_size)

    def _advantages(self, rollouts: list[Rollout], scored: Scored) -> tuple[np.ndarray, np.ndarray]:
        """Advantages and whether they carry a signal [groups, K]; what ran into its limit as `overlong`
        says: masked, it still counts in its group's mean."""
        o = self.config
        rewards = scored.total
        if self.overlong == "soft":
            lengths, limits = (np.array(x) for x in zip(*((len(r.ids), r.limit) for r in rollouts)))
            rewards = rewards + o.overlong_penalty * overlong(lengths, limits, o.overlong_tokens)
        shape = (-1, o.group_size)
        advantages, informative = group_advantages(rewards.reshape(shape), o.delta, o.loss != "dr_grpo")
        if self.overlong == "mask":
            informative &= np.array([r.finished for r in rollouts]).reshape(shape)
        return advantages, informative

    def _answers(
        self,
        prompts: list[Sample],
        asked: list[System],
        designs: list[bool],
        seed: Sequence[int],
        group_size: int,
    ) -> tuple[list[Rollout], Scored, dict[str, float]]:
        """Answers to prompts, of which some are for designs, that ask for these systems, and their rewards;
        the seconds of sampling by part."""
        c, o = self.context, self.config
        limits, scoring = self._limits(asked), self._scoring(asked, group_size)
        if self.remote is not None:
            wanted = prompts_of(prompts, asked, designs, limits)
            now = self.remote.asked(self.updates, prompts, wanted, seed, group_size, scoring)
            return self.remote.collect(self.remote.begin(now))
        patterns = None
        if o.sampling.grammar:
            patterns = [
                answer_pattern(s.identity, s.target, design, c.config.data, c.collate.templates)
                for s, design in zip(asked, designs)
            ]

        def take(i: int, r: Rollout) -> None:
            scoring.take(i, r.text)

        rollouts: list[Rollout] = []  # none on a rank that waits for others which sample again
        seconds: dict[str, float] = {}
        vectors: torch.Tensor | None = None
        with unsharded(c.model):
            if prompts and self.vllm is not None:
                seconds = self.vllm.seconds = dict.fromkeys(self.vllm.seconds, 0.0)
                self.vllm.update()
                vectors = self.vllm.vectors(prompts)
            elif prompts:
                engine = RolloutEngine(c.model, c.collate, DTYPES[c.config.precision])
                seconds = engine.seconds
                rollouts = engine.generate(
                    prompts, o.sampling, seed, group_size, patterns=patterns, on_answer=take, limits=limits
                )
        if prompts and self.vllm is not None:  # which needs the model's memory no more
            rollouts = self.vllm.generate(
                prompts, o.sampling, seed, group_size, False, patterns, take, limits, vectors
            )
        return rollouts, scoring.finish(), seconds

    def _limits(self, asked: list[System]) -> list[int]:
        named = [(s.identity, s.target) for s in asked]
        return answer_limits(self.context.collate, self.config.sampling, named)

    def _scoring(self, asked: list[System], group_size: int) -> Scoring:
        """What collects the rewards of `group_size` answers for each of these systems."""
        limit = self.config.reward_timeout
        # Processes of one's own reward keep to the limit by themselves.
        patience = limit if self.own is None else BATCH * (limit + START)
        return Scoring(self.reward, [s for s in asked for _ in range(group_size)], patience)

    def whole(self, step: int) -> bool:
        return step % self.config.updates_per_rollout == 0

    def finish(self) -> str:
        return weigh_llm(self.context, self.config.batch_size) if self.config.property_share else ""

    @property
    def validation(self) -> Validation | None:
        return validation(self.config, self.context.world, self._validation_rewards)

    def _validation_rewards(self) -> np.ndarray:
        """Of an answer to each of this rank's validation systems, CIF and design prompts in turn."""
        c = self.context
        if self.remote is not None:
            if self.ahead is not None:  # while the service still has the weights that they are asked of
                self.remote.collect(self.ahead)
            self.remote.publish(self.updates)
        systems = validation_systems(c, self.config)
        mine = range(c.world.rank, len(systems), c.world.size)
        asked, designs = [systems[k] for k in mine], [k % 2 == 1 for k in mine]
        prompts = [
            Sample(design_prompt(s.identity, s.known_energy) if design else cif_prompt(s.identity))
            for s, design in zip(asked, designs)
        ]
        seed = Stream.GRPO_VALIDATION.key(c.config.seed, c.world.rank)
        return self._answers(prompts, asked, designs, seed, 1)[1].total

    def prompt(self, i: int, place: int, rng: np.random.Generator) -> tuple[Sample, System]:
        """The prompt at a place: a CIF prompt and two design prompts in turn, of these a share with an
        exemplar, spread evenly; and what it is about: the i-th system, or a share `exchange` with other
        metals, at the closed form's energy."""
        o, design, names = self.config, for_design(place), {}
        if o.exchange and (self.energy_of or not design) and rng.random() < o.exchange:
            names = other_metals(self.systems[i], self.held_out, rng)

        def shown(j: int) -> System:
            s = self.systems[j]
            return exchanged(as_written(s, self.context.config.data), names) if names else s

        s = shown(i)
        if not design:
            return Sample(cif_prompt(s.identity)), s
        if names and self.energy_of:
            s = replace(s, energy=self.energy_of(s))
        if not (evenly(place - place // 3 - 1, o.exemplar_share) and self.kin[i]):
            return Sample(design_prompt(s.identity, s.known_energy)), s
        exemplar = as_written(shown(rng.choice(self.kin[i])), self.context.config.data)
        return Sample(design_prompt(s.identity, s.known_energy, exemplar=True), "", exemplar), s

    def add_policy(
        self,
        work: Step,
        prompts: list[Sample],
        rollouts: list[Rollout],
        advantages: np.ndarray,
        informative: np.ndarray,
    ) -> None:
        """Passes over the informative rollouts, prompt and answer through the whole model."""
        c, o = self.context, self.config
        shared = shares_prompts(c.model.text) and c.config.data.packed

        def prepare(some: list[Rollout], asked: Sequence[Sample]) -> Pass:
            batch = rollout_batch(c.collate, asked, some, shared).to(c.world.device)
            chosen = on_device(Choices.join(some), c.world.device)
            return Pass(partial(self._read, batch, chosen), batch.tokens, batch)

        add_policy(
            work,
            c.world,
            o,
            rollouts,
            advantages,
            informative,
            prepare,
            prompts,
            [len(c.collate.prompt_ids(p)) for p in prompts],
            self.loss_of,
            self.old,
            self.correction,
        )

    def _read(self, batch: Batch, chosen: Chosen | None) -> Read:
        model, t = self.context.model, self.config.sampling.temperature
        reference = None
        if self.config.beta:
            with torch.no_grad(), without_lora(model):
                reference = (self.reference or model)(CatalyticMLLM.answer, batch, t, False, chosen).logprob
        policy = model(CatalyticMLLM.answer, batch, t, True, chosen)
        return Read(policy.logprob, reference, policy.entropy)

    def add_replay(self, work: Step, step: int) -> None:
        """A pass over property samples, as many as `property_share` of the rollouts."""
        c, o = self.context, self.config
        count = round(o.property_share * o.batch_size * o.group_size)
        if not count:
            return
        drop_text = 0.1 if c.collate.shows_structures else 0.0
        samples = [
            property_with_dropout(
                self.known[i], rng, drop_text, 0.5, 0.0, frames=0.4, texts=c.config.instruct
            )
            for i, rng in self._chosen(
                Stream.REPLAY_ORDER, Stream.REPLAY_SAMPLES, count, step, len(self.known)
            )
        ]
        batch = c.collate(samples).to(c.world.device)

        def loss() -> torch.Tensor:
            ce, mae, labelled = sample_losses(c.model, batch)
            mean = mae.detach().sum() / labelled.sum()  # 0 without a label
            work.metrics["energy_mae"] = mean * c.model.energy_std
            return o.property_share * (ce + mae).mean()

        work.passes.append(MicroBatch(loss, batch.tokens, len(samples), batch))

    def _report(self, step: int, prompts: list[Sample], rollouts: list[Rollout], scored: Scored) -> None:
        """Answers for people to read: one a step in samples.jsonl,
        every one without a reward in unrewarded.jsonl."""
        c = self.context
        row = {"step": step, "prompt": prompts[0].prompt, "answer": rollouts[0].text}
        if c.world.main:
            with (c.folder / "samples.jsonl").open("a") as f:
                f.write(json.dumps(row | {"reward": float(scored.total[0])}) + "\n")
        if scored.problems:
            with (c.folder / f"unrewarded.{c.world.rank}.jsonl").open("a") as f:
                for i, problem in sorted(scored.problems.items()):
                    r = rollouts[i]
                    row = {"step": step, "prompt": prompts[r.prompt].prompt, "answer": r.text}
                    f.write(json.dumps(row | {"problem": problem}) + "\n")
        # Of all ranks together: one that stopped alone would leave the others waiting.
        rewarded = c.world.maximum(len(rollouts) - len(scored.problems))
        self.unrewarded = 0 if rewarded else self.unrewarded + 1
        if self.unrewarded == 3:
            raise TrainingError(
                f"grpo: no answer got a reward in the last 3 steps (to step {step}); the first of this step: "
                f"{scored.problems[0]}"
            )

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"skipped": self.skipped}
        if self.remote is not None and self.ahead is not None:
            self.remote.collect(self.ahead)
            state["ahead"] = self.ahead.kept()
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        self.skipped = state["skipped"]
        if self.remote is not None and (kept := state.get("ahead")) is not None:
            step = kept["step"]
            self.ahead = self.remote.resume(self._asked(self.remote, step, *self._picks(step)), kept)


def for_design(place: int) -> bool:
    """Whether the prompt at a place of the sequence of all prompts asks for a design."""
    return place % 3 > 0


def answer_table(
    prompts: Sequence[Sample], rollouts: Sequence[Rollout], scored: Scored, advantages: np.ndarray
) -> list[dict[str, Any]]:
    """A row an answer: prompt, answer, rewards by term, advantage; None where there is no number."""

    def number(value: float) -> float | None:
        return float(value) if np.isfinite(value) else None

    return [
        {"prompt": prompts[r.prompt].prompt, "answer": r.text, "finished": r.finished, "tokens": len(r.ids)}
        | {"reward": number(scored.total[i]), "advantage": number(advantages[i])}
        | {name: number(values[i]) for name, values in scored.terms.items()}
        for i, r in enumerate(rollouts)
    ]


def frozen_outline(model: CatalyticMLLM) -> CatalyticMLLM:
    """A model of the same make whose parameters have no storage yet: a copy would be the whole model on every
    rank. It has no image tower, since answers are asked for without pictures."""
    memo: dict[int, Any] = {
        id(p): torch.nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
        for p in model.parameters()
    }
    visual = model.visual  # held, so that nothing else gets its id
    memo[id(visual)] = torch.nn.Module()
    return copy.deepcopy(model, memo).eval()
