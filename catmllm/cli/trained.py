"""The trained model that a subcommand works with."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from catmllm.config import Config
    from catmllm.data.batches import Collator
    from catmllm.models.catalytic_mllm import CatalyticMLLM


def model_option(parser: argparse.ArgumentParser) -> None:
    """`--model`, the same for every subcommand."""
    parser.add_argument(
        "--model",
        type=Path,
        default=Path("runs/tiny"),
        help="folder of a run (its last finished stage is taken) or of one stage (default: runs/tiny)",
    )


def load(folder: Path) -> tuple[CatalyticMLLM, Collator, Config]:
    """Model, collator and configuration of a stage's or a run's folder."""
    from catmllm.models.state import load_model

    return load_model(stage_folder(folder))


def stage_folder(folder: Path) -> Path:
    """The folder itself, or the last finished stage of a run."""
    from catmllm.config import STAGES

    if not (folder / "model.safetensors").is_file():
        stages = [folder / s for s in STAGES if (folder / s / "model.safetensors").is_file()]
        if not stages:
            raise FileNotFoundError(f"{folder}: no trained stage there; `make run` trains one into runs/tiny")
        folder = stages[-1]
    return folder
