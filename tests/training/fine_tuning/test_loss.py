"""The loss against torch's own, and the step in two passes against the plain backward."""

import copy
import weakref

import pytest
import torch
from torch import nn
from transformers import ConvNextConfig, ResNetConfig, ViTConfig

from modeling_rbi import RBIConfig, RBIForImageClassification, RBIImageClassifierOutput
from training.fine_tuning.loss import backward_in_two_passes, classification_loss, count_targets, training_loss
from training.fine_tuning.optimization import add_lora, freeze_backbone, freeze_batch_norm


def make_batch(size=9, num_labels=5, soft=False, padding=(), dtype=torch.float32):
    labels = torch.randint(num_labels, (size,))
    batch = {"labels": labels}
    if soft:
        batch["targets"] = torch.rand(size, num_labels, dtype=dtype).softmax(-1)
    for row in padding:
        labels[row] = -100
        if soft:
            batch["targets"][row] = 0.0
    return batch


def mean_loss(logits, batch, class_weights=None, label_smoothing=0.0):
    num_targets = count_targets(batch, class_weights)
    return classification_loss(logits, batch, num_targets, class_weights, label_smoothing)


WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 0.1, 3.0])


@pytest.mark.parametrize("padding", [(), (0, 4, 8)])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("class_weights", [None, WEIGHTS])
def test_of_labels_it_is_the_mean_of_torch(class_weights, label_smoothing, padding):
    logits, batch = torch.randn(9, 5), make_batch(padding=padding)
    expected = nn.functional.cross_entropy(
        logits, batch["labels"], class_weights, ignore_index=-100, label_smoothing=label_smoothing
    )
    torch.testing.assert_close(mean_loss(logits, batch, class_weights, label_smoothing), expected)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_of_soft_targets_it_is_the_mean_of_torch(label_smoothing):
    logits, batch = torch.randn(9, 5), make_batch(soft=True)
    expected = nn.functional.cross_entropy(logits, batch["targets"], label_smoothing=label_smoothing)
    torch.testing.assert_close(mean_loss(logits, batch, None, label_smoothing), expected)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("class_weights", [None, WEIGHTS])
def test_soft_targets_of_one_class_are_labels(class_weights, label_smoothing):
    logits, batch = torch.randn(9, 5), make_batch(padding=(3,))
    one_hot = nn.functional.one_hot(batch["labels"].clamp(min=0), 5).float()
    soft = batch | {"targets": one_hot * (batch["labels"] >= 0)[:, None]}
    torch.testing.assert_close(count_targets(soft, class_weights), count_targets(batch, class_weights))
    torch.testing.assert_close(
        mean_loss(logits, soft, class_weights, label_smoothing),
        mean_loss(logits, batch, class_weights, label_smoothing),
    )


def test_weighted_soft_targets_by_the_formula():
    logits, batch = torch.randn(9, 5), make_batch(soft=True)
    weighted = batch["targets"].double() * WEIGHTS.double()
    expected = -(weighted * logits.double().log_softmax(-1)).sum() / weighted.sum()
    torch.testing.assert_close(mean_loss(logits, batch, WEIGHTS).double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("class_weights", [None, WEIGHTS])
def test_padding_has_no_part(class_weights, soft):
    batch = make_batch(soft=soft, padding=(2, 7))
    is_real = batch["labels"] != -100
    logits = torch.randn(9, 5).masked_fill(~is_real[:, None], torch.nan).requires_grad_()
    loss = mean_loss(logits, batch, class_weights, 0.1)
    loss.backward()
    alone = logits.detach()[is_real].requires_grad_()
    expected = mean_loss(alone, {name: value[is_real] for name, value in batch.items()}, class_weights, 0.1)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logits.grad[is_real], alone.grad)
    assert (logits.grad[~is_real] == 0).all()


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("class_weights", [None, WEIGHTS])
def test_parts_add_up_to_the_whole(class_weights, soft):
    batch = make_batch(10, soft=soft, padding=(4, 9))
    logits = torch.randn(10, 5)
    parts = [{name: value[rows] for name, value in batch.items()} for rows in torch.arange(10).split([3, 5, 1, 1])]
    counts = [count_targets(part, class_weights) for part in parts]
    num_targets = count_targets(batch, class_weights)
    torch.testing.assert_close(sum(counts), num_targets)
    losses = [
        classification_loss(part_logits, part, num_targets, class_weights, 0.1)
        for part_logits, part in zip(logits.split([3, 5, 1, 1]), parts, strict=True)
    ]
    torch.testing.assert_close(sum(losses), mean_loss(logits, batch, class_weights, 0.1))
    assert losses[-1] == 0, "padding alone"


@pytest.mark.parametrize("soft", [False, True])
def test_a_process_with_padding_alone_has_a_loss_and_gradients(soft):
    """DDP needs its backward."""
    logits = torch.randn(2, 5, requires_grad=True)
    batch = make_batch(2, soft=soft, padding=(0, 1))
    assert count_targets(batch, WEIGHTS) == count_targets(batch) == 0
    classification_loss(logits, batch, torch.tensor(7.0), WEIGHTS, 0.1).backward()
    assert (logits.grad == 0).all()


def test_half_precision_is_summed_in_float32():
    batch = make_batch(9)
    logits = torch.randn(9, 5).bfloat16()
    assert mean_loss(logits, batch).dtype == torch.float32
    torch.testing.assert_close(mean_loss(logits, batch), mean_loss(logits.float(), batch))


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_the_training_loss_is_the_weighted_mean_of_both(weight, soft):
    batch = make_batch(soft=soft, padding=(2,))
    num_targets = 3 * count_targets(batch, WEIGHTS)  # as where a step has more batches
    outputs = RBIImageClassifierOutput(logits=torch.randn(9, 5), self_logits=torch.randn(9, 5))
    together, alone = (
        classification_loss(logits, batch, num_targets, WEIGHTS, 0.1)
        for logits in (outputs.logits, outputs.self_logits)
    )
    actual = training_loss(outputs, batch, num_targets, weight, WEIGHTS, 0.1)
    torch.testing.assert_close(actual, (1 - weight) * together + weight * alone)
    outputs.self_logits = None
    assert training_loss(outputs, batch, num_targets, weight, WEIGHTS, 0.1) == together


def test_the_training_loss_is_that_of_the_model():
    model, pixel_values = make_model("convnext", "kernel"), smooth_images()
    model.rbi.self_loss_weight = 0.3
    labels = torch.tensor([0, 1, 2, -100, 4, 0, 1])
    batch = {"labels": labels}
    outputs = model(pixel_values=pixel_values, labels=labels)
    assert outputs.self_logits is not None
    torch.testing.assert_close(training_loss(outputs, batch, count_targets(batch), 0.3), outputs.loss)


_VIT = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
BACKBONES = {
    "convnext": ConvNextConfig(hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1], layer_scale_init_value=0.5),
    "convnext_drop_path": ConvNextConfig(
        hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1], drop_path_rate=0.5, layer_scale_init_value=0.5
    ),
    "vit": ViTConfig(**_VIT, image_size=32, patch_size=8),
    "vit_dropout": ViTConfig(
        **_VIT, image_size=32, patch_size=8, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.2
    ),
    "resnet": ResNetConfig(embedding_size=8, hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1]),
}
# Each size of a small batch of 7 images (1, with a rest, without one, and larger), each with all other values in turn.
WHOLE_BATCH_CASES = [
    (1, "convnext", "paper", "none"),
    (1, "vit", "kernel", "rows"),
    (2, "vit", "paper", "pairs"),
    (2, "convnext", "kernel", "none"),
    (3, "convnext", "paper", "rows"),
    (3, "vit", "kernel", "pairs"),
    (4, "vit", "paper", "none"),
    (4, "convnext", "kernel", "pairs"),
    (7, "convnext", "kernel", "rows"),
    (7, "vit", "paper", "rows"),
    (10, "convnext", "paper", "pairs"),
    (10, "vit", "kernel", "none"),
]


def make_model(backbone, preset="paper", **fields):
    torch.manual_seed(0)
    config = getattr(RBIConfig, preset)(backbone_config=copy.deepcopy(BACKBONES[backbone]), num_labels=5, **fields)
    return RBIForImageClassification(config).train()


def smooth_images(size=7):
    images = nn.functional.interpolate(torch.rand(size, 3, 4, 4), size=(32, 32), mode="bilinear")
    return (images - 0.45) / 0.225


def relation_masks(kind, size=7):
    if kind == "rows":
        return torch.arange(size) != 3
    if kind == "pairs":
        return (torch.rand(size, size) > 0.4) | torch.eye(size, dtype=torch.bool)
    return None


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(actual, expected, atol=1e-5):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            actual[name], gradient, rtol=1e-4, atol=atol, msg=lambda text, name=name: name + text
        )
    assert sum(gradient.abs().sum() for name, gradient in expected.items() if ".backbone." in name) > 1e-4


def two_passes(model, pixel_values, mask, micro_batch_size, loss_of, backward=torch.Tensor.backward):
    model.zero_grad()
    loss = backward_in_two_passes(model, pixel_values, mask, micro_batch_size, loss_of, backward)
    return loss, gradients(model)


def loss_for(size=7):
    batch = {"labels": torch.arange(size) % 5}
    return lambda outputs: mean_loss(outputs.logits, batch)


@pytest.mark.parametrize(("micro_batch_size", "backbone", "preset", "mask"), WHOLE_BATCH_CASES)
def test_gradients_are_those_of_the_whole_batch(micro_batch_size, backbone, preset, mask):
    model, pixel_values, loss_of = make_model(backbone, preset), smooth_images(), loss_for()
    relation_mask = relation_masks(mask)
    loss = loss_of(model(pixel_values=pixel_values, relation_mask=relation_mask))
    loss.backward()
    expected = gradients(model)
    actual_loss, actual = two_passes(model, pixel_values, relation_mask, micro_batch_size, loss_of)
    torch.testing.assert_close(actual_loss, loss.detach())
    assert not actual_loss.requires_grad
    assert_same_gradients(actual, expected)


@pytest.mark.parametrize(("micro_batch_size", "backbone", "preset", "_"), WHOLE_BATCH_CASES[::2])
def test_with_a_self_loss_gradients_are_those_of_the_whole_batch(micro_batch_size, backbone, preset, _):
    model, pixel_values, mask = make_model(backbone, preset), smooth_images(), relation_masks("rows")
    model.rbi.self_loss_weight = 0.4
    batch = {"labels": torch.arange(7) % 5}

    def loss_of(outputs):
        return training_loss(outputs, batch, torch.tensor(7.0), 0.4)

    loss = loss_of(model(pixel_values=pixel_values, relation_mask=mask))
    loss.backward()
    expected = gradients(model)
    actual_loss, actual = two_passes(model, pixel_values, mask, micro_batch_size, loss_of)
    torch.testing.assert_close(actual_loss, loss.detach())
    assert_same_gradients(actual, expected)
    _, without = two_passes(model, pixel_values, mask, micro_batch_size, loss_for())
    assert any((actual[name] - without[name]).abs().max() > 1e-3 for name in actual), "it is of both"


def in_micro_batches(model, pixel_values, mask, micro_batch_size, loss_of):
    """The plain backward of the features of the same small batches, all of whose graphs are kept."""
    model.zero_grad()
    num_parts = -(-len(pixel_values) // micro_batch_size)
    features = torch.cat([model.rbi.extract_features(part)[0] for part in pixel_values.tensor_split(num_parts)])
    loss = loss_of(model(pixel_values=pixel_values, image_features=features, relation_mask=mask))
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize(
    ("micro_batch_size", "backbone", "preset"),
    [
        (1, "convnext_drop_path", "paper"),
        (2, "vit_dropout", "paper"),
        (3, "convnext_drop_path", "kernel"),
        (7, "vit_dropout", "kernel"),
    ],
)
def test_both_passes_draw_the_same_dropout(micro_batch_size, backbone, preset):
    model = make_model(backbone, preset, attention_dropout=0.2, classifier_dropout=0.3)
    pixel_values, loss_of, mask = smooth_images(), loss_for(), relation_masks("pairs")
    torch.manual_seed(5)
    expected_loss, expected = in_micro_batches(model, pixel_values, mask, micro_batch_size, loss_of)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    loss, actual = two_passes(model, pixel_values, mask, micro_batch_size, loss_of)
    assert torch.equal(torch.get_rng_state(), state), "as if there had been one pass"
    torch.testing.assert_close(loss, expected_loss)
    assert_same_gradients(actual, expected)
    torch.manual_seed(6)
    other_loss, _ = two_passes(model, pixel_values, mask, micro_batch_size, loss_of)
    assert other_loss != loss, "there is dropout"


@pytest.mark.parametrize("micro_batch_size", [3, 4, 6])
@pytest.mark.parametrize("is_frozen", [False, True])
def test_batch_statistics_are_updated_once(micro_batch_size, is_frozen):
    model = make_model("resnet")
    if is_frozen:
        freeze_batch_norm(model)
    other = copy.deepcopy(model)
    pixel_values, loss_of = smooth_images(), loss_for()
    expected_loss, expected = in_micro_batches(model, pixel_values, None, micro_batch_size, loss_of)
    loss, actual = two_passes(other, pixel_values, None, micro_batch_size, loss_of)
    torch.testing.assert_close(loss, expected_loss)
    assert_same_gradients(actual, expected)
    buffers = dict(other.named_buffers())
    num_parts = -(-7 // micro_batch_size)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffers[name], buffer)
        if name.endswith("num_batches_tracked"):
            assert buffer == (0 if is_frozen else num_parts)


def test_no_part_is_so_small_that_it_has_no_statistics():
    model, sizes = make_model("resnet"), []
    model.rbi.backbone.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    backward_in_two_passes(model, smooth_images(9), None, 4, loss_for(9), torch.Tensor.backward)
    assert sizes == [3, 3, 3] * 2


def test_gradients_add_to_those_that_are_there():
    model, pixel_values, loss_of = make_model("convnext"), smooth_images(), loss_for()
    _, once = two_passes(model, pixel_values, None, 3, loss_of)
    backward_in_two_passes(model, pixel_values, None, 3, loss_of, torch.Tensor.backward)
    assert_same_gradients(gradients(model), {name: 2 * gradient for name, gradient in once.items()})


def test_a_scaled_backward_scales_all_gradients():
    model, pixel_values, loss_of = make_model("convnext"), smooth_images(), loss_for()
    loss, plain = two_passes(model, pixel_values, None, 3, loss_of)
    scaled_loss, scaled = two_passes(model, pixel_values, None, 3, loss_of, lambda loss: (1024 * loss).backward())
    torch.testing.assert_close(scaled_loss, loss)  # computed twice
    assert_same_gradients({name: gradient / 1024 for name, gradient in scaled.items()}, plain)


@pytest.mark.parametrize("backbone", ["convnext", "vit"])
def test_under_autocast_every_weight_has_its_gradient(backbone):
    """The first pass, without gradient, must leave the second no weights that were cast without gradient."""
    model, pixel_values, loss_of = make_model(backbone), smooth_images(), loss_for()
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(model(pixel_values=pixel_values)).backward()
        expected = gradients(model)
        _, actual = two_passes(model, pixel_values, None, 3, loss_of)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (actual[name] - gradient).norm() / gradient.norm().clamp(min=1e-3)
        assert error < 0.1, name


def test_a_frozen_backbone_is_run_once():
    model, pixel_values, loss_of = make_model("vit_dropout"), smooth_images(), loss_for()
    freeze_backbone(model)
    loss_of(model(pixel_values=pixel_values)).backward()
    expected = gradients(model)
    assert not any(".backbone." in name for name in expected)
    sizes = []
    model.rbi.backbone.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    _, actual = two_passes(model, pixel_values, None, 3, loss_of)
    assert sizes == [3, 2, 2]
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-5)


def test_adapters_have_their_gradients():
    model, pixel_values, loss_of = make_model("vit"), smooth_images(), loss_for()
    add_lora(model, rank=2)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.1)
    model.train()
    loss_of(model(pixel_values=pixel_values)).backward()
    expected = gradients(model)
    assert any(".lora_A." in name for name in expected)
    _, actual = two_passes(model, pixel_values, None, 3, loss_of)
    assert_same_gradients(actual, expected)


def test_an_image_that_is_not_finite_touches_no_other():
    model, pixel_values = make_model("convnext"), smooth_images()
    batch = {"labels": torch.arange(7) % 5}
    batch["labels"][2] = -100
    bad = pixel_values.clone()
    bad[2] = torch.inf
    real = torch.arange(7) != 2
    _, expected = two_passes(
        model,
        pixel_values[real],
        None,
        3,
        lambda outputs: mean_loss(outputs.logits, {"labels": batch["labels"][real]}),
    )
    _, actual = two_passes(model, bad, None, 3, lambda outputs: mean_loss(outputs.logits, batch))
    head = {name for name in expected if ".backbone." not in name}
    for name in head:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-5)


class _Kept:
    """Counts the bytes that autograd keeps of the backbone's activations, and the most there ever were."""

    def __init__(self):
        self.now = self.most = 0

    def pack(self, tensor):
        kept = tensor.detach().clone()
        size = kept.numel() * kept.element_size()
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(kept, self._drop, size)
        return kept

    def _drop(self, size):
        self.now -= size

    @staticmethod
    def unpack(kept):
        return kept


def most_kept(step):
    kept = _Kept()
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack):
        step()
    assert kept.now == 0, "nothing is left"
    return kept.most


def test_one_small_batch_is_in_memory_at_a_time():
    model, loss_of = make_model("convnext"), loss_for(12)
    pixel_values = smooth_images(12)

    def head_alone():
        with torch.no_grad():
            features = model.rbi.extract_features(pixel_values)[0]
        loss_of(model(pixel_values=pixel_values, image_features=features.requires_grad_())).backward()

    def small_batch():
        model.rbi.extract_features(pixel_values[:2])[0].sum().backward()

    def whole():
        loss_of(model(pixel_values=pixel_values)).backward()

    in_two_passes = most_kept(lambda: two_passes(model, pixel_values, None, 2, loss_of))
    assert in_two_passes <= 1.01 * max(most_kept(head_alone), most_kept(small_batch))
    assert in_two_passes < most_kept(whole) / 4
