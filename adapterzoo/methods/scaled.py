"""What generators of one rank have in common: a rank, alpha, dropout and the scale alpha / r."""

from typing import Any, ClassVar

from pydantic import Field, model_validator

from adapterzoo.base import WeightShape
from adapterzoo.pieces import Generator


class RankScaled(Generator):
    """A generator with one rank r and the scale s = alpha / r, where alpha is r if not given. Abstract."""

    always_shown: ClassVar[frozenset[str]] = frozenset({"r"})

    r: int = Field(default=8, ge=1, description="a whole number ≥ 1")
    alpha: float | None = Field(default=None, gt=0, description="a finite number > 0, or None for r")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="a number with 0 ≤ dropout < 1")

    @model_validator(mode="before")
    @classmethod
    def _alpha_is_the_rank(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Resolve alpha=None, so that LoRA(r=8) and LoRA(r=8, alpha=8) are the same spec."""
        rank = fields.get("r", cls.model_fields["r"].default)
        if fields.get("alpha") is None and type(rank) is int and rank > 0:
            return {**fields, "alpha": float(rank)}
        return fields

    @property
    def scale(self) -> float:
        """s = alpha / r, with the spec's r for ever."""
        return self.numerator / self.r

    @property
    def numerator(self) -> float:
        """alpha, which validation has resolved."""
        assert self.alpha is not None
        return self.alpha

    def shown_fields(self) -> dict[str, Any]:
        """Without an alpha that is r."""
        fields = super().shown_fields()
        return {name: value for name, value in fields.items() if name != "alpha" or value != self.r}

    def misfit(self, shape: WeightShape) -> str | None:
        """1 ≤ r ≤ min(out, in)."""
        largest = min(shape.out_features, shape.in_features)
        return f"r={self.r} is above min(out, in) = {largest}" if self.r > largest else None
