"""Files of adapters: what is saved comes back bit for bit, what does not fit is told all at once, crashes are safe."""

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from adapterzoo import (
    MAP,
    SORA,
    AdaLoRA,
    AdaptedLinear,
    DoRA,
    FLoRA,
    Frozen,
    LoRA,
    PreDiag,
    adapt,
    adapted_layers,
    compact,
    merge,
    unmerge,
)
from adapterzoo.checkpoint import storage, tensors
from adapterzoo.checkpoint.inspection import inspect
from adapterzoo.checkpoint.loading import load
from adapterzoo.checkpoint.saving import save
from adapterzoo.errors import CheckpointError, NotFiniteWarning, UninitialisedError
from adapterzoo.pieces import Role
from tests.strategies import specs

FIXTURE = Path(__file__).parent / "fixtures" / "checkpoint_v1"


class Net(nn.Module):
    """Every kind of plain layer, a shared one, a norm with buffers, and a head."""

    def __init__(self, dtype=torch.float32, head=3, bias=True):
        super().__init__()
        self.tokens = nn.Embedding(7, 4, dtype=dtype)
        self.conv = nn.Conv1d(4, 6, 3, padding=1, groups=2, bias=bias, dtype=dtype)
        self.up = nn.Linear(6, 5, bias=bias, dtype=dtype)
        self.again = self.up
        self.down = nn.Linear(5, 6, dtype=dtype)
        self.norm = nn.BatchNorm1d(6, dtype=dtype)
        self.head = nn.Linear(6, head, dtype=dtype)

    def forward(self, tokens):
        x = self.conv(self.tokens(tokens).mT).mT
        x = self.down(torch.relu(self.up(x) + self.again(x)))
        return self.head(self.norm(x.mean(1)))


TOKENS = torch.arange(12).reshape(3, 4) % 7
SPECS = {
    "tokens": DoRA(LoRA(r=2, alpha=5)),
    "conv": MAP(LoRA(r=2)),
    "up": MAP(DoRA(AdaLoRA(r=4, alpha=3))),
    "down": SORA(PreDiag(FLoRA(r=(3, 2), scale=0.5)), rank=2),
}


def net(**options):
    torch.manual_seed(0)
    return Net(**options).eval()


def adapted(specs=SPECS, train=("head", "norm"), seed=3, dtype=torch.float32, **options):
    """A model with every trained number away from its start."""
    model = net(dtype=dtype)
    adapt(model, targets=specs, train=train, seed=seed, **options)
    return perturbed(model)


def perturbed(model, seed=1):
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.3 * torch.randn(value.shape, generator=draw, dtype=torch.float64).to(value.dtype))
        for layer in adapted_layers(model).values():
            for part in layer.adapter.parts():
                for name, role in part.roles.items():
                    if role is Role.BUFFER:
                        part.values()[name][0] = 0
        for name, value in model.named_buffers():
            if name.startswith("norm"):
                value.add_(1)
    return model


def bits(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_bits(one, other):
    return one.keys() == other.keys() and all(
        one[name].dtype is other[name].dtype and one[name].equal(other[name]) for name in one
    )


def state(model):
    """All that a failed load must leave: values, flags, modules and modes."""
    flags = {name: value.requires_grad for name, value in model.named_parameters()}
    modules = {name: (id(module), type(module), module.training) for name, module in model.named_modules()}
    hooks = {name: len(module._forward_pre_hooks) for name, module in model.named_modules()}
    return bits(model), (flags, modules, hooks)


def unchanged(before, model):
    after = state(model)
    return same_bits(before[0], after[0]) and before[1] == after[1]


def refusal(model, directory, **options):
    """The error of a load that fails, and changes nothing."""
    before = state(model)
    with pytest.raises(CheckpointError) as caught:
        load(model, directory, **options)
    assert unchanged(before, model)
    return caught.value


def edit(directory, change):
    path = Path(directory) / "adapterzoo.json"
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(signed(tree)))


def signed(tree):
    """With the digest that a stranger would give it who knows how."""
    rest = {key: value for key, value in tree.items() if key != "digest"} if isinstance(tree, dict) else None
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return tree if rest is None else {**tree, "digest": sha256(text.encode()).hexdigest()}


# What comes back


def test_a_plain_model_is_adapted_as_the_file_says_and_computes_the_same_bits(tmp_path):
    model, again = adapted(), net()
    save(model, tmp_path)
    report = load(again, tmp_path)
    assert report.adapted
    assert report.layers == ("tokens", "conv", "up", "down")
    assert same_bits(bits(model), bits(again))
    assert again(TOKENS).equal(model(TOKENS))
    assert state(again)[1][0] == state(model)[1][0]
    assert again.again is again.up
    assert {name: layer.spec for name, layer in adapted_layers(again).items()} == SPECS
    assert {layer.seed for layer in adapted_layers(again).values()} == {3}


def test_an_adapted_model_gets_the_values_in_place(tmp_path):
    model, again = adapted(), perturbed(adapted(), seed=2)
    kept = dict(again.named_parameters())
    save(model, tmp_path)
    assert not again(TOKENS).equal(model(TOKENS))
    report = load(again, tmp_path)
    assert not report.adapted
    assert all(value is kept[name] for name, value in again.named_parameters())
    assert again(TOKENS).equal(model(TOKENS))


@given(data=st.data())
@settings(max_examples=40)
def test_saving_and_loading_gives_the_same_bits(data):
    base_dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    adapter_dtype = data.draw(st.sampled_from([None, torch.bfloat16, torch.float32]))
    out, cols = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 7))
    targets = {"0": data.draw(specs(out, cols, depth=4)), "1": data.draw(specs(cols, out, depth=3))}
    seed, most = data.draw(st.integers(0, 99)), data.draw(st.sampled_from([1, 100, 10**9]))

    def build():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(cols, out, bias=seed % 2 == 0), nn.Linear(out, cols)).to(base_dtype)

    model, again = build(), build()
    adapt(model, targets=targets, seed=seed, adapter_dtype=adapter_dtype, lean=seed % 3 == 0)
    perturbed(model, seed)
    if data.draw(st.booleans()):
        compact(model)
    x = torch.randn(3, cols, dtype=base_dtype)
    with tempfile.TemporaryDirectory() as directory:
        save(model, directory, max_shard_bytes=most)
        load(again, directory)
        assert same_bits(bits(model), bits(again))
        assert again(x).equal(model(x))
        perturbed(again, seed + 1)
        load(again, directory)  # the second time into an adapted model
    assert same_bits(bits(model), bits(again))


def test_compacted_ranks_follow_the_file_in_both_directions(tmp_path):
    full, cut = adapted(), adapted()
    compact(cut)
    assert cut.up.adapter.generator.P.shape[1] == 3
    save(cut, tmp_path / "cut")
    save(full, tmp_path / "full")
    assert inspect(tmp_path / "cut").manifest.adapters["default"].layers[2].ranks == {"inner.inner": 3}
    for source, place in ((cut, "cut"), (full, "full")):
        for target in (adapted(), compacted(), net()):
            load(target, tmp_path / place)
            assert same_bits(bits(source), bits(target))
            assert target(TOKENS).equal(source(TOKENS))


def compacted():
    model = adapted()
    compact(model)
    return model


def test_layers_adapted_with_different_seeds_and_dtypes_come_back_so(tmp_path):
    model, again = net(dtype=torch.bfloat16), net(dtype=torch.bfloat16)
    adapt(model, DoRA(LoRA(r=2)), ["up"], seed=1, adapter_dtype=torch.bfloat16)
    adapt(model, LoRA(r=2), ["down"], seed=2, lean=True)
    save(perturbed(model), tmp_path)
    load(again, tmp_path)
    assert again.up.adapter.inner.A.dtype is torch.bfloat16
    assert again.up.adapter.magnitude.dtype is torch.float32
    assert (again.up.seed, again.down.seed, again.up.lean, again.down.lean) == (1, 2, False, True)
    assert same_bits(bits(model), bits(again))


def test_nothing_that_trained_is_lost(tmp_path):
    model, again = adapted(), net()
    model.up.bias.requires_grad_(True)
    model.conv.weight.requires_grad_(True)
    with torch.no_grad():
        model.up.bias.add_(1)
        model.conv.weight.mul_(2)
    save(model, tmp_path)
    report = load(again, tmp_path)
    assert {"up.bias", "conv.weight", "head.weight", "norm.weight", "norm.running_mean"} <= set(report.trained)
    assert same_bits(bits(model), bits(again))
    with pytest.warns(UserWarning, match="base weight of layer 'conv' trains"):
        assert again(TOKENS).equal(model(TOKENS))


def test_a_head_that_is_frozen_here_and_trained_there_trains_again(tmp_path):
    save(adapted(), tmp_path)
    again = adapted(train=())
    report = load(again, tmp_path)
    assert set(report.thawed) == {"head.weight", "head.bias", "norm.weight", "norm.bias"}
    assert all(again.get_parameter(name).requires_grad for name in report.thawed)
    assert "made trainable: " in str(report)


def test_a_shared_parameter_is_written_once(tmp_path):
    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
        model[2].weight = model[1].weight
        return model

    model, again = build(), build()
    adapt(model, LoRA(r=1), ["0"], train=["1", "2"])
    perturbed(model)
    contents = save(model, tmp_path)
    shared = contents.manifest.adapters["default"].trained[0]
    assert shared.names == ["1.weight", "2.weight"]
    (file,) = tmp_path.glob("*.safetensors")
    assert "2.weight" not in load_file(file)
    load(again, tmp_path)
    assert again[2].weight is again[1].weight
    assert same_bits(bits(model), bits(again))
    apart = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    assert "is shared as '1.weight', '2.weight' in the file, here as 1.weight" in str(refusal(apart, tmp_path))


def test_parameters_that_are_views_of_one_buffer_are_saved_apart(tmp_path):
    model = adapted()
    flat = torch.cat([model.head.weight.detach().flatten(), model.head.bias.detach()])
    model.head.weight.data = flat[:18].view(3, 6)
    model.head.bias.data = flat[16:19]  # they overlap
    save(model, tmp_path)
    again = net()
    load(again, tmp_path)
    assert again.head.bias.equal(model.head.bias)
    assert again.head.weight.equal(model.head.weight)


@pytest.mark.filterwarnings("ignore::adapterzoo.errors.UnfrozenBaseWarning")
def test_a_merged_model_saves_the_same_file_and_takes_no_values(tmp_path):
    model = adapted()
    model.up.weight.requires_grad_(True)
    save(model, tmp_path / "before")
    merge(model)
    save(model, tmp_path / "merged")
    assert files_of(tmp_path / "before") == files_of(tmp_path / "merged")
    assert "layer 'up' is merged and takes no values; unmerge it" in str(refusal(model, tmp_path / "before"))
    unmerge(model)
    load(model, tmp_path / "merged")


@pytest.mark.filterwarnings("ignore::adapterzoo.errors.UnfrozenBaseWarning")
def test_a_base_weight_that_trained_and_is_gone_cannot_be_saved(tmp_path):
    model = adapted()
    model.up.weight.requires_grad_(True)
    merge(model, keep_base=False)
    with pytest.raises(CheckpointError, match=r"up\.weight: .* its base weight is gone"):
        save(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_names_in_tensor_files_are_those_of_the_state_dict(tmp_path):
    model, again = adapted(), net()
    save(model, tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    adapt(again, targets=SPECS)
    assert not again.load_state_dict(load_file(file), strict=False).unexpected_keys
    assert again(TOKENS).equal(model(TOKENS))


def test_one_adapted_layer_is_a_model_too(tmp_path):
    layer, again = AdaptedLinear(nn.Linear(4, 3), LoRA(r=2)), AdaptedLinear(nn.Linear(4, 3), LoRA(r=2), seed=5)
    perturbed(layer)
    assert " on the model itself" in str(save(layer, tmp_path))
    load(again, tmp_path)
    assert again.adapter.B.equal(layer.adapter.B)
    assert "the model has no layer ''" in str(refusal(nn.Linear(4, 3), tmp_path))


def test_wrapped_models_have_the_names_of_what_they_wrap(tmp_path):
    model, again = adapted(), adapted(seed=9)
    save(torch.compile(model, backend="eager"), tmp_path)
    load(torch.compile(again, backend="eager"), tmp_path)
    assert same_bits(bits(model), bits(again))
    load(torch.compile(net(), backend="eager"), tmp_path)


def test_hugging_faces_conv1d_is_saved_by_its_matrix(tmp_path):
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D

    def build():
        torch.manual_seed(0)
        return nn.Sequential(conv1d(5, 3))

    model, again = build(), build()
    adapt(model, DoRA(LoRA(r=2)), ["0"])
    layer = save(perturbed(model), tmp_path).manifest.adapters["default"].layers[0]
    assert (layer.kind, layer.weight, layer.matrix) == ("transposed", [3, 5], [5, 3])
    load(again, tmp_path)
    assert again(torch.ones(3)).equal(model(torch.ones(3)))
    linear = nn.Sequential(nn.Linear(3, 5))
    assert "'0.weight' has the shape [5, 3] here and [3, 5]" in str(refusal(linear, tmp_path))


def test_adapters_of_a_quantised_base_load_onto_a_plain_one_and_say_so(tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bnb.nn.Linear4bit(64, 32), bnb.nn.Linear4bit(32, 2)).to("cpu")
    plain = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 2))
    adapt(model, LoRA(r=2), ["0"])
    save(perturbed(model), tmp_path)
    report = load(plain, tmp_path)
    assert plain[0].adapter.B.equal(model[0].adapter.B)
    assert any("4-bit" in note for note in report.notes)


def test_adapted_on_the_meta_device_and_loaded(tmp_path):
    model = adapted()
    save(model, tmp_path)
    with torch.device("meta"):
        large = Net().eval()
    adapt(large, targets=SPECS, train=["head", "norm"])
    assert "is on the meta device" in str(refused_on_meta(large, tmp_path))
    large.to_empty(device="cpu")
    large.load_state_dict(net().state_dict(), strict=False)
    with pytest.raises(UninitialisedError):
        large(TOKENS)
    with pytest.raises(CheckpointError, match="layer 'up' has no values yet"):
        save(large, tmp_path / "other")
    load(large, tmp_path)
    assert large(TOKENS).equal(model(TOKENS))


def refused_on_meta(model, directory):
    with pytest.raises(CheckpointError) as caught:
        load(model, directory)
    return caught.value


def test_the_device_that_is_asked_for_is_checked(tmp_path):
    save(adapted(), tmp_path)
    assert "layer 'up' is on cpu, not on meta; move the model first" in str(refusal(net(), tmp_path, device="meta"))
    load(net(), tmp_path, device="cpu")


# What does not fit


def test_another_base_is_explained_by_names_and_shapes(tmp_path):
    save(adapted(), tmp_path)
    error = refusal(net(head=4), tmp_path)
    assert "parameter 'head.weight' has the shape [4, 6] here and [3, 6] in the file" in error.problems
    assert "parameter 'head.bias' has the shape [4] here and [3] in the file" in error.problems
    renamed = net()
    renamed.up2 = renamed.up
    del renamed.up
    del renamed.again
    error = str(refusal(renamed, tmp_path))
    assert "the model has no layer 'up'; did you mean 'up2'?" in error
    assert "the model has no parameter 'up.weight' [5, 6]; did you mean 'up2.weight'?" in error
    assert "the file knows no parameter 'up2.weight' [5, 6]" in error


@pytest.mark.parametrize(
    ("specs", "sentence"),
    [
        ({**SPECS, "conv": MAP(LoRA(r=2, alpha=9))}, "layer 'conv' is MAP(LoRA(r=2, alpha=9)) here and MAP(LoRA(r=2))"),
        ({**SPECS, "conv": MAP(LoRA(r=2), floor=0.3)}, "layer 'conv' is MAP(LoRA(r=2), floor=0.3) here"),
        ({**SPECS, "conv": LoRA(r=2)}, "layer 'conv' is LoRA(r=2) here and MAP(LoRA(r=2)) in the file"),
        (
            {k: v for k, v in SPECS.items() if k != "up"},
            "the adapter of layer 'up' is in the file and not in the model",
        ),
        ({**SPECS, "head": LoRA(r=1)}, "the adapter of layer 'head' is in the model and not in the file"),
    ],
)
def test_another_composition_is_refused(specs, sentence, tmp_path):
    save(adapted(train=()), tmp_path)
    assert sentence in str(refusal(adapted(specs, train=()), tmp_path))


def test_what_trains_here_needs_values(tmp_path):
    save(adapted(train=()), tmp_path)
    error = refusal(adapted(train=["head"]), tmp_path)
    assert "parameter 'head.weight', which trains, is in the model and not in the file" in error.problems


def test_dtypes_are_never_converted_in_silence(tmp_path):
    model = adapted(dtype=torch.float64)
    save(model, tmp_path)
    error = str(refusal(adapted(), tmp_path))
    assert "layer 'up', alpha is float32 here and float64 in the file; cast=True converts it" in error
    assert "parameter 'head.weight' is float32 here and float64 in the file" in error
    narrow = net()
    load(narrow, tmp_path, cast=True)
    assert narrow.up.adapter.alpha.equal(model.up.adapter.alpha.float())
    assert narrow.up.adapter.alpha.dtype is torch.float32


def test_everything_is_told_at_once(tmp_path):
    save(adapted(), tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-8])
    other = adapted({**SPECS, "up": LoRA(r=2), "head": LoRA(r=1)}, train=["norm"])
    merge(other)
    text = str(refusal(other, tmp_path))
    for piece in (
        "layer 'up' is LoRA(r=2) here",
        "the adapter of layer 'head' is in the model and not in the file",
        "layer 'conv' is merged and takes no values",
        "it is truncated",
    ):
        assert piece in text


def test_a_plain_model_stays_plain_where_the_values_do_not_fit(tmp_path):
    save(adapted(), tmp_path)
    edit(tmp_path, lambda tree: layer_of(tree, 3)["tensors"]["inner.inner.A"].update(shape=[1, 6]))
    model = net()
    model.head.weight.requires_grad_(False)
    error = str(refusal(model, tmp_path))
    assert "layer 'down', inner.inner.A has the shape [5, 3] here and [1, 6] in the file" in error or "[1, 6]" in error
    assert not adapted_layers(model)


def layer_of(tree, i):
    return tree["adapters"]["default"]["layers"][i]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda t: t.update(format_version=7, library_version="9.1"),
            "version 7 of the format, written by adapterzoo '9.1'",
        ),
        (lambda t: t.update(format_version="1"), "format_version '1'; it should be a whole number"),
        (lambda t: t.update(format="peft"), "is no description of adapters"),
        (lambda t: t.update(formatt=1), "'formatt': no such field; did you mean 'format'?"),
        (lambda t: layer_of(t, 0).update(seeds=1), "seeds': no such field; did you mean 'seed'?"),
        (lambda t: layer_of(t, 0).pop("kind"), "kind': Field required"),
        (lambda t: layer_of(t, 0).update(seed="1"), "seed': Input should be a valid integer"),
        (lambda t: layer_of(t, 0).update(seed=True), "seed': Input should be a valid integer"),
        (lambda t: layer_of(t, 0).update(composition=99), "layer 'tokens' has composition 99 of 4"),
        (lambda t: layer_of(t, 0).update(factor_dtype="int8"), "layer 'tokens' has the factor_dtype 'int8'"),
        (lambda t: layer_of(t, 1).update(names=["tokens"]), "layer 'tokens' stands there 2 times"),
        (lambda t: specs_in(t)[1].update(piece="MAPP"), "unknown piece"),
        (lambda t: specs_in(t)[1]["inner"].update(rank=3), "no field"),
        (lambda t: t["base"]["parameters"].update({"x": [1]}), "base.digest is not that of base.parameters"),
        (lambda t: t["adapters"].update({"../x": t["adapters"]["default"]}), "a name that is not allowed"),
    ],
)
def test_a_wrong_description_is_refused_with_a_sentence(change, sentence, tmp_path):
    save(adapted(), tmp_path)
    edit(tmp_path, change)
    assert sentence in str(refusal(net(), tmp_path))
    with pytest.raises(CheckpointError):
        inspect(tmp_path)


def specs_in(tree):
    return tree["adapters"]["default"]["compositions"]


def test_an_unknown_piece_names_the_nearest(tmp_path):
    save(adapted(), tmp_path)
    edit(tmp_path, lambda tree: specs_in(tree)[0].update(piece="DoRRA"))
    assert "DoRA" in str(refusal(net(), tmp_path)).split("unknown piece")[1]


def test_a_name_that_is_not_there_is_answered_with_those_that_are(tmp_path):
    save(adapted(), tmp_path, name="german")
    assert "holds no adapter 'default'; it holds 'german'" in str(refusal(net(), tmp_path))
    assert "did you mean 'german'?" in str(refusal(net(), tmp_path, name="germann"))
    load(net(), tmp_path, name="german")


def test_directories_that_hold_something_else_say_so(tmp_path):
    assert "there is no such directory" in str(refusal(net(), tmp_path / "none"))
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "import_peft reads it" in str(refusal(net(), tmp_path))
    assert "give the directory, not a file" in str(refusal(net(), tmp_path / "adapter_config.json"))


def test_adapt_false_leaves_a_plain_model_plain(tmp_path):
    save(adapted(), tmp_path)
    assert "adapt=False forbids" in str(refusal(net(), tmp_path, adapt=False))


def test_layers_that_can_not_be_adapted_are_refused_with_the_reason(tmp_path):
    save(adapted(), tmp_path)
    model = net()
    model.down.forward = lambda x: x
    assert "it has a forward of its own" in str(refusal(model, tmp_path))


# What only one of the two has


def test_not_strict_leaves_out_what_only_one_has_and_says_so(tmp_path):
    model = adapted(train=())
    save(model, tmp_path)
    fewer = net()
    del fewer.again
    del fewer.up
    assert "the model has no layer 'up'" in str(refusal(fewer, tmp_path))
    report = load(fewer, tmp_path, strict=False)
    assert report.layers == ("tokens", "conv", "down")
    assert report.only_in_file == ("the adapter of layer 'up'",)
    assert "left out, only in the file: the adapter of layer 'up'" in str(report)
    assert fewer.down.adapter.C.equal(model.down.adapter.C)


def test_not_strict_leaves_alone_layers_that_the_file_has_not(tmp_path):
    model, more = adapted(train=()), adapted({**SPECS, "head": LoRA(r=2)}, train=())
    save(model, tmp_path)
    before = more.head.adapter.B.clone()
    perturbed(more, seed=7)
    moved = more.head.adapter.B.clone()
    report = load(more, tmp_path, strict=False)
    assert report.only_in_model == ("the adapter of layer 'head'",)
    assert more.head.adapter.B.equal(moved)
    assert not moved.equal(before)
    assert more.up.adapter.alpha.equal(model.up.adapter.alpha)


def test_not_strict_needs_something_in_common(tmp_path):
    save(adapted({"up": LoRA(r=1)}, train=()), tmp_path)
    edit(tmp_path, lambda tree: tree["adapters"]["default"].update(trained=[]))
    other = adapted({"down": LoRA(r=1)}, train=())
    assert "nothing that is in the file is in the model" in str(refusal(other, tmp_path, strict=False))


def test_not_strict_forgives_nothing_else(tmp_path):
    save(adapted(train=()), tmp_path)
    assert "is LoRA(r=1) here" in str(refusal(adapted({**SPECS, "up": LoRA(r=1)}, train=()), tmp_path, strict=False))
    assert "has the shape [4, 6] here" in str(refusal(net(head=4), tmp_path, strict=False))
    assert "no layer of the file is in the model" in str(
        refusal(nn.Sequential(nn.Linear(2, 2)), tmp_path, strict=False)
    )


# Writing


def files_of(directory):
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def test_the_same_model_makes_the_same_bytes(tmp_path):
    save(adapted(), tmp_path / "a")
    save(adapted(), tmp_path / "b")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_tensors_are_spread_over_files_above_a_size(tmp_path):
    model, again = adapted(), net()
    contents = save(model, tmp_path, max_shard_bytes=200)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(names) > 3
    assert names == sorted(contents.manifest.adapters["default"].files)
    assert all(name.endswith(f"-of-{len(names):05d}.safetensors") for name in names)
    assert all(sum(v.nbytes for v in load_file(tmp_path / n).values()) <= 200 for n in names)
    load(again, tmp_path)
    assert same_bits(bits(model), bits(again))
    (tmp_path / names[1]).unlink()
    assert f"the tensor file {names[1]} is not there" in str(refusal(net(), tmp_path))


def test_the_description_is_replaced_and_never_written_over(tmp_path):
    save(adapted(), tmp_path)
    before = (tmp_path / "adapterzoo.json").read_bytes()
    (tmp_path / "same").hardlink_to(tmp_path / "adapterzoo.json")
    save(perturbed(adapted(), seed=5), tmp_path)
    assert (tmp_path / "same").read_bytes() == before != (tmp_path / "adapterzoo.json").read_bytes()


def test_tensors_are_on_the_disk_before_the_description_names_them(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, Path.replace

    def noted_fsync(handle):
        events.append("sync " + ("directory" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file"))
        fsync(handle)

    def noted_replace(path, target):
        events.append(f"place {Path(target).suffix}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    save(adapted(), tmp_path)
    assert events == [
        "sync file", "place .safetensors", "sync directory", "sync file", "place .json", "sync directory",
    ]  # fmt: skip


def test_a_new_save_takes_the_place_of_the_old_and_leaves_foreign_files_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "model.safetensors").write_bytes(b"mine too")
    (tmp_path / ".adapterzoo-0123.tmp").write_bytes(b"left by a crash")
    save(adapted(), tmp_path, max_shard_bytes=200)
    save(perturbed(adapted(), seed=5), tmp_path)
    ours = {path.name for path in tmp_path.iterdir()} - {"notes.txt", "model.safetensors"}
    assert len(ours) == 2
    assert "adapterzoo.json" in ours


def test_all_files_can_be_read_by_whom_the_system_lets(tmp_path):
    save(adapted(), tmp_path)
    (tmp_path / "usual").touch()
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_other_names_stay_if_the_base_is_the_same(tmp_path):
    one, two = adapted(), perturbed(adapted(), seed=5)
    save(one, tmp_path)
    assert save(two, tmp_path, name="second").names == ("default", "second")
    for name, source in (("default", one), ("second", two)):
        again = net()
        load(again, tmp_path, name=name)
        assert same_bits(bits(source), bits(again))
    other = net(head=4)
    adapt(other, LoRA(r=1), ["up"])
    before = files_of(tmp_path)
    with pytest.raises(CheckpointError, match="holds 'second' of another base, a Net; save this one into another"):
        save(other, tmp_path)
    assert files_of(tmp_path) == before


def test_what_can_not_be_read_is_not_overwritten(tmp_path):
    save(adapted(), tmp_path)
    edit(tmp_path, lambda tree: tree.update(format_version=2))
    before = files_of(tmp_path)
    with pytest.raises(CheckpointError, match="version 2 of the format"):
        save(adapted(), tmp_path)
    assert files_of(tmp_path) == before


def test_values_that_are_not_finite_are_saved_and_told(tmp_path):
    model, again = adapted(), net()
    with torch.no_grad():
        model.up.adapter.beta.fill_(torch.nan)
    with pytest.warns(NotFiniteWarning, match=r"up\.adapter\.beta"):
        save(model, tmp_path)
    load(again, tmp_path)
    assert again.up.adapter.beta.isnan().all()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"name": "../x"}, "name='../x' is not valid"), ({"max_shard_bytes": 0}, "max_shard_bytes=0 is not valid")],
)
def test_bad_arguments_are_refused(options, sentence, tmp_path):
    with pytest.raises(CheckpointError, match=sentence):
        save(adapted(), tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_a_model_without_adapters_can_not_be_saved(tmp_path):
    with pytest.raises(CheckpointError, match="this Net has no adapted layer"):
        save(net(), tmp_path)


def test_a_directory_that_can_not_be_made_is_an_error_with_the_reason(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="can't be written"):
        save(adapted(), tmp_path / "file")


STEPS = ("save_file", "fsync", "replace", "open", "stat")


class BrokenError(OSError):
    """What a full disk says."""


def break_at(monkeypatch, step, which):
    """Let the which-th call of one step fail."""
    owner = {"save_file": storage, "fsync": os}.get(step, Path)
    true, calls = getattr(owner, step), []

    def failing(*args, **options):
        place = str(args[0]) + str(args[1] if len(args) > 1 else "")
        if owner is not Path or ".tmp" in place:
            calls.append(place)
            if len(calls) == which:
                raise BrokenError("no space left on device")
        return true(*args, **options)

    monkeypatch.setattr(owner, step, failing)
    return calls


@pytest.mark.parametrize("step", STEPS)
def test_a_save_that_fails_at_any_step_leaves_the_old_one_whole(step, tmp_path, monkeypatch):
    old, new = adapted(), perturbed(adapted(), seed=5)
    save(old, tmp_path / "place")
    before, told = files_of(tmp_path / "place"), []
    for which in range(1, 30):
        with monkeypatch.context() as patch:
            calls = break_at(patch, step, which)
            try:
                save(new, tmp_path / "place", max_shard_bytes=300)
            except CheckpointError as error:
                told.append((str(error), type(error.__cause__)))
                assert files_of(tmp_path / "place") == before
                continue
        if len(calls) < which:
            break  # every call has failed once
        again = net()
        load(again, tmp_path / "place")  # the step came after the commit, and is not needed
        assert same_bits(bits(again), bits(new))
        shutil.rmtree(tmp_path / "place")
        save(old, tmp_path / "place")
    assert told
    assert all("what was saved there before is whole" in text and cause is BrokenError for text, cause in told)
    assert len(calls) < which


WRITER = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
from tests.test_checkpoint import adapted, bits, net, perturbed, same_bits, load, save, Path
place, trials = Path(sys.argv[1]), int(sys.argv[2])
models = [adapted(), perturbed(adapted(), seed=5)]
wanted = [bits(model) for model in models]
save(models[0], place)
draw, seen = random.Random(0), set()
for trial in range(trials):
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        while True:
            for i in (1, 0):
                save(models[i], place, max_shard_bytes=600)
                os.write(tell, b"x")
    if trial % 2:
        os.read(told, 1)  # so that a slow machine sees more than first saves
    time.sleep(draw.uniform(0.0, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(told)
    os.close(tell)
    again = net()
    load(again, place)
    found = [i for i in (0, 1) if same_bits(bits(again), wanted[i])]
    assert len(found) == 1, trial
    seen.add(found[0])
save(models[0], place)
print(sorted(seen), len(list(place.iterdir())))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_killed_process_leaves_one_whole_save(tmp_path):
    repo = Path(__file__).parent.parent
    command = [sys.executable, "-W", "ignore", "-c", WRITER, str(tmp_path), "50"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=repo, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "[0, 1] 2"  # both were found, and what crashes left is gone


def test_a_directory_that_is_saved_anew_while_it_is_read_is_read_anew(tmp_path, monkeypatch):
    old, new, again = adapted(), perturbed(adapted(), seed=5), net()
    save(old, tmp_path)
    true, calls = tensors.manifest_in, []

    def racing(directory):
        manifest = true(directory)
        if not calls:
            calls.append(1)
            save(new, directory)  # after the description was read, and before its tensors are
        return manifest

    monkeypatch.setattr(tensors, "manifest_in", racing)
    load(again, tmp_path)
    assert same_bits(bits(again), bits(new))


# What a file says of itself


def test_contents_print_well(tmp_path):
    model = adapted()
    compact(model)
    assert str(save(model, tmp_path)).splitlines()[2:] == [
        "adapter 'default': 4 layers, 208 numbers in 1 file",
        "  DoRA(LoRA(r=2, alpha=5)) on tokens",
        "  MAP(LoRA(r=2)) on conv",
        "  MAP(DoRA(AdaLoRA(r=4, alpha=3))) on up",
        "    ranks 3 to 3, 3 in total, masked ones included",
        "  SORA(PreDiag(FLoRA(r=(3, 2), scale=0.5)), rank=2) on down",
        "  besides adapters: norm.weight [6], norm.bias [6], head.weight [3, 6], head.bias [3], and 3 more",
    ]
    assert inspect(tmp_path).specs() == SPECS


def test_the_file_says_what_every_magnitude_is_the_length_of(tmp_path):
    layers = save(adapted(), tmp_path).manifest.adapters["default"].layers
    assert layers[2].norms == {
        "alpha": "the whole weight",
        "beta": "the whole weight",
        "inner.magnitude": "each of the 5 rows of W [out, in]",
    }
    assert (layers[1].kind, layers[1].weight, layers[1].matrix, layers[1].kernel) == (
        "convolution", [6, 2, 3], [6, 6], [3],
    )  # fmt: skip
    assert (layers[0].kind, layers[0].weight, layers[0].matrix) == ("embedding", [7, 4], [4, 7])
    assert layers[2].names == ["up", "again"]
    assert layers[2].tensors["inner.magnitude"].role == "magnitude"


# Version 1 of the format. The fixture was made by `python -m tests.test_checkpoint`, once: it is never made anew, so
# that files written then stay readable. A new version of the format gets a fixture of its own.


FIXTURE_SPECS = {
    "tokens": DoRA(LoRA(r=2, alpha=5)),
    "conv": MAP(LoRA(r=2)),
    "up": MAP(DoRA(AdaLoRA(r=4, alpha=3))),
    "down": SORA(PreDiag(FLoRA(r=(3, 2), scale=0.5)), rank=2),
}


def of_the_fixture():
    """The model of the fixture, its values by rule, so that no random generator's stream has to stay as it was."""
    model = net()
    numbers = [(n, v) for n, v in (*model.named_parameters(), *model.named_buffers()) if v.is_floating_point()]
    with torch.no_grad():
        for i, (name, value) in enumerate(numbers):
            value.copy_(rule(i, value).abs() if name.endswith("running_var") else rule(i, value))
    return model


def rule(i, like):
    return (torch.arange(like.numel(), dtype=torch.float64).add(7 * i).mul(0.37).sin() * 0.5 + 0.1).reshape(like.shape)


def fixture_model():
    model = of_the_fixture()
    adapt(model, targets=FIXTURE_SPECS, train=["head", "norm"], seed=3)
    with torch.no_grad():
        for i, value in enumerate(p for p in model.parameters() if p.requires_grad):
            value.copy_(rule(50 + i, value))
        model.up.adapter.generator.mask[1] = 0
    compact(model)
    return model


def test_version_1_stays_loadable_with_the_same_outputs():
    model = of_the_fixture()
    assert inspect(FIXTURE).manifest.format_version == 1
    load(model, FIXTURE)
    expected = torch.tensor(json.loads((FIXTURE / "outputs.json").read_text()))
    torch.testing.assert_close(model(TOKENS), expected)
    assert {name: layer.spec for name, layer in adapted_layers(model).items()} == FIXTURE_SPECS


def test_version_1_holds_the_values_that_the_rule_gives():
    model = of_the_fixture()
    load(model, FIXTURE)
    wanted = bits(fixture_model())
    assert all(value.equal(wanted[name]) for name, value in bits(model).items() if ".adapter." in name)


# Several processes

SHARDS = """
import os, sys, time
import torch, torch.distributed as dist
torch.set_num_threads(1)
from pathlib import Path
from torch import nn
from torch.distributed.fsdp import fully_shard
from adapterzoo import MAP, DoRA, LoRA, adapt
from adapterzoo.checkpoint import saving
from adapterzoo.errors import CheckpointError
from adapterzoo.checkpoint.loading import load
from adapterzoo.checkpoint.saving import save
place, rank = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{place}/meeting", rank=rank, world_size=2)

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))

def adapted(shift):
    model = build()
    adapt(model, MAP(DoRA(LoRA(r=2))), ["0"], train=["1"])
    with torch.no_grad():
        for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
            p.add_(torch.arange(p.numel()).reshape(p.shape) * 0.1 + i + shift)
    return model

whole, sharded = adapted(1.0), fully_shard(adapted(1.0))
x = torch.ones(2, 6)
save(sharded, place / "shards")
again = build()
load(again, place / "shards")
assert again(x).equal(whole(x))
other = fully_shard(adapted(2.0))
assert not torch.allclose(other(x), whole(x))
load(other, place / "shards")
torch.testing.assert_close(other(x), whole(x))
plain = nn.parallel.DistributedDataParallel(build())
try:
    load(plain, place / "shards")
    raise SystemExit("no error")
except CheckpointError as error:
    assert "is in a DistributedDataParallel already" in str(error), error
assert type(plain.module[0]) is nn.Linear
ready = nn.parallel.DistributedDataParallel(adapted(3.0))
load(ready, place / "shards")
assert ready.module(x).equal(whole(x))
def failing(*args):
    raise OSError("disk full")
saving.write_tensors = failing
try:
    save(other, place / "shards")
    raise SystemExit("no error")
except CheckpointError as error:
    wanted = "disk full" if rank == 0 else "rank 0 could not write"
    assert wanted in str(error), error
(place / f"done{rank}").touch()
while not all((place / f"done{i}").exists() for i in range(2)):
    time.sleep(0.01)
os._exit(0)  # gloo's threads may abort a process on its way out
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_shards_of_two_processes_are_saved_whole_and_loaded_into_shards(tmp_path):
    repo = Path(__file__).parent.parent
    command = [sys.executable, "-W", "ignore", "-c", SHARDS, str(tmp_path)]
    running = [
        subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True, cwd=repo) for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=90)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(said)


if __name__ == "__main__":
    made = fixture_model()
    save(made, FIXTURE)
    (FIXTURE / "outputs.json").write_text(json.dumps(made(TOKENS).tolist()))


def test_an_adapter_without_values_is_saved_too(tmp_path):
    model, other = nn.Sequential(nn.Linear(4, 3)), nn.Sequential(nn.Linear(4, 3))
    adapt(model, Frozen())
    contents = save(model, tmp_path)
    assert "1 layer, 0 numbers in 0 files" in str(contents)
    load(other, tmp_path)
    assert other[0].spec == Frozen()
