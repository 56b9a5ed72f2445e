"""What a folder of shards holds: counts, energies, token lengths and pictures,
on the terminal and as a page."""

from __future__ import annotations

import base64
import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from catmllm.data.prompts import cif_sample, design_sample, property_sample
from catmllm.data.shards import Shards
from catmllm.data.tokenizer import extend_tokenizer, tiny_tokenizer
from catmllm.report import page as html
from catmllm.structure.cif import write_cif
from catmllm.structure.system import System

SAMPLE = 1000  # systems whose texts are tokenized, evenly spaced
_BARS = "▏▎▍▌▋▊▉█"


def inspect(folder: Path, out: Path, tokenizer: str | None = None, pictures: int = 8, seed: int = 0) -> str:
    """Write energies.png, tokens.png and inspect.html into `out`; returns the same in words for the terminal.

    tokenizer: a folder or name of a Hugging Face tokenizer, which is extended as in training; None: the small
    one that models from random weights use. Raises ValueError for a folder that holds no dataset.
    """
    shards = Shards(folder)
    if not len(shards):
        raise ValueError(f"{folder} holds no system; its dataset.json says what was dropped and why")
    some = [shards[int(i)] for i in np.unique(np.linspace(0, len(shards) - 1, SAMPLE).astype(np.int64))]
    lengths = token_lengths(some, tokenizer)
    counts = facts(shards, some)
    out.mkdir(parents=True, exist_ok=True)
    energies = _figure(lambda axes: _draw_energies(axes, shards.energies))
    tokens = _figure(lambda axes: _draw_tokens(axes, lengths))
    (out / "energies.png").write_bytes(energies)
    (out / "tokens.png").write_bytes(tokens)
    chosen = np.sort(
        np.random.default_rng(seed).choice(len(shards), min(pictures, len(shards)), replace=False)
    )
    cards = [_card(shards[int(i)], shards.text(int(i))) for i in chosen]
    (out / "inspect.html").write_text(
        _page(shards, counts, lengths, energies, tokens, cards), encoding="utf-8"
    )
    rows = "\n".join(f"{name:<28}{value}" for name, value in [*counts, *_length_rows(lengths)])
    return f"{rows}\n\nadsorption energy (eV)\n{bar_chart(shards.energies)}\n\n{out / 'inspect.html'}"


def facts(shards: Shards, some: list[System]) -> list[tuple[str, str]]:
    """Counts of a dataset by name; `some` of its systems stand for all
    where every structure would have to be read."""
    n, e = shards.n_atoms, shards.energies
    names = shards.pair_names
    pairs = [names[i] for i in np.unique(shards.pairs)]
    parts = {part: len(members) for part, members in shards.split().items()}
    adsorbates = Counter(s.adsorbate for s in some)
    rows = [("systems", f"{len(shards):,}")]
    rows += [
        (f"from {name}", f"{int((shards.sources == i).sum()):,}")
        for i, name in enumerate(shards.source_names)
        if (shards.sources == i).any()
    ]
    rows += [
        ("atoms", f"{int(n.min())} to {int(n.max())}, median {int(np.median(n))}"),
        ("energy (eV)", f"{e.min():.3f} to {e.max():.3f}, mean {e.mean():.3f}, sd {e.std():.3f}"),
        ("bulks", f"{len({p.partition(' ')[0] for p in pairs}):,}"),
        ("(bulk, Miller index)", f"{len(pairs):,}"),
        ("train / val / test", " / ".join(f"{v:,}" for v in parts.values())),
        (
            f"adsorbates of {len(some):,}",
            f"{len(adsorbates)}: " + ", ".join(f"{a} {k}" for a, k in adsorbates.most_common(8)),
        ),
        (f"unbound of {len(some):,}", f"{np.mean([_unbound(s) for s in some]):.1%}"),
    ]
    rows += [(f"dropped: {reason}", f"{k:,}") for reason, k in shards.facts.get("dropped", {}).items()]
    return rows


def _unbound(system: System) -> bool:
    from catmllm.structure.text import configuration

    return configuration(system) == "[]"


def token_lengths(systems: list[System], tokenizer: str | None = None) -> dict[str, NDArray[np.int64]]:
    """Tokens [n] of the CIF alone and of whole samples of the three tasks."""
    texts = {
        "CIF": [write_cif(s) for s in systems],
        "property sample": [p.prompt + p.answer for p in map(property_sample, systems)],
        "CIF sample": [p.prompt + p.answer for p in map(cif_sample, systems)],
        "design sample": [p.prompt + p.answer for p in (design_sample(s, s) for s in systems)],
    }
    if tokenizer is None:
        read: Any = tiny_tokenizer(t for name, some in texts.items() if name != "CIF" for t in some[:200])
    else:
        from transformers import AutoTokenizer

        read = AutoTokenizer.from_pretrained(tokenizer)
        extend_tokenizer(read, elements=False)
    return {
        name: np.array([len(ids) for ids in read(some, add_special_tokens=False)["input_ids"]])
        for name, some in texts.items()
    }


def bar_chart(values: NDArray[np.float64], rows: int = 16, width: int = 48) -> str:
    """A histogram in text, one row a bin."""
    counts, edges = np.histogram(values, bins=min(rows, max(1, len(values))))
    lines = []
    for count, low, high in zip(counts, edges, edges[1:]):
        eighths = round(8 * width * count / counts.max())
        bar = "█" * (eighths // 8) + (_BARS[eighths % 8 - 1] if eighths % 8 else "")
        lines.append(f"{low:8.2f} to {high:7.2f} {bar:<{width}} {count:,}")
    return "\n".join(lines)


def _length_rows(lengths: dict[str, NDArray[np.int64]]) -> list[tuple[str, str]]:
    return [
        (f"tokens, {name}", f"median {np.median(n):.0f}, 95 % {np.quantile(n, 0.95):.0f}, most {n.max()}")
        for name, n in lengths.items()
    ]


def _figure(draw: Any) -> bytes:
    figure = Figure(figsize=(6.4, 3.0), layout="constrained")
    axes = figure.subplots()
    draw(axes)
    axes.spines[["top", "right"]].set_visible(False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=144)
    return stream.getvalue()


def _draw_energies(axes: Axes, energies: NDArray[np.float64]) -> None:
    axes.hist(energies, bins=min(80, max(5, len(energies) // 5)), color="#0072b2")
    axes.set_xlabel("adsorption energy (eV)")
    axes.set_ylabel("systems")


def _draw_tokens(axes: Axes, lengths: dict[str, NDArray[np.int64]]) -> None:
    for (name, n), colour in zip(lengths.items(), ("#8c8c8c", "#0072b2", "#e69f00", "#009e73")):
        axes.plot(np.sort(n), np.linspace(0, 100, len(n)), color=colour, label=name)
    axes.set_xlabel("tokens")
    axes.set_ylabel("share of samples not longer (%)")
    axes.set_xlim(left=0)
    axes.legend(frameon=False)


def _card(system: System, text: str) -> str:
    words = (
        f"<b>{html.text(system.identity)}</b><br>{system.known_energy:.3f} eV · {len(system)} atoms · "
        f"{html.text(system.sid)}"
    )
    cif = f"<details><summary>CIF</summary><pre>{html.text(write_cif(system))}</pre></details>"
    return (
        f'<div class="design">{html.views(lambda: system)}<p>{words}</p><p>{html.text(text)}</p>{cif}</div>'
    )


def _page(
    shards: Shards,
    counts: list[tuple[str, str]],
    lengths: dict[str, NDArray[np.int64]],
    energies: bytes,
    tokens: bytes,
    cards: list[str],
) -> str:
    title = f"Dataset {shards.folder.resolve().name}"

    def table(rows: list[tuple[str, str]]) -> str:
        cells = "".join(f"<tr><th>{html.text(a.strip())}</th><td>{html.text(b)}</td></tr>" for a, b in rows)
        return f"<table>{cells}</table>"

    def picture(data: bytes, words: str) -> str:
        source = base64.b64encode(data).decode()
        return (
            f'<figure><img style="max-width:100%" width="640" alt="{words}" '
            f'src="data:image/png;base64,{source}"></figure>'
        )

    body = [
        f"<h1>{html.text(title)}</h1>",
        table(counts),
        html.section("Energies", picture(energies, "histogram of adsorption energies")),
        html.section("Tokens", table(_length_rows(lengths)), picture(tokens, "token lengths")),
        html.section("Some systems, drawn at random", f'<div class="designs">{"".join(cards)}</div>'),
    ]
    return html.page(title, body)
