"""Build hook of the one distribution: the C++ engine behind rewards_fast. Everything declarative is in pyproject.toml."""

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
)
