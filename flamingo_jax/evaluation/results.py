"""An evaluation written to a directory, condition by condition; called again after it was stopped, it goes on."""

import json
import logging
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from clip_jax.errors import ConfigError, UserError
from clip_jax.evaluation.hosts import read_over_hosts
from clip_jax.files import write_atomically
from flamingo_jax.evaluation.harness import Evaluation, table

PACKAGES = ("clip-flamingo-jax", "jax", "jaxlib", "flax", "numpy", "pillow", "tokenizers", "scikit-learn")


def versions() -> dict[str, str]:
    """What the figures were computed with."""
    found = {"python": platform.python_version(), "devices": f"{jax.device_count()} × {jax.devices()[0].device_kind}"}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # an extra, or a checkout that is not installed
    return found


def evaluate_to(evaluation: Evaluation, output: Path) -> dict[str, Any]:
    """Runs all conditions that are not there yet. Every process calls it alike; the first one writes.

    `results.json` holds the plan (model, data, settings with their seeds), the versions and for each condition the
    figures and of every record its shots, prompts and raw outputs; `results.md` the table. Until all is done, each
    condition's part stands in `results.json.parts/`.

    Returns:
      What `results.json` holds; on other processes than the first, only what they ran themselves.

    Raises:
      ConfigError: results of another plan are there, or nothing can be written there; in every process alike.
    """
    plan = json.loads(json.dumps(evaluation.plan()))
    path = output / "results.json"
    parts = path.with_name(path.name + ".parts")
    evaluation.check()
    conditions = evaluation.settings.conditions()
    writes = jax.process_index() == 0
    files = [parts / f"{condition.name()}.json" for condition in conditions]

    def begin(_: int) -> tuple[str, list[bool]]:
        """(what is wrong, which parts are there)."""
        try:
            _begin(path, parts, plan)
        except Exception as error:  # of any kind: the others wait for a word
            return str(error) if isinstance(error, UserError) else f"{path}: {type(error).__name__}: {error}", []
        return "", [path.is_file() or file.is_file() for file in files]

    ((wrong, there),) = read_over_hosts(begin, 1)  # by the first process: other hosts may not see these files
    if wrong:
        raise ConfigError(wrong)
    for condition, file, done in zip(
        tqdm(conditions, desc="evaluate", unit="condition", dynamic_ncols=True, disable=None if writes else True),
        files, there, strict=True,
    ):  # fmt: skip
        if not done:
            found = {"plan": plan, "versions": versions(), **evaluation.run(condition)}
            if writes:
                write_atomically(file, json.dumps(found, ensure_ascii=False) + "\n")
    if not writes:
        return {"plan": plan}
    if not path.is_file():
        read = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        runs = [{key: value for key, value in part.items() if key != "plan"} for part in read]
        write_atomically(path, json.dumps({"plan": plan, "runs": runs}, indent=1, ensure_ascii=False) + "\n")
    shutil.rmtree(parts, ignore_errors=True)
    results = json.loads(path.read_text(encoding="utf-8"))
    write_atomically(output / "results.md", table(results) + "\n")
    return results


def _begin(path: Path, parts: Path, plan: dict[str, Any]) -> None:
    """Sees that what is there belongs to the same plan, and makes the directory of the parts."""
    if path.is_file():
        begun = json.loads(path.read_text(encoding="utf-8"))["plan"]
    elif (parts / "plan.json").is_file():
        begun = json.loads((parts / "plan.json").read_text(encoding="utf-8"))
        logging.info("%s: going on", path)
    else:
        parts.mkdir(parents=True, exist_ok=True)
        write_atomically(parts / "plan.json", json.dumps(plan, indent=1, ensure_ascii=False) + "\n")
        return
    if different := [key for key in plan if begun.get(key) != plan[key]]:
        key = different[0]
        was, now = (json.dumps(x, ensure_ascii=False)[:80] for x in (begun.get(key), plan[key]))
        raise ConfigError(f"{path}: was made with {key} {was}, not {now}; name another directory")
