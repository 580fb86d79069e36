# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Starts the app of `model_cards/space` on this machine, with a model of yours.

    python -m training.space --model outputs/mine

It is what a Space of the Hub runs: one image's answer with and without the model's references, and the relations
between several images. Ctrl-C stops it.

Exit code 0: stopped. 1: the model cannot be shown, or the app not started. 2: the arguments are wrong.
"""

import errno
import importlib.util
import logging
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

from huggingface_hub.errors import StrictDataclassError
from transformers.hf_argparser import HfArg

from modeling_rbi import MissingPackageError, UserError

from .cli import parse_arguments


logger = logging.getLogger(__name__)

APP = Path(__file__).resolve().parents[1] / "model_cards" / "space" / "app.py"


@dataclass
class SpaceArguments:
    """Which model, and where its page is."""

    model: str = field(metadata={"help": "RBI classifier: a folder, or a repository of the Hub."})
    model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the model on the Hub."}
    )
    host: str = HfArg(
        aliases=["--server_name"],
        default="127.0.0.1",
        help="Address to listen at; 0.0.0.0 lets other machines in.",
    )
    port: int | None = HfArg(
        aliases=["--server_port"], default=None, help="By default 7860, or the next that is free."
    )

    def __post_init__(self):
        if self.port is not None and not 1 <= self.port <= 65535:
            raise UserError(f"--port must be between 1 and 65535, got {self.port}.")


class _LoaderWithoutCache(SourceFileLoader):
    """Keeps no bytecode: it would lie in the folder that is uploaded, with the paths of this machine."""

    def set_data(self, path, data, *, _mode=0o666):
        pass


def load_app() -> ModuleType:
    r"""
    The Space's `app.py`, which stands by itself and belongs to no package.

    Raises:
        MissingPackageError: if Gradio is not installed.
    """
    if importlib.util.find_spec("gradio") is None:
        raise MissingPackageError('The app needs Gradio: pip install -e ".[space]"')
    spec = importlib.util.spec_from_file_location("space_app", APP, loader=_LoaderWithoutCache("space_app", str(APP)))
    if spec is None or spec.loader is None:
        raise MissingPackageError(f"{APP} cannot be imported.")
    app = importlib.util.module_from_spec(spec)
    # Gradio looks a function's module up by its name.
    sys.modules[spec.name] = app
    spec.loader.exec_module(app)
    return app


def check_address(host: str, port: int | None):
    r"""
    Checks that the app can listen there, since Gradio takes every reason why not for a port that is taken.

    Args:
        host (`str`):
            Name or address of this machine.
        port (`int`, *optional*):
            `None`: whichever is free.

    Raises:
        OSError: if it cannot; the message says why, and which argument to change.
    """
    try:
        # An IPv6 address may stand in brackets, as it does in a URL.
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]"), port or 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError as error:
        place = f"{host}, port {port}" if port else host
        argument = "port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "host"
        raise OSError(f"Cannot listen at {place}: {error.strerror}. Name another by --{argument}.") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = None
    try:
        args, _ = parse_arguments(sys.argv[1:] if argv is None else argv, (SpaceArguments,), {}, description=__doc__)
        check_address(args.host, args.port)
        app = load_app()
        app.serve(app.build(args.model, args.model_revision), args.host, args.port)
    except KeyboardInterrupt:
        return 130
    except (ValueError, ImportError, OSError, StrictDataclassError) as error:
        logger.debug("Where it happened:", exc_info=True)
        print(f"error: {error}", file=sys.stderr)
        return 2 if args is None else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
