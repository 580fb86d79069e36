"""transformers' own tests of models and configs, run on RBI with three backbones.

They are not part of the installed package. They come from the source distribution of the installed version, fetched
with pip once and kept beside the project's other downloads.
"""

import copy
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import unittest
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import transformers
from filelock import FileLock
from transformers import ConvNextConfig, PreTrainedModel, ResNetConfig, ViTConfig
from transformers.models.auto import modeling_auto
from transformers.testing_utils import torch_device

from modeling_rbi import RBIConfig, RBIForImageClassification, RBIModel, RBIPreTrainedModel, configuration_rbi
from training.files import cache_dir


# What the common tests import from test folders that the source distribution leaves out, reduced to nothing: tests of
# `torch.export`, tests of `generate`, and fields that `ConfigTester` tries on configs without sub-configs.
_LEFT_OUT = {
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
}


def fetch_source(version: str) -> Path:
    """The source distribution of transformers, from the cache or downloaded with pip."""
    path = cache_dir() / f"transformers-{version}.tar.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    # One of pytest-xdist's workers downloads, the others wait.
    with FileLock(f"{path}.lock"):
        if path.exists():
            return path
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
            options = ["--retries=1", "--no-deps", "--no-binary=transformers", "--dest", folder]
            result = subprocess.run(
                [*command, *options, f"transformers=={version}"], capture_output=True, text=True, timeout=600
            )
            if result.returncode or not (Path(folder) / path.name).exists():
                errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or ["no such file"]
                raise ConnectionError(
                    f"pip could not download the source distribution of transformers {version} ({errors[-1]}). The "
                    f"common tests need a network, or a package index, once; or put {path.name} into {path.parent}."
                )
            os.replace(Path(folder) / path.name, path)
    return path


def _unpack_tests(archive: Path, folder: Path):
    """Writes the archive's `tests` as a package into the folder, with stand-ins for what it imports but lacks."""
    with tarfile.open(archive) as source:
        for member in source:
            name = member.name.partition("/tests/")[2]
            if member.isfile() and name.endswith(".py") and ".." not in name:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(source.extractfile(member).read())
    for name, content in _LEFT_OUT.items():
        if not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content)
    (folder / "__init__.py").touch()


# Set on every config by `test_eager_matches_sdpa_inference` (the epsilons) and `test_reverse_loading_mapping`.
_FIELDS_SET_BY_COMMON_TESTS = {
    "batch_norm_eps",
    "first_k_dense_replace",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "mlp_only_layers",
    "moe_layer_start_index",
    "norm_eps",
    "norm_epsilon",
    "num_dense_layers",
    "post_norm_eps",
    "rms_norm_eps",
}


class _KnownMarks:
    """`pytest.mark` that drops the marks of transformers' CI, which `--strict-markers` would refuse."""

    def __init__(self, mark):
        self.mark = mark

    def __getattr__(self, name):
        try:
            return getattr(self.mark, name)
        except pytest.fail.Exception:
            return self._drop

    def _drop(self, function=None, **kwargs):
        return self._drop if function is None else function


# Lives until the process ends: tracebacks and `inspect` read the files.
_folder = tempfile.TemporaryDirectory(prefix="transformers_common_tests_")


def import_common_tests(package: str = "transformers_common_tests"):
    """transformers' `test_modeling_common` and `test_configuration_common`, under a package of their own."""
    folder = Path(_folder.name)
    _unpack_tests(fetch_source(transformers.__version__), folder)
    spec = importlib.util.spec_from_file_location(
        package, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules[package] = importlib.util.module_from_spec(spec)
    with patch.object(pytest, "mark", _KnownMarks(pytest.mark)):
        return [
            importlib.import_module(f"{package}.{name}")
            for name in ("test_modeling_common", "test_configuration_common")
        ]


# An error here would stop the whole test run: it is kept, and fails the tests below.
_error = None
try:
    _modeling, _configuration = import_common_tests()
except ConnectionError as error:
    _error = str(error)
ModelTesterMixin = type("NoCommonTests", (), {}) if _error else _modeling.ModelTesterMixin


def test_common_tests_are_there():
    """Without them the classes below would hold next to no tests, and pass."""
    assert _error is None, _error
    for model_test in (RBIWithViTTest, RBIWithConvNextTest, RBIWithResNetTest, RBIWithReferencesTest):
        assert len(unittest.defaultTestLoader.getTestCaseNames(model_test)) > 140


class RBIModelTester:
    """A small model and random images, under the names that the common tests read."""

    batch_size = 3
    is_training = True

    def __init__(self, parent, config, **attributes):
        self.parent = parent
        self.config = config
        self.__dict__.update(attributes)

    def get_config(self):
        return copy.deepcopy(self.config)

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        size = getattr(config.backbone_config, "image_size", 32)
        return config, {"pixel_values": torch.randn(self.batch_size, 3, size, size, device=torch_device)}


class RBICommonTests:
    """What the three classes below share. A common test that is not run as it stands is overridden here, and why."""

    all_model_classes = (RBIModel, RBIForImageClassification)
    # The backbone is a sub-config, with an attention implementation of its own.
    _is_composite = True
    # Opt-out: these tests resize the embeddings of a vocabulary. There is none.
    test_resize_embeddings = False

    def setUp(self):
        if _error is not None:
            self.fail(_error)
        self.model_tester = RBIModelTester(self, self.make_config(), **self.model_attributes)
        # The common tests find out from these what a class is: the base model, or a classifier that takes labels.
        self.enterContext(patch.dict(modeling_auto.MODEL_MAPPING_NAMES, rbi="RBIModel"))
        classifiers = modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
        self.enterContext(patch.dict(classifiers, rbi="RBIForImageClassification"))
        # RBIConfig refuses fields that it does not have. Some common tests set these on every config, and save it.
        known = configuration_rbi._COMMON_CONFIG_KEYS | _FIELDS_SET_BY_COMMON_TESTS
        self.enterContext(patch.object(configuration_rbi, "_COMMON_CONFIG_KEYS", known))

    def test_config(self):
        written = json.loads(self.model_tester.get_config().to_json_string())
        names = RBIConfig.own_fields()
        fields = {name: written[name] for name in names if name in written}
        self.assertIn("backbone_config", fields)
        _configuration.ConfigTester(
            self, RBIConfig, has_text_modality=False, common_properties=names, **fields
        ).run_common_tests()

    def test_batching_equivalence(self):
        # In scope "batch" the answer for an image depends on the others: that is the method. It must not in "self".
        # The common test raises the epsilon of norms, which evens out differences; there is a sharper one elsewhere.
        self.model_tester.config.relation_scope = "self"
        super().test_batching_equivalence()

    def test_can_load_ignoring_mismatched_shapes(self):
        # To start from weights of almost nothing, the common test sets every field named "..._std" to a small number.
        # `image_std` is no such field, and takes a list: the backbone's fields alone are set.
        zero_init = _modeling._config_zero_init

        def zero_init_backbone(config):
            config = copy.deepcopy(config)
            config.backbone_config = zero_init(config.backbone_config)
            return config

        with patch.object(_modeling, "_config_zero_init", zero_init_backbone):
            super().test_can_load_ignoring_mismatched_shapes()

    def test_model_weights_reload_no_missing_tied_weights(self):
        # The common test loads a checkpoint without any weights. RBI refuses one that lacks the backbone's, or its
        # references...
        with self.assertRaisesRegex(ValueError, "lacks .* weights of the .* backbone|references, but .* hold none"):
            super().test_model_weights_reload_no_missing_tied_weights()
        # ... and, with that check off, reports what is missing like any model.
        with patch.object(RBIPreTrainedModel, "from_pretrained", PreTrainedModel.__dict__["from_pretrained"]):
            super().test_model_weights_reload_no_missing_tied_weights()


@pytest.mark.slow
class RBIWithViTTest(RBICommonTests, ModelTesterMixin, unittest.TestCase):
    model_attributes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "seq_length": 26}

    @staticmethod
    def make_config():
        backbone_config = ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=37,
            image_size=30,
            patch_size=6,
        )
        return RBIConfig.paper(backbone_config=backbone_config, num_attention_heads=2, relation_scope="batch")

    def setUp(self):
        super().setUp()
        # On the class it is False, as only some backbones have it, and an instance sets its own. The common tests read
        # the class, and would leave everything about gradient checkpointing out.
        self.enterContext(patch.object(RBIPreTrainedModel, "supports_gradient_checkpointing", True))

    def test_model_get_set_embeddings(self):
        # The common test expects an `nn.Embedding`; a vision transformer has patch embeddings.
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config())
            embeddings = model.base_model.backbone.embeddings
            self.assertIs(model.get_input_embeddings(), embeddings.patch_embeddings)
            new_embeddings = copy.deepcopy(embeddings.patch_embeddings)
            model.set_input_embeddings(new_embeddings)
            self.assertIs(embeddings.patch_embeddings, new_embeddings)
            self.assertIsNone(model.get_output_embeddings())


class RBIWithCNNTests(RBICommonTests):
    has_attentions = False
    # Two stages. The hidden states are feature maps, and the common tests look at the last two axes: height and width.
    model_attributes = {"num_hidden_layers": 2, "seq_length": 8, "hidden_size": 8}

    @unittest.skip("Opt-out: loads 28 times with either name of `dtype`, whatever the backbone; ViT's test does.")
    def test_bc_torch_dtype(self):
        pass

    @unittest.skip("Opt-out: convolutional backbones have no input embeddings, in transformers' own tests neither.")
    def test_model_get_set_embeddings(self):
        pass


class RBIWithConvNextTest(RBIWithCNNTests, ModelTesterMixin, unittest.TestCase):
    @staticmethod
    def make_config():
        backbone_config = ConvNextConfig(num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], image_size=32)
        return RBIConfig.kernel(backbone_config=backbone_config, num_attention_heads=2, relation_scope="batch")


@pytest.mark.slow
class RBIWithResNetTest(RBIWithCNNTests, ModelTesterMixin, unittest.TestCase):
    @staticmethod
    def make_config():
        backbone_config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
        return RBIConfig.paper(backbone_config=backbone_config, relation_scope="batch")


@pytest.mark.slow
class RBIWithReferencesTest(RBIWithCNNTests, ModelTesterMixin, unittest.TestCase):
    @staticmethod
    def make_config():
        backbone_config = ConvNextConfig(num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], image_size=32)
        references = {"num_references": 5, "image_shape": [3, 16, 16], "mean_similarity": 0.2}
        return RBIConfig.kernel(backbone_config=backbone_config, references=references, relation_scope="reference")

    def setUp(self):
        super().setUp()
        # The common tests make models of a config alone, whose references are all zero and of no backbone.
        self.enterContext(patch.object(RBIModel, "has_own_references", lambda model: True))
