"""RoBERTa that reads three-part texts, on the systems and the split of a run: CatBERTa's kind of baseline,
and GAP-CatBERTa's, which first learns by pairs of text and graph.

    make baselines RUN=runs/tiny            # among others; adds to runs/tiny/baselines.json
    python -m catmllm.evaluate.text_baselines runs/tiny --pretrained FOLDER     # with roberta-base in FOLDER

transformers' RobertaForSequenceClassification: a small one of random weights, with a tokenizer learned from
the training texts, or the one that a folder holds. The graph's side of the pairs is what the encoder of the
run says of relaxed structures; it stays as it is. The report shows both beside the run's own baselines.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from catmllm.data.open import texts_only
from catmllm.data.prompts import END, START
from catmllm.data.tokenizer import tiny_tokenizer
from catmllm.evaluate.trained_baselines import Predict, Record, descent, fitted, shuffled_rows
from catmllm.models.losses import info_nce
from catmllm.models.schnet import NoEncoder
from catmllm.models.state import holds_model, load_model
from catmllm.seeds import Stream, generator, hash_seed
from catmllm.structure.system import System
from catmllm.structure.text import three_part_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "attention_probs_dropout_prob": 0.0,
}
LONGEST = 512  # tokens, as RoBERTa has it
BATCH, PAIRS = 16, 32
RATES = {"small": 1e-3, "pretrained": 2e-5}  # learning rates
WIDTH = 128  # of what text and graph are compared in
TEMPERATURE = 0.07


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and measure; writes after each model, and trains none again that the same settings made."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run, whose data, split and encoder are taken")
    parser.add_argument("--steps", type=int, default=1500, help=f"of {BATCH} texts each (default: 1500)")
    parser.add_argument(
        "--pairs", type=int, default=200, help=f"steps of {PAIRS} pairs before, for GAP (default: 200)"
    )
    parser.add_argument("--pretrained", type=Path, help="folder with a RoBERTa and its tokenizer")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    record = Record(args.run)
    parts = record.parts()
    kind = "roberta" if args.pretrained is None else "catberta"
    rate = RATES["small" if args.pretrained is None else "pretrained"]
    for name, graphs in ((kind, False), (f"{kind}_gap", True)):
        settings = {"steps": args.steps, "seed": args.seed} | ({"pairs": args.pairs} if graphs else {})
        settings |= {} if args.pretrained is None else {"pretrained": str(args.pretrained)}
        if record.keeps(name, settings):
            continue
        features = _graph_features(args.run, parts["train"]) if graphs else None
        if graphs and features is None:
            print(f"{name}: left out, for {args.run} has no stage `encoder` or `align` with an encoder")
            continue

        def train(features: torch.Tensor | None = features) -> Predict:
            place = 0 if features is None else 1
            key = Stream.TEXT_BASELINES.key(args.seed, place)
            torch.manual_seed(hash_seed(key))
            rng = generator(key)
            reader = reader_of(args.pretrained, [three_part_text(s) for s in parts["train"]])
            if features is not None:
                pair(reader, parts["train"], features, args.pairs, rng, rate)
            return fitted(reader, _energies, parts, args.steps, rng, rate, size=BATCH)

        record.measure(name, train, parts["test"], False, settings)
    return 0


class Reader(nn.Module):
    """A RoBERTa with its tokenizer. Texts are cut at the longest that it can read."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.longest = model.config.max_position_embeddings - model.config.pad_token_id - 1

    def tokens(self, texts: Sequence[str]) -> Mapping[str, torch.Tensor]:
        """input_ids and attention_mask [n, longest of them] int64."""
        found = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.longest, return_tensors="pt"
        )
        return {name: found[name] for name in ("input_ids", "attention_mask")}

    def forward(self, texts: Sequence[str]) -> torch.Tensor:
        """The regression's output [n]."""
        found: torch.Tensor = self.model(**self.tokens(texts)).logits[:, 0]
        return found

    def first(self, texts: Sequence[str]) -> torch.Tensor:
        """The hidden state [n, H] of the first token, which the regression reads too."""
        found: torch.Tensor = self.model.roberta(**self.tokens(texts)).last_hidden_state[:, 0]
        return found


def reader_of(folder: Path | None, texts: Sequence[str]) -> Reader:
    """A small RoBERTa of random weights for such texts, or the one of a folder with a new output.

    Raises SystemExit for a folder that holds no RoBERTa with its tokenizer.
    """
    from transformers import AutoConfig, AutoTokenizer, RobertaConfig, RobertaForSequenceClassification

    if folder is not None:
        try:
            kind = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
            own = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise SystemExit(f"{folder}: no model with its tokenizer there ({error})") from error
        if kind != "roberta":
            raise SystemExit(f"{folder}: a model of the kind {kind}; give the folder of a RoBERTa")
        model = RobertaForSequenceClassification.from_pretrained(folder, num_labels=1, local_files_only=True)
        return Reader(model, own)
    tokenizer = framed(texts)
    pad = tokenizer.pad_token_id
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=pad + 1 + LONGEST,  # RoBERTa counts places from behind the padding's number
        pad_token_id=pad,
        **SIZES,
    )
    config.num_labels = 1
    return Reader(RobertaForSequenceClassification(config), tokenizer)


def framed(texts: Sequence[str]) -> PreTrainedTokenizerBase:
    """The project's tokenizer of texts between a first and a last token, as RoBERTa's has them."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer(texts)
    ends = [(t, tokenizer.convert_tokens_to_ids(t)) for t in (START, END)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=ends
    )
    return tokenizer


def pair(
    reader: Reader,
    systems: Sequence[System],
    graphs: torch.Tensor,
    steps: int,
    rng: np.random.Generator,
    lr: float,
) -> None:
    """Contrastive training of a reader: symmetric InfoNCE between its first hidden state and the features of
    the same system's graph, graphs [n, F], each through a projection of its own, which is then dropped. Equal
    texts are not held against each other."""
    texts = [three_part_text(s) for s in systems]
    numbers = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    keys = torch.tensor([numbers[text] for text in texts])
    sides = nn.ModuleList(
        nn.Linear(width, WIDTH) for width in (graphs.shape[1], reader.model.config.hidden_size)
    )
    descend, order = descent(nn.ModuleList([reader, sides]), lr, steps), shuffled_rows(len(texts), rng)
    reader.train()
    for step in range(steps):
        rows = [next(order) for _ in range(min(PAIRS, len(texts)))]
        read = reader.first([texts[i] for i in rows])
        loss = info_nce(sides[0](graphs[rows]), sides[1](read), TEMPERATURE, keys[rows])
        descend(loss)
        if (step + 1) % max(1, steps // 5) == 0:
            print(f"  step {step + 1} of pairs: loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def _graph_features(run: Path, systems: Sequence[System]) -> torch.Tensor | None:
    """What the run's trained encoder pools of each structure, [n, F], standardised by column. Features by
    atom are averaged. None where there is no encoder or no structure."""
    folder = next((run / stage for stage in ("encoder", "align") if holds_model(run / stage)), None)
    if folder is None or texts_only(systems):
        return None
    model, collate, _ = load_model(folder)
    if isinstance(model.encoder, NoEncoder):
        return None
    model.eval()
    found = []
    for i in range(0, len(systems), PAIRS):
        graph = collate.graphs(systems[i : i + PAIRS])
        assert graph is not None
        features = model.features(graph).float()
        if len(features) != graph.n_systems:
            sums = features.new_zeros(graph.n_systems, features.shape[1]).index_add(0, graph.batch, features)
            features = sums / graph.batch.bincount(minlength=graph.n_systems)[:, None]
        found.append(features)
    every = torch.cat(found)
    return (every - every.mean(0)) / every.std(0).clamp(min=1e-6)


def _energies(model: nn.Module, systems: Sequence[System], _: np.random.Generator | None) -> torch.Tensor:
    found: torch.Tensor = model([three_part_text(s) for s in systems])
    return found


if __name__ == "__main__":
    sys.exit(main())
