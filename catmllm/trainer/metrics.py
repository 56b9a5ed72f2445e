"""What a run leaves to read while it trains: JSONL, TensorBoard, a progress bar."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm


class StageLog:
    """One stage's record on the main rank; on the others every call does nothing.

    `log.jsonl` has a row a logged step. On resume, rows at or after the step resumed from are dropped, so that the
    file reads as if the run had never stopped.
    """

    def __init__(
        self, folder: Path, stage: str, first_step: int, steps: int, main: bool, tensorboard: bool
    ) -> None:
        self.main = main
        if not main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "log.jsonl"
        kept = [row for row in read_log(path) if row["step"] < first_step]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self.file = path.open("a")
        self.board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder.parent / "tensorboard" / stage), purge_step=first_step)
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
