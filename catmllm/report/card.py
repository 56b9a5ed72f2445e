"""Cards in Hugging Face's form: a YAML head that the Hub reads, then sections for people.

    python -m catmllm.report.card > docs/data_card.md      # that of the shipped data

A model's card is written by `catmllm export hf`, from the record of its run (metrics.json), its configuration
and its domain; that of the shipped data from its two files. No number in them is written by hand.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import yaml

from catmllm.config import STAGES, Config, from_dict
from catmllm.data.fcc_slabs import N_SLAB
from catmllm.data.oracle import POTENTIALS
from catmllm.data.slabs import SHIPPED, SHIPPED_SEVENNET, WIDE, WIDE_SEED, SplitName, load_slabs, split
from catmllm.design.domain import Domain, load_domain
from catmllm.report.summary import (
    STAGE_MEANINGS,
    STAGE_NAMES,
    Metrics,
    Table,
    claims,
    conditions,
    design_table,
    finite,
    generation_table,
    property_table,
)
from catmllm.structure.system import System

CARD = "README.md"
OURS = "apache-2.0"
# Licences of the weights that an LLM may begin from, by its name: the Hub's id, the name where it has none.
BACKBONES = (
    (r"Qwen2\.5(-VL)?-3B", "other", "qwen-research"),
    (r"Qwen2\.5(-VL)?-72B", "other", "qwen"),
    (r"Qwen(2\.5|3)", "apache-2.0", ""),
)
# Who made the labels of the shipped data, with the licence of that program's weights.
LABELLERS = {
    "diep": "DIEP 2.0.0 (BSD-3-Clause), trained on MatPES (r2SCAN)",
    "sevennet": "SevenNet-0 (MIT)",
}
SHIPPED_NAMES = {"fcc": "catmllm fcc slabs", "all": "catmllm slabs"}  # by `data.slabs`
DATA_LIMITS = (
    "They are for testing a training pipeline. They say nothing about real catalysts.",
    "One adsorbate per cell, on ideal facets: no oxides, no water; steps and other coverages only in the "
    "wide file.",
    "The slabs were drawn at random, and repeat: split them by pair, as above. By slab or by system a test "
    "system has twins in training.",
    "SevenNet-0 is wrong for oxygen on nickel; [Data](data.md) has the numbers.",
)
MODES = {"both": "text and graph", "start": "unrelaxed structure", "graph": "graph only", "text": "text only",
         "ensemble": "text, mean with ridge"}  # fmt: skip
CITATION = (
    "The model follows CatalyticMLLM ([arXiv:2605.17254](https://arxiv.org/abs/2605.17254)): EquiformerV2, "
    "Qwen2.5-VL and a projector between them. `CITATION.cff` of catmllm has both."
)


# Models -----------------------------------------------------------------------------------------------------


def write_card(source: Path, out: Path) -> None:
    """README.md of an export into `out`: that of `source`, a stage's folder, or the one that it has already
    where it is an export."""
    if (source / CARD).is_file():
        text = (source / CARD).read_text(encoding="utf-8")
    else:
        path = source / "catmllm.json"
        record = source.parent / "metrics.json"
        metrics = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
        config = from_dict(json.loads(path.read_text(encoding="utf-8")), str(path))
        text = model_card(source.name, metrics, config, load_domain(source))
    (out / CARD).write_text(text, encoding="utf-8")


def model_card(stage: str, metrics: Metrics, config: Config, domain: Domain | None) -> str:
    """The card of the model after `stage`; metrics: the record of its run, empty where there is none."""
    known = stage in STAGES
    shown = up_to(metrics, stage) if known else {}
    mine = shown | {part: _only(shown.get(part), stage) for part in ("property", "generation")}
    tables = [made for make in (property_table, generation_table, design_table)
              if mine.get("property") and (made := make(mine)) is not None]  # fmt: skip
    after = STAGE_NAMES.get(stage, stage)
    body = [
        f"# {config.name}, after {after}",
        "A language model on catalysts: it predicts the relaxed adsorption energy of a molecule on a metal "
        "slab, and writes CIF files of new systems with a wanted energy.",
        "## Use",
        _use(config),
        "## Data",
        _data(shown, config, domain),
        "## Training",
        _training(shown, config, stage),
        "## Results",
        *(
            map(markdown, tables)
            if tables
            else ["The run of this model has no record: nothing was measured."]
        ),
        "## Limits",
        bullets(_limits(shown, domain)),
        "## Licence",
        _licence(config),
        "## Citation",
        CITATION,
    ]
    return _head(_model_head(stage, mine, config)) + "\n\n".join(body) + "\n"


def up_to(metrics: Metrics, stage: str) -> Metrics:
    """A run's record as it was after a stage: the designs are measured after `ga_grpo`."""
    until = STAGES[: STAGES.index(stage) + 1]
    cut = {
        part: {s: v for s, v in (metrics.get(part) or {}).items() if s in until}
        for part in ("property", "generation", "validation")
    }
    return metrics | cut | {"design": metrics.get("design") if stage == STAGES[-1] else None}


def _only(part: Metrics | None, stage: str) -> Metrics:
    return {stage: part[stage]} if part and stage in part else {}


def _model_head(stage: str, mine: Metrics, config: Config) -> Metrics:
    """What the Hub reads of a model."""
    licence, name = _backbone(config)
    pretrained = config.model.llm.pretrained
    head: Metrics = {"license": licence}
    if licence == "other":
        head |= {"license_name": name, "license_link": f"https://huggingface.co/{pretrained}"}
    head |= {"library_name": "catmllm", "pipeline_tag": "graph-ml"}
    if pretrained and not Path(str(pretrained)).exists():
        head["base_model"] = [str(pretrained)]
    head["tags"] = ["catalysis", "adsorption-energy", "crystal-structure", "equiformer-v2", "qwen"]
    if mine.get("property"):
        head["model-index"] = [{"name": f"catmllm-{config.name}", "results": _results(stage, mine, config)}]
    return head


def _results(stage: str, mine: Metrics, config: Config) -> list[Metrics]:
    """The Hub's list of results: a task, a data set, numbers."""
    name = _data_name(config)
    data = {"name": name, "type": name.lower().replace(" ", "-"), "split": "test"}
    found: list[Metrics] = []
    for mode, words in MODES.items():
        result = mine["property"][stage].get(mode)
        if not result or not finite(result.get("mae")):
            continue
        task = {"type": "tabular-regression", "name": f"Relaxed adsorption energy, {words}"}
        numbers = [
            {"type": kind, "name": said, "value": round(result[key], 4)}
            for key, kind, said in (("mae", "mae", "MAE (eV)"), ("r2", "r_squared", "R²"))
            if finite(result.get(key))
        ]
        found.append({"task": task, "dataset": dict(data), "metrics": numbers})
    answers = mine["generation"].get(stage)
    if answers:
        task = {"type": "text-generation", "name": "CIFs of unseen systems, held by the grammar"}
        numbers = [{"type": "reward", "name": "PVCP reward, -15 to 10", "value": round(answers["reward"], 4)}]
        found.append({"task": task, "dataset": dict(data), "metrics": numbers})
    design = mine.get("design") or {}
    for judge, words in (("own", "by its own predictor"), ("judge", f"by {design.get('judge_name')}")):
        if finite((design.get(judge) or {}).get("success")):
            task = {"type": "text-generation", "name": f"Designs within {design['tolerance']} eV, {words}"}
            share = {"type": "accuracy", "name": "success", "value": round(design[judge]["success"], 4)}
            found.append({"task": task, "dataset": dict(data), "metrics": [share]})
    return found


def _data_name(config: Config) -> str:
    return SHIPPED_NAMES[config.data.slabs] if config.data.path is None else Path(config.data.path).name


def _use(config: Config) -> str:
    llm = "Qwen2_5_VLForConditionalGeneration" if not config.model.llm.pretrained else "AutoModelForCausalLM"
    return f"""\
`pip install '.[train]'` in a clone of catmllm. DIR is this folder. Without `--model` the commands take the
model that comes with the package.

```
catmllm predict slab.cif --model DIR
catmllm design "CO</s>Pt9Cu3 (1 1 1)" --energy -1.2 --model DIR
catmllm finetune DIR --data data/mine
```

```python
from catmllm.models.state import load_model

model, collate, config = load_model("DIR")
```

`model.safetensors`, `config.json` and the tokenizer are the language model by itself, as transformers'
`{llm}` reads it. `graph.safetensors` has the rest: encoder, projector, energy head, closed forms of energies.
`domain.json` says what training has seen and how large the errors are."""


def _data(shown: Metrics, config: Config, domain: Domain | None) -> str:
    data = shown.get("data") or {}
    lines = [f"Training data: {_data_name(config)}."]
    if data:
        lines.append("{train:,} training, {val:,} validation and {test:,} test systems.".format(**data))
        lines.append(f"Split: {data['split']}.")
    labels = (domain.labels if domain else "") or data.get("labels")
    lines.append(f"Labels: {labels or 'not said'}.")
    if config.data.path is None:
        lines.append(f"They were made with {LABELLERS[config.data.labels]}.")
    zero = (domain.reference if domain else None) or data.get("reference")
    lines.append(f"Zero of the energies: {zero or 'not said'}.")
    if domain is not None:
        lines.append(f"Elements of the slabs: {', '.join(domain.elements)}.")
        lines.append(f"Adsorbates: {', '.join(domain.adsorbates)}.")
        lines.append(f"Energies from {domain.energy[0]:.2f} to {domain.energy[1]:.2f} eV.")
    return bullets(lines)


def _training(shown: Metrics, config: Config, stage: str) -> str:
    until = config.stages.index(stage) + 1 if stage in config.stages else len(config.stages)
    stages = config.stages[:until]
    lines = [meaning for meaning, name in zip(STAGE_MEANINGS, STAGES) if name in stages]
    if (pretrained := config.model.llm.pretrained) is not None:
        lines.append(f"The language model began as `{pretrained}`.")
    else:
        lines.append("The language model began from random weights.")
    encoder = config.model.encoder
    if encoder.kind != "none":
        began = f"as `{encoder.checkpoint}`" if encoder.checkpoint else "from random weights"
        lines.append(f"The encoder{' (SchNet)' if encoder.kind == 'schnet' else ''} began {began}.")
    minutes = sum((shown.get("seconds") or {}).get(s, 0.0) for s in stages) / 60
    if minutes:
        lines.append(f"{minutes:.0f} minutes of training.")
    text = bullets(lines)
    return f"{text}\n\n{conditions(shown)}." if shown.get("machine") else text


def _limits(shown: Metrics, domain: Domain | None) -> Iterable[str]:
    labels = domain.labels if domain is not None else ""
    if "not DFT" in labels:
        yield (
            f"Every energy is one of {labels}. Such energies show whether a method works, and say nothing of "
            "real catalysts."
        )
    if domain is None:
        yield "It says nothing of its training data, so no structure can be told to lie outside of them."
    else:
        yield (
            "Elements, adsorbates, distances and coverages that training has not seen are marked as outside. "
            "Their energies have no error and should not be used."
        )
        if domain.validation:
            yield (
                "The error that a prediction comes with holds 68 % of the errors on "
                f"{domain.validation['n']:.0f} validation systems, whose MAE is "
                f"{domain.validation['mae']:.3f} eV."
            )
    if shown.get("property"):
        yield "One seed and one split: small differences between the rows above mean nothing."
    for claim in claims(shown):
        if claim.verdict != "yes":
            sentence = claim.sentence[:1].lower() + claim.sentence[1:]
            yield f"Not shown ({claim.verdict}): {sentence}. {claim.evidence}."


def _backbone(config: Config) -> tuple[str, str]:
    """The Hub's id of a model's licence, and its name where that is `other`."""
    pretrained = config.model.llm.pretrained
    if pretrained is None:
        return OURS, ""
    for pattern, licence, name in BACKBONES:
        if re.search(pattern, str(pretrained)):
            return licence, name
    return "other", "that-of-its-backbone"


def _licence(config: Config) -> str:
    licence, name = _backbone(config)
    pretrained, checkpoint = config.model.llm.pretrained, config.model.encoder.checkpoint
    lines = []
    if pretrained is None:
        lines.append("Apache-2.0, as catmllm itself. No weights of others are in it.")
    else:
        lines.append(
            f"The language model began as `{pretrained}`, whose licence ({name or licence}) holds for it too."
        )
    if checkpoint:
        lines.append(
            f"The encoder began as `{checkpoint}`; the licence of that file holds for it too; fairchem's "
            "model zoo names it."
        )
    if config.data.path is None:
        lines.append(
            f"The training data are Apache-2.0. Their labels were made with {LABELLERS[config.data.labels]}."
        )
    else:
        lines.append("The licence of the training data is for whoever has them to say.")
    return bullets(lines)


# Data -------------------------------------------------------------------------------------------------------


def data_card() -> str:
    """The card of the shipped data."""
    files = {("fcc", "diep"): SHIPPED, ("fcc", "sevennet"): SHIPPED_SEVENNET, ("all", "diep"): WIDE}
    systems = {path: load_slabs(path) for path in files.values()}
    records = {path: _records(path) for path in files.values()}
    every = systems[SHIPPED] + systems[WIDE]
    head = {
        "license": OURS,
        "pretty_name": SHIPPED_NAMES["all"],
        "task_categories": ["tabular-regression", "graph-ml"],
        "size_categories": ["10K<n<100K" if len(every) >= 10_000 else "1K<n<10K"],
        "tags": ["catalysis", "adsorption-energy", "crystal-structure", "machine-learned-potential"],
        "configs": [
            {"config_name": "diep", "data_files": SHIPPED.name, "default": True},
            {"config_name": "sevennet", "data_files": SHIPPED_SEVENNET.name, "default": False},
            {"config_name": "all", "data_files": [SHIPPED.name, WIDE.name], "default": False},
        ],
    }
    labels = [
        [f"`{slabs}`", f"`{name}`", f"`{path.name}`{', and the first' if slabs == 'all' else ''}",
         LABELLERS[name], f"{len(systems[path]):,}", _refused(records[path])]
        for (slabs, name), path in files.items()
    ]  # fmt: skip
    first, rest = records[SHIPPED], records[WIDE]
    body = [
        "# Card of the shipped data",
        f"{len(first) + len(rest):,} adsorption systems, {len(every):,} of them usable, each with a relaxed "
        "structure, the start of its relaxation and an adsorption energy. This page is made from the files "
        "in `catmllm/data`, in the form of a data card of Hugging Face. [Data](data.md) says more.",
        "## What is in it",
        f"`data.slabs: fcc`, the default, {len(first):,} systems on {len({r['slab'] for r in first})} slabs:",
        _fcc_slabs(systems[SHIPPED]),
        f"`data.slabs: all`, also {len(rest):,} systems on {len({r['slab'] for r in rest})} slabs that "
        f"`catmllm data make --seed {WIDE_SEED}` makes:",
        _wide_slabs(rest, systems[WIDE], every),
        "Of every record:",
        bullets([
            "JSON lines, gzipped. `symbols`, `cell`, `pos` (relaxed), `pos_start`, `tags` (2: adsorbate), "
            "`adsorbate`, `bulk`, `miller`, `energy` (eV), `ok`; in the wide file also `reason`, `strain` "
            "and `frames`, positions of the adsorbate on its way and their energies.",
            "Energy: E(slab + adsorbate) - E(slab) - E(reference), from gas CO, H2, H2O and N2 (and H2S, HF "
            "and HCl in the wide file).",
        ]),
        "## Labels",
        "The two files of `fcc` have the same systems. The potential that labelled a file also relaxed its "
        "structures.",
        _grid(["`data.slabs`", "`data.labels`", "file", "made with", "usable", "refused"], labels),
        "**Every energy is a label by a machine-learned potential, not DFT.** No record of another data set "
        "is in them.",
        f"## Energies of {POTENTIALS['diep']}, eV",
        _energies(systems[SHIPPED]),
        "The wide file:",
        _energies(systems[WIDE]),
        "## Limits",
        bullets(DATA_LIMITS),
        "## Licence",
        "Apache-2.0, as catmllm, which made the structures. "
        f"The labels were made with {' and with '.join(LABELLERS.values())}.",
    ]  # fmt: skip
    return _head(head) + "\n\n".join(body) + "\n"


def _fcc_slabs(systems: Sequence[System]) -> str:
    """What the usable systems are, counted."""
    facets = " and ".join(sorted({str(s.miller) for s in systems}))
    return bullets([
        f"Slabs: 2x2 cells of three layers, {N_SLAB} metal atoms, and one adsorbate; fcc facets {facets}"
        f"; {len(_pairs(systems))} pairs of bulk and facet.",
        f"Metals: {_metals(systems)}.",
        f"Split with seed 0, whole pairs of bulk and facet at a time: {_sizes(systems)}.",
    ])  # fmt: skip


def _wide_slabs(records: Sequence[dict[str, Any]], systems: Sequence[System], every: Sequence[System]) -> str:
    """What the usable systems of the wide file are, and the split of `every` one, those of `fcc` first."""
    atoms = [sum(s.slab_counts.values()) for s in systems]
    facets = Counter(str(s.miller) for s in systems)
    strained = sum(bool(r["strain"]) for r in records if r["ok"])
    first = len(every) - len(systems)
    both = len(_pairs(systems) & _pairs(every[:first]))
    return bullets([
        f"Slabs: fcc, bcc and hcp, of {min(atoms)} to {max(atoms)} metal atoms of one to three elements, "
        f"facets {', '.join(f'{name} ({n:,})' for name, n in facets.most_common())}; {strained:,} systems "
        f"are strained; {len(_pairs(systems))} pairs of bulk and facet, {both} of which `fcc` has too.",
        f"Metals: {_metals(systems)}.",
        f"Split of both with seed 0: {_sizes(every, first)}. A pair of `fcc` is in the part that it is in "
        "without the wide file.",
    ])  # fmt: skip


def _pairs(systems: Sequence[System]) -> set[str]:
    return {f"{s.bulk} {s.miller}" for s in systems}


def _metals(systems: Sequence[System]) -> str:
    return ", ".join(sorted({e for s in systems for e in s.slab_counts}))


def _sizes(systems: Sequence[System], first: int | None = None) -> str:
    parts = split(systems, first=first)
    train, val, test = (f"{len(parts[part]):,}" for part in get_args(SplitName))
    return f"{train} training, {val} validation and {test} test systems"


def _energies(systems: Sequence[System]) -> str:
    rows = [_energy_row(name, systems) for name in sorted({s.adsorbate for s in systems})]
    return _grid(["adsorbate", "n", "mean", "sd", "least", "largest"], rows)


def _records(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _refused(records: Sequence[dict[str, Any]]) -> str:
    """How many systems were refused, and why."""
    why = Counter(
        r.get("reason")
        or ("not_converged" if not r["converged"] else "dissociated" if r["dissociated"] else "misplaced")
        for r in records
        if not r["ok"]
    )
    why["slab not converged"] = why.pop("slab", 0)
    return ", ".join(f"{n} {reason.replace('_', ' ')}" for reason, n in why.most_common() if n)


def _energy_row(adsorbate: str, systems: Sequence[System]) -> list[str]:
    found = np.array([s.known_energy for s in systems if s.adsorbate == adsorbate])
    numbers = (found.mean(), found.std(ddof=1), found.min(), found.max())
    return [adsorbate, str(len(found)), *(f"{x:.2f}" for x in numbers)]


# Markdown ---------------------------------------------------------------------------------------------------


def _head(fields: Metrics) -> str:
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=110)}---\n\n"


def markdown(table: Table) -> str:
    """A table of a run's report with its title and notes."""
    return "\n\n".join([f"**{table.title}**", _grid(table.header, table.rows), bullets(table.notes)])


def _grid(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = [[cell.replace("|", r"\|") for cell in row] for row in (header, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


if __name__ == "__main__":
    print(data_card(), end="")
