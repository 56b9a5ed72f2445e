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
import sys
import types
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from catmllm.evaluate.baselines import energies
from catmllm.evaluate.trained_baselines import BATCH, Floats, Predict, Record, fitted
from catmllm.seeds import Stream, generator, hash_seed
from catmllm.structure.system import ADSORBATE, System

MODELS = ("schnet", "painn", "chgnet")
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
    record = Record(args.run)
    parts = record.parts()
    for model in args.models:
        for share in args.frames if model != "chgnet" else (0.0,):
            name = f"{model}_frames" if share else model

            def train(model: str = model, share: float = share) -> Predict:
                return chgnet(parts["train"]) if model == "chgnet" else trained(model, parts, share, args)

            if name not in record:
                record.measure(name, train, parts["test"], starts=True)
    return 0


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
) -> Predict:
    """A predictor as `fitted` makes it, of positions with noise. share: of samples that stand between start
    and end of their relaxation."""
    key = Stream.NETWORK_BASELINES.key(args.seed)
    torch.manual_seed(hash_seed(key))
    model = network(name)
    return fitted(model, _of_systems, parts, args.steps, generator(key), share=share)


def _of_systems(
    model: torch.nn.Module, systems: Sequence[System], rng: np.random.Generator | None
) -> torch.Tensor:
    return _outputs(model, batch(systems, rng))


def _outputs(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    """One number a system. PaiNN's are sums over the atoms, which an adsorption energy is not."""
    energy: torch.Tensor = model(batch)["energy"].reshape(-1)
    inner = getattr(model, "module", model)
    return energy if getattr(inner, "reduce", None) == "mean" else energy / batch.natoms


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


def chgnet(train: Sequence[System]) -> Predict:
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
