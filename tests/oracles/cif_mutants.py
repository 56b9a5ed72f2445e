"""Breaks CIF texts the way models and people do, knowing the grammar: numbers, headers, loops, quotes,
Unicode, symmetry, cells, species, prose, and truncation at every kind of place. Deterministic for a seed.
"""
# ruff: noqa: SIM905  (word lists read better unquoted)

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence

NUMBERS = (
    "0 1 -1 0.5 0.3333 0.6667 0.33333 1.3333 -0.3333 .5 5. 1e-3 1E2 1e400 -1e400 0e-400 nan inf -inf "
    "Infinity 1_0.5 _1 0.2(3) 0.2(3)e5 0.5(3 4.( (5) . ? - + +.5 --1 0x10 1,5 0.10001 0.0001 0.00011 0.9999 "
    "0.99995 1.0 2.0 -0.1 -0.11 1.1 1.10001 90.000 120 60 180 181 0.0 1e-6 1e9 123456789.123456789 "
    "0.1234567890123456789012345 00012.5 1.2.3 ½ −0.5 0,5 1e 1e+ e5 1__0 1_ nan(3) 0.25Å 1e12 3.9E+00 "
    "0.66670(10) '' '0.5' \" 0.5\" 1/2 0.5; infinity NaN 1e-5"
).split(" ")
CELLS = (
    "0 1e-3 0.01 0.011 1 3.9 25 1e5 1e7 1e4 -4 -90 200 359 0.009 1e-30 nan inf ? 89.9999 90 179.99 60 120 30 "
    "5"
).split()
SYMBOLS = (
    "Pt pt PT P Pt1 Pt2+ Fe3+ O2- D T D1 H1 HO1 CO CU2 Foo Uue Du Va X Xx Q J M R L E A G Z Xa3+ Hw Ow Wat "
    "wat OH OH2 NO3 O-H O-H1 ? . 1 - x1 *Na Na* (Na) Na+ W w wX wa nA Cl Cl1- LI li Si4+ 0+ H+ H- Tc Te Es "
    "Zz Jj '' \"Pt 1\" Nb,Zr '0.8Nb + 0.2Zr' 'Nb + Zr' '0.5Pt(2) + 0.5Cu' '.5Fe + .5<sup>Ni' 'a + b' Ø Ptα "
    "_Pt loop_ ;Pt #Pt"
).split(" ")
OPERATIONS = (
    "x,y,z|x, y, z|-x,-y,-z|-x,-y,z|y,x,z|x+1/2,y,z|x,y+1/2,z+1/2|1/2+x,1/2-y,-z|-y,x-y,z|x-y,-y,1/3-z|z,x,y|"
    "X,Y,Z|x,y|x|foo|x,y,z,1|x,y,z,t|x,y,z,x|2*x,y,z|2x,y,z|x/2,y,z|1/2x,y,z|x+1/0,y,z|x+1..2,y,z|x+.,y,z|"
    "x+0.5,y+.25,z|-2y+1/2,3x+1/2,z-y|x+12y,y,z|x+y,y,z|1/2,1/2,1/2|0,0,0|x;y;z|x y z|+x,+y,+z|x,-y+3/4,z|"
    "-x+2/3,y,z+1/3|x+1,y-1,z+2|x,y,z+1/2/3|--x,y,z|xx,yy,zz|x,y,z+1e3|x,  y ,z|x\ty,z|/2x,y,z|x,y,z,"
).split("|")
NAMES = (
    "P1|P 1|P-1|P m m m|F m -3 m|Fm-3m|F_m_-_3_m|Pm-3m|P6_3/mmc|P 63/m m c|R-3m|R-3m:H|R-3m:R|R -3 m|I4/mmm|"
    "P21/c|P 1 21/c 1|P2_1/c|C2/c|Fd-3m|Fd-3mS|F d -3 m :1|Ia-3d|p1|pm-3m|Pnma|Pbnm|Cmcm|C m c 21|foo|?|.|"
    "225|P63/mmc|I41/amd:2|A 1 2 1|Pmn2_1|''"
).split("|")
HEADERS = (
    "data_|data_x|DATA_x|Data_y| data_z|\tdata_|data_x powder_pattern|data_"
    + "a" * 80
    + "|\ufeffdata_x|xdata_|# data_c|;data_s|'data_q'|data_é|\xa0data_n"
).split("|")
WORDS = (
    "_eof|loop_|_|data_|save_|stop_|global_|#|;|'|\"|''|\"\"|_x|_x y|Here is the CIF:|```|```cif|<think>|"
    "</s>|\\|,|\x00|\x0b|\x0c|\x1c|\x1f|\r|\x85|\u2028|\xa0|\u2009|\u2212|é|\ud800|\U0001f600|\n|\n\n|\r\n|"
    ";\n|\n;|\n;\n|\n; text\n;|'a b'|\"c 'd\"|it's|'un closed|#\n|x#y| #z"
).split("|")
KEYS = (
    "_cell_length_a|_cell_length_b|_cell_length_c|_cell_angle_alpha|_cell_angle_beta|_cell_angle_gamma|"
    "_symmetry_cell_setting|_space_group_crystal_system|_symmetry_equiv_pos_as_xyz|"
    "_symmetry_equiv_pos_as_xyz_|_space_group_symop_operation_xyz|_space_group_symop_operation_xyz_|"
    "_symmetry_space_group_name_H-M|_symmetry_space_group_name_H_M|_space_group_name_Hall|"
    "_space_group_name_H-M_alt|_symmetry_space_group_name_h-m|_space_group_IT_number|_space_group_IT_number_|"
    "_symmetry_Int_Tables_number|_atom_site_label|_atom_site_type_symbol|_atom_site_fract_x|"
    "_atom_site_fract_y|_atom_site_fract_z|_atom_site_occupancy|_atom_site_attached_hydrogens|"
    "_atom_type_symbol|_atom_type_oxidation_number|_atom_site_moment_label|_atom_site_moment_crystalaxis_x|"
    "_atom_site_u_iso|_chemical_formula_sum|_Cell_length_a|_x"
).split("|")
SETTINGS = (
    "cubic tetragonal orthorhombic monoclinic hexagonal rhombohedral Cubic triclinic trigonal volume "
    "from_dict copy ? '' matrix abc"
).split()

NUMBER = re.compile(r"(?<![\w.+-])[-+]?\d+\.?\d*(?:\(\d+\))?(?![\w.])")
SITE_ROW = re.compile(r"^[ \t]*[A-Z][a-z]?\d*[+-]?[ \t]+\S+[ \t]+.*\d+\.\d+.*$", re.MULTILINE)

Change = Callable[[str, random.Random], str]


def _span(text: str, r: random.Random, pattern: re.Pattern[str]) -> tuple[int, int] | None:
    found = [m.span() for m in pattern.finditer(text)]
    return r.choice(found) if found else None


def _replace(text: str, span: tuple[int, int] | None, new: str) -> str:
    return text if span is None else text[: span[0]] + new + text[span[1] :]


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True) or [""]


def number(text: str, r: random.Random) -> str:
    """Another number, or the same one a little off."""
    span = _span(text, r, NUMBER)
    if span is None:
        return text
    new = r.choice(NUMBERS)
    if r.random() < 0.4:
        old = text[span[0] : span[1]].split("(")[0]
        value = float(old) + r.choice([1e-4, -1e-4, 9.9e-5, 1e-5, 0.001, 1, -1, 0.1, -0.2, 0.01])
        new = f"{value:.{r.choice([2, 3, 4, 5, 6, 8])}f}"
    return _replace(text, span, new)


def cell(text: str, r: random.Random) -> str:
    """Another cell parameter; now and then none, twice, or a crystal system instead."""
    keys = [m.span() for m in re.finditer(r"_cell_(?:length_[abc]|angle_\w+)[ \t]+(\S+)", text)]
    if not keys:
        return text
    span = r.choice(keys)
    name = text[span[0] : span[1]].split()[0]
    kind = r.random()
    if kind < 0.6:
        return _replace(text, span, f"{name} {r.choice(CELLS)}")
    if kind < 0.75:
        setting = (
            f"{r.choice(['_symmetry_cell_setting', '_space_group_crystal_system'])} {r.choice(SETTINGS)}\n"
        )
        return _replace(text, span, setting)
    if kind < 0.85:
        return _replace(text, span, f"{name}\n;\n{r.choice(NUMBERS)}\n;\n")
    if kind < 0.95:
        return _replace(text, span, f"loop_\n{name}\n {r.choice(CELLS)}\n")
    return _replace(text, span, "")


def symbol(text: str, r: random.Random) -> str:
    """Another species in a site row (symbol or label) or in any word that looks like one."""
    span = _span(text, r, re.compile(r"(?<=\s)[A-Z][a-z]?\d*[+-]?(?=\s)"))
    return _replace(text, span, r.choice(SYMBOLS))


def rows(text: str, r: random.Random) -> str:
    """Site rows doubled, dropped, swapped, moved, cut short or lengthened."""
    found = [m.span() for m in SITE_ROW.finditer(text)]
    if not found:
        return text
    span = r.choice(found)
    row = text[span[0] : span[1]]
    words = row.split()
    kind = r.randrange(8)
    if kind == 0:
        return _replace(text, span, row + "\n" + row)
    if kind == 1:
        return _replace(text, span, "")
    if kind == 2:
        return _replace(text, span, " ".join(words[:-1]))
    if kind == 3:
        return _replace(text, span, row + " " + r.choice(NUMBERS))
    if kind == 4:
        r.shuffle(words)
        return _replace(text, span, " ".join(words))
    if kind == 5:
        words[-1] = r.choice(["0.5", "0.25", "0", "?", ".", "1.5", "-1", "1e-6", "0.5000001", "nan"])
        return _replace(text, span, " ".join(words) + "\n" + " ".join([r.choice(SYMBOLS), *words[1:]]))
    if kind == 6:
        keep = r.randrange(1, 4)
        start, end = found[min(keep, len(found) - 1)][0], found[-1][1]
        return text[:start] + text[end:]
    return _replace(
        text, span, row.replace(" ", r.choice(["\n", "\t", "  ", "\x0b", "\r", "\x1f", "\xa0"]), 1)
    )


def occupancy(text: str, r: random.Random) -> str:
    """Changes the last number of a site row."""
    found = [m.span() for m in SITE_ROW.finditer(text)]
    if not found:
        return text
    span = r.choice(found)
    words = text[span[0] : span[1]].split()
    words[-1] = r.choice(NUMBERS + ["0.5", "0.3", "0.1", "0.7", "0.2"])
    return _replace(text, span, "  ".join(words))


def symmetry(text: str, r: random.Random) -> str:
    """Other operations, names or numbers of the space group, quoted or not."""
    spans = [m.span() for m in re.finditer(r"'[^'\n]*x[^'\n]*'|\"[^\"\n]*x[^\"\n]*\"|(?<=\s)-?x,\S+", text)]
    kind = r.random()
    operation = r.choice(OPERATIONS)
    quoted = r.choice([f"'{operation}'", f'"{operation}"', operation, f"'{operation}"])
    if spans and kind < 0.4:
        return _replace(text, r.choice(spans), quoted)
    if spans and kind < 0.55:
        span = r.choice(spans)
        prefix = re.search(r"\n(\s*\d+\s+)$", text[: span[0]])
        return _replace(
            text, span, text[span[0] : span[1]] + "\n" + (prefix.group(1) if prefix else "") + quoted
        )
    if kind < 0.75:
        key = r.choice(KEYS[10:20])
        value = (
            r.choice(NAMES)
            if "name" in key
            else r.choice(
                ["1", "2", "225", "166", "230", "231", "0", "-1", "62.0", "1e400", "nan", "?", "14(2)"]
            )
        )
        value = f"'{value}'" if " " in value or r.random() < 0.5 else value
        without = re.sub(
            r"^\s*loop_\s+(?:_sym\S+\s+|_space_group_symop\S+\s+)+(?:(?:\d+\s+)?['\"].*['\"]\s*\n)+",
            "",
            text,
            flags=re.M,
        )
        return re.sub(
            r"(?=^\s*_cell_length_a)",
            f"{key} {value}\n",
            without if r.random() < 0.7 else text,
            count=1,
            flags=re.M,
        )
    loop = (
        "loop_\n"
        + r.choice(KEYS[8:12])
        + "\n"
        + "".join(f"'{r.choice(OPERATIONS)}'\n" for _ in range(r.randrange(1, 5)))
    )
    without = re.sub(r"_symmetry_equiv_pos_as_xyz|_space_group_symop_operation_xyz", "_was", text)
    return re.sub(
        r"(?=^\s*_cell_length_a)", lambda _: loop, without if r.random() < 0.5 else text, count=1, flags=re.M
    )


def header(text: str, r: random.Random) -> str:
    """Other block headers, more blocks, text in front."""
    kind = r.random()
    new = r.choice(HEADERS)
    if kind < 0.4:
        return re.sub(r"^\s*data_\S*", lambda _: new, text, count=1, flags=re.M)
    if kind < 0.6:
        return r.choice(["", "junk\n", "Sure!\n", "x ", "\n\n", "# c\n", "\ufeff"]) + text
    lines = _lines(text)
    lines.insert(r.randrange(len(lines) + 1), new + r.choice(["\n", " ", "\n\n"]))
    return "".join(lines)


def two_blocks(text: str, r: random.Random) -> str:
    """The same block again, under this or another name, whole or damaged."""
    other = number(text, r) if r.random() < 0.5 else text[: r.randrange(len(text) + 1)]
    if r.random() < 0.5:
        other = re.sub(r"data_\S*", "data_other", other, count=1)
    return text + "\n" + other if r.random() < 0.5 else other + "\n" + text


def word(text: str, r: random.Random) -> str:
    """A troublesome word or character somewhere."""
    at = r.randrange(len(text) + 1)
    if r.random() < 0.6:
        spots = [m.start() for m in re.finditer(r"\s", text)]
        at = r.choice(spots) if spots else at
    return text[:at] + r.choice(["", " ", "\n"]) + r.choice(WORDS) + r.choice(["", " ", "\n"]) + text[at:]


def prose(text: str, r: random.Random) -> str:
    """Sentences before, after or inside."""
    sentence = r.choice(
        [
            "Here is the CIF.",
            "The structure has Pt atoms.",
            "I hope this helps!",
            "**Note:** a b c",
            "- item 1",
            "1. x 2. y",
        ]
    )
    lines = _lines(text)
    lines.insert(r.choice([0, len(lines), r.randrange(len(lines) + 1)]), sentence + "\n")
    return "".join(lines)


def truncated(text: str, r: random.Random) -> str:
    """Cut at a character, a word, a line, or at the end of a key."""
    kind = r.random()
    if kind < 0.4:
        return text[: r.randrange(len(text) + 1)]
    pattern = re.compile(r"\n" if kind < 0.7 else r"\s+" if kind < 0.9 else r"_\w+")
    spots = [m.end() for m in pattern.finditer(text)]
    return text[: r.choice(spots)] if spots else text


def key(text: str, r: random.Random) -> str:
    """A key renamed, repeated, dropped, or given elsewhere with another value."""
    found = [m.span() for m in re.finditer(r"(?<!\S)_[A-Za-z]\S*", text)]
    if not found:
        return text
    span = r.choice(found)
    kind = r.random()
    old = text[span[0] : span[1]]
    if kind < 0.35:
        return _replace(text, span, r.choice(KEYS))
    if kind < 0.5:
        return _replace(
            text, span, old.upper() if r.random() < 0.3 else old + r.choice(["_", "x", ".", "(1)"])
        )
    if kind < 0.65:
        return _replace(text, span, "")
    if kind < 0.8:
        return _replace(text, span, old + r.choice(["\n", " "]) + r.choice([old, *KEYS]))
    lines = _lines(text)
    lines.insert(r.randrange(len(lines) + 1), f"{r.choice(KEYS)} {r.choice(NUMBERS + SYMBOLS)}\n")
    return "".join(lines)


def loop(text: str, r: random.Random) -> str:
    """Loop words misspelt, doubled or dropped; columns added; oxidation, hydrogen and empty loops."""
    kind = r.randrange(7)
    spots = [m.span() for m in re.finditer(r"loop_", text)]
    if kind == 0 and spots:
        return _replace(
            text,
            r.choice(spots),
            r.choice(["loop", "Loop_", "LOOP_", "loop_loop_", "loop_ loop_", "loop_x", "loop _", ""]),
        )
    if kind == 1 and spots:
        return _replace(text, r.choice(spots), "loop_\n_extra")
    lines = _lines(text)
    extra = r.choice(
        [
            "loop_\n_atom_type_symbol\n_atom_type_oxidation_number\nPt2+ 2\nO2- -2\nNa+ 1\nFe 0\n",
            "loop_\n_atom_type_symbol\n_atom_type_oxidation_number\nPt ?\n",
            "loop_\n_atom_type_symbol\nPt\n",
            "_atom_type_symbol ''\n",
            "_atom_type_symbol Pt\n_atom_type_oxidation_number 2\n",
            "_atom_type_symbol Pt\n_atom_type_oxidation_number 24\n",
            "loop_\n_atom_site_attached_hydrogens\n0\n2\n",
            "loop_\n_atom_site_attached_hydrogens\n?\n",
            "loop_\n_empty\n",
            "loop_\n1 2 3\n",
            "loop_\n_a\n_b\n1 2 3\n",
            "loop_\n_a\n_a\n1 2 3 4\n",
            "loop_\n_q\n'_v'\n\"loop_\"\n",
        ]
    )
    position = r.randrange(len(lines) + 1)
    return "".join(lines[:position]) + extra + "".join(lines[position:])


def quoting(text: str, r: random.Random) -> str:
    """Quotes around words, lost quotes, text fields, comments."""
    words = [m.span() for m in re.finditer(r"\S+", text)]
    if not words:
        return text
    span = r.choice(words)
    old = text[span[0] : span[1]]
    form = r.choice(
        [
            "'{}'",
            '"{}"',
            "'{}",
            "{}'",
            '"{}',
            "\n;{}\n;\n",
            "\n;\n{}\n;",
            "{} # c",
            "#{}",
            "''{}''",
            "' {} '",
            "\n; {}\n\n x\n; y\n",
            ";{};",
        ]
    )
    return _replace(text, span, form.format(old))


def whitespace(text: str, r: random.Random) -> str:
    """Other line ends, blank lines, indents, joined lines."""
    kind = r.randrange(7)
    if kind == 0:
        return text.replace("\n", r.choice(["\r\n", "\r", "\x0c\n", " \n", "\n\n", "\u2028", "\n \t\n"]))
    if kind == 1:
        return text.replace("\n", "\n ")
    if kind == 2:
        return text.replace(" ", r.choice(["\t", "  ", "\xa0", "\u3000", "\x1f"]))
    lines = _lines(text)
    i = r.randrange(len(lines))
    if kind == 3:
        lines[i] = lines[i].rstrip("\n") + " "
    elif kind == 4:
        lines.insert(i, r.choice(["\n", " \n", "\u2009\n", "\x0b", "\r\n", "é\n"]))
    elif kind == 5:
        lines[i] = lines[i].strip() + r.choice(["\r", "\x85", "\x1d", "\x0c"])
    else:
        j = r.randrange(len(lines))
        lines[i], lines[j] = lines[j], lines[i]
    return "".join(lines)


def character(text: str, r: random.Random) -> str:
    """One character changed, lost or doubled."""
    if not text:
        return text
    at = r.randrange(len(text))
    new = r.choice(["", text[at] * 2, chr(r.randrange(1, 127)), r.choice("éÅ−½\xa0\u200b\x00")])
    return text[:at] + new + text[at + 1 :]


CHANGES: tuple[Change, ...] = (
    number, number, number, cell, cell, symbol, symbol, rows, rows, occupancy, symmetry, symmetry, symmetry,
    header, two_blocks, word, word, prose, truncated, key, key, loop, quoting, quoting, whitespace, character,
    character,
)  # fmt: skip


def shrunk(text: str, r: random.Random, most: int = 6) -> str:
    """At most a few of the site rows: the rules are the same and pymatgen is quicker."""
    found = [m.span() for m in SITE_ROW.finditer(text)]
    if len(found) <= most:
        return text
    keep = r.randrange(1, most + 1)
    return text[: found[keep][0]] + text[found[-1][1] :].lstrip("\n")


def mutants(originals: Sequence[str], n: int, seed: int = 0) -> Iterator[str]:
    """n broken texts; four in five come from originals cut down to a few site rows."""
    r = random.Random(seed)
    short = [text for text in originals if len(text) < 6000]
    for _ in range(n):
        text = r.choice(short)
        if r.random() < 0.8:
            text = shrunk(text, r)
        for _ in range(r.choice([1, 1, 1, 2, 2, 3, 5])):
            text = r.choice(CHANGES)(text, r)
        yield text


# Kinds of their own, each a text made from nothing and broken now and then:
# what the general changes seldom hit.

TRIGONAL = ("x,y,z", "-y,x-y,z", "y-x,-x,z", "-y,-x,z", "y-x,y,z", "x,x-y,z", "-x,-y,-z", "y,y-x,-z",
            "x-y,x,-z", "y,x,-z", "x-y,-y,-z", "-x,y-x,-z")  # fmt: skip
CENTRING = ("", "2/3 1/3 1/3", "1/3 2/3 2/3")
RHOMBOHEDRAL = (
    "R-3m R3 R-3 R3m R3c R-3c R32 R-3m:H R-3c:H R3m:H R-3m:R 'R -3 m' 'R -3 m :H' 'R -3 c' 'R 3' 166 167 148 "
    "160 155"
).split(" ")
MAGNETIC_NUMBERS = (
    "2.6 5.17 14.79 15.90 62.448 63.463 65.486 74.559 123.345 127.395 129.416 140.550 148.19 152.35 161.69 "
    "166.101 166.97 167.106 185.201 194.270 205.33 221.97 224.113 225.116 227.131 229.143 230.148 1.1 1.3 "
    "230.149 0.0 62 1.2.3 a.b"
).split()
MAGNETIC_NAMES = (
    "Pn'ma'|P4/m'b'm'|P 4/m' b' m'|R-3m|R-3m'|R-3'm|R_I-3c|Fd-3m'|P_S-1|C2/m'|I4/m'm'm'|Cmc'm'|P6_3/m'm'c|"
    "P63/m'm'c|foo|P1|P1.1'|Pnma1'|Pnma.1'|C_a2/m|P_C2_1/m|Ia-3d'|R_I3"
).split("|")
TRANSFORMS = (
    "a,b,c;0,0,0|a,b,c;0,0,0|a,b,c;0,0,0|b,c,a;0,0,0|c,a,b;1/4,0,1/2|a,-c,b;0,0,1/2|"
    "2/3a+1/3b+1/3c,-1/3a+1/3b+1/3c,-1/3a-2/3b+1/3c;0,0,0|-b+c,a+c,-a+b+c;0,0,0|a/2,b,c;0,0,0|2a,b,c;0,0,0|"
    "a+b,-a+b,c;1/8,1/8,1/8|a,b;0,0,0|a,a,c;0,0,0|a,b,c|(a+b)/2,(b-a)/2,c;0,0,0|?|-a,-b,c;0.25,0,0"
).split("|")


def _quoted(text: str) -> str:
    return f'"{text}"' if "'" in text else f"'{text}'"


def _centred(operation: str, vector: str, r: random.Random) -> str:
    """An operation with a centring vector added, in one of the spellings of programs."""
    if not vector:
        return operation
    style = r.choice(["{t}+{c}", "{c}+{t}", "{d}+{c}", "{c}+{t}"])
    parts = []
    for component, t in zip(operation.split(","), vector.split()):
        decimal = f"{int(t[0]) / int(t[2]):.{r.choice([4, 5, 6])}f}"
        joined = style.format(t=t, c=component, d=decimal)
        parts.append(joined.replace("+-", "-"))
    return ",".join(parts)


def _special(r: random.Random, digits: int) -> tuple[float, float, float]:
    """A place on or near the special positions of a trigonal cell, as written with few digits."""
    x, z = r.random(), r.choice([r.random(), 0.0, 0.5, 0.25, 1 / 3, 1 / 6, 0.125])
    kind = r.randrange(7)
    place = [(x, 2 * x, z), (x, x / 2, z), (x, -x, z), (0.0, 0.0, z), (1 / 3, 2 / 3, z), (x, 0.0, z),
             (x, r.random(), z)][kind]  # fmt: skip
    shift = r.choice([0.0, 0.0, 0.0, 1.0, -1.0])
    off = r.choice([0.0, 0.0, 10.0**-digits, 2e-4, 9e-5])
    return (round(place[0], digits), round(place[1] + shift + off, digits), round(place[2], digits))


def _cif(cell: Sequence[float], head: str, rows: Sequence[str]) -> str:
    names = ("length_a", "length_b", "length_c", "angle_alpha", "angle_beta", "angle_gamma")
    lines = ["data_m", *(f"_cell_{name} {value}" for name, value in zip(names, cell)), head.rstrip("\n")]
    lines += ["loop_", "_atom_site_type_symbol", "_atom_site_label"]
    lines += ["_atom_site_fract_x", "_atom_site_fract_y", "_atom_site_fract_z", "_atom_site_occupancy", *rows]
    return "\n".join(lines) + "\n"


def rhombohedral(r: random.Random) -> str:
    """Trigonal cells with few digits: images fall on one another to within the tolerance, or just not."""
    digits = r.choice([3, 4, 4, 4, 5])
    a, c = round(r.uniform(2.5, 9), 3), round(r.uniform(5, 32), 3)
    kind = r.random()
    if kind < 0.45:
        name = r.choice(RHOMBOHEDRAL).strip("'")
        key = (
            "_space_group_IT_number"
            if name.isdigit()
            else r.choice(["_symmetry_space_group_name_H-M", "_space_group_name_H-M_alt"])
        )
        head = f"{key} '{name}'"
    else:
        operations = r.sample(TRIGONAL, r.choice([2, 3, 6, 12])) if kind < 0.8 else list(TRIGONAL)
        vectors = CENTRING if kind < 0.9 else r.sample(CENTRING, 2)
        listed = [_centred(operation, vector, r) for vector in vectors for operation in operations]
        if r.random() < 0.3:
            r.shuffle(listed)
        head = "loop_\n_symmetry_equiv_pos_as_xyz\n" + "\n".join(f"'{operation}'" for operation in listed)
    rows = []
    for i in range(r.choice([1, 1, 2, 3])):
        x, y, z = _special(r, digits)
        rows.append(
            f"{r.choice(['O', 'Li', 'Fe', 'Bi'])} A{i} {x:.{digits}f} {y:.{digits}f} {z:.{digits}f} 1"
        )
    return _cif((a, a, c, 90, 90, 120), head, rows)


def tiny_occupancy(r: random.Random) -> str:
    """Occupancies about pymatgen's tolerance of 1e-8 among full, partial and too full ones."""
    amounts = (
        "1e-9 0.000000001 1e-8 2e-8 1.5e-8 9.99e-9 1e-300 1 1 1 1.0 0.5 0.25 5 1.00000001 1.00000002 "
        "0.99999999 0.50000001 0"
    ).split()
    symbols = "H C O Pt Fe Fe2+ Fe3+ Co Na Cl Xe He X D T Va Xx 0.5Pt Wat O-H K Og".split()
    states = r.random() < 0.25
    head = "loop_\n_symmetry_equiv_pos_as_xyz\n" + "\n".join(
        r.choice([["'x,y,z'"], ["'x,y,z'", "'-x,-y,-z'"]])
    )
    if states:
        head += (
            "\nloop_\n_atom_type_symbol\n_atom_type_oxidation_number\nFe2+ 2\nFe3+ 3\nO 0\nH 1\nNa 1\nCl -1"
        )
    places = [(round(r.random(), 3), round(r.random(), 3), round(r.random(), 3)) for _ in range(5)]
    rows = []
    for i in range(r.choice([1, 2, 3, 4, 5, 6, 8])):
        x, y, z = r.choice(places)
        rows.append(f"{r.choice(symbols)} A{i} {x} {y} {z} {r.choice(amounts)}")
    return _cif((6, 7, 8, 90, 90, 90), head, rows)


def magnetic(r: random.Random) -> str:
    """Magnetic groups by name or number, with transforms, centrings and moments."""
    lines = []
    if r.random() < 0.75:
        lines.append(f"_space_group_magn{r.choice('._')}number_BNS {r.choice(MAGNETIC_NUMBERS)}")
    if r.random() < 0.6:
        lines.append(f"_space_group_magn{r.choice('._')}name_BNS {_quoted(r.choice(MAGNETIC_NAMES))}")
    if r.random() < 0.75:
        lines.append(f"_space_group_magn{r.choice('...._')}transform_BNS_Pp_abc '{r.choice(TRANSFORMS)}'")
    if r.random() < 0.1:
        lines.append(f"_space_group_magn.transform_BNS_Pp '{r.choice(TRANSFORMS)}'")
    if r.random() < 0.15:
        listed = [
            r.choice(["x,y,z,+1", "-x,-y,-z,-1", "-x,-y,z,1", "x,y,z"]) for _ in range(r.randrange(1, 4))
        ]
        lines.append("loop_\n_space_group_symop_magn_operation.xyz\n" + "\n".join(f"'{o}'" for o in listed))
    if r.random() < 0.15:
        lines.append("loop_\n_space_group_symop_magn_centering.xyz\nx,y,z,+1\nx+1/2,y+1/2,z,-1")
    if r.random() < 0.5:
        moments = r.choice(["A0 0 0 3.0", "A0 0 0 ?", "A9 1 1 1", "A0 0 0 3.0\nA1 0.0 1.2(3) 0"])
        names = [
            f"_atom_site_moment{r.choice('._')}{end}"
            for end in ("label", "crystalaxis_x", "crystalaxis_y", "crystalaxis_z")
        ]
        lines.append("loop_\n" + "\n".join(names) + "\n" + moments)
    rows = []
    digits = r.choice([3, 4, 5])
    for i in range(r.choice([1, 1, 2, 3])):
        x, y, z = _special(r, digits)
        if r.random() < 0.4:
            x, y, z = (r.choice([0.0, 0.25, 0.5, 0.125, 0.3333]) for _ in range(3))
        rows.append(f"{r.choice(['Mn', 'O', 'Fe', 'Gd'])} A{i} {x} {y} {z} 1")
    cell = r.choice(
        [(5, 6, 7, 90, 90, 90), (5, 5, 9, 90, 90, 120), (6, 6, 6, 90, 90, 90), (5, 5, 5, 60, 60, 60)]
    )
    return _cif(cell, "\n".join(lines), rows)


def needle(r: random.Random) -> str:
    """Cells with one or two short axes, sheared and not, so that a site's own images are near."""
    short = round(r.uniform(0.05, 2.5), 3)
    axes = [short, r.choice([short, round(r.uniform(0.3, 8), 3)]), round(r.uniform(3, 300), 2)]
    r.shuffle(axes)
    angles = r.choice(
        [(90, 90, 90), (90, 90, 120), (60, 60, 60), (80.5, 95.2, 100.1), (150, 90, 90), (100, 100, 159)]
    )
    rows = [
        f"{r.choice(['Pt', 'O', 'H'])} A{i} {r.random():.4f} {r.random():.4f} {r.random():.4f} 1"
        for i in range(r.choice([1, 2, 3, 5]))
    ]
    head = r.choice(["_symmetry_space_group_name_H-M 'P 1'", "_symmetry_space_group_name_H-M 'P -1'"])
    return _cif((*axes, *angles), head, rows)


KINDS: dict[str, Callable[[random.Random], str]] = {
    "rhombohedral": rhombohedral,
    "occupancy": tiny_occupancy,
    "magnetic": magnetic,
    "needle": needle,
}


def of_kind(kind: str, n: int, seed: int = 0) -> Iterator[str]:
    """n texts of a kind, three in ten broken by one of the general changes."""
    r = random.Random(f"{kind} {seed}")
    for _ in range(n):
        text = KINDS[kind](r)
        yield r.choice(CHANGES)(text, r) if r.random() < 0.3 else text
