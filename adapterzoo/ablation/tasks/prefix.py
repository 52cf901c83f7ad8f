"""The last blocks of an encoder as a model of its own, on hidden states that the blocks before left once and for all.

Blocks that are frozen, and stand before the first adapted one, give the same for a text in every step of every run. So
what they give is computed once a grid, kept in a file of float32, and mapped into every run's memory.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import BertModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput

from adapterzoo.ablation.minilm import Texts
from adapterzoo.ablation.tasks.sharing import sharing_copy

_STATES, _LENGTHS = "states.npy", "lengths.npy"


class Tail(nn.Module):
    """The last blocks of a BERT, under the names that they have in it: `encoder.layer.4.attention.self.query`.

    Args:
        whole: the encoder; its blocks become this module's.
        blocks: how many of its last.
    """

    def __init__(self, whole: BertModel, blocks: int) -> None:
        super().__init__()
        last = list(whole.encoder.layer.named_children())[-blocks:]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleDict(dict(last))})
        self.config = whole.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> BaseModelOutput:
        """Go on from hidden states: [n, tokens, width], which stand in the place of token ids; mask: [n, tokens]."""
        hidden = input_ids
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=hidden, attention_mask=attention_mask)
        for block in self.encoder["layer"].children():
            hidden = block(hidden, mask)
        return BaseModelOutput(last_hidden_state=hidden)


class Hidden:
    """Hidden states of many texts, without what would fill rows up; it stands in for `Texts`.

    Shapes:
        states: [all tokens, width]; lengths: [n]; mask: [n, tokens], 1 on tokens and 0 on what would fill a row up.

    Args:
        states: of one text after the other.
        lengths: how many tokens each has.
    """

    def __init__(self, states: Tensor, lengths: Tensor) -> None:
        self.mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        self._rows = torch.split(states, lengths.tolist())

    def pick(self, chosen: Tensor) -> Texts:
        """Those texts, in that order, no wider than the longest of them; chosen: [m]."""
        filled = pad_sequence([self._rows[i] for i in chosen.tolist()], batch_first=True)
        return Texts(filled, self.mask[chosen, : filled.shape[1]])


@torch.no_grad()
def write_hidden(folder: Path, whole: BertModel, texts: Texts, blocks: int, batch: int = 64) -> None:
    """Compute the hidden states before the last blocks, and keep them.

    Args:
        folder: for the files; it is made.
        whole: the encoder.
        texts: token ids.
        blocks: how many blocks at the end are left out.
        batch: texts that go through the encoder together; texts of one length share a batch.
    """
    lengths = texts.mask.sum(dim=1)
    ends = lengths.cumsum(0)
    states = torch.empty(int(ends[-1]), whole.config.hidden_size)
    prefix = _without_last(whole, blocks)
    for chosen in torch.split(lengths.argsort(stable=True), batch):
        part = texts.pick(chosen)
        found = prefix(input_ids=part.ids, attention_mask=part.mask).last_hidden_state
        for row, index in zip(found, chosen.tolist(), strict=True):
            states[ends[index] - lengths[index] : ends[index]] = row[: lengths[index]]
    folder.mkdir()
    np.save(folder / _STATES, states.numpy())
    np.save(folder / _LENGTHS, lengths.numpy())


def read_hidden(folder: Path) -> Hidden:
    """What `write_hidden` kept: mapped, so that processes share it, and copied where it is written to."""
    states = torch.from_numpy(np.load(folder / _STATES, mmap_mode="c"))
    return Hidden(states, torch.from_numpy(np.load(folder / _LENGTHS)))


def _without_last(whole: BertModel, blocks: int) -> BertModel:
    front = sharing_copy(whole)
    front.encoder.layer = front.encoder.layer[:-blocks]
    front.eval()
    return front
