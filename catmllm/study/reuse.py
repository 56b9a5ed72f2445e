"""Stages that earlier runs have trained with the same settings: a study need not train them again.

A stage's weights follow from what the stages of its run share (model, data, seeds, precision, …), from the
settings of the stages up to it, and from the number of ranks. Where all that is the same, the folder of the
stage is copied into the new run, with what was measured of it if `evaluate` asks for the same; the trainer
goes on from there. The commit that trained it may be another: the record says which.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from catmllm.config import from_arguments, to_dict
from catmllm.pipeline import MENDABLE, differences
from catmllm.report.summary import taken
from catmllm.stages import STAGES

Tree = dict[str, Any]
OPEN = ("encoder_precision", "compile")  # null: what fits the device, which a record says
# Settings of other stages that a stage reads: the closed form of texts is fitted to those that will be asked,
# and `grpo` replays samples of `instruct`.
TEXTS = tuple(
    f"{stage}.{key}"
    for stage in ("joint", "instruct")
    for key in ("drop_configuration", "relaxed_text", "relaxed_scale", "relaxed_characters")
)
READS = {"encoder": TEXTS, "joint": TEXTS, "instruct": TEXTS, "grpo": ("instruct",)}
# What a stage's own measurements do not depend on: these are of the search.
_OF_DESIGN = (
    "evaluate.design_tasks", "evaluate.free_tasks", "evaluate.slab_tasks", "evaluate.slab_adsorbates",
    "evaluate.design_after", "evaluate.judge", "evaluate.budgets", "evaluate.tolerance",
)  # fmt: skip


class Link(NamedTuple):
    """A stage and the configuration that it was, or will be, trained with."""

    stage: str
    config: Tree


def runs_below(place: Path) -> list[Path]:
    """Folders of the finished runs in and below one."""
    return sorted(p.parent for p in place.rglob("report.html") if (p.parent / "metrics.json").is_file())


def adopt(words: Sequence[str], folder: Path, ranks: int, runs: Sequence[Path]) -> list[str]:
    """Copy into the folder of a run, which is not there yet, the first stages that one of `runs` has trained
    as the trainer's arguments say: of the run that has most of them. Returns their names."""
    if not runs or folder.exists():
        return []
    config = from_arguments(list(words))
    tree = to_dict(config)
    before = _chain(config.init)
    wanted = [*before, *(Link(stage, tree) for stage in config.stages)]
    best, n = None, len(before)
    for run in runs:
        record = json.loads((run / "metrics.json").read_text())
        stages = record["config"]["stages"]
        if record["machine"]["ranks"] == ranks and (k := _same(wanted, _chain(run / stages[-1]))) > n:
            best, n = run, k
    if best is None:
        return []
    names = [link.stage for link in wanted[len(before) : n]]
    _copy(best, folder, names, tree)
    return names


def _chain(init: str | Path | None) -> list[Link]:
    """The stages that a model went through: those of its run up to it, behind those that the run began with.
    A model whose run is not there is a link by its place."""
    if init is None:
        return []
    last = Path(init)
    record = last.parent / "metrics.json"
    if last.name not in STAGES or not record.is_file():
        return [Link(str(init), {})]
    config = json.loads(record.read_text())["config"]
    stages = config["stages"][: config["stages"].index(last.name) + 1]
    # each as it was trained, which may have been in another run
    links = [Link(stage, json.loads((last.parent / stage / "catmllm.json").read_text())) for stage in stages]
    return [*_chain(config["init"]), *links]


def _same(wanted: Sequence[Link], there: Sequence[Link]) -> int:
    """How many of the first stages are the same."""
    n = 0
    for ours, theirs in zip(wanted, there):
        if ours.stage != theirs.stage or _changed(theirs.config, ours.config, ours.stage):
            break
        n += 1
    return n


def _changed(old: Tree, new: Tree, stage: str) -> list[str]:
    """The settings that a stage reads and that are others."""
    read = (stage, *READS.get(stage, ()))
    closed = {"stages", "init", "evaluate", *MENDABLE, *STAGES}
    return [
        key
        for key, _, now in differences(old, new)
        if not (key in OPEN and now is None)
        and (_below(key, read) if key.split(".")[0] in STAGES else not _below(key, closed))
    ]


def _below(key: str, parents: Sequence[str] | set[str]) -> bool:
    return any(f"{key}.".startswith(f"{parent}.") for parent in parents)


def _copy(run: Path, folder: Path, names: Sequence[str], tree: Tree) -> None:
    part = folder.with_name(f"{folder.name}.part")  # of which a kill leaves nothing that looks like a run
    shutil.rmtree(part, ignore_errors=True)
    for name in names:
        # not linked: what is measured anew writes into it
        shutil.copytree(run / name, part / name, ignore=shutil.ignore_patterns("checkpoints"))
    record = json.loads((run / "metrics.json").read_text())
    old = record["config"]
    config = tree | {key: old[key] for key in OPEN if tree[key] is None}
    changed = {key for key, _, _ in differences(old, config)}
    asked = {key for key in changed if _below(key, ("evaluate", "ga_grpo"))}
    by_stage = ["validation", "ensemble"]
    if all(_below(key, ("ga_grpo", *_OF_DESIGN)) for key in asked):
        by_stage += ["property", "generation", "missing"]
    kept: Tree = {key: record[key] for key in ("parameters", "data")}
    for key in by_stage:
        if key in record:
            kept[key] = {name: record[key][name] for name in names if name in record[key]}
    ended = list(names) == tree["stages"] and old["stages"][-1] == names[-1]
    if ended and asked <= {"evaluate.free_tasks"}:
        designs = ("design", "designs", *(("free_design",) if not asked else ()))
        kept |= {key: record[key] for key in designs if key in record}
    commits = dict.fromkeys(names, record["machine"].get("commit")) | taken(record)  # it may have taken some
    kept["adopted"] = {"commits": {name: commits[name] for name in names}}
    (part / "metrics.json").write_text(json.dumps({**kept, "config": config}, indent=1))
    part.rename(folder)
