"""One line for Hugging Face's Trainer: `callbacks=[Attach()]`."""

import warnings
from typing import Any

from torch import nn
from torch.optim import Optimizer

from adapterzoo.errors import TrainingError, UnfinishedWarning, count, listing
from adapterzoo.layer import adapted_layers
from adapterzoo.training.attach import Attachment, attach

try:
    from transformers import TrainerCallback
except ImportError as missing:
    raise ImportError(
        "adapterzoo.training.huggingface serves Hugging Face's Trainer and needs transformers and accelerate: "
        "pip install 'adapterzoo[trainers]'"
    ) from missing


class Attach(TrainerCallback):  # type: ignore[misc]
    """Calls `adapterzoo.attach` when training begins, with the Trainer's optimiser and number of steps.

    What it remembers is in the optimiser's file of every checkpoint, so a resumption needs the same line again and
    nothing more. A model whose pieces need nothing trains as it would without it.

    Args:
        add_penalty: as `attach` takes it.

    Raises:
        TrainingError: in `trainer.train()`: what `attach` raises; if a checkpoint that is resumed from lacks adapters
            of the model; and if the first backward gave no adapter a gradient.

    Example:
        >>> from adapterzoo.training import huggingface as az_hf
        >>> callback = az_hf.Attach()  # Trainer(model, args, ..., callbacks=[callback])
        >>> callback.attachment is None  # until training begins
        True
    """

    def __init__(self, *, add_penalty: bool = True) -> None:
        self.add_penalty = add_penalty
        self.attachment: Attachment | None = None
        self._saw_gradients = False

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module, optimizer: Optimizer, **_: Any
    ) -> None:
        """Attach, for all the steps of this training, those before a resumption included."""
        self.attachment, self._saw_gradients = None, False
        if state.global_step > 0:
            _check_resumed(model)
        if state.max_steps > 0:  # a Trainer asked for no epoch takes no step
            self.attachment = attach(model, optimizer, total_steps=state.max_steps, add_penalty=self.add_penalty)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """See, before the first step, that gradients arrive."""
        if self.attachment is not None and not self._saw_gradients:
            self._saw_gradients = True
            _check_gradients(self.attachment)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Detach; warn if the model is one whose ranks are not final."""
        if self.attachment is not None:
            self.attachment.detach()
            best = state.best_global_step if args.load_best_model_at_end else None
            _check_finished(self.attachment, best or self.attachment.step)


def _check_resumed(model: nn.Module) -> None:
    """Raise a TrainingError if the checkpoint that was resumed from had not the adapters that the model has."""
    lost = [name for name, layer in adapted_layers(model).items() if layer.file_had_adapter is False]
    if lost:
        raise TrainingError(
            "the Trainer resumes from a checkpoint without the adapters of these layers, which would start anew: "
            f"{listing(lost)}\nTransformers saves some architectures (ViT) under other names than the model's, and its "
            "Trainer does not find them again; save with model.save_pretrained(..., save_original_format=False), or "
            "adapterzoo.save, and load that before training"
        )


def _check_gradients(attachment: Attachment) -> None:
    """Raise a TrainingError if adapters are to be trained and none of their parameters has a gradient."""
    trained = [p for layer in attachment.layers for p in layer.adapter.parameters() if p.requires_grad]
    if trained and all(parameter.grad is None for parameter in trained):
        raise TrainingError(
            f"the first backward gave no gradient to the adapters of {count(len(attachment.layers), 'layer')}: they "
            "would stay as they are. Checkpointing of activations with use_reentrant=True cuts them off where the "
            "input of a checkpointed block needs no gradient: take use_reentrant=False, or call "
            "model.enable_input_require_grads() before training"
        )


def _check_finished(attachment: Attachment, step: int) -> None:
    """Warn if a model of that step is one from before the end of its pieces' schedules."""
    rules = {part.spec.step_rule() for layer in attachment.layers for part in layer.adapter.parts()}
    if any(rule is not None and not rule.finished(step, attachment.total_steps) for rule in rules):
        warnings.warn(
            f"the model is that of step {step} of {attachment.total_steps}, at which its ranks were not final: it may "
            "have more of them than it was asked to end with. Let training run to its end; where the best checkpoint "
            "is loaded at the end, train with the final ranks for a while (t_final) and save and evaluate then",
            UnfinishedWarning,
            stacklevel=2,
        )
