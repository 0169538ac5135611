"""The problems that are timed, and random episodes of their shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from fewshot_asam.episodes import Episodes


@dataclass(frozen=True)
class Preset:
    """One meta-batch: `tasks` tasks of `ways` classes with `shots` support and `queries` query images a class.

    **Arguments:**

    - `side`, `channels`: of the square images, in pixels.
    - `hidden`: filters of each of Conv4's blocks.
    - `steps`: inner steps.
    """

    ways: int
    shots: int
    queries: int
    side: int
    channels: int
    hidden: int
    steps: int
    tasks: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(C, H, W)`."""
        return self.channels, self.side, self.side

    @property
    def text(self) -> str:
        """The problem in one line."""
        return (
            f"{self.ways}-way {self.shots}-shot, {self.queries} queries a class, {self.side}x{self.side}x"
            f"{self.channels}, {self.hidden} filters, {self.steps} steps, {self.tasks} tasks"
        )


PRESETS = {
    "mini_5w1s": Preset(5, 1, 15, side=84, channels=3, hidden=32, steps=5, tasks=4),
    "mini_5w5s": Preset(5, 5, 15, side=84, channels=3, hidden=32, steps=5, tasks=4),
    "omniglot_5w1s": Preset(5, 1, 15, side=28, channels=1, hidden=64, steps=1, tasks=32),
    "omniglot_5w1s_small": Preset(5, 1, 5, side=28, channels=1, hidden=32, steps=1, tasks=16),
    "omniglot_20w1s": Preset(20, 1, 15, side=28, channels=1, hidden=64, steps=5, tasks=16),
    "smoke": Preset(3, 1, 2, side=28, channels=1, hidden=12, steps=2, tasks=2),
}
"""By name; `smoke` only shows within a second that a command runs."""

PROTOCOL = tuple(name for name in PRESETS if name != "smoke")


def episodes(
    preset: Preset, device: torch.device | str = "cpu", *, seed: int = 0, dtype: torch.dtype | None = None
) -> Episodes:
    """Random episodes: images uniform in `[0, 1]`, of `dtype` (None: float32), and labels grouped in order."""
    import torch

    from fewshot_asam.episodes import Episodes

    generator = torch.Generator().manual_seed(seed)

    def images(per_class: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(preset.ways).repeat_interleave(per_class).expand(preset.tasks, -1).contiguous()
        x = torch.rand(*labels.shape, *preset.image_shape, generator=generator, dtype=torch.float32)
        return x.to(dtype or torch.float32), labels

    return Episodes(*images(preset.shots), *images(preset.queries)).to(device)
