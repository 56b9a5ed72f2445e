"""Train CatalyticMLLM.

    torchrun --nproc-per-node 2 catmllm/train.py tiny/pipeline.yaml
                                                                  the tiny pipeline: all stages, measured
    torchrun --nproc-per-node 8 catmllm/train.py a100x8/7b.yaml a100x8/grpo.yaml key=value ...
                                                                  files from left to right, then single keys
    python catmllm/train.py --help                                the sections of a configuration
    python catmllm/train.py --help joint                          a section: keys, defaults, bounds, units
    python catmllm/train.py --help all

The same command again resumes a run that was stopped: finished stages are kept,
an unfinished one goes on from its newest checkpoint.
"""

from __future__ import annotations

import os
import sys

# As a script this file's folder is the first place where modules are looked for, and `data` and `evaluate` in
# it would shadow Hugging Face's packages of these names.
_HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [p for p in sys.path if os.path.abspath(p or os.getcwd()) != _HERE]

# Batches differ in size, and so do the pieces that a GPU's allocator hands out: segments that grow leave no
# holes between them. torch reads this when it is loaded, which is later than here; a setting of yours holds.
if not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"

from catmllm.config import ConfigError, from_arguments  # noqa: E402
from catmllm.config.needs import check_needs  # noqa: E402


def main(arguments: list[str]) -> int:
    """Run the pipeline of the arguments; returns the exit status."""
    try:
        if any(a in ("-h", "--help") for a in arguments):
            return show([a for a in arguments if a not in ("-h", "--help")])
        config = from_arguments(arguments)
        check_needs(config)
    except ConfigError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2
    from catmllm.pipeline import run

    return run(config)


def show(names: list[str]) -> int:
    """Print the help of sections or keys, of none: the overview."""
    from catmllm.config.help import describe, overview

    parts = [describe(name) for name in names] or [__doc__ or "", overview()]
    try:
        print("\n\n".join(p.strip("\n") for p in parts), flush=True)
    except BrokenPipeError:  # of a reader that has seen enough, `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
