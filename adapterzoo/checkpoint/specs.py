"""Compositions out of a description."""

import json

from adapterzoo.checkpoint.manifest import AdapterEntry
from adapterzoo.pieces import Piece
from adapterzoo.registry import from_json


def specs_of(adapter: AdapterEntry) -> list[Piece]:
    """The compositions of an adapter whose description was checked."""
    return [from_json(json.dumps(tree)) for tree in adapter.compositions]
