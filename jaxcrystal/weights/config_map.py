"""Configurations of Hugging Face, Meta and PEFT as ours, and ours as theirs; what cannot be run here is refused by key.

Only `read_*` look into files; `hf_config` and `peft_config` return what is to be written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jaxcrystal.config import TARGETS, LlamaConfig, LoraConfig, SettingError, from_dict
from jaxcrystal.errors import UserError
from jaxcrystal.weights.tensor_files import read_json

#: RoPE's kinds, and the keys that each needs beside rope_theta.
ROPE = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}

#: Keys of Meta's params.json that are read, and those that only size its own buffers.
META_KEYS = (
    {"dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps"}
    | {"rope_theta", "use_scaled_rope", "max_seq_len"}
    | {"max_batch_size"}
)

#: Keys of PEFT's adapter_config.json that are read, and those that change nothing once the adapters are trained.
PEFT_KEYS = (
    {"r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "peft_type", "bias", "init_lora_weights"}
    | {"task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"}
    | {"layers_pattern", "megatron_core", "qalora_group_size", "eva_config", "ensure_weight_tying"}
)

#: What to do with a PEFT model that is more than adapters of one rank on a base.
MERGE = (
    "merge it in PEFT (`AutoPeftModelForCausalLM.from_pretrained(DIR).merge_and_unload().save_pretrained(NEW)`), put "
    "the tokenizer into NEW and convert NEW without --base"
)

#: Ways to draw PEFT's adapters that leave the base as it is. The others train on a base that they have changed.
PEFT_INITIAL = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Family:
    """A model_type that is a LLaMA but for what is said here."""

    architecture: str
    ours: dict[str, Any] = field(default_factory=dict)  #: fields of LlamaConfig
    unsaid: dict[str, Any] = field(default_factory=dict)  #: what transformers takes for keys that config.json lacks


UNSAID = {"num_key_value_heads": 32, "sliding_window": 4096}
FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM", unsaid={"num_key_value_heads": 8, "sliding_window": 4096}),
    "qwen2": Family("Qwen2ForCausalLM", {"qkv_bias": True}, UNSAID),
    "qwen3": Family("Qwen3ForCausalLM", {"qk_norm": True}, UNSAID | {"head_dim": 128}),
}


def read_hf(directory: Path) -> LlamaConfig:
    """`config.json` of transformers, old or new. Raises UserError for what cannot be run here."""
    path = directory / "config.json"
    theirs = read_json(path)
    family = FAMILIES.get(str(theirs.get("model_type")))
    if family is None:
        known = ", ".join(FAMILIES)
        raise UserError(f"{path}: model_type is {theirs.get('model_type')!r}; those that can be run here are {known}")
    theirs = family.unsaid | theirs
    if quantized := theirs.get("quantization_config"):
        method = quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else quantized
        raise UserError(
            f"{path}: the weights are quantized (quantization_config: {method}); convert the model's float16, bfloat16 "
            "or float32 release"
        )
    for key, only in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        if theirs.get(key, only) != only:
            raise UserError(f"{path}: {key} is {theirs[key]!r}; only {only!r} is supported")
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if missing := [key for key in required if key not in theirs]:
        raise UserError(f"{path}: {', '.join(missing)} missing; is it the config of a LLaMA?")
    others = ("num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window")
    _check_counts(path, theirs, (*required, *others))
    heads = theirs["num_attention_heads"]
    longest = theirs.get("max_position_embeddings", 2048)
    if theirs.get("use_sliding_window", theirs["model_type"] == "mistral") and theirs.get("sliding_window"):
        longest = min(longest, theirs["sliding_window"])  # a shorter text has all of itself within the window
    # What a config leaves out has the value that transformers gives it.
    ours = {key: theirs[key] for key in required} | {
        "num_key_value_heads": theirs.get("num_key_value_heads") or heads,
        "head_dim": theirs.get("head_dim") or theirs["hidden_size"] // heads,
        "max_position_embeddings": longest,
        "rms_norm_eps": theirs.get("rms_norm_eps", 1e-6),
        "tie_word_embeddings": theirs.get("tie_word_embeddings", False),
        "dtype": "float32" if _stated_dtype(theirs) == "float32" else "bfloat16",
        **_rope(theirs, path),
        **family.ours,
    }
    return from_dict(LlamaConfig, ours, str(path))


def _check_counts(path: Path, theirs: dict[str, Any], keys: Sequence[str]) -> None:
    """Raises UserError for a value that is no count, unless it is null or not there."""
    for key in keys:
        value = theirs.get(key)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise UserError(f"{path}: {key} is {value!r}; it must be a whole number above 0")


def _stated_dtype(theirs: dict[str, Any]) -> str:
    return theirs.get("dtype") or theirs.get("torch_dtype") or "float32"


def _rope(theirs: dict[str, Any], path: Path) -> dict[str, Any]:
    """Before transformers 5: rope_theta beside rope_scaling; since then: both in rope_parameters."""
    stated = theirs.get("rope_scaling") or theirs.get("rope_parameters") or {}  # transformers 5 takes the first too
    if not isinstance(stated, dict) or any(isinstance(value, dict) for value in stated.values()):
        raise UserError(f"{path}: rope_parameters are {stated!r}; only one rotation for all layers can be run here")
    theta = stated.get("rope_theta", theirs.get("rope_theta", 10000.0))
    kind = stated.get("rope_type", stated.get("type", "default"))
    if kind not in ROPE:
        raise UserError(f"{path}: rope_type is {kind!r}; supported are {', '.join(ROPE)}")
    if missing := [key for key in ROPE[kind] if key not in stated]:
        raise UserError(f"{path}: rope_type {kind!r} needs {', '.join(missing)}")
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    return {"rope_theta": theta, "rope_scaling": {"rope_type": kind, **{key: stated[key] for key in ROPE[kind]}}}


def hf_config(config: LlamaConfig, dtype: str, ids: dict[str, int]) -> dict[str, Any]:
    """`config.json` of a model with weights of this `dtype`; `ids` are its tokenizer's `bos_token_id` and the like.

    RoPE's keys are those from before transformers 5, which later versions read as well.
    """
    scaling = config.rope_scaling
    kind = next((kind for kind, family in FAMILIES.items() if family.ours == _family_fields(config)), None)
    if kind is None:
        raise UserError("no model of transformers has both qkv_bias and qk_norm; this one cannot be exported")
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta")
    names += ("tie_word_embeddings",)
    return {
        "architectures": [FAMILIES[kind].architecture],
        "model_type": kind,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        **{name: getattr(config, name) for name in names},
        "rope_scaling": scaling
        and {"rope_type": scaling.rope_type, **{key: getattr(scaling, key) for key in ROPE[scaling.rope_type]}},
        "torch_dtype": dtype,
        **ids,
    }


def _family_fields(config: LlamaConfig) -> dict[str, bool]:
    return {name: True for name in ("qkv_bias", "qk_norm") if getattr(config, name)}


def read_meta(directory: Path, vocab_size: int, dtype: str) -> LlamaConfig:
    """Meta's `params.json`; `vocab_size` and `dtype` are those of the tensors, which it leaves to them.

    The width of the feed-forward layers is not stated but computed: 2/3 of 4 dim, times a multiplier, rounded up to a
    multiple. Nor is the context, unless by max_seq_len: it is then LLaMA-2's. Raises UserError for what cannot be run.
    """
    path = directory / "params.json"
    theirs = {key: value for key, value in read_json(path).items() if value is not None}
    if missing := [key for key in ("dim", "n_layers", "n_heads") if not isinstance(theirs.get(key), int)]:
        raise UserError(f"{path}: {', '.join(missing)} missing; is it the params.json of a LLaMA?")
    if unknown := [key for key, value in theirs.items() if key not in META_KEYS and value]:
        raise UserError(f"{path}: {unknown[0]} is {theirs[unknown[0]]!r}, which is not supported")
    if theirs.get("use_scaled_rope"):
        raise UserError(
            f"{path}: use_scaled_rope does not say by how much; convert the Hugging Face release, which does"
        )
    stated = theirs.get("vocab_size", -1)
    if stated not in (-1, vocab_size):
        raise UserError(f"{path}: vocab_size is {stated}, but output.weight has {vocab_size} rows; is a file missing?")
    _check_counts(path, theirs, ("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "max_seq_len"))
    multiplier = theirs.get("ffn_dim_multiplier", 1)
    if not isinstance(multiplier, (int, float)) or multiplier <= 0:
        raise UserError(f"{path}: ffn_dim_multiplier is {multiplier!r}; it must be a number above 0")
    width = int(multiplier * int(2 * (4 * theirs["dim"]) / 3))
    multiple = theirs.get("multiple_of", 256)
    ours = {
        "vocab_size": vocab_size,
        "hidden_size": theirs["dim"],
        "intermediate_size": -(-width // multiple) * multiple,
        "num_hidden_layers": theirs["n_layers"],
        "num_attention_heads": theirs["n_heads"],
        "num_key_value_heads": theirs.get("n_kv_heads", theirs["n_heads"]),
        "head_dim": theirs["dim"] // theirs["n_heads"],
        "max_position_embeddings": theirs.get("max_seq_len", 4096),
        "rms_norm_eps": theirs.get("norm_eps", 1e-5),
        "rope_theta": theirs.get("rope_theta", 10000.0),
        "dtype": dtype,
    }
    return from_dict(LlamaConfig, ours, str(path))


def read_peft(directory: Path, found: set[str]) -> LoraConfig:
    """PEFT's `adapter_config.json`; `found` are the modules whose adapters its file holds.

    Raises UserError for every setting that would need more than adapters of one rank on the kernels of all layers.
    """
    path = directory / "adapter_config.json"
    theirs = read_json(path)

    def refuse(key: str, what: str = f"which adapters of ours do not have; {MERGE}") -> UserError:
        return UserError(f"{path}: {key} is {theirs.get(key)!r}, {what}")

    if theirs.get("peft_type") != "LORA":
        raise refuse("peft_type", "only 'LORA' can be converted")
    if theirs.get("bias", "none") != "none":
        raise refuse("bias")
    if theirs.get("init_lora_weights") not in PEFT_INITIAL:
        raise refuse("init_lora_weights", f"which trains on a base that it has changed; {MERGE}")
    if unknown := [key for key, value in theirs.items() if key not in PEFT_KEYS and value]:
        raise refuse(unknown[0])
    stated = theirs.get("target_modules")
    if isinstance(stated, list):
        found = {str(name).rpartition(".")[2] for name in stated}
    if not found or not found <= set(TARGETS):
        raise refuse("target_modules", f"kernels that can be adapted are {', '.join(TARGETS)}; {MERGE}")
    targets = tuple(name for name in TARGETS if name in found)
    try:
        lora = LoraConfig(theirs.get("r"), theirs.get("lora_alpha"), theirs.get("lora_dropout"), targets)
    except SettingError as error:
        theirs_for = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
        raise UserError(f"{path}: {theirs_for[error.key]} {error.problem}") from None
    scale = math.sqrt(lora.rank) if theirs.get("use_rslora") else 1.0  # arXiv 2312.03732: alpha / √r
    return replace(lora, alpha=float(lora.alpha * scale), dropout=float(lora.dropout))


def peft_config(lora: LoraConfig, base: str, revision: str | None = None) -> dict[str, Any]:
    """`adapter_config.json` of adapters on the model that Hugging Face (at this commit) or a path calls `base`."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": list(lora.targets),
        "bias": "none",
        "inference_mode": True,
    }
