"""All arguments of `TrainingArguments`, one by one: this training can use another value, or refuses it before work."""

import json
from dataclasses import fields

import pytest
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from modeling_rbi import UserError
from training import train
from training.cli import ArgumentError
from training.fine_tuning.arguments import Arguments
from training.fine_tuning.training_arguments import FIXED, RANGES, check_training_arguments


STEPS = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}
NO_CHOICE = {"load_best_model_at_end": False}
# Another value of each argument that the training can use, with the arguments that this value needs.
ACCEPTED = {
    "per_device_train_batch_size": 5,
    "num_train_epochs": 1.5,
    "max_steps": 3,
    "learning_rate": 0.1,
    "lr_scheduler_type": "cosine",
    "lr_scheduler_kwargs": ('{"num_cycles": 2}', {"lr_scheduler_type": "cosine"}),
    "warmup_steps": 0.1,
    "optim": "sgd",
    "optim_args": "a=b",
    "weight_decay": 0.1,
    "adam_beta1": 0.8,
    "adam_beta2": 0.99,
    "adam_epsilon": 1e-6,
    "gradient_accumulation_steps": 2,
    "average_tokens_across_devices": False,
    "max_grad_norm": 0.0,
    "label_smoothing_factor": 0.1,
    "bf16": True,
    "fp16": True,
    "tf32": False,
    "activation_checkpointing": True,
    "activation_checkpointing_kwargs": '{"use_reentrant": false}',
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": '{"use_reentrant": false}',
    "torch_compile": True,
    "torch_compile_backend": "aot_eager",
    "torch_compile_mode": "reduce-overhead",
    "logging_strategy": "steps",
    "logging_steps": 2,
    "logging_first_step": True,
    "log_on_each_node": False,
    "logging_nan_inf_filter": False,
    "log_level": "error",
    "log_level_replica": "error",
    "disable_tqdm": False,
    "report_to": "none",
    "run_name": "name",
    "project": "name",
    "trackio_space_id": "user/name",
    "trackio_bucket_id": "user/name",
    "trackio_static_space_id": "user/name",
    "eval_strategy": ("steps", STEPS),
    "eval_steps": (2, STEPS),
    "eval_delay": 1,
    "per_device_eval_batch_size": 3,
    "eval_on_start": True,
    "eval_accumulation_steps": 1,
    "save_only_model": True,
    "save_strategy": "best",
    "save_steps": (4, STEPS),
    "save_on_each_node": True,
    "save_total_limit": 1,
    "push_to_hub": True,
    "hub_token": "hf_secret",
    "hub_private_repo": True,
    "hub_model_id": "user/name",
    "hub_strategy": "checkpoint",
    "hub_always_push": True,
    "hub_revision": "branch",
    "load_best_model_at_end": False,
    "metric_for_best_model": "macro_f1",
    "greater_is_better": True,
    "restore_callback_states_from_checkpoint": True,
    "full_determinism": True,
    "seed": 3,
    "data_seed": 3,
    "use_cpu": True,
    "accelerator_config": '{"even_batches": false}',
    "dataloader_drop_last": True,
    "dataloader_num_workers": 2,
    "dataloader_pin_memory": False,
    "dataloader_persistent_workers": (True, {"dataloader_num_workers": 2}),
    "dataloader_prefetch_factor": (3, {"dataloader_num_workers": 2}),
    "dataloader_multiprocessing_context": ("fork", {"dataloader_num_workers": 1}),
    "remove_unused_columns": True,
    "ddp_find_unused_parameters": True,
    "ddp_bucket_cap_mb": 10,
    "ddp_broadcast_buffers": False,
    "ddp_static_graph": True,
    "ddp_timeout": 100,
    "fsdp_config": '{"fsdp_version": 2}',
    "skip_memory_metrics": False,
    "do_train": True,
    "do_eval": True,
    "do_predict": True,
    "resume_from_checkpoint": "last",
    "local_rank": 0,
}
# Need what a machine may lack, or processes: accelerate and transformers check them.
OF_THE_MACHINE = {"ddp_backend", "fsdp", "deepspeed"}
# Another value of each argument that this training refuses, and a part of the reason.
REFUSED = {
    "prediction_loss_only": (True, "need the predictions"),
    "eval_do_concat_batches": (False, "predictions of all batches together"),
    "eval_use_gather_object": (True, "predictions as tensors"),
    "batch_eval_metrics": (True, "not means over batches"),
    "include_for_metrics": ("inputs", "predictions and labels only"),
    "label_names": ("targets", "named `labels`"),
    "auto_find_batch_size": (True, "set the batch size"),
    "train_sampling_strategy": ("sequential", "--batch_sampler"),
    "length_column_name": ("size", "images have no length"),
    "include_num_input_tokens_seen": (True, "no tokens"),
    "ignore_data_skip": (True, "images that are left"),
    "dataloader_in_order": (False, "differ from run to run"),
    "enable_jit_checkpoint": (True, "count as finished"),
    "use_liger_kernel": (True, "language models"),
    "liger_kernel_config": (None, ""),  # cannot be given on a command line
    "use_cache": (True, "generation of text"),
    "neftune_noise_alpha": (5.0, "embeddings of words"),
    "torch_empty_cache_steps": (1, "no effect"),
    "bf16_full_eval": (True, "set --bf16"),
    "fp16_full_eval": (True, "set --fp16"),
    "optim_target_modules": ("all-linear", "chooses modules"),
    "parallelism_config": (None, ""),
    "debug": ("underflow_overflow", "do not fit the outputs"),
}


def test_no_argument_is_left_out():
    """A new version of transformers may bring arguments, which must be looked at."""
    names = {field.name for field in fields(TrainingArguments) if field.init}
    assert names <= {"output_dir"} | ACCEPTED.keys() | REFUSED.keys() | OF_THE_MACHINE
    assert FIXED.keys() == REFUSED.keys() and not ACCEPTED.keys() & REFUSED.keys()


def has(name):
    return name in TrainingArguments.__dataclass_fields__  # older versions of transformers lack some


def with_needs(name):
    value = ACCEPTED[name]
    value, needs = value if isinstance(value, tuple) else (value, {})
    return needs | {name: value}


@pytest.mark.parametrize("name", [name for name in ACCEPTED if has(name)])
def test_what_the_training_can_use(arguments, tmp_path, name):
    args = Arguments.parse(arguments(tmp_path / "out", **with_needs(name)))
    default = Arguments.parse(arguments(tmp_path / "out"))
    # Values that these tests, or the others, set anyway.
    if name not in {"use_cpu", "report_to", "greater_is_better", "do_eval", "dataloader_pin_memory"}:
        assert getattr(args.training, name) != getattr(default.training, name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "eval_delay",
        "eval_on_start",
        "eval_accumulation_steps",
        "save_strategy",
        "save_only_model",
        "remove_unused_columns",
        "metric_for_best_model",
        "dataloader_multiprocessing_context",
        "accelerator_config",
        "skip_memory_metrics",
        "logging_first_step",
        "do_predict",
    ],
)
def test_and_does_use(arguments, tmp_path, name):
    assert train.main(arguments(tmp_path / "out", num_train_epochs=1, **with_needs(name))) == 0
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["status"] == "finished" and record["results"]["validation"]["accuracy"] is not None


@pytest.mark.parametrize("name", [name for name, (value, _) in REFUSED.items() if value is not None and has(name)])
def test_what_it_cannot_use_is_refused_before_work(arguments, tmp_path, capsys, name):
    value, reason = REFUSED[name]
    assert train.main(arguments(tmp_path / "out", **{name: value})) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --{name} ") and reason in error and "leave it out" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [name for name in FIXED if has(name)])
def test_fixed_values_are_the_defaults(name):
    assert getattr(TrainingArguments("out", use_cpu=True), name) in FIXED[name][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"metric_for_best_model": "f1"},
            "--metric_for_best_model f1 is not a metric.*top5_accuracy, macro_f1",
        ),
        ({"metric_for_best_model": "eval_runtime"}, "is not a metric of this training: name one of loss, accuracy"),
        ({"metric_for_best_model": "Accuracy"}, "is not a metric"),
        ({"greater_is_better": False}, "--greater_is_better False would keep the worst model by accuracy"),
        ({"metric_for_best_model": "loss", "greater_is_better": True}, "would keep the worst model by loss"),
        ({"save_strategy": "best", "eval_strategy": "no"}, "--save_strategy best needs evaluations: set --eval_str"),
        ({"report_to": "nonsense"}, "--report_to nonsense: nonsense is not supported, only"),
        ({"report_to": "flyte"}, "--report_to flyte: .* requires"),
        ({"torch_compile_backend": "nonsense"}, "--torch_compile_backend nonsense is none of .*inductor"),
        ({"torch_compile_mode": "nonsense"}, "--torch_compile_mode nonsense is none of .*max-autotune"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "--lr_scheduler_type cosine_with_min_lr: .*min_lr.* Set"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "num_decay_steps.*--lr_scheduler_kwargs"),
        ({"lr_scheduler_kwargs": '{"x": 1}'}, "--lr_scheduler_type linear: .*'x'"),
        ({"lr_scheduler_kwargs": "x"}, "--lr_scheduler_kwargs must be a JSON object, got x"),
        ({"optim": "lomo"}, "--optim lomo cannot be used in this training"),
        ({"optim": "galore_adamw", "optim_args": "rank=3"}, "--optim galore_adamw cannot be used"),
        ({"optim_args": "a"}, "--optim adamw_torch_fused: .*expected 2"),
        ({"adam_beta1": 1.5}, "--optim adamw_torch_fused: Invalid beta parameter"),
        ({"adam_epsilon": -1}, "Invalid epsilon"),
        ({"num_train_epochs": 0}, "--num_train_epochs or --max_steps must be above 0"),
        ({"num_train_epochs": -1}, "must be above 0"),
        ({"max_steps": 0}, "must be above 0"),
        ({"dataloader_persistent_workers": True}, "--dataloader_persistent_workers needs --dataloader_num_workers"),
        ({"dataloader_multiprocessing_context": "spawn"}, "context needs --dataloader_num_workers above 0"),
        ({"accelerator_config": '{"split_batch": true}'}, "unexpected keyword argument 'split_batch'"),
        ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps must be at least 1, got 0"),
        ({"per_device_eval_batch_size": 0}, "--per_device_eval_batch_size must be at least 1, got 0"),
        ({"label_smoothing_factor": 1.5}, "--label_smoothing_factor must be between 0 and 1, got 1.5"),
        ({"data_seed": -3}, "--data_seed must be between 0 and 4294967295, got -3"),
    ],
)
def test_values_that_mean_nothing_are_refused_before_work(arguments, tmp_path, capsys, options, message):
    assert train.main(arguments(tmp_path / "out", **options)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    with pytest.raises(UserError, match=message):
        Arguments.parse(arguments(tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def training_arguments(**options):
    return TrainingArguments("out", use_cpu=True, **options)


@pytest.mark.parametrize("name", RANGES)
def test_below_its_range(name):
    args = training_arguments()
    setattr(args, name, RANGES[name][0] - 1)
    with pytest.raises(ArgumentError, match=f"--{name} must be "):
        check_training_arguments(args)


@pytest.mark.parametrize(
    ("metric", "is_greater"),
    [("accuracy", True), ("eval_macro_f1", True), ("calibration_error", False), ("eval_loss", False), ("loss", False)],
)
def test_the_best_model_is_that_of_the_better_metric(metric, is_greater):
    options = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    args = training_arguments(metric_for_best_model=metric, **options)
    check_training_arguments(args)
    assert args.greater_is_better == is_greater


@pytest.mark.parametrize("optim", [each.value for each in OptimizerNames])
def test_every_optimizer_is_built_or_says_what_it_needs(optim):
    args = training_arguments(optim=optim)
    try:
        check_training_arguments(args)
    except ArgumentError as error:
        assert str(error).startswith(f"--optim {optim}")
    check_training_arguments(args, has_own_optimizer=True)


@pytest.mark.parametrize("schedule", [each.value for each in SchedulerType])
def test_every_schedule_is_built_or_says_what_it_needs(schedule):
    needs = {
        "cosine_with_min_lr": {"min_lr": 0.1},
        "cosine_warmup_with_min_lr": {"min_lr": 0.1},
        "warmup_stable_decay": {"num_decay_steps": 1},
    }
    options = {"eval_strategy": "epoch", "lr_scheduler_type": schedule}
    check_training_arguments(training_arguments(**options, lr_scheduler_kwargs=needs.get(schedule)))
    if schedule in needs:
        with pytest.raises(ArgumentError, match=f"--lr_scheduler_type {schedule}: .* Set the --lr_scheduler_kwargs"):
            check_training_arguments(training_arguments(**options))
