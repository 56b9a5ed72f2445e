"""Installs a built package into an empty environment and uses it there:
`python tests/try_package.py FOLDER_OR_FILE`.

Run by `make wheels` for each Python, and by a test. Prints seconds: installing with NumPy, importing (least
of 7, processor time), and from starting the interpreter to a score. Fails where the package needs more than
NumPy, brings libraries of others, is late (on an idle machine: installing is mostly unpacking NumPy) or
scores wrongly.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from pathlib import Path

LIMITS = {"install": 10.0, "import": 0.06, "score": 10.0}
CELL = """data_x
_cell_length_a 4
_cell_length_b 4
_cell_length_c 4
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
loop_
_atom_site_label
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
Na 0 0 0
Cl 0.5 0.5 0.5
"""
IMPORT = """
import time
import numpy  # takes its own 0.1 s and more
begin = time.process_time()
import rewards_fast
print(time.process_time() - begin)
"""
USE = f"""
import importlib.metadata, json, pathlib, sys
import rewards_fast
from rewards_fast.integrations.openrlhf import reward_func
from rewards_fast.integrations.trl import cif_reward
from rewards_fast.integrations.verl import compute_score
text = {CELL!r}
folder = pathlib.Path(rewards_fast.__file__).parent
print(json.dumps({{
    "total": rewards_fast.PVCP().score([text], "NaCl").total.tolist()[0],
    "verl": compute_score(solution_str=text, ground_truth="NaCl")["score"],
    "openrlhf": reward_func([text], [""], ["NaCl"])["rewards"][0],
    "trl": cif_reward(completions=[text], target=["NaCl"])[0],
    "loaded": sorted(
        set(name.partition(".")[0] for name in sys.modules) & {{"torch", "pymatgen", "catmllm", "fastapi"}}
    ),
    "typed": (folder / "py.typed").exists() and (folder / "_core.pyi").exists(),
    "version": importlib.metadata.version("catmllm"),
}}))
"""


def main(package: Path) -> dict[str, float]:
    """Seconds of each step; AssertionError where one is not as promised."""
    if package.is_dir():
        tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
        package = next(package.glob(f"*-{tag}-*.whl"))
    bundled = [name for name in zipfile.ZipFile(package).namelist() if ".libs/" in name]
    assert bundled == [], f"other projects' libraries in the wheel: {bundled}"
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        # a checkout there would hide the package
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        python = str(Path(folder) / ("Scripts" if sys.platform == "win32" else "bin") / "python")
        begin = time.perf_counter()
        subprocess.run([python, "-m", "pip", "install", "--quiet", str(package)], check=True, env=env)
        seconds = {"install": time.perf_counter() - begin}
        listed = subprocess.run(
            [python, "-m", "pip", "list", "--format", "json"],
            capture_output=True,
            text=True,
            check=True,
            env=env,
        )
        names = {row["name"] for row in json.loads(listed.stdout)}
        assert names <= {"catmllm", "numpy", "pip", "setuptools"}, names

        def run(code: str) -> str:
            found = subprocess.run(
                [python, "-c", code], capture_output=True, text=True, cwd=folder, check=True, env=env
            )
            return found.stdout

        begin = time.perf_counter()
        used = json.loads(run(USE))
        seconds["score"] = time.perf_counter() - begin
        for name in ("total", "verl", "openrlhf", "trl"):
            assert abs(used[name] - 10.0) < 1e-9, used
        assert used["loaded"] == [] and used["typed"], used
        seconds["import"] = min(float(run(IMPORT)) for _ in range(7))
        subprocess.run(
            [str(Path(python).parent / "rewards-fast"), "--version"],
            check=True,
            env=env,
            stdout=subprocess.DEVNULL,
        )
    print(f"{package.name} on Python {sys.version.split()[0]}:", end=" ")
    print(", ".join(f"{name} {value:.2f} s" for name, value in seconds.items()))
    for name, value in seconds.items():
        assert value < LIMITS[name], f"{name} took {value:.2f} s, more than {LIMITS[name]}"
    return seconds


if __name__ == "__main__":
    main(Path(sys.argv[1]))
