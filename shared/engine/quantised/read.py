"""In which form a checkpoint holds a module's weight. Each form is a file beside this one."""

from __future__ import annotations

from typing import Protocol

from baton.shared.engine.quantised import awq, fp4, gguf, gptq, packed, scaled
from baton.shared.engine.quantised.form import TensorReader
from baton.shared.engine.quantised.scheme import Quantization, Scheme
from baton.shared.engine.quantised.weight import QuantisedWeight


class QuantisedReader(TensorReader, Protocol):
    @property
    def quantization(self) -> Quantization | None:
        """What config.json says of quantised weights; None: nothing."""


_MARKS = ("weight_packed", "qweight")
"""Of forms that have no tensor called weight."""


def read_quantised(
    module: str, shape: tuple[int, int], reader: QuantisedReader
) -> QuantisedWeight | None:
    """The weight of a whole module; None: it is plain.

    Raises:
        ModelError: config.json says nothing of it, or something else; a tensor is missing, has
            another shape or holds what is no number.
    """
    if gguf.holds(module, reader):
        return gguf.read(f"{module}.weight", shape, reader)
    name = next((each for each in _MARKS if reader.header(f"{module}.{each}") is not None), None)
    if name is None:
        if not scaled.holds(module, reader) and not fp4.holds(module, reader):
            return None
        name = "weight"
    scheme = _scheme(module, name, reader)
    if scaled.holds(module, reader):
        return scaled.read(module, shape, scheme, reader)
    if packed.holds(module, reader):
        return packed.read(module, shape, scheme, reader)
    if fp4.holds(module, reader):
        return fp4.read(module, shape, scheme, reader)
    quantization = reader.quantization
    assert quantization is not None
    if quantization.method == "awq":
        return awq.read(module, shape, scheme, reader)
    return gptq.read(
        module,
        shape,
        scheme,
        reader,
        zeros_are_less_one=quantization.zeros_are_less_one,
    )


_METHODS = {
    "weight": ("compressed-tensors", "fp8", "modelopt"),
    "weight_packed": ("compressed-tensors",),
    "qweight": ("gptq", "awq"),
}
"""Whose tensors have which name."""
_DTYPES = {
    "naive-quantized": ("I8", "F8_E4M3"),
    "int-quantized": ("I8",),
    "float-quantized": ("F8_E4M3",),
    "pack-quantized": ("I32",),
    "nvfp4-pack-quantized": ("U8",),
    "mxfp4-pack-quantized": ("U8",),
}
"""Of weights, by format."""


def _scheme(module: str, suffix: str, reader: QuantisedReader) -> Scheme:
    name = f"{module}.{suffix}"
    header, quantization = reader.header(name), reader.quantization
    assert header is not None
    if quantization is None:
        reason = f"dtype {header.dtype}, but config.json has no quantization_config"
        raise reader.error(name, reason)
    if quantization.method not in _METHODS[suffix]:
        reason = f"is not of quant_method {quantization.method}, which config.json says"
        raise reader.error(name, reason)
    scheme = quantization.scheme(module)
    if scheme is None:
        reason = f"dtype {header.dtype}, but config.json's quantization_config leaves it out"
        raise reader.error(name, reason)
    if scheme.form is not None and header.dtype not in _DTYPES[scheme.form]:
        fitting = " or ".join(_DTYPES[scheme.form])
        reason = f"dtype {header.dtype}, where format {scheme.form} of config.json has {fitting}"
        raise reader.error(name, reason)
    return scheme
