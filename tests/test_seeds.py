"""Streams of random numbers: none shares its numbers with another, and nothing draws past the table."""

from __future__ import annotations

import ast
import itertools
import re
from pathlib import Path

from catmllm.seeds import Stream, generator, hash_seed

ROOT = Path(__file__).parents[1]
# Commands with a seed of their own, whose files hold what it made; made-up systems and numbers of a plan.
APART = {
    "data/make.py",
    "data/fcc_slabs.py",
    "report/dataset.py",
    "plan/balance.py",
    "plan/made_up.py",
    "plan/trace.py",
    "seeds.py",
}


def test_no_two_keys_draw_the_same() -> None:
    """NumPy fills short seeds with zeros, so that places of unequal lengths are the ones to watch."""
    places = [(), (0,), (1,), (7,), (0, 0), (7, 0), (0, 7), (1, 2), (0, 0, 0), (1, 2, 3)]
    combined = itertools.product(Stream, (0, 1, 2, 7, -1), places)
    keys = [stream.key(seed, *place) for stream, seed, place in combined]
    assert len(set(keys)) == len(keys) == len(Stream) * 5 * len(places)
    assert len({hash_seed(k) for k in keys}) == len(keys)
    assert len({generator(k).integers(2**63) for k in keys}) == len(keys)


def test_a_key_draws_the_same_again() -> None:
    k = Stream.JOINT_SAMPLES.key(3, 17)
    assert generator(k).random(4).tolist() == generator(list(k)).random(4).tolist()
    assert hash_seed(k) == hash_seed(list(k)) < 2**63


def test_every_stream_has_one_file_that_draws_from_it() -> None:
    users: dict[str, set[str]] = {}
    for path in (ROOT / "catmllm").rglob("*.py"):
        for name in re.findall(r"\bStream\.([A-Z_]+)", path.read_text()):
            users.setdefault(name, set()).add(path.name)
    assert users.keys() == {stream.name for stream in Stream}
    assert all(len(files) == 1 for files in users.values()), users


def test_nothing_draws_past_the_table() -> None:
    """No generator of a run is made but by `generator`, no seed of torch's set but by `hash_seed`."""
    wrong = []
    for path in sorted((ROOT / "catmllm").rglob("*.py")):
        if path.relative_to(ROOT / "catmllm").as_posix() in APART:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            seeded = (
                node.args
                and isinstance(node.args[0], ast.Call)
                and ast.unparse(node.args[0].func) == "hash_seed"
            )
            if node.func.attr == "default_rng" or (node.func.attr == "manual_seed" and not seeded):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)}")
    assert not wrong
