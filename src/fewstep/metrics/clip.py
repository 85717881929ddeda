"""CLIP's image tower (Radford et al. 2021, arXiv:2103.00020), the network of CMMD."""

import re
from pathlib import Path

import torch
from torch import Tensor

from fewstep.metrics.vit import Embedding, vit_of
from fewstep.metrics.weights import load_network

URL = "https://huggingface.co/openai/clip-vit-large-patch14-336 (pytorch_model.bin)"
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])

_KEYS = (
    (r"vision_model\.embeddings\.class_embedding$", "cls_token"),
    (r"vision_model\.embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"vision_model\.embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"vision_model\.pre_layrnorm\.", "norm_pre."),  # Hugging Face's spelling
    (r"vision_model\.post_layernorm\.", "norm."),
    (r"vision_model\.encoder\.layers\.(\d+)\.layer_norm([12])\.", r"blocks.\1.norm\2."),
    (r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.out_proj\.", r"blocks.\1.attn.proj."),
    (r"vision_model\.encoder\.layers\.(\d+)\.(self_attn\.[qkv]_|mlp\.fc[12])", r"blocks.\1.\2"),
    (r"visual_projection\.", "head."),
)


def load_clip(path: Path, sha256: str) -> Embedding:
    """The image tower in one of Hugging Face's files, .bin or .safetensors.

    Raises:
        ValueError: as `load_network`.
    """

    def build(state: dict[str, Tensor]) -> Embedding:
        return Embedding(vit_of(_image_tower(state), clip=True), MEAN, STD, antialias=False)

    return load_network(path, sha256, URL, build)


def _image_tower(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under our names, without the text tower and buffers."""
    tower: dict[str, Tensor] = {}
    for key, value in state.items():
        for pattern, name in _KEYS:
            if re.match(pattern, key):
                tower[re.sub(pattern, name, key)] = value.float()
    # Hugging Face splits queries, keys and values; one product for all three is faster.
    for key in [k for k in tower if "self_attn.q_proj" in k]:
        parts = [key.replace("q_proj", f"{which}_proj") for which in "qkv"]
        if all(part in tower for part in parts):
            joined = torch.cat([tower.pop(part) for part in parts])
            tower[key.replace("self_attn.q_proj", "attn.qkv")] = joined
    for key in ("cls_token", "pos_embed"):
        if key in tower:
            tower[key] = tower[key].reshape(1, -1, tower[key].shape[-1])
    return tower
