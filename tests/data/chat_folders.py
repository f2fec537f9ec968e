"""Folders with a small tokenizer and a chat template, as they come with models; conversations drawn at random."""

import json
import random
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", *(f"<|reserved_{i}|>" for i in range(120))]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}"
    "{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = [
    "alpha",
    "béta",
    "γάμμα",
    "the",
    "  two  spaces",
    "☃",
    "👩‍👩‍👧",
    "\n",
    "x=1",
    "<|im_end|>",
    "<|im_start|>user",
    "</s>",
    "",
    "日本",
]


@cache
def tokenizer_json() -> str:
    """Byte-level BPE with the control tokens of CONTROL, and a <s> before each text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=440, special_tokens=CONTROL, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["the alpha assistant user\n\n\nsystem x=1 the alpha béta"] * 4, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", CONTROL.index("<s>"))])
    return backend.to_str()


def make_folder(path: Path, template: str = CHATML) -> Path:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    settings = {"bos_token": "<s>", "eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "chat_template.jinja").write_text(template, encoding="utf-8")
    return path


def write_rows(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def draw_text(generator: random.Random, most: int = 8) -> str:
    return " ".join(generator.choice(WORDS) for _ in range(generator.randint(0, most)))


def draw_conversation(seed: int) -> list[dict[str, str]]:
    """Up to three turns, some with a system message; contents may be empty or spell control tokens."""
    generator = random.Random(seed)
    messages = [{"role": "system", "content": draw_text(generator)}] if generator.random() < 0.4 else []
    for _ in range(generator.randint(1, 3)):
        messages += [
            {"role": "user", "content": draw_text(generator)},
            {"role": "assistant", "content": "a" + draw_text(generator)},
        ]
    return messages
