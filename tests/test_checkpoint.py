"""Checkpoints: exact, whole, or refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import start as blas
from minigrad import checkpoint


def test_arrays_and_info_come_back_to_the_bit(tmp_path):
    arrays = {
        "a": np.random.default_rng(0).standard_normal((3, 4)).T,
        "scalar": np.array(0.1, np.float32),
        "n": np.array([2**62]),
        "flag": np.array(True),
        "empty": np.zeros((0, 2)),
    }
    info = {"epoch": 3, "value": 0.1 + 0.2, "name": "µ"}
    checkpoint.save(tmp_path / "c", arrays, info)
    loaded, loaded_info = checkpoint.load(tmp_path / "c")
    assert loaded_info == info
    assert loaded.keys() == arrays.keys()
    for name, a in arrays.items():
        assert loaded[name].dtype == a.dtype
        assert loaded[name].shape == a.shape
        np.testing.assert_array_equal(loaded[name], a)
    assert os.listdir(tmp_path) == ["c"]


KINDS = ["?", "<i1", "<u1", ">i2", "<u2", ">u4", "<i8", ">i8", "<f2", ">f4", "<f4", ">f8", "<f8"]
LAYOUTS = [np.array, np.asfortranarray, lambda a: a[::-1, ::2], lambda a: a[:0], lambda a: a[0, 0, ...]]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_number_comes_back(kind, layout, tmp_path):
    a = layout((np.arange(12).reshape(3, 4) % 3).astype(kind))
    checkpoint.save(tmp_path / "c", {"a": a}, {})
    loaded = checkpoint.load(tmp_path / "c")[0]["a"]
    assert (loaded.shape, loaded.dtype) == (a.shape, a.dtype.newbyteorder("="))
    np.testing.assert_array_equal(loaded, a)


@pytest.mark.parametrize("kind", ["complex64", "longdouble", "U3", "O", "M8[s]", "V4"])
def test_a_kind_that_could_not_be_read_again_is_refused(kind, tmp_path):
    with pytest.raises(ValueError, match=r"the array 'a' is .*: a checkpoint holds booleans, integers and floats"):
        checkpoint.save(tmp_path / "c", {"a": np.zeros(2, kind)}, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("info", [None, [], "{}", 3])
def test_info_is_a_dictionary(info, tmp_path):
    with pytest.raises(TypeError, match="the info of a checkpoint are dictionaries"):
        checkpoint.save(tmp_path / "c", {}, info)
    with pytest.raises(TypeError, match="have strings as names"):
        checkpoint.save(tmp_path / "c", {1: np.ones(2)}, {})


@pytest.mark.parametrize("text", ["[]", "null", "3", "[" * 100_000 + "]" * 100_000, "{", ""])
def test_what_is_no_dictionary_is_a_damaged_checkpoint(text, tmp_path, monkeypatch):
    monkeypatch.setattr(json, "dumps", lambda info: text)
    checkpoint.save(tmp_path / "c", {"a": np.ones(1)}, {})
    with pytest.raises(checkpoint.CheckpointError, match="is damaged"):
        checkpoint.load(tmp_path / "c")


@pytest.mark.parametrize(
    ("before", "after"), [(b'"I64"', b'"F64"'), (b'"I64"', b'"U64"'), (b'"shape":[2,3]', b'"shape":[3,2]')]
)
def test_the_checksum_sees_what_kind_of_numbers_they_are(before, after, tmp_path):
    checkpoint.save(tmp_path / "c", {"steps": np.arange(6).reshape(2, 3)}, {})
    (tmp_path / "c").write_bytes((tmp_path / "c").read_bytes().replace(before, after))
    with pytest.raises(checkpoint.CheckpointError, match="its checksum is wrong"):
        checkpoint.load(tmp_path / "c")


def test_a_checkpoint_of_earlier_versions_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_crc32", checkpoint._crc32_of_values)
    checkpoint.save(tmp_path / "c", {"a": np.arange(3)}, {"epoch": 1})
    monkeypatch.undo()
    arrays, info = checkpoint.load(tmp_path / "c")
    assert (arrays["a"].tolist(), info) == ([0, 1, 2], {"epoch": 1})


def test_the_whole_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    sizes, fsync = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda file: (sizes.append((os.fstat(file).st_size, os.listdir(tmp_path))), fsync(file))
    )
    checkpoint.write_atomically(tmp_path / "c", b"12345")
    assert sizes == [(5, ["c.part"])]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "c", {"a": np.ones(2)}, {"epoch": 1})

    def crash(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path / "c", {"a": np.zeros(2)}, {"epoch": 2})
    assert checkpoint.load(tmp_path / "c")[1] == {"epoch": 1}
    assert os.listdir(tmp_path) == ["c"]  # nothing is left of the new one, which would fill a full disk further


def test_what_is_left_of_an_earlier_write_is_not_written_through(tmp_path):
    (tmp_path / "other").write_bytes(b"other")
    (tmp_path / "c.part").symlink_to(tmp_path / "other")
    checkpoint.write_atomically(tmp_path / "c", b"12345")
    assert not (tmp_path / "c").is_symlink()
    assert (tmp_path / "other").read_bytes() == b"other"


def test_a_name_that_could_not_be_read_again_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be called '__metadata__'"):
        checkpoint.save(tmp_path / "c", {"__metadata__": np.ones(2)}, {})
    assert not os.listdir(tmp_path)


def test_one_changed_bit_anywhere_is_noticed(tmp_path):
    path = tmp_path / "c"
    checkpoint.save(path, {"a": np.arange(6.0), "b": np.float32(0.5)}, {"epoch": 1})
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(checkpoint.CheckpointError, match="damaged or not a checkpoint"):
            checkpoint.load(path)


def test_equal_checkpoints_are_equal_files(tmp_path):
    for name in "123456":
        checkpoint.save(tmp_path / name, {"b": np.ones(2), "a": np.zeros(3)}, {"epoch": 1})
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


@pytest.mark.parametrize("keep", [0, 1, 7, 30, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path, keep):
    path = tmp_path / "c"
    checkpoint.save(path, {"a": np.ones(100)}, {"epoch": 1})
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(checkpoint.CheckpointError, match="damaged or not a checkpoint"):
        checkpoint.load(path)
    with pytest.raises(checkpoint.CheckpointError, match="there is no checkpoint"):
        checkpoint.load(tmp_path / "other")


def test_a_file_with_numbers_that_numpy_does_not_have_is_refused(tmp_path):
    path, header = (
        tmp_path / "c",
        b'{"a":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]},"__metadata__":{"info":"{}"}}',
    )
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(checkpoint.CheckpointError, match="damaged or not a checkpoint"):
        checkpoint.load(path)


ROOT = Path(__file__).parents[1]
CPU = "processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nflags\t\t: fpu {flags}\n\nprocessor\t: 1\n"
AVX512 = "avx512f avx512cd avx512bw avx512dq avx512vl"


@pytest.mark.parametrize(
    ("vendor", "family", "flags", "expected"),
    [
        ("AuthenticAMD", 26, AVX512, "SkylakeX"),
        ("AuthenticAMD", 26, "avx2", None),  # no AVX-512: the kernels would crash
        ("AuthenticAMD", 25, AVX512, None),  # known to OpenBLAS
        ("GenuineIntel", 26, AVX512, None),
    ],
)
def test_openblas_is_told_only_about_processors_it_does_not_know(vendor, family, flags, expected):
    assert blas.kernels_for(CPU.format(vendor=vendor, family=family, flags=flags)) == expected
    assert blas.kernels_for("") is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is Linux's")
def test_freed_memory_is_kept_for_the_next_array():
    """Page faults of a process that makes and frees an array of 24 MiB again and again, with and without."""
    code = (
        "import sys, resource, numpy as np\nsys.path.insert(0, 'scripts')\n"
        "from experiments.start import keep_freed_memory\n"
        "if sys.argv[1] == 'keep' and not keep_freed_memory(): print(-1); sys.exit()\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for n in range(12):\n    if n == 2: before = faults()\n"
        "    a = np.full(3 * 2**20, 1.0); b = np.full(9, 1.0); del a\n"
        "print(faults() - before)"
    )
    kept, usual = (
        int(subprocess.run([sys.executable, "-c", code, how], capture_output=True, check=True, cwd=ROOT).stdout)
        for how in ("keep", "usual")
    )
    if kept < 0:
        pytest.skip("this C library has no mallopt")
    assert kept < 500  # pages of 4 KiB; one array has 6144
    assert usual >= kept
