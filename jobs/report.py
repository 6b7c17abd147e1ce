"""Compare evaluated runs: one self-contained HTML file and a Markdown table.

python jobs/report.py runs/ppo runs/prompting base=runs/before --out runs/report
"""

from typing import Annotated

import typer

from ctrlrl.evaluation.exhibits import collect
from ctrlrl.evaluation.report import write_report
from ctrlrl.runs import only_writer
from jobs.parts.launch import mistakes_told

Runs = Annotated[list[str], typer.Argument(help="Evaluations, training runs, distillations, benches, studies, folders of them; NAME=DIR.")]


def report(runs: list[str], out: str, title: str = "") -> int:
    """Write report.html and report.md into `out`, and say where they are and what is in them."""
    found = collect(runs)
    with only_writer(out) as directory:
        html, markdown = write_report(found, directory, title)
    kinds = {"evaluation": found.evaluated, "training run": found.trained, "generation": found.generated, "distillation": found.distilled}
    counts = [f"{len(items)} {kind}{'s' * (len(items) > 1)}" for kind, items in kinds.items() if items]
    counts += [f"{len(found.benches)} {'bench' if len(found.benches) == 1 else 'benches'}"] * bool(found.benches)
    print(", ".join(counts + [f"{len(found.studies)} {'study' if len(found.studies) == 1 else 'studies'}"] * bool(found.studies)))
    print(f"{html}\n{markdown}", flush=True)
    return 0


def main(
    runs: Runs,
    out: Annotated[str, typer.Option(help="Directory for report.html and report.md.")] = "runs/report",
    title: Annotated[str, typer.Option(help="Heading of the report.")] = "",
) -> None:
    """Compare evaluated runs."""
    with mistakes_told():
        raise typer.Exit(report(runs, out, title))


if __name__ == "__main__":
    typer.run(main)
