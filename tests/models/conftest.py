"""Small real models and a tokenizer trained on tagged texts, built once per test process."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from PIL import Image

from prism_fast.models.policy import build_tiny_policy
from prism_fast.models.processor import Processor, Prompt
from prism_fast.models.tokenizer import train_tokenizer
from tests.support.small_policy import SMALL


def corpus() -> list[str]:
    rng = np.random.default_rng(5)
    texts = []
    for _ in range(200):
        a, b, c, d = rng.integers(0, 10, 4)
        texts.append(
            f"<caption>\n- a strip of digits: {a} {b} {c} {d}\n</caption>\n<think>\nthe sum is {a} + {b} + {c} + {d}\n"
            f"</think>\n<answer>\n{a + b + c + d}\n</answer>"
        )
    return texts


@pytest.fixture(scope="session")
def processor() -> Processor:
    return Processor.build(train_tokenizer(corpus(), 600))


@pytest.fixture(scope="session")
def policy(processor: Processor):
    """A small policy; tests that train or convert it work on a deep copy."""
    return build_tiny_policy(processor, SMALL, seed=11).eval()


@pytest.fixture
def rng(generator: torch.Generator) -> np.random.Generator:
    return np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))


@pytest.fixture
def make_prompt(processor: Processor, rng: np.random.Generator) -> Callable[..., Prompt]:
    """``make_prompt((width, height), …, text=…)``: a prompt with one random image per size."""

    def make(*sizes: tuple[int, int], text: str = "What is the sum?") -> Prompt:
        images = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
        return processor.encode_prompt([{"role": "user", "content": content}], images)

    return make


@pytest.fixture
def make_rows(rng: np.random.Generator) -> Callable[[Sequence[int]], list[list[int]]]:
    """Random continuations of given lengths, of ordinary tokens only."""
    return lambda lengths: [rng.integers(0, 256, n).tolist() for n in lengths]
