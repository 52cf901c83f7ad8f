"""The task: scikit-learn's 8 x 8 handwritten digits, 0 to 4 for pretraining and 5 to 9 to adapt to."""

from dataclasses import dataclass
from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from adapterzoo.streams import stream

CLASSES = 5
TEST, TRAIN, VALIDATION = 300, 200, 300


@dataclass(frozen=True)
class Images:
    """Images with their labels.

    Shapes:
        pixels: [n, 8, 8], from −1 to 1; labels: [n], from 0 to 4.
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def pick(self, indices: Tensor) -> "Images":
        """Those images, in that order; indices: [m]."""
        return Images(self.pixels[indices], self.labels[indices])


@dataclass(frozen=True)
class Split:
    """Indices into `new_digits()`: three sets that share no image."""

    train: Tensor
    validation: Tensor
    test: Tensor


@cache
def old_digits() -> Images:
    """Every image of the digits 0 to 4: all that pretraining sees."""
    return _images(first=0)


@cache
def new_digits() -> Images:
    """Every image of the digits 5 to 9, labelled 0 to 4: what the cells adapt to."""
    return _images(first=CLASSES)


def split(seed: int) -> Split:
    """Draw a training and a validation set for one seed; the test set is the same for every seed.

    The writers are not known, so one writer's images may be on both sides: the test is of new images, not of new hands.
    """
    order = torch.randperm(len(new_digits()), generator=stream("test"))
    test, rest = order[:TEST], order[TEST:]
    drawn = rest[torch.randperm(len(rest), generator=stream("train", seed))]
    return Split(drawn[:TRAIN], drawn[TRAIN : TRAIN + VALIDATION], test)


def _images(first: int) -> Images:
    data = load_digits()
    pixels = torch.from_numpy(data.images).float() / 8 - 1
    labels = torch.from_numpy(data.target).long() - first
    chosen = (labels >= 0) & (labels < CLASSES)
    return Images(pixels[chosen], labels[chosen])
