"""What is measured, against which baselines and judges."""

from pathlib import Path

# The design tasks that come with the package: of the shipped data, split 0 and seed 0.
BENCHMARK = Path(__file__).with_name("tasks.csv")
