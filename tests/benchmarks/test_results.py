# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The tables of RESULTS.md show the figures, and stand in their places."""

import json
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

from benchmarks import results
from benchmarks.results import (
    BALANCED_SETS,
    BY_NAME,
    END_TO_END,
    NEW_CLASS_SETS,
    REFERENCE_SETS,
    SETS,
    STUDIES,
    ResultsArguments,
    Study,
    accuracy_table,
    gains_table,
    leaks_table,
    make_tables,
    new_classes_table,
    own_protocol,
    references_table,
    replace_tables,
    values_of,
)
from modeling_rbi import RBIConfig
from training.ablation.arms import ARMS, choose_arms
from training.ablation.heads import Budget
from training.ablation.run import Cached
from training.data.packaged.emoji import EMOJI_STYLES
from training.evaluation.features import CachedImages


ROOT = Path(__file__).parents[2]
PROTOCOLS = ("single", "shuffled", "sorted")


# --- Made-up figures ------------------------------------------------------------------------------------------------


def made_up(arms, num_seeds=5, seed=0):
    """Results as `training.ablate` writes them, with random figures and no gain of relations."""
    rng = np.random.default_rng(seed)

    def figures(arm):
        protocols = (*PROTOCOLS, "reference") if ARMS[arm].has_bank else PROTOCOLS
        test = {name: {"accuracy": rng.uniform(0.5, 0.6), "macro_f1": rng.uniform(0.3, 0.4)} for name in protocols}
        return {"test": test}

    return {
        "arms": {arm: {"runs": [figures(arm) for _ in range(num_seeds)]} for arm in arms},
        "environment": {
            "versions": {"python": "3.11.9", "torch": "2.13.0", "transformers": "5.23.0"},
            "hardware": {"processor": "A Processor", "cores": 2, "threads": 1},
        },
    }


def set_values(result, arm, protocol, values, metric="accuracy"):
    """Sets figures, in %, of one arm."""
    for run, value in zip(result["arms"][arm]["runs"], values, strict=True):
        run["test"][protocol][metric] = value / 100


def of(result, arm, protocol, metric="accuracy"):
    """Figures, in %."""
    return np.array([100 * run["test"][protocol][metric] for run in result["arms"][arm]["runs"]])


def read_table(text):
    """The header and the rows of a table in Markdown."""
    header, rule, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines())
    assert len(rule) == len(header) and set("".join(rule)) == {"-"}
    assert all(len(row) == len(header) for row in rows)
    return header, rows


def assert_interval(cell, own, control):
    """A paired difference and its interval by Student's t, bold where it excludes zero."""
    expected = scipy.stats.ttest_rel(own, control)
    low, high = expected.confidence_interval(0.95)
    numbers = [float(number) for number in re.findall(r"[+-]\d+\.\d\d", cell)]
    assert numbers == pytest.approx([np.mean(own) - np.mean(control), low, high], abs=0.006)
    assert re.fullmatch(r"(\*\*)?[+-]\d+\.\d\d \[[+-]\d+\.\d\d, [+-]\d+\.\d\d\](\*\*)?", cell)
    if min(abs(low), abs(high)) > 0.005:
        assert cell.startswith("**") == cell.endswith("**") == (low > 0 or high < 0)


ARMS_OF_ONE = ["plain", "self", "rbi", "self-kernel", "rbi-kernel", "bank-untrained", "bank-votes", "batchformer"]


@pytest.fixture
def ablation():
    result = made_up(ARMS_OF_ONE)
    plain = of(result, "plain", "single")
    # Clearly better than its control, clearly worse, and neither.
    set_values(result, "bank-untrained", "reference", plain + np.array([2, 2.5, 1.5, 2.2, 1.8]))
    set_values(result, "rbi", "shuffled", of(result, "self", "single") - np.array([3, 3.5, 2.5, 3, 3]))
    set_values(result, "bank-votes", "reference", plain + np.array([5, -5, 4, -4, 1]))
    return result


# --- Gains, leaks and accuracies ------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
def test_gains_are_paired_differences(ablation, metric):
    header, rows = read_table(gains_table({"one": [ablation]}, metric))
    assert header == ["arm, test", "over", "one"]
    cells = {(arm, control): cell for arm, control, cell in rows}
    expected = {
        ("self", "single", "plain"),
        ("self-kernel", "single", "plain"),
        ("rbi", "shuffled", "self"),
        ("rbi", "shuffled", "plain"),
        ("rbi-kernel", "shuffled", "self-kernel"),
        ("rbi-kernel", "shuffled", "plain"),
        ("batchformer", "single", "plain"),
        ("bank-untrained", "reference", "plain"),
        ("bank-votes", "reference", "plain"),
    }
    assert cells.keys() == {(f"`{arm}`, {protocol}", f"`{control}`") for arm, protocol, control in expected}
    for arm, protocol, control in expected:
        cell = cells[f"`{arm}`, {protocol}", f"`{control}`"]
        assert_interval(cell, of(ablation, arm, protocol, metric), of(ablation, control, "single", metric))
    if metric == "accuracy":
        assert cells["`bank-untrained`, reference", "`plain`"].startswith("**+2.00 [+1.")
        assert cells["`rbi`, shuffled", "`self`"].startswith("**-3.00 [-3.")
        assert cells["`bank-votes`, reference", "`plain`"].startswith("+0.20 [-")


def test_several_ablations_are_as_many_draws_of_their_means():
    several = [made_up(ARMS_OF_ONE, num_seeds=2, seed=seed) for seed in range(5)]
    _, rows = read_table(gains_table({"styles": several}))
    own, control = (
        [of(each, arm, protocol).mean() for each in several]
        for arm, protocol in (("bank-votes", "reference"), ("plain", "single"))
    )
    (cell,) = (row[2] for row in rows if row[0] == "`bank-votes`, reference")
    assert_interval(cell, own, control)
    _, rows = read_table(leaks_table({"styles": several}))
    (cell,) = (row[1] for row in rows if row[0] == "`rbi`")
    assert_interval(cell, *([of(each, "rbi", name).mean() for each in several] for name in ("sorted", "shuffled")))
    _, rows = read_table(accuracy_table({"styles": several}))
    (cell,) = (row[2] for row in rows if row[:2] == ["`bank-votes`", "reference"])
    assert cell == f"{np.mean(own):.2f} ± {np.std(own, ddof=1):.2f}"


def test_columns_without_an_arm_are_empty(ablation):
    other = made_up(["plain", "bank-votes"], seed=1)
    lonely = made_up(["self", "rbi"], seed=2)
    sets = {"one": [ablation], "other": [other], "lonely": [lonely]}
    _, rows = read_table(gains_table(sets))
    cells = {tuple(row[:2]): row[2:] for row in rows}
    assert [bool(cell) for cell in cells["`bank-votes`, reference", "`plain`"]] == [True, True, False]
    # Without the control there is no gain.
    assert [bool(cell) for cell in cells["`rbi`, shuffled", "`self`"]] == [True, False, True]
    assert [bool(cell) for cell in cells["`rbi`, shuffled", "`plain`"]] == [True, False, False]
    assert all(any(row) for row in cells.values())
    _, rows = read_table(accuracy_table(sets))
    assert {row[0].strip("`") for row in rows} == set(ARMS_OF_ONE)
    assert [bool(cell) for cell in next(row for row in rows if row[0] == "`plain`")[2:]] == [True, True, False]


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
def test_accuracies_are_means_and_deviations(ablation, metric):
    header, rows = read_table(accuracy_table({"one": [ablation]}, metric))
    assert header == ["arm", "test", "one"]
    assert [row[:2] for row in rows if row[0] == "`rbi`"] == [["`rbi`", "single"], ["`rbi`", "shuffled"]]
    assert [row[1] for row in rows if row[0] == "`plain`"] == ["single"]
    for arm, protocol, cell in rows:
        values = of(ablation, arm.strip("`"), protocol, metric)
        assert cell == f"{values.mean():.2f} ± {values.std(ddof=1):.2f}"


def test_leaks_are_of_arms_that_attend_to_the_batch(ablation):
    set_values(ablation, "rbi", "sorted", of(ablation, "rbi", "shuffled") + np.array([4, 4.5, 4, 3.5, 4]))
    header, rows = read_table(leaks_table({"one": [ablation]}))
    cells = dict(rows)
    assert cells.keys() == {"`rbi`", "`rbi-kernel`"} and header == ["arm", "one"]
    for arm, cell in cells.items():
        assert_interval(cell, *(of(ablation, arm.strip("`"), protocol) for protocol in ("sorted", "shuffled")))
    assert cells["`rbi`"].startswith("**+4.00 [+3.")


def test_rounding_errors_are_no_gains():
    """Those of a mean of equal figures, one to the same side in each draw."""
    result = made_up(["plain", "self", "rbi"])
    values = np.array([92.1, 93.2, 91.7, 92.9, 93.3])
    set_values(result, "self", "single", values)
    for off in (1e-13, -1e-13):
        set_values(result, "rbi", "shuffled", values + off)
        _, rows = read_table(gains_table({"one": [result]}))
        (cell,) = (row[2] for row in rows if row[:2] == ["`rbi`, shuffled", "`self`"])
        assert cell == "+0.00 [+0.00, +0.00]"


def test_protocols_of_arms():
    assert own_protocol("plain") == own_protocol("self") == own_protocol("batchformer") == "single"
    assert own_protocol("rbi") == own_protocol("rbi-kernel-untrained") == "shuffled"
    assert own_protocol("bank-votes") == own_protocol("bank-trained-head") == "reference"
    # A control without a bank is evaluated on each image independently.
    result = made_up(["plain"])
    assert values_of([result], "plain", "reference", "accuracy") == pytest.approx(of(result, "plain", "single"))


# --- Studies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BY_NAME)
def test_studies_can_be_run(name, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    study = BY_NAME[name]
    args = study.parse(tmp_path)
    args.check()
    assert Path(args.training.output_dir) == tmp_path / name and args.training.use_cpu
    assert args.seeds == list(range(study.num_seeds))
    assert set(study.arms) <= ARMS.keys() and len(set(study.arms)) == len(study.arms)
    assert {arm.name for arm in args.arms} == {arm.name for arm in choose_arms(study.arms)} >= set(study.arms)
    assert args.is_frozen == ("end-to-end" not in name)


def test_each_study_is_in_a_table():
    assert len(BY_NAME) == len(STUDIES)
    used = {name for sets in (SETS, BALANCED_SETS, END_TO_END) for names in sets.values() for name in names}
    assert used == BY_NAME.keys()
    for names in SETS.values():
        # Those that are averaged have the same arms, and seeds.
        assert len({(BY_NAME[name].arms, BY_NAME[name].num_seeds) for name in names}) == 1


@pytest.mark.slow
def test_features_are_shared_by_the_same_images_alone(monkeypatch, tmp_path):
    """References and new classes keep what the backbone gave in one place."""
    monkeypatch.chdir(ROOT)
    folders = defaultdict(set)
    for study, sets in (("references", REFERENCE_SETS), ("new-classes", NEW_CLASS_SETS)):

        def measure(name, folder, sets=sets):
            recipe, arguments, *_ = sets[name]
            folders[folder].add((recipe, *arguments))
            args = Study("x", recipe, (*results.FROZEN, *arguments), ("plain",), 2).parse(tmp_path)
            args.check()
            return [name]

        figures = results._measured(study, sets, measure, tmp_path)
        assert figures == {name: [name] for name in sets}
        assert len(list((tmp_path / study).glob("*.json"))) == len(sets)
    assert all(len(sources) == 1 for sources in folders.values())
    assert len(folders) < len(REFERENCE_SETS) + len(NEW_CLASS_SETS)
    assert {folder.parent for folder in folders} == {tmp_path / "features"}


def test_what_is_measured_is_kept(tmp_path):
    asked = []

    def measure(name, folder):
        asked.append(name)
        return {"figure": len(asked)}

    first = results._measured("references", ["One, 1 a class", "Two"], measure, tmp_path)
    (tmp_path / "references" / "two.json").unlink()
    second = results._measured("references", ["One, 1 a class", "Two", "Three"], measure, tmp_path)
    assert asked == ["One, 1 a class", "Two", "Two", "Three"]
    assert second["One, 1 a class"] == first["One, 1 a class"] == {"figure": 1}
    assert second["Two"] == {"figure": 3}


def test_unknown_studies_are_refused(capsys):
    ResultsArguments(studies=["elpv", "references", "new-classes"])
    assert results.main(["--studies", "elpv", "elvp"]) == 2
    assert "error: There is no study elvp" in capsys.readouterr().err


# --- References and new classes -------------------------------------------------------------------------------------


def figures(rng):
    return {"accuracy": 100 * rng.uniform(0.5, 0.6), "macro_f1": 100 * rng.uniform(0.3, 0.4)}


OTHER_FACTS = ("seed", "settings")


def made_up_references(num_draws, seed, ways=("default", "votes", "fitted", "train")):
    rng = np.random.default_rng(seed)
    return [
        {"seed": draw, "single": figures(rng), "settings": {"share": None}} | {way: figures(rng) for way in ways}
        for draw in range(num_draws)
    ]


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
def test_references_are_over_each_alone(metric):
    by_set = {
        "ELPV": made_up_references(10, 0),
        "ORL": made_up_references(10, 1, ("default", "votes", "fitted", "train", "unlabeled")),
    } | {f"emoji, {style} held out": made_up_references(2, 2 + at) for at, style in enumerate(EMOJI_STYLES)}
    header, rows = read_table(references_table(by_set, metric))
    assert header[2:] == ["default", "with votes", "fitted", "only training images", "only unlabeled images"]
    assert [row[0] for row in rows] == ["ELPV", "ORL", "emoji, each style held out"]
    values = {
        name: {way: [draw[way][metric] for draw in by_set[name]] for way in by_set[name][0] if way not in OTHER_FACTS}
        for name in ("ELPV", "ORL")
    }
    styles = [draws for name, draws in by_set.items() if name.startswith("emoji")]
    values["emoji, each style held out"] = {
        way: [np.mean([draw[way][metric] for draw in draws]) for draws in styles]
        for way in ("single", "default", "votes", "fitted", "train")
    }
    for name, single, *cells in rows:
        assert single == f"{np.mean(values[name]['single']):.2f}"
        for way, cell in zip(("default", "votes", "fitted", "train", "unlabeled"), cells, strict=True):
            if way in values[name]:
                assert_interval(cell, values[name][way], values[name]["single"])
            else:
                assert cell == ""


def made_up_new_classes(num_draws, seed):
    rng = np.random.default_rng(seed)
    return [
        {
            "seed": draw,
            **{
                way: {part: rng.uniform(50, 60) for part in ("old", "new", "all")}
                for way in ("rbi", "nearest mean", "retrained")
            },
            "old classifier": {"old": rng.uniform(50, 60)},
        }
        for draw in range(num_draws)
    ]


def test_new_classes_are_grouped_by_shots():
    by_set = {name: made_up_new_classes(2, seed) for seed, name in enumerate(NEW_CLASS_SETS)}
    header, rows = read_table(new_classes_table(by_set))
    assert header == ["", "", "old", "new", "all", "`rbi` over it, all"]
    titles = list(dict.fromkeys(row[0] for row in rows))
    # The styles of emoji are what is averaged over.
    members = defaultdict(list)
    for name in NEW_CLASS_SETS:
        first, *_, last = name.split(", ")
        members[f"{first}, {last}"].append(name)
    assert titles == list(members) and "emoji, 1 of a new class" in titles and "ORL, 1 of a new person" in titles
    for title, names in members.items():
        draws = by_set[names[0]]
        if title.startswith("emoji"):
            assert len(names) > 1
            draws = [
                {
                    way: {part: np.mean([draw[way][part] for draw in by_set[name]]) for part in by_set[name][0][way]}
                    for way in ("rbi", "nearest mean", "retrained", "old classifier")
                }
                for name in names
            ]
        own = [row[1:] for row in rows if row[0] == title]
        assert [row[0] for row in own] == ["rbi", "nearest mean", "retrained", "old classifier, old classes only"]
        for way, *cells, difference in own[:3]:
            assert cells == [f"{np.mean([draw[way][part] for draw in draws]):.1f}" for part in ("old", "new", "all")]
            if way == "rbi":
                assert difference == ""
            else:
                assert_interval(difference, *([draw[each]["all"] for draw in draws] for each in ("rbi", way)))
        closed = np.mean([draw["old classifier"]["old"] for draw in draws])
        assert own[3][1:] == [f"{closed:.1f}", "", "", ""]


NUM_CLASSES = 8


@pytest.fixture
def toy(backbone_config, monkeypatch):
    """Two draws of planted features and images, 8 classes, without a backbone."""
    config = RBIConfig.kernel(
        backbone_config=backbone_config,
        feature_size=24,
        num_labels=NUM_CLASSES,
        image_mean=[0.5] * 3,
        image_std=[0.25] * 3,
    )

    def draw(seed, arguments):
        torch.manual_seed(seed)
        sizes = {"train": 5 * NUM_CLASSES, "validation": 128, "test": 160}
        if "--num_unlabeled" in arguments:
            sizes["unlabeled"] = 3 * NUM_CLASSES
        labels = torch.arange(sum(sizes.values())) % NUM_CLASSES
        patterns = torch.rand(NUM_CLASSES, 3, 16, 16)
        pixels = (patterns[labels] + 0.3 * torch.randn(len(labels), 3, 16, 16)).clamp(0, 1)
        features = 2 * torch.nn.functional.one_hot(labels, 24) + torch.randn(len(labels), 24)
        images = CachedImages((pixels - 0.5) / 0.25, features, labels)
        rows = dict(zip(sizes, torch.arange(len(labels)).split(list(sizes.values())), strict=True))
        return Cached.of_draw(images, rows)

    asked = []

    def draws(recipe, arguments, folder, num_draws):
        asked.append((recipe, arguments, num_draws))
        return config, [(seed, draw(seed, arguments)) for seed in range(2)]

    monkeypatch.setattr(results, "_draws", draws)
    # A classifier of so few features has to learn faster to forget its start.
    monkeypatch.setattr(results, "_STEPS", Budget(steps=100, learning_rate=0.03))
    return asked


@pytest.mark.slow
def test_references_without_training(toy, monkeypatch, tmp_path):
    monkeypatch.setattr(results, "REFERENCE_SETS", {"toy": ("recipe", ("--num_unlabeled",)), "styled": ("emoji", ())})
    measured = json.loads(json.dumps(results.measure_references("toy", tmp_path)))
    assert toy == [("recipe", ("--num_unlabeled",), 10)] and [draw["seed"] for draw in measured] == [0, 1]
    for draw in measured:
        ways = {"single", "default", "votes", "fitted", "train", "unlabeled"}
        assert draw.keys() == {"seed", "settings", *ways}
        # The images tell the class, which the noise of the features hides from the classifier.
        assert draw["default"]["accuracy"] > draw["single"]["accuracy"] + 2
        assert draw["votes"]["accuracy"] > draw["single"]["accuracy"] + 5
        assert draw["fitted"]["accuracy"] >= draw["default"]["accuracy"] - 1
        assert draw["settings"]["share"] is not None and len({draw[way]["accuracy"] for way in ways}) > 4
    assert "unlabeled" not in results.measure_references("styled", tmp_path)[0]
    assert toy[-1] == ("emoji", (), 2)
    references_table({"toy": measured}, "accuracy")


@pytest.mark.slow
def test_new_classes_without_training(toy, monkeypatch, tmp_path):
    sets = {"some": ("recipe", (), 3, 2), "all": ("recipe", (), 3, 5)}
    monkeypatch.setattr(results, "NEW_CLASS_SETS", sets)
    for name in sets:
        measured = json.loads(json.dumps(results.measure_new_classes(name, tmp_path)))
        assert [draw["seed"] for draw in measured] == [0, 1]
        for draw in measured:
            assert draw.keys() == {"seed", "rbi", "nearest mean", "retrained", "old classifier"}
            for way in ("rbi", "nearest mean", "retrained"):
                # 20 test images of each class, 3 of 8 classes being new.
                old, new, everything = (draw[way][part] for part in ("old", "new", "all"))
                assert everything == pytest.approx((5 * old + 3 * new) / 8)
                # By chance it would be 1 in 8.
                assert old > 25 and (name == "some" or new > 25)
            assert draw["rbi"]["new"] > 60 and draw["rbi"]["old"] > 60
            # With fewer classes to choose from.
            assert draw["old classifier"]["old"] > 30
        new_classes_table({name: measured})


# --- RESULTS.md -----------------------------------------------------------------------------------------------------


TEXT = """# Results

Before <!-- a note -->

<!-- gains -->
old
table
<!-- /gains -->

Between, with \\g<1> and \\n.

<!-- gains-macro-f1 -->
<!-- /gains-macro-f1 -->
After
"""


def test_tables_are_replaced_and_nothing_else():
    tables = {"gains": "| a |\n|---|\n| 1 |", "gains-macro-f1": "one line"}
    text = replace_tables(TEXT, tables)
    assert text == TEXT.replace("old\ntable", tables["gains"]).replace(
        "<!-- gains-macro-f1 -->\n", "<!-- gains-macro-f1 -->\none line\n"
    )
    assert replace_tables(text, tables) == text
    assert replace_tables(replace_tables(text, {"gains": "other"}), tables) == text
    assert replace_tables(TEXT, {}) == TEXT


@pytest.mark.parametrize("table", [r"\1 \g<0> \g<name> \n \\", "$1 {0} %s", "<!-- other -->", "± µ"])
def test_tables_stand_as_they_are(table):
    text = replace_tables(TEXT, {"gains": table})
    assert text == TEXT.replace("old\ntable", table)
    assert replace_tables(text, {"gains": table}) == text


@pytest.mark.parametrize("name", ["gain", "g.ins", "leaks", "macro-f1"])
def test_a_table_without_a_place_is_refused(name):
    with pytest.raises(ValueError, match=rf"no place for the table {re.escape(name)}: put <!-- {re.escape(name)} -->"):
        replace_tables(TEXT, {name: "x"})


@pytest.mark.parametrize("marker", ["<!-- gains -->", "<!-- /gains -->"])
def test_both_markers_are_needed(marker):
    with pytest.raises(ValueError, match="no place for the table gains"):
        replace_tables(TEXT.replace(marker, ""), {"gains": "x"})


@pytest.fixture
def measured(tmp_path):
    """A folder of made-up figures of everything."""
    for seed, study in enumerate(STUDIES):
        (tmp_path / study.name).mkdir()
        arms = [arm.name for arm in choose_arms(study.arms)]
        content = made_up(arms, study.num_seeds, seed)
        (tmp_path / study.name / "ablation.json").write_text(json.dumps(content))
    references = {name: made_up_references(2, seed) for seed, name in enumerate(REFERENCE_SETS)}
    new_classes = {name: made_up_new_classes(2, seed) for seed, name in enumerate(NEW_CLASS_SETS)}
    return tmp_path, references, new_classes


def test_all_tables(measured):
    folder, references, new_classes = measured
    tables = make_tables(*measured)
    assert tables["environment"].startswith(
        "Machine: A Processor, 2 cores, 1 thread(s) each run; Python 3.11.9, torch"
    )
    assert tables["arms"].count("\n- `") == len(ARMS) - 1
    for name, table in tables.items():
        if name not in ("environment", "arms"):
            header, rows = read_table(table)
            assert rows and all(any(row[1:]) for row in rows), name
            for column in range(1, len(header)):
                assert any(row[column] for row in rows) or header[column] == "only unlabeled images", (
                    name,
                    header[column],
                )
    read = {name: json.loads((folder / name / "ablation.json").read_text()) for name in BY_NAME}
    header, rows = read_table(tables["gains"])
    assert header[2:] == list(SETS)
    cells = {tuple(row[:2]): dict(zip(SETS, row[2:], strict=True)) for row in rows}
    for title, cell in cells["`bank-untrained`, reference", "`plain`"].items():
        several = [read[name] for name in SETS[title]]
        own, control = (
            [of(each, *arm_and_protocol) for each in several]
            for arm_and_protocol in (("bank-untrained", "reference"), ("plain", "single"))
        )
        if len(several) == 1:
            assert_interval(cell, own[0], control[0])
        else:
            assert_interval(cell, np.mean(own, axis=1), np.mean(control, axis=1))
    header, _ = read_table(tables["gains-macro-f1"])
    assert header[2:] == ["ELPV"]
    assert read_table(tables["balanced"])[0][2:] == list(BALANCED_SETS)
    assert tables["references"] == references_table(references, "accuracy") != tables["references-macro-f1"]
    assert tables["new-classes"] == new_classes_table(new_classes)


def test_stopped_it_says_how_to_go_on(monkeypatch, tmp_path, capsys):
    def stop(study, folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(results, "run_study", stop)
    assert results.main(["--output_dir", str(tmp_path)]) == 130
    assert "Run the same command again to go on." in capsys.readouterr().err


def test_the_committed_arms_are_those_of_the_code():
    text = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"<!-- arms -->\n(.*?)\n<!-- /arms -->", text, re.DOTALL)
    assert block.splitlines() == [f"- `{arm.name}`: {arm.description}." for arm in ARMS.values()]


def test_each_table_has_its_place(measured):
    text = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    tables = make_tables(*measured)
    places = re.findall(r"<!-- ([\w-]+) -->\n.*?<!-- /\1 -->", text, re.DOTALL)
    assert sorted(places) == sorted(tables)
    written = replace_tables(text, tables)
    assert all(table in written for table in tables.values())


@pytest.fixture
def no_runs(monkeypatch, measured):
    """Everything is there already."""
    folder, references, new_classes = measured
    ran = []
    monkeypatch.setattr(results, "run_study", lambda study, folder: ran.append(study.name))
    for name, figures in (("measure_references", references), ("measure_new_classes", new_classes)):
        monkeypatch.setattr(results, name, lambda each, folder, name=name, figures=figures: figures[each])
    return folder, ran


@pytest.mark.slow
def test_results_are_written_whole(no_runs, measured, tmp_path, capsys):
    folder, ran = no_runs
    file = tmp_path / "RESULTS.md"
    text = "".join(f"# {name}\n<!-- {name} -->\n<!-- /{name} -->\n" for name in make_tables(*measured))
    file.write_text(text, encoding="utf-8")
    words = ["--output_dir", str(folder), "--results_file", str(file)]
    assert results.main(words) == 0
    assert f"Tables: {file}\nAll figures: {folder}" in capsys.readouterr().out
    assert ran == list(BY_NAME)
    assert file.read_text(encoding="utf-8") == replace_tables(text, make_tables(*measured))
    file.write_text(text.replace("<!-- leaks -->", ""), encoding="utf-8")
    assert results.main(words) == 1
    assert "no place for the table leaks" in capsys.readouterr().err
    assert file.read_text(encoding="utf-8") == text.replace("<!-- leaks -->", "")
    assert not list(tmp_path.glob(".RESULTS*"))


@pytest.mark.parametrize("studies", [["elpv"], ["references"], ["elpv", "orl-1-shot", "references", "new-classes"]])
def test_some_studies_write_no_tables(no_runs, studies, tmp_path):
    folder, ran = no_runs
    (tmp_path / "RESULTS.md").write_text(TEXT)
    words = ["--output_dir", str(folder), "--results_file", str(tmp_path / "RESULTS.md"), "--studies", *studies]
    assert results.main(words) == 0
    assert sorted(ran) == sorted(set(studies) & BY_NAME.keys())
    assert (tmp_path / "RESULTS.md").read_text() == TEXT
    for name in ("references", "new-classes"):
        assert (folder / name).exists() == (name in studies)
