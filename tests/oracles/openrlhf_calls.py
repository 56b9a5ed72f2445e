"""Run by the interpreter of an environment that has OpenRLHF's package:
its single-turn executor and its advantages, on given answers.

Not a test by itself; `test_openrlhf.py` starts it and compares. What OpenRLHF imports but these paths do not
call (vLLM, flash-attn, DeepSpeed) is stubbed, since none of it installs without CUDA.
"""

import asyncio
import importlib.abc
import importlib.machinery
import json
import sys
import types
from types import SimpleNamespace
from typing import Any

STUBBED = ("vllm", "flash_attn", "deepspeed", "bitsandbytes", "loralib", "optimum", "torchdata", "datasets")


class Stub(types.ModuleType):
    """A module in which every name is some class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds stubs for the packages that are not there."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] in STUBBED:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> Stub:
        return Stub(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__path__ = []


class Engine:
    """Stands where vLLM stands: answers every prompt with the text it was given."""

    def __init__(self, answer: str) -> None:
        self.answer = answer

    async def generate(self, prompt_token_ids: list[int], parameters: Any, multi_modal_data: Any) -> Any:
        output = SimpleNamespace(token_ids=[ord(c) for c in self.answer], finish_reason="stop", logprobs=None)
        return SimpleNamespace(outputs=[output])


class CharacterTokenizer:
    """Ids are code points."""

    pad_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool, return_tensors: str) -> dict[str, Any]:
        import torch

        return {"input_ids": torch.tensor([[ord(c) for c in text]])}

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(map(chr, ids))


def main() -> None:
    job = json.load(sys.stdin)
    sys.meta_path.insert(0, Stubs())
    import torch
    from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
    from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator
    from openrlhf.utils.agent import SingleTurnAgentExecutor

    parameters = SimpleNamespace(max_tokens=4000, logprobs=None)
    executor = SingleTurnAgentExecutor(job["endpoint"])
    tokenizer = CharacterTokenizer()

    async def execute() -> list[dict[str, Any]]:
        calls = (
            executor.execute(prompt, label, parameters, 8000, tokenizer, Engine(answer))
            for prompt, label, answer in zip(job["prompts"], job["labels"], job["answers"])
        )
        return list(await asyncio.gather(*calls))

    outputs = asyncio.run(execute())
    generator = object.__new__(SamplesGenerator)
    samples = [generator._process_response_into_experience(o, max_len=8000) for o in outputs]
    group = len(samples)
    args = SimpleNamespace(
        train=SimpleNamespace(dynamic_batch_enable=False),
        rollout=SimpleNamespace(micro_batch_size=2, n_samples_per_prompt=group),
        reward=SimpleNamespace(clip_range=None, overlong_buffer_len=None, stop_properly_penalty_coef=None),
        algo=SimpleNamespace(advantage=SimpleNamespace(estimator="group_norm", gamma=1.0)),
    )
    strategy = SimpleNamespace(args=args)
    maker = RemoteExperienceMaker(None, None, None, None, SimpleNamespace(value=0.0), strategy, tokenizer)
    batches = maker.split_rollout_samples(samples)
    for batch in batches:
        batch.kl = torch.zeros_like(batch.action_mask, dtype=torch.float32)
    batches = maker.compute_advantages_and_returns(batches)
    advantages = []
    for batch in batches:
        last = batch.action_mask.size(1) - 1 - batch.action_mask.long().fliplr().argmax(dim=1)
        advantages += [batch.advantages[i, j].item() for i, j in enumerate(last.tolist())]
    result = {
        "rewards": [float(torch.as_tensor(o["reward"]).flatten()[0]) for o in outputs],
        "scores": [s.scores.flatten()[0].item() for s in samples],
        "logs": [{k: v.flatten()[0].item() for k, v in s.info.items()} for s in samples],
        "advantages": advantages,
    }
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
