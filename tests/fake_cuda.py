"""A GPU for machines without one: tensors that say "cuda", of torch's FakeTensorMode, which also carry values.

The fake mode computes shapes, dtypes and devices, and refuses an operation between tensors of two devices exactly as a
GPU does. Here each tensor has its value beside it, computed on the CPU by the same operation; so what reads values
(`tolist`, samplers' loops, metrics) runs too, results compare with those of the CPU, and every read is counted.
"""

import copy
import dataclasses
import itertools
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    _DISPATCH_HANDLE_DIRECTLY,
    _DISPATCH_META_HANDLERS,
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._pytree import tree_map

from segresearch.models.conditioning import Cond
from segresearch.models.denoiser import Denoiser, alphas_cumprod
from segresearch.models.preconditioning import Preconditioning
from segresearch.models.unet import UNet, UNetConfig

aten = torch.ops.aten
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CACHES = tuple(f"segresearch.{part}." for part in ("guidance", "models", "analysis", "metrics", "sampling"))
QUERIES = frozenset(_DISPATCH_META_HANDLERS) | frozenset(_DISPATCH_HANDLE_DIRECTLY)
INDEXED, COPIES = (aten.index, aten.index_put, aten.index_put_), (aten._to_copy, aten.copy_, aten.to)
HOST = torch.device("cpu")


def _on_gpu(value: Any) -> bool:
    return isinstance(value, FakeTensor) and value.fake_device.type == "cuda"


def _worth(value: Any) -> Any:
    """What stands for an argument in the computation on the CPU."""
    if isinstance(value, FakeTensor):
        return value.worth
    if isinstance(value, tuple | list):
        return type(value)(map(_worth, value))
    return HOST if isinstance(value, torch.device) else value


def _flat(value: Any) -> list[Any]:
    """What is in nested tuples and lists."""
    return [item for part in value for item in _flat(part)] if isinstance(value, tuple | list) else [value]


class FakeCuda(FakeTensorMode):
    """FakeTensorMode with values. reads: operations that brought a value from the device to the host; sends: back.

    An index on the CPU into a tensor of the device, which torch allows and sends over at each call, is refused as well.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.reads: list[str] = []
        self.sends: list[str] = []
        self.inside = False
        self.valued = True

    def may_turn_const(self, t: Tensor) -> bool:
        return False  # values are kept here for every tensor

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if self.inside or func in QUERIES:  # a part of an operation, or nothing but a question of its shape
            return super().dispatch(func, types, args, kwargs)
        if func not in self.lift_fns:
            args = self._met(args)
        packet = func.overloadpacket
        gpu = any(map(_on_gpu, _flat(args)))
        if gpu and packet in INDEXED and _on_gpu(args[0]):
            if not all(_on_gpu(z) for z in _flat(args[1]) if isinstance(z, Tensor)):
                raise RuntimeError(f"{func}: an index on the cpu into a tensor on the cuda device")
        self.inside = True
        try:
            out = super().dispatch(func, types, args, kwargs)
            dependent = False
        except (DataDependentOutputException, DynamicOutputShapeException):
            dependent = True
        finally:
            self.inside = False
        worth = None
        if self.valued:
            worth = self._computed(func, _worth(args), {key: _worth(value) for key, value in kwargs.items()})
        if dependent:
            if not self.valued:
                raise RuntimeError(f"{func}: a value is read in a block without values")
            if gpu:
                self.reads.append(str(func))
            device = "cuda" if gpu else "cpu"
            return tree_map(lambda z: self.fake(z, device) if isinstance(z, Tensor) else z, worth)
        self._count(packet, args, out, gpu)
        for fake, value in itertools.zip_longest(_flat(out), _flat(worth)):
            if isinstance(fake, FakeTensor):
                fake.worth = value
        return out

    def _met(self, value: Any) -> Any:
        """Real tensors, which lie on the CPU, as tensors of the mode."""
        if isinstance(value, tuple | list):
            return type(value)(map(self._met, value))
        if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
            return value
        self.inside = True
        try:
            fake = self.from_tensor(value)
        finally:
            self.inside = False
        fake.worth = value
        return fake

    def _computed(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        name = func.overloadpacket.__name__
        if "_scaled_dot_product" in name:  # of a GPU; its further outputs are not read
            return F.scaled_dot_product_attention(*args[:3], scale=kwargs.get("scale"))
        if name == "cudnn_batch_norm":
            x, weight, bias, mean, variance, training, momentum, eps = args
            return F.batch_norm(x, mean, variance, weight, bias, training, momentum, eps)
        return func(*args, **kwargs)

    def _count(self, packet: Any, args: Any, out: Any, gpu: bool) -> None:
        if packet is aten._local_scalar_dense and gpu:
            self.reads.append("item")
        if packet in COPIES and isinstance(out, Tensor):
            source = args[1] if packet is aten.copy_ else args[0]
            if _on_gpu(source) and not _on_gpu(out):
                self.reads.append(packet.__name__)
            if _on_gpu(out) and not _on_gpu(source):
                self.sends.append(packet.__name__)

    @contextmanager
    def without_values(self) -> Iterator[None]:
        """Shapes, dtypes and devices alone, for what is too large to be computed; a read raises."""
        self.valued = False
        try:
            yield
        finally:
            self.valued = True

    def fake(self, value: Tensor, device: torch.device | str) -> FakeTensor:
        """A tensor of the mode that says `device` and is worth `value`."""
        with self:
            fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        fake.worth = value
        return fake


MODE = FakeCuda()


def _tolist(tensor: FakeTensor) -> Any:
    if _on_gpu(tensor):
        tensor.fake_mode.reads.append("tolist")
    with unset_fake_temporarily():
        return tensor.worth.tolist()


def _numpy(tensor: FakeTensor, *args: Any, **kwargs: Any) -> Any:
    if _on_gpu(tensor):
        raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")
    with unset_fake_temporarily():
        return tensor.worth.numpy()


def forget() -> None:
    """Empty every cache of the package that may hold a tensor: neither kind of tensor may be met by the other."""
    for name, module in list(sys.modules.items()):
        if name.startswith(CACHES):
            for value in list(vars(module).values()):
                if hasattr(value, "cache_clear") and value.__name__ != "k_diffusion":
                    value.cache_clear()


@contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    """The mode, without gradients, for a `with` block; what was cached in it is forgotten after it.

    It is one mode for all tests, so that networks on the device can serve several of them.
    """
    mode = MODE
    mode.reads, mode.sends = [], []
    forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeTensor, "tolist", _tolist)  # torch's own reads one number at a time
        patch.setattr(FakeTensor, "numpy", _numpy, raising=False)
        patch.setattr(torch.cuda, "get_rng_state", lambda device="cuda": torch.get_rng_state())
        patch.setattr(torch.cuda, "set_rng_state", lambda state, device="cuda": torch.set_rng_state(state))
        patch.setattr(torch.cuda, "default_generators", (torch.default_generator,))
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        try:
            with mode, torch.no_grad():
                yield mode
        finally:
            forget()


on_the_cpu = unset_fake_temporarily  # a `with` block in which tensors are real ones again


def moved(module: nn.Module) -> Any:
    """A copy of a module of real weights, whose parameters and buffers lie on the device."""
    with on_the_cpu():
        copied = copy.deepcopy(module)
    for part in copied.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = nn.Parameter(weight.detach().to("cuda"), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.to("cuda")
    return copied


def sent(value: Any) -> Any:
    """Tensors, and those in mappings, sequences and dataclasses, on the device; all else as it is."""
    if isinstance(value, Tensor):
        return value.to("cuda")
    if isinstance(value, Cond):
        return value.to("cuda")
    if isinstance(value, Mapping):
        return {key: sent(item) for key, item in value.items()}
    if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
        return type(value)(map(sent, value))
    return value


def tensors_of(value: Any) -> list[Tensor]:
    """Every tensor in a result: sequences, mappings, dataclasses, attributes that are computed left out."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [z for item in value.values() for z in tensors_of(item)]
    if isinstance(value, tuple | list):
        return [z for item in value for z in tensors_of(item)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [z for f in dataclasses.fields(value) for z in tensors_of(getattr(value, f.name))]
    return []


def check_same(found: Any, expected: Any, device: str = "cuda", rtol: float = 2e-5, atol: float = 2e-5) -> None:
    """Every tensor of `found` lies on `device` and is worth its counterpart in `expected`, a result on the CPU."""
    ours, theirs = tensors_of(found), tensors_of(expected)
    assert len(ours) == len(theirs) > 0, (len(ours), len(theirs))
    with on_the_cpu():
        for a, b in zip(ours, theirs):
            assert isinstance(a, FakeTensor) and a.device.type == device, (a, device)
            assert a.dtype == b.dtype and a.shape == b.shape, (a, b.dtype, b.shape)
            torch.testing.assert_close(a.worth, b, rtol=rtol, atol=atol, equal_nan=True)


CONFIG = UNetConfig(
    down_block_types=("DownBlock2D",),
    up_block_types=("UpBlock2D",),
    block_out_channels=(16,),
    layers_per_block=(1,),
    transformer_layers_per_block=(2,),
    heads=(2,),
    cross_attention_dim=12,
    addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=6 * 4 + 8,
    norm_num_groups=4,
)  # two sites, in the mid block
LEVELS = dataclasses.replace(  # with a downsampling and an upsampling
    CONFIG, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, block_out_channels=(8, 16),
    layers_per_block=(1, 1), transformer_layers_per_block=(1, 2), heads=(1, 2),
)  # fmt: skip


@lru_cache
def real_denoiser(
    dtype: torch.dtype = torch.float32, prediction: str | Preconditioning = "epsilon", config: UNetConfig = CONFIG
) -> Denoiser:
    """A tiny random network on the CPU, its attention far from uniform."""
    with on_the_cpu(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet(config).eval().requires_grad_(False)
        for name, weight in unet.named_parameters():
            if "attn1.to_q" in name or "attn1.to_k" in name:
                weight *= 3
        return Denoiser(unet.to(dtype), alphas_cumprod({}), prediction)


@lru_cache
def fake_denoiser(
    dtype: torch.dtype = torch.float32, prediction: str | Preconditioning = "epsilon", config: UNetConfig = CONFIG
) -> Denoiser:
    """The same network on the device, its schedule too."""
    return Denoiser(moved(real_denoiser(dtype, prediction, config).unet), alphas_cumprod({}).to("cuda"), prediction)


def real_inputs(rows: int = 2, dtype: torch.dtype = torch.float32, sigma: float = 3.0) -> tuple[Tensor, Tensor, dict]:
    """x (fp32), sigma and two conditionings in `dtype`, on the CPU."""
    with on_the_cpu():
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        ids = torch.tensor([[48.0, 64.0, 0.0, 0.0, 48.0, 64.0]]).repeat(rows, 1)
        conds = {name: Cond(draw(rows, 5, 12), draw(rows, 8), ids).to(dtype=dtype) for name in ("cond", "uncond")}
        return draw(rows, 4, 6, 8) * sigma, torch.full((rows,), sigma), conds
