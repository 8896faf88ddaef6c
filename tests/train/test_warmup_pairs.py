"""Warm-up pairs of one prompt and teacher are one group: prompt, image and teacher are computed once for all."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from prism_fast.config import OptimizerConfig
from prism_fast.data.samples import Pair
from prism_fast.engine.local import LocalEngine
from prism_fast.models.discriminator import build_discriminator
from prism_fast.models.policy import build_tiny_policy
from prism_fast.models.token_budget import TokenBudget
from prism_fast.train.layouts import use_layout
from prism_fast.train.passes import Passes
from prism_fast.train.warmup import group_pairs
from tests.support.small_policy import SMALL
from tests.support.trainers import discriminate


def pair(uid: str, image: Image.Image, teacher: str, student: str, question: str = "what is it?") -> Pair:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    texts = {"teacher_caption": teacher, "teacher_cot": f"{teacher}, so", "teacher_response": None}
    student_texts = {"student_caption": student, "student_cot": f"{student} then", "student_response": None}
    return Pair(uid=uid, messages=[{"role": "user", "content": content}], images=[image], **texts, **student_texts)


def pictures(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(2)
    return [Image.fromarray(rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)) for _ in range(count)]


def test_pairs_share_a_group_only_with_the_same_prompt_image_and_teacher(processor):
    one, other = pictures(2)
    pairs = [
        pair("a", one, "1 2", "1 3"),
        pair("b", other, "1 2", "1 3"),
        pair("c", one.copy(), "1 2", "2 2"),
        pair("d", one, "1 9", "1 3"),
        pair("e", one, "1 2", "1 3", question="and now?"),
    ]
    groups = group_pairs(pairs, processor, "prism_fast", ("caption", "reasoning"))
    assert [len(group.students) for group in groups] == [2, 1, 1, 1]


def test_a_group_of_pairs_costs_its_prompt_its_teacher_and_its_students_once(processor):
    texts = ("1 3", "2 2 and more", "4")
    pairs = [pair(str(n), pictures(1)[0], "1 2", text) for n, text in enumerate(texts)]
    (group,) = group_pairs(pairs, processor, "prism_fast", ("caption", "reasoning"))
    model = build_discriminator(build_tiny_policy(processor, SMALL, seed=2), seed=3, head_std=0.2)
    use_layout("shared_prefix", model.backbone)
    engine = LocalEngine(model.train(), OptimizerConfig(lr=1e-3))
    scores = discriminate(
        engine,
        [group],
        TokenBudget(10_000, notify=pytest.fail),
        learn=True,
        layout="shared_prefix",
        pad_id=processor.pad_id,
        semantics="prism_fast",
        score_clip=10.0,
        score_reg=0.001,
        aux_coef=0.01,
    )
    spans = [span for framed in (group.teacher, *group.students) for span in framed]
    assert len(set(spans)) == len(spans) == 2 * (len(texts) + 1)
    assert scores.tokens == len(group.prompt.input_ids) + sum(map(len, spans)) and scores.repeated == 0
    assert scores.passes == Passes(learned=1, images=1)
