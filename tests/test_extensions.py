"""Each extension is one file of one's own: it is written into an empty folder, and a run is made with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1]
QUICK = "ways=3, queries=2, iterations=2, meta_batch_size=2, validate_every=2, validate_tasks=2, test_tasks=2"
QUICK += ", hidden=4, device='cpu', engine='loop'"
FLAGS = "--ways 3 --queries 2 --iterations 2 --meta-batch-size 2 --validate-every 2 --validate-tasks 2 --test-tasks 2"
FLAGS += " --hidden 4 --device cpu --engine loop"

RULE = """
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Signed:
    scale: float = 0.01
    needs_validation: ClassVar[bool] = False

    def init(self, params):
        return ()

    def step(self, params, state, train_grad, val_grad, lr):
        g = train_grad(params)
        return {name: value - self.scale * lr[name] * g[name].sign() for name, value in params.items()}, state
"""

MODEL = """
from torch import nn


def flat(ways, image_shape):
    channels, height, width = image_shape
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, ways))
"""

RATES = f"""
from fewshot_asam import Conv4, LearnedRates, MetaLearner, TrainConfig, load_dataset, train
from fewshot_asam.rules.maml import MAMLRule

model = Conv4(3, (1, 28, 28), hidden=4)
learner = MetaLearner(model, lr=LearnedRates(model, per="layer_and_step", steps=1, lr=0.1), rule=MAMLRule())
train(TrainConfig(inner="maml", {QUICK}, output_dir="run"), learner=learner, dataset=load_dataset("glyphs"))
"""

MULTI_STEP = """
import torch

from fewshot_asam import Conv4, EpisodeSampler, MAML, load_dataset

dataset = load_dataset("glyphs")
learner = MAML(Conv4(3, dataset.train.shape, hidden=4), lr=0.1)
episodes = EpisodeSampler(dataset.train, ways=3, shots=1, queries=2).sample(num_tasks=2)
learner.meta_loss(episodes, steps=2, step_weights=[0.3, 0.7]).loss.backward()
torch.save(learner.state_dict(), "learner.pt")
"""

DATASET = f"""
import numpy as np

from fewshot_asam import Dataset, TrainConfig, train

pixels = np.random.default_rng(0).integers(0, 256, (120, 16, 16), dtype=np.uint8)
dataset = Dataset.from_arrays("mine", pixels, [f"class {{i % 12}}" for i in range(120)], fractions=(0.5, 0.25, 0.25))
train(TrainConfig(inner="maml", {QUICK}, output_dir="run"), dataset=dataset)
"""

TRAIN = f"-m fewshot_asam.cli.train_maml {FLAGS} --output-dir run"


class Exercise(NamedTuple):
    """A file of one's own, the command that runs it, and what that leaves."""

    file: str
    text: str
    command: str
    made: str = "run/summary.json"


EXERCISES = {
    "a rule": Exercise("my_rules.py", RULE, f"{TRAIN} --inner my_rules:Signed --scale 0.1"),
    "a model": Exercise("my_nets.py", MODEL, f"{TRAIN} --inner sharp_maml_low --model my_nets:flat"),
    "learned rates": Exercise("rates.py", RATES, "rates.py"),
    "a multi-step loss": Exercise("multi_step.py", MULTI_STEP, "multi_step.py", "learner.pt"),
    "a dataset": Exercise("my_data.py", DATASET, "my_data.py"),
}


@pytest.mark.parametrize("name", EXERCISES)
def test_one_file_outside_the_package(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has nothing but the package and the folder."""
    exercise = EXERCISES[name]
    (tmp_path / exercise.file).write_text(exercise.text)
    monkeypatch.setenv("PYTHONPATH", str(PACKAGE))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    done = subprocess.run(
        [sys.executable, *exercise.command.split()], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / exercise.made).exists()
    assert [path.name for path in tmp_path.rglob("*.py")] == [exercise.file]
