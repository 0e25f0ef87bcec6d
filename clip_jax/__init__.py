"""CLIP in JAX: image and text towers, exact losses over a device mesh, one trainer.

model = clip_jax.load("runs/quickstart/clip")
pixels = model.preprocess("photo.jpg")[None]
similarity = model.encode_image(model.params, pixels) @ model.encode_text(model.params, model.tokenizer("a cat")).T
"""

from typing import Any

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """`load`, imported when it is first asked for: `import clip_jax` alone stays quick."""
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from clip_jax.loading import load

    return load
