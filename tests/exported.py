"""Small models with perturbed adapters, and their W' and W' − W in float64, for the tests of exports."""

import torch
import transformers as tf
from reference import adapted, tree_of
from torch import nn
from transformers.pytorch_utils import Conv1D

from adapterzoo import MAP, SORA, AdaLoRA, DoRA, FLoRA, Full, LoRA, PreDiag, adapt, adapted_layers

GENERATORS = [LoRA(r=3, alpha=5), AdaLoRA(r=4, alpha=6), FLoRA(r=(3, 2), scale=1.5), Full()]
WRAPPERS = [
    lambda inner: inner,
    lambda inner: MAP(inner),
    lambda inner: DoRA(inner),
    lambda inner: PreDiag(inner),
    lambda inner: SORA(inner, rank=2),
    lambda inner: MAP(SORA(DoRA(inner), rank=1)),
]
EVERY = [wrap(generator) for wrap in WRAPPERS for generator in GENERATORS]
IDS = torch.tensor([[5, 3, 80, 12, 7, 41, 2], [9, 1, 1, 64, 33, 0, 98]])


def llama(**options):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, **options}
    config = tf.LlamaConfig(vocab_size=99, num_key_value_heads=1, max_position_embeddings=32, **sizes)
    return started(tf.LlamaForCausalLM(config))


def bert():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return started(tf.BertForSequenceClassification(tf.BertConfig(vocab_size=99, num_labels=3, **sizes)))


def gpt2():
    config = tf.GPT2Config(
        vocab_size=99, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    return started(tf.GPT2LMHeadModel(config))


def mlp(dtype=torch.float32):
    return started(nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 7, bias=False), nn.Linear(7, 3))).to(dtype)


class Mixed(nn.Module):
    """An embedding, a convolution and a linear layer."""

    def __init__(self, **options):
        super().__init__()
        self.tokens = nn.Embedding(11, 6)
        self.kernel = nn.Conv2d(6, 8, (3, 2), stride=2, padding=1, **options)
        self.head = nn.Linear(8, 3)

    def forward(self, ids):
        """Indices [batch, height, width] -> [batch, 3]."""
        x = self.kernel(self.tokens(ids).permute(0, 3, 1, 2))
        return self.head(x.relu().mean((2, 3)))


def started(model):
    """No parameter at its start: biases are zero there."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2, generator=draw)
    return model.eval()


def trained(model, spec, *args, **options):
    """The model, adapted, with every number of every adapter away from its start."""
    adapt(model, spec, *args, **options)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            for name, value in layer.adapter.state_dict().items():
                noise = torch.randn(value.shape, generator=draw).to(value)
                value[...] = (noise > -0.5).to(value) if name.endswith("mask") else value + 0.2 * noise
    return model


def answer(model, x=IDS):
    with torch.no_grad():
        out = model(x)
    return getattr(out, "logits", out).double()


def as_matrix(base, weight):
    """A weight in its layer's layout as W: [out, in]."""
    return weight.mT if isinstance(base, (Conv1D, nn.Embedding)) else weight.flatten(1)


def truth(layer):
    """W: [out, in] and W' − W in float64, by the reference."""
    W = as_matrix(layer.base, layer.weight.detach()).double()
    return W, adapted(W, tree_of(layer.adapter)[0]).update.detach()


def distance(actual, expected):
    """The relative one."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())
