"""Which modules of a model a user means: patterns, the modules' names, and the reasons to leave a layer alone."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from adapterzoo.errors import TargetError, count, did_you_mean, listing
from adapterzoo.forms import form_of
from adapterzoo.layer import AdaptedLinear
from adapterzoo.pieces import Piece, misfit
from adapterzoo.support import unsupported

Predicate = Callable[[str, nn.Module], bool]
Pattern = str | re.Pattern[str] | Predicate | type[nn.Module]
Targets = Pattern | Sequence[Pattern] | Mapping[Pattern, Piece | None]

ALL_LINEAR = "all-linear"
_OUTPUT = "it is the model's output embedding"


@dataclass(frozen=True)
class Found:
    """A module and every name that it can be reached by."""

    names: tuple[str, ...]
    module: nn.Module

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]


def modules_by_name(model: nn.Module) -> list[Found]:
    """Every module below the root, once, with all its names."""
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if module is not model:
            names.setdefault(id(module), []).append(name)
            modules[id(module)] = module
    return [Found(tuple(names[key]), module) for key, module in modules.items()]


def reads_as_name(text: str, name: str) -> bool:
    """Whether text is a module's name or the tail of it at a dot: `q_proj` for `layers.0.q_proj`."""
    return name == text or name.endswith("." + text)


def matching(pattern: Pattern, found: Sequence[Found], what: str) -> list[Found]:
    """The modules that a pattern means.

    A string in a list is a name or the tail of a name. A compiled regular expression has to match a full name. A
    predicate gets (name, module). A class means its instances. All but names pass over modules that only hold others.

    Raises:
        TargetError: it matches nothing; names the nearest.
    """
    if isinstance(pattern, str):
        hits = [item for item in found if any(reads_as_name(pattern, name) for name in item.names)]
    else:
        leaves = [item for item in found if _is_leaf(item.module)]
        hits = [item for item in leaves if any(_accepts(pattern, name, item.module) for name in item.names)]
    if not hits:
        raise TargetError(f"{what} {_shown(pattern)} matches no module{_hint(pattern, found)}")
    return hits


def patterns_of(targets: Targets) -> list[Pattern]:
    """A user's targets as a list of patterns; a plain string other than "all-linear" is a regular expression.

    Raises:
        TargetError: not a form that targets can have.
    """
    if isinstance(targets, str) and targets != ALL_LINEAR:
        return [_compiled(targets)]
    if isinstance(targets, (str, re.Pattern)) or _is_kind(targets) or _is_predicate(targets):
        return [targets]  # type: ignore[list-item]
    if not isinstance(targets, Sequence):
        raise TargetError(
            f'targets is {targets!r}; it should be "all-linear", a list of names, a regular expression, a predicate, '
            "a class of layers, or a mapping of these to specs"
        )
    patterns = list(targets)
    for pattern in patterns:
        if not (isinstance(pattern, (str, re.Pattern)) or _is_kind(pattern) or _is_predicate(pattern)):
            raise TargetError(f"a target is a name, a regular expression, a predicate or a class, not {pattern!r}")
    if not patterns:
        raise TargetError('targets is empty; "all-linear" means every linear layer')
    return patterns


def mapping_pattern(key: object, found: Sequence[Found]) -> Pattern:
    """The pattern that a key of a mapping stands for: "all-linear", a name or its tail, else a regular expression."""
    if isinstance(key, re.Pattern) or key == ALL_LINEAR or _is_kind(key) or _is_predicate(key):
        return key  # type: ignore[return-value]
    if not isinstance(key, str):
        raise TargetError(f"a key of targets is a name, a regular expression, a predicate or a class, not {key!r}")
    if any(reads_as_name(key, name) for item in found for name in item.names) or re.fullmatch(r"[\w.\-]+", key):
        return key
    return _compiled(key)


class Exclusions:
    """Why a linear layer of this model can't, or should not, be adapted.

    Args:
        model: the model.
        found: its modules.
        trained: names of parameters that stay trainable by the user's wish.
    """

    def __init__(self, model: nn.Module, found: Sequence[Found], trained: Mapping[str, str]) -> None:
        self._trained = trained
        self._owners = _owners_of_weights(model)
        self._inside_attention = {
            id(child)
            for module in model.modules()
            if isinstance(module, nn.MultiheadAttention)
            for child in module.modules()
            if child is not module
        }
        self._output_embeddings = _output_embeddings(model)

    def reason(self, item: Found, spec: Piece) -> str | None:
        """The reason to leave a layer alone; None if it can be adapted."""
        module = item.module
        if not _is_leaf(module) and form_of(module) is None and not isinstance(module, nn.MultiheadAttention):
            return f"it holds other modules{_layers_inside(item)}"
        problem = unsupported(module)
        if problem is not None:
            return problem
        for name in item.names:
            if f"{name}.weight" in self._trained:
                return f"it is kept trainable by train={self._trained[f'{name}.weight']!r}"
        if id(module) in self._inside_attention:
            return "nn.MultiheadAttention reads its weight itself, so an adapter would change nothing"
        weight = module._parameters["weight"]
        sharers = sorted(self._owners[id(weight)] - {f"{name}.weight" for name in item.names})
        if sharers:
            return f"its weight is tied to {', '.join(sharers)}"
        if id(module) in self._output_embeddings:
            return _OUTPUT
        kind = form_of(module)
        form = None if kind is None else kind(module)
        return None if form is None else misfit(spec, form.shape, form.layer_type)


def trained_parameters(model: nn.Module, found: Sequence[Found], train: Sequence[str]) -> dict[str, str]:
    """Names of the parameters that `train` keeps trainable, each with the entry that says so.

    Raises:
        TargetError: an entry that names no module and no parameter.
    """
    trained: dict[str, str] = {}
    adapted = [name + "." for item in found if isinstance(item.module, AdaptedLinear) for name in item.names]
    everything = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    parameters = [name for name in everything if not name.startswith(tuple(adapted))]
    for entry in _list_of_names(train, "train"):
        modules = [name for item in found for name in item.names if reads_as_name(entry, name)]
        hits = [
            name for name in parameters
            if reads_as_name(entry, name) or any(name.startswith(module + ".") for module in modules)
        ]  # fmt: skip
        if not hits:
            near = did_you_mean(entry, {*parameters, *(name for item in found for name in item.names)})
            also = (
                " but adapted ones, whose adapters train already" if any(f"{m}." in adapted for m in modules) else near
            )
            raise TargetError(f"train={entry!r} names no module with parameters and no parameter{also}")
        whole = [name for name in hits if not model.get_parameter(name).is_floating_point()]
        if whole:
            raise TargetError(
                f"train={entry!r} names parameters that can't train, they are no floats: {', '.join(whole)}"
            )
        trained.update(dict.fromkeys(hits, entry))
    return trained


@dataclass(frozen=True)
class Selection:
    """What `select` decided: layers with their specs, layers left alone with their reasons, trained parameters."""

    chosen: list[tuple[Found, Piece]]
    skipped: list[tuple[Found, str]]
    trained: dict[str, str]


def select(
    model: nn.Module, spec: Piece | None, targets: Targets, exclude: Sequence[Pattern], train: Sequence[str]
) -> Selection:
    """Decide for every module whether it is adapted, and by what; nothing is changed.

    Raises:
        TargetError: entries that can't be honoured, all layers of an entry at once.
    """
    found = modules_by_name(model)
    trained = trained_parameters(model, found, train)
    choice = _Choice(Exclusions(model, found, trained))
    for pattern in _exclude_patterns(exclude):
        for item in matching(pattern, found, "exclude"):
            choice.skip(item, "excluded")
    for pattern, entry_spec in _entries(spec, targets, found):
        everything = pattern == ALL_LINEAR or isinstance(pattern, type)
        hits = _all_linear(found) if pattern == ALL_LINEAR else matching(pattern, found, "target")
        fresh = [item for item in hits if id(item.module) not in choice.decided]
        if not hits:
            kinds = dict.fromkeys(type(item.module).__name__ for item in found if _is_leaf(item.module))
            raise TargetError(f"the model has no nn.Linear layer to adapt; it has {', '.join(kinds) or 'no layers'}")
        if not fresh:
            raise TargetError(
                f"target {_shown(pattern)} matches only layers that are excluded or taken by earlier targets"
            )
        for item in fresh:
            choice.decide(item, entry_spec, everything)
    choice.check()
    for item in found:
        if is_linear(item.module) and id(item.module) not in choice.decided:
            choice.skip(item, "adapted already" if isinstance(item.module, AdaptedLinear) else "not targeted")
    shown = [(i, why) for i, why in choice.skipped if is_linear(i.module) or id(i.module) in choice.swept]
    return Selection(choice.chosen, shown, trained)


def _all_linear(found: Sequence[Found]) -> list[Found]:
    return [item for item in found if is_linear(item.module)]


class _Choice:
    """Decisions about modules, each taken once."""

    def __init__(self, exclusions: Exclusions) -> None:
        self._exclusions = exclusions
        self.decided: set[int] = set()
        self.swept: set[int] = set()
        self.chosen: list[tuple[Found, Piece]] = []
        self.skipped: list[tuple[Found, str]] = []
        self.problems: dict[str, list[str]] = {}

    def skip(self, item: Found, reason: str) -> None:
        if id(item.module) not in self.decided:
            self.decided.add(id(item.module))
            self.skipped.append((item, reason))

    def decide(self, item: Found, spec: Piece | None, everything: bool) -> None:
        reason = "left alone by targets" if spec is None else self._exclusions.reason(item, spec)
        if spec is not None and reason is None:
            self.decided.add(id(item.module))
            self.chosen.append((item, spec))
        elif spec is None or (everything and not isinstance(item.module, AdaptedLinear)):
            self.skip(item, str(reason))
            self.swept |= {id(item.module)} if spec is not None else set()
        else:
            way_out = f"; if that is meant, put AdaptedLinear(model.{item.name}, spec) there by hand"
            reason = str(reason) + (way_out if reason == _OUTPUT else "")
            self.problems.setdefault(reason, []).append(f"{item.name} ({type(item.module).__name__})")

    def check(self) -> None:
        if self.problems:
            raise TargetError(f"these targets can't be adapted, and nothing was changed:{_grouped(self.problems)}")
        if not self.chosen:
            reasons: dict[str, list[str]] = {}
            for item, why in self.skipped:
                if is_linear(item.module):
                    reasons.setdefault(why, []).append(item.name)
            raise TargetError(f"no layer is left to adapt{':' + _grouped(reasons) if reasons else ''}")


def _entries(spec: Piece | None, targets: Targets, found: Sequence[Found]) -> Iterable[tuple[Pattern, Piece | None]]:
    if isinstance(targets, Mapping):
        if spec is not None:
            raise TargetError("specs stand in the mapping of targets; leave out the spec before it")
        if not targets:
            raise TargetError("targets is an empty mapping")
        return [(mapping_pattern(key, found), value) for key, value in targets.items()]
    if spec is None:
        raise TargetError("adapt needs a spec such as MAP(LoRA(r=8)), or a mapping of targets to specs")
    return [(pattern, spec) for pattern in patterns_of(targets)]


def _exclude_patterns(exclude: Sequence[Pattern]) -> list[Pattern]:
    if isinstance(exclude, str):
        return [_compiled(exclude)]
    return patterns_of(exclude) if exclude else []


def _list_of_names(names: Sequence[str], what: str) -> list[str]:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TargetError(f"{what} is a list of names, such as {what}=['classifier'], not {names!r}")
    return list(names)


def _compiled(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise TargetError(f"{text!r} is not a regular expression: {error}") from None


def _is_kind(pattern: object) -> bool:
    return isinstance(pattern, type) and issubclass(pattern, nn.Module)


def _is_predicate(pattern: object) -> bool:
    return callable(pattern) and not isinstance(pattern, (nn.Module, type))


def _grouped(names: Mapping[str, Sequence[str]]) -> str:
    """Reasons, each once, with the layers that have it."""
    return listing([f"{', '.join(own[:6])}{_more(len(own) - 6)}: {reason}" for reason, own in names.items()])


def _more(number: int) -> str:
    return f", and {number} more" if number > 0 else ""


def _layers_inside(item: Found) -> str:
    """What to write for the layers inside a module, as the tail of a message: an expression that means just them."""
    inside = [name for name, module in item.module.named_modules() if name and form_of(module) is not None]
    if not inside:
        return ", and no layer inside it can be adapted"
    tails = "|".join(dict.fromkeys(re.escape(name.rpartition(".")[2]) for name in inside))
    return (
        f"; for the {count(len(inside), 'layer')} inside it use a regular expression: '{item.name}[.](.*[.])?({tails})'"
    )


def _accepts(pattern: Pattern, name: str, module: nn.Module) -> bool:
    if isinstance(pattern, type):
        return isinstance(module, pattern)
    if isinstance(pattern, re.Pattern):
        return pattern.fullmatch(name) is not None
    assert not isinstance(pattern, str)
    return bool(pattern(name, module))


def _hint(pattern: Pattern, found: Sequence[Found]) -> str:
    """The tail of a message about a pattern that matches nothing."""
    text = pattern if isinstance(pattern, str) else pattern.pattern if isinstance(pattern, re.Pattern) else ""
    if isinstance(pattern, str) and re.search(r"[\\*+?|^$()\[\]]", pattern):
        return "; entries of a list are names: for an expression write re.compile(...), or a string instead of the list"
    names = {name for item in found for name in item.names}
    near = did_you_mean(text, names | {name.rpartition(".")[2] for name in names} | {ALL_LINEAR}) if text else ""
    return near or "; print(model) shows the names"


def _shown(pattern: Pattern) -> str:
    if isinstance(pattern, re.Pattern):
        text = repr(pattern.pattern)
        hint = f"; [{text}] is a name or its tail" if re.fullmatch(r"[\w.\-]+", pattern.pattern) else ""
        return f"{text} (read as a regular expression for full names{hint})"
    return repr(pattern) if isinstance(pattern, str) else f"<{getattr(pattern, '__name__', 'predicate')}>"


def _is_leaf(module: nn.Module) -> bool:
    return isinstance(module, AdaptedLinear) or next(module.children(), None) is None


def is_linear(module: nn.Module) -> bool:
    """Whether "all-linear" means a module, adapted or not."""
    if isinstance(module, AdaptedLinear):
        return module.form.is_linear
    kind = form_of(module)
    return kind is not None and kind.is_linear


def _owners_of_weights(model: nn.Module) -> dict[int, set[str]]:
    owners: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(name)
    return owners


def _output_embeddings(model: nn.Module) -> set[int]:
    """Modules that Transformers models name as their output embeddings, of the model and of models inside it."""
    embeddings = set()
    for module in model.modules():
        getter = getattr(module, "get_output_embeddings", None)
        try:
            head = getter() if callable(getter) else None
        except NotImplementedError:  # of Transformers models that have none
            continue
        if isinstance(head, nn.Module):
            embeddings.add(id(head))
    return embeddings
