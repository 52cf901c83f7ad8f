"""merge_and_save: any composition as plain weights, in the layout of the model without adapters."""

import errno
import json
from pathlib import Path

import pytest
import torch
import transformers as tf
from exported import EVERY, GENERATORS, IDS, Mixed, answer, as_matrix, bert, distance, gpt2, llama, mlp, trained, truth
from reference import adapted as reference
from reference import tree_of
from safetensors.torch import load_file, load_model, save_file
from torch import nn
from torch.distributed.fsdp import fully_shard

from adapterzoo import MAP, DoRA, LoRA, adapt, adapted_layers, disabled, merge, unmerge
from adapterzoo.errors import ExportError, TargetError
from adapterzoo.interop.merged import merge_and_save
from adapterzoo.interop.staged import staged
from adapterzoo.interop.truncated import export_lora

DEEP = MAP(DoRA(LoRA(r=3, alpha=5)))


def contents(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def numbers(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def message(kind, call, *args, **options):
    with pytest.raises(kind) as caught:
        call(*args, **options)
    return str(caught.value)


# What is written


@pytest.mark.parametrize("spec", EVERY, ids=repr)
def test_from_pretrained_gives_the_adapted_function_of_any_composition(spec, tmp_path):
    model = trained(llama(), spec)
    report = merge_and_save(model, tmp_path)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert distance(answer(loaded), answer(model)) < 1e-5
    with disabled(model):
        assert distance(answer(loaded), answer(model)) > 1e-3
    for name, layer in adapted_layers(model).items():
        W, update = truth(layer)
        assert distance(loaded.get_parameter(f"{name}.weight"), W + update) < 2e-6, name
    assert set(report.lost) == set(adapted_layers(model))
    assert report.worst == 0


@pytest.mark.parametrize("build", [bert, gpt2])
@pytest.mark.parametrize("spec", [GENERATORS[1], DEEP], ids=repr)
def test_other_models_of_transformers_too(build, spec, tmp_path):
    model = trained(build(), spec)
    merge_and_save(model, tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert distance(answer(loaded), answer(model)) < 1e-5


def test_a_model_of_diffusers_too(tmp_path):
    import diffusers

    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    model = diffusers.UNet2DModel(
        8, 2, 2, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=4, layers_per_block=1, **blocks
    ).eval()
    names = [name for name, module in model.named_modules() if type(module) in (nn.Linear, nn.Conv2d)]
    trained(model, DoRA(LoRA(r=1)), names)
    merge_and_save(model, tmp_path)
    loaded = diffusers.UNet2DModel.from_pretrained(tmp_path)
    x = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert distance(loaded(x, 3).sample, model(x, 3).sample) < 1e-5


@pytest.mark.parametrize("spec", EVERY[::5], ids=repr)
def test_a_plain_model_is_one_file_with_its_own_names(spec, tmp_path):
    model = trained(mlp(), spec)
    merge_and_save(model, tmp_path)
    loaded = mlp()
    loaded.load_state_dict(load_file(tmp_path / "model.safetensors"))
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    assert distance(answer(loaded, x), answer(model, x)) < 1e-5
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_every_kind_of_layer_is_written_in_its_own_layout(tmp_path):
    model = trained(Mixed(), MAP(LoRA(r=2)), ["tokens", "kernel", "head"])
    merge_and_save(model, tmp_path)
    loaded = Mixed().eval()
    load_model(loaded, tmp_path / "model.safetensors")
    ids = torch.randint(0, 11, (3, 5, 4), generator=torch.Generator().manual_seed(0))
    assert distance(answer(loaded, ids), answer(model, ids)) < 1e-5
    for name, layer in adapted_layers(model).items():
        W, update = truth(layer)
        written = loaded.get_submodule(name)
        assert distance(as_matrix(written, written.weight), W + update) < 2e-6


def test_the_files_are_those_of_the_plain_model(tmp_path):
    llama().save_pretrained(tmp_path / "plain")
    merge_and_save(trained(llama(), DEEP), tmp_path / "merged")
    plain, merged = (load_file(tmp_path / place / "model.safetensors") for place in ("plain", "merged"))
    assert {name: (value.shape, value.dtype) for name, value in plain.items()} == {
        name: (value.shape, value.dtype) for name, value in merged.items()
    }
    assert contents(tmp_path / "plain").keys() == contents(tmp_path / "merged").keys()
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "plain" / name).read_text() == (tmp_path / "merged" / name).read_text()


def test_tied_weights_are_written_once_and_stay_tied(tmp_path):
    model = trained(llama(tie_word_embeddings=True), DEEP)
    merge_and_save(model, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert distance(answer(loaded), answer(model)) < 1e-5


def test_what_trains_beside_adapters_is_written_as_trained(tmp_path):
    model = trained(bert(), LoRA(r=2), train=["classifier"])
    with torch.no_grad():
        model.classifier.weight.add_(1)
    merge_and_save(model, tmp_path)
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded["classifier.weight"].equal(model.classifier.weight)
    assert distance(answer(type(model).from_pretrained(tmp_path)), answer(model)) < 1e-5


def test_a_compiled_model_is_written_under_the_names_of_what_was_compiled(tmp_path):
    model = trained(mlp(), LoRA(r=2))
    merge_and_save(torch.compile(model, backend="eager"), tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == mlp().state_dict().keys()


# Rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_rounded_once_and_the_loss_is_the_true_one(dtype, tmp_path):
    model = trained(llama().to(dtype), DEEP)
    report = merge_and_save(model, tmp_path)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == dtype
    unit = torch.finfo(dtype).eps
    for name, layer in adapted_layers(model).items():
        (W, update), written = truth(layer), loaded.get_parameter(f"{name}.weight").detach().double()
        assert float(((written - W - update) / (W + update)).abs().max()) < unit / 2 * 1.01 + 1e-5, name
        lost = float((written - W - update).norm() / update.norm())
        assert report.lost[name] == pytest.approx(lost, rel=1e-2)
        assert report.lost[name] > unit / 100
    assert "lost to rounding" in str(report)


# What is left as it is


def test_the_model_is_left_as_it_is(tmp_path):
    model = trained(llama(), DEEP, train=["lm_head"]).train()
    before, config = numbers(model), model.config.to_dict()
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    objects = list(model.modules())
    merge_and_save(model, tmp_path)
    assert [*map(id, model.modules())] == [*map(id, objects)]
    assert all(module.training for module in objects)
    assert not any(layer.merged for layer in adapted_layers(model).values())
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert config == model.config.to_dict()
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for layer in adapted_layers(model).values() for p in layer.adapter.parameters())


def test_a_merged_model_is_written_as_it_is(tmp_path):
    model = trained(llama().bfloat16(), DEEP)
    report = merge_and_save(model, tmp_path / "unmerged")
    merge(model)
    assert merge_and_save(model, tmp_path / "merged").lost == pytest.approx(report.lost)
    unmerge(model)
    merge(model, keep_base=False)
    assert merge_and_save(model, tmp_path / "for good").lost == {}
    assert contents(tmp_path / "unmerged") == contents(tmp_path / "merged") == contents(tmp_path / "for good")


class Writer(nn.Sequential):
    """Writes itself, and notes where its weights stand meanwhile."""

    def save_pretrained(self, directory):
        self[0].seen.update({name: value.untyped_storage() for name, value in self.state_dict().items()})
        torch.save({}, Path(directory) / "other.bin")
        save_file(self.state_dict(), Path(directory) / "weights.safetensors")


def test_memory_holds_no_second_copy_of_the_model(tmp_path):
    model = Writer(nn.Linear(6, 10), nn.Linear(10, 7))
    model[0].seen = seen = {}
    trained(model, LoRA(r=2), ["1"])
    merge_and_save(model, tmp_path)
    assert seen["1.weight"].filename is not None  # it stands in a mapped file
    assert seen["1.bias"].data_ptr() == model[1].bias.data_ptr()
    assert seen["0.weight"].data_ptr() == model[0].weight.data_ptr()


# Directories


def test_another_number_of_shards_replaces_the_old_ones_and_other_files_stay(tmp_path):
    model = trained(llama(), DEEP)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "other.safetensors").write_text("not ours")
    kept = {"tokenizer.json", "other.safetensors", "config.json", "generation_config.json"}
    merge_and_save(model, tmp_path)
    assert contents(tmp_path).keys() == kept | {"model.safetensors"}
    merge_and_save(model, tmp_path, max_shard_size="8KB")
    shards = contents(tmp_path).keys() - kept
    assert len(shards) > 2
    assert "model.safetensors" not in shards
    assert distance(answer(tf.AutoModelForCausalLM.from_pretrained(tmp_path)), answer(model)) < 1e-5
    with torch.no_grad():
        next(iter(adapted_layers(model).values())).adapter.alpha.add_(1)
    merge_and_save(model, tmp_path)
    assert contents(tmp_path).keys() == kept | {"model.safetensors"}
    assert distance(answer(tf.AutoModelForCausalLM.from_pretrained(tmp_path)), answer(model)) < 1e-5
    assert (tmp_path / "other.safetensors").read_text() == "not ours"


def test_a_move_that_fails_leaves_the_directory_as_it_was(tmp_path, monkeypatch):
    place, replace = tmp_path / "place", Path.replace
    place.mkdir()
    for name in ("config.json", "model.safetensors", "model-00001-of-00002.safetensors", "mine.txt"):
        (place / name).write_text("old")
    before = contents(place)

    def write():
        with staged(place) as stage:
            for name in ("config.json", "model.safetensors", "sub/new.py"):
                (stage.files / name).parent.mkdir(exist_ok=True)
                (stage.files / name).write_text("new")

    for failing in range(20):
        calls = []

        def replace_or_fail(source, target, failing=failing, calls=calls):
            calls.append(source)
            if len(calls) == failing + 1:
                raise OSError(errno.ENOSPC, "no space")
            return replace(source, target)

        monkeypatch.setattr(Path, "replace", replace_or_fail)
        try:
            write()
            break
        except OSError:
            assert contents(place) == before, failing
            assert [path.name for path in tmp_path.iterdir()] == ["place"]
    assert failing == 6  # three old files away, three new ones in
    assert contents(place) == {
        "config.json": b"new", "model.safetensors": b"new", "sub/new.py": b"new", "mine.txt": b"old"
    }  # fmt: skip


def test_a_killed_move_leaves_no_config_to_load_from(tmp_path, monkeypatch):
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / "config.json").write_text("old")
    order, replace = [], Path.replace
    monkeypatch.setattr(
        Path, "replace", lambda source, target: order.append(Path(target).name) or replace(source, target)
    )
    with staged(tmp_path / "place") as stage:
        for name in ("a.txt", "config.json", "z.safetensors"):
            (stage.files / name).write_text("new")
    assert order == ["config.json", "a.txt", "z.safetensors", "config.json"]


def test_a_body_that_fails_leaves_nothing(tmp_path):
    def interrupted():
        with staged(tmp_path / "place") as stage:
            (stage.files / "config.json").write_text("half")
            raise KeyboardInterrupt

    message(KeyboardInterrupt, interrupted)
    assert not list(tmp_path.iterdir())


# Refusals


def test_weights_that_are_not_finite_are_refused_all_at_once(tmp_path):
    model = trained(llama(), LoRA(r=2))
    merge_and_save(model, tmp_path / "place")
    before = contents(tmp_path / "place")
    layers = adapted_layers(model)
    first, second = list(layers)[1], list(layers)[4]
    with torch.no_grad():
        layers[first].adapter.A[0, 0] = torch.nan
        layers[second].adapter.B[0, 0] = torch.inf
    said = message(ExportError, merge_and_save, model, tmp_path / "place")
    assert first in said
    assert second in said
    assert said.count("not finite") == 2
    assert contents(tmp_path / "place") == before
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


def test_weights_that_overflow_in_sixteen_bits_are_refused(tmp_path):
    model = trained(mlp(torch.float16), LoRA(r=2))
    with torch.no_grad():
        model[0].adapter.B.mul_(1e6)
    assert "'0'" in message(ExportError, merge_and_save, model, tmp_path / "place")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["adapter_config.json", "adapterzoo.json"])
def test_a_directory_with_an_adapter_is_refused(name, tmp_path):
    (tmp_path / name).write_text("{}")
    assert name in message(ExportError, merge_and_save, trained(mlp(), LoRA(r=2)), tmp_path)
    assert contents(tmp_path) == {name: b"{}"}


def test_what_can_not_be_written_is_refused_with_the_reason(tmp_path):
    place = tmp_path / "place"
    assert "no adapted layer" in message(TargetError, merge_and_save, mlp(), place)
    assert "max_shard_size" in message(ExportError, merge_and_save, trained(mlp(), LoRA(r=2)), place, max_shard_size=9)
    with torch.device("meta"):
        blank = nn.Sequential(nn.Linear(4, 4))
    adapt(blank, LoRA(r=2))
    assert "0.weight is on the meta device" in message(ExportError, merge_and_save, blank, place)
    (tmp_path / "file").write_text("")
    assert "is a file" in message(ExportError, merge_and_save, trained(mlp(), LoRA(r=2)), tmp_path / "file")
    assert not place.exists()


def test_a_wrapper_that_writes_adapters_alone_is_refused(tmp_path):
    class Adapters(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = mlp()

        def save_pretrained(self, directory):
            (Path(directory) / "adapter_config.json").write_text("{}")

    model = trained(Adapters(), LoRA(r=2))
    assert "does not write the model" in message(ExportError, merge_and_save, model, tmp_path / "place")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("export", [merge_and_save, export_lora])
def test_models_of_several_processes_are_refused(export, one_process, tmp_path):
    model = trained(mlp(), LoRA(r=2))
    wrapped = nn.parallel.DistributedDataParallel(model)
    assert "model.module" in message(ExportError, export, wrapped, tmp_path / "place")
    fully_shard(model)
    assert "0.weight is in shards" in message(ExportError, export, model, tmp_path / "place")
    model(torch.randn(2, 6))  # leaves whole weights behind, for a while
    assert "0.weight is in shards" in message(ExportError, export, model, tmp_path / "place")
    assert not list(tmp_path.iterdir())


# Quantised bases


@pytest.fixture
def four_bits(tmp_path):
    llama(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")
    config = tf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config)
    return trained(model, DEEP, ["q_proj", "down_proj"])


def test_a_quantised_base_is_refused(four_bits, tmp_path):
    said = message(ExportError, merge_and_save, four_bits, tmp_path / "place")
    assert said.count("dequantize=True") == 4
    merge(four_bits, dequantize=True)
    said = message(ExportError, merge_and_save, four_bits, tmp_path / "place")
    assert said.count("dequantize=True") == 4
    assert not (tmp_path / "place").exists()


@pytest.mark.parametrize("first_merged", [False, True])
def test_a_quantised_base_is_dequantised_as_a_whole_on_request(four_bits, first_merged, tmp_path):
    from bitsandbytes.functional import dequantize_4bit

    expected = {
        name: dequantize_4bit(module.weight, module.weight.quant_state).double()
        for name, module in four_bits.named_modules()
        if name.endswith("_proj")
    }
    for name, layer in adapted_layers(four_bits).items():
        expected[name] += reference(expected[name], tree_of(layer.adapter)[0]).update
    config, kinds = str(four_bits.config.to_dict()), [type(module) for module in four_bits.modules()]
    if first_merged:
        merge(four_bits, dequantize=True)
    merge_and_save(four_bits, tmp_path / "place", dequantize=True)
    assert str(four_bits.config.to_dict()) == config
    assert [type(module) for module in four_bits.modules()] == kinds
    assert "quantization_config" not in json.loads((tmp_path / "place" / "config.json").read_text())
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "place")
    assert {type(module) for module in loaded.modules() if hasattr(module, "in_features")} == {nn.Linear}
    assert len(expected) == 14
    for name, weight in expected.items():
        assert distance(loaded.get_parameter(f"{name}.weight"), weight) < 2e-6, name
    assert distance(answer(loaded), answer(four_bits)) < 2e-2  # the kernel in 4 bits rounds its inputs
