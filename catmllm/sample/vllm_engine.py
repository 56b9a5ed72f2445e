"""Rollouts by vLLM instead of our own loop, from an environment of its own.

vLLM pins its own torch, so it runs as a process of another Python (`grpo.vllm`), one a rank. The model is an
ordinary Qwen2.5-VL (or Qwen3-VL) there: prompts are token ids, and a structure's vector is the one token of
an image of 1 × 2 × 2 patches. Weights are numbered, and answers carry the number of those that sampled them.
The temperature is divided into the LM head that vLLM has: it then reports the log-probabilities of
logits / T before the top-p cut, which its own modes do not. Under a grammar vLLM asks after each drawn token
what may follow.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from catmllm.config import SamplingConfig
from catmllm.data.batches import Collator, Encoded
from catmllm.data.prompts import Sample
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.models.export import seeing_config
from catmllm.sample.answers import Choices, Rollout, ended, limits_of
from catmllm.sample.grammar import Pattern, Walk, grammar_of
from catmllm.sample.packed import hidden_states
from catmllm.sample.vllm_weights import NAMES, Weights
from catmllm.seeds import hash_seed

LONGEST_PROMPT = 4096  # tokens, for which vLLM reserves its caches


class VLLMError(RuntimeError):
    """vLLM cannot start, or failed; the message ends with what it printed last."""


class VLLMEngine:
    """One vLLM process and the weights that it samples with.

    Call `update` where the parameters are whole (an unsharded model, or inside `train.sharding.unsharded`),
    then `generate`. What vLLM prints goes to `log`. Raises VLLMError, with the log's end, if the process
    cannot start or dies.
    """

    def __init__(
        self,
        python: str,
        model: CatalyticMLLM,
        collate: Collator,
        params: SamplingConfig,
        dtype: torch.dtype,
        log: Path,
        rows: int = 256,
        memory: float = 0.3,
    ) -> None:
        self.model, self.collate, self.params, self.dtype = model, collate, params, dtype
        self.version = 0  # of the weights that vLLM has
        self.seconds = {"prefill": 0.0, "decode": 0.0, "sync": 0.0}
        self.cached = 0  # tokens of the prompts of the last rollout that vLLM had read already
        self.log = log
        if shutil.which(python) is None:
            raise VLLMError(f"`grpo.vllm`: no Python at {python}; give that of an environment with vLLM")
        self.folder = Path(tempfile.mkdtemp(prefix="catmllm-"))
        self.weights = Weights(model, dtype, params.temperature)
        limit = model.text.config.max_position_embeddings
        self.options = {
            "dtype": NAMES[dtype],
            "eager": not self.weights.on_gpu,
            "max_length": min(limit, LONGEST_PROMPT + (params.max_new_tokens or limit)),
            "rows": rows,
            "memory": memory,
            "image_id": collate.graph_id,
        }
        ours, theirs = socket.socketpair()
        # The trainer's process group is none of vLLM's business: it would join it.
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(_OURS)}
        if self.weights.on_gpu:
            inherited["CUDA_VISIBLE_DEVICES"] = card_of(model.text.embed_tokens.weight.device.index)
        fds = theirs.fileno(), self.weights.fd
        script = str(Path(__file__).with_name("vllm_worker.py"))
        with log.open("ab") as out, theirs:
            self.process = subprocess.Popen(
                [python, script, *map(str, fds), str(self.folder)],
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=inherited,
            )
        self.link = Connection(ours.detach())

    def update(self) -> None:
        """Give vLLM the model's weights as they are now: the first time all, then those that train."""
        began = time.perf_counter()
        adapters = self.weights.rank()
        if not self.version:
            seeing_config(self.model, self.collate.graph_id).save_pretrained(self.folder)
            self._ask(
                {
                    "do": "start",
                    **self.options,
                    "adapters": adapters,
                    "transfer": "ipc" if self.weights.on_gpu else "shared",
                    # What is sent anew need not be kept: level 2 forgets the weights, level 1 keeps them in
                    # the host's memory. Sleep is a GPU's.
                    "sleeps": None if not self.weights.on_gpu else 2 if self.weights.all_train() else 1,
                }
            )
        first = not self.version
        self.version += 1
        if first or adapters is None:
            self._ask({"do": "begin"})
            for part in self.weights.parts(trained=not first):
                self._ask({"do": "weights", **part.says}, part.blocks)
            self._ask({"do": "finish", "version": self.version})
            self.weights.let_go()
        if adapters is not None:
            self.weights.write_adapters(self.folder)
            self._ask({"do": "adapt", "version": self.version})
        self.seconds["sync"] += time.perf_counter() - began

    @torch.no_grad()
    def generate(
        self,
        samples: Sequence[Sample],
        params: SamplingConfig,
        seed: Sequence[int],
        group_size: int = 1,
        keep_hidden: bool = False,
        patterns: Sequence[Pattern] | None = None,
        on_answer: Callable[[int, Rollout], None] | None = None,
        limits: Sequence[int] | None = None,
        vectors: torch.Tensor | None = None,
    ) -> list[Rollout]:
        """`group_size` answers to each prompt, in order, as `RolloutEngine.generate`; all of them come at
        once. Hidden states are computed here, in one pass over prompts and answers.

        Each answer has a seed of its own, made of `seed` and its number; vLLM's draws are other ones than
        ours. `vectors`: what the method of that name gives for these samples; with it the model need not be
        whole any more, but for hidden states.
        """
        began = time.perf_counter()
        if params.temperature != self.params.temperature:
            raise ValueError(
                f"vLLM has weights for temperature {self.params.temperature:g}, not {params.temperature:g}"
            )
        n, most = len(samples) * group_size, limits_of(params, len(samples), limits)
        each = [limit for limit in most for _ in range(group_size)]
        steered = None
        if patterns is not None:
            grammar = grammar_of(self.collate.tokenizer, self.collate.end_id)
            patterns = [p for p in patterns for _ in range(group_size)]
            steered = Steered(Walk(grammar, patterns, max(each, default=1)))
        begun = [[]] * n if steered is None else steered.walk.begun
        samples = [self.collate.shown(s) for s in samples]
        prompts = [self.collate.prompt_ids(s) for s in samples]
        vectors = self.vectors(samples) if vectors is None else vectors
        self.seconds["prefill"] += (asked := time.perf_counter()) - began
        reply = self._ask(
            {
                "do": "generate",
                "prompts": [p + begun[i * group_size] for i, p in enumerate(prompts)],
                "group_size": group_size,
                "dtype": NAMES[self.dtype],
                "width": vectors.shape[1],
                "top_p": params.top_p,
                "max_tokens": [max(1, limit - len(b)) for limit, b in zip(each, begun)],
                "end_id": self.collate.end_id,
                "banned": [self.collate.graph_id, self.collate.energy_id],
                "seeds": [hash_seed([*seed, i]) for i in range(n)],
                "grammar": None if steered is None else steered.beginning(),
            },
            [vectors.to("cpu", self.dtype).contiguous().view(torch.uint8).numpy().tobytes()][: len(vectors)],
            steered,
        )
        if reply["version"] != self.version:
            raise VLLMError(f"vLLM sampled with weights {reply['version']} instead of {self.version}")
        rollouts = [
            self._rollout(i, answer, each[i], group_size, steered)
            for i, answer in enumerate(reply["answers"])
        ]
        self.cached = reply["cached"]
        self.seconds["decode"] += (decoded := time.perf_counter()) - asked
        for i, r in enumerate(rollouts if on_answer is not None else []):
            on_answer(i, r)  # type: ignore[misc]
        if keep_hidden:
            rollouts = hidden_states(self.model, self.collate, samples, rollouts, self.dtype)
            self.seconds["prefill"] += time.perf_counter() - decoded
        return rollouts

    def _rollout(
        self, i: int, answer: dict[str, Any], limit: int, group_size: int, steered: Steered | None
    ) -> Rollout:
        ids, logprob = torch.tensor(answer["ids"]), torch.tensor(answer["logprob"])
        choices = None
        if steered is not None:
            begun = steered.walk.begun[i]
            ids = torch.cat([torch.tensor(begun, dtype=torch.int64), ids])[:limit]
            among = torch.cat([torch.zeros(len(begun)), logprob - torch.tensor(answer["share"])])
            choices = steered.choices(i, len(ids))
            logprob = torch.zeros(len(ids)).index_copy(0, choices.at, among[choices.at])
        return ended(self.collate, i // group_size, ids, logprob, None, (), choices, limit)

    @torch.no_grad()
    def vectors(self, samples: Sequence[Sample]) -> torch.Tensor:
        """The vectors [V, H] of the structures of all samples, in the order of their markers. Raises
        ValueError for pictures, and for markers without a structure."""
        weight = self.model.text.embed_tokens.weight
        shown = [
            Encoded(self.collate.prompt_ids(s), [], None, s.graph)
            for s in map(self.collate.shown, samples)
            if s.graph is not None
        ]
        if not shown:
            return weight.new_zeros(0, weight.shape[1])
        batch = self.collate.join(shown).to(weight.device)
        if batch.pictures is not None:
            raise ValueError("vLLM takes structures in the place of images: sample pictures without `vllm`")
        found = self.model.vectors(batch)
        n = 0 if found is None else len(found)
        if found is None or len(batch.graph_at) != n:
            raise ValueError(f"{len(batch.graph_at)} graph markers in the text, {n} vectors")
        return found

    def _ask(
        self, request: dict[str, Any], blocks: Sequence[bytes] = (), steered: Steered | None = None
    ) -> dict[str, Any]:
        """What vLLM answers; on the way there it may ask what follows drawn tokens."""
        try:
            self.link.send_bytes(json.dumps(request | {"blocks": len(blocks)}).encode())
            for block in blocks:
                self.link.send_bytes(block)
            reply: dict[str, Any] = json.loads(self.link.recv_bytes())
            while steered is not None and "drawn" in reply:
                self.link.send_bytes(json.dumps(steered.follow(reply["drawn"])).encode())
                reply = json.loads(self.link.recv_bytes())
        except (EOFError, OSError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
            reply = {"error": f"the process has ended, status {self.process.returncode}"}
        if "error" in reply:
            last = self.log.read_text(errors="replace").strip().splitlines()[-5:]
            raise VLLMError(
                f"vLLM ({request['do']}): {reply['error']}; `grpo.vllm` must be a Python with vLLM. The end "
                f"of {self.log}:\n" + "\n".join(last)
            )
        return reply

    def close(self) -> None:
        """End the process; it also ends when this one does."""
        self.link.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        self.process.kill()
        self.process.wait()
        self.weights.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def card_of(index: int) -> str:
    """The name, for another process, of a card that is number `index` to this one."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return seen.split(",")[index] if seen else str(index)


@dataclass
class Steered:
    """Answers under a grammar that another process samples: what it is told of the sets that it may draw
    from, each once, and where there was a choice."""

    walk: Walk
    numbers: dict[int, int] = field(default_factory=dict)  # of the sets, by their id
    sets: list[torch.Tensor] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)  # of the answers
    drawn: list[list[tuple[int, torch.Tensor]]] = field(default_factory=list)  # places and sets, by answer

    def beginning(self) -> dict[str, Any]:
        """The set of each answer's first draw."""
        self.lengths = [len(b) for b in self.walk.begun]
        self.drawn = [[] for _ in self.lengths]
        first = [self._offer(i) for i in range(len(self.lengths))]
        return {"first": first, "sets": self._told(0)}

    def follow(self, drawn: list[list[int]]) -> dict[str, Any]:
        """What follows tokens that answers have drawn, pairs (answer, token): what is forced, and the set
        behind it."""
        known = len(self.sets)
        forced, following = [], []
        for i, token in drawn:
            taken = self.walk.take(i, token)
            self.lengths[i] += len(taken)
            forced.append(taken[1:])
            over = taken[-1] == self.walk.grammar.end_id
            following.append(0 if over else self._offer(i))
        return {"forced": forced, "next": following, "sets": self._told(known)}

    def _offer(self, i: int) -> int:
        """The number of the set that an answer draws from next."""
        found = self.walk.allowed(i)
        self.drawn[i].append((self.lengths[i], found))
        if id(found) not in self.numbers:
            self.numbers[id(found)] = len(self.sets)
            self.sets.append(found)  # and so no other's id is the same
        return self.numbers[id(found)]

    def _told(self, known: int) -> dict[int, list[int]]:
        return {k: self.sets[k].tolist() for k in range(known, len(self.sets))}

    def choices(self, i: int, length: int) -> Choices:
        """Where the first `length` tokens of an answer were drawn from more than one."""
        some = [(at, s) for at, s in self.drawn[i] if at < length and len(s) > 1]
        return Choices(torch.tensor([at for at, _ in some], dtype=torch.int64), tuple(s for _, s in some))


# vLLM's memory pool, which sleeps and wakes, refuses the trainer's expandable segments.
_OURS = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_", "PYTORCH_ALLOC_CONF")
