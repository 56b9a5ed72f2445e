"""The reward over HTTP on loopback: `rewards-fast serve`
compared with a server that scores the same texts with pymatgen.

Both run in processes of their own and are asked in turn by the same closed-loop clients (`load.py`, one more
process), with 1, 8 and 64 connections, each request carrying a batch of answers of 68 atoms. The peer is
FastAPI on uvicorn (uvloop, httptools) with a warm process for every core; its scores are checked to be equal.
A third server, uvicorn with an application that reads the request and says the same to all, shows what HTTP
alone allows (`nothing`). The share of HTTP and JSON is processor time: that of the server's process for a
text, less that of `PVCP.score` on the same texts. `--soak SECONDS` asks our server alone, with right, broken
and wrong requests, and watches its memory. Everything is bounded and stays on 127.0.0.1.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench import record  # first: it decides whose packages are measured
from bench.rewards import slab
from rewards_fast import PVCP, parse_target
from rewards_fast.crystal import Crystal
from rewards_fast.pvcp import Thresholds, Weights
from rewards_fast.reference import Measurement, score_measurement
from rewards_fast.server import Limits
from rewards_fast.server.bodies import body_types
from rewards_fast.server.openapi import SCORES

HERE = Path(__file__).parent
TARGET = "CO</s>Pt49Cu17 (1 1 1)"
CLIENTS = (1, 8, 64)
WHO = ("ours", "pymatgen", "nothing")


# The peer ---------------------------------------------------------------------------------------------------


def pymatgen_score(text: str, target: str) -> dict[str, float]:
    """The terms of one text by pymatgen: parse, composition, volume, density, distance matrix,
    then the same formulas."""
    from pymatgen.core import Structure

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        structure: Any = Structure.from_str(text, fmt="cif")
    distances = structure.distance_matrix
    np.fill_diagonal(distances, math.inf)
    measured = Measurement(
        crystal=Crystal(structure.lattice.matrix, structure.frac_coords, np.zeros(0, dtype=np.int64)),
        composition=structure.composition.get_el_amt_dict(),
        n_sites=len(structure),
        volume=structure.volume,
        density=float(structure.density),
        min_distance=float(distances.min()),
        raw_frac=structure.frac_coords,
        fields={},
    )
    return score_measurement(measured, parse_target(target), Weights(), Thresholds())


def serve_pymatgen(port: int) -> None:
    """The peer's server; same request, same answer."""
    import asyncio

    import uvicorn
    from fastapi import FastAPI
    from fastapi.responses import JSONResponse

    app = FastAPI()
    cores = os.cpu_count() or 1
    pool = ProcessPoolExecutor(cores)
    list(pool.map(pymatgen_score, [slab(68)] * 2 * cores, [TARGET] * 2 * cores))

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    async def score(request: Any) -> Any:
        job = await request.json()
        loop = asyncio.get_running_loop()
        calls = [loop.run_in_executor(pool, pymatgen_score, t, job["targets"]) for t in job["texts"]]
        rows = await asyncio.gather(*calls)
        columns = {name: [row[name] for row in rows] for name in SCORES}
        return JSONResponse({**columns, "reason": [None] * len(rows)})

    app.add_route("/v1/score", score, methods=["POST"])
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)


def serve_nothing(port: int) -> None:
    """The floor of the framework: an ASGI function on the same uvicorn that
    reads a request and says the same thing to all."""
    import uvicorn

    said = json.dumps({**{name: [10.0] for name in SCORES}, "reason": [None]}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(said))]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body", False):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": said})

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False, lifespan="off")


# Asking -----------------------------------------------------------------------------------------------------


def ask(port: int, path: str, body: bytes | None = None) -> Any:
    """JSON or text of one answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(
        "POST" if body else "GET", path, body, {"content-type": "application/json"} if body else {}
    )
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return json.loads(content) if "json" in (answer.getheader("content-type") or "") else content.decode()


def gauges(port: int) -> dict[str, float]:
    """Samples of /metrics by name and labels."""
    samples = (s for f in text_string_to_metric_families(ask(port, "/metrics")) for s in f.samples)
    return {"".join([s.name, *(f" {v}" for _, v in sorted(s.labels.items()))]): s.value for s in samples}


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def server(command: list[str]) -> Iterator[int]:
    """A server process that listens on the port yielded; ended afterwards."""
    port = free_port()
    process = subprocess.Popen([sys.executable, *command, str(port)], cwd=HERE.parent)
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise SystemExit(f"the server ended with {process.returncode}")
            with contextlib.suppress(OSError):
                ask(port, "/healthz")
                break
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait(60)


OURS = ["-m", "rewards_fast.cli", "serve", "--log", "warning", "--drain-seconds", "0", "--port"]
PEER = [str(HERE / "server.py"), "--serve-pymatgen"]
FLOOR = [str(HERE / "server.py"), "--serve-nothing"]


def load(port: int, path: str, clients: int, seconds: float, bodies: list[bytes]) -> dict[str, Any]:
    """What the clients saw."""
    run = subprocess.run(
        [sys.executable, str(HERE / "load.py"), "127.0.0.1", str(port), path, str(clients), str(seconds)],
        input=b"\n".join(bodies),
        capture_output=True,
        check=True,
    )
    return dict(json.loads(run.stdout))


def cpu_of_a_text(call: Any, texts: int, turns: int) -> float:
    """Median microseconds of processor time (all threads) a text."""
    samples = []
    for _ in range(turns):
        begin = time.process_time()
        call()
        samples.append(1e6 * (time.process_time() - begin) / texts)
    return statistics.median(samples)


def measure(batch: int, seconds: float, turns: int) -> dict[str, Any]:
    """The servers at each number of clients, in turn, and where our processor time goes."""
    texts = [slab(68)] * batch
    body = json.dumps({"texts": texts, "targets": TARGET}).encode()
    scorer = PVCP()
    direct = cpu_of_a_text(lambda: [scorer.score(texts, TARGET) for _ in range(2048 // batch)], 2048, 15)
    decoder = msgspec.json.Decoder(body_types(Limits())[0])
    scores = scorer.score(texts, TARGET)

    def as_json() -> None:
        for _ in range(2048 // batch):
            decoder.decode(body)
            reply: dict[str, Any] = {name: getattr(scores, name).tolist() for name in SCORES}
            msgspec.json.encode({**reply, "reason": scores.reason})

    coding = cpu_of_a_text(as_json, 2048, 15)
    rows = []
    with server(OURS) as ours, server(PEER) as peer, server(FLOOR) as floor:
        left, right = ask(ours, "/v1/score", body), ask(peer, "/v1/score", body)
        for name in SCORES:
            assert np.allclose(left[name], right[name], atol=1e-9), name
        for clients in CLIENTS:
            rounds: dict[str, list[dict[str, Any]]] = {"ours": [], "pymatgen": [], "nothing": []}
            for _ in range(turns):
                for who, port in (("ours", ours), ("pymatgen", peer), ("nothing", floor)):
                    before = gauges(ours) if who == "ours" else {}
                    found = load(port, "/v1/score", clients, seconds * (1 + (who == "pymatgen")), [body])
                    assert set(found["statuses"]) == {"200"}, found["statuses"]
                    found["texts_per_s"] = batch * found["answers"] / found["seconds"]
                    if who == "ours":
                        spent = (
                            gauges(ours)["process_cpu_seconds_total"] - before["process_cpu_seconds_total"]
                        )
                        found["served_us"] = 1e6 * spent / (batch * found["answers"])
                    rounds[who].append(found)
            texts, asking = (
                f"{n} {what}{'s' * (n > 1)}" for n, what in ((batch, "text"), (clients, "client"))
            )
            rows.append({"name": f"{texts} per request, {asking}", **rounds})
    return {"batch": batch, "rows": rows, "scoring": direct, "json": coding}


def soak(seconds: float) -> dict[str, Any]:
    """The claim of our server under mixed requests; resident memory over time."""
    good = [slab(n) for n in (12, 36, 68, 100)]
    broken = [t[: len(t) * 2 // 3] for t in good] + ["no idea", "", "\ud83d\ude00" * 50]
    jobs: list[Any] = [
        {"texts": good * 8, "targets": TARGET},
        {"texts": [*good, *broken] * 4, "targets": ["Pt3Cu", None, {"Pt": 3, "O": None}, ""] * 11},
        {"texts": ["a" * 300_000]},
        {"texts": ["x"], "targets": "Qq"},
        {"texts": [1]},
        {"texts": [slab(1000)]},
        [],
    ]
    bodies = [json.dumps(job).encode() for job in jobs] + [b"{", b'{"texts": ["\\ud800"]}']
    memory: list[tuple[float, float]] = []
    with server(OURS) as port:
        begin = time.perf_counter()
        command = [
            sys.executable,
            str(HERE / "load.py"),
            "127.0.0.1",
            str(port),
            "/v1/score?diagnostics=true",
            "8",
        ]
        clients = subprocess.Popen([*command, str(seconds)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert clients.stdin is not None
        clients.stdin.write(b"\n".join(bodies))
        clients.stdin.close()
        clients.stdin = None
        while clients.poll() is None:
            time.sleep(min(2.0, seconds / 20))
            found = gauges(port)
            memory.append((time.perf_counter() - begin, found["process_resident_memory_bytes"] / 2**20))
        output, _ = clients.communicate()
        after = gauges(port)
    result = json.loads(output)
    half = [(t, m) for t, m in memory if t > seconds / 2]
    slope = 60 * float(np.polyfit([t for t, _ in half], [m for _, m in half], 1)[0])
    values = {
        "answers": result["answers"],
        **{f"status {status}": n for status, n in sorted(result["statuses"].items())},
        "texts": sum(v for k, v in after.items() if k.startswith("rewards_fast_texts_total")),
        "p50, ms": result["p50_ms"],
        "p99, ms": result["p99_ms"],
        "MiB after a tenth": memory[len(memory) // 10][1],
        "MiB at half-time": half[0][1],
        "MiB at the end": memory[-1][1],
        "MiB at most": max(m for _, m in memory),
        "MiB per minute in the second half": slope,
    }
    return record.claim(
        "server_soak",
        "our server under right, broken and wrong requests from 8 clients",
        "as named",
        {name: {"ours": [value]} for name, value in values.items()},
        {"seconds": result["seconds"], "clients": 8},
    )


def claims_of(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Throughput, latency and processor time of every batch and number of clients."""
    speed, latency, spent = {}, {}, {}
    for group in batches:
        for row in group["rows"]:
            name = row["name"]
            speed[name] = {who: [f["texts_per_s"] for f in row[who]] for who in WHO}
            for q in ("p50", "p99"):
                latency[f"{name}, {q}"] = {who: [f[f"{q}_ms"] for f in row[who]] for who in WHO[:2]}
            served = statistics.median(f["served_us"] for f in row["ours"])
            spent[f"{name}, served"] = {
                "ours": [served],
                "scoring": [group["scoring"]],
                "JSON": [group["json"]],
            }
    conditions = {
        "text": "slab, 68 atoms",
        "cores": "shared by servers and clients",
        "turns": [len(g["rows"][0]["ours"]) for g in batches],
    }
    says = "reward over HTTP on loopback"
    return [
        record.claim("server", says, "texts per second", speed, conditions, less_is_better=False),
        record.claim("server_latency", f"{says}: an answer", "ms", latency, conditions),
        record.claim("server_cpu", f"{says}: the server's processor time per text", "µs", spent, conditions),
    ]


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the servers end with this process
    parser = record.arguments(__doc__)
    parser.add_argument("--soak", type=float, metavar="SECONDS", help="the soak alone, 900 s at most")
    parser.add_argument("--serve-pymatgen", type=int, metavar="PORT", help=argparse.SUPPRESS)
    parser.add_argument("--serve-nothing", type=int, metavar="PORT", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve_pymatgen:
        serve_pymatgen(arguments.serve_pymatgen)
        return
    if arguments.serve_nothing:
        serve_nothing(arguments.serve_nothing)
        return
    if arguments.soak:
        record.finish(arguments, [soak(min(arguments.soak, 900.0))])
        return
    plan = ((16, 1.5, 1), (1, 1.0, 1)) if arguments.quick else ((64, 4.0, 1), (1, 1.5, 3))
    record.finish(arguments, claims_of([measure(*one) for one in plan]))


if __name__ == "__main__":
    main()
