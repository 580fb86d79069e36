"""The launch files are such as `accelerate launch` reads. Those of the CPU are launched by test_trainer.py."""

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType


FOLDER = Path(__file__).parents[2] / "training" / "accelerate"
TYPES = {
    "cpu": DistributedType.NO,
    "multi_cpu": DistributedType.MULTI_GPU,
    "single_gpu": DistributedType.NO,
    "multi_gpu": DistributedType.MULTI_GPU,
    "multi_node": DistributedType.MULTI_GPU,
    "fsdp": DistributedType.FSDP,
    "deepspeed": DistributedType.DEEPSPEED,
}


def test_there_is_one_for_each_kind_of_machine():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(TYPES)


@pytest.mark.parametrize(("name", "kind"), TYPES.items())
def test_accelerate_reads_them(name, kind):
    """Accelerate refuses keys that it does not know."""
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert config.distributed_type == kind
    assert config.use_cpu == name.endswith("cpu")
    content = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    assert config.num_processes == content["num_processes"]
    assert config.num_machines == (2 if name == "multi_node" else 1)
