"""The command line. It imports a job only inside that job's command, so that it starts at once."""

import sys
from typing import Annotated

import typer

from jobs.launch import Data, Out, Recipe, Resume, Set

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
def generate(
    recipe: Recipe = "",
    overrides: Set = None,
    out: Out = "",
    scale: Annotated[str, typer.Option(help="Units to have in the end, such as 8x: passes over the prompts, each with other seeds.")] = "",
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Set unreadable and overlong prompts aside in rejects.jsonl.")
    ] = False,
) -> None:
    """Have the policy answer its prompts, and score the answers: the data of self-generation."""
    from jobs.generate import main as job

    job(recipe, overrides, out, scale, skip_bad_rows)


@app.command()
def score(data: Data, recipe: Recipe = "", overrides: Set = None) -> None:
    """Score the answers of ctrlrl generate with other reward models."""
    from jobs.score import main as job

    job(data, recipe, overrides)


@app.command()
def calibrate(
    data: Data,
    out: Annotated[str, typer.Option(help="Directory for helpful.json and harmless.json.")],
    scores: Annotated[str, typer.Option(help="Which set of scores: that of ctrlrl generate, or a name of ctrlrl score.")] = "optimisation",
) -> None:
    """Fit quantile calibrations to the raw outputs of a set of scores."""
    from jobs.calibrate import main as job

    job(data, out, scores)


@app.command()
def distill(
    data: Data,
    method: Annotated[str, typer.Option(help="vanilla, oversampling or moec.")] = "",
    recipe: Recipe = "",
    overrides: Set = None,
    out: Out = "",
) -> None:
    """Make a training table of controls and answers from what ctrlrl generate and ctrlrl score made."""
    from jobs.distill import main as job

    job(data, method, recipe, overrides, out)


@app.command()
def inspect(data: Data, examples: Annotated[int, typer.Option(help="How many samples to show.")] = 5) -> None:
    """Say what a directory of ctrlrl generate holds, verify it, and name what is missing; exit code 1 if it is damaged."""
    from jobs.examine import main as job

    job(data, examples)


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
