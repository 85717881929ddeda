"""Vision transformer (Dosovitskiy et al. 2021, arXiv:2010.11929), as in DINOv2 and CLIP.

Attribute names are the state-dict keys of DINOv2's files.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD = 64  # channels of an attention head in all published sizes of both


class Attention(nn.Module):
    """Self-attention with heads of 64 channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, tokens, width) -> (B, tokens, width)."""
        qkv = self.qkv(x).unflatten(2, (3, -1, HEAD)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers, four times as wide in between."""

    def __init__(self, width: int, quick_gelu: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.quick_gelu = quick_gelu

    def forward(self, x: Tensor) -> Tensor:
        """(B, tokens, width) -> (B, tokens, width)."""
        h = self.fc1(x)
        # 1.702: CLIP was trained with this approximation of GELU, and its features need it
        return self.fc2(h * torch.sigmoid(1.702 * h) if self.quick_gelu else F.gelu(h))


class LayerScale(nn.Module):
    """A learned factor per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, tokens, width) -> (B, tokens, width)."""
        return x * self.gamma


class Block(nn.Module):
    """Attention, then MLP, each after a norm and with a skip connection."""

    def __init__(self, width: int, eps: float, quick_gelu: bool, scaled: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps)
        self.attn = Attention(width)
        self.ls1 = LayerScale(width) if scaled else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps)
        self.mlp = Mlp(width, quick_gelu)
        self.ls2 = LayerScale(width) if scaled else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, tokens, width) -> (B, tokens, width)."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class Patches(nn.Module):
    """Squares of pixels to tokens."""

    def __init__(self, width: int, patch: int, bias: bool) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, stride=patch, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, H / patch * W / patch, width)."""
        return self.proj(x).flatten(2).transpose(1, 2)


class Vit(nn.Module):
    """Patches and a class token through `depth` blocks; returns the class token.

    Args:
        width, depth, patch: channels, blocks, pixels of a patch's side.
        side: patches along a side of the image.
        projection: outputs of a final linear layer; 0: none.
        clip: CLIP's norm before the blocks, activation and epsilon, and no layer scale.
    """

    def __init__(
        self, width: int, depth: int, patch: int, side: int, projection: int = 0, clip: bool = False
    ) -> None:
        super().__init__()
        eps = 1e-5 if clip else 1e-6
        self.resolution, self.dim = side * patch, projection or width
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, side * side + 1, width))
        self.patch_embed = Patches(width, patch, bias=not clip)
        self.norm_pre = nn.LayerNorm(width, eps) if clip else nn.Identity()
        self.blocks = nn.ModuleList(Block(width, eps, clip, not clip) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps)
        self.head = nn.Linear(width, projection, bias=False) if projection else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, resolution, resolution), normalised -> (B, width or projection)."""
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), self.patch_embed(x)], 1)
        x = self.norm_pre(tokens + self.pos_embed)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))


def vit_of(state: dict[str, Tensor], clip: bool = False) -> Vit:
    """The network whose size fits a state dict, with these weights.

    Raises:
        KeyError, IndexError, ValueError, RuntimeError: other names or shapes.
    """
    width, patch = state["patch_embed.proj.weight"].shape[0::3]
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    side = round((state["pos_embed"].shape[1] - 1) ** 0.5)
    projection = len(state["head.weight"]) if clip else 0
    vit = Vit(width, depth, patch, side, projection, clip)
    vit.load_state_dict(state)
    return vit


class Embedding(nn.Module):
    """uint8 images, (B, 1 or 3, H, W), to features, (B, dim), at the resolution of the network."""

    def __init__(self, vit: Vit, mean: Tensor, std: Tensor, antialias: bool) -> None:
        super().__init__()
        self.vit, self.mean, self.std, self.antialias = vit, mean, std, antialias

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = normalise(images, self.vit.resolution, self.mean, self.std, self.antialias)
        return {"features": self.vit(x)}


def normalise(images: Tensor, size: int, mean: Tensor, std: Tensor, antialias: bool) -> Tensor:
    """uint8 (B, 1 or 3, H, W) -> float32 (B, 3, size, size), bicubic, less `mean`, over `std`."""
    x = F.interpolate(images.float(), (size, size), mode="bicubic", antialias=antialias) / 255
    return (x - mean.to(x).reshape(3, 1, 1)) / std.to(x).reshape(3, 1, 1)
