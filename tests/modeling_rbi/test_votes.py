# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Votes of the references' labels, and classes that come with references alone."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForImageClassification, pipeline
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from modeling_rbi import RBIConfig, RBIForImageClassification, bank_rbi


FEATURE_SIZE = 24
NUM_LABELS = 5
MEAN, STD = (torch.tensor(values)[:, None, None] for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
# Class 2 has no reference, class 4 one, and three are not known.
LABELS = torch.tensor([0, 1, -100, 3, 3, 1, 4, -100, 0, 3, -100])


def make_images(number, seed=1, size=32):
    """Smooth images, normalized, (number, 3, size, size)."""
    patterns = torch.rand(number, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return (nn.functional.interpolate(patterns, size=(size, size), mode="bilinear") - MEAN) / STD


def make_features(number, seed=1):
    return torch.randn(number, FEATURE_SIZE, generator=torch.Generator().manual_seed(seed))


def items_of(pixel_values, labels):
    return [{"pixel_values": pixels, "labels": label} for pixels, label in zip(pixel_values, labels, strict=True)]


@pytest.fixture(params=["kernel", "kernel, 3 heads", "paper", "paper, 2 heads"])
def model(request, backbone_config):
    """Both presets, with a head and a backbone of random weights."""
    preset, _, heads = request.param.partition(", ")
    config = getattr(RBIConfig, preset)(
        backbone_config=backbone_config,
        num_labels=NUM_LABELS,
        num_attention_heads=int(heads[:1] or 1),
        attention_temperature=0.5,
        relation_gain=0.1,
    )
    model = RBIForImageClassification(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_scale" in name:
                parameter.fill_(1)
            elif parameter.ndim > 1:
                parameter.normal_(std=0.3)
        for name in ("logit_scale", "relation_gain"):
            if (parameter := getattr(model.rbi.rra, name)) is not None:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture
def features(pixel_values):
    return make_features(len(pixel_values), seed=3)


def with_bank(model, labels=LABELS, rows=None, weight=0.0):
    """The model with references of these labels, or with some rows of them."""
    rows = torch.arange(len(labels)) if rows is None else rows
    model.set_reference_features(make_features(len(labels))[rows], make_images(len(labels))[rows], labels[rows])
    model.config.reference_vote_weight = weight
    return model


def votes_of(model, pixel_values, features, **kwargs):
    with torch.no_grad():
        return model.rbi(pixel_values, image_features=features, **kwargs).reference_votes


def logits_of(model, pixel_values, features=None, **kwargs):
    with torch.no_grad():
        return model(pixel_values, image_features=features, **kwargs).logits


def oracle(model, pixel_values, features, labels=LABELS):
    """
    Votes, (B, num_labels), in float64 from the definition: for each head, the mean of exp(score) over the references
    of each class, over the sum of these; then the mean over the heads. With gradient.
    """
    config = model.config
    weights = {name: value.double() for name, value in model.rbi.rra.named_parameters()}
    references, size = make_features(len(labels)).double(), config.psnr_image_size or 32
    own, kept = (
        nn.functional.avg_pool2d(pixels.double() * STD + MEAN, pixels.shape[-1] // size)
        for pixels in (pixel_values, make_images(len(labels)))
    )
    kept = (kept.clamp(0, 1) * 255).round() / 255
    psnr = -10 * (own[:, None] - kept[None]).square().mean((2, 3, 4)).log10().clamp(min=-config.psnr_max / 10)
    relation = psnr.clamp(min=0) / config.psnr_max
    is_cosine = config.attention_type == "cosine"
    mean = references.mean(0) if is_cosine else 0.0
    query, key = (
        (rows - mean) @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
        for name, rows in (("query", features.double()), ("key", references))
    )
    votes = []
    for head, (q, k) in enumerate(
        zip(query.chunk(config.num_attention_heads, 1), key.chunk(config.num_attention_heads, 1), strict=True)
    ):
        if is_cosine:
            scores = nn.functional.cosine_similarity(q[:, None], k[None], dim=-1) * weights["logit_scale"][head].exp()
            scores = scores + weights["relation_gain"][head] * relation * config.psnr_max
        else:
            w = weights["relation.weight"][:, 0].chunk(config.num_attention_heads)[head]
            scores = (q[:, None] * (k[None] + relation[..., None] * w)).sum(-1) / math.sqrt(q.shape[1])
        means = [
            scores[:, labels == label].exp().mean(1) if (labels == label).any() else torch.zeros_like(scores[:, 0])
            for label in range(config.num_labels)
        ]
        means = torch.stack(means, dim=1)
        votes.append(means / means.sum(1, keepdim=True))
    return torch.stack(votes).mean(0)


# --- Votes ----------------------------------------------------------------------------------------------------------


def test_votes_are_their_definition(model, pixel_values, features):
    votes = votes_of(with_bank(model), pixel_values, features)
    expected = oracle(model, pixel_values, features)
    torch.testing.assert_close(votes.double(), expected, atol=1e-6, rtol=1e-4)
    assert votes.std(0)[[0, 1, 3, 4]].min() > 1e-3 and (votes[:, 2] == 0).all()
    # Nothing that shapes attention to the references shapes the votes.
    changes = {"share": 0.9, "temperature": 0.05, "gain": 3.0}
    for name, value in changes.items():
        setattr(model.config, f"reference_{name}", value)
    model.config.num_reference_neighbors = 1
    assert torch.equal(votes_of(model, pixel_values, features), votes)


def test_the_answer_is_its_definition(model, pixel_values, features):
    plain = logits_of(with_bank(model), pixel_values, features).double().softmax(-1)
    votes = oracle(model, pixel_values, features)
    for weight in (0.1, 0.5, 0.9):
        model.config.reference_vote_weight = weight
        logits = logits_of(model, pixel_values, features).double()
        torch.testing.assert_close(logits, ((1 - weight) * plain + weight * votes).log(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(logits.exp().sum(1), torch.ones(7).double(), atol=1e-5, rtol=0)


def test_the_gradient_is_that_of_the_definition(model, pixel_values, features):
    """By way of the features, the temperature and the gain; and of the projections, in training."""
    with_bank(model, weight=1 - 2**-20).train()
    features.requires_grad_()
    rra = model.rbi.rra
    names = ("logit_scale", "relation_gain") if model.config.attention_type == "cosine" else ("relation.weight",)
    inputs = [features, *(rra.get_parameter(name) for name in (*names, "query.weight", "key.weight"))]
    labels = torch.tensor([0, 1, 3, 4, 0, 1, 3])
    output = model(pixel_values, labels=labels, image_features=features, relation_scope="reference")
    expected_loss = -oracle(model, pixel_values, features)[torch.arange(7), labels].log().mean()
    torch.testing.assert_close(output.loss, expected_loss.float(), atol=1e-4, rtol=1e-4)
    gradients = torch.autograd.grad(output.loss, inputs)
    for gradient, expected in zip(gradients, torch.autograd.grad(expected_loss, inputs), strict=True):
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-2)


@pytest.mark.parametrize("times", [2, 5])
def test_repeated_references_change_no_vote(model, pixel_values, features, times):
    expected = votes_of(with_bank(model), pixel_values, features)
    rows = torch.arange(len(LABELS)).repeat(times)
    torch.testing.assert_close(votes_of(with_bank(model, rows=rows), pixel_values, features), expected)
    if model.config.attention_type == "dot_product":
        # Cosines are of features off the mean of the bank, which repeating those of one class alone would move.
        rows = torch.cat([torch.arange(len(LABELS)), (LABELS == 3).nonzero().flatten().repeat(times)])
        torch.testing.assert_close(votes_of(with_bank(model, rows=rows), pixel_values, features), expected)


def test_the_order_of_references_changes_no_vote(model, pixel_values, features):
    expected = votes_of(with_bank(model), pixel_values, features)
    votes = votes_of(with_bank(model, rows=torch.randperm(len(LABELS))), pixel_values, features)
    torch.testing.assert_close(votes, expected)


def sharpen_(model):
    """Scores far beyond what exp takes in float32."""
    with torch.no_grad():
        if model.rbi.rra.relation_gain is not None:
            model.rbi.rra.relation_gain.fill_(100)
        else:
            model.rbi.rra.query.weight.mul_(1e4)
    model.eval()


@pytest.mark.parametrize("is_sharp", [False, True])
def test_unlabeled_references_have_no_say(model, pixel_values, features, is_sharp):
    """However like an image they are."""
    if is_sharp:
        sharpen_(model)
    references, pixels = make_features(len(LABELS)), make_images(len(LABELS))
    is_known = LABELS != -100
    model.set_reference_features(references[is_known], pixels[is_known], LABELS[is_known])
    expected = votes_of(model, pixel_values, features)
    # In pairs around the mean, which cosines are taken off, so that it stays.
    mean = references[is_known].mean(0)
    more = torch.cat([features, 2 * mean - features])
    model.set_reference_features(
        torch.cat([references[is_known], more]),
        torch.cat([pixels[is_known], pixel_values, pixel_values]),
        torch.cat([LABELS[is_known], torch.full((14,), -100)]),
    )
    votes = votes_of(model, pixel_values, features)
    torch.testing.assert_close(votes.sum(1), torch.ones(7))
    if is_sharp:
        # A rounding error in the mean is no small thing then.
        assert torch.equal(votes.round(), expected.round())
    else:
        torch.testing.assert_close(votes, expected, atol=1e-5, rtol=1e-4)


def test_a_class_without_references_keeps_its_answer(model, pixel_values, features):
    """Its share of the answer is that of the classifier, (1 - w)."""
    plain = logits_of(with_bank(model), pixel_values, features).log_softmax(-1)
    mixed = logits_of(with_bank(model, weight=0.75), pixel_values, features)
    torch.testing.assert_close(mixed[:, 2], plain[:, 2] + math.log(0.25))
    assert mixed.isfinite().all()


def test_images_without_labeled_references_answer_as_the_classifier(model, pixel_values, features):
    with_bank(model)
    mask = (LABELS == -100).repeat(7, 1)
    mask[3:] = True
    expected = logits_of(model, pixel_values, features, reference_mask=mask).softmax(-1)
    model.config.reference_vote_weight = 0.5
    answers = logits_of(model, pixel_values, features, reference_mask=mask).softmax(-1)
    torch.testing.assert_close(answers[:3], expected[:3])
    assert (answers[3:] - expected[3:]).abs().amax(1).min() > 1e-3


def test_scores_of_any_size_give_votes(model, pixel_values, features):
    sharpen_(with_bank(model, weight=0.5))
    votes = votes_of(model, pixel_values, features)
    torch.testing.assert_close(votes.sum(1), torch.ones(7))
    assert logits_of(model, pixel_values, features).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_votes_in_low_precision(model, pixel_values, features, dtype):
    with_bank(model, weight=0.5)
    features = features.to(dtype).float()
    expected = logits_of(model, pixel_values, features)
    model.to(dtype).eval()
    logits = logits_of(model, pixel_values.to(dtype), features.to(dtype))
    torch.testing.assert_close(logits.float().exp(), expected.exp(), atol=0.05, rtol=0.05)
    torch.testing.assert_close(logits.float().exp().sum(1), torch.ones(7), atol=0.02, rtol=0)


# --- Classes added by references ------------------------------------------------------------------------------------

NEW = ["owl", "crow"]


@pytest.fixture
def voting_model(model):
    """With labeled references of all five classes, through the backbone."""
    model.set_references(items_of(make_images(15, seed=5), [index % NUM_LABELS for index in range(15)]))
    return model


def new_items(labels=(0, 1, 0, 1), seed=21):
    return items_of(make_images(len(labels), seed), labels)


def state_of(model):
    return (
        model.config.to_dict(),
        model.num_labels,
        {name: value.clone() for name, value in model.state_dict().items()},
    )


def assert_unchanged(model, state):
    config, num_labels, weights = state_of(model)
    assert (config, num_labels) == state[:2] and weights.keys() == state[2].keys()
    assert all(torch.equal(value, state[2][name]) for name, value in weights.items())


def test_old_classes_are_ordered_by_votes_and_classifier(voting_model, pixel_values):
    """Among themselves as v sqrt(q / max q), where q is the classifier's answer for the classes that it knows."""
    voting_model.add_classes(NEW, new_items())
    with torch.no_grad():
        outputs = voting_model.rbi(pixel_values)
        votes = outputs.reference_votes.double()
        known = outputs.pooler_output.double() @ voting_model.classifier.weight[:NUM_LABELS].double().T
        known = (known + voting_model.classifier.bias[:NUM_LABELS].double()).softmax(-1)
        probabilities = logits_of(voting_model, pixel_values).double().exp()
    torch.testing.assert_close(probabilities.sum(1), torch.ones(7).double(), atol=1e-5, rtol=0)
    expected = votes[:, :NUM_LABELS] * (known / known.amax(1, keepdim=True)).sqrt()
    assert torch.equal(probabilities[:, :NUM_LABELS].argsort(1), expected.argsort(1))
    # Neither by the votes nor by the classifier alone.
    assert not torch.equal(expected.argsort(1), votes[:, :NUM_LABELS].argsort(1))
    assert not torch.equal(expected.argsort(1), known.argsort(1))
    # To the class that the classifier likes best, a new class stands as its votes do.
    rows, best = torch.arange(7), known.argmax(1)
    torch.testing.assert_close(
        probabilities[:, NUM_LABELS:] / probabilities[rows, best, None],
        votes[:, NUM_LABELS:] / votes[rows, best, None],
        atol=0,
        rtol=1e-4,
    )


@pytest.fixture
def kernel(backbone_config):
    """The untrained kernel, whose votes go by likeness, with references of five classes."""
    model = RBIForImageClassification(RBIConfig.kernel(backbone_config=backbone_config, num_labels=NUM_LABELS)).eval()
    with torch.no_grad():
        for name, parameter in model.rbi.backbone.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
            elif "layer_scale" in name:
                parameter.fill_(1)
    model.set_references(items_of(make_images(20, seed=5), [index % NUM_LABELS for index in range(20)]))
    return model


def test_twins_of_new_references_are_of_the_new_classes(kernel):
    """And those of the others of theirs."""
    kernel.add_classes(NEW, new_items())
    pixel_values = torch.cat([make_images(4, seed=21), make_images(20, seed=5)])
    answers = logits_of(kernel, pixel_values + 0.02 * torch.randn_like(pixel_values)).argmax(1)
    assert answers.tolist() == [5, 6, 5, 6] + 4 * list(range(NUM_LABELS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scope", ["self", "batch"])
def test_the_other_scopes_never_answer_a_new_class(voting_model, pixel_values, scope, dtype):
    model = voting_model
    # The new references themselves among them.
    pixel_values = torch.cat([pixel_values, make_images(4, seed=21)])
    before = logits_of(model, pixel_values, relation_scope=scope)
    model.add_classes(NEW, new_items())
    model.to(dtype).eval()
    logits = logits_of(model, pixel_values.to(dtype), relation_scope=scope).float()
    assert logits.isfinite().all() and (logits.softmax(-1)[:, NUM_LABELS:] == 0).all()
    if dtype == torch.float32:
        assert torch.equal(logits[:, :NUM_LABELS], before)


def test_references_that_come_later_vote_for_new_classes(kernel):
    """Also by `add_references`, under the new numbers."""
    kernel.add_classes(NEW, new_items())
    later = make_images(2, seed=30)
    kernel.add_references(items_of(later, [6, 6]), strategy="random")
    assert logits_of(kernel, later).argmax(1).tolist() == [6, 6]
    assert kernel.describe_references()["references_per_class"]["crow"] == 4


def test_adding_twice_is_as_adding_at_once(voting_model, pixel_values, tmp_path):
    voting_model.save_pretrained(tmp_path)
    other = RBIForImageClassification.from_pretrained(tmp_path)
    labels, images = (0, 0, 1, 1), make_images(4, seed=21)
    voting_model.add_classes(NEW, items_of(images, labels))
    other.add_classes(NEW[:1], items_of(images[:2], (0, 0)))
    other.add_classes(iter(NEW[1:]), items_of(images[2:], (0, 0)))
    for name in ("references", "id2label", "label2id", "num_added_classes"):
        assert getattr(other.config, name) == getattr(voting_model.config, name)
    torch.testing.assert_close(logits_of(other, pixel_values), logits_of(voting_model, pixel_values))
    with pytest.raises(ValueError, match=r"must be new and differ from each other, got \['owl'\]"):
        other.add_classes(["owl"], new_items((0,)))


def test_the_order_of_new_classes_is_of_no_account(voting_model, pixel_values, tmp_path):
    voting_model.save_pretrained(tmp_path)
    other = RBIForImageClassification.from_pretrained(tmp_path)
    images = make_images(4, seed=21)
    voting_model.add_classes(["owl", "crow"], items_of(images, (0, 1, 0, 1)))
    other.add_classes(["crow", "owl"], items_of(images, (1, 0, 1, 0)))
    logits = logits_of(other, pixel_values)
    torch.testing.assert_close(logits[:, [0, 1, 2, 3, 4, 6, 5]], logits_of(voting_model, pixel_values))


def test_the_classifier_learns_on(voting_model, pixel_values):
    """Through the bank, with images of new classes too."""
    voting_model.add_classes(NEW, new_items())
    voting_model.rbi.self_loss_weight = 0.0
    output = voting_model.train()(pixel_values, labels=torch.arange(7), relation_scope="reference")
    assert output.loss.isfinite() and output.logits.shape == (7, 7)
    output.loss.backward()
    gradient = voting_model.classifier.weight.grad
    assert gradient[:NUM_LABELS].abs().max() > 0 and (gradient[NUM_LABELS:] == 0).all()
    assert all(value.grad.isfinite().all() for value in voting_model.rbi.rra.parameters() if value.grad is not None)


@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_a_saved_model_keeps_its_new_classes(voting_model, pixel_values, max_shard_size, tmp_path):
    model = voting_model
    model.add_classes(NEW, new_items())
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    files = list(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (max_shard_size == "20KB")
    shapes = {name: value.shape for file in files for name, value in load_file(file).items()}
    assert shapes["classifier.weight"] == (7, FEATURE_SIZE)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["num_added_classes"] == 2
    assert written["id2label"] == {str(label): name for label, name in model.config.id2label.items()}
    assert written["label2id"] == {name: label for label, name in model.config.id2label.items()}
    loaded, info = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.config.id2label == model.config.id2label and loaded.num_labels == 7
    for scope in ("self", "batch", "reference"):
        expected = logits_of(model, pixel_values, relation_scope=scope)
        assert torch.equal(logits_of(loaded, pixel_values, relation_scope=scope), expected)
    with torch.no_grad():
        votes = AutoModel.from_pretrained(tmp_path)(pixel_values).reference_votes
    assert torch.equal(votes, votes_of(model, pixel_values, None))
    # And takes more.
    loaded.add_classes(["jay"], new_items((0,), seed=40))
    assert loaded.config.id2label[7] == "jay" and loaded.config.num_added_classes == 3


def test_a_pipeline_names_new_classes(kernel, tmp_path):
    processor = ViTImageProcessorPil(
        size={"height": 32, "width": 32}, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
    )
    images = [
        Image.fromarray((pixels * STD + MEAN).clamp(0, 1).mul(255).byte().permute(1, 2, 0).numpy())
        for pixels in make_images(2, seed=21)
    ]
    items = [{"image": image, "label": label} for label, image in enumerate(images)]
    kernel.add_classes(NEW, items, image_processor=processor)
    kernel.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    classify = pipeline("image-classification", model=str(tmp_path), top_k=1)
    assert [answer[0]["label"] for answer in classify(images)] == NEW


WITHOUT_PACKAGE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "modeling_rbi":
            raise ModuleNotFoundError(f"{name} is blocked")

sys.meta_path.insert(0, Refuse())

import torch
from transformers import AutoModelForImageClassification

torch.set_num_threads(1)
folder, images, answers = sys.argv[1:]
model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
pixel_values = torch.load(images)
with torch.no_grad():
    first = model(pixel_values).logits
model.add_classes(["jay"], [{"pixel_values": pixel_values[0], "labels": 0}])
with torch.no_grad():
    torch.save([first, model(pixel_values).logits, model.config.id2label], answers)
assert "modeling_rbi" not in sys.modules
"""


@pytest.mark.slow
def test_new_classes_without_the_package(kernel, pixel_values, tmp_path):
    """The code that goes with the model knows them, and adds others."""
    kernel.add_classes(NEW, new_items())
    kernel.save_pretrained(tmp_path / "model")
    torch.save(pixel_values, tmp_path / "images.pt")
    arguments = [tmp_path / "model", tmp_path / "images.pt", tmp_path / "answers.pt"]
    result = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_PACKAGE, *arguments],
        env=os.environ | {"HF_HOME": str(tmp_path), "HF_MODULES_CACHE": str(tmp_path / "modules")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    first, second, names = torch.load(tmp_path / "answers.pt")
    torch.testing.assert_close(first, logits_of(kernel, pixel_values))
    kernel.add_classes(["jay"], items_of(pixel_values[:1], [0]))
    torch.testing.assert_close(second, logits_of(kernel, pixel_values))
    assert names == kernel.config.id2label and second[0].argmax() == 7


@pytest.mark.parametrize(
    ("names", "make_items", "message"),
    [
        ([], new_items, r"must be new and differ from each other, got \[\]"),
        (["LABEL_0"], lambda: new_items((0,)), "must be new and differ"),
        (["owl", "owl"], new_items, "must be new and differ"),
        (["owl", "crow", "jay"], new_items, "1 of the model's classes have no image, for instance 'jay'"),
        (["owl"], new_items, r"label 1, but the model's classes are 0\.\.0"),
        (NEW, lambda: new_items((0, 1, -100)), "needs a label for each image, but 1 have none"),
        (NEW, lambda: [{"pixel_values": pixels} for pixels in make_images(2)], "needs labels"),
        (NEW, lambda: items_of(make_images(2, size=16)[:, :1], (0, 1)), "have 1 channels"),
        (
            NEW,
            lambda: [{"image": Image.new("RGB", (32, 32)), "label": label} for label in (0, 1)],
            "`image_processor`",
        ),
        (NEW, lambda: items_of(torch.full((2, 3, 32, 32), math.nan), (0, 1)), "Image 0 has features that are not"),
        (NEW, lambda: [], "There are no images"),
    ],
)
def test_what_cannot_be_added_leaves_the_model_as_it_was(voting_model, pixel_values, names, make_items, message):
    model = voting_model
    state, logits, classifier = state_of(model), logits_of(model, pixel_values), model.classifier
    with pytest.raises(ValueError, match=message):
        model.add_classes(names, make_items())
    assert_unchanged(model, state)
    assert model.classifier is classifier and torch.equal(logits_of(model, pixel_values), logits)


def test_more_than_a_bank_holds_leaves_the_model_as_it_was(voting_model, monkeypatch):
    state = state_of(voting_model)
    monkeypatch.setattr(bank_rbi, "MAX_REFERENCES", 18)
    with pytest.raises(ValueError, match="19 references are more than a model carries"):
        voting_model.add_classes(NEW, new_items())
    assert_unchanged(voting_model, state)


@pytest.mark.parametrize("labels", [LABELS, torch.full((11,), -100)])
def test_old_classes_need_labeled_references(model, labels):
    with_bank(model, labels)
    state = state_of(model)
    with pytest.raises(ValueError, match=r"classes have none in the bank, for instance 'LABEL_\d': add some with"):
        model.add_classes(NEW, new_items())
    assert_unchanged(model, state)


def test_new_classes_need_a_bank(model):
    state = state_of(model)
    with pytest.raises(ValueError, match=r"no reference bank to add classes to: make one with `set_references`"):
        model.add_classes(NEW, new_items())
    assert_unchanged(model, state)
