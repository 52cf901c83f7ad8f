"""What each kind of task learns, and how it is looked at."""

from collections.abc import Callable, Mapping
from inspect import signature
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapterzoo.ablation.tasks.devices import moved
from adapterzoo.ablation.tasks.hf.measures import of_classes, of_numbers
from adapterzoo.ablation.tasks.hf.rows import IDS, TYPES, Batch, Rows
from adapterzoo.ablation.tasks.task import Columns, Scores, columns

_INPUTS = (IDS, TYPES, "attention_mask")


def label_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of classes, or the squared error of numbers: []."""
    return _label_losses(_outputs(model, batch), batch["labels"]).mean()


def text_loss(model: nn.Module, batch: Batch, whole: bool) -> Tensor:
    """The mean of −log p over tokens: of the whole text but its first token, or of the answers alone: []."""
    found = _predicted(model, batch, whole)
    return found.losses()[found.counted].mean()


def look_at_labels(model: nn.Module, rows: Rows, regression: bool) -> Scores:
    """Classes or numbers; an example's score is 1 or 0, or the squared error with a minus."""
    outputs = _for_all(model, rows, lambda batch: _outputs(model, batch))
    labels = torch.from_numpy(rows.values["labels"])
    losses = _label_losses(outputs, labels)
    if regression:
        values = outputs[:, 0].double()
        metrics = of_numbers(values.numpy(), labels.numpy())
        kept = columns(id=rows.values["names"], score=-(values - labels).square(), predicted=values)
    else:
        chosen = outputs.argmax(dim=1)
        metrics = of_classes(chosen.numpy(), labels.numpy(), outputs.shape[1])
        kept = columns(id=rows.values["names"], score=(chosen == labels).double(), predicted=chosen)
    return Scores({**metrics, "loss": losses.mean().item()}, kept)


def look_at_choices(model: nn.Module, rows: Rows) -> Scores:
    """The answer whose tokens have the largest log-likelihood, given the question, is chosen; ties go to the first."""
    found = _for_all(model, rows, lambda batch: _likelihoods(model, batch))
    examples, right = torch.from_numpy(rows.values["examples"]), torch.from_numpy(rows.values["right"])
    first = torch.cat([torch.tensor([True]), examples[1:] != examples[:-1]])
    best = torch.stack([part.argmax() for part in torch.split(found, _counts(examples))])
    correct = right[best + first.nonzero()[:, 0]].double()
    metrics = {"accuracy": correct.mean().item(), "loss": -found[right].mean().item()}
    return Scores(metrics, columns(id=rows.values["names"][first.numpy()], score=correct, choice=best))


def look_at_answers(model: nn.Module, rows: Rows) -> Scores:
    """Whether greedy decoding gives the answer, token for token.

    It does where each token is the likeliest after the right ones before it, which one pass over the text decides.
    """
    found = _for_all(model, rows, lambda batch: _greedy(model, batch))
    metrics = {"accuracy": found[:, 0].mean().item(), "loss": found[:, 1].mean().item()}
    return Scores(metrics, columns(id=rows.values["names"], score=found[:, 0]))


def together(found: Mapping[str, Scores]) -> Scores:
    """Several sets as one: the one that is called "" counts, and else the mean over sets; each set is told too."""
    plain = {name: scores.metrics for name, scores in found.items() if name}
    named = {f"{key}_{name}": value for name, metrics in plain.items() for key, value in metrics.items()}
    if "" in found:
        return Scores({**found[""].metrics, **named}, found[""].examples)
    keys = next(iter(plain.values()))
    means = {key: sum(metrics[key] for metrics in plain.values()) / len(plain) for key in keys}
    return Scores({**means, **named}, _joined([scores.examples for scores in found.values()]))


def _joined(parts: list[Columns]) -> Columns:
    return {name: columns(all=[value for part in parts for value in part[name]])["all"] for name in parts[0]}


def _outputs(model: nn.Module, batch: Batch, **told: int) -> Tensor:
    logits: Tensor = model(**{name: batch[name] for name in _INPUTS if name in batch}, **told).logits
    return logits.float()


def _label_losses(outputs: Tensor, labels: Tensor) -> Tensor:
    """One loss an example: [n]."""
    if labels.is_floating_point():
        return F.mse_loss(outputs[:, 0], labels.to(outputs.dtype), reduction="none")
    return F.cross_entropy(outputs, labels, reduction="none")


class _Predicted(NamedTuple):
    """What is said of tokens that come next: scores: [n, m, vocabulary]; ids, the right ones, and which count: [n, m].

    A large vocabulary is most of the work of a small model, so only outputs from the first answer on are computed where
    the question does not count.
    """

    scores: Tensor
    ids: Tensor
    counted: Tensor

    def losses(self) -> Tensor:
        """−log p of every token: [n, m]."""
        return F.cross_entropy(self.scores.flatten(0, 1), self.ids.flatten(), reduction="none").view_as(self.ids)


def _predicted(model: nn.Module, batch: Batch, whole: bool) -> _Predicted:
    ids, real = batch[IDS], batch["attention_mask"].bool()
    first = 1 if whole else int(batch["starts"].min())
    kept = ids.shape[1] - first + 1  # the output before a token predicts it
    few = not whole and "logits_to_keep" in signature(model.forward).parameters
    scores = _outputs(model, batch, logits_to_keep=kept) if few else _outputs(model, batch)
    places = torch.arange(first, ids.shape[1], device=ids.device)
    asked = real[:, first:] if whole else real[:, first:] & (places >= batch["starts"][:, None])
    return _Predicted(scores[:, -kept:-1], ids[:, first:], asked)


def _likelihoods(model: nn.Module, batch: Batch) -> Tensor:
    """log p of each answer: [n]."""
    found = _predicted(model, batch, whole=False)
    return -(found.losses() * found.counted).sum(dim=1)


def _greedy(model: nn.Module, batch: Batch) -> Tensor:
    """Whether every token of the answer is the likeliest, and −log p of the answer: [n, 2]."""
    found = _predicted(model, batch, whole=False)
    right = ((found.scores.argmax(dim=2) == found.ids) | ~found.counted).all(dim=1)
    losses = (found.losses() * found.counted).sum(dim=1)
    return torch.stack([right.to(losses.dtype), losses], dim=1)


def _for_all(model: nn.Module, rows: Rows, look: Callable[[Batch], Tensor]) -> Tensor:
    """What `look` gives for every row, in their order, on the CPU."""
    device = next(model.parameters()).device
    order = list(rows.by_length())
    found = torch.cat([look(moved(rows.batch(chosen), device)).cpu() for chosen in order])
    return found[torch.cat(order).argsort()]


def _counts(examples: Tensor) -> list[int]:
    counts: list[int] = torch.unique_consecutive(examples, return_counts=True)[1].tolist()
    return counts
