# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""
A loopback stand-in for the container of an Inference Endpoint, whose toolkit is in no package registry.

Like the toolkit, it loads `handler.py` from the model's folder, with the folder on the path; takes POST on `/`; reads
`image/*` bodies with Pillow as RGB images, and JSON unchanged; takes `parameters` from the query if the body has none;
and answers an exception with JSON, `{"error": message}`.

Unlike the toolkit, it passes `application/octet-stream` bodies to the handler as bytes; answers with the exception's
`status_code` if it has one, with 400 for a `ValueError` and 500 for others, where the toolkit always answers 400;
refuses bodies above a limit with 413; and calls the handler from many threads, where the toolkit uses one.

    python endpoint.py MODEL_FOLDER

prints its address and serves until its standard input ends.
"""

import importlib.util
import io
import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from anyio import CapacityLimiter, to_thread
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route


MAX_BODY_BYTES = 4_000_000


class TooLargeError(Exception):
    status_code = 413


def load_handler(folder: Path) -> Callable[[dict], Any]:
    """Makes the handler of a model's folder as the toolkit does."""
    spec = importlib.util.spec_from_file_location("handler", folder / "handler.py")
    assert spec is not None and spec.loader is not None
    sys.path.insert(0, str(folder))
    module = importlib.util.module_from_spec(spec)
    sys.modules["handler"] = module
    spec.loader.exec_module(module)
    return module.EndpointHandler(str(folder))


def create_app(handler: Callable[[dict], Any], num_threads: int = 100) -> Starlette:
    threads = CapacityLimiter(num_threads)

    async def predict(request: Request) -> JSONResponse:
        try:
            body = await _read_body(request)
            try:
                data = _deserialize(request, body)
            except Exception as error:
                raise ValueError(str(error)) from error
            return JSONResponse(await to_thread.run_sync(handler, data, limiter=threads))
        except Exception as error:
            status_code = getattr(error, "status_code", 400 if isinstance(error, ValueError) else 500)
            return JSONResponse({"error": str(error)}, status_code)

    return Starlette(routes=[Route("/", predict, methods=["POST"])])


async def _read_body(request: Request) -> bytes:
    parts: list[bytes] = []
    size = 0
    # Read to the end: a client that is still sending would not see the answer.
    async for part in request.stream():
        size += len(part)
        parts = [*parts, part] if size <= MAX_BODY_BYTES else []
    if size > MAX_BODY_BYTES:
        raise TooLargeError(f"The body has {size} bytes, more than {MAX_BODY_BYTES}: send a smaller image.")
    return b"".join(parts)


def _deserialize(request: Request, body: bytes) -> dict:
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type == "application/json":
        data = json.loads(body)
    elif content_type == "application/octet-stream":
        data = {"inputs": body}
    elif content_type.startswith("image/"):
        data = {"inputs": Image.open(io.BytesIO(body)).convert("RGB")}
    else:
        raise ValueError(f"The content type {content_type!r} is neither JSON nor an image's.")
    if request.query_params and isinstance(data, dict) and "parameters" not in data:
        values = request.query_params.items()
        data["parameters"] = {name: int(value) if value.isnumeric() else value for name, value in values}
    return data


@contextmanager
def serve(app: Starlette) -> Iterator[str]:
    """Serves an application on a free port; yields its address."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    # Listens before the thread starts, so that clients can connect at once.
    listener = server.config.bind_socket()
    listener.listen(server.config.backlog)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        listener.close()


if __name__ == "__main__":
    with serve(create_app(load_handler(Path(sys.argv[1])))) as address:
        print(address, flush=True)
        sys.stdin.read()
