"""CIFAR-10 from its binary files, and batches of it: shuffled, cropped, flipped, normalised, and the same again.

A folder holds data_batch_1.bin to data_batch_5.bin and test_batch.bin. Each is a row of records, 1 byte of label and
3072 of pixels: red, green and blue planes of 32 x 32. The pickled version is never read.

What a step sees depends on the seed and the number of the step alone: epoch e is a permutation of all images, drawn
from (seed, e), with a crop and a flip for each image. A batch goes on where the one before it ended, also behind the
last image of an epoch, so none is left out and all batches have one size. Augmentation is that of He et al.
(1512.03385, section 4.2): 4 zeros on each side, a random part of the image's size, mirrored for every second one.

Letters: N images of a set, B of a batch, Y and X rows and columns.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32, UInt8

SIDE, CLASSES = 32, 10
RECORD = 1 + 3 * SIDE * SIDE
FILES = {"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)}
DOWNLOAD = "cifar-10-binary.tar.gz"
# Of the training images' pixels, a channel, in units of the brightest; to four places, as everybody writes them.
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How a training image differs from itself.

    Attributes:
      pad: zeros on each side, of which a part of the image's size is taken; 0 leaves it where it is.
      flip: mirror every second one.
    """

    pad: int = 4
    flip: bool = True

    def __post_init__(self):
        if not 0 <= self.pad <= SIDE:
            raise ValueError(f"AugmentConfig.pad: found {self.pad}; expected 0 to {SIDE} pixels.")


class Images(NamedTuple):
    """A set, as it is in the files but for the order of axes."""

    pixels: UInt8[np.ndarray, "N Y X 3"]
    labels: Int32[np.ndarray, " N"]


class ImageBatch(NamedTuple):
    """What a step sees; NumPy arrays as long as it is on the host. Leading axes are micro-batches and images."""

    images: Float[Array, "*M B Y X 3"]  # normalised
    labels: Int32[Array, "*M B"]
    mask: Bool[Array, "*M B"]  # False for what fills up the last batch of a test


def read_cifar10(folder: Path | str, split: Literal["train", "test"]) -> Images:
    """All images of a split; 150 MB for training.

    Raises:
      FileNotFoundError: naming the files that are missing, and what to get instead of another version.
      ValueError: for a file that is no row of whole records, for files of different lengths, and for labels above 9.
    """
    folder = Path(folder)
    paths = [folder / name for name in FILES[split]]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise FileNotFoundError(f"images: {folder} has no {', '.join(missing)}; expected {_hint(folder)}")
    parts = [_read(path) for path in paths]
    lengths = [len(part) for part in parts]
    if len({*lengths}) != 1:
        short = paths[int(np.argmin(lengths))]
        raise ValueError(
            f"images: {folder} has files of {', '.join(map(str, lengths))} records; expected as many in each. "
            f"{short.name} is cut short: unpack {DOWNLOAD} again."
        )
    records = np.concatenate(parts)
    labels = records[:, 0].astype(np.int32)
    if labels.max() >= CLASSES:
        at = int(np.argmax(labels >= CLASSES))
        where = f"{paths[at // lengths[0]].name}, record {at % lengths[0]}"
        raise ValueError(
            f"images: {folder / where} has label {labels[at]}; expected 0 to {CLASSES - 1}. This is not CIFAR-10, or "
            "damaged."
        )
    pixels = records[:, 1:].reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
    return Images(np.ascontiguousarray(pixels), labels)


def normalise(pixels: UInt8[np.ndarray, "*n 3"]) -> Float[np.ndarray, "*n 3"]:
    """(pixel / 255 - mean) / standard deviation of its channel, float32."""
    scale = np.asarray([1 / (255 * s) for s in STD], np.float32)
    shift = np.asarray([m / s for m, s in zip(MEAN, STD, strict=True)], np.float32)
    return pixels.astype(np.float32) * scale - shift


class TrainingBatches:
    """Batches by their number; the draws of one epoch, or of two that share a batch, are kept."""

    def __init__(self, images: Images, size: int, seed: int, cfg: AugmentConfig = AugmentConfig()):
        """Draw nothing yet.

        Args:
          images: the training set.
          size: images in a batch.
          seed: of order, crops and flips.
          cfg: how images are changed.
        """
        if size < 1:
            raise ValueError(f"TrainingBatches: size {size}; expected at least 1 image in a batch.")
        self._images, self._size, self._seed, self._cfg = images, size, seed, cfg
        self._draws: dict[int, _Draws] = {}

    def batch(self, number: int) -> ImageBatch:
        """The batch of step `number`, the first of which is 0."""
        count = len(self._images.labels)
        at = np.arange(number * self._size, (number + 1) * self._size)
        epochs, places = at // count, at % count
        self._draws = {int(e): self._draws.get(int(e)) or self._draw(int(e)) for e in np.unique(epochs)}
        images, labels = [], []
        for epoch, draws in self._draws.items():
            index = draws.order[places[epochs == epoch]]
            images.append(_crop(self._images.pixels[index], draws.shift[index], self._cfg.pad, draws.flip[index]))
            labels.append(self._images.labels[index])
        return _batch(np.concatenate(images), np.concatenate(labels), np.ones(self._size, bool))

    def after(self, number: int) -> Iterator[ImageBatch]:
        """All batches from `number` on, without end, each as a window of one micro-batch."""
        while True:
            batch = self.batch(number)
            yield _batch(*(part[None] for part in batch))
            number += 1

    def _draw(self, epoch: int) -> "_Draws":
        rng, count = np.random.default_rng([self._seed, epoch]), len(self._images.labels)
        order = rng.permutation(count)
        shift = rng.integers(0, 2 * self._cfg.pad + 1, (count, 2))
        flip = rng.integers(0, 2, count).astype(bool)
        return _Draws(order, shift, flip & self._cfg.flip)


def in_order(images: Images, size: int) -> Iterator[ImageBatch]:
    """The set in its order, as it is; the last batch is filled up with images that the mask leaves out."""
    for start in range(0, len(images.labels), size):
        index = np.arange(start, start + size)
        mask = index < len(images.labels)
        index = np.where(mask, index, 0)
        yield _batch(normalise(images.pixels[index]), images.labels[index], mask)


# ----------------------------------------------------------------------------------------------------------- private
class _Draws(NamedTuple):
    """Of an epoch; the last two by image."""

    order: Int[np.ndarray, " N"]
    shift: Int[np.ndarray, "N 2"]
    flip: Bool[np.ndarray, " N"]


def _batch(*parts: Any) -> ImageBatch:
    return ImageBatch(*parts)


def _read(path: Path) -> UInt8[np.ndarray, "N record"]:
    size = path.stat().st_size
    if size == 0 or size % RECORD:
        raise ValueError(
            f"images: {path} has {size} bytes; expected a multiple of {RECORD}, a label and 3 x {SIDE} x {SIDE} "
            f"pixels. It is cut short or something else: unpack {DOWNLOAD} again."
        )
    return np.fromfile(path, np.uint8).reshape(-1, RECORD)


def _hint(folder: Path) -> str:
    """What to do about a folder without the files."""
    inner = next((d for d in (folder / "cifar-10-batches-bin",) if d.is_dir()), None)
    if inner is not None:
        return f"the files themselves. Pass {inner}."
    for place in (folder, folder / "cifar-10-batches-py"):
        if (place / "data_batch_1").exists() or (place / "batches.meta").exists():
            return f"the binary version. What is there are pickles, which are never read: take {DOWNLOAD}."
    return f"the binary version of CIFAR-10, unpacked from {DOWNLOAD}."


def _crop(
    pixels: UInt8[np.ndarray, "n Y X 3"], shift: Int[np.ndarray, "n 2"], pad: int, flip: Bool[np.ndarray, " n"]
) -> Float[np.ndarray, "n Y X 3"]:
    """Normalised first, so that the border is 0, the mean, and not black."""
    padded = np.pad(normalise(pixels), ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    y = shift[:, :1] + np.arange(pixels.shape[1])[None]
    x = shift[:, 1:] + np.arange(pixels.shape[2])[None]
    x = np.where(flip[:, None], x[:, ::-1], x)
    return padded[np.arange(len(pixels))[:, None, None], y[:, :, None], x[:, None, :]]
