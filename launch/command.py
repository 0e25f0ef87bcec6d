"""What every command shares: flags, logging, one clear line for an error a user can mend."""

import ast
import difflib
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from clip_jax.command_line import STOPPED
from clip_jax.errors import ConfigError, UserError
from clip_jax.training.loop import flatten
from launch import cluster

CONFIGS = Path(__file__).parent.parent / "configs"


DEBUG = flags.DEFINE_boolean("debug", False, "Show where an error came from.")


def run(main: Callable[..., Any], *, with_config: bool = False) -> None:
    """Parses the flags and calls `main`, with the config where it takes one; exits with its outcome.

    0: done; 1: an error, in one line; 2: flags that are none; 130: stopped by Ctrl-C.
    """
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(help_of(sys.modules["__main__"].__doc__ or "", with_config))
        sys.exit()
    if with_config:
        check_overrides(sys.argv)
        config = config_flags.DEFINE_config_file("config", lock_config=True, help_string="A configs/*.py file.")

    def call(_: list[str]) -> None:
        try:
            set_up()
            if not with_config:
                main()
            elif config.value is None:
                raise ConfigError("--config is missing: name a file such as configs/clip/quickstart.py")
            else:
                main(config.value)
            jax.distributed.shutdown()  # here, as what waits for other processes holds up Python's own end
        except SystemExit:  # a run that was stopped
            jax.distributed.shutdown()
            raise
        except UserError as error:
            if DEBUG.value:
                raise
            cluster.leave(f"error: {error}")
        except KeyboardInterrupt:  # where no training is under way, which saves first
            cluster.leave("stopped", STOPPED)
        except Exception:
            if not jax.distributed.is_initialized():
                raise
            cluster.leave(traceback.format_exc())

    app.run(call, flags_parser=_parse)


def help_of(doc: str, with_config: bool) -> str:
    """What a command says of itself: its docstring, its flags and, where it takes a config, those that there are."""
    values = flags.FLAGS.flags_by_module_dict()
    own = [*values.get(sys.argv[0], ()), *values.get("__main__", ()), flags.FLAGS["debug"]]
    lines = [doc.strip(), "", "flags:"]
    if with_config:
        lines.append("  --config FILE[:ARG]: a config of those below, or yours; --config.KEY=VALUE changes a value")
    for flag in sorted(own, key=lambda flag: flag.name == "debug"):
        default = "" if flag.default in (None, False, []) else f" (default: {flag.default_as_str.strip(chr(39))})"
        lines.append(f"  --{flag.name}: {flag.help}{default}")
    if with_config:
        lines += ["", "configs:", *(f"  {path:38} {title}" for path, title in configs().items())]
    return "\n".join(lines)


def configs() -> dict[str, str]:
    """The configs of the checkout: file → what it trains, by the first line of its docstring."""
    found = {}
    for path in sorted(CONFIGS.glob("*/*.py")):
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        if path.name not in ("__init__.py", "common.py") and doc:
            found[str(path.relative_to(CONFIGS.parent))] = doc.split("\n\n")[0].replace("\n", " ")
    return found


def _parse(argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        refuse(str(error).strip().splitlines()[0])
    if len(rest) > 1:
        refuse(f"{rest[1]!r} is no flag; every argument is --flag VALUE")
    return rest


def refuse(what: str) -> NoReturn:
    """Exits with 2, as for arguments that are none."""
    print(f"error: {what}", file=sys.stderr)
    sys.exit(2)


def check_overrides(argv: list[str]) -> None:
    """Exits on a `--config.key` that the config does not have, naming the nearest one that it has."""
    path = None
    for i, word in enumerate(argv):
        if word.startswith("--config="):
            path = word.removeprefix("--config=")
        elif word == "--config" and i + 1 < len(argv):
            path = argv[i + 1]
    overrides = [word.removeprefix("--config.").split("=")[0] for word in argv if word.startswith("--config.")]
    if path is None or not overrides:
        return
    file = path.split(":")[0]
    if not Path(file).exists():
        refuse(f"--config {file}: no such file")
    known = load_config(path)
    keys = list(flatten(known.to_dict())) + [key for key, value in known.items() if isinstance(value, ConfigDict)]
    for key in overrides:
        base = key.split("[")[0]
        if base not in keys and not any(k.startswith(base + ".") for k in keys):
            near = difflib.get_close_matches(base, keys, n=1, cutoff=0.0)
            refuse(f"--config.{key}: {file} has no such key; did you mean --config.{near[0]}?")


def load_config(path: str) -> ConfigDict:
    """The config of FILE or FILE:ARG."""
    import importlib.util

    file, _, arg = path.partition(":")
    spec = importlib.util.spec_from_file_location("config", file)
    if spec is None or spec.loader is None or not Path(file).exists():
        raise ConfigError(f"--config {file}: no such file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg) if arg else module.get_config()


def config_with(path: str, overrides: Sequence[str]) -> ConfigDict:
    """The config of FILE or FILE:ARG, changed by `--config.KEY=VALUE` as the commands with flags change theirs.

    Raises ConfigError for another word and for a value that the key does not take; exits on an unknown key.
    """
    config = load_config(path)
    check_overrides([f"--config={path}", *overrides])
    for word in overrides:
        key, equals, text = word.removeprefix("--config.").partition("=")
        if not word.startswith("--config.") or not equals:
            raise ConfigError(f"{word!r}: expected --config.KEY=VALUE")
        try:
            value = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            value = text
        try:
            config.update_from_flattened_dict({key: value})
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{word}: {error}") from None
    return config


def set_up() -> None:
    """Logging to the terminal, a cache of compiled programs, and JAX's own runtime where there are many hosts."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    for noisy in ("absl", "jax", "orbax", "etils", "grain"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if devices := re.search(r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", "")):
        # Virtual devices on a CPU. A collective blocks a thread of XLA's pool on each, and with only as many as devices
        # two can wait for each other for ever; and so can they where a device's operations run side by side, as
        # devices then begin them in different orders.
        os.environ.setdefault("NPROC", str(4 * int(devices[1])))
        if "xla_cpu_multi_thread_eigen" not in os.environ["XLA_FLAGS"]:
            os.environ["XLA_FLAGS"] += " --xla_cpu_multi_thread_eigen=false"
    jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", ".cache/jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    cluster.initialize()
