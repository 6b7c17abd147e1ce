"""Which architectures the rollout engine takes: its logprobs against transformers', at the start and after changed weights are published.

    python tests/benchmarks/families.py                       # every architecture, one process each; goes on where it was stopped
    python tests/benchmarks/families.py --table               # the Markdown table of what was found
    python tests/benchmarks/families.py --measure llama phi   # these, in this process

Models are tiny, random and fp32, the truth is transformers with its plain attention on one sequence at a time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SMALL = dict(
    vocab_size=384, hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    max_position_embeddings=256, n_embd=128, n_layer=2, n_head=4, n_positions=256, n_inner=96, d_model=128, n_heads=4, n_layers=2,
    ffn_dim=96, num_layers=2,
    max_seq_len=256, word_embed_proj_dim=128, rotary_dim=8, rotary_pct=0.25, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    moe_intermediate_size=32, num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
    shared_expert_intermediate_size=32, moe_num_experts=4, moe_k=2, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8,
    qk_nope_head_dim=8, v_head_dim=16, first_k_dense_replace=1, sliding_window=8, mamba_n_heads=8, mamba_d_head=32, mamba_d_state=16,
    mamba_d_ssm=256, mamba_expand=2, mamba_num_heads=8, mamba_head_dim=32, state_size=16, linear_num_value_heads=4,
    linear_num_key_heads=2, linear_key_head_dim=32, linear_value_head_dim=32, hidden_size_per_layer_input=16, n_groups=1,
    vocab_size_per_layer_input=384, attention_hidden_size=128, attention_head_dim=32, chunk_size=16, mamba_chunk_size=16,
)  # fmt: skip
# What a family cannot do without, or would be too large with.
OWN = {
    "deepseek_v3": {"topk_method": "noaux_tc", "kv_lora_rank": 512, "qk_rope_head_dim": 64},
    "gpt_oss": {"sliding_window": 8},
    "deepseek_v2": {"kv_lora_rank": 512, "qk_rope_head_dim": 64},
    "mamba2": {"num_heads": 8, "head_dim": 32, "expand": 2},
    "lfm2": {"block_dim": 128, "conv_dim": 128, "block_multiple_of": 32, "block_ff_dim": 96, "block_auto_adjust_ff_dim": False},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "minimax_m2": {"rotary_dim": 32, "scoring_func": "sigmoid", "use_routing_bias": True},
    "gemma4_text": {"num_experts": None},
    "llama4_text": {"num_experts_per_tok": 1},
    "glm4_moe": {"topk_method": "noaux_tc", "head_dim": 32},
}
FAMILIES = """llama qwen2 qwen3 gemma gemma2 gemma3_text gemma3n_text gemma4_text phi phi3 gpt2 gpt_neo gpt_neox gpt_bigcode gptj opt
mistral ministral granite glm glm4 cohere cohere2 stablelm nemotron olmo olmo2 olmo3 smollm3 starcoder2 mixtral
qwen2_moe qwen3_moe gpt_oss granitemoe granitemoeshared olmoe flex_olmo deepseek_v2 deepseek_v3 glm4_moe phimoe dots1
ernie4_5 ernie4_5_moe minimax minimax_m2 hunyuan_v1_dense hunyuan_v1_moe exaone4 seed_oss apertus arcee helium persimmon
bitnet codegen xglm bloom falcon mpt llama4_text lfm2 lfm2_moe qwen3_next qwen3_5_text bamba falcon_h1 jamba
granitemoehybrid nemotron_h zamba2 mamba mamba2 recurrent_gemma rwkv""".split()
RESULTS = Path("runs/families.jsonl")
EXACT = 1e-3  # nats; two right engines differ by 1e-5, wrong ones by 1e-2 and more


def tiny_config(kind: str):
    """A small configuration of an architecture, every kind of its layers in it."""
    from transformers import CONFIG_MAPPING

    base = CONFIG_MAPPING[kind]()
    known = set(base.to_dict())
    sizes = {name: value for name, value in SMALL.items() if name in known or hasattr(base, name)}
    if hasattr(base, "qk_rope_head_dim"):  # latent attention: every head has keys of its own, of a size made of two others
        sizes = {name: value for name, value in sizes.items() if name != "head_dim"} | {"num_key_value_heads": 4}
    if base.to_dict().get("sliding_window") is None:
        sizes.pop("sliding_window", None)
    kinds = list(dict.fromkeys(base.to_dict().get("layer_types") or []))
    layers = max(2, len(kinds))
    sizes |= {name: layers for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if name in sizes}
    if kinds:
        sizes["layer_types"] = [kinds[i % len(kinds)] for i in range(layers)]
    sizes |= OWN.get(kind, {})
    while True:
        try:
            return CONFIG_MAPPING[kind](**sizes)
        except AttributeError as error:  # a property without a setter: derived from other fields
            name = next((name for name in sizes if f"'{name}'" in str(error) or str(error).startswith(f"property '{name}'")), None)
            if name is None or "setter" not in str(error):
                raise
            del sizes[name]


def tiny_model(kind: str):
    """A small random model of an architecture, fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(kind), dtype=torch.float32, attn_implementation="eager").eval()
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def measure(kind: str, parts: int = 1) -> dict:
    """The largest differences of logprobs, at the start, of tokens drawn one by one, after a publish in parts (from device to device; by an
    engine of one process alone) and after one as a whole; how far the first of them moved the model; and whether the proof that an unknown
    architecture has to give would let it in."""
    import numpy as np
    import torch

    from ctrlrl.errors import ModelError
    from ctrlrl.models.proof import Proof
    from ctrlrl.models.sampler import EngineConfig, Request, Sampler, SamplingConfig

    model = tiny_model(kind)
    sequences = [np.random.default_rng(seed).integers(3, 380, 20).tolist() for seed in range(3)]

    @torch.no_grad()
    def truth(of=sequences, first=1):
        found = [model(input_ids=torch.tensor([s]), use_cache=False).logits[0].log_softmax(-1) for s in of]
        own = [x[torch.arange(len(x) - 1), torch.tensor(s[1:])] for x, s in zip(found, of, strict=True)]
        return torch.cat([x[first - 1 :] for x in own]).numpy()

    before = truth()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        _tokenizer().save_pretrained(folder)
        engine = EngineConfig(dtype="float32", max_model_tokens=128, kv_cache_gib=0.05, tensor_parallel=parts)
        proof, sampler = Proof(folder, engine), Sampler(folder, engine)
        try:
            proof.check(sampler.logprobs)
            proved = True
        except ModelError as error:
            proved = False
            print(error, file=sys.stderr)
        start = np.abs(np.concatenate(sampler.logprobs(sequences)) - before).max()
        requests = [Request(tuple(s), seed) for seed, s in enumerate(sequences)]
        drawn = sampler.generate(requests, SamplingConfig(temperature=1, top_p=1, max_new_tokens=12))
        whole = [s + ids.tolist() for s, ids in zip(sequences, drawn.response_ids, strict=True)]
        decoded = np.abs(np.concatenate(drawn.logprobs) - truth(whole, 20)).max()
        figures = {"start": start, "drawn": decoded}
        for version, (name, publish) in enumerate((("in_parts", _in_parts), ("published", _whole))[parts > 1 :], start=1):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.02)
            after = truth()
            publish(sampler, model, version)
            figures[name] = np.abs(np.concatenate(sampler.logprobs(sequences)) - after).max()
            figures.setdefault("moved", np.abs(after - before).max())
        sampler.close()
    return {"proved": proved, **{name: float(figure) for name, figure in figures.items()}}


def _whole(sampler, model, version: int) -> None:
    from ctrlrl.models.weights import message_of

    sampler._llm.collective_rpc(lambda rank: rank.weight_transfer_engine.init_transfer_engine(None))  # which has seen no weights then
    sampler.load_weights(message_of(model, "float32", version))


def _in_parts(sampler, model, version: int) -> None:
    """Buckets that hold a few tensors, as often as the engine wants them."""
    import torch

    from ctrlrl.models.handover import Giver
    from ctrlrl.models.weights import device_weights_of

    giver = Giver()
    for _ in range(3):
        giver.begin(device_weights_of(model, "float32"), version, 30_000, torch.device("cpu"))
        size, last = 0, False
        while not last:
            bucket = giver.next()
            size, last = sampler.take(bucket), bucket.last
        if size:
            return
    raise RuntimeError("the engine wants the weights once more, and once more")


def _tokenizer():
    """The least that a model directory needs: bytes, and an end token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {piece: i for i, piece in enumerate(["<pad>", "<s>", "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="<end>")


def environment_of_engine() -> dict[str, str]:
    """Of a process that measures."""
    from ctrlrl.models.sampler import EngineConfig, environment

    return {**os.environ, **environment(EngineConfig()), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def _sweep(kinds: list[str]) -> None:
    known = {json.loads(line)["family"] for line in RESULTS.read_text().splitlines()} if RESULTS.exists() else set()
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    for kind in [k for k in kinds if k not in known]:
        command = [sys.executable, __file__, "--measure", kind]
        done = subprocess.run(command, env=environment_of_engine(), capture_output=True, text=True, timeout=300)
        lines = [line for line in done.stdout.splitlines() if line.startswith('{"family"')]
        line = lines[-1] if lines else json.dumps({"family": kind, "error": (done.stderr.strip().splitlines() or ["no output"])[-1]})
        with RESULTS.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)


def _table() -> str:
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    lines = ["| architecture | at the start | drawn | after a publish in parts | as a whole |", "|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: row["family"]):
        if "error" in row:
            lines.append(f"| {row['family']} | {row['error'][:120]} | | | |")
        else:
            lines.append(f"| {row['family']} | {row['start']:.0e} | {row['drawn']:.0e} | {row['in_parts']:.0e} | {row['published']:.0e} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, sweep or print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("families", nargs="*")
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--parts", type=int, default=1, help="of an engine, with --measure")
    options = parser.parse_args()
    kinds = options.families or FAMILIES
    if options.table:
        print(_table())
    elif options.measure:
        for kind in kinds:
            try:
                print(json.dumps({"family": kind, **measure(kind, options.parts)}), flush=True)
            except Exception as error:
                print(json.dumps({"family": kind, "error": f"{type(error).__name__}: {str(error)[:300]}"}), flush=True)
    else:
        _sweep(kinds)


if __name__ == "__main__":
    main()
