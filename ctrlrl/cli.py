"""The command line. It imports a job only inside that job's command, so that it starts at once."""

import sys
from typing import Annotated

import typer

from jobs.launch import Out, Recipe, Resume, Set

app = typer.Typer(
    help="Train language models whose safety and helpfulness an operator can dial.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def demo(
    out: Annotated[str, typer.Option(help="Run directory.")] = "runs/demo",
    seed: Annotated[int, typer.Option(help="Seed of the world and of training.")] = 0,
    steps: Annotated[int | None, typer.Option(help="PPO steps; fewer for a quick look.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew, keeping only the built world.")] = False,
) -> None:
    """Build a small world, train with PPO on a local Ray cluster, and show the control that was gained."""
    from jobs.demo import main as job

    job(out, seed, steps, fresh)


@app.command()
def ppo(recipe: Recipe = "", overrides: Set = None, out: Out = "", resume: Resume = False) -> None:
    """Train a controllable policy with PPO and the min control reward."""
    from jobs.ppo import main as job

    job(recipe, overrides, out, resume)


@app.command()
def evaluate(recipe: Recipe = "", overrides: Set = None, out: Out = "") -> None:
    """Measure how far a model's answers follow the requested control."""
    from jobs.evaluate import main as job

    job(recipe, overrides, out)


@app.command()
def doctor() -> None:
    """Print versions, devices, threads, the Ray address and what is missing; exit code 1 if something needed is absent."""
    from ctrlrl.doctor import examine

    lines, healthy = examine()
    print("\n".join(lines))
    raise typer.Exit(0 if healthy else 1)


def main() -> None:
    """Entry point of `ctrlrl`."""
    app(prog_name="ctrlrl", args=sys.argv[1:])


if __name__ == "__main__":
    main()
