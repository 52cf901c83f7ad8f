"""Pieces of installed packages: found when they are asked for, and nobody else's trouble if they are broken."""

import subprocess
import sys
import textwrap
from threading import Thread

import pytest
import torch

import adapterzoo as az
from adapterzoo import registry
from adapterzoo.errors import CheckpointError, NameTakenError, PieceError, SpecError, UnknownPieceError

PIECE = """
from adapterzoo import register, composition, DoRA
from adapterzoo.pieces import Generator, Role

@register
class {name}(Generator):
    roles = {{"B": Role.UPDATE}}

    def init(self, site):
        return {{"B": site.zeros(site.out_features, site.in_features)}}

    def update(self, params, site):
        return site.dense_update(params.B)
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a package of one module, as pip would: the module, and a dist-info folder with its entry points."""
    for table in ("_PIECES", "_COMPOSITIONS", "_TRIED", "_FOUND", "_DISPUTED"):
        monkeypatch.setattr(registry, table, dict(getattr(registry, table)))
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def install(package, source, value=None):
        module = package.replace("-", "_")
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[adapterzoo.pieces]\nany = {value or module}\n")
        return module

    yield install
    for name in set(sys.modules) - before:
        if (sys.modules[name].__dict__.get("__file__") or "").startswith(str(tmp_path)):
            del sys.modules[name]


def test_a_piece_of_an_installed_package_is_known_by_text_and_json(install):
    module = install("zoo-found", PIECE.format(name="Found"))
    assert module not in sys.modules
    spec = az.parse("MAP(Found())")
    assert repr(spec) == "MAP(Found())"
    assert az.from_json(az.to_json(spec)) == spec
    assert registry.piece("Found").__module__ == module


def test_json_alone_finds_it_and_so_does_the_list_of_all(install):
    install("zoo-json", PIECE.format(name="FromJson"))
    assert type(az.from_json('{"schema": 1, "piece": "FromJson"}')).__name__ == "FromJson"
    install("zoo-later", PIECE.format(name="Later"))  # installed while the program runs
    assert {"FromJson", "Later", "LoRA"} <= set(registry.pieces())


def test_an_entry_may_name_a_class_also_an_undecorated_one(install):
    source = PIECE.format(name="Bare").replace("@register\n", "")
    module = install("zoo-class", source, "zoo_class:Bare")
    assert type(az.parse("Bare()")).__module__ == module


def test_a_named_composition_is_found_too(install):
    install(
        "zoo-named",
        """
        from adapterzoo import DoRA, LoRA, composition

        @composition
        def Small():
            return DoRA(LoRA(r=1))
        """,
    )
    assert az.parse("Small()") == az.DoRA(az.LoRA(r=1))
    assert "Small" in registry.compositions()


@pytest.mark.parametrize(
    ("source", "value", "why"),
    [
        ("import no_such_package_at_all", None, "ModuleNotFoundError: No module named 'no_such_package_at_all'"),
        ("1 / 0", None, "ZeroDivisionError: division by zero"),
        ("", "zoo_broken:missing", "AttributeError: module 'zoo_broken' has no attribute 'missing'"),
        ("number = 3", "zoo_broken:number", "it is no module and no piece"),
        ("raise RuntimeError", None, "RuntimeError"),
        (
            PIECE.format(name="Half") + "\n@register\nclass Bad(Generator):\n    pass",
            None,
            "PieceError: Bad can't be registered: it does not define init, update",
        ),
    ],
)
def test_a_broken_package_is_named_and_stands_in_nobodys_way(install, source, value, why):
    install("zoo-broken", source, value)
    install("zoo-sound", PIECE.format(name="Sound"))
    assert repr(az.parse("DoRA(Sound())")) == "DoRA(Sound())"
    with pytest.raises(UnknownPieceError) as caught:
        az.parse("Half()")
    assert f"zoo-broken 1.0 ({value or 'zoo_broken'}): {why}" in str(caught.value)
    assert "Half" not in registry.pieces()  # what it registered before it failed is gone again
    assert len(registry.broken()) == 1


def test_an_unknown_name_says_nothing_of_packages_where_none_is_broken(install):
    install("zoo-fine", PIECE.format(name="Fine"))
    with pytest.raises(UnknownPieceError) as caught:
        az.parse("LoRa(r=8)")
    assert str(caught.value).endswith("did you mean 'LoRA'?")
    assert "Fine" in str(caught.value)


def test_a_package_can_not_take_a_name_of_ours(install):
    module = install("zoo-thief", PIECE.format(name="LoRA"))
    with pytest.raises(
        UnknownPieceError, match=r"the name 'LoRA' is taken by adapterzoo\.methods\.lora\.LoRA of adapterzoo"
    ):
        az.parse("Unknown()")
    assert registry.piece("LoRA") is az.LoRA
    assert registry.broken()[0].startswith("zoo-thief 1.0 (zoo_thief): the name 'LoRA' is taken by")
    assert registry.broken()[0].endswith(
        f"{module}.LoRA of zoo-thief 1.0 wants it too: give zoo_thief.LoRA another name"
    )


def test_a_name_that_two_packages_offer_is_nobodys(install):
    """Else the order of loading would say what a file means."""
    install("zoo-left", PIECE.format(name="Twice") + PIECE.format(name="Left"))
    install("zoo-right", PIECE.format(name="Right") + PIECE.format(name="Twice"))
    install("zoo-third", PIECE.format(name="Twice"))
    for read in (lambda: az.parse("Twice()"), lambda: az.from_json('{"schema": 1, "piece": "Twice"}')):
        with pytest.raises(PieceError) as caught:
            read()
        message = str(caught.value)
        assert "zoo_left.Twice of zoo-left 1.0" in message
        assert "zoo_third.Twice of zoo-third 1.0" in message or "zoo_right.Twice of zoo-right 1.0" in message
        assert message.endswith("or uninstall one of the two packages")
    assert repr(az.parse("Left()")) == "Left()"
    assert "Twice" not in registry.pieces()
    with pytest.raises(PieceError, match="zoo-left"):
        az.to_json(sys.modules["zoo_left"].Twice())


def test_a_program_may_choose_one_of_two(install):
    module = install("zoo-left", PIECE.format(name="Choice"))
    install("zoo-right", PIECE.format(name="Choice"))
    with pytest.raises(PieceError):
        az.parse("Choice()")
    chosen = az.register(sys.modules[module].Choice)
    assert type(az.parse("Choice()")) is chosen


def test_what_a_program_imported_itself_stays_its_own(install):
    install("zoo-right", PIECE.format(name="Mine"))
    first = __import__(install("zoo-own", PIECE.format(name="Mine"))).Mine
    assert registry.pieces()["Mine"] is first
    assert type(az.parse("Mine()")) is first
    assert registry.broken()[0].startswith("zoo-right 1.0")


def test_a_file_of_a_broken_package_says_so(install, tmp_path):
    """The sentence about a file is cut short, and the reason must not be what is cut."""
    module = install("zoo-file", PIECE.format(name="InFile"))
    model = torch.nn.Sequential(torch.nn.Linear(3, 4))
    az.adapt(model, az.parse("MAP(InFile())"))
    az.save(model, tmp_path / "adapter")
    for table in (registry._PIECES, registry._TRIED, registry._FOUND, sys.modules):
        for key in [key for key in table if key in ("InFile", module) or "zoo-file" in str(key)]:
            del table[key]
    (tmp_path / f"{module}.py").write_text("import no_such_package_at_all")
    with pytest.raises(CheckpointError) as caught:
        az.load(torch.nn.Sequential(torch.nn.Linear(3, 4)), tmp_path / "adapter")
    assert "unknown piece 'InFile', perhaps of a package that could not be loaded (zoo-file 1.0 (zoo_file): " in str(
        caught.value
    )
    assert "No module named 'no_such_package_at_all'" in str(caught.value)


def test_an_error_has_the_name_it_is_about():
    with pytest.raises(NameTakenError) as caught:
        az.register(type("LoRA", (az.Full,), {"__module__": "elsewhere", "roles": az.Full.roles}))
    assert caught.value.name == "LoRA"


def test_a_package_may_ask_for_names_as_it_is_imported(install):
    source = 'import adapterzoo as az\ntry:\n    az.parse("Nowhere()")\nexcept az.registry.SpecError:\n    pass\n'
    install("zoo-asks", source + PIECE.format(name="Asking"))
    assert repr(az.parse("Asking()")) == "Asking()"


def test_threads_wait_for_a_package_that_is_being_imported(install):
    install("zoo-slow", "import time; time.sleep(0.2)" + PIECE.format(name="Slow"))
    found = []
    threads = [Thread(target=lambda: found.append(repr(az.parse("Slow()")))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["Slow()"] * 4


def test_a_package_that_failed_is_not_tried_again(install):
    install("zoo-counting", "import sys\nsys.argv.append('tried')\nraise ImportError('no')")
    for _ in range(3):
        with pytest.raises(SpecError):
            az.parse("Nothing()")
    assert sys.argv.count("tried") == 1
    sys.argv.remove("tried")


def test_known_names_load_no_package(install, tmp_path):
    """In a process of its own: neither the import, nor text, nor JSON of what is ours, looks for a package."""
    install("zoo-lazy", PIECE.format(name="Lazy"))
    program = """
        import importlib.metadata, sys
        sys.path.insert(0, sys.argv[1])
        groups, look = [], importlib.metadata.entry_points
        importlib.metadata.entry_points = lambda **by: groups.append(by.get("group")) or look(**by)
        import adapterzoo as az
        spec = az.from_json(az.to_json(az.parse("MAP(LoRA(r=8))")))
        assert "adapterzoo.pieces" not in groups and "zoo_lazy" not in sys.modules
        az.parse("MAP(Lazy())")
        assert "adapterzoo.pieces" in groups and "zoo_lazy" in sys.modules
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
