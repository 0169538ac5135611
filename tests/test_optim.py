"""The optimizers against their equations written out with plain vectors, against pytorch_optimizer, and in use."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import pytorch_optimizer
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewshot_asam import FewShotError
from fewshot_asam.optim import SAM, AgnosticSAM, FriendlySAM
from fewshot_asam.optim.sharpness_aware import SharpnessAware

SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
DRAWS = torch.Generator().manual_seed(0)
BATCHES = [
    (torch.randn(n, 4, generator=DRAWS, dtype=torch.float64), torch.randint(3, (n,), generator=DRAWS))
    for n in (16, 4) * 5
]
TRAIN, VAL = BATCHES[::2], BATCHES[1::2]
KINDS = [SAM, FriendlySAM, AgnosticSAM]


def net(*layers: nn.Module) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), *layers, nn.Tanh(), nn.Linear(5, 3)).double()


def closure(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], scale: Any = None) -> Any:
    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch[0]).double(), batch[1])
        (loss if scale is None else scale.scale(loss)).backward()
        return loss

    return evaluate


def closures(model: nn.Module, optimizer: SharpnessAware, number: int, scale: Any = None) -> list[Any]:
    batches = [TRAIN[number], VAL[number]] if isinstance(optimizer, AgnosticSAM) else [TRAIN[number]]
    return [closure(model, optimizer, batch, scale) for batch in batches]


def trained(model: nn.Module, optimizer: SharpnessAware, numbers: Any = range(5), scale: Any = None) -> Tensor:
    for number in numbers:
        optimizer.step(*closures(model, optimizer, number, scale))
    return flat(model)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def written_out(perturbation: Callable[[int, Tensor, Callable[..., Tensor]], Tensor]) -> Tensor:
    """Five steps of SGD with momentum and decay, whose gradient is taken at the weights plus the perturbation."""
    model = net()
    theta, velocity = flat(model), torch.zeros(())

    def grad(at: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        nn.utils.vector_to_parameters(at, model.parameters())
        loss = F.cross_entropy(model(batch[0]), batch[1])
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    for number in range(5):
        direction = grad(theta + perturbation(number, theta, grad), TRAIN[number]) + 0.01 * theta
        velocity = 0.9 * velocity + direction
        theta = theta - 0.1 * velocity
    return theta


def toward(vector: Tensor, rho: float, theta: Tensor, adaptive: bool) -> Tensor:
    scale = theta.abs() if adaptive else torch.ones_like(theta)
    return rho * scale**2 * vector / (scale * vector).norm()


@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_is_its_equation(adaptive: bool) -> None:
    model = net()
    found = trained(model, SAM(model.parameters(), torch.optim.SGD, 0.2, adaptive=adaptive, **SGD))
    expected = written_out(lambda i, theta, grad: toward(grad(theta, TRAIN[i]), 0.2, theta, adaptive))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("adaptive", [False, True])
def test_friendly_sam_is_its_equation(adaptive: bool) -> None:
    """With sigma 1 it is the direction of the paper too, `g - m` with `g` already in `m`, from the second step on."""
    average: list[Tensor] = []

    def perturbation(i: int, theta: Tensor, grad: Callable[..., Tensor]) -> Tensor:
        g = grad(theta, TRAIN[i])
        average.append(g if not average else 0.8 * average[-1] + 0.2 * g)
        return toward(g - average[-1] if i else g, 0.2, theta, adaptive)

    model = net()
    optimizer = FriendlySAM(model.parameters(), torch.optim.SGD, 0.2, beta=0.8, adaptive=adaptive, **SGD)
    torch.testing.assert_close(trained(model, optimizer), written_out(perturbation), rtol=0, atol=1e-13)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_agnostic_sam_is_equations_4_to_6(adaptive: bool, momentum: float) -> None:
    memory = torch.zeros(())

    def perturbation(i: int, theta: Tensor, grad: Callable[..., Tensor]) -> Tensor:
        nonlocal memory
        ascended = theta + toward(grad(theta, VAL[i]), 0.1, theta, adaptive)
        memory = momentum * memory + (1 - momentum) * grad(ascended, VAL[i])
        train = toward(grad(theta, TRAIN[i]), 0.2, theta, adaptive)
        return train - toward(memory, 0.1, theta, adaptive)

    model = net()
    optimizer = AgnosticSAM(model.parameters(), torch.optim.SGD, 0.1, val_momentum=momentum, adaptive=adaptive, **SGD)
    torch.testing.assert_close(trained(model, optimizer), written_out(perturbation), rtol=0, atol=1e-14)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize(
    ("ours", "theirs", "options", "their_options"),
    [
        (SAM, pytorch_optimizer.SAM, {}, {}),
        (FriendlySAM, pytorch_optimizer.FriendlySAM, {"sigma": 0.7, "beta": 0.8}, {"sigma": 0.7, "lmbda": 0.8}),
    ],
)
def test_pytorch_optimizer_has_the_same_rule(
    ours: Any, theirs: Any, options: dict[str, float], their_options: dict[str, float], adaptive: bool
) -> None:
    """Up to its norm, which it computes in single precision."""
    model, other = net(), net()
    found = trained(model, ours(model.parameters(), torch.optim.SGD, 0.2, adaptive=adaptive, **options, **SGD))
    optimizer = theirs(other.parameters(), torch.optim.SGD, rho=0.2, adaptive=adaptive, **their_options, **SGD)
    for batch in TRAIN:
        evaluate = closure(other, optimizer, batch)
        evaluate()
        optimizer.step(evaluate)
    torch.testing.assert_close(found, flat(other), rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_a_radius_of_zero_is_the_base_optimizer(kind: type[SharpnessAware]) -> None:
    model, plain = net(), net()
    adam = torch.optim.Adam(plain.parameters(), lr=0.01)
    for batch in TRAIN:
        adam.step(closure(plain, adam, batch))
    found = trained(model, kind(model.parameters(), torch.optim.Adam, rho=0.0, lr=0.01))  # type: ignore[call-arg]
    assert torch.equal(found, flat(plain))


def test_a_group_has_a_radius_of_its_own_and_all_share_the_norm() -> None:
    model = net()
    layers = [{"params": model[0].parameters(), "rho": 0.0, "lr": 0.0}, {"params": model[2].parameters()}]
    optimizer = SAM(layers, torch.optim.SGD, 0.2, lr=0.1)
    evaluate = closure(model, optimizer, TRAIN[0])
    evaluate()
    before, grads = [p.detach().clone() for p in model.parameters()], [p.grad.clone() for p in model.parameters()]
    optimizer.first_step()
    moved = [p.detach() - old for p, old in zip(model.parameters(), before, strict=True)]
    norm = torch.cat([g.flatten() for g in grads]).norm()
    assert not moved[0].any()
    torch.testing.assert_close(moved[2], 0.2 * grads[2] / norm)
    evaluate()
    optimizer.second_step()
    assert torch.equal(model[0].weight, before[0])
    assert not torch.equal(model[2].weight, before[2])


def test_schedulers_and_new_groups_reach_the_base_optimizer() -> None:
    model, extra = net(), nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = AgnosticSAM(model.parameters(), torch.optim.SGD, rho=0.1, rho2=0.3, **SGD)
    optimizer.add_param_group({"params": [extra], "rho": 0.7})
    assert (optimizer.param_groups[1]["rho"], optimizer.param_groups[1]["rho2"]) == (0.7, 0.3)
    assert optimizer.base.param_groups[1]["momentum"] == 0.9
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    trained(model, optimizer, [0])
    schedule.step()
    assert [group["lr"] for group in optimizer.base.param_groups] == [0.05, 0.05]
    before = flat(model)
    for group in optimizer.param_groups:
        group["lr"] = group["weight_decay"] = group["momentum"] = 0.0
    assert torch.equal(trained(model, optimizer, [1]), before)


def test_an_optimizer_that_is_made_already_is_taken() -> None:
    model, other = net(), net()
    base = torch.optim.SGD(model.parameters(), **SGD)
    found = trained(model, SAM(base.param_groups, base, 0.2))
    assert torch.equal(found, trained(other, SAM(other.parameters(), torch.optim.SGD, 0.2, **SGD)))
    with pytest.raises(FewShotError, match="made of other parameters"):
        SAM(other.parameters(), base)
    with pytest.raises(FewShotError, match="lr is given, but the base optimizer is made already"):
        SAM(model.parameters(), base, lr=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_goes_into_a_file_and_a_fresh_optimizer(kind: type[SharpnessAware]) -> None:
    model, other = net(), net()
    optimizer = kind(model.parameters(), torch.optim.Adam, lr=0.01)  # type: ignore[call-arg]
    trained(model, optimizer, range(2))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    expected = trained(model, optimizer, range(2, 5))
    stored = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    other.load_state_dict(stored["model"])
    fresh = kind(other.parameters(), torch.optim.Adam, lr=0.5, rho=9.0)  # type: ignore[call-arg]
    fresh.load_state_dict(stored["optimizer"])
    assert fresh.param_groups[0] is fresh.base.param_groups[0]
    assert torch.equal(trained(other, fresh, range(2, 5)), expected)
    own = {name for values in stored["optimizer"]["state"].values() for name in values}
    assert own == {SAM: set(), FriendlySAM: {"average"}, AgnosticSAM: {"val_momentum"}}[kind]  # type: ignore[index]


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_goes_on_like_the_original(kind: type[SharpnessAware]) -> None:
    model = net()
    optimizer = kind(model.parameters(), torch.optim.SGD, **SGD)  # type: ignore[call-arg]
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    trained(model, optimizer, range(2))
    other, twin = copy.deepcopy((model, optimizer))
    expected = trained(model, optimizer, range(2, 5))
    assert torch.equal(trained(other, twin, range(2, 5)), expected)


def by_hand(model: nn.Module, optimizer: SharpnessAware) -> Iterator[Callable[[bool], None]]:
    """Computes each gradient of the explicit form and gives the method that is due."""
    agnostic = isinstance(optimizer, AgnosticSAM)
    for batch, name in zip("tvvt" if agnostic else "tt", ("first", "second", "third", "fourth"), strict=False):
        images, labels = (TRAIN if batch == "t" else VAL)[0]
        F.cross_entropy(model(images), labels).backward()
        yield getattr(optimizer, f"{name}_step")


@pytest.mark.parametrize("kind", KINDS)
def test_the_explicit_form_is_the_same(kind: type[SharpnessAware]) -> None:
    model, other = net(nn.BatchNorm1d(5)), net(nn.BatchNorm1d(5))
    optimizers = [kind(one.parameters(), torch.optim.SGD, **SGD) for one in (model, other)]  # type: ignore[call-arg]
    schedule = torch.optim.lr_scheduler.StepLR(optimizers[1], 1)
    trained(model, optimizers[0], [0])
    for method in by_hand(other, optimizers[1]):
        method(True)
    schedule.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert not torch.equal(flat(model), flat(net()))


def test_methods_out_of_order_put_the_weights_back() -> None:
    model = net()
    before = flat(model)
    optimizer = AgnosticSAM(model.parameters(), torch.optim.SGD, lr=0.1)
    methods = by_hand(model, optimizer)
    next(methods)(True)
    next(methods)(True)
    assert not torch.equal(flat(model), before)
    with pytest.raises(FewShotError, match="fourth_step was called where third_step is due"):
        optimizer.fourth_step()
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize(("kind", "passes"), [(SAM, 2), (FriendlySAM, 2), (AgnosticSAM, 4)])
def test_an_exception_in_any_pass_puts_everything_back(kind: type[SharpnessAware], passes: int) -> None:
    """KeyboardInterrupt too; and the step can be made again."""
    model, undisturbed = net(nn.BatchNorm1d(5)), net(nn.BatchNorm1d(5))
    optimizer = kind(model.parameters(), torch.optim.SGD, **SGD)  # type: ignore[call-arg]
    for last in range(passes):
        called = 0

        def failing(evaluate: Callable[[], Tensor]) -> Callable[[], Tensor]:
            def work() -> Tensor:
                nonlocal called
                called += 1
                loss = evaluate()
                if called > last:  # noqa: B023
                    raise KeyboardInterrupt
                return loss

            return work

        before = flat(model)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step(*map(failing, closures(model, optimizer, 0)))
        assert called == last + 1
        assert torch.equal(flat(model), before)
        assert all(layer.track_running_stats for layer in model if isinstance(layer, nn.BatchNorm1d))
    model.load_state_dict(undisturbed.state_dict())
    fresh = kind(undisturbed.parameters(), torch.optim.SGD, **SGD)  # type: ignore[call-arg]
    assert torch.equal(trained(model, optimizer), trained(undisturbed, fresh))


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_running_statistics_move_once_a_step(kind: type[SharpnessAware], wrapped: bool) -> None:
    """By the training batch at the weights before the step; through a wrapper too, whose layers are called by it."""
    model, plain = net(nn.BatchNorm1d(5)), net(nn.BatchNorm1d(5))
    plain(TRAIN[0][0])

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.inner:
                x = layer.forward(x)  # as compiled code does, without the hooks of the layers themselves
            return x

    called = Wrapper() if wrapped else model
    optimizer = kind(model.parameters(), torch.optim.SGD, rho=0.5, **SGD)  # type: ignore[call-arg]
    trained(called, optimizer, [0])
    expected = plain[1].state_dict()
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(model[1].state_dict()[name], expected[name])
    assert model[1].track_running_stats


def test_layers_in_eval_mode_keep_to_their_statistics() -> None:
    model = net(nn.BatchNorm1d(5))
    model.eval()
    assert isinstance(model[1].running_mean, Tensor)
    model[1].running_mean += 1
    frozen = nn.Sequential(model[0], nn.Linear(5, 5, bias=False).double(), *list(model)[2:])
    norm = model[1]
    with torch.no_grad():
        frozen[1].weight.copy_(torch.diag((norm.running_var + norm.eps).rsqrt()))
        model[0].bias += 1  # what the statistics take away again
    twin = copy.deepcopy(frozen)
    with torch.no_grad():
        twin[0].bias -= 1
    for own in (*norm.parameters(), *twin[1].parameters()):
        own.requires_grad_(False)
    found = trained(model, SAM([p for p in model.parameters() if p.requires_grad], torch.optim.SGD, lr=0.1), [0])
    trained(twin, SAM([p for p in twin.parameters() if p.requires_grad], torch.optim.SGD, lr=0.1), [0])
    assert len(found)
    torch.testing.assert_close(model[3].weight, twin[3].weight)


@pytest.mark.parametrize(("kind", "passes"), [(SAM, 2), (FriendlySAM, 2), (AgnosticSAM, 4)])
def test_a_scaler_leaves_out_the_whole_step_of_an_overflow(kind: type[SharpnessAware], passes: int) -> None:
    model, plain = net(), net()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=10**6)
    optimizer = kind(model.parameters(), torch.optim.SGD, scaler=scaler, **SGD)  # type: ignore[call-arg]
    unscaled = kind(plain.parameters(), torch.optim.SGD, **SGD)  # type: ignore[call-arg]
    for number in range(2):
        trained(model, optimizer, [number], scaler)
        scaler.update()
    torch.testing.assert_close(flat(model), trained(plain, unscaled, range(2)), rtol=0, atol=1e-13)
    for overflow in range(passes):
        before, state, scale, called = flat(model), copy.deepcopy(optimizer.state_dict()), scaler.get_scale(), 0

        def spoilt(evaluate: Callable[[], Tensor]) -> Callable[[], Tensor]:
            def work() -> Tensor:
                nonlocal called
                loss = evaluate()
                if called == overflow:  # noqa: B023
                    model[0].weight.grad.fill_(float("inf"))
                called += 1
                return loss

            return work

        optimizer.step(*map(spoilt, closures(model, optimizer, 2, scaler)))
        scaler.update()
        assert scaler.get_scale() == scale / 2
        assert torch.equal(flat(model), before)
        torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)
    found = trained(model, optimizer, [2], scaler)
    torch.testing.assert_close(found, trained(plain, unscaled, [2]), rtol=0, atol=1e-13)


def test_the_explicit_form_leaves_out_a_step_after_an_overflow_too() -> None:
    model = net()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = SAM(model.parameters(), torch.optim.SGD, scaler=scaler, lr=0.1)
    before = flat(model)
    evaluate = closure(model, optimizer, TRAIN[0], scaler)
    evaluate()
    model[0].weight.grad.fill_(float("nan"))
    optimizer.first_step()
    evaluate()
    optimizer.second_step()
    scaler.update()
    assert scaler.get_scale() == 2
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_scaler_a_gradient_that_is_not_finite_reaches_the_base(kind: type[SharpnessAware]) -> None:
    """As with PyTorch's own optimizers; nothing of the perturbation stays in other weights."""
    model = net()
    optimizer = kind(model.parameters(), torch.optim.SGD, lr=0.0)  # type: ignore[call-arg]
    before, calls = flat(model), []

    def spoilt(evaluate: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def work() -> Tensor:
            loss = evaluate()
            calls.append(evaluate)
            if len(calls) == (4 if kind is AgnosticSAM else 2):
                model[0].bias.grad[0] = float("nan")
            return loss

        return work

    optimizer.step(*map(spoilt, closures(model, optimizer, 0)))
    assert model[0].bias[0].isnan()
    assert (flat(model) == before).sum() == len(before) - 1


def test_half_precision_has_a_perturbation_of_the_right_length() -> None:
    """The norm is added up in single precision: 100,000 squares of 0.001 are too small for 16 bits."""
    for dtype in (torch.bfloat16, torch.float16):
        weight = nn.Parameter(torch.zeros(100_000, dtype=dtype))
        optimizer = SAM([weight], torch.optim.SGD, rho=100.0, lr=0.0)
        weight.grad = torch.full_like(weight, 1e-3)
        optimizer.first_step()
        assert weight.detach().float().norm().item() == pytest.approx(100, rel=0.01)
        optimizer.restore()
        assert not weight.any()


def test_autocast_trains() -> None:
    model = net().float()
    optimizer = AgnosticSAM(model.parameters(), torch.optim.SGD, **SGD)
    batch, val = [(images.float(), labels) for images, labels in (TRAIN[0], VAL[0])]

    def evaluate(images: Tensor, labels: Tensor) -> Tensor:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(images).float(), labels)
        loss.backward()
        return loss

    losses = [optimizer.step(lambda: evaluate(*batch), lambda: evaluate(*val)).item() for _ in range(20)]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_that_are_accumulated_are_those_of_the_whole_batch(kind: type[SharpnessAware]) -> None:
    model, other = net(), net()
    optimizer = kind(other.parameters(), torch.optim.SGD, **SGD)  # type: ignore[call-arg]
    expected = trained(model, kind(model.parameters(), torch.optim.SGD, **SGD), range(2))  # type: ignore[call-arg]

    def in_parts(batch: tuple[Tensor, Tensor]) -> Callable[[], Tensor]:
        def evaluate() -> Tensor:
            optimizer.zero_grad()
            total = torch.zeros((), dtype=torch.float64)
            for images, labels in zip(batch[0].chunk(4), batch[1].chunk(4), strict=True):
                loss = F.cross_entropy(other(images), labels) / 4
                loss.backward()
                total += loss.detach()
            return total

        return evaluate

    for number in range(2):
        batches = [TRAIN[number], VAL[number]] if kind is AgnosticSAM else [TRAIN[number]]
        loss = optimizer.step(*map(in_parts, batches))
    torch.testing.assert_close(flat(other), expected, rtol=0, atol=1e-14)
    assert loss.item() == pytest.approx(closures(model, optimizer, 1)[0]().item(), rel=0.2)


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    model, unused = net(), nn.Parameter(torch.ones(3, dtype=torch.float64))
    frozen = nn.Parameter(torch.ones(2, dtype=torch.float64), requires_grad=False)
    everything = [unused, *model.parameters(), frozen]
    found = trained(model, AgnosticSAM(everything, torch.optim.SGD, **SGD))
    other = net()
    assert torch.equal(found, trained(other, AgnosticSAM(other.parameters(), torch.optim.SGD, **SGD)))
    assert torch.equal(unused, torch.ones(3))


@pytest.mark.parametrize(("kind", "train", "val"), [(SAM, 2, 0), (FriendlySAM, 2, 0), (AgnosticSAM, 2, 2)])
def test_a_step_costs_so_many_gradients(kind: type[SharpnessAware], train: int, val: int) -> None:
    model = net()
    optimizer = kind(model.parameters(), torch.optim.SGD, lr=0.1)  # type: ignore[call-arg]
    calls = [0, 0]

    def counted(position: int, evaluate: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def work() -> Tensor:
            calls[position] += 1
            return evaluate()

        return work

    before = closures(model, optimizer, 0)[0]().item()
    loss = optimizer.step(*(counted(i, one) for i, one in enumerate(closures(model, optimizer, 0))))
    assert calls == [train, val]
    assert loss.item() == before, "the loss is that at the weights before the step"


def test_bad_input_is_one_line() -> None:
    model = net()
    with pytest.raises(FewShotError, match="rho is -1; expected a finite radius of at least 0"):
        SAM(model.parameters(), torch.optim.SGD, rho=-1, lr=0.1)
    with pytest.raises(FewShotError, match="rho1 is nan"):
        AgnosticSAM([{"params": model.parameters(), "rho1": float("nan")}], torch.optim.SGD, lr=0.1)
    with pytest.raises(FewShotError, match="val_momentum is 1; expected at least 0 and below 1"):
        AgnosticSAM(model.parameters(), torch.optim.SGD, val_momentum=1, lr=0.1)
    with pytest.raises(FewShotError, match="beta is 2"):
        FriendlySAM(model.parameters(), torch.optim.SGD, beta=2, lr=0.1)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(FewShotError, match="expected state, param_groups and base_state, as state_dict of SAM gives"):
        SAM(model.parameters(), torch.optim.SGD, lr=0.1).load_state_dict(base.state_dict())
    table = nn.Embedding(4, 2, sparse=True)
    optimizer = SAM(table.parameters(), torch.optim.SGD, lr=0.1)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(FewShotError, match="a gradient is sparse"):
        optimizer.first_step()
