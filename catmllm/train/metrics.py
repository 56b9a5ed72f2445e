"""What a run leaves to read while it trains: JSONL, TensorBoard, Weights & Biases, MLflow, trackio,
a progress bar."""

from __future__ import annotations

import hashlib
import importlib
import json
import time
from collections.abc import Callable
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
        self.main, self.stage, self.folder = main, stage, folder
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
        self.trackers = trackers(folder, stage, config)
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
        for tracker in self.trackers:
            tracker.row(step, values)

    def table(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Keep a table of what people read, in tables/step-N.jsonl and wherever the numbers go."""
        if not self.main or not rows:
            return
        path = self.folder / "tables" / f"step-{step:07d}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for tracker in self.trackers:
            tracker.table(step, rows)

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
            for tracker in self.trackers:
                tracker.end(kind is None)


class Tracker:
    """Where a run's numbers and tables go besides its folder; this one is nowhere."""

    def row(self, step: int, values: dict[str, Any]) -> None:
        """One row of numbers."""

    def table(self, step: int, rows: list[dict[str, Any]]) -> None:
        """A table of texts and numbers."""

    def end(self, well: bool) -> None:
        """The stage has ended, well or not."""


class WandB(Tracker):
    def __init__(self, folder: Path, stage: str, config: Config, project: str) -> None:
        self.module = optional("wandb")
        self.run = self.module.init(
            project=project,
            name=f"{folder.parent.name}/{stage}",
            group=folder.parent.name,
            id=run_id(folder),
            resume="allow",
            config=to_dict(config),
        )

    def row(self, step: int, values: dict[str, Any]) -> None:
        self.run.log(values, step=step)

    def table(self, step: int, rows: list[dict[str, Any]]) -> None:
        columns = list(rows[0])
        data = [[row[c] for c in columns] for row in rows]
        self.run.log({"answers": self.module.Table(columns=columns, data=data)}, step=step)

    def end(self, well: bool) -> None:
        self.run.finish(exit_code=0 if well else 1)


class MLflow(Tracker):
    """Where is for MLflow to know: MLFLOW_TRACKING_URI, or ./mlruns."""

    def __init__(self, folder: Path, stage: str, config: Config, experiment: str) -> None:
        self.module = optional("mlflow", "mlflow-skinny")
        self.client = self.module.MlflowClient()
        found = self.client.get_experiment_by_name(experiment)
        where = found.experiment_id if found else self.client.create_experiment(experiment)
        known = self.client.search_runs([where], f"tags.catmllm = '{run_id(folder)}'", max_results=1)
        if known:  # a stage that goes on
            self.id = known[0].info.run_id
            self.client.set_terminated(self.id, "RUNNING")
        else:
            name = f"{folder.parent.name}/{stage}"
            made = self.client.create_run(where, run_name=name, tags={"catmllm": run_id(folder)})
            self.id = made.info.run_id
            self.client.log_dict(self.id, to_dict(config), "config.json")

    def row(self, step: int, values: dict[str, Any]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self.client.log_batch(self.id, [Metric(k, float(v), now, step) for k, v in values.items()])

    def table(self, step: int, rows: list[dict[str, Any]]) -> None:
        self.client.log_dict(self.id, rows, f"answers/step-{step:07d}.json")

    def end(self, well: bool) -> None:
        self.client.set_terminated(self.id, "FINISHED" if well else "FAILED")


class Trackio(Tracker):
    def __init__(self, folder: Path, stage: str, config: Config, project: str) -> None:
        self.module = optional("trackio")
        name = f"{folder.parent.name}-{stage}-{run_id(folder)[:6]}"
        self.module.init(project=project, name=name, config=to_dict(config), resume="allow")

    def row(self, step: int, values: dict[str, Any]) -> None:
        self.module.log(values, step=step)

    def table(self, step: int, rows: list[dict[str, Any]]) -> None:
        import pandas

        self.module.log({"answers": self.module.Table(dataframe=pandas.DataFrame(rows))}, step=step)

    def end(self, well: bool) -> None:
        self.module.finish()


KINDS: dict[str, Callable[[Path, str, Config, str], Tracker]] = {
    "wandb": WandB, "mlflow": MLflow, "trackio": Trackio,
}  # fmt: skip


def trackers(folder: Path, stage: str, config: Config) -> list[Tracker]:
    """Those that the configuration names."""
    named = {key: getattr(config, key) for key in KINDS}
    return [KINDS[key](folder, stage, config, where) for key, where in named.items() if where is not None]


def run_id(folder: Path) -> str:
    """A name that a stage keeps when it goes on."""
    return hashlib.sha1(str(folder.resolve()).encode()).hexdigest()[:16]


def optional(name: str, package: str | None = None) -> Any:
    """An optional package, or one clear error."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"`{name}` is set, but the package is missing: pip install {package or name}, or leave it out"
        ) from error


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
