"""The RL stages in one process with a made-up reward: weights move, the right ones,
on the very tokens that were scored.

A model of a few steps writes nothing that parses, so that every group would be degenerate;
the reward here counts tokens instead.
"""

import dataclasses
import gc
import itertools
import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.scale import Echo
from catmllm.data.slabs import pair
from catmllm.design import search
from catmllm.design.exemplar_pool import Candidate
from catmllm.design.search import ClosedLoop
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.sample.answers import Rollout
from catmllm.stages import ga_grpo
from catmllm.stages.ga_grpo import GAGRPO
from catmllm.stages.grpo import GRPO
from catmllm.stages.scoring import Scored
from catmllm.stages.supervised import standardise
from catmllm.structure.cif import write_cif
from catmllm.train.loop import train
from catmllm.train.metrics import read_log
from catmllm.train.sharding import shard, whole
from catmllm.train.stage import Context
from catmllm.train.stop import Stopped, TrainingError
from catmllm.world import World
from tests.contexts import MakeContext, small


class TokenReward:
    """Stands where PVCP stands: the share of `e` in the text."""

    def score(self, texts, targets):
        total = np.array([t.count("e") / (len(t) + 1) + 1e-3 * i for i, t in enumerate(texts)])
        parts = dict.fromkeys(("total", "comp", "parse", "valid", "phys"), total)
        return type("Scores", (), {**parts, "reason": [None] * len(texts)})()


def token_rewarded(context: Context) -> GRPO:
    """GRPO by `TokenReward`."""
    stage = GRPO(context)
    stage.reward = TokenReward().score
    return stage


def counting_judge(systems):
    """The same share in the place of a candidate's reward; every candidate is one of some systems."""
    texts = [write_cif(s) for s in systems[:4]]

    def judge(self, tasks, answers, iteration):
        rewards = [a.count("e") / (len(a) + 1) + 1e-3 * i for i, a in enumerate(answers)]
        found = [
            Candidate(texts[i % 4], r, -1.0, 5.0, None, True, f"{iteration}-{i}", iteration)
            for i, r in enumerate(rewards)
        ]
        return found, type("Scores", (), {"total": np.array(rewards)})()

    return judge


@pytest.mark.parametrize(("precision", "replay"), [("fp32", 0.0), ("bf16", 0.5)])
def test_grpo_moves_the_llm_and_nothing_frozen(
    make_context: MakeContext, precision: str, replay: float
) -> None:
    config = small()
    config.precision, config.grpo.property_share = precision, replay  # type: ignore[assignment]
    context = make_context(config)
    context.data["val"] = []  # read-outs keep what they learn, helpful or not
    before = {k: v.clone() for k, v in context.model.state_dict().items()}
    seen = []

    def make(c: Context) -> GRPO:
        stage = GRPO(c)
        stage.reward = TokenReward().score
        roll = stage._roll

        def spy(step):
            seen.append(roll(step))
            return seen[-1]

        stage._roll = spy  # type: ignore[method-assign]
        return stage

    state, _ = train(make, context)
    moved = {k for k in state if not torch.equal(state[k], before[k])}
    assert "llm.lm_head.weight" in moved
    assert any(k.startswith("llm.model.language_model.layers.1.") for k in moved)
    assert not [k for k in moved if k.startswith(("encoder.", "projector.", "llm.model.visual."))]
    assert ("energy_head.correction.weight" in moved) == (replay > 0)
    assert len(seen) == 2


def test_scored_tokens_are_the_sampled_tokens(context: Context) -> None:
    from catmllm.data.tokenizer import decode
    from catmllm.sample.packed import rollout_batch

    stage = GRPO(context)
    texts: list[str] = []

    class Spy(TokenReward):
        def score(self, got, targets):
            texts.extend(got)
            return super().score(got, targets)

    stage.reward = Spy().score
    for p in context.model.parameters():
        p.requires_grad_(True)
    shard(context.model, context.config, context.world)
    prompts, rollouts, _, _, _ = stage._roll(0)
    batch = rollout_batch(context.collate, prompts, rollouts)
    assert sorted(texts) == sorted(r.text for r in rollouts)  # scored as they end
    for row, rollout in enumerate(rollouts):
        trained = batch.targets[batch.answer_sample == row]
        assert torch.equal(trained, rollout.ids)
        assert decode(context.collate.tokenizer, trained.tolist()) == rollout.text
    out = context.model(CatalyticMLLM.answer, batch)
    expected = torch.cat([r.logprob for r in rollouts])
    torch.testing.assert_close(out.logprob.detach(), expected, atol=2e-4, rtol=1e-4)


def test_ga_grpo_moves_the_head_alone(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ClosedLoop, "judge", counting_judge(context.data["train"]))
    before = {k: v.clone() for k, v in context.model.state_dict().items()}
    state, _ = train(GAGRPO, context)
    moved = {k for k in state if not torch.equal(state[k], before[k])}
    assert moved == {"llm.lm_head.weight"}
    rows = read_log(context.folder / "tasks.jsonl")
    assert len(rows) == 3 and all(len(row["trace"]) == 3 and row["step"] == 1 for row in rows)


def test_ga_grpo_searches_by_another_models_energies(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = (context.model, context.collate)
    asked: list[object] = []
    monkeypatch.setattr(ga_grpo, "predictor_of", lambda config, device: asked.append(config) or other)
    stage = GAGRPO(context)
    assert not asked  # a plan makes the stage where no such model is
    stage.begin()
    stage.step(0)
    stage.step(1)
    assert stage.loop.predictor is other and len(asked) == 1


@pytest.mark.parametrize(("batch", "ranks", "updates"), [(1, 1, 3), (2, 2, 1), (4, 1, 2), (3, 3, 1)])
def test_kinds_of_prompts_are_a_third_and_two_thirds(
    context: Context, batch: int, ranks: int, updates: int
) -> None:
    """Of all ranks and rollouts, in the first round and in further ones that ask for a single prompt."""
    o = context.config.grpo
    o.checkpoint_every = updates
    o.batch_size, o.updates_per_rollout, o.refill, o.exemplar_share = batch, updates, 3, 0.0
    kinds: dict[str, list[bool]] = {"first": [], **{f"further {k}": [] for k in range(3)}}
    for rank in range(ranks):
        context.world = World(rank, ranks, context.world.device)
        stage = GRPO(context)
        for step in range(0, 12 * updates, updates):
            for name, (picks, _) in zip(
                kinds, (stage._picks(step), *(stage._further_picks(step, k, 1) for k in range(3)))
            ):
                prompts, _, designs = stage._prompts(picks)
                assert designs == ["eV" in p.prompt for p in prompts]
                kinds[name] += designs
    assert len(kinds["first"]) == 12 * batch * ranks and len(kinds["further 0"]) == 12 * ranks
    assert all(3 * sum(found) == 2 * len(found) for found in kinds.values())


def test_prompts_show_exemplars_by_their_share(context: Context) -> None:
    """By default the third of every three, where there is one."""
    stage = GRPO(context)
    i = next(i for i, kin in enumerate(stage.kin) if kin)
    for share, shown in ((0.5, {2}), (0.0, set()), (1.0, {1, 2})):
        stage.config.exemplar_share = share
        prompts = [stage.prompt(i, k, np.random.default_rng(k))[0] for k in range(24)]
        assert {k % 3 for k, p in enumerate(prompts) if p.graph is not None} == shown
        assert all((p.graph is not None) == (k % 3 in shown) for k, p in enumerate(prompts))


def test_a_share_of_the_prompts_is_about_other_metals(context: Context) -> None:
    """None that validation or test has; an exemplar has the same metals; energies are the closed form's."""
    context.config.grpo.exchange, context.config.grpo.exemplar_share = 0.5, 1.0
    without = GRPO(context)
    assert without.energy_of is None  # this model has no closed form
    standardise(context)
    stage = GRPO(context)
    held_out = {pair(s) for name in ("val", "test") for s in context.data[name]}
    i = next(i for i, kin in enumerate(stage.kin) if kin)
    mine = stage.systems[i].identity
    about: list[list[str]] = [[], []]
    for k in range(150):
        rngs = [np.random.default_rng(k) for _ in range(2)]
        prompt, s = stage.prompt(i, k, rngs[0])
        assert s.identity in prompt.prompt and pair(s) not in held_out
        assert (s.adsorbate, s.miller) == (stage.systems[i].adsorbate, stage.systems[i].miller)
        about[k % 3 > 0].append(s.identity)
        if prompt.graph is not None:
            assert prompt.graph.identity == s.identity
        if k % 3 and s.identity != mine:
            assert stage.energy_of is not None and s.known_energy == stage.energy_of(s)
            assert f"relaxed energy of {s.known_energy:.2f} eV" in prompt.prompt
        if k % 3:  # whose energy nobody knows
            assert without.prompt(i, k, rngs[1])[1] is stage.systems[i]
    for some in about:
        others = [identity for identity in some if identity != mine]
        assert 0.3 < len(others) / len(some) < 0.7 and len({*others}) > len(others) / 2


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_without_any_signal_changes_nothing(make_context: MakeContext, precision: str) -> None:
    class Flat(TokenReward):
        def score(self, texts, targets):
            scores = super().score(texts, targets)
            scores.total = scores.comp = np.zeros(len(texts))
            return scores

    def make(c: Context) -> GRPO:
        stage = GRPO(c)
        stage.reward = Flat().score
        return stage

    config = small()
    config.precision = precision  # type: ignore[assignment]
    context = make_context(config)
    before = {k: v.clone() for k, v in context.model.state_dict().items()}
    state, stage = train(make, context)
    assert all(torch.equal(v, before[k]) for k, v in state.items())
    assert stage.state()["skipped"] == 2 * config.grpo.batch_size


@pytest.mark.parametrize("failure", ["raises", "nan", "stalls"])
def test_a_failing_reward_costs_its_answer_and_no_more(context: Context, failure: str) -> None:
    """Every third answer fails: the step goes on with the others, and the failures can be read."""
    context.config.grpo.reward_timeout = 0.5
    release = threading.Event()
    calls = itertools.count()

    def reward(texts, targets):
        if len(texts) > 1:
            raise RuntimeError("one at a time")
        if next(calls) % 3 == 0:
            if failure == "raises":
                raise KeyError("no such element")
            if failure == "stalls":
                release.wait(60)
            return [float("nan")]
        return [float(len(texts[0])) + 1e-3 * next(calls)]

    def make(c: Context) -> GRPO:
        stage = GRPO(c)
        stage.reward = reward
        return stage

    before = {k: v.clone() for k, v in context.model.state_dict().items()}
    state, _ = train(make, context)
    release.set()
    assert all(v.isfinite().all() for v in state.values() if v.is_floating_point())
    assert not torch.equal(state["llm.lm_head.weight"], before["llm.lm_head.weight"])
    rows = [json.loads(line) for line in (context.folder / "unrewarded.0.jsonl").read_text().splitlines()]
    wanted = {"raises": "KeyError", "nan": "nan", "stalls": "no reward within 0.5 s"}[failure]
    assert 2 <= len(rows) < 2 * 9 and all(wanted in row["problem"] for row in rows)
    assert all(row["prompt"] and "answer" in row for row in rows)
    log = [json.loads(line) for line in (context.folder / "log.jsonl").read_text().splitlines()]
    assert all(0 < row["unrewarded"] < 1 and np.isfinite(row["reward"]) for row in log)


def always_fails(texts, targets):
    raise ZeroDivisionError("always")


def without_rewards(context: Context) -> GRPO:
    stage = GRPO(context)
    stage.reward = always_fails
    return stage


def test_a_reward_that_never_works_stops_training_soon(context: Context) -> None:
    context.config.grpo.steps = 5
    with pytest.raises(
        TrainingError, match=r"no answer got a reward in the last 3 steps.*ZeroDivisionError: always"
    ):
        train(without_rewards, context)


def test_a_rank_without_rewards_goes_on_while_another_has_some(context: Context) -> None:
    """All ranks stop together or none does: whoever stopped alone would leave the others waiting for it."""

    class Two(World):
        def maximum(self, value: int) -> int:
            return max(value, 1)  # what the other rank brings

    context.world = Two(0, 1, context.world.device)
    context.config.grpo.steps = 4
    _, stage = train(without_rewards, context)
    assert stage.unrewarded == 0  # type: ignore[attr-defined]


def test_the_reference_is_the_starting_point_and_takes_no_memory_before(context: Context) -> None:
    before = {k: v.clone() for k, v in context.model.state_dict().items() if "visual" not in k}
    seen = []

    class Watched(GRPO):
        def begin(self) -> None:
            assert self.reference is not None
            seen.append({p.device.type for p in self.reference.parameters()})
            super().begin()

    context.config.grpo.lr = 1e-2
    context.config.grpo.property_share = 0.3
    state, stage = train(Watched, context)
    assert seen == [{"meta"}]
    reference = {k: whole(v) for k, v in stage.reference.state_dict().items()}  # type: ignore[attr-defined]
    assert reference.keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in reference.items())
    assert not torch.equal(state["llm.lm_head.weight"], before["llm.lm_head.weight"])
    for (name, a), (_, b) in zip(
        stage.reference.named_buffers(),  # type: ignore[attr-defined]
        ((n, b) for n, b in context.model.named_buffers() if "visual" not in n),
    ):
        assert torch.equal(a, b), name


def test_an_offloaded_reference_keeps_its_buffers_where_passes_read_them(context: Context) -> None:
    """By their memory, which is that of before: on a GPU the host's would be another."""
    context.config.cpu_offload = True
    reference = GRPO(context).reference
    assert reference is not None
    for p in context.model.parameters():
        p.requires_grad_(True)
    shard(context.model, context.config, context.world)

    def places() -> dict[str, int]:  # tables are filled anew on their own device
        return {n: b.data_ptr() for n, b in reference.named_buffers() if "tables" not in n}

    before = places()
    shard(reference, context.config, context.world, like=context.model)
    assert places() == before and "energy_mean" in before
    assert all(p.device.type == "cpu" for p in reference.parameters())


def test_token_level_normalisation_and_several_updates_a_rollout(context: Context) -> None:
    """The clip acts from the second update on, where the policy has moved from the one that sampled."""
    o = context.config.grpo
    o.normalise, o.updates_per_rollout, o.steps, o.clip, o.lr, o.checkpoint_every = (
        "token",
        2,
        4,
        1e-4,
        5e-3,
        2,
    )

    train(token_rewarded, context)
    log = [json.loads(line) for line in (context.folder / "log.jsonl").read_text().splitlines()]
    clipped, kl, entropy = ([row[k] for row in log] for k in ("clipped", "kl", "entropy"))
    assert clipped[0] == clipped[2] == 0.0 and min(clipped[1], clipped[3]) > 0.3
    assert abs(kl[0]) < 1e-6 < kl[1]  # policy and reference are equal before the first update
    assert all(0 < e < np.log(len(context.collate.tokenizer)) for e in entropy)


def rows_of(context: Context) -> list[dict[str, float]]:
    return [json.loads(line) for line in (context.folder / "log.jsonl").read_text().splitlines()]


def test_a_run_that_trains_no_energy_resumes(make_context: MakeContext) -> None:
    """Without validation and replay the energy head has had no gradient when the checkpoint is written, and
    the optimizer has nothing to say of it."""
    config = small()
    config.grpo.steps, config.grpo.checkpoint_every, config.grpo.lr = 3, 2, 1e-2
    steps: list[int] = []

    class Counted(GRPO):
        def __init__(self, context: Context) -> None:
            super().__init__(context)
            # of the text alone: which answers are scored together is a matter of time
            self.reward = lambda texts, asked: [len(t) + sum(map(ord, t)) % 97 / 97 for t in texts]

        def step(self, step: int):  # type: ignore[no-untyped-def]
            steps.append(step)
            return super().step(step)

    state, _ = train(Counted, make_context(config))
    again, _ = train(Counted, make_context(config))  # goes on from the checkpoint of the first
    assert steps == [0, 1, 2, 2]
    assert all(torch.equal(v, again[k]) for k, v in state.items())


def test_a_signal_between_two_updates_of_a_rollout_waits_for_the_last(make_context: MakeContext) -> None:
    """The run that goes on is the unbroken one; with other batches it begins with a rollout too."""
    steps: list[int] = []

    class Signalled(GRPO):
        at = -1

        def __init__(self, context: Context) -> None:
            super().__init__(context)
            self.reward = lambda texts, asked: [len(t) + sum(map(ord, t)) % 97 / 97 for t in texts]

        def step(self, step: int):  # type: ignore[no-untyped-def]
            steps.append(step)
            if step == self.at:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().step(step)

    def run(name: str, at: int = -1, batch: int = 3) -> list[float]:
        config = small()
        o = config.grpo
        o.steps, o.updates_per_rollout, o.checkpoint_every, o.batch_size, o.lr = 6, 2, 100, batch, 1e-2
        context = make_context(config)
        context.folder = context.folder / name
        context.folder.mkdir(exist_ok=True)
        train(type("At", (Signalled,), {"at": at}), context)
        return [row["loss"] for row in rows_of(context)]

    with pytest.raises(Stopped, match="saved after step 3"):
        run("cut", at=1)
    folder = make_context(small()).folder
    shutil.copytree(folder / "cut", folder / "other batches")
    assert run("cut") == run("whole")
    steps.clear()
    run("other batches", batch=4)
    assert steps == [4, 5]  # 12 prompts were asked: three batches and a rollout that nobody goes on with


def test_dapo_fills_the_batch_and_asks_no_reference_without_beta(context: Context) -> None:
    """Of the first round only the groups of the first prompt have a signal; later rounds bring the others."""
    o = context.config.grpo
    o.loss, o.beta, o.steps = "dapo", 0.0, 1
    seen: list[tuple] = []

    class Watched(GRPO):
        def _round(self, picks, seed):
            prompts, rollouts, scored, seconds = super()._round(picks, seed)
            first = not seen
            signal = np.arange(len(rollouts)) < (3 if first else 99)
            scored.total = np.where(signal, np.arange(len(rollouts)) % 3, 1.0).astype(float)
            seen.append((len(prompts), [p.prompt for p in prompts]))
            return prompts, rollouts, scored, seconds

    before = {k: v.clone() for k, v in context.model.state_dict().items()}
    state, stage = train(Watched, context)
    assert [n for n, _ in seen] == [3, 2]  # and no third round
    assert not set(seen[0][1]) & set(seen[1][1])
    assert stage.reference is None and stage.skipped == 2  # type: ignore[attr-defined]
    assert not torch.equal(state["llm.lm_head.weight"], before["llm.lm_head.weight"])
    (row,) = rows_of(context)
    assert "kl" not in row and row["skipped_groups"] == pytest.approx(2 / 5)
    assert row["mismatch"] < 1e-4 and row["mismatch_kl"] < 1e-6 and row["importance"] == pytest.approx(1.0)


@pytest.mark.parametrize("overlong", ["keep", "mask", "soft"])
def test_answers_cut_at_their_limit(context: Context, overlong: str) -> None:
    o = context.config.grpo
    o.overlong, o.overlong_tokens, o.overlong_penalty, o.loss = overlong, 4, 2.0, "dr_grpo"  # type: ignore[assignment]
    stage = GRPO(context)
    rollouts = [
        Rollout(0, torch.zeros(n, dtype=torch.int64), torch.zeros(n), None, done, "", limit=10)
        for n, done in ((10, False), (8, True), (3, True))
    ]
    scored = Scored(np.array([1.0, 2.0, 6.0]), {}, [None] * 3)
    advantages, informative = stage._advantages(rollouts, scored)
    rewards = np.array([1.0 - 2.0, 2.0 - 1.0, 6.0]) if overlong == "soft" else scored.total
    np.testing.assert_allclose(advantages[0], rewards - rewards.mean())  # not scaled: dr_grpo
    assert informative.tolist() == [[overlong != "mask", True, True]]


def test_a_sampler_that_is_not_the_policy_is_seen_and_weighed(context: Context) -> None:
    o = context.config.grpo
    o.importance, o.importance_cap, o.steps = "token", 1.5, 1

    class Off(GRPO):
        def _round(self, picks, seed):
            prompts, rollouts, scored, seconds = super()._round(picks, seed)
            scored.total = np.arange(len(rollouts), dtype=float)
            off = [dataclasses.replace(r, logprob=r.logprob - 1.0) for r in rollouts]
            return prompts, off, scored, seconds

    train(Off, context)
    (row,) = rows_of(context)
    assert row["mismatch"] == pytest.approx(1.0, abs=1e-3) and row["importance"] == pytest.approx(1.5)
    assert row["mismatch_kl"] == pytest.approx(np.e - 2, abs=1e-2)


def searching(context: Context, monkeypatch: pytest.MonkeyPatch, errors: list[float]) -> GAGRPO:
    """A stage whose candidates are off by these energies in turn, task by task."""
    text = write_cif(context.data["train"][0])

    def judge(self, tasks, answers, iteration):
        found = [
            Candidate(
                text, 1.0, t.energy + errors[i % len(errors)], 5.0, None, True, f"{t.identity}{i}", iteration
            )
            for i, t in enumerate(tasks)
        ]
        return found, type("Scores", (), {"total": np.ones(len(found))})()

    monkeypatch.setattr(ClosedLoop, "judge", judge)
    stage = GAGRPO(context)
    for p in context.model.parameters():
        p.requires_grad_(False)
    context.model.llm.lm_head.weight.requires_grad_(True)
    shard(context.model, context.config, context.world)
    stage.begin()
    return stage


def test_solved_tasks_leave_and_others_enter(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three places; every third task is solved at once, the others stay for all their iterations."""
    o = context.config.ga_grpo
    o.batch_size, o.initial, o.group_size, o.iterations, o.tasks = 3, 1, 1, 3, 4
    o.solved = 0.1
    stage = searching(context, monkeypatch, [0.05, 1.0, 1.0])
    assert stage.config.steps == 2 * 3  # 4 tasks are two times three places
    engine = None
    for step in range(4):
        stage.step(step)
        assert engine in (None, stage.engine)  # the same one, whose head alone is read anew
        engine = stage.engine
    rows = read_log(context.folder / "tasks.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 2, 2, 3] and stage.left == 6
    assert [len(row["trace"]) - 1 for row in rows] == [1, 1, 3, 3, 1, 1]
    assert stage.entered == 8 and len(stage.running) == 2
    asked = [(row["identity"], row["energy"]) for row in rows]
    assert len(set(asked)) == 6


def test_a_step_does_not_feel_the_tasks_that_have_left(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the calls of functions, Python's and C's, that the interpreter itself counts; the state of a
    checkpoint and what is remembered of structures are those of the tasks under way."""
    systems = list({s.identity: s for s in context.data["train"]}.values())[:4]
    context.data = {**context.data, "train": systems}
    o = context.config.ga_grpo
    o.batch_size, o.initial, o.group_size, o.iterations, o.tasks = 4, 2, 2, 1, 4
    monkeypatch.setattr(search, "energies_and_errors", lambda *a, **_: (np.zeros(len(a[2])),) * 2)
    stage = GAGRPO(context)
    monkeypatch.setattr(stage, "_engine", lambda: Echo(systems))
    monkeypatch.setattr(stage, "add_policy", lambda *a: None)

    def calls(step: int) -> int:
        n = 0

        def count(frame, event, argument):
            nonlocal n
            n += event in ("call", "c_call")

        gc.collect()
        gc.disable()  # what it calls back is no part of the step
        sys.setprofile(count)
        try:
            stage.step(step)
        finally:
            sys.setprofile(None)
            gc.enable()
        return n

    counted, sizes = [], []
    for step in range(24):  # each lets four tasks go and begins with the same four systems
        counted.append(calls(step))
        sizes.append((len(stage.loop._known), len(json.dumps(stage.state()))))
    assert stage.left == 96 and not stage.running
    assert max(counted[-5:]) <= 1.02 * max(counted[2:7]) and min(counted) > 1000  # a bond more or less
    assert sizes[-1][0] == sizes[2][0] and sizes[-1][1] <= sizes[2][1] + 2 * 3  # four counters' digits


def test_a_search_goes_on_on_other_numbers_of_ranks(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    o = context.config.ga_grpo
    o.batch_size, o.initial, o.group_size, o.iterations, o.tasks = 3, 1, 1, 4, 3
    stage = searching(context, monkeypatch, [1.0])
    for step in range(2):
        stage.step(step)
    state = json.loads(json.dumps(stage.state()))
    whole = [(t["task"]["identity"], t["pool"], t["trace"]) for t in state["tasks"]]
    path = context.folder / "tasks.jsonl"
    path.write_text('{"step": 9}\n')  # left after the checkpoint: it comes again

    def of(rank: int, size: int, batch: int) -> GAGRPO:
        context.config.ga_grpo.batch_size = batch
        context.world = World(rank, size, context.world.device)
        other = GAGRPO(context)
        other.load_state(state)
        return other

    two = [of(rank, 2, 3) for rank in range(2)]
    assert [len(s.running) for s in two] == [2, 1] and path.read_text() == ""
    few = of(0, 1, 2)
    assert len(few.running) == 2 and len(few.waiting) == 1
    for stages in (two, [few]):
        held = [s for one in stages for s in (*one.running, *one.waiting)]
        found = [(s.task.identity, [c.to_json() for c in s.pool.members], s.trace) for s in held]
        assert sorted(map(str, found)) == sorted(map(str, whole))
    few.running.pop()  # a place is free: who waits comes before a new task
    few._entering()
    assert len(few.running) == 2 and not few.waiting and few.entered == 3
    few.running.pop()
    (new,) = few._entering()
    assert few.entered == 4 and new.identity


@pytest.mark.parametrize(("ranks", "left"), [(8, 15), (16, 8), (4, 30)])
def test_the_steps_that_are_left_are_those_of_the_ranks(context: Context, ranks: int, left: int) -> None:
    """Sixteen tasks of ten iterations are 160 places; eight ranks have worked 40 of them in five steps."""
    o = context.config.ga_grpo
    o.batch_size, o.iterations, o.tasks = 1, 10, 16
    context.world = World(0, ranks, context.world.device)
    stage = GAGRPO(context)
    stage.load_state({"entered": 8, "left": 0, "done": 5, "worked": 40, "tasks": []})
    assert stage.config.steps == 5 + left


@pytest.mark.parametrize("batch", [1, 3, 6])
def test_a_search_ends_when_all_is_worked_whatever_the_ranks(
    make_context: MakeContext, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    """Three tasks of four iterations on three places; after the first, with other places."""
    config = small()
    o = config.ga_grpo
    o.tasks, o.iterations, o.batch_size, o.checkpoint_every, o.initial = 3, 4, 3, 1, 1
    context = make_context(config)
    monkeypatch.setattr(ClosedLoop, "judge", counting_judge(context.data["train"]))

    class Cut(GAGRPO):
        def step(self, step: int):  # type: ignore[no-untyped-def]
            if self.done == 1:
                raise Stopped("here")
            return super().step(step)

    with pytest.raises(Stopped):
        train(Cut, context)
    o.batch_size = batch
    _, stage = train(GAGRPO, make_context(config))
    assert stage.config.steps == len(rows_of(context)) == {1: 1 + 9, 3: 4, 6: 1 + 3 + 1}[batch]
    tasks = read_log(context.folder / "tasks.jsonl")
    assert sum(len(task["trace"]) - 1 == 4 for task in tasks) >= 3


def test_a_reward_of_ones_own_trains(context: Context, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "def score(texts, targets):\n    return [len(t) + sum(c.values()) for t, c in zip(texts, targets)]\n"
    )
    o = context.config.grpo
    o.reward_function, o.steps = f"{tmp_path / 'own.py'}:score", 1
    before = context.model.llm.lm_head.weight.detach().clone()
    state, stage = train(GRPO, context)
    (row,) = rows_of(context)
    assert row["reward"] > 10 and row["unrewarded"] == 0
    assert not torch.equal(state["llm.lm_head.weight"], before)
    assert stage.own.workers[0].process.returncode is not None  # type: ignore[attr-defined]


def test_a_table_of_answers_is_kept_every_other_step(context: Context) -> None:
    o = context.config.grpo
    o.show_every, o.steps = 2, 3

    train(token_rewarded, context)
    found = sorted((context.folder / "tables").iterdir())
    assert [p.name for p in found] == ["step-0000000.jsonl", "step-0000002.jsonl"]
    rows = [json.loads(line) for line in found[1].read_text().splitlines()]
    assert len(rows) == 9 and {"prompt", "answer", "reward", "advantage", "comp", "finished"} <= set(rows[0])
    groups = np.array([row["advantage"] for row in rows]).reshape(3, 3)
    np.testing.assert_allclose(groups.mean(1), 0.0, atol=1e-9)
    order = np.array([row["reward"] for row in rows]).reshape(3, 3).argsort(1)
    assert (order == groups.argsort(1)).all()
