"""A run's weights in a learner again, from Python."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fewshot_asam import EpisodeSampler, evaluate, load_run
from fewshot_asam.data import Dataset
from fewshot_asam.training.trained import EVALUATION_SEED
from short_runs import cache, dataset, finished, images  # noqa: F401


def test_a_runs_learner_is_tested_as_the_run_was(finished: Path, dataset: Dataset) -> None:  # noqa: F811
    summary = json.loads((finished / "summary.json").read_text("utf-8"))
    sampler = EpisodeSampler(dataset.test, 3, 1, 2, seed=EVALUATION_SEED)
    found = evaluate(load_run(finished, "cpu").learner(), sampler, summary["test_tasks"], summary["inner_steps"])
    assert found.mean().item() == pytest.approx(summary["test_accuracy"], abs=1e-7)
