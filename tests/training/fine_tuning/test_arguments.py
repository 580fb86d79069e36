"""Arguments of a fine-tuning run: values out of range and options that do not go together are refused."""

import pytest

from modeling_rbi import UserError
from training import train
from training.fine_tuning.arguments import FineTuningArguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"relation_batch_size": 0}, "--relation_batch_size must be at least 1"),
        ({"lora_rank": 2, "freeze_backbone": True}, "use one of them"),
        ({"images_per_class": 2}, "--batch_sampler balanced"),
        ({"train_relation_scope": "self", "relation_batch_size": 3}, "trains without relations"),
        ({"train_relation_scope": "self", "self_loss_weight": 0.5}, "leave --self_loss_weight out"),
        ({"train_relation_scope": "self", "unlabeled_dir": "a"}, "leave --unlabeled_dir out"),
        ({"self_loss_weight": 1.0}, "--self_loss_weight must be at least 0 and less than 1, got 1.0"),
        ({"self_loss_weight": -0.1}, "--self_loss_weight must be at least 0"),
        ({"self_loss_weight": float("nan")}, "--self_loss_weight must be at least 0"),
        ({"num_references": 3}, "--num_references needs --unlabeled_dir"),
        ({"unlabeled_dir": "a", "relation_batch_size": 3}, "would separate the unlabeled images"),
        ({"unlabeled_dir": "a", "unlabeled_per_batch": 0}, "--unlabeled_per_batch must be at least 1"),
        ({"unlabeled_dir": "a", "num_references": 0}, "--num_references must be at least 1"),
        ({"references_per_class": 0}, "--references_per_class must be at least 1"),
        ({"layer_decay": 1.5}, "--layer_decay must be between 0 and 1"),
        ({"class_weights": "balanced", "batch_sampler": "balanced"}, "twice"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        FineTuningArguments(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"early_stopping_patience": 1, "eval_strategy": "no", "load_best_model_at_end": False}, "needs evaluations"),
        ({"push_to_hub": True, "hub_strategy": "every_save"}, "leave it at `end`"),
        ({"push_to_hub": True, "num_folds": 2}, "publish one of them"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments, tmp_path, capsys, options, message):
    assert train.main(arguments(tmp_path / "out", **options)) in (1, 2)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
