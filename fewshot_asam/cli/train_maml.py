"""`train_maml`: meta-train and test.

train_maml --inner agnostic_sam --ways 5 --shots 1
train_maml --config configs/omniglot_20w1s.yaml --inner maml --data-root DATA
train_maml --resume --output-dir RUN --iterations 2000
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from fewshot_asam import config as configs
from fewshot_asam import distributed
from fewshot_asam.cli.parsing import Parser, add_settings, existing_run, parse, run
from fewshot_asam.config import TrainConfig
from fewshot_asam.errors import FewShotError
from fewshot_asam.memory import keep_freed_memory
from fewshot_asam.train import train

FREE_TO_CHANGE = {"iterations", "max_minutes", "data_root", "output_dir", "checkpoint_every"}
"""Settings with which a run may be resumed although they differ."""


def _parser(defaults: TrainConfig) -> Parser:
    parser = Parser(prog="train_maml", description="Meta-train a few-shot learner, test it, write a run folder.")
    parser.add_argument("--config", action="config", help="YAML file of these settings; flags override it")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output-dir")
    add_settings(parser, TrainConfig)
    parser.set_defaults(asdict(defaults))
    return parser


def _settings(argv: Sequence[str], defaults: TrainConfig) -> tuple[TrainConfig, bool]:
    given = parse(_parser(defaults), argv)
    values = {field.name: given[field.name] for field in fields(TrainConfig)}
    for name in ("data_root", "split_csv"):
        values[name] = values[name] and values[name].absolute()
    return TrainConfig(**values), bool(given.resume)


def _resumed(argv: Sequence[str], folder: Path) -> TrainConfig:
    """The stored settings with the given ones over them; a difference that would alter the run is refused."""
    stored = configs.from_yaml(existing_run(str(folder)) / "config.yaml")
    wanted, _ = _settings(argv, stored)
    for field in fields(TrainConfig):
        old, new = getattr(stored, field.name), getattr(wanted, field.name)
        if old != new and field.name not in FREE_TO_CHANGE:
            raise FewShotError(
                f"{field.name} was {old} and is {new}, which would alter the resumed run; "
                "leave it as it was, or start a new run"
            )
    if stored.schedule == "cosine" and stored.iterations != wanted.iterations:
        warnings.warn(
            f"meta_lr falls to 0 at iteration {wanted.iterations} now, not {stored.iterations}: with schedule "
            "'cosine' this is not the run that had so many iterations from the start",
            stacklevel=2,
        )
    return wanted


def _given(argv: Sequence[str]) -> tuple[TrainConfig, bool]:
    config, resume = _settings(argv, TrainConfig())
    if resume and config.output_dir is None:
        raise FewShotError("--resume needs the run to go on with; pass --output-dir RUN")
    return (_resumed(argv, config.output_dir) if resume and config.output_dir else config), resume


def command(argv: Sequence[str]) -> None:
    """Parses the arguments and trains."""
    config, resume = distributed.agreed(lambda: _given(argv))
    keep_freed_memory()
    train(config, resume)


def main(argv: Sequence[str] | None = None) -> int:
    """The console script."""
    return run(command, argv)


if __name__ == "__main__":
    raise SystemExit(main())
