"""The loader of the CPU libraries: one that is missing,
old or of other sources is refused with the command that mends it."""

import ctypes
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
import torch

from catmllm_kernels import backend, native
from catmllm_kernels.escn import cases, edge_attention
from catmllm_kernels.varlen_attention import varlen_attention

CSRC = Path(__file__).parents[2] / "csrc"
MEND = "`pip install --no-deps --editable .`"
each = pytest.mark.parametrize("name", native.LIBRARIES)


def built(name: str) -> Path:
    (path,) = Path(native.__file__).parent.glob(f"_{name}.*")
    return path


@pytest.fixture
def sources(tmp_path):
    """A copy of csrc to edit."""
    return Path(shutil.copytree(CSRC, tmp_path / "csrc"))


@each
def test_a_library_runs_beside_the_sources_that_it_was_built_from(name, sources):
    assert isinstance(native.opened(name, built(name), sources), ctypes.CDLL)
    assert isinstance(native.library(name), ctypes.CDLL) and native.unfit(name) == ""


@each
def test_a_library_of_a_wheel_runs_without_sources(name, tmp_path):
    assert isinstance(native.opened(name, built(name), tmp_path / "nothing"), ctypes.CDLL)


@each
@pytest.mark.parametrize("folder", ["own", "vector"])
def test_a_library_of_edited_sources_is_refused(name, folder, sources):
    edited = sources / (name if folder == "own" else folder) / ("kernels.h" if folder == "own" else "lanes.h")
    edited.write_text(edited.read_text() + "// edited since\n")
    why = native.opened(name, built(name), sources)
    assert isinstance(why, str) and "built from other sources" in why and MEND in why


@each
def test_a_renamed_or_added_source_is_an_edit(name, sources):
    (sources / name / "kernels.h").rename(sources / name / "renamed.h")
    assert "other sources" in native.opened(name, built(name), sources)
    (sources / name / "renamed.h").rename(sources / name / "kernels.h")
    (sources / "vector" / "added.cpp").write_text("")
    assert "other sources" in native.opened(name, built(name), sources)


@each
def test_sources_of_another_library_do_not_matter(name, sources):
    for other in {*native.LIBRARIES, "cif"} - {name}:
        (sources / other / "added.h").write_text("// of another library")
    assert isinstance(native.opened(name, built(name), sources), ctypes.CDLL)


@each
def test_an_older_or_broken_library_is_refused(name, tmp_path):
    (tmp_path / "old.c").write_text(f"const char *{name}_isa(void) {{ return 0; }}")
    old = tmp_path / "old.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", old, tmp_path / "old.c"], check=True)
    why = native.opened(name, old, CSRC)
    assert isinstance(why, str) and "older version" in why and MEND in why
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    why = native.opened(name, broken, CSRC)
    assert isinstance(why, str) and "cannot be opened" in why and MEND in why


def _edge_attention() -> torch.Tensor:
    return edge_attention(cases.inputs(cases.Size(2, 1, "gate", (1,)), torch.float32, torch.device("cpu")))


def _varlen_attention() -> torch.Tensor:
    tokens = torch.randn(5, 2, 8)
    return varlen_attention(tokens, tokens, tokens, torch.tensor([0, 2, 5], dtype=torch.int32), 3)


@pytest.fixture
def none_built(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "_PACKAGE", tmp_path)
    for cached in (native.library, native.function, backend.warn_once):
        cached.cache_clear()
    yield
    for cached in (native.library, native.function, backend.warn_once):
        cached.cache_clear()


@each
def test_a_library_that_was_not_built_says_so(name, none_built):
    why = native.unfit(name)
    assert f"catmllm_kernels/_{name} was not built" in why and MEND in why
    with pytest.raises(RuntimeError, match="was not built"):
        native.function(name, "forward")


@pytest.mark.parametrize("run", [_edge_attention, _varlen_attention])
def test_ops_without_their_library_run_by_torch_and_warn_once(run, none_built):
    with pytest.warns(UserWarning, match=r"was not built; `pip install"):
        assert run().isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run().isfinite().all()


def test_a_forced_library_that_is_missing_is_an_error(none_built, monkeypatch):
    monkeypatch.setenv("CATMLLM_KERNELS", "cpu")
    with pytest.raises(RuntimeError, match="pip install"):
        _edge_attention()
