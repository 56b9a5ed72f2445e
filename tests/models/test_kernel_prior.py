"""The closed form of energies beside scikit-learn's kernel ridge regression in float64."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sklearn.gaussian_process.kernels import Matern
from sklearn.kernel_ridge import KernelRidge

from catmllm.config import Config
from catmllm.data.batches import Collator
from catmllm.design.predict import encoder_energies, energies_and_errors, predict_energies, question
from catmllm.models.build import new_model
from catmllm.models.catalytic_mllm import RATE, CatalyticMLLM
from catmllm.models.kernel_metric import Kernel, learn
from catmllm.models.kernel_prior import CERTAIN, DOUBT_STRENGTHS, KernelPrior
from catmllm.models.state import load_model, save_model
from catmllm.stages.supervised import described, standardise
from catmllm.structure.descriptors import FOLDS, SIZE, fold_of, known, surroundings, told
from catmllm.structure.sites import on_site
from catmllm.structure.system import System
from catmllm.structure.text import three_part_text
from catmllm.train.stage import Context
from catmllm.world import World
from tests.ranks import two_ranks


class Fitted:
    """A prior, what it was fitted to, and how to ask it."""

    def __init__(self, systems: list[System], starts: bool = True) -> None:
        self.shown = [*systems, *(s.frame(0.0) for s in systems if starts)]
        self.local = np.array([surroundings(s) for s in self.shown])
        self.folds = np.array([fold_of(s) for s in self.shown])
        self.energies = np.array([s.known_energy for s in self.shown])
        self.prior = KernelPrior(SIZE, RATE)
        self.kernels: list[Kernel] = []  # of relaxed and of unrelaxed structures

        def kept(*args: Any) -> Kernel:
            self.kernels.append(learn(*args))
            return self.kernels[-1]

        with mock.patch("catmllm.models.kernel_prior.learn", kept):
            self.errors = self.prior.fit(self.local, known(self.shown), self.folds, self.energies)

    def __call__(self, systems: list[System], held_out: bool = False) -> np.ndarray:
        self.prior.train(held_out)
        local = torch.tensor(np.array([surroundings(s) for s in systems]), dtype=torch.float32)
        facts = torch.from_numpy(known(systems, [held_out] * len(systems)))
        return self.prior(local, facts).double().numpy()


def doubt_of(prior: KernelPrior, systems: list[System]) -> np.ndarray:
    local = torch.tensor(np.array([surroundings(s) for s in systems]), dtype=torch.float32)
    return prior.doubt(local, torch.from_numpy(known(systems))).double().numpy()


@pytest.fixture(scope="module")
def fitted(train_systems: list[System]) -> Fitted:
    return Fitted(train_systems[::20])


def kernel_by_scikit_learn(fit: Fitted, learned: Kernel, a: list[System], b: list[System]) -> np.ndarray:
    """Of systems a and b [n, m]: each descriptor by its own length, then a factor for what differs."""
    raw, scale = fit.local[:, :SIZE], fit.local[:, :SIZE].std(0)
    scale = np.maximum(scale, 0.05 * scale.max())
    x, y = ((np.array([surroundings(s)[:SIZE] for s in part]) - raw.mean(0)) / scale for part in (a, b))
    same = np.array([[s.adsorbate == t.adsorbate for t in b] for s in a])
    alike = np.array([[s.relaxed == t.relaxed for t in b] for s in a])
    matern = Matern(length_scale=np.sqrt(3 / learned.metric), nu=1.5)
    factors = np.where(same, 1.0, learned.shared) * np.where(alike, 1.0, learned.related)
    return np.asarray(matern(x, y) * factors)


def by_scikit_learn(fit: Fitted, learned: Kernel, asked: list[System], rows: np.ndarray) -> np.ndarray:
    """The same regression on the rows of what was fitted, by means and kernels of scikit-learn."""
    some = [fit.shown[i] for i in rows]
    energies = fit.energies[rows]

    def mean(s: System) -> float:
        group = energies[[t.adsorbate == s.adsorbate for t in some]]
        return float(group.mean() if len(group) else energies.mean())

    ridge = KernelRidge(alpha=learned.strength, kernel="precomputed")
    among = kernel_by_scikit_learn(fit, learned, some, some)
    ridge.fit(among, energies - np.array([mean(s) for s in some]))
    return ridge.predict(kernel_by_scikit_learn(fit, learned, asked, some)) + [mean(s) for s in asked]


@pytest.mark.parametrize("relaxed", [True, False])
def test_it_is_kernel_ridge_regression(fitted: Fitted, train_systems: list[System], relaxed: bool) -> None:
    """On all, and for training systems on all but their fold, by the kernel that was learned."""
    rows = np.array([i for i, s in enumerate(fitted.shown) if s.relaxed or not relaxed])
    asked = [s if relaxed else s.frame(0.0) for s in train_systems[5::60]]
    learned = fitted.kernels[0 if relaxed else 1]
    # coefficients of some 50 eV in float32, and kernels of distances that are differences of float32 products
    np.testing.assert_allclose(fitted(asked), by_scikit_learn(fitted, learned, asked, rows), atol=2e-3)
    own = [s for s in fitted.shown if s.relaxed == relaxed][::9]
    found = fitted(own, held_out=True)
    for fold in range(FOLDS):
        part = [i for i, s in enumerate(own) if fold_of(s) == fold]
        others = rows[fitted.folds[rows] != fold]
        expected = by_scikit_learn(fitted, learned, [own[i] for i in part], others)
        np.testing.assert_allclose(found[part], expected, atol=2e-3)


def test_rows_behind_those_that_give_the_scale_do_not_change_it(fitted: Fitted) -> None:
    n = len(fitted.shown) // 2
    facts = known(fitted.shown), fitted.folds, fitted.energies
    some, half = KernelPrior(SIZE, RATE), KernelPrior(SIZE, RATE)
    some.fit(fitted.local, *facts, scaled=n)
    half.fit(fitted.local[:n], *(fact[:n] for fact in facts))
    assert torch.equal(some.scale, half.scale) and torch.equal(some.centre, half.centre)
    assert torch.equal(some.landmarks[:n], half.landmarks) and len(some.landmarks) == 2 * n
    assert not torch.equal(some.scale, fitted.prior.scale)


def test_errors_are_those_of_unseen_pairs(fitted: Fitted) -> None:
    found = np.abs(fitted(fitted.shown, held_out=True) - fitted.energies)
    relaxed = np.array([s.relaxed for s in fitted.shown])
    assert fitted.errors["relaxed"] == pytest.approx(found[relaxed].mean(), abs=1e-3)
    assert fitted.errors["unrelaxed"] == pytest.approx(found[~relaxed].mean(), abs=1e-3)
    # what has been seen is known nearly by heart
    assert np.abs(fitted(fitted.shown) - fitted.energies)[relaxed].mean() < 0.3 * found[relaxed].mean()


def test_expected_errors_are_kernel_ridge_regression_too(fitted: Fitted, train_systems: list[System]) -> None:
    """Of the roots of what is left on unseen pairs, up to a scale; at one of the strengths."""
    rows = np.array([i for i, s in enumerate(fitted.shown) if not s.relaxed])
    some = [fitted.shown[i] for i in rows]
    roots = np.sqrt(np.abs(fitted(some, held_out=True) - fitted.energies[rows]))

    def kernel(a: list[System]) -> np.ndarray:
        return kernel_by_scikit_learn(fitted, fitted.kernels[1], a, some)

    asked = [s.frame(0.0) for s in train_systems[5::60]]
    found = doubt_of(fitted.prior, asked)
    worst = []
    for strength in DOUBT_STRENGTHS:
        ridge = KernelRidge(alpha=strength, kernel="precomputed").fit(kernel(some), roots - roots.mean())
        expected = ridge.predict(kernel(asked)) + roots.mean()
        free = expected > 2 * CERTAIN  # the floor is not reached, whatever the scale
        scales = np.sqrt(found[free]) / expected[free]
        worst.append(np.ptp(scales) / scales.mean())
    # residuals of coefficients in float32
    assert min(worst) < 5e-3, worst


def test_expected_errors_hold_on_new_pairs(train_systems: list[System]) -> None:
    """Fitted without a third of the pairs, they have the errors' mean there, and know large from small."""
    new = [s for s in train_systems if zlib.crc32(f"new {s.bulk} {s.miller}".encode()) % 3 == 0][::3]
    pairs = {(s.bulk, s.miller) for s in new}
    fit = Fitted([s for s in train_systems if (s.bulk, s.miller) not in pairs][::3])
    starts = [s.frame(0.0) for s in new]
    errors = np.abs(fit(starts) - [s.known_energy for s in new])
    expected = doubt_of(fit.prior, starts)
    assert expected.mean() == pytest.approx(errors.mean(), rel=0.3)
    order = np.argsort(expected)
    surest, rest = errors[order[: len(order) // 4]], errors[order[len(order) // 4 :]]
    assert surest.mean() < 0.6 * rest.mean()
    assert doubt_of(fit.prior, new).mean() < 0.75 * expected.mean()  # relaxed structures are surer


def test_without_a_fit_nothing_is_expected() -> None:
    prior = KernelPrior(SIZE, RATE)
    assert not prior.doubt(torch.zeros(2, SIZE), torch.zeros(2, 3, dtype=torch.int64)).any()


def test_without_a_label_all_fits_speak_in_training_too(fitted: Fitted) -> None:
    systems = fitted.shown[:5]
    whole = fitted(systems)
    fitted.prior.train()
    local = torch.tensor(np.array([surroundings(s) for s in systems]), dtype=torch.float32)
    np.testing.assert_array_equal(fitted.prior(local, torch.from_numpy(known(systems))).double(), whole)


def test_without_starts_unrelaxed_structures_are_told_as_relaxed_ones(train_systems: list[System]) -> None:
    fit = Fitted(train_systems[::40], starts=False)
    asked = train_systems[3::200]
    on_sites = [on_site(s) for s in asked]  # where unrelaxed ones are described
    np.testing.assert_allclose(fit([replace(s, relaxed=False) for s in asked]), fit(on_sites), rtol=1e-12)
    assert set(fit.errors) == {"relaxed"}


def test_an_adsorbate_that_training_lacks_has_the_mean_of_all(train_systems: list[System]) -> None:
    some = [s for s in train_systems[::10] if s.adsorbate != "CO"]
    fit = Fitted(some)
    far = replace(train_systems[0], adsorbate="CO", numbers=np.full_like(train_systems[0].numbers, 55))
    assert fit([far])[0] == pytest.approx(np.mean([s.known_energy for s in some]), abs=0.3)


def test_a_prior_of_any_size_is_loaded(fitted: Fitted) -> None:
    new, state = KernelPrior(SIZE, RATE), fitted.prior.state_dict()
    assert not new(torch.zeros(2, 500), torch.zeros(2, 3, dtype=torch.int64)).any()
    new.load_state_dict(state, strict=True, assign=True)
    for name, tensor in state.items():
        assert torch.equal(getattr(new, name), tensor)


def test_a_frame_on_the_way_is_not_relaxed(train_systems: list[System]) -> None:
    system = next(s for s in train_systems if s.start is not None)
    assert system.relaxed and system.frame(1.0).relaxed
    assert not system.frame(0.9).relaxed
    assert known([system, system.frame(0.0)], [True, False])[:, 1:].tolist() == [
        [0, fold_of(system)],
        [1, -1],
    ]


@pytest.mark.parametrize("n", [1, 9, 10, 11, 13, 19, 25])
def test_as_many_systems_are_described_as_may_be(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    """Evenly spaced: with one too many, one is left out, not every second."""
    monkeypatch.setattr("catmllm.stages.supervised.DESCRIBED", 10)
    rows = described(range(n))  # type: ignore[arg-type]
    assert len(rows) == len({*rows}) == min(n, 10) and (rows[0], rows[-1]) == (0, n - 1)
    assert len({*np.diff(rows)}) <= 2


def standardised(rank: int, size: int, folder: str, config: Config, systems: list[System]) -> None:
    """What a rank has of both closed forms, kept in `folder`."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/of{size}", rank=rank, world_size=size)
    try:
        model, collate = new_model(config, systems)
        world = World(rank, size, torch.device("cpu"))
        standardise(Context(config, model, collate, {"train": systems}, world, Path(folder)))
        found = {"structures": model.prior.state_dict(), "texts": model.text_prior.state_dict()}
        torch.save(found, f"{folder}/{rank}of{size}.pt")
    finally:
        dist.destroy_process_group()


def test_ranks_share_the_fits(small_config: Config, train_systems: list[System], tmp_path: Path) -> None:
    """Each rank has what one process fits alone, texts of two parts too, bit by bit."""
    config = replace(small_config, joint=replace(small_config.joint, drop_configuration=0.1))
    some = train_systems[::40]
    standardised(0, 1, str(tmp_path), config, some)
    two_ranks(standardised, 2, str(tmp_path), config, some)
    alone, first, last = (torch.load(tmp_path / f"{which}.pt") for which in ("0of1", "0of2", "1of2"))
    for what, state in alone.items():
        for name, tensor in state.items():
            assert torch.equal(first[what][name], tensor) and torch.equal(last[what][name], tensor), name
    assert len(alone["texts"]["landmarks"]) > len(alone["structures"]["landmarks"])


def test_other_labels_have_closed_forms_of_their_own(
    small_config: Config, train_systems: list[System], tmp_path: Path
) -> None:
    """Whose zero is another and whose adsorbates stand otherwise; nothing of the former ones is left."""
    some, asked = train_systems[::40], [question(s) for s in train_systems[1::400]]
    other = [replace(s, energy=2 * s.known_energy - 30.0) for s in some]
    world = World(0, 1, torch.device("cpu"))

    def fitted(model: CatalyticMLLM, collate: Collator, systems: list[System]) -> np.ndarray:
        standardise(Context(small_config, model, collate, {"train": systems}, world, tmp_path))
        return predict_energies(model.eval(), collate, asked)

    model, collate = new_model(small_config, some)
    before = fitted(model, collate, some)
    with torch.no_grad():
        model.energy_head.text.bias.fill_(3.0)
        model.energy_head.correction.bias.fill_(3.0)
    model.forget_energies()
    after = fitted(model, collate, other)
    np.testing.assert_allclose(after, fitted(*new_model(small_config, other), other), atol=1e-3)
    assert np.corrcoef(before, after)[0, 1] > 0.95 and after.max() < before.min() - 20


@pytest.mark.parametrize("mode", ["both", "graph", "text"])
def test_networks_that_count_by_0_do_not_run(
    small_config: Config, train_systems: list[System], tmp_path: Path, mode: Literal["both", "graph", "text"]
) -> None:
    """And what is said is what they would have left of it."""
    model, collate = new_model(small_config, train_systems[::40])
    world = World(0, 1, torch.device("cpu"))
    standardise(Context(small_config, model, collate, {"train": train_systems[::40]}, world, tmp_path))
    ran = []
    model.text.register_forward_hook(lambda *_: ran.append("LLM"))
    batch = collate([question(s, mode) for s in train_systems[1::500]])
    head = model.eval().energy_head
    with torch.no_grad():
        silent = model.predict(batch)
        assert not ran
        whole = model.read(batch)[1] * model.energy_std + model.energy_mean
        assert ran == ["LLM"] and torch.equal(silent, whole)
        (head.text if mode == "text" else head.correction).bias.fill_(0.1)
        heard = model.predict(batch)
    assert len(ran) == 2
    torch.testing.assert_close(heard - silent, (0.1 * model.energy_std).expand(len(batch)))


def test_a_new_model_says_what_the_closed_forms_say(
    small_config: Config, train_systems: list[System], tmp_path: Path
) -> None:
    """In every mode; relaxed or not, as the call says; and so does what is read from its export."""
    model, collate = new_model(small_config, train_systems[::40])
    some = train_systems[::40]
    world = World(0, 1, torch.device("cpu"))
    standardise(Context(small_config, model, collate, {"train": some}, world, tmp_path))
    asked = train_systems[1::500]
    save_model(tmp_path, model, model.state_dict(), small_config, collate)
    read = load_model(tmp_path)[0]
    for relaxed in (True, False):
        systems = [replace(s, relaxed=relaxed) for s in asked]
        facts = torch.from_numpy(known(systems))
        local = np.array([surroundings(s) for s in systems])
        texts = np.array([told(three_part_text(s)) for s in systems])
        priors = {
            "both": (model.prior, local),
            "graph": (model.prior, local),
            "text": (model.text_prior, texts),
        }
        for mode, (prior, descriptors) in priors.items():
            expected = prior.eval()(torch.tensor(descriptors, dtype=torch.float32), facts).numpy()
            assert np.ptp(expected) > 0.1
            for one in (model.eval(), read):
                questions = [question(s, mode) for s in systems]  # type: ignore[arg-type]
                np.testing.assert_allclose(predict_energies(one, collate, questions), expected, atol=1e-4)
                energies, errors = energies_and_errors(one, collate, questions, batch_size=2)
                np.testing.assert_allclose(energies, expected, atol=1e-4)
                doubt = prior.doubt(torch.tensor(descriptors, dtype=torch.float32), facts)
                np.testing.assert_allclose(errors, doubt, atol=1e-4)
        said = model.prior(torch.tensor(local, dtype=torch.float32), facts)
        np.testing.assert_allclose(encoder_energies(model, collate, systems), said, atol=1e-4)
