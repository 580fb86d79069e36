"""RBI with the services that users of transformers expect of every model, on tiny backbones with random weights."""

import copy
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    ConvNextConfig,
    ResNetConfig,
    Trainer,
    TrainingArguments,
    ViTConfig,
    pipeline,
)

# From `transformers` itself, version 5.17 gives it only where there is torchvision, which it does not need.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import modeling_rbi
from modeling_rbi import (
    RBIConfig,
    RBIForImageClassification,
    RBIModel,
    RelationshipPositionEncoding,
    ResidualRelationshipAttention,
)
from tests.modeling_rbi.processes import run_processes, train_distributed
from tests.modeling_rbi.shared import assert_same_answers, make_items


IMAGE_SIZE = 32
LABELS = ["red", "green", "blue"]
BACKBONES = ("convnext", "vit", "resnet")
PRESETS = ("paper", "kernel")
SCOPES = ("self", "batch")


def make_backbone_config(name: str):
    if name == "convnext":
        return ConvNextConfig(hidden_sizes=[12, 24], depths=[1, 1], num_stages=2, image_size=IMAGE_SIZE)
    if name == "vit":
        size = {"hidden_size": 24, "intermediate_size": 32, "image_size": IMAGE_SIZE, "patch_size": 8}
        return ViTConfig(num_hidden_layers=2, num_attention_heads=2, **size)
    return ResNetConfig(embedding_size=8, hidden_sizes=[12, 24], depths=[1, 1], layer_type="basic")


def make_config(backbone: str = "convnext", preset: str = "kernel", **kwargs) -> RBIConfig:
    kwargs.setdefault("id2label", dict(enumerate(LABELS)))
    kwargs.setdefault("label2id", {label: index for index, label in enumerate(LABELS)})
    return getattr(RBIConfig, preset)(backbone_config=make_backbone_config(backbone), **kwargs)


def make_model(backbone: str = "convnext", preset: str = "kernel", **kwargs) -> RBIForImageClassification:
    """A model in evaluation whose weights are all well away from 0, so that each of them matters for the logits."""
    torch.manual_seed(0)
    model = RBIForImageClassification(make_config(backbone, preset, **kwargs)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def make_pixel_values(batch_size: int = 7, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(batch_size, 3, 4, 4, generator=generator)
    images = torch.nn.functional.interpolate(images, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear")
    mean, std = torch.tensor(RBIConfig().image_mean), torch.tensor(RBIConfig().image_std)
    return (images - mean[:, None, None]) / std[:, None, None]


def make_image(label: int, seed: int, size: tuple[int, int] = (40, 36)) -> Image.Image:
    """Noise with a tint of the label's color."""
    pixels = np.random.default_rng(seed).integers(0, 120, (*size, 3))
    pixels[..., label] += 60
    return Image.fromarray(pixels.astype("uint8"))


def make_image_processor() -> ViTImageProcessorPil:
    config = RBIConfig()
    return ViTImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, image_mean=config.image_mean, image_std=config.image_std
    )


def save(model: RBIForImageClassification, folder: Path, **kwargs) -> str:
    model.save_pretrained(folder, **kwargs)
    make_image_processor().save_pretrained(folder)
    return str(folder)


def make_model_with_references(backbone: str = "convnext", preset: str = "kernel", **kwargs):
    """As `make_model`, and with 6 references, so that it is in scope "reference"."""
    model = make_model(backbone, preset, **kwargs)
    pixel_values = make_pixel_values(6, seed=10)
    images = [{"pixel_values": image, "label": index % 3} for index, image in enumerate(pixel_values)]
    model.set_references(images)
    return model


def get_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the gradients, those that there are."""
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def assert_same_weights(model: torch.nn.Module, other: torch.nn.Module):
    state, other_state = model.state_dict(), other.state_dict()
    assert state.keys() == other_state.keys()
    for name, value in state.items():
        assert torch.equal(value, other_state[name]), name


# Low precision


def assert_close_to_float32(logits: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype):
    """Far closer to the float32 logits than the logits of different images are to each other."""
    spread = expected.std(0).max()
    assert (logits.float() - expected).abs().max() <= (0.1 if dtype == torch.bfloat16 else 0.02) * spread


# Each backbone, preset, scope and precision with each value of the others.
in_low_precision = pytest.mark.parametrize(
    ("backbone", "preset", "scope", "dtype"),
    [
        ("convnext", "paper", "self", torch.bfloat16),
        ("convnext", "kernel", "batch", torch.float16),
        ("vit", "paper", "batch", torch.float16),
        ("vit", "kernel", "self", torch.bfloat16),
        ("resnet", "paper", "self", torch.float16),
        ("resnet", "kernel", "batch", torch.bfloat16),
    ],
)


@in_low_precision
def test_low_precision_model(backbone, preset, scope, dtype):
    model, labels = make_model(backbone, preset), torch.arange(7) % 3
    # Pixels that both precisions hold exactly.
    pixel_values = make_pixel_values().to(dtype).float()
    arguments = {"relation_scope": scope, "output_relations": True}
    with torch.no_grad():
        expected = model(pixel_values, **arguments)

    model.to(dtype)
    outputs = model(pixel_values.to(dtype), labels=labels, **arguments)
    assert outputs.logits.dtype == dtype
    assert_close_to_float32(outputs.logits, expected.logits, dtype)
    assert outputs.relation_similarities.dtype == torch.float32
    assert_same_answers(outputs.relation_similarities, expected.relation_similarities)
    torch.testing.assert_close(outputs.relation_attentions, expected.relation_attentions, atol=0.05, rtol=0.05)

    outputs.loss.backward()
    gradients = get_gradients(model)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert gradients["rbi.rra.value.weight"].abs().max() > 0


@in_low_precision
def test_autocast(backbone, preset, scope, dtype):
    model, labels, pixel_values = make_model(backbone, preset), torch.arange(7) % 3, make_pixel_values()
    arguments = {"labels": labels, "relation_scope": scope, "output_relations": True}
    expected = model(pixel_values, **arguments)
    expected.loss.backward()
    expected_gradients = get_gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", dtype):
        outputs = model(pixel_values, **arguments)
    outputs.loss.backward()

    assert outputs.logits.dtype == dtype
    assert_close_to_float32(outputs.logits, expected.logits, dtype)
    assert_same_answers(outputs.relation_similarities, expected.relation_similarities)
    gradients = get_gradients(model)
    assert gradients.keys() == expected_gradients.keys()
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    flat, expected_flat = (torch.cat([g.flatten() for g in each.values()]) for each in (gradients, expected_gradients))
    assert torch.nn.functional.cosine_similarity(flat, expected_flat, dim=0) > 0.95


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_from_pretrained_dtype(tmp_path, dtype):
    folder, pixel_values = save(make_model(), tmp_path), make_pixel_values()
    expected = make_model()(pixel_values, relation_scope="batch").logits
    model = AutoModelForImageClassification.from_pretrained(folder, dtype=dtype)
    torch_dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert {parameter.dtype for parameter in model.parameters()} == {torch_dtype}
    logits = model(pixel_values.to(torch_dtype), relation_scope="batch").logits
    assert_close_to_float32(logits, expected, torch_dtype)


def test_dtype_auto(tmp_path):
    folder = save(make_model().to(torch.bfloat16), tmp_path)
    model = AutoModelForImageClassification.from_pretrained(folder, dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    full = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32)
    assert {parameter.dtype for parameter in full.parameters()} == {torch.float32}


def test_half():
    model, pixel_values = make_model(), make_pixel_values()
    expected = model(pixel_values).logits
    assert_close_to_float32(model.half()(pixel_values.half()).logits, expected, torch.float16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_references_under_autocast(backbone, preset, dtype):
    model, pixel_values = make_model_with_references(backbone, preset), make_pixel_values()
    with torch.no_grad():
        expected = model(pixel_values, output_relations=True)
        with torch.autocast("cpu", dtype):
            outputs = model(pixel_values, output_relations=True)
    assert outputs.logits.dtype == dtype
    assert_close_to_float32(outputs.logits, expected.logits, dtype)
    assert_same_answers(outputs.relation_similarities, expected.relation_similarities)


def test_large_features_in_half_precision():
    """Their sum over the batch is beyond what fp16 holds; what is made of them is not."""
    rra = make_model(preset="kernel").rbi.rra.half()
    features, similarities = (1000 + 10 * torch.randn(100, 24)).half(), torch.rand(100, 100)
    is_neighbor = torch.ones(100, dtype=torch.bool)
    outputs, attention, _ = rra(features, similarities, is_neighbor)
    expected, expected_attention, _ = rra.float()(features.float(), similarities, is_neighbor)
    torch.testing.assert_close(outputs.float(), expected, rtol=0.01, atol=0.01 * expected.abs().max().item())
    torch.testing.assert_close(attention, expected_attention, rtol=0.05, atol=0.005)


# Compilation and export


# Tracing, functionalisation and the joint graph of forward and backward, without the slow generation of code.
BACKEND = "aot_eager"


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("preset", "scope", "is_training"),
    [("paper", "self", False), ("paper", "batch", True), ("kernel", "self", True), ("kernel", "batch", False)],
)
def test_compiled_head(preset, scope, is_training):
    model = make_model(preset=preset).train(is_training)
    inputs = {
        "pixel_values": make_pixel_values(),
        "image_features": torch.randn(7, 24),
        "labels": torch.arange(7) % 3,
        "relation_mask": torch.tensor([1, 1, 0, 1, 1, 1, 0]),
        "relation_scope": scope,
        "output_relations": True,
    }
    expected = model(**inputs)
    expected.loss.backward()
    expected_gradients = get_gradients(model)
    model.zero_grad()

    outputs = torch.compile(model, fullgraph=True, backend=BACKEND)(**inputs)
    assert outputs.keys() == expected.keys()
    for name, value in expected.items():
        assert_same_answers(outputs[name], value)
    outputs.loss.backward()
    gradients = get_gradients(model)
    assert gradients.keys() == expected_gradients.keys()
    torch.testing.assert_close(gradients, expected_gradients, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("preset", PRESETS)
def test_compiled_parts(preset):
    config = make_model(preset=preset).config
    pixel_values, features = make_pixel_values(), torch.randn(7, 24)
    rpe, rra = RelationshipPositionEncoding(config), ResidualRelationshipAttention(config)
    similarities, is_finite = rpe(pixel_values)
    compiled_rpe = torch.compile(rpe, fullgraph=True, backend=BACKEND)
    torch.testing.assert_close(compiled_rpe(pixel_values), (similarities, is_finite))
    compiled_rra = torch.compile(rra, fullgraph=True, backend=BACKEND)
    inputs = (features, similarities, is_finite)
    torch.testing.assert_close(compiled_rra(*inputs), rra(*inputs))
    torch.testing.assert_close(compiled_rra(features)[0], rra(features)[0])


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("preset", "is_training"), [("paper", True), ("kernel", False)])
def test_compiled_references(preset, is_training):
    model = make_model_with_references(preset=preset, num_reference_neighbors=4).train(is_training)
    inputs = {
        "pixel_values": make_pixel_values(),
        "image_features": torch.randn(7, 24),
        "labels": torch.arange(7) % 3,
        "reference_mask": torch.rand(7, 6) > 0.3,
        "relation_scope": "reference",
        "output_relations": True,
    }
    expected = model(**inputs)
    expected.loss.backward()
    expected_gradients = get_gradients(model)
    model.zero_grad()

    outputs = torch.compile(model, fullgraph=True, backend=BACKEND)(**inputs)
    for name, value in expected.items():
        assert_same_answers(outputs[name], value)
    outputs.loss.backward()
    torch.testing.assert_close(get_gradients(model), expected_gradients, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("preset", PRESETS)
def test_compiled_head_under_autocast(preset):
    model = make_model(preset=preset)
    inputs = {"pixel_values": make_pixel_values(), "image_features": torch.randn(7, 24), "relation_scope": "batch"}
    compiled = torch.compile(model, fullgraph=True, backend=BACKEND)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert_same_answers(compiled(**inputs).logits, model(**inputs).logits)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("backbone", "preset"), [("convnext", "kernel"), ("vit", "paper"), ("resnet", "kernel")])
def test_no_graph_breaks_in_the_whole(backbone, preset):
    model = make_model(backbone, preset).train()
    report = torch._dynamo.explain(model)(make_pixel_values(), labels=torch.arange(7) % 3)
    assert (report.graph_count, report.graph_break_count) == (1, 0)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("preset", "scope"), [("kernel", "batch"), ("paper", "self"), ("kernel", "reference")])
def test_few_recompilations(preset, scope):
    """The second batch size makes the graph dynamic, and further ones use that; a batch of one has its own graph."""
    model = (make_model_with_references if scope == "reference" else make_model)(preset=preset)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for count, batch_size in enumerate((7, 5, 3, 11, 2, 1), start=1):
        inputs = {"pixel_values": make_pixel_values(batch_size), "image_features": torch.randn(batch_size, 24)}
        with torch.no_grad():
            logits = compiled(**inputs, relation_scope=scope).logits
            assert_same_answers(logits, model(**inputs, relation_scope=scope).logits)
        assert counter.frame_count <= min(count, 2) + (batch_size == 1)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++ on the CPU")
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_head_inductor(monkeypatch, tmp_path):
    # What another run has cached may be for the instructions of another processor.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    # To find the vector instructions, torch compiles a program for each kind.
    monkeypatch.setattr("torch._inductor.cpu_vec_isa.valid_vec_isa_list", list)
    model = make_model(preset="kernel")
    inputs = {"pixel_values": make_pixel_values(), "image_features": torch.randn(7, 24), "relation_scope": "batch"}
    with torch.no_grad():
        logits = torch.compile(model, fullgraph=True)(**inputs).logits
        assert_same_answers(logits, model(**inputs).logits)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "preset", "scope"),
    [
        ("vit", "kernel", "self"),
        ("resnet", "paper", "batch"),
        ("convnext", "kernel", "batch"),
        ("vit", "paper", "reference"),
        ("convnext", "kernel", "reference"),
    ],
)
def test_export_with_dynamic_batch(backbone, preset, scope):
    model = (make_model_with_references if scope == "reference" else make_model)(backbone, preset)
    batch_size = torch.export.Dim("batch_size", min=2, max=64)
    shapes = {"pixel_values": {0: batch_size}, "relation_scope": None}
    arguments = {"relation_scope": scope}
    program = torch.export.export(model, (make_pixel_values(),), arguments, dynamic_shapes=shapes).module()
    for size in (7, 3):
        pixel_values = make_pixel_values(size, seed=size)
        expected = model(pixel_values, **arguments).logits
        assert_same_answers(program(pixel_values, **arguments).logits, expected)


@pytest.mark.slow
def test_export_of_a_deployed_model(tmp_path):
    """The scope is the config's, and the references go with the program into its file."""
    model = make_model_with_references()
    shapes = {"pixel_values": {0: torch.export.Dim("batch_size", min=1, max=64)}}
    program = torch.export.export(model, (make_pixel_values(),), dynamic_shapes=shapes, strict=False)
    torch.export.save(program, tmp_path / "program.pt2")
    del program
    program = torch.export.load(tmp_path / "program.pt2").module()
    for size in (1, 2, 7, 64):
        pixel_values = make_pixel_values(size, seed=size)
        assert_same_answers(program(pixel_values).logits, model(pixel_values).logits)


# Gradient checkpointing


@pytest.mark.parametrize("preset", PRESETS)
def test_gradient_checkpointing(preset):
    model = make_model("vit", preset).train()
    inputs = {"pixel_values": make_pixel_values(), "labels": torch.arange(7) % 3}
    calls = []
    for layer in model.rbi.backbone.layers:
        layer.attention.register_forward_pre_hook(lambda *_: calls.append(1))

    def step():
        calls.clear()
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        return loss, get_gradients(model), len(calls)

    loss, gradients, num_calls = step()
    model.gradient_checkpointing_enable()
    checkpointed_loss, checkpointed_gradients, num_checkpointed_calls = step()
    # Each layer runs once more in the backward.
    assert num_checkpointed_calls == 2 * num_calls == 4
    torch.testing.assert_close(checkpointed_loss, loss)
    torch.testing.assert_close(checkpointed_gradients, gradients, atol=1e-5, rtol=1e-4)
    model._set_gradient_checkpointing(enable=False)
    assert step()[2] == num_calls


def test_no_gradient_checkpointing_without_the_backbones():
    """As the backbone alone, the model says what it cannot do, rather than keep all activations silently."""
    backbone = AutoModel.from_config(make_backbone_config("resnet"))
    assert not backbone.supports_gradient_checkpointing
    with pytest.raises(ValueError, match="checkpointing"):
        make_model("resnet").gradient_checkpointing_enable()


# Trainer


def make_dataset(num_images: int, seed: int) -> datasets.Dataset:
    labels = [index % len(LABELS) for index in range(num_images)]
    columns = {
        "image": [make_image(label, 1000 * seed + index) for index, label in enumerate(labels)],
        "label": labels,
    }
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=LABELS)})
    dataset = datasets.Dataset.from_dict(columns, features=features)
    processor = make_image_processor()

    def transform(examples):
        images = [image.convert("RGB") for image in examples["image"]]
        return {**processor(images, return_tensors="pt"), "label": examples["label"]}

    dataset.set_transform(transform)
    return dataset


@pytest.fixture(scope="module")
def train_dataset():
    return make_dataset(36, seed=1)


@pytest.fixture(scope="module")
def eval_dataset():
    return make_dataset(11, seed=2)


def collate(examples):
    pixel_values = torch.stack([example["pixel_values"] for example in examples])
    return {"pixel_values": pixel_values, "labels": torch.tensor([example["label"] for example in examples])}


def compute_accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def make_trainer(
    folder, train_dataset, eval_dataset, backbone="convnext", preset="kernel", model_kwargs=None, **kwargs
):
    torch.manual_seed(0)
    arguments = {
        "learning_rate": 1e-2,
        "num_train_epochs": 6,
        "per_device_train_batch_size": 12,
        "per_device_eval_batch_size": 8,
        "logging_steps": 3,
        "eval_strategy": "no",
        "save_strategy": "no",
        "remove_unused_columns": False,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return Trainer(
        model=RBIForImageClassification(make_config(backbone, preset, **(model_kwargs or {}))),
        args=TrainingArguments(str(folder), **(arguments | kwargs)),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=collate,
        compute_metrics=compute_accuracy,
        processing_class=make_image_processor(),
    )


def get_losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "preset"), [("convnext", "kernel"), ("vit", "paper"), ("resnet", "kernel"), ("convnext", "paper")]
)
def test_trainer(tmp_path, train_dataset, eval_dataset, backbone, preset):
    trainer = make_trainer(tmp_path, train_dataset, eval_dataset, backbone, preset, num_train_epochs=12)
    trainer.train()
    losses = get_losses(trainer)
    assert min(losses) < losses[0] / 2
    # In evaluation the default scope is "self". The kernel keeps what it learned in the scope "batch"; of the paper's
    # head, which starts at random, that cannot be expected.
    assert trainer.model.config.relation_scope == "self"
    metrics = trainer.evaluate()
    assert math.isfinite(metrics["eval_loss"])
    assert metrics["eval_accuracy"] > (0.9 if preset == "kernel" else 0.5)
    trainer.model.config.relation_scope = "batch"
    assert trainer.evaluate(train_dataset)["eval_accuracy"] > 0.9
    trainer.model.config.relation_scope = "self"

    prediction = trainer.predict(eval_dataset)
    assert prediction.predictions.shape == (len(eval_dataset), len(LABELS))
    assert prediction.label_ids.tolist() == list(eval_dataset.with_format(None)["label"])

    trainer.save_model(tmp_path / "final")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "final")
    assert type(model) is RBIForImageClassification
    assert_same_weights(model, trainer.model)
    images = list(eval_dataset.with_format(None)["image"])
    answers = pipeline("image-classification", str(tmp_path / "final"), top_k=1)(images)
    predicted = prediction.predictions.argmax(-1)
    assert [answer["label"] for (answer,) in answers] == [LABELS[index] for index in predicted]


def test_evaluation_does_not_depend_on_its_batches(tmp_path, train_dataset, eval_dataset):
    losses = {}
    for scope in SCOPES:
        for batch_size in (1, 4, 11):
            trainer = make_trainer(
                tmp_path,
                train_dataset,
                eval_dataset,
                model_kwargs={"relation_scope": scope},
                per_device_eval_batch_size=batch_size,
            )
            trainer.model.load_state_dict(make_model().state_dict())
            losses[scope, batch_size] = trainer.evaluate()["eval_loss"]
    assert losses["self", 1] == pytest.approx(losses["self", 4], abs=1e-5)
    assert losses["self", 1] == pytest.approx(losses["self", 11], abs=1e-5)
    # Where the batch is asked for, it matters.
    assert abs(losses["batch", 1] - losses["batch", 11]) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("backbone", BACKBONES)
def test_trainer_resumes(tmp_path, train_dataset, eval_dataset, backbone):
    arguments = {
        "model_kwargs": {"classifier_dropout": 0.1, "attention_dropout": 0.1},
        "num_train_epochs": 3,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
    }
    whole = make_trainer(tmp_path / "whole", train_dataset, eval_dataset, backbone, **arguments)
    whole.train()
    assert len(list((tmp_path / "whole").glob("checkpoint-*"))) == 3

    resumed = make_trainer(tmp_path / "resumed", train_dataset, eval_dataset, backbone, **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert resumed.state.global_step == whole.state.global_step == 9
    # The same steps, but for rounding, which AdamW multiplies: a step moves each weight by up to 1e-2.
    weights, expected = resumed.model.state_dict(), whole.model.state_dict()
    torch.testing.assert_close(weights, expected, atol=1e-3, rtol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", BACKBONES)
def test_trainer_loads_the_best_model(tmp_path, train_dataset, eval_dataset, backbone):
    trainer = make_trainer(
        tmp_path,
        train_dataset,
        eval_dataset,
        backbone,
        load_best_model_at_end=True,
        eval_strategy="epoch",
        save_strategy="epoch",
        # The loss falls, so that by this measure the first checkpoint is the best one.
        metric_for_best_model="loss",
        greater_is_better=True,
        num_train_epochs=3,
        save_total_limit=2,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-3")
    best = AutoModelForImageClassification.from_pretrained(trainer.state.best_model_checkpoint)
    assert_same_weights(trainer.model, best)
    last = AutoModelForImageClassification.from_pretrained(tmp_path / "checkpoint-9")
    assert not torch.equal(last.classifier.weight, best.classifier.weight)
    assert type(AutoImageProcessor.from_pretrained(tmp_path / "checkpoint-9")) is ViTImageProcessorPil


@pytest.mark.slow
@pytest.mark.parametrize("backbone", BACKBONES)
def test_trainer_with_references(tmp_path, train_dataset, eval_dataset, backbone):
    """The head is trained on a backbone that stays as it is, so that the references stay its own."""
    trainer = make_trainer(
        tmp_path,
        train_dataset,
        eval_dataset,
        backbone,
        load_best_model_at_end=True,
        eval_strategy="epoch",
        save_strategy="epoch",
        metric_for_best_model="loss",
        greater_is_better=True,
        num_train_epochs=2,
    )
    model = trainer.model
    model.rbi.backbone.requires_grad_(False)
    model.set_references(train_dataset, per_class=4)
    features = model.rbi.references.features.clone()
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-3")
    assert torch.equal(model.rbi.references.features, features)
    assert model.config.relation_scope == "reference"

    logits = torch.from_numpy(trainer.predict(eval_dataset).predictions)
    pixel_values = collate(list(eval_dataset))["pixel_values"]
    model = trainer.model.eval()
    torch.testing.assert_close(logits, model(pixel_values).logits.detach(), atol=1e-5, rtol=1e-5)
    # ResNet's statistics of the batch change in training, whatever has a gradient: its references do not stay its own.
    kwargs = {"references": None, "relation_scope": "self"} if backbone == "resnet" else {}
    best = AutoModelForImageClassification.from_pretrained(trainer.state.best_model_checkpoint, **kwargs)
    scope = "self" if backbone == "resnet" else None
    for image_values in pixel_values.split(4):
        expected = best(image_values).logits
        assert_same_answers(model(image_values, relation_scope=scope).logits, expected)


def test_load_state_dict_takes_what_was_saved(tmp_path):
    """For ViT the file has other names than the modules; the Trainer of transformers loads the file unchanged."""
    model = make_model("vit")
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    other = RBIForImageClassification(make_config("vit"))
    other.load_state_dict(saved)
    assert_same_weights(other, model)

    del saved["classifier.bias"]
    with pytest.raises(RuntimeError, match=r"classifier\.bias"):
        other.load_state_dict(saved)
    saved["surplus"] = torch.zeros(1)
    outcome = other.load_state_dict(saved, strict=False)
    assert (outcome.missing_keys, outcome.unexpected_keys) == (["classifier.bias"], ["surplus"])
    assert_same_weights(other, model)


@pytest.mark.slow
def test_trainer_label_smoothing(tmp_path, train_dataset, eval_dataset):
    trainer = make_trainer(tmp_path, train_dataset, eval_dataset, label_smoothing_factor=0.1, num_train_epochs=8)
    trainer.train()
    assert trainer.evaluate(train_dataset)["eval_accuracy"] > 0.9
    # The least smoothed loss there is: the entropy of the smoothed labels.
    smoothed = [0.9 + 0.1 / 3, 0.1 / 3, 0.1 / 3]
    entropy = -sum(value * math.log(value) for value in smoothed)
    losses = get_losses(trainer)
    assert losses[0] > losses[-1] > entropy


@pytest.mark.slow
def test_trainer_gradient_accumulation(tmp_path, train_dataset, eval_dataset):
    """One step is the mean of the gradients of its batches, each of which only relates its own images."""
    arguments = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2, "max_steps": 1}
    arguments |= {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.1}
    trainer = make_trainer(tmp_path, train_dataset, eval_dataset, **arguments)
    model, batches = copy.deepcopy(trainer.model).train(), []
    trainer.data_collator = lambda examples: batches.append(collate(examples)) or batches[-1]
    trainer.train()
    sum(model(**batch).loss for batch in batches[:2]).div(2).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(parameter.grad, alpha=0.1)
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], atol=1e-5, rtol=1e-4, msg=name)

    trainer = make_trainer(tmp_path, train_dataset, eval_dataset, num_train_epochs=12, gradient_accumulation_steps=2)
    trainer.train()
    assert trainer.evaluate(train_dataset)["eval_accuracy"] > 0.9


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [{"bf16": True}, {"gradient_checkpointing": True}], ids=lambda value: next(iter(value))
)
def test_trainer_saves_memory(tmp_path, train_dataset, eval_dataset, arguments):
    trainer = make_trainer(tmp_path, train_dataset, eval_dataset, "vit", num_train_epochs=8, **arguments)
    trainer.train()
    assert trainer.evaluate(train_dataset)["eval_accuracy"] > 0.9


# Pipeline


@pytest.fixture(scope="module")
def saved_folder(tmp_path_factory):
    return save(make_model(), tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def classifier(saved_folder):
    return pipeline("image-classification", saved_folder)


@pytest.fixture(scope="module")
def images():
    return [make_image(index % 3, seed=index, size=(40 + index, 50 - index)) for index in range(7)]


def get_scores(answers) -> list[list[float]]:
    """Scores in the order of LABELS, one row for each image."""
    by_label = [{answer["label"]: answer["score"] for answer in each} for each in answers]
    return [[each[label] for label in LABELS] for each in by_label]


def test_pipeline(classifier, images):
    model, processor = make_model(), make_image_processor()
    with torch.no_grad():
        expected = model(**processor(images, return_tensors="pt")).logits.softmax(-1)
    single = get_scores([classifier(image) for image in images])
    torch.testing.assert_close(torch.tensor(single), expected)
    for batch_size in (1, 2, 7):
        scores = get_scores(classifier(images, batch_size=batch_size))
        assert scores == [pytest.approx(row, abs=1e-5) for row in single]
    # Not that the answers were all the same.
    assert expected.std(0).max() > 0.01


def test_pipeline_top_k(classifier, images):
    every = classifier(images[0], top_k=3)
    assert sorted(answer["label"] for answer in every) == sorted(LABELS)
    assert [answer["score"] for answer in every] == sorted((answer["score"] for answer in every), reverse=True)
    assert sum(answer["score"] for answer in every) == pytest.approx(1)
    assert_same_scores(classifier(images[0], top_k=1), every[:1])
    for three, best in zip(classifier(images, top_k=3), classifier(images, top_k=1), strict=True):
        assert_same_scores(three[:1], best)


def test_pipeline_answers_do_not_depend_on_the_company(tmp_path, classifier, images):
    others = [make_image(1, seed=index) for index in range(50, 56)]
    first, second = ([images[0], *company] for company in (images[1:], others))
    assert_same_scores(classifier(first, batch_size=7)[0], classifier(second, batch_size=7)[0])

    related = pipeline("image-classification", save(make_model(relation_scope="batch"), tmp_path))
    answers = get_scores([related(batch, batch_size=7)[0] for batch in (first, second)])
    assert max(abs(score - other) for score, other in zip(*answers, strict=True)) > 1e-3


def test_pipeline_with_references(tmp_path, classifier, images):
    others = [make_image(1, seed=index) for index in range(50, 56)]
    model = make_model_with_references()
    related = pipeline("image-classification", save(model, tmp_path))
    assert related.model.config.relation_scope == "reference"
    first, second = ([images[0], *company] for company in (images[1:], others))
    assert_same_scores(related(first, batch_size=7)[0], related(second, batch_size=7)[0])
    with torch.no_grad():
        expected = model(**make_image_processor()(images, return_tensors="pt")).logits.softmax(-1)
    for batch_size in (1, 3, 7):
        scores = get_scores(related(images, batch_size=batch_size))
        assert scores == [pytest.approx(row, abs=1e-5) for row in expected.tolist()]
    without = torch.tensor(get_scores(classifier(images)))
    assert (without - expected).abs().max() > 1e-3


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "I;16", "CMYK"])
def test_pipeline_image_modes(tmp_path, classifier, images, mode):
    image = images[0].convert("L").convert("I;16") if mode == "I;16" else images[0].convert(mode)
    expected = classifier(image.convert("RGB"))
    assert_same_scores(classifier(image), expected)
    in_batches = [classifier([first, images[1]], batch_size=2)[0] for first in (image, image.convert("RGB"))]
    assert_same_scores(*in_batches)
    if mode != "CMYK":
        image.save(tmp_path / "image.png")
        assert_same_scores(classifier(str(tmp_path / "image.png")), expected)


def test_pipeline_low_precision(saved_folder, classifier, images):
    low = get_scores(pipeline("image-classification", saved_folder, dtype=torch.bfloat16)(images))
    full = get_scores(classifier(images))
    assert low == [pytest.approx(row, abs=0.02) for row in full]


# Saving and loading


def test_auto_classes_know_rbi(tmp_path):
    config = make_config()
    assert type(AutoConfig.for_model("rbi")) is RBIConfig
    assert type(AutoModel.from_config(config)) is RBIModel
    assert type(AutoModelForImageClassification.from_config(config)) is RBIForImageClassification

    model, pixel_values = make_model(), make_pixel_values()
    folder = save(model, tmp_path)
    assert type(AutoConfig.from_pretrained(folder)) is RBIConfig
    assert type(AutoImageProcessor.from_pretrained(folder)) is ViTImageProcessorPil
    classifier = AutoModelForImageClassification.from_pretrained(folder)
    assert type(classifier) is RBIForImageClassification
    assert not classifier.training
    assert classifier.config.id2label == dict(enumerate(LABELS))
    assert_same_answers(classifier(pixel_values).logits, model(pixel_values).logits)
    base = AutoModel.from_pretrained(folder)
    assert type(base) is RBIModel
    assert_same_weights(base, model.rbi)


def test_base_model_becomes_a_classifier(tmp_path):
    """The weights of the base are taken, and the classifier is new."""
    base = make_model().rbi
    base.save_pretrained(tmp_path)
    model, info = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=4, output_loading_info=True)
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
    assert_same_weights(model.rbi, base)
    assert model(make_pixel_values()).logits.shape == (7, 4)


def test_another_number_of_classes(saved_folder):
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForImageClassification.from_pretrained(saved_folder, num_labels=10)

    model, info = AutoModelForImageClassification.from_pretrained(
        saved_folder, num_labels=10, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {entry[0] for entry in info["mismatched_keys"]} == {"classifier.weight", "classifier.bias"}
    assert_same_weights(model.rbi, make_model().rbi)
    assert model.classifier.weight.isfinite().all()
    assert model(make_pixel_values()).logits.shape == (7, 10)
    assert len(model.config.id2label) == 10


@pytest.mark.parametrize("backbone", BACKBONES)
def test_sharded(tmp_path, backbone):
    model = make_model(backbone)
    save(model, tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert not (tmp_path / "model.safetensors").exists()
    assert_same_weights(AutoModelForImageClassification.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_loads_without_a_second_copy(monkeypatch, tmp_path, backbone):
    """The model is built on the meta device, so that no weight is made to be overwritten by the one from the file."""
    folder = save(make_model(backbone), tmp_path)
    devices, initialized = [], []

    def post_init(self):
        devices.extend(parameter.device.type for parameter in self.parameters())
        original_post_init(self)

    def init_weights(self, module):
        initialized.extend(
            name
            for name, parameter in module.named_parameters(recurse=False)
            if not getattr(parameter, "_is_hf_initialized", False)
        )
        original_init_weights(self, module)

    original_post_init = RBIForImageClassification.post_init
    original_init_weights = RBIForImageClassification._init_weights
    monkeypatch.setattr(RBIForImageClassification, "post_init", post_init)
    monkeypatch.setattr(RBIForImageClassification, "_init_weights", init_weights)
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert set(devices) == {"meta"}
    assert initialized == []
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}

    # That both are seen where they happen.
    devices.clear()
    RBIForImageClassification(model.config)
    assert set(devices) == {"cpu"}
    assert "weight" in initialized


OFFLOADED_HEAD = {"rbi.backbone": "cpu", "rbi.rpe": "cpu", "rbi.rra": "disk", "dropout": "cpu", "classifier": "disk"}
OFFLOADED_BACKBONE = {
    "rbi.backbone": "disk",
    "rbi.rpe": "cpu",
    "rbi.rra": "cpu",
    "dropout": "cpu",
    "classifier": "cpu",
}


@pytest.mark.parametrize(
    ("arguments", "is_offloaded"),
    [
        ({"device_map": "auto"}, False),
        ({"device_map": "cpu"}, False),
        ({"device_map": {"": "cpu"}}, False),
        ({"device_map": "auto", "max_memory": {"cpu": "60KB"}}, True),
        ({"device_map": OFFLOADED_HEAD}, True),
        ({"device_map": OFFLOADED_BACKBONE}, True),
    ],
    ids=["auto", "cpu", "all_cpu", "auto_offloaded", "head_offloaded", "backbone_offloaded"],
)
@pytest.mark.parametrize("preset", PRESETS)
def test_device_map(tmp_path, preset, arguments, is_offloaded):
    model, pixel_values = make_model("vit", preset), make_pixel_values()
    folder = save(model, tmp_path / "saved", max_shard_size="20KB")
    offload_folder = str(tmp_path / "offload")
    placed = AutoModelForImageClassification.from_pretrained(folder, offload_folder=offload_folder, **arguments)
    # Offloaded weights are on the meta device until the module that holds them is called.
    assert any(parameter.device.type == "meta" for parameter in placed.parameters()) == is_offloaded
    for scope in SCOPES:
        with torch.no_grad():
            logits = placed(pixel_values, relation_scope=scope).logits
            assert_same_answers(logits, model(pixel_values, relation_scope=scope).logits)


@pytest.mark.parametrize(
    "device_map",
    ["auto", "cpu", OFFLOADED_HEAD | {"rbi.references": "cpu"}, OFFLOADED_BACKBONE | {"rbi.references": "cpu"}],
    ids=["auto", "cpu", "head_offloaded", "backbone_offloaded"],
)
@pytest.mark.parametrize("preset", PRESETS)
def test_device_map_with_references(tmp_path, preset, device_map):
    model, pixel_values = make_model_with_references("vit", preset), make_pixel_values()
    folder = save(model, tmp_path / "saved", max_shard_size="20KB")
    offload_folder = str(tmp_path / "offload")
    placed = AutoModelForImageClassification.from_pretrained(
        folder, device_map=device_map, offload_folder=offload_folder
    )
    with torch.no_grad():
        assert_same_answers(placed(pixel_values).logits, model(pixel_values).logits)


@pytest.mark.parametrize(
    "make_copy", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize(("backbone", "preset"), [("convnext", "kernel"), ("vit", "paper"), ("resnet", "kernel")])
def test_copies(backbone, preset, make_copy):
    model, pixel_values = make_model_with_references(backbone, preset), make_pixel_values()
    expected = {scope: model(pixel_values, relation_scope=scope).logits for scope in ("batch", "reference")}
    other = make_copy(model)
    assert other.config.to_dict() == model.config.to_dict()
    assert_same_weights(other, model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.remove_references()
    for scope, logits in expected.items():
        assert_same_answers(other(pixel_values, relation_scope=scope).logits, logits)


# Where the package is not installed


WITHOUT_PACKAGE = """
import importlib.abc, json, os, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "modeling_rbi":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
try:
    import modeling_rbi
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("the package can be imported")

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor

work = sys.argv[1]
pixel_values = load_file(os.path.join(work, "inputs.safetensors"))["pixel_values"]
reports = {}
for source, target in json.load(open(os.path.join(work, "jobs.json"))):
    report = reports[os.path.basename(source)] = {"refusals": []}
    for auto_class in (AutoConfig, AutoModel, AutoModelForImageClassification):
        try:
            auto_class.from_pretrained(source)
        except ValueError as error:
            report["refusals"].append(str(error))

    config = AutoConfig.from_pretrained(source, trust_remote_code=True)
    model = AutoModelForImageClassification.from_pretrained(source, trust_remote_code=True)
    base = AutoModel.from_pretrained(source, trust_remote_code=True)
    processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=True)
    classifier = pipeline("image-classification", source, trust_remote_code=True)
    report["classes"] = [type(each).__name__ for each in (config, model, base, processor, classifier.model)]
    report["modules"] = [type(each).__module__ for each in (config, model, base, classifier.model)]
    report["answers"] = classifier(os.path.join(work, "image.png"))
    with torch.no_grad():
        results = {"default": model(pixel_values).logits, "batch": model(pixel_values, relation_scope="batch").logits}
        results["base"] = base(pixel_values, relation_scope="batch").pooler_output
    if target is None:
        model.add_classes(["jay"], [{"pixel_values": pixel_values[0], "labels": 0}])
        with torch.no_grad():
            results["more_classes"] = model(pixel_values).logits
        report["names"] = list(model.config.id2label.values())
    else:
        (base if "base" in os.path.basename(target) else model).save_pretrained(target)
        processor.save_pretrained(target)
    save_file(results, os.path.join(work, os.path.basename(source) + ".safetensors"))
assert "modeling_rbi" not in sys.modules
json.dump(reports, open(os.path.join(work, "reports.json"), "w"))
"""


def make_kernel_with_new_classes() -> RBIForImageClassification:
    """An untrained kernel, whose votes go by likeness, with references of its three classes and of two new ones."""
    torch.manual_seed(0)
    model = RBIForImageClassification(make_config())
    with torch.no_grad():
        for name, parameter in model.eval().rbi.backbone.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
            elif "layer_scale" in name:
                parameter.fill_(1)
    model.set_references(make_items(6, [0, 1, 2, 0, 1, 2], seed=10))
    model.add_classes(["owl", "crow"], make_items(4, [0, 1, 0, 1], seed=21))
    return model


@pytest.fixture(scope="module")
def without_package(saved_folder, tmp_path_factory):
    """
    One process that cannot import the package. It loads folders, with and without references, by the code that they
    carry, saves them again, loads these, and adds a class to a model. Its folder, and the results by folder name.
    """
    work = tmp_path_factory.mktemp("work")
    make_image(1, seed=5).save(work / "image.png")
    save_file({"pixel_values": make_pixel_values()}, work / "inputs.safetensors")
    shutil.copytree(saved_folder, work / "first")
    jobs = [("first", "second"), ("second", "base"), ("new_classes", None)]
    save(make_kernel_with_new_classes(), work / "new_classes")
    for preset in PRESETS:
        save(make_model_with_references("vit", preset), work / f"{preset}_first")
        jobs += [(f"{preset}_first", f"{preset}_second"), (f"{preset}_second", f"{preset}_third")]
    paths = [[str(work / source), target and str(work / target)] for source, target in jobs]
    (work / "jobs.json").write_text(json.dumps(paths))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "home"), "HF_MODULES_CACHE": str(work / "modules")}
    result = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_PACKAGE, str(work)],
        env=environment,
        cwd=work,
        # Where it can ask, transformers asks whether to trust the code.
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    reports = json.loads((work / "reports.json").read_text())
    return work, {name: (report, load_file(work / f"{name}.safetensors")) for name, report in reports.items()}


def assert_same_scores(answers, expected):
    """What a pipeline answers, but for rounding."""
    assert [answer["label"] for answer in answers] == [answer["label"] for answer in expected]
    scores, expected_scores = (torch.tensor([answer["score"] for answer in each]) for each in (answers, expected))
    assert_same_answers(scores, expected_scores)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["first", "second"])
def test_loads_where_the_package_is_not_installed(without_package, classifier, name):
    model, pixel_values = make_model(), make_pixel_values()
    with torch.no_grad():
        expected = {
            "default": model(pixel_values).logits,
            "batch": model(pixel_values, relation_scope="batch").logits,
            "base": model.rbi(pixel_values, relation_scope="batch").pooler_output,
        }
    report, results = without_package[1][name]
    assert len(report["refusals"]) == 3
    assert all("trust_remote_code=True" in refusal for refusal in report["refusals"])
    assert report["classes"][:3] == ["RBIConfig", "RBIForImageClassification", "RBIModel"]
    assert report["classes"][3:] == ["ViTImageProcessorPil", "RBIForImageClassification"]
    assert all(module.startswith("transformers_modules.") for module in report["modules"])
    assert results.keys() == expected.keys()
    for key, value in expected.items():
        assert_same_answers(results[key], value)
    assert_same_scores(report["answers"], classifier(make_image(1, seed=5)))


@pytest.mark.slow
def test_saved_again_where_the_package_is_not_installed(without_package):
    first, second, base = folders = [without_package[0] / name for name in ("first", "second", "base")]
    assert sorted(path.name for path in first.iterdir()) == sorted(path.name for path in second.iterdir())
    for path in Path(modeling_rbi.__file__).parent.glob("*_rbi.py"):
        assert {(folder / path.name).read_text() for folder in folders} == {path.read_text()}
    for folder in folders:
        assert json.loads((folder / "config.json").read_text())["auto_map"] == {
            "AutoConfig": "configuration_rbi.RBIConfig",
            "AutoModel": "modeling_rbi.RBIModel",
            "AutoModelForImageClassification": "modeling_rbi.RBIForImageClassification",
        }
    assert_same_weights(AutoModelForImageClassification.from_pretrained(second), make_model())
    assert_same_weights(AutoModel.from_pretrained(base), make_model().rbi)


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_references_load_where_the_package_is_not_installed(without_package, preset):
    work, outcomes = without_package
    model, pixel_values = make_model_with_references("vit", preset), make_pixel_values()
    with torch.no_grad():
        expected = model(pixel_values).logits
        assert (expected - model(pixel_values, relation_scope="self").logits).abs().max() > 1e-3
    classify = pipeline("image-classification", str(work / f"{preset}_third"))
    for name in ("first", "second"):
        report, results = outcomes[f"{preset}_{name}"]
        assert_same_answers(results["default"], expected)
        assert_same_scores(report["answers"], classify(make_image(1, seed=5)))
    loaded = AutoModelForImageClassification.from_pretrained(work / f"{preset}_third")
    assert loaded.describe_references() == model.describe_references()


@pytest.mark.slow
def test_classes_are_added_where_the_package_is_not_installed(without_package):
    """The code that goes with the model knows them, and adds others."""
    report, results = without_package[1]["new_classes"]
    model, pixel_values = make_kernel_with_new_classes(), make_pixel_values()
    with torch.no_grad():
        assert_same_answers(results["default"], model(pixel_values).logits)
        model.add_classes(["jay"], [{"pixel_values": pixel_values[0], "labels": 0}])
        assert_same_answers(results["more_classes"], model(pixel_values).logits)
    assert report["names"] == [*LABELS, "owl", "crow", "jay"]
    assert results["more_classes"][0].argmax() == 5


def test_auto_map_of_a_folder_from_the_hub(tmp_path):
    """After loading from a repository the entries name that repository; what is saved has its code beside it."""
    model = make_model()
    model.config.auto_map = {
        name: f"somebody/rbi--{reference}"
        for name, reference in (
            ("AutoConfig", "configuration_rbi.RBIConfig"),
            ("AutoModel", "modeling_rbi.RBIModel"),
            ("AutoModelForImageClassification", "modeling_rbi.RBIForImageClassification"),
        )
    }
    model.save_pretrained(tmp_path)
    for reference in json.loads((tmp_path / "config.json").read_text())["auto_map"].values():
        module, _, class_name = reference.partition(".")
        assert f"class {class_name}(" in (tmp_path / f"{module}.py").read_text()


# Several processes


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "preset"), [("vit", "paper"), ("convnext", "kernel")])
def test_distributed_data_parallel(tmp_path, backbone, preset):
    model = make_model(backbone, preset)
    model.save_pretrained(tmp_path / "model")
    pixel_values = torch.stack([make_pixel_values(5, seed=seed) for seed in (1, 2)])
    labels = torch.arange(10).view(2, 5) % 3
    save_file({"pixel_values": pixel_values, "labels": labels}, tmp_path / "batch.safetensors")
    run_processes(train_distributed, 2, tmp_path)

    # The gradient is the mean over the two batches, each of which relates only its own images.
    model.train()
    losses = [model(pixel_values[rank], labels=labels[rank]).loss for rank in range(2)]
    (sum(losses) / 2).backward()
    gradients = load_file(tmp_path / "gradients.0")
    torch.testing.assert_close(gradients, get_gradients(model), rtol=1e-4, atol=1e-5)
    weights, other_weights = (load_file(tmp_path / f"weights.{rank}") for rank in range(2))
    # Both take the same reduced gradient from the same weights.
    torch.testing.assert_close(weights, other_weights, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(weights["rbi.rra.value.weight"], model.rbi.rra.value.weight, atol=1e-3)
