# cython: language_level=3, boundscheck=False, wraparound=False, freethreading_compatible=True
# distutils: language=c++
"""Python's door to the C++ engine in csrc: batches of texts in, arrays out, the GIL released in between."""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.unicode cimport PyUnicode_DATA, PyUnicode_GET_LENGTH, PyUnicode_KIND
from libc.stddef cimport size_t
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t
from libc.string cimport memcpy
from libcpp cimport bool as cbool
from libcpp.string_view cimport string_view
from libcpp.vector cimport vector

import numpy as np


cdef extern from "Python.h":
    int PyUnicode_IS_ASCII(object)


cdef extern from "../csrc/cif/reasons.h" namespace "catmllm::cif":
    cdef enum class Reason(uint8_t):
        pass
    struct ReasonText:
        const char *code
        const char *sentence
        const char *example
    const ReasonText[] kReasons
    const size_t kReasonCount


cdef extern from "../csrc/cif/scan.h" namespace "catmllm::cif":
    const char* scan_level()


cdef extern from "../csrc/geometry/lattice.h" namespace "catmllm::geometry":
    struct Lattice:
        double rows[9]
    double c_shortest_vector "catmllm::geometry::shortest_vector"(const Lattice&) nogil


cdef extern from "../csrc/geometry/min_distance.h" namespace "catmllm::geometry":
    cdef cppclass DistanceScratch:
        pass
    double c_min_distance "catmllm::geometry::min_distance"(const Lattice&, const double*, size_t, DistanceScratch&) nogil


cdef extern from "../csrc/pvcp/score.h" namespace "catmllm::pvcp":
    struct Weights:
        double comp, parse, valid, phys
    struct Thresholds:
        double close, near, volume_min, volume_max, max_sites, coord_min, coord_max
        double density_min, density_max, volume_per_atom_min, volume_per_atom_max
        cbool own_images
    cdef cppclass Target:
        vector[TargetEntry] entries
    cdef cppclass TargetEntry "catmllm::pvcp::Target::Entry":
        int number
        double amount
    enum:
        kScoreColumns "catmllm::pvcp::kScoreColumns"


cdef extern from "../csrc/pvcp/extract.h" namespace "catmllm::pvcp":
    cdef cppclass Span:
        size_t first
        size_t second
    size_t kCharacter


cdef extern from "../csrc/cif/structure.h" namespace "catmllm::cif":
    struct Count:
        string_view symbol
        int number
        double amount
    cdef cppclass Structure:
        Lattice lattice
        vector[double] frac
        vector[int32_t] numbers
        vector[Count] counts


cdef extern from "../csrc/pvcp/batch.h" namespace "catmllm::pvcp":
    cdef cppclass TextRef:
        const void* data
        size_t size
        int unit
        cbool ascii
        uint32_t target
    cdef cppclass TextOut:
        Reason reason
        uint8_t fields
    cdef cppclass Reader:
        Reason read(const TextRef&, cbool) except +
        const Structure& structure()
        const vector[Span]& parts()
    Reader& reader_of_this_thread() except +
    void forget_giant(const TextRef&)
    cdef cppclass Batch:
        vector[TextRef] texts
        vector[Target] targets
        Weights weights
        Thresholds thresholds
        cbool extract
        vector[TextOut] out
        void run(double*, unsigned) except + nogil
    cdef cppclass Profile:
        double extract
        double tokenise
        double symmetry
        double parse
        double distance
        double score
        uint32_t n_sites
    Profile c_profile "catmllm::pvcp::profile"(const TextRef&, int) except + nogil


cdef extern from "../csrc/pvcp/turns.h" namespace "catmllm::pvcp":
    cbool c_may_hold_turns "catmllm::pvcp::may_hold_turns"(const TextRef&)


SCORE_COLUMNS = (
    "total", "comp", "parse", "valid", "phys", "n_sites", "volume", "density", "min_distance",
    "missing", "extra", "count_error", "volume_penalty", "sites_penalty", "coord_penalty",
    "density_penalty", "distance_penalty", "volume_per_atom_penalty", "bad_coords",
)
assert len(SCORE_COLUMNS) == kScoreColumns
# By code: what it means, and an example. _CODES: by the engine's number, None for a text that parses.
REASONS = {
    (<bytes>kReasons[i].code).decode(): ((<bytes>kReasons[i].sentence).decode(), (<bytes>kReasons[i].example).decode())
    for i in range(1, kReasonCount)
}
_CODES = (None, *REASONS)


cdef void* _numbers(object array) except NULL:
    """Where the numbers of a contiguous array are; they stay there as long as it lives. (A typed memoryview for each
    would be 25,000 lines of C++.)"""
    cdef Py_buffer view
    PyObject_GetBuffer(array, &view, PyBUF_SIMPLE)
    cdef void* first = view.buf
    PyBuffer_Release(&view)
    return first


cdef TextRef _reference(str text):
    cdef TextRef ref
    ref.data = PyUnicode_DATA(text)
    ref.size = <size_t>PyUnicode_GET_LENGTH(text)
    ref.unit = PyUnicode_KIND(text)
    ref.ascii = PyUnicode_IS_ASCII(text)
    ref.target = 0
    return ref


def extract_cif(str text not None):
    """See rewards_fast.extract_cif."""
    cdef TextRef ref = _reference(text)
    cdef Reader* reader = &reader_of_this_thread()
    reader.read(ref, True)
    pieces = []
    cdef size_t i
    for i in range(reader.parts().size()):
        first, second = reader.parts()[i].first, reader.parts()[i].second
        pieces.append(chr(second) if first == kCharacter else text[first:second])
    found = "".join(pieces)
    forget_giant(ref)
    return found


def may_hold_turns(str text not None):
    """False where nothing in the text is a mark of a turn or a tag of a tool, as conversation.py knows them."""
    return c_may_hold_turns(_reference(text))


def parse(str text not None, cbool extract):
    """(None, (lattice [3, 3], frac [N, 3], numbers [N], counts by symbol or number)), or (reason, None)."""
    cdef TextRef ref = _reference(text)
    cdef Reader* reader = &reader_of_this_thread()
    cdef Reason reason = reader.read(ref, extract)
    if <uint8_t>reason:
        forget_giant(ref)
        return _CODES[<uint8_t>reason], None
    cdef const Structure* structure = &reader.structure()
    cdef size_t n = structure.numbers.size()
    lattice, frac, numbers = np.empty((3, 3)), np.empty((n, 3)), np.empty(n, dtype=np.int64)
    memcpy(_numbers(lattice), structure.lattice.rows, 72)
    memcpy(_numbers(frac), structure.frac.data(), 24 * n)
    cdef int64_t* number = <int64_t*>_numbers(numbers)
    cdef size_t i
    for i in range(n):
        number[i] = structure.numbers[i]
    counts = {}
    for i in range(structure.counts.size()):
        if structure.counts[i].number:
            counts[structure.counts[i].number] = structure.counts[i].amount
        else:
            symbol = structure.counts[i].symbol.data()[: structure.counts[i].symbol.size()]
            counts[symbol.decode("ascii", "replace")] = structure.counts[i].amount
    forget_giant(ref)
    return None, (lattice, frac, numbers, counts)


def score(list texts, list targets, list target_of_text, tuple weights, tuple thresholds, unsigned threads, cbool extract):
    """Scores a batch. targets: sequences of (atomic number, count); target_of_text: an index into them for each text,
    empty where the first is everyone's.

    Returns rows float64 [n, len(SCORE_COLUMNS)], reasons [n], field bits uint8 [n].
    """
    cdef Batch batch
    cdef Py_ssize_t i, n = len(texts)
    cdef bint same = not target_of_text
    cdef Target target
    cdef TargetEntry entry
    cdef TextRef ref
    for wanted in targets:
        target.entries.clear()
        for number, amount in wanted:
            entry.number = number
            entry.amount = amount
            target.entries.push_back(entry)
        batch.targets.push_back(target)
    w, t = &batch.weights, &batch.thresholds
    w.comp, w.parse, w.valid, w.phys = weights
    (t.close, t.near, t.volume_min, t.volume_max, t.max_sites, t.coord_min, t.coord_max,
     t.density_min, t.density_max, t.volume_per_atom_min, t.volume_per_atom_max, t.own_images) = thresholds
    batch.extract = extract
    batch.texts.reserve(n)
    for i in range(n):
        text = texts[i]
        if not isinstance(text, str):
            raise TypeError(f"a text is a str, not {type(text).__name__}")
        ref = _reference(<str>text)
        if not same:
            ref.target = target_of_text[i]
        batch.texts.push_back(ref)
    rows = np.empty((n, kScoreColumns))
    cdef double* first = <double*>_numbers(rows)
    with nogil:
        batch.run(first, threads)
    fields = np.empty(n, dtype=np.uint8)
    cdef uint8_t* bits = <uint8_t*>_numbers(fields)
    reasons = [None] * n
    for i in range(n):
        bits[i] = batch.out[i].fields
        if <uint8_t>batch.out[i].reason:
            reasons[i] = _CODES[<uint8_t>batch.out[i].reason]
    return rows, reasons, fields


def min_distance(lattice, frac):
    """See rewards_fast.min_distance; float64 C-contiguous [3, 3] and [N, 3]."""
    cdef Lattice cell
    cdef DistanceScratch scratch
    cdef double d
    cdef size_t n = len(frac)
    memcpy(cell.rows, _numbers(lattice), 72)
    cdef const double* first = <const double*>_numbers(frac)
    with nogil:
        d = c_min_distance(cell, first, n, scratch)
    return d


def shortest_vector(lattice):
    """See rewards_fast.pvcp.shortest_vector; float64 C-contiguous [3, 3]."""
    cdef Lattice cell
    memcpy(cell.rows, _numbers(lattice), 72)
    return c_shortest_vector(cell)


def profile(str text not None, int repeats):
    """Least seconds of each stage for one text: extract, tokenise, symmetry, parse (the two before included), distance, score;
    and its sites."""
    cdef TextRef ref = _reference(text)
    cdef Profile p
    with nogil:
        p = c_profile(ref, repeats)
    return {"extract": p.extract, "tokenise": p.tokenise, "symmetry": p.symmetry, "parse": p.parse, "distance": p.distance,
            "score": p.score, "sites": p.n_sites}


def instruction_set():
    """The vector unit that the text scan uses on this machine."""
    return (<bytes>scan_level()).decode()
