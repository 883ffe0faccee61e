"""What config.json says of quantised weights: what is served, and what is refused by name.

Which tensors hold a layer, and how its numbers are made of them, is in shared/engine/linear.py.
"""

from __future__ import annotations

from baton.shared.model_files.fields import Fields

_METHOD = "compressed-tensors"
_MXFP4 = "mxfp4"
_FORMATS = ("naive-quantized", "int-quantized", "float-quantized")
_STRATEGIES = ("tensor", "channel", "group")
_TOLD_BY_THE_TENSORS = """
    block_structure global_compression_ratio group_size ignore observer observer_kwargs
    quantization_status scale_dtype targets version zp_dtype
""".split()


def read_quantization(fields: Fields, *, experts_may_be_mxfp4: bool = False) -> bool:
    """Whether linear layers may come as 8-bit numbers with scales.

    Of a file that says MXFP4 they may not, and which experts do is told by the tensors.

    Raises:
        ModelError: weights, activations or caches are quantised in another way.
    """
    outer = fields.object("quantization_config")
    if outer is None:
        return False
    if experts_may_be_mxfp4 and outer.get("quant_method") == _MXFP4:
        outer.get("modules_to_not_convert")
        return False
    outer.only("quant_method", _METHOD)
    outer.string("quant_method")
    outer.only("format", *_FORMATS)
    outer.only("kv_cache_scheme")
    outer.only("sparsity_config", {})
    outer.only("transform_config", {})
    for group in outer.objects("config_groups").values():
        group.only("format", *_FORMATS)
        group.only("input_activations", because="activations are not quantised here")
        group.only("output_activations", because="activations are not quantised here")
        weights = group.object("weights")
        if weights is None:
            continue
        weights.only("num_bits", 8)
        weights.only("type", "int", "float")
        weights.only("symmetric", True)
        weights.only("dynamic", False)
        weights.only("actorder")
        weights.only("strategy", *_STRATEGIES)
        _skip(group, weights)
    _skip(outer)
    return True


def _skip(*places: Fields) -> None:
    for fields in places:
        for name in _TOLD_BY_THE_TENSORS:
            fields.get(name)
