"""`catmllm rollouts`: the service that samples a trainer's answers (`grpo.rollout: service`)."""

from __future__ import annotations

import argparse
import importlib.util
import sys

HELP = "a service that samples the answers of GRPO, for trainers of any number of nodes"


def options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Serve answers to trainers with grpo.rollout=service, by our own decoding on the first GPU or on the "
        "CPU, until SIGTERM. Model and weights come from the trainer. There is no password: whoever reaches "
        "the port can load a model and ask for answers."
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: of every network")
    parser.add_argument("--port", type=int, default=8100)
    parser.add_argument(
        "--threads", type=int, help="threads of torch on a CPU (default: as a trainer's rank has)"
    )


def run(args: argparse.Namespace) -> int:
    if any(importlib.util.find_spec(name) is None for name in ("starlette", "uvicorn")):
        raise ModuleNotFoundError(
            "the service needs starlette and uvicorn: pip install '.[server]' in the clone"
        )
    from catmllm.sample.service import serve

    print(f"catmllm rollouts: at http://{args.host}:{args.port}", file=sys.stderr, flush=True)
    serve(args.host, args.port, args.threads)
    return 0
