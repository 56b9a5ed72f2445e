"""Run by the interpreter of an environment that has verl:
hands answers to verl's own reward managers and to Ray's workers.

Not a test by itself; `test_verl.py` starts it and compares. Needs verl 0.9.1, ray and torch; no GPU,
no network.
"""

import asyncio
import json
import sys
import tempfile
from typing import Any

import numpy as np
import ray
import tokenizers
import torch
import transformers
from omegaconf import OmegaConf
from verl import DataProto
from verl.experimental.reward_loop.reward_loop import RewardLoopManager
from verl.trainer.ppo.reward import get_custom_reward_fn, load_reward_manager
from verl.workers.reward_manager.batch import BatchRewardManager
from verl.workers.reward_manager.naive import NaiveRewardManager

from rewards_fast import PVCP
from rewards_fast.integrations.openrlhf import make_reward_func
from rewards_fast.integrations.trl import CIFReward


def character_tokenizer(texts: list[str]) -> Any:
    """A tokenizer with a token a character, so that decoding gives back what was encoded."""
    letters = ["<pad>", "<eos>", *sorted(set("".join(texts)))]
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({c: i for i, c in enumerate(letters)}, "<pad>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("[\\s\\S]"), "isolated")
    raw.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )


def batch(tokenizer: Any, answers: list[str], targets: list[Any]) -> DataProto:
    """Answers as a rollout leaves them: ids padded on the right, targets in the columns of the data set."""
    rows = [tokenizer(a)["input_ids"] or [tokenizer.pad_token_id] for a in answers]
    width = max(map(len, rows))
    responses = torch.tensor([r + [tokenizer.pad_token_id] * (width - len(r)) for r in rows])
    mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
    prompts = torch.zeros((len(rows), 2), dtype=torch.long)
    objects = {
        "data_source": ["slabs"] * len(rows),
        "reward_model": [{"style": "rule", "ground_truth": t} for t in targets],
        "extra_info": [{"index": i} for i in range(len(rows))],
    }
    return DataProto.from_dict(
        tensors={
            "prompts": prompts,
            "responses": responses,
            "attention_mask": torch.cat([torch.ones_like(prompts), mask], dim=1),
        },
        non_tensors={k: np.array(v, dtype=object) for k, v in objects.items()},
    )


def configuration(path: str, manager: str, tokenizer: str) -> Any:
    function = {"path": path, "name": "compute_score", "reward_kwargs": {"settings": {"near": 0.7}}}
    reward = {
        "custom_reward_function": function,
        "reward_manager": {"source": "register", "name": manager, "module": None},
        "num_workers": 2,
        "reward_model": {"enable": False},
    }
    model = {"tokenizer_path": tokenizer, "path": tokenizer}
    return OmegaConf.create({"reward": reward, "actor_rollout_ref": {"model": model}})


def legacy(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """What the synchronous managers return, as a dict a sample."""
    rewards = answer["reward_tensor"].sum(dim=-1).tolist()
    info = answer["reward_extra_info"]
    return [{**{k: v[i] for k, v in info.items()}, "reward": r} for i, r in enumerate(rewards)]


@ray.remote
class Scorer:
    """A Ray actor that was sent a scorer, and calls each function that frameworks call."""

    def __init__(self, scorer: PVCP) -> None:
        self.scorer = scorer

    def score(self, answers: list[str], targets: list[Any]) -> list[float]:
        return self.scorer.score(answers, targets).total.tolist()

    def openrlhf(self, answers: list[str], targets: list[Any]) -> list[float]:
        return make_reward_func(near=0.7, missing_target="ignore")(answers, [""] * len(answers), targets)[
            "rewards"
        ]

    async def trl(self, answers: list[str], targets: list[Any]) -> list[float]:
        reward = CIFReward(near=0.7)
        return await asyncio.to_thread(reward, completions=answers, target=targets)


def in_ray(answers: list[str], targets: list[Any]) -> dict[str, list[float]]:
    """Rewards made in Ray's worker processes, by actors and by plain tasks."""
    scorer = PVCP(thresholds={"near": 0.7})
    task = ray.remote(lambda a, t: scorer.score([a], [t]).total.tolist()[0])
    actors = [Scorer.options(num_cpus=0).remote(scorer) for _ in range(2)]
    calls = {
        f"{name} of actor {i}": getattr(actor, name).remote(answers, targets)
        for i, actor in enumerate(actors)
        for name in ("score", "openrlhf", "trl")
    }
    found = {name: ray.get(call) for name, call in calls.items()}
    found["tasks"] = ray.get([task.remote(a, t) for a, t in zip(answers, targets)])
    return found


def main() -> None:
    job = json.load(sys.stdin)
    tokenizer = character_tokenizer(job["answers"])
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        for path in job["paths"]:
            function = get_custom_reward_fn(configuration(path, "naive", folder))
            for manager in (NaiveRewardManager, BatchRewardManager):
                data = batch(tokenizer, job["answers"], job["targets"])
                made = manager(tokenizer, 0, function)(data, return_dict=True)
                found[f"{path} {manager.__name__}"] = legacy(made)

            for name in ("naive", "remote"):
                config = configuration(path, name, folder)
                data = batch(tokenizer, job["answers"], job["targets"])

                async def loop(config: Any = config, data: DataProto = data) -> list[dict[str, Any]]:
                    manager = load_reward_manager(config, tokenizer)
                    singles = [data[i : i + 1] for i in range(len(data))]
                    return list(await asyncio.gather(*(manager.run_single(one) for one in singles)))

                answers = asyncio.run(loop())
                found[f"{path} reward loop, {name}"] = [
                    {**a["reward_extra_info"], "reward": a["reward_score"]} for a in answers
                ]

        config = configuration(job["paths"][0], "naive", folder)
        data = batch(tokenizer, job["answers"], job["targets"])
        made = RewardLoopManager(config).compute_rm_score(data)  # two Ray workers
        rewards = made.batch["rm_scores"].sum(dim=-1).tolist()
        keys = made.meta_info["reward_extra_keys"]
        found["RewardLoopManager"] = [
            {**{k: made.non_tensor_batch[k][i].item() for k in keys}, "reward": r}
            for i, r in enumerate(rewards)
        ]
        rewards_in_ray = in_ray(job["answers"], job["targets"])
        ray.shutdown()
    print("RESULT " + json.dumps({"verl": found, "ray": rewards_in_ray}))


if __name__ == "__main__":
    main()
