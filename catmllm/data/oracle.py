"""SevenNet-0 and its gas-phase references: the zero of every adsorption energy in this project.

SevenNet-0 (Park et al., J. Chem. Theory Comput. 20, 4857 (2024); `sevenn`, MIT) is a machine-learned
interatomic potential. What it says is not DFT: it labels the shipped slabs and judges designs, offline and on
one core, because its weights come with the wheel. The data and the judge share this file, so that their
energies have one zero.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ase.calculators.calculator import Calculator

INSTALL = "pip install sevenn"


class OracleMissing(RuntimeError):
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


def gas_energy(name: str, calculator: Calculator) -> float:
    """Energy (eV) of one relaxed gas molecule of ASE's g2 set, with 5 Å of vacuum on every side."""
    from ase.build import molecule
    from ase.optimize import BFGS

    gas = molecule(name)
    gas.center(vacuum=5)
    gas.pbc = True
    gas.calc = calculator
    BFGS(gas, logfile=None).run(fmax=0.03, steps=60)
    return float(gas.get_potential_energy())


def atomic_references(calculator: Calculator) -> dict[str, float]:
    """Reference energy (eV) of one H, O, N and C atom, from the gases H2, H2O, N2 and CO.

    H = H2/2, O = H2O - H2, N = N2/2, C = CO - O. The reference of an adsorbate is the sum over its atoms.
    """
    h2, h2o, n2, co = (gas_energy(name, calculator) for name in ("H2", "H2O", "N2", "CO"))
    oxygen = h2o - h2
    return {"H": h2 / 2, "O": oxygen, "N": n2 / 2, "C": co - oxygen}


@lru_cache(maxsize=2)
def sevennet_references(device: str = "cpu") -> dict[str, float]:
    """`atomic_references` by SevenNet-0, computed once a process (about 2 s)."""
    return atomic_references(sevennet(device))
