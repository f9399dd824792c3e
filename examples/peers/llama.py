"""Llama of transformers as a baseline: `pip install transformers`.

phase1 perplexity --model baseline=examples.peers.llama:llama
"""

from transformers import LlamaConfig, LlamaForCausalLM


def llama(vocab_size, d_model, n_layers, n_heads):
    """As wide, deep and large as the Transformer of this package, its table tied."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size, hidden_size=d_model, num_hidden_layers=n_layers, num_attention_heads=n_heads,
            intermediate_size=max(64, d_model * 8 // 3 // 64 * 64), max_position_embeddings=2**20, tie_word_embeddings=True,
            use_cache=False, attn_implementation="sdpa",
        )
    )  # fmt: skip
