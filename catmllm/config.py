"""The typed schema of every YAML key, and the one way a configuration is read.

`load_config(path, overrides)` merges the defaults below, a YAML file and `key.sub=value` overrides. An unknown key, a
wrong type or a value out of range is a `ConfigError` that names the key, where it came from and the nearest valid one.
The defaults are the tiny pipeline that `torchrun catmllm/train.py` runs without arguments.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rewards_fast import RewardSettings

STAGES = ("align", "joint", "instruct", "grpo", "ga_grpo")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says which key, why, and what would be valid."""


@dataclass
class DataConfig:
    """Where systems come from and how they are cut into a graph and into text."""

    # a folder that `catmllm data oc20` made, or JSONL(.gz) of adsorption systems; None: the slabs shipped with the package
    path: str | None = None
    split_seed: int = 0
    decimals: int = 3  # digits of every number in a CIF
    cutoff: float = 6.0  # Å; of the neighbour graph
    max_neighbours: int = 12
    # how questions are asked in joint and instruct: in the paper's words, or also in those of data/phrasings.json
    phrasings: Literal["paper", "varied"] = "paper"
    augment: bool = True  # supervised stages see each system through a random symmetry of its slab's sites
    # property prompts that show a structure show a picture of it too; needs `model.llm.pretrained`
    images: bool = False
    strict_neighbours: bool = False  # exactly max_neighbours, as the OC20 checkpoints were trained
    packed: bool = True  # samples end to end; false: each padded to the longest of its batch
    workers: int = 0  # processes a rank that make its batches ahead; 0: none, they are made between the steps


@dataclass
class LLMConfig:
    """Qwen2.5-VL: `pretrained` names a folder or hub id; otherwise random weights of the size given here."""

    pretrained: str | None = None
    hidden_size: int = 192
    num_hidden_layers: int = 4
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    intermediate_size: int = 512
    max_position_embeddings: int = 2048
    # varlen: ours, inside each sample alone; torch's FlashAttention on CUDA. The others are transformers' own.
    attention: Literal["varlen", "eager", "sdpa", "flash_attention_2"] = "varlen"
    train_images: bool = False  # the image tower trains in joint and instruct; else it keeps its weights


@dataclass
class EncoderConfig:
    """EquiformerV2: `checkpoint` is a fairchem file; `preset` 31M or 153M fixes every size below."""

    checkpoint: str | None = None
    preset: Literal["31M", "153M"] | None = None
    num_layers: int = 2
    lmax: int = 2
    mmax: int = 2
    sphere_channels: int = 32
    attn_hidden_channels: int = 32
    num_heads: int = 4
    attn_alpha_channels: int = 16
    attn_value_channels: int = 8
    ffn_hidden_channels: int = 64
    edge_channels: int = 32
    num_distance_basis: int = 64


@dataclass
class LoRAConfig:
    """Low-rank adapters (peft) on the seven linear maps of every LLM block; merged into the weights on export."""

    r: int = 0  # rank; 0: the LLM's own weights train
    alpha: float = 16.0
    dropout: float = 0.05


@dataclass
class ModelConfig:
    llm: LLMConfig = field(default_factory=LLMConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    projector: Literal["max", "invariant", "atoms"] = "max"


@dataclass
class OptimConfig:
    """What every stage shares: a cosine schedule after a linear warm-up, AdamW, clipping."""

    steps: int = 100
    batch_size: int = 16  # samples (in the RL stages: prompts or tasks) per rank and step
    lr: float = 1e-3
    encoder_lr: float | None = None  # of encoder and projector; None: lr
    min_lr_ratio: float = 0.05
    warmup: int = 10
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    grad_clip: float = 1.0
    checkpoint_every: int = 100
    log_every: int = 10
    # Which gathered weights are freed after a forward pass: of the trained parts (frozen ones never change and stay
    # whole), of all (least memory), of none (one gather less a step, ZeRO-2).
    reshard: Literal["trained", "all", "none"] = "trained"
    # Reduce gradients after every pass of a step: more is sent, but none wait unsharded (4 bytes a parameter and rank).
    sync_every_pass: bool = False


@dataclass
class SupervisedConfig(OptimConfig):
    """Stage 1: passes a step, validation, and when a run is stopped."""

    accumulate: int = (
        1  # passes a step and rank; they share its batch_size, or are packs of batch_tokens each
    )
    batch_tokens: int | None = None  # tokens a pass at most: samples are packed to it, in place of batch_size
    validate_every: int = (
        0  # steps between validations; the best weights seen are the stage's result. 0: never
    )
    validate_systems: int = 1024  # of the validation split, over all ranks
    patience: int = 0  # stop after so many validations without a better one; 0: never
    spike: float = 20.0  # stop where the loss is so many median deviations above its recent median; 0: never


@dataclass
class AlignConfig(SupervisedConfig):
    """Stage 1a: symmetric InfoNCE between graph token and frozen text encoding."""

    steps: int = 60
    batch_size: int = 32
    lr: float = 2e-3
    temperature: float = 0.07


@dataclass
class JointConfig(SupervisedConfig):
    """Stage 1b: everything trains; MMTG of energy MAE and answer cross-entropy, per sample."""

    steps: int = 600
    lr: float = 2e-3
    warmup: int = 30
    mmtg_lambda: float = 1.0
    mmtg_sign: Literal["+", "-"] = "+"
    property_share: float = 0.7  # of each batch; the rest are CIF and design samples, cross-entropy alone
    drop_text: float = 0.1  # property prompts that carry the graph alone
    drop_graph: float = 0.1  # ... the text alone
    position_noise: float = 0.05  # Å, Gaussian, on the graph's atoms
    exemplar_noise: float = 0.05  # Å, where a design prompt shows the sample's own structure


@dataclass
class InstructConfig(SupervisedConfig):
    """Stage 1c: the LLM alone, on all three tasks, with modalities dropped at random."""

    steps: int = 400
    lr: float = 2e-3
    warmup: int = 30
    property_share: float = 0.25
    design_share: float = 0.45
    drop_text: float = 0.2  # property prompts that carry the graph alone
    drop_graph: float = 0.2  # ... the text alone
    exemplar_noise: float = 0.05  # Å, where a design prompt shows the sample's own structure


@dataclass
class SamplingConfig:
    temperature: float = 1.0
    top_p: float = 0.95
    max_new_tokens: int = 256
    grammar: bool = False  # CIF answers keep to the file's form and to the wanted counts of elements
    stop: tuple[str, ...] = ()  # an answer also ends where it has come to hold one of these


@dataclass
class RewardConfig(RewardSettings):
    """PVCP weights and thresholds, every key of `rewards_fast.RewardSettings`. Eq. 41's upper distance (1.0 Å) punishes
    every O-H bond."""

    near: float = 0.7  # Å; nearer than this is penalised
    threads: int | None = 1


@dataclass
class GRPOConfig(OptimConfig):
    """Stage 2: GRPO on the PVCP reward."""

    steps: int = 70
    batch_size: int = 12
    lr: float = 1.5e-4
    warmup: int = 8
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    checkpoint_every: int = 20
    log_every: int = 1
    group_size: int = 8  # K
    beta: float = 0.02
    kl: Literal["k1", "k2", "k3"] = "k3"
    delta: float = 1e-4
    updates_per_rollout: int = 1
    clip: float = 0.2  # of the probability ratio; acts only with more than one update a rollout
    normalise: Literal["sample", "token"] = "sample"  # every answer counts alike, or every token does
    property_share: float = 0.1  # property samples replayed beside the rollouts
    micro_batch: int = 32  # sequences a forward pass
    reward_function: str | None = None  # file.py:function of your own, f(texts, targets); None: PVCP
    reward_timeout: float = 60.0  # s; an answer whose reward takes longer has none
    vllm: str | None = None  # Python of an environment with vLLM, which then samples; None: our own decoding
    vllm_memory: float = 0.3  # of a GPU's memory (without one: of the host's), for vLLM's weights and caches
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)


@dataclass
class GAGRPOConfig(OptimConfig):
    """Stage 3: GA-GRPO, the closed loop of design and refinement; only the AR head trains."""

    lr: float = 2e-4
    warmup: int = 2
    weight_decay: float = 0.0
    checkpoint_every: int = 5
    log_every: int = 1
    tasks: int = 64  # over all ranks; `batch_size` of them at a time on each, `steps` follows from it
    initial: int = 16  # N0, text-conditioned candidates a task
    pool: int = 6  # K, exemplars kept
    iterations: int = 10  # T
    group_size: int = 8  # G
    beta: float = 0.05
    kl: Literal["k1", "k2", "k3"] = "k3"
    delta: float = 1e-4
    energy_weight: float = 0.7
    pvcp_weight: float = 0.3
    energy_lambda: float = 1.0  # 1/eV
    pvcp_scale: Literal["unit", "raw"] = "unit"
    micro_batch: int = 64
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)


@dataclass
class EvaluateConfig:
    """What is measured after the stages (SPEC's list), on systems that no stage trained on."""

    generation_samples: int = 512
    design_tasks: int = 48
    judge: Literal["sevennet", "none"] = "sevennet"
    tolerance: float = 0.25  # eV
    # of the answers that failure modes are counted on; the paper's own setting
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=0.7, top_p=0.9))


@dataclass
class Config:
    """A whole run: which stages, from what weights, on what data."""

    out: str = "runs/tiny"
    seed: int = 0
    init: str | None = None  # exported model folder to start from; None: pretrained parts and random weights
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    encoder_precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    replicate: int = 1  # copies of the sharded model (HSDP); on several nodes: their number
    keep_checkpoints: int = 2  # of a running stage, beside the one with the best validation
    # What a block keeps for its backward pass: everything, matrix products and attention, or its input alone.
    checkpointing: Literal["none", "selective", "full"] = "none"
    compile: bool = False  # each block of LLM and encoder by torch.compile
    cpu_offload: bool = (
        False  # a rank's shards of weights, gradients and optimizer states live in the host's memory
    )
    # AdamW in one kernel: torch's own, or apex's FusedAdam (on GPUs, where apex is installed).
    optimizer: Literal["torch", "apex"] = "torch"
    tensorboard: bool = True
    wandb: str | None = None  # project name on Weights & Biases; None: off
    profile: bool = (
        False  # of each stage's first steps: a Chrome trace and a table by phase in <stage>/profile
    )
    threads: int = 1  # of torch, per rank on a CPU
    stages: tuple[str, ...] = STAGES
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    joint: JointConfig = field(default_factory=JointConfig)
    instruct: InstructConfig = field(default_factory=InstructConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    ga_grpo: GAGRPOConfig = field(default_factory=GAGRPOConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


def load_config(path: str | Path | None = None, overrides: typing.Sequence[str] = ()) -> Config:
    """Read defaults < YAML file < `key.sub=value` overrides, each checked against the schema.

    Raises `ConfigError` for an unreadable file, an unknown key (naming the nearest), a wrong type or choice.
    """
    import yaml

    config = Config()
    if path is not None:
        try:
            tree = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
        if not isinstance(tree, dict):
            raise ConfigError(f"{path}: the top level must be a mapping of keys, got {type(tree).__name__}")
        _merge(config, tree, str(path), "")
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {item!r}: write key=value, for example grpo.lr=1e-4")
        try:
            # A lone dash (`joint.mmtg_sign=-`) would be a YAML list of one null.
            value = text if text == "-" else yaml.safe_load(text) if text else None
        except yaml.YAMLError as error:
            raise ConfigError(f"override {item!r}: the value is not YAML: {error}") from error
        nested: Any = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        _merge(config, nested, "command line", "")
    _check(config)
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain nested dicts and lists, as JSON and YAML can hold it."""
    plain = dataclasses.asdict(config)

    def lists(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: lists(v) for k, v in value.items()}
        return [lists(v) for v in value] if isinstance(value, tuple | list) else value

    return lists(plain)


def from_dict(tree: dict[str, Any], source: str = "saved configuration") -> Config:
    """The inverse of `to_dict`, checked like a YAML file."""
    config = Config()
    _merge(config, tree, source, "")
    _check(config)
    return config


def _merge(node: Any, tree: dict[str, Any], source: str, prefix: str) -> None:
    hints = typing.get_type_hints(type(node))
    for key, value in tree.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.4)
            hint = f"did you mean `{prefix}{near[0]}`?" if near else f"valid keys: {', '.join(sorted(hints))}"
            raise ConfigError(f"{source}: unknown key `{prefix}{key}`; {hint}")
        current = getattr(node, key)
        if dataclasses.is_dataclass(current):
            if not isinstance(value, dict):
                raise ConfigError(
                    f"{source}: `{prefix}{key}` is a section with keys of its own, got {value!r}"
                )
            _merge(current, value, source, f"{prefix}{key}.")
        else:
            setattr(node, key, _convert(value, hints[key], f"{source}: `{prefix}{key}`"))


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Union or origin is types.UnionType:
        if value is None and type(None) in args:
            return None
        return _convert(value, next(a for a in args if a is not type(None)), where)
    if origin is Literal:
        text = str(value)
        if text in args:
            return text
        near = difflib.get_close_matches(text, args, n=1, cutoff=0.3)
        raise ConfigError(
            f"{where} must be one of {', '.join(args)}; got {value!r}"
            + (f" (did you mean {near[0]}?)" if near else "")
        )
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} must be a list, got {value!r}")
        if args[-1] is not Ellipsis and len(value) != len(args):
            raise ConfigError(f"{where} must have {len(args)} entries, got {len(value)}")
        inner = args[0]
        return tuple(_convert(v, inner, where) for v in value)
    if hint is float and isinstance(value, str):  # YAML reads 1e-4 as text
        with contextlib.suppress(ValueError):
            value = float(value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ConfigError(f"{where} must be finite, got {value!r}")
        return float(value)
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint in (bool, str) and isinstance(value, hint):
        return value
    raise ConfigError(f"{where} must be {getattr(hint, '__name__', hint)}, got {value!r}")


def _check(config: Config) -> None:
    for stage in config.stages:
        if stage not in STAGES:
            near = difflib.get_close_matches(stage, STAGES, n=1, cutoff=0.3)
            raise ConfigError(
                f"`stages`: unknown stage {stage!r}; did you mean {near[0] if near else STAGES}?"
            )

    def positive(node: Any, prefix: str) -> None:
        for f in dataclasses.fields(node):
            value, name = getattr(node, f.name), f"{prefix}{f.name}"
            if dataclasses.is_dataclass(value):
                positive(value, f"{name}.")
            elif f.name in _POSITIVE and value is not None and value <= 0:
                raise ConfigError(f"`{name}` must be positive, got {value}")
            elif f.name in _SHARES and not 0 <= value <= 1:
                raise ConfigError(f"`{name}` must be between 0 and 1, got {value}")

    positive(config, "")
    for stage in ("grpo", "ga_grpo"):
        try:
            getattr(config, stage).reward.check(f"`{stage}.reward`")
        except ValueError as error:
            raise ConfigError(str(error)) from None
    d, preset = config.data, config.model.encoder.preset
    if d.images and config.model.llm.pretrained is None:
        raise ConfigError(
            "`data.images` needs the image tower of a pretrained Qwen2.5-VL (`model.llm.pretrained`): the LLM of random "
            "weights has none"
        )
    if config.model.llm.train_images and not d.images:
        raise ConfigError("`model.llm.train_images` trains nothing without `data.images`")
    if preset and (d.cutoff, d.max_neighbours) != (12.0, 20):
        raise ConfigError(
            f"`model.encoder.preset` {preset} reads graphs of 12 Å and 20 neighbours; set `data.cutoff: 12` and "
            "`data.max_neighbours: 20`"
        )
    if config.grpo.checkpoint_every % config.grpo.updates_per_rollout:
        raise ConfigError("`grpo.checkpoint_every` must be a multiple of `grpo.updates_per_rollout`")
    o = config.grpo
    if o.vllm is not None and (o.sampling.grammar or o.sampling.stop):
        raise ConfigError(
            "`grpo.sampling.grammar` and `grpo.sampling.stop` need our own decoding; leave `grpo.vllm` empty"
        )
    if config.optimizer == "apex" and config.cpu_offload:
        raise ConfigError("`optimizer: apex` runs on GPUs alone; with `cpu_offload` take `optimizer: torch`")
    if config.align.accumulate != 1:
        raise ConfigError(
            "`align.accumulate` must be 1: the negatives of a sample are those of its pass; raise `align.batch_size`"
        )
    if config.align.batch_tokens is not None:
        raise ConfigError(
            "`align.batch_tokens` must be empty: every rank needs equally many samples in a pass"
        )
    if config.data.workers < 0:
        raise ConfigError(f"`data.workers` must be 0 or more, got {config.data.workers}")
    if config.model.llm.hidden_size % config.model.llm.num_attention_heads:
        raise ConfigError("`model.llm.hidden_size` must be a multiple of `model.llm.num_attention_heads`")


_POSITIVE = frozenset(
    [
        "steps",
        "batch_size",
        "lr",
        "temperature",
        "group_size",
        "micro_batch",
        "log_every",
        "checkpoint_every",
        "max_new_tokens",
        "cutoff",
        "max_neighbours",
        "hidden_size",
        "tasks",
        "iterations",
        "pool",
        "initial",
        "threads",
        "updates_per_rollout",
        "reward_timeout",
        "tolerance",
        "accumulate",
        "batch_tokens",
        "replicate",
        "keep_checkpoints",
        "validate_systems",
        "alpha",
    ]
)
_SHARES = frozenset(
    ["property_share", "design_share", "drop_text", "drop_graph", "top_p", "dropout", "vllm_memory"]
)
