"""The trainer's side of a rollout service (`sample.service`): weights go there, answers come back.

The main rank sends the weights, once a version and only those that train; every rank asks for answers of its
own. A service that was lost is waited for, given what it lacks, and asked again.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import save
from torch.distributed.tensor import DTensor

from catmllm.config import GRPOConfig
from catmllm.data.prompts import Sample
from catmllm.sample.answers import Rollout
from catmllm.sample.wire import (
    CONFLICT,
    PART,
    Ask,
    Client,
    Description,
    Prompt,
    Refused,
    Unreachable,
    answers_of_bytes,
    sampled_with,
)
from catmllm.stages.scoring import Scored, Scoring
from catmllm.train.sharding import whole
from catmllm.train.stage import Context
from catmllm.train.stop import TrainingError
from catmllm.world import DTYPES, encoder_dtype

TRIES = 5  # of one step's answers, each after the service was there again


Answered = tuple[list[Rollout], Scored, dict[str, float]]  # and the seconds of sampling by part


@dataclass
class Asked:
    """Answers of this rank that are wanted, or on their way. `step`: the one they are for; `samples`: their
    prompts; `reply`: what the service said, once it has."""

    step: int
    samples: list[Sample]
    ask: Ask
    scoring: Scoring
    future: Future[Answered] = field(default_factory=Future)
    reply: bytes = b""

    def kept(self) -> dict[str, Any]:
        """What a checkpoint holds of answers that have come, as JSON."""
        reply = base64.b64encode(self.reply).decode()
        return {"step": self.step, "version": self.ask.version, "what": self._what(), "reply": reply}

    def take(self, kept: dict[str, Any]) -> bool:
        """Take the answers that a checkpoint holds; false where they are to other prompts."""
        if kept["what"] != self._what():
            return False
        self.ask.version, self.reply = kept["version"], base64.b64decode(kept["reply"])
        return True

    def _what(self) -> str:
        """What is asked, by whichever weights."""
        asked = self.ask.model_dump_json(exclude={"session", "version"})
        return hashlib.sha256(asked.encode()).hexdigest()


class Remote:
    """A session with a service. All methods are called by all ranks together."""

    def __init__(self, context: Context, config: GRPOConfig) -> None:
        """The model must be sharded, or whole for good."""
        c = self.context = context
        self.config = config
        self.client = Client(config.service, config.service_patience)
        self.session: str = c.world.gather(secrets.token_hex(8))[0]
        self.version: int | None = None  # of the weights that were sent last
        self.sent: list[bytes] = []  # those that train, in parts; on the main rank
        names = [n for n in c.model.state_dict() if sampled_with(n)]
        self.parameters: dict[str, Any] = dict((*c.model.named_parameters(), *c.model.named_buffers()))
        self.trained = [n for n in names if self.parameters[n].requires_grad]
        self.frozen = [n for n in names if not self.parameters[n].requires_grad]
        self.pool = ThreadPoolExecutor(1, "catmllm-rollouts")
        self.seconds = {"sync": 0.0, "rollouts": 0.0}  # of sending weights, of waiting for answers

    def publish(self, version: int) -> None:
        """Have the service sample with the weights of this moment from now on."""
        if version != self.version:
            began = time.perf_counter()
            self.sent, self.version = [*self._parts(self.trained)], version
            self._deliver()
            self.seconds["sync"] += time.perf_counter() - began

    def asked(
        self,
        step: int,
        samples: list[Sample],
        prompts: list[Prompt],
        seed: Sequence[int],
        group_size: int,
        scoring: Scoring,
    ) -> Asked:
        """What `begin` asks for: answers by the weights that were sent last."""
        p = self.config.sampling
        ask = Ask(
            session=self.session, version=self.version or 0, temperature=p.temperature, top_p=p.top_p,
            grammar=p.grammar, stop=p.stop, seed=list(seed), group_size=group_size, prompts=prompts,
        )  # fmt: skip
        return Asked(step, samples, ask, scoring)

    def begin(self, asked: Asked) -> Asked:
        """Ask, and go on; what has been answered already is only scored."""
        asked.future = self.pool.submit(self._work, asked)
        return asked

    def resume(self, asked: Asked, kept: dict[str, Any]) -> Asked | None:
        """Go on with the answers that a checkpoint holds; None where any rank would ask for others now."""
        return self.begin(asked) if all(self.context.world.gather(asked.take(kept))) else None

    def _work(self, asked: Asked) -> Answered:
        """In a thread: ask, and have the answers scored as soon as they are there."""
        rollouts: list[Rollout] = []
        seconds: dict[str, float] = {}
        if asked.ask.prompts:  # none on a rank that waits for others which sample again
            asked.reply = asked.reply or self.client.sample(asked.ask)
            rollouts, seconds = answers_of_bytes(asked.reply, self.context.collate, asked.ask)
            for i, r in enumerate(rollouts):
                asked.scoring.take(i, r.text)
        return rollouts, asked.scoring.finish(), seconds

    def collect(self, asked: Asked) -> Answered:
        """The answers, their rewards, and the seconds of sampling by part, when they have come."""
        began = time.perf_counter()
        for _ in range(TRIES):
            lost, problem = False, None
            try:
                asked.future.result()
            except Unreachable as error:
                lost, problem = True, str(error)
            except Refused as error:
                lost, problem = error.status == CONFLICT, str(error)
            except ValueError as error:
                problem = str(error)
            problems = self._agreed(lost, problem)
            if not problems:
                self.seconds["rollouts"] += time.perf_counter() - began
                return asked.future.result()
            self._say(f"step {asked.step}: the answers are asked for again ({problems[0]})")
            self._deliver()
            if problem is not None:
                self.begin(asked)
        raise TrainingError(f"grpo: no answers in {TRIES} tries ({problems[0]}); see the service's own log")

    def _agreed(self, lost: bool, problem: str | None) -> list[str]:
        """The problems of all ranks, where all are of a kind that passes. Raises TrainingError for others."""
        found = [p for p in self.context.world.gather((lost, problem)) if p[1] is not None]
        for passes, what in found:
            if not passes:
                raise TrainingError(f"grpo: the rollout service at {self.config.service}: {what}")
        return [what for _, what in found]

    def _deliver(self) -> None:
        """Give the service what it lacks of the version that is to be there."""
        for _ in range(TRIES):
            lost, problem, there = False, None, None
            if self.context.world.main:
                try:
                    there = self._found()
                except Unreachable as error:  # for as long as one waits
                    problem = (
                        f"{error}, for {self.config.service_patience:g} s (`catmllm rollouts` starts one)"
                    )
            self._agreed(lost, problem)
            there = self.context.world.gather(there)[0]
            if there == {"session": self.session, "version": self.version}:
                return
            try:
                # Without a version what came before may have broken off anywhere.
                self._send(known=there["session"] == self.session and there["version"] is not None)
            except Unreachable as error:
                lost, problem = True, str(error)
            except Refused as error:
                lost, problem = error.status == CONFLICT, str(error)
            problems = self._agreed(lost, problem)
            if not problems:
                return
            self._say(f"weights {self.version} are sent again ({problems[0]})")
        raise TrainingError(f"grpo: no weights could be sent in {TRIES} tries ({problems[0]})")

    def _found(self) -> dict[str, Any]:
        """The service's state, told where it has to be waited for."""
        try:
            return self.client.state()
        except Unreachable as error:
            self._say(f"waiting for the rollout service ({error})")
            return self.client.wait()

    def _send(self, known: bool) -> None:
        """Send the model, where the service does not know it, and the weights that train. The main rank
        sends; whatever comes, all go through the gathering of every part."""
        c, problem, version = self.context, None, self.version or 0
        part = itertools.count()

        def attempt(call: Callable[[], None]) -> None:
            nonlocal problem
            if c.world.main and problem is None:
                try:
                    call()
                except (Unreachable, Refused) as error:
                    problem = error

        def put(body: bytes, last: bool) -> None:
            k = next(part)
            attempt(lambda: self.client.weights(self.session, version, k, last, body))

        if not known:
            attempt(lambda: self.client.describe(Description.of(self.session, c.model, c.collate, c.config)))
            for body in self._parts(self.frozen):
                put(body, False)
        for i, body in enumerate(self.sent):
            put(body, i == len(self.sent) - 1)
        if problem is not None:
            raise problem

    def _parts(self, names: Sequence[str]) -> Iterator[bytes]:
        """Tensors of these names, rounded as passes have them, in parts; empty but on the main rank."""
        c = self.context
        llm, graph = DTYPES[c.config.precision], encoder_dtype(c.config)
        part: dict[str, torch.Tensor] = {}
        size = 0
        for name in names:
            value = self.parameters[name].detach()
            if isinstance(value, DTensor):
                value = value.to(llm if name.startswith("llm.") else graph)
            found = whole(value)
            if size and size + found.nbytes > PART:
                yield save(part) if c.world.main else b""
                part, size = {}, 0
            size += found.nbytes
            if c.world.main:
                part[name] = found.contiguous()
        if size:
            yield save(part) if c.world.main else b""

    def _say(self, what: str) -> None:
        if self.context.world.main:
            print(f"grpo: {what}", file=sys.stderr, flush=True)

    def close(self) -> None:
        self.client.close()
        self.pool.shutdown(wait=False, cancel_futures=True)
