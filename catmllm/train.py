"""Train CatalyticMLLM.

    torchrun --nproc-per-node 2 catmllm/train.py                      the tiny pipeline: all stages, measured
    torchrun --nproc-per-node 8 catmllm/train.py CONFIG.yaml key=value ...
    python catmllm/train.py --help                                    every key with its default

The same command again resumes a run that was stopped: finished stages are kept, an unfinished one goes on from its
newest checkpoint.
"""

from __future__ import annotations

import os
import sys

# As a script this file's folder is the first place where modules are looked for, and `data` and `evaluate` in it would
# shadow Hugging Face's packages of these names.
_HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [p for p in sys.path if os.path.abspath(p or os.getcwd()) != _HERE]

from catmllm.config import Config, ConfigError, load_config, to_dict  # noqa: E402


def main(arguments: list[str]) -> int:
    """Run the pipeline of the arguments; returns the exit status."""
    if any(a in ("-h", "--help") for a in arguments):
        import yaml

        print(__doc__)
        print("Keys and defaults:\n")
        print(yaml.safe_dump(to_dict(Config()), sort_keys=False))
        return 0
    files = [a for a in arguments if "=" not in a]
    if len(files) > 1:
        print(f"error: one configuration file at most, got {' '.join(files)}", file=sys.stderr)
        return 2
    try:
        config = load_config(files[0] if files else None, [a for a in arguments if "=" in a])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from catmllm.pipeline import run

    return run(config)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
