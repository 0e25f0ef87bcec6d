"""CLIP in JAX: image and text towers, exact losses over a device mesh, one trainer."""
