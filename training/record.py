# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The record of a run, `run.json`: arguments, data, environment and results."""

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from .files import read_json, strict, write_json


RECORD_FILE = "run.json"
REFERENCES_FILE = "references.json"
_PACKAGES = (
    "modeling-rbi",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "evaluate",
    "kornia",
    "numpy",
    "peft",
    "pillow",
    "safetensors",
    "timm",
    "torchmetrics",
)
# Arguments that may differ when a run is resumed: they change neither the training nor which model is kept.
_HARMLESS = {
    "cache_dir",
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "ddp_timeout",
    "disable_tqdm",
    "hub_always_push",
    "hub_model_id",
    "hub_private_repo",
    "hub_revision",
    "hub_strategy",
    "local_rank",
    "log_level",
    "log_level_replica",
    "log_on_each_node",
    "logging_first_step",
    "logging_nan_inf_filter",
    "logging_steps",
    "logging_strategy",
    "output_dir",
    "project",
    "push_to_hub",
    "report_to",
    "resume_from_checkpoint",
    "run_name",
    "save_total_limit",
    "skip_memory_metrics",
}


class RunRecord:
    r"""
    The record of a run. The file is rewritten at each change.

    Args:
        output_dir (`Path`):
            Folder of the run.
        is_writer (`bool`, *optional*, defaults to `True`):
            Whether this process writes the file; the others keep the record in memory only.
    """

    def __init__(self, output_dir: Path, is_writer: bool = True):
        self.path = output_dir / RECORD_FILE
        self.is_writer = is_writer
        self.content: dict[str, Any] = {}

    @classmethod
    def read(cls, output_dir: Path) -> dict[str, Any] | None:
        r"""
        The record in a folder; `None` if there is none.

        Raises:
            UserError: if it cannot be read.
        """
        return read_json(output_dir / RECORD_FILE, "record of a run")

    def update(self, **values: Any):
        """Adds values to the record and writes it."""
        self.content |= values | {"updated": datetime.now(UTC).isoformat(timespec="seconds")}
        if self.is_writer:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, self.content)


class RecordCallback(TrainerCallback):
    """Records the metrics of each epoch and the best checkpoint."""

    def __init__(self, record: RunRecord):
        self.record = record

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.record.update(metrics_by_epoch=metrics_by_epoch(state.log_history))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.record.update(best=best_so_far(state))


def best_so_far(state: TrainerState) -> dict[str, Any] | None:
    """The best evaluation: its checkpoint, step and metric."""
    if state.best_metric is None:
        return None
    checkpoint = state.best_model_checkpoint
    return {
        "checkpoint": None if checkpoint is None else Path(checkpoint).name,
        "step": state.best_global_step,
        "metric": state.best_metric,
    }


def metrics_by_epoch(log_history: list[dict[str, float]]) -> list[dict[str, float]]:
    """Training and validation metrics, one entry for each step that was logged or evaluated."""
    entries: dict[float, dict[str, float]] = {}
    for log in log_history:
        # Skip the summary of the training, and the tests that may follow.
        if "loss" in log or any(name.startswith("eval_") for name in log):
            entries.setdefault(log["step"], {}).update(log)
    return [entries[step] for step in sorted(entries)]


def describe_environment(args: TrainingArguments) -> dict[str, Any]:
    """Versions, git revision and hardware."""
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
        "git": _git_revision(),
        "hardware": {
            "machine": platform.machine(),
            "processor": processor_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": str(args.device),
            "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
            "processes": args.world_size,
            "distributed": str(args.distributed_state.distributed_type.value) if args.distributed_state else None,
            "mixed_precision": args.mixed_precision,
        },
    }


def weights_fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over names, types, shapes and bytes of a model's saved tensors; it does not depend on the sharding."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def processor_name() -> str:
    """Name of the CPU."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def resolved_arguments(*arguments: Any) -> dict[str, Any]:
    """All resolved arguments in types of JSON, without secrets."""
    resolved: dict[str, Any] = {}
    for each in arguments:
        values = each.to_dict() if hasattr(each, "to_dict") else asdict(each) if is_dataclass(each) else each  # type: ignore[arg-type]
        resolved |= {name: value for name, value in values.items() if not name.endswith("token")}
    return json.loads(json.dumps(strict(resolved), default=str))


def without_secrets(argv: Sequence[str]) -> list[str]:
    """The words of a command line, with `***` in place of the values of `--token`, `--hub_token` and the like."""
    words: list[str] = []
    hides_next = False
    for word in argv:
        flag, equals, _ = word.partition("=")
        is_secret = flag.startswith("--") and flag.endswith("token")
        words.append("***" if hides_next else f"{flag}=***" if is_secret and equals else word)
        hides_next = is_secret and not equals
    return words


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Descriptions of the differing arguments that would change the training."""
    return [
        f"--{name} was {before.get(name)}, now {now.get(name)}"
        for name in sorted(before.keys() | now.keys())
        if name not in _HARMLESS and before.get(name) != now.get(name)
    ]


@functools.cache
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_revision() -> dict[str, Any] | None:
    """Commit of the checkout that this code runs from, and whether its files were changed."""
    folder = Path(__file__).parent

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None
