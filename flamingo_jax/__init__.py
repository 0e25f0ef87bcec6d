"""Flamingo in JAX: frozen towers and language models joined by a resampler and gated cross-attention.

model = flamingo_jax.load("runs/quickstart/flamingo")
ids = [[*model.tokenizer.start_ids, *model.tokenizer.encode("<image>Output:")]]
batch = model.make_batch([["photo.jpg"]], ids)
print(model.tokenizer.decode(model.generate(model.params, batch, max_new_tokens=8)[0]))
"""

from typing import Any

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """`load`, imported when it is first asked for: `import flamingo_jax` alone stays quick."""
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from flamingo_jax.loading import load

    return load
