# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Measures where relations help, and writes the tables of RESULTS.md: `python -m benchmarks.results`.

Runs the ablations, the references without training and the added classes on data sets that install by package name. It
takes hours on two cores. Finished results in `--output_dir` are kept, so it can be stopped and restarted, and several
processes can share the work with `--studies`. In RESULTS.md, only the tables between `<!-- name -->` and
`<!-- /name -->` are replaced.
"""

import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from modeling_rbi import RBIConfig, RBIForImageClassification, UserError
from training.ablation.arguments import AblationArguments
from training.ablation.arms import ARMS
from training.ablation.heads import Budget, train_plain
from training.ablation.report import paired_difference
from training.ablation.run import RESULTS_FILE, Cached, ablate, cache_features, draw_data
from training.cli import Stopped, parse_arguments, run_command
from training.data.packaged.emoji import EMOJI_STYLES
from training.evaluation.features import CachedImages
from training.evaluation.protocols import Predictions
from training.evaluation.reference_settings import candidates_for, fit_references, scores_with_references
from training.evaluation.text import interval_text, markdown_table, mean_and_std, spread_text
from training.files import write_json


RECIPES = "training/recipes"
# PSNR at 16 px in all arms: it ranks references as full size does (rank correlation 0.990) and takes little time.
FROZEN = ("--freeze_backbone", "True", "--frozen_steps", "300", "--rbi_config", '{"psnr_image_size": 16}')
BATCH_ARMS = ("plain", "self", "rbi", "batchformer", "self-kernel", "rbi-kernel", "rbi-kernel-untrained")
BANK_ARMS = ("bank-untrained", "bank-votes", "bank-trained", "bank-trained+single")
MOST_ARMS = BATCH_ARMS + BANK_ARMS
ALL_ARMS = (*MOST_ARMS, "rra", "rbi-kernel+single")
FEWER_ARMS = ("plain", "self", "rbi", "rbi-kernel-untrained", "bank-untrained", "bank-votes", "bank-trained+single")
FEWEST_ARMS = ("plain", "rbi-kernel-untrained", "bank-untrained", "bank-votes", "bank-trained+single")
UNTRAINED_ARMS = ("plain", "rbi-kernel-untrained", "bank-untrained", "bank-votes")
# Styles held out of 897 classes.
ALL_EMOJI_STYLES = ("google", "twitter", "fluent")
# Draws of the references and of the added classes.
NUM_DRAWS = 10
_STEPS = Budget(steps=300)


@dataclass(frozen=True)
class Study:
    """One ablation: its name and the arguments of `training.ablate`."""

    name: str
    recipe: str
    arguments: tuple[str, ...]
    arms: tuple[str, ...] = MOST_ARMS
    num_seeds: int = 5

    def parse(self, output_dir: Path) -> AblationArguments:
        """Arguments of the ablation."""
        return AblationArguments.parse(
            [
                "--config",
                f"{RECIPES}/{self.recipe}.yaml",
                *self.arguments,
                "--arms",
                *self.arms,
                "--num_seeds",
                str(self.num_seeds),
                "--seed",
                "0",
                "--use_cpu",
                "True",
                "--output_dir",
                str(output_dir / self.name),
            ]
        )


def _emoji(classes: str, arms: tuple[str, ...], styles: Iterable[str] = EMOJI_STYLES) -> list[Study]:
    """Each style held out in turn. The split is the same for all seeds, so averages are over the styles."""
    return [
        Study(
            f"emoji-{style}-{classes}",
            "emoji",
            (*FROZEN, "--dataset_config_name", f"{style}-{classes}", "--skip_bad_images", "True"),
            arms=arms,
            num_seeds=2,
        )
        for style in styles
    ]


FEW = ("--max_test_samples", "1000")
STUDIES = [
    *(
        Study(f"orl-{shots}-shot", "orl_faces", (*FROZEN, "--dataset_config_name", f"{shots}-shot", *more), arms)
        for shots, more, arms in (
            (1, ("--num_unlabeled", "140"), MOST_ARMS),
            (2, ("--num_unlabeled", "140"), ALL_ARMS),
            (5, (), FEWEST_ARMS),
        )
    ),
    *(
        Study(
            f"fashion-mnist-{labels}",
            "fashion_mnist",
            (*FROZEN, "--dataset_config_name", f"{labels}-per-class", "--num_unlabeled", "1000", *FEW),
            arms,
        )
        for labels, arms in ((5, ALL_ARMS), (20, FEWEST_ARMS))
    ),
    Study("elpv", "elpv", FROZEN, ALL_ARMS),
    *_emoji("fine", FEWER_ARMS),
    *_emoji("all", UNTRAINED_ARMS, ALL_EMOJI_STYLES),
    Study(
        "orl-2-shot-balanced",
        "orl_faces",
        (
            *(*FROZEN, "--dataset_config_name", "2-shot", "--num_unlabeled", "140"),
            *("--batch_sampler", "balanced", "--images_per_class", "2", "--per_device_train_batch_size", "40"),
        ),
        ("self", "rbi", "self-kernel", "rbi-kernel"),
    ),
    Study(
        "orl-2-shot-end-to-end",
        "orl_faces",
        ("--dataset_config_name", "2-shot", "--image_size", "64"),
        arms=(
            *("plain", "self", "rbi", "self-kernel", "rbi-kernel", "rbi-kernel+single"),
            *("bank-untrained", "bank-votes"),
        ),
    ),
]
BY_NAME = {study.name: study for study in STUDIES}


def run_study(study: Study, folder: Path) -> dict[str, Any]:
    """Runs an ablation; finished parts are kept."""
    return ablate(study.parse(folder))


# Columns of the tables: titles, and the ablations of each column.
SETS = {
    "ORL, 1 a person": ["orl-1-shot"],
    "ORL, 2": ["orl-2-shot"],
    "ORL, 5": ["orl-5-shot"],
    "Fashion-MNIST, 5 a class": ["fashion-mnist-5"],
    "Fashion-MNIST, 20": ["fashion-mnist-20"],
    "emoji, 254": [f"emoji-{style}-fine" for style in EMOJI_STYLES],
    "emoji, 897": [f"emoji-{style}-all" for style in ALL_EMOJI_STYLES],
    "ELPV": ["elpv"],
}
BALANCED_SETS = {
    "ORL, 2, random": ["orl-2-shot"],
    "ORL, 2, P x K": ["orl-2-shot-balanced"],
}
END_TO_END = {"ORL, 2, end to end": ["orl-2-shot-end-to-end"], "ORL, 2, frozen": ["orl-2-shot"]}


def values_of(results: Sequence[dict[str, Any]], arm: str, protocol: str, metric: str) -> list[float]:
    """A metric in %, for each seed of one ablation; for several ablations, the mean of each."""
    by_result = [
        [100 * run["test"].get(protocol, run["test"]["single"])[metric] for run in result["arms"][arm]["runs"]]
        for result in results
    ]
    return by_result[0] if len(results) == 1 else [statistics.fmean(values) for values in by_result]


def own_protocol(arm: str) -> str:
    """The protocol in which an arm uses relations; `single` if there is none."""
    scopes = ARMS[arm].scopes
    return "reference" if "reference" in scopes else "shuffled" if "batch" in scopes else "single"


def accuracy_table(sets: Mapping[str, Sequence[dict[str, Any]]], metric: str = "accuracy") -> str:
    """Mean and standard deviation of each arm, without relations and with them."""
    rows = []
    for arm in ARMS:
        for protocol in dict.fromkeys(("single", own_protocol(arm))):
            cells = [
                spread_text(mean_and_std(values_of(results, arm, protocol, metric)), scale=1)
                if arm in results[0]["arms"]
                else ""
                for results in sets.values()
            ]
            if any(cells):
                rows.append([f"`{arm}`", protocol, *cells])
    return markdown_table(["arm", "test", *sets], rows)


def gains_table(sets: Mapping[str, Sequence[dict[str, Any]]], metric: str = "accuracy") -> str:
    """Gains of relations: each arm with relations over its control without, and over the plain classifier."""
    rows = []
    for arm in ARMS.values():
        protocol = own_protocol(arm.name)
        for control in dict.fromkeys((arm.control, "plain")):
            if control is None or arm.name == "plain":
                continue
            cells = []
            for results in sets.values():
                if not {arm.name, control} <= results[0]["arms"].keys():
                    cells.append("")
                    continue
                own = values_of(results, arm.name, protocol, metric)
                cells.append(_gain(own, values_of(results, control, "single", metric)))
            if any(cells):
                rows.append([f"`{arm.name}`, {protocol}", f"`{control}`", *cells])
    return markdown_table(["arm, test", "over", *sets], rows)


def leaks_table(sets: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    """Class-ordered minus random test batches, for arms that attend to the batch."""
    rows = []
    for arm in ARMS:
        if own_protocol(arm) != "shuffled":
            continue
        cells = []
        for results in sets.values():
            if arm not in results[0]["arms"]:
                cells.append("")
                continue
            ordered, shuffled = (values_of(results, arm, protocol, "accuracy") for protocol in ("sorted", "shuffled"))
            cells.append(_gain(ordered, shuffled))
        if any(cells):
            rows.append([f"`{arm}`", *cells])
    return markdown_table(["arm", *sets], rows)


def _gain(values: list[float], controls: list[float]) -> str:
    """Paired difference of values in %."""
    return interval_text(paired_difference(values, controls), scale=1, mark=True)


# --- References without training ------------------------------------------------------------------------------------

# Recipe and arguments by title. The bank holds the training images and the unlabeled ones.
REFERENCE_SETS = {
    **{
        f"ORL, {shots} a person": ("orl_faces", ("--dataset_config_name", f"{shots}-shot", *more))
        for shots, more in ((1, ("--num_unlabeled", "140")), (2, ("--num_unlabeled", "140")), (5, ()))
    },
    **{
        f"Fashion-MNIST, {labels} a class": (
            "fashion_mnist",
            ("--dataset_config_name", f"{labels}-per-class", "--num_unlabeled", "1000", "--max_test_samples", "2000"),
        )
        for labels in (5, 20)
    },
    "ELPV": ("elpv", ()),
    "cards": ("cards", ()),
    **{f"emoji, {style} held out": ("emoji", ("--dataset_config_name", f"{style}-fine")) for style in EMOJI_STYLES},
}


def _draws(recipe: str, arguments: tuple[str, ...], folder: Path, num_draws: int):
    """The config of the model, and each seed with the cached features of its draw."""
    study = Study(folder.name, recipe, (*FROZEN, *arguments), ("bank-untrained",), num_draws)
    args = study.parse(folder.parent)
    draws = [draw_data(args, seed) for seed in args.seeds]
    folder.mkdir(parents=True, exist_ok=True)
    config, cached = cache_features(args, draws, folder)
    return config, list(zip(args.seeds, cached, strict=True))


def _kernel_model(config: RBIConfig, **fields: Any) -> RBIForImageClassification:
    return RBIForImageClassification(ARMS["bank-untrained"].config(config, **fields)).eval()


def _scores(model: RBIForImageClassification, cached: Cached, scope: str) -> torch.Tensor:
    """Logits of the test images."""
    return scores_with_references(model, cached.images, scope, cached.rows["test"], exclude_self=False)


def _metrics(model: RBIForImageClassification, cached: Cached, scope: str) -> dict[str, float]:
    """Metrics of the test images, in %."""
    labels = cached.images.labels[cached.rows["test"]]
    (metrics,) = Predictions.from_scores(_scores(model, cached, scope), labels).metrics
    return {name: 100 * value for name, value in metrics.items()}


def measure_references(name: str, folder: Path) -> list[dict[str, Any]]:
    """
    Gives a plain classifier a kernel head and a bank, in each draw of one data set. `default`: the preset's settings.
    `votes`: the labels also give half of the prediction. `fitted`: settings chosen on the validation images, or no
    relations. `train`, `unlabeled`: the preset's settings with only that part of the bank.
    """
    recipe, arguments = REFERENCE_SETS[name]
    num_draws = 2 if recipe == "emoji" else NUM_DRAWS
    config, draws = _draws(recipe, arguments, folder, num_draws)
    results = []
    for seed, cached in draws:
        rows, images = cached.rows, cached.images
        plain = train_plain(images, rows["train"], config.num_labels, _STEPS, seed)
        model = _kernel_model(config)
        model.classifier.load_state_dict(plain.model.state_dict())
        result: dict[str, Any] = {"seed": seed, "single": _metrics(model, cached, "self")}
        banks = {part: rows[part] for part in ("train", "unlabeled") if part in rows} | {"all": cached.bank}
        for part, bank in banks.items():
            model.set_reference_features(images.features[bank], images.pixel_values[bank], images.labels[bank])
            result[part] = _metrics(model, cached, "reference")
        result["default"] = result.pop("all")
        model.config.reference_vote_weight = 0.5
        result["votes"] = _metrics(model, cached, "reference")
        model.config.reference_vote_weight = 0.0
        columns = (images.pixel_values, images.features, images.labels)
        held_out = CachedImages(*(column[rows["validation"]] for column in columns))
        best = min(fit_references(model, held_out, candidates_for(model)), key=lambda each: each.loss)
        best.settings.apply(model)
        result["fitted"] = _metrics(model, cached, best.scope)
        result["settings"] = vars(best.settings)
        results.append(result)
    return results


def references_table(by_set: dict[str, list[dict[str, Any]]], metric: str) -> str:
    """`single` of each data set, and the gains over it with a bank."""
    ways = ("default", "votes", "fitted", "train", "unlabeled")
    titles = ["default", "with votes", "fitted", "only training images", "only unlabeled images"]
    rows = []
    for name, draws in _with_emoji_pooled(by_set).items():
        single = [draw["single"][metric] for draw in draws]
        row = [name, f"{statistics.fmean(single):.2f}"]
        for way in ways:
            values = [draw[way][metric] for draw in draws if way in draw]
            row.append(_gain(values, single) if values else "")
        rows.append(row)
    return markdown_table(["", "without a bank", *titles], rows)


def _with_emoji_pooled(by_set: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """The styles of emoji as draws of one set, each the mean over its seeds."""
    pooled = {name: draws for name, draws in by_set.items() if not name.startswith("emoji")}
    styles = [draws for name, draws in by_set.items() if name.startswith("emoji")]
    if styles:
        pooled["emoji, each style held out"] = [
            {
                way: {metric: statistics.fmean(draw[way][metric] for draw in draws) for metric in draws[0][way]}
                for way, value in draws[0].items()
                if way not in ("seed", "settings", "parts") and isinstance(value, dict)
            }
            for draws in styles
        ]
    return pooled


# --- Classes added without training ---------------------------------------------------------------------------------

NEW_CLASS_SETS = {
    **{
        f"ORL, {shots} of a new person": ("orl_faces", ("--dataset_config_name", "5-shot"), 10, shots)
        for shots in (1, 2, 5)
    },
    **{
        f"emoji, {style} held out, {shots} of a new class": (
            "emoji",
            ("--dataset_config_name", f"{style}-fine"),
            54,
            shots,
        )
        for shots in (1, 3)
        for style in EMOJI_STYLES
    },
}


def measure_new_classes(name: str, folder: Path) -> list[dict[str, Any]]:
    """
    Adds classes with a few images each to a classifier of the old classes, in each draw of one data set. `rbi`: as
    `add_classes` does. `nearest mean`: the class with the nearest mean of its references, by the cosine of features
    centered on the mean of the bank. `retrained`: a linear classifier trained on the whole bank.
    """
    recipe, arguments, num_new, shots = NEW_CLASS_SETS[name]
    num_draws = 2 if recipe == "emoji" else NUM_DRAWS
    config, draws = _draws(recipe, arguments, folder, num_draws)
    results = []
    for seed, cached in draws:
        images, rows = cached.images, cached.rows
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(config.num_labels, generator=generator)
        # New classes come last.
        number_of = torch.empty_like(order)
        number_of[order] = torch.arange(len(order))
        labels, num_old = number_of[images.labels], len(order) - num_new
        train = rows["train"]
        old = train[labels[train] < num_old]
        new = [
            own[torch.randperm(len(own), generator=generator)[:shots]]
            for own in (train[labels[train] == label] for label in range(num_old, len(order)))
        ]
        bank = torch.cat([old, *new])
        renumbered = CachedImages(images.pixel_values, images.features, labels)
        plain = train_plain(renumbered, old, num_old, _STEPS, seed)
        model = _kernel_model(config, num_added_classes=num_new)
        with torch.no_grad():
            model.classifier.weight.zero_()
            model.classifier.bias.fill_(-1e4)
            for name, parameter in model.classifier.named_parameters():
                parameter[:num_old] = plain.model.get_parameter(name)
        model.set_reference_features(images.features[bank], images.pixel_values[bank], labels[bank])
        test = rows["test"]
        features, mean = images.features, images.features[bank].mean(0)
        means = torch.stack([features[bank][labels[bank] == label].mean(0) for label in range(len(order))])
        nearest = torch.nn.functional.cosine_similarity((features[test] - mean)[:, None], (means - mean)[None], dim=-1)
        retrained = train_plain(renumbered, bank, len(order), _STEPS, seed).model
        answers = {
            "rbi": _scores(model, cached, "reference"),
            "nearest mean": nearest,
            "retrained": retrained(features[test]).detach(),
        }
        is_old = labels[test] < num_old
        result: dict[str, Any] = {"seed": seed}
        for way, scores in answers.items():
            is_right = (scores.argmax(-1) == labels[test]).float()
            parts = {"old": is_right[is_old], "new": is_right[~is_old], "all": is_right}
            result[way] = {part: 100 * values.mean().item() for part, values in parts.items()}
        closed = (plain.model(features[test]).argmax(-1) == labels[test]).float()[is_old]
        result["old classifier"] = {"old": 100 * closed.mean().item()}
        results.append(result)
    return results


def new_classes_table(by_set: dict[str, list[dict[str, Any]]]) -> str:
    """Accuracy on old classes, new classes, and all."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, draws in by_set.items():
        title = re.sub(r", \w+ held out", "", name)
        means = [
            {
                way: {part: statistics.fmean(draw[way][part] for draw in draws) for part in draws[0][way]}
                for way in draws[0]
                if way != "seed"
            }
        ]
        groups.setdefault(title, []).extend(means if "held out" in name else draws)
    rows = []
    for title, draws in groups.items():
        for way in ("rbi", "nearest mean", "retrained"):
            row = [title, way]
            for part in ("old", "new", "all"):
                values = [draw[way][part] for draw in draws]
                row.append(f"{statistics.fmean(values):.1f}")
            difference = ""
            if way != "rbi":
                own, others = ([draw[each]["all"] for draw in draws] for each in ("rbi", way))
                difference = _gain(own, others)
            rows.append([*row, difference])
        closed = statistics.fmean(draw["old classifier"]["old"] for draw in draws)
        rows.append([title, "old classifier, old classes only", f"{closed:.1f}", "", "", ""])
    return markdown_table(["", "", "old", "new", "all", "`rbi` over it, all"], rows)


# --- RESULTS.md -----------------------------------------------------------------------------------------------------


def replace_tables(text: str, tables: dict[str, str]) -> str:
    r"""
    Replaces the tables between the markers of a text.

    Args:
        text (`str`):
            Text with `<!-- name -->` and `<!-- /name -->` around each table.
        tables (`dict[str, str]`):
            New tables, by name.

    Raises:
        UserError: if a marker is missing.
    """
    for name, table in tables.items():
        pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)", re.DOTALL)
        if not pattern.search(text):
            raise UserError(f"There is no place for the table {name}: put <!-- {name} --> and <!-- /{name} -->.")
        escaped = table.replace("\\", r"\\")
        text = pattern.sub(rf"\g<1>{escaped}\n\g<2>", text)
    return text


@dataclass
class ResultsArguments:
    """Options of the benchmark."""

    output_dir: str = field(default="outputs/results", metadata={"help": "Folder for all figures."})
    results_file: str = field(default="RESULTS.md", metadata={"help": "File whose tables are replaced."})
    studies: list[str] | None = field(
        default=None,
        metadata={
            "help": "Run only these studies, and write no tables. Names: references, new-classes, and the ablations "
            f"{', '.join(BY_NAME)}."
        },
    )

    def __post_init__(self):
        for name in self.studies or []:
            if name not in {*BY_NAME, "references", "new-classes"}:
                raise UserError(f"There is no study {name}: see --help.")


def _measured(name: str, sets: Iterable[str], measure: Callable, folder: Path) -> dict[str, Any]:
    """Figures of each set. A set whose file exists is not measured again."""
    figures = {}
    for each in sets:
        slug = re.sub(r"\W+", "-", each).strip("-").lower()
        path = folder / name / f"{slug}.json"
        if not path.exists():
            print(f"{name}: {each}", file=sys.stderr, flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, measure(each, folder / "features" / re.sub(r"-\d-of-a-new-\w+$", "", slug)))
        figures[each] = json.loads(path.read_text(encoding="utf-8"))
    return figures


def run(args: ResultsArguments, console: Console):
    """Runs the studies that are not finished, and writes the tables."""
    folder = Path(args.output_dir)
    for study in STUDIES:
        if args.studies is None or study.name in args.studies:
            print(f"ablation: {study.name}", file=sys.stderr, flush=True)
            run_study(study, folder)
    references = new_classes = None
    if args.studies is None or "references" in args.studies:
        references = _measured("references", REFERENCE_SETS, measure_references, folder)
    if args.studies is None or "new-classes" in args.studies:
        new_classes = _measured("new-classes", NEW_CLASS_SETS, measure_new_classes, folder)
    if references is None or new_classes is None or args.studies is not None:
        return
    results_file = Path(args.results_file)
    text = replace_tables(results_file.read_text(encoding="utf-8"), make_tables(folder, references, new_classes))
    draft = results_file.with_name(f".{results_file.name}.tmp")
    draft.write_text(text, encoding="utf-8")
    draft.replace(results_file)
    console.print(
        f"Tables: {results_file.resolve()}\nAll figures: {folder.resolve()}", soft_wrap=True, highlight=False
    )


def make_tables(folder: Path, references: dict[str, Any], new_classes: dict[str, Any]) -> dict[str, str]:
    """All tables, by name."""

    def read(sets: dict[str, list[str]]) -> dict[str, list[dict[str, Any]]]:
        return {
            title: [json.loads((folder / name / RESULTS_FILE).read_text(encoding="utf-8")) for name in names]
            for title, names in sets.items()
        }

    sets = read(SETS)
    environment = sets["ELPV"][0]["environment"]
    versions, hardware = environment["versions"], environment["hardware"]
    return {
        "environment": (
            f"Machine: {hardware['processor']}, {hardware['cores']} cores, {hardware['threads']} thread(s) each run; "
            f"Python {versions['python']}, torch {versions['torch']}, transformers {versions['transformers']}."
        ),
        "gains": gains_table(sets),
        "gains-macro-f1": gains_table({"ELPV": sets["ELPV"]}, "macro_f1"),
        "leaks": leaks_table(sets),
        "accuracies": accuracy_table(sets),
        "macro-f1": accuracy_table({"ELPV": sets["ELPV"]}, "macro_f1"),
        "balanced": gains_table(read(BALANCED_SETS)),
        "end-to-end": gains_table(read(END_TO_END)),
        "end-to-end-accuracies": accuracy_table(read(END_TO_END)),
        "references": references_table(references, "accuracy"),
        "references-macro-f1": references_table(references, "macro_f1"),
        "new-classes": new_classes_table(new_classes),
        "arms": "\n".join(f"- `{arm.name}`: {arm.description}." for arm in ARMS.values()),
    }


def command(argv: Sequence[str], console: Console):
    """Parses the arguments and runs the benchmark."""
    args, _ = parse_arguments(argv, (ResultsArguments,), {}, __doc__)
    try:
        run(args, console)
    except KeyboardInterrupt:
        raise Stopped("Run the same command again to go on.") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
