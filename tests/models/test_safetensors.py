"""Oracle: the official safetensors package. Each fault of a file or a folder has its row; the fuzz looks for more."""

import json
import os
import re
import resource
import tracemalloc
import weakref

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxaroo.models.safetensors import DTYPES, INDEX, SINGLE, CheckpointError, read_index, read_rows, read_tensor, write

F32, ONES = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, {"a": np.ones(2), "b": np.ones(2)}
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def pack(header, data=8, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data)


def save(folder, arrays, get=None, **options):
    write(folder, {n: (a.dtype, a.shape) for n, a in arrays.items()}, get or arrays.__getitem__, **options)


def official(raw):
    pairs = safetensors.deserialize(raw)
    return {name: np.frombuffer(t["data"], DTYPES[t["dtype"]]).reshape(t["shape"]) for name, t in pairs}


def bits(tensors):
    arrays = {n: t if isinstance(t, np.ndarray) else read_tensor(t) for n, t in tensors.items()}
    return {name: (array.dtype, array.shape, array.tobytes()) for name, array in arrays.items()}


def peak(function, *args):  # what comes, or our error, and the most memory that it took
    tracemalloc.start()
    try:
        return function(*args), tracemalloc.get_traced_memory()[1]
    except CheckpointError as error:
        return error, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def many():  # one tensor per dtype, of several ranks and random bytes: NaNs with payloads, denormals and all
    rng, shapes = np.random.default_rng(0), [(3, 5), (), (0,), (2, 0, 3), (7,), (1, 2, 3, 4)]
    for i, (code, dtype) in enumerate(DTYPES.items()):
        raw = rng.integers(0, 2 if code == "BOOL" else 256, (*shapes[i % 6], dtype.itemsize), np.uint8)
        yield f"τ.{code}", raw.view(dtype)[..., 0].copy()


def test_every_dtype_is_the_same_bytes_to_the_official_library(tmp_path):
    arrays = dict(many())
    safetensors.numpy.save_file(arrays, tmp_path / SINGLE, {"format": "pt"})
    assert bits(read_index(tmp_path)) == bits(arrays)
    assert all(read_tensor(info).flags.carray for info in read_index(tmp_path).values())  # writable and C-contiguous
    save(new := tmp_path / "new", arrays)
    assert bits(official((new / SINGLE).read_bytes())) == bits(arrays)
    assert all(info.offset % info.dtype.itemsize == 0 for info in read_index(new).values())
    with safetensors.safe_open(new / SINGLE, "np") as file:
        assert file.metadata() == {"format": "pt"}
    with pytest.raises(FileExistsError, match=r"already holds model\.safetensors"):
        save(new, ONES, max_shard_bytes=16)


def test_write_shards_in_order_one_tensor_at_a_time_and_shows_no_file_before_the_end(tmp_path, monkeypatch):
    arrays, alive, placed, replace = dict(many()) | {"big": np.arange(100.0).reshape(4, 25).T}, {}, [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (placed.append(b.name), replace(a, b)))

    def get(name):
        assert all(ref() is None for ref in alive.values())
        assert all(path.name.startswith(".") for path in tmp_path.iterdir())
        array = arrays[name].copy("K")  # "big" stays transposed
        alive[name] = weakref.ref(array)
        return array

    save(tmp_path, arrays, get, max_shard_bytes=100)
    index, found = json.loads((tmp_path / INDEX).read_text()), read_index(tmp_path)
    assert [*alive] == [*arrays]
    assert index["metadata"] == {"total_size": sum(a.nbytes for a in arrays.values())}
    shards = [f"model-{i + 1:05d}-of-{len(placed) - 1:05d}.safetensors" for i in range(len(placed) - 1)]
    assert placed == [*shards, INDEX]
    assert {*placed} == {path.name for path in tmp_path.iterdir()}
    held = {shard: official((tmp_path / shard).read_bytes()) for shard in shards}
    assert all(sum(a.nbytes for a in shard.values()) <= 100 or len(shard) == 1 for shard in held.values())
    assert {n: s for s in shards for n in held[s]} == index["weight_map"] == {n: i.file.name for n, i in found.items()}
    assert bits(found) == bits(arrays)


def test_a_tensor_is_read_once_and_rows_alone(tmp_path):
    wide = np.arange(2**21, dtype=np.float32).reshape(1024, 8, 256)
    save(tmp_path, {"wide": wide, "none": np.ones((0, 3)), "scalar": np.ones(()), "flag": np.array([True, False])})
    infos = read_index(tmp_path)
    assert wide.nbytes <= peak(read_tensor, infos["wide"])[1] < 1.05 * wide.nbytes
    assert peak(read_rows, infos["wide"], 7, 9)[1] < 100_000
    for start, stop in [(0, 1024), (1, 2), (1023, 1024), (5, 5), (1024, 1024)]:
        np.testing.assert_array_equal(read_rows(infos["wide"], start, stop), wide[start:stop], strict=True)
    assert read_rows(infos["none"], 0, 0).shape == (0, 3)
    for name, start, stop in [("wide", -1, 2), ("wide", 3, 2), ("wide", 0, 1025), ("scalar", 0, 0)]:
        with pytest.raises(ValueError, match=f"read_rows: {start}:{stop} of shape"):
            read_rows(infos[name], start, stop)
    with open(tmp_path / SINGLE, "r+b", buffering=0) as file:
        file.seek(infos["flag"].offset)
        file.write(b"\2")
        with pytest.raises(CheckpointError, match="BOOL tensor at byte"):
            read_tensor(infos["flag"])
        file.truncate(infos["wide"].offset + wide.nbytes - 3)
    with pytest.raises(CheckpointError, match="3 bytes short of a tensor's end"):
        read_tensor(infos["wide"])


@pytest.mark.parametrize(("where", "nth"), [("get", 3), ("fsync", 2), ("replace", 1), ("replace", 4), ("full", 0)])
def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch, request, where, nth):
    arrays, calls = {f"t{i}": np.ones(2**18) for i in range(3)}, []
    real, limits = getattr(os, where, arrays.get), resource.getrlimit(resource.RLIMIT_FSIZE)

    def failing(*args):
        calls.append(args)
        if len(calls) == nth:
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(os, where, failing, raising=False)
    if where == "full":  # the kernel itself refuses, in the middle of a tensor
        request.addfinalizer(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    with pytest.raises(OSError, match=r"No space left|File too large"):
        save(tmp_path, arrays, failing if where == "get" else None, max_shard_bytes=2**21)
    assert [*tmp_path.iterdir()] == []


def test_write_refuses(tmp_path):
    f4, big = np.ones(2, "<f4"), np.ones(2, ">f4")
    for spec, array, metadata, message in [
        ({"a": f4}, np.ones(3, "<f4"), {}, r"get\('a'\): <f4 float32 \(3,\); expected float32 \(2,\)"),
        ({"a": f4}, big, {}, r"get\('a'\): >f4"),
        ({"a": big}, big, {}, r"'a': >f4 .*expected ints >= 0, and one of .*bfloat16"),
        ({"__metadata__": f4}, f4, {}, "rename"),
        ({"a": f4}, f4, {"n": 1}, "metadata .*expected strings"),
    ]:
        with pytest.raises(ValueError, match=message):
            save(tmp_path, spec, lambda _, array=array: array, metadata=metadata)


def each(field, *values):
    return [pack({"a": F32 | {field: value}}) for value in values]


def spans(data, **offsets):
    return pack({n: {"dtype": "U8", "shape": [e - b], "data_offsets": [b, e]} for n, (b, e) in offsets.items()}, data)


def made(name, make):
    return lambda f: ((f / name).exists() and (f / name).rename(f.parent / "out"), make(f / name))


OUT = [f"{name}.safetensors" for name in ("/x", "../x", "y/../../x", "./x", "y//x", "y\\x", "", "x\0", "x" * 300)]
BAD = {  # a message, and what must bring it: a file, an index (str), changes of its weight_map (dict), or other harm
    r"header of \d+ bytes, file of \d+": [b"", b"\2\0\0\0\0\0\0", pack({}, 0, 3), pack({}, 8, 2**64 - 1)],
    "header of 100000001": [made(SINGLE, lambda p: (p.write_bytes(pack({}, 0, 10**8 + 1)), os.truncate(p, 2 * 10**8)))],
    "200000000 bytes of JSON": [made(INDEX, lambda p: (p.touch(), os.truncate(p, 2 * 10**8)))],
    r"expected '\{' first": [pack(b""), pack(b"[]"), pack(b" {}"), pack(b"\xef\xbb\xbf{}"), "[]"],
    "codec can't": [pack(b'{"\xff": 1}'), pack(b'{"\\ud800": 1}'), {"a": "\ud800.safetensors"}],
    "expected plain JSON": [pack(b"{"), pack(b'{"a":1,}'), pack(b"{}\0"), pack(b"{'a':1}"), '{"weight_map": {}'],
    "'NaN'|'-?Infinity'": [pack(b'{"a":NaN}'), pack(b'{"a":[-Infinity]}'), '{"weight_map": {}, "n": NaN}'],
    "recursion depth": [pack(b'{"a":' + b"[" * 10**5), pack(b'{"a":' * 10**5), '{"a":' * 10**5],
    r"at most 2000000\.": [pack(b'{"a":[' + b"0," * 2_000_000 + b"0]}")],
    "header: 'a': the key 'dtype' stands twice": [pack(b'{"a":{"dtype":"F32","shape":[],"dtype":"F32"}}')],
    "the key 'a' stands twice": [pack(b'{"a":1,"b":2,"a":1}'), '{"weight_map": {}, "m": {"m": [{"a": 1, "a": 1}]}}'],
    "__metadata__ is .*expected strings": [pack({"__metadata__": v}) for v in ({"k": 1}, {"k": {}}, [], None, "x")],
    "tensor 'a': the entry .*no more": [pack({"a": v}) for v in (1, None, [], {}, F32 | {"x": 1}, {"dtype": "F32"})],
    "tensor 'a': dtype .*expected one of BOOL, U8": each("dtype", "F33", "f32", "F4", 7, None, [], {}),
    "tensor 'a': shape .*integers >= 0": each("shape", 2, "2", None, [2.0], [True], [-2], [[2]], [1] * 33, [10**4000]),
    "tensor 'a': shape .* makes .* beyond int64": each("shape", [], [3], [2**40, 2**40], [10**90]),
    "shape .* of F32 makes 0 bytes": [pack({"a": F32 | {"shape": [2**62, 4, 0], "data_offsets": [0, 0]}}, 0)],
    "'a': data_offsets .*within 8": each("data_offsets", [0], [0, 8, 8], [8, 0], [-8, 0], [0, 9], [0, 8.0], [False, 8]),
    "another tensor overlaps tensor 'b'": [spans(8, a=(0, 5), b=(4, 8)), spans(8, a=(0, 8), b=(4, 4))],
    "4 unused bytes before tensor 'b'": [spans(8, b=(4, 8)), spans(12, b=(8, 12), a=(0, 4))],
    "4 unused bytes before the end of the file": [spans(8, a=(0, 4)), pack({}, 4)],
    "no such folder": [lambda f: f.rename(f.parent / "gone")],
    r"holds \[.*'p.bin'\].*Pickle files .* never read": [lambda f: (f / INDEX).rename(f / "p.bin")],
    "weight_map is .*tensor names": ["{}", '{"weight_map": {}}', '{"weight_map": []}', {"a": 1}, {"a": None}],
    "index.json names .*expected a .safetensors file inside": [{"c": name} for name in [*OUT, "a.bin"]],
    f"{TWO}: cannot be read": [lambda f: (f / TWO).unlink()],
    "holds tensor 'a', which the index lists in None": ['{"weight_map": {"b": "%s"}}' % ONE],  # noqa: UP031
    f"holds tensor 'a', which the index lists in '{ONE}'": [lambda f: (f / TWO).write_bytes((f / ONE).read_bytes())],
    "does not hold tensor 'c'": [{"c": ONE}],
    "is a link to .*cp -rL": [made(name, lambda p: p.symlink_to("../out")) for name in (SINGLE, INDEX, ONE)],
    "up is a link to .*; expected": [{"a": f"up/it/{ONE}"}],  # though the rest of the path comes in again
    "not a regular file": [made(name, make) for name in (SINGLE, INDEX, ONE) for make in (os.mkdir, os.mkfifo)],
}


@pytest.mark.parametrize("message", BAD)
def test_what_is_bad_is_refused_by_name(tmp_path, message):
    for i, case in enumerate(BAD[message]):
        save(folder := tmp_path / str(i) / "it", ONES, max_shard_bytes=16)
        (folder / "up").symlink_to("..")
        if callable(case):
            case(folder)
        elif isinstance(case, bytes):
            (folder / SINGLE).write_bytes(case)
        else:
            text = case if isinstance(case, str) else json.dumps({"weight_map": {"a": ONE, "b": TWO} | case})
            (folder / INDEX).write_text(text)
        error, used = peak(read_index, folder)
        assert re.search(f"(?s){folder}.*{message}", str(error))
        assert used < 3e7


def test_links_and_folders_inside_are_read_and_one_file_comes_first(tmp_path):
    save(folder := tmp_path / "it", ONES, max_shard_bytes=16)
    (folder / "in").mkdir()
    (folder / ONE).rename(folder / "in" / ONE)
    (folder / TWO).symlink_to((folder / TWO).rename(folder / "b"))
    (tmp_path / "link").symlink_to("it")
    (folder / INDEX).write_text("\n " + json.dumps({"weight_map": {"a": f"in/{ONE}", "b": TWO}}))
    assert [info.file for info in read_index(tmp_path / "link").values()] == [folder / "in" / ONE, folder / "b"]
    (folder / SINGLE).write_bytes(pack({"c": F32}))
    assert read_index(folder).keys() == {"c"}


HEADER = pack({"__metadata__": {"k": "v"}, "a": F32, "b": F32 | {"data_offsets": [8, 16]}}, 16)
INDEX_TEXT = json.dumps({"metadata": {"total_size": 32}, "weight_map": {"a": ONE, "b": TWO}}).encode()
ODD = rb'-1 2.0 1e400 18446744073709551615 true null NaN "" [[]] 0 8 {"a":1,"a":1} "F64" [0] {} "a" "../a" [4] [8,8]'
EDIT = st.tuples(st.integers(0, 250), st.integers(-20, 6), st.binary(max_size=3), st.sampled_from(ODD.split()))


@settings(max_examples=1000, deadline=2000)
@given(st.lists(EDIT, min_size=1, max_size=3), st.integers(0, 4), st.booleans())
@pytest.mark.slow
def test_fuzz_ends_in_our_error_or_in_what_the_official_library_reads(tmp_path_factory, edits, length, index):
    folder, raw = tmp_path_factory.getbasetemp() / f"fuzz{index}", INDEX_TEXT if index else HEADER
    for at, gone, new, odd in edits:  # another JSON value in place of one, or other bytes in place of some
        values = [m.span() for m in re.finditer(rb'(?<=: )("[^"]*"|\[[^]]*\]|\{[^{}]*\})|(?<=[ [])\d+', raw)]
        start, stop, new = (*values[at % len(values)], odd) if gone < 0 and values else (at, at + gone, new)
        raw = raw[:start] + new + raw[stop:]
    raw = pack(raw[8:-16], 16) if length and not index else raw  # with the right length, mostly
    if not folder.is_dir():
        save(folder, ONES, max_shard_bytes=16)
    (folder / (INDEX if index else SINGLE)).write_bytes(raw)
    found, used = peak(read_index, folder)
    assert used < 2e6
    if not isinstance(found, CheckpointError):
        assert bits(found).items() <= bits(ONES).items() if index else bits(found) == bits(official(raw))
