"""The phases of `bench/gpu.py`: a module each, with `prepare(bench)`, which needs no GPU and runs while
others have it, and `run(bench, prepared)`, which is its turn."""

# Seconds of a phase's turn with the kernels compiled beforehand, in the order of the turns: 8 minutes in all.
SECONDS = {
    "env": 15,
    "correct": 60,
    "pipeline": 75,
    "train": 115,
    "edges": 80,
    "encoder": 60,
    "logprob": 30,
    "rollout": 45,
}
UNFILLED = 1.5  # times as long where kernels are compiled on the way: 12 minutes
DRY = 20  # times as long without a GPU: a busy machine is no fault
RANKS_SECONDS = 360  # of `ranks`, the part that needs several GPUs
VLLM_SECONDS = 120  # more for `rollout` where vLLM is there: so long it takes to start
READY_SECONDS = 180  # a phase that is not prepared after so long is ended

# What a record of a phase says, in what unit, whether less is better.
CLAIMS = {
    "env": ("what the device and its host reach at the simplest", "TB/s, TFLOP/s or us", True),
    "correct": ("largest error against float64", "share of the tolerance", True),
    "train": ("joint step of the LLM beside the 31M encoder", "ms a step", True),
    "edges": ("EquiformerV2's edge path", "ms", True),
    "encoder": ("whole 31M encoder", "ms", True),
    "logprob": ("log-probability of the targets from hidden states", "ms", True),
    "rollout": ("sampling with random weights", "tokens per second", False),
    "ranks": ("several GPUs", "ms", True),
}
