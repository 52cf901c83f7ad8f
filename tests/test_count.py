"""The count of parameters: the papers' tables, published totals, closed forms, and what is really built and trained."""

import copy
import csv
import functools
import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import specs
from torch import nn

import adapterzoo as az
from adapterzoo import MAP, SORA, AdaLoRA, DoRA, FLoRA, Full, LoMAP, LoRA, PreDiag
from adapterzoo.analysis.architectures import ARCHITECTURES
from adapterzoo.analysis.building import (
    DTYPES,
    from_config,
    published,
    skeleton,
)
from adapterzoo.analysis.counting import count
from adapterzoo.analysis.tables import aligned, in_bytes
from adapterzoo.errors import ArchitectureError, MisfitError, MissingPackageError, TargetError

PAPERS_TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
PAGE = Path(__file__).parent.parent / "docs" / "counting.md"


@functools.cache
def counted(arch, spec):
    """The count with the paper's targets, once for each spec."""
    return count(arch, spec, PAPERS_TARGETS)


# Table 1 of arXiv 2505.23094, Params (%): two digits after the point, trainable over all, adapters included.


@pytest.mark.parametrize(
    ("arch", "spec", "printed"),
    [
        ("llama-7b", LoRA(r=4), "0.10%"),
        ("llama-7b", LoMAP(r=4), "0.10%"),
        ("llama-7b", LoRA(r=8), "0.21%"),
        ("llama-7b", LoMAP(r=8), "0.21%"),
        ("llama-7b", LoRA(r=32), "0.83%"),
        ("llama-7b", LoMAP(r=32), "0.83%"),
        ("llama-7b", DoRA(LoRA(r=32)), "0.84%"),
        ("llama3-8b", LoRA(r=16), "0.35%"),
        ("llama3-8b", LoMAP(r=16), "0.35%"),
        ("llama3-8b", LoRA(r=32), "0.70%"),
        ("llama3-8b", LoMAP(r=32), "0.70%"),
        ("llama3-8b", DoRA(LoRA(r=32)), "0.71%"),
    ],
    ids=str,
)
def test_the_share_is_the_one_that_the_paper_prints(arch, spec, printed):
    assert f"{counted(arch, spec).share:.2%}" == printed


@pytest.mark.parametrize("spec", [LoRA(r=16), LoMAP(r=16)], ids=str)
def test_one_entry_of_the_table_is_the_share_of_the_base_instead(spec):
    """r=16 on LLaMA-7B is printed as 0.42; 28,049,408 of 6,738,415,616 + 28,049,408 are 0.4145 %."""
    found = counted("llama-7b", spec)
    assert found.base_parameters == 6_738_415_616
    assert found.adapter_parameters == 28_049_408 + (2 * 5 * 32 if isinstance(spec, MAP) else 0)
    assert f"{found.share:.2%}" == "0.41%"
    assert f"{found.share_of_base:.2%}" == "0.42%"


def test_the_share_of_the_base_is_not_what_the_other_entries_print():
    assert f"{counted('llama-7b', DoRA(LoRA(r=32))).share_of_base:.2%}" == "0.85%"
    assert f"{counted('llama3-8b', LoRA(r=32)).share_of_base:.2%}" == "0.71%"


def test_lomap_on_deberta_has_the_numbers_that_its_authors_give():
    """r=2 on all linear layers of DeBERTa-v3-base: 331,920, 12 x 6 x 2 = 144 of them scalars."""
    lora, lomap = count("deberta-v3-base", LoRA(r=2)), count("deberta-v3-base", LoMAP(r=2))
    assert len(lomap.layers) == 12 * 6
    assert lomap.trainable_parameters == 331_920
    assert lomap.trainable_parameters - lora.trainable_parameters == 144


def test_the_page_shows_these_shares():
    rows = re.findall(r"^\| LLaMA(\S+) \| (.+), r = (\d+) \| \S+ \| (\S+) \| (\S+) \|$", PAGE.read_text(), re.MULTILINE)
    makers = {"LoRA": LoRA, "LoMAP": LoMAP, "DoRA": lambda r: DoRA(LoRA(r=r))}
    for model, names, r, share, of_base in rows:
        for name in names.split(", "):
            found = counted({"-7B": "llama-7b", "3-8B": "llama3-8b"}[model], makers[name](r=int(r)))
            assert (f"{found.share:.4%}", f"{found.share_of_base:.4%}") == (f"{share}%", f"{of_base}%")
    assert len(rows) == 9


# Published models


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_published_model_comes_to_its_published_total(name):
    model = published(name)
    assert sum(value.numel() for value in model.parameters()) == ARCHITECTURES[name].parameters
    assert {value.device.type for value in model.parameters()} == {"meta"}
    assert {value.dtype for value in model.parameters()} == {DTYPES[ARCHITECTURES[name].dtype]}


def test_seventy_billion_parameters_are_counted_without_memory_for_them():
    found = count("llama2-70b", LoRA(r=8), ["q_proj", "v_proj"])
    assert found.total_parameters - found.adapter_parameters == found.base_parameters == 68_976_648_192
    assert found.adapter_parameters == 80 * 8 * ((8192 + 8192) + (8192 + 1024))
    assert found.base_bytes == 2 * 68_976_648_192


def test_another_dtype_of_the_base_changes_bytes_and_no_numbers():
    half, whole = count("bert-base", LoRA(r=2), dtype=torch.bfloat16), count("bert-base", LoRA(r=2))
    assert (half.dtype, whole.dtype) == ("bfloat16", "float32")
    assert 2 * half.base_bytes == whole.base_bytes == 4 * whole.base_parameters
    assert half.adapter_bytes == whole.adapter_bytes
    assert half.trainable_parameters == whole.trainable_parameters


def test_hugging_faces_transposed_layers_are_counted_as_matrices():
    found = count("gpt2", DoRA(LoRA(r=4)), ["c_attn"])
    assert [(g.label, g.number, g.shape, g.each) for g in found.groups] == [
        ("c_attn", 12, (2304, 768), 4 * (2304 + 768) + 2304)
    ]


# Closed forms


def closed_form(spec, out, cols):
    """Parameters of a composition on a weight [out, cols]."""
    if isinstance(spec, (MAP, DoRA, PreDiag, SORA)):
        inside = closed_form(spec.inner, out, cols)
        if isinstance(spec, MAP):
            return inside + (2 * out if spec.per == "channel" else 2)
        return inside + (2 * spec.rank * out if isinstance(spec, SORA) else out)
    if isinstance(spec, FLoRA):
        r_out, r_in = spec.ranks
        return out * r_out + r_out * r_in + r_in * cols
    if isinstance(spec, Full):
        return out * cols
    return spec.r * (out + cols + isinstance(spec, AdaLoRA))


@st.composite
def adapted_sizes(draw):
    out, cols = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    return draw(specs(out, cols)), out, cols, draw(st.booleans())


@settings(max_examples=100)
@given(adapted_sizes())
def test_a_layer_is_counted_as_the_closed_form_says(drawn):
    spec, out, cols, bias = drawn
    model = nn.Sequential(nn.Linear(cols, out, bias=bias))
    found = count(model, spec)
    assert [(layer.name, layer.spec, layer.shape) for layer in found.layers] == [("0", spec, (out, cols))]
    assert found.adapter_parameters == found.trainable_parameters == closed_form(spec, out, cols)
    assert found.base_parameters == out * cols + bias * out


@pytest.mark.parametrize(
    ("module", "out", "cols"),
    [
        (nn.Conv1d(6, 8, 3), 8, 6 * 3),
        (nn.Conv2d(6, 8, (3, 5), groups=2), 8, 3 * 3 * 5),
        (nn.Conv3d(4, 6, 2, bias=False), 6, 4 * 8),
        (nn.Embedding(20, 7), 7, 20),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
@pytest.mark.parametrize(
    "spec", [LoRA(r=3), AdaLoRA(r=3), MAP(DoRA(LoRA(r=2))), SORA(PreDiag(Full()), rank=2)], ids=str
)
def test_other_layers_are_counted_as_their_matrices(module, out, cols, spec):
    found = count(nn.Sequential(module), spec, ["0"])
    assert found.layers[0].shape == (out, cols)
    assert found.adapter_parameters == closed_form(spec, out, cols)


def test_a_tucker_form_of_a_kernel_is_counted_by_its_modes():
    model = nn.Sequential(nn.Conv2d(12, 10, (3, 5), groups=2))
    tucker, whole = count(model, FLoRA(r=(4, 3, 2, 2)), ["0"]), count(model, FLoRA(r=(4, 3)), ["0"])
    assert tucker.adapter_parameters == 10 * 4 + 6 * 3 + 3 * 2 + 5 * 2 + 4 * 3 * 2 * 2
    assert whole.adapter_parameters == 10 * 4 + 6 * 3 + 4 * 3 * 3 * 5


# What is built, and trained


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.out = nn.Linear(12, 12), nn.ModuleDict({"dense": nn.Linear(12, 12, bias=False)})
        self.dense = nn.Linear(12, 12)

    def forward(self, x):
        return x + self.dense(torch.relu(self.out["dense"](self.q_proj(x))))


class Model(nn.Module):
    """Two blocks, an embedding tied to its head, and a classifier."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.words = nn.Embedding(30, 12)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head, self.classifier = nn.Linear(12, 30, bias=False), nn.Linear(12, 3)
        self.head.weight = self.words.weight
        self.register_buffer("scale", torch.ones(1))
        self.to(dtype)

    def forward(self, ids):
        x = self.words(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x).sum() + self.classifier(x).sum() * self.scale


@pytest.mark.parametrize("adapter_dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", [MAP(DoRA(LoRA(r=3, alpha=5))), AdaLoRA(r=4), FLoRA(r=(2, 3))], ids=str)
def test_bytes_are_those_of_a_real_step_of_adamw(spec, dtype, adapter_dtype):
    torch.manual_seed(0)
    model, options = Model(dtype), {"train": ["classifier"], "adapter_dtype": adapter_dtype}
    found = count(model, spec, **options)
    base = sum(value.numel() * value.element_size() for value in model.parameters())
    plan = az.adapt(model, spec, **options)
    trained = [value for value in model.parameters() if value.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-3)
    model(torch.arange(6)).backward()
    optimiser.step()

    def size(values):
        return sum(value.numel() * value.element_size() for value in values)

    states = [state[name] for state in optimiser.state.values() for name in ("exp_avg", "exp_avg_sq")]
    saved = [value for name, value in model.state_dict().items() if ".adapter." in name]
    assert len(states) == 2 * len(trained)
    assert found.base_bytes == base
    assert found.adapter_bytes == size(saved)
    assert found.gradient_bytes == size(value.grad for value in trained)
    assert found.optimiser_bytes == size(states)
    assert found.trainable_parameters == plan.trainable_parameters
    assert found.total_parameters == plan.total_parameters
    assert found.adapter_parameters == plan.trainable_parameters - (12 * 3 + 3)


def test_a_model_that_is_given_is_left_as_it_is():
    model = Model()
    model.words.requires_grad_(False)
    modules, flags = dict(model.named_modules()), {name: p.requires_grad for name, p in model.named_parameters()}
    values = {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}
    found = count(model, DoRA(LoRA(r=2)), train=["classifier"])
    assert dict(model.named_modules()) == modules
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(value.data_ptr() == values[name][0] for name, value in model.state_dict().items())
    assert all(value.equal(values[name][1]) for name, value in model.state_dict().items())
    assert found.base_parameters == sum(value.numel() for value in model.parameters())


def test_the_copy_that_is_counted_holds_no_values_and_the_same_ties():
    model = Model()
    model.words.requires_grad_(False)
    hollow = skeleton(model)
    assert {value.device.type for value in (*hollow.parameters(), *hollow.buffers())} == {"meta"}
    assert hollow.head.weight is hollow.words.weight
    assert hollow.head.weight is not model.head.weight
    assert [*hollow.state_dict()] == [*model.state_dict()]
    assert {name: p.requires_grad for name, p in hollow.named_parameters()} == {
        name: p.requires_grad for name, p in model.named_parameters()
    }


def test_an_adapted_model_is_counted_as_it_stands():
    model = Model()
    az.adapt(model, AdaLoRA(r=4), ["q_proj"])
    full = count(model)
    assert full.adapter_parameters == full.trainable_parameters == 2 * 4 * (12 + 12 + 1)
    az.adapted_layers(model)["blocks.0.q_proj"].adapter.requires_grad_(False)
    with torch.no_grad():
        az.adapted_layers(model)["blocks.1.q_proj"].adapter.mask[:3] = 0
    az.compact(model)
    found = count(model)
    assert [layer.parameters for layer in found.layers] == [4 * 25, 25]
    assert found.trainable_parameters == 25
    assert [(group.label, group.each) for group in found.groups] == [("blocks.0.q_proj", 100), ("blocks.1.q_proj", 25)]


def test_an_adapted_model_takes_more_adapters_in_the_count():
    model = Model()
    az.adapt(model, LoRA(r=1), ["q_proj"])
    found = count(model, LoRA(r=2), ["dense"])
    assert found.adapter_parameters == 2 * 24 + 4 * 2 * 24
    assert len(az.adapted_layers(model)) == 2


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((), {}, TargetError, "adapt needs a spec such as MAP"),
        ((LoRA(r=2), ["q_prj"]), {}, TargetError, "did you mean 'q_proj'"),
        ((LoRA(r=13), ["q_proj"]), {}, (TargetError, MisfitError), "r=13 is above"),
        ((LoRA(r=2),), {"dtype": torch.float32}, ArchitectureError, r"model.to\(dtype\) casts it"),
    ],
    ids=["no spec", "a typo", "a rank too high", "a dtype"],
)
def test_what_adapt_refuses_is_refused_in_its_words(arguments, options, error, message):
    with pytest.raises(error, match=message):
        count(Model(), *arguments, **options)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("lama-7b", "unknown architecture 'lama-7b'; known: llama-7b, .*; did you mean 'llama-7b'"),
        ("own/config.json", "a config of your own is a pathlib.Path"),
        (7, "not int"),
    ],
)
def test_what_is_no_model_is_refused(model, message):
    with pytest.raises(ArchitectureError, match=message):
        count(model, LoRA(r=2))


def test_without_transformers_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'adapterzoo\[models\]'"):
        count("llama-7b", LoRA(r=2))
    assert count(Model(), LoRA(r=2)).adapter_parameters > 0


# Quantised weights stand for more numbers than they store


def test_weights_of_eight_bits_count_as_their_numbers_and_take_their_bytes():
    quantization = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128, bias=False), nn.Linear(128, 32, bias=False))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(version=2), lambda _, name: name == "0")
    found = count(model, LoRA(r=2), ["1"])
    assert found.base_parameters == 64 * 128 + 128 * 32
    assert found.base_bytes == 128 * (64 + 4 + 1) + 4 * 128 * 32  # a byte each; for each row a scale and a zero point


def test_weights_of_four_bits_count_as_their_numbers():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    packed = bitsandbytes.nn.Params4bit(torch.randn(128, 64), requires_grad=False, quant_type="nf4").to("cpu")
    model = nn.Sequential(nn.Linear(64, 128, bias=False), nn.Linear(128, 32, bias=False))
    model[0].weight = packed
    found = count(model, LoRA(r=2), ["1"])
    assert packed.numel() == 64 * 128 // 2
    assert found.base_parameters == 64 * 128 + 128 * 32


# Rows


def test_like_layers_are_a_group_that_has_the_shortest_name_of_its_own():
    found = count(Model(), None, {"blocks.1.q_proj": DoRA(LoRA(r=2)), "all-linear": LoRA(r=2)})
    assert [(group.label, group.number) for group in found.groups] == [
        ("blocks.0.q_proj", 1),
        ("out.dense", 2),
        ("*.dense", 2),
        ("blocks.1.q_proj", 1),
        ("classifier", 1),
    ]
    assert sum(group.parameters for group in found.groups) == found.adapter_parameters
    assert [group.spec for group in found.groups if "q_proj" in group.label] == [LoRA(r=2), DoRA(LoRA(r=2))]


def test_a_group_never_has_the_name_of_another_layer():
    model = nn.ModuleDict({"blocks": nn.ModuleList([Block(), Block()]), "q_proj": nn.Linear(12, 12)})
    labels = [(group.label, group.number) for group in count(model, LoRA(r=2), ["q_proj"]).groups]
    assert labels == [("*.q_proj", 2), ("q_proj", 1)]


def test_layers_of_unlike_shapes_are_not_one_group():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    assert [(g.label, g.number, g.shape) for g in count(model, LoRA(r=2)).groups] == [
        ("0", 1, (6, 4)),
        ("*", 2, (6, 6)),
    ]


@pytest.mark.parametrize("per_layer", [False, True])
def test_csv_and_json_say_the_same(per_layer):
    found = count(Model(), LoRA(r=2), per_layer=per_layer)
    tree = json.loads(found.to_json())
    rows = list(csv.DictReader(io.StringIO(found.to_csv())))
    listed = tree["layers" if per_layer else "groups"]
    assert [{key: str(value) for key, value in row.items()} for row in listed] == rows
    assert len(rows) == (7 if per_layer else 4)
    assert sum(row["parameters"] for row in listed) == tree["adapter_parameters"] == found.adapter_parameters
    assert tree["share"] == found.trainable_parameters / tree["total_parameters"]
    assert tree["optimiser_bytes"] == 2 * tree["gradient_bytes"] == 8 * tree["trainable_parameters"]


def test_every_layer_is_shown_on_demand():
    shown = str(count(Model(), LoRA(r=2), ["q_proj"], per_layer=True))
    assert "blocks.0.q_proj   12 x 12          48\nblocks.1.q_proj   12 x 12          48\n" in shown


def test_the_spec_stands_in_every_row_where_there_are_several():
    shown = str(count(Model(), targets={"q_proj": LoRA(r=2), "classifier": MAP(LoRA(r=1))}))
    assert "with 2 specs" in shown
    assert "classifier  MAP(LoRA(r=1))       1    3 x 12    17          17" in shown


def test_a_table_is_aligned_and_bytes_have_units():
    assert aligned([("a", "bb", "c"), ("aa", "b", 1234)], left=2) == "a   bb      c\naa  b   1,234"
    assert [in_bytes(number) for number in (0, 1023, 1024, 3 * 2**19, 2**30, 5 * 2**39)] == [
        "0 B", "1,023 B", "1.00 KiB", "1.50 MiB", "1.00 GiB", "2.50 TiB",
    ]  # fmt: skip


# Configs


TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def written(path, tree):
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree))
    return path


def test_a_config_is_counted_like_the_model_that_it_builds(tmp_path):
    path = written(tmp_path / "config.json", TINY)
    found = count(path, MAP(LoRA(r=4)), ["q_proj", "k_proj"])
    block = 32 * (32 + 16 + 16 + 32) + 3 * 32 * 48 + 2 * 32
    assert (found.model, found.kind, found.dtype) == (str(path), "LlamaForCausalLM", "bfloat16")
    assert found.base_parameters == 2 * 50 * 32 + 2 * block + 32
    assert found.adapter_parameters == 2 * (4 * (32 + 32) + 4 * (32 + 16) + 2 * 2)


def test_a_config_of_a_published_model_comes_to_its_total(tmp_path):
    known = ARCHITECTURES["llama3-8b"]
    path = written(tmp_path / "config.json", {"model_type": "llama", "architectures": [known.model], **known.config})
    assert count(path, LoRA(r=1), ["q_proj"]).base_parameters == known.parameters


def test_a_config_without_a_class_builds_what_automodel_builds(tmp_path):
    path = written(
        tmp_path / "config.json", {key: TINY[key] for key in TINY if key not in ("architectures", "torch_dtype")}
    )
    model = from_config(path)
    assert type(model).__name__ == "LlamaModel"
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert {value.dtype for value in from_config(path, torch.float16).parameters()} == {torch.float16}


def test_code_that_comes_with_a_config_is_not_run(tmp_path):
    written(tmp_path / "evil.py", "raise SystemExit('was run')")
    path = written(tmp_path / "config.json", TINY | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}})
    assert type(from_config(path)).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "config.json is not JSON: "),
        ("[" * 100_000, "config.json is not JSON: "),
        ([TINY], 'it has no "model_type"'),
        ({}, 'it has no "model_type"'),
        (TINY | {"model_type": "lama"}, "no model_type 'lama'; did you mean 'llama'"),
        (TINY | {"model_type": ["llama"]}, "no model_type"),
        (
            TINY | {"architectures": ["LlamaForCausalML"]},
            "no model class 'LlamaForCausalML'; did you mean 'LlamaForCausalLM'",
        ),
        (TINY | {"architectures": ["pipeline"]}, "no model class 'pipeline'"),
        (TINY | {"architectures": ["BertModel"]}, "BertModel is not built from a config of model_type 'llama'"),
        (TINY | {"architectures": "LlamaForCausalLM"}, "no model class"),
        (TINY | {"hidden_size": "wide"}, "builds no model from it"),
        (TINY | {"num_attention_heads": 0}, "builds no model from it"),
        (TINY | {"torch_dtype": "int3"}, "unknown dtype 'int3'; known: float64"),
        (TINY | {"torch_dtype": ["float32"]}, "unknown dtype"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) > 1 and value[0] != "[" else "",
)
def test_a_config_that_builds_nothing_is_a_sentence(tmp_path, change, message):
    path = written(tmp_path / "config.json", change)
    with pytest.raises(ArchitectureError) as error:
        count(path, LoRA(r=2))
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_config_that_is_not_there_is_a_sentence(tmp_path):
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(ArchitectureError, match=r"can't be read: .*; give the path of a config\.json"):
            count(Path(path), LoRA(r=2))


def test_a_count_is_a_value():
    one, other = count(Model(), LoRA(r=2)), count(Model(), LoRA(r=2))
    assert one == other == copy.deepcopy(one)
    assert len({one, other}) == 1
    assert one != count(Model(), LoRA(r=3))
