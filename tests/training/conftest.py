"""A small data set in a published layout and the arguments of a training that takes seconds."""

import json
import multiprocessing
import os
import runpy
import socket
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model_cards.card import CardArguments
from training.data.tiny import make_published


ROOT = Path(__file__).parents[2]
TINY_CONVNEXT = {
    "model_type": "convnext",
    "hidden_sizes": [8, 12, 16, 24],
    "depths": [1, 1, 1, 1],
    "image_size": 32,
}


# With one thread, as the other tests. gloo's threads can outlive their group and abort an orderly exit.
SCRIPT = """
import os, sys, traceback

os.environ |= environment
import torch

code = 1
try:
{}
    code = 0
except BaseException:
    traceback.print_exc()
if code == 0 and torch.distributed.is_initialized():
    torch.distributed.barrier()
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
"""


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """4 classes, 10 training and 10 test images of each, in the layout of CUB-200-2011."""
    return make_published("cub_200_2011", tmp_path_factory.mktemp("published"), num_classes=4, images_per_class=20)


@pytest.fixture(scope="session")
def unlabeled_dir(tmp_path_factory):
    """A folder of 15 images without labels."""
    folder, rng = tmp_path_factory.mktemp("unlabeled"), np.random.default_rng(1)
    for number in range(15):
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((64, 64)).save(
            folder / f"{number}.png"
        )
    return folder


@pytest.fixture(scope="session")
def command_line(published):
    """Gives the command line of a training on the small data set; keywords are further arguments."""

    def make(output_dir, **more):
        values = {
            "dataset_format": "cub_200_2011",
            "dataset_dir": published,
            "backbone_config": json.dumps(TINY_CONVNEXT),
            "image_size": 32,
            "output_dir": output_dir,
            "num_train_epochs": 2,
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 8,
            "disable_tqdm": True,
            "use_cpu": True,
        } | more
        return [text for name, value in values.items() for text in (f"--{name}", str(value))]

    return make


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory):
    """A cache of this process for the data sets that the tests of a module load."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RBI_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture
def arguments(command_line, tmp_path_factory, monkeypatch):
    """As `command_line`, with a cache of its own for the downloads of this process."""
    monkeypatch.setenv("RBI_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    return command_line


@pytest.fixture(scope="session")
def stopping_init():
    """Gives an `RBITrainer.__init__` whose training stops with an error after so many steps."""
    from transformers import TrainerCallback

    from training.fine_tuning.trainer import RBITrainer

    class Stop(TrainerCallback):
        def __init__(self, step, error):
            self.step, self.error = step, error

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == self.step:
                raise self.error

    original = RBITrainer.__init__

    def make(step, error):
        def init(self, *args, callbacks, **kwargs):
            original(self, *args, callbacks=[*callbacks, Stop(step, error)], **kwargs)

        return init

    return make


@pytest.fixture
def stop_at(monkeypatch, stopping_init):
    """Makes the next trainings stop with an error after so many steps. What it returns undoes that."""
    from training.fine_tuning.trainer import RBITrainer

    original = RBITrainer.__init__

    def set_up(step, error):
        monkeypatch.setattr(RBITrainer, "__init__", stopping_init(step, error))
        return lambda: monkeypatch.setattr(RBITrainer, "__init__", original)

    return set_up


@pytest.fixture(scope="session")
def fork_server():
    """
    Starts processes, as `multiprocessing` does. They are forked from a process that has imported the commands once,
    since that takes longer than what they do.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["training.train", "training.accelerate_loop", "training.ablate", "training.assess"]
    )
    return context


def _run_module(module, words, output, folder, environment):
    """`python -m module words`, with its output in files."""
    os.chdir(folder)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(output / name, os.O_WRONLY | os.O_CREAT), number)
    os.environ |= environment
    sys.argv[1:] = words
    sys.modules.pop(module, None)  # runpy warns of a module that was imported before
    runpy.run_module(module, run_name="__main__", alter_sys=True)


class _Command:
    """A command in a process of its own. What it has written to stdout and stderr is in `stdout` and `stderr`."""

    def __init__(self, context, module, words, output, *where):
        self._output = output
        self.process = context.Process(target=_run_module, args=(module, list(map(str, words)), output, *where))
        self.process.start()

    def wait(self) -> int:
        """Its exit code; minus the number of the signal that ended it."""
        self.process.join(300)
        self.process.kill()
        self.process.join()
        return self.process.exitcode

    @property
    def stdout(self) -> str:
        return (self._output / "out").read_text()

    @property
    def stderr(self) -> str:
        return (self._output / "err").read_text()


@pytest.fixture
def start_command(fork_server, tmp_path_factory):
    """Starts `python -m module words` in a folder, by default the project's."""

    def start(module, words, folder=ROOT, **environment):
        environment = {"RBI_CACHE": str(tmp_path_factory.getbasetemp() / "cache")} | environment
        return _Command(fork_server, module, words, tmp_path_factory.mktemp("command"), folder, environment)

    return start


@pytest.fixture(scope="session")
def run_processes(fork_server, tmp_path_factory):
    """Runs a script in several processes, connected as `accelerate launch` connects them, with the names defined."""
    scripts = tmp_path_factory.mktemp("scripts")
    cache = str(tmp_path_factory.getbasetemp() / "cache")

    def run(script, number, environment=None, **names):
        path = scripts / f"{len(list(scripts.iterdir()))}.py"
        path.write_text(SCRIPT.format(textwrap.indent(script, "    ")))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        processes = []
        for rank in range(number):
            variables = {"RBI_CACHE": cache} | (environment or {})
            if number > 1:
                variables |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number)}
                variables |= {"LOCAL_WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                variables |= {"ACCELERATE_USE_CPU": "true"}
            names_of_rank = names | {"environment": variables}
            processes.append(fork_server.Process(target=runpy.run_path, args=(str(path), names_of_rank, "__main__")))
        for process in processes:
            process.start()
        for process in processes:
            process.join(300)
            process.kill()
        assert [process.exitcode for process in processes] == [0] * number

    return run


@pytest.fixture(scope="session")
def given():
    """What a card says beside the records, complete."""
    return CardArguments(
        license="apache-2.0",
        description="Tells birds apart.",
        dataset_title="Made-up birds",
        data_license="Made up, free for all.",
        data_bias="Four kinds of birds, none of them real.",
    )
