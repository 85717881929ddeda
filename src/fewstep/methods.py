"""What the one training loop asks of a method, and the method of a block of params.yaml."""

from copy import deepcopy
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fewstep.averages import SNAPSHOTS
from fewstep.batch import Batch
from fewstep.consistency import Consistency
from fewstep.denoiser import Denoiser
from fewstep.denoising import Denoising
from fewstep.dmd2 import Critic, Discriminator, Dmd2
from fewstep.files import sha256_file
from fewstep.meter import Logged
from fewstep.models import build_denoiser, load_model, read_safetensors
from fewstep.params import (
    ConsistencySettings,
    DenoisingSettings,
    Dmd2Settings,
    Params,
    Student,
)
from fewstep.performance import accelerate


class Method(Protocol):
    """What the loop asks of a method.

    Attributes:
        student: the network that is averaged and saved.
        trained: the networks that have an optimiser, by the name of their phase.
        kept: the networks that are saved beside the student, by name.
    """

    student: Denoiser
    trained: dict[str, nn.Module]
    kept: dict[str, nn.Module]

    def phases(self, iteration: int) -> tuple[str, ...]:
        """Which networks are updated in this iteration, in order."""
        ...

    def loss(self, phase: str, batch: Batch) -> tuple[Tensor, dict[str, Logged]]:
        """Mean loss of a micro-batch for that phase, and what to log."""
        ...

    def forwards(self, encoder: float) -> float:
        """What an image costs on average, in forward passes; the encoder is a share of one."""
        ...


class Objective(nn.Module):
    """The loss of one phase as a module, so that its network's gradients can be averaged."""

    def __init__(self, method: Method, phase: str) -> None:
        super().__init__()
        self.network, self.phase = method.trained[phase], phase
        self.loss = method.loss

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Logged]]:
        return self.loss(self.phase, batch)


def student_block(name: str, params: Params) -> Student:
    """The params of what is trained under that name.

    Raises:
        ValueError: no such student, or a teacher that is downloaded.
    """
    block = params.teacher.train if name == "teacher" else params.students.get(name)
    if block is None:
        known = ", ".join(params.students)
        raise ValueError(f"need a student of {known}, got {name!r} (params.yaml: students)")
    return block


def build_method(
    name: str, params: Params, device: torch.device
) -> tuple[Method, dict[str, float]]:
    """The method with its networks on the device, and the learning rate of each phase.

    Raises:
        ValueError: weights that do not fit the params, a bottleneck without a discriminator, or a
            critic to continue that is not the one of init_from.
    """
    block = student_block(name, params)
    s = block.settings
    own_drop = s.label_dropout if isinstance(s, Dmd2Settings) and not s.shared_label_drop else 0.0
    student = build_denoiser(params, block.dropout, own_drop, block.dropout_resolutions)
    how = params.performance
    if isinstance(s, DenoisingSettings):
        return Denoising(accelerate(student.to(device), how), s), {"student": block.lr}
    teacher, _ = load_model("teacher", params)
    start, about = load_model(block.init_from or "teacher", params)
    student.load_state_dict(start.state_dict())
    teacher = accelerate(teacher.to(device), how, frozen=True)
    student = accelerate(student.to(device), how)
    if isinstance(s, ConsistencySettings):
        return Consistency(student, teacher, s, params.noise), {"student": block.lr}
    fake_score = accelerate(deepcopy(student), how)
    fake_score.load_state_dict(teacher.state_dict())
    teacher.model.label_dropout = own_drop
    critic = Critic(fake_score, _discriminator(name, s, params))
    if s.continue_critic:
        _continue_critic(critic, block.init_from or "", about)
    critic.to(device)
    rates = {"student": block.lr, "critic": s.fake_score_lr}
    return Dmd2(student, teacher, critic, s, params.noise), rates


def _continue_critic(critic: Critic, model: str, about: dict[str, Any]) -> None:
    """Give a critic the weights that were saved beside a student, whose JSON is `about`.

    A discriminator that was not saved stays as it is; one that is not wanted is left.
    """
    file = SNAPSHOTS / model / "critic.safetensors"
    weights, _ = read_safetensors(file)
    if sha256_file(file) != about.get("critic_sha256"):
        raise ValueError(
            f"need the critic that was saved with {model}, got another one in {file}; train "
            f"{model} again (params.yaml: students.{model}.settings.save_critic)"
        )
    own = critic.state_dict()
    critic.load_state_dict({name: weights.get(name, before) for name, before in own.items()})


def _discriminator(name: str, s: Dmd2Settings, params: Params) -> Discriminator | None:
    if not s.gan_critic_weight:
        return None
    network = params.network
    bottleneck = params.data.resolution >> (len(network.channel_mult) - 1)
    if bottleneck != 8:
        raise ValueError(
            f"need an 8x8 bottleneck for the discriminator, got {bottleneck}x{bottleneck} (params."
            f"yaml: network.channel_mult; or students.{name}.settings.gan_*_weight: 0.0)"
        )
    return Discriminator(network.model_channels * network.channel_mult[-1], s.gan_groups)
