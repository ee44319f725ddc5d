"""Files written by hand, an oracle of loops for what a batch holds, and every way a folder may be wrong."""

import collections

import numpy as np
import pytest

from jaxaroo.train.data.images import (
    FILES,
    MEAN,
    RECORD,
    STD,
    AugmentConfig,
    Images,
    TrainingBatches,
    in_order,
    normalise,
    read_cifar10,
)


def write(folder, records=3, seed=0):
    """Random files; returns the bytes of each."""
    rng, folder = np.random.default_rng(seed), folder / "cifar"
    folder.mkdir()
    found = {}
    for name in FILES["train"] + FILES["test"]:
        rows = rng.integers(0, 256, (records, RECORD), np.uint8)
        rows[:, 0] %= 10
        (folder / name).write_bytes(rows.tobytes())
        found[name] = rows.tobytes()
    return folder, found


def test_pixels_and_labels_are_those_of_the_format(tmp_path):
    folder, raw = write(tmp_path)
    train, test = read_cifar10(folder, "train"), read_cifar10(folder, "test")
    assert (train.pixels.shape, train.pixels.dtype) == ((15, 32, 32, 3), np.uint8)
    assert train.labels.dtype == np.int32
    joined = b"".join(raw[name] for name in FILES["train"])
    for images, data in ((train, joined), (test, raw["test_batch.bin"])):
        for n, y, x, c in [(0, 0, 0, 0), (0, 0, 1, 0), (1, 31, 2, 2), (2, 7, 30, 1), (len(images.labels) - 1, 3, 4, 2)]:
            assert images.labels[n] == data[n * 3073]
            assert images.pixels[n, y, x, c] == data[n * 3073 + 1 + c * 1024 + y * 32 + x]
    assert [read_cifar10(folder, "train").labels[3 * i] for i in range(5)] == [raw[n][0] for n in FILES["train"]]


def test_normalising_is_its_definition():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 3), np.uint8)
    wanted = (pixels.astype(np.float64) / 255 - np.asarray(MEAN)) / np.asarray(STD)
    found = normalise(pixels)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=3e-7)


def numbered(count):
    """Images that say which they are, and where each pixel comes from; no pixel is the mean, as the border is."""
    y, x = np.mgrid[:32, :32]
    pixels = np.stack([np.stack([np.full((32, 32), n), 8 * y, 8 * x], -1) for n in range(count)])
    return Images(pixels.astype(np.uint8), (np.arange(count) % 10).astype(np.int32))


def shown(image):
    """Of a changed image: its number, and (row, column) of each pixel in the original, None for the border."""
    raw = np.rint((image.astype(np.float64) * STD + MEAN) * 255).astype(int)
    inside = (image != 0).any(-1)
    return raw[..., 0], raw[..., 1] // 8, raw[..., 2] // 8, inside


def test_each_image_is_a_part_of_itself_between_borders():
    batches, shifts, mirrored = TrainingBatches(numbered(40), 40, 3), set(), 0
    for epoch in range(3):
        batch = batches.batch(epoch)
        for image, label in zip(batch.images, batch.labels, strict=True):
            number, row, column, inside = shown(image)
            which = {*number[inside].ravel()}
            assert len(which) == 1
            assert which.pop() % 10 == label
            left = column[16, 10] < column[16, 11]
            dy, dx = row[16, 16] - 16, column[16, 16] - (16 if left else 15)
            mirrored += not left
            shifts.add((int(dy), int(dx)))
            for y, x in np.ndindex(32, 32):  # the pixel that should be here, by the definition of crop and flip
                at = (y + dy, (x if left else 31 - x) + dx)
                assert inside[y, x] == (0 <= at[0] < 32 and 0 <= at[1] < 32)
                if inside[y, x]:
                    assert (row[y, x], column[y, x]) == at
    assert {s[0] for s in shifts} == {s[1] for s in shifts} == set(range(-4, 5))
    assert 40 < mirrored < 80
    assert len(shifts) > 50


def test_without_augmentation_it_is_the_image():
    images = numbered(8)
    batch = TrainingBatches(images, 8, 0, AugmentConfig(pad=0, flip=False)).batch(0)
    which = shown(batch.images)[0][:, 0, 0]
    np.testing.assert_array_equal(batch.images, normalise(images.pixels[which]))
    assert list(which) != sorted(which)


def test_every_epoch_holds_every_image_once_whatever_the_batch():
    """10 images in batches of 4: the third batch has the last two of one epoch and the first two of the next."""
    batches = TrainingBatches(numbered(10), 4, 1)
    seen = [int(np.bincount(shown(i)[0][shown(i)[3]]).argmax()) for n in range(10) for i in batches.batch(n).images]
    epochs = [seen[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    big = TrainingBatches(numbered(3), 8, 1).batch(0)  # more than two epochs in one batch
    whose = collections.Counter(int(np.bincount(shown(i)[0][shown(i)[3]]).argmax()) for i in big.images)
    assert sorted(whose.values()) == [2, 3, 3]


def test_a_batch_depends_on_seed_and_number_alone():
    images = numbered(10)
    steady = TrainingBatches(images, 4, 7)
    inorder = [steady.batch(n) for n in range(8)]
    fresh = TrainingBatches(images, 4, 7)
    for n in (6, 2, 7, 0):
        again = fresh.batch(n)
        np.testing.assert_array_equal(again.images, inorder[n].images)
        np.testing.assert_array_equal(again.labels, inorder[n].labels)
    window = next(TrainingBatches(images, 4, 7).after(5))
    assert window.images.shape == (1, 4, 32, 32, 3)
    np.testing.assert_array_equal(window.images[0], inorder[5].images)
    other = TrainingBatches(images, 4, 8).batch(0)
    assert (other.images != inorder[0].images).any()


def test_a_test_is_in_order_and_its_last_batch_is_masked():
    images = numbered(5)
    batches = list(in_order(images, 2))
    assert [b.images.shape for b in batches] == [(2, 32, 32, 3)] * 3
    kept = np.concatenate([b.images[b.mask] for b in batches])
    np.testing.assert_array_equal(kept, normalise(images.pixels))
    assert np.concatenate([b.labels[b.mask] for b in batches]).tolist() == images.labels.tolist()
    assert batches[-1].mask.tolist() == [True, False]


@pytest.mark.errors
def test_every_wrong_folder_is_told_what_is_wrong(tmp_path):
    folder, raw = write(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no data_batch_1.bin, .*; expected the binary version of CIFAR"):
        read_cifar10(tmp_path, "train")
    (tmp_path / "batches.meta").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"are pickles, which are never read: take cifar-10-binary.tar.gz"):
        read_cifar10(tmp_path, "test")
    folder.rename(tmp_path / "cifar-10-batches-bin")
    folder = tmp_path / "cifar-10-batches-bin"
    with pytest.raises(FileNotFoundError, match=r"Pass .*cifar-10-batches-bin"):
        read_cifar10(tmp_path, "test")
    (folder / "data_batch_4.bin").write_bytes(raw["data_batch_4.bin"][:-1])
    with pytest.raises(ValueError, match=r"data_batch_4.bin has 9218 bytes; expected a multiple of 3073"):
        read_cifar10(folder, "train")
    (folder / "data_batch_4.bin").write_bytes(raw["data_batch_4.bin"][:3073])
    with pytest.raises(ValueError, match=r"3, 3, 3, 1, 3 records; expected as many in each. data_batch_4.bin is cut"):
        read_cifar10(folder, "train")
    (folder / "data_batch_4.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="has 0 bytes"):
        read_cifar10(folder, "train")
    damaged = bytearray(raw["data_batch_4.bin"])
    damaged[2 * 3073] = 10
    (folder / "data_batch_4.bin").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"data_batch_4.bin, record 2 has label 10; expected 0 to 9"):
        read_cifar10(folder, "train")
    with pytest.raises(ValueError, match="pad: found -1"):
        AugmentConfig(pad=-1)
    with pytest.raises(ValueError, match="size 0"):
        TrainingBatches(numbered(2), 0, 0)
