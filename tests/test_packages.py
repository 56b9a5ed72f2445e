"""What is shipped: quick to import, complete, typed, and usable from an empty environment."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from catmllm.data.slabs import load_slabs
from catmllm.models import SHIPPED
from catmllm.structure.cif import write_cif

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_import_is_quick() -> None:
    """Processor time beside NumPy's own import, most of it (0.11 to 0.17 s); the least of several."""
    code = "import numpy, time; t = time.process_time(); import rewards_fast; print(time.process_time() - t)"
    seconds = []
    for _ in range(10):
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        seconds.append(float(run.stdout))
        if seconds[-1] < 0.06:
            return
    raise AssertionError(f"import rewards_fast takes {min(seconds):.3f} s")


def test_every_package_is_listed() -> None:
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    for root, folder in ((ROOT, "catmllm"), (ROOT, "rewards_fast"), (ROOT / "kernels", "catmllm_kernels")):
        found = {
            ".".join(path.parent.relative_to(root).parts) for path in (root / folder).rglob("__init__.py")
        }
        assert found and found <= listed, sorted(found - listed)


def test_the_shipped_model_is_in_the_package() -> None:
    """Every file of it that git has is package data; 15 MB is what a clone can bear."""
    tracked = subprocess.run(
        ["git", "ls-files", str(SHIPPED)], cwd=ROOT, capture_output=True, text=True
    ).stdout.split() or [str(p.relative_to(ROOT)) for p in SHIPPED.rglob("*") if p.is_file()]
    packed = {
        str(path.relative_to(ROOT))
        for pattern in PROJECT["tool"]["setuptools"]["package-data"]["catmllm.models"]
        for path in SHIPPED.parent.glob(pattern)
    }
    assert {"graph.safetensors", "model.safetensors", "README.md"} <= {Path(name).name for name in tracked}
    assert set(tracked) <= packed
    assert sum((ROOT / name).stat().st_size for name in tracked) < 15e6


def test_the_changelog_begins_with_this_version() -> None:
    version = PROJECT["project"]["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == version


def test_the_constraints_are_exact_and_hold_all_that_is_asked_for() -> None:
    """Both commands install from constraints.txt: one version per package, inside pyproject's ranges,
    from any index."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines)
    assert len(pins) == len(lines) and all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    known = {canonicalize_name(name): version for name, version in pins.items()}
    extras = set(
        re.findall(r"^EXTRAS\s*:= (\S+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[0].split(",")
    )
    asked = [
        Requirement(text) for extra in extras for text in PROJECT["project"]["optional-dependencies"][extra]
    ]
    for requirement in [*asked, *map(Requirement, PROJECT["project"]["dependencies"])]:
        assert requirement.specifier.contains(known[canonicalize_name(requirement.name)]), requirement


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    command = [sys.executable, str(ROOT / ".ci" / "versions.py"), "oldest"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    pins = dict(line.split("==") for line in lines)
    parts = PROJECT["project"]["optional-dependencies"].values()
    for requirement in map(Requirement, chain(PROJECT["project"]["dependencies"], *parts)):
        if requirement.name in pins:
            assert requirement.specifier.contains(pins[requirement.name]), requirement
    assert {"numpy", "torch", "triton", "transformers", "trl", "pymatgen", "peft", "ase"} <= set(pins)


def test_nobody_is_told_to_install_from_an_index() -> None:
    """No distribution of this name is there; anybody could register it."""
    tracked = subprocess.run(
        ["git", "ls-files", "*.py", "*.md", "*.toml"], cwd=ROOT, capture_output=True, text=True
    )
    pages = tracked.stdout.split() or [str(p.relative_to(ROOT)) for p in ROOT.rglob("*.md")]
    assert "README.md" in pages
    told = re.compile(r"pip install (?:-\S+ )*['\"]?catmllm")
    assert not [p for p in pages if (ROOT / p).exists() and told.search((ROOT / p).read_text())]


@pytest.mark.slow
def test_the_stub_of_the_engine_is_its_interface() -> None:
    command = [
        sys.executable,
        "-m",
        "mypy.stubtest",
        "rewards_fast._core",
        "--ignore-missing-stub",
        "--concise",
    ]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    wrong = [line for line in run.stdout.splitlines() if "is not present" in line]
    assert not wrong, run.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("build", "libraries"), [("all", ["_attention", "_rows", "_so2"]), ("reward", [])])
def test_a_wheel_works_in_an_empty_environment(build: str, libraries: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path)]
    subprocess.run([*command, str(ROOT)], check=True, env={**os.environ, "CATMLLM_BUILD": build})
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert sorted(re.findall(r"^catmllm_kernels/(_\w+)\.\S+\.so$", "\n".join(names), re.M)) == libraries
    assert any(name.startswith("rewards_fast/_core.") and name.endswith(".so") for name in names)
    spec = importlib.util.spec_from_file_location("try_package", ROOT / "tests" / "try_package.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert set(module.main(tmp_path)) == {"install", "import", "score"}
    if build == "all":  # with the torch of these tests, and nothing of the checkout
        zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
        (tmp_path / "slab.cif").write_text(write_cif(load_slabs()[0]))
        predict = [sys.executable, "-m", "catmllm.cli", "predict", "slab.cif", "--json"]
        environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
        run = subprocess.run(
            predict, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        row = json.loads(run.stdout)
        assert row["model"] == str(tmp_path / "installed" / "catmllm" / "models" / "shipped")
        assert abs(row["energy"] - load_slabs()[0].known_energy) < 1


@pytest.mark.slow
def test_the_server_keeps_its_memory(tmp_path: Path) -> None:
    """A minute of right, broken and wrong requests; `bench/server.py --soak 600` is the long one."""
    command = [
        sys.executable,
        str(ROOT / "bench" / "server.py"),
        "--soak",
        "60",
        "--json",
        "--out",
        str(tmp_path),
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240)
    (claim,) = json.loads(run.stdout)
    found = claim["value"]
    assert {k for k in found if k.startswith("status")} == {"status 200", "status 400", "status 422"}
    assert found["answers"] > 500 and found["MiB at the end"] < found["MiB at half-time"] + 8
