"""Whether the wide slabs help on the first ones: the closed form that the model starts from, kernel ridge
regression and ridge on words, fitted to the training part of `data.slabs: fcc` and of `all`, on the same test
systems.

    python bench/wide.py            # five splits, an hour of one core and 8 GB
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
from catmllm.evaluate.baselines import FRAMES, KernelRidge, TextRidge
from catmllm.models.catalytic_mllm import RATE, TEXT_RATE
from catmllm.models.kernel_prior import KernelPrior
from catmllm.stages.supervised import described
from catmllm.structure.descriptors import SIZE, TOLD, fold_of, known, surroundings, told
from catmllm.structure.system import System
from catmllm.structure.text import three_part_text

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
            for shown, by in fits(parts["train"], parts["val"]).items():
                for who, says_of in by.items():
                    for where, test in (("fcc", one["test"]), ("all", both["test"])):
                        truth = np.array([s.known_energy for s in test])
                        said = says_of([s.frame(0.0) for s in test] if shown == "starts" else test)
                        case = errors.setdefault(f"{where}, {shown}", {})
                        case.setdefault(f"{who}, {name}", []).append(float(np.abs(said - truth).mean()))
        so_far = {case: {who: round(e[-1], 3) for who, e in by.items()} for case, by in errors.items()}
        print(f"split {seed}: {so_far}", file=sys.stderr, flush=True)
    about = {"systems": len(fcc), "wide systems": len(wide), "splits": splits, "by split": errors}
    says = "test MAE of regressions fitted to the fcc slabs and to all"
    record.finish(args, [record.claim("wide", says, "eV", errors, about)])
    return 0


def fits(train: Sequence[System], val: Sequence[System]) -> dict[str, dict[str, Says]]:
    """What says energies, by what is shown, then by name: kernel ridge and ridge on words, with all of
    training that they take, and the closed form with as much of it as a model takes."""
    shown = described(train)
    shown += [s.frame(0.0) for s in shown]
    facts = known(shown), np.array([fold_of(s) for s in shown]), np.array([s.known_energy for s in shown])

    def closed_form(describe: Callable[[System], NDArray[np.float64]], size: int, rate: float) -> Says:
        prior = KernelPrior(size, rate)
        prior.fit(np.array([describe(s) for s in shown]), *facts)
        prior.eval()

        def says(systems: Sequence[System]) -> NDArray[np.float64]:
            local = torch.tensor(np.array([describe(s) for s in systems]), dtype=torch.float32)
            return prior(local, torch.from_numpy(known(systems))).double().numpy()

        return says

    structures = closed_form(surroundings, SIZE, RATE)
    return {
        "relaxed": {"closed form": structures, "kernel ridge": KernelRidge.fit(train, val).predict},
        "starts": {"closed form": structures, "kernel ridge": KernelRidge.fit(train, val, FRAMES).predict},
        "texts": {
            "closed form": closed_form(lambda s: told(three_part_text(s)), TOLD, TEXT_RATE),
            "ridge on words": TextRidge.fit(train, val).predict,
        },
    }


if __name__ == "__main__":
    sys.exit(main())
