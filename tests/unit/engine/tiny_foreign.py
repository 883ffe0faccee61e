"""Random tiny models of types that Baton has no file for; they run through transformers."""

from __future__ import annotations

from typing import Any

Fields = dict[str, Any]

_WINDOW = 21
_MIXED = ["sliding_attention", "full_attention"]

TINY_FOREIGN: dict[str, dict[str, Fields]] = {
    "olmo2": {"grouped": {}},
    "olmo3": {
        "windows between": {
            "sliding_window": _WINDOW,
            "layer_types": _MIXED,
        }
    },
    "exaone4": {
        "full layers without rope": {
            "sliding_window": _WINDOW,
            "layer_types": _MIXED,
        }
    },
    "cohere2": {
        "windows, parallel halves": {
            "sliding_window": _WINDOW,
            "layer_types": _MIXED,
            "logit_scale": 1.0,
        }
    },
    "starcoder2": {"all windowed": {"sliding_window": _WINDOW}},
    "stablelm": {"part of a head turns": {"use_qkv_bias": True}},
    "gpt_neox": {"fused projections": {"rotary_pct": 0.5}},
    "gemma": {"one head for all": {"num_key_value_heads": 1, "head_dim": 24}},
}
