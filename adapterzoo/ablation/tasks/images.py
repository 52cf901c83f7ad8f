"""scikit-learn's 8 x 8 handwritten digits: some to pretrain on, the others to adapt to."""

from collections.abc import Iterator, Sequence
from functools import cache
from hashlib import sha256
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from adapterzoo.streams import stream

DIGITS = tuple(range(10))


class Images(NamedTuple):
    """Images with their labels.

    Shapes:
        pixels: [n, 8, 8], from −1 to 1; labels: [n], from 0; numbers: [n], which image of the data set it is.
    """

    pixels: Tensor
    labels: Tensor
    numbers: Tensor

    def pick(self, indices: Tensor) -> "Images":
        """Those images, in that order; indices: [m]."""
        return Images(*(values[indices] for values in self))


class Split(NamedTuple):
    """Indices of images: three sets that share none."""

    train: Tensor
    validation: Tensor
    test: Tensor


@cache
def every_image() -> Images:
    """All 1797 images; a label is the digit."""
    data = load_digits()
    pixels = torch.from_numpy(data.images).float() / 8 - 1
    return Images(pixels, torch.from_numpy(data.target).long(), torch.arange(len(pixels)))


def images_of(digits: Sequence[int]) -> Images:
    """The images of some digits; a label is the place of the digit among them."""
    images, ordered = every_image(), torch.tensor(sorted(digits))
    chosen = images.pick(torch.isin(images.labels, ordered).nonzero()[:, 0])
    return chosen._replace(labels=torch.searchsorted(ordered, chosen.labels))


def split(count: int, seed: int, train: int, validation: int, test: int) -> Split:
    """Draw a training and a validation set for one seed; the test set is the same for every seed.

    The writers are not known, so one writer's images may be on both sides: the test is of new images, not of new hands.

    Args:
        count: how many images there are.
        seed: of the run.
        train, validation, test: how many of them each set has.
    """
    order = torch.randperm(count, generator=stream("test"))
    rest = order[test:]
    drawn = rest[torch.randperm(len(rest), generator=stream("train", seed))]
    return Split(drawn[:train], drawn[train : train + validation], order[:test])


def batches(images: Images, size: int, steps: int, order: torch.Generator) -> Iterator[Images]:
    """As many batches as steps, pass after pass over the images, each pass in an order of its own."""
    left: list[Tensor] = []
    for _ in range(steps):
        if not left:
            shuffled = torch.randperm(len(images.labels), generator=order)
            left = [part for part in reversed(torch.split(shuffled, size)) if len(part) == size]
        yield images.pick(left.pop())


@cache
def fingerprint() -> str:
    """A short hash of all images and labels."""
    images = every_image()
    return sha256(images.pixels.numpy().tobytes() + images.labels.numpy().tobytes()).hexdigest()[:12]
