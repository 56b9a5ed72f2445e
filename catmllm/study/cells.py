"""The file of a study, and its runs.

It has `cells` (a name and `key: value` overrides each) and `seeds` (pairs of split seed and seed, the same
for every cell); `asks` and `hours`, what it is for and the CPU hours that it should take; and if it likes
`files` (configurations below all overrides), `base` (overrides of all), `ancestor` (overrides of a run per
seed whose last stage every cell of that seed starts from), `ranks` (processes of a run: batches are by rank)
and `axis` (what the cells stand at in the figure), and `against` (the cell that another is compared with,
where that is not the first one). `{runs}` in a cell is the folder of its seed's runs, of which it may take
what an earlier cell left: `{runs}/CELL/STAGE`. A cell may say `samples: {property: P, design: D}` in
place of `joint.steps` and its shares. With `of` it is another file, relative to this one, of
which it has other keys, and other cells where it names some.

A killed study goes on by the same command: what has its report is kept, the trainer resumes the rest.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from catmllm.config import Config, ConfigError, from_arguments, to_dict
from catmllm.pipeline import differences
from catmllm.study.reuse import OPEN, adopt, runs_below

Runner = Callable[[list[str], Path], None]
SAMPLES = "samples"  # of a cell, and no key of the trainer
BEGAN = "began_with.json"  # of a run: which settings have trained the stages that it took
_KEYS = {"cells", "seeds", "asks", "hours", "files", "base", "ancestor", "ranks", "axis", "against"}


@dataclass(frozen=True)
class Axis:
    """What the curve of a figure is over: a place for each cell that is on it; the others are controls."""

    name: str
    at: Mapping[str, float]
    log: bool = False


@dataclass(frozen=True)
class Study:
    """What the file says, and `more`: arguments after those of every run."""

    cells: Mapping[str, Mapping[str, Any]]
    seeds: Sequence[tuple[int, int]]  # (data.split_seed, seed)
    base: Mapping[str, Any] = field(default_factory=dict)
    ancestor: Mapping[str, Any] | None = None
    files: Sequence[str] = ()
    ranks: int = 1
    axis: Axis | None = None
    against: Mapping[str, str] = field(default_factory=dict)
    asks: str = ""
    hours: float | None = None
    more: Sequence[str] = ()


def read(path: Path, more: Sequence[str] = (), ranks: int | None = None) -> Study:
    """Raises ConfigError where the file is none or a cell's settings are not the trainer's."""
    tree = _tree(path)
    if "of" in tree:
        other = _tree(path.parent / str(tree.pop("of")))
        tree = {**other, **tree, "cells": {**other.get("cells", {}), **tree.get("cells", {})}}
    strange = set(tree) - _KEYS
    if strange or not isinstance(tree.get("cells"), dict) or not tree["cells"] or not tree.get("seeds"):
        raise ConfigError(
            f"{path}: a study has `cells`, `seeds` and perhaps "
            + ", ".join(sorted(_KEYS - {"cells", "seeds"}))
            + (f", not {', '.join(map(repr, sorted(strange)))}" if strange else "")
        )
    try:
        seeds = [(int(split), int(seed)) for split, seed in tree["seeds"]]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: `seeds` are pairs [split seed, seed]: {error}") from error
    cells = {str(name): values or {} for name, values in tree["cells"].items()}
    for name in cells:
        if "/" in name or name in ("ancestor", ".", ".."):
            raise ConfigError(f"{path}: a cell's runs are in a folder of its name, which cannot be {name!r}")
    for name, values in {"base": tree.get("base"), "ancestor": tree.get("ancestor"), **cells}.items():
        if not isinstance(values or {}, dict):
            raise ConfigError(f"{path}: `{name}` has no `key: value` pairs but {values!r}")
    study = Study(
        cells,
        seeds,
        tree.get("base") or {},
        tree.get("ancestor"),
        tree.get("files") or (),
        ranks or tree.get("ranks", 1),
        _axis(path, tree.get("axis"), cells),
        _against(path, tree.get("against"), cells),
        tree.get("asks", ""),
        tree.get("hours"),
        more,
    )
    for values in (*cells.values(), study.ancestor or {}):
        from_arguments(arguments(study, values, seeds[0], Path("out")))
    return study


def _tree(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}") from error
    return tree if isinstance(tree, dict) else {}


def _axis(path: Path, tree: Any, cells: Mapping[str, Any]) -> Axis | None:
    if tree is None:
        return None
    try:
        axis = Axis(tree["name"], {str(k): float(v) for k, v in tree["at"].items()}, tree.get("log", False))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: `axis` has a `name`, and `at`, a number for cells: {error}") from error
    if strange := axis.at.keys() - cells.keys():
        raise ConfigError(f"{path}: `axis.at` names no cell: {', '.join(sorted(strange))}")
    return axis


def _against(path: Path, tree: Any, cells: Mapping[str, Any]) -> dict[str, str]:
    pairs = {} if tree is None else tree
    if not isinstance(pairs, dict) or not {*map(str, pairs), *map(str, pairs.values())} <= cells.keys():
        raise ConfigError(f"{path}: `against` has a cell for some cells, not {tree!r}")
    return {str(name): str(base) for name, base in pairs.items()}


def arguments(study: Study, values: Mapping[str, Any], seeds: tuple[int, int], out: Path) -> list[str]:
    """The trainer's files and `key=value` arguments of one run."""
    merged = {**study.base, **values, "data.split_seed": seeds[0], "seed": seeds[1], "out": str(out)}
    asked = merged.pop(SAMPLES, None)
    words = [*study.files, *(_word(key, value) for key, value in merged.items())]
    words = [word.replace("{runs}", str(out.parent)) for word in words]
    if asked is not None:
        words += _sampled(asked, from_arguments([*words, *study.more]).joint.batch_size * study.ranks)
    return [*words, *study.more]


def every_run(study: Study) -> dict[str, Config]:
    """The configuration of each kind of run, by its cell: those of the first seeds, as a plan needs them."""
    asked = {"ancestor": study.ancestor, **study.cells} if study.ancestor is not None else study.cells
    return {
        name: from_arguments(arguments(study, values or {}, study.seeds[0], Path("runs") / name))
        for name, values in asked.items()
    }


# Keys of a stage that change what a step says, not what it takes.
_NO_SIZE = {
    "steps", "lr", "encoder_lr", "mmtg_sign", "mmtg_lambda", "kl", "beta", "reward", "adsorbate_weight",
    "energy_weight", "prompts", "predictor", "sampling", "frames",
}  # fmt: skip


def plans(runs: Mapping[str, Config], only: Sequence[str] | None = None) -> list[tuple[str, Config, str]]:
    """Of every stage of the runs, or of some: the cells that it is of, a configuration, and its name; those
    whose steps have the same size are one."""
    found: dict[str, tuple[list[str], Config, str]] = {}
    for cell, config in runs.items():
        tree = to_dict(config)
        for stage in config.stages:
            if only and stage not in only:
                continue
            sized = {k: v for k, v in tree[stage].items() if k not in _NO_SIZE}
            whole = [tree[k] for k in ("model", "lora", "precision", "checkpointing", "replicate")]
            key = json.dumps([stage, sized, whole])
            found.setdefault(key, ([], config, stage))[0].append(cell)
    return [(f"{stage} of {'; '.join(cells)}", config, stage) for cells, config, stage in found.values()]


def is_study(path: Path) -> bool:
    """Whether a file is a study's, and no configuration."""
    return path.is_file() and not {"cells", "of"}.isdisjoint(_tree(path))


def _word(key: str, value: Any) -> str:
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"


def _sampled(asked: Any, batch: int) -> list[str]:
    """Steps and shares that `joint` needs for so many property samples and so many others, half of them of
    designs. Raises ConfigError where a step does not hold whole ones."""
    try:
        known, shown = int(asked["property"]), int(asked["design"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"`{SAMPLES}` has numbers for `property` and `design`: {error}") from error
    if known < 0 or shown < 0 or known + shown == 0 or (known + shown) % batch:
        raise ConfigError(
            f"`{SAMPLES}`: {known} + {shown} samples make no whole steps of {batch} (joint.batch_size on all "
            "ranks)"
        )
    share = known / (known + shown)
    return [
        f"joint.steps={(known + shown) // batch}",
        f"joint.property_share={share!r}",
        f"joint.design_share={(1 - share) / 2!r}",
    ]


def run_all(
    study: Study, out: Path, run: Runner, only: str | None = None, reuse: Sequence[Path] = ()
) -> dict[str, list[Path]]:
    """Every run that has no report yet; the folders of each cell's runs, in the order of the seeds. A run
    takes the stages that another one of the study, or in and below the folders `reuse`, has trained with its
    settings. Raises ConfigError for a folder without a finished run."""
    if only is not None and only not in study.cells:
        raise ConfigError(f"no cell {only!r}: there are {', '.join(study.cells)}")
    runs = [run for place in reuse for run in runs_below(place)]
    if empty := [place for place in reuse if not runs_below(place)]:
        raise ConfigError(f"{empty[0]}: no finished run is there or below it")

    def once(values: Mapping[str, Any], seeds: tuple[int, int], folder: Path) -> None:
        words = arguments(study, values, seeds, folder)
        if names := adopt(words, folder, study.ranks, [*runs, *runs_below(out)]):
            print(f"== {folder}: {', '.join(names)} of another run", file=sys.stderr, flush=True)
        _once(words, folder, run, study.ranks)

    folders: dict[str, list[Path]] = {name: [] for name in study.cells if only in (None, name)}
    for split, seed in study.seeds:
        place = out / f"{split}-{seed}"
        more: dict[str, Any] = {}
        if study.ancestor is not None:
            first = place / "ancestor"
            once(study.ancestor, (split, seed), first)
            stages = json.loads((first / "metrics.json").read_text())["config"]["stages"]
            more["init"] = str(first / stages[-1])
        for name in folders:
            folder = place / name
            once({**study.cells[name], **more}, (split, seed), folder)
            folders[name].append(folder)
    return folders


def _once(words: list[str], folder: Path, run: Runner, ranks: int) -> None:
    """Raises ConfigError where a finished run is of other settings: the study's file was edited, or what the
    run began with was trained anew."""
    config = from_arguments(words)
    if not (folder / "report.html").is_file():
        run(words, folder)
        (folder / BEGAN).write_text(json.dumps(_began_with(config), indent=1) + "\n")
        return
    metrics = json.loads((folder / "metrics.json").read_text())
    # what is asked for as null has become what fits the device
    found = [
        d for d in differences(metrics["config"], to_dict(config)) if d[0] not in OPEN or d[2] is not None
    ]
    found += [("ranks", old, ranks) for old in [metrics["machine"]["ranks"]] if old != ranks]
    if (folder / BEGAN).is_file():  # a run of before this was kept has none
        began, now = json.loads((folder / BEGAN).read_text()), _began_with(config)
        found += [(f"what {place} holds", "then", "now") for place in now if began.get(place) != now[place]]
    if found:
        raise ConfigError(
            f"{folder} was run with other settings ("
            + "; ".join(f"{key}: {old} -> {new}" for key, old, new in found[:3])
            + "): give another --out, or remove that folder"
        )


def _began_with(config: Config) -> dict[str, str]:
    """The stages of other runs that a run takes, and a hash of the settings that each was trained with."""
    places = [place for place in (config.init, config.ga_grpo.predictor) if place is not None]
    described = {place: Path(place) / "catmllm.json" for place in places}
    return {p: hashlib.sha256(f.read_bytes()).hexdigest() for p, f in described.items() if f.is_file()}


def trainer(ranks: int) -> Runner:
    """Runs the trainer in processes of its own. Raises RuntimeError with its status where it fails."""

    def run(words: list[str], folder: Path) -> None:
        print(f"== {folder}", file=sys.stderr, flush=True)
        script = [str(Path(__file__).parents[1] / "train.py"), *words]
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        done = subprocess.run([sys.executable, *(launch if ranks > 1 else []), *script], check=False)
        if done.returncode:
            raise RuntimeError(
                f"{folder}: the trainer ended with {done.returncode}; the same command goes on from there"
            )

    return run
