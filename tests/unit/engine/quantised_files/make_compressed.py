"""Writes compressed_tensors.safetensors: small weights as the library compressed-tensors stores and
expands them.

Run it by hand, with the library, which no test needs (`pip install compressed-tensors==0.20.0`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

SHAPE = (24, 64)
CASES: dict[str, dict[str, Any]] = {
    "int4_group": {"num_bits": 4, "strategy": "group", "group_size": 16},
    "int4_zeros": {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
    "int4_channel": {"num_bits": 4, "strategy": "channel"},
    "int3_group": {"num_bits": 3, "strategy": "group", "group_size": 16},
    "int8_packed": {"num_bits": 8, "strategy": "group", "group_size": 32, "symmetric": False},
    "int8": {"num_bits": 8, "strategy": "channel"},
    "int8_zeros": {"num_bits": 8, "strategy": "channel", "symmetric": False},
    "fp8_tensor": {"num_bits": 8, "type": "float", "strategy": "tensor"},
    "fp8_channel": {"num_bits": 8, "type": "float", "strategy": "channel"},
    "fp8_block": {
        "num_bits": 8,
        "type": "float",
        "strategy": "block",
        "block_structure": [16, 24],
    },
    "nvfp4": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
    "mxfp4": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
}
FORMATS = {
    "int8": "int-quantized",
    "int8_zeros": "int-quantized",
    "fp8": "float-quantized",
    "nvfp4": "nvfp4-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
}


def format_of(case: str) -> str:
    return FORMATS.get(case, FORMATS.get(case.split("_")[0], "pack-quantized"))


def main() -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    tensors: dict[str, Tensor] = {}
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).bfloat16()
    for case, fields in CASES.items():
        args = QuantizationArgs(**fields)
        form = format_of(case) if case != "int8_packed" else "pack-quantized"
        state: dict[str, Tensor] = {"weight": weight}
        low, high = _extremes(weight, fields)
        if case == "nvfp4":
            state["weight_global_scale"] = generate_gparam(weight.amin(), weight.amax()).float()
        scale, zero = calculate_qparams(
            low, high, args, global_scale=state.get("weight_global_scale")
        )
        state |= {"weight_scale": scale, "weight_zero_point": zero.to(torch.int8)}
        compressor = BaseCompressor.get_value_from_registry(form)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        stored = compressor.compress(state, scheme)
        expanded = compressor.decompress(stored, scheme)["weight"]
        tensors |= {f"{case}.{name}": each.contiguous() for name, each in stored.items()}
        tensors[f"{case}.expanded"] = expanded.contiguous()
    path = Path(__file__).with_name("compressed_tensors.safetensors")
    save_file(tensors, path, metadata={"cases": json.dumps(CASES)})


def _extremes(weight: Tensor, fields: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Of what has a scale of its own; in the shape of the scales."""
    if fields["strategy"] == "tensor":
        return weight.amin().view(1), weight.amax().view(1)
    if fields["strategy"] == "block":
        rows, columns = fields["block_structure"]
        blocks = [torch.split(band, columns, 1) for band in torch.split(weight, rows, 0)]
        low = torch.stack([torch.stack([each.amin() for each in band]) for band in blocks])
        high = torch.stack([torch.stack([each.amax() for each in band]) for band in blocks])
        return low, high
    runs = weight.view(len(weight), -1, fields.get("group_size", weight.shape[1]))
    return runs.amin(-1), runs.amax(-1)


if __name__ == "__main__":
    main()
