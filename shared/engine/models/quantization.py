"""What config.json says of quantised weights: what is served, and what is refused by name.

What a file says of quantising activations is taken where a GPU computes so (8 bits, around zero);
else they stay in their own dtype, which is nearer to the model that was quantised. Which tensors
hold a layer, and how its numbers are made of them, is in shared/engine/quantised/.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from baton.shared.engine.quantised.scheme import (
    EVERY_LINEAR,
    Inputs,
    Quantization,
    Rule,
    Scheme,
    compiles,
)
from baton.shared.model_files.fields import Fields, shown

_BESIDE = "hf_quant_config.json"
"""Where ModelOpt says it, if not in config.json."""
_MXFP4 = "mxfp4"
_NVFP4_GROUP = 16
_MIXED = "mixed-precision"
_SCALED = ("naive-quantized", "int-quantized", "float-quantized")
_FORMATS = (
    *_SCALED,
    *("pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized", _MIXED),
)
_STRATEGIES = ("tensor", "channel", "group", "tensor_group", "block")
_OF_RUNS, _OF_ROWS = ("group", "tensor_group"), ("tensor", "channel")
_ORDERS_OF_GROUPS, _ORDERS_OF_MAKING = ("group", "dynamic"), ("weight", "static")
_NUMBERS = ("int8", "float8", "int4", "float4", "int2", "int3", "int5", "int6", "int7")
_TOLD_BY_THE_TENSORS = """
    global_compression_ratio observer observer_kwargs quantization_status scale_dtype
    version zp_dtype
""".split()
_HOW_IT_WAS_MADE = """
    act_group_aware damp_percent dataset desc_act exllama_config fuse_max_seq_len hyb_act
    is_marlin_format kv_cache_quant_algo kv_cache_scheme kv_cache_config lm_head meta
    model_file_base_name model_name_or_path modules_in_block_to_quantize modules_to_not_convert
    producer quantizer static_groups true_sequential use_cuda_fp16 use_exllama max_input_length
    cache_block_outputs model_seqlen block_name_to_quantize module_name_preceding_first_block
    batch_size pad_token_id disable_exllama tokenizer backend ignore ignored_layers exclude_modules
    do_fuse modules_to_fuse exllama_version scale_fmt fmt dequantize modules_to_convert
    quant_method config_groups
""".split()


def read_quantization(fields: Fields, *, experts_may_be_mxfp4: bool = False) -> Quantization | None:
    """How linear layers may be stored; None: as plain numbers.

    Of a file that says MXFP4 they are plain, and which experts are not is told by the tensors.

    Raises:
        ModelError: weights are quantised in a way that is not served.
    """
    outer = fields.object("quantization_config")
    if outer is None:
        beside = fields.path.with_name(_BESIDE)
        return _modelopt(Fields.of_file(beside)) if beside.exists() else None
    method = outer.string("quant_method")
    if experts_may_be_mxfp4 and method == _MXFP4:
        outer.get("modules_to_not_convert")
        return None
    read = _METHODS.get(method)
    if read is None:
        known = ", ".join(_METHODS)
        raise outer.error("quant_method", f"must be one of {known}, not {shown(method)}")
    return read(outer)


def _compressed_tensors(outer: Fields) -> Quantization:
    form = outer.get("format")
    outer.only("format", *_FORMATS)
    outer.only("sparsity_config", {})
    outer.only("transform_config", {})
    outer.get("kv_cache_scheme")
    rules = []
    groups = outer.objects("config_groups").values()
    # Of several groups older files name one format for all, which need not be each one's.
    of_all = form if len(groups) == 1 and form != _MIXED else None
    for group in groups:
        group.only("format", *_FORMATS)
        of_group = of_all if group.get("format") in (None, _MIXED) else group.string("format")
        inputs = _read_inputs(group.get("input_activations"))
        group.only("output_activations", because="what layers give is not quantised here")
        weights = group.object("weights")
        if weights is None:
            continue
        targets = _targets(group, "targets", EVERY_LINEAR)
        scheme = replace(_read_weights(weights), inputs=inputs, form=of_group)
        rules.append(Rule(targets, scheme))
        _skip(_TOLD_BY_THE_TENSORS, group, weights)
    ignored = _targets(outer, "ignore", ())
    _skip(_TOLD_BY_THE_TENSORS, outer)
    if not rules:
        raise outer.error("config_groups", f"names no weights, though format is {shown(form)}")
    return Quantization(method="compressed-tensors", rules=tuple(rules), ignored=ignored)


def _read_weights(weights: Fields) -> Scheme:
    bits, kind = weights.integer("num_bits"), weights.string("type", default="int")
    if f"{kind}{bits}" not in _NUMBERS:
        known = ", ".join(_NUMBERS)
        raise weights.error("num_bits", f"{kind}{bits} is none of {known}")
    weights.only("dynamic", False)
    weights.only("strategy", *_STRATEGIES)
    has_blocks = weights.get("block_structure") is not None
    strategy = None if weights.get("strategy") is None else weights.string("strategy")
    if strategy == "block" and not has_blocks:
        raise weights.error("block_structure", "missing, though strategy is block")
    if strategy in _OF_RUNS and weights.get("group_size") in (None, -1):
        said = shown(weights.get("group_size"))
        raise weights.error("group_size", f"{said}, though strategy is {strategy}")
    if strategy in _OF_ROWS and weights.get("group_size") not in (None, -1):
        said = shown(weights.get("group_size"))
        raise weights.error("group_size", f"{said}, though strategy is {strategy}")
    return Scheme(
        num_bits=bits,
        kind="int" if kind == "int" else "float",
        group_size=_read_group_size(weights, "group_size"),
        block=_read_block(weights, "block_structure") if has_blocks else None,
        is_symmetric=weights.boolean("symmetric", default=True),
        order=_read_order(weights),
        strategy=strategy,
    )


def _read_order(weights: Fields) -> str | None:
    """As compressed-tensors 0.12.2 understands it: `static`, or `weight`, was an order of making
    the weight, and is none of what it made."""
    said = weights.get("actorder")
    name = said.lower() if isinstance(said, str) else said
    if name is True or name in _ORDERS_OF_GROUPS:
        return f"actorder {shown(said)}"
    if name not in (None, False, *_ORDERS_OF_MAKING):
        known = ", ".join((*_ORDERS_OF_GROUPS, *_ORDERS_OF_MAKING))
        raise weights.error("actorder", f"{shown(said)} is none of {known}")
    return None


def _read_inputs(said: object) -> Inputs | None:
    """What is computed so, or None. One scale for all of a step's tokens becomes one for each:
    neighbours must not change an answer."""
    if not isinstance(said, dict) or said.get("num_bits") != 8 or said.get("symmetric") is False:
        return None
    kind, strategy, size = (said.get(name) for name in ("type", "strategy", "group_size"))
    is_static = said.get("dynamic") is False
    if is_static and strategy not in (None, "tensor"):
        return None
    is_grouped = strategy in ("group", "tensor_group", "block")
    if is_grouped and not isinstance(size, int):
        return None
    return Inputs(
        kind="float" if kind == "float" else "int",
        group_size=size if is_grouped else None,
        is_static=is_static,
    )


def _fp8(outer: Fields) -> Quantization:
    """Blocks, or one scale for all of a weight."""
    outer.only("fmt", "e4m3")
    outer.only("activation_scheme", "dynamic", "static")
    outer.only("scale_fmt", "float", "ue8m0")
    outer.only("expert_dtype", "fp8")
    block = None
    if outer.get("weight_block_size") is not None:
        block = _read_block(outer, "weight_block_size")
    inputs = Inputs(
        kind="float",
        group_size=None if block is None else block[1],
        is_static=outer.get("activation_scheme") == "static",
    )
    _skip(_HOW_IT_WAS_MADE, outer)
    return _for_all("fp8", Scheme(num_bits=8, kind="float", block=block, inputs=inputs))


def _modelopt(outer: Fields) -> Quantization:
    inner = outer.object("quantization") or outer
    inner.only("quant_algo", "FP8", "NVFP4")
    is_of_8_bits = inner.string("quant_algo") == "FP8"
    inner.only("group_size", *(() if is_of_8_bits else (_NVFP4_GROUP,)))
    _skip(_HOW_IT_WAS_MADE, outer, inner)
    if is_of_8_bits:
        inputs = Inputs(kind="float", is_static=True)
        scheme = Scheme(num_bits=8, kind="float", inputs=inputs, strategy="tensor")
        return _for_all("modelopt", scheme)
    return _for_all("modelopt", Scheme(num_bits=4, kind="float", group_size=_NVFP4_GROUP))


def _gptq(outer: Fields) -> Quantization:
    bits = outer.integer("bits")
    if bits not in (2, 3, 4, 8):
        raise outer.error("bits", f"must be 2, 3, 4 or 8, not {bits}")
    outer.only("checkpoint_format", "gptq", "gptq_v2")
    outer.only("format", "gptq", "gptq_v2")
    outer.only("pack_dtype", "int32")
    outer.only("dynamic", {}, because="one setting for all modules is read")
    stored = outer.get("checkpoint_format") or outer.get("format")
    if outer.get("format") not in (None, stored):
        other = shown(outer.get("format"))
        raise outer.error("format", f"{other}, though checkpoint_format is {shown(stored)}")
    scheme = Scheme(
        num_bits=bits,
        group_size=_read_group_size(outer, "group_size"),
        is_symmetric=outer.boolean("sym", default=True),
        order="desc_act true" if outer.boolean("desc_act", default=False) else None,
    )
    _skip(_HOW_IT_WAS_MADE, outer)
    return Quantization(
        method="gptq",
        rules=(Rule(EVERY_LINEAR, scheme),),
        zeros_are_less_one=stored != "gptq_v2",
    )


def _awq(outer: Fields) -> Quantization:
    bits = "bits" if outer.has("bits") else "w_bit"
    outer.only(bits, 4)
    outer.integer(bits)
    outer.only("version", "gemm", "GEMM", because="others pack the words in another way")
    outer.only("zero_point", True)
    size = "group_size" if outer.has("group_size") else "q_group_size"
    scheme = Scheme(num_bits=4, group_size=_read_group_size(outer, size), is_symmetric=False)
    _skip(_HOW_IT_WAS_MADE, outer)
    return _for_all("awq", scheme)


_METHODS: dict[str, Callable[[Fields], Quantization]] = {
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
    "modelopt": _modelopt,
    "gptq": _gptq,
    "awq": _awq,
}


def _for_all(method: str, scheme: Scheme) -> Quantization:
    return Quantization(method=method, rules=(Rule(EVERY_LINEAR, scheme),))


def _read_group_size(fields: Fields, name: str) -> int | None:
    """Null: not told; −1: all of a row."""
    if fields.get(name) == -1:
        return -1
    return None if fields.get(name) is None else fields.integer(name)


def _read_block(fields: Fields, name: str) -> tuple[int, int]:
    sizes = fields.integers(name) or []
    if len(sizes) != 2 or min(sizes) < 1:
        raise fields.error(name, f"must be two positive numbers, not {shown(sizes)}")
    return sizes[0], sizes[1]


def _targets(fields: Fields, name: str, default: tuple[str, ...]) -> tuple[str, ...]:
    targets = fields.strings(name)
    for each in targets or ():
        if not compiles(each):
            raise fields.error(name, f"{shown(each)} is no regular expression")
    return default if targets is None else tuple(targets)


def _skip(names: list[str], *places: Fields) -> None:
    for fields in places:
        for name in names:
            fields.get(name)
