"""Build hook of the one distribution: its C++ libraries. Everything declarative is in pyproject.toml.

CATMLLM_BUILD=reward in the environment builds the reward's engine alone: the libraries of the model's ops,
which need torch to be of use, take four times as long.
"""

import os
import runpy
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent
# No -march: hot loops choose the vector unit at run time, so a wheel runs on any machine of its architecture.
# -g0: Python's own -g would cost a quarter of the compiler's time.
FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wno-psabi"]
# The engine holds its arithmetic against NumPy's to the bit, which fused products would change:
# GCC makes them on ARM unasked.
EXACT = ["-ffp-contract=off"]
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []
CHOICES = ("", "all", "reward")
ENGINE = "rewards_fast._core"


def paths(*patterns: str) -> list[str]:
    """Files of csrc."""
    return sorted(
        str(path.relative_to(HERE)) for pattern in patterns for path in (HERE / "csrc").glob(pattern)
    )


def engine() -> Extension:
    """The reward's engine, a Python module."""
    folders = ("cif", "geometry", "pvcp")
    return Extension(
        ENGINE,
        ["rewards_fast/_core.pyx", *paths(*(f"{folder}/*.cpp" for folder in folders))],
        depends=paths(*(f"{folder}/*.{kind}" for folder in folders for kind in ("h", "inc"))),
        extra_compile_args=[*FLAGS, *EXACT],
        language="c++",
    )


def library(name: str, digest: str) -> Extension:
    """A plain shared library of csrc/<name> and csrc/vector, which catmllm_kernels loads by ctypes. It needs
    neither Python nor torch; its OpenMP is the runtime that torch has loaded."""
    return Extension(
        f"catmllm_kernels._{name}",
        paths(f"{name}/*.cpp", "vector/*.cpp"),
        depends=paths(f"{name}/*.h", "vector/*.h"),
        define_macros=[("VECTOR_KERNELS", f'"../{name}/kernels.h"'), ("VECTOR_SOURCES", f'"{digest}"')],
        extra_compile_args=[*FLAGS, *OPENMP],
        extra_link_args=OPENMP,
        language="c++",
    )


def together(sources: list[str], folder: Path) -> list[str]:
    """The sources, those of a folder of csrc as one file that includes them: 31 files read the same headers
    each, half of the compiler's time."""
    units: dict[str, list[Path]] = {}
    for source in map(Path, sources):
        units.setdefault(source.parent.name, []).append(HERE / source)
    made = []
    folder.mkdir(parents=True, exist_ok=True)
    for name, parts in units.items():
        made.append(folder / f"{name}.cpp")
        text = "".join(f'#include "{part}"\n' for part in parts)
        if not made[-1].exists() or made[-1].read_text() != text:
            made[-1].write_text(text)
    return [str(path) for path in made]


class Build(build_ext):
    """Objects of each extension in a folder of their own: csrc/vector is compiled for several,
    each time otherwise. Sources are compiled side by side, one a core; setuptools builds only whole
    extensions so."""

    def build_extensions(self) -> None:
        compile_all = self.compiler.compile

        def compile_each(sources: list[str], **options: object) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                made = pool.map(lambda source: compile_all([source], **options), sources)
                return [path for part in made for path in part]

        self.compiler.compile = compile_each
        wanted = {Path(self.get_ext_fullpath(ext.name)).name for ext in self.extensions}
        for left in Path(self.build_lib).glob("catmllm_kernels/_*.so"):
            if left.name not in wanted:  # of an earlier build of more, which the wheel would take along
                left.unlink()
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        shared, self.build_temp = self.build_temp, str(Path(self.build_temp) / ext.name)
        if ext.name == ENGINE:
            ext.depends += ext.sources
            ext.sources = together(ext.sources, Path(self.build_temp))
        super().build_extension(ext)
        self.build_temp = shared


def main() -> None:
    """Say what cannot be built, or build."""
    if sys.platform == "win32":
        raise SystemExit(
            "the C++ of catmllm needs GCC or Clang, which Python on Windows is not built with: use WSL"
        )
    choice = os.environ.get("CATMLLM_BUILD", "")
    if choice not in CHOICES:
        raise SystemExit(f"CATMLLM_BUILD={choice!r}: choose `reward` or `all`, which is the default")
    extensions = cythonize([engine()], compiler_directives={"language_level": 3})
    if choice != "reward":
        native = runpy.run_path(str(HERE / "kernels" / "catmllm_kernels" / "native.py"))
        extensions += [library(name, native["digest"](name, HERE / "csrc")) for name in native["LIBRARIES"]]
    setup(ext_modules=extensions, cmdclass={"build_ext": Build})


main()
