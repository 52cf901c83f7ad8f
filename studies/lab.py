"""Where runs happen: the encoder, and the three sets as token ids."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from adapterzoo.ablation.docstrings import Pair, candidates, fingerprint, split, standard_library
from adapterzoo.ablation.minilm import Texts, embed_all, encoder, ranks_of_own, tokenise
from studies.arms import Settings


@dataclass(frozen=True, eq=False)
class Encoded:
    """A set of pairs as token ids.

    Shapes:
        docstrings.ids, codes.ids: [n, length]; packages: [n], a number for each package; candidates: [n, count].
    """

    docstrings: Texts
    codes: Texts
    packages: Tensor
    candidates: Tensor


@dataclass(frozen=True, eq=False)
class Lab:
    """What a run needs beside its arm.

    Args:
        build: makes the pretrained encoder.
        data: a fingerprint of all pairs.
    """

    build: Callable[[], nn.Module]
    train: Encoded
    validation: Encoded
    test: Encoded
    settings: Settings
    data: str


@cache
def real_lab(settings: Settings) -> Lab:
    """MiniLM and the standard library's docstrings; made once in each process."""
    pairs = standard_library()
    parts = split(pairs)
    return Lab(
        encoder,
        encoded(parts.train[: settings.train], settings),
        encoded(parts.validation[: settings.validation], settings),
        encoded(parts.test[: settings.test], settings),
        settings,
        fingerprint(pairs),
    )


def encoded(pairs: Sequence[Pair], settings: Settings) -> Encoded:
    """Pairs as token ids, with what each docstring chooses from."""
    names = sorted({pair.package for pair in pairs})
    return Encoded(
        tokenise([pair.docstring for pair in pairs], settings.docstring_tokens),
        tokenise([pair.code for pair in pairs], settings.code_tokens),
        torch.tensor([names.index(pair.package) for pair in pairs]),
        candidates(pairs, settings.candidates),
    )


def score(model: nn.Module, part: Encoded) -> dict[str, object]:
    """Top-1 accuracy, mean reciprocal rank, and at which place each docstring finds its own function."""
    model.eval()
    places = ranks_of_own(embed_all(model, part.docstrings), embed_all(model, part.codes), part.candidates)
    model.train()
    return {
        "accuracy": (places == 1).double().mean().item(),
        "mrr": places.double().reciprocal().mean().item(),
        "places": places.tolist(),
    }
