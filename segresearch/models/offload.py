"""Networks that lie on the CPU and compute on another device, call by call."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.func import functional_call


class _Call(nn.Module):
    """A method of a module as a forward, which is what `functional_call` calls."""

    def __init__(self, module: nn.Module, method: str):
        super().__init__()
        self.module, self.method = module, method

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.module, self.method)(*args, **kwargs)


def on_device(module: nn.Module, device: torch.device | str, method: str | None = None) -> Callable[..., Any]:
    """`module`, or the method of that name, computing on `device` with copies of its weights and buffers.

    The copies are made at each call and freed after it; the module keeps its own, where they are. Tensors among the
    arguments lie on `device` already. A module that lies there is called without copying. While a call runs, the module
    shows the copies (torch.func.functional_call), so one module serves one call at a time.
    """
    call, prefix = (module, "") if method is None else (_Call(module, method), "module.")

    def run(*args: Any, **kwargs: Any) -> Any:
        own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        moved = {prefix + name: tensor.to(device, non_blocking=True) for name, tensor in own.items()}
        return functional_call(call, moved, args, kwargs)

    return run


def pin(module: nn.Module) -> None:
    """Put the weights and buffers of a module that is being loaded into page-locked memory, from which copies to a GPU
    are fast and need not be waited for. Nothing happens where there is no CUDA."""
    if torch.cuda.is_available():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data = tensor.data.pin_memory()
