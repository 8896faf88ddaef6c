"""Held-out accuracy of a policy, item by item."""

from __future__ import annotations

import json
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
from prism_fast.rollout.protocol import Completion, Sampling
from prism_fast.train.chunks import ChunkLog
from prism_fast.train.context import Run
from prism_fast.train.grading import Grader
from prism_fast.train.seeds import derive_seed
from prism_fast.train.turns import awake


def evaluate(run: Run, model, processor: Processor, tasks: Sequence[Task], *, after: str) -> float:
    """Answer every task with ``model``, write ``evals/<after>.jsonl`` and one ``eval`` line of metrics; returns the
    accuracy. A stop loses only the batch that is being generated.
    """
    config, started = run.config.eval, time.perf_counter()
    published = SEMANTICS[run.config.semantics].published_grammar
    count = len(tasks) if config.limit is None else min(config.limit, len(tasks))
    if count == 0:
        raise ValueError("the evaluation set is empty; give data.eval with at least one row or raise eval.limit")
    sampling = Sampling(1, config.temperature, config.max_new_tokens, top_k=config.top_k, top_p=config.top_p)
    engine, grader = run.rollout_engine(model, processor), Grader(run.checker)
    log = ChunkLog(
        run.folder / "evals" / f"{after}.chunks",
        {**asdict(config), "seed": run.config.seed, "items": count, "data": run.fingerprints.get("eval")},
        run.world,
    )
    with awake(engine), run.progress.bar(f"eval {after}", -(-count // config.batch), done=len(log.chunks)) as bar:
        for start in range(len(log.chunks) * config.batch, count, config.batch):
            run.stop.poll(f"evaluation after {after}", joint=True)
            mine = run.world.share(range(start, min(start + config.batch, count)))
            chunk = [tasks[i] for i in mine]
            prompts = [processor.encode_prompt(task.messages, task.images) for task in chunk]
            seeds = [derive_seed(run.config.seed, "eval", after, i) for i in mine]
            groups = engine.generate(prompts, sampling, seeds, poll=lambda: run.stop.poll(f"evaluation after {after}"))
            completions = [group[0] for group in groups]
            texts = [processor.decode(completion.token_ids) for completion in completions]
            rewards = grader.score(chunk, texts)
            log.append(
                [
                    {"item": _item(task, text, completion, reward, published), "reward": asdict(reward)}
                    for task, text, completion, reward in zip(chunk, texts, completions, rewards, strict=True)
                ]
            )
            answered = [entry["item"] for done in log.chunks for entry in done]
            bar.advance(accuracy=sum(item["correct"] for item in answered) / len(answered))
    records = [entry["item"] for done in log.chunks for entry in done]
    graded = [Reward(**entry["reward"]) for done in log.chunks for entry in done]
    lines = "".join(json.dumps(r) + "\n" for r in records)
    run.world.on_first(lambda: write_whole(run.folder / "evals" / f"{after}.jsonl", lines))
    by_kind: dict[str, list[int]] = defaultdict(list)
    for record in records:
        by_kind[record["kind"]].append(record["correct"])
    accuracy = sum(r["correct"] for r in records) / count
    run.metrics.write(
        "eval",
        run.metrics.step,
        {
            "after": after,
            "eval/accuracy": accuracy,
            "eval/format": sum(r["format"] for r in records) / count,
            "eval/length": sum(r["length"] for r in records) / count,
            "eval/items": count,
            **{f"eval/parts/{name}": total / number for name, (total, number) in summed_parts(graded).items()},
            **{f"eval/{kind}": number for kind, number in failures(graded).items()},
            **{f"eval/accuracy/{kind}": sum(c) / len(c) for kind, c in sorted(by_kind.items())},
            "time/seconds": time.perf_counter() - started,
        },
    )
    log.remove()
    return accuracy


def _item(task: Task, text: str, completion: Completion, reward: Reward, published: bool) -> dict:
    """The line of one answer in ``evals/<after>.jsonl``."""
    return {
        "uid": task.uid,
        "kind": task.kind or "all",
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
