"""`catmllm export`: a trained model in the layouts of transformers, vLLM and fairchem."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from catmllm.cli.trained import model_option, stage_folder


def add(commands: Any) -> None:
    export = commands.add_parser(
        "export",
        help="a trained model for transformers, vLLM or fairchem",
        description="hf: Qwen2.5-VL with tokenizer, beside it graph.safetensors (encoder, projector, energy head). "
        "text: the text tower as Qwen2ForCausalLM, which vLLM serves. fairchem: the encoder as fairchem 1.x reads it.",
    )
    export.add_argument("layout", choices=("hf", "text", "fairchem"))
    export.add_argument("out", type=Path, help="folder to write (fairchem: file)")
    model_option(export)
    export.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="of the LLM's weights"
    )
    export.add_argument(
        "--template",
        help="fairchem: a file of the same encoder whose tables, heads and configuration are taken over "
        "(default: the one that training began from)",
    )
    export.set_defaults(run_command=run)


def run(args: argparse.Namespace) -> int:
    from catmllm.models.export import export

    out = export(stage_folder(args.model), args.layout, args.out, args.dtype, args.template)
    print(out)
    if (own := out / "tokenizer").is_dir():
        print(f"its tokenizer is none of Qwen's and lies in {own}: vllm serve {out} --tokenizer {own}")
    return 0
