"""`catmllm evaluate`: measure the stages of a run again and rewrite its report."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

HELP = "measure the stages of a run again and rewrite its report"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="folder of a run, runs/tiny for example")
    parser.add_argument("--report-only", action="store_true", help="rewrite report.html from metrics.json")


def run(args: argparse.Namespace) -> int:
    from catmllm.config import from_dict
    from catmllm.report.run import write_report

    if (args.run / "model.safetensors").is_file() and (args.run.parent / "metrics.json").is_file():
        args.run = args.run.parent  # a stage's folder: its run is meant
    path = args.run / "metrics.json"
    if not path.is_file():
        raise FileNotFoundError(f"{args.run}: no metrics.json there; give the folder of a run")
    if args.report_only:
        print(write_report(args.run))
        return 0
    from catmllm.pipeline import run

    metrics = json.loads(path.read_text())
    config = from_dict(metrics["config"], str(path))
    config.out = str(args.run)
    done = [s for s in config.stages if (args.run / s / "model.safetensors").is_file()]
    if len(done) < len(config.stages):
        missing = [s for s in config.stages if s not in done]
        raise ValueError(f"{args.run}: not trained yet: {', '.join(missing)}; run train.py again to go on")
    for part in ("property", "generation", "design"):
        metrics.pop(part, None)
    metrics["config"]["out"] = config.out
    path.write_text(json.dumps(metrics, indent=1))
    return run(config)
