# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""RBI on real photographs, from weights to a saved model: `python -m training.demo`.

Compares heads on the features of a frozen backbone, fine-tunes the better RBI preset end to end, saves the model,
loads it back and classifies an image.
"""

import math
import random
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import scipy.stats
import torch
import transformers
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import PrinterCallback, Trainer, TrainingArguments, pipeline
from transformers.image_processing_utils import BaseImageProcessor

import modeling_rbi
from modeling_rbi import RBIConfig, RBIForImageClassification, UserError

from .ablation.arms import ARMS
from .ablation.heads import Budget, TrainedHead, train_head, train_plain, untrained_head
from .cli import parse_arguments, run_command
from .data.image_dataset import ImageDataset
from .data.packaged.orl import load_orl_faces
from .data.splits import Split, draw_few_shots
from .data.transforms import EvalTransform
from .deployment.checks import check_loads_back
from .evaluation.classifiers import predict_from
from .evaluation.features import CachedImages, extract
from .evaluation.metrics import compute_metrics
from .evaluation.protocols import ProtocolAccuracies, evaluate_protocols
from .files import check_output_dir, filled_whole, write_json
from .fine_tuning.arguments import DEFAULTS
from .fine_tuning.divergence import DivergedError
from .fine_tuning.models import ModelArguments, load_model
from .fine_tuning.optimization import freeze_batch_norm
from .record import describe_environment, processor_name


RESULTS_FILE = "demo_results.json"
# In the order of the table. An arm that takes the weights of another one stands after it.
ARM_NAMES = ("plain", "rbi-kernel-untrained", "self", "rbi", "self-kernel", "rbi-kernel")
PRESET_ARMS = ("rbi", "rbi-kernel")
_NUM_TRAIN, _NUM_VALIDATION = 2, 1  # images of each person


@dataclass
class DemoArguments:
    """Options of the demo."""

    output_dir: str = field(default="outputs/demo", metadata={"help": "Folder for the model and the results."})
    num_draws: int = field(default=10, metadata={"help": "Number of random training sets. At least 2."})
    image_size: int = field(default=128, metadata={"help": "Height and width of the images, in pixels."})
    max_steps: int = field(default=100, metadata={"help": "Training steps of each head on the frozen backbone."})
    batch_size: int = field(default=40, metadata={"help": "Images in a training batch; they attend to each other."})
    eval_batch_size: int = field(
        default=128, metadata={"help": "Approximate number of test images in a batch; they attend to each other."}
    )
    num_shuffles: int = field(default=5, metadata={"help": "Number of random orders of the test images. At least 2."})
    num_train_epochs: int = field(default=8, metadata={"help": "Epochs of the fine-tuning end to end."})
    learning_rate: float = field(default=1e-5, metadata={"help": "Learning rate of the fine-tuning end to end."})
    seed: int = field(default=0, metadata={"help": "Random seed; draw k has the seed `seed + k`."})

    def __post_init__(self):
        for name, least in (("num_draws", 2), ("num_shuffles", 2), ("batch_size", 2), ("eval_batch_size", 2)):
            self._check_least(name, least)
        for name in ("max_steps", "num_train_epochs"):
            self._check_least(name, 1)
        # The backbone halves the image five times.
        self._check_least("image_size", 32)

    def _check_least(self, name: str, least: int):
        if getattr(self, name) < least:
            raise UserError(f"--{name} must be at least {least}, got {getattr(self, name)}.")


@dataclass(frozen=True)
class ArmResult:
    """Figures of one arm in one draw."""

    test: ProtocolAccuracies
    validation_accuracy: float
    validation_loss: float
    num_parameters: int
    seconds: float


def check_folder(folder: Path):
    r"""
    Checks the output folder before any work is done. The files of a former demo are replaced.

    Raises:
        UserError: if the folder holds other files.
    """
    code = [path.name for path in Path(modeling_rbi.__file__).parent.glob("*_rbi.py")]
    names = ["config.json", "model.safetensors", "preprocessor_config.json", "training_args.bin", RESULTS_FILE, *code]
    check_output_dir(folder, "a demo", names, lambda folder: (folder / RESULTS_FILE).exists())


def as_images(faces: datasets.Dataset, processor: BaseImageProcessor) -> ImageDataset:
    """Images for evaluation."""
    return ImageDataset(faces, EvalTransform(processor))


def compare_heads(
    images: CachedImages, split: Split, base: RBIConfig, args: DemoArguments, seed: int
) -> dict[str, TrainedHead]:
    """Trains all arms on one draw, each with the same budget."""
    budget = Budget(steps=args.max_steps, batch_size=args.batch_size)
    heads: dict[str, TrainedHead] = {}
    for arm in (ARMS[name] for name in ARM_NAMES):
        if arm.name == "plain":
            heads[arm.name] = train_plain(images, split.train, base.num_labels, budget, seed)
        elif arm.weights_of is not None:
            heads[arm.name] = untrained_head(images, heads[arm.weights_of], arm.config(base))
        else:
            heads[arm.name] = train_head(images, split.train, arm.config(base), budget, seed, arm.train_scope)
    return heads


def measure(head: TrainedHead, images: CachedImages, split: Split, args: DemoArguments, seed: int) -> ArmResult:
    """Accuracies on the test images and, each image independently, on the validation images."""
    labels = images.labels
    logits = head.predict(split.validation, "self")
    return ArmResult(
        test=evaluate_protocols(
            head.predict, split.test, labels[split.test], args.eval_batch_size, args.num_shuffles, seed
        ),
        validation_accuracy=100 * (logits.argmax(-1) == labels[split.validation]).float().mean().item(),
        validation_loss=torch.nn.functional.cross_entropy(logits, labels[split.validation]).item(),
        num_parameters=head.num_parameters,
        seconds=head.seconds,
    )


def choose_preset(results: dict[str, list[ArmResult]]) -> str:
    """The RBI arm with the higher validation accuracy or, if both are equal, the lower validation loss."""
    return max(
        PRESET_ARMS,
        key=lambda arm: (
            statistics.mean(result.validation_accuracy for result in results[arm]),
            -statistics.mean(result.validation_loss for result in results[arm]),
        ),
    )


def results_table(results: dict[str, list[ArmResult]]) -> Table:
    """One row for each arm. Gains over the control are paired by draw."""
    table = Table(title="Test accuracy in %, heads on the frozen backbone")
    for column in ("arm", "single", "shuffled", "sorted", "leak", "gain over control", "parameters", "seconds"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for name, draws in results.items():
        tests, control, gain = [draw.test for draw in draws], ARMS[name].control, ""
        if control is not None:
            gains = [
                own.test.shuffled - other.test.shuffled for own, other in zip(draws, results[control], strict=True)
            ]
            gain = f"{statistics.mean(gains):+.2f} ± {scipy.stats.sem(gains):.2f}"
        table.add_row(
            name,
            f"{statistics.mean(test.single for test in tests):.2f}",
            f"{statistics.mean(test.shuffled for test in tests):.2f} "
            f"± {statistics.mean(test.shuffled_std for test in tests):.2f}",
            f"{statistics.mean(test.sorted for test in tests):.2f}",
            f"{statistics.mean(test.leak for test in tests):+.2f}",
            gain,
            f"{draws[0].num_parameters:,}",
            f"{statistics.mean(draw.seconds for draw in draws):.1f}",
        )
    return table


def explain_table(args: DemoArguments, split: Split) -> str:
    """The meaning of the columns."""
    num_test = len(split.test)
    batch = num_test / max(1, round(num_test / args.eval_batch_size))
    return (
        f"{args.num_draws} draws of {len(split.train)} training images, in batches of {args.batch_size}; {num_test} "
        f"test images, in batches of {batch:.0f}.\n"
        f"single: each image independently. shuffled: random batches, ± standard deviation over {args.num_shuffles} "
        "shuffles. sorted: class-ordered\n"
        "batches. leak: sorted - shuffled, which comes from the labels of the neighbors and is not accuracy. gain: "
        "under shuffled,\n"
        "over the same head without relations (self, self-kernel; plain for the untrained head), paired by draw, "
        "± standard error."
    )


def augment(image: Image.Image) -> Image.Image:
    """Mirrors an image half of the time, and crops 90 % of each side at a random place."""
    image = ImageOps.mirror(image) if random.random() < 0.5 else image
    width, height = round(0.9 * image.width), round(0.9 * image.height)
    left, top = random.randint(0, image.width - width), random.randint(0, image.height - height)
    return image.crop((left, top, left + width, top + height))


def fine_tune(
    model: RBIForImageClassification,
    processor: BaseImageProcessor,
    faces: datasets.Dataset,
    split: Split,
    args: DemoArguments,
    folder: Path,
) -> Trainer:
    """Trains the whole model with a plain `Trainer`, and keeps the epoch with the best validation accuracy."""
    # Batches of so few images would give poor batch-norm statistics.
    freeze_batch_norm(model)
    options: dict[str, Any] = DEFAULTS | {
        "output_dir": str(folder),
        "num_train_epochs": args.num_train_epochs,
        "per_device_train_batch_size": args.batch_size,
        "per_device_eval_batch_size": args.eval_batch_size,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": "cosine",
        "save_total_limit": 1,
        "use_cpu": True,  # so that the figures compare with the figures of the frozen backbone
        "seed": args.seed,
        "disable_tqdm": not sys.stderr.isatty(),
    }
    transform = EvalTransform(processor)
    trainer = Trainer(
        model,
        TrainingArguments(**options),
        train_dataset=ImageDataset(faces.select(split.train), lambda image: transform(augment(image))),
        eval_dataset=ImageDataset(faces.select(split.validation), transform),
        processing_class=processor,
        compute_metrics=compute_metrics,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    for log in trainer.state.log_history:
        if not math.isfinite(log.get("eval_loss", 0)):
            raise DivergedError(f"eval_loss after step {log['step']} is {log['eval_loss']}", "lower --learning_rate")
    return trainer


def run(args: DemoArguments, console: Console):
    """Runs the demo; see the module's description."""
    start = time.perf_counter()
    output_dir = Path(args.output_dir)
    check_folder(output_dir)

    faces = load_orl_faces()
    label_names = faces.features["label"].names
    base, processor = load_model(
        ModelArguments(model_name_or_path="packaged/mobilenet_v2", image_size=args.image_size), label_names
    )
    images = extract(base, as_images(faces, processor))
    console.print(
        f"{len(faces)} photographs of {len(label_names)} people (ORL faces, AT&T Laboratories Cambridge); MobileNetV2 "
        f"with ImageNet weights, {images.features.shape[1]} features, {args.image_size} px."
    )

    results: dict[str, list[ArmResult]] = {name: [] for name in ARM_NAMES}
    first_heads: dict[str, TrainedHead] = {}
    seeds = range(args.seed, args.seed + args.num_draws)
    splits = [draw_few_shots(images.labels, _NUM_TRAIN, _NUM_VALIDATION, seed) for seed in seeds]
    with Progress(console=console, transient=True) as progress:
        draws = list(zip(seeds, splits, strict=True))
        for seed, split in progress.track(draws, description="Comparing heads on the frozen backbone"):
            heads = compare_heads(images, split, base.config, args, seed)
            for name, head in heads.items():
                results[name].append(measure(head, images, split, args, seed))
            first_heads = first_heads or heads
    console.print(results_table(results))
    console.print(explain_table(args, splits[0]), soft_wrap=True, highlight=False)

    chosen, split = choose_preset(results), splits[0]
    console.print(
        f"\nBetter RBI preset on the validation images: {chosen}. Fine-tuning it end to end on draw 1, "
        f"{args.num_train_epochs} epochs."
    )
    model: RBIForImageClassification = first_heads[chosen].model  # type: ignore[assignment]
    model.rbi.backbone.load_state_dict(base.rbi.backbone.state_dict())
    with filled_whole(output_dir, last=RESULTS_FILE) as draft:
        trainer = fine_tune(model, processor, faces, split, args, draft / "checkpoints")
        shutil.rmtree(draft / "checkpoints")
        model = trainer.model.eval()
        by_epoch = [100 * log["eval_accuracy"] for log in trainer.state.log_history if "eval_accuracy" in log]
        console.print(f"Validation accuracy by epoch: {', '.join(f'{value:.1f}' for value in by_epoch)}")
        tuned = evaluate_protocols(
            predict_from(model, extract(model, as_images(faces, processor))),
            split.test,
            images.labels[split.test],
            args.eval_batch_size,
            args.num_shuffles,
            args.seed,
        )
        for title, accuracies in (("frozen backbone", results[chosen][0].test), ("fine-tuned", tuned)):
            console.print(
                f"{title + ':':17} single {accuracies.single:.2f}, shuffled {accuracies.shuffled:.2f} "
                f"± {accuracies.shuffled_std:.2f}, sorted {accuracies.sorted:.2f} (leak {accuracies.leak:+.2f})",
                highlight=False,
            )
        trainer.save_model(str(draft))
        write_json(
            draft / RESULTS_FILE,
            {
                "environment": describe_environment(trainer.args),
                "arguments": asdict(args),
                "frozen": {name: [asdict(draw) for draw in draws] for name, draws in results.items()},
                "fine_tuned": {"arm": chosen, "draw": 0, "test": asdict(tuned)},
            },
        )
        check_loads_back(draft, model, processor)

    row = faces[int(split.test[0])]
    answers = pipeline("image-classification", model=str(output_dir), device="cpu")(row["image"], top_k=3)
    console.print(
        "\nLoaded by transformers in a process without this package: the same logits. A test image of "
        f"{label_names[row['label']]} through pipeline(): "
        + ", ".join(f"{answer['label']} {answer['score']:.2f}" for answer in answers),
        soft_wrap=True,
        highlight=False,
    )
    console.print(
        f"\nModel, image processor and code: {output_dir.resolve()}\n"
        f"All figures, draw by draw:       {(output_dir / RESULTS_FILE).resolve()}\n"
        f"{time.perf_counter() - start:.0f} s on {processor_name()}, {torch.get_num_threads()} threads.",
        soft_wrap=True,
        highlight=False,
    )


def command(argv: Sequence[str], console: Console):
    """Parses the arguments and runs the demo."""
    args, _ = parse_arguments(argv, (DemoArguments,), {}, __doc__)
    run(args, console)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return run_command(command, argv)


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    sys.exit(main())
