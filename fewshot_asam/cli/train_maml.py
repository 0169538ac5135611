"""Meta-train a few-shot learner, test it and write a run folder.

examples:
  train_maml --inner agnostic_sam --ways 5 --shots 1     # the embedded dataset: nothing to download
  train_maml --config configs/omniglot_20w1s.yaml --inner maml --data-root DATA --output-dir RUN
  train_maml --resume --output-dir RUN --iterations 2000     # go on after a stop, or train longer
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields

from fewshot_asam.cli.surroundings import importing

with importing():
    from fewshot_asam.cli.parsing import Parser, add_settings, parse, run
    from fewshot_asam.errors import FewShotError
    from fewshot_asam.runtime import distributed
    from fewshot_asam.runtime.allocator import keep_freed_memory
    from fewshot_asam.training import config as configs
    from fewshot_asam.training.config import TrainConfig
    from fewshot_asam.training.loop import train
    from fewshot_asam.training.run_folder import stored_settings


def _parser(defaults: TrainConfig) -> Parser:
    parser = Parser(prog="train_maml", description=__doc__)
    parser.add_argument("--config", action="config", help="YAML file of these settings; flags override it")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output-dir")
    add_settings(parser, TrainConfig, configs.GROUPS)
    parser.set_defaults(asdict(defaults))
    return parser


def _settings(argv: Sequence[str], defaults: TrainConfig) -> tuple[TrainConfig, bool]:
    given = parse(_parser(defaults), argv)
    values = {field.name: given[field.name] for field in fields(TrainConfig)}
    return configs.located(TrainConfig(**values)), bool(given.resume)


def _given(argv: Sequence[str]) -> tuple[TrainConfig, bool]:
    config, resume = _settings(argv, TrainConfig())
    if resume and config.output_dir is None:
        raise FewShotError("--resume needs the run to go on with; pass --output-dir RUN")
    if resume and config.output_dir:
        return _settings(argv, stored_settings(config.output_dir))
    return config, resume


def command(argv: Sequence[str]) -> None:
    """Parses the arguments and trains."""
    config, resume = distributed.all_succeed(lambda: _given(argv))
    keep_freed_memory()
    train(config, resume)


def main(argv: Sequence[str] | None = None) -> int:
    """The console script."""
    return run(command, argv)


if __name__ == "__main__":
    raise SystemExit(main())
