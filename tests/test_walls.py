"""Which part of the tree may import which (arrows go down only),
read from the sources and tried in a fresh interpreter."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Run as a file, never imported: the package catmllm/train/ has its name.
LAUNCHER = ROOT / "catmllm" / "train.py"
ROOTS = {"catmllm": ROOT, "rewards_fast": ROOT, "catmllm_kernels": ROOT / "kernels"}

# The rooms of catmllm/ in their one order: each imports from itself and from those before it alone.
ROOMS = (
    "config",
    "seeds",
    "world",
    "structure",
    "potentials",
    "data",
    "models",
    "sample",
    "design",
    "evaluate",
    "train",
    "stages",
    "report",
    "plan",
    "pipeline",
    "study",
    "cli",
)

# What may not be imported from where besides, anywhere in a file.
FORBIDDEN = {
    "rewards_fast": ("torch", "catmllm", "catmllm_kernels", "transformers", "ase"),
    "catmllm_kernels": ("catmllm", "rewards_fast", "transformers"),
    "catmllm.structure": ("torch", "catmllm.config", "catmllm.seeds", "catmllm.world"),
}


def modules() -> dict[str, Path]:
    """Every module of ours by its dotted name."""
    found = {}
    for package, root in ROOTS.items():
        for path in sorted((root / package).rglob("*.py")):
            if path == LAUNCHER:
                continue
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def typing_only(node: ast.If) -> bool:
    return "TYPE_CHECKING" in ast.unparse(node.test)


def imported(
    tree: ast.AST, module: str, package: bool, top_level: bool = False, types_too: bool = True
) -> Iterator[str]:
    """Dotted names that a module imports: all, or those executed when it is itself imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + package]
                base = ".".join([*parts, base] if base else parts)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif (top_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)) or (
            isinstance(node, ast.If) and not types_too and typing_only(node)
        ):
            continue
        else:
            yield from imported(node, module, package, top_level, types_too)


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def imports_of(module: str, **options: bool) -> list[str]:
    path = MODULES[module]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return list(imported(tree, module, path.name == "__init__.py", **options))


@pytest.mark.parametrize("package", FORBIDDEN)
def test_arrows_go_down(package: str) -> None:
    own = [m for m in MODULES if inside(m, package)]
    assert own, package
    wrong = [
        f"{module} imports {name}"
        for module in own
        for name in imports_of(module, types_too=False)
        for bad in FORBIDDEN[package]
        if inside(name, bad)
    ]
    assert not wrong


def test_nothing_that_a_training_run_does_without_is_imported_at_a_top() -> None:
    """A machine with GPUs need not have them: structures come as text, and SevenNet only judges designs."""
    absent = ("ase", "pymatgen", "lmdb", "sevenn", "diep", "fairchem", "liger_kernel", "vllm", "trl", "peft")
    wrong = [
        f"{module} imports {name}"
        for module in MODULES
        if not inside(module, "rewards_fast.integrations")
        for name in imports_of(module, top_level=True, types_too=False)
        if any(inside(name, package) for package in absent)
    ]
    assert not wrong


def rooms_of(names: Iterable[str]) -> Iterator[str]:
    """The rooms of those dotted names that lie in one."""
    for name in names:
        package, _, rest = name.partition(".")
        if package == "catmllm" and rest:
            yield rest.partition(".")[0]


@pytest.mark.parametrize("module", [m for m in MODULES if inside(m, "catmllm") and m != "catmllm"])
def test_rooms_keep_their_order(module: str) -> None:
    """Types too: `if TYPE_CHECKING` is no way around a wall."""
    (own,) = rooms_of([module])
    for room in rooms_of(imports_of(module)):
        assert ROOMS.index(room) <= ROOMS.index(own), f"{module} imports from {room}"


def test_every_room_is_there() -> None:
    assert set(rooms_of(MODULES)) == set(ROOMS)


def private_names(path: Path) -> Iterator[str]:
    """Private names of other modules of ours in a file: `from a import _b`,
    and `a._b` of an imported module a."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    ours = {a.asname for n in nodes if isinstance(n, ast.Import) for a in n.names if a.name in MODULES}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ROOTS:
            for alias in node.names:
                ours |= {alias.asname or alias.name} if f"{node.module}.{alias.name}" in MODULES else set()
                if alias.name.startswith("_") and alias.name != "_core":  # compiled; private to its package
                    yield f"{path.relative_to(ROOT)}:{node.lineno} {node.module}.{alias.name}"
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            private = node.attr.startswith("_") and not node.attr.startswith("__")
            if private and node.value.id in ours:
                yield f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)}"


def test_nothing_uses_a_private_name_of_another_module() -> None:
    """A test may look inside the module that it tests; sources and benches may not."""
    paths = [*MODULES.values(), LAUNCHER, *sorted((ROOT / "bench").glob("*.py"))]
    assert not [wrong for path in paths for wrong in private_names(path)]


def test_there_is_no_import_circle() -> None:
    graph = {
        module: {
            name
            for name in imports_of(module, top_level=True, types_too=False)
            if name in MODULES and name != module
        }
        for module in MODULES
    }
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for name in sorted(graph[module]):
                visit(name, [*path, module])
            done.add(module)

    for module in sorted(graph):
        visit(module, [])


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Without its docstring."""
    first, last = function.body[0], function.end_lineno or 0
    words = ast.get_docstring(function) is not None
    return last - function.lineno + 1 - (words and (first.end_lineno or 0) - first.lineno + 1)


def test_a_function_is_a_screen_of_sixty_lines() -> None:
    """But for a hot loop, whose docstring says that it is one."""
    files = [
        p
        for part in ("catmllm", "rewards_fast", "kernels", "bench", "tests")
        for p in (ROOT / part).rglob("*.py")
    ]
    assert len(files) > 300
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {lines_of(node)} lines"
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and lines_of(node) > 60
        and "hot loop" not in (ast.get_docstring(node) or "").lower()
    ]
    assert not long


def loaded_after(statement: str, *, path: Path = ROOT) -> set[str]:
    """The top-level names in sys.modules of a fresh interpreter after a statement."""
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'kernels')!r}]\n{statement}\n"
        "import json; print(json.dumps(sorted(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=path, check=True)
    return set(json.loads(run.stdout.splitlines()[-1]))


def test_the_reward_needs_numpy_alone() -> None:
    names = loaded_after("import rewards_fast")
    for package in ("torch", "catmllm", "catmllm_kernels", "transformers", "pymatgen", "ase", "pandas"):
        assert package not in names
    assert "numpy" in names


def test_scoring_loads_neither_torch_nor_the_trainer() -> None:
    names = loaded_after("import rewards_fast; rewards_fast.PVCP().score(['data_x'], '')")
    assert not names & {"torch", "catmllm", "catmllm_kernels", "transformers"}


def test_the_kernels_do_not_load_the_trainer() -> None:
    folders = sorted(m for m in MODULES if m.count(".") == 1 and inside(m, "catmllm_kernels"))
    names = loaded_after("\n".join(f"import {m}" for m in folders))
    assert "torch" in names
    assert not names & {"catmllm", "rewards_fast", "transformers"}


def test_a_structure_needs_no_torch() -> None:
    names = loaded_after(
        "import catmllm.structure.cif, catmllm.structure.text, catmllm.structure.graph, catmllm.data.slabs"
    )
    assert "torch" not in names and "transformers" not in names


def test_the_configuration_and_the_command_line_are_quick_to_load() -> None:
    names = loaded_after("import catmllm.config, catmllm.cli.main; catmllm.cli.main.command_line()")
    assert "torch" not in names and "transformers" not in names


def test_train_as_a_script_does_not_shadow_other_packages(tmp_path: Path) -> None:
    """Run as `python catmllm/train.py`, its folder would be the first
    place for `import evaluate` and `import data`."""
    code = (
        "import runpy, sys, contextlib, io, importlib.util\n"
        f"script = {str(ROOT / 'catmllm' / 'train.py')!r}\n"
        f"sys.path[0] = {str(ROOT / 'catmllm')!r}\n"
        "assert 'catmllm' in (importlib.util.find_spec('evaluate').origin\n"
        "    or str(list(importlib.util.find_spec('evaluate').submodule_search_locations)))\n"
        "importlib.invalidate_caches()\n"
        "sys.argv = [script, '--help']\n"
        "try:\n"
        "    with contextlib.redirect_stdout(io.StringIO()): runpy.run_path(script, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0\n"
        "for name in ('evaluate', 'data', 'models', 'structure', 'train'):\n"
        "    spec = importlib.util.find_spec(name)\n"
        "    places = [] if spec is None else [spec.origin or '', *(spec.submodule_search_locations or [])]\n"
        f"    assert not any(str(p).startswith({str(ROOT / 'catmllm')!r}) for p in places), (name, places)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["grpo.lrr=1"], "did you mean `grpo.lr`?"),
        (["--help", "jonit"], "did you mean `joint`?"),
        (["absent.yaml"], "absent.yaml"),
    ],
)
def test_a_wrong_argument_is_one_line_and_status_2(tmp_path: Path, arguments: list[str], says: str) -> None:
    command = [sys.executable, str(ROOT / "catmllm" / "train.py"), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert run.returncode == 2
    assert says in run.stderr and "Traceback" not in run.stderr
