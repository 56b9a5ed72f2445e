"""One stamp and one format for every benchmark: what was measured, compared with what, how,
and of which commit.

A bench parses `arguments(__doc__)`, makes claims with `claim`, and hands them to `finish`, which prints them
and writes `bench/results/<claim>.json`. The tables in README.md and docs/ are made from these files
(`tables.py`).

    python bench/NAME.py --base COMMIT    # the same bench of another commit and of this tree, in turn

A claim that was measured on another kind of processor before is kept as `<claim>.<kind>.json`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
# The packages that are measured: of this tree, or of the commit that `--base` names. This folder itself
# leaves the path: a script in it would shadow a package of its name.
TREE = Path(os.environ.get("CATMLLM_BENCH_TREE", ROOT))
sys.path[:] = [
    str(TREE),
    str(TREE / "kernels"),
    *(p for p in sys.path if Path(p).resolve() != ROOT / "bench"),
]

SKIPPED = 77  # exit status of a bench that cannot run here: `make bench` prints its reason and goes on
VERSIONS = {
    "torch": "torch", "triton": "triton", "numpy": "numpy", "transformers": "transformers", "trl": "trl",
    "ase": "ase", "pymatgen": "pymatgen", "gemmi": "gemmi", "fairchem.core": "fairchem-core",
    "numba": "numba", "uvicorn": "uvicorn", "fastapi": "fastapi", "sevenn": "sevenn", "chgnet": "chgnet",
    "diep": "diep",
}  # fmt: skip


# Arguments and ends -----------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found = super().parse_args(args, namespace)
        if found.base:
            compare(found)
            raise SystemExit(0)
        return found


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """A parser with what every bench takes. With `--base` it makes the comparison and ends the process."""
    parser = _Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller and fewer; replaces no full record")
    parser.add_argument("--json", action="store_true", help="the records as JSON instead of text")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="folder of the records")
    parser.add_argument("--base", metavar="COMMIT", help="compare with this commit; writes no record")
    return parser


def skip(reason: str) -> NoReturn:
    """End a bench that cannot run here."""
    print(f"skipped: {reason}", file=sys.stderr)
    raise SystemExit(SKIPPED)


def finish(args: argparse.Namespace, claims: Sequence[dict[str, Any]]) -> None:
    """Stamp, write and print."""
    stamped = [rounded({**c, **stamp(args.quick, c.get("device"))}) for c in claims]
    for one in stamped:
        write(args.out, one)
    print(json.dumps(stamped, ensure_ascii=False) if args.json else "\n\n".join(map(as_text, stamped)))


# Claims -----------------------------------------------------------------------------------------------------


def in_turn(
    calls: Mapping[str, Callable[[], Any]],
    turns: int,
    clock: Callable[[], float] = time.perf_counter,
    scale: float = 1.0,
) -> dict[str, list[float]]:
    """Seconds · scale of each call, all in turn, after one turn that does not count."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 1):
        for name, call in calls.items():
            start = clock()
            call()
            if turn:
                samples[name].append(scale * (clock() - start))
    return samples


def claim(
    name: str,
    says: str,
    unit: str,
    cases: Mapping[str, Mapping[str, Sequence[float]]],
    conditions: Mapping[str, Any],
    *,
    less_is_better: bool = True,
) -> dict[str, Any]:
    """A claim from samples: case -> who -> values, the first of them ours, turn by turn.

    `value` and `peer` are medians. `ratio` says by how much ours is better: the median over the turns of the
    ratio within a turn, whose two sides saw the same machine; `spread` has its quartiles.
    """
    value, peer, ratio, spread = {}, {}, {}, {}
    for case, samples in cases.items():
        (_, ours), *others = samples.items()
        value[case] = statistics.median(ours)
        if not others:
            continue
        peer[case] = {who: statistics.median(x) for who, x in others}
        turns = {who: [_better(a, b, less_is_better) for a, b in zip(ours, x)] for who, x in others}
        ratio[case] = {who: statistics.median(x) for who, x in turns.items()}
        spread[case] = {who: _quartiles(x) for who, x in turns.items()}
    return {
        "claim": name,
        "says": says,
        "unit": unit,
        "better": "less" if less_is_better else "more",
        "value": value,
        "peer": peer,
        "ratio": ratio,
        "spread": spread,
        "conditions": dict(conditions),
    }


def _better(ours: float, theirs: float, less: bool) -> float:
    return theirs / ours if less else ours / theirs


def _quartiles(values: Sequence[float]) -> list[float]:
    if len(values) < 2:
        return [min(values), max(values)]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [first, third]


def rounded(part: Any, digits: int = 4) -> Any:
    """Every float to so many significant digits."""
    if isinstance(part, float):
        short = float(f"{part:.{digits}g}")
        return int(short) if short.is_integer() and abs(short) >= 10 ** (digits - 1) else short
    if isinstance(part, Mapping):
        return {str(k): rounded(v, digits) for k, v in part.items()}
    return [rounded(v, digits) for v in part] if isinstance(part, list | tuple) else part


# The stamp --------------------------------------------------------------------------------------------------


def stamp(quick: bool, device: str | None = None) -> dict[str, Any]:
    """What every record says of its making. `device`: the name of the GPU that was measured, if one was."""
    return {
        "quick": quick,
        "command": command(),
        **commit(TREE),
        "date": str(date.today()),
        "versions": versions(),
        "processor": {"device": device} if device else processor(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def command() -> str:
    """How this process was asked, without what only says where the answer goes."""
    words, left = [], iter(sys.argv[1:])
    for word in left:
        if word == "--out":
            next(left, None)
        elif word != "--json" and not word.startswith("--out="):
            words.append(word)
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name
    return shlex.join(["python", str(name), *words])


def commit(tree: Path) -> dict[str, Any]:
    """The commit, and whether what it measured differs from it (pages and records may)."""

    def git(*words: str) -> str | None:
        done = subprocess.run(["git", "-C", str(tree), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short=10", "HEAD")
    changed = git("status", "--porcelain", "--", ".", ":!bench/results", ":!docs", ":!*.md")
    return {"commit": head, "dirty": None if head is None else bool(changed)}


def versions() -> dict[str, str]:
    """Of Python and of those packages that this process has imported."""
    found = {"python": platform.python_version()}
    for module, distribution in VERSIONS.items():
        if module in sys.modules:
            unknown = str(getattr(sys.modules[module], "__version__", "unknown"))
            found[distribution] = version_of(distribution) or unknown
    return found


def version_of(distribution: str) -> str | None:
    """Of an installed package, without importing it."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> dict[str, Any]:
    """Kind (the core's name where it is known), maker's name, family, model, cores that may be used,
    vector instruction sets."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            fields[name.strip()] = value.strip()
    except OSError:
        pass
    family, model = (int(fields[k]) if fields.get(k, "").isdigit() else None for k in ("cpu family", "model"))
    flags = fields.get("flags", fields.get("Features", "")).split()
    name = fields.get("model name") or platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "kind": kind(fields.get("vendor_id", ""), family, model) or name,
        "name": name,
        "family": family,
        "model": model,
        "cores": cores,
        "sets": [
            s
            for s in ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "sve")
            if s in flags
        ],
    }


def kind(vendor: str, family: int | None, model: int | None) -> str | None:
    """The name of the cores by family and model, as the makers' lists of model numbers have it."""
    if model is None:
        return None
    intel = {85: "Skylake-X", 106: "Ice Lake", 108: "Ice Lake", 143: "Sapphire Rapids", 207: "Emerald Rapids",
             173: "Granite Rapids", 174: "Granite Rapids"}  # fmt: skip
    if vendor == "GenuineIntel" and family == 6:
        return intel.get(model)
    if vendor == "AuthenticAMD" and family == 25:
        zen4 = model in range(0x10, 0x20) or model in range(0x60, 0x80) or model in range(0xA0, 0xB0)
        return "Zen 4" if zen4 else "Zen 3"
    return {23: "Zen 2", 26: "Zen 5"}.get(family or 0) if vendor == "AuthenticAMD" else None


# Files ------------------------------------------------------------------------------------------------------


def write(folder: Path, record: dict[str, Any]) -> None:
    """One file a claim. A short run replaces no full one; another processor's record moves aside."""
    path = folder / f"{record['claim']}.json"
    if path.exists():
        old = json.loads(path.read_text(encoding="utf-8"))
        if record["quick"] and not old["quick"]:
            print(f"{path.name}: the full record is kept, this run was a short one", file=sys.stderr)
            return
        if slug(old) != slug(record):
            path.rename(folder / f"{record['claim']}.{slug(old)}.json")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(layout(record) + "\n", encoding="utf-8")
    (folder / f"{record['claim']}.{slug(record)}.json").unlink(missing_ok=True)


def slug(record: Mapping[str, Any]) -> str:
    about = record["processor"]
    return re.sub(r"[^a-z0-9]+", "-", str(about.get("device") or about["kind"]).lower()).strip("-")


def layout(part: Any, indent: str = "") -> str:
    """JSON with an entry a line, but what fits on one line is not spread over many."""
    flat = json.dumps(part, ensure_ascii=False)
    if len(indent) + len(flat) <= 110 or not isinstance(part, dict | list) or not part:
        return flat
    deeper = indent + " "
    if isinstance(part, list):
        return "[\n" + ",\n".join(deeper + layout(v, deeper) for v in part) + f"\n{indent}]"
    lines = [f"{deeper}{json.dumps(k, ensure_ascii=False)}: {layout(v, deeper)}" for k, v in part.items()]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def read(name: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The records of a claim: the newest first, then those of other processors."""
    paths = [folder / f"{name}.json", *sorted(folder.glob(f"{name}.*.json"))]
    return [json.loads(p.read_text(encoding="utf-8")) for p in paths if p.exists()]


# Text -------------------------------------------------------------------------------------------------------


def as_text(record: Mapping[str, Any]) -> str:
    """A record for a terminal."""
    about = record["processor"]
    head = f"{record['claim']}: {record['says']} ({record['unit']})"
    lines = [head, f"  {record['date']}, {record['commit']}{' + changes' if record['dirty'] else ''}, "
             f"{about.get('device') or about['kind']}, load {record['load']}"]  # fmt: skip
    lines += [f"  {k}: {v}" for k, v in record["conditions"].items()]
    width = max((len(c) for c in record["value"]), default=0)
    for case, value in record["value"].items():
        beside = ""
        for who, x in record["peer"].get(case, {}).items():
            low, high = record["spread"][case][who] or (None, None)
            beside += f"   {who} {x:,} ({record['ratio'][case][who]}x, {low} to {high})"
        lines.append(f"  {case:<{width}}  {value:>12,}{beside}")
    return "\n".join(lines)


# Another commit ---------------------------------------------------------------------------------------------


def base_tree(name: str) -> Path:
    """A worktree of a commit under build/base, its libraries built in place."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"error: --base {name}: {done.stderr.strip()}")
        return done.stdout.strip()

    tree = ROOT / "build" / "base" / git("rev-parse", "--verify", f"{name}^{{commit}}")
    git("worktree", "prune")
    if not tree.exists():
        git("worktree", "add", "--quiet", "--detach", str(tree), tree.name)
    if not (tree / "build" / "built").exists():
        print(f"{tree.name[:10]}: its libraries are built once, which takes minutes", file=sys.stderr)
        subprocess.run(
            [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
            cwd=tree,
            check=True,
            stdout=sys.stderr,
        )
        (tree / "build" / "built").touch()
    return tree


def compare(args: argparse.Namespace) -> None:
    """The bench of this tree, run in turn on the packages of a commit and on those of this tree."""
    trees = {"base": base_tree(args.base), "this tree": ROOT}
    words = [w for w in sys.argv[1:] if w != "--json"]
    at = next(i for i, w in enumerate(words) if w == "--base" or w.startswith("--base="))
    del words[at : at + 1 + (words[at] == "--base")]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in trees}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(2 if args.quick else 3):
            for name in list(trees)[:: 1 if turn % 2 == 0 else -1]:
                paths = [str(trees[name]), str(trees[name] / "kernels"), os.environ.get("PYTHONPATH", "")]
                environment = {"CATMLLM_BENCH_TREE": str(trees[name]), "PYTHONPATH": os.pathsep.join(paths)}
                done = subprocess.run(
                    [sys.executable, sys.argv[0], *words, "--json", "--out", folder],
                    env=os.environ | environment,
                    capture_output=True,
                    text=True,
                    check=False,
                )
                if done.returncode:
                    reason = done.stderr.strip().splitlines() or ["no message"]
                    raise SystemExit(
                        f"error: {sys.argv[0]} ended with {done.returncode} on {trees[name]}: {reason[-1]}\n"
                        "(a commit before a rename of what this bench imports cannot be compared by it)"
                    )
                found[name].append({r["claim"]: r for r in json.loads(done.stdout)})
    rows = list(compared(found["base"], found["this tree"]))
    if args.json:
        print(json.dumps(rows, ensure_ascii=False))
        return
    print(
        f"base {trees['base'].name[:10]}, this tree {commit(ROOT)['commit']}; "
        f"{len(found['base'])} runs of each, in turn"
    )
    for row in rows:
        low, high = row["each"]
        print(
            f"{row['claim']:24s} {row['case']:40s} base {row['base']:>10,}  "
            f"this tree {row['this tree']:>10,}  "
            f"{row['unit']}: {row['ratio']:.2f}x ({low:.2f} to {high:.2f}) {row['better']} is better"
        )


def compared(base: list[dict[str, Any]], ours: list[dict[str, Any]]) -> Any:
    """Rows of medians and of the ratio of each pair of runs (above 1: this tree is better)."""
    for name, first in ours[0].items():
        if name not in base[0]:
            continue
        for case in first["value"]:
            if any(case not in run[name]["value"] for run in (*base, *ours)):
                continue
            old, new = ([run[name]["value"][case] for run in runs] for runs in (base, ours))
            each = [_better(b, a, first["better"] == "less") for a, b in zip(old, new)]
            yield rounded({
                "claim": name, "case": case, "unit": first["unit"], "better": first["better"],
                "base": statistics.median(old), "this tree": statistics.median(new),
                "ratio": statistics.median(each), "each": [min(each), max(each)],
            })  # fmt: skip
