"""Stages that earlier runs have trained with the same settings: a study need not train them again.

A stage's weights follow from what the stages of its run share (model, data, seeds, precision, …), from the
settings of the stages up to it, and from the number of ranks. Where all that is the same, the folder of the
stage is copied into the new run, with what was measured of it if `evaluate` asks for the same; the trainer
goes on from there. The commit that trained it may be another: the record says which.
"""

from __future__ import annotations

import itertools
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
    """A stage and the configuration that it was, or will be, trained with; its folder, where it has one."""

    stage: str
    config: Tree
    place: Path | None = None


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
    found: list[Path] = []  # folders of stages, those that one run went through
    for run in runs:
        record = json.loads((run / "metrics.json").read_text())
        if record["machine"]["ranks"] != ranks:
            continue
        chain = _chain(run / record["config"]["stages"][-1])
        there = [link.place for link in chain[len(before) : _same(wanted, chain)]]
        places = [place for place in there if place is not None]
        if len(places) > len(found):
            found = places
    if found:
        _copy(found, folder, tree)
    return [place.name for place in found]


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
    places = [last.parent / stage for stage in stages]
    links = [Link(place.name, json.loads((place / "catmllm.json").read_text()), place) for place in places]
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


def _copy(places: Sequence[Path], folder: Path, tree: Tree) -> None:
    part = folder.with_name(f"{folder.name}.part")  # of which a kill leaves nothing that looks like a run
    shutil.rmtree(part, ignore_errors=True)
    for place in places:
        # not linked: what is measured anew writes into it
        shutil.copytree(place, part / place.name, ignore=shutil.ignore_patterns("checkpoints"))
    kept: Tree = {"adopted": {"commits": {}}}
    for run, stages in itertools.groupby(places, key=lambda place: place.parent):
        _keep(run, [place.name for place in stages], tree, kept)
    (part / "metrics.json").write_text(json.dumps(kept, indent=1))
    part.rename(folder)


def _keep(run: Path, names: Sequence[str], tree: Tree, kept: Tree) -> None:
    """Add what a run has measured of stages that are taken from it."""
    record = json.loads((run / "metrics.json").read_text())
    old = record["config"]
    config = tree | {key: old[key] for key in OPEN if tree[key] is None}
    changed = {key for key, _, _ in differences(old, config)}
    asked = {key for key in changed if _below(key, ("evaluate", "ga_grpo"))}
    by_stage = ["validation", "ensemble"]
    if all(_below(key, ("ga_grpo", *_OF_DESIGN)) for key in asked):
        by_stage += ["property", "generation", "missing"]
    kept |= {key: record[key] for key in ("parameters", "data")} | {"config": config}
    for key in by_stage:
        if key in record:
            found = {name: record[key][name] for name in names if name in record[key]}
            kept[key] = kept.get(key, {}) | found
    if names[-1] == tree["stages"][-1] == old["stages"][-1] and asked <= {"evaluate.free_tasks"}:
        designs = ("design", "designs", *(("free_design",) if not asked else ()))
        kept |= {key: record[key] for key in designs if key in record}
    commits = dict.fromkeys(names, record["machine"].get("commit")) | taken(record)  # it may have taken some
    kept["adopted"]["commits"] |= {name: commits[name] for name in names}
