"""State dicts from files that others made: safetensors, PyTorch's zip archives and TorchScript archives.

No PyTorch, no unpickler, and nothing in a file runs: an archive's pickle is read as data, by a stack machine of
the operations that describe tensors. Every size, stride and offset is compared with the bytes that are there.
The layout of an archive is that of torch/serialization.py: `data.pkl` refers to storages `data/<key>` by
persistent ids ("storage", type, key, device, number of elements).
"""

import json
import math
import pickletools
import struct
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from clip_jax.errors import CheckpointError
from clip_jax.progress import brief

Tensors = dict[str, np.ndarray]

# What a model directory may hold, the first that exists is read.
DIRECTORY_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_pytorch_model.bin",
)
MAX_HEADER = 100_000_000  # bytes of a safetensors header, the library's own limit
MAX_DEPTH = 100  # of modules in a TorchScript archive

_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


def read_tensors(path: str | Path, *, allow_nan: bool = False) -> Tensors:
    """Name → array, of the stored dtypes, from a file or a model directory.

    Args:
      path: `.safetensors`; a zip archive that `torch.save` or `torch.jit.save` wrote (`.pt`, `.pth`, `.bin`);
        an index of shards (`.index.json`); or a directory with one of `DIRECTORY_FILES`.
      allow_nan: whether values that are no numbers are let through. (Infinities are: masks hold them.)

    Raises:
      CheckpointError: the file is missing, truncated, not of these formats, asks for code to be run, or
        describes a tensor that its bytes do not hold.
    """
    path = Path(path)
    if path.is_dir():
        found = next((path / name for name in DIRECTORY_FILES if (path / name).is_file()), None)
        if found is None:
            raise CheckpointError(f"{path}: no weights there; expected one of {', '.join(DIRECTORY_FILES)}")
        path = found
    if not path.is_file():
        raise CheckpointError(f"{path}: not found; expected a file of weights")
    if path.name.endswith(".index.json"):
        return _read_shards(path, allow_nan)
    tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _read_archive(path)
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors")
    if not allow_nan:
        for key, value in brief(tensors.items(), total=len(tensors), desc=f"reading {path.name}", unit="tensor"):
            if value.dtype.kind not in "iub" and np.isnan(value).any():
                raise CheckpointError(f"{path}: {key} holds values that are no numbers (NaN); allow_nan lets them in")
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable JSON ({_one_line(error)})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON object expected, not a {type(value).__name__}")
    return value


def _read_shards(path: Path, allow_nan: bool) -> Tensors:
    where = read_json(path).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise CheckpointError(f"{path}: no weight_map from names to files")
    tensors: Tensors = {}
    for name in sorted(set(where.values())):
        if Path(name).name != name or name.endswith(".index.json"):
            raise CheckpointError(f"{path}: shard {name!r} is no file name")
        for key, value in read_tensors(path.parent / name, allow_nan=allow_nan).items():
            if where.get(key) != name:
                raise CheckpointError(f"{path.parent / name}: holds {key}, which {path.name} has in {where.get(key)}")
            tensors[key] = value
    if missing := sorted(where.keys() - tensors.keys()):
        raise CheckpointError(f"{path.parent / where[missing[0]]}: no {missing[0]}; {path.name} lists it there")
    return tensors


def _read_safetensors(path: Path) -> Tensors:
    _check_header(path)
    tensors: Tensors = {}
    key = "header"
    try:
        with safe_open(path, framework="numpy") as file:
            for key in file.keys():  # noqa: SIM118  (not a mapping)
                tensors[key] = file.get_tensor(key)
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        raise CheckpointError(f"{path}: {key}: not readable as safetensors ({_one_line(error)})") from None
    return tensors


def _check_header(path: Path) -> None:
    """Refuses a name that occurs twice: the library keeps one of the two without a word."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise CheckpointError(f"{path}: {key} occurs twice in the header")
            found[key] = value
        return found

    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else MAX_HEADER + 1
        if length > min(MAX_HEADER, path.stat().st_size - 8):
            raise CheckpointError(f"{path}: header: truncated, or no safetensors file")
        try:
            json.loads(file.read(length), object_pairs_hook=unique)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: header: not readable as safetensors ({_one_line(error)})") from None


class _Inert:
    """What a TorchScript archive's module becomes: attributes, and no behaviour."""

    def __init__(self) -> None:
        self.attributes: dict[Any, Any] = {}


class _Global(NamedTuple):
    """A name that an archive's table refers to. It is never looked up."""

    module: str
    name: str


class _Storage(NamedTuple):
    dtype: np.dtype
    key: str
    length: int


class _Tensor(NamedTuple):
    """A tensor as an archive describes it; `_array` checks the description."""

    storage: Any
    offset: Any
    size: Any
    stride: Any


_TENSOR, _PARAMETER = _Global("torch._utils", "_rebuild_tensor_v2"), _Global("torch._utils", "_rebuild_parameter")
_ORDERED_DICT = _Global("collections", "OrderedDict")
_MARK = object()
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (), "MARK": _MARK}
_LITERALS = {
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "SHORT_BINSTRING", "BINSTRING", "SHORT_BINBYTES", "BINBYTES",
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT",
}  # fmt: skip


class _Table:
    """Reads an archive's pickle as data: a stack machine of the operations that describe tensors, and no others.

    Keys of dicts are texts and whole numbers only: the hash of a tuple recurses as deeply as the tuple is nested.
    """

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def read(self, table: bytes) -> Any:
        argument: Any
        for opcode, argument, _ in pickletools.genops(table):
            name = opcode.name
            if name == "STOP":
                return self.stack.pop()
            if name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name in _LITERALS:
                self.stack.append(argument)
            elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
                self.memo[len(self.memo) if name == "MEMOIZE" else argument] = self.stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                self.stack.append(self.memo[argument])
            elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
                self.stack.append(tuple(self.pop(int(name[-1]))))
            elif name not in ("PROTO", "FRAME"):
                self.operate(name, argument)
        raise CheckpointError("truncated")

    def pop(self, count: int) -> list[Any]:
        if count > len(self.stack):
            raise CheckpointError("more is taken from the stack than there is")
        items = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return items

    def pop_to_mark(self) -> list[Any]:
        items = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def operate(self, name: str, argument: Any) -> None:
        match name:
            case "EMPTY_DICT":
                self.stack.append({})
            case "EMPTY_LIST":
                self.stack.append([])
            case "TUPLE":
                self.stack.append(tuple(self.pop_to_mark()))
            case "APPEND" | "APPENDS":
                items = self.pop_to_mark() if name == "APPENDS" else self.pop(1)
                self.stack[-1].extend(items)
            case "SETITEM" | "SETITEMS":
                items = self.pop_to_mark() if name == "SETITEMS" else self.pop(2)
                for key, value in zip(items[::2], items[1::2], strict=True):
                    if not isinstance(key, str | int):
                        raise CheckpointError(f"a {type(key).__name__} as a key")
                    self.stack[-1][key] = value
            case "GLOBAL":
                self.stack.append(_allowed(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                self.stack.append(_allowed(*self.pop(2)))
            case "BINPERSID":
                self.stack.append(_storage(self.stack.pop()))
            case "REDUCE" | "NEWOBJ":
                function, arguments = self.pop(2)
                self.stack.append(_made(function, arguments, new=name == "NEWOBJ"))
            case "BUILD":
                target, state = self.pop(2)
                if isinstance(target, _Inert) and isinstance(state, dict):
                    target.attributes = state
                elif not isinstance(target, dict):  # of a state dict, `_metadata`: versions of its modules
                    raise CheckpointError(f"a state for a {type(target).__name__}")
                self.stack.append(target)
            case _:
                raise CheckpointError(f"the operation {name}, which no table of tensors needs")


def _allowed(module: Any, name: Any) -> _Global:
    if not (isinstance(module, str) and isinstance(name, str)):
        raise CheckpointError("asks for something whose name is no text")
    found = _Global(module, name)
    if not (
        found in (_TENSOR, _PARAMETER, _ORDERED_DICT)
        or (module == "torch" and name in _STORAGES)
        or module.split(".")[0] == "__torch__"
    ):
        raise CheckpointError(f"asks for {module}.{name}; only descriptions of tensors are read, no code is run")
    return found


def _storage(reference: Any) -> _Storage:
    match reference:
        case ("storage", _Global(module="torch", name=kind), str() as key, str(), int() as length):
            return _Storage(np.dtype(_STORAGES[kind]), key, length)
    raise CheckpointError("a reference to something that is no storage")


def _made(function: Any, arguments: Any, new: bool) -> Any:
    """What a call in the table stands for."""
    match function, arguments:
        case _Global(), () if new and function.module.split(".")[0] == "__torch__":
            return _Inert()
        case _, (storage, offset, size, stride, *_) if function == _TENSOR and not new:
            return _Tensor(storage, offset, size, stride)
        case _, (_Tensor() as tensor, *_) if function == _PARAMETER and not new:
            return tensor
        case _, () if function == _ORDERED_DICT and not new:
            return {}
    raise CheckpointError("a call that describes no tensor")


def _read_archive(path: Path) -> Tensors:
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise CheckpointError(
            f"{path}: truncated, or no zip archive as torch.save writes it since PyTorch 1.6 ({_one_line(error)})"
        ) from None
    with archive:
        names = archive.namelist()
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise CheckpointError(f"{path}: {twice[0]} occurs twice in the archive")
        tables = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(tables) != 1:
            raise CheckpointError(f"{path}: {len(tables)} tables NAME/data.pkl in the archive; expected one")
        root = tables[0].removesuffix("data.pkl")
        if root + "byteorder" in names and _entry(archive, path, root + "byteorder") != b"little":
            raise CheckpointError(f"{path}: byteorder: only little-endian archives are read")
        table = _entry(archive, path, tables[0])
        tree = _unpickle(path, tables[0], table)
        storages: dict[str, bytes] = {}
        tensors: Tensors = {}
        for key, tensor in _flatten(path, tree):
            if key in tensors:
                raise CheckpointError(f"{path}: {key} occurs twice")
            storage = tensor.storage
            if not isinstance(storage, _Storage):
                raise CheckpointError(f"{path}: {key}: its storage is none")
            if storage.key not in storages:
                storages[storage.key] = _entry(archive, path, f"{root}data/{storage.key}", key)
            tensors[key] = _array(f"{path}: {key}", tensor, storage, storages[storage.key])
    return tensors


def _entry(archive: zipfile.ZipFile, path: Path, name: str, key: str = "") -> bytes:
    """An entry's bytes. Only stored ones are read, so none can be larger than the file; the CRC is checked."""
    label = f"{path}: {key}: {name}" if key else f"{path}: {name}"
    try:
        info = archive.getinfo(name)
        if info.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"{label} is compressed; PyTorch's archives are not")
        return archive.read(info)
    except KeyError:
        raise CheckpointError(f"{label} is missing from the archive") from None
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{label}: truncated or damaged ({_one_line(error)})") from None


def _unpickle(path: Path, name: str, table: bytes) -> Any:
    try:
        return _Table().read(table)
    except Exception as error:  # a malformed pickle raises nearly anything
        raise CheckpointError(f"{path}: {name}: {_one_line(error)}") from None


def _flatten(path: Path, tree: Any, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, _Tensor]]:
    """Dotted names and tensors of a state dict, of a training checkpoint's one, or of a module tree."""
    if depth > MAX_DEPTH:
        raise CheckpointError(f"{path}: {prefix[:80]}… is nested too deeply")
    is_module = isinstance(tree, _Inert)
    items = tree.attributes if is_module else tree
    if not isinstance(items, Mapping):
        raise CheckpointError(f"{path}: holds a {type(tree).__name__}; expected a state dict")
    for name in () if is_module else ("state_dict", "model_state_dict"):
        if isinstance(items.get(name), Mapping):
            items = items[name]
    for key, value in items.items():
        if not isinstance(key, str):
            raise CheckpointError(f"{path}: {prefix}{str(key)[:80]} is no name of a tensor")
        if isinstance(value, _Tensor):
            yield prefix + key, value
        elif is_module and isinstance(value, _Inert):
            yield from _flatten(path, value, f"{prefix}{key}.", depth + 1)
        elif not is_module:
            raise CheckpointError(f"{path}: {prefix}{key} is a {type(value).__name__}; expected a tensor")


def _array(label: str, tensor: _Tensor, storage: _Storage, data: bytes) -> np.ndarray:
    """A copy of the tensor's values. Raises CheckpointError where it reaches outside its storage."""
    size, stride, offset, length = tensor.size, tensor.stride, tensor.offset, storage.length
    itemsize = storage.dtype.itemsize
    if length * itemsize != len(data):
        raise CheckpointError(
            f"{label}: claims {length * itemsize} bytes of storage; data/{storage.key} has {len(data)}"
        )
    if not (isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= 32):
        raise CheckpointError(f"{label}: its shape and strides do not match")
    if not all(isinstance(n, int) and n >= 0 for n in (*size, *stride, offset)):
        raise CheckpointError(f"{label}: shape {size}, strides {stride}, offset {offset}: a negative number")
    count = math.prod(size)
    steps = [step if n > 1 else 1 for n, step in zip(size, stride, strict=True)]
    last = offset + sum((n - 1) * step for n, step in zip(size, steps, strict=True))
    if not 0 < count <= length or last >= length:
        raise CheckpointError(
            f"{label}: shape {size}, strides {stride}, offset {offset} reach outside its {length} stored values"
        )
    flat = np.frombuffer(data, storage.dtype)
    return np.lib.stride_tricks.as_strided(flat[offset:], size, [step * itemsize for step in steps]).copy()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
