"""Safetensors: what is written comes back to the bit, and a header that lies in any way is refused before data is read."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from jaxtrain.safetensors import DTYPES, LONGEST_HEADER, Safetensors, SafetensorsError, write_safetensors

fuzz = settings(
    max_examples=int(os.environ.get("JAXTRAIN_TEST_FUZZ", "200")),
    derandomize="JAXTRAIN_TEST_FUZZ" not in os.environ,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def file_of(header, data=b"", length=None):
    """The bytes of a file with that header: text, or what JSON makes of it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(begin=0, end=8, dtype="F32", shape=(2,)):
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


def test_every_dtype_comes_back_to_the_bit(tmp_path):
    generator = np.random.default_rng(0)
    arrays = {name: generator.integers(0, 2 if name == "BOOL" else 100, (3, 2)).astype(dtype) for name, dtype in DTYPES.items()}
    arrays |= {"scalar": np.float32(2.5).reshape(()), "empty": np.zeros((0, 7), ml_dtypes.bfloat16)}
    write_safetensors(tmp_path / "a", arrays, {"by": "a test"})
    file = Safetensors(tmp_path / "a")
    assert file.metadata == {"by": "a test"}
    assert list(file.entries) == list(arrays)
    for name, array in arrays.items():
        assert file[name].dtype == array.dtype
        assert file[name].shape == array.shape
        assert file[name].tobytes() == array.tobytes()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_bytes_are_those_of_the_format(tmp_path):
    """Written here by hand, as the format's own page has it."""
    (tmp_path / "a").write_bytes(file_of({"b": entry(4, 12), "a": entry(0, 4, "I16", (1, 2))}, bytes(range(12))))
    file = Safetensors(tmp_path / "a")
    assert file["a"].tolist() == [[256, 770]]
    assert file["b"].tobytes() == bytes(range(4, 12))
    assert "c" not in file
    with pytest.raises(SafetensorsError, match=r"has no array 'c': one of: a, b"):
        file["c"]


BAD = {
    "cut off": (b"\x01\x02", "it has 2 bytes"),
    "longer than the file": (file_of(b"{}", length=3), "header would have 3 bytes, of a file of 10"),
    "a tebibyte of header": (file_of(b"{}", length=2**40), "header would have 1,099,511,627,776 bytes"),
    "no object": (file_of(b"[]"), "does not begin with {"),
    "no JSON": (file_of(b"{'a': 1}"), "is not JSON"),
    "not UTF-8": (file_of(b'{"\xff": 1}'), "is not JSON"),
    "nested without end": (file_of(b'{"a":' * 100_000), "is not JSON"),
    "a key twice": (file_of(b'{"a": 1, "a": 2}'), "a key twice"),
    "pickle": (b"\x80\x04\x95\x00\x00\x00\x00\x00", "header would have"),
    "metadata that are no strings": (file_of({"__metadata__": {"a": 1}}), "does not hold strings"),
    "an unknown dtype": (file_of({"a": entry(dtype="F128")}, bytes(8)), "dtype 'F128': one of: BOOL, "),
    "a field too many": (file_of({"a": entry() | {"x": 1}}, bytes(8)), "exactly dtype, shape and data_offsets"),
    "a shape beyond its bytes": (file_of({"a": entry(shape=(2**40,))}, bytes(8)), "takes 4,398,046,511,104 bytes"),
    "a shape that overflows": (file_of({"a": entry(shape=(2**62, 4))}, bytes(8)), "its offsets hold 8"),
    "a negative shape": (file_of({"a": entry(shape=(-2,))}, bytes(8)), r"shape of 'a' is \[-2\]"),
    "a shape of truth": (file_of({"a": entry(0, 4, shape=[True])}, bytes(4)), r"shape of 'a' is \[True\]"),
    "a fraction": (file_of({"a": entry(0, 8.0)}, bytes(8)), r"offsets of 'a' are \[0, 8.0\]"),
    "a negative offset": (file_of({"a": entry(-8, 0)}, bytes(8)), r"offsets of 'a' are \[-8, 0\]"),
    "offsets the wrong way round": (file_of({"a": entry(8, 0)}, bytes(8)), r"offsets of 'a' are \[8, 0\]"),
    "arrays that overlap": (file_of({"a": entry(), "b": entry(4, 12)}, bytes(12)), "'b' begins at byte 4 .* overlaps"),
    "a hole": (file_of({"a": entry(), "b": entry(16, 24)}, bytes(24)), "'b' begins at byte 16 .* leaves a hole"),
    "data cut short": (file_of({"a": entry()}, bytes(7)), "take 8 bytes, and 7 are there"),
    "data left over": (file_of({"a": entry()}, bytes(9)), "take 8 bytes, and 9 are there"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_file_that_lies_is_refused(tmp_path, what):
    content, words = BAD[what]
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(SafetensorsError, match=words):
        Safetensors(tmp_path / "a.safetensors")


def test_a_long_header_is_refused_whatever_the_file_has(tmp_path):
    with open(tmp_path / "a", "wb") as file:
        file.write((LONGEST_HEADER + 1).to_bytes(8, "little"))
        file.truncate(LONGEST_HEADER + 100)  # sparse
    with pytest.raises(SafetensorsError, match="header would have 100,000,001 bytes"):
        Safetensors(tmp_path / "a")


def test_a_file_that_is_gone_or_cut_short_later_is_explained(tmp_path):
    with pytest.raises(SafetensorsError, match="cannot be read: No such file"):
        Safetensors(tmp_path / "a")
    write_safetensors(tmp_path / "a", {"x": np.ones(100, np.float32)}, {})
    file = Safetensors(tmp_path / "a")
    os.truncate(tmp_path / "a", 200)
    with pytest.raises(SafetensorsError, match="ends inside 'x'"):
        file["x"]


def test_what_the_format_does_not_have_is_not_written(tmp_path):
    for arrays in ({"a": np.ones(2, complex)}, {"__metadata__": np.ones(2)}):
        with pytest.raises(ValueError, match="cannot be written"):
            write_safetensors(tmp_path / "a", arrays, {})
    assert list(tmp_path.iterdir()) == []


numbers = st.one_of(st.integers(-4, 40), st.sampled_from([2**31, 2**62, 2**63, 10**30, -1, 0.5, None, True, "8"]))
entries = st.fixed_dictionaries(
    {
        "dtype": st.one_of(st.sampled_from(sorted(DTYPES)), st.text(max_size=5), numbers),
        "shape": st.one_of(st.lists(numbers, max_size=4), numbers),
        "data_offsets": st.one_of(st.lists(numbers, max_size=3), numbers),
    },
    optional={"more": numbers},
)
headers = st.dictionaries(
    st.one_of(st.sampled_from(["a", "b", "__metadata__"]), st.text(max_size=4)), entries | numbers, max_size=4
)
files = st.one_of(
    st.binary(max_size=200),
    st.builds(file_of, headers, st.binary(max_size=64)),
    st.builds(lambda text, data: file_of(b"{" + text, data), st.binary(max_size=60), st.binary(max_size=20)),
)
GOOD = file_of({"a": entry(), "b": entry(8, 12, "U8", (2, 2)), "__metadata__": {"x": "y"}}, bytes(range(12)))
mutations = st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=4)


def read_all(path):
    """Every array of a file, as far as it is one: as many bytes as it has data."""
    file = Safetensors(path)
    return sum(file[name].nbytes for name in file.entries)


@fuzz
@given(files)
@example(file_of(b"{}"))
def test_no_file_makes_the_reader_fail_in_its_own_way(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    try:
        held = read_all(tmp_path / "a")
    except SafetensorsError:
        return
    assert held == len(content) - 8 - int.from_bytes(content[:8], "little")


@fuzz
@given(mutations, st.integers(-20, 5))
def test_no_change_of_a_good_file_does_either(tmp_path, changes, more):
    content = bytearray(GOOD)
    for place, byte in changes:
        content[place] = byte
    content = bytes(content[: len(content) + min(more, 0)]) + bytes(max(more, 0))
    (tmp_path / "a").write_bytes(content)
    try:
        held = read_all(tmp_path / "a")
    except SafetensorsError:
        return
    assert held == len(content) - 8 - int.from_bytes(content[:8], "little")
