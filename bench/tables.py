"""The figures in README.md and docs/, made from the records in bench/results: one source for every number.

    python bench/tables.py            # `make tables`: write them into the pages
    python bench/tables.py --check    # exit status 1 and the pages' names, where one differs from its records

In a page a figure stands between `<!-- figures: NAME -->` and `<!-- /figures -->`;
NAME is a function of this file.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench import record, studies
from catmllm.evaluate.metrics import bootstrap_interval
from catmllm.report.summary import CONTROLS, METHOD_NAMES, sampled_tasks, wilson_interval
from catmllm.study.compare import over_seeds

PAGES = ("README.md", "docs")
BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- /figures -->)", re.DOTALL)
Record = dict[str, Any]


# Pages ------------------------------------------------------------------------------------------------------


def pages(root: Path = record.ROOT) -> Iterator[Path]:
    """Every page that has figures."""
    for name in PAGES:
        path = root / name
        for page in sorted(path.rglob("*.md")) if path.is_dir() else [path]:
            if BLOCK.search(page.read_text(encoding="utf-8")):
                yield page


def rendered(text: str) -> str:
    """A page's text with its figures made anew."""

    def block(match: re.Match[str]) -> str:
        made = FIGURES.get(match[2])
        if made is None:
            raise SystemExit(f"error: no figure is called {match[2]!r}; there are {', '.join(FIGURES)}")
        try:
            figure = made().strip()
        except Missing as claim:
            figure = f"*Not measured yet: there is no `bench/results/{claim}.json`.*"
        return f"{match[1]}{figure}\n{match[3]}"

    return BLOCK.sub(block, text)


def main() -> int:
    check, stale = sys.argv[1:] == ["--check"], []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        new = rendered(text)
        if new != text:
            stale.append(str(page.relative_to(record.ROOT)))
            if not check:
                page.write_text(new, encoding="utf-8")
    print("\n".join(stale) if stale else "every page agrees with the records")
    return int(check and bool(stale))


# Numbers as people read them --------------------------------------------------------------------------------


class Missing(Exception):
    """A claim without a record."""


def newest(name: str) -> Record:
    found = record.read(name)
    if not found:
        raise Missing(name)
    return found[0]


def times(x: float) -> str:
    """A ratio: two digits, whole from 10 on."""
    return f"{x:,.0f}×" if x >= 9.95 else f"{x:.1f}×"


def number(x: float) -> str:
    """Three digits, thousands with commas."""
    if x >= 100:
        return f"{float(f'{x:.3g}'):,.0f}"
    return f"{x:.3g}" if x < 10 else f"{x:.1f}"


def micro(x: float) -> str:
    """Microseconds in the unit that reads best."""
    return f"{number(x)} µs" if x < 1000 else f"{number(x / 1000)} ms" if x < 1e6 else f"{number(x / 1e6)} s"


def span(ratios: list[float]) -> str:
    """The range of some ratios."""
    low, high = times(min(ratios)), times(max(ratios))
    return low if low == high else f"{low.removesuffix('×')} to {high}"


def best_peer(one: Record, case: str) -> float:
    """Our ratio to the strongest peer of a case."""
    return float(min(one["ratio"][case].values()))


def source(*records: Record) -> str:
    """Where figures come from, as a line under them."""
    said = []
    for one in records:
        about = one["processor"]
        where = about.get("device") or about["kind"]
        if one["commit"] is None:
            said.append(f"{where}: ratios as reported, without a commit")
            continue
        short = ", **a short run (`--quick`)**" if one["quick"] else ""
        said.append(f"{where}, {one['date']}, commit `{one['commit']}`, `{one['command']}`{short}{busy(one)}")
    return "*" + "; ".join(dict.fromkeys(said)) + ".*"


def busy(one: Record) -> str:
    """That other work ran beside the measurement."""
    load = one["load"] or 0
    return f", load {load:.0f}" if load > 2 * one["processor"].get("cores", load) else ""


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


# README -----------------------------------------------------------------------------------------------------


def peers() -> str:
    """A line a claim; one without a record has none."""
    rows = []
    for line in (_rewards, _over_http, _attention, _model, _kept, _text, _supervised, _grpo, _sampling):
        with contextlib.suppress(Missing):
            for what, peer, measured, one in line():
                rows.append([what, peer, measured, _short_source(one)])
    return table(["", "compared with", "measured", "on"], rows)


Line = Iterator[tuple[str, str, str, Record]]


def _rewards() -> Line:
    one = newest("reward")
    for case, says in (
        ("mix", "reward of a mix of answers (short CIFs, slabs, 30 % broken)"),
        ("slabs, 48 to 100 atoms", "reward of slabs of 48 to 100 atoms"),
        ("short CIFs", "reward of short CIFs"),
    ):
        r, each = one["ratio"][case], micro(one["value"][case])
        ratio = f"{times(r['pymatgen'])} / {times(r['gemmi'])} ({each} per text)"
        yield says, "pymatgen / gemmi (which only parses)", ratio, one


def _over_http() -> Line:
    one = newest("server")
    spans = [
        span([r["pymatgen"] for case, r in one["ratio"].items() if case.startswith(f"{n} text")])
        for n in (64, 1)
    ]
    what = "the reward over HTTP, 64 texts / 1 text per request"
    yield what, "a pymatgen server", f"{spans[0]} / {spans[1]} the throughput", one


def _attention() -> Line:
    found = record.read("encoder_attention")
    kinds = ", ".join(r["processor"]["kind"] for r in found)
    spans = [
        span([r["ratio"][f"L4M2, {mode}, 1 thread"]["fairchem"] for r in found])
        for mode in ("inference", "training")
    ]
    what = "EquiformerV2 attention on a CPU, L4M2, inference / training, one thread"
    yield what, "fairchem 1.10", f"{spans[0]} / {spans[1]} over {kinds}", newest("encoder_attention")


def _model() -> Line:
    found = record.read("encoder_model")
    kinds = ", ".join(r["processor"]["kind"] for r in found)
    ratio = span([r["ratio"]["80 atoms, 1 thread"]["fairchem"] for r in found])
    what = "whole 31M encoder, 80 atoms, inference, one thread"
    yield what, "fairchem 1.10", f"{ratio} over {kinds}", next(r for r in found if r["commit"])


def _kept() -> Line:
    one, case = newest("encoder_kept"), "L4M2, layer, float16"
    theirs = f"fairchem, float32: {number(one['peer'][case]['fairchem, float32'])} KiB"
    yield (
        "kept for backward, per edge and layer, L4M2",
        theirs,
        f"{number(one['value'][case])} KiB in float16",
        one,
    )


def _text() -> Line:
    one = newest("data_text_graph")
    yield (
        "three-part text and graph of a 70-atom system",
        "ASE",
        times(one["ratio"]["70 atoms, made"]["ASE"]),
        one,
    )


def _supervised() -> Line:
    trainer, compiled = newest("training_trainer"), newest("training_compiled")
    ratios = [best_peer(one, "ours, packed") for one in (compiled, trainer)]
    peer = "HF Trainer, compiled / as it comes"
    yield "supervised training, tokens per second", peer, " / ".join(map(times, ratios)), compiled
    one = min(
        (newest(f"training_trl_{how}") for how in ("padded", "packed")),
        key=lambda r: best_peer(r, "ours, packed"),
    )
    yield (
        "supervised training, tokens per second",
        "TRL SFTTrainer",
        times(best_peer(one, "ours, packed")),
        one,
    )


def _grpo() -> Line:
    one = newest("grpo_step")
    ratios = " / ".join(times(best_peer(one, case)) for case in ("fp32", "bf16"))
    yield "a GRPO step, float32 / bf16", "TRL's GRPOTrainer at its best", ratios, one


def _sampling() -> Line:
    one = newest("rollout")
    ratios = [times(best_peer(one, case)) for case in one["ratio"] if case.endswith("16 per prompt")]
    what = "sampling, 16 answers per prompt, short / long prompts"
    yield what, "transformers' `generate`", " / ".join(ratios), one


def _short_source(one: Record) -> str:
    about = one["processor"]
    short = ", short run (`--quick`)" if one["quick"] else ""
    return f"{about.get('device') or about['kind']}, {one['date']}, `{one['commit']}`{short}{busy(one)}"


def reward_sentence() -> str:
    one = newest("reward")
    r = one["ratio"]["slab, 68 atoms"]
    return (
        f"A 68-atom slab takes {micro(one['value']['slab, 68 atoms'])} of processor time, text to score: "
        f"{times(r['pymatgen parse'])} faster than pymatgen's parse, {times(r['pymatgen'])} with density "
        f"and distances, and {times(r['gemmi'])} faster than gemmi's parse to sites.\n\n{source(one)}"
    )


# docs -------------------------------------------------------------------------------------------------------


def reward() -> str:
    one = newest("reward")
    rows = [
        [case, micro(value)]
        + [
            f"{micro(one['peer'][case][p])} ({times(one['ratio'][case][p])})"
            for p in ("pymatgen parse", "pymatgen", "gemmi")
        ]
        for case, value in one["value"].items()
    ]
    head = ["text", "ours", "pymatgen parse", "pymatgen reward", "gemmi parse to sites"]
    return table(head, rows) + f"\n\n{source(one)}"


def reward_threads() -> str:
    one = newest("reward_threads")
    rows = [[case, times(ratio["one"])] for case, ratio in one["ratio"].items()]
    return table(["text", "two threads compared with one"], rows) + f"\n\n{source(one)}"


def encoder_speed() -> str:
    parts = []
    for attention in record.read("encoder_attention"):
        kind = attention["processor"]["kind"]
        models = [m for m in record.read("encoder_model") if m["processor"]["kind"] == kind]
        rows = []
        for label, one in [("attention, {}", attention)] + [("whole 31M model, {}", m) for m in models]:
            for case in (c for c in one["ratio"] if c.endswith(", 1 thread")):
                name = case.removesuffix(", 1 thread")
                cells = [_beside(one, f"{name}, {n} thread{'s'[: n > 1]}") for n in (1, 2)]
                rows.append([label.format(name), *cells])
        parts.append(
            f"**{kind}**\n\n" + table(["compared with fairchem 1.10", "1 thread", "2 threads"], rows)
        )
        parts.append(source(attention, *models))
    return "\n\n".join(parts)


def _beside(one: Record, case: str) -> str:
    if case not in one["ratio"]:
        return "–"
    ratio = times(one["ratio"][case]["fairchem"])
    if case not in one["value"]:
        return ratio
    return f"{ratio} ({number(one['peer'][case]['fairchem'])} → {number(one['value'][case])} ms)"


def encoder_kept() -> str:
    one, rows = newest("encoder_kept"), []
    for name in ("L4M2", "L6M2", "L6M3"):
        cells = [name]
        for who, dtype in (("fairchem, float32", "float32"), ("ours", "float32"), ("ours", "float16")):
            cases = [f"{name}, {part}, {dtype}" for part in ("attention", "layer")]
            found = [one["value"][c] if who == "ours" else one["peer"][c][who] for c in cases]
            cells.append(" / ".join(map(number, found)))
        rows.append(cells)
    head = ["KiB, attention / whole layer", "fairchem, float32", "ours, float32", "ours, float16"]
    return table(head, rows) + f"\n\n{source(one)}"


def encoder_counts() -> str:
    kept, moved = newest("encoder_kept"), newest("encoder_traffic")
    case, model = "L4M2, attention, float16", "L4M2 s2 31M"
    return (
        f"An attention layer of the 31M model (L4 M2, float16) keeps **{number(kept['value'][case])} KiB per "
        "edge** for its backward pass (fairchem 1.10 in float32: "
        f"{number(kept['peer'][case]['fairchem, float32'])}), and its forward pass moves "
        f"**{moved['value'][model]} KiB per edge** (eager: {number(moved['peer'][model]['eager'])}; "
        "counted by hand for two fused kernels around plain products: "
        f"{number(moved['peer'][model]['two fused kernels'])}).\n\n{source(kept, moved)}"
    )


def data_text() -> str:
    one = newest("data_text_graph")
    of = [f"{times(one['ratio'][c]['ASE'])} ({c.split(',')[0]}, {micro(x)})" for c, x in one["value"].items()]
    return (
        f"Text and graph of a system are {' and '.join(of)} faster than by ASE, one thread each.\n\n"
        f"{source(one)}"
    )


def data_pictures() -> str:
    one, case = newest("data_pictures"), "70 atoms, made"
    return (
        f"A picture of 70 atoms takes {micro(one['value'][case])} of processor time, "
        f"{times(one['ratio'][case]['ASE'])} faster than by ASE and matplotlib.\n\n{source(one)}"
    )


def _candidates(of: dict[str, tuple[str, str]]) -> str:
    """A row a potential, best first: claims, their columns and formats."""
    said = {name: newest(f"labels_{name}") for name in of}
    (first, _), *_ = of.items()
    ranked = sorted(said[first]["value"], key=said[first]["value"].__getitem__)
    rows = [[who, *(format(said[n]["value"][who], how) for n, (_, how) in of.items())] for who in ranked]
    return f"{table(['potential', *(head for head, _ in of.values())], rows)}\n\n{source(*said.values())}"


def labels() -> str:
    about = newest("labels_r")["conditions"]["slabs"]
    columns = {"mae": (f"error, eV ({about})", ".3f"), "r": ("r", ".3f"), "seconds": ("CPU s a point", ".3f")}
    return _candidates(columns)


def labels_published() -> str:
    return _candidates(
        {"published": ("error, eV (H, C, N, O, CO on eight metals)", ".2f"), "nickel": ("O on Ni, eV", ".2f")}
    )


def data_command() -> str:
    one = newest("data_command")
    v, rate = one["value"], one["value"]["systems per second"]
    n, processes = one["conditions"]["systems"], one["conditions"]["processes"]
    return (
        f"{n:,} made systems of 70 atoms take {n / rate:.0f} s on {processes} processes ({rate:,.0f} per "
        f"second; 460,000: {460_000 / rate / 60:.0f} minutes) with at most "
        f"{v['MiB, most in the first half']:,.0f} MiB in all processes in the first half and "
        f"{v['MiB, most in the last quarter']:,.0f} in the last quarter.\n\n{source(one)}"
    )


def loader() -> str:
    step, rate, large = (newest(f"loader_{n}") for n in ("step", "rate", "large"))
    s, v = step["peer"]["step"], large["value"]
    by = ", ".join(f"{number(x)} with {case}" for case, x in rate["value"].items())
    by = by.replace(" 1 workers", " 1 worker")
    return (
        f"On one core, tiny model, `joint` in bf16: {number(step['value']['step'])} tokens/s end to end, "
        f"{number(s['padded, eager'])} padded with eager attention, {number(s['padded, sdpa'])} with SDPA. "
        f"The loader makes {by}: without workers {times(rate['ratio']['0 workers']['step'])} what that step "
        "reads. Of 70-atom systems with their 12 Å graphs "
        f"{number(v['samples per second'])} samples/s a core, "
        f"{v['room left empty, %']:.1f} % of the room left empty.\n\n{source(step)}"
    )


def rl() -> str:
    step, rollout, update, grammar = (newest(n) for n in ("grpo_step", "rollout", "head_update", "grammar"))
    rows = [
        [f"a GRPO step, {p}", "TRL's GRPOTrainer, its faster attention", times(best_peer(step, p)), step]
        for p in step["ratio"]
    ]
    rows += [
        [f"sampling, {c}", "`generate`", times(best_peer(rollout, c)), rollout] for c in rollout["ratio"]
    ]
    rows += [
        [f"update of the head, {c}", "update of the whole model", times(best_peer(update, c)), update]
        for c in update["ratio"]
    ]
    rows += [
        [f"sampling under the grammar, {c}", "sampling without", f"{best_peer(grammar, c):.2f}×", grammar]
        for c in grammar["ratio"]
    ]
    parts = step["conditions"]["ours, in parts"]
    share = " / ".join(f"{part['reward, % of the step']:.2g}" for part in parts.values())
    rows.append([f"reward's share of a step, {' / '.join(parts)}", "", f"{share} %", step])
    made = [[*row[:3], _short_source(row[3])] for row in rows]
    return table(["tiny model, one thread", "compared with", "", "on"], made)


def scale() -> str:
    one = newest("scale_balance")
    cases: dict[str, list[str]] = {}
    for case, value in one["value"].items():
        stage, _, _ = case.partition(", ")
        peer = one["peer"][case]["each its own"]
        cases.setdefault(stage, [f"`{stage}`"]).append(f"{value:.3f} ({peer:.2f})")
    head = ["dealt (each rank its own)", "8 ranks", "32 ranks", "64 ranks"]
    return table(head, list(cases.values())) + f"\n\n{source(one)}"


def rl_scaling() -> str:
    seconds, memory = newest("rl_scaling"), newest("rl_scaling_memory")
    rows = [
        [
            case,
            *(
                f"{number(x)} s, {number(m)} MiB"
                for x, m in (
                    (seconds["peer"][case]["whole model"], memory["peer"][case]["whole model"]),
                    (seconds["value"][case], memory["value"][case]),
                )
            ),
        ]
        for case in seconds["value"]
    ]
    return table(["answers of 2 prompts", "whole model", "head"], rows) + f"\n\n{source(seconds)}"


def rl_seeds() -> str:
    one = newest("rl_seeds")
    rows = []
    for case, value in one["value"].items():
        peer, off = one["peer"][case]["before"], one["deviation"][case]
        rows.append([case, f"{peer:.3f} ± {off['before']:.3f}", f"{value:.3f} ± {off['after']:.3f}"])
    step = one["conditions"]["seconds per GRPO step, grpo.steps=5, machine idle, medians"]
    rows.insert(
        0, ["seconds per GRPO step (16 prompts; median of 5)", f"{step['before']}", f"{step['after']}"]
    )
    commits = one["conditions"]["commits"]
    head = ["", f"before (`{commits['before']}`)", f"after (`{commits['after']}`)"]
    return table(head, rows) + f"\n\n{source(one)}"


def rl_overlap() -> str:
    one, ours = newest("grpo_overlap"), "`staleness: 1`, sampling beside the update"
    peers, ratios, spreads = (one[k]["fp32"] for k in ("peer", "ratio", "spread"))
    names = {
        "staleness 0": "`staleness: 0`, sampling before the update",
        "the longer of sampling and update": "of these two the longer",
        "one process, two threads": "`rollout: colocated`, both cores for all",
    }
    rows = [[ours, f"{one['value']['fp32']:.2f}", ""]]
    for key, name in names.items():
        low, high = spreads[key]
        rows.append([name, f"{peers[key]:.2f}", f"{ratios[key]:.2f}× ({low:.2f} to {high:.2f})"])
    head = ["a step, median of " + str(one["conditions"]["turns"]), "s", "compared with `staleness: 1`"]
    return table(head, rows) + f"\n\n{source(one)}"


def rl_staleness() -> str:
    """A row a pair of runs; under those of a learning rate their mean, and that of the pairs' differences."""
    found = {"1.5e-4": newest("rl_staleness"), "7.5e-5": newest("rl_staleness_half")}
    names, rows = ("staleness 0", "staleness 1"), []
    for lr, one in found.items():
        n = int(one["conditions"]["mean over"].split()[0])
        means = [
            [(statistics.mean(c[:n]), statistics.mean(c[-n:])) for c in one["each"][name]] for name in names
        ]
        pairs = list(zip(*means))
        for seed, pair in enumerate(pairs):
            cells = [f"{first:.2f} → {last:.2f}" for first, last in pair]
            rows.append([lr, str(seed), *cells, f"{pair[1][1] - pair[0][1]:+.2f}"])
        cells = [" → ".join(map(_mean_and_spread, zip(*each))) for each in means]
        lag = _mean_and_spread([with_lag[1] - without[1] for without, with_lag in pairs], "+.2f")
        rows.append([lr, "mean ± sd", *cells, lag])
    head = ["learning rate", "seed", *(f"`{name.replace(' ', ': ')}`" for name in names), "difference"]
    return table(head, rows) + f"\n\n{source(*found.values())}"


def _mean_and_spread(values: Sequence[float], how: str = ".2f") -> str:
    return f"{statistics.mean(values):{how}} ± {statistics.stdev(values):.2f}"


def judge() -> str:
    one, case = newest("judge"), "an adsorbate"
    theirs, ratio = one["peer"][case], one["ratio"][case]
    asked, here = "ASE, DIEP's own calculator", "ASE, DIEP as here"
    return (
        f"An adsorbate relaxes on its rigid slab in {one['value'][case]:.2f} s of a processor, 16 side by "
        f"side: {times(ratio[asked])} faster than by ASE's BFGS one by one with DIEP's own calculator "
        f"({theirs[asked]:.2f} s), and {times(ratio[here])} faster than that with DIEP as computed here."
        f"\n\n{source(one)}"
    )


def server() -> str:
    speed, latency, spent = newest("server"), newest("server_latency"), newest("server_cpu")
    rows = []
    for case, value in speed["value"].items():
        peer, cpu = speed["peer"][case], spent["value"][f"{case}, served"]
        batch = int(case.split()[0])
        ours = ", ".join(number(latency["value"][f"{case}, {q}"]) for q in ("p50", "p99"))
        theirs = ", ".join(number(latency["peer"][f"{case}, {q}"]["pymatgen"]) for q in ("p50", "p99"))
        share = 100 * (1 - spent["peer"][f"{case}, served"]["scoring"] / cpu)
        rows.append([case, number(value), ours, number(peer["pymatgen"]), theirs,
                     times(speed["ratio"][case]["pymatgen"]), f"{share:.0f} %",
                     number(peer["nothing"] / batch)])  # fmt: skip
    head = ["", "texts/s", "p50, p99 ms", "pymatgen texts/s", "p50, p99 ms", "ratio",
            "HTTP + JSON, of processor time", '"nothing", requests/s']  # fmt: skip
    return table(head, rows) + f"\n\n{source(speed)}"


def server_soak() -> str:
    one = newest("server_soak")
    v = one["value"]
    statuses = ", ".join(s.removeprefix("status ") for s in v if s.startswith("status "))
    return (
        f"{one['conditions']['seconds'] / 60:.0f} minutes of right, broken and wrong requests from "
        f"{one['conditions']['clients']} clients: {v['answers']:,} answers, {v['texts']:,} texts, only the "
        f"statuses meant ({statuses}); resident memory {v['MiB after a tenth']:.1f} MiB "
        f"after a tenth, {v['MiB at half-time']:.1f} at half-time, {v['MiB at the end']:.1f} at the end, "
        f"{v['MiB at most']:.1f} at most.\n\n{source(one)}"
    )


def plan() -> str:
    one = newest("plan")
    rows = [
        [case, f"{one['value'][case]:,.0f}", f"{one['peer'][case]['measured']:,.0f}",
         f"{one['ratio'][case]['measured']:.3f}"]
        for case in one["value"]
    ]  # fmt: skip
    return table(["MiB per rank", "planned", "measured", "ratio"], rows) + f"\n\n{source(one)}"


def scale_tasks() -> str:
    one = newest("scale_tasks")
    cases: dict[str, list[str]] = {}
    for case, value in one["value"].items():
        cases.setdefault(case.partition(": ")[0], []).append(number(value))
    head = ["tasks", "ms of a step", "structures remembered", "KiB in a checkpoint", "ms to write them",
            "ms to go on from them on two ranks"]  # fmt: skip
    return table(head, [[name, *cells] for name, cells in cases.items()]) + f"\n\n{source(one)}"


# The recorded run of all stages -----------------------------------------------------------------------------


def _run() -> Record:
    return dict(json.loads((record.RESULTS / "tiny_pipeline.json").read_text(encoding="utf-8")))


def tiny_run() -> str:
    run = _run()
    about, minutes = run["machine"], sum(run["seconds"].values()) / 60
    return (
        f"`make run` on {about['cores']} cores ({about['processor']}, no GPU, {minutes:.0f} minutes of "
        f"stages, evaluation and design), {about['date']}, commit `{about['commit']}`: a "
        f"{run['parameters']['total'] / 1e6:.1f}M-parameter model from random weights on "
        f"{run['data']['train']:,} training systems."
    )


def tiny_energies() -> str:
    run = _run()
    base, found = run["baselines"], run["property"]
    rows = [
        ["mean per adsorbate (baseline)", "", "", "", f"{base['adsorbate_mean']['mae']:.3f}"],
        ["ridge on words (baseline)", "", "", "", f"{base['text_ridge']['mae']:.3f}"],
        ["kernel ridge, relaxed structures (baseline)", "", "", f"{base['kernel_ridge']['mae']:.3f}", ""],
    ]
    both = base["kernel_ridge_frames"]
    start = f"{both['start']['mae']:.3f}"
    rows.append(["kernel ridge, unrelaxed ones too (baseline)", "", start, f"{both['mae']:.3f}", ""])
    one = found["encoder"]
    start = f"{one['encoder_start']['mae']:.3f}"
    rows.append(["after `encoder`, encoder only", "", start, f"{one['encoder']['mae']:.3f}", ""])
    for stage in ("joint", "instruct", "grpo", "ga_grpo"):
        cells = (f"{found[stage][mode]['mae']:.3f}" for mode in ("both", "start", "graph", "text"))
        rows.append([f"after `{stage}`", *cells])
    head = f"energy, test MAE in eV (n = {run['data']['test']})"
    return table([head, "text + graph", "unrelaxed structure", "only graph", "only text"], rows)


def closed_form() -> str:
    one = newest("closed_form")
    by = one["conditions"]["by split"]
    names = list(dict.fromkeys(who for case in by.values() for who in case))

    def cell(values: list[float] | None) -> str:
        return "–" if values is None else f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"

    rows = [[who, *(cell(case.get(who)) for case in by.values())] for who in names]
    head = f"test MAE in eV, mean ± sd over {one['conditions']['splits']} splits"
    return table([head, *(f"from {case}" for case in by)], rows) + f"\n\n{source(one)}"


def wide() -> str:
    one = newest("wide")
    by = one["conditions"]["by split"]
    rows = []
    for case, errors in by.items():
        of, _, shown = case.partition(", ")
        cells: dict[str, list[str]] = {}
        for who, values in errors.items():
            name, _, _ = who.rpartition(", ")  # what was fitted to `fcc` comes first
            cells.setdefault(name, []).append(
                f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"
            )
        for name, pair in cells.items():
            rows.append([of, shown, name, *pair])
    head = [
        "tested on slabs of",
        "from",
        f"test MAE in eV, mean ± sd over {one['conditions']['splits']} splits",
        "fitted to `fcc`",
        "to `all`",
    ]
    return table(head, rows) + f"\n\n{source(one)}"


def texts() -> str:
    one = newest("texts")
    by, shares = one["conditions"]["by split"], one["conditions"]["share of the model"]
    rows = [
        [
            who,
            *(f"{e:.3f}" for e in errors),
            f"{statistics.mean(errors):.3f} ± {statistics.stdev(errors):.3f}",
        ]
        for who, errors in by.items()
    ]
    rows.append(["share of the model in it", *(f"{share:.2f}" for share in shares), ""])
    head = ["test MAE in eV, split", *map(str, range(len(shares))), "mean ± sd"]
    return table(head, rows) + f"\n\n{source(one)}"


def tiny_cifs() -> str:
    run, rows = _run(), []
    both = [(f"after `{stage}`", found) for stage, found in run["generation"].items()]
    both += [(f"{name}, without the grammar", found["free"]) for name, found in both if "free" in found]
    for name, found in both:
        shares = [f"{100 * found[k]:.1f} %" if k in found else "–" for k in ("PF", "CM", "PV", "AD")]
        rows.append([name, f"{found['reward']:.2f} ± {found['reward_se']:.2f}", *shares])
    head = f"sampled CIFs (n = {found['n']})"
    names = ["does not parse", "wrong composition", "bad distance or volume", "no real adsorbate"]
    return table([head, "reward", *names], rows)


def tiny_designs() -> str:
    design = _run()["design"]
    n, rows = design["n"], []
    for key, name in {"success": "**closed loop**", **CONTROLS}.items():
        if not any(key in design[judge] for judge in ("own", "judge")):
            continue
        cells = []
        for judge in ("own", "judge"):
            share = design[judge].get(key)
            sampled = n if key == "success" else sampled_tasks(design, key)
            low, high = wilson_interval(share, sampled) if sampled and share is not None else (None, None)
            spread = "" if low is None else f" ({100 * low:.0f} to {100 * high:.0f} %)"
            cells.append("–" if share is None else f"{100 * share:.1f} %{spread}")
        rows.append([name, *cells])
    head = f"designs within {design['tolerance']} eV (n = {n})"
    return table([head, "by the own predictor", f"by {design['judge_name']}"], rows)


def tiny_free() -> str:
    """Success with free metals by the judge, over the number of predictions."""
    design = _run()["free_design"]
    rows = []
    for method, name in METHOD_NAMES.items():
        rates = design["curves"].get(method, {}).get("judge")
        if rates is None:
            continue
        cells = [
            f"{100 * share:.0f} % ({100 * low:.0f} to {100 * high:.0f})"
            for share, (low, high) in zip(rates["success"], rates["interval"])
        ]
        rows.append([f"**{name}**" if method == "search" else name, *cells])
    head = f"free metals, within {design['tolerance']} eV by {design['judge_name']} (n = {design['n']})"
    return table([head, *(f"{n} predictions" if n > 1 else "one" for n in design["budgets"])], rows)


# Five cells of `make run` -----------------------------------------------------------------------------------


def spread() -> str:
    """Each split's errors, successes and free answers, and their mean and deviation."""
    one = newest("spread")
    about, rows = one["conditions"], []

    def add(what: str, values: Sequence[float], form: str) -> None:
        deviation = f"{statistics.mean(values):{form}} ± {statistics.stdev(values):{form}}"
        rows.append([what, *(f"{v:{form}}" for v in values), deviation])

    for shown, by in about["errors"].items():
        for who, errors in by.items():
            add(f"MAE (eV) from {shown}" if who == "model" else who, errors, ".3f")
    for kind, of in (("fixed", "fixed compositions"), ("free", "free metals")):
        found = about["tasks"][kind]
        for method in ("search", "enumeration", "analogues"):
            rates = [100 * _outcomes(cell).mean(0) for cell in found["judge"][method]]
            for k in (0, -1):
                n = found["budgets"][k]
                add(f"{of}, {METHOD_NAMES[method]}, {n} (%)", [rate[k] for rate in rates], ".0f")
    for stage in ("instruct", "grpo", "ga_grpo"):
        for name, shares in about["failures"][f"{stage}, free"].items():
            add(f"free policy after `{stage}`, {name} (%)", [100 * x for x in shares], ".1f")
    head = ["split and seed", *map(str, about["splits"]), "mean ± sd"]
    return table(head, rows) + f"\n\n{source(one)}"


def spread_curves() -> str:
    """Success over the number of predictions, and what the closed loop has more, with both intervals."""
    found = newest("spread")["conditions"]["tasks"]
    budgets = found["fixed"]["budgets"]
    rates, more = [], []
    for kind in ("fixed", "free"):
        surfaces = [f"{k} {s}" for k, cell in enumerate(found[kind]["surfaces"]) for s in cell]
        by = {m: [_outcomes(cell) for cell in cells] for m, cells in found[kind]["judge"].items()}
        for method, cells in by.items():
            each = np.array([100 * cell.mean(0) for cell in cells])
            means = [f"{a:.0f} ± {b:.0f}" for a, b in zip(each.mean(0), each.std(0, ddof=1))]
            rates.append([f"{kind}: {METHOD_NAMES[method]}", *means])
            if method == "search":
                continue
            differences = [100 * (ours - theirs) for ours, theirs in zip(by["search"], cells)]
            row = [f"{kind}: {METHOD_NAMES[method]}"]
            for k in range(len(budgets)):
                low, high = bootstrap_interval(np.concatenate(differences)[:, k], groups=surfaces)
                ends = over_seeds([d[:, k].mean() for d in differences]) or (math.nan, math.nan)
                mean = np.mean([d[:, k].mean() for d in differences])
                said = f"{mean:+.0f} ({low:.0f} to {high:.0f}; {ends[0]:.0f} to {ends[1]:.0f})"
                holds = min(low, ends[0]) > 0 or max(high, ends[1]) < 0
                row.append(f"**{said}**" if holds else said)
            more.append(row)
    head = [str(n) for n in budgets]
    return (
        table(
            [f"tasks within {found['fixed']['tolerance']} eV by DIEP (%), mean ± sd over cells", *head], rates
        )
        + "\n\n"
        + table(["the closed loop has more, in points (over surfaces; over cells)", *head], more)
    )


def _outcomes(cell: str) -> np.ndarray:
    """[tasks, budgets] of 1 and 0, from a digit each number of predictions, a word each task."""
    return np.array([[int(digit) for digit in word] for word in cell.split()], float)


# Rows of the design benchmark ------------------------------------------------------------------------------

ROWS = ("search", "ideal", "evolution", "transmute", "instruct", "grpo", "diffcsp")
ANSWERS = ("instruct", "grpo")  # stages whose bare answers are a row


def generators() -> str:
    """Each row's success by the judge with Wilson's intervals, and by the own predictor."""
    one = newest("generators")
    about, rows = one["conditions"], []
    for kind in ("fixed", "free"):
        for name in ROWS:
            found = about["rows"][name][kind]
            judged, own = _outcomes(found["judge"]), _outcomes(found["own"])
            cells = []
            for column in judged.T:
                low, high = wilson_interval(column.mean(), len(column))
                cells.append(f"{100 * column.mean():.0f} ({100 * low:.0f} to {100 * high:.0f})")
            said = f"`answers` after `{name}`" if name in ANSWERS else f"`{name}`"
            rows.append([said, kind, *cells, *(f"{100 * own[:, k].mean():.0f}" for k in (0, -1))])
    budgets = about["budgets"]
    head = ["row", "tasks", *map(str, budgets), *(f"own, {n}" for n in (budgets[0], budgets[-1]))]
    return table(head, rows) + "\n\n" + _more_than_rows(about) + f"\n\n{source(one)}"


def _more_than_rows(about: Record) -> str:
    """What the search has more than the other rows at the same tasks, with intervals over surfaces; they are
    of one model, so nothing is bold."""
    lines = []
    for kind in ("fixed", "free"):
        ours = _outcomes(about["rows"]["search"][kind]["judge"])
        for name in ROWS[1:]:
            more = 100 * (ours - _outcomes(about["rows"][name][kind]["judge"]))
            cells = []
            for column in more.T:
                low, high = bootstrap_interval(column, groups=about["surfaces"][kind])
                cells.append(f"{column.mean():+.0f} ({low:.0f} to {high:.0f})")
            lines.append([f"`answers` after `{name}`" if name in ANSWERS else f"`{name}`", kind, *cells])
    return table(["`search` has more than", "tasks", *map(str, about["budgets"])], lines)


# Studies ----------------------------------------------------------------------------------------------------


def of_study(name: str) -> str:
    """What each cell measured, and how far it is from another, with both intervals."""
    path = studies.RESULTS / f"{name}.json"
    if not path.exists():
        raise Missing(f"studies/{name}")
    said = json.loads(path.read_text(encoding="utf-8"))
    rows = studies.shown(name, said)
    cells = dict.fromkeys(cell for row in rows.values() for cell in row)
    means = [[cell, *(_of_cell(what, row.get(cell)) for what, row in rows.items())] for cell in cells]
    more = []
    for cell in cells:
        of = [row[cell] for row in rows.values() if "more" in row.get(cell, {})]
        if of:
            base = of[0].get("base", next(iter(cells)))
            more.append([f"{cell} − {base}", *(_more(what, row.get(cell)) for what, row in rows.items())])
    hours = said["hours"]
    about = (
        f"*{said['conditions']}; {hours['taken']:.1f} hours of all ranks, {hours['expected']} were expected.*"
    )
    lines = [
        table([f"mean ± sd over {len(said['seeds'])} seeds", *rows], means),
        *([table(["difference (over surfaces; over seeds)", *rows], more)] if more else []),
        f"![{name}](studies/{name}.png)",
        about,
    ]
    return "\n\n".join(lines)


def _of_cell(what: str, cell: Record | None) -> str:
    if cell is None:
        return "–"
    scale, form = (100, ".1f") if what.endswith("%") else (1, ".3f")
    sd = "" if cell["sd"] is None else f" ± {scale * cell['sd']:{form}}"
    return f"{scale * cell['mean']:{form}}{sd}"


def _more(what: str, cell: Record | None) -> str:
    """A difference, bold where it holds, else with the number of seeds that one of its size would need."""
    if cell is None or "more" not in cell:
        return "–"
    scale, form = (100, "+.1f") if what.endswith("%") else (1, "+.3f")
    a, b, c, d = (f"{scale * x:{form}}" for x in (*cell["more_interval"], *cell["more_over_seeds"]))
    words = f"{scale * cell['more']:{form}} ({a} to {b}; {c} to {d})"
    needed = cell["seeds_needed"]
    return f"**{words}**" if cell["separate"] else f"{words} [{needed or 'over 1,000'}]"


FIGURES: dict[str, Callable[[], str]] = {
    made.__name__: made
    for made in (peers, reward_sentence, reward, reward_threads, encoder_speed, encoder_kept, encoder_counts,
                 data_text, data_pictures, labels, labels_published, data_command, loader, rl, scale,
                 rl_scaling, rl_seeds, rl_overlap, rl_staleness, judge, server, server_soak, plan,
                 scale_tasks,
                 tiny_run, tiny_energies, closed_form, wide, texts, tiny_cifs, tiny_designs, tiny_free,
                 spread, spread_curves, generators)
} | {f"study_{name}": functools.partial(of_study, name) for name in studies.SHOWN}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
