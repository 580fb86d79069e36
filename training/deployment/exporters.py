# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Exports a model to ONNX or `torch.export` and compares the files with the model."""

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
# Names that transformers.js expects for each dtype.
_ONNX_FILES = {"float32": "model.onnx", "float16": "model_fp16.onnx", "int8": "model_quantized.onnx"}
PROGRAM_FILE = "model.pt2"
# Largest difference of logits of float32 files, relative to the largest logit (at least 1): about 1,700 unit roundoffs
# (6e-8), since another runtime fuses operations and sums in another order.
MAX_DIFFERENCE = 1e-4
# Largest difference of probabilities of float16 files. Rounding changes each weight by up to a relative 5e-4, which
# shifts logits by more than kernels do. int8 has no fixed limit: its loss of accuracy is measured on images.
MAX_HALF_DIFFERENCE = 0.05
# ONNX files are limited to 2 GiB. The weights of larger models go to a separate file.
_MAX_FILE_BYTES = 2**31 - 2**20
# Newest opset that the exporter writes without conversion.
_OPSET = 18
# Parts in reduced precision. PSNR, attention and classifier stay in float32: they are small and sensitive.
_REDUCED_PARTS = ("backbone", "rra.query", "rra.key", "rra.value", "rra.residual")
# int8 clips activations beyond this percentile: rare large values would leave few levels for the others.
_CALIBRATION_PERCENTILE = 99.99
Predict = Callable[[torch.Tensor], torch.Tensor]


def choose_scope(name: str, config: PreTrainedConfig, asked: str | None) -> str:
    r"""
    Relation scope to export: the requested one, or the model's own.

    Args:
        name (`str`):
            The model's name, for error messages.
        config (`PreTrainedConfig`):
            The model's config.
        asked (`str`, *optional*):
            The value of `--relation_scope`.

    Raises:
        UserError: if it is not an RBI model, or lacks the references for scope `reference`.
    """
    if config.model_type != RBIConfig.model_type:
        raise UserError(
            f"--model {name} is a {config.model_type} model, not RBI: Optimum exports it (`optimum-cli export onnx`), "
            "or RBIForImageClassification.from_image_classifier makes it one."
        )
    scope = asked or config.relation_scope
    if scope == "reference" and config.references is None:
        raise UserError(
            f"--relation_scope reference: {name} has no reference bank. Create one with training.references or "
            "`model.set_references`, or choose --relation_scope self."
        )
    return scope


def require_packages(*names: str):
    """Raises a `MissingPackageError` if one of the packages is not installed."""
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise MissingPackageError(f'--format onnx needs {", ".join(missing)}: pip install -e ".[export]"')


def make_loader(
    split: datasets.Dataset, image_processor: BaseImageProcessor, data: DataArguments, batch_size: int
) -> DataLoader:
    """Batches of the prepared images of a split, in its order."""
    images = ImageDataset(
        split, EvalTransform(image_processor), crop_to_boxes=data.crop_to_boxes, max_pixels=data.max_pixels
    )
    return DataLoader(images, batch_size=batch_size, collate_fn=Collator())


def image_size(image_processor: BaseImageProcessor) -> tuple[int, int]:
    """Height and width of prepared images; if they depend on the input, those for a square image."""
    try:
        return processed_size(image_processor)
    except ValueError:
        shape = EvalTransform(image_processor)(Image.new("RGB", (256, 256))).shape
        return int(shape[1]), int(shape[2])


class Deployed(nn.Module):
    r"""
    The module that is exported: a model from pixels to logits with a fixed relation scope.

    Args:
        model (`RBIForImageClassification`):
            Model in evaluation mode and float32.
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
        The pixels averaged down to the size for PSNR, so that the model need not do it: its `adaptive_avg_pool2d`
        cannot be exported for images of any size.
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
        # Multiplying the whole batch with one matrix keeps the batch axis dynamic.
        return ((pixel_values @ columns.T).transpose(-1, -2) @ rows.T).transpose(-1, -2)


def _averages(length: int, size: int) -> torch.Tensor:
    """Matrix, (size, length), that averages an axis as `adaptive_avg_pool` does."""
    parts, positions = torch.arange(size), torch.arange(length)
    first, end = (parts * length) // size, ((parts + 1) * length + size - 1) // size
    is_inside = (positions >= first[:, None]) & (positions < end[:, None])
    return is_inside.float() / (end - first)[:, None]


@dataclass
class ExportedFile:
    """An exported file, the file of its weights if they are separate, a function that runs it, and its difference."""

    path: Path
    predict: Predict
    difference: float | None = None
    weights: Path | None = None

    @property
    def paths(self) -> list[Path]:
        """The file and, if separate, the file of its weights."""
        return [self.path] if self.weights is None else [self.path, self.weights]


class Exporter:
    """Exports a model, for images of any size if possible, and compares the files with it."""

    def __init__(self, model: RBIForImageClassification, scope: str, size: tuple[int, int]):
        self.model, self.scope, self.size = model, scope, size
        self.is_dynamic = True

    @torch.no_grad()
    def reference(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The model's own logits."""
        return self.model(pixel_values=pixel_values, relation_scope=self.scope).logits

    def export(self, folder: Path) -> ExportedFile:
        r"""
        Writes the float32 file to a folder.

        Raises:
            UserError: if its logits differ from the model's.
        """
        # Only tracing a backbone and running the result shows whether it supports images of any size.
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
        """The traced program, for any batch size."""
        height, width = self.size
        shape: dict[int, Any] = {0: Dim("batch_size", min=1)}
        if self.is_dynamic:
            shape |= {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
        pixel_values = torch.rand(3, len(self.model.config.image_mean), height, width)
        with torch.no_grad(), _quiet():
            program = torch.export.export(module.eval(), (pixel_values,), dynamic_shapes=(shape,), strict=False)
        for node in program.graph.nodes:
            # Stack traces would reveal paths of this machine.
            node.meta.pop("stack_trace", None)
        return program

    def write(self, folder: Path, program: ExportedProgram) -> ExportedFile:
        raise NotImplementedError

    def compare(self, file: ExportedFile, is_half: bool = False) -> float:
        r"""
        Largest difference of logits between the file and the model, over several batches.

        Raises:
            UserError: if the difference of logits, or of probabilities with `is_half`, exceeds its limit.
        """
        difference = 0.0
        for pixel_values in example_batches(self.model, self.size, self.is_dynamic):
            expected, got = self.reference(pixel_values), file.predict(pixel_values)
            if got.shape != expected.shape or not torch.equal(got.isfinite(), expected.isfinite()):
                raise UserError(
                    f"{file.path.name} returns {_describe(got)} but the model returns {_describe(expected)} for a "
                    f"batch of {tuple(pixel_values.shape)}. Nothing was written."
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
                    f"The {what} of {file.path.name} differ from the model's by {largest:.1e}, more than {limit:.1e}. "
                    "Nothing was written."
                )
        return difference


def _largest_difference(first: torch.Tensor, second: torch.Tensor) -> float:
    return (first - second).nan_to_num().abs().max().item()


class ProgramExporter(Exporter):
    """Writes a program of `torch.export`, which runs without the model's Python code."""

    def write(self, folder: Path, program: ExportedProgram) -> ExportedFile:
        path = folder / PROGRAM_FILE
        # The example inputs are the only part that would be pickled.
        program.example_inputs = None
        with _quiet():
            torch.export.save(program, path)
            loaded = torch.export.load(path).module()

        @torch.no_grad()
        def predict(pixel_values: torch.Tensor) -> torch.Tensor:
            return loaded(pixel_values)

        return ExportedFile(path, predict)


class OnnxExporter(Exporter):
    """Writes ONNX files, in float32, float16 and int8."""

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
        _describe_graph(graph, self.scope, describe_export(self.model, self.scope))
        return self._save(graph, folder / _ONNX_FILES["float32"])

    def _save(self, graph: "Model", path: Path) -> ExportedFile:
        import onnx_ir

        num_bytes = sum(value.const_value.nbytes for value in graph.graph.initializers.values() if value.const_value)
        weights = path.with_name(f"{path.name}_data") if num_bytes > _MAX_FILE_BYTES else None
        onnx_ir.save(graph, path, external_data=weights and weights.name)
        return ExportedFile(path, _session(path), weights=weights)

    def halve(self, folder: Path) -> ExportedFile:
        r"""
        Writes a copy of the float32 file with float16 weights. It computes in float32, so it runs on any device.

        Args:
            folder (`Path`):
                Folder of the float32 file.

        Raises:
            UserError: if its probabilities differ too much from the model's.
        """
        import onnx_ir

        model = onnx_ir.load(folder / _ONNX_FILES["float32"])
        graph, widened = model.graph, dict[str, onnx_ir.Value]()
        for node in list(graph):
            if node.name not in self.reduced_nodes:
                continue
            for position, value in enumerate(node.inputs):
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
                node.replace_input_with(position, widened[name])
        for name in widened:
            if not graph.initializers[name].uses():
                del graph.initializers[name]
        file = self._save(model, folder / _ONNX_FILES["float16"])
        file.difference = self.compare(file, is_half=True)
        return file

    def quantize(self, folder: Path, pixel_values: Iterator[torch.Tensor], num_batches: int) -> ExportedFile:
        r"""
        Writes a copy of the float32 file in which the backbone and the head's linear layers have 8-bit weights and
        activations, with ranges calibrated on images.

        Args:
            folder (`Path`):
                Folder of the float32 file.
            pixel_values (`Iterator[torch.FloatTensor]`):
                Calibration batches. Their sizes may differ.
            num_batches (`int`):
                Number of batches.
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
                # Include activations that clip a convolution's output, so that no levels are spent on clipped values.
                op_types_to_quantize=["Conv", "Gemm", "MatMul", "Clip", "Relu"],
                nodes_to_quantize=sorted(self.reduced_nodes),
                calibrate_method=CalibrationMethod.Percentile,
                # One batch at a time: the activations of all batches take many gigabytes, and their shapes may differ.
                extra_options={"CalibPercentile": _CALIBRATION_PERCENTILE, "CalibStridedMinMax": 1},
                per_channel=True,
                # 7-bit weights: with 8 bits, sums saturate on some processors, so that results depend on the machine.
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
    """Replaces the exporter's notes on the source code of each node by a description of the model."""
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
    """Silences logs, warnings and output of the exporters."""
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
    Batches for comparing an export with its model: 1, 2 and all of up to 9 images, which are smooth, noise, black, a
    duplicate and one of the references. With `is_dynamic` also larger images that are not square.

    Args:
        model (`RBIForImageClassification`):
            Model with the normalization and the references.
        size (`tuple[int, int]`):
            Height and width of its images.
        is_dynamic (`bool`):
            Whether to add batches of another size.
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
    Accuracy of exported files on labeled images, and how often they predict the same class as the model.

    Args:
        reference (`Predict`):
            Maps pixels to the model's logits.
        predicts (`dict[str, Predict]`):
            The same for each file, by name.
        loader (`DataLoader`):
            Batches of `pixel_values` and `labels`.
        numbers (`torch.LongTensor` of shape `(num_classes,)`):
            The model's label of each class of the data.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar on a terminal.

    Returns:
        `dict[str, dict[str, Any]]`: for each file `accuracy`, `model_accuracy` and `agreement`, fractions in [0, 1].
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


def describe_references(model: RBIForImageClassification) -> dict[str, Any]:
    """Facts about the references for the config of an export."""
    facts = model.describe_references()
    return {name: facts[name] for name in ("num_references", "num_labeled", "has_images")}


def backbone_type(model: RBIForImageClassification) -> str:
    """`model_type` of the backbone."""
    return model.rbi.backbone.config.model_type


def describe_export(model: RBIForImageClassification, scope: str) -> str:
    """Sentences on an export for people who find the file."""
    attends = {
        "self": "Each image is classified independently of the other images in the batch.",
        "reference": "Each image attends to the references in the file, not to the other images in the batch.",
        "batch": "The images of a batch attend to each other: PREDICTIONS DEPEND ON THE OTHER IMAGES IN THE BATCH.",
    }[scope]
    return (
        f"Export of an RBI model (backbone: {backbone_type(model)}). {attends} The model_type in "
        "config.json is not the model's own, but one that transformers.js accepts for image classifiers."
    )


def results_table(facts: dict[str, Any]) -> Table:
    """Table of each file's size, difference from the model and, if measured, accuracy."""
    on = facts["measured_on"]
    title = f"Relation scope {facts['relation_scope']}"
    if on:
        title += f", measured on {on['images']:,} images of {on['split']}"
    table = Table(title=title)
    columns = ["", "MB", "largest difference of logits"]
    for column in [*columns, *(("accuracy", "model's accuracy", "same prediction") if on else ())]:
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
