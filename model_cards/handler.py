# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""
Answers the requests of a Hugging Face Inference Endpoint, from the model repository that this file lies in.

It takes what the Hub's image-classification task sends, `{"inputs": ..., "parameters": {...}}`, and gives what the
task answers, `[{"label": ..., "score": ...}]`. Environment variables of the endpoint:

- `RBI_MAX_BATCH_SIZE` (16): largest number of images that go through the model at once.
- `RBI_MAX_PENDING` (128): largest number of images in work or waiting; those above it are refused.
- `RBI_MAX_PIXELS` (100 million): largest image, by its header, before it is decoded. Pillow has a limit of its own,
  178,956,970.
- `RBI_URL_HOSTS` (empty: none): hosts, `example.org` or `example.org:8000`, separated by commas, that images may be
  fetched from where `inputs` is an address. What is listed is trusted, even if it is in a private network.
"""

import base64
import binascii
import http.client
import io
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from PIL import ExifTags, Image
from transformers import AutoModelForImageClassification

# From `transformers` itself, version 5.17 gives it only where there is torchvision, which it does not need.
from transformers.models.auto.image_processing_auto import AutoImageProcessor


# Seconds that a batch waits, at most, for images that are being decoded. A request on its own waits for none.
_MAX_WAIT = 0.01
_MAX_DOWNLOAD_BYTES = 20_000_000
_DOWNLOAD_SECONDS = 10

# Resized until its shorter side fits the model, an image of few pixels and of extreme shape can fill the memory.
_MAX_ASPECT_RATIO = 100

_DEFAULT_TOP_K = 5
_FUNCTIONS = {"softmax": lambda logits: logits.softmax(-1), "sigmoid": torch.sigmoid, "none": lambda logits: logits}

# How the stored pixels are turned for each value of EXIF's Orientation.
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class OverloadedError(RuntimeError):
    """
    Too many images wait. `status_code` is the HTTP status to answer: 429, not 503, which some clients repeat at once
    and without end.
    """

    status_code = 429


@dataclass
class _Image:
    """An image on its way through the model."""

    pixel_values: torch.Tensor  # (1, channels, height, width)
    logits: Future[torch.Tensor] = field(default_factory=Future)  # (num_labels,), on the CPU


class EndpointHandler:
    r"""
    A model that answers requests, from any number of threads.

    Requests that come at the same time go through the model in one batch. Each image is still answered by itself:
    the relation scope is `"self"` or `"reference"`, as the model's config says. A config that says `"batch"`, by which
    an answer would depend on whose requests came at the same time, is read as `"reference"` if the model has a
    reference bank and as `"self"` if not.

    The endpoint's container answers every exception by HTTP 400 with its message. A server of one's own can tell them
    apart: `ValueError` is the request's fault (400), [`OverloadedError`] carries its status (429), others are the
    server's (500).

    Args:
        path (`str`):
            The folder of the model: weights, config, image processor and code, which is run.

    Raises:
        ValueError: if one of the environment variables above is no number above 0.
    """

    def __init__(self, path: str = ""):
        self.max_batch_size = _positive_setting("RBI_MAX_BATCH_SIZE", 16)
        self.max_pending = _positive_setting("RBI_MAX_PENDING", 128)
        self.max_pixels = _positive_setting("RBI_MAX_PIXELS", 100_000_000)
        hosts = os.environ.get("RBI_URL_HOSTS", "").split(",")
        self.url_hosts = {host.strip().lower() for host in hosts if host.strip()}

        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForImageClassification.from_pretrained(path, trust_remote_code=True)
        self.model = model.to(device).eval()
        self.image_processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=True)
        config = self.model.config
        self.mode = "L" if len(config.image_mean) == 1 else "RGB"
        self.relation_scope = config.relation_scope
        if self.relation_scope == "batch":
            self.relation_scope = "self" if config.references is None else "reference"

        # More threads than cores would decode no faster, and hold more images in memory.
        self._decoders = threading.BoundedSemaphore(os.cpu_count() or 1)
        # It guards what follows.
        self._condition = threading.Condition()
        self._waiting: deque[_Image] = deque()
        self._num_pending = 0
        self._num_decoding = 0
        # The model runs in one thread: each thread that ran it would keep a pool of its own for the cores.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="rbi")

    def __call__(self, data: dict[str, Any]) -> list[dict[str, Any]] | list[list[dict[str, Any]]]:
        r"""
        Args:
            data (`dict`):
                `inputs`: the bytes of an image's file, the same as base64 text or `data:` URI, its address (see
                `RBI_URL_HOSTS`), a `PIL.Image.Image`, or a list of these. `parameters`, optional: `top_k`, the number
                of labels to answer (5), and `function_to_apply`, which makes scores of the logits: `"softmax"`,
                `"sigmoid"` or `"none"` (by default what the `image-classification` pipeline takes for the model).

        Returns:
            `list[dict]`: label and score of the best labels, best first; a list of such lists for a list of images.

        Raises:
            ValueError: if the request, or one of its images, can't be answered; the message says what to change. One
                bad image refuses the list that it is in, and no other request.
            OverloadedError: if more than `RBI_MAX_PENDING` images would be in work or waiting.
        """
        inputs, top_k, function = self._read_request(data)
        is_list = isinstance(inputs, (list, tuple))
        images = self._logits(list(inputs) if is_list else [inputs], "inputs[{}]" if is_list else "inputs")
        answers = [self._answer(logits, top_k, function) for logits in images]
        return answers if is_list else answers[0]

    def _read_request(self, data: Any) -> tuple[Any, int, str]:
        if not isinstance(data, dict) or data.get("inputs") is None:
            raise ValueError(
                'The request has no `inputs`: send {"inputs": an image as base64 text, "parameters": {}}.'
            )
        # `options`, which some clients send as well, are for the Hub's own servers.
        _check_names(data.keys() - {"options"}, {"inputs", "parameters"}, "The request")
        parameters = data.get("parameters")
        if parameters is None:
            parameters = {}
        if not isinstance(parameters, dict):
            raise ValueError(f'`parameters` must be an object, such as {{"top_k": 3}}, got {_short(parameters)}.')
        _check_names(parameters.keys(), {"top_k", "function_to_apply"}, "`parameters`")

        top_k = parameters.get("top_k")
        if top_k is None:
            top_k = _DEFAULT_TOP_K
        if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
            raise ValueError(f"`top_k` must be a whole number of at least 1, got {_short(top_k)}.")
        function = parameters.get("function_to_apply")
        if function is None:
            function = self._default_function()
        if not isinstance(function, str) or function not in _FUNCTIONS:
            choices = ", ".join(f'"{name}"' for name in _FUNCTIONS)
            raise ValueError(f"`function_to_apply` must be one of {choices}, got {_short(function)}.")

        inputs = data["inputs"]
        if isinstance(inputs, (list, tuple)) and not 1 <= len(inputs) <= self.max_pending:
            raise ValueError(
                f"A request takes 1 to {self.max_pending} images, `inputs` has {len(inputs)}"
                + (": send them in several requests." if inputs else ".")
            )
        return inputs, top_k, function

    def _default_function(self) -> str:
        config = self.model.config
        if config.problem_type == "regression":
            return "none"
        return (
            "sigmoid" if config.problem_type == "multi_label_classification" or config.num_labels == 1 else "softmax"
        )

    def _answer(self, logits: torch.Tensor, top_k: int, function: str) -> list[dict[str, Any]]:
        scores = _FUNCTIONS[function](logits).tolist()
        best = sorted(range(len(scores)), key=lambda index: -scores[index])[:top_k]
        return [{"label": self.model.config.id2label[index], "score": scores[index]} for index in best]

    def _logits(self, inputs: list[Any], name: str) -> list[torch.Tensor]:
        """The logits of each image, (num_labels,) on the CPU. `name` has a place for its number in a list."""
        with self._pending(len(inputs)):
            with self._decoding(len(inputs)):
                images = [_Image(self._read(each, name.format(number))) for number, each in enumerate(inputs)]
                with self._condition:
                    self._waiting.extend(images)
            # As many turns as images are enough, since each takes one at least. Those that find none do nothing.
            for _ in images:
                self._worker.submit(self._run_batch)
            return [image.logits.result() for image in images]

    @contextmanager
    def _pending(self, number: int) -> Iterator[None]:
        with self._condition:
            if self._num_pending + number > self.max_pending:
                raise OverloadedError(
                    f"The endpoint is overloaded: {self._num_pending} images are waiting, of at most "
                    f"{self.max_pending}. Try again later."
                )
            self._num_pending += number
        try:
            yield
        finally:
            with self._condition:
                self._num_pending -= number

    @contextmanager
    def _decoding(self, number: int) -> Iterator[None]:
        with self._condition:
            self._num_decoding += number
        try:
            yield
        finally:
            with self._condition:
                self._num_decoding -= number
                self._condition.notify_all()

    def _read(self, source: Any, name: str) -> torch.Tensor:
        """The pixels of an image as the model takes them, (1, channels, height, width)."""
        if isinstance(source, str):
            source = self._read_text(source, name)
        with self._decoders:
            image = _decode(source, name, self.max_pixels).convert(self.mode)
            try:
                return self.image_processor(images=image, return_tensors="pt")["pixel_values"]
            except ValueError as error:
                width, height = image.size
                raise ValueError(f"`{name}`, {width} x {height} pixels, can't be prepared: {error}") from error

    def _read_text(self, text: str, name: str) -> bytes:
        if text[:8].lower().startswith(("http://", "https://")):
            return self._download(text, name)
        encoded = text
        if text[:5].lower() == "data:":
            header, comma, encoded = text.partition(",")
            if not comma or not header.lower().endswith(";base64"):
                raise ValueError(f"`{name}` is a data: URI, but not of base64: write data:image/png;base64,...")
        try:
            # Some encoders break lines.
            return base64.b64decode("".join(encoded.split()), validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError(
                f"`{name}` is no image: a text must be the image's file in base64, but {_short(text)} is not. "
                "Paths are not read."
            ) from error

    def _download(self, url: str, name: str) -> bytes:
        try:
            parts = urlsplit(url)
            scheme, host, port = parts.scheme.lower(), parts.hostname or "", parts.port
        except ValueError as error:
            raise ValueError(f"`{name}` is no valid address: {_short(url)}.") from error
        is_default = port is None or port == {"http": 80, "https": 443}[scheme]
        if (host if is_default else f"{host}:{port}") not in self.url_hosts:
            raise ValueError(
                f"`{name}` is an address of {host}, which this endpoint does not fetch from: send the image itself, "
                "in base64, or have the host added to the endpoint's environment variable RBI_URL_HOSTS."
            )
        # A bare connection goes nowhere but to the host that was checked: it follows neither redirects nor proxies.
        connection_class = http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection
        connection = connection_class(host, port, timeout=_DOWNLOAD_SECONDS)
        try:
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", target, headers={"User-Agent": "rbi-endpoint"})
            response = connection.getresponse()
            if response.status != 200:
                raise ValueError(f"it answered {response.status} {response.reason} (redirects are not followed)")
            return _read_whole(response)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ValueError(f"`{name}` could not be fetched from {host}: {error}.") from error
        finally:
            connection.close()

    def _run_batch(self) -> None:
        """Answers those that wait the longest. Images of one size go through the model together."""
        with self._condition:
            if not self._waiting:
                return
            self._condition.wait_for(
                lambda: not self._num_decoding or len(self._waiting) >= self.max_batch_size, _MAX_WAIT
            )
            batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), self.max_batch_size))]
        groups: dict[torch.Size, list[_Image]] = {}
        for image in batch:
            groups.setdefault(image.pixel_values.shape, []).append(image)
        for group in groups.values():
            try:
                self._forward(group)
            except Exception:
                # What is wrong with one image, or too much for the memory at once, must not fail the others.
                for image in group:
                    try:
                        self._forward([image])
                    except Exception as error:
                        image.logits.set_exception(error)

    def _forward(self, images: list[_Image]) -> None:
        pixel_values = torch.cat([image.pixel_values for image in images])
        pixel_values = pixel_values.to(self.model.device, self.model.dtype)
        with torch.inference_mode():
            logits = self.model(pixel_values=pixel_values, relation_scope=self.relation_scope).logits.float().cpu()
        for image, row in zip(images, logits, strict=True):
            if row.isfinite().all():
                image.logits.set_result(row)
            else:
                image.logits.set_exception(RuntimeError("The model's logits of the image are not finite."))


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


def _read_whole(response: http.client.HTTPResponse) -> bytes:
    content, deadline = b"", time.monotonic() + _DOWNLOAD_SECONDS
    while part := response.read1(65536):
        content += part
        if len(content) > _MAX_DOWNLOAD_BYTES:
            raise ValueError(f"it is larger than {_MAX_DOWNLOAD_BYTES} bytes")
        if time.monotonic() > deadline:
            raise ValueError(f"it took longer than {_DOWNLOAD_SECONDS} seconds")
    return content


def _decode(source: Any, name: str, max_pixels: int) -> Image.Image:
    """
    An image, upright and RGB: EXIF's orientation is applied, transparency is laid on white, 16 bits are scaled to 8,
    and of an animation the first frame counts.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        if not len(source):
            raise ValueError(f"`{name}` is empty: send the image's file.")
        # Pillow's decoders raise errors of many kinds for files that are broken.
        try:
            # EPS is a program, which Ghostscript would be started to run.
            Image.init()
            image: Image.Image = Image.open(io.BytesIO(source), formats=[each for each in Image.ID if each != "EPS"])
        except Image.UnidentifiedImageError as error:
            raise ValueError(f"`{name}` is not an image of a known format: send a PNG or JPEG file.") from error
        except Image.DecompressionBombError as error:
            raise ValueError(f"`{name}` is too large: {error} Send a smaller image.") from error
        except MemoryError:
            raise
        except Exception as error:
            raise ValueError(f"`{name}` can't be opened as an image: {error}") from error
    elif isinstance(source, Image.Image):
        image = source
    else:
        raise ValueError(f"`{name}` must be an image's file as bytes or base64 text, got {type(source).__name__}.")
    width, height = image.size
    if width * height > max_pixels:
        raise ValueError(
            f"`{name}` has {width} x {height} pixels, more than the limit of {max_pixels}: send a smaller image."
        )
    if max(width, height) > _MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(
            f"`{name}` has {width} x {height} pixels, one side more than {_MAX_ASPECT_RATIO} times the other: crop it."
        )
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"`{name}` is broken or cut off: {error}. Send the whole file.") from error
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        orientation = 1
    image = _to_rgb(image, name)
    return image.transpose(_TRANSPOSES[orientation]) if orientation in _TRANSPOSES else image


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise ValueError(f"`{name}` has pixels that are not finite.")
        if image.mode != "F":
            values = values / 257
        elif values.max() <= 1:
            values = values * 255
        image = Image.fromarray((values.clip(0, 255) + 0.5).astype(np.uint8))
    elif "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        # Pillow converts La to nothing but LA.
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
