"""What a run leaves to read while it trains: JSONL, TensorBoard, Weights & Biases, a progress bar."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from catmllm.config import Config, to_dict


class StageLog:
    """One stage's record on the main rank; on the others every call does nothing.

    `log.jsonl` has a row a logged step. On resume, rows at or after the step resumed from are dropped, so
    that the file reads as if the run had never stopped.
    """

    def __init__(
        self, folder: Path, stage: str, first_step: int, steps: int, config: Config, main: bool
    ) -> None:
        self.main, self.stage = main, stage
        if not main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "log.jsonl"
        kept = [row for row in read_log(path) if row["step"] < first_step]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self.file = path.open("a")
        self.board = None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder.parent / "tensorboard" / stage), purge_step=first_step)
        self.wandb = None
        if config.wandb is not None:
            self.wandb = wandb_module().init(
                project=config.wandb,
                name=f"{folder.parent.name}/{stage}",
                group=folder.parent.name,
                id=hashlib.sha1(str(folder.resolve()).encode()).hexdigest()[:16],
                resume="allow",
                config=to_dict(config),
            )
        self.bar = tqdm(total=steps, initial=first_step, desc=f"{stage:9s}", mininterval=2.0, unit="step")

    def row(self, step: int, values: dict[str, Any]) -> None:
        """Keep one row of numbers."""
        if not self.main:
            return
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        if self.board is not None:
            for key, value in values.items():
                self.board.add_scalar(key, value, step)
        if self.wandb is not None:
            self.wandb.log(values, step=step)

    def note(self, text: str | None) -> None:
        """Print beside the bar."""
        if self.main and text:
            self.bar.write(text)

    def tick(self, shown: dict[str, str]) -> None:
        if self.main:
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update()

    def __enter__(self) -> StageLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.main:
            self.bar.close()
            self.file.close()
            if self.board is not None:
                self.board.close()
            if self.wandb is not None:
                self.wandb.finish(exit_code=0 if kind is None else 1)


def wandb_module() -> Any:
    """The optional wandb package, or one clear error."""
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise ValueError(
            "`wandb` is set, but the package is missing: pip install wandb, or leave it out"
        ) from error
    return wandb


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a `log.jsonl`; a torn last line (the run was killed while writing it) is left out."""
    rows = []
    if path.is_file():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows
