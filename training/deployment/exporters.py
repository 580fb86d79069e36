# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Export of a model to ONNX or `torch.export`, checked against the model."""

import contextlib
import importlib.util
import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch
from PIL import Image
from rich.table import Table
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor

from modeling_rbi import MissingPackageError, RBIConfig, RBIForImageClassification, UserError

from ..data.arguments import DataArguments
from ..data.image_dataset import Collator, ImageDataset
from ..data.transforms import EvalTransform, processed_size


if TYPE_CHECKING:
    from onnx_ir import Model


logger = logging.getLogger(__name__)

PROGRAM = "training.export"
CONFIG_FILE, PROCESSOR_FILE, ONNX_FOLDER = "config.json", "preprocessor_config.json", "onnx"
FORMATS, SCOPES, DTYPES = ("onnx", "torch_export"), ("self", "reference", "batch"), ("float32", "float16", "int8")
# As transformers.js looks for them, and what it calls the dtype.
_ONNX_FILES = {"float32": "model.onnx", "float16": "model_fp16.onnx", "int8": "model_quantized.onnx"}
_PROGRAM_FILE = "model.pt2"
# Largest difference of logits in single precision, where logits are up to 1; beyond, relative to the largest of them.
MAX_DIFFERENCE = 1e-4
# Largest difference of probabilities where weights are rounded to half precision, after which logits differ by more.
MAX_HALF_DIFFERENCE = 0.05
# ONNX files of 2 GiB and more cannot be: their weights go to a file of their own.
_MAX_FILE_BYTES = 2**31 - 2**20
# The newest that the exporter writes without conversion.
_OPSET = 18
# What stays in single precision is little, and sensitive: PSNR, attention and the classifier.
_REDUCED_PARTS = ("backbone", "rra.query", "rra.key", "rra.value", "rra.residual")
# Activations beyond this percentile are cut off in 8 bits: rare large ones would leave few levels to the others.
_CALIBRATION_PERCENTILE = 99.99
Predict = Callable[[torch.Tensor], torch.Tensor]


def choose_scope(name: str, config: PreTrainedConfig, asked: str | None) -> str:
    r"""
    The scope to export: the one that is asked for, or else the model's own.

    Raises:
        UserError: if it is no RBI model, or has no references to attend to.
    """
    if config.model_type != RBIConfig.model_type:
        raise UserError(
            f"--model {name} is a {config.model_type} model, not RBI: Optimum exports it (`optimum-cli export onnx`), "
            "or RBIForImageClassification.from_image_classifier makes it one."
        )
    scope = asked or config.relation_scope
    if scope == "reference" and config.references is None:
        raise UserError(
            f"--scope reference: {name} has no reference bank. Make one, with training.references or "
            "`model.set_references`, or choose --scope self."
        )
    return scope


def _require_packages(*names: str):
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise MissingPackageError(f'--format onnx needs {", ".join(missing)}: pip install -e ".[export]"')


def _loader(
    split: datasets.Dataset, image_processor: BaseImageProcessor, data: DataArguments, batch_size: int
) -> DataLoader:
    images = ImageDataset(
        split, EvalTransform(image_processor), crop_to_boxes=data.crop_to_boxes, max_pixels=data.max_pixels
    )
    return DataLoader(images, batch_size=batch_size, collate_fn=Collator())


def _image_size(image_processor: BaseImageProcessor) -> tuple[int, int]:
    """Height and width of prepared images, those of a square one where they depend on it."""
    try:
        return processed_size(image_processor)
    except ValueError:
        shape = EvalTransform(image_processor)(Image.new("RGB", (256, 256))).shape
        return int(shape[1]), int(shape[2])


class Deployed(nn.Module):
    r"""
    A model from pixels to logits, with its scope fixed: what is exported.

    Args:
        model (`RBIForImageClassification`):
            In evaluation mode, in float32.
        scope (`str`):
            `"self"`, `"reference"` or `"batch"`.
    """

    def __init__(self, model: RBIForImageClassification, scope: str):
        super().__init__()
        self.model, self.scope = model, scope

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`pixel_values` (batch_size, num_channels, height, width) in float32 -> logits (batch_size, num_labels)."""
        features, _ = self.model.rbi.extract_features(pixel_values)
        outputs = self.model(
            pixel_values=self._for_relations(pixel_values),
            image_features=features,
            relation_scope=self.scope,
        )
        return outputs.logits

    def _for_relations(self, pixel_values: torch.Tensor) -> torch.Tensor | None:
        """
        The pixels averaged down to the size that PSNR is taken at, which the model then leaves as they are: its own
        `adaptive_avg_pool2d` cannot be exported for images of any size.
        """
        bank, limit = self.model.rbi.references, self.model.rbi.rpe.image_size
        if self.scope == "self" or self.model.config.relation_position_encoding == "none":
            return None
        if self.scope == "reference":
            if bank is None or bank.images is None:
                return None
            size = list(bank.images.shape[-2:])
        elif limit is None:
            return pixel_values
        else:
            size = [min(limit, length) for length in pixel_values.shape[-2:]]
        rows, columns = (_averages(length, part) for length, part in zip(pixel_values.shape[-2:], size, strict=True))
        # Each product is of images with one matrix: its batch axis stays an axis of any length.
        return ((pixel_values @ columns.T).transpose(-1, -2) @ rows.T).transpose(-1, -2)


def _averages(length: int, size: int) -> torch.Tensor:
    """The matrix, (size, length), by which `adaptive_avg_pool` averages an axis."""
    parts, places = torch.arange(size), torch.arange(length)
    first, end = (parts * length) // size, ((parts + 1) * length + size - 1) // size
    is_inside = (places >= first[:, None]) & (places < end[:, None])
    return is_inside.float() / (end - first)[:, None]


@dataclass
class ExportedFile:
    """A file that was exported, with that of its weights if they are apart, and how it answers."""

    path: Path
    predict: Predict
    difference: float | None = None
    weights: Path | None = None

    @property
    def paths(self) -> list[Path]:
        """All its files."""
        return [self.path] if self.weights is None else [self.path, self.weights]


class _Exporter:
    """Exports a model, for images of any size if that can be, and compares what is exported with it."""

    def __init__(self, model: RBIForImageClassification, scope: str, size: tuple[int, int]):
        self.model, self.scope, self.size = model, scope, size
        self.is_dynamic = True

    @torch.no_grad()
    def reference(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """What the model itself answers."""
        return self.model(pixel_values=pixel_values, relation_scope=self.scope).logits

    def export(self, folder: Path) -> ExportedFile:
        r"""
        Raises:
            UserError: if the file answers otherwise than the model.
        """
        # Whether a backbone takes images of any size shows when it is traced, or in what it then answers.
        try:
            return self._export(folder)
        except Exception:
            logger.debug("No export for images of any size:", exc_info=True)
        self.is_dynamic = False
        return self._export(folder)

    def _export(self, folder: Path) -> ExportedFile:
        file = self.write(folder, self.trace(Deployed(self.model, self.scope)))
        file.difference = self.compare(file)
        return file

    def trace(self, module: Deployed) -> ExportedProgram:
        """The program, for batches of any size from 1."""
        height, width = self.size
        shape: dict[int, Any] = {0: Dim("batch_size", min=1)}
        if self.is_dynamic:
            shape |= {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
        pixel_values = torch.rand(3, len(self.model.config.image_mean), height, width)
        with torch.no_grad(), _quiet():
            program = torch.export.export(module.eval(), (pixel_values,), dynamic_shapes=(shape,), strict=False)
        for node in program.graph.nodes:
            # Where the code stands on this machine is nobody's business.
            node.meta.pop("stack_trace", None)
        return program

    def write(self, folder: Path, program: ExportedProgram) -> ExportedFile:
        raise NotImplementedError

    def compare(self, file: ExportedFile, is_half: bool = False) -> float:
        r"""
        The largest difference of logits between the file and the model, over several batches.

        Raises:
            UserError: if it, or with `is_half` that of probabilities, is too large.
        """
        difference = 0.0
        for pixel_values in example_batches(self.model, self.size, self.is_dynamic):
            expected, got = self.reference(pixel_values), file.predict(pixel_values)
            if got.shape != expected.shape or not torch.equal(got.isfinite(), expected.isfinite()):
                raise UserError(
                    f"{file.path.name} gives {_describe(got)} where the model gives {_describe(expected)} for a batch "
                    f"of {tuple(pixel_values.shape)}: nothing is written."
                )
            largest = _largest_difference(got, expected)
            difference = max(difference, largest)
            if is_half:
                what, limit = "probabilities", MAX_HALF_DIFFERENCE
                largest = _largest_difference(got.softmax(-1), expected.softmax(-1))
            else:
                what, limit = "logits", MAX_DIFFERENCE * max(1.0, expected.nan_to_num().abs().max().item())
            if largest > limit:
                raise UserError(
                    f"{file.path.name} differs from the model by {largest:.1e} in its {what}, more than {limit:.1e}: "
                    "nothing is written."
                )
        return difference


def _largest_difference(first: torch.Tensor, second: torch.Tensor) -> float:
    return (first - second).nan_to_num().abs().max().item()


class _ProgramExporter(_Exporter):
    """Programs of `torch.export`, which need no Python code of the model's."""

    def write(self, folder: Path, program: ExportedProgram) -> ExportedFile:
        path = folder / _PROGRAM_FILE
        # An example is pickled with the program, which is the only part that would be.
        program.example_inputs = None
        with _quiet():
            torch.export.save(program, path)
            loaded = torch.export.load(path).module()

        @torch.no_grad()
        def predict(pixel_values: torch.Tensor) -> torch.Tensor:
            return loaded(pixel_values)

        return ExportedFile(path, predict)


class _OnnxExporter(_Exporter):
    """ONNX files, whose weights can be made smaller."""

    def write(self, folder: Path, program: ExportedProgram) -> ExportedFile:
        with _quiet():
            onnx_program = torch.onnx.export(
                program,
                (),
                dynamo=True,
                input_names=["pixel_values"],
                output_names=["logits"],
                dynamic_shapes=({0: "batch_size"} | ({2: "height", 3: "width"} if self.is_dynamic else {}),),
                opset_version=_OPSET,
                verbose=False,
            )
        assert onnx_program is not None
        graph = onnx_program.model
        scopes = [f"'model.rbi.{part}" for part in _REDUCED_PARTS]
        self.reduced_nodes = {
            str(node.name)
            for node in graph.graph
            if any(scope in node.metadata_props.get("pkg.torch.onnx.name_scopes", "") for scope in scopes)
        }
        _describe_graph(graph, self.scope, _note(self.model, self.scope))
        return self._save(graph, folder / _ONNX_FILES["float32"])

    def _save(self, graph: "Model", path: Path) -> ExportedFile:
        import onnx_ir

        num_bytes = sum(value.const_value.nbytes for value in graph.graph.initializers.values() if value.const_value)
        weights = path.with_name(f"{path.name}_data") if num_bytes > _MAX_FILE_BYTES else None
        onnx_ir.save(graph, path, external_data=weights and weights.name)
        return ExportedFile(path, _session(path), weights=weights)

    def halve(self, folder: Path) -> ExportedFile:
        r"""
        The float file with weights in half precision, and arithmetic as it was: half the size, on any device.

        Args:
            folder (`Path`):
                That of the float file.

        Raises:
            UserError: if it answers otherwise than the model.
        """
        import onnx_ir

        model = onnx_ir.load(folder / _ONNX_FILES["float32"])
        graph, widened = model.graph, dict[str, onnx_ir.Value]()
        for node in list(graph):
            if node.name not in self.reduced_nodes:
                continue
            for place, value in enumerate(node.inputs):
                if value is None or not value.is_initializer() or value.const_value is None or value.name is None:
                    continue
                if value.const_value.dtype != onnx_ir.DataType.FLOAT or not value.const_value.shape.rank():
                    continue
                name = value.name
                if name not in widened:
                    half = onnx_ir.tensor(value.const_value.numpy().astype(np.float16), name=f"{name}_half")
                    stored = onnx_ir.Value(name=half.name, const_value=half)
                    graph.register_initializer(stored)
                    cast = onnx_ir.node("Cast", [stored], {"to": onnx_ir.DataType.FLOAT}, name=f"{name}_cast")
                    graph.insert_before(node, cast)
                    widened[name] = cast.outputs[0]
                node.replace_input_with(place, widened[name])
        for name in widened:
            if not graph.initializers[name].uses():
                del graph.initializers[name]
        file = self._save(model, folder / _ONNX_FILES["float16"])
        file.difference = self.compare(file, is_half=True)
        return file

    def quantize(self, folder: Path, pixel_values: Iterator[torch.Tensor], num_batches: int) -> ExportedFile:
        r"""
        The float file with weights and activations of the backbone and of the head's linear layers in 8 bits, in
        ranges that they have on the images.

        Args:
            folder (`Path`):
                That of the float file.
            pixel_values (`Iterator[torch.FloatTensor]`):
                Batches to calibrate with, not all of one size necessarily.
            num_batches (`int`):
                Their number.
        """
        from onnxruntime.quantization import (
            CalibrationDataReader,
            CalibrationMethod,
            QuantFormat,
            QuantType,
            quantize_static,
        )

        class Reader(CalibrationDataReader):
            num_left = 0

            def __len__(self):
                return num_batches

            def set_range(self, start_index: int, end_index: int):
                self.num_left = end_index - start_index

            def get_next(self):
                if not self.num_left:
                    return None
                self.num_left -= 1
                return {"pixel_values": next(pixel_values).numpy()}

        path = folder / _ONNX_FILES["int8"]
        with _quiet():
            quantize_static(
                folder / _ONNX_FILES["float32"],
                path,
                Reader(),
                quant_format=QuantFormat.QDQ,
                # With what cuts off the range of a convolution, so that no levels go to what is cut off.
                op_types_to_quantize=["Conv", "Gemm", "MatMul", "Clip", "Relu"],
                nodes_to_quantize=sorted(self.reduced_nodes),
                calibrate_method=CalibrationMethod.Percentile,
                # A batch at a time: the activations of all of them are many gigabytes, and must be of one shape.
                extra_options={"CalibPercentile": _CALIBRATION_PERCENTILE, "CalibStridedMinMax": 1},
                per_channel=True,
                # Of 7 bits, whose sums no processor cuts off: the answers are the same on all of them.
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
        return ExportedFile(path, _session(path))


def _session(path: Path) -> Predict:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def predict(pixel_values: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(["logits"], {"pixel_values": pixel_values.numpy()})[0])

    return predict


def _describe_graph(graph: "Model", scope: str, note: str):
    """Says in the file what it is, in place of what the exporter notes of the code at each node."""
    graph.graph.metadata_props.clear()
    for value in (*graph.graph.inputs, *graph.graph.outputs, *graph.graph.initializers.values()):
        value.metadata_props.clear()
    for node in graph.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    graph.doc_string = note
    graph.metadata_props.update(
        {
            "rbi.relation_scope": scope,
            "rbi.answers_depend_on_batch": str(scope == "batch").lower(),
            "rbi.note": note,
        }
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' remarks on their own parts."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def example_batches(
    model: RBIForImageClassification, size: tuple[int, int], is_dynamic: bool
) -> Iterator[torch.Tensor]:
    r"""
    Batches that an export is compared with its model on: of 1, 2 and 9 images, smooth ones, noise, black, the same
    one twice, and of the model's references; with `is_dynamic` also of a larger size, and not square.

    Args:
        model (`RBIForImageClassification`):
            Whose normalization and references are taken.
        size (`tuple[int, int]`):
            Height and width that its images have.
        is_dynamic (`bool`):
            Whether images may have other sizes.
    """
    sizes = [size, (size[0] + size[0] // 2, 2 * size[1])] if is_dynamic else [size]
    mean, std = (torch.tensor(values)[:, None, None] for values in (model.config.image_mean, model.config.image_std))
    generator = torch.Generator().manual_seed(0)
    bank = model.rbi.references
    for height, width in sizes:
        smooth = nn.functional.interpolate(
            torch.rand(4, len(mean), 4, 4, generator=generator), size=(height, width), mode="bilinear"
        )
        noise = torch.rand(2, len(mean), height, width, generator=generator)
        images = [smooth, noise, torch.zeros_like(noise[:1]), smooth[:1]]
        if bank is not None and bank.images is not None:
            images.append(nn.functional.interpolate(bank.images[:1].float() / 255, size=(height, width)))
        pixel_values = (torch.cat(images) - mean) / std
        yield from (pixel_values[:1], pixel_values[1:3], pixel_values)


def _describe(logits: torch.Tensor) -> str:
    return f"{tuple(logits.shape)} logits, {int((~logits.isfinite()).sum())} of them not finite,"


@torch.no_grad()
def measure(
    reference: Predict, predicts: dict[str, Predict], loader: DataLoader, numbers: torch.Tensor, progress: bool = False
) -> dict[str, dict[str, Any]]:
    r"""
    Accuracy of files on labeled images, and how often they answer as the model itself does.

    Args:
        reference (`Predict`):
            The model, from pixels to logits.
        predicts (`dict[str, Predict]`):
            The files.
        loader (`DataLoader`):
            Batches of `pixel_values` and `labels`.
        numbers (`torch.LongTensor` of shape `(num_classes,)`):
            The model's number of each class of the data.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a bar, on a terminal.

    Returns:
        `dict[str, dict[str, Any]]`: of each file `accuracy`, `model_accuracy` and `agreement`, fractions in [0, 1].
    """
    right = dict.fromkeys([*predicts, "model"], 0)
    same, total = dict.fromkeys(predicts, 0), 0
    for batch in tqdm(loader, desc="Measuring", leave=False, disable=not (progress and sys.stderr.isatty())):
        labels = numbers[batch["labels"]]
        expected = reference(batch["pixel_values"]).argmax(-1)
        right["model"] += int((expected == labels).sum())
        total += len(labels)
        for name, predict in predicts.items():
            answers = predict(batch["pixel_values"]).argmax(-1)
            right[name] += int((answers == labels).sum())
            same[name] += int((answers == expected).sum())
    return {
        name: {
            "accuracy": right[name] / total,
            "model_accuracy": right["model"] / total,
            "agreement": same[name] / total,
        }
        for name in predicts
    }


def _references(model: RBIForImageClassification) -> dict[str, Any]:
    facts = model.describe_references()
    return {name: facts[name] for name in ("num_references", "num_labeled", "has_images")}


def _backbone_type(model: RBIForImageClassification) -> str:
    return model.rbi.backbone.config.model_type


def _note(model: RBIForImageClassification, scope: str) -> str:
    attends = {
        "self": "Each image is answered by itself, whatever else is in the batch.",
        "reference": "Each image attends to references that are in the file; the others of the batch do not matter.",
        "batch": "The images of a batch attend to each other: AN ANSWER DEPENDS ON THE OTHER IMAGES OF THE BATCH.",
    }[scope]
    return (
        f"Export of an RBI model (backbone: {_backbone_type(model)}). {attends} The model_type in "
        "config.json is one that transformers.js takes for an image classifier, not that of the model."
    )


def results_table(facts: dict[str, Any]) -> Table:
    """Size, difference and, where it was measured, accuracy of each file."""
    on = facts["measured_on"]
    title = f"Scope {facts['relation_scope']}"
    if on:
        title += f", measured on {on['images']:,} images of {on['split']}"
    table = Table(title=title)
    columns = ["", "MB", "largest difference of logits"]
    for column in [*columns, *(("accuracy", "of the model", "same answer") if on else ())]:
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, entry in facts["files"].items():
        difference = entry["max_logit_difference"]
        row = [name, f"{entry['bytes'] / 1e6:.1f}", "not compared" if difference is None else f"{difference:.1e}"]
        if on:
            values = entry["measured"]
            row += [f"{100 * values[key]:.1f} %" for key in ("accuracy", "model_accuracy", "agreement")]
        table.add_row(*row)
    size = facts["image_size"]
    caption = "images of any size" if size == "dynamic" else f"images of {size[0]} x {size[1]}"
    table.caption = f"Batches of any size, {caption}."
    return table
