"""vLLM's side of `sample.vllm_engine`: run by the Python that has vLLM, as a file,
knowing nothing of the rest.

The arguments are the number of a socket and the folder of the weights. Messages are JSON,
followed by as many blocks of bytes as it says.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from multiprocessing.connection import Connection
from typing import Any

# One process: it holds the weights itself and ends with its socket.
# (The script's folder is no place for modules.)
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
sys.path[:] = [
    p for p in sys.path if os.path.abspath(p or os.getcwd()) != os.path.dirname(os.path.abspath(__file__))
]


class Model:
    """vLLM's engine over the weights in a folder, made when they first come."""

    def __init__(self, folder: str) -> None:
        self.folder, self.version = folder, -1
        self.llm: Any = None

    def weights(self, request: dict[str, Any]) -> None:
        """Read the folder, for the first time or again."""
        from vllm import LLM

        if self.llm is None:
            self.llm = LLM(
                model=self.folder,
                dtype=request["dtype"],
                skip_tokenizer_init=True,
                enable_prompt_embeds=True,
                enforce_eager=request["eager"],
                max_model_len=request["max_length"],
                max_num_seqs=request["rows"],
                logprobs_mode="raw_logprobs",
                gpu_memory_utilization=request["memory"],  # without a GPU: of the host's
            )
        else:
            self.llm.reset_prefix_cache()  # its keys and values are of the old weights
            self.llm.collective_rpc("reload_weights")
        self.version = request["version"]

    def generate(self, request: dict[str, Any], blocks: list[bytes]) -> list[dict[str, Any]]:
        """Tokens and log-probabilities of an answer to each prompt,
        which is token ids or a block of embeddings."""
        import torch
        from vllm import SamplingParams

        rest = iter(blocks)
        prompts: list[Any] = []
        for p in request["prompts"]:
            if "ids" in p:
                prompts.append({"prompt_token_ids": p["ids"]})
            else:
                values = torch.frombuffer(bytearray(next(rest)), dtype=getattr(torch, request["dtype"]))
                prompts.append({"prompt_embeds": values.view(p["tokens"], -1)})
        params = [
            SamplingParams(
                temperature=1.0,
                top_p=request["top_p"],
                max_tokens=most,
                stop_token_ids=[request["end_id"]],
                ignore_eos=True,
                logit_bias=dict.fromkeys(request["banned"], -100.0),
                logprobs=0,
                seed=seed,
                detokenize=False,
            )
            for seed, most in zip(request["seeds"], request["max_tokens"])
        ]
        found = self.llm.generate(prompts, params, use_tqdm=False)
        return [
            {
                "ids": list(out.token_ids),
                "logprob": [step[token].logprob for token, step in zip(out.token_ids, out.logprobs)],
            }
            for out in (f.outputs[0] for f in found)
        ]


def serve(link: Connection, folder: str) -> None:
    """Answer requests about the model in a folder until the other side closes;
    what fails is answered with its error."""
    try:
        import vllm  # noqa: F401  it is what may be missing
    except ImportError as error:
        link.recv_bytes()
        return link.send_bytes(json.dumps({"error": f"{sys.executable} has no vLLM ({error})"}).encode())
    model = Model(folder)
    while True:
        try:
            request = json.loads(link.recv_bytes())
        except EOFError:
            return
        blocks = [link.recv_bytes() for _ in range(request["blocks"])]
        try:
            answers: Any = None
            if request["do"] == "weights":
                model.weights(request)
            else:
                answers = model.generate(request, blocks)
            link.send_bytes(json.dumps({"version": model.version, "answers": answers}).encode())
        except Exception as error:
            link.send_bytes(json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())


if __name__ == "__main__":
    try:
        with Connection(int(sys.argv[1])) as connection:
            serve(connection, sys.argv[2])
    finally:
        shutil.rmtree(sys.argv[2], ignore_errors=True)  # also where the trainer was killed
