# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Checks of `TrainingArguments` before any work is done: what this training lacks, and values out of range."""

import math
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType

from ..cli import ArgumentError
from ..evaluation.metrics import METRIC_TITLES


# Arguments that must keep one of these values, and the reason.
FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "prediction_loss_only": ((False,), "the metrics need the predictions"),
    "eval_do_concat_batches": ((True,), "the metrics need the predictions of all batches together"),
    "eval_use_gather_object": ((False,), "the metrics need the predictions as tensors"),
    "batch_eval_metrics": ((False,), "the metrics are not means over batches"),
    "include_for_metrics": (([],), "the metrics need predictions and labels only"),
    "label_names": ((None, ["labels"]), "the labels of a batch are named `labels`"),
    "auto_find_batch_size": ((False,), "it would change the neighborhood; set the batch size"),
    "train_sampling_strategy": (("random",), "--batch_sampler draws the batches"),
    "length_column_name": (("length",), "images have no length"),
    "include_num_input_tokens_seen": (("no",), "images have no tokens to count"),
    "ignore_data_skip": ((False,), "a resumed run continues with the images that are left of its epoch"),
    "dataloader_in_order": ((True,), "the order of the batches would differ from run to run"),
    "enable_jit_checkpoint": ((False,), "the stopped run would count as finished; set --save_strategy steps"),
    "use_liger_kernel": ((False,), "its kernels are for language models"),
    "liger_kernel_config": ((None,), "its kernels are for language models"),
    "use_cache": ((False,), "it is for the generation of text"),
    "neftune_noise_alpha": ((None,), "it adds noise to the embeddings of words"),
    "torch_empty_cache_steps": ((None,), "it has no effect on the training step of neighborhoods"),
    "bf16_full_eval": ((False,), "it would round the weights before they are saved; set --bf16"),
    "fp16_full_eval": ((False,), "it would round the weights before they are saved; set --fp16"),
    "optim_target_modules": ((None,), "no optimizer of this training chooses modules"),
    "parallelism_config": ((None,), "training is distributed by DDP, FSDP or DeepSpeed"),
    "debug": (([],), "its hooks do not fit the outputs of the model"),
}
# Least and greatest value.
RANGES: dict[str, tuple[float, float]] = {
    "per_device_train_batch_size": (1, math.inf),
    "per_device_eval_batch_size": (1, math.inf),
    "gradient_accumulation_steps": (1, math.inf),
    "dataloader_num_workers": (0, math.inf),
    "learning_rate": (0, math.inf),
    "weight_decay": (0, math.inf),
    "warmup_steps": (0, math.inf),
    "max_grad_norm": (0, math.inf),
    "label_smoothing_factor": (0, 1),
    "seed": (0, 2**32 - 1),
    "data_seed": (0, 2**32 - 1),
}
# These schedules follow the metric of the best model.
SCHEDULES_BY_METRIC = (SchedulerType.REDUCE_ON_PLATEAU.value, SchedulerType.GREEDY.value)
# These optimizers need hooks in the model, or choose its modules.
_OTHER_OPTIMIZERS = ("galore", "apollo", "lomo")
_METRICS = ("loss", *METRIC_TITLES)
_LOWER_IS_BETTER = ("loss", "calibration_error")


def check_training_arguments(args: TrainingArguments, has_own_optimizer: bool = False):
    r"""
    Checks the arguments, and sets `greater_is_better` as the metric has it.

    Args:
        args (`TrainingArguments`):
            The arguments.
        has_own_optimizer (`bool`, *optional*, defaults to `False`):
            Whether another argument chooses the optimizer, so that `optim` has no effect.

    Raises:
        ArgumentError: if the training cannot use one of them.
    """
    for name, (values, reason) in FIXED.items():
        if (value := getattr(args, name, values[0])) not in values:
            raise ArgumentError(f"--{name} {value} cannot be used in this training, since {reason}: leave it out.")
    check_ranges(args)
    if args.max_steps == 0 or (args.max_steps < 0 and args.num_train_epochs <= 0):
        raise ArgumentError("--num_train_epochs or --max_steps must be above 0.")
    for name in ("dataloader_persistent_workers", "dataloader_multiprocessing_context"):
        if getattr(args, name) and args.dataloader_num_workers == 0:
            raise ArgumentError(f"--{name} needs --dataloader_num_workers above 0.")
    _check_metric(args)
    _check_reports(args)
    _check_compilation(args)
    if not args.deepspeed:  # its config may have an optimizer and a schedule
        _check_optimization(args, has_own_optimizer)


def check_ranges(args: Any):
    r"""
    Checks the arguments of [`RANGES`] that a dataclass has.

    Raises:
        ArgumentError: if one is out of range.
    """
    for name, (least, most) in RANGES.items():
        value = getattr(args, name, None)
        if value is not None and not least <= value <= most:
            limits = f"at least {least}" if most == math.inf else f"between {least} and {most}"
            raise ArgumentError(f"--{name} must be {limits}, got {value}.")


def _check_metric(args: TrainingArguments):
    if args.eval_strategy == IntervalStrategy.NO:
        if args.save_strategy == SaveStrategy.BEST:
            raise ArgumentError("--save_strategy best needs evaluations: set --eval_strategy epoch.")
        return
    if args.metric_for_best_model is None:
        return
    name = args.metric_for_best_model.removeprefix("eval_")
    if name not in _METRICS:
        raise ArgumentError(
            f"--metric_for_best_model {args.metric_for_best_model} is not a metric of this training: name one of "
            f"{', '.join(_METRICS)}."
        )
    is_lower_better = name in _LOWER_IS_BETTER
    if name == "calibration_error":  # `TrainingArguments` knows that of the loss only
        args.greater_is_better = False
    if args.greater_is_better == is_lower_better:
        raise ArgumentError(
            f"--greater_is_better {args.greater_is_better} would keep the worst model by {name}: leave it out."
        )


def _check_reports(args: TrainingArguments):
    for name in args.report_to:
        try:
            for callback in get_reporting_integration_callbacks([name]):
                callback()
        except (ImportError, RuntimeError, ValueError) as error:
            raise ArgumentError(f"--report_to {name}: {error}") from error


def _check_compilation(args: TrainingArguments):
    if args.torch_compile_backend is not None:
        known = [backend.value.lower() for backend in DynamoBackend]
        if args.torch_compile_backend.lower() not in known:
            raise ArgumentError(
                f"--torch_compile_backend {args.torch_compile_backend} is none of {', '.join(sorted(known))}."
            )
    if args.torch_compile_mode is not None:
        modes = torch._inductor.list_mode_options()
        if args.torch_compile_mode not in modes:
            raise ArgumentError(f"--torch_compile_mode {args.torch_compile_mode} is none of {', '.join(modes)}.")


def _check_optimization(args: TrainingArguments, has_own_optimizer: bool):
    """Builds the optimizer and the schedule for one made-up weight."""
    weight = nn.Parameter(torch.zeros(1))
    optimizer: torch.optim.Optimizer = torch.optim.SGD([weight], lr=args.learning_rate)
    if not has_own_optimizer:
        if any(name in args.optim for name in _OTHER_OPTIMIZERS):
            raise ArgumentError(f"--optim {args.optim.value} cannot be used in this training: name another optimizer.")
        try:
            optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
            optimizer = optimizer_class([weight], **kwargs)
        except Exception as error:  # of each optimizer its own
            raise ArgumentError(f"--optim {args.optim.value}: {error}") from error
    if not isinstance(args.lr_scheduler_kwargs, dict | None):
        raise ArgumentError(f"--lr_scheduler_kwargs must be a JSON object, got {args.lr_scheduler_kwargs}.")
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, 1, 2, args.lr_scheduler_kwargs)
    except Exception as error:  # of each schedule its own
        raise ArgumentError(
            f"--lr_scheduler_type {SchedulerType(args.lr_scheduler_type).value}: {error}. Set the "
            "--lr_scheduler_kwargs that it needs."
        ) from error


__all__ = ["FIXED", "RANGES", "SCHEDULES_BY_METRIC", "check_ranges", "check_training_arguments"]
