"""Checkpoints: verified, complete or not believed, one tower without the rest, any mesh."""

import hashlib
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from clip_jax import sharding
from clip_jax.errors import CheckpointError
from clip_jax.models.variants import build_two_tower, get_variant
from clip_jax.training import checkpoint, state
from clip_jax.training.optimizer import make_optimizer
from configs.clip import quickstart

CONFIG = quickstart.get_config("debug")


class Towers:
    """As much of a task as a state needs."""

    def __init__(self, variant: str = "debug-RN", width: int | None = None):
        config = get_variant(variant)
        if width:
            config.text.width = width
        self.model = build_two_tower(config)

    def init(self, rng: jax.Array) -> tuple[Any, Any]:
        batch = {"image": jnp.zeros((1, 32, 32, 3)), "text": jnp.zeros((1, 16), jnp.int32)}
        variables = dict(self.model.init(rng, batch))
        return variables.pop("params"), variables


def make(mesh: Mesh, towers: Towers | None = None, frozen: tuple[str, ...] = ()) -> tuple[Any, Any]:
    """(abstract state, a function that makes a real one)."""
    create = state.create_fn(towers or Towers(), make_optimizer(CONFIG.optimizer, 10), frozen)  # type: ignore[arg-type]
    abstract, shardings = state.abstract_state(create, mesh, sharding.DEFAULT_RULES)
    real = jax.jit(lambda key: sharding.unbox(create(key)), out_shardings=shardings)
    return abstract, real


def save(directory: Path, mesh: Mesh, steps: tuple[int, ...] = (1,), keep: int = 5) -> tuple[Any, Any]:
    with sharding.use_mesh(mesh):
        abstract, real = make(mesh)
        value = real(jax.random.key(0))
    checkpointer = checkpoint.Checkpointer(directory / "checkpoints", keep)
    for step in steps:
        checkpointer.save(value, step, {"step": step, "config": {"seed": 0}})
    checkpointer.wait()
    return abstract, value


def digest(tree: Any) -> str:
    h = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        h.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    return h.hexdigest()


def test_a_state_comes_back_on_any_mesh_with_the_same_bits(tmp_path: Path) -> None:
    _, saved = save(tmp_path, sharding.make_mesh({"fsdp": 4, "tensor": 2}))
    for shape, devices in (({"fsdp": 8}, 8), ({"replica": 2, "tensor": 2, "fsdp": 2}, 8), ({}, 1)):
        mesh = sharding.make_mesh(shape, jax.devices()[:devices])
        with sharding.use_mesh(mesh):
            abstract, _ = make(mesh)
        got = checkpoint.Checkpointer(tmp_path / "checkpoints", 5).restore_latest(abstract)
        assert digest(got) == digest(saved)
        for leaf, want in zip(jax.tree.leaves(got), jax.tree.leaves(abstract), strict=True):
            assert leaf.sharding.is_equivalent_to(want.sharding, leaf.ndim)


def test_frozen_parameters_have_no_optimiser_state_and_come_back_as_such(tmp_path: Path) -> None:
    mesh = sharding.make_mesh()
    with sharding.use_mesh(mesh):
        abstract, real = make(mesh, frozen=("vision/",))
        value = real(jax.random.key(0))
    assert set(value.frozen) == {"vision"} and "vision" not in value.trainable
    assert not any("vision" in jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(value.opt_state))
    checkpointer = checkpoint.Checkpointer(tmp_path, 1)
    for step in (1, 2):
        checkpointer.save(value, step, {})
    checkpointer.wait()
    got = checkpointer.restore_latest(abstract)
    assert got is not None and digest(got.frozen) == digest(value.frozen)

    # Saved once, found from every step, and verified there.
    assert not (checkpointer.path(2) / "params.vision").exists()
    vision = checkpoint.load(checkpointer.path(2), "params/vision")
    assert digest(vision) == digest(value.frozen["vision"])
    file = max((tmp_path / "frozen" / "params.vision" / "d").iterdir(), key=lambda f: f.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"frozen/params\.vision/.*bytes; manifest.json says"):
        checkpointer.restore_latest(abstract)
    (tmp_path / "frozen" / checkpoint.MANIFEST).write_text("{}")
    with pytest.raises(CheckpointError, match="frozen: missing or changed"):
        checkpoint.load(checkpointer.path(2), "params/vision")


def test_what_a_killed_run_froze_is_not_taken_over(tmp_path: Path) -> None:
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    with sharding.use_mesh(mesh):
        _, real = make(mesh, frozen=("vision/",))
    for seed in (0, 1):
        value, checkpointer = real(jax.random.key(seed)), checkpoint.Checkpointer(tmp_path, 1)
        checkpointer.clean()
        checkpointer.save(value, 1, {})
        checkpointer.wait()
        assert digest(checkpoint.load(checkpointer.path(1), "params/vision")) == digest(value.frozen["vision"])
        shutil.rmtree(checkpointer.path(1))  # killed before its first checkpoint was finished


def test_one_tower_is_read_without_the_rest(tmp_path: Path) -> None:
    mesh = sharding.make_mesh()
    abstract, saved = save(tmp_path, mesh)
    for item in ("params.text", "train", "params.logit_scale"):  # nothing of them is needed
        shutil.rmtree(checkpoint.latest(tmp_path) / item / "d")
    vision = checkpoint.load(tmp_path, "params/vision")
    assert digest(vision) == digest(saved.params["vision"])
    placed = checkpoint.load(tmp_path, "params/vision", jax.tree.map(lambda x: x.sharding, abstract.params["vision"]))
    assert digest(placed) == digest(vision)
    assert len(placed["pool"]["query"]["kernel"].sharding.device_set) == 8
    kernel = checkpoint.load(tmp_path, "params/vision/stem_conv1/kernel")
    np.testing.assert_array_equal(kernel, saved.params["vision"]["stem_conv1"]["kernel"])
    assert digest(checkpoint.load(tmp_path, "state")) == digest(saved.model_state)
    with pytest.raises(CheckpointError, match=r"params\.text/.*missing"):
        checkpoint.load(tmp_path, "params/text")


def test_a_misspelt_subtree_is_named(tmp_path: Path) -> None:
    save(tmp_path, sharding.make_mesh())
    with pytest.raises(CheckpointError, match=r"no params/visoin; .*params/vision"):
        checkpoint.load(tmp_path, "params/visoin")
    with pytest.raises(CheckpointError, match=r"no params/vision/stem; under params/vision there are .*stem_conv1"):
        checkpoint.load(tmp_path, "params/vision/stem")
    with pytest.raises(CheckpointError, match="no finished checkpoint there"):
        checkpoint.load(tmp_path / "elsewhere")


def test_the_newest_sound_checkpoint_is_taken(tmp_path: Path) -> None:
    abstract, _ = save(tmp_path, sharding.make_mesh(), (1, 2, 3))
    checkpointer = checkpoint.Checkpointer(tmp_path / "checkpoints", 5)
    (checkpointer.path(3) / checkpoint.MANIFEST).unlink()  # killed before it was finished
    assert checkpointer.steps() == [1, 2]
    flip_a_byte(checkpointer.path(2))
    with pytest.raises(CheckpointError, match=r"00000002/params\.vision/d/.*damaged"):
        checkpoint.verify(checkpointer.path(2))
    checkpointer.clean()
    assert not checkpointer.path(3).exists()
    restored = checkpointer.restore_latest(abstract)
    assert restored is not None and checkpointer.steps() == [1]
    assert (tmp_path / "checkpoints" / "00000002.damaged").is_dir()  # out of the way of its step's next save
    for _ in range(2):
        checkpointer.save(restored, 2, {})
        checkpointer.wait()
        flip_a_byte(checkpointer.path(2))
        assert checkpointer.restore_latest(abstract) is not None  # the same step once more, and yet once more
        assert checkpointer.steps() == [1]
    checkpointer.save(restored, 2, {})
    checkpointer.wait()
    for step in (1, 2):
        flip_a_byte(checkpointer.path(step))
    with pytest.raises(CheckpointError, match="00000002/.*damaged"):  # never from scratch in silence
        checkpointer.restore_latest(abstract)


def flip_a_byte(path: Path) -> None:
    file = max((path / "params.vision" / "d").iterdir(), key=lambda f: f.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_cut_off_file_is_named(tmp_path: Path) -> None:
    save(tmp_path, sharding.make_mesh())
    path = checkpoint.latest(tmp_path)
    file = next((path / "train" / "d").iterdir())
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"{file.name}: \d+ bytes; manifest.json says \d+"):
        checkpoint.verify(path)


def test_another_architecture_is_named(tmp_path: Path) -> None:
    mesh = sharding.make_mesh()
    save(tmp_path, mesh)
    checkpointer = checkpoint.Checkpointer(tmp_path / "checkpoints", 5)
    with sharding.use_mesh(mesh):
        other, _ = make(mesh, Towers("debug-ViT"))
        wider, _ = make(mesh, Towers(width=64))
    with pytest.raises(CheckpointError, match=r"params\.vision vision/.*another architecture"):
        checkpointer.restore_latest(other)
    with pytest.raises(CheckpointError, match=r"params\.text text/\S+ is float32\[32.*expects float32\[64"):
        checkpointer.restore_latest(wider)


def test_imported_parameters_make_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "scale": jnp.ones(3, jnp.bfloat16)}
    path = tmp_path / "new" / "imported"
    checkpoint.write(path, {"params.tower": {"tower": tree}}, {"step": 0, "model": {"width": 3}}, {"note.txt": "é"})
    assert checkpoint.latest(path) == path and (path / "note.txt").read_text() == "é"
    assert checkpoint.metadata(path) == {"step": 0, "model": {"width": 3}}
    assert digest(checkpoint.load(path, "params/tower")) == digest(tree)
    with pytest.raises(CheckpointError, match="imported: exists already"):
        checkpoint.write(path, {}, {})

    def fail(path: Path, frozen: tuple[str, ...] = ()) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "write_manifest", fail)
    with pytest.raises(OSError, match="no space left"):
        checkpoint.write(tmp_path / "new" / "other", {"params.tower": {"tower": tree}}, {})
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["imported"]


@pytest.mark.parametrize(
    "breaks", ["a file", "the manifest, for one process", "the frozen ones' manifest, for one process"]
)
def test_what_one_process_cannot_read_all_of_them_hear_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, breaks: str
) -> None:
    """Three threads as three processes: none may wait for the others for ever."""
    mesh = sharding.make_mesh()
    with sharding.use_mesh(mesh):
        value = make(mesh, frozen=("vision/",))[1](jax.random.key(0))
    checkpointer = checkpoint.Checkpointer(tmp_path, 1)
    checkpointer.save(value, 1, {})
    checkpointer.wait()
    path = checkpointer.path(1)
    if breaks == "a file":
        file = max((f for f in path.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
        file.write_bytes(file.read_bytes()[:-1])
    who, said, meeting, read = threading.local(), [0] * 3, threading.Barrier(3), checkpoint._manifest

    def gathered(number: int) -> list[int]:
        said[who.rank] = number
        meeting.wait(timeout=30)
        return list(said)

    def manifest(of: Path) -> dict[str, Any]:
        wanted = {"the manifest": path, "the frozen ones' manifest": path.parent / checkpoint.FROZEN}
        if who.rank == 1 and of == wanted.get(breaks.partition(",")[0]):
            raise OSError(5, "Input/output error", str(of))
        return read(of)

    monkeypatch.setattr(jax, "process_index", lambda: who.rank)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(checkpoint, "gathered", gathered)
    monkeypatch.setattr(checkpoint, "_manifest", manifest)

    def verify(rank: int) -> str:
        who.rank = rank
        with pytest.raises(CheckpointError) as caught:
            checkpoint.verify(path, together=True)
        return str(caught.value)

    with ThreadPoolExecutor(3) as pool:
        errors = list(pool.map(verify, range(3)))
    assert sum("as another process sees it" in error for error in errors) == 2
    if breaks == "a file":
        assert all(error.startswith(str(file)) for error in errors)
    else:
        assert "Input/output error" in errors[1] and errors[0].startswith(str(path / checkpoint.MANIFEST))


def test_a_checkpoint_half_removed_is_none_and_the_new_one_is_sound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuses)
    save(tmp_path, sharding.make_mesh(), steps=(1, 2), keep=1)
    checkpointer = checkpoint.Checkpointer(tmp_path / "checkpoints", 1)
    assert checkpointer.steps() == [2] and checkpointer.path(1).is_dir()


def test_only_so_many_are_kept(tmp_path: Path) -> None:
    save(tmp_path, sharding.make_mesh({}, jax.devices()[:1]), (1, 2, 3, 4), keep=2)
    assert checkpoint.Checkpointer(tmp_path / "checkpoints", 2).steps() == [3, 4]
    assert checkpoint.metadata(checkpoint.latest(tmp_path))["step"] == 4


def test_a_relative_directory_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, saved = save(Path("run"), sharding.make_mesh({}, jax.devices()[:1]))
    assert digest(checkpoint.load("run", "params/vision")) == digest(saved.params["vision"])


def test_a_failed_save_is_not_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, frozen: tuple[str, ...] = ()) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "write_manifest", fail)
    with pytest.raises(CheckpointError, match="saving a checkpoint failed: no space left on device"):
        save(tmp_path, sharding.make_mesh({}, jax.devices()[:1]))
