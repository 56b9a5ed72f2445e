"""`catmllm doctor`: what this machine has of what catmllm uses, and the line that installs what it lacks.

It is what people call where something is missing, so it loads nothing but Python's own modules until it has
seen that the rest is there.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

HELP = "what this machine has: versions, GPU, compiler, libraries; what is missing, and what installs it"
REBUILD = "pip install --no-deps --editable ."
# Extras and what for; what is missing of the first ends in exit status 1.
EXTRAS = {
    "train": "training and every command of catmllm",
    "gpu": "GPUs: other people's attention and losses, to compare with",
    "lora": "training of adapters",
    "oracle": "SevenNet-0 as a judge of designs",
    "trl": "the reward in TRL",
    "server": "the reward and rollouts over HTTP",
    "completion": "completion in the shell",
    "dev": "tests and linters",
}


class Finding(NamedTuple):
    """A line of the page. `state`: ok, missing (something does not run), or optional (is not there)."""

    state: str
    what: str
    mend: str = ""


def options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Say what this machine has of what catmllm uses. A line behind an arrow installs or mends what is "
        "missing. Status 1 where something is missing that training needs."
    )


def run(args: argparse.Namespace) -> int:
    findings = [*_python(), *_packages(), *_compiler(), *_libraries(), *_gpu()]
    for state, what, mend in findings:
        print(f"{state:9s}{what}{f'  ->  {mend}' if mend else ''}")
    missing = sum(state == "missing" for state, _, _ in findings)
    print("everything that is needed is there" if not missing else f"{missing} missing; see the arrows")
    return int(missing > 0)


def _python() -> Iterator[Finding]:
    system = f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors"
    state = "ok" if sys.version_info >= (3, 11) else "missing"
    yield Finding(state, f"Python {platform.python_version()} on {system}", "" if state == "ok" else "3.11")
    try:
        version = importlib.metadata.version("catmllm")
    except importlib.metadata.PackageNotFoundError:
        yield Finding("missing", "catmllm is not installed", "pip install --editable '.[train]' in the clone")
        return
    yield Finding("ok", f"catmllm {version}")


def _packages() -> Iterator[Finding]:
    """A line per extra: the versions that are there, or those that are not or are out of range."""
    try:
        wanted = importlib.metadata.requires("catmllm") or []
    except importlib.metadata.PackageNotFoundError:
        return
    for extra, purpose in EXTRAS.items():
        found, lacking = [], []
        for line in wanted:
            if f'extra == "{extra}"' not in line.replace("'", '"'):
                continue
            requirement, _, marker = line.partition(";")
            if "platform_system" in marker and platform.system() != "Linux":
                continue
            name = re.match(r"[\w.-]+", requirement)
            assert name is not None
            try:
                version = importlib.metadata.version(name[0])
            except importlib.metadata.PackageNotFoundError:
                lacking.append(requirement.strip())
                continue
            if _in_range(requirement.strip(), version):
                found.append(f"{name[0]} {version}")
            else:
                lacking.append(f"{requirement.strip()} (there is {version})")
        if lacking:
            state = "missing" if extra == "train" else "optional"
            yield Finding(state, f"{extra} ({purpose}): lacks {', '.join(lacking)}", _install(extra))
        elif found:
            yield Finding("ok", f"{extra} ({purpose}): {', '.join(found)}")


def _install(extra: str) -> str:
    return f"pip install '.[{extra}]' in the clone"


def _in_range(requirement: str, version: str) -> bool:
    """Whether a version is one that a requirement allows; taken to be where nothing here can tell."""
    if importlib.util.find_spec("packaging") is None:
        return True
    from packaging.requirements import Requirement

    return Requirement(requirement).specifier.contains(version, prereleases=True)


def _compiler() -> Iterator[Finding]:
    """The C++ compiler that setup.py would call, and whether it has OpenMP."""
    named = shlex.split(os.environ.get("CXX", ""))
    found = named or [c for c in ("c++", "g++", "clang++") if shutil.which(c)][:1]
    if not found or not shutil.which(found[0]):
        what = f"CXX={named[0]} is not there" if named else "no C++ compiler"
        yield Finding("optional", f"{what}: the libraries cannot be built again", "apt-get install g++")
        return
    version = _output([*found, "--version"]).splitlines()[:1]
    yield Finding("ok", f"C++ compiler: {' '.join(version) or found[0]}")
    arguments = [*found, "-std=c++17", "-fopenmp", "-fsyntax-only", "-x", "c++", "-"]
    tried = subprocess.run(arguments, input=b"#include <omp.h>\n", capture_output=True, check=False)
    if tried.returncode:
        mend = "apt-get install libomp-dev, or CXX=g++"
        yield Finding("optional", "the compiler has no OpenMP: kernels would run on one thread", mend)
    else:
        yield Finding("ok", f"OpenMP; OMP_NUM_THREADS is {os.environ.get('OMP_NUM_THREADS', 'not set')}")


def _libraries() -> Iterator[Finding]:
    """The compiled parts: the reward's engine, and the operators on a CPU."""
    try:
        import rewards_fast._core  # noqa: F401

        yield Finding("ok", "the reward's engine is built")
    except ImportError as error:
        yield Finding("missing", f"the reward's engine: {error}", REBUILD)
    if importlib.util.find_spec("catmllm_kernels") is None or importlib.util.find_spec("torch") is None:
        return
    from catmllm_kernels import native

    for name in native.LIBRARIES:
        library = native.library(name)
        if isinstance(library, str):
            yield Finding("optional", f"operator library {name}: {library}", REBUILD)
        else:
            yield Finding("ok", f"operator library {name} is built of these sources")


def _gpu() -> Iterator[Finding]:
    """GPUs as torch sees them; where it sees none, whether the driver does."""
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    for k in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(k)
        memory = f"{about.total_memory / 2**30:.0f} GiB, compute capability {about.major}.{about.minor}"
        yield Finding("ok", f"GPU {k}: {about.name}, {memory}")
    if torch.cuda.device_count():
        return
    driver = _output(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]).strip()
    if driver:
        mend = "pip install torch with CUDA, as pytorch.org says for this driver"
        what = f"the driver has {driver.splitlines()[0]}, but torch {torch.__version__} sees no GPU"
        yield Finding("missing", what, mend)
    else:
        yield Finding(
            "optional", f"no GPU: torch {torch.__version__} runs on the CPU, which suits `make run`"
        )


def _output(command: list[str]) -> str:
    """What a command prints, or nothing where it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
