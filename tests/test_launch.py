"""The launchers under `launch/`, dry: their commands are those that torchrun and the trainer take."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from catmllm.config import from_arguments
from catmllm.train.stop import EXIT_SAVED

LAUNCH = Path(__file__).parents[1] / "launch"


def torchrun(words: list[str]) -> Any:
    from torch.distributed.run import get_args_parser

    return get_args_parser().parse_args(words)


def stubs(folder: Path, status: int) -> dict[str, str]:
    """A PATH on which Slurm's commands only write down how they are called."""
    bodies = {
        "srun": f'echo "$@" > {folder}/called; exit {status}',
        "scontrol": f'[ "$1" = show ] && echo node7 || echo "$@" > {folder}/told',
    }
    for name, body in bodies.items():
        path = folder / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node[7-10]", "SLURM_NNODES": "4", "SLURM_JOB_ID": "17"}
    return {"PATH": f"{folder}:{os.environ['PATH']}", **slurm}


@pytest.mark.parametrize("status", [0, 1, EXIT_SAVED])
def test_sbatch(tmp_path: Path, status: int) -> None:
    (tmp_path / "bin").mkdir()
    bash = shutil.which("bash")
    assert bash is not None
    done = subprocess.run(
        [bash, str(LAUNCH / "slurm.sbatch"), "a100x8/7b.yaml", "a100x8/grpo.yaml"],
        env=stubs(tmp_path / "bin", status),
        timeout=60,
        check=False,
    )
    assert done.returncode == status
    words = (tmp_path / "bin" / "called").read_text().split()
    found = torchrun(words[words.index("torchrun") + 1 :])
    assert (found.nnodes, found.nproc_per_node, found.max_restarts) == ("4", "8", 3)
    assert (found.rdzv_endpoint, found.rdzv_id) == ("node7:29500", "17")
    assert "SIGUSR1" in found.signals_to_handle and found.training_script == "catmllm/train.py"
    config = from_arguments(found.training_script_args)
    assert (config.stages, config.replicate) == (("grpo",), 4)
    told = tmp_path / "bin" / "told"
    assert (told.read_text() if told.exists() else "") == ("requeue 17\n" if status == EXIT_SAVED else "")


def test_sbatchs_own_lines() -> None:
    text = (LAUNCH / "slurm.sbatch").read_text()
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", text, re.M))
    assert asked["nodes"] == "4" and asked["ntasks-per-node"] == "1" and asked["signal"] == "USR1@180"
    assert "requeue" in asked and text.startswith("#!/bin/bash\n")


def test_pytorchjob() -> None:
    job = yaml.safe_load((LAUNCH / "pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert worker["replicas"] == job["spec"]["elasticPolicy"]["maxReplicas"]
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch"  # the operator looks for that name
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(job["spec"]["nprocPerNode"])
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    program, *words = container["command"]
    assert program == "torchrun"
    found = torchrun(words)
    config = from_arguments(found.training_script_args)
    assert config.replicate == worker["replicas"] and config.out.startswith("runs/")
