# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""
The Space's app: it shows what the model answers, and it works in a browser.

    SPACE_MODEL=outputs/mine SPACE_SCREENSHOTS=docs python -m pytest tests/model_cards/test_space.py -k screenshots

writes docs/space_one_image.png and docs/space_several_images.png. The committed ones show the model of
training/recipes/fashion_mnist.yaml (seed 42) with its training images as references. Its examples are the first two
test images of four classes.
"""

import ast
import copy
import html
import importlib.metadata
import io
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import gradio as gr
import httpx
import numpy as np
import pytest
import torch
from huggingface_hub import metadata_load
from PIL import Image, PngImagePlugin
from playwright.sync_api import Page, expect, sync_playwright
from transformers import AutoImageProcessor, ResNetConfig, ResNetForImageClassification, pipeline
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from modeling_rbi import RBIConfig, RBIForImageClassification, upright_rgb
from training.space import APP, load_app


ROOT = Path(__file__).resolve().parents[2]
SPACE = APP.parent
# Without Chromium's own services, which connect to the internet, and without its sandbox, which does not run as root.
CHROMIUM_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def app():
    return load_app()


@pytest.fixture(scope="module")
def loaded(app, model_folder):
    """The app's classifier, and the oracle: the model of the same folder, called directly."""
    return app.Classifier(str(model_folder)), RBIForImageClassification.from_pretrained(model_folder).eval()


@pytest.fixture
def classifier(loaded):
    return copy.deepcopy(loaded[0])


@pytest.fixture
def model(loaded):
    return copy.deepcopy(loaded[1])


@pytest.fixture
def images(image_files):
    return [Image.open(path).convert("RGB") for path in image_files]


def ask(model, folder, images, **kwargs):
    pixel_values = AutoImageProcessor.from_pretrained(folder)(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return model(pixel_values, output_relations=True, **kwargs)


@pytest.fixture(scope="module")
def pets_folder(model_folder, image_files, tmp_path_factory):
    """The model's folder with 8 examples."""
    folder = shutil.copytree(model_folder, tmp_path_factory.mktemp("space") / "pets")
    (folder / "examples").mkdir()
    for path in image_files[:8]:
        shutil.copy(path, folder / "examples")
    return folder


class TestOneImage:
    def test_is_what_the_model_says(self, classifier, model, model_folder, images):
        for image in images:
            answer = classifier.classify(image)
            single, related = (
                ask(model, model_folder, [image], relation_scope=scope) for scope in ("self", "reference")
            )
            for scores, outputs in ((answer.without_references, single), (answer.with_references, related)):
                expected = dict(
                    zip(model.config.id2label.values(), outputs.logits[0].softmax(-1).tolist(), strict=True)
                )
                assert scores == pytest.approx(expected, abs=1e-6)
                assert list(scores.values()) == sorted(scores.values(), reverse=True)
            attention = related.relation_attentions[0].mean(0)
            assert answer.attention_to_itself == pytest.approx(float(attention[0]), abs=1e-6)
            for reference in answer.nearest:
                assert reference.attention == pytest.approx(float(attention[1 + reference.number]), abs=1e-6)

    def test_all_attention_is_accounted_for(self, app, classifier, images, monkeypatch):
        # Spreads the attention over the whole bank.
        classifier.model.config.update({"reference_gain": 0.02, "reference_temperature": 5.0})
        for most in (6, 2):
            monkeypatch.setattr(app, "NUM_REFERENCES", most)
            answer = classifier.classify(images[0])
            assert 1 <= len(answer.nearest) <= most
            shares = [answer.attention_to_itself, *(each.attention for each in answer.nearest)]
            assert sum(shares) + answer.attention_to_others == pytest.approx(1, abs=1e-6)
            assert shares[1:] == sorted(shares[1:], reverse=True)
        assert answer.attention_to_others > 0.05

    def test_an_image_of_the_bank_finds_itself(self, classifier, images):
        nearest = classifier.classify(images[0]).nearest[0]
        assert (nearest.number, nearest.label) == (0, "cat")
        # The image processor crops the middle of 40 x 48 pixels.
        small = images[0].crop((0, 4, 40, 44)).resize(nearest.image.size, Image.Resampling.BOX)
        difference = _pixels(small) - _pixels(nearest.image)
        assert difference.abs().max() < 20
        assert difference.abs().mean() < 2

    def test_the_page_says_it_all(self, app, classifier, images):
        answer = classifier.classify(images[0])
        page = app.attention_html(answer, images[0])
        shares = [float(share) for share in re.findall(r"<b>([\d.]+)%</b>", page)]
        assert sum(shares) == pytest.approx(100, abs=0.5)
        assert page.count("<img") == 1 + len(answer.nearest)

    @pytest.mark.slow
    def test_without_a_bank_there_is_one_answer(self, app, model, model_folder, images, tmp_path):
        model.remove_references()
        folder = _saved(model, model_folder, tmp_path)
        answer = app.Classifier(str(folder)).classify(images[0])
        assert answer.with_references is None
        assert not answer.nearest
        logits = ask(model, model_folder, images[:1]).logits
        assert max(answer.without_references.values()) == pytest.approx(float(logits.softmax(-1).max()), abs=1e-6)
        file = str(tmp_path / "image.png")
        images[0].save(file)
        label = app.build(str(folder))(file, api_name="classify")
        assert label["label"] == max(answer.without_references, key=answer.without_references.get)

    def test_without_images_and_labels_there_are_numbers(self, app, model, model_folder, images, tmp_path):
        model.set_reference_features(model.rbi.references.features.clone())
        folder = _saved(model, model_folder, tmp_path)
        answer = app.Classifier(str(folder)).classify(images[0])
        page = app.attention_html(answer, images[0])
        assert answer.nearest[0].label == "no label"
        assert page.count("<img") == 1
        assert f"reference {answer.nearest[0].number + 1}<" in page


class TestSeveralImages:
    def test_is_what_the_model_says(self, classifier, model, model_folder, images):
        comparison = classifier.compare(images)
        single, batch = (ask(model, model_folder, images, relation_scope=scope) for scope in ("self", "batch"))
        assert torch.allclose(comparison.single, single.logits.softmax(-1), atol=1e-6)
        assert torch.allclose(comparison.batch, batch.logits.softmax(-1), atol=1e-6)
        assert torch.allclose(comparison.attention, batch.relation_attentions.mean(1), atol=1e-6)
        assert torch.allclose(comparison.relations, batch.relation_similarities, atol=1e-6)

    def test_relations_are_mutual_and_follow_the_images(self, classifier, images):
        relations = classifier.compare(images).relations
        others = ~torch.eye(len(images), dtype=torch.bool)
        assert torch.allclose(relations[others], relations.T[others], atol=1e-6)
        assert relations.min() >= 0
        assert relations.max() <= 1
        order = torch.randperm(len(images)).tolist()
        shuffled = classifier.compare([images[row] for row in order]).relations
        assert torch.allclose(shuffled, relations[order][:, order], atol=1e-5)

    def test_the_same_image_twice_has_relation_one(self, classifier, images):
        relations = classifier.compare([images[0], images[4], images[0]]).relations
        assert float(relations[0, 2]) == pytest.approx(1, abs=1e-5)
        assert relations[0, 1] < 0.99

    def test_map_and_table(self, app, classifier, images, image_files):
        names = [path.name for path in image_files]
        comparison = classifier.compare(images)
        page = app.map_html(comparison, images, names)
        cells = _cells(page)
        others = ~torch.eye(len(images), dtype=torch.bool)
        assert torch.allclose(cells[others], comparison.relations[others], atol=0.00501)
        assert cells[~others].isnan().all()
        rows = app.table_rows(comparison, names, classifier)
        assert [row[1] for row in rows] == names
        for row, single, batch in zip(rows, comparison.single, comparison.batch, strict=True):
            assert row[2:6] == [
                classifier.label(int(single.argmax())),
                f"{100 * single.max():.1f}%",
                classifier.label(int(batch.argmax())),
                f"{100 * batch.max():.1f}%",
            ]

    def test_a_model_without_relations_gets_a_map_of_attention(self, app, model, model_folder, images, tmp_path):
        model.remove_references()
        model.config.relation_position_encoding = "none"
        model = RBIForImageClassification(model.config).eval()
        folder = _saved(model, model_folder, tmp_path)
        comparison = app.Classifier(str(folder)).compare(images)
        assert comparison.relations is None
        page = app.map_html(comparison, images, [""] * len(images))
        assert torch.allclose(_cells(page).sum(1), torch.ones(len(images)), atol=0.05)

    @pytest.mark.parametrize(
        ("name", "plain"),
        [("pets", "pets"), ("a*b*_c_", r"a\*b\*\_c\_"), ("<b>[x](y)", r"\<b\>\[x\]\(y\)"), ("`$`", r"\`\$\`")],
    )
    def test_the_name_of_the_model_is_no_markup(self, app, classifier, monkeypatch, name, plain):
        monkeypatch.setattr(classifier, "name", name)
        monkeypatch.setattr(classifier, "is_of_hub", False)
        assert f"\n{plain} is an image classifier" in app._introduction(classifier)

    def test_names_are_no_markup(self, app, classifier, images):
        name = '<img src=x onerror="alert(1)">'
        page = app.map_html(classifier.compare(images[:2]), images[:2], [name, name])
        assert "<img src=x" not in page
        assert page.count(html.escape(name)) == 4


class TestClassesOfOneName:
    @pytest.fixture(
        params=[
            (["crane", "dog", "crane"], ["crane (0)", "dog", "crane (2)"]),
            (["crane"] * 3, ["crane (0)", "crane (1)", "crane (2)"]),
            (["crane", "crane", "crane (0)"], ["crane (0) (0)", "crane (1)", "crane (0)"]),
            (["", "Crane", "crane"], ["(0)", "Crane", "crane"]),
        ]
    )
    def shown(self, request, model):
        """Gives the model equal names, and what is to be shown."""
        names, shown = request.param
        model.config.id2label = dict(enumerate(names))
        return shown

    @pytest.mark.slow
    def test_each_has_its_score(self, app, model, model_folder, image_files, images, shown, tmp_path):
        folder = str(_saved(model, model_folder, tmp_path / "model"))
        classifier, classify = app.Classifier(folder), app.build(folder)
        for path, image in zip(image_files[::4], images[::4], strict=True):
            answer, labels = classifier.classify(image), classify(str(path), api_name="classify")
            for scope, scores, label in (
                ("self", answer.without_references, labels[1]),
                ("reference", answer.with_references, labels[0]),
            ):
                logits = ask(model, model_folder, [image], relation_scope=scope).logits[0]
                expected = dict(zip(shown, logits.softmax(-1).tolist(), strict=True))
                assert scores == pytest.approx(expected, abs=1e-6)
                assert {each["label"]: each["confidence"] for each in label["confidences"]} == pytest.approx(
                    expected, abs=1e-6
                )
                assert label["label"] == shown[int(logits.argmax())]

    def test_references_and_the_table(self, app, classifier, model, images, image_files, shown):
        classifier.model.config.id2label = model.config.id2label
        for number, image in ((0, images[0]), (2, images[6])):
            assert classifier.classify(image).nearest[0].label == shown[number]
        comparison = classifier.compare(images)
        rows = app.table_rows(comparison, [path.name for path in image_files], classifier)
        for place, scores in ((2, comparison.single), (4, comparison.batch)):
            assert [row[place] for row in rows] == [shown[number] for number in scores.argmax(-1).tolist()]

    def test_a_change_from_one_to_the_other_is_said(self, app, images):
        answer = app.Answer({"crane (0)": 0.6, "crane (2)": 0.4}, {"crane (2)": 0.7, "crane (0)": 0.3})
        page = app.attention_html(answer, images[0])
        assert (
            "change the answer from <b>crane (0)</b> (60.0% without them) to <b>crane (2)</b> (70.0% with them)"
            in page
        )


class TestOtherModels:
    def test_gray(self, app, backbone_config, images, image_files, tmp_path):
        backbone_config.num_channels = 1
        config = RBIConfig.kernel(backbone_config=backbone_config, image_mean=[0.5], image_std=[0.5], num_labels=3)
        model = RBIForImageClassification(config).eval()
        image_processor = ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.5], image_std=[0.5])
        gray = [image.convert("L") for image in images]
        model.set_references([{"image": image} for image in gray[:4]], image_processor=image_processor)
        model.save_pretrained(tmp_path)
        image_processor.save_pretrained(tmp_path)
        classifier = app.Classifier(str(tmp_path))
        answer = classifier.classify(app.read_image(str(image_files[0]), upright_rgb))
        related = ask(model, tmp_path, gray[:1], relation_scope="reference")
        assert answer.with_references == pytest.approx(
            {f"LABEL_{number}": score for number, score in enumerate(related.logits[0].softmax(-1).tolist())}, abs=1e-6
        )
        assert app.attention_html(answer, images[0]).count("<img") == 1 + len(answer.nearest)
        batch = ask(model, tmp_path, gray, relation_scope="batch").logits.softmax(-1)
        assert torch.allclose(classifier.compare(images).batch, batch, atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_saved_in_half_precision(self, app, model, model_folder, images, tmp_path, dtype):
        folder = _saved(model.to(dtype), model_folder, tmp_path)
        classifier = app.Classifier(str(folder))
        answer = classifier.classify(images[0])
        expected = ask(model.float(), model_folder, images[:1], relation_scope="reference").logits[0].softmax(-1)
        assert sorted(answer.with_references.values()) == pytest.approx(sorted(expected.tolist()), abs=1e-5)
        assert classifier.compare(images).batch.isfinite().all()

    def test_run_in_half_precision(self, app, classifier, model, model_folder, images):
        classifier.model.to(torch.bfloat16)
        answer = classifier.classify(images[0])
        expected = ask(model, model_folder, images[:1], relation_scope="reference").logits[0].softmax(-1)
        assert sorted(answer.with_references.values()) == pytest.approx(sorted(expected.tolist()), abs=0.05)
        comparison = classifier.compare(images[:3])
        names = ["a", "b", "c"]
        assert app.map_html(comparison, images[:3], names).count("<td") == 10
        assert len(app.table_rows(comparison, names, classifier)) == 3


def _pixels(image: Image.Image) -> torch.Tensor:
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).float()


def _cells(page: str) -> torch.Tensor:
    """The numbers of a map; NaN for empty cells."""
    body = page.split("<tbody>")[1]
    rows = [re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in body.split("</tr>")[:-1]]
    return torch.tensor([[math.nan if cell == "-" else float(cell) for cell in row] for row in rows])


def _saved(model, model_folder: Path, folder: Path) -> Path:
    model.save_pretrained(folder)
    shutil.copy(model_folder / "preprocessor_config.json", folder)
    return folder


def _file(image: Image.Image, format: str = "PNG", **kwargs) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **kwargs)
    return buffer.getvalue()


def test_the_decoder_is_of_the_models_own_code(app, classifier, model_folder, monkeypatch):
    assert classifier.upright_rgb is upright_rgb
    remote = get_class_from_dynamic_module("modeling_rbi.RBIForImageClassification", str(model_folder))
    decoder = app._find_decoder(remote.__new__(remote), "pets")
    assert decoder.__module__.startswith("transformers_modules.") and decoder is not upright_rgb
    monkeypatch.delattr("modeling_rbi.image_processing_rbi.upright_rgb")
    with pytest.raises(ValueError, match=r"code of .*pets is older than this app .*publish it again"):
        app.Classifier(str(model_folder))


class TestReadImage:
    def test_as_the_pipeline_reads_it(self, app, image_files):
        for path in image_files[:2]:
            assert app.read_image(str(path), upright_rgb).tobytes() == Image.open(path).convert("RGB").tobytes()

    # Pillow warns of broken EXIF.
    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_odd_images(self, app, tmp_path, odd_image):
        path = tmp_path / "image"
        path.write_bytes(odd_image.file)
        if Image.open(path).format in app.FORMATS:
            odd_image.check(app.read_image(str(path), upright_rgb))
        else:
            with pytest.raises(gr.Error, match="not an image of a known format"):
                app.read_image(str(path), upright_rgb)

    def test_a_long_text_in_a_png_file(self, app, tmp_path):
        text = PngImagePlugin.PngInfo()
        text.add_itxt("notes", "a" * 2_000_000, zip=True)
        path = tmp_path / "a.png"
        Image.new("RGB", (4, 4), "red").save(path, pnginfo=text)
        assert app.read_image(str(path), upright_rgb).getpixel((0, 0)) == (255, 0, 0)

    def test_16_bits_are_scaled_to_8(self, app, tmp_path):
        path = tmp_path / "deep.png"
        Image.fromarray(np.array([[0, 128, 129, 257 * 100, 65535]], dtype=np.uint16)).save(path)
        assert [app.read_image(str(path), upright_rgb).getpixel((x, 0))[0] for x in range(5)] == [0, 0, 1, 100, 255]

    def test_as_narrow_as_in_training(self, app, tmp_path):
        path = tmp_path / "narrow.png"
        Image.new("L", (200, 2)).save(path)
        assert app.read_image(str(path), upright_rgb).size == (200, 2)

    def test_upright(self, app, tmp_path):
        image = Image.new("RGB", (40, 20), "red")
        image.putpixel((0, 0), (0, 0, 255))
        exif = image.getexif()
        exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
        image.save(tmp_path / "turned.png", exif=exif)
        read = app.read_image(str(tmp_path / "turned.png"), upright_rgb)
        assert read.size == (20, 40)
        assert read.getpixel((19, 0)) == (0, 0, 255)

    @pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
    def test_transparency_is_white(self, app, tmp_path, mode):
        Image.new("RGBA", (8, 8), (0, 0, 0, 0)).convert(mode).save(
            tmp_path / "a.png", transparency=0 if mode == "P" else None
        )
        assert app.read_image(str(tmp_path / "a.png"), upright_rgb).getpixel((4, 4)) == (255, 255, 255)

    # Pillow warns of large images below its own limit.
    @pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("notes.png", b"no image", "not an image of a known format"),
            ("empty.png", b"", "not an image of a known format"),
            ("page.ps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image of a known format"),
            ("cut.png", "cut", "cut off"),
            ("huge.png", (25_000, 20_000), "more than 100,000,000 pixels"),
            ("large.png", (12_000, 10_000), "more than 100,000,000 pixels"),
            ("narrow.png", "narrow", "too narrow"),
            ("infinite.tiff", "infinite", "not finite"),
        ],
    )
    def test_refusals(self, app, tmp_path, name, content, message):
        path = tmp_path / name
        if isinstance(content, tuple):
            content = _png_header(*content)
        elif content == "narrow":
            content = _file(Image.new("L", (201, 2)))
        elif content == "infinite":
            content = _file(Image.new("F", (8, 8), math.inf), "TIFF")
        elif content == "cut":
            content = _file(Image.effect_noise((64, 64), 50))[:-1000]
        path.write_bytes(content)
        with pytest.raises(gr.Error) as caught:
            app.read_image(str(path), upright_rgb)
        assert name in caught.value.message
        assert message in caught.value.message

    def test_names_are_no_markup(self, app, tmp_path):
        path = tmp_path / "<b>.png"
        path.write_bytes(b"")
        with pytest.raises(gr.Error) as caught:
            app.read_image(str(path), upright_rgb)
        assert "<b>" not in caught.value.message


def _png_header(width: int, height: int) -> bytes:
    """A PNG file of this size that ends before its pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + chunk
        + struct.pack(">I", zlib.crc32(chunk))
        + bytes(4)
        + b"IDAT"
    )


class Api:
    """A client that uses plain HTTP, as `curl` would."""

    def __init__(self, url: str):
        self.client = httpx.Client(base_url=f"{url}gradio_api/", timeout=60, trust_env=False)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.client.close()

    def __call__(self, name: str, *data) -> tuple[str, str]:
        """Returns the last event and its data: `complete` and the outputs, or `error` and its message."""
        event_id = self.client.post(f"call/{name}", json={"data": data}).json()["event_id"]
        *_, event, answer = self.client.get(f"call/{name}/{event_id}").text.strip().splitlines()
        return event.removeprefix("event: "), answer.removeprefix("data: ")

    def upload(self, path: Path) -> str:
        """Uploads a file and returns its path in the app."""
        return self.client.post("upload", files={"files": (path.name, path.read_bytes())}).json()[0]


def _request(name: str, *paths: str, **more) -> list:
    """The input of `classify`, which takes one path, or of `compare`."""
    files = [{"path": path, **more} for path in paths]
    return files[0] if name == "classify" else [{"image": file, "caption": None} for file in files]


@pytest.fixture(scope="module")
def uploads(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uploads")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        yield folder


@pytest.fixture(scope="module")
def url(app, pets_folder, uploads):
    """The address of the app in this process, as `serve` launches it."""
    blocks = app.build(os.environ.get("SPACE_MODEL", str(pets_folder)))
    app.launch(blocks, "127.0.0.1")
    yield blocks.local_url
    blocks.close()


@pytest.fixture(scope="module")
def api(url):
    with Api(url) as api:
        yield api


META = {"meta": {"_type": "gradio.FileData"}}


class TestFilesThatAClientNames:
    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["classify", "compare"])
    def test_nothing_of_the_machine_is_shown(self, app, api, uploads, examples, tmp_path, name, monkeypatch):
        own = Path(api.upload(examples[0]))
        private = tmp_path / "private"
        private.mkdir()
        shutil.copy(examples[1], private / "secret.png")
        (private / "notes.png").write_text("no image")
        links = uploads / tmp_path.name
        links.mkdir()
        (links / "link.png").symlink_to(private / "secret.png")
        (links / "linked").symlink_to(private)
        (links / "circle.png").symlink_to(links / "circle.png")
        (links / "folder.png").mkdir()
        # A folder whose name begins with the name of the folder of uploads.
        shutil.copytree(private, f"{uploads}_of_others", dirs_exist_ok=True)

        def around(folder: Path) -> str:
            """The way from a folder to the secret, through its parents."""
            return f"{folder}/{os.path.relpath(private, folder)}/secret.png"

        monkeypatch.chdir(private)
        paths = [
            private / "secret.png",
            private / "notes.png",
            private / "absent.png",
            private,
            "secret.png",
            examples[0],
            f"{uploads}_of_others/secret.png",
            around(uploads),
            around(own.parent),
            around(links / "linked"),
            links / "linked" / "secret.png",
            links / "linked" / "absent.png",
            links / "link.png",
            links / "circle.png",
            links / "folder.png",
            uploads / "absent.png",
            f"{uploads}/{'x' * 300}.png",
            f"{private}/\0.png",
            "/dev/zero.png",
            f"file://{private}/secret.png",
            "http://127.0.0.1:9/secret.png",
        ]
        message = json.dumps("This upload does not exist or was deleted: upload the image again.")
        for path in map(str, paths):
            for asked in [(path,)] if name == "classify" else [(path, path), (str(own), path), (path, str(own))]:
                event, answer = api(name, _request(name, *asked))
                assert event == "error"
                if Path(path).suffix == ".png" or name == "classify":
                    assert f'"error": {message}' in answer, asked
                assert "private" not in answer
        # Gradio itself refuses these, without a message.
        paths = [private / "secret.png", private / "absent.png", links / "link.png", private]
        ((event, answer),) = {api(name, _request(name, *[str(path)] * 2, **META)) for path in paths}
        assert event == "error"
        assert "private" not in answer

    @pytest.mark.parametrize("more", [{}, META])
    def test_uploads(self, api, examples, answers, more):
        first, second = map(api.upload, examples[:2])
        event, answer = api("classify", _request("classify", first, **more))
        assert event == "complete"
        _expect_answer(answer, answers[examples[0].name])
        event, answer = api("compare", _request("compare", first, second, **more))
        assert event == "complete"
        assert answer.count(examples[1].name) >= 2

    def test_examples(self, api, examples, answers):
        event, answer = api("load_example", 2)
        assert event == "complete"
        event, answer = api("classify", json.loads(answer)[0]["value"])
        assert event == "complete"
        _expect_answer(answer, answers[examples[2].name])
        event, answer = api("load_example_1", 0)
        assert event == "complete"
        event, answer = api("compare", json.loads(answer)[0]["value"])
        assert event == "complete"
        assert all(path.name in answer for path in examples)

    def test_a_folder_for_uploads_behind_a_link(self, app, examples, tmp_path, monkeypatch):
        uploads = tmp_path / "uploads"
        uploads.mkdir()
        (tmp_path / "link").symlink_to(uploads)
        shutil.copy(examples[0], uploads / "image.png")
        monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "link"))
        assert app.uploaded(str(tmp_path / "link" / "image.png")) == str(uploads / "image.png")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("GRADIO_TEMP_DIR", "uploads")
        assert app.uploaded("uploads/image.png") == str(uploads / "image.png")

    def test_an_upload_that_is_deleted(self, api, examples):
        path = api.upload(examples[0])
        Path(path).unlink()
        event, answer = api("classify", _request("classify", path, **META))
        assert event == "error"
        assert "was deleted" in answer


def _expect_answer(answer: str, expected: dict[str, float]):
    """Checks the first output, a label with its scores."""
    found = {each["label"]: each["confidence"] for each in json.loads(answer)[0]["confidences"]}
    assert found == pytest.approx(expected, abs=1e-5)


class TestModels:
    def test_no_folder(self, app, tmp_path):
        with pytest.raises(ValueError, match="no folder"):
            app.build(str(tmp_path / "absent"))

    def test_no_model(self, app, tmp_path):
        with pytest.raises(ValueError, match=r"no config\.json"):
            app.build(str(tmp_path))

    @pytest.mark.slow
    def test_a_commit_of_the_hub(self, app, model_folder, monkeypatch):
        """A single download, so that code, weights and examples are of the same commit."""
        fetched = []

        def snapshot_download(name, revision, allow_patterns):
            fetched.append((name, revision))
            kept = {path for pattern in allow_patterns for path in model_folder.glob(pattern)}
            assert kept >= {path for path in model_folder.iterdir() if path.is_file()}
            return str(model_folder)

        monkeypatch.setattr(app, "snapshot_download", snapshot_download)
        assert app.build("you/pets", "0123abc").title == "RBI: you/pets"
        assert fetched == [("you/pets", "0123abc")]

    def test_not_of_the_hub(self, app):
        with pytest.raises(OSError, match=r"outgoing traffic has been disabled|offline"):
            app.build("nobody/nothing")

    def test_another_kind_of_model(self, app, tmp_path):
        ResNetForImageClassification(ResNetConfig(hidden_sizes=[8], depths=[1], embedding_size=8)).save_pretrained(
            tmp_path
        )
        with pytest.raises(ValueError, match=r'type "resnet".*from_image_classifier'):
            app.build(str(tmp_path))

    def test_no_classifier(self, app, model, model_folder, tmp_path):
        with pytest.raises(ValueError, match="no classifier"):
            app.build(str(_saved(model.rbi, model_folder, tmp_path)))

    def test_a_regression(self, app, model, model_folder, tmp_path):
        model = RBIForImageClassification(RBIConfig.kernel(backbone_config=model.config.backbone_config, num_labels=1))
        with pytest.raises(ValueError, match="does not choose"):
            app.build(str(_saved(model, model_folder, tmp_path)))


class TestSpaceFolder:
    def test_model_of_the_variable_or_the_readme(self, app, tmp_path, monkeypatch):
        monkeypatch.delenv("MODEL_ID", raising=False)
        monkeypatch.setattr(app, "__file__", str(tmp_path / "app.py"))
        with pytest.raises(ValueError, match="MODEL_ID"):
            app.named_model()
        (tmp_path / "README.md").write_text("---\nmodels:\n- you/first\n- you/second\n---\n")
        assert app.named_model() == "you/first"
        monkeypatch.setenv("MODEL_ID", "you/other")
        assert app.named_model() == "you/other"

    def test_header_is_of_a_space(self):
        header = metadata_load(SPACE / "README.md")
        assert header["sdk"] == "gradio"
        assert (SPACE / header["app_file"]).is_file()
        assert header["license"] == "apache-2.0"
        assert len(header["short_description"]) <= 60
        assert f"gradio=={header['sdk_version']} " in (SPACE / "README.md").read_text()
        # Otherwise YAML reads 3.10 as the number 3.1.
        assert isinstance(header["python_version"], str)

    def test_imports_are_the_standard_library_and_what_the_space_installs(self):
        imported = set()
        for node in ast.walk(ast.parse(APP.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
        requirements = set(re.findall(r"^[a-z_]+", (SPACE / "requirements.txt").read_text(), re.MULTILINE))
        installed = requirements - {"pillow"} | {"PIL", "gradio", "numpy"}
        assert any(each.startswith("numpy<") for each in importlib.metadata.requires("gradio"))
        assert imported - set(sys.stdlib_module_names) <= installed


WITHOUT_THIS_PROJECT = """
import importlib.abc, runpy, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("modeling_rbi", "training", "model_cards"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
runpy.run_path(sys.argv[1], run_name="__main__")
"""


@pytest.mark.slow
def test_runs_where_this_project_is_not_installed(pets_folder, examples, answers, tmp_path):
    folder = shutil.copytree(SPACE, tmp_path / "space")
    environment = os.environ | {
        "MODEL_ID": str(pets_folder),
        "GRADIO_SERVER_NAME": "127.0.0.1",
        "GRADIO_TEMP_DIR": str(tmp_path / "uploads"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
    }
    with (
        open(tmp_path / "log", "w") as log,
        subprocess.Popen(
            [sys.executable, "-c", WITHOUT_THIS_PROJECT, str(folder / "app.py")],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as process,
    ):
        try:
            (url,) = re.findall(r"The app is at (\S+) ", process.stdout.readline())
            with Api(url) as api:
                event, answer = api("classify", _request("classify", api.upload(examples[0])))
        finally:
            process.terminate()  # SIGINT is ignored where the tests run in the background of a shell
    assert event == "complete"
    _expect_answer(answer, answers[examples[0].name])
    assert "ModuleNotFoundError" not in (tmp_path / "log").read_text()


@pytest.fixture(scope="module")
def browser(chromium):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(url, browser, capfd):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(20_000)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    page.get_by_role("button", name="Classify").wait_for()
    yield page
    page.close()
    # The page neither loads anything from the internet nor sends anything there.
    assert not [address for address in asked if not address.startswith((url, "data:", "blob:"))]
    assert "Traceback" not in capfd.readouterr().err


def classify(page: Page, path: Path):
    page.locator("#image input[type=file]").set_input_files(path)
    page.locator("#image img").wait_for()
    page.get_by_role("button", name="Classify").click()


def compare(page: Page, paths: list[Path]):
    page.get_by_role("tab", name="Several images").click()
    page.locator("#images input[type=file]").first.set_input_files(paths)
    expect(page.locator("#images img")).to_have_count(len(paths))
    page.get_by_role("button", name="Compare").click()


def expect_error(page: Page, message: str):
    """Checks that the page shows an error, and closes it."""
    error = page.get_by_test_id("toast-body")
    expect(error).to_contain_text(message)
    assert "Traceback" not in error.inner_text()
    page.get_by_test_id("toast-close").click()
    expect(error).to_have_count(0)


def expect_scores(page: Page, label: str, expected: dict[str, float]):
    """Checks that the bars of an answer show these scores, highest first."""
    bars = page.locator(f"#{label} meter")
    expect(bars).to_have_count(len(expected))
    found = {bar.get_attribute("aria-label"): float(bar.get_attribute("value")) for bar in bars.all()}
    assert found == pytest.approx(expected, abs=1e-5)
    assert list(found) == sorted(expected, key=expected.get, reverse=True)


@pytest.fixture(scope="module")
def answers(pets_folder):
    """The answers of transformers' pipeline, by the name of the example."""
    classifier = pipeline("image-classification", model=str(pets_folder), trust_remote_code=True)
    paths = sorted((pets_folder / "examples").iterdir())
    return {
        path.name: {each["label"]: each["score"] for each in answer}
        for path, answer in zip(paths, classifier([str(path) for path in paths], top_k=3), strict=True)
    }


@pytest.fixture(scope="module")
def examples(pets_folder):
    return sorted((pets_folder / "examples").iterdir())


@pytest.mark.slow
class TestInTheBrowser:
    def test_one_image(self, page, app, pets_folder, examples, answers):
        for path in (examples[4], examples[0]):
            classify(page, path)
            expected = app.Classifier(str(pets_folder)).classify(app.read_image(str(path), upright_rgb))
            first = max(answers[path.name], key=answers[path.name].get)
            expect(page.locator("#with-references h2")).to_have_text(first)
            expect_scores(page, "with-references", answers[path.name])
            expect_scores(page, "without-references", expected.without_references)
            cards = page.locator("#attention li")
            expect(cards).to_have_count(1 + len(expected.nearest))
            for card, reference in zip(cards.all()[1:], expected.nearest, strict=True):
                for text in (
                    reference.label,
                    f"reference {reference.number + 1}",
                    f"{100 * reference.attention:.1f}%",
                ):
                    expect(card).to_contain_text(text)
                expect(card.get_by_role("img", name=f"reference {reference.number + 1}")).to_be_visible()
            # The next image must not be shown with this answer.
            page.get_by_role("button", name="Remove Image").click()
            expect(cards).to_have_count(0)

    def test_an_example(self, page, examples, answers):
        page.locator("#examples").get_by_role("button").nth(2).click()
        expect(page.locator("#attention li").first).to_be_visible()
        expect_scores(page, "with-references", answers[examples[2].name])
        page.get_by_role("tab", name="Several images").click()
        page.locator("#examples-of-several").get_by_role("button").first.click()
        expect(page.locator("#map").get_by_role("rowheader")).to_have_count(len(examples))

    def test_several_images(self, page, app, pets_folder, examples):
        chosen = examples[1:6]
        compare(page, chosen)
        expect(page.locator("#map td").first).to_be_visible()
        classifier = app.Classifier(str(pets_folder))
        names = [path.name for path in chosen]
        comparison = classifier.compare([app.read_image(str(path), upright_rgb) for path in chosen])
        cells = _cells(page.locator("#map").inner_html())
        others = ~torch.eye(len(chosen), dtype=torch.bool)
        assert torch.allclose(cells[others], comparison.relations[others], atol=0.00501)
        for name in names:
            expect(page.locator("#map").get_by_role("rowheader", name=name)).to_be_visible()
        table = page.locator("#table")
        for row in app.table_rows(comparison, names, classifier):
            expect(table.get_by_role("row", name=" ".join(row))).to_be_visible()

    @pytest.mark.parametrize("is_after_an_example", [False, True])
    def test_mistakes_get_a_message_and_the_page_goes_on(self, page, examples, answers, tmp_path, is_after_an_example):
        if is_after_an_example:
            # For an example, Gradio creates the image component again.
            page.locator("#examples").get_by_role("button").first.click()
            expect(page.locator("#attention li").first).to_be_visible()
            page.get_by_role("button", name="Remove Image").click()
        page.get_by_role("button", name="Classify").click()
        expect_error(page, "There is no image yet")
        broken, notes = tmp_path / "broken.png", tmp_path / "notes.png"
        broken.write_bytes(examples[0].read_bytes()[:-2000])
        notes.write_text("no image")
        for path, message in ((broken, "broken.png is broken or cut off"), (notes, "notes.png is not an image")):
            page.locator("#image input[type=file]").set_input_files(path)
            expect(page.locator("#image img")).to_have_attribute("src", re.compile(path.name))
            page.get_by_role("button", name="Classify").click()
            expect_error(page, message)
            page.get_by_role("button", name="Remove Image").click()
        classify(page, examples[3])
        expect(page.locator("#attention li").first).to_be_visible()
        expect_scores(page, "with-references", answers[examples[3].name])

        compare(page, examples[:1])
        expect_error(page, "choose at least 2")

    def test_too_many_or_broken_among_several(self, page, examples, tmp_path):
        chosen = [tmp_path / f"{number}.png" for number in range(17)]
        for path in chosen:
            shutil.copy(examples[0], path)
        compare(page, chosen)
        expect_error(page, "17 images are too many")

    def test_screenshots(self, page, examples, tmp_path):
        folder = Path(os.environ.get("SPACE_SCREENSHOTS", tmp_path))
        page.locator("#examples").get_by_role("button").nth(4).click()
        expect(page.locator("#attention li").first).to_be_visible()
        _screenshot(page, folder / "space_one_image.png")
        page.get_by_role("tab", name="Several images").click()
        page.locator("#examples-of-several").get_by_role("button").first.click()
        expect(page.locator("#map td").first).to_be_visible()
        _screenshot(page, folder / "space_several_images.png")


def _screenshot(page: Page, path: Path):
    """Saves the whole page, once no progress indicator is visible, with few colors so that the file is small."""
    expect(page.locator("[data-testid=status-tracker]:not(.hide)")).to_have_count(0)
    page.mouse.move(0, 0)
    with Image.open(io.BytesIO(page.screenshot(full_page=True))) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    assert path.stat().st_size <= 300_000
