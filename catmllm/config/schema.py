"""Every key of a configuration: type, default, help, unit and bounds in one line, a class per section.

The defaults are the tiny pipeline that `torchrun catmllm/train.py` runs without arguments. Rules over several
keys are methods of the lowest section that has all of them.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any, Literal, get_args

from pydantic import model_validator

from catmllm.config.section import section
from rewards_fast.settings import RewardSettings, key

Stage = Literal["encoder", "align", "joint", "instruct", "grpo", "ga_grpo"]
STAGES: tuple[str, ...] = get_args(Stage)
Precision = Literal["fp32", "bf16", "fp16"]
EncoderPrecision = Literal["fp32", "tf32", "bf16", "fp16"]


@section
class DataConfig:
    """Where systems come from and how they are cut into a graph and into text."""

    path: str | None = key(
        None,
        "folder made by `catmllm data import` or `oc20`, or JSONL(.gz) of adsorption systems; null: "
        "the slabs shipped with the package",
    )
    labels: Literal["diep", "sevennet"] = key(
        "diep", "whose energies and relaxed structures the shipped slabs have; of no matter with a path"
    )
    slabs: Literal["fcc", "all"] = key(
        "fcc",
        "which shipped slabs: the 2x2x3 ones of nine fcc metals, or also those of many facets, cells and "
        "adsorbates (labels: diep); pairs of fcc stay in the parts that they have without the others",
    )
    split_by: Literal["pair", "metal", "adsorbate", "formula", "column"] = key(
        "pair",
        "whole groups of one (bulk, Miller index) pair, of the same metals, adsorbate or formula, or of one "
        "value of the column that was imported as `split` or by `--group`, make a part",
    )
    hold_out: tuple[str, ...] | None = key(
        None,
        "names that test, of the kind of split_by: Pt with metal leaves every slab with Pt out of training; "
        "null: by the seed",
    )
    train_systems: int | None = key(
        None, "so many of the training systems, evenly spaced, for a learning curve; null: all", gt=0
    )
    share: float = key(
        1.0,
        "share of the training systems, the first in the order of a hash: a smaller one is inside a larger",
        gt=0,
        le=1,
    )
    property: tuple[float, float] = key(
        (0.0, 1.0), "from which to which share of those, in that order, energies (and alignment) are learned"
    )
    generation: tuple[float, float] = key(
        (0.0, 1.0), "from which to which share of those CIFs are learned and designs asked for"
    )
    unit: Literal["system", "pair"] = key(
        "system", "what those three count: systems, or whole (bulk, Miller index) pairs"
    )
    permute: bool = key(
        False,
        "the systems of `generation` have the energies of others of their adsorbate, a control: CIFs without "
        "what they say of energies",
    )
    split_seed: int = key(0, "seed of the split into training, validation and test systems", ge=0)
    decimals: int = key(3, "digits after the point of every number in a CIF", ge=1)
    cutoff: float = key(6.0, "atoms nearer than this are neighbours in the graph", unit="Å", gt=0)
    max_neighbours: int = key(12, "nearest neighbours of an atom that become edges", gt=0)
    phrasings: Literal["paper", "varied"] = key(
        "paper", "how joint and instruct ask: in the paper's words, or also in those of data/phrasings.json"
    )
    augment: bool = key(True, "supervised stages see a system through a random symmetry of its slab's sites")
    written: Literal["relaxed", "start"] = key(
        "relaxed",
        "the structures that answers and exemplars show: relaxed ones as in the paper, or where a relaxation "
        "began, which is what a search should propose",
    )
    rows: Literal["source", "layers"] = key(
        "source",
        "the order of a slab's rows in the CIFs that the model learns and writes: as the data has them, or "
        "layer by layer and in each the atoms of one element after those of another",
    )
    images: bool = key(
        False, "property prompts that show a structure show a picture of it too; needs model.llm.pretrained"
    )
    strict_neighbours: bool = key(
        False, "exactly max_neighbours edges an atom, as the OC20 checkpoints were trained"
    )
    packed: bool = key(True, "samples end to end; false: each padded to the longest of its batch")
    workers: int | None = key(
        None,
        "processes per rank that make batches ahead; 0: made between the steps; null: none on a CPU; "
        "on a GPU 4, or as many as the rank's share of the cores allows",
        ge=0,
    )

    @model_validator(mode="after")
    def _labels_are_there(self) -> DataConfig:
        if self.slabs == "all" and self.labels != "diep":
            raise ValueError(
                f"`.slabs: all` has labels of diep alone, not of {self.labels}; give `.slabs: fcc`"
            )
        return self

    @model_validator(mode="after")
    def _parts_are_parts(self) -> DataConfig:
        for name in ("property", "generation"):
            low, high = getattr(self, name)
            if not 0 <= low < high <= 1:
                raise ValueError(f"`.{name}` must be two shares, 0 <= low < high <= 1, got {[low, high]}")
        return self


@section
class LLMConfig:
    """A Qwen: pretrained weights, or random ones of the size given here."""

    pretrained: str | None = key(
        None,
        "folder or hub id of a Qwen2.5-VL, Qwen3-VL, Qwen2.5, Qwen3 or Llama, whose sizes then hold; "
        "null: random weights",
    )
    hidden_size: int = key(192, "width of the residual stream; a multiple of num_attention_heads", gt=0)
    num_hidden_layers: int = key(4, "blocks", gt=0)
    num_attention_heads: int = key(6, "query heads", gt=0)
    num_key_value_heads: int = key(2, "key and value heads; divides num_attention_heads", gt=0)
    intermediate_size: int = key(512, "width of the MLP", gt=0)
    max_position_embeddings: int = key(2048, "longest sequence", unit="tokens", gt=0)
    vocab_size: int | None = key(
        None,
        "rows of the embedding and of the LM head, for costs as a published model's; "
        "null: as many as the tokenizer has tokens",
        gt=0,
    )
    attention: Literal["varlen", "eager", "sdpa", "flash_attention_2"] = key(
        "varlen",
        "varlen: ours, inside each sample only; torch's FlashAttention on CUDA. "
        "The others are those of transformers",
    )
    train_images: bool = key(
        False, "the image tower trains in joint and instruct; false: it keeps its weights"
    )

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> LLMConfig:
        for size, heads in (
            ("hidden_size", "num_attention_heads"),
            ("num_attention_heads", "num_key_value_heads"),
        ):
            if getattr(self, size) % getattr(self, heads):
                raise ValueError(
                    f"`.{size}` must be a multiple of `.{heads}`, "
                    f"got {getattr(self, size)} and {getattr(self, heads)}"
                )
        return self


@section
class EncoderSizes:
    """The sizes of an EquiformerV2, named as in fairchem's configurations."""

    num_layers: int = key(2, "blocks", gt=0)
    lmax: int = key(2, "largest degree of the spherical channels", ge=1)
    mmax: int = key(2, "largest order of the products along an edge; at most lmax", ge=0)
    sphere_channels: int = key(32, "channels of every degree and order of an atom", gt=0)
    attn_hidden_channels: int = key(32, "channels of a message", gt=0)
    num_heads: int = key(4, "attention heads", gt=0)
    attn_alpha_channels: int = key(16, "channels per head of the attention's weights", gt=0)
    attn_value_channels: int = key(8, "channels per head of the attention's values", gt=0)
    ffn_hidden_channels: int = key(64, "channels inside the feed-forward network", gt=0)
    edge_channels: int = key(32, "channels of an edge's two elements and its radial function", gt=0)
    num_distance_basis: int = key(64, "Gaussians of the distance basis (fairchem always has 600)", gt=0)

    @model_validator(mode="after")
    def _order_within_degree(self) -> EncoderSizes:
        if self.mmax > self.lmax:
            raise ValueError(f"`.mmax` must be at most `.lmax` ({self.lmax}), got {self.mmax}")
        return self


# The two published for OC20 (All+MD), by their parameters; both read graphs of these neighbours.
_OC20: dict[str, Any] = {
    "num_layers": 8,
    "lmax": 4,
    "mmax": 2,
    "sphere_channels": 128,
    "attn_hidden_channels": 64,
    "num_heads": 8,
    "attn_alpha_channels": 64,
    "attn_value_channels": 16,
    "ffn_hidden_channels": 128,
    "edge_channels": 128,
    "num_distance_basis": 600,
}
Preset = Literal["31M", "153M"]
PRESETS: dict[Preset, dict[str, Any]] = {
    "31M": _OC20,
    "153M": _OC20 | {"num_layers": 20, "lmax": 6, "mmax": 3},
}
PRESET_CUTOFF, PRESET_NEIGHBOURS = 12.0, 20  # Å


EncoderKind = Literal["equiformer_v2", "schnet", "none"]


@section
class EncoderConfig(EncoderSizes):
    """What reads structures: EquiformerV2 of a published size by `preset` or of the sizes given here, with
    weights from a file or random ones; or a SchNet."""

    kind: EncoderKind = key(
        "equiformer_v2",
        "schnet: distances alone, with num_layers blocks of sphere_channels a node, edge_channels filters "
        "and num_distance_basis Gaussians; none: a model that reads texts alone",
    )
    checkpoint: str | None = key(None, "file of fairchem 1.x with the weights; null: random weights")
    preset: Preset | None = key(
        None, "a published model, which fixes every size; it reads data.cutoff 12 and data.max_neighbours 20"
    )

    @model_validator(mode="after")
    def _published_ones_are_equiformers(self) -> EncoderConfig:
        for name in ("preset", "checkpoint"):
            if self.kind != "equiformer_v2" and getattr(self, name) is not None:
                raise ValueError(f"`.{name}` is of EquiformerV2; leave it null with `.kind: {self.kind}`")
        return self


@section
class LoRAConfig:
    """Low-rank adapters (peft) on the seven linear maps of every LLM block;
    merged into the weights on export."""

    r: int = key(0, "rank; 0: the LLM's own weights train", ge=0)
    alpha: float = key(16.0, "an adapter's output is multiplied by alpha / r", gt=0)
    dropout: float = key(
        0.05,
        "share of an adapter's inputs that are dropped; none in grpo, whose answers are sampled without",
        ge=0,
        le=1,
    )


@section
class ModelConfig:
    """The three parts of the model."""

    llm: LLMConfig = field(default_factory=LLMConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    projector: Literal["max", "invariant", "atoms"] = key(
        "max",
        "from encoder to LLM: one token per system, the largest of each channel (max: the paper's) "
        "or of rotation invariants, or a token per atom",
    )
    closed_form: bool = key(
        True,
        "energies begin with kernel ridge regression on surroundings and texts, and networks count by the "
        "share that helps; false, as the paper: networks alone say them",
    )


@section
class OptimConfig:
    """What every stage shares: AdamW, a linear warm-up and then a cosine schedule, clipping, checkpoints,
    validation."""

    steps: int = key(100, "optimizer steps", gt=0)
    batch_size: int = key(16, "samples (in the RL stages: prompts or tasks) per rank and step", gt=0)
    lr: float = key(1e-3, "largest learning rate", gt=0)
    encoder_lr: float | None = key(None, "that of encoder and projector; null: lr", gt=0)
    min_lr_ratio: float = key(0.05, "share of the learning rate that is left at the last step", ge=0, le=1)
    warmup: int = key(10, "steps in which the learning rate rises to its largest", ge=0)
    weight_decay: float = key(0.01, "of AdamW", ge=0)
    betas: tuple[float, float] = key((0.9, 0.98), "of AdamW, each from 0 to below 1")
    grad_clip: float = key(1.0, "largest norm of the gradient", gt=0)
    checkpoint_every: int = key(100, "steps between checkpoints", gt=0)
    log_every: int = key(10, "steps between lines of the log", gt=0)
    reshard: Literal["trained", "all", "none"] = key(
        "trained",
        "which gathered weights are freed after a forward pass: those of the trained parts (frozen ones "
        "never change and stay whole), all (least memory), none (a gather less per step, ZeRO-2)",
    )
    sync_every_pass: bool = key(
        False,
        "reduce gradients after every pass of a step: more is sent, "
        "but none wait unsharded (4 bytes per parameter and rank)",
    )
    validate_every: int = key(
        0, "steps between validations; the best weights seen are the stage's result; 0: never", ge=0
    )
    validate_systems: int = key(1024, "systems of the validation split, over all ranks", gt=0)
    patience: int = key(0, "stop after so many validations without a better one; 0: never", ge=0)

    @model_validator(mode="after")
    def _betas_below_one(self) -> OptimConfig:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"`.betas` must be from 0 to below 1, got {list(self.betas)}")
        return self


@section
class SupervisedConfig(OptimConfig):
    """What the supervised stages share: passes per step, and when a run is stopped."""

    accumulate: int = key(
        1,
        "passes per step and rank; they share its batch_size, or are packs of batch_tokens each",
        gt=0,
    )
    batch_tokens: int | None = key(
        None,
        "most tokens of a pass, which samples are packed to; null: a pass has batch_size",
        unit="tokens",
        gt=0,
    )
    atom_tokens: float = key(
        0.0,
        "tokens that an atom of a structure counts for where passes are packed or dealt: the encoder's work "
        "for an atom over the LLM's for a token",
        ge=0,
    )
    dealt: bool = key(
        False,
        "passes of batch_size samples are made of 64 times as many, so that all cost the same and no rank "
        "waits; batch_tokens does so by itself",
    )
    spike: float = key(
        20.0, "stop where the loss is so many median deviations above its recent median; 0: never", ge=0
    )

    @model_validator(mode="after")
    def _passes_of_equally_many(self) -> SupervisedConfig:
        if self.dealt and self.batch_size % self.accumulate:
            raise ValueError("`.dealt` cuts `.batch_size` into `.accumulate` equal passes; it must divide")
        return self


@section
class EncoderStageConfig(SupervisedConfig):
    """Stage 0: encoder and the graph part of the energy head on energies, without the LLM. For want of an
    encoder trained on OC20; leave it out of `stages` where `model.encoder.checkpoint` names one."""

    steps: int = 800
    batch_size: int = 16
    lr: float = 1e-3
    warmup: int = 30
    min_lr_ratio: float = 0.02
    frames: float = key(
        0.5,
        "share of samples that stand at the start of their relaxation (half of these) or on the way "
        "to its end",
        ge=0,
        le=1,
    )
    position_noise: float = key(0.02, "Gaussian noise on the atoms", unit="Å", ge=0)

    @model_validator(mode="after")
    def _samples_are_structures(self) -> EncoderStageConfig:
        if self.batch_tokens is not None:
            raise ValueError("`.batch_tokens` must be null: these samples have no text; set `.batch_size`")
        return self


@section
class AlignConfig(SupervisedConfig):
    """Stage 1a: symmetric InfoNCE between graph token and frozen text encoding."""

    steps: int = 60
    batch_size: int = 32
    lr: float = 2e-3
    temperature: float = key(0.07, "what similarities are divided by", gt=0)
    train_encoder: bool = key(
        False, "the encoder trains too, as in the paper; false: it keeps what it has learned of energies"
    )

    @model_validator(mode="after")
    def _one_pass_of_equal_size(self) -> AlignConfig:
        if self.accumulate != 1:
            raise ValueError(
                "`.accumulate` must be 1: the negatives of a sample are those of its pass; "
                "raise `.batch_size`"
            )
        if self.batch_tokens is not None:
            raise ValueError(
                "`.batch_tokens` must be null: every rank needs equally many samples in a pass; "
                "set `.batch_size`"
            )
        return self


@section
class MixedConfig(SupervisedConfig):
    """What the stages share that train the LLM on all three tasks: how samples are made."""

    lr: float = 2e-3
    warmup: int = 30
    property_share: float = key(
        0.7, "share of property samples in a batch; the rest are CIF and design samples", ge=0, le=1
    )
    design_share: float = key(
        0.15, "share of design samples in a batch; those left are CIF samples", ge=0, le=1
    )
    drop_text: float = key(0.1, "share of property prompts with the graph only", ge=0, le=1)
    drop_graph: float = key(
        0.5, "share of property prompts with the text only, which alone train its read-out", ge=0, le=1
    )
    frames: float = key(
        0.4,
        "share of property samples that stand at the start of their relaxation (half of these) or on the way "
        "to its end",
        ge=0,
        le=1,
    )
    exemplar_share: float = key(
        0.5, "share of design samples that show another structure of the same identity", ge=0, le=1
    )
    exemplar_noise: float = key(
        0.05, "Gaussian noise where a design prompt shows the sample's own structure", unit="Å", ge=0
    )
    exchange: float = key(
        0.0,
        "share of CIF samples whose metals are exchanged for others, of 23, never to a bulk and Miller index "
        "of validation or test, or to a metal or formula by which `data` splits them off",
        ge=0,
        le=1,
    )
    row_weight: float = key(
        1.0,
        "what tokens of a CIF's rows count that follow from the question and from rows before: elements, "
        "where the adsorbate is, and with `rows: layers` where a layer's last element is; others count 1",
        gt=0,
    )
    drop_configuration: float = key(
        0.0,
        "share of the prompts with the text only that name adsorbate and catalyst and no bond",
        ge=0,
        le=1,
    )
    relaxed_text: float = key(
        0.0,
        "share of them whose bonds are those of relaxed_scale, as they are read from indicative CIFs",
        ge=0,
        le=1,
    )
    relaxed_scale: float = key(4.0, "there, what covalent radii are multiplied by", gt=0)
    relaxed_characters: int = key(400, "there, longest string of bonds", unit="characters", ge=2)

    @property
    def designs_of_rest(self) -> float:
        """The share of design samples of what is no property sample."""
        return min(1.0, self.design_share / max(1e-9, 1 - self.property_share))

    @model_validator(mode="after")
    def _texts_are_one_kind(self) -> MixedConfig:
        if self.drop_configuration + self.relaxed_text > 1:
            raise ValueError(
                "`.drop_configuration` and `.relaxed_text` are shares of the same prompts: at most 1 together"
            )
        return self


@section
class JointConfig(MixedConfig):
    """Stage 1b: everything trains; MMTG of energy MAE and answer cross-entropy, per sample."""

    steps: int = 600
    mmtg_lambda: float = key(1.0, "λ of MMTG's tanh", ge=0)
    mmtg_sign: Literal["+", "-", "sum"] = key(
        "+", "sign of that tanh: Appendix A.4 has +, Eq. 56 prints -; sum: the two losses added, without MMTG"
    )
    train_encoder: bool = key(
        False, "the encoder and the graph part of the energy head train on; encoder_lr is their rate"
    )
    train_llm: bool = key(True, "the LLM trains; false: projector and energy head alone, a bridge to it")
    position_noise: float = key(0.05, "Gaussian noise on the graph's atoms", unit="Å", ge=0)


@section
class InstructConfig(MixedConfig):
    """Stage 1c: the LLM and the energy head, on all three tasks, with modalities dropped at random."""

    steps: int = 400
    property_share: float = 0.25
    design_share: float = 0.45


@section
class SamplingConfig:
    """How answers are sampled."""

    temperature: float = key(1.0, "what logits are divided by", gt=0)
    top_p: float = key(0.95, "answers are drawn from the most likely tokens of this probability", gt=0, le=1)
    max_new_tokens: int | None = key(
        256,
        "longest answer; null: a quarter more than a CIF of the cell asked for takes",
        unit="tokens",
        gt=0,
    )
    grammar: bool = key(
        True, "the policy chooses among what keeps to a CIF's form and the wanted counts of elements"
    )
    stop: tuple[str, ...] = key((), "texts that end an answer once it holds one of them")


@section
class RewardConfig(RewardSettings):
    """PVCP weights and thresholds, every key of `rewards_fast.RewardSettings`. Two differ from Eq. 41: its
    upper distance (1.0 Å) punishes every O-H bond, so `near` is 0.7 Å here; and it looks at different sites
    only, which lets a cell thinner than an atom pass, so `own_images` is on."""

    near: float = 0.7
    own_images: bool = True
    threads: int | None = 1


KL = Literal["k1", "k2", "k3"]
VLLM_HELP = "Python of an environment with vLLM, which then samples; null: our own decoding"
VLLM_MEMORY_HELP = "share of a GPU's memory (without one: of the host's) for vLLM's weights and caches"
KL_HELP = "estimator of the KL term: k1 log-ratio (the paper's), k2 half its square, k3 exp(-d) - 1 + d"


@section
class GRPOConfig(OptimConfig):
    """Stage 2: GRPO on the PVCP reward."""

    steps: int = 30
    batch_size: int = 12
    lr: float = 1.5e-4
    warmup: int = 8
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    checkpoint_every: int = 20
    log_every: int = 1
    validate_every: int = 10
    validate_systems: int = 96
    group_size: int = key(8, "answers per prompt (the paper's K)", gt=0)
    beta: float = key(0.02, "weight of the KL term; 0: no reference policy either", ge=0)
    kl: KL = key("k3", KL_HELP)
    delta: float = key(1e-4, "added to a group's standard deviation of rewards", ge=0)
    updates_per_rollout: int = key(
        1, "steps that go over the same answers; divides checkpoint_every and validate_every", gt=0
    )
    loss: Literal["grpo", "dapo", "dr_grpo", "gspo", "cispo"] = key(
        "grpo",
        "the paper's; dapo: mean over tokens, a wider clip above, refill and overlong; dr_grpo: no division "
        "by length or deviation; gspo: the ratio of whole answers; cispo: a capped ratio as weight",
    )
    clip: float | None = key(
        None,
        "how far from 1 the probability ratio may go; acts only with several updates per rollout; "
        "null: the loss's own (0.2; gspo 3e-4)",
        ge=0,
    )
    clip_high: float | None = key(
        None, "how far above 1; null: clip, or the loss's own (dapo 0.28, gspo 4e-4, cispo 4)", ge=0
    )
    normalise: Literal["sample", "token"] = key(
        "sample", "what counts alike in the loss `grpo`: every answer, or every token"
    )
    refill: int | None = key(
        None,
        "further rounds of prompts in place of groups without a signal; null: none, with dapo 2",
        ge=0,
    )
    overlong: Literal["keep", "mask", "soft"] | None = key(
        None,
        "answers cut at max_new_tokens: as any other, without part in the loss, or long ones punished; "
        "null: keep, with dapo soft",
    )
    overlong_tokens: int = key(
        64, "last tokens before the limit over which soft punishment grows", unit="tokens", gt=0
    )
    overlong_penalty: float = key(5.0, "reward that soft punishment takes from an answer at its limit", ge=0)
    importance: Literal["none", "token", "sequence"] | None = key(
        None,
        "weights for what the sampler differs from the policy, truncated: of tokens or of answers; "
        "null: token with vllm or staleness 1, else none",
    )
    importance_cap: float = key(2.0, "largest of those weights", gt=0)
    exemplar_share: float = key(
        0.5, "share of design prompts that show another structure of the same identity", ge=0, le=1
    )
    exchange: float = key(
        0.0,
        "share of prompts about slabs of other metals, as CIF samples of `joint` may be",
        ge=0,
        le=1,
    )
    property_share: float = key(0.1, "property samples replayed with the rollouts, per answer", ge=0, le=1)
    micro_batch: int = key(32, "answers of a forward pass", gt=0)
    batch_tokens: int | None = key(
        None,
        "most tokens of a pass: the answers of all ranks are dealt to passes that cost the same; "
        "null: each rank reads its own, micro_batch of them in a pass",
        unit="tokens",
        gt=0,
    )
    reward_function: str | None = key(
        None, "file.py:function of your own, f(texts, targets) -> rewards; null: PVCP and the adsorbate"
    )
    reward_timeout: float = key(60.0, "an answer whose reward takes longer has none", unit="s", gt=0)
    show_every: int = key(
        0,
        "steps between tables of the main rank's answers (prompt, answer, rewards, advantage) in tables/, "
        "W&B, MLflow and trackio; 0: none",
        ge=0,
    )
    reward_processes: int = key(1, "processes of each rank that run a reward of your own", gt=0)
    reward_memory: float | None = key(None, "address space of each of them; null: no limit", unit="GiB", gt=0)
    vllm: str | None = key(None, VLLM_HELP)
    vllm_memory: float = key(0.3, VLLM_MEMORY_HELP, ge=0, le=1)
    rollout: Literal["colocated", "service"] = key(
        "colocated",
        "where answers are sampled: in the trainer's own processes, or by `catmllm rollouts` at `service`",
    )
    service: str = key("http://127.0.0.1:8100", "address of that service, which all ranks share")
    service_patience: float = key(
        600.0,
        "how long a service may be away, or take for a step's answers; below hang_after",
        unit="s",
        gt=0,
    )
    staleness: int = key(
        0,
        "0: a step's answers are of the weights that it updates; 1: of those one rollout before, sampled by "
        "the service during that update",
        ge=0,
        le=1,
    )
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    adsorbate_weight: float = key(
        0.5, "weight, beside PVCP's four, of a term that is 10 for a real adsorbate and -10 for none", ge=0
    )

    @model_validator(mode="after")
    def _checkpoints_between_rollouts(self) -> GRPOConfig:
        for name in ("checkpoint_every", "validate_every"):
            if getattr(self, name) % self.updates_per_rollout:
                raise ValueError(f"`.{name}` must be a multiple of `.updates_per_rollout`")
        return self

    @model_validator(mode="after")
    def _vllm_knows_no_text(self) -> GRPOConfig:
        _stops_by_tokens(self)
        return self

    @model_validator(mode="after")
    def _a_service_samples_by_our_decoding(self) -> GRPOConfig:
        if self.rollout == "service" and self.vllm is not None:
            raise ValueError("`.rollout: service` samples by our own decoding; leave `.vllm` empty")
        if self.staleness and self.rollout != "service":
            raise ValueError(
                "`.staleness: 1` needs `.rollout: service`: what samples beside an update is another process"
            )
        if not self.service.startswith("http://"):
            raise ValueError(f"`.service` is an address such as http://127.0.0.1:8100, not {self.service}")
        return self


@section
class GAGRPOConfig(OptimConfig):
    """Stage 3: GA-GRPO, the closed loop of design and refinement; only the LM head trains. `steps` follows
    from `tasks`, `batch_size` and `iterations`."""

    lr: float = 2e-4
    warmup: int = 2
    weight_decay: float = 0.0
    checkpoint_every: int = 5
    log_every: int = 1
    validate_every: int = 5
    validate_systems: int = 16
    tasks: int = key(64, "design tasks over all ranks, batch_size of them at a time on each", gt=0)
    solved: float | None = key(
        None,
        "a task whose best feasible design is this near to its energy leaves, and another enters besides "
        "`tasks`; null: each has all its iterations",
        unit="eV",
        gt=0,
    )
    initial: int = key(16, "first candidates of a task, from text only (the paper's N0)", gt=0)
    analogues: int = key(
        0,
        "how many of the first candidates are training slabs near the wanted energy with their elements "
        "exchanged, where designs are searched for; 0, as the paper: none",
        ge=0,
    )
    pool: int = key(6, "exemplars kept per task (the paper's K)", gt=0)
    iterations: int = key(10, "refinements of a task (the paper's T)", gt=0)
    group_size: int = key(8, "candidates per refinement (the paper's G)", gt=0)
    beta: float = key(0.05, "weight of the KL term", ge=0)
    kl: KL = key("k3", KL_HELP)
    delta: float = key(1e-4, "added to a group's standard deviation of rewards", ge=0)
    predictor: str | None = key(
        None,
        "folder of a run, or of a stage, whose energies the search takes; null: those of the model itself",
    )
    prompts: Literal["wanted", "other"] = key(
        "wanted",
        "the energy that prompts say: the wanted one, or as a control that of the training system of the "
        "adsorbate which is farthest from it",
    )
    energy_weight: float = key(0.7, "weight of the energy term of the reward", ge=0)
    pvcp_weight: float = key(0.3, "weight of PVCP in the reward", ge=0)
    energy_lambda: float = key(1.0, "λ of exp(-λ |E - E*|), which is the energy term", unit="1/eV", ge=0)
    expected_error: bool = key(
        False,
        "the energy term counts the expected |E - E*|, by the error that the closed form expects at each "
        "structure; or that of the prediction, as the paper does",
    )
    adsorbate_weight: float = key(0.3, "weight of a real adsorbate in the reward: 1, or 0 for none", ge=0)
    pvcp_scale: Literal["unit", "raw"] = key(
        "unit", "PVCP scaled to [0, 1] from the floor and the top of its weights, or as printed"
    )
    micro_batch: int = key(64, "answers of a pass through the LM head", gt=0)
    batch_tokens: int | None = key(
        None,
        "most tokens of a pass: the answers of all ranks are dealt to passes that cost the same; "
        "null: each rank reads its own, micro_batch of them in a pass",
        unit="tokens",
        gt=0,
    )
    vllm: str | None = key(None, VLLM_HELP)
    vllm_memory: float = key(0.3, VLLM_MEMORY_HELP, ge=0, le=1)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)

    @model_validator(mode="after")
    def _vllm_knows_no_text(self) -> GAGRPOConfig:
        _stops_by_tokens(self)
        return self

    @model_validator(mode="after")
    def _some_are_sampled(self) -> GAGRPOConfig:
        if self.analogues >= self.initial:
            raise ValueError(
                f"`.analogues: {self.analogues}` leaves none of `.initial: {self.initial}` to sample"
            )
        return self


def _stops_by_tokens(stage: GRPOConfig | GAGRPOConfig) -> None:
    """Raises ValueError for texts that end answers where vLLM samples, which has no tokenizer."""
    if stage.vllm is not None and stage.sampling.stop:
        raise ValueError("`.sampling.stop` needs our own decoding; leave `.vllm` empty")


@section
class EvaluateSamplingConfig(SamplingConfig):
    """How the answers that failures are counted in are sampled: the paper's own setting."""

    temperature: float = 0.7
    top_p: float = 0.9


@section
class EvaluateConfig:
    """What is measured after the stages, on systems that no stage trained on. `reward` scores sampled CIFs,
    whatever the stages were rewarded by."""

    property_systems: int = key(
        4096, "test systems, evenly spaced, whose energies are predicted after each stage", gt=0
    )
    generation_samples: int = key(512, "answers sampled per stage to count failures in", ge=0)
    indicative: int = key(
        0,
        "CIFs sampled for each adsorbate and catalyst of the test part, by which energies are predicted "
        "where no structure is known (PIR); 0: not measured",
        ge=0,
    )
    design_tasks: int = key(48, "design tasks after the closed loop", ge=0)
    free_tasks: int = key(
        0,
        "of these tasks, how many are also searched with the metals free, after the last of design_after",
        ge=0,
    )
    slab_tasks: int = key(
        0,
        "test slabs for whose best sites' energies slabs with free metals are searched, after the last of "
        "design_after: once for one adsorbate, once for slab_adsorbates",
        ge=0,
    )
    slab_adsorbates: tuple[Literal["H", "O", "N", "C", "CO", "OH", "NH", "CH"], ...] = key(
        ("O", "OH"), "adsorbates whose energies slab_tasks ask for at once; empty: for one at a time only"
    )
    design_after: tuple[Literal["joint", "instruct", "grpo", "ga_grpo"], ...] = key(
        ("ga_grpo",), "stages after which the closed loop searches for those tasks, with that stage's weights"
    )
    reward: RewardConfig = field(default_factory=RewardConfig)
    judge: Literal["diep", "sevennet", "none"] = key(
        "diep",
        "potential that relaxes the designs: that of data.labels, since another has another zero; or none",
    )
    budgets: tuple[int, ...] = key(
        (4, 16),
        "numbers of predictions for a task, each above 0, after which its success is told too, besides one "
        "and all",
    )
    tolerance: float = key(0.25, "a design this near to the wanted energy is a success", unit="eV", gt=0)
    sampling: EvaluateSamplingConfig = field(default_factory=EvaluateSamplingConfig)

    @model_validator(mode="after")
    def _budgets_above_zero(self) -> EvaluateConfig:
        if not all(budget > 0 for budget in self.budgets):
            raise ValueError(f"`.budgets` must be above 0, got {list(self.budgets)}")
        return self

    @model_validator(mode="after")
    def _slabs_are_judged(self) -> EvaluateConfig:
        if self.slab_tasks and self.judge == "none":
            raise ValueError("`.slab_tasks` needs a `.judge`, which says what energies are asked for")
        return self


@section
class Config:
    """A whole run: which stages, from what weights, on what data."""

    name: str = key("tiny", "what `{name}` in out, store and init stands for")
    out: str = key("runs/tiny", "folder of the run: record, report and a folder per stage")
    store: str | None = key(
        None,
        "folder on a store of objects, s3://bucket/runs/{name}: checkpoints go there, the rest of out is "
        "copied there, and a machine without it goes on from there; null: everything is in out alone",
    )
    seed: int = key(0, "seed of every random draw", ge=0)
    init: str | None = key(
        None,
        "model to start from: folder of a stage, or of a run, whose last finished stage it then is, or its "
        "address on a store (s3://bucket/runs/mine); null: pretrained parts and random weights",
    )
    precision: Precision = key(
        "bf16",
        "of the LLM; master weights and optimizer states are float32. A CPU without products of bfloat16 "
        "(AVX-512 or AMX) takes fp32 for bf16, which is five times as fast there",
    )
    encoder_precision: EncoderPrecision | None = key(
        None,
        "of the encoder, likewise; tf32: float32, of which a GPU's tensor cores multiply 11 bits, in every "
        "float32 product of the run; null: tf32 on a GPU (fp32 where precision is fp32), fp32 on a CPU",
    )
    replicate: int = key(1, "copies of the sharded model (HSDP); on several nodes: their number", gt=0)
    keep_checkpoints: int = key(
        2, "checkpoints kept of a running stage, besides the one with the best validation", gt=0
    )
    checkpointing: Literal["none", "selective", "full"] = key(
        "none",
        "what a block keeps for its backward pass: everything, matrix products and attention, "
        "or its input only",
    )
    compile: bool | None = key(
        None,
        "each block of LLM and encoder by torch.compile; null: on a GPU where the LLM is a pretrained one",
    )
    cpu_offload: bool = key(
        False, "a rank's shards of weights, gradients and optimizer states live in the host's memory"
    )
    optimizer: Literal["torch", "apex"] = key(
        "torch", "AdamW in one kernel: torch's own, or apex's FusedAdam (on GPUs, where apex is installed)"
    )
    tensorboard: bool = key(True, "write every number to the folder tensorboard of out too")
    wandb: str | None = key(None, "project on Weights & Biases; null: off")
    mlflow: str | None = key(None, "experiment of MLflow, at MLFLOW_TRACKING_URI; null: off")
    trackio: str | None = key(None, "project of trackio; null: off")
    hang_after: float = key(
        900.0,
        "a part of a step that takes longer ends the run, with a line that names rank and call; 0: never",
        unit="s",
        ge=0,
    )
    profile: bool = key(
        False,
        "of each stage's first steps: a Chrome trace and a table by phase, in profile of the stage's folder",
    )
    threads: int = key(1, "threads of torch per rank on a CPU", gt=0)
    stages: tuple[Stage, ...] = key(STAGES, "what is trained, in this order")
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    encoder: EncoderStageConfig = field(default_factory=EncoderStageConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    joint: JointConfig = field(default_factory=JointConfig)
    instruct: InstructConfig = field(default_factory=InstructConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    ga_grpo: GAGRPOConfig = field(default_factory=GAGRPOConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    @model_validator(mode="after")
    def _pictures_have_a_tower(self) -> Config:
        if self.data.images and self.model.llm.pretrained is None:
            raise ValueError(
                "`data.images` needs the image tower of a pretrained Qwen2.5-VL (`model.llm.pretrained`): "
                "the LLM of random weights has none"
            )
        if self.model.llm.train_images and not self.data.images:
            raise ValueError("`model.llm.train_images` trains nothing without `data.images`")
        return self

    @model_validator(mode="after")
    def _texts_alone_need_no_encoder(self) -> Config:
        if self.model.encoder.kind != "none":
            return self
        if needy := [s for s in self.stages if s in ("encoder", "align")]:
            raise ValueError(
                f"`stages`: {', '.join(needy)} train on structures, which a model of "
                "`model.encoder.kind: none` does not see; leave them out"
            )
        for name in ("joint", "instruct"):
            if name in self.stages and getattr(self, name).drop_text:
                raise ValueError(
                    f"`{name}.drop_text` must be 0: without its text a prompt of "
                    "`model.encoder.kind: none` is empty"
                )
        if self.data.images:
            raise ValueError("`data.images` shows structures, which `model.encoder.kind: none` does not see")
        return self

    @model_validator(mode="after")
    def _presets_see_their_graph(self) -> Config:
        preset, seen = self.model.encoder.preset, (self.data.cutoff, self.data.max_neighbours)
        if preset and seen != (PRESET_CUTOFF, PRESET_NEIGHBOURS):
            raise ValueError(
                f"`model.encoder.preset` {preset} reads graphs of {PRESET_CUTOFF:g} Å and "
                f"{PRESET_NEIGHBOURS} neighbours; set `data.cutoff: "
                f"{PRESET_CUTOFF:g}` and `data.max_neighbours: {PRESET_NEIGHBOURS}`"
            )
        return self

    @model_validator(mode="after")
    def _apex_runs_on_gpus(self) -> Config:
        if self.optimizer == "apex" and self.cpu_offload:
            raise ValueError(
                "`optimizer: apex` runs on GPUs only; with `cpu_offload` take `optimizer: torch`"
            )
        return self
