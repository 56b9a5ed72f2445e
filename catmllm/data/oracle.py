"""The potentials that label and judge, and their gas-phase references: the zero of every adsorption energy.

DIEP (`catmllm/potentials/diep.py`; trained on r2SCAN) made the labels of the shipped systems and judges
designs. SevenNet-0 (Park et al., J. Chem. Theory Comput. 20, 4857 (2024); `sevenn`, MIT) made older ones and
judges independently of them. Both are machine-learned, offline and run on one core, because their weights
come in their wheels. What they say is not DFT. Data and judge share this file, so that their energies have
one zero.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from catmllm.potentials.relax import Potential, PotentialMissing, Start, by_calculator, relaxed, structure_of

if TYPE_CHECKING:
    from ase.calculators.calculator import Calculator

    from catmllm.config import DataConfig

INSTALL = "pip install sevenn"


# Molecules whose energies are the zero: each element's is that of the first one less what is known by then.
GASES = {"H": "H2", "O": "H2O", "N": "N2", "C": "CO", "S": "SH2", "F": "HF", "Cl": "HCl"}


class OracleMissing(PotentialMissing):
    """SevenNet cannot be imported; the message has the line that installs it."""


def require_sevennet() -> None:
    """Raise `OracleMissing` where SevenNet-0 cannot be imported."""
    try:
        import sevenn.calculator  # noqa: F401
    except ImportError as error:
        raise OracleMissing(
            f"SevenNet-0 makes these energies, and it cannot be imported ({error}). Install it with: "
            f"{INSTALL}"
        ) from error


@lru_cache(maxsize=2)
def sevennet(device: str = "cpu") -> Calculator:
    """The SevenNet-0 calculator of this process (eV, Å). Loads once, in about a second after the imports.

    Raises `OracleMissing` where `sevenn` is not installed.
    """
    require_sevennet()
    from sevenn.calculator import SevenNetCalculator

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="No tensor product accelerator")  # they need CUDA
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        calculator = SevenNetCalculator("7net-0", device=device)
    for weight in calculator.model.parameters():
        weight.requires_grad_(False)  # forces need gradients of the positions alone
    return calculator


def gas_energies(names: Sequence[str], potential: Potential) -> list[float]:
    """Energies (eV) of relaxed gas molecules of ASE's g2 set, with 5 Å of vacuum on every side.

    Raises RuntimeError where the potential blows up on one."""
    from ase.build import molecule

    starts = []
    for name in names:
        gas = molecule(name)
        gas.center(vacuum=5)
        starts.append(Start(structure_of(gas)))
    ends = relaxed(starts, potential, fmax=0.03, max_steps=60)
    for name, end in zip(names, ends):
        if end.failed:
            raise RuntimeError(f"the potential has no energy for {name} in the gas")
    return [end.energy for end in ends]


def atomic_references(
    potential: Potential, elements: Sequence[str] = ("H", "O", "N", "C")
) -> dict[str, float]:
    """Reference energy (eV) of one atom of each element, from gases (`GASES`).

    H = H2/2, O = H2O - H2, N = N2/2, C = CO - O, S = H2S - H2, F = HF - H2/2, Cl = HCl - H2/2. The reference
    of an adsorbate is the sum over its atoms.
    """
    gas = dict(zip(elements, gas_energies([GASES[e] for e in elements], potential)))
    found = {"H": gas["H"] / 2}
    others = {"O": {"H": 2}, "S": {"H": 2}, "F": {"H": 1}, "Cl": {"H": 1}, "C": {"O": 1}}
    for element, energy in gas.items():
        if element == "N":
            found[element] = energy / 2
        elif element != "H":
            found[element] = energy - sum(n * found[e] for e, n in others[element].items())
    return found


POTENTIALS = {"diep": "DIEP (r2SCAN)", "sevennet": "SevenNet-0"}  # by the name that configurations use
# eV by which a walk may swing and still count (`potentials.relax`): DIEP's cut of its triplets makes kinks.
SWING = {"diep": 0.02, "sevennet": 0.0}


def check_judge(judge: str, data: DataConfig) -> str:
    """What is to be said of a judge of designs beside the labels of `data`; empty where it made them or there
    is none. Raises ValueError where another potential made them, whose zero is another."""
    if judge == "none" or (data.path is None and judge == data.labels):
        return ""
    name, own = POTENTIALS[judge], POTENTIALS[data.labels]
    second = f"of a finished run there is `catmllm evaluate RUN --judge {judge}`, which takes an offset off"
    if data.path is None:
        raise ValueError(
            f"{name} cannot judge designs at energies of {own}, which made the labels (`data.labels: "
            f"{data.labels}`): its zero is another. Give {data.labels} or none as the judge; {second}"
        )
    return (
        f"{name} judges by a zero of its own, gas CO, H2, H2O and N2. Who made the labels of {data.path} is "
        "not known here; where another did, the two energies differ by more than their errors. Give none as "
        f"the judge then; {second}"
    )


def potential_of(name: str, device: str = "cpu") -> Potential:
    """One of `POTENTIALS`, loaded once a process. Raises `PotentialMissing` where it is not installed."""
    if name == "sevennet":
        return by_calculator(sevennet(device))
    from catmllm.potentials.diep import diep

    return diep()


def elements_of(name: str, device: str = "cpu") -> frozenset[int]:
    """Atomic numbers that one of `POTENTIALS` knows."""
    if name == "sevennet":
        return frozenset(sevennet(device).type_map)  # type: ignore[attr-defined]
    from catmllm.potentials.diep import diep

    return diep().elements


@lru_cache(maxsize=4)
def references_of(name: str, device: str = "cpu") -> dict[str, float]:
    """`atomic_references` by one of `POTENTIALS`, computed once a process (about 2 s)."""
    return atomic_references(potential_of(name, device))
