"""Token ids of many texts: kept flat in a file, and put together in batches that are no wider than their longest."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Array = NDArray[Any]
Batch = dict[str, Tensor]

IDS, TYPES, LENGTHS = "input_ids", "token_type_ids", "lengths"
_TOKENS_AT_ONCE = 4096


@dataclass(frozen=True, eq=False)
class Rows:
    """Tokenised rows.

    Shapes:
        lengths: [n]; tokens: [all tokens] each, one row after the other; values: [n] each.

    Args:
        lengths: how many tokens each row has.
        tokens: what the model is given: input_ids, and token_type_ids where the tokenizer has them.
        values: one value a row: label, name, where the answer begins, ...
        pad: the id that fills rows up.
    """

    lengths: Array
    tokens: Mapping[str, Array]
    values: Mapping[str, Array]
    pad: int

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, chosen: Tensor) -> Batch:
        """The inputs of the model for those rows, and their numeric values: [m, longest] and [m]."""
        places = [slice(int(self._ends[i] - self.lengths[i]), int(self._ends[i])) for i in chosen.tolist()]
        made = {
            name: _filled([found[place] for place in places], self.pad if name == IDS else 0)
            for name, found in self.tokens.items()
        }
        lengths = torch.from_numpy(self.lengths[chosen.numpy()])
        made["attention_mask"] = (torch.arange(made[IDS].shape[1]) < lengths[:, None]).long()
        numeric = {name: value for name, value in self.values.items() if value.dtype.kind in "ifb"}
        return {**made, **{name: torch.from_numpy(value[chosen.numpy()]) for name, value in numeric.items()}}

    @cached_property
    def _ends(self) -> Array:
        return self.lengths.cumsum()

    def by_length(self) -> Iterator[Tensor]:
        """Rows for batches that are looked at: of about one length, and of few thousand tokens at most."""
        order = np.argsort(-self.lengths, kind="stable")
        start = 0
        while start < len(order):
            count = max(1, _TOKENS_AT_ONCE // int(self.lengths[order[start]]))
            yield torch.from_numpy(order[start : start + count])
            start += count


def write_rows(path: Path, rows: Rows) -> None:
    """Keep rows in a file."""
    tokens = {f"tokens/{name}": value for name, value in rows.tokens.items()}
    values = {f"values/{name}": value for name, value in rows.values.items()}
    np.savez(path, lengths=rows.lengths, pad=np.array(rows.pad), allow_pickle=False, **tokens, **values)


def read_rows(path: Path) -> Rows:
    """What `write_rows` kept."""
    with np.load(path, allow_pickle=False) as found:
        return Rows(found[LENGTHS], _below(found, "tokens/"), _below(found, "values/"), int(found["pad"]))


def rows_of(tokens: Mapping[str, Sequence[Sequence[int]]], values: Mapping[str, Sequence[Any]], pad: int) -> Rows:
    """Rows from lists, a list of each row."""
    lengths = np.array([len(row) for row in tokens[IDS]], dtype=np.int64)
    flat = {name: np.array([n for row in found for n in row], dtype=np.int32) for name, found in tokens.items()}
    return Rows(lengths, flat, {name: np.asarray(value) for name, value in values.items()}, pad)


def _below(found: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    return {name.removeprefix(prefix): found[name] for name in found if name.startswith(prefix)}


def _filled(rows: Sequence[Array], pad: int) -> Tensor:
    return pad_sequence([torch.from_numpy(row).long() for row in rows], batch_first=True, padding_value=pad)
