"""Files in the hands of a hard user: odd names and paths, resumed trainings, dense truths, whatever PEFT writes."""

import copy
import json
import random
import re
import subprocess
import sys

import peft
import pytest
import torch
from exported import IDS, answer, bert, distance, gpt2, llama, started, trained, truth
from safetensors.torch import load_file, load_model
from torch import nn

from adapterzoo import (
    MAP,
    SORA,
    AdaLoRA,
    DoRA,
    FLoRA,
    Full,
    LoRA,
    PreDiag,
    adapt,
    adapted_layers,
    attach,
    compact,
    export_lora,
    export_peft,
    import_peft,
    inspect,
    load,
    merge_and_save,
    param_groups,
    save,
)
from adapterzoo.errors import CheckpointError, ExportError, PeftError

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),  # of fan_in_fan_out, embeddings, tied weights
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning"),  # it may be so
]
CLOSE = 1e-5
LoRAs = [LoRA(r=2, alpha=3), DoRA(LoRA(r=2, alpha=3)), AdaLoRA(r=3, alpha=4)]


class Odd(nn.Module):
    """Names that stand for something in a file, or in a layer."""

    NAMES = ("adapter", "base", "weight", "default", "lora_A", "form", "base_layer", "modules_to_save", "ü x")

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(6, 6) for name in self.NAMES})
        self.add_module("0", nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 5, bias=False)))
        self.inner = nn.ModuleDict({"adapter": nn.Linear(5, 6), "unmerged_weight": nn.Linear(6, 5)})

    def forward(self, x):
        for layer in self.layers.values():
            x = x + layer(x).tanh()
        for layer in (self._modules["0"], *self.inner.values()):
            x = layer(x).tanh()
        return x


def odd():
    torch.manual_seed(0)
    return started(Odd())


def small(dtype=torch.float32):
    """A batch norm between adapted layers, and a head."""
    torch.manual_seed(0)
    layers = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 7, bias=False), nn.Tanh(), nn.Linear(7, 6)
    return started(nn.Sequential(*layers)).to(dtype)


def batch(dtype=torch.float32):
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(3)).to(dtype)


def same_states(one, other):
    one, other = one.state_dict(), other.state_dict()
    return list(one) == list(other) and all(one[key].equal(other[key]) for key in one)


@pytest.mark.parametrize("spec", [MAP(DoRA(LoRA(r=2))), AdaLoRA(r=3), SORA(FLoRA(r=(2, 3)), rank=1)], ids=str)
def test_modules_named_like_parts_of_a_layer_or_of_a_file_are_saved_and_merged(spec, tmp_path):
    model = trained(odd(), spec)
    save(model, tmp_path / "own")
    again = odd()
    load(again, tmp_path / "own")
    assert distance(model(batch()), odd()(batch())) > 0.01
    assert again(batch()).equal(model(batch()))
    merge_and_save(model, tmp_path / "plain")
    plain = odd()
    plain.load_state_dict(load_file(tmp_path / "plain" / "model.safetensors"))
    assert distance(plain(batch()), model(batch())) < CLOSE


@pytest.mark.parametrize("spec", LoRAs, ids=str)
def test_modules_named_like_parts_of_pefts_files_go_both_ways(spec, tmp_path):
    model = trained(odd(), spec)
    export_peft(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(odd(), str(tmp_path / "ours")).eval()
    assert distance(theirs(batch()), model(batch())) < CLOSE
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = odd()
    import_peft(again, tmp_path / "theirs")
    assert distance(again(batch()), model(batch())) < CLOSE


def test_paths_may_be_relative_with_spaces_in_unicode_and_the_directory_itself(tmp_path, monkeypatch):
    model = trained(small(), LoRA(r=2))
    here = tmp_path / "naïve ü" / "a b"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    for place in (".", "..", "new ü/and deeper/"):
        save(model, place)
        again = small()
        load(again, place)
        assert same_states(again, model)
        export_peft(model, place)
        export_peft(model, place)
        again = small()
        import_peft(again, place)
        assert again(batch()).equal(model(batch()))
    merge_and_save(model, "m ü/x")
    merge_and_save(model, "m ü/x/")
    assert [path.name for path in (here / "m ü" / "x").iterdir()] == ["model.safetensors"]
    assert not list(tmp_path.rglob(".*"))


def test_a_save_of_another_composition_takes_the_place_and_one_of_another_name_stands_beside(tmp_path):
    save(trained(small(), MAP(LoRA(r=2))), tmp_path)
    second, third = trained(small(), Full(), ["0"]), trained(small(), AdaLoRA(r=3), ["3"], train=["5"])
    save(second, tmp_path)
    save(third, tmp_path, name="third")
    assert inspect(tmp_path).specs() == {"0": Full()}
    for name, model in (("default", second), ("third", third)):
        again = small()
        load(again, tmp_path, name=name)
        assert same_states(again, model)
    with pytest.raises(CheckpointError, match=r"(?s)layer '3' is in the file and not.*layer '0' is in the model and"):
        load(second, tmp_path, name="third")


SCHEDULED = MAP(AdaLoRA(r=4, target_r=2, t_init=2, t_final=4, delta_t=2))


def run(steps, dtype, factors, *, seed=0, saved=None, path=None, cut=None):
    """Train a head, a batch norm and AdaLoMAP; start from a file where `saved` has the optimiser's state."""
    model = small().to(dtype).train()
    adapt(model, SCHEDULED, ["0", "3"], train=["1", "5"], seed=seed, adapter_dtype=factors)
    optimiser = torch.optim.AdamW(param_groups(model, 1e-2))
    attach(model, optimiser, total_steps=20)
    if saved is not None:
        load(model, path)
        optimiser.load_state_dict(copy.deepcopy(saved))
    for step in steps:
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step)).to(dtype)
        optimiser.zero_grad()
        (model(x) - 2 * x.flip(1)).square().mean().backward()
        optimiser.step()
        if step + 1 == cut:
            compact(model, optimiser)
    return model, optimiser


@pytest.mark.parametrize(("stop", "cut"), [(12, None), (18, 17)])
@pytest.mark.parametrize(("dtype", "factors"), [(torch.float32, None), (torch.float32, torch.bfloat16)], ids=str)
def test_a_training_resumes_bit_for_bit_where_optimiser_and_attach_came_before_the_load(
    stop, cut, dtype, factors, tmp_path
):
    whole, _ = run(range(20), dtype, factors, cut=cut)
    half, optimiser = run(range(stop), dtype, factors, cut=cut)
    save(half, tmp_path)
    resumed, _ = run(range(stop, 20), dtype, factors, seed=9, saved=optimiser.state_dict(), path=tmp_path)
    assert not same_states(half, whole)
    assert same_states(resumed, whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_every_dtype_of_base_and_factors_comes_back(dtype, tmp_path):
    for factors in (None, *([] if dtype is torch.float64 else [torch.bfloat16])):
        for spec in (MAP(DoRA(LoRA(r=2))), AdaLoRA(r=3)):
            model, again = trained(small(dtype), spec, adapter_dtype=factors), small(dtype)
            save(model, tmp_path)
            load(again, tmp_path)
            assert [v.dtype for v in again.state_dict().values()] == [v.dtype for v in model.state_dict().values()]
            assert again(batch(dtype)).equal(model(batch(dtype)))
        for spec in LoRAs[:2]:
            model, again = trained(small(dtype), spec, adapter_dtype=factors), small(dtype)
            export_peft(model, tmp_path)
            import_peft(again, tmp_path, adapter_dtype=factors)
            assert same_states(again, model)


def test_a_load_that_fails_leaves_modules_hooks_attributes_and_flags_as_they_were(tmp_path):
    def state(model):
        return [
            (name, id(module), list(vars(module)), [list(v) for k, v in vars(module).items() if "hooks" in k],
             [(key, id(p), p.requires_grad, p._version) for key, p in module._parameters.items() if p is not None],
             module.training)
            for name, module in model.named_modules()
        ]  # fmt: skip

    save(trained(small(), MAP(AdaLoRA(r=2)), ["0", "3"], train=["5"]), tmp_path)
    model = small().double()
    model[5].bias.requires_grad_(False)
    model[1].train()
    before = state(model)
    with pytest.raises(CheckpointError) as caught:
        load(model, tmp_path)
    assert state(model) == before
    for name in ("layer '0', inner.P is", "layer '3', alpha is", "'5.weight' is", "'1.running_var' is"):
        assert f"{name} float64 here and float32 in the file; cast=True converts it" in str(caught.value)
    load(model, tmp_path, cast=True)
    assert {v.dtype for v in model.state_dict().values()} == {torch.float64, torch.int64}


class Kinds(nn.Module):
    """Every kind of layer that has a plain LoRA."""

    def __init__(self):
        super().__init__()
        self.linear, self.kernel, self.line = nn.Linear(9, 7), nn.Conv2d(3, 5, (2, 3)), nn.Conv1d(4, 5, 3)
        self.tokens = nn.Embedding(11, 6)


def kinds(dtype=torch.float32):
    return started(Kinds()).to(dtype)


WRAPPED = [LoRA(r=3, alpha=5), MAP(AdaLoRA(r=3)), SORA(LoRA(r=2), rank=1), PreDiag(DoRA(FLoRA(r=2, scale=1.5))), Full()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", WRAPPED, ids=str)
def test_the_residual_is_that_of_the_files_numbers_and_no_lora_of_that_rank_has_less(spec, dtype, tmp_path):
    model = trained(kinds(dtype), spec, ["linear", "kernel", "line", "tokens"])
    for rank, bound in ((1, None), (3, None), (None, 0.03)):
        report = export_lora(model, tmp_path, rank=rank, max_residual=bound)
        assert [row.name for row in report.layers] == list(adapted_layers(model))
        tensors = {key.split(".", 2)[2]: value.double() for key, value in
                   load_file(tmp_path / "adapter_model.safetensors").items()}  # fmt: skip
        for row in report.layers:
            _, update = truth(model.get_submodule(row.name))
            A = next(tensors[f"{row.name}.{end}"] for end in ("lora_A.weight", "lora_embedding_A")
                     if f"{row.name}.{end}" in tensors)  # fmt: skip
            B = next(tensors[f"{row.name}.{end}"] for end in ("lora_B.weight", "lora_embedding_B")
                     if f"{row.name}.{end}" in tensors)  # fmt: skip
            assert A.shape[0] == row.rank
            left = distance(B.flatten(1) @ A.flatten(1), update)
            values = torch.linalg.svdvals(update)
            least = [float(values[i:].norm() / values.norm()) for i in range(len(values) + 1)]
            assert left == pytest.approx(row.residual, abs=3e-6)
            assert left == pytest.approx(least[row.rank], abs=3e-6)
            assert bound is None or (left <= bound and (row.rank == 1 or least[row.rank - 1] > bound - 3e-6))


WRAPS = ["MAP({spec})", "DoRA({spec})", "PreDiag({spec})", "SORA({spec}, rank=1)", "MAP(SORA(PreDiag(DoRA({spec}))))"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_wrapper_starts_with_the_update_that_was_read_on_every_kind_of_layer(dtype, tmp_path):
    for spec, targets in (*((spec, ["linear", "kernel", "line", "tokens"]) for spec in LoRAs[:2]),
                          (AdaLoRA(r=5, alpha=4), ["linear", "kernel"])):  # fmt: skip
        model = trained(kinds(dtype), spec, targets)
        export_peft(model, tmp_path)
        for wrap in WRAPS:
            again = kinds(dtype)
            import_peft(again, tmp_path, wrap=wrap)
            for name, layer in adapted_layers(again).items():
                (_, found), (W, wanted) = truth(layer), truth(model.get_submodule(name))
                assert (found - wanted).norm() <= CLOSE * wanted.norm() + 1e-7 * W.norm()  # W' has float32's digits


TIED = [(gpt2, "lm_head"), (gpt2, "wte"), (lambda: llama(tie_word_embeddings=True), "embed_tokens"), (llama, "lm_head")]


@pytest.mark.parametrize(("build", "trains"), TIED, ids=["gpt2 head", "gpt2 tokens", "llama tied", "llama untied"])
def test_a_trained_embedding_tied_or_not_is_the_same_in_every_kind_of_file(build, trains, tmp_path):
    model = trained(build(), LoRA(r=2), train=[trains])
    own = [p for name, p in model.named_parameters() if p.requires_grad and ".adapter." not in name]
    with torch.no_grad():
        for parameter in own:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
    wanted, loaded, imported = answer(model), build(), build()
    save(model, tmp_path / "own")
    load(loaded, tmp_path / "own")
    export_peft(model, tmp_path / "peft")
    import_peft(imported, tmp_path / "peft")
    merge_and_save(model, tmp_path / "plain")
    theirs = peft.PeftModel.from_pretrained(build(), str(tmp_path / "peft")).eval()
    merged = type(model).from_pretrained(tmp_path / "plain").eval()
    assert distance(wanted, answer(build())) > 0.01
    for found in (loaded, imported, theirs, merged):
        assert distance(answer(found), wanted) < CLOSE
    flags = [name for name, p in model.named_parameters() if p.requires_grad]
    assert [name for name, p in imported.named_parameters() if p.requires_grad] == flags
    assert [name for name, p in loaded.named_parameters() if p.requires_grad] == flags


def test_a_model_with_shared_modules_is_saved_and_merged_once(tmp_path):
    def shared():
        model = nn.ModuleDict({"a": nn.Linear(6, 6), "c": nn.Sequential(nn.Linear(6, 6))})
        model["b"], model["d"] = model["a"], model["c"]
        return started(model)

    def through(model):
        return model["d"](model["b"](model["c"](model["a"](batch())).tanh()).tanh())

    model = trained(shared(), MAP(LoRA(r=2)), ["a", "c.0"])
    contents = save(model, tmp_path / "own")
    assert [layer.names for layer in contents.manifest.adapters["default"].layers] == [["a", "b"], ["c.0", "d.0"]]
    again = shared()
    load(again, tmp_path / "own")
    assert again["a"] is again["b"]
    assert through(again).equal(through(model))
    merge_and_save(model, tmp_path / "plain")
    plain = shared()
    load_model(plain, str(tmp_path / "plain" / "model.safetensors"))
    assert distance(through(plain), through(model)) < CLOSE
    apart = shared()
    apart["b"] = nn.Linear(6, 6)
    with pytest.raises(CheckpointError, match="layer 'a' is known as 'a', 'b' in the file, here as a"):
        load(apart, tmp_path / "own")


class ConvNet(nn.Module):
    """Kinds of layers, a batch norm, and an embedding with a padding index."""

    def __init__(self):
        super().__init__()
        self.tokens, self.line = nn.Embedding(11, 6, padding_idx=0), nn.Conv1d(6, 8, 3, padding=1, stride=2)
        self.kernel, self.norm = nn.Conv2d(8, 8, (3, 2), padding=(2, 1)), nn.BatchNorm2d(8)
        self.fc, self.head = nn.Linear(8, 5), nn.Linear(5, 3)

    def forward(self, ids):
        x = self.line(self.tokens(ids % 11).mT)
        return self.head(self.fc(self.norm(self.kernel(x[:, :, None])).mean((2, 3))).tanh())


MODELS = {
    "llama": (llama, ["q_proj", "v_proj", "down_proj", "embed_tokens"], ["lm_head"]),
    "bert": (bert, ["query", "value", "word_embeddings", "dense"], ["classifier"]),
    "gpt2": (gpt2, ["c_attn", "c_proj", "c_fc", "wpe"], ["ln_f"]),
    "convnet": (lambda: started(ConvNet()), ["tokens", "line", "kernel", "fc"], ["head", "norm"]),
}


def drawn(seed):
    """A model of some architecture, and a config of PEFT's with whatever options."""
    draw = random.Random(seed)
    build, names, heads = MODELS[list(MODELS)[seed % 4]]
    adaptive = seed % 3 == 2
    if adaptive:
        names = [name for name in names if name not in ("tokens", "line", "wpe", "word_embeddings", "embed_tokens")]
    chosen = draw.sample(names, 2)
    options = {
        "target_modules": draw.choice([chosen, rf".*\.?({'|'.join(chosen)})"]),
        "bias": draw.choice(["none", "all", "lora_only"]),
        "modules_to_save": draw.choice([None, heads]),
        "lora_alpha": draw.choice([3, 16]),
    }
    if adaptive:
        return build, peft.AdaLoraConfig(init_r=3, target_r=2, total_step=20, tinit=2, tfinal=5, **options)
    config = peft.LoraConfig(
        r=draw.choice([1, 3]), use_rslora=draw.random() < 0.5, use_dora=draw.random() < 0.4, lora_dropout=0.1,
        rank_pattern=draw.choice([{}, {chosen[0]: 2}, {r".*0.*": 4}]), alpha_pattern={chosen[1]: 7},
        exclude_modules=draw.choice([None, [names[0]]]) if names[0] not in chosen else None, **options,
    )  # fmt: skip
    return build, config


@pytest.mark.parametrize("seed", range(12))
def test_whatever_peft_saves_computes_the_same_here_and_again_there(seed, tmp_path):
    build, config = drawn(seed)
    name = ("default", "german")[seed % 2]  # PEFT puts an adapter of another name into a folder of its own
    theirs = peft.get_peft_model(build(), config, adapter_name=name).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if parameter.requires_grad or "lora_" in key:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw))
    theirs.save_pretrained(str(tmp_path))
    wanted, model = answer(theirs), build()
    import_peft(model, tmp_path if name == "default" else tmp_path / name)
    assert distance(wanted, answer(build())) > 0.01
    assert distance(answer(model), wanted) < CLOSE
    export_peft(model, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(build(), str(tmp_path / "again")).eval()
    assert distance(answer(again), wanted) < CLOSE


def test_a_config_of_pefts_first_year_is_read(tmp_path):
    model = trained(llama(), LoRA(r=2, alpha=16, dropout=0.05), ["q_proj", "v_proj"])
    export_peft(model, tmp_path)
    first = {"base_model_name_or_path": "x/llama-7b-hf", "bias": "none", "enable_lora": None, "fan_in_fan_out": False,
             "inference_mode": True, "lora_alpha": 16, "lora_dropout": 0.05, "merge_weights": False,
             "modules_to_save": None, "peft_type": "LORA", "r": 2, "target_modules": ["q_proj", "v_proj"],
             "task_type": "CAUSAL_LM"}  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(first))
    again = llama()
    import_peft(again, tmp_path)
    assert again.model.layers[0].self_attn.q_proj.spec == LoRA(r=2, alpha=16, dropout=0.05)
    assert same_states(again, model)


def test_adapters_that_transformers_saves_by_itself_are_read_and_ours_are_read_by_it(tmp_path):
    theirs = llama()
    theirs.add_adapter(peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=3, lora_alpha=7))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    model, again = llama(), llama()
    import_peft(model, tmp_path / "theirs")
    assert distance(answer(model), answer(theirs)) < CLOSE
    export_peft(model, tmp_path / "ours")
    again.load_adapter(str(tmp_path / "ours"))
    assert distance(answer(again.eval()), answer(model)) < CLOSE


ALONE = """
import sys, torch, transformers
sys.modules["adapterzoo"] = None  # an import of it fails
model = transformers.LlamaForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    torch.save(model(torch.tensor(eval(sys.argv[2]))).logits, sys.argv[3])
"""


def test_merged_weights_in_shards_need_nothing_of_this_library(tmp_path):
    model = trained(llama(), MAP(DoRA(AdaLoRA(r=3))))
    merge_and_save(model, tmp_path / "plain", max_shard_size="10KB")
    assert len(list((tmp_path / "plain").glob("model-*-of-*.safetensors"))) > 1
    arguments = [str(tmp_path / "plain"), str(IDS.tolist()), str(tmp_path / "logits.pt")]
    subprocess.run([sys.executable, "-c", ALONE, *arguments], check=True, cwd=tmp_path, capture_output=True)
    assert distance(torch.load(tmp_path / "logits.pt"), answer(model)) < CLOSE


# What a review found


def of_peft(model, place, **options):
    """A trained adapter of PEFT's in files, and what PEFT computes with it."""
    adapter = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, lora_alpha=3, **options))
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapter.save_pretrained(place)
    return peft.PeftModel.from_pretrained(copy.deepcopy(model), str(place)).eval()


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_a_tie_that_peft_has_torn_is_refused(saved, tmp_path):
    model = llama(tie_word_embeddings=True)
    of_peft(model, tmp_path, target_modules=["q_proj"], modules_to_save=saved)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(PeftError, match=r"is one parameter of the model, .* untie them first"):
        import_peft(model, tmp_path)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_an_import_into_shared_layers_is_refused(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = self.a

        def forward(self, x):
            return self.b(self.a(x))

    of_peft(Twice(), tmp_path, target_modules=["a"])
    with pytest.raises(PeftError, match="a = b: one layer with several names"):
        import_peft(Twice(), tmp_path)


def test_no_adapter_is_put_beside_merged_weights(tmp_path):
    model = trained(llama(), LoRA(r=2, alpha=3))
    merge_and_save(model, tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    for export in (export_peft, export_lora):
        with pytest.raises(PeftError, match="holds a model's weights"):
            export(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("affine", [True, False])
def test_running_statistics_go_with_the_adapter(affine, tmp_path):
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, affine=affine), nn.Linear(8, 3)).eval()

    model, x = net(), torch.randn(5, 6)
    trained(model, LoRA(r=2, alpha=3))
    model.train()
    for _ in range(5):
        model(3 + 2 * torch.randn(20, 6))
    expected = model.eval()(x)
    export_peft(model, tmp_path / "one")
    export_lora(model, tmp_path / "two")
    for place in ("one", "two"):
        theirs = peft.PeftModel.from_pretrained(net(), str(tmp_path / place)).eval()
        assert distance(theirs(x), expected) < CLOSE
        again = net()
        import_peft(again, tmp_path / place)
        assert distance(again.eval()(x), expected) < CLOSE


def test_an_import_thaws_what_the_file_has_and_no_namesake(tmp_path):
    class Names(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.block = nn.ModuleDict({"fc": nn.Linear(4, 4)})

        def forward(self, x):
            return self.block["fc"](self.fc(x))

    adapt(model := Names(), LoRA(r=2), [re.compile("fc")], train=[])
    model.fc.bias.requires_grad_(True)
    export_peft(model, tmp_path)
    again = Names()
    plan = import_peft(again, tmp_path)
    trains = {name for name, p in again.named_parameters() if p.requires_grad and ".adapter." not in name}
    assert trains == {"fc.bias"} == {f"{name}.bias" for name in plan.trained}
    assert plan.trainable_parameters == sum(p.numel() for p in again.parameters() if p.requires_grad)


@pytest.mark.parametrize("write", [save, export_peft, merge_and_save, export_lora])
def test_a_linked_directory_is_written_into_for_everyone_to_read(write, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "plain").touch()
    write(trained(small(), LoRA(r=2, alpha=3)), tmp_path / "link")
    written = list((tmp_path / "real").iterdir())
    assert len(written) >= 1
    assert {path.stat().st_mode for path in written} == {(tmp_path / "plain").stat().st_mode}
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]


def test_a_directory_that_can_not_be_written_is_an_error_of_ours(tmp_path):
    (tmp_path / "file").write_text("mine")
    for write, error in ((merge_and_save, ExportError), (export_peft, PeftError), (save, CheckpointError)):
        with pytest.raises((error, ExportError)):
            write(trained(small(), LoRA(r=2)), tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("write", [save, export_peft, merge_and_save, export_lora])
def test_what_data_parallel_wraps_is_written_under_its_own_names(write, tmp_path):
    model = trained(small(), LoRA(r=2, alpha=3))
    write(model, tmp_path / "one")
    write(nn.DataParallel(model), tmp_path / "two")
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / place).iterdir()} for place in ("one", "two"))
    assert one == two


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch's own, at the first compile
def test_modules_that_are_compiled_inside_a_model_are_named(tmp_path):
    model = trained(small(), LoRA(r=2, alpha=3))
    name = next(name for name, module in model.named_children() if module in adapted_layers(model).values())
    setattr(model, name, torch.compile(getattr(model, name), backend="eager"))
    for write in (export_peft, merge_and_save, export_lora):
        with pytest.raises((PeftError, ExportError), match=rf"{name} is wrapped by torch.compile; {name}.compile\(\)"):
            write(model, tmp_path / "x")


def test_buffers_alone_are_nothing_in_common(tmp_path):
    one = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    adapt(one, LoRA(r=2), ["0"])
    save(one, tmp_path)
    other = nn.ModuleDict({"0": nn.Conv1d(4, 4, 1), "1": nn.BatchNorm1d(4), "2": nn.Linear(4, 4)})
    adapt(other, LoRA(r=2), ["2"])
    with pytest.raises(CheckpointError):
        load(other, tmp_path, strict=False)


def test_values_that_are_not_finite_are_not_exported(tmp_path):
    model = trained(small(), LoRA(r=2))
    next(iter(adapted_layers(model).values())).adapter.B.data[0] = torch.nan
    with pytest.raises(PeftError, match="its adapter has values that are not finite"):
        export_peft(model, tmp_path / "x")


def test_a_tilde_is_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = trained(small(), LoRA(r=2, alpha=3))
    save(model, "~/own")
    export_peft(model, "~/peft")
    merge_and_save(model, "~/merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "own", "peft"]
    load(small(), "~/own")
    import_peft(small(), "~/peft")


def test_what_is_no_model_is_named(tmp_path):
    for call in (save, load):
        with pytest.raises(CheckpointError, match="not OrderedDict"):
            call(small().state_dict(), tmp_path)
