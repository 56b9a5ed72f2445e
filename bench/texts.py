"""A model of texts only beside ridge regression on words, on splits of the shipped systems' texts: by the
product's own commands, a run each.

    python bench/texts.py            # five splits on two ranks, some twenty minutes
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path

if __package__:
    from bench import record
else:
    import record

from catmllm.data.slabs import load_slabs
from catmllm.structure.text import three_part_text

SPLITS = 5
WHO = {"ensemble": "mean of both", "text": "the model alone"}


def main() -> int:
    args = record.arguments(__doc__).parse_args()
    splits, changes = (2, ["joint.steps=20", "joint.validate_every=10"]) if args.quick else (SPLITS, [])
    errors: dict[str, list[float]] = {name: [] for name in (*WHO.values(), "ridge on words")}
    shares = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        with (folder / "texts.csv").open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["id", "text", "energy"])
            rows.writerows([s.sid, three_part_text(s), s.known_energy] for s in load_slabs())
        call("catmllm.cli", "data", "import", str(folder / "texts.csv"), "--out", str(folder / "data"))
        for seed in range(splits):
            given = [f"data.path={folder / 'data'}", f"data.split_seed={seed}", f"out={folder / str(seed)}"]
            config = str(record.TREE / "configs/tiny/text.yaml")
            torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
            call(*torchrun, str(record.TREE / "catmllm/train.py"), config, *given, *changes)
            found = json.loads((folder / str(seed) / "metrics.json").read_text())
            for kind, who in WHO.items():
                errors[who].append(found["property"]["joint"][kind]["mae"])
            errors["ridge on words"].append(found["baselines"]["text_ridge"]["mae"])
            shares.append(found["ensemble"]["joint"]["share"])
            print(f"split {seed}: { {who: round(e[-1], 3) for who, e in errors.items()} }", file=sys.stderr)
    about = {"splits": splits, "by split": errors, "share of the model": shares}
    says = "test MAE of a model of texts only, of ridge regression on words, and of their weighted mean"
    record.finish(args, [record.claim("texts", says, "eV", {"texts": errors}, about)])
    return 0


def call(module: str, *words: str) -> None:
    """A command of this Python in its own process; what it says is shown where it fails."""
    done = subprocess.run([sys.executable, "-m", module, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{module} {' '.join(words)}: status {done.returncode}\n{done.stderr[-2000:]}")


if __name__ == "__main__":
    sys.exit(main())
