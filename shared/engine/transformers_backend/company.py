"""Whether the bits of a token may depend on its company, as far as transformers' own code computes:
all but attention, linear layers and the activations that are ours (model.py).

Loops over single numbers compute the rest that fills no vector by other instructions. So each
operation is written down in a step, and must be one whose instructions give equal bits, or of which
that is measured; a model with any other is not of the class `exact`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_MOVES = frozenset(
    """
    _reshape_alias _to_copy _unsafe_view alias as_strided cat clone constant_pad_nd copy_ detach
    embedding empty empty_like expand fill_ full full_like index index_select lift_fresh masked_fill
    new_empty new_full new_ones new_zeros ones ones_like permute repeat reshape scalar_tensor select
    slice split split_with_sizes squeeze stack t transpose unbind unsqueeze view where zeros
    zeros_like
    """.split()
)
_ROUNDED_ONCE = frozenset(
    """
    abs add add_ clamp clamp_max clamp_min div div_ maximum minimum mul mul_ neg reciprocal relu
    rsub sqrt square sub sub_
    """.split()
)
"""By the standard of floats, whatever the instruction."""
_ROWS = frozenset(("mean", "sum", "native_layer_norm"))
"""Of a row, by itself, if they go over its last dimension."""
_MEASURED: dict[str, Callable[[Tensor], Tensor]] = {
    name: getattr(torch, name) for name in ("cos", "erf", "exp", "log1p", "rsqrt", "sin", "tanh")
}
_SPANS = [(first, first + n) for first in (0, 1, 7) for n in (1, 5, 16, 31, 100, 1000, 99_997)]


class Recorder(TorchDispatchMode):
    """Writes down what is computed while it is entered and `is_ours` is false."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_ours = False
        self.unsure: set[str] = set()
        """Operations of which it is not known."""
        self._measured: dict[str, bool] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with self:
            # In inference mode what is made of other operations comes as one.
            found = func.decompose(*args, **(kwargs or {}))
        if found is not NotImplemented:
            return found
        found = func(*args, **(kwargs or {}))
        if not self.is_ours:
            name = func.overloadpacket.__name__
            if not self._is_sure(name, args, kwargs or {}, found):
                self.unsure.add(name)
        return found

    def _is_sure(self, name: str, args: Sequence[Any], kwargs: dict[str, Any], found: Any) -> bool:
        outputs = found if isinstance(found, list | tuple) else [found]
        floats = [each for each in outputs if isinstance(each, Tensor) and each.is_floating_point()]
        if name in _MOVES or not floats:
            return True
        if name in _ROUNDED_ONCE:
            # A sum with a factor is rounded twice, or once.
            return "alpha" not in kwargs and (len(args) < 3 or name.startswith("clamp"))
        if name in _ROWS:
            return name == "native_layer_norm" or _goes_over_last(args)
        if name == "pow":
            return args[1] in (2, 3)
        if name in ("bmm", "mm"):
            # One product, and no sum.
            return bool(args[0].shape[-1] == 1)
        if name in _MEASURED:
            if name not in self._measured:
                self._measured[name] = _is_stable(_MEASURED[name])
            return self._measured[name]
        return False


@contextmanager
def recording(ours: Sequence[torch.nn.Module]) -> Iterator[Recorder]:
    """Of all that is computed meanwhile but in the modules `ours`."""
    recorder = Recorder()

    def begin(*_: Any) -> None:
        recorder.is_ours = True

    def end(*_: Any) -> None:
        recorder.is_ours = False

    handles: list[Any] = [module.register_forward_pre_hook(begin) for module in ours]
    handles += [module.register_forward_hook(end) for module in ours]
    try:
        with recorder:
            yield recorder
    finally:
        for handle in handles:
            handle.remove()


def _goes_over_last(args: Sequence[Any]) -> bool:
    if len(args) < 2 or not isinstance(args[1], list | tuple) or len(args[1]) != 1:
        return False
    x = args[0]
    return args[1][0] in (-1, x.dim() - 1) and x.stride(-1) == 1


def _is_stable(function: Callable[[Tensor], Tensor]) -> bool:
    """Whether a number has the same bits wherever it stands."""
    values = torch.randn(100_103, generator=torch.Generator().manual_seed(0)).abs() * 5
    whole = function(values)
    return all(torch.equal(function(values[a:b].clone()), whole[a:b]) for a, b in _SPANS)
