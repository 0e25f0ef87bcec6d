"""The reader of others' weights: what PyTorch wrote (oracles), and what nobody should be made to read."""

import io
import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conftest import ORACLES
from safetensors.numpy import save_file

from clip_jax.errors import CheckpointError
from clip_jax.interop.tensors import read_tensors


class Global:
    """Pickles as a reference to module.name, which need not exist here."""

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name


class Called:
    def __init__(self, function: Any, *args: Any):
        self.function, self.args = function, args


class Persistent(tuple):
    """Pickles as a persistent id."""


class Module:
    """Pickles as an object of a TorchScript class."""

    def __init__(self, **attributes: Any):
        self.attributes = attributes


Pickler: Any = pickle._Pickler  # the one in Python, which can be extended
REBUILD = Global("torch._utils", "_rebuild_tensor_v2")


class Writer(Pickler):
    """Writes what PyTorch writes, without it."""

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if isinstance(obj, Global):
            self.write(f"c{obj.module}\n{obj.name}\n".encode())
        elif isinstance(obj, Called):
            self.save(obj.function)
            self.save(obj.args)
            self.write(pickle.REDUCE)
        elif isinstance(obj, Persistent):
            self.save(tuple(obj))
            self.write(pickle.BINPERSID)
        elif isinstance(obj, Module):
            self.save(Global("__torch__.some.model", "Module"))
            self.write(pickle.EMPTY_TUPLE + pickle.NEWOBJ)
            self.save(obj.attributes)
            self.write(pickle.BUILD)
        else:
            super().save(obj, save_persistent_id)


def tensor(
    key: str, length: int, size: Any, stride: Any, offset: Any = 0, kind: str = "FloatStorage", device: str = "cpu"
) -> Called:
    storage = Persistent(("storage", Global("torch", kind), key, device, length))
    hooks = Called(Global("collections", "OrderedDict"))
    return Called(REBUILD, storage, offset, size, stride, False, hooks)


def archive(path: Path, tree: Any, storages: dict[str, bytes], compress: int = zipfile.ZIP_STORED) -> Path:
    out = io.BytesIO()
    Writer(out, protocol=2).dump(tree)
    with zipfile.ZipFile(path, "w", compress) as file:
        file.writestr("weights/data.pkl", out.getvalue())
        for key, data in storages.items():
            file.writestr(f"weights/data/{key}", data)
    return path


TORCH = ORACLES / "torch_archives"
VALUES = np.arange(12, dtype=np.float32)


def good(path: Path) -> Path:
    return archive(path, {"a": tensor("0", 12, (3, 4), (4, 1))}, {"0": VALUES.tobytes()})


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("state_dict", np.float32), ("half", np.float16), ("bfloat16", ml_dtypes.bfloat16), ("torchscript", np.float32)],
)
def test_pytorchs_own_archives(name: str, dtype: Any) -> None:
    expected = dict(np.load(TORCH / "expected.npz"))
    got = read_tensors(TORCH / f"{name}.pt")
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        if value.dtype == np.float32:
            value = value.astype(dtype)
        assert got[key].dtype == value.dtype and np.array_equal(got[key], value), key


def test_strides_offsets_and_shared_storages(tmp_path: Path) -> None:
    half = np.arange(6, dtype=np.float16)
    brain = np.arange(4, dtype=np.float32).astype(ml_dtypes.bfloat16)
    tree = OrderedDict(
        transposed=tensor("0", 12, (4, 3), (1, 4)),
        shifted=Called(Global("torch._utils", "_rebuild_parameter"), tensor("0", 12, (2, 3), (3, 1), 6), True, None),
        scalar=tensor("0", 12, (), (), 5),
        half=tensor("h", 6, (6,), (1,), kind="HalfStorage", device="cuda:0"),
        brain=tensor("b", 4, (2, 2), (2, 1), kind="BFloat16Storage"),
    )
    storages = {"0": VALUES.tobytes(), "h": half.tobytes(), "b": brain.tobytes()}
    got = read_tensors(archive(tmp_path / "w.pt", {"epoch": 3, "state_dict": tree}, storages))
    assert np.array_equal(got["transposed"], VALUES.reshape(3, 4).T)
    assert np.array_equal(got["shifted"], VALUES[6:].reshape(2, 3))
    assert got["scalar"] == 5 and got["scalar"].shape == ()
    assert got["half"].dtype == np.float16 and np.array_equal(got["half"], half)
    assert got["brain"].dtype == ml_dtypes.bfloat16 and np.array_equal(np.float32(got["brain"]).ravel(), range(4))


def test_modules_of_a_torchscript_archive_are_flattened(tmp_path: Path) -> None:
    leaf = Module(weight=tensor("0", 12, (12,), (1,)), training=True, stride=(1, 1))
    tree = Module(visual=Module(conv1=leaf, name="x"), logit_scale=tensor("0", 12, (), (), 2), training=False)
    got = read_tensors(archive(tmp_path / "jit.pt", tree, {"0": VALUES.tobytes()}))
    assert got.keys() == {"visual.conv1.weight", "logit_scale"}
    assert np.array_equal(got["visual.conv1.weight"], VALUES)


ONE = {"0": VALUES.tobytes()}
LYING: dict[str, tuple[Any, dict[str, bytes], str]] = {
    "system call": ({"a": Called(Global("os", "system"), "touch {path}")}, {}, "asks for os.system; only descriptions"),
    "eval": (Called(Global("builtins", "eval"), "1"), {}, "asks for builtins.eval"),
    "nested name": (Called(Global("torch._utils", "os.system"), "touch"), {}, "asks for torch._utils.os.system"),
    "pickled module": (Called(Global("torch.nn", "Linear")), {}, "asks for torch.nn.Linear"),
    "call of a storage type": (Called(Global("torch", "FloatStorage"), 8), {}, "w.pt: weights/data.pkl: "),
    "short storage": ({"a": tensor("0", 13, (13,), (1,))}, ONE, "a: claims 52 bytes of storage; data/0 has 48"),
    "missing storage": ({"a": tensor("7", 12, (12,), (1,))}, ONE, "a: weights/data/7 is missing from the archive"),
    "path of a storage": ({"a": tensor("../data.pkl", 12, (3,), (1,))}, ONE, r"a: weights/data/../data.pkl is missing"),
    "too large": ({"a": tensor("0", 12, (13,), (1,))}, ONE, r"a: shape \(13,\), .*reach outside its 12 stored values"),
    "strides": ({"a": tensor("0", 12, (3, 4), (5, 1))}, ONE, r"a: .*strides \(5, 1\).*reach outside"),
    "offset": ({"a": tensor("0", 12, (3, 4), (4, 1), 1)}, ONE, "a: .*offset 1 reach outside"),
    "huge": ({"a": tensor("0", 12, (1 << 40, 1 << 40), (0, 0))}, ONE, "a: .*reach outside"),
    "empty": ({"a": tensor("0", 12, (0, 1 << 70), (1, 1))}, ONE, "a: .*reach outside"),
    "negative stride": ({"a": tensor("0", 12, (4,), (-1,), 11)}, ONE, "a: .*a negative number"),
    "negative offset": ({"a": tensor("0", 12, (4,), (1,), -4)}, ONE, "a: .*a negative number"),
    "negative size": ({"a": tensor("0", 12, (-4, -3), (1, 1))}, ONE, "a: .*a negative number"),
    "float size": ({"a": tensor("0", 12, (4.0,), (1,))}, ONE, "a: .*a negative number"),
    "ranks": ({"a": tensor("0", 12, (4, 3), (1,))}, ONE, "a: its shape and strides do not match"),
    "no storage": ({"a": Called(REBUILD, 1, 0, (1,), (1,))}, {}, "its storage is none"),
    "no tensor": ({"a": "text"}, {}, "a is a str; expected a tensor"),
    "no name": ({7: tensor("0", 12, (12,), (1,))}, ONE, "7 is no name of a tensor"),
    "a list": ([1, 2], {}, "holds a list; expected a state dict"),
    "nothing": ({}, {}, "holds no tensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", LYING)
def test_lying_archives_are_refused_in_one_line(case: str, tmp_path: Path) -> None:
    tree, storages, message = LYING[case]
    trace = tmp_path / "trace"
    if case == "system call":
        tree["a"].args = (f"touch {trace}",)
    with pytest.raises(CheckpointError, match=message) as refused:
        read_tensors(archive(tmp_path / "w.pt", tree, storages))
    assert str(tmp_path / "w.pt") in str(refused.value) and "\n" not in str(refused.value)
    assert not trace.exists()


def raw(table: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("weights/data.pkl", table)

    return write


def twice(path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(good(path), "a") as file:
        file.writestr("weights/data/0", b"")


def flipped(path: Path) -> None:
    data = bytearray(good(path).read_bytes())
    data[data.index(VALUES[1:].tobytes())] ^= 1
    path.write_bytes(data)


def cyclic(path: Path) -> None:
    """A module that holds itself."""
    raw(b"\x80\x02c__torch__.m\nM\nq\x00)\x81q\x01}U\x01sh\x01sb.")(path)


DAMAGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda p: p.write_bytes(good(p).read_bytes()[:-30]), "truncated, or no zip archive"),
    "pickle of old": (lambda p: p.write_bytes(pickle.dumps({})), "no zip archive as torch.save writes it since"),
    "flipped bit": (flipped, "a: weights/data/0: truncated or damaged"),
    "twice in the zip": (twice, "weights/data/0 occurs twice in the archive"),
    "compressed": (
        lambda p: archive(p, {"a": tensor("0", 12, (12,), (1,))}, ONE, zipfile.ZIP_DEFLATED),
        "weights/data.pkl is compressed",
    ),
    "truncated pickle": (raw(b"\x80\x02}q"), "weights/data.pkl: "),
    "huge memo": (raw(b"\x80\x02}r\xff\xff\xff\x7f."), "holds no tensors"),
    "deep key": (raw(b"\x80\x02})" + b"\x85" * 500_000 + b"K\x01s."), "data.pkl: a tuple as a key"),
    "deep name": (raw(b"\x80\x04\x8c\x05torch)" + b"\x85" * 500_000 + b"\x93."), "whose name is no text"),
    "unknown operation": (raw(b"\x80\x02\x8f."), "data.pkl: the operation EMPTY_SET, which no table of tensors needs"),
    "call of a result": (raw(b"\x80\x02}}R."), "data.pkl: a call that describes no tensor"),
    "empty stack": (raw(b"\x80\x02\x87."), "data.pkl: more is taken from the stack than there is"),
    "other reference": (raw(b"\x80\x02U\x04fileQ."), "a reference to something that is no storage"),
    "change of a function": (
        raw(b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}U\x08functionNsb."),
        "weights/data.pkl: ",
    ),
    "cycle": (cyclic, "is nested too deeply"),
    "no table": (lambda p: zipfile.ZipFile(p, "w").writestr("x", ""), "0 tables NAME/data.pkl"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_archives_are_refused_in_one_line(case: str, tmp_path: Path) -> None:
    write, message = DAMAGED[case]
    write(tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=message) as refused:
        read_tensors(tmp_path / "w.pt")
    assert str(tmp_path / "w.pt") in str(refused.value) and "\n" not in str(refused.value)


def test_no_byte_of_an_archive_can_do_more_than_raise_a_checkpoint_error(tmp_path: Path) -> None:
    """Every byte of the table, set to other values: nothing but the one error comes out."""
    out = io.BytesIO()
    Writer(out, protocol=2).dump({"a": tensor("0", 12, (3, 4), (4, 1))})
    rng = np.random.default_rng(0)
    refused = 0
    for position in range(len(out.getvalue())):
        for value in rng.integers(256, size=4):
            table = bytearray(out.getvalue())
            table[position] = value
            with zipfile.ZipFile(tmp_path / "w.pt", "w") as file:
                file.writestr("weights/data.pkl", bytes(table))
                file.writestr("weights/data/0", VALUES.tobytes())
            try:
                read_tensors(tmp_path / "w.pt")
            except CheckpointError:
                refused += 1
    assert refused > 2 * len(out.getvalue())


def test_values_that_are_no_numbers(tmp_path: Path) -> None:
    values = VALUES.copy()
    values[3] = np.nan
    masked = {"mask": np.array([0, -np.inf], np.float32)}
    save_file({"w": values}, tmp_path / "w.safetensors")
    save_file(masked, tmp_path / "mask.safetensors")
    archive(tmp_path / "w.pt", {"w": tensor("0", 12, (12,), (1,))}, {"0": values.tobytes()})
    for name in ("w.safetensors", "w.pt"):
        with pytest.raises(CheckpointError, match=rf"{name}: w holds values that are no numbers"):
            read_tensors(tmp_path / name)
        assert np.array_equal(read_tensors(tmp_path / name, allow_nan=True)["w"], values, equal_nan=True)
    assert np.isinf(read_tensors(tmp_path / "mask.safetensors")["mask"]).any()


def safetensors(path: Path, header: str, data: bytes) -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + data)
    return path


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
         b"\0" * 4, "a occurs twice in the header"),
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"\0" * 4, "header: not readable as safetensors"),
        ('{"a":{"dtype":"F32","shape":[99999999999],"data_offsets":[0,4]}}', b"\0" * 4, "not readable as safetensors"),
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}', b"\0" * 4, "not readable as safetensors"),
        ('{"a":', b"", "header: not readable as safetensors"),
        ("[" * 100000, b"", "header: not readable as safetensors"),
        ("{}", b"", "holds no tensors"),
    ],
)  # fmt: skip
def test_lying_safetensors_are_refused_in_one_line(header: str, data: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message) as refused:
        read_tensors(safetensors(tmp_path / "w.safetensors", header, data))
    assert "w.safetensors" in str(refused.value) and "\n" not in str(refused.value)


def test_truncated_safetensors(tmp_path: Path) -> None:
    for data in (b"", b"\xff" * 8, b"\x05\0\0\0\0\0\0\0{}"):
        (tmp_path / "w.safetensors").write_bytes(data)
        with pytest.raises(CheckpointError, match="header: truncated, or no safetensors file"):
            read_tensors(tmp_path / "w.safetensors")


def shards(directory: Path, where: dict[str, str]) -> Path:
    save_file({"a": VALUES, "b": VALUES.astype(ml_dtypes.bfloat16)}, directory / "one.safetensors")
    save_file({"c": np.ones(1, np.float16)}, directory / "two.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return directory


def test_shards(tmp_path: Path) -> None:
    where = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    got = read_tensors(shards(tmp_path, where))
    assert np.array_equal(got["a"], VALUES) and got["b"].dtype == ml_dtypes.bfloat16 and got["c"] == 1
    with pytest.raises(CheckpointError, match=r"two.safetensors: holds c, which .*index.json has in one.safetensors"):
        read_tensors(shards(tmp_path, where | {"c": "one.safetensors", "d": "two.safetensors"}))
    with pytest.raises(CheckpointError, match=r"two.safetensors: no d; model.safetensors.index.json lists it there"):
        read_tensors(shards(tmp_path, where | {"d": "two.safetensors"}))
    with pytest.raises(CheckpointError, match=r"three.safetensors: not found"):
        read_tensors(shards(tmp_path, where | {"d": "three.safetensors"}))
    with pytest.raises(CheckpointError, match=r"shard '../one.safetensors' is no file name"):
        read_tensors(shards(tmp_path, where | {"d": f"..{os.sep}one.safetensors"}))


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere.pt: not found"):
        read_tensors(tmp_path / "nowhere.pt")
    with pytest.raises(CheckpointError, match=r"no weights there; expected one of model.safetensors, "):
        read_tensors(tmp_path)
