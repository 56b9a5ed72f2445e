"""`catmllm finetune`: a trained model on structures and energies of one's own."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from catmllm.cli.trained import best_stage
from catmllm.models import SHIPPED

if TYPE_CHECKING:
    from catmllm.config import Config
    from catmllm.structure.system import System

HELP = "a trained model on structures and energies of your own"

BATCH = 16
EPOCHS = 16  # of either stage at most; validation ends them earlier
LEAST, MOST = 60, 1200  # steps of a stage
VALIDATIONS, PATIENCE = 20, 5
CURVE = (0.125, 0.25, 0.5)  # shares of the training systems, before all of them


def options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train the encoder's energies and then the joint stage on a data set of `catmllm data import`, at a "
        "third of the rates of training from scratch, until validation no longer improves; of texts without "
        "structures the joint stage alone. The report sets the result beside the mean per adsorbate, ridge, "
        "kernel ridge on local features and the model as it was."
    )
    parser.add_argument(
        "model",
        nargs="?",
        type=Path,
        default=SHIPPED,
        help="folder of a run (its best stage is taken) or of a stage (default: the model that comes with "
        "the package)",
    )
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="by `catmllm data import`")
    parser.add_argument("--out", type=Path, help="folder of the new run (default: runs/<model>-<data>)")
    parser.add_argument(
        "--learning-curve",
        action="store_true",
        help="also train on an eighth, a quarter and a half of the training systems",
    )
    parser.add_argument(
        "--leave-one-out",
        choices=("metal", "adsorbate", "formula"),
        metavar="BY",
        help="a run for each metal, adsorbate or formula, which that run has never seen and is tested on",
    )
    parser.add_argument(
        "--set",
        dest="changes",
        nargs="+",
        action="extend",
        default=[],
        metavar="key=value",
        help="as in training: data.split_by=metal data.hold_out=[Pt]",
    )


def run(args: argparse.Namespace) -> int:
    from catmllm.data.open import open_data, texts_only
    from catmllm.data.shards import Shards
    from catmllm.design.domain import load_domain
    from catmllm.pipeline import run

    folder = best_stage(args.model)
    out = args.out or Path("runs") / f"{args.model.name}-{args.data.name}"
    config = configured(folder, args.data, out, args.changes)
    train = open_data(config.data)["train"]
    n = len(train)
    if texts_only(train):
        args.changes = ["stages=[joint]", *args.changes]
        config = configured(folder, args.data, out, args.changes)
    domain, said = load_domain(folder), train.facts.get("reference") if isinstance(train, Shards) else None
    if domain is not None and domain.reference != said:
        print(
            f"the model's zero of energy is {domain.reference or 'not said'}, the data's is "
            f"{said or 'not said'}: the new model predicts on the data's"
        )
    if args.leave_one_out:
        return _leave_one_out(args, folder, out, config)
    sizes = [s for share in CURVE if (s := int(n * share)) >= 8] if args.learning_curve else []
    for some in sizes:
        changes = [*args.changes, f"data.train_systems={some}"]
        if status := run(configured(folder, args.data, out / "curve" / str(some), changes, some)):
            return status
    status = run(configured(folder, args.data, out, args.changes, n))
    if not status and args.learning_curve:
        folders = [out / "curve" / str(s) for s in sizes]
        print(_errors("training systems", [f"{s:,}" for s in (*sizes, n)], [*folders, out]))
    return status


def _leave_one_out(args: argparse.Namespace, folder: Path, out: Path, config: Config) -> int:
    """A run for each name of the kind, held out; then the errors of all."""
    from catmllm.data.open import open_data
    from catmllm.pipeline import run

    by = args.leave_one_out

    def of(system: System) -> list[str]:
        kinds = {"metal": [*system.slab_counts], "adsorbate": [system.adsorbate], "formula": [system.bulk]}
        return kinds[by]

    systems = [s for part in open_data(config.data).values() for s in part]
    names = sorted({name for s in systems for name in of(s)})
    rest = {name: sum(name not in of(s) for s in systems) for name in names}
    for name in [name for name, n in rest.items() if not n]:
        print(f"every system has {name}, so it is not left out: nothing would be left to train on")
        del rest[name]
    for name, n in rest.items():
        changes = [*args.changes, f"data.split_by={by}", f'data.hold_out=["{name}"]']
        if status := run(configured(folder, args.data, out / f"without-{name}", changes, n)):
            return status
    print(_errors(f"{by} left out", [*rest], [out / f"without-{name}" for name in rest]))
    return 0


def configured(folder: Path, data: Path, out: Path, changes: list[str], n: int = LEAST) -> Config:
    """The configuration that a stage was trained with, for two stages from its weights on n training systems
    of other data, and then the user's changes."""
    import yaml

    from catmllm.config import from_dict, load_config

    path = folder / "catmllm.json"
    tree = json.loads(path.read_text(encoding="utf-8"))
    from_dict(tree, str(path))  # what is wrong with the file is said of the file
    tree |= {"stages": ["encoder", "joint"], "init": str(folder), "out": str(out)}
    tree["data"] |= {"path": str(data), "split_by": "pair", "hold_out": None, "train_systems": None}
    for stage in ("encoder", "joint"):
        steps = max(LEAST, min(MOST, EPOCHS * n // BATCH))
        tree[stage] |= {
            "lr": tree[stage]["lr"] / 3, "batch_size": BATCH, "accumulate": 1, "steps": steps,
            "validate_every": max(1, steps // VALIDATIONS), "patience": PATIENCE,
        }  # fmt: skip
    tree["joint"] |= {"property_share": 0.9, "design_share": 0.05, "exchange": 0.0}  # CIFs of slabs at hand
    with tempfile.TemporaryDirectory() as place:
        saved = Path(place) / "finetune.yaml"
        saved.write_text(yaml.safe_dump(tree), encoding="utf-8")
        return load_config([saved], changes)


def _errors(title: str, names: list[str], folders: list[Path]) -> str:
    """A table of the test errors of runs, beside the mean of the adsorbate and the model as it was."""
    lines = ["", f"{title:>18}   test MAE (eV): fine-tuned, as it was, mean per adsorbate"]
    for name, folder in zip(names, folders):
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        joint = metrics["property"]["joint"]
        found = [(joint.get("both") or joint["ensemble"])["mae"]]
        found += [
            metrics["baselines"].get(k, {}).get("mae", float("nan")) for k in ("zero_shot", "adsorbate_mean")
        ]
        lines.append(f"{name:>18}   " + "  ".join(f"{value:.3f}" for value in found))
    return "\n".join(lines)
