"""What a tracker is, and how a run tells several: one that fails is dropped, and the run goes on."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from typing import Any, Protocol

from adapterzoo.errors import CommandError, MissingPackageError, did_you_mean, listing


class Tracker(Protocol):
    """Tells another program of one run. It is made in the run's own process, with the options that the user gave."""

    def start(self, label: str, run: Mapping[str, Any]) -> None:
        """A run begins.

        Args:
            label: cell, options and seed, as messages call it.
            run: its content, as run.json has it, and its name under "id".
        """

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics as they come."""

    def finish(self, status: str, metrics: Mapping[str, float]) -> None:
        """The run has ended, "done" or "failed"."""


@dataclass(frozen=True)
class Kind:
    """Where a tracker stands: its module, its class, and the package that it tells."""

    module: str
    cls: str
    package: str


TRACKERS = {
    "tensorboard": Kind("adapterzoo.ablation.trackers.tensorboard", "TensorBoard", "tensorboard"),
    "wandb": Kind("adapterzoo.ablation.trackers.wandb", "WandB", "wandb"),
    "mlflow": Kind("adapterzoo.ablation.trackers.mlflow", "MLflow", "mlflow"),
}


class TrackerWarning(UserWarning):
    """A tracker failed in the middle of a run; the run goes on without it."""


class Tracking:
    """Every tracker of one run.

    Args:
        texts: as `--track` has them: "tensorboard", "wandb:project=mine".
        label: of the run.
        run: its content.
    """

    def __init__(self, texts: Sequence[str], label: str, run: Mapping[str, Any]) -> None:
        self._trackers: list[Tracker] = []
        for text in texts:
            self._try(text, lambda text=text: self._begin(text, label, run))  # type: ignore[misc]

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Tell all of them."""
        self._tell(lambda tracker: tracker.log(step, metrics))

    def finish(self, status: str, metrics: Mapping[str, float]) -> None:
        """Tell all of them, for the last time."""
        self._tell(lambda tracker: tracker.finish(status, metrics))

    def _begin(self, text: str, label: str, run: Mapping[str, Any]) -> None:
        tracker = make_tracker(text)
        tracker.start(label, run)
        self._trackers.append(tracker)

    def _tell(self, what: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            if not self._try(type(tracker).__name__, lambda tracker=tracker: what(tracker)):  # type: ignore[misc]
                self._trackers.remove(tracker)

    @staticmethod
    def _try(name: str, what: Callable[[], None]) -> bool:
        """Whether it worked; no tracker is worth a run."""
        try:
            what()
        except Exception as error:
            warnings.warn(
                f"the tracker {name!r} failed and is dropped ({type(error).__name__}: {error}); the run goes on",
                TrackerWarning,
                stacklevel=2,
            )
            return False
        return True


def make_tracker(text: str) -> Tracker:
    """A tracker from its text: a name, and options after a colon, such as "wandb:project=mine,mode=offline".

    Raises:
        CommandError: an unknown name or option.
        MissingPackageError: the package that it tells is not installed.
    """
    name, options = _read(text)
    kind = TRACKERS[name]
    if find_spec(kind.package) is None:
        raise MissingPackageError(
            f"--track {name} needs the package {kind.package!r}, which is not installed: "
            f'pip install "adapterzoo[trackers]"'
        )
    cls = getattr(import_module(kind.module), kind.cls)
    known = list(signature(cls).parameters)
    for option in options:
        if option not in known:
            raise CommandError(
                f"--track {text!r}: {name} has no option {option!r}; it has {', '.join(known)}"
                f"{did_you_mean(option, known)}"
            )
    made: Tracker = cls(**options)
    return made


def check_trackers(texts: Sequence[str]) -> None:
    """See that all of them can be made, before a grid starts.

    Raises:
        CommandError: those that can't, and why.
    """
    problems = []
    for text in texts:
        try:
            make_tracker(text)
        except (CommandError, MissingPackageError) as error:
            problems.append(str(error))
    if problems:
        raise CommandError(f"these trackers can't be used:{listing(problems)}")


def _read(text: str) -> tuple[str, dict[str, str]]:
    name, _, rest = text.partition(":")
    if name not in TRACKERS:
        raise CommandError(f"unknown tracker {name!r}; known: {', '.join(TRACKERS)}{did_you_mean(name, TRACKERS)}")
    pairs = [part.partition("=") for part in rest.split(",") if part]
    wrong = [key for key, equals, value in pairs if not (key and equals and value)]
    if wrong:
        raise CommandError(f"--track {text!r}: {wrong[0]!r} is not OPTION=VALUE")
    return name, {key: value for key, _, value in pairs}
