# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""A Gradio app for an RBI model: its answers, and the relations that they come from.

The model is named by the environment variable MODEL_ID (a repository of the Hub, or a folder), else by the first of
`models:` in the README.md beside this file. MODEL_REVISION pins a branch, tag or commit of it.
"""

import os


# Gradio reads it at import. The app calls nobody but the Hub, for the model.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import base64
import html
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
from gradio.utils import get_upload_folder
from huggingface_hub import metadata_load, snapshot_download
from PIL import ExifTags, Image
from safetensors import SafetensorError
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedConfig


NUM_CLASSES = 5
NUM_REFERENCES = 6
# Attention below it would read 0.0%.
SHOWN = 0.0005
MAX_IMAGES = 16
MAX_EXAMPLES = 8
MAX_PIXELS = 100_000_000
# Resizing by the shorter edge makes an enormous image of a small one that is long and narrow.
MAX_ASPECT_RATIO = 100
MAX_FILE_SIZE = "20mb"
# Few, as each decoder is one more that a stranger's file gets at.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
# Uploaded images are deleted when they are this many seconds old, and looked for as often.
UPLOADS_KEPT = 3600
THUMBNAIL = 96

# How the stored pixels are turned for each value of EXIF's Orientation.
TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

CSS = """
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
    """An image of the model's bank, and the attention, in [0, 1], that an image pays to it."""

    number: int
    label: str
    attention: float
    image: Image.Image | None


@dataclass(frozen=True)
class Answer:
    """Scores of an image's classes, alone and with the references, if there are any, and its attention to these."""

    alone: dict[str, float]
    with_references: dict[str, float] | None = None
    attention_to_itself: float = 1.0
    nearest: tuple[Reference, ...] = ()
    attention_to_others: float = 0.0


@dataclass(frozen=True)
class Comparison:
    """
    Scores of B images' classes, (B, num_labels), alone and together; the attention that each pays to each, (B, B),
    rows sum to 1; and their relations p, (B, B) in [0, 1], `None` for a model without.
    """

    alone: torch.Tensor
    together: torch.Tensor
    attention: torch.Tensor
    relations: torch.Tensor | None


class Classifier:
    r"""
    An RBI image classifier, its image processor and its example images.

    Args:
        name (`str`):
            A repository of the Hub or a folder.
        revision (`str`, *optional*):
            Branch, tag or commit of the repository.

    Raises:
        ValueError: if there is no such folder, or it holds no trained RBI classifier of single classes.
        OSError: if there is no such repository, the Hub cannot be reached, or a file of the model is broken.
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
            raise ValueError(
                f"{name} lacks {len(missing)} weights, for instance `{missing[0]}`: save the model again."
            )
        problem_type = self.model.config.problem_type
        if problem_type not in (None, "single_label_classification") or self.model.config.num_labels < 2:
            raise ValueError(f"{name} does not choose one of several classes, and that is what this app shows.")
        self.model = self.model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        self.mode = "L" if len(self.model.config.image_mean) == 1 else "RGB"
        self.bank = self.model.base_model.references
        paths = sorted((folder / "examples").glob("*"))
        self.examples = [str(path) for path in paths if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")]

    def label(self, number: int) -> str:
        """Name of a class."""
        return str(self.model.config.id2label[number])

    @torch.inference_mode()
    def outputs(self, images: Sequence[Image.Image], *scopes: str) -> list[Any]:
        """The model's outputs for a batch, with relations, for each relation scope. The backbone runs once."""
        converted = [image.convert(self.mode) for image in images]
        pixel_values = self.image_processor(converted, return_tensors="pt")["pixel_values"]
        pixel_values = pixel_values.to(self.model.device, self.model.dtype)
        features, _ = self.model.base_model.extract_features(pixel_values)
        return [
            self.model(pixel_values, image_features=features, relation_scope=scope, output_relations=True)
            for scope in scopes
        ]

    def classify(self, image: Image.Image) -> Answer:
        """The answer for one RGB image."""
        if self.bank is None:
            return Answer(alone=self._scores(self.outputs([image], "self")[0]))
        alone, related = self.outputs([image], "self", "reference")
        attention = related.relation_attentions[0].mean(0).cpu()
        values, rows = attention[1:].topk(min(NUM_REFERENCES, len(attention) - 1))
        nearest = tuple(
            self._reference(row, value)
            for row, value in zip(rows.tolist(), values.tolist(), strict=True)
            if value >= SHOWN
        )
        to_others = max(0.0, float(attention[1:].sum()) - sum(each.attention for each in nearest))
        return Answer(self._scores(alone), self._scores(related), float(attention[0]), nearest, to_others)

    def compare(self, images: Sequence[Image.Image]) -> Comparison:
        """The answers for several RGB images, each alone and all as one batch."""
        alone, together = self.outputs(images, "self", "batch")
        relations = together.relation_similarities
        return Comparison(
            alone.logits.softmax(-1).cpu(),
            together.logits.softmax(-1).cpu(),
            together.relation_attentions.mean(1).cpu(),
            None if relations is None else relations.cpu(),
        )

    def _scores(self, outputs: Any) -> dict[str, float]:
        """Of the one image's likeliest classes, by name."""
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
    """The model's folder. All of it is of one commit, code and examples as well, even if the branch moves."""
    if Path(name).is_dir():
        return Path(name).resolve()
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"There is no folder {name}.")
    patterns = ["*.json", "*.safetensors", "*.py", "examples/*"]
    return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))


def _check_config(folder: Path, name: str):
    """Before any code of the model runs."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{name} is no saved model: it has no config.json.")
    config, _ = PreTrainedConfig.get_config_dict(folder)
    if config.get("model_type") != "rbi":
        raise ValueError(
            f'{name} is a model of the type "{config.get("model_type")}". This app shows relations, which RBI models '
            "have: give a classifier RBI's head with `RBIForImageClassification.from_image_classifier`."
        )
    if config.get("architectures") != ["RBIForImageClassification"]:
        raise ValueError(f"{name} has no classifier: save an RBIForImageClassification.")


def uploaded(path: str | None) -> str:
    r"""
    Where an upload is, or an example, of which Gradio keeps copies among the uploads.

    A client of the API can name any path, and Gradio lets those without `meta` through.

    Args:
        path (`str`, *optional*):
            Of its file, as the client names it.

    Raises:
        gr.Error: if there is no such file among the uploads, whatever there is elsewhere.
    """
    folder = Path(os.path.abspath(get_upload_folder()))
    try:
        named = Path(os.path.abspath(path or ""))
        # Nothing elsewhere is touched, not even to follow a link.
        if named.is_relative_to(folder):
            file = named.resolve()
            if file.is_relative_to(folder.resolve()) and file.is_file():
                return str(file)
    # For links in a circle, and names that no file can have.
    except (OSError, RuntimeError, ValueError):
        pass
    raise _error("There is no such upload, or no longer: upload the image again.")


def read_image(path: str) -> Image.Image:
    r"""
    Reads an uploaded image as in training: upright, RGB, transparency on white, 16 bits scaled to 8.

    Args:
        path (`str`):
            Of its file.

    Raises:
        gr.Error: if it is no image, broken, too large or too narrow, or has pixels that are not finite; the message
            names it and says what to do.
    """
    name = html.escape(Path(path).name)
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            is_too_large = width * height > MAX_PIXELS
            is_too_narrow = max(width, height) > MAX_ASPECT_RATIO * min(width, height)
            if not (is_too_large or is_too_narrow):
                image.load()
                orientation = _orientation(image)
    except Image.DecompressionBombError:
        is_too_large = True
    except Image.UnidentifiedImageError:
        raise _error(f"{name} is no image of a known format: upload a PNG, JPEG, WebP, GIF, BMP or TIFF.") from None
    # Pillow's decoders raise errors of many kinds for broken files.
    except Exception:
        raise _error(f"{name} is broken or cut off: save it again, or upload another image.") from None
    if is_too_large:
        raise _error(f"{name} has more than {MAX_PIXELS:,} pixels: upload a smaller copy.")
    if is_too_narrow:
        raise _error(f"{name}, {width} x {height} pixels, is too long and narrow: cut it to what the model shall see.")
    rgb = _to_rgb(image, name)
    return rgb.transpose(TRANSPOSES[orientation]) if orientation in TRANSPOSES else rgb


def _orientation(image: Image.Image) -> int:
    # Pillow's reader of EXIF raises errors of many kinds for files that are not broken.
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise _error(f"{name} has pixels that are not finite: upload it as a PNG or JPEG.")
        if image.mode != "F":
            values = values / 257
        elif values.max() <= 1:
            values = values * 255
        image = Image.fromarray((values.clip(0, 255) + 0.5).astype(np.uint8))
    elif "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        # Pillow converts La to nothing but LA.
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _error(message: str) -> gr.Error:
    # A mistake of the user's is no failure of the app's: nothing of it goes to the log.
    return gr.Error(message, duration=None, print_exception=False)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _image_tag(image: Image.Image, alt: str) -> str:
    """An image as part of the page, enlarged or reduced to a thumbnail."""
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
    The page's account of where an image's attention goes.

    Args:
        answer (`Answer`):
            With references.
        image (`PIL.Image.Image`):
            The image that it is of.
    """
    tag = _image_tag(image, "your image")
    cards = [_card(tag, "the image", "itself", answer.attention_to_itself, "rbi-itself")]
    for reference in answer.nearest:
        number = reference.number + 1
        if reference.image is None:
            tag = '<div class="rbi-none">no image kept</div>'
        else:
            tag = _image_tag(reference.image, f"reference {number}")
        cards.append(_card(tag, reference.label, f"reference {number}", reference.attention))
    rest = ""
    if answer.attention_to_others >= SHOWN:
        rest = f"<p>All other references together: <b>{_percent(answer.attention_to_others)}</b></p>"
    (before, score_before), *_ = answer.alone.items()
    (after, score_after), *_ = (answer.with_references or answer.alone).items()
    if before == after:
        change = f"leave the answer at <b>{html.escape(after)}</b>: {_percent(score_before)} alone, "
        change += f"{_percent(score_after)} with them"
    else:
        change = f"turn the answer from <b>{html.escape(before)}</b> ({_percent(score_before)} alone) to "
        change += f"<b>{html.escape(after)}</b> ({_percent(score_after)} with them)"
    return (
        f"<h3>Where its attention goes</h3><p>The references {change}.</p>"
        f'<ul class="rbi-cards">{"".join(cards)}</ul>{rest}'
    )


def map_html(comparison: Comparison, images: Sequence[Image.Image], names: Sequence[str]) -> str:
    r"""
    The page's heat map of the relations between images or, for a model without, of the attention between them.

    Args:
        comparison (`Comparison`):
            Of these images.
        images (`Sequence[PIL.Image.Image]`):
            The images.
        names (`Sequence[str]`):
            Their names.
    """
    if comparison.relations is None:
        values, title = comparison.attention, "Attention that the image of a row pays to that of a column"
        explanation = "each row, with what stays with the image itself, sums to 1."
    else:
        values, title = comparison.relations, "Relation p of each pair of images"
        explanation = (
            "from the PSNR of their pixels: 1 if they are the same, the less the more they differ. The model "
            "weighs it beside their features; whom it attends to is in the table."
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
        f'<div class="rbi-scroll" tabindex="0" role="region" aria-label="{title}"><table class="rbi-map">'
        f"<caption><b>{title}</b>, {explanation}</caption>"
        f'<thead><tr><td class="rbi-own"></td>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


TABLE_HEADERS = ["no.", "image", "alone", "score", "together", "score", "attends to itself", "of the others most to"]


def table_rows(comparison: Comparison, names: Sequence[str], classifier: Classifier) -> list[list[str]]:
    """Rows of the table of answers, alone and together, one for each image."""
    rows = []
    for row, name in enumerate(names):
        cells = [str(row + 1), name]
        for scores in (comparison.alone[row], comparison.together[row]):
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
    The app, not yet started.

    Args:
        model (`str`):
            An RBI classifier: a repository of the Hub or a folder.
        revision (`str`, *optional*):
            Branch, tag or commit of the repository.

    Raises:
        ValueError, OSError: as [`Classifier`].
    """
    classifier = Classifier(model, revision)
    with gr.Blocks(title=f"RBI: {classifier.name}", delete_cache=(UPLOADS_KEPT, UPLOADS_KEPT)) as app:
        gr.Markdown(_introduction(classifier))
        with gr.Tab("One image"):
            _one_image(classifier)
        with gr.Tab("Several images"):
            _several_images(classifier)
        gr.Markdown(_notes(classifier))
    # One batch at a time has all the cores.
    app.queue(default_concurrency_limit=1, max_size=32)
    return app


def _one_image(classifier: Classifier):
    def classify(upload: dict[str, Any] | None) -> dict[Any, Any]:
        if upload is None:
            raise _error("There is no image yet: upload one first.")
        image = read_image(uploaded(upload["path"]))
        answer = classifier.classify(image)
        if answer.with_references is None:
            return {outputs[0]: answer.alone}
        page = attention_html(answer, image)
        return dict(zip(outputs, (answer.with_references, answer.alone, page), strict=True))

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
                outputs: list[Any] = [gr.Label(label="Answer", elem_id="alone")]
            else:
                with gr.Row():
                    outputs = [
                        gr.Label(label="With its references", elem_id="with-references"),
                        gr.Label(label="Alone, without references", elem_id="alone"),
                    ]
                outputs.append(gr.HTML(elem_id="attention"))
    # Without `preprocess`, by which Gradio opens the file itself: whosever it is, and what a broken one gives is no
    # message for users.
    button.click(classify, image, outputs, api_name="classify", preprocess=False)
    # What another image got must not stand beside this one.
    gr.on(
        [image.upload, image.clear],
        lambda: dict.fromkeys(outputs),
        None,
        outputs,
        queue=False,
        api_visibility="private",
    )
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
            raise _error("Relations are between images: choose at least 2.")
        if len(chosen) > MAX_IMAGES:
            raise _error(f"{len(chosen)} images are too many for the map: choose {MAX_IMAGES} at most.")
        paths = [uploaded(path) for path, _ in chosen]
        images = [read_image(path) for path in paths]
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
        label="Each image alone and together with the others",
        wrap=True,
        interactive=False,
        elem_id="table",
    )
    outputs = [relations, table]
    button.click(compare, images, outputs, api_name="compare")
    gr.on(
        [images.upload, images.delete],
        lambda: dict.fromkeys(outputs),
        None,
        outputs,
        queue=False,
        api_visibility="private",
    )
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


def _introduction(classifier: Classifier) -> str:
    name = (
        f"[{classifier.name}](https://huggingface.co/{classifier.name})" if classifier.is_of_hub else classifier.name
    )
    alone = "One image by itself has no others: this model carries no references."
    if classifier.bank is not None:
        alone = f"For one image the others are the {len(classifier.bank):,} references that the model carries."
    return (
        f"# What relations change\n{name} is an image classifier in which an image attends to others before it is "
        f"answered. {alone} Several images attend to each other."
    )


def _notes(classifier: Classifier) -> str:
    notes = [
        "**Relations** of images come from the PSNR of their pixels, and enter the attention between their "
        "features. **Attention** says whose features were mixed in. A model that has learned to rely on the image "
        "itself gives the mix little weight: whether relations matter, the answers show.",
        "**Several images** answer together: with others beside it, the same image may get another answer. Under "
        "*One image*, an answer depends on the image and the model alone.",
    ]
    if classifier.bank is not None and classifier.bank.images is not None:
        notes.append(
            "**References** are images. Small copies of them are in the model: who gets the model, or sees this "
            "page, sees them."
        )
    votes = classifier.model.config.reference_vote_weight
    if classifier.bank is not None and votes:
        notes.append(f"**Votes.** The labels of the references give {_percent(votes)} of the answer directly.")
    notes.append(f"**Your images** are deleted here within {2 * UPLOADS_KEPT // 3600} hours.")
    return "\n".join(f"- {note}" for note in notes)


def serve(app: gr.Blocks, host: str | None = None, port: int | None = None):
    r"""
    Starts the app, and returns when it is stopped.

    Args:
        app (`gr.Blocks`):
            From [`build`].
        host (`str`, *optional*):
            Address to listen at. `None`: this machine's own, or what GRADIO_SERVER_NAME says.
        port (`int`, *optional*):
            `None`: 7860, or the next that is free.

    Raises:
        OSError: if it cannot listen there.
    """
    # Fonts that every machine has; white on a blue that is dark enough to read it.
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
    print(f"The app is at {app.local_url} (Ctrl-C stops it).", flush=True)
    app.block_thread()


def named_model() -> str:
    r"""
    The model that the environment or the README.md names.

    Raises:
        ValueError: if neither names one.
    """
    if name := os.environ.get("MODEL_ID"):
        return name
    readme = Path(__file__).with_name("README.md")
    models = (metadata_load(readme) or {}).get("models") if readme.is_file() else None
    if not models:
        raise ValueError("No model is named: set the variable MODEL_ID, or name one under `models:` in README.md.")
    return models[0]


if __name__ == "__main__":
    try:
        serve(build(named_model(), os.environ.get("MODEL_REVISION") or None))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
