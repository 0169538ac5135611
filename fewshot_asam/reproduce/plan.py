"""A plan of experiments: a YAML file to sections, and those to cells, each a run with its tests."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

from fewshot_asam.errors import FewShotError
from fewshot_asam.reproduce.registration import Registration, digest, read_registration, texts
from fewshot_asam.runtime.yaml_settings import nearest, read_yaml, require_known
from fewshot_asam.training.checks import require_seed, require_tasks
from fewshot_asam.training.config import TrainConfig, changed, from_plain, plain
from fewshot_asam.training.trained import WeightsName

PLAN_KEYS = ("seeds", "defaults", "tests", "rules", "sections")
"""What a plan must say: seeds, settings of every cell, tests and rules by name, and the sections made of them."""
PAIR_KEYS = ("claims", "questions", "controls")
"""Pairs of rules that a plan may compare in its sections, by text. A claim says that the first is the better one; the
two rules of a control are equal but for rounding, so their difference is noise."""
OTHER_KEYS = ("registered", "deviations", "superseded")
"""What a plan commits itself to before its first run, what became otherwise, and why its runs stand apart."""
SECTION_KEYS = ("settings", "rules", "tests", "seeds", "baseline", "published", "note")
"""What a section may say: settings of its own, which rules and tests (all), other seeds, the rule that all others are
compared with (each with each), published accuracies in %, and what its readers must know."""
TEST_SETTINGS = ("inner", "inner_steps", "inner_lr", "label_noise", "test_dataset")
"""Settings of a run that a test may change, as `eval_maml` can."""
NOT_IN_PLANS = ("data_root", "test_data_root", "init_from", "output_dir", "device", "max_minutes", "seed")
"""Settings of a run that a plan does not give: where it runs, and the seed, which has a list of its own."""
NOT_IN_NAMES = (
    *("data_root", "output_dir", "device", "max_minutes", "checkpoint_every", "test_tasks", "congruence_tasks"),
    *("keep_snapshots", "test_dataset", "test_data_root", "init_from"),
    *("engine", "torch_compile", "recompute", "cuda_graph", "processes"),
)
"""Settings that leave a run's weights as they are, up to rounding, so that its name does not depend on them."""
ORIGINAL_DEFAULTS = {"init": "xavier", "head_init": "default"}
"""Defaults that have changed since the first runs, as they were then, so that runs keep their names."""
ALWAYS_SHOWN = ("inner", "dataset", "ways", "shots", "seed")
"""Settings that a command line shows even where they are the defaults."""
MOST_SEEDS = 10
MOST_TASKS = 10**7
"""Of a test, whose every answer the ledger keeps."""


class Adaptation(NamedTuple):
    """Which weights of a run are tested, how they adapt, and to what."""

    inner: str
    inner_steps: int
    inner_lr: float
    weights: WeightsName = "best"
    label_noise: float = 0.0
    test_dataset: str | None = None


class Test(NamedTuple):
    """A test of a run's weights on so many tasks."""

    adaptation: Adaptation
    tasks: int


class Cell(NamedTuple):
    """One run of one seed, its tests, and the registered plans that it is of: file and digest."""

    name: str
    config: TrainConfig
    tests: tuple[Test, ...]
    registered: tuple[tuple[Path, str], ...] = ()


@dataclass(frozen=True)
class Section:
    """Rules that are compared, all else being equal.

    **Arguments:**

    - `rules`: by label, with the first seed.
    - `tests`: by name, what each changes of the run's own adaptation (`TEST_SETTINGS`), its `weights` (the best ones)
      and `tasks`; rules are compared by the first.
    - `published`: by label, a rule's or any other, accuracies in %.
    - `baseline`: the rule that all others are compared with; empty where each is compared with each.
    - `note`: for the page.
    """

    title: str
    rules: dict[str, TrainConfig]
    seeds: tuple[int, ...]
    tests: dict[str, dict[str, Any]]
    published: dict[str, float]
    baseline: str = ""
    note: str = ""

    def cell(self, rule: str, seed: int) -> Cell:
        """The run of a rule with a seed, with this section's tests."""
        config = replace(self.rules[rule], seed=seed)
        return Cell(cell_name(config), config, tuple(resolved(test, config) for test in self.tests.values()))

    def cells(self) -> list[Cell]:
        """All rules with the first seed, then with the next: whatever is done can be compared."""
        return [self.cell(rule, seed) for seed in self.seeds for rule in self.rules]


Pairs = dict[str, tuple[str, str]]
"""Two rules by the text of a claim or a question."""


class Plan(NamedTuple):
    """The sections of the file `path`, in order, and the pairs of rules to compare in each section that has both.

    - `superseded`: why its runs are not to be mixed with newer ones; empty for a plan that stands.
    - `registered`: what it committed itself to before its first run; None for a plan that gives no verdicts.
    - `deviations`: what became otherwise, in words.
    - `digest`: of what its file says.
    """

    path: Path
    sections: tuple[Section, ...]
    claims: Pairs
    questions: Pairs
    controls: Pairs
    superseded: str = ""
    registered: Registration | None = None
    deviations: tuple[str, ...] = ()
    digest: str = ""

    @property
    def name(self) -> str:
        """The file's."""
        return self.path.stem


def read_plan(path: Path) -> Plan:
    """A plan from its file; raises `FewShotError` naming what is wrong in it."""
    read = read_yaml(path, deepest=4)
    require_known(read, (*PLAN_KEYS, *PAIR_KEYS, *OTHER_KEYS), str(path))
    if missing := [name for name in PLAN_KEYS if name not in read]:
        raise FewShotError(f"{path} lacks {', '.join(missing)}; expected {', '.join(PLAN_KEYS)}")
    for name in PLAN_KEYS[1:]:
        _mapping(read[name], f"{path}: {name}")
    for name in ("rules", "tests", "sections"):
        for key, value in _mapping(read[name], f"{path}: {name}", least=1).items():
            _mapping(value, f"{path}: {name}: {key}")
    for name, test in _mapping(read["tests"], "").items():
        _check_test(test, f"{path}: tests: {name}")
    sections = tuple(_section(read, title, f"{path}: {title}") for title in _mapping(read["sections"], ""))
    claims, questions, controls = (_pairs(read.get(name, {}), sections, f"{path}: {name}") for name in PAIR_KEYS)
    superseded = _text(read.get("superseded", ""), f"{path}: superseded")
    said = read.get("registered")
    registered = None if said is None else read_registration(said, f"{path}: registered")
    deviations = texts(read.get("deviations", []), f"{path}: deviations")
    plan = Plan(path, sections, claims, questions, controls, superseded, registered, deviations, digest(read))
    if registered and registered.runs != (number := len(cells([plan]))):
        raise FewShotError(f"{path}: registered: runs is {registered.runs}, but its sections have {number}; mend one")
    return plan


def cells(plans: Iterable[Plan]) -> list[Cell]:
    """The cells of plans in the order in which they are run; one of several sections has all their tests."""
    found: dict[str, Cell] = {}
    for plan in plans:
        own = ((plan.path, plan.digest),) if plan.registered else ()
        for cell in (cell for section in plan.sections for cell in section.cells()):
            before = found.get(cell.name, cell._replace(tests=()))
            registered = tuple(dict.fromkeys((*before.registered, *own)))
            found[cell.name] = before._replace(tests=_merged(before.tests + cell.tests), registered=registered)
    return list(found.values())


def cell_name(config: TrainConfig) -> str:
    """The run in a few words and a digest of all settings that its weights depend on."""
    usual = plain(TrainConfig()) | ORIGINAL_DEFAULTS
    settings = {
        name: value for name, value in plain(config).items() if value != usual.get(name) and name not in NOT_IN_NAMES
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return f"{config.title}-{digest[:10]}"


def command(config: TrainConfig) -> str:
    """The command line that gives this run; `DATA` is the folder of the data, and `RUN` what a fork begins from."""
    settings, differ = plain(config), changed(config)
    said = (*ALWAYS_SHOWN, *(["rho"] if config.inner != "maml" else []))
    names = [name for name in settings if name in said or (name in differ and name not in NOT_IN_PLANS)]
    data = [] if config.dataset == "glyphs" else ["--data-root", "DATA"]
    start = ["--init-from", "RUN"] if config.init_digest else []
    return shlex.join(["train_maml", *_flags({name: settings[name] for name in names}), *data, *start])


def adaptation_command(test: Mapping[str, Any]) -> str:
    """The command line that tests the run in the folder `RUN` so."""
    return shlex.join(["eval_maml", "RUN", *_flags(test)])


def resolved(test: Mapping[str, Any], config: TrainConfig) -> Test:
    """A test of a run with these settings."""
    inner, steps, lr, noise, dataset = (test.get(name, getattr(config, name)) for name in TEST_SETTINGS)
    return Test(Adaptation(inner, steps, lr, test.get("weights", "best"), noise, dataset), test["tasks"])


def _flags(settings: Mapping[str, Any]) -> list[str]:
    """Settings as words of a command line."""
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in settings.items()}
    return [word for name, text in texts.items() for word in (f"--{name.replace('_', '-')}", text)]


def _merged(tests: Iterable[Test]) -> tuple[Test, ...]:
    """The tests without those that others hold already, as the first tasks of a stream are the same."""
    largest: dict[Adaptation, int] = {}
    for adaptation, tasks in tests:
        largest[adaptation] = max(tasks, largest.get(adaptation, 0))
    return tuple(Test(adaptation, tasks) for adaptation, tasks in largest.items())


def _section(plan: Mapping[str, Any], title: str, origin: str) -> Section:
    said = plan["sections"][title]
    require_known(said, SECTION_KEYS, origin)
    chosen = {name: _chosen(said.get(name), plan[name], f"{origin}: {name}") for name in ("rules", "tests")}
    settings = plan["defaults"] | _mapping(said.get("settings", {}), f"{origin}: settings")
    seeds = _seeds(said.get("seeds", plan["seeds"]), f"{origin}: seeds")
    rules = {
        label: _config({**settings, **rule}, seeds[0], f"{origin}: {label}") for label, rule in chosen["rules"].items()
    }
    names = [cell_name(config) for config in rules.values()]
    if len(set(names)) < len(names):
        raise FewShotError(f"{origin}: two of its rules are the same run; expected settings that differ")
    published = _mapping(said.get("published", {}), f"{origin}: published")
    for label, value in published.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 100:
            raise FewShotError(f"{origin}: published: {label} is {value!r}; expected an accuracy in %")
    baseline, note = (_text(said.get(name, ""), f"{origin}: {name}") for name in ("baseline", "note"))
    if baseline and baseline not in rules:
        raise FewShotError(f"{origin}: baseline: there is no {baseline!r}{nearest(baseline, rules)}")
    return Section(title, rules, seeds, chosen["tests"], published, baseline, note)


def _text(value: object, origin: str) -> str:
    if not isinstance(value, str):
        raise FewShotError(f"{origin} is {value!r}; expected text")
    return value


def _config(settings: dict[str, object], seed: int, origin: str) -> TrainConfig:
    for name in NOT_IN_PLANS:
        if name in settings:
            raise FewShotError(f"{origin}: {name} is not a plan's to say; give it on the command line, seeds as seeds")
    return from_plain({**settings, "seed": seed}, origin)


def _check_test(test: Mapping[str, Any], origin: str) -> None:
    require_known(test, (*TEST_SETTINGS, "tasks", "weights"), origin)
    if type(test.get("tasks")) is not int:
        raise FewShotError(f"{origin}: tasks is {test.get('tasks')!r}; expected a whole number")
    require_tasks(f"{origin}: tasks", test["tasks"])
    if test["tasks"] > MOST_TASKS:
        raise FewShotError(f"{origin}: tasks is {test['tasks']}; expected at most {MOST_TASKS:,}")
    if test.get("weights", "best") not in get_args(WeightsName):
        raise FewShotError(f"{origin}: weights is {test['weights']!r}; expected {' or '.join(get_args(WeightsName))}")
    from_plain({name: value for name, value in test.items() if name in TEST_SETTINGS}, origin)


def _chosen(names: object, known: dict[str, Any], origin: str) -> dict[str, Any]:
    """Those of `known` that a list names, all without a list."""
    if names is None:
        return known
    if not isinstance(names, list) or not names:
        raise FewShotError(f"{origin} is {names!r}; expected a list of some of {', '.join(known)}")
    for name in names:
        if name not in known:
            raise FewShotError(f"{origin}: there is no {str(name)!r}{nearest(str(name), known)}")
        if names.count(name) > 1:
            raise FewShotError(f"{origin}: {name} stands twice; expected it once")
    return {name: known[name] for name in names}


def _pairs(value: object, sections: Iterable[Section], origin: str) -> Pairs:
    """Two rules by text, which a section at least must have both."""
    found: Pairs = {}
    for text, pair in _mapping(value, origin).items():
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(rule, str) for rule in pair):
            raise FewShotError(f"{origin}: {text} is {pair!r}; expected a list of two rules")
        if not any(pair[0] in section.rules and pair[1] in section.rules for section in sections):
            raise FewShotError(f"{origin}: {text}: no section has both {pair[0]} and {pair[1]}")
        found[text] = (pair[0], pair[1])
    return found


def _seeds(value: object, origin: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(seed) is int for seed in value) or len(set(value)) < len(value):
        raise FewShotError(f"{origin} is {value!r}; expected a list of different whole numbers")
    if not 1 <= len(value) <= MOST_SEEDS:
        raise FewShotError(f"{origin} has {len(value)}; expected at least 1 and at most {MOST_SEEDS}")
    for seed in value:
        require_seed(origin, seed)
    return tuple(value)


def _mapping(value: object, origin: str, least: int = 0) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value) or len(value) < least:
        raise FewShotError(f"{origin} is {value!r}; expected names and what belongs to each")
    return value
