"""The interface between methods and the training loop, and the networks that methods ask for."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fewstep import methods
from fewstep.data.batch import Batch
from fewstep.files import sha256_file
from fewstep.logs import Logged
from fewstep.networks.compute import accelerate
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.registry import build_denoiser
from fewstep.networks.weights import load_model, read_safetensors
from fewstep.params import Params, Student
from fewstep.paths import SNAPSHOTS
from fewstep.theory.noise import Schedule


class Method:
    """A method with its networks. By default, one network is trained alone.

    Attributes:
        student: the network that is averaged and saved.
        trained: the networks that have an optimiser, by the name of their phase.
        kept: networks to save beside the student, by name.
        frozen: networks that are used but not trained.
        rates, betas: of the optimisers of phases that do not use the block's `lr` and `betas`.
        main_loss: the logged value that curves and the progress line show.
        other_images: how many further, unrelated orders of the data batches need images from.
        encoders: encoder-only passes whose activations are held along with those of a whole pass;
            for estimating memory.
    """

    main_loss: ClassVar[str] = "loss"
    other_images = 0
    encoders = 0

    def __init__(self, student: Denoiser, teacher: Denoiser | None = None) -> None:
        self.student = student
        self.trained: dict[str, nn.Module] = {"student": student}
        self.kept: dict[str, nn.Module] = {}
        self.frozen: dict[str, Denoiser] = {} if teacher is None else {"teacher": teacher}
        self.rates: dict[str, float] = {}
        self.betas: dict[str, tuple[float, float]] = {}

    def phases(self, iteration: int, kimg: float) -> tuple[str, ...]:
        """The networks to update in this iteration, at that time, in this order."""
        return ("student",)

    def rate_factor(self, kimg: float) -> float:
        """A factor of all learning rates at that time, beside the block's schedule."""
        return 1.0

    def after_update(self, phase: str) -> None:
        """Whatever follows the optimiser's step of a phase."""

    def prepare(self, batch: Batch) -> Any:  # noqa: ANN401
        """What the phases share for a micro-batch, as a type of the method; computed once."""
        return None

    def loss(
        self,
        phase: str,
        batch: Batch,
        prepared: Any,  # noqa: ANN401
    ) -> tuple[Tensor, dict[str, Logged]]:
        """The micro-batch's mean loss in that phase, and values to log."""
        raise NotImplementedError

    def forwards(self, encoder: float) -> float:
        """Average cost of an image in forward passes of the network; a backward pass counts as two.

        Args:
            encoder: cost of the encoder alone, as a share of a forward pass.
        """
        raise NotImplementedError

    def warnings(self, kimg: float) -> Iterator[tuple[str, str]]:
        """Problems of a training of that length: the key in the settings to edit, and a text."""
        return iter(())


class Networks:
    """Makes the networks that a method asks for.

    On the device `meta` they have shapes but no weights, and no file is read; `fewstep plan` needs
    no more.

    Args:
        block: the student or teacher to train.
    """

    def __init__(self, block: Student, params: Params, device: torch.device) -> None:
        self.block, self.params, self.device = block, params, device
        self.about: dict[str, Any] = {}

    def student(self, label_dropout: float = 0.0, uncertainty: bool = False) -> Denoiser:
        """The network to train, with the weights of `init_from` if given, else random ones.

        Args:
            uncertainty: the method's loss uses `log_variance`. Otherwise that output, where a
                network has one, is frozen: ranks would wait for its gradients for ever.
        """
        block = self.block
        student = self._build(block.dropout, label_dropout, block.dropout_resolutions)
        if block.init_from is not None and self.device.type != "meta":
            start, self.about = load_model(block.init_from, self.params)
            student.load_state_dict(start.state_dict())
        if student.model.logvar is not None:
            student.model.logvar.requires_grad_(uncertainty)
        return accelerate(student.to(self.device), self.params.performance)

    def teacher(self) -> Denoiser:
        """The frozen teacher, in eval mode."""
        if self.device.type == "meta":
            return self._build().eval().requires_grad_(False)
        teacher, _ = load_model("teacher", self.params)
        return accelerate(teacher.to(self.device), self.params.performance, frozen=True)

    def like(self, student: Denoiser, weights: Denoiser) -> Denoiser:
        """A further network to train, built like the student, with a copy of other weights."""
        network = accelerate(deepcopy(student), self.params.performance)
        network.load_state_dict(weights.state_dict())
        return network

    def kept(self, name: str) -> dict[str, Tensor]:
        """The weights of a network that the training of `init_from` saved beside its student.

        Raises:
            ValueError: the file is missing, or was not saved with that student.
        """
        model = self.block.init_from or "teacher"
        file = SNAPSHOTS / model / f"{name}.safetensors"
        weights, _ = read_safetensors(file)
        if sha256_file(file) != self.about.get(f"{name}_sha256"):
            raise ValueError(
                f"need the {name} that was saved with {model}, got another one in {file}; train "
                f"{model} again (params.yaml: students.{model}.settings.save_{name})"
            )
        return weights

    def _build(self, *settings: Any) -> Denoiser:  # noqa: ANN401
        with torch.device("meta" if self.device.type == "meta" else "cpu"):
            return build_denoiser(self.params, *settings)


class Objective(nn.Module):
    """The loss of one phase as a module.

    DistributedDataParallel averages gradients only for parameters of the module whose forward it
    calls; `network` is therefore the trained one alone.
    """

    def __init__(self, method: Method, phase: str) -> None:
        super().__init__()
        self.network, self.phase = method.trained[phase], phase
        self.loss = method.loss

    def forward(self, batch: Batch, prepared: Any) -> tuple[Tensor, dict[str, Logged]]:  # noqa: ANN401
        return self.loss(self.phase, batch, prepared)


def student_block(name: str, params: Params) -> Student:
    """The params of the training with that name.

    Raises:
        ValueError: there is no such student, or the teacher is downloaded.
    """
    block = params.teacher.train if name == "teacher" else params.students.get(name)
    if block is None:
        known = ", ".join(params.students)
        raise ValueError(f"need a student of {known}, got {name!r} (params.yaml: students)")
    return block


def build_method(block: Student, params: Params, device: torch.device) -> Method:
    """The method that a block names, with its networks on the device.

    Raises:
        ValueError: weights or a network do not fit the params.
    """
    networks = Networks(block, params, device)
    schedule = Schedule.of(params.noise)
    return methods.find(block.method).build(networks, block.settings, schedule)
