"""Writes a tokenizer as the K2 family's repositories have it.

Input: ranks. Output: `tiktoken.model`, and `tokenizer_config.json` with the special tokens and the chat template.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

MODEL_FILE = "tiktoken.model"
CONFIG_FILE = "tokenizer_config.json"
NUM_SPECIAL = 256  # ids that follow the ranks, named or reserved

# Offset from the number of ranks -> (text, is it a control token). Offsets as in the K2 family's tokenizer.
SPECIAL = {
    0: ("[BOS]", True),
    1: ("[EOS]", True),
    2: ("<|im_end|>", True),
    3: ("<|im_user|>", True),
    4: ("<|im_assistant|>", True),
    6: ("<|start_header_id|>", True),
    7: ("<|end_header_id|>", True),
    9: ("[EOT]", True),
    10: ("<|im_system|>", True),
    11: ("<|tool_calls_section_begin|>", False),
    12: ("<|tool_calls_section_end|>", False),
    13: ("<|tool_call_begin|>", False),
    14: ("<|tool_call_argument_begin|>", False),
    15: ("<|tool_call_end|>", False),
    17: ("<|im_middle|>", True),
    254: ("[UNK]", True),
    255: ("[PAD]", True),
}
OFFSET = {text: offset for offset, (text, _) in SPECIAL.items()}

SYSTEM_MESSAGE = "You are a helpful assistant"
CHAT_TEMPLATE = (
    "{%- if messages and messages[0]['role'] != 'system' -%}"
    "<|im_system|>system<|im_middle|>" + SYSTEM_MESSAGE + "<|im_end|>"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}<|im_system|>"
    "{%- elif message['role'] == 'user' -%}<|im_user|>"
    "{%- elif message['role'] == 'assistant' -%}<|im_assistant|>"
    "{%- else -%}{{- raise_exception('this model knows no role ' + message['role']) -}}"
    "{%- endif -%}"
    "{{- message['role'] + '<|im_middle|>' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}{%- for part in message['content'] -%}{{- part['text'] -}}{%- endfor -%}"
    "{%- endif -%}"
    "{{- '<|im_end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_assistant|>assistant<|im_middle|>' -}}{%- endif -%}"
)


def write_tokenizer(folder: Path, ranks: list[bytes], context_length: int) -> None:
    """Writes `tiktoken.model` and `tokenizer_config.json` as the K2 family's repositories have them."""
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks))
    (folder / MODEL_FILE).write_text("".join(lines), encoding="ascii")
    added = {
        str(len(ranks) + offset): {
            "content": text,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": special,
        }
        for offset, (text, special) in SPECIAL.items()
    }
    config = {
        "added_tokens_decoder": added,
        "additional_special_tokens": [
            text for text, special in SPECIAL.values() if special and text.startswith("<|")
        ],
        "bos_token": "[BOS]",
        "clean_up_tokenization_spaces": False,
        "eos_token": "[EOS]",
        "extra_special_tokens": {},
        "model_max_length": context_length,
        "pad_token": "[PAD]",
        "tokenizer_class": "TikTokenTokenizer",
        "unk_token": "[UNK]",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
