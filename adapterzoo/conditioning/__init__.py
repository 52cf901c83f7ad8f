"""Wrappers: pieces that condition magnitude and direction. One file each."""

from adapterzoo.conditioning.bora import BoRA as BoRA
from adapterzoo.conditioning.column_dora import ColumnDoRA as ColumnDoRA
from adapterzoo.conditioning.dora import DoRA as DoRA
from adapterzoo.conditioning.map import MAP as MAP
from adapterzoo.conditioning.oft import OFT as OFT
from adapterzoo.conditioning.prediag import PreDiag as PreDiag
from adapterzoo.conditioning.sora import SORA as SORA
