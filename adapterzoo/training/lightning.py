"""One line for Lightning's Trainer: `callbacks=[Attach()]`."""

import math
import warnings
from typing import Any

from torch import nn
from torch.optim import Optimizer

from adapterzoo.errors import TrainingError, UnfinishedWarning, count
from adapterzoo.layer import adapted_layers
from adapterzoo.training.attach import Attachment, attach

try:
    from lightning.pytorch.callbacks import Callback
except ImportError as missing:
    raise ImportError(
        "adapterzoo.training.lightning serves Lightning's Trainer and needs the package lightning: "
        "pip install 'adapterzoo[trainers]'"
    ) from missing


class Attach(Callback):  # type: ignore[misc]
    """Calls `adapterzoo.attach` when training starts, with the module's optimiser and the Trainer's number of steps.

    What it remembers is in the optimiser's state, which Lightning's checkpoints hold, so `fit(..., ckpt_path=...)`
    needs the same line again and nothing more. A model whose pieces need nothing trains as it would without it.

    Args:
        total_steps: how many steps the optimiser is going to take in all; by default what Lightning expects, which is
            a step a batch (or a batch of `accumulate_grad_batches`). Under manual optimisation with another rhythm,
            with several optimisers, and where training has no end that Lightning knows of, say it.
        add_penalty: as `attach` takes it.

    Raises:
        TrainingError: in `trainer.fit()`: what `attach` raises; and if the number of steps is not known, or several
            optimisers hold adapters.

    Example:
        >>> from adapterzoo.training import lightning as az_lightning
        >>> callback = az_lightning.Attach()  # lightning.Trainer(..., callbacks=[callback])
        >>> callback.attachment is None  # until training starts
        True
    """

    def __init__(self, *, total_steps: int | None = None, add_penalty: bool = True) -> None:
        self.total_steps, self.add_penalty = total_steps, add_penalty
        self.attachment: Attachment | None = None

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Attach; what a checkpoint holds has been loaded by now."""
        self.attachment = None
        optimizer = _the_optimizer(trainer.optimizers, pl_module)
        total = _steps(trainer) if self.total_steps is None else self.total_steps
        self.attachment = attach(pl_module, optimizer, total_steps=total, add_penalty=self.add_penalty)

    def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """Detach; warn if the ranks are not final."""
        self._detach()
        if self.attachment is not None and not self.attachment.finished:
            warnings.warn(
                f"training ended after {self.attachment.step} of {count(self.attachment.total_steps, 'step')}, before "
                "the ranks were final: the model may have more of them than it was asked to end with. Let training run "
                "to its end; if the optimiser takes fewer steps than there are batches, say how many: "
                "Attach(total_steps=...)",
                UnfinishedWarning,
                stacklevel=2,
            )

    def on_exception(self, trainer: Any, pl_module: nn.Module, exception: BaseException) -> None:
        """Detach, so that training can start anew."""
        self._detach()

    def _detach(self) -> None:
        if self.attachment is not None:
            self.attachment.detach()


def _the_optimizer(optimizers: list[Optimizer], model: nn.Module) -> Optimizer:
    """The optimiser that trains the adapters: the only one, or the only one of several that holds any."""
    adapters = {id(p) for layer in adapted_layers(model).values() for p in layer.adapter.parameters()}
    holding = [o for o in optimizers if any(id(p) in adapters for group in o.param_groups for p in group["params"])]
    if len(optimizers) == 1 or len(holding) == 1:
        return (holding or optimizers)[0]
    raise TrainingError(
        f"configure_optimizers gave {count(len(optimizers), 'optimiser')}, and {len(holding)} of them hold adapters; "
        "one, and only one, has to hold them: build it from adapterzoo.param_groups(model, lr=...)"
    )


def _steps(trainer: Any) -> int:
    """How many steps the Trainer's optimiser is going to take, where Lightning knows."""
    optimizers, steps = len(trainer.optimizers), trainer.estimated_stepping_batches
    if optimizers == 1 and 1 <= steps < math.inf:
        return int(steps)
    why = "this Trainer has no end that Lightning knows of" if optimizers == 1 else f"there are {optimizers} optimisers"
    raise TrainingError(
        f"{why}, so nobody knows how many steps the adapters' optimiser is going to take; say it: "
        f"Attach(total_steps=...){' or Trainer(max_steps=...)' if optimizers == 1 else ''}"
    )
