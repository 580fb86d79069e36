# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Results of an ablation: means over the seeds, paired differences with intervals, and tables."""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from scipy import stats

from ..evaluation.text import interval_text, markdown_code, markdown_table, mean_and_std, spread_text
from .arms import Arm


METRICS = ("accuracy", "macro_f1")
# Protocol of the comparison in each relation scope. `sorted` measures a leak of labels, not accuracy.
_PROTOCOLS = {"self": "single", "batch": "shuffled", "reference": "reference"}
_LEVEL = 0.95


def paired_difference(values: Sequence[float], controls: Sequence[float]) -> dict[str, float]:
    r"""
    Mean difference of two arms over the seeds, and its 95 % interval by Student's t.

    Args:
        values (`Sequence[float]`), controls (`Sequence[float]`):
            Metric of each arm for the same seeds, at least 2 of them.
    """
    gains = [value - control for value, control in zip(values, controls, strict=True)]
    mean = statistics.fmean(gains)
    margin = float(stats.t.ppf((1 + _LEVEL) / 2, len(gains) - 1) * stats.sem(gains))
    return {"mean": mean, "low": mean - margin, "high": mean + margin}


def arm_results(arm: Arm, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    r"""
    Results of one arm: its setup, its figures, their mean and standard deviation over the seeds, and the paired
    differences to its control and to `plain` on the test images, by protocol.

    Args:
        arm (`Arm`):
            The arm.
        runs (`dict[str, list[dict[str, Any]]]`):
            Figures of each seed, by arm. All arms have the same order of seeds.
    """
    own = runs[arm.name]
    summary = {
        part: {
            protocol: {metric: mean_and_std([run[part][protocol][metric] for run in own]) for metric in METRICS}
            for protocol in own[0][part]
        }
        for part in ("validation", "test")
    }
    return {
        **{name: value for name, value in dataclasses.asdict(arm).items() if name not in ("name", "scopes")},
        "scopes": list(arm.scopes),
        "runs": own,
        "summary": summary,
        "over_control": None if arm.control is None else _gains(arm, own, runs[arm.control]),
        "over_plain": None if arm.name == "plain" else _gains(arm, own, runs["plain"]),
    }


def _gains(arm: Arm, runs: list[dict[str, Any]], controls: list[dict[str, Any]]) -> dict[str, Any]:
    """Paired differences. A control without relations is evaluated on each image independently."""
    return {
        protocol: {
            metric: paired_difference(
                [run["test"][protocol][metric] for run in runs],
                [run["test"].get(protocol, run["test"]["single"])[metric] for run in controls],
            )
            for metric in METRICS
        }
        for protocol in (_PROTOCOLS[scope] for scope in arm.scopes)
    }


def ablation_markdown(results: dict[str, Any]) -> str:
    r"""
    The tables of an ablation.

    Args:
        results (`dict[str, Any]`):
            Return value of [`ablate`].
    """
    arms = results["arms"]
    protocols = ["single", "shuffled", "sorted", "reference"]
    sections = [f"# Ablation\n\n{_caption(results)}"]
    for metric, title in (("accuracy", "accuracy"), ("macro_f1", "macro-F1")):
        header = ["arm", *protocols, "leak", "validation, single", "trained parameters", "seconds"]
        rows = []
        for name, arm in arms.items():
            test = arm["summary"]["test"]
            leaks = [run["test"]["sorted"][metric] - run["test"]["shuffled"][metric] for run in arm["runs"]]
            rows.append(
                [
                    f"`{name}`",
                    *(spread_text(test[protocol][metric]) if protocol in test else "" for protocol in protocols),
                    f"{100 * statistics.fmean(leaks):+.2f}",
                    spread_text(arm["summary"]["validation"]["single"][metric]),
                    f"{arm['runs'][0]['parameters']:,}",
                    f"{statistics.fmean(run['seconds'] for run in arm['runs']):.1f}",
                ]
            )
        sections.append(f"## Test {title} in %\n\n{markdown_table(header, rows, header[1:])}")
    header = ["arm", "protocol", "control", "accuracy", "macro-F1", "accuracy over `plain`", "macro-F1 over `plain`"]
    rows = []
    for name, arm in arms.items():
        for protocol, over_plain in (arm["over_plain"] or {}).items():
            over_control = {} if arm["over_control"] is None else arm["over_control"][protocol]
            rows.append(
                [
                    f"`{name}`",
                    protocol,
                    "" if arm["control"] is None else f"`{arm['control']}`",
                    *(interval_text(over_control.get(metric)) for metric in METRICS),
                    *(interval_text(over_plain[metric]) for metric in METRICS),
                ]
            )
    sections.append(
        "## Paired differences to the control and to `plain`, in points\n\nMean over the seeds [95 % interval by "
        f"Student's t over the seeds].\n\n{markdown_table(header, rows, header[3:])}"
    )
    lines = "\n".join(f"- `{name}`: {arm['description']}." for name, arm in arms.items())
    sections.append(f"## Arms\n\n{lines}")
    return "\n\n".join(sections) + "\n"


def _caption(results: dict[str, Any]) -> str:
    arguments, data, environment = results["arguments"], results["data"], results["environment"]
    parts = next(iter(data["fingerprints"].values()))["splits"]
    source = next(
        arguments[name] for name in ("dataset_name", "dataset_format", "train_dir", "train_file") if arguments[name]
    )
    name = markdown_code(" ".join(filter(None, (source, arguments["dataset_config_name"]))))
    sizes = ", ".join(f"{split['images']} {part}" for part, split in parts.items())
    size = f" at {arguments['image_size']} px" if arguments["image_size"] else ""
    backbone = markdown_code(arguments["model_name_or_path"] or arguments["backbone_config"])
    batches = "random"
    if arguments["batch_sampler"] == "balanced":
        batches = f"class-balanced ({arguments['images_per_class']} of a class)"
    batches = f"{batches} batches of {arguments['per_device_train_batch_size']}"
    if arguments["freeze_backbone"]:
        budget = (
            "frozen, heads trained on cached features of the whole images without augmentation: "
            f"{arguments['frozen_steps']} steps of AdamW with a cosine schedule, {batches}, learning rate "
            f"{arguments['frozen_learning_rate']:g} (classifier) and {arguments['frozen_head_learning_rate']:g} (the "
            f"rest), weight decay {arguments['weight_decay']:g}"
        )
    else:
        length = f"{arguments['num_train_epochs']:g} epochs"
        if arguments["max_steps"] > 0:
            length = f"{arguments['max_steps']} steps"
        head_rate = arguments["head_learning_rate"] or arguments["learning_rate"]
        budget = (
            f"trained end to end with augmentation: {length}, {batches}, learning rate {arguments['learning_rate']:g} "
            f"(backbone) and {head_rate:g} (the rest), the best epoch by validation (each image independently, or "
            "with the bank of the training)"
        )
    sentences = [
        f"{name}: {sizes} images of {len(data['label_names'])} classes",
        f"Backbone {backbone}{size}, {budget}",
        f"{len(results['seeds'])} seeds, {results['seeds'][0]} to {results['seeds'][-1]}, for split, initialization "
        "and batch order; mean ± standard deviation over the seeds",
        "`single`: each image independently. `shuffled`: mean over "
        f"{arguments['num_shuffles']} random orders, in batches of about {arguments['per_device_eval_batch_size']}. "
        "`sorted`: class-ordered batches; `leak` = `sorted` - `shuffled` comes from the labels of the neighbors and "
        "is not accuracy. `reference`: each image with the bank",
    ]
    if any(arm["scopes"][-1] == "reference" for arm in results["arms"].values()):
        bank = "The bank: the training images"
        if "unlabeled" in parts:
            source = data["unlabeled_from"]
            bank += f", and {parts['unlabeled']['images']} unlabeled images taken from the {source}"
            bank += ", not used for testing" if source == "test" else ""
        sentences.append(bank)
    hardware, versions = environment["hardware"], environment["versions"]
    sentences.append(
        f"{hardware['processor']}, {hardware['threads']} threads, {hardware['device']}; torch {versions['torch']}, "
        f"transformers {versions['transformers']}"
    )
    return ". ".join(sentences) + "."
