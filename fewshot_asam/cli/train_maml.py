"""Meta-train a few-shot learner, test it and write a run folder.

examples:
  train_maml --inner agnostic_sam --ways 5 --shots 1     # the embedded dataset: nothing to download
  train_maml --config configs/omniglot_20w1s.yaml --inner maml --data-root DATA --output-dir RUN
  train_maml --resume --output-dir RUN --iterations 2000     # go on after a stop, or train longer
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from typing import Any

from fewshot_asam.cli.surroundings import importing

with importing():
    from fewshot_asam.cli.parsing import Parser, add_settings, parse, run, said
    from fewshot_asam.errors import FewShotError
    from fewshot_asam.rules import rule_class
    from fewshot_asam.runtime import distributed
    from fewshot_asam.runtime.allocator import keep_freed_memory
    from fewshot_asam.training.config import GROUPS, TrainConfig, is_flag, located, with_rule
    from fewshot_asam.training.loop import train
    from fewshot_asam.training.run_folder import stored_settings


FLAGS = [field.name for field in fields(TrainConfig) if is_flag(field)]


def _parser(defaults: TrainConfig, rule: Any = None) -> Parser:
    """The settings of a run and, where the rule is somebody's, its fields in place of those of the same names."""
    parser = Parser(prog="train_maml", description=__doc__)
    parser.add_argument("--config", action="config", help="YAML file of these settings; flags override it")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output-dir")
    own = [one.name for one in fields(rule)] if rule else []
    add_settings(parser, TrainConfig, GROUPS, without=own)
    usual = {name: value for name, value in asdict(defaults).items() if name in FLAGS and name not in own}
    if own:
        add_settings(parser, rule, {own[0]: f"{rule.__name__}'s settings"})
        usual |= {one.name: one.default for one in fields(rule)} | defaults.inner_settings
    parser.set_defaults(usual)
    return parser


def _settings(argv: Sequence[str], defaults: TrainConfig) -> tuple[TrainConfig, bool]:
    inner = said(argv, "inner") or defaults.inner
    rule: Any = rule_class(inner) if ":" in inner else None
    if rule or ":" in defaults.inner:
        defaults = with_rule(defaults, inner)
    given = parse(_parser(defaults, rule), argv)
    own = [one.name for one in fields(rule)] if rule else []
    values = {name: given[name] for name in FLAGS if name not in own}
    settings = {name: given[name] for name in own}
    return located(replace(defaults, **values, inner_settings=settings)), bool(given.resume)


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
    train(config, resume=resume)


def main(argv: Sequence[str] | None = None) -> int:
    """The console script."""
    return run(command, argv)


if __name__ == "__main__":
    raise SystemExit(main())
