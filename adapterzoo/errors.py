"""Errors as sentences: each class takes values and says where, what was asked, what would be valid, how to mend it."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class AdapterError(Exception):
    """Root of every error that adapterzoo raises on purpose."""


class SpecError(AdapterError, ValueError):
    """A spec (the description of an adapter) says something that no adapter can be."""


class UnknownPieceError(SpecError):
    """A name that is in no registry.

    Args:
        name: what was asked for.
        known: every name that would be valid.
        broken: installed packages that offer pieces and could not be loaded, with the reasons.
    """

    def __init__(self, name: str, known: Iterable[str], broken: Sequence[str] = ()) -> None:
        names = sorted(known)
        maybe = f", perhaps of a package that could not be loaded ({'; '.join(broken)})" if broken else ""
        super().__init__(f"unknown piece {name!r}{maybe}; known pieces: {', '.join(names)}{did_you_mean(name, names)}")


class PieceError(AdapterError, TypeError):
    """A piece breaks the contract of pieces: the fault lies with its author, not with its user."""


class NameTakenError(PieceError):
    """A name that two pieces claim.

    Args:
        name: the name.
        holder: whose it is, as a sentence's part.
        newcomer: who wants it too.
        how: how to mend it.
    """

    def __init__(self, name: str, holder: str, newcomer: str, how: str) -> None:
        self.name = name
        super().__init__(f"the name {name!r} is taken by {holder}, and {newcomer} wants it too: {how}")


class MisfitError(AdapterError, ValueError):
    """A spec that is valid by itself does not fit the layer it is meant for.

    Args:
        layer: name of the layer, "" for a layer that stands alone.
        shape: (out_features, in_features).
        spec: the spec, as text.
        problem: what does not fit and what would.
    """

    def __init__(self, layer: str, shape: tuple[int, int], spec: str, problem: str) -> None:
        super().__init__(f"{where(layer)} (out={shape[0]}, in={shape[1]}) cannot take {spec}: {problem}")


class UnsupportedLayerError(AdapterError, TypeError):
    """A module that no adapter can stand in for.

    Args:
        layer: name of the module.
        kind: its class.
        problem: why, and what to do.
    """

    def __init__(self, layer: str, kind: str, problem: str) -> None:
        super().__init__(f"{where(layer)} is a {kind} and can't be adapted: {problem}")


class TargetError(AdapterError, ValueError):
    """A target, an exclusion or a `train` entry that can't be honoured. Nothing was changed."""


class MergedError(AdapterError, RuntimeError):
    """An operation that the merged (or not merged) state of a layer forbids. Nothing was changed."""


class UninitialisedError(AdapterError, RuntimeError):
    """An adapter that was allocated on the meta device and never initialised.

    Args:
        layer: name of the layer.
    """

    def __init__(self, layer: str) -> None:
        super().__init__(
            f"{where(layer)} was adapted on the meta device and holds no values yet: materialise it "
            "(model.to_empty(device=...)), load the base weights, then call "
            "adapterzoo.reset_adapters(model, seed=...); or load trained values with model.load_state_dict "
            "(from_pretrained writes past it, so they don't count)"
        )


class InputError(AdapterError, RuntimeError):
    """An input that the layer can't take; torch.nn.Linear refuses it too, without naming the layer.

    Args:
        layer: name of the layer.
        problem: what was given, and what would be valid.
    """

    def __init__(self, layer: str, problem: str) -> None:
        super().__init__(f"{where(layer)} {problem}")


class UnfrozenBaseWarning(UserWarning):
    """The base weight of an adapted layer trains, so its norms are computed anew, with gradient, at every call."""


class RoundedMagnitudeWarning(UserWarning):
    """Magnitudes or rotations reach a forward in 16 bits: small changes of them are lost on the way."""


class UnattendedWarning(UserWarning):
    """An optimiser trains pieces that need something done at every step, and nobody does it."""


class UnfinishedWarning(UserWarning):
    """A training ended, or gave back a model, before what its pieces do over the steps had come to its end."""


class ImportanceWarning(UserWarning):
    """Importance under a normalising wrapper is measured without what it needs, so it means less."""


class TrainingError(AdapterError, RuntimeError):
    """A training set-up that can't do what the pieces of the model need. Nothing was changed."""


class ArchitectureError(AdapterError, ValueError):
    """A name, a config or a dtype from which no model can be built."""


class MissingPackageError(AdapterError, ImportError):
    """An optional package that is asked for is not installed."""


class CheckpointError(AdapterError, RuntimeError):
    """A file of adapters that can't be written, read, or loaded into this model. Nothing was changed.

    Args:
        what: the sentence before the list.
        problems: everything that is wrong, one sentence each; the message shows the first of them.
    """

    def __init__(self, what: str, problems: Sequence[str] = ()) -> None:
        self.problems = tuple(problems)
        super().__init__(f"{what}:{listing(self.problems, 40)}" if problems else what)


class NotFiniteWarning(UserWarning):
    """Values that are saved hold NaN or infinity."""


class ExportError(AdapterError, ValueError):
    """A model, or a directory, that can't be written as was asked. No file was changed."""


class PeftError(AdapterError, ValueError):
    """A model that PEFT's format can't hold, or files that no adapter can be read from. Nothing was changed.

    Args:
        what: what was tried.
        problems: everything that stands against it.
    """

    def __init__(self, what: str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__(f"{what}:{listing(self.problems)}")


class GridError(AdapterError, ValueError):
    """A grid of an ablation, its task or a cell of it that can't work. Nothing was run."""


class RunsError(AdapterError, RuntimeError):
    """A folder of runs that can't be used: another grid's, another driver's, unreadable, not writable, full."""


class CommandError(AdapterError):
    """What was asked for on the command line can't be done."""


def where(layer: str) -> str:
    """Name a layer in a sentence."""
    return f"layer {layer!r}" if layer else "this layer"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The nearest known name as the tail of a sentence, or nothing."""
    names = {candidate.lower(): candidate for candidate in known}
    near = get_close_matches(name.lower(), list(names), n=1, cutoff=0.5)
    near = near or [candidate for candidate in names if candidate and name.lower().startswith(candidate)]
    return f"; did you mean {names[near[0]]!r}?" if near else ""


def count(number: int, thing: str) -> str:
    """A number of things: 1 layer, 2 layers."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def listing(lines: Sequence[str], limit: int = 12) -> str:
    """Several findings as an indented list, the tail counted instead of shown."""
    shown = [f"\n  - {line}" for line in lines[:limit]]
    rest = len(lines) - limit
    return "".join(shown) + (f"\n  - ... and {rest} more" if rest > 0 else "")
