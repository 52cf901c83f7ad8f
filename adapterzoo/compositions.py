"""Named compositions: what the literature gives a name of its own, as thin functions that return a spec."""

from typing import Any

from adapterzoo.conditioning import MAP, SORA, DoRA, PreDiag
from adapterzoo.methods import AdaLoRA, FLoRA, Frozen, LoHa, LoKr, LoRA, LoRAXS, VeRA
from adapterzoo.registry import composition


@composition
def LoMAP(r: int = 8, alpha: float | None = None, dropout: float = 0.0) -> MAP:
    """MAP over LoRA: W' = α W/‖W‖_F + β BA/‖BA‖_F.

    Example:
        >>> from adapterzoo import LoMAP
        >>> LoMAP(r=4)
        MAP(LoRA(r=4))

    Source:
        arXiv 2505.23094, eq. 4. Its norm cancels LoRA's scale alpha / r above MAP's floor.
    """
    return MAP(LoRA(r=r, alpha=alpha, dropout=dropout))


@composition
def AdaLoMAP(r: int = 8, alpha: float | None = None, target_r: int | None = None, **schedule: Any) -> MAP:
    """MAP over AdaLoRA, whose other options are taken by name: t_init, t_final, delta_t, dropout, ...

    Example:
        >>> from adapterzoo import AdaLoMAP
        >>> AdaLoMAP(r=4, target_r=2)
        MAP(AdaLoRA(r=4, target_r=2))

    Source:
        arXiv 2505.23094, Table 4.
    """
    return MAP(AdaLoRA(r=r, alpha=alpha, target_r=target_r, **schedule))


@composition
def FLoMAP(r: int | tuple[int, int] = 8, scale: float = 1.0, dropout: float = 0.0) -> MAP:
    """MAP over FLoRA.

    Example:
        >>> from adapterzoo import FLoMAP
        >>> FLoMAP(r=(4, 2))
        MAP(FLoRA(r=(4, 2)))

    Source:
        arXiv 2505.23094, Table 4.
    """
    return MAP(FLoRA(r=r, scale=scale, dropout=dropout))


@composition
def PublishedSORA(r: int = 16, alpha: float | None = 32, rank: int = 4, dropout: float = 0.0) -> SORA:
    """SORA as its published code computes it: (I + P)(diag(d) W + s B A), P damped.

    Equal to the published forward on layers without bias; the published code also scales and rotates the bias.

    Example:
        >>> from adapterzoo import PublishedSORA
        >>> PublishedSORA()
        SORA(PreDiag(LoRA(r=16, alpha=32)), rank=4, map='first_order', damping=1)

    Source:
        arXiv 2511.00051 and its public code.
    """
    return SORA(PreDiag(LoRA(r=r, alpha=alpha, dropout=dropout)), rank=rank, map="first_order", damping=1.0)


@composition
def MagnitudeOnly() -> DoRA:
    """Magnitude-only tuning: W' = diag(m / n) W, no direction trains.

    Example:
        >>> from adapterzoo import MagnitudeOnly
        >>> MagnitudeOnly()
        DoRA(Frozen())

    Source:
        arXiv 2402.09353, an option of its published code (Wdecompose_target_modules).
    """
    return DoRA(Frozen())


@composition
def EDoRA(r: int = 8, alpha: float | None = None, dropout: float = 0.0) -> DoRA:
    """DoRA over LoRA-XS: magnitudes, and a small matrix between frozen singular vectors.

    Example:
        >>> from adapterzoo import EDoRA
        >>> EDoRA(r=16)
        DoRA(LoRAXS(r=16))

    Source:
        Nasiri and Garraghan, arXiv 2501.12067; R starts at N(0, 1e-5²), as in its public code, so not exactly at W.
    """
    return DoRA(LoRAXS(r=r, alpha=alpha, dropout=dropout))


@composition
def AdaDoRA(r: int = 8, alpha: float | None = None, target_r: int | None = None, **schedule: Any) -> DoRA:
    """DoRA over AdaLoRA, whose other options are taken by name.

    Example:
        >>> from adapterzoo import AdaDoRA
        >>> AdaDoRA(r=4, target_r=2)
        DoRA(AdaLoRA(r=4, target_r=2))

    Source:
        None published; PEFT's pull request 2959 of that name was closed unmerged.
    """
    return DoRA(AdaLoRA(r=r, alpha=alpha, target_r=target_r, **schedule))


@composition
def DVoRA(r: int = 256, d_initial: float = 0.1, dropout: float = 0.0) -> DoRA:
    """DoRA over VeRA.

    Example:
        >>> from adapterzoo import DVoRA
        >>> DVoRA(r=64)
        DoRA(VeRA(r=64))

    Source:
        Liu et al., arXiv 2402.09353, name DVoRA; unverified beyond the name.
    """
    return DoRA(VeRA(r=r, d_initial=d_initial, dropout=dropout))


@composition
def DoHa(r: int = 8, alpha: float | None = None, dropout: float = 0.0) -> DoRA:
    """DoRA over LoHa.

    Example:
        >>> from adapterzoo import DoHa
        >>> DoHa(r=4)
        DoRA(LoHa(r=4))

    Source:
        LyCORIS (dora_wd over LoHa), whose norm has a gradient: `DoRA(LoHa(...), detach_norm=False)`.
    """
    return DoRA(LoHa(r=r, alpha=alpha, dropout=dropout))


@composition
def DoKr(r: int = 8, alpha: float | None = None, factor: int | None = None) -> DoRA:
    """DoRA over LoKr; its norms form W' in every forward.

    Example:
        >>> from adapterzoo import DoKr
        >>> DoKr(r=4, factor=8)
        DoRA(LoKr(r=4, factor=8))

    Source:
        LyCORIS (dora_wd over LoKr), whose norm has a gradient: `DoRA(LoKr(...), detach_norm=False)`.
    """
    return DoRA(LoKr(r=r, alpha=alpha, factor=factor))
