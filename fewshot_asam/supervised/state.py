"""What changes while a classifier is trained: made from settings, stored in a checkpoint, restored from one."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from fewshot_asam.data.images import ImageSet
from fewshot_asam.errors import FewShotError
from fewshot_asam.runtime.yaml_settings import filled
from fewshot_asam.supervised import batches, optimizers
from fewshot_asam.supervised.config import FREE_TO_CHANGE, ClassifierConfig, plain
from fewshot_asam.supervised.networks import build_network
from fewshot_asam.training.checkpoint import Weights, decode, read_state, save_state, save_weights, weights

AT_ONCE = 500
"""Images that are classified together in a test; the result depends on it by rounding alone."""


class Labelled(NamedTuple):
    """Images, uint8 `[n, C, H, W]`, and their labels, int64 `[n]`, on one device."""

    images: Tensor
    labels: Tensor

    def part(self, indices: Tensor) -> Labelled:
        """Those of some indices, which may be on another device."""
        where = indices.to(self.images.device)
        return Labelled(self.images[where], self.labels[where])

    def to(self, device: torch.device) -> Labelled:
        """The same on another device."""
        return Labelled(self.images.to(device), self.labels.to(device))


@dataclass
class Progress:
    """How far a training has come, and the best of it."""

    step: int = 0
    rows: int = 0
    """lines of metrics.jsonl"""
    best_accuracy: float = -1.0
    best_epoch: int = 0
    seconds: float = 0.0


@dataclass
class ClassifierState:
    """All that changes while training, and what it needs."""

    config: ClassifierConfig
    train: Labelled
    held_out: Labelled
    test: Labelled
    network: nn.Module
    optimizer: Optimizer
    statistics: tuple[Tensor, Tensor]
    """mean and deviation of each channel of the training images, `[C, 1, 1]` each, in [0, 1]"""
    made_by: str
    """the settings and the digest of the data, as files keep them"""
    folder: Path = Path()
    progress: Progress = field(default_factory=Progress)
    best: Weights = field(default_factory=dict)
    sums: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    """loss, right answers and images since the last row of metrics, on the device"""

    @property
    def steps_an_epoch(self) -> int:
        """Steps in which each training image is used once, but for what is left over."""
        return len(self.train.labels) // self.config.batch_size

    @property
    def epoch(self) -> int:
        """Whole epochs that are done."""
        return self.progress.step // self.steps_an_epoch

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return self.epoch >= self.config.epochs

    def train_step(self) -> None:
        """One step; it waits for nothing."""
        config, step, count = self.config, self.progress.step, len(self.train.labels)
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * self._course()
        chosen = batches.train_batch(count, config.batch_size, step, config.seed)
        seen: list[Tensor] = []
        train = self._closure(chosen, "augmentation", seen)
        if config.gradients_a_step > 2:
            chosen = batches.val_batch(count, config.val_batch_size, step, config.seed)
        optimizers.step(self.optimizer, train, self._closure(chosen, "validation augmentation", []))
        self.sums += seen[0]
        self.progress.step += 1

    def _course(self) -> float:
        """The part of the learning rate that the present step has."""
        if self.config.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * self.progress.step / (self.steps_an_epoch * self.config.epochs)))

    def _closure(self, indices: Tensor, purpose: str, seen: list[Tensor]) -> Callable[[], Tensor]:
        """The loss on some training images and its gradient; what is seen of them is added to `seen`."""
        batch = self.train.part(indices)
        images = self._floats(batch.images)
        if self.config.augment or self.config.cutout:
            draws = batches.generator(purpose, self.config.seed, self.progress.step)
            images = batches.augmented(images, self.config.augment, self.config.cutout, draws)

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            logits = self.network(images)
            loss = F.cross_entropy(logits.float(), batch.labels)
            loss.backward()  # type: ignore[no-untyped-call]
            right = (logits.detach().argmax(1) == batch.labels).sum()
            seen.append(torch.stack([loss.detach().double() * len(images), right, torch.tensor(len(images)).to(right)]))
            return loss

        return closure

    def _floats(self, images: Tensor) -> Tensor:
        """The images as the network takes them: each channel of mean 0 and deviation 1 over the training images."""
        mean, deviation = self.statistics
        return ((images.float() / 255 - mean) / deviation).contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def right(self, data: Labelled, between: Callable[[], object] = lambda: None) -> Tensor:
        """Whether each image is classified rightly, bool `[n]` on the CPU."""
        found = []
        self.network.eval()
        try:
            for images in torch.split(data.images, AT_ONCE):
                between()
                found.append(self.network(self._floats(images)).argmax(1))
        finally:
            self.network.train()
        return (torch.cat(found) == data.labels).cpu()

    def read_sums(self) -> tuple[float, float]:
        """Mean loss and accuracy since the last row; raises `FewShotError` where the loss is not finite."""
        loss, right, count = self.sums.tolist()
        if not math.isfinite(loss):
            config = self.config
            raise FewShotError(
                f"the loss of epoch {self.epoch} is {loss:g}; the likely cause is an lr ({config.lr:g}) or rho "
                f"({config.rho:g}) that is too large: lower it. The last good checkpoint is in {self.folder}"
            )
        self.sums.zero_()
        return loss / count, right / count

    def keep_best(self) -> None:
        """Remembers the present weights as the best ones."""
        self.best = weights(self.network)
        save_weights(self.folder / "best.safetensors", self.best, self.made_by)

    def save(self) -> None:
        """Writes a checkpoint."""
        tensors = _prefixed("network", weights(self.network)) | _prefixed("best", self.best)
        tensors |= _prefixed("optimizer", optimizers.tensors(self.optimizer)) | {"sums": self.sums}
        tensors = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
        state: dict[str, Any] = {"made_by": self.made_by, "progress": asdict(self.progress), "tensors": tensors}
        save_state(self.folder, self.progress.step, state)
        save_weights(self.folder / "last.safetensors", weights(self.network), self.made_by)

    def restore(self) -> None:
        """Goes on from the newest whole checkpoint of the folder, if it has one; writes nothing."""
        data, name = read_state(self.folder)
        if not data:
            return
        state = decode(data, name)
        if state.get("made_by") != self.made_by:
            raise FewShotError(
                f"{name} was made with other settings or images; use those that the run was trained with, or start a "
                "new run"
            )
        tensors: Weights = state["tensors"]
        try:
            self.progress = filled(Progress, state.get("progress"), f"{name}: progress")
            self.network.load_state_dict(_below("network", tensors))
            optimizers.put_back(self.optimizer, _below("optimizer", tensors))
            self.best, self.sums = _below("best", tensors), tensors["sums"].to(self.sums.device)
        except (KeyError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise FewShotError(f"{name} is not of a run with these settings and this package ({reason})") from error

    def rewrite(self) -> None:
        """Writes the weights of the restored checkpoint anew, as files may be of a life of the run that was lost."""
        if self.progress.step:
            save_weights(self.folder / "last.safetensors", weights(self.network), self.made_by)
        if self.best:
            save_weights(self.folder / "best.safetensors", self.best, self.made_by)


def build(config: ClassifierConfig, train: ImageSet, test: ImageSet, device: torch.device) -> ClassifierState:
    """A training that has done nothing yet; raises `FewShotError` where the images do not suit the settings."""
    if train.shape != test.shape:
        raise FewShotError(f"images are {train.shape} in training and {test.shape} in the test; expected one shape")
    classes = len(train.names)
    whole = Labelled(train.images, _labels(train))
    noisy = whole._replace(labels=batches.with_noise(whole.labels, classes, config.label_noise, config.noise_seed))
    kept, held = batches.divided(len(whole.labels), config.holdout, config.seed)
    if config.batch_size > len(kept) or len(held) == 1:
        raise FewShotError(
            f"batch_size is {config.batch_size} and holdout {config.holdout}, but there are {len(whole.labels)} "
            "training images; expected at most as many as are left to train on, and none or two held out"
        )
    network = build_network(config.model, config.depth, config.width, train.shape, classes, config.seed)
    network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    pixels = whole.images[kept].float() / 255
    deviation = pixels.std((0, 2, 3)).clamp(min=1e-3)
    return ClassifierState(
        config,
        noisy.part(kept).to(device),
        noisy.part(held).to(device),
        Labelled(test.images, _labels(test)).to(device),
        network,
        optimizers.build_optimizer(config, network.parameters()),
        (pixels.mean((0, 2, 3))[:, None, None].to(device), deviation[:, None, None].to(device)),
        _made_by(config, (train, test)),
        sums=torch.zeros(3, dtype=torch.float64, device=device),
    )


def _labels(images: ImageSet) -> Tensor:
    return torch.arange(len(images.names)).repeat_interleave(images.counts)


def _made_by(config: ClassifierConfig, splits: tuple[ImageSet, ...]) -> str:
    """The settings that may not change and a digest of the data, as text."""
    digest = hashlib.sha256()
    for images in splits:
        digest.update(json.dumps([images.names, images.counts.tolist(), *images.shape]).encode())
        digest.update(images.images.contiguous().numpy().data)
    settings = {name: value for name, value in plain(config).items() if name not in FREE_TO_CHANGE}
    return json.dumps({"settings": settings, "data": digest.hexdigest()})


def _prefixed(prefix: str, tensors: Weights) -> Weights:
    return {f"{prefix}/{name}": value for name, value in tensors.items()}


def _below(prefix: str, tensors: Weights) -> Weights:
    start = f"{prefix}/"
    return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
