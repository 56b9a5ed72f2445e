"""What a configuration leaves to the device, and how a GPU is set up; no GPU is needed for it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from catmllm.config import load_config
from catmllm.pipeline import _on_gpu, run
from catmllm.train.stage import Context
from catmllm.world import DTYPES, World, loader_workers, settled, start

ROOT = Path(__file__).parents[1]
PRETRAINED = "model.llm.pretrained=Qwen/Qwen2.5-VL-3B-Instruct"


@pytest.mark.parametrize(
    ("overrides", "device", "encoder", "compiled"),
    [
        ([], "cpu", "fp32", False),
        ([], "cuda", "tf32", False),
        (["precision=fp32"], "cuda", "fp32", False),
        ([PRETRAINED], "cuda", "tf32", True),
        ([PRETRAINED], "cpu", "fp32", False),
        ([PRETRAINED, "compile=false", "encoder_precision=fp16"], "cuda", "fp16", False),
        (["compile=true", "encoder_precision=bf16"], "cpu", "bf16", True),
        (["encoder_precision=tf32"], "cpu", "fp32", False),
    ],
)
def test_what_is_left_open_follows_the_device(
    overrides: list[str], device: str, encoder: str, compiled: bool
) -> None:
    config = settled(load_config(None, overrides), device)
    assert (config.encoder_precision, config.compile) == (encoder, compiled)
    assert settled(config, device) == config
    assert config.encoder_precision in DTYPES
    assert f"encoder_precision {encoder}, blocks {'compiled' if compiled else 'not compiled'}" in _on_gpu(
        config
    )


@pytest.mark.parametrize(("precision", "fast", "device", "taken"), [
    ("bf16", True, "cpu", "bf16"), ("bf16", False, "cpu", "fp32"), ("bf16", False, "cuda", "bf16"),
    ("fp16", False, "cpu", "fp16"), ("fp32", True, "cpu", "fp32"),
])  # fmt: skip
def test_a_cpu_without_products_of_bfloat16_takes_float32(
    monkeypatch: pytest.MonkeyPatch, precision: str, fast: bool, device: str, taken: str
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: fast)
    assert settled(load_config(None, [f"precision={precision}"]), device).precision == taken


def test_a_stage_gets_settled_values() -> None:
    nothing: Any = None
    world = World(0, 1, torch.device("cpu"))
    context = Context(load_config(), nothing, nothing, {}, world, Path())
    assert (context.config.encoder_precision, context.config.compile) == ("fp32", False)


def test_a_rank_makes_batches_in_processes_where_a_gpu_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config()
    assert loader_workers(config, "cpu") == 0
    for cores, ranks, workers in ((16, 1, 4), (16, 8, 1), (64, 8, 4), (2, 1, 1), (1, 1, 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=cores: set(range(n)))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert loader_workers(config, "cuda") == workers, (cores, ranks)
    for device in ("cpu", "cuda"):
        assert loader_workers(load_config(None, ["data.workers=0"]), device) == 0
        assert loader_workers(load_config(None, ["data.workers=7"]), device) == 7


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A process that believes to have one GPU; what it asks of torch is written down."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.update(device=str(device)))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: asked.update(backend=backend))
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    for name in ("RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    matmul = torch.backends.cuda.matmul
    names = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
    before = torch.get_float32_matmul_precision(), [getattr(matmul, n) for n in names]
    yield asked
    torch.set_float32_matmul_precision(before[0])
    for name, value in zip(names, before[1]):
        setattr(matmul, name, value)


@pytest.mark.parametrize(
    ("encoder", "products"), [("null", "high"), ("tf32", "high"), ("fp32", "highest"), ("fp16", "highest")]
)
def test_a_gpu_adds_long_sums_in_float32_and_takes_tf32_by_choice(
    gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch, encoder: str, products: str
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    world = start(load_config(None, [f"encoder_precision={encoder}"]))
    assert (world.device, gpu["device"], gpu["backend"]) == (
        torch.device("cuda", 0),
        "cuda:0",
        "cpu:gloo,cuda:nccl",
    )
    assert not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    assert torch.get_float32_matmul_precision() == products


def test_more_ranks_than_gpus_are_one_line(
    gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.delenv("CATMLLM_TRACEBACK", raising=False)
    assert run(load_config(None, [f"out={tmp_path}"])) == 1
    assert "--nproc-per-node 1" in capsys.readouterr().err and not gpu


def test_the_allocator_is_chosen_before_torch_is_loaded() -> None:
    code = (
        "import os, runpy, sys\n"
        "runpy.run_path('catmllm/train.py', run_name='launcher')\n"
        "print(os.environ.get('PYTORCH_ALLOC_CONF'), 'torch' in sys.modules)"
    )
    plain = {
        k: v for k, v in os.environ.items() if k not in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    }
    for own, expected in (
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, "backend:native"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, "None"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=plain | own,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.split() == [expected, "False"]


def test_make_run_starts_a_rank_per_gpu() -> None:
    """Two at most; two on the CPU where there is none; as many as asked for."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (line,) = (x for x in makefile.splitlines() if "nproc-per-node" in x and "torch.cuda" in x)
    expression = line.partition("print(")[2].partition(')"')[0]
    assert [eval(expression, {"torch": _with_gpus(n)}) for n in (0, 1, 2, 8)] == [2, 1, 2, 2]
    shown = subprocess.run(
        ["make", "--dry-run", "run", "RANKS=3"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "--nproc-per-node 3 " in shown.stdout


def _with_gpus(n: int) -> Any:
    class Cuda:
        device_count = staticmethod(lambda: n)

    class Torch:
        cuda = Cuda

    return Torch
