"""Composable weight-decomposition adapters for plain PyTorch: any wrapper with any generator, to any depth.

Example:
    >>> import torch
    >>> from adapterzoo import MAP, AdaLoRA, AdaptedLinear
    >>> layer = AdaptedLinear(torch.nn.Linear(64, 32), MAP(AdaLoRA(r=16)), seed=0)
    >>> layer(torch.randn(4, 64)).shape
    torch.Size([4, 32])
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from adapterzoo.compositions import AdaDoRA as AdaDoRA
from adapterzoo.compositions import AdaLoMAP as AdaLoMAP
from adapterzoo.compositions import DoHa as DoHa
from adapterzoo.compositions import DoKr as DoKr
from adapterzoo.compositions import DVoRA as DVoRA
from adapterzoo.compositions import EDoRA as EDoRA
from adapterzoo.compositions import FLoMAP as FLoMAP
from adapterzoo.compositions import LoMAP as LoMAP
from adapterzoo.compositions import MagnitudeOnly as MagnitudeOnly
from adapterzoo.compositions import PublishedSORA as PublishedSORA
from adapterzoo.conditioning import MAP as MAP
from adapterzoo.conditioning import OFT as OFT
from adapterzoo.conditioning import SORA as SORA
from adapterzoo.conditioning import BoRA as BoRA
from adapterzoo.conditioning import ColumnDoRA as ColumnDoRA
from adapterzoo.conditioning import DoRA as DoRA
from adapterzoo.conditioning import PreDiag as PreDiag
from adapterzoo.errors import did_you_mean
from adapterzoo.layer import AdaptedLinear as AdaptedLinear
from adapterzoo.layer import adapted_layers as adapted_layers
from adapterzoo.methods import AdaLoRA as AdaLoRA
from adapterzoo.methods import FLoRA as FLoRA
from adapterzoo.methods import Frozen as Frozen
from adapterzoo.methods import Full as Full
from adapterzoo.methods import LoHa as LoHa
from adapterzoo.methods import LoKr as LoKr
from adapterzoo.methods import LoRA as LoRA
from adapterzoo.methods import LoRAXS as LoRAXS
from adapterzoo.methods import MiLoRA as MiLoRA
from adapterzoo.methods import MoSLoRA as MoSLoRA
from adapterzoo.methods import PiSSA as PiSSA
from adapterzoo.methods import TriLoRA as TriLoRA
from adapterzoo.methods import VeRA as VeRA
from adapterzoo.plan import Plan as Plan
from adapterzoo.registry import composition as composition
from adapterzoo.registry import from_json as from_json
from adapterzoo.registry import parse as parse
from adapterzoo.registry import register as register
from adapterzoo.registry import to_json as to_json
from adapterzoo.surgery import adapt as adapt
from adapterzoo.surgery import disabled as disabled
from adapterzoo.surgery import merge as merge
from adapterzoo.surgery import refresh as refresh
from adapterzoo.surgery import reset_adapters as reset_adapters
from adapterzoo.surgery import unload as unload
from adapterzoo.surgery import unmerge as unmerge
from adapterzoo.training.attach import attach as attach
from adapterzoo.training.compact import compact as compact
from adapterzoo.training.compact import ranks as ranks
from adapterzoo.training.groups import param_groups as param_groups
from adapterzoo.training.penalty import penalty as penalty
from adapterzoo.training.stages import stages as stages

if TYPE_CHECKING:
    from adapterzoo.analysis.counting import count as count
    from adapterzoo.checkpoint.inspection import inspect as inspect
    from adapterzoo.checkpoint.loading import load as load
    from adapterzoo.checkpoint.saving import save as save
    from adapterzoo.interop.merged import merge_and_save as merge_and_save
    from adapterzoo.interop.peft_export import export_peft as export_peft
    from adapterzoo.interop.peft_import import import_peft as import_peft
    from adapterzoo.interop.truncated import export_lora as export_lora

__all__ = [
    "MAP",
    "OFT",
    "SORA",
    "AdaDoRA",
    "AdaLoMAP",
    "AdaLoRA",
    "AdaptedLinear",
    "BoRA",
    "ColumnDoRA",
    "DVoRA",
    "DoHa",
    "DoKr",
    "DoRA",
    "EDoRA",
    "FLoMAP",
    "FLoRA",
    "Frozen",
    "Full",
    "LoHa",
    "LoKr",
    "LoMAP",
    "LoRA",
    "LoRAXS",
    "MagnitudeOnly",
    "MiLoRA",
    "MoSLoRA",
    "PiSSA",
    "Plan",
    "PreDiag",
    "PublishedSORA",
    "TriLoRA",
    "VeRA",
    "adapt",
    "adapted_layers",
    "attach",
    "compact",
    "composition",
    "count",
    "disabled",
    "export_lora",
    "export_peft",
    "from_json",
    "import_peft",
    "inspect",
    "load",
    "merge",
    "merge_and_save",
    "param_groups",
    "parse",
    "penalty",
    "ranks",
    "refresh",
    "register",
    "reset_adapters",
    "save",
    "stages",
    "to_json",
    "unload",
    "unmerge",
]
__version__ = "0.1.0"

# Files, exports and counts are imported when they are first asked for: that keeps the import light.
_LATER = {
    "count": "adapterzoo.analysis.counting",
    "inspect": "adapterzoo.checkpoint.inspection",
    "load": "adapterzoo.checkpoint.loading",
    "save": "adapterzoo.checkpoint.saving",
    "merge_and_save": "adapterzoo.interop.merged",
    "export_peft": "adapterzoo.interop.peft_export",
    "import_peft": "adapterzoo.interop.peft_import",
    "export_lora": "adapterzoo.interop.truncated",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'adapterzoo' has no attribute {name!r}{did_you_mean(name, __dir__())}")
    return getattr(import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
