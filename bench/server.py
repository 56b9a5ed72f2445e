"""The reward over HTTP on loopback: `rewards-fast serve` beside a server that scores the same texts with pymatgen.

Both run in processes of their own and are asked in turn by the same closed-loop clients (`load.py`, one more process), with 1, 8
and 64 connections, each request carrying a batch of answers of 68 atoms. The peer is FastAPI on uvicorn (uvloop, httptools)
with a warm process for every core; its scores are checked to be equal. A third server, uvicorn with an application that reads
the request and says the same to all, shows what HTTP alone allows (`nothing`). The share of HTTP and JSON is processor time: that of
the server's process for a text, less that of `PVCP.score` on the same texts. `--soak SECONDS` asks our server alone, with
right, broken and wrong requests, and watches its memory. Everything is bounded and stays on 127.0.0.1.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from prometheus_client.parser import text_string_to_metric_families
from rewards import slab  # the benchmark beside this one

from rewards_fast import PVCP, parse_target
from rewards_fast.pvcp import Crystal, Measurement, Thresholds, Weights, score_measurement
from rewards_fast.server import Limits
from rewards_fast.server.bodies import body_types

HERE = Path(__file__).parent
TARGET = "CO</s>Pt49Cu17 (1 1 1)"
CLIENTS = (1, 8, 64)


# The peer ----------------------------------------------------------------------------------------------------------


def pymatgen_score(text: str, target: str) -> dict[str, float]:
    """The terms of one text by pymatgen: parse, composition, volume, density, distance matrix, then the same formulas."""
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
        terms = ("total", "comp", "parse", "valid", "phys")
        columns = {name: [row[name] for row in rows] for name in terms}
        return JSONResponse({**columns, "reason": [None] * len(rows)})

    app.add_route("/v1/score", score, methods=["POST"])
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)


def serve_nothing(port: int) -> None:
    """The floor of the framework: an ASGI function on the same uvicorn that reads a request and says the same thing to all."""
    import uvicorn

    said = json.dumps(
        {**{name: [10.0] for name in ("total", "comp", "parse", "valid", "phys")}, "reason": [None]}
    ).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(said))]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body", False):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": said})

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False, lifespan="off")


# Asking ------------------------------------------------------------------------------------------------------------


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
    """The servers at each number of clients, in turn (the median of `turns`), and where our processor time goes."""
    texts = [slab(68)] * batch
    body = json.dumps({"texts": texts, "targets": TARGET}).encode()
    scorer = PVCP()
    direct = cpu_of_a_text(lambda: [scorer.score(texts, TARGET) for _ in range(2048 // batch)], 2048, 15)
    decoder = msgspec.json.Decoder(body_types(Limits())[0])
    scores = scorer.score(texts, TARGET)

    def as_json() -> None:
        for _ in range(2048 // batch):
            decoder.decode(body)
            names = ("total", "comp", "parse", "valid", "phys")
            reply: dict[str, Any] = {name: getattr(scores, name).tolist() for name in names}
            msgspec.json.encode({**reply, "reason": scores.reason})

    coding = cpu_of_a_text(as_json, 2048, 15)
    rows = []
    with server(OURS) as ours, server(PEER) as peer, server(FLOOR) as floor:
        left, right = ask(ours, "/v1/score", body), ask(peer, "/v1/score", body)
        for name in ("total", "comp", "parse", "valid", "phys"):
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
            median = {
                who: sorted(all_, key=lambda f: f["texts_per_s"])[turns // 2] for who, all_ in rounds.items()
            }
            names = ("texts_per_s", "p50_ms", "p99_ms", "answers", "client_cpu_us_an_answer")
            served = median["ours"]["served_us"]
            rows.append(
                {
                    "clients": clients,
                    "batch": batch,
                    **{who: {name: found[name] for name in names} for who, found in median.items()},
                    "every_round": {who: [f["texts_per_s"] for f in all_] for who, all_ in rounds.items()},
                    "ratio": median["ours"]["texts_per_s"] / median["pymatgen"]["texts_per_s"],
                    "cpu_us_a_text": {
                        "served": served,
                        "scoring": direct,
                        "json": coding,
                        "http": served - direct - coding,
                    },
                    "http_and_json_share": 1 - direct / served,
                }
            )
    return {"batch": batch, "rows": rows}


def soak(seconds: float) -> dict[str, Any]:
    """Our server under mixed requests; resident memory over time."""
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
    return {
        "seconds": result["seconds"],
        "answers": result["answers"],
        "statuses": result["statuses"],
        "texts": sum(v for k, v in after.items() if k.startswith("rewards_fast_texts_total")),
        "p50_ms": result["p50_ms"],
        "p99_ms": result["p99_ms"],
        "rss_mib": {
            "after a tenth": memory[len(memory) // 10][1],
            "half": half[0][1],
            "end": memory[-1][1],
            "most": max(m for _, m in memory),
        },
        "slope_mib_a_minute_in_the_second_half": slope,
    }


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the servers end with this process
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true")
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
    conditions = f"{date.today()}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}"
    if arguments.soak:
        result: dict[str, Any] = {"conditions": conditions, "soak": soak(min(arguments.soak, 900.0))}
    else:
        result = {
            "conditions": conditions,
            "batches": [measure(16, 1.5, 1), measure(1, 1.0, 1)]
            if arguments.quick
            else [measure(64, 4.0, 1), measure(1, 1.5, 3)],
        }
    if arguments.json:
        print(json.dumps(result))
        return
    print(conditions)
    if arguments.soak:
        for name, value in result["soak"].items():
            print(f"{name:40} {value}")
        return
    print("texts of 68 atoms; the servers, their processes and the clients share the cores")
    for group in result["batches"]:
        print(f"\n{group['batch']} texts a request")
        print(
            f"{'clients':>8}{'ours texts/s':>14}{'p50 ms':>9}{'p99 ms':>9}{'pymatgen':>11}{'p50 ms':>10}{'p99 ms':>10}{'ratio':>8}{'HTTP+JSON':>11}{'nothing requests/s':>20}{'client µs':>11}"
        )
        for row in group["rows"]:
            mine, theirs = row["ours"], row["pymatgen"]
            print(
                f"{row['clients']:>8}{mine['texts_per_s']:>14,.0f}{mine['p50_ms']:>9.2f}{mine['p99_ms']:>9.2f}"
                f"{theirs['texts_per_s']:>11,.1f}{theirs['p50_ms']:>10.1f}{theirs['p99_ms']:>10.1f}"
                f"{row['ratio']:>7.0f}x{100 * row['http_and_json_share']:>10.0f}%"
                f"{row['nothing']['texts_per_s'] / group['batch']:>20,.0f}{mine['client_cpu_us_an_answer']:>11.0f}"
            )
        cpu = group["rows"][1]["cpu_us_a_text"]
        print(
            "processor time a text, 8 clients: "
            + ", ".join(f"{name} {value:.1f} µs" for name, value in cpu.items())
        )


if __name__ == "__main__":
    main()
