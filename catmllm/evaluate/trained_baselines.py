"""What networks of others share as baselines: the run whose data and split they take, the loop that trains
them, and the record of their errors beside that run."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from catmllm.config import from_dict
from catmllm.data.open import open_data
from catmllm.data.subsets import learned
from catmllm.evaluate.baselines import TRAINED, AdsorbateMean, energies, for_baselines
from catmllm.evaluate.metrics import mae, r2
from catmllm.structure.system import System

Floats = np.ndarray
Predict = Callable[[Sequence[System]], Floats]  # energies (eV) [n]
# One number [n] of each system; with a generator as in training, where inputs may have noise.
Outputs = Callable[[torch.nn.Module, Sequence[System], np.random.Generator | None], torch.Tensor]
BATCH = 32


class Record:
    """`baselines.json` of a run, written after each network. What it has of the same split, by the same
    settings, stays."""

    def __init__(self, run: Path) -> None:
        metrics = run / "metrics.json"
        if not metrics.is_file():
            raise SystemExit(f"{run}: no metrics.json there; give the folder of a run")
        self.config = from_dict(json.loads(metrics.read_text())["config"], str(metrics))
        data = self.config.data
        self.path, cell = run / TRAINED, {"path": data.path, "split_seed": data.split_seed}
        found = json.loads(self.path.read_text()) if self.path.is_file() else {}
        fresh: dict[str, Any] = {"cell": cell, "baselines": {}}
        self.values = found if found.get("cell") == cell else fresh

    def parts(self) -> dict[str, Sequence[System]]:
        """The systems of the run, by split: those that its other baselines are fitted to and measured on."""
        data = learned(open_data(self.config.data), self.config.data)
        return for_baselines(data, self.config.evaluate.property_systems)

    def keeps(self, name: str, settings: Mapping[str, Any]) -> bool:
        """Whether a row is there that was measured with these settings; of a row that is there it says what
        becomes of it."""
        row = self.values["baselines"].get(name)
        kept = row is not None and row.get("settings") == settings
        if row is not None:
            before = row.get("settings", "settings that were not kept")
            print(f"{name}: {'kept' if kept else f'measured anew, as it was made with {before}'}", flush=True)
        return kept

    def measure(
        self,
        name: str,
        train: Callable[[], Predict],
        test: Sequence[System],
        starts: bool,
        settings: Mapping[str, Any],
    ) -> None:
        """Train, and keep MAE (eV), R², CPU seconds and the settings; with `starts` also of the systems as
        they started, where all have a start."""
        began = time.process_time()
        predict, wanted = train(), energies(test)

        def errors(systems: Sequence[System]) -> dict[str, Any]:
            predicted = predict(systems)
            return {"mae": mae(predicted, wanted), "r2": r2(predicted, wanted)}

        found = errors(test)
        if starts and all(s.start is not None for s in test):
            found["start"] = errors([s.frame(0.0) for s in test])
        found |= {"seconds": round(time.process_time() - began, 1), "settings": dict(settings)}
        self.values["baselines"][name] = found
        self.path.with_suffix(".tmp").write_text(json.dumps(self.values, indent=1))
        self.path.with_suffix(".tmp").rename(self.path)
        print(f"{name}: test MAE {found['mae']:.3f} eV, {found['seconds']:.0f} s", flush=True)


def fitted(
    model: torch.nn.Module,
    outputs: Outputs,
    parts: Mapping[str, Sequence[System]],
    steps: int,
    rng: np.random.Generator,
    lr: float = 1e-3,
    share: float = 0.0,
    size: int = BATCH,
) -> Predict:
    """A predictor: L1 on standardised energies of what the mean of the adsorbate leaves, AdamW with warm-up
    and cosine on batches of `size`, the running mean of the weights over a seventh of the steps; of it the
    best on validation, looked at ten times. share: of samples between start and end of their relaxation."""
    train, val = parts["train"], parts["val"]
    mean = AdsorbateMean.fit(train)
    left = energies(train) - mean.predict(train)
    scale = float(left.std())
    decay = max(0.0, 1 - 7.5 / steps)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
    )
    best: tuple[float, dict[str, torch.Tensor]] = math.inf, {}

    def predict(systems: Sequence[System]) -> Floats:
        average.eval()
        with torch.no_grad():
            values = [
                outputs(average, systems[i : i + 4 * BATCH], None) for i in range(0, len(systems), 4 * BATCH)
            ]
        return torch.cat(values).double().numpy() * scale + mean.predict(systems)

    order = shuffled_rows(len(train), rng)
    descend = descent(model, lr, steps)
    for step in range(steps):
        rows = [next(order) for _ in range(size)]
        shown = [
            s.frame(float(rng.random())) if s.start is not None and rng.random() < share else s
            for s in (train[i] for i in rows)
        ]
        model.train()
        energy = outputs(model, shown, rng)
        loss = (energy - torch.tensor(left[rows] / scale, dtype=torch.float32)).abs().mean()
        descend(loss)
        average.update_parameters(model)
        if (step + 1) % max(1, steps // 10) == 0 or step + 1 == steps:
            error = mae(predict(val), energies(val)) if val else 0.0
            print(f"  step {step + 1}: loss {loss.item():.3f}, validation {error:.3f} eV", flush=True)
            if error <= best[0]:
                best = error, {k: v.clone() for k, v in average.state_dict().items()}
    average.load_state_dict(best[1])
    return predict


def descent(model: torch.nn.Module, lr: float, steps: int) -> Callable[[torch.Tensor], None]:
    """What takes a loss and makes one of so many steps: AdamW with warm-up and cosine, gradients of a norm of
    at most 10."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-4, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))

    def descend(loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        schedule.step()

    return descend


def _rate(step: int, steps: int) -> float:
    warmup = min(50, steps // 10 + 1)
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def shuffled_rows(n: int, rng: np.random.Generator) -> Iterator[int]:
    """0 to n - 1 in random order, again and again."""
    while True:
        yield from rng.permutation(n).tolist()
