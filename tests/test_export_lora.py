"""export_lora: any composition as a plain LoRA of PEFT's, by truncated SVD, with its residual said."""

import json
from pathlib import Path

import pytest
import torch
from exported import (
    EVERY,
    IDS,
    Mixed,
    answer,
    as_matrix,
    bert,
    distance,
    gpt2,
    llama,
    mlp,
    started,
    trained,
    truth,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from adapterzoo import MAP, SORA, AdaLoRA, DoRA, FLoRA, LoRA, PreDiag, adapt, adapted_layers, merge
from adapterzoo.base import DenseBase
from adapterzoo.errors import ExportError
from adapterzoo.factored import FactoredWeight, RightFactor
from adapterzoo.interop.lowrank import Update
from adapterzoo.interop.truncated import export_lora
from adapterzoo.kept import NormCache

# PEFT asks Transformers by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
DEEP = MAP(DoRA(LoRA(r=3, alpha=5)))


def message(call, *args, **options):
    with pytest.raises(ExportError) as caught:
        call(*args, **options)
    return str(caught.value)


def rows(report):
    return {row.name: row for row in report.layers}


def factors(directory, name):
    """A and B of a linear layer, as they stand in the file."""
    file = load_file(Path(directory) / "adapter_model.safetensors")
    return tuple(file[f"base_model.model.{name}.lora_{which}.weight"].double() for which in "AB")


def best(update, rank):
    """What the best approximation of that rank leaves."""
    values = torch.linalg.svdvals(update)
    return float(values[rank:].norm() / values.norm())


def with_weights(model, adapted, updates):
    """The plain model with W + update in the place of every adapted weight."""
    with torch.no_grad():
        for name in adapted_layers(adapted):
            own = model.get_submodule(name)
            as_matrix(own, own.weight).add_(updates[name])
    return model


# What is written


@pytest.mark.parametrize("spec", EVERY, ids=repr)
def test_peft_serves_the_best_lora_of_any_composition_and_the_residual_is_the_true_one(spec, tmp_path):
    model = trained(llama(), spec)
    report = rows(export_lora(model, tmp_path, rank=4, max_residual=None))
    updates = {}
    for name, layer in adapted_layers(model).items():
        (_, update), (A, B) = truth(layer), factors(tmp_path, name)
        updates[name] = B @ A
        assert report[name].residual == pytest.approx(distance(B @ A, update), rel=1e-3, abs=3e-7)
        assert report[name].residual == pytest.approx(best(update, 4), rel=1e-3, abs=3e-7)
        assert report[name].size == pytest.approx(float(update.norm()), rel=1e-5)
    served = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert distance(answer(served), answer(with_weights(llama(), model, updates))) < 1e-5


@pytest.mark.parametrize("spec", [DEEP, EVERY[3], EVERY[6], SORA(AdaLoRA(r=4))], ids=repr)
@pytest.mark.parametrize("build", [llama, bert, gpt2])
def test_at_full_rank_peft_gives_the_adapted_function(build, spec, tmp_path):
    model = trained(build(), spec)
    report = export_lora(model, tmp_path, rank=99, max_residual=1e-6)
    assert all(row.rank == min(row.shape) for row in report.layers)
    assert report.worst < 2e-7
    assert distance(answer(PeftModel.from_pretrained(build(), tmp_path).eval()), answer(model)) < 1e-5


@pytest.mark.parametrize(
    ("spec", "rank"),
    [(LoRA(r=3, alpha=5), 3), (FLoRA(r=(3, 2)), 2), (SORA(LoRA(r=2), rank=1), 4), (SORA(FLoRA(r=2), rank=2), 6)],
    ids=repr,
)
def test_a_thin_update_is_whole_at_its_own_rank(spec, rank, tmp_path):
    report = export_lora(trained(llama(), spec), tmp_path, max_residual=1e-6)
    assert {row.rank for row in report.layers} == {min(rank, min(row.shape)) for row in report.layers}
    assert report.worst < 2e-7


@pytest.mark.parametrize("bound", [0.3, 0.03])
def test_without_a_rank_every_layer_gets_the_smallest_that_keeps_the_bound(bound, tmp_path):
    model = trained(llama(), PreDiag(LoRA(r=2)))
    report = rows(export_lora(model, tmp_path, max_residual=bound))
    assert len({row.rank for row in report.values()}) > 1
    for name, layer in adapted_layers(model).items():
        _, update = truth(layer)
        assert best(update, report[name].rank) <= bound < best(update, report[name].rank - 1)
        assert report[name].residual <= bound
        assert factors(tmp_path, name)[0].shape[0] == report[name].rank
    served = PeftModel.from_pretrained(llama(), tmp_path).eval()
    updates = {name: torch.linalg.multi_dot(factors(tmp_path, name)[::-1]) for name in report}
    assert distance(answer(served), answer(with_weights(llama(), model, updates))) < 1e-5


def test_every_servers_scale_is_one_and_singular_values_are_split_evenly(tmp_path):
    model = trained(llama(), DEEP)
    report = export_lora(model, tmp_path, max_residual=0.1, task_type="CAUSAL_LM", base_model="here")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"]
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert not config["use_rslora"]
    assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", "here")
    for row in report.layers:
        A, B = factors(tmp_path, row.name)
        torch.testing.assert_close(A @ A.mT, B.mT @ B, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(A @ A.mT, torch.diag((A @ A.mT).diagonal()), rtol=1e-4, atol=1e-6)


def test_convolutions_and_embeddings_are_served_too(tmp_path):
    model = trained(started(Mixed()), MAP(LoRA(r=2)), ["tokens", "kernel", "head"])
    report = export_lora(model, tmp_path, rank=99, max_residual=1e-6)
    assert {row.name: row.shape for row in report.layers} == {"tokens": (6, 11), "kernel": (8, 36), "head": (3, 8)}
    ids = torch.randint(0, 11, (3, 5, 4), generator=torch.Generator().manual_seed(0))
    served = PeftModel.from_pretrained(started(Mixed()), tmp_path).eval()
    assert distance(answer(served, ids), answer(model, ids)) < 1e-5


def test_a_sixteen_bit_base_has_its_update_in_float32(tmp_path):
    model = trained(llama().bfloat16(), DEEP)
    report = rows(export_lora(model, tmp_path, rank=99))
    for name, layer in adapted_layers(model).items():
        A, B = factors(tmp_path, name)
        assert distance(B @ A, truth(layer)[1]) < 1e-5
        assert report[name].residual < 2e-7


def test_a_head_that_trains_is_served_with_it(tmp_path):
    model = trained(bert(), DEEP, train=["classifier"])
    with torch.no_grad():
        model.classifier.weight.add_(1)
    export_lora(model, tmp_path, rank=99)
    served = PeftModel.from_pretrained(bert(), tmp_path).eval()
    assert distance(answer(served), answer(model)) < 1e-5


def test_no_update_is_no_residual(tmp_path):
    model = llama()
    adapt(model, DEEP)
    report = export_lora(model, tmp_path)
    assert {row.rank for row in report.layers} == {1}
    assert report.worst == report.whole == 0
    assert answer(PeftModel.from_pretrained(llama(), tmp_path).eval()).equal(answer(model))


def test_a_merged_model_is_written_from_its_adapters(tmp_path):
    model = trained(llama(), DEEP)
    report = export_lora(model, tmp_path / "one", rank=4, max_residual=None)
    merge(model)
    assert export_lora(model, tmp_path / "two", rank=4, max_residual=None) == report
    files = [(tmp_path / place / "adapter_model.safetensors").read_bytes() for place in ("one", "two")]
    assert files[0] == files[1]


def test_the_model_is_left_as_it_is(tmp_path):
    model = trained(llama(), DEEP).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    export_lora(model, tmp_path, rank=4, max_residual=None)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    model(IDS, labels=IDS).loss.backward()


# The report


def test_the_report_prints_ranks_and_residuals(tmp_path):
    model = trained(mlp(), PreDiag(LoRA(r=1)))
    report = export_lora(model, tmp_path, rank=2, max_residual=None)
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "out", "x", "in", "rank", "residual"]
    assert [line.split()[:5] for line in lines[1:4]] == [
        ["0", "10", "x", "6", "2"], ["2", "7", "x", "10", "2"], ["3", "3", "x", "7", "2"]
    ]  # fmt: skip
    assert f"{report.layers[1].residual:.2e}" in lines[2]
    assert f"{report.worst:.2e}" in lines[-1]
    missed = [(row.residual * row.size) ** 2 for row in report.layers]
    assert report.whole == pytest.approx((sum(missed) / sum(row.size**2 for row in report.layers)) ** 0.5)
    assert "more numbers in the LoRA" in str(export_lora(model, tmp_path, rank=99))


# Refusals


def test_a_residual_above_the_bound_is_refused_with_the_rank_that_it_takes(tmp_path):
    model = trained(mlp(), DoRA(LoRA(r=1)))
    export_lora(model, tmp_path, rank=99)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    said = message(export_lora, model, tmp_path, rank=2, max_residual=0.05)
    assert "merge_and_save" in said
    for name, layer in adapted_layers(model).items():
        update = truth(layer)[1]
        needed = next(rank for rank in range(1, 99) if best(update, rank) <= 0.05)
        line = next(line for line in said.splitlines() if line.startswith(f"  - {name}:"))
        assert f"a rank of 2 leaves {best(update, 2):.2%} of the update" in line
        assert f"5.00% takes a rank of {needed} (of {min(update.shape)})" in line
        assert needed > 2
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_updates_that_can_not_be_read_are_refused_all_at_once(tmp_path):
    model = trained(mlp(), LoRA(r=2))
    with torch.no_grad():
        model[0].adapter.A[0, 0] = torch.nan
        model[3].adapter.B[0, 0] = torch.inf
    model[2].merge(keep_base=False)
    said = message(export_lora, model, tmp_path / "place")
    assert "layer '0' has an update that is not finite" in said
    assert "layer '3' has an update that is not finite" in said
    assert "layer '2' was merged with keep_base=False" in said
    assert not list(tmp_path.iterdir())


def test_what_peft_computes_otherwise_is_refused(tmp_path):
    convolutions = {
        "groups=2": nn.Conv2d(4, 4, 3, groups=2),
        "padding_mode='circular'": nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"),
        "dilation=(2, 2)": nn.Conv2d(4, 4, 3, dilation=2),
    }
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"one": shared, "two": shared, "fine": nn.Conv2d(4, 4, 3, stride=2)})
    model.update({f"conv{number}": layer for number, layer in enumerate(convolutions.values())})
    trained(model, LoRA(r=2), ["one", "fine", "conv0", "conv1", "conv2"])
    said = message(export_lora, model, tmp_path / "place")
    for number, reason in enumerate(convolutions):
        assert f"conv{number}: {reason}" in said
    assert "one = two: one layer with several names" in said
    assert "fine" not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options",
    [{"rank": 0}, {"rank": 2.0}, {"rank": True}, {"max_residual": 1e-9}, {"max_residual": float("nan")},
     {"max_residual": None}],
    ids=repr,
)  # fmt: skip
def test_options_that_mean_nothing_are_refused(options, tmp_path):
    said = message(export_lora, trained(mlp(), LoRA(r=2)), tmp_path / "place", **options)
    assert any(name in said for name in options)
    assert not list(tmp_path.iterdir())


# The decomposition


@settings(max_examples=60)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.booleans(), st.integers(0, 999), st.data())
def test_truncations_are_the_best_ones_whatever_the_shape(out, cols, width, thin, seed, data):
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
    base = DenseBase(normal(out, cols), NormCache())
    U, V = normal(out, width), normal(width, cols)
    U[:, : data.draw(st.integers(0, width))] *= data.draw(st.sampled_from([0, 1e-9, 1e3]))
    weight = FactoredWeight(base, U=U, V=RightFactor(base, V), delta=None if thin else normal(out))
    expected = U @ V if thin else weight.delta[:, None] * base.dense() + U @ V
    update, values = Update(weight), torch.linalg.svdvals(expected)
    size = float(values.norm())
    assert update.norm() == pytest.approx(size, rel=1e-12, abs=1e-300)
    rank = data.draw(st.integers(1, 12))
    B, A = update.triplets().factors(rank)
    assert (B.shape, A.shape) == ((out, rank), (rank, cols))
    left = float((expected - B.double() @ A.double()).norm())
    assert update.distance(B, A) == pytest.approx(left, rel=1e-6, abs=1e-12 * size)
    assert left <= float(values[rank:].norm()) + 3e-7 * size
    bound = data.draw(st.sampled_from([1e-6, 1e-3, 0.1, 0.9]))
    needed = update.triplets().rank_for(bound)
    assert float(values[needed:].norm()) <= bound * size
    assert needed == 1 or float(values[needed - 1 :].norm()) > bound * size * 0.97
