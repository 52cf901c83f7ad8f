"""Published models by name, as plain numbers.

Every entry says its published total, and a test holds the model that is built from it to that total, digit by digit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """A published model: enough to build it, and what it is known to come to.

    Args:
        model: its class in Transformers; encoders are counted without a head, as AutoModel loads them.
        dtype: the dtype that its weights are published in.
        parameters: its published total, each tied weight once.
        config: the fields of its config that parameters depend on, where Transformers' default may be another.
    """

    model: str
    dtype: str
    parameters: int
    config: Mapping[str, Any]


def _llama(parameters: int, width: int, hidden: int, layers: int, heads: int, **other: Any) -> Architecture:
    """A decoder with gated feed-forward blocks; plain attention, two-byte weights and 32,000 tokens unless told."""
    model, dtype = other.pop("model", "LlamaForCausalLM"), other.pop("dtype", "float16")
    config = {"hidden_size": width, "intermediate_size": hidden, "num_hidden_layers": layers}
    config |= {"num_attention_heads": heads, "num_key_value_heads": heads}
    return Architecture(model, dtype, parameters, config | {"vocab_size": 32000, "tie_word_embeddings": False} | other)


def _encoder(model: str, parameters: int, size: str, **other: Any) -> Architecture:
    """An encoder of BERT's base or large size."""
    width, layers, heads = {"base": (768, 12, 12), "large": (1024, 24, 16)}[size]
    config = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return Architecture(model, "float32", parameters, config | {"intermediate_size": 4 * width} | other)


def _gpt2(parameters: int, width: int, layers: int, heads: int) -> Architecture:
    config = {"n_embd": width, "n_layer": layers, "n_head": heads, "vocab_size": 50257, "n_positions": 1024}
    return Architecture("GPT2LMHeadModel", "float32", parameters, config)


def _t5(parameters: int, width: int, hidden: int, layers: int, heads: int) -> Architecture:
    config = {"d_model": width, "d_ff": hidden, "d_kv": 64, "num_layers": layers, "num_decoder_layers": layers}
    config |= {"num_heads": heads, "vocab_size": 32128}
    return Architecture("T5ForConditionalGeneration", "float32", parameters, config)


def _whisper(parameters: int, width: int, layers: int, heads: int) -> Architecture:
    config = {"d_model": width, "vocab_size": 51865, "num_mel_bins": 80}
    for side in ("encoder", "decoder"):
        config |= {f"{side}_layers": layers, f"{side}_attention_heads": heads, f"{side}_ffn_dim": 4 * width}
    return Architecture("WhisperForConditionalGeneration", "float32", parameters, config)


_BROAD: dict[str, Any] = {"dtype": "bfloat16", "num_key_value_heads": 8}
_GEMMA: dict[str, Any] = {"dtype": "bfloat16", "vocab_size": 256000, "head_dim": 256, "tie_word_embeddings": True}
_QWEN2: dict[str, Any] = {"model": "Qwen2ForCausalLM", "dtype": "bfloat16"}
_ROBERTA: dict[str, Any] = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
_DEBERTA: dict[str, Any] = {
    "vocab_size": 128100,
    "type_vocab_size": 0,
    "relative_attention": True,
    "position_buckets": 256,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
}

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama-7b": _llama(6_738_415_616, 4096, 11008, 32, 32),
    "llama-13b": _llama(13_015_864_320, 5120, 13824, 40, 40),
    "llama2-7b": _llama(6_738_415_616, 4096, 11008, 32, 32),
    "llama2-13b": _llama(13_015_864_320, 5120, 13824, 40, 40),
    "llama2-70b": _llama(68_976_648_192, 8192, 28672, 80, 64, num_key_value_heads=8),
    "llama3-8b": _llama(8_030_261_248, 4096, 14336, 32, 32, vocab_size=128256, **_BROAD),
    "llama3-70b": _llama(70_553_706_496, 8192, 28672, 80, 64, vocab_size=128256, **_BROAD),
    "mistral-7b": _llama(7_241_732_096, 4096, 14336, 32, 32, model="MistralForCausalLM", **_BROAD),
    "mixtral-8x7b": _llama(
        46_702_792_704, 4096, 14336, 32, 32, model="MixtralForCausalLM", num_local_experts=8, **_BROAD
    ),
    "qwen2-7b": _llama(7_615_616_512, 3584, 18944, 28, 28, num_key_value_heads=4, vocab_size=152064, **_QWEN2),
    "gemma-7b": _llama(8_537_680_896, 3072, 24576, 28, 16, model="GemmaForCausalLM", **_GEMMA),
    "gemma2-9b": _llama(9_241_705_984, 3584, 14336, 42, 16, model="Gemma2ForCausalLM", num_key_value_heads=8, **_GEMMA),
    "gpt2": _gpt2(124_439_808, 768, 12, 12),
    "gpt2-medium": _gpt2(354_823_168, 1024, 24, 16),
    "gpt2-large": _gpt2(774_030_080, 1280, 36, 20),
    "gpt2-xl": _gpt2(1_557_611_200, 1600, 48, 25),
    "bert-base": _encoder("BertModel", 109_482_240, "base", vocab_size=30522),
    "bert-large": _encoder("BertModel", 335_141_888, "large", vocab_size=30522),
    "roberta-base": _encoder("RobertaModel", 124_645_632, "base", **_ROBERTA),
    "roberta-large": _encoder("RobertaModel", 355_359_744, "large", **_ROBERTA),
    "deberta-v3-base": _encoder("DebertaV2Model", 183_831_552, "base", **_DEBERTA),
    "deberta-v3-large": _encoder("DebertaV2Model", 434_012_160, "large", **_DEBERTA),
    "t5-base": _t5(222_903_552, 768, 3072, 12, 12),
    "t5-large": _t5(737_668_096, 1024, 4096, 24, 16),
    "whisper-small": _whisper(241_734_912, 768, 12, 12),
    "vit-base": _encoder("ViTModel", 86_389_248, "base"),
    "vit-large": _encoder("ViTModel", 304_351_232, "large"),
}
