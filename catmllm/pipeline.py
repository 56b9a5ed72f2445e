"""A run from data to report: each stage trained from the last one's export, then measured."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from catmllm.config import Config, SamplingConfig, to_dict
from catmllm.data.batches import Collator
from catmllm.data.open import open_data, texts_only
from catmllm.data.oracle import POTENTIALS, check_judge
from catmllm.data.shards import Shards
from catmllm.data.slabs import on_fcc_slab
from catmllm.data.splits import describe
from catmllm.data.subsets import learned
from catmllm.design.domain import FILE as DOMAIN
from catmllm.design.domain import SAMPLE, Domain, calibrate, domain_of
from catmllm.evaluate.baselines import baselines, evenly_spaced, for_baselines
from catmllm.evaluate.design import evaluate_design
from catmllm.evaluate.ensemble import Ensemble, load_ensemble
from catmllm.evaluate.free import evaluate_free
from catmllm.evaluate.generation import evaluate_generation
from catmllm.evaluate.metrics import mae, r2
from catmllm.evaluate.missing import evaluate_missing, pairs_of
from catmllm.evaluate.property import agreement, evaluate_property, validation_energies
from catmllm.evaluate.slab_tasks import evaluate_slabs
from catmllm.models.build import collator, new_model
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.models.half_precision import rounded
from catmllm.models.state import load_model, save_model, stage_folder, trained_config
from catmllm.report.run import ANSWERS, summary_table, with_trained_baselines, write_report
from catmllm.report.summary import ARMS, GENERATING, MODES
from catmllm.sample.vllm_engine import VLLMError
from catmllm.stages import STAGES
from catmllm.stages.supervised import as_written
from catmllm.structure.cif import write_cif
from catmllm.structure.system import System
from catmllm.structure.templates import NONE, Templates
from catmllm.train.checkpoint import CheckpointError
from catmllm.train.fused_adam import fused_adam
from catmllm.train.hang import lost
from catmllm.train.loop import train
from catmllm.train.metrics import KINDS, optional
from catmllm.train.stage import Context
from catmllm.train.stop import EXIT_SAVED, Stopped, TrainingError, stop_at_once
from catmllm.train.store import Mirror, StoreError, fetched
from catmllm.world import DTYPES, World, encoder_dtype, loader_workers, settled, start

# What may be another when a run goes on.
MENDABLE = (
    "name", "out", "tensorboard", "wandb", "mlflow", "trackio", "profile", "threads",
    "keep_checkpoints", "replicate", "store", "data.workers", "hang_after", "grpo.service",
    "grpo.service_patience",
)  # fmt: skip
OF_TEXTS = ("joint", "instruct")  # stages that can do without structures
FIT_ENERGIES = ("encoder", "joint")  # stages that fit scale and closed forms of energies where there are none


class Record:
    """metrics.json, kept by the main rank and written anew after each part."""

    def __init__(self, path: Path, world: World) -> None:
        self.path, self.main = path, world.main
        loaded = json.loads(path.read_text()) if world.main and path.is_file() else {}
        self.values: dict[str, Any] = world.gather(loaded)[0]

    def put(self, value: Any, *keys: str) -> None:
        node = self.values
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        node[keys[-1]] = value
        if self.main:
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text(json.dumps(self.values, indent=1, allow_nan=True))
            temporary.rename(self.path)

    def has(self, *keys: str) -> bool:
        node: Any = self.values
        for key in keys:
            if not isinstance(node, dict) or key not in node:
                return False
            node = node[key]
        return True

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds of a block to what `name` took before (a stage may have been resumed)."""
        began = time.perf_counter()
        try:
            yield
        finally:
            before = self.values.get("seconds", {}).get(name, 0.0)
            self.put(round(before + time.perf_counter() - began, 2), "seconds", name)


def run(config: Config) -> int:
    """All stages of a configuration, evaluation and report. Returns the exit status."""
    try:
        world = start(config)
        config = settled(config, world.device.type)
        stop_at_once()
        for name in KINDS:
            if getattr(config, name) is not None:
                optional(name)
        if config.optimizer == "apex":
            fused_adam()
        return _run(config, world)
    except Stopped as stopped:
        _say(world, f"stopped: {stopped}. The same command goes on from there.")
        return EXIT_SAVED
    except (TrainingError, CheckpointError, VLLMError, FileNotFoundError, ValueError) as error:
        # What a person can mend is one line; the trace is for faults of ours.
        if os.environ.get("CATMLLM_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except RuntimeError as error:
        said = lost(error, int(os.environ.get("RANK", "0")))
        if said is None or os.environ.get("CATMLLM_TRACEBACK"):
            raise
        print(f"error: {said}", file=sys.stderr, flush=True)
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _run(config: Config, world: World) -> int:
    out = Path(config.out)
    if (out / "model.safetensors").is_file():
        raise ValueError(f"`out: {out}` is the folder of a stage; a run's is the one above, {out.parent}")
    # what cannot be read or judged is said before the folder is claimed
    judge_note(config)
    data = open_data(config.data)
    known = learned(data, config.data)
    previous = _begins_from(config, out, world)
    texts = _texts(config, data)
    if config.evaluate.indicative and set(GENERATING) & {*config.stages}:
        pairs_of(data["test"])
    mirror = Mirror(config.store, out, world) if config.store else None
    share = world.barrier if mirror is None else mirror.share
    if mirror is not None:
        mirror.begin()
    record = _open(config, out, world)
    _say(world, _banner(config, world, data))
    for note in _notes(config, texts):
        _say(world, f"note: {note}")
    if not record.has("baselines"):
        shown = for_baselines(known, config.evaluate.property_systems)
        record.put(world.gather(baselines(shown, _subset(config)) if world.main else None)[0], "baselines")
    if previous is not None and not record.has("baselines", "zero_shot"):
        _zero_shot(previous, config, data["test"], record, world)
    domain = templates = None
    for name in config.stages:
        folder = out / name
        if not (folder / "model.safetensors").is_file():
            with record.timed(name):
                templates = templates or _templates(config, data["train"])
                _train(name, config, previous, folder, data, templates, record, world, mirror)
            share()
        # asked of one rank: it writes the file before a slower one has looked
        if world.gather(not (folder / DOMAIN).is_file())[0]:
            with record.timed(f"evaluate {name}"):
                domain = domain or domain_of(known["train"], *_labels(config, data))
                fresh = replace(domain, error={}, start_error={}, validation={})
                _calibrate(name, folder, fresh, config, data, record, world)
            share()
        if not record.has("property", name):
            with record.timed(f"evaluate {name}"):
                _evaluate(name, folder, config, data["test"], record, world)
        if config.evaluate.indicative and name in GENERATING and not record.has("missing", name):
            with record.timed(f"evaluate {name}"):
                _without_structures(name, folder, config, known, record, world)
        previous = folder
    _design(config, data, record, world)
    if world.main:
        report = write_report(out, evenly_spaced(data["test"], config.evaluate.property_systems))
        print(
            "\n"
            + summary_table(with_trained_baselines(record.values, out))
            + f"\n\nmetrics: {record.path}\nreport:  {report}",
            flush=True,
        )
    share()
    return 0


def _notes(config: Config, texts: bool) -> Iterator[str]:
    """What a reader of a run's first lines should know. texts: whether the data are texts alone."""
    if note := judge_note(config):
        yield note
    if _random_encoder(config) and not texts and config.model.encoder.kind != "none":
        yield (
            "no stage trains the encoder, which keeps its random weights; put `encoder` into `stages`, or "
            "set joint.train_encoder=true"
        )


def judge_note(config: Config) -> str:
    """`check_judge` of a run that searches for designs; empty for one that does not."""
    e = config.evaluate
    searches = {*config.stages} & {*e.design_after} and (e.design_tasks or e.slab_tasks)
    return check_judge(e.judge, config.data) if searches else ""


def _begins_from(config: Config, out: Path, world: World) -> Path | None:
    """The folder of the model that `init` names; one on a store is copied to this machine. Raises ValueError
    where the configuration is of weights of another make: they would train as what they are, and be saved as
    what it says."""
    if config.init is None:
        return None
    folder = fetched(config.init, out, world) if "://" in config.init else stage_folder(config.init)
    trained = to_dict(trained_config(folder))
    found = {key: (a, b) for key, a, b in differences(trained, to_dict(config)) if _makes_weights(key)}
    if found:
        shown = "; ".join(f"`{key}` is {_word(b)} here and {_word(a)} there" for key, (a, b) in found.items())
        words = " ".join(f"{key}={_word(a)}" for key, (a, _) in found.items())
        raise ValueError(f"`init`: the model of {folder} is of another make ({shown}); add {words}")
    return folder


def _makes_weights(key: str) -> bool:
    """Whether a key says what the weights of a model are, which none that begins with them can change."""
    sizes = key.startswith("model.encoder.") and key != "model.encoder.checkpoint"
    return sizes or key in ("model.projector", "data.cutoff")


def _word(value: Any) -> str:
    """A value as it is written in a configuration."""
    return "null" if value is None else str(value)


def _open(config: Config, out: Path, world: World) -> Record:
    """The run's folder and record; refuses to go on with another
    configuration than the run was begun with."""
    problem = None
    record_path = out / "metrics.json"
    if world.main:
        out.mkdir(parents=True, exist_ok=True)
        if record_path.is_file():
            # What a finished stage was trained with is fixed; the rest may be mended.
            open_keys = (*MENDABLE, *(s for s in STAGES if not (out / s / "model.safetensors").is_file()))
            before = json.loads(record_path.read_text()).get("config", {})
            if not any((out / s).is_dir() and any((out / s).iterdir()) for s in STAGES):
                record_path.unlink()  # a start that failed before any training claims nothing
                before = {}
            changed = [
                f"{key}: {old} -> {new}"
                for key, old, new in differences(before or to_dict(config), to_dict(config))
                if not f"{key}.".startswith(tuple(f"{name}." for name in open_keys))
            ]
            if changed:
                problem = (
                    f"{out} was begun with another configuration ({'; '.join(changed[:3])}). "
                    "Give out= another folder, or remove this one."
                )
    if problem := world.gather(problem)[0]:
        raise ValueError(problem)
    record = Record(record_path, world)
    if not record.has("machine"):
        record.put(_machine(world), "machine")
    record.put(to_dict(config), "config")
    return record


def _train(
    name: str,
    config: Config,
    previous: Path | None,
    folder: Path,
    data: Mapping[str, Sequence[System]],
    templates: Templates,
    record: Record,
    world: World,
    mirror: Mirror | None,
) -> None:
    if previous is not None:
        model, collate, trained = load_model(previous, config.model.llm.attention)
        collate = collator(model, collate.tokenizer, config, templates)
        if begins_anew(trained, config) and not texts_only(data["train"]):
            model.forget_energies()
        if not config.model.closed_form:
            model.prior.clear()
            model.text_prior.clear()
    else:
        model, collate = new_model(config, data["train"])
        collate.templates = templates
    if not record.has("parameters"):
        record.put(_sizes(model), "parameters")
        record.put(_data_facts(config, collate, data), "data")
    folder.mkdir(parents=True, exist_ok=True)
    context = Context(config, model, collate, data, world, folder, mirror)
    try:
        state, _ = train(STAGES[name], context)
    except TrainingError:
        if mirror is not None and world.main:
            with suppress(StoreError, OSError):  # which must not hide the loss
                mirror.push()  # the batches that went wrong
        raise
    if world.main:
        save_model(folder, model, state, config, collate)


def _subset(config: Config) -> Callable[[System], bool] | None:
    """The test systems that are also measured by themselves."""
    return on_fcc_slab if config.data.path is None and config.data.slabs == "all" else None


def _templates(config: Config, systems: Sequence[System]) -> Templates:
    """What the slabs of CIFs that the model will write have to be, by those of training."""
    if texts_only(systems):
        return NONE
    return Templates.fit([as_written(s, config.data) for s in evenly_spaced(systems, SAMPLE)])


def begins_anew(trained: Config, config: Config) -> bool:
    """Whether a run fits scale and closed forms of energies to labels other than those that its first model
    has: their zero may be another, and what that one knows by heart is of other systems. A run without a
    stage that fits them keeps what there is."""
    before, now = trained.data, config.data
    fits = any(stage in FIT_ENERGIES for stage in config.stages)
    return fits and (before.path, before.labels, before.slabs) != (now.path, now.labels, now.slabs)


def _to_measure(folder: Path, config: Config, world: World) -> tuple[CatalyticMLLM, Collator]:
    """A stage's model in the precision that it was trained in: measured in float32, 37,000 systems would take
    an eighth of all the time of a training run on A100s."""
    model, collate, _ = load_model(folder)
    return rounded(model, DTYPES[config.precision], encoder_dtype(config)).to(world.device), collate


def _texts(config: Config, data: Mapping[str, Sequence[System]]) -> bool:
    """Whether the data are texts alone. Raises ValueError for stages that need structures."""
    if not texts_only(data["train"]):
        return False
    if needy := [s for s in config.stages if s not in OF_TEXTS]:
        raise ValueError(
            f"`stages`: {', '.join(needy)} need structures, and {config.data.path} has texts alone; give "
            "stages=[joint] (configs/tiny/text.yaml)"
        )
    return True


def _evaluate(
    name: str, folder: Path, config: Config, test: Sequence[System], record: Record, world: World
) -> None:
    model, collate = _to_measure(folder, config, world)
    if name in GENERATING and not texts_only(test):
        e = config.evaluate

        def generated(sampling: SamplingConfig) -> dict[str, Any]:
            return evaluate_generation(
                model,
                collate,
                test,
                e.generation_samples,
                sampling,
                e.reward,
                config.seed,
                world,
                DTYPES[config.precision],
            )

        found = generated(e.sampling)
        if e.sampling.grammar:  # beside it what the policy does where nothing holds it
            found["free"] = generated(replace(e.sampling, grammar=False))
        answers = found.pop("answers")
        if "free" in found:
            answers += [{**row, "free": True} for row in found["free"].pop("answers")]
        if world.main:  # beside the weights, not in the record: megabytes of text
            with (folder / ANSWERS).open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in answers)
        record.put(found, "generation", name)
        for way, one in ((name, found), (f"{name}, free", found.get("free"))):
            if one is not None:
                _say(
                    world,
                    f"{way}: reward {one['reward']:.2f} ± {one['reward_se']:.2f}, PF {one['PF']:.1%}, "
                    f"VF {one['VF']:.1%}, CM {one['CM']:.1%}, PV {one['PV']:.1%}, AD {one['AD']:.1%} of "
                    f"{one['n']} samples",
                )
    some = evenly_spaced(test, config.evaluate.property_systems)
    dtype = DTYPES[config.precision]
    llm, ensemble = name != "encoder", load_ensemble(folder)
    measured = evaluate_property(model, collate, some, world, llm, dtype, ensemble, _subset(config))
    shown = ", ".join(f"{MODES[mode]} {measured[mode]['mae']:.3f}" for mode in MODES if mode in measured)
    _say(world, f"{name}: test MAE in eV: {shown}")
    record.put(measured, "property", name)


def _without_structures(
    name: str,
    folder: Path,
    config: Config,
    data: Mapping[str, Sequence[System]],
    record: Record,
    world: World,
) -> None:
    model, collate = _to_measure(folder, config, world)
    e, dtype = config.evaluate, DTYPES[config.precision]
    found = evaluate_missing(model, collate, data, e.indicative, e.sampling, config.seed, world, dtype)
    record.put(found, "missing", name)
    shown = ", ".join(f"{ARMS[arm]} {found['arms'][arm]['pir']:.1%}" for arm in ARMS)
    _say(world, f"{name}: predictions in the range of energies, no structure known: {shown}")


def _design(config: Config, data: Mapping[str, Sequence[System]], record: Record, world: World) -> None:
    """The search for the test tasks after each stage that is asked for: `design` after the last of them,
    `designs` of the stages before; after the last with free metals, `free_design`, and of slabs for their
    best sites, `slab_design`."""
    asked = [name for name in config.stages if name in config.evaluate.design_after]
    for name in asked if config.evaluate.design_tasks else ():
        place = ("design",) if name == asked[-1] else ("designs", name)
        if not record.has(*place):
            model, collate = _to_measure(Path(config.out) / name, config, world)
            with record.timed(" ".join(place).replace("designs", "design")):
                result = evaluate_design(model, collate, config, data, world)
            record.put(result, *place)
    free = min(config.evaluate.free_tasks, config.evaluate.design_tasks)
    if asked and free and not record.has("free_design"):
        model, collate = _to_measure(Path(config.out) / asked[-1], config, world)
        with record.timed("design with free metals"):
            result = evaluate_free(model, collate, config, data, world)
        record.put(result, "free_design")
    if asked and config.evaluate.slab_tasks and not record.has("slab_design"):
        model, collate = _to_measure(Path(config.out) / asked[-1], config, world)
        with record.timed("slabs for their best sites"):
            result = evaluate_slabs(model, collate, config, data, world)
        record.put(result, "slab_design")


def _zero_shot(previous: Path, config: Config, test: Sequence[System], record: Record, world: World) -> None:
    """Where a run begins with a model of other data: what that one says of the test systems as it is."""
    before = json.loads((previous / "catmllm.json").read_text(encoding="utf-8"))["data"]
    same = (before["path"], before.get("slabs", "fcc")) == (config.data.path, config.data.slabs)
    if same or previous.name in ("encoder", "align") or not len(test):
        return
    model, collate = _to_measure(previous, config, world)
    shown = evenly_spaced(test, config.evaluate.property_systems)
    predicted, _ = validation_energies(model, collate, shown, world)
    truth = [s.known_energy for s in shown]
    record.put({"mae": mae(predicted, truth), "r2": r2(predicted, truth)}, "baselines", "zero_shot")
    _say(world, f"{previous} as it is: {agreement(predicted, truth, [s.adsorbate for s in shown])}")


def _calibrate(
    name: str,
    folder: Path,
    domain: Domain,
    config: Config,
    data: Mapping[str, Sequence[System]],
    record: Record,
    world: World,
) -> None:
    """Leave beside a stage's weights what it has seen and how far its energies are off on at most 1,000
    validation systems, relaxed and as they started; of texts only also ridge regression and its share."""
    some = evenly_spaced(data["val"], 1000)
    if name not in ("encoder", "align") and len(some):
        model, collate = _to_measure(folder, config, world)
        predicted, expected = validation_energies(model, collate, some, world)
        truth = np.array([s.known_energy for s in some])
        if texts_only(data["train"]):
            ensemble = Ensemble.fit(data["train"], data["val"], some, predicted)
            predicted = ensemble.mean(some, predicted)
            record.put({"share": ensemble.share}, "ensemble", name)
            if world.main:
                ensemble.save(folder)
            calibrate(domain, predicted, truth, [s.adsorbate for s in some])
        else:
            calibrate(domain, predicted, truth, [s.adsorbate for s in some], expected)
            if begun := [s for s in some if s.start is not None]:
                predicted, expected = validation_energies(
                    model, collate, [s.frame(0.0) for s in begun], world
                )
                truth, names = np.array([s.known_energy for s in begun]), [s.adsorbate for s in begun]
                calibrate(domain, predicted, truth, names, expected, relaxed=False)
        record.put(domain.validation, "validation", name)
    if world.main:
        domain.save(folder)


def _labels(config: Config, data: Mapping[str, Sequence[System]]) -> tuple[str, str | None]:
    """Who made the labels, and their zero."""
    train = data["train"]
    if config.data.path is None:
        return f"{POTENTIALS[config.data.labels]}, an MLIP, not DFT", "gas CO, H2, H2O, N2"
    return config.data.path, train.facts.get("reference") if isinstance(train, Shards) else None


def _data_facts(config: Config, collate: Collator, data: Mapping[str, Sequence[System]]) -> dict[str, Any]:
    labels, reference = _labels(config, data)
    facts = {
        **{k: len(v) for k, v in data.items()},
        "split": describe(config.data.split_by, config.data.hold_out, config.data.split_seed),
        "labels": labels,
        "reference": reference,
    }
    if texts_only(data["train"]):
        return facts
    some = data["train"][:500]
    cifs = [write_cif(s, config.data.decimals) for s in some]
    return facts | {
        "tokens_per_cif": sum(len(collate.encode(c)) for c in cifs) / len(cifs),
        "characters_per_cif": sum(map(len, cifs)) / len(cifs),
        "atoms_per_cif": sum(len(s.numbers) for s in some) / len(some),
    }


def _sizes(model: CatalyticMLLM) -> dict[str, int]:
    def count(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    parts = {
        k: count(m)
        for k, m in (("encoder", model.encoder), ("projector", model.projector), ("llm", model.llm))
    }
    return {"total": count(model), **parts}


def _machine(world: World) -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    ).stdout.strip()
    name = torch.cuda.get_device_name() if world.device.type == "cuda" else _processor()
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "ranks": world.size,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _banner(config: Config, world: World, data: Mapping[str, Sequence[System]]) -> str:
    where = f"{world.size} x {world.device.type}"
    counts = ", ".join(f"{len(v)} {k}" for k, v in data.items())
    banner = (
        f"catmllm: {' > '.join(config.stages)} on {where}, {config.precision} (encoder "
        f"{config.encoder_precision}); systems: {counts}; out: {config.out}"
    )
    return banner if world.device.type == "cpu" else f"{banner}\n{_on_gpu(config)}"


def _on_gpu(config: Config) -> str:
    """What was chosen for a GPU, and by which key or variable it is chosen otherwise."""
    allocator = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or "plain"
    blocks = "compiled" if config.compile else "not compiled"
    return (
        f"GPU: encoder_precision {config.encoder_precision}, blocks {blocks} (compile), long products summed "
        f"in float32, allocator {allocator} (PYTORCH_ALLOC_CONF), {loader_workers(config, 'cuda')} processes "
        "per rank make batches (data.workers)"
    )


def _random_encoder(config: Config) -> bool:
    """Whether a run begins and ends with random weights of the encoder."""
    given = config.init is not None or config.model.encoder.checkpoint is not None
    trains = {"encoder": True, "align": config.align.train_encoder, "joint": config.joint.train_encoder}
    return not given and not any(trains.get(stage, False) for stage in config.stages)


def differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Keys of two configurations whose values differ, with both values. A key that the old one lacks had what
    is now its default: it is of a version that did not know it."""
    yield from _differences(old, new, to_dict(Config()), "")


def _differences(old: Any, new: Any, default: Any, prefix: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        known = default if isinstance(default, dict) else {}
        for k in sorted(old.keys() | new.keys()):
            before = old[k] if k in old else known.get(k)
            yield from _differences(before, new.get(k), known.get(k), f"{prefix}{k}.")
    elif old != new:
        yield prefix[:-1], old, new


def _say(world: World, text: str) -> None:
    if world.main:
        print(text, flush=True)
