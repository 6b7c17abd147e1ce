"""A model between two: their weights interpolated (rewarded soups), to be compared by ctrlrl bench and evaluate.

    ctrlrl soup runs/helpful/model runs/harmless/model --share .3 --out runs/soup3

No training and no Ray: it reads and writes files. The share is that of the second model.
"""

from typing import Annotated

import typer

from jobs.parts.launch import mistakes_told

First = Annotated[str, typer.Argument(help="The first model: a directory, or a hub name. The soup has its files, dtypes and tokenizer.")]
Second = Annotated[str, typer.Argument(help="The second model, of the same architecture and tokenizer.")]
Share = Annotated[float, typer.Option(help="How much of the second model, from 0 to 1.")]
NewOut = Annotated[str, typer.Option(help="New directory for the soup.")]


def main(first: First, second: Second, share: Share, out: NewOut) -> None:
    """Mix the weights of two models."""
    with mistakes_told():
        from ctrlrl.models.soup import soup

        print(f"{1 - share:g} of {first} and {share:g} of {second}: {soup(first, second, share, out)}")


if __name__ == "__main__":
    typer.run(main)
