"""Frozen matrices that layers share: one tensor in memory, one in a file, and no model disturbs another."""

import copy
import gc
import json

import pytest
import torch
from safetensors import safe_open
from torch import nn

import adapterzoo as az
from adapterzoo import VeRA, adapted_layers
from adapterzoo.checkpoint.manifest import digest_of_description
from adapterzoo.errors import CheckpointError
from adapterzoo.shared import SHARED, Pool


def net(wide=12):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, wide), nn.Linear(wide, 6)).double()


def adapted(seed=0, spec=VeRA(r=5), wide=12):
    model = net(wide)
    az.adapt(model, spec, seed=seed)
    return perturbed(model)


def perturbed(model):
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            for value in layer.adapter.parameters():
                value.add_(torch.randn(value.shape, generator=draw, dtype=value.dtype))
    return model


def shared(model):
    """Every shared tensor's address, by name."""
    layers = adapted_layers(model).items()
    return {f"{n}.{key}": getattr(layer.adapter.generator, key) for n, layer in layers for key in ("A", "B")}


def is_one(model):
    """Whether equal shared tensors are one, and there are as few as shapes."""
    values = list(shared(model).values())
    return len({id(value) for value in values}) == len({value.shape for value in values})


def test_layers_of_one_shape_hold_one_tensor_and_larger_ones_begin_like_smaller_ones():
    model = adapted()
    own = shared(model)
    assert is_one(model)
    assert own["1.A"] is own["2.A"]
    assert own["0.B"] is own["1.B"] is own["3.B"]
    torch.testing.assert_close(own["2.B"][:6], own["0.B"])
    torch.testing.assert_close(own["3.A"][:, :8] * (12 / 8) ** 0.5, own["0.A"])
    x = torch.randn(3, 8, dtype=torch.float64)
    d, b = (adapted_layers(model)["0"].adapter.get_parameter(name) for name in "db")
    W = model[0].weight + b[:, None] * own["0.B"] @ (d[:, None] * own["0.A"])
    torch.testing.assert_close(model[0](x), x @ W.T + model[0].bias)


def test_another_seed_has_others():
    first, second = shared(adapted()), shared(adapted(seed=1))
    assert all(not first[name].equal(second[name]) for name in first)
    assert all(first[name] is value for name, value in shared(adapted()).items())


@pytest.mark.parametrize("spec", [VeRA(r=5), az.DVoRA(r=5), az.MAP(az.SORA(VeRA(r=5), rank=2))], ids=repr)
def test_what_moves_a_model_keeps_its_tensors_one(spec):
    model = adapted(spec=spec)
    x = torch.randn(3, 8, dtype=torch.float64)
    y = model(x)
    assert is_one(copy.deepcopy(model))
    other = copy.deepcopy(model)
    other.to(torch.float32).to(torch.float64)
    assert is_one(other)
    torch.testing.assert_close(other(x), y, rtol=1e-5, atol=1e-5)
    assert is_one(model)
    assert model(x).equal(y)


def test_loading_other_values_leaves_other_models_as_they_are():
    model, other, x = adapted(), adapted(), torch.randn(3, 8, dtype=torch.float64)
    before = {name: value.clone() for name, value in shared(model).items()}
    y, foreign = model(x), adapted(seed=1)
    assert shared(model)["0.A"] is shared(other)["0.A"]
    other.load_state_dict(foreign.state_dict())
    assert is_one(other)
    assert other(x).equal(foreign(x))
    assert model(x).equal(y)
    assert all(value.equal(before[name]) for name, value in shared(model).items())
    az.reset_adapters(other, seed=2)
    assert is_one(other)
    assert model(x).equal(y)


def test_from_the_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 6)).double()
    az.adapt(model, VeRA(r=5))
    living = adapted()
    y = living(torch.ones(8, dtype=torch.float64))
    model.to_empty(device="cpu")
    assert living(torch.ones(8, dtype=torch.float64)).equal(y)
    az.reset_adapters(model)
    own = shared(model)
    assert own["0.B"] is own["1.B"]
    assert own["0.B"] is shared(living)["0.B"]


def test_blank_values_off_the_meta_device_are_never_those_of_a_living_model(monkeypatch):
    living = adapted()
    state = {
        name: torch.zeros_like(value) if name[-1] in "AB" else value for name, value in living.state_dict().items()
    }
    living.load_state_dict(state)
    with torch.device("meta"):
        model = net()
    az.adapt(model, VeRA(r=5))
    monkeypatch.setattr(torch, "empty_like", lambda value, **options: torch.zeros_like(value, **options))
    model.to_empty(device="cpu")
    assert all(value.isnan().all() for value in shared(model).values())
    assert not any(value.any() for value in shared(living).values())


def test_nothing_is_kept_alive():
    pool = Pool()
    kept = pool.one(torch.arange(3.0))
    assert pool.one(torch.arange(3.0)) is kept
    assert pool.one(torch.arange(3.0).double()) is not kept
    del kept
    gc.collect()
    fresh = torch.arange(3.0)
    assert pool.one(fresh) is fresh
    meta = torch.empty(3, device="meta")
    assert pool.one(meta) is meta
    assert SHARED.one(meta) is meta


def keys(directory):
    found = []
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found += file.keys()
    return sorted(found)


@pytest.mark.parametrize("most", [5_000_000_000, 200])
def test_each_stands_in_the_files_once_and_comes_back_as_one(tmp_path, most):
    model, x = adapted(spec=az.DVoRA(r=5)), torch.randn(3, 8, dtype=torch.float64)
    contents = az.save(model, tmp_path, max_shard_bytes=most)
    assert [key for key in keys(tmp_path) if key.endswith("A")] == [f"{n}.adapter.inner.A" for n in (0, 1, 3)]
    assert [key for key in keys(tmp_path) if key.endswith("B")] == [f"{n}.adapter.inner.B" for n in (0, 2)]
    stored = sum(value.numel() for name, value in shared(model).items() if name in ("0.A", "1.A", "3.A", "0.B", "2.B"))
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    assert f"{stored + trained:,} numbers" in str(contents)
    again = net()
    az.load(again, tmp_path)
    assert is_one(again)
    assert again(x).equal(model(x))
    seeds = net()
    az.adapt(seeds, az.DVoRA(r=5), seed=9)
    az.load(seeds, tmp_path)
    assert is_one(seeds)
    assert seeds(x).equal(model(x))
    assert not shared(adapted(seed=9))["0.A"].equal(shared(model)["0.A"])


def described(directory, change):
    path = directory / "adapterzoo.json"
    tree = json.loads(path.read_text())
    change(tree["adapters"]["default"]["layers"])
    tree["digest"] = digest_of_description(tree)
    path.write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda layers: layers[1]["tensors"]["B"].update(same_as="nobody"),
            "is said to be 'nobody', which stands in no",
        ),
        (lambda layers: layers[1]["tensors"]["B"].update(same_as="1.adapter.B"), "which stands in no file"),
        (lambda layers: layers[1]["tensors"]["B"].update(same_as="0.adapter.A"), "another shape, dtype or file"),
        (lambda layers: layers[0]["tensors"]["b"].update(same_as="0.adapter.B"), "another shape, dtype or file"),
        (lambda layers: layers[1]["tensors"]["B"].update(same_as=3), "same_as': Input should be a valid string"),
    ],
)
def test_a_description_of_sharing_that_can_not_be_is_refused(tmp_path, change, sentence):
    az.save(adapted(), tmp_path)
    described(tmp_path, change)
    with pytest.raises(CheckpointError, match=sentence):
        az.load(net(), tmp_path)
