"""Other people's models: trained rightly in every mode, or refused in one line; as the documentation's table says."""

from __future__ import annotations

import copy
import re
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

from conftest import make_images
from fewshot_asam import MAML, FewShotError, MetaAgnosticSAM
from fewshot_asam.episodes import Episodes, EpisodeSampler
from fewshot_asam.training.evaluation import evaluate
from foreign_models import MODELS, SIDE, Net, conv, head, scripted
from peers import import_learn2learn
from problems import SHAPE, deviation, episodes, meta_gradient

TABLE = Path(__file__).parents[1] / "docs" / "models.md"
MODES: dict[str, dict[str, Any]] = {
    "loop": {"engine": "loop"},
    "vmap": {"engine": "vmap"},
    "compiled": {"engine": "loop", "torch_compile": True},
    "recompute": {"engine": "loop", "recompute": True},
}
ONE_LINE = re.compile(
    r"[^\n]*(layer '\S+' \(\w+\)|\w+\.forward itself|DataParallel)[^\n]*; (to use|use|call|write|if)[^\n]*"
)
"""A layer or the model by name, then what to do."""


def made(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002  learn2learn draws from it
        model = MODELS[name]().double()
    with torch.no_grad():
        for value in model.parameters():
            value *= 1.05  # an orthogonal layer's stored parameters stand where it jumps
    return model


def table() -> dict[str, list[str]]:
    """What the documentation says of each model, by mode."""
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \| (.+?) \| (.+?) \|$", TABLE.read_text(encoding="utf-8"), re.M)
    return {name: list(cells) for name, *cells in rows[1:]}


def loss_of(learner: MAML, batch: Episodes) -> Tensor:
    torch.manual_seed(1)
    return learner.meta_loss(batch, 2).loss


def error_of_gradient(learner: MAML, batch: Episodes) -> float:
    """Against finite differences, in the best of some directions and steps, as a ReLU's kink may stand in one's way."""
    start = nn.utils.parameters_to_vector(learner.parameters()).detach()
    loss = loss_of(learner, batch)
    grads = torch.autograd.grad(loss, list(learner.parameters()), allow_unused=True, materialize_grads=True)
    gradient = torch.cat([grad.flatten() for grad in grads])
    found = []
    for seed, step in enumerate((1e-6, 1e-7, 1e-8, 1e-4)):
        direction = torch.randn(start.shape, generator=torch.Generator().manual_seed(seed), dtype=start.dtype)
        direction /= direction.norm()
        ahead, behind = (moved(learner, batch, start + sign * step * direction) for sign in (1, -1))
        found.append(((ahead - behind) / (2 * step) - gradient @ direction).abs().item() / gradient.norm().item())
        if found[-1] < 1e-7:
            break
    return min(found)


def moved(learner: MAML, batch: Episodes, point: Tensor) -> Tensor:
    """The loss with other parameters, which stay."""
    with torch.no_grad():
        nn.utils.vector_to_parameters(point, learner.parameters())
    return loss_of(learner, batch).detach()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.compile` without code generation, which takes a minute."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, **options, backend=aot_eager))
    torch._dynamo.reset()


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_right_or_refused_in_one_line(name: str, mode: str) -> None:
    told = table()[name][list(MODES).index(mode)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a performance drop under vmap, of what could not be compiled
        try:
            error = error_of_gradient(MAML(made(name), 0.1, **MODES[mode]), episodes())
        except FewShotError as raised:
            outcome = str(raised)
            fine = ONE_LINE.fullmatch(outcome) is not None
        else:
            outcome = "right"
            fine = error < (1e-2 if name == "single precision inside" else 1e-6)
    print(f"\n{name}, {mode}: {outcome}")
    assert (told == "right") == (outcome == "right")
    assert fine


def test_the_table_has_every_model_and_each_cell_one_word() -> None:
    assert list(table()) == list(MODELS)
    assert {cell for cells in table().values() for cell in cells} == {"right", "refused"}


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("name", ["F.batch_norm", "F.layer_norm", "torch.native_layer_norm", "torch.native_batch_norm"])
@pytest.mark.parametrize("torch_compile", [False, True])
def test_what_vmap_differentiates_wrongly_runs_one_by_one(name: str, torch_compile: bool) -> None:
    expected = meta_gradient(MAML(made(name), 0.1, engine="loop"), episodes(), 1)
    learner = MAML(made(name), 0.1, torch_compile=torch_compile)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = meta_gradient(learner, episodes(), 1)
    assert sum("tasks run one by one: the second derivative" in str(w.message) for w in caught) == 1
    assert deviation(found, expected) < 1e-8
    with pytest.raises(FewShotError, match="by vmap is wrong"):
        MAML(made(name), 0.1, engine="vmap", torch_compile=torch_compile).meta_loss(episodes(), 1)


def test_the_check_can_be_switched_off_and_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from fewshot_asam.verification import trials

    calls: list[str] = []
    diagnosed = trials.diagnosed
    monkeypatch.setattr(trials, "diagnosed", lambda *args: calls.append(args[2]) or diagnosed(*args))
    learner = MAML(made("tied weights"), 0.1, engine="loop")
    for _ in range(3):
        meta_gradient(learner, episodes(), 1)
    assert calls == ["loop"]
    learner.clone().adapt(lambda net: net(episodes().support_x[0]).square().mean())
    assert calls == ["loop"]
    meta_gradient(MAML(made("weight norm"), 0.1, engine="loop", check=False), episodes(), 1)
    assert calls == ["loop"]
    learner.model = made("cosine classifier")
    meta_gradient(learner, episodes(), 1)
    assert calls == ["loop", "loop"]


def test_a_model_with_a_head_of_zeros_is_checked_below_it() -> None:
    model = made("weight norm")
    for value in model.head.parameters():
        nn.init.zeros_(value)
    learner = MAML(model, 0.1, engine="loop")
    with pytest.raises(FewShotError, match="_WeightNorm"):
        learner.meta_loss(episodes(), 1)


@pytest.mark.parametrize("options", [{"first_order": True}, {}])
def test_checkpoint_is_refused_without_second_derivatives_too(options: dict[str, Any]) -> None:
    """It would take the model's own values from the second inner step on."""
    learner = MAML(made("checkpoint"), 0.1, engine="loop", **options)
    with torch.set_grad_enabled(bool(options)), pytest.raises(FewShotError, match="use recompute=True"):
        learner.meta_loss(episodes(), 2)


def test_kinks_where_a_model_stands_are_not_taken_for_wrong_derivatives() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 4), nn.ReLU(), head(4)).double()
    nn.init.zeros_(model[1].bias)
    batch = episodes()
    black = Episodes(torch.zeros_like(batch.support_x), batch.support_y, batch.query_x, batch.query_y)
    assert MAML(model, 0.1).meta_loss(black, 1).loss.requires_grad


@pytest.mark.parametrize("mode", ["vmap", "compiled"])
@pytest.mark.parametrize("name", ["weight norm", "Gumbel-softmax, hard", "autograd function with a detached gradient"])
def test_what_is_wrong_in_every_mode_is_not_sent_to_another(name: str, mode: str) -> None:
    with pytest.raises(FewShotError, match="by PyTorch is wrong"):
        MAML(made(name), 0.1, **MODES[mode]).meta_loss(episodes(), 1)


def test_first_order_is_the_cure_only_where_it_helps() -> None:
    for name, helps in (("sparse embedding", False), ("weight norm", True)):
        with pytest.raises(FewShotError) as raised:
            MAML(made(name), 0.1, engine="loop").meta_loss(episodes(), 1)
        assert ("first_order=True" in str(raised.value)) == helps


def test_a_model_of_two_precisions_is_tried_as_it_is() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(SIDE * SIDE, 4), head(4).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.body(x.float().flatten(1))).double())

    assert MAML(Two(), 0.1, engine="loop").meta_loss(episodes(), 1).loss.requires_grad


@pytest.mark.parametrize("engine", ["loop", "vmap"])
@pytest.mark.parametrize("name", ["weights kept in an attribute", "running mean in an attribute"])
def test_a_trial_leaves_no_trace_in_attributes(name: str, engine: Any) -> None:
    model = made(name)
    with pytest.raises(FewShotError, match="what an earlier forward pass left in an attribute"):
        MAML(model, 0.1, engine=engine).meta_loss(episodes(), 1)
    assert model.kept is None


def test_an_error_of_the_models_own_is_its_own() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        MAML(nn.Sequential(nn.Flatten(), nn.Linear(7, 3)).double(), 0.1).meta_loss(episodes(), 1)


def test_images_that_tell_nothing_are_not_held_against_a_model() -> None:
    learner, batch = MAML(made("tied weights"), 0.1), episodes()
    assert learner.clone()(batch.support_x[0][:0]).shape == (0, 3)
    bad = Episodes(batch.support_x * float("nan"), batch.support_y, batch.query_x, batch.query_y)
    assert learner.meta_loss(bad, 1).loss.isnan()
    assert learner.meta_loss(batch, 1).loss.isfinite()
    learner = MAML(made("weight norm"), 0.1, engine="loop")
    learner.clone()(batch.support_x[0][:0])
    with pytest.raises(FewShotError, match="is wrong"):
        learner.meta_loss(batch, 1)


class Returns(nn.Module):
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.net, self.output = Net(conv()), output

    def forward(self, x: Tensor) -> Any:
        return self.output(self.net(x))


@pytest.mark.parametrize("engine", ["loop", "vmap"])
@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda y: (y, y), r"returned a tuple for 6 images; expected logits \[6, ways\]"),
        (lambda y: {"logits": y}, "returned a dict"),
        (lambda y: y[:, 0], r"returned a tensor \[6\]"),
        (lambda y: y[0], r"returned a tensor \[3\]"),
        (lambda y: y[:, :, None], r"returned a tensor \[6, 3, 1\]"),
        (lambda y: y[:-1], r"returned a tensor \[5, 3\]"),
        (lambda y: y.argmax(1), "returned no tensor of floating point"),
        (lambda _: None, "returned no tensor of floating point"),
    ],
)
def test_what_is_no_logits_is_refused(output: Any, message: str, engine: Any) -> None:
    with pytest.raises(FewShotError, match=message):
        MAML(Returns(output).double(), 0.1, engine=engine).meta_loss(episodes(), 1)


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.DataParallel(Net(conv())), "use the module in it: model.module"),
        (lambda: scripted(nn.Linear(3, 3)), "use the module as it is in Python"),
        (lambda: nn.LazyLinear(3), "'weight' has no shape yet; call the model on some images"),
        (lambda: nn.Linear(3, 3).to(torch.complex64), "'weight' is complex"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_modules_that_take_no_other_values_are_refused(make: Any, message: str, check: bool) -> None:
    with pytest.raises(FewShotError, match=message):
        MAML(make(), 0.1, check=check)


def test_recompute_runs_under_the_autocast_of_the_forward_pass() -> None:
    found = []
    for within in (False, True):
        learner, batch = MAML(made("tied weights").float(), 0.1, engine="loop", recompute=True), episodes()
        single = Episodes(batch.support_x.float(), batch.support_y, batch.query_x.float(), batch.query_y)
        with torch.autocast("cpu", torch.bfloat16):
            loss = learner.meta_loss(single, 2).loss
        with torch.autocast("cpu", torch.bfloat16, enabled=within):
            grads = torch.autograd.grad(loss, list(learner.parameters()))
        found.append(torch.cat([grad.flatten() for grad in grads]))
    assert torch.equal(*found)


def test_a_rate_of_another_shape_or_precision_leaves_the_parameters_theirs() -> None:
    model = made("cosine classifier").float()
    rate = nn.Parameter(torch.tensor([0.1], dtype=torch.float64))
    x, y = episodes().support_x[0].float(), episodes().support_y[0]
    for loss in (lambda net: F.cross_entropy(net(x), y), None):
        task = MAML(model, rate, engine="loop").clone()
        task.adapt(F.cross_entropy(task(x), y) if loss is None else loss)
        found = {name: (value.shape, value.dtype) for name, value in task.params.items()}
        assert found == {name: (value.shape, value.dtype) for name, value in model.named_parameters()}


def test_steps_that_are_no_number_are_refused() -> None:
    with pytest.raises(FewShotError, match=r"2\.0 inner steps were asked for; expected a whole number"):
        MAML(made("tied weights"), 0.1).meta_loss(episodes(), 2.0)


def test_ones_own_loop_is_checked_too() -> None:
    task = MAML(made("weight norm"), 0.1).clone()
    with pytest.raises(FewShotError, match=r"second derivative of layer 'features.0.parametrizations.weight.0'"):
        task.adapt(lambda net: F.cross_entropy(net(episodes().support_x[0]), episodes().support_y[0]))
    first_order = MAML(made("weight norm"), 0.1, first_order=True, engine="loop")
    assert first_order.meta_loss(episodes(), 1).loss.requires_grad


def test_random_numbers_and_modes_are_left_as_they_were() -> None:
    model = made("dropout")
    model[0].eval() if isinstance(model, nn.Sequential) else model.features[1].eval()
    modes = [layer.training for layer in model.modules()]
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    MAML(model, 0.1).execution_mode(MAML(model, 0.1).batch(episodes()))
    assert torch.equal(torch.rand(3), expected)
    assert [layer.training for layer in model.modules()] == modes


# --- modules of two names, shared parameters, threads


def slots(model: nn.Module) -> list[tuple[str, int]]:
    """Every place of a parameter or buffer, and what stands there."""
    modules = model.named_modules(remove_duplicate=False)
    values = ((path, layer._parameters | layer._buffers) for path, layer in modules)
    return [(f"{path}.{name}", id(value)) for path, own in values for name, value in own.items()]


@pytest.mark.parametrize("name", ["module of two names", "tied weights", "learn2learn OmniglotCNN", "GRU"])
@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_a_model_is_left_as_it_was(name: str, engine: Any) -> None:
    if name in ("learn2learn OmniglotCNN", "GRU") and engine == "vmap":
        pytest.skip("refused by vmap")
    model, batch = made(name), episodes()
    learner, before = MAML(model, 0.1, engine=engine), slots(model)
    losses = [learner.meta_loss(batch, 2).loss.item() for _ in range(3)]
    assert slots(model) == before
    assert len(set(losses)) == 1
    learner.clone().adapt(lambda net: net(batch.support_x[0]).square().mean(), steps=2)
    assert slots(model) == before
    sampler = EpisodeSampler(make_images(6, 4, SHAPE, 0), 3, 1, 1)
    model.float()
    evaluate(learner, sampler, 4, 1)
    assert [place for place, _ in slots(model)] == [place for place, _ in before]
    assert all(isinstance(value, nn.Parameter) for value in model.parameters())


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("name", ["learn2learn OmniglotCNN", "learn2learn MiniImagenetCNN", "learn2learn OmniglotFC"])
def test_learn2learns_own_networks_give_its_losses_and_gradients(name: str, first_order: bool) -> None:
    l2l, model, batch = import_learn2learn(), made(name), episodes()
    theirs = l2l.algorithms.MAML(copy.deepcopy(model), lr=0.1, first_order=first_order)
    total = torch.zeros((), dtype=torch.float64)
    for x, y, query_x, query_y in zip(batch.support_x, batch.support_y, batch.query_x, batch.query_y, strict=True):
        task = theirs.clone()
        for _ in range(2):
            task.adapt(F.cross_entropy(task(x), y))
        total = total + F.cross_entropy(task(query_x), query_y) / batch.num_tasks
    total.backward()
    expected = torch.cat([value.grad.flatten() for value in theirs.parameters()])
    ours = MAML(model, 0.1, first_order=first_order, engine="loop")
    assert deviation(ours.meta_loss(batch, 2).loss.detach(), total.detach()) < 1e-10
    assert deviation(meta_gradient(ours, batch, 2), expected) < 1e-7
    assert torch.isfinite(expected).all()


def test_training_a_module_of_two_names_goes_on() -> None:
    learner = MAML(made("module of two names"), 0.1)
    adam = torch.optim.Adam(learner.parameters(), 3e-2)
    losses = []
    for _ in range(40):
        adam.zero_grad()
        losses.append(learner.meta_backward(episodes(), 2).loss.item())
        adam.step()
    assert losses[-1] < losses[0] - 0.1


def test_several_threads_use_one_learner() -> None:
    learner = MetaAgnosticSAM(made("tied weights"), 0.1, rho=0.05, engine="loop")
    batches = [episodes(seed=seed) for seed in range(4)]
    expected = [meta_gradient(learner, batch) for batch in batches]
    found: dict[tuple[int, int], Tensor] = {}
    errors: list[BaseException] = []

    def work(index: int) -> None:
        try:
            for again in range(5):
                found[index, again] = meta_gradient(learner, batches[index])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(found) == 20
    assert all(torch.equal(value, expected[index]) for (index, _), value in found.items())


# --- dropout


def test_recompute_draws_dropout_again_and_leaves_the_stream_alone() -> None:
    found = []
    for recompute in (False, True):
        torch.manual_seed(5)
        found.append((meta_gradient(MAML(made("dropout"), 0.1, recompute=recompute), episodes()), torch.rand(2)))
    assert deviation(found[1][0], found[0][0]) < 1e-12
    assert torch.equal(found[1][1], found[0][1])


def test_a_recorded_graph_refuses_dropout_with_recompute(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = MAML(made("dropout"), 0.1, recompute=True, engine="loop")
    meta_gradient(learner, episodes(), 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(FewShotError, match="use cuda_graph false or recompute false"):
        meta_gradient(learner, episodes(), 1)


def test_evaluation_is_without_dropout_and_puts_the_modes_back() -> None:
    model = made("dropout").float()
    model.features[1].eval()
    modes = [layer.training for layer in model.modules()]
    learner, images = MAML(model, 0.1), make_images(6, 8, SHAPE, 0)
    one, two = (evaluate(learner, EpisodeSampler(images, 3, 1, 4), 8, 2) for _ in range(2))
    assert torch.equal(one, two)
    assert [layer.training for layer in model.modules()] == modes
    model.eval()
    assert torch.equal(evaluate(learner, EpisodeSampler(images, 3, 1, 4), 8, 2), one)


# --- the head


class HeadFirst(nn.Module):
    """Registers its classifier before its body."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier, self.body = (
            head(4),
            nn.Sequential(conv(), nn.Softplus(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.body(x))


@pytest.mark.parametrize("adapt", ["head", "body"])
def test_a_head_that_is_not_registered_last_is_asked_for(adapt: Any) -> None:
    torch.manual_seed(0)
    model, batch = HeadFirst().double(), episodes()
    with pytest.raises(FewShotError, match=r"the logits come from classifier.bias, classifier.weight; pass the names"):
        MAML(model, 0.1, adapt=adapt).meta_loss(batch, 1)
    learner = MAML(model, 0.1, adapt=["classifier.*"])
    assert learner.adapted == ("classifier.weight", "classifier.bias")
    assert learner.meta_loss(batch, 1).loss.requires_grad
    with pytest.raises(FewShotError, match=r"adapt has 'fc.\*', which fits no trainable parameter of HeadFirst"):
        MAML(model, 0.1, adapt=["fc.*"])


@pytest.mark.parametrize("name", ["ViT", "GRU", "tied weights", "module of two names", "learn2learn CNN4"])
def test_a_head_that_is_registered_last_is_taken(name: str) -> None:
    learner = MAML(made(name), 0.1, adapt="head", engine="loop")
    learner.meta_loss(episodes(), 1)
    assert all("head" in parameter or "classifier" in parameter for parameter in learner.adapted)


def test_a_layer_that_is_registered_last_and_is_not_the_head_is_seen_in_a_classifier_without_layers() -> None:
    with pytest.raises(FewShotError, match=r"takes the layer registered last for the head \(conv.bias, conv.weight\)"):
        MAML(made("cosine classifier"), 0.1, adapt="head").meta_loss(episodes(), 1)


# --- a learner's settings


def test_a_learned_rate_is_a_parameter_of_the_learner() -> None:
    def learner(rate: float, **options: Any) -> MAML:
        return MAML(made("tied weights"), nn.Parameter(torch.tensor(rate, dtype=torch.float64)), **options)

    batch = episodes()
    losses = [learner(0.1 + by, engine="loop").meta_loss(batch, 3).loss.item() for by in (1e-6, -1e-6)]
    for options in ({"engine": "loop"}, {"engine": "vmap"}, {"engine": "loop", "recompute": True}):
        one = learner(0.1, **options)
        assert any(value is one.lr for value in one.parameters())
        assert "lr" in one.state_dict()
        one.meta_backward(batch, 3)
        assert one.lr.grad.item() == pytest.approx((losses[0] - losses[1]) / 2e-6, rel=1e-6)
    task = learner(0.1).clone().adapt(lambda net: F.cross_entropy(net(batch.support_x[0]), batch.support_y[0]))
    assert all(value.requires_grad for value in task.params.values())


def test_settings_that_are_changed_later_are_heeded() -> None:
    batch = episodes()
    learner = MAML(made("tied weights"), 0.1)
    before = learner.meta_loss(batch, 1).loss
    learner.lr = 0.3
    assert deviation(learner.meta_loss(batch, 1).loss, MAML(made("tied weights"), 0.3).meta_loss(batch, 1).loss) == 0
    assert learner.meta_loss(batch, 1).loss != before
    learner.model = made("cosine classifier")
    fresh = MAML(made("cosine classifier"), 0.3)
    assert deviation(learner.meta_loss(batch, 1).loss, fresh.meta_loss(batch, 1).loss) == 0
    learner.model.conv.requires_grad_(False)
    assert learner.adapted == ("weight", "temperature")
    learner.lr = -1.0
    with pytest.raises(FewShotError, match=r"inner learning rate is -1.0"):
        learner.meta_loss(batch, 1)


@pytest.mark.parametrize("lr", [torch.ones(3), torch.tensor(1), "0.1", True, float("nan"), -0.1, None])
def test_a_rate_that_is_none_is_refused(lr: Any) -> None:
    with pytest.raises(FewShotError, match="the inner learning rate is"):
        MAML(made("tied weights"), lr)


def test_dead_learners_are_let_go() -> None:
    import gc
    import weakref

    def run() -> weakref.ref[nn.Module]:
        model = made("tied weights")
        MAML(model, 0.1).meta_backward(episodes(), 1)
        return weakref.ref(model)

    references = [run() for _ in range(3)]
    gc.collect()
    assert [reference() for reference in references] == [None] * 3


# --- inference mode, labels, attention


def test_inference_mode_gives_the_numbers_of_no_grad() -> None:
    learner = MAML(made("tied weights"), 0.1)
    with torch.no_grad():
        expected = learner.meta_loss(episodes(), 2).loss
    with torch.inference_mode():
        assert torch.equal(learner.meta_loss(episodes(), 2).loss, expected)
        with pytest.raises(FewShotError, match="in inference mode, which takes no gradients"):
            learner.clone().adapt(lambda net: net(episodes().support_x[0]).sum())
        with pytest.raises(FewShotError, match="meta_backward was called without gradients"):
            learner.meta_backward(episodes(), 1)


def labelled(support: list[int], query: list[int]) -> Episodes:
    x = torch.rand(1, 3, *SHAPE, dtype=torch.float64)
    return Episodes(
        x[:, : len(support)],
        torch.tensor([support], dtype=torch.int64),
        x[:, : len(query)],
        torch.tensor([query], dtype=torch.int64),
    )


@pytest.mark.parametrize(
    ("support", "query", "message"),
    [
        ([0, -100, 2], [0, 1, 2], "support labels begin at -100; expected 0 or more"),
        ([0, 1, 2], [0, -1, 2], "query labels begin at -1; expected 0 or more"),
        ([], [0, 1], "the support sets are empty"),
        ([0, 1], [], "the query sets are empty"),
        ([0, 1, 7], [0, 1, 2], "labels go up to 7, but the model has 3 logits; expected 0 to 2"),
        ([0, 1, 2], [0, 1, 3], "labels go up to 3, but the model has 3 logits; expected 0 to 2"),
    ],
)
@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_labels_that_mean_nothing_are_refused(support: list[int], query: list[int], message: str, engine: Any) -> None:
    learner = MAML(made("tied weights"), 0.1, engine=engine)
    with pytest.raises(FewShotError, match=message):
        learner.meta_loss(labelled(support, query), 1)


def test_attention_has_its_fast_kernels_back_afterwards() -> None:
    before = torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()
    meta_gradient(MAML(made("ViT"), 0.1, engine="loop"), episodes(), 1)
    assert (torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()) == before
