"""What a piece is: a frozen spec with pure functions; and what a piece may know of its layer."""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, ClassVar, NamedTuple, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError
from torch import Tensor

from adapterzoo.base import Base, WeightShape
from adapterzoo.errors import SpecError, did_you_mean
from adapterzoo.factored import FactoredWeight, RightFactor
from adapterzoo.rules import StepRule
from adapterzoo.streams import stream
from adapterzoo.terms import Kronecker, Structured
from adapterzoo.wide import safe_sqrt


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


LAYER_TYPES = frozenset({"linear", "convolution", "embedding"})
"""What a piece may sit on. Quantised layers, and those of Transformers that store Wᵀ, are linear ones."""


class Singular(NamedTuple):
    """Some singular triplets of W, in descending order: W ≈ U diag(S) Vᵀ, with all of them W itself."""

    U: Tensor
    """[out, r]."""
    S: Tensor
    """[r]."""
    Vt: Tensor
    """[r, in]."""


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


@dataclass(frozen=True)
class Site:
    """What a piece may know of the layer it sits on.

    Args:
        base: the frozen weight, through its calls.
        dtype: the dtype that factors are built in: the base's, but at least float32.
        layer: name of the layer in its model, "" if it stands alone.
        seed: the user's seed.
        depth: where the piece stands in the composition, counted from the generator (0).
        one_hot: whether the layer's inputs are one-hot vectors, as an embedding's are.
    """

    base: Base
    dtype: torch.dtype
    layer: str = ""
    seed: int = 0
    depth: int = 0
    one_hot: bool = False

    @property
    def shape(self) -> WeightShape:
        """(out, in) of W, and the kernel of a convolution, () for other layers."""
        return self.base.shape

    @property
    def out_features(self) -> int:
        """Rows of W."""
        return self.base.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of W."""
        return self.base.shape[1]

    @property
    def fan_in(self) -> int:
        """How many inputs add up in an output: the columns of W, or 1 where inputs are one-hot."""
        return 1 if self.one_hot else self.in_features

    @property
    def layer_type(self) -> str:
        """One of `LAYER_TYPES`."""
        return "embedding" if self.one_hot else "convolution" if self.shape.kernel else "linear"

    def row_norms(self) -> Tensor:
        """‖w_i‖: [out]; equal, bit for bit, to FactoredWeight.row_norms() of a zero update."""
        return safe_sqrt(self.base.row_norms_sq()).to(self.dtype)

    def frobenius_norm(self) -> Tensor:
        """‖W‖_F: [1]."""
        return safe_sqrt(self.base.row_norms_sq().sum()[None]).to(self.dtype)

    def column_norms(self) -> Tensor:
        """‖W_:j‖ of the columns: [in]; equal, bit for bit, to FactoredWeight.column_norms() of a zero update."""
        return safe_sqrt(self.base.column_norms_sq()).to(self.dtype)

    def singular_triplets(self, r: int, smallest: bool = False) -> Singular:
        """The r largest singular triplets of W, or the r smallest, exactly: a whole decomposition, for `init` only.

        Signs are fixed, so that the same W gives the same triplets: the largest element of every row of Vᵀ is positive.
        """
        if self.base.device.type == "meta":
            return Singular(self.zeros(self.out_features, r), self.zeros(r), self.zeros(r, self.in_features))
        with torch.no_grad():
            U, S, Vt = torch.linalg.svd(self.base.dense().detach().to(self.dtype), full_matrices=False)
            own = slice(len(S) - r, None) if smallest else slice(r)
            U, S, Vt = U[:, own], S[own], Vt[own]
            signs = torch.take_along_dim(Vt, Vt.abs().argmax(dim=1, keepdim=True), dim=1).sign()
            return Singular((U * signs.mT).contiguous(), S.contiguous(), (Vt * signs).contiguous())

    def low_rank(
        self, U: Tensor, V: Tensor, dropout: float = 0.0, steps: tuple[Tensor, Tensor] | None = None
    ) -> FactoredWeight:
        """W + U V, with U: [out, r], V: [r, in] and a dropout probability for the input of V.

        Args:
            U: left factor.
            V: right factor.
            dropout: probability of dropping an input element on the way into V, in training.
            steps: on a convolution, V as a kernel [r, k, *kernel] after a map of the channels [k, in/groups], which
                is cheaper to apply: V is their product.
        """
        right = RightFactor(self.base, V, steps)
        return FactoredWeight(self.base, U=U, V=right, drop_rows=V.shape[0], dropout=dropout)

    def dense_update(self, D: Tensor) -> FactoredWeight:
        """W + D, with a dense D: [out, in]: for pieces without structure; costs what full fine-tuning costs."""
        return FactoredWeight(self.base, remainder=D)

    def kronecker(self, left: Tensor, right: Tensor) -> FactoredWeight:
        """W + L ⊗ R, with L: [a, c], R: [b, d], a b = out and c d = in; applied without forming the product."""
        return FactoredWeight(self.base, structured=(Structured(Kronecker(left, right)),))

    def unchanged(self) -> FactoredWeight:
        """W itself, for a piece that proposes no update."""
        return FactoredWeight(self.base)

    # Initial values. Every parameter has its own random stream, keyed by (seed, layer, depth, parameter) and drawn in
    # float32 on the CPU: a generator starts equal under every wrapper, dtype and device, and the global generator is
    # left alone.

    def zeros(self, *shape: int) -> Tensor:
        """A tensor of zeros."""
        return torch.zeros(shape, dtype=self.dtype, device=self.base.device)

    def ones(self, *shape: int) -> Tensor:
        """A tensor of ones."""
        return torch.ones(shape, dtype=self.dtype, device=self.base.device)

    def normal(self, parameter: str, *shape: int, std: float) -> Tensor:
        """Draw from N(0, std²), from the parameter's own stream."""
        return self._draw(parameter, shape, lambda draw, stream: draw.normal_(0.0, std, generator=stream))

    def uniform(self, parameter: str, *shape: int, bound: float) -> Tensor:
        """Draw from U(−bound, bound), from the parameter's own stream."""
        return self._draw(parameter, shape, lambda draw, stream: draw.uniform_(-bound, bound, generator=stream))

    def shared_uniform(self, name: str, rows: int, columns: int, bound: float) -> Tensor:
        """Draw [rows, columns] from U(−bound, bound), the same for every layer with this seed.

        Fewer rows are the first of more. Layers whose tensors are equal hold one, if the piece declares it `shared`.

        Args:
            name: of the stream; that of the piece belongs in it.
            rows: of the tensor.
            columns: of the tensor.
            bound: largest size of a number.
        """
        own = replace(self, layer="", depth=0)
        return own.uniform(f"shared {name} of {columns}", rows, columns, bound=1.0) * bound

    def kaiming_uniform(self, parameter: str, *shape: int, fan: int) -> Tensor:
        """Draw as torch.nn.init.kaiming_uniform_(a=√5) does: U(−1/√fan, 1/√fan)."""
        return self.uniform(parameter, *shape, bound=1 / math.sqrt(max(fan, 1)))

    def _draw(
        self, parameter: str, shape: tuple[int, ...], fill: Callable[[Tensor, torch.Generator], Tensor]
    ) -> Tensor:
        if self.base.device.type == "meta":
            return self.zeros(*shape)
        draw = fill(torch.empty(shape, dtype=torch.float32, device="cpu"), self._stream(parameter))
        return draw.to(self.base.device, self.dtype)

    def _stream(self, parameter: str) -> torch.Generator:
        return stream(self.seed, self.layer, self.depth, parameter)


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
    return next(filter(None, (piece.misfit(shape) for piece in layers_of(spec))), None)


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
