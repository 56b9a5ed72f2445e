"""A study: cells of settings times seeds, each an ordinary run of the trainer, and what they say together.

    catmllm study configs/studies/kl.yaml --out runs/kl [--only CELL] [--seeds N] [key=value ...]

`cells.py` reads the file and runs what is missing, `compare.py` sets the cells side by side, `page.py` draws
and writes. docs/studies.md has a line for each shipped one.
"""

from catmllm.study.cells import Study, every_run, is_study, plans, read, run_all, trainer
from catmllm.study.compare import compared, sentences, table, values_of
from catmllm.study.page import study

__all__ = [
    "Study",
    "compared",
    "every_run",
    "is_study",
    "plans",
    "read",
    "run_all",
    "sentences",
    "study",
    "table",
    "trainer",
    "values_of",
]
