"""Generators: pieces that propose an update. One file each."""

from adapterzoo.methods.adalora import AdaLoRA as AdaLoRA
from adapterzoo.methods.flora import FLoRA as FLoRA
from adapterzoo.methods.frozen import Frozen as Frozen
from adapterzoo.methods.full import Full as Full
from adapterzoo.methods.lokr import LoKr as LoKr
from adapterzoo.methods.lora import LoRA as LoRA
