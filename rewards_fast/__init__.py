"""The PVCP reward of a crystal-structure text (parse, validity, composition, physics) for any RL code.

Importing this package loads NumPy and nothing heavier; what a call needs is loaded by that call.
"""

from rewards_fast.crystal import CIFError, Crystal
from rewards_fast.extract import extract_cif
from rewards_fast.pvcp import PVCP, Scores, Thresholds, Weights, min_distance, parse_cif
from rewards_fast.settings import RewardSettings
from rewards_fast.targets import parse_target

__all__ = [
    "PVCP",
    "CIFError",
    "Crystal",
    "RewardSettings",
    "Scores",
    "Thresholds",
    "Weights",
    "extract_cif",
    "min_distance",
    "parse_cif",
    "parse_target",
]
