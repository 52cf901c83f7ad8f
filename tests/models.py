"""Whole models from tiny configs with random weights: how each is built, what it is fed and what it answers."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from diffusers import UNet2DConditionModel
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

VOCAB = 99
IDS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BODY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
DECODER = {**BODY, **IDS, "num_key_value_heads": 2, "max_position_embeddings": 64}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ENCODER = {**BODY, **NO_DROPOUT, "vocab_size": VOCAB, "num_labels": 3}
ADAPTABLE = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Embedding)


def _numbers(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _tokens(length: int = 7) -> torch.Tensor:
    return torch.randint(3, VOCAB, (2, length), generator=_numbers())


@dataclass(frozen=True)
class Whole:
    """A model to be adapted.

    Args:
        build: makes it, with torch's global random state.
        example: makes an input, with labels if the model takes any.
        all_linear: how many layers "all-linear" means.
        left_alone: what it leaves alone: the layer and a part of the reason.
        prompt: the input that `generate` takes; None if the model generates nothing.
        checkpoints: a layer inside a block that checkpointing of activations runs twice.
        bypassed: a layer whose weight the model reads itself, so that an adapter on it changes nothing.
    """

    build: Callable[[], nn.Module]
    example: Callable[[], dict[str, Any]]
    all_linear: int
    left_alone: Mapping[str, str]
    prompt: str | None = None
    checkpoints: str | None = None
    bypassed: str | None = None

    def model(self) -> nn.Module:
        """The same weights at every call, in evaluation, no parameter at its start: biases are zero there."""
        torch.manual_seed(0)
        model = self.build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        return model.eval()

    def adaptable(self, model: nn.Module) -> list[str]:
        """Every layer that can be adapted: of a plain class, with a weight that no other module has, and no head."""
        owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
        spared = {*self.left_alone, self.bypassed}
        return [
            name
            for name, module in model.named_modules()
            if type(module) in ADAPTABLE and owners[id(module.weight)] == 1 and name not in spared
        ]

    def answer(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """What the model says of the example, in that dtype, without a gradient."""
        cast = {name: x.to(dtype) if x.is_floating_point() else x for name, x in self.example().items()}
        with torch.no_grad():
            return _answer(model(**cast))

    def loss(self, model: nn.Module) -> torch.Tensor:
        """The model's own loss, or the distance from a fixed target."""
        out = model(**self.example())
        if getattr(out, "loss", None) is not None:
            return out.loss
        answer = _answer(out)
        return F.mse_loss(answer, torch.randn(answer.shape, generator=_numbers(2)))

    def logits(self, model: nn.Module, **options: Any) -> torch.Tensor:
        """The logits of every token that the model generates by itself: [steps, batch, vocabulary]."""
        assert self.prompt is not None
        out = model.generate(
            self.example()[self.prompt], max_new_tokens=5, min_new_tokens=5, do_sample=False,
            return_dict_in_generate=True, output_logits=True, **options,
        )  # fmt: skip
        return torch.stack(out.logits)


def _answer(out: Any) -> torch.Tensor:
    return next(out[key] for key in ("logits", "sample") if key in out)


def as_matrix(module: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """A weight in the layout of its plain layer as W: [out, in]."""
    if isinstance(module, (Conv1D, nn.Embedding)):
        return weight.T
    return weight.reshape(len(weight), -1)


def as_stored(module: nn.Module, matrix: torch.Tensor) -> torch.Tensor:
    """W: [out, in] in the layout of its plain layer."""
    if isinstance(module, (Conv1D, nn.Embedding)):
        return matrix.T
    return matrix.reshape(module.weight.shape)


class ConvNet(nn.Module):
    """A plain convolutional network: a stride, a dilation with groups, circular padding, a depthwise layer, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, 3, padding=2, dilation=2, groups=2, bias=False)
        self.circular = nn.Conv2d(12, 12, (3, 5), padding="same", padding_mode="circular")
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.pointwise = nn.Conv2d(12, 16, 1)
        self.head = nn.Linear(16, 3)

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """The class of every image: {"logits": [batch, 3]}."""
        x = F.gelu(self.norm(self.stem(pixel_values)))
        x = F.gelu(self.grouped(x))
        x = x + F.gelu(self.circular(x))
        x = x + F.gelu(self.depthwise(x))
        return {"logits": self.head(F.gelu(self.pointwise(x)).mean((2, 3)))}


def _language() -> dict[str, Any]:
    return {"input_ids": _tokens(), "labels": _tokens()}


def _sentences() -> dict[str, Any]:
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": _tokens(), "attention_mask": mask, "labels": torch.tensor([0, 2])}


def _images() -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=_numbers()), "labels": torch.tensor([0, 2])}


def _sound() -> dict[str, Any]:
    return {"input_features": torch.randn(2, 8, 32, generator=_numbers()), "labels": _tokens(5)}


def _noise() -> dict[str, Any]:
    return {
        "sample": torch.randn(2, 4, 8, 8, generator=_numbers()),
        "timestep": torch.tensor([1, 500]),
        "encoder_hidden_states": torch.randn(2, 3, 32, generator=_numbers(2)),
    }


def _gpt2() -> nn.Module:
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return tf.GPT2LMHeadModel(tf.GPT2Config(**shape, **IDS, **dropout))


def _deberta(version_3: bool) -> nn.Module:
    """With the settings of microsoft/deberta-v3-base; or of the v2 line, with projections of positions and a Conv1d."""
    relative = {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]}
    both = {**relative, "norm_rel_ebd": "layer_norm", "position_biased_input": False, "type_vocab_size": 0}
    line = {"share_att_key": True} if version_3 else {"share_att_key": False, "conv_kernel_size": 3}
    return tf.DebertaV2ForSequenceClassification(tf.DebertaV2Config(**ENCODER, **both, **line, pooler_dropout=0.0))


def _t5() -> nn.Module:
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu"}
    ids = {"vocab_size": VOCAB, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    return tf.T5ForConditionalGeneration(tf.T5Config(**shape, **ids, dropout_rate=0.0))


def _whisper() -> nn.Module:
    sides = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}
    shape = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sides.items()}
    sizes = {"d_model": 32, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32}
    words = {"decoder_start_token_id": 3, "suppress_tokens": None, "begin_suppress_tokens": None}
    return tf.WhisperForConditionalGeneration(tf.WhisperConfig(**shape, **sizes, **words, **IDS))


def _vit() -> nn.Module:
    images = {"image_size": 16, "patch_size": 4, "num_labels": 3}
    return tf.ViTForImageClassification(tf.ViTConfig(**BODY, **NO_DROPOUT, **images))


def _unet() -> nn.Module:
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=32,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


HEAD = "output embedding"
QUERY = "model.layers.0.self_attn.q_proj"
BERTS = "encoder.layer.0.attention.self.query_proj"
TABLE = "deberta.encoder.rel_embeddings"

MODELS: dict[str, Whole] = {
    "llama": Whole(
        lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER)),
        _language, 14, {"lm_head": HEAD}, "input_ids", QUERY,
    ),
    "qwen2": Whole(
        lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**DECODER, tie_word_embeddings=True)),
        _language, 14, {"lm_head": "tied to model.embed_tokens.weight"}, "input_ids", QUERY,
    ),
    "gemma": Whole(
        lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**DECODER, head_dim=8)),
        _language, 14, {"lm_head": "tied to model.embed_tokens.weight"}, "input_ids", QUERY,
    ),
    "mixtral": Whole(
        lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**DECODER, num_local_experts=3, num_experts_per_tok=2)),
        _language, 8, {"lm_head": HEAD}, "input_ids", QUERY,
    ),
    "gpt2": Whole(
        _gpt2, _language, 8, {"lm_head": "tied to transformer.wte.weight"}, "input_ids", "transformer.h.0.attn.c_attn"
    ),
    "bert": Whole(
        lambda: tf.BertForSequenceClassification(tf.BertConfig(**ENCODER)),
        _sentences, 14, {}, checkpoints="bert.encoder.layer.0.attention.self.query",
    ),
    "deberta-v3": Whole(lambda: _deberta(True), _sentences, 14, {}, None, f"deberta.{BERTS}", TABLE),
    "deberta-v2": Whole(lambda: _deberta(False), _sentences, 18, {}, None, f"deberta.{BERTS}", TABLE),
    "t5": Whole(
        _t5, lambda: {"input_ids": _tokens(), "labels": _tokens(5)},
        36, {"lm_head": "tied to"}, "input_ids", "encoder.block.0.layer.0.SelfAttention.q",
    ),
    "whisper": Whole(
        _whisper, _sound, 32, {"proj_out": "tied to model.decoder.embed_tokens.weight"},
        "input_features", "model.encoder.layers.0.self_attn.q_proj",
    ),
    "vit": Whole(
        _vit,
        _images, 13, {}, checkpoints="vit.layers.0.attention.q_proj",
    ),
    "convnet": Whole(ConvNet, lambda: {"pixel_values": _images()["pixel_values"]}, 1, {}),
    "unet": Whole(_unet, _noise, 50, {}, checkpoints="down_blocks.0.resnets.0.time_emb_proj"),
}  # fmt: skip
