"""The task `digits`: a small network that knows some handwritten digits learns the others. A run takes a second."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from adapterzoo.ablation.tasks.classifier import Classifier
from adapterzoo.ablation.tasks.convnet import ADAPTED, ConvNet
from adapterzoo.ablation.tasks.devices import moved
from adapterzoo.ablation.tasks.images import DIGITS, Images, Split, batches, fingerprint, images_of, split
from adapterzoo.ablation.tasks.registry import task
from adapterzoo.ablation.tasks.sharing import sharing_copy
from adapterzoo.ablation.tasks.task import Part, Scores, Task, columns
from adapterzoo.ablation.tasks.transformer import Transformer
from adapterzoo.streams import stream

BACKBONES: Mapping[str, type[nn.Module]] = {"transformer": Transformer, "convnet": ConvNet}
_BASE = "base.safetensors"


@dataclass(frozen=True, eq=False)
class Shared:
    """What runs share: a classifier with the pretrained backbone, and every image of the digits to adapt to."""

    base: Classifier
    images: Images


@task
class Digits(Task):
    """scikit-learn's 8 x 8 digits: the base is pretrained on some of them, and adapted to the others under a new head.

    Args:
        backbone: "transformer" (two blocks of width 64) or "convnet" (three convolutions).
        adapt_to: the digits to adapt to; the base is pretrained on the others.
        train, validation, test: how many images each part has. The first two are drawn anew for each seed; the test
            part is the same for all.
        pretraining: steps of the base's own training.
        targets: "all-linear" if not given; for the convnet its convolutions, but for the first, too.

    Raises:
        ValueError: digits that are none, come twice, or leave fewer than two on either side; parts that need more
            images than there are; a batch larger than the training part.
    """

    name = "digits"
    trained = ("head",)
    packable = True
    unprepared: ClassVar[frozenset[str]] = Task.unprepared | {"targets", "train", "validation", "test"}

    lr: Annotated[float, Field(gt=0)] = 1e-2
    steps: Annotated[int, Field(ge=1)] = 150
    backbone: Literal["transformer", "convnet"] = "transformer"
    adapt_to: tuple[int, ...] = (5, 6, 7, 8, 9)
    train: Annotated[int, Field(ge=1)] = 200
    validation: Annotated[int, Field(ge=1)] = 300
    test: Annotated[int, Field(ge=1)] = 300
    pretraining: Annotated[int, Field(ge=1)] = 300

    @model_validator(mode="before")
    @classmethod
    def _targets_of_backbone(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and given.get("backbone") == "convnet":
            return {"targets": ADAPTED, **given}
        return given

    @field_validator("adapt_to")
    @classmethod
    def _two_on_either_side(cls, digits: tuple[int, ...]) -> tuple[int, ...]:
        others = sorted(set(DIGITS) - set(digits))
        if set(digits) - set(DIGITS):
            raise ValueError(f"{sorted(set(digits) - set(DIGITS))} are no digits; choose from 0 to 9")
        if len(set(digits)) < len(digits):
            raise ValueError("a digit comes twice; give each once")
        if len(digits) < 2 or len(others) < 2:
            raise ValueError(
                f"{len(digits)} digits to adapt to and {len(others)} to pretrain on; take 2 to 8 of the 10"
            )
        return tuple(sorted(digits))

    @model_validator(mode="after")
    def _enough_images(self) -> Self:
        there, needed = len(images_of(self.adapt_to).labels), self.train + self.validation + self.test
        if needed > there:
            raise ValueError(
                f"train + validation + test = {needed}, but there are {there} images of the digits {self.adapt_to}; "
                "make a part smaller, or take more digits"
            )
        if self.batch > self.train:
            raise ValueError(f"batch={self.batch} is more than train={self.train} images; take batch ≤ {self.train}")
        return self

    def fingerprint(self) -> str:
        """A hash of all images."""
        return fingerprint()

    def prepare(self, folder: Path) -> None:
        """Pretrain the backbone, and keep its weights."""
        save_file(self.pretrained().state_dict(), folder / _BASE)

    def load(self, folder: Path) -> Shared:
        """A classifier with the pretrained backbone, and the images."""
        base = self._classifier(len(self.adapt_to))
        base.backbone.load_state_dict(load_file(folder / _BASE))
        return Shared(base, images_of(self.adapt_to))

    def model(self, shared: Shared | None, seed: int) -> Classifier:
        """The pretrained backbone, its numbers not copied, under a head drawn from the seed."""
        if shared is None:
            return self._classifier(len(self.adapt_to))
        model = sharing_copy(shared.base, own=self.trained)
        model.draw_head(seed)
        return model

    def batches(self, shared: Shared, seed: int) -> Iterator[Images]:
        """Images of the seed's training part."""
        train = shared.images.pick(self.split(seed).train)
        return batches(train, self.batch, self.steps, stream("batches", seed))

    def loss(self, model: nn.Module, batch: Images) -> Tensor:
        """The mean cross-entropy."""
        return F.cross_entropy(model(batch.pixels), batch.labels)

    def scores(self, model: nn.Module, shared: Shared, part: Part, seed: int) -> Scores:
        """Accuracy and mean cross-entropy; the score of an image is 1 where it is told right, else 0."""
        images = shared.images.pick(getattr(self.split(seed), part))
        pixels = moved(images.pixels, next(model.parameters()).device)
        logits = model(pixels).cpu()
        told = logits.argmax(dim=1)
        right = (told == images.labels).double()
        loss = F.cross_entropy(logits, images.labels).item()
        return Scores(
            {"accuracy": right.mean().item(), "loss": loss},
            columns(id=images.numbers, score=right, label=images.labels, told=told),
        )

    def split(self, seed: int) -> Split:
        """Which images of the digits to adapt to each part has, for a seed."""
        return split(len(images_of(self.adapt_to).labels), seed, self.train, self.validation, self.test)

    def pretrained(self) -> nn.Module:
        """Train a whole classifier on the other digits, from a seed of its own, and give back its backbone."""
        others = [digit for digit in DIGITS if digit not in self.adapt_to]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self._classifier(len(others))
        model.draw_head(0)
        optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.pretraining)
        for images in batches(images_of(others), 64, self.pretraining, stream("pretraining", 0)):
            optimiser.zero_grad()
            self.loss(model, images).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
        return model.backbone

    def _classifier(self, classes: int) -> Classifier:
        return Classifier(BACKBONES[self.backbone](), classes)
