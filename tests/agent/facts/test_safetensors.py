"""Headers of safetensors files: counted right, and no file, however broken, does more than raise `ModelUnreadable`."""

import json
import os
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.agent.facts.checkpoints import safetensors, with_header
from xim_agent.facts.model import ModelUnreadable
from xim_agent.facts.safetensors import INDEX_NAME, read_checkpoint, read_header

TWO = {"a.weight": ("BF16", (3, 4)), "b.weight": ("F32", (5,))}


def one_file(directory: Path, content: bytes) -> Path:
    file = directory / "model.safetensors"
    file.write_bytes(content)
    return file


def test_weights_and_bytes_are_counted(tmp_path: Path) -> None:
    one_file(tmp_path, safetensors(TWO))
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint is not None
    assert (checkpoint.parameters(None), checkpoint.size_bytes, checkpoint.main_dtype) == (17, 44, "BF16")
    assert not checkpoint.has_mtp


def test_a_directory_without_weights_has_no_checkpoint(tmp_path: Path) -> None:
    assert read_checkpoint(tmp_path) is None


def test_packed_weights_are_unpacked_and_scales_are_none(tmp_path: Path) -> None:
    tensors = {
        "model.layers.0.mlp.up_proj.qweight": ("I32", (64, 16)),  # 64 x 128 weights of 4 bits
        "model.layers.0.mlp.up_proj.qzeros": ("I32", (1, 16)),
        "model.layers.0.mlp.up_proj.scales": ("F16", (1, 128)),
        "model.layers.0.mlp.up_proj.g_idx": ("I32", (64,)),
        "model.embed_tokens.weight": ("F16", (10, 4)),
    }
    one_file(tmp_path, safetensors(tensors))
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.parameters(4) == 64 * 128 + 40


def test_fp8_weights_count_as_they_are(tmp_path: Path) -> None:
    tensors = {"x.weight": ("F8_E4M3", (128, 128)), "x.weight_scale_inv": ("F32", (1, 1))}
    one_file(tmp_path, safetensors(tensors))
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint is not None
    assert (checkpoint.parameters(8), checkpoint.main_dtype) == (128 * 128, "F8_E4M3")


def test_four_bit_blocks_in_bytes_are_unpacked(tmp_path: Path) -> None:
    tensors = {"experts.down_proj_blocks": ("U8", (2, 8, 16)), "experts.down_proj_scales": ("U8", (2, 8))}
    one_file(tmp_path, safetensors(tensors))
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.parameters(4) == 2 * 2 * 8 * 16


def test_shards_are_those_of_the_index(tmp_path: Path) -> None:
    (tmp_path / "model-1.safetensors").write_bytes(safetensors(TWO))
    (tmp_path / "model-2.safetensors").write_bytes(safetensors({"mtp.c": ("BF16", (2,))}))
    (tmp_path / "other.safetensors").write_bytes(b"not one of them")
    names = {"a.weight": "model-1.safetensors", "b.weight": "model-1.safetensors", "mtp.c": "model-2.safetensors"}
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": names}))
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint is not None
    assert (checkpoint.parameters(None), checkpoint.has_mtp) == (19, True)


def test_the_second_copy_of_the_same_weights_is_left_out(tmp_path: Path) -> None:
    one_file(tmp_path, safetensors(TWO))
    (tmp_path / "consolidated.safetensors").write_bytes(safetensors(TWO))
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.parameters(None) == 17


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("{}", "it has no weight_map"),
        ("[]", "not a JSON object"),
        ("{", "not JSON"),
        ('{"weight_map": {"a": 3}}', "a is not a string"),
        ('{"weight_map": {"a": "../../secret"}}', "not a file beside it"),
        ('{"weight_map": []}', "weight_map is not an object"),
    ],
)
def test_a_broken_index_is_named(tmp_path: Path, index: str, said: str) -> None:
    (tmp_path / INDEX_NAME).write_text(index)
    with pytest.raises(ModelUnreadable, match=said) as fault:
        read_checkpoint(tmp_path)
    assert fault.value.file == tmp_path / INDEX_NAME


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / INDEX_NAME).write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(ModelUnreadable, match=r"model-1\.safetensors: it is not there\. Fetch the model again"):
        read_checkpoint(tmp_path)


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(ModelUnreadable, match="it is no file"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("kept", [0, 7, 8, 40])
def test_a_file_cut_within_its_header_is_named(tmp_path: Path, kept: int) -> None:
    with pytest.raises(ModelUnreadable, match=r"which is not a safetensors file|its header claims"):
        read_header(one_file(tmp_path, safetensors(TWO)[:kept]))


def test_a_file_cut_within_its_data_is_named_with_what_is_missing(tmp_path: Path) -> None:
    whole = safetensors(TWO)
    with pytest.raises(ModelUnreadable, match=f"cut short: {len(whole) - 1} of {len(whole)} bytes"):
        read_header(one_file(tmp_path, whole[:-1]))


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "not a JSON object"),
        (b'{"a": 3}', "does not describe the tensor 'a'"),
        (b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', "tensor 'a'"),
        (b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}', "tensor 'a'"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}', "tensor 'a'"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}', "tensor 'a'"),
        (b'{"a": {"dtype": 4, "shape": [1], "data_offsets": [0, 4]}}', "tensor 'a'"),
        (b'{"a": {"dtype": "F32", "shape": [1' + b"0" * 400 + b'], "data_offsets": [0, 4]}}', "tensor 'a'"),
        (b'{"a": {"dtype": "F32", "shape": [1000000000, 1000000000], "data_offsets": [0, 4]}}', "tensor 'a'"),
    ],
)
def test_a_broken_header_is_named(tmp_path: Path, header: bytes, said: str) -> None:
    with pytest.raises(ModelUnreadable, match=said):
        read_header(one_file(tmp_path, with_header(header, bytes(64))))


def test_a_header_that_claims_more_than_memory_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(ModelUnreadable, match="its header claims 18446744073709551615 bytes"):
        read_header(one_file(tmp_path, struct.pack("<Q", 2**64 - 1) + b"{}"))


def test_a_directory_in_a_files_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(ModelUnreadable, match="it is no file"):
        read_checkpoint(tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
entries = st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), json_values, max_size=3) | json_values
headers = st.dictionaries(st.text(), entries, max_size=3).map(lambda header: with_header(json.dumps(header).encode()))
quiet = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@quiet
@given(content=st.binary(max_size=200) | st.binary(max_size=200).map(with_header) | headers)
def test_garbage_always_ends_in_tensors_or_in_a_named_fault(tmp_path: Path, content: bytes) -> None:
    file = one_file(tmp_path, content)
    fault, tensors = None, []
    try:
        tensors = read_header(file)
    except ModelUnreadable as raised:
        fault = raised
    if fault is not None:
        assert (fault.file, bool(fault.remedy)) == (file, True)
    assert all(tensor.size_bytes <= len(content) for tensor in tensors)


@quiet
@given(kept=st.integers(0, len(safetensors(TWO)) - 1))
def test_a_shortened_file_is_always_noticed(tmp_path: Path, kept: int) -> None:
    with pytest.raises(ModelUnreadable):
        read_header(one_file(tmp_path, safetensors(TWO)[:kept]))
