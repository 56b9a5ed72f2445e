"""Run by the interpreter of an environment that has verifiers, OpenEnv and ms-swift: hands answers to their
own calling code.

Not a test by itself; `test_environments.py` starts it and compares. Needs verifiers 0.4.0, openenv-core
0.3.0 and ms-swift 4.6.0; no GPU, nothing beyond loopback.
"""

import asyncio
import json
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any


def in_verifiers(job: dict[str, Any]) -> dict[str, Any]:
    """Tasks of our taskset, and of one that plugs the reward in, scored by verifiers on traces of these
    conversations."""
    import verifiers.v1 as vf
    from verifiers.v1.configs.task import RewardFunctionConfig
    from verifiers.v1.graph import MessageNode
    from verifiers.v1.trace import AgentInfo, Trace, TraceTask
    from verifiers.v1.utils.loaders import load_taskset, taskset_config_type

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompts.jsonl"
        rows = [{"prompt": p, "target": t} for p, t in zip(job["prompts"], job["targets"])]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        plugin = "from rewards_fast.integrations.verifiers import CIFTaskset\n__all__ = ['CIFTaskset']\n"
        (Path(folder) / "catalysts.py").write_text(plugin)
        sys.path.insert(0, folder)
        config = taskset_config_type("catalysts").model_validate(
            {"id": "catalysts", "data": str(path), "task": {"reward": {"near": 0.7}}}
        )
        tasks = list(load_taskset(config))

    def trace_of(task: Any, conversation: list[dict[str, Any]]) -> Any:
        kinds = {"user": vf.UserMessage, "assistant": vf.AssistantMessage, "tool": vf.ToolMessage}
        messages = [vf.UserMessage(content=task.data.prompt)]
        messages += [kinds[m["role"]](**{k: v for k, v in m.items() if k != "role"}) for m in conversation]
        nodes = [
            MessageNode(parent=i - 1 if i else None, message=m, sampled=isinstance(m, vf.AssistantMessage))
            for i, m in enumerate(messages)
        ]
        kind = TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash)
        return Trace(task=kind, agent=AgentInfo(config=vf.AgentConfig(), runtime=None), nodes=nodes)

    class OwnData(vf.TaskData):
        target: Any = None

    class OwnTask(vf.Task[OwnData]):
        pass

    fn = RewardFunctionConfig(fn="rewards_fast.integrations.verifiers:cif_reward")
    own = [
        OwnTask(
            OwnData(prompt=t.data.prompt, target=t.data.target), vf.TaskConfig(rewards={"cif_reward": fn})
        )
        for t in tasks
    ]

    async def score(tasks: list[Any]) -> list[Any]:
        traces = [trace_of(task, c) for task, c in zip(tasks, job["conversations"])]
        for task, trace in zip(tasks, traces):
            await task.score(trace)
        return traces

    ours, plugged = asyncio.run(score(tasks)), asyncio.run(score(own))
    return {
        "rewards": [t.reward for t in ours],
        "metrics": [t.metrics for t in ours],
        "plugged": [t.reward for t in plugged],
    }


def in_openenv(job: dict[str, Any]) -> dict[str, Any]:
    """Episodes of OpenEnv's own client with its own server on loopback."""
    import uvicorn
    from openenv.core.generic_client import GenericEnvClient

    from rewards_fast.integrations.openenv import make_app
    from rewards_fast.settings import LoopSettings

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = uvicorn.Config(make_app(LoopSettings(near=0.7)), host="127.0.0.1", port=port, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)

    async def episode(prompt: str, target: Any, answer: Any) -> Any:
        async with GenericEnvClient(base_url=f"http://127.0.0.1:{port}") as client:
            begun = await client.reset(prompt=prompt, target=target)
            ended = await client.step({"text": answer})
            return [begun.observation["prompt"], ended.reward, ended.done, ended.observation["reason"]]

    async def all_of_them() -> list[Any]:
        jobs = zip(job["prompts"], job["targets"], job["conversations"])
        return list(await asyncio.gather(*(episode(p, t, c) for p, t, c in jobs)))

    try:
        return {"episodes": asyncio.run(all_of_them())}
    finally:
        server.should_exit = True
        thread.join(20)


def in_swift(job: dict[str, Any]) -> dict[str, Any]:
    """Samples of ms-swift scored by its own code with the registered reward."""
    import torch
    from swift.rewards import orms
    from swift.rl_core.data import GRPOSample
    from swift.rl_core.grpo_algorithm import compute_rewards_per_func
    from swift.utils import import_external_file

    with tempfile.TemporaryDirectory() as folder:
        plugin = Path(folder) / "plugin.py"
        lines = [
            "from rewards_fast.integrations.ms_swift import register",
            "register()",
            "register('near', near=0.7)",
        ]
        plugin.write_text("\n".join(lines))
        import_external_file(str(plugin))  # as --external_plugins does
    samples = [
        GRPOSample(messages=[{"role": "user", "content": p}, *c], extra={"target": t})
        for p, c, t in zip(job["prompts"], job["conversations"], job["targets"])
    ]
    functions = [orms["cif_reward"](args=None), orms["near"](args=None)]
    found = compute_rewards_per_func(samples, functions, [None, None], torch.device("cpu"))
    return {"names": [type(f).__name__ for f in functions], "rewards": found.T.tolist()}


def main() -> None:
    job = json.load(sys.stdin)
    found = {"verifiers": in_verifiers(job), "openenv": in_openenv(job), "swift": in_swift(job)}
    print("RESULT " + json.dumps(found))


if __name__ == "__main__":
    main()
