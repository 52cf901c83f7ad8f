"""Generators: pieces that propose an update. One file each."""

from adapterzoo.methods.adalora import AdaLoRA as AdaLoRA
from adapterzoo.methods.flora import FLoRA as FLoRA
from adapterzoo.methods.frozen import Frozen as Frozen
from adapterzoo.methods.full import Full as Full
from adapterzoo.methods.loha import LoHa as LoHa
from adapterzoo.methods.lokr import LoKr as LoKr
from adapterzoo.methods.lora import LoRA as LoRA
from adapterzoo.methods.lora_xs import LoRAXS as LoRAXS
from adapterzoo.methods.milora import MiLoRA as MiLoRA
from adapterzoo.methods.moslora import MoSLoRA as MoSLoRA
from adapterzoo.methods.pissa import PiSSA as PiSSA
from adapterzoo.methods.trilora import TriLoRA as TriLoRA
from adapterzoo.methods.vera import VeRA as VeRA
