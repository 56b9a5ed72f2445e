"""Build hook of the one distribution: its C++ libraries. Everything declarative is in pyproject.toml."""

import hashlib
import sys
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

HERE = Path(__file__).parent
SOURCES = sorted(
    str(path.relative_to(HERE))
    for folder in ("cif", "geometry", "pvcp")
    for path in (HERE / "csrc" / folder).glob("*.cpp")
)
# No -march: hot loops choose the vector unit at run time, so a wheel runs on any machine of its architecture.
FLAGS = (
    ["/std:c++17", "/O2", "/EHsc"]
    if sys.platform == "win32"
    else ["-std=c++17", "-O3", "-fvisibility=hidden", "-Wno-psabi"]
)
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []


def digest(folder: str) -> str:
    """Of a folder's sources, as catmllm_kernels/escn/cpu.py makes it: a library left behind by an edit is not run."""
    files = sorted(path for path in (HERE / "csrc" / folder).iterdir() if path.suffix in (".h", ".cpp"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def shared_library(
    name: str, sources: list[str], headers: list[str], macros: list[tuple[str, str]] | None = None
) -> Extension:
    """A plain shared library that catmllm_kernels loads by ctypes. It needs neither Python nor torch; its OpenMP is the
    runtime that torch has loaded. Vector extensions of GCC and Clang, so not with MSVC."""

    def paths(patterns: list[str]) -> list[str]:
        found = (p for pattern in patterns for p in (HERE / "csrc").glob(pattern))
        return sorted(str(p.relative_to(HERE)) for p in found)

    return Extension(
        f"catmllm_kernels.{name}",
        paths(sources),
        depends=paths(headers),
        define_macros=macros or [],
        extra_compile_args=[*FLAGS, *OPENMP],
        extra_link_args=OPENMP,
        language="c++",
    )


# The encoder's edge path on a CPU, the LLM's attention and what lies between its products; the latter two use the
# former's vectors and threads.
LIBRARIES = [
    shared_library("_so2", ["so2/*.cpp"], ["so2/*.h"], [("SO2_SOURCES", f'"{digest("so2")}"')]),
    shared_library(
        "_attention",
        ["attention/*.cpp", "so2/run.cpp", "so2/level.cpp"],
        ["attention/*.h", "so2/*.h"],
    ),
    shared_library("_rows", ["rows/*.cpp", "so2/run.cpp", "so2/level.cpp"], ["rows/*.h", "so2/*.h"]),
]

setup(
    ext_modules=cythonize(
        [
            Extension(
                "rewards_fast._core",
                ["rewards_fast/_core.pyx", *SOURCES],
                depends=[str(p.relative_to(HERE)) for p in (HERE / "csrc").glob("*/*.h")]
                + ["csrc/cif/tables.inc"],
                extra_compile_args=FLAGS,
                language="c++",
            )
        ],
        compiler_directives={"language_level": 3},
    )
    + ([] if sys.platform == "win32" else LIBRARIES)
)
