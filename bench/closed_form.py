"""The closed form that energies start from beside its opponents, on splits of the shipped systems: kernel
ridge regression by relaxed structures alone and with their starts, and ridge on words.

    python bench/closed_form.py            # five splits, some five minutes of one core
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

if __package__:
    from bench import record
else:
    import record

import numpy as np
import torch

from catmllm.data.slabs import load_slabs, split
from catmllm.evaluate.baselines import FRAMES, KernelRidge, TextRidge
from catmllm.models.catalytic_mllm import RATE, TEXT_RATE
from catmllm.models.kernel_prior import KernelPrior
from catmllm.structure.descriptors import SIZE, TOLD, fold_of, known, surroundings, told
from catmllm.structure.system import System
from catmllm.structure.text import three_part_text

SPLITS = 5


def main() -> int:
    args = record.arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    errors: dict[str, dict[str, list[float]]] = {}
    systems = load_slabs()[:: 8 if args.quick else 1]
    splits = 2 if args.quick else SPLITS
    for seed in range(splits):
        parts = split(systems, seed)
        for case, by in errors_of(parts["train"], parts["val"], parts["test"]).items():
            for who, error in by.items():
                errors.setdefault(case, {}).setdefault(who, []).append(error)
        said = {
            case: {who: round(values[-1], 3) for who, values in by.items()} for case, by in errors.items()
        }
        print(f"split {seed}: {said}", file=sys.stderr, flush=True)
    about = {"systems": len(systems), "splits": splits, "by split": errors}
    says = "test MAE of the closed form that the model starts from, beside baselines"
    record.finish(args, [record.claim("closed_form", says, "eV", errors, about)])
    return 0


def errors_of(
    train: Sequence[System], val: Sequence[System], test: Sequence[System]
) -> dict[str, dict[str, float]]:
    """MAE (eV) on test by what is shown, then by whom: the closed form first."""
    shown = [*train, *(s.frame(0.0) for s in train)]
    facts = known(shown), np.array([fold_of(s) for s in shown])
    truth = np.array([s.known_energy for s in shown])
    structures, texts = KernelPrior(SIZE, RATE), KernelPrior(TOLD, TEXT_RATE)
    structures.fit(np.array([surroundings(s) for s in shown]), *facts, truth)
    texts.fit(np.array([told(three_part_text(s)) for s in shown]), *facts, truth)
    relaxed, both = KernelRidge.fit(train, val), KernelRidge.fit(train, val, FRAMES)
    wanted = np.array([s.known_energy for s in test])
    starts = [s.frame(0.0) for s in test]

    def off(energies: np.ndarray) -> float:
        return float(np.abs(energies - wanted).mean())

    def said(prior: KernelPrior, numbers: list[np.ndarray], of: Sequence[System]) -> np.ndarray:
        found = prior.eval()(
            torch.tensor(np.array(numbers), dtype=torch.float32), torch.from_numpy(known(of))
        )
        return found.double().numpy()

    return {
        "relaxed structures": {
            "closed form": off(said(structures, [surroundings(s) for s in test], test)),
            "kernel ridge, relaxed only": off(relaxed.predict(test)),
            "kernel ridge, starts too": off(both.predict(test)),
        },
        "starts": {
            "closed form": off(said(structures, [surroundings(s) for s in starts], starts)),
            "kernel ridge, relaxed only": off(relaxed.predict(starts)),
            "kernel ridge, starts too": off(both.predict(starts)),
        },
        "texts": {
            "closed form": off(said(texts, [told(three_part_text(s)) for s in test], test)),
            "ridge on words": off(TextRidge.fit(train, val).predict(test)),
        },
    }


if __name__ == "__main__":
    sys.exit(main())
