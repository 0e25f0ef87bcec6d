"""The operations that a task's gradient asks for, whatever the compiler makes of it: what utilisation is measured by.

They are the matrix products and convolutions of the gradient as JAX traces it, without rematerialisation and for the
whole batch at once: forwards, then for each product those of the gradients that somebody wants, of a frozen tower
therefore none. (Only the contrastive loss's own second look at its logits is counted, 0.02 % of a ViT-L/14.)
"""

import math
from typing import Any

import jax

from launch.planning.counting import places


def products_flops(jaxpr: Any) -> int:
    """Floating-point operations of a traced program's products and convolutions, those in loops as often as they run.

    Inside a shard_map shapes are a device's: trace for one device where the whole is wanted.
    """
    total = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
        elif name == "conv_general_dilated":
            total += _convolution_flops(equation)
        times = equation.params["length"] if name == "scan" else 1
        for value in equation.params.values():
            for part in value if isinstance(value, list | tuple) else [value]:
                part = getattr(part, "jaxpr", part)
                if hasattr(part, "eqns"):
                    total += times * products_flops(part)
    return total


def _convolution_flops(equation: Any) -> int:
    left, right = (variable.aval.shape for variable in equation.invars)
    out, params = equation.outvars[0].aval.shape, equation.params
    numbers = params["dimension_numbers"]
    total = 2 * out[numbers.out_spec[0]] * out[numbers.out_spec[1]] * right[numbers.rhs_spec[1]]
    axes = zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], numbers.out_spec[2:], strict=True)
    for i, (left_axis, right_axis, out_axis) in enumerate(axes):
        total *= places(
            left[left_axis], right[right_axis], out[out_axis], params["window_strides"][i], params["padding"][i][0],
            params["lhs_dilation"][i], params["rhs_dilation"][i],
        )  # fmt: skip
    return total


def gradient_flops(loss: Any, *arguments: Any) -> int:
    """Those of the gradient of `loss(trainable, …) → (scalar, …)` in its first argument, of abstract arguments."""
    return products_flops(jax.make_jaxpr(jax.value_and_grad(loss, has_aux=True))(*arguments).jaxpr)
