"""The engine's numbers beside Python's `float`, with both ways to read them: from_chars,
and strtod where the C++ library lacks it."""

import math
import os
import random
import shutil
import struct
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAIN = r"""
#include <clocale>
#include <cstdio>
#include <iostream>
#include <string>
#include "number.h"
int main() {
    std::setlocale(LC_NUMERIC, "");
    for (std::string line; std::getline(std::cin, line);) {
        double value = 0;
        const bool read = catmllm::cif::python_float(line, value);
        std::setlocale(LC_NUMERIC, "C");
        read ? std::printf("%a\n", value) : std::printf("no\n");
        std::setlocale(LC_NUMERIC, "");
    }
}
"""


def numbers() -> list[str]:
    """Right and wrong numbers; doubles of every size, shortest and longer than they need to be."""
    chance = random.Random(1)
    found = ["0", "-0.0", "1e400", "-1e400", "1e-400", "4.9e-324", "2.4e-324", "1.7976931348623159e308",
             "inf", "-Infinity"]  # fmt: skip
    found += [
        "nan",
        "",
        ".",
        "-",
        "1_0",
        "1__0",
        "_1",
        "1e",
        "1e+",
        "0x10",
        "1.5.2",
        "1,5",
        "٣",
        "1 2",
        "+7",
        "++7",
        "1e+05",
    ]
    found += ["0." + "0" * 400 + "1e401", "1" + "0" * 400 + "e-400", "9" * 800, "0" * 100 + "5"]
    for _ in range(3000):
        value = struct.unpack("d", chance.randbytes(8))[0]
        found += [repr(value), f"{value:.30e}", f"{chance.uniform(-999, 999):.{chance.randrange(20)}f}"]
    return found


@pytest.mark.parametrize("flags", [[], ["-DCATMLLM_STRTOD"]])
def test_numbers_are_those_of_python(flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "main.cpp").write_text(MAIN)
    compiler = os.environ.get("CXX") or shutil.which("c++") or sysconfig.get_config_var("CXX").split()[0]
    sources = [str(tmp_path / "main.cpp"), str(ROOT / "csrc" / "cif" / "number.cpp")]
    include = ["-I", str(ROOT / "csrc" / "cif")]
    subprocess.run(
        [compiler, "-std=c++17", "-O1", *flags, *include, *sources, "-o", str(tmp_path / "read")], check=True
    )
    texts = numbers()
    lines = "".join(text + "\n" for text in texts)
    run = subprocess.run([tmp_path / "read"], input=lines, capture_output=True, text=True, check=True)
    for text, answer in zip(texts, run.stdout.split(), strict=True):
        try:
            expected: float | None = float(text) if text.isascii() else None
        except ValueError:
            expected = None
        found = None if answer == "no" else float("nan") if "nan" in answer else float.fromhex(answer)
        same = found == expected or (
            expected is not None and found is not None and math.isnan(found) and math.isnan(expected)
        )
        assert same, (text, answer)
        assert found != 0 or math.copysign(1, found) == math.copysign(1, float(text)), text
