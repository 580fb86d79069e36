# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The arguments of an ablation on the small data set."""

import pytest

from training.ablation.arguments import AblationArguments


@pytest.fixture
def make(arguments, tmp_path):
    """Gives the arguments of an ablation on the small data set."""

    def make(name="out", arms=None, **more):
        line = arguments(tmp_path / name, **{"num_train_epochs": 1} | more)
        return AblationArguments.parse([*line, *(["--arms", *arms] if arms else [])])

    return make
