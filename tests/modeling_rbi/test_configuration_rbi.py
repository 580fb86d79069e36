"""RBIConfig: what it takes, what it refuses, and that it comes back from a file as it went."""

import ast
import inspect
import json
import re
from dataclasses import fields

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    BertConfig,
    CLIPConfig,
    CLIPVisionConfig,
    ConvNextConfig,
    Dinov2WithRegistersConfig,
    ResNetConfig,
    SiglipConfig,
    SwinConfig,
    TimmWrapperConfig,
    ViTConfig,
)

from modeling_rbi import RBIConfig, RBIModel, UserError, configuration_rbi
from tests.modeling_rbi.shared import transformers_log


BACKBONE_CONFIGS = {
    "default": None,
    "convnext": ConvNextConfig(hidden_sizes=[4, 8, 12, 16], depths=[1, 1, 2, 1]),
    "vit": ViTConfig(hidden_size=12, num_hidden_layers=1, num_attention_heads=3, image_size=(32, 48)),
    "swin": SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[2, 2]),
    "clip_vision_model": CLIPVisionConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1),
    "dinov2_with_registers": Dinov2WithRegistersConfig(hidden_size=8, num_attention_heads=2, num_register_tokens=3),
    "timm_wrapper": TimmWrapperConfig(architecture="resnet10t", model_args={"drop_rate": 0.25}),
    "dict": {"model_type": "resnet", "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
}


def own_values(config):
    """The fields of RBI, the backbone's config as a dict."""
    values = {name: getattr(config, name) for name in RBIConfig.own_fields()}
    return values | {"backbone_config": values["backbone_config"].to_diff_dict()}


@pytest.mark.parametrize("preset", ["paper", "kernel"])
@pytest.mark.parametrize("backbone", BACKBONE_CONFIGS)
def test_save_and_load_round_trip(preset, backbone, tmp_path):
    config = getattr(RBIConfig, preset)(
        backbone_config=BACKBONE_CONFIGS[backbone],
        id2label={0: "sparrow", 1: "wren", 2: "robin"},
        relation_scope="batch",
        num_attention_heads=4,
        psnr_max=44,
        image_mean=(0.5, 0, 1),
    )
    config.save_pretrained(tmp_path)

    for loaded in (RBIConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is RBIConfig
        assert type(loaded.backbone_config) is type(config.backbone_config)
        assert own_values(loaded) == own_values(config)
        assert loaded.id2label == config.id2label and loaded.num_labels == 3
        assert loaded.to_json_string() == RBIConfig.from_dict(loaded.to_dict()).to_json_string()


# --- Classes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields_given", "named"),
    [
        ({"id2label": {1: "a", 2: "b", 3: "c"}}, "from 0 to 2, got 1, 2, 3"),
        ({"id2label": {"0": "a", "2": "b"}}, "from 0 to 1, got 0, 2"),
        ({"id2label": {-1: "a", 0: "b"}}, "from 0 to 1, got -1, 0"),
        ({"label2id": {"a": 1, "b": 2}}, "from 0 to 1, got 1, 2"),
        ({"id2label": {"cat": "0", "dog": "1"}}, "must be class numbers, got cat, dog"),
        ({"id2label": {0: "a", 1: "b", 2: "c"}, "num_labels": 5}, r"`num_labels` is 5.*3 classes \(a, b, c\)"),
        ({"label2id": {"a": 0, "b": 1}, "num_labels": 1}, r"`num_labels` is 1.*2 classes"),
    ],
)
def test_classes_that_contradict_each_other_are_refused(fields_given, named):
    for make in (RBIConfig, RBIConfig.paper, RBIConfig.kernel, lambda **fields: RBIConfig.from_dict(fields)):
        with pytest.raises((UserError, StrictDataclassError), match=named):
            make(**fields_given)


def test_a_config_that_numbers_its_classes_otherwise_is_neither_saved_nor_built(tmp_path):
    config = RBIConfig()
    config.id2label = {1: "a", 2: "b"}
    with pytest.raises((UserError, StrictDataclassError), match="from 0 to 1, got 1, 2"):
        config.save_pretrained(tmp_path)
    with pytest.raises((UserError, StrictDataclassError), match="from 0 to 1, got 1, 2"):
        RBIModel(config)


def test_names_and_numbers_of_classes_agree():
    names = {10: "k", **{label: chr(97 + label) for label in range(10)}}
    numbers = {name: label for label, name in names.items()}
    for config in (RBIConfig(id2label=names), RBIConfig(label2id=numbers), RBIConfig(id2label=names, num_labels=11)):
        assert list(config.id2label.items()) == sorted(names.items()) and config.label2id == numbers
    # Equal names as they are shown.
    assert RBIConfig(id2label={0: "a", 1: "b", 2: "a"}).label2id == {"a (0)": 0, "b": 1, "a (2)": 2}


def test_other_classes_at_loading_replace_all_names(tmp_path):
    RBIConfig(id2label={0: "a", 1: "b", 2: "c"}).save_pretrained(tmp_path)
    for load in (RBIConfig.from_pretrained, AutoConfig.from_pretrained):
        assert load(tmp_path, num_labels=2).id2label == {0: "LABEL_0", 1: "LABEL_1"}
        assert load(tmp_path, num_labels=3).id2label == {0: "a", 1: "b", 2: "c"}
        assert load(tmp_path, id2label={0: "d", 1: "e"}).label2id == {"d": 0, "e": 1}
        assert load(tmp_path, label2id={"d": 0, "e": 1}).id2label == {0: "d", 1: "e"}
        with pytest.raises((UserError, StrictDataclassError), match="`num_labels` is 5"):
            load(tmp_path, id2label={0: "d", 1: "e"}, num_labels=5)


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["crane", "dog", "crane", "owl"], "(crane (0), crane (2))"),
        (["crane"] * 9, "(crane (0), crane (1), crane (2), crane (3), crane (4) and 4 more)"),
        (["dog", ""], "((1))"),
        (["dog", "crane", "Crane", "crane (2)"], None),
    ],
)
def test_classes_of_one_name_are_kept_and_warned_of(names, shown, caplog, tmp_path):
    configuration_rbi.logger.warning_once.cache_clear()
    with transformers_log(caplog):
        config = RBIConfig(id2label=dict(enumerate(names)))
        assert ("have the same name" in caplog.text) == (shown is not None)
        assert shown is None or f"their numbers {shown}, but" in caplog.text
    config.save_pretrained(tmp_path)
    assert RBIConfig.from_pretrained(tmp_path).id2label == dict(enumerate(names))


# --- The backbone ----------------------------------------------------------------------------------------------------


def test_a_backbone_config_dict_becomes_the_config_of_its_class():
    config = RBIConfig(backbone_config=BACKBONE_CONFIGS["dict"])
    assert isinstance(config.backbone_config, ResNetConfig)
    assert config.backbone_config.hidden_sizes == [8, 16]


def test_presets_differ_in_what_their_table_says():
    paper, kernel = RBIConfig.paper(), RBIConfig.kernel()
    differing = {name for name in RBIConfig.own_fields() if name != "backbone_config"}
    differing = {name: (getattr(paper, name), getattr(kernel, name)) for name in differing}
    assert {name: pair for name, pair in differing.items() if pair[0] != pair[1]} == {
        "attention_type": ("dot_product", "cosine"),
        "relation_position_encoding": ("key_value", "bias"),
        "psnr_image_size": (None, 16),
        "self_relation": ("one", "nearest"),
        "residual_gate": ("learned", "none"),
        "head_initialization": ("standard", "identity"),
        "reference_share": (None, 0.25),
        "num_reference_neighbors": (None, 8),
        "reference_temperature": (None, 0.3),
        "reference_gain": (None, 1.0),
    }
    # Where the table says that something learned starts.
    assert kernel.attention_temperature == 0.2 and kernel.relation_gain == 0.5


def test_defaults_are_the_paper_preset_on_reduced_images():
    default, paper = own_values(RBIConfig()), own_values(RBIConfig.paper())
    assert {name for name in default if default[name] != paper[name]} == {"psnr_image_size"}


@pytest.mark.parametrize("preset", ["paper", "kernel"])
def test_any_field_of_a_preset_can_be_overridden(preset):
    other = getattr(RBIConfig, {"paper": "kernel", "kernel": "paper"}[preset])()
    names = [name for name in RBIConfig.own_fields() if name != "backbone_config"]
    config = getattr(RBIConfig, preset)(**{name: getattr(other, name) for name in names})
    assert own_values(config) == own_values(other)


@pytest.mark.parametrize("name", RBIConfig.own_fields())
def test_every_field_is_documented_with_its_default(name):
    # The class's own docstring: auto_docstring moves the fields to that of `__init__`.
    documentation = inspect.getdoc(RBIConfig) + inspect.cleandoc(RBIConfig.__init__.__doc__ or "")
    found = re.search(rf"^ *{name} \((.+)\):\n +(\S.*)", documentation, flags=re.MULTILINE)
    assert found, f"{name} is not documented"
    described_type, description = found.groups()
    assert "*optional*" in described_type and len(description.split()) > 2

    default = {field.name: field.default for field in fields(RBIConfig)}[name]
    documented = re.search(r"defaults to (?:a )?(.+)", described_type)
    if name == "backbone_config":
        assert documented.group(1) == f"`{type(RBIConfig().backbone_config).__name__}`"
    elif default is None:
        assert documented is None
    else:
        value = ast.literal_eval(documented.group(1).strip("`"))
        assert value == (list(default) if isinstance(default, tuple) else default)


WRONG_TYPES = {
    "backbone_config": ["convnext", 3],
    "feature_size": ["24", 24.0],
    "pooling": ["max", None],
    "num_attention_heads": ["3", 2.0, None],
    "attention_type": ["additive"],
    "attention_temperature": ["0.2", None],
    "attention_dropout": [None, "0"],
    "classifier_dropout": ["0"],
    "residual_gate": [True],
    "relation_position_encoding": ["value", None],
    "relation_gain": [[0.5]],
    "psnr_max": ["50"],
    "psnr_image_size": [16.0, (16, 16)],
    "self_relation": ["two"],
    "head_initialization": ["zeros"],
    "relation_scope": ["all", None],
    "references": [4, [1, 2]],
    "reference_share": ["0.25"],
    "num_reference_neighbors": ["3", 1.5],
    "reference_temperature": ["0.3"],
    "reference_gain": [[1.0]],
    "reference_vote_weight": ["0", None],
    "num_added_classes": ["1", 1.0, None],
    "image_mean": [0.5, ["a", "b", "c"], None],
    "image_std": [0.5, ["a", "b", "c"], None],
}


def test_every_field_has_a_wrong_type_tried():
    assert set(WRONG_TYPES) == set(RBIConfig.own_fields())


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG_TYPES.items() for value in values], ids=repr
)
def test_wrong_types_are_refused_by_name(name, value):
    with pytest.raises(StrictDataclassError, match=f"'{name}'"):
        RBIConfig(**{name: value})
    config = RBIConfig()
    with pytest.raises(StrictDataclassError, match=f"'{name}'"):
        setattr(config, name, value)


OUT_OF_RANGE = [
    ("num_attention_heads", 0),
    ("feature_size", 0),
    ("psnr_image_size", 0),
    ("psnr_image_size", -32),
    ("attention_dropout", 1.0),
    ("attention_dropout", -0.1),
    ("classifier_dropout", 1.5),
    ("attention_temperature", 0),
    ("attention_temperature", 0.009),
    ("attention_temperature", float("nan")),
    ("relation_gain", float("inf")),
    ("num_reference_neighbors", 0),
    ("reference_share", 0.0),
    ("reference_share", 1.1),
    ("reference_share", float("nan")),
    ("reference_temperature", 0.009),
    ("reference_temperature", float("nan")),
    ("reference_gain", float("inf")),
    ("reference_vote_weight", -0.1),
    ("reference_vote_weight", 1.0),
    ("num_added_classes", -1),
    ("num_added_classes", 5),
    ("psnr_max", 0),
    ("psnr_max", -50.0),
    ("psnr_max", float("nan")),
    ("psnr_max", float("inf")),
    ("image_mean", [0.5]),
    ("image_mean", [0.5, 0.5, float("nan")]),
    ("image_std", [0.5, 0.5]),
    ("image_std", [0.5, 0, 0.5]),
    ("image_std", [0.5, -0.5, 0.5]),
    ("image_std", [0.5, 0.5, float("inf")]),
]


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE, ids=repr)
def test_values_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(StrictDataclassError, match=f"`{name}`"):
        RBIConfig(**{name: value})


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE, ids=repr)
def test_values_set_out_of_range_are_refused_when_a_model_is_built(name, value, config):
    setattr(config, name, value)
    with pytest.raises(StrictDataclassError, match=f"`{name}`"):
        RBIModel(config)


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"feature_size": 10, "num_attention_heads": 3}, "`num_attention_heads` \\(3\\).* divide .*\\(10\\)"),
        ({"head_initialization": "identity", "residual_gate": "sum"}, "`head_initialization=.*`residual_gate="),
        ({"backbone_config": ConvNextConfig(num_channels=1)}, "`image_mean` has 3 values, but .* 1 channels"),
        (
            {"backbone_config": ConvNextConfig(num_channels=1), "image_mean": [0.5]},
            "`image_std` has 3 values, but .* 1 channels",
        ),
        ({"backbone_config": RBIConfig()}, "`backbone_config` is an RBIConfig"),
    ],
)
def test_impossible_combinations_are_refused_by_name(kwargs, named):
    with pytest.raises(StrictDataclassError, match=named):
        RBIConfig(**kwargs)


@pytest.mark.parametrize("config_class", [CLIPConfig, SiglipConfig])
def test_a_config_of_several_towers_is_refused_with_the_fix(config_class):
    full = config_class()
    with pytest.raises(StrictDataclassError, match=r"several towers.*`backbone_config\.vision_config`"):
        RBIConfig(backbone_config=full)
    assert RBIConfig(backbone_config=full.vision_config).backbone_config is full.vision_config


@pytest.mark.parametrize(
    ("backbone_config", "named"),
    [({}, '"model_type"'), ({"model_type": "convnxt"}, 'model_type "convnxt".*upgrade transformers')],
)
def test_a_backbone_dict_of_unknown_class_is_refused(backbone_config, named):
    with pytest.raises(ValueError, match=f"`backbone_config`.*{named}"):
        RBIConfig(backbone_config=backbone_config)


def test_heads_must_divide_the_measured_feature_size(backbone_config):
    config = RBIConfig(backbone_config=backbone_config, num_attention_heads=7)
    with pytest.raises(StrictDataclassError, match=r"`num_attention_heads` \(7\).*\(24\)"):
        RBIModel(config)


def test_a_text_backbone_is_refused_when_the_model_is_built():
    with pytest.raises(ValueError, match=r"`backbone_config` is a BertConfig, .* does not belong to a vision model"):
        RBIModel(RBIConfig(backbone_config=BertConfig()))


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("num_atention_heads", "num_attention_heads"),
        ("psnr_size", "psnr_image_size"),
        ("relation_gains", "relation_gain"),
        ("relation_position_encodings", "relation_position_encoding"),
        ("backbone", "backbone_config"),
        ("labels2id", "label2id"),
    ],
)
def test_an_unknown_field_is_refused_with_the_nearest(typo, meant):
    with pytest.raises(ValueError, match=f"no field `{typo}`: did you mean `{meant}`"):
        RBIConfig(**{typo: 1})


def test_an_unknown_field_near_to_none_is_answered_with_all():
    with pytest.raises(ValueError, match=r"no field `zzz`: its own fields are .*psnr_max"):
        RBIConfig(zzz=1)


@pytest.mark.parametrize("load", [RBIConfig.from_pretrained, AutoConfig.from_pretrained, RBIModel.from_pretrained])
def test_a_config_of_a_newer_version_is_refused_with_the_fix(load, tmp_path):
    RBIConfig.kernel().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"relation_bank_size": 4096}))
    with pytest.raises(ValueError, match=r"no field `relation_bank_size`.*newer version.*pip install -U modeling-rbi"):
        load(tmp_path)


def test_what_transformers_writes_into_a_config_is_no_unknown_field(config, tmp_path):
    # A model's config.json has more entries than a bare config's: architectures, dtype, auto_map.
    RBIModel(config).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert {"architectures", "auto_map", "dtype", "transformers_version"} <= set(written)
    loaded = RBIConfig.from_pretrained(tmp_path, output_attentions=True)
    assert own_values(loaded) == own_values(config) and loaded.feature_size == 24


def test_configs_do_not_share_their_lists():
    first, second = RBIConfig(), RBIConfig()
    first.image_mean[0] = 0.0
    first.backbone_config.hidden_sizes = [1]
    assert second.image_mean[0] == 0.485 and second.backbone_config.hidden_sizes != [1]


REFERENCES = {
    "num_references": 4,
    "image_shape": [3, 16, 16],
    "num_labeled": 3,
    "mean_similarity": 0.25,
    "strategy": "random",
    "per_class": None,
    "seed": 1,
}


@pytest.mark.parametrize("image_shape", [[3, 16, 16], None])
def test_references_come_back_from_a_file(config, tmp_path, image_shape):
    references = REFERENCES | {"image_shape": image_shape}
    config.references, config.relation_scope, config.num_reference_neighbors = references, "reference", 3
    config.save_pretrained(tmp_path)
    loaded = RBIConfig.from_pretrained(tmp_path)
    assert own_values(loaded) == own_values(config)
    assert loaded.references == references and loaded.num_reference_neighbors == 3
    without = RBIConfig.from_pretrained(tmp_path, references=None, relation_scope="self")
    assert without.references is None


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"relation_scope": "reference"}, "no reference bank.*`model.set_references"),
        ({"references": {}}, "lacks image_shape, mean_similarity, num_references"),
        ({"references": {"num_references": 3, "mean_similarity": 0.1}}, "`model.set_references.*lacks image_shape"),
        ({"references": REFERENCES | {"num_references": 0}}, "a `num_references` of at least 1"),
    ],
)
def test_references_that_cannot_be_are_refused(kwargs, named):
    with pytest.raises(StrictDataclassError, match=named):
        RBIConfig(**kwargs)


def test_a_scope_that_is_set_later_is_checked_when_the_model_is_built(config):
    config.relation_scope = "reference"
    with pytest.raises(StrictDataclassError, match="no reference bank"):
        RBIModel(config)


def test_the_path_of_the_backbone_is_not_saved(backbone_config, tmp_path):
    backbone_config._name_or_path = "/home/alice/checkpoint"
    RBIConfig(backbone_config=backbone_config).save_pretrained(tmp_path)
    assert "alice" not in (tmp_path / "config.json").read_text()


OLDER = """
{
  "architectures": ["RBIForImageClassification"],
  "attention_type": "cosine",
  "auto_map": {"AutoConfig": "configuration_rbi.RBIConfig"},
  "backbone_config": {
    "depths": [1, 1, 1, 1], "hidden_sizes": [8, 12, 16, 24], "image_size": 32, "model_type": "convnext"
  },
  "dtype": "float32",
  "feature_size": 24,
  "gather_across_processes": true,
  "id2label": {"0": "cat", "1": "dog"},
  "label2id": {"cat": 0, "dog": 1},
  "model_type": "rbi",
  "references": {
    "image_shape": [3, 16, 16], "mean_similarity": 0.25, "num_labelled": 4, "num_references": 6, "per_class": null,
    "seed": 0, "strategy": "random"
  },
  "relation_scope": "reference",
  "self_loss_weight": 0.5,
  "transformers_version": "5.17.0"
}
"""


def test_configs_of_older_versions_load(tmp_path):
    """They hold two fields that are attributes of the model, and another name of a fact about the references."""
    (tmp_path / "config.json").write_text(OLDER)
    config = RBIConfig.from_pretrained(tmp_path)
    assert config.attention_type == "cosine" and config.id2label == {0: "cat", 1: "dog"}
    assert config.references["num_labeled"] == 4 and config.references["num_references"] == 6
    assert config.references.keys() == REFERENCES.keys()
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert not {"gather_across_processes", "self_loss_weight"} & (written.keys() | vars(config).keys())
    assert "num_labelled" not in written["references"]
    model = RBIModel(config)
    assert model.gather_across_processes is False and model.self_loss_weight == 0.0


@pytest.mark.parametrize("name", ["gather_across_processes", "self_loss_weight"])
def test_what_belongs_to_a_training_run_is_no_field(name):
    with pytest.raises(ValueError, match=f"no field `{name}`"):
        RBIConfig(**{name: 0})
