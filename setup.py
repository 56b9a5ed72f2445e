"""Build hook of the one distribution: its two C++ libraries. Everything declarative is in pyproject.toml."""

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

# The encoder's edge path on a CPU: a plain shared library that catmllm_kernels loads by ctypes. It needs neither Python nor
# torch; its OpenMP is the runtime that torch has loaded. Vector extensions of GCC and Clang, so not with MSVC.
SO2 = Extension(
    "catmllm_kernels._so2",
    sorted(str(path.relative_to(HERE)) for path in (HERE / "csrc" / "so2").glob("*.cpp")),
    depends=[str(path.relative_to(HERE)) for path in (HERE / "csrc" / "so2").glob("*.h")],
    extra_compile_args=[*FLAGS, *OPENMP],
    extra_link_args=OPENMP,
    language="c++",
)

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
    + ([] if sys.platform == "win32" else [SO2])
)
