"""Reading data sets: what a source gives, and what it says of one that is damaged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from clip_jax.data.sources import ASSETS, Pair, TfdsSource, find_asset, open_source
from clip_jax.data.transforms import decode
from clip_jax.errors import DataError, RecordError

EMOJI = ASSETS / "emoji" / "1.0.0"
SMALL = "unseen_concepts_held_out_style"
SPLITS = ("train", "held_out_style", "unseen_concepts", SMALL)
FLUENT = {"fluent-emoji", "fluent-emoji-flat"}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A copy of the data set, to be damaged."""
    return Path(shutil.copytree(EMOJI, tmp_path / "set"))


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Pair]]:
    sources = {name: open_source(f"emoji:{name}") for name in SPLITS}
    return {name: [source[i] for i in range(len(source))] for name, source in sources.items()}


def refusal(call: Callable[[], object]) -> str:
    """The message of the DataError that a call raises; it is one line."""
    with pytest.raises(DataError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


def shard(directory: Path) -> Path:
    (path,) = directory.glob(f"emoji-{SMALL}.array_record-*")
    return path


def set_shard_lengths(directory: Path, lengths: list[int]) -> None:
    path = directory / "dataset_info.json"
    info = json.loads(path.read_text())
    (entry,) = (split for split in info["splits"] if split["name"] == SMALL)
    entry["shardLengths"] = [str(length) for length in lengths]
    path.write_text(json.dumps(info))


def test_missing_directory_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "nowhere") in refusal(lambda: TfdsSource(tmp_path / "nowhere", "train"))


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_missing_metadata_is_named(directory: Path, name: str) -> None:
    (directory / name).unlink()
    assert str(directory / name) in refusal(lambda: TfdsSource(directory, SMALL))


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", '"text"', "{}", "\x00\x01"])
def test_corrupted_metadata_is_refused(directory: Path, name: str, content: str) -> None:
    (directory / name).write_text(content)
    assert str(directory) in refusal(lambda: TfdsSource(directory, SMALL))


def test_metadata_cut_in_half_is_refused(directory: Path) -> None:
    path = directory / "dataset_info.json"
    path.write_text(path.read_text()[:300])
    assert str(directory) in refusal(lambda: TfdsSource(directory, SMALL))


def test_unknown_split_names_those_there_are() -> None:
    message = refusal(lambda: TfdsSource(EMOJI, "validation"))
    assert str(EMOJI) in message and "'validation'" in message
    assert all(name in message for name in SPLITS)


def test_deleted_shard_is_named(directory: Path) -> None:
    path = shard(directory)
    path.unlink()
    assert str(path) in refusal(lambda: TfdsSource(directory, SMALL))


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.3, 0.9])
def test_truncated_shard_is_refused(directory: Path, keep: float) -> None:
    path = shard(directory)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    message = refusal(lambda: TfdsSource(directory, SMALL))
    assert str(directory) in message and SMALL in message


@pytest.mark.parametrize("cut", [0, 1])
def test_any_truncated_shard_is_named(directory: Path, cut: int) -> None:
    whole = shard(directory)
    shards = [directory / f"emoji-{SMALL}.array_record-0000{k}-of-00002" for k in (0, 1)]
    for path in shards:
        shutil.copy(whole, path)
    set_shard_lengths(directory, [400, 400])
    assert len(TfdsSource(directory, SMALL)) == 800
    shards[cut].write_bytes(whole.read_bytes()[:200_000])
    assert str(shards[cut]) in refusal(lambda: TfdsSource(directory, SMALL))


def test_damaged_record_is_a_record_error(directory: Path) -> None:
    path = shard(directory)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 100] = bytes(100)
    path.write_bytes(data)
    source = TfdsSource(directory, SMALL)
    bad = []
    for i in range(len(source)):
        try:
            source[i]
        except RecordError as error:
            bad.append(str(error))
    assert 0 < len(bad) < 5
    assert all(SMALL in message and "\n" not in message for message in bad)


def test_garbage_shard_is_refused(directory: Path) -> None:
    shard(directory).write_bytes(b"no records" * 1000)
    assert str(directory) in refusal(lambda: TfdsSource(directory, SMALL))


@pytest.mark.parametrize("count", [399, 401])
def test_other_number_of_records_is_refused(directory: Path, count: int) -> None:
    set_shard_lengths(directory, [count])
    assert str(directory) in refusal(lambda: TfdsSource(directory, SMALL))


@pytest.mark.parametrize("spec", ["", "emoji", "emoji:", "webdataset:x", ":train", "train"])
def test_spec_without_known_kind_or_where_is_refused(spec: str) -> None:
    message = refusal(lambda: open_source(spec))
    assert repr(spec) in message and "KIND:WHERE" in message


@pytest.mark.parametrize("where", ["directory", "#train"])
def test_tfds_without_directory_or_split_is_refused(where: str) -> None:
    assert "tfds:DIRECTORY#SPLIT" in refusal(lambda: open_source(f"tfds:{where}"))


def test_tfds_opens_a_directory() -> None:
    assert open_source(f"tfds:{EMOJI}#{SMALL}")[0] == open_source(f"emoji:{SMALL}")[0]


def test_find_asset_prefers_a_path(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    assert find_asset(str(tmp_path / "x")) == tmp_path / "x"
    assert find_asset("emoji/tokenizer.json").is_file()


def test_emoji_splits_have_their_sizes(splits: dict[str, list[Pair]]) -> None:
    assert all(len(pairs) > 0 for pairs in splits.values())
    assert len({pair.text for pair in splits["unseen_concepts"]}) == 200
    assert len({pair.text for pair in splits[SMALL]}) == 200


def test_emoji_keys_are_unique_and_texts_not_empty(splits: dict[str, list[Pair]]) -> None:
    pairs = [pair for split in splits.values() for pair in split]
    assert len({pair.key for pair in pairs}) == len(pairs)
    assert all(pair.text.strip() and pair.group for pair in pairs)
    assert all(pair.key.startswith(f"{pair.style}/") for pair in pairs)


def test_unseen_concepts_are_not_trained_on(splits: dict[str, list[Pair]]) -> None:
    def words(names: tuple[str, ...]) -> tuple[set[str], set[str]]:
        pairs = [pair for name in names for pair in splits[name]]
        return {pair.text.lower() for pair in pairs}, {pair.key.split("/")[1] for pair in pairs}

    labels, emoji = words(("train", "held_out_style"))
    unseen_labels, unseen_emoji = words(("unseen_concepts", SMALL))
    assert not labels & unseen_labels
    assert not emoji & unseen_emoji


def test_fluent_styles_are_held_out(splits: dict[str, list[Pair]]) -> None:
    styles = {name: {pair.style for pair in pairs} for name, pairs in splits.items()}
    assert not styles["train"] & FLUENT and not styles["unseen_concepts"] & FLUENT
    assert styles["held_out_style"] == styles[SMALL] == FLUENT


def test_unseen_pictures_decode(splits: dict[str, list[Pair]]) -> None:
    for pair in [*splits["unseen_concepts"], *splits[SMALL]]:
        image = decode(pair.image, pair.key)
        assert (image.size, image.mode) == ((48, 48), "RGB")
