"""Builds run directories with the records that training writes, for the tests of this folder."""

from __future__ import annotations

import hashlib
import json
import random
from io import BytesIO
from pathlib import Path
from typing import Any

import yaml
import zstandard
from PIL import Image, ImageDraw

KINDS = ("compare", "count_even", "difference", "maximum", "sort", "sum")
ACCURACY = {"sft": 0.62, "sft_continued": 0.63, "rlvr_direct": 0.68, "align": 0.645, "rlvr": 0.74}
STAGES = ["sft", "sft_continued", "rlvr_direct", "warmup", "align", "rlvr"]


def write_run(
    path: Path,
    *,
    stages: list[str] | None = None,
    items: int = 240,
    steps: int = 40,
    rollouts: bool = True,
    seed: int = 0,
) -> Path:
    """A run that was asked for all stages and has gone through ``stages`` (all by default)."""
    done = STAGES if stages is None else stages
    dice = random.Random(seed)
    path.mkdir(parents=True)
    config = {
        "recipe": "digits",
        "seed": 1,
        "device": "cpu",
        "semantics": "prism_fast",
        "stages": STAGES,
        "warmup": {"target_margin": 1.0},
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    environment = {"prism_fast": "0.1.0", "python": "3.12.1", "machine": "x86_64", "threads": 2, "torch": "2.13.0"}
    (path / "environment.json").write_text(json.dumps(environment))
    trained = 0
    for stage in done:
        trained += steps
        append_lines(path / "metrics.jsonl", metric_lines(stage, steps, dice))
        if stage in ACCURACY:
            answers = eval_items(stage, items, seed)
            append_lines(path / "evals" / f"{stage}.jsonl", answers)
            append_lines(path / "metrics.jsonl", [eval_line(stage, trained, answers)])
        if rollouts and stage in ("rlvr_direct", "align", "rlvr"):
            write_frames(path / "rollouts" / f"{stage}.jsonl.zst", rollout_records(path, stage, steps, dice))
        append_lines(
            path / "metrics.jsonl", [{"stage": "stage", "step": 0, "name": stage, "time/seconds": 0.6 * steps}]
        )
    return path


def append_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def write_frames(path: Path, records: list[dict[str, Any]], per_frame: int = 16) -> None:
    """Several compressed frames one after another, as a run appends them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        for start in range(0, len(records), per_frame):
            lines = "".join(json.dumps(record) + "\n" for record in records[start : start + per_frame])
            file.write(zstandard.ZstdCompressor().compress(lines.encode("utf-8")))


def metric_lines(stage: str, steps: int, dice: random.Random) -> list[dict[str, Any]]:
    lines = [{"stage": stage, "step": 0, "pairs/kept": 500, "pairs/dropped": 12}] if stage == "warmup" else []
    for step in range(1, steps + 1):
        share = step / steps

        def noisy(start: float, end: float, noise: float, share: float = share) -> float:
            return start + (end - start) * (1 - (1 - share) ** 3) + noise * dice.gauss(0, 1)

        values: dict[str, float] = {}
        if stage in ("sft", "sft_continued"):
            start = 3.0 if stage == "sft" else 0.42
            values |= {"sft/loss": noisy(start, 0.4, 0.02), "sft/lr": 1e-3, "sft/grad_norm": abs(noisy(3, 0.8, 0.2))}
            if stage == "sft" and step % 8 == 0:
                values["sft/val_loss"] = noisy(start, 0.45, 0.005)
        elif stage == "warmup":
            values |= {
                "warmup/loss": noisy(0.7, 0.3, 0.03),
                "warmup/grad_norm": abs(noisy(2, 1, 0.2)),
                "warmup/lr": 5e-4,
                "warmup/aux": 1.0,
            }
            for span in ("caption", "reasoning"):
                values[f"warmup/margin_{span}"] = noisy(0, 2.2, 0.3)
                values[f"warmup/acc_{span}"] = min(1.0, noisy(0.5, 0.85, 0.05))
                if step % 10 == 0:
                    values[f"warmup/heldout_margin_{span}"] = noisy(0, 1.3, 0.05)
                    values[f"warmup/heldout_acc_{span}"] = min(1.0, noisy(0.5, 0.8, 0.01))
        else:
            values |= {
                "time/generate": 0.3 + 0.01 * dice.random(),
                "time/reward": 0.01,
                "time/step": 0.4 if step % 2 else 0.6,
                "perf/tokens_per_second": 1500.0 if step % 2 else 1000.0,
                "perf/peak_memory_mib": 100.0 + step,
                "passes/policy_learned": 3,
                "policy/loss": 0.01 * dice.gauss(0, 1),
            }
            values |= {"reward/mean": noisy(0.6, 0.8, 0.04), "reward/acc": noisy(0.5, 0.75, 0.05)}
            values |= {
                "reward/format": min(1.0, noisy(0.95, 0.99, 0.01)),
                "policy/grad_norm": abs(noisy(1.2, 0.6, 0.2)),
            }
            values |= {
                "policy/entropy": abs(noisy(0.5, 0.2, 0.02)),
                "policy/lr": 2e-5,
                "policy/tokens": 9000 + dice.randint(0, 900),
            }
            values |= {
                "rollout/logprob_gap_mean": 10 ** dice.gauss(-6, 0.1),
                "rollout/logprob_gap_max": 10 ** dice.gauss(-5, 0.1),
            }
            values |= {"response_length/mean": noisy(60, 52, 1), "response_length/max": 80 + dice.randint(0, 16)}
            values["rollout/responses"] = 64 if stage == "align" else 256
            values["response_length/clip_ratio"] = abs(0.01 * dice.gauss(0, 1))
        if stage in ("rlvr_direct", "rlvr"):
            values["advantage/zero_groups"] = dice.randint(0, 3)
            values |= {"reward/parts/brevity": noisy(0.2, 0.6, 0.01), "reward/parts/two_words": 0.5}
        if stage == "align":
            values["disc/lr"] = 5e-5
            values["disc/tokens"] = 12000 + dice.randint(0, 900)
            for span in ("caption", "reasoning"):
                values |= {
                    f"disc/margin_{span}": noisy(1.3, 1.1, 0.2),
                    f"disc/acc_{span}": min(1.0, noisy(0.8, 0.7, 0.05)),
                }
                values |= {f"disc/pairs_{span}": 120 + dice.randint(0, 8), f"disc/ties_{span}": dice.randint(20, 60)}
                values[f"score/{span}"] = noisy(-0.5, 0.4, 0.1)
            values |= {"disc/loss": noisy(0.5, 0.55, 0.03), "disc/grad_norm": abs(noisy(2, 1.5, 0.3))}
        lines.append({"stage": stage, "step": step, **values})
    return lines


def eval_items(stage: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Items of which a harder cluster fails more often; what all stages share makes their answers correlate."""
    items = []
    for index in range(count):
        shared = random.Random(f"{seed}-{index}")
        cluster = f"image-{index // 3}"
        threshold = 0.8 * shared.random() + 0.2 * random.Random(f"{seed}-{cluster}").random()
        own = 0.03 * random.Random(f"{seed}-{index}-{stage}").gauss(0, 1)
        correct = int(threshold + own < ACCURACY[stage] - 0.04 * (index % len(KINDS)) + 0.1)
        items.append(
            {
                "uid": f"eval-{index:05d}",
                "kind": KINDS[index % len(KINDS)],
                "cluster": cluster,
                "question": "What is the sum?",
                "ground_truth": "12",
                "text": "<answer>12</answer>",
                "answer": "12",
                "correct": correct,
                "format": int(shared.random() < 0.99),
                "length": 40 + index % 30,
                "finish": "length" if index % 50 == 0 else "stop",
            }
        )
    return items


def eval_line(stage: str, trained: int, items: list[dict[str, Any]]) -> dict[str, Any]:
    accuracy = sum(item["correct"] for item in items) / len(items)
    return {"stage": "eval", "step": trained, "after": stage, "eval/accuracy": accuracy, "time/seconds": 4.0}


def response(caption: str, think: str, answer: str) -> tuple[str, dict[str, list[int]]]:
    """Text of a response and the character spans of its sections, tags included."""
    text, spans = "", {}
    for name, inner in (("caption", caption), ("think", think), ("answer", answer)):
        section = f"<{name}>{inner}</{name}>"
        spans[name] = [len(text), len(text) + len(section)]
        text += section + ("\n" if name != "answer" else "")
    return text, spans


def write_image(path: Path, label: str, size: tuple[int, int] = (32, 32)) -> str:
    """A small image of ``label`` in the run's image folder; returns its SHA-256."""
    image = Image.new("RGB", size, "black")
    ImageDraw.Draw(image).text((4, size[1] // 2 - 6), label, fill="white")
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    folder = path / "rollouts" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{digest}.png").write_bytes(buffer.getvalue())
    return digest


def rollout_records(
    path: Path, stage: str, steps: int, dice: random.Random, per_group: int = 8
) -> list[dict[str, Any]]:
    records = []
    for step in range(1, steps + 1, 3):
        for group in range(2):
            digits = [dice.randint(0, 9) for _ in range(4)]
            digest = write_image(path, "".join(map(str, digits)))
            teacher = {
                "caption": f"<caption>The image shows the digits {digits}.</caption>",
                "reasoning": f"<think>Adding them gives {sum(digits)}.</think><answer>{sum(digits)}</answer>",
            }
            for _ in range(per_group):
                read = [digit if dice.random() < 0.85 else dice.randint(0, 9) for digit in digits]
                text, spans = response(
                    f"The image shows the digits {read}.",
                    f"Adding {' + '.join(map(str, read))} gives {sum(read)}.",
                    str(sum(read)),
                )
                valid = dice.random() < 0.9
                accuracy = float(valid and sum(read) == sum(digits))
                scores = {"caption": dice.gauss(0, 1), "reasoning": dice.gauss(0, 1)} if stage == "align" else {}
                records.append(
                    {
                        "stage": stage,
                        "step": step,
                        "uid": f"{stage}-{step}-{group}",
                        "group": group,
                        "kind": "sum",
                        "question": "What is the sum of the digits?",
                        "images": [digest],
                        "text": text if valid else text.replace("</think>", ""),
                        "valid": valid,
                        "spans": spans if valid else {},
                        "tokens": 48 + dice.randint(0, 12),
                        "finish": "stop" if valid else "length",
                        "scores": scores,
                        "reward": {
                            "score": 0.8 * accuracy + 0.2 * valid,
                            "accuracy": accuracy,
                            "format": float(valid),
                            "decided_by": "number",
                        },
                        "advantage": dice.gauss(0, 1),
                        "ground_truth": str(sum(digits)),
                        "teacher": teacher if stage == "align" else None,
                        "teacher_scores": {"caption": 1.2, "reasoning": 0.9} if stage == "align" else None,
                    }
                )
    return records
