"""A diffusion model that others wrote, as a row of the design tasks: DiffCSP's CSPNet with the diffusion of
chemeleon-dng, trained on a split's relaxed slabs from random weights. It is told a composition, as in crystal
structure prediction, and no energy: what it writes for a task is screened as any tool's CIFs are.

    make generators                         # in an environment of its own: runs/diffcsp
    python -m catmllm.evaluate.diffusion_baseline runs/diffcsp --steps 4000
    catmllm evaluate generator runs/diffcsp --judge diep

Atoms have places up to a common shift, so the widest gap along c is put above the slab. Nothing else is
mended: a cell or a distance that fails a check is the model's own.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from catmllm.config import from_arguments
from catmllm.data.open import open_data
from catmllm.evaluate import BENCHMARK
from catmllm.evaluate.baselines import some
from catmllm.evaluate.benchmark import (
    BenchmarkTask,
    allowed_slabs,
    read_tasks,
    refuse_known,
    write_candidates,
)
from catmllm.evaluate.trained_baselines import descent, shuffled_rows
from catmllm.seeds import Stream, generator, hash_seed
from catmllm.structure.elements import NUMBER
from catmllm.structure.formula import parse_formula, parse_identity
from catmllm.structure.system import System

Floats = NDArray[np.float64]
SIZES: dict[str, Any] = {  # of the network: a quarter of the published width, two thirds of its layers
    "hidden_dim": 128,
    "time_dim": 64,
    "num_layers": 4,
    "max_atoms": 101,
    "act_fn": "silu",
    "dis_emb": "sin",
    "num_freqs": 16,
    "ln": True,
    "ip": True,
    "smooth": False,
    "cond_dim": 0,
}
AT_ONCE = 64  # structures; its graphs are made of a dense matrix of all atoms


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("out", type=Path, help="a new folder for the CIFs")
    parser.add_argument("--steps", type=int, default=4000, help="of training (default: 4000)")
    parser.add_argument("--batch", type=int, default=32, help="systems a step (default: 32)")
    parser.add_argument("--timesteps", type=int, default=200, help="of the diffusion (default: 200)")
    parser.add_argument("--n", type=int, default=16, help="CIFs of a task (default: 16)")
    parser.add_argument("--tasks", type=Path, default=BENCHMARK, metavar="FILE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("set", nargs="*", metavar="key=value", help="the data, as in training")
    args = parser.parse_args(arguments)
    if args.out.exists() and any(args.out.iterdir()):
        raise SystemExit(f"{args.out}: there is something in it; give a new folder")
    asked, data = read_tasks(args.tasks), from_arguments(args.set).data
    parts = open_data(data)
    refuse_known(args.tasks, asked, parts, data)
    module = trained(some(parts["train"]), args.timesteps, args.steps, args.batch, args.seed)
    texts = written(module, asked, args.n, args.seed)
    write_candidates(args.out, texts, {name: [True] * len(mine) for name, mine in texts.items()})
    print(f"{args.out}: {sum(map(len, texts.values()))} CIFs for {len(texts)} of {len(asked)} tasks")
    return 0


def trained(systems: Sequence[System], timesteps: int, steps: int, size: int, seed: int) -> Any:
    """chemeleon-dng's DiffusionModule for given compositions, trained on relaxed structures; its weights are
    the running mean over a seventh of the steps. Raises ImportError with the command that installs it."""
    try:
        from chemeleon_dng.script_util import create_diffusion_module
    except ImportError as error:
        raise ImportError(f"{error}: `make generators` installs chemeleon-dng beside torch") from error
    key = Stream.DIFFUSION_BASELINE.key(seed, 0)
    torch.manual_seed(hash_seed(key))
    module = create_diffusion_module(
        task="csp",
        model_configs=dict(SIZES),
        optimizer_configs={  # of a trainer that is not used here
            "optimizer": "adamw",
            "lr": 1e-3,
            "weight_decay": 0.0,
            "scheduler": "constant",
            "patience": 1,
            "early_stopping": 1,
        },
        num_timesteps=timesteps,
        beta_schedule_ddpm="cosine",
        beta_schedule_d3pm="reciprocal",
        max_atoms=SIZES["max_atoms"],
        d3pm_hybrid_coeff=0.01,
        sigma_begin=0.005,
        sigma_end=0.5,
    )
    average = torch.optim.swa_utils.AveragedModel(
        module.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(max(0.0, 1 - 7.5 / steps))
    )
    rng, descend = generator(key), descent(module.model, 1e-3, steps)
    order = shuffled_rows(len(systems), rng)
    for step in range(steps):
        times = torch.from_numpy(rng.integers(1, timesteps + 1, size))
        losses = module.calculate_loss(batch([systems[next(order)] for _ in range(size)]), times)
        descend(losses["total_loss"])
        average.update_parameters(module.model)
        if (step + 1) % max(1, steps // 10) == 0:
            said = ", ".join(f"{k} {v.item():.3f}" for k, v in losses.items() if k.startswith("loss"))
            print(f"  step {step + 1}: {said}", file=sys.stderr, flush=True)
    module.model.load_state_dict(average.module.state_dict())
    return module.eval()


def batch(systems: Sequence[System]) -> Any:
    """Systems as chemeleon-dng takes them."""
    from chemeleon_dng.schema import CrystalBatch

    sizes = torch.tensor([len(s.numbers) for s in systems])
    return CrystalBatch(
        atom_types=torch.from_numpy(np.concatenate([s.numbers for s in systems])),
        lattices=torch.tensor(np.stack([s.lattice for s in systems]), dtype=torch.float32),
        frac_coords=torch.tensor(np.concatenate([s.frac for s in systems]) % 1.0, dtype=torch.float32),
        num_atoms=sizes,
        batch=torch.repeat_interleave(torch.arange(len(systems)), sizes),
        num_graphs=len(systems),
        num_nodes=int(sizes.sum()),
    )


def written(module: Any, tasks: Sequence[BenchmarkTask], n: int, seed: int) -> dict[str, list[str]]:
    """n CIFs of each task: of its composition, or of random ones that a task with free metals allows."""
    asked: list[tuple[str, list[int]]] = []
    for k, task in enumerate(tasks):
        rng, slabs = Random(hash_seed(Stream.DIFFUSION_BASELINE.key(seed, 1, k))), allowed_slabs(task)
        asked += [(task.name, atoms_of(rng.choice(slabs))) for _ in range(n if slabs else 0)]
    texts: dict[str, list[str]] = {}
    for i in range(0, len(asked), AT_ONCE):
        some_asked = asked[i : i + AT_ONCE]
        made = module.sample(
            task="csp",
            num_atoms=[len(numbers) for _, numbers in some_asked],
            atom_types=[z for _, numbers in some_asked for z in numbers],
            verbose=False,
        )
        for (name, _), atoms in zip(some_asked, made):
            texts.setdefault(name, []).append(cif_of(atoms))
        print(f"  {i + len(some_asked)} of {len(asked)} CIFs", file=sys.stderr, flush=True)
    return texts


def atoms_of(identity: str) -> list[int]:
    """Atomic numbers of a slab with its adsorbate."""
    of = parse_identity(identity)
    counts = [*of.slab.items(), *parse_formula(of.adsorbate).items()]
    return [NUMBER[symbol] for symbol, n in counts for _ in range(n)]


def cif_of(atoms: Any) -> str:
    """The CIF, by ASE, of its Atoms, whose widest gap along c is put above them."""
    raised = atoms.copy()
    frac = raised.get_scaled_positions(wrap=True)
    frac[:, 2] = under_the_gap(frac[:, 2])
    raised.set_scaled_positions(frac)
    file = io.BytesIO()
    raised.write(file, format="cif")
    return file.getvalue().decode()


def under_the_gap(heights: Floats) -> Floats:
    """Heights [n] in parts of c, in [0, 1), shifted so that their widest gap, over the period's end too, is
    half below and half above them."""
    order = np.sort(heights)
    gaps = np.diff(np.append(order, order[0] + 1.0))
    widest = int(gaps.argmax())
    lowest = order[(widest + 1) % len(order)]
    return np.asarray((heights - lowest) % 1.0 + gaps[widest] / 2)


if __name__ == "__main__":
    sys.exit(main())
