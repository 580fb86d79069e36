"""The benchmark measures each model and writes a table."""

import csv

from benchmarks.training_throughput import main


def test_it_measures_each_model(tmp_path, capsys):
    config = '{"model_type": "convnext", "hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 1, 1]}'
    sizes = {"batch_size": 4, "image_size": 32, "num_labels": 3, "num_rounds": 2, "steps_per_round": 1}
    words = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    assert main([*words, "--backbone_config", config, "--csv", str(tmp_path / "out.csv")]) == 0
    assert "rbi, kernel" in capsys.readouterr().out
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == ["plain", "rbi, paper", "rbi, kernel"]
    assert float(rows[0]["ratio_to_plain"]) == 1 and all(float(row["images_per_second"]) > 0 for row in rows)
