"""Images beside a prompt: found in a dataset's row, given their places in the messages, and made into tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from slipstream.pictures import as_png_holds_it
from slipstream.records import Images

COLUMNS = ("images", "image")


def image_columns(row: dict[str, Any]) -> list[str]:
    """The columns of a row that hold images."""
    return [column for column in COLUMNS if column in row]


def has_images(row: dict[str, Any]) -> bool:
    """Whether a row comes with images, in a column or inside its messages, or with places for them."""
    given = row["images"] if "images" in row else row.get("image")
    return not (given is None or (isinstance(given, list | tuple) and not given)) or bool(image_parts(row["prompt"]))


def find_images(row: dict[str, Any], where: str) -> list[Any]:
    """The images of a row's column `images` (a list), else `image` (one); none where that is None or empty.

    Raises:
        ValueError: The column holds something else; `where` names the row.
    """
    if "images" in row:
        given = row["images"]
        if given is None:
            return []
        if not isinstance(given, list | tuple):
            raise ValueError(f"{where}: images is a {type(given).__name__}; it must be a list of images.")
    else:
        given = [] if row.get("image") is None else [row["image"]]
    for image in given:
        _check_image(image, where)
    return list(given)


def fill(messages: Sequence[dict[str, Any]], images: Sequence[Any], where: str) -> tuple[list[Any], tuple[Any, ...]]:
    """`messages` with all contents as lists of parts, and the images in the order of their places among them.

    A content that is a string becomes a part; all images stand before the text of the first such message of a user.
    Where there are image parts already, these are the images' places. A part may bring its image with it.

    Raises:
        ValueError: There are more or fewer places than images, or a part of a kind that is not known; `where` names the
            row.
    """
    contents = [_parts(message.get("content"), where) for message in messages]
    if not image_parts(messages):
        strings = (i for i, m in enumerate(messages) if m["role"] == "user" and isinstance(m["content"], str))
        for i in strings:
            contents[i] = [{"type": "image"}] * len(images) + contents[i]
            break
    pictures, left, places = [], list(images), 0
    for part in (part for parts in contents for part in parts if part["type"] == "image"):
        own = part.get("image")
        if own is None:
            places += 1
            own = left.pop(0) if left else None
        if own is not None:
            _check_image(own, where)
            pictures.append(as_png_holds_it(own))
    if places != len(images):
        raise ValueError(
            f"{where} has {len(images)} image{'s' * (len(images) != 1)} for {places} image part"
            f"{'s' * (places != 1)} in its prompt: give one for each, or contents that are plain strings, which all "
            "images are put in front of."
        )
    return [_emptied(message, parts) for message, parts in zip(messages, contents, strict=True)], tuple(pictures)


def emptied(messages: Sequence[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """`messages` with all contents as lists of parts, and places for images without them."""
    return [_emptied(message, _parts(message.get("content"), where)) for message in messages]


def process(processor: Any, text: str, pictures: tuple[Any, ...], where: str) -> tuple[list[int], Images]:
    """Token ids of a rendered prompt as the model sees them, and its images.

    Raises:
        ValueError: The processor does not take it; `where` names the row.
        NotImplementedError: It makes a tensor that cannot be continued over a completion.
    """
    tokenizer = processor.tokenizer
    bos = getattr(tokenizer, "bos_token", None)
    # As processors do themselves for a template's text, which may begin with that token already.
    options = {"add_special_tokens": not (bos and text.startswith(bos))}
    try:
        made = dict(processor(text=[text], images=[list(pictures)], return_tensors="pt", **options))
    except Exception as error:
        raise ValueError(
            f"{where}: {type(processor).__name__} cannot make tensors of its {len(pictures)} images and prompt "
            f"{text!r} ({type(error).__name__}: {error})"
        ) from error
    ids = made.pop("input_ids")[0].tolist()
    made.pop("attention_mask", None)
    images = Images(pictures, list(tokenizer(text, **options)["input_ids"]))
    known = set(getattr(processor.image_processor, "model_input_names", ()))
    for name, value in made.items():
        if not isinstance(value, Tensor):
            raise NotImplementedError(
                f"{type(processor).__name__} makes {name!r}, a {type(value).__name__} instead of a tensor: prompts "
                "with images of this model cannot be trained on."
            )
        if name.endswith("token_type_ids") and value.shape == (1, len(ids)):
            images.token_features[name] = value
        elif name not in known and value.shape[:2] == (1, len(ids)):
            raise NotImplementedError(
                f"{type(processor).__name__} makes {name!r} of shape {tuple(value.shape)}, values for each token of "
                "the prompt, of which it is not known here what they are for a completion's: prompts with images of "
                "this model cannot be trained on."
            )
        else:
            images.features[name] = value
    return ids, images


def image_parts(messages: Any) -> list[Any]:
    """The image parts of messages, or of what else a prompt may be."""
    contents = [m.get("content") for m in messages if isinstance(m, dict)] if isinstance(messages, list) else []
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [part for part in parts if isinstance(part, dict) and part.get("type") == "image"]


def _parts(content: Any, where: str) -> list[dict[str, Any]]:
    """A content as parts, without the empty fields that a dataset gives them so that all have the same."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    for part in content or []:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "image"):
            raise ValueError(f"{where} has the part {part!r} in its prompt: parts are of the types 'text' and 'image'.")
    return [{name: value for name, value in part.items() if value is not None} for part in content or []]


def _emptied(message: dict[str, Any], parts: list[dict[str, Any]]) -> dict[str, Any]:
    # Templates write a placeholder for a part's kind alone.
    return {**message, "content": [{"type": "image"} if part["type"] == "image" else part for part in parts]}


def _check_image(image: Any, where: str) -> None:
    from PIL import Image

    if not isinstance(image, Image.Image):
        raise ValueError(
            f"{where} has a {type(image).__name__} as an image; it must be a PIL image. A column of paths or bytes is "
            "read as images after dataset.cast_column(..., datasets.Image()), a list of them as "
            "datasets.List(datasets.Image())."
        )
