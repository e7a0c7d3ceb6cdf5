"""A device that isn't there: tensors of it are computed on the CPU, and refuse to meet others, as those of a GPU do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

NAME = "cuda"
PLACES = {Tensor.__getitem__, Tensor.__setitem__}
"""What takes places in a tensor from the CPU, wherever the tensor is."""
LEAVING = {Tensor.cpu, Tensor.tolist, Tensor.item, Tensor.numpy, Tensor.__float__, Tensor.__int__, Tensor.__bool__}


class There(Tensor):
    """A tensor of the device."""

    @staticmethod
    def __new__(cls: type[There], data: Tensor) -> There:
        return Tensor._make_subclass(cls, data)


def here(value: Any) -> Any:
    """Everything on the CPU."""
    return tree_map(lambda t: t.as_subclass(Tensor) if isinstance(t, There) else t, value)


def there(value: Any) -> Any:
    """Everything on the device."""
    return tree_map(lambda t: There(t) if isinstance(t, Tensor) and not isinstance(t, There) else t, value)


def _is_there(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


class _Mode(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        flat = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        any_there = any(isinstance(t, There) for t in flat)
        if func == Tensor.device.__get__:
            return torch.device(NAME) if any_there else func(*args)
        if func is Tensor.to:
            return self._to(*args, **kwargs)
        if _is_there(kwargs.get("device")):
            return there(func(*here(args), **{**kwargs, "device": "cpu"}))
        if func in LEAVING:
            if func is Tensor.numpy and any_there:
                raise TypeError("numpy: the tensor is on another device")
            return func(*here(args), **here(kwargs))
        first = bool(flat) and isinstance(flat[0], There)
        if func in PLACES:  # places may come from the CPU, what is assigned not
            assigned = args[2:] if func is Tensor.__setitem__ else ()
            met, wanted = [*assigned, *([] if first else flat)], first
        else:
            met, wanted = flat, any_there
        if any(isinstance(t, Tensor) and t.dim() and isinstance(t, There) != wanted for t in met):
            raise RuntimeError(f"{getattr(func, '__name__', func)}: tensors of two devices")
        found = func(*here(args), **here(kwargs))
        return there(found) if (first if func in PLACES else any_there) else found

    @staticmethod
    def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        target = next((a for a in args if isinstance(a, (str, torch.device, Tensor))), kwargs.pop("device", None))
        rest = [a for a in args if not isinstance(a, (str, torch.device, Tensor))]
        at_target = isinstance(tensor, There)
        if isinstance(target, Tensor):
            at_target, rest = isinstance(target, There), [target.dtype, *rest]
        elif target is not None:
            at_target = _is_there(target)
        found = here(tensor)
        for dtype in (*rest, *kwargs.values()):
            found = found.to(dtype) if isinstance(dtype, torch.dtype) else found
        return there(found) if at_target else found


@contextmanager
def other_device() -> Iterator[str]:
    """The name of the device, within which it can be computed on."""
    with _Mode():
        yield NAME
