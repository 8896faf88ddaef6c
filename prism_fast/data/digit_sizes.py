"""Sizes of the built-in dataset. Nothing else is imported: configurations are read without the data's packages."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class DigitsSpec:
    """Sizes of the parts; each count of images is multiplied by its questions per image.

    Defaults: 10,000 demonstrations, 400 for validation, 512 alignment and 1,024 RLVR tasks on images of their own, and
    201 evaluation images with all five kinds of question (1,005 items). ``noise`` is the share of faulty
    demonstrations. ``train_digits`` go to SFT, alignment and RLVR, ``3 * eval_images`` digits to evaluation, the rest
    to validation. ``data.digits.check_digits`` says which values are possible.
    """

    sft_images: int = 2500
    sft_questions: int = 4
    sft_val_images: int = 100
    sft_val_questions: int = 4
    align_tasks: int = 512
    rlvr_tasks: int = 1024
    eval_images: int = 201
    train_digits: int = 1074
    noise: float = 0.35
