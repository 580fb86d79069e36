# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Exported files predict what the model predicts, in ONNX Runtime, in plain torch and in transformers.js."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from transformers import ResNetConfig, ViTConfig, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from modeling_rbi import RBIConfig, RBIForImageClassification, UserError
from training.deployment import exporters
from training.export import ExportArguments, MeasuringArguments, run


NODE_FOLDER = Path(__file__).parents[2] / "node"
SIZE = 64


def make_model(backbone: str, preset: str, with_references: bool = True, **fields) -> RBIForImageClassification:
    """A model with 3 classes and, if wanted, 6 references, for images of 64 x 64. All its weights are random."""
    torch.manual_seed(0)
    # Few layers, since the time of an export grows with their number.
    if backbone == "resnet":
        backbone_config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    else:
        small = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
        backbone_config = ViTConfig(image_size=SIZE, patch_size=16, **small)
    names = {0: "cat", 1: "dog", 2: "fox"}
    labels = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
    config = getattr(RBIConfig, preset)(backbone_config=backbone_config, **labels, **fields)
    model = RBIForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    if with_references:
        pixel_values = make_pixel_values(6, seed=5)
        model.set_references([{"pixel_values": pixels, "label": row % 3} for row, pixels in enumerate(pixel_values)])
    return model


def make_pixel_values(number: int, seed: int = 0, size: tuple[int, int] = (SIZE, SIZE)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    images = torch.nn.functional.interpolate(torch.rand(number, 3, 4, 4, generator=generator), size, mode="bilinear")
    mean, std = (torch.tensor(values)[:, None, None] for values in (RBIConfig().image_mean, RBIConfig().image_std))
    return (images - mean) / std


def save(model: RBIForImageClassification, folder: Path) -> Path:
    model.save_pretrained(folder)
    config = model.config
    ViTImageProcessorPil(
        size={"height": SIZE, "width": SIZE}, image_mean=config.image_mean, image_std=config.image_std
    ).save_pretrained(folder)
    return folder


def session(path: Path):
    run_session = onnxruntime.InferenceSession(path).run
    return lambda pixel_values: torch.from_numpy(run_session(None, {"pixel_values": pixel_values.numpy()})[0])


@torch.no_grad()
def answers(model: RBIForImageClassification, pixel_values: torch.Tensor, scope: str) -> torch.Tensor:
    return model(pixel_values=pixel_values, relation_scope=scope).logits


def check_same_answers(predict, model: RBIForImageClassification, scope: str, sizes=((SIZE, SIZE),)):
    for size in sizes:
        pixel_values = make_pixel_values(5, seed=9, size=size)
        expected = answers(model, pixel_values, scope)
        torch.testing.assert_close(predict(pixel_values), expected, rtol=1e-4, atol=1e-4)
        first = answers(model, pixel_values[:1], scope)
        torch.testing.assert_close(predict(pixel_values[:1]), first, rtol=1e-4, atol=1e-4)
        moved = (predict(pixel_values)[:1] - predict(pixel_values[:1])).abs().max()
        assert (moved > 1e-3) if scope == "batch" else (moved < 1e-4), moved


# What is exported


@pytest.fixture(scope="module")
def in_batches(tmp_path_factory):
    """A model exported with scope `batch`: the model, its folder, the export's folder, facts and notes."""
    folder = tmp_path_factory.mktemp("in_batches")
    model = make_model("resnet", "kernel")
    source = save(model, folder / "model")
    facts, notes = run(ExportArguments(str(source), relation_scope="batch", output_dir=str(folder / "out")))
    return model, source, folder / "out", facts, notes


def check_onnx(model, out: Path, facts, notes, scope: str, sizes):
    path = out / "onnx" / "model.onnx"
    check_same_answers(session(path), model, scope, sizes)
    onnx.checker.check_model(path, full_check=True)
    assert json.loads((out / "config.json").read_text())["rbi_export"] == facts
    assert facts["answers_depend_on_batch"] == (scope == "batch")
    properties = {each.key: each.value for each in onnx.load(path).metadata_props}
    assert properties["rbi.relation_scope"] == scope
    assert properties["rbi.answers_depend_on_batch"] == str(scope == "batch").lower()
    assert any("depend on the other images" in note for note in notes) == (scope == "batch")
    # The file names neither the source code nor the folders of this machine.
    assert b"pkg.torch" not in path.read_bytes()
    assert str(Path(exporters.__file__).parent).encode() not in path.read_bytes()


@pytest.mark.slow
def test_onnx_in_scope_batch_for_images_of_any_size(in_batches):
    model, _, out, facts, notes = in_batches
    assert facts["image_size"] == "dynamic"
    check_onnx(model, out, facts, notes, "batch", [(SIZE, SIZE), (96, 80), (72, 130)])


@pytest.mark.slow
def test_onnx_with_votes_and_weights_in_a_separate_file_for_images_of_one_size(tmp_path, monkeypatch):
    """The scope is the model's own, and the references have labels but no thumbnails."""
    monkeypatch.setattr(exporters, "_MAX_FILE_BYTES", 1000)
    model = make_model("vit", "paper", with_references=False)
    images = [{"pixel_values": pixels, "label": row % 3} for row, pixels in enumerate(make_pixel_values(6, seed=5))]
    model.set_references(images, keep_images=False)
    without = answers(model, make_pixel_values(5, seed=9), "reference")
    model.config.reference_vote_weight = 0.5
    out = tmp_path / "out"
    facts, notes = run(ExportArguments(str(save(model, tmp_path / "model")), output_dir=str(out)))
    assert facts["relation_scope"] == "reference" and facts["image_size"] == [SIZE, SIZE]
    assert facts["references"] == {"num_references": 6, "num_labeled": 6, "has_images": False}
    assert not any("copies" in note for note in notes)
    check_onnx(model, out, facts, notes, "reference", [(SIZE, SIZE)])
    assert (session(out / "onnx" / "model.onnx")(make_pixel_values(5, seed=9)) - without).abs().max() > 0.1
    assert (out / "onnx" / "model.onnx_data").exists()
    content = json.loads((out / "config.json").read_text())
    assert content["transformers.js_config"]["use_external_data_format"] == {"model.onnx": 1}


# Loads a program where neither this project nor transformers can be imported, and where nothing may be unpickled.
LOADED = """
import pickle, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_rbi", "training", "transformers"):
            raise ModuleNotFoundError(name)

def refuse(*args, **kwargs):
    raise AssertionError("something is pickled")

sys.meta_path.insert(0, Absent())
import torch

pickle.loads = torch.load = refuse
program = torch.export.load(sys.argv[1]).module()
inputs = torch.frombuffer(bytearray(open(sys.argv[2], "rb").read()), dtype=torch.float32).view(5, 3, 96, 80)
with torch.no_grad():
    sys.stdout.buffer.write(program(inputs).numpy().tobytes())
"""


@pytest.mark.slow
def test_program_needs_only_torch(tmp_path):
    """A fresh process with only torch loads it, unpickles nothing (pickles can run code), and predicts the same."""
    model = make_model("resnet", "kernel", with_references=False)
    # Without labels.
    model.set_references([{"pixel_values": pixels} for pixels in make_pixel_values(6, seed=5)])
    folder = str(save(model, tmp_path / "model"))
    facts, notes = run(ExportArguments(folder, format="torch_export", output_dir=str(tmp_path / "out")))
    assert any("may run code" in note for note in notes) and any("copies" in note for note in notes)
    assert facts["references"] == {"num_references": 6, "num_labeled": 0, "has_images": True}
    path = tmp_path / "out" / "model.pt2"
    assert str(Path(exporters.__file__).parent).encode() not in path.read_bytes()

    program = torch.export.load(path).module()
    check_same_answers(
        lambda pixel_values: program(pixel_values).detach(), model, "reference", [(SIZE, SIZE), (96, 80)]
    )
    pixel_values = make_pixel_values(5, seed=9, size=(96, 80))
    (tmp_path / "inputs").write_bytes(pixel_values.numpy().tobytes())
    words = [sys.executable, "-c", LOADED, str(path), str(tmp_path / "inputs")]
    result = subprocess.run(words, cwd=tmp_path, capture_output=True)
    assert result.returncode == 0, result.stderr.decode()
    got = torch.frombuffer(bytearray(result.stdout), dtype=torch.float32).view(5, 3)
    torch.testing.assert_close(got, answers(model, pixel_values, "reference"), rtol=1e-4, atol=1e-4)


def test_pooling_is_torchs():
    pixels = torch.rand(2, 3, 37, 64)
    rows, columns = exporters._averages(37, 16), exporters._averages(64, 16)
    torch.testing.assert_close(rows @ pixels @ columns.T, torch.nn.functional.adaptive_avg_pool2d(pixels, (16, 16)))


@pytest.fixture(scope="module")
def labeled(image_files, tmp_path_factory):
    """Class folders of images: two of each class in `train`, one in `test`."""
    folder = tmp_path_factory.mktemp("labeled")
    for path in image_files:
        name, number = path.stem.split("_")
        class_folder = folder / ("test" if number == "2" else "train") / name
        class_folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, class_folder)
    return folder


@pytest.fixture(scope="module")
def exported(model_folder, labeled, tmp_path_factory):
    """The small saved model in all precisions: the export's folder, its facts, and the calibration batches."""
    out, seen = tmp_path_factory.mktemp("exported") / "pets", []
    quantize = exporters.OnnxExporter.quantize

    def record(self, folder, pixel_values, num_batches):
        seen.extend(pixel_values)
        return quantize(self, folder, iter(seen), num_batches)

    args = ExportArguments(
        str(model_folder), dtype=["float16", "float32", "int8"], per_device_eval_batch_size=4, output_dir=str(out)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RBI_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        patch.setattr(exporters.OnnxExporter, "quantize", record)
        facts, _ = run(args, MeasuringArguments(train_dir=str(labeled), train_val_split=0))
    return out, facts, seen


@pytest.fixture(scope="module")
def saved_model(model_folder):
    return RBIForImageClassification.from_pretrained(model_folder).eval()


@pytest.mark.slow
def test_onnx_with_references_for_images_of_any_size(exported, saved_model):
    out, facts, _ = exported
    assert facts["image_size"] == "dynamic"
    assert facts["references"] == {"num_references": 6, "num_labeled": 6, "has_images": True}
    check_same_answers(session(out / "onnx" / "model.onnx"), saved_model, "reference", [(32, 32), (96, 80)])


@pytest.mark.slow
def test_float16_has_weights_of_half_the_size(exported, saved_model, monkeypatch):
    out, facts, _ = exported
    graph = onnx.load(out / "onnx" / "model_fp16.onnx").graph
    halves = [each for each in graph.initializer if each.data_type == onnx.TensorProto.FLOAT16]
    assert sum(np.prod(each.dims) for each in halves) > 0.8 * sum(
        each.numel() for each in saved_model.rbi.backbone.parameters()
    )
    pixel_values = make_pixel_values(5, seed=9, size=(32, 32))
    predict = session(out / "onnx" / "model_fp16.onnx")
    difference = (predict(pixel_values) - answers(saved_model, pixel_values, "reference")).abs().max().item()
    # Rounding to 11 bits changes the logits, but little.
    assert 0 < difference < 0.05
    assert 0 < facts["files"]["onnx/model_fp16.onnx"]["max_logit_difference"] < 0.05

    exporter = exporters.OnnxExporter(saved_model, "reference", (32, 32))
    file = exporters.ExportedFile(out / "onnx" / "model_fp16.onnx", predict)
    assert 0 < exporter.compare(file, is_half=True) < 0.05
    monkeypatch.setattr(exporters, "MAX_HALF_DIFFERENCE", 1e-7)
    with pytest.raises(UserError, match=r"The probabilities of model_fp16\.onnx differ from the model's by"):
        exporter.compare(file, is_half=True)


@pytest.mark.slow
def test_int8_is_calibrated_on_some_images_and_measured_on_others(exported, saved_model, model_folder, labeled):
    out, facts, seen = exported
    assert [*map(len, seen)] == [4, 2] and facts["measured_on"] == {"split": "test", "images": 3}
    image_processor = AutoImageProcessor.from_pretrained(model_folder)
    images = [Image.open(path) for path in sorted((labeled / "test").glob("*/*.png"))]
    pixel_values = image_processor(images, return_tensors="pt")["pixel_values"]
    assert not any(torch.allclose(one, other) for batch in seen for one in batch for other in pixel_values)
    expected = answers(saved_model, pixel_values, "reference").argmax(-1)
    assert len(facts["files"]) == 3
    for name, entry in facts["files"].items():
        classes = session(out / name)(pixel_values).argmax(-1)
        measured = entry["measured"]
        assert measured["accuracy"] == pytest.approx((classes == torch.arange(3)).float().mean().item())
        assert measured["model_accuracy"] == pytest.approx((expected == torch.arange(3)).float().mean().item())
        assert measured["agreement"] == pytest.approx((classes == expected).float().mean().item())
    content = json.loads((out / "config.json").read_text())
    assert content["transformers.js_config"]["dtype"] == "fp16"  # the first requested one
    graph = onnx.load(out / "onnx" / "model_quantized.onnx").graph
    assert sum(each.data_type == onnx.TensorProto.INT8 for each in graph.initializer) >= 16


# What is refused, and leaves nothing behind


def check_refused(message: str, tmp_path: Path, *args, data=None, **more):
    with pytest.raises((ValueError, OSError), match=message):
        run(ExportArguments(*args, output_dir=str(tmp_path / "refused"), **more), data)
    left = list((tmp_path / "refused").rglob("*")) if (tmp_path / "refused").exists() else []
    assert left == []


@pytest.fixture
def replace_file(monkeypatch):
    """Skips the export: the written file is empty and predicts a function of the model's logits."""

    def replace(change=lambda logits: logits):
        def write(self, folder, program):
            path = folder / ("model.onnx" if isinstance(self, exporters.OnnxExporter) else "model.pt2")
            path.touch()
            return exporters.ExportedFile(path, lambda pixel_values: change(self.reference(pixel_values)))

        for kind in (exporters.OnnxExporter, exporters.ProgramExporter):
            monkeypatch.setattr(kind, "trace", lambda self, module: None)
            monkeypatch.setattr(kind, "write", write)

    return replace


@pytest.mark.parametrize("name", ["onnx", "torch_export"])
def test_other_answers_are_refused(name, model_folder, tmp_path, replace_file):
    replace_file(lambda logits: logits + torch.tensor([0.0, 0.01, 0.0]))
    check_refused(
        r"logits of model\.(onnx|pt2) differ from the model's by 1.0e-02", tmp_path, str(model_folder), format=name
    )


def test_not_finite_answers_are_refused(model_folder, tmp_path, replace_file):
    replace_file(lambda logits: logits / 0.0)
    check_refused("of them not finite", tmp_path, str(model_folder), format="torch_export")


@pytest.mark.slow
def test_a_backbone_of_one_size_is_not_taken_for_one_of_any(tmp_path, monkeypatch):
    """If an export for any size predicts otherwise at another size, the model is exported for one size."""
    compared = []
    trace, write, compare = (getattr(exporters.ProgramExporter, name) for name in ("trace", "write", "compare"))

    def fail_if_dynamic(self, file, is_half=False):
        compared.append(self.is_dynamic)
        if self.is_dynamic:
            raise ValueError("differs")
        return compare(self, file, is_half)

    monkeypatch.setattr(exporters.ProgramExporter, "compare", fail_if_dynamic)
    # Only the second attempt is really exported.
    monkeypatch.setattr(
        exporters.ProgramExporter, "trace", lambda self, module: None if self.is_dynamic else trace(self, module)
    )
    monkeypatch.setattr(
        exporters.ProgramExporter,
        "write",
        lambda self, folder, program: (
            write(self, folder, program) if program else exporters.ExportedFile(folder / "model.pt2", self.reference)
        ),
    )
    folder = str(save(make_model("resnet", "kernel"), tmp_path / "model"))
    arguments = ExportArguments(folder, format="torch_export", relation_scope="self", output_dir=str(tmp_path / "out"))
    facts, _ = run(arguments)
    assert compared == [True, False] and facts["image_size"] == [SIZE, SIZE]
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    assert program(make_pixel_values(2)).shape == (2, 3)
    with pytest.raises((AssertionError, RuntimeError), match=r"shape|size"):
        program(make_pixel_values(2, size=(96, 80)))


def test_models_that_cannot_be_exported(model_folder, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(model_folder, bare)
    (bare / "preprocessor_config.json").unlink()
    check_refused("has no image processor", tmp_path, str(bare))
    other = tmp_path / "other"
    ViTConfig().save_pretrained(other)
    check_refused("is a vit model, not RBI", tmp_path, str(other))
    model = make_model("resnet", "kernel", with_references=False)
    folder = str(save(model, tmp_path / "without_references"))
    check_refused("has no reference bank", tmp_path, folder, relation_scope="reference")
    check_refused("there is no such folder", tmp_path, str(tmp_path / "nowhere"))
    check_refused("needs images for calibration", tmp_path, folder, dtype=["int8"])


def test_output_folders(model_folder, tmp_path, replace_file):
    replace_file()
    with pytest.raises(UserError, match="holds other files than an export"):
        run(ExportArguments(str(model_folder), output_dir=str(model_folder)))
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match="is a file"):
        run(ExportArguments(str(model_folder), output_dir=str(file)))
    out = tmp_path / "out"
    arguments = ExportArguments(str(model_folder), format="torch_export", relation_scope="self", output_dir=str(out))
    run(arguments)
    (out / "onnx").mkdir()
    (out / "onnx" / "model.onnx").touch()
    # The next export replaces the whole earlier one.
    run(arguments)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.pt2", "preprocessor_config.json"]
    (out / "notes.txt").touch()
    with pytest.raises(UserError, match=r"other files than an export \(notes.txt\)"):
        run(arguments)


# transformers.js


@pytest.fixture(scope="module")
def resized(image_files, tmp_path_factory):
    """Gives the images resized to a square, so that no image processor has to resize them."""

    def make(size: int) -> list[str]:
        folder = tmp_path_factory.mktemp("resized")
        for path in image_files:
            Image.open(path).resize((size, size)).save(folder / path.name)
        return [str(path) for path in sorted(folder.iterdir())]

    return make


@pytest.fixture(scope="module")
def in_node(node, exported, in_batches, resized, image_files):
    """Predictions of both exports in one process of Node.js, and the images that were resized for them."""
    small, large = resized(32), resized(SIZE)[:4]
    pets = {"folder": str(exported[0])}
    requests = {
        "float32": pets | {"images": small, "batches": [small], "dtype": "fp32"},
        "default": pets | {"images": small},
        "original": pets | {"images": [*map(str, image_files)], "dtype": "fp32"},
        "batch": {"folder": str(in_batches[2]), "images": large, "batches": [large]},
    }
    command = [node, "classify.mjs", json.dumps([*requests.values()])]
    result = subprocess.run(command, cwd=NODE_FOLDER, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return dict(zip(requests, json.loads(result.stdout.splitlines()[-1]), strict=True)), small, large


def check_scores(got, expected, tolerance: float):
    for answer, other in zip(got, expected, strict=True):
        scores = {each["label"]: each["score"] for each in answer}
        assert scores == pytest.approx({each["label"]: each["score"] for each in other}, abs=tolerance)


@pytest.mark.slow
def test_transformers_js_answers_as_the_pipeline(in_node, model_folder, image_files):
    got, small, _ = in_node
    classifier = pipeline("image-classification", model=str(model_folder), trust_remote_code=True)
    expected = classifier(small, top_k=None)
    assert len({answer[0]["label"] for answer in expected}) > 1

    # Images that already have the model's size are the same pixels in both.
    check_scores(got["float32"]["single"], expected, 1e-5)
    check_scores(got["float32"]["together"][0], expected, 1e-5)
    assert [answer[0]["label"] for answer in got["float32"]["single"]] == [answer[0]["label"] for answer in expected]
    # Without a dtype, transformers.js uses the first that was exported, float16.
    check_scores(got["default"]["single"], expected, 0.02)
    assert got["default"]["single"] != got["float32"]["single"]

    # Other images are resized differently: without antialiasing, and bilinearly instead of bicubically at the edges.
    expected = classifier([*map(str, image_files)], top_k=None)
    check_scores(got["original"]["single"], expected, 0.15)
    assert [answer[0]["label"] for answer in got["original"]["single"]] == [answer[0]["label"] for answer in expected]


@pytest.mark.slow
def test_transformers_js_relates_a_batch_in_scope_batch(in_node, in_batches):
    got, _, large = in_node
    model, source, *_ = in_batches
    pixel_values = AutoImageProcessor.from_pretrained(source)(
        [Image.open(path) for path in large], return_tensors="pt"
    )["pixel_values"]
    together = answers(model, pixel_values, "batch").softmax(-1)
    single = answers(model, pixel_values, "self").softmax(-1)
    assert (together - single).abs().max() > 1e-3
    for answered, expected in ((got["batch"]["together"][0], together), (got["batch"]["single"], single)):
        named = [
            [{"label": model.config.id2label[number], "score": score} for number, score in enumerate(row)]
            for row in expected.tolist()
        ]
        check_scores(answered, named, 1e-5)
