# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The handler of an Inference Endpoint: called as the container calls it, over HTTP, and by the two clients."""

import base64
import copy
import importlib.util
import io
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import tomllib
import urllib.error
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from starlette.applications import Starlette
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route
from transformers import pipeline
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from modeling_rbi import RBIConfig, RBIForImageClassification, upright_rgb
from tests.odd_images import ODD_IMAGES
from training.data.decode import decode_image


ROOT = Path(__file__).parents[2]
LOGITS = {"function_to_apply": "none", "top_k": 3}


def load_module(path: Path):
    spec = importlib.util.spec_from_file_location(f"tested_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    # dataclasses look up their module there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


handler_module = load_module(ROOT / "model_cards" / "handler.py")
endpoint = load_module(Path(__file__).with_name("endpoint.py"))


@pytest.fixture(scope="module")
def loaded_handler(model_folder):
    return handler_module.EndpointHandler(str(model_folder))


@pytest.fixture
def handler(loaded_handler):
    """A handler whose attributes a test may set. Tests undo what they change in its model."""
    return copy.copy(loaded_handler)


@pytest.fixture(scope="module")
def classifier(model_folder):
    """The reference for the answers: the pipeline of transformers."""
    return pipeline("image-classification", str(model_folder))


@pytest.fixture(scope="module")
def files(image_files):
    return [path.read_bytes() for path in image_files]


def assert_same(answer, expected, tolerance=1e-5):
    """The tolerance is for other batch sizes and other machines, which round sums of floats differently."""
    assert [each["label"] for each in answer] == [each["label"] for each in expected]
    scores, expected_scores = ([each["score"] for each in side] for side in (answer, expected))
    np.testing.assert_allclose(scores, expected_scores, rtol=0, atol=tolerance)


def file_of(image: Image.Image, file_format: str = "PNG", **kwargs) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **kwargs)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG file of this size that ends before its pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    ending = b"\0\0\0\0IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + ending


def text_of(file: bytes) -> str:
    return base64.b64encode(file).decode()


# Answers


@pytest.mark.parametrize(
    "form",
    [
        lambda file: file,
        bytearray,
        memoryview,
        text_of,
        lambda file: base64.encodebytes(file).decode(),
        lambda file: f"data:image/png;base64,{text_of(file)}",
        lambda file: f"DATA:;BASE64,{text_of(file)}",
        lambda file: Image.open(io.BytesIO(file)),
    ],
    ids=["bytes", "bytearray", "memoryview", "base64", "lines of base64", "data", "bare data", "PIL"],
)
def test_forms_of_an_image(handler, classifier, image_files, files, form):
    for path, file in list(zip(image_files, files, strict=True))[::4]:
        assert_same(handler({"inputs": form(file)}), classifier(str(path)))


def test_list_of_images(handler, classifier, image_files, files):
    forms = [files[0], text_of(files[1]), Image.open(image_files[2]), *files[3:]]
    answers = handler({"inputs": forms, "parameters": {"top_k": 2}})
    expected = classifier([str(path) for path in image_files], top_k=2)
    assert len({answer[0]["label"] for answer in expected}) > 1
    for answer, other in zip(answers, expected, strict=True):
        assert_same(answer, other)
    assert_same(handler({"inputs": files[:1]})[0], handler({"inputs": files[0]}))


@pytest.mark.parametrize(
    ("top_k", "function"), [(None, None), (1, "softmax"), (2, "sigmoid"), (1000, "none"), (None, "sigmoid"), (2, None)]
)
def test_parameters(handler, classifier, image_files, files, top_k, function):
    given = {"top_k": top_k, "function_to_apply": function}
    answer = handler({"inputs": files[5], "parameters": given})
    assert_same(answer, classifier(str(image_files[5]), **{key: value for key, value in given.items() if value}))
    for more in (
        {"parameters": {key: value for key, value in given.items() if value}},
        {"parameters": given, "options": {"wait_for_model": True}},
    ):
        assert_same(handler({"inputs": files[5]} | more), answer)


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["crane", "dog", "crane"], ["crane (0)", "dog", "crane (2)"]),
        (["crane", "crane", "crane"], ["crane (0)", "crane (1)", "crane (2)"]),
        (["crane", "crane", "crane (0)"], ["crane (0) (0)", "crane (1)", "crane (0)"]),
        (["", "Crane", "crane"], ["(0)", "Crane", "crane"]),
    ],
)
def test_classes_of_one_name(handler, files, monkeypatch, names, labels):
    expected = {each["label"]: each["score"] for each in handler({"inputs": files[5]})}
    monkeypatch.setattr(handler.model.config, "id2label", dict(enumerate(names)))
    answer = handler({"inputs": files[5]})
    assert {each["label"]: each["score"] for each in answer} == pytest.approx(
        {label: expected[name] for label, name in zip(labels, ("cat", "dog", "fox"), strict=True)}
    )
    scores = [each["score"] for each in answer]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True)


@pytest.mark.parametrize(
    ("problem_type", "function"),
    [
        (None, "softmax"),
        ("single_label_classification", "softmax"),
        ("multi_label_classification", "sigmoid"),
        ("regression", "none"),
    ],
)
def test_default_function(handler, classifier, image_files, files, monkeypatch, problem_type, function):
    monkeypatch.setattr(handler.model.config, "problem_type", problem_type)
    expected = classifier(str(image_files[5]), function_to_apply=function)
    assert_same(handler({"inputs": files[5], "parameters": None}), expected)


@pytest.mark.parametrize(
    ("has_bank", "scope", "expected_scope"),
    [
        (True, "reference", "reference"),
        (True, "self", "self"),
        (True, "batch", "reference"),
        (False, "self", "self"),
        (False, "batch", "self"),
    ],
)
def test_relation_scope(model_folder, files, tmp_path, has_bank, scope, expected_scope):
    """For every scope in the config, an image's answer does not depend on its batch."""
    model = RBIForImageClassification.from_pretrained(model_folder)
    if not has_bank:
        model.remove_references()
    model.config.relation_scope = scope
    model.save_pretrained(tmp_path)
    shutil.copy(model_folder / "preprocessor_config.json", tmp_path)
    handler = handler_module.EndpointHandler(str(tmp_path))

    images = [decode_image(file) for file in files]
    pixel_values = handler.image_processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model(pixel_values, relation_scope=expected_scope).logits
        together = model(pixel_values, relation_scope="batch").logits
    assert (expected - together).abs().max() > 1e-3
    for answers in (
        handler({"inputs": files, "parameters": LOGITS}),
        [handler({"inputs": file, "parameters": LOGITS}) for file in files],
    ):
        for answer, logits in zip(answers, expected, strict=True):
            scores = {each["label"]: each["score"] for each in answer}
            np.testing.assert_allclose([scores[name] for name in ("cat", "dog", "fox")], logits, rtol=0, atol=1e-5)


# Images


def pixels_given_to(handler, image) -> tuple:
    """What the handler gives to its image processor: mode, size and pixels."""
    given = []

    def image_processor(images, return_tensors):
        given.append((images.mode, images.size, images.tobytes()))
        return {"pixel_values": torch.zeros(1, 3, 32, 32)}

    handler.image_processor = image_processor
    handler({"inputs": image})
    return given[0]


# Pillow warns of broken EXIF.
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_odd_images(handler, odd_image):
    odd_image.check(Image.frombytes(*pixels_given_to(handler, odd_image.file)))


def test_a_long_text_in_a_png_file(handler):
    text = PngImagePlugin.PngInfo()
    text.add_itxt("notes", "a" * 2_000_000, zip=True)
    mode, size, pixels = pixels_given_to(handler, file_of(Image.new("RGB", (4, 4), "red"), pnginfo=text))
    assert (mode, size, pixels[:3]) == ("RGB", (4, 4), b"\xff\0\0")


@pytest.mark.parametrize("orientation", [3, 6])
def test_orientation_of_an_image_that_the_container_has_opened(handler, kinds_of_images, orientation):
    file = kinds_of_images[f"orientation {orientation}"]
    opened = Image.open(io.BytesIO(file)).convert("RGB")
    stored = opened.tobytes()
    given = pixels_given_to(handler, opened)
    assert given == pixels_given_to(handler, file) != pixels_given_to(handler, kinds_of_images["orientation 1"])
    # The image that was passed in is left unchanged.
    assert opened.tobytes() == stored and "exif" in opened.info


def test_gray_model(tmp_path, backbone_config, kinds_of_images):
    backbone_config.num_channels = 1
    model = RBIForImageClassification(
        RBIConfig.kernel(backbone_config=backbone_config, image_mean=[0.5], image_std=[0.5])
    )
    model.save_pretrained(tmp_path)
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.5], image_std=[0.5])
    processor.save_pretrained(tmp_path)
    answer = handler_module.EndpointHandler(str(tmp_path))(
        {"inputs": kinds_of_images["palette"], "parameters": LOGITS}
    )
    gray = decode_image(kinds_of_images["palette"]).convert("L")
    with torch.no_grad():
        logits = model.eval()(**processor(gray, return_tensors="pt")).logits[0]
    np.testing.assert_allclose([each["score"] for each in answer], sorted(logits, reverse=True), rtol=0, atol=1e-5)


def test_the_decoder_is_of_the_models_own_code(model_folder):
    remote = get_class_from_dynamic_module("modeling_rbi.RBIForImageClassification", str(model_folder))
    decoder = handler_module._find_decoder(remote.__new__(remote))
    assert decoder.__module__.startswith("transformers_modules.") and decoder is not upright_rgb
    ODD_IMAGES["orientation 6"].check(decoder(Image.open(io.BytesIO(ODD_IMAGES["orientation 6"].file))))


@pytest.mark.parametrize("module", ["modeling_rbi.errors_rbi", "nowhere.modeling_rbi", "json.decoder"])
def test_code_without_a_decoder(module, monkeypatch):
    monkeypatch.delattr("modeling_rbi.image_processing_rbi.upright_rgb")
    with pytest.raises(ValueError, match=r"code is older than this handler .*save and publish the model again"):
        handler_module._find_decoder(type("Model", (), {"__module__": module})())


# Requests that can't be answered


GRAY = Image.radial_gradient("L")
NO_IMAGE = "`inputs` is not an image of a known format: send a PNG or JPEG file."
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
BAD_IMAGES = {
    "empty": (b"", "`inputs` is empty"),
    "text": (b"This is no image.", NO_IMAGE),
    "EPS": (EPS, NO_IMAGE),
    "cut off PNG": (file_of(GRAY)[:-40], "`inputs` is broken or cut off: .* Send the whole file."),
    "cut off JPEG": (
        file_of(GRAY.convert("CMYK"), "JPEG")[:-400],
        "`inputs` is broken or cut off: .* Send the whole file.",
    ),
    "header only": (file_of(GRAY)[:30], "`inputs` (is broken or cut off|is not an image|can't be opened)"),
    # Headers without pixels: the size is checked before decoding.
    "500 megapixels": (
        png_header(25_000, 20_000),
        "`inputs` is too large: .*500000000 pixels.* Send a smaller image.",
    ),
    "120 megapixels": (
        png_header(12_000, 10_000),
        "`inputs` has 12000 x 10000 pixels, more than the limit of 100000000: send a smaller image.",
    ),
}
BAD_REQUESTS = (
    {
        "nothing": ({}, "The request has no `inputs`"),
        "null": ({"inputs": None}, "The request has no `inputs`"),
        "no object": ([b"image"], "The request has no `inputs`"),
        "object": ({"inputs": {"image": ""}}, "`inputs` must be an image's file .* got dict"),
        "number": ({"inputs": 3}, "`inputs` must be an image's file .* got int"),
        "no text": ({"inputs": ""}, "`inputs` is empty"),
        "path": (
            {"inputs": "images/cat_0.png"},
            "`inputs` is not an image: .*'images/cat_0.png' is not. Paths are not",
        ),
        "other letters": ({"inputs": "Kätzchen"}, "`inputs` is not an image: .*'Kätzchen'"),
        "base64 of a path": ({"inputs": "/var/lib/nonexistent"}, NO_IMAGE),
        "data URI of text": ({"inputs": "data:image/svg+xml,<svg/>"}, "`inputs` is a data: URI, but not in base64"),
        "data URI without data": ({"inputs": "data:image/png;base64"}, "`inputs` is a data: URI, but not in base64"),
        "file": ({"inputs": "file:///etc/passwd"}, "`inputs` is not an image"),
        "address": ({"inputs": "http://127.0.0.1/cat.png"}, "`inputs` is a URL of 127.0.0.1, .* RBI_URL_HOSTS"),
        "no address": ({"inputs": "https://[cat/"}, "`inputs` is not a valid URL"),
        "no port": ({"inputs": "https://example.org:cat/"}, "`inputs` is not a valid URL"),
        "no images": ({"inputs": []}, "A request takes 1 to 128 images, `inputs` has 0."),
        "too many images": (
            {"inputs": [b"a"] * 129},
            "A request takes 1 to 128 images, `inputs` has 129: send them",
        ),
        "one bad of several": ({"inputs": [file_of(GRAY), b"This"]}, r"`inputs\[1\]` is not an image"),
        "nested list": ({"inputs": [[file_of(GRAY)]]}, r"`inputs\[0\]` must be an image's file .* got list"),
        "misplaced": ({"inputs": b"", "top_k": 1}, "The request has 'top_k', .* it takes `inputs`, `parameters`."),
        "no parameters": ({"inputs": b"", "parameters": [1]}, r"`parameters` must be an object, .* got \[1\]."),
        "unknown": ({"inputs": b"", "parameters": {"topk": 1}}, "`parameters` has 'topk', .* it takes .*`top_k`."),
        "unknown number": ({"inputs": b"", "parameters": {3: 1}}, "`parameters` has '3'"),
    }
    | {
        f"top_k {value!r}": (
            {"inputs": b"", "parameters": {"top_k": value}},
            "`top_k` must be a whole number of at least 1, got ",
        )
        for value in (0, -1, 2.0, True, "2", [2], float("nan"))
    }
    | {
        f"function {value!r}": (
            {"inputs": b"", "parameters": {"function_to_apply": value}},
            '`function_to_apply` must be one of "softmax", "sigmoid", "none", got ',
        )
        for value in ("Softmax", "", 1, ["softmax"])
    }
)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("form", [lambda file: file, text_of], ids=["bytes", "base64"])
@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images(handler, name, form):
    file, message = BAD_IMAGES[name]
    with pytest.raises(ValueError, match=message):
        handler({"inputs": form(file)})


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_requests(handler, name):
    data, message = BAD_REQUESTS[name]
    with pytest.raises(ValueError, match=message):
        handler(data)


def test_broken_opened_image(handler):
    with pytest.raises(ValueError, match="`inputs` is broken or cut off"):
        handler({"inputs": Image.open(io.BytesIO(file_of(GRAY)[:-40]))})


def test_max_pixels(handler, files):
    handler.max_pixels = 40 * 48
    handler({"inputs": files[0]})
    handler.max_pixels -= 1
    with pytest.raises(ValueError, match="40 x 48 pixels, more than the limit of 1919"):
        handler({"inputs": files[0]})


@pytest.mark.parametrize("size", [(5, 500), (500, 5)])
def test_narrow_images(handler, size):
    """Resizing 1 x 100000 pixels, a PNG of a few hundred bytes, to a shorter side of 32 gives 32 x 3200000."""
    handler({"inputs": Image.new("RGB", size)})
    for wrong in ((size[0] + size[0] // 500, size[1] + size[1] // 500), (1, 100_000), (100_000, 1)):
        with pytest.raises(ValueError, match="one side more than 100 times the other: crop it"):
            handler({"inputs": file_of(Image.new("RGB", wrong))})


def test_settings(model_folder, monkeypatch):
    settings = {
        "RBI_MAX_BATCH_SIZE": "2",
        "RBI_MAX_IMAGES": "3",
        "RBI_MAX_PIXELS": "4",
        "RBI_URL_HOSTS": " A.org, b:80,",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    handler = handler_module.EndpointHandler(str(model_folder))
    assert (handler.max_batch_size, handler.max_images, handler.max_pixels) == (2, 3, 4)
    assert handler.url_hosts == {"a.org", "b:80"}
    for name in settings:
        monkeypatch.setenv(name, "")
    handler = handler_module.EndpointHandler(str(model_folder))
    assert (handler.max_batch_size, handler.max_images, handler.max_pixels) == (16, 128, 100_000_000)
    assert handler.url_hosts == set()


@pytest.mark.parametrize("name", ["RBI_MAX_BATCH_SIZE", "RBI_MAX_IMAGES", "RBI_MAX_PIXELS"])
@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5"])
def test_bad_settings(model_folder, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, got '{value}'"):
        handler_module.EndpointHandler(str(model_folder))


# URLs


@pytest.fixture(scope="module")
def image_server(files):
    """The address of an image server, and the list of the paths that were requested."""
    asked = []

    async def answer(request):
        asked.append(request.url.path)
        if request.url.path == "/moved":
            return RedirectResponse("/cat.png")
        known = {"/cat.png": files[0], "/query": files[int(request.query_params.get("number", 0))]}
        return Response(known.get(request.url.path, b""), 200 if request.url.path in known else 404)

    with endpoint.serve(Starlette(routes=[Route("/{path:path}", answer)])) as address:
        yield address, asked


@pytest.fixture
def web(image_server):
    image_server[1].clear()
    return image_server


@pytest.fixture
def fetching_handler(web, handler):
    handler.url_hosts = {"example.org", web[0].removeprefix("http://")}
    return handler


def test_allowed_address(fetching_handler, web, files):
    address = web[0]
    assert_same(fetching_handler({"inputs": f"{address}/cat.png"}), fetching_handler({"inputs": files[0]}))
    both = fetching_handler({"inputs": [f"{address.upper()}/cat.png", f"{address}/query?number=4#part"]})
    for answer, file in zip(both, (files[0], files[4]), strict=True):
        assert_same(answer, fetching_handler({"inputs": file}))


def test_addresses_are_refused_by_default(handler, web):
    with pytest.raises(ValueError, match=r"a URL of 127\.0\.0\.1, .* send the image itself, in base64, or"):
        handler({"inputs": f"{web[0]}/cat.png"})
    assert not web[1]


@pytest.mark.parametrize(
    "change",
    [
        lambda address: address.replace("127.0.0.1", "localhost"),
        lambda address: address.replace("127.0.0.1", "127.1"),
        lambda address: address.replace("//", "//example.org@"),
        lambda address: address.replace("http://", "http://example.org\\@"),
        lambda address: address.rpartition(":")[0],
        lambda address: address[:-1],
    ],
)
def test_other_hosts_are_refused(fetching_handler, web, change):
    """Other ports, other names of the host, and a listed host as user name."""
    if "example.org" in change(web[0]):
        fetching_handler.url_hosts = {"example.org"}
    with pytest.raises(ValueError, match="which this endpoint does not download from"):
        fetching_handler({"inputs": f"{change(web[0])}/cat.png"})
    assert not web[1]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/moved", "answered 307 Temporary Redirect .redirects are not followed"),
        ("/absent", "answered 404 Not Found"),
        ("/two words", "could not be downloaded from 127.0.0.1"),
        ("/Kätzchen", "could not be downloaded from 127.0.0.1"),
    ],
)
def test_addresses_without_an_image(fetching_handler, web, path, message):
    with pytest.raises(ValueError, match=message):
        fetching_handler({"inputs": web[0] + path})
    assert "/cat.png" not in web[1]


def test_downloads_of_limited_size(fetching_handler, web, monkeypatch):
    monkeypatch.setattr(handler_module, "_MAX_DOWNLOAD_BYTES", 100)
    with pytest.raises(ValueError, match=r"could not be downloaded from 127\.0\.0\.1: it is larger than 100 bytes"):
        fetching_handler({"inputs": f"{web[0]}/cat.png"})


def test_downloads_of_limited_time(handler, monkeypatch):
    monkeypatch.setattr(handler_module, "_DOWNLOAD_SECONDS", 0.05)
    # It accepts connections and never answers.
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host = f"127.0.0.1:{listener.getsockname()[1]}"
        handler.url_hosts = {host}
        with pytest.raises(ValueError, match=r"could not be downloaded from 127\.0\.0\.1: timed out"):
            handler({"inputs": f"http://{host}/cat.png"})


# Batches


@pytest.fixture
def batch_sizes(handler):
    """The number of images of each forward pass."""
    sizes = []
    hook = handler.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    yield sizes
    hook.remove()


def test_a_list_is_one_batch(handler, batch_sizes, files):
    answers = handler({"inputs": files, "parameters": LOGITS})
    assert batch_sizes == [9]
    for answer, file in zip(answers, files, strict=True):
        assert_same(answer, handler({"inputs": file, "parameters": LOGITS}))


def test_a_list_longer_than_a_batch(handler, batch_sizes, files):
    handler.max_batch_size = 4
    answers = handler({"inputs": files, "parameters": LOGITS})
    assert batch_sizes == [4, 4, 1]
    for answer, file in zip(answers, files, strict=True):
        assert_same(answer, handler({"inputs": file, "parameters": LOGITS}))


def test_images_of_several_sizes(handler, batch_sizes, files):
    """Images whose sizes differ after preprocessing do not fit into one batch."""
    handler.image_processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, do_center_crop=False)
    wide = Image.open(io.BytesIO(files[0])).resize((80, 40))
    inputs = [files[1], wide, files[2], wide.rotate(90, expand=True), wide.rotate(180)]
    answers = handler({"inputs": inputs, "parameters": LOGITS})
    assert batch_sizes == [1] * 5
    for answer, each in zip(answers, inputs, strict=True):
        assert_same(answer, handler({"inputs": each, "parameters": LOGITS}))


def test_too_many_images(handler, files):
    handler.max_images = 4
    assert len(handler({"inputs": files[:4]})) == 4
    with pytest.raises(ValueError, match="takes 1 to 4 images, `inputs` has 5: send them in several requests"):
        handler({"inputs": files[:5]})


def test_answers_that_are_no_numbers(handler, files):
    """JSON has no NaN."""
    handler.model = copy.deepcopy(handler.model)
    with torch.no_grad():
        handler.model.classifier.bias[0] = torch.nan
    with pytest.raises(RuntimeError, match="not finite"):
        handler({"inputs": files[0]})


# Requests at the same time


@pytest.fixture
def most_at_once(handler):
    """A list whose last item is the largest number of threads that were in the model at the same time."""
    inside, most = [], [0]

    def enter(module, args):
        inside.append(threading.get_ident())
        most.append(max(most[-1], len(inside)))
        time.sleep(0.002)  # time for other threads to enter

    def leave(module, args, outputs):
        inside.pop()

    hooks = [handler.model.register_forward_pre_hook(enter), handler.model.register_forward_hook(leave)]
    yield most
    for hook in hooks:
        hook.remove()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_many_threads(handler, most_at_once, files):
    """Each thread gets the same answer as without the others, and the model runs in one thread at a time."""
    expected = [handler({"inputs": file, "parameters": LOGITS}) for file in files]
    bad = [file for file, _ in BAD_IMAGES.values()]

    def ask(number: int):
        first, second = number % 9, (number + 4) % 9
        answers = handler({"inputs": [files[first], files[second]], "parameters": LOGITS})
        assert_same(answers[0], expected[first])
        assert_same(answers[1], expected[second])
        for inputs in (bad[number % len(bad)], [files[first], b"no image"]):
            with pytest.raises(ValueError, match="inputs"):
                handler({"inputs": inputs})
        assert_same(handler({"inputs": files[first], "parameters": LOGITS}), expected[first])

    with ThreadPoolExecutor(16) as executor:
        list(executor.map(ask, range(32)))
    assert most_at_once[-1] == 1


def test_a_failing_request_leaves_the_lock_open(handler, files):
    def fail(module, args):
        raise RuntimeError("out of memory")

    hook = handler.model.register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            handler({"inputs": files[0]})
    finally:
        hook.remove()
    with ThreadPoolExecutor(1) as executor:
        assert len(executor.submit(handler, {"inputs": files[0]}).result(60)) == 3


def test_a_slow_download_holds_up_no_other(handler, files, monkeypatch):
    has_come, started = threading.Event(), threading.Event()

    def download(url, name):
        started.set()
        assert has_come.wait(120)
        return files[0]

    monkeypatch.setattr(handler, "_download", download)
    with ThreadPoolExecutor(2) as threads:
        slow = threads.submit(handler, {"inputs": "https://example.org/cat.png"})
        try:
            assert started.wait(60)
            assert len(threads.submit(handler, {"inputs": files[1]}).result(60)) == 3
            assert not slow.done()
        finally:
            has_come.set()
        assert_same(slow.result(60), handler({"inputs": files[0]}))


# Over HTTP


def post(address: str, body: bytes, content_type: str = "application/octet-stream"):
    """Status and JSON."""
    request = urllib.request.Request(address, body, {"Content-Type": content_type})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


@pytest.fixture(scope="module")
def address(loaded_handler):
    with endpoint.serve(endpoint.create_app(loaded_handler)) as address:
        yield address


@pytest.mark.slow
def test_100_requests_at_once(address, handler, files):
    expected = [handler({"inputs": file}) for file in files]
    barrier = threading.Barrier(100)

    def ask(number: int):
        barrier.wait(60)
        return post(address, files[number % 9])

    with ThreadPoolExecutor(100) as executor:
        answers = list(executor.map(ask, range(100)))
    for number, (status, answer) in enumerate(answers):
        assert status == 200
        assert_same(answer, expected[number % 9])


def test_statuses(address, handler, files, monkeypatch):
    status, answer = post(address, files[0])
    assert status == 200
    assert_same(answer, handler({"inputs": files[0]}))
    status, answer = post(address, b"no image")
    assert status == 400 and answer["error"] == NO_IMAGE
    status, answer = post(address, b"no JSON", "application/json")
    assert status == 400
    status, answer = post(address, b"\0" * 5_000_000)
    assert status == 413 and "send a smaller image" in answer["error"]
    monkeypatch.setattr(handler.model, "classifier", None)
    assert post(address, files[0])[0] == 500


SERVER_WITHOUT_PACKAGE = """
import importlib.abc, runpy, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("modeling_rbi", "training"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

PYTHON_CLIENT = """
import json, sys
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

address, image, broken = sys.argv[1:]

def ask(content, client=InferenceClient(model=address), **parameters):
    try:
        answer = client.image_classification(content, **parameters)
    except HfHubHTTPError as error:
        return {"error": str(error), "status": error.response.status_code}
    return {"answer": [{"label": each.label, "score": each.score} for each in answer]}

as_bytes = InferenceClient(model=address, headers={"Content-Type": "application/octet-stream"})
print(json.dumps({
    "plain": ask(image),
    "bytes": ask(open(image, "rb").read(), as_bytes),
    "query": ask(image, InferenceClient(model=address + "/?top_k=2&function_to_apply=sigmoid")),
    "json": ask(image, top_k=2, function_to_apply="sigmoid"),
    "broken_json": ask(broken, top_k=2),
    "broken_bytes": ask(open(broken, "rb").read(), as_bytes),
    "wrong_top_k": ask(image, top_k=0),
    "too_large": ask(bytes(5_000_000), as_bytes),
}))
"""


@pytest.fixture(scope="module")
def address_without_package(model_folder, tmp_path_factory):
    """An endpoint that serves a published folder, in a process that cannot import this project."""
    work = tmp_path_factory.mktemp("endpoint")
    folder = shutil.copytree(model_folder, work / "pets")
    shutil.copy(ROOT / "model_cards" / "handler.py", folder)
    caches = {name: str(work / name.lower()) for name in ("HF_HOME", "HF_MODULES_CACHE")}
    command = [sys.executable, "-c", SERVER_WITHOUT_PACKAGE, endpoint.__file__, str(folder)]
    with subprocess.Popen(
        command, env=os.environ | caches, cwd=work, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        address = server.stdout.readline().strip()
        assert address.startswith("http://127.0.0.1:")
        yield address
        # Closes the process's input, which ends it.
        server.communicate(timeout=60)
    assert server.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("client", ["huggingface_hub", "@huggingface/inference"])
def test_clients(request, address_without_package, classifier, image_files, tmp_path, client):
    broken = tmp_path / "broken.png"
    broken.write_bytes(image_files[5].read_bytes()[:-200])
    if client == "huggingface_hub":
        command = [sys.executable, "-c", PYTHON_CLIENT]
    else:
        command = [request.getfixturevalue("node"), str(ROOT / "tests" / "node" / "endpoint.mjs")]
    # In offline mode, the Python client refuses even requests to this machine.
    output = subprocess.run(
        [*command, address_without_package, str(image_files[5]), str(broken)],
        env=os.environ | {"HF_HUB_OFFLINE": "0"},
        stdout=subprocess.PIPE,
        check=True,
        timeout=120,
    ).stdout
    results = json.loads(output)
    expected = classifier(str(image_files[5]))
    expected_two = classifier(str(image_files[5]), top_k=2, function_to_apply="sigmoid")
    for name, answer in (("plain", expected), ("bytes", expected), ("query", expected_two), ("json", expected_two)):
        assert_same(results.pop(name)["answer"], answer)
    for name, status, message in (
        ("broken_json", 400, "`inputs` is broken or cut off: "),
        ("broken_bytes", 400, "`inputs` is broken or cut off: "),
        ("wrong_top_k", 400, "`top_k` must be a whole number of at least 1, got 0."),
        ("too_large", 413, "send a smaller image"),
    ):
        result = results.pop(name)
        assert result["status"] == status and message in result["error"]
    assert not results


def test_requirements():
    """The container installs the dependencies of the package."""
    requirements = (ROOT / "model_cards" / "requirements.txt").read_text().split()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert sorted(requirements) == sorted(project["dependencies"])
