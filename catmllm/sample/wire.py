"""What a trainer and its rollout service say to each other: requests in JSON, tensors as safetensors.

A service (`sample.service`) knows of a model only what it is told. `POST /model` describes one and opens a
session; `PUT /weights` brings its tensors in parts, the last of which makes a version; `POST /sample` asks
for answers by a version. What is refused is a 4xx with a reason: 409 where session or version are others.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt
from safetensors.torch import load, save

from catmllm.config import Config, SamplingConfig
from catmllm.data.batches import Collator
from catmllm.data.prompts import Sample
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.models.lora import adapted
from catmllm.models.state import save_description
from catmllm.sample.answers import Choices, Rollout, ended
from catmllm.structure.system import System, make_system

LARGEST = 4 << 30  # bytes of one request; the largest tensor, an embedding, has 2.5 GB at 72B
PART = 256 << 20  # bytes of tensors in a part, or one tensor
CONFLICT = 409
CONNECT = 10.0  # seconds
_VISUAL = "llm.model.visual."

Word = Annotated[str, Field(max_length=200)]


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Structure(_Message):
    """A System without its label, as lists."""

    lattice: list[list[float]]
    frac: Annotated[list[list[float]], Field(max_length=10_000)]
    numbers: list[int]
    tags: list[int]
    adsorbate: Word
    miller: tuple[int, int, int] | None
    relaxed: bool

    @classmethod
    def of(cls, s: System) -> Structure:
        lists = {name: getattr(s, name).tolist() for name in ("lattice", "frac", "numbers", "tags")}
        return cls(**lists, adsorbate=s.adsorbate, miller=s.miller, relaxed=s.relaxed)

    def system(self) -> System:
        """Raises ValueError for what is no structure."""
        made = make_system(
            self.lattice, None, self.numbers, self.tags, self.adsorbate, self.miller, frac=self.frac
        )
        return replace(made, relaxed=self.relaxed)


class Prompt(_Message):
    """A prompt, the structure behind its marker, the system that is asked for (identity line, atoms by
    element, whether by a design prompt), and the most tokens of an answer."""

    text: Annotated[str, Field(max_length=100_000)]
    structure: Structure | None
    identity: Word
    target: Annotated[dict[str, PositiveInt], Field(max_length=120)]
    design: bool
    limit: PositiveInt


class Ask(_Message):
    """Answers that are wanted: `group_size` to each prompt, by the weights of this version."""

    session: Word
    version: NonNegativeInt
    temperature: Annotated[float, Field(gt=0)]
    top_p: Annotated[float, Field(gt=0, le=1)]
    grammar: bool
    stop: Annotated[tuple[Word, ...], Field(max_length=20)]
    seed: Annotated[list[int], Field(max_length=20)]
    group_size: Annotated[int, Field(gt=0, le=4096)]
    prompts: Annotated[list[Prompt], Field(max_length=65_536)]

    @property
    def sampling(self) -> SamplingConfig:
        return SamplingConfig(self.temperature, self.top_p, None, self.grammar, self.stop)


class Description(_Message):
    """A model without its weights: the text files of an export, and whether its LLM has adapters."""

    session: Word
    adapters: bool
    files: Annotated[
        dict[Annotated[str, Field(pattern=r"^(llm/)?[A-Za-z0-9_]+\.[a-z]+$")], str], Field(max_length=50)
    ]

    @classmethod
    def of(cls, session: str, model: CatalyticMLLM, collate: Collator, config: Config) -> Description:
        with tempfile.TemporaryDirectory() as folder:
            save_description(Path(folder), model, config, collate)
            paths = [p for p in Path(folder).rglob("*") if p.is_file()]
            files = {p.relative_to(folder).as_posix(): p.read_text(encoding="utf-8") for p in paths}
        return cls(session=session, adapters=bool(adapted(model)), files=files)

    def write(self, folder: Path) -> None:
        (folder / "llm").mkdir()
        for name, text in self.files.items():
            (folder / name).write_text(text, encoding="utf-8")


def sampled_with(name: str) -> bool:
    """Whether sampling reads the parameter or buffer of this name; pictures stand in no prompt for a CIF."""
    return name.startswith(("llm.", "encoder.", "projector.")) and not name.startswith(_VISUAL)


def answers_to_bytes(rollouts: Sequence[Rollout], version: int, seconds: dict[str, float]) -> bytes:
    """Tokens, log-probabilities and choices of answers, and who made them in how many seconds."""

    def joined(parts: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        return torch.cat([torch.zeros(0, dtype=dtype), *parts]).to(dtype)

    def lengths(parts: Sequence[Any]) -> torch.Tensor:
        return torch.tensor([len(p) for p in parts], dtype=torch.int64)

    out = {
        "version": torch.tensor([version]),
        "seconds": torch.tensor([seconds["prefill"], seconds["decode"]], dtype=torch.float64),
        "ids": joined([r.ids for r in rollouts], torch.int64),
        "logprob": joined([r.logprob for r in rollouts], torch.float32),
        "lengths": lengths([r.ids for r in rollouts]),
    }
    choices = [r.choices for r in rollouts if r.choices is not None]
    if choices:
        # A set that many tokens share is one object, here and where it is read.
        sets = {id(s): s.cpu() for c in choices for s in c.sets}
        number = {key: k for k, key in enumerate(sets)}
        out |= {
            "at": joined([c.at for c in choices], torch.int64),
            "choices": lengths([c.at for c in choices]),
            "set": torch.tensor([number[id(s)] for c in choices for s in c.sets], dtype=torch.int64),
            "words": joined(list(sets.values()), torch.int32),
            "sizes": lengths(list(sets.values())),
        }
    return save(out)


def answers_of_bytes(reply: bytes, collate: Collator, ask: Ask) -> tuple[list[Rollout], dict[str, float]]:
    """The answers to what was asked, and the seconds that the service spent. Raises ValueError for others."""
    found = load(reply)
    if int(found["version"]) != ask.version:
        raise ValueError(f"answers by weights {int(found['version'])}, not {ask.version}")
    n = len(ask.prompts) * ask.group_size
    if len(found["lengths"]) != n:
        raise ValueError(f"{len(found['lengths'])} answers, not {n}")
    # Clones: a part that is sent on to another rank must not take the whole with it.
    ids, logprob = (
        [t.clone() for t in found[k].split(found["lengths"].tolist())] for k in ("ids", "logprob")
    )
    choices: list[Choices | None] = [None] * n
    if "at" in found:
        sets = [t.long() for t in found["words"].split(found["sizes"].tolist())]
        counts = found["choices"].tolist()
        of = [tuple(sets[k] for k in part.tolist()) for part in found["set"].split(counts)]
        choices = [Choices(at.clone(), s) for at, s in zip(found["at"].split(counts), of)]
    rollouts = [
        ended(
            collate, i // ask.group_size, ids[i], logprob[i], None, ask.stop, choices[i],
            ask.prompts[i // ask.group_size].limit,
        )
        for i in range(n)
    ]  # fmt: skip
    return rollouts, dict(zip(("prefill", "decode"), found["seconds"].tolist()))


def prompts_of(
    samples: Sequence[Sample], asked: Sequence[System], designs: Sequence[bool], limits: Sequence[int]
) -> list[Prompt]:
    """Prompts for systems, of which some ask for designs, as a service takes them."""
    return [
        Prompt(
            text=sample.prompt,
            structure=None if sample.graph is None else Structure.of(sample.graph),
            identity=s.identity,
            target=s.target,
            design=design,
            limit=limit,
        )
        for sample, s, design, limit in zip(samples, asked, designs, limits, strict=True)
    ]


class Unreachable(ConnectionError):
    """The service is not there, or went away before it had answered: it may be asked again."""


class Refused(RuntimeError):
    """The service's 4xx or 5xx."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Client:
    """A rollout service at an address, http://host:port. An answer may take `patience` seconds."""

    def __init__(self, address: str, patience: float) -> None:
        self.address, self.patience = address, patience
        self._open: set[http.client.HTTPConnection] = set()

    def state(self, timeout: float = CONNECT) -> dict[str, Any]:
        """Its `session` and `version`, null where there is none."""
        return json.loads(self._call("GET", "/", b"", timeout))

    def describe(self, description: Description) -> None:
        self._call("POST", "/model", description.model_dump_json().encode())

    def weights(self, session: str, version: int, part: int, last: bool, body: bytes) -> None:
        """Part `part` of a version's tensors, as safetensors."""
        query = f"session={session}&version={version}&part={part}&last={int(last)}"
        self._call("PUT", f"/weights?{query}", body)

    def sample(self, ask: Ask) -> bytes:
        return self._call("POST", "/sample", ask.model_dump_json().encode())

    def wait(self) -> dict[str, Any]:
        """Its state, once it is there. Raises Unreachable after `patience` seconds."""
        until, pause = time.monotonic() + self.patience, 0.1
        while True:
            try:
                return self.state()
            except Unreachable:
                if time.monotonic() > until:
                    raise
            time.sleep(pause)
            pause = min(2 * pause, 2.0)

    def close(self) -> None:
        """Break off what is under way in other threads."""
        for link in list(self._open):
            if link.sock is not None:
                with contextlib.suppress(OSError):
                    link.sock.shutdown(socket.SHUT_RDWR)

    def _call(self, method: str, path: str, body: bytes, timeout: float | None = None) -> bytes:
        where = urlsplit(self.address)
        link = http.client.HTTPConnection(where.hostname or "", where.port or 80, timeout=CONNECT)
        self._open.add(link)
        try:
            link.connect()
            # One whose machine is gone sends nothing, not even an end.
            link.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            link.sock.settimeout(timeout or self.patience)
            link.request(method, path, body)
            response = link.getresponse()
            found = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(f"{self.address}: {type(error).__name__}: {error}") from error
        finally:
            self._open.discard(link)
            link.close()
        if response.status != http.client.OK:
            raise Refused(response.status, found.decode(errors="replace")[:1000])
        return found
