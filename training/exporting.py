# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""A saved model as an ONNX file or a program of `torch.export`, checked against the model."""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import io
import json
import logging
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
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
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from modeling_rbi import RBIConfig, RBIForImageClassification, pixel_statistics

from .assessment import class_names, in_order_of_content, load_classifier, load_config, match_labels
from .data.checks import check_pictures, drop_bad, refuse_bad
from .data.pictures import Collator, Pictures
from .data.reading import DataArguments, load_pictures
from .data.transforms import EvalTransform, processed_size
from .files import filled_whole, names_in, write_json


if TYPE_CHECKING:
    from onnx_ir import Model

logger = logging.getLogger(__name__)

PROGRAM = "training.export"
CONFIG_FILE, PROCESSOR_FILE, ONNX_FOLDER = "config.json", "preprocessor_config.json", "onnx"
FORMATS, SCOPES, DTYPES = ("onnx", "torch_export"), ("self", "reference", "batch"), ("float32", "float16", "int8")
# As transformers.js looks for them, and what it calls the dtype.
_ONNX_FILES = {"float32": "model.onnx", "float16": "model_fp16.onnx", "int8": "model_quantized.onnx"}
_CLIENT_DTYPES = {"float32": "fp32", "float16": "fp16", "int8": "q8"}
_PROGRAM_FILE = "model.pt2"
# Largest difference of logits in single precision, where logits are up to 1; beyond, relative to the largest of them.
MAX_DIFFERENCE = 1e-4
# Largest difference of probabilities where weights are rounded to half precision, after which logits differ by more.
MAX_HALF_DIFFERENCE = 0.05
# ONNX files of 2 GiB and more cannot be: their weights go to a file of their own.
_MAX_FILE_BYTES = 2**31 - 2**20
# The newest that the exporter writes without conversion.
_OPSET = 18
# transformers.js refuses types of model that it does not list, and treats all image classifiers alike.
_CLIENT_MODEL_TYPE = "vit"
# What stays in single precision is little, and sensitive: PSNR, attention and the classifier.
_REDUCED_PARTS = ("backbone", "rra.query", "rra.key", "rra.value", "rra.residual")
# Activations beyond this percentile are cut off in 8 bits: rare large ones would leave few levels to the others.
_CALIBRATION_PERCENTILE = 99.99
# Grey levels that two image processors may differ by, as torchvision's and Pillow's resizing do.
_MAX_GREY_LEVELS = 2.0

Predict = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class ExportArguments:
    r"""
    What to export, and how.

    Raises:
        ValueError: if a value is out of its range, or the values do not go together.
    """

    model: str = field(metadata={"help": "RBI model, in a folder or of the Hub."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the Hub."})
    format: str = field(
        default="onnx",
        metadata={"help": "onnx, or torch_export: a .pt2 file for torch.export.load.", "choices": list(FORMATS)},
    )
    scope: str | None = field(
        default=None,
        metadata={
            "help": "Whom a picture attends to: itself, the model's references, or the others of the batch; by "
            "default the model's own relation_scope.",
            "choices": list(SCOPES),
        },
    )
    dtype: list[str] | None = field(
        default=None,
        metadata={
            "help": "float32 if not given. float16: weights in half precision, arithmetic in single. int8: both in 8 "
            "bits, which needs data to calibrate it. With several there is a file of each, and transformers.js takes "
            "the first.",
            "choices": list(DTYPES),
        },
    )
    output_dir: str = field(
        default="outputs/export",
        metadata={"help": "Folder for the export: a new one, or that of another export, which is replaced."},
    )
    split: str = field(
        default="test",
        metadata={"help": "Pictures to measure on, if data are named.", "choices": ["validation", "test"]},
    )
    num_calibration_pictures: int = field(
        default=128, metadata={"help": "Training pictures that the ranges for int8 are taken from, drawn at random."}
    )
    batch_size: int = field(default=16, metadata={"help": "Pictures in a step of the measurement."})
    seed: int = field(
        default=42, metadata={"help": "Random seed; also of what is held out for validation, as in training."}
    )
    disable_tqdm: bool = field(default=False, metadata={"help": "Show no progress."})

    def __post_init__(self):
        self.dtype = list(dict.fromkeys(self.dtype or ["float32"]))
        for name, least in (("num_calibration_pictures", 1), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, got {getattr(self, name)}.")
        if self.dtype != ["float32"] and self.format != "onnx":
            raise ValueError(
                f"--dtype {' '.join(self.dtype)} goes with --format onnx: {self.format} is float32 alone."
            )


@dataclass
class MeasuringArguments(DataArguments):
    """Pictures to calibrate and to measure on; none need be named."""

    def __post_init__(self):
        if self.is_given:
            super().__post_init__()

    @property
    def is_given(self) -> bool:
        """Whether any of the arguments is."""
        return any(getattr(self, each.name) != each.default for each in dataclasses.fields(self))


def run(args: ExportArguments, data: MeasuringArguments | None = None) -> tuple[dict[str, Any], list[str]]:
    r"""
    Exports, checks and, with data, measures; and writes all files, or none.

    Args:
        args (`ExportArguments`):
            What to export.
        data (`MeasuringArguments`, *optional*):
            Pictures to calibrate int8 and to measure on.

    Returns:
        What `config.json` says of the export, and remarks for its user.

    Raises:
        ValueError, OSError: if model, data and arguments do not fit each other, or the export answers otherwise than
            the model.
        ImportError: if the packages for ONNX are not installed.
    """
    assert args.dtype is not None
    output_dir = Path(args.output_dir)
    check_output_dir(output_dir)
    is_onnx = args.format == "onnx"
    if is_onnx:
        _require_packages("onnx", "onnxruntime", "onnxscript")
    if data is not None and not data.is_given:
        data = None
    if data is None and args.split != "test":
        raise ValueError(f"--split {args.split} is of data: name them, for instance by --train_dir.")
    if "int8" in args.dtype and data is None:
        raise ValueError(
            "--dtype int8 needs pictures to calibrate it and to measure what it costs: name them, for instance by "
            "--train_dir."
        )
    config = load_config(args.model, args.model_revision)
    scope = choose_scope(args.model, config, args.scope)
    splits = None if data is None else _load_labelled(args, data, config)
    model, image_processor = _load_model(args, config)
    size = _image_size(image_processor)
    processor_fields, client_note = client_image_processor(image_processor, len(config.image_mean))
    notes = [note for note in (client_note if is_onnx else None, _scores_note(config) if is_onnx else None) if note]

    with filled_whole(output_dir, last=CONFIG_FILE) as draft:
        exporter = _OnnxExporter(model, scope, size) if is_onnx else _ProgramExporter(model, scope, size)
        folder = draft / ONNX_FOLDER if is_onnx else draft
        folder.mkdir(exist_ok=True)
        exported = {"float32": exporter.export(folder)}
        if isinstance(exporter, _OnnxExporter):
            if "float16" in args.dtype:
                exported["float16"] = exporter.halve(folder)
            if "int8" in args.dtype:
                assert splits is not None and data is not None
                pictures = _drawn(splits["train"], args.num_calibration_pictures, args.seed)
                loader = _loader(pictures, image_processor, data, args.batch_size)
                exported["int8"] = exporter.quantize(folder, (batch["pixel_values"] for batch in loader), len(loader))
        measured: dict[str, dict[str, Any]] = {}
        if splits is not None and data is not None:
            predicts = {dtype: file.predict for dtype, file in exported.items() if dtype in args.dtype}
            split = in_order_of_content(splits[args.split])
            loader = _loader(split, image_processor, data, args.batch_size)
            numbers = match_labels(split, config)
            measured = measure(exporter.reference, predicts, loader, numbers, progress=not args.disable_tqdm)
        if "float32" not in args.dtype:
            for path in exported.pop("float32").paths:
                path.unlink()
        references = _references(model) if scope == "reference" else None
        facts: dict[str, Any] = {
            "program": PROGRAM,
            "format": args.format,
            "relation_scope": scope,
            "answers_depend_on_batch": scope == "batch",
            "note": _note(model, scope),
            "backbone": _backbone_type(model),
            "references": references,
            "image_size": "dynamic" if exporter.is_dynamic else list(size),
            "files": {
                exported[dtype].path.relative_to(draft).as_posix(): {
                    "dtype": dtype,
                    "bytes": sum(path.stat().st_size for path in exported[dtype].paths),
                    "max_logit_difference": exported[dtype].difference,
                }
                | ({"measured": measured[dtype]} if dtype in measured else {})
                for dtype in args.dtype
            },
            "measured_on": None if splits is None else {"split": args.split, "pictures": len(splits[args.split])},
            "versions": {
                name: importlib.metadata.version(name)
                for name in ("torch", "transformers", *(("onnx", "onnxruntime", "onnxscript") if is_onnx else ()))
            },
        }
        if processor_fields is None:
            image_processor.save_pretrained(draft)
        else:
            write_json(draft / PROCESSOR_FILE, processor_fields)
        write_json(
            draft / CONFIG_FILE, client_config(config, facts, [exported[dtype] for dtype in args.dtype], is_onnx)
        )
        # Of an earlier export; a folder does not replace another one.
        (output_dir / CONFIG_FILE).unlink(missing_ok=True)
        shutil.rmtree(output_dir / ONNX_FOLDER, ignore_errors=True)
        (output_dir / _PROGRAM_FILE).unlink(missing_ok=True)
    if scope == "batch":
        notes.append("Answers depend on the other pictures of a batch: a client that is given several relates them.")
    if references:
        copies = " and small copies" if references["has_pictures"] else ""
        notes.append(f"The files carry features{copies} of {references['num_references']} reference pictures.")
    if not is_onnx:
        notes.append("torch.export.load may run code that a .pt2 file holds: load such files from yourself alone.")
    return facts, notes


def check_output_dir(folder: Path):
    r"""
    Raises:
        ValueError: if the folder holds anything but an earlier export.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file: name a folder.")
    names = names_in(folder)
    others = set(names) - {CONFIG_FILE, PROCESSOR_FILE, ONNX_FOLDER, _PROGRAM_FILE}
    if others or (names and not _is_export(folder / CONFIG_FILE)):
        listed = ", ".join((sorted(others) or names)[:5])
        raise ValueError(
            f"--output_dir {folder} holds other things than an export ({listed}): name another folder. An export "
            "cannot share that of its model, as each has its own config.json."
        )


def _is_export(path: Path) -> bool:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["rbi_export"]["program"] == PROGRAM
    except (OSError, ValueError, TypeError, KeyError):
        return False


def choose_scope(name: str, config: PreTrainedConfig, asked: str | None) -> str:
    r"""
    The scope to export: the one that is asked for, or else the model's own.

    Raises:
        ValueError: if it is no RBI model, or has no references to attend to.
    """
    if config.model_type != RBIConfig.model_type:
        raise ValueError(
            f"--model {name} is a {config.model_type} model, not RBI: Optimum exports it (`optimum-cli export onnx`), "
            "or RBIForImageClassification.from_image_classifier makes it one."
        )
    scope = asked or config.relation_scope
    if scope == "reference" and config.references is None:
        raise ValueError(
            f"--scope reference: {name} has no reference bank. Make one, with training.references or "
            "`model.set_references`, or choose --scope self."
        )
    return scope


def _require_packages(*names: str):
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise ImportError(f'--format onnx needs {", ".join(missing)}: pip install -e ".[export]"')


def _load_model(
    args: ExportArguments, config: PreTrainedConfig
) -> tuple[RBIForImageClassification, BaseImageProcessor]:
    try:
        model, image_processor = load_classifier(args.model, args.model_revision, config)
    except OSError as error:
        if "image processor" not in str(error):
            raise
        raise ValueError(
            f"--model {args.model} has no image processor, which says how its pictures are prepared: save it beside "
            "the model (`image_processor.save_pretrained`)."
        ) from error
    # In evaluation again, so that keys and values of the references are of this precision, too.
    return model.float().eval(), image_processor


def _load_labelled(args: ExportArguments, data: DataArguments, config: PreTrainedConfig) -> datasets.DatasetDict:
    pictures = load_pictures(data, args.seed)
    if args.split not in pictures:
        raise ValueError(f"The data has no {args.split} split: choose --split validation, or name pictures for it.")
    match_labels(pictures[args.split], config)  # before the pictures are decoded
    report = check_pictures(pictures, max_pixels=data.max_pixels, allow_missing_classes=data.allow_missing_classes)
    if data.skip_bad_images:
        return drop_bad(pictures, report)
    refuse_bad(report)
    return pictures


def _drawn(split: datasets.Dataset, number: int, seed: int) -> datasets.Dataset:
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    return split.select(order[:number].tolist())


def _loader(
    split: datasets.Dataset, image_processor: BaseImageProcessor, data: DataArguments, batch_size: int
) -> DataLoader:
    pictures = Pictures(
        split, EvalTransform(image_processor), crop_to_boxes=data.crop_to_boxes, max_pixels=data.max_pixels
    )
    return DataLoader(pictures, batch_size=batch_size, collate_fn=Collator())


def _image_size(image_processor: BaseImageProcessor) -> tuple[int, int]:
    """Height and width of prepared pictures, those of a square one where they depend on it."""
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
        `adaptive_avg_pool2d` cannot be exported for pictures of any size.
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
        # Each product is of pictures with one matrix: its batch axis stays an axis of any length.
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
    """Exports a model, for pictures of any size if that can be, and compares what is exported with it."""

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
            ValueError: if the file answers otherwise than the model.
        """
        # Whether a backbone takes pictures of any size shows when it is traced, or in what it then answers.
        try:
            return self._export(folder)
        except Exception:
            logger.debug("No export for pictures of any size:", exc_info=True)
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
            ValueError: if it, or with `is_half` that of probabilities, is too large.
        """
        difference = 0.0
        for pixel_values in example_batches(self.model, self.size, self.is_dynamic):
            expected, got = self.reference(pixel_values), file.predict(pixel_values)
            if got.shape != expected.shape or not torch.equal(got.isfinite(), expected.isfinite()):
                raise ValueError(
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
                raise ValueError(
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
            ValueError: if it answers otherwise than the model.
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
        ranges that they have on the pictures.

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
    Batches that an export is compared with its model on: of 1, 2 and 9 pictures, smooth ones, noise, black, the same
    one twice, and of the model's references; with `is_dynamic` also of a larger size, and not square.

    Args:
        model (`RBIForImageClassification`):
            Whose normalisation and references are taken.
        size (`tuple[int, int]`):
            Height and width that its pictures have.
        is_dynamic (`bool`):
            Whether pictures may have other sizes.
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
        pictures = [smooth, noise, torch.zeros_like(noise[:1]), smooth[:1]]
        if bank is not None and bank.images is not None:
            pictures.append(nn.functional.interpolate(bank.images[:1].float() / 255, size=(height, width)))
        pixel_values = (torch.cat(pictures) - mean) / std
        yield from (pixel_values[:1], pixel_values[1:3], pixel_values)


def _describe(logits: torch.Tensor) -> str:
    return f"{tuple(logits.shape)} logits, {int((~logits.isfinite()).sum())} of them not finite,"


@torch.no_grad()
def measure(
    reference: Predict, predicts: dict[str, Predict], loader: DataLoader, numbers: torch.Tensor, progress: bool = False
) -> dict[str, dict[str, Any]]:
    r"""
    Accuracy of files on labelled pictures, and how often they answer as the model itself does.

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


def client_config(
    config: PreTrainedConfig, facts: dict[str, Any], files: Sequence[ExportedFile], is_onnx: bool
) -> dict[str, Any]:
    """The `config.json` of an export; the first of the files is the one that transformers.js takes by default."""
    names = class_names(config)
    content: dict[str, Any] = {
        "architectures": ["RBIForImageClassification"],
        "model_type": _CLIENT_MODEL_TYPE,
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
        "rbi_export": facts,
    }
    if is_onnx:
        dtypes = [entry["dtype"] for entry in facts["files"].values()]
        content["transformers.js_config"] = {"dtype": _CLIENT_DTYPES[dtypes[0]]}
        if apart := {file.path.name: 1 for file in files if file.weights}:
            content["transformers.js_config"]["use_external_data_format"] = apart
    return content


def client_image_processor(
    image_processor: BaseImageProcessor, num_channels: int
) -> tuple[dict[str, Any] | None, str | None]:
    r"""
    The image processor as a `CLIPImageProcessor`, whose steps (resize, crop, rescale, normalise) transformers.js has,
    and has as transformers does. Of other kinds it does some otherwise (EfficientNet), or does not know the name
    (those that end in Pil).

    Args:
        image_processor (`BaseImageProcessor`):
            The model's.
        num_channels (`int`):
            Channels that the model takes.

    Returns:
        The content of `preprocessor_config.json`; or `None`, where the processor does more than these steps, and a
        sentence that says so.
    """
    given = image_processor.to_dict()
    size, crop_size = _lengths(given.get("size")), _lengths(given.get("crop_size"))
    if not given.get("do_center_crop"):
        crop_size = None
    if given.get("crop_pct") and size and (edge := size.get("shortest_edge")):
        # ConvNeXt's, which crops small pictures alone.
        is_small = edge < 384
        crop_size = {"height": edge, "width": edge} if is_small else None
        size = {"shortest_edge": int(edge / given["crop_pct"])} if is_small else {"height": edge, "width": edge}
    mean, std = pixel_statistics(image_processor, num_channels)
    fields: dict[str, Any] = {
        "do_resize": bool(given.get("do_resize") and size),
        "do_center_crop": crop_size is not None,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
        "do_convert_rgb": num_channels == 3,
    }
    if fields["do_resize"]:
        fields |= {"size": size, "resample": int(given.get("resample") or 0)}
    if crop_size:
        fields["crop_size"] = crop_size
    if _prepare_alike(image_processor, CLIPImageProcessorPil(**fields), num_channels, min(std)):
        return {"image_processor_type": "CLIPImageProcessor"} | fields, None
    return None, (
        f"{type(image_processor).__name__} prepares pictures in a way that transformers.js may not have: give the "
        "model prepared pixel_values there."
    )


def _lengths(size: Any) -> dict[str, int] | None:
    return {name: int(length) for name, length in dict(size).items() if length is not None} if size else None


def _prepare_alike(first: Callable, second: Callable, num_channels: int, std: float) -> bool:
    random = np.random.default_rng(0)
    for height, width in ((96, 64), (200, 310), (450, 450)):
        levels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        picture = Image.fromarray(levels).convert("L" if num_channels == 1 else "RGB")
        prepared = [each(picture, return_tensors="pt")["pixel_values"] for each in (first, second)]
        if prepared[0].shape != prepared[1].shape:
            return False
        if (prepared[0] - prepared[1]).abs().max() > _MAX_GREY_LEVELS / 255 / std:
            return False
    return True


def _scores_note(config: PreTrainedConfig) -> str | None:
    if config.num_labels > 1 and config.problem_type in (None, "single_label_classification"):
        return None
    return (
        "The pipeline of transformers.js makes scores by softmax, which this model's are not: take the logits of its "
        "AutoModelForImageClassification there."
    )


def _references(model: RBIForImageClassification) -> dict[str, Any]:
    facts = model.describe_references()
    return {name: facts[name] for name in ("num_references", "num_labelled", "has_pictures")}


def _backbone_type(model: RBIForImageClassification) -> str:
    return model.rbi.backbone.config.model_type


def _note(model: RBIForImageClassification, scope: str) -> str:
    attends = {
        "self": "Each picture is answered by itself, whatever else is in the batch.",
        "reference": "Each picture attends to references that are in the file; the others of the batch do not matter.",
        "batch": "The pictures of a batch attend to each other: AN ANSWER DEPENDS ON THE OTHER PICTURES OF THE BATCH.",
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
        title += f", measured on {on['pictures']:,} pictures of {on['split']}"
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
    caption = "pictures of any size" if size == "dynamic" else f"pictures of {size[0]} x {size[1]}"
    table.caption = f"Batches of any size, {caption}."
    return table
