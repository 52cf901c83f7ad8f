"""PEFT's files, both ways, held to the installed peft: the same functions, the same files, and no silent difference."""

import copy
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers as tf
from hypothesis import example, given
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import nn

from adapterzoo import MAP, SORA, AdaLoRA, DoRA, FLoRA, LoRA, PreDiag, adapt, adapted_layers, attach, compact, unload
from adapterzoo.errors import PeftError, SpecError, TargetError
from adapterzoo.interop.peft_config import read_config
from adapterzoo.interop.peft_export import export_peft
from adapterzoo.interop.peft_import import import_peft
from adapterzoo.interop.peft_names import exact_patterns, exact_targets, is_meant, value_for

# peft 0.21 asks Transformers 5 by an old name.
DEPRECATED = "`is_gradient_checkpointing` is deprecated"
pytestmark = pytest.mark.filterwarnings(f"ignore:{DEPRECATED}:FutureWarning")
CLOSE = 1e-5  # relative, in float32
TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 19}


class ConvNet(nn.Module):
    """Every kind of layer that PEFT adapts, but Transformers' Conv1D, with strides and paddings."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6, padding_idx=0)
        self.conv1 = nn.Conv1d(6, 8, 3, padding=1, stride=2)
        self.conv2 = nn.Conv2d(2, 5, (3, 1), padding="same", bias=False)
        self.conv3 = nn.Conv3d(5, 4, (2, 1, 2), padding=(0, 1, 1))
        self.linear = nn.Linear(4, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, tokens):
        x = self.conv2(self.conv1(self.embedding(tokens).mT).unflatten(1, (2, 4))).relu()
        x = self.conv3(x[..., None, :].expand(-1, -1, -1, 3, -1)).mean((2, 3, 4))
        return self.head(self.linear(x).tanh())


def llama():
    return tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT, num_key_value_heads=1))


def bert():
    return tf.BertForSequenceClassification(tf.BertConfig(**TEXT, num_labels=3))


def gpt2():
    return tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=19, n_positions=32))


BUILDERS = {"llama": llama, "bert": bert, "gpt2": gpt2, "convnet": ConvNet}
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "bert": ["query", "dense"],
    "gpt2": ["c_attn", "c_fc", "c_proj"],
    "convnet": ["embedding", "conv1", "conv2", "conv3", "linear"],
}
NO_ADALORA = {"embedding", "conv1", "conv3"}
SPECS = [
    LoRA(r=3, alpha=5, dropout=0.25),
    LoRA(r=2, alpha=7, rslora=True),
    DoRA(LoRA(r=3, alpha=5)),
    AdaLoRA(r=4, alpha=6, target_r=2, t_init=3, t_final=5, delta_t=2, beta1=0.7, orth_weight=0.3),
]
CASES = [(name, spec) for name in BUILDERS for spec in SPECS]


def targets_of(name, spec):
    return [target for target in TARGETS[name] if not (isinstance(spec, AdaLoRA) and target in NO_ADALORA)]


def seeded(name):
    """The same model at every call, every parameter away from its start."""
    torch.manual_seed(0)
    return perturbed(BUILDERS[name](), 0.1, every=True).eval()


def perturbed(model, size=0.4, every=False):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if every or parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def answer(model):
    tokens = torch.randint(1, 11, (3, 9), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found = model(tokens)
    return found if isinstance(found, torch.Tensor) else found.logits


def distance(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


def ours(name, spec, train=()):
    model = seeded(name)
    adapt(model, spec, targets_of(name, spec), train=train)
    return perturbed(model)


def in_peft(model, directory):
    """The adapter of a directory, loaded by PEFT; a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Of pruned AdaLoRAs PEFT says so, and honours the pattern all the same.
        warnings.filterwarnings("ignore", message="The following rank_pattern keys did not match")
        warnings.filterwarnings("ignore", message=DEPRECATED)
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors is a no-op")
        return peft.PeftModel.from_pretrained(model, str(directory)).eval()


def of_peft(name, spec, **fields):
    """A model that PEFT has adapted, with everything that trains away from its start."""
    inner = getattr(spec, "inner", spec)
    common = {"target_modules": targets_of(name, spec), "lora_alpha": int(inner.alpha), "lora_dropout": inner.dropout}
    common |= {"fan_in_fan_out": name == "gpt2", **fields}
    if isinstance(spec, AdaLoRA):
        config = peft.AdaLoraConfig(
            init_r=inner.r, target_r=inner.target_r, tinit=inner.t_init, tfinal=inner.t_final, deltaT=inner.delta_t,
            beta1=inner.beta1, orth_reg_weight=inner.orth_weight, total_step=99, **common,
        )  # fmt: skip
    else:
        config = peft.LoraConfig(r=inner.r, use_rslora=inner.rslora, use_dora=isinstance(spec, DoRA), **common)
    return perturbed(peft.get_peft_model(seeded(name), config)).eval()


def config_in(directory):
    return json.loads((directory / "adapter_config.json").read_text())


def tensors_in(directory):
    return load_file(directory / "adapter_model.safetensors")


def edit(directory, **fields):
    config = {**config_in(directory), **fields}
    (directory / "adapter_config.json").write_text(json.dumps(config))


def edit_tensors(directory, change):
    tensors = tensors_in(directory)
    change(tensors)
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})


def snapshot(model):
    state = {key: value.clone() for key, value in model.state_dict().items()}
    return state, [p.requires_grad for p in model.parameters()], [id(m) for m in model.modules()]


def same(one, other):
    return (
        one[1:] == other[1:] and one[0].keys() == other[0].keys() and all(one[0][k].equal(other[0][k]) for k in one[0])
    )


def refused(model, directory, pattern, error=PeftError, **options):
    """The message of an import that fails and changes nothing."""
    before = snapshot(model)
    with pytest.raises(error, match=pattern) as caught:
        import_peft(model, directory, **options)
    assert same(snapshot(model), before)
    return str(caught.value)


# The same functions, both ways


@pytest.mark.parametrize(("name", "spec"), CASES, ids=str)
def test_an_exported_adapter_computes_the_same_in_peft(name, spec, tmp_path):
    model = ours(name, spec)
    wanted, base = answer(model), answer(seeded(name))
    export_peft(model, tmp_path)
    assert distance(wanted, base) > 0.01
    assert distance(answer(in_peft(seeded(name), tmp_path)), wanted) < CLOSE


@pytest.mark.parametrize(("name", "spec"), CASES, ids=str)
def test_an_adapter_of_peft_computes_the_same_here(name, spec, tmp_path):
    theirs = of_peft(name, spec)
    theirs.save_pretrained(tmp_path)
    model = seeded(name)
    plan = import_peft(model, tmp_path)
    assert {item.spec for item in plan.adapted} == {spec}
    assert distance(answer(theirs), answer(seeded(name))) > 0.01
    assert distance(answer(model), answer(theirs)) < CLOSE


@pytest.mark.parametrize(("name", "spec"), CASES, ids=str)
def test_files_come_back_as_they_were(name, spec, tmp_path):
    of_peft(name, spec).save_pretrained(tmp_path / "theirs")
    model = seeded(name)
    import_peft(model, tmp_path / "theirs")
    export_peft(model, tmp_path / "ours")
    before, after = tensors_in(tmp_path / "theirs"), tensors_in(tmp_path / "ours")
    assert before.keys() == after.keys()
    for key, value in before.items():
        if key.endswith("lora_E"):  # times r / (r + 1e-5) and back: two roundings
            torch.testing.assert_close(after[key], value, rtol=3e-7, atol=0)
        else:
            assert after[key].equal(value), key
    assert resolved(tmp_path / "ours", after) == resolved(tmp_path / "theirs", before)


def resolved(directory, tensors):
    """What PEFT makes of a config: every field with a say in values or training, ranks and scales by layer."""
    config = peft.PeftConfig.from_pretrained(directory)
    fields = ["peft_type", "lora_dropout", "use_rslora", "use_dora", "fan_in_fan_out", "bias", "modules_to_save",
              "init_lora_weights", "init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2",
              "orth_reg_weight"]  # fmt: skip
    names = sorted({key.removeprefix("base_model.model.").split(".lora_")[0] for key in tensors})
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    layers = {
        name: (
            ranks.get(get_pattern_key(ranks, name), config.r),
            alphas.get(get_pattern_key(alphas, name), config.lora_alpha),
            bool(check_target_module_exists(config, name)),
        )
        for name in names
    }
    return {field: getattr(config, field, None) for field in fields}, layers


def test_a_16_bit_base_keeps_float32_adapters_on_the_way(tmp_path):
    model = seeded("llama").to(torch.bfloat16)
    adapt(model, LoRA(r=3, alpha=5), ["q_proj"])
    wanted = answer(perturbed(model))
    export_peft(model, tmp_path)
    assert {value.dtype for value in tensors_in(tmp_path).values()} == {torch.float32}
    again = seeded("llama").to(torch.bfloat16)
    import_peft(again, tmp_path)
    assert answer(again).equal(wanted)


@pytest.mark.parametrize("spec", [LoRA(r=3, alpha=5), DoRA(LoRA(r=3, alpha=5)), AdaLoRA(r=4, alpha=6)], ids=str)
def test_adapters_of_4_bit_bases_go_both_ways(spec, tmp_path):
    """In training mode: in evaluation, bitsandbytes packs the weights of a CPU anew, and PEFT's DoRA misreads them."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    plain = perturbed(nn.Linear(64, 48), every=True).state_dict()

    def base():
        layer = bitsandbytes.nn.Linear4bit(64, 48, compute_dtype=torch.float32, quant_type="nf4")
        layer.load_state_dict(plain)
        model = nn.Sequential(layer.to("cpu"))
        model.is_loaded_in_4bit = True  # how PEFT knows
        return model

    model, x = base(), torch.randn(4, 64)
    adapt(model, spec, ["0"])
    perturbed(model, 0.2)
    export_peft(model, tmp_path)
    again = base()
    import_peft(again, tmp_path)
    theirs = in_peft(base(), tmp_path)
    for one in (model, again, theirs):
        one.train()
    assert again(x).equal(model(x))
    assert distance(theirs(x), model(x)) < CLOSE


def test_an_exported_adapter_can_train_on_in_peft(tmp_path):
    export_peft(ours("llama", DoRA(LoRA(r=2, alpha=3), detach_norm=False)), tmp_path)
    model = peft.PeftModel.from_pretrained(seeded("llama"), str(tmp_path), is_trainable=True)
    model(torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None for p in trained)


def test_export_and_import_do_not_need_peft():
    probe = "import sys, adapterzoo.interop.peft_export, adapterzoo.interop.peft_import; print('peft' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


# Names


class Deep(nn.Module):
    """Twelve layers with numbers for names, and names that end like others."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(6, 6)
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(12)])
        self.inside = nn.ModuleDict({"q": nn.Linear(6, 6), "layers": nn.ModuleDict({"1": nn.Linear(6, 6)})})

    def forward(self, x):
        for layer in [self.q, *self.layers, self.inside["q"], self.inside["layers"]["1"]]:
            x = x + layer(x).tanh()
        return x


def test_patterns_and_targets_hit_exactly_their_layers(tmp_path):
    torch.manual_seed(0)
    base = Deep()
    specs = {
        "q": LoRA(r=1, alpha=3), "layers.1": LoRA(r=2, alpha=5), "layers.10": LoRA(r=3, alpha=5),
        "layers.11": LoRA(r=3, alpha=1), "layers.2": LoRA(r=3, alpha=5),
    }  # fmt: skip
    model = copy.deepcopy(base)
    adapt(model, targets={re.compile(re.escape(name)): spec for name, spec in specs.items()})
    perturbed(model)
    export_peft(model, tmp_path)
    theirs = in_peft(copy.deepcopy(base), tmp_path)
    layers = {name: m for name, m in theirs.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.Linear)}
    assert {name: (m.r["default"], m.scaling["default"]) for name, m in layers.items()} == {
        name: (spec.r, spec.scale) for name, spec in specs.items()
    }
    x = torch.randn(4, 6)
    assert distance(theirs(x), model(x)) < CLOSE
    again = copy.deepcopy(base)
    assert {item.names[0]: item.spec for item in import_peft(again, tmp_path).adapted} == specs
    assert again(x).equal(model(x))


PART = st.sampled_from(["q", "v", "1", "10", "layers", "a-b", "x+"])
NAME = st.lists(PART, min_size=1, max_size=4).map(".".join)


@given(st.lists(NAME, min_size=1, max_size=12, unique=True), st.data())
def test_exact_targets_mean_to_peft_what_they_should(names, data):
    chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    config = peft.LoraConfig(target_modules=exact_targets(chosen, names))
    assert {name for name in names if check_target_module_exists(config, name)} == set(chosen)
    values = {name: data.draw(st.integers(1, 3)) for name in chosen}
    usual, pattern = exact_patterns(values)
    assert {name: pattern.get(get_pattern_key(pattern, name), usual) for name in chosen} == values
    assert {name: value_for(pattern, name, usual) for name in chosen} == values


ENTRY = st.one_of(st.lists(NAME, max_size=3), st.sampled_from([r".*q", r"layers\.1.*", "q|v", "10"]))


@given(
    ENTRY, ENTRY, st.none() | st.lists(st.sampled_from([0, 1, 10])) | st.just(1), st.sampled_from([None, "layers", []]),
    st.none() | st.lists(PART, max_size=2), NAME,
)  # fmt: skip
@example(["q"], [], [], None, None, "layers.1.q")
def test_names_mean_what_they_mean_to_peft(targets, excluded, indices, pattern, saved, name):
    fields = {"target_modules": targets, "exclude_modules": excluded, "modules_to_save": saved}
    if not isinstance(targets, str):
        fields |= {"layers_to_transform": indices, "layers_pattern": pattern if indices is not None else None}
    saved = [re.escape(entry) for entry in saved or []]
    fields["modules_to_save"] = saved
    wanted = bool(check_target_module_exists(peft.LoraConfig(**fields), name))
    assert read_config({"peft_type": "LORA", **fields}).targets(name) is wanted
    ranks = {name: 3, "q": 5, r"layers\.\d+": 7}
    assert value_for(ranks, name, 1) == ranks.get(get_pattern_key(ranks, name), 1)


def test_a_config_that_leaves_the_targets_open_is_taken_at_its_tensors(tmp_path):
    of_peft("llama", SPECS[0]).save_pretrained(tmp_path)
    wanted = {item.names[0] for item in import_peft(seeded("llama"), tmp_path).adapted}
    for targets in ("all-linear", None):
        edit(tmp_path, target_modules=targets)
        assert {item.names[0] for item in import_peft(seeded("llama"), tmp_path).adapted} == wanted
    assert is_meant("all-linear", "x") is False


# AdaLoRA


def masked(name="llama", spec=SPECS[3]):
    model = ours(name, spec)
    with torch.no_grad():
        for index, layer in enumerate(adapted_layers(model).values()):
            layer.adapter.mask.copy_(torch.tensor([1.0, 0.0, 1.0, 0.0]) if index % 2 else torch.ones(4))
        list(adapted_layers(model).values())[-1].adapter.mask.zero_()
    return model


def test_pefts_divisor_is_made_up_for(tmp_path):
    """In float64, where r / (r + 1e-5) shows: 2.5e-6. PEFT keeps r + 1e-5 in float32, good to 1e-7."""
    base = nn.Sequential(nn.Linear(6, 5)).double()
    model = copy.deepcopy(base)
    adapt(model, AdaLoRA(r=4, alpha=6))
    perturbed(model)
    export_peft(model, tmp_path)
    theirs, again = in_peft(copy.deepcopy(base), tmp_path), copy.deepcopy(base)
    import_peft(again, tmp_path)
    wanted = model[0].delta_weight().detach()
    assert distance(theirs.base_model.model[0].get_delta_weight("default").detach(), wanted) < 3e-7
    assert distance(again[0].delta_weight().detach(), wanted) < 1e-14


@pytest.mark.parametrize("compacted", [False, True])
def test_masked_triplets_are_exported_as_pruned(compacted, tmp_path):
    model = masked()
    wanted = answer(model)
    if compacted:
        compact(model)
    export_peft(model, tmp_path)
    shapes = {tuple(value.shape) for key, value in tensors_in(tmp_path).items() if key.endswith("lora_E")}
    assert shapes == {(4, 1), (2, 1), (0, 1)}
    kept = list(config_in(tmp_path)["rank_pattern"].values())
    assert all(len(row) == 4 for row in kept)
    assert ([True, False, True, False] in kept) is not compacted
    assert distance(answer(in_peft(seeded("llama"), tmp_path)), wanted) < CLOSE
    again = seeded("llama")
    plan = import_peft(again, tmp_path)
    assert {item.spec for item in plan.adapted} == {AdaLoRA(r=4, alpha=6, orth_weight=0.3)}
    assert sorted({len(layer.adapter.lam) for layer in adapted_layers(again).values()}) == [0, 2, 4]
    assert distance(answer(again), wanted) < CLOSE


def test_a_pruned_adalora_of_peft_computes_the_same_here(tmp_path):
    model = of_peft("bert", AdaLoRA(r=4, alpha=6, target_r=2, orth_weight=0.0))
    model.base_model.peft_config["default"].total_step = 4
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(5):
        model(torch.randint(0, 19, (2, 6)), labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    with pytest.warns(peft.utils.warning.PeftWarning, match="invalid shape"):  # of layers that have lost all ranks
        model.save_pretrained(tmp_path)
    assert {sum(kept) for kept in config_in(tmp_path)["rank_pattern"].values()} > {0}
    again = seeded("bert")
    import_peft(again, tmp_path)
    assert distance(answer(again), answer(model.eval())) < CLOSE


def test_an_alpha_of_zero_stands_for_the_rank_in_pefts_adalora(tmp_path):
    theirs = of_peft("llama", SPECS[3], lora_alpha=0)
    theirs.save_pretrained(tmp_path)
    model = seeded("llama")
    assert import_peft(model, tmp_path).adapted[0].spec.alpha == 4
    assert distance(answer(model), answer(theirs)) < CLOSE


def test_a_rank_pattern_of_another_length_is_refused():
    with pytest.raises(PeftError, match="rank_pattern of 'x' has not init_r=3 entries"):
        read_config({"peft_type": "ADALORA", "init_r": 3, "rank_pattern": {"x.lora_E": [True, False]}})


def test_a_module_called_default_keeps_its_ranks(tmp_path):
    base = nn.ModuleDict({"default_q": nn.Linear(6, 5), "v": nn.Linear(6, 5)})
    model = copy.deepcopy(base)
    adapt(model, AdaLoRA(r=3, alpha=4))
    perturbed(model)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.adapter.mask[0] = 0
    export_peft(model, tmp_path)
    theirs, again, x = in_peft(copy.deepcopy(base), tmp_path), copy.deepcopy(base), torch.randn(2, 6)
    import_peft(again, tmp_path)
    for name in base:
        wanted = model[name](x)
        assert distance(theirs.base_model.model[name](x), wanted) < CLOSE
        assert distance(again[name](x), wanted) < CLOSE


def test_the_total_steps_are_those_of_the_attached_run_or_enough_for_the_schedule(tmp_path):
    model = ours("llama", SPECS[3])
    export_peft(model, tmp_path)
    assert config_in(tmp_path)["total_step"] == 3 + 5 + 1
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with attach(model, optimizer, total_steps=70):
        export_peft(model, tmp_path)
    assert config_in(tmp_path)["total_step"] == 70


# What else trains


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 5)
        self.norm = nn.BatchNorm1d(5)
        self.neck = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 4))
        self.head = nn.Linear(4, 3)
        self.overhead = nn.Linear(3, 3)

    def forward(self, x):
        return self.overhead(self.head(self.neck(self.norm(self.body(x)))))


def heads(train):
    torch.manual_seed(0)
    base = perturbed(Heads(), every=True).eval()
    model = copy.deepcopy(base)
    adapt(model, LoRA(r=2, alpha=3), ["body"], train=train)
    return base, perturbed(model)


@pytest.mark.parametrize(
    ("train", "modules", "bias"),
    [
        (["neck", "norm"], ["neck", "norm"], "none"),
        (["neck.2"], ["neck.2", "norm"], "none"),  # the norm's statistics change in training in any case
        (["head"], ["head", "norm"], "none"),  # PEFT takes "overhead" for it too
        (["body.bias"], ["norm"], "lora_only"),
        (["body.bias", "head.bias"], ["norm"], "all"),
        (["body.bias", "overhead"], ["norm", "overhead"], "lora_only"),
    ],
)
def test_what_else_trains_goes_both_ways(train, modules, bias, tmp_path):
    base, model = heads(train)
    x = torch.randn(4, 6)
    model.norm.running_mean.add_(0.5)
    export_peft(model, tmp_path)
    config = config_in(tmp_path)
    assert (config["modules_to_save"], config["bias"]) == (modules, bias)
    again = copy.deepcopy(base)
    plan = import_peft(again, tmp_path)
    assert again(x).equal(model(x))
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    found = {name for name, p in again.named_parameters() if p.requires_grad}
    assert wanted <= found
    assert "body" in {item.names[0] for item in plan.adapted}
    export_peft(again, tmp_path / "again")
    assert tensors_in(tmp_path).keys() == tensors_in(tmp_path / "again").keys()
    theirs = in_peft(copy.deepcopy(base), tmp_path)
    assert distance(theirs(x), model(x)) < CLOSE


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_and_heads_that_peft_trained_are_taken(bias, tmp_path):
    theirs = of_peft("bert", SPECS[0], bias=bias, modules_to_save=["classifier"], target_modules=["query"])
    theirs.save_pretrained(tmp_path)
    model = seeded("bert")
    plan = import_peft(model, tmp_path)
    assert "classifier" in plan.trained
    if bias == "all":  # PEFT writes the head's bias three times; the one under its own name counts
        wanted = model.classifier.bias.clone()
        edit_tensors(tmp_path, lambda tensors: tensors["base_model.model.classifier.modules_to_save.bias"].zero_())
        import_peft(model := seeded("bert"), tmp_path)
        assert model.classifier.bias.equal(wanted)
    assert distance(answer(model), answer(theirs)) < CLOSE
    assert model.get_submodule("bert.encoder.layer.0.attention.self.query").bias.requires_grad


def test_peft_adds_heads_by_itself_and_they_are_taken(tmp_path):
    theirs = of_peft("bert", SPECS[0], task_type="SEQ_CLS", target_modules=["query"])
    theirs.save_pretrained(tmp_path)
    assert config_in(tmp_path)["modules_to_save"] == ["classifier", "score"]
    model = seeded("bert")
    import_peft(model, tmp_path)
    assert distance(answer(model), answer(theirs)) < CLOSE
    export_peft(model, tmp_path / "ours", task_type="SEQ_CLS", base_model="some/bert")
    config = config_in(tmp_path / "ours")
    assert (config["task_type"], config["base_model_name_or_path"]) == ("SEQ_CLS", "some/bert")
    assert distance(answer(in_peft(seeded("bert"), tmp_path / "ours")), answer(theirs)) < CLOSE


def test_modules_that_peft_can_not_wrap_are_named_one_by_one(tmp_path):
    class Choice(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.heads, self.adapter = nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 2)] * 1), nn.Linear(4, 2)

        def forward(self, x):
            x = self.body(x)
            return self.heads[0](x) + self.adapter(x)

    base = Choice()
    model = copy.deepcopy(base)
    adapt(model, LoRA(r=2, alpha=3), ["body"], train=["heads", "adapter"])
    perturbed(model)
    export_peft(model, tmp_path)
    assert config_in(tmp_path)["modules_to_save"] == ["adapter", "heads.0"]
    assert not [key for key in tensors_in(tmp_path) if "body.adapter" in key]
    again, x = copy.deepcopy(base), torch.randn(3, 4)
    import_peft(again, tmp_path)
    assert again(x).equal(model(x))
    assert distance(in_peft(copy.deepcopy(base), tmp_path)(x), model(x)) < CLOSE


def test_what_trains_and_has_no_place_in_peft_is_refused(tmp_path):
    _, model = heads(["head.weight"])
    with pytest.raises(PeftError, match=r"head\.weight trains, and PEFT saves whole modules or biases"):
        export_peft(model, tmp_path / "x")
    _, model = heads([])
    model.body.weight.requires_grad_(True)
    with pytest.raises(PeftError, match=r"body\.weight, the base weight of an adapter, trains"):
        export_peft(model, tmp_path / "x")
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.ModuleDict({"a": nn.Linear(3, 3)})})
    adapt(model, LoRA(r=1), re.compile(r"b\.a"), train=[])
    model.a.requires_grad_(True)
    with pytest.raises(PeftError, match=r"a would also take b\.a, which has an adapter"):
        export_peft(model, tmp_path / "x")
    model = Heads()
    adapt(model, LoRA(r=1), ["overhead"], train=["head"])
    with pytest.raises(PeftError, match=r"head, norm would also take overhead, which has an adapter"):
        export_peft(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


# Embeddings


def test_copies_of_base_embeddings_are_known_for_what_they_are(tmp_path):
    with pytest.warns(UserWarning, match="embedding layers found"):
        of_peft("llama", SPECS[2], target_modules=["q_proj", "embed_tokens"]).save_pretrained(tmp_path)
    copied = "base_model.model.model.embed_tokens.base_layer.weight"
    assert copied in tensors_in(tmp_path)
    model = seeded("llama")
    import_peft(model, tmp_path)
    assert adapted_layers(model)["model.embed_tokens"].kind == "embedding"
    edit_tensors(tmp_path, lambda tensors: tensors[copied].add_(1))
    refused(seeded("llama"), tmp_path, r"embed_tokens\.weight: the file has a copy of this base weight with other")


# Exports that PEFT could not hold, or would compute wrongly


def conv(**options):
    return nn.Sequential(nn.Conv2d(4, 4, 3, **options), nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("base", "spec", "pattern"),
    [
        (conv(), MAP(LoRA(r=2)), r"0: PEFT has no format for MAP\(LoRA\(r=2\)\).*\n.*1: PEFT.*merge_and_save"),
        (conv(), DoRA(AdaLoRA(r=2)), "no format"),
        (conv(), FLoRA(r=2), "no format"),
        (conv(groups=2), LoRA(r=2), "groups=2"),
        (conv(groups=2), AdaLoRA(r=2), "groups=2"),
        (conv(dilation=2), LoRA(r=2), "dilation"),
        (conv(padding_mode="circular", padding=1), DoRA(LoRA(r=2)), "padding_mode='circular'"),
        (conv(padding_mode="reflect", padding=1), AdaLoRA(r=2), "padding_mode='reflect'"),
        (nn.Sequential(nn.Embedding(9, 4)), AdaLoRA(r=2), "no AdaLoRA for Embedding"),
        (nn.Sequential(nn.Conv1d(4, 4, 1)), AdaLoRA(r=2), "no AdaLoRA for Conv1d"),
        (nn.Sequential(nn.Conv3d(4, 4, 1)), AdaLoRA(r=2), "no AdaLoRA for Conv3d"),
    ],
)
def test_what_peft_has_no_format_for_or_computes_wrongly_is_refused(base, spec, pattern, tmp_path):
    adapt(base, spec, list(map(str, range(len(base)))))
    with pytest.raises(PeftError, match=re.compile(pattern, re.DOTALL)):
        export_peft(base, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_dilated_adalora_goes_to_peft(tmp_path):
    base = nn.Sequential(nn.Conv2d(4, 5, (2, 3), dilation=2, stride=2))
    model = copy.deepcopy(base)
    adapt(model, AdaLoRA(r=2, alpha=3), ["0"])
    perturbed(model)
    export_peft(model, tmp_path)
    x = torch.randn(2, 4, 9, 9)
    assert distance(in_peft(copy.deepcopy(base), tmp_path)(x), model(x)) < CLOSE


def test_layers_that_one_config_can_not_tell_apart_are_refused(tmp_path):
    for other in (LoRA(r=2, dropout=0.1), LoRA(r=2, rslora=True), DoRA(LoRA(r=2)), AdaLoRA(r=2)):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        adapt(model, targets={"0": LoRA(r=2), "1": other})
        with pytest.raises(PeftError, match=r"(?s)says once for all.*merge_and_save.*: 0.*: 1"):
            export_peft(model, tmp_path / "x")
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    adapt(model, targets={"0": AdaLoRA(r=2, alpha=3), "1": AdaLoRA(r=2)})
    with pytest.raises(PeftError, match="says once for all"):
        export_peft(model, tmp_path / "x")


def test_zero_rows_under_dora_are_refused_where_peft_is_nan(tmp_path):
    base = nn.Linear(4, 3)
    with torch.no_grad():
        base.weight[1] = 0
    model = nn.Sequential(copy.deepcopy(base))
    adapt(model, DoRA(LoRA(r=2)), ["0"])
    with pytest.raises(PeftError, match=r"0: W \+ Δ has 1 zero rows \(1\), where PEFT's DoRA is NaN"):
        export_peft(model, tmp_path)
    theirs = peft.get_peft_model(nn.Sequential(base), peft.LoraConfig(target_modules=["0"], use_dora=True))
    assert theirs(torch.ones(1, 4)).isnan().any()


def test_a_model_in_a_wrapper_of_processes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("adapterzoo.interop.peft_fit.wrapper_of_processes", lambda _: "DistributedDataParallel")
    with pytest.raises(PeftError, match="in a DistributedDataParallel, which changes the names"):
        export_peft(ours("convnet", SPECS[0]), tmp_path / "x")


def test_a_layer_with_two_names_is_refused(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(3, 3)})
    model["b"] = model["a"]
    adapt(model, LoRA(r=1), ["a"])
    with pytest.raises(PeftError, match="a = b: one layer with several names; PEFT adapts the first alone"):
        export_peft(model, tmp_path / "x")


def test_nothing_to_export_is_an_error(tmp_path):
    with pytest.raises(TargetError, match="no adapted layer"):
        export_peft(nn.Linear(2, 2), tmp_path)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 3))
    adapt(model, LoRA(r=1), ["0"])
    with pytest.raises(PeftError, match="0: it is on the meta device"):
        export_peft(model, tmp_path)


def test_an_export_that_fails_leaves_the_old_adapter(tmp_path, monkeypatch):
    model = ours("convnet", SPECS[0])
    export_peft(model, tmp_path)
    (tmp_path / "README.md").write_text("mine")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    perturbed(model)
    monkeypatch.setattr(json, "dumps", lambda *_, **__: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(PeftError, match="no space left"):
        export_peft(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    monkeypatch.undo()
    export_peft(model, tmp_path)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert after.keys() == before.keys()
    assert after["adapter_model.safetensors"] != before["adapter_model.safetensors"]


def test_the_config_goes_first_and_comes_last(tmp_path, monkeypatch):
    """So a process that is killed in between leaves nothing that loads."""
    model = ours("convnet", SPECS[0])
    export_peft(model, tmp_path)
    real, moved = Path.replace, []
    monkeypatch.setattr(Path, "replace", lambda path, target: [moved.append((path, target)), real(path, target)][1])
    export_peft(perturbed(model), tmp_path)
    assert [path.name for path, _ in moved if path.parent == tmp_path] == [
        "adapter_config.json", "adapter_model.safetensors"
    ]  # fmt: skip
    assert [target.name for _, target in moved if target.parent == tmp_path] == [
        "adapter_model.safetensors", "adapter_config.json"
    ]  # fmt: skip


# Imports that are refused, and change nothing


@pytest.fixture
def adapter(tmp_path):
    export_peft(ours("convnet", SPECS[2]), tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; LORA"),
        ({"lora_bias": True}, "lora_bias=True: the update has a bias of its own"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"arrow_config": {"top_k": 1}}, "arrow_config"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying"),
        ({"kasa_config": {"beta": 1}}, "kasa_config"),
        ({"megatron_config": {"x": 1}}, "megatron_config"),
        ({"monteclora_config": {"x": 1}}, "monteclora_config"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
        ({"use_qalora": True}, "use_qalora"),
        ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"init_lora_weights": "brand_new"}, "is not known here"),
        ({"use_new_thing": 3, "lora_bias": True}, r"(?s)lora_bias.*use_new_thing=3 is a field that is not known"),
        ({"r": "8"}, r"r='8'"),
        ({"r": 0, "use_dora": "yes"}, r"(?s)r=0.*use_dora='yes'"),
        ({"lora_alpha": 0}, "alpha"),
        ({"lora_dropout": 1.0}, "dropout"),
        ({"target_modules": "conv1("}, "no regular expression"),
        ({"rank_pattern": {"(": 3}}, "no regular expression"),
        ({"target_modules": ["conv1", "linear"]}, r"(?s)conv2: the file has tensors of it, but.*does not mean it"),
        ({"exclude_modules": ["conv1"]}, "conv1: the file has tensors of it"),
        ({"modules_to_save": ["conv1"]}, "conv1"),
        ({"modules_to_save": ["head"]}, r"(?s)head\.bias is missing.*head\.weight is missing"),
        ({"target_modules": ["conv1", "conv2", "conv3", "embedding", "linear", "head"]}, "head: the config's target"),
        ({"use_dora": False}, r"(?s)conv1: lora_magnitude_vector is not expected.*linear: lora_magnitude_vector"),
        ({"rank_pattern": {"linear": 2}}, r"linear: lora_A\.weight is \[3, 4\] in the file; it should be \[2, 4\]"),
        ({"r": 5}, r"(?s)conv1: lora_A.*embedding: lora_embedding_A"),
    ],
)  # fmt: skip
def test_a_config_that_can_not_be_honoured_is_refused_by_name(fields, pattern, adapter):
    edit(adapter, **fields)
    refused(seeded("convnet"), adapter, pattern)


def test_every_field_of_pefts_configs_is_known():
    quiet = {"peft_type", "task_type", "total_step"}
    for kind, extra in ((peft.LoraConfig, {}), (peft.AdaLoraConfig, {"total_step": 5})):
        raw = {key: sorted(v) if isinstance(v, set) else v for key, v in kind(**extra).to_dict().items()}
        raw["peft_type"] = raw["peft_type"].value
        assert read_config(raw).peft_type == raw["peft_type"]
        switched = {key: raw[key] or "on" for key in raw if key not in quiet and not raw[key]}
        with pytest.raises(PeftError) as caught:
            read_config({**raw, **switched})
        assert "not known here" not in str(caught.value).replace("init_lora_weights", "")


TEXT_IN_JSON = st.sampled_from(["", "q", "(", ".*", "LORA", "ADALORA", "x.lora_E"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 99) | st.floats() | TEXT_IN_JSON,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT_IN_JSON, inner, max_size=2),
    max_leaves=4,
)
FIELDS = st.sampled_from(sorted({*peft.AdaLoraConfig(total_step=1).to_dict(), "spec", "model_fields", "self", "x"}))


@given(st.dictionaries(FIELDS, JSON, max_size=6), st.sampled_from(["LORA", "ADALORA"]))
def test_any_config_is_read_or_refused(fields, method):
    try:
        config = read_config({**fields, "peft_type": fields.get("peft_type", method)})
    except PeftError:
        return
    assert config.spec("q").depth == int(config.use_dora)
    assert config.targets("q") in (True, False, None)
    assert config.rank_in_file("q") >= 0


def test_pefts_own_numbers_are_the_defaults_of_fields_that_are_left_out():
    fields = read_config({"peft_type": "LORA"})
    wanted = peft.LoraConfig()
    for name in type(fields).model_fields:
        if name != "peft_type":
            assert (getattr(fields, name) or None) == (getattr(wanted, name) or None), name
    ada, wanted = read_config({"peft_type": "ADALORA"}), peft.AdaLoraConfig(total_step=3)
    for name in (
        "init_r",
        "target_r",
        "tinit",
        "tfinal",
        "deltaT",
        "beta1",
        "beta2",
        "orth_reg_weight",
        "rank_pattern",
    ):
        assert getattr(ada, name) == getattr(wanted, name), name


def test_everything_that_is_wrong_with_the_tensors_is_told_at_once(adapter):
    def change(tensors):
        prefix = "base_model.model."
        del tensors[prefix + "conv1.lora_A.weight"]
        tensors[prefix + "linear.lora_B.weight"] = torch.zeros(7, 9)
        tensors[prefix + "conv3.lora_C"] = torch.zeros(2)
        tensors[prefix + "lineer.lora_A.weight"] = torch.zeros(2, 2)
        tensors["conv2.lora_A.weight"] = torch.zeros(2)
        tensors[prefix + "head.weight"] = torch.zeros(2)

    edit_tensors(adapter, change)
    message = refused(seeded("convnet"), adapter, "nothing was changed")
    for part in (
        "conv1: lora_A.weight is missing", "linear: lora_B.weight is [7, 9] in the file; it should be [7, 3]",
        "conv3.lora_C is no parameter", "lineer: the model has no such module; did you mean 'linear'?",
        "conv2.lora_A.weight does not begin with 'base_model.model.'", "head.weight is [2] in the file and [3, 7]",
    ):  # fmt: skip
        assert part in message


def test_values_that_would_be_rounded_are_refused(adapter):
    edit_tensors(adapter, lambda tensors: tensors.update({k: v.double() for k, v in tensors.items() if "conv1" in k}))
    message = refused(seeded("convnet"), adapter, "float64 in the file and torch.float32 in the model")
    assert message.count("conv1") == 3
    import_peft(seeded("convnet").double(), adapter)
    base, model = heads(["head"])
    export_peft(model.double(), adapter)
    assert "head.weight is torch.float64" in refused(base, adapter, "head.bias is torch.float64")


def test_a_layer_that_can_not_be_adapted_is_told(tmp_path):
    theirs = peft.get_peft_model(seeded("gpt2"), peft.LoraConfig(target_modules=["wte"]))
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    refused(seeded("gpt2"), tmp_path, "tied to", TargetError)


def test_what_is_no_adapter_is_told(tmp_path, adapter):
    model = seeded("convnet")
    refused(model, tmp_path / "nowhere", "there is no adapter_config.json")
    (tmp_path / "sub").mkdir()
    (adapter / "adapter_config.json").rename(tmp_path / "sub" / "adapter_config.json")
    refused(model, tmp_path, "there is one in sub: PEFT writes adapters with names there")
    refused(model, tmp_path / "sub", "there is no adapter_model.safetensors$")
    (tmp_path / "sub" / "adapter_model.bin").write_bytes(b"")
    refused(model, tmp_path / "sub", "a pickle, which may run any code.*weights_only=True")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"peft_type": "LORA", "use_dora": true, "lora_alpha": 5, "r": 3, "r": 3}',
        "[" * 100_000,
        '{"peft_type": "LORA", "r": NaN}',
        "3",
    ],
)
def test_a_damaged_config_is_refused(text, adapter):
    (adapter / "adapter_config.json").write_text(text)
    refused(seeded("convnet"), adapter, "adapter_config.json|adapter's tensors")


@pytest.mark.parametrize("size", [0, 7, 8, 100, -1])
def test_damaged_tensors_are_refused(size, adapter):
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused(seeded("convnet"), adapter, "adapter_model.safetensors")


def test_a_model_with_adapters_takes_no_other(adapter):
    model = ours("convnet", LoRA(r=1))
    before = snapshot(model)
    with pytest.raises(TargetError, match="has adapters already"):
        import_peft(model, adapter)
    assert same(snapshot(model), before)


def test_a_model_without_weights_is_refused(adapter):
    with torch.device("meta"):
        model = ConvNet()
    with pytest.raises(PeftError, match="conv1 is on the meta device"):
        import_peft(model, adapter)
    assert not adapted_layers(model)


# Wrappers around what was read


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize(
    "wrap",
    [
        "MAP({spec})", "MAP({spec}, floor=0.5)", "MAP({spec}, per='channel')", "PreDiag({spec})",
        "SORA({spec}, rank=1)", "MAP(DoRA(MAP({spec})))", lambda spec: DoRA(PreDiag(spec)),
    ],
    ids=lambda wrap: wrap if isinstance(wrap, str) else "a function",
)  # fmt: skip
def test_training_goes_on_under_wrappers_from_the_very_function(spec, wrap, tmp_path):
    export_peft(ours("convnet", spec), tmp_path)
    plain, model = seeded("convnet"), seeded("convnet")
    import_peft(plain, tmp_path)
    import_peft(model, tmp_path, wrap=wrap)
    assert distance(answer(model), answer(plain)) < CLOSE
    model(torch.ones(1, 9, dtype=torch.long)).sum().backward()
    trained = [p for layer in adapted_layers(model).values() for p in layer.adapter.parameters()]
    assert all(p.grad is not None for p in trained)


def test_a_wrapper_around_an_untrained_adapter_starts_as_ever(tmp_path):
    model = seeded("convnet")
    adapt(model, LoRA(r=2, alpha=3), ["linear"])
    export_peft(model, tmp_path)
    again = seeded("convnet")
    import_peft(again, tmp_path, wrap=lambda spec: MAP(spec))
    assert again.linear.adapter.beta.item() == 1
    assert again.linear.effective_weight().equal(again.linear.weight)
    with torch.no_grad():
        model.linear.adapter.B[1:].fill_(1)
    export_peft(model, tmp_path)
    again = seeded("convnet")
    import_peft(again, tmp_path, wrap="MAP({spec}, per='channel')")
    lengths = model.linear.delta_weight().norm(dim=1)
    torch.testing.assert_close(again.linear.adapter.beta.detach(), torch.where(lengths > 0, lengths, 1).detach())
    assert lengths[0] == 0


@pytest.mark.parametrize(
    ("wrap", "pattern"),
    [
        ("MAP(LoRA(r=3))", "has no {spec} in it"),
        (lambda _: LoRA(r=3), "it should be that very spec, or wrappers around it"),
        (lambda _: DoRA(LoRA(r=4, alpha=5)), "it should be that very spec"),
        (lambda _: None, "wrap returns a spec"),
        ("NOPE({spec})", "unknown piece"),
        (lambda spec: SORA(spec, rank=999), "rank=999"),
    ],
)
def test_a_wrap_that_is_none_is_refused(wrap, pattern, adapter):
    refused(seeded("convnet"), adapter, re.escape(pattern), (SpecError, TargetError), wrap=wrap)


def test_a_wrapper_that_can_not_start_there_is_refused(adapter, monkeypatch):
    monkeypatch.setattr(MAP, "neutral_magnitudes", lambda *_: {})
    refused(
        seeded("convnet"), adapter, r"conv1: MAP\(DoRA.* does not start with the function of DoRA", wrap="MAP({spec})"
    )


def test_an_imported_model_unloads_to_the_base_or_to_the_merged_one(adapter):
    model, base = seeded("convnet"), seeded("convnet")
    import_peft(model, adapter)
    wanted = answer(model)
    assert distance(answer(unload(copy.deepcopy(model), merge=True)), wanted) < CLOSE
    assert answer(unload(model, merge=False)).equal(answer(base))


def test_prediag_stays_as_it_is(adapter):
    model = seeded("convnet")
    plan = import_peft(model, adapter, wrap=PreDiag)
    assert all(isinstance(item.spec, PreDiag) for item in plan.adapted)
