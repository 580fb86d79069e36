# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes RBI with a plain Accelerate loop: `training.train` without `Trainer`, to read and to copy.

python -m training.accelerate_loop --train_dir images --model_name_or_path facebook/dinov2-small
accelerate launch -m training.accelerate_loop --train_dir images --model_name_or_path facebook/dinov2-small
"""

import json
import math
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, skip_first_batches
from accelerate.utils import set_seed
from rich.console import Console
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import EvalPrediction, get_scheduler

from modeling_rbi import UserError

from .cli import parse_arguments, run_command
from .data.arguments import DataArguments
from .data.checks import load_checked_images
from .data.image_dataset import Collator, ImageDataset
from .data.mixing import Mixing
from .data.samplers import ShuffledSampler
from .data.transforms import AugmentationArguments, EvalTransform, TrainTransform
from .evaluation.metrics import compute_metrics
from .files import check_output_dir, filled_whole, write_json
from .fine_tuning.divergence import DivergedError, weights_are_finite
from .fine_tuning.loss import count_targets, training_loss
from .fine_tuning.models import ModelArguments, load_model
from .fine_tuning.optimization import parameter_groups
from .fine_tuning.training_arguments import check_ranges
from .record import differences, resolved_arguments


PROGRESS_FILE = "progress.json"


@dataclass
class LoopArguments:
    """Options of the loop, named as in `TrainingArguments` and `FineTuningArguments`."""

    output_dir: str = field(metadata={"help": "Folder for the best model and the checkpoints."})
    num_train_epochs: int = field(default=3, metadata={"help": "Number of epochs."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Training images per batch and process."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Validation images per batch and process."})
    learning_rate: float = field(default=5e-5, metadata={"help": "Learning rate of AdamW after the warm-up."})
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of matrices; vectors have none."})
    lr_scheduler_type: str = field(
        default="linear",
        metadata={
            "help": "Schedule of the learning rate.",
            "choices": ["linear", "cosine", "polynomial", "inverse_sqrt", "constant", "constant_with_warmup"],
        },
    )
    warmup_steps: int = field(default=0, metadata={"help": "Steps of the warm-up."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "The gradient is clipped to this norm."})
    gather_across_processes: bool = field(
        default=False, metadata={"help": "Images attend to the batches of all processes (GPUs), not only of one."}
    )
    self_loss_weight: float = field(
        default=0.0, metadata={"help": "Share of the loss, in [0, 1), that is computed without neighbors."}
    )
    mixed_precision: str | None = field(
        default=None,
        metadata={"help": "no, bf16 or fp16; by default as launched.", "choices": ["no", "bf16", "fp16"]},
    )
    dataloader_num_workers: int = field(default=0, metadata={"help": "Number of processes that read images."})
    checkpointing_steps: int | None = field(
        default=None, metadata={"help": "Also save a checkpoint every so many steps, not only after each epoch."}
    )
    resume_from_checkpoint: bool = field(default=False, metadata={"help": "Continue from the newest checkpoint."})
    use_cpu: bool = field(default=False, metadata={"help": "Train on the CPU."})
    seed: int = field(default=42, metadata={"help": "Random seed."})

    def __post_init__(self):
        check_ranges(self)
        for name in ("num_train_epochs", "checkpointing_steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"--{name} must be at least 1, got {value}.")
        if not 0 <= self.self_loss_weight < 1:
            raise UserError(f"--self_loss_weight must be at least 0 and less than 1, got {self.self_loss_weight}.")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(command, argv, on_stop="Add --resume_from_checkpoint to continue from the newest checkpoint.")


def command(argv: Sequence[str], console: Console):
    """Trains, keeps the model with the best validation accuracy, and prints the metrics of each epoch."""
    model_args, data_args, augmentation, args, _ = parse_arguments(
        argv, (ModelArguments, DataArguments, AugmentationArguments, LoopArguments), defaults={}, description=__doc__
    )
    output_dir = Path(args.output_dir)
    if not args.resume_from_checkpoint:
        check_output_dir(output_dir)
    elif not checkpoints(output_dir):
        raise UserError(
            f"--output_dir {output_dir} holds no checkpoint of this loop: leave --resume_from_checkpoint out to begin."
        )
    accelerator = Accelerator(
        cpu=args.use_cpu,
        mixed_precision=args.mixed_precision,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    set_seed(args.seed)

    # Data: pixels and labels. The sampler spreads each batch over the processes, so this loader is not prepared.
    with accelerator.main_process_first():
        images, _ = load_checked_images(data_args, args.seed)
    if "validation" not in images:
        raise UserError("The best model is chosen on validation images: leave --train_val_split above 0.")
    model, image_processor = load_model(model_args, images["train"].features["label"].names)
    options = {"crop_to_boxes": data_args.crop_to_boxes, "max_pixels": data_args.max_pixels}
    train_set = ImageDataset(images["train"], TrainTransform(image_processor, augmentation), augment=True, **options)
    sampler = ShuffledSampler(
        len(train_set),
        args.per_device_train_batch_size * accelerator.num_processes,
        seed=args.seed,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
    )
    # With a generator of its own, a loader that starts again after a resume draws none of the model's random numbers.
    common = {"num_workers": args.dataloader_num_workers, "generator": torch.Generator()}
    collator = Collator(Mixing(augmentation, model.num_labels) if augmentation.mixes else None)
    train_loader = DataLoader(train_set, batch_sampler=sampler, collate_fn=collator, **common)
    validation_set = ImageDataset(images["validation"], EvalTransform(image_processor), **options)
    validation_loader = accelerator.prepare(
        DataLoader(validation_set, batch_size=args.per_device_eval_batch_size, collate_fn=Collator(), **common)
    )

    # Model and optimizer. The neighborhood is the batch of this process, or of all processes.
    model.rbi.gather_across_processes = args.gather_across_processes
    model.rbi.self_loss_weight = args.self_loss_weight
    optimizer = torch.optim.AdamW(parameter_groups(model, args.learning_rate, args.weight_decay))
    num_steps = args.num_train_epochs * len(sampler)
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, args.warmup_steps, num_steps)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(scheduler)

    progress: dict[str, Any] = {"step": 0, "losses": [], "history": []}
    arguments = resolved_arguments(model_args, data_args, augmentation, args)
    if args.resume_from_checkpoint:
        checkpoint = checkpoints(output_dir)[-1]
        progress = json.loads((checkpoint / PROGRESS_FILE).read_text(encoding="utf-8"))
        if changed := differences(progress["arguments"], arguments):
            raise UserError(f"The run cannot continue with other arguments: {'; '.join(changed)}.")
        accelerator.load_state(str(checkpoint))
    step, losses, history = progress["step"], progress["losses"], progress["history"]

    def diverged(what: str) -> DivergedError:
        return DivergedError(what, checkpoint=next(reversed(checkpoints(output_dir)), None))

    def save():
        if not accelerator.gather(weights_are_finite(model).to(accelerator.device)).all():
            raise diverged(f"the weights after step {step} are not finite")
        state = {"step": step, "losses": losses, "history": history, "arguments": arguments}
        save_checkpoint(accelerator, output_dir, state)

    bar = tqdm(total=num_steps, initial=step, disable=not accelerator.is_local_main_process)
    for epoch in range(step // len(sampler), args.num_train_epochs):
        model.train()
        sampler.set_epoch(epoch)
        for batch in skip_first_batches(train_loader, step % len(sampler)):
            batch = {name: value.to(accelerator.device) for name, value in batch.items()}
            num_targets = accelerator.reduce(count_targets(batch))
            outputs = model(pixel_values=batch["pixel_values"], relation_mask=batch["relation_mask"])
            # The loss is a mean over the images of all processes, and DDP averages the gradients of the processes.
            loss = training_loss(outputs, batch, num_targets, args.self_loss_weight) * accelerator.num_processes
            losses.append(accelerator.reduce(loss.detach(), "mean").item())
            if not math.isfinite(losses[-1]):
                raise diverged(f"the loss of step {step + 1} is {losses[-1]}")
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            step += 1
            bar.update()
            if args.checkpointing_steps and step % args.checkpointing_steps == 0 and step % len(sampler):
                save()

        model.eval()
        logits, labels = [], []
        for batch in validation_loader:
            with torch.no_grad():
                outputs = model(pixel_values=batch["pixel_values"])
            parts = accelerator.gather_for_metrics((outputs.logits.float(), batch["labels"]))
            logits.append(parts[0].cpu())
            labels.append(parts[1].cpu())
        if not all(part.isfinite().all() for part in logits):
            raise diverged(f"logits of validation images after step {step} are not finite")
        metrics = compute_metrics(EvalPrediction(torch.cat(logits).numpy(), torch.cat(labels).numpy()))
        history.append({"epoch": epoch + 1, "train_loss": statistics.mean(losses)} | metrics)
        losses = []
        accelerator.print(json.dumps(history[-1]))
        is_best = metrics["accuracy"] > max((each["accuracy"] for each in history[:-1]), default=-math.inf)
        if is_best and accelerator.is_main_process:
            with filled_whole(output_dir, last="config.json") as draft:
                accelerator.unwrap_model(model).save_pretrained(draft)
                image_processor.save_pretrained(draft)
        save()
    if accelerator.is_main_process:
        write_json(output_dir / "all_results.json", history)
        console.print(f"Best model on the validation images: {output_dir.resolve()}", soft_wrap=True, highlight=False)
    accelerator.end_training()


def save_checkpoint(accelerator: Accelerator, output_dir: Path, progress: dict[str, Any]):
    """
    Saves all that is needed to continue exactly where the run was, whole or not at all, and keeps the newest two.

    (`ProjectConfiguration` writes checkpoints in place, after deleting older ones: a kill would leave a cut one.)
    """
    draft = output_dir / f".checkpoint-{progress['step']}.tmp"
    accelerator.save_state(str(draft))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(draft / PROGRESS_FILE, progress)
        draft.replace(output_dir / f"checkpoint-{progress['step']}")
        for older in checkpoints(output_dir)[:-2]:
            shutil.rmtree(older)
    accelerator.wait_for_everyone()


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of this loop in a folder, in the order of their steps."""
    found = [path.parent for path in output_dir.glob(f"checkpoint-*/{PROGRESS_FILE}")]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


if __name__ == "__main__":
    sys.exit(main())
