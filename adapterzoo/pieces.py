"""What a piece is: a frozen spec with pure functions."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError
from torch import Tensor

from adapterzoo.base import WeightShape
from adapterzoo.errors import PieceError, SpecError, did_you_mean
from adapterzoo.factored import FactoredWeight
from adapterzoo.rules import StepRule
from adapterzoo.site import LAYER_TYPES as LAYER_TYPES
from adapterzoo.site import Site as Site


class Role(StrEnum):
    """What a parameter does. Parameter groups, dtypes and schedules go by role, never by a parameter's name."""

    INPUT_FACTOR = "direction.input"
    """A factor that reads the input: LoRA's A, FLoRA's B."""
    OUTPUT_FACTOR = "direction.output"
    """A factor that writes the output: LoRA's B, FLoRA's A."""
    UPDATE = "direction.dense"
    """A whole update: Full's delta."""
    CORE = "core"
    """What stands between two factors: AdaLoRA's singular values, FLoRA's core."""
    MAGNITUDE = "magnitude"
    """A length or gain: DoRA's magnitude, MAP's alpha and beta, PreDiag's diagonal."""
    ROTATION = "rotation"
    """A generator of a rotation: SORA's C and D."""
    BUFFER = "buffer"
    """State that no gradient trains: AdaLoRA's mask."""


Promise = tuple[Tensor, Tensor]
"""Two tensors that a piece promises to be equal."""


class Parameters:
    """The values of one piece's own parameters, by name: `params.A`."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self._values = values

    def __getattr__(self, name: str) -> Tensor:
        if name not in self._values:
            raise AttributeError(f"no parameter {name!r}; this piece's roles declare {', '.join(self._values)}")
        return self._values[name]

    def __contains__(self, name: str) -> bool:
        return name in self._values


class Piece(BaseModel):
    """A generator or a wrapper: a frozen, hashable spec whose functions are pure.

    Equal specs are equal and hash alike, `repr` pastes back, unknown fields are refused, and a bad value is a
    SpecError that names the field, the value and what would be valid.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    roles: ClassVar[Mapping[str, Role]] = {}
    """The role of every parameter that `init` makes, by name. Checked."""

    optional: ClassVar[frozenset[str]] = frozenset()
    """Parameters that `init` leaves out on layers that have no use for them."""

    starts_neutral: ClassVar[bool] = True
    """Whether it starts at W' = W, exactly, over an inside that does. A piece that starts beside the base says so."""

    shared: ClassVar[frozenset[str]] = frozenset()
    """Buffers that layers share, frozen: the same values are one tensor in memory and one in a file."""

    layers: ClassVar[frozenset[str]] = LAYER_TYPES
    """The types of layers that it can sit on; on others it is refused by name."""

    always_shown: ClassVar[frozenset[str]] = frozenset()
    """Fields that `repr` shows also where they have their default."""

    rank_axes: ClassVar[Mapping[str, int]] = {}
    """The axis of each parameter that the rank runs along, for a piece whose ranks can be removed."""

    def __init__(self, /, *args: Any, **fields: Any) -> None:
        name = type(self).__name__
        if args:
            raise SpecError(_positional(name, args))
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise SpecError(_sentences(type(self), fields, error)) from None
        except OverflowError as error:
            raise SpecError(f"{name}: {error}") from None

    @property
    @abstractmethod
    def depth(self) -> int:
        """How many pieces this one stands on: 0 for a generator."""

    def misfit(self, shape: WeightShape) -> str | None:
        """Say why this piece itself (not its inside) does not fit a weight of that shape; None if it fits."""
        return None

    @classmethod
    def examples(cls, shape: WeightShape) -> Sequence[Mapping[str, Any]]:
        """Options to check this piece with, on a weight of that shape; none: they are drawn from the fields' limits."""
        return ()

    @abstractmethod
    def init(self, site: Site) -> Mapping[str, Tensor]:
        """Make the parameters' initial values, by the names in `roles`."""

    def penalty(self, params: Parameters, siblings: int) -> Tensor | None:
        """A term [] of the loss besides the task's, from this piece's own parameters; None if there is none.

        A pure function of tensors: equal pieces of a model are computed together, by torch.vmap.

        Args:
            params: the parameters' values.
            siblings: how many pieces of this class the model has, itself included, for penalties that are means.
        """
        return None

    def step_rule(self) -> StepRule | None:
        """What has to be done after every step of the optimiser; None if nothing. Equal rules are run together."""
        return None

    def kept_ranks(self, params: Parameters) -> Tensor:
        """Which ranks a compaction has to keep, for a piece with `rank_axes`: [r], bool. The others add nothing."""
        raise NotImplementedError(f"{type(self).__name__} has rank_axes, so it has to define kept_ranks")

    def shown_fields(self) -> dict[str, Any]:
        """The fields that `repr` shows: without them the spec would be another one, or they are always shown."""
        return {
            name: getattr(self, name)
            for name, field in type(self).model_fields.items()
            if name in self.always_shown or field.is_required() or getattr(self, name) != field.default
        }

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """The spec with other values in some fields, validated as if it were built anew."""
        return type(self)(**{**self.shown_fields(), **(update or {})})

    def __setattr__(self, name: str, value: Any) -> None:
        if name in type(self).model_fields:
            kind = type(self).__name__
            raise SpecError(f"specs are frozen, {kind}.{name} too; build another one: {kind}({name}={value!r}, ...)")
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        fields = self.shown_fields()
        inside = [repr(fields.pop("inner"))] if "inner" in fields else []
        return f"{type(self).__name__}({', '.join(inside + [f'{k}={_literal(v)}' for k, v in fields.items()])})"

    __str__ = __repr__


class Generator(Piece):
    """A piece that proposes an update: W' = W + ΔW(θ). Abstract: build LoRA, AdaLoRA, FLoRA, ..."""

    @property
    def depth(self) -> int:
        """0: every composition starts at its generator."""
        return 0

    @abstractmethod
    def update(self, params: Parameters, site: Site) -> FactoredWeight:
        """W + ΔW in normal form, from the parameters' values."""

    def dense(self, params: Parameters, site: Site) -> Tensor:
        """ΔW: [out, in], the slow truth: the method's equation, written as plainly as can be.

        Checks compare `update` with it, in float64; nothing else calls it. Without one they take `update` made dense.
        """
        return self.update(params, site).dense_update()


class Wrapper(Piece):
    """A piece that takes W and what its inside made of it, and returns another weight: W' = f(W, W_inner; φ).

    Abstract: build MAP, DoRA, PreDiag, SORA, ... around a generator or around another wrapper.
    """

    inner: SerializeAsAny[Piece] = Field(kw_only=False)
    """What is wrapped: a generator or another wrapper."""

    def __init__(self, /, *args: Any, **fields: Any) -> None:
        name = type(self).__name__
        if len(args) > 1:
            raise SpecError(f"{name} takes one inside; its options are keywords: {_signature(type(self))}")
        if args and "inner" in fields:
            raise SpecError(f"{name} got its inside twice, by position and as inner=")
        fields.update(zip(("inner",), args, strict=False))
        if "inner" not in fields:
            raise SpecError(f"{name} wraps something: {name}(LoRA(r=8)), say; it was given no inside")
        check_is_spec(fields["inner"], f"{name} wraps a spec")
        super().__init__(**fields)

    @property
    def depth(self) -> int:
        """One more than the inside's."""
        return self.inner.depth + 1

    @abstractmethod
    def condition(self, inner: FactoredWeight, params: Parameters, site: Site) -> FactoredWeight:
        """f(W, W_inner; φ) in normal form, from the inside's normal form and the parameters' values."""

    def dense(self, inner: Tensor, params: Parameters, site: Site) -> Tensor:
        """W': [out, in] from W_inner: [out, in], the slow truth: the method's equation, written as plainly as can be.

        Checks compare `condition` with it, in float64; nothing else calls it. Without one they take `condition` over
        a dense inside, made dense.
        """
        update = FactoredWeight(site.base, remainder=inner - site.base.dense())
        return self.condition(update, params, site).dense()

    def promises(self, inner: Tensor, weight: Tensor, params: Parameters, site: Site) -> Mapping[str, Promise]:
        """What the method promises of W', in words, and the two tensors that have to be equal for it: checked.

        Args:
            inner: W_inner: [out, in].
            weight: W': [out, in].
            params: the parameters' values.
            site: the layer.
        """
        return {}

    def held_magnitudes(self, inner: FactoredWeight, params: Parameters, site: Site) -> Mapping[str, Tensor]:
        """For a gain m / n with a norm n of the inside: m n / n₀ by name, n₀ the value of n now, a constant.

        With these in the place of its magnitudes the piece's gains stay as they are, whatever the inside does, and it
        is linear in the update. Importance is measured so (docs/training.md). A piece whose gains follow no norm of
        its inside, or take it as a constant for the gradient, has none.
        """
        return {}

    def neutral_magnitudes(self, inner: FactoredWeight, site: Site) -> Mapping[str, Tensor]:
        """Magnitudes, by name, with which the piece leaves an inside that has been trained as it is.

        Its initial values do so where the inside is W itself. A piece that measures its inside says here what else they
        have to be; one whose initial values are neutral over anything has none.
        """
        return {}


def check_is_spec(value: object, what: str) -> Piece:
    """The value; raise a SpecError unless it is a spec.

    Args:
        value: what a user gave.
        what: the start of the sentence: who needs a spec.
    """
    if isinstance(value, type) and issubclass(value, Piece):
        raise SpecError(f"{what}, but got the class {value.__name__}; build it: {value.__name__}(...)")
    if not isinstance(value, Piece):
        hint = "; parse(text) reads one from text" if isinstance(value, str) else ""
        raise SpecError(f"{what} such as MAP(LoRA(r=8)), not {value!r} ({type(value).__name__}){hint}")
    return value


def layers_of(spec: Piece) -> list[Piece]:
    """The pieces of a composition, from the outermost wrapper to the generator."""
    chain = [spec]
    while isinstance(chain[-1], Wrapper):
        chain.append(chain[-1].inner)
    return chain


def misfit(spec: Piece, shape: WeightShape, layer_type: str | None = None) -> str | None:
    """Say why a composition does not fit a weight of that shape; None if it fits.

    Args:
        spec: the composition.
        shape: of the weight.
        layer_type: one of `LAYER_TYPES`; where it is not known, a convolution is known by its kernel.
    """
    found = layer_type or ("convolution" if shape.kernel else None)
    for piece in layers_of(spec):
        if found is not None and found not in piece.layers:
            return f"{type(piece).__name__} sits on {' and '.join(sorted(piece.layers))} layers, and this is {found}"
        problem = piece.misfit(shape)
        if problem is not None and not isinstance(problem, str):
            kind = type(piece)
            raise PieceError(
                f"{kind.__name__}.misfit (of {kind.__module__}) returned {problem!r}; it should say in words what does "
                "not fit, or return None"
            )
        if problem:
            return problem
    return None


def _literal(value: object) -> str:
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return repr(value)


def _signature(kind: type[Piece]) -> str:
    return f"{kind.__name__}({', '.join(kind.model_fields)})"


def _positional(name: str, args: tuple[Any, ...]) -> str:
    if isinstance(args[0], Piece):
        inside = type(args[0]).__name__
        return (
            f"{name} is a generator: it proposes the update and wraps nothing. "
            f"A composition has its generator innermost: write {inside}({name}(...)) for {inside} around {name}"
        )
    return f"{name} takes its options as keywords, such as {name}(r=8); got {args!r} by position"


def _sentences(kind: type[Piece], fields: Mapping[str, Any], error: ValidationError) -> str:
    """Pydantic's findings as sentences that name the field, the value and what is valid."""
    known = list(kind.model_fields)
    found: dict[str, list[str]] = {}
    for item in error.errors(include_url=False):
        field = str(item["loc"][0]) if item["loc"] else ""
        if item["type"] == "extra_forbidden":
            found[f"no field {field!r}"] = [f"its fields are {', '.join(known)}{did_you_mean(field, known)}"]
        elif not field:
            found[item["msg"].removeprefix("Value error, ")] = []
        else:
            described = kind.model_fields[field].description if field in kind.model_fields else None
            valid = described or item["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
            found.setdefault(f"{field}={fields.get(field)!r} is not valid", []).append(f"it should be {valid}")
    return f"{kind.__name__}: " + "; ".join(
        f"{what}: {', or '.join(dict.fromkeys(why))}" if why else what for what, why in found.items()
    )
