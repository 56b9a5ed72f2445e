"""Graph networks that others wrote, on the systems and the split of a run: SchNet, PaiNN, DimeNet++ and
GemNet-OC of fairchem 1.10, trained, and CHGNet as it comes, with an offset an adsorbate.

    make baselines RUN=runs/tiny            # in an environment of its own; adds runs/tiny/baselines.json
    python -m catmllm.evaluate.gnn_baselines runs/tiny --models painn --frames 0
    python -m catmllm.evaluate.gnn_baselines runs/tiny --models chgnet --calculator FILE:NAME

The report of the run shows them beside its own baselines. fairchem 1.10 pins an old torch and imports
torch_scatter and torch_sparse, so it is installed without its dependencies. It finds PyTorch Geometric's
functions and `SparseRows` under those names.
"""

from __future__ import annotations

import argparse
import runpy
import sys
import types
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from catmllm.evaluate.baselines import energies
from catmllm.evaluate.trained_baselines import BATCH, Floats, Predict, Record, fitted
from catmllm.seeds import Stream, generator, hash_seed
from catmllm.structure.system import ADSORBATE, System

MODELS = ("schnet", "painn", "dimenet", "gemnet_oc", "chgnet")
# All its interactions, at a tenth of the published widths and two of the four blocks.
GEMNET_OC: dict[str, Any] = {
    "num_spherical": 4,
    "num_radial": 16,
    "num_blocks": 2,
    "emb_size_atom": 64,
    "emb_size_edge": 64,
    "emb_size_trip_in": 16,
    "emb_size_trip_out": 16,
    "emb_size_quad_in": 8,
    "emb_size_quad_out": 8,
    "emb_size_aint_in": 16,
    "emb_size_aint_out": 16,
    "emb_size_rbf": 8,
    "emb_size_cbf": 8,
    "emb_size_sbf": 16,
    "num_before_skip": 1,
    "num_after_skip": 1,
    "num_concat": 1,
    "num_atom": 2,
    "num_output_afteratom": 2,
    "quad_interaction": True,
    "atom_edge_interaction": True,
    "edge_atom_interaction": True,
    "atom_interaction": True,
}
OFFSETS = 40  # training systems an adsorbate by which a potential's offsets are set
Cell = tuple[Floats, Floats, Floats]  # lattice [3, 3] Å, atomic numbers [n], fractional coordinates [n, 3]


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and measure; writes after each model, and trains none again that the same settings made."""
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
    parser.add_argument(
        "--calculator", metavar="FILE:NAME", help="also ask what this function makes: an ASE calculator"
    )
    args = parser.parse_args(arguments)
    if len({share for share in args.frames if share}) > 1:
        parser.error("--frames: one share above 0, whose rows are named NAME_frames; give 0 and one other")
    record = Record(args.run)
    parts = record.parts()
    for model in args.models:
        for share in args.frames if model != "chgnet" else (0.0,):
            name = f"{model}_frames" if share else model

            def train(model: str = model, share: float = share) -> Predict:
                return chgnet(parts["train"]) if model == "chgnet" else trained(model, parts, share, args)

            settings = {} if model == "chgnet" else {"steps": args.steps, "seed": args.seed, "share": share}
            if not record.keeps(name, settings):
                record.measure(name, train, parts["test"], True, settings)
    if asked := args.calculator:
        settings = {"calculator": asked}
        if not record.keeps("calculator", settings):
            record.measure(
                "calculator", lambda: calculator(asked, parts["train"]), parts["test"], True, settings
            )
    return 0


# --------------------------------------------------------------------------- fairchem


def network(name: str) -> torch.nn.Module:
    """A network of fairchem 1.10, of a size that suits thousands of systems, on the graphs of the shipped
    pipeline (6 Å, 12 neighbours). Raises ImportError with the command that installs it."""
    _stand_ins()
    try:
        from fairchem.core.models.dimenet_plus_plus import DimeNetPlusPlusWrap
        from fairchem.core.models.gemnet_oc.gemnet_oc import GemNetOC
        from fairchem.core.models.painn import painn
        from fairchem.core.models.schnet import SchNetWrap
    except ImportError as error:
        raise ImportError(f"{error}: `make baselines` installs fairchem 1.10 beside torch") from error
    common = {"cutoff": 6.0, "use_pbc": True, "otf_graph": True, "regress_forces": False}
    if name == "schnet":
        model = SchNetWrap(hidden_channels=64, num_filters=64, num_interactions=3, readout="mean", **common)
        model.max_neighbors = 12
        return model
    if name == "dimenet":
        sizes: dict[str, Any] = {
            "hidden_channels": 64,
            "num_blocks": 2,
            "int_emb_size": 32,
            "out_emb_channels": 64,
        }
        model = DimeNetPlusPlusWrap(**sizes, num_spherical=4, **common)
        model.max_neighbors = 12
        return model
    if name == "gemnet_oc":
        model = GemNetOC(**GEMNET_OC, max_neighbors=12, max_neighbors_qint=4, extensive=False, **common)
        model.reduce = "mean"
        return model
    return painn.PaiNN(hidden_channels=64, num_layers=3, num_rbf=32, max_neighbors=12, **common)


def _stand_ins() -> None:
    """The functions that fairchem takes from torch_scatter by those of PyTorch Geometric, and the part of
    torch_sparse that DimeNet++ and GemNet-OC find triplets with."""
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
    sparse.SparseTensor = SparseRows
    sys.modules |= {"torch_scatter": module, "torch_sparse": sparse}


class SparseRows:
    """The part of torch_sparse.SparseTensor that fairchem's triplets use: entries in the order of their rows
    and columns, several at one place too, and rows taken by number. It is its own `storage`."""

    def __init__(
        self,
        row: torch.Tensor,
        col: torch.Tensor,
        value: torch.Tensor | None = None,
        sparse_sizes: tuple[int, int] = (0, 0),
    ) -> None:
        order = torch.argsort(row * sparse_sizes[1] + col, stable=True)
        self._row, self._col, self._sizes = row[order], col[order], sparse_sizes
        self._value = None if value is None else value[order]

    def __getitem__(self, rows: torch.Tensor) -> SparseRows:
        counts = self._row.bincount(minlength=self._sizes[0])
        taken = counts[rows]
        new = torch.arange(len(rows), device=rows.device).repeat_interleave(taken)
        # where a row's entries begin here, and there; an entry is as far behind either
        shift = (counts.cumsum(0) - counts)[rows] - (taken.cumsum(0) - taken)
        places = torch.arange(len(new), device=rows.device) + shift[new]
        value = None if self._value is None else self._value[places]
        return SparseRows(new, self._col[places], value, (len(rows), self._sizes[1]))

    @property
    def storage(self) -> SparseRows:
        return self

    def row(self) -> torch.Tensor:
        return self._row

    def col(self) -> torch.Tensor:
        return self._col

    def value(self) -> torch.Tensor | None:
        return self._value

    def coo(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        return self._row, self._col, self._value

    def sparse_sizes(self) -> tuple[int, int]:
        return self._sizes

    def set_value(self, value: None) -> SparseRows:
        """The places alone."""
        return SparseRows(self._row, self._col, value, self._sizes)

    def set_value_(self, value: torch.Tensor, layout: str) -> None:
        """In the order of `coo`."""
        self._value = value

    def sum(self, dim: int) -> torch.Tensor:
        """Of places: how many each row has (dim 1)."""
        return self._row.bincount(minlength=self._sizes[0])


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
            tags=torch.tensor(s.tags, dtype=torch.long),  # GemNet-OC asks of which atoms quadruplets are
        )

    return Batch.from_data_list([data(s) for s in systems])


# --------------------------------------------------------------------------- potentials as they come


def chgnet(train: Sequence[System]) -> Predict:
    """CHGNet's own weights, as `zero_shot` asks them."""
    from chgnet.model import CHGNet
    from pymatgen.core import Lattice, Structure

    model = CHGNet.load(use_device="cpu", verbose=False)

    def totals(cells: Sequence[Cell]) -> Floats:
        structures = [Structure(Lattice(lattice), numbers.tolist(), frac) for lattice, numbers, frac in cells]
        found = model.predict_structure(structures, task="e", batch_size=16)
        return np.array([float(f["e"]) * len(s) for f, s in zip(found, structures)])  # CHGNet: eV an atom

    return zero_shot(totals, train)


def calculator(named: str, train: Sequence[System]) -> Predict:
    """Any ASE calculator, which the function `named` (FILE:NAME) makes, as `zero_shot` asks it.
    Raises SystemExit for a file or function that is not there."""
    from ase import Atoms

    file, _, name = named.rpartition(":")
    if not Path(file).is_file():
        raise SystemExit(f"--calculator {named}: no such file; give FILE:NAME of a function")
    make = runpy.run_path(file).get(name)
    if not callable(make):
        raise SystemExit(f"--calculator {named}: {file} has no function {name}")
    potential = make()

    def totals(cells: Sequence[Cell]) -> Floats:
        every = [
            Atoms(numbers=numbers, cell=lattice, scaled_positions=frac, pbc=True)
            for lattice, numbers, frac in cells
        ]
        return np.array([potential.get_potential_energy(atoms) for atoms in every])

    return zero_shot(totals, train)


def zero_shot(totals: Callable[[Sequence[Cell]], Floats], train: Sequence[System]) -> Predict:
    """A potential that learned no energy here: E(slab with adsorbate) - E(slab) of the structure as it
    stands, and for each adsorbate the offset that fits some training systems best. totals: energies (eV)."""

    def raw(systems: Sequence[System]) -> Floats:
        slabs: dict[bytes, int] = {}
        cells: list[Cell] = []
        which = []
        for s in systems:
            bare = s.tags != ADSORBATE
            key = s.lattice.tobytes() + s.frac[bare].tobytes() + s.numbers[bare].tobytes()
            if key not in slabs:
                slabs[key] = len(cells)
                cells.append((s.lattice, s.numbers[bare], s.frac[bare]))
            which.append((len(cells), slabs[key]))
            cells.append((s.lattice, s.numbers, s.frac))
        energy = totals(cells)
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
