"""The record of a run: complete, readable, without secrets; and what must not differ when a run goes on."""

import json
import subprocess
from dataclasses import dataclass, fields

import pytest
import torch
from transformers import AutoModelForImageClassification, Trainer, TrainerState, TrainingArguments
from transformers.trainer_callback import TrainerControl

from modeling_rbi import RBIForImageClassification
from training import record as record_module
from training.record import (
    RecordCallback,
    RunRecord,
    best_so_far,
    describe_environment,
    differences,
    metrics_by_epoch,
    resolved_arguments,
    weights_fingerprint,
    without_secrets,
)


SECRET = "hf_veryverysecret"


@dataclass
class Options:
    rate: float = 0.1
    names: tuple = ("a", "b")
    token: str | None = SECRET


def training_arguments(tmp_path, **changes):
    return TrainingArguments(**{"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"} | changes)


def test_what_was_written_is_read(tmp_path):
    folder = tmp_path / "runs" / "one"
    assert RunRecord.read(folder) is None
    record = RunRecord(folder)
    record.update(status="running", metric=0.5)
    record.update(status="finished")
    content = RunRecord.read(folder)
    assert (content["status"], content["metric"]) == ("finished", 0.5)
    assert content == record.content
    assert content["updated"].endswith("+00:00")
    assert [path.name for path in folder.iterdir()] == ["run.json"]


def test_one_process_writes(tmp_path):
    record = RunRecord(tmp_path / "run", is_writer=False)
    record.update(status="running")
    assert record.content["status"] == "running"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"text"'])
def test_what_is_no_record(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json is not a valid record of a run.*: move it away"):
        RunRecord.read(tmp_path)


def test_arguments_are_plain_json_without_secrets(tmp_path):
    args = training_arguments(
        tmp_path,
        hub_token=SECRET,
        lr_scheduler_type="cosine",
        lr_scheduler_kwargs={"num_cycles": 2},
        accelerator_config={"split_batches": False},
        seed=7,
    )
    resolved = resolved_arguments(Options(), args)
    assert SECRET not in json.dumps(resolved, allow_nan=False)
    assert resolved == json.loads(json.dumps(resolved))
    assert resolved["rate"] == 0.1
    assert resolved["names"] == ["a", "b"]
    assert resolved["seed"] == 7
    assert resolved["lr_scheduler_type"] == "cosine"
    assert resolved["lr_scheduler_kwargs"] == {"num_cycles": 2}
    secret = {"token", "hub_token"}
    assert {field.name for field in fields(args) if field.init} - resolved.keys() <= secret
    assert {field.name for field in fields(Options)} - resolved.keys() == {"token"}


def test_no_secret_on_the_command_line():
    argv = ["train.py", "--token", SECRET, f"--hub_token={SECRET}", "--hub-token", SECRET, "--seed", "3", "--token"]
    words = without_secrets(argv)
    assert SECRET not in " ".join(words)
    assert words == ["train.py", "--token", "***", "--hub_token=***", "--hub-token", "***", "--seed", "3", "--token"]
    plain = ["--seed=3", "--train_dir", "token", "--average_tokens_across_devices", "True"]
    assert without_secrets(plain) == plain


def test_the_same_arguments_do_not_differ(tmp_path):
    first, second = (resolved_arguments(Options(), training_arguments(tmp_path)) for _ in range(2))
    assert differences(json.loads(json.dumps(first)), second) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"learning_rate": 1e-3}, ["--learning_rate was 5e-05, now 0.001"]),
        ({"seed": 1, "bf16": True}, ["--bf16 was False, now True", "--seed was 42, now 1"]),
        ({"per_device_train_batch_size": 4}, ["--per_device_train_batch_size was 8, now 4"]),
        ({"num_train_epochs": 9}, ["--num_train_epochs was 3.0, now 9"]),
        ({"save_strategy": "epoch"}, ["--save_strategy was steps, now epoch"]),
        ({"average_tokens_across_devices": False}, ["--average_tokens_across_devices was True, now False"]),
        ({"dataloader_num_workers": 2, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 4}, []),
        ({"output_dir": "elsewhere"}, []),
        ({"resume_from_checkpoint": "last", "disable_tqdm": True, "log_level": "error"}, []),
        ({"logging_steps": 3, "save_total_limit": 1, "hub_token": SECRET, "run_name": "a"}, []),
        ({"push_to_hub": True, "hub_model_id": "me/birds", "hub_private_repo": True}, []),
    ],
)
def test_only_what_changes_the_training_differs(tmp_path, changes, expected):
    before = resolved_arguments(training_arguments(tmp_path))
    assert differences(before, resolved_arguments(training_arguments(tmp_path, **changes))) == expected


def test_the_number_of_a_process_does_not_differ(tmp_path):
    before = resolved_arguments(training_arguments(tmp_path))
    assert differences(before, before | {"local_rank": 1}) == []


def test_arguments_that_one_of_both_lacks():
    assert differences({}, {"layer_decay": None}) == []
    assert differences({}, {"layer_decay": 0.9}) == ["--layer_decay was None, now 0.9"]
    assert differences({"layer_decay": 0.9}, {}) == ["--layer_decay was 0.9, now None"]


def test_the_environment_is_plain_json(tmp_path):
    environment = describe_environment(training_arguments(tmp_path))
    assert environment == json.loads(json.dumps(environment))
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["versions"]["transformers"] is not None
    assert environment["hardware"]["device"] == "cpu"
    assert environment["hardware"]["processes"] == 1
    assert environment["hardware"]["processor"]


def test_a_package_that_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(record_module, "_PACKAGES", ("no-such-package",))
    assert describe_environment(training_arguments(tmp_path))["versions"]["no-such-package"] is None


@pytest.fixture
def code_in(monkeypatch):
    """Pretends that the code lies in a folder."""
    return lambda folder: monkeypatch.setattr(record_module, "__file__", str(folder / "record.py"))


def git(folder, *command):
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    result = subprocess.run(["git", *identity, *command], cwd=folder, capture_output=True, text=True, check=True)
    return result.stdout.strip()


def test_the_revision_of_a_checkout(tmp_path, code_in, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    code_in(tmp_path)
    assert record_module._git_revision() is None
    git(tmp_path, "init")
    assert record_module._git_revision() is None, "no commit yet"
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "a")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert record_module._git_revision() == {"commit": commit, "changed": False}
    (tmp_path / "a").write_text("2")
    assert record_module._git_revision() == {"commit": commit, "changed": True}


def test_no_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert record_module._git_revision() is None


class _Toy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)

    def forward(self, values, labels):
        logits = self.linear(values)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_metrics_of_each_epoch_and_no_others(tmp_path):
    record = RunRecord(tmp_path)
    rows = [{"values": [float(n), 1.0], "labels": n % 2} for n in range(8)]
    args = training_arguments(
        tmp_path,
        eval_strategy="epoch",
        logging_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        disable_tqdm=True,
    )
    trainer = Trainer(_Toy(), args, train_dataset=rows, eval_dataset=rows, callbacks=[RecordCallback(record)])
    trainer.train()
    trainer.evaluate(rows, metric_key_prefix="test_single")
    entries = RunRecord.read(tmp_path)["metrics_by_epoch"]
    assert [entry["epoch"] for entry in entries] == [1.0, 2.0, 3.0]
    assert all({"loss", "eval_loss", "learning_rate", "step"} <= entry.keys() for entry in entries)
    assert not any(name.startswith(("test_", "train_")) for entry in entries for name in entry)
    best = min(entries, key=lambda entry: entry["eval_loss"])
    step = int(best["step"])
    assert record.content["best"] == {"checkpoint": f"checkpoint-{step}", "step": step, "metric": best["eval_loss"]}


def test_metrics_without_an_evaluation():
    logs = [{"loss": 2.0, "step": 5}, {"loss": 1.0, "step": 10}, {"train_runtime": 3.0, "train_loss": 1.5, "step": 10}]
    assert metrics_by_epoch(logs) == logs[:2]
    assert metrics_by_epoch([]) == []


def test_best_before_the_first_evaluation(tmp_path):
    assert best_so_far(TrainerState()) is None
    record = RunRecord(tmp_path)
    RecordCallback(record).on_save(training_arguments(tmp_path), TrainerState(), TrainerControl())
    assert RunRecord.read(tmp_path)["best"] is None
    state = TrainerState(best_metric=0.5, best_global_step=3)
    assert best_so_far(state) == {"checkpoint": None, "step": 3, "metric": 0.5}


def test_the_fingerprint_is_of_the_weights_however_they_are_stored(model_folder, tmp_path):
    model = RBIForImageClassification.from_pretrained(model_folder)
    expected = weights_fingerprint(model)
    model.save_pretrained(tmp_path, max_shard_size="10kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert weights_fingerprint(AutoModelForImageClassification.from_pretrained(tmp_path)) == expected
    with torch.no_grad():
        model.classifier.bias[0] += 1e-6
    assert weights_fingerprint(model) != expected
    model.classifier.bias.data[0] -= 1e-6
    assert weights_fingerprint(model.half()) != expected
