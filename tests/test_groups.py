"""Parameter groups by role: a partition, rates and decays where they belong, starts that are the pieces' own."""

import copy
import itertools
import math

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune

from adapterzoo import (
    MAP,
    SORA,
    AdaLoRA,
    AdaptedLinear,
    DoRA,
    FLoRA,
    Full,
    LoRA,
    PreDiag,
    adapt,
    adapted_layers,
    merge,
    param_groups,
    stages,
    unmerge,
)
from adapterzoo.errors import MergedError, TrainingError, UninitialisedError
from adapterzoo.pieces import Role, Wrapper

GENERATORS = [LoRA(r=2, alpha=6), AdaLoRA(r=3, alpha=6), FLoRA(r=(3, 2)), Full()]
WRAPPERS = [MAP, DoRA, PreDiag, lambda inner: SORA(inner, rank=2)]
ORDER = ["direction.input", "direction.output", "direction.dense", "core", "magnitude", "rotation", "other"]
SIX_DIGITS = 5e-6  # half a step of the sixth digit, over the smallest number that has six


class Model(nn.Module):
    """Two layers to adapt, of different shapes; a norm and a head."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.first = nn.Linear(8, 6, dtype=dtype)
        self.norm = nn.LayerNorm(6, dtype=dtype)
        self.second = nn.Linear(6, 5, dtype=dtype)
        self.head = nn.Linear(5, 3, dtype=dtype)

    def forward(self, x):
        return self.head(self.second(torch.relu(self.norm(self.first(x)))))


def adapted(spec, train=(), dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    model = Model(dtype)
    adapt(model, spec, ["first", "second"], train=train)
    return model


def perturb(model, seed=1):
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=gen, dtype=parameter.dtype))


def by_name(model, groups):
    """Every parameter's group, by the parameter's name; a parameter in two groups is an error."""
    names = {id(p): name for name, p in model.named_parameters()}
    pairs = [(names[id(p)], group) for group in groups for p in group["params"]]
    assert len(dict(pairs)) == len(pairs), "a parameter is in two groups"
    return dict(pairs)


def shape_of(model, groups):
    """What has to be the same for an optimiser's state to load."""
    names = {id(p): name for name, p in model.named_parameters()}
    rest = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    return rest, [[names[id(p)] for p in group["params"]] for group in groups]


def declared(model):
    """The role of every parameter of every adapter, by its name in the model."""
    return {
        f"{layer}.adapter.{'inner.' * depth}{name}": role
        for layer, module in adapted_layers(model).items()
        for depth, part in enumerate(module.adapter.parts())
        for name, role in part.roles.items()
        if role is not Role.BUFFER
    }


@pytest.mark.parametrize("generator", GENERATORS, ids=lambda spec: type(spec).__name__)
@pytest.mark.parametrize("scale_aware", [False, True])
def test_groups_partition_what_trains_by_the_declared_roles(generator, scale_aware):
    nests = [(), *((w,) for w in WRAPPERS), *itertools.product(WRAPPERS, WRAPPERS)]
    for nest in nests:
        spec = generator
        for wrapper in nest:
            spec = wrapper(spec)
        model = adapted(spec, train=["head", "norm"])
        groups = param_groups(model, 1e-3, scale_aware=scale_aware)
        where = by_name(model, groups)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert where.keys() == trained, repr(spec)
        roles = declared(model)
        assert roles.keys() == {name for name in trained if ".adapter." in name}
        for name, group in where.items():
            kind = group["name"].split(" x ")[0]
            assert kind == roles.get(name, "other" if name == "head.weight" else "other, no decay")
        kinds = [group["name"].split(" x ")[0].split(",")[0] for group in groups]
        assert kinds == sorted(kinds, key=ORDER.index)
        order = [name for name, _ in model.named_parameters()]
        for names in shape_of(model, groups)[1]:
            assert names
            assert names == sorted(names, key=order.index)
        assert len({group["name"] for group in groups}) == len(groups)
        assert all(type(group["name"]) is str for group in groups)
        torch.optim.AdamW(groups)


def test_every_number_reaches_its_group_and_no_other():
    torch.manual_seed(0)
    model = Model()
    adapt(model, targets={"first": MAP(SORA(FLoRA(r=2), rank=2)), "second": Full()}, train=["head", "norm"])
    groups = param_groups(
        model, 1.0, weight_decay=0.1, core_lr=2.0, magnitude_lr=3.0, rotation_lr=4.0, b_lr_ratio=5.0, other_lr=6.0,
        magnitude_weight_decay=0.2, rotation_weight_decay=0.3,
    )  # fmt: skip
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [
        ("direction.input", 1.0, 0.1),
        ("direction.output", 5.0, 0.1),
        ("direction.dense", 1.0, 0.1),
        ("core", 2.0, 0.1),
        ("magnitude", 3.0, 0.2),
        ("rotation", 4.0, 0.3),
        ("other", 6.0, 0.1),
        ("other, no decay", 6.0, 0.0),
    ]
    assert {g["lr"] for g in param_groups(model, 7.0)} == {7.0}
    assert {g["weight_decay"] for g in param_groups(model, 7.0)} == {0.0}
    zeros = param_groups(model, 1.0, core_lr=0.0, magnitude_lr=0, rotation_lr=0.0, other_lr=0.0)
    assert [g["lr"] for g in zeros] == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(("spec", "letter"), [(LoRA(r=2), "B"), (FLoRA(r=2), "A"), (AdaLoRA(r=2), "P")])
def test_lora_plus_goes_by_what_writes_the_output_not_by_a_letter(spec, letter):
    model = adapted(DoRA(spec), train=["head"])
    rates = {name: group["lr"] for name, group in by_name(model, param_groups(model, 0.01, b_lr_ratio=16)).items()}
    faster = {name for name, rate in rates.items() if rate == 0.16}
    assert faster == {f"{layer}.adapter.inner.{letter}" for layer in ("first", "second")}
    assert {rate for name, rate in rates.items() if name not in faster} == {0.01}


def test_what_trains_outside_adapters_decays_if_it_has_two_axes():
    model = adapted(LoRA(r=2), train=["head", "norm"])
    model.second.weight.requires_grad_(True)
    where = by_name(model, param_groups(model, 0.1, weight_decay=0.5, other_lr=0.2))
    outside = {name: group["weight_decay"] for name, group in where.items() if ".adapter." not in name}
    assert outside == {"head.weight": 0.5, "second.weight": 0.5, "head.bias": 0, "norm.weight": 0, "norm.bias": 0}
    assert all(where[name]["lr"] == 0.2 for name in outside)
    plain = param_groups(nn.Linear(3, 2), 0.1, scale_aware=True)
    assert [group["name"] for group in plain] == ["other", "other, no decay"]


def test_what_is_frozen_is_left_out():
    model = adapted(DoRA(LoRA(r=2)))
    model.first.adapter.requires_grad_(False)
    model.second.adapter.magnitude.requires_grad_(False)
    where = by_name(model, param_groups(model, 0.1, scale_aware=True))
    assert where.keys() == {"second.adapter.inner.A", "second.adapter.inner.B"}


def test_the_first_step_of_adam_is_as_large_for_each_magnitude_relative_to_its_start():
    model = adapted(MAP(PreDiag(DoRA(LoRA(r=2)))))
    start = {name: p.detach().clone() for name, p in model.named_parameters() if "alpha" in name or "magnitude" in name}
    for layer in adapted_layers(model).values():
        assert layer.adapter.alpha.item() == pytest.approx(layer.weight.norm().item(), rel=1e-12)
    perturb(model)  # gradients of all, and values that are no starts
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    lr = 1e-3
    optimiser = torch.optim.Adam(param_groups(model, 0.5, magnitude_lr=lr, scale_aware=True), eps=1e-30)
    model(torch.randn(7, 8, dtype=torch.float64)).square().mean().backward()
    optimiser.step()
    seen = set()
    for name, p in model.named_parameters():
        if ".adapter." not in name:
            continue
        moved = (p.detach() - before[name]).abs()
        leaf = name.rsplit(".", 1)[1]
        size = start[name].square().mean().sqrt().item() if leaf in ("alpha", "magnitude") else 1.0
        rate = 0.5 if leaf in "AB" else lr
        torch.testing.assert_close(moved, torch.full_like(moved, rate * size), rtol=SIX_DIGITS, atol=0, msg=name)
        seen.add(leaf)
    assert seen == {"alpha", "beta", "diag", "magnitude", "A", "B"}


def test_groups_are_the_same_late_and_again_and_state_loads_into_them():
    def groups_of(model):
        return param_groups(model, 0.01, weight_decay=0.1, b_lr_ratio=4, scale_aware=True)

    def train(model, optimiser, count):
        gen = torch.Generator().manual_seed(5)
        for _ in range(count):
            optimiser.zero_grad()
            model(torch.randn(4, 8, generator=gen, dtype=torch.float64)).square().mean().backward()
            optimiser.step()

    model = adapted(MAP(DoRA(LoRA(r=2))), train=["head"])
    early = shape_of(model, groups_of(model))
    optimiser = torch.optim.AdamW(groups_of(model))
    train(model, optimiser, 5)
    assert shape_of(model, groups_of(model)) == early
    again = adapted(MAP(DoRA(LoRA(r=2))), train=["head"])
    again.load_state_dict(model.state_dict())
    fresh = torch.optim.AdamW(groups_of(again))
    fresh.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    train(model, optimiser, 3)
    train(again, fresh, 3)
    assert all(p.equal(q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_equal_starts_share_a_group_and_six_digits_tell_them_apart():
    torch.manual_seed(0)
    block = nn.Linear(4, 4)
    model = nn.Sequential(*(copy.deepcopy(block) for _ in range(3)))
    with torch.no_grad():
        model[2].weight.mul_(1 + 1e-4)
    adapt(model, MAP(LoRA(r=2)))
    magnitudes = [group for group in param_groups(model, 1.0, scale_aware=True) if "magnitude" in group["name"]]
    size = block.weight.norm().item()
    assert [len(group["params"]) for group in magnitudes] == [2, 3, 1]  # two alphas, the betas, the third alpha
    assert [group["lr"] for group in magnitudes] == pytest.approx([size, 1, size * (1 + 1e-4)], rel=SIX_DIGITS)
    for group in magnitudes:  # what the name says is the rate, to the last digit
        assert group["name"] == f"magnitude x {group['lr']:.6g}"
        assert group["lr"] == float(group["name"].split(" x ")[1])


class Shift(Wrapper):
    """A magnitude that starts at zero: W' = (1 + s) W_inner."""

    roles = {"shift": Role.MAGNITUDE}  # noqa: RUF012

    def init(self, site):
        return {"shift": site.zeros(1)}

    def condition(self, inner, params, site):
        return inner.mix(1 + params.shift, 1 + params.shift)


def test_a_start_of_zero_takes_the_factor_one():
    model = adapted(Shift(LoRA(r=2)))
    assert [(g["name"], g["lr"]) for g in param_groups(model, 0.5, scale_aware=True)][-1] == ("magnitude x 1", 0.5)


def test_layers_behind_wrappers_are_found(tmp_path):
    model = adapted(MAP(LoRA(r=2)), train=["head"])
    expected = shape_of(model, param_groups(model, 0.1, scale_aware=True))
    compiled = torch.compile(model, backend="eager")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(model)
        for wrapped in (compiled, parallel, nn.ModuleDict({"a": model, "b": model})):
            assert shape_of(model, param_groups(wrapped, 0.1, scale_aware=True)) == expected
    finally:
        distributed.destroy_process_group()
    layer = model.first
    assert len(by_name(layer, param_groups(layer, 0.1, scale_aware=True))) == 4


def test_groups_survive_a_file_and_a_scheduler(tmp_path):
    model = adapted(MAP(LoRA(r=2)))
    optimiser = torch.optim.AdamW(param_groups(model, 0.1, b_lr_ratio=4, scale_aware=True))
    torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 0.5)
    assert [g["lr"] for g in optimiser.param_groups][:2] == [0.05, 0.2]
    torch.save(optimiser.state_dict(), tmp_path / "state")
    loaded = torch.load(tmp_path / "state", weights_only=True)
    assert [g["name"] for g in loaded["param_groups"]] == [g["name"] for g in optimiser.param_groups]


def test_while_stages_run_the_groups_are_the_same():
    model = adapted(MAP(LoRA(r=2)))
    expected = shape_of(model, param_groups(model, 0.1))
    with stages(model, torch.optim.SGD(param_groups(model, 0.1)), steps=1):
        assert not model.first.adapter.alpha.requires_grad
        assert shape_of(model, param_groups(model, 0.1)) == expected
    model.requires_grad_(False)
    with pytest.raises(TrainingError, match="nothing of this Model trains"):
        param_groups(model, 0.1)


NUMBERS = ["lr", "weight_decay", "core_lr", "magnitude_lr", "rotation_lr", "other_lr",
           "magnitude_weight_decay", "rotation_weight_decay", "b_lr_ratio"]  # fmt: skip


@pytest.mark.parametrize("field", NUMBERS)
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, True, "0.1", None])
def test_a_bad_number_is_named_with_its_value_and_range(field, value):
    numbers = {"lr": 0.1, field: value}
    if value is None and field.endswith("_lr"):
        param_groups(adapted(LoRA(r=2)), **numbers)
        return
    bound = "> 0" if field == "b_lr_ratio" else "≥ 0"
    with pytest.raises(TrainingError) as caught:
        param_groups(adapted(LoRA(r=2)), **numbers)
    assert f"{field}={value!r}: a finite number {bound}" in str(caught.value)


def test_a_ratio_of_zero_is_an_error_and_a_rate_of_zero_is_not():
    model = adapted(LoRA(r=2))
    with pytest.raises(TrainingError, match="b_lr_ratio=0: a finite number > 0"):
        param_groups(model, 0.1, b_lr_ratio=0)
    assert {group["lr"] for group in param_groups(model, 0)} == {0}


def test_a_parameter_with_two_uses_is_an_error_that_names_both():
    model = adapted(LoRA(r=2))
    model.head.weight = model.first.adapter.A
    with pytest.raises(TrainingError, match=r"first\.adapter\.A \(direction\.input\), head\.weight \(outside adapters"):
        param_groups(model, 0.1)
    model = adapted(SORA(LoRA(r=2), rank=2))
    model.first.adapter.C = model.first.adapter.inner.B
    with pytest.raises(TrainingError, match=r"first\.adapter\.C \(rotation\), first\.adapter\.inner\.B \(direction\.o"):
        param_groups(model, 0.1)
    model.first.adapter.C.requires_grad_(False)
    assert "first.adapter.D" in by_name(model, param_groups(model, 0.1))


def test_adapters_may_share_a_parameter_of_one_role():
    model = adapted(MAP(LoRA(r=2)))
    model.second.adapter.beta = model.first.adapter.beta
    where = by_name(model, param_groups(model, 0.1, scale_aware=True))
    assert where["first.adapter.beta"]["name"] == "magnitude x 1"
    model.second.adapter.alpha = model.first.adapter.alpha
    assert "first.adapter.alpha" in by_name(model, param_groups(model, 0.1))
    with pytest.raises(TrainingError, match="shared by layers where it starts at different sizes"):
        param_groups(model, 0.1, scale_aware=True)


def test_a_parameter_in_an_adapter_without_a_role_is_an_error():
    model = adapted(LoRA(r=2))
    model.first.adapter.extra = nn.Parameter(torch.zeros(2))
    with pytest.raises(TrainingError, match=r"first\.adapter\.extra is in an adapter and has no role"):
        param_groups(model, 0.1)
    model.first.adapter.extra.requires_grad_(False)
    assert len(by_name(model, param_groups(model, 0.1))) == 4
    model.first.adapter.gate = nn.Linear(2, 2)
    with pytest.raises(TrainingError, match=r"first\.adapter\.gate\.weight is in an adapter and has no role"):
        param_groups(model, 0.1)
    model = adapted(LoRA(r=2))
    prune.identity(model.first.adapter, "A")
    with pytest.raises(TrainingError, match=r"first\.adapter\.A was replaced by something else; undo pruning"):
        param_groups(model, 0.1)


def test_nothing_to_train_is_an_error():
    model = adapted(LoRA(r=2))
    model.requires_grad_(False)
    with pytest.raises(TrainingError, match=r"nothing of this Model trains; adapt\(model, spec\)"):
        param_groups(model, 0.1)


def test_a_merged_layer_trains_nothing():
    model = adapted(DoRA(LoRA(r=2)))
    expected = shape_of(model, param_groups(model, 0.1, scale_aware=True))
    perturb(model)
    merge(model)
    with pytest.raises(MergedError, match=r"(?s)unmerge these before training.*first.*second"):
        param_groups(model, 0.1)
    unmerge(model)
    assert shape_of(model, param_groups(model, 0.1, scale_aware=True)) == expected
    model.first.adapter.requires_grad_(False)
    model.first.merge(keep_base=False)  # for good; the other one trains on
    assert len(by_name(model, param_groups(model, 0.1, scale_aware=True))) == 3


def test_starts_need_a_base_weight_with_finite_values():
    with torch.device("meta"):
        model = Model()
    adapt(model, MAP(LoRA(r=2)), ["first", "second"])
    assert len(by_name(model, param_groups(model, 0.1))) == 8
    with pytest.raises(UninitialisedError, match="layer 'first'"):
        param_groups(model, 0.1, scale_aware=True)
    model = adapted(MAP(LoRA(r=2)))
    with torch.no_grad():
        model.second.weight[0, 0] = math.nan
    with pytest.raises(TrainingError, match=r"second\.adapter\.alpha would start at a size of nan"):
        param_groups(model, 0.1, scale_aware=True)


def test_an_adapter_alone_has_roles_but_no_start():
    layer = AdaptedLinear(nn.Linear(4, 3), MAP(LoRA(r=2)))
    assert [len(group["params"]) for group in param_groups(layer.adapter, 0.1)] == [1, 1, 2]
    with pytest.raises(TrainingError, match=r"(?s)scale_aware needs the adapted layers.*alpha"):
        param_groups(layer.adapter, 0.1, scale_aware=True)
