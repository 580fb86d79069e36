# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Builds the folder of a publication, checks it, and uploads it to the Hub in one commit."""

import glob
import logging
import os
import re
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import CommitInfo, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, validate_repo_id
from PIL import Image
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from model_cards.card import (
    ASSESSMENT_DIR,
    EXAMPLES_DIR,
    FIGURES,
    CardArguments,
    CardSources,
    make_card,
    read_emissions,
)
from modeling_rbi import RBIForImageClassification, UserError

from ..data.decode import DEFAULT_MAX_PIXELS, MAX_ASPECT_RATIO, decode_image
from ..evaluation.classifiers import load_classifier, load_config
from ..evaluation.report import FILES as ASSESSMENT_FILES
from ..evaluation.report import PROGRAM as ASSESSMENT_PROGRAM
from ..evaluation.report import RESULTS_FILE
from ..files import read_json, write_json
from ..record import REFERENCES_FILE, RunRecord, weights_fingerprint
from .checks import (
    PICKLE_SUFFIXES,
    RefusedError,
    check_loads_back,
    find_local_paths,
    find_pickles,
    find_secrets,
    without_local_paths,
)


logger = logging.getLogger(__name__)

MODEL_CARDS = Path(__file__).parents[2] / "model_cards"
# Additional requirements of timm backbones.
TIMM_REQUIREMENTS = "timm>=1.0.23\ntorchvision>=0.25\n"
_EXAMPLE_SIZE = 512
_MOST_EXAMPLES = 8
# Paths of a publication. All other files of a repository belong to someone else and stay.
_PUBLISHED = re.compile(
    r"README\.md|requirements\.txt|handler\.py|\w+_rbi\.py|(?:preprocessor_)?config\.json"
    r"|model(?:-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
    rf"|{EXAMPLES_DIR}/[^/]+\.png|{ASSESSMENT_DIR}/[^/]+\.(?:png|csv|json)"
)
# Files that transformers would load instead of the published ones, or together with them.
_TAKES_PRECEDENCE = {"adapter_config.json", "processor_config.json"}
_SIZE = re.compile(r"\d+(?:\.\d+)?[KMGT]i?B", flags=re.IGNORECASE)
# Errors of the client's HTTP library when the Hub does not respond.
_NO_ANSWER = tuple(base for base in HfHubHTTPError.__mro__ if base.__module__.startswith("httpx"))


@dataclass
class PublicationArguments:
    """Arguments of `training.publish`."""

    model: str = field(metadata={"help": "Folder of a trained RBI model."})
    repo_id: str = field(metadata={"help": "Hub repository, user/name. It is created if it does not exist."})
    assessment: str | None = field(default=None, metadata={"help": "Output folder of training.assess for this model."})
    examples: list[str] | None = field(
        default=None,
        metadata={"help": "Public example images for the model page: files, folders, or `none`."},
    )
    share_images: bool = field(
        default=False,
        metadata={
            "help": "Allow everyone to see the thumbnails in the model's reference bank and the assessment's figure "
            "of confused images. Required for a bank with thumbnails, unless the repository is private."
        },
    )
    private: bool = field(default=False, metadata={"help": "Create a private repository."})
    revision: str = field(default="main", metadata={"help": "Branch to commit to. It must exist."})
    commit_message: str | None = field(default=None, metadata={"help": "Message of the commit."})
    max_shard_size: str = field(
        default="5GB", metadata={"help": "Largest size of a weights file; larger weights are split."}
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Write the folder to --output_dir and check it, without uploading."}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for --dry_run (default: outputs/publish/ and the repository's name)."}
    )

    def __post_init__(self):
        try:
            validate_repo_id(self.repo_id)
        except HFValidationError as error:
            raise UserError(f"--repo_id {self.repo_id}: {error}") from error
        if self.repo_id.count("/") != 1:
            raise UserError(f"--repo_id {self.repo_id} must be of the form user/name.")
        if not _SIZE.fullmatch(self.max_shard_size):
            raise UserError(f"--max_shard_size {self.max_shard_size} is not a size such as 5GB or 500MB.")
        if self.output_dir is not None and not self.dry_run:
            raise UserError("--output_dir goes with --dry_run: an upload keeps no local folder.")
        if self.output_dir is None:
            self.output_dir = os.path.join("outputs", "publish", self.repo_id.split("/")[1])


@dataclass(frozen=True)
class Publication:
    """A written folder, its sources, and the problems that prevent its publication."""

    folder: Path
    model: RBIForImageClassification
    image_processor: BaseImageProcessor
    examples: list[Path]
    problems: list[str]

    def check_loads_back(self):
        """Calls [`check_loads_back`] on the folder with its example images."""
        check_loads_back(self.folder, self.model, self.image_processor, self.examples)


def check_destination(args: PublicationArguments, api: HfApi) -> None:
    r"""
    Checks that the user may write to the repository, before any work is done.

    Raises:
        RefusedError: if the token is missing, unknown to the Hub or read-only, if the repository has another owner,
            if `--private` or `--revision` contradicts its current state, or if it holds files that must not lie
            beside a publication.
        OSError: if the Hub cannot be reached.
    """
    if api.token is None and get_token() is None:
        raise RefusedError("There is no Hub token: run `hf auth login` or set HF_TOKEN. --dry_run needs no token.")
    try:
        user = api.whoami()
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code == 401:
            raise RefusedError(
                "The Hub does not know the token (it is wrong or expired): run `hf auth login`."
            ) from error
        raise
    except _NO_ANSWER as error:
        raise ConnectionError(f"{api.endpoint} does not respond ({error}).") from error
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise RefusedError(
            "The token is read-only: create one with write access, on https://huggingface.co/settings/tokens."
        )
    owner = args.repo_id.split("/")[0]
    organizations = [each["name"] for each in user.get("orgs", []) if each.get("roleInOrg") != "read"]
    owners = [user["name"], *organizations]
    if owner.lower() not in (name.lower() for name in owners):
        raise RefusedError(
            f"--repo_id {args.repo_id}: the token belongs to {user['name']} and cannot write to {owner}, only to "
            f"{', '.join(owners)}."
        )
    try:
        info = api.model_info(args.repo_id)
    except RepositoryNotFoundError:
        if args.revision != "main":
            raise RefusedError(
                f"--revision {args.revision}: {args.repo_id} does not exist yet, so its only branch is main."
            ) from None
        return
    if args.private and not info.private:
        raise RefusedError(
            f"{args.repo_id} exists and is public, which --private does not change: change its visibility in its "
            "settings, or name another repository."
        )
    if not api.revision_exists(args.repo_id, args.revision):
        raise RefusedError(
            f"--revision {args.revision}: {args.repo_id} has no such branch. Create it with `hf repos branch "
            f"create {args.repo_id} {args.revision}`."
        )
    names = api.list_repo_files(args.repo_id, revision=args.revision)
    unfit = [
        name
        for name in names
        if Path(name).suffix in PICKLE_SUFFIXES or Path(name).name == ".env" or name in _TAKES_PRECEDENCE
    ]
    if unfit:
        raise RefusedError(
            f"{args.repo_id} holds {', '.join(unfit)}: pickles, secrets, or files that would be loaded instead of the "
            f"published ones. Name another repository, or delete them: `hf repos delete-files {args.repo_id} "
            f"{' '.join(map(shlex.quote, unfit))}`."
        )


def make_folder(args: PublicationArguments, given: CardArguments, folder: Path) -> Publication:
    r"""
    Writes all files of a publication.

    Args:
        args (`PublicationArguments`):
            Arguments of the command.
        given (`CardArguments`):
            Facts for the card that the records do not contain.
        folder (`Path`):
            An empty folder.

    Returns:
        `Publication`: the folder, and the problems that prevent its publication.

    Raises:
        UserError: if model, records, images and arguments contradict each other.
        OSError: if a file cannot be read or written.
    """
    model, image_processor = load_published_model(args.model)
    source = Path(args.model)
    problems = []
    references = None if model.config.references is None else model.describe_references()
    may_be_seen = args.share_images or args.private
    if references is not None and references["has_images"] and not may_be_seen:
        problems.append(
            f"The model contains thumbnails of {references['num_references']} images, which everyone could see: pass "
            "--share_images if they may be public, pass --private, or make the references with --keep_images False."
        )
    assessment, figures = None, []
    if args.assessment is not None:
        assessment = read_assessment(Path(args.assessment), model)
        figures = [name for name in FIGURES if (Path(args.assessment) / name).exists()]
        if not may_be_seen:
            figures = [name for name in figures if name != "confused_pairs.png"]
    examples = _read_examples(args.examples)
    reference_record = read_json(source / REFERENCES_FILE, "record of references")
    run = RunRecord.read(source) or (reference_record or {}).get("run")

    model.save_pretrained(folder, max_shard_size=args.max_shard_size)
    image_processor.save_pretrained(folder)
    shutil.copyfile(MODEL_CARDS / "handler.py", folder / "handler.py")
    (folder / "requirements.txt").write_text(requirements(model.rbi.backbone.config.model_type), encoding="utf-8")
    if examples:
        (folder / EXAMPLES_DIR).mkdir()
        for name, image in examples.items():
            image.save(folder / EXAMPLES_DIR / name)
    if args.assessment is not None:
        (folder / ASSESSMENT_DIR).mkdir()
        for name in (*figures, *(name for name in ASSESSMENT_FILES if name.endswith(".csv"))):
            shutil.copyfile(Path(args.assessment) / name, folder / ASSESSMENT_DIR / name)
        write_json(folder / ASSESSMENT_DIR / RESULTS_FILE, without_local_paths(assessment))
    sources = CardSources(
        repo_id=args.repo_id,
        config=model.config,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        requirements=requirements(model.rbi.backbone.config.model_type).splitlines(),
        references=references,
        run=run,
        reference_record=reference_record,
        assessment=assessment,
        figures=figures,
        examples=list(examples),
        has_examples=args.examples != ["none"],
        emissions=read_emissions(source),
    )
    try:
        card, missing = make_card(sources, given)
    except KeyError as error:
        raise UserError(
            f"run.json or {REFERENCES_FILE} beside the model, or the assessment, lacks {error}: it was changed, or "
            "written by another version. Create it again."
        ) from error
    (folder / "README.md").write_text(str(card) + "\n", encoding="utf-8")
    problems += [f"The card lacks {fact}" for fact in missing]
    problems += find_secrets(folder) + find_local_paths(folder, source) + find_pickles(folder)
    return Publication(folder, model, image_processor, [folder / EXAMPLES_DIR / name for name in examples], problems)


def publish(args: PublicationArguments, publication: Publication, api: HfApi) -> CommitInfo:
    r"""
    Uploads a folder to the Hub in one commit, if it loads in a fresh process. Files that arrived before an
    interruption are not uploaded again.

    Raises:
        RefusedError: if the publication has problems or does not load.
        OSError: if the Hub refuses the upload or the connection fails. Nothing was published then, unless the final
            commit had just gone through.
    """
    if publication.problems:
        raise RefusedError("\n".join(publication.problems))
    publication.check_loads_back()
    try:
        _check_card(publication.folder, api)
        api.create_repo(args.repo_id, private=args.private or None, exist_ok=True)
        # Delete the files of an earlier publication that this one does not have.
        there = filter(_PUBLISHED.fullmatch, api.list_repo_files(args.repo_id, revision=args.revision))
        return api.upload_folder(
            repo_id=args.repo_id,
            folder_path=publication.folder,
            revision=args.revision,
            commit_message=args.commit_message or f"Publish {args.repo_id.split('/')[1]}",
            delete_patterns=[glob.escape(name) for name in there],
        )
    except HfHubHTTPError:
        raise
    # The client raises RuntimeError if the upload of a large file fails.
    except (RuntimeError, *_NO_ANSWER) as error:
        reason = f"{error} ({error.__cause__})" if error.__cause__ else str(error)
        raise ConnectionError(
            f"The upload was interrupted: {reason} Nothing was published, unless the final commit had just gone "
            "through. Run the same command again to continue."
        ) from error


def _check_card(folder: Path, api: HfApi):
    """Lets the Hub validate the card before the repository is created."""
    content = {"repoType": "model", "content": (folder / "README.md").read_text(encoding="utf-8")}
    headers = build_hf_headers(token=api.token)
    response = get_session().post(f"{api.endpoint}/api/validate-yaml", json=content, headers=headers)
    if response.status_code == 400:
        errors = [each["message"] for each in response.json()["errors"]]
        raise RefusedError(f"The Hub does not accept the card: {' '.join(errors)}")
    hf_raise_for_status(response)


def is_publication(folder: Path) -> bool:
    """Whether a folder holds a publication, as a dry run writes it, and nothing else."""
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    return {"README.md", "handler.py", "config.json"} <= names and all(map(_PUBLISHED.fullmatch, names))


def left_out(source: Path, publication: Publication) -> list[str]:
    """Names of the files and folders beside the model that are not published."""
    return sorted(path.name for path in source.iterdir() if not (publication.folder / path.name).exists())


def load_published_model(folder: str) -> tuple[RBIForImageClassification, BaseImageProcessor]:
    r"""
    Loads the model to publish and its image processor.

    Raises:
        UserError: if the folder does not hold an RBI model in safetensors files, or lacks its image processor.
        OSError: if a file cannot be read.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"--model {folder}: there is no such folder.")
    if not (path / "config.json").exists():
        raise UserError(f"--model {folder} has no config.json: it was not written by `save_pretrained`.")
    config = load_config(folder)
    if config.model_type != "rbi":
        raise UserError(
            f"--model {folder} is a {config.model_type} model, not RBI. "
            "`RBIForImageClassification.from_image_classifier` converts it."
        )
    if not (path / "preprocessor_config.json").exists():
        raise UserError(
            f"--model {folder} has no preprocessor_config.json, which users of the model need: save it "
            "there with `image_processor.save_pretrained`."
        )
    if not any(path.glob("*.safetensors")):
        pickles = sorted(each.name for each in path.iterdir() if each.suffix in PICKLE_SUFFIXES)
        found = f" (only pickles, which are not read: {', '.join(pickles)})" if pickles else ""
        raise UserError(f"--model {folder} has no weights in safetensors files{found}.")
    if len(config.image_mean) == 1:
        raise UserError(
            f"--model {folder} takes images of one channel, but `pipeline` and the Hub's widgets convert "
            "all images to RGB. Publish a model of three channels."
        )
    model, image_processor = load_classifier(folder, "main", config)
    return model, image_processor


def read_assessment(folder: Path, model: PreTrainedModel) -> dict[str, Any]:
    r"""
    Reads the assessment of a model.

    Raises:
        UserError: if the folder holds no assessment, or that of other weights.
    """
    content = read_json(folder / RESULTS_FILE, "assessment")
    if content is None or content.get("program") != ASSESSMENT_PROGRAM:
        raise UserError(f"--assessment {folder} is not an output folder of training.assess.")
    if content["model"].get("weights") != weights_fingerprint(model):
        raise UserError(
            f"--assessment {folder} assessed a model with other weights or references ({content['model']['name']}): "
            "assess this model."
        )
    return content


def requirements(backbone_type: str) -> str:
    """Requirements of an endpoint for a model with a backbone of this type."""
    common = (MODEL_CARDS / "requirements.txt").read_text(encoding="utf-8")
    return common + (TIMM_REQUIREMENTS if backbone_type == "timm_wrapper" else "")


def _read_examples(names: Sequence[str] | None) -> dict[str, Image.Image]:
    """Example images by file name, scaled down and without metadata, such as the location."""
    if names is None or list(names) == ["none"]:
        return {}
    paths = [path for name in names for path in _images_of(Path(name))]
    if len(paths) > _MOST_EXAMPLES:
        raise UserError(f"--examples names {len(paths)} images; at most {_MOST_EXAMPLES} are allowed.")
    examples: dict[str, Image.Image] = {}
    stems = [path.stem for path in paths]
    for path in paths:
        image = decode_image(str(path), max_pixels=DEFAULT_MAX_PIXELS)
        if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
            raise UserError(
                f"{path} has {image.width} x {image.height} pixels, one side more than {MAX_ASPECT_RATIO} times "
                "the other, which endpoints refuse: crop it."
            )
        image.thumbnail((_EXAMPLE_SIZE, _EXAMPLE_SIZE))
        # Images in class folders often have the same names.
        stem = path.stem if stems.count(path.stem) == 1 else f"{path.parent.name}_{path.stem}"
        name = re.sub(r"[^\w.-]", "_", stem) + ".png"
        if name in examples:
            raise UserError(f"--examples has two images named {name}: rename one.")
        examples[name] = Image.fromarray(np.asarray(image))
    return examples


def _images_of(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(each for each in path.iterdir() if each.is_file() and not each.name.startswith("."))
        if not found:
            raise UserError(f"--examples {path} is an empty folder.")
        return found
    if not path.exists():
        raise UserError(f"--examples {path}: there is no such image.")
    return [path]


def describe(folder: Path) -> str:
    """The files of a folder with their sizes in bytes, one per line."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return "\n".join(f"{path.stat().st_size:>13,}  {path.relative_to(folder)}" for path in paths)
