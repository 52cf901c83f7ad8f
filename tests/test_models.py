"""Whole models, driven through their own forward and generate: adapted, trained, merged, off, on the meta device."""

import re

import pytest
import torch
from models import MODELS, as_matrix, as_stored
from reference import adapted as dense_reference
from reference import tree_of
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel, T5ForConditionalGeneration

import adapterzoo as az
from adapterzoo import MAP, SORA, AdaLoRA, DoRA, FLoRA, LoRA, PreDiag, adapt, adapted_layers, disabled, merge, unmerge
from adapterzoo.checkpoint.loading import load
from adapterzoo.checkpoint.saving import save
from adapterzoo.errors import TargetError, UninitialisedError

SPECS = [
    LoRA(r=2, alpha=6),
    MAP(AdaLoRA(r=2, alpha=5)),
    DoRA(LoRA(r=2, alpha=3)),
    SORA(PreDiag(FLoRA(r=(2, 1), scale=1.5)), rank=2),
    MAP(DoRA(LoRA(r=2, alpha=7))),
]
PAIRS = [(name, SPECS[(2 * i + j) % len(SPECS)]) for i, name in enumerate(MODELS) for j in (0, 3)]
WRITERS = [name for name, whole in MODELS.items() if whole.prompt is not None]
DEEP = MAP(DoRA(LoRA(r=2, alpha=7)))

pairs = pytest.mark.parametrize(("name", "spec"), PAIRS, ids=[f"{name}-{spec}" for name, spec in PAIRS])
every = pytest.mark.parametrize("name", MODELS)


def adapted_model(name, spec, targets=None, perturb=True):
    """A model with an adapter on every layer that can have one, and every trained number away from its start."""
    model = MODELS[name].model()
    plan = adapt(model, spec, targets or MODELS[name].adaptable(model), seed=3)
    return (perturbed(model) if perturb else model), plan


def perturbed(model):
    numbers = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            for value in layer.adapter.parameters():
                step = torch.randn(value.shape, generator=numbers)
                value.add_(0.2 * step * value.abs().mean().clamp(min=0.2))
    return model


def frozen(model):
    return {key: value.clone() for key, value in model.state_dict().items() if ".adapter." not in key}


def assert_same_bits(model, before):
    after = frozen(model)
    assert after.keys() == before.keys()
    assert [key for key in before if not after[key].equal(before[key])] == []


def assert_close(actual, expected):
    """To 1e-5 of the largest value."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def gradients(whole, model):
    model.zero_grad()
    whole.loss(model).backward()
    return {key: value.grad for key, value in model.named_parameters() if value.requires_grad}


@pairs
def test_a_model_starts_where_its_base_stands_and_calls_every_adapter(name, spec):
    whole = MODELS[name]
    model, plan = adapted_model(name, spec, perturb=False)
    plan.verify(whole.example())
    assert {item.names[0] for item in plan.adapted} == set(whole.adaptable(whole.model()))
    assert_close(whole.answer(model), whole.answer(whole.model()))


def true_weight(layer):
    """W' of a layer in float64, by the dense reference, in the layout of the plain layer; and what it is made of."""
    tree, leaves = tree_of(layer.adapter)
    W = as_matrix(layer.base, layer.weight).double()
    return as_stored(layer.base, W + dense_reference(W, tree).update), leaves


def plain_twin(name, model):
    """The plain model with the reference's W' in the place of every adapted weight."""
    twin = MODELS[name].model()
    with torch.no_grad():
        for path, layer in adapted_layers(model).items():
            twin.get_submodule(path).weight.copy_(true_weight(layer)[0])
    return twin


@pairs
def test_a_model_computes_what_the_plain_model_does_with_the_reference_s_weights(name, spec):
    whole = MODELS[name]
    model, _ = adapted_model(name, spec)
    answer, base = whole.answer(model), whole.answer(whole.model())
    assert_close(answer, whole.answer(plain_twin(name, model)))
    assert (answer - base).norm() > 0.01 * base.norm()
    for layer in adapted_layers(model).values():
        weight = layer.effective_weight().detach()
        assert weight.shape == layer.weight.shape
        assert_close(weight.double(), true_weight(layer)[0].detach())


@pairs
def test_gradients_are_those_of_the_plain_model_through_the_reference_s_weights(name, spec):
    whole = MODELS[name]
    model, _ = adapted_model(name, spec)
    layers, plain = adapted_layers(model), whole.model()
    true = {path: true_weight(layer) for path, layer in layers.items()}
    weights = {f"{path}.weight": weight.float() for path, (weight, _) in true.items()}
    whole.loss(lambda **inputs: functional_call(plain, weights, (), inputs)).backward()
    actual = gradients(whole, model)
    for path, (_, leaves) in true.items():
        trained = [key for key, leaf in leaves.items() if leaf.requires_grad]
        expected = torch.cat([leaves[key].grad.flatten() for key in trained])
        given = torch.cat([actual[f"{path}.adapter.{key}"].flatten() for key in trained]).double()
        assert expected.any()
        assert (given - expected).norm() < 2e-5 * expected.norm(), path


@pairs
def test_merging_changes_no_answer_and_unmerging_restores_every_bit(name, spec):
    whole = MODELS[name]
    model, _ = adapted_model(name, spec)
    plain = whole.model()
    base, answer, before = whole.answer(plain), whole.answer(model), frozen(model)
    with disabled(model):
        assert whole.answer(model).equal(base)
    merge(model)
    assert_close(whole.answer(model), answer)
    assert_same_bits(model, before)  # a merged model's files hold the base too
    with disabled(model):
        assert whole.answer(model).equal(base)
    unmerge(model)
    assert_same_bits(model, before)
    assert_same_bits(plain, before)
    assert whole.answer(model).equal(answer)
    az.unload(model, merge=True)
    assert_close(whole.answer(model), answer)
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]


@pairs
def test_training_lowers_the_loss_moves_every_adapter_and_leaves_the_base_alone(name, spec):
    whole = MODELS[name]
    model, _ = adapted_model(name, spec, perturb=False)
    before = frozen(model)
    start = {key: value.detach().clone() for key, value in model.named_parameters() if value.requires_grad}
    optimiser = torch.optim.AdamW(az.param_groups(model, lr=5e-3))
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # its statistics are no parameters: nothing but this freezes them
    losses = []
    for _ in range(5):
        loss = whole.loss(model)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert_same_bits(model, before)
    assert all(".adapter." in key for key in start)
    assert [key for key, value in start.items() if model.get_parameter(key).equal(value)] == []


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("spec", [DEEP, SPECS[3]], ids=repr)
def test_generation_with_a_cache_without_and_merged_is_that_of_the_plain_model(name, spec):
    whole = MODELS[name]
    model, _ = adapted_model(name, spec)
    logits = whole.logits(model, use_cache=True)
    assert_close(whole.logits(model, use_cache=False), logits)
    assert_close(whole.logits(plain_twin(name, model), use_cache=True), logits)
    merge(model)
    assert_close(whole.logits(model, use_cache=True), logits)
    plain = whole.model().requires_grad_(False)  # torch's attention differs in the last bit where weights train
    with disabled(model):
        assert whole.logits(model, use_cache=True).equal(whole.logits(plain, use_cache=True))


@every
def test_all_linear_means_every_linear_layer_and_says_what_it_leaves_alone_and_why(name):
    whole = MODELS[name]
    model = whole.model()
    plan = adapt(model, LoRA(r=2))
    assert len(plan.adapted) == len(adapted_layers(model)) == whole.all_linear
    plan.verify(whole.example())
    reasons = {item.name: item.reason for item in plan.left_alone}
    assert reasons.keys() == whole.left_alone.keys()
    assert all(part in reasons[layer] for layer, part in whole.left_alone.items())


REFUSED = [
    ("qwen2", "lm_head", "its weight is tied to model.embed_tokens.weight"),
    ("qwen2", "model.embed_tokens", "its weight is tied to lm_head.weight"),
    ("gpt2", "transformer.wte", "its weight is tied to lm_head.weight"),
    ("t5", "shared", "its weight is tied to decoder.embed_tokens.weight, encoder.embed_tokens.weight, lm_head.weight"),
    ("whisper", "model.decoder.embed_tokens", "its weight is tied to proj_out.weight"),
    ("whisper", "model.decoder.embed_positions", "forward of its own"),
    ("llama", "lm_head", "output embedding"),
    ("mixtral", "model.layers.0.mlp.experts", "MixtralExperts"),
    ("mixtral", "model.layers.0.mlp.gate", "MixtralTopKRouter"),
    ("vit", "vit.embeddings", "holds other modules"),
]


@pytest.mark.parametrize(("name", "layer", "reason"), REFUSED, ids=lambda value: str(value).split(" ")[0])
def test_what_can_not_be_adapted_is_refused_by_name_with_the_reason(name, layer, reason):
    model = MODELS[name].model()
    before, flags = frozen(model), [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(TargetError, match=re.escape(reason)) as caught:
        adapt(model, LoRA(r=2), [layer])
    assert layer in str(caught.value)
    assert not adapted_layers(model)
    assert_same_bits(model, before)
    assert flags == [parameter.requires_grad for parameter in model.parameters()]


@pytest.mark.parametrize("name", [name for name, whole in MODELS.items() if whole.bypassed])
def test_verify_names_a_layer_whose_weight_the_model_reads_itself(name):
    whole = MODELS[name]
    plan = adapt(whole.model(), LoRA(r=2), ["query_proj", whole.bypassed])
    with pytest.raises(TargetError, match=f"1 adapted layer not called by this input:\n  - {whole.bypassed}$"):
        plan.verify(whole.example())


def checkpoint_activations(model, reentrant):
    if hasattr(model, "enable_gradient_checkpointing"):  # of diffusers, never re-entrant
        return model.enable_gradient_checkpointing()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    return model.enable_input_require_grads() if reentrant else None


CHECKPOINTED = [name for name, whole in MODELS.items() if whole.checkpoints]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_checkpointing_of_activations_changes_no_gradient(name, reentrant):
    whole = MODELS[name]
    model, _ = adapted_model(name, DEEP)
    model.train()
    calls = []
    model.get_submodule(whole.checkpoints).register_forward_hook(lambda *_: calls.append(1))
    expected, once = gradients(whole, model), len(calls)
    checkpoint_activations(model, reentrant)
    actual = gradients(whole, model)
    assert len(calls) == 3 * once > 0  # once before; now once forward, and again for the backward
    assert [key for key, value in expected.items() if value is None or not value.any()] == []
    for path, layer in adapted_layers(model).items():
        keys = [f"{path}.adapter.{key}" for key, _ in layer.adapter.named_parameters()]
        assert_close(*(torch.cat([side[key].flatten() for key in keys]) for side in (actual, expected)))


def built_on_meta(name):
    """Adapted on the meta device, materialised, with the values of its base: what is left to do is its adapters."""
    whole = MODELS[name]
    with torch.device("meta"):
        model = whole.build().eval()
    adapt(model, DEEP, whole.adaptable(model), seed=3)
    assert all(value.is_meta for value in model.parameters())
    model.to_empty(device="cpu")
    if isinstance(model, PreTrainedModel):
        model.init_weights()  # what no file holds, rotary frequencies and such, and tied weights
    found = model.load_state_dict(whole.model().state_dict(), strict=False)
    assert not found.unexpected_keys
    assert all(".adapter." in key for key in found.missing_keys)
    return model


@every
def test_a_model_built_on_the_meta_device_is_the_model_built_at_once(name):
    whole = MODELS[name]
    expected, _ = adapted_model(name, DEEP)
    model = built_on_meta(name)
    with pytest.raises(UninitialisedError):
        whole.answer(model)
    az.reset_adapters(model)
    assert whole.answer(perturbed(model)).equal(whole.answer(expected))


@pairs
def test_saved_adapters_make_the_same_model_of_a_fresh_base(name, spec, tmp_path):
    whole = MODELS[name]
    model, _ = adapted_model(name, spec)
    answer = whole.answer(model)
    merge(model)
    save(model, tmp_path)  # a merged model's files are those of the same model unmerged
    fresh = whole.model()
    load(fresh, tmp_path)
    assert {path: layer.spec for path, layer in adapted_layers(fresh).items()} == {
        path: layer.spec for path, layer in adapted_layers(model).items()
    }
    assert whole.answer(fresh).equal(answer)
    assert {key for key, value in fresh.named_parameters() if value.requires_grad} == {
        key for key, value in model.named_parameters() if value.requires_grad
    }


@every
def test_saved_adapters_load_into_a_model_built_on_the_meta_device(name, tmp_path):
    whole = MODELS[name]
    expected, _ = adapted_model(name, DEEP)
    save(expected, tmp_path)
    model = built_on_meta(name)
    load(model, tmp_path)
    assert whole.answer(model).equal(whole.answer(expected))


@every
def test_sixteen_bits_move_the_base_and_not_the_adapters(name):
    whole = MODELS[name]
    model, _ = adapted_model(name, DEEP)
    expected = whole.answer(model)
    model.to(torch.bfloat16)
    answer = whole.answer(model, torch.bfloat16)
    assert answer.dtype is torch.bfloat16
    assert (answer.float() - expected).norm() < 0.05 * expected.norm()
    layers = adapted_layers(model).values()
    assert {layer.weight.dtype for layer in layers} == {torch.bfloat16}
    assert {value.dtype for layer in layers for value in layer.adapter.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", [name for name in MODELS if name != "convnet"])
def test_what_save_pretrained_writes_is_read_as_the_base_and_after_unload_as_the_merged_model(name, tmp_path):
    whole = MODELS[name]
    model, _ = adapted_model(name, DEEP)
    answer = whole.answer(model)
    model.save_pretrained(tmp_path / "adapted")
    base = type(model).from_pretrained(tmp_path / "adapted").eval()
    assert not adapted_layers(base)
    assert whole.answer(base).equal(whole.answer(whole.model()))
    az.unload(model, merge=True).save_pretrained(tmp_path / "merged")
    assert_close(whole.answer(type(model).from_pretrained(tmp_path / "merged").eval()), answer)


@pytest.mark.parametrize("name", ["llama", "gpt2", "convnet"])
def test_torch_compile_takes_a_whole_model_as_one_graph(name):
    whole = MODELS[name]
    model, _ = adapted_model(name, DEEP)
    inputs = {key: value for key, value in whole.example().items() if key != "labels"}
    with torch.no_grad():
        answer = torch.compile(model, backend="eager", fullgraph=True)(**inputs)["logits"]
    assert_close(answer, whole.answer(model))


def test_t5_keeps_the_layers_in_float32_that_transformers_keeps_in_float32(tmp_path):
    whole = MODELS["t5"]
    whole.model().save_pretrained(tmp_path)
    model = T5ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float16).eval()
    adapt(model, DEEP, whole.adaptable(model), seed=3)
    kept = {path: layer.weight.dtype for path, layer in adapted_layers(model).items()}
    assert {dtype for path, dtype in kept.items() if path.endswith("wo")} == {torch.float32}
    assert {dtype for path, dtype in kept.items() if not path.endswith("wo")} == {torch.float16}
    answer, expected = whole.answer(perturbed(model)), whole.answer(adapted_model("t5", DEEP)[0])
    assert (answer.float() - expected).norm() < 0.05 * expected.norm()
