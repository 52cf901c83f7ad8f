"""What every piece has been seen to do: writes the table of docs/capabilities.md.

Run: python docs/figures/capabilities.py (a minute on a processor; needs transformers and torchao for their columns).
"""

import re
import sys
import warnings
from pathlib import Path

import torch

from adapterzoo import LoRA
from adapterzoo.registry import pieces
from adapterzoo.testing.capabilities import capabilities, table

PAGE = Path(__file__).parents[1] / "capabilities.md"
_PLACE = re.compile(r"(<!-- table -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(page: str) -> str:
    """The page with the table as the runs give it."""
    own = {name: kind for name, kind in sorted(pieces().items()) if kind.__module__.startswith("adapterzoo.")}
    found = table({name: capabilities(kind, LoRA) for name, kind in own.items()})
    return _PLACE.sub(lambda place: f"{place[1]}{found}\n{place[2]}", page)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    page = filled(PAGE.read_text())
    if "--check" in sys.argv and page != PAGE.read_text():
        sys.exit(f"{PAGE.name} is not what the runs give; write it anew without --check")
    PAGE.write_text(page)
