# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Settings that are chosen on planted features, and what they are worth."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from transformers import EvalPrediction

from tests.training.evaluation.shared import (
    FEATURE_SIZE,
    LABELS,
    NUM_HELD_OUT,
    NUM_LABELS,
    REFERENCE_LABELS,
    clear_bank,
    images_of,
    make_model,
    noisy_held_out,
    one_hot,
)
from training.evaluation import reference_settings
from training.evaluation.features import CachedImages
from training.evaluation.metrics import compute_metrics
from training.evaluation.reference_settings import (
    KERNELS,
    SHARES,
    VOTE_WEIGHTS,
    ReferenceSettings,
    candidates_for,
    fit_references,
    paired_gain,
    scores_with_references,
)


def best_of(model, held_out, candidates=None):
    results = fit_references(model, held_out, candidates_for(model) if candidates is None else candidates)
    return min(results, key=lambda result: result.loss)


def test_clear_references_of_the_same_class_get_the_largest_share(backbone_config):
    model = make_model(backbone_config)
    model.set_reference_features(clear_bank(), images_of(REFERENCE_LABELS))
    best = best_of(model, noisy_held_out())
    assert best.scope == "reference" and best.settings.share == max(SHARES) and best.settings.vote_weight == 0


def test_the_gain_follows_the_worth_of_the_images(backbone_config):
    """Where images look like images of another class, features tell more than PSNR; where features are noise, less."""
    model = make_model(backbone_config)
    # The classifier does not read all that attention does.
    more = 3 * one_hot(REFERENCE_LABELS + NUM_LABELS)
    model.set_reference_features(clear_bank() + more, images_of(REFERENCE_LABELS, noise=0.2))
    candidates = [ReferenceSettings(0.5, 0.3, gain) for gain in (0.0, 0.25, 1.0)]
    lying = noisy_held_out((LABELS + 1) % NUM_LABELS)
    lying = dataclasses.replace(lying, features=lying.features + 3 * one_hot(LABELS + NUM_LABELS))
    assert best_of(model, lying, candidates).settings.gain == 0.0
    telling = noisy_held_out(noise=2)
    assert best_of(model, telling, candidates).settings.gain == 1.0


@pytest.mark.slow
def test_labels_vote_where_the_classifier_knows_nothing(backbone_config):
    model = make_model(backbone_config)
    with torch.no_grad():
        model.classifier.weight.zero_()
    model.set_reference_features(clear_bank(), images_of(REFERENCE_LABELS), REFERENCE_LABELS)
    best = best_of(model, noisy_held_out())
    assert best.settings.vote_weight == max(VOTE_WEIGHTS) and best.metrics["accuracy"] > 0.9


@pytest.mark.slow
def test_no_votes_where_the_labels_of_the_bank_are_wrong(backbone_config):
    model = make_model(backbone_config)
    model.set_reference_features(clear_bank(), images_of(REFERENCE_LABELS), (REFERENCE_LABELS + 1) % NUM_LABELS)
    best = best_of(model, noisy_held_out())
    assert best.scope == "reference" and best.settings.vote_weight == 0


@pytest.mark.slow
def test_none_is_best_where_the_nearest_are_of_other_classes(backbone_config):
    """Likeness is of no class: the nearest references, in features and pixels, are all of the next one."""
    model = make_model(backbone_config)
    next_class = (REFERENCE_LABELS + 1) % NUM_LABELS
    model.set_reference_features(
        one_hot(next_class) + 5 * one_hot(REFERENCE_LABELS + NUM_LABELS), images_of(REFERENCE_LABELS), next_class
    )
    held_out = CachedImages(images_of(LABELS), one_hot(LABELS) + 5 * one_hot(LABELS + NUM_LABELS), LABELS)
    results = fit_references(model, held_out, candidates_for(model))
    best = min(results, key=lambda result: result.loss)
    assert best is results[0] and best.scope == "self" and best.settings == ReferenceSettings()
    assert best.metrics["accuracy"] == 1


def test_confidence_alone_is_no_gain(backbone_config):
    """A reference without features halves the logits, of a model that is too confident."""
    model = make_model(backbone_config)
    with torch.no_grad():
        model.classifier.weight.mul_(8)
    model.set_reference_features(torch.zeros(1, FEATURE_SIZE), images_of(LABELS[:1]))
    held_out = noisy_held_out()
    alone, halved = fit_references(model, held_out, [ReferenceSettings(0.5, 0.3, 1.0)])
    assert halved.metrics["accuracy"] == alone.metrics["accuracy"]
    assert halved.loss == pytest.approx(alone.loss, rel=1e-5)
    losses = [
        nn.functional.cross_entropy(factor * held_out.features[:, :NUM_LABELS], LABELS).item() for factor in (8, 4)
    ]
    assert losses[1] < losses[0] - 0.1, "the halved logits must be better as they are, or nothing was tested"


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["kernel", "paper"])
def test_the_order_of_the_held_out_images_is_of_no_account(backbone_config, preset, monkeypatch):
    monkeypatch.setattr(reference_settings, "_STEP", 50)
    model = make_model(backbone_config, preset)
    model.set_reference_features(clear_bank(), images_of(REFERENCE_LABELS), REFERENCE_LABELS)
    held_out, order = noisy_held_out(), torch.randperm(NUM_HELD_OUT)
    moved = CachedImages(held_out.pixel_values[order], held_out.features[order], held_out.labels[order])
    results = [fit_references(model, each, candidates_for(model)) for each in (held_out, moved)]
    for one, other in zip(*results, strict=True):
        assert one.settings == other.settings
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert one.metrics == pytest.approx(other.metrics, abs=1e-6)


def test_results_are_those_of_the_settings(backbone_config):
    """Of each candidate, from the answers of a model that has its settings."""
    model = make_model(backbone_config)
    model.set_reference_features(clear_bank(), images_of(REFERENCE_LABELS), REFERENCE_LABELS)
    held_out = noisy_held_out()
    candidates = [ReferenceSettings(0.25, 0.1, 0.25, 0.5), ReferenceSettings(0.5, 0.5, 1.0)]
    results = fit_references(model, held_out, candidates)
    assert [result.settings for result in results] == [ReferenceSettings(), *candidates]
    for result in results:
        fields = {"reference_vote_weight": result.settings.vote_weight}
        if result.scope == "reference":
            fields |= {
                "reference_share": result.settings.share,
                "reference_temperature": result.settings.temperature,
                "reference_gain": result.settings.gain,
            }
        other = make_model(backbone_config, **fields)
        bank = model.rbi.references
        other.set_reference_features(bank.features, images_of(REFERENCE_LABELS), REFERENCE_LABELS)
        other.rbi.references.images.copy_(bank.images)
        with torch.no_grad():
            logits = other(
                held_out.pixel_values, image_features=held_out.features, relation_scope=result.scope
            ).logits.double()
        assert result.metrics == pytest.approx(compute_metrics(EvalPrediction(logits.float(), LABELS)))
        losses = [
            nn.functional.cross_entropy(factor * logits, LABELS).item() for factor in np.geomspace(1 / 16, 8, 15)
        ]
        assert result.loss == pytest.approx(min(losses), rel=1e-4)


def state_of(model):
    return model.config.to_dict(), {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("vote_weight", [0.0, 0.3])
@pytest.mark.parametrize("is_interrupted", [False, True])
@pytest.mark.parametrize("preset", ["kernel", "paper", "cosine"])
def test_the_fit_leaves_the_model_as_it_was(backbone_config, preset, is_interrupted, vote_weight, monkeypatch):
    fields = {"reference_vote_weight": vote_weight}
    if preset == "cosine":
        # A share, a temperature and a gain that are learned, to which the candidates have others.
        fields |= {"reference_share": None, "reference_temperature": None, "reference_gain": None}
    model = make_model(backbone_config, "paper" if preset == "paper" else "kernel", **fields)
    model.set_reference_features(clear_bank(), images_of(REFERENCE_LABELS), REFERENCE_LABELS)
    held_out, candidates = noisy_held_out(), candidates_for(model)
    (config, state), answers = state_of(model), scores_with_references(model, held_out, "reference")
    if is_interrupted:
        calls = []

        def stop(prediction):
            calls.append(prediction)
            if len(calls) == len(candidates):
                raise KeyboardInterrupt
            return {}

        monkeypatch.setattr(reference_settings, "compute_metrics", stop)
        with pytest.raises(KeyboardInterrupt):
            fit_references(model, held_out, candidates)
    else:
        fit_references(model, held_out, candidates)
    now, weights = state_of(model)
    assert now == config
    assert all(torch.equal(value, state[name]) for name, value in weights.items())
    torch.testing.assert_close(scores_with_references(model, held_out, "reference"), answers)


def test_what_there_is_to_choose_from(backbone_config):
    features, pixels = clear_bank(), images_of(REFERENCE_LABELS)

    def kernels_and_votes(model):
        candidates = candidates_for(model)
        assert len(set(candidates)) == len(candidates) and {each.share for each in candidates} == set(SHARES)
        return {(each.temperature, each.gain) for each in candidates}, {each.vote_weight for each in candidates}

    model = make_model(backbone_config)
    model.set_reference_features(features, pixels)
    assert kernels_and_votes(model) == (set(KERNELS), {0.0})
    assert ReferenceSettings.of(model) in candidates_for(model)
    model.set_reference_features(features, pixels, REFERENCE_LABELS)
    assert kernels_and_votes(model) == (set(KERNELS), set(VOTE_WEIGHTS))
    model.set_reference_features(features)
    assert kernels_and_votes(model) == ({(temperature, None) for temperature, _ in KERNELS}, {0.0})
    model = make_model(backbone_config, "paper")
    model.set_reference_features(features, pixels, REFERENCE_LABELS)
    assert kernels_and_votes(model) == ({(None, None)}, set(VOTE_WEIGHTS))


def test_the_gain_is_paired(backbone_config):
    model = make_model(backbone_config, reference_share=0.5)
    model.set_reference_features(clear_bank(), images_of(REFERENCE_LABELS))
    held_out = noisy_held_out()
    hits = [
        (scores_with_references(model, held_out, scope).argmax(1) == LABELS).float() for scope in ("self", "reference")
    ]
    value, low, high = paired_gain(model, held_out)
    assert value == pytest.approx(100 * (hits[1] - hits[0]).mean().item()) and low < value < high
    # About that of the normal distribution for paired hits.
    margin = 196 * (hits[1] - hits[0]).std().item() / NUM_HELD_OUT**0.5
    assert high - low == pytest.approx(2 * margin, rel=0.25)
    model.config.reference_share = 1e-6
    assert paired_gain(model, held_out) == pytest.approx((0, 0, 0))
