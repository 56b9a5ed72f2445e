"""What every test may use: the folder of real data that lies beside the repository, where there is one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

REPOSITORY = Path(__file__).resolve().parents[1]

# The first call of a Numba function compiles it, and a shared machine stalls: time per example says nothing.
settings.register_profile("catmllm", deadline=None)
settings.load_profile("catmllm")


def shared_folder() -> Path:
    """The folder that `CATMLLM_SHARED` names (relative to the repository, default ../shared); it need not exist."""
    return (REPOSITORY / os.environ.get("CATMLLM_SHARED", "../shared")).resolve()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data; tests that ask for it are skipped where it is absent."""
    folder = shared_folder()
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}; CATMLLM_SHARED names the real data")
    return folder
