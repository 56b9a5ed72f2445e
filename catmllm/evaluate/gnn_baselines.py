"""Graph networks that others wrote, on the systems and the split of a run: SchNet and PaiNN of fairchem 1.10,
trained, and CHGNet as it comes, with an offset an adsorbate.

    make baselines RUN=runs/tiny            # in an environment of its own; adds runs/tiny/baselines.json
    python -m catmllm.evaluate.gnn_baselines runs/tiny --models painn --frames 0

The report of the run shows them beside its own baselines. fairchem 1.10 pins an old torch and imports
torch_scatter, so it is installed without its dependencies and finds PyTorch Geometric's functions under that
name.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import types
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from catmllm.config import from_dict
from catmllm.data.open import open_data
from catmllm.evaluate.baselines import TRAINED, AdsorbateMean, energies, some
from catmllm.evaluate.metrics import mae, r2
from catmllm.seeds import Stream, generator, hash_seed
from catmllm.structure.system import ADSORBATE, System

Floats = np.ndarray
MODELS = ("schnet", "painn", "chgnet")
BATCH = 32
OFFSETS = 40  # training systems an adsorbate by which CHGNet's offsets are set


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and measure; writes after each model, and trains none again that is there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run, whose data and split are taken")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--steps", type=int, default=1500, help=f"of {BATCH} systems each (default: 1500)")
    parser.add_argument(
        "--frames",
        nargs="+",
        type=float,
        default=[0.0, 0.4],
        help="shares of samples between start and end of the relaxation, a training each (default: 0 0.4)",
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    path = args.run / "metrics.json"
    if not path.is_file():
        raise SystemExit(f"{args.run}: no metrics.json there; give the folder of a run")
    data = from_dict(json.loads(path.read_text())["config"], str(path)).data
    cell = {"path": data.path, "split_seed": data.split_seed}
    file = args.run / TRAINED
    record = _record(file, cell)
    parts = {name: some(systems) for name, systems in open_data(data).items()}
    for model in args.models:
        for share in args.frames if model != "chgnet" else (0.0,):
            name = f"{model}_frames" if share else model
            if name in record["baselines"]:
                continue
            began = time.process_time()
            predict = chgnet(parts["train"]) if model == "chgnet" else trained(model, parts, share, args)
            found = _errors(predict, parts["test"])
            found["seconds"] = round(time.process_time() - began, 1)
            record["baselines"][name] = found
            file.with_suffix(".tmp").write_text(json.dumps(record, indent=1))
            file.with_suffix(".tmp").rename(file)
            print(f"{name}: test MAE {found['mae']:.3f} eV, {found['seconds']:.0f} s", flush=True)
    return 0


def _record(path: Path, cell: Mapping[str, Any]) -> dict[str, Any]:
    """What is there of the same split, else a new record."""
    found = json.loads(path.read_text()) if path.is_file() else {}
    return found if found.get("cell") == cell else {"cell": cell, "baselines": {}}


def _errors(predict: Callable[[Sequence[System]], Floats], test: Sequence[System]) -> dict[str, Any]:
    wanted = energies(test)

    def errors(systems: Sequence[System]) -> dict[str, Any]:
        predicted = predict(systems)
        return {"mae": mae(predicted, wanted), "r2": r2(predicted, wanted)}

    found = errors(test)
    if all(s.start is not None for s in test):
        found["start"] = errors([s.frame(0.0) for s in test])
    return found


# --------------------------------------------------------------------------- fairchem


def network(name: str) -> torch.nn.Module:
    """SchNet or PaiNN of fairchem 1.10, of a size that suits thousands of systems, on the graphs of the
    shipped pipeline (6 Å, 12 neighbours). Raises ImportError with the command that installs it."""
    _stand_in_for_torch_scatter()
    try:
        from fairchem.core.models.painn import painn
        from fairchem.core.models.schnet import SchNetWrap
    except ImportError as error:
        raise ImportError(f"{error}: `make baselines` installs fairchem 1.10 beside torch") from error
    common = {"cutoff": 6.0, "use_pbc": True, "otf_graph": True, "regress_forces": False}
    if name == "schnet":
        model = SchNetWrap(hidden_channels=64, num_filters=64, num_interactions=3, readout="mean", **common)
        model.max_neighbors = 12
        return model
    return painn.PaiNN(hidden_channels=64, num_layers=3, num_rbf=32, max_neighbors=12, **common)


def _stand_in_for_torch_scatter() -> None:
    """The functions that fairchem takes from it by those of PyTorch Geometric, and a name that GemNet's files
    import from torch_sparse, which neither network here calls."""
    from torch_geometric.utils import scatter, segment

    if "torch_scatter" in sys.modules:
        return
    module: Any = types.ModuleType("torch_scatter")
    module.scatter = lambda src, index, dim=-1, out=None, dim_size=None, reduce="sum": scatter(
        src, index, dim % src.dim(), dim_size, reduce
    )
    module.segment_coo = lambda src, index, out=None, dim_size=None, reduce="sum": scatter(
        src, index, 0, dim_size, reduce
    )
    module.segment_csr = lambda src, indptr, out=None, reduce="sum": segment(src, indptr, reduce)
    sparse: Any = types.ModuleType("torch_sparse")
    sparse.SparseTensor = None
    sys.modules |= {"torch_scatter": module, "torch_sparse": sparse}


def trained(
    name: str, parts: Mapping[str, Sequence[System]], share: float, args: argparse.Namespace
) -> Callable[[Sequence[System]], Floats]:
    """A predictor of energies (eV): L1 on standardised energies of what the mean of the adsorbate leaves,
    AdamW with warm-up and cosine, the running mean of the weights; of it the best on validation, looked at
    ten times. share: of samples that stand between start and end of their relaxation."""
    key = Stream.NETWORK_BASELINES.key(args.seed)
    torch.manual_seed(hash_seed(key))
    rng = generator(key)
    model = network(name)
    train, val = parts["train"], parts["val"]
    mean = AdsorbateMean.fit(train)
    left = energies(train) - mean.predict(train)
    scale = float(left.std())
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, args.steps))
    best: tuple[float, dict[str, torch.Tensor]] = math.inf, {}

    def predict(systems: Sequence[System]) -> Floats:
        average.eval()
        with torch.no_grad():
            values = [
                _outputs(average, batch(systems[i : i + 4 * BATCH]))
                for i in range(0, len(systems), 4 * BATCH)
            ]
        return torch.cat(values).double().numpy() * scale + mean.predict(systems)

    order = _order(len(train), rng)
    for step in range(args.steps):
        rows = [next(order) for _ in range(BATCH)]
        shown = [
            s.frame(float(rng.random())) if s.start is not None and rng.random() < share else s
            for s in (train[i] for i in rows)
        ]
        model.train()
        energy = _outputs(model, batch(shown, rng))
        loss = (energy - torch.tensor(left[rows] / scale, dtype=torch.float32)).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        if (step + 1) % max(1, args.steps // 10) == 0 or step + 1 == args.steps:
            error = mae(predict(val), energies(val)) if val else 0.0
            print(f"  {name} step {step + 1}: loss {loss.item():.3f}, validation {error:.3f} eV", flush=True)
            if error <= best[0]:
                best = error, {k: v.clone() for k, v in average.state_dict().items()}
    average.load_state_dict(best[1])
    return predict


def _outputs(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    """One number a system. PaiNN's are sums over the atoms, which an adsorption energy is not."""
    energy: torch.Tensor = model(batch)["energy"].reshape(-1)
    inner = getattr(model, "module", model)
    return energy if getattr(inner, "reduce", None) == "mean" else energy / batch.natoms


def _rate(step: int, steps: int) -> float:
    warmup = min(50, steps // 10 + 1)
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _order(n: int, rng: np.random.Generator) -> Iterator[int]:
    while True:
        yield from rng.permutation(n).tolist()


def batch(systems: Sequence[System], rng: np.random.Generator | None = None) -> Any:
    """fairchem's input; with `rng` positions have a Gaussian noise of 0.02 Å."""
    from torch_geometric.data import Batch, Data

    def data(s: System) -> Any:
        positions = s.positions + (0.0 if rng is None else rng.normal(0, 0.02, s.positions.shape))
        return Data(
            pos=torch.tensor(positions, dtype=torch.float32),
            cell=torch.tensor(s.lattice, dtype=torch.float32)[None],
            atomic_numbers=torch.tensor(s.numbers, dtype=torch.long),
            natoms=torch.tensor([len(s)]),
        )

    return Batch.from_data_list([data(s) for s in systems])


# --------------------------------------------------------------------------- CHGNet


def chgnet(train: Sequence[System]) -> Callable[[Sequence[System]], Floats]:
    """CHGNet's own weights, of which no energy here was learned: E(slab with adsorbate) - E(slab) of the
    structure as it stands, and for each adsorbate the offset that fits some training systems best."""
    from chgnet.model import CHGNet
    from pymatgen.core import Lattice, Structure

    model = CHGNet.load(use_device="cpu", verbose=False)

    def total(lattice: Floats, numbers: Floats, frac: Floats) -> Any:
        return Structure(Lattice(lattice), numbers.tolist(), frac)

    def raw(systems: Sequence[System]) -> Floats:
        slabs: dict[bytes, int] = {}
        structures: list[Any] = []
        which = []
        for s in systems:
            bare = s.tags != ADSORBATE
            key = s.lattice.tobytes() + s.frac[bare].tobytes() + s.numbers[bare].tobytes()
            if key not in slabs:
                slabs[key] = len(structures)
                structures.append(total(s.lattice, s.numbers[bare], s.frac[bare]))
            which.append((len(structures), slabs[key]))
            structures.append(total(s.lattice, s.numbers, s.frac))
        found = model.predict_structure(structures, task="e", batch_size=16)
        energy = np.array([float(f["e"]) * len(s) for f, s in zip(found, structures)])  # CHGNet: eV an atom
        return np.array([energy[whole] - energy[slab] for whole, slab in which])

    groups: dict[str, list[System]] = defaultdict(list)
    for s in train:
        groups[s.adsorbate].append(s)
    chosen = [s for members in groups.values() for s in members[:: -(-len(members) // OFFSETS)]]
    rest = energies(chosen) - raw(chosen)
    names = np.array([s.adsorbate for s in chosen])
    offsets = {name: float(np.median(rest[names == name])) for name in groups}
    overall = float(np.median(rest))

    def predict(systems: Sequence[System]) -> Floats:
        return raw(systems) + np.array([offsets.get(s.adsorbate, overall) for s in systems])

    return predict


if __name__ == "__main__":
    sys.exit(main())
