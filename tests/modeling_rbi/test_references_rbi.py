# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What a model offers for its references: answers with them, setting and saving them, and classes added by them."""

import copy
import itertools
import json
import math
from contextlib import contextmanager

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForImageClassification, ViTConfig, pipeline
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from modeling_rbi import (
    RBIConfig,
    RBIForImageClassification,
    RBIModel,
    UserError,
    bank_rbi,
    choose_references,
    references_rbi,
)
from modeling_rbi.errors_rbi import shown_names
from tests.modeling_rbi.shared import (
    CLASS_NAMES,
    FEATURE_SIZE,
    IMAGENET_MEAN,
    IMAGENET_STD,
    LABELS,
    NUM_LABELS,
    NUM_REFERENCES,
    SAME_ANSWERS,
    assert_same_answers,
    assert_same_bank,
    assert_same_state,
    bank_of,
    block_means,
    items_of,
    logits_of,
    make_images,
    make_items,
    make_model,
    moved_,
    randomize_,
    state_of,
    transformers_log,
    vary_backbone_,
)


# --- An image's answer, and the company of the batch -----------------------------------------------------------------


def companies(number):
    yield make_images(number, seed=11)
    yield torch.zeros(number, 3, 32, 32)
    yield 1e4 * torch.randn(number, 3, 32, 32)
    for bad in (math.nan, math.inf, -math.inf):
        yield torch.full((number, 3, 32, 32), bad)
        images = make_images(number, seed=12)
        images[:, 1, 5, 7] = bad
        yield images


@pytest.mark.parametrize("place", [0, 3, 6])
def test_the_answer_is_the_same_in_any_company(model, pixel_values, place):
    alone = pixel_values[[place] * 7]
    expected = logits_of(model, alone)[place]
    assert expected.isfinite().all()
    for company in companies(7):
        company[place] = pixel_values[place]
        assert_same_answers(logits_of(model, company)[place], expected)
    # Which scope "batch" does not promise.
    related, other = (logits_of(model, pixels, relation_scope="batch")[place] for pixels in (alone, pixel_values))
    assert (related - other).abs().max() > SAME_ANSWERS * related.abs().max()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_features_that_are_not_finite_reach_nobody_else(model, pixel_values, features, bad):
    expected = logits_of(model, pixel_values, image_features=features)
    features[2, 5] = bad
    logits = logits_of(model, pixel_values, image_features=features)
    others = torch.arange(7) != 2
    assert_same_answers(logits[others], expected[others])
    assert logits[2].isnan().all()


def test_an_image_that_is_not_finite_has_no_answer_and_no_gradient_through_others(model, pixel_values, features):
    pixel_values[4, 0, 0, 0] = math.nan
    features.requires_grad_()
    logits = model.train()(pixel_values, image_features=features, relation_scope="reference").logits
    assert logits[4].isnan().all()
    logits[torch.arange(7) != 4].sum().backward()
    assert features.grad.isfinite().all() and (features.grad[4] == 0).all()
    gradients = {name: value.grad for name, value in model.rbi.rra.named_parameters() if value.grad is not None}
    assert {"query.weight", "key.weight", "value.weight"} <= gradients.keys()
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("is_training", [False, True], ids=["evaluation", "training"])
def test_jacobian_across_images_is_zero(model, pixel_values, is_training):
    model.train(is_training)
    jacobian = torch.autograd.functional.jacobian(
        lambda pixels: model(pixels, relation_scope="reference").logits, pixel_values[:3]
    )
    # (image, label, image of the pixel, ...)
    across = jacobian.abs().amax((1, 3, 4, 5))
    itself = torch.eye(3, dtype=torch.bool)
    assert (across[itself] > 1e-6).all()
    assert torch.equal(across[~itself], torch.zeros(6))


@pytest.mark.slow
def test_the_answer_does_not_depend_on_the_batch_size(model):
    pixel_values = make_images(64, seed=3)
    whole = logits_of(model, pixel_values)
    assert whole.std(0).min() > 0.01
    for batch_size in (1, 7, 32, 63):
        parts = torch.cat([logits_of(model, part) for part in pixel_values.split(batch_size)])
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)


def test_any_batch_size_of_the_head_gives_the_same(model):
    pixel_values, features = make_images(64, seed=3), torch.randn(64, FEATURE_SIZE)
    whole = logits_of(model, pixel_values, image_features=features)
    for batch_size in range(1, 65, 3):
        part = logits_of(model, pixel_values[:batch_size], image_features=features[:batch_size])
        torch.testing.assert_close(part, whole[:batch_size], atol=1e-5, rtol=1e-5)


def test_the_answers_follow_a_permutation(model, pixel_values):
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    logits = logits_of(model, pixel_values)
    torch.testing.assert_close(logits_of(model, pixel_values[order]), logits[order], atol=1e-5, rtol=1e-5)


def test_the_order_of_the_references_is_of_no_account(config, pixel_values, features, reference_features):
    reference_pixels, order = make_images(NUM_REFERENCES), torch.randperm(NUM_REFERENCES)
    model = make_model(config, reference_features, reference_pixels)
    expected = logits_of(model, pixel_values, image_features=features)
    model.set_reference_features(reference_features[order], reference_pixels[order])
    logits = logits_of(model, pixel_values, image_features=features)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_masks_and_splits_of_the_batch_do_not_enter(model, pixel_values):
    expected = logits_of(model, pixel_values)
    for kwargs in ({"relation_mask": torch.tensor([1, 0, 0, 1, 1, 0, 1])}, {"relation_batch_size": 2}):
        assert torch.equal(logits_of(model, pixel_values, **kwargs), expected)


def test_the_references_count(model, pixel_values):
    logits = {scope: logits_of(model, pixel_values, relation_scope=scope) for scope in ("self", "batch", "reference")}
    for first, second in itertools.combinations(logits.values(), 2):
        assert (first - second).abs().max() > 0.01


def test_the_scope_with_a_bank(model, pixel_values):
    assert model.config.relation_scope == "reference"
    default, asked = logits_of(model, pixel_values), logits_of(model, pixel_values, relation_scope="reference")
    assert torch.equal(default, asked)
    model.train()
    torch.testing.assert_close(
        logits_of(model, pixel_values), logits_of(model, pixel_values, relation_scope="batch"), atol=0, rtol=0
    )


def test_a_model_without_a_bank_says_how_to_make_one(bare_model, pixel_values):
    with pytest.raises(ValueError, match=r"no reference bank to attend to.*`set_references`"):
        bare_model(pixel_values, relation_scope="reference")
    with pytest.raises(ValueError, match=r"no reference bank to add to.*`set_references`"):
        bare_model.add_references(make_items(5))
    with pytest.raises(ValueError, match=r"no reference bank to describe.*`set_references`"):
        bare_model.describe_references()


# --- Keys and values of the references -------------------------------------------------------------------------------


@contextmanager
def counted_rows(model):
    """How many rows each call of the projections to keys and values has."""
    rows = []
    handles = [
        projection.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
        for projection in (model.rbi.rra.key, model.rbi.rra.value)
    ]
    yield rows
    for handle in handles:
        handle.remove()


def test_keys_and_values_are_computed_once(bare_model, pixel_values):
    with counted_rows(bare_model) as rows:
        bare_model.set_references(make_items(NUM_REFERENCES, seed=2), strategy="random")
        assert rows.count(NUM_REFERENCES) == 2
        rows.clear()
        for batch_size in (7, 3, 2, 7):
            logits_of(bare_model, pixel_values[:batch_size])
        # Those of the images, and of one vector that tells whether the weights are the same.
        assert [number for number in rows if number > 1] == [7, 7, 3, 3, 2, 2, 7, 7]
        rows.clear()
        bare_model.train()
        bare_model.rbi.self_loss_weight = 0.0
        bare_model(pixel_values, relation_scope="reference")
        assert sorted(rows) == [7, 7, NUM_REFERENCES, NUM_REFERENCES]


def assert_bank_is_fresh(model, pixel_values):
    """In training, keys and values are computed from the current weights: evaluation must agree."""
    with torch.no_grad():
        expected = copy.deepcopy(model).train()(pixel_values, relation_scope="reference").logits
    torch.testing.assert_close(logits_of(model, pixel_values, relation_scope="reference"), expected)
    mean, keys, values = model.rbi.rra.project_references(model.rbi.references)
    for name, value in (("mean", mean), ("keys", keys), ("values", values)):
        torch.testing.assert_close(getattr(model.rbi.references, name), value, msg=name)


def test_keys_and_values_are_fresh_after_training(model, pixel_values):
    before = model.rbi.references.keys.clone()
    model.train()
    optimizer = torch.optim.AdamW(model.rbi.rra.parameters(), lr=0.1)
    loss = model(pixel_values, labels=torch.arange(7) % NUM_LABELS, relation_scope="reference").loss
    loss.backward()
    optimizer.step()
    model.eval()
    assert (model.rbi.references.keys - before).abs().max() > 1e-3
    assert_bank_is_fresh(model, pixel_values)


class Scaled(torch.nn.Module):
    """An adapter around a layer, which a flag switches off."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.is_on = layer, True

    def forward(self, features):
        return self.layer(features) + (features.flip(-1) if self.is_on else 0)


def _step(model, pixel_values):
    """A step of training in evaluation mode, as with frozen batch normalization."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(pixel_values, labels=torch.arange(7) % NUM_LABELS).loss.backward()
    assert model.rbi.rra.key.weight.grad.abs().max() > 0 and model.rbi.rra.value.weight.grad.abs().max() > 0
    optimizer.step()


def _change_data(model, pixel_values):
    model.rbi.rra.key.weight.data.mul_(1.5)


def _change_in_inference_mode(model, pixel_values):
    with torch.inference_mode():
        model.rbi.rra.value.weight.mul_(1.5)


def _replace(model, pixel_values):
    model.rbi.rra.key = moved_(copy.deepcopy(model.rbi.rra.key))


def _switch_adapter_off(model, pixel_values):
    model.rbi.rra.key = Scaled(model.rbi.rra.key)
    with_adapter = logits_of(model, pixel_values)
    model.rbi.rra.key.is_on = False
    return with_adapter


def _add_hook(model, pixel_values):
    model.rbi.rra.value.register_forward_hook(lambda module, args, output: 2 * output)


CHANGES = [_step, _change_data, _change_in_inference_mode, _replace, _switch_adapter_off, _add_hook]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__[1:])
def test_keys_and_values_follow_the_weights_in_evaluation_mode(model, pixel_values, change):
    at_first = logits_of(model, pixel_values)
    before = change(model, pixel_values)
    difference = logits_of(model, pixel_values) - (at_first if before is None else before)
    assert difference.abs().max() > 1e-5
    assert_bank_is_fresh(model, pixel_values)


def test_a_quantized_head_has_keys_and_values_of_its_own(model, pixel_values):
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    logits = logits_of(quantized, pixel_values)
    _, keys, values = quantized.rbi.rra.project_references(quantized.rbi.references)
    torch.testing.assert_close(quantized.rbi.references.keys, keys)
    torch.testing.assert_close(quantized.rbi.references.values, values)
    expected = logits_of(model, pixel_values)
    assert (logits - expected).abs().mean() < 0.1 * expected.std()


def test_a_model_prepared_in_inference_mode_gives_gradients_of_pixels(model, pixel_values):
    with torch.inference_mode():
        model.rbi.rra.key.weight.mul_(1.5)
        model.eval()(pixel_values)
    model.requires_grad_(False)
    pixel_values.requires_grad_()
    model(pixel_values).logits.sum().backward()
    assert pixel_values.grad.abs().max() > 0


@pytest.mark.parametrize("part", ["model", "base"])
def test_keys_and_values_are_fresh_after_load_state_dict(model, pixel_values, part):
    other = copy.deepcopy(model)
    moved_(other.rbi.rra)
    other.eval()
    expected = logits_of(other, pixel_values)
    source, target = (other, model) if part == "model" else (other.rbi, model.rbi)
    target.load_state_dict(source.state_dict())
    if part == "model":
        assert_same_answers(logits_of(model, pixel_values), expected)
    assert_bank_is_fresh(model, pixel_values)


def test_keys_and_values_are_fresh_after_from_pretrained(model, pixel_values, tmp_path):
    moved_(model.rbi.rra)
    model.save_pretrained(tmp_path)
    loaded = RBIForImageClassification.from_pretrained(tmp_path)
    assert_bank_is_fresh(loaded, pixel_values)
    assert_same_answers(logits_of(loaded, pixel_values), logits_of(model.eval(), pixel_values))


def test_references_have_no_gradient_and_are_no_parameters(model, pixel_values):
    assert not [name for name, _ in model.named_parameters() if "references" in name]
    assert all(not buffer.requires_grad for buffer in model.rbi.references.buffers())
    saved = {name for name in model.state_dict() if "references" in name}
    assert saved == {f"rbi.references.{name}" for name in ("features", "labels", "images", "probe")}


# --- A bank under another head ---------------------------------------------------------------------------------------


NO_LABEL = -100
NAMED = {0: "wren", 1: "crow", 2: "jay", 3: "owl", 4: "kite"}


@pytest.fixture
def named_bank(voting_model, tmp_path):
    """A saved model of five named classes, with a bank of labeled images of each, and one without a label."""
    voting_model.config.id2label = dict(NAMED)
    voting_model.config.label2id = {name: label for label, name in NAMED.items()}
    labels = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, NO_LABEL])
    voting_model.set_reference_features(torch.randn(len(labels), FEATURE_SIZE), None, labels)
    voting_model.save_pretrained(tmp_path / "named")
    return tmp_path / "named"


@pytest.mark.parametrize(
    ("names", "labels", "dropped"),
    [
        (["wren", "crow", "jay", "owl", "kite"], [0, 1, 2, 3, 4, 0, 1, 2], []),
        (["kite", "owl", "jay", "crow", "wren"], [4, 3, 2, 1, 0, 4, 3, 2], []),
        (["gull", "wren", "crow", "jay", "owl", "kite"], [1, 2, 3, 4, 5, 1, 2, 3], []),
        (["owl", "wren"], [1, -100, -100, 0, -100, 1, -100, -100], ["crow", "jay", "kite"]),
        (["cat", "dog", "fox", "cow", "pig"], [-100] * 8, ["wren", "crow", "jay", "owl", "kite"]),
        (["wren", "wren", "jay"], [-100, -100, 2, -100, -100, -100, -100, 2], ["wren", "crow", "owl", "kite"]),
    ],
    ids=["same", "order", "more", "fewer", "others", "equal names"],
)
def test_labels_of_a_bank_follow_the_names_of_their_classes(named_bank, pixel_values, caplog, names, labels, dropped):
    id2label = dict(enumerate(names))
    with transformers_log(caplog):
        model = RBIForImageClassification.from_pretrained(named_bank, id2label=id2label, ignore_mismatched_sizes=True)
    warned = "have lost their labels" in caplog.text
    assert warned == bool(dropped) and (not warned or f"({', '.join(dropped)})" in caplog.text)
    assert model.config.id2label == id2label and model.config.label2id[names[-1]] == len(names) - 1
    assert model.rbi.references.labels.tolist() == [*labels, NO_LABEL]
    assert model.config.references["num_labeled"] == len(labels) - labels.count(NO_LABEL)
    model.config.reference_vote_weight = 0.5
    assert logits_of(model, pixel_values).isfinite().all()


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForImageClassification])
def test_a_bank_without_names_for_its_classes_keeps_no_labels_for_others(named_bank, pixel_values, auto_class):
    model = auto_class.from_pretrained(named_bank, num_labels=3, ignore_mismatched_sizes=True)
    assert model.config.num_labels == 3
    assert set(model.base_model.references.labels.tolist()) == {NO_LABEL}
    model.save_pretrained(named_bank)
    assert set(auto_class.from_pretrained(named_bank).base_model.references.labels.tolist()) == {NO_LABEL}


def test_classes_that_get_their_first_names_keep_the_labels_of_a_bank(voting_model, tmp_path):
    assert voting_model.config.id2label[0] == "LABEL_0"
    labels = voting_model.rbi.references.labels.tolist()
    voting_model.save_pretrained(tmp_path)
    model = RBIForImageClassification.from_pretrained(tmp_path, id2label=NAMED)
    assert model.rbi.references.labels.tolist() == labels
    others = {label: f"LABEL_{label}" for label in range(3)}
    model = RBIForImageClassification.from_pretrained(tmp_path, id2label=others, ignore_mismatched_sizes=True)
    assert set(model.rbi.references.labels.tolist()) == {NO_LABEL}


def test_a_bank_with_labels_beyond_a_smaller_head_is_named(named_bank, pixel_values):
    model = RBIForImageClassification.from_pretrained(named_bank)
    model.classifier, model.config.num_labels = nn.Linear(FEATURE_SIZE, 3), 3
    with pytest.raises(UserError, match=r"labels up to 4, but the model has 3 classes.*`set_references`"):
        logits_of(model, pixel_values)


def test_added_classes_are_not_loaded_under_other_names(named_bank, tmp_path):
    model = RBIForImageClassification.from_pretrained(named_bank)
    model.add_classes(["gull"], make_items(2, [0, 0], seed=3))
    model.save_pretrained(tmp_path / "more")
    assert RBIForImageClassification.from_pretrained(tmp_path / "more").config.id2label == NAMED | {5: "gull"}
    names = dict(enumerate(["gull", *NAMED.values()]))
    with pytest.raises(UserError, match=r"added classes.*cannot be loaded with other classes"):
        RBIForImageClassification.from_pretrained(tmp_path / "more", id2label=names)


# --- A bank without thumbnails ---------------------------------------------------------------------------------------


def test_without_images_no_pixels_are_needed(bare_model, pixel_values):
    bare_model.set_references(make_items(NUM_REFERENCES), strategy="random", keep_images=False)
    assert bare_model.rbi.references.images is None and bare_model.config.references["image_shape"] is None
    with torch.no_grad():
        features, _ = bare_model.rbi.extract_features(pixel_values)
    expected = logits_of(bare_model, pixel_values)
    assert_same_answers(logits_of(bare_model, image_features=features), expected)
    # Pixels have no part in it.
    other = logits_of(bare_model, pixel_values.flip(0), image_features=features)
    assert_same_answers(other, expected)
    with pytest.raises(ValueError, match="keeps no images"):
        bare_model.rbi.references.unit_range_images()


def test_without_images_the_kernel_attends_by_features_alone(backbone_config, features, reference_features):
    models = []
    for encoding in ("bias", "none"):
        torch.manual_seed(0)
        config = RBIConfig.kernel(backbone_config=backbone_config, relation_position_encoding=encoding)
        model = RBIModel(config).eval()
        model.set_reference_features(reference_features)
        models.append(model)
    models[1].rra.load_state_dict(randomize_(models[0].rra).state_dict(), strict=False)
    with torch.no_grad():
        related, unrelated = (model.eval()(image_features=features, output_relations=True) for model in models)
    torch.testing.assert_close(related.relation_attentions, unrelated.relation_attentions, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(related.pooler_output, unrelated.pooler_output, atol=1e-5, rtol=1e-5)
    assert unrelated.relation_similarities is None
    assert (related.relation_similarities.amax(1) == related.relation_similarities.amin(1)).all()


def test_without_images_all_relations_are_the_mean_one(bare_model, pixel_values):
    items = make_items(NUM_REFERENCES)
    bare_model.set_references(items, strategy="random")
    expected = bare_model.config.references["mean_similarity"]
    assert expected < 0.9
    bare_model.set_references(items, strategy="random", keep_images=False)
    assert bare_model.config.references["mean_similarity"] == pytest.approx(expected, abs=1e-4)
    with torch.no_grad():
        relations = bare_model(pixel_values, output_relations=True).relation_similarities
    torch.testing.assert_close(relations[:, 1:], torch.full((7, NUM_REFERENCES), expected))
    bare_model.add_references(items[:2], strategy="random")
    assert bare_model.config.references["mean_similarity"] == pytest.approx(expected, abs=1e-4)


def test_the_mean_relation_of_a_large_bank_is_close(monkeypatch, bare_model):
    images, features = make_images(300), torch.randn(300, FEATURE_SIZE)
    bare_model.set_reference_features(features, images)
    exact = bare_model.config.references["mean_similarity"]
    monkeypatch.setattr(references_rbi, "NUM_MEAN_REFERENCES", 60)
    bare_model.set_reference_features(features, images)
    assert bare_model.config.references["mean_similarity"] == pytest.approx(exact, abs=0.01)
    assert bare_model.config.references["mean_similarity"] != exact


def test_the_mean_relation_is_that_of_the_images(bare_model):
    images = make_images(NUM_REFERENCES)
    bare_model.set_reference_features(torch.randn(NUM_REFERENCES, FEATURE_SIZE), images)
    size = bare_model.config.psnr_image_size or 32
    small_images = block_means(images.double() * IMAGENET_STD + IMAGENET_MEAN, size)
    relations = [
        -10 * (first - second).square().mean().log10() / 50
        for first, second in itertools.combinations(small_images, 2)
    ]
    expected = torch.stack(relations).mean().item()
    assert bare_model.config.references["mean_similarity"] == pytest.approx(expected, abs=1e-3)


# --- The bank of a model ---------------------------------------------------------------------------------------------


def test_labels_have_no_part_in_the_answer(bare_model, pixel_values, features, reference_features, reference_pixels):
    logits = []
    for labels in (None, torch.arange(NUM_REFERENCES) % NUM_LABELS):
        bare_model.set_reference_features(reference_features, reference_pixels, labels)
        logits.append(logits_of(bare_model, pixel_values, image_features=features))
    assert_same_answers(*logits)


def test_the_bank_is_made_in_evaluation_mode(resnet_model):
    """Statistics of batch normalization are neither used by the batch nor changed."""
    model = resnet_model
    model.train()(make_images(8))
    before = state_of(model)
    model.set_references(make_items(10), batch_size=3)
    after = state_of(model)
    assert all(torch.equal(value, after[2][name]) for name, value in before[2].items())
    assert model.training and all(module.training for module in model.modules())
    features = model.rbi.references.features
    with torch.no_grad():
        expected, _ = model.eval().rbi.extract_features(make_images(10))
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)


def test_parts_that_are_frozen_in_evaluation_mode_stay_so(resnet_model, tmp_path):
    """As statistics of batch normalization are, when a pretrained backbone is fine-tuned on small batches."""
    model = resnet_model.train()
    frozen = [module for module in model.rbi.backbone.modules() if isinstance(module, nn.BatchNorm2d)][::2]
    for module in frozen:
        module.eval()
    modes = [module.training for module in model.modules()]
    model.set_references(make_items(10))
    model.rbi.references.train()
    assert [module.training for module in model.modules() if module is not model.rbi.references] == modes
    model.add_references(make_items(5))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not finite"):
        model.add_references([{"pixel_values": torch.full((3, 32, 32), math.nan)}])
    model.rbi.references.train()
    assert [module.training for module in model.modules() if module is not model.rbi.references] == modes


def test_the_config_lists_what_the_bank_holds(bare_model):
    bare_model.set_references(make_items(20), per_class=3, seed=4)
    size = bare_model.config.psnr_image_size or 32
    facts = dict(bare_model.config.references)
    assert 0 < facts.pop("mean_similarity") < 1
    assert facts == {
        "num_references": 15,
        "num_labeled": 15,
        "image_shape": [3, size, size],
        "strategy": "balanced",
        "per_class": 3,
        "seed": 4,
    }
    assert len(bare_model.rbi.references) == 15
    assert bare_model.config is bare_model.rbi.config
    json.dumps(bare_model.config.references)


def test_a_bank_takes_the_place_of_another(bare_model, pixel_values):
    bare_model.set_references(make_items(10, seed=3))
    bare_model.set_references(make_items(15, seed=4))
    logits = logits_of(bare_model, pixel_values)
    bare_model.remove_references()
    bare_model.set_references(make_items(15, seed=4))
    assert_same_answers(logits_of(bare_model, pixel_values), logits)
    assert len(bare_model.rbi.references) == 15


def test_references_are_removed(bare_model, pixel_values):
    before = state_of(bare_model)
    alone = logits_of(bare_model, pixel_values)
    bare_model.set_references(make_items(10))
    bare_model.remove_references()
    assert_same_state(state_of(bare_model), before)
    assert_same_answers(logits_of(bare_model, pixel_values), alone)
    bare_model.config.validate()
    # Another scope that was asked for stays.
    bare_model.set_references(make_items(10))
    bare_model.config.relation_scope = "batch"
    bare_model.remove_references()
    assert bare_model.config.relation_scope == "batch"


@pytest.mark.parametrize("keep_images", [True, False])
def test_references_are_added(bare_model, keep_images):
    first, second = make_items(10, seed=3), make_items(6, [-100] * 6, seed=4)
    bare_model.set_references(first, keep_images=keep_images, seed=8)
    bare_model.add_references(second, num_references=4, seed=2)
    labels = torch.full((6,), -100)
    rows = choose_references(labels, CLASS_NAMES, num_references=4, seed=2)
    facts = bare_model.config.references
    assert (facts["num_references"], facts["num_labeled"], facts["seed"]) == (14, 10, 8)
    bank = bank_of(bare_model)
    assert ("images" in bank) == keep_images
    bare_model.set_references([*first, *(second[row] for row in rows)], strategy="random", keep_images=keep_images)
    assert bank.keys() == bank_of(bare_model).keys()
    for name, value in bank_of(bare_model).items():
        torch.testing.assert_close(bank[name], value, msg=name)
    if keep_images:
        assert facts["mean_similarity"] == pytest.approx(bare_model.config.references["mean_similarity"])


def test_the_strategy_that_is_noted_is_the_one_that_chose(bare_model):
    """Images drawn at random may all have labels."""
    labels = [0, 1, 2, 3, 4] * 8 + [-100]
    bare_model.set_references(make_items(41, labels), num_references=2, seed=1)
    assert bare_model.config.references["num_labeled"] == 2
    assert bare_model.config.references["strategy"] == "random"


def test_nothing_is_added_to_references_of_another_backbone(bare_model):
    """The features of the new ones would be of another kind than those that are there."""
    bare_model.set_references(make_items(10))
    moved_(bare_model.rbi.backbone, 0.3)
    before = state_of(bare_model)
    for add in (bare_model.add_references, lambda images: bare_model.add_classes(["owl"], images)):
        with pytest.raises(ValueError, match=r"trained since the references were set.*`set_references`"):
            add(make_items(3, [0, 0, 0]))
    assert_same_state(state_of(bare_model), before)


def test_images_of_another_size_are_not_added(resnet_model):
    model = resnet_model
    model.set_references(make_items(5, size=32))
    before = state_of(model)
    with pytest.raises(ValueError, match=r"shape \(3, 32, 32\), but the new ones \(3, 24, 24\)"):
        model.add_references(make_items(5, size=24))
    assert_same_state(state_of(model), before)


def test_no_more_references_are_added_than_a_model_carries(monkeypatch, bare_model):
    monkeypatch.setattr(bank_rbi, "MAX_REFERENCES", 12)
    bare_model.set_references(make_items(10))
    before = state_of(bare_model)
    with pytest.raises(ValueError, match="15 references are more than a model carries"):
        bare_model.add_references(make_items(5))
    with pytest.raises(ValueError, match="13 references are more"):
        bare_model.set_reference_features(torch.randn(13, FEATURE_SIZE))
    assert_same_state(state_of(bare_model), before)


@pytest.mark.parametrize("keep_images", [True, False])
def test_the_bank_is_described(bare_model, keep_images, tmp_path):
    bare_model.save_pretrained(tmp_path / "without")
    bare_model.set_references(make_items(12, [0, 0, 1, 1, 1, 4, 2, 3, 4, 4, 4, 0]), keep_images=keep_images)
    bare_model.save_pretrained(tmp_path / "with")
    facts = bare_model.describe_references()
    assert facts.items() >= bare_model.config.references.items()
    assert facts["has_images"] == keep_images
    assert facts["references_per_class"] == {"LABEL_0": 3, "LABEL_1": 3, "LABEL_2": 1, "LABEL_3": 1, "LABEL_4": 4}
    without, with_bank = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("without", "with"))
    # Beside the header, which names the tensors.
    assert 0 < with_bank - without - facts["num_bytes"] < 1024
    json.dumps(facts)
    bare_model.bfloat16()
    assert bare_model.describe_references()["num_bytes"] < facts["num_bytes"]


def test_multiply_adds_are_those_of_the_tensors(bare_model):
    """The cost is linear in the references, and an image's own part does not depend on them."""
    costs = {}
    for number in (10, 20, 30):
        bare_model.set_references(make_items(number))
        costs[number] = bare_model.describe_references()["multiply_adds_per_image"]
    pixels = 3 * (bare_model.config.psnr_image_size or 32) ** 2
    assert costs[20] - costs[10] == costs[30] - costs[20] == 10 * (2 * FEATURE_SIZE + pixels)
    assert 2 * costs[10] - costs[20] == 3 * FEATURE_SIZE**2


def test_references_from_features(bare_model, pixel_values):
    items = make_items(NUM_REFERENCES)
    bare_model.set_references(items, strategy="random")
    expected, bank = logits_of(bare_model, pixel_values), bank_of(bare_model)
    pixels = torch.stack([item["pixel_values"] for item in items])
    with torch.no_grad():
        features, _ = bare_model.rbi.extract_features(pixels)
    labels = torch.tensor([item["labels"] for item in items])
    bare_model.remove_references()
    bare_model.set_reference_features(features.requires_grad_(), pixels, labels)
    assert_same_bank(bank_of(bare_model), bank)
    assert bare_model.config.relation_scope == "reference"
    torch.testing.assert_close(logits_of(bare_model, pixel_values), expected)


@pytest.mark.parametrize(
    ("make_arguments", "message"),
    [
        (lambda: (torch.randn(5, 7),), r"must have the shape \(N, 24\), N at least 1, got \(5, 7\)"),
        (lambda: (torch.randn(24),), r"must have the shape \(N, 24\)"),
        (lambda: (torch.randn(0, 24),), r"N at least 1, got \(0, 24\)"),
        (lambda: (torch.randn(5, 24).log(), make_images(5)), "features of reference 0 are not finite"),
        (lambda: (torch.randn(5, 24), make_images(4)), "hold 4 images, but `image_features` 5"),
        (lambda: (torch.randn(5, 24), make_images(5)[:, :1]), "have 1 channels, but the model takes 3"),
        (lambda: (torch.randn(3, 24), make_images(3)[0]), r"shape \(batch_size, num_channels, height, width\)"),
        (lambda: (torch.randn(5, 24), None, torch.zeros(4).long()), "`labels` are for 4 references, but .* hold 5"),
        (lambda: (torch.randn(5, 24), None, torch.full((5,), 9)), "label 9"),
    ],
)
def test_bad_reference_features_are_refused(bare_model, make_arguments, message):
    before = state_of(bare_model)
    with pytest.raises(ValueError, match=message):
        bare_model.set_reference_features(*make_arguments())
    assert_same_state(state_of(bare_model), before)


def test_the_base_model_has_a_bank_of_its_own(config, pixel_values):
    model = RBIModel(config).eval()
    randomize_(model.rra)
    model.set_references(make_items(10))
    with torch.no_grad():
        assert model(pixel_values, output_relations=True).relation_attentions.shape == (7, 1, 11)
    model.add_references(make_items(5, seed=9))
    assert model.describe_references()["num_references"] == 15
    model.remove_references()
    assert model.references is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_bank_in_low_precision(model, pixel_values, dtype):
    pixel_values = pixel_values.to(dtype).float()
    expected = logits_of(model, pixel_values)
    model.to(dtype).eval()
    assert {value.dtype for value in model.rbi.references.buffers()} == {dtype, torch.int64, torch.uint8}
    logits = logits_of(model, pixel_values.to(dtype))
    assert logits.dtype == dtype
    assert (logits.float() - expected).abs().max() < 0.15 * expected.std(0).max()
    # One that is made in that precision, too.
    model.set_references(make_items(NUM_REFERENCES, seed=2), strategy="random")
    made = logits_of(model, pixel_values.to(dtype))
    assert (made.float() - expected).abs().max() < 0.15 * expected.std(0).max()


@pytest.mark.parametrize("is_training", [False, True], ids=["evaluation", "training"])
def test_a_bank_under_autocast(model, pixel_values, is_training):
    expected = logits_of(model, pixel_values)
    model.train(is_training)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(
            pixel_values, labels=torch.arange(7) % NUM_LABELS, relation_scope="reference", output_relations=True
        )
    assert outputs.logits.dtype == torch.bfloat16 and outputs.relation_similarities.dtype == torch.float32
    assert (outputs.logits.float() - expected).abs().max() < 0.15 * expected.std(0).max()
    outputs.loss.backward()
    gradients = {name: value.grad for name, value in model.rbi.rra.named_parameters() if value.grad is not None}
    assert "value.weight" in gradients and all(gradient.isfinite().all() for gradient in gradients.values())


# --- Saving and loading ----------------------------------------------------------------------------------------------


def vit_config():
    size = {"hidden_size": FEATURE_SIZE, "intermediate_size": 32, "image_size": 32, "patch_size": 8}
    return ViTConfig(num_hidden_layers=1, num_attention_heads=2, **size)


@pytest.fixture(params=["convnext", "vit"])
def any_model(request, backbone_config):
    """Both presets, with a bank, each on another backbone. The files of ViT have other names than its modules."""
    if request.param == "convnext":
        model = make_model(RBIConfig.paper(backbone_config=backbone_config, num_labels=NUM_LABELS))
        vary_backbone_(model)
    else:
        model = make_model(RBIConfig.kernel(backbone_config=vit_config(), num_labels=NUM_LABELS))
    model.set_references(make_items(NUM_REFERENCES, seed=2), strategy="random")
    return model


@pytest.mark.parametrize("max_shard_size", ["5GB", "10KB"])
@pytest.mark.parametrize("keep_images", [True, False])
def test_a_saved_bank_comes_back(any_model, pixel_values, keep_images, max_shard_size, tmp_path):
    model = any_model
    model.set_references(make_items(10), keep_images=keep_images)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_size == "10KB")
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json", ".py"}
    expected = logits_of(model, pixel_values)
    loaded, info = RBIForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same_answers(logits_of(loaded, pixel_values), expected)
    assert loaded.config.references == model.config.references
    assert loaded.config.relation_scope == "reference"
    assert loaded.describe_references() == model.describe_references()
    base = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        outputs = [each(pixel_values).pooler_output for each in (base, model.rbi)]
    assert_same_answers(*outputs)
    # And once more, from the loaded one.
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "again")
    assert_same_answers(logits_of(again, pixel_values), expected)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["references"]["num_references"] == 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_bank_loads_in_low_precision(any_model, pixel_values, dtype, tmp_path):
    any_model.save_pretrained(tmp_path)
    loaded = RBIForImageClassification.from_pretrained(tmp_path, dtype=dtype)
    expected = any_model.to(dtype).eval()
    assert_same_answers(logits_of(loaded, pixel_values.to(dtype)), logits_of(expected, pixel_values.to(dtype)))
    # And back: what was saved so is the bank of the same backbone in full precision.
    loaded.save_pretrained(tmp_path / "low")
    RBIForImageClassification.from_pretrained(tmp_path / "low", dtype=torch.float32)


def test_a_bank_is_left_behind(any_model, pixel_values, tmp_path):
    any_model.save_pretrained(tmp_path)
    loaded, info = RBIForImageClassification.from_pretrained(
        tmp_path, references=None, relation_scope="self", output_loading_info=True
    )
    assert not info["unexpected_keys"] and loaded.rbi.references is None and loaded.config.references is None
    expected = logits_of(any_model, pixel_values, relation_scope="self")
    assert_same_answers(logits_of(loaded, pixel_values), expected)
    loaded.save_pretrained(tmp_path / "without")
    assert not [name for name in load_file(tmp_path / "without" / "model.safetensors") if "references" in name]
    assert RBIForImageClassification.from_pretrained(tmp_path / "without").config.references is None


@pytest.mark.parametrize("name", ["features", "images", "labels", "probe"])
def test_weights_without_the_bank_of_the_config_are_refused(any_model, name, tmp_path):
    any_model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[next(key for key in weights if key.endswith(f"references.{name}"))]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=rf"names {NUM_REFERENCES} references, but its weights hold none.*references=None"
    ):
        RBIForImageClassification.from_pretrained(tmp_path)


def test_a_bank_of_another_size_than_the_config_says_is_refused(any_model, tmp_path):
    any_model.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    changed = text.replace(f'"num_references": {NUM_REFERENCES}', '"num_references": 4')
    assert changed != text
    (tmp_path / "config.json").write_text(changed)
    with pytest.raises(RuntimeError, match=r"references\.\w+` \(9.* instead of \(4"):
        RBIForImageClassification.from_pretrained(tmp_path)


def test_references_do_not_start_anew(any_model, tmp_path):
    """As weights of other shapes do where that is asked for: they would be whatever is in memory."""
    any_model.save_pretrained(tmp_path)
    config = RBIConfig.from_pretrained(tmp_path)
    config.references = config.references | {"num_references": 4}
    with pytest.raises(RuntimeError, match=r"references\.\w+` \(9.* instead of \(4"):
        RBIForImageClassification.from_pretrained(tmp_path, config=config, ignore_mismatched_sizes=True)
    # Other weights can, with the references as they are, but for their labels.
    other = RBIForImageClassification.from_pretrained(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
    unlabeled = {"labels": torch.full_like(any_model.rbi.references.labels, NO_LABEL)}
    assert_same_bank(bank_of(other), bank_of(any_model) | unlabeled)


def test_a_bank_of_another_backbone_is_warned_of_and_refused(any_model, caplog, tmp_path):
    with transformers_log(caplog):
        any_model.save_pretrained(tmp_path / "own")
        assert "references" not in caplog.text
    moved_(any_model.rbi.backbone, 0.3)
    with transformers_log(caplog):
        any_model.save_pretrained(tmp_path / "trained")
        assert "backbone has been trained since the references were set" in caplog.text
    for auto_class in (AutoModel, AutoModelForImageClassification):
        with pytest.raises(ValueError, match="computed by another backbone than its own, or before the"):
            auto_class.from_pretrained(tmp_path / "trained")
    loaded = RBIForImageClassification.from_pretrained(tmp_path / "trained", references=None, relation_scope="self")
    loaded.set_references(make_items(5))
    with transformers_log(caplog):
        loaded.save_pretrained(tmp_path / "again")
        assert "references" not in caplog.text
    RBIForImageClassification.from_pretrained(tmp_path / "again")


def test_training_the_head_leaves_the_bank_its_own(any_model, tmp_path):
    moved_(any_model.rbi.rra)
    moved_(any_model.classifier)
    any_model.train().save_pretrained(tmp_path)
    assert any_model.training and any_model.rbi.backbone.training
    RBIForImageClassification.from_pretrained(tmp_path)


def test_load_state_dict_takes_a_bank(any_model, pixel_values, tmp_path):
    expected = logits_of(any_model, pixel_values)
    any_model.save_pretrained(tmp_path)
    for state in (any_model.state_dict(), load_file(tmp_path / "model.safetensors")):
        other = copy.deepcopy(any_model)
        other.set_references(make_items(NUM_REFERENCES, seed=8), strategy="random")
        moved_(other)
        other.eval()
        assert (logits_of(other, pixel_values) - expected).abs().max() > 1e-3
        other.load_state_dict(state)
        assert_same_answers(logits_of(other, pixel_values), expected)


def test_load_state_dict_refuses_a_bank_of_another_size(model):
    state = model.state_dict()
    model.set_references(make_items(5))
    with pytest.raises(RuntimeError, match=r"size mismatch for rbi\.references\.features"):
        model.load_state_dict(state)
    model.remove_references()
    bare = model.state_dict()
    model.set_references(make_items(5))
    with pytest.raises(RuntimeError, match=r"Missing key.*rbi\.references\.features"):
        model.load_state_dict(bare)


def test_load_state_dict_does_not_drop_a_bank_silently(any_model, tmp_path):
    any_model.save_pretrained(tmp_path)
    removed = copy.deepcopy(any_model)
    removed.remove_references()
    never_had = RBIForImageClassification(removed.config)
    states = (any_model.state_dict(), load_file(tmp_path / "model.safetensors"))
    for bare, state in itertools.product((removed, never_had), states):
        with pytest.raises(RuntimeError, match=r"Unexpected key.*rbi\.references\.features"):
            bare.load_state_dict(state)
        outcome = bare.load_state_dict(state, strict=False)
        assert set(outcome.unexpected_keys) == {name for name in state if "references" in name}
        assert not outcome.missing_keys


def test_a_copy_has_a_bank_of_its_own(any_model, pixel_values):
    expected = logits_of(any_model, pixel_values)
    other = copy.deepcopy(any_model)
    any_model.set_references(make_items(5, seed=8))
    moved_(any_model)
    assert_same_answers(logits_of(other, pixel_values), expected)
    assert other.config.references["num_references"] == NUM_REFERENCES
    other.remove_references()
    assert any_model.config.references["num_references"] == 5


def test_the_pattern_tells_backbones_apart_and_not_precisions(any_model):
    base = any_model.rbi
    assert base.has_own_references()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert copy.deepcopy(base).to(dtype).has_own_references()
    assert references_rbi.PROBE_TOLERANCE <= 0.2
    other = copy.deepcopy(base)
    with torch.no_grad():
        next(other.backbone.parameters()).fill_(math.nan)
    assert not other.has_own_references()


# --- Classes added by references -------------------------------------------------------------------------------------


def new_images(number=4, labels=None):
    return make_items(number, [index % 2 for index in range(number)] if labels is None else labels, seed=21)


def test_classes_are_added(voting_model, pixel_values):
    model, state = voting_model, voting_model.classifier.state_dict()
    before = {scope: logits_of(model, pixel_values, relation_scope=scope) for scope in ("self", "batch")}
    model.add_classes(["owl", "crow"], new_images())
    config = model.config
    assert config.num_labels == model.num_labels == 7 and config.num_added_classes == 2
    assert (config.id2label[5], config.id2label[6]) == ("owl", "crow")
    assert config.label2id == {name: label for label, name in config.id2label.items()}
    assert model.rbi.references.labels.tolist() == [*LABELS.tolist(), 5, 6, 5, 6]
    assert config.references["num_references"] == NUM_REFERENCES + 4
    assert torch.equal(model.classifier.weight[:5], state["weight"])
    assert not model.classifier.training and model.classifier.weight.requires_grad
    # In the other scopes the old classes are answered as before, the new ones never.
    for scope, logits in before.items():
        after = logits_of(model, pixel_values, relation_scope=scope)
        assert_same_answers(after[:, :5], logits)
        assert (after.softmax(-1)[:, 5:] == 0).all()
    # In "reference" votes decide, and the classifier orders the classes that it knows.
    with torch.no_grad():
        outputs = model.rbi(pixel_values)
        known = model.classifier(outputs.pooler_output)[:, :5].softmax(-1)
    expected = outputs.reference_votes.clone()
    expected[:, :5] *= (known / known.amax(-1, keepdim=True)).sqrt()
    expected = expected / expected.sum(-1, keepdim=True)
    logits = logits_of(model, pixel_values)
    torch.testing.assert_close(logits.softmax(-1), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits.exp().sum(-1), torch.ones(7))


def test_a_frozen_classifier_stays_so(voting_model):
    voting_model.classifier.requires_grad_(False)
    voting_model.add_classes(["owl", "crow"], new_images())
    assert not any(parameter.requires_grad for parameter in voting_model.classifier.parameters())


NEW = ["owl", "crow"]


@pytest.fixture
def labeled_model(varied_model):
    """With labeled references of all five classes, through the backbone."""
    varied_model.set_references(items_of(make_images(15, seed=5), [index % NUM_LABELS for index in range(15)]))
    return varied_model


def new_items(labels=(0, 1, 0, 1), seed=21):
    return items_of(make_images(len(labels), seed=seed), labels)


def test_old_classes_are_ordered_by_votes_and_classifier(labeled_model, pixel_values):
    """Among themselves as v sqrt(q / max q), where q is the classifier's answer for the classes that it knows."""
    labeled_model.add_classes(NEW, new_items())
    with torch.no_grad():
        outputs = labeled_model.rbi(pixel_values)
        votes = outputs.reference_votes.double()
        known = outputs.pooler_output.double() @ labeled_model.classifier.weight[:NUM_LABELS].double().T
        known = (known + labeled_model.classifier.bias[:NUM_LABELS].double()).softmax(-1)
        probabilities = logits_of(labeled_model, pixel_values).double().exp()
    torch.testing.assert_close(probabilities.sum(1), torch.ones(7).double(), atol=1e-5, rtol=0)
    expected = votes[:, :NUM_LABELS] * (known / known.amax(1, keepdim=True)).sqrt()
    old = probabilities[:, :NUM_LABELS]
    assert_same_answers(old / old.sum(1, keepdim=True), expected / expected.sum(1, keepdim=True))
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
    """Images close to references of the known classes are still predicted as the known classes."""
    kernel.add_classes(NEW, new_items())
    pixel_values = torch.cat([make_images(4, seed=21), make_images(20, seed=5)])
    answers = logits_of(kernel, pixel_values + 0.02 * torch.randn_like(pixel_values)).argmax(1)
    assert answers.tolist() == [5, 6, 5, 6] + 4 * list(range(NUM_LABELS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scope", ["self", "batch"])
def test_the_other_scopes_never_answer_a_new_class(labeled_model, pixel_values, scope, dtype):
    model = labeled_model
    # The new references themselves among them.
    pixel_values = torch.cat([pixel_values, make_images(4, seed=21)])
    before = logits_of(model, pixel_values, relation_scope=scope)
    model.add_classes(NEW, new_items())
    model.to(dtype).eval()
    logits = logits_of(model, pixel_values.to(dtype), relation_scope=scope).float()
    assert logits.isfinite().all() and (logits.softmax(-1)[:, NUM_LABELS:] == 0).all()
    if dtype == torch.float32:
        assert_same_answers(logits[:, :NUM_LABELS], before)


def test_references_that_come_later_vote_for_new_classes(kernel):
    """Also by `add_references`, under the new numbers."""
    kernel.add_classes(NEW, new_items())
    later = make_images(2, seed=30)
    kernel.add_references(items_of(later, [6, 6]), strategy="random")
    assert logits_of(kernel, later).argmax(1).tolist() == [6, 6]
    assert kernel.describe_references()["references_per_class"]["crow"] == 4


def test_adding_twice_is_as_adding_at_once(labeled_model, pixel_values, tmp_path):
    labeled_model.save_pretrained(tmp_path)
    other = RBIForImageClassification.from_pretrained(tmp_path)
    labels, images = (0, 0, 1, 1), make_images(4, seed=21)
    labeled_model.add_classes(NEW, items_of(images, labels))
    other.add_classes(NEW[:1], items_of(images[:2], (0, 0)))
    other.add_classes(iter(NEW[1:]), items_of(images[2:], (0, 0)))
    for name in ("references", "id2label", "label2id", "num_added_classes"):
        assert getattr(other.config, name) == getattr(labeled_model.config, name)
    torch.testing.assert_close(logits_of(other, pixel_values), logits_of(labeled_model, pixel_values))
    with pytest.raises(ValueError, match=r"must be new and differ from each other, got \['owl'\]"):
        other.add_classes(["owl"], new_items((0,)))


def test_the_order_of_new_classes_is_of_no_account(labeled_model, pixel_values, tmp_path):
    labeled_model.save_pretrained(tmp_path)
    other = RBIForImageClassification.from_pretrained(tmp_path)
    images = make_images(4, seed=21)
    labeled_model.add_classes(["owl", "crow"], items_of(images, (0, 1, 0, 1)))
    other.add_classes(["crow", "owl"], items_of(images, (1, 0, 1, 0)))
    logits = logits_of(other, pixel_values)
    torch.testing.assert_close(logits[:, [0, 1, 2, 3, 4, 6, 5]], logits_of(labeled_model, pixel_values))


def test_the_classifier_learns_on(labeled_model, pixel_values):
    """Through the bank, with images of new classes too."""
    labeled_model.add_classes(NEW, new_items())
    labeled_model.rbi.self_loss_weight = 0.0
    output = labeled_model.train()(pixel_values, labels=torch.arange(7), relation_scope="reference")
    assert output.loss.isfinite() and output.logits.shape == (7, 7)
    output.loss.backward()
    gradient = labeled_model.classifier.weight.grad
    assert gradient[:NUM_LABELS].abs().max() > 0 and (gradient[NUM_LABELS:] == 0).all()
    assert all(value.grad.isfinite().all() for value in labeled_model.rbi.rra.parameters() if value.grad is not None)


@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_a_saved_model_keeps_its_new_classes(labeled_model, pixel_values, max_shard_size, tmp_path):
    model = labeled_model
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
        assert_same_answers(logits_of(loaded, pixel_values, relation_scope=scope), expected)
    with torch.no_grad():
        votes = AutoModel.from_pretrained(tmp_path)(pixel_values).reference_votes
    assert_same_answers(votes, model.rbi(pixel_values).reference_votes)
    # And takes more.
    loaded.add_classes(["jay"], new_items((0,), seed=40))
    assert loaded.config.id2label[7] == "jay" and loaded.config.num_added_classes == 3


def test_a_pipeline_names_new_classes(kernel, tmp_path):
    processor = ViTImageProcessorPil(
        size={"height": 32, "width": 32}, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
    )
    images = [
        Image.fromarray((pixels * IMAGENET_STD + IMAGENET_MEAN).clamp(0, 1).mul(255).byte().permute(1, 2, 0).numpy())
        for pixels in make_images(2, seed=21)
    ]
    items = [{"image": image, "label": label} for label, image in enumerate(images)]
    kernel.add_classes(NEW, items, image_processor=processor)
    kernel.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    classify = pipeline("image-classification", model=str(tmp_path), top_k=1)
    assert [answer[0]["label"] for answer in classify(images)] == NEW


# --- Classes of one name ---------------------------------------------------------------------------------------------

EQUAL = [
    ["crane", "dog", "crane", "emu", "crane"],
    ["crane"] * NUM_LABELS,
    ["crane", "crane (2)", "crane", "Crane", ""],
]


@pytest.mark.parametrize("names", EQUAL)
def test_references_are_counted_by_class_and_not_by_name(kernel, names):
    kernel.set_references(items_of(make_images(9, seed=5), [0, 0, 0, 1, 2, 2, 3, 4, 4]))
    kernel.config.id2label = dict(enumerate(names))
    counts = kernel.describe_references()["references_per_class"]
    assert list(counts.values()) == [3, 1, 2, 1, 2]
    assert list(counts) == list(kernel.class_names.values()) == list(shown_names(kernel.config.id2label).values())


def test_messages_tell_classes_of_one_name_apart(kernel):
    kernel.config.id2label = dict(enumerate(["crane", "dog", "crane", "emu", "crane"]))
    items = items_of(make_images(4, seed=5), [0, 1, 3, 4])
    with pytest.raises(ValueError, match=r"1 of the model's classes have no image, for instance 'crane \(2\)'"):
        kernel.set_references(items)
    kernel.set_references(items, strategy="random")
    with pytest.raises(ValueError, match=r"1 classes have none in the bank, for instance 'crane \(2\)'"):
        kernel.add_classes(NEW, new_items())


@pytest.mark.parametrize("names", EQUAL)
def test_classes_are_added_beside_classes_of_one_name(kernel, names):
    kernel.config.id2label = dict(enumerate(names))
    for name in (names[0], kernel.class_names[2]):
        with pytest.raises(ValueError, match="must be new and differ"):
            kernel.add_classes([name, "crow"], new_items())
    kernel.add_classes(NEW, new_items())
    assert list(kernel.config.id2label.values()) == [*names, *NEW]
    assert kernel.config.label2id == {name: label for label, name in kernel.class_names.items()}
    assert list(kernel.config.label2id.values()) == list(range(7))
    assert list(kernel.describe_references()["references_per_class"].values()) == [4] * 5 + [2] * 2


@pytest.mark.parametrize(
    ("names", "make_items", "message"),
    [
        ([], new_items, r"must be new and differ from each other, got \[\]"),
        (["LABEL_0"], lambda: new_items((0,)), "must be new and differ"),
        (["owl", "owl"], new_items, "must be new and differ"),
        (["owl", " owl "], new_items, "must be new and differ"),
        (["caf\u00e9", "cafe\u0301"], new_items, "must be new and differ"),
        (["LABEL_0 "], lambda: new_items((0,)), "must be new and differ"),
        ([" "], lambda: new_items((0,)), "must be new and differ"),
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
def test_what_cannot_be_added_leaves_the_model_as_it_was(labeled_model, pixel_values, names, make_items, message):
    model = labeled_model
    state, logits, classifier = state_of(model), logits_of(model, pixel_values), model.classifier
    with pytest.raises(ValueError, match=message):
        model.add_classes(names, make_items())
    assert_same_state(state_of(model), state)
    assert model.classifier is classifier and torch.equal(logits_of(model, pixel_values), logits)


def test_more_than_a_bank_holds_leaves_the_model_as_it_was(labeled_model, monkeypatch):
    state = state_of(labeled_model)
    monkeypatch.setattr(bank_rbi, "MAX_REFERENCES", 18)
    with pytest.raises(ValueError, match="19 references are more than a model carries"):
        labeled_model.add_classes(NEW, new_items())
    assert_same_state(state_of(labeled_model), state)


@pytest.mark.parametrize("labels", [LABELS.where(LABELS != 2, -100), torch.full((NUM_REFERENCES,), -100)])
def test_old_classes_need_labeled_references(voting_model, labels):
    voting_model.rbi.references.labels.copy_(labels)
    state = state_of(voting_model)
    with pytest.raises(ValueError, match=r"classes have none in the bank, for instance 'LABEL_\d': add some with"):
        voting_model.add_classes(NEW, new_items())
    assert_same_state(state_of(voting_model), state)


def test_new_classes_need_a_bank(bare_model):
    state = state_of(bare_model)
    with pytest.raises(ValueError, match=r"no reference bank to add classes to: make one with `set_references`"):
        bare_model.add_classes(NEW, new_items())
    assert_same_state(state_of(bare_model), state)
