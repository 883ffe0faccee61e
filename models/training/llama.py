"""The demo model as a training module: a llama whose parameters carry Hugging Face names."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class LlamaShape:
    """The numbers of config.json that the arithmetic depends on."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 576
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 32
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0


DRAFT_SHAPE = LlamaShape(
    hidden_size=128,
    intermediate_size=640,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
"""A quarter of the demo's parameters, and a third of its layers: a step of so small a model takes
as long as it has layers."""


class RmsNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., size]; the mean of squares is taken in float32."""
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * scale).to(x.dtype) * self.weight


def rope_tables(shape: LlamaShape) -> tuple[Tensor, Tensor]:
    """cos and sin, each [max_position_embeddings, head_dim], both halves of a head alike."""
    exponents = torch.arange(0, shape.head_dim, 2).float() / shape.head_dim
    positions = torch.arange(shape.max_position_embeddings).float()
    angles = torch.outer(positions, 1.0 / shape.rope_theta**exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [batch, heads, tokens, head_dim]; cos, sin: [tokens, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * cos + turned * sin).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        hidden, kv_size = shape.hidden_size, shape.num_key_value_heads * shape.head_dim
        q_size = shape.num_attention_heads * shape.head_dim
        self.q_proj = nn.Linear(hidden, q_size, bias=False)
        self.k_proj = nn.Linear(hidden, kv_size, bias=False)
        self.v_proj = nn.Linear(hidden, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [batch, tokens, hidden]; cos, sin: [tokens, head_dim]."""
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        projected: Tensor = self.o_proj(out.transpose(1, 2).flatten(-2))
        return projected


class Mlp(nn.Module):
    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, tokens, hidden]."""
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    def __init__(self, shape: LlamaShape, dropout: float) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RmsNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = Mlp(shape)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [batch, tokens, hidden]; cos, sin: [tokens, head_dim]."""
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos, sin))
        x = x + self.dropout(self.mlp(self.post_attention_layernorm(x)))
        return x


class Backbone(nn.Module):
    def __init__(self, shape: LlamaShape, dropout: float) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape, dropout) for _ in range(shape.num_hidden_layers))
        self.norm = RmsNorm(shape.hidden_size, shape.rms_norm_eps)


class DemoLlama(nn.Module):
    """Embedding and output share their weights; dropout exists in training only."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: LlamaShape, dropout: float = 0.0) -> None:
        super().__init__()
        self.model = Backbone(shape, dropout)
        self.dropout = nn.Dropout(dropout)
        cos, sin = rope_tables(shape)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        # Projections that write to the residual stream start smaller, the deeper the model.
        residual_std = 0.02 / (2 * shape.num_hidden_layers) ** 0.5
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=residual_std if into_residual else 0.02)

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids: [batch, tokens] int64 -> logits [batch, tokens, vocab]."""
        num_tokens = token_ids.shape[1]
        cos, sin = self.cos[:num_tokens], self.sin[:num_tokens]
        x = self.dropout(self.model.embed_tokens(token_ids))
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return functional.linear(self.model.norm(x), self.model.embed_tokens.weight)


def save_weights(model: DemoLlama, path: Path) -> None:
    """bfloat16 safetensors under Hugging Face names."""
    weights = {k: v.detach().to("cpu", torch.bfloat16) for k, v in model.state_dict().items()}
    save_file(weights, path, metadata={"format": "pt"})


def load_model(directory: Path, *, device: str = "cpu") -> DemoLlama:
    """Reads config.json and model.safetensors of `directory` into a float32 module."""
    config = json.loads((directory / "config.json").read_text())
    shape = LlamaShape(**{key: config[key] for key in asdict(LlamaShape())})
    model = DemoLlama(shape)
    model.load_state_dict(load_file(directory / "model.safetensors"))
    return model.to(device).eval()


def hf_config(shape: LlamaShape, *, bos_token_id: int, eos_token_ids: list[int]) -> dict[str, Any]:
    """The content of config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_ids,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "mlp_bias": False,
        "model_type": "llama",
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        **asdict(shape),
    }
