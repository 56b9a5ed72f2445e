"""The three-part text `adsorbate</s>composition (h k l)</s>configuration` of a System, CatBERTa's convention.

The composition is the reduced formula of the slab, as in the paper's property prompts.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numba import njit

from catmllm.structure.elements import COVALENT_RADIUS, SYMBOLS
from catmllm.structure.formula import SEPARATOR, format_miller
from catmllm.structure.periodic import any_image_within, complain, wrap_into
from catmllm.structure.system import ADSORBATE, System, text_system

BOND_SLACK = 0.10  # Å; CatBERTa asks ASE's neighbour list with a skin of 0.05 Å for either atom
_SITES = (" atop", " bridge", " hollow")


def three_part_text(system: System, scale: float = 1.0, max_characters: int | None = None) -> str:
    """`CO</s>PdIr (1 1 1)</s>[C Pd atop [Pd Ir Ir Pd C]]`; an unknown Miller index is left out. scale,
    max_characters: see `configuration`. Of a system without a structure its text as it is."""
    if system.text is not None:
        return system.text
    return SEPARATOR.join((two_part_text(system), configuration(system, scale, max_characters)))


def two_part_text(system: System) -> str:
    """`CO</s>PdIr (1 1 1)`: adsorbate and catalyst, all that is known where the structure is missing."""
    plane = "" if system.miller is None else f" {format_miller(system.miller)}"
    return SEPARATOR.join((system.adsorbate, f"{system.bulk}{plane}"))


def worded(system: System, text: str) -> System:
    """The system as one of which only this text is known. Energy and name stay, and whether what the text is
    of was relaxed."""
    return replace(text_system(text, system.energy, system.sid), relaxed=system.relaxed)


def configuration(system: System, scale: float = 1.0, max_characters: int | None = None) -> str:
    """The bonds between adsorbate and slab: `[C Pd Ir bridge [Pd ...] [Ir ...]]` for every binding atom,
    or `[]`.

    Two atoms are bonded where their distance under periodic boundary conditions is below scale (r_i + r_j) +
    0.10 Å, r the covalent radii. scale 1.0 is for true structures, 4.0 for indicative ones (structure-missing
    inference), where everything is bonded to everything and strings reach 10,000 characters: max_characters
    ends them before the word that would not fit, all brackets closed. A binding atom is followed by its slab
    neighbours, the site by their number, and for each of them all its neighbours; everything in index order.
    """
    cap = -1 if max_characters is None else max_characters
    if max_characters is not None and max_characters < 2:
        raise ValueError(f"max_characters is at least 2, for `[]`, not {max_characters}")
    lattice = np.ascontiguousarray(system.lattice)
    positions = system.positions
    written, problem, spacings, candidates, reach = _configuration(
        lattice, positions, system.numbers, system.tags, float(scale), cap, _RADII, _WORDS, _LENGTHS
    )
    if problem:
        complain(problem, lattice, len(positions), reach, spacings, candidates)
    return bytes(written).decode("ascii") or "[]"


def _table(words: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Words as rows of bytes, and their lengths: Numba cannot index a
    tuple of strings at run time for nothing."""
    table = np.zeros((len(words), max(map(len, words))), dtype=np.uint8)
    for row, word in zip(table, words):
        row[: len(word)] = np.frombuffer(word.encode("ascii"), dtype=np.uint8)
    return table, np.array([len(word) for word in words])


_WORDS, _LENGTHS = _table([*SYMBOLS, *_SITES])
_RADII = np.array(COVALENT_RADIUS)  # writable, as Numba's cache tells the two kinds apart
_OPEN, _CLOSE, _SPACE = ord("["), ord("]"), ord(" ")
_N_SYMBOLS = len(SYMBOLS)


@njit(cache=True, nogil=True)
def _configuration(lattice, positions, numbers, tags, scale, cap, covalent, words, lengths):
    """The bytes of a configuration; the problem (0: none) with what `complain` needs to say it.

    A hot loop, compiled in one piece: one pass over the bonds that writes as it finds them.
    """
    n = len(numbers)
    radii = np.empty(n)
    largest = 0.0
    for i in range(n):
        radii[i] = covalent[numbers[i]] * scale
        largest = max(largest, radii[i])
    reach = 2 * largest + BOND_SLACK
    points, frac, spacings, problem, candidates = wrap_into(lattice, positions, reach)
    text = np.empty(512, np.uint8)
    if problem:
        return text[:0].copy(), problem, spacings, candidates, reach
    # Neighbours of an atom, found when first asked for: only binding atoms and what they bind to are
    rows = np.empty((n, n), np.int64)
    counts = np.full(n, -1)
    end = 0
    for i in range(n):
        if tags[i] != ADSORBATE:
            continue
        _row(lattice, points, frac, spacings, radii, i, rows, counts)
        anchors = 0
        for k in range(counts[i]):
            anchors += tags[rows[i, k]] != ADSORBATE
        if anchors == 0:
            continue
        # `[X n1 site [n1]]` is the least that makes sense of a bundle
        start = end
        text = _room(text, end + 16)
        text[end] = _OPEN
        end = _put(text, end + 1, words, lengths, numbers[i])
        fits = True
        for k in range(counts[i]):
            j = rows[i, k]
            if tags[j] != ADSORBATE:
                text = _room(text, end + 16)
                text[end] = _SPACE
                end = _put(text, end + 1, words, lengths, numbers[j])
        text = _room(text, end + 16)
        end = _put(text, end, words, lengths, _N_SYMBOLS + min(anchors, 3) - 1)
        if cap >= 0 and end + 1 > cap:
            end = start
            break
        for k in range(counts[i]):
            j = rows[i, k]
            if tags[j] == ADSORBATE:
                continue
            _row(lattice, points, frac, spacings, radii, j, rows, counts)
            text = _room(text, end + 16)
            # ` [Pd` and the brackets that close it and the bundle
            if cap >= 0 and end + 2 + lengths[numbers[j]] + 2 > cap:
                fits = False
                break
            text[end], text[end + 1] = _SPACE, _OPEN
            end = _put(text, end + 2, words, lengths, numbers[j])
            for m in range(counts[j]):
                text = _room(text, end + 16)
                if cap >= 0 and end + 1 + lengths[numbers[rows[j, m]]] + 2 > cap:
                    fits = False
                    break
                text[end] = _SPACE
                end = _put(text, end + 1, words, lengths, numbers[rows[j, m]])
            text[end] = _CLOSE
            end += 1
            if not fits:
                break
        text = _room(text, end + 16)
        text[end] = _CLOSE
        end += 1
        if not fits:
            break
    return text[:end].copy(), 0, spacings, candidates, reach


@njit(cache=True, nogil=True)
def _row(lattice, points, frac, spacings, radii, i, rows, counts):
    """Fill in the neighbours of atom i, in index order, unless that was done."""
    if counts[i] >= 0:
        return
    found = 0
    for j in range(len(radii)):
        if any_image_within(lattice, points, frac, spacings, i, j, radii[i] + radii[j] + BOND_SLACK):
            rows[i, found] = j
            found += 1
    counts[i] = found


@njit(cache=True, nogil=True)
def _room(text, size):
    if size <= len(text):
        return text
    larger = np.empty(max(size, 2 * len(text)), np.uint8)
    larger[: len(text)] = text
    return larger


@njit(cache=True, nogil=True)
def _put(text, end, words, lengths, word):
    for k in range(lengths[word]):
        text[end + k] = words[word, k]
    return end + lengths[word]
