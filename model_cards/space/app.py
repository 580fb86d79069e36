# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""A Gradio app that shows the answers of an RBI model and the relations behind them.

The environment variable MODEL_ID names the model, a repository on the Hub or a folder. Without it, the app takes the
first entry of `models:` in the README.md in this folder. MODEL_REVISION selects a branch, tag or commit.
"""

import os


# Gradio reads this when it is imported. The app only connects to the Hub, to download the model.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import base64
import html
import importlib
import io
import re
import string
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from gradio.utils import get_upload_folder
from huggingface_hub import metadata_load, snapshot_download
from PIL import Image, PngImagePlugin
from safetensors import SafetensorError
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedConfig


NUM_CLASSES = 5
NUM_REFERENCES = 6
# Smaller attention would be shown as 0.0%.
SHOWN = 0.0005
MAX_IMAGES = 16
MAX_EXAMPLES = 8
MAX_PIXELS = 100_000_000
# Resizing the shorter side of a narrow image to the model's size makes the longer side, and the memory, enormous.
MAX_ASPECT_RATIO = 100
MAX_FILE_SIZE = "20mb"
# Only common formats: each further decoder is one more that a stranger's file can attack.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
# A long text in a PNG file does not make its pixels unreadable.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
# Uploads older than this many seconds are deleted. The check runs equally often.
UPLOADS_KEPT = 3600
THUMBNAIL = 96

CSS = """
#image img { width: 100%; height: 100%; object-fit: contain; }
.rbi-cards { display: flex; flex-wrap: wrap; gap: 12px; margin: 8px 0; padding: 0; list-style: none; }
.rbi-cards li { width: 104px; margin: 0; font-size: 13px; line-height: 1.35; overflow-wrap: anywhere; }
.rbi-cards img, .rbi-cards .rbi-none { width: 104px; height: 104px; object-fit: contain; border-radius: 6px;
  margin: 0 0 4px; background: var(--background-fill-secondary); border: 1px solid var(--border-color-primary); }
.rbi-cards .rbi-none { display: flex; align-items: center; justify-content: center; text-align: center; }
.rbi-cards .rbi-none, .rbi-subtitle { opacity: 0.75; }
.rbi-cards .rbi-itself img { border: 2px solid var(--primary-500); }
.rbi-bar { height: 5px; border-radius: 3px; background: var(--border-color-primary); margin-top: 3px; }
.rbi-bar div { height: 5px; border-radius: 3px; background: var(--primary-500); }
.rbi-scroll { overflow-x: auto; }
.rbi-map { border: 0; border-collapse: separate; border-spacing: 2px; font-size: 13px; }
.rbi-map caption { text-align: left; padding-bottom: 6px; }
.rbi-map th { font-weight: 500; padding: 2px 4px; text-align: center; border: 0; }
.rbi-map tbody th { text-align: right; white-space: nowrap; }
.rbi-map th span { display: inline-block; max-width: 130px; overflow: hidden; text-overflow: ellipsis;
  vertical-align: middle; }
.rbi-map img { width: 36px; max-width: none; height: 36px; object-fit: cover; border-radius: 4px;
  display: inline-block; vertical-align: middle; margin: 0 0 0 6px; }
.rbi-map thead img { margin: 0 auto; display: block; }
.rbi-map td { min-width: 44px; height: 36px; text-align: center; border: 0; border-radius: 4px; padding: 2px 4px;
  background: color-mix(in srgb, var(--primary-500) calc(var(--shade) * 65%), var(--background-fill-secondary)); }
.rbi-map td.rbi-own { background: none; color: var(--body-text-color-subdued); }
"""


@dataclass(frozen=True)
class Reference:
    """A reference of the model and the attention in [0, 1] that an image pays to it."""

    number: int
    label: str
    attention: float
    image: Image.Image | None


@dataclass(frozen=True)
class Answer:
    """
    Scores of an image's classes without and with references, and its attention to them. If the model has no bank,
    only `without_references` is set.
    """

    without_references: dict[str, float]
    with_references: dict[str, float] | None = None
    attention_to_itself: float = 1.0
    nearest: tuple[Reference, ...] = ()
    attention_to_others: float = 0.0


@dataclass(frozen=True)
class Comparison:
    """
    Class scores of B images without neighbors (`single`) and as one batch (`batch`), `(B, num_labels)`; the attention
    of each image to each, `(B, B)`, whose rows sum to 1; and the relations p between them, `(B, B)` in [0, 1], or
    `None` for a model without relation position encoding.
    """

    single: torch.Tensor
    batch: torch.Tensor
    attention: torch.Tensor
    relations: torch.Tensor | None


class Classifier:
    r"""
    An RBI image classifier with its image processor and example images.

    Args:
        name (`str`):
            A repository on the Hub or a folder.
        revision (`str`, *optional*):
            Branch, tag or commit of the repository.

    Raises:
        ValueError: if the folder does not exist or does not hold a trained RBI model that chooses one of its classes,
            or the model's code is older than this app.
        OSError: if the repository does not exist, the Hub cannot be reached, or a file of the model is broken.
    """

    def __init__(self, name: str, revision: str | None = None):
        folder = _fetch(name, revision)
        self.is_of_hub = not Path(name).is_dir()
        self.name = name if self.is_of_hub else folder.name
        _check_config(folder, name)
        self.image_processor = AutoImageProcessor.from_pretrained(folder)
        try:
            self.model, info = AutoModelForImageClassification.from_pretrained(
                folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
            )
        except (RuntimeError, SafetensorError) as error:
            raise ValueError(f"The weights of {name} cannot be read: {error}") from error
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"{name} lacks {len(missing)} weights, such as `{missing[0]}`: save the model again.")
        problem_type = self.model.config.problem_type
        if problem_type not in (None, "single_label_classification") or self.model.config.num_labels < 2:
            raise ValueError(f"{name} does not choose one of several classes, which this app needs.")
        self.upright_rgb = _find_decoder(self.model, name)
        self.model = self.model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        self.mode = "L" if len(self.model.config.image_mean) == 1 else "RGB"
        self.bank = self.model.base_model.references
        paths = sorted((folder / "examples").glob("*"))
        self.examples = [str(path) for path in paths if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")]

    def label(self, number: int) -> str:
        """The name of a class, with its number if others have the same name."""
        return self.model.class_names[number]

    @torch.inference_mode()
    def outputs(self, images: Sequence[Image.Image], *scopes: str) -> list[Any]:
        """The model's outputs for a batch, one per relation scope, including relations. The backbone runs once."""
        converted = [image.convert(self.mode) for image in images]
        pixel_values = self.image_processor(converted, return_tensors="pt")["pixel_values"]
        pixel_values = pixel_values.to(self.model.device, self.model.dtype)
        features, _ = self.model.base_model.extract_features(pixel_values)
        return [
            self.model(pixel_values, image_features=features, relation_scope=scope, output_relations=True)
            for scope in scopes
        ]

    def classify(self, image: Image.Image) -> Answer:
        """The answer for a single RGB image."""
        if self.bank is None:
            return Answer(self._scores(self.outputs([image], "self")[0]))
        without, related = self.outputs([image], "self", "reference")
        attention = related.relation_attentions[0].mean(0).cpu()
        values, rows = attention[1:].topk(min(NUM_REFERENCES, len(attention) - 1))
        nearest = tuple(
            self._reference(row, value)
            for row, value in zip(rows.tolist(), values.tolist(), strict=True)
            if value >= SHOWN
        )
        to_others = max(0.0, float(attention[1:].sum()) - sum(each.attention for each in nearest))
        return Answer(self._scores(without), self._scores(related), float(attention[0]), nearest, to_others)

    def compare(self, images: Sequence[Image.Image]) -> Comparison:
        """The answers for several RGB images, without neighbors and as one batch."""
        single, batch = self.outputs(images, "self", "batch")
        relations = batch.relation_similarities
        return Comparison(
            single.logits.softmax(-1).cpu(),
            batch.logits.softmax(-1).cpu(),
            batch.relation_attentions.mean(1).cpu(),
            None if relations is None else relations.cpu(),
        )

    def _scores(self, outputs: Any) -> dict[str, float]:
        """Names and scores of the most likely classes of a single image, highest score first."""
        values, classes = outputs.logits[0].softmax(-1).topk(min(NUM_CLASSES, outputs.logits.shape[-1]))
        return {self.label(number): value for number, value in zip(classes.tolist(), values.tolist(), strict=True)}

    def _reference(self, row: int, attention: float) -> Reference:
        number = int(self.bank.labels[row])
        image = None
        if self.bank.images is not None:
            pixels = self.bank.images[row].permute(1, 2, 0).cpu().numpy()
            image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
        return Reference(row, self.label(number) if number >= 0 else "no label", attention, image)


def _fetch(name: str, revision: str | None) -> Path:
    """The model's folder. A single download makes sure that weights, code and examples are of the same commit."""
    if Path(name).is_dir():
        return Path(name).resolve()
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"There is no folder {name}.")
    patterns = ["*.json", "*.safetensors", "*.py", "examples/*"]
    return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))


def _check_config(folder: Path, name: str):
    """Refuses other kinds of models. Runs before any code of the model."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{name} is not a saved model: it has no config.json.")
    config, _ = PreTrainedConfig.get_config_dict(folder)
    if config.get("model_type") != "rbi":
        raise ValueError(
            f'{name} is a model of type "{config.get("model_type")}", but this app needs an RBI model: make one from '
            "an image classifier with `RBIForImageClassification.from_image_classifier`."
        )
    if config.get("architectures") != ["RBIForImageClassification"]:
        raise ValueError(f"{name} has no classifier: save an RBIForImageClassification.")


def _find_decoder(model: Any, name: str) -> Callable[..., Image.Image]:
    """The function of the model's own code that decodes images as in training."""
    package = type(model).__module__.rpartition(".")[0]
    try:
        return importlib.import_module(f"{package}.image_processing_rbi").upright_rgb
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"The code of {name} is older than this app and cannot decode images: load the model with the current "
            "package, save it and publish it again."
        ) from error


def uploaded(path: str | None) -> str:
    r"""
    The path of an upload or an example (Gradio copies the examples to the uploads).

    A client of the API can send any path, and Gradio does not check paths without `meta`.

    Args:
        path (`str`, *optional*):
            Path of the file, as the client sent it.

    Raises:
        gr.Error: if there is no such file in the folder of uploads. The message does not depend on other folders.
    """
    folder = Path(os.path.abspath(get_upload_folder()))
    try:
        named = Path(os.path.abspath(path or ""))
        # Paths outside the folder are not accessed at all, not even to follow a link.
        if named.is_relative_to(folder):
            file = named.resolve()
            if file.is_relative_to(folder.resolve()) and file.is_file():
                return str(file)
    # Raised for circular links and for names that no file can have.
    except (OSError, RuntimeError, ValueError):
        pass
    raise _error("This upload does not exist or was deleted: upload the image again.")


def read_image(path: str, upright_rgb: Callable[..., Image.Image]) -> Image.Image:
    r"""
    Decodes an uploaded image to RGB as in training.

    Args:
        path (`str`):
            Path of the file.
        upright_rgb (`Callable`):
            The model's own function for that, see [`Classifier`].

    Raises:
        gr.Error: if the file is not an image, is broken, too large or too narrow, or has pixels that are not finite.
            The message names the file and says what to do.
    """
    name = html.escape(Path(path).name)
    is_too_large = is_too_narrow = False
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            is_too_large = width * height > MAX_PIXELS
            is_too_narrow = max(width, height) > MAX_ASPECT_RATIO * min(width, height)
            if not (is_too_large or is_too_narrow):
                image.load()
    except Image.DecompressionBombError:
        is_too_large = True
    except Image.UnidentifiedImageError:
        raise _error(
            f"{name} is not an image of a known format: upload a PNG, JPEG, WebP, GIF, BMP or TIFF."
        ) from None
    # Pillow's decoders raise errors of many types for broken files.
    except Exception:
        raise _error(f"{name} is broken or cut off: save it again, or upload another image.") from None
    if is_too_large:
        raise _error(f"{name} has more than {MAX_PIXELS:,} pixels: upload a smaller copy.")
    if is_too_narrow:
        raise _error(f"{name}, {width} x {height} pixels, is too narrow: crop it to the part that matters.")
    try:
        return upright_rgb(image, max_pixels=MAX_PIXELS, name=name)
    except ValueError as error:
        raise _error(f"{error} Upload it as a PNG or JPEG of 8 bits.") from None


def _error(message: str) -> gr.Error:
    # A mistake of the user is not a failure of the app, so it is not logged.
    return gr.Error(message, duration=None, print_exception=False)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _image_tag(image: Image.Image, alt: str) -> str:
    """An image embedded in the page, scaled to a thumbnail."""
    scale = THUMBNAIL / max(image.size)
    size = [max(1, round(scale * length)) for length in image.size]
    buffer = io.BytesIO()
    image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(buffer, "PNG")
    return f'<img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}" alt="{html.escape(alt)}">'


def _card(image: str, title: str, subtitle: str, share: float, kind: str = "") -> str:
    return (
        f'<li class="{kind}">{image}<div>{html.escape(title)}</div><div class="rbi-subtitle">{subtitle}</div>'
        f"<div><b>{_percent(share)}</b></div>"
        f'<div class="rbi-bar"><div style="width: {100 * share:.1f}%"></div></div></li>'
    )


def attention_html(answer: Answer, image: Image.Image) -> str:
    r"""
    The section of the page that shows the attention of a single image.

    Args:
        answer (`Answer`):
            Answer with references.
        image (`PIL.Image.Image`):
            The classified image.
    """
    tag = _image_tag(image, "your image")
    cards = [_card(tag, "your image", "itself", answer.attention_to_itself, "rbi-itself")]
    for reference in answer.nearest:
        number = reference.number + 1
        if reference.image is None:
            tag = '<div class="rbi-none">no thumbnail stored</div>'
        else:
            tag = _image_tag(reference.image, f"reference {number}")
        cards.append(_card(tag, reference.label, f"reference {number}", reference.attention))
    rest = ""
    if answer.attention_to_others >= SHOWN:
        rest = f"<p>All other references together: <b>{_percent(answer.attention_to_others)}</b></p>"
    (before, score_before), *_ = answer.without_references.items()
    (after, score_after), *_ = (answer.with_references or answer.without_references).items()
    without, within = f"{_percent(score_before)} without them", f"{_percent(score_after)} with them"
    before, after = html.escape(before), html.escape(after)
    if before == after:
        change = f"do not change the answer <b>{after}</b>: {without}, {within}"
    else:
        change = f"change the answer from <b>{before}</b> ({without}) to <b>{after}</b> ({within})"
    return (
        f"<h3>Where the attention goes</h3><p>The references {change}.</p>"
        f'<ul class="rbi-cards">{"".join(cards)}</ul>{rest}'
    )


def map_html(comparison: Comparison, images: Sequence[Image.Image], names: Sequence[str]) -> str:
    r"""
    The heat map of the relations between images, or of the attention between them if the model has no relations.

    Args:
        comparison (`Comparison`):
            The answers for the images.
        images (`Sequence[PIL.Image.Image]`):
            The images.
        names (`Sequence[str]`):
            Names of the images.
    """
    if comparison.relations is None:
        values, title = comparison.attention, "Attention of each row's image to each column's image"
        explanation = "each row, including the attention to the image itself, sums to 1."
    else:
        values, title = comparison.relations, "Relation p of each pair of images"
        explanation = (
            "computed from the PSNR of their pixels: 1 for identical images, lower the more they differ. The model "
            "combines it with the similarity of their features; the table shows where the attention goes."
        )
    others = values[~torch.eye(len(values), dtype=torch.bool)]
    low, high = float(others.min()), float(others.max())
    shades = (values - low) / max(high - low, 1e-6)
    tags = [_image_tag(image, "") for image in images]
    heads = "".join(f'<th scope="col">{tag}{number}</th>' for number, tag in enumerate(tags, 1))
    rows = []
    for row, (tag, name) in enumerate(zip(tags, names, strict=True)):
        cells = "".join(
            '<td class="rbi-own">-</td>'
            if row == column and comparison.relations is not None
            else f'<td style="--shade: {min(1.0, max(0.0, float(shades[row, column]))):.3f}">{float(value):.2f}</td>'
            for column, value in enumerate(values[row])
        )
        name = html.escape(name)
        rows.append(f'<tr><th scope="row" title="{name}"><span>{row + 1} {name}</span>{tag}</th>{cells}</tr>')
    return (
        f'<div class="rbi-scroll" tabindex="0" role="region" aria-label="{html.escape(title)}"><table class="rbi-map">'
        f"<caption><b>{title}</b>, {explanation}</caption>"
        f'<thead><tr><td class="rbi-own"></td>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


TABLE_HEADERS = [
    "No.",
    "Image",
    "On its own",
    "Score",
    "With the others",
    "Score",
    "Attention to itself",
    "Attends most to",
]


def table_rows(comparison: Comparison, names: Sequence[str], classifier: Classifier) -> list[list[str]]:
    """The rows of the table of answers, one per image."""
    rows = []
    for row, name in enumerate(names):
        cells = [str(row + 1), name]
        for scores in (comparison.single[row], comparison.batch[row]):
            cells += [classifier.label(int(scores.argmax())), _percent(float(scores.max()))]
        attention = comparison.attention[row].clone()
        to_itself = float(attention[row])
        attention[row] = -1.0
        nearest = int(attention.argmax())
        cells += [_percent(to_itself), f"{nearest + 1} {names[nearest]} ({_percent(float(attention[nearest]))})"]
        rows.append(cells)
    return rows


def build(model: str, revision: str | None = None) -> gr.Blocks:
    r"""
    Builds the app without starting it.

    Args:
        model (`str`):
            An RBI classifier: a repository on the Hub or a folder.
        revision (`str`, *optional*):
            Branch, tag or commit of the repository.

    Raises:
        ValueError, OSError: see [`Classifier`].
    """
    classifier = Classifier(model, revision)
    with gr.Blocks(title=f"RBI: {classifier.name}", delete_cache=(UPLOADS_KEPT, UPLOADS_KEPT)) as app:
        gr.Markdown(_introduction(classifier))
        with gr.Tab("One image"):
            _one_image(classifier)
        with gr.Tab("Several images"):
            _several_images(classifier)
        gr.Markdown(_notes(classifier))
    # Batches run one after the other, each on all cores.
    app.queue(default_concurrency_limit=1, max_size=32)
    return app


def _one_image(classifier: Classifier):
    def classify(upload: dict[str, Any] | None) -> dict[Any, Any]:
        if upload is None:
            raise _error("There is no image yet: upload one first.")
        image = read_image(uploaded(upload["path"]), classifier.upright_rgb)
        answer = classifier.classify(image)
        if answer.with_references is None:
            return {outputs[0]: answer.without_references}
        page = attention_html(answer, image)
        return dict(zip(outputs, (answer.with_references, answer.without_references, page), strict=True))

    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            image = gr.Image(
                label="Image",
                sources=["upload", "clipboard"],
                type="filepath",
                height=300,
                buttons=[],
                alt_text="The image to classify",
                elem_id="image",
            )
            button = gr.Button("Classify", variant="primary")
        with gr.Column(scale=5, min_width=320):
            if classifier.bank is None:
                outputs: list[Any] = [gr.Label(label="Answer", elem_id="without-references")]
            else:
                with gr.Row():
                    outputs = [
                        gr.Label(label="With references", elem_id="with-references"),
                        gr.Label(label="Without references", elem_id="without-references"),
                    ]
                outputs.append(gr.HTML(elem_id="attention"))
    # `preprocess` would let Gradio open the file before its path is checked, and show its own errors for broken files.
    button.click(classify, image, outputs, api_name="classify", preprocess=False)
    _clear_outputs([image.upload, image.clear], outputs)
    if classifier.examples:
        examples = gr.Examples(
            [[path] for path in classifier.examples[:MAX_EXAMPLES]],
            image,
            cache_examples=False,
            label="Examples",
            elem_id="examples",
        )
        examples.load_input_event.then(classify, image, outputs, preprocess=False, api_visibility="undocumented")


def _several_images(classifier: Classifier):
    def compare(chosen: list[tuple[str, str | None]] | None) -> tuple[str, list[list[str]]]:
        chosen = chosen or []
        if len(chosen) < 2:
            raise _error("Relations exist between images: choose at least 2.")
        if len(chosen) > MAX_IMAGES:
            raise _error(f"{len(chosen)} images are too many: choose at most {MAX_IMAGES}.")
        paths = [uploaded(path) for path, _ in chosen]
        images = [read_image(path, classifier.upright_rgb) for path in paths]
        names = [Path(path).name for path in paths]
        comparison = classifier.compare(images)
        return map_html(comparison, images, names), table_rows(comparison, names, classifier)

    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            images = gr.Gallery(
                label=f"Images (2 to {MAX_IMAGES})",
                type="filepath",
                file_types=["image"],
                columns=3,
                height=360,
                object_fit="contain",
                buttons=[],
                elem_id="images",
            )
            button = gr.Button("Compare", variant="primary")
        with gr.Column(scale=5, min_width=320):
            relations = gr.HTML(elem_id="map")
    table = gr.Dataframe(
        headers=TABLE_HEADERS,
        label="Each image on its own and with the others",
        wrap=True,
        interactive=False,
        elem_id="table",
    )
    outputs = [relations, table]
    button.click(compare, images, outputs, api_name="compare")
    _clear_outputs([images.upload, images.delete], outputs)
    if len(classifier.examples) > 1:
        gr.Examples(
            [[classifier.examples[:MAX_EXAMPLES]]],
            images,
            outputs,
            compare,
            run_on_click=True,
            cache_examples=False,
            label="Examples",
            elem_id="examples-of-several",
        )


def _clear_outputs(events: list[Any], outputs: list[Any]):
    """Clears the outputs on these events, so that no answer is shown next to another image."""
    gr.on(events, lambda: dict.fromkeys(outputs), None, outputs, queue=False, api_visibility="private")


def _introduction(classifier: Classifier) -> str:
    # In Markdown, a backslash makes any punctuation plain.
    name = re.sub(f"([{re.escape(string.punctuation)}])", r"\\\1", classifier.name)
    if classifier.is_of_hub:
        name = f"[{name}](https://huggingface.co/{classifier.name})"
    single = "This model contains no references, so a single image attends only to itself."
    if classifier.bank is not None:
        single = f"A single image attends to the {len(classifier.bank):,} references that the model contains."
    return (
        f"# What relations change\n{name} is an image classifier in which an image attends to other images before it "
        f"is classified. {single} Several images attend to each other."
    )


def _notes(classifier: Classifier) -> str:
    notes = [
        "**Relations** between images are computed from the PSNR of their pixels and enter the attention between "
        "their features. **Attention** shows whose features were mixed in. A model that relies mainly on the image "
        "itself gives the mixture little weight: compare the answers to see whether relations matter.",
        "**Several images** are classified together: with other images, the same image may get a different answer. "
        "Under *One image*, an answer depends only on the image and the model.",
    ]
    if classifier.bank is not None and classifier.bank.images is not None:
        notes.append(
            "**References** are images. The model contains thumbnails of them: everyone who has the model or sees "
            "this page can see them."
        )
    votes = classifier.model.config.reference_vote_weight
    if classifier.bank is not None and votes:
        notes.append(f"**Votes.** The labels of the references directly contribute {_percent(votes)} of the answer.")
    notes.append(f"**Your images** are deleted within {2 * UPLOADS_KEPT // 3600} hours.")
    return "\n".join(f"- {note}" for note in notes)


def launch(app: gr.Blocks, host: str | None = None, port: int | None = None):
    r"""
    Starts the app in the background. `app.local_url` is its address.

    Args:
        app (`gr.Blocks`):
            An app from [`build`].
        host (`str`, *optional*):
            Address to listen at. Default: GRADIO_SERVER_NAME, or this machine only.
        port (`int`, *optional*):
            Default: 7860, or the next free port.

    Raises:
        OSError: if the app cannot listen at this address.
    """
    # Fonts that every machine has, and a blue dark enough for white text.
    theme = gr.themes.Default(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    ).set(
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_hover_dark="*primary_700",
    )
    app.launch(
        server_name=host,
        server_port=port,
        max_file_size=MAX_FILE_SIZE,
        theme=theme,
        css=CSS,
        footer_links=["api", "gradio"],
        run_history=False,
        ssr_mode=False,
        prevent_thread_lock=True,
        quiet=True,
    )


def serve(app: gr.Blocks, host: str | None = None, port: int | None = None):
    """Starts the app as [`launch`] does, prints its address, and returns when it is stopped."""
    launch(app, host, port)
    print(f"The app is at {app.local_url} (Ctrl-C stops it).", flush=True)
    app.block_thread()


def named_model() -> str:
    r"""
    The model named by MODEL_ID or by README.md.

    Raises:
        ValueError: if neither names a model.
    """
    if name := os.environ.get("MODEL_ID"):
        return name
    readme = Path(__file__).with_name("README.md")
    models = (metadata_load(readme) or {}).get("models") if readme.is_file() else None
    if not models:
        raise ValueError("No model is named: set the variable MODEL_ID, or add a model to `models:` in README.md.")
    return models[0]


if __name__ == "__main__":
    try:
        serve(build(named_model(), os.environ.get("MODEL_REVISION") or None))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
