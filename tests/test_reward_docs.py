"""Every block of docs/rewards is run: a page becomes one script, its files, commands,
Python and sessions in their order.

`python -m verl...` and `python -m openrlhf...` meet stand-ins that load the reward as those libraries do and
call it (the libraries themselves are in `tests/oracles`); `pip install` only checks that the extra exists;
GRPOTrainer calls what it is given.
"""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs" / "rewards").glob("*.md"))
BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)

PRELUDE = """
import asyncio, inspect, sys
sys.path.insert(0, ROOT)
from tests.rewards_fast.cif_texts import SLAB
model = data = None

def GRPOTrainer(model, reward_funcs, train_dataset):
    for function in reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]:
        found = function(
            prompts=["?", "?"], completions=[SLAB, "x"], target=["Pt3CuCO", ""], completion_ids=None
        )
        found = asyncio.run(found) if inspect.isawaitable(found) else found
        assert [round(r, 6) for r in found] == [10, -15]
"""

MAIN_PPO = """
import importlib, sys
sys.path.insert(0, ROOT)
from tests.rewards_fast.cif_texts import SLAB
given = dict(item.lstrip("+").split("=", 1) for item in sys.argv[1:])
name = "reward.custom_reward_function."
module = given[name + "path"]
assert module.startswith("pkg://")
function = getattr(importlib.import_module(module[6:]), given[name + "name"])
prefix = name + "reward_kwargs.settings."
settings = {k[len(prefix):]: float(v) for k, v in given.items() if k.startswith(prefix)}
near = SLAB.replace("0.500 1\\n", "0.473 1\\n")
score = function(data_source="x", solution_str=near, ground_truth="Pt3CuCO", extra_info={}, settings=settings)
assert score["phys"] == (10 if settings else 7), score
"""

TRAIN_PPO_RAY = """
import importlib.util, json, sys, urllib.request
sys.path.insert(0, ROOT)
from tests.rewards_fast.cif_texts import SLAB
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
url = given["--reward.remote_url"]
job = ["prompt " + SLAB], ["prompt "], ["Pt3CuCO"]
if url.endswith(".py"):
    spec = importlib.util.spec_from_file_location("reward_func", url)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    reply = module.reward_func(*job)
else:
    body = json.dumps(dict(zip(("query", "prompts", "labels"), job))).encode()
    request = urllib.request.Request(url, body, {"content-type": "application/json"})
    reply = json.load(urllib.request.urlopen(request))
assert round(reply["rewards"][0], 6) == 10 and round(reply["scores"][0], 6) == 1, reply
"""

# Ray and NeMo-RL as far as an environment of one's own touches them; registering one scores with it,
# as its rollouts do.
RAY = """
class Remote:
    def __init__(self, cls):
        self.cls = cls
    def options(self, **options):
        return self
    def remote(self, *arguments):
        return self.cls(*arguments)

remote = Remote
"""

NEMO_RL_INTERFACES = """
from abc import ABC, abstractmethod
from typing import NamedTuple

class EnvironmentReturn(NamedTuple):
    observations: list
    metadata: list
    next_stop_strings: list
    rewards: object
    terminateds: object
    answers: object

class EnvironmentInterface(ABC):
    @abstractmethod
    def step(self, message_log_batch, metadata): ...
    @abstractmethod
    def global_post_process_and_metrics(self, batch): ...
"""

NEMO_RL_UTILS = """
import importlib, sys
sys.path[:0] = [ROOT, "."]
import torch
from tests.rewards_fast.cif_texts import SLAB, TARGET

def register_env(name, path):
    module, _, cls = path.rpartition(".")
    made = getattr(importlib.import_module(module), cls).options(runtime_env={})
    environment = made.remote({"reward": {"near": 0.7}})
    near = SLAB.replace("0.500 1\\n", "0.473 1\\n")
    user, tool = {"role": "user", "content": TARGET}, {"role": "environment", "content": SLAB}
    logs = [[user, {"role": "assistant", "content": near}],
            [user, {"role": "assistant", "content": "no"}, tool],
            [{"role": "user", "content": "?"}, {"role": "assistant", "content": SLAB}]]
    given = [None, {}, {"ground_truth": "Pt3CuCO"}]
    observations, metadata, stops, rewards, ended, answers = environment.step(logs, given)
    assert torch.allclose(rewards, torch.tensor([10.0, -15, 10])) and rewards.dtype == torch.float32, rewards
    assert ended.bool().all() and len(observations) == len(stops) == 3
    assert metadata[2] == {"ground_truth": "Pt3CuCO"}
    assert set(observations[0]) == {"role", "content"} and answers is None
    batch, metrics = environment.global_post_process_and_metrics({"rewards": rewards})
    assert abs(metrics["cif_reward"] - 5 / 3) < 1e-6
"""

PIP = """#!/bin/bash
[ "$1 $2" = "install .[server]" ] && grep -q '^server = ' "$ROOT/pyproject.toml"
"""


def script_of(page: str, folder: Path) -> str:
    """The bash script of a page; blocks with a file's name write that file,
    `text` blocks are for reading alone."""
    lines = ["set -euo pipefail", "trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT"]
    for i, (language, name, body) in enumerate(BLOCK.findall(page)):
        if name:
            (folder / name).write_text(body)
        elif language == "bash":
            lines.append(body)
        elif language == "python":
            (folder / f"block{i}.py").write_text(PRELUDE.replace("ROOT", repr(str(ROOT))) + body)
            lines.append(f"python block{i}.py")
        elif language == "pycon":
            with (folder / "session.txt").open("a") as session:
                session.write(body + "\n")
        else:
            assert language == "text", f"a block of {language!r} is not run by any test"
    if (folder / "session.txt").exists():
        lines.append("python -m doctest session.txt")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("page", PAGES, ids=[p.stem for p in PAGES])
def test_what_a_page_says_runs(page: Path, tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert re.match(r"# .+\n\n```", text), "a page starts with what to paste"
    for port in sorted(set(re.findall(r"\b80\d\d\b", text))):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            text = text.replace(port, str(probe.getsockname()[1]))
    for language, name, body in BLOCK.findall((ROOT / "docs" / "rewards" / "scores.md").read_text()):
        if language == "cif":  # its example is used by other pages too
            (tmp_path / name).write_text(body)
    stubs = {
        "verl/trainer/main_ppo.py": MAIN_PPO,
        "openrlhf/cli/train_ppo_ray.py": TRAIN_PPO_RAY,
        "ray/__init__.py": RAY,
        "nemo_rl/environments/interfaces.py": NEMO_RL_INTERFACES,
        "nemo_rl/environments/utils.py": NEMO_RL_UTILS,
    }
    for name, code in stubs.items():
        path = tmp_path / "stubs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code.replace("ROOT", repr(str(ROOT))))
    (tmp_path / "bin").mkdir()
    programs = {
        "pip": PIP,
        "python": f'#!/bin/bash\nexec {sys.executable} "$@"\n',
        "rewards-fast": f'#!/bin/bash\nexec {sys.executable} -m rewards_fast.cli "$@"\n',
    }
    for name, code in programs.items():
        (tmp_path / "bin" / name).write_text(code)
        (tmp_path / "bin" / name).chmod(0o755)
    run = subprocess.run(
        ["bash", "-c", script_of(text, tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "ROOT": str(ROOT),
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": f"{tmp_path / 'stubs'}:{ROOT}",
        },
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "***Test Failed***" not in run.stdout


def test_the_pages_are_there() -> None:
    assert {p.stem for p in PAGES} == {
        *("trl", "verl", "openrlhf", "frameworks", "server", "scores", "reasons", "tuning")
    }
    front = (ROOT / "README.md").read_text() + (ROOT / "docs" / "rewards_fast.md").read_text()
    for page in PAGES:
        assert f"rewards/{page.name}" in front
