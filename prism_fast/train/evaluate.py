"""Held-out accuracy of a policy, item by item."""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict

from prism_fast.algorithms.semantics import SEMANTICS
from prism_fast.data.grammar import split_text
from prism_fast.data.samples import Task
from prism_fast.models.processor import Processor
from prism_fast.models.writing import write_whole
from prism_fast.rewards import Reward, failures, summed_parts
from prism_fast.rollout.protocol import Completion, Rollout, Sampling
from prism_fast.train.chunks import ChunkLog
from prism_fast.train.context import Run
from prism_fast.train.grading import Grader
from prism_fast.train.seeds import derive_seed
from prism_fast.train.turns import awake


def evaluate(run: Run, model, processor: Processor, tasks: Sequence[Task], *, after: str) -> float:
    """Answer every task with ``model``, write ``evals/<after>.jsonl`` and one ``eval`` line of metrics; returns the
    accuracy. A stop loses only the batch that is being generated.
    """
    started, engine = time.perf_counter(), run.rollout_engine(model, processor)
    with awake(engine):
        records, metrics, log = answer_all(run, engine, processor, tasks, name=after)
    lines = "".join(json.dumps(r) + "\n" for r in records)
    run.world.on_first(lambda: write_whole(run.folder / "evals" / f"{after}.jsonl", lines))
    times = {"time/seconds": time.perf_counter() - started}
    run.metrics.write("eval", run.metrics.step, {"after": after, **metrics, **times})
    log.remove()
    return metrics["eval/accuracy"]


def answer_all(
    run: Run, engine: Rollout, processor: Processor, tasks: Sequence[Task], *, name: str
) -> tuple[list[dict], dict[str, float], ChunkLog]:
    """Joint. Answer every task with an ``engine`` that is awake; ``name`` goes into the seeds and the log's name.

    Returns:
        One record per task, the metrics ``eval/...``, and the log of finished batches, to be removed once these are
        kept.
    """
    config = run.config.eval
    published = SEMANTICS[run.config.semantics].published_grammar
    count = len(tasks) if config.limit is None else min(config.limit, len(tasks))
    if count == 0:
        raise ValueError("the evaluation set is empty; give data.eval with at least one row or raise eval.limit")
    n = config.samples
    sampling = Sampling(n, config.temperature, config.max_new_tokens, top_k=config.top_k, top_p=config.top_p)
    grader = Grader(run.checker)
    log = ChunkLog(
        run.folder / "evals" / f"{name}.chunks",
        {**asdict(config), "seed": run.config.seed, "items": count, "data": run.fingerprints.get("eval")},
        run.world,
    )
    with run.progress.bar(f"eval {name}", -(-count // config.batch), done=len(log.chunks)) as bar:
        for start in range(len(log.chunks) * config.batch, count, config.batch):
            run.stop.poll(f"evaluation after {name}", joint=True)
            mine = run.world.share(range(start, min(start + config.batch, count)))
            chunk = [tasks[i] for i in mine]
            prompts = [processor.encode_prompt(task.messages, task.images) for task in chunk]
            seeds = [derive_seed(run.config.seed, "eval", name, i) for i in mine]
            groups = engine.generate(prompts, sampling, seeds, poll=lambda: run.stop.poll(f"evaluation after {name}"))
            completions = [completion for group in groups for completion in group]
            texts = [processor.decode(completion.token_ids) for completion in completions]
            rewards = grader.score([task for task in chunk for _ in range(n)], texts)
            items = [
                _item(chunk[k // n], text, completion, reward, published)
                for k, (text, completion, reward) in enumerate(zip(texts, completions, rewards, strict=True))
            ]
            log.append(
                [
                    {"item": _joined(items[k : k + n]), "rewards": [asdict(r) for r in rewards[k : k + n]]}
                    for k in range(0, len(items), n)
                ]
            )
            answered = [entry["item"] for done in log.chunks for entry in done]
            bar.advance(accuracy=sum(item["correct"] for item in answered) / len(answered))
    entries = [entry for done in log.chunks for entry in done]
    records = [entry["item"] for entry in entries]
    return records, _metrics(records, [Reward(**reward) for e in entries for reward in e["rewards"]], n), log


def _metrics(records: Sequence[dict], graded: Sequence[Reward], n: int) -> dict[str, float]:
    def means(key: str) -> dict[str, float]:
        of: dict[str, list[float]] = defaultdict(list)
        for record in records:
            of[record[key]].append(record["correct"])
        return {name: sum(correct) / len(correct) for name, correct in sorted(of.items())}

    count, sources = len(records), means("source")
    several = {f"eval/accuracy_on/{name}": mean for name, mean in sources.items()} if len(sources) > 1 else {}
    ks = sorted({1 << i for i in range(n.bit_length())} | {n}) if n > 1 else []
    return {
        "eval/accuracy": sum(r["correct"] for r in records) / count,
        "eval/format": sum(r["format"] for r in records) / count,
        "eval/length": sum(r["length"] for r in records) / count,
        "eval/items": count,
        **{f"eval/pass@{k}": sum(pass_at(k, n, r["right"]) for r in records) / count for k in ks},
        **{f"eval/parts/{name}": total / number for name, (total, number) in summed_parts(graded).items()},
        **{f"eval/{kind}": number for kind, number in failures(graded).items()},
        **{f"eval/accuracy/{kind}": mean for kind, mean in means("kind").items()},
        **several,
    }


def pass_at(k: int, n: int, right: int) -> float:
    """Probability that one of ``k`` answers drawn from ``n``, of which so many are ``right``, is right: the unbiased
    estimator of arXiv 2107.03374."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def _joined(items: Sequence[dict]) -> dict:
    """One record for the answers to one task: the first's, and where there are several the mean of what is counted."""
    if len(items) == 1:
        return items[0]
    means = {key: sum(item[key] for item in items) / len(items) for key in ("correct", "format", "length")}
    several = {"samples": len(items), "right": sum(item["correct"] for item in items)}
    return items[0] | means | several | {"texts": [item["text"] for item in items]}


def _item(task: Task, text: str, completion: Completion, reward: Reward, published: bool) -> dict:
    """The line of one answer in ``evals/<after>.jsonl``."""
    return {
        "uid": task.uid,
        "kind": task.kind or "all",
        "source": task.data_source,
        "cluster": task.cluster or task.uid,
        "question": task.question,
        "ground_truth": task.ground_truth,
        "text": text,
        "answer": split_text(text, published=published).answer,
        "correct": int(reward.accuracy > 0),
        "format": int(reward.format > 0),
        "length": len(completion.token_ids),
        "finish": completion.finish_reason,
        "decided_by": reward.decided_by,
    } | ({"parts": dict(reward.parts)} if reward.parts else {})
