"""The report of a past run, built anew: `python -m flows.report RUN [--against RUN]`."""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flows.config import PROJECT, RunConfig, resolve_paths
from flows.store import SHORT, store_named
from flows.terminal import show_on_terminal
from tasks.adapters.benchmarks import benchmark_root
from tasks.adapters.dataset import Dataset
from tasks.adapters.images import ImageReader
from tasks.adapters.importers import image_root, locate
from tasks.adapters.report_page import build_page
from tasks.adapters.side_by_side import build_comparison
from tasks.adapters.store import Store, StoreError
from tasks.artifacts import Manifest
from tasks.evaluation_config import HELD_OUT, BenchmarkConfig
from tasks.report import ReportJob
from vzero_core.errors import ConfigError, InputError, VZeroError


def find_run(reports: list[Manifest], name: str) -> ReportJob:
    """Give a run's report by the run's name, of several the latest, or by the first digits of the report's key.

    Raises:
        InputError: there is no such run, or digits fit several.
        ValidationError: another version of the code made it.
    """
    reports = sorted(reports, key=lambda manifest: manifest.created_at)
    named = [manifest for manifest in reports if manifest.job["name"] == name]
    keyed = [manifest for manifest in reports if manifest.key.startswith(name)]
    if not named and len(keyed) != 1:
        known = ", ".join(f"{manifest.job['name']} ({manifest.key[:SHORT]})" for manifest in (keyed or reports)[-10:])
        what = "several begin so" if keyed else "there is none such"
        raise InputError(
            f"RUN must be the name of a run or the first digits of its report's key, got {name!r}: {what}; there are "
            f"{known or 'no runs at all'}"
        )
    found = (named or keyed)[-1]
    return ReportJob.model_validate(found.job)


def rebuild(job: ReportJob, store: Store, work_dir: Path) -> str:
    """Give the page of a run; pictures are read where the run's own configuration says that they are.

    Raises:
        ValidationError: another version of the code made it.
    """
    # Nothing is judged now, so no judge's server need be named.
    benchmarks = [{**benchmark, "judge": None} for benchmark in job.config.get("benchmarks", ())]
    made = RunConfig.model_validate({"data": job.config["data"], "benchmarks": benchmarks})
    config = resolve_paths(made, PROJECT)
    data = locate(config.data.source, work_dir)
    own = BenchmarkConfig(name=HELD_OUT, kind="jsonl", path=data.evaluation_path) if data.evaluation_path else None
    measured = [*([own] if own else []), *config.benchmarks]

    def reader(root: str) -> Dataset:
        return Dataset(store, ImageReader(root, config.data.max_image_pixels))

    return build_page(job, store, reader(image_root(data)), {one.name: reader(benchmark_root(one)) for one in measured})


def _parse(arguments: list[str] | None) -> Any:
    parser = argparse.ArgumentParser(
        prog="python -m flows.report", description="Build the report of a past run from its artefacts."
    )
    parser.add_argument("run", metavar="RUN", help="name of the run (its latest), or first digits of its report's key")
    parser.add_argument("--against", metavar="RUN", help="lay this run beside it")
    parser.add_argument("--config", type=Path, help="TOML configuration with the store; without it the laptop's")
    parser.add_argument("--store", help="folder or URL of the store, instead of the configuration's")
    parser.add_argument("--output", type=Path, help="file to write, or to replace; default: RUN.html here")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    options = _parse(arguments)
    show_on_terminal()
    try:
        with store_named(options.config, options.store) as (store, work_dir):
            files = [file for file in store.files() if file.path.startswith(f"{ReportJob.stage}/")]
            if not files:
                raise StoreError(f"{store.url} must hold the report of a run, but has none; check --config and --store")
            reports = list(store.manifests(files))
            job = find_run(reports, options.run)
            if options.against is None:
                name, page = job.name, rebuild(job, store, work_dir)
            else:
                other = find_run(reports, options.against)
                name, page = f"{job.name}-against-{other.name}", build_comparison(other, job, store)
        target = options.output or Path(f"{re.sub(r'[^A-Za-z0-9_.-]', '-', name)}.html")
        existed = target.exists()
        try:
            target.write_text(page, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--output must be a file that can be written, got {target}: {error.strerror}") from error
        print(f"{'replaced' if existed else 'wrote'} {target}")
    except ValidationError as error:
        # Of artefacts behind the report.
        print(
            f"error: what a run made must have the form of this version of V-Zero, but its {error.title} has not; run "
            "its flow again: what can be used is used",
            file=sys.stderr,
        )
        return 1
    except VZeroError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
