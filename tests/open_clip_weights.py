"""open_clip's state dict as this project's variables, for comparisons with the peer."""

import numpy as np

Weights = dict[str, np.ndarray]


def variables(state: Weights, text_heads: int, vision_heads: int) -> dict:
    """{"params": …, "batch_stats": … (ResNet only)}."""
    vision, stats = (
        (resnet(state, vision_heads)) if "visual.attnpool.q_proj.weight" in state else (vit(state, vision_heads), {})
    )
    text = {
        "token_embedding": state["token_embedding.weight"],
        "position_embedding": state["positional_embedding"],
        "projection": state["text_projection"],
        "ln_final": norm(state, "ln_final"),
        "transformer": {"blocks": blocks(state, "transformer.resblocks", text_heads)},
    }
    params = {"vision": vision, "text": text, "logit_scale": state["logit_scale"]}
    return {"params": params} | ({"batch_stats": {"vision": stats}} if stats else {})


def norm(state: Weights, name: str) -> Weights:
    return {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}


def linear(state: Weights, name: str) -> Weights:
    return {"kernel": state[f"{name}.weight"].T, "bias": state[f"{name}.bias"]}


def heads_in(weight: np.ndarray, bias: np.ndarray, heads: int) -> Weights:
    return {"kernel": weight.T.reshape(weight.shape[1], heads, -1), "bias": bias.reshape(heads, -1)}


def heads_out(state: Weights, name: str, heads: int) -> Weights:
    weight = state[f"{name}.weight"]
    return {"kernel": weight.T.reshape(heads, -1, weight.shape[0]), "bias": state[f"{name}.bias"]}


def block(state: Weights, name: str, heads: int) -> dict:
    weight = np.split(state[f"{name}.attn.in_proj_weight"], 3)
    bias = np.split(state[f"{name}.attn.in_proj_bias"], 3)
    projections = {
        part: heads_in(w, b, heads) for part, w, b in zip(("query", "key", "value"), weight, bias, strict=True)
    }
    return {
        "attention_norm": norm(state, f"{name}.ln_1"),
        "attention": projections | {"out": heads_out(state, f"{name}.attn.out_proj", heads)},
        "mlp_norm": norm(state, f"{name}.ln_2"),
        "mlp": {"up": linear(state, f"{name}.mlp.c_fc"), "down": linear(state, f"{name}.mlp.c_proj")},
    }


def blocks(state: Weights, name: str, heads: int) -> dict:
    import jax

    count = len({key.split(".")[name.count(".") + 1] for key in state if key.startswith(name + ".")})
    return jax.tree.map(lambda *x: np.stack(x), *[block(state, f"{name}.{i}", heads) for i in range(count)])


def vit(state: Weights, heads: int) -> dict:
    return {
        "patch_embedding": state["visual.conv1.weight"].transpose(2, 3, 1, 0),
        "class_embedding": state["visual.class_embedding"],
        "position_embedding": state["visual.positional_embedding"],
        "ln_pre": norm(state, "visual.ln_pre"),
        "ln_post": norm(state, "visual.ln_post"),
        "projection": state["visual.proj"],
        "transformer": {"blocks": blocks(state, "visual.transformer.resblocks", heads)},
    }


def resnet(state: Weights, heads: int) -> tuple[dict, dict]:
    params: dict = {}
    stats: dict = {}

    def add(name: str, conv: str, bn: str) -> tuple[dict, dict]:
        kernel = {"kernel": state[f"{conv}.weight"].transpose(2, 3, 1, 0)}
        mean_var = {"mean": state[f"{bn}.running_mean"], "var": state[f"{bn}.running_var"]}
        return {name.format("conv"): kernel, name.format("bn"): norm(state, bn)}, {name.format("bn"): mean_var}

    for i in (1, 2, 3):
        p, s = add(f"stem_{{}}{i}", f"visual.conv{i}", f"visual.bn{i}")
        params |= p
        stats |= s
    for key in sorted({".".join(k.split(".")[:3]) for k in state if k.startswith("visual.layer")}):
        _, stage, index = key.split(".")
        name = f"stage{stage.removeprefix('layer')}_block{index}"
        params[name], stats[name] = {}, {}
        parts = [(f"{{}}{i}", f"{key}.conv{i}", f"{key}.bn{i}") for i in (1, 2, 3)]
        if f"{key}.downsample.0.weight" in state:
            parts.append(("shortcut_{}", f"{key}.downsample.0", f"{key}.downsample.1"))
        for part in parts:
            p, s = add(*part)
            params[name] |= p
            stats[name] |= s
    pool = "visual.attnpool"
    params["pool"] = {
        "position_embedding": state[f"{pool}.positional_embedding"],
        **{
            part: heads_in(state[f"{pool}.{part[0]}_proj.weight"], state[f"{pool}.{part[0]}_proj.bias"], heads)
            for part in ("query", "key", "value")
        },
        "out": heads_out(state, f"{pool}.c_proj", heads),
    }
    return params, stats
