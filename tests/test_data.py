"""Data: the embedded digits, MNIST's files, and what is said when they are damaged."""

import functools
import gzip
import hashlib
import http.server
import struct
import sys
import threading

import numpy as np
import pytest

from minigrad import Rng
from models.data import DataError, binarise, listops, load_images, mnist


def idx(array):
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def tiny_mnist(tmp_path, monkeypatch):
    """A data directory with four small files in MNIST's format, whose hashes the loader then expects."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "mnist"
    folder.mkdir()
    arrays = {
        "train-images-idx3-ubyte": rng.integers(0, 256, (7, 4, 4), np.uint8),
        "train-labels-idx1-ubyte": rng.integers(0, 10, 7, np.uint8),
        "t10k-images-idx3-ubyte": rng.integers(0, 256, (3, 4, 4), np.uint8),
        "t10k-labels-idx1-ubyte": rng.integers(0, 10, 3, np.uint8),
    }
    for n, (name, array) in enumerate(arrays.items()):
        content = idx(array)
        monkeypatch.setitem(mnist.SHA256, name, hashlib.sha256(content).hexdigest())
        if n % 2:
            (folder / name).write_bytes(content)
        else:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    return tmp_path, arrays


def test_the_digits_are_real_and_split():
    images = load_images("digits")
    assert images.train.shape == (1437, 64)
    assert images.test.shape == (360, 64)
    assert images.shape == (8, 8)
    assert images.train.dtype == np.float32
    assert images.train.min() == 0.0
    assert images.train.max() == 1.0
    counts = np.bincount(np.concatenate([images.train_labels, images.test_labels]))
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # as UCI states them


def test_mnist_is_read_gzipped_or_not(tiny_mnist, monkeypatch):
    folder, arrays = tiny_mnist
    images = load_images("mnist", folder)
    np.testing.assert_allclose(images.train, arrays["train-images-idx3-ubyte"].reshape(7, 16) / 255, rtol=1e-6)
    np.testing.assert_array_equal(images.test_labels, arrays["t10k-labels-idx1-ubyte"])
    monkeypatch.setenv("MINIGRAD_DATA", str(folder))
    np.testing.assert_array_equal(load_images("mnist").train, images.train)


def test_a_missing_truncated_or_altered_file_is_named(tiny_mnist, monkeypatch):
    folder, _ = tiny_mnist
    gz, raw = folder / "mnist" / "train-images-idx3-ubyte.gz", folder / "mnist" / "train-labels-idx1-ubyte"
    whole = gz.read_bytes()
    for damaged, message in [
        (whole[:-9], "truncated or unreadable"),
        (b"not gzip", "truncated or unreadable"),
        (gzip.compress(gzip.decompress(whole)[:-1]), "SHA-256 differs"),
    ]:
        gz.write_bytes(damaged)
        with pytest.raises(DataError, match=message) as caught:
            load_images("mnist", folder)
        assert "train-images-idx3-ubyte.gz" in str(caught.value)
        assert "\n" not in str(caught.value)
    gz.write_bytes(whole)
    content = bytearray(raw.read_bytes())
    content[-1] ^= 1
    raw.write_bytes(content)
    with pytest.raises(DataError, match="SHA-256 differs"):
        load_images("mnist", folder)
    raw.unlink()
    with pytest.raises(DataError, match="has neither train-labels-idx1-ubyte nor"):
        load_images("mnist", folder)
    monkeypatch.setenv("MINIGRAD_DATA", str(raw.with_name("train-labels-idx1-ubyte")))  # a file, or nothing at all
    for load in (lambda: load_images("mnist"), lambda: listops.load(counts=(1, 1, 1))):
        with pytest.raises(DataError, match="give the environment variable MINIGRAD_DATA a folder"):
            load()
    monkeypatch.setenv("MINIGRAD_DATA", "x" * 300)  # no file can have such a name
    with pytest.raises(DataError, match="give the environment variable MINIGRAD_DATA a folder"):
        listops.files()
    with pytest.raises(DataError, match="there is no folder"):
        load_images("mnist", folder / "elsewhere")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (b"\0\0\x0d\1" + b"\0" * 8, "not an IDX file"),
        (idx(np.zeros((2, 3), np.uint8))[:-1], "holds 5 bytes"),
        (b"\0\0\x08\3\0\0", "ends within its header"),
    ],
)
def test_idx_files_are_parsed_with_care(content, message):
    with pytest.raises(DataError, match=message):
        mnist.parse_idx("file", content)


def test_download_takes_the_first_mirror_that_has_the_file_whole(tiny_mnist, tmp_path, monkeypatch):
    _, arrays = tiny_mnist
    site = tmp_path / "site"
    (site / "bad").mkdir(parents=True)
    (site / "good").mkdir()
    for name, array in arrays.items():
        (site / "good" / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        (site / "bad" / f"{name}.gz").write_bytes(gzip.compress(idx(array)[:-2]))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=site)
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        base = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setattr(mnist, "MIRRORS", (base + "absent/", base + "bad/", base + "good/"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr("pooch.os_cache", lambda project: tmp_path / "cache" / project)
        monkeypatch.delenv("MINIGRAD_DATA", raising=False)
        assert load_images("mnist").train.shape == (7, 16)
        server.shutdown()
        thread.join()
    assert load_images("mnist").test.shape == (3, 16)  # from the cache, the server is gone
    for file in (tmp_path / "cache").rglob("*.gz"):
        file.write_bytes(b"spoiled")
    with pytest.raises(DataError, match=r"could not be downloaded .*--data-dir"):
        load_images("mnist")


def test_a_download_without_pooch_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    monkeypatch.delenv("MINIGRAD_DATA", raising=False)
    with pytest.raises(DataError, match=r"needs pooch: pip install pooch, or .* --data-dir DIR"):
        load_images("mnist")


def test_binarisation_has_the_gray_values_as_means_and_the_fixed_one_never_changes():
    x = np.linspace(0, 1, 11).repeat(4000).reshape(11, 4000)
    b = binarise(x, Rng(0))
    assert set(np.unique(b)) == {0.0, 1.0}
    np.testing.assert_allclose(b.mean(axis=1), x[:, 0], atol=4.5 * 0.5 / np.sqrt(4000))
    assert (b[0] == 0).all()
    assert (b[-1] == 1).all()
    first, second = load_images("digits", pixels="fixed"), load_images("digits", pixels="fixed")
    np.testing.assert_array_equal(first.train, second.train)
    assert set(np.unique(first.train)) == {0.0, 1.0}
    wide = load_images("digits", pixels="fixed", dtype=np.float64)  # the same data set for every dtype
    assert wide.train.dtype == np.float64
    np.testing.assert_array_equal(first.train, wide.train)
    np.testing.assert_array_equal(first.test, wide.test)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match="unknown data set 'cifar'; the known ones are digits, mnist"):
        load_images("cifar")
    with pytest.raises(ValueError, match="unknown pixels 'blue'; the known ones are gray, dynamic, fixed"):
        load_images("digits", pixels="blue")
