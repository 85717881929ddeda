"""An ONNX file with the whole sampler.

The network is traced once and stored once, as an ONNX function that the graph of the sampler calls
at each step. Tracing all calls would take minutes and store the network's graph for each step.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from fewstep.export import needed
from fewstep.export.order import Order
from fewstep.export.program import Program, inputs, names_of, portable, traced_quietly
from fewstep.files import atomic_path
from fewstep.model import Model
from fewstep.networks.denoiser import Denoiser
from fewstep.params import Row

SUFFIX = ".onnx"
DOMAIN, CALL = "fewstep", "Denoise"  # the function's name in the file


@torch.library.custom_op("fewstep::denoise", mutates_args=())
def _denoise(x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
    """A network call that the trace of the sampler does not look into."""
    return torch.empty_like(x, dtype=torch.float32)


@_denoise.register_fake
def _(x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.float32)


@torch.no_grad()
def write(order: Order, path: Path) -> None:
    """Write latents and labels -> uint8 (B, H, W, C) as an ONNX model for any batch.

    What it is and where it comes from are the file's metadata.

    Raises:
        ValueError: onnx or onnxscript is missing.
    """
    onnx, student, row = needed("onnx"), order.student, order.row
    needed("onnxscript")
    names = names_of(row)
    sampler = _exported(_sampler(student, row), inputs(student, row, range(2)), names, "images")
    network = _exported(_Call(portable(student)), _example(student, row), _INPUTS, "D_x")
    model = _join(sampler, network)
    for key, value in order.notes().items():
        model.metadata_props.add(key=key, value=value)
    onnx.checker.check_model(model)
    with atomic_path(path) as temporary:
        onnx.save_model(model, str(temporary))


_INPUTS = ("x", "sigma", "rows")


class _Call(nn.Module):
    """One network call."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        return self.denoiser(x, sigma, labels)


def _sampler(student: Model, row: Row) -> Program:
    return Program(torch.ops.fewstep.denoise, row, student.grid, student.classes)


def _example(student: Model, row: Row) -> tuple[Tensor, ...]:
    """Arguments of one network call; with guidance, sigma is one an image."""
    rows = torch.zeros(2, student.classes)
    sigma = torch.ones((), dtype=torch.float64)
    if row.guidance_scale != 1:
        sigma = sigma.expand(2).clone()
    return torch.zeros(2, *student.shape, dtype=torch.float64), sigma, rows


def _exported(program: nn.Module, example: tuple[Tensor, ...], names: Any, output: str) -> Any:  # noqa: ANN401
    """The ONNX model of a module, whose batches may be of any size."""
    onnxscript: Any = needed("onnxscript")
    batch = Dim("batch", min=1)
    shapes = tuple({0: batch} if e.ndim else None for e in example)
    traced = traced_quietly(program, example, shapes)
    domain: Any = onnxscript.values.Opset(DOMAIN, 1)
    call = onnxscript.values.Op(domain, CALL, op_schema=_schema())

    def translated(x: Any, sigma: Any, labels: Any) -> Any:  # noqa: ANN401
        return call(x, sigma, labels)

    table = {torch.ops.fewstep.denoise.default: translated}
    made: Any = torch.onnx.export(
        traced,
        input_names=list(names),
        output_names=[output],
        custom_translation_table=table,
        dynamo=True,
        verbose=False,
    )
    return _named(made.model_proto)


def _named(model: Any) -> Any:  # noqa: ANN401
    """The model with its batch dimension called so; the trace numbers it."""
    for value in (*model.graph.input, *model.graph.output):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:
                axis.dim_param = "batch"
    del model.graph.value_info[:]
    return model


def _schema() -> Any:  # noqa: ANN401
    """What the function takes and returns."""
    OpSchema: Any = needed("onnx.defs").OpSchema
    kinds = dict(zip(_INPUTS, ("double", "double", "float"), strict=True))
    given = [OpSchema.FormalParameter(n, f"tensor({kind})") for n, kind in kinds.items()]
    returned = [OpSchema.FormalParameter("D_x", "tensor(float)")]
    return OpSchema(CALL, DOMAIN, 1, inputs=given, outputs=returned)


def _join(sampler: Any, network: Any) -> Any:  # noqa: ANN401
    """The sampler's model, with the network as a function; the weights stand once, in the graph."""
    weights = [w.name for w in network.graph.initializer]
    given = [i.name for i in network.graph.input]
    function = needed("onnx").FunctionProto(domain=DOMAIN, name=CALL)
    function.input.extend([*given, *(f"{DOMAIN}.{name}" for name in weights)])
    function.output.extend(o.name for o in network.graph.output)
    function.node.extend(network.graph.node)
    function.opset_import.extend(network.opset_import)
    for node in function.node:
        for index, name in enumerate(node.input):
            if name in weights:
                node.input[index] = f"{DOMAIN}.{name}"
    for weight in network.graph.initializer:
        weight.name = f"{DOMAIN}.{weight.name}"
        sampler.graph.initializer.append(weight)
    for node in sampler.graph.node:
        if node.domain == DOMAIN and node.op_type == CALL:
            node.input.extend(f"{DOMAIN}.{name}" for name in weights)
    sampler.functions.append(function)
    sampler.functions.extend(network.functions)
    known = {o.domain for o in sampler.opset_import}
    for wanted in network.opset_import:
        if wanted.domain not in known:
            sampler.opset_import.append(wanted)
    if DOMAIN not in {o.domain for o in sampler.opset_import}:
        sampler.opset_import.add(domain=DOMAIN, version=1)
    return sampler
