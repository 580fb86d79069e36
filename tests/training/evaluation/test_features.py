"""Features of one pass give what the whole model gives, with what PSNR needs of the pixels and no more."""

import pytest
import torch
from transformers import ConvNextForImageClassification

from modeling_rbi import RBIConfig, RBIForImageClassification, pixel_statistics
from training.ablation.heads import Budget, train_head
from training.data.arguments import DataArguments
from training.data.image_dataset import ImageDataset
from training.data.reading import load_images
from training.data.transforms import EvalTransform
from training.evaluation import features
from training.evaluation.classifiers import predict_from
from training.evaluation.features import EightBitPixels, extract
from training.fine_tuning.models import ModelArguments, load_model


@pytest.fixture(scope="module")
def processor():
    """An image processor for images of 32 x 32."""
    return load_model(ModelArguments(backbone_config='{"model_type": "convnext"}', image_size=32), ["a", "b"])[1]


@pytest.fixture
def images(published, processor, own_cache):
    """40 test images of 4 classes."""
    data = load_images(DataArguments(dataset_format="cub_200_2011", dataset_dir=str(published)), seed=0)
    return ImageDataset(data["test"], EvalTransform(processor))


def _model(preset, backbone_config, processor, **fields):
    mean, std = pixel_statistics(processor)
    config = getattr(RBIConfig, preset)(
        backbone_config=backbone_config, num_labels=4, image_mean=mean, image_std=std, **fields
    )
    return RBIForImageClassification(config).eval()


def _pixel_values(images):
    return torch.stack([images[row]["pixel_values"] for row in range(len(images))])


def _logits(model, batch, scope):
    pixel_values, image_features, _ = batch
    with torch.no_grad():
        return model(pixel_values=pixel_values, image_features=image_features, relation_scope=scope).logits


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["paper", "kernel"])
@pytest.mark.parametrize("is_large", [False, True])
def test_the_logits_are_those_of_the_whole_model(preset, is_large, backbone_config, images, processor, monkeypatch):
    if is_large:
        monkeypatch.setattr(features, "_MAX_FLOAT_BYTES", 0)
    model = _model(preset, backbone_config, processor)
    extracted = extract(model, images, batch_size=7)
    assert isinstance(extracted.pixel_values, EightBitPixels) == (is_large and preset == "paper")
    assert extracted.labels.tolist() == images.labels
    rows = torch.randperm(40)[:15]
    for scope in ("self", "batch"):
        with torch.no_grad():
            expected = model(_pixel_values(images)[rows], relation_scope=scope).logits
        torch.testing.assert_close(_logits(model, extracted.batch(rows), scope), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(predict_from(model, extracted)(rows, scope), expected, rtol=1e-4, atol=1e-4)


def test_the_backbone_sees_each_image_once(backbone_config, images, processor):
    model = _model("kernel", backbone_config, processor)
    seen = []
    model.rbi.backbone.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    extract(model, images, batch_size=16)
    assert seen == [16, 16, 8]


def test_only_the_pixels_that_psnr_needs_are_kept(backbone_config, images, processor):
    for size in (5, 16, 64):
        model = _model("kernel", backbone_config, processor, psnr_image_size=size)
        assert extract(model, images).pixel_values.shape == (40, 3, min(size, 32), min(size, 32))


def test_the_bare_model_and_workers_give_the_same(backbone_config, images, processor):
    model = _model("kernel", backbone_config, processor)
    first, second = extract(model, images, batch_size=10), extract(model.rbi, images, batch_size=10, num_workers=1)
    # Batches are allocated separately, so that kernels may round otherwise.
    torch.testing.assert_close(first.features, second.features)
    torch.testing.assert_close(first.pixel_values, second.pixel_values)
    assert first.seconds > 0


def test_of_a_plain_classifier_the_logits_are_kept(backbone_config, images):
    backbone_config.num_labels = 4
    model = ConvNextForImageClassification(backbone_config)
    extracted = extract(model, images)
    with torch.no_grad():
        expected = model.eval()(_pixel_values(images)).logits
    torch.testing.assert_close(extracted.features, expected)
    assert extracted.pixel_values.numel() == 0


def test_heads_train_on_them(backbone_config, images, processor, monkeypatch):
    monkeypatch.setattr(features, "_MAX_FLOAT_BYTES", 0)
    model = _model("paper", backbone_config, processor)
    head = train_head(extract(model, images), torch.arange(40), model.config, Budget(steps=2, batch_size=20), seed=0)
    assert head.predict(torch.arange(40), "batch").shape == (40, 4)


class TestEightBitPixels:
    config = RBIConfig(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.25, 0.3])

    def _kept(self, pixels):
        """Pixels in [0, 1] that were normalized, kept and given back, in [0, 1] again."""
        mean, std = (torch.tensor(each)[:, None, None] for each in (self.config.image_mean, self.config.image_std))
        kept = EightBitPixels(len(pixels), pixels.shape[1:], self.config)
        kept[:] = (pixels - mean) / std
        assert kept.levels.dtype == torch.uint8
        return kept[torch.arange(len(pixels))] * std + mean

    def test_gray_levels_come_back(self):
        pixels = torch.randint(0, 256, (4, 3, 9, 9)) / 255
        torch.testing.assert_close(self._kept(pixels), pixels)

    def test_the_error_of_others_is_the_stated_one(self):
        pixels = torch.rand(50, 3, 64, 64)
        error = (self._kept(pixels) - pixels).square().mean()
        assert -10 * error.log10().item() == pytest.approx(58.9, abs=0.05)

    @pytest.mark.parametrize(("psnr", "change"), [(30, 0.011), (40, 0.11), (50, 1.0)])
    def test_psnr_changes_by_what_is_stated(self, psnr, change):
        first = 0.3 + 0.4 * torch.rand(20, 3, 64, 64)
        second = first + 10 ** (-psnr / 20) * torch.randn_like(first)
        before, after = (
            -10 * (one - other).square().mean().log10().item()
            for one, other in ((first, second), (self._kept(first), self._kept(second)))
        )
        assert before - after == pytest.approx(change, rel=0.1)

    def test_pixels_of_another_normalisation_are_refused(self):
        kept = EightBitPixels(1, (3, 4, 4), self.config)
        with pytest.raises(ValueError, match="pixel_statistics"):
            kept[:1] = torch.full((1, 3, 4, 4), 4.0)


@pytest.mark.parametrize("offset", [0.0, 10.0])
@pytest.mark.parametrize("num_references", [1, 12])
def test_features_of_the_same_image_are_recognized_on_any_machine(num_references, offset, backbone_config, processor):
    model = _model("kernel", backbone_config, processor)
    generator = torch.Generator().manual_seed(0)
    references = offset + torch.randn(num_references, model.config.feature_size, generator=generator)
    model.set_reference_features(references)
    pixels = torch.zeros(num_references, 3, 32, 32)
    noise = torch.randn(references.shape, generator=generator)
    # TF32 moves features by a few percent of the spread, float32 rounding by a millionth.
    rounding = 0.04 if num_references > 1 else 1e-6
    itself = torch.eye(num_references, dtype=torch.bool)
    found = features.is_itself(model.rbi.rpe, model.rbi.references, pixels, references + rounding * noise)
    assert found.tolist() == itself.tolist()
    # A similar photograph.
    assert not features.is_itself(model.rbi.rpe, model.rbi.references, pixels, references + 0.23 * noise).any()


def test_no_images(backbone_config, images, processor):
    images.split = images.split.select([])
    with pytest.raises(ValueError, match="no images"):
        extract(_model("kernel", backbone_config, processor), images)
