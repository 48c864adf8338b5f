"""A device that isn't there, `elsewhere`: its tensors are computed on the CPU, and operations that mix devices fail.

As on a GPU, an operation takes tensors of one device, numpy reads none of it, and an index may lie on the CPU. So what
forgets to move a tensor is found without a GPU. Importing this sets it up for the whole process.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "elsewhere"
# Operations that may take tensors of two devices: copies, and an index of the CPU.
MIXING = frozenset({"_to_copy", "copy_", "index", "index_put_", "_index_put_impl_"})


class Elsewhere(torch.Tensor):
    """A tensor that says that it lies on the device; `held` has its values."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls: type, held: torch.Tensor) -> Elsewhere:
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device=torch.device(NAME, 0),
        )  # fmt: skip
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(function, args, kwargs or {})

    @property
    def data(self) -> torch.Tensor:
        return Elsewhere(self.held.detach())

    @data.setter
    def data(self, other: torch.Tensor) -> None:
        # Of the same size, as all that is asked of it here.
        self.held = other.held

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"can't convert a tensor of the device {NAME} to numpy; use .cpu() first")

    __array__ = numpy


class Computing(TorchDispatchMode):
    """Within, also what makes tensors from nothing can make them on the device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(function, args, kwargs or {})


def computed(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What an operation gives, computed on the CPU; RuntimeError where a GPU would refuse its devices."""
    name = function._overloadpacket.__name__
    tensors = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, Elsewhere)]
    here = [tensor for tensor in tensors if not isinstance(tensor, Elsewhere) and tensor.dim()]
    into_here = name in MIXING and name not in ("_to_copy", "copy_") and not isinstance(args[0], Elsewhere)
    if there and here and (name not in MIXING or into_here):
        raise RuntimeError(
            f"{function} mixes devices: {[(type(tensor).__name__, tuple(tensor.shape)) for tensor in tensors]}"
        )
    wanted = kwargs.get("device")
    if wanted is not None and torch.device(wanted).type == NAME:
        kwargs = kwargs | {"device": torch.device("cpu")}
    result = function(*tree_map(_held, args), **tree_map(_held, kwargs))
    if name == "copy_":
        return args[0]
    if name == "_local_scalar_dense" or not (there if wanted is None else torch.device(wanted).type == NAME):
        return result
    # An operation in place gives the tensor that it was given.
    by_id = {id(tensor.held): tensor for tensor in there}

    def there_too(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return by_id[id(value)] if id(value) in by_id else Elsewhere(value)

    return tree_map(there_too, result)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, Elsewhere) else value


def _tensor(data: Any, *, device: Any = None, **kwargs: Any) -> torch.Tensor:
    made = MADE(data, **kwargs)
    return made if device is None else made.to(device)


def _as_tensor(data: Any, dtype: Any = None, device: Any = None) -> torch.Tensor:
    made = data if isinstance(data, torch.Tensor) else MADE_AS(data)
    return made.to(device=device or made.device, dtype=dtype or made.dtype)


def _autocast(device: str, *args: Any, **kwargs: Any) -> Any:
    return contextlib.nullcontext() if device == NAME else AUTOCAST(device, *args, **kwargs)


_setup_privateuseone_for_python_backend(NAME)
# A module's parameters are replaced as it is moved, since their class changes.
torch.__future__.set_overwrite_module_params_on_conversion(True)
# These reach no operation on their way, know no such device, and take no views of its tensors.
MADE, MADE_AS, AUTOCAST = torch.tensor, torch.as_tensor, torch.autocast
torch.tensor, torch.as_tensor, torch.autocast = _tensor, _as_tensor, _autocast
torch.inference_mode = torch.no_grad
