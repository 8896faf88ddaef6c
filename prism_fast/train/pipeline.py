"""The stages in order; each reads the exports of the one before it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from torch import nn

from prism_fast.algorithms.semantics import SEMANTICS
from prism_fast.config import Config, ConfigError, control_updates
from prism_fast.data.digits import DigitsFiles, tokenizer_corpus, write_digits
from prism_fast.data.formats import SOURCES
from prism_fast.data.samples import Demonstration, Pair, Samples, Task
from prism_fast.engine.world import World
from prism_fast.models.checkpointing import use_gradient_checkpointing
from prism_fast.models.discriminator import build_discriminator, load_discriminator
from prism_fast.models.fused_trunk import use_fused_trunk
from prism_fast.models.policy import TinyPolicy, build_tiny_policy, load_policy
from prism_fast.models.processor import Processor
from prism_fast.models.tokenizer import train_tokenizer
from prism_fast.recipes.hints import how_to_get
from prism_fast.train.adapt import adapt_and_tell, export_adapter
from prism_fast.train.align import align
from prism_fast.train.context import Run, open_run
from prism_fast.train.engines import keeps_weights
from prism_fast.train.evaluate import evaluate
from prism_fast.train.length import stage_length
from prism_fast.train.own_pairs import read_own_pairs, write_own_pairs
from prism_fast.train.reading import DataFiles, DataReader
from prism_fast.train.replay import check_replay
from prism_fast.train.rlvr import rlvr
from prism_fast.train.seeds import derive_seed
from prism_fast.train.sft import continue_sft, train_sft
from prism_fast.train.warmup import pair_log, sample_pairs, warm_up


@dataclass
class Artifacts:
    """The newest exports of the stages, as folders in Hugging Face format."""

    policy: Path | None = None
    discriminator: Path | None = None

    def note(self, run: Run) -> None:
        """Put the folders into the run's record, relative to it so that the run can be moved."""
        for name in ("policy", "discriminator"):
            folder: Path | None = getattr(self, name)
            inside = folder is not None and folder.is_relative_to(run.folder)
            shown = None if folder is None else str(folder.relative_to(run.folder) if inside else folder)
            setattr(run.record, name, shown)


def prepare_data(run: Run) -> DataFiles:
    """Write the built-in digits, or take the files of the configuration."""
    config = run.config.data
    if config.source == "digits":
        root = run.folder / "data" / "digits"
        seed = derive_seed(run.config.seed, "digits")
        # Written whole or not at all: a resumed run finds it complete.
        run.world.on_first(lambda: root.exists() or write_digits(root, config.digits, seed))
        files = DigitsFiles.in_folder(root)
        return DataFiles({key: path for key in SOURCES if (path := getattr(files, key, None)) is not None})
    return DataFiles.of(run.config)


def _new_policy(run: Run, files: DataFiles):
    """The tiny policy with a tokenizer trained on the SFT texts."""
    tiny = run.config.model.tiny
    if run.config.data.source == "digits":
        corpus = tokenizer_corpus(DigitsFiles.in_folder(files.need("sft", "sft").parent))
    else:
        demos, _ = DataReader(run, "sft").demonstrations(files, None, tell=False)
        corpus = (text for demo in demos for text in demonstration_texts(demo))
    tokenizer = train_tokenizer(corpus, tiny.vocab_size)
    processor = _limited(run, Processor.build(tokenizer))
    sizes = asdict(tiny)
    del sizes["vocab_size"]
    size = TinyPolicy(**sizes)
    model = build_tiny_policy(processor, size, derive_seed(run.config.seed, "policy"))
    return _learner(run, model.to(device=run.device, dtype=run.dtype)), processor


def _learner(run: Run, model: nn.Module):
    """``model`` with the kernels and the gradient checkpointing of the configuration."""
    use_fused_trunk(model, run.config.model.fused_trunk)
    if run.config.model.gradient_checkpointing:
        use_gradient_checkpointing(model)
    return model


def demonstration_texts(demo: Demonstration) -> Iterator[str]:
    """Every text of a demonstration, for learning a vocabulary."""
    for message in demo.messages:
        content = message["content"]
        yield content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
    yield demo.response


def _load_policy(run: Run, folder: Path):
    policy = load_policy(folder, dtype=run.dtype, device=run.device)
    return _learner(run, policy), _limited(run, Processor.from_pretrained(folder))


def _limited(run: Run, processor: Processor) -> Processor:
    """``processor`` with the image limits of the configuration, which exports keep."""
    low, high = run.config.data.min_pixels, run.config.data.max_pixels
    if low is not None or high is not None:
        processor.limit_images(low, high)
        low, high = processor.image_area
        run.console.print(f"images are resized to between {low:,} and {high:,} pixels", highlight=False)
    return processor


def _policy(run: Run, artifacts: Artifacts, stage: str):
    if artifacts.policy is None:
        raise ConfigError(f"stage {stage} needs a trained policy: run sft before it or give model.policy=PATH")
    return _load_policy(run, artifacts.policy)


def _learning_policy(run: Run, artifacts: Artifacts, stage: str):
    """The policy that ``stage`` trains."""
    model, processor = _policy(run, artifacts, stage)
    adapt_and_tell(run, model, stage)
    return model, processor


def _held_out(run: Run, files: DataFiles, processor: Processor) -> Samples[Task] | None:
    """The tasks that are answered inside a stage."""
    if not run.config.eval.every:
        return None
    return DataReader(run, "eval").read("eval", files.need("eval", "eval.every"), processor)


def _evaluate(run: Run, policy: nn.Module, processor: Processor, files: DataFiles, after: str, exported: Path) -> None:
    """Evaluate the trained policy as it is in memory, or as it was ``exported`` where its engine held the weights."""
    run.close_engines()
    if (path := files.paths.get("eval")) is not None:
        if not keeps_weights(run.config):
            policy, processor = _load_policy(run, exported)
        evaluate(run, policy, processor, DataReader(run, "eval").read("eval", path, processor), after=after)


def _sft(run: Run, files: DataFiles, artifacts: Artifacts) -> None:
    model, processor = _new_policy(run, files) if artifacts.policy is None else _load_policy(run, artifacts.policy)
    adapt_and_tell(run, model, "sft")
    reader = DataReader(run, "sft")
    demos, val = reader.demonstrations(files, processor)
    if val is None:
        val = reader.read("sft_val", files.need("sft_val", "sft"), processor)
    began, artifacts.policy = artifacts.policy, train_sft(run, model, processor, demos, val)
    if began is not None:  # a new policy has no adapters
        export_adapter(run, model, "sft", began)
    _evaluate(run, model, processor, files, "sft", artifacts.policy)


def _sft_continued(run: Run, files: DataFiles, artifacts: Artifacts) -> None:
    model, processor = _learning_policy(run, artifacts, "sft_continued")
    demos, _ = DataReader(run, "sft_continued").demonstrations(files, processor)
    exported = continue_sft(run, model, processor, demos, control_updates(run.config))
    export_adapter(run, model, "sft_continued", artifacts.policy)
    _evaluate(run, model, processor, files, "sft_continued", exported)


def _warmup(run: Run, files: DataFiles, artifacts: Artifacts) -> None:
    policy, processor = _policy(run, artifacts, "warmup")
    pairs = _pairs(run, files, policy, processor)
    if artifacts.discriminator is None:
        upcycle = run.config.warmup.upcycle
        discriminator = build_discriminator(
            policy,
            num_experts=upcycle.num_experts,
            top_k=upcycle.top_k,
            noise_std=upcycle.noise_std,
            router_std=upcycle.router_std,
            head_dropout=_head_dropout(run),
            seed=derive_seed(run.config.seed, "discriminator"),
        )
        discriminator = _learner(run, discriminator.to(run.device))
    else:
        discriminator = _load_discriminator(run, artifacts.discriminator)
    artifacts.discriminator = warm_up(run, discriminator, processor, pairs)


def _pairs(run: Run, files: DataFiles, policy, processor: Processor) -> Sequence[Pair]:
    """The pairs of ``data.pairs``, or those that the policy samples for the alignment tasks."""
    reader = DataReader(run, "warmup")
    if "pairs" in files.paths:
        return reader.read("pairs", files.need("pairs", "warmup"), processor)
    path, sampled = run.folder / "data" / "pairs.jsonl", "pairs" in run.record.completed
    tasks = reader.read("align", files.need("align", "warmup"), processor, tell=not sampled)
    if not sampled:
        log = pair_log(run, tasks)
        pairs = sample_pairs(run, policy, processor, tasks, log)
        run.world.on_first(lambda: write_own_pairs(path, pairs))
        run.complete("pairs")
        log.remove()
    return read_own_pairs(path, tasks)


def _head_dropout(run: Run) -> float:
    return SEMANTICS[run.config.semantics].head_dropout


def _load_discriminator(run: Run, folder: Path):
    discriminator = load_discriminator(folder, dtype=run.dtype, device=run.device, head_dropout=_head_dropout(run))
    return _learner(run, discriminator)


def _align(run: Run, files: DataFiles, artifacts: Artifacts) -> None:
    policy, processor = _learning_policy(run, artifacts, "align")
    if artifacts.discriminator is None:
        raise ConfigError(
            "stage align needs a warm discriminator: run warmup before it or give model.discriminator=PATH"
        )
    tasks = DataReader(run, "align").read("align", files.need("align", "align"), processor)
    discriminator = _load_discriminator(run, artifacts.discriminator)
    began = artifacts.policy
    artifacts.policy, artifacts.discriminator = align(
        run, policy, discriminator, processor, tasks, _held_out(run, files, processor)
    )
    export_adapter(run, policy, "align", began)
    _evaluate(run, policy, processor, files, "align", artifacts.policy)


def _rlvr(run: Run, files: DataFiles, artifacts: Artifacts) -> None:
    artifacts.policy = _train_rlvr(run, files, artifacts, "rlvr", run.config.rlvr.steps)


def _rlvr_direct(run: Run, files: DataFiles, artifacts: Artifacts) -> None:
    """The control of alignment: RLVR from SFT with as many updates as alignment and RLVR have."""
    steps = -(-control_updates(run.config) // run.config.rlvr.updates_per_step)
    _train_rlvr(run, files, artifacts, "rlvr_direct", steps)


def _train_rlvr(run: Run, files: DataFiles, artifacts: Artifacts, stage: str, steps: int) -> Path:
    policy, processor = _learning_policy(run, artifacts, stage)
    tasks = DataReader(run, stage).read("rlvr", files.need("rlvr", stage), processor)
    steps = stage_length(steps, run.config.rlvr.epochs, len(tasks), run.config.rlvr.prompts)
    folder = rlvr(run, policy, processor, tasks, stage=stage, steps=steps, held_out=_held_out(run, files, processor))
    export_adapter(run, policy, stage, artifacts.policy)
    _evaluate(run, policy, processor, files, stage, folder)
    return folder


RUNNERS = {
    "sft": _sft,
    "sft_continued": _sft_continued,
    "rlvr_direct": _rlvr_direct,
    "warmup": _warmup,
    "align": _align,
    "rlvr": _rlvr,
}


def _start(config: Config, run: Run) -> Artifacts:
    model, record = config.model, run.record
    artifacts = Artifacts(
        policy=None if model.policy == "tiny" else Path(model.policy),
        discriminator=None if model.discriminator == "upcycle" else Path(model.discriminator),
    )
    if record.policy is not None:
        artifacts.policy = run.folder / record.policy  # an absolute path stays itself
    if record.discriminator is not None:
        artifacts.discriminator = run.folder / record.discriminator
    for key, folder in (("model.policy", artifacts.policy), ("model.discriminator", artifacts.discriminator)):
        if folder is not None and not folder.is_dir():
            raise ConfigError(f"{key}: {folder} is not a folder{how_to_get(str(folder))}")
    return artifacts


def _check_files(config: Config, files: DataFiles) -> None:
    """Refuse a missing input before the first stage spends hours."""
    files.needed(config.stages)
    check_replay(config)


def run_stages(
    config: Config, console: Console, *, resume: bool = False, convert: bool = False, world: World | None = None
) -> Path:
    """Run ``config.stages`` in a new run directory, or go on in the one at ``config.out``; returns the directory.
    ``convert``, ``world``: of :func:`open_run`.

    Raises:
        Stopped: SIGTERM or SIGINT asked to stop; ``resume=True`` goes on from there.
    """
    with open_run(config, console, resume=resume, convert=convert, world=world) as run:
        for line in SEMANTICS[config.semantics].differs:
            console.print(f"semantics={config.semantics} differs from the published code: {line}", style="yellow")
        artifacts = _start(config, run)
        files = prepare_data(run)
        _check_files(config, files)
        for stage in config.stages:
            if stage in run.record.completed:
                continue
            run.world.phase = stage
            run.stop.poll(f"before {stage}", joint=True)
            started = time.perf_counter()
            artifacts.note(run)
            run.record.began.setdefault(stage, [run.record.policy, run.record.discriminator])
            run.world.on_first(lambda: run.record.write(run.folder))
            RUNNERS[stage](run, files, artifacts)
            run.close_engines()
            run.metrics.write("stage", 0, {"name": stage, "time/seconds": time.perf_counter() - started})
            artifacts.note(run)
            run.complete(stage)
    return run.folder


def run_eval(config: Config, console: Console, *, resume: bool = False, world: World | None = None) -> float:
    """Evaluate ``model.policy`` on ``data.eval`` in the run directory ``config.out``; returns the accuracy.

    Raises:
        Stopped: SIGTERM or SIGINT asked to stop; ``resume=True`` goes on after the last finished batch.
    """
    with open_run(config, console, resume=resume, world=world) as run:
        artifacts = _start(config, run)
        model, processor = _policy(run, artifacts, "eval")
        tasks = DataReader(run, "eval").read("eval", prepare_data(run).need("eval", "eval"), processor)
        return evaluate(run, model, processor, tasks, after="eval")
