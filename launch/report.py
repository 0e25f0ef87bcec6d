"""Writes a quickstart's report.html and summary.json.

python -m launch.report --workdir runs/quickstart
"""

from pathlib import Path

from absl import flags

from clip_jax.errors import ConfigError
from clip_jax.evaluation.report import write_report
from launch import command

WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the quickstart; its CLIP run is in clip/.")


def main() -> None:
    if not WORKDIR.value:
        raise ConfigError("--workdir is missing: name the directory of a quickstart")
    path = write_report(Path(WORKDIR.value))
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB) and {path.with_name('summary.json')}")


if __name__ == "__main__":
    command.run(main)
