"""Every command in the pages is run as it stands, in a folder that has what its reader has, or is named here
with the reason why it is not.

Runs are small: a model of a few steps stands for a trained one, training takes two steps on one rank, a
search one. make's targets are run dry. docs/rewards is run in test_reward_docs, Python and YAML in
test_page_blocks.
"""

from __future__ import annotations

import gzip
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch.distributed as dist

from catmllm.cli.main import main
from catmllm.data.own.reading import Wanted, read_systems
from catmllm.data.slabs import load_slabs
from catmllm.structure.cif import write_cif
from catmllm.structure.text import three_part_text
from rewards_fast.cli import main as rewards_fast
from tests.data import oc20_files
from tests.data.own_files import row, write_lmdb
from tests.test_docs import PAGES, ROOT
from tests.test_page_commands import LAUNCHER, commands

# The first that matches a command counts.
NOT_RUN = {
    r"^git clone|pip install|^cd |^\. ": "sets up a machine: tests/test_packages.py tries wheels",
    r"^torchrun .*a100x8/": "8 GPUs of 80 GB: `catmllm plan` traces it here",
    r"^torchrun --(nnodes|signals)": "Slurm and many nodes: tests/test_launch.py has the launchers",
    r"^torchrun \.\.\.": "a part of a command: tests/behaviour/test_lora.py trains adapters",
    r"pretrained=Qwen": "downloads 16 GB: tests/behaviour/test_pretrained.py has a folder of that form",
    r"^(wget|tar|mkdir|hf) ": "160 GB of other people's files: tests/data has files of their layouts",
    r"--model runs/a100x8": "a run of 8 GPUs",
    r"^vllm |grpo.vllm=": "vLLM has an environment of its own: tests/sample/test_vllm_engine.py starts it",
    r"^python bench/": "a benchmark: `make bench` runs all",
    r"^catmllm rollouts |grpo.rollout=service": "two programs: tests/sample/test_service.py runs them",
    r"^catmllm study ": "hours: `make studies-smoke` runs every study with a few steps",
    r"--judge sevennet": "minutes: tests/evaluate has the judge",
    r"evaluate RUN --slabs": "minutes of relaxations: tests/cli has it with a toy judge",
    r" SOURCES ": "stands for files that docs/data.md names",
    r"paper/printed.yaml": "a model of its own: tests/test_configs.py reads it",
}
# Words of a page that are names for the reader's own.
INSTEAD = {"RUN": "runs/tiny", "CONFIG.yaml": "my.yaml"}
# One made slab is nothing to train on.
INSTEAD |= {"data.path=more.jsonl.gz": "data.path=slabs.jsonl"}
# What makes a command short; it comes last and so wins.
SHORT = {
    "design": ["--steps", "1", "--pool", "2"],
    "finetune": ["--set", *(f"{stage}.{key}" for stage in ("encoder", "joint")
                            for key in ("steps=2", "validate_every=0"))],
    "make": ["--slabs", "1", "--workers", "1"],
    "oc20": ["--workers", "1"],
    "plan": ["--no-search"],
}  # fmt: skip
TWO_STEPS = [f"{stage}.steps=2" for stage in ("encoder", "align", "joint", "instruct", "grpo")]
SMALL_TRAINING = [*TWO_STEPS, "joint.validate_every=0", "ga_grpo.tasks=1", "evaluate.generation_samples=2",
                  "evaluate.indicative=0", "evaluate.design_after=[]", "evaluate.design_tasks=1",
                  "evaluate.judge=none"]  # fmt: skip
MINE = [page for page in PAGES if page.parent.name != "rewards"]


def reason(words: list[str]) -> str | None:
    """Why a command is not run."""
    return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, " ".join(words))), None)


def ours(words: list[str]) -> bool:
    return words[0] in ("catmllm", "rewards-fast", "make") or LAUNCHER in words


def test_every_command_is_run_or_has_a_reason() -> None:
    found = [words for page in MINE for words in commands(page)]
    assert not [" ".join(words) for words in found if not ours(words) and reason(words) is None]
    idle = [pattern for pattern in NOT_RUN if not any(re.search(pattern, " ".join(w)) for w in found)]
    assert not idle, "reasons without a command"
    assert sum(reason(words) is None for words in found) > 50


def test_the_example_of_own_data_is_read_whole() -> None:
    found = read_systems([ROOT / "docs/examples/slabs.extxyz"], Wanted())
    assert len(found.items) == 157 and not found.refused and not found.notes


@pytest.fixture
def place(unbroken: Path, run_config: Path, tmp_path: Path) -> Path:
    """A reader's folder: structures and labels of theirs, OC20's files, a trained run under the names that
    pages use, and what a clone has."""
    systems = load_slabs()[:240:10]
    frames = [system.as_ase() for system in systems]
    (tmp_path / "calcs").mkdir()
    for k, system in enumerate(systems[:12]):
        (tmp_path / "calcs" / f"{k:02}.cif").write_text(write_cif(system))
    for frame, system in zip(frames, systems):
        frame.info |= {"adsorption_energy": system.known_energy, "adsorbate": system.adsorbate}
    ase.io.write(tmp_path / "calcs" / "relaxed.extxyz", frames[12:])
    table = [f"calcs/{k:02}.cif,{s.known_energy},{s.adsorbate}" for k, s in enumerate(systems[:12])]
    (tmp_path / "labels.csv").write_text("\n".join(["file,energy,adsorbate", *table]) + "\n")
    for name in ("slab.cif", "guesses/a.cif", "answers/fixed-000/1.cif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(write_cif(systems[0]))
    arrays = {"cell": np.array, "pos": np.array}
    records = [row(a, tags=s.tags.tolist(), adsorbate=s.adsorbate) for a, s in zip(frames, systems)]
    write_lmdb(
        tmp_path / "test.lmdb",
        [
            {k: arrays.get(k, lambda v: v)(v) for k, v in r.items()} | {"atomic_numbers": a.numbers}
            for r, a in zip(records[:3], frames)
        ],
    )
    labelled = [json.dumps(r | {"energy": s.known_energy}) for r, s in zip(records, systems)]
    (tmp_path / "dft111_882.jsonl.gz").write_bytes(gzip.compress("\n".join(labelled).encode()))
    texts = [f'{k},"{three_part_text(s)}",{s.known_energy}' for k, s in enumerate(systems)]
    for name in ("texts.csv", "more.csv"):
        (tmp_path / name).write_text("\n".join(["id,text,energy", *texts]) + "\n")
    (tmp_path / "wanted.csv").write_text('system,energy\n"CO</s>Pt9Cu3 (1 1 1)",-1.2\n')
    _oc20(tmp_path)
    for name in ("configs", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "my.yaml").write_bytes(run_config.read_bytes())
    (tmp_path / "slabs.jsonl").symlink_to(run_config.parent / "slabs.jsonl")
    for name in ("tiny", "mine"):
        shutil.copytree(unbroken, tmp_path / "runs" / name)
    return tmp_path


def _oc20(folder: Path) -> None:
    """Files as OC20 and OC20-Dense are downloaded into `raw`; links to them by the shorter names of pages."""
    cases, dense = oc20_files.cases(12), oc20_files.cases(16)[12:]
    raw = folder / "raw"
    (train := raw / "is2res_train_val_test_lmdbs/data/is2re/all/train").mkdir(parents=True)
    oc20_files.write_pyg_lmdb(train / "data.lmdb", cases)
    oc20_files.dump(oc20_files.mapping(cases), raw / "oc20_data_mapping.pkl")
    mapping = {
        c.sid: {"system_id": f"system{c.sid}", "config_id": "heur0", "mpid": f"mp-{c.bulk}", "shift": 0.125,
                "top": True, "adsorption_site": (), "miller_idx": c.miller, "adsorbate": f"*{c.adsorbate}"}
        for c in dense
    }  # fmt: skip
    oc20_files.dump(mapping, raw / "oc20dense_mapping.pkl")
    targets = {f"system{c.sid}": [("heur0", c.energy)] for c in dense}
    oc20_files.dump(targets, raw / "oc20dense_targets.pkl")
    for c in dense:
        (one := raw / f"dense/trajs/system{c.sid}").mkdir(parents=True)
        ase.io.write(one / f"system{c.sid}_heur0.traj", [c.calculated(0.5), c.calculated()])
        ase.io.write(one / f"system{c.sid}_surface.traj", [c.calculated()])
    (folder / "is2re").symlink_to(train.parents[1])
    (folder / "oc20_dense_trajectories").symlink_to(raw / "dense/trajs")
    for path in raw.glob("*.pkl"):
        (folder / path.name).symlink_to(path)


def made_short(words: list[str], k: int) -> list[str]:
    """The words that are run for a command, the k-th of its page."""
    given = "answers" if "generator" in words else f"exported{k}"
    words = [given if word == "DIR" else INSTEAD.get(word, word) for word in words]
    if words[0] == "catmllm":
        kind = next((word for word in words[1:3] if word in SHORT), None)
        words = [*words, *SHORT.get(kind or "", [])]
    elif LAUNCHER in words and "--help" not in words:
        given = words[words.index(LAUNCHER) + 1 :]
        more = SMALL_TRAINING
        if "configs/tiny/text.yaml" not in given:  # it says where the run goes
            more = [*more, *([] if any(w.startswith("out=") for w in given) else [f"out=runs/new{k}"])]
            more = [*more, *([] if any(w.startswith("stages=") for w in given) else ["stages=[joint]"])]
            given = ["my.yaml", *(w for w in given if w != "my.yaml")]
        words = [*words[: words.index(LAUNCHER) + 1], *given, *more]
    return words


def outputs(words: list[str]) -> list[str]:
    """The folders of runs that a command begins."""
    if words[:2] == ["catmllm", "finetune"]:
        return [after for word, after in pairwise(words) if word == "--out"]
    return [w.removeprefix("out=") for w in words if w.startswith("out=") and LAUNCHER in words]


def started(words: list[str]) -> int:
    """The exit status of a command."""
    if words[0] == "make":
        dry = subprocess.run(
            ["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False
        )
        print(dry.stdout)
        sys.stderr.write(dry.stderr)
        return dry.returncode
    try:
        if LAUNCHER in words:
            train = runpy.run_path(str(ROOT / LAUNCHER))["main"]
            return int(train(words[words.index(LAUNCHER) + 1 :]))
        return int((main if words[0] == "catmllm" else rewards_fast)(words[1:]) or 0)
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


RUN = {
    page: found for page in MINE if (found := [w for w in commands(page) if ours(w) and reason(w) is None])
}


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_commands_of_a_page_run(
    page: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the order of the page, each once."""
    monkeypatch.chdir(place)
    wrong, seen = {}, set()
    for k, words in enumerate(RUN[page]):
        if (line := shlex.join(words)) in seen:
            continue
        seen.add(line)
        for out in outputs(words):  # a reader's is new, or of the same command
            shutil.rmtree(out, ignore_errors=True)
        status = started(made_short(words, k))
        said = capsys.readouterr()
        if status or not said.out + said.err:
            wrong[line] = f"status {status}: {said.err[-800:] or said.out[-800:]}"
    assert not wrong, "\n".join(f"{line}\n   {why}" for line, why in wrong.items())
