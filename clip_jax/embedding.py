"""Embeddings of many images or texts, and the files that hold them.

A file holds rows of unit length, the key of each (a path, or the text itself), its position in the source, and
what they were made with. It is written in parts beside the file; a run that is killed goes on with the next part.

Dimension letters: N rows, B a batch, E width.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from clip_jax import sharding
from clip_jax.data.images import Images
from clip_jax.errors import ConfigError, DataError, RecordError, UserError
from clip_jax.files import replacing, write_atomically
from clip_jax.loading import Loaded

FORMATS = (".safetensors", ".parquet")
LONG_TEXTS = ("truncate", "refuse", "average")


class Embedder:
    """A loaded model on all devices: batches are sharded over them, parameters are replicated."""

    def __init__(self, loaded: Loaded, batch_size: int = 64, threads: int = 4):
        self.loaded, self.mesh, self.threads = loaded, sharding.make_mesh(), threads
        parts = sharding.batch_shards(self.mesh)
        self.batch_size = -(-batch_size // parts) * parts
        self._params = jax.device_put(loaded.params, sharding.replicated(self.mesh))
        whole = sharding.replicated(self.mesh)
        self._image = jax.jit(loaded.encode_image, out_shardings=whole)
        self._text = jax.jit(loaded.encode_text, out_shardings=whole)

    def digest(self) -> str:
        """sha256 of all parameters: embeddings of two models must not be compared."""
        digest = hashlib.sha256()
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.loaded.params):
            digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
            digest.update(np.asarray(leaf).tobytes())
        return digest.hexdigest()

    def logit_scale(self) -> float:
        """By what the model multiplies similarities before a softmax."""
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.loaded.params):
            if jax.tree_util.keystr(path).endswith("['logit_scale']"):
                return float(np.exp(np.asarray(leaf, np.float32)))
        raise ConfigError("the model has no logit_scale among its parameters")

    def images(
        self, images: Images, indices: Sequence[int] | None = None, progress: Callable[[int], Any] | None = None
    ) -> tuple[np.ndarray, list[tuple[str, int]], list[str]]:
        """(embeddings [N, E] float32, (key, index) of each row, one line for each image that is left out)."""
        indices = range(len(images)) if indices is None else indices

        def read(index: int) -> tuple[str, np.ndarray] | str:
            try:
                key, data = images[index]
                return key, self.loaded.preprocess(data, key)
            except RecordError as error:
                return str(error)

        embeddings, rows, rejected = [], [], []
        with ThreadPoolExecutor(self.threads) as pool:
            batches = [indices[i : i + self.batch_size] for i in range(0, len(indices), self.batch_size)]
            # The next batch is read while the devices have this one.
            waiting = [pool.submit(read, i) for i in batches[0]] if batches else []
            for number, batch in enumerate(batches):
                done = [future.result() for future in waiting]
                if number + 1 < len(batches):
                    waiting = [pool.submit(read, i) for i in batches[number + 1]]
                good = [(index, entry) for index, entry in zip(batch, done, strict=True) if isinstance(entry, tuple)]
                rejected += [entry for entry in done if isinstance(entry, str)]
                if good:
                    embeddings.append(self._embed(self._image, np.stack([pixels for _, (_, pixels) in good])))
                    rows += [(key, index) for index, (key, _) in good]
                if progress is not None:
                    progress(len(batch))
        return np.concatenate(embeddings) if embeddings else np.zeros((0, 0), np.float32), rows, rejected

    def texts(
        self, texts: Sequence[str], long_texts: str = "truncate", progress: Callable[[int], Any] | None = None
    ) -> np.ndarray:
        """[N, E] float32. `long_texts`: cut them (the tokenizer counts them), refuse them, or average their windows.

        `progress` is called after each batch, with how many texts it was; where windows are averaged, about so many.

        Raises RecordError for a text that is empty, huge, no valid Unicode or, where it is refused, too long.
        """
        if long_texts not in LONG_TEXTS:
            raise ConfigError(f"long texts {long_texts!r}: expected one of {', '.join(LONG_TEXTS)}")
        for i, text in enumerate(texts):
            if not text.strip():
                raise RecordError(f"text {i}: empty")
        tokenizer = self.loaded.tokenizer
        if long_texts == "average":
            windows = tokenizer.windows(texts)
            every = self._batches(self._text, np.concatenate(windows), progress, len(texts))
            ends = np.cumsum([len(w) for w in windows])[:-1]
            return _unit(np.stack([part.mean(axis=0) for part in np.split(every, ends)]))
        rows = tokenizer(texts, overflow="error" if long_texts == "refuse" else "truncate")
        return self._batches(self._text, rows, progress, len(texts))

    def _batches(self, encode: Any, rows: np.ndarray, progress: Callable[[int], Any] | None, count: int) -> np.ndarray:
        found, done = [], 0
        for i in range(0, len(rows), self.batch_size):
            found.append(self._embed(encode, rows[i : i + self.batch_size]))
            if progress is not None:
                before, done = done, min(i + self.batch_size, len(rows)) * count // len(rows)
                progress(done - before)
        return np.concatenate(found)

    def _embed(self, encode: Any, rows: np.ndarray) -> np.ndarray:
        padded = np.pad(rows, [(0, self.batch_size - len(rows))] + [(0, 0)] * (rows.ndim - 1), mode="edge")
        placed = jax.device_put(padded, sharding.batch_sharding(self.mesh))
        return _unit(np.asarray(encode(self._params, placed), np.float32)[: len(rows)])


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


@dataclass(frozen=True)
class Texts:
    """Texts to embed, a source like `Images`."""

    texts: Sequence[str]

    def __len__(self) -> int:
        return len(self.texts)


def embed_to_file(
    embedder: Embedder,
    source: Images | Texts,
    spec: str,
    output: Path,
    *,
    long_texts: str = "truncate",
    rows_in_part: int = 4096,
) -> list[str]:
    """Embeds a source into `output`; called again after it was stopped, it goes on.

    Args:
      source: what is embedded.
      spec: how the source is named; kept in the file, so that a search can show the images.
      output: *.safetensors or *.parquet (needs the extra `parquet`).
      long_texts: see `Embedder.texts`.
      rows_in_part: how many of the source's items are written at once; at most so many are lost.

    Returns:
      One line for each image that was left out, also written to `output`.rejected.txt where there are any.

    Raises:
      ConfigError: another ending, or `output` exists or was begun with another model or source.
    """
    if output.suffix not in FORMATS:
        raise ConfigError(f"{output}: expected a name that ends in {' or '.join(FORMATS)}")
    if output.suffix == ".parquet":
        _parquet()
    if output.exists():
        raise ConfigError(f"{output}: exists; remove it or name another file")
    plan = {
        "kind": "text" if isinstance(source, Texts) else "image",
        "source": spec,
        "items": str(len(source)),
        "rows_in_part": str(rows_in_part),
        "long_texts": long_texts,
        "model_sha256": embedder.digest(),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    parts = output.with_name(output.name + ".parts")
    _begin(parts, plan, output)
    try:
        _embed_parts(embedder, source, parts, plan)
        rejected = _join(sorted(parts.glob("*.safetensors")), output, plan)
    except UserError:  # it would end here again; a run that was stopped goes on with its parts
        shutil.rmtree(parts)
        raise
    shutil.rmtree(parts)
    return rejected


def _embed_parts(embedder: Embedder, source: Images | Texts, parts: Path, plan: dict[str, str]) -> None:
    rows_in_part = int(plan["rows_in_part"])
    sizes = {start: min(rows_in_part, len(source) - start) for start in range(0, len(source), rows_in_part)}
    paths = {start: parts / f"{start:012d}.safetensors" for start in sizes}
    missing = [start for start in sizes if not paths[start].exists()]
    done = len(source) - sum(sizes[start] for start in missing)
    with tqdm(
        total=len(source), initial=done, desc="embed", unit=f"{plan['kind']}s", dynamic_ncols=True, smoothing=0.1,
        disable=None,
    ) as bar:  # fmt: skip
        for start in missing:
            count = sizes[start]
            if isinstance(source, Texts):
                some = list(source.texts[start : start + count])
                try:
                    embeddings, rejected = embedder.texts(some, plan["long_texts"], bar.update), list[str]()
                except RecordError as error:
                    raise RecordError(f"{plan['source']}, counted from item {start}: {error}") from None
                rows = [(text, start + i) for i, text in enumerate(some)]
            else:
                embeddings, rows, rejected = embedder.images(source, range(start, start + count), bar.update)
            with replacing(paths[start]) as temporary:
                save_file(_tensors(embeddings, rows), temporary, {"rejected": json.dumps(rejected)})


def _begin(parts: Path, plan: dict[str, str], output: Path) -> None:
    """Makes the directory of the parts or, where there is one, sees that it belongs to the same run."""
    parts.mkdir(exist_ok=True)
    path = parts / "plan.json"
    if not path.exists():
        write_atomically(path, json.dumps(plan, indent=1) + "\n")
        return
    begun = json.loads(path.read_text(encoding="utf-8"))
    different = [key for key in plan if begun.get(key) != plan[key]]
    if different:
        key = different[0]
        raise ConfigError(
            f"{output}: was begun with {key} {begun.get(key)}, not {plan[key]}; remove {parts} or name another file"
        )
    logging.info("%s: going on", output)


def _tensors(embeddings: np.ndarray, rows: Sequence[tuple[str, int]]) -> dict[str, np.ndarray]:
    keys = [key.encode("utf-8", "surrogateescape") for key, _ in rows]
    return {
        "embeddings": np.ascontiguousarray(embeddings),
        "keys": np.frombuffer(b"".join(keys), np.uint8),
        "key_ends": np.cumsum([len(key) for key in keys], dtype=np.int64),
        "indices": np.array([index for _, index in rows], np.int64),
    }


def _join(parts: Sequence[Path], output: Path, plan: dict[str, str]) -> list[str]:
    """Writes the parts as one file."""
    rejected: list[str] = []
    for path in parts:
        with safe_open(path, "numpy") as file:
            rejected += json.loads(file.metadata()["rejected"])
    metadata = plan | {"rejected": str(len(rejected))}
    opened = [part for path in parts if len(part := EmbeddingFile(path))]
    if not opened:
        raise DataError(f"{plan['source']}: not one image could be read; the first: {rejected[0]}")
    with replacing(output) as temporary:
        if output.suffix == ".parquet":
            _write_parquet(opened, temporary, metadata)
        else:
            keys = [part.key(i) for part in opened for i in range(len(part))]
            indices = np.concatenate([part.indices for part in opened])
            embeddings = np.empty((len(keys), opened[0].width), np.float32)
            done = 0
            for part in opened:
                embeddings[done : done + len(part)] = part.rows(0, len(part))
                done += len(part)
            save_file(_tensors(embeddings, list(zip(keys, indices.tolist(), strict=True))), temporary, metadata)
    if rejected:
        lines = "".join(line.encode("utf-8", "replace").decode() + "\n" for line in rejected)  # names of files
        write_atomically(output.with_name(output.name + ".rejected.txt"), lines)
    return rejected


class EmbeddingFile:
    """Embeddings on disk, read by ranges of rows. Raises DataError, naming the file, where it is none."""

    def __init__(self, path: Path):
        self.path = path
        if path.suffix not in FORMATS or not path.is_file():
            raise DataError(f"{path}: not found; expected a file of embeddings (*.safetensors or *.parquet)")
        try:
            if path.suffix == ".parquet":
                tensors, self.metadata = _read_parquet(path)
                self._rows: Any = tensors["embeddings"]
            else:
                file = safe_open(path, "numpy")
                tensors = {name: file.get_tensor(name) for name in ("keys", "key_ends", "indices")}
                self._rows, self.metadata = file.get_slice("embeddings"), file.metadata() or {}
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise DataError(f"{path}: not a file of embeddings ({str(error).splitlines()[0]})") from None
        self.indices, self._ends = tensors["indices"], tensors["key_ends"]
        self._keys = tensors["keys"].tobytes()
        shape = self._rows.shape if isinstance(self._rows, np.ndarray) else self._rows.get_shape()
        if len(shape) != 2 or not self.indices.shape == self._ends.shape == (shape[0],):
            raise DataError(
                f"{path}: embeddings {list(shape)}, keys {list(self._ends.shape)}, indices {list(self.indices.shape)}; "
                "expected [N, E], [N] and [N]"
            )
        ends = [0, *self._ends.tolist()]
        if self._ends.dtype.kind != "i" or ends != sorted(ends) or ends[-1] != len(self._keys):
            raise DataError(f"{path}: the ends of its keys are none of its {len(self._keys)} bytes")
        self.width = int(shape[1])

    def __len__(self) -> int:
        return len(self.indices)

    def key(self, row: int) -> str:
        start = int(self._ends[row - 1]) if row else 0
        return self._keys[start : int(self._ends[row])].decode("utf-8", "surrogateescape")

    def rows(self, start: int, stop: int) -> np.ndarray:
        """[stop - start, E] float32. Raises DataError for values that are no finite numbers."""
        rows = np.asarray(self._rows[start:stop], np.float32)
        if not np.isfinite(rows).all():
            bad = start + int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])
            raise DataError(f"{self.path}: embedding {bad} ({self.key(bad)}) holds values that are no finite numbers")
        return rows

    def chunks(self, size: int) -> Iterator[np.ndarray]:
        for start in range(0, len(self), size):
            yield self.rows(start, min(start + size, len(self)))


def _parquet() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError("a .parquet file needs the extra `parquet` (pyarrow)") from None
    return pyarrow, pyarrow.parquet


def _write_parquet(parts: Sequence[EmbeddingFile], path: Path, metadata: dict[str, str]) -> None:
    pyarrow, parquet = _parquet()
    fields = [("key", pyarrow.string()), ("index", pyarrow.int64())]
    vector = pyarrow.list_(pyarrow.float32(), parts[0].width)
    schema = pyarrow.schema([*fields, ("embedding", vector)]).with_metadata(metadata)
    with parquet.ParquetWriter(path, schema) as writer:
        for part in parts:
            keys = pyarrow.array([part.key(i).encode("utf-8", "replace").decode() for i in range(len(part))])
            flat = pyarrow.array(part.rows(0, len(part)).ravel())
            rows = pyarrow.FixedSizeListArray.from_arrays(flat, part.width)
            writer.write_table(pyarrow.table([keys, pyarrow.array(part.indices), rows], schema=schema))


def _read_parquet(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    pyarrow, parquet = _parquet()
    try:
        table = parquet.read_table(path, memory_map=True).combine_chunks()
        vectors = table["embedding"].chunk(0)
        embeddings = vectors.flatten().to_numpy().reshape(len(table), -1)
        keys, indices = table["key"].to_pylist(), table["index"].to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a file of embeddings ({str(error).splitlines()[0]})") from None
    metadata = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
    return _tensors(embeddings, list(zip(keys, indices, strict=True))), metadata
