"""The command line: what it prints, what it says about bad input, and that docs/counting.md shows what it prints."""

import csv
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from adapterzoo.analysis.architectures import ARCHITECTURES
from adapterzoo.cli import main

REPO = Path(__file__).parent.parent
PAGE = (REPO / "docs" / "counting.md").read_text()
SMALL = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 2,
    "vocab_size": 40,
    "n_positions": 16,
}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL))
    return str(path)


def printed(capsys, *arguments):
    """What a command prints; it has to succeed."""
    code = main(list(arguments))
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def refused(capsys, *arguments):
    """The sentence of a command that is refused, and prints nothing else."""
    code = main(list(arguments))
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("adapterzoo: ")
    assert "Traceback" not in err
    return err


def test_the_command_of_the_readme_prints_what_the_page_shows():
    """In a process of its own; what other packages write to stderr as they are imported is theirs."""
    line, shown = re.search(r"```sh\n(.*?)\n```\n\n```text\n(.*?)\n```", PAGE, re.DOTALL).groups()
    program, *arguments = shlex.split(line)
    assert program == "adapterzoo"
    run = subprocess.run(
        [sys.executable, "-m", "adapterzoo", *arguments], capture_output=True, text=True, cwd=REPO, timeout=120
    )
    assert (run.returncode, run.stdout) == (0, shown + "\n"), run.stderr


def test_the_page_lists_the_published_models():
    listed = re.search(r"Published models: (.*?)\. Each", PAGE, re.DOTALL).group(1)
    assert re.split(r",\s+", listed) == list(ARCHITECTURES)


def test_the_page_shows_every_option(capsys):
    with pytest.raises(SystemExit) as end:
        main(["count", "--help"])
    assert end.value.code == 0
    options = set(re.findall(r"--[\w-]+", capsys.readouterr().out)) - {"--help"}
    assert len(options) > 8
    assert not [option for option in options if option not in PAGE]


def test_a_config_is_counted(capsys, config):
    tree = json.loads(printed(capsys, "count", "--config", config, "--spec", "DoRA(LoRA(r=2))", "--json"))
    layers = 2 * (2 * (24 + 72) + 72 + 2 * (24 + 24) + 24 + 2 * (24 + 96) + 96 + 2 * (96 + 24) + 24)
    assert tree["kind"] == "GPT2LMHeadModel"
    assert tree["adapter_parameters"] == tree["trainable_parameters"] == layers
    assert {group["spec"] for group in tree["groups"]} == {"DoRA(LoRA(r=2))"}


def test_options_reach_adapt(capsys, config):
    line = (
        "--spec MAP(AdaLoRA(r=3)) --targets mlp.c_fc,c_attn --exclude h.1.attn.c_attn --train ln_f "
        "--dtype bfloat16 --adapter-dtype bfloat16 --json --per-layer"
    )
    tree = json.loads(printed(capsys, "count", "--config", config, *line.split()))
    assert [row["layer"] for row in tree["layers"]] == [
        "transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_fc",
    ]  # fmt: skip
    factors = 3 * (24 + 72) + 2 * 3 * (24 + 96) + 3 * 3
    assert tree["trainable_parameters"] == factors + 3 * 2 + 2 * 24
    assert tree["gradient_bytes"] == 2 * factors + 4 * 3 * 2 + 2 * 2 * 24
    assert (tree["dtype"], tree["base_bytes"]) == ("bfloat16", 2 * tree["base_parameters"])


def test_targets_may_each_have_a_spec(capsys, config):
    out = printed(
        capsys, "count", "--config", config, "--csv",
        "--target", "attn.c_proj=None", "--target", r".*\.(attn|mlp)\.c_proj=MAP(LoRA(r=1))",
        "--target", "c_fc = DoRA(LoRA(r=2))",
    )  # fmt: skip
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [(row["layers"], row["spec"], row["number"], row["parameters"]) for row in rows] == [
        ("c_fc", "DoRA(LoRA(r=2))", "2", str(2 * (2 * 120 + 96))),
        ("c_proj", "MAP(LoRA(r=1))", "2", str(2 * (120 + 2))),
    ]


def test_all_linear_is_what_no_targets_mean(capsys, config):
    said = printed(capsys, "count", "--config", config, "--spec", "LoRA(r=1)", "--targets", "all-linear")
    assert said == printed(capsys, "count", "--config", config, "--spec", "LoRA(r=1)")


@pytest.mark.parametrize("arguments", [[], ["--help"]], ids=str)
def test_without_a_command_the_help_lists_them(capsys, arguments):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 0
    assert re.search(r"^ +count +parameters, share and bytes", capsys.readouterr().out, re.MULTILINE)


MODEL = ["--arch", "gpt2"]
SPEC = ["--spec", "LoRA(r=8)"]


@pytest.mark.parametrize(
    ("arguments", "sentences"),
    [
        (["cuont"], ["'cuont'; known: ", "did you mean 'count'?", "`adapterzoo --help`"]),
        (["count", *MODEL, *SPEC, "--target-s", "q"], ["unknown option '--target-s'; did you mean '--target"]),
        (["count", *MODEL, *SPEC, "--arc=x"], ["unknown option '--arc=x'; did you mean '--arch'?", "count --help"]),
        (["count", *MODEL, *SPEC, "q_proj"], ["unknown option 'q_proj'"]),
        (["--verbose", "count"], ["unknown option '--verbose'"]),
        (["count", "--arch"], ["argument --arch: expected one argument (`adapterzoo count --help`"]),
        (["count", *MODEL, *SPEC, "--json", "--csv"], ["argument --csv: not allowed with argument --json"]),
        (["count"], ["\n  - give a model, either by --arch NAME or by --config FILE", "\n  - give a spec, such as"]),
        (["count", *MODEL, "--config", "x.json", *SPEC], ["give a model, either by"]),
        (["count", "--arch", "lama-7b", "--spec", "Lora(r=8)", "--dtype", "flot16"],
         ["did you mean 'llama-7b'?", "did you mean 'LoRA'?", "unknown dtype 'flot16'; known: ", "'float16'?"]),
        (["count", *MODEL, "--spec", "LoRA(r=0)"], ["LoRA: r=0 is not valid"]),
        (["count", *MODEL, "--spec", "__import__('os')"], ["unknown piece '__import__'"]),
        (["count", *MODEL, *SPEC, "--adapter-dtype", "int8"], ["unknown dtype 'int8'"]),
        (["count", *MODEL, *SPEC, "--target", "c_fc=LoRA(r=1)"], ["leave out --spec and --targets"]),
        (["count", *MODEL, "--target", "c_fc"], ["--target 'c_fc' is not NAME=SPEC"]),
        (["count", *MODEL, "--target", "=LoRA(r=1)"], ["is not NAME=SPEC"]),
        (["count", *MODEL, "--target", "a=LoRA(r=1)", "--target", "a=None"], ["--target names 'a' twice"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0] in ("count", "cuont", "--verbose") else "",
)  # fmt: skip
def test_bad_input_is_a_sentence_and_exit_code_2(capsys, arguments, sentences):
    said = refused(capsys, *arguments)
    assert not [sentence for sentence in sentences if sentence not in said]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--targets", "c_atn"], "target 'c_atn' matches no module; did you mean 'c_attn'?"),
        (["--targets", " , "], 'targets is empty; "all-linear" means every linear layer'),
        (["--targets", "c_fc", "--exclude", "c_fx"], "exclude 'c_fx' matches no module; did you mean 'c_fc'?"),
        (["--train", "lnf"], "train='lnf' names no module with parameters and no parameter"),
        (["--targets", "lm_head"], "tied"),
        (["--adapter-dtype", "float64"], "adapter_dtype"),
    ],
)
def test_what_adapt_refuses_is_said_in_its_words(capsys, config, options, sentence):
    assert sentence in refused(capsys, "count", "--config", config, *SPEC, *options)


def test_a_file_that_is_no_config_is_a_sentence(capsys, tmp_path):
    assert "can't be read" in refused(capsys, "count", "--config", str(tmp_path / "none.json"), *SPEC)


def test_a_reader_that_has_enough_is_no_error(monkeypatch, config):
    """`adapterzoo count ... | head -1`."""
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["count", "--config", config, *SPEC]) == 0
        print("nobody reads this", flush=True)
