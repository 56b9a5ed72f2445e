"""Rollouts by vLLM instead of our own loop, from an environment of its own.

vLLM pins its own torch, so it runs as a process of another Python (`grpo.vllm`), one a rank. Before each
rollout it reads the text tower's weights of the moment, which are numbered: answers carry the number that
sampled them. A prompt with a structure is sent as embeddings, made here. The temperature is divided into the
exported LM head: vLLM then reports the log-probabilities of logits / T before the top-p cut, which its own
modes do not.
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
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from catmllm.config import SamplingConfig
from catmllm.data.batches import Collator, Encoded
from catmllm.data.prompts import Sample
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.models.export import text_config
from catmllm.models.lora import effective_weight
from catmllm.sample.answers import Rollout, ended, limits_of
from catmllm.seeds import hash_seed

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
LONGEST_PROMPT = 4096  # tokens, for which vLLM reserves its caches
SHARED_MEMORY = Path("/dev/shm")


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
        self.log = log
        if shutil.which(python) is None:
            raise VLLMError(f"`grpo.vllm`: no Python at {python}; give that of an environment with vLLM")
        self.folder = Path(
            tempfile.mkdtemp(prefix="catmllm-", dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None)
        )
        device = model.text.embed_tokens.weight.device
        limit = model.text.config.max_position_embeddings
        self.options = {
            "dtype": NAMES[dtype],
            "eager": device.type == "cpu",
            "max_length": min(limit, LONGEST_PROMPT + (params.max_new_tokens or limit)),
            "rows": rows,
            "memory": memory,
        }
        ours, theirs = socket.socketpair()
        # The trainer's process group is none of vLLM's business: it would join it.
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(_OURS)}
        if device.type == "cuda":
            inherited["CUDA_VISIBLE_DEVICES"] = str(device.index)
        with log.open("ab") as out, theirs:
            self.process = subprocess.Popen(
                [
                    python,
                    str(Path(__file__).with_name("vllm_worker.py")),
                    str(theirs.fileno()),
                    str(self.folder),
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=inherited,
            )
        self.link = Connection(ours.detach())

    def update(self) -> None:
        """Give vLLM the model's weights as they are now."""
        began = time.perf_counter()
        weights = {name: t.contiguous() for name, t in self._weights()}
        temporary = self.folder / "next.tmp"
        save_file(weights, temporary, metadata={"format": "pt"})
        temporary.rename(self.folder / "model.safetensors")
        if not self.version:
            text_config(self.model).save_pretrained(self.folder)
        self.version += 1
        self._ask({"do": "weights", "version": self.version, **self.options})
        self.seconds["sync"] += time.perf_counter() - began

    def _weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and value of every weight of the text tower, adapters multiplied out, on the CPU."""
        for name, module in self.model.text.named_modules():
            if (
                isinstance(getattr(module, "weight", None), torch.Tensor)
                and ".lora_" not in name
                and "base_layer" not in name
            ):
                yield f"model.{name}.weight", effective_weight(module).to("cpu", self.dtype)
                if getattr(module, "bias", None) is not None:
                    yield f"model.{name}.bias", module.bias.detach().to("cpu", self.dtype)
        head = self.model.llm.lm_head.weight.detach().float() / self.params.temperature
        yield "lm_head.weight", head.to("cpu", self.dtype)

    @torch.no_grad()
    def generate(
        self,
        samples: Sequence[Sample],
        seed: Sequence[int],
        group_size: int = 1,
        on_answer: Callable[[int, Rollout], None] | None = None,
        limits: Sequence[int] | None = None,
    ) -> list[Rollout]:
        """`group_size` answers to each prompt, in order, as `RolloutEngine.generate`;
        all of them come at once.

        Each answer has a seed of its own, made of `seed` and its number;
        vLLM's draws are other ones than ours.
        """
        began = time.perf_counter()
        prompts: list[dict[str, Any]] = []
        blocks: list[bytes] = []
        for sample in map(self.collate.shown, samples):
            ids = self.collate.prompt_ids(sample)
            if sample.graph is None:
                prompts.append({"ids": ids})
                continue
            x = self._embedded(ids, sample)
            blocks.append(x.to("cpu", self.dtype).contiguous().view(torch.uint8).numpy().tobytes())
            prompts.append({"tokens": len(ids)})
        n = len(samples) * group_size
        most = limits_of(self.params, len(samples), limits)
        reply = self._ask(
            {
                "do": "generate",
                "prompts": [p for p in prompts for _ in range(group_size)],
                "dtype": NAMES[self.dtype],
                "top_p": self.params.top_p,
                "max_tokens": [limit for limit in most for _ in range(group_size)],
                "end_id": self.collate.end_id,
                "banned": [self.collate.graph_id, self.collate.energy_id],
                "seeds": [hash_seed([*seed, i]) for i in range(n)],
            },
            [b for b in blocks for _ in range(group_size)],
        )
        if reply["version"] != self.version:
            raise VLLMError(f"vLLM sampled with weights {reply['version']} instead of {self.version}")
        out = []
        for i, answer in enumerate(reply["answers"]):
            tokens, logprob = torch.tensor(answer["ids"]), torch.tensor(answer["logprob"])
            out.append(
                ended(self.collate, i // group_size, tokens, logprob, None, (), None, most[i // group_size])
            )
            if on_answer is not None:
                on_answer(i, out[-1])
        self.seconds["decode"] += time.perf_counter() - began
        return out

    def _embedded(self, ids: list[int], sample: Sample) -> torch.Tensor:
        """A prompt's embeddings [T, H] with its structure in place."""
        weight = self.model.text.embed_tokens.weight
        batch = self.collate.join([Encoded(ids, [], None, sample.graph)]).to(weight.device)
        if batch.pictures is not None:
            raise ValueError(
                "vLLM counts one position a token, and a picture's tokens have three: sample without `vllm`"
            )
        x = torch.nn.functional.embedding(batch.input_ids, weight.to(self.dtype))
        return self.model.insert(x, batch, self.model.vectors(batch))

    def _ask(self, request: dict[str, Any], blocks: Sequence[bytes] = ()) -> dict[str, Any]:
        try:
            self.link.send_bytes(json.dumps(request | {"blocks": len(blocks)}).encode())
            for block in blocks:
                self.link.send_bytes(block)
            reply: dict[str, Any] = json.loads(self.link.recv_bytes())
        except (EOFError, OSError):
            reply = {"error": "the process has ended"}
        if "error" in reply:
            last = self.log.read_text(errors="replace").strip().splitlines()[-5:]
            raise VLLMError(
                f"vLLM ({request['do']}): {reply['error']}; `grpo.vllm` must be a Python with vLLM. The end "
                f"of {self.log}:\n" + "\n".join(last)
            )
        return reply

    def close(self) -> None:
        """End the process, which removes its weights; it also ends when this one does."""
        self.link.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        self.process.kill()
        self.process.wait()


# vLLM's memory pool, which sleeps and wakes, refuses the trainer's expandable segments.
_OURS = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_", "PYTORCH_ALLOC_CONF")
