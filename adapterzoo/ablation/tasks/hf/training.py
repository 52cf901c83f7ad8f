"""The loop of the papers' trainers where it is another than the default: gradients are clipped before each step."""

from typing import Any

from torch.nn.utils import clip_grad_norm_

from adapterzoo.ablation.tasks.loop import Training


class Clipped(Training):
    """A run whose gradients are scaled down to a norm, all together, where theirs is larger.

    Args:
        task, run: as of `Training`.
    """

    clip: float | None = None
    """The largest norm; None for any."""

    def backward(self, batch: Any) -> float:
        """Gradients of a batch, clipped; its loss."""
        loss = super().backward(batch)
        if self.clip is not None:
            clip_grad_norm_([p for p in self.model.parameters() if p.grad is not None], self.clip)
        return loss
