"""The mean of a language model's energies and of ridge regression's: chosen on validation, kept in a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from catmllm.data.slabs import load_slabs, split
from catmllm.evaluate.baselines import TextRidge, energies
from catmllm.evaluate.ensemble import SHARES, Ensemble, load_ensemble
from catmllm.structure.system import text_system
from catmllm.structure.text import three_part_text

PARTS = {
    name: [text_system(three_part_text(s), s.energy, s.sid) for s in systems]
    for name, systems in split(load_slabs()[::4]).items()
}


def test_the_share_is_the_best_on_validation() -> None:
    """Against all shares tried one by one; a model that knows the answer gets all, one that knows nothing
    none, and one that errs on its own beside the ridge a part."""
    train, val = PARTS["train"], PARTS["val"]
    truth = energies(val)
    noise = np.random.default_rng(0).normal(0.0, 0.3, len(val))
    ridge = TextRidge.fit(train, val)
    for said, share in ((truth, 1.0), (truth * 0 + 50.0, 0.0), (truth + noise, None)):
        mine = Ensemble.fit(train, val, val, said)
        errors = [np.abs(s * said + (1 - s) * ridge.predict(val) - truth).mean() for s in SHARES]
        assert np.abs(mine.mean(val, said) - truth).mean() == np.min(errors)
        assert share is None or mine.share == share
    assert 0.0 < mine.share < 1.0


def test_it_comes_back_from_its_file(tmp_path: Path) -> None:
    assert load_ensemble(tmp_path) is None
    mine = Ensemble.fit(PARTS["train"], [], [], np.zeros(0))
    assert mine.share == 0.5
    mine.save(tmp_path)
    back = load_ensemble(tmp_path)
    llm = np.linspace(-1, 1, len(PARTS["test"]))
    assert back is not None and back.share == mine.share
    assert np.array_equal(back.mean(PARTS["test"], llm), mine.mean(PARTS["test"], llm))
