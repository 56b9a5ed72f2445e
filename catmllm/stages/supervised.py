"""What `joint` and `instruct` share: a seeded mixture of the three tasks, and the losses of a batch."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from catmllm.config import Config, DataConfig, MixedConfig, OptimConfig, SupervisedConfig
from catmllm.data.augment import symmetric_copy
from catmllm.data.batches import Batch, draw, shuffled
from catmllm.data.exchange import exchanged, other_metals
from catmllm.data.loader import Loader, Windows
from catmllm.data.open import texts_only
from catmllm.data.prompts import Sample, cif_sample, design_sample, draw_words, jitter, property_sample
from catmllm.data.splits import held_out
from catmllm.data.subsets import of_generation, of_property
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.seeds import Key, Stream, generator
from catmllm.structure.cif import by_layer
from catmllm.structure.descriptors import fold_of, known, surroundings, told
from catmllm.structure.system import System
from catmllm.structure.text import three_part_text, two_part_text, worded
from catmllm.train.stage import Context, Metrics, MicroBatch, Plain, Step, Validation
from catmllm.train.stop import TrainingError
from catmllm.world import loader_workers

DESCRIBED = 10_000  # training systems at most by which surroundings are scaled and the closed form is fitted
VISUAL = "llm.model.visual."  # the image tower's parameters


def relatives(systems: Sequence[System]) -> list[list[int]]:
    """For each system, the others of the same composition and adsorbate (same identity)."""
    groups: dict[str, list[int]] = {}
    mine = [groups.setdefault(s.identity, []) for s in systems]
    for i, group in enumerate(mine):
        group.append(i)
    return [[j for j in group if j != i] for i, group in enumerate(mine)]


def standardise(context: Context) -> None:
    """Take mean and deviation of the training energies as the scale of energies, and those of the structures'
    surroundings as theirs, and fit the closed form to at most `DESCRIBED` of them, where the model has none
    yet. One that has been trained on energies keeps its own, or its predictions would jump. Without
    `model.closed_form` there is no fit, and networks do not see surroundings."""
    model = context.model
    train = of_property(context.data["train"], context.config.data)
    energies = torch.tensor([s.known_energy for s in train])
    new = (model.energy_std == 1) & (model.energy_mean == 0)
    model.energy_mean.copy_(torch.where(new, energies.mean(), model.energy_mean))
    model.energy_std.copy_(torch.where(new, energies.std(), model.energy_std))
    head = model.energy_head
    if not context.config.model.closed_form:
        head.deviation.fill_(torch.inf)
    elif bool((head.deviation == 1).all()) and not texts_only(train):
        some = described(train)
        local = np.array([surroundings(s) for s in some])
        deviation = local.std(0)
        # what hardly varies in training would be all there is of a structure in which it does
        head.deviation.copy_(torch.from_numpy(np.maximum(deviation, 0.02 * deviation.max() or 1.0)))
        head.centre.copy_(torch.from_numpy(local.mean(0)))
        _fit_closed_form(context, some, local)


def described(train: Sequence[System]) -> list[System]:
    """All training systems, or `DESCRIBED` evenly spaced ones."""
    rows = np.linspace(0, len(train) - 1, min(len(train), DESCRIBED)).round()
    return [train[int(i)] for i in rows]


def _fit_closed_form(context: Context, systems: list[System], local: np.ndarray) -> None:
    """Fit the model's closed forms, of structures and of texts, to systems, whose surroundings are `local`,
    and to their starts. The first rank fits the one, the last the other, and all have both: a fit to many
    systems takes minutes, and some 12 GB of the host at `DESCRIBED`."""
    model, world = context.model, context.world
    starts = [s.frame(0.0) for s in systems if s.start is not None]
    shown = [*systems, *starts]
    read = [*shown, *further_texts(shown, context.config)]

    def of_structures() -> dict[str, float]:
        numbers = np.stack([*local, *(surroundings(s) for s in starts)])
        return model.prior.fit(numbers, *_facts(shown))

    def of_texts() -> dict[str, float]:
        numbers = np.array([told(three_part_text(s)) for s in read])
        return model.text_prior.fit(numbers, *_facts(read), scaled=len(shown))

    for what, prior, fit, some, rank in (
        ("structures", model.prior, of_structures, shown, 0),
        ("texts", model.text_prior, of_texts, read, world.size - 1),
    ):
        if world.rank == rank:
            errors = ", ".join(f"{kind} {e:.3f}" for kind, e in fit().items())
            told_of = f"closed form of {what}, MAE (eV) on (bulk, Miller index) pairs not seen: {errors}"
            print(told_of, file=sys.stderr, flush=True)  # a plan's output is JSON
        else:
            prior.make_room(known(some))
    world.broadcast(model.prior.buffers(), 0)
    world.broadcast(model.text_prior.buffers(), world.size - 1)


def _facts(systems: list[System]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a fit takes beside descriptors: what is known, folds and energies (eV)."""
    energies = np.array([s.known_energy for s in systems])
    return known(systems), np.array([fold_of(s) for s in systems]), energies


def closed_form(model: CatalyticMLLM) -> Callable[[System], float] | None:
    """What the closed form of structures says (eV) of a system, where the model has one."""
    prior = copy.deepcopy(model.prior).cpu().eval()

    def energy_of(system: System) -> float:
        local = torch.from_numpy(surroundings(system))
        return float(prior(local[None], torch.from_numpy(known([system]))))

    return energy_of if len(prior.landmarks) else None


def further_texts(systems: Sequence[System], config: Config) -> list[System]:
    """What the closed form of texts reads beside whole texts, where `joint` or `instruct` trains it: for two
    parts a system per text, at the mean energy of those that share it, which is the best that can be said;
    of relaxed strings an evenly spaced share, `relaxed_text` of all."""
    found: list[System] = []
    stages = (config.joint, config.instruct)
    if any(o.drop_configuration for o in stages):
        same: dict[tuple[str, bool], list[System]] = {}
        for s in systems:
            same.setdefault((two_part_text(s), s.relaxed), []).append(s)
        for (text, _), some in same.items():
            mean = float(np.mean([s.known_energy for s in some]))
            found.append(replace(worded(some[0], text), energy=mean))
    o = max(stages, key=lambda o: o.relaxed_text)
    for s in systems[:: round(1 / o.relaxed_text)] if o.relaxed_text else ():
        found.append(worded(s, three_part_text(s, o.relaxed_scale, o.relaxed_characters)))
    return found


def some_frame(system: System, rng: np.random.Generator, share: float) -> System:
    """With the chance `share` the system at the start of its relaxation
    or, as often, on the way from there."""
    if share == 0.0 or system.start is None or rng.random() >= share:
        return system
    return system.frame(max(0.0, 2.0 * rng.random() - 1.0))


def as_written(system: System, data: DataConfig) -> System:
    """The structure that answers and exemplars show of a system."""
    return system if data.written == "relaxed" or system.start is None else system.frame(0.0)


def property_with_dropout(
    system: System,
    rng: np.random.Generator,
    drop_text: float,
    drop_graph: float,
    noise: float,
    phrasings: str = "paper",
    frames: float = 0.0,
    texts: MixedConfig | None = None,
) -> Sample:
    """A property sample, sometimes without its text or without its graph, never without both; a share
    `frames` of them shows an unrelaxed structure, in graph and text alike. Without a graph the text may be
    one of those that `texts` asks for (`in_other_words`). Of a text without a structure, the text."""
    if system.text is not None:
        return property_sample(system, "text", words=draw_words(rng, phrasings))
    system = some_frame(system, rng, frames)
    u = rng.random()
    mode: Literal["both", "graph", "text"] = (
        "graph" if u < drop_text else "text" if u < drop_text + drop_graph else "both"
    )
    shown = None if mode == "text" else jitter(system, noise, rng)
    if mode == "text" and texts is not None:
        system = in_other_words(system, rng, texts)
    return property_sample(system, mode, shown, draw_words(rng, phrasings))


def in_other_words(system: System, rng: np.random.Generator, o: MixedConfig) -> System:
    """A system whose text alone is shown, with the chance `drop_configuration` by the two parts that are
    known without a structure, with the chance `relaxed_text` by bonds as an indicative CIF has them. Takes no
    draw where both are 0."""
    if o.drop_configuration == o.relaxed_text == 0.0:
        return system
    u = rng.random()
    if u < o.drop_configuration:
        return worded(system, two_part_text(system))
    if u < o.drop_configuration + o.relaxed_text:
        return worded(system, three_part_text(system, o.relaxed_scale, o.relaxed_characters))
    return system


def chosen(
    n: int, batch: int, order: Key, samples: Key, step: int, rank: int, world: int
) -> list[tuple[int, np.random.Generator]]:
    """This rank's systems at a step, each with its own generator.

    A generator is a function of the key `samples`, step and place in the batch of all ranks: two ranks
    together draw what one with twice the batch does.
    """
    indices = draw(n, batch, order, step, rank, world)
    return [(int(i), generator((*samples, step, rank * batch + k))) for k, i in enumerate(indices)]


def task_sample(
    system: System,
    kin: list[System],
    rng: np.random.Generator,
    design_share: float,
    noise: float,
    data: DataConfig,
    exemplar_share: float = 0.5,
    exchange: float = 0.0,
    held_out: Container[str] = (),
    energy_of: Callable[[System], float] | None = None,
) -> Sample:
    """A design sample with the chance `design_share`, else a CIF sample; words, digits and rows as `data` has
    them.

    A share of the design samples shows an exemplar: a relative (same composition and adsorbate),
    else the own structure with noise. A share `exchange` of the samples has other metals, such that
    `slabs.pair` is not held out; design samples only where `energy_of` says (eV) what then to ask for.
    """
    rows = by_layer if data.rows == "layers" else lambda s: s
    design, names = rng.random() < design_share, {}
    if exchange and (energy_of or not design) and rng.random() < exchange:
        names = other_metals(system, held_out, rng)
    exemplar = None
    if design and rng.random() < exemplar_share:
        exemplar = kin[rng.integers(len(kin))] if kin else jitter(system, noise, rng)
    if names:
        system, exemplar = exchanged(system, names), exemplar and exchanged(exemplar, names)
    words = draw_words(rng, data.phrasings)
    if not design:
        return cif_sample(rows(system), data.decimals, words)
    if names and energy_of:
        system = replace(system, energy=energy_of(system))
    return design_sample(rows(system), exemplar, data.decimals, words)


def evenly(position: int, share: float) -> bool:
    """Whether what is at this position of a sequence is one of a share of all that is spread evenly."""
    return share_before(position + 1, share) > share_before(position, share)


def share_before(position: int, share: float) -> int:
    """How many of that share stand before this position."""
    return int(position * share + 1e-9)


class FromLoader(Plain):
    """Base of stages whose batches come from a loader: a checkpoint keeps the place in it."""

    context: Context
    config: SupervisedConfig
    loader: Loader

    @property
    def validation(self) -> Validation | None:
        o = self.config
        return Validation(self.validate, o.validate_every, o.patience) if o.validate_every else None

    @property
    def spike(self) -> float:
        return self.config.spike

    def validate(self) -> dict[str, float]:
        return validation_error(self.context, self.config)

    def load(self, example: Callable[[int], Sample], config: SupervisedConfig, marks: bool = False) -> None:
        """Begin to read; `example`: a position in the sequence of samples -> the sample there."""
        c = self.context
        windows = Windows(
            example,
            replace(c.collate, marks=marks),
            config.batch_size,
            config.accumulate,
            config.batch_tokens,
            dealt=config.dealt,
            atom_tokens=config.atom_tokens,
        )
        device = c.world.device.type
        workers = loader_workers(c.config, device)
        self.loader = Loader(windows, c.world.rank, c.world.size, workers, pin=device == "cuda")

    def batches(self, n: int) -> list[Batch]:
        """The next passes of this rank, not yet on its device."""
        return [next(self.loader) for _ in range(n)]

    def state(self) -> dict[str, Any]:
        return {"loader": self.loader.state(self.context.world.gather)}

    def load_state(self, state: dict[str, Any]) -> None:
        self.loader.load_state(state["loader"])


@dataclass
class Mixture:
    """Position in the sequence of samples -> the sample:
    property samples evenly among CIF and design samples.

    `property_of` makes a property sample, `design_share` is of the rest; for the others see `task_sample`.
    Property samples are a sequence of their own, and so are the others: each is a function of keys and of its
    place in its sequence, so that neither ranks nor passes nor workers nor `property_share` change it. Texts
    without structures make property samples alone. `systems` make CIF and design samples, `known` property
    samples.
    """

    known: Sequence[System]
    systems: Sequence[System]
    data: DataConfig
    order: Key
    samples: Key
    property_share: float
    property_of: Callable[[System, np.random.Generator], Sample]
    design_share: float
    noise: float
    exemplar_share: float = 0.5
    exchange: float = 0.0
    held_out: Container[str] = ()
    energy_of: Callable[[System], float] | None = None

    def __post_init__(self) -> None:
        self.kin = relatives(self.systems)
        self.texts = texts_only(self.known)

    def __call__(self, position: int) -> Sample:
        share = 1.0 if self.texts else self.property_share
        asks, asked = evenly(position, share), share_before(position, share)
        systems = self.known if asks else self.systems
        place, own = (asked, (1,)) if asks else (position - asked, ())
        i = shuffled(place, len(systems), (*self.order, *own))
        rng = generator((*self.samples, place, *own))
        d = self.data
        system = systems[i] if asks else as_written(systems[i], d)
        if d.augment and not self.texts:
            system = symmetric_copy(system, rng)
        if asks:
            return self.property_of(system, rng)
        kin = [as_written(self.systems[j], d) for j in self.kin[i]]
        return task_sample(
            system,
            kin,
            rng,
            self.design_share,
            self.noise,
            d,
            self.exemplar_share,
            self.exchange,
            self.held_out,
            self.energy_of,
        )


class Mixed(FromLoader):
    """Base of the stages that train the LLM on all three tasks."""

    config: MixedConfig

    def finish(self) -> str:
        return weigh_llm(self.context, self.config.batch_size)

    def mix(self, order: Stream, samples: Stream, position_noise: float = 0.0) -> None:
        """Fit what energies begin with, where nothing has yet, and begin to read a mixture."""
        standardise(self.context)
        c, o, parts = self.context.config, self.config, self.context.data
        train = parts["train"]

        def property_of(system: System, rng: np.random.Generator) -> Sample:
            return property_with_dropout(
                system, rng, o.drop_text, o.drop_graph, position_noise, c.data.phrasings, o.frames, o
            )

        mixture = Mixture(
            of_property(train, c.data),
            of_generation(train, c.data),
            c.data,
            order.key(c.seed),
            samples.key(c.seed),
            o.property_share,
            property_of,
            o.designs_of_rest,
            o.exemplar_noise,
            o.exemplar_share,
            o.exchange,
            held_out(parts, c.data) if o.exchange else (),
            closed_form(self.context.model),
        )
        self.load(mixture, o, o.row_weight != 1.0)


def supervised_step(
    stage: FromLoader,
    config: SupervisedConfig,
    loss_of: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    row_weight: float = 1.0,
) -> Step:
    """The passes of a step; `loss_of` (cross-entropy, |energy error|, labelled), all [S], gives [S].
    row_weight: see `sample_losses`.

    The loss is the mean over the samples of all ranks and passes, so that how they are cut and packed changes
    nothing. Logs both losses, the energy's in eV, and where there is any, the share of a pass that holds no
    token.
    """
    world, model = stage.context.world, stage.context.model
    read = stage.batches(config.accumulate)
    total: float = sum(len(b) for b in read)
    n_labelled: float = sum(int(b.labelled.sum()) for b in read)
    batches = [b.to(world.device) for b in read]
    # packs differ in samples; ranks are averaged, so that this is their mean
    if config.batch_tokens is not None:
        of_ranks = np.array(world.gather((total, n_labelled)))
        total, n_labelled = of_ranks.mean(0).tolist()
    metrics: Metrics = {"cross_entropy": 0.0, "energy_mae": 0.0 if n_labelled else float("nan")}
    tokens = sum(b.tokens for b in batches)
    if batches[0].padded:
        metrics["waste"] = 1 - tokens / sum(len(b) * b.max_length for b in batches)
    elif config.batch_tokens is not None:
        metrics["waste"] = 1 - tokens / (config.batch_tokens * len(batches))
        metrics["too_long"] = float(stage.loader.too_long * world.size)  # the mean of ranks is their sum

    def loss(batch: Batch) -> torch.Tensor:
        ce, mae, labelled = sample_losses(model, batch, row_weight)
        metrics["cross_entropy"] += ce.detach().sum() / total
        if n_labelled:
            metrics["energy_mae"] += mae.detach().sum() * model.energy_std / n_labelled
        return loss_of(ce, mae, labelled).sum() / total

    passes = [MicroBatch(partial(loss, b), b.tokens, len(b.energy), b) for b in batches]
    return Step(passes, metrics)


def validation_systems(context: Context, config: OptimConfig) -> list[System]:
    """Evenly spaced systems of the validation split, the same on every rank."""
    val = context.data["val"]
    if not len(val):
        raise TrainingError("`validate_every` is set, but the validation split has no system")
    return [val[i] for i in range(0, len(val), -(-len(val) // config.validate_systems))]


def over_ranks(
    context: Context, systems: list[System], batch_size: int, values: Callable[[list[System]], torch.Tensor]
) -> float:
    """Mean of `values` of systems ([n] each), which the ranks share. All make equally many passes,
    since the sharded model's are collective."""
    world = context.world
    size = min(batch_size, -(-len(systems) // world.size))
    sums = dict.fromkeys(("value", "n"), 0.0)
    for start in range(0, len(systems), size * world.size):
        mine = systems[start : start + size * world.size][world.rank :: world.size]
        found = values(mine or systems[:1])
        if mine:
            sums["value"] += float(found.sum())
            sums["n"] += len(mine)
    total = world.mean(sums)
    return total["value"] / total["n"]


SHARES = np.linspace(0.0, 1.0, 21)
WEIGHED = 1024


def weigh_llm(context: Context, batch_size: int) -> str:
    """Scale what the LLM says of energies, of texts and of structures, by the shares that help on at most
    `WEIGHED` validation systems. Data of texts only have no closed form, so there the LLM counts whole."""
    val = context.data["val"]
    if not len(val) or texts_only(val) or not context.config.model.closed_form:
        return ""

    def energies(batch: Batch) -> torch.Tensor:
        return context.model(CatalyticMLLM.answer, batch).energy

    systems = [val[i] for i in range(0, len(val), -(-len(val) // WEIGHED))]
    head = context.model.energy_head
    parts: list[tuple[str, Any, list[Sample]]] = [
        ("text", head.text, [property_sample(s, "text") for s in systems]),
    ]
    if context.collate.shows_structures:
        parts.append(("correction", head.correction, [property_sample(s) for s in systems]))
    return "\n".join(weigh(context, *part, systems, batch_size, energies) for part in parts)


@torch.no_grad()
def weigh(
    context: Context,
    part: str,
    last: Any,
    samples: list[Sample],
    systems: list[System],
    batch_size: int,
    energies: Callable[[Batch], torch.Tensor],
) -> str:
    """Scale a part of the energy head, whose last layer is linear, by the least share that is as good as the
    best on validation samples: beside a good closed form, a network of few systems easily adds more noise
    than knowledge. `systems`: of the samples. `energies`: of a batch, standardised. Returns what is to
    be noted."""
    world, model = context.world, context.model
    head: Any = model.energy_head
    whole = [p.detach().clone() for p in last.parameters()]
    pairs = np.unique([f"{s.bulk} {s.miller}" for s in systems], return_inverse=True)[1].tolist()

    def count(share: float) -> None:
        head.reshard()  # gathered weights would be those from before
        for p, full in zip(last.parameters(), whole):
            p.copy_(share * full)

    def predicted() -> np.ndarray:
        size = min(batch_size, -(-len(samples) // world.size))
        mine: list[tuple[float, float, int]] = []
        for start in range(0, len(samples), size * world.size):
            own = samples[start : start + size * world.size][world.rank :: world.size]
            of = pairs[start : start + size * world.size][world.rank :: world.size]
            batch = context.collate(own or samples[:1]).to(world.device)
            found = (energies(batch).float() * model.energy_std + model.energy_mean).tolist()
            mine += list(zip(found[: len(own)], batch.energy.tolist(), of))
        return np.array([row for rows in world.gather(mine) for row in rows])

    model.eval()
    count(0.0)
    without, truth, of_pair = predicted().T
    count(1.0)
    added = predicted()[:, 0] - without
    errors = np.abs(without + SHARES[:, None] * added - truth)
    chosen, means = least_share(errors, of_pair), errors.mean(1)
    count(float(SHARES[chosen]))
    model.train()
    return (
        f"{part} part of the energy head: counts by {SHARES[chosen]:.2g}, by its error on validation systems "
        f"({means[chosen]:.4g} eV; best {means.min():.4g}, whole {means[-1]:.4g}, without it {means[0]:.4g})"
    )


def least_share(errors: np.ndarray, pairs: np.ndarray) -> int:
    """Of |errors| [shares, n] the first row whose mean is within a standard error of the best one's (Breiman
    et al. 1984): what helps by chance does not count. Systems of one of the (bulk, Miller index) `pairs` [n]
    err alike, so the error is that of pairs; a single one tells nothing."""
    means, names = errors.mean(1), np.unique(pairs)
    if len(names) < 2:
        return 0
    lead = errors - errors[means.argmin()]
    sums = (lead - lead.mean(1, keepdims=True)) @ (pairs[:, None] == names)
    noise = np.sqrt((sums**2).sum(1) * len(names) / (len(names) - 1)) / errors.shape[1]
    return int(np.argmax(means - means.min() <= noise))


def validation_error(context: Context, config: SupervisedConfig) -> dict[str, float]:
    """Mean absolute error of the energy head (eV) and cross-entropy on validation systems,
    structure and text given.

    Every rank makes equally many passes, since the sharded model's are collective.
    "val" is what is minimised.
    """
    world, model = context.world, context.model
    systems = validation_systems(context, config)
    size = min(config.batch_size, -(-len(systems) // world.size))
    sums = dict.fromkeys(("error", "ce", "n"), 0.0)
    for start in range(0, len(systems), size * world.size):
        mine = systems[start : start + size * world.size][world.rank :: world.size]
        batch = context.collate([property_sample(s) for s in mine or systems[:1]]).to(world.device)
        ce, mae, _ = sample_losses(model, batch)
        if mine:
            sums["error"] += float(mae.sum()) * float(model.energy_std)
            sums["ce"] += float(ce.sum())
            sums["n"] += len(mine)
    total = world.mean(sums)
    return {"val": total["error"] / total["n"], "val_cross_entropy": total["ce"] / total["n"]}


def sample_losses(
    model: CatalyticMLLM, batch: Batch, row_weight: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per sample: cross-entropy of the answer (mean over its tokens, those of `batch.telling` counting
    row_weight), |error| of the standardised energy (0 where there is no label), and whether there is one. All
    [S]."""
    out = model(CatalyticMLLM.answer, batch)
    weight = torch.ones_like(out.logprob)
    if batch.telling is not None and row_weight != 1.0:
        weight = torch.where(batch.telling, row_weight, weight)
    count = out.logprob.new_zeros(len(batch)).index_add(0, batch.answer_sample, weight)
    ce = out.logprob.new_zeros(len(batch)).index_add(0, batch.answer_sample, -out.logprob * weight)
    ce = ce / torch.where(count > 0, count, 1.0)
    labelled = batch.labelled
    target = (batch.energy - model.energy_mean) / model.energy_std
    # `where` before the subtraction: a NaN times zero would still be a NaN gradient.
    error = torch.where(labelled, out.energy, 0.0) - torch.where(labelled, target, 0.0)
    return ce, error.abs(), labelled
