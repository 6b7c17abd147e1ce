"""Tiny random models of any architecture that transformers knows: sizes by the names that configurations give them."""

from transformers import CONFIG_MAPPING, PretrainedConfig

VOCABULARY = 384
LARGEST = 2_000_000  # parameters; a configuration that stays larger has sizes of other names, and is not built
_SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    head_dim=16, max_position_embeddings=256, n_embd=32, n_layer=2, n_head=2, n_positions=256, n_inner=48, d_model=32, n_heads=2,
    n_layers=2, ffn_dim=48, d_ff=48, d_kv=16, d_inner=48, d_head=16, dim=32, hidden_dim=48, num_layers=2, num_heads=2, encoder_layers=2,
    decoder_layers=2, num_decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48,
    embedding_size=32, emb_dim=32, attention_head_size=16, moe_intermediate_size=16, num_experts=4, num_local_experts=4,
    n_routed_experts=4, num_experts_per_tok=2, max_seq_len=256, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
    v_head_dim=16, n_group=1, topk_group=1, shared_expert_intermediate_size=16, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8,
    mamba_d_ssm=64, mamba_expand=2, mamba_num_heads=4, mamba_head_dim=16, n_groups=1, state_size=8, linear_num_value_heads=2,
    linear_num_key_heads=1, linear_key_head_dim=16, linear_value_head_dim=16, first_k_dense_replace=1, word_embed_proj_dim=32, rotary_dim=8,
    hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCABULARY, attention_hidden_size=32, attention_head_dim=16, rotary_pct=0.5,
    entity_vocab_size=16, entity_emb_size=16, embedding_dim=32, classifier_proj_size=32, num_buckets=8, attention_window=8,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2, num_labels=1,
)  # fmt: skip


# What some configurations need beside their sizes.
_OWN = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "diffllama": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    "esmc": {"num_key_value_heads": 2},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 32, "num_key_value_heads": 2},
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 32, "num_key_value_heads": 2},
}


def tiny_config(kind: str) -> PretrainedConfig:
    """The configuration of model type `kind` with two layers (two of each kind, of those that mix several) and a vocabulary of 384."""
    base = CONFIG_MAPPING[kind]()
    derived = {name for name in [*_SIZES, "layer_types"] if name != "num_labels" and isinstance(getattr(type(base), name, None), property)}
    derived |= {"head_dim"} if hasattr(base, "qk_rope_head_dim") else set()
    sizes = {name: size for name, size in _SIZES.items() if hasattr(base, name) and name not in derived}
    kinds = [] if "layer_types" in derived else list(dict.fromkeys(getattr(base, "layer_types", None) or []))
    if len(kinds) > 1:
        sizes |= {"layer_types": [kinds[i % len(kinds)] for i in range(2 * len(kinds))], "num_hidden_layers": 2 * len(kinds)}
    if hasattr(base, "qk_rope_head_dim"):
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    return CONFIG_MAPPING[kind](**sizes | _OWN.get(kind, {}))
