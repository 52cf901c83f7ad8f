"""adapt, merge, unmerge, unload, disabled on whole models: targets, reasons, plans, all or nothing."""

import copy
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import adapterzoo as az
from adapterzoo import (
    MAP,
    AdaLoRA,
    AdaptedLinear,
    DoRA,
    Full,
    LoRA,
    PreDiag,
    adapt,
    adapted_layers,
    merge,
    unload,
    unmerge,
)
from adapterzoo.adapter import Adapter
from adapterzoo.errors import MergedError, MisfitError, SpecError, TargetError, UnsupportedLayerError


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 12), nn.GELU(), nn.Linear(12, width))

    def forward(self, x):
        return x + self.mlp(self.q_proj(self.norm(x)) * self.v_proj(x))


class Model(nn.Module):
    """Embedding tied to the output layer, two blocks, a head, a narrow layer."""

    def __init__(self, tied=True):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.narrow = nn.Linear(8, 1)
        self.classifier = nn.Linear(8, 3)
        self.lm_head = nn.Linear(8, 11, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.classifier(x) + self.narrow(x), self.lm_head(x)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


TOKENS = torch.arange(6).reshape(2, 3)
INNER = ["q_proj", "v_proj", "mlp.0", "mlp.2"]


def names(model):
    return sorted(adapted_layers(model))


def snapshot(model):
    return {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}


def assert_untouched(model, before):
    after = snapshot(model)
    assert after.keys() == before.keys()
    for name, (key, flag, value) in before.items():
        assert after[name][0] == key
        assert after[name][1] == flag
        assert torch.equal(after[name][2], value)
    assert not adapted_layers(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_all_linear_leaves_alone_what_it_should_and_says_why(model):
    plan = adapt(model, DoRA(LoRA(r=2)), train=["classifier"])
    assert names(model) == sorted(f"blocks.{i}.{name}" for i in (0, 1) for name in INNER)
    reasons = {item.name: item.reason for item in plan.left_alone}
    assert reasons == {
        "classifier": "it is kept trainable by train='classifier'",
        "lm_head": "its weight is tied to embed.weight",
        "narrow": "r=2 is above min(out, in) = 1",
    }
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trained if ".adapter." not in name} == {"classifier.weight", "classifier.bias"}
    per_block = (8 + 2 * 16) * 2 + (12 + 2 * 20) + (8 + 2 * 20)
    assert sum(item.parameters for item in plan.adapted) == 2 * per_block
    assert plan.trainable_parameters == 2 * per_block + 27
    assert plan.total_parameters == sum(p.numel() for p in model.parameters())


def test_the_plan_prints_what_was_done(model):
    text = str(
        adapt(model, targets={"narrow": None, "mlp.0": Full(), "all-linear": PreDiag(LoRA(r=2))}, train=["classifier"])
    )
    assert re.search(r"blocks\.0\.q_proj +PreDiag\(LoRA\(r=2\)\) +8 x 8 +40", text)
    assert re.search(r"blocks\.1\.mlp\.0 +Full\(\) +12 x 8 +96", text)
    assert "narrow: left alone by targets" in text
    assert "lm_head: its weight is tied to embed.weight" in text
    assert "left alone: 3 layers, frozen unless trained as they are" in text
    assert "no linear layers: 1 Embedding, 2 LayerNorm" in text
    assert "trained as they are: classifier" in text
    assert "dense: blocks.0.mlp.0, blocks.1.mlp.0" in text
    assert re.search(r"\d+ of [\d,]+ parameters train \(\d+\.\d+%\)", text)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj"], ["blocks.0.q_proj", "blocks.1.q_proj"]),
        (["blocks.1.q_proj"], ["blocks.1.q_proj"]),
        (["mlp.0", "narrow"], ["blocks.0.mlp.0", "blocks.1.mlp.0", "narrow"]),
        (r"blocks\.0\..*_proj", ["blocks.0.q_proj", "blocks.0.v_proj"]),
        (re.compile(r".*\.v_proj"), ["blocks.0.v_proj", "blocks.1.v_proj"]),
        (lambda name, module: getattr(module, "in_features", 0) == 12, ["blocks.0.mlp.2", "blocks.1.mlp.2"]),
        ([re.compile(r"blocks\.0\.q.*"), "narrow"], ["blocks.0.q_proj", "narrow"]),
    ],
)  # fmt: skip
def test_targets_of_every_form(model, targets, expected):
    plan = adapt(model, LoRA(r=1), targets=targets)
    assert names(model) == expected
    assert sorted(item.names[0] for item in plan.adapted) == expected
    plan.verify(TOKENS)


def test_an_ordered_mapping_takes_the_first_match(model):
    targets = {r"blocks\.0\.mlp\..*": None, "mlp.0": AdaLoRA(r=2), "all-linear": MAP(LoRA(r=1))}
    adapt(model, targets=targets, exclude=["narrow"])
    specs = {name: repr(layer.spec) for name, layer in adapted_layers(model).items()}
    assert specs == {
        "blocks.0.q_proj": "MAP(LoRA(r=1))",
        "blocks.0.v_proj": "MAP(LoRA(r=1))",
        "blocks.1.q_proj": "MAP(LoRA(r=1))",
        "blocks.1.v_proj": "MAP(LoRA(r=1))",
        "blocks.1.mlp.0": "AdaLoRA(r=2)",
        "blocks.1.mlp.2": "MAP(LoRA(r=1))",
        "classifier": "MAP(LoRA(r=1))",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": ["q_porj"]}, "target 'q_porj' matches no module; did you mean 'q_proj'"),
        ({"targets": ["q_proj", "typo"]}, "target 'typo' matches no module"),
        ({"targets": "q_proj"}, r"read as a regular expression for full names; \['q_proj'\] is a name or its tail"),
        ({"targets": "blocks("}, "is not a regular expression"),
        ({"targets": []}, "targets is empty"),
        ({"targets": {}}, "leave out the spec"),
        ({"targets": {"q_proj": LoRA()}}, "leave out the spec"),
        ({"targets": lambda name, module: False}, "matches no module"),
        ({"targets": None}, "targets is None; it should be"),
        (
            {"targets": [nn.Linear(2, 2)]},
            "a target is a name, a regular expression, a predicate or a class, not Linear",
        ),
        ({"targets": int}, "targets is <class 'int'>; it should be"),
        ({"targets": [int]}, "a target is a name, a regular expression, a predicate or a class, not <class 'int'>"),
        ({"targets": nn.Conv2d}, "target <Conv2d> matches no module"),
        ({"targets": "all_linear"}, "did you mean 'all-linear'"),
        ({"targets": ["blocks.*.q_proj"]}, r"entries of a list are names: for an expression write re.compile"),
        ({"targets": [3]}, "a target is a name, a regular expression, a predicate or a class, not 3"),
        ({"targets": [""]}, "the model itself"),
        ({"targets": ["lm_head"]}, r"lm_head \(Linear\): its weight is tied to embed.weight"),
        ({"targets": ["narrow"], "spec": LoRA(r=2)}, r"narrow \(Linear\): r=2 is above min\(out, in\) = 1"),
        ({"targets": ["classifier"], "train": ["classifier"]}, "kept trainable by train='classifier'"),
        ({"targets": ["norm"]}, r"blocks.0.norm \(LayerNorm\), .*: layers of its class can't be; nn.Linear, "),
        ({"targets": ["embed"]}, r"embed \(Embedding\): its weight is tied to lm_head.weight"),
        (
            {"targets": ["blocks.0"]},
            r"blocks.0 \(Block\): it holds other modules.*for the 4 layers .*\(q_proj\|v_proj\|0\|2\)'",
        ),
        ({"targets": "blocks.*"}, r"blocks.0.norm \(LayerNorm\)[\s\S]*blocks.1.mlp.1 \(GELU\)"),
        ({"exclude": ["clasifier"]}, "exclude 'clasifier' matches no module; did you mean 'classifier'"),
        ({"exclude": ["q_proj"], "targets": ["q_proj"]}, "matches only layers that are excluded or taken"),
        ({"train": ["heads"]}, "train='heads' names no module"),
        ({"train": "classifier"}, r"train is a list of names"),
        ({"targets": ["q_proj", "blocks.0.q_proj"]}, "taken by earlier targets"),
        ({"spec": LoRA(r=500)}, r"no layer is left to adapt[\s\S]*blocks.0.q_proj, [^:]*, and 2 more: r=500 is above"),
    ],
)
def test_bad_targets_name_what_is_wrong_and_change_nothing(model, arguments, message):
    before = snapshot(model)
    with pytest.raises(TargetError, match=message):
        adapt(model, **{"spec": LoRA(r=1), **arguments})
    assert_untouched(model, before)


def test_other_bad_arguments(model):
    with pytest.raises(TargetError, match="needs a spec such as"):
        adapt(model)
    with pytest.raises(SpecError, match=r"adapt needs a spec, but got the class LoRA; build it: LoRA\(...\)"):
        adapt(model, LoRA)
    with pytest.raises(SpecError, match=r"not 'LoRA.*parse"):
        adapt(model, "LoRA(r=8)")
    for value in ("LoRA(r=8)", LoRA):
        with pytest.raises(SpecError, match="target 'q_proj' needs a spec or None"):
            adapt(model, targets={"q_proj": value})
    with pytest.raises(SpecError, match="adapter_dtype='bf16' is not valid"):
        adapt(model, LoRA(r=1), adapter_dtype="bf16")
    for seed in (1.0, True, None, "1"):
        with pytest.raises(SpecError, match="is not valid: it should be a whole number"):
            adapt(model, LoRA(r=1), seed=seed)
    with pytest.raises(TargetError, match=r"adapt changes a torch.nn.Module, not dict"):
        adapt({}, LoRA())
    with pytest.raises(UnsupportedLayerError, match=r"write AdaptedLinear\(layer, spec\)"):
        adapt(nn.Linear(3, 3), LoRA(r=1))
    with pytest.raises(UnsupportedLayerError, match="adapted already"):
        adapt(AdaptedLinear(nn.Linear(3, 3), LoRA(r=1)), LoRA(r=1))
    with pytest.raises(TargetError, match="has no adapted layer"):
        merge(model)


def test_a_failure_while_building_leaves_the_model_as_it_was(model, monkeypatch):
    before = snapshot(model)
    original, count = Adapter.__init__, iter(range(100))

    def third_time_unlucky(self, *arguments, **options):
        original(self, *arguments, **options)
        if next(count) == 2:
            raise MemoryError

    monkeypatch.setattr(Adapter, "__init__", third_time_unlucky)
    with pytest.raises(MemoryError):
        adapt(model, LoRA(r=1))
    monkeypatch.undo()
    assert_untouched(model, before)


def test_adapting_twice_is_an_error_but_other_layers_may_follow(model):
    adapt(model, LoRA(r=1), targets=["q_proj"], train=["classifier"])
    for targets in ("all-linear", ["q_proj"], r".*\.q_proj"):
        with pytest.raises(TargetError, match=r"blocks.0.q_proj \(AdaptedLinear\), .*: it is adapted already"):
            adapt(model, LoRA(r=1), targets=targets)
    plan = adapt(model, DoRA(LoRA(r=1)), targets=["v_proj"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".adapter")[0] for name in trained} == {
        *(f"blocks.{i}.{name}_proj" for i in (0, 1) for name in "qv"), "classifier.weight", "classifier.bias"
    }  # fmt: skip
    assert {item.name: item.reason for item in plan.left_alone}["blocks.0.q_proj"] == "adapted already"
    assert plan.trained == ("classifier",)
    with pytest.raises(TargetError, match=r"train='q_proj' names no module.* but adapted ones"):
        adapt(model, LoRA(r=1), targets=["mlp.0"], train=["q_proj"])
    adapt(model, LoRA(r=1), targets=["mlp.0"], train=["blocks.0"], exclude=["blocks.0.mlp.0"])
    assert not model.blocks[0].q_proj.weight.requires_grad
    assert model.blocks[0].norm.weight.requires_grad
    assert not model.blocks[1].norm.weight.requires_grad


def test_a_shared_module_is_adapted_once_under_all_its_names(model):
    shared = model.blocks[0].q_proj
    model.blocks[1].q_proj = shared
    model.alias = model.blocks[0]
    plan = adapt(model, LoRA(r=2), targets=["q_proj"])
    assert plan.adapted[0].names == ("blocks.0.q_proj", "blocks.1.q_proj", "alias.q_proj")
    assert len(plan.adapted) == 1
    assert model.blocks[0].q_proj is model.blocks[1].q_proj is model.alias.q_proj
    assert isinstance(model.alias.q_proj, AdaptedLinear)
    unload(model, merge=False)
    assert model.blocks[0].q_proj is model.blocks[1].q_proj is shared


def test_two_layers_that_share_a_weight_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    plan = adapt(model, LoRA(r=1))
    assert [item.names for item in plan.adapted] == [("2",)]
    assert {item.name: item.reason for item in plan.left_alone} == {
        "0": "its weight is tied to 1.weight", "1": "its weight is tied to 0.weight"
    }  # fmt: skip


def with_output_embedding():
    model = Model(tied=False)
    model.get_output_embeddings = lambda: model.lm_head
    return model


def test_output_embeddings_are_left_alone():
    model = with_output_embedding()
    plan = adapt(model, LoRA(r=1))
    assert {item.name: item.reason for item in plan.left_alone} == {"lm_head": "it is the model's output embedding"}
    with pytest.raises(TargetError, match="output embedding"):
        adapt(with_output_embedding(), LoRA(r=1), targets=["lm_head"])


def test_the_insides_of_multihead_attention_are_left_alone():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "out": nn.Linear(8, 8)})
    plan = adapt(model, LoRA(r=1))
    assert names(model) == ["out"]
    assert "reads its weight itself" in str(plan)
    with pytest.raises(TargetError, match=r"nn\.MultiheadAttention reads its weight itself"):
        adapt(nn.ModuleDict({"a": nn.MultiheadAttention(8, 2)}), LoRA(r=1), targets=["out_proj"])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("norm_first", [False, True])
def test_inside_torchs_fused_encoder(norm_first):
    """In evaluation without gradient torch's fused path would read linear1.weight itself and bypass the adapter."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
    plan = adapt(model, MAP(DoRA(LoRA(r=2))))
    assert [item.names[0] for item in plan.adapted] == [
        "layers.0.linear1",
        "layers.0.linear2",
        "layers.1.linear1",
        "layers.1.linear2",
    ]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(2, 5, 8)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    for mask in (None, padding):
        expected = model.train()(x, src_key_padding_mask=mask).detach()
        with torch.no_grad(), az.disabled(model):
            base = model.eval()(x, src_key_padding_mask=mask)
        with torch.no_grad():
            y = model.eval()(x, src_key_padding_mask=mask)
        keep = slice(None) if mask is None else ~mask
        torch.testing.assert_close(y[keep], expected[keep], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(y[keep], base[keep], atol=1e-3)
    plan.verify((x,))
    plan.verify({"src": x, "src_key_padding_mask": padding})


def test_verify_finds_a_layer_that_is_not_called(model):
    model.spare = nn.Linear(8, 8)
    plan = adapt(model, LoRA(r=1))
    model.blocks[0].train(False)
    with pytest.raises(TargetError, match=r"1 adapted layer not called by this input:\n  - spare"):
        plan.verify(TOKENS)
    assert model.training
    assert not model.blocks[0].training
    assert not model.spare._forward_hooks


def perturbed(model, spec=MAP(DoRA(LoRA(r=2))), **options):
    adapt(model, spec, **options)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            for parameter in layer.adapter.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def outputs(model):
    with torch.no_grad():
        return torch.cat([y.flatten() for y in model(TOKENS)])


def test_merge_unmerge_disabled_and_unload_on_a_model(model):
    plain = copy.deepcopy(model)
    original = outputs(model)
    perturbed(model, exclude=["narrow"])
    adapted = outputs(model)
    assert not torch.allclose(adapted, original, atol=1e-3)
    with az.disabled(model):
        assert torch.equal(outputs(model), original)
        with az.disabled(model):
            pass
        assert torch.equal(outputs(model), original)
    merge(model)
    torch.testing.assert_close(outputs(model), adapted, rtol=1e-5, atol=1e-5)
    with az.disabled(model):
        assert torch.equal(outputs(model), original)
    with pytest.raises(MergedError, match=r"'blocks.0.q_proj' is already merged"):
        merge(model)
    unmerge(model)
    assert torch.equal(outputs(model), adapted)
    with pytest.raises(MergedError, match=r"'blocks.0.q_proj' is not merged"):
        unmerge(model)
    assert unload(model, merge=True) is model
    assert not adapted_layers(model)
    torch.testing.assert_close(outputs(model), adapted, rtol=1e-5, atol=1e-5)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert type(model.blocks[0].q_proj) is nn.Linear


@pytest.mark.parametrize("merged", [False, True])
def test_unload_without_merging_gives_the_base_back_bit_for_bit(model, merged):
    plain = copy.deepcopy(model.state_dict())
    perturbed(model)
    if merged:
        merge(model, base_device="cpu")
    unload(model, merge=False)
    for name, value in model.state_dict().items():
        assert torch.equal(value, plain[name])


def test_unload_of_a_merged_model_keeps_the_merge(model):
    perturbed(model)
    adapted = outputs(model)
    merge(model, keep_base=False)
    with pytest.raises(MergedError, match="keep_base=False"):
        unload(model, merge=False)
    assert len(adapted_layers(model)) > 0
    torch.testing.assert_close(outputs(unload(model, merge=True)), adapted, rtol=1e-5, atol=1e-5)


def test_a_single_layer_is_a_model_too():
    linear = nn.Linear(5, 4)
    layer = AdaptedLinear(linear, LoRA(r=2))
    with torch.no_grad():
        layer.adapter.B.normal_()
    effective = layer.effective_weight().detach()
    merge(layer)
    unmerge(layer)
    assert unload(layer, merge=True) is linear
    assert torch.equal(linear.weight, effective)


def test_a_partly_merged_model_is_all_or_nothing(model):
    perturbed(model)
    model.blocks[1].v_proj.merge()
    with pytest.raises(MergedError, match=r"'blocks.1.v_proj' is already merged"):
        merge(model)
    assert [name for name, layer in adapted_layers(model).items() if layer.merged] == ["blocks.1.v_proj"]
    with pytest.raises(MergedError, match=r"'blocks.0.q_proj' is not merged"):
        unmerge(model)
    with pytest.raises(MergedError, match=r"'blocks.1.v_proj' is merged"):
        az.reset_adapters(model)


def test_reset_adapters_starts_again(model):
    fresh = copy.deepcopy(model)
    adapt(fresh, MAP(LoRA(r=1)), seed=7)
    perturbed(model, MAP(LoRA(r=1)), seed=3)
    az.reset_adapters(model, seed=7)
    for name, value in model.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name]), name


def test_draws_do_not_depend_on_the_choice_of_other_targets(model):
    other = copy.deepcopy(model)
    adapt(model, LoRA(r=1))
    adapt(other, MAP(DoRA(LoRA(r=1))), targets=["blocks.1.v_proj"])
    assert torch.equal(model.blocks[1].v_proj.adapter.A, other.blocks[1].v_proj.adapter.generator.A)
    assert not torch.equal(model.blocks[0].v_proj.adapter.A, model.blocks[1].v_proj.adapter.A)


def test_a_model_trains_and_only_what_should(model):
    adapt(model, DoRA(LoRA(r=2)), train=["classifier"], exclude=["narrow"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        optimiser.zero_grad()
        y, _ = model(TOKENS)
        y.square().sum().backward()
        optimiser.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".adapter." in name or name.startswith("classifier.")}


def test_an_adapted_model_moves_with_the_model(model):
    perturbed(model).to(torch.bfloat16)
    layer = model.blocks[0].q_proj
    assert layer.weight.dtype is torch.bfloat16
    assert layer.adapter.alpha.dtype is torch.float32
    assert model(TOKENS)[0].dtype is torch.bfloat16


def test_a_model_without_linear_layers():
    with pytest.raises(TargetError, match=r"the model has no nn\.Linear layer to adapt; it has Conv2d, ReLU"):
        adapt(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()), LoRA(r=2))


def test_misfits_name_the_layer():
    with pytest.raises(MisfitError, match="layer 'up'"):
        AdaptedLinear(nn.Linear(3, 3), LoRA(r=4), name="up")


def test_a_bias_may_train_beside_an_adapter(model):
    plan = adapt(model, LoRA(r=1), train=["bias"])
    assert len(plan.adapted) == 9 + 1
    trained = {name for name, p in model.named_parameters() if p.requires_grad and ".adapter." not in name}
    assert trained == {name for name, _ in model.named_parameters() if name.endswith("bias")}
    y, _ = model(TOKENS)
    y.square().sum().backward()
    assert model.blocks[0].q_proj.bias.grad.any()


def test_a_layer_of_two_models_is_adapted_once():
    trunk = nn.Linear(6, 6)
    actor, critic = nn.Sequential(trunk, nn.Linear(6, 2)), nn.Sequential(trunk, nn.Linear(6, 1))
    adapt(actor, LoRA(r=1))
    with pytest.raises(UnsupportedLayerError, match="adapted already"):
        AdaptedLinear(trunk, LoRA(r=1))
    plan = adapt(critic, LoRA(r=1))
    assert [item.names for item in plan.adapted] == [("1",)]
    assert "adapted already" in str(plan)
    unload(actor, merge=False)
    adapt(critic, LoRA(r=1), targets=["0"])


def test_models_with_merged_layers_are_not_adapted_further(model):
    adapt(model, LoRA(r=1), targets=["q_proj"])
    merge(model)
    with pytest.raises(MergedError, match=r"unmerge before adapting[\s\S]*blocks.0.q_proj"):
        adapt(model, LoRA(r=1), targets=["v_proj"])


def test_verify_needs_something_to_verify(model):
    plan = adapt(model, LoRA(r=1))
    unload(model, merge=False)
    with pytest.raises(TargetError, match="no adapted layer"):
        plan.verify(TOKENS)


def test_a_model_that_does_not_tell_its_output_embeddings(model):
    def raises():
        raise NotImplementedError

    model.get_output_embeddings = raises
    adapt(model, LoRA(r=1))


def test_names_and_expressions_match_as_documented():
    def fresh():
        return nn.ModuleDict({"proj": nn.Linear(4, 4), "q_proj": nn.Linear(4, 4), "q": nn.Linear(4, 4)})

    model = fresh()
    adapt(model, LoRA(r=1), targets=["proj"])
    assert names(model) == ["proj"]
    model = fresh()
    adapt(model, LoRA(r=1), targets="q")
    assert names(model) == ["q"]
    model = nn.ModuleDict({"head": nn.Linear(4, 4), "head2": nn.Linear(4, 4)})
    adapt(model, LoRA(r=1), train=["head"])
    assert names(model) == ["head2"]
    assert {name for name, p in model.named_parameters() if p.requires_grad and "adapter" not in name} == {
        "head.weight", "head.bias"
    }  # fmt: skip
    with pytest.raises(TargetError, match="target 'q_porj' matches no module; did you mean 'q_proj'"):
        adapt(fresh(), targets={"q_porj": LoRA(r=1)})
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)))
    adapt(model, LoRA(r=1), targets=".*")
    assert names(model) == ["0.0"]


def test_every_name_of_a_shared_module_counts(model):
    model.alias = model.blocks[0]
    other = copy.deepcopy(model)
    adapt(model, LoRA(r=1), targets=["alias.q_proj"])
    assert isinstance(model.blocks[0].q_proj, AdaptedLinear)
    adapt(other, LoRA(r=1), targets=[re.compile(r"alias\..*_proj")], train=["alias.mlp"])
    assert isinstance(other.blocks[0].v_proj, AdaptedLinear)
    assert other.blocks[0].mlp[0].weight.requires_grad


def test_a_failing_train_entry_changes_nothing():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model.codes = nn.Module()
    model.codes.weight = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(
        TargetError, match=r"train='codes' names parameters that can't train, they are no floats: codes.weight"
    ):
        adapt(model, LoRA(r=2), ["0"], train=["codes"])
    assert not adapted_layers(model)
    assert model[0].weight.requires_grad
    adapt(model, LoRA(r=2), ["0"])


def test_arguments_reach_the_layers(model):
    adapt(model, DoRA(LoRA(r=1)), adapter_dtype=torch.bfloat16)
    adapter = model.blocks[0].q_proj.adapter
    assert adapter.inner.A.dtype is torch.bfloat16
    assert adapter.magnitude.dtype is torch.float32
    with pytest.raises(MergedError, match="the meta device can't keep"):
        merge(model, base_device="meta")


def test_all_or_nothing_where_the_last_layer_fails(model):
    adapt(model, LoRA(r=1), exclude=["narrow"])
    layers = adapted_layers(model)
    *_, last = layers.values()
    with torch.no_grad():
        last.adapter.B.fill_(float("inf"))
    for operation in (lambda: merge(model), lambda: unload(model, merge=True)):
        with pytest.raises(MergedError, match=f"'{last.name}'"):
            operation()
        assert not any(layer.merged for layer in layers.values())
        assert adapted_layers(model).keys() == layers.keys()
    with torch.no_grad():
        last.adapter.B.zero_()
    for layer in layers.values():
        layer.merge(keep_base=layer is not last)
    for operation in (lambda: unmerge(model), lambda: unload(model, merge=False)):
        with pytest.raises(MergedError, match=f"'{last.name}' was merged with keep_base=False"):
            operation()
        assert all(layer.merged for layer in layers.values())
        assert adapted_layers(model).keys() == layers.keys()


def test_verify_leaves_statistics_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    adapt(model, LoRA(r=1)).verify(torch.randn(3, 4))
    assert int(model[1].num_batches_tracked) == 0


def test_plans_show_dense_updates_under_wrappers_and_shorten_lists():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
    text = str(adapt(model, MAP(Full())))
    assert "dense: 0, 1, 2, 3, and 2 more" in text
    small = nn.Sequential(nn.Linear(2, 2))
    assert "10 of 16 parameters train (62.500%)" in str(adapt(small, DoRA(LoRA(r=2))))


def test_a_class_means_its_instances_and_leaves_alone_what_it_should(model):
    plan = adapt(model, LoRA(r=2), nn.Linear)
    assert {item.names[0] for item in plan.adapted} == {item.names[0] for item in adapt(Model(), LoRA(r=2)).adapted}
    assert any(item.name == "lm_head" and "tied" in item.reason for item in plan.left_alone)
    plan = adapt(Model(), targets={nn.Embedding: LoRA(r=2), (lambda name, _: name.endswith("v_proj")): DoRA(LoRA(r=2))})
    assert [type(item.spec).__name__ for item in plan.adapted] == ["DoRA"] * 2
    assert any(item.name == "embed" and "tied" in item.reason for item in plan.left_alone)


def test_the_expression_that_a_message_suggests_works(model):
    with pytest.raises(TargetError) as error:
        adapt(model, LoRA(r=2), ["blocks.0"])
    expression = re.search(r"expression: '(.*)'", str(error.value)).group(1)
    assert {item.names[0].startswith("blocks.0.") for item in adapt(model, LoRA(r=2), expression).adapted} == {True}


def test_adapters_of_peft_are_not_taken_for_layers_of_the_model():
    model = get_peft_model(Model(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(TargetError, match=r"adapters of PEFT's already \('.*q_proj'\).*adapterzoo\.import_peft"):
        adapt(model, LoRA(r=2))
