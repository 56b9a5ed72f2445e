"""A rollout service: the run of a trainer that samples by itself, bit for bit; and what it refuses."""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load, save

from catmllm.config import Config, ConfigError, load_config
from catmllm.data.open import open_data
from catmllm.data.prompts import Sample, cif_prompt
from catmllm.models.build import new_model
from catmllm.sample.answers import Rollout
from catmllm.sample.wire import LARGEST, Ask, Description, Refused, Unreachable, prompts_of, sampled_with
from catmllm.stages.grpo import GRPO
from catmllm.train.loop import train
from catmllm.train.metrics import read_log
from catmllm.train.sharding import whole
from catmllm.train.stage import Context
from catmllm.train.stop import TrainingError
from catmllm.world import start
from tests.conftest import SMALL_MODEL
from tests.contexts import MakeContext, small
from tests.ranks import two_ranks
from tests.sample.serving import Served, served

AHEAD: dict[str, Any] = {"staleness": 1, "checkpoint_every": 2, "property_share": 0.3}
TIMES = ("seconds", "tokens_per_s", "tflops", "memory", "prepare")


@pytest.fixture(scope="module")
def service() -> Iterator[Served]:
    with served() as one:
        yield one


@pytest.fixture(scope="module")
def other_process() -> Iterator[Served]:
    with served(process=True) as one:
        yield one


@pytest.fixture(scope="module")
def runs() -> dict[str, Any]:
    return {}


def configured(address: str = "", **options: Any) -> Config:
    """Of two prompts of three one has a structure; with an address answers come from the service there."""
    config = small()
    config.model.encoder = load_config(None, SMALL_MODEL).model.encoder
    config.data.cutoff, config.data.max_neighbours = 5.0, 8
    config.grpo.sampling.grammar, config.grpo.sampling.max_new_tokens, config.grpo.lr = True, 45, 3e-3
    config.grpo.steps, config.grpo.validate_systems = 3, 3
    if address:
        options = {"rollout": "service", "service": address} | options
    for key, value in options.items():
        setattr(config.grpo, key, value)
    return config


class Watched(GRPO):
    """Rewards are a function of the text; what was rolled, and the weights that were then there, are kept."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.reward = lambda texts, asked: [len(t) + sum(map(ord, t)) % 97 / 97 for t in texts]
        self.rolls: list[list[Rollout]] = []
        self.weights: list[dict[str, torch.Tensor]] = []

    def _roll(self, step: int) -> Any:
        state = self.context.model.state_dict()
        self.weights.append({k: whole(v).clone() for k, v in state.items()})
        found = super()._roll(step)
        self.rolls.append(found[1])
        return found


def run(make_context: MakeContext, config: Config, stage: type[GRPO] = Watched) -> Any:
    """The state at the end, the stage, and the log without its times, of a run of its own."""
    context = make_context(config)
    context.folder = Path(tempfile.mkdtemp(dir=context.folder))
    if not config.grpo.validate_every:
        context.data = {**context.data, "val": []}
    state, made = train(stage, context)
    return state, made, rows_of(context.folder)


def rows_of(folder: Path) -> list[dict]:
    rows = read_log(folder / "log.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows]


def assert_same_answers(ours: list[Rollout], theirs: list[Rollout]) -> None:
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs):
        assert torch.equal(a.ids, b.ids) and torch.equal(a.logprob, b.logprob)
        assert (a.prompt, a.text, a.finished, a.limit) == (b.prompt, b.text, b.finished, b.limit)
        assert (a.choices is None) == (b.choices is None)
        if a.choices is not None and b.choices is not None:
            assert torch.equal(a.choices.at, b.choices.at)
            assert all(map(torch.equal, a.choices.sets, b.choices.sets))


ONES = ["service", pytest.param("other_process", marks=pytest.mark.slow)]


@pytest.mark.parametrize(
    ("one", "kind"),
    [
        ("service", "grammar"),
        *(
            pytest.param("other_process", kind, marks=pytest.mark.slow)
            for kind in ("grammar", "bf16, free, dapo", "adapters", "fp16")
        ),
    ],
)
def test_without_staleness_the_run_is_that_of_a_trainer_that_samples(
    make_context: MakeContext, request: pytest.FixtureRequest, one: str, kind: str
) -> None:
    """Answers, log-probabilities, rewards, losses and weights; where there is time for it validation too."""
    service: Served = request.getfixturevalue(one)
    found = []
    for address in ("", service.client.address):
        config = configured(address, steps=2)
        if one == "other_process":
            config.grpo.validate_every = 1
        if kind.startswith("bf16"):
            config.precision, config.grpo.loss = "bf16", "dapo"
            config.grpo.sampling.grammar, config.grpo.property_share = False, 0.5
        if kind == "fp16":
            config.precision = "fp16"
        if kind == "adapters":
            config.lora.r = 4
        found.append(run(make_context, config))
    (state, ours, rows), (other, theirs, others) = found
    for a, b in zip(ours.rolls, theirs.rolls, strict=True):
        assert_same_answers(a, b)
    assert [row.pop("staleness") for row in others] == [0.0] * len(others)
    assert rows == others and len({row["reward"] for row in rows}) > 1
    assert state.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in state.items())


@pytest.fixture
def ahead(make_context: MakeContext, service: Served, runs: dict[str, Any]) -> Any:
    """A run of three steps with staleness, done once, and its folder."""
    if not runs:
        runs["ahead"] = run(make_context, configured(service.client.address, **AHEAD))
    return runs["ahead"]


def test_staleness_is_exactly_one_version(make_context: MakeContext, ahead: Any) -> None:
    """The answers of step k are those of the weights before the update k - 1, of the first two steps those of
    the start; their log-probabilities weigh the update."""
    _, stage, rows = ahead
    assert [row["staleness"] for row in rows] == [0.0, 1.0, 1.0]
    assert rows[0]["mismatch"] < 1e-5 < 1e-3 < min(row["mismatch"] for row in rows[1:])
    assert stage.correction == ("token", 2.0) and rows[2]["importance"] != 1.0
    config = replace(stage.context.config, grpo=replace(stage.config, rollout="colocated", staleness=0))
    again = GRPO(make_context(config))
    again.reward = stage.reward
    for step, rollouts in enumerate(stage.rolls):
        again.context.model.load_state_dict(stage.weights[max(0, step - 1)], strict=False)
        assert_same_answers(rollouts, again._round(*again._picks(step))[1])


def test_a_resumed_run_is_the_unbroken_one(make_context: MakeContext, ahead: Any, tmp_path: Path) -> None:
    """The answers that were asked for ahead are in the checkpoint; no weights there are could give them."""
    state, unbroken, rows = ahead
    context = make_context(unbroken.context.config)
    context.data, context.folder = unbroken.context.data, tmp_path / "resumed"
    shutil.copytree(unbroken.context.folder, context.folder)
    found, stage = train(Watched, context)
    assert isinstance(stage, Watched) and len(stage.rolls) == 1 and stage.behind == 1
    assert rows_of(context.folder) == rows
    assert all(torch.equal(v, found[k]) for k, v in state.items())


@pytest.mark.parametrize("staleness", [pytest.param(0, marks=pytest.mark.slow), 1])
@pytest.mark.parametrize("one", ONES)
def test_a_service_that_is_lost_is_waited_for_and_asked_again(
    make_context: MakeContext,
    request: pytest.FixtureRequest,
    capfd: pytest.CaptureFixture[str],
    one: str,
    staleness: int,
) -> None:
    """Killed while it samples, and started anew a moment later: the run is the one without a fault. With
    staleness the weights that it needs are no longer those of the trainer."""
    service: Served = request.getfixturevalue(one)
    if staleness:
        unbroken = request.getfixturevalue("ahead")[2]
    else:
        unbroken = run(make_context, configured(service.client.address, steps=2))[2]
    killed: list[int] = []

    def lose() -> None:
        time.sleep(0.05)
        service.kill()
        time.sleep(0.5)
        service.begin()

    class Broken(Watched):
        def begin(self) -> None:
            super().begin()
            assert self.remote is not None
            client, sample = self.remote.client, self.remote.client.sample

            def then_killed(ask: Ask) -> bytes:
                if ask.version == 1 and not killed:
                    killed.append(service.begun)
                    threading.Thread(target=lose).start()
                return sample(ask)

            client.sample = then_killed  # type: ignore[method-assign]

    options = AHEAD if staleness else {"steps": 2}
    _, _, rows = run(make_context, configured(service.client.address, **options), Broken)
    assert killed == [service.begun - 1]
    assert f"step {1 + staleness}: the answers are asked for again" in capfd.readouterr().err
    assert rows == unbroken


def test_a_first_transfer_that_breaks_off_begins_anew(
    make_context: MakeContext, service: Served, capfd: pytest.CaptureFixture[str], ahead: Any
) -> None:
    """Behind the description: the service then knows the session, and none of the weights."""
    broken: list[int] = []

    class Broken(Watched):
        def begin(self) -> None:
            super().begin()
            assert self.remote is not None
            client, weights = self.remote.client, self.remote.client.weights

            def once_broken(session: str, version: int, part: int, last: bool, body: bytes) -> None:
                if not broken:
                    broken.append(part)
                    raise Unreachable("the connection broke")
                weights(session, version, part, last, body)

            client.weights = once_broken  # type: ignore[method-assign]

    rows = run(make_context, configured(service.client.address, **AHEAD), Broken)[2]
    assert broken == [0] and "weights 0 are sent again (the connection broke)" in capfd.readouterr().err
    assert rows == ahead[2]


def test_a_service_that_never_comes_ends_the_run(make_context: MakeContext) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(TrainingError, match=address + r".*for 0.3 s \(`catmllm rollouts`"):
            train(Watched, make_context(configured(address, service_patience=0.3)))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"staleness": 1}, "needs `grpo.rollout: service`"),
        ({"rollout": "service", "vllm": "python3", "sampling.grammar": "false"}, "leave `grpo.vllm` empty"),
        ({"rollout": "service", "service": "localhost:1"}, "is an address such as"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config(None, [f"grpo.{key}={value}" for key, value in options.items()])


def refused(status: int, says: str, call: Callable[..., Any], *arguments: Any) -> None:
    with pytest.raises(Refused, match=says) as error:
        call(*arguments)
    assert error.value.status == status


def test_what_does_not_fit_is_refused_with_a_reason(make_context: MakeContext, service: Served) -> None:
    """Weights and requests for answers; the service goes on with what it had."""
    context, client = make_context(configured()), service.client
    description = Description.of("one", context.model, context.collate, context.config)
    client.describe(description)
    state = {k: v for k, v in context.model.state_dict().items() if sampled_with(k)}
    head = state["llm.lm_head.weight"]

    def sent(part: dict[str, torch.Tensor], session: str = "one", n: int = 0) -> None:
        client.weights(session, 7, n, True, save(part))

    refused(409, "the session is one, not other", sent, state, "other")
    refused(409, "tensors have not come", sent, {"llm.lm_head.weight": head})
    refused(409, "part 2 of weights 7 does not follow", sent, state, "one", 2)
    sent(state)
    assert client.state() == {"session": "one", "version": 7}
    refused(422, r"lm_head.weight is .* not torch.float32 \[3\]", sent, {"llm.lm_head.weight": head[0, :3]})
    refused(422, "not torch.int32", sent, {"llm.lm_head.weight": head.int()})
    refused(422, "has no energy_head", sent, {"energy_head.text.weight": head})
    refused(400, "no safetensors", client.weights, "one", 7, 0, True, b"\x80\x04pickle")
    systems = context.data["train"][:2]
    prompts = prompts_of([Sample(cif_prompt(s.identity)) for s in systems], systems, [False] * 2, [9, 9])
    ask = Ask(
        session="one", version=7, temperature=1.0, top_p=1.0, grammar=True, stop=(), seed=[1], group_size=2,
        prompts=prompts,
    )  # fmt: skip
    for status, says, change in (
        (409, "the weights are 7, not 6", {"version": 6}),
        (409, "the session is one, not two", {"session": "two"}),
        (422, "tokens are asked for", {"prompts": [prompts[0].model_copy(update={"limit": 1 << 22})]}),
        (422, "group_size: .*less than or equal", {"group_size": 5000}),
        (422, "temperature", {"temperature": -1.0}),
        (422, "top_p: .*greater than 0", {"top_p": 0.0}),
        (422, "more of its adsorbate", {"prompts": [prompts[0].model_copy(update={"target": {"H": 1}})]}),
    ):
        refused(status, says, client.sample, ask.model_copy(update=change))
    broken = description.model_copy(update={"files": description.files | {"catmllm.json": '{"nam": 1}'}})
    refused(422, "did you mean `name`", client.describe, broken)
    found = load(client.sample(ask))
    assert int(found["version"]) == 7 and len(found["lengths"]) == 4


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "says"),
    [
        ("POST", "/model", '{"session": "x", "adapters": false, "files": {"../x.json": ""}}', 422, "pattern"),
        ("POST", "/sample", "{", 400, "JSON"),
        ("PUT", "/weights?version=x", "", 422, "weights need"),
        ("GET", "/sample", "", 405, "Method"),
        ("POST", "/elsewhere", "", 404, "Not Found"),
        ("PUT", "/weights?session=one&version=1&part=0&last=1", None, 413, f"more than {LARGEST}"),
    ],
)
def test_what_is_no_request_is_refused(
    service: Served, method: str, path: str, body: str | None, status: int, says: str
) -> None:
    """The last one says that it is too long, and is not read."""
    link = http.client.HTTPConnection("127.0.0.1", service.port)
    if body is None:
        link.putrequest(method, path)
        link.putheader("content-length", str(LARGEST + 1))
        link.endheaders()
    else:
        link.request(method, path, body)
    answer = link.getresponse()
    assert answer.status == status and says in answer.read().decode()


def rank_of_two(rank: int, port: int, address: str, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    data = {k: v[:40] for k, v in open_data().items()}
    options = ({}, {"address": address}, {"address": address, "staleness": 1, "steps": 3})
    world = start(configured())
    for k, given in enumerate(options):
        config = configured(**{"steps": 2, **given})
        model, collate = new_model(config, data["train"])
        place = Path(folder) / str(k)
        place.mkdir(exist_ok=True)
        sent: list[int] = []

        class Counted(Watched):
            def begin(self, sent: list[int] = sent) -> None:
                super().begin()
                if self.remote is not None:
                    put = self.remote.client.weights
                    self.remote.client.weights = lambda *a: (sent.append(a[1]), put(*a))  # type: ignore[assignment,func-returns-value]

        _, stage = train(Counted, Context(config, model, collate, data, world, place))
        rolls = [[r.ids for r in roll] for roll in stage.rolls]  # type: ignore[attr-defined]
        torch.save({"rolls": rolls, "sent": sent}, Path(folder) / f"{k}.{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_share_a_service(service: Served, tmp_path: Path) -> None:
    """The run of two ranks that sample by themselves; the main one alone sends, each version once: the model
    in two parts, what is frozen and what trains, and then what trains."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    two_ranks(rank_of_two, port, service.client.address, str(tmp_path))
    found = {
        (k, rank): torch.load(tmp_path / f"{k}.{rank}.pt", weights_only=True)
        for k in range(3)
        for rank in (0, 1)
    }
    for rank in (0, 1):
        for ours, theirs in zip(found[0, rank]["rolls"], found[1, rank]["rolls"], strict=True):
            assert all(map(torch.equal, ours, theirs))
    assert not any(map(torch.equal, found[1, 0]["rolls"][0], found[1, 1]["rolls"][0]))
    assert rows_of(tmp_path / "0") == [
        {k: v for k, v in row.items() if k != "staleness"} for row in rows_of(tmp_path / "1")
    ]
    assert [row["staleness"] for row in rows_of(tmp_path / "2")] == [0.0, 1.0, 1.0]
    assert found[1, 0]["sent"] == [0, 0, 1] and found[2, 0]["sent"] == [0, 0, 1]
    assert not found[1, 1]["sent"] and not found[2, 1]["sent"]
