"""Batches: samples end to end, the places that matter, joined graphs, markers,
and the order of training as a pure function."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Literal

import gemmi
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from catmllm.config import Config, DataConfig
from catmllm.data.batches import Collator, Encoded, GraphBatch, draw
from catmllm.data.prompts import (
    END,
    ENERGY,
    GRAPH,
    PAD,
    START,
    Sample,
    cif_sample,
    design_sample,
    property_sample,
)
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.structure.cif import by_layer
from catmllm.structure.graph import neighbour_graph
from catmllm.structure.system import ADSORBATE, System

Model = tuple[CatalyticMLLM, Collator]


@pytest.fixture
def collate(small_model: Model) -> Collator:
    return small_model[1]


def test_samples_stand_end_to_end(collate: Collator, train_systems: list[System]) -> None:
    a, b = train_systems[0], train_systems[1]
    samples = [
        property_sample(a),
        cif_sample(b),
        design_sample(a, b),
        Sample("no answer"),
        property_sample(b, "text"),
    ]
    batch = collate(samples)
    assert len(batch) == 5 and not batch.padded
    tokenizer = collate.tokenizer
    ids, expected_targets = [], []
    for row, s in enumerate(samples):
        prompt = tokenizer.encode(s.prompt, add_special_tokens=False)
        answer = tokenizer.encode(s.answer, add_special_tokens=False)
        begin, end = batch.cu_seqlens[row : row + 2].tolist()
        assert (begin, end) == (len(ids), len(ids) + len(prompt) + len(answer))
        assert batch.input_ids[begin:end].tolist() == prompt + answer
        assert batch.position_ids[begin:end].tolist() == list(range(end - begin))
        assert (batch.sample[begin:end] == row).all()
        at = batch.answer_at[batch.answer_sample == row]
        assert at.tolist() == list(range(begin + len(prompt) - 1, end - 1))
        if ENERGY in s.prompt:
            assert batch.energy_at[row] == begin + len(prompt) - 1
        else:
            assert batch.energy_at[row] == -1
        ids += prompt + answer
        expected_targets += answer
        if answer:
            assert answer[-1] == tokenizer.eos_token_id
    assert batch.tokens == len(ids) == batch.cu_seqlens[-1]
    assert batch.max_length == int(batch.cu_seqlens.diff().max())
    assert batch.targets.tolist() == expected_targets
    assert torch.equal(batch.input_ids[batch.answer_at + 1], batch.targets)
    assert batch.energy[[0, 4]].tolist() == pytest.approx([a.energy, b.energy])
    assert batch.energy[1:4].isnan().all() and batch.energy.dtype == torch.float32
    assert (batch.input_ids == collate.graph_id).nonzero()[:, 0].tolist() == batch.graph_at.tolist()
    assert batch.graph is not None and batch.graph.n_systems == 2  # of the first and the third, in this order
    assert batch.graph.numbers.tolist() == [*a.numbers, *b.numbers]
    assert batch.cu_seqlens.dtype == torch.int32
    places = (batch.input_ids, batch.position_ids, batch.answer_at, batch.targets, batch.answer_sample)
    assert all(t.dtype == torch.int64 for t in (*places, batch.energy_at, batch.graph_at))


def test_answers_without_prompts_have_no_place_for_their_first_token(collate: Collator) -> None:
    batch = collate.join([Encoded([], [5, 6, 7]), Encoded([8], []), Encoded([9], [10])])
    assert batch.answer_at.tolist() == [0, 1, 4] and batch.targets.tolist() == [6, 7, 10]
    assert batch.answer_sample.tolist() == [0, 0, 2] and batch.graph is None
    with pytest.raises(ValueError, match="no tokens"):
        collate.join([Encoded([1], []), Encoded([], [])])


def test_graphs_side_by_side_are_each_systems_own(
    collate: Collator, small_config: Config, train_systems: list[System]
) -> None:
    systems = [train_systems[i] for i in (0, 400, 900)]
    joined = collate.graphs(systems)
    assert joined is not None
    first_atom = 0
    d = small_config.data
    for k, s in enumerate(systems):
        own = neighbour_graph(s.lattice, s.positions, d.cutoff, d.max_neighbours)
        inside = joined.batch[joined.edge_index[1]] == k
        np.testing.assert_array_equal(joined.edge_index[:, inside].numpy() - first_atom, own.edge_index)
        np.testing.assert_allclose(joined.edge_vec[inside].numpy(), own.edge_vec, rtol=1e-6, atol=1e-6)
        assert (joined.batch == k).sum() == len(s)
        first_atom += len(s)
    assert (joined.edge_index[1].diff() >= 0).all()  # sorted by target: what the CSR kernels rely on
    assert (joined.batch.diff() >= 0).all()
    assert joined.edge_vec.dtype == torch.float32
    assert collate.graphs([]) is None


def test_a_marker_without_structure_is_an_error(collate: Collator) -> None:
    with pytest.raises(ValueError, match="marker but the sample carries no structure"):
        collate([Sample(f"{GRAPH} what is it?")])


def test_an_element_beyond_the_encoder_is_an_error(collate: Collator, train_systems: list[System]) -> None:
    """Generated CIFs name any element; the encoder's table ends at actinium."""
    s = train_systems[0]
    heaviest = replace(s, numbers=np.where(np.arange(len(s)) == 0, 89, s.numbers))
    assert collate.graphs([heaviest]) is not None
    with pytest.raises(ValueError, match=r"knows no Th \(Z = 90\)"):
        collate.graphs([replace(s, numbers=np.where(np.arange(len(s)) == 0, 90, s.numbers))])


def test_one_marker_an_atom(small_model: Model, train_systems: list[System]) -> None:
    by_atom = replace(small_model[1], tokens_per_atom=True)
    s = train_systems[0]
    batch = by_atom([property_sample(s), property_sample(s, "text")])
    at = batch.graph_at
    assert batch.sample[at].tolist() == [0] * len(s)
    assert (at.diff() == 1).all()  # in one run, where the single marker stands
    plain = small_model[1].prompt_ids(property_sample(s))
    assert at[0] == plain.index(by_atom.graph_id)
    kept = [i for i in batch.input_ids[batch.sample == 0].tolist() if i != by_atom.graph_id]
    whole = small_model[1]([property_sample(s)]).input_ids.tolist()
    assert kept == [i for i in whole if i != by_atom.graph_id]


def test_the_query_ends_every_property_prompt(collate: Collator, train_systems: list[System]) -> None:
    for mode in ("both", "graph", "text"):
        prompt = collate.prompt_ids(property_sample(train_systems[3], mode))
        assert prompt[-1] == collate.energy_id == collate.tokenizer.get_vocab()[ENERGY]


def test_encoding_twice_does_not_share_what_the_caller_changes(
    small_model: Model, train_systems: list[System]
) -> None:
    collate = replace(small_model[1], tokens_per_atom=True)
    sample = property_sample(train_systems[0])
    assert collate.prompt_ids(sample) == collate.prompt_ids(sample)
    assert collate.encode(sample.prompt).count(collate.graph_id) == 1


def test_to_moves_everything(collate: Collator, train_systems: list[System]) -> None:
    batch = collate([property_sample(train_systems[0])]).to(torch.device("meta"))
    assert isinstance(batch.graph, GraphBatch)
    tensors = [*vars(batch).values(), *vars(batch.graph).values()]
    assert all(t.device.type == "meta" for t in tensors if isinstance(t, torch.Tensor))


@given(
    n=st.integers(1, 60),
    count=st.integers(1, 9),
    world=st.integers(1, 4),
    seed=st.integers(0, 3),
)
def test_an_epoch_shows_every_sample_once_over_all_ranks(n: int, count: int, world: int, seed: int) -> None:
    steps = -(-3 * n // (count * world))  # three epochs at least
    drawn = np.concatenate(
        [draw(n, count, (seed,), step, rank, world) for step in range(steps) for rank in range(world)]
    )
    for epoch in range(3):
        assert sorted(drawn[epoch * n : (epoch + 1) * n]) == list(range(n))
    most, least = max(Counter(drawn).values()), min(Counter(drawn).values())
    assert most - least <= 1


def test_the_draw_is_a_function_of_its_arguments() -> None:
    one = draw(100, 8, (0,), 5, 1, 2)
    np.random.seed(3)  # noqa: NPY002  the global generator must not matter
    np.testing.assert_array_equal(one, draw(100, 8, (0,), 5, 1, 2))
    assert not np.array_equal(one, draw(100, 8, (1,), 5, 1, 2))
    # one rank of 16 sees what two ranks of 8 see together
    both = np.concatenate([draw(100, 8, (0,), 5, r, 2) for r in range(2)])
    np.testing.assert_array_equal(both, draw(100, 16, (0,), 5, 0, 1))
    epochs = [draw(50, 50, (0,), e, 0, 1) for e in range(2)]
    assert not np.array_equal(epochs[0], epochs[1])


@pytest.mark.parametrize("rows", ["source", "layers"])
@pytest.mark.parametrize("letters", [False, True])
def test_tokens_that_tell_are_marked(
    collate: Collator, train_systems: list[System], letters: bool, rows: Literal["source", "layers"]
) -> None:
    """By the fields of the rows as a CIF reader finds them, for words as tokens and for letters."""
    tokenizer = of_letters() if letters else collate.tokenizer
    some = replace(collate, tokenizer=tokenizer, marks=True, data=DataConfig(rows=rows))
    systems = train_systems[:3]
    if rows == "layers":
        systems = [by_layer(s) for s in systems]
    samples = [property_sample(systems[0]), cif_sample(systems[1]), design_sample(systems[2], systems[0])]
    batch = some(samples)
    assert batch.telling is not None and len(batch.telling) == len(batch.targets)
    for row, (sample, system) in enumerate(zip(samples, systems)):
        of = batch.answer_sample == row
        written = [tokenizer.decode([i]) for i in batch.targets[of].tolist()]
        assert "".join(written) == sample.answer
        marks = [mark for mark, t in zip(batch.telling[of].tolist(), written) for _ in t]
        heavy = "".join(c if mark else "|" for c, mark in zip(sample.answer, marks)).split("|")
        found = [word for piece in heavy for word in piece.split()]
        expected: list[str] = []
        if "loop_" in sample.answer:
            file = "data_x\n" + sample.answer[sample.answer.index("loop_") :].replace(END, "")
            block = gemmi.cif.read_string(file).sole_block()
            sites = block.find("_atom_site_", ["type_symbol", "fract_x", "fract_y", "fract_z"])
            symbols = [symbol for symbol, *_ in sites]
            for k, (tag, (symbol, *place)) in enumerate(zip(system.tags, sites)):
                expected += [symbol, symbol]
                # a layer has four atoms
                follows = tag == ADSORBATE or (rows == "layers" and symbol == symbols[k - k % 4 + 3])
                expected += place if follows else ()
        assert found == expected
    assert batch.to(torch.device("cpu")).telling is not None
    assert collate(samples).telling is None


def of_letters() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are single characters, and the markers."""
    special = [GRAPH, ENERGY, START, END, PAD]
    made = Tokenizer(models.BPE({c: k for k, c in enumerate(map(chr, [10, *range(32, 127), 8217]))}, []))
    made.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END, pad_token=PAD)
    fast.add_special_tokens({"additional_special_tokens": special[:3]})
    return fast
