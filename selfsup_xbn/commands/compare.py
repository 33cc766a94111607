"""Comparison of cells: several configurations with several seeds, their table, curves and page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from selfsup_xbn.commands.board import Board
from selfsup_xbn.commands.dry_run import cost_lines
from selfsup_xbn.commands.jobs import Job, run_jobs
from selfsup_xbn.config.cells import Cells
from selfsup_xbn.config.registry import EVALUATORS
from selfsup_xbn.errors import Interrupted, RunsFailed, UserError
from selfsup_xbn.evaluation.summary import latest, progress_text
from selfsup_xbn.report.comparison import comparison_lines, draw_comparison
from selfsup_xbn.report.page import write_report
from selfsup_xbn.runs.results import add, folder_name, is_finished, outcome, read, write
from selfsup_xbn.utils.atomic import check_creatable
from selfsup_xbn.utils.console import WARNING

RESULTS, CURVES, RUNS = "results.json", "comparison.png", "runs"
"""Files of a comparison, and the directory of its run folders."""


def compare(cells: Cells, seeds: Sequence[int], out: Path, *, processes: int = 2, threads: int = 1) -> list[str]:
    """Train all cells with all seeds, write table, curves and page of the results, and return the lines to print.

    Finished runs are not repeated, and interrupted runs are resumed.

    Args:
        cells: Configurations by label. The others are compared with the first one.
        seeds: Seeds of each cell.
        out: Directory of the results, which is created if needed.
        processes: Number of runs at the same time.
        threads: Number of threads of each run.

    Raises:
        UserError: A configuration is invalid or does not fit its data. Nothing was run.
        Interrupted: The comparison was stopped by a signal, and continues if it is repeated.
        RunsFailed: A run failed. The table has been printed, and the message names the runs.
    """
    check(cells, out)
    write(out / RESULTS, [])  # the run folders have the results
    jobs = jobs_of(cells, seeds, out / RUNS)
    failed = train_all(jobs, cells, out / RESULTS, processes=processes, threads=threads)
    lines = summarize(cells, seeds, out) if len(failed) < len(jobs) else []
    if failed:
        print(*lines, sep="\n")
        names = "; ".join(f"{name}: {error}" for name, error in failed.items())
        raise RunsFailed(f"{len(failed)} of {len(jobs)} runs failed, the others are finished: {names}")
    return lines


def check(cells: Cells, out: Path) -> None:
    """Check that every cell fits its data, before anything is run.

    Raises:
        UserError: A cell does not fit, ``out`` is a file, or it cannot be created. The message names the cell.
    """
    check_creatable(out)
    for label, config in cells.items():
        try:
            cost_lines(config)
        except UserError as error:
            raise UserError(f"cell {label!r}: {error}") from None


def jobs_of(cells: Cells, seeds: Sequence[int], folder: Path) -> list[Job]:
    """Return the runs of all cells, those of the first seed first. Their folders are in ``folder``."""
    return [
        Job(label, seed, replace(cell, seed=seed, out=str(folder / folder_name(cell, seed))))
        for seed in seeds
        for label, cell in cells.items()
    ]


def train_all(jobs: Sequence[Job], cells: Cells, results: Path, *, processes: int, threads: int) -> dict[str, str]:
    """Train the runs that are not finished, and add each run to the results when it ends.

    Returns:
        Reason of the failure of each failed run, by its name.

    Raises:
        Interrupted: A SIGTERM or SIGINT was received.
    """
    finished = [job for job in jobs if is_finished(job.folder)]
    for job in finished:
        add(results, cells, job.label, job.seed, outcome(job.folder))
    failed: dict[str, str] = {}
    board = Board([job.name for job in jobs], len(finished))
    try:
        waiting = [job for job in jobs if job not in finished]
        for report in run_jobs(waiting, processes=processes, threads=threads):
            job, text = report.job, ""
            if report.error:
                failed[job.name] = report.error
            elif report.ended:
                run = outcome(job.folder)
                add(results, cells, job.label, job.seed, run)
                main = EVALUATORS[job.config.evaluator].main
                text = " ".join(progress_text({main: latest(run["records"]).get(main)}))
            board.show(report, text)
    except Interrupted as error:
        raise Interrupted(f"stopped with {board.ended} of {len(jobs)} runs finished; {error}") from None
    finally:
        board.close()
    return failed


def summarize(cells: Cells, seeds: Sequence[int], out: Path) -> list[str]:
    """Draw the curves, write the page, and return the lines of the table and the names of the files."""
    metric = EVALUATORS[next(iter(cells.values())).evaluator].main
    results = read(out / RESULTS)
    draw_comparison(results, metric, out / CURVES)
    jobs = jobs_of(cells, seeds, out / RUNS)
    folders = {
        result["label"]: [job.folder for job in jobs if job.label == result["label"] and is_finished(job.folder)]
        for result in results
    }
    page, notes = write_report([], out, cells=folders)
    files = f"results: {out / RESULTS}, {out / CURVES}, {page}"
    return ["", *comparison_lines(results, metric), "", *notes, *_warning_lines(jobs), files]


def _warning_lines(jobs: Sequence[Job]) -> list[str]:
    """Return a line for each run with warnings, which are in its log."""
    return [f"warnings: {job.name} ({job.log})" for job in jobs if job.log.exists() and _has_warning(job.log)]


def _has_warning(log: Path) -> bool:
    with open(log, errors="replace") as lines:
        return any(line.startswith(WARNING) for line in lines)
