"""The supervised stages in one process: precisions agree, both signs of MMTG run,
and what a step draws is a function."""

import json
import math
from typing import Any, Literal

import numpy as np
import pytest
import torch

from catmllm.config import Config, ConfigError, DataConfig, MixedConfig
from catmllm.data.batches import shuffled
from catmllm.data.prompts import Sample, jitter, property_sample
from catmllm.data.subsets import of_generation, of_property
from catmllm.models.losses import mmtg_loss
from catmllm.seeds import generator
from catmllm.stages.instruct import Instruct
from catmllm.stages.joint import Joint
from catmllm.stages.supervised import (
    Mixture,
    evenly,
    further_texts,
    property_with_dropout,
    relatives,
    sample_losses,
    task_sample,
)
from catmllm.structure.cif import write_cif
from catmllm.structure.descriptors import told
from catmllm.structure.text import three_part_text, two_part_text
from catmllm.train.loop import train
from catmllm.world import World
from tests.contexts import MakeContext, small


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_follows_float32(make_context: MakeContext, precision: str) -> None:
    losses = {}
    for p in ("fp32", precision):
        config = small()
        config.precision = p  # type: ignore[assignment]
        config.joint.steps, config.joint.lr = 4, 5e-4
        context = make_context(config)
        train(Joint, context)
        rows = [json.loads(line) for line in (context.folder / "log.jsonl").read_text().splitlines()]
        assert ("loss_scale" in rows[0]) == (p == "fp16")
        losses[p] = [r["loss"] for r in rows]
    assert all(math.isfinite(x) for x in losses[precision])
    np.testing.assert_allclose(losses[precision], losses["fp32"], rtol=0.03)


def test_minus_sign_of_mmtg_is_a_choice(make_context: MakeContext) -> None:
    config = small()
    config.joint.mmtg_sign = "-"
    state, _ = train(Joint, make_context(config))
    assert all(torch.isfinite(v).all() for v in state.values() if v.is_floating_point())


def test_a_bridge_trains_alone(make_context: MakeContext) -> None:
    """A frozen encoder and a frozen LLM: what changes is the projector and the energy head's part of both."""
    config = small()
    config.joint.train_encoder = config.joint.train_llm = False
    config.model.closed_form = False  # beside which the head's part may count by 0, as if it had not trained
    context = make_context(config)
    before = {name: p.detach().clone() for name, p in context.model.named_parameters()}
    after, _ = train(Joint, context)
    changed = {name for name, p in before.items() if not torch.equal(after[name], p)}
    assert {name.partition(".")[0] for name in changed} == {"projector", "energy_head"}
    assert not any(name.startswith("energy_head.graph.") for name in changed)
    assert {name for name in before if name.startswith("projector.")} <= changed


def test_instruct_may_come_first(make_context: MakeContext) -> None:
    """It then takes the scale of energies and the closed form of the training systems; else it keeps them."""
    context = make_context(small())
    train(Instruct, context)
    energies = [s.energy for s in context.data["train"]]
    assert float(context.model.energy_mean) == pytest.approx(float(np.mean(energies)), abs=1e-5)
    assert not bool((context.model.energy_head.deviation == 1).all())
    context.model.energy_mean.fill_(0.25)
    Instruct(context)
    assert float(context.model.energy_mean) == 0.25


def test_a_stage_draws_the_same_batches_again_and_goes_on_from_its_state(make_context: MakeContext) -> None:
    context = make_context(small())
    first = [Joint(context).batches(1)[0] for _ in range(2)]
    stage = Joint(context)
    unbroken = [stage.batches(1)[0] for _ in range(4)]
    for a, b in ((first[0], first[1]), (first[0], unbroken[0])):
        assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.graph.edge_vec, b.graph.edge_vec)
    assert unbroken[0].input_ids.shape != unbroken[1].input_ids.shape
    begun = Joint(context)
    begun.batches(2)
    resumed = Joint(context)
    resumed.load_state(json.loads(json.dumps(begun.state())))
    (batch,) = resumed.batches(1)
    assert torch.equal(batch.input_ids, unbroken[2].input_ids)
    assert torch.equal(batch.graph.edge_vec, unbroken[2].graph.edge_vec)


@pytest.mark.parametrize("layout", ["padded", "packed to a budget"])
def test_layouts_learn_the_same(make_context: MakeContext, layout: str) -> None:
    """The same samples a step, end to end and padded: the loss curve is one, to the rounding of sums in
    another order. Packs of a budget hold other samples a step: the curve differs, its course does not."""
    losses = {}
    for other in (False, True):
        config = small()
        config.joint.steps, config.joint.lr, config.joint.batch_size = 8, 5e-4, 8
        if other and layout == "padded":
            config.data.packed = False
        elif other:
            config.joint.batch_tokens, config.joint.accumulate = 512, 2
        context = make_context(config)
        context.folder = context.folder / f"{layout} {other}"
        context.folder.mkdir()
        train(Joint, context)
        rows = [json.loads(line) for line in (context.folder / "log.jsonl").read_text().splitlines()]
        losses[other] = [r["loss"] for r in rows]
        wasted = [r["waste"] for r in rows if "waste" in r]
        assert len(wasted) == (8 if other else 0)
        if other:
            assert (
                all(0.2 < w < 0.8 for w in wasted)
                if layout == "padded"
                else all(0 <= w < 0.6 for w in wasted)
            )
    if layout == "padded":
        assert losses[True] == pytest.approx(losses[False], rel=2e-5)
    else:
        assert np.mean(losses[True]) == pytest.approx(np.mean(losses[False]), rel=0.15)
        assert rows[-1]["cross_entropy"] < rows[0]["cross_entropy"]


def test_the_loss_of_packs_is_the_mean_over_their_samples(make_context: MakeContext) -> None:
    """However the samples of a step fall into packs."""
    config = small()
    config.joint.batch_tokens, config.joint.accumulate = 400, 3
    context = make_context(config)
    stage, same = Joint(context), Joint(context)
    work = stage.step(0)
    with torch.no_grad():
        loss = sum(float(p.loss()) for p in work.passes)
        batches = same.batches(3)
        parts = [sample_losses(context.model, b) for b in batches]
        ce, mae, labelled = (torch.cat([p[k] for p in parts]) for k in range(3))
        expected = torch.where(labelled, mmtg_loss(mae, ce), ce).mean()
    assert len({len(b) for b in batches}) > 1
    assert loss == pytest.approx(float(expected), rel=1e-5)
    assert work.metrics["cross_entropy"] == pytest.approx(float(ce.mean()), rel=1e-5)
    in_ev = float(mae[labelled].mean()) * float(context.model.energy_std)
    assert work.metrics["energy_mae"] == pytest.approx(in_ev, rel=1e-5)


def test_samples_that_are_too_long_are_counted_over_all_ranks(make_context: MakeContext) -> None:
    config = small()
    config.joint.batch_tokens = 400
    context = make_context(config)

    class Two(World):
        def gather(self, value: Any) -> list[Any]:
            return [value, value]

    stage = Joint(context)
    context.world = Two(0, 2, context.world.device)
    stage.loader.too_long = 3
    assert context.world.mean({"too_long": stage.step(0).metrics["too_long"]}) == {"too_long": 6.0}


@pytest.mark.parametrize("written", ["start", "relaxed"])
def test_answers_and_exemplars_show_what_is_to_be_written(written: Literal["start", "relaxed"]) -> None:
    from catmllm.data.slabs import load_slabs

    systems = load_slabs()[:300]
    shown = [s.frame(0.0) if written == "start" else s for s in systems]
    data = DataConfig(written=written, augment=False)
    mixture = Mixture(systems, systems, data, (1,), (2,), 0.0, lambda s, r: property_sample(s), 0.5, 0.0)
    exemplars = 0
    for position in range(100):
        i, sample = shuffled(position, len(systems), (1,)), mixture(position)
        assert write_cif(shown[i]).strip() in sample.answer
        if sample.graph is not None:
            like = [shown[j] for j in relatives(systems)[i]] or [shown[i]]
            assert any(np.array_equal(sample.graph.frac, s.frac) for s in like)
            exemplars += 1
    assert exemplars > 10


def test_relatives_share_identity_and_leave_out_the_system_itself(make_context: MakeContext) -> None:
    from catmllm.data.slabs import load_slabs

    systems = load_slabs()[:300]
    for i, kin in enumerate(relatives(systems)):
        assert i not in kin
        assert all(systems[j].identity == systems[i].identity for j in kin)
    assert any(relatives(systems))


def test_ranks_and_passes_share_one_batch(make_context: MakeContext) -> None:
    """The samples of a step do not depend on how many ranks and passes they are spread over."""
    context = make_context(small())
    config = context.config.joint

    def tokens(ranks: int, accumulate: int) -> list[list[int]]:
        config.batch_size, config.accumulate = 12 // ranks, accumulate
        rows = []
        for rank in range(ranks):
            context.world = World(rank, ranks, torch.device("cpu"))
            for b in Joint(context).batches(accumulate):
                rows += [r.tolist() for r in b.input_ids.split(b.cu_seqlens.diff().tolist())]
        return rows

    one = tokens(1, 1)
    assert len(one) == 12 and one == tokens(2, 1) == tokens(3, 2) == tokens(1, 4)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.7, 1.0])
def test_property_samples_are_spread_evenly(share: float) -> None:
    marks = [evenly(i, share) for i in range(400)]
    assert sum(marks) == round(400 * share)
    assert all(abs(sum(marks[i : i + 20]) - 20 * share) <= 1 for i in range(380))


def test_property_and_generation_have_systems_of_their_own(make_context: MakeContext) -> None:
    """By default the same ones, and then the draws are those of one list."""
    config = small()
    config.data.property, config.data.generation = (0.0, 0.5), (0.5, 1.0)
    config.joint.property_share = 0.5
    context = make_context(config)
    known, shown = (part(context.data["train"], config.data) for part in (of_property, of_generation))
    mixture = Joint(context).loader.windows.example
    assert isinstance(mixture, Mixture)
    asked = [mixture(k) for k in range(60)]
    assert not {s.sid for s in known} & {s.sid for s in shown}
    for k, sample in enumerate(asked):
        mine = known if k % 2 else shown
        system = mine[shuffled(k // 2, len(mine), (*mixture.order, *(1,) * (k % 2)))]
        assert sample.energy == (system.known_energy if k % 2 else None)
        assert k % 2 or system.identity in sample.prompt


def test_how_many_there_are_of_one_kind_changes_none_of_the_other() -> None:
    """Property samples and the others are sequences of their own; without property samples the others are
    drawn by their position."""
    from catmllm.data.slabs import load_slabs

    systems, data = load_slabs()[:60], DataConfig()

    def drawn(share: float, n: int = 160) -> tuple[list[Sample], list[Sample]]:
        mixture = Mixture(
            systems,
            systems,
            data,
            (1,),
            (2,),
            share,
            lambda s, r: property_sample(jitter(s, 0.1, r)),
            0.5,
            0.1,
        )
        made = [mixture(k) for k in range(n)]
        return [s for s in made if s.energy is not None], [s for s in made if s.energy is None]

    def same(a: list[Sample], b: list[Sample]) -> bool:
        pairs = [*zip(a, b)]
        assert len(pairs) > 20
        return all(
            (x.prompt, x.answer) == (y.prompt, y.answer)
            and (x.graph is None) == (y.graph is None)
            and (x.graph is None or y.graph is None or np.array_equal(x.graph.frac, y.graph.frac))
            for x, y in pairs
        )

    alone, none = drawn(1.0)
    without, others = drawn(0.0)
    assert not none and not without
    for share in (0.25, 0.5, 0.7):
        asked, rest = drawn(share)
        assert len(asked) + len(rest) == 160 and same(asked, alone) and same(rest, others)


def test_one_list_draws_as_before_there_were_two() -> None:
    from catmllm.data.augment import symmetric_copy
    from catmllm.data.slabs import load_slabs

    systems, data = load_slabs()[:80], DataConfig()
    whole = of_property(systems, data), of_generation(systems, data)
    assert whole[0] is systems and whole[1] is systems
    mixture = Mixture(
        *whole, data, (1,), (2,), 0.7, lambda s, r: property_sample(jitter(s, 0.1, r)), 0.5, 0.1
    )
    kin = relatives(systems)
    for k in range(40):
        p = int(k * 0.7 + 1e-9)
        if int((k + 1) * 0.7 + 1e-9) > p:
            i, rng = shuffled(p, len(systems), (1, 1)), generator((2, p, 1))
            expected = property_sample(jitter(symmetric_copy(systems[i], rng), 0.1, rng))
        else:
            i, rng = shuffled(k - p, len(systems), (1,)), generator((2, k - p))
            system = symmetric_copy(systems[i], rng)
            expected = task_sample(system, [systems[j] for j in kin[i]], rng, 0.5, 0.1, DataConfig())
        found = mixture(k)
        assert (found.prompt, found.answer) == (expected.prompt, expected.answer)
        assert (found.graph is None) == (expected.graph is None)
        if found.graph is not None and expected.graph is not None:
            assert np.array_equal(found.graph.frac, expected.graph.frac)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_of_design_samples_shows_an_exemplar(share: float) -> None:
    from catmllm.data.slabs import load_slabs

    system = load_slabs()[0]
    rngs = [np.random.default_rng(k) for k in range(20)]
    samples = [task_sample(system, [], r, 1.0, 0.05, DataConfig(), exemplar_share=share) for r in rngs]
    assert {s.graph is not None for s in samples} == {share == 1.0}


def test_varied_phrasings_reach_the_batches_of_every_task(make_context: MakeContext) -> None:
    config = small()
    config.joint.batch_size = 24
    tokens, drawn = {}, {}
    for choice in ("paper", "varied"):
        config.data.phrasings = choice  # type: ignore[assignment]
        context = make_context(config)
        d = context.config.data
        rng = [np.random.default_rng([7, k]) for k in range(60)]
        system = context.data["train"][0]
        samples = [property_with_dropout(system, r, 0.3, 0.0, 0.0, d.phrasings) for r in rng[:30]]
        samples += [task_sample(system, [], r, 0.5, 0.05, d) for r in rng[30:]]
        tokens[choice] = len({s.prompt for s in samples})
        mixture = Joint(context).loader.windows.example
        drawn[choice] = [mixture(k).prompt for k in range(60)]
    assert tokens["paper"] <= 5 < 15 < tokens["varied"]
    assert sum(a != b for a, b in zip(drawn["paper"], drawn["varied"])) > 20


def test_other_texts_take_no_draw_where_nobody_asks_for_them() -> None:
    """Prompts, and every random number behind them, are those of a run without the keys."""
    from catmllm.data.slabs import load_slabs

    for k, system in enumerate(load_slabs()[:60]):
        a, b = (np.random.default_rng([3, k]) for _ in range(2))
        before = property_with_dropout(system, a, 0.1, 0.5, 0.05, "varied", 0.4)
        after = property_with_dropout(system, b, 0.1, 0.5, 0.05, "varied", 0.4, MixedConfig())
        assert before.prompt == after.prompt and before.answer == after.answer
        assert (before.graph is None) == (after.graph is None) and a.random() == b.random()


def test_texts_without_a_graph_may_be_two_parts_or_relaxed_strings(make_context: MakeContext) -> None:
    """In the shares asked for, of prompts with the text alone; the closed form is told what they say."""
    from catmllm.data.slabs import load_slabs

    o = MixedConfig(drop_configuration=0.25, relaxed_text=0.25, relaxed_scale=4.0, relaxed_characters=300)
    counts = {"two": 0, "relaxed": 0, "whole": 0}
    some = []
    for k, system in enumerate(load_slabs()[:400]):
        sample = property_with_dropout(system, np.random.default_rng([4, k]), 0.1, 0.8, 0.0, texts=o)
        plain = property_with_dropout(system, np.random.default_rng([4, k]), 0.1, 0.8, 0.0)
        assert (sample.graph is None) == (plain.graph is None) and sample.energy == system.energy
        if sample.graph is not None:
            assert sample.prompt == plain.prompt
            continue
        texts = {
            "two": two_part_text(system),
            "relaxed": three_part_text(system, 4.0, 300),
            "whole": three_part_text(system),
        }
        (kind,) = [k for k, text in texts.items() if f":\n{text}.\nPlease" in sample.prompt]
        counts[kind] += 1
        some.append((sample, texts[kind]))
    n = sum(counts.values())
    for kind, share in (("two", 0.25), ("relaxed", 0.25), ("whole", 0.5)):
        assert abs(counts[kind] / n - share) < 4 * np.sqrt(share * (1 - share) / n)  # four deviations
    batch = make_context(small()).collate([sample for sample, _ in some])
    np.testing.assert_array_equal(batch.told, np.array([told(t) for _, t in some], dtype=np.float32))
    assert batch.labelled.all()
    with pytest.raises(ConfigError, match="at most 1 together"):
        MixedConfig(drop_configuration=0.6, relaxed_text=0.5)


def test_the_closed_form_reads_further_texts_where_they_are_trained() -> None:
    from catmllm.data.slabs import load_slabs

    systems = load_slabs()[:200]
    shown = [*systems, *(s.frame(0.0) for s in systems)]
    config = Config()
    assert further_texts(shown, config) == []
    config.instruct.drop_configuration = 0.1
    found = further_texts(shown, config)
    assert len(found) == 2 * len({two_part_text(s) for s in systems}) < 300
    for text in found:
        same = [s.known_energy for s in systems if two_part_text(s) == text.text]
        assert text.known_energy == pytest.approx(np.mean(same))
    assert sum(text.relaxed for text in found) == len(found) / 2
    config.joint.relaxed_text = 0.25
    more = further_texts(shown, config)[len(found) :]
    assert [s.text for s in more] == [three_part_text(s, 4.0, 400) for s in shown[::4]]


def test_telling_tokens_count_more(make_context: MakeContext) -> None:
    """The loss of a sample is the mean of its tokens' by weights, written out token by token."""
    config = small()
    config.instruct.row_weight, config.instruct.property_share = 5.0, 0.0
    context = make_context(config)
    stage = Instruct(context)
    (batch,) = stage.batches(1)
    assert batch.telling is not None and 0 < int(batch.telling.sum()) < len(batch.telling)
    with torch.no_grad():
        logprob = context.model.answer(batch).logprob.double()
        for weight in (1.0, 5.0):
            found = sample_losses(context.model, batch, weight)[0]
            for k in range(len(batch)):
                rows = [i for i, of in enumerate(batch.answer_sample.tolist()) if of == k]
                weights = [weight if batch.telling[i] else 1.0 for i in rows]
                total = sum(-float(logprob[i]) * w for i, w in zip(rows, weights)) / sum(weights)
                assert float(found[k]) == pytest.approx(total, rel=1e-5)
