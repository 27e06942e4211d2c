"""Tiny configs of the dense families that are named in the documentation, one row per family."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

VOCABULARY = 128
_COMMON: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA: dict[str, Any] = {
    **_COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
_GPT2: dict[str, Any] = {**_COMMON, "n_embd": 32, "n_inner": 48, "n_layer": 3, "n_head": 4, "n_positions": 128}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _LLAMA),
    "llama_biases": ("llama", {**_LLAMA, "mlp_bias": True, "attention_bias": True}),
    "llama_tied": ("llama", {**_LLAMA, "tie_word_embeddings": True}),
    "mistral": ("mistral", {**_LLAMA, "sliding_window": 8}),
    "qwen2": ("qwen2", _LLAMA),
    "qwen3": ("qwen3", _LLAMA),
    "smollm3": ("smollm3", _LLAMA),
    "gemma2": ("gemma2", _LLAMA),
    "gemma3": ("gemma3_text", _LLAMA),
    "olmo2": ("olmo2", _LLAMA),
    "cohere2": ("cohere2", _LLAMA),
    "granite": ("granite", {**_LLAMA, "residual_multiplier": 0.5, "logits_scaling": 2.0}),
    "phi3": ("phi3", _LLAMA),
    "glm4": ("glm4", _LLAMA),
    "gpt2": ("gpt2", _GPT2),
    "gpt_neox": ("gpt_neox", _LLAMA),
    "opt": ("opt", {**_COMMON, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
                    "word_embed_proj_dim": 32, "max_position_embeddings": 128}),
    "phi": ("phi", _LLAMA),
    "starcoder2": ("starcoder2", _LLAMA),
    "falcon": ("falcon", {**_COMMON, "hidden_size": 32, "ffn_hidden_size": 48, "num_hidden_layers": 3,
                          "num_attention_heads": 4, "alibi": False, "bias": True}),
    "falcon_no_bias": ("falcon", {**_COMMON, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
                                  "bias": False}),
}  # fmt: skip


def text_config(family: str, **changes: Any) -> PreTrainedConfig:
    """The tiny config of a family."""
    model_type, fields = FAMILIES[family]
    return CONFIG_MAPPING[model_type](**{**fields, **changes})
