# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Measures what RBI costs in training: images per second of both presets and of a plain classifier on the same
backbone, which take turns in one run.

    python -m benchmarks.training_throughput --bf16 --batch_size 128 --csv benchmarks/training_throughput_h200.csv
"""

import csv
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForImageClassification

from modeling_rbi import RBIConfig, RBIForImageClassification, UserError
from training.cli import parse_arguments, run_command
from training.record import processor_name


CONVNEXT_BASE = '{"model_type": "convnext", "hidden_sizes": [128, 256, 512, 1024], "depths": [3, 3, 27, 3]}'


@dataclass
class BenchmarkArguments:
    """Options of the benchmark."""

    backbone_config: str = field(default=CONVNEXT_BASE, metadata={"help": "Config of the backbone, as JSON."})
    batch_size: int = field(default=128, metadata={"help": "Images per batch."})
    image_size: int = field(default=224, metadata={"help": "Height and width of the images, in pixels."})
    num_labels: int = field(default=200, metadata={"help": "Number of classes."})
    num_rounds: int = field(default=5, metadata={"help": "Number of turns of each model, at least 2."})
    steps_per_round: int = field(default=10, metadata={"help": "Training steps per turn."})
    bf16: bool = field(default=False, metadata={"help": "Train in mixed precision."})
    csv: str | None = field(default=None, metadata={"help": "CSV file to write the results to."})

    def __post_init__(self):
        if self.num_rounds < 2:
            raise UserError(f"--num_rounds must be at least 2, got {self.num_rounds}.")


def build_models(args: BenchmarkArguments) -> dict[str, nn.Module]:
    """Builds the plain classifier and RBI on the same backbone, with random weights."""
    fields = json.loads(args.backbone_config)

    def backbone_config():
        return CONFIG_MAPPING[fields["model_type"]].from_dict(fields | {"num_labels": args.num_labels})

    models: dict[str, nn.Module] = {"plain": AutoModelForImageClassification.from_config(backbone_config())}
    for preset in ("paper", "kernel"):
        config = getattr(RBIConfig, preset)(backbone_config=backbone_config(), num_labels=args.num_labels)
        models[f"rbi, {preset}"] = RBIForImageClassification(config)
    return models


def train_steps(model: nn.Module, optimizer: torch.optim.Optimizer, args: BenchmarkArguments, number: int) -> float:
    """Runs training steps on random images and returns the seconds that they take."""
    device = next(model.parameters()).device
    pixel_values = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=device)
    labels = torch.randint(args.num_labels, (args.batch_size,), device=device)
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(number):
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            loss = model(pixel_values=pixel_values, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(args: BenchmarkArguments, device: torch.device) -> dict[str, list[float]]:
    """Images per second of each model in each turn, after a warm-up."""
    trained = {}
    for name, model in build_models(args).items():
        model.to(device).train()
        trained[name] = model, torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        train_steps(*trained[name], args, number=2)
    speeds: dict[str, list[float]] = {name: [] for name in trained}
    for _ in range(args.num_rounds):
        for name, (model, optimizer) in trained.items():
            seconds = train_steps(model, optimizer, args, args.steps_per_round)
            speeds[name].append(args.batch_size * args.steps_per_round / seconds)
    return speeds


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(command, argv)


def command(argv: Sequence[str], console: Console):
    """Parses the arguments, measures, prints the table, and writes the CSV file."""
    args, _ = parse_arguments(argv, (BenchmarkArguments,), defaults={}, description=__doc__)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = torch.cuda.get_device_name() if device.type == "cuda" else processor_name()
    speeds = measure(args, device)
    rows = []
    for name, values in speeds.items():
        ratios = [value / plain for value, plain in zip(values, speeds["plain"], strict=True)]
        rows.append(
            {
                "model": name,
                "images_per_second": round(statistics.mean(values), 2),
                "ratio_to_plain": round(statistics.mean(ratios), 4),
                "ratio_std": round(statistics.stdev(ratios), 4),
                "rounds": args.num_rounds,
                "batch_size": args.batch_size,
                "image_size": args.image_size,
                "precision": "bf16" if args.bf16 else "fp32",
                "backbone": json.loads(args.backbone_config)["model_type"],
                "machine": machine,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            }
        )
    table = Table(title=f"Training on {machine}")
    for column in ("model", "images per second", "ratio to plain"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        ratio = f"{row['ratio_to_plain']:.3f} ± {row['ratio_std']:.3f}"
        table.add_row(str(row["model"]), f"{row['images_per_second']:.1f}", ratio)
    console.print(table)
    if args.csv is not None:
        with Path(args.csv).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        console.print(f"Written to {Path(args.csv).resolve()}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
