"""Tasks by name: those of this package, those that a program registers, and those of installed packages."""

import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import module_from_spec, spec_from_file_location
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from adapterzoo.ablation.tasks.task import Task
from adapterzoo.errors import GridError, did_you_mean, listing

ENTRY_POINTS = "adapterzoo.tasks"
_OWN = {
    "digits": "adapterzoo.ablation.tasks.digits",
    "minilm": "adapterzoo.ablation.tasks.minilm",
    "hf": "adapterzoo.ablation.tasks.hf",
}
_MAIN = "__adapterzoo_main__"
_TASKS: dict[str, type[Task]] = {}
T = TypeVar("T", bound=Task)


def task(cls: type[T]) -> type[T]:
    """Register a task, by its `name` or its class's name in lower case: a class decorator.

    Raises:
        GridError: the name is taken by another class.

    Example:
        A package makes its tasks known by an entry point in the group `adapterzoo.tasks`:

            [project.entry-points."adapterzoo.tasks"]
            mine = "mypackage.mytask:MyTask"
    """
    name = cls.__dict__.get("name") or cls.__name__.lower()
    known = _TASKS.get(name)
    if known is not None and not _same(known, cls):
        raise GridError(
            f"the task name {name!r} is taken by {known.__module__}.{known.__qualname__}; "
            f"give {cls.__module__}.{cls.__qualname__} another `name`"
        )
    cls.name = name
    _TASKS[name] = cls
    return cls


def task_names() -> list[str]:
    """Every name that a grid may give."""
    return sorted({*_OWN, *_TASKS, *_installed()})


def task_class(name: str) -> type[Task]:
    """The class of a task.

    Args:
        name: a known name, or "module:Class" for one that can be imported from the current directory.

    Raises:
        GridError: no task has that name, or its module can't be imported.
    """
    if ":" in name:
        return _from_reference(name)
    if name not in _TASKS:
        _import(name)
    return _TASKS[name]


def whereabouts(cls: type[Task]) -> dict[str, str]:
    """Where another process finds a task's class: its module and name, and a file or folder if importing needs one.

    Raises:
        GridError: the class was typed into an interactive session.
    """
    if cls.__module__ not in ("__main__", _MAIN):
        top = sys.modules[cls.__module__.partition(".")[0]]
        file, package = getattr(top, "__file__", None), hasattr(top, "__path__")
        path = str(Path(file).resolve().parents[int(package)]) if file else ""
        return {"module": cls.__module__, "class": cls.__qualname__, "path": path}
    file = getattr(sys.modules[cls.__module__], "__file__", None)
    if file is None or not Path(file).exists():
        raise GridError(
            f"the task {cls.name!r} was typed in, so other processes can't import it; put it into a file, or choose "
            'the engine "inline"'
        )
    return {"module": _MAIN, "class": cls.__qualname__, "path": str(Path(file).resolve())}


def bring(found: Mapping[str, str]) -> None:
    """Make a task known in this process, from what `whereabouts` said."""
    module, path = found["module"], found["path"]
    if module == _MAIN and module not in sys.modules:
        spec = spec_from_file_location(_MAIN, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[_MAIN] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[_MAIN])
    elif path and path not in sys.path:
        sys.path.append(path)
    task(attrgetter(found["class"])(import_module(module)))


def make_task(options: dict[str, Any]) -> Task:
    """A task from its name and options, as a grid writes them: {name: digits, steps: 50}.

    Raises:
        GridError: no name, an unknown one, or options that the task does not have or take; all are listed.
    """
    name = options.get("name")
    if not isinstance(name, str):
        raise GridError(f"a task needs a name, such as {{name: digits}}; known tasks: {', '.join(task_names())}")
    cls = task_class(name)
    try:
        return cls(**{key: value for key, value in options.items() if key != "name"})
    except ValidationError as error:
        raise GridError(f"task {name!r}:{listing(_problems(cls, error))}") from None


def _same(left: type[Task], right: type[Task]) -> bool:
    """Whether two classes are one, met again: a module that was loaded anew, or the main file under its other name."""
    return left.__qualname__ == right.__qualname__ and (
        left.__module__ == right.__module__ or {left.__module__, right.__module__} == {"__main__", _MAIN}
    )


def _from_reference(reference: str) -> type[Task]:
    """The class that "module:Class" names."""
    module, _, name = reference.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:  # an installed command does not look into the current directory by itself
        sys.path.append(here)
    try:
        cls = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise GridError(f"the task {reference!r} can't be imported from {here}: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, Task)):
        raise GridError(f"{reference!r} is no task; derive it from adapterzoo.ablation.tasks.task.Task")
    return task(cls)


def _problems(cls: type[Task], error: ValidationError) -> list[str]:
    found = []
    for item in error.errors():
        option = ".".join(map(str, item["loc"])) or "options"
        if item["type"] == "extra_forbidden":
            known = ", ".join(cls.model_fields)
            found.append(f"no option {option!r}; it has {known}{did_you_mean(option, cls.model_fields)}")
        else:
            found.append(f"{option} = {item['input']!r}: {item['msg']}")
    return found


def _installed() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


def _import(name: str) -> None:
    try:
        if name in _OWN:
            import_module(_OWN[name])
        elif name in (found := _installed()):
            task(found[name].load())
    except ImportError as error:
        raise GridError(f"task {name!r} can't be imported: {error}") from error
    if name not in _TASKS:
        names = task_names()
        raise GridError(f"unknown task {name!r}; known tasks: {', '.join(names)}{did_you_mean(name, names)}")
