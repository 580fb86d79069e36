# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""RBI on real photographs, from weights to a saved model: `python -m training.demo`.

Compares heads on the frozen backbone's features, fine-tunes the better RBI preset end to end, saves it, loads it back
through the Auto classes and classifies an image with a pipeline.
"""

import json
import os
import platform
import random
import shutil
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import datasets
import torch
import transformers
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import (
    AutoModelForImageClassification,
    HfArgumentParser,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from modeling_rbi import RBIConfig, RBIForImageClassification, RBIModel, UserError, pixel_statistics

from .ablation.heads import Budget, TrainedHead, predict_with, train_head, train_plain, untrained_head
from .data.packaged.backbones import load_mobilenet_v2, mobilenet_v2_image_processor
from .data.packaged.orl import load_orl_faces
from .data.splits import Split, draw_few_shots
from .evaluation.features import CachedImages
from .evaluation.protocols import ProtocolAccuracies, evaluate_protocols
from .record import processor_name


RESULTS_FILE = "demo_results.json"
PRESETS = {"rbi": "paper", "rbi-kernel": "kernel"}
# Each RBI arm beside the arm that differs from it in nothing but the relations. Attention to itself alone leaves the
# untrained kernel head, which starts as identity, with the plain classifier.
CONTROLS = {"rbi": "self", "rbi-kernel": "self-kernel", "rbi-kernel, untrained": "plain"}


@dataclass
class DemoArguments:
    """Options of the demo."""

    output_dir: str = field(default="outputs/demo", metadata={"help": "Folder for the model and the results."})
    num_draws: int = field(default=10, metadata={"help": "Random choices of the training images. At least 2."})
    image_size: int = field(default=128, metadata={"help": "Height and width of the images, in pixels."})
    max_steps: int = field(default=100, metadata={"help": "Training steps of each head on the frozen backbone."})
    batch_size: int = field(default=40, metadata={"help": "Images of a training batch, which attend to each other."})
    eval_batch_size: int = field(
        default=128, metadata={"help": "About how many test images attend to each other in a batch."}
    )
    num_shuffles: int = field(default=5, metadata={"help": "Random orders of the test images. At least 2."})
    num_train_epochs: int = field(default=8, metadata={"help": "Epochs of the fine-tuning end to end."})
    learning_rate: float = field(default=1e-5, metadata={"help": "Learning rate of the fine-tuning end to end."})
    seed: int = field(default=0, metadata={"help": "Random seed; draw k uses seed + k."})

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
    """What one arm did in one draw."""

    test: ProtocolAccuracies
    validation_accuracy: float
    validation_loss: float
    num_parameters: int
    seconds: float


def check_output_dir(output_dir: Path):
    """Refuses a folder that holds something else than an earlier demo, before any work is done."""
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir {output_dir} is a file: name a folder.")
    if output_dir.is_dir() and any(output_dir.iterdir()) and not (output_dir / RESULTS_FILE).exists():
        raise UserError(
            f"--output_dir {output_dir} is not empty and holds no earlier demo, which alone would be replaced: name "
            "another folder."
        )


def load_images(image_size: int) -> tuple[datasets.Dataset, CachedImages, RBIModel]:
    """The faces, their features, and the model with the pretrained backbone that gave them."""
    faces = load_orl_faces()
    image_processor = mobilenet_v2_image_processor(image_size)
    backbone = load_mobilenet_v2()
    image_mean, image_std = pixel_statistics(image_processor)
    config = RBIConfig.paper(backbone_config=backbone.config, image_mean=image_mean, image_std=image_std)
    model = RBIModel(config).eval()
    model.backbone.load_state_dict(backbone.state_dict())
    pixel_values = image_processor(list(faces["image"]), return_tensors="pt")["pixel_values"]
    return faces, CachedImages.from_backbone(model, pixel_values, torch.tensor(faces["label"])), model


def head_config(preset: str, model: RBIModel, label_names: list[str]) -> RBIConfig:
    """A preset's config for the backbone of `model`."""
    return getattr(RBIConfig, preset)(
        backbone_config=model.config.backbone_config,
        feature_size=model.config.feature_size,
        image_mean=model.config.image_mean,
        image_std=model.config.image_std,
        id2label=dict(enumerate(label_names)),
        label2id={name: number for number, name in enumerate(label_names)},
    )


def compare_heads(
    images: CachedImages, split: Split, model: RBIModel, label_names: list[str], args: DemoArguments, seed: int
) -> dict[str, TrainedHead]:
    """Trains all arms on one draw under one budget."""
    budget = Budget(steps=args.max_steps, batch_size=args.batch_size)
    configs = {arm: head_config(preset, model, label_names) for arm, preset in PRESETS.items()}
    plain = train_plain(images, split.train, len(label_names), budget, seed)
    heads = {"plain": plain, "rbi-kernel, untrained": untrained_head(images, plain, configs["rbi-kernel"])}
    for arm, config in configs.items():
        heads[CONTROLS[arm]] = train_head(images, split.train, config, budget, seed, relation_scope="self")
        heads[arm] = train_head(images, split.train, config, budget, seed)
    return heads


def measure(head: TrainedHead, images: CachedImages, split: Split, args: DemoArguments, seed: int) -> ArmResult:
    """Accuracies on the test images, and on the validation images in the scope that a deployed model has."""
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
    """The RBI arm with the best validation accuracy, the lower loss where two are equal."""
    return max(
        PRESETS,
        key=lambda arm: (
            statistics.mean(result.validation_accuracy for result in results[arm]),
            -statistics.mean(result.validation_loss for result in results[arm]),
        ),
    )


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5


def results_table(results: dict[str, list[ArmResult]]) -> Table:
    """One row for each arm; the gains are paired by draw."""
    table = Table(title="Test accuracy in %, heads on the frozen backbone")
    for column in ("arm", "single", "shuffled", "sorted", "leak", "gain over its self", "parameters", "seconds"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for arm, draws in results.items():
        tests = [draw.test for draw in draws]
        gain = ""
        if arm in CONTROLS:
            differences = [
                test.shuffled - control.test.shuffled
                for test, control in zip(tests, results[CONTROLS[arm]], strict=True)
            ]
            gain = "{:+.2f} ± {:.2f}".format(*mean_and_error(differences))
        table.add_row(
            arm,
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


def explain_table(args: DemoArguments, num_train: int, num_test: int) -> str:
    """What the columns are."""
    batch = num_test / max(1, round(num_test / args.eval_batch_size))
    return (
        f"{args.num_draws} draws of {num_train} training images; {num_test} test images in batches of "
        f"{batch:.0f}, training batches of {args.batch_size}.\n"
        f"single: each image alone. shuffled: random batches, ± standard deviation over {args.num_shuffles} "
        "shuffles. sorted: class-ordered\n"
        "batches; leak = sorted - shuffled: labels read off the neighbors, no accuracy. gain: shuffled, over the "
        "same head without\n"
        "relations (self, self-kernel; plain for the untrained one), paired by draw, ± standard error."
    )


class FineTuningImages(torch.utils.data.Dataset):
    """Rows of the faces for `Trainer`, in training mirrored and shifted at random."""

    def __init__(self, faces: datasets.Dataset, rows: torch.Tensor, image_processor, augment: bool):
        self.faces, self.rows, self.image_processor, self.augment = faces, rows.tolist(), image_processor, augment

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        row = self.faces[self.rows[index]]
        image = _augment(row["image"]) if self.augment else row["image"]
        pixel_values = self.image_processor(image, return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixel_values, "labels": row["label"]}


def _augment(image: Image.Image) -> Image.Image:
    """A mirror image half of the time, and a crop of 90 % at a random place."""
    image = ImageOps.mirror(image) if random.random() < 0.5 else image
    width, height = round(0.9 * image.width), round(0.9 * image.height)
    left, top = random.randint(0, image.width - width), random.randint(0, image.height - height)
    return image.crop((left, top, left + width, top + height))


def fine_tune(
    model: RBIForImageClassification, faces: datasets.Dataset, split: Split, args: DemoArguments, folder: Path
) -> Trainer:
    """Trains all of the model with `Trainer` and keeps the epoch that is best on the validation images."""
    # Batch normalization keeps its statistics of ImageNet: batches of so few images would estimate them badly.
    model.rbi.backbone.register_forward_pre_hook(lambda backbone, _: backbone.eval() and None)
    image_processor = mobilenet_v2_image_processor(args.image_size)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=args.num_train_epochs,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.eval_batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=1,
            load_best_model_at_end=True,
            metric_for_best_model="accuracy",
            logging_strategy="no",
            use_cpu=True,  # the figures stand beside those of the frozen backbone, which are the CPU's
            report_to="none",
            remove_unused_columns=False,
            seed=args.seed,
            disable_tqdm=not sys.stderr.isatty(),
        ),
        train_dataset=FineTuningImages(faces, split.train, image_processor, augment=True),
        eval_dataset=FineTuningImages(faces, split.validation, image_processor, augment=False),
        processing_class=image_processor,
        compute_metrics=lambda output: {"accuracy": (output.predictions.argmax(-1) == output.label_ids).mean()},
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def environment() -> dict[str, str]:
    """What the figures were measured with."""
    return {
        "machine": platform.machine(),
        "processor": processor_name(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def write_results(folder: Path, args: DemoArguments, results: dict[str, list[ArmResult]], fine_tuned: dict):
    """Writes every figure, draw by draw."""
    content = {
        "environment": environment(),
        "arguments": asdict(args),
        "frozen": {arm: [asdict(draw) for draw in draws] for arm, draws in results.items()},
        "fine_tuned": fine_tuned,
    }
    (folder / RESULTS_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def publish_folder(draft: Path, output_dir: Path):
    """Puts the finished folder in its place, whole, instead of an earlier demo's."""
    if output_dir.exists():
        earlier = draft.with_name(draft.name + ".earlier")
        os.replace(output_dir, earlier)
        os.replace(draft, output_dir)
        shutil.rmtree(earlier)
    else:
        os.replace(draft, output_dir)


def main(args: DemoArguments, console: Console | None = None):
    """Runs the demo; see the module's description."""
    console = console or Console()
    if not console.is_terminal:
        console.width = 120
    start = time.perf_counter()
    output_dir = Path(args.output_dir)
    check_output_dir(output_dir)

    faces, images, base = load_images(args.image_size)
    label_names = faces.features["label"].names
    console.print(
        f"{len(faces)} photographs of {len(label_names)} people (ORL faces, AT&T Laboratories Cambridge); MobileNetV2 "
        f"with ImageNet weights, {images.features.shape[1]} features, {args.image_size} px."
    )

    results: dict[str, list[ArmResult]] = {}
    splits = [draw_few_shots(images.labels, 2, 1, args.seed + draw) for draw in range(args.num_draws)]
    first_heads: dict[str, TrainedHead] = {}
    with Progress(console=console, transient=True) as progress:
        for draw in progress.track(range(args.num_draws), description="Comparing heads on the frozen backbone"):
            heads = compare_heads(images, splits[draw], base, label_names, args, args.seed + draw)
            for arm, head in heads.items():
                results.setdefault(arm, []).append(measure(head, images, splits[draw], args, args.seed + draw))
            first_heads = first_heads or heads
    console.print(results_table(results))
    console.print(explain_table(args, len(splits[0].train), len(splits[0].test)), soft_wrap=True, highlight=False)

    chosen = choose_preset(results)
    console.print(
        f"\nBetter RBI preset on the validation images: [bold]{chosen}[/bold]. Fine-tuning it end to end on draw 1, "
        f"{args.num_train_epochs} epochs."
    )
    model: RBIForImageClassification = first_heads[chosen].model  # type: ignore[assignment]
    model.rbi.backbone.load_state_dict(base.backbone.state_dict())
    draft = output_dir.with_name(f".{output_dir.name}.{os.getpid()}")
    draft.mkdir(parents=True)
    try:
        trainer = fine_tune(model, faces, splits[0], args, draft / "checkpoints")
        shutil.rmtree(draft / "checkpoints")
        model = trainer.model.eval()
        accuracies_by_epoch = [
            100 * log["eval_accuracy"] for log in trainer.state.log_history if "eval_accuracy" in log
        ]
        console.print(f"Validation accuracy by epoch: {', '.join(f'{value:.1f}' for value in accuracies_by_epoch)}")
        tuned_images = CachedImages.from_backbone(model.rbi, images.pixel_values, images.labels)
        before = results[chosen][0].test
        after = evaluate_protocols(
            predict_with(model, tuned_images),
            splits[0].test,
            images.labels[splits[0].test],
            args.eval_batch_size,
            args.num_shuffles,
            args.seed,
        )
        for title, accuracies in (("frozen backbone", before), ("fine-tuned", after)):
            console.print(
                f"{title + ':':17} single {accuracies.single:.2f}, shuffled {accuracies.shuffled:.2f} "
                f"± {accuracies.shuffled_std:.2f}, sorted {accuracies.sorted:.2f} (leak {accuracies.leak:+.2f})",
                highlight=False,
            )
        trainer.save_model(str(draft))
        write_results(draft, args, results, {"arm": chosen, "draw": 0, "test": asdict(after)})
        publish_folder(draft, output_dir)
    finally:
        shutil.rmtree(draft, ignore_errors=True)

    row = faces[int(splits[0].test[0])]
    check_saved_model(output_dir, row["image"], label_names[row["label"]], model, console)
    console.print(
        f"\nModel, image processor and code: {output_dir.resolve()}\n"
        f"All figures, draw by draw:       {(output_dir / RESULTS_FILE).resolve()}\n"
        f"{time.perf_counter() - start:.0f} s on {environment()['processor']}, {torch.get_num_threads()} threads.",
        soft_wrap=True,
        highlight=False,
    )


def check_saved_model(
    folder: Path, image: Image.Image, label: str, model: RBIForImageClassification, console: Console
):
    r"""
    Loads the folder with the Auto classes and a pipeline, and classifies an image.

    Raises:
        RuntimeError: if the loaded model does not give the logits of the trained one.
    """
    image_processor = AutoImageProcessor.from_pretrained(folder)
    loaded = AutoModelForImageClassification.from_pretrained(folder)
    pixel_values = image_processor(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        difference = (loaded(pixel_values).logits - model(pixel_values).logits).abs().max().item()
    if difference > 1e-4:
        raise RuntimeError(
            f"The model loaded from {folder} gives other logits, by {difference:.1e}, than was trained."
        )
    answers = pipeline("image-classification", model=str(folder), device="cpu")(image, top_k=3)
    console.print(
        f"\nLoaded with AutoModelForImageClassification: logits as trained (difference {difference:.0e}). A test "
        f"image of {label} through pipeline(): "
        + ", ".join(f"{answer['label']} {answer['score']:.2f}" for answer in answers),
        soft_wrap=True,
        highlight=False,
    )


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    (arguments,) = HfArgumentParser(DemoArguments).parse_args_into_dataclasses()
    try:
        main(arguments)
    except (ConnectionError, ValueError) as error:
        sys.exit(f"error: {error}")
