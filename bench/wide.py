"""Whether the wide slabs help on the first ones: kernel ridge regression and the closed form that the model
starts from, fitted to the training part of `data.slabs: fcc` and of `all`, on the same test systems.

    python bench/wide.py            # five splits, some twenty minutes of one core and 8 GB
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

if __package__:
    from bench import record
else:
    import record

import numpy as np
import torch
from numpy.typing import NDArray

from catmllm.data.slabs import WIDE, load_slabs, split
from catmllm.evaluate.baselines import FRAMES, KernelRidge
from catmllm.models.catalytic_mllm import RATE
from catmllm.models.kernel_prior import KernelPrior
from catmllm.stages.supervised import described
from catmllm.structure.descriptors import SIZE, fold_of, known, surroundings
from catmllm.structure.system import System

SPLITS = 5
Says = Callable[[Sequence[System]], NDArray[np.float64]]


def main() -> int:
    args = record.arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    step = 8 if args.quick else 1
    fcc, wide = load_slabs()[::step], load_slabs(WIDE)[::step]
    splits = 2 if args.quick else SPLITS
    errors: dict[str, dict[str, list[float]]] = {}
    for seed in range(splits):
        one, both = split(fcc, seed), split(fcc + wide, seed, len(fcc))
        for name, parts in (("fcc", one), ("all", both)):
            for who, (relaxed, starts) in fits(parts["train"], parts["val"]).items():
                for where, test in (("fcc", one["test"]), ("all", both["test"])):
                    truth = np.array([s.known_energy for s in test])
                    for kind, said in (
                        ("relaxed", relaxed(test)),
                        ("starts", starts([s.frame(0.0) for s in test])),
                    ):
                        case = errors.setdefault(f"{where}, {kind}", {})
                        case.setdefault(f"{who}, {name}", []).append(float(np.abs(said - truth).mean()))
        so_far = {case: {who: round(e[-1], 3) for who, e in by.items()} for case, by in errors.items()}
        print(f"split {seed}: {so_far}", file=sys.stderr, flush=True)
    about = {"systems": len(fcc), "wide systems": len(wide), "splits": splits, "by split": errors}
    says = "test MAE of regressions fitted to the fcc slabs and to all"
    record.finish(args, [record.claim("wide", says, "eV", errors, about)])
    return 0


def fits(train: Sequence[System], val: Sequence[System]) -> dict[str, tuple[Says, Says]]:
    """What says the energies of relaxed structures and of starts, by name: kernel ridge with all of training,
    and the closed form with as much of it as a model takes."""
    shown = described(train)
    shown += [s.frame(0.0) for s in shown]
    prior = KernelPrior(SIZE, RATE)
    folds, truth = np.array([fold_of(s) for s in shown]), np.array([s.known_energy for s in shown])
    prior.fit(np.array([surroundings(s) for s in shown]), known(shown), folds, truth)
    prior.eval()

    def closed_form(systems: Sequence[System]) -> NDArray[np.float64]:
        local = torch.tensor(np.array([surroundings(s) for s in systems]), dtype=torch.float32)
        return prior(local, torch.from_numpy(known(systems))).double().numpy()

    ridges = KernelRidge.fit(train, val), KernelRidge.fit(train, val, FRAMES)
    return {
        "kernel ridge": (ridges[0].predict, ridges[1].predict),
        "closed form": (closed_form, closed_form),
    }


if __name__ == "__main__":
    sys.exit(main())
