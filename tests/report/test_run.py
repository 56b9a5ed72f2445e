"""The report of a run: real content from a made-up run, nothing from outside, hostile text harmless,
gaps told."""

from __future__ import annotations

import base64
import copy
import gzip
import hashlib
import json
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binomtest

from catmllm.config import STAGES, Config, to_dict
from catmllm.data.slabs import SHIPPED_SEVENNET, load_slabs
from catmllm.design.reward import TERMS
from catmllm.report import figures, summary
from catmllm.report.drawing import structure_svg
from catmllm.report.live import SCRIPTS, encoded, records
from catmllm.report.run import readme_figure, summary_table, with_trained_baselines, write_report
from catmllm.structure.cif import write_cif
from catmllm.structure.system import ADSORBATE, System, make_system

HOSTILE = '<script>alert("x")</script>&amp;<img src=http://evil.example/x.png>\x1b[31m\u202e\ud800'


@pytest.fixture(scope="module")
def systems() -> list[System]:
    return load_slabs(SHIPPED_SEVENNET)[:400:25]


def made_metrics(systems: list[System]) -> dict[str, Any]:
    """A finished run whose numbers are made up, but consistent and easy to find again."""
    rng = np.random.default_rng(0)
    energy = rng.normal(-1.0, 1.4, 200)
    predicted = energy + rng.normal(0.0, 0.25, 200)
    mae = float(np.abs(energy - predicted).mean())
    names = [systems[i % len(systems)].adsorbate for i in range(200)]
    mode = {"mae": mae, "r2": 0.9671, "n": 200}
    result = {
        "both": mode,
        "graph": {"mae": 0.4132, "r2": 0.81, "n": 200},
        "text": {"mae": 0.4649, "r2": 0.77, "n": 200},
        "encoder": {"mae": 0.3517, "r2": 0.84, "n": 200},
        "start": {"mae": 0.6128, "r2": 0.69, "n": 200},
        "generated": {"mae": 0.5523, "r2": 0.71, "n": 193, "unread": 7},
        "parity": {"energy": energy.tolist(), "predicted": predicted.tolist(), "adsorbate": names},
    }
    return {
        "config": to_dict(Config()),
        "machine": {
            "processor": "Some <Processor>",
            "cores": 2,
            "ranks": 2,
            "torch": "2.13.0",
            "date": "2026-05-17",
            "commit": "abc1234",
        },
        "parameters": {"total": 3247809},
        "data": {"train": 2347, "val": 301, "test": 200, "labels": "SevenNet-0, an MLIP, not DFT"},
        "baselines": {
            "adsorbate_mean": {"mae": 0.7612, "r2": 0.41},
            "text_ridge": {"mae": 0.3444, "r2": 0.86},
        },
        "property": {stage: copy.deepcopy(result) for stage in STAGES},
        "generation": {
            "instruct": made_generation(systems, 7.1234, 0.21, 0.142, {"loop": 20, "sites": 16}),
            "grpo": made_generation(systems, 9.2345, 0.11, 0.025, {"loop": 6}),
            "ga_grpo": made_generation(systems, 9.1, 0.12, 0.031, {"loop": 8}),
        },
        "missing": {"instruct": made_missing(systems)},
        "design": made_design(systems),
        "seconds": {"align": 60.0, "evaluate align": 30.0, "joint": 90.0, "design": 120.0},
    }


def made_generation(
    systems: list[System], reward: float, error: float, failed: float, reasons: dict[str, int]
) -> dict[str, Any]:
    edges = np.arange(-15.0, 10.51, 0.5)
    counts = np.zeros(len(edges) - 1, int)
    counts[0], counts[-1] = round(256 * failed), 256 - round(256 * failed)
    return {
        "n": 256,
        "reward": reward,
        "reward_se": error,
        "reward_hist": {"edges": edges.tolist(), "counts": counts.tolist()},
        "terms": {"comp": 8.8, "parse": 9.1, "valid": 9.2, "phys": 9.3, "adsorbate": 4.6},
        **{
            "PF": failed,
            "VF": failed + 0.01,
            "CM": failed + 0.05,
            "PV": failed + 0.07,
            "PV_eq41": failed + 0.17,
            "AD": failed + 0.23,
        },
        "reasons": reasons,
        "faults": {"buried": 17},
        "examples": [write_cif(systems[0]), HOSTILE],
    }


def made_missing(systems: list[System]) -> dict[str, Any]:
    """Two pairs, of which an unread CIF; PIR of two parts 0.375."""
    arms = [*summary.ARMS, *(f"ridge_{arm}" for arm in summary.ARMS), "adsorbate_mean"]
    row = {"pir": 0.375, "interval": [0.31, 0.42], "more": 0.125, "more_interval": [-0.04, 0.2]}
    row |= {"distance": 0.4567, "mean_pir": 0.5, "mean_distance": math.nan, "n": 4, "unread": 1}
    pairs = [
        {"identity": s.identity, "surface": "x", "energies": [-1.0, -0.5, 0.2 * k]}
        | {"predicted": {arm: [-0.7, math.nan] for arm in arms}}
        for k, s in enumerate(systems[:2])
    ]
    return {
        "candidates": 2,
        "width": 0.311,
        "surfaces": 1,
        "arms": {a: dict(row) for a in arms},
        "pairs": pairs,
    }


def made_items(systems: list[System]) -> list[dict[str, Any]]:
    items = []
    for k, system in enumerate(systems):
        target = system.known_energy
        best = {
            "text": "Ok, here:\n" + write_cif(system),
            "reward": 0.9,
            "predicted": target + 0.02 * k,
            "pvcp": 10.0,
            "fault": None,
            "feasible": True,
            "key": str(k),
            "iteration": 3,
        }
        trace = [
            {
                "iteration": i,
                "best_reward": 0.5,
                "best_predicted": None if k == 0 and i == 0 else target + 1.2 / (i + 1),
                "feasible": not (k == 0 and i == 0),
                "mean_error": None if i == 0 else 1.5 / (i + 1),
                "mean_reward": 0.4,
            }
            for i in range(11)
        ]
        ok = k % 4 != 3
        judged = {"energy": target + 0.03 * k, "ok": ok, "reason": None if ok else "dissociated", "steps": 9}
        items.append(
            {"identity": system.identity, "energy": target, "feasible": True, "best": best, "judged": judged}
            | {"success_own": True, "success_judge": ok and k < 8, "trace": trace}
        )
    items[1] |= {
        "best": None,
        "feasible": False,
        "judged": None,
        "success_own": False,
        "success_judge": False,
    }
    return items


def made_design(systems: list[System]) -> dict[str, Any]:
    items = made_items(systems)

    def curve(success: list[float], more: tuple[float, float] | None = None) -> dict[str, Any]:
        found = {"success": success, "interval": [[s / 2, (1 + s) / 2] for s in success]}
        if more is not None:
            found |= {"search_more": [sum(more) / 2] * 3, "search_more_interval": [list(more)] * 3}
        return found

    return {
        "n": len(items),
        "tolerance": 0.25,
        "feasible": 15 / 16,
        "AD": 0.0417,
        "budgets": [1, 4, 96],
        "curves": {
            "search": {"n": 16, "own": curve([0.4, 0.7, 0.9375]), "judge": curve([0.1, 0.2, 0.375])},
            "enumeration": {
                "n": 16,
                "own": curve([0.2, 0.5, 0.8], (0.02, 0.25)),
                "judge": curve([0.18, 0.21, 0.2317], (0.07, 0.2)),
            },
            "kernel_ridge": {"n": 0},
        },
        "own": {
            "success": 0.9375,
            "shuffled": 0.1217,
            "shuffled_same_adsorbate": 0.3,
            "retrieval": 0.1618,
            "random": 0.2,
            "enumeration": 0.8,
        },
        "judge_name": "SevenNet-0",
        "judge": {
            "success": 0.375,
            "shuffled": 0.13,
            "retrieval": 0.1618,
            "random": 0.18,
            "enumeration": 0.2317,
            "mae": 0.2022,
            "judged_ok": 0.75,
        },
        "diversity": {"n": 6, "distinct": 5, "share": 5 / 6},
        "items": items,
    }


def made_run(folder: Path, metrics: dict[str, Any], stages: tuple[str, ...] = STAGES) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    extra = {
        "encoder": "energy_mae",
        "align": "retrieval",
        "joint": "energy_mae",
        "instruct": "energy_mae",
        "grpo": "reward",
        "ga_grpo": "reward",
    }
    for stage in stages:
        (folder / stage).mkdir(exist_ok=True)
        rows = [{"step": s, "loss": 5.0 / (s + 1), extra[stage]: 0.1 * s, "lr": 1e-3} for s in range(60)]
        (folder / stage / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def run(systems: list[System], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_run(tmp_path_factory.mktemp("runs") / "made & up", made_metrics(systems))


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


class Outline(HTMLParser):
    """Tags, attributes and text of a page, and whether every tag is closed in order."""

    VOID = frozenset({"meta", "br", "img", "link", "input"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def test_the_numbers_of_the_run_are_in_the_page(page: str, systems: list[System]) -> None:
    text = Outline(page).text
    for number in ("0.413 / 0.81", "0.465 / 0.77", "0.552 / 0.71 (7 unread)", "0.761 / 0.41", "0.344 / 0.86"):
        assert number in text
    for number in ("7.12 ± 0.21", "9.23 ± 0.11", "14.2 %", "2.5 %", "31.2 %", "37.2 %", "buried"):
        assert number in text
    for number in ("93.8 %", "37.5 %", "12.2 %", "16.2 %", "5 of the 6 successes", "23.2 %", "4.2 %"):
        assert number in text
    for words in ("2026-05-17", "abc1234", "2347 training", "labels and judge: SevenNet-0, an MLIP, not DFT"):
        assert words in text
    assert "one random ideal slab of the asked composition hits 18.0" in text and "that is 48" in text
    assert "the closed loop has +14 points (+7 to +20) against ideal slabs, same predictor" in text
    assert "dissociated" in text and "loop" in text
    assert systems[4].identity in text and f"{systems[4].known_energy:.2f} eV" in text
    assert "Not in this run" not in text
    assert page.count('<span class="verdict yes">') == 5 and "Nothing has been measured" not in text
    for claim in summary.claims(made_metrics(systems)):
        assert claim.sentence in text and re.sub(r"\s+", " ", claim.evidence) in text
    assert '"mmtg_lambda": 1.0' in text and '"tolerance": 0.25' in text
    assert all(meaning in text for meaning in summary.STAGE_MEANINGS)
    assert len(page) < 1_500_000


def test_figures_are_inline_svg_with_text_and_unique_ids(page: str) -> None:
    outline = Outline(page)
    svgs = [attrs for tag, attrs in outline.tags if tag == "svg"]
    labelled = [a for a in svgs if a.get("class") != "atoms"]
    # parity, failures, rewards, without a structure, design, curve, trace, training, seconds
    assert len(labelled) == 9
    assert all(a.get("aria-label") for a in svgs)
    assert sum(a.get("class") == "atoms" for a in svgs) == 2 * (6 + 6)  # best designs and failures
    for words in ("predicted (eV)", "reward R", "|E_pred - E*| (eV)", "iteration of the closed loop", "step"):
        assert words in outline.text
    ids = [attrs["id"] for _, attrs in outline.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:url\(#|href="#)([\w-]+)', page))
    assert used <= set(ids)


def own(page: str) -> tuple[str, dict[str, Any]]:
    """A page without the scripts that are ours to the letter, and what it gives them to read."""
    for script in SCRIPTS:
        assert page.count(f"<script>{script}</script>") == 1 and "</script" not in script
        page = page.replace(f"<script>{script}</script>", "")
    packed = re.search(r'<script type="text/plain" id="records">([A-Za-z0-9+/=]+)</script>', page)
    assert packed
    return page.replace(packed[0], ""), json.loads(gzip.decompress(base64.b64decode(packed[1])))


def test_nothing_comes_from_outside(page: str) -> None:
    rest, _ = own(page)
    shown = Outline(rest)
    for tag, attrs in shown.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form", "img")
        for name, value in attrs.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "action", "data"):
                assert value is not None and value.startswith(("#", "data:image/"))
            if name == "style":
                assert "url(http" not in (value or "")
    without_texts = re.sub(r"<pre>.*?</pre>", "", rest, flags=re.DOTALL)
    assert "http://" not in without_texts and "https://" not in without_texts
    assert "@import" not in page
    policy = next(
        a["content"] or ""
        for t, a in shown.tags
        if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    # every request is forbidden, and every script but ours, by their digests
    allowed = [f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in SCRIPTS]
    assert "default-src 'none'" in policy and policy.split("script-src ")[1].split() == allowed
    assert not any("\r" in script for script in SCRIPTS)  # the digest is of the page's text


def test_text_of_models_is_escaped(page: str) -> None:
    rest, _ = own(page)
    assert "<script" not in rest and "<img" not in rest
    assert "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;&amp;amp;" in rest
    assert "\x1b" not in page and "\u202e" not in page  # and the lone surrogate did not stop the writing
    assert "Some &lt;Processor&gt;" in rest
    assert "made &amp; up" in rest


def test_what_the_scripts_read_is_the_run(run: Path, systems: list[System], page: str) -> None:
    metrics = made_metrics(systems)
    _, found = own(page)
    items = metrics["design"]["items"]
    rows = found["tasks"]["rows"]
    assert [row["name"] for row in rows] == [item["identity"].replace("</s>", " on ") for item in items]
    assert [row["structure"] is None for row in rows] == [item["best"] is None for item in items]
    packed = found["structures"][rows[4]["structure"]]
    symbols = [s for s, n in zip(packed["e"][::2], packed["e"][1::2]) for _ in range(n)]
    assert symbols == systems[4].symbols
    assert packed["a"] == np.flatnonzero(systems[4].tags == ADSORBATE).tolist()
    # the same distances as the system's, through the CIF's three decimals of a cell of at most 30 Å
    off = np.array(packed["x"]).reshape(-1, 3) / 100
    off = (off[:, None] - off) - (systems[4].positions[:, None] - systems[4].positions)
    lattice = np.array(packed["l"]).reshape(3, 3) / 1000
    off -= np.rint(off @ np.linalg.inv(lattice)) @ lattice
    assert np.abs(off).max() < 2 * (0.0005 * 30 + 0.005)
    parity = metrics["property"]["ga_grpo"]["parity"]
    assert found["parity"]["energy"] == parity["energy"] and len(found["parity"]["stages"]) == len(STAGES)
    curve = found["training"][-1]["curves"][1]
    assert (curve["key"], curve["values"][7]) == ("reward", pytest.approx(0.7))
    assert found["tasks"]["judge"] == "SevenNet-0" and "answers" not in found


def full_run(answers: int) -> tuple[dict[str, Any], list[System], dict[str, list[dict[str, Any]]]]:
    """Of a run of the size of `make run`: its record, its test systems, and so many answers after each stage
    that samples. A design, its name, and an answer's text, name and reason are hostile."""
    tested = load_slabs(SHIPPED_SEVENNET)[:984:3]
    rng = np.random.default_rng(1)
    metrics = made_metrics(tested[:48])
    energy = [s.known_energy for s in tested]
    for part in metrics["property"].values():
        predicted = (np.array(energy) + rng.normal(0.0, 0.2, len(energy))).tolist()
        names = [s.adsorbate for s in tested]
        part["parity"] = {"energy": energy, "predicted": predicted, "adsorbate": names}
    metrics["design"]["items"][5]["best"]["text"] = HOSTILE
    metrics["design"]["items"][7] |= {"identity": HOSTILE}
    found = {}
    for stage in ("instruct", "grpo", "ga_grpo"):
        rows = []
        for i in range(answers):
            system = tested[i % len(tested)]
            moved = replace(system, frac=(system.frac + rng.normal(0, 0.01, system.frac.shape)) % 1)
            row = {"identity": system.identity, "energy": system.energy if i % 3 else None}
            row |= {"text": "Ok:\n" + write_cif(moved), "free": i % 2 == 1, "reward": 10.0}
            rows.append(row | dict.fromkeys(TERMS, 10.0) | {"reason": None, "fault": None})
        rows[0] |= {"text": HOSTILE, "reason": HOSTILE, "reward": -15.0, "comp": -15.0}
        rows[2] |= {"identity": HOSTILE}
        found[stage] = rows
    return metrics, tested, found


def test_a_page_of_a_whole_run_is_small_and_harmless(page: str) -> None:
    metrics, tested, answers = full_run(40)
    found = records(metrics, {}, tested, answers)
    text = encoded(found)
    read = json.loads(gzip.decompress(base64.b64decode(text)))
    assert (
        "\u202e" not in json.dumps(read, ensure_ascii=False) and "\ufffd" in read["tasks"]["rows"][7]["name"]
    )
    assert [s["name"] for s in read["parity"]["systems"]] == [
        s.identity.replace("</s>", " on ") for s in tested
    ]
    assert all(s["structure"] is not None for s in read["parity"]["systems"])
    rows = read["answers"]["rows"]
    assert len(rows) == 120 and sum(row[-2] is None for row in rows) == 3  # hostile texts alone have no cell
    # `make run` has 512 answers per stage and way: what an answer costs, times as many, beside the rest
    few = {stage: rows[:4] for stage, rows in answers.items()}
    less = len(encoded(records(metrics, {}, tested, few)))
    rest, _ = own(page)
    whole = 3 * len(rest) + sum(map(len, SCRIPTS)) + less + (len(text) - less) / 108 * 2 * 3 * 512
    assert whole < 5_000_000
    others = records(metrics, {}, tested[::-1], {})  # other systems than those measured are not shown
    assert not any("structure" in s for s in others["parity"]["systems"])


def test_hostile_designs_and_names_do_no_harm(systems: list[System], tmp_path: Path) -> None:
    metrics = made_metrics(systems[:3])
    for item, text in zip(metrics["design"]["items"], (HOSTILE, "", "data_x\n_cell_length_a 1\n")):
        item["best"] = {"text": text, "predicted": 0.1, "feasible": True}
        item["judged"] = None
    metrics["property"]["ga_grpo"]["parity"]["adsorbate"][0] = "$\\frac{</svg><script>$"
    metrics["generation"]["grpo"]["reasons"] = {"</td><script>": 3}
    page, _ = own(write_report(made_run(tmp_path / "run", metrics)).read_text())
    assert "<script" not in page and "cannot be drawn" in page
    Outline(page)


def _prefixes() -> Iterator[tuple[str, ...]]:
    keys = ("config", "machine", "data", "baselines", "property", "generation", "design", "seconds")
    for n in (0, 4, 6, 7):
        yield keys[:n]


@pytest.mark.parametrize("keys", _prefixes(), ids=len)
def test_an_unfinished_run_says_what_is_missing(
    keys: tuple[str, ...], systems: list[System], tmp_path: Path
) -> None:
    metrics = {key: value for key, value in made_metrics(systems[:3]).items() if key in keys}
    stages = STAGES[: max(0, len(keys) - 4)]
    text = Outline(write_report(made_run(tmp_path / "run", metrics, stages)).read_text()).text
    assert "Not in this run" in text and "times" in text
    assert ("design evaluation" in text) == ("design" not in keys)
    assert ("property baselines" in text) == ("baselines" not in keys)
    assert ("energy prediction after joint" in text) == ("property" not in keys)
    assert ("training log of GA-GRPO" in text) == ("ga_grpo" not in stages)
    assert isinstance(summary_table(metrics), str)


def test_partial_sections(systems: list[System], tmp_path: Path) -> None:
    metrics = made_metrics(systems[:3])
    metrics["config"]["evaluate"]["judge"] = "none"
    metrics["design"]["judge"] = None
    for curve in metrics["design"]["curves"].values():
        curve.pop("judge", None)
    for item in metrics["design"]["items"]:
        item.pop("judged"), item.pop("success_judge")
    del metrics["property"]["ga_grpo"], metrics["generation"]["ga_grpo"]
    metrics["property"]["align"]["both"] |= {"mae": math.nan, "r2": math.nan}
    metrics["property"]["align"]["generated"] = {"mae": math.nan, "r2": math.nan, "n": 0, "unread": 200}
    text = Outline(write_report(made_run(tmp_path / "run", metrics)).read_text()).text
    assert "sampled CIFs after GA-GRPO" in text and "energy prediction after GA-GRPO" in text
    assert "off: `evaluate.judge: none`" in text and "not judged" in text
    assert "none of 200 read" in text and "– / –" in text
    assert "sampled CIFs after GRPO" not in text


def test_predictions_without_a_structure_are_drawn(page: str, systems: list[System]) -> None:
    text = Outline(page).text
    assert "Predictions without a structure" in text and "Energies where no structure is known" in text
    assert "2 of 2 pairs of adsorbate and catalyst" in text
    for system in systems[:2]:
        assert system.identity.replace("</s>", " on ") in text


@pytest.mark.parametrize(
    ("mode", "words"), [("encoder", "by the encoder alone"), ("text", "from texts alone")]
)
def test_what_has_no_text_and_graph_is_judged_by_what_it_has(
    systems: list[System], tmp_path: Path, mode: str, words: str
) -> None:
    metrics = made_metrics(systems[:3])
    result = metrics["property"]["align"]
    metrics["property"] = {"align": {mode: result["both"], "parity": result["parity"]}}
    claim = summary.claims(metrics)[0]
    assert words in claim.sentence and claim.evidence.startswith(
        f"MAE {summary.number(result['both']['mae'])}"
    )
    text = Outline(write_report(made_run(tmp_path / "run", metrics, ("align",))).read_text()).text
    assert f"Energies {words} after" in text and "text and graph after" not in text


def test_a_search_is_of_the_stage_that_it_came_after(systems: list[System]) -> None:
    metrics = made_metrics(systems)
    metrics["config"]["stages"] = ["joint", "instruct"]
    metrics["config"]["evaluate"]["design_after"] = ["joint", "instruct", "grpo", "ga_grpo"]
    metrics["designs"] = {"joint": metrics["design"]}
    table = summary.stages_table(metrics)
    assert table is not None
    assert [row[0] for row in table.rows] == [summary.STAGE_NAMES[s] for s in ("joint", "instruct")]


def test_a_stage_that_was_not_asked_for_is_not_missing(systems: list[System]) -> None:
    metrics = made_metrics(systems)
    metrics["config"]["stages"] = ["align", "joint"]
    metrics["property"] = {k: metrics["property"][k] for k in ("align", "joint")}
    del metrics["generation"], metrics["design"]
    assert summary.missing_parts(metrics, ["align", "joint"]) == []
    metrics["config"]["stages"] = ["joint", "instruct", "grpo"]
    metrics["config"]["evaluate"]["indicative"] = 12  # measured after instruct
    absent = [part for part in summary.missing_parts(metrics) if part.startswith("predictions")]
    assert absent == ["predictions without a structure after GRPO"]


def test_trained_networks_of_the_same_split_join_the_baselines(systems: list[System], tmp_path: Path) -> None:
    metrics = made_metrics(systems)
    run = made_run(tmp_path / "run", metrics)
    found = {"painn": {"mae": 0.1413, "r2": 0.98, "start": {"mae": 0.5917, "r2": 0.6}}}
    for cell, there in (({"path": None, "split_seed": 0}, True), ({"path": None, "split_seed": 1}, False)):
        (run / "baselines.json").write_text(json.dumps({"cell": cell, "baselines": found}))
        text = Outline(write_report(run).read_text()).text
        assert ("PaiNN (baseline)" in text) == ("0.141 / 0.98" in text) == ("0.592" in text) == there
        assert ("0.141 for PaiNN" in text) == there  # the claim is against all
    (run / "baselines.json").write_text(
        json.dumps({"cell": {"path": None, "split_seed": 0}, "baselines": found})
    )
    assert summary.claims(with_trained_baselines(metrics, run))[0].verdict == "no"  # 0.204 is no better


def test_trained_readers_of_texts_stand_under_text_only(systems: list[System], tmp_path: Path) -> None:
    metrics = made_metrics(systems)
    run = made_run(tmp_path / "run", metrics)
    found = {"roberta": {"mae": 0.3211, "r2": 0.87}, "roberta_gap": {"mae": 0.2987, "r2": 0.88}}
    (run / "baselines.json").write_text(
        json.dumps({"cell": {"path": None, "split_seed": 0}, "baselines": found})
    )
    table = summary.property_table(with_trained_baselines(metrics, run))
    assert table is not None
    place = table.header.index("text only")
    for name, said in (("on texts", "0.321 / 0.87"), ("graph pairs first", "0.299 / 0.88")):
        (row,) = [r for r in table.rows if r[0].startswith("small RoBERTa") and name in r[0]]
        assert [i for i, cell in enumerate(row) if cell == said] == [place]


def test_a_torn_record_and_an_absent_one(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text('{"config": {')
    assert "a readable metrics.json" in write_report(tmp_path).read_text()
    (tmp_path / "metrics.json").unlink()
    assert "Nothing has been measured yet" in write_report(tmp_path).read_text()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_report(tmp_path / "nowhere")


def test_summary_for_the_terminal(systems: list[System]) -> None:
    metrics = made_metrics(systems)
    metrics["config"]["evaluate"]["sampling"] |= {"temperature": 0.65, "top_p": 0.85}
    text = summary_table(metrics)
    assert max(map(len, text.splitlines())) <= 120
    for words in (
        "labels and judge: SevenNet-0, an MLIP, not DFT",
        "mean per adsorbate (baseline)",
        "ridge on words (baseline)",
        "0.465 / 0.77",
        "n = 200",
        "9.23 ± 0.11",
        "PF: cannot be read as a CIF",
        "at temperature 0.65 and top-p 0.85",
        "n = 16 tasks",
        "two parts alone",
        "37.5\u00a0% (31-42)",
        "+12 (-4 to +20)",
        "0.46",
        "1 of 4",
        "shuffled targets",
        "random training system",
        "Minutes on 2 cores",
    ):
        assert words in text, words
    row = next(line for line in text.splitlines() if line.startswith("all "))
    assert row.split() == ["all", "2.5", "2.5"]
    assert summary_table({}).count("Not in this run") == 1


def test_a_subset_has_rows_of_its_own(systems: list[System]) -> None:
    """Below each stage and each baseline that knows it; relaxed structures and starts where they were."""
    metrics = made_metrics(systems)
    plain = summary_table(metrics)
    assert "on fcc slabs" not in plain
    part = {"mae": 0.1234, "r2": 0.9, "n": 77}
    metrics["property"]["ga_grpo"]["both"] = metrics["property"]["ga_grpo"]["both"] | {"subset": part}
    metrics["property"]["ga_grpo"]["start"] |= {"subset": part | {"mae": 0.2345}}
    start = {"mae": 0.5, "r2": 0.5, "subset": {"mae": 0.3456, "r2": 0.7}}
    metrics["baselines"]["kernel_ridge_frames"] = {"mae": 0.4, "r2": 0.6, "subset": part, "start": start}
    lines = summary_table(metrics).splitlines()
    after = {
        lines[i - 1].split("  ")[0].strip(): lines[i] for i, l in enumerate(lines) if "… on fcc slabs " in l
    }
    assert set(after) == {"kernel ridge, with starts (baseline)", "GA-GRPO"}
    assert "0.123 / 0.90" in after["GA-GRPO"] and "0.234" in after["GA-GRPO"]
    assert "0.346" in after["kernel ridge, with starts (baseline)"]
    assert "n = 77 of them that `data.slabs: fcc` tests on" in "\n".join(lines)


def test_own_labels_are_named(systems: list[System]) -> None:
    metrics = made_metrics(systems)
    metrics["data"]["labels"] = "oc20.jsonl"
    own = "labels: oc20.jsonl; judge: SevenNet-0, an MLIP, not DFT, whose zero may be another"
    assert own in summary_table(metrics)
    assert "labels and judge" not in summary_table(metrics)


def test_verdicts_follow_the_numbers(systems: list[System]) -> None:
    def verdicts(**changes: Any) -> list[str]:
        metrics = made_metrics(systems)
        for path, value in changes.items():
            *keys, last = path.split("__")
            node = metrics
            for key in keys:
                node = node[key]
            node[last] = value
        return [claim.verdict for claim in summary.claims(metrics)]

    # energies, GRPO raised the reward, GA-GRPO did not lower it, designs by the own predictor, by SevenNet-0
    assert verdicts() == ["yes", "yes", "yes", "yes", "yes"]
    assert verdicts(property__ga_grpo__both__mae=0.35)[0] == "unclear"  # within two standard errors of 0.344
    assert verdicts(property__ga_grpo__both__mae=0.5)[0] == "no"
    assert verdicts(property__ga_grpo__both__mae=math.nan)[0] == "no"
    assert verdicts(generation__grpo__reward=7.3)[1] == "unclear"
    assert verdicts(generation__grpo__reward=6.0)[1] == "no"
    assert verdicts(generation__ga_grpo__reward=8.0)[2] == "no"
    assert verdicts(design__judge__success=0.25)[4] == "unclear"
    assert verdicts(design__judge__success=0.15)[4] == "no"
    less = [[-0.1, 0.3]] * 3  # at the same tasks it may be no more than the ideal slabs
    assert verdicts(design__curves__enumeration__judge__search_more_interval=less)[4] == "unclear"
    assert verdicts(design__judge__random=0.4)[4] == "no"
    assert verdicts(design__own__shuffled_same_adsorbate=0.95)[3] == "no"
    assert len(verdicts(design__judge=None)) == 4


@pytest.mark.parametrize(("hits", "n"), [(0, 48), (1, 16), (18, 48), (256, 256)])
def test_wilson_interval_against_scipy(hits: int, n: int) -> None:
    expected = binomtest(hits, n).proportion_ci(method="wilson")
    assert summary.wilson_interval(hits / n, n) == pytest.approx((expected.low, expected.high), abs=1e-4)


def test_traces_count_every_task(systems: list[System]) -> None:
    design = made_design(systems)
    solved, valid = figures.solved_by_iteration(design), figures.valid_by_iteration(design)
    # the best is off by 1.2 / (i + 1) eV: within 0.25 eV from iteration 4 on
    assert solved.tolist() == [0.0] * 4 + [1.0] * 7
    assert valid.tolist() == [15 / 16] + [1.0] * 10
    one_lost = np.array([[1.0], [2.0], [np.inf]])
    assert figures._quantile(one_lost, 0.5).tolist() == [2.0]  # the lost task is not left out
    assert figures._quantile(one_lost, 0.75).tolist() == [np.inf]


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_readme_figure(run: Path, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"figure{suffix}"
    readme_figure(run, out)
    assert out.stat().st_size <= 200_000
    if suffix == ".png":
        with Image.open(out) as image:
            pixels = np.asarray(image.convert("L"))
        assert pixels.shape[1] > 700 and pixels.min() < 60 and pixels.max() == 255
    else:
        words = " ".join(ET.parse(out).getroot().itertext())
        assert "not DFT" in words and "Failures of sampled CIFs" in words and "n = 16 tasks" in words
    with pytest.raises(ValueError, match=r"\.pdf"):
        readme_figure(run, tmp_path / "figure.pdf")


def test_readme_figure_of_an_unfinished_run(systems: list[System], tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", {"data": made_metrics(systems)["data"]})
    readme_figure(run, tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").read_text().count("not in this run") == 4


def circles(svg: str) -> list[tuple[float, float, str]]:
    return [
        (float(c.get("cx", "nan")), float(c.get("cy", "nan")), c.get("stroke", ""))
        for c in ET.fromstring(svg).iter("circle")
    ]


def test_drawing_shows_the_geometry(systems: list[System]) -> None:
    system = next(s for s in systems if s.adsorbate == "CO")
    side = circles(structure_svg(system, "side", 120))
    ringed = [c for c in side if c[2] == "#000"]
    assert ringed and min(y for _, y, _ in ringed) < min(y for _, y, s in side if s != "#000")
    scale = 120 / float(np.clip(1.7 * np.linalg.norm(system.lattice[:2], axis=1).max(), 9, 24))
    heights = sorted({round(y / scale, 1) for _, y, _ in ringed})
    bond = np.ptp(system.positions[system.tags == 2][:, 2])
    assert heights[-1] - heights[0] == pytest.approx(bond, abs=0.15)
    # a CIF's coordinates are wrapped into the cell, so this slab lies on both sides of its boundary
    shifted = make_system(
        system.lattice,
        None,
        system.numbers,
        system.tags,
        system.adsorbate,
        system.miller,
        frac=(system.frac + [0.3, 0.0, 0.6]) % 1.0,
    )
    moved = circles(structure_svg(shifted, "side", 120))
    assert len(moved) == len(side)
    assert np.allclose(sorted(c[:2] for c in moved), sorted(c[:2] for c in side), atol=0.11)


def test_drawing_refuses_a_crowd(systems: list[System]) -> None:
    s = systems[0]
    n = 400
    many = make_system(
        s.lattice, np.random.default_rng(0).random((n, 3)), [29] * n, [0] * (n - 1) + [2], "Cu", (1, 1, 1)
    )
    with pytest.raises(ValueError, match="400 atoms"):
        structure_svg(many, "top")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({}, "whose pair of bulk metal and facet does not occur in training"),
        ({"split_by": "adsorbate"}, "whose adsorbate does not occur in training"),
        ({"split_by": "metal"}, "whose set of metals is that of no training system"),
        (
            {"split_by": "metal", "hold_out": ["Pt", "Cu"]},
            "with the metal Pt, Cu, which no training system has",
        ),
    ],
)
def test_the_table_of_energies_says_what_keeps_the_test_systems_apart(
    systems: list[System], data: dict[str, Any], said: str
) -> None:
    table = summary.property_table(made_metrics(systems) | {"config": {"data": data}})
    assert table is not None and f"test systems {said}. No outlier is dropped." in table.notes[0]
