"""The engine and pymatgen on texts in the manner of databases and programs,
as they are and after what happens to files."""

import pytest

from rewards_fast import PVCP
from tests.oracles.reward_agreement import TARGET, differences, judge
from tests.rewards_fast.engine_styles import STYLES, TREATMENTS, treated


def _faults(named: list[tuple[str, str]]) -> list[str]:
    scores = PVCP(threads=1, extract=False).score([text for _, text in named], TARGET)
    found = []
    for i, (name, text) in enumerate(named):
        wrong = differences(text, judge(text), scores, i)
        if wrong:
            found.append(f"{name}: {'; '.join(wrong)}")
    return found


@pytest.mark.parametrize("style", STYLES)
def test_styles(style: str) -> None:
    assert not _faults([(style, STYLES[style])])


def test_most_styles_parse() -> None:
    """The texts exercise the structure, not only the refusals."""
    scores = PVCP(extract=False).score(list(STYLES.values()))
    assert sum(reason is None for reason in scores.reason) > 0.75 * len(STYLES)


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_treatments(treatment: str) -> None:
    chosen = list(STYLES)[sum(map(ord, treatment)) % 5 :: 8]
    assert not _faults([(f"{s}: {treatment}", TREATMENTS[treatment](STYLES[s])) for s in chosen])


@pytest.mark.slow
def test_styles_and_treatments_together() -> None:
    assert not _faults(list(treated(1000, seed=1)))
