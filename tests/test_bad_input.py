"""Command lines and settings that cannot be meant: one line of error, exit status 2, and nothing else happens."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import make_images
from fewshot_asam.cli import eval_maml, train_maml
from fewshot_asam.cli.parsing import LONGEST
from fewshot_asam.training.config import TrainConfig

QUICK = (
    "--dataset folder --data-root images --image-size 16 --ways 3 --shots 1 --queries 2 --hidden 4 --iterations 2 "
    "--meta-batch-size 2 --validate-tasks 2 --test-tasks 4"
)
HUGE = 10**30
NUMBERS = {
    **dict.fromkeys(("ways", "shots", "queries", "image-size", "hidden", "inner-steps", "iterations"), "0 -3 HUGE nan"),
    **dict.fromkeys(("meta-batch-size", "validate-every", "checkpoint-every"), "0 -1 HUGE 1.5"),
    **dict.fromkeys(("validate-tasks", "test-tasks"), "0 1 -5 HUGE nan"),
    **dict.fromkeys(("seed", "split-seed"), "-1 HUGE nan 0.5"),
    **dict.fromkeys(("inner-lr", "meta-lr", "clip-grad", "max-minutes"), "0 -1 .nan .inf 1e300 few"),
    **dict.fromkeys(("rho", "rho1", "rho2"), "-1 .nan .inf 1e300 few"),
    "beta": "-0.1 1 .nan .inf few",
}
"""Values of each numeric setting that it must refuse by its name."""
REFUSED = [(f"--{name}={value}", f"{name.replace('-', '_')} is") for name, v in NUMBERS.items() for value in v.split()]

COMMANDS = [
    ("--ways 14", "folder, training: ways is 14, but the split has 13 classes"),
    ("--ways 4", "folder, validation: ways is 4, but the split has 3 classes"),
    ("--ways 1000000000", "but the split has 13 classes"),
    ("--ways 1", "ways is 1; expected at least 2"),
    ("--shots 5", "class class002 has 6 images; 5 shots and 2 queries need 7"),
    ("--ways", "--ways: expected one argument"),
    ("--ways -inf", "--ways: expected one argument"),
    ("--ways=²", "ways is '²'; expected a whole number"),
    ("--ways=三", "ways is '三'; expected a whole number"),
    ("--ways='3\n4'", "ways is"),
    ("--ways='3\0'", "ways is '3\\x00'; expected a whole number"),
    ("--ways=true", "ways is 'True'; expected a whole number"),
    ("--ways=[3]", "ways is '[3]'; expected a whole number"),
    (f"--ways={'[' * 500}", "--ways is nested"),
    (f"--ways={'[' * 5000}", "ways is"),  # newer versions of libyaml refuse to read so deep
    (f"--ways={'9' * 5000}", "Exceeds the limit"),
    ("--ways.x 3", "ways is"),
    ("--rho=a", "rho is 'a'; expected a number"),
    # Empty values: as a path they would be the current folder.
    ("--inner ''", "--inner is empty"),
    ("--ways=", "--ways is empty"),
    ("--data-root ''", "--data-root is empty"),
    ("--output-dir ''", "--output-dir is empty"),
    ("--output-dir=", "--output-dir is empty"),
    ("--split-csv ''", "--split-csv is empty"),
    ("--config ''", "--config is empty"),
    ("''", "an argument is empty"),
    # Options that there are not.
    ("--iner-lr 0.1", "did you mean --inner-lr?"),
    ("--inner_lr 0.1", "did you mean --inner-lr?"),
    ("--inner-learning-rate 0.1", "did you mean --inner-lr?"),
    ("--lr=0.1", "did you mean --inner-lr or --meta-lr?"),
    ("--n-way 5", "did you mean --ways?"),
    ("--steps 5", "did you mean --inner-steps?"),
    ("--batch-size 5", "did you mean --meta-batch-size?"),
    ("--val 5", "ambiguous option"),
    ("-x", "unrecognized arguments: -x"),
    ("folder", "unrecognized arguments: folder"),
    ("--tasks 5", "did you mean"),
    # Values that there are not.
    (
        "--inner mamml",
        "expected one of agnostic_sam, maml, sharp_maml_low, or package.module:Rule; did you mean maml?",
    ),
    ("--inner sharp_maml", "did you mean sharp_maml_low?"),
    ("--dataset mini-imagenet", "did you mean mini_imagenet?"),
    ("--dataset omniglott", "did you mean omniglot?"),
    ("--model conv-4", "did you mean conv4?"),
    ("--norm transductiv", "did you mean transductive?"),
    ("--validation splits", "did you mean split?"),
    ("--schedule cosin", "did you mean cosine?"),
    ("--adapt heads", "did you mean head?"),
    ("--engine vmapp", "did you mean vmap?"),
    ("--precision fp32", "expected one of float32, tf32, bfloat16"),
    ("--val-norm his", "val_norm is 'his'; expected one of own, current"),
    ("--val-grad-point here", "expected one of perturbed, current"),
    ("--channels 2", "channels is '2'; expected one of 1, 3"),
    ("--device gpu", "expected one of auto, cpu, cuda"),
    ("--device cuda:0", "did you mean cuda?"),
    ("--first-order", "--first-order: expected one argument"),
    ("--first-order maybe", "first_order is 'maybe'; expected true or false"),
    ("--resume=yes", "ignored explicit argument"),
    # Switches that contradict one another.
    ("--shots 1 --validation split", "'split' with 1 shot leaves nothing to train on"),
    ("--dataset glyphs", "image_size is given, but dataset is 'glyphs'"),
    ("--dataset omniglot --image-size 84 --split-csv splits.csv", "split_csv is given, but dataset is 'omniglot'"),
    ("--dataset mini_imagenet --image-size 84 --channels 1", "channels is given"),
    ("--resume", "pass --output-dir RUN"),
    # Data.
    ("--data-root missing", "missing is not a folder"),
    ("--data-root file", "file is not a folder"),
    ("--data-root empty", "empty has no subfolders"),
    ("--data-root hollow", "hollow has classes without images: a"),
    ("--data-root few", "class a has 1 images; 1 shots and 2 queries need 3"),
    ("--data-root 'a\0b'", "data_root is"),
    ("--data-root 'a\nb'", "data_root is"),
    ("--data-root=~nobody-of-this-name", "home folder"),
    (f"--data-root {'x' * 5000}", "File name too long"),
    ("--dataset omniglot --image-size 84 --data-root empty", "neither images_background.zip nor images_background/"),
    ("--dataset mini_imagenet --image-size 84 --data-root empty", "there is no Mini-ImageNet in"),
    ("--image-size 15", "images are 15x15; four poolings need sides of at least 16"),
    ("--image-size 100000", "image_size is 100000; expected at most 10,000"),
    ("--hidden 1000000", "hidden is 1000000; expected at most 10,000"),
    ("--meta-batch-size 1000000", "expected at most 10,000"),
    ("--split-fractions [0.5,0.5,0.5]", "expected three positive shares that add up to 1"),
    ("--split-fractions [1,0,0]", "three positive shares"),
    ("--split-fractions [-1,1,1]", "three positive shares"),
    ("--split-fractions [0.5,0.5]", "expected a list of 3, each a number"),
    ("--split-fractions 0.6,0.2,0.2", "expected a list of 3, each a number"),
    ("--split-fractions [.inf,0.5,0.5]", "three positive shares"),
    ("--split-fractions [0.98,0.01,0.01]", "gives splits of train 20, val 0, test 0 classes"),
    ("--split-csv missing.csv", "missing.csv cannot be read"),
    ("--split-csv empty", "empty cannot be read"),
    ("--split-csv file", "file line 1 is 'mine'; expected the header 'class,split'"),
    ("--split-csv splits.csv", "splits.csv line 2: there is no class folder 'x'"),
    # Run folders.
    ("--output-dir file", "file cannot be made"),
    ("--output-dir file/run", "cannot be made"),
    ("--output-dir full", "full is not empty"),
    ("--output-dir run", "run holds a run already"),
    ("--output-dir 'a\0b'", "output_dir is"),
    ("--output-dir 'a\nb'", "output_dir is"),
    (f"--output-dir {'x' * 300}", "File name too long"),
    ("--resume --output-dir missing", "missing is not the folder of a run"),
    ("--resume --output-dir file", "file is not the folder of a run"),
    (
        "--resume --output-dir newer",
        "newer/config.yaml is of another command or version: there is no setting 'dropout'",
    ),
    ("--resume --output-dir cut", "cut/config.yaml lacks"),
]

FILES = [
    ("", "does not hold settings"),
    ("# ways: 3", "does not hold settings"),
    ("[1, 2]", "does not hold settings; expected lines of a name and a value, such as 'ways: 5'"),
    ("ways", "does not hold settings"),
    ("iner: maml", "there is no setting 'iner'; did you mean inner?"),
    ("inner_learning_rate: 0.1", "there is no setting 'inner_learning_rate'; did you mean inner_lr?"),
    ("inner-lr: 0.1", "there is no setting 'inner-lr'; did you mean inner_lr?"),
    ("learning_rate: 0.1", "did you mean inner_lr or meta_lr?"),
    ("config: other.yaml", "there is no setting 'config'"),
    ("resume: true", "there is no setting 'resume'"),
    ("5: 3", "there is no setting '5'"),
    ("ways: 5\nshots: 1\nways: 5", "line 3 gives ways again; expected it once"),
    ("ways:\n  number: 5", "ways is \"{'number': 5}\"; expected a whole number"),
    ("ways: many", "ways is 'many'; expected a whole number"),
    ("ways: null", "ways is 'None'; expected a whole number"),
    ("ways: 1e3", "ways is '1000.0'; expected a whole number"),
    ("ways: 2020-01-01", "expected a whole number"),
    ("ways: 2020-99-99", "is not a YAML file of settings (month must be in 1..12)"),
    ("validate_every: 0", "validate_every is 0"),
    ("inner: mamml", "did you mean maml?"),
    ("output_dir: ''", "--output-dir is empty"),
    ("ways:\t5\n\tshots: 1", "line 1: found character '\\t'"),
    ("ways: [", "(line 1: "),
    ("ways: 5\nshots: 1: 2", "(line 2: mapping values are not allowed here)"),
    ("ways: 5\n---\nways: 5", "another document"),
    ("? [ways]\n: 5", "unhashable key"),
    ("!!python/object/apply:os.mkdir ['harmed']", "line 1 is nested or has a YAML alias or tag"),
    ("ways: 3\nshots: !!python/name:os.system", "line 2 is nested or has a YAML alias or tag"),
    ("ways: !!timestamp x", "line 1 is nested or has a YAML alias or tag"),
    (
        "a: &a [x, x]\n" + "".join(f"b{i}: &a [*a, *a, *a, *a]\n" for i in range(40)),
        "line 2 is nested or has a YAML alias or tag",
    ),
    ("[" * 15_000, "line 1 is nested"),
    ("ways: " + "9" * 15_000, "is not a YAML file of settings"),
    ("#" * 200_000, "has more than 20,000 bytes"),
    (b"\x00\xff\xfe\x80", "is not a YAML file of settings"),
    (b"\x89PNG\r\n\x1a\n\x00\x00", "is not a YAML file of settings"),
]

EVALUATIONS = [
    ("", "runs"),
    ("missing", "missing is not the folder of a run"),
    ("file", "file is not the folder of a run"),
    ("'a\0b'", "is not the folder of a run"),
    ("''", "an argument is empty"),
    ("run --tasks 0", "tasks is 0; expected at least 2, for an interval"),
    ("run --tasks 1", "tasks is 1"),
    ("run --tasks=-5", "tasks is -5"),
    (f"run --tasks {HUGE}", "at most 1,000,000,000"),
    ("run --tasks many", "tasks is 'many'; expected a whole number"),
    ("run --seed=-1", "seed is -1"),
    (f"run --seed {HUGE}", "seed is 1000"),
    ("run --task-seed 1", "did you mean"),
    ("run --inner mamml", "did you mean maml?"),
    ("run --inner-steps 0", "inner_steps is 0"),
    ("run --inner-lr=.nan", "inner_lr is nan"),
    ("run --inner-lr 0", "inner_lr is 0.0"),
    ("run --data-root missing", "missing is not a folder"),
    ("run --data-root=~nobody-of-this-name", "home folder"),
    ("run --data-root empty", "empty has no subfolders"),
    ("run --data-root few", "class a has 1 images"),
    ("run --config c.yaml", "unrecognized arguments: --config"),
    ("run run", "the same run was given twice"),
    ("run ./run/", "the same run was given twice"),
    ("run queries", "run has queries 2 and queries 1; runs that are compared must share it"),
    ("run unweighted", "unweighted/best.safetensors does not exist"),
    ("run damaged", "damaged/best.safetensors is damaged"),
    ("run wider", "wider/best.safetensors was made with hidden 4, but the run's setting is 8"),
    ("newer", "newer/config.yaml is of another command or version: there is no setting 'dropout'"),
    ("cut", "cut/config.yaml lacks"),
    ("garbled", "garbled/config.yaml is not a YAML file of settings"),
]


def write_images(root: Path, classes: int, per_class: int) -> None:
    drawn = make_images(classes, per_class, (1, 16, 16), 0)
    for index, image in enumerate(drawn.images):
        folder = root / drawn.names[index // per_class]
        folder.mkdir(exist_ok=True, parents=True)
        Image.fromarray(np.asarray(image[0])).save(folder / f"{index % per_class}.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The current folder: images, a run, and much that is neither."""
    root = tmp_path_factory.mktemp("place")
    write_images(root / "images", 20, 6)
    for name in "abcde":
        (root / "few" / name).mkdir(parents=True)
        Image.new("L", (16, 16)).save(root / "few" / name / "0.png")
    (root / "hollow" / "a").mkdir(parents=True)
    (root / "empty").mkdir()
    (root / "full").mkdir()
    for name in ("file", "full/notes.txt"):
        (root / name).write_text("mine")
    (root / "splits.csv").write_text("class,split\nx,train\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSHOT_ASAM_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.chdir(root)
        assert train_maml.main([*QUICK.split(), "--output-dir", "run"]) == 0
        _spoil(root)
        yield root


def _spoil(root: Path) -> None:
    text = (root / "run/config.yaml").read_text()
    changed = {
        "queries": text.replace("queries: 2", "queries: 1"),
        "wider": text.replace("hidden: 4", "hidden: 8"),
        "newer": text + "dropout: 0.1\n",
        "cut": text[: text.index("\n", len(text) // 2)],
        "garbled": "\0" + text,
    }
    for name in ("unweighted", "damaged", *changed):
        shutil.copytree(root / "run", root / name)
        (root / name / "config.yaml").write_text(changed.get(name, text))
    (root / "unweighted/best.safetensors").unlink()
    (root / "damaged/best.safetensors").write_bytes((root / "run/best.safetensors").read_bytes()[:100])


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder, with what changes when it does."""
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in sorted(folder.rglob("*"))}


def require_refusal(status: int, out: str, err: str, said: str) -> None:
    assert (status, out) == (2, ""), err
    assert err.startswith("error: ")
    assert err.endswith("\n")
    assert len(err.splitlines()) == 1
    assert len(err) < LONGEST + 50
    assert said in err


Refuse = Callable[[Callable[[list[str]], int], str, str], None]


@pytest.fixture
def refuse(place: Path, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Runs a command in this process; it must say that in one line, and neither print nor write anything else."""

    def check(main: Callable[[list[str]], int], words: str, said: str) -> None:
        before = state(place)
        capsys.readouterr()
        status = main(shlex.split(words))
        require_refusal(status, *capsys.readouterr(), said)
        assert state(place) == before

    return check


@pytest.mark.parametrize(("words", "said"), COMMANDS + REFUSED)
def test_bad_command_lines(refuse: Refuse, words: str, said: str) -> None:
    refuse(train_maml.main, f"{QUICK} {words}".replace("HUGE", str(HUGE)), said)


@pytest.mark.parametrize(("content", "said"), FILES)
def test_bad_settings_files(refuse: Refuse, tmp_path: Path, content: str | bytes, said: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    refuse(train_maml.main, f"{QUICK} --config {file}", said)


@pytest.mark.parametrize(("file", "said"), [("empty", "Is a directory"), ("missing.yaml", "does not exist")])
def test_what_is_no_settings_file(refuse: Refuse, file: str, said: str) -> None:
    refuse(train_maml.main, f"{QUICK} --config {file}", said)
    refuse(train_maml.main, f"{QUICK} --config", "--config: expected one argument")


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="there is no endless file")
def test_an_endless_settings_file(refuse: Refuse) -> None:
    refuse(train_maml.main, f"{QUICK} --config /dev/zero", "it is a device, not a file")


@pytest.mark.parametrize(("words", "said"), EVALUATIONS)
def test_bad_evaluations(refuse: Refuse, words: str, said: str) -> None:
    refuse(eval_maml.main, words, said)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_there_is_not(refuse: Refuse) -> None:
    refuse(train_maml.main, f"{QUICK} --device cuda", "no usable CUDA device; use --device cpu or auto")
    refuse(eval_maml.main, "run --device cuda", "no usable CUDA device")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no folder that root cannot write")
def test_a_run_folder_that_cannot_be_made(refuse: Refuse) -> None:
    refuse(train_maml.main, f"{QUICK} --output-dir /proc/run", "the run folder /proc/run cannot be made")


@pytest.mark.parametrize(
    ("module", "words", "said"),
    [
        ("train_maml", "--ways 14", "but the split has 13 classes"),
        ("train_maml", "--iner maml", "did you mean --inner?"),
        ("train_maml", "--output-dir full", "full is not empty"),
        ("train_maml", "--config splits.csv", "does not hold settings"),
        ("eval_maml", "run damaged", "best.safetensors is damaged"),
        ("eval_maml", "run --tasks 0", "tasks is 0"),
    ],
)
def test_in_a_process_of_its_own(place: Path, module: str, words: str, said: str) -> None:
    before = state(place)
    settings = QUICK.split() if module == "train_maml" else []
    command = [sys.executable, "-m", f"fewshot_asam.cli.{module}", *settings, *words.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, capture_output=True, text=True, cwd=place, env=environment, timeout=120, check=False)
    require_refusal(done.returncode, done.stdout, done.stderr, said)
    assert state(place) == before


@pytest.mark.parametrize("rule", ["maml", "sharp_maml_low"])
def test_a_file_is_reused_with_another_rule(tmp_path: Path, rule: str) -> None:
    """Settings of Agnostic-SAM are not refused where another rule, which does not heed them, is asked for."""
    (tmp_path / "c.yaml").write_text("rho1: 1.0e-3\nrho2: 5.0e-4\nbeta: 0.5\nval_norm: current\n")
    config, _ = train_maml._settings(["--config", str(tmp_path / "c.yaml"), "--inner", rule], TrainConfig())
    assert (config.inner, config.rho1, config.beta) == (rule, 1e-3, 0.5)


def test_values_of_a_file_are_read_as_they_stand(tmp_path: Path) -> None:
    lines = ["inner_lr: 1e-3", "first_order: yes", "clip_grad: null", "data_root: ~/data", "dataset: folder"]
    (tmp_path / "c.yaml").write_text("\n".join([*lines, "split_fractions: [0.5, 0.3, 0.2]", "output_dir: 'a b = c'"]))
    config, _ = train_maml._settings(["--config", str(tmp_path / "c.yaml"), "--output-dir=~/runs"], TrainConfig())
    assert (config.inner_lr, config.first_order, config.clip_grad) == (1e-3, True, None)
    assert config.data_root == Path.home() / "data"
    assert config.split_fractions == (0.5, 0.3, 0.2)
    assert config.output_dir == Path.home() / "runs"
    config, _ = train_maml._settings(["--config", str(tmp_path / "c.yaml")], TrainConfig())
    assert config.output_dir == Path("a b = c")
