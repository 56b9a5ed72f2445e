"""The C++ libraries behind the ops on a CPU: found, held against their sources, opened once.

A library that an edit of its sources left behind may lay out its arguments otherwise, and would read and
write wild memory. So each carries the digest of the sources that it was built from, and one of other sources
is not run.

`setup.py` takes LIBRARIES and `digest` from here; this file imports nothing but Python's own modules.
"""

from __future__ import annotations

import ctypes
import hashlib
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

# Each library `_<name>` is made of csrc/<name> and of csrc/vector, which they share.
LIBRARIES = ("so2", "attention", "rows")
BUILD = "`pip install --no-deps --editable .` in the sources, with GCC or Clang, builds it"
_PACKAGE = Path(__file__).parent
_SOURCES = Path(__file__).parents[2] / "csrc"  # a wheel comes without


def digest(name: str, sources: Path) -> str:
    """Of the C++ that a library is made of, below the folder `sources`; empty where that is not there."""
    folders = (sources / name, sources / "vector")
    files = sorted(path for folder in folders for path in folder.glob("*") if path.suffix in (".h", ".cpp"))
    found = hashlib.sha256()
    for path in files:
        found.update(f"{path.parent.name}/{path.name}\n".encode() + path.read_bytes())
    return found.hexdigest() if files else ""


@cache
def library(name: str) -> ctypes.CDLL | str:
    """The library that the package was built with, or why there is
    none to run and the command that mends it."""
    for suffix in EXTENSION_SUFFIXES:
        path = _PACKAGE / f"_{name}{suffix}"
        if path.exists():
            return opened(name, path, _SOURCES)
    return f"catmllm_kernels/_{name} was not built; {BUILD}"


def opened(name: str, path: Path, sources: Path) -> ctypes.CDLL | str:
    """The library at `path`, or why it must not run: it is not of `sources`, where these are there."""
    try:
        found = ctypes.CDLL(str(path))
    except OSError as error:
        return f"{path} cannot be opened ({error}); {BUILD} again"
    if not hasattr(found, "vector_sources"):
        return f"{path} is of an older version; {BUILD} again"
    for text in (found.vector_isa, found.vector_sources):
        text.restype = ctypes.c_char_p
    expected = digest(name, sources)
    if expected and found.vector_sources().decode() != expected:
        return f"{path} was built from other sources than those in {sources}; {BUILD} again"
    return found


def unfit(name: str) -> str:
    """Why a library cannot run, or nothing."""
    found = library(name)
    return found if isinstance(found, str) else ""


@cache
def function(name: str, of: str) -> Any:
    """`<name>_<of>` of a library; calling it raises RuntimeError by the message that it returns.

    Raises RuntimeError where there is no library to run.
    """
    found = library(name)
    if isinstance(found, str):
        raise RuntimeError(found)
    function = getattr(found, f"{name}_{of}")
    function.restype, function.errcheck = ctypes.c_char_p, _raise
    return function


def _raise(message: bytes | None, function: Any, _: tuple[Any, ...]) -> None:
    if message is not None:
        raise RuntimeError(f"{function.__name__}: {message.decode()}")


def instruction_set() -> str:
    """`avx512`, `avx2` or `portable`: what the libraries run on this machine,
    as far as CATMLLM_ISA allows."""
    found = library("so2")
    if isinstance(found, str):
        raise RuntimeError(found)
    return str(found.vector_isa().decode())
