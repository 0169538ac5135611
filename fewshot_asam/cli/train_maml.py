"""`train_maml`: meta-train and test.

train_maml --inner agnostic_sam --ways 5 --shots 1
train_maml --config configs/omniglot_20w1s.yaml --inner maml --data-root DATA
train_maml --resume --output-dir RUN --iterations 2000
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
    from fewshot_asam.training.config import TrainConfig, is_flag, located, with_rule
    from fewshot_asam.training.loop import train
    from fewshot_asam.training.run_folder import stored_settings


FLAGS = [field.name for field in fields(TrainConfig) if is_flag(field)]


def _parser(defaults: TrainConfig, rule: Any) -> Parser:
    """The settings of a run and, where the rule is somebody's, those of its fields that are not among them."""
    parser = Parser(prog="train_maml", description="Meta-train a few-shot learner, test it, write a run folder.")
    parser.add_argument("--config", action="config", help="YAML file of these settings; flags override it")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output-dir")
    usual = {name: value for name, value in asdict(defaults).items() if name in FLAGS}
    if rule is not None:
        add_settings(parser, rule)
        usual |= {one.name: one.default for one in fields(rule)} | defaults.inner_settings
    add_settings(parser, TrainConfig)
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
