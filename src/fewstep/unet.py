"""The networks F(x; c_noise, labels): ADM (Dhariwal & Nichol 2021) and DDPM++ (Song et al. 2021).

Parameters are named as in EDM's checkpoints, which therefore load as they are.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Linear(nn.Module):
    """Affine map whose float32 weights are cast to the type of the activations."""

    def __init__(self, n_in: int, n_out: int, init: "Init", bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(init((n_out, n_in), n_in, n_out))
        self.bias = nn.Parameter(init.bias((n_out,), n_in, n_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Conv2d(nn.Module):
    """Box resampling by 2 (`up`, `down`), then a kernel x kernel convolution; kernel 0 has none."""

    def __init__(
        self,
        n_in: int,
        n_out: int,
        kernel: int,
        init: "Init",
        up: bool = False,
        down: bool = False,
    ) -> None:
        super().__init__()
        self.up, self.down = up, down
        fans = (n_in * kernel**2, n_out * kernel**2)
        shape = (n_out, n_in, kernel, kernel)
        self.weight = nn.Parameter(init(shape, *fans)) if kernel else None
        self.bias = nn.Parameter(init.bias((n_out,), *fans)) if kernel else None
        # published state dicts hold the box filter; avg_pool2d and nearest upsampling apply it
        box = torch.full((1, 1, 2, 2), 0.25) if up or down else None
        self.register_buffer("resample_filter", box)

    def forward(self, x: Tensor) -> Tensor:
        if self.up:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        if self.down:
            x = F.avg_pool2d(x, 2)
        if self.weight is None:
            return x
        weight, bias = self.cast(x.dtype)
        weight = weight.contiguous(memory_format=memory_format_of(x))
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)

    def cast(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Weight and bias in the type of the activations."""
        assert self.weight is not None and self.bias is not None, "kernel 0 has no weights"
        return self.weight.to(dtype), self.bias.to(dtype)


def memory_format_of(x: Tensor) -> torch.memory_format:
    """How the images of x (B, C, H, W) lie in memory: pixel by pixel or channel by channel."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


class GroupNorm(nn.Module):
    """Group normalisation with at least 4 channels a group and at most 32 groups.

    Attributes:
        fused: on a CPU, with channels last, it is computed as one with what follows.
    """

    fused = True

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups, self.eps = min(32, channels // 4), eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, modulation: Tensor | None = None, silu: bool = False) -> Tensor:
        """Of x (B, C, H, W); then times 1 + scale, plus shift, (B, 2 C) together; then SiLU."""
        if self.fused and x.device.type == "cpu" and not torch.compiler.is_compiling():
            from fewstep import norms  # brings a compiler, which GPUs need not load

            if norms.suits(x):
                given = (self.weight, self.bias, self.groups, self.eps, modulation, silu)
                return norms.norm_silu(x, *given)
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        y = F.group_norm(x, self.groups, weight, bias, self.eps)
        if modulation is not None:
            scale, shift = modulation[:, :, None, None].to(x.dtype).chunk(2, dim=1)
            y = torch.addcmul(shift, y, scale + 1)
        return F.silu(y) if silu else y


class Init:
    """Initial values of weights and biases: a distribution of unit gain, times a gain for each."""

    def __init__(self, kind: str, gain: float = 1.0, bias_gain: float = 0.0) -> None:
        self.kind, self.gain, self.bias_gain = kind, gain, bias_gain

    def __call__(self, shape: tuple[int, ...], fan_in: int, fan_out: int) -> Tensor:
        return self.gain * self.draw(shape, fan_in, fan_out)

    def bias(self, shape: tuple[int, ...], fan_in: int, fan_out: int) -> Tensor:
        return self.bias_gain * self.draw(shape, fan_in, fan_out)

    def draw(self, shape: tuple[int, ...], fan_in: int, fan_out: int) -> Tensor:
        if self.kind == "kaiming_normal":
            return torch.randn(shape) / math.sqrt(fan_in)
        width = 3 / fan_in if self.kind == "kaiming_uniform" else 6 / (fan_in + fan_out)
        return math.sqrt(width) * (torch.rand(shape) * 2 - 1)


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


class UNetBlock(nn.Module):
    """Residual block; the embedding scales and shifts (ADM) or shifts (DDPM++); then attention.

    Attributes:
        attention: of q, k, v, each (B, heads, H W, channels of a head).
        recompute: its activations are not kept for the backward pass, but computed again there.
    """

    attention: Callable[[Tensor, Tensor, Tensor], Tensor]
    recompute = False

    def __init__(
        self,
        n_in: int,
        n_out: int,
        n_emb: int,
        style: "Style",
        dropout: float = 0.0,
        attention: bool = False,
        up: bool = False,
        down: bool = False,
    ) -> None:
        super().__init__()
        self.attention = fused_attention
        self.style, self.dropout, self.n_out = style, dropout, n_out
        self.norm0 = GroupNorm(n_in, style.eps)
        self.conv0 = Conv2d(n_in, n_out, 3, style.init, up, down)
        self.affine = Linear(n_emb, 2 * n_out if style.adaptive_scale else n_out, style.init)
        self.norm1 = GroupNorm(n_out, style.eps)
        self.conv1 = Conv2d(n_out, n_out, 3, style.zero)
        self.skip = None
        if n_in != n_out or up or down:
            kernel = 1 if n_in != n_out or style.resample_proj else 0
            self.skip = Conv2d(n_in, n_out, kernel, style.init, up, down)
        self.heads = 0
        if attention:  # ADM: 64 channels a head
            self.heads = max(n_out // 64, 1) if style.channels_per_head else 1
            if n_out % self.heads:
                raise ValueError(
                    f"need channels divisible by their heads where attention is, got {n_out} and "
                    f"{self.heads} (params.yaml: network.model_channels, network.channel_mult)"
                )
            self.norm2 = GroupNorm(n_out, style.eps)
            self.qkv = Conv2d(n_out, 3 * n_out, 1, style.attention_init)
            self.proj = Conv2d(n_out, n_out, 1, style.zero)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.compute, x, emb, use_reentrant=False)
        return self.compute(x, emb)

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
        """Self-attention over pixels; q, k, v are interleaved inside each head's channels."""
        n, c, height, width = x.shape
        tokens = self.norm2(x).flatten(2).transpose(1, 2)  # no copy where channels lie last
        # the weights, not the activations, are brought into the order of q, k and v
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
    if not _halved_on_cpu(q):
        return F.scaled_dot_product_attention(q, k, v)
    # the kernel of its gradient takes 4 times as long as in float32
    return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)


def _halved_on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype.itemsize < 4


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(channels)) v, with the weights (B, heads, H W, H W) in float32."""
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return logits.to(torch.float32).softmax(dim=-1).to(v.dtype) @ v


class Style:
    """What differs between the blocks of ADM and of DDPM++."""

    def __init__(self, adm: bool) -> None:
        self.adaptive_scale = self.channels_per_head = adm
        self.resample_proj = not adm
        self.eps = 1e-5 if adm else 1e-6
        self.skip_scale = 1.0 if adm else math.sqrt(0.5)
        if adm:
            self.init = self.attention_init = Init("kaiming_uniform", 3**-0.5, 3**-0.5)
            self.zero = Init("kaiming_uniform", 0.0)
        else:
            self.init, self.attention_init = (
                Init("xavier_uniform"),
                Init("xavier_uniform", 0.2**0.5),
            )
            self.zero = Init("xavier_uniform", 1e-5)

    def scaled(self, x: Tensor) -> Tensor:
        """A residual sum times the style's factor."""
        return x if self.skip_scale == 1 else x * self.skip_scale


class UNet(nn.Module):
    """Encoder and decoder over resolutions that halve at each level, with skip connections.

    `forward(x, c_noise, labels)` takes images (B, C, H, W), c_noise (B,) and one-hot labels
    (B, classes), a zero row meaning no label, and returns F of the shape of x. In train mode
    each label row is zeroed with probability `label_dropout`. `dropout` acts in the blocks whose
    output has one of `dropout_resolutions`, None: in all.
    """

    map_augment: Linear | None = None
    layout = torch.channels_last

    def __init__(
        self,
        resolution: int,
        channels: int,
        classes: int,
        model_channels: int,
        channel_mult: tuple[int, ...],
        num_blocks: int,
        attn_resolutions: tuple[int, ...],
        dropout: float = 0.0,
        label_dropout: float = 0.0,
        adm: bool = True,
        augment_dim: int = 0,
        dropout_resolutions: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.adm, self.label_dropout, self.classes = adm, label_dropout, classes
        style = Style(adm)
        n_emb = 4 * model_channels

        self.map_noise = PositionalEmbedding(model_channels, endpoint=not adm)
        self.map_layer0 = Linear(model_channels, n_emb, style.init)
        self.map_layer1 = Linear(n_emb, n_emb, style.init)
        if adm:
            init = Init("kaiming_normal", math.sqrt(classes))
            self.map_label = Linear(classes, n_emb, init, bias=False)
        else:
            self.map_label = Linear(classes, model_channels, style.init)
            if augment_dim:
                self.map_augment = Linear(augment_dim, model_channels, style.init, bias=False)

        def block(
            n_in: int, n_out: int, attn: bool, up: bool = False, down: bool = False
        ) -> UNetBlock:
            drops = dropout_resolutions is None or res in dropout_resolutions
            rate = dropout if drops else 0.0
            return UNetBlock(n_in, n_out, n_emb, style, rate, attn, up, down)

        width = model_channels * channel_mult[0] if adm else model_channels
        self.enc = nn.ModuleDict()
        skips: list[int] = []
        for level, mult in enumerate(channel_mult):
            res = resolution >> level
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = Conv2d(channels, width, 3, style.init)
            else:
                self.enc[f"{res}x{res}_down"] = block(width, width, attn=False, down=True)
            skips.append(width)
            for i in range(num_blocks):
                attn = res in attn_resolutions
                self.enc[f"{res}x{res}_block{i}"] = block(width, model_channels * mult, attn)
                width = model_channels * mult
                skips.append(width)

        self.dec = nn.ModuleDict()
        for level, mult in reversed(list(enumerate(channel_mult))):
            res = resolution >> level
            if level == len(channel_mult) - 1:
                self.dec[f"{res}x{res}_in0"] = block(width, width, attn=True)
                self.dec[f"{res}x{res}_in1"] = block(width, width, attn=False)
            else:
                self.dec[f"{res}x{res}_up"] = block(width, width, attn=False, up=True)
            for i in range(num_blocks + 1):
                attn = res in attn_resolutions and (adm or i == num_blocks)
                n_in, width = width + skips.pop(), model_channels * mult
                self.dec[f"{res}x{res}_block{i}"] = block(n_in, width, attn)
        if adm:
            self.out_norm, self.out_conv = GroupNorm(width), Conv2d(width, channels, 3, style.zero)
        else:
            self.dec[f"{resolution}x{resolution}_aux_norm"] = GroupNorm(width, 1e-6)
            self.dec[f"{resolution}x{resolution}_aux_conv"] = Conv2d(width, channels, 3, style.zero)

    def embed(self, c_noise: Tensor, labels: Tensor) -> Tensor:
        """The conditioning vector of noise level and label, shape (B, emb channels)."""
        if self.training and self.label_dropout:
            keep = torch.rand(len(labels), 1, device=labels.device) >= self.label_dropout
            labels = labels * keep.to(labels.dtype)
        emb = self.map_noise(c_noise)
        if self.adm:
            emb = self.map_layer1(F.silu(self.map_layer0(emb)))
            return F.silu(emb + self.map_label(labels))
        cos, sin = emb.chunk(2, dim=1)
        emb = torch.cat([sin, cos], dim=1) + self.map_label(labels * math.sqrt(self.classes))
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def encode(self, x: Tensor, emb: Tensor) -> list[Tensor]:
        """Outputs of all encoder stages; the last is the bottleneck (B, C', H', W')."""
        outputs = []
        for stage in self.enc.values():
            if isinstance(stage, UNetBlock):
                x = stage(x, emb)
            else:  # the first; one channel would not tell in which layout x is
                x = stage(x).contiguous(memory_format=self.layout)
            outputs.append(x)
        return outputs

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor) -> Tensor:
        emb = self.embed(c_noise, labels)
        skips = self.encode(x, emb)
        x = skips[-1]
        for name, stage in self.dec.items():
            if not isinstance(stage, UNetBlock):
                x = stage(x, silu=True) if name.endswith("norm") else stage(x)
                continue
            if "_block" in name:
                x = torch.cat([x, skips.pop()], dim=1)
            x = stage(x, emb)
        return self.out_conv(self.out_norm(x, silu=True)) if self.adm else x
