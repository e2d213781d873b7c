"""Write a language model of random weights: a real GGUF file, half a megabyte small.

It says nonsense, in bytes that often are no UTF-8, and that is enough: what a client has to
understand is the server around the model. Three habits are built into its weights, so that a talk
goes somewhere:

- offered tools, it calls one (under llama.cpp's grammar, so in the right form) unless it was just
  handed a result;
- it stops after `>`, so after a tool call;
- it likes `"`, so that a JSON string under a grammar comes to an end.

Needs `gguf` and `numpy`, and only here: the server reads the file without them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

LAYERS, WIDTH, HEADS, INNER = 2, 64, 4, 128  # 4-byte floats: 452 KiB of weights
CONTEXT = 32768  # what the model claims to be able to read; the server is started with less

# The format that most open models speak (ChatML, with Hermes's tool calls), as short as llama.cpp's
# template analysis lets it be: it renders the template with and without tools and calls, and
# derives the tool-call grammar from the differences. `<|act|>` is ours: it makes the model begin a
# tool call.
CHAT_TEMPLATE = """\
{%- if tools -%}
<|im_start|>system
Answer or call <tool_call>{"name": ..., "arguments": {...}}</tool_call>:
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif -%}
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content or '' }}
{%- for call in message.tool_calls or [] -%}
{%- set f = call.function -%}
<tool_call>{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}</tool_call>
{%- endfor %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% if tools and messages[-1].role != 'tool' %}<|act|>{% endif -%}
{%- endif -%}
"""

KINDS = gguf.TokenType
VOCABULARY = {
    "<unk>": KINDS.UNKNOWN,
    "<s>": KINDS.CONTROL,
    **{f"<0x{byte:02X}>": KINDS.BYTE for byte in range(256)},  # any text is some sequence of these
    "\u2581": KINDS.NORMAL,  # SentencePiece's space: without it a blank would be three bytes
    "<|im_start|>": KINDS.CONTROL,
    "<|im_end|>": KINDS.CONTROL,
    "<|act|>": KINDS.CONTROL,
    "<tool_call>": KINDS.USER_DEFINED,
}
TOKENS = list(VOCABULARY)

# A habit takes one dimension of the model's state for itself: (tokens that set it and how strongly,
# the token that it makes likely and how much). The embedding of a token is about 1 long, a random
# logit is about 1 high.
ALWAYS = [(token, 0.5) for token in TOKENS]
HABITS = [
    ([("<|act|>", 20.0)], "<tool_call>", 3.0),
    ([("<0x3E>", 20.0)], "<|im_end|>", 3.0),
    (ALWAYS, "<0x22>", 6.0),
]
FREE = slice(len(HABITS), None)  # the dimensions left to chance


def write_tiny_model(path: str | Path, seed: int = 0) -> Path:
    """Write the model to `path` and return it. The same seed gives the same bytes."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(CONTEXT)
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(TOKENS))
    # SentencePiece, which falls back to bytes; `gpt2` would need merges.
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_types([int(kind) for kind in VOCABULARY.values()])
    writer.add_token_scores([0.0] * len(TOKENS))
    writer.add_bos_token_id(TOKENS.index("<s>"))
    writer.add_eos_token_id(TOKENS.index("<|im_end|>"))
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(CHAT_TEMPLATE)

    for name, weights in _weights(np.random.default_rng(seed)).items():
        writer.add_tensor(f"{name}.weight", weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def _weights(draw: np.random.Generator) -> dict[str, npt.NDArray[np.float32]]:
    def matrix(outputs: int, inputs: int) -> npt.NDArray[np.float32]:
        scale = np.float32(inputs**-0.5)  # keeps the size of the activations from layer to layer
        return draw.standard_normal((outputs, inputs), dtype=np.float32) * scale

    def writes_state(weights: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        weights[: FREE.start] = 0  # layers leave the habits' dimensions alone
        return weights

    embed, output = matrix(len(TOKENS), WIDTH), matrix(len(TOKENS), WIDTH)
    embed[:, : FREE.start] = output[:, : FREE.start] = 0
    for dimension, (causes, effect, weight) in enumerate(HABITS):
        for token, strength in causes:
            embed[TOKENS.index(token), dimension] = strength
        output[TOKENS.index(effect), dimension] = weight
    for token in ("<|act|>", "<tool_call>"):
        output[TOKENS.index(token), FREE] = 0  # a middling logit: not by chance

    tensors = {
        "token_embd": embed,
        "output": output,
        "output_norm": np.ones(WIDTH, dtype=np.float32),
    }
    for layer in range(LAYERS):
        tensors |= {
            f"blk.{layer}.attn_norm": np.ones(WIDTH, dtype=np.float32),
            f"blk.{layer}.attn_q": matrix(WIDTH, WIDTH),
            f"blk.{layer}.attn_k": matrix(WIDTH, WIDTH),
            f"blk.{layer}.attn_v": matrix(WIDTH, WIDTH),
            f"blk.{layer}.attn_output": writes_state(matrix(WIDTH, WIDTH)),
            f"blk.{layer}.ffn_norm": np.ones(WIDTH, dtype=np.float32),
            f"blk.{layer}.ffn_gate": matrix(INNER, WIDTH),
            f"blk.{layer}.ffn_up": matrix(INNER, WIDTH),
            f"blk.{layer}.ffn_down": writes_state(matrix(WIDTH, INNER)),
        }
    return tensors


if __name__ == "__main__":
    print(write_tiny_model(sys.argv[1]))
