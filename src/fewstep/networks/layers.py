"""The layers that U-Nets of EDM are made of.

Parameters have the names of EDM's checkpoints, so that those load as they are.
"""

import math
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.networks.protocol import Block


@dataclass(frozen=True)
class Init:
    """Initial values: a distribution of unit gain, times a gain for weights and one for biases.

    A gain of 0 draws nevertheless, as EDM's code does, whose initial weights these are.
    """

    kind: str
    gain: float = 1.0
    bias_gain: float = 0.0

    def __call__(self, shape: tuple[int, ...], fan_in: int, fan_out: int) -> Tensor:
        return self.gain * self.draw(shape, fan_in, fan_out)

    def bias(self, shape: tuple[int, ...], fan_in: int, fan_out: int) -> Tensor:
        return self.bias_gain * self.draw(shape, fan_in, fan_out)

    def draw(self, shape: tuple[int, ...], fan_in: int, fan_out: int) -> Tensor:
        if self.kind == "kaiming_normal":
            return torch.randn(shape) / math.sqrt(fan_in)
        width = 3 / fan_in if self.kind == "kaiming_uniform" else 6 / (fan_in + fan_out)
        return math.sqrt(width) * (torch.rand(shape) * 2 - 1)


class Linear(nn.Module):
    """Affine map whose float32 weights are cast to the type of the activations."""

    def __init__(self, n_in: int, n_out: int, init: Init, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(init((n_out, n_in), n_in, n_out))
        self.bias = nn.Parameter(init.bias((n_out,), n_in, n_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Conv2d(nn.Module):
    """Resampling by 2 (`up`, `down`), then a kernel x kernel convolution; kernel 0 has none.

    Args:
        taps: the filter of the resampling, along each axis; (1, 1) averages and repeats pixels.
    """

    resample_filter: Tensor | None

    def __init__(
        self,
        n_in: int,
        n_out: int,
        kernel: int,
        init: Init,
        up: bool = False,
        down: bool = False,
        taps: tuple[int, ...] = (1, 1),
    ) -> None:
        super().__init__()
        self.up, self.down, self.n_out = up, down, n_out
        fans = (n_in * kernel**2, n_out * kernel**2)
        shape = (n_out, n_in, kernel, kernel)
        self.weight = nn.Parameter(init(shape, *fans)) if kernel else None
        self.bias = nn.Parameter(init.bias((n_out,), *fans)) if kernel else None
        # EDM's state dicts hold the filter, so ours must
        self.register_buffer("resample_filter", filter_of(taps) if up or down else None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.resample(x)
        return x if self.weight is None else self.convolve(x, padding=self.weight.shape[-1] // 2)

    def resample(self, x: Tensor) -> Tensor:
        """x with twice as many pixels along each axis (`up`), or half as many (`down`)."""
        taps = self.resample_filter
        if taps is None:
            return x
        if (size := taps.shape[-1]) > 2:
            return filtered(x, taps, stride=2, padding=size // 2 - 1, up=self.up)
        # the same as the box filter, but faster
        if self.up:
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return F.avg_pool2d(x, 2)

    def convolve(self, x: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
        """x convolved with the weights, plus the bias."""
        weight, bias = self.cast(x.dtype)
        weight = weight.contiguous(memory_format=memory_format_of(x))
        return F.conv2d(x, weight, bias, stride, padding)

    def cast(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Weight and bias in the type of the activations."""
        assert self.weight is not None and self.bias is not None, "kernel 0 has no weights"
        return self.weight.to(dtype), self.bias.to(dtype)


def filter_of(taps: tuple[int, ...]) -> Tensor:
    """The filter of sum 1 with these taps along both axes, (1, 1, taps, taps)."""
    row = torch.tensor(taps, dtype=torch.float32)
    return (row.outer(row) / row.sum() ** 2)[None, None]


def filtered(
    x: Tensor, taps: Tensor, stride: int = 1, padding: int = 0, up: bool = False
) -> Tensor:
    """Each channel of x (B, C, H, W), convolved with the same taps (1, 1, k, k).

    Args:
        up: put stride - 1 zeros between pixels before, and keep the mean.
    """
    # CPUs take 80 times as long for a strided gradient in half precision as in float32
    exact = x.float() if x.device.type == "cpu" and x.dtype.itemsize < 4 else x
    channels = x.shape[1]
    weight = (taps * stride**2 if up else taps).to(exact.dtype).expand(channels, -1, -1, -1)
    convolve = F.conv_transpose2d if up else F.conv2d
    return convolve(exact, weight, stride=stride, padding=padding, groups=channels).to(x.dtype)


def memory_format_of(x: Tensor) -> torch.memory_format:
    """How the images of x (B, C, H, W) lie in memory: pixel by pixel or channel by channel."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def laid_out_as(x: Tensor, y: Tensor) -> Tensor:
    """y (B, C, H, W) in the memory format of x.

    On GPUs PyTorch's GroupNorm returns contiguous tensors whatever it gets, and all that follows
    would stay contiguous: convolutions in half precision then reorder their input and their output,
    where this reorders once. What torch.compile joins needs no such copy.
    """
    return y.contiguous(memory_format=memory_format_of(x))


class GroupNorm(nn.Module):
    """Group normalisation with at least 4 channels a group and at most 32 groups.

    Attributes:
        fused: on a CPU, with channels last, one kernel computes it and what follows.
    """

    fused = True

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.groups, self.eps = min(32, channels // 4), eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, modulation: Tensor | None = None, silu: bool = False) -> Tensor:
        """Of x (B, C, H, W); then times 1 + scale, plus shift, (B, 2 C) together; then SiLU."""
        if self.fused and x.device.type == "cpu" and not torch.compiler.is_compiling():
            kernels = cpu_kernels()
            if kernels is not None and kernels.suits(x):
                given = (self.weight, self.bias, self.groups, self.eps, modulation, silu)
                return kernels.norm_silu(x, *given)
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        y = F.group_norm(x, self.groups, weight, bias, self.eps)
        if x.is_cuda:
            y = laid_out_as(x, y)
        if modulation is not None:
            scale, shift = modulation[:, :, None, None].to(x.dtype).chunk(2, dim=1)
            y = torch.addcmul(shift, y, scale + 1)
        return F.silu(y) if silu else y


@cache
def cpu_kernels() -> ModuleType | None:
    """Our own norms for CPUs, or None without numba: PyTorch's kernels then do the same, slower.

    Imported by the first norm that a CPU computes, because it loads a compiler, which takes 0.3 s.
    """
    try:
        from fewstep.networks import cpu_norm
    except ImportError:
        return None
    return cpu_norm


class PositionalEmbedding(nn.Module):
    """cos and sin of c_noise at geometrically spaced frequencies, shape (B, channels)."""

    def __init__(self, channels: int, endpoint: bool) -> None:
        super().__init__()
        self.count, self.endpoint = channels // 2, endpoint

    def forward(self, c_noise: Tensor) -> Tensor:
        steps = torch.arange(self.count, dtype=torch.float32, device=c_noise.device)
        freqs = (1 / 10000) ** (steps / (self.count - int(self.endpoint)))
        angle = c_noise.outer(freqs.to(c_noise.dtype))
        return torch.cat([angle.cos(), angle.sin()], dim=1)


@dataclass(frozen=True)
class Style:
    """What differs between the residual blocks of one network and of another."""

    init: Init
    attention_init: Init  # of the map to q, k and v
    zero: Init  # of the layers that end a residual branch, which begins at or near 0
    eps: float  # of the norms
    adaptive_scale: bool  # the embedding scales and shifts; else it only shifts
    channels_per_head: int | None  # of attention; None for a single head
    resample_proj: bool  # where a block resamples, its skip path has a 1x1 convolution
    skip_scale: float  # factor of a residual sum
    taps: tuple[int, ...] = (1, 1)  # of the filter that resamples, along each axis

    def scaled(self, x: Tensor) -> Tensor:
        """A residual sum times the style's factor."""
        return x if self.skip_scale == 1 else x * self.skip_scale

    def heads(self, channels: int) -> int:
        """How many heads attend over that many channels."""
        return heads_of(channels, self.channels_per_head)


def heads_of(channels: int, channels_per_head: int | None) -> int:
    """How many heads attend over that many channels; at least one, and one for None.

    Raises:
        ValueError: the heads would not be of equal width.
    """
    heads = max(channels // channels_per_head, 1) if channels_per_head else 1
    if channels % heads:
        raise ValueError(
            f"need channels divisible by their heads where attention is, got {channels} and "
            f"{heads} (params.yaml: network.model_channels, network.channel_mult)"
        )
    return heads


class UNetBlock(Block):
    """Residual block, conditioned on the embedding between its convolutions; then attention.

    Attributes:
        takes_skip: its input is joined by an encoder output (the decoder's blocks).
    """

    def __init__(
        self,
        resolution: int,
        n_in: int,
        n_out: int,
        n_emb: int,
        style: Style,
        dropout: float = 0.0,
        attention: bool = False,
        up: bool = False,
        down: bool = False,
        takes_skip: bool = False,
    ) -> None:
        super().__init__(resolution)
        self.attention, self.takes_skip = fused_attention, takes_skip
        self.style, self.dropout, self.n_out = style, dropout, n_out
        self.norm0 = GroupNorm(n_in, style.eps)
        self.conv0 = Conv2d(n_in, n_out, 3, style.init, up, down, style.taps)
        self.affine = Linear(n_emb, 2 * n_out if style.adaptive_scale else n_out, style.init)
        self.norm1 = GroupNorm(n_out, style.eps)
        self.conv1 = Conv2d(n_out, n_out, 3, style.zero)
        self.skip = None
        if n_in != n_out or up or down:
            kernel = 1 if n_in != n_out or style.resample_proj else 0
            self.skip = Conv2d(n_in, n_out, kernel, style.init, up, down, style.taps)
        self.heads = style.heads(n_out) if attention else 0
        if attention:
            self.norm2 = GroupNorm(n_out, style.eps)
            self.qkv = Conv2d(n_out, 3 * n_out, 1, style.attention_init)
            self.proj = Conv2d(n_out, n_out, 1, style.zero)

    def compute(self, x: Tensor, emb: Tensor) -> Tensor:
        h, params = self.conv0(self.norm0(x, silu=True)), self.affine(emb)
        if self.style.adaptive_scale:
            h = self.norm1(h, params, silu=True)
        else:
            h = self.norm1(h + params[:, :, None, None].to(x.dtype), silu=True)
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        x = self.style.scaled(h.add_(x if self.skip is None else self.skip(x)))
        return self.style.scaled(x + self.attend(x)) if self.heads else x

    def attend(self, x: Tensor) -> Tensor:
        """Self-attention over pixels; EDM interleaves q, k and v inside each head's channels."""
        n, c, height, width = x.shape
        tokens = self.norm2(x).flatten(2).transpose(1, 2)  # no copy where channels lie last
        # sort the weights by q, k and v, so that nobody has to sort the larger activations
        order = (self.heads, c // self.heads, 3)
        weight, bias = self.qkv.cast(x.dtype)
        weight = weight.reshape(*order, c).permute(2, 0, 1, 3).reshape(-1, c)
        bias = bias.reshape(order).permute(2, 0, 1).flatten()
        qkv = F.linear(tokens, weight, bias).reshape(n, height * width, 3, *order[:2])
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        a = self.attention(q, k, v).transpose(1, 2).reshape(n, height * width, c)
        weight, bias = self.proj.cast(x.dtype)
        return F.linear(a, weight.flatten(1), bias).transpose(1, 2).reshape(x.shape)


def fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(channels)) v, whose weights are never all in memory."""
    if q.device.type == "cpu" and q.dtype.itemsize < 4:
        # on CPUs the gradient's kernel takes 4 times as long in bfloat16 as in float32
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v)


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(channels)) v, with the weights (B, heads, H W, H W) in float32."""
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return logits.to(torch.float32).softmax(dim=-1).to(v.dtype) @ v
