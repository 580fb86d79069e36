# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""
Handler of a Hugging Face Inference Endpoint, which runs in the repository of the published model.

It takes the requests of the Hub's image-classification task, `{"inputs": ..., "parameters": {...}}`, and returns the
task's answers, `[{"label": ..., "score": ...}]`. Environment variables set its limits:

- `RBI_MAX_BATCH_SIZE` (16): largest number of images in one forward pass.
- `RBI_MAX_IMAGES` (128): largest number of images in one request.
- `RBI_MAX_PIXELS` (100 million): largest number of pixels of an image, checked before the image is decoded. Pillow
  has a limit of its own, 178,956,970.
- `RBI_URL_HOSTS` (none): hosts that images may be downloaded from, separated by commas, such as `example.org` or
  `example.org:8000`. A listed host is trusted even in a private network.
"""

import base64
import binascii
import http.client
import importlib
import io
import os
import threading
import time
from collections.abc import Callable, Set
from typing import Any
from urllib.parse import urlsplit

import torch
from PIL import Image, PngImagePlugin
from transformers import AutoModelForImageClassification

# transformers 5.17 exports it at the top level only if torchvision is installed, which is not needed here.
from transformers.models.auto.image_processing_auto import AutoImageProcessor


_MAX_DOWNLOAD_BYTES = 20_000_000
_DOWNLOAD_SECONDS = 10
# Resizing the shorter side of a narrow image to the model's size makes the longer side, and the memory, enormous.
_MAX_ASPECT_RATIO = 100
_DEFAULT_TOP_K = 5
# A long text in a PNG file does not make its pixels unreadable.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
_FUNCTIONS = {"softmax": lambda logits: logits.softmax(-1), "sigmoid": torch.sigmoid, "none": lambda logits: logits}


class EndpointHandler:
    r"""
    Answers the requests for one model.

    The answer for an image does not depend on the other images of a request: the relation scope is the config's
    `"self"` or `"reference"`. `"batch"` is replaced by `"reference"` if the model has a reference bank and by `"self"`
    otherwise.

    The endpoint's container calls the handler from one thread. A server may call it from several: a lock lets one
    request at a time into decoding and the model.

    The container answers every exception with HTTP status 400 and the message. A server can tell the exceptions
    apart: a `ValueError` is a mistake in the request (400), every other exception is a failure of the server (500).

    Args:
        path (`str`):
            Folder with the model's weights, config, image processor and code. The code is executed.

    Raises:
        ValueError: if an environment variable is not a whole number of at least 1, or the model's code is older than
            this handler.
    """

    def __init__(self, path: str = ""):
        self.max_batch_size = _positive_setting("RBI_MAX_BATCH_SIZE", 16)
        self.max_images = _positive_setting("RBI_MAX_IMAGES", 128)
        self.max_pixels = _positive_setting("RBI_MAX_PIXELS", 100_000_000)
        hosts = os.environ.get("RBI_URL_HOSTS", "").split(",")
        self.url_hosts = {host.strip().lower() for host in hosts if host.strip()}

        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForImageClassification.from_pretrained(path, trust_remote_code=True)
        self.model = model.to(device).eval()
        self.image_processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=True)
        self._upright_rgb = _find_decoder(self.model)
        config = self.model.config
        self.mode = "L" if len(config.image_mean) == 1 else "RGB"
        self.relation_scope = config.relation_scope
        if self.relation_scope == "batch":
            self.relation_scope = "self" if config.references is None else "reference"
        self._lock = threading.Lock()

    def __call__(self, data: dict[str, Any]) -> list[dict[str, Any]] | list[list[dict[str, Any]]]:
        r"""
        Args:
            data (`dict`):
                `inputs`: an image or a list of images. An image is the bytes of its file, the file as base64 text or
                `data:` URI, a URL (see `RBI_URL_HOSTS`), or a `PIL.Image.Image`. `parameters` (optional): `top_k`,
                the number of labels in an answer (5), and `function_to_apply`, which turns logits into scores:
                `"softmax"`, `"sigmoid"` or `"none"` (default: as the `image-classification` pipeline).

        Returns:
            `list[dict]`: labels and scores, highest score first; if classes have the same name, their labels are the
            name and the class number, `crane (134)`. For a list of images: a list of such lists.

        Raises:
            ValueError: if the request is wrong or one of its images cannot be read. The message says what to change.
            RuntimeError: if the model's logits are not finite.
        """
        inputs, top_k, function = self._read_request(data)
        is_list = isinstance(inputs, (list, tuple))
        sources = {f"inputs[{number}]": each for number, each in enumerate(inputs)} if is_list else {"inputs": inputs}
        # Outside the lock, so that a slow download delays no other request.
        sources = {name: self._load(source, name) for name, source in sources.items()}
        with self._lock:
            logits = self._logits([self._preprocess(source, name) for name, source in sources.items()])
        names = self.model.class_names
        answers = [self._answer(row, top_k, function, names) for row in logits]
        return answers if is_list else answers[0]

    def _read_request(self, data: Any) -> tuple[Any, int, str]:
        if not isinstance(data, dict) or data.get("inputs") is None:
            raise ValueError(
                'The request has no `inputs`: send {"inputs": an image as base64 text, "parameters": {}}.'
            )
        # Some clients also send `options`, which are meant for the Hub's own servers.
        _check_names(data.keys() - {"options"}, {"inputs", "parameters"}, "The request")
        parameters = {} if data.get("parameters") is None else data["parameters"]
        if not isinstance(parameters, dict):
            raise ValueError(f'`parameters` must be an object, such as {{"top_k": 3}}, got {_short(parameters)}.')
        _check_names(parameters.keys(), {"top_k", "function_to_apply"}, "`parameters`")

        top_k = _DEFAULT_TOP_K if parameters.get("top_k") is None else parameters["top_k"]
        if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
            raise ValueError(f"`top_k` must be a whole number of at least 1, got {_short(top_k)}.")
        function = parameters.get("function_to_apply")
        function = self._default_function() if function is None else function
        if not isinstance(function, str) or function not in _FUNCTIONS:
            choices = ", ".join(f'"{name}"' for name in _FUNCTIONS)
            raise ValueError(f"`function_to_apply` must be one of {choices}, got {_short(function)}.")

        inputs = data["inputs"]
        if isinstance(inputs, (list, tuple)) and not 1 <= len(inputs) <= self.max_images:
            raise ValueError(
                f"A request takes 1 to {self.max_images} images, `inputs` has {len(inputs)}"
                + (": send them in several requests." if inputs else ".")
            )
        return inputs, top_k, function

    def _default_function(self) -> str:
        config = self.model.config
        if config.problem_type == "regression":
            return "none"
        is_sigmoid = config.problem_type == "multi_label_classification" or config.num_labels == 1
        return "sigmoid" if is_sigmoid else "softmax"

    def _load(self, source: Any, name: str) -> Any:
        """Turns text into the bytes of the image's file."""
        if not isinstance(source, str):
            return source
        if source[:8].lower().startswith(("http://", "https://")):
            return self._download(source, name)
        encoded = source
        if source[:5].lower() == "data:":
            header, comma, encoded = source.partition(",")
            if not comma or not header.lower().endswith(";base64"):
                raise ValueError(f"`{name}` is a data: URI, but not in base64: write data:image/png;base64,...")
        try:
            # Some encoders break lines.
            return base64.b64decode("".join(encoded.split()), validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError(
                f"`{name}` is not an image: text must be the image's file in base64, but {_short(source)} is not. "
                "Paths are not read."
            ) from error

    def _download(self, url: str, name: str) -> bytes:
        try:
            parts = urlsplit(url)
            scheme, host, port = parts.scheme.lower(), parts.hostname or "", parts.port
        except ValueError as error:
            raise ValueError(f"`{name}` is not a valid URL: {_short(url)}.") from error
        is_default = port is None or port == {"http": 80, "https": 443}[scheme]
        if (host if is_default else f"{host}:{port}") not in self.url_hosts:
            raise ValueError(
                f"`{name}` is a URL of {host}, which this endpoint does not download from: send the image itself, "
                "in base64, or have the host added to the endpoint's environment variable RBI_URL_HOSTS."
            )
        # http.client follows neither redirects nor proxies, so it connects only to the host that was checked.
        connection_class = http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection
        connection = connection_class(host, port, timeout=_DOWNLOAD_SECONDS)
        try:
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", target, headers={"User-Agent": "rbi-endpoint"})
            response = connection.getresponse()
            if response.status != 200:
                raise ValueError(f"it answered {response.status} {response.reason} (redirects are not followed)")
            return _read_response(response)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ValueError(f"`{name}` could not be downloaded from {host}: {error}.") from error
        finally:
            connection.close()

    def _preprocess(self, source: Any, name: str) -> torch.Tensor:
        """Decodes an image and returns its pixel values, `(1, num_channels, height, width)`."""
        image = self._decode(source, name).convert(self.mode)
        try:
            return self.image_processor(images=image, return_tensors="pt")["pixel_values"]
        except ValueError as error:
            width, height = image.size
            raise ValueError(f"`{name}`, {width} x {height} pixels, can't be preprocessed: {error}") from error

    def _decode(self, source: Any, name: str) -> Image.Image:
        """Decodes an image to RGB as in training."""
        image = source if isinstance(source, Image.Image) else _open(source, name)
        width, height = image.size
        if width * height > self.max_pixels:
            raise ValueError(
                f"`{name}` has {width} x {height} pixels, more than the limit of {self.max_pixels}: send a smaller "
                "image."
            )
        if max(width, height) > _MAX_ASPECT_RATIO * min(width, height):
            raise ValueError(
                f"`{name}` has {width} x {height} pixels, one side more than {_MAX_ASPECT_RATIO} times the other: "
                "crop it."
            )
        try:
            image.load()
        except MemoryError:
            raise
        except Exception as error:
            raise ValueError(f"`{name}` is broken or cut off: {error}. Send the whole file.") from error
        return self._upright_rgb(image, max_pixels=self.max_pixels, name=f"`{name}`")

    def _logits(self, images: list[torch.Tensor]) -> list[torch.Tensor]:
        """Logits of each image, `(num_labels,)` on the CPU. Images of different sizes do not share a batch."""
        batch_size = self.max_batch_size if len({image.shape for image in images}) == 1 else 1
        logits = []
        for start in range(0, len(images), batch_size):
            pixel_values = torch.cat(images[start : start + batch_size]).to(self.model.device, self.model.dtype)
            with torch.inference_mode():
                outputs = self.model(pixel_values=pixel_values, relation_scope=self.relation_scope)
            logits += outputs.logits.float().cpu()
        if not all(row.isfinite().all() for row in logits):
            raise RuntimeError("The model's logits are not finite.")
        return logits

    def _answer(self, logits: torch.Tensor, top_k: int, function: str, names: dict[int, str]) -> list[dict[str, Any]]:
        scores = _FUNCTIONS[function](logits).tolist()
        best = sorted(range(len(scores)), key=lambda index: -scores[index])[:top_k]
        return [{"label": names[index], "score": scores[index]} for index in best]


def _find_decoder(model: Any) -> Callable[..., Image.Image]:
    """The function of the model's own code that decodes images as in training."""
    package = type(model).__module__.rpartition(".")[0]
    try:
        return importlib.import_module(f"{package}.image_processing_rbi").upright_rgb
    except (ImportError, AttributeError) as error:
        raise ValueError(
            "The model's code is older than this handler and cannot decode images: save and publish the model again, "
            "with one version of both."
        ) from error


def _positive_setting(name: str, default: int) -> int:
    text = os.environ.get(name, "").strip() or str(default)
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"The environment variable {name} must be a whole number of at least 1, got {text!r}.")
    return int(text)


def _check_names(given: Set[Any], known: set[str], where: str):
    unknown = sorted(str(name) for name in given - known)
    if unknown:
        raise ValueError(
            f"{where} has {', '.join(_short(name) for name in unknown)}, which the task does not know; it takes "
            f"{', '.join(f'`{name}`' for name in sorted(known))}."
        )


def _short(value: Any) -> str:
    text = repr(value[:50] if isinstance(value, str) else value)
    return text if len(text) <= 60 else text[:57] + "..."


def _read_response(response: http.client.HTTPResponse) -> bytes:
    content, deadline = b"", time.monotonic() + _DOWNLOAD_SECONDS
    while part := response.read1(65536):
        content += part
        if len(content) > _MAX_DOWNLOAD_BYTES:
            raise ValueError(f"it is larger than {_MAX_DOWNLOAD_BYTES} bytes")
        if time.monotonic() > deadline:
            raise ValueError(f"it took longer than {_DOWNLOAD_SECONDS} seconds")
    return content


def _open(source: Any, name: str) -> Image.Image:
    if not isinstance(source, (bytes, bytearray, memoryview)):
        raise ValueError(f"`{name}` must be an image's file as bytes or base64 text, got {type(source).__name__}.")
    if not len(source):
        raise ValueError(f"`{name}` is empty: send the image's file.")
    # Without EPS: opening it runs Ghostscript.
    Image.init()
    try:
        return Image.open(io.BytesIO(source), formats=[each for each in Image.ID if each != "EPS"])
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"`{name}` is not an image of a known format: send a PNG or JPEG file.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"`{name}` is too large: {error} Send a smaller image.") from error
    except MemoryError:
        raise
    # Pillow's decoders raise errors of many types for broken files.
    except Exception as error:
        raise ValueError(f"`{name}` can't be opened as an image: {error}") from error
