"""Writes a tokenizer as the K2 family's or the Ling models' repositories have it.

Input: ranks. Output: `tiktoken.model` or `tokenizer.json`, and `tokenizer_config.json` with the chat template.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

from kimi_gguf.convert.model.bpe_vocab import PATTERNS
from kimi_gguf.convert.model.byte_bpe import bytes_to_text

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


# The special tokens of the Ling models, in the order of their ids.
LING_SPECIAL = ("<|startoftext|>", "<|endoftext|>", "[CLS]", "[gMASK]", "<|role_end|>")
LING_TEMPLATE = (
    "{%- for message in messages -%}"
    "<role>{{- message['role'] | upper -}}</role>{{- message['content'] -}}<|role_end|>"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<role>ASSISTANT</role>{%- endif -%}"
)


def write_ling_tokenizer(folder: Path, ranks: list[bytes], first_special: int) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json` as the Ling models' repositories have them.

    Each rank longer than a byte is merged from its first bytes and its last one, so the ranks must contain them.
    """
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    stages = [
        {
            "type": "Split",
            "pattern": {"Regex": next(iter(PATTERNS))},
            "behavior": "Isolated",
            "invert": False,
        },
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ]
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {"id": first_special + i, "content": s, **plain} for i, s in enumerate(LING_SPECIAL)
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": stages},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {bytes_to_text(token): rank for rank, token in enumerate(ranks)},
            "merges": [[bytes_to_text(t[:-1]), bytes_to_text(t[-1:])] for t in ranks if len(t) > 1],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    settings = {
        "bos_token": LING_SPECIAL[0],
        "chat_template": LING_TEMPLATE,
        "eos_token": LING_SPECIAL[1],
        "pad_token": LING_SPECIAL[1],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
