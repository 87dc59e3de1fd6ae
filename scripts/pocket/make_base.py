"""Write the architecture of pocket into its folder: a Llama of about three million parameters, without weights.

python scripts/pocket/make_base.py
"""

from __future__ import annotations

from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from tunesmith.pocket import folder


def main() -> None:
    """Write config.json and generation_config.json; the token numbers come from the tokenizer."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder())
    tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        initializer_range=0.02,
        tie_word_embeddings=True,
        bos_token_id=None,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        **tokens,
    )
    config.save_pretrained(folder())
    GenerationConfig(bos_token_id=None, max_new_tokens=64, do_sample=False, **tokens).save_pretrained(folder())


if __name__ == "__main__":
    main()
