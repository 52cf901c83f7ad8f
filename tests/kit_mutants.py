"""Deliberately broken pieces: each says which check has to find it, and a phrase of what that check has to say.

Every one is as sound as `Sound` or `SoundGain` but for one fault. They are never registered for good.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field

from adapterzoo.factored import RightFactor
from adapterzoo.pieces import Generator, Role, Wrapper

MUTANTS = {}


def mutant(check, says):
    """Note a broken class, the check that must find it, and a phrase of its sentence (a class decorator)."""

    def decorate(kind):
        MUTANTS[kind.__name__] = (kind, check, says)
        return kind

    return decorate


class Sound(Generator):
    """ΔW = s B A."""

    roles: ClassVar[Mapping[str, Role]] = {"A": Role.INPUT_FACTOR, "B": Role.OUTPUT_FACTOR}

    r: int = Field(default=2, ge=1)
    s: float = Field(default=2.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)

    def misfit(self, shape):
        return "r is too large" if self.r > min(shape[:2]) else None

    def init(self, site):
        A = site.normal("A", self.r, site.in_features, std=0.5)
        return {"A": A, "B": site.zeros(site.out_features, self.r)}

    def update(self, params, site):
        return site.low_rank(self.s * params.B, params.A, dropout=self.dropout)

    def dense(self, params, site):
        return self.s * params.B @ params.A


class SoundGain(Wrapper):
    """W' = diag(g) W_inner."""

    roles: ClassVar[Mapping[str, Role]] = {"gain": Role.MAGNITUDE}

    def init(self, site):
        return {"gain": site.ones(site.out_features)}

    def condition(self, inner, params, site):
        return inner.scale_rows(params.gain)

    def dense(self, inner, params, site):
        return params.gain[:, None] * inner

    def promises(self, inner, weight, params, site):
        return {"row norms are |g| times the inside's": (weight.norm(dim=1), params.gain.abs() * inner.norm(dim=1))}


# What a class declares and makes.


@mutant("check_contract", "its `roles` declare ['A', 'B']")
class ForgetsARole(Sound):
    def init(self, site):
        return {**super().init(site), "C": site.ones(1)}


@mutant("check_contract", "init made B in torch.float32")
class StartsNarrow(Sound):
    def init(self, site):
        return {**super().init(site), "B": torch.zeros(site.out_features, self.r, device=site.base.device)}


@mutant("check_contract", "specs are frozen")
class Thaws(Sound):
    def __setattr__(self, name, value):
        object.__setattr__(self, name, value)


@mutant("check_contract", "take unknown fields")
class TakesAnything(Sound):
    model_config: ClassVar = {"extra": "ignore"}


@mutant("check_text", "without a word")
class TakesAnythingSilently(Sound):
    def __init__(self, /, *args, no_such_option=None, **fields):
        super().__init__(*args, **fields)


@mutant("check_text", "is read as")
class HidesAField(Sound):
    def shown_fields(self):
        return {name: value for name, value in super().shown_fields().items() if name != "s"}


# Functions that are not pure.


@mutant("check_purity", "draws from torch's global generator")
class DrawsGlobally(Sound):
    def init(self, site):
        noise = torch.randn(self.r, site.in_features, dtype=site.dtype)
        return {**super().init(site), "A": super().init(site)["A"] + 0 * noise}


@mutant("check_purity", "writes into its parameter 'B'")
class WritesIntoItsParameters(Sound):
    def update(self, params, site):
        with torch.no_grad():
            params.B.add_(1)
        return super().update(params, site)


_SEEN = {}


@mutant("check_purity", "remembers other parameters")
class KeepsWhatItSaw(Sound):
    def update(self, params, site):
        kept = _SEEN.get(site.shape)
        if kept is None or (params.B.abs().sum() > 0).item():
            kept = _SEEN[site.shape] = params.B.detach().clone()
        return site.low_rank(self.s * (params.B - params.B.detach() + kept), params.A, dropout=self.dropout)


@mutant("check_purity", "another weight where gradients are recorded")
class DependsOnGradMode(SoundGain):
    def condition(self, inner, params, site):
        return inner.scale_rows(params.gain * (1 if torch.is_grad_enabled() else 1 + 1e-6))


# Starts.


@mutant("check_start", "away from W")
class FormsADifference(Sound):
    roles: ClassVar[Mapping[str, Role]] = {**Sound.roles, "A0": Role.BUFFER, "B0": Role.BUFFER}

    def init(self, site):
        A, B = super().init(site)["A"], site.normal("B", site.out_features, self.r, std=0.5)
        return {"A": A, "B": B, "A0": A.clone(), "B0": B.clone()}

    def update(self, params, site):
        U = torch.cat([params.B, -params.B0], dim=1)
        return site.low_rank(self.s * U, torch.cat([params.A, params.A0]), dropout=self.dropout)

    def dense(self, params, site):
        return self.s * (params.B @ params.A - params.B0 @ params.A0)


@mutant("check_start", "away from W")
class StartsBesideTheBase(SoundGain):
    def init(self, site):
        return {"gain": site.ones(site.out_features) * (1 + 1e-9)}


@mutant("check_start", "it can't train")
class NeverTrains(Sound):
    def init(self, site):
        return {**super().init(site), "A": site.zeros(self.r, site.in_features)}


@mutant("check_start", "gets no gradient, and stays there")
class MutesItsInside(Wrapper):
    """W' = W + g Δ, g zero at the start."""

    roles: ClassVar[Mapping[str, Role]] = {"base": Role.MAGNITUDE, "g": Role.MAGNITUDE}

    def init(self, site):
        return {"base": site.ones(1), "g": site.zeros(1)}

    def condition(self, inner, params, site):
        return inner.mix(params.base, params.g)


@mutant("check_start", "is not finite")
class DividesByItsUpdate(Wrapper):
    roles: ClassVar[Mapping[str, Role]] = {"gain": Role.MAGNITUDE}

    def init(self, site):
        return {"gain": site.ones(1)}

    def condition(self, inner, params, site):
        length = inner.update_norm().to(site.dtype)
        return inner.mix(site.ones(1), params.gain / (length + 1e-320) * (length > 0))


# Values and gradients.


@mutant("check_values", "W' of")
class ScalesTwice(Sound):
    def update(self, params, site):
        return site.low_rank(self.s**2 * params.B, params.A, dropout=self.dropout)


@mutant("check_values", "W' of")
class IsRoughly(Sound):
    def update(self, params, site):
        return site.low_rank(self.s * params.B * (1 + 1e-7), params.A, dropout=self.dropout)


@mutant("check_values", "need [")
class KnowsOnlyLinearLayers(Sound):
    def init(self, site):
        return {**super().init(site), "A": site.normal("A", self.r, site.shape.in_channels, std=0.5)}


@mutant("check_values", "W' of")
class ForgetsTheInsidesGain(SoundGain):
    """Right around every generator; wrong around another wrapper."""

    def condition(self, inner, params, site):
        return replace(inner.scale_rows(params.gain), delta=params.gain - 1)


@mutant("check_values", "W' of")
class ForgetsDenseInsides(SoundGain):
    def condition(self, inner, params, site):
        return replace(inner.scale_rows(params.gain), remainder=inner.remainder)


@mutant("check_gradients", "gradient of inner")
class TakesItsNormAsConstant(Wrapper):
    """dense() says that the norm has its gradient."""

    roles: ClassVar[Mapping[str, Role]] = {"length": Role.MAGNITUDE}

    def init(self, site):
        return {"length": site.row_norms()}

    def condition(self, inner, params, site):
        with torch.no_grad():
            norms = inner.row_norms()
        return inner.scale_rows(params.length / norms)

    def dense(self, inner, params, site):
        return params.length[:, None] * inner / inner.norm(dim=1, keepdim=True)


@mutant("check_gradients", "gradient of A")
class StopsAGradient(Sound):
    def update(self, params, site):
        return site.low_rank(self.s * params.B, params.A.detach(), dropout=self.dropout)


@mutant("check_promises", "promises: row norms are |g| times the inside's")
class BreaksItsPromise(SoundGain):
    dense = Wrapper.dense  # so its values are compared with themselves

    def condition(self, inner, params, site):
        return inner.mix(params.gain, params.gain * params.gain)


@mutant("check_norms", "row_norms()")
class CarriesAStaleProduct(Wrapper):
    roles: ClassVar[Mapping[str, Role]] = {"gain": Role.MAGNITUDE}

    def init(self, site):
        return {"gain": site.ones(1)}

    def condition(self, inner, params, site):
        if inner.V is None:
            return inner
        longer = RightFactor(inner.base, params.gain * inner.V.value)
        longer._projected, longer._gram = inner.V.projected, inner.V.gram
        return replace(inner, V=longer)


# Merging, files, dropout, draws.


@mutant("check_merge", "merge")
class MergesWithoutItsScale(Sound):
    def update(self, params, site):
        scale = self.s if torch.is_grad_enabled() else 1.0
        return site.low_rank(scale * params.B, params.A, dropout=self.dropout)


@mutant("check_files", "do not hold")
class MakesABufferAnew(Sound):
    roles: ClassVar[Mapping[str, Role]] = {"B": Role.OUTPUT_FACTOR}

    def init(self, site):
        return {"B": site.zeros(site.out_features, self.r)}

    def update(self, params, site):
        A = site.normal("A", self.r, site.in_features, std=0.5)
        return site.low_rank(self.s * params.B, A, dropout=self.dropout)

    def dense(self, params, site):
        return self.s * params.B @ site.normal("A", self.r, site.in_features, std=0.5)


@mutant("check_dropout", "drops nothing")
class ForgetsItsDropout(Sound):
    def update(self, params, site):
        return site.low_rank(self.s * params.B, params.A)


@mutant("check_dropout", "lost its inside's dropout")
class LosesTheInsidesDropout(SoundGain):
    def condition(self, inner, params, site):
        return site.dense_update(params.gain[:, None] * inner.dense() - site.base.dense())


@mutant("check_dropout", "with a zero update in training")
class DropsInTheBase(Wrapper):
    """W' = W_inner + g (1ᵀ/out) W, whose rows see the dropout of the generator's."""

    roles: ClassVar[Mapping[str, Role]] = {"g": Role.ROTATION}

    def init(self, site):
        return {"g": site.zeros(site.out_features, 1)}

    def condition(self, inner, params, site):
        made = inner.rotate(params.g, site.ones(1, site.out_features) / site.out_features)
        return made if made.V is None else replace(made, drop_rows=made.V.value.shape[0])


@mutant("check_draws", "in float32, against float64")
class DrawsInItsDtype(Sound):
    def init(self, site):
        draw = torch.Generator().manual_seed(site.seed)
        A = torch.randn(self.r, site.in_features, dtype=site.dtype, generator=draw)
        return {**super().init(site), "A": A.to(site.base.device)}


# Training.


@mutant("check_neutral", "it has no neutral_magnitudes")
class MeasuresItsInside(Wrapper):
    """W' = diag(m / n) W_inner, with m that starts as the row norms of W."""

    roles: ClassVar[Mapping[str, Role]] = {"m": Role.MAGNITUDE}

    def init(self, site):
        return {"m": site.row_norms()}

    def condition(self, inner, params, site):
        norms = inner.row_norms()
        return inner.scale_rows(params.m / torch.where(norms > 0, norms, 1))


@mutant("check_training", "of held_magnitudes, against m")
class HoldsAnotherMagnitude(MeasuresItsInside):
    def neutral_magnitudes(self, inner, site):
        return {"m": inner.row_norms()}

    def held_magnitudes(self, inner, params, site):
        return {"m": params.m * inner.row_norms()}


@mutant("check_training", "not a finite []")
class PenalisesWithAVector(Sound):
    def penalty(self, params, siblings):
        return params.A.square().sum(dim=1) / siblings


# Dtypes, devices, compile.


@mutant("check_dtypes", "makes U in torch.float64")
class MakesFloat64(Sound):
    def update(self, params, site):
        return site.low_rank(self.s * params.B.double(), params.A.double(), dropout=self.dropout)


@mutant("check_dtypes", "is off by")
class RoundsTo16Bits(Sound):
    def update(self, params, site):
        A = params.A if site.dtype == torch.float64 else params.A.bfloat16().to(site.dtype)
        return site.low_rank(self.s * params.B, A, dropout=self.dropout)


@mutant("check_devices", "on the meta device")
class MakesItsOwnOnTheCPU(Sound):
    def init(self, site):
        return {**super().init(site), "B": torch.zeros(site.out_features, self.r, dtype=site.dtype)}


@mutant("check_compile", "can't be compiled to one graph")
class BranchesOnData(Sound):
    def update(self, params, site):
        if float(params.B.detach().sum()) > 1e9:
            return site.low_rank(0 * params.B, params.A, dropout=self.dropout)
        return super().update(params, site)
