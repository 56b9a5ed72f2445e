"""The server over real sockets on loopback: answers, refusals, limits, stalled clients,
overload, shutdown."""

import asyncio
import http.client
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from rewards_fast import PVCP, RewardSettings
from rewards_fast.cli import main
from rewards_fast.integrations.openrlhf import make_reward_func
from rewards_fast.server import Limits, make_server
from tests.rewards_fast.cif_texts import SLAB, TARGET

JSON = {"content-type": "application/json"}
Answer = tuple[int, dict[str, str], Any]


@contextmanager
def running(**options: Any) -> Iterator[int]:
    """A server in a thread of this process; yields its port."""
    server = make_server(port=0, **options)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield server.port
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with running(limits=Limits(body=1 << 20, texts=50, chars=100_000)) as number:
        yield number


def ask(
    port: int, path: str, body: Any = None, method: str = "POST", headers: dict[str, str] | None = None
) -> Answer:
    """Status, headers and JSON (or text) of an answer. Bodies that are no bytes are sent as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    data = body if isinstance(body, bytes | type(None)) else json.dumps(body).encode()
    connection.request(method, path, data, JSON if headers is None else headers)
    response = connection.getresponse()
    content = response.read()
    found = {k.lower(): v for k, v in response.getheaders()}
    connection.close()
    if found.get("content-type") == "application/json":
        return response.status, found, json.loads(content)
    return response.status, found, content.decode()


def gauges(port: int, headers: dict[str, str] | None = None) -> dict[str, float]:
    """The samples of /metrics by name, labels in order of their names."""
    text = ask(port, "/metrics", method="GET", headers=headers)[2]
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    return {"".join([s.name, *(f"/{v}" for _, v in sorted(s.labels.items()))]): s.value for s in samples}


# Answers
# -----------------------------------------------------------------------------------------------------------

TEXTS = [SLAB, f"Sure.\n```\n{SLAB}```", SLAB.replace("Cu", "Ni"), "no idea", "", "data_x\x00\ud83d\ude00 é"]


def test_scores_are_those_of_pvcp(port: int) -> None:
    targets = [TARGET, {"Pt": 3, "Cu": 1, "C": 1, "O": 1, "Ni": None}, "Pt3CuCO", "", None, "Pt(OH)2"]
    expected = PVCP().score(TEXTS, targets)  # type: ignore[arg-type]
    status, headers, scores = ask(port, "/v1/score", {"texts": TEXTS, "targets": targets})
    assert status == 200 and headers["content-type"] == "application/json"
    for name in ("total", "comp", "parse", "valid", "phys"):
        assert scores[name] == getattr(expected, name).tolist()
    assert scores["reason"] == expected.reason and "diagnostics" not in scores


@pytest.mark.parametrize("target", [TARGET, "Pt3CuCO", {"Pt": 3, "Cu": 1, "C": 1, "O": 1}, None, ""])
def test_one_target_for_all(port: int, target: Any) -> None:
    expected = PVCP().score(TEXTS, target)
    assert ask(port, "/v1/score", {"texts": TEXTS, "targets": target})[2]["total"] == expected.total.tolist()
    assert ask(port, "/v1/score", {"texts": []})[2]["total"] == []


def test_diagnostics_on_request(port: int) -> None:
    expected = PVCP().score(TEXTS, TARGET)
    for path, body in (
        ("/v1/score", {"texts": TEXTS, "targets": TARGET}),
        ("/get_reward", {"query": TEXTS, "labels": [TARGET] * len(TEXTS)}),
    ):
        found = ask(port, f"{path}?diagnostics=true", body)[2]["diagnostics"]
        for name in ("n_sites", "volume", "density", "min_distance"):
            wanted = [None if x != x or abs(x) == float("inf") else x for x in getattr(expected, name)]
            assert found[name] == wanted
        assert {k: len(v) for k, v in found["terms"].items()} == dict.fromkeys(expected.terms, len(TEXTS))
        assert found["terms"]["distance_penalty"][0] == 0 and found["terms"]["missing"][2] == 1
        assert found["fields"] == {k: v.tolist() for k, v in expected.fields.items()}
        assert found["reason"] == expected.reason


def test_settings_of_the_query(port: int) -> None:
    near = SLAB.replace("0.500 1\n", "0.473 1\n")  # C-O at 0.75 Å
    body = {"texts": [near, f"Here:\n```\n{near}```"], "targets": TARGET}
    assert ask(port, "/v1/score", body)[2]["phys"] == [7, 7]
    query = "near=0.7&comp=0&parse=1e0&extract=false"
    scores = ask(port, f"/v1/score?{query}", body)[2]
    settings = RewardSettings(near=0.7, comp=0, parse=1, extract=False)
    assert scores["total"] == settings.scorer().score(body["texts"], TARGET).total.tolist()  # type: ignore[arg-type]
    assert scores["phys"] == [10, -10]


def test_openrlhf_gets_what_its_function_gives(port: int) -> None:
    prompt = f"<|im_start|>user\n{TARGET}<|im_end|>\n<|im_start|>assistant\n"
    queries, prompts, labels = [prompt + t for t in TEXTS], [prompt] * 6, ["", *["Pt3CuCO"] * 5]
    body = {"query": queries, "prompts": prompts, "labels": labels, "whatever": {"else": 1}}
    assert ask(port, "/get_reward", body)[2] == make_reward_func()(queries, prompts, labels)
    assert ask(port, "/get_reward", {"query": queries})[0] == 200


# Refusals
# ----------------------------------------------------------------------------------------------------------

HOSTILE: dict[str, tuple[bytes, int]] = {
    "empty": (b"", 400),
    "no JSON": (b"hello", 400),
    "cut off": (b'{"texts": ["a', 400),
    "two values": (b'{"texts": []} {}', 400),
    "NaN": (b'{"texts": [NaN]}', 400),
    "not UTF-8": (b'{"texts": ["\xff\xfe"]}', 400),
    "UTF-16": ('{"texts": []}'.encode("utf-16"), 400),
    "byte order mark": (b'\xef\xbb\xbf{"texts": []}', 400),
    "surrogate bytes": (b'{"texts": ["\xed\xa0\x80"]}', 400),
    "lone surrogate and no JSON": (b'{"texts": ["\\ud800"', 400),
    "lone surrogate and NaN": (b'{"texts": ["\\ud800", NaN]}', 400),
    "lone surrogate and a number": (b'{"texts": ["\\ud800", 1]}', 422),
    "deep beside a surrogate": (b'{"texts": ["\\ud800", ' + b"[" * 100_000, 400),
    "control character": (b'{"texts": ["\x01"]}', 400),
    "binary": (bytes(range(256)) * 100, 400),
    "gzip": (b"\x1f\x8b\x08\x00" + bytes(50), 400),
    "deep lists": (b"[" * 100_000, 422),
    "deep where a text is": (b'{"texts": [' + b"[" * 100_000, 422),
    "null": (b"null", 422),
    "number": (b"1", 422),
    "list": (b"[]", 422),
    "no texts": (b"{}", 422),
    "texts is a text": (b'{"texts": "data_"}', 422),
    "a text is a number": (b'{"texts": [1]}', 422),
    "a text is null": (b'{"texts": [null]}', 422),
    "unknown key": (b'{"texts": [], "target": "Pt"}', 422),
    "no element": (b'{"texts": ["a"], "targets": "Qq"}', 422),
    "no formula": (b'{"texts": ["a"], "targets": "\\ud83d\\ude00"}', 422),
    "target of another type": (b'{"texts": ["a"], "targets": 5}', 422),
    "fewer targets": (b'{"texts": ["a", "b"], "targets": ["Pt"]}', 422),
    "huge count": (b'{"texts": ["a"], "targets": {"Pt": 1e999}}', 422),
    "huge integer": (b'{"texts": ["a"], "targets": {"Pt": ' + b"9" * 5000 + b"}}", 422),
    "negative count": (b'{"texts": ["a"], "targets": {"Pt": -1}}', 422),
    "half a pair is a symbol": (b'{"texts": ["a"], "targets": "{\\"\\\\ud800\\": -1}"}', 422),
    "count is a text": (b'{"texts": ["a"], "targets": {"Pt": "1"}}', 422),
    "no element without a count": (b'{"texts": ["a"], "targets": {"Qq": null}}', 422),
    "count is true": (b'{"texts": ["a"], "targets": {"Pt": true}}', 422),
    "long target": (b'{"texts": ["a"], "targets": "' + b"Pt" * 501 + b'"}', 422),
    "too many texts": (b'{"texts": [' + b'"a",' * 50 + b'"a"]}', 422),
    "text too long": (b'{"texts": ["' + b"a" * 100_001 + b'"]}', 422),
    "body too long": (b'{"texts": ["' + b"a" * (1 << 20) + b'"]}', 413),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_wrong_gets_a_4xx_and_nothing_else_happens(port: int, case: str) -> None:
    before = gauges(port)
    body, expected = HOSTILE[case]
    status, headers, answer = ask(port, "/v1/score", body)
    assert status == expected
    assert isinstance(answer["error"], str) and 5 < len(answer["error"]) <= 500
    assert answer["request_id"] == headers["x-request-id"]
    query = body.replace(b'"texts"', b'"query"').replace(b'"targets"', b'"labels"')
    assert ask(port, "/get_reward", query)[0] in (200, 400, 413, 422)
    after = gauges(port)
    assert after["rewards_fast_queue_requests"] == after["rewards_fast_held_bytes"] == 0
    assert after["rewards_fast_requests_total//v1/score/" + str(expected)] >= 1
    texts = {k: v for k, v in after.items() if k.startswith("rewards_fast_texts_total")}
    if case != "unknown key":  # which OpenRLHF's protocol allows
        assert all(before.get(k, 0) == v for k, v in texts.items()) or case in ("byte order mark",)


def test_openrlhf_endpoint_refuses_too(port: int) -> None:
    nested = b'{"query": [], "more": ' + b"[" * 100_000
    assert ask(port, "/get_reward", nested)[0] == 400
    assert ask(port, "/get_reward", {"query": ["a"], "prompts": []})[0] == 422
    assert ask(port, "/get_reward", {"query": ["a"], "labels": ["Qq"]})[0] == 422
    assert ask(port, "/get_reward", {"query": "a"})[0] == 422


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("nearr=1", "did you mean `near`"),
        ("near=", "number"),
        ("near", "query string"),
        ("near=nan", "number"),
        ("near=1e999", "finite"),
        ("near=1_0", "number"),
        ("near=%F0%9F%98%80", "number"),
        ("near=%ff", "query string"),
        ("near=1&near=2", "twice"),
        ("threads=4", "belongs to the server"),
        ("diagnostics=yes", "true or false"),
        ("extract=1", "true or false"),
        ("comp=-1", "from 0"),
        ("&" * 10, "query string"),
        ("a=1&" * 60 + "b=2", "query string"),
    ],
)
def test_wrong_queries(port: int, query: str, says: str) -> None:
    status, _, answer = ask(port, f"/v1/score?{query}", {"texts": []})
    assert status == 422 and says in answer["error"]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "application/jsonp"},
        {**JSON, "content-encoding": "gzip"},
    ],
)
def test_other_content_types(port: int, headers: dict[str, str]) -> None:
    assert ask(port, "/v1/score", b'{"texts": []}', headers=headers)[0] == 415


def test_paths_and_methods(port: int) -> None:
    assert ask(port, "/v1/score", method="GET")[0] == 405
    status, headers, answer = ask(port, "/nothing%0d%0ahere", {"texts": []})
    assert status == 404 and answer["request_id"] == headers["x-request-id"]
    assert ask(port, "/healthz", method="GET")[::2] == (200, {"status": "ok"})
    assert ask(port, "/readyz", method="GET")[::2] == (200, {"status": "ready"})
    assert set(ask(port, "/openapi.json", method="GET")[2]["paths"]) >= {"/v1/score", "/get_reward"}


def test_the_page_is_whole_and_needs_nobody_else(port: int) -> None:
    _, headers, page = ask(port, "/docs", method="GET")
    schema = ask(port, "/openapi.json", method="GET")[2]
    assert headers["content-type"].startswith("text/html")
    for path, methods in schema["paths"].items():
        assert all(f"{method.upper()} {path}<" in page for method in methods)
    for key in schema["paths"]["/v1/score"]["post"]["parameters"]:
        assert f"<td>{key['name']}</td>" in page
    opened: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            opened.append(tag)
            assert not any(name == "src" or "//" in (value or "") for name, value in attrs)

        def handle_endtag(self, tag: str) -> None:
            while opened.pop() not in (tag, "h1"):
                assert opened[-1] in ("meta", "input", "html", tag), (tag, opened)

    reader = Reader()
    reader.feed(page)
    assert "//" not in page.replace("://127.0.0.1", "") and "import" not in page


def raw(port: int, data: bytes, seconds: float = 20.0) -> bytes:
    """What comes back for bytes, until the server closes or nothing more comes."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        connection.sendall(data)
        found = b""
        try:
            while chunk := connection.recv(65536):
                found += chunk
        except TimeoutError:
            pass
        return found


POST = b"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


def test_bytes_that_are_no_http(port: int) -> None:
    assert raw(port, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20).startswith(b"HTTP/1.1 400")
    assert raw(port, b"POST /v1/score HTTP/1.1\r\ncontent-length: -5\r\n\r\n").startswith(b"HTTP/1.1 400")
    both = b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"
    assert raw(port, POST + both).startswith(b"HTTP/1.1 400")
    assert raw(port, b"GET / HTTP/1.1\r\nx: " + b"a" * 66_000).startswith(b"HTTP/1.1 431")
    assert raw(port, POST + b"connection: close\r\nupgrade: websocket\r\n\r\n").startswith(b"HTTP/1.1 400")


def test_chunked_bodies_and_claimed_lengths(port: int) -> None:
    body = b'{"texts": ["x"]}'
    chunks = b"".join(b"1\r\n%c\r\n" % c for c in body) + b"0\r\n\r\n"
    closing = b"connection: close\r\n"
    assert b'"total":[-15.0]' in raw(port, POST + closing + b"transfer-encoding: chunked\r\n\r\n" + chunks)
    claimed = raw(port, POST + b"content-length: 99999999999\r\n\r\n")
    assert claimed.startswith(b"HTTP/1.1 413") and b"connection: close" in claimed
    expecting = raw(port, POST + b"expect: 100-continue\r\ncontent-length: 99999999\r\n\r\n")
    assert expecting.startswith(b"HTTP/1.1 413")  # at once, and no 100
    endless = b"transfer-encoding: chunked\r\n\r\n" + (b"10000\r\n" + b"a" * 65536 + b"\r\n") * 17
    assert raw(port, POST + endless + b"0\r\n\r\n", 3).startswith(b"HTTP/1.1 413")
    assert gauges(port)["rewards_fast_held_bytes"] == 0


# Clients that pipeline, that do not read
# -----------------------------------------------------------------------------


def test_requests_in_one_piece_are_answered_in_their_order(port: int) -> None:
    """Small, large, wrong and small ones written together, without waiting."""
    bodies = [
        b'{"texts": ["x"]}',
        json.dumps({"texts": ["y" * 20_000] * 2}).encode(),
        b"{",
        b'{"texts": []}',
    ] * 5
    pieces = [POST + b"content-length: %d\r\n\r\n" % len(body) + body for body in bodies]
    last = (POST + b"connection: close\r\ncontent-length: 2\r\n\r\n{}",)
    found = raw(port, b"".join((*pieces, *last)))
    heads = re.findall(rb"HTTP/1.1 (\d+)", found)
    assert heads == [b"200", b"200", b"400", b"200"] * 5 + [b"422"]
    assert [x.count(b",") for x in re.findall(rb'"total":(\[.*?\])', found)] == [0, 1, 0] * 5


def test_a_deaf_client_of_small_requests_is_not_read_on() -> None:
    """It asks without reading: the server stops to take more, answers others, and goes on once it is read."""
    data = json.dumps({"texts": ["x"] * 1000}).encode()
    request = POST + b"content-length: %d\r\n\r\n" % len(data) + data
    with running() as port, socket.create_connection(("127.0.0.1", port), timeout=2) as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        sent = 0
        try:
            while sent < 200 << 20:
                sent += deaf.send((request * 50)[sent % len(request) :])
        except TimeoutError:
            pass
        assert sent < 50 << 20  # what the buffers of the system hold
        assert ask(port, "/v1/score", {"texts": [SLAB]})[0] == 200
        deaf.settimeout(20)
        found = b"".join(deaf.recv(1 << 20) for _ in range(10))
        assert found.count(b"HTTP/1.1 200 OK") == found.count(b"HTTP/1.1") > 2


@pytest.mark.parametrize("texts", [4000, 1000])
def test_a_deaf_client_that_leaves_is_no_fault(texts: int, caplog: pytest.LogCaptureFixture) -> None:
    """It asks many times without reading and goes away while an
    answer is being made or waits to be written."""
    data = json.dumps({"texts": ["x"] * texts}).encode()
    request = POST + b"content-length: %d\r\n\r\n" % len(data) + data
    with running() as port:
        for _ in range(2):
            with socket.create_connection(("127.0.0.1", port), timeout=1) as deaf:
                deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 12)
                with pytest.raises(TimeoutError):
                    sent = 0
                    while sent < 200 << 20:
                        sent += deaf.send((request * 50)[sent % len(request) :])
        for _ in range(50):
            time.sleep(0.1)
            found = gauges(port)
            if found["rewards_fast_queue_requests"] == found["rewards_fast_held_bytes"] == 0:
                break
        else:
            raise AssertionError(found)
        assert ask(port, "/v1/score", {"texts": [SLAB]})[0] == 200
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]


# What other clients send, and what attackers do
# -----------------------------------------------------------------------

UPGRADE = (
    b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: "
    b"AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\n"
)
SMUGGLED = (
    b"POST /get_reward HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 13\r\n\r\n"
)


def framed(body: bytes, chunked: bool) -> bytes:
    if chunked:
        return b"transfer-encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    return b"content-length: %d\r\n\r\n" % len(body) + body


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(
    "upgrade", [UPGRADE, UPGRADE.replace(b"h2c", b"websocket"), UPGRADE.replace(b"h2c", b"h2c, foo/2")]
)
def test_an_offer_to_upgrade_is_a_plain_request(port: int, upgrade: bytes, chunked: bool) -> None:
    """JDK's HttpClient offers HTTP/2 with the first request of a connection and goes on in HTTP/1.1."""
    body = json.dumps({"texts": [SLAB], "targets": TARGET}).encode()
    first = POST + upgrade + framed(body, chunked)
    second = POST + b"connection: close\r\n" + framed(b'{"texts": ["x"]}', chunked)
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        head, _, rest = first.partition(b"\r\n\r\n")
        for piece in (head + b"\r\n\r\n", rest[:20], rest[20:], second):
            connection.sendall(piece)
            time.sleep(0.02)
        found = b""
        while chunk := connection.recv(65536):
            found += chunk
    assert re.findall(rb"HTTP/1.1 (\d+)", found) == [b"200", b"200"]
    assert re.findall(rb'"total":\[(.*?)\]', found) == [b"10.0", b"-15.0"]


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("more", [UPGRADE, UPGRADE + b"expect: 100-continue\r\n", b"", b"upgrade: h2c\r\n"])
def test_a_body_is_never_run_as_a_request(port: int, more: bytes, chunked: bool) -> None:
    before = gauges(port)
    body = SMUGGLED + b'{"query":[1]}'
    found = raw(
        port, POST + more + framed(body, chunked) + POST + b"connection: close\r\n" + framed(b"{", False), 5
    )
    statuses = re.findall(rb"HTTP/1.1 (\d+)", found)
    assert [x for x in statuses if x != b"100"] == [b"400", b"400"]
    after = gauges(port)
    changed = {k for k, v in after.items() if "requests_total/" in k and v != before.get(k, 0)}
    assert changed == {
        "rewards_fast_requests_total//v1/score/400",
        "rewards_fast_requests_total//metrics/200",
    }


@pytest.mark.parametrize(
    "head",
    [
        b"content-length: 5\r\ncontent-length: 60\r\n",
        b"content-length: 5, 60\r\n",
        b"content-length: +5\r\n",
        b"content-length : 5\r\n",
        b"content-length: 5\r\ntransfer-encoding: chunked\r\n",
        b"transfer-encoding: chunked\r\ncontent-length: 5\r\n",
        b"transfer-encoding: gzip, chunked\r\n",
        b"transfer-encoding: identity\r\n",
        b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n",
        b"x: a\r\n transfer-encoding: chunked\r\ncontent-length: 5\r\ntransfer-encoding: xchunked\r\n",
    ],
)
def test_two_ends_of_one_body_end_the_connection(port: int, head: bytes) -> None:
    """Where two readers could see different ends, there is one 400 and nothing behind it is read."""
    found = raw(port, POST + head + b"\r\n" + b"0\r\n\r\n" + SMUGGLED + b'{"query":[1]}', 5)
    assert re.findall(rb"HTTP/1.1 (\d+)", found) == [b"400"] and b"connection: close" in found.lower()


def test_half_of_a_surrogate_pair_costs_its_text_alone(port: int) -> None:
    body = json.dumps({"texts": [SLAB, "\ud800", "data_\udfff", "\U0001f600", SLAB]}).encode()
    assert b"\\ud800" in body
    status, _, scores = ask(port, "/v1/score?comp=0", body)
    assert status == 200 and scores["total"] == pytest.approx([4, -6, -6, -6, 4])
    assert scores["reason"][1:4] == PVCP().score(["\ud800", "data_\udfff", "\U0001f600"]).reason
    upper = b'{"query": ["\\uD800"], "labels": ["Pt"]}'
    assert ask(port, "/get_reward", upper)[2]["rewards"] == [-15]
    assert ask(port, "/v1/score", b'{"texts": ["x"], "targets": "\\ud800"}')[0] == 422


def test_conversations_are_scored_by_their_last_assistant_message(port: int) -> None:
    loop = [
        {"role": "user", "content": TARGET},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
        {"role": "tool", "content": SLAB, "tool_call_id": "1"},
    ]
    said = [{"type": "text", "text": SLAB}, {"type": "image_url", "image_url": {"url": "x"}}]
    texts = [
        [*loop, {"role": "assistant", "content": said}],
        [*loop, {"role": "assistant", "content": "No idea."}],
        [{"role": "assistant", "content": SLAB}, loop[2], {"role": "assistant", "content": "Done."}],
        f"I ask.<tool_response>{SLAB}</tool_response>No idea.",
        [],
    ]
    body = {"texts": texts, "targets": TARGET}
    assert ask(port, "/v1/score", body)[2]["total"] == pytest.approx([10, -15, -15, -15, -15])
    assert ask(port, "/v1/score?answer=any", body)[2]["total"] == pytest.approx([10, -15, 10, -15, -15])
    for wrong in ([{"role": 1}], [{"content": 5}], [["a"]], [None], {"role": "user"}):
        assert ask(port, "/v1/score", {"texts": [wrong]})[0] == 422
    tool = (
        f"<|im_end|>\n<|im_start|>user\n<tool_response>\n{SLAB}\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    query = {"query": [TARGET + "I ask." + tool + "No idea."], "prompts": [TARGET]}
    assert ask(port, "/get_reward", query)[2]["rewards"] == [-15]


def test_missing_targets_are_counted_told_once_and_refused_by_setting(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with running() as port:
        for body in ({"texts": [SLAB] * 3, "targets": ["Pt", None, ""]}, {"texts": [SLAB]}):
            assert ask(port, "/v1/score", body)[0] == 200
        ask(port, "/get_reward", {"query": [SLAB] * 2, "prompts": ["A slab.", TARGET]})
        assert gauges(port)["rewards_fast_missing_targets_total"] == 4
        told = [r.getMessage() for r in caplog.records if "no target composition" in r.getMessage()]
        assert [x.partition(":")[0] for x in told] == ["/v1/score", "/get_reward"]
        detail = ask(port, "/v1/score?diagnostics=true", {"texts": [SLAB] * 2, "targets": ["Pt", None]})[2]
        assert detail["diagnostics"]["no_target"] == [False, True]
        status, _, answer = ask(
            port, "/v1/score?missing_target=error", {"texts": [SLAB] * 2, "targets": ["Pt", None]}
        )
        assert status == 422 and "row 1 has no target composition" in answer["error"]
        assert ask(port, "/get_reward?missing_target=error", {"query": [SLAB], "prompts": ["?"]})[0] == 422
        assert ask(port, "/v1/score?missing_target=error&comp=0", {"texts": [SLAB]})[0] == 200


def test_a_small_body_of_giant_cells_blocks_nobody() -> None:
    """20 KB name 172,800 sites; sixteen clients send such bodies without a pause."""
    spread = [[i * k % 1 for k in (0.61803399, 0.41421356, 0.73205081)] for i in range(1, 901)]
    sites = "".join("H {:.4f} {:.4f} {:.4f}\n".format(*row).replace("0.", ".") for row in spread)
    cell = "".join(
        f"_cell_length_{a} 99\n_cell_angle_{b} 90\n" for a, b in zip("abc", ("alpha", "beta", "gamma"))
    )
    giant = (
        f"data_x\n_symmetry_space_group_name_H-M 'F m -3 m'\n{cell}loop_\n_atom_site_label\n"
        "_atom_site_fract_x\n"
        f"_atom_site_fract_y\n_atom_site_fract_z\n{sites}"
    )
    assert PVCP().score([giant]).n_sites[0] > 100_000
    body = json.dumps({"texts": [giant]}).encode()
    assert len(body) < 21_000
    request = POST + b"content-length: %d\r\n\r\n" % len(body) + body
    with command() as (_, port, _):
        attackers = [socket.create_connection(("127.0.0.1", port), timeout=60) for _ in range(16)]
        for attacker in attackers:
            attacker.sendall(request * 3)
        seconds = []
        for _ in range(20):
            begin = time.perf_counter()
            assert ask(port, "/healthz", method="GET")[0] == 200
            seconds.append(time.perf_counter() - begin)
            time.sleep(0.05)
        for attacker in attackers:
            attacker.close()
        # 3 s where it was scored on the loop
        assert sorted(seconds)[10] < 0.5 and max(seconds) < 2.0, seconds


def test_idle_connections_cost_nobody_an_answer() -> None:
    """As many as the server keeps, silent ones and kept ones; the next one is let in,
    and those idle longest go."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096) if hard > 0 else 4096, hard))
    try:
        with command() as (_, port, _):
            kept = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            idle = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(1100)]
            for _i in range(20):
                assert ask(port, "/healthz", method="GET")[0] == 200
                kept.request("GET", "/readyz")
                assert kept.getresponse().read() == b'{"status":"ready"}'
                assert ask(port, "/v1/score", {"texts": [SLAB]})[0] == 200
            gone = 0
            for connection in idle[:80]:
                connection.settimeout(0.01)
                with suppress(TimeoutError):
                    gone += connection.recv(1) == b""
            assert gone >= 70  # the oldest of them
            for connection in idle:
                connection.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# Tokens, ids, metrics
# ----------------------------------------------------------------------------------------------


def test_tokens() -> None:
    with running(token="s3cret:ä") as port:
        body = {"texts": ["x"]}

        def status(path: str, credentials: str | None, method: str = "POST") -> int:
            headers = JSON if credentials is None else {**JSON, "authorization": credentials}
            return ask(port, path, body if method == "POST" else None, method, headers)[0]

        token = "s3cret:ä".encode().decode("latin-1")
        for wrong in (
            None,
            "",
            "Bearer",
            "Bearer wrong",
            "Bearer s3cret:",
            "Basic !!!",
            "Basic czNjcmV0",
            "x",
        ):
            assert status("/v1/score", wrong) == 401
        assert (
            status("/v1/score", f"Bearer {token}") == status("/get_reward", f"bearer  {token}") - 222 == 200
        )
        assert status("/v1/score", "Basic eDpzM2NyZXQ6w6Q=") == 200  # the password of http://x:TOKEN@host
        assert status("/metrics", None, "GET") == status("/docs", None, "GET") == 401
        assert status("/healthz", None, "GET") == status("/readyz", None, "GET") == 200
        assert ask(port, "/v1/score", body)[1]["www-authenticate"] == "Bearer"
        large = b"x" * 300_000
        assert ask(port, "/v1/score", large)[0] == 401  # the body is read before the connection closes


def test_request_ids_are_in_the_answer_and_in_the_log(port: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "rewards_fast.server")
    given = {**JSON, "x-request-id": "job-7.step_3"}
    assert ask(port, "/v1/score", {"texts": ["x", "y"]}, headers=given)[1]["x-request-id"] == "job-7.step_3"
    for bad in ("a b", "a" * 65, "x\x85y", ""):
        found = ask(port, "/v1/score", {"texts": []}, headers={**JSON, "x-request-id": bad})[1]
        assert re.fullmatch("[0-9a-f]{16}", found["x-request-id"])
    ask(port, "/%0aforged%20line", method="GET")
    lines = [r.getMessage() for r in caplog.records if r.name == "rewards_fast.server"]
    assert any(
        re.search(r"request_id=job-7\.step_3 .*path=/v1/score status=200 ms=\S+ texts=2", x) for x in lines
    )
    assert not any("\n" in line for line in lines)


def test_metrics_count(port: int) -> None:
    before = gauges(port)
    ask(port, "/v1/score", {"texts": [SLAB, SLAB, "no"], "targets": TARGET})
    after = gauges(port)

    def change(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert change("rewards_fast_texts_total/parses") == 2 and change("rewards_fast_texts_total/no_block") == 1
    assert change("rewards_fast_requests_total//v1/score/200") == 1
    assert change("rewards_fast_request_seconds_count//v1/score") == 1
    for stage in ("decode", "score", "encode"):
        assert change(f"rewards_fast_stage_seconds_total/{stage}") > 0
    assert after["process_resident_memory_bytes"] > 1e7


# Clients that stall, more than there is room for
# -------------------------------------------------------------------


def test_a_client_that_stalls_blocks_nobody_and_goes() -> None:
    limits = Limits(header_seconds=1.5, body_seconds=1.5, queue=4)
    with running(limits=limits) as port:
        stalled = []
        for start in (
            b"",
            b"POST /v1/sc",
            POST,
            POST + b"content-length: 100\r\n\r\n",
            POST + b"content-length: 100\r\n\r\n{",
        ):
            for _ in range(10):
                stalled.append(socket.create_connection(("127.0.0.1", port), timeout=20))
                stalled[-1].sendall(start)
        deaf = socket.create_connection(("127.0.0.1", port), timeout=20)  # asks much and reads nothing
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = json.dumps({"texts": ["x"] * 4000}).encode()
        deaf.sendall((POST + b"content-length: %d\r\n\r\n" % len(body) + body) * 20)
        for _ in range(10):
            begin = time.perf_counter()
            assert ask(port, "/v1/score", {"texts": [SLAB]})[0] == 200
            assert time.perf_counter() - begin < 1.0
        answers = set()
        for i, connection in enumerate(stalled):
            if i % 10 == 1:  # one of each kind drips on, a byte at a time
                for _ in range(3):
                    try:
                        connection.sendall(b"x")
                    except OSError:
                        break
                    time.sleep(0.02)
            data = b""
            while chunk := connection.recv(65536):
                data += chunk
            answers.add(data[:12])
            connection.close()
        assert answers <= {b"HTTP/1.1 408", b"HTTP/1.1 400"} and b"HTTP/1.1 408" in answers
        deaf.close()
        assert gauges(port)["rewards_fast_held_bytes"] == 0
        assert ask(port, "/v1/score", {"texts": [SLAB]})[0] == 200


def test_more_than_the_queue_holds_is_refused_with_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    go, entered = threading.Event(), threading.Semaphore(0)
    score = PVCP.score

    def slow(self: PVCP, texts: Any, targets: Any = None) -> Any:
        if texts == ["slow"]:
            entered.release()
            assert go.wait(20)
        return score(self, texts, targets)

    with running(limits=Limits(queue=3)) as port:
        monkeypatch.setattr(PVCP, "score", slow)
        answers: list[Answer] = []
        waiting = [
            threading.Thread(target=lambda: answers.append(ask(port, "/v1/score", {"texts": ["slow"]})))
            for _ in range(3)
        ]
        for thread in waiting:
            thread.start()
        entered.acquire()
        while gauges(port)["rewards_fast_queue_requests"] < 3:
            time.sleep(0.01)
        status, headers, answer = ask(port, "/v1/score", {"texts": ["x"]})
        assert (status, headers["retry-after"]) == (503, "1") and "waiting" in answer["error"]
        assert ask(port, "/healthz", method="GET")[0] == 200  # the loop is free
        go.set()
        for thread in waiting:
            thread.join(20)
        assert [a[0] for a in answers] == [200] * 3
        assert ask(port, "/v1/score", {"texts": ["x"]})[0] == 200


def test_more_bytes_than_the_server_holds_are_refused() -> None:
    with running(limits=Limits(body=1 << 20, held=1 << 20)) as port:
        half = POST + b"content-length: 900000\r\n\r\n" + b"a" * 800_000
        with socket.create_connection(("127.0.0.1", port), timeout=20) as first:
            first.sendall(half)
            while gauges(port)["rewards_fast_held_bytes"] < 800_000:
                time.sleep(0.01)
            status, headers, _ = ask(port, "/v1/score", {"texts": ["a" * 300_000]})
            assert (status, headers["retry-after"]) == (503, "1")
            assert ask(port, "/v1/score", {"texts": ["a" * 1000]})[0] == 200
        while gauges(port)["rewards_fast_held_bytes"]:
            time.sleep(0.01)
        assert ask(port, "/v1/score", {"texts": ["a" * 300_000]})[0] == 422 - 222


def test_a_fault_of_the_server_is_a_500_with_an_id(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with running() as port:
        monkeypatch.setattr(PVCP, "score", lambda *_: 1 / 0)
        status, headers, answer = ask(port, "/v1/score", {"texts": ["x"]})
        assert status == 500 and answer == {"error": "internal error", "request_id": headers["x-request-id"]}
        until(lambda: f"request_id={answer['request_id']} failed" in caplog.text)
        assert "ZeroDivisionError" in caplog.text
        monkeypatch.undo()
        assert ask(port, "/v1/score", {"texts": ["x"]})[0] == 200


# The command
# -------------------------------------------------------------------------------------------------------


@contextmanager
def command(*arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], int, list[str]]]:
    """`rewards-fast serve` in a process of its own: the process, its port, the lines of its log so far."""
    process = subprocess.Popen(
        [sys.executable, "-m", "rewards_fast.cli", "serve", "--port", "0", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    lines: list[str] = []
    found = threading.Event()

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if "running on" in line:
                found.set()
        found.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert found.wait(60)
        match = re.search(r"running on http://127\.0\.0\.1:(\d+)", "".join(lines))
        assert match, "".join(lines)
        yield process, int(match.group(1)), lines
    finally:
        process.kill()
        process.wait()
        reader.join(10)


def until(ready: Callable[[], bool], seconds: float = 20.0) -> None:
    """Waits until something holds."""
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.02)


async def client(port: int, stop: asyncio.Event, counts: dict[str, int], texts: int, keep: bool) -> None:
    """Asks over and over, on kept connections or on a new one each time; counts answers,
    and requests and connections that were reset."""
    body = json.dumps({"texts": [SLAB] * texts, "targets": TARGET}).encode()
    close = b"" if keep else b"connection: close\r\n"
    request = POST + close + b"content-length: %d\r\n\r\n" % len(body) + body
    reader = writer = None
    while not stop.is_set():
        if writer is None:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
            except ConnectionRefusedError:
                counts["refused connections"] += 1
                await asyncio.sleep(0.01)
                continue
            except OSError:
                counts["lost"] += 1
                continue
        assert reader is not None
        try:
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
        except (OSError, asyncio.IncompleteReadError):
            counts["lost"] += 1
            writer = None
            continue
        counts[head[9:12].decode()] = counts.get(head[9:12].decode(), 0) + 1
        length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        json.loads(await reader.readexactly(length))
        if b"connection: close" in head:
            counts["told to go"] += 1
            writer.close()
            writer = None


@pytest.mark.parametrize(("texts", "keep"), [(1, True), (64, True), (1, False)])
def test_sigterm_under_load_resets_nothing(texts: int, keep: bool) -> None:
    with command("--drain-seconds", "0.7") as (process, port, lines):
        counts = {"lost": 0, "told to go": 0, "refused connections": 0}
        states: list[int] = []

        async def load() -> None:
            stop = asyncio.Event()
            clients = [asyncio.create_task(client(port, stop, counts, texts, keep)) for _ in range(16)]
            await asyncio.sleep(1.0)
            process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.3)
            states.append((await asyncio.to_thread(ask, port, "/readyz", None, "GET"))[0])
            await asyncio.to_thread(process.wait, 20)
            stop.set()
            await asyncio.gather(*clients)

        asyncio.run(load())
        assert process.returncode == 0 and states == [503]
        assert counts["200"] > 50 and counts["told to go"] > 0 and counts["refused connections"] > 0
        assert set(counts) == {"lost", "told to go", "refused connections", "200"}
        until(lambda: any("Finished server" in line for line in lines))
        assert sum("path=/v1/score status=200" in line for line in lines) == counts["200"]
        assert not any("status=gone" in line or "status=500" in line for line in lines)
        assert counts["lost"] == 0  # neither a request that was read nor a connection that waited is reset


def test_requests_that_are_running_at_sigterm_are_answered() -> None:
    big = json.dumps({"texts": [SLAB * 300] * 60, "targets": TARGET}).encode()
    with command("--drain-seconds", "0") as (process, port, _):
        request = POST + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(big) + big
        answers: list[bytes] = []
        connections = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(6)]

        def send(connection: socket.socket) -> None:
            connection.sendall(request)
            answers.append(connection.recv(12))

        threads = [threading.Thread(target=send, args=(c,)) for c in connections]
        for thread in threads:
            thread.start()
        until(lambda: gauges(port)["rewards_fast_queue_requests"] >= 1)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(30)
        assert process.wait(20) == 0
        assert answers == [b"HTTP/1.1 200"] * 6
        for connection in connections:
            connection.close()


def test_settings_and_token_of_the_command(tmp_path: Path) -> None:
    (tmp_path / "reward.yaml").write_text("near: 0.7\ncomp: 0\n")
    (tmp_path / "token").write_text("sesame\n")
    files = [str(tmp_path / "reward.yaml"), "parse=1", "--token-file", str(tmp_path / "token")]
    with command(*files) as (process, port, lines):
        headers = {**JSON, "authorization": "Bearer sesame"}
        assert ask(port, "/v1/score", {"texts": ["x"]}, headers=headers)[2]["total"] == [-22]
        assert ask(port, "/v1/score?parse=0", {"texts": ["x"]}, headers=headers)[2]["total"] == [-2]
        assert ask(port, "/v1/score", {"texts": ["x"]})[0] == 401
        schema = ask(port, "/openapi.json", method="GET", headers=headers)[2]
        parameters = schema["paths"]["/v1/score"]["post"]["parameters"]
        assert {p["name"]: p["schema"].get("default") for p in parameters}["near"] == 0.7
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert not any("Traceback" in line or "sesame" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nearr=1"], "did you mean `near`"),
        (["a.yaml", "b.yaml"], "one settings file"),
        (["absent.yaml"], "absent.yaml"),
        (["--token-file", "absent"], "absent: cannot be read"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: list[str], says: str) -> None:
    with pytest.raises(SystemExit, match=re.escape(says)):
        main(["serve", *arguments])


def test_a_public_address_without_a_token_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from rewards_fast.server import listen as server

    monkeypatch.setattr(server.DrainingServer, "run", lambda self: None)
    for host, token, warned in (
        ("0.0.0.0", None, True), ("127.0.0.1", None, False), ("::1", None, False),
        ("localhost", None, False), ("0.0.0.0", "t", False), ("node7", None, True),
    ):  # fmt: skip
        caplog.clear()
        server.serve(RewardSettings(), host, 0, token, Limits(), "info")
        assert ("no token is set" in caplog.text) == warned


# The description
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "examples"),
    [("t0ken", 6), *(pytest.param(t, 2000, marks=pytest.mark.slow) for t in ("t0ken", None))],
)
def test_schemathesis_finds_nothing(token: str | None, examples: int, tmp_path: Path) -> None:
    """Requests made from our own OpenAPI, right and wrong ones, against every check that schemathesis has."""
    with running(token=token, limits=Limits(texts=20, chars=2000)) as port:
        arguments = [] if token is None else ["-H", f"Authorization: Bearer {token}"]
        run = subprocess.run(
            [
                sys.executable, "-m", "schemathesis.cli", "run", f"http://127.0.0.1:{port}/openapi.json",
                "--checks", "all", "--mode", "all", "--max-examples", str(examples), "--seed", "1",
                "--no-color", "--request-timeout", "20", "--generation-database", "none", *arguments,
            ],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "SCHEMATHESIS_HOOKS": "schemathesis_hooks",
                 "PYTHONPATH": str(Path(__file__).parent)},
            check=False,
        )  # fmt: skip
        assert run.returncode == 0, run.stdout + run.stderr
        assert "Selected: 5/5" in run.stdout and "No issues found" in run.stdout
        after = gauges(port, {"authorization": f"Bearer {token}"})
        for path in ("/v1/score", "/get_reward"):  # right and wrong requests share the examples
            right, wrong = (after[f"rewards_fast_requests_total/{path}/{status}"] for status in (200, 422))
            assert right + wrong > examples and min(right, wrong) > 0.4 * examples, (path, right, wrong)
        assert not any(name.endswith(("/500", "/503")) for name in after)
