"""The words that settings may be, apart from what they stand for, so that a command's help needs no PyTorch."""

from __future__ import annotations

from typing import Literal

OptimizerName = Literal["sgd", "sam", "asam", "friendly_sam", "agnostic_sam", "agnostic_asam"]
MODELS = ("resnet", "wide_resnet", "small")
SOURCES = ("cifar10", "cifar100", "mini_imagenet", "folder")
