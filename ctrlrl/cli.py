"""The command line. It imports a job only inside that job's command, so that it starts at once."""

import sys
from typing import Annotated

import typer

from jobs.parts.launch import BesideGib, Data, GpuGib, Gpus, Out, Recipe, RecipeFile, Resume, Set, Sizes, SkipBadRows, mistakes_told

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
    only: Annotated[str, typer.Option(help="Run one step alone, such as ppo or evaluate.")] = "",
    fast: Annotated[bool, typer.Option("--fast", help="A rough world and few steps: see everything run, not learn.")] = False,
    steps: Annotated[int | None, typer.Option(help="PPO steps; fewer for a quick look.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew, keeping only the built world.")] = False,
) -> None:
    """Run the whole paper in miniature on a local Ray cluster: generate, distil, train by every method, evaluate, report."""
    from jobs.demo import main as job

    job(out, seed, only, fast, steps, fresh)


@app.command()
def ppo(
    recipe: Recipe = "", overrides: Set = None, out: Out = "", resume: Resume = False, skip_bad_rows: SkipBadRows = False
) -> None:
    """Train a controllable policy with PPO and the min control reward."""
    from jobs.ppo import main as job

    job(recipe, overrides, out, resume, skip_bad_rows)


@app.command(name="ppo-overlap")
def ppo_overlap(
    recipe: Recipe = "", overrides: Set = None, out: Out = "", resume: Resume = False, skip_bad_rows: SkipBadRows = False
) -> None:
    """PPO that draws each batch while the one before it trains (lag = 0, 1, 2)."""
    from jobs.ppo_overlap import main as job

    job(recipe, overrides, out, resume, skip_bad_rows)


@app.command()
def evaluate(
    recipe: Recipe = "", overrides: Set = None, out: Out = "",
    table: Annotated[str, typer.Option(help="Measure this table.parquet again, without models and without Ray.")] = "",
    levels: Annotated[str, typer.Option(help="Levels of a finer grid, such as 0.2,0.4,0.6,0.8,1 (the recipe's `levels`).")] = "",
    skip_bad_rows: SkipBadRows = False,
) -> None:  # fmt: skip
    """Measure how far a model's answers follow the requested control."""
    if table:
        from jobs.parts.measure import main as measure

        raise typer.Exit(measure(table, recipe, [*(overrides or []), *([f"levels=[{levels}]"] if levels else [])], out))
    from jobs.evaluate import main as job

    job(recipe, overrides, out, levels, skip_bad_rows)


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="Model whose dial is tried: a directory such as runs/mine/model, or a hub name.")] = "",
    on: Annotated[list[str] | None, typer.Option("--on", help="A set: xstest (from the hub), or xstest=FILE. Repeatable.")] = None,
    recipe: Recipe = "", overrides: Set = None, out: Out = "", skip_bad_rows: SkipBadRows = False,
    attacks: Annotated[bool, typer.Option("--attacks", help="Ask every prompt again under each built-in attack.")] = False,
) -> None:
    """Try a model's dial on public safety sets: refusals, over-refusal, selectivity, and what attacks leave of it."""
    from jobs.bench import main as job

    job(model, on, recipe, overrides, out, attacks, skip_bad_rows)


@app.command()
def soup(
    first: Annotated[str, typer.Argument(help="The first model; the soup has its files, dtypes and tokenizer.")],
    second: Annotated[str, typer.Argument(help="The second, of the same architecture and tokenizer.")],
    share: Annotated[float, typer.Option(help="How much of the second model, from 0 to 1.")],
    out: Annotated[str, typer.Option(help="New directory for the soup.")],
) -> None:
    """Write a model whose weights lie between those of two models (rewarded soups)."""
    from jobs.soup import main as job

    job(first, second, share, out)


@app.command()
def report(
    runs: Annotated[
        list[str], typer.Argument(help="Directories of evaluations, training runs, distillations, studies; NAME=DIR names one.")
    ],
    out: Annotated[str, typer.Option(help="Directory for report.html and report.md.")] = "runs/report",
    title: Annotated[str, typer.Option(help="Heading of the report.")] = "",
) -> None:
    """Compare evaluated runs in one self-contained HTML file and a Markdown table."""
    from jobs.report import main as job

    job(runs, out, title)


@app.command()
def study(
    recipe: Annotated[str, typer.Argument(help="A TOML file, or: synthesis, scale, models, reward, baseline, attributes, paper.")],
    overrides: Set = None, out: Out = "", skip_bad_rows: SkipBadRows = False,
    world: Annotated[str, typer.Option(help="Run on this demo world instead, with the demo's recipes.")] = "",
    only: Annotated[list[str] | None, typer.Option(help="Do this variant alone (may be repeated), or one seed's row of it.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it will cost at this machine's measured speed, and end.")] = False,
) -> None:  # fmt: skip
    """Run one chain of jobs in several variants, and compare them in one table."""
    from jobs.study import main as job

    job(recipe, overrides, out, world, skip_bad_rows, only, dry_run)


@app.command()
def generate(
    recipe: Recipe = "", overrides: Set = None, out: Out = "",
    scale: Annotated[str, typer.Option(help="Units to have in the end, such as 8x: passes over the prompts, each with other seeds.")] = "",
    skip_bad_rows: SkipBadRows = False,
) -> None:  # fmt: skip
    """Have the policy answer its prompts, and score the answers: the data of self-generation."""
    from jobs.generate import main as job

    job(recipe, overrides, out, scale, skip_bad_rows)


@app.command()
def critique(recipe: Recipe = "", overrides: Set = None, out: Out = "", skip_bad_rows: SkipBadRows = False) -> None:
    """Have the policy criticise and rewrite its own answers: the pairs of configurable safety tuning."""
    from jobs.critique import main as job

    job(recipe, overrides, out, skip_bad_rows)


@app.command()
def dpo(
    recipe: Recipe = "", overrides: Set = None, out: Out = "", resume: Resume = False, skip_bad_rows: SkipBadRows = False
) -> None:
    """Tune a policy on preferences under opposite system prompts (configurable safety tuning), or plainly."""
    from jobs.dpo import main as job

    job(recipe, overrides, out, resume, skip_bad_rows)


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
    calibrate: Annotated[str, typer.Option(help="quantile: spread the stored outputs of the reward models over [0, 1] first.")] = "",
) -> None:
    """Make a training table of controls and answers from what ctrlrl generate and ctrlrl score made."""
    from jobs.distill import main as job

    job(data, method, recipe, overrides, out, calibrate)


@app.command()
def finetune(
    objective: Annotated[str, typer.Option(help="plm, clm or exmate.")] = "",
    recipe: Recipe = "", overrides: Set = None, out: Out = "", resume: Resume = False, skip_bad_rows: SkipBadRows = False,
) -> None:  # fmt: skip
    """Fine-tune a policy on the table of ctrlrl distill, so that its answers follow a control."""
    from jobs.finetune import main as job

    job(recipe, objective, overrides, out, resume, skip_bad_rows)


@app.command("reward-model")
def reward_model(
    recipe: Recipe = "", overrides: Set = None, out: Out = "", resume: Resume = False, skip_bad_rows: SkipBadRows = False
) -> None:
    """Train a reward model on preference pairs."""
    from jobs.reward_model import main as job

    job(recipe, overrides, out, resume, skip_bad_rows)


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="Model to serve: a directory such as runs/mine/model, or a hub name.")] = "",
    dials: Annotated[str, typer.Option(help="TOML file of keys and dials; without one, this machine alone and everything allowed.")] = "",
    overrides: Set = None,
    host: Annotated[str, typer.Option(help="Address to listen on; any but this machine's own needs keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    name: Annotated[str, typer.Option(help="The model's name for clients; else its directory's.")] = "",
    new_key: Annotated[str, typer.Option("--new-key", metavar="NAME", help="Print a fresh key and its line for [keys], and end.")] = "",
) -> None:
    """Serve a model to OpenAI's clients, with its dials in the operator's hands and out of users' reach."""
    from jobs.serve import main as job

    job(model, dials, overrides, host, port, name, new_key)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="Model to talk to: a directory such as runs/mine/model, or a hub name.")] = "",
    helpful: Annotated[float | None, typer.Option(help="Level of helpfulness, from 0 to 1.")] = None,
    harmless: Annotated[float | None, typer.Option(help="Level of safety, from 0 to 1.")] = None,
    level: Annotated[list[str] | None, typer.Option(help="Level of any attribute, such as concise=0.2. Repeatable.")] = None,
    system: Annotated[str, typer.Option(help="System prompt of a CST model; `harmless` and `uncensored` are the published ones.")] = "",
    dial: Annotated[str, typer.Option(help="Name of a dial of the server's file, in place of levels.")] = "",
    dials: Annotated[str, typer.Option(help="TOML file of `ctrlrl serve`, for its reward models and engine settings.")] = "",
    overrides: Set = None,
    url: Annotated[str, typer.Option(help="Talk to this running server, such as http://127.0.0.1:8000, in place of a model.")] = "",
    key_file: Annotated[str, typer.Option(help="File that holds the key for --url; else the environment's CTRLRL_KEY.")] = "",
    temperature: Annotated[float | None, typer.Option(help="Of drawing; else the model's own.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Of an answer; else as many as there is room for.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of drawing.")] = None,
) -> None:
    """Talk to a model in the terminal, and turn its dial."""
    from jobs.chat import main as job

    job(model, helpful, harmless, level, system, dial, dials, overrides, url, key_file, temperature, max_tokens, seed)


@app.command()
def inspect(data: Data, examples: Annotated[int, typer.Option(help="How many samples to show.")] = 5) -> None:
    """Say what a directory of ctrlrl generate or critique holds, verify it, and name what is missing; exit code 1 if it is damaged."""
    from jobs.examine import main as job

    job(data, examples)


@app.command()
def plan(
    recipe: RecipeFile, overrides: Set = None, gpu_gib: GpuGib = 80, gpus: Gpus = 0, beside_gib: BesideGib = 1.5, sizes: Sizes = None
) -> None:
    """Print the memory that a PPO recipe needs by worker and phase, and what to change if it does not fit; exit code 1 then."""
    from jobs.plan import main as job

    job(recipe, overrides, gpu_gib, gpus, beside_gib, sizes)


@app.command()
def doctor() -> None:
    """Print versions, devices, threads, the Ray address and what is missing; exit code 1 if something needed is absent."""
    from ctrlrl.doctor import examine

    lines, healthy = examine()
    print("\n".join(lines))
    raise typer.Exit(0 if healthy else 1)


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def submit(
    job: Annotated[str, typer.Argument(help="A command of this list that is to run on the cluster.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="Its arguments, as here.")] = None,
    address: Annotated[str, typer.Option(help="Of the cluster's job server, such as http://127.0.0.1:8265.")] = "",
    detach: Annotated[bool, typer.Option("--detach", help="Return when the job is submitted.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be uploaded and what not; submit nothing.")] = False,
) -> None:
    """Run a job on a Ray cluster: upload the working tree, follow the log, return the job's exit code."""
    from jobs.submit import submit as send

    here = ("submit", "doctor", "chat", "plan")
    known = [name for command in app.registered_commands if (name := command.name or command.callback.__name__) not in here]
    with mistakes_told():
        raise typer.Exit(send(job, arguments or [], known, address, detach, dry_run))


def main() -> None:
    """Entry point of `ctrlrl`."""
    app(prog_name="ctrlrl", args=sys.argv[1:])


if __name__ == "__main__":
    main()
