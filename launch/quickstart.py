"""From nothing to a report: each stage is a command that can be run by itself.

    python -m launch.quickstart [--workdir runs/quickstart] [--mode debug]

Run again, it goes on where it stopped, or says that all is done.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from clip_jax.files import write_atomically
from launch import STOPPED


@dataclass(frozen=True)
class Stage:
    """A command and how to tell that it need not run."""

    name: str
    arguments: tuple[str, ...]  # of `python -m`
    is_done: Callable[[], bool]


def stages(workdir: Path, mode: str) -> list[Stage]:
    """`mode` "debug" takes every config at its smallest."""
    clip, lm, flamingo = (workdir / name for name in ("clip", "language_model", "flamingo"))

    def train(config: str, run: Path, *more: str) -> Stage:
        file = f"configs/{config}.py" + (f":{mode}" if mode else "")
        arguments = ("launch.train", "--config", file, "--workdir", str(run), *more)
        return Stage(f"train {run.name}", arguments, lambda: is_trained(run))

    def evaluate(run: Path) -> Stage:
        return Stage(f"evaluate {run.name}", ("launch.evaluate", "--workdir", str(run)), lambda: is_evaluated(run))

    return [
        train("clip/quickstart", clip),
        evaluate(clip),
        train("flamingo/quickstart_lm", lm),
        train("flamingo/quickstart", flamingo, f"--config.init.vision={clip}", f"--config.init.language_model={lm}"),
        evaluate(flamingo),
        Stage("report", ("launch.report", "--workdir", str(workdir)), lambda: is_reported(workdir)),
    ]


def newest_step(run: Path) -> int:
    """The step of a run's newest finished checkpoint; 0 where there is none."""
    return max((int(p.parent.name) for p in run.glob("checkpoints/[0-9]*[0-9]/manifest.json")), default=0)


def is_trained(run: Path) -> bool:
    config = run / "config.json"
    return config.exists() and newest_step(run) >= json.loads(config.read_text())["steps"]


def is_evaluated(run: Path) -> bool:
    results = run / "evaluation.json"
    return results.exists() and int(json.loads(results.read_text())["checkpoint"]) == newest_step(run)


def is_reported(workdir: Path) -> bool:
    report, results = workdir / "report.html", [workdir / run / "evaluation.json" for run in ("clip", "flamingo")]
    return report.exists() and all(r.exists() and report.stat().st_mtime > r.stat().st_mtime for r in results)


def run(stage: Stage, seconds_file: Path, output: TextIO | None = None) -> int:
    """Runs a stage to its end, adds its seconds to those of earlier, interrupted runs of it, and returns its exit code.

    A training that is asked to stop saves first: Ctrl-C reaches it from the terminal, SIGTERM is passed on, and both
    are waited for.
    """
    start = time.perf_counter()
    stopped = os.environ | {"STOPPED_EXIT_CODE": str(STOPPED)}  # not 0: the next stage must not begin
    process = subprocess.Popen([sys.executable, "-m", *stage.arguments], env=stopped, stdout=output)
    before = {signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None)}
    before[signal.SIGTERM] = signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number))
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        seconds = json.loads(seconds_file.read_text()) if seconds_file.exists() else {}
        seconds[stage.name] = round(seconds.get(stage.name, 0) + time.perf_counter() - start, 1)
        write_atomically(seconds_file, json.dumps(seconds, indent=1) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m launch.quickstart", description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--mode", choices=["", "debug"], default="", help="debug: everything at its smallest")
    parser.add_argument("--json", action="store_true", help="print summary.json; the rest goes to stderr")
    arguments = parser.parse_args(argv)
    workdir: Path = arguments.workdir
    output = sys.stderr if arguments.json else None  # or stdout
    workdir.mkdir(parents=True, exist_ok=True)

    todo = stages(workdir, arguments.mode)
    for number, stage in enumerate(todo, 1):
        title = f"[{number}/{len(todo)}] {stage.name}"
        if stage.is_done():
            print(f"{title}: done", flush=True, file=output)
            continue
        print(f"{title}: python -m {shlex.join(stage.arguments)}", flush=True, file=output)
        code = run(stage, workdir / "seconds.json", output)
        if code:
            print(f"{title}: stopped with exit code {code}; `make quickstart` goes on from here", file=sys.stderr)
            sys.exit(code if code > 0 else 1)
    summary = (workdir / "summary.json").read_text()
    if arguments.json:
        print(summary, end="")
    else:
        print_headline(json.loads(summary))
        print(f"all done: {workdir / 'report.html'}")


def print_headline(summary: dict) -> None:
    for source, key, what in (
        ("held_out_style", "top1", "top-1 of {classes} names, in a style never seen"),
        ("held_out_style", "recall_at_5", "of names find their picture among the first 5, in that style"),
        ("unseen_concepts", "top1", "top-1 of {classes} names never seen, in seen styles"),
    ):
        figures = summary["clip"][source]
        print(f"{figures[key]:6.1%} {what.format(**figures)} (chance {figures['chance'][key]:.2%})")
    answers, captions = summary["flamingo"]["answers"], summary["flamingo"]["captions"]
    low, high = (100 * x for x in answers["interval"])
    print(
        f"{answers['true_images']:6.1%} of {answers['questions']} questions about things never seen, in that style, "
        f"answered rightly (chance {answers['chance']['all']:.1%})\n"
        f"       with other images {answers['shuffled_images']:.1%}, with none {answers['no_images']:.1%}: "
        f"the right ones matter by {low:.1f} to {high:.1f} points"
    )
    for key in (k for k in captions if k.startswith("shots_")):
        other = captions[key]["shuffled_images"]["cider"]
        print(f"{captions[key]['cider']:6.2f} CIDEr of captions with {key[6:]} shots (other images {other:.2f})")


if __name__ == "__main__":
    main()
