# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""`Trainer` of transformers for RBI.

A plain `Trainer` can train an RBI model, too. [`RBITrainer`] adds batches as neighborhoods (equal sizes, the same on
any number of processes), neighborhoods larger or smaller than the batch of a device, mixed images, learning rates by
depth, class weights, and a moving average of the weights.
"""

import contextlib
import copy
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from sklearn.utils.class_weight import compute_class_weight
from torch import nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import CONFIG_NAME

from modeling_rbi import RBIImageClassifierOutput, UserError
from modeling_rbi.errors_rbi import listed

from ..data.image_dataset import Collator, ImageDataset, WithUnlabeled
from ..data.samplers import BalancedSampler, NeighborhoodSampler, ShuffledSampler
from ..files import strict, write_json
from .arguments import FineTuningArguments
from .divergence import DivergedError, weights_are_finite
from .loss import backward_in_two_passes, count_targets, training_loss
from .optimization import OPTIMIZERS, MovingAverage, parameter_groups, rbi_model


logger = logging.getLogger(__name__)

_OPTIMIZER = "the state of the optimizer"
# Parts of a checkpoint, and their files with DDP, FSDP or DeepSpeed.
_PARTS = {
    "the weights": ("model*.safetensors", "adapter_model.safetensors", "pytorch_model*", "global_step*"),
    _OPTIMIZER: ("optimizer.*", "optimizer_*", "global_step*"),
}
MOVING_AVERAGE_FILE = "moving_average.safetensors"
RUNNING_LOSS_FILE = "running_loss.json"


def plan_neighborhoods(args: TrainingArguments, fine_tuning: FineTuningArguments) -> tuple[int, int | None]:
    r"""
    How neighborhoods are made of batches.

    Returns:
        The number of batches of a device in one neighborhood; and the size of the neighborhoods that the batch of a
        device is split into (`None`: it is not split).

    Raises:
        UserError: if neighborhood, batch and gradient accumulation do not fit each other.
    """
    size, gather = fine_tuning.relation_batch_size, fine_tuning.gather_across_processes
    batch_size = args.per_device_train_batch_size
    unit = batch_size * args.world_size if gather else batch_size
    if size is None or size == unit:
        return 1, None
    whose = f"all {args.world_size} processes" if gather else "a device"
    if size < unit:
        if gather:
            raise UserError(
                f"--relation_batch_size {size} is smaller than the batches of {whose} together ({unit}): leave "
                "--gather_across_processes out."
            )
        return 1, size
    if size % unit or args.gradient_accumulation_steps % (size // unit):
        raise UserError(
            f"--relation_batch_size {size} must be a multiple of the batch of {whose} ({unit}), and that multiple "
            f"a divisor of --gradient_accumulation_steps ({args.gradient_accumulation_steps}): a neighborhood "
            "consists of whole batches of one optimizer step."
        )
    return size // unit, None


class RBITrainer(Trainer):
    r"""
    `Trainer` in which each batch is a neighborhood.

    Args:
        model (`RBIForImageClassification` or a `PeftModel` of one):
            The model.
        args (`TrainingArguments`):
            As for `Trainer`. Without `dataloader_drop_last`, the images of an epoch are spread over batches whose
            sizes differ by at most one, so that no neighborhood is much smaller than the others.
        fine_tuning (`FineTuningArguments`, *optional*):
            Options that `TrainingArguments` does not have.
        train_dataset (`ImageDataset` or `WithUnlabeled`):
            Training images.
        data_collator (`Collator`, *optional*):
            Collator of training batches, with its `mixing` for mixup and cutmix. Evaluation has a plain one.
        kwargs:
            As for `Trainer`.

    Raises:
        UserError: if the batch sizes do not fit each other, or an option cannot be used with FSDP or DeepSpeed.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        fine_tuning: FineTuningArguments | None = None,
        train_dataset: ImageDataset | WithUnlabeled | None = None,
        data_collator: Collator | None = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ):
        self.fine_tuning = fine_tuning or FineTuningArguments()
        self.self_loss_weight = self.fine_tuning.self_loss_weight
        base = rbi_model(model).rbi
        base.gather_across_processes = self.fine_tuning.gather_across_processes
        base.self_loss_weight = self.self_loss_weight
        self.num_micro_batches, self.split_size = plan_neighborhoods(args, self.fine_tuning)
        args = copy.copy(args)
        # One batch of the loader is a neighborhood, which already accumulates this many batches.
        args.gradient_accumulation_steps //= self.num_micro_batches
        # For training only: `Trainer` would also drop the last images of validation and test.
        self._drops_last, args.dataloader_drop_last = args.dataloader_drop_last, False
        # A loss that is not finite stops the training, so none is left out of the mean that is logged.
        args.logging_nan_inf_filter = False
        # A resumed training is as one that was never stopped: early stopping goes on counting.
        args.restore_callback_states_from_checkpoint = True
        if args.auto_find_batch_size:
            raise UserError("--auto_find_batch_size would change the neighborhood: set the batch size.")
        if args.n_gpu > 1:
            args._n_gpu = 1  # DataParallel would split the neighborhood
            logger.warning("Training on one of several GPUs: `accelerate launch -m training.train` uses all of them.")
        self.class_weights = None
        if self.fine_tuning.class_weights == "balanced" and train_dataset is not None:
            self.class_weights = balanced_class_weights(train_dataset.labels, rbi_model(model).num_labels)
        self.optimizer: Any = None
        self._moving_average: MovingAverage | None = None
        self._resumed_from: Path | None = None
        self._train_sampler: NeighborhoodSampler | None = None
        self._train_collator = data_collator or Collator()
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            data_collator=Collator(),  # for the evaluation, whose images are not mixed
            callbacks=[*(callbacks or []), _RBICallback(self)],
            **kwargs,
        )
        # The training loss applies label smoothing; the validation loss has none.
        self.label_smoother = None
        self._refuse_what_cannot_be_sharded()

    def _refuse_what_cannot_be_sharded(self):
        if self.accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            return
        options = {
            "--relation_batch_size larger than a batch": self.num_micro_batches > 1,
            "--ema_decay": self.fine_tuning.ema_decay is not None,
            "--references_per_class": self.fine_tuning.references_per_class is not None,
            "--num_references": self.fine_tuning.num_references is not None,
        }
        if chosen := [name for name, is_on in options.items() if is_on]:
            raise UserError(
                f"{' and '.join(chosen)} cannot be used with {self.accelerator.distributed_type.value}, which shards "
                "the weights: leave it out, or train with DDP (training/accelerate/multi_gpu.yaml)."
            )

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """The batches of this process, each its share of a neighborhood. The sampler shards them, not Accelerate."""
        if self.train_dataset is None:
            raise UserError("Training needs a `train_dataset`.")
        args = self.args
        common = {"batch_size": self._global_batch_size()} | self._process_options()
        if isinstance(self.train_dataset, WithUnlabeled):
            common |= {
                "num_unlabeled": len(self.train_dataset.unlabeled),
                "unlabeled_per_batch": self._num_unlabeled_per_batch(),
            }
        if self.fine_tuning.batch_sampler == "balanced":
            self._train_sampler = BalancedSampler(
                self.train_dataset.labels, images_per_class=self.fine_tuning.images_per_class, **common
            )
        else:
            self._train_sampler = ShuffledSampler(len(self.train_dataset.labels), drop_last=self._drops_last, **common)
        return torch.utils.data.DataLoader(
            self.train_dataset,
            batch_sampler=self._train_sampler,
            collate_fn=self._train_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
            persistent_workers=args.dataloader_persistent_workers,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def _global_batch_size(self) -> int:
        return self.args.per_device_train_batch_size * self.num_micro_batches * self.args.world_size

    def _num_unlabeled_per_batch(self) -> int:
        has_unlabeled = isinstance(self.train_dataset, WithUnlabeled)
        return self.fine_tuning.unlabeled_per_batch * self.args.world_size if has_unlabeled else 0

    def num_examples(self, dataloader: torch.utils.data.DataLoader) -> int:
        """As `Trainer.num_examples`, counting labeled images only: an epoch draws only some of the unlabeled ones."""
        sampler = dataloader.batch_sampler
        return sampler.num_rows if isinstance(sampler, NeighborhoodSampler) else super().num_examples(dataloader)

    def _process_options(self) -> dict[str, Any]:
        return {
            "seed": self.args.seed if self.args.data_seed is None else self.args.data_seed,
            "num_processes": self.args.world_size,
            "process_index": self.args.process_index,
        }

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As `Trainer.create_optimizer`, with separate learning rates for the head and each depth of the backbone."""
        if self.optimizer is None:
            args, options = self.args, self.fine_tuning
            groups = parameter_groups(
                self.model if model is None else model,
                args.learning_rate,
                args.weight_decay,
                options.head_learning_rate,
                options.layer_decay,
            )
            if options.optimizer is not None:
                optimizer_class, kwargs = OPTIMIZERS[options.optimizer]
                if options.optimizer == "radam":
                    kwargs = kwargs | {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
            else:
                try:
                    optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(args, self.model)
                except (ImportError, ValueError) as error:  # --optim needs a package that is not installed
                    raise UserError(str(error)) from error
            self.optimizer = optimizer_class(groups, **{"lr": args.learning_rate} | kwargs)
        return self.optimizer

    def get_batch_samples(self, *args, **kwargs) -> tuple[list, torch.Tensor]:
        """As `Trainer.get_batch_samples`, with the number of targets of all processes, weighted by class."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        counts = [count_targets(batch, self.class_weights) for batch in batches]
        count = torch.stack(counts).sum() if counts else torch.zeros(())
        return batches, self.accelerator.gather(count.to(self.args.device)).sum()

    def training_step(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Forward and backward of one neighborhood, in two passes if it is larger than the batch of a device."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        inputs = self._prepare_inputs(inputs)
        num_items = count_targets(inputs, self.class_weights) if num_items_in_batch is None else num_items_in_batch

        def loss_of(outputs: RBIImageClassifierOutput) -> torch.Tensor:
            options = (self.self_loss_weight, self.class_weights, self.args.label_smoothing_factor)
            # DDP and FSDP average the gradients over the processes, and num_items counts the targets of all processes.
            return training_loss(outputs, inputs, num_items, *options) * self.accelerator.num_processes

        if self.num_micro_batches > 1:
            return self._training_step_in_two_passes(model, inputs, loss_of)
        with self.compute_loss_context_manager():
            outputs = model(
                pixel_values=inputs["pixel_values"],
                relation_mask=inputs["relation_mask"],
                relation_scope=self.fine_tuning.train_relation_scope,
                relation_batch_size=self.split_size,
            )
            loss = loss_of(outputs)
        kwargs = {}
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            kwargs["scale_wrt_gas"] = False  # num_items covers all accumulated batches
        self.accelerator.backward(loss, **kwargs)
        return loss.detach()

    def _training_step_in_two_passes(self, model: nn.Module, inputs: dict[str, torch.Tensor], loss_of) -> torch.Tensor:
        no_sync: Callable = getattr(model, "no_sync", contextlib.nullcontext)
        with no_sync(), self.accelerator.autocast():
            loss = backward_in_two_passes(
                rbi_model(self.accelerator.unwrap_model(model, keep_torch_compile=False)),
                inputs["pixel_values"],
                inputs["relation_mask"],
                self.args.per_device_train_batch_size,
                loss_of,
                self.accelerator.backward,
            )
        # The two passes bypass the wrapper of DDP, which would average the gradients.
        if self.accelerator.sync_gradients and self.accelerator.num_processes > 1:
            gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            torch.distributed.all_reduce(flat)
            flat /= self.accelerator.num_processes
            for gradient, mean in zip(gradients, flat.split([each.numel() for each in gradients]), strict=True):
                gradient.copy_(mean.view_as(gradient))
        return loss

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        r"""
        As `Trainer.train`, which after a resume goes on as if it had not been stopped.

        Raises:
            UserError: if there is no complete checkpoint to resume from, or the best one is gone.
            DivergedError: if the loss or weights are not finite.
        """
        if resume_from_checkpoint is True:
            self._resumed_from = last_complete_checkpoint(Path(self.args.output_dir))
            if self._resumed_from is None:
                raise UserError(f"{self.args.output_dir} holds no complete checkpoint to resume from.")
        else:
            self._resumed_from = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        if self._resumed_from is not None:
            self.args.eval_on_start = False  # it was done when the training was started
            self._best_checkpoint()
        checkpoint = None if self._resumed_from is None else str(self._resumed_from)
        return super().train(resume_from_checkpoint=checkpoint, **kwargs)

    def set_initial_training_values(self, args: TrainingArguments, dataloader: torch.utils.data.DataLoader) -> tuple:
        """As `Trainer.set_initial_training_values`, without further epochs after an early stop."""
        num_epochs, *others = super().set_initial_training_values(args, dataloader)
        if self._resumed_from is not None and _has_stopped_early(_read_state(self._resumed_from)):
            num_epochs = 0
        return num_epochs, *others

    def _best_checkpoint(self) -> str | None:
        """The best checkpoint of the training that is resumed, to load at its end. Its folder may have been moved."""
        name = None if self._resumed_from is None else _read_state(self._resumed_from).best_model_checkpoint
        if name is None or not self.args.load_best_model_at_end:
            return None
        best = Path(name)
        moved = Path(self.args.output_dir) / best.name
        if not (moved.is_dir() or best.is_dir()):
            raise UserError(
                f"{best.name}, the best checkpoint so far, is missing in {moved.parent}: restore it, or start "
                "again in another --output_dir."
            )
        return str(moved if moved.is_dir() else best)

    def log(self, logs: dict[str, float], start_time: float | None = None):
        """As `Trainer.log`, without numbers that are not finite, as fp16's gradients in a step that is skipped."""
        super().log({name: value for name, value in logs.items() if strict(value) is not None}, start_time)

    def evaluation_loop(
        self,
        dataloader: torch.utils.data.DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """
        As `Trainer.evaluation_loop`, with the moving average of the weights if there is one. The loss counts each
        image once, whereas `Trainer` counts the images twice that fill up the last batch on several processes.

        Raises:
            DivergedError: if the loss is not finite, so that such a model never is the best one.
        """
        self.average_batch_statistics()
        average: contextlib.AbstractContextManager = contextlib.nullcontext()
        if self._moving_average is not None:
            average = self._moving_average.swapped_in(self.model)
        with average:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        if output.predictions is not None and output.label_ids is not None:
            scores = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
            loss = nn.functional.cross_entropy(torch.tensor(scores).float(), torch.tensor(output.label_ids))
            output.metrics[f"{metric_key_prefix}_loss"] = loss.item()
            if not loss.isfinite():
                step = self.state.global_step
                raise self.diverged(f"{metric_key_prefix}_loss of the evaluation after step {step} is {loss.item()}")
        return output

    def evaluate_shuffled(self, images: ImageDataset, metric_key_prefix: str = "eval") -> dict[str, float]:
        r"""
        Metrics of all images in random batches of the training's neighborhood size, including its unlabeled images,
        for any number of processes and any configured scope.

        Args:
            images (`ImageDataset`):
                The images.
            metric_key_prefix (`str`, *optional*, defaults to `"eval"`):
                Prefix of the names of the metrics.
        """
        size = self._global_batch_size() + self._num_unlabeled_per_batch()
        if self.split_size is not None:
            size = self.split_size * self.args.world_size
        sampler = ShuffledSampler(len(images), size, **self._process_options())
        loader = torch.utils.data.DataLoader(
            images, batch_sampler=sampler, collate_fn=Collator(), num_workers=self.args.dataloader_num_workers
        )
        config = rbi_model(self.accelerator.unwrap_model(self.model)).config
        scope, config.relation_scope = config.relation_scope, "batch"
        try:
            output = self.evaluation_loop(loader, "Evaluation in batches", metric_key_prefix=metric_key_prefix)
        finally:
            config.relation_scope = scope
        return output.metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """
        As `Trainer.save_model`.

        Raises:
            DivergedError: if weights are not finite; nothing is saved, and no earlier checkpoint is deleted.
        """
        self.average_batch_statistics()
        self.check_weights()
        super().save_model(output_dir, _internal_call)

    def check_weights(self):
        """Raises a `DivergedError` on all processes if weights on one of them are not finite."""
        is_finite = weights_are_finite(self.model).to(self.args.device)
        if not self.accelerator.gather(is_finite).all():
            raise self.diverged(f"the weights after step {self.state.global_step} are not finite")

    def diverged(self, what: str) -> DivergedError:
        """The error for numbers that are not finite, which names the last checkpoint before the present weights."""
        before = last_complete_checkpoint(Path(self.args.output_dir), self.state.global_step - 1)
        return DivergedError(what, checkpoint=before)

    def average_batch_statistics(self):
        """Averages the running statistics of batch normalization over the processes, which have seen other batches."""
        if self.accelerator.num_processes == 1:
            return
        for module in self.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                for statistic in (module.running_mean, module.running_var):
                    torch.distributed.all_reduce(statistic)
                    statistic /= self.accelerator.num_processes

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None):
        super()._save(output_dir, state_dict)
        # The mean over the processes, as in the logs.
        running_loss = self.accelerator.gather(self._tr_loss).mean().item() if self.is_in_train else None
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        # A pickle of the arguments, which the record has, too. Pickles can run code, so none is passed on.
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        if self._moving_average is not None:  # only in training, so this is a checkpoint
            save_file(self._moving_average.state_dict(), folder / MOVING_AVERAGE_FILE)
        if running_loss is not None:
            loss = {"sum": running_loss, "last_logged": self._globalstep_last_logged}
            write_json(folder / RUNNING_LOSS_FILE, loss)


class _RBICallback(TrainerCallback):
    """Tells the sampler the epoch, and restores what a checkpoint holds besides the state of `Trainer`."""

    def __init__(self, trainer: RBITrainer):
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        trainer, checkpoint = self.trainer, self.trainer._resumed_from
        state.best_model_checkpoint = trainer._best_checkpoint() or state.best_model_checkpoint
        if trainer.fine_tuning.ema_decay is not None:
            trainer._moving_average = MovingAverage(trainer.model, trainer.fine_tuning.ema_decay)
            if checkpoint is not None:
                kept = load_file(checkpoint / MOVING_AVERAGE_FILE, device=str(args.device))
                trainer._moving_average.load_state_dict(kept)
        if checkpoint is not None and (checkpoint / RUNNING_LOSS_FILE).exists():
            # `Trainer` would start the mean that it logs next from 0.
            loss = json.loads((checkpoint / RUNNING_LOSS_FILE).read_text(encoding="utf-8"))
            trainer._tr_loss += loss["sum"]
            trainer._globalstep_last_logged = loss["last_logged"]

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if self.trainer._train_sampler is not None:
            self.trainer._train_sampler.set_epoch(int(state.epoch or 0))

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """Stops all processes before a loss of one of them that is not finite changes the weights."""
        losses = self.trainer.accelerator.gather(self.trainer._tr_loss)
        if not losses.isfinite().all():
            raise self.trainer.diverged(f"the loss of step {state.global_step + 1} is not finite")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if self.trainer._moving_average is not None and not self.trainer.accelerator.optimizer_step_was_skipped:
            self.trainer._moving_average.update(self.trainer.model)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        average = self.trainer._moving_average
        if average is None:
            return
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            average.load_state_dict(
                load_file(Path(state.best_model_checkpoint) / MOVING_AVERAGE_FILE, device=str(args.device))
            )
        average.swap(self.trainer.model)
        self.trainer._moving_average = None


def balanced_class_weights(labels: list[int], num_labels: int) -> torch.Tensor:
    r"""
    Weight of each class in the loss: the inverse of its number of images, scaled to a mean of 1 over all images.

    Args:
        labels (`list[int]`):
            Class of each training image.
        num_labels (`int`):
            Number of classes. A class without images has the weight 1.

    Returns:
        `torch.FloatTensor` of shape `(num_labels,)`.
    """
    present, weights = np.unique(labels), torch.ones(num_labels)
    weights[present] = torch.from_numpy(compute_class_weight("balanced", classes=present, y=labels)).float()
    return weights


def last_complete_checkpoint(output_dir: Path, last_step: float = math.inf) -> Path | None:
    """The newest complete checkpoint of a run up to a step. A kill or a full disk can leave incomplete ones."""
    checkpoints = (path for path in _checkpoints(output_dir) if _step_of(path) <= last_step)
    return next(filter(is_complete_checkpoint, checkpoints), None)


def _checkpoints(output_dir: Path) -> list[Path]:
    """All checkpoints of a run, the newest first."""
    folders = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(folders, key=_step_of, reverse=True)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def checkpoint_to_resume(output_dir: Path) -> Path | None:
    r"""
    The newest complete checkpoint of a run that was stopped; `None` if it was stopped before its first one.

    Raises:
        UserError: if its checkpoints hold models only, as with `--save_only_model`.
    """
    if (checkpoint := last_complete_checkpoint(output_dir)) is not None:
        return checkpoint
    checkpoints = _checkpoints(output_dir)
    if models := [path for path in checkpoints if missing_parts(path) == [_OPTIMIZER]]:
        is_plain = (models[0] / CONFIG_NAME).exists()  # not an adapter
        further = f"train the model further with --model_name_or_path {models[0]} and another --output_dir, or "
        raise UserError(
            f"The run in {output_dir} cannot be continued: its checkpoints ({listed(path.name for path in models)}) "
            f"hold the model without {_OPTIMIZER}, as with --save_only_model. To go on, {further if is_plain else ''}"
            f"delete {output_dir} to start again."
        )
    cut_off = f" (incomplete: {listed(path.name for path in checkpoints)})" if checkpoints else ""
    logger.warning(f"The run in {output_dir} was stopped before its first checkpoint{cut_off}: it starts again.")
    return None


def is_complete_checkpoint(checkpoint: Path) -> bool:
    """Whether a training can be resumed from a checkpoint."""
    return not missing_parts(checkpoint)


def missing_parts(checkpoint: Path) -> list[str]:
    """What a checkpoint lacks to resume from it."""
    parts = [name for name, patterns in _PARTS.items() if not any(any(checkpoint.glob(each)) for each in patterns)]
    try:  # `Trainer` writes its state last
        _read_state(checkpoint)
    except (OSError, ValueError, TypeError):
        parts.append(f"a whole {TRAINER_STATE_NAME}")
    return parts


def _read_state(checkpoint: Path) -> TrainerState:
    return TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))


def _has_stopped_early(state: TrainerState) -> bool:
    """Whether early stopping had ended the training when this state was saved."""
    kept: Any = (state.stateful_callbacks or {}).get(EarlyStoppingCallback.__name__, [])  # type: ignore[attr-defined]
    return any(
        each["attributes"]["early_stopping_patience_counter"] >= each["args"]["early_stopping_patience"]
        for each in (kept if isinstance(kept, list) else [kept])
    )
