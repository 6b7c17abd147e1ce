"""Every causal architecture of transformers, tiny and random: its layouts give what one sequence at a time gives, or it is refused.

`python tests/models/test_architectures.py` prints the table of jobs/README.md.
"""

import copy
import os
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ctrlrl.data.batches import TokenBatch
from ctrlrl.errors import ModelError
from ctrlrl.models.forward import PolicyModule, lay_out
from ctrlrl.models.layout import check_layout, settle
from ctrlrl.models.loading import _without_dropout

CPU, README = torch.device("cpu"), Path(__file__).parents[2] / "jobs" / "README.md"
VOCABULARY = 131
# By the names that configurations give their sizes. Windows, chunks and position tables are shorter than what goes through them.
SIZES = dict(
    vocab_size=131, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    max_position_embeddings=64, n_embd=32, n_layer=4, n_head=4, n_positions=64, n_inner=48, d_model=32, n_heads=4, n_layers=4, ffn_dim=48,
    num_layers=4, pad_token_id=0, bos_token_id=1, eos_token_id=2, moe_intermediate_size=16, num_experts=4, num_local_experts=4,
    n_routed_experts=4, num_experts_per_tok=2, max_seq_len=64, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8,
    v_head_dim=8, n_group=1, topk_group=1, shared_expert_intermediate_size=16, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8,
    mamba_d_ssm=64, mamba_expand=2, state_size=8, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8,
    linear_value_head_dim=8, linear_head_dim=8,
    linear_num_heads=4, first_k_dense_replace=1, word_embed_proj_dim=32, rotary_dim=4, hidden_size_per_layer_input=8,
    vocab_size_per_layer_input=131, attention_hidden_size=32, attention_head_dim=16, mamba_num_heads=8, mamba_head_dim=8, num_heads=8,
    n_groups=1, rotary_pct=0.25, sliding_window=8, attention_chunk_size=8, embedding_size=32, encoder_layers=1, decoder_layers=2,
    encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32,
)  # fmt: skip
# Attention by latent vectors has as many key heads as heads; encoders are asked to be decoders.
_LATENT = ("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "kimi_linear", "longcat_flash",
           "minicpm3", "youtu")  # fmt: skip
_ENCODERS = ("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert",
             "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod")  # fmt: skip
CHANGES = {
    **dict.fromkeys(_LATENT, dict(num_key_value_heads=4)),
    **dict.fromkeys(_ENCODERS, dict(is_decoder=True)),
    "bamba": dict(attn_layer_indices=[1, 3]),
    "cohere_compass_text": dict(
        head_dim=128, rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 1e4}}, sliding_window=None
    ),
    "dots1": dict(n_shared_experts=1),
    "dbrx": dict(attn_config={"kv_n_heads": 2, "rope_theta": 1e4}, ffn_config={"hidden_size": 32, "ffn_hidden_size": 16}),
    "gemma2": dict(attn_logit_softcapping=1.5, final_logit_softcapping=3.0),
    "gemma3n_text": dict(layer_types=["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=0),
    "gpt_neo": dict(attention_types=[[["global", "local"], 2]], window_size=8),
    "lfm2": dict(layer_types=["conv", "full_attention"] * 2),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 2),
    "mamba2": dict(num_heads=8, head_dim=8, expand=2),
    "prophetnet": dict(num_hidden_layers=None, num_encoder_layers=1, num_decoder_layers=2, ngram=1),
    "qwen2": dict(use_sliding_window=True, max_window_layers=2),
    "reformer": dict(is_decoder=True, axial_pos_embds_dim=[16, 16], axial_pos_shape=[8, 8]),
    "rembert": dict(is_decoder=True, input_embedding_size=32, output_embedding_size=32),
    "roc_bert": dict(is_decoder=True, pronunciation_vocab_size=131, shape_vocab_size=131),
    "vaultgemma": dict(attn_logit_softcapping=1.5, final_logit_softcapping=3.0),
    "xmod": dict(is_decoder=True, default_language="en_XX"),
    "zamba": dict(attention_hidden_size=64, attention_head_dim=16, layers_block_type=["linear_attention", "hybrid"] * 2),
    "zamba2": dict(attention_hidden_size=64, attention_head_dim=16, layers_block_type=["linear_attention", "hybrid"] * 2),
    "zaya": dict(num_experts_per_tok=1),
}
_IMAGES = "takes images or sound beside text, whose parts are large; the text model alone is listed by itself where it is one"
# Not built tiny, and why. A new architecture of the library is tried until it is named here.
UNBUILT = {
    **dict.fromkeys(
        ("emu3", "gemma3", "gemma3n", "gemma4", "gemma4_unified", "git", "got_ocr2", "llama4", "mllama", "musicgen", "musicgen_melody",
         "phi4_multimodal", "qwen3_5", "qwen3_5_moe", "qwen4_exp"), _IMAGES,
    ),
    "blt": "its parts, bytes and patches, have configurations of their own",
    "gemma4_assistant": "drafts tokens for another model, whose states it reads",
    "gemma4_unified_assistant": "drafts tokens for another model, whose states it reads",
    "qwen4_exp_text": "the sizes of its sparse attention have no defaults",
    "xlnet": "has no length and predicts in any order",
}  # fmt: skip


def configuration(kind: str):
    """A small configuration of `kind`: every size that it names."""
    base = CONFIG_MAPPING[kind]()
    names = set(base.to_dict())
    sizes = {key: value for key, value in SIZES.items() if key in names or hasattr(base, key)}
    layers = list(dict.fromkeys(base.layer_types or ())) if "layer_types" in names else []
    if layers:
        sizes["layer_types"] = [layers[i % len(layers)] for i in range(4)]
    sizes = {key: value for key, value in {**sizes, **CHANGES.get(kind, {})}.items() if value is not None}
    derived = {key for key in sizes if isinstance(getattr(type(base), key, None), property) and getattr(type(base), key).fset is None}
    config = type(base)(**{key: value for key, value in sizes.items() if key not in derived})
    return _without_dropout(config)


def build(kind: str):
    """A random model with weights large enough for faults to show; AssertionError if it is not small."""
    config = configuration(kind)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(copy.deepcopy(config)).parameters())
    assert size < 5e6, f"{size:,} weights"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


LAYOUTS = ("padded", "packed", "shared")


def batch() -> TokenBatch:
    rng = np.random.default_rng(1)
    tokens = [rng.integers(3, VOCABULARY, n) for n in (9, 23, 4, 17, 31, 19, 28)]
    for row in (5, 6):
        tokens[row][:16] = tokens[4][:16]  # a prompt that three have in common
    return TokenBatch(tokens, np.array([3, 10, 1, 8, 16, 16, 16]), {}, {})


@torch.no_grad()
def one_at_a_time(model) -> list[np.ndarray]:
    """Logprobs of the scored tokens by the model's own logits, nothing but the tokens given."""
    found = []
    for tokens, prompt in zip(batch().tokens, batch().prompt_lengths, strict=True):
        ids = torch.as_tensor(tokens)[None]
        logprobs = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
        found.append(logprobs[prompt - 1 : -1].gather(1, ids[0, prompt:, None])[:, 0].numpy())
    return found


@cache
def outcome(kind: str) -> str:
    """The layout that "auto" chose, "refused", or "not built: why"; what it says is checked against one sequence at a time."""
    try:
        model = build(kind)
    except Exception as error:  # noqa: BLE001 (whatever hinders: UNBUILT names it)
        return f"not built: {type(error).__name__} {str(error).strip()[:200]}"
    module = PolicyModule(model, 1.0)
    try:
        chosen = settle(module, kind, "auto", CPU)
    except ModelError:
        return "refused"
    layouts, wanted = LAYOUTS[: 1 + LAYOUTS.index(chosen)], None
    for layout in sorted(layouts, key=lambda name: name != "shared"):
        if layout != "shared":  # which is what "auto" has just come to
            assert settle(module, kind, layout, CPU) == layout
        with torch.no_grad():
            found = module(lay_out(batch(), layout, CPU))[0].numpy()
        if wanted is None:
            if model._can_set_attn_implementation():
                model.set_attn_implementation("eager")
            wanted = one_at_a_time(model)
        for row, expected in enumerate(wanted):
            difference = np.abs(found[row, : len(expected)] - expected).max()
            assert difference <= 1e-4, f"{kind} {layout}: {difference:.1e}"
    return chosen


@pytest.mark.parametrize("kind", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
def test_a_layout_is_exact_or_the_model_is_refused(kind):
    found = outcome(kind)
    assert found.startswith("not built") == (kind in UNBUILT), found


@pytest.mark.parametrize("kind", ("bloom", "lfm2", "mamba", "gptj"))
def test_what_cannot_be_packed_is_refused_by_its_configuration(kind, tmp_path):
    configuration(kind).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"a {kind} cannot be packed"):
        check_layout(str(tmp_path), "packed")
    check_layout(str(tmp_path), "auto")


def table() -> str:
    """The architectures by outcome, in Markdown."""
    kinds = {"shared": [], "packed": [], "padded": [], "refused": [], "not tried": []}
    for kind in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        kinds["not tried" if kind in UNBUILT else outcome(kind)].append(kind)
    rows = [f"| {name} | {len(found)} | {', '.join(f'`{kind}`' for kind in found)} |" for name, found in kinds.items()]
    return "\n".join(["| layout | number | architectures (`model_type`) |", "|---|---|---|", *rows])


def test_the_table_of_the_docs_is_what_was_found():
    assert table() in README.read_text()


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    print(table())
