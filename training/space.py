# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Runs the app of `model_cards/space` on this machine with your model.

    python -m training.space --model outputs/mine

A Space of the Hub runs the same app. It shows predictions with and without the model's references, and the relations
between several images. Ctrl-C stops it.

Exit code 0: the app ended. 1: the model cannot be loaded, or the app cannot start. 2: wrong arguments. 130: Ctrl-C.
"""

import errno
import importlib.util
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

from rich.console import Console

from modeling_rbi import MissingPackageError, UserError

from .cli import parse_arguments, run_command


APP = Path(__file__).resolve().parents[1] / "model_cards" / "space" / "app.py"


@dataclass
class SpaceArguments:
    """Arguments of `training.space`."""

    model: str = field(metadata={"help": "RBI classifier: a folder or a repository of the Hub."})
    model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the model on the Hub."}
    )
    host: str = field(
        default="127.0.0.1",
        metadata={"help": "Address to listen at; 0.0.0.0 accepts connections from other machines."},
    )
    port: int | None = field(default=None, metadata={"help": "Port (default: 7860, or the next free port)."})

    def __post_init__(self):
        if self.port is not None and not 1 <= self.port <= 65535:
            raise UserError(f"--port must be between 1 and 65535, got {self.port}.")


class _LoaderWithoutCache(SourceFileLoader):
    """Writes no bytecode, which would put paths of this machine into the folder to upload."""

    def set_data(self, path, data, *, _mode=0o666):
        pass


def load_app() -> ModuleType:
    r"""
    Imports the Space's `app.py`, which belongs to no package.

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
    Checks that the app can listen at an address. Gradio would report every failure as a port that is taken.

    Args:
        host (`str`):
            Name or address of this machine.
        port (`int`, *optional*):
            Port; `None` for any free one.

    Raises:
        OSError: if it cannot; the message says why and which argument to change.
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
        name = f"{host}, port {port}" if port else host
        argument = "port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "host"
        raise OSError(f"Cannot listen at {name}: {error.strerror}. Choose another --{argument}.") from error


def command(argv: Sequence[str], console: Console):
    """Serves the app until Ctrl-C."""
    args, _ = parse_arguments(argv, (SpaceArguments,), {}, description=__doc__)
    check_address(args.host, args.port)
    app = load_app()
    try:
        page = app.build(args.model, args.model_revision)
    # The app does not depend on this package, so it cannot raise `UserError`.
    except (ValueError, ImportError) as error:
        raise UserError(str(error)) from error
    app.serve(page, args.host, args.port)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return run_command(command, argv, on_stop="The app is closed.")


if __name__ == "__main__":
    sys.exit(main())
