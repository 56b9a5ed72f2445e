"""Compile the Triton kernels that `bench/gpu.py` starts, on a machine without a GPU, into an archive that
travels.

    python -m bench.gpu_phases.prefill [--arch sm_90 …] [--jobs N] [--out build/triton.tar.xz]

Triton's key of a compiled kernel holds its own files, its library among them, and the kernels' sources, line
numbers too: compile with the Triton and the Python that the machine with the GPU has (a wheel for another
Python has another library), from the very tree that will run there. A stand-in for
the driver lets Triton's launcher take its own way up to the binary, so that the keys are those of a run.
What the launches are is read from the ops' own code on meta tensors (`catmllm_kernels.launch.recorded`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bench import record

if TYPE_CHECKING:
    from catmllm.config import LLMConfig
    from catmllm_kernels.launch import Launch

Compile = tuple[
    Callable[..., None], Sequence[Any]
]  # starts kernels on meta tensors of a dtype; for which dtypes

ARCHIVE = record.ROOT / "build" / "triton.tar.xz"
FOLDER = record.ROOT / "build" / "triton"
HALF = (torch.bfloat16, torch.float16)
NOTE = "compiled.json"  # in the archive: of what it is
# What Triton asks the driver beside the target, by the data sheets: shared bytes of a block, multiprocessors.
DEVICES = {80: (166912, 108), 90: (232448, 132)}


def take(archive: Path) -> bool:
    """Point Triton at compiled kernels: those of TRITON_CACHE_DIR, or those of the archive, unpacked. Returns
    whether there are some of this very Triton, whose wheel for another Python is another one."""
    folder = Path(os.environ.setdefault("TRITON_CACHE_DIR", str(FOLDER)))
    if archive.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
        settle(folder)
    if not (folder / NOTE).is_file():
        return False
    return bool(json.loads((folder / NOTE).read_text())["triton_key"] == own_key())


def own_key() -> str:
    """What Triton's files, as installed here, add to the key of each kernel; two seconds."""
    from triton.runtime.cache import triton_key

    return hashlib.sha256(triton_key().encode()).hexdigest()


def settle(folder: Path) -> None:
    """Triton's group files hold absolute paths: make them those of this folder."""
    for group in folder.glob("*/__grp__*.json"):
        names = json.loads(group.read_text())["child_paths"]
        group.write_text(json.dumps({"child_paths": {name: str(group.parent / name) for name in names}}))


def count() -> int:
    """Compiled kernels that are there."""
    folder = Path(os.environ.get("TRITON_CACHE_DIR", FOLDER))
    return sum(1 for _ in folder.glob("*/*.cubin"))


def launches(large: bool, arch: int) -> list[Launch]:
    """Every different launch of the phases on an architecture, which has tiles of its own; `large`: of the
    cases at the 153M encoder's sizes too."""
    from bench.gpu_phases import correct, models
    from catmllm.config import load_config

    wanted = [(case.compile, dtypes) for case, dtypes in correct.problems(False, large) if case.compile]
    towers = [load_config(None, models.options(size)).model.llm for size in models.SIZES if size != "tiny"]
    published = [(kernel, HALF) for tower in towers for kernel in of_decoder(tower)]
    return different([*wanted, *of_models("tiny", "31M"), *published, *of_env(), *of_tiles()], arch)


def of_models(*names: str) -> Iterator[Compile]:
    """What training steps with these encoders and the LLM of the defaults start; of the LM head, with an LLM
    of any size."""
    from bench.gpu_phases import models
    from catmllm.config import load_config
    from catmllm.models.build import build_encoder
    from catmllm_kernels.escn import cases as escn
    from catmllm_kernels.linear_logprob import cases as heads
    from catmllm_kernels.linear_logprob import triton as logprob
    from catmllm_kernels.linear_logprob.arguments import Backward, Forward
    from catmllm_kernels.so3_pool_project import cases as pooling
    from catmllm_kernels.so3_pool_project import triton as pool

    every, meta = (*HALF, torch.float32), torch.device("meta")
    for name in names:
        graph = [] if name == "tiny" else ["data.cutoff=12", "data.max_neighbours=20"]
        preset = [] if name == "tiny" else [f"model.encoder.preset={name}"]
        config = load_config(None, [*graph, *preset])
        with meta:
            model = build_encoder(config.model.encoder, config.data.cutoff)
        c, lat, lon = model.config, len(model.tables.edge_to_lat), len(model.tables.edge_lon)
        size = escn.Size(
            c.lmax, c.mmax, "s2", (3, 2), c.sphere_channels, c.attn_hidden_channels, c.num_heads,
            c.attn_alpha_channels, c.attn_value_channels, c.edge_channels, (lat, lon),
        )  # fmt: skip
        yield partial(escn.compile_case, size), every

        def pooled(dtype: torch.dtype, mode: str, wide: bool, c: Any = c) -> None:
            given = ((5, 4), c.lmax, c.sphere_channels, mode, "layer", dtype, meta, 0)
            x, batch, n, _, norm = pooling.arguments(*given)
            x = x.float() if wide else x  # a sum over edges and layers, under weights in half precision
            features, arg, stats = pool.pool_forward(x, batch, n, mode, norm)
            pool.pool_backward(torch.empty_like(features), x, batch, n, mode, norm, features, arg, stats)

        for mode in ("max", "invariant"):
            yield partial(pooled, mode=mode, wide=False), every
            yield partial(pooled, mode=mode, wide=True), HALF
        yield from ((kernel, every) for kernel in of_decoder(config.model.llm))

    def head(dtype: torch.dtype, words: int, two: bool, entropy: bool) -> None:
        hidden, weight, targets, *other = heads.arguments(8192, 896, words, two, dtype, meta, 0)
        with torch.no_grad():
            given = Forward(hidden, weight, targets, 1.0, entropy, other[0] if two else None)
            _, lse, spread, *_ = logprob.forward(given)
            grad = torch.empty_like(lse)
            of = grad if entropy else None
            logprob.backward(Backward(grad, of, *given[:3], lse, spread, 1.0, True, True))

    for words in (models.ROWS, models.ROWS + 1):  # a multiple of 16, and not: a tokenizer's own number
        for two, entropy in ((False, False), (False, True), (True, False), (True, True)):
            yield partial(head, words=words, two=two, entropy=entropy), every


def of_decoder(llm: LLMConfig) -> Iterator[Callable[[torch.dtype], None]]:
    """What a layer of this text tower starts."""
    from catmllm_kernels.decoder.cases import compile_case

    tokens, width = 8192, llm.hidden_size // llm.num_attention_heads
    turned = [(tokens, heads, width) for heads in (llm.num_attention_heads, llm.num_key_value_heads)]
    yield compile_case("rms_norm", (tokens, llm.hidden_size), (llm.hidden_size,))
    yield compile_case("rotate", *turned, (tokens, width), (tokens, width))
    yield compile_case("swiglu", *[(tokens, llm.intermediate_size)] * 2)


def of_env() -> Iterator[Compile]:
    from bench.gpu_phases import env

    yield lambda _: env.our_start(torch.device("meta"))(), (torch.float32,)


def of_tiles() -> Iterator[Compile]:
    """The tiles that phase logprob tries."""
    from bench.gpu_phases import logprob
    from catmllm_kernels.linear_logprob import triton
    from catmllm_kernels.linear_logprob.arguments import Forward

    def forward(dtype: torch.dtype, tile: tuple[int, ...]) -> None:
        hidden, weight = (torch.empty(n, 896, dtype=dtype, device="meta") for n in (8192, 151936))
        with torch.no_grad(), logprob.first_tile(tile):
            triton.forward(Forward(hidden, weight, torch.empty(8192, dtype=torch.int64, device="meta")))

    for tile in logprob.TILES:
        yield partial(forward, tile=tile), (torch.bfloat16,)


def different(wanted: Iterable[Compile], arch: int) -> list[Launch]:
    """What they launch, each variant once."""
    from catmllm_kernels.launch import recorded

    found: dict[str, Launch] = {}
    for compile_for, dtypes in wanted:
        for dtype in dtypes:
            with recorded(arch) as made:
                compile_for(dtype)
            for start in made:
                found.setdefault(key_of(start), start)
    return list(found.values())


def key_of(start: Launch) -> str:
    """By what a launch is compiled."""
    from catmllm_kernels.aot import config_of, specialised

    return f"{start.kernel.__name__} {config_of(start)} {specialised(start)}"


def stand_in(arch: int) -> None:
    """A driver without a device."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    shared, multiprocessors = DEVICES[arch]

    class Properties:
        @staticmethod
        def get_device_properties(_: int) -> dict[str, int]:
            return {"max_shared_mem": shared, "multiprocessor_count": multiprocessors, "max_num_regs": 65536,
                    "warpSize": 32}  # fmt: skip

    class Driver:
        utils = Properties

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", arch, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, _: Any = None) -> int:
            return 0

        def is_active(self) -> bool:
            return True

    driver.set_active(Driver())


def compile_all(arch: int, starts: list[Any], jobs: int) -> list[int]:
    """Every start for one architecture, by forks that each take what nobody has taken yet. Exit statuses."""
    context = multiprocessing.get_context("fork")
    taken = context.Value("i", 0)

    def work() -> None:
        stand_in(arch)
        while True:
            with taken.get_lock():
                i, taken.value = taken.value, taken.value + 1
            if i >= len(starts):
                return
            start, began = starts[i], time.monotonic()
            start.kernel.warmup(*start.arguments, grid=start.grid, **start.constants, **start.options)
            if (seconds := time.monotonic() - began) > 20:
                print(f"sm_{arch} {start.kernel.__name__}: {seconds:.0f} s", flush=True)

    processes = [context.Process(target=work) for _ in range(jobs)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode or 0 for process in processes]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", action="append", help="sm_80 or sm_90; may be given again (both)")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=ARCHIVE)
    parser.add_argument(
        "--without-153m", action="store_true", help="leave out the kernels of L6 M3: minutes less"
    )
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="triton-"))
    # the binary and what a start needs to know of it; not the sources on the way to it
    os.environ |= {"TRITON_CACHE_DIR": str(folder), "TRITON_STORE_BINARY_ONLY": "1", "TRITON_INTERPRET": "0"}
    began = time.monotonic()
    archs = [int(a.removeprefix("sm_")) for a in args.arch or ("sm_80", "sm_90")]
    try:
        for arch in archs:
            if any(compile_all(arch, launches(not args.without_153m, arch), args.jobs)):
                return 1
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        for left in [*folder.glob("*/*.source"), *folder.glob("*/lock")]:
            left.unlink()
        about = {"triton": record.version_of("triton"), "triton_key": own_key(), "archs": archs}
        about |= record.commit(record.TREE)
        (folder / NOTE).write_text(json.dumps(about))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(args.out, "w:xz") as packed:
            # by name, since kernels of one name are nearly alike: a third of the size
            for path in sorted(folder.rglob("*"), key=lambda p: (p.name, str(p))):
                if path.is_file():
                    packed.add(path, path.relative_to(folder))
        number = len(list(folder.glob("*/*.cubin")))
        print(f"{args.out}: {number} kernels of Triton {about['triton']} for {archs}, "
              f"{args.out.stat().st_size / 2**20:.1f} MiB, {time.monotonic() - began:.0f} s, "
              f"{used.ru_utime + used.ru_stime:.0f} s of CPU")  # fmt: skip
    finally:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
