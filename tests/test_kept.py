"""What is kept between calls is never stale: with grad mode off the factors of the last call, while nothing changed."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim import optimizer

from adapterzoo import MAP, SORA, AdaLoRA, AdaptedLinear, DoRA, LoRA, adapt, disabled, kept, refresh

SPEC = DoRA(MAP(SORA(AdaLoRA(r=2, alpha=3))))


@pytest.fixture
def layer():
    torch.manual_seed(0)
    layer = AdaptedLinear(nn.Linear(4, 5), SPEC)
    with torch.no_grad():
        for parameter in layer.adapter.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer.eval()


@pytest.fixture
def builds(monkeypatch):
    """A list that grows with every build of factors."""
    made, original = [], AdaptedLinear.factored_weight
    monkeypatch.setattr(AdaptedLinear, "factored_weight", lambda self: made.append(self) or original(self))
    return made


X = torch.linspace(-1, 1, 12).view(3, 4)


def truth(layer):
    """From the values as they are now, without anything that is kept: a fresh layer."""
    fresh = AdaptedLinear(nn.Linear(4, 5, dtype=layer.weight.dtype), layer.spec)
    fresh.load_state_dict(layer.state_dict())
    return fresh(X.to(layer.weight.dtype)).detach()


def test_without_grad_the_factors_are_built_once(layer, builds):
    with torch.no_grad():
        outputs = [layer(X) for _ in range(3)]
    with torch.inference_mode():
        outputs.append(layer(X))
    assert len(builds) == 1
    for y in outputs:
        torch.testing.assert_close(y, truth(layer), rtol=1e-6, atol=1e-6)


def test_with_grad_they_are_built_at_every_call_in_evaluation_too(layer, builds):
    with torch.no_grad():
        layer(X)
    for _ in range(2):
        builds.clear()
        layer.zero_grad()
        layer(X).square().sum().backward()
        assert len(builds) == 1
        assert all(parameter.grad is not None for parameter in layer.adapter.parameters())
    training = copy.deepcopy(layer).train()
    training.zero_grad()
    training(X).square().sum().backward()
    for mine, true in zip(layer.adapter.parameters(), training.adapter.parameters(), strict=True):
        assert torch.equal(mine.grad, true.grad)


def step(optimiser, **options):
    def change(layer):
        for parameter in layer.adapter.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimiser(layer.adapter.parameters(), lr=0.1, **options).step()

    return change


def write(layer):
    with torch.no_grad():
        layer.adapter.inner.alpha.mul_(2)


def replace(layer):
    layer.adapter.magnitude = nn.Parameter(2 * layer.adapter.magnitude.detach())


def swap_data(layer):
    layer.adapter.magnitude.data = 2 * layer.adapter.magnitude.detach()


def mask(layer):
    layer.adapter.generator.mask[0] = 0


def load(layer):
    layer.load_state_dict({name: 1.5 * value for name, value in layer.state_dict().items()})


def load_adapter_alone(layer):
    layer.adapter.load_state_dict({name: 1.5 * value for name, value in layer.adapter.state_dict().items()})


def load_assigned(layer):
    layer.load_state_dict({name: 1.5 * value for name, value in layer.state_dict().items()}, assign=True)


def write_behind_autograd(layer):
    layer.adapter.magnitude.data.mul_(2)
    layer.weight.data.mul_(2)
    refresh(layer)


def change_base(layer):
    with torch.no_grad():
        layer.weight.mul_(2)


def through_modes(layer):
    layer.adapter.magnitude.data.mul_(2)
    layer.train().eval()


CHANGES = {
    "fused AdamW": step(torch.optim.AdamW, fused=True),
    "foreach AdamW": step(torch.optim.AdamW, foreach=True),
    "SGD": step(torch.optim.SGD),
    **{
        change.__name__: change
        for change in (write, replace, swap_data, mask, load, load_adapter_alone, load_assigned, write_behind_autograd,
                       change_base, through_modes)
    },
    "double": lambda layer: layer.double(),
    "reset": lambda layer: layer.reset(seed=5),
    "unmerged": lambda layer: (layer.merge(), layer.unmerge()),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_is_seen(layer, change, builds):
    with torch.no_grad():
        layer(X)
    before = truth(layer)
    change(layer)
    builds.clear()
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(layer(X.to(layer.weight.dtype)), truth(layer), rtol=1e-5, atol=1e-6)
    assert sum(made is layer for made in builds) == (2 if change is replace else 1)  # a new one is bound by refresh
    if change not in (CHANGES["unmerged"], CHANGES["double"]):
        assert not torch.allclose(truth(layer), before)


def test_a_step_of_any_optimiser_drops_them_and_no_step_does_not(layer, builds):
    other = nn.Parameter(torch.ones(1))
    other.grad = torch.ones(1)
    optimiser = torch.optim.SGD([other], lr=0.1)
    with torch.no_grad():
        layer(X)
        layer(X)
        assert len(builds) == 1
        optimiser.step()
        layer(X)
        layer(X)
        assert len(builds) == 2


def test_evaluation_between_training_steps_follows_training(layer):
    """Fused AdamW leaves versions as they were: the step itself is noted."""
    optimiser = torch.optim.AdamW(layer.adapter.parameters(), lr=0.1, fused=True)
    for _ in range(3):
        layer(X).square().sum().backward()
        optimiser.step()
        with torch.no_grad():
            torch.testing.assert_close(layer(X), truth(layer), rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on the way to a compiled optimiser
def test_a_compiled_optimiser_step_is_noted_and_compiled_once(layer):
    torch.compiler.reset()
    optimiser = torch.optim.SGD(layer.adapter.parameters(), lr=torch.tensor(0.1))
    compiled = torch.compile(optimiser.step, backend="aot_eager")
    for calls in range(4):
        with torch._dynamo.config.patch(error_on_recompile=calls > 0):
            layer(X).square().sum().backward()
            compiled()
            with torch.no_grad():
                torch.testing.assert_close(layer(X), truth(layer), rtol=1e-6, atol=1e-6)
    torch.compiler.reset()


def test_nothing_is_kept_of_what_is_not_the_layers_own(layer, builds):
    values = {name: value.detach().clone() for name, value in layer.state_dict().items()}
    with torch.no_grad():
        layer(X)
        for factor in (2.0, 3.0):
            scaled = {**values, "adapter.magnitude": factor * values["adapter.magnitude"]}
            y = torch.func.functional_call(layer, scaled, (X,))
            torch.testing.assert_close(y - layer.bias, factor * (truth(layer) - layer.bias), rtol=1e-5, atol=1e-6)
        builds.clear()
        torch.testing.assert_close(layer(X), truth(layer), rtol=1e-6, atol=1e-6)
        assert [made for made in builds if made is layer] == []  # what was kept before is there still
        stacked = {name: torch.stack([value, 2 * value]) for name, value in values.items()}
        both = torch.func.vmap(lambda p: torch.func.functional_call(layer, p, (X,)))(stacked)
        torch.testing.assert_close(both[0], truth(layer), rtol=1e-5, atol=1e-6)


def test_parameters_of_someone_else_are_not_kept_either(layer, builds):
    values = {name: nn.Parameter(value.clone()) for name, value in layer.adapter.state_dict().items() if name != "mask"}
    values = {f"adapter.{name}": value for name, value in values.items() if not name.endswith("mask")}
    with torch.no_grad():
        for _ in range(2):
            torch.func.functional_call(layer, values, (X,))
    assert len(builds) == 2


@pytest.mark.parametrize("spec", [LoRA(r=2), DoRA(LoRA(r=2))], ids=repr)
def test_a_trace_leaves_nothing_behind_and_takes_nothing_along(spec):
    """Fake tensors must not be found by a later call, nor kept factors become constants of a trace."""
    layer = AdaptedLinear(nn.Linear(4, 5), spec).eval()
    with torch.no_grad():
        layer.adapter.generator.B.normal_()
        traced = make_fx(lambda x: layer(x), tracing_mode="fake", _allow_non_fake_inputs=True)(X)
        torch.testing.assert_close(layer(X), truth(layer))
        traced = make_fx(lambda values, x: torch.func.functional_call(layer, values, (x,)))(layer.state_dict(), X)
        layer.adapter.generator.B.mul_(2)
        torch.testing.assert_close(traced(layer.state_dict(), X), truth(layer))


def test_inference_tensors_are_not_kept(builds):
    """They have no version to check."""
    with torch.inference_mode():
        layer = AdaptedLinear(nn.Linear(4, 5), SPEC).eval()
        before = layer(X) - layer.bias
        layer.adapter.magnitude.mul_(2)
        builds.clear()
        for _ in range(2):
            torch.testing.assert_close(layer(X) - layer.bias, 2 * before, rtol=1e-5, atol=1e-6)
        assert len(builds) == 2


def test_copies_and_pickles_start_without(layer, builds):
    with torch.no_grad():
        y = layer(X)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            builds.clear()
            torch.testing.assert_close(other(X), y)
            assert len(builds) == 1
            other.adapter.magnitude.mul_(2)
            assert not torch.allclose(other(X), y)
        torch.testing.assert_close(layer(X), y)


def test_disabled_and_merged_layers_go_by_themselves(layer):
    base = nn.functional.linear(X, layer.weight, layer.bias)
    with torch.no_grad():
        y = layer(X)
        with disabled(layer):
            assert torch.equal(layer(X), base)
        layer.merge()
        torch.testing.assert_close(layer(X), y)


def test_a_model_evaluates_with_what_it_kept_and_trains_on(builds):
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    adapt(model, DoRA(LoRA(r=2)), targets="all-linear")
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model.train()(X).square().sum().backward()
        optimiser.step()
        model.eval()
        builds.clear()
        with torch.no_grad():
            for _ in range(3):
                y = model(X)
        assert len(builds) == 2
        torch.testing.assert_close(y, copy.deepcopy(model)(X).detach())


def test_the_hook_on_optimisers_is_one_for_the_process(layer):
    with torch.no_grad():
        layer(X)
        copy.deepcopy(layer)(X)
    notes = [hook for hook in optimizer._global_optimizer_post_hooks.values() if hook == kept._STEPS._note]
    assert len(notes) == 1


def test_masks_may_be_stacked_alone():
    layer, masks = AdaptedLinear(nn.Linear(4, 5), AdaLoRA(r=2)), torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    with torch.no_grad():
        layer.adapter.lam.fill_(3)

        def call(mask):
            return torch.func.functional_call(layer, {"adapter.mask": mask}, (X,))

        torch.testing.assert_close(torch.func.vmap(call)(masks), torch.stack([call(mask) for mask in masks]))


def test_what_is_kept_holds_no_graph(layer):
    with torch.no_grad():
        layer(X)
    assert not layer._factors._kept[-1].U.requires_grad


def test_norms_taken_in_inference_mode_serve_training():
    layer = AdaptedLinear(nn.Linear(4, 5), DoRA(DoRA(LoRA(r=2), detach_norm=False), detach_norm=False))
    layer.refresh()
    with torch.inference_mode():
        layer.factored_weight()
    layer(X).sum().backward()


def test_a_merge_in_inference_mode_leaves_an_ordinary_weight(layer):
    with torch.inference_mode():
        layer.merge()
    assert not layer.weight.is_inference()


@pytest.mark.filterwarnings("ignore::adapterzoo.errors.UnfrozenBaseWarning")
def test_norms_of_a_weight_that_a_fused_optimiser_trained_are_dropped(layer):
    layer.factored_weight()
    layer.weight.requires_grad_().grad = torch.ones_like(layer.weight)
    layer.factored_weight()
    torch.optim.AdamW([layer.weight], lr=0.5, fused=True).step()
    layer.weight.requires_grad_(False)
    torch.testing.assert_close(layer.factored_weight().base.row_norms_sq(), layer.weight.double().square().sum(dim=1))


def test_a_reset_sees_what_was_written_behind_autograd(layer):
    layer.factored_weight()
    layer.weight.data.mul_(2)
    layer.reset()
    torch.testing.assert_close(layer.adapter.magnitude, layer.weight.norm(dim=1), check_dtype=False)


def test_storage_that_takes_the_place_of_another_is_not_taken_for_it():
    """Two replacements of `.data` with no call between: the second may get the address of the first's predecessor."""
    for _ in range(20):
        layer = AdaptedLinear(nn.Linear(64, 64), DoRA(LoRA(r=4))).eval()
        x = torch.randn(3, 64)
        for tensor in (layer.weight, layer.adapter.magnitude):
            with torch.no_grad():
                layer(x)
                tensor.data = 2 * tensor.data
                tensor.data = 1.5 * tensor.data
                assert torch.equal(layer(x), copy.deepcopy(layer)(x))
