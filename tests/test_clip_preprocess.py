"""CLIP's pixels: equal to transformers' on real photos, and what is done where the reference leaves it to chance."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from searchengine.decode import crop_pixels
from searchengine.models.clip.preprocess import MEAN, STANDARD_DEVIATION, normalise_pixels


def clip_pixels(image: Image.Image) -> NDArray[np.float32]:
    """Ours, as (3, 224, 224)."""
    crop = torch.tensor(crop_pixels(image, image_size=224))
    return normalise_pixels(crop[None])[0].permute(2, 0, 1).numpy()


@pytest.fixture(scope="module")
def processor() -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.models.clip.CLIPImageProcessorPil(do_center_crop=False)


def reference(processor: Any, image: Image.Image) -> NDArray[np.float32]:
    """transformers' pixels, cut as torchvision cuts: it rounds half a pixel to the even side, transformers down."""
    resized: NDArray[np.float32] = processor([image])["pixel_values"][0]
    top, left = (round((side - 224) / 2) for side in resized.shape[1:])
    return resized[:, top : top + 224, left : left + 224]


def photos_of_many_shapes(data: Path) -> Iterator[Image.Image]:
    """200 photos, of any proportion, some smaller than the crop."""
    random = np.random.default_rng(0)
    files = sorted((data / "coco_cc" / "images").iterdir())
    for number in range(200):
        image = Image.open(files[number % len(files)]).convert("RGB")
        if number >= len(files):
            width, height = (int(random.integers(90, side)) for side in image.size)
            image = image.crop((0, 0, width, height))
        yield image


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_pixels_of_200_photos_are_those_of_transformers(data: Path, processor: Any, mode: str) -> None:
    count = 0
    for image in photos_of_many_shapes(data):
        np.testing.assert_allclose(
            clip_pixels(image.convert(mode)), reference(processor, image.convert(mode)), atol=1e-6
        )
        count += 1
    assert count == 200


def test_normalising_undone_gives_the_bytes_back() -> None:
    every_byte = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    undone = (normalise_pixels(every_byte) * torch.tensor(STANDARD_DEVIATION) + torch.tensor(MEAN)) * 255
    torch.testing.assert_close(undone, every_byte.float(), atol=1e-4, rtol=0)


def crop_of(image: Image.Image) -> NDArray[np.uint8]:
    return crop_pixels(image, image_size=224)


def test_a_palette_is_turned_into_colours_before_it_is_resized(data: Path) -> None:
    photo = next(photos_of_many_shapes(data))
    palette = photo.quantize(64)
    np.testing.assert_array_equal(crop_of(palette), crop_of(palette.convert("RGB")))


def test_transparency_is_laid_over_white_whatever_colour_it_hides() -> None:
    hidden = Image.new("RGBA", (300, 300), (255, 0, 0, 0))
    np.testing.assert_array_equal(crop_of(hidden), 255)


def test_cmyk_is_converted_before_it_is_resized(data: Path) -> None:
    photo = next(photos_of_many_shapes(data)).convert("CMYK")
    np.testing.assert_array_equal(crop_of(photo), crop_of(photo.convert("RGB")))


def test_16_bits_are_scaled_to_8() -> None:
    ramp = np.linspace(0, 65535, 300 * 300).reshape(300, 300).astype(np.uint16)
    eight = np.round(ramp / 257).astype(np.uint8)
    difference = crop_of(Image.fromarray(ramp)).astype(int) - crop_of(Image.fromarray(eight))
    assert abs(difference).max() <= 2


def test_a_photo_is_turned_upright_as_its_exif_block_says(data: Path) -> None:
    photo = next(photos_of_many_shapes(data))
    sideways = photo.transpose(Image.Transpose.ROTATE_90)
    sideways.getexif()[274] = 6
    np.testing.assert_array_equal(crop_of(sideways), crop_of(photo))
