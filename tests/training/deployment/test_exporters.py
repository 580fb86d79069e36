# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Exports: the same answers as the model's, in ONNX Runtime, in torch alone and in transformers.js."""

import json
import pickle
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, ResNetConfig, ViTConfig, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from modeling_rbi import RBIConfig, RBIForImageClassification, UserError
from training.deployment import exporters
from training.export import ExportArguments, MeasuringArguments, run


NODE_FOLDER = Path(__file__).parents[2] / "node"
SIZE = 64


def make_model(backbone: str, preset: str, with_references: bool = True, **fields) -> RBIForImageClassification:
    """A model of 3 classes whose weights all matter, for images of 64 x 64, and with 6 references if wanted."""
    torch.manual_seed(0)
    small = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2, "image_size": SIZE, "patch_size": 16}
    backbone_config = {
        "resnet": lambda: ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1], layer_type="basic"
        ),
        "vit": lambda: ViTConfig(intermediate_size=32, **small),
        "dinov2": lambda: Dinov2Config(**small),
    }[backbone]()
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


@pytest.mark.parametrize(
    ("backbone", "preset", "scope", "is_dynamic"),
    [
        pytest.param("resnet", "paper", "self", True, marks=pytest.mark.slow),
        pytest.param("resnet", "paper", "reference", True, marks=pytest.mark.slow),
        pytest.param("resnet", "kernel", "batch", True, marks=pytest.mark.slow),
        pytest.param("vit", "kernel", "reference", False, marks=pytest.mark.slow),
        pytest.param("vit", "paper", "batch", False, marks=pytest.mark.slow),
        pytest.param("dinov2", "kernel", "reference", None, marks=pytest.mark.slow),
    ],
)
def test_onnx_answers_as_the_model(backbone, preset, scope, is_dynamic, tmp_path):
    model = make_model(backbone, preset)
    facts, notes = run(
        ExportArguments(str(save(model, tmp_path / "model")), relation_scope=scope, output_dir=str(tmp_path / "out"))
    )
    path = tmp_path / "out" / "onnx" / "model.onnx"
    if is_dynamic is not None:
        assert (facts["image_size"] == "dynamic") == is_dynamic
    sizes = [(SIZE, SIZE)] + ([(96, 80), (72, 130)] if facts["image_size"] == "dynamic" else [])
    check_same_answers(session(path), model, scope, sizes)
    onnx.checker.check_model(path, full_check=True)

    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["rbi_export"] == facts and facts["answers_depend_on_batch"] == (scope == "batch")
    properties = {each.key: each.value for each in onnx.load(path).metadata_props}
    assert properties["rbi.relation_scope"] == scope
    assert properties["rbi.answers_depend_on_batch"] == str(scope == "batch").lower()
    assert any("depend on the other images" in note for note in notes) == (scope == "batch")
    # Nothing of the code that it was made from, nor of the machine.
    assert b"pkg.torch" not in path.read_bytes()
    assert str(Path(exporters.__file__).parent).encode() not in path.read_bytes()


@pytest.mark.slow
def test_votes_and_the_models_own_scope(tmp_path):
    model = make_model("resnet", "kernel")
    folder = save(model, tmp_path / "model")
    without = answers(model, make_pixel_values(5, seed=9), "reference")
    model.config.reference_vote_weight = 0.5
    save(model, folder)
    facts, _ = run(ExportArguments(str(folder), output_dir=str(tmp_path / "out")))
    assert facts["relation_scope"] == "reference"
    predict = session(tmp_path / "out" / "onnx" / "model.onnx")
    check_same_answers(predict, model, "reference")
    assert (predict(make_pixel_values(5, seed=9)) - without).abs().max() > 0.1


@pytest.mark.slow
def test_references_without_images(tmp_path):
    model = make_model("resnet", "kernel", with_references=False)
    images = [{"pixel_values": pixels} for pixels in make_pixel_values(6, seed=5)]
    model.set_references(images, keep_images=False)
    facts, notes = run(ExportArguments(str(save(model, tmp_path / "model")), output_dir=str(tmp_path / "out")))
    assert facts["references"] == {"num_references": 6, "num_labeled": 0, "has_images": False}
    assert not any("copies" in note for note in notes)
    check_same_answers(session(tmp_path / "out" / "onnx" / "model.onnx"), model, "reference")


def test_program_needs_torch_alone(tmp_path, monkeypatch):
    """It answers as the model, and nothing in it is pickled, which would be code to run."""
    model = make_model("resnet", "kernel")
    folder = str(save(model, tmp_path / "model"))
    _, notes = run(ExportArguments(folder, format="torch_export", output_dir=str(tmp_path / "out")))
    assert any("may run code" in note for note in notes)
    path = tmp_path / "out" / "model.pt2"
    assert str(Path(exporters.__file__).parent).encode() not in path.read_bytes()

    def refuse(*args, **kwargs):
        raise AssertionError("something is pickled")

    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    program = torch.export.load(path).module()
    check_same_answers(
        lambda pixel_values: program(pixel_values).detach(), model, "reference", [(SIZE, SIZE), (96, 80)]
    )


def test_pooling_is_torchs():
    pixels = torch.rand(2, 3, 37, 64)
    rows, columns = exporters._averages(37, 16), exporters._averages(64, 16)
    torch.testing.assert_close(rows @ pixels @ columns.T, torch.nn.functional.adaptive_avg_pool2d(pixels, (16, 16)))


@pytest.mark.slow
def test_weights_in_a_file_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(exporters, "_MAX_FILE_BYTES", 1000)
    model = make_model("resnet", "kernel")
    run(ExportArguments(str(save(model, tmp_path / "model")), output_dir=str(tmp_path / "out")))
    assert (tmp_path / "out" / "onnx" / "model.onnx_data").exists()
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert content["transformers.js_config"]["use_external_data_format"] == {"model.onnx": 1}
    check_same_answers(session(tmp_path / "out" / "onnx" / "model.onnx"), model, "reference")


@pytest.fixture(scope="module")
def exported(model_folder, tmp_path_factory):
    """The small saved model in single and in half precision."""
    out = tmp_path_factory.mktemp("exported") / "pets"
    facts, _ = run(ExportArguments(str(model_folder), dtype=["float32", "float16"], output_dir=str(out)))
    return out, facts


def test_float16_has_weights_of_half_the_size(exported, model_folder):
    out, facts = exported
    graph = onnx.load(out / "onnx" / "model_fp16.onnx").graph
    halves = [each for each in graph.initializer if each.data_type == onnx.TensorProto.FLOAT16]
    model = RBIForImageClassification.from_pretrained(model_folder).eval()
    assert sum(np.prod(each.dims) for each in halves) > 0.8 * sum(
        each.numel() for each in model.rbi.backbone.parameters()
    )
    pixel_values = make_pixel_values(5, seed=9, size=(32, 32))
    predict = session(out / "onnx" / "model_fp16.onnx")
    difference = (predict(pixel_values) - answers(model, pixel_values, "reference")).abs().max().item()
    # Rounded, so not the same; to 11 bits, so not far.
    assert 0 < difference < 0.05
    assert 0 < facts["files"]["onnx/model_fp16.onnx"]["max_logit_difference"] < 0.05


@pytest.fixture
def labeled(image_files, tmp_path):
    """Folders of images: two of each class to train, one to test."""
    for path in image_files:
        name, number = path.stem.split("_")
        folder = tmp_path / "images" / ("test" if number == "2" else "train") / name
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)
    return tmp_path / "images"


@pytest.mark.slow
def test_int8_is_calibrated_on_some_images_and_measured_on_others(
    model_folder, labeled, tmp_path, monkeypatch, tmp_path_factory
):
    monkeypatch.setenv("RBI_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    seen = []
    quantize = exporters.OnnxExporter.quantize

    def record(self, folder, pixel_values, num_batches):
        seen.extend(pixel_values)
        return quantize(self, folder, iter(seen), num_batches)

    monkeypatch.setattr(exporters.OnnxExporter, "quantize", record)
    args = ExportArguments(
        str(model_folder), dtype=["int8", "float32"], per_device_eval_batch_size=4, output_dir=str(tmp_path / "out")
    )
    facts, _ = run(args, MeasuringArguments(train_dir=str(labeled), train_val_split=0))
    assert [*map(len, seen)] == [4, 2] and facts["measured_on"] == {"split": "test", "images": 3}

    model = RBIForImageClassification.from_pretrained(model_folder).eval()
    image_processor = AutoImageProcessor.from_pretrained(model_folder)
    images = [Image.open(path) for path in sorted((labeled / "test").glob("*/*.png"))]
    pixel_values = image_processor(images, return_tensors="pt")["pixel_values"]
    assert not any(torch.allclose(one, other) for batch in seen for one in batch for other in pixel_values)
    expected = answers(model, pixel_values, "reference").argmax(-1)
    for name, entry in facts["files"].items():
        classes = session(tmp_path / "out" / name)(pixel_values).argmax(-1)
        measured = entry["measured"]
        assert measured["accuracy"] == pytest.approx((classes == torch.arange(3)).float().mean().item())
        assert measured["model_accuracy"] == pytest.approx((expected == torch.arange(3)).float().mean().item())
        assert measured["agreement"] == pytest.approx((classes == expected).float().mean().item())
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert content["transformers.js_config"]["dtype"] == "q8"  # the first that was asked for
    graph = onnx.load(tmp_path / "out" / "onnx" / "model_quantized.onnx").graph
    assert sum(each.data_type == onnx.TensorProto.INT8 for each in graph.initializer) >= 16


# What is refused, and leaves nothing behind


def check_refused(message: str, tmp_path: Path, *args, data=None, **more):
    with pytest.raises((ValueError, OSError), match=message):
        run(ExportArguments(*args, output_dir=str(tmp_path / "refused"), **more), data)
    left = list((tmp_path / "refused").rglob("*")) if (tmp_path / "refused").exists() else []
    assert left == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["onnx", "torch_export"])
def test_other_answers_are_refused(name, model_folder, tmp_path, monkeypatch):
    forward = exporters.Deployed.forward

    def slightly_off(self, pixel_values):
        return forward(self, pixel_values) + torch.tensor([0.0, 0.01, 0.0])

    monkeypatch.setattr(exporters.Deployed, "forward", slightly_off)
    check_refused(
        r"logits of model\.(onnx|pt2) differ from the model's by 1.0e-02", tmp_path, str(model_folder), format=name
    )


@pytest.mark.slow
def test_not_finite_answers_are_refused(model_folder, tmp_path, monkeypatch):
    forward = exporters.Deployed.forward
    monkeypatch.setattr(exporters.Deployed, "forward", lambda self, pixels: forward(self, pixels) / 0.0)
    check_refused("of them not finite", tmp_path, str(model_folder), format="torch_export")


@pytest.mark.slow
def test_half_precision_that_is_off_is_refused(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(exporters, "MAX_HALF_DIFFERENCE", 1e-7)
    check_refused("The probabilities of .* differ from the model's by", tmp_path, str(model_folder), dtype=["float16"])


@pytest.mark.slow
def test_a_backbone_of_one_size_is_not_taken_for_one_of_any(tmp_path, monkeypatch):
    """Where an export for any size answers otherwise at another size, it is made for one."""
    compared = []
    compare = exporters.Exporter.compare

    def fail_if_dynamic(self, file, is_half=False):
        compared.append(self.is_dynamic)
        if self.is_dynamic:
            raise ValueError("differs")
        return compare(self, file, is_half)

    monkeypatch.setattr(exporters.Exporter, "compare", fail_if_dynamic)
    folder = str(save(make_model("resnet", "kernel"), tmp_path / "model"))
    facts, _ = run(ExportArguments(folder, format="torch_export", output_dir=str(tmp_path / "out")))
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
    folder = str(save(model, tmp_path / "alone"))
    check_refused("has no reference bank", tmp_path, folder, relation_scope="reference")
    check_refused("there is no such folder", tmp_path, str(tmp_path / "nowhere"))
    check_refused("needs images for calibration", tmp_path, folder, dtype=["int8"])


@pytest.mark.slow
def test_output_folders(model_folder, tmp_path):
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
    # Another export takes its place, and leaves nothing of it.
    run(arguments)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.pt2", "preprocessor_config.json"]
    (out / "notes.txt").touch()
    with pytest.raises(UserError, match=r"other files than an export \(notes.txt\)"):
        run(arguments)


# transformers.js


def classify_in_node(node: str, folder: Path, images, batches=(), dtype=None) -> dict:
    request = {"folder": str(folder), "images": [*map(str, images)], "dtype": dtype}
    request["batches"] = [[*map(str, batch)] for batch in batches]
    command = [node, "classify.mjs", json.dumps(request)]
    result = subprocess.run(command, cwd=NODE_FOLDER, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def check_scores(got, expected, tolerance: float):
    for answer, other in zip(got, expected, strict=True):
        scores = {each["label"]: each["score"] for each in answer}
        assert scores == pytest.approx({each["label"]: each["score"] for each in other}, abs=tolerance)


def test_transformers_js_answers_as_the_pipeline(node, exported, model_folder, image_files, tmp_path):
    out, _ = exported
    sized = []
    for path in image_files:
        sized.append(tmp_path / path.name)
        Image.open(path).resize((32, 32)).save(sized[-1])
    classifier = pipeline("image-classification", model=str(model_folder), trust_remote_code=True)
    expected = classifier([*map(str, sized)], top_k=None)
    assert len({answer[0]["label"] for answer in expected}) > 1

    # Of the model's size already, images are the same pixels in both.
    got = classify_in_node(node, out, sized, [sized])
    check_scores(got["alone"], expected, 1e-5)
    check_scores(got["together"][0], expected, 1e-5)
    check_scores(classify_in_node(node, out, sized, dtype="fp16")["alone"], expected, 0.02)
    assert [answer[0]["label"] for answer in got["alone"]] == [answer[0]["label"] for answer in expected]

    # Others are resized otherwise: without smoothing, and bilinearly for bicubic on the edges.
    expected = classifier([*map(str, image_files)], top_k=None)
    got = classify_in_node(node, out, image_files)["alone"]
    check_scores(got, expected, 0.15)
    assert [answer[0]["label"] for answer in got] == [answer[0]["label"] for answer in expected]


@pytest.mark.slow
def test_transformers_js_relates_a_batch_in_scope_batch(node, tmp_path, image_files):
    out = tmp_path / "out"
    model = make_model("vit", "kernel")
    run(ExportArguments(str(save(model, tmp_path / "model")), relation_scope="batch", output_dir=str(out)))
    sized = []
    for path in image_files[:4]:
        sized.append(tmp_path / path.name)
        Image.open(path).resize((SIZE, SIZE)).save(sized[-1])
    pixel_values = AutoImageProcessor.from_pretrained(tmp_path / "model")(
        [Image.open(path) for path in sized], return_tensors="pt"
    )["pixel_values"]
    together = answers(model, pixel_values, "batch").softmax(-1)
    alone = answers(model, pixel_values, "self").softmax(-1)
    assert (together - alone).abs().max() > 1e-3
    got = classify_in_node(node, out, sized, [sized])
    for answered, expected in ((got["together"][0], together), (got["alone"], alone)):
        named = [
            [{"label": model.config.id2label[number], "score": score} for number, score in enumerate(row)]
            for row in expected.tolist()
        ]
        check_scores(answered, named, 1e-5)
