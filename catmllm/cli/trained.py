"""The trained model that a subcommand works with."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from catmllm.models import SHIPPED

if TYPE_CHECKING:
    from catmllm.config import Config
    from catmllm.data.batches import Collator
    from catmllm.models.catalytic_mllm import CatalyticMLLM


def model_option(parser: argparse.ArgumentParser, stage: str = "last finished stage") -> None:
    """`--model`, the same for every subcommand, but for which stage of a run it takes."""
    parser.add_argument(
        "--model",
        type=Path,
        default=SHIPPED,
        help=f"folder of a run (its {stage} is taken), of one stage or of an export of the layout hf "
        "(default: the model that comes with the package)",
    )


def load(folder: Path) -> tuple[CatalyticMLLM, Collator, Config]:
    """Model, collator and configuration of a stage's or a run's folder, the latter settled for the model's
    device."""
    from transformers.utils import logging

    from catmllm.models.state import load_model, stage_folder
    from catmllm.world import settled

    logging.disable_progress_bar()  # of an export's files
    model, collate, config = load_model(stage_folder(folder))
    return model, collate, settled(config, model.energy_mean.device.type)


def load_to_read(folder: Path) -> tuple[CatalyticMLLM, Collator, Config]:
    """As `load`, the model in the precision that its training would have on this device."""
    from catmllm.models.half_precision import rounded
    from catmllm.world import DTYPES, encoder_dtype

    model, collate, config = load(folder)
    return rounded(model, DTYPES[config.precision], encoder_dtype(config)), collate, config


def best_stage(folder: Path) -> Path:
    """The stage of a run whose energies are nearest on the validation systems, the later of two alike; the
    last finished one where not every stage with energies was validated; a stage's folder itself."""
    from catmllm.config import STAGES
    from catmllm.design.domain import load_domain
    from catmllm.models.state import stage_folder

    last = stage_folder(folder)
    if last == folder:
        return last
    finished = [folder / s for s in STAGES if (folder / s / "model.safetensors").is_file()]
    errors = {f: d.validation.get("mae") for f in finished if (d := load_domain(f)) is not None}
    asked = [f for f in finished if f.name not in ("encoder", "align")]
    found = {f: e for f, e in errors.items() if e is not None}
    if not asked or any(f not in found for f in asked):
        return last
    return min(reversed(asked), key=lambda f: found[f])


def must_write(folder: Path, config: Config) -> None:
    """Raises ValueError for a stage whose model has not learned to write CIFs."""
    from catmllm.evaluate.ensemble import load_ensemble

    reason = ""
    if folder.name in ("encoder", "align"):
        reason = f"`{folder.name}` comes before the stages that teach it"
    elif load_ensemble(folder) is not None:
        reason = "it was trained on texts alone"
    elif folder.name == "joint" and config.joint.property_share == 1:
        reason = "it was trained with joint.property_share 1"
    if reason:
        raise ValueError(f"{folder}: this model writes no CIFs, for {reason}; give --text, or another model")
