"""Train an image classifier with SGD, SAM, ASAM, Friendly SAM or Agnostic-SAM, test it and write a run folder.

examples:
  train_classifier --dataset cifar10 --optimizer agnostic_sam     # downloads CIFAR-10; hours without a GPU
  train_classifier --dataset folder --data-root images.zip --model small --epochs 10 --label-noise 0.4
  train_classifier --resume --output-dir RUN     # go on after a stop
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

from fewshot_asam.cli.surroundings import importing

with importing():
    from fewshot_asam.cli.parsing import Parser, add_settings, parse, run
    from fewshot_asam.errors import FewShotError
    from fewshot_asam.runtime.allocator import keep_freed_memory
    from fewshot_asam.supervised.config import GROUPS, ClassifierConfig
    from fewshot_asam.supervised.loop import stored_settings, train_classifier


def settings(argv: Sequence[str], defaults: ClassifierConfig) -> tuple[ClassifierConfig, bool]:
    """The settings that the words and their `--config` files say, and whether to go on with a run."""
    parser = Parser(prog="train_classifier", description=__doc__)
    parser.add_argument("--config", action="config", help="YAML file of these settings; flags override it")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output-dir")
    add_settings(parser, ClassifierConfig, GROUPS)
    usual = asdict(defaults)
    parser.set_defaults(usual)
    given = parse(parser, argv)
    return replace(defaults, **{name: given[name] for name in usual}), bool(given.resume)


def command(argv: Sequence[str]) -> None:
    """Parses the arguments and trains."""
    config, resume = settings(argv, ClassifierConfig())
    if resume and config.output_dir is None:
        raise FewShotError("--resume needs the run to go on with; pass --output-dir RUN")
    if resume and config.output_dir:
        config, _ = settings(argv, stored_settings(config.output_dir))
    keep_freed_memory()
    train_classifier(config, resume=resume)


def main(argv: Sequence[str] | None = None) -> int:
    """The console script."""
    return run(command, argv, several=False)


if __name__ == "__main__":
    raise SystemExit(main())
