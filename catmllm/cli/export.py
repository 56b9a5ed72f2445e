"""`catmllm export`: a trained model in the layouts of transformers and the Hub, vLLM and fairchem."""

from __future__ import annotations

import argparse
from pathlib import Path

from catmllm.cli.trained import model_option

HELP = "a trained model for transformers and the Hub, vLLM or fairchem"


def options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "hf: the LLM with tokenizer, beside it graph.safetensors (encoder, projector, energy head) and a "
        "card: a folder that can go to the Hub as it is, and that --model takes. "
        "text: the text tower as Qwen2ForCausalLM or Qwen3ForCausalLM, which vLLM serves. fairchem: "
        "the encoder as fairchem 1.x reads it."
    )
    parser.add_argument("layout", choices=("hf", "text", "fairchem"))
    parser.add_argument("out", type=Path, help="folder to write (fairchem: file)")
    model_option(parser)
    parser.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="of the LLM's weights"
    )
    parser.add_argument(
        "--template",
        help="fairchem: a file of the same encoder whose tables, heads and configuration are taken over "
        "(default: the one that training began from)",
    )


def run(args: argparse.Namespace) -> int:
    from catmllm.models.export import export
    from catmllm.models.qwen import TOKENIZER
    from catmllm.models.state import stage_folder
    from catmllm.report.card import write_card

    source = stage_folder(args.model)
    out = export(source, args.layout, args.out, args.dtype, args.template)
    if args.layout == "hf":
        write_card(source, out)
    print(out)
    if (own := out / TOKENIZER).is_dir():
        print(f"its tokenizer is none of Qwen's and lies in {own}: vllm serve {out} --tokenizer {own}")
    return 0
