"""Files from strangers: damaged or malicious bytes give a CheckpointError; nothing runs, nothing is half loaded."""

import copy
import json
import os
import pickle
import random
import struct
import tracemalloc
from functools import cache
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from adapterzoo import adapted_layers
from adapterzoo.checkpoint.inspection import inspect
from adapterzoo.checkpoint.loading import load
from adapterzoo.checkpoint.saving import save
from adapterzoo.errors import CheckpointError
from tests.test_checkpoint import TOKENS, adapted, bits, net, refusal, same_bits, signed, state, unchanged

MANIFEST = "adapterzoo.json"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A whole save, as bytes: its description and its one tensor file."""
    place = tmp_path_factory.mktemp("good")
    save(adapted(), place)
    (tensors,) = place.glob("*.safetensors")
    return json.loads((place / MANIFEST).read_text()), tensors.name, tensors.read_bytes()


@cache
def target():
    """One plain model for all attacks: none may change it."""
    model = net()
    return model, state(model)


def written(place, manifest, name, data, honest=True):
    """Write a save; an honest description has the right size and hash of its tensor file, whatever is in it."""
    place.mkdir(exist_ok=True)
    for path in place.iterdir():
        path.unlink()
    if honest and isinstance(manifest, dict):
        files = {name: {"bytes": len(data), "sha256": sha256(data).hexdigest()}}
        manifest = {**manifest, "adapters": {"default": {**manifest["adapters"]["default"], "files": files}}}
    if isinstance(manifest, dict):
        manifest = signed(manifest)
    (place / MANIFEST).write_bytes(manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode())
    (place / name).write_bytes(data)
    return place


def attack(place):
    """Try to load: an error that changes nothing, or a whole load. True if it was refused."""
    model, before = target()
    try:
        report = load(model, place)
    except CheckpointError as error:
        refused = str(error)
    else:
        refused = ""
    if refused:
        refused.encode("utf-8")
        assert len(refused) < 50_000
        assert unchanged(before, model)
        return True
    target.cache_clear()
    assert set(report.layers) == set(adapted_layers(model))
    values = model.state_dict()
    for path in place.glob("*.safetensors"):
        for name, value in load_file(path).items():
            assert values[name].numpy().tobytes() == value.numpy().tobytes()
    return False


# Bytes


@given(seed=st.integers(0, 2**32))
@settings(max_examples=150)
def test_damaged_bytes_of_the_description_are_refused_or_harmless(good, tmp_path_factory, seed):
    manifest, name, data = good
    text = damaged(json.dumps(manifest).encode(), random.Random(seed))
    place = written(tmp_path_factory.getbasetemp() / "bytes", text, name, data)
    attack(place)
    try:
        str(inspect(place))
    except CheckpointError:
        pass


@pytest.mark.parametrize(("old", "new"), [('"alpha": 3.0', '"alpha": 4.0'), ('"seed": 3', '"seed": 4')])
def test_a_number_that_was_changed_by_hand_is_noticed(good, tmp_path, old, new):
    manifest, name, data = good
    text = json.dumps(manifest)
    assert old in text
    place = written(tmp_path / "x", text.replace(old, new).encode(), name, data)
    assert "it was damaged, or changed by hand" in str(refusal(net(), place))


@given(seed=st.integers(0, 2**32))
@settings(max_examples=100)
def test_any_change_of_a_tensor_file_is_noticed(good, tmp_path_factory, seed):
    manifest, name, data = good
    bad = damaged(data, random.Random(seed))
    if bad != data:
        place = written(tmp_path_factory.getbasetemp() / "noticed", manifest, name, bad, honest=False)
        assert attack(place)


@given(seed=st.integers(0, 2**32))
@settings(max_examples=150)
def test_a_damaged_tensor_file_with_the_right_hash_is_refused_or_whole(good, tmp_path_factory, seed):
    manifest, name, data = good
    draw = random.Random(seed)
    cut = 8 + struct.unpack("<Q", data[:8])[0]
    bad = damaged(data[:cut], draw) + data[cut:] if draw.random() < 0.8 else damaged(data, draw)
    attack(written(tmp_path_factory.getbasetemp() / "hash", manifest, name, bad))


def damaged(data, draw):
    """A few bytes changed, inserted, dropped, repeated or cut off."""
    data = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 5])):
        at, size = draw.randrange(len(data) or 1), draw.choice([1, 1, 2, 8, 40])
        what = draw.randrange(5)
        if what == 0:
            data[at : at + size] = bytes(draw.randrange(256) for _ in range(size))
        elif what == 1:
            data[at:at] = bytes(draw.choice(b'{}[]",:0123456789eE.-ntfu\\') for _ in range(size))
        elif what == 2:
            del data[at : at + size]
        elif what == 3:
            data[at:at] = data[at // 2 : at // 2 + size]
        else:
            del data[at:]
    return bytes(data)


# JSON

NASTY = [
    None, True, 0, -1, 1, 2**31, 2**48, 2**63, 2**64, 10**400, 1.5, -0.0, 1e308, "", "x", "../x", "/etc/passwd", "\x00",
    "tensors-000000000000.safetensors", "__class__", "\u202e", "é" * 50, [], {}, [[]], [1, 2], [-1], [2**40, 2**40],
    {"piece": "LoRA"}, {"": 0}, ["a"] * 3, "LoRA(r=8)", "__import__('os').system('false')",
]  # fmt: skip


@given(seed=st.integers(0, 2**32))
@settings(max_examples=400)
def test_a_changed_description_is_refused_or_harmless(good, tmp_path_factory, seed):
    manifest, name, data = good
    tree = copy.deepcopy(manifest)
    draw = random.Random(seed)
    for _ in range(draw.choice([1, 1, 2])):
        mutate(tree, draw)
    attack(written(tmp_path_factory.getbasetemp() / "json", tree, name, data, honest=False))


def mutate(tree, draw):
    """Replace, drop, rename, copy or add one thing somewhere."""
    holders = [holder for holder in nodes(tree) if holder]
    holder = draw.choice(holders)
    keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
    key = draw.choice(keys)
    what = draw.randrange(5)
    if what == 0:
        holder[key] = copy.deepcopy(draw.choice(NASTY))
    elif what == 1:
        del holder[key]
    elif what == 2:
        other = draw.choice(holders)
        holder[key] = copy.deepcopy(draw.choice(list(other.values()) if isinstance(other, dict) else other))
    elif isinstance(holder, dict):
        holder[draw.choice(["x", "seed", "r", "inner", "../x", "names"])] = holder.pop(key) if what == 3 else "new"
    else:
        holder.append(copy.deepcopy(holder[key]))


def nodes(tree):
    if isinstance(tree, (dict, list)):
        yield tree
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from nodes(value)


def test_the_fuzzer_reaches_both_ends(good, tmp_path):
    """Most changes are refused, some are harmless: else the tests above would say little."""
    manifest, name, data = good
    refused = 0
    for seed in range(60):
        tree = copy.deepcopy(manifest)
        mutate(tree, random.Random(seed))
        refused += attack(written(tmp_path / "x", tree, name, data, honest=False))
    assert 20 < refused < 60


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"", "is not JSON"),
        (b"[]", "is no description of adapters"),
        (b"null", "is no description of adapters"),
        (b"\xff\xfe{}", "it holds text that is no Unicode"),
        (b'{"format": "adapterzoo", "format": "adapterzoo"}', "the key 'format' stands twice"),
        (b'{"format": NaN}', "NaN is no number of JSON"),
        (b'{"format": -Infinity}', "-Infinity is no number of JSON"),
        (b'{"format": "\\ud800"}', "it holds text that is no Unicode"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 200_000, "nested too deeply"),
        (b'{"format": "adapterzoo", "format_version": ' + b"9" * 5000 + b"}", "is not JSON that can be read"),
        (b'{"format": "adapterzoo", "format_version": ' + b"9" * 400 + b"}", "a newer adapterzoo reads it"),
        (b'{"format": "adapterzoo", "format_version": 1.0}', "the format_version 1.0"),
        (b'{"format": "adapterzoo", "format_version": 1}', "Field required"),
        (b'{"format": "' + b"x" * (64 * 2**20) + b'"}', "more than 67,108,864 bytes"),
    ],
)
def test_hostile_json_is_refused_with_a_sentence(text, sentence, tmp_path):
    (tmp_path / MANIFEST).write_bytes(text)
    assert sentence in str(refusal(net(), tmp_path))
    with pytest.raises(CheckpointError):
        inspect(tmp_path)
    with pytest.raises(CheckpointError):
        save(adapted(), tmp_path)  # what can't be read is not overwritten
    assert (tmp_path / MANIFEST).stat().st_size == len(text)


def composition(tree):
    return tree["adapters"]["default"]["compositions"][1]


@pytest.mark.parametrize(
    "change",
    [
        lambda t: composition(t).update(piece="x" * 10_000_000),
        lambda t: composition(t).update({"y" * 10_000_000: 1}),
        lambda t: composition(t)["inner"].update(r=10**300),
        lambda t: composition(t)["inner"].update(r=2**40),
        lambda t: composition(t)["inner"].update(alpha=1e999),
        lambda t: composition(t).update(piece="__import__('os').abort()"),
        lambda t: composition(t).update(piece=["LoRA"]),
        lambda t: composition(t).update(inner=nested(98)),
        lambda t: composition(t).update(inner=nested(300)),
        lambda t: composition(t).update(inner=nested(900)),
        lambda t: composition(t).update(inner=None),
        lambda t: composition(t).update(schema=2),
    ],
)
def test_hostile_specs_are_refused(change, good, tmp_path):
    manifest, name, data = good
    tree = copy.deepcopy(manifest)
    change(tree)
    error = refusal(net(), written(tmp_path / "x", tree, name, data))
    assert len(str(error)) < 20_000


@pytest.mark.parametrize("value", [0, -1, 100, 2**31, 2**62, 10**300])
def test_no_number_in_a_spec_costs_memory(value, good, tmp_path):
    manifest, name, data = good
    model, tried = net(), 0
    for path in numbers(manifest["adapters"]["default"]["compositions"]):
        tree = copy.deepcopy(manifest)
        holder = tree["adapters"]["default"]["compositions"]
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = value
        written(tmp_path / "x", tree, name, data)
        tried += 1
        try:
            load(model, tmp_path / "x")
        except CheckpointError:
            continue
        model = net()  # steps of a schedule, say, which cost nothing
    assert tried > 10


def numbers(tree, path=()):
    """The paths to all whole numbers."""
    if isinstance(tree, (dict, list)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from numbers(value, (*path, key))
    elif type(tree) is int:
        yield path


def nested(depth):
    tree = {"piece": "LoRA", "r": 2}
    for _ in range(depth):
        tree = {"piece": "PreDiag", "inner": tree}
    return tree


# Names


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/tmp/outside.safetensors", "a/b.safetensors", "..", "", "tensors-0.safetensors",
     "tensors-000000000000.safetensors\x00", "tensors-000000000000.safetensors\n", "tensors-00000000000G.safetensors",
     "C:\\x.safetensors", "adapterzoo.json"],
)  # fmt: skip
def test_no_name_leads_out_of_the_directory(name, good, tmp_path):
    manifest, own, data = good
    (tmp_path / "outside.safetensors").write_bytes(data)
    tree = json.loads(json.dumps(manifest).replace(own, json.dumps(name)[1:-1]))
    place = written(tmp_path / "x", tree, own, data, honest=False)
    assert "is no name of a tensor file" in str(refusal(net(), place))


def test_links_that_lead_out_are_refused_and_links_inside_are_not(good, tmp_path):
    manifest, name, data = good
    outside = tmp_path / "outside"
    outside.write_bytes(data)
    place = written(tmp_path / "x", manifest, name, data)
    (place / name).unlink()
    (place / name).symlink_to(outside)
    assert f"the tensor file {name} is a link that leads out" in str(refusal(net(), place))
    (place / "inside").write_bytes(data)
    (place / name).unlink()
    (place / name).symlink_to("inside")
    model = net()
    load(model, place)
    assert model(TOKENS).equal(adapted()(TOKENS))
    (place / name).unlink()
    (place / name).symlink_to("nowhere")
    assert "leads nowhere" in str(refusal(net(), place))


def test_a_link_in_the_place_of_the_description_is_not_followed_by_a_save(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / MANIFEST).symlink_to(outside)
    with pytest.raises(CheckpointError, match="leads out of the directory"):
        save(adapted(), tmp_path / "x")
    assert outside.read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("which", ["description", "tensors"])
def test_what_is_no_plain_file_is_never_waited_for(which, good, tmp_path):
    manifest, name, data = good
    place = written(tmp_path / "x", manifest, name, data)
    path = place / (MANIFEST if which == "description" else name)
    path.unlink()
    os.mkfifo(path)
    assert "is no plain file" in str(refusal(net(), place))
    path.unlink()
    path.mkdir()
    assert "is no plain file" in str(refusal(net(), place))


# Tensor files


def safetensors(header, body=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00",
        struct.pack("<Q", 0),
        safetensors({}, length=2**63),
        safetensors({}, length=2**64 - 1),
        safetensors({}, length=99_000_000),
        safetensors({}, length=2**40) + b"x" * 1000,
        safetensors(b"[" * 100_000),
        safetensors({"up.adapter.alpha": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
        safetensors({"up.adapter.alpha": {"dtype": "F32", "shape": [2**33, 2**33], "data_offsets": [0, 4]}}, b"0000"),
        safetensors({"up.adapter.alpha": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"0000"),
        safetensors({"up.adapter.alpha": {"dtype": "OBJECT", "shape": [1], "data_offsets": [0, 4]}}, b"0000"),
        safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"0000" * 5),
        safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, b"0000"),
        pickle.dumps({"up.adapter.alpha": torch.ones(1)}),
        b"PK\x03\x04" + b"\x00" * 100,
    ],
)
def test_hostile_tensor_files_are_refused_without_much_memory(data, good, tmp_path):
    manifest, name, _ = good
    place = written(tmp_path / "x", manifest, name, data)
    model = net()
    tracemalloc.start()
    try:
        refusal(model, place)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 50_000_000


def replaced(data, change):
    """A tensor file with another header over the same numbers."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    change(header)
    return safetensors(header, data[8 + size :])


def swap(header, one, other):
    header[one], header[other] = header[other], header[one]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda h: h.update(extra=h.pop("up.adapter.alpha")), "lacks the tensor 'up.adapter.alpha'"),
        (lambda h: h.update(extra=h.pop("up.adapter.alpha")), "holds a tensor that is not described: 'extra'"),
        (lambda h: h["up.adapter.alpha"].update(dtype="I32"), "'up.adapter.alpha' is int32, described as float32"),
        (lambda h: h["head.weight"].update(shape=[6, 3]), "'head.weight' has the shape [6, 3], described as [3, 6]"),
        (lambda h: swap(h, "head.weight", "head.bias"), "'head.weight' has the shape [3], described as [3, 6]"),
    ],
)
def test_a_tensor_file_is_held_against_its_description(change, sentence, good, tmp_path):
    manifest, name, data = good
    assert sentence in str(refusal(net(), written(tmp_path / "x", manifest, name, replaced(data, change))))


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("head.bias", [1, 3]),
        ("head.weight", [6, 3]),
        ("norm.running_mean", [3, 2]),
        ("up.adapter.inner.magnitude", [1, 5]),
        ("down.adapter.inner.inner.A", [3, 6]),
        ("up.adapter.inner.inner.P", [4, 5]),
    ],
)
def test_values_of_another_shape_are_refused_even_where_they_would_fit(key, shape, good, tmp_path):
    """Torch spreads [1, 3] over [3], and 18 numbers are 18 numbers."""
    manifest, name, data = good
    tree = copy.deepcopy(manifest)
    entry = next(entry for where, entry in entries(tree) if where == key)
    was, entry["shape"] = entry["shape"], shape
    data = replaced(data, lambda header: header[key].update(shape=shape))
    place = written(tmp_path / "x", tree, name, data)
    for model in (net(), adapted(seed=8)):
        assert f"has the shape {was} here and {shape} in the file" in str(refusal(model, place))


def entries(tree):
    """Every tensor's entry in a description, by its key."""
    adapter = tree["adapters"]["default"]
    for layer in adapter["layers"]:
        yield from ((f"{layer['names'][0]}.adapter.{name}", entry) for name, entry in layer["tensors"].items())
    yield from ((entry["names"][0], entry) for entry in adapter["trained"])


def test_names_in_files_can_not_reach_other_parts_of_a_model(good, tmp_path):
    """What is not a parameter, buffer or adapter by its own name is no target."""
    manifest, name, data = good
    tree = json.loads(json.dumps(manifest).replace('"head.weight"]', '"__class__.head.weight"]'))
    assert "'__class__.head.weight'" in str(refusal(net(), written(tmp_path / "x", tree, name, data)))


def test_nothing_is_left_half_loaded_where_the_last_tensor_does_not_fit(good, tmp_path):
    manifest, name, data = good
    tree = copy.deepcopy(manifest)
    last = tree["adapters"]["default"]["trained"][-1]
    assert last["names"] == ["norm.num_batches_tracked"]
    last["dtype"] = "float32"
    place = written(tmp_path / "x", tree, name, data)
    model = adapted(seed=8)
    before = bits(model)
    refusal(model, place)
    assert same_bits(before, bits(model))


def test_the_files_hold_no_code_and_need_none(good):
    root = Path(__file__).parent.parent / "adapterzoo" / "checkpoint"
    source = "".join(path.read_text() for path in root.glob("*.py"))
    for word in ("pickle", "eval(", "exec(", "torch.load", "__import__", "importlib.import_module"):
        assert word not in source
    assert b"pickle" not in good[2]
